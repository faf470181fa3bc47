"""Per-pixel argmax over the channels of a bilinearly resized grid, without resizing every channel.

Two properties of bilinear interpolation make this exact (docs/architecture.md has a proof and a figure). A value
between four grid points is a weighted mean of the values there, with the same weights for all channels.

1. Cells: if one channel is the largest at all four corners of a cell, it is the largest at every pixel in the cell.
   Only cells whose corners differ, at the borders between regions, are interpolated.
2. Tiles: a value in a tile of several cells lies between the minimum and the maximum at the tile's grid points. If one
   channel's lower bound exceeds all other channels' upper bounds, it wins everywhere in the tile.

Both hold for thresholds too: a channel that reaches a threshold at all four corners reaches it at every pixel between.

Where neither decides, a few leading channels are computed, and instead of the others one channel that bounds them from
above: `Shortlist`.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .resize_faim2f import Band, BilinearResize, Size, pieces

# Minimum side of a tile, in cells; see `tiles_of`.
TILE = 3
# The number of channels of the first shortlist; each further one has twice as many, at most the share LONGEST of all:
# longer ones would save less than failed attempts cost.
SHORTEST, LONGEST = 16, 1 / 3


class Tiles(NamedTuple):
    """Square tiles of cells over a grid, with the minimum and maximum of each channel in each tile.

    Neighboring tiles share their border points, or overlap. Cell i is in tile i // stride, and in others if they
    overlap.
    """

    shape: tuple[int, int]  # tiles down, tiles across
    lowest: Tensor  # (tiles, channels)
    highest: Tensor  # (tiles, channels)
    stride: int = TILE

    def of(self, channels: Tensor) -> "Tiles":
        """The bounds of these channels, int64."""
        lowest, highest = self.lowest.index_select(1, channels), self.highest.index_select(1, channels)
        return self._replace(lowest=lowest, highest=highest)


def tiles_of(table: Tensor, grid: Size, cells: int = 1) -> Tiles:
    """The tiles of a grid whose values are a table (height * width, channels).

    Any `cells` x `cells` neighboring cells lie in one tile. So tiles overlap if `cells` is more than 1, and are larger
    than TILE if `cells` is.
    """
    maps, stride = table.view(*grid, -1), max(TILE - cells, 0) + 1
    lowest, highest = (_pooled(maps, pick, stride, stride + cells - 1) for pick in (torch.minimum, torch.maximum))
    return Tiles((lowest.shape[0], lowest.shape[1]), lowest.flatten(0, 1), highest.flatten(0, 1), stride)


def classes_that_can_win(tiles: Tiles, rounding: float) -> Tensor:
    """The classes, int64 in ascending order, that can be the largest at a pixel whose grid points lie in one tile.

    This is exact: in every tile, the upper bound of any other class is below the lower bound of some class.
    """
    best = tiles.lowest.amax(1, keepdim=True)
    return (~(tiles.highest + rounding < best)).any(0).nonzero()[:, 0]


def mixed_cells(first: BilinearResize, second: BilinearResize) -> int:
    """The number of neighboring cells of the grid, along either axis, that a pixel mixes after two successive resizes.

    The first resize mixes the points of one cell. A final pixel mixes two neighboring results, whose cells differ.
    """
    if first.identity or second.identity:
        return 1
    return 1 + max(int(axis.low.diff().max()) if len(axis.low) > 1 else 0 for axis in (first.rows, first.columns))


def _pooled(maps: Tensor, pick: Callable[..., Tensor], stride: int, side_length: int) -> Tensor:
    """Reduces maps (height, width, channels) by `pick` over square windows of `side_length` cells with this stride."""
    for side in (0, 1):
        count = maps.shape[side]
        picked = maps[::stride] if side == 0 else maps[:, ::stride]
        picked = picked.narrow(side, 0, -(-max(1, count - 1) // stride)).clone()
        for step in range(1, side_length + 1):
            shifted = maps[step::stride] if side == 0 else maps[:, step::stride]
            length = min(picked.shape[side], shifted.shape[side])  # the last window may reach beyond the edge
            part = picked.narrow(side, 0, length)
            pick(part, shifted.narrow(side, 0, length), out=part)
        maps = picked
    return maps


class Settled(NamedTuple):
    """The pixels of a grid whose argmax the tile bounds already determine."""

    tile_of_row: Tensor  # (height,) int64
    tile_of_column: Tensor  # (width,) int64
    winner: Tensor  # (tiles down, tiles across) int64: the largest channel, or -1 if undecided ("open")
    inside: Tensor | None  # (tiles, channels) float32: 1 if the channel reaches the threshold; undefined if open

    def sums(self, values: Tensor, first: int) -> Tensor:
        """The sum of `values` (rows, width), which start at the grid row `first`, in each tile: (tiles, 1)."""
        down, across = self.winner.shape
        of_rows = values.new_zeros(down, values.shape[1])
        of_rows.index_add_(0, self.tile_of_row[first : first + len(values)], values)
        return values.new_zeros(down, across).index_add_(1, self.tile_of_column, of_rows).view(-1, 1)


def settle(tiles: Tiles, resize: BilinearResize, rounding: float, threshold: float | None = None) -> Settled:
    """Finds the tiles with one certain winner and, given a threshold, with each channel entirely above or below it.

    Args:
        tiles: bounds on the source grid of `resize`; the result is for its target grid.
        rounding: maximum rounding error of a computed value.
        threshold: threshold on the values; None for none.
    """
    least, winner = tiles.lowest.max(1)
    rival = tiles.highest.scatter(1, winner[:, None], -torch.inf).amax(1)
    clear = least > rival + rounding
    inside = None
    if threshold is not None:
        within = tiles.lowest >= threshold + rounding
        clear &= (within | (tiles.highest < threshold - rounding)).all(1)
        inside = within.float()
    tile_of_row, tile_of_column = (
        (axis.low // tiles.stride).clamp_(max=count - 1)
        for axis, count in zip((resize.rows, resize.columns), tiles.shape, strict=True)
    )
    return Settled(tile_of_row, tile_of_column, torch.where(clear, winner, -1).view(tiles.shape), inside)


class Shortlist(NamedTuple):
    """Leading channels, and a bound on all others."""

    places: Tensor  # (L,) int64, ascending: the leading channels
    values: Callable[[Tensor, Tensor], Tensor]  # as of `resized_argmax`: the L channels, and a last one >= all others
    rounding: float  # maximum rounding error of a value

    def winners(self, table: Tensor) -> Tensor | None:
        """The largest channel in each row (N, L + 1), or None if somewhere it may be none of the leading ones."""
        best, place = table[:, :-1].max(1)
        if not bool((table[:, -1] + self.rounding < best).all()):  # also if it is NaN
            return None
        return self.places.index_select(0, place)


def shortlists(
    columns: Tensor,
    tiles: Tiles,
    values_of: Callable[[Tensor], Callable[[Tensor, Tensor], Tensor]],
    rounding: float,
) -> Iterator[Shortlist]:
    """Longer and longer shortlists of the channels with the highest upper bounds.

    Args:
        columns: (rows, channels), not negative, one column for each channel.
        tiles: bounds on the channels.
        values_of: makes `values` for `resized_argmax` from any such columns. Each value is linear in its column, with
            weights that are not negative, so the largest entries in each row make the values of a bound.
        rounding: maximum rounding error of a value.
    """
    order, length = tiles.highest.amax(0).argsort(descending=True), SHORTEST
    while length <= LONGEST * len(order):
        places = order[:length].sort().values
        rest = columns.index_select(1, order[length:]).amax(1, keepdim=True)
        yield Shortlist(places, values_of(torch.cat([columns.index_select(1, places), rest], 1)), rounding)
        length *= 2


def resized_argmax(
    values: Callable[[Tensor, Tensor], Tensor],
    resize: BilinearResize,
    classes: Tensor,
    settled: Settled | None = None,
    area_threshold: float | None = None,
    shorter: Iterable[Shortlist] = (),
) -> tuple[Tensor, Tensor]:
    """The largest channel at each pixel of the resized grid.

    Args:
        values: `values(y, x)` computes all channels (N, K) at grid points, int64 (N,) each.
        resize: from the grid's size to the target size.
        classes: (K,), the label to write for each channel, at least 0.
        settled: pixels already determined by `settle`, with the same threshold; None for none.
        area_threshold: if given, also count for each channel the target pixels with at least this value.
        shorter: shortlists to try in this order before all channels are computed; not with an `area_threshold`.

    Returns:
        labels (height, width) in the dtype of `classes`, and areas, int64 (K,), zeros without a threshold. As in
        torch's `argmax`, the first of equal channels wins.
    """
    device, channels, width_in = classes.device, len(classes), resize.size_in[1]
    labels = torch.empty(resize.size_out, dtype=classes.dtype, device=device)
    areas = torch.zeros(channels, dtype=torch.int64, device=device)
    codes = _Codes(channels, area_threshold is not None, device)

    def fill(band: Band, shortlist: Shortlist | None) -> bool:
        """Computes a band, or returns False if the shortlist is too short."""
        values_at = values if shortlist is None else shortlist.values
        winners_of = _largest if shortlist is None else shortlist.winners
        # 1. Compute the grid points that are open, or belong to a cell whose corners differ.
        maps = _known(settled, codes, band, width_in, device)
        best = maps[0]
        if resize.identity:
            needed = best < 0
        else:
            needed = _corners(_uniform_cells(maps).logical_not_().logical_or_(best < 0))
        pixel = needed.view(-1).nonzero()[:, 0]
        table = values_at(pixel.div(width_in, rounding_mode="floor") + band.first, pixel % width_in)
        inside = None if area_threshold is None else torch.ge(table, area_threshold, out=torch.empty_like(table))
        largest = winners_of(table)
        if largest is None:
            return False
        # Settled points keep their proven code; a computed one could differ by rounding.
        was_open = best.view(-1).index_select(0, pixel) < 0
        for values_map, found in zip(maps, codes.write(largest, inside), strict=True):
            flat = values_map.view(-1)
            flat[pixel] = torch.where(was_open, found, flat.index_select(0, pixel))
        winner = classes.index_select(0, codes.winner(best).view(-1)).view(best.shape)
        # 2. Fill the target pixels of uniform cells, and interpolate the others.
        part = labels[band.top : band.bottom]
        uniform: Tensor | None = None
        if resize.identity:
            part.copy_(winner)
        else:
            low = resize.rows.low[band.top : band.bottom] - band.first
            uniform = _uniform_cells(maps)
            _spread(torch.where(uniform, winner, -1), low, resize.columns.low, out=part)
            position = torch.zeros(best.numel(), dtype=torch.int32, device=device)
            position[pixel] = torch.arange(len(pixel), dtype=torch.int32, device=device)
            y, x = (part < 0).nonzero(as_tuple=True)
            winners = torch.empty_like(y)
            for chunk in pieces(len(y), channels):
                mixed = resize.pixels(table, y[chunk] + band.top, x[chunk], band.first, position)
                largest = winners_of(mixed)
                if largest is None:
                    return False
                winners[chunk] = largest
                if area_threshold is not None:
                    areas.add_(mixed.ge_(area_threshold).sum(0).long())
            part[y, x] = classes.index_select(0, winners)
        # 3. Add the areas of uniform cells: the number of target pixels in each, for the channels inside. Float32 adds
        # the pixels of a band, fewer than 2**24, exactly; a matrix product could round them to TF32 or bfloat16.
        if inside is not None:
            counted = torch.ones_like(best)
            if uniform is not None:
                pixels_of_row = torch.bincount(low, minlength=len(best)).float()
                counted = (pixels_of_row[:, None] * resize.pixels_of_column) * uniform
            areas.add_(inside.mul_(counted.view(-1, 1).index_select(0, pixel)).sum(0).long())
            if settled is not None and settled.inside is not None:
                of_tiles = settled.sums(counted.masked_fill_(needed, 0), band.first)
                areas.add_(settled.inside.mul(of_tiles).sum(0).long())
        return True

    remaining = iter(shorter)
    shortlist = next(remaining, None)
    assert shortlist is None or area_threshold is None
    for band in resize.bands(channels):
        while not fill(band, shortlist):
            shortlist = next(remaining, None)
    return labels, areas


def _largest(table: Tensor) -> Tensor | None:
    return table.max(1).indices


class _Codes:
    """Packs a pixel's largest channel, and which channels reach the threshold, into as few numbers as possible.

    Comparing two pixels then takes one comparison per number instead of one per channel. A float32 holds 24 bits
    exactly: the first number has the winner above `free` flags, each further number 24 flags.
    """

    def __init__(self, channels: int, flagged: bool, device: torch.device):
        free = 24 - channels.bit_length()
        self.shift = 2.0**free
        channel = torch.arange(channels if flagged else 0, device=device)
        number = (channel - free).div(24, rounding_mode="floor").add_(1).clamp_(min=0)
        bit = torch.where(channel < free, channel, (channel - free) % 24)
        self.flags = torch.zeros(
            len(channel), 1 + int(number.max()) if flagged else 1, dtype=torch.float32, device=device
        )
        self.flags[channel, number] = (2.0**bit).float()

    def write(self, winner: Tensor, inside: Tensor | None) -> list[Tensor]:
        """The numbers, float32 (N,) each, of winners (N,) and, if there is a threshold, of flags (N, channels)."""
        first = winner.float() * self.shift
        if inside is None:
            return [first]
        numbers = (inside @ self.flags).unbind(1)
        return [first + numbers[0], *numbers[1:]]

    def winner(self, first: Tensor) -> Tensor:
        """The winners in first numbers."""
        return first.mul(1 / self.shift).long()


def _known(settled: Settled | None, codes: _Codes, band: Band, width: int, device: torch.device) -> list[Tensor]:
    """The codes of the band's settled points as maps (rows, width). The first map is -1 at open points."""
    if settled is None:
        unknown = torch.full((band.last - band.first, width), -1.0, dtype=torch.float32, device=device)
        return [unknown.clone() for _ in range(codes.flags.shape[1])]
    open_tiles = settled.winner.view(-1) < 0
    first, *others = codes.write(settled.winner.view(-1), settled.inside)
    rows = settled.tile_of_row[band.first : band.last]
    return [
        _spread(numbers.view(settled.winner.shape), rows, settled.tile_of_column)
        for numbers in (first.masked_fill_(open_tiles, -1), *others)
    ]


def _spread(maps: Tensor, rows: Tensor, columns: Tensor, out: Tensor | None = None) -> Tensor:
    """maps[rows][:, columns], by copying whole rows, which is several times as fast as gathering columns."""
    wide = maps.t().contiguous().index_select(0, columns).t().contiguous()
    return torch.index_select(wide, 0, rows, out=out)


def _uniform_cells(maps: list[Tensor]) -> Tensor:
    """Which cells (y, x) of the maps (rows, width) have four equal corners (y..y+1, x..x+1) in every map.

    No cell starts at the last row and column; they count as uniform.
    """
    rows, width = maps[0].shape
    upper, lower = slice(0, max(1, rows - 1)), slice(min(1, rows - 1), rows)  # equal if there is one row
    left, right = slice(0, max(1, width - 1)), slice(min(1, width - 1), width)
    uniform = torch.ones_like(maps[0], dtype=torch.bool)
    cells = uniform[upper, left]
    for values in maps:
        first = values[upper, left]
        for other in (values[upper, right], values[lower, left], values[lower, right]):
            cells.logical_and_(first == other)
    return uniform


def _corners(cells: Tensor) -> Tensor:
    """The points (rows, width) that are a corner of any of these cells (rows, width)."""
    wide = cells.clone()
    wide[:, 1:].logical_or_(cells[:, :-1])
    pixels = wide.clone()
    pixels[1:].logical_or_(wide[:-1])
    return pixels


__all__ = [
    "Settled",
    "Shortlist",
    "Tiles",
    "classes_that_can_win",
    "mixed_cells",
    "resized_argmax",
    "settle",
    "shortlists",
    "tiles_of",
]

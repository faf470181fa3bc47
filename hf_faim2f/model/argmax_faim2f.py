"""ARGMAX"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .resize_faim2f import Band, BilinearResize, Size, pieces

# Cells along a tile's side, over which values are bounded before any is computed.
TILE = 3


class Tiles(NamedTuple):
    """Tiles of TILE x TILE cells over a grid, with the least and greatest value of each channel in each tile.

    Neighbouring tiles share their border, so every cell, and every value interpolated inside it, is within one tile.
    """

    shape: tuple[int, int]  # tiles down, tiles across
    lowest: Tensor  # (tiles, channels)
    highest: Tensor  # (tiles, channels)


def tiles_of(table: Tensor, grid: Size) -> Tiles:
    """The tiles of a table (height * width, channels)."""
    maps = table.view(*grid, -1)
    lowest, highest = _pooled(maps, torch.minimum), _pooled(maps, torch.maximum)
    return Tiles((lowest.shape[0], lowest.shape[1]), lowest.flatten(0, 1), highest.flatten(0, 1))


def _pooled(maps: Tensor, pick: Callable[..., Tensor]) -> Tensor:
    """Windows of TILE + 1 by TILE + 1 pixels, TILE apart, of maps (height, width, channels)."""
    for side in (0, 1):
        count = maps.shape[side]
        picked = maps[::TILE] if side == 0 else maps[:, ::TILE]
        picked = picked.narrow(side, 0, -(-max(1, count - 1) // TILE)).clone()
        for step in range(1, TILE + 1):
            shifted = maps[step::TILE] if side == 0 else maps[:, step::TILE]
            length = min(picked.shape[side], shifted.shape[side])  # the last window may reach beyond the edge
            part = picked.narrow(side, 0, length)
            pick(part, shifted.narrow(side, 0, length), out=part)
        maps = picked
    return maps


def _spread(maps: Tensor, rows: Tensor, columns: Tensor, out: Tensor | None = None) -> Tensor:
    """maps[rows][:, columns], as copies of whole rows, which is several times faster than picking columns."""
    wide = maps.t().contiguous().index_select(0, columns).t().contiguous()
    return torch.index_select(wide, 0, rows, out=out)


class Settled(NamedTuple):
    """What is known of a grid's pixels before any value is computed."""

    tile_of_row: Tensor  # (height,) int64
    tile_of_column: Tensor  # (width,) int64
    winner: Tensor  # (tiles down, tiles across) int64, the largest channel, or -1 where it is open
    inside: Tensor | None  # (tiles, channels) float32, 1 where the channel reaches the threshold; not where open
    rows_in_tiles: Tensor  # (tiles down, height) float32, 1 where the row is the tile's
    columns_in_tiles: Tensor  # (width, tiles across) float32, 1 where the column is the tile's


def settle(tiles: Tiles, resize: BilinearResize, rounding: float, threshold: float | None = None) -> Settled:
    """Finds the tiles in which one channel's least value exceeds every other's greatest and, with a threshold, each
    channel is altogether inside or outside. `tiles` are of the grid that `resize` starts from, and the answer is for
    the grid that it leads to. `rounding` is the error that computed values can have."""
    least, winner = tiles.lowest.max(1)
    rival = tiles.highest.scatter(1, winner[:, None], -torch.inf).amax(1)
    clear = least > rival + rounding
    inside = None
    if threshold is not None:
        within = tiles.lowest >= threshold + rounding
        clear &= (within | (tiles.highest < threshold - rounding)).all(1)
        inside = within.float()
    tile_of_row, tile_of_column = (
        (axis.low // TILE).clamp_(max=count - 1)
        for axis, count in zip((resize.rows, resize.columns), tiles.shape, strict=True)
    )
    down, across = (torch.arange(count, device=winner.device) for count in tiles.shape)
    return Settled(
        tile_of_row,
        tile_of_column,
        torch.where(clear, winner, -1).view(tiles.shape),
        inside,
        (down[:, None] == tile_of_row).float(),
        (tile_of_column[:, None] == across).float(),
    )


def resized_argmax(
    values: Callable[[Tensor, Tensor], Tensor],
    resize: BilinearResize,
    classes: Tensor,
    settled: Settled | None = None,
    area_threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Which channel is the largest at each pixel of the resized grid, without resizing the channels.

    Args:
        values: `values(y, x)` gives all channels (N, K) at pixels of the grid, int64 (N,) each.
        resize: from the grid's size to the target's.
        classes: (K,), what to write for each channel, from 0 up.
        settled: what is known of the grid without `values`, under the same threshold.
        area_threshold: where given, also counts each channel's target pixels of at least this value.

    Returns:
        labels (height, width) in the type of `classes`, and areas, int64 (K,), zeros without a threshold. As in
        torch's `argmax`, the first of equal channels wins.
    """
    device, channels, width_in = classes.device, len(classes), resize.size_in[1]
    labels = torch.empty(resize.size_out, dtype=classes.dtype, device=device)
    areas = torch.zeros(channels, dtype=torch.float64, device=device)
    codes = _Codes(channels, area_threshold is not None, device)
    for band in resize.bands(channels):
        maps = _known(settled, codes, band, width_in, device)
        best = maps[0]
        if resize.identity:
            needed = best < 0
        else:
            needed = _corners(_uniform_cells(maps).logical_not_().logical_or_(best < 0))
        pixel = needed.view(-1).nonzero()[:, 0]
        table = values(pixel.div(width_in, rounding_mode="floor") + band.first, pixel % width_in)
        inside = None if area_threshold is None else torch.ge(table, area_threshold, out=torch.empty_like(table))
        # what was known was proven: only open pixels are filled in, and so no settled cell can come open again
        was_open = best.view(-1).index_select(0, pixel) < 0
        for values_map, found in zip(maps, codes.write(table.max(1).indices, inside), strict=True):
            flat = values_map.view(-1)
            flat[pixel] = torch.where(was_open, found, flat.index_select(0, pixel))
        winner = classes.index_select(0, codes.winner(best).view(-1)).view(best.shape)
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
                winners[chunk] = mixed.max(1).indices
                if area_threshold is not None:
                    areas += mixed.ge_(area_threshold).sum(0)
            part[y, x] = classes.index_select(0, winners)
        if inside is not None:
            # A uniform cell is inside or outside as a whole: its target pixels are counted, not visited. These are
            # whole numbers below 2**24, which float32 adds exactly.
            counted = torch.ones_like(best)
            if uniform is not None:
                counted = (
                    torch.bincount(low, minlength=len(best)).float()[:, None] * resize.pixels_of_column
                ) * uniform
            areas += counted.view(-1).index_select(0, pixel) @ inside
            if settled is not None and settled.inside is not None:
                rest = counted.masked_fill_(needed, 0)
                of_tiles = settled.rows_in_tiles[:, band.first : band.last] @ (rest @ settled.columns_in_tiles)
                areas += of_tiles.view(-1).double() @ settled.inside.double()
    return labels, areas.long()


class _Codes:
    """What a pixel's channels say, the largest of them and which reach the threshold, as few whole numbers: one
    comparison of two pixels' numbers compares dozens of channels. float32 holds 24 bits exactly."""

    def __init__(self, channels: int, flagged: bool, device: torch.device):
        free = 24 - channels.bit_length()  # bits for flags beside the winner, in the first number
        self.shift = 2.0**free
        channel = torch.arange(channels if flagged else 0, device=device)
        number = (channel - free).div(24, rounding_mode="floor").add_(1).clamp_(min=0)
        bit = torch.where(channel < free, channel, (channel - free) % 24)
        self.flags = torch.zeros(len(channel), 1 + int(number.max()) if flagged else 1, device=device)
        self.flags[channel, number] = 2.0**bit

    def write(self, winner: Tensor, inside: Tensor | None) -> list[Tensor]:
        """The numbers (N,) float32 of winners (N,) and, where there is a threshold, of flags (N, channels)."""
        first = winner.float() * self.shift
        if inside is None:
            return [first]
        numbers = (inside @ self.flags).unbind(1)
        return [first + numbers[0], *numbers[1:]]

    def winner(self, first: Tensor) -> Tensor:
        """The winners in first numbers."""
        return first.mul(1 / self.shift).long()


def _known(settled: Settled | None, codes: _Codes, band: Band, width: int, device: torch.device) -> list[Tensor]:
    """The codes of the band's pixels before any evaluation, maps (rows, width); the first is -1 where open."""
    if settled is None:
        return [torch.full((band.last - band.first, width), -1.0, device=device) for _ in range(codes.flags.shape[1])]
    open_tiles = settled.winner.view(-1) < 0
    first, *others = codes.write(settled.winner.view(-1), settled.inside)
    rows = settled.tile_of_row[band.first : band.last]
    return [
        _spread(numbers.view(settled.winner.shape), rows, settled.tile_of_column)
        for numbers in (first.masked_fill_(open_tiles, -1), *others)
    ]


def _uniform_cells(maps: list[Tensor]) -> Tensor:
    """Cells (y, x) of the maps (rows, width) whose four corners (y..y+1, x..x+1) are alike in every map. Beyond the
    last cell, where no target pixel falls, all are called uniform."""
    rows, width = maps[0].shape
    upper, lower = slice(0, max(1, rows - 1)), slice(min(1, rows - 1), rows)  # the same for a single row
    left, right = slice(0, max(1, width - 1)), slice(min(1, width - 1), width)
    uniform = torch.ones_like(maps[0], dtype=torch.bool)
    cells = uniform[upper, left]
    for values in maps:
        first = values[upper, left]
        for other in (values[upper, right], values[lower, left], values[lower, right]):
            cells.logical_and_(first == other)
    return uniform


def _corners(cells: Tensor) -> Tensor:
    """The pixels (rows, width) that are a corner of any of these cells (rows, width)."""
    wide = cells.clone()
    wide[:, 1:].logical_or_(cells[:, :-1])
    pixels = wide.clone()
    pixels[1:].logical_or_(wide[:-1])
    return pixels

"""Bilinear resizing of selected pixels in bounded memory, and of binary masks.

Positions are computed as in `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)`.

A resized pixel is a weighted sum of four rows of a (pixels, channels) table. `torch.nn.functional.embedding_bag`
computes such sums for any list of pixels without temporaries. Full images are resized in bands, so memory grows with
the target's pixels, not with channels times pixels.
"""

import operator
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

# Maximum number of float32 entries in a band's table.
BAND_ELEMENTS = 2**21
# Maximum number of entries per step, small enough for the CPU cache.
STEP_ELEMENTS = 2**19
# Maximum number of target pixels in a band.
BAND_PIXELS = 2**21

Size = tuple[int, int]  # height, width


class Axis(NamedTuple):
    """Maps `size_out` positions to pairs among `size_in` positions: (1 - weight) * low + weight * high."""

    low: Tensor  # (size_out,) int64
    high: Tensor  # (size_out,) int64: low + 1, or 0 if size_in is 1
    weight: Tensor  # (size_out,) float32 in 0..1; 1 only beyond the last center


def pair(name: str, value: Iterable[Any]) -> Size:
    """Two positive whole numbers, (height, width); ValueError with `name` if the value is something else."""
    try:
        height, width = (operator.index(side) for side in value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be two whole numbers, (height, width), not {value!r}.") from None
    if height < 1 or width < 1:
        raise ValueError(f"{name} must be a positive (height, width), not ({height}, {width}).")
    return height, width


def grid_of(mask_logits: Tensor) -> Size:
    """(h, w) of mask logits (Q, h, w)."""
    return mask_logits.shape[1], mask_logits.shape[2]


def table_of(maps: Tensor) -> Tensor:
    """Maps (K, h, w) as a table (h * w, K) for `BilinearResize`, in new memory."""
    # A copy of three dimensions runs on all threads; torch transposes two dimensions on one.
    return maps.permute(1, 2, 0).clone(memory_format=torch.contiguous_format).flatten(0, 1)


def bilinear_axis(size_in: int, size_out: int) -> Axis:
    """Sampling positions along one axis (half-pixel centers), rounded as in torch.

    The scale is a float32 quotient, and the position is rounded once, because torch's kernels fuse the multiplication
    and the subtraction. This matters at integer positions, where a weight of exactly 0 excludes the neighbor.
    """
    scale = np.float64(np.float32(size_in) / np.float32(size_out))  # in NumPy, as some devices have no float64
    position = torch.from_numpy(((np.arange(size_out) + 0.5) * scale - 0.5).astype(np.float32)).clamp_(min=0)
    low = position.long().clamp_(max=max(0, size_in - 2))
    return Axis(low, (low + 1).clamp_(max=size_in - 1), (position - low).clamp_(0, 1))


def nearest_axis(size_in: int, size_out: int) -> Tensor:
    """The source position (size_out,) int64 that `interpolate(mode="nearest")` reads for each target position."""
    return F.interpolate(torch.arange(size_in, dtype=torch.float32)[None, None], size=size_out)[0, 0].long()


class Band(NamedTuple):
    """Target rows top..bottom and the source rows first..last that they read, both half-open."""

    top: int
    bottom: int
    first: int
    last: int


class Region(NamedTuple):
    """A rectangle in a grid, half-open on both axes."""

    top: int
    bottom: int
    left: int
    right: int


class BilinearResize:
    """Resizes grids of `size_in` (height, width) to `size_out`.

    A table holds the grid, or some of its rows, as (rows * width, channels), float32 and contiguous. `first_row` is the
    grid row at which the table starts.
    """

    def __init__(self, size_in: Size, size_out: Size, device: torch.device):
        self.size_in, self.size_out = size_in, size_out
        self.identity = size_in == size_out
        rows, columns = (bilinear_axis(a, b) for a, b in zip(size_in, size_out, strict=True))
        self._low_rows, self._high_rows = rows.low.tolist(), rows.high.tolist()
        self._low_columns, self._high_columns = columns.low.tolist(), columns.high.tolist()
        self.rows, self.columns = (Axis(*(part.to(device) for part in axis)) for axis in (rows, columns))
        # A pixel's four corners are those of its column, shifted by a number of rows; its weights are products of row
        # and column weights. Corners are ordered upper left, upper right, lower left, lower right.
        width_in = size_in[1]
        self.pixels_of_column = torch.bincount(self.columns.low, minlength=width_in).float()
        pair = torch.stack([self.columns.low, self.columns.high], 1).int()
        self._corners = torch.cat([pair, pair + (width_in if size_in[0] > 1 else 0)], 1)  # (W, 4)
        self._row_start = (self.rows.low.int() * width_in)[:, None].repeat(1, 4)  # (H, 4)
        self._column_weights = torch.stack([1 - self.columns.weight, self.columns.weight] * 2, 1)  # (W, 4)
        upper, lower = 1 - self.rows.weight, self.rows.weight
        self._row_weights = torch.stack([upper, upper, lower, lower], 1)  # (H, 4)
        lower_pair = torch.tensor([False, False, True, True], device=device)
        self._pattern = torch.stack(  # (2, 4 * W): the factors of a row's upper and lower weight
            [self._column_weights.masked_fill(mask, 0).flatten() for mask in (lower_pair, ~lower_pair)]
        )

    def bands(self, channels: int) -> Iterator[Band]:
        """Splits the target into bands whose source rows, with `channels` values per pixel, have a bounded size."""
        (height_in, width_in), (height, width) = self.size_in, self.size_out
        rows = min(BAND_PIXELS // width, BAND_ELEMENTS * height // (width_in * channels * height_in))
        for top in range(0, height, max(1, rows)):
            bottom = min(height, top + max(1, rows))
            if self.identity:
                yield Band(top, bottom, top, bottom)
            else:
                yield Band(top, bottom, self._low_rows[top], self._high_rows[bottom - 1] + 1)

    def steps(self, top: int, bottom: int, channels: int) -> Iterator[tuple[int, int]]:
        """Splits target rows top..bottom into steps that fit into the cache."""
        rows = max(1, STEP_ELEMENTS // (self.size_out[1] * channels))
        for start in range(top, bottom, rows):
            yield start, min(bottom, start + rows)

    def whole_rows(self, table: Tensor, top: int, bottom: int, first_row: int = 0) -> Tensor:
        """Target rows top..bottom of all channels: ((bottom - top) * width, channels), in new memory."""
        width = self.size_in[1]
        if self.identity:
            return table[(top - first_row) * width : (bottom - first_row) * width].clone()
        corners = (self._row_start[top:bottom, :1] - first_row * width) + self._corners.view(1, -1)
        upper, lower = (self._row_weights[top:bottom, i, None] * self._pattern[i - 1] for i in (1, 2))
        return _weighted_sum(table, corners, upper + lower)

    def pixels(self, table: Tensor, y: Tensor, x: Tensor, first_row: int = 0, position: Tensor | None = None) -> Tensor:
        """The target pixels (y, x), int64 (N,) each, of all channels: (N, channels).

        If the table holds only some of the grid's pixels, `position` maps a pixel to its row in the table.
        """
        if self.identity and position is None:
            return table.index_select(0, (y - first_row) * self.size_in[1] + x)
        start = self._row_start if first_row == 0 else self._row_start - first_row * self.size_in[1]
        corners = start.index_select(0, y).add_(self._corners.index_select(0, x))
        if position is not None:
            corners = position.index_select(0, corners.view(-1))
        weights = self._row_weights.index_select(0, y).mul_(self._column_weights.index_select(0, x))
        return _weighted_sum(table, corners, weights)

    def reach(self, region: Region) -> Region:
        """The region of the target that reads any pixel of this grid region, with a margin of one pixel."""
        if region.bottom == region.top:
            return region
        rows = _reach(self._low_rows, self._high_rows, region.top, region.bottom)
        columns = _reach(self._low_columns, self._high_columns, region.left, region.right)
        return Region(*rows, *columns)

    def parts(self, region: Region) -> Iterator[Region]:
        """Splits a region of the target into groups of rows that fit into the cache."""
        rows = max(1, STEP_ELEMENTS // max(1, region.right - region.left))
        for top in range(region.top, region.bottom, rows):
            yield region._replace(top=top, bottom=min(region.bottom, top + rows))

    def part(self, channel: Tensor, region: Region) -> Tensor:
        """This region of a resized channel; `channel` is the full grid (h, w), float."""
        top, bottom, left, right = region
        if self.identity or top == bottom:
            return channel[top:bottom, left:right]
        first, last = self._low_columns[left], self._high_columns[right - 1] + 1
        rows = _between(channel[:, first:last], self.rows, slice(top, bottom), 0)
        # Gathering whole rows is several times as fast as gathering columns.
        return _between(rows.t().contiguous(), self.columns, slice(left, right), first).t()


def regions_of(rows: Tensor, columns: Tensor) -> list[Region]:
    """The bounding regions of n masks; an empty mask has an empty region.

    Args:
        rows: (n, height), nonzero where the row has a pixel of the mask.
        columns: (n, width), likewise.
    """
    extents = []
    for set_there in (rows != 0, columns != 0):
        numbers = set_there.byte()
        extents += [numbers.argmax(1), numbers.shape[1] - numbers.flip(1).argmax(1)]
    kept = (rows != 0).any(1)
    return [Region(*one) for one in (torch.stack(extents, 1) * kept[:, None]).tolist()]


def _reach(low: Sequence[int], high: Sequence[int], first: int, last: int) -> tuple[int, int]:
    """The half-open range of positions that read any of first..last, with a margin of one."""
    return max(0, bisect_left(high, first) - 1), min(len(low), bisect_left(low, last) + 1)


def _between(rows: Tensor, axis: Axis, places: slice, first: int) -> Tensor:
    """Interpolated rows at positions `places` of the axis; `rows` starts at the grid's row `first`."""
    low, high = axis.low[places] - first, axis.high[places] - first
    return rows.index_select(0, low).lerp_(rows.index_select(0, high), axis.weight[places, None])


@lru_cache(maxsize=32)
def bilinear_resize(size_in: Size, size_out: Size, device: torch.device) -> BilinearResize:
    """The `BilinearResize` for these sizes, cached."""
    return BilinearResize(size_in, size_out, device)


def _weighted_sum(table: Tensor, corners: Tensor, weights: Tensor) -> Tensor:
    return F.embedding_bag(corners.view(-1, 4), table, per_sample_weights=weights.view(-1, 4), mode="sum")


def as_they_are(values: Tensor, out: Tensor) -> None:
    """A `finish` function that changes nothing."""
    out.copy_(values)


def rows_of(
    resize: BilinearResize, table: Tensor, channels: int, finish: Callable[[Tensor, Tensor], None] = as_they_are
) -> Callable[[int, int], Tensor]:
    """Returns a function of (first, last) that computes these rows of the resized table.

    `finish(values, out)` computes the result (pixels, `channels`) from the resized values of each step.
    """
    width = resize.size_out[1]

    def rows(first: int, last: int) -> Tensor:
        result = table.new_empty((last - first) * width, channels)
        for top, bottom in resize.steps(first, last, table.shape[1]):
            finish(resize.whole_rows(table, top, bottom), result[(top - first) * width : (bottom - first) * width])
        return result

    return rows


def pixels_of(
    resize: BilinearResize,
    table: Tensor,
    channels: int,
    finish: Callable[[Tensor, Tensor], None],
    y: Tensor,
    x: Tensor,
    *,
    in_place: bool = False,
) -> Tensor:
    """The resized table at pixels (y, x), after `finish(values, out)`: (N, channels).

    With `in_place`, `finish` is elementwise and may be called with the same tensor as `values` and `out`.
    """
    if in_place and len(y) * table.shape[1] <= STEP_ELEMENTS:
        values = resize.pixels(table, y, x)
        finish(values, values)
        return values
    result = table.new_empty(len(y), channels)
    for piece in pieces(len(y), table.shape[1]):
        finish(resize.pixels(table, y[piece], x[piece]), result[piece])
    return result


def pieces(count: int, channels: int) -> Iterator[slice]:
    """Splits a list of pixels into steps that fit into the cache."""
    step = max(1, STEP_ELEMENTS // channels)
    for start in range(0, count, step):
        yield slice(start, min(count, start + step))


def resized_masks(
    values: Callable[[int, int], Tensor],
    resize: BilinearResize,
    channels: int,
    inside: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Binary masks at the target size.

    Args:
        values: `values(first, last)` returns the mask probabilities (pixels, channels) of these rows of the grid.
        inside: returns which probabilities (pixels, channels) belong to the masks.

    Returns:
        masks (channels, H, W) bool, their pixel counts (channels,) int64, and the sum of probabilities inside each.
    """
    height, width = resize.size_out
    device = resize.rows.low.device
    masks = torch.empty(channels, height, width, dtype=torch.bool, device=device)
    pixels = torch.zeros(channels, dtype=torch.int64, device=device)
    totals = torch.zeros(channels, dtype=torch.float32, device=device)
    for band in resize.bands(channels):
        table = values(band.first, band.last)
        for top, bottom in resize.steps(band.top, band.bottom, channels):
            probabilities = resize.whole_rows(table, top, bottom, band.first)
            cut = inside(probabilities)
            masks[:, top:bottom] = cut.t().view(channels, bottom - top, width)
            pixels += cut.sum(0)
            totals += (probabilities * cut).sum(0)
    return masks, pixels, totals


class MaskEnlargement:
    """Resizes binary masks: a target pixel is set if any of its four bilinear corners is set."""

    def __init__(self, size_in: Size, size_out: Size, device: torch.device):
        resize = bilinear_resize(size_in, size_out, device)
        # A neighbor of weight 0 is excluded by reading the other one twice.
        self.rows, self.columns = (
            (torch.where(axis.weight < 1, axis.low, axis.high), torch.where(axis.weight > 0, axis.high, axis.low))
            for axis in (resize.rows, resize.columns)
        )
        self.read_rows, self.read_columns = (
            torch.zeros(side, dtype=torch.bool, device=device).index_fill_(0, torch.cat(taps), True)
            for side, taps in zip(size_in, (self.rows, self.columns), strict=True)
        )
        self.reads_all = bool(self.read_rows.all() & self.read_columns.all())  # true if masks are enlarged

    def boxes(self, masks: Tensor) -> Tensor:
        """x_min, y_min, x_max, y_max, inclusive, of each resized mask: int64 (n, 4); 0, 0, -1, -1 if it is empty."""
        # `amax` of bytes is eight times as fast as `any`.
        in_read_columns = masks if self.reads_all else masks & self.read_columns
        in_read_rows = masks if self.reads_all else masks & self.read_rows[:, None]
        rows = in_read_columns.view(torch.uint8).amax(2).bool()  # (n, height_in)
        columns = in_read_rows.view(torch.uint8).amax(1).bool()
        return self._boxes(rows, columns)

    def boxes_of_parts(self, parts: Sequence[tuple[Region, Tensor]]) -> Tensor:
        """Like `boxes`, for masks given as a region and its pixels; all other pixels are not set."""
        rows = self.read_rows.new_zeros(len(parts), len(self.read_rows))
        columns = self.read_columns.new_zeros(len(parts), len(self.read_columns))
        for place, (region, mask) in enumerate(parts):
            if not mask.numel():
                continue
            down, across = slice(region.top, region.bottom), slice(region.left, region.right)
            in_read_columns = mask if self.reads_all else mask & self.read_columns[across]
            in_read_rows = mask if self.reads_all else mask & self.read_rows[down, None]
            rows[place, down] = in_read_columns.view(torch.uint8).amax(1).bool()
            columns[place, across] = in_read_rows.view(torch.uint8).amax(0).bool()
        return self._boxes(rows, columns)

    def _boxes(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The boxes of masks with pixels in these rows (n, height_in) and columns (n, width_in)."""
        low_x, high_x = self._extent(columns, self.columns)
        low_y, high_y = self._extent(rows, self.rows)
        boxes = torch.stack([low_x, low_y, high_x, high_y], 1)
        empty = ~(rows & self.read_rows).any(1)
        return torch.where(empty[:, None], boxes.new_tensor([0, 0, -1, -1]), boxes)

    def crop(self, mask: Tensor, box: Sequence[int], corner: tuple[int, int] = (0, 0)) -> Tensor:
        """The resized mask inside a box.

        Args:
            mask: the source mask, or a part with at least the rows and columns that the box reads.
            box: x_min, y_min, x_max, y_max, inclusive.
            corner: row and column of the source at which `mask` starts.
        """
        x_min, y_min, x_max, y_max = box
        low, high = (taps[y_min : y_max + 1] - corner[0] for taps in self.rows)
        mask = mask.index_select(0, low) | mask.index_select(0, high)
        low, high = (taps[x_min : x_max + 1] - corner[1] for taps in self.columns)
        mask = mask.t().contiguous()
        return (mask.index_select(0, low) | mask.index_select(0, high)).t().contiguous()

    @staticmethod
    def _extent(occupied: Tensor, taps: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        occupied = (occupied[:, taps[0]] | occupied[:, taps[1]]).byte()
        return occupied.argmax(1), occupied.shape[1] - 1 - occupied.flip(1).argmax(1)

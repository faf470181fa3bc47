"""Bilinear resizing of many channels at once, worked out only where it can change an answer.

A bilinear value is a convex combination of four corners. Two things follow. Where one channel is the largest at all
four corners, it is the largest everywhere between them, so the winner of resized channels needs arithmetic only along
the borders between regions. And a resized pixel is a weighted sum of four rows of a (pixels, channels) table, which
`torch.nn.functional.embedding_bag` computes for any list of pixels without a temporary of its own. Everything here
goes through the target in bands of rows, so memory follows the target's own size and never channels times pixels.

The positions are those of `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)`.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Table entries alive at once (float32). Buffers of this size are handed back to the next band by the allocator
# instead of being mapped afresh, and the page faults of fresh memory cost more than the arithmetic.
BAND_ELEMENTS = 2**21
# Entries that one step works on: small enough to stay in a core's cache between two operations.
STEP_ELEMENTS = 2**18
# Target pixels of a band, whose labels are looked at together.
BAND_PIXELS = 2**19


class Axis(NamedTuple):
    """Where each of `size_out` positions falls between two of `size_in`: (1 - weight) * low + weight * high."""

    low: Tensor  # (size_out,) int64
    high: Tensor  # (size_out,) int64: low + 1, or 0 where there is only one
    weight: Tensor  # (size_out,) float32 in 0..1; 1 only beyond the last centre


def bilinear_axis(size_in: int, size_out: int) -> Axis:
    """Half-pixel centres along one axis, rounded as torch rounds them.

    The scale is a float32 quotient and the position is rounded once (torch's kernels fuse the multiplication and the
    subtraction). That matters where a position is a whole number: a weight of exactly 0 leaves the neighbour out.
    """
    scale = (torch.tensor(size_in, dtype=torch.float32) / torch.tensor(size_out, dtype=torch.float32)).double()
    position = ((torch.arange(size_out, dtype=torch.float64) + 0.5) * scale - 0.5).float().clamp_(min=0)
    low = position.long().clamp_(max=max(0, size_in - 2))
    return Axis(low, (low + 1).clamp_(max=size_in - 1), (position - low).clamp_(0, 1))


def nearest_axis(size_in: int, size_out: int) -> Tensor:
    """The source position (size_out,) int64 that `interpolate(mode="nearest")` reads for each target position."""
    return F.interpolate(torch.arange(size_in, dtype=torch.float32)[None, None], size=size_out)[0, 0].long()


class Band(NamedTuple):
    """Target rows top..bottom, and the source rows first..last that they read (both half open)."""

    top: int
    bottom: int
    first: int
    last: int


class BilinearResize:
    """The resizing of (height, width) grids to a target size.

    A table holds the grid (or some of its rows) as ((rows * width), channels), float32 and contiguous. `first_row`
    says which row of the grid the table begins with.
    """

    def __init__(self, size_in: tuple[int, int], size_out: tuple[int, int], device: torch.device | str = "cpu"):
        self.size_in, self.size_out = size_in, size_out
        self.identity = size_in == size_out
        rows, columns = (bilinear_axis(a, b) for a, b in zip(size_in, size_out, strict=True))
        self._low_rows, self._high_rows = rows.low.tolist(), rows.high.tolist()
        self.rows, self.columns = (Axis(*(part.to(device) for part in axis)) for axis in (rows, columns))
        # A pixel's four corners follow its column, moved down by whole rows; the weights are an outer product. Both are
        # laid out so that a row of the target is one long run: short inner dimensions cost more than the arithmetic.
        width_in = size_in[1]
        one_below = width_in if size_in[0] > 1 else 0
        columns_of = torch.stack([self.columns.low, self.columns.high], 1).int()
        self._row_start = self.rows.low.int() * width_in  # (H,)
        self._corners = torch.cat([columns_of, columns_of + one_below], 1)  # (W, 4)
        self._row_weights = torch.stack([1 - self.rows.weight, self.rows.weight], 1)  # (H, 2)
        self._column_weights = torch.stack([1 - self.columns.weight, self.columns.weight], 1)  # (W, 2)
        upper, lower = (F.pad(self._column_weights, padding) for padding in ((0, 2), (2, 0)))
        self._weights = torch.stack([upper.flatten(), lower.flatten()])  # (2, 4 * W)

    def bands(self, channels: int) -> Iterator[Band]:
        """Cuts the target into bands whose part of the source, with `channels` values a pixel, is of bounded size."""
        (height_in, width_in), (height, width) = self.size_in, self.size_out
        rows = min(BAND_PIXELS // width, BAND_ELEMENTS * height // (width_in * channels * height_in))
        for top in range(0, height, max(1, rows)):
            bottom = min(height, top + max(1, rows))
            yield Band(top, bottom, self._low_rows[top], self._high_rows[bottom - 1] + 1)

    def steps(self, top: int, bottom: int, channels: int) -> Iterator[tuple[int, int]]:
        """Cuts target rows top..bottom into steps that stay in the cache."""
        rows = max(1, STEP_ELEMENTS // (self.size_out[1] * channels))
        for start in range(top, bottom, rows):
            yield start, min(bottom, start + rows)

    def whole_rows(self, table: Tensor, top: int, bottom: int, first_row: int = 0) -> Tensor:
        """Target rows top..bottom of every channel: ((bottom - top) * width, channels), new memory."""
        width = self.size_in[1]
        if self.identity:
            return table[(top - first_row) * width : (bottom - first_row) * width].clone()
        corners = (self._row_start[top:bottom, None] - first_row * width) + self._corners.view(1, -1)
        return _weighted_sum(table, corners, self._row_weights[top:bottom] @ self._weights)

    def pixels(self, table: Tensor, y: Tensor, x: Tensor, first_row: int = 0) -> Tensor:
        """The target pixels (y, x), int64 (N,), of every channel: (N, channels)."""
        corners = (self._row_start[y, None] - first_row * self.size_in[1]) + self._corners[x]
        return _weighted_sum(table, corners, self._row_weights[y, :, None] * self._column_weights[x, None])


def _weighted_sum(table: Tensor, corners: Tensor, weights: Tensor) -> Tensor:
    return F.embedding_bag(corners.view(-1, 4), table, per_sample_weights=weights.view(-1, 4), mode="sum")


def resized_argmax(
    values: Callable[[int, int], Tensor],
    resize: BilinearResize,
    channels: int,
    classes: Tensor | None = None,
    area_threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Which channel is the largest at each pixel of the resized grid, without resizing the channels.

    Args:
        values: `values(first, last)` gives rows first..last of the grid as a table ((last - first) * width, channels).
        resize: from the grid's size to the target's.
        channels: how many channels `values` gives.
        classes: int64 (channels,), what to write for each channel; the channel's own number by default.
        area_threshold: where given, also counts each channel's target pixels of at least this value.

    Returns:
        labels, int64 (height, width), and areas, int64 (channels,), zeros without a threshold. As in torch's `argmax`,
        the first of equal channels wins.
    """
    height, width = resize.size_out
    device = resize.rows.low.device
    width_in = resize.size_in[1]
    labels = torch.empty(height, width, dtype=torch.int64, device=device)
    areas = torch.zeros(channels, dtype=torch.int64, device=device)
    pixels_of_column = torch.bincount(resize.columns.low, minlength=width_in)
    for band in resize.bands(channels):
        table = values(band.first, band.last)
        best = table.argmax(1)
        best = (best if classes is None else classes[best]).view(-1, width_in)
        inside = None if area_threshold is None else table >= area_threshold
        if resize.identity:
            labels[band.top : band.bottom] = best
            if inside is not None:
                areas += inside.sum(0)
            continue
        uniform = _uniform_cells(best, inside)
        low = resize.rows.low[band.top : band.bottom] - band.first
        part = labels[band.top : band.bottom]
        cells = torch.where(uniform, best, -1).index_select(0, low)
        torch.index_select(cells, 1, resize.columns.low, out=part)
        y, x = (part < 0).nonzero(as_tuple=True)
        winners = torch.empty_like(y)
        step = max(1, STEP_ELEMENTS // channels)
        for start in range(0, len(y), step):
            chunk = slice(start, start + step)
            mixed = resize.pixels(table, y[chunk] + band.top, x[chunk], band.first)
            winners[chunk] = mixed.argmax(1)
            if area_threshold is not None:
                areas += (mixed >= area_threshold).sum(0)
        part[y, x] = winners if classes is None else classes[winners]
        if inside is not None:
            # A uniform cell is inside or outside as a whole: its pixels are counted, not visited. Whole numbers
            # below 2**24 are exact in float32, and a band has fewer pixels.
            pixels = torch.bincount(low, minlength=band.last - band.first)[:, None] * pixels_of_column
            areas += ((pixels * uniform).float().view(1, -1) @ inside.float())[0].long()
    return labels, areas


def _uniform_cells(best: Tensor, inside: Tensor | None) -> Tensor:
    """Cells (y, x) of the grid (rows, width) whose four corners (y..y+1, x..x+1) have the same winner, and the same
    channels inside the threshold. At the far edges only the corners that exist are asked."""
    maps = [best]
    if inside is not None:
        # eight channels' flags compare as one word
        flags = F.pad(inside.view(torch.uint8), (0, -inside.shape[1] % 8)).view(torch.int64)
        maps += [word.view(best.shape) for word in flags.unbind(1)]
    across, down = (torch.ones_like(best, dtype=torch.bool) for _ in range(2))
    for values in maps:
        across[:, :-1] &= values[:, :-1] == values[:, 1:]
        down[:-1] &= values[:-1] == values[1:]
    uniform = across & down
    uniform[:-1] &= across[1:]  # the fourth corner follows from the row below
    return uniform

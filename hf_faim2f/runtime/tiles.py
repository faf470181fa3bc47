"""Semantic segmentation of large images with sliding windows.

The model gets inputs of the size of its training crops, and memory depends on the window, not on the image. Windows
overlap; a pixel's class scores are the mean over its windows. The scores are those used for the published mIoU
(`evaluate_semantic`): class probability times mask probability, summed over queries, resized to the window.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..model.resize_faim2f import bilinear_resize

Size = tuple[int, int]
# (B, 3, h, w) to an object or mapping with `class_queries_logits` (B, Q, C + 1), `masks_queries_logits` (B, Q, h', w').
Run = Callable[[Tensor], Any]
# The smallest side that exported graphs accept.
LEAST_WINDOW = 32


@dataclass(frozen=True)
class Windows:
    """A grid of windows over an image; the last row and column are shifted back to end with the image.

    Args:
        size: (height, width) of a window in pixels of the network's input; smaller images are a single window.
        stride: step between windows, down and across, at most `size`; None for two thirds of it.

    Raises:
        ValueError: the size or the stride is out of range.
    """

    size: Size
    stride: Size | None = None

    def __post_init__(self) -> None:
        if min(self.size) < LEAST_WINDOW:
            raise ValueError(f"A window must have at least {LEAST_WINDOW} pixels a side, not {_words(self.size)}.")
        stride = self.steps
        if min(stride) < 1 or stride[0] > self.size[0] or stride[1] > self.size[1]:
            raise ValueError(
                f"The stride must be from 1x1 to the window's {_words(self.size)} (height x width), so that no pixel "
                f"is left out, not {_words(stride)}."
            )

    @property
    def steps(self) -> Size:
        """The given or default stride."""
        return self.stride or (max(1, self.size[0] * 2 // 3), max(1, self.size[1] * 2 // 3))

    def over(self, image: Size) -> tuple[Size, list[int], list[int]]:
        """The windows over an image of this size: (height, width), top edges of rows, and left edges of columns."""
        height, width = (min(window, side) for window, side in zip(self.size, image, strict=True))
        down, across = self.steps
        return (height, width), _starts(image[0], height, down), _starts(image[1], width, across)


@torch.no_grad()
def segment_by_windows(
    run: Run,
    pixel_values: Tensor,
    windows: Windows,
    target_size: Size | None = None,
    *,
    cls_sigmoid: bool = False,
    batch_size: int = 1,
) -> Tensor:
    """Predicts the class of every pixel of an image window by window.

    Memory is bounded by the scores of one row of windows, C * window height * image width.

    Args:
        run: the network: a model, or any function that returns its logits.
        pixel_values: (3, H, W), from the image processor, without padding.
        windows: the grid.
        target_size: (height, width) of the result; None for (H, W).
        cls_sigmoid: class probabilities are sigmoids instead of a softmax.
        batch_size: number of windows in a batch.

    Returns:
        (height, width) int64: class ids, on the device of the pixels.

    Raises:
        ValueError: `pixel_values` is not one image.
    """
    if pixel_values.ndim != 3:
        raise ValueError(f"pixel_values must be one image, (C, H, W), not {tuple(pixel_values.shape)}.")
    size = (pixel_values.shape[1], pixel_values.shape[2])
    strips = _Strips(run, pixel_values, windows, cls_sigmoid, batch_size)
    to_target = bilinear_resize(size, target_size or size, pixel_values.device)
    labels = torch.empty(to_target.size_out, dtype=torch.int64, device=pixel_values.device)
    channels = strips.channels
    for band in to_target.bands(channels):
        table = strips.rows(band.first, band.last)
        for top, bottom in to_target.steps(band.top, band.bottom, channels):
            best = to_target.whole_rows(table, top, bottom, band.first).argmax(1)
            labels[top:bottom] = best.view(bottom - top, -1)
    return labels


class _Strips:
    """Averaged class scores of an image, computed row by row from the top; rows that were read are freed."""

    def __init__(self, run: Run, pixel_values: Tensor, windows: Windows, cls_sigmoid: bool, batch_size: int) -> None:
        self.run, self.pixels, self.cls_sigmoid, self.batch_size = run, pixel_values, cls_sigmoid, batch_size
        height, width = pixel_values.shape[1:]
        self.window, self.tops, self.lefts = windows.over((height, width))
        self.over_row = _coverage(height, self.tops, self.window[0]).to(pixel_values.device)
        self.over_column = _coverage(width, self.lefts, self.window[1]).to(pixel_values.device)
        # Sums of the first `next` rows of windows, from row `first` of the image on: (C, rows, W).
        self.first, self.next = 0, 0
        self.sums: Tensor | None = None
        self._open_row()

    @property
    def channels(self) -> int:
        assert self.sums is not None
        return self.sums.shape[0]

    def rows(self, first: int, last: int) -> Tensor:
        """Scores of rows first..last as a contiguous ((last - first) * W, C). `first` never decreases."""
        # Rows above the next row of windows are complete.
        while self.next < len(self.tops) and self.tops[self.next] < last:
            self._free_rows(min(first, self.tops[self.next]))
            self._open_row()
        self._free_rows(first)
        assert self.sums is not None
        part = self.sums[:, : last - first] / (self.over_row[first:last, None] * self.over_column)
        return part.permute(1, 2, 0).reshape(-1, self.channels)

    def _free_rows(self, first: int) -> None:
        """Frees the sums above row `first`."""
        assert self.sums is not None
        self.sums, self.first = self.sums[:, first - self.first :], first

    def _open_row(self) -> None:
        """Adds the scores of the next row of windows."""
        top = self.tops[self.next]
        height, width = self.window
        for lefts in _split(self.lefts, self.batch_size):
            batch = torch.stack([self.pixels[:, top : top + height, left : left + width] for left in lefts])
            for left, scores in zip(lefts, self._scores(batch), strict=True):
                self._make_room(len(scores), top + height)
                assert self.sums is not None
                self.sums[:, top - self.first : top + height - self.first, left : left + width] += scores
        self.next += 1

    def _make_room(self, channels: int, last: int) -> None:
        have = 0 if self.sums is None else self.sums.shape[1]
        missing = last - self.first - have
        if missing > 0:
            new = torch.zeros(channels, missing, self.pixels.shape[2], device=self.pixels.device)
            self.sums = new if self.sums is None else torch.cat([self.sums, new], 1)

    def _scores(self, batch: Tensor) -> Iterator[Tensor]:
        """Each window's class scores (C, height, width), float32."""
        outputs = self.run(batch)
        get: Any = outputs.__getitem__ if isinstance(outputs, Mapping) else partial(getattr, outputs)
        classes, masks = get("class_queries_logits").float(), get("masks_queries_logits")
        probabilities = (classes.sigmoid() if self.cls_sigmoid else classes.softmax(-1))[..., :-1]  # (B, Q, C)
        for of_query, logits in zip(probabilities, masks, strict=True):
            sums = torch.einsum("qc,qhw->chw", of_query, logits.float().sigmoid())
            # Resizing is linear, so the sum over queries can be computed first, on the smaller grid.
            yield F.interpolate(sums[None], size=self.window, mode="bilinear", align_corners=False)[0]


def _starts(side: int, window: int, stride: int) -> list[int]:
    """Start positions of windows along a side; the last window ends at the side's end."""
    return [*range(0, side - window, stride), side - window]


def _coverage(side: int, starts: list[int], window: int) -> Tensor:
    """(side,) float32: the number of windows over each position."""
    counts = torch.zeros(side)
    for start in starts:
        counts[start : start + window] += 1
    return counts


def _split(values: list[int], size: int) -> Iterator[list[int]]:
    for begin in range(0, len(values), size):
        yield values[begin : begin + size]


def _words(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


__all__ = ["Windows", "segment_by_windows"]

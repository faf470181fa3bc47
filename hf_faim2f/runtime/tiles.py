"""Semantic segmentation of large images through windows, each of which goes through the network by itself.

A model that was trained on crops sees what it was trained on, and memory follows the window in place of the image. The
windows overlap; a pixel's class scores are the mean of those that each window over it gives. These are the sums behind
the published mIoU (`evaluate_semantic`): class times mask probability, over queries, resized to the window's pixels.
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
# (B, 3, h, w) to an object or mapping: `class_queries_logits` (B, Q, C + 1), `masks_queries_logits` (B, Q, h', w').
Run = Callable[[Tensor], Any]
# What an exported graph takes at least.
LEAST_WINDOW = 32


@dataclass(frozen=True)
class Windows:
    """Windows over an image: rows of them from the top, each from the left; the last ones are shifted back to fit.

    Args:
        size: (height, width) of a window, in pixels of what the network sees. Of an image that is smaller, all of it.
        stride: from one window to the next, down and across; no more than `size`, so that nothing is left out. None
            for two thirds of it.

    Raises:
        ValueError: a size or a stride that cannot be.
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
        """The stride, also where none was given."""
        return self.stride or (max(1, self.size[0] * 2 // 3), max(1, self.size[1] * 2 // 3))

    def over(self, image: Size) -> tuple[Size, list[int], list[int]]:
        """A window's (height, width) over an image of this size, and where windows begin: their tops, their lefts."""
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
    """The class of every pixel of one image, which the network sees window by window.

    Memory holds the scores of one row of windows, C * window height * image width, whatever the image's height is.

    Args:
        run: the network: a model, or whatever gives its logits.
        pixel_values: (3, H, W), as the image processor makes them, without padding.
        windows: which windows.
        target_size: (height, width) of the result; (H, W) where None.
        cls_sigmoid: class probabilities are sigmoids instead of a softmax.
        batch_size: windows that go through the network together.

    Returns:
        int64 (height, width) of class ids, on the device of the pixels.

    Raises:
        ValueError: `pixel_values` is no image.
    """
    if pixel_values.ndim != 3:
        raise ValueError(f"pixel_values must be of one image, (C, H, W), not {tuple(pixel_values.shape)}.")
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
    """Averaged class scores of an image, row by row from the top; what has been asked for is forgotten."""

    def __init__(self, run: Run, pixel_values: Tensor, windows: Windows, cls_sigmoid: bool, batch_size: int) -> None:
        self.run, self.pixels, self.cls_sigmoid, self.batch_size = run, pixel_values, cls_sigmoid, batch_size
        height, width = pixel_values.shape[1:]
        self.window, self.tops, self.lefts = windows.over((height, width))
        self.over_row = _coverage(height, self.tops, self.window[0]).to(pixel_values.device)
        self.over_column = _coverage(width, self.lefts, self.window[1]).to(pixel_values.device)
        # Sums from row `first` of the image on, (C, rows, W), over the first `next` rows of windows.
        self.first, self.next = 0, 0
        self.sums: Tensor | None = None
        self._open_row()

    @property
    def channels(self) -> int:
        assert self.sums is not None
        return self.sums.shape[0]

    def rows(self, first: int, last: int) -> Tensor:
        """Scores of rows first..last, contiguous: ((last - first) * W, C). `first` never goes back."""
        assert self.sums is not None
        self.sums, self.first = self.sums[:, first - self.first :], first
        # Rows above the next window are done.
        while self.next < len(self.tops) and self.tops[self.next] < last:
            self._open_row()
        part = self.sums[:, : last - first] / (self.over_row[first:last, None] * self.over_column)
        return part.permute(1, 2, 0).reshape(-1, self.channels)

    def _open_row(self) -> None:
        """Adds the next row of windows."""
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
            # Resizing is linear in the probabilities, so the sums are made before it, on the smallest grid.
            yield F.interpolate(sums[None], size=self.window, mode="bilinear", align_corners=False)[0]


def _starts(side: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side; the last ends with it."""
    return [*range(0, side - window, stride), side - window]


def _coverage(side: int, starts: list[int], window: int) -> Tensor:
    """(side,) float32: how many windows are over each position."""
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

"""Segmentation by windows, compared with a plain loop that accumulates scores for the whole image."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_faim2f.model.focoos_post_processing_faim2f import evaluate_semantic
from hf_faim2f.runtime.tiles import Windows, segment_by_windows
from tests.support.reference_models import small_model

QUERIES, CLASSES = 6, 4


class Local:
    """A network whose outputs depend on the window: masks are projections of its pixels at a quarter of their size, and
    classes depend on their mean."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.of_mask = 4 * torch.randn(QUERIES, 3, generator=generator)
        self.of_class = 3 * torch.randn(QUERIES, CLASSES + 1, 3, generator=generator)
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, pixels: Tensor) -> Any:
        self.seen.append(tuple(pixels.shape))
        small = F.adaptive_avg_pool2d(pixels, (-(-pixels.shape[2] // 4), -(-pixels.shape[3] // 4)))
        return SimpleNamespace(
            class_queries_logits=torch.einsum("qkc,bc->bqk", self.of_class, pixels.mean((2, 3))),
            masks_queries_logits=torch.einsum("qc,bchw->bqhw", self.of_mask, small),
        )


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """(3, height, width), smooth, so that regions are larger than pixels."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 3, height // 8 + 1, width // 8 + 1, generator=generator)
    return F.interpolate(coarse, size=(height, width), mode="bicubic")[0]


def plainly(
    run: Any, pixels: Tensor, window: tuple[int, int], stride: tuple[int, int], target: tuple[int, int], sigmoid: bool
) -> Tensor:
    """The mean scores (C, *target) in float64, accumulated over the whole image window by window."""
    height, width = pixels.shape[1:]
    sums = torch.zeros(CLASSES, height, width, dtype=torch.float64)
    counts = torch.zeros(height, width, dtype=torch.float64)
    rows = max(height - window[0] + stride[0] - 1, 0) // stride[0] + 1
    columns = max(width - window[1] + stride[1] - 1, 0) // stride[1] + 1
    for row in range(rows):
        for column in range(columns):
            bottom, right = min(row * stride[0] + window[0], height), min(column * stride[1] + window[1], width)
            top, left = max(bottom - window[0], 0), max(right - window[1], 0)
            outputs = run(pixels[None, :, top:bottom, left:right])
            logits = outputs.class_queries_logits[0].double()
            classes = (logits.sigmoid() if sigmoid else logits.softmax(-1))[:, :-1]
            masks = F.interpolate(
                outputs.masks_queries_logits.double().sigmoid(), size=(bottom - top, right - left), mode="bilinear"
            )[0]
            for query in range(QUERIES):
                for label in range(CLASSES):
                    sums[label, top:bottom, left:right] += classes[query, label] * masks[query]
            counts[top:bottom, left:right] += 1
    assert counts.min() >= 1
    return F.interpolate((sums / counts)[None], size=target, mode="bilinear")[0]


def assert_largest(labels: Tensor, scores: Tensor) -> None:
    """Asserts that each pixel's class has the largest score up to rounding, and that several classes occur."""
    chosen = scores.gather(0, labels[None])[0]
    assert (scores.amax(0) - chosen).max() < 1e-5
    assert len(labels.unique()) > 2


@pytest.mark.parametrize(
    ("size", "window", "stride", "target"),
    [
        ((64, 128), (32, 64), (16, 32), None),
        ((70, 131), (32, 48), (20, 48), None),
        ((70, 131), (33, 50), (7, 11), (90, 200)),
        ((70, 131), (32, 64), None, (41, 77)),
        ((40, 200), (64, 64), (40, 64), (300, 1500)),
    ],
)
@pytest.mark.parametrize("sigmoid", [False, True])
def test_equals_the_plain_loop(size: Any, window: Any, stride: Any, target: Any, sigmoid: bool) -> None:
    run, pixels, windows = Local(), picture(*size), Windows(window, stride)
    expected = plainly(run, pixels, window, windows.steps, target or size, sigmoid)
    for batch_size in (1, 3):
        labels = segment_by_windows(run, pixels, windows, target, cls_sigmoid=sigmoid, batch_size=batch_size)
        assert labels.shape == (target or size) and labels.dtype == torch.int64
        assert_largest(labels, expected)


def test_rows_that_a_smaller_target_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bands of one row each, windows begin between the rows that two bands read."""
    monkeypatch.setattr("hf_faim2f.model.resize_faim2f.BAND_ELEMENTS", 1)
    run, pixels = Local(), picture(160, 120)
    for target in ((32, 24), (20, 40)):
        expected = plainly(run, pixels, (32, 40), (16, 20), target, False)
        assert_largest(segment_by_windows(run, pixels, Windows((32, 40), (16, 20)), target), expected)


def test_overlapping_windows_are_not_the_whole_image() -> None:
    """Otherwise the comparison above could not detect wrong windows."""
    run, pixels = Local(), picture(70, 131)
    whole = segment_by_windows(run, pixels, Windows((70, 131)))
    parts = segment_by_windows(run, pixels, Windows((32, 64), (16, 32)))
    assert 0.02 < (whole != parts).float().mean() < 0.9


@pytest.mark.parametrize("target", [(64, 96), (50, 111), (256, 384)])
def test_one_window_is_the_whole_image(target: tuple[int, int]) -> None:
    model = small_model(init_std=3.0)
    pixels = torch.randn(3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = model(pixel_values=pixels[None])
    whole = evaluate_semantic(outputs.class_queries_logits, outputs.masks_queries_logits, (64, 96), [target])[0]
    for window in ((64, 96), (512, 1024)):
        labels = segment_by_windows(model, pixels, Windows(window), target)
        assert (labels == whole).float().mean() > 0.999  # near ties may be resolved differently
    assert len(whole.unique()) > 1


def test_memory_follows_the_window_and_not_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of scores is higher than a window and a band of rows, and each window is run once."""
    from hf_faim2f.runtime import tiles as sliding_window

    made: list[int] = []
    exact = sliding_window._Strips._make_room

    def watched(self: Any, *arguments: int) -> None:
        exact(self, *arguments)
        made.append(self.sums.shape[1])

    monkeypatch.setattr(sliding_window._Strips, "_make_room", watched)
    monkeypatch.setattr("hf_faim2f.model.resize_faim2f.BAND_ELEMENTS", 4 * 96 * 16)
    run = Local()
    segment_by_windows(run, picture(2000, 96), Windows((64, 64), (32, 32)))
    assert max(made) <= 64 + 32
    assert len(run.seen) == 2 * len(range(0, 2000 - 64 + 32, 32))


@pytest.mark.parametrize(
    ("window", "stride", "message"),
    [
        ((16, 64), None, "at least 32 pixels a side, not 16x64"),
        ((64, 64), (0, 8), "from 1x1 to the window's 64x64"),
        ((64, 64), (8, 65), "so that no pixel is left out, not 8x65"),
    ],
)
def test_windows_that_cannot_be(window: Any, stride: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Windows(window, stride)


def test_pixels_that_are_no_image() -> None:
    with pytest.raises(ValueError, match=r"must be one image, \(C, H, W\), not \(1, 3, 64, 64\)"):
        segment_by_windows(Local(), torch.zeros(1, 3, 64, 64), Windows((32, 32)))

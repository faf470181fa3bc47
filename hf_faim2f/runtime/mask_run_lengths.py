"""Masks as COCO's compressed run lengths, made of their crops alone; `pycocotools` reads them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

# Each character holds five bits of a number, and one that says whether more follow.
BITS = 5
MORE = 1 << BITS
FIRST_CHARACTER = 48
# Counts that are compressed together: enough of them for small masks, and few enough to stay in the cache.
COUNTS_TOGETHER = 1 << 14


def encode_run_lengths(
    crops: Sequence[np.ndarray], boxes: Sequence[Sequence[int]], size: tuple[int, int]
) -> list[dict[str, Any]]:
    """{"size": [height, width], "counts": str}, as JSON takes it, of each mask of an image, cropped to its box.

    Args:
        crops: (y_max - y_min + 1, x_max - x_min + 1) bool each.
        boxes: x_min, y_min, x_max, y_max in pixels, inclusive, one a crop.
        size: (height, width) of the image; only the crops are looked at, however large it is.
    """
    texts: list[str] = []
    together: list[np.ndarray] = []
    for crop, box in zip(crops, boxes, strict=True):
        together.append(_counts(crop, box, size))
        if sum(map(len, together)) >= COUNTS_TOGETHER:
            texts += _compress(together)
            together = []
    return [{"size": list(size), "counts": text} for text in texts + _compress(together)]


def _counts(crop: np.ndarray, box: Sequence[int], size: tuple[int, int]) -> np.ndarray:
    """The lengths of background and mask by turns, int64, first background, in the order of columns."""
    height, width = size
    # By columns, with a background before the first and below each, in which every run ends.
    line = np.zeros(1 + crop.shape[1] * (crop.shape[0] + 1), dtype=bool)
    line[1:].reshape(crop.shape[1], crop.shape[0] + 1)[:, :-1] = crop.T
    columns, rows = np.divmod(np.flatnonzero(line[1:] != line[:-1]), crop.shape[0] + 1)
    places = (columns + box[0]) * height + rows + box[1]  # in the image
    starts, ends = places[::2], places[1::2]
    # A run to the bottom of one column and one from the top of the next are one.
    apart = starts[1:] != ends[:-1]
    starts, ends = starts[np.append(True, apart)[: len(starts)]], ends[np.append(apart, True)[: len(ends)]]
    changes = np.concatenate([[0], np.stack([starts, ends], 1).ravel(), [height * width]])
    counts = np.diff(changes)
    if len(counts) > 1 and counts[-1] == 0:  # it ends with the mask
        counts = counts[:-1]
    return counts


def _compress(masks: Sequence[np.ndarray]) -> list[str]:
    """Each mask's counts as text. From the fourth on, each count stands as its difference from the one before the last,
    in characters of 5 bits."""
    if not masks:
        return []
    # Together, for each step below costs about the same for one small mask as for dozens.
    counts = np.concatenate(masks).astype(np.int64)
    lengths = [len(mask) for mask in masks]
    ends = np.cumsum(lengths)
    place = np.arange(len(counts)) - np.repeat(ends - lengths, lengths)  # of each in its mask
    left = counts.copy()
    left[2:] -= np.where(place[2:] < 3, 0, counts[:-2])
    unfinished = np.ones(len(left), dtype=bool)
    characters, written = [], []
    while unfinished.any():
        bits = left & (MORE - 1)
        left = left >> BITS
        # Nothing is left but the sign, which the highest bit that was written shows.
        done = left == np.where(bits & (MORE >> 1), -1, 0)
        characters.append(bits + np.where(done, 0, MORE) + FIRST_CHARACTER)
        written.append(unfinished)
        unfinished = unfinished & ~done
    table, valid = np.stack(characters, 1).astype(np.uint8), np.stack(written, 1)
    text = table[valid].tobytes().decode("ascii")
    stops = valid.sum(1).cumsum()[ends - 1].tolist()
    return [text[start:stop] for start, stop in zip([0, *stops[:-1]], stops, strict=True)]


__all__ = ["encode_run_lengths"]

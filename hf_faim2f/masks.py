"""COCO's three ways to write a mask, as compressed run lengths; decoding itself is `faster_coco_eval`'s."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as coco_mask

# The least of which a polygon consists: three points.
LEAST_POLYGON = 6


def to_run_lengths(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """A mask as COCO's compressed run lengths {"size": [height, width], "counts": bytes}.

    Args:
        segmentation: a list of polygons [[x, y, x, y, ...], ...], which are united; or run lengths
            {"size": [h, w], "counts": [...]} over the columns, beginning with a background; or those compressed.
        height, width: of the image.

    Raises:
        ValueError: it is none of them, or does not fit the image. Nothing larger than the image is allocated.
    """
    if isinstance(segmentation, Mapping):
        return _from_counts(segmentation, height, width)
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError("its segmentation is neither a list of polygons nor run lengths")
    for polygon in segmentation:
        _check_polygon(polygon, height, width)
    polygons = [[float(number) for number in polygon] for polygon in segmentation]
    return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))


def decode_run_lengths(run_lengths: dict[str, Any]) -> np.ndarray:
    """What `to_run_lengths` gives, as a mask (height, width), bool.

    Raises:
        ValueError: the runs do not add up to the image.
    """
    try:
        return coco_mask.decode(run_lengths).view(np.bool_)
    except (ValueError, RuntimeError, MemoryError) as error:
        raise ValueError(f"its run lengths are damaged ({error})") from error


def _from_counts(segmentation: Mapping[str, Any], height: int, width: int) -> dict[str, Any]:
    size, counts = segmentation.get("size"), segmentation.get("counts")
    # Before anything is decoded: whatever size is written there would be allocated.
    if not isinstance(size, list) or size != [height, width]:
        raise ValueError(f"its run lengths are for {size} pixels, but the image is {[height, width]} (height, width)")
    if isinstance(counts, str):
        if not counts.isascii():
            raise ValueError("its compressed run lengths are not ASCII")
        compressed = {"size": [height, width], "counts": counts.encode()}
        try:
            coco_mask.area(compressed)  # which readers sort by; it reads every run, and refuses what is too long
        except (ValueError, RuntimeError, MemoryError) as error:
            raise ValueError(f"its run lengths are damaged ({error})") from error
        return compressed
    if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError("its run lengths are neither a string nor a list of whole numbers")
    if sum(counts) != height * width:
        raise ValueError(f"its run lengths add up to {sum(counts)}, but the image has {height * width} pixels")
    return coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)


def _check_polygon(polygon: Any, height: int, width: int) -> None:
    if not isinstance(polygon, list) or len(polygon) < LEAST_POLYGON or len(polygon) % 2:
        raise ValueError("a polygon of its segmentation is no list of three or more x, y pairs")
    for numbers, side in ((polygon[::2], width), (polygon[1::2], height)):
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
                raise ValueError(f"a polygon of its segmentation has {number!r} for a coordinate")
            # Annotators slip over the edge. Further out, the outline alone would fill the memory.
            if not -side <= number <= 2 * side:
                raise ValueError(f"a polygon of its segmentation has the coordinate {number}, far outside of the image")


# Masks as COCO's compressed run lengths, made of their crops alone; `pycocotools` reads them.

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


def last_on_top(crops: Sequence[tuple[np.ndarray, Sequence[int]]], size: tuple[int, int]) -> np.ndarray:
    """Paints masks over each other: at each pixel (H, W) the number of the last mask there, from 1; 0 for none.

    Args:
        crops: bool masks, each cropped to its box, with the box (x_min, y_min, x_max, y_max), inclusive.
        size: (H, W) in pixels.
    """
    numbers = np.zeros(size, dtype=np.min_scalar_type(len(crops)))
    for number, (mask, (x_min, y_min, x_max, y_max)) in enumerate(crops, start=1):
        inside = numbers[y_min : y_max + 1, x_min : x_max + 1]
        # The last number is the largest: a maximum takes a tenth of the time of assigning where the mask is.
        np.maximum(inside, mask * numbers.dtype.type(number), out=inside)
    return numbers


__all__ = ["decode_run_lengths", "encode_run_lengths", "last_on_top", "to_run_lengths"]

"""Masks of segments: painting them over each other, and COCO's three forms of a mask as compressed run lengths.

Encoding is done here, not by `faster_coco_eval` or `pycocotools`: the core works without extras, and those read whole
images where this reads crops (30 masks of 2048x1024 pixels take 2 ms instead of 54 and 182). Decoding, and what else
annotations need, is `faster_coco_eval`'s, in the extra `evaluate`.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

# Numbers in the smallest polygon: three points.
LEAST_POLYGON = 6
# COCO's compressed run lengths: each character holds five bits of a number, and one that says whether more follow.
BITS = 5
MORE = 1 << BITS
FIRST_CHARACTER = 48
# Run lengths that are compressed at once: enough to amortize the calls for small masks, and few enough for the cache.
COUNTS_TOGETHER = 1 << 14


def to_run_lengths(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Any of COCO's forms of a mask as compressed run lengths {"size": [height, width], "counts": bytes}.

    Args:
        segmentation: untrusted: a list of polygons [[x, y, x, y, ...], ...], whose union is the mask; or run lengths
            {"size": [h, w], "counts": [...]}, column by column, beginning with background; or these compressed to a
            string.
        height, width: of the image, in pixels.

    Raises:
        ValueError: it is none of these, or does not fit the image. Nothing larger than the image is allocated.
        ImportError: without faster-coco-eval.
    """
    if isinstance(segmentation, Mapping):
        return _from_counts(segmentation, height, width)
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError("its segmentation is neither a list of polygons nor run lengths")
    for polygon in segmentation:
        _check_polygon(polygon, height, width)
    library = _coco_mask()
    polygons = [[float(number) for number in polygon] for polygon in segmentation]
    return library.merge(library.frPyObjects(polygons, height, width))


def decode_run_lengths(run_lengths: dict[str, Any]) -> np.ndarray:
    """The mask (height, width), bool, of run lengths from `to_run_lengths`.

    Raises:
        ValueError: the runs do not add up to the image.
    """
    try:
        return _coco_mask().decode(run_lengths).view(np.bool_)
    except (ValueError, RuntimeError, MemoryError) as error:
        raise ValueError(f"its run lengths are damaged ({error})") from error


def _from_counts(segmentation: Mapping[str, Any], height: int, width: int) -> dict[str, Any]:
    size, counts = segmentation.get("size"), segmentation.get("counts")
    # Checked before anything is decoded, which would allocate whatever size is stated.
    if not isinstance(size, list) or size != [height, width]:
        raise ValueError(f"its run lengths are for {size} pixels, but the image is {[height, width]} (height, width)")
    if isinstance(counts, str):
        if not counts.isascii():
            raise ValueError("its compressed run lengths are not ASCII")
        compressed = {"size": [height, width], "counts": counts.encode()}
        try:
            _coco_mask().area(compressed)  # reads every run, and refuses more pixels than the image has
        except (ValueError, RuntimeError, MemoryError) as error:
            raise ValueError(f"its run lengths are damaged ({error})") from error
        return compressed
    if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError("its run lengths are neither a string nor a list of whole numbers")
    if sum(counts) != height * width:
        raise ValueError(f"its run lengths add up to {sum(counts)}, but the image has {height * width} pixels")
    return _coco_mask().frPyObjects({"size": [height, width], "counts": counts}, height, width)


def _check_polygon(polygon: Any, height: int, width: int) -> None:
    if not isinstance(polygon, list) or len(polygon) < LEAST_POLYGON or len(polygon) % 2:
        raise ValueError("a polygon of its segmentation is no list of three or more x, y pairs")
    for numbers, side in ((polygon[::2], width), (polygon[1::2], height)):
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
                raise ValueError(f"a polygon of its segmentation has {number!r} for a coordinate")
            # Annotators slip over the edge. An outline that leads much further could exhaust the memory.
            if not -side <= number <= 2 * side:
                raise ValueError(f"a polygon of its segmentation has the coordinate {number}, far outside of the image")


def _coco_mask() -> Any:
    """faster-coco-eval's functions on run lengths; imported here, since it is in an extra."""
    from faster_coco_eval.core import mask

    return mask


def encode_run_lengths(
    crops: Sequence[np.ndarray], boxes: Sequence[Sequence[int]], size: tuple[int, int]
) -> list[dict[str, Any]]:
    """The compressed run lengths {"size": [height, width], "counts": str} of each mask of an image, ready for JSON.

    Args:
        crops: the masks, cropped to their boxes: (y_max - y_min + 1, x_max - x_min + 1) bool each.
        boxes: x_min, y_min, x_max, y_max of each crop in pixels, inclusive.
        size: (height, width) of the image. The time depends on the crops, not on this.
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
    """Run lengths, int64, column by column: background and mask in turn, beginning with background."""
    height, width = size
    # The columns in one line, with background before the first and below each, so that every run ends in its column.
    line = np.zeros(1 + crop.shape[1] * (crop.shape[0] + 1), dtype=bool)
    line[1:].reshape(crop.shape[1], crop.shape[0] + 1)[:, :-1] = crop.T
    columns, rows = np.divmod(np.flatnonzero(line[1:] != line[:-1]), crop.shape[0] + 1)
    places = (columns + box[0]) * height + rows + box[1]  # in the image
    starts, ends = places[::2], places[1::2]
    # Join a run that reaches the bottom of a column with one that begins at the top of the next.
    apart = starts[1:] != ends[:-1]
    starts, ends = starts[np.append(True, apart)[: len(starts)]], ends[np.append(apart, True)[: len(ends)]]
    changes = np.concatenate([[0], np.stack([starts, ends], 1).ravel(), [height * width]])
    counts = np.diff(changes)
    if len(counts) > 1 and counts[-1] == 0:  # the mask includes the last pixel
        counts = counts[:-1]
    return counts


def _compress(masks: Sequence[np.ndarray]) -> list[str]:
    """Each mask's run lengths as text: numbers in characters of 5 bits, lowest bits first.

    From the fourth on, a number is the difference from the run length two before it.
    """
    if not masks:
        return []
    # All at once: each step below costs about the same for one small mask as for dozens.
    counts = np.concatenate(masks).astype(np.int64)
    lengths = [len(mask) for mask in masks]
    ends = np.cumsum(lengths)
    place = np.arange(len(counts)) - np.repeat(ends - lengths, lengths)  # of each run length in its mask
    left = counts.copy()
    left[2:] -= np.where(place[2:] < 3, 0, counts[:-2])
    unfinished = np.ones(len(left), dtype=bool)
    characters, written = [], []
    while unfinished.any():
        bits = left & (MORE - 1)
        left = left >> BITS
        # Done when only the sign is left, and equals the highest bit that was written.
        done = left == np.where(bits & (MORE >> 1), -1, 0)
        characters.append(bits + np.where(done, 0, MORE) + FIRST_CHARACTER)
        written.append(unfinished)
        unfinished = unfinished & ~done
    table, valid = np.stack(characters, 1).astype(np.uint8), np.stack(written, 1)
    text = table[valid].tobytes().decode("ascii")
    stops = valid.sum(1).cumsum()[ends - 1].tolist()
    return [text[start:stop] for start, stop in zip([0, *stops[:-1]], stops, strict=True)]


def map_run_lengths(numbers: np.ndarray, count: int) -> list[list[int]]:
    """The run lengths of each segment of a map, not compressed: column by column, beginning with background.

    Args:
        numbers: (H, W) of 0..count; 0 is no segment.
        count: the number of segments.

    Returns:
        For each segment run lengths that add up to H * W; a single one if it has no pixels.
    """
    flat = numbers.T.ravel()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    ends = np.append(starts[1:], flat.size)
    owners = flat[starts]
    by_owner = np.argsort(owners, kind="stable")
    bounds = np.searchsorted(owners[by_owner], np.arange(1, count + 2))
    counts = []
    for first, last in pairwise(bounds.tolist()):
        runs = by_owner[first:last]
        edges = np.stack([starts[runs], ends[runs]], axis=1).ravel()  # where the segment starts and stops, in turn
        lengths = np.diff(edges, prepend=0, append=flat.size).tolist()
        counts.append(lengths[:-1] if len(lengths) > 1 and not lengths[-1] else lengths)  # it has the last pixel
    return counts


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


__all__ = ["decode_run_lengths", "encode_run_lengths", "last_on_top", "map_run_lengths", "to_run_lengths"]

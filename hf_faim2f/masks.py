"""Masks of segments: overlaying masks, converting COCO's three mask formats to compressed run lengths, and recognizing
folders of label maps.

Encoding is implemented here instead of by `faster_coco_eval` or `pycocotools`: the core works without extras, and those
libraries encode full-size masks instead of crops (30 masks of 2048x1024 pixels take 54 and 182 ms instead of 2).
Decoding and the conversion of annotations use `faster_coco_eval`, which is in the extra `evaluate`.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

# Minimum length of a polygon: three points.
LEAST_POLYGON = 6
# Maximum length of a polygon in pixels, counted as by the rasterizer: it takes 40 bytes for each, so 0.7 GB.
LONGEST_POLYGON = 1 << 24
# COCO's compressed run lengths: each character holds five bits of a number, and one bit that is set if more follow.
BITS = 5
MORE = 1 << BITS
FIRST_CHARACTER = 48
# Maximum number of characters of a number: enough for 32 bits and the sign.
LONGEST_NUMBER = 7
# Number of run lengths to compress at once: large enough to amortize the calls for small masks, small enough for the
# cache.
COUNTS_TOGETHER = 1 << 14

# The names of folders with label maps, in the layouts of all formats: whole names, and the ends of CamVid's with what
# the names of the maps have in addition to those of their images. Roboflow's maps have this end, and are beside the
# images and this file.
MAP_FOLDERS = frozenset({"annotations", "masks", "SegmentationClass", "SegmentationObject", "gtFine"})
CAMVID_ENDS = {"annot": "", "_labels": "_L", "_masks": ""}
ROBOFLOW_CLASSES, ROBOFLOW_END = "_classes.csv", "_mask"


def maps_among(folder: Path, images: Iterable[Path]) -> str | None:
    """Which of the folders of these images, all in `folder`, has label maps, as a sentence; None if none has.

    Its name says so, or the files in it. Label maps can be read like images, but are nearly black.
    """
    for place in sorted({path.parent for path in images if path.suffix.lower() == ".png"}):
        inside = place.relative_to(folder).parts  # before links are resolved, which may have any target
        if any(_is_of_maps(folder.resolve().joinpath(*inside[:count])) for count in range(len(inside) + 1)):
            return f"{place} has maps of labels: name a folder that has only images."
        if (place / ROBOFLOW_CLASSES).is_file() and any(place.glob(f"*{ROBOFLOW_END}.png")):
            return f"{place} has maps of labels ({ROBOFLOW_CLASSES}): name a folder that has only images."
    return None


def _is_of_maps(folder: Path) -> bool:
    if folder.name in MAP_FOLDERS:
        return not (folder / "images").is_dir()  # as in `annotations` of predictions
    ends = (end for end in CAMVID_ENDS if folder.name.endswith(end))
    return any(folder.name != end and folder.with_name(folder.name.removesuffix(end)).is_dir() for end in ends)


def box_of(mask: np.ndarray) -> list[int]:
    """x_min, y_min, x_max, y_max, inclusive, of a mask (H, W) of 0 and 1; zeros for an empty mask."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return [int(end) for end in (columns[0], rows[0], columns[-1], rows[-1])] if len(rows) else [0] * 4


def is_finite(number: Any) -> bool:
    """Whether a value of untrusted JSON is a finite number. Integers beyond the range of floats are not, for which
    `math.isfinite` raises an error."""
    is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
    return is_number and abs(number) <= sys.float_info.max


def to_run_lengths(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Converts any of COCO's mask formats to compressed run lengths {"size": [height, width], "counts": bytes}.

    Args:
        segmentation: untrusted input: a list of polygons [[x, y, x, y, ...], ...], whose union is the mask; or run
            lengths {"size": [h, w], "counts": [...]} in column-major order, starting with background; or the same with
            the counts compressed to a string or bytes.
        height, width: size of the image in pixels.

    Raises:
        ValueError: it has none of these formats, or does not fit the image. Nothing larger than the image is allocated.
        ImportError: faster-coco-eval is not installed.
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
    """Decodes run lengths from `to_run_lengths` to a mask (height, width), bool.

    Raises:
        ValueError: the runs do not add up to the image.
    """
    try:
        return _coco_mask().decode(run_lengths).view(np.bool_)
    except (ValueError, RuntimeError, MemoryError) as error:
        raise ValueError(f"its run lengths are damaged ({error})") from error


def _from_counts(segmentation: Mapping[str, Any], height: int, width: int) -> dict[str, Any]:
    size, counts = segmentation.get("size"), segmentation.get("counts")
    # Check the size before decoding, which would allocate memory for any size stated.
    if not isinstance(size, list) or size != [height, width]:
        raise ValueError(f"its run lengths are for {size} pixels, but the image is {[height, width]} (height, width)")
    if isinstance(counts, str | bytes):
        if not counts.isascii():
            raise ValueError("its compressed run lengths are not ASCII")
        text = counts.encode() if isinstance(counts, str) else counts
        # Not checked by the library, whose evaluation does not terminate on too few pixels.
        _check_sum(_uncompress(text).tolist(), height, width)
        return {"size": [height, width], "counts": text}
    if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError("its run lengths are neither a string nor a list of whole numbers from 0")
    _check_sum(counts, height, width)
    return _coco_mask().frPyObjects({"size": [height, width], "counts": counts}, height, width)


def _check_sum(counts: list[int], height: int, width: int) -> None:
    if sum(counts) != height * width:
        raise ValueError(f"its run lengths add up to {sum(counts)}, but the image has {height * width} pixels")


def _uncompress(text: bytes) -> np.ndarray:
    """The run lengths, int64, from untrusted compressed ones; the inverse of `_compress`."""
    values = np.frombuffer(text, np.uint8).astype(np.int64) - FIRST_CHARACTER
    if not len(values) or values.min() < 0 or values.max() >= 2 * MORE or values[-1] & MORE:
        raise ValueError("its compressed run lengths are damaged")
    ends = np.flatnonzero(values < MORE)
    starts = np.append(0, ends[:-1] + 1)
    place = np.arange(len(values)) - np.repeat(starts, ends - starts + 1)  # of each character in its number
    if place.max() >= LONGEST_NUMBER:
        raise ValueError("its compressed run lengths are damaged")
    counts = np.add.reduceat((values & (MORE - 1)) << (BITS * place), starts)
    counts -= np.where(values[ends] & (MORE >> 1), 1 << BITS * (place[ends] + 1), 0)  # the highest bit is the sign
    counts[1::2] = counts[1::2].cumsum()
    counts[2::2] = counts[2::2].cumsum()
    if counts.min() < 0:
        raise ValueError("its compressed run lengths are damaged: one is negative")
    return counts


def _check_polygon(polygon: Any, height: int, width: int) -> None:
    if not isinstance(polygon, list) or len(polygon) < LEAST_POLYGON or len(polygon) % 2:
        raise ValueError("a polygon of its segmentation is not a list of three or more x, y pairs")
    for numbers, side in ((polygon[::2], width), (polygon[1::2], height)):
        for number in numbers:
            if not is_finite(number):
                raise ValueError(f"a polygon of its segmentation has {repr(number)[:40]} for a coordinate")
            # Hand-drawn outlines may cross the edge. A point much further away could exhaust the memory.
            if not -side <= number <= 2 * side:
                raise ValueError(f"a polygon of its segmentation has the coordinate {number}, far outside of the image")
    # Most polygons could not be too long even if each edge crossed the whole area where vertices may be.
    if len(polygon) // 2 * 3 * max(height, width) > LONGEST_POLYGON:
        corners = np.array(polygon, dtype=np.float64).reshape(-1, 2)
        length = np.abs(corners - np.roll(corners, 1, axis=0)).max(1).sum()
        if length > LONGEST_POLYGON:
            raise ValueError(
                f"a polygon of its segmentation is {length:.0f} pixels long, more than {LONGEST_POLYGON}: simplify it"
            )


def _coco_mask() -> Any:
    """faster-coco-eval's functions for run lengths; imported lazily because the package is in an extra."""
    from faster_coco_eval.core import mask

    return mask


def encode_run_lengths(
    crops: Sequence[np.ndarray], boxes: Sequence[Sequence[int]], size: tuple[int, int]
) -> list[dict[str, Any]]:
    """Encodes the masks of an image as compressed run lengths {"size": [height, width], "counts": str}, ready for JSON.

    Args:
        crops: the masks, cropped to their boxes: (y_max - y_min + 1, x_max - x_min + 1) bool each.
        boxes: x_min, y_min, x_max, y_max of each crop in pixels, inclusive.
        size: (height, width) of the image. The run time depends on the size of the crops, not of the image.
    """
    texts: list[str] = []
    together: list[np.ndarray] = []
    for crop, box in zip(crops, boxes, strict=True):
        together.append(_counts(crop, box, size))
        if sum(map(len, together)) >= COUNTS_TOGETHER:
            texts += _compress(together)
            together = []
    return [{"size": list(size), "counts": text} for text in texts + _compress(together)]


def encode_column_blocks(blocks: Iterable[tuple[np.ndarray, Sequence[int]]], size: tuple[int, int]) -> dict[str, Any]:
    """Encodes one mask, given in blocks of columns, in the format of `encode_run_lengths`.

    Args:
        blocks: pairs of a crop and its box, from left to right.
        size: (height, width) of the image.
    """
    runs = [_runs(crop, box, size[0]) for crop, box in blocks]
    starts, ends = (np.concatenate([np.zeros(0, np.int64), *(pair[axis] for pair in runs)]) for axis in (0, 1))
    return {"size": list(size), "counts": _compress([_counts_of_runs(starts, ends, size)])[0]}


def _counts(crop: np.ndarray, box: Sequence[int], size: tuple[int, int]) -> np.ndarray:
    """Run lengths, int64, in column-major order: background and mask alternate, starting with background."""
    return _counts_of_runs(*_runs(crop, box, size[0]), size)


def _runs(crop: np.ndarray, box: Sequence[int], height: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the runs of a crop start and end in an image of this height, in column-major order."""
    # All columns concatenated, with background before the first and below each, so that each run ends in its column.
    line = np.zeros(1 + crop.shape[1] * (crop.shape[0] + 1), dtype=bool)
    line[1:].reshape(crop.shape[1], crop.shape[0] + 1)[:, :-1] = crop.T
    columns, rows = np.divmod(np.flatnonzero(line[1:] != line[:-1]), crop.shape[0] + 1)
    places = (columns + box[0]) * height + rows + box[1]  # in the image
    return places[::2], places[1::2]


def _counts_of_runs(starts: np.ndarray, ends: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    height, width = size
    # Join a run that reaches the bottom of a column with one that starts at the top of the next.
    apart = starts[1:] != ends[:-1]
    starts, ends = starts[np.append(True, apart)[: len(starts)]], ends[np.append(apart, True)[: len(ends)]]
    changes = np.concatenate([[0], np.stack([starts, ends], 1).ravel(), [height * width]])
    counts = np.diff(changes)
    if len(counts) > 1 and counts[-1] == 0:  # the mask includes the last pixel
        counts = counts[:-1]
    return counts


def _compress(masks: Sequence[np.ndarray]) -> list[str]:
    """The run lengths of each mask as text: numbers in characters of 5 bits, lowest bits first.

    From the fourth number on, the difference from the run length two positions earlier is stored instead.
    """
    if not masks:
        return []
    # All masks at once: each step below costs about the same for one small mask as for dozens.
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
        # A number is complete when only the sign is left, and it equals the highest bit written.
        done = left == np.where(bits & (MORE >> 1), -1, 0)
        characters.append(bits + np.where(done, 0, MORE) + FIRST_CHARACTER)
        written.append(unfinished)
        unfinished = unfinished & ~done
    table, valid = np.stack(characters, 1).astype(np.uint8), np.stack(written, 1)
    text = table[valid].tobytes().decode("ascii")
    stops = valid.sum(1).cumsum()[ends - 1].tolist()
    return [text[start:stop] for start, stop in zip([0, *stops[:-1]], stops, strict=True)]


def map_run_lengths(numbers: np.ndarray, count: int) -> list[list[int]]:
    """The uncompressed run lengths of each segment of a map, in column-major order, starting with background.

    Args:
        numbers: (H, W), segment numbers 1..count; 0 for no segment.
        count: the number of segments.

    Returns:
        For each segment, run lengths that add up to H * W; a single one if the segment has no pixels.
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
        edges = np.stack([starts[runs], ends[runs]], axis=1).ravel()  # where the segment starts and ends, alternating
        lengths = np.diff(edges, prepend=0, append=flat.size).tolist()
        # The last length is 0 if the segment includes the last pixel.
        counts.append(lengths[:-1] if len(lengths) > 1 and not lengths[-1] else lengths)
    return counts


def last_on_top(crops: Sequence[tuple[np.ndarray, Sequence[int]]], size: tuple[int, int]) -> np.ndarray:
    """Overlays masks: a map (H, W) of the number, from 1, of the last mask at each pixel; 0 where there is none.

    Args:
        crops: pairs of a bool mask, cropped to its box, and the box (x_min, y_min, x_max, y_max), inclusive.
        size: (H, W) in pixels.
    """
    numbers = np.zeros(size, dtype=np.min_scalar_type(len(crops)))
    for number, (mask, (x_min, y_min, x_max, y_max)) in enumerate(crops, start=1):
        inside = numbers[y_min : y_max + 1, x_min : x_max + 1]
        # Later masks have larger numbers, so a maximum works; it takes a tenth of the time of masked assignment.
        np.maximum(inside, mask * numbers.dtype.type(number), out=inside)
    return numbers


__all__ = [
    "box_of",
    "decode_run_lengths",
    "encode_column_blocks",
    "encode_run_lengths",
    "is_finite",
    "last_on_top",
    "map_run_lengths",
    "maps_among",
    "to_run_lengths",
]

"""COCO's three ways to write a mask, as compressed run lengths; decoding itself is `faster_coco_eval`'s."""

import math
from collections.abc import Mapping
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


__all__ = ["decode_run_lengths", "to_run_lengths"]

"""Reads the segmentation maps that are passed to a metric.

A map is an image (H, W) of integers. With a list that describes each id (transformers' `segmentation` and
`segments_info`, COCO's panoptic format), it represents any number of disjoint segments.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Ids of pixels without a segment in transformers.
NO_SEGMENT = (0, -1)


@dataclass(frozen=True)
class Segment:
    """One entry of `segments_info`."""

    id: int  # its value in the map
    label: Any  # class id, not yet checked
    crowd: bool = False  # a group of objects that were not separated
    score: float | None = None
    area: float | None = None  # in pixels, if given


def read_map(value: Any, what: str, name: str) -> Tensor:
    """Converts a map to an int64 tensor (H, W) on the device of the input.

    Args:
        value: a tensor, array, Pillow image or nested list (H, W) of integers, which may be stored as floats.
        what, name: "prediction" or "reference", and the image, for error messages.

    Raises:
        ValueError: the value is not such a map.
    """
    try:
        # Through NumPy: torch does not read Pillow images, and supports few operations on uint16.
        tensor = value if isinstance(value, Tensor) else torch.from_numpy(_signed(np.asarray(value)))
    except (TypeError, ValueError):
        raise ValueError(f"{name}: the {what} is no map of whole numbers, but a {type(value).__name__}.") from None
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise ValueError(
            f"{name}: the {what} must be a map (height, width) with at least one pixel, not {_shape(tensor)}."
        )
    whole = tensor.to(torch.int64)
    if tensor.is_floating_point() and not torch.equal(whole.to(tensor.dtype), tensor):
        raise ValueError(f"{name}: the {what} must have whole numbers, but has fractions: are these scores?")
    return whole


def check_same_size(prediction: Iterable[int], reference: Iterable[int], name: str) -> None:
    """Raises ValueError if two sizes, (height, width), differ."""
    (height, width), (true_height, true_width) = prediction, reference
    if (height, width) != (true_height, true_width):
        raise ValueError(
            f"{name}: the prediction is {height}x{width} pixels (height x width), but the reference is "
            f"{true_height}x{true_width}: post-process with target_sizes."
        )


def read_segments(segments_info: Iterable[Mapping[str, Any]], what: str, name: str) -> list[Segment]:
    """Reads the entries of `segments_info`: `id`, `label_id` (or COCO's `category_id`), and optionally `score`, `area`
    and `iscrowd`.

    Raises:
        ValueError: an entry has no id or no class.
    """
    segments = []
    for entry in segments_info:
        label = entry.get("label_id", entry.get("category_id"))
        if "id" not in entry or label is None:
            raise ValueError(f"{name}: a segment of the {what} has no id or no label_id: {dict(entry)}.")
        segments.append(
            Segment(int(entry["id"]), label, bool(entry.get("iscrowd", 0)), entry.get("score"), entry.get("area"))
        )
    return segments


def number_segments(ids: np.ndarray, numbers: Mapping[int, int], what: str, name: str) -> np.ndarray:
    """Replaces the ids of a map by the numbers of their segments, and ids of no segment by 0.

    Args:
        ids: (H, W).
        numbers: the segment number of each id, from 1.
        what, name: for error messages.

    Returns:
        (H, W) int64.

    Raises:
        ValueError: the map has an id without a number, other than those for "no segment".
    """
    present, inverse = np.unique(ids, return_inverse=True)
    unknown = [int(i) for i in present if int(i) not in numbers and int(i) not in NO_SEGMENT]
    if unknown:
        raise ValueError(
            f"{name}: the {what}'s map has the id {unknown[0]}, which its segments_info does not list; pixels without "
            "a segment must have the id 0 or -1."
        )
    return np.array([numbers.get(int(i), 0) for i in present], dtype=np.int64)[inverse].reshape(ids.shape)


def _signed(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind in "ub":
        return array.astype(np.int64)
    if array.dtype.kind not in "if":
        raise TypeError
    return np.require(array, requirements=["C", "W"])  # torch warns about read-only arrays


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a single number"

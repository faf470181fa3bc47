"""Segmentation maps to what the loss takes: one binary mask for each segment, and its class."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def resize_segmentation_map(segmentation_map: Tensor, height: int, width: int) -> Tensor:
    """(H, W) to (height, width) by the nearest pixel, of the same type, so that no id is lost or made up.

    Takes the same pixel as Pillow, and so as transformers' Mask2Former: it adds up the step from one sample to the
    next in double precision, which decides where a sample falls between two pixels.
    """
    if tuple(segmentation_map.shape) == (height, width):
        return segmentation_map
    rows, columns = (
        torch.from_numpy(_nearest_indices(old, new)).to(segmentation_map.device)
        for old, new in zip(segmentation_map.shape, (height, width), strict=True)
    )
    return segmentation_map[rows[:, None], columns[None, :]]


def _nearest_indices(old: int, new: int) -> np.ndarray:
    steps = np.full(new, old / new)
    steps[0] /= 2
    return np.minimum(np.cumsum(steps).astype(np.int64), old - 1)


def convert_segmentation_map_to_binary_masks(
    segmentation_map: Tensor,
    instance_id_to_semantic_id: Mapping[int, int] | None = None,
    ignore_index: int | None = None,
    do_reduce_labels: bool = False,
    padded_size: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """One binary mask for each id of a segmentation map, and the class of each, ordered by id.

    Conversion of transformers' Mask2Former: with `do_reduce_labels` id 0 becomes `ignore_index` and every other id one
    less; then `ignore_index` is dropped, which does not concern a pixel that had that value before. The keys and values
    of `instance_id_to_semantic_id` are ids and classes as they were before the reduction.

    Args:
        segmentation_map: (H, W), integers.
        instance_id_to_semantic_id: class of each instance id; without it the ids are classes.
        ignore_index: id of the pixels that belong to no mask.
        do_reduce_labels: see above; needs `ignore_index`.
        padded_size: (height, width) of the masks; what lies below and to the right of the map belongs to no mask.

    Returns:
        masks (n, height, width) of 0 and 1, float32, and classes (n,), int64.

    Raises:
        ValueError: `do_reduce_labels` without `ignore_index`, an id without class, or one of the class that is reduced.
    """
    if do_reduce_labels:
        if ignore_index is None:
            raise ValueError("do_reduce_labels needs an ignore_index, which id 0 becomes; 255 is usual.")
        segmentation_map = segmentation_map.to(torch.int64)
        segmentation_map = torch.where(segmentation_map == 0, ignore_index, segmentation_map - 1)
    ids = _distinct(segmentation_map)
    smallest, largest = (int(ids[0]), int(ids[-1])) if len(ids) else (0, 0)
    if ignore_index is not None:
        ids = ids[ids != ignore_index]

    height, width = segmentation_map.shape
    device = segmentation_map.device
    masks = torch.zeros((len(ids), *(padded_size or (height, width))), dtype=torch.float32, device=device)
    if len(ids):
        # Compared as bytes and written as floats at once: a tenth of the time of comparing int64 and converting.
        dtype = torch.uint8 if smallest >= 0 and largest <= 255 else torch.int64
        torch.eq(segmentation_map.to(dtype), ids.to(dtype)[:, None, None], out=masks[:, :height, :width])

    classes = ids.to(torch.int64)
    if instance_id_to_semantic_id is not None:
        shift = 1 if do_reduce_labels else 0
        found = []
        for instance_id in (ids.to(torch.int64) + shift).tolist():
            if instance_id not in instance_id_to_semantic_id:
                raise ValueError(f"id {instance_id} of the segmentation map is not in instance_id_to_semantic_id.")
            found.append(int(instance_id_to_semantic_id[instance_id]) - shift)
            if found[-1] < 0:
                raise ValueError(
                    f"instance_id_to_semantic_id gives id {instance_id} the class {found[-1] + shift}, which "
                    "do_reduce_labels removes: leave the instance out of the map, or do not reduce."
                )
        classes = torch.tensor(found, dtype=torch.int64, device=device)
    return masks, classes


def _distinct(segmentation_map: Tensor) -> Tensor:
    if segmentation_map.device.type == "cpu":  # NumPy's is many times faster than torch's on a CPU
        return torch.from_numpy(np.unique(segmentation_map.numpy()))
    return torch.unique(segmentation_map)

"""Training labels from segmentation maps."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

DEFAULT_IGNORE_VALUE = 255


def ignored_class_id(ignore_value: int, num_labels: int) -> int | None:
    """The value of unlabeled pixels in a map of class ids; None if it is 255, the default, and a class has that id."""
    return None if ignore_value == DEFAULT_IGNORE_VALUE < num_labels else ignore_value


def resize_segmentation_map(segmentation_map: Tensor, height: int, width: int) -> Tensor:
    """Resizes a map (H, W) to (height, width) by nearest neighbor; keeps its dtype.

    Selects the same pixels as Pillow, and therefore as transformers' Mask2Former: sample positions are accumulated in
    float64, which matters when a sample falls between two pixels.
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

    As in transformers' Mask2Former: with `do_reduce_labels`, id 0 becomes `ignore_index` and all other ids decrease by
    1; then `ignore_index` is dropped. `instance_id_to_semantic_id` has the ids and classes before this change.

    Args:
        segmentation_map: (H, W), integers.
        instance_id_to_semantic_id: class of each instance id; None if the ids are classes.
        ignore_index: id of pixels that belong to no mask.
        do_reduce_labels: see above; requires `ignore_index`.
        padded_size: (height, width) of the masks, which are padded with 0 at the bottom and right.

    Returns:
        masks (n, height, width) of 0 and 1, float32, and classes (n,), int64.

    Raises:
        ValueError: `do_reduce_labels` without `ignore_index`, or an id that has no class.
    """
    if do_reduce_labels:
        if ignore_index is None:
            raise ValueError("do_reduce_labels needs an ignore_index, which id 0 becomes; 255 is usual.")
        segmentation_map = segmentation_map.to(torch.int64)
        segmentation_map = torch.where(segmentation_map == 0, ignore_index, segmentation_map - 1)
    ids = _distinct(segmentation_map).to(torch.int64)  # torch would take an ignore_index of -1 for 255 in uint8
    smallest, largest = (int(ids[0]), int(ids[-1])) if len(ids) else (0, 0)
    if ignore_index is not None:
        ids = ids[ids != ignore_index]

    height, width = segmentation_map.shape
    device = segmentation_map.device
    masks = torch.zeros((len(ids), *(padded_size or (height, width))), dtype=torch.float32, device=device)
    if len(ids):
        # Comparing bytes and writing floats directly is ten times as fast as comparing int64 and converting.
        dtype = torch.uint8 if smallest >= 0 and largest <= 255 else torch.int64
        torch.eq(segmentation_map.to(dtype), ids.to(dtype)[:, None, None], out=masks[:, :height, :width])

    classes = ids
    if instance_id_to_semantic_id is not None:
        shift = 1 if do_reduce_labels else 0
        found = []
        for instance_id in (ids + shift).tolist():
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
    if segmentation_map.device.type == "cpu":  # NumPy is many times faster than torch here
        return torch.from_numpy(np.unique(segmentation_map.numpy()))
    return torch.unique(segmentation_map)


def labels_of_maps(
    maps: list[Tensor],
    padded_sizes: list[tuple[int, int]],
    instance_id_to_semantic_id: Any,
    settings: dict[str, Any],
) -> list[tuple[Tensor, Tensor]]:
    """Masks (n, height, width) and classes (n,) of each segmentation map; see the image processor's `preprocess`.

    Raises:
        ValueError: a map does not fit the other arguments; the message names the map.
    """
    if settings["do_reduce_labels"] and settings["ignore_index"] == 0:
        logger.warning_once(
            "do_reduce_labels makes id 1 class 0, and ignore_index 0 leaves that class unlabeled: pass an ignore_index "
            "that is not a class, such as 255."
        )
    mappings = instance_id_to_semantic_id
    if not isinstance(mappings, (list, tuple)):
        mappings = [mappings] * len(maps)
    if len(mappings) != len(maps):
        raise ValueError(
            f"instance_id_to_semantic_id has {len(mappings)} dictionaries for {len(maps)} segmentation maps: pass "
            "one for each, or one for all."
        )
    labels = []
    for i, (segmentation_map, mapping, padded_size) in enumerate(zip(maps, mappings, padded_sizes, strict=True)):
        try:
            if mapping is not None and settings["own_ignore_index"]:
                _refuse_ignored_instance(segmentation_map, mapping, settings)
            masks, classes = convert_segmentation_map_to_binary_masks(
                segmentation_map, mapping, settings["ignore_index"], settings["do_reduce_labels"], padded_size
            )
        except ValueError as error:
            raise ValueError(f"segmentation map {i}: {error}") from None
        limit = settings["num_labels"]
        if limit is not None and len(classes) and int(classes.max()) >= limit:
            raise ValueError(
                f"segmentation map {i} has class {int(classes.max())} but num_labels is {limit}: set ignore_index to "
                "the id of unlabeled pixels, or check do_reduce_labels."
            )
        labels.append((masks, classes))
    return labels


def _refuse_ignored_instance(segmentation_map: Tensor, classes: Mapping[int, int], settings: dict[str, Any]) -> None:
    """Raises ValueError if an instance has the id `ignore_index`: a 256th instance may have the id 255."""
    if settings["ignore_index"] is None:
        return
    shift = 1 if settings["do_reduce_labels"] else 0
    ignored = settings["ignore_index"] + shift
    label = classes.get(ignored)
    if label is None or int(label) == ignored or int(label) < shift:
        return
    if bool((segmentation_map.to(torch.int64) == ignored).any()):
        raise ValueError(
            f"instance_id_to_semantic_id gives id {ignored} the class {label}, but this image processor's ignore_index "
            f"{settings['ignore_index']} means that these pixels are unlabeled: pass ignore_index={ignored - shift} if "
            "they are, or else an id that no instance has, such as -1."
        )


def segments_of_class_maps(labels: Tensor, num_labels: int, ignore_value: int) -> tuple[list[Tensor], list[Tensor]]:
    """Maps of class ids as targets of the loss: one segment for each class in an image.

    Args:
        labels: (B, H, W), integers: class ids 0..num_labels-1, or `ignore_value` for unlabeled pixels.
        num_labels: number of classes.
        ignore_value: value of unlabeled pixels, also if it is the id of a class, such as 0 for the background; but 255,
            the default, yields to a class of that id.

    Returns:
        For each image a map (H, W), int64, of segments 0..n-1, or -1 for unlabeled pixels; and for each image the
        class ids of the segments (n,), int64, in ascending order.

    Raises:
        ValueError: wrong shape or dtype, or a value that is not a class.
    """
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels must be a torch tensor of shape (B, H, W), not a {type(labels).__name__}.")
    if labels.ndim != 3 or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"labels must be class ids, integers of shape (B, H, W), not {labels.dtype} of {tuple(labels.shape)}."
        )
    labels = labels.long()
    void = ignored_class_id(ignore_value, num_labels)
    ignored = torch.zeros_like(labels, dtype=torch.bool) if void is None else labels == void
    wrong = labels[~ignored & ((labels < 0) | (labels >= num_labels))]
    if len(wrong):
        raise ValueError(
            f"labels have the value {int(wrong[0])}, which is none of the classes 0 to {num_labels - 1} and not "
            f"{ignore_value}, which says that a pixel has no label (ignore_value of the configuration)."
        )
    maps, classes = [], []
    for ids in labels.masked_fill(ignored, num_labels):
        found = ids.unique()
        found = found[found < num_labels]
        place = torch.full((num_labels + 1,), -1, device=ids.device)
        place[found] = torch.arange(len(found), device=ids.device)
        maps.append(place[ids])
        classes.append(found)
    return maps, classes

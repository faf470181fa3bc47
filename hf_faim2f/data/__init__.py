"""Data sets as items, items as augmented items, and those as batches.

A reader gives a `datasets.Dataset` whose rows say where things are; files are read when an item is asked for, and
nothing is copied. `describe(dataset)` tells its task, its labels, which classes are things, and what was skipped.

=========================  =============================================================================
reader                     of
=========================  =============================================================================
load_ade20k                ADE20K's folders (semantic); load_ade20k_parquet for its form on the Hub
load_coco_instance         COCO's instances_*.json: polygons and run lengths, crowds
load_coco_panoptic         COCO's panoptic_*.json and PNGs
load_cityscapes            Cityscapes' gtFine and leftImg8bit: semantic, instance or panoptic
load_folder                any folder of images beside PNG masks, of classes or of instances
load_hub                   any data set with a column of images and one of segmentations
=========================  =============================================================================

**An item** is a dictionary, the same from every reader, before augmentation and after it:

- **image** (3, H, W) uint8 tensor, RGB, upright by its EXIF orientation; its annotations are turned with it where they
  were made on the stored pixels, which `hf_faim2f.data.files` decides by their size, and else by `annotation_frame`.
- **segments** (H, W) int32 tensor: at each pixel the segment, 0..n-1, or -1 for none (void). Where segments overlap,
  as COCO's do, the topmost: the smaller over the larger, crowds beneath everything. For semantic data each class that
  is in the image is one segment.
- **hidden** (L, H, W) int32 tensor, or None where nothing overlaps: the segments beneath those in `segments`, -1 for
  none. L is by how many segments the deepest one is covered, not their number: one or two in COCO. The whole mask of
  segment k is `(segments == k) | (hidden == k).any(0)`; `binary_masks(item)` gives all.
- **classes** (n,) int64 tensor: the class of each segment.
- **crowd** (n,) bool tensor: segments that are groups, which an evaluation treats apart. The collator leaves them out.
- **areas** (n,) float64 tensor, or None: the areas that the annotations state, by which COCO's evaluation tells small
  from large. None after an augmentation, which changes them, and where some are not stated.
- **image_id** int or str, **file_name** str: as the data set has them; of a folder its path from there, the id without
  suffix; of rows without any their number.
- **height**, **width** int: of the file's image, which augmentations do not change.

A segment may have no pixel (COCO has polygons that small); augmentations and the collator drop it.

Whatever cannot be used raises `DatasetError`, whose message names the file. Every reader takes `skip_bad`; see
`hf_faim2f.data.dataset` for what it can know beforehand and how to go on where an image turns out broken.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import DatasetError

if TYPE_CHECKING:
    from .augmentation import (
        AUGMENTATIONS,
        Augmentation,
        LargeScaleJitter,
        RandomCrop,
        RandomFlip,
        ResizeShortestEdge,
        SSDColorJitter,
        augment,
        coco_augmentations,
        focoos_augmentations,
        from_config,
        mask2former_semantic_augmentations,
        to_config,
    )
    from .collate import SegmentationCollator, TrainingItems
    from .dataset import (
        BadItem,
        Description,
        ItemReader,
        Task,
        describe,
        find_bad_items,
        lazy_dataset,
        without_bad_items,
    )
    from .item import (
        Item,
        binary_masks,
        class_map,
        drop_vanished,
        keep_segments,
        make_item,
        paint_masks,
        segment_areas,
    )
    from .readers.ade20k import load_ade20k, load_ade20k_parquet
    from .readers.cityscapes import load_cityscapes
    from .readers.coco import load_coco_instance, load_coco_panoptic
    from .readers.folder import load_folder
    from .readers.hub import load_hub

# Imported when they are asked for: `datasets`, which readers need, is in an extra, and what the commands take from this
# package is not.
_PLACES = {
    "AUGMENTATIONS": "augmentation",
    "Augmentation": "augmentation",
    "BadItem": "dataset",
    "Description": "dataset",
    "Item": "item",
    "ItemReader": "dataset",
    "LargeScaleJitter": "augmentation",
    "RandomCrop": "augmentation",
    "RandomFlip": "augmentation",
    "ResizeShortestEdge": "augmentation",
    "SSDColorJitter": "augmentation",
    "SegmentationCollator": "collate",
    "Task": "dataset",
    "TrainingItems": "collate",
    "augment": "augmentation",
    "binary_masks": "item",
    "class_map": "item",
    "coco_augmentations": "augmentation",
    "describe": "dataset",
    "drop_vanished": "item",
    "find_bad_items": "dataset",
    "focoos_augmentations": "augmentation",
    "from_config": "augmentation",
    "keep_segments": "item",
    "lazy_dataset": "dataset",
    "load_ade20k": "readers.ade20k",
    "load_ade20k_parquet": "readers.ade20k",
    "load_cityscapes": "readers.cityscapes",
    "load_coco_instance": "readers.coco",
    "load_coco_panoptic": "readers.coco",
    "load_folder": "readers.folder",
    "load_hub": "readers.hub",
    "make_item": "item",
    "mask2former_semantic_augmentations": "augmentation",
    "paint_masks": "item",
    "segment_areas": "item",
    "to_config": "augmentation",
    "without_bad_items": "dataset",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PLACES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})


__all__ = [
    "AUGMENTATIONS",
    "Augmentation",
    "BadItem",
    "DatasetError",
    "Description",
    "Item",
    "ItemReader",
    "LargeScaleJitter",
    "RandomCrop",
    "RandomFlip",
    "ResizeShortestEdge",
    "SSDColorJitter",
    "SegmentationCollator",
    "Task",
    "TrainingItems",
    "augment",
    "binary_masks",
    "class_map",
    "coco_augmentations",
    "describe",
    "drop_vanished",
    "find_bad_items",
    "focoos_augmentations",
    "from_config",
    "keep_segments",
    "lazy_dataset",
    "load_ade20k",
    "load_ade20k_parquet",
    "load_cityscapes",
    "load_coco_instance",
    "load_coco_panoptic",
    "load_folder",
    "load_hub",
    "make_item",
    "mask2former_semantic_augmentations",
    "paint_masks",
    "segment_areas",
    "to_config",
    "without_bad_items",
]

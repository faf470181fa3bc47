"""Reads datasets as items, augments items, and collates them into batches.

A reader returns a `datasets.Dataset` whose rows refer to images and annotations. Files are read when an item is
accessed, and nothing is copied. `describe(dataset)` returns the task, the labels, the thing classes, and what was
skipped.

=========================  =============================================================================
reader                     reads
=========================  =============================================================================
load_ade20k                ADE20K's folders (semantic); load_ade20k_parquet reads its version on the Hub
load_coco_instance         COCO's instances_*.json: polygons, run-length encoded masks and crowds
load_coco_panoptic         COCO's panoptic_*.json and PNGs
load_cityscapes            Cityscapes' gtFine and leftImg8bit: semantic, instance or panoptic
load_coco                  COCO's JSON as Roboflow, CVAT, Label Studio and others export it
load_yolo                  YOLO's segmentation labels, as Ultralytics reads and writes them
load_labelme               labelme's JSON files
load_supervisely           projects of Supervisely and Dataset Ninja
load_roboflow_masks        Roboflow's export of semantic masks
load_voc                   Pascal VOC's folders: semantic or instance
load_camvid                CamVid's layouts: semantic
load_folder                any folder of images with PNG masks, of classes or of instances
load_hub                   any dataset with a column of images and a column of segmentations
=========================  =============================================================================

**An item** is a dictionary with the same entries from every reader, before and after augmentation:

- **image** (3, H, W) uint8 tensor, RGB, rotated upright by its EXIF orientation. Annotations of the stored pixels are
  rotated with it; `hf_faim2f.data.files` describes how they are recognized, and `read_image` there describes images
  with another number of channels.
- **segments** (H, W) int32 tensor: the segment of each pixel, 0..n-1, or -1 for none (void). Where segments overlap, as
  in COCO, this is the topmost one: smaller segments cover larger ones, and crowds are at the bottom. In semantic data,
  each class in the image is one segment.
- **hidden** (L, H, W) int32 tensor, or None if nothing overlaps: the segments covered by those in `segments`, -1 for
  none. L is the largest number of segments on one pixel minus one; in COCO it is one or two. The full mask of segment k
  is `(segments == k) | (hidden == k).any(0)`; `binary_masks(item)` returns all of them.
- **classes** (n,) int64 tensor: the class of each segment.
- **crowd** (n,) bool tensor: whether each segment is a group of objects. Evaluations treat crowds separately, and the
  collator drops them.
- **areas** (n,) float64 tensor, or None: the areas stated in the annotations, by which COCO's evaluation distinguishes
  small and large objects. None if some are missing, and after augmentations that change them.
- **image_id** int or str, **file_name** str: from the dataset. For a folder, the file name is the path relative to it,
  and the id is the same without suffix; for rows without either, the row number.
- **height**, **width** int: size of the image in the file; augmentations do not change them.

A segment can have no pixels (some of COCO's polygons are that small); augmentations and the collator drop these.

An unusable file raises a `DatasetError` that names it. Every reader has the argument `skip_bad`;
`hf_faim2f.data.dataset` describes what it covers, and how to handle images that turn out to be broken later.
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
    from .readers.camvid import load_camvid
    from .readers.cityscapes import load_cityscapes
    from .readers.coco import load_coco_instance, load_coco_panoptic
    from .readers.coco_export import load_coco
    from .readers.folder import load_folder
    from .readers.hub import load_hub
    from .readers.labelme import load_labelme
    from .readers.roboflow_masks import load_roboflow_masks
    from .readers.supervisely import load_supervisely
    from .readers.voc import load_voc
    from .readers.yolo import load_yolo

# Modules are searched in this order and imported lazily, when a name is first used: readers need `datasets`, which is
# in an extra, and the command line also uses parts of this package that work without it.
_MODULES = (
    "augmentation", "item", "collate", "dataset", "readers.ade20k", "readers.cityscapes", "readers.coco",
    "readers.folder", "readers.hub", "readers.camvid", "readers.coco_export", "readers.labelme", "readers.voc",
    "readers.yolo", "readers.supervisely", "readers.roboflow_masks",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in _MODULES:
            found = vars(import_module(f".{module}", __name__))
            if name in found:
                return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


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
    "load_camvid",
    "load_cityscapes",
    "load_coco",
    "load_coco_instance",
    "load_coco_panoptic",
    "load_folder",
    "load_hub",
    "load_labelme",
    "load_roboflow_masks",
    "load_supervisely",
    "load_voc",
    "load_yolo",
    "make_item",
    "mask2former_semantic_augmentations",
    "paint_masks",
    "segment_areas",
    "to_config",
    "without_bad_items",
]

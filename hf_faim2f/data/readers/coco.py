"""COCO and other data in its format (Lin et al., Microsoft COCO, ECCV 2014; Kirillov et al., Panoptic, CVPR 2019).

    val2017/000000000139.jpg
    annotations/instances_val2017.json
    annotations/panoptic_val2017.json            annotations/panoptic_val2017/000000000139.png

Category ids have gaps. The class id is the rank of the category id: 0..79 for COCO's things, 0..132 for its panoptic
categories. Items include crowds (`iscrowd`), marked as such, for evaluation; they are not training targets.

The `supervision` library also reads COCO's instances, but it rounds polygon vertices to integers, decodes the masks of
all images at once, and does not support the panoptic format, so it is not used here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch

from ...errors import DatasetError, MissingPartError
from ...masks import is_finite
from ..dataset import IMAGE_FEATURE, ItemReader, Problems, Task, find_part, lazy_dataset
from ..files import (
    AnnotationFrame,
    file_source,
    is_of_stored_pixels,
    path_inside,
    read_colors,
    read_pair,
    source_name,
)
from ..item import Item, SegmentCounts, index_values, make_item
from .coco_document import CocoDocument
from .outlines import Frame, OutlineReader, stated_box, warn_of_boxes

# The annotations of an image are stored as JSON text, because polygons and run lengths have no common Arrow type.
TEXT = datasets.Value("large_string")
# Prefix of the names of COCO's panoptic files.
PANOPTIC = "panoptic_"


def load_coco_instance(
    root: str | Path,
    split: str = "val2017",
    *,
    annotation_file: str | Path | None = None,
    image_folder: str | Path | None = None,
    keep_empty: bool = True,
    skip_bad: bool = False,
    annotation_frame: AnnotationFrame | None = None,
) -> datasets.Dataset:
    """Loads COCO's instance annotations.

    Args:
        root: the folder with the image folders and `annotations`.
        split: "train2017", "val2017", or another split in the file names.
        annotation_file: path relative to `root`; None for `annotations/instances_SPLIT.json`.
        image_folder: path relative to `root`; None for SPLIT.
        keep_empty: keep images that have no annotations except crowds, as needed for evaluation.
        skip_bad: skip images that are missing or have an invalid annotation, and list them in
            `describe(dataset).skipped`.
        annotation_frame: what annotations refer to if an image is stored rotated or mirrored (EXIF) and `width` and
            `height` do not show it: the "upright" image, or its pixels as "stored". None for "upright", with a warning.

    Raises:
        DatasetError: a file is missing, is not COCO's JSON, or is inconsistent.
    """
    path = Path(root) / (annotation_file or f"annotations/instances_{split}.json")
    document = CocoDocument.read(path, Path(root) / (image_folder or split), Problems(skip_bad))
    return instance_dataset(document, "instance", annotation_frame, keep_empty)


def instance_dataset(
    document: CocoDocument, task: Task, annotation_frame: AnnotationFrame | None, keep_empty: bool = True
) -> datasets.Dataset:
    """Creates the dataset of a file with COCO's instance annotations.

    Args:
        document: the file.
        task: "instance", or "semantic" to merge the objects of each class.
        annotation_frame, keep_empty: as in `load_coco_instance`.

    Raises:
        DatasetError: an annotation is invalid, or no image can be used.
    """
    annotations: dict[int | str, list[dict[str, Any]]] = {image_id: [] for image_id in document.images}
    for image_id, annotation, name in document.annotations():
        try:
            annotations[image_id].append(_instance(annotation, document.class_of(annotation, name), name))
        except DatasetError as error:
            document.mark_unusable(image_id, error)
    own = {
        image_id: {"annotations": json.dumps(of_image, separators=(",", ":"))}
        for image_id, of_image in annotations.items()
        if keep_empty or not all(annotation["crowd"] for annotation in of_image)
    }
    reader = CocoInstanceReader(document.describe(task, annotation_frame), str(document.path))
    data = lazy_dataset(document.columns(own), {**document.features(), "annotations": TEXT}, reader)
    warn_of_boxes(data, reader)
    return data


def _instance(annotation: dict[str, Any], label: int, name: str) -> dict[str, Any]:
    area = annotation.get("area")
    if not isinstance(annotation.get("segmentation"), (list, dict)):
        raise DatasetError(f"{name} has no segmentation.")
    if annotation["segmentation"] == [] and annotation.get("bbox"):
        raise DatasetError(f"{name} has a box but no segmentation: export polygons or masks.")
    return {
        "name": name.rpartition(": ")[2],
        "class": label,
        "crowd": _is_crowd(annotation, name),
        "area": area if is_finite(area) else None,
        "segmentation": annotation["segmentation"],
        "box": stated_box(annotation.get("bbox")),
    }


def _is_crowd(entry: Mapping[str, Any], name: str) -> bool:
    """Whether an annotation or segment is a crowd; False if it has no `iscrowd`.

    Raises:
        DatasetError: `iscrowd` is neither 0 nor 1. (In Python, the string "0" would be true.)
    """
    flag = entry.get("iscrowd")
    if flag is None:
        return False
    if not isinstance(flag, (int, float)) or flag not in (0, 1):
        raise DatasetError(f"{name} has the iscrowd {flag!r}: it must be the number 0, or 1 for a crowd.")
    return bool(flag)


@dataclass(frozen=True)
class CocoInstanceReader(OutlineReader):
    """Reads rows of `load_coco_instance`.

    Args:
        path: path of the JSON file, for messages.
    """

    path: str

    def objects(self, row: Mapping[str, Any], height: int, width: int) -> list[dict[str, Any]]:
        """The annotations of a row."""
        return json.loads(row["annotations"])

    def source(self, row: Mapping[str, Any]) -> str:
        """The JSON file."""
        return self.path

    def known_size(self, row: Mapping[str, Any]) -> tuple[int, int]:
        """The size that the file states."""
        return row["height"], row["width"]

    def frame(self, row: Mapping[str, Any], upright: tuple[int, int], orientation: int) -> Frame:
        """The frame of the size that the file states; if that is ambiguous, `annotation_frame` decides.

        Raises:
            DatasetError: the image has another size.
        """
        check_size(row, upright, orientation, self.source(row))
        size = self.known_size(row)
        is_stored = is_of_stored_pixels(row["image"], size, upright, orientation, self.description.annotation_frame)
        return Frame(*size, orientation if is_stored else 1)


def load_coco_panoptic(
    root: str | Path,
    split: str = "val2017",
    *,
    annotation_file: str | Path | None = None,
    image_folder: str | Path | None = None,
    map_folder: str | Path | None = None,
    skip_bad: bool = False,
    annotation_frame: AnnotationFrame | None = None,
) -> datasets.Dataset:
    """Loads COCO's panoptic annotations: things and stuff, where a pixel belongs to at most one segment.

    Args:
        root, split, annotation_file, image_folder, skip_bad, annotation_frame: as in `load_coco_instance`, except that
            the default file is `annotations/panoptic_SPLIT.json` (for "train2017" also `panoptic_train.json`, and so
            on), and that the size of the PNG determines the frame.
        map_folder: the folder of the PNGs, relative to `root`; None for the JSON file's path without suffix.

    Raises:
        DatasetError: a file is missing, is not COCO's JSON, or is inconsistent.
    """
    if annotation_file is None:
        parts = [path.stem.removeprefix(PANOPTIC) for path in Path(root).glob(f"annotations/{PANOPTIC}*.json")]
        split = find_part(parts, split, str(root)) or split
    path = Path(root) / (annotation_file or f"annotations/{PANOPTIC}{split}.json")
    if not path.exists():
        raise MissingPartError(
            f"There is no file {path}: COCO's panoptic data has annotations/{PANOPTIC}PART.json, PNGs in the folder of "
            "that name, and images in PART, such as train and val."
        )
    document = CocoDocument.read(path, Path(root) / (image_folder or split), Problems(skip_bad), needs_things=True)
    maps = Path(root) / map_folder if map_folder else path.with_suffix("")
    own: dict[int | str, dict[str, Any]] = {}
    for image_id, annotation, name in document.annotations():
        try:
            if image_id in own:
                raise DatasetError(f"{name} is a second annotation of image {image_id}.")
            png = path_inside(maps, annotation.get("file_name"), str(path))
            if not png.is_file():
                raise DatasetError(f"There is no file {png}, which {path} names.")
            segments = json.dumps(_segments(annotation, document, name), separators=(",", ":"))
            own[image_id] = {"annotation": file_source(png), "segments": segments}
        except DatasetError as error:
            document.mark_unusable(image_id, error)
    for image_id in document.images:
        if image_id not in own and image_id not in document.unusable:
            document.mark_unusable(image_id, DatasetError(f"{path} has no annotation of image {image_id}."))
    features = {**document.features(), "annotation": IMAGE_FEATURE, "segments": TEXT}
    reader = CocoPanopticReader(document.describe("panoptic", annotation_frame), str(path))
    return lazy_dataset(document.columns(own), features, reader)


def _segments(annotation: dict[str, Any], document: CocoDocument, name: str) -> list[dict[str, Any]]:
    segments = annotation.get("segments_info")
    if not isinstance(segments, list) or not all(isinstance(segment, dict) for segment in segments):
        raise DatasetError(f"{name} has no list segments_info: it is not in COCO's panoptic format.")
    found: dict[int, dict[str, Any]] = {}
    for segment in segments:
        number, area = segment.get("id"), segment.get("area")
        if type(number) is not int or not 0 < number < 256**3 or number in found:
            raise DatasetError(f"{name} has a segment with the id {number!r}: not in 1..2**24-1, or a duplicate.")
        found[number] = {
            "id": number,
            "class": document.class_of(segment, f"{name}, segment {number},"),
            "crowd": _is_crowd(segment, f"{name}, segment {number},"),
            "area": area if is_finite(area) else None,
        }
    return list(found.values())


@dataclass(frozen=True)
class CocoPanopticReader(ItemReader):
    """Reads rows of `load_coco_panoptic`.

    Args:
        path: path of the JSON file, for messages.
    """

    path: str

    def read(self, row: Mapping[str, Any]) -> Item:
        """The item of a row."""
        image, source = read_pair(
            row["image"], row["annotation"], self.description.annotation_frame, self.description.num_channels
        )
        check_size(row, (image.shape[-2], image.shape[-1]), source["image_orientation"], self.path)
        red, green, blue = read_colors(source, image.shape[-2], image.shape[-1])
        values, places = index_values(red + 256 * green + 256**2 * blue)
        segments = json.loads(row["segments"])
        numbers = {segment["id"]: number for number, segment in enumerate(segments)}
        drawn, listed = set(values) - {0}, set(numbers)
        if drawn != listed:
            wrong = min(drawn ^ listed)
            where = "is in the map but not in" if wrong in drawn else "is not in the map but in"
            raise DatasetError(
                f"{source_name(row['annotation'])}: segment {wrong} {where} segments_info of {self.path}."
            )
        table = torch.tensor([numbers.get(value, -1) for value in values], dtype=torch.int32)
        areas = [segment["area"] for segment in segments]
        return make_item(
            image,
            table[places.long()],
            [segment["class"] for segment in segments],
            row["image_id"],
            row["file_name"],
            crowd=[segment["crowd"] for segment in segments],
            areas=None if None in areas else areas,
        )

    def count(self, row: Mapping[str, Any]) -> SegmentCounts:
        """Counts the segments of a row from their stated areas, or from the item if an area is missing."""
        segments = json.loads(row["segments"])
        areas = [segment["area"] for segment in segments]
        if not all(area is not None and area >= 1 for area in areas):
            return super().count(row)
        return SegmentCounts.disjoint(
            row["height"] * row["width"],
            [segment["class"] for segment in segments],
            [int(area) for area in areas],
            [segment["crowd"] for segment in segments],
        )


def check_size(row: Mapping[str, Any], upright: tuple[int, int], orientation: int, path: str) -> None:
    """Checks that the size of an image is the one that its annotations state, upright or as stored.

    Raises:
        DatasetError: it has another size.
    """
    height, width = upright
    stored = (width, height) if orientation >= 5 else (height, width)
    if (row["height"], row["width"]) not in ((height, width), stored):
        raise DatasetError(
            f"{source_name(row['image'])} is {height}x{width} pixels, but {path} says {row['height']}x{row['width']} "
            "(height x width, upright by its EXIF orientation)."
        )

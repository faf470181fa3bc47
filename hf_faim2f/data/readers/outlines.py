"""Readers of objects that are annotated as polygons or masks: COCO, YOLO, labelme and Supervisely.

Polygons are filled as in pycocotools, by the even-odd rule; an object is the union of its parts. So a polygon whose
vertices are corners of pixels covers exactly the pixels inside, even if it traverses a line in both directions, as
around a hole or between two parts.

Every object keeps its whole mask. Where objects overlap, the smaller one is on top, and crowds are at the bottom;
labelme's and Supervisely's objects are drawn in the order of the file, as in their own tools. For the task "semantic",
the visible pixels of the objects of a class are merged, and pixels without an object get the class `background` or
`_background_`, if there is one.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from faster_coco_eval.core import mask as coco_mask
from transformers.utils import logging

from ...errors import DatasetError
from ...masks import decode_run_lengths, is_finite, to_run_lengths
from ..dataset import ItemReader, from_rows
from ..files import read_header, read_with_orientation, turn_upright
from ..item import Item, SegmentCounts, class_map, make_item, paint_masks
from .maps import MOST_INSPECTED

logger = logging.get_logger(__name__)

BACKGROUNDS = ("background", "_background_")
# Hand-drawn polygons may cross the edge of the image by this many pixels without being reported.
TOLERANCE = 2.0


class Frame(NamedTuple):
    """The pixels to which annotations refer.

    Args:
        height, width: their size.
        turn: the EXIF orientation by which masks have to be turned upright; 1 for none.
    """

    height: int
    width: int
    turn: int = 1


@dataclass(frozen=True)
class OutlineReader(ItemReader):
    """Reads rows whose objects are polygons or run lengths.

    An object is a dictionary with "name" (for messages), "class", "crowd", "area" (as stated in the file, or None),
    "segmentation" (in one of COCO's formats) and, if stated, "box" (x, y, width, height).
    """

    smallest_on_top = True

    @abstractmethod
    def objects(self, row: Mapping[str, Any], height: int, width: int) -> list[dict[str, Any]]:
        """The objects of a row, in pixel coordinates of an image of this size.

        Raises:
            DatasetError: the annotations cannot be used.
        """

    @abstractmethod
    def source(self, row: Mapping[str, Any]) -> str:
        """The file with a row's annotations, for messages."""

    def frame(self, row: Mapping[str, Any], upright: tuple[int, int], orientation: int) -> Frame:
        """The pixels to which a row's annotations refer.

        Args:
            row: the row.
            upright: (height, width) of the upright image.
            orientation: EXIF orientation of the image.
        """
        if orientation == 1 or self.description.annotation_frame != "stored":
            return Frame(*upright)
        return Frame(*(upright[::-1] if orientation >= 5 else upright), orientation)

    def known_size(self, row: Mapping[str, Any]) -> tuple[int, int]:
        """(height, width) to which the annotations refer, without decoding the image."""
        orientation, height, width = read_header(row["image"])
        return self.frame(row, (height, width), orientation)[:2]

    def read(self, row: Mapping[str, Any]) -> Item:
        """The item of a row; with merged segments for the task "semantic".

        Raises:
            DatasetError: the image or its annotations cannot be used.
        """
        image, orientation = read_with_orientation(row["image"], self.description.num_channels)
        upright = (image.shape[-2], image.shape[-1])
        height, width, turn = self.frame(row, upright, orientation)
        objects = self.objects(row, height, width)
        run_lengths = self._run_lengths(row, objects, height, width)
        order = list(range(len(objects)))
        if self.smallest_on_top:  # such as a tie on a person
            order.sort(key=lambda k: -int(coco_mask.area(run_lengths[k])))
        order.sort(key=lambda k: not objects[k]["crowd"])

        def masks() -> Iterator[tuple[int, np.ndarray]]:
            for number in order:
                try:
                    mask = decode_run_lengths(run_lengths[number])
                except ValueError as error:
                    raise self._error(row, objects[number], error) from error
                yield number, turn_upright(mask, turn) if turn != 1 else mask

        try:
            segments, hidden = paint_masks(masks(), *upright)
        except DatasetError:
            raise
        except ValueError as error:
            raise DatasetError(f"{self.source(row)}: image {row['image_id']}: {error}.") from error
        areas = [entry["area"] for entry in objects]
        item = make_item(
            image,
            segments,
            [entry["class"] for entry in objects],
            row["image_id"],
            row["file_name"],
            hidden,
            [entry["crowd"] for entry in objects],
            None if None in areas else areas,
        )
        return item if self.description.task != "semantic" else merge_classes(item, self.description.labels)

    def count(self, row: Mapping[str, Any]) -> SegmentCounts:
        """Counts the objects of a row without decoding its image, unless classes have to be merged."""
        if self.description.task == "semantic":
            return super().count(row)
        height, width = self.known_size(row)
        objects = self.objects(row, height, width)
        run_lengths, crowd = self._run_lengths(row, objects, height, width), [entry["crowd"] for entry in objects]
        targets = [one for one, is_crowd in zip(run_lengths, crowd, strict=True) if not is_crowd]
        return SegmentCounts(
            height * width,
            [entry["class"] for entry in objects],
            [int(coco_mask.area(one)) for one in run_lengths],
            crowd,
            int(coco_mask.area(coco_mask.merge(targets))) if targets else 0,
        )

    def remarks(self, row: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Finds suspicious objects of a row: polygons or boxes that leave the image, and objects without pixels.

        Returns:
            Pairs of the kind of finding (see `data.check.KINDS`) and a sentence.

        Raises:
            DatasetError: the annotations cannot be used.
        """
        height, width = self.known_size(row)
        found = []
        objects = self.objects(row, height, width)
        for entry, run_lengths in zip(objects, self._run_lengths(row, objects, height, width), strict=True):
            where = f"{self.source(row)}: {entry['name']}"
            if _is_outside(entry, height, width):
                found.append(("outside", f"{where} extends beyond its image of {height}x{width} (height x width)."))
            if not int(coco_mask.area(run_lengths)):
                found.append(("vanished", f"{where} covers no pixel."))
        return found

    def _run_lengths(
        self, row: Mapping[str, Any], objects: list[dict[str, Any]], height: int, width: int
    ) -> list[dict[str, Any]]:
        run_lengths = []
        for entry in objects:
            try:
                run_lengths.append(to_run_lengths(entry["segmentation"], height, width))
            except ValueError as error:
                raise self._error(row, entry, error) from error
        return run_lengths

    def _error(self, row: Mapping[str, Any], entry: dict[str, Any], error: ValueError) -> DatasetError:
        return DatasetError(f"{self.source(row)}: {entry['name']}: {error}.")


def warn_of_boxes(dataset: datasets.Dataset, reader: OutlineReader) -> None:
    """Warns if every object is a polygon of four corners, as tools write boxes and oriented boxes.

    Inspects images until one has another object, usually the first, but at most `MOST_INSPECTED`.

    Args:
        dataset: the dataset.
        reader: its reader.
    """
    count = len(dataset)
    inspected = min(count, MOST_INSPECTED)

    def are_boxes(row: Mapping[str, Any]) -> list[bool]:
        try:
            return [_has_four_corners(entry["segmentation"]) for entry in reader.objects(row, 1, 1)]
        except DatasetError:  # will be raised or skipped when the item is read
            return []

    boxes_at, found = from_rows(dataset, are_boxes), 0
    for k in range(inspected):
        boxes = boxes_at(k * count // inspected)
        if not all(boxes):
            return
        found += len(boxes)
    if found:
        logger.warning_once(
            f"{reader.description.name} has only polygons of four corners (inspected: {found:,}). If they are "
            "boxes or oriented boxes, a model learns to fill these: annotate outlines or masks."
        )


def _has_four_corners(segmentation: Any) -> bool:
    """Whether a segmentation is one polygon of four corners, of which the first may be repeated at the end."""
    if not isinstance(segmentation, list) or len(segmentation) != 1 or not isinstance(segmentation[0], list):
        return False
    numbers = segmentation[0]
    return len(numbers) == 8 or (len(numbers) == 10 and numbers[:2] == numbers[-2:])


def _is_outside(entry: Mapping[str, Any], height: int, width: int) -> bool:
    """Whether an object's polygons or stated box leave the image by more than `TOLERANCE`."""
    polygons = entry["segmentation"] if isinstance(entry["segmentation"], list) else []
    xs = [number for polygon in polygons for number in polygon[::2]]
    ys = [number for polygon in polygons for number in polygon[1::2]]
    box = entry.get("box")
    if box is not None:
        xs += [box[0], box[0] + box[2]]
        ys += [box[1], box[1] + box[3]]
    return bool(xs) and (min(*xs, *ys) < -TOLERANCE or max(xs) > width + TOLERANCE or max(ys) > height + TOLERANCE)


def stated_box(box: Any) -> list[float] | None:
    """A box of four finite numbers from untrusted JSON, else None."""
    if not isinstance(box, list) or len(box) != 4:
        return None
    return box if all(map(is_finite, box)) else None


def merge_classes(item: Item, labels: tuple[str, ...]) -> Item:
    """Merges the visible pixels of each class into one segment; see the module's docstring for the background."""
    classes = class_map(item)
    background = next((place for place, name in enumerate(labels) if name.lower() in BACKGROUNDS), None)
    if background is not None:
        classes[item["segments"] < 0] = background
    found = [label for label in classes.unique().tolist() if label >= 0]
    table = torch.full((len(labels) + 1,), -1, dtype=torch.int32)  # class -1 indexes the last entry
    table[found] = torch.arange(len(found), dtype=torch.int32)
    return make_item(item["image"], table[classes], found, item["image_id"], item["file_name"])


__all__ = ["BACKGROUNDS", "Frame", "OutlineReader", "merge_classes", "stated_box", "warn_of_boxes"]

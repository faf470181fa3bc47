"""Readers of images with a map of classes or instances: one integer per pixel.

`hf_faim2f.data.readers.folder` describes the two encodings of instances. In a map of classes, each class in an image is
one segment.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from torch import Tensor

from ...errors import DatasetError
from ..dataset import ItemReader, describe, from_rows, source_of
from ..files import Source, has_colors, is_transparent, read_colors, read_header, read_map, read_pair, source_name
from ..item import INSTANCES_PER_CLASS, WHITE, Item, SegmentCounts, index_values, make_item

# The value of the object in binary masks with 8 or 16 bits.
WHITES = (WHITE, 65535)
# Names of pixels without a class, in formats that name them.
NO_CLASS = ("void", "ignore", "__ignore__", "unlabeled", "unlabelled", "_void_")
# Number of images to inspect to decide whether a dataset has binary masks, or boxes in place of outlines.
MOST_INSPECTED = 64


class Segments(NamedTuple):
    """The segments of a map with V distinct values.

    Args:
        places: (H, W) int32, the index of each pixel's value among the distinct values.
        table: (V,) int32, the segment of each value, 0..n-1, or -1 for none.
        classes: class of each segment.
        crowd: whether each segment is a crowd.
    """

    places: Tensor
    table: Tensor
    classes: list[int]
    crowd: list[bool]

    def ids(self) -> Tensor:
        """(H, W) int32, the segment of each pixel, -1 for none."""
        return self.table[self.places.long()]

    def pixels(self) -> list[int]:
        """The number of pixels of each segment."""
        of_values = np.bincount(self.places.numpy().ravel(), minlength=len(self.table))
        of_segments = np.zeros(len(self.classes) + 1, dtype=np.int64)
        np.add.at(of_segments, self.table.numpy(), of_values)  # -1 adds to the last entry
        return of_segments[:-1].tolist()


@dataclass(frozen=True)
class MapReader(ItemReader):
    """Reads rows with an image and a map.

    Args:
        image, annotation: names of the columns.
    """

    image: str = field(default="image", kw_only=True)
    annotation: str = field(default="annotation", kw_only=True)

    @property
    def source_columns(self) -> tuple[str, str]:
        """Names of the image column and the map column."""
        return self.image, self.annotation

    def values(self, row: Mapping[str, Any]) -> list[int]:
        """The distinct values in a row's map, which has one channel."""
        source = source_of(row[self.annotation])
        return index_values(read_map(source, *read_header(source)[1:]))[0]

    @abstractmethod
    def segments(self, source: Source, height: int, width: int) -> Segments:
        """The segments of a map of this size.

        Raises:
            DatasetError: the map cannot be read, has another size, or has invalid values.
        """

    def read(self, row: Mapping[str, Any]) -> Item:
        """The item of a row."""
        frame = self.description.annotation_frame
        image, source = read_pair(
            source_of(row[self.image]), source_of(row[self.annotation]), frame, self.description.num_channels
        )
        found = self.segments(source, image.shape[-2], image.shape[-1])
        return make_item(image, found.ids(), found.classes, *_identity(row, self.image), crowd=found.crowd)

    def count(self, row: Mapping[str, Any]) -> SegmentCounts:
        """Counts the segments in a row's map. Reads only the header of the image."""
        try:
            orientation, height, width = read_header(source_of(row[self.image]))
            source = source_of(row[self.annotation])
            about = {"image_orientation": orientation, "frame": self.description.annotation_frame, "lossless": True}
            found = self.segments({**source, **about}, height, width)
        except DatasetError:
            return super().count(row)  # raises the same error, unless only reading the header failed
        return SegmentCounts.disjoint(found.places.numel(), found.classes, found.pixels(), found.crowd)


@dataclass(frozen=True)
class InstanceMapReader(MapReader):
    """Reads maps of instances.

    Args:
        classes: the class of each red value in color maps, -1 for none; see `class_of_value`.
        image, annotation: names of the columns.
        ignored: the red value to be ignored, and whether the values are reduced; see `refuse_ignored_class`.
    """

    classes: Mapping[int, int]
    ignored: tuple[int | None, bool] = field(default=(None, False), kw_only=True)

    def segments(self, source: Source, height: int, width: int) -> Segments:
        """One segment for each instance in the map."""
        if has_colors(source):
            refuse_ignored_class(len(self.description.labels), *self.ignored)
            colors = read_colors(source, height, width)
            self._check_colors(source, colors)
            red, green, _ = colors
            values, places = index_values(red * 256 + green)
            classes = [self.classes.get(value // 256) for value in values]
            meaning = "red value"
        else:
            values, places = index_values(read_map(source, height, width))
            self._check_numbers(source, values, places)
            void = self._void_of(values)
            classes = [-1 if value == void else self._class_of_number(value) for value in values]
            meaning = "value"
        for value, cls in zip(values, classes, strict=True):
            if cls is None:
                raise DatasetError(
                    f"{source_name(source)} has the {meaning} {value // 256 if meaning == 'red value' else value}, "
                    f"which no instance of the {len(self.description.labels)} classes of {self.description.name} has: "
                    "see hf_faim2f.data.readers.folder for what a mask of instances holds."
                )
        found = [cls for cls in classes if cls is not None and cls >= 0]
        is_segment = torch.tensor([cls != -1 for cls in classes])
        table = torch.full((len(values),), -1, dtype=torch.int32)
        table[is_segment] = torch.arange(len(found), dtype=torch.int32)
        return Segments(places, table, found, [False] * len(found))

    def _check_colors(self, source: Source, colors: Tensor) -> None:
        """Rejects objects in white or pure colors on black, whose background would be read as an object of class 0.

        Raises:
            DatasetError: the map is such an image, or is partly transparent.
        """
        remedy = "save it with one channel (mode L), 0 for the background and another value for each object"
        if is_transparent(source):
            raise DatasetError(
                f"{source_name(source)} is partly transparent, and it is not clear what that means: {remedy}."
            )
        black, white = (colors == 0).all(0), colors == WHITE
        if not bool(black.any()) or not bool(white.any()) or self.classes.get(WHITE, -1) != -1:
            return
        is_gray = bool((colors == colors[0]).all())
        if is_gray or bool((white | (colors == 0)).all()):
            raise DatasetError(
                f"{source_name(source)} shows {'white' if is_gray else 'pure colors'} on black in RGB, whose red would "
                f"be read as the class and whose green as the number of the instance: {remedy}."
            )

    def _check_numbers(self, source: Source, values: list[int], places: Tensor) -> None:
        """Rejects antialiased masks, in which every shade along an edge would become an instance.

        A shade along an edge forms thin lines: no pixel has four neighbors of the same value. Objects have such pixels.

        Raises:
            DatasetError: most values between black and white are shades of edges.
        """
        shades = [place for place, value in enumerate(values) if 0 < value < values[-1]]
        if len(self.description.labels) != 1 or values[-1] not in WHITES or not shades:
            return
        inner = places[1:-1, 1:-1]
        inside = torch.ones_like(inner, dtype=torch.bool)
        for beside in (places[:-2, 1:-1], places[2:, 1:-1], places[1:-1, :-2], places[1:-1, 2:]):
            inside &= inner == beside
        solid = set(inner[inside].unique().tolist())
        thin = sum(place not in solid for place in shades)
        if 2 * thin > len(shades):
            raise DatasetError(
                f"{source_name(source)} has soft edges: {thin} of its values between 0 and {values[-1]} are thin "
                "lines, each of which would be an instance. Save it without antialiasing, each object in one value."
            )

    def _void_of(self, values: list[int]) -> int | None:
        """255 if it means "ignore" as in Pascal VOC, else None.

        It does if it cannot be an instance, or if the instances are numbered 1, 2, ... up to less than 254. Without any
        other value, the mask is a binary mask in which 255 is the object. 255 is also an object among others drawn in
        shades of gray.
        """
        white = WHITE
        if white not in values or self.classes.get(white) != -1:
            return None
        others = set(values) - {0, white}
        is_numbered = bool(others) and others == set(range(1, len(others) + 1)) and len(others) < white - 1
        return white if is_numbered or len(self.description.labels) > 1 else None

    def _class_of_number(self, value: int) -> int | None:
        """The class of a value; -1 for the background, None for an invalid value."""
        if value == 0:
            return -1
        if value < 0:
            return None
        if len(self.description.labels) == 1:
            return 0
        cls = value // INSTANCES_PER_CLASS - 1
        return cls if 0 <= cls < len(self.description.labels) else None


def class_of_value(num_labels: int, ignore_index: int | None = 255, reduce_labels: bool = False) -> dict[int, int]:
    """The class of each valid value of a map, -1 for no class.

    Args:
        num_labels: number of classes.
        ignore_index: the value of pixels without a class; None if there is none. It yields to a class of that value, so
            call `refuse_ignored_class` for a given one. If it is None and the values are 0 and 1, 255 means the same
            as 1, as in binary masks.
        reduce_labels: values are class + 1, and 0 is no class, as in ADE20K's files.
    """
    first = 1 if reduce_labels else 0
    void = {} if ignore_index is None else {ignore_index: -1}
    if reduce_labels:
        void[0] = -1
    classes = {**void, **{first + index: index for index in range(num_labels)}}
    if ignore_index is None and set(classes) == {0, 1}:
        classes[WHITE] = classes[1]
    return classes


def refuse_ignored_class(num_labels: int, ignore_index: int | None, reduce_labels: bool = False) -> None:
    """Raises DatasetError if the value to be ignored is that of a class, but not 255, the default.

    Args:
        num_labels, ignore_index, reduce_labels: as in `class_of_value`.
    """
    first = 1 if reduce_labels else 0
    if ignore_index in (None, WHITE) or ignore_index not in range(first, first + num_labels):
        return
    remedy = "if its name is the last, take it out of the labels, or else leave the option out."
    if ignore_index == 0:
        remedy = "name only the classes from 1 on and pass --reduce-labels (in Python reduce_labels=True), or leave "
        remedy += "the option out."
    raise DatasetError(
        f"The value {ignore_index} is to be ignored (ignore_index), but is also that of one of the {num_labels} "
        f"classes, {first} to {first + num_labels - 1}: {remedy}"
    )


@dataclass(frozen=True)
class SemanticMapReader(MapReader):
    """Reads maps of classes.

    Args:
        classes: the class of each value, from `class_of_value`; a map with any other value is rejected.
        has_instances: whether the format also has the task "instance", which messages may then suggest.
        image, annotation: names of the columns.
    """

    classes: Mapping[int, int]
    has_instances: bool = field(default=True, kw_only=True)

    def segments(self, source: Source, height: int, width: int) -> Segments:
        """One segment for each class in the map."""
        try:
            values, places = index_values(read_map(source, height, width))
        except DatasetError as error:
            if not self.has_instances or "must have one channel" not in str(error):
                raise
            raise DatasetError(f"{str(error)[:-1]}; if its colors encode instances, pass --task instance.") from error
        unknown = [value for value in values if value not in self.classes]
        if len(unknown) > 1 and {0, WHITE} <= set(values) and len(self.description.labels) <= 2:
            raise DatasetError(
                f"{source_name(source)} has soft edges: {len(unknown)} values lie between 0 and {WHITE}, and no class "
                f"of {self.description.name} has them. Save it without antialiasing, each class in one value."
            )
        if {1, WHITE} <= set(values) and self.classes.get(1, -1) == self.classes.get(WHITE):
            raise DatasetError(
                f"{source_name(source)} has the values 1 and {WHITE}: set ignore_index to the one that is not a class."
            )
        if unknown:
            owners = {value // INSTANCES_PER_CLASS - 1 for value in unknown}
            are_instances = self.has_instances and owners <= set(range(len(self.description.labels)))
            raise DatasetError(
                f"{source_name(source)} has the value{'s' if len(unknown) > 1 else ''} "
                f"{', '.join(map(str, unknown[:5]))}{' and others' if len(unknown) > 5 else ''}, which no class of "
                f"{self.description.name} has: check the number of labels, the value to ignore, and whether 0 is a "
                "class or none (reduce_labels)"
                f"{', or pass --task instance if these are instances' if are_instances else ''}."
            )
        return table_of([self.classes[value] for value in values], places)


def table_of(classes: list[int], places: Tensor) -> Segments:
    """One segment for each class in a map.

    Args:
        classes: the class of each distinct value, -1 for none; several values may have the same.
        places: (H, W) int32, the index of each pixel's value.
    """
    found = sorted({*classes} - {-1})
    numbers = {cls: number for number, cls in enumerate(found)}
    table = torch.tensor([numbers.get(cls, -1) for cls in classes], dtype=torch.int32)
    return Segments(places, table, found, [False] * len(found))


def _identity(row: Mapping[str, Any], image: str) -> tuple[int | str, str]:
    """(image id, file name) of a row, by the name of its image column. Without a `file_name` column, the file name is
    the image's, or else the id."""
    image_id = row["image_id"]
    path = str(source_of(row[image]).get("path") or "")
    return image_id, row.get("file_name") or PurePath(path).name or str(image_id)


class IgnoredWhiteError(DatasetError):
    """Masks contain only 0 and 255, and 255 is ignored, so only background would be left."""


def refuse_ignored_white(
    dataset: datasets.Dataset,
    values: Callable[[Mapping[str, Any]], list[int]],
    ignore_index: int | None,
    reduce_labels: bool,
) -> None:
    """Rejects binary masks of 0 and 255 if 255 would be ignored, so that only background would be left.

    Inspects maps until one has another value, usually the first, but at most `MOST_INSPECTED`.

    Args:
        values: returns the distinct values in a row's map.
        ignore_index, reduce_labels: as in `class_of_value`.

    Raises:
        IgnoredWhiteError: the dataset has such masks; the message says what to pass.
    """
    description, count = describe(dataset), len(dataset)
    labels = description.labels
    if description.task != "semantic" or ignore_index != WHITE or len(labels) > 2:
        return
    inspected = min(count, MOST_INSPECTED)

    def values_or_none(row: Mapping[str, Any]) -> list[int]:
        try:
            return values(row)
        except DatasetError:  # will be raised or skipped when the item is read
            return []

    values_at = from_rows(dataset, values_or_none)
    seen: set[int] = set()
    for k in range(inspected):
        seen.update(values_at(k * count // inspected))
        if not seen <= {0, WHITE}:
            return
    if WHITE not in seen:
        return
    many = f"The masks of {description.name} have no values but 0 and {WHITE}, and {WHITE} is ignored (ignore_index)"
    remedy = "pass --ignore-index -1 (in Python ignore_index=None)"
    if reduce_labels or len(labels) == 2:
        raise IgnoredWhiteError(f"{many}, so no pixel would be {labels[-1]!r}: where it is {WHITE}, {remedy}.")
    raise IgnoredWhiteError(
        f"{many}, so every pixel left would be {labels[0]!r}: where that is {WHITE}, name the background, too, as in "
        f"--labels background,{labels[0]}, and {remedy}."
    )

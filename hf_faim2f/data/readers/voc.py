"""Pascal VOC (Everingham et al., IJCV 2010), and exports in its layout (CVAT, labelme2voc): semantic or instance.

    JPEGImages/2007_000032.jpg   SegmentationClass/2007_000032.png   SegmentationObject/2007_000032.png
    ImageSets/Segmentation/{train,val}.txt      one name per line; without them, every tenth image is for validation
    labelmap.txt (CVAT) or class_names.txt (labelme) or labels.txt, for other classes than VOC's

An RGB class mask has the colors of labelmap.txt or of VOC's color map. A palette mask has the colors of labelmap.txt or
`palette` in its palette; without them, or with a palette that has none of them, its values are the classes, with 0 for
the background and 255 for borders, which have no class. For "semantic", the background is the first class.
For "instance", each value of SegmentationObject except 0 and 255 is an object, and its class is that of most of its
pixels in SegmentationClass.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import datasets
import numpy as np
import torch
from transformers.utils import logging

from ...errors import DatasetError
from ...files import files_below
from ..dataset import ROW_FEATURES, Description, Problems, Task, find_part, hold_out, kind_of_part, lazy_dataset
from ..files import (
    SUFFIXES_TRIED,
    AnnotationFrame,
    Source,
    file_source,
    has_colors,
    path_inside,
    png_inside,
    png_palette,
    read_colors,
    read_map,
    read_small_text,
    source_name,
)
from ..item import index_values
from .folder import read_labels
from .maps import (
    IgnoredWhiteError,
    MapReader,
    Segments,
    SemanticMapReader,
    class_of_value,
    refuse_ignored_white,
    table_of,
)
from .palette import VOC_BORDER, VOC_CLASSES, Palette, color_segments, find_palette, packed, unknown_colors, voc_palette

logger = logging.get_logger(__name__)

IMAGES, CLASSES, OBJECTS = "JPEGImages", "SegmentationClass", "SegmentationObject"
LISTS = ("ImageSets/Segmentation", "ImageSets")
NAMES_FILES = ("class_names.txt", "labels.txt")
BORDER = 255
# Where the folders are in the extracted archives.
INNER = ("VOC2012", "VOCdevkit/VOC2012", "VOCdevkit/VOC2007", "VOC2007")


def find_root(root: Path) -> Path | None:
    """The folder with the images and the class masks: `root`, or a folder in it; None if there is none."""
    for folder in (root, *(root / name for name in INNER)):
        if (folder / CLASSES).is_dir() and (folder / IMAGES).is_dir():
            return folder
    return None


def load_voc(
    root: str | Path,
    split: str = "train",
    task: Task = "semantic",
    *,
    labels: Sequence[str] | None = None,
    palette: str | None = None,
    skip_bad: bool = False,
    annotation_frame: AnnotationFrame | None = None,
) -> datasets.Dataset:
    """Loads Pascal VOC's folders.

    Args:
        root: the folder with JPEGImages, or VOCdevkit.
        split: name of a list in ImageSets/Segmentation, such as "train", "val" or "trainval".
        task: "semantic", or "instance", which needs SegmentationObject.
        labels: class names, the background first; None for those of the folder, or VOC's.
        palette: as in `find_palette`, for class masks in colors.
        skip_bad: skip images without a file or a mask, and list them in `describe(dataset).skipped`.
        annotation_frame: as in `load_folder`.

    Raises:
        DatasetError: a folder or a list is missing, an image has no mask, or class masks have only 0 and 255.
    """
    root = Path(root)
    folder = find_root(root)
    if folder is None:
        raise DatasetError(f"{root} is not in Pascal VOC's layout: it has no folders {IMAGES} and {CLASSES}.")
    if task == "instance" and not (folder / OBJECTS).is_dir():
        raise DatasetError(f"There is no folder {folder / OBJECTS}, which the task instance needs.")
    colors, are_given = _palette(folder, labels, palette)
    if task == "instance" and colors.classes.get((0, 0, 0)) != 0:  # no class is the background
        moved = {color: label + (label >= 0) for color, label in colors.classes.items()}
        colors = Palette(("background", *colors.labels), moved, colors.name)
    names, part = _names(folder, split)
    problems = Problems(skip_bad)
    columns: dict[str, list[Any]] = {name: [] for name in (*ROW_FEATURES, "annotation")}
    for name in names:
        try:
            image = _image(folder, name)
            masks = [png_inside(folder / kind, name, str(folder)) for kind in (CLASSES, OBJECTS)]
            for mask in masks if task == "instance" else masks[:1]:
                if not mask.is_file():
                    raise DatasetError(f"{image} has no mask: there is no file {mask}.")
        except DatasetError as error:
            problems.add(error)
            continue
        columns["image"].append(file_source(image))
        columns["annotation"].append(file_source(masks[task == "instance"]))
        columns["file_name"].append(image.relative_to(folder / IMAGES).as_posix())
        columns["image_id"].append(name)
    own = colors.labels if task == "semantic" else colors.labels[1:]
    things = frozenset(range(len(own)) if task == "instance" else ())
    description = Description(
        str(root), task, own, things, problems.report(str(root)), annotation_frame=annotation_frame
    )
    reader = VocReader(description, packed(colors), colors.name, str(folder / CLASSES), are_given)
    data = lazy_dataset(columns, {**ROW_FEATURES, "annotation": ROW_FEATURES["image"]}, reader)
    # A small part for validation may have no object, and masks of given colors are not read by their values.
    if not are_given and (part is None or kind_of_part(part) in (None, "train")):
        try:
            refuse_ignored_white(data, reader.values, BORDER, False)
        except IgnoredWhiteError as error:
            raise DatasetError(
                f"The masks in {folder / CLASSES} have no values but 0 and {BORDER}, and {BORDER} is a border, which "
                "has no class: save objects with the value 1, and name two classes, the background first."
            ) from error
    return data if part is not None else hold_out(data, split, str(root))


def _palette(folder: Path, labels: Sequence[str] | None, palette: str | None) -> tuple[Palette, bool]:
    """The classes, the black one first (the background), and their colors; and whether the colors are given."""
    found = find_palette([folder], palette, labels)
    are_given = found is not None
    if found is None:
        file = next((folder / name for name in NAMES_FILES if (folder / name).is_file()), None)
        names = labels if labels is not None or file is None else read_labels(file)
        if names is None:
            logger.warning_once(
                f"{folder} does not name its classes, so they are taken to be Pascal VOC's {len(VOC_CLASSES)} "
                f"({VOC_CLASSES[0]}, {VOC_CLASSES[1]} and so on): if they are others, write {NAMES_FILES[0]} there, or "
                "pass --labels."
            )
        names = None if names is None else [name for name in names if name != "__ignore__"]
        found = voc_palette(names)
    if labels is not None and tuple(labels) != found.labels:
        raise DatasetError(f"The labels are not the {len(found.labels)} of {found.name}: leave one of the two out.")
    # CVAT sorts its label map by name.
    first = next((number for number, name in enumerate(found.labels) if found.classes.get((0, 0, 0)) == number), 0)
    order = [first, *(number for number in range(len(found.labels)) if number != first)]
    places = {-1: -1, **{number: place for place, number in enumerate(order)}}
    classes = {VOC_BORDER: -1, **{color: places[label] for color, label in found.classes.items()}}
    return Palette(tuple(found.labels[number] for number in order), classes, found.name), are_given


def _names(folder: Path, split: str) -> tuple[list[str], str | None]:
    """The names of the images of a part, and its own name; all images and None if the data is not divided."""
    lists: dict[str, Path] = {}
    for place in LISTS:
        for path in sorted((folder / place).glob("*.txt")):
            lists.setdefault(path.stem, path)
        if lists:
            break
    part = find_part(lists, split, str(folder))
    if part is not None:
        lines = read_small_text(lists[part]).split("\n")
        return list(dict.fromkeys(_listed_name(folder, line.strip()) for line in lines if line.strip())), part
    found = sorted(path.relative_to(folder / CLASSES).with_suffix("").as_posix()
                   for path in files_below(folder / CLASSES, (".png",)))  # fmt: skip
    return found, None


def _listed_name(folder: Path, line: str) -> str:
    """The name in a line of a list, without the flag 1, 0 or -1 that the lists of ImageSets/Main have behind it."""
    name = re.sub(r"\s+(1|0|-1)$", "", line)
    if name == line:
        return name
    try:
        _image(folder, line)
    except DatasetError:
        return name
    return line


def _image(folder: Path, name: str) -> Path:
    for suffix in SUFFIXES_TRIED:
        path = path_inside(folder / IMAGES, name + suffix, str(folder))
        if path.is_file():
            return path
    raise DatasetError(f"There is no image {name} in {folder / IMAGES}.")


@dataclass(frozen=True)
class VocReader(MapReader):
    """Reads class masks, or object masks with class masks beside them.

    Args:
        classes: the class of each color, the background first; see `packed`.
        palette: name of the palette, for messages.
        class_folder: the folder of the class masks.
        by_color: whether palette masks are read by color, else by index.
        image, annotation: names of the columns.
    """

    classes: Mapping[int, int]
    palette: str
    class_folder: str
    by_color: bool

    def segments(self, source: Source, height: int, width: int) -> Segments:
        """One segment for each class, or for each object."""
        if self.description.task == "semantic":
            return self._classes(source, height, width)
        class_folder = Path(self.class_folder)
        name = Path(source_name(source)).relative_to(class_folder.with_name(OBJECTS)).with_suffix("").as_posix()
        found = self._classes({**source, "path": str(png_inside(class_folder, name, OBJECTS))}, height, width)
        labels = torch.tensor([*found.classes, -1])[found.ids().long()].numpy()
        values, places = self._objects(source, height, width)
        count = len(self.description.labels) + 2  # also no class, and the background
        pixels = np.bincount(
            (places.numpy().astype(np.int64) * count + labels + 1).ravel(), minlength=len(values) * count
        )
        pixels = pixels.reshape(len(values), count)
        table = torch.full((len(values),), -1, dtype=torch.int32)
        classes: list[int] = []
        for place, value in enumerate(values):
            if value < 0:
                continue
            if not pixels[place, 2:].any():
                raise DatasetError(f"{source_name(source)} has an object that has no class in {CLASSES}.")
            table[place] = len(classes)
            classes.append(int(pixels[place, 2:].argmax()))
        return Segments(places, table, classes, [False] * len(classes))

    def _classes(self, source: Source, height: int, width: int) -> Segments:
        if has_colors(source):
            return color_segments(source, height, width, self.classes, self.palette)
        labels = self.description.labels
        number = len(labels) + (self.description.task == "instance")
        by_index = class_of_value(number, BORDER)
        if (colors := png_palette(source)) is not None:
            values, places = index_values(read_map(source, height, width))
            found = [self._class_of_entry(colors, value) for value in values]
            if self.by_color and None not in found:
                return table_of([cls for cls in found if cls is not None], places)
            if self.by_color and self._are_own(colors):
                self._refuse_entry(source, colors, values[found.index(None)])
            listed = [by_index.get(value) for value in values]
            if None not in found and found != listed:
                logger.warning_once(
                    f"Masks in {self.class_folder} have colors of {self.palette} at other indices in their palettes. "
                    "Their indices are read as the classes: if the colors are right, pass --palette voc, and --labels "
                    "unless the classes are VOC's."
                )
            if None not in listed:
                return table_of([cls for cls in listed if cls is not None], places)
        description = Description(self.description.name, "semantic", ("background", *labels)[-number:])
        return SemanticMapReader(description, by_index).segments(source, height, width)

    def _class_of_entry(self, colors: list[int], value: int) -> int | None:
        """The class of a palette's entry, -1 for no class; None if its color does not tell."""
        of_border = -1 if value == BORDER else None
        if value >= len(colors) or colors.index(colors[value]) != value:  # palettes are often filled up with black
            return of_border
        return self.classes.get(colors[value], of_border)

    def _are_own(self, colors: list[int]) -> bool:
        """Whether a palette has a color of a class. Black, and a grey equal to its index as in mode L, do not tell."""
        return any(
            color and color != value * 0x010101 and color in self.classes for value, color in enumerate(colors[:BORDER])
        )

    def _refuse_entry(self, source: Source, colors: list[int], value: int) -> NoReturn:
        if value < len(colors) and colors[value] not in self.classes:
            raise unknown_colors(source, [colors[value]], self.palette)
        raise DatasetError(
            f"{source_name(source)} has the value {value}, which has no color of its own in the palette: save it with "
            f"the colors of {self.palette}."
        )

    def _objects(self, source: Source, height: int, width: int) -> tuple[list[int], torch.Tensor]:
        """The distinct values of an object mask, -1 for no object, and the index of each pixel's value."""
        if not has_colors(source):
            values, places = index_values(read_map(source, height, width))
            return [-1 if value in (0, BORDER) else value for value in values], places
        red, green, blue = read_colors(source, height, width)
        values, places = index_values((red << 16) + (green << 8) + blue)
        border = (VOC_BORDER[0] << 16) + (VOC_BORDER[1] << 8) + VOC_BORDER[2]
        return [-1 if value in (0, border) else value for value in values], places


__all__ = ["find_root", "load_voc"]

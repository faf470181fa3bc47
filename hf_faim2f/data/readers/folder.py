"""Custom folders of images with PNG masks.

    images/street.jpg           masks/street.png
    images/2024/house.png       masks/2024/house.png, or the only house.png anywhere in masks
    labels.txt                  the class names, one per line, in the order of their ids; or pass `labels`

A mask has one integer per pixel (8 or 16 bits, or a palette); masks of instances may have colors instead.

**task="semantic"**: the integer is the class; `ignore_index` (255) is no class. With `reduce_labels`, 0 is no class and
the classes are 1, 2, ... Binary masks of 0 and 255 are rejected if 255 would be ignored; with two labels and
`ignore_index=None`, 255 is the second class.

**task="instance"**: 0 is the background. With one label, every other integer is one instance of it. With several
labels, the integer is 1000 * (class + 1) + the instance number, as in Cityscapes: 1000 to 1999 are instances of class
0, 2000 to 2999 of class 1. Alternatively, the mask is RGB, as in transformers' instance segmentation scripts: red is
the class, green the instance number within the image, and blue is ignored. In RGB masks, a pixel has no class if its
red value is `ignore_index`, or 0 with `reduce_labels`, which also makes the classes 1, 2, ... as above. Objects in
white or pure colors on black, and antialiased masks, are rejected.

The `supervision` library has no reader for such masks.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from transformers.utils import logging

from ...errors import DatasetError
from ...files import read_text
from ..dataset import ROW_FEATURES, Description, Problems, Task, lazy_dataset
from ..files import LABELS_FILE, AnnotationFrame, check_regular, file_source, list_images
from ..item import WHITE
from .maps import (
    NO_CLASS,
    InstanceMapReader,
    MapReader,
    SemanticMapReader,
    class_of_value,
    refuse_ignored_class,
    refuse_ignored_white,
)

logger = logging.get_logger(__name__)


def load_folder(
    root: str | Path,
    labels: Sequence[str] | None = None,
    task: Task = "semantic",
    *,
    images: str | Path = "images",
    masks: str | Path = "masks",
    ignore_index: int | None = 255,
    reduce_labels: bool = False,
    skip_bad: bool = False,
    annotation_frame: AnnotationFrame | None = None,
    white_is_void: bool = False,
) -> datasets.Dataset:
    """Loads a folder of images and a folder of PNG masks; the module's docstring describes the masks.

    Args:
        root: the folder that contains both.
        labels: class names; None to read `labels.txt` in `root`.
        task: "semantic" or "instance".
        images, masks: the two folders, relative to `root`.
        ignore_index, reduce_labels: see the module's docstring.
        skip_bad: skip images without a mask, and list them in `describe(dataset).skipped`.
        annotation_frame: what masks refer to if an image is stored rotated or mirrored (EXIF) and the mask's size does
            not show it: the "upright" image, or its pixels as "stored". None for "upright", with a warning.
        white_is_void: accept masks that contain only 0 and an ignored 255, although they look like binary masks.

    Raises:
        DatasetError: a folder or the labels are missing, or an image has no mask.
    """
    root = Path(root)
    names = tuple(labels) if labels is not None else read_labels(root / LABELS_FILE)
    problems = Problems(skip_bad)
    columns = paired_maps(root / images, root / masks, problems)
    description = describe_maps(str(root), task, names, problems.report(str(root)), annotation_frame)
    features = {**ROW_FEATURES, "annotation": ROW_FEATURES["image"]}
    reader = map_reader(description, ignore_index, reduce_labels)
    dataset = lazy_dataset(columns, features, reader)
    if isinstance(reader, SemanticMapReader) and not white_is_void:
        refuse_ignored_white(dataset, reader.values, ignore_index, reduce_labels)
    return dataset


def describe_maps(
    name: str,
    task: Task,
    labels: tuple[str, ...],
    skipped: tuple[str, ...] = (),
    annotation_frame: AnnotationFrame | None = None,
) -> Description:
    """The metadata of a dataset with one map per image. Warns of a class that may stand for no class, such as "void".

    Raises:
        ValueError: the task is "panoptic".
    """
    if task == "panoptic":
        raise ValueError("One map per image cannot represent panoptic segmentation here: use 'semantic' or 'instance'.")
    things = frozenset(range(len(labels))) if task == "instance" else frozenset()
    description = Description(name, task, labels, things, skipped, annotation_frame=annotation_frame)
    for label in labels:
        if label.strip().lower() in NO_CLASS and task == "semantic":
            logger.warning_once(
                f"{name}: {label!r} is learned and measured like any other class: if it means that there is none, "
                f"leave it out of the labels, and ignore its value (--ignore-index, by default {WHITE})."
            )
    return description


def map_reader(
    description: Description,
    ignore_index: int | None,
    reduce_labels: bool,
    image: str = "image",
    annotation: str = "annotation",
) -> MapReader:
    """The reader for maps of classes or instances, depending on the task.

    Args:
        ignore_index, reduce_labels: as in `load_folder`.
        image, annotation: names of the columns.

    Raises:
        DatasetError: the task is "semantic", and `ignore_index` is a class.
    """
    classes = class_of_value(len(description.labels), ignore_index, reduce_labels)
    if description.task == "instance":
        ignored = (ignore_index, reduce_labels)
        return InstanceMapReader(description, classes, image=image, annotation=annotation, ignored=ignored)
    refuse_ignored_class(len(description.labels), ignore_index, reduce_labels)
    return SemanticMapReader(description, classes, image=image, annotation=annotation)


def paired_maps(images: Path, maps: Path, problems: Problems, end: str = "") -> dict[str, list[Any]]:
    """Pairs the images of a folder with the PNGs of the same stem in another, and returns the columns of a dataset.

    The PNG of an image in a subfolder is in the same subfolder, or is the only one with that stem. An image's id is its
    path relative to `images`, without suffix.

    Args:
        images, maps: the folders.
        problems: raises or collects problems with individual images.
        end: a suffix that the stems of the PNGs have in addition, such as "_L".

    Raises:
        DatasetError: a folder is missing or empty; or, unless `problems` skips it, an image has no map or several, or
            shares its map with another image.
    """
    found: dict[str, list[Any]] = {name: [] for name in (*ROW_FEATURES, "annotation")}
    by_name = {_name_below(maps, path).removesuffix(end): path for path in list_images(maps, (".png",))}
    by_stem: dict[str, list[Path]] = {}
    for path in by_name.values():
        by_stem.setdefault(path.stem.removesuffix(end), []).append(path)
    owners: dict[Path, Path] = {}
    is_inside = maps != images and maps.is_relative_to(images)
    pictures = [path for path in list_images(images) if not (is_inside and path.is_relative_to(maps))]
    # A mask with the same relative path as an image belongs to it, and not to another image of the same stem.
    placed = {by_name[name] for path in pictures if (name := _name_below(images, path)) in by_name}
    for path in pictures:
        name = _name_below(images, path)
        candidates = [by_name[name]] if name in by_name else [
            mask for mask in by_stem.get(path.stem, []) if mask not in placed
        ]  # fmt: skip
        if len(candidates) > 1:
            problems.add(
                f"{path} could have the mask {candidates[0]} or {candidates[1]}: put one at {maps / name}.png."
            )
            continue
        if not candidates:
            problems.add(f"{path} has no mask: there is no file {maps / name}.png.")
            continue
        (mask,) = candidates
        if mask in owners:
            problems.add(f"{path} and {owners[mask].name} share the mask {mask.name}: rename one of them.")
            continue
        owners[mask] = path
        found["image"].append(file_source(path))
        found["annotation"].append(file_source(mask))
        found["file_name"].append(path.relative_to(images).as_posix())
        found["image_id"].append(name)
    return found


def _name_below(folder: Path, path: Path) -> str:
    """The path of a file relative to a folder, without its suffix."""
    return path.relative_to(folder).with_suffix("").as_posix()


def read_labels(path: Path) -> tuple[str, ...]:
    """Reads class names, one per line, in the order of their ids.

    Raises:
        DatasetError: the file is missing or has no name, a blank line between names, or a duplicate name.
    """
    check_regular(path)
    try:
        lines = [line.strip() for line in read_text(path).split("\n")]
    except FileNotFoundError:
        raise DatasetError(
            f"{path.parent} does not say what its classes are called: write {path.name} there, one name per line in "
            "the order of their ids, or pass labels."
        ) from None
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read as UTF-8 text: {error}.") from error
    while lines and not lines[-1]:
        lines.pop()
    if path.suffix.lower() in (".json", ".yaml", ".yml"):
        raise DatasetError(
            f"{path} is not a list of names: write one per line, in the order of their ids, into a text file."
        )
    if not lines:
        raise DatasetError(f"{path} has no class name: write one per line, in the order of their ids.")
    if "" in lines:
        raise DatasetError(
            f"{path} has no class name in line {lines.index('') + 1}, and it is not clear whether that line stands "
            "for a class: write a name there, or remove it."
        )
    if twice := next((line for line in lines if lines.count(line) > 1), None):
        raise DatasetError(
            f"{path} has the class name {twice!r} twice: name each class once, in the order of their ids."
        )
    return tuple(lines)

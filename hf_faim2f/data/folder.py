"""Images beside PNG masks: what people make for themselves.

    images/street.jpg           masks/street.png
    images/2024/house.png       ... in one folder each; the stems must be equal
    labels.txt                  the classes, one a line, in the order of their ids; or pass `labels`

A mask has one integer for each pixel (8 or 16 bits, or a palette), or, for instances, may have colors.

**task="semantic"**: the integer is the class; `ignore_index` (255) is no class. With `reduce_labels` 0 is no class and
the classes are 1, 2, ...

**task="instance"**: 0 is the background. Where there is one label, every other integer is one instance of it. With
several labels the integer is 1000 * (class + 1) + the number of the instance: 1000 to 1999 are instances of class 0,
2000 to 2999 of class 1, as Cityscapes has it. Or the mask is RGB: red is the class, green the number of the instance
within the image, blue is not looked at, as transformers' instance segmentation scripts have it. There the pixels are
without class whose red is `ignore_index`, or 0 with `reduce_labels`, after which the classes are 1, 2, ... as above.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from .errors import DatasetError
from .files import AnnotationFrame, check_regular, file_source, list_images
from .instance_map import InstanceMapReader
from .lazy import Description, ItemReader, Task, lazy_dataset
from .rows import ROW_FEATURES
from .semantic_map import SemanticMapReader, class_of_value
from .skip_bad import Problems

LABELS_FILE = "labels.txt"


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
) -> datasets.Dataset:
    """A folder of images beside a folder of PNG masks; see above for what a mask is.

    Args:
        root: the folder that both are in.
        labels: class names; without them, `labels.txt` in `root` has them.
        task: "semantic" or "instance".
        images, masks: the two folders, as seen from `root`.
        ignore_index, reduce_labels: see above.
        skip_bad: leave out images without mask, and say so in `describe(dataset).skipped`.
        annotation_frame: what masks refer to where an image is stored turned (EXIF) and the mask's size does not tell:
            the image "upright", or its pixels as they are "stored". None for the former, with a warning.

    Raises:
        DatasetError: a folder or the labels are missing, or an image has no mask.
    """
    root = Path(root)
    names = tuple(labels) if labels is not None else read_labels(root / LABELS_FILE)
    problems = Problems(skip_bad)
    columns = paired_maps(root / images, root / masks, problems)
    description = describe_maps(str(root), task, names, problems.report(str(root)), annotation_frame)
    features = {**ROW_FEATURES, "annotation": ROW_FEATURES["image"]}
    return lazy_dataset(columns, features, map_reader(description, ignore_index, reduce_labels))


def describe_maps(
    name: str,
    task: Task,
    labels: tuple[str, ...],
    skipped: tuple[str, ...] = (),
    annotation_frame: AnnotationFrame | None = None,
) -> Description:
    """The description of a data set with one map for each image."""
    if task == "panoptic":
        raise ValueError("One map for each image says no panoptic segmentation here: use 'semantic' or 'instance'.")
    things = frozenset(range(len(labels))) if task == "instance" else frozenset()
    return Description(name, task, labels, things, skipped, annotation_frame=annotation_frame)


def map_reader(
    description: Description,
    ignore_index: int | None,
    reduce_labels: bool,
    image: str = "image",
    annotation: str = "annotation",
) -> ItemReader:
    """The reader of maps of classes or of instances; `image` and `annotation` are names of columns."""
    classes = class_of_value(len(description.labels), ignore_index, reduce_labels)
    reader = InstanceMapReader if description.task == "instance" else SemanticMapReader
    return reader(description, classes, image, annotation)


def paired_maps(images: Path, maps: Path, problems: Problems) -> dict[str, list[Any]]:
    """Columns with the images of a folder and, from another, the PNG of the same stem.

    Raises:
        DatasetError: a folder is missing or empty; or, unless `problems` skips it, two images have the same stem, or
            one has no map.
    """
    found: dict[str, list[Any]] = {name: [] for name in (*ROW_FEATURES, "annotation")}
    by_stem = {path.stem: path for path in list_images(maps, (".png",))}
    seen: dict[str, Path] = {}
    for path in list_images(images):
        if path.stem in seen:
            problems.add(f"{path} and {seen[path.stem].name} share the mask {path.stem}.png: rename one of them.")
            continue
        seen[path.stem] = path
        if path.stem not in by_stem:
            problems.add(f"{path} has no mask: there is no file {maps / path.stem}.png.")
            continue
        found["image"].append(file_source(path))
        found["annotation"].append(file_source(by_stem[path.stem]))
        found["file_name"].append(path.name)
        found["image_id"].append(path.stem)
    return found


def read_labels(path: Path) -> tuple[str, ...]:
    """Class names, one a line, in the order of their ids.

    Raises:
        DatasetError: there is no such file, or no name in it.
    """
    check_regular(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DatasetError(
            f"{path.parent} does not say what its classes are called: write {path.name} there, one name a line in the "
            "order of their ids, or pass labels."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read as UTF-8 text: {error}.") from error
    names = tuple(line.strip() for line in lines if line.strip())
    if not names:
        raise DatasetError(f"{path} has no class name: write one a line, in the order of their ids.")
    return names

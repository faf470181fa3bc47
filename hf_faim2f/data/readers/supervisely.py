"""Projects of Supervisely, also as Dataset Ninja gives them.

    meta.json                {"classes": [{"title": "cat", "shape": "bitmap", "color": "#FF0000"}, ...], "tags": [...]}
    DATASET/img/a.jpg        DATASET/ann/a.jpg.json (in older projects a.json)
    DATASET/datasets/SUB/img and so on, for datasets inside of others

The classes are those in meta.json, in its order, without those of points and other shapes without an area. Objects are
bitmaps, polygons with holes, and rectangles; points, lines, graphs and cuboids are left out, with a warning. Later
objects are on top. As in Supervisely's own SDK, whole numbers are the indices of pixels: the pixels on the outline of
a polygon and at all sides of a rectangle belong to it, and those on the outline of a hole do not. Fractions are
positions in the image, whose top left corner is (0, 0), and are filled as in pycocotools.

For the task "semantic", classes in `NO_CLASS`, such as `void`, are none, and pixels without an object get the class
`background` or `_background_` if there is one. For "instance", objects of these classes are left out.

Datasets called `train`, `val` and so on are the parts; without them, every tenth image is for validation, but any
dataset can be chosen by its name. An image without an annotation file is not read, with a warning.
"""

import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from transformers.utils import logging

from ...errors import DatasetError
from ...files import files_below
from ..dataset import ROW_FEATURES, Description, Problems, Task, find_part, hold_out, kind_of_part, lazy_dataset
from ..files import IMAGE_SUFFIXES, SUFFIXES_TRIED, AnnotationFrame, file_source, is_json_with
from .coco import CocoInstanceReader
from .maps import NO_CLASS
from .outlines import BACKGROUNDS
from .supervisely_document import META, WITHOUT_AREA, read_annotation, read_meta, run_lengths_of

logger = logging.get_logger(__name__)

FOLDERS = ("img", "ann")


def is_project(root: Path) -> bool:
    """Whether a folder has meta.json with classes, and a dataset."""
    return is_json_with(root / META, ("classes",)) and has_dataset(root)


def has_dataset(root: Path) -> bool:
    """Whether a folder has Supervisely's folders of images and annotations."""
    return any(all((place / sub).is_dir() for sub in FOLDERS) for place in _datasets(root))


def is_dataset(root: Path) -> bool:
    """Whether a folder is one of the datasets of the project in the folder above it."""
    return all((root / sub).is_dir() for sub in FOLDERS) and (root.parent / META).is_file()


def _datasets(root: Path, seen: set[str] | None = None) -> Iterator[Path]:
    """The folders of datasets, each before those inside of it. A folder to which several links lead occurs once."""
    seen = set() if seen is None else seen
    for place in sorted(root.glob("*/")):
        here = os.path.realpath(place)
        if here not in seen and not place.name.startswith("."):
            seen.add(here)
            yield place
            yield from _datasets(place / "datasets", seen)


def load_supervisely(
    root: str | Path,
    split: str = "train",
    task: Task = "instance",
    *,
    skip_bad: bool = False,
    annotation_frame: AnnotationFrame | None = None,
) -> datasets.Dataset:
    """Loads a project of Supervisely.

    Args:
        root: the folder with meta.json.
        split: "train", "val" or another dataset (see the module's docstring), or "all" if none is called so.
        task: "instance" or "semantic".
        skip_bad: skip unusable files, and list them in `describe(dataset).skipped`.
        annotation_frame: as in `load_folder`.

    Raises:
        DatasetError: meta.json or the annotations are missing, or a file cannot be used. (Bitmaps are decoded later,
            with their images.)
    """
    root, problems = Path(root), Problems(skip_bad)
    if is_dataset(root) and not (root / META).is_file():
        raise DatasetError(f"{root} is one dataset of a project: pass the folder of the project, {root.parent}.")
    shapes = read_meta(root / META)
    parts = {
        place: _part_of(place, root) for place in _datasets(root) if any((place / sub).is_dir() for sub in FOLDERS)
    }
    if not parts:
        raise DatasetError(f"{root} has no dataset: there are no folders DATASET/img and DATASET/ann.")
    part = find_part({*parts.values()}, split, str(root))
    places = [place for place, name in parts.items() if part is None or name == part]
    if part is not None:
        _warn_of_datasets(root, {*parts.values()}, part)
    names = [
        title
        for title, shape in shapes.items()
        if shape not in WITHOUT_AREA
        and title.strip().lower() not in NO_CLASS
        and (task == "semantic" or title.strip().lower() not in BACKGROUNDS)
    ]
    if not names:
        raise DatasetError(f"{root / META} has no class of objects with an area, so there is nothing to learn.")
    columns: dict[str, list[Any]] = {name: [] for name in (*ROW_FEATURES, "height", "width", "file")}
    left_out, rectangles, tags = Counter[str](), Counter[str](), set[str]()
    owners: dict[Path, Path] = {}
    for path in (path for place in places for path in _files(place / "ann", (".json",))):
        try:
            annotation = read_annotation(path, shapes)
            image = _image_of(path)
            if (owner := owners.setdefault(image, path)) != path:
                raise DatasetError(f"{path} and {owner.name} are of the same image {image.name}: remove one of them.")
        except DatasetError as error:
            problems.add(error)
            continue
        left_out.update(annotation.left_out)
        rectangles.update(figure.title for figure in annotation.figures if figure.kind == "rectangle")
        tags.update(annotation.tags)
        name = image.relative_to(root).as_posix()
        columns["image"].append(file_source(image))
        columns["file_name"].append(name)
        columns["image_id"].append(name)  # with its suffix, because a.jpg and a.png are two images
        columns["height"].append(annotation.height)
        columns["width"].append(annotation.width)
        columns["file"].append(path.relative_to(root).as_posix())
    _warn_of_objects(root, left_out, rectangles)
    for place in places:
        _warn_of_images(place, owners)
    # Not `train` alone, which may be a vehicle.
    of_parts = sorted(tag for tag in tags if kind_of_part(tag) in ("val", "test"))
    if part is None and of_parts:
        logger.warning_once(
            f"{root} has images with the tag {of_parts[0][:60]!r}. Tags are not read: if they are splits, put the "
            "images into datasets called train and val."
        )
    ids = {name: number for number, name in enumerate(names)}
    things = frozenset(ids.values() if task == "instance" else ())
    labels = tuple(name.strip() for name in names)
    description = Description(
        str(root), task, labels, things, problems.report(str(root)), annotation_frame=annotation_frame
    )
    size = {"height": datasets.Value("int32"), "width": datasets.Value("int32"), "file": datasets.Value("string")}
    data = lazy_dataset(columns, {**ROW_FEATURES, **size}, SuperviselyReader(description, str(root), shapes, ids))
    return data if part is not None else hold_out(data, split, str(root))


def _part_of(place: Path, root: Path) -> str:
    """The part of a dataset: the innermost dataset on the way to it that is called like one, else the outermost."""
    names = place.relative_to(root).parts[::2]  # without the folders `datasets` between them
    return next((name for name in reversed(names) if kind_of_part(name)), names[0])


def _warn_of_datasets(root: Path, parts: Collection[str], part: str) -> None:
    """Warns of datasets that are in no split, such as `extra`, or `train 2` beside `train`."""
    kind = kind_of_part(part)
    spare = sorted(name for name in parts if name != part and kind_of_part(name) in (None, kind))
    if kind is not None and spare:
        logger.warning_once(
            f"{root} has datasets for splits, so {', '.join(spare)[:200]} is not used with {part}: rename it, or move "
            "its images."
        )


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files in a folder, without its subfolders."""
    return [path for path in files_below(folder, suffixes) if path.parent == folder] if folder.is_dir() else []


def _image_of(path: Path) -> Path:
    """The image of an annotation file: of `a.jpg.json` a.jpg, and else of `a.json` an image called a.

    Raises:
        DatasetError: there is none.
    """
    named = path.parent.parent / "img" / path.stem
    candidates = [named, *(named.with_name(named.name + suffix) for suffix in SUFFIXES_TRIED)]
    found = next((image for image in candidates if image.is_file()), None)
    if found is None:
        raise DatasetError(f"{path} has no image: there is no file {named}.")
    return found


def _warn_of_objects(root: Path, left_out: Counter[str], rectangles: Counter[str]) -> None:
    """Says which objects are left out, or may not be meant as masks."""
    if left_out:
        logger.warning_once(
            f"{root} has objects that are points, lines, graphs or cuboids. They have no area, so they are left out "
            f"({_listed(left_out)}): if they are objects to find, draw masks or polygons."
        )
    if rectangles:
        logger.warning_once(
            f"{root} has objects that are rectangles, which are read as masks of the whole rectangles "
            f"({_listed(rectangles)}): if they are bounding boxes, draw masks or polygons instead, and delete them."
        )


def _listed(counter: Counter[str]) -> str:
    return ", ".join(f"{count:,} of {title}" for title, count in counter.most_common())


def _warn_of_images(place: Path, used: Collection[Path]) -> None:
    """Warns of images in a dataset that have no annotation file; `used` are the images of those that can be read."""
    of_used = {path.stem for path in used if path.parent == place / "img"}
    annotated = {path.stem for path in _files(place / "ann", (".json",))} - of_used
    images = [
        path
        for path in _files(place / "img", IMAGE_SUFFIXES)
        if path not in used and not {path.name, path.stem} & annotated
    ]
    if images:
        number = f"{len(images)} images" if len(images) > 1 else "an image"
        logger.warning_once(
            f"{place} has {number} without an annotation file in ann, such as {images[0].name}: not read. (The file of "
            "an image without objects has an empty list of them.)"
        )


@dataclass(frozen=True)
class SuperviselyReader(CocoInstanceReader):
    """Reads rows of `load_supervisely`.

    Args:
        path: the folder of the project.
        shapes: the shape of each class in meta.json.
        ids: the class id of each class that has one.
    """

    shapes: Mapping[str, str]
    ids: Mapping[str, int]

    smallest_on_top = False

    def source(self, row: Mapping[str, Any]) -> str:
        """The annotation file."""
        return str(Path(self.path, row["file"]))

    def objects(self, row: Mapping[str, Any], height: int, width: int) -> list[dict[str, Any]]:
        """The objects of the annotation file, from the lowest to the topmost."""
        found = []
        for figure in read_annotation(Path(self.source(row)), self.shapes).figures:
            if figure.title not in self.ids and self.description.task == "instance":
                continue  # the background, or no class
            try:
                segmentation = run_lengths_of(figure, height, width)
            except ValueError as error:
                raise DatasetError(f"{self.source(row)}: {figure.name}: {error}.") from error
            found.append({
                "name": figure.name, "class": self.ids.get(figure.title, -1), "crowd": False, "area": None,
                "segmentation": segmentation, "box": figure.box(),
            })  # fmt: skip
        return found


__all__ = ["has_dataset", "is_project", "load_supervisely"]

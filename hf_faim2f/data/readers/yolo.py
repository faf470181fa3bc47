"""YOLO's segmentation labels, as Ultralytics reads and writes them.

    data.yaml      train: images/train   val: [images/val, more/val]   test: t.txt   names: {0: cat, 3: dog}
    images/train/a.jpg       labels/train/a.txt     or train/images/a.jpg, train/labels/a.txt, or a.txt beside a.jpg

A label file has one object per line: the class, and the vertices x y x y ... of its polygon as fractions of width and
height. Parts and holes are joined to one polygon by connecting lines, which it traverses in both directions. An image
without a label file has no objects. Coordinates refer to the upright image, as in Ultralytics, unless
`annotation_frame` is "stored".

If data.yaml names `train` alone, as CVAT writes it, every tenth image of it is for validation.

Without data.yaml, `classes.txt` or `labels.txt` has the names (Label Studio's export), and the parts are
images/{train,val} or {train,val}/images, or every tenth image is for validation.

`supervision` also reads such labels, but rounds corners to whole pixels and decodes all masks at once.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import yaml
from transformers.utils import logging

from ...errors import DatasetError, MissingPartError
from ...files import YamlLoader, yaml_problem
from ..dataset import ROW_FEATURES, Description, Problems, Task, find_part, hold_out, kind_of_part, lazy_dataset
from ..files import AnnotationFrame, file_source, list_images, path_inside, read_small_text
from .folder import read_labels
from .outlines import OutlineReader, warn_of_boxes

logger = logging.get_logger(__name__)

NAMES_FILES = ("classes.txt", "labels.txt")
MOST_YAML = 1 << 20  # bytes
MOST_CLASSES = 100_000
# Fraction of a side by which Ultralytics lets outlines leave the image.
OUTSIDE = 0.01
# Maximum length of a line with a box instead of a polygon: the class, the box and optionally a score.
LONGEST_BOX = 6


def find_yaml(root: Path) -> Path | None:
    """The YAML file of a YOLO dataset, or None: data.yaml or dataset.yaml, else the only one with classes and a part.

    Raises:
        DatasetError: several files could be it, or one has its keys but cannot be read as YAML.
    """
    files = sorted([*root.glob("*.yaml"), *root.glob("*.yml")])
    named = [path for path in files if path.stem in ("data", "dataset")]
    if named:
        return named[0]
    fitting, broken = [], []
    for path in files:
        try:
            content = _read_yaml(path)
        except DatasetError as error:
            if _has_keys(path):  # else it may belong to another program
                broken.append(error)
            continue
        if ("names" in content or "nc" in content) and {"train", "val"} & set(content):
            fitting.append(path)
    if len(fitting) > 1:
        raise DatasetError(f"{root} has {fitting[0].name} and {fitting[1].name}: pass one of these files.")
    if broken and not fitting:
        raise broken[0]
    return fitting[0] if fitting else None


def _has_keys(path: Path) -> bool:
    """Whether lines of a file that is not valid YAML start with the keys of a YOLO dataset."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            text = file.read(MOST_YAML).replace(b"\0", b"")  # UTF-16 has zero bytes
    except OSError:
        return False
    line = rb"(?m)^[^\w\n]{0,4}(%s)[\"']?[ \t]*:"
    return all(re.search(line % keys, text) for keys in (b"names|nc", b"train|val"))


def load_yolo(
    root: str | Path,
    split: str = "train",
    task: Task = "instance",
    *,
    skip_bad: bool = False,
    annotation_frame: AnnotationFrame | None = None,
) -> datasets.Dataset:
    """Loads YOLO's segmentation labels.

    Args:
        root: the folder, or its YAML file.
        split: "train", "val" or "test"; also "all" if the data has no parts.
        task: "instance", or "semantic" to merge the objects of each class.
        skip_bad: skip images that are listed but missing, and list them in `describe(dataset).skipped`.
        annotation_frame: "stored" if labels refer to the stored pixels of images with an EXIF rotation.

    Raises:
        DatasetError: the folder or its YAML file cannot be used. (Label files are read later, with their images.)
    """
    root = Path(root)
    settings = root if root.is_file() else find_yaml(root)
    problems = Problems(skip_bad)
    part: str | None
    if settings is not None:
        root = settings.parent
        content = _read_yaml(settings)
        if "kpt_shape" in content:
            raise DatasetError(f"{settings} describes keypoints (kpt_shape), not polygons: export segmentation labels.")
        names = _names(content, settings)
        parts = [key for key in content if kind_of_part(str(key)) and content[key]]
        is_whole = len(parts) == 1 and kind_of_part(str(parts[0])) == "train"
        part = None if is_whole else find_part(parts, split, str(settings))
        if part is None and not is_whole:
            raise MissingPartError(f"{settings} has no {split}: name the folder of its images there.")
        images = _listed(content[parts[0] if is_whole else part], _base(content, settings), settings, problems)
        needs_labels = content.get("skip_if_label_file_missing") is True
    else:
        file = next((root / name for name in NAMES_FILES if (root / name).is_file()), root / NAMES_FILES[0])
        names = dict(enumerate(read_labels(file)))
        folders = {path.name: path for path in (root / "images").glob("*/") if kind_of_part(path.name)}
        folders = folders or {path.parent.name: path for path in root.glob("*/images")}
        part = find_part(folders, split, str(root))
        images = list_images(folders[part] if part is not None else root / "images")
        needs_labels = False
    columns: dict[str, list[Any]] = {name: [] for name in (*ROW_FEATURES, "labels")}
    owners: dict[Path, Path] = {}
    for path in images:
        labels = _label_file(path, root)
        if labels is None and needs_labels:
            continue
        if labels is not None and (owner := owners.setdefault(labels, path)) != path:
            problems.add(f"{path} and {owner.name} share the labels {labels.name}: rename one of them, or remove it.")
            continue
        name = path.relative_to(root)
        columns["image"].append(file_source(path))
        columns["file_name"].append(name.as_posix())
        columns["image_id"].append(name.with_suffix("").as_posix())
        columns["labels"].append("" if labels is None else str(labels))
    _warn_of_spare_labels(images, root)
    things = frozenset(range(len(names)) if task == "instance" else ())
    description = Description(
        str(root), task, tuple(names.values()), things, problems.report(str(root)), tuple(names), annotation_frame
    )
    reader = YoloReader(description, {number: index for index, number in enumerate(names)})
    data = lazy_dataset(columns, {**ROW_FEATURES, "labels": datasets.Value("string")}, reader)
    warn_of_boxes(data, reader)
    return data if part is not None else hold_out(data, split, str(root))


def _read_yaml(path: Path) -> dict[Any, Any]:
    text = read_small_text(path, MOST_YAML)
    try:
        content = yaml.load(text, YamlLoader)  # a SafeLoader
    # PyYAML's constructors of tags such as !!int and !!timestamp may raise any of these for a malformed value.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise DatasetError(f"{path} is not YAML{yaml_problem(error)}.") from error
    if not isinstance(content, dict):
        raise DatasetError(f"{path} must have one `name: value` per line, like Ultralytics' data.yaml.")
    return content


def _names(content: Mapping[Any, Any], path: Path) -> dict[int, str]:
    """The name of each class id, ascending."""
    names, count = content.get("names"), content.get("nc")
    if names is None and type(count) is int and 0 < count <= MOST_CLASSES:
        return {number: f"class_{number}" for number in range(count)}
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names:
        raise DatasetError(
            f"{path} does not name its classes: write `names:` with a list, or with one `id: name` per line."
        )
    found: dict[int, str] = {}
    for key, name in names.items():
        number = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10 else key
        if type(number) is not int or not 0 <= number < 2**31 or number in found:
            raise DatasetError(
                f"{path} has the class id {str(key)[:60]!r}, which is not a whole number or occurs twice."
            )
        if type(name) is int:
            name = str(name)
        if not isinstance(name, str) or not name.strip():
            raise DatasetError(f"{path} has the name {str(name)[:60]!r} for class {number}: write it in quotes.")
        found[number] = name.strip()
    first_of: dict[str, int] = {}
    for number, name in found.items():
        if (first := first_of.setdefault(name, number)) != number:
            raise DatasetError(
                f"{path} has the name {name[:60]!r} for the classes {first} and {number}: rename one of them, or merge "
                "them."
            )
    if type(count) is int and isinstance(content.get("names"), list) and count != len(found):
        raise DatasetError(f"{path} says that there are {count} classes (nc), but names {len(found)}.")
    return dict(sorted(found.items()))


def _base(content: Mapping[Any, Any], settings: Path) -> Path:
    """The folder to which the paths in a YAML file are relative: `path`, if it is inside the file's folder.

    A `path` that names a folder elsewhere is not read, which is said in a warning.
    """
    path, folder = content.get("path"), settings.parent
    if not isinstance(path, str) or "\0" in path:
        return folder
    place = Path(os.path.normpath(folder.resolve() / path))
    if own := _own_path(place, folder):
        return own if os.path.isdir(own) else folder
    if os.path.isdir(place) and not os.path.samefile(place, folder):
        logger.warning_once(
            f"{settings} has the path {path!r}, which is outside of {folder} and not read: its images are taken from "
            f"{folder}. If they are those in {place}, put a copy of the file there, without path, and pass that."
        )
    return folder


def _listed(value: Any, base: Path, settings: Path, problems: Problems) -> list[Path]:
    """The images of a part, given as a folder, a text file with one image per line, or a list of these."""
    images: dict[Path, None] = {}
    for entry in value if isinstance(value, list) else [value]:
        place = _inside(entry, base, settings)
        if place.is_dir():
            images.update(dict.fromkeys(list_images(place)))
        elif place.suffix.lower() == ".txt" and place.is_file():
            for line in read_small_text(place).split("\n"):
                if not line.strip():
                    continue
                named = [_inside(line.strip(), folder, place) for folder in (base, place.parent)]
                # CVAT writes `data/` before the paths.
                named += [base.joinpath(*path.relative_to(base).parts[1:]) for path in named[:1]]
                path = next((path for path in named if path.is_file()), None)
                if path is None:
                    problems.add(f"There is no file {base / line.strip()}, which {place} names.")
                else:
                    images[path] = None
        else:
            raise DatasetError(f"There is no folder and no list {place}, which {settings} names.")
    if not images:
        raise DatasetError(f"{settings} names no image that could be used.")
    return list(images)


def _inside(name: Any, base: Path, named_by: Path) -> Path:
    """The path of an untrusted name. Roboflow writes `../train/images` for a folder beside the file."""
    if isinstance(name, str) and "\0" not in name:
        if "\\" in name and not os.path.exists(base / name):  # written on Windows
            name = name.replace("\\", "/")
        path = Path(name)
        if path.is_absolute() and ".." not in path.parts and (own := _own_path(path, base)):
            return own
        if name.startswith("../"):
            name = name[3:]
        elif name.startswith("./"):
            name = name[2:] or "."
    return path_inside(base, name, str(named_by))


def _own_path(path: Path, folder: Path) -> Path | None:
    """The path in a folder of an absolute path, which may name the folder by a link to it; None if it is outside."""
    roots = (folder.resolve(), Path(os.path.abspath(folder)))
    return next((folder / path.relative_to(root) for root in roots if path.is_relative_to(root)), None)


def _label_file(image: Path, root: Path) -> Path | None:
    """The label file of an image, or None: its path with the last `images` replaced by `labels`, or beside it.

    The suffix may be in capitals.
    """
    beside = [image.with_suffix(suffix) for suffix in (".txt", ".TXT")]
    apart = [_in_labels(path, root) for path in beside]
    return next((path for path in (*apart, *beside) if path is not None and path.is_file()), None)


def _in_labels(path: Path, root: Path) -> Path | None:
    """The path with the last folder `images` replaced by `labels`, or None if there is no such folder."""
    parts = list(path.relative_to(root).parts)
    places = [place for place, part in enumerate(parts[:-1]) if part == "images"]
    if not places:
        return None
    parts[places[-1]] = "labels"
    return root.joinpath(*parts)


def _warn_of_spare_labels(images: Iterable[Path], root: Path) -> None:
    """Warns of label files without an image: it may have another name, and then counts as one without objects."""
    for folder in dict.fromkeys(image.parent for image in images):
        labels = _in_labels(folder / "image", root)
        if labels is None or not labels.parent.is_dir():
            continue
        stems = {path.stem for path in folder.iterdir()}
        files = (path for path in labels.parent.glob("[!.]*.[tT][xX][tT]") if path.is_file() and path.stat().st_size)
        spare = sorted(path for path in files if path.stem not in stems)
        if spare:
            number = f"{len(spare)} label files" if len(spare) > 1 else "a label file"
            logger.warning_once(
                f"{labels.parent} has {number} without an image of the same name in {folder}, such as {spare[0].name}: "
                "not used. (An image without a label file counts as one without objects.)"
            )


@dataclass(frozen=True)
class YoloReader(OutlineReader):
    """Reads rows of `load_yolo`.

    Args:
        classes: the class of each id in label files.
    """

    classes: Mapping[int, int]

    @property
    def source_columns(self) -> tuple[str, str]:
        """Label files have no size of their own."""
        return "image", "image"

    def source(self, row: Mapping[str, Any]) -> str:
        """The label file."""
        return row["labels"]

    def objects(self, row: Mapping[str, Any], height: int, width: int) -> list[dict[str, Any]]:
        """The objects in the label file of a row."""
        if not row["labels"]:
            return []
        path = Path(row["labels"])
        found: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(read_small_text(path).split("\n"), 1):
            words = line.split()
            if not words:
                continue
            key = " ".join(words)  # Ultralytics drops repeated lines
            found.setdefault(key, {**self._object(words, f"{path}: line {number}", height, width),
                                   "name": f"line {number}"})  # fmt: skip
        return list(found.values())

    def _object(self, words: list[str], where: str, height: int, width: int) -> dict[str, Any]:
        try:
            numbers = [float(word) for word in words]
        except ValueError:
            raise DatasetError(f"{where} has something other than numbers: {' '.join(words)[:60]!r}.") from None
        label = self.classes.get(int(numbers[0])) if math.isfinite(numbers[0]) and numbers[0] % 1 == 0 else None
        if label is None:
            raise DatasetError(f"{where} has the class {words[0][:20]!r}, which is none of the data's.")
        if 5 <= len(words) <= LONGEST_BOX:
            raise DatasetError(
                f"{where} is a box (class, center, size), not a polygon: export the data as segmentation labels."
            )
        if len(words) <= LONGEST_BOX or len(words) % 2 == 0:
            raise DatasetError(f"{where} has {len(words) - 1} numbers after the class, not three or more x y pairs.")
        for word, number in zip(words[1:], numbers[1:], strict=True):
            if not -OUTSIDE <= number <= 1 + OUTSIDE:
                raise DatasetError(
                    f"{where} has the coordinate {word[:20]}: corners are fractions of the image's sides, from 0 to 1."
                )
        corners = [number * (height if place % 2 else width) for place, number in enumerate(numbers[1:])]
        return {"class": label, "crowd": False, "area": None, "segmentation": [corners]}


def has_labels(root: Path) -> bool:
    """Whether a folder without a YAML file has YOLO's class names and label files."""
    if not any((root / name).is_file() for name in NAMES_FILES):
        return False
    return any(next(folder.rglob("*.[tT][xX][tT]"), None) for folder in [root / "labels", *root.glob("*/labels")])


__all__ = ["find_yaml", "has_labels", "load_yolo"]

"""Roboflow's export "Semantic Segmentation Masks": semantic segmentation.

    train/a.jpg   train/a_mask.png   train/_classes.csv     and the same in valid and test, or all in one folder

_classes.csv names the value of each class in the masks, which have one channel:

    Pixel Value, Class
    0, background
    1, cat

Values may have gaps and be in any order; the classes are numbered in the order of their values. A class whose name is
in `NO_CLASS`, such as `void`, is none. Parts may use different values for the same classes: each part is read by its
own file, and the classes are numbered as in the training part.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from transformers.utils import logging

from ...errors import DatasetError, MissingPartError
from ...masks import ROBOFLOW_CLASSES as CLASSES_FILE
from ...masks import ROBOFLOW_END as END
from ..dataset import ROW_FEATURES, Description, Problems, find_part, hold_out, kind_of_part, lazy_dataset
from ..files import AnnotationFrame, Source, file_source, list_images, read_map, read_small_text, source_name
from ..item import WHITE, index_values
from .maps import NO_CLASS, IgnoredWhiteError, Segments, SemanticMapReader, refuse_ignored_white, table_of

logger = logging.get_logger(__name__)

HEADER = "pixel value"


def find_parts(root: Path) -> dict[str, Path]:
    """The subfolders with masks or their classes, by name."""
    folders = [path for path in sorted(root.glob("*/")) if not path.name.startswith(".")]
    return {path.name: path for path in folders if (path / CLASSES_FILE).is_file() or _has_masks(path)}


def find_classes(root: Path) -> Path | None:
    """A file of classes beside masks, in a folder or one of its subfolders; None if there is none.

    Roboflow's export for classification has a file of the same name, but it lists images.
    """
    files = (path / CLASSES_FILE for path in (root, *sorted(root.glob("*/"))))
    return next((path for path in files if _is_of_values(path) and _has_masks(path.parent)), None)


def _is_of_values(path: Path) -> bool:
    """Whether a file's first line is a header of values, or a value."""
    try:
        first = read_small_text(path).lstrip().split(",", 1)[0] if path.is_file() else ""
    except DatasetError:
        return False
    return first.strip().lower() == HEADER or first.strip().isdecimal()


def _has_masks(folder: Path) -> bool:
    names = (path.name.lower() for path in folder.iterdir() if not path.name.startswith("."))
    return any(name.endswith(f"{END}.png") for name in names)


def load_roboflow_masks(
    root: str | Path,
    split: str = "train",
    *,
    ignore_index: int | None = 255,
    skip_bad: bool = False,
    annotation_frame: AnnotationFrame | None = None,
) -> datasets.Dataset:
    """Loads Roboflow's export of semantic masks.

    Args:
        root: the folder with train, valid and test, or with all images.
        split: "train", "val" or "test" (a folder `valid` is "val"); also "all" if the data has no parts.
        ignore_index: the value of pixels without a class, unless a class has it; None if there is none.
        skip_bad: skip images without a mask, and list them in `describe(dataset).skipped`.
        annotation_frame: as in `load_folder`.

    Raises:
        DatasetError: a folder or its classes are missing or unusable, two parts have different classes, or an image has
            no mask.
    """
    root, problems = Path(root), Problems(skip_bad)
    parts = find_parts(root)
    own = find_part(parts, split, str(root))
    if own is not None:
        folder = parts[own]
    elif len(parts) == 1 and not (root / CLASSES_FILE).is_file():
        (folder,) = parts.values()
    elif parts and not (root / CLASSES_FILE).is_file():
        raise MissingPartError(
            f"{root} has no part {split!r} with masks and {CLASSES_FILE}, but {', '.join(sorted(parts))}: rename them "
            "to train and val, or pass --split (evaluate) or --train-split and --eval-split (train)."
        )
    else:
        folder = root
    values = read_classes(folder / CLASSES_FILE)
    if ignore_index not in (None, WHITE) and values.get(ignore_index, "void").lower() not in NO_CLASS:
        raise DatasetError(
            f"{folder / CLASSES_FILE} names the value {ignore_index}, which is to be ignored (ignore_index), "
            f"{values[ignore_index][:60]!r}: name it `void` there, or leave the option out."
        )
    of_training = next((path for name, path in parts.items() if own and kind_of_part(name) == "train"), folder)
    labels = _labels(values)
    if of_training != folder and (of_training / CLASSES_FILE).is_file():
        labels = _labels(read_classes(of_training / CLASSES_FILE))
        if different := {*labels} ^ {*_labels(values)}:
            raise DatasetError(
                f"{folder / CLASSES_FILE} and {of_training / CLASSES_FILE} have different classes, such as "
                f"{min(different)!r}, which only one of them names: export all parts with the same classes."
            )
    if not labels:
        raise DatasetError(f"{folder / CLASSES_FILE} names no class.")
    classes = {} if ignore_index is None else {ignore_index: -1}
    classes |= {value: labels.index(name) if name in labels else -1 for value, name in values.items()}
    columns = _columns(folder, problems)
    report = problems.report(str(root))
    description = Description(str(root), "semantic", labels, skipped=report, annotation_frame=annotation_frame)
    reader = RoboflowMaskReader(description, classes, str(folder / CLASSES_FILE))
    data = lazy_dataset(columns, {**ROW_FEATURES, "annotation": ROW_FEATURES["image"]}, reader)
    # A small part for validation may have no object.
    if WHITE not in values and (own is None or kind_of_part(own) == "train"):
        try:
            refuse_ignored_white(data, reader.values, ignore_index, False)
        except IgnoredWhiteError as error:
            raise DatasetError(
                f"The masks in {folder} have no values but 0 and {WHITE}, and {WHITE} is ignored (ignore_index), "
                f"because {CLASSES_FILE} does not name it: if it is a class, write {WHITE} there as its Pixel Value."
            ) from error
    return data if own is not None else hold_out(data, split, str(root))


def _labels(values: Mapping[int, str]) -> tuple[str, ...]:
    return tuple(name for name in values.values() if name.lower() not in NO_CLASS)


def read_classes(path: Path) -> dict[int, str]:
    """Reads _classes.csv: the name of each value in masks, by ascending value, 0 to 255.

    A name is what follows the first comma, and may contain commas, also in quotes. The header may be missing.

    Raises:
        DatasetError: the file is missing, a line has no value or no name, or a value or a name occurs twice.
    """
    found: dict[int, str] = {}
    is_first = True
    for number, line in enumerate(read_small_text(path).split("\n"), 1):
        if not line.strip():
            continue
        first, _, rest = line.partition(",")
        value, name, may_be_header = first.strip(), _unquoted(rest.strip()), is_first
        is_first = False
        if may_be_header and value.lower() == HEADER:
            continue
        where = f"{path} has in line {number} "
        if not re.fullmatch(r"[0-9]{1,9}", value) or not name:
            expected = "`Pixel Value, Class`" if may_be_header else "a value and a class, such as `1, cat`"
            raise DatasetError(f"{where}{line.strip()[:60]!r}: write {expected} there.")
        if int(value) > WHITE:
            raise DatasetError(f"{where}the value {value}, but masks have values from 0 to {WHITE}: correct it.")
        if int(value) in found:
            raise DatasetError(f"{where}the value {value} a second time: one value stands for one class.")
        if name in found.values():
            raise DatasetError(
                f"{where}the class {name[:60]!r} a second time: rename it, or merge its values in masks."
            )
        found[int(value)] = name
    if not found:
        raise DatasetError(f"{path} names no class: write `Pixel Value, Class`, and a line such as `1, cat` for each.")
    return dict(sorted(found.items()))


def _unquoted(name: str) -> str:
    is_quoted = len(name) > 1 and name.startswith('"') and name.endswith('"')
    return name[1:-1].replace('""', '"').strip() if is_quoted else name


def _columns(folder: Path, problems: Problems) -> dict[str, list[Any]]:
    """The columns of the images in a folder, without its subfolders, and their masks."""
    files = [path for path in list_images(folder) if path.parent == folder]
    masks = {path.stem: path for path in files if path.stem.endswith(END) and path.suffix.lower() == ".png"}
    # `face_mask.png` is an image if it has a mask itself, `face_mask_mask.png`.
    alone = {path for path in masks.values() if path.stem + END not in masks}
    images = [path for path in files if path not in alone]
    columns: dict[str, list[Any]] = {name: [] for name in (*ROW_FEATURES, "annotation")}
    owners: dict[Path, Path] = {}
    for path in images:
        mask = masks.get(path.stem + END)
        if mask is None:
            problems.add(f"{path} has no mask: there is no file {path.stem}{END}.png beside it.")
            continue
        if (owner := owners.setdefault(mask, path)) != path:
            problems.add(f"{path} and {owner.name} share the mask {mask.name}: rename one of them.")
            continue
        columns["image"].append(file_source(path))
        columns["annotation"].append(file_source(mask))
        columns["file_name"].append(path.name)
        columns["image_id"].append(path.stem)
    spare = sorted(alone - owners.keys())
    if spare:
        number = f"{len(spare)} masks" if len(spare) > 1 else "a mask"
        logger.warning_once(
            f"{folder} has {number} without an image of the same name, such as {spare[0].name}: not used."
        )
    return columns


@dataclass(frozen=True)
class RoboflowMaskReader(SemanticMapReader):
    """Reads masks of classes by Roboflow's file of classes.

    Args:
        classes: the class of each value, -1 for none; a mask with any other value is rejected.
        table: the file of classes, for messages.
        image, annotation: names of the columns.
    """

    table: str

    def segments(self, source: Source, height: int, width: int) -> Segments:
        """One segment for each class in the mask."""
        values, places = index_values(read_map(source, height, width))
        unknown = [value for value in values if value not in self.classes]
        if unknown:
            more = f" and {len(unknown) - 1} other{'s' if len(unknown) > 2 else ''}" if len(unknown) > 1 else ""
            raise DatasetError(
                f"{source_name(source)} has the value {unknown[0]}{more}, which {self.table} does not name: add it "
                "there, or, if it is not a class, as `void`."
            )
        return table_of([self.classes[value] for value in values], places)


__all__ = ["find_classes", "find_parts", "load_roboflow_masks", "read_classes"]

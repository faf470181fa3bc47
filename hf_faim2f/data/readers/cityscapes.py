"""Cityscapes (Cordts et al., CVPR 2016): 19 classes of street scenes, semantic, instance or panoptic.

    leftImg8bit/val/frankfurt/frankfurt_000000_000294_leftImg8bit.png
    gtFine/val/frankfurt/frankfurt_000000_000294_gtFine_labelIds.png       the label id of each pixel, 0..33
    gtFine/val/frankfurt/frankfurt_000000_000294_gtFine_instanceIds.png    1000 * label id + number for an instance
    gtFine/val/frankfurt/frankfurt_000000_000294_gtFine_labelTrainIds.png  if the official scripts created it

The classes are the train ids of the official scripts (cityscapesscripts, helpers/labels.py); labels that the official
evaluation ignores have no class. Eight classes (people and vehicles) have instances; in the task "instance" these are
0..7. Pixels of such a class without an instance (a group of cars) are a crowd, as in the official panoptic format.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch

from ...errors import DatasetError
from ...family.presets import CITYSCAPES_CLASSES as CLASSES
from ...family.presets import CITYSCAPES_FIRST_THING as FIRST_THING
from ..dataset import ROW_FEATURES, Description, Problems, Task, lazy_dataset
from ..files import Source, file_source, read_header, read_map, source_name
from ..item import index_values
from .maps import MapReader, Segments, SemanticMapReader, class_of_value

NUM_LABEL_IDS = 34
TRAIN_ID = {label_id: train_id for train_id, label_id in enumerate(CLASSES)}
IMAGE_END = "_leftImg8bit.png"


def load_cityscapes(
    root: str | Path, split: str = "val", task: Task = "semantic", skip_bad: bool = False
) -> datasets.Dataset:
    """Loads Cityscapes' finely annotated images.

    Args:
        root: the folder with leftImg8bit and gtFine.
        split: "train" or "val"; the maps of "test" are empty.
        task: "semantic" and "panoptic" have 19 classes, "instance" has 8.
        skip_bad: skip images without a map, and list them in `describe(dataset).skipped`.

    Raises:
        DatasetError: a folder is missing, or an image has no map.
    """
    labels = tuple(CLASSES.values())
    things = frozenset(range(FIRST_THING, len(labels)))
    if task == "instance":
        labels = labels[FIRST_THING:]
        things = frozenset(range(len(labels)))
    root, problems = Path(root), Problems(skip_bad)
    ends = ("labelIds", "labelTrainIds") if task == "semantic" else ("instanceIds",)
    columns = _columns(root, split, ends, problems)
    name = f"Cityscapes ({split})"
    description = Description(name, task, labels, things if task != "semantic" else frozenset(), problems.report(name))
    features = {**ROW_FEATURES, "annotation": ROW_FEATURES["image"]}
    reader = CityscapesSemanticReader if task == "semantic" else CityscapesInstanceReader
    return lazy_dataset(columns, features, reader(description))


def official_truth(root: str | Path, split: str) -> dict[str, Path]:
    """The `*_gtFine_labelIds.png` files by image id, for images that also have a `*_gtFine_instanceIds.png`."""
    found = {}
    for path in sorted((Path(root) / "gtFine" / split).glob("*/*_gtFine_labelIds.png")):
        if path.with_name(path.name.replace("labelIds", "instanceIds")).is_file():
            found[path.name.removesuffix("_gtFine_labelIds.png")] = path
    return found


def _columns(root: Path, split: str, ends: tuple[str, ...], problems: Problems) -> dict[str, list[Any]]:
    images, maps = root / "leftImg8bit" / split, root / "gtFine" / split
    for folder in (images, maps):
        if not folder.is_dir():
            raise DatasetError(f"There is no folder {folder}. Cityscapes' root has leftImg8bit and gtFine.")
    columns: dict[str, list[Any]] = {name: [] for name in (*ROW_FEATURES, "annotation")}
    for path in sorted(images.glob(f"*/*{IMAGE_END}")):
        stem = path.name[: -len(IMAGE_END)]
        candidates = [maps / path.parent.name / f"{stem}_gtFine_{end}.png" for end in ends]
        found = next((candidate for candidate in candidates if candidate.is_file()), None)
        if found is None:
            problems.add(f"{path} has no map: there is no file {candidates[0]}.")
            continue
        if _is_turned(path):
            problems.add(f"{path} has an EXIF orientation, which no image of Cityscapes has: save it upright.")
            continue
        columns["image"].append(file_source(path))
        columns["annotation"].append(file_source(found))
        columns["file_name"].append(f"{path.parent.name}/{path.name}")
        columns["image_id"].append(stem)
    return columns


def _is_turned(path: Path) -> bool:
    """Whether an image has an EXIF orientation, which the official evaluation (cityscapesscripts) ignores."""
    try:
        return read_header(file_source(path))[0] != 1
    except DatasetError:  # raised when the image is read
        return False


@dataclass(frozen=True)
class CityscapesSemanticReader(MapReader):
    """Reads maps of label ids or train ids, depending on the file name."""

    def segments(self, source: Source, height: int, width: int) -> Segments:
        """One segment for each class in the map."""
        if source_name(source).endswith("TrainIds.png"):
            classes = class_of_value(len(CLASSES))
        else:
            classes = {label_id: TRAIN_ID.get(label_id, -1) for label_id in range(NUM_LABEL_IDS)}
        return SemanticMapReader(self.description, classes).segments(source, height, width)


@dataclass(frozen=True)
class CityscapesInstanceReader(MapReader):
    """Reads maps of instance ids; includes stuff if the task is "panoptic"."""

    def segments(self, source: Source, height: int, width: int) -> Segments:
        """One segment for each instance in the map and, for the task "panoptic", for each stuff class."""
        values, places = index_values(read_map(source, height, width))
        classes: list[int] = []
        crowd: list[bool] = []
        table = torch.full((len(values),), -1, dtype=torch.int32)
        for place, value in enumerate(values):
            label_id = value if value < 1000 else value // 1000
            if not 0 <= label_id < NUM_LABEL_IDS:
                raise DatasetError(f"{source_name(source)} has the value {value}, which is not an id of Cityscapes.")
            label = TRAIN_ID.get(label_id, -1)
            is_thing = label >= FIRST_THING
            if self.description.task == "instance":
                label = label - FIRST_THING if is_thing else -1
            if label < 0:
                continue
            table[place] = len(classes)
            classes.append(label)
            crowd.append(is_thing and value < 1000)
        return Segments(places, table, classes, crowd)

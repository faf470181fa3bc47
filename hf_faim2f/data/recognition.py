"""Recognizes the format of data by its files: what `--format auto` takes a folder for, and why."""

import re
from pathlib import Path
from typing import NamedTuple

from ..errors import DatasetError
from .dataset import kind_of_part
from .formats import DataSource
from .readers import camvid, coco_export, labelme, voc, yolo
from .readers.folder import LABELS_FILE
from .readers.palette import PALETTE_FILES, is_palette

AUTO = "auto"
FILES = {".yaml": "yolo", ".yml": "yolo", ".json": "coco", ".parquet": "hub"}


class Recognized(NamedTuple):
    """A format and why the data is taken for it.

    Args:
        format: name of the format.
        reason: what the data has, to follow "it has".
    """

    format: str
    reason: str


def recognize(source: DataSource) -> Recognized:
    """The format of data.

    Raises:
        DatasetError: there is no such data, or it could have several formats, or none; the message says what was found.
    """
    if source.annotations:
        return Recognized("coco", "a file of annotations, by --annotations")
    if not source.root:
        raise DatasetError("There is no data: name a folder, file or Hub id by --data, or pass --format digits.")
    root = Path(source.root)
    if root.is_file():
        if root.suffix.lower() in FILES:
            return Recognized(FILES[root.suffix.lower()], f"the suffix {root.suffix}")
        raise DatasetError(f"{root} is a file of no known format ({', '.join(FILES)}): name the folder of the data.")
    if not root.is_dir():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", source.root) and not root.parent.is_dir():
            return Recognized("hub", "the form of a Hub id, and no folder has its name")
        raise DatasetError(f"There is no folder {root}.")
    found = _candidates(root, source.palette is not None)
    if len(found) == 1:
        return found[0]
    if found:
        each = ", and ".join(f"{one.reason} ({one.format})" for one in found)
        raise DatasetError(f"{root} could have several formats, because it has {each}: choose one with --format.")
    raise DatasetError(f"{root} has none of the known formats{_half_known(root)}; pass --format, or see the docs.")


def _candidates(root: Path, has_palette: bool) -> list[Recognized]:
    """Every format that a folder may have."""
    found = []
    if file := yolo.find_yaml(root):
        found.append(Recognized("yolo", file.name))
    elif yolo.has_labels(root):
        found.append(Recognized("yolo", "class names and text files in labels"))
    inner = root / "ADEChallengeData2016"
    if any((place / "annotations" / "training").is_dir() for place in (root, inner)):
        found.append(Recognized("ade20k", "annotations/training"))
    if (root / "leftImg8bit").is_dir() and (root / "gtFine").is_dir():
        found.append(Recognized("cityscapes", "leftImg8bit and gtFine"))
    for kind in ("instance", "panoptic"):
        name = f"{kind}{'s' * (kind == 'instance')}_train2017.json"
        if (root / "annotations" / name).is_file() and (root / "train2017").is_dir():
            found.append(Recognized(f"coco-{kind}", f"annotations/{name} and train2017"))
    if not any(one.format == "coco-instance" for one in found):
        documents = coco_export.find_documents(root)
        if documents:
            path = next(iter(documents.values()))
            found.append(Recognized("coco", f"{path.relative_to(root).as_posix()} with COCO's annotations"))
    if place := voc.find_root(root):
        found.append(Recognized("voc", f"{(place / voc.CLASSES).relative_to(root).as_posix()} and {voc.IMAGES}"))
    if parts := camvid.find_parts(root):
        folder = next(iter(parts.values()))[1]
        found.append(Recognized("camvid", f"{folder.name} beside {next(iter(parts))}"))
    if masks := _masks(root):
        colors = next((name for name in PALETTE_FILES if is_palette(root / name)), None)
        where = f"images and {masks}"
        if has_palette or colors:
            found.append(Recognized("colors", f"{where}, and a palette{'' if has_palette else f' in {colors}'}"))
        else:
            found.append(Recognized("folder", where))
    if not found and labelme.find_files(root):
        found.append(Recognized("labelme", "labelme's JSON files"))
    if not found and any(root.rglob("*.parquet")):
        found.append(Recognized("hub", "Parquet files"))
    return found


def _masks(root: Path) -> str | None:
    """The path of masks beside images, in one of the layouts of the format "folder"."""
    if (root / "images").is_dir() and (root / "masks").is_dir():
        return "masks"
    for part in sorted(root.glob("*/")):
        if kind_of_part(part.name) and (part / "images").is_dir() and (part / "masks").is_dir():
            return f"masks in {part.name}"
    return None


def _half_known(root: Path) -> str:
    """What a folder has of a known format, and what it lacks."""
    if (root / "images").is_dir():
        if (root / "labels").is_dir():
            return ": it has images and labels, but no data.yaml or classes.txt with the class names (yolo)"
        return ": it has images, but neither masks nor labels nor a JSON file of annotations"
    if (root / voc.IMAGES).is_dir():
        return f": it has {voc.IMAGES}, but no {voc.CLASSES} (boxes alone do not do)"
    if (root / LABELS_FILE).is_file():
        return f": it has {LABELS_FILE}, but no folders images and masks"
    names = sorted(path.name for path in root.iterdir() if not path.name.startswith("."))[:6]
    return f": it has {', '.join(names)}" if names else ": it is empty"


__all__ = ["AUTO", "Recognized", "recognize"]

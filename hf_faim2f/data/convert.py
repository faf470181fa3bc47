"""Converts a dataset to the layout of COCO or YOLO, or to a folder of masks, and counts what is lost."""

import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import numpy as np

from ..files import new_folder
from ..model.channels_faim2f import picture_of
from ..model.image_bands_faim2f import ARRAY_SUFFIXES, NPY_MAGIC, TIFF_MAGICS
from ..model.image_files_faim2f import open_image
from .annotations import AnnotationFolder, Mark, image_suffix, mark_of, trace, void_of
from .counts import check_same_labels, number_of
from .dataset import from_rows, kind_of_part, reader_of, source_of
from .files import path_inside
from .formats import OpenData
from .item import WHITE, Item, segment_mask
from .readers.labelme import embedded_image

# Suffixes of images without a file name, by Pillow's name of the format.
SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "PPM": ".ppm", "JPEG2000": ".jp2"}


def convert_data(
    parts: Mapping[str, OpenData], out: Path, form: str, after_each: Callable[[], object] = lambda: None
) -> list[str]:
    """Writes a dataset in another layout. If this fails, no folder is left.

    Args:
        parts: the parts, by the names of their folders.
        out: a folder that does not exist, or is empty.
        form: one of `data.annotations.TARGETS`.
        after_each: called after each image.

    Returns:
        Sentences about what the layout cannot represent, and about a setting that is needed to read it.

    Raises:
        DatasetError: an image or its annotations cannot be read, or the parts have different classes.
        OSError: the folder cannot be written.
    """
    first = next(iter(parts.values())).description
    for data in parts.values():
        check_same_labels(first, data.description)
    lost: Counter[str] = Counter()
    with new_folder(out) as folder:
        writer = AnnotationFolder(
            folder, form, first.labels, first.things, first.category_ids, instances=first.task == "instance"
        )
        for part, data in parts.items():
            names: set[str] = set()
            source = _sources(data.items)
            for index in range(len(data.items)):
                item = data.items[index]
                content, suffix = source(index, item)
                numbered = _marks(item, visible=form == "masks")
                marks = list(numbered.values())
                name = _name(item["file_name"], first.name, part, names)
                _count_lost(lost, form, item, marks, first.things, first.task)
                if form != "masks" and item["hidden"] is not None:
                    lost["reordered"] += _reordered(item, numbered)
                if form != "coco":
                    marks = [mark for mark in marks if not mark.crowd]
                writer.add(index, name, content, suffix, (item["height"], item["width"]), marks, part)
                after_each()
        writer.finish()
    notes = [sentence.format(number_of(lost[key], unit)) for key, (unit, sentence) in LOST.items() if lost[key]]
    if form == "masks" and first.task == "instance":
        notes.append("The masks are of instances: read the folder with --task instance.")
    elif form == "masks" and (void := void_of(len(first.labels))) != WHITE:
        classes = "is only one class" if len(first.labels) == 1 else f"are {len(first.labels)} classes"
        notes.append(
            f"The masks have 16 bits, because there {classes}, and {void} means no class: read the folder with "
            f"--ignore-index {void}."
        )
    return notes


# What may be lost: the unit in which it is counted, and the sentence for the user.
LOST = {
    "vanished": ("segment", "Left out, because they have no visible pixel: {}."),
    "crowds": ("crowd", "Left out, because only COCO's format has crowds: {}."),
    "stuff": ("segment", "Written as objects, because the format has no stuff: {}."),
    "repeated": ("object", "Lost, because readers drop lines that repeat the class and outline of another: {}."),
    "merged": ("segment", "Merged with others of their class, because a semantic mask has no objects: {}."),
    "covered": ("pixel", "Lost, because a mask stores only the topmost of overlapping segments: {}."),
    "reordered": ("pixel", "Covered by a smaller segment when read back, because readers put that on top: {}."),
    "void": ("image", "The format cannot mark pixels without a class, so they become background, in {}."),
    "slits": (
        "object",
        "Written as one polygon with connecting lines, because of holes or several parts: {}. Ultralytics draws "
        "these lines one pixel wide.",
    ),
}


def _marks(item: Item, visible: bool) -> dict[int, Mark]:
    """The segments of an item that have pixels, by number, from the lowest to the topmost: crowds, then large to small.

    Args:
        item: the item.
        visible: only their pixels that no other segment covers.
    """
    found = {  # one full mask at a time, because an image may have hundreds of segments
        number: mark_of((item["segments"] == number if visible else segment_mask(item, number)).numpy(), label, crowd)
        for number, (label, crowd) in enumerate(zip(item["classes"].tolist(), item["crowd"].tolist(), strict=True))
    }
    marks = [(number, mark) for number, mark in found.items() if mark is not None]
    return dict(sorted(marks, key=lambda pair: (not pair[1].crowd, -int(pair[1].crop.sum()))))


def _reordered(item: Item, marks: Mapping[int, Mark]) -> int:
    """The number of pixels that show another segment if the segments are painted in the order of `marks`."""
    painted = np.full((item["height"], item["width"]), -1)
    for number, (_, crop, (left, top, right, bottom), *_) in marks.items():
        painted[top : bottom + 1, left : right + 1][crop] = number
    return int((painted != item["segments"].numpy()).sum())


def _count_lost(
    lost: Counter[str], form: str, item: Item, marks: Sequence[Mark], things: frozenset[int], task: str
) -> None:
    """Counts what a format cannot represent of an item, in `lost`."""
    lost["vanished"] += len(item["classes"]) - len(marks)
    kept = [mark for mark in marks if not mark.crowd]
    if form != "coco":
        lost["crowds"] += len(marks) - len(kept)
    if form == "masks":
        if task == "panoptic":
            lost["merged"] += len(kept) - len({mark.label for mark in kept})
        if item["hidden"] is not None:
            lost["covered"] += int((item["hidden"] >= 0).sum())
        return
    lost["stuff"] += sum(mark.label not in things for mark in kept)
    if task != "instance":
        lost["void"] += bool((item["segments"] < 0).any())
    if form == "yolo":
        lost["repeated"] += len(kept) - len({(mark.label, mark.box, mark.crop.tobytes()) for mark in kept})
        lost["slits"] += sum(_has_slit(mark) for mark in kept)


def _has_slit(mark: Mark) -> bool:
    """Whether the outline of a mark has connecting lines, because of holes or several parts."""
    outlines = trace(mark.crop)
    return len(outlines) > 1 or len(set(outlines[0])) < len(outlines[0])


def _sources(items: Sequence[Item]) -> Callable[[int, Item], tuple[bytes, str]]:
    """The contents and the suffix of an image's file, by index; a PNG for synthetic images."""
    if not isinstance(items, datasets.Dataset):
        return lambda index, item: (_png(item), ".png")
    reader = reader_of(items)  # has read each image before, and rejected files outside of the dataset
    sources = from_rows(items, lambda row: _content(source_of(row[reader.source_columns[0]])))
    return lambda index, item: sources(index)


def _content(source: Mapping[str, Any]) -> tuple[bytes, str]:
    path = str(source.get("path") or "")
    if source.get("bytes") is None and path.lower().endswith(".json"):
        source = embedded_image(Path(path))
    data = source.get("bytes")
    if data is None:
        return Path(path).read_bytes(), image_suffix(path)
    if data.startswith(NPY_MAGIC):
        return data, ARRAY_SUFFIXES[0]
    if data[:4] in TIFF_MAGICS:  # Pillow does not open those of many bands
        return data, ".tif"
    with open_image(io.BytesIO(data)) as image:
        kind = str(image.format)
    return data, SUFFIXES.get(kind, f".{kind.lower()}")


def _png(item: Item) -> bytes:
    file = io.BytesIO()
    picture_of(item["image"]).save(file, "PNG")
    return file.getvalue()


def _name(file_name: str, data: str, part: str, names: set[str]) -> PurePosixPath:
    """A relative path for an image, without suffix, that is not in `names` yet; adds it there.

    The source's own leading folders `images`, `images/PART` and `PART/images` are dropped, because the layouts add
    theirs.
    """
    path_inside(Path("."), file_name, data)
    own = PurePosixPath(file_name.replace("\\", "/")).with_suffix("")
    folders = [_kind(folder, part) for folder in own.parts[:-1]]
    if set(folders[:2]) == {"images", "part"}:
        own = PurePosixPath(*own.parts[2:])
    elif folders[:1] == ["images"]:
        own = PurePosixPath(*own.parts[1:])
    name, number = own, 1
    while str(name).casefold() in names:
        number += 1
        name = own.with_name(f"{own.name}-{number}")
    names.add(str(name).casefold())
    return name


def _kind(folder: str, part: str) -> str | None:
    """Whether a folder of the source is "images", or the "part", such as `train2017` for `train`; else None."""
    name = folder.casefold()
    if name == "images":
        return name
    is_word = name.rstrip("0123456789").isalpha()  # not `train-station`
    is_part = is_word and kind_of_part(name) == kind_of_part(part) is not None
    return "part" if is_part or name == part.casefold() else None


__all__ = ["convert_data"]

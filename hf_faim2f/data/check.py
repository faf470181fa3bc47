"""Checks a whole dataset: reports the contents of its parts, and problems.

Every image is read once, with its annotations. `faim2f train` only runs `shared_images`, which compares files.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow

from ..errors import DatasetError, MissingPartError, UnusableImageError
from ..files import files_below, sha256_of
from ..masks import MAP_FOLDERS
from ..model.image_bands_faim2f import ARRAY_SUFFIXES
from ..model.image_loading_faim2f import IMAGE_SUFFIXES
from .collate import UnlabelledImages
from .counts import check_same_labels, number_of
from .dataset import frames_of, from_rows, reader_of
from .formats import DataSource, OpenData, find_format, open_data
from .item import Item, count_segments
from .readers.outlines import OutlineReader

# The kinds of findings, and their meanings.
KINDS = {
    "missing": "a split, an image or its annotations that are missing or invalid",
    "unreadable": "an image or its annotations that cannot be read, such as a mask of another size",
    "empty": "an image without a segment",
    "shared": "an image that is in two splits",
    "repeated": "an image that is in one split twice",
    "absent": "a class that no image of a split contains",
    "outside": "a polygon or a box that leaves its image",
    "vanished": "an object that covers no pixel",
    "stored": "annotations that refer to stored pixels, which the EXIF orientation rotates",
    "unclear": "annotations that may refer to the upright image or to its stored pixels",
}
# Limits of the comparison of files in two parts: bytes to read in total, and files of each part.
MOST_HASHED = 1 << 30
MOST_COMPARED = 50_000
# Most files named in a sentence.
MOST_NAMED = 5
# How many images of each class are kept to be drawn.
MOST_DRAWN = 8
# Formats whose data may be undivided, and those that may have a test part.
UNDIVIDED = ("folder", "colors", "yolo", "coco", "labelme", "supervisely", "roboflow-masks", "voc", "camvid")
TESTED = (*UNDIVIDED, "hub", "coco-panoptic")


@dataclass(frozen=True)
class Finding:
    """A problem of a dataset.

    Args:
        kind: one of `KINDS`.
        part: the name of the part.
        text: a sentence for the user.
    """

    kind: str
    part: str
    text: str


@dataclass
class PartReport:
    """The contents of one part of a dataset.

    Args:
        images: number of images that could be read.
        sizes: number of images of each (height, width).
        pixels, segments, pictures: for each class the number of pixels, segments and images, (number of classes,);
            crowds are not counted.
        crowds: number of crowds.
        unlabelled: number of pixels in no segment.
        largest: for each class, the images of which it covers the largest fractions: (fraction, index), in descending
            order, at most `MOST_DRAWN`.
    """

    images: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    segments: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    pictures: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    crowds: int = 0
    unlabelled: int = 0
    largest: dict[int, list[tuple[float, int]]] = field(default_factory=dict)


@dataclass
class Report:
    """The result of `check_data`.

    Args:
        labels: class names.
        task: the data's task.
        parts: the report of each part.
        findings: the problems.
    """

    labels: tuple[str, ...]
    task: str
    parts: dict[str, PartReport]
    findings: list[Finding]


def open_parts(format_name: str, source: DataSource) -> tuple[dict[str, OpenData], list[Finding]]:
    """Opens all parts of a dataset: "all" if it is not divided; otherwise training, validation and a test part, if any.

    Args:
        format_name: name of the format.
        source: the location of the data.

    Returns:
        The parts that can be opened, by name, and findings about those that are missing.

    Raises:
        DatasetError: no part can be opened, or an existing part has images that cannot be used.
    """
    row = find_format(format_name)
    is_own = source.splits == (None, None)
    if is_own and (row.name in UNDIVIDED or Path(source.root).is_file()):
        try:
            return {"all": open_part(format_name, source, "all")}, []
        except DatasetError:
            pass  # it is divided, or cannot be used
    parts: dict[str, OpenData] = {}
    findings: list[Finding] = []
    failures: list[DatasetError] = []
    for name in dict.fromkeys(source.splits[place] or row.splits[place] for place in (0, 1)):
        try:
            parts[name] = open_part(format_name, source, name)
        except UnusableImageError:
            raise  # the part exists: reporting it as missing would hide the reason
        except DatasetError as error:
            failures.append(error)
            findings.append(Finding("missing", name, str(error)))
    if not parts:
        raise failures[0]
    if is_own and row.name in TESTED:
        try:
            parts["test"] = open_part(format_name, source, "test")
        except UnusableImageError:
            raise
        except MissingPartError:
            pass  # optional
        except DatasetError as error:
            findings.append(Finding("missing", "test", str(error)))
    return parts, findings


def open_part(format_name: str, source: DataSource, split: str) -> OpenData:
    """Opens one part of a dataset.

    Args:
        format_name: name of the format.
        source: the location of the data.
        split: the format's own name of the part.

    Raises:
        DatasetError: there is no such part, or it cannot be used.
    """
    return open_data(format_name, replace(source, splits=(split, None)), "train")


def check_data(
    parts: Mapping[str, OpenData],
    findings: Sequence[Finding] = (),
    most: int | None = None,
    frame_is_known: bool = False,
    after_each: Callable[[], object] = lambda: None,
) -> Report:
    """Reads a dataset, and reports its contents and problems.

    Args:
        parts: from `open_parts`.
        findings: problems that are already known, from `open_parts`.
        most: maximum number of images to read of each part, evenly spaced; classes are absent only if None, for all.
        frame_is_known: whether the user chose an `annotation_frame`, so that annotations of unclear frame are not
            reported.
        after_each: called after each image.

    Raises:
        DatasetError: the parts have different classes.
    """
    first = next(iter(parts.values())).description
    report = Report(first.labels, first.task, {}, list(findings))
    seen: dict[bytes, tuple[str, str]] = {}
    for name, data in parts.items():
        check_same_labels(first, data.description)
        report.findings += [Finding("missing", name, text) for text in data.description.skipped]
        report.parts[name] = _check_part(name, data, report.findings, seen, most, after_each)
        if isinstance(data.items, datasets.Dataset):
            for kind, files in frames_of(data.items).items():
                if kind == "unclear" and frame_is_known:
                    continue
                report.findings += [Finding(kind, name, _ROTATED[kind].format(file)) for file in files]
    for name, part in report.parts.items():
        if not part.images or (most is not None and most < len(parts[name].items)):
            continue  # nothing is known about the images that were not read
        absent = [label for label, count in zip(first.labels, part.segments, strict=True) if not count]
        report.findings += [Finding("absent", name, f"{label} is in no image of {name}.") for label in absent]
    return report


_ROTATED = {
    "stored": "{} is stored rotated (EXIF), and its annotations refer to the stored pixels; both are rotated upright.",
    "unclear": "{} is stored rotated or mirrored (EXIF), and its annotations may refer to the stored pixels: pass "
    "--annotation-frame.",
}


def _check_part(
    name: str,
    data: OpenData,
    findings: list[Finding],
    seen: dict[bytes, tuple[str, str]],
    most: int | None,
    after_each: Callable[[], object],
) -> PartReport:
    """Reads one part, and adds its problems to `findings` and the digests of its images to `seen`."""
    count = len(data.description.labels)
    part = PartReport(
        pixels=np.zeros(count, dtype=np.int64),
        segments=np.zeros(count, dtype=np.int64),
        pictures=np.zeros(count, dtype=np.int64),
    )
    total = len(data.items)
    remarks = _remarks_of(data.items)
    for index in chosen(total, most):
        try:
            item = data.items[index]
            found = remarks(index)
        except DatasetError as error:
            findings.append(Finding("unreadable", name, str(error)))
            after_each()
            continue
        findings += [Finding(kind, name, text) for kind, text in found]
        _add(part, item, index)
        own = hashlib.sha256(f"{tuple(item['image'].shape)}".encode() + item["image"].numpy().tobytes()).digest()
        if own in seen:
            other, file = seen[own]
            kind = "repeated" if other == name else "shared"
            where = f"is in {name} twice" if other == name else f"of {name} is in {other}, too"
            findings.append(Finding(kind, name, f"{item['file_name']} {where}, as {file}."))
        else:
            seen[own] = (name, item["file_name"])
        if not len(item["classes"]):
            findings.append(Finding("empty", name, f"{item['file_name']} has no segment."))
        after_each()
    return part


def chosen(total: int, most: int | None) -> list[int]:
    """At most `most` indices of `total`, evenly spaced."""
    count = total if most is None else min(total, most)
    return [place * total // count for place in range(count)]


def _remarks_of(items: Sequence[Item]) -> Callable[[int], list[tuple[str, str]]]:
    """The remarks about an image by index; see `OutlineReader.remarks`."""
    if isinstance(items, datasets.Dataset):
        reader = reader_of(items)
        if isinstance(reader, OutlineReader):
            return from_rows(items, reader.remarks)
    return lambda index: []


def _add(part: PartReport, item: Item, index: int) -> None:
    """Adds an image to the report of its part."""
    counted = count_segments(item)
    part.images += 1
    part.sizes[(item["height"], item["width"])] += 1
    part.unlabelled += int((item["segments"] < 0).sum())
    pixels: Counter[int] = Counter()
    for label, area, crowd in zip(counted.classes, counted.pixels, counted.crowd, strict=True):
        if crowd:
            part.crowds += 1
        elif area:
            part.segments[label] += 1
            pixels[label] += area
    for label, area in pixels.items():
        part.pixels[label] += area
        part.pictures[label] += 1
        best = part.largest.setdefault(label, [])
        best.append((area / counted.size, index))
        best.sort(reverse=True)
        del best[MOST_DRAWN:]


def rarest_first(report: Report, most: int) -> list[tuple[str, int, int]]:
    """Chooses images to inspect: one of each class in turn, starting with the classes in the fewest images.

    Args:
        report: the report.
        most: maximum number of images.

    Returns:
        (part, index, class) of each image.
    """
    pictures = np.sum([part.pictures for part in report.parts.values()], axis=0)
    order = [label for label in np.argsort(pictures, kind="stable").tolist() if pictures[label]]
    ranked = {
        label: sorted(
            ((fraction, name, index) for name, part in report.parts.items()
             for fraction, index in part.largest.get(label, [])), key=lambda one: -one[0]
        )
        for label in order
    }  # fmt: skip
    found: list[tuple[str, int, int]] = []
    taken: set[tuple[str, int]] = set()
    for place in range(MOST_DRAWN):
        for label in order:
            if len(found) == most:
                return found
            left = [(name, index) for _, name, index in ranked[label] if (name, index) not in taken]
            if left and place < len(ranked[label]):
                taken.add(left[0])
                found.append((*left[0], label))
    return found


def to_json(report: Report) -> dict[str, Any]:
    """The report as plain data for JSON."""
    return {
        "task": report.task,
        "labels": list(report.labels),
        "parts": {
            name: {
                "images": part.images,
                "sizes": [[height, width, count] for (height, width), count in sorted(part.sizes.items())],
                "crowds": part.crowds,
                "unlabelled_pixels": part.unlabelled,
                "classes": {
                    label: {"pixels": int(pixels), "segments": int(segments), "images": int(images)}
                    for label, pixels, segments, images in zip(
                        report.labels, part.pixels, part.segments, part.pictures, strict=True
                    )
                },
            }
            for name, part in report.parts.items()
        },
        "findings": [{"kind": one.kind, "part": one.part, "text": one.text} for one in report.findings],
    }


def shared_note(names: Sequence[str], where: str = "in the training data") -> str | None:
    """A sentence about evaluation images that `shared_images` found in another part, or None if there are none."""
    if not names:
        return None
    named = ", ".join(names[:MOST_NAMED]) + (f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else "")
    count = f"{number_of(len(names), 'evaluation image')} {'is' if len(names) == 1 else 'are'}"
    return f"{count} also {where}, so the metrics are too optimistic: {named}."


def shared_images(train: OpenData, evaluation: OpenData) -> list[str]:
    """The names of the evaluation files whose contents are also in the training part; reads only files of equal size.

    Compares at most `MOST_COMPARED` files of each part, and reads at most `MOST_HASHED` bytes.
    """
    by_size: dict[int, list[Path]] = {}
    for path in _paths(train.items, most=MOST_COMPARED):
        if (size := _size_of(path)) is not None:
            by_size.setdefault(size, []).append(path)
    found = []
    digests: dict[Path, str] = {}
    left = MOST_HASHED
    for path in _paths(evaluation.items, most=MOST_COMPARED):
        size = _size_of(path)
        candidates = by_size.get(size, []) if size is not None else []
        if not candidates or size is None or left < size * sum(one not in digests for one in (path, *candidates)):
            continue
        try:
            for one in (path, *candidates):
                if one not in digests:
                    left -= size
                    digests[one] = sha256_of(one)
        except OSError:
            continue  # reading the item will raise
        if digests[path] in {digests[one] for one in candidates}:
            found.append(path.name)
    return found


def unread_note(data: str | None, parts: Mapping[str, OpenData]) -> str | None:
    """A sentence about image files that belong to no part, such as those of a split with an unusual name, or None.

    Files of other types than the parts' images are not counted, nor are those in folders of maps.

    Args:
        data: the folder to search; if it is not a folder, those with the parts' images are searched.
        parts: all opened parts.
    """
    used, read = ({os.path.abspath(path) for one in parts.values() for path in _paths(one.items, k)} for k in (0, 1))
    own, maps = ({os.path.dirname(path) for path in paths} for paths in (used, read))
    suffixes = {Path(path).suffix.lower() for path in used} & {*IMAGE_SUFFIXES, *ARRAY_SUFFIXES}
    used |= read  # maps beside images
    is_folder = data is not None and os.path.isdir(data)
    left: Counter[str] = Counter()
    for root in [os.path.abspath(str(data))] if is_folder else sorted(own):
        for path in map(str, files_below(Path(root), suffixes)):
            folder = os.path.dirname(path)
            name = os.path.relpath(folder, root) if is_folder and folder != root else folder
            is_map = folder not in own and (folder in maps or not MAP_FOLDERS.isdisjoint(Path(name).parts))
            if path not in used and not is_map:
                left[name] += 1
                used.add(path)
    if not left:
        return None
    named = ", ".join(f"{count:,} in {folder}" for folder, count in left.most_common(MOST_NAMED))
    more = f" and others in {number_of(len(left) - MOST_NAMED, 'more folder')}" if len(left) > MOST_NAMED else ""
    return f"Outside these splits, and so not read: {number_of(left.total(), 'image')}, {named}{more}."


def _paths(items: Sequence[Item], place: int = 0, most: int | None = None) -> Iterator[Path]:
    """The image files of a part, or its maps with `place` 1, and not many more than `most`; only what is in files."""
    if isinstance(items, UnlabelledImages) and place == 0:
        yield from items.paths[:most]
    if not isinstance(items, datasets.Dataset):
        return
    reader = reader_of(items)
    column = reader.source_columns[place]
    if column not in items.column_names:  # annotations that are not maps
        return
    count = 0
    for table in items.with_format("arrow", columns=[column]).iter(256):
        for value in table.column(column):
            # Arrow scalars, so that the bytes of images in Parquet files are not copied.
            if not isinstance(value, pyarrow.StructScalar) or not value.is_valid or value["bytes"].is_valid:
                continue
            path = value["path"].as_py()
            if path and reader.may_open(path):
                yield Path(path)
                count += 1
        if most is not None and count >= most:
            return


def _size_of(path: Path) -> int | None:
    return os.path.getsize(path) if os.path.isfile(path) else None


__all__ = ["KINDS", "Finding", "Report", "check_data", "open_part", "open_parts", "rarest_first", "shared_images",
           "shared_note", "to_json", "unread_note"]  # fmt: skip

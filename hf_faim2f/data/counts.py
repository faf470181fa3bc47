"""Counts the pixels and segments of each class in a dataset, before training or evaluation.

A class that no image contains cannot be learned, and a class that is missing from the ground truth cannot be evaluated.
Neither is visible in a loss or in a mean, so a table and notes report it in advance. In large datasets, a random sample
is counted.
"""

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from ..errors import DatasetError
from .collate import TrainingItems
from .dataset import Description, Task, from_rows, reader_of
from .item import Item, SegmentCounts, count_segments

# Limits of a sample, which takes a few seconds; a sample without targets may be larger.
MOST_IMAGES = 500
MOST_PIXELS = 2**29
# Maximum number of augmented images to try until one has targets.
MOST_TRIED = 200
# Share of pixels without a class above which they are probably background.
MOST_UNLABELLED = 0.5
# Maximum number of classes named in a sentence.
MOST_NAMED = 10


@dataclass(frozen=True)
class ClassCounts:
    """Counts of a dataset, or of a sample of it. Crowds are counted separately, since they are not targets.

    Args:
        labels: class names in the order of their ids.
        task: the data's task.
        total: number of images in the dataset.
        images: number of images that were counted.
        skipped: number of images that could not be read.
        pixels, segments: numbers of pixels and segments of each class.
        unlabelled: number of pixels that are in no segment, or only in a crowd.
        crowds: number of crowds.
        targets: number of targets (segments with pixels that are not crowds) by index of the image; images without
            targets are omitted.
        largest: name of the image with the most targets; empty if there are none.
    """

    labels: tuple[str, ...]
    task: Task
    total: int
    images: int
    skipped: int
    pixels: tuple[int, ...]
    segments: tuple[int, ...]
    unlabelled: int
    crowds: int
    targets: dict[int, int]
    largest: str

    @property
    def is_sample(self) -> bool:
        """Whether only some of the images were counted."""
        return self.images + self.skipped < self.total

    @property
    def of_images(self) -> str:
        """The number of images that were counted, as text."""
        return (
            f"{self.images:,} of {self.total:,} images" if self.images < self.total else number_of(self.images, "image")
        )

    @property
    def absent(self) -> list[str]:
        """The labels that no counted image contains."""
        return [label for label, count in zip(self.labels, self.segments, strict=True) if not count]


def count_classes(
    items: Sequence[Item], description: Description, *, skip_bad: bool = False, most_images: int = MOST_IMAGES
) -> ClassCounts:
    """Counts the pixels and segments of each class.

    Reads maps and annotations, and usually only the headers of images. If there are more than `most_images` images or
    `MOST_PIXELS` pixels, counts a fixed random sample, which is extended until it has a target.

    Args:
        items: a dataset from one of the readers, or any other sequence of items.
        description: metadata of the items.
        skip_bad: skip images that cannot be read.
        most_images: maximum number of images in a sample.

    Raises:
        DatasetError: an image or its annotations cannot be read.
    """
    total = len(items)
    # Also if few images may exceed the pixels of a sample: they are often sorted by class.
    order = np.random.default_rng(0).permutation(total).tolist()
    classes = len(description.labels)
    pixels, segments = np.zeros(classes, dtype=np.int64), np.zeros(classes, dtype=np.int64)
    images = skipped = unlabelled = seen = crowds = 0
    targets: dict[int, int] = {}
    largest = ""
    for index, counted, name in _counted(items, order, skip_bad):
        if counted is None:
            skipped += 1
            continue
        images += 1
        seen += counted.size
        unlabelled += max(0, counted.size - counted.labelled)  # areas that a file states may be too large
        own = 0
        for label, area, crowd in zip(counted.classes, counted.pixels, counted.crowd, strict=True):
            if crowd:
                crowds += 1
            elif area:
                own += 1
                pixels[label] += area
                segments[label] += 1
        if own:
            if own > max(targets.values(), default=0):
                largest = name
            targets[index] = own
        if targets and (images >= most_images or seen >= MOST_PIXELS):
            break
    return ClassCounts(
        description.labels, description.task, total, images, skipped, tuple(pixels.tolist()), tuple(segments.tolist()),
        unlabelled, crowds, targets, largest,
    )  # fmt: skip


def _counted(
    items: Sequence[Item], order: Iterable[int], skip_bad: bool
) -> Iterator[tuple[int, SegmentCounts | None, str]]:
    """Index, counts and file name of each image; no counts for one that cannot be read and is skipped."""
    read: Callable[[int], tuple[SegmentCounts, str]]
    if isinstance(items, datasets.Dataset):
        reader = reader_of(items)

        def count(row: Mapping[str, Any]) -> tuple[SegmentCounts, str]:
            return reader.named(reader.count, row), str(row.get("file_name") or row.get("image_id"))

        read = from_rows(items, count)
    else:

        def read(index: int) -> tuple[SegmentCounts, str]:
            item = items[index]
            return count_segments(item), item["file_name"]

    for index in order:
        try:
            counted, name = read(index)
        except DatasetError:
            if not skip_bad:
                raise
            yield index, None, ""
        else:
            yield index, counted, name


def check_same_labels(first: Description, other: Description) -> None:
    """Checks that two parts of a dataset have the same classes in the same order.

    Raises:
        DatasetError: they differ; the message names the first difference.
    """
    ours, theirs = first.labels, other.labels
    if ours == theirs:
        return
    said = f"{other.name} has other labels than {first.name}: "
    if len(ours) != len(theirs):
        raise DatasetError(f"{said}{len(theirs)} classes instead of {len(ours)}; name the same ones in both.")
    place = next(place for place, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
    mine, other_name = ours[place], theirs[place]
    if unicodedata.normalize("NFC", mine) == unicodedata.normalize("NFC", other_name):
        raise DatasetError(
            f"{said}class {place}, {mine!r}, is written in other Unicode characters ({other_name!a} instead of "
            f"{mine!a}); copy the names from one to the other."
        )
    raise DatasetError(f"{said}class {place} is {other_name!r} instead of {mine!r}; name the same ones in both.")


def check_targets(counts: ClassCounts, name: str) -> None:
    """Checks that the training data has targets.

    Args:
        counts: counts of the training data.
        name: name of the data.

    Raises:
        DatasetError: there are no targets.
    """
    if counts.targets:
        return
    if counts.crowds:
        raise DatasetError(
            f"All {number_of(counts.crowds, 'segment')} of {name} are crowds (iscrowd 1), which are not training "
            'targets: write "iscrowd": 0 for single objects, also for those whose mask is in run lengths.'
        )
    raise DatasetError(
        f"{name} has no segment in any of its {number_of(counts.total, 'image')}: there is nothing to learn from; "
        "check its masks or annotations, the labels, and the value of pixels without a class."
    )


def check_crops(items: TrainingItems, targets_of: Callable[[Item], int], counts: ClassCounts, name: str) -> None:
    """Checks that targets remain after augmentation.

    Args:
        items: augmented items, which are tried in order until one has targets.
        targets_of: returns the number of targets of an item.
        counts: counts of the same data.
        name: name of the data.

    Raises:
        DatasetError: none of `MOST_TRIED` images with targets has any after augmentation.
    """
    chosen = list(counts.targets)[:MOST_TRIED]
    tried = 0
    for index in chosen:
        try:
            item = items[index]
        except DatasetError:  # training will raise or skip it
            continue
        tried += 1
        if targets_of(item):
            return
    if not tried:
        return
    raise DatasetError(
        f"{name} has segments, but none is left in the training crops of {number_of(tried, 'image')}: they are too "
        "small or too rare for these crops at this image size."
    )


def class_table(parts: dict[str, ClassCounts]) -> list[str]:
    """The lines of a table with the pixels and segments of each class in each part of the data.

    Args:
        parts: counts by name of the part, all with the same labels.
    """
    labels = next(iter(parts.values())).labels
    rows = [["class", *(f"{name} {what}" for name in parts for what in ("pixels", "segments"))]]
    for index, label in enumerate(labels):
        pairs = ((counts.pixels[index], counts.segments[index]) for counts in parts.values())
        rows.append([label, *(f"{number:,}" for pair in pairs for number in pair)])
    rows.append(["(no class)", *(cell for counts in parts.values() for cell in (f"{counts.unlabelled:,}", ""))])
    counted = ", ".join(f"{name} {counts.of_images}" for name, counts in parts.items())
    return [f"Pixels and segments of each class ({counted}):", *aligned(rows)]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table: the first column to the left, the others to the right."""
    widths = [max(_terminal_width(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        padding = " " * (widths[0] - _terminal_width(row[0]))
        lines.append("  ".join([row[0] + padding, *cells[1:]]).rstrip())
    return lines


def _terminal_width(text: str) -> int:
    """The width of a text in a terminal, in columns: two for a wide East Asian character, none for a combining one."""
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )


def training_notes(counts: ClassCounts) -> list[str]:
    """Notes for the user about the classes of training data."""
    notes = _common_notes(counts)
    if counts.absent and counts.is_sample:
        notes.append(f"Not in the {counts.of_images} to train on that were counted: {_names(counts.absent)}.")
    elif counts.absent:
        notes.append(f"Never in the training data, and so not learned: {_names(counts.absent)}.")
    return notes


def evaluation_notes(counts: ClassCounts) -> list[str]:
    """Notes for the user about the classes of evaluation data."""
    notes = _common_notes(counts)
    if counts.absent and counts.is_sample:
        notes.append(f"Not in the ground truth of the {counts.of_images} that were counted: {_names(counts.absent)}.")
    elif counts.absent:
        notes.append(absent_note(counts.absent))
    return notes


def absent_note(labels: Sequence[str]) -> str:
    """A sentence about classes that are missing from the ground truth of an evaluation."""
    return f"Absent from the ground truth, so neither measured nor in the means: {_names(labels)}."


def query_note(counts: ClassCounts, queries: int) -> str | None:
    """A sentence if some images have more segments than the model has queries; otherwise None."""
    over = [count - queries for count in counts.targets.values() if count > queries]
    if not over:
        return None
    return (
        f"{counts.largest} has {max(counts.targets.values()):,} segments, but the model only {queries:,} queries, each "
        f"for one: {sum(over):,} of the {sum(counts.targets.values()):,} segments of {counts.of_images} get none "
        f"(in {number_of(len(over), 'image')})."
    )


def crowd_note(crowds: int, segments: int) -> str:
    """A sentence about data with crowds, and with a number of other segments."""
    return (
        f"{crowds:,} of the {crowds + segments:,} segments are crowds (iscrowd 1): they are not training targets, and "
        "neither right nor wrong in an evaluation. If they are single objects (CVAT's exports call every mask a "
        'crowd), write "iscrowd": 0.'
    )


def _common_notes(counts: ClassCounts) -> list[str]:
    notes = []
    if counts.crowds:
        notes.append(crowd_note(counts.crowds, sum(counts.segments)))
    everywhere = counts.unlabelled + sum(counts.pixels)
    if counts.task == "semantic" and len(counts.labels) > 1 and counts.unlabelled > MOST_UNLABELLED * everywhere:
        notes.append(
            f"{100 * counts.unlabelled / everywhere:.0f} % of the pixels have no class, so they are neither learned "
            "nor measured, and the model predicts any class there: if they are background, name that as a class, too."
        )
    if len(counts.labels) == 1 and counts.task == "semantic":
        notes.append(
            f"{counts.labels[0]} is the only class, so every pixel is predicted as it, and its IoU is 100 for any "
            "model: name the background as a class, too."
        )
    return notes


def _names(labels: Sequence[str]) -> str:
    named = ", ".join(labels[:MOST_NAMED])
    return f"{named} and {len(labels) - MOST_NAMED} more" if len(labels) > MOST_NAMED else named


def number_of(count: int, what: str) -> str:
    """A number with its unit: "1 image", "2,000 images"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


__all__ = [
    "ClassCounts",
    "absent_note",
    "aligned",
    "check_crops",
    "check_same_labels",
    "check_targets",
    "class_table",
    "count_classes",
    "crowd_note",
    "evaluation_notes",
    "number_of",
    "query_note",
    "training_notes",
]  # fmt: skip

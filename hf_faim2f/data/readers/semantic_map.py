"""Images beside a map of classes: each class in an image is one segment."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import torch

from ..dataset import describe, from_rows
from ..errors import DatasetError
from ..files import Source, read_head, read_map, source_name
from ..item import index_values
from .map_reader import MapReader, Segments
from .rows import source_of

# What image editors and annotation tools write for the object of a binary mask, in 8 bits.
WHITE = 255
# Maps that are looked at where none so far shows what white means.
MOST_LOOKED_AT = 64


def class_of_value(num_labels: int, ignore_index: int | None = 255, reduce_labels: bool = False) -> dict[int, int]:
    """The class of each value that a map may hold, -1 for no class.

    Args:
        num_labels: how many classes there are.
        ignore_index: the value of pixels without class; None if there is none. A class wins over it. Without it, where
            0 and 1 are all the values that mean something, 255 means the same as 1: the white of a binary mask.
        reduce_labels: the values are one more than the classes, and 0 is no class, as in ADE20K's files.
    """
    first = 1 if reduce_labels else 0
    void = {} if ignore_index is None else {ignore_index: -1}
    if reduce_labels:
        void[0] = -1
    classes = {**void, **{first + index: index for index in range(num_labels)}}
    if ignore_index is None and set(classes) == {0, 1}:
        classes[WHITE] = classes[1]
    return classes


@dataclass(frozen=True)
class SemanticMapReader(MapReader):
    """
    Args:
        classes: see `class_of_value`; a map with any other value is refused.
        image, annotation: names of the columns.
    """

    classes: Mapping[int, int]

    def values(self, row: Mapping[str, Any]) -> list[int]:
        """The distinct values of the map of a row."""
        source = source_of(row[self.annotation])
        return index_values(read_map(source, *read_head(source)[1:]))[0]

    def segments(self, source: Source, height: int, width: int) -> Segments:
        """A segment for each class that is in the map."""
        values, places = index_values(read_map(source, height, width))
        unknown = [value for value in values if value not in self.classes]
        if len(unknown) > 1 and {0, WHITE} <= set(values) and len(self.description.labels) <= 2:
            raise DatasetError(
                f"{source_name(source)} has soft edges: {len(unknown)} values lie between 0 and {WHITE}, and no class "
                f"of {self.description.name} has them. Save it without antialiasing, each class in one value."
            )
        if {1, WHITE} <= set(values) and self.classes.get(1, -1) == self.classes.get(WHITE):
            raise DatasetError(
                f"{source_name(source)} has the values 1 and {WHITE}: say with ignore_index which is no class."
            )
        if unknown:
            raise DatasetError(
                f"{source_name(source)} has the value{'s' if len(unknown) > 1 else ''} "
                f"{', '.join(map(str, unknown[:5]))}{' and others' if len(unknown) > 5 else ''}, which no class of "
                f"{self.description.name} has: check the number of labels, the value to ignore, and whether 0 is a "
                "class or none (reduce_labels)."
            )
        found = sorted({self.classes[value] for value in values} - {-1})
        numbers = {cls: number for number, cls in enumerate(found)}
        table = torch.tensor([numbers.get(self.classes[value], -1) for value in values], dtype=torch.int32)
        return Segments(places, table, found, [False] * len(found))


class IgnoredWhiteError(DatasetError):
    """Masks hold 0 and 255 alone, and 255 is ignored: nothing but the background would be left."""


def refuse_ignored_white(
    dataset: datasets.Dataset,
    values: Callable[[Mapping[str, Any]], list[int]],
    ignore_index: int | None,
    reduce_labels: bool,
) -> None:
    """Refuses binary masks of 0 and 255 where 255 would be ignored and nothing but the background be left.

    Looks at maps until one has another value, which is mostly the first, and at `MOST_LOOKED_AT` at most.

    Args:
        values: gives the distinct values of a row's map.
        ignore_index, reduce_labels: as in `class_of_value`.

    Raises:
        IgnoredWhiteError: the masks are such, in a sentence that says what to pass.
    """
    description, count = describe(dataset), len(dataset)
    labels = description.labels
    if description.task != "semantic" or ignore_index != WHITE or len(labels) > 2:
        return
    looked_at = min(count, MOST_LOOKED_AT)

    def values_or_none(row: Mapping[str, Any]) -> list[int]:
        try:
            return values(row)
        except DatasetError:  # raised, or skipped, where the item is read
            return []

    values_at = from_rows(dataset, values_or_none)
    seen: set[int] = set()
    for k in range(looked_at):
        seen.update(values_at(k * count // looked_at))
        if not seen <= {0, WHITE}:
            return
    if WHITE not in seen:
        return
    many = f"The masks of {description.name} have no values but 0 and {WHITE}, and {WHITE} is ignored (ignore_index)"
    remedy = "pass --ignore-index -1 (in Python ignore_index=None)"
    if reduce_labels or len(labels) == 2:
        raise IgnoredWhiteError(f"{many}, so no pixel would be {labels[-1]!r}: where it is {WHITE}, {remedy}.")
    raise IgnoredWhiteError(
        f"{many}, so every pixel left would be {labels[0]!r}: where that is {WHITE}, name the background, too, as in "
        f"--labels background,{labels[0]}, and {remedy}."
    )

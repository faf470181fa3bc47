"""Images beside a map of classes: each class in an image is one segment."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .errors import DatasetError
from .files import read_map, read_pair, source_name
from .item import Item, index_values, make_item
from .lazy import ItemReader
from .rows import identity, source_of


def class_of_value(num_labels: int, ignore_index: int | None = 255, reduce_labels: bool = False) -> dict[int, int]:
    """The class of each value that a map may hold, -1 for no class.

    Args:
        num_labels: how many classes there are.
        ignore_index: the value of pixels without class; None if there is none. A class wins over it.
        reduce_labels: the values are one more than the classes, and 0 is no class, as in ADE20K's files.
    """
    first = 1 if reduce_labels else 0
    void = {} if ignore_index is None else {ignore_index: -1}
    if reduce_labels:
        void[0] = -1
    return {**void, **{first + index: index for index in range(num_labels)}}


@dataclass(frozen=True)
class SemanticMapReader(ItemReader):
    """
    Args:
        classes: see `class_of_value`; a map with any other value is refused.
        image, annotation: names of the columns.
    """

    classes: Mapping[int, int]
    image: str = "image"
    annotation: str = "annotation"

    def read(self, row: Mapping[str, Any]) -> Item:
        frame = self.description.annotation_frame
        image, source = read_pair(source_of(row[self.image]), source_of(row[self.annotation]), frame)
        values, places = index_values(read_map(source, image.shape[-2], image.shape[-1]))
        unknown = [value for value in values if value not in self.classes]
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
        return make_item(image, table[places.long()], found, *identity(row, self.image))

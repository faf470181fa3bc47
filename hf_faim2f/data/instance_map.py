"""Images beside a map of instances, in the two encodings that `hf_faim2f.data.folder` describes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .errors import DatasetError
from .files import has_colors, read_colors, read_map, read_pair, source_name
from .item import Item, index_values, make_item
from .lazy import ItemReader
from .rows import identity, source_of

INSTANCES_PER_CLASS = 1000


@dataclass(frozen=True)
class InstanceMapReader(ItemReader):
    """
    Args:
        classes: the class of each red value of a map with colors, -1 for none; see `class_of_value`.
        image, annotation: names of the columns.
    """

    classes: Mapping[int, int]
    image: str = "image"
    annotation: str = "annotation"

    def read(self, row: Mapping[str, Any]) -> Item:
        frame = self.description.annotation_frame
        image, source = read_pair(source_of(row[self.image]), source_of(row[self.annotation]), frame)
        height, width = image.shape[-2:]
        if has_colors(source):
            red, green, _ = read_colors(source, height, width)
            values, places = index_values(red * 256 + green)
            classes = [self.classes.get(value // 256) for value in values]
            meaning = "red value"
        else:
            values, places = index_values(read_map(source, height, width))
            classes = [self._class_of_number(value) for value in values]
            meaning = "value"
        for value, cls in zip(values, classes, strict=True):
            if cls is None:
                raise DatasetError(
                    f"{source_name(source)} has the {meaning} {value // 256 if meaning == 'red value' else value}, "
                    f"which no instance of the {len(self.description.labels)} classes of {self.description.name} has: "
                    "see hf_faim2f.data.folder for what a mask of instances holds."
                )
        found = [cls for cls in classes if cls is not None and cls >= 0]
        is_segment = torch.tensor([cls != -1 for cls in classes])
        table = torch.full((len(values),), -1, dtype=torch.int32)
        table[is_segment] = torch.arange(len(found), dtype=torch.int32)
        return make_item(image, table[places.long()], found, *identity(row, self.image))

    def _class_of_number(self, value: int) -> int | None:
        """-1 for the background, None for a value that must not be."""
        if value == 0:
            return -1
        if value < 0:
            return None
        if len(self.description.labels) == 1:
            return 0
        cls = value // INSTANCES_PER_CLASS - 1
        return cls if 0 <= cls < len(self.description.labels) else None

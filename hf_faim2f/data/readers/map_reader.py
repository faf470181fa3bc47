"""What readers of an image beside a map have in common."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ..dataset import ItemReader
from ..errors import DatasetError
from ..files import Source, read_head, read_pair
from ..item import Item, SegmentCounts, make_item
from .rows import identity, source_of


class Segments(NamedTuple):
    """The segments of a map with V distinct values.

    Args:
        places: (H, W) int32, the place of each pixel's value among the values.
        table: (V,) int32, the segment of each value, 0..n-1, or -1 for none.
        classes: class of each segment.
        crowd: whether each segment is a crowd.
    """

    places: Tensor
    table: Tensor
    classes: list[int]
    crowd: list[bool]

    def ids(self) -> Tensor:
        """(H, W) int32, the segment of each pixel."""
        return self.table[self.places.long()]

    def pixels(self) -> list[int]:
        """The pixels of each segment."""
        of_values = np.bincount(self.places.numpy().ravel(), minlength=len(self.table))
        of_segments = np.zeros(len(self.classes) + 1, dtype=np.int64)
        np.add.at(of_segments, self.table.numpy(), of_values)  # -1 is the last place
        return of_segments[:-1].tolist()


@dataclass(frozen=True)
class MapReader(ItemReader):
    """
    Args:
        image, annotation: names of the columns.
    """

    image: str = field(default="image", kw_only=True)
    annotation: str = field(default="annotation", kw_only=True)

    @abstractmethod
    def segments(self, source: Source, height: int, width: int) -> Segments:
        """The segments of a map of that size.

        Raises:
            DatasetError: it cannot be read, has another size, or values that mean nothing.
        """

    def read(self, row: Mapping[str, Any]) -> Item:
        """The item of a row."""
        frame = self.description.annotation_frame
        image, source = read_pair(source_of(row[self.image]), source_of(row[self.annotation]), frame)
        found = self.segments(source, image.shape[-2], image.shape[-1])
        return make_item(image, found.ids(), found.classes, *identity(row, self.image), crowd=found.crowd)

    def count(self, row: Mapping[str, Any]) -> SegmentCounts:
        """The segments of a row, counted in its map: of the image the header alone is read."""
        try:
            orientation, height, width = read_head(source_of(row[self.image]))
            source = source_of(row[self.annotation])
            about = {"image_orientation": orientation, "frame": self.description.annotation_frame}
            found = self.segments({**source, **about}, height, width)
        except DatasetError:
            return super().count(row)  # the same error, unless the header does not say all
        return SegmentCounts(found.places.numel(), found.classes, found.pixels(), found.crowd)

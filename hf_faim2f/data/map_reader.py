"""What readers of an image beside a map have in common."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from .errors import DatasetError
from .files import Source, read_image, size_of
from .item import Item, SegmentCounts, make_item, pixel_counts
from .lazy import ItemReader
from .rows import identity, source_of


class Segments(NamedTuple):
    """The segments of a map.

    Args:
        ids: (H, W) int32, the segment of each pixel, 0..n-1, or -1 for none.
        classes: class of each segment.
        crowd: whether each segment is a crowd.
    """

    ids: Tensor
    classes: list[int]
    crowd: list[bool]


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
        source = source_of(row[self.annotation])
        image = read_image(source_of(row[self.image]))
        found = self.segments(source, image.shape[-2], image.shape[-1])
        return make_item(image, found.ids, found.classes, *identity(row, self.image), crowd=found.crowd)

    def count(self, row: Mapping[str, Any]) -> SegmentCounts:
        """The segments of a row, counted in its map: of the image the header alone is read."""
        try:
            found = self.segments(source_of(row[self.annotation]), *size_of(source_of(row[self.image])))
        except DatasetError:
            return super().count(row)  # the same error, unless the header does not say all
        pixels = pixel_counts(found.ids, len(found.classes))
        return SegmentCounts(found.ids.numel(), found.classes, pixels.tolist(), found.crowd)

"""Images beside a map of instances, in the two encodings that `hf_faim2f.data.readers.folder` describes."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DatasetError
from ..files import Source, has_colors, is_transparent, read_colors, read_map, source_name
from ..item import index_values
from .map_reader import MapReader, Segments

INSTANCES_PER_CLASS = 1000
# The largest value of 8 and of 16 bits: the white of a binary mask.
WHITES = (255, 65535)


@dataclass(frozen=True)
class InstanceMapReader(MapReader):
    """
    Args:
        classes: the class of each red value of a map with colors, -1 for none; see `class_of_value`.
        image, annotation: names of the columns.
    """

    classes: Mapping[int, int]

    def segments(self, source: Source, height: int, width: int) -> Segments:
        """A segment for each instance of the map."""
        if has_colors(source):
            colors = read_colors(source, height, width)
            self._check_colors(source, colors)
            red, green, _ = colors
            values, places = index_values(red * 256 + green)
            classes = [self.classes.get(value // 256) for value in values]
            meaning = "red value"
        else:
            values, places = index_values(read_map(source, height, width))
            self._check_numbers(source, values, places)
            void = self._void_of(values)
            classes = [-1 if value == void else self._class_of_number(value) for value in values]
            meaning = "value"
        for value, cls in zip(values, classes, strict=True):
            if cls is None:
                raise DatasetError(
                    f"{source_name(source)} has the {meaning} {value // 256 if meaning == 'red value' else value}, "
                    f"which no instance of the {len(self.description.labels)} classes of {self.description.name} has: "
                    "see hf_faim2f.data.readers.folder for what a mask of instances holds."
                )
        found = [cls for cls in classes if cls is not None and cls >= 0]
        is_segment = torch.tensor([cls != -1 for cls in classes])
        table = torch.full((len(values),), -1, dtype=torch.int32)
        table[is_segment] = torch.arange(len(found), dtype=torch.int32)
        return Segments(places, table, found, [False] * len(found))

    def _check_colors(self, source: Source, colors: Tensor) -> None:
        """Refuses a picture of objects on black, which would read as an object of class 0 around ignored pixels.

        Raises:
            DatasetError: it is one, or is partly transparent.
        """
        remedy = "save it with one channel (mode L), 0 for the background and another value for each object"
        if is_transparent(source):
            raise DatasetError(
                f"{source_name(source)} is partly transparent, and what that means is not known: {remedy}."
            )
        black, white = (colors == 0).all(0), colors == WHITES[0]
        if not bool(black.any()) or not bool(white.any()) or self.classes.get(WHITES[0], -1) != -1:
            return
        is_gray = bool((colors == colors[0]).all())
        if is_gray or bool((white | (colors == 0)).all()):
            raise DatasetError(
                f"{source_name(source)} shows {'white' if is_gray else 'pure colors'} on black in RGB, whose red would "
                f"be read as the class and whose green as the number of the instance: {remedy}."
            )

    def _check_numbers(self, source: Source, values: list[int], places: Tensor) -> None:
        """Refuses soft edges, of which every shade would be an instance.

        A shade along an edge is a thin line: none of its pixels has that value on all four sides. Objects do.

        Raises:
            DatasetError: most values between black and white are shades.
        """
        shades = [place for place, value in enumerate(values) if 0 < value < values[-1]]
        if len(self.description.labels) != 1 or values[-1] not in WHITES or not shades:
            return
        inner = places[1:-1, 1:-1]
        inside = torch.ones_like(inner, dtype=torch.bool)
        for beside in (places[:-2, 1:-1], places[2:, 1:-1], places[1:-1, :-2], places[1:-1, 2:]):
            inside &= inner == beside
        solid = set(inner[inside].unique().tolist())
        thin = sum(place not in solid for place in shades)
        if 2 * thin > len(shades):
            raise DatasetError(
                f"{source_name(source)} has soft edges: {thin} of its values between 0 and {values[-1]} are thin "
                "lines, each of which would be an instance. Save it without antialiasing, each object in one value."
            )

    def _void_of(self, values: list[int]) -> int | None:
        """The ignored 255 of Pascal VOC's kind: where it cannot be an instance, or those are numbered 1, 2 and so on up
        to fewer. Alone it is an object, as in a binary mask, and so it is beside objects that are drawn in shades."""
        white = WHITES[0]
        if white not in values or self.classes.get(white) != -1:
            return None
        others = set(values) - {0, white}
        is_numbered = bool(others) and others == set(range(1, len(others) + 1)) and len(others) < white - 1
        return white if is_numbered or len(self.description.labels) > 1 else None

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

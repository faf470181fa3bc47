"""Places for the labels of an image's segments: on their segments, or beside small ones, and never on each other."""

from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Box = tuple[int, int, int, int]  # x_min, y_min, x_max, y_max in pixels, inclusive

PADDING = 2  # beside a label's text, in pixels
# A label is put beside a segment whose box has at most this many times the label's area, because it would hide it.
SMALL = 4
# The distance of such a label from the box, in pixels.
DISTANCE = 2
# How much counts, as a fraction of the label: what lies on its segment, on other labels, and, as a fraction of a larger
# window around it, on its segment. The last leads to the middle of the segment's largest part.
ON_SEGMENT, ON_LABELS, AROUND = 4.0, 8.0, 1.0


class LabelPlacement:
    """Finds places for the labels of one image, one after the other.

    All positions of a label on a grid of cells, which are a third of the text's size, are compared by sums over
    windows, from a summed-area table (Crow, SIGGRAPH 1984).

    Args:
        on_top: (H, W), the number of the visible segment at each pixel.
        font_size: of the labels, in pixels.
    """

    def __init__(self, on_top: np.ndarray, font_size: int) -> None:
        self.cell = max(1, font_size // 3)
        self.height, self.width = on_top.shape
        self.segments = on_top[self.cell // 2 :: self.cell, self.cell // 2 :: self.cell]  # (rows, columns) of cells
        self.taken = np.zeros(self.segments.shape, dtype=bool)
        font: Any = ImageFont.load_default(font_size)
        self.font = font
        self.line = sum(font.getmetrics())  # the height of a line of text, in pixels
        self.draw = ImageDraw.Draw(Image.new("L", (1, 1)))

    def place(self, number: int, box: Box, text: str) -> Box | None:
        """The place of a segment's label, which is then taken; None if there is no room.

        Args:
            number: the segment's number in the map.
            box: its box.
            text: the label.
        """
        _, _, right, bottom = self.draw.textbbox((0, 0), text, font=self.font)
        width, height = int(right) + 2 * PADDING, max(self.line, int(bottom))
        if (box[2] - box[0] + 1) * (box[3] - box[1] + 1) > SMALL * width * height:
            corner = self._inside(number, box, width, height)
        else:
            corner = self._beside(box, width, height)
        if corner is None:
            return None
        self.taken[self._cells(corner, width, height)] = True
        return *corner, corner[0] + width - 1, corner[1] + height - 1

    def _inside(self, number: int, box: Box, width: int, height: int) -> tuple[int, int] | None:
        """The label's upper left corner on the segment's largest part."""
        cell = self.cell
        left, top = -(-box[0] // cell), -(-box[1] // cell)
        cells = np.s_[top : (box[3] + 1) // cell, left : (box[2] + 1) // cell]
        segment, taken = _table(self.segments[cells] == number), _table(self.taken[cells])
        across, down = -(-width // cell), -(-height // cell)
        rows, columns = (length - 1 for length in segment.shape)
        if rows < down or columns < across:
            return self._beside(box, width, height)
        margin = max(rows, columns) // 6
        on_segment = _window_sums(segment, down, across) / (down * across)
        on_labels = _window_sums(taken, down, across) / (down * across)
        around = _enlarged_sums(segment, down, across, margin) / ((down + 2 * margin) * (across + 2 * margin))
        score = ON_SEGMENT * on_segment - ON_LABELS * on_labels + AROUND * around
        row, column = np.unravel_index(score.argmax(), score.shape)
        if not on_segment[row, column] or on_labels[row, column]:
            return None
        return (left + int(column)) * cell, (top + int(row)) * cell

    def _beside(self, box: Box, width: int, height: int) -> tuple[int, int] | None:
        """The label's upper left corner above, below, right or left of the box, where it covers the fewest segments."""
        if width > self.width or height > self.height:
            return None
        x_min, y_min, x_max, y_max = box
        x = min(max(0, (x_min + x_max + 1 - width) // 2), self.width - width)
        y = min(max(0, (y_min + y_max + 1 - height) // 2), self.height - height)
        corners = (
            (x, y_min - DISTANCE - height),
            (x, y_max + 1 + DISTANCE),
            (x_max + 1 + DISTANCE, y),
            (x_min - DISTANCE - width, y),
        )
        free = [
            (left, top)
            for left, top in corners
            if 0 <= left <= self.width - width
            and 0 <= top <= self.height - height
            and not self.taken[self._cells((left, top), width, height)].any()
        ]
        if not free:
            return None
        return min(free, key=lambda corner: len(np.unique(self.segments[self._cells(corner, width, height)])))

    def _cells(self, corner: tuple[int, int], width: int, height: int) -> tuple[slice, slice]:
        """The cells that a label touches."""
        (left, top), cell = corner, self.cell
        return slice(top // cell, -(-(top + height) // cell)), slice(left // cell, -(-(left + width) // cell))


def _table(values: np.ndarray) -> np.ndarray:
    """The summed-area table of a bool array (rows, columns), (rows + 1, columns + 1): sums over all before."""
    table = np.zeros((values.shape[0] + 1, values.shape[1] + 1), dtype=np.int32)
    values.cumsum(0, dtype=np.int32).cumsum(1, out=table[1:, 1:])
    return table


def _window_sums(table: np.ndarray, height: int, width: int) -> np.ndarray:
    """Sums over every window of this size inside the array."""
    strips = table[height:] - table[:-height]
    return strips[:, width:] - strips[:, :-width]


def _enlarged_sums(table: np.ndarray, height: int, width: int, margin: int) -> np.ndarray:
    """Sums over the same windows, each enlarged on all sides by the margin, as far as the array goes."""
    rows, columns = table.shape[0] - 1, table.shape[1] - 1
    tops, lefts = np.arange(rows - height + 1), np.arange(columns - width + 1)
    strips = table[np.minimum(tops + height + margin, rows)] - table[np.maximum(tops - margin, 0)]
    return strips[:, np.minimum(lefts + width + margin, columns)] - strips[:, np.maximum(lefts - margin, 0)]


__all__ = ["PADDING", "LabelPlacement"]

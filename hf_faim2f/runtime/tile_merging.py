"""Merges predictions of overlapping tiles of an image: joins split instances, and blends label maps without seams.

Instances of two tiles are joined if they agree in the tiles' overlap. Class scores are blended there: the weight of a
tile falls to 0 at its edge, which leaves no visible seam.

The maps are in files (`BlockMap`), so memory does not grow with the image.
"""

import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..model.resize_faim2f import bilinear_axis
from .prediction import Box, Segment

# Two instances are joined if their intersection over union in the overlap is at least this ...
LEAST_AGREEMENT = 0.5
# ... or if one is cut by its tile's edge, and at least this fraction of it in the overlap lies on the other.
LEAST_INSIDE = 0.7
# Number of scores that are blended at once.
MOST_SCORES = 1 << 23
# Side of a block of a map, in pixels.
BLOCK = 512

Place = tuple[int, int]  # row and column of a tile
Area = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the image; right and bottom are exclusive


@dataclass(frozen=True)
class Grid:
    """Square tiles over an image; the last row and column are shifted back to end with it. A small image is one tile.

    Args:
        size: (height, width) of the image in pixels.
        tile: side of a tile in pixels.
        overlap: fraction of a tile that it shares with the next, 0 to 0.5.
    """

    size: tuple[int, int]
    tile: int
    overlap: float

    @property
    def window(self) -> tuple[int, int]:
        """(height, width) of every tile in pixels."""
        return min(self.tile, self.size[0]), min(self.tile, self.size[1])

    def starts(self, axis: int) -> list[int]:
        """The first row (axis 0) or column (axis 1) of each tile."""
        side, window = self.size[axis], self.window[axis]
        step = max(1, round(self.tile * (1 - self.overlap)))
        return [*range(0, side - window, step), side - window]

    def places(self) -> Iterator[Place]:
        """Yields the tiles' places, row by row."""
        for row in range(len(self.starts(0))):
            for column in range(len(self.starts(1))):
                yield row, column

    def area(self, place: Place) -> Area:
        """The area of a tile."""
        top, left = self.starts(0)[place[0]], self.starts(1)[place[1]]
        return left, top, left + self.window[1], top + self.window[0]


@dataclass(eq=False)
class Fragment:
    """A segment of one tile, in pixels of the image."""

    place: Place
    class_id: int
    label: str
    score: float
    box: Box
    area: int
    mask: np.ndarray | None = field(repr=False)
    packed: bytes = field(default=b"", repr=False)
    parent: "Fragment | None" = field(default=None, repr=False)

    def pixels(self) -> np.ndarray:
        """The mask, (y_max - y_min + 1, x_max - x_min + 1) bool."""
        if self.mask is not None:
            return self.mask
        height, width = self.box[3] - self.box[1] + 1, self.box[2] - self.box[0] + 1
        bits = np.frombuffer(zlib.decompress(self.packed), dtype=np.uint8)
        return np.unpackbits(bits, count=height * width).view(np.bool_).reshape(height, width)

    def pack(self) -> None:
        """Compresses the mask."""
        if self.mask is not None:
            self.packed, self.mask = zlib.compress(np.packbits(self.mask).tobytes(), 1), None

    def inside(self, area: Area) -> np.ndarray | None:
        """(height, width) bool: the mask in an area; None if it has no pixels there."""
        left, top = max(area[0], self.box[0]), max(area[1], self.box[1])
        right, bottom = min(area[2], self.box[2] + 1), min(area[3], self.box[3] + 1)
        if left >= right or top >= bottom:
            return None
        part = self.pixels()[top - self.box[1] : bottom - self.box[1], left - self.box[0] : right - self.box[0]]
        if not part.any():
            return None
        found = np.zeros((area[3] - area[1], area[2] - area[0]), dtype=bool)
        found[top - area[1] : bottom - area[1], left - area[0] : right - area[0]] = part
        return found

    def root(self) -> "Fragment":
        """The fragment that represents the joined segment."""
        found = self
        while found.parent is not None:
            found = found.parent
        return found


class Merging:
    """Joins the segments of tiles, which are added row by row.

    Args:
        grid: the tiles.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.fragments: list[Fragment] = []
        self.live: dict[Place, list[Fragment]] = {}

    def add(self, place: Place, segments: Sequence[Segment]) -> None:
        """Adds the segments of a tile, whose coordinates are relative to it."""
        own_area = self.grid.area(place)
        left, top = own_area[:2]
        own = []
        for segment in segments:
            mask = segment.mask.numpy()
            area = int(np.count_nonzero(mask))
            if area:
                box = (segment.box[0] + left, segment.box[1] + top, segment.box[2] + left, segment.box[3] + top)
                own.append(Fragment(place, segment.class_id, segment.label, segment.score or 0.0, box, area, mask))
        for other, others in list(self.live.items()):
            other_area = self.grid.area(other)
            if other_area[3] <= top:
                for fragment in self.live.pop(other):
                    fragment.pack()
            elif shared := _shared(own_area, other_area):
                self._match(own, others, shared)
        self.live[place] = own
        self.fragments += own

    def groups(self) -> list[list[Fragment]]:
        """The fragments of each segment, largest first; call it after the last tile."""
        groups: dict[int, list[Fragment]] = {}
        for fragment in self.fragments:
            groups.setdefault(id(fragment.root()), []).append(fragment)
        return [sorted(group, key=lambda one: -one.area) for group in groups.values()]

    def _match(self, own: list[Fragment], others: list[Fragment], area: Area) -> None:
        """Joins fragments of two tiles that agree in their overlap."""
        found = []
        parts = [(one, part) for one in others if (part := one.inside(area)) is not None]
        for one in own:
            part = one.inside(area)
            if part is None:
                continue
            for other, other_part in parts:
                if common := int(np.count_nonzero(part & other_part)):
                    sizes = int(np.count_nonzero(part)), int(np.count_nonzero(other_part))
                    cut = self._is_cut(one, part, area), self._is_cut(other, other_part, area)
                    found.append((common / (sum(sizes) - common), one, other, common, sizes, cut))
        found.sort(key=lambda row: -row[0])
        taken: set[int] = set()
        for agreement, one, other, _, _, cut in found:
            same = one.class_id == other.class_id
            if agreement >= LEAST_AGREEMENT and (same or any(cut)) and not {id(one), id(other)} & taken:
                taken |= {id(one), id(other)}
                self._join(one, other)
        for _, one, other, common, sizes, cut in found:
            # Joins a cut fragment to a larger one of another tile that covers most of it.
            for piece, whole, size, is_cut in ((one, other, sizes[0], cut[0]), (other, one, sizes[1], cut[1])):
                fits = piece.class_id == whole.class_id or piece.area < whole.area
                if is_cut and id(piece) not in taken and fits and common >= LEAST_INSIDE * size:
                    taken.add(id(piece))
                    self._join(piece, whole)

    def _is_cut(self, fragment: Fragment, part: np.ndarray, area: Area) -> bool:
        """Whether a fragment touches an edge of its tile in the overlap, beyond which the image continues."""
        left, top, right, bottom = self.grid.area(fragment.place)
        height, width = self.grid.size
        return bool(
            (left > 0 and area[0] == left and part[:, 0].any())
            or (right < width and area[2] == right and part[:, -1].any())
            or (top > 0 and area[1] == top and part[0].any())
            or (bottom < height and area[3] == bottom and part[-1].any())
        )

    @staticmethod
    def _join(one: Fragment, other: Fragment) -> None:
        first, second = one.root(), other.root()
        if first is not second:
            first.parent = second


class ClassScores:
    """The scores of all classes over a tile.

    Args:
        table: (C, h, w); `read` resizes it to the tile.
        size: (height, width) of the tile.
    """

    def __init__(self, table: Tensor, size: tuple[int, int]) -> None:
        self.table, self.first = table, 0
        self.down, self.across = (bilinear_axis(a, b) for a, b in zip(table.shape[1:], size, strict=True))

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        """(C, bottom - top, right - left), in the tile's pixels."""
        axis = self.down
        low, high, weight = (values[top:bottom] for values in axis)
        rows = torch.lerp(self.table[:, low - self.first], self.table[:, high - self.first], weight[:, None])
        low, high, weight = (values[left:right] for values in self.across)
        return torch.lerp(rows[:, :, low], rows[:, :, high], weight)

    def keep_below(self, top: int) -> None:
        """Frees the scores above a row."""
        first = int(self.down.low[top])
        if first > self.first:
            self.table, self.first = self.table[:, first - self.first :].clone(), first


class Votes:
    """The classes of a tile as scores: 1 for a pixel's class, and 0 for all others and for -1.

    Args:
        labels: (height, width) class ids, -1 for none.
        classes: number of classes.
    """

    def __init__(self, labels: np.ndarray, classes: int) -> None:
        self.labels, self.classes, self.first = labels.astype(np.int16), classes, 0

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        """(classes, bottom - top, right - left) float32, in the tile's pixels."""
        part = torch.from_numpy(self.labels[top - self.first : bottom - self.first, left:right].astype(np.int64))
        scores = torch.zeros(self.classes + 1, *part.shape)
        return scores.scatter_(0, (part + 1)[None], 1.0)[1:]

    def keep_below(self, top: int) -> None:
        """Frees the labels above a row."""
        if top > self.first:
            self.labels, self.first = self.labels[top - self.first :].copy(), top


class BlockMap:
    """A map (H, W) of numbers from 0 in a temporary file, which is removed when it is closed; at first all are 0.

    Args:
        size: (H, W) in pixels.
        kind: the numbers' type.
        folder: an existing folder for the file.
    """

    def __init__(self, size: tuple[int, int], kind: Any, folder: Path) -> None:
        self.size, self.kind = size, np.dtype(kind)
        self.columns = -(-size[1] // BLOCK)
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, closed by `__exit__`
        self.bytes = BLOCK * BLOCK * self.kind.itemsize
        self.file.truncate(-(-size[0] // BLOCK) * self.columns * self.bytes)  # sparse: takes no space until written

    def read(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """The numbers of a window, (height, width)."""
        window = np.empty((height, width), dtype=self.kind)
        for place, inside, outside in self._parts(top, left, height, width):
            window[outside] = self._block(place)[inside]
        return window

    def write(self, top: int, left: int, window: np.ndarray, where: np.ndarray | None = None) -> None:
        """Writes a window (h, w), or only those of its pixels where the mask (h, w) is true."""
        height, width = window.shape
        for place, inside, outside in self._parts(top, left, height, width):
            if where is not None and not where[outside].any():
                continue
            block = self._block(place)
            if where is None:
                block[inside] = window[outside]
            else:
                np.copyto(block[inside], window[outside], where=where[outside])
            self.file.seek(place)
            self.file.write(block.tobytes())

    def bands(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yields the first row of each band, and the band, (rows, W)."""
        for top in range(0, self.size[0], BLOCK):
            yield top, self.read(top, 0, min(BLOCK, self.size[0] - top), self.size[1])

    def _block(self, place: int) -> np.ndarray:
        self.file.seek(place)
        return np.frombuffer(bytearray(self.file.read(self.bytes)), dtype=self.kind).reshape(BLOCK, BLOCK)

    def _parts(
        self, top: int, left: int, height: int, width: int
    ) -> Iterator[tuple[int, tuple[slice, slice], tuple[slice, slice]]]:
        """The blocks of a window: place in the file, rows and columns in the block, rows and columns in the window."""
        for row in range(top // BLOCK, -(-(top + height) // BLOCK)):
            rows, own_rows = _block_part(row * BLOCK, top, height)
            for column in range(left // BLOCK, -(-(left + width) // BLOCK)):
                columns, own_columns = _block_part(column * BLOCK, left, width)
                yield (row * self.columns + column) * self.bytes, (rows, columns), (own_rows, own_columns)

    def __enter__(self) -> "BlockMap":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def _block_part(block: int, start: int, length: int) -> tuple[slice, slice]:
    """The intersection of a block and a window along one axis, relative to the block and to the window."""
    first, last = max(block, start), min(block + BLOCK, start + length)
    return slice(first - block, last - block), slice(first - start, last - start)


def free_bytes(folder: Path) -> int:
    """Free bytes on a folder's disk."""
    return shutil.disk_usage(folder).free


class Blend:
    """Writes the class of each pixel, from the scores of tiles that are added row by row.

    Scores are kept only until the last tile that overlaps them has been added.

    Args:
        grid: the tiles.
        labels: the map to write: 1 + class id, 0 for none.
    """

    def __init__(self, grid: Grid, labels: BlockMap) -> None:
        self.grid, self.labels = grid, labels
        self.starts = grid.starts(0), grid.starts(1)
        self.tiles: dict[Place, Any] = {}
        # Intervals of each axis that the same tiles cover: start, end, tiles.
        self.parts = tuple(self._parts(axis) for axis in (0, 1))

    def add(self, place: Place, scores: ClassScores | Votes) -> None:
        """Adds a tile's scores, and writes the pixels that no later tile covers."""
        self.tiles[place] = scores
        for top, bottom, rows in self.parts[0]:
            for left, right, columns in self.parts[1]:
                if (rows[-1], columns[-1]) == place:
                    self._write((left, top, right, bottom), [(row, column) for row in rows for column in columns])
        for other in list(self.tiles):
            self._forget(other, place)

    def _parts(self, axis: int) -> list[tuple[int, int, list[int]]]:
        starts, window = self.starts[axis], self.grid.window[axis]
        edges = sorted({*starts, *(start + window for start in starts)})
        return [
            (first, last, [number for number, start in enumerate(starts) if start <= first < start + window])
            for first, last in pairwise(edges)
        ]

    def _write(self, area: Area, places: Sequence[Place]) -> None:
        left, top, right, bottom = area
        across = {place: self._weights(1, place[1], left, right) for place in places}
        classes = 0
        while top < bottom:
            most = max(1, MOST_SCORES // (max(1, classes) * (right - left))) if classes else 16
            below = min(bottom, top + most)
            total: Any = None
            for place in places:
                x, y, *_ = self.grid.area(place)
                scores = self.tiles[place].read(top - y, below - y, left - x, right - x)
                if len(places) > 1:
                    scores = scores * (self._weights(0, place[0], top, below)[:, None] * across[place])
                total = scores if total is None else total.add_(scores)
            classes = len(total)
            best, chosen = total.max(0)
            found = torch.where(best > 0, chosen + 1, 0)
            self.labels.write(top, left, found.numpy().astype(self.labels.kind))
            top = below

    def _weights(self, axis: int, number: int, first: int, last: int) -> Tensor:
        """(last - first,): the weights of a row or column of tiles at these positions, which fall to 0 at its edges."""
        starts, window = self.starts[axis], self.grid.window[axis]
        place = torch.arange(first, last) + 0.5
        weights = torch.ones(last - first)
        if number > 0:
            shared = starts[number - 1] + window - starts[number]
            weights = torch.minimum(weights, (place - starts[number]) / max(1, shared))
        if number + 1 < len(starts):
            shared = starts[number] + window - starts[number + 1]
            weights = torch.minimum(weights, (starts[number] + window - place) / max(1, shared))
        return weights

    def _forget(self, place: Place, newest: Place) -> None:
        """Frees the scores of a tile that have been written."""
        below = [first for first, _, rows in self.parts[0] if place[0] in rows and rows[-1] > newest[0]]
        beside = [columns for _, _, columns in self.parts[1] if place[1] in columns and columns[-1] > newest[1]]
        if place[0] < newest[0] and not below and not beside:
            del self.tiles[place]
        elif place[0] == newest[0] and not beside:
            if below:
                self.tiles[place].keep_below(below[0] - self.starts[0][place[0]])
            else:
                del self.tiles[place]


def _shared(one: Area, other: Area) -> Area | None:
    left, top = max(one[0], other[0]), max(one[1], other[1])
    right, bottom = min(one[2], other[2]), min(one[3], other[3])
    return (left, top, right, bottom) if left < right and top < bottom else None


__all__ = ["BLOCK", "Blend", "BlockMap", "ClassScores", "Fragment", "Grid", "Merging", "Votes", "free_bytes"]

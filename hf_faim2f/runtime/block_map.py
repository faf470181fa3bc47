"""Maps of large pictures: kept on disk in square blocks, and written as PNG in bands of rows.

Neither takes memory in proportion to the picture.
"""

import os
import struct
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

# Side of a block, in pixels.
BLOCK = 512
# zlib's strategy that looks for runs only, as in `prediction_files`.
COMPRESSION, RUN_LENGTHS = 3, 3


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
        self.file.truncate(-(-size[0] // BLOCK) * self.columns * self.bytes)  # takes no room before it is written

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
        """Yields bands of whole rows with the first row of each."""
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
            rows, own_rows = _shared(row * BLOCK, top, height)
            for column in range(left // BLOCK, -(-(left + width) // BLOCK)):
                columns, own_columns = _shared(column * BLOCK, left, width)
                yield (row * self.columns + column) * self.bytes, (rows, columns), (own_rows, own_columns)

    def __enter__(self) -> "BlockMap":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def _shared(block: int, start: int, length: int) -> tuple[slice, slice]:
    """What a block and a window share along one axis: in the block, and in the window."""
    first, last = max(block, start), min(block + BLOCK, start + length)
    return slice(first - block, last - block), slice(first - start, last - start)


def write_png(file: BinaryIO, size: tuple[int, int], bands: Iterable[np.ndarray]) -> None:
    """Writes a gray PNG (ISO/IEC 15948) from bands of rows, whose type gives the depth.

    Args:
        file: binary, open for writing.
        size: (height, width) in pixels.
        bands: (rows, width), uint8 or uint16, from the top.
    """
    file.write(b"\x89PNG\r\n\x1a\n")
    packer = zlib.compressobj(COMPRESSION, zlib.DEFLATED, 15, 9, RUN_LENGTHS)
    begun = False
    for band in bands:
        if not begun:
            header = struct.pack(">IIBBBBB", size[1], size[0], 8 * band.dtype.itemsize, 0, 0, 0, 0)
            _chunk(file, b"IHDR", header)
            begun = True
        rows = band.astype(band.dtype.newbyteorder(">")).view(np.uint8).reshape(len(band), -1)
        # Each row begins with the number of its filter: none.
        _chunk(file, b"IDAT", packer.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes()))
    _chunk(file, b"IDAT", packer.flush())
    _chunk(file, b"IEND", b"")
    file.flush()


def _chunk(file: BinaryIO, name: bytes, content: bytes) -> None:
    if content or name == b"IEND":
        file.write(struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content)))


def free_bytes(folder: Path) -> int:
    """The room on a folder's disk; 2**63 where that is not known."""
    if not hasattr(os, "statvfs"):
        return 1 << 63
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


__all__ = ["BlockMap", "free_bytes", "write_png"]

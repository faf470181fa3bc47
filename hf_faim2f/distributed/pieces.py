"""What a part is made of: image files, and rows of files that hold many images. A plan stores it; workers read it."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

SCHEMA = pa.schema(
    [
        pa.field("path", pa.binary(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("first", pa.int64(), nullable=False),
        pa.field("count", pa.int64(), nullable=False),
        pa.field("column", pa.string()),
        pa.field("repo", pa.string()),
        pa.field("revision", pa.string()),
    ]
)


@dataclass(frozen=True)
class Piece:
    """An image file, or rows that follow each other in a Parquet file or in a data set that `datasets` saved.

    Args:
        path: where it is, absolute; of a data set of the Hub, within it.
        key: names the file in the results; a row's own key is `key#row`.
        first: the first row, from 0.
        count: how many rows; of an image file 1.
        column: the rows' column of images; None of an image file.
        repo, revision: the data set of the Hub that the file belongs to, and its commit; None of a local file.
    """

    path: str
    key: str
    first: int = 0
    count: int = 1
    column: str | None = None
    repo: str | None = None
    revision: str | None = None

    def image_keys(self) -> list[str]:
        """The key of each image."""
        if self.column is None:
            return [self.key]
        return [f"{self.key}#{row}" for row in range(self.first, self.first + self.count)]


def printable(path: str) -> str:
    """A path as text that every file and terminal takes; a name that is no UTF-8 shows its bytes as `\\xff`."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def into_parts(pieces: Sequence[Piece], size: int) -> Iterator[list[Piece]]:
    """Pieces for each part, in their order: `size` images, and fewer in the last part of image files or of a file."""
    files: list[Piece] = []
    for piece in pieces:
        if piece.column is None:
            files.append(piece)
            if len(files) == size:
                yield files
                files = []
            continue
        if files:
            yield files
            files = []
        for start in range(0, piece.count, size):
            yield [replace(piece, first=piece.first + start, count=min(size, piece.count - start))]
    if files:
        yield files


def to_batch(pieces: Sequence[Piece]) -> pa.RecordBatch:
    """The pieces of a part, as a plan stores them."""
    columns: dict[str, list[object]] = {name: [getattr(one, name) for one in pieces] for name in SCHEMA.names}
    columns["path"] = [os.fsencode(one.path) for one in pieces]
    return pa.RecordBatch.from_pydict(columns, SCHEMA)


def from_batch(batch: pa.RecordBatch) -> list[Piece]:
    """The pieces that `to_batch` stored."""
    return [Piece(**{**row, "path": os.fsdecode(row["path"])}) for row in batch.to_pylist()]


__all__ = ["SCHEMA", "Piece", "from_batch", "into_parts", "printable", "to_batch"]

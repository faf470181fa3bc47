"""What a part is made of: image files, and rows of files that hold many images. A plan stores it; workers read it."""

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import hf_hub_download

from ..errors import BulkError, first_line

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


# The images of a part, one after the other: read as they are asked for, and never more than a few of a file's rows.

# Rows that are in memory together; images are large.
ROWS_AT_ONCE = 8
# Of an image's file within a row; one that is larger is no photograph.
MOST_BYTES = 1 << 30


class Entry(NamedTuple):
    """An image, or why there is none.

    Args:
        key: as in the results.
        file: the name that its row has for it.
        source: the path of a file, or an open one; None if there is none.
        error: one sentence, or None.
    """

    key: str
    file: str | None
    source: Any
    error: str | None


def read_pieces(pieces: Sequence[Piece]) -> Iterator[Entry]:
    """The images of a part in order, as many as the pieces say.

    Raises:
        BulkError: a file of rows is not here, or not what it was.
    """
    for piece in pieces:
        if piece.column is None:
            yield Entry(piece.key, None, piece.path, None)
            continue
        path = _place(piece)
        rows = _saved_rows(path, piece) if path.is_dir() else _parquet_rows(path, piece)
        read = 0
        for key, value in zip(piece.image_keys(), rows, strict=False):
            yield _entry(key, value)
            read += 1
        if read < piece.count:
            raise BulkError(f"{piece.key} has fewer rows than when the run began: begin anew in another folder.")


def _place(piece: Piece) -> Path:
    """Where a file of rows is on this machine; from the Hub it is downloaded, where it is not yet."""
    if piece.repo is None:
        path = Path(piece.path)
        if not path.exists():
            raise BulkError(
                f"There is no {printable(piece.path)} on a machine of the cluster: put it where all of them see it."
            )
        return path
    try:
        return Path(hf_hub_download(piece.repo, piece.path, repo_type="dataset", revision=piece.revision))
    except Exception as error:  # whatever the network and the library make of it
        raise BulkError(f"{piece.key} cannot be had of the Hub: {first_line(error)}.") from error


def _entry(key: str, value: Any) -> Entry:
    """An image of a row: bytes, or bytes and a name. A stranger wrote the rows, and could name any file in place of
    bytes: none is opened."""
    if isinstance(value, str):
        return Entry(key, None, None, f"{key} {value}")
    data, name = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (value, None)
    name = None if name is None else printable(str(name))
    if data is None and name is not None:
        return Entry(key, name, None, f"{key} names the file {name} in place of an image's contents: it is not read.")
    if not data:
        return Entry(key, name, None, f"{key} has no image: it is empty.")
    if len(data) > MOST_BYTES:
        return Entry(key, name, None, f"{key} has {len(data)} bytes, more than an image may have here.")
    return Entry(key, name, io.BytesIO(data), None)


def _parquet_rows(path: Path, piece: Piece) -> Iterator[Any]:
    """The entries of the column in the piece's rows; of a row that cannot be read, a text that says so."""
    try:
        file = pq.ParquetFile(path, pre_buffer=False)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise BulkError(f"{piece.key} cannot be read as a Parquet file: {first_line(error)}.") from error
    with file:
        start = 0
        end = piece.first + piece.count
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            low, high = max(piece.first - start, 0), min(end - start, rows)
            if low < high:
                yield from _rows_of_group(file, group, piece, low, high)
            start += rows


def _rows_of_group(file: pq.ParquetFile, group: int, piece: Piece, low: int, high: int) -> Iterator[Any]:
    """Rows `low` to `high` of a group; after one that is damaged, none of it can be read."""
    place = 0
    try:
        for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[piece.column]):
            before, place = place, place + batch.num_rows
            if place > low:
                own = batch.column(0)[max(low - before, 0) : high - before]
                yield from map(_plain, own)
            if place >= high:
                break
    except (OSError, pa.ArrowException, ValueError) as error:
        reason = f"cannot be read: {first_line(error)}."
        yield from [reason] * (high - max(low, place))


def _plain(value: pa.Scalar) -> Any:
    """An entry, or a text that says why it cannot be read: names in it may be no UTF-8."""
    try:
        return value.as_py()
    except ValueError as error:
        return f"cannot be read: {first_line(error)}."


def _saved_rows(path: Path, piece: Piece) -> Iterator[Any]:
    # Most runs have none, and it takes long to import.
    import datasets

    try:
        data = datasets.load_from_disk(str(path)).select_columns([piece.column])
        if isinstance(data.features[piece.column], datasets.Image):
            data = data.cast_column(piece.column, datasets.Image(decode=False))
    except Exception as error:  # its files may be anything
        raise BulkError(f"{piece.key} cannot be read as a data set that `datasets` saved: {first_line(error)}."
                        ) from error  # fmt: skip
    for row in range(piece.first, min(piece.first + piece.count, len(data))):
        yield data[row][piece.column]


__all__ = ["SCHEMA", "Entry", "Piece", "from_batch", "into_parts", "printable", "read_pieces", "to_batch"]

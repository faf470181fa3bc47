"""The images of a part, one after the other: read as they are asked for, and never more than a few of a file's rows."""

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import hf_hub_download

from ..runtime.network import first_line
from .errors import BulkError
from .pieces import Piece, printable

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


__all__ = ["Entry", "read_pieces"]

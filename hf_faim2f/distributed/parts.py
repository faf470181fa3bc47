"""A part of a run: its images, and the Parquet file with their predictions.

The Parquet file has one row per image:

==========  ==========================================================================================================
key         identifies the image within the run: the path of an image file as it was given or found; for a row of a
            dataset, the path of its file and the row's number, as in `data/train.parquet#17`
file        the file name of the image in the dataset's row; null if there is none
height      of the image in pixels, upright by its EXIF orientation; null if the image cannot be used
width       likewise
subtask     "semantic", "instance" or "panoptic"
error       null, or one sentence on why there is no prediction
segments    class_id, label, score (null for semantic classes), box (x_min, y_min, x_max, y_max in pixels, inclusive),
            area in pixels, and segmentation: COCO's compressed run lengths {size, counts}, for `pycocotools`
==========  ==========================================================================================================

`to_pylist()` gives `segments` in the form of `Prediction.to_json()`. The file's metadata holds the run's settings as
JSON under the key `faim2f`.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..files import write_whole

SEGMENT = pa.struct(
    [
        pa.field("class_id", pa.int32(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("score", pa.float64()),
        pa.field("box", pa.list_(pa.int32()), nullable=False),
        pa.field("area", pa.int64(), nullable=False),
        pa.field("segmentation", pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())]), nullable=False),
    ]
)
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("file", pa.string()),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("subtask", pa.string()),
        pa.field("error", pa.string()),
        pa.field("segments", pa.list_(SEGMENT), nullable=False),
    ]
)
METADATA = b"faim2f"
PIECES_SCHEMA = pa.schema(
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
    """An image file, or consecutive rows of a Parquet file or of a dataset saved by `datasets`.

    Args:
        path: the absolute path; for a dataset on the Hub, the path within its repository.
        key: identifies the file in the results; the key of a row is `key#row`.
        first: the first row, counted from 0.
        count: number of rows; 1 for an image file.
        column: the column of images; None for an image file.
        repo, revision: the dataset on the Hub that the file belongs to, and its commit; None for a local file.
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


def escape_path(path: str) -> str:
    """A path as printable text: unprintable characters and bytes that are not UTF-8 are escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def into_parts(pieces: Sequence[Piece], size: int) -> Iterator[list[Piece]]:
    """Divides pieces into parts of `size` images, in order. The last part of the image files, and that of each file of
    rows, may have fewer."""
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
    """The pieces of a part in the plan's format."""
    columns: dict[str, list[object]] = {name: [getattr(one, name) for one in pieces] for name in PIECES_SCHEMA.names}
    columns["path"] = [os.fsencode(one.path) for one in pieces]
    return pa.RecordBatch.from_pydict(columns, PIECES_SCHEMA)


def from_batch(batch: pa.RecordBatch) -> list[Piece]:
    """The inverse of `to_batch`."""
    return [Piece(**{**row, "path": os.fsdecode(row["path"])}) for row in batch.to_pylist()]


def write_part(path: Path, rows: Sequence[dict[str, Any]], about: dict[str, Any], beside: Path) -> None:
    """Writes the Parquet file of a part atomically.

    Args:
        path: the file.
        rows: rows that match `SCHEMA`.
        about: plain data for the file's metadata; the number of rows with an error is added.
        beside: a folder on the same file system, for the temporary file.

    Raises:
        OSError: it cannot be written.
    """
    about = {**about, "errors": sum(row["error"] is not None for row in rows)}
    schema = SCHEMA.with_metadata({METADATA: json.dumps(about).encode()})
    table = pa.Table.from_pylist(list(rows), schema)
    write_whole(path, lambda file: pq.write_table(table, file, compression="zstd"), beside=beside, durable=True)


def describe_part(path: Path) -> tuple[int, dict[str, Any]] | None:
    """Reads the number of rows and the metadata of a part; None if the file is missing or damaged."""
    try:
        found = pq.read_metadata(path)
        about = json.loads((found.metadata or {})[METADATA])
    except (OSError, pa.ArrowException, KeyError, ValueError):
        return None
    return (found.num_rows, about) if isinstance(about, dict) else None


def errors_of(path: Path) -> list[str]:
    """The error messages of the unusable images in a part."""
    return [text for text in pq.read_table(path, columns=["error"])["error"].to_pylist() if text is not None]


__all__ = [
    "METADATA",
    "PIECES_SCHEMA",
    "SCHEMA",
    "Piece",
    "describe_part",
    "errors_of",
    "escape_path",
    "from_batch",
    "into_parts",
    "to_batch",
    "write_part",
]

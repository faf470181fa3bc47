"""The results: Parquet files of one row an image.

==========  ==========================================================================================================
key         names the image, once in the whole run: an image file's path as it was given or found, and of a row of a
            data set the file's and the row's number, `data/train.parquet#17`
file        the name that the image has in its row of the data set; null where it has none
height      of the image in pixels, upright by its EXIF orientation; null where it cannot be used
width       likewise
subtask     "semantic", "instance" or "panoptic"
error       null, or in one sentence why there is no prediction
segments    class_id, label, score (null of semantic classes), box (x_min, y_min, x_max, y_max in pixels, inclusive),
            area in pixels, and segmentation: COCO's compressed run lengths {size, counts}, as `pycocotools` takes them
==========  ==========================================================================================================

`segments` read by `to_pylist()` are what `Prediction.to_json()` gives. The file's metadata has under `faim2f` the run's
settings as JSON.
"""

import json
from collections.abc import Sequence
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


def write_part(path: Path, rows: Sequence[dict[str, Any]], about: dict[str, Any], beside: Path) -> None:
    """Writes a part, whole or not at all.

    Args:
        rows: as `SCHEMA` has them.
        about: plain data for the file's metadata; how many rows have errors is added.
        beside: a folder of the same file system, for what is not finished.

    Raises:
        OSError: it cannot be written.
    """
    about = {**about, "errors": sum(row["error"] is not None for row in rows)}
    schema = SCHEMA.with_metadata({METADATA: json.dumps(about).encode()})
    table = pa.Table.from_pylist(list(rows), schema)
    write_whole(path, lambda file: pq.write_table(table, file, compression="zstd"), beside=beside, durable=True)


def describe_part(path: Path) -> tuple[int, dict[str, Any]] | None:
    """Number of rows and metadata of a part, from its last bytes; None where there is none, or it is damaged."""
    try:
        found = pq.read_metadata(path)
        about = json.loads((found.metadata or {})[METADATA])
    except (OSError, pa.ArrowException, KeyError, ValueError):
        return None
    return (found.num_rows, about) if isinstance(about, dict) else None


def errors_of(path: Path) -> list[str]:
    """The sentences of a part's images that could not be used."""
    return [text for text in pq.read_table(path, columns=["error"])["error"].to_pylist() if text is not None]


__all__ = ["METADATA", "SCHEMA", "describe_part", "errors_of", "write_part"]

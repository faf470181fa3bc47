"""Entries of a row, in the forms in which data sets store them."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import datasets

from ..errors import DatasetError
from ..files import UNNAMED, Source

IMAGE_FEATURE = datasets.Image(decode=False)
# What the readers of folders and annotation files write for each image.
ROW_FEATURES = {"image": IMAGE_FEATURE, "file_name": datasets.Value("string"), "image_id": datasets.Value("string")}


def source_of(value: Any) -> Source:
    """An undecoded image, from a column of images or of bytes."""
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if isinstance(value, Mapping):
        return value
    raise DatasetError(
        f"{UNNAMED} has {'nothing' if value is None else type(value).__name__} where an image is expected: the column "
        "is empty there, or another."
    )


def identity(row: Mapping[str, Any], image: str) -> tuple[int | str, str]:
    """(image id, file name) of a row. Where it has no file name, that is its image's, or, without one, its id."""
    image_id = row["image_id"]
    path = str(source_of(row[image]).get("path") or "")
    return image_id, row.get("file_name") or PurePath(path).name or str(image_id)

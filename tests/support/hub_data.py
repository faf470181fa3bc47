"""Datasets in the Hub's form: rows with embedded images, in memory or in Parquet files."""

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
from PIL import Image

from tests.support.image_files import photo

MASK = np.array([[0, 1, 1], [255, 0, 2]], dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def rows(count: int = 3, image: str = "image", annotation: str = "annotation") -> dict[str, list[Any]]:
    return {
        image: [{"bytes": png(photo(2, 3, k)), "path": f"picture-{k}.png"} for k in range(count)],
        annotation: [{"bytes": png(MASK), "path": f"map-{k}.png"} for k in range(count)],
    }


def write_parquet(path: Path, columns: dict[str, list[Any]], as_images: bool = True) -> Path:
    """Writes a Parquet file with the Hub's metadata, or with plain structs, as other tools do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if as_images:
        features = {
            name: datasets.Image() if isinstance(values[0], dict) else datasets.Value("string")
            for name, values in columns.items()
        }
        datasets.Dataset.from_dict(columns, datasets.Features(features)).to_parquet(str(path))
    else:
        pa.parquet.write_table(pa.table(columns), path)
    return path


def memory(count: int, paths: list[str | None] | None = None) -> datasets.Dataset:
    """A `datasets.Dataset` with images in memory: without file names, unless some are given."""
    columns = {
        "image": [
            {"bytes": png(photo(2, 3, k)), "path": None if paths is None else paths[k]} for k in range(count)
        ],
        "label": [{"bytes": png(MASK), "path": None}] * count,
    }  # fmt: skip
    return datasets.Dataset.from_dict(columns, datasets.Features({name: datasets.Image() for name in columns}))

"""Small image files: random pictures, written as any mode, whole or truncated."""

from pathlib import Path

import numpy as np
from PIL import Image


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Some RGB picture, uint8 (height, width, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path: Path, array: np.ndarray, mode: str | None = None, **options: object) -> Path:
    """Writes an array as an image, in a folder that is made for it; `mode` "P" takes it as indices of a palette."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if mode == "P":
        image.putpalette([value for index in range(256) for value in (index * 7 % 256, index * 13 % 256, index)])
    image.save(path, **options)  # type: ignore[arg-type]
    return path


def truncate(path: Path) -> None:
    """Leaves the first half of a file."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])

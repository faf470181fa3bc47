"""Small image files: random pictures, saved in any mode, complete or truncated."""

from pathlib import Path

import numpy as np
from PIL import Image


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A random RGB picture, uint8 (height, width, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path: Path, array: np.ndarray, mode: str | None = None, **options: object) -> Path:
    """Saves an array as an image, and creates its folder; with `mode` "P" the values are palette indices."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if mode == "P":
        image.putpalette([value for index in range(256) for value in (index * 7 % 256, index * 13 % 256, index)])
    image.save(path, **options)  # type: ignore[arg-type]
    return path


def truncate(path: Path) -> None:
    """Truncates a file to its first half."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])

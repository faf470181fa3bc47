"""A file that appears whole or not at all, also to other machines, and also where this one loses its power."""

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, write: Callable[[BinaryIO], object], beside: Path) -> None:
    """Calls `write` with a file in the folder `beside`, and gives it the name `path` when all of it is on the disk.

    Two that write the same path do not meet: each has a file of its own, and the last to finish is what stays.

    Raises:
        OSError: it cannot be written.
    """
    partial = beside / f"{path.name}.{uuid.uuid4().hex}"
    try:
        with partial.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


__all__ = ["write_whole"]

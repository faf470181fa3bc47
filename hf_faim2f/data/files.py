"""Files of a data set, read with distrust: every failure is a `DatasetError` that names the file.

Images are turned upright by their EXIF orientation, maps too, as the image processor and the `datasets` library do.
Neither is decoded if it claims more pixels than Pillow takes for safe.
"""

import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

import torch
from PIL import Image
from torch import Tensor

from ..find_files import files_below
from ..model.image_loading_faim2f import EXIF_ORIENTATION, load_images, load_segmentation_maps
from ..text_file import read_text
from .errors import DatasetError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
# An image as `datasets` stores it undecoded: where the file is, or its bytes with the name that it had.
Source = Mapping[str, Any]
# What an image is called that has no file.
UNNAMED = "an image without file name"


def path_inside(root: Path, name: Any, named_by: str) -> Path:
    """`root / name`, for a name that stands in a file of the data set.

    Only the name is judged: a link within `root` was put there by whoever set up the folder, and is followed.

    Raises:
        DatasetError: the name leads, or on another system could lead, out of `root`.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise DatasetError(f"{named_by} names {name!r} as a file, which is no file name.")
    windows = PureWindowsPath(name)
    if PurePosixPath(name).is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        raise DatasetError(f"{named_by} names the file {name!r}, which lies outside of {root}: it is not read.")
    return root / name


def file_source(path: Path) -> dict[str, Any]:
    """`path` as an entry of a column of undecoded images."""
    return {"bytes": None, "path": str(path)}


def source_name(source: Source) -> str:
    """What to call an image in a message."""
    return str(source.get("path") or UNNAMED)


def list_images(folder: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> list[Path]:
    """The image files in `folder` and below it, by name.

    Raises:
        DatasetError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise DatasetError(f"There is no folder {folder}.")
    # What is hidden is left out, such as "._name.jpg", which macOS leaves beside a file on a foreign disk.
    found = sorted(path for path in files_below(folder) if path.suffix.lower() in suffixes)
    if not found:
        raise DatasetError(f"{folder} has no image ({', '.join(suffixes)}).")
    return found


def read_image(source: Source) -> Tensor:
    """(3, H, W) uint8, RGB. Gray becomes RGB, alpha is dropped, 16 bits become 8, as in the image processor."""
    with _opened(source) as file:
        pixels = _named(source, "image 0", lambda: next(load_images([file])))
    # Only images of 16 bits have fractions here; none has a value outside of 0..255, but some kinds of TIFF.
    return pixels.round().clamp_(0, 255).to(torch.uint8).expand(3, -1, -1).contiguous()


def read_map(source: Source, height: int, width: int) -> Tensor:
    """(height, width) uint8 or int64: the integer at each pixel of an image with one channel, or a palette's index."""
    with _opened(source) as file:
        return _named(source, "segmentation map 0", lambda: load_segmentation_maps([file], [(height, width)]))[0]


def size_of(source: Source) -> tuple[int, int]:
    """(height, width) of an image or a map, upright by its EXIF orientation, from its header alone.

    The orientation of a PNG is missed where it stands behind the pixels.
    """
    with _opened(source) as file:
        try:
            with Image.open(file) as image:
                width, height = image.size
                # PNG's own method decodes the image, to find what stands behind it.
                turned = Image.Image.getexif(image).get(EXIF_ORIENTATION, 1) in range(5, 9)
        except Exception as error:
            raise DatasetError(f"{source_name(source)} cannot be opened as an image: {error}.") from error
    return (width, height) if turned else (height, width)


def read_colors(source: Source, height: int, width: int) -> Tensor:
    """(3, height, width) int64: the colors of a map that has three channels and keeps its ids in them."""
    with _opened(source) as file:
        colors = _named(source, "image 0", lambda: next(load_images([file])))
    if len(colors) != 3:
        raise DatasetError(f"{source_name(source)} has one channel, but its ids are expected in the channels of RGB.")
    if tuple(colors.shape[-2:]) != (height, width):
        raise DatasetError(
            f"{source_name(source)} is {colors.shape[-2]}x{colors.shape[-1]} pixels, but its image {height}x{width} "
            "(height x width): they must agree."
        )
    return colors.to(torch.int64)


def has_colors(source: Source) -> bool:
    """Whether a map has several channels, from its header alone."""
    with _opened(source) as file:
        try:
            with Image.open(file) as image:
                return image.mode in ("RGB", "RGBA")
        except Exception as error:
            raise DatasetError(f"{source_name(source)} cannot be opened as an image: {error}.") from error


def is_transparent(source: Source) -> bool:
    """Whether a map with colors has pixels that are not opaque. One without alpha is not decoded for that."""
    with _opened(source) as file:
        try:
            with Image.open(file) as image:
                return image.mode == "RGBA" and any(image.getchannel("A").histogram()[:255])
        except Exception as error:
            raise DatasetError(f"{source_name(source)} cannot be opened as an image: {error}.") from error


def read_json(path: Path) -> Any:
    """The contents of a JSON file."""
    try:
        return json.loads(read_text(path))
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path} is not JSON: {error}.") from error


@contextmanager
def _opened(source: Source) -> Iterator[BinaryIO]:
    data, path = source.get("bytes"), source.get("path")
    if data is not None:
        yield io.BytesIO(data)
        return
    if not path:
        raise DatasetError("An image has neither a file name nor contents: its row of the data set is empty.")
    # A pipe or a device would be waited for, perhaps for ever.
    if not Path(path).is_file():
        raise DatasetError(f"There is no file {path}.")
    try:
        file = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror or error}.") from error
    with file:
        yield file


def _named(source: Source, label: str, read: Callable[[], Any]) -> Any:
    """What `read` gives; where it calls the image `label`, its error calls it by its name."""
    try:
        return read()
    except ValueError as error:
        raise DatasetError(str(error).replace(label, source_name(source), 1)) from error

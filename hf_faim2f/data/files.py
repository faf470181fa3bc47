"""Files of a data set, read with distrust: every failure is a `DatasetError` that names the file.

Images are turned upright by their EXIF orientation, maps too, as the image processor and the `datasets` library do.
Neither is decoded if it claims more pixels than Pillow takes for safe.

Annotations without an orientation of their own may have been made on an image that was shown upright, or on its pixels
as they are stored. Their size decides where the two differ: annotations of the stored pixels are turned with them.
Where it cannot (EXIF orientations 2, 3 and 4, and all of square images), they are taken as the reader's
`annotation_frame` says, and without it as upright, with a warning.
"""

import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.utils import logging

from ..errors import DatasetError
from ..files import files_below, read_text
from ..model.image_files_faim2f import EXIF_TURNS
from ..model.image_loading_faim2f import (
    IMAGE_SUFFIXES,
    Decoded,
    decode_image,
    exif_orientation,
    load_images,
    load_segmentation_maps,
    open_image,
)

logger = logging.get_logger(__name__)

# An image as `datasets` stores it undecoded: where the file is, or its bytes (or an open file over them) with the name
# that it had. A map's may also have the entries that `read_pair` adds.
Source = Mapping[str, Any]
# What an image is called that has no file.
UNNAMED = "an image without file name"
# What annotations refer to whose size does not tell.
AnnotationFrame = Literal["upright", "stored"]


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
    return read_turned(source)[0]


def read_turned(source: Source) -> tuple[Tensor, int]:
    """What `read_image` gives, and the EXIF orientation, 1 to 8, by which it was turned upright."""

    def read() -> tuple[Tensor, int]:
        decoded = decode_image(file)
        return next(load_images([decoded], do_rescale=True)), decoded.orientation

    with _opened(source) as file:
        pixels, orientation = _named(source, "image 0", read)
    # Only images of 16 bits, and of floats, have fractions here.
    return pixels.round().clamp_(0, 255).to(torch.uint8).expand(3, -1, -1).contiguous(), orientation


def read_pair(image: Source, annotation: Source, frame: AnnotationFrame | None) -> tuple[Tensor, Source]:
    """What `read_image` gives of an image, and its map in the form of which `read_map` and `read_colors` give it as
    upright as the image.

    Args:
        frame: what a map refers to whose size does not tell; None for "upright", with a warning.
    """
    pixels, orientation = read_turned(image)
    return pixels, {**annotation, "image_orientation": orientation, "frame": frame}


def read_head(source: Source) -> tuple[int, int, int]:
    """EXIF orientation of an image, as far as its head has it, and its height and width upright; nothing is decoded."""

    def read() -> tuple[int, int, int]:
        with open_image(file) as image:
            width, height = image.size
            orientation = exif_orientation(image)
            # Pillow gives the size of TIFF images upright already.
            if orientation >= 5 and image.format != "TIFF":
                height, width = width, height
            return orientation, height, width

    with _opened(source) as file:
        return _named(source, "image 0", read)


def is_of_stored(
    source: Source, size: tuple[int, int], upright: tuple[int, int], orientation: int, frame: AnnotationFrame | None
) -> bool:
    """Whether annotations refer to the pixels of an image as they are stored, and not upright.

    Args:
        source: of the image, or of its map, for the warning.
        size: (height, width) that they are made for.
        upright: (height, width) of the image upright.
        orientation: of the image.
        frame: what the person says; None for "upright", with a warning.
    """
    if is_unclear(upright, orientation):
        if frame is None:
            logger.warning_once(
                f"{source_name(source)}: the image is stored turned (EXIF orientation {orientation}), and the size of "
                "its annotations does not tell whether they were made on it upright or on the stored pixels. They are "
                "taken as upright: say with annotation_frame='upright' or 'stored' what they are."
            )
        return frame == "stored"
    return orientation >= 5 and size == upright[::-1]


def is_unclear(upright: tuple[int, int], orientation: int) -> bool:
    """Whether the stored pixels of an image have the size that they have upright, though they are turned."""
    return orientation in (2, 3, 4) or (orientation >= 5 and upright[0] == upright[1])


def turn_upright(mask: np.ndarray, orientation: int) -> np.ndarray:
    """A mask (H, W), bool or uint8, of the stored pixels of an image, turned as the image is."""
    turned = Image.fromarray(mask.view(np.uint8)).transpose(EXIF_TURNS[orientation])
    return np.array(turned).view(mask.dtype)


def read_map(source: Source, height: int, width: int) -> Tensor:
    """(height, width) uint8 or int64: the integer at each pixel of an image with one channel, or a palette's index."""

    def read() -> Tensor:
        decoded = _decode_map(file, source, height, width, "segmentation map 0")
        return load_segmentation_maps([decoded], [(height, width)])[0]

    with _opened(source) as file:
        return _named(source, "segmentation map 0", read)


def _decode_map(file: BinaryIO, source: Source, height: int, width: int, label: str) -> Decoded:
    decoded: Decoded = decode_image(file, label)
    image, orientation = decoded.image, source.get("image_orientation", 1)
    # A map with an orientation of its own is upright by that.
    if decoded.orientation == 1 and is_of_stored(
        source, (image.height, image.width), (height, width), orientation, source.get("frame")
    ):
        return decoded._replace(image=image.transpose(EXIF_TURNS[orientation]))
    return decoded


def read_colors(source: Source, height: int, width: int) -> Tensor:
    """(3, height, width) int64: the colors of a map that has three channels and keeps its ids in them."""

    def read() -> Tensor:
        decoded = _decode_map(file, source, height, width, "image 0")
        if decoded.is_cut:
            raise ValueError("image 0 has 16 bits a channel, of which Pillow reads the upper 8: save it with 8.")
        return next(load_images([decoded], do_rescale=True))

    with _opened(source) as file:
        colors = _named(source, "image 0", read)
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

        def read() -> bool:
            with open_image(file) as image:
                return image.mode in ("RGB", "RGBA")

        return _named(source, "image 0", read)


def check_regular(path: Path) -> None:
    """DatasetError for a pipe, a socket or a device: it would be waited for, or read, perhaps for ever."""
    if path.exists() and not path.is_file():
        raise DatasetError(f"{path} is no file.")


def is_transparent(source: Source) -> bool:
    """Whether a map with colors has pixels that are not opaque. One without alpha is not decoded for that."""
    with _opened(source) as file:

        def read() -> bool:
            with open_image(file) as image:
                return image.mode == "RGBA" and any(image.getchannel("A").histogram()[:255])

        return _named(source, "image 0", read)


def read_json(path: Path) -> Any:
    """The contents of a JSON file."""
    check_regular(path)
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
        yield data if hasattr(data, "read") else io.BytesIO(data)
        return
    if not path:
        raise DatasetError("An image has neither a file name nor contents: its row of the data set is empty.")
    if not Path(path).exists():
        raise DatasetError(f"There is no file {path}.")
    check_regular(Path(path))
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

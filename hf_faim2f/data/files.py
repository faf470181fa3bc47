"""Reads the untrusted files of a data set. Every failure is a `DatasetError` that names the file.

Images and maps are turned upright by their EXIF orientation, as the image processor and the `datasets` library do. None
is decoded if it claims more pixels than Pillow considers safe.

Annotations without an orientation of their own may refer to the upright image, or to its pixels as they are stored.
Their size decides if the two differ in size: annotations of the stored pixels are turned upright with them. Otherwise
(EXIF orientations 2, 3 and 4, and square images), the reader's `annotation_frame` decides; without it they are taken as
upright, with a warning.
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
from ..model.image_files_faim2f import (
    EXIF_TURNS,
    IMAGE_SUFFIXES,
    Decoded,
    decode_image,
    exif_orientation,
    open_image,
)
from ..model.image_loading_faim2f import load_images, load_segmentation_maps

logger = logging.get_logger(__name__)

# An undecoded image as `datasets` stores it: the file's path, or its bytes (or an open file over them) with the name it
# had. A map's source may also have the entries that `read_pair` adds.
Source = Mapping[str, Any]
# Stands for the name of an image without a file; `ItemReader.named` replaces it.
UNNAMED = "an image without file name"
# What annotations refer to if their size does not show it.
AnnotationFrame = Literal["upright", "stored"]


def path_inside(root: Path, name: Any, named_by: str) -> Path:
    """`root / name`, for an untrusted name from a file of the data set.

    Only the name is checked. Links within `root` are followed, since whoever set up the folder put them there.

    Args:
        named_by: the file that has the name, for errors.

    Raises:
        DatasetError: the name leads out of `root`, on this or another operating system.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise DatasetError(f"{named_by} names {name!r} as a file, which is no file name.")
    windows = PureWindowsPath(name)
    if PurePosixPath(name).is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        raise DatasetError(f"{named_by} names the file {name!r}, which lies outside of {root}: it is not read.")
    return root / name


def file_source(path: Path) -> dict[str, Any]:
    """The entry for a file in a column of undecoded images."""
    return {"bytes": None, "path": str(path)}


def source_name(source: Source) -> str:
    """The name of an image in messages."""
    return str(source.get("path") or UNNAMED)


def list_images(folder: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> list[Path]:
    """The image files in `folder` and its subfolders, sorted by path.

    Raises:
        DatasetError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise DatasetError(f"There is no folder {folder}.")
    # Hidden files are left out, such as "._name.jpg", which macOS writes beside files on foreign file systems.
    found = sorted(path for path in files_below(folder) if path.suffix.lower() in suffixes)
    if not found:
        raise DatasetError(f"{folder} has no image ({', '.join(suffixes)}).")
    return found


def read_image(source: Source) -> Tensor:
    """(3, H, W) uint8, RGB, upright. Gray becomes RGB, alpha is dropped, 16 bits become 8, as in the processor."""
    return read_with_orientation(source)[0]


def read_with_orientation(source: Source) -> tuple[Tensor, int]:
    """The image of `read_image`, and the EXIF orientation, 1 to 8, from which it was turned upright."""

    def read() -> tuple[Tensor, int]:
        decoded = decode_image(file)
        return next(load_images([decoded], do_rescale=True)), decoded.orientation

    with _opened(source) as file:
        pixels, orientation = _named(source, "image 0", read)
    # Only images of 16 bits or floats have fractions here.
    return pixels.round().clamp_(0, 255).to(torch.uint8).expand(3, -1, -1).contiguous(), orientation


def read_pair(image: Source, annotation: Source, frame: AnnotationFrame | None) -> tuple[Tensor, Source]:
    """The image of `read_image`, and the source of its map, which `read_map` and `read_colors` turn upright with it.

    Args:
        frame: what the map refers to if its size does not show it; None for "upright", with a warning.
    """
    pixels, orientation = read_with_orientation(image)
    return pixels, {**annotation, "image_orientation": orientation, "frame": frame}


def read_header(source: Source) -> tuple[int, int, int]:
    """EXIF orientation of an image, and its height and width upright, from its header alone; nothing is decoded."""

    def read() -> tuple[int, int, int]:
        with open_image(file) as image:
            width, height = image.size
            orientation = exif_orientation(image)
            # Pillow's size of a TIFF image is upright already.
            if orientation >= 5 and image.format != "TIFF":
                height, width = width, height
            return orientation, height, width

    with _opened(source) as file:
        return _named(source, "image 0", read)


def is_of_stored_pixels(
    source: Source, size: tuple[int, int], upright: tuple[int, int], orientation: int, frame: AnnotationFrame | None
) -> bool:
    """Whether annotations refer to an image's pixels as they are stored, not to the upright image.

    Args:
        source: of the image or its map, for the warning.
        size: (height, width) that the annotations were made for.
        upright: (height, width) of the upright image.
        orientation: EXIF orientation of the image, 1 to 8.
        frame: what the user says of annotations whose size does not show it; None for "upright", with a warning.
    """
    if has_ambiguous_frame(upright, orientation):
        if frame is None:
            logger.warning_once(
                f"{source_name(source)}: the image is stored rotated or mirrored (EXIF orientation {orientation}), and "
                "the size of its annotations does not show whether they were made on the upright image or on the "
                "stored pixels. They are taken as upright: say with annotation_frame='upright' or 'stored' what they "
                "are."
            )
        return frame == "stored"
    return orientation >= 5 and size == upright[::-1]


def has_ambiguous_frame(upright: tuple[int, int], orientation: int) -> bool:
    """Whether an image is stored rotated or mirrored, but with the size of the upright image."""
    return orientation in (2, 3, 4) or (orientation >= 5 and upright[0] == upright[1])


def turn_upright(mask: np.ndarray, orientation: int) -> np.ndarray:
    """A mask (H, W), bool or uint8, of an image's stored pixels, turned upright with the image."""
    turned = Image.fromarray(mask.view(np.uint8)).transpose(EXIF_TURNS[orientation])
    return np.array(turned).view(mask.dtype)


def read_map(source: Source, height: int, width: int) -> Tensor:
    """(height, width) uint8 or int64: the value, or index in the palette, at each pixel of a map with one channel."""

    def read() -> Tensor:
        decoded = _decode_map(file, source, height, width, "segmentation map 0")
        return load_segmentation_maps([decoded], [(height, width)])[0]

    with _opened(source) as file:
        return _named(source, "segmentation map 0", read)


def _decode_map(file: BinaryIO, source: Source, height: int, width: int, label: str) -> Decoded:
    decoded: Decoded = decode_image(file, label)
    image, orientation = decoded.image, source.get("image_orientation", 1)
    # A map with an orientation of its own is upright already.
    if decoded.orientation == 1 and is_of_stored_pixels(
        source, (image.height, image.width), (height, width), orientation, source.get("frame")
    ):
        return decoded._replace(image=image.transpose(EXIF_TURNS[orientation]))
    return decoded


def read_colors(source: Source, height: int, width: int) -> Tensor:
    """(3, height, width) int64: the colors of a map that encodes its ids in three channels."""

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
    """Whether a map has several channels; reads its header alone."""
    with _opened(source) as file:

        def read() -> bool:
            with open_image(file) as image:
                return image.mode in ("RGB", "RGBA")

        return _named(source, "image 0", read)


def check_regular(path: Path) -> None:
    """Refuses pipes, sockets and devices, which could block forever or have no end.

    Raises:
        DatasetError: the path is one of these, or a folder.
    """
    if path.exists() and not path.is_file():
        raise DatasetError(f"{path} is no file.")


def is_transparent(source: Source) -> bool:
    """Whether a map with colors has pixels that are not opaque. A map without alpha is not decoded for this."""
    with _opened(source) as file:

        def read() -> bool:
            with open_image(file) as image:
                return image.mode == "RGBA" and any(image.getchannel("A").histogram()[:255])

        return _named(source, "image 0", read)


def read_json(path: Path) -> Any:
    """The contents of a JSON file.

    Raises:
        DatasetError: it cannot be read, or is not JSON.
    """
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
    """Calls `read`; in its errors, replaces `label` by the image's name."""
    try:
        return read()
    except ValueError as error:
        raise DatasetError(str(error).replace(label, source_name(source), 1)) from error

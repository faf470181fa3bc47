"""Reads the untrusted files of a dataset. Every failure raises a `DatasetError` that names the file.

Images and maps are rotated upright by their EXIF orientation, as in the image processor and the `datasets` library. A
file that claims more pixels than Pillow considers safe is not decoded.

Annotations without an orientation of their own may refer to the upright image or to the pixels as stored. If these
differ in size, the size of the annotations decides, and annotations of the stored pixels are rotated upright with them.
Otherwise (EXIF orientations 2, 3 and 4, and square images), the reader's `annotation_frame` decides; without it,
annotations are assumed to be upright, with a warning.
"""

import io
import json
import os
import re
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
from ..files import files_below, read_text, warn_of_unread
from ..model.channels_faim2f import RGB
from ..model.image_bands_faim2f import ARRAY_SUFFIXES, Bands, bands_header, check_pixels, warn_of_pages
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

# An undecoded image as `datasets` stores it: the file's path, or its bytes (or an open file of them) with the original
# file name. A map's source may also have the entries added by `read_pair`.
Source = Mapping[str, Any]
# Placeholder for the name of an image without a file; `ItemReader.named` replaces it.
UNNAMED = "an image without file name"
# What annotations refer to if their size is ambiguous.
AnnotationFrame = Literal["upright", "stored"]

# Suffixes of the image of a given name, also as cameras and Windows write them.
SUFFIXES_TRIED = (*IMAGE_SUFFIXES, *(suffix.upper() for suffix in IMAGE_SUFFIXES))
# The file with the class names of a folder, one per line.
LABELS_FILE = "labels.txt"
# The largest size of a text file of names or outlines, in bytes: hundreds of times that of real ones.
MOST_TEXT = 1 << 26
# The longest name of a file or folder on any common file system.
LONGEST_NAME = 255
# Number of bytes at the start of a JSON file in which its keys are searched.
HEAD = 1 << 16


def path_inside(root: Path, name: Any, named_by: str) -> Path:
    """`root / name`, for an untrusted name from a file of the dataset.

    Tools on Windows write backslashes: without a file of that name, they are read as slashes if there is one then. Only
    the name is checked. Links within `root` are followed, because the owner of the folder created them.

    Args:
        root: the folder.
        name: the relative path.
        named_by: the file that contains the name, for error messages.

    Raises:
        DatasetError: the name leads out of `root`, on this or another operating system.
    """
    if not isinstance(name, str) or not name or "\0" in name or max(map(len, name.split("/"))) > LONGEST_NAME:
        raise DatasetError(f"{named_by} names {repr(name)[:60]} as a file, which is not a file name.")
    windows = PureWindowsPath(name)
    if PurePosixPath(name).is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        raise DatasetError(
            f"{named_by} names the file {name!r}, which lies outside of {root} and is not read: write names "
            "relative to that folder."
        )
    path, slashed = root / name, root / name.replace("\\", "/")
    return slashed if "\\" in name and not os.path.exists(path) and os.path.exists(slashed) else path


def png_inside(root: Path, stem: str, named_by: str) -> Path:
    """The PNG file of an untrusted name without suffix, as in `path_inside`; the suffix may be in capitals."""
    paths = [path_inside(root, stem + suffix, named_by) for suffix in (".png", ".PNG")]
    return next((path for path in paths if path.is_file()), paths[0])


def file_source(path: Path) -> dict[str, Any]:
    """The entry of a file in a column of undecoded images."""
    return {"bytes": None, "path": str(path)}


def source_name(source: Source) -> str:
    """The name of an image for messages."""
    return str(source.get("path") or UNNAMED)


def list_images(folder: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> list[Path]:
    """The image files in `folder` and its subfolders, sorted by path.

    Raises:
        DatasetError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise DatasetError(f"There is no folder {folder}.")
    # Skips hidden files, such as "._name.jpg", which macOS creates on foreign file systems.
    files = sorted(files_below(folder))
    found = [path for path in files if path.suffix.lower() in suffixes]
    if suffixes == IMAGE_SUFFIXES:
        warn_of_unread(str(folder), files, suffixes)
    if not found and suffixes == IMAGE_SUFFIXES:  # arrays beside images are something else, such as depth
        found = [path for path in files if path.suffix.lower() in ARRAY_SUFFIXES]
    if not found:
        raise DatasetError(f"{folder} has no image ({', '.join(suffixes)}).")
    return found


def read_image(source: Source, num_channels: int = RGB) -> Tensor:
    """Reads an image upright: (num_channels, H, W), uint8, or float32 in 0..255 if rounding would lose information.

    With three channels, images that Pillow decodes are always uint8: gray is converted to RGB, alpha is dropped and 16
    bits are reduced, as in the image processor. Arrays in files, and images with another number of channels, keep the
    fractions of values with more than 8 bits.

    Raises:
        DatasetError: the image cannot be read, or not with this number of channels.
    """
    return read_with_orientation(source, num_channels)[0]


def read_with_orientation(source: Source, num_channels: int = RGB) -> tuple[Tensor, int]:
    """The image as in `read_image`, and its original EXIF orientation, 1 to 8."""

    def read() -> tuple[Tensor, int, bool]:
        decoded = decode_image(file, num_channels=num_channels)
        if isinstance(decoded, Bands) and decoded.array.size:
            check_pixels(decoded, decoded.array, do_rescale=True)
        pixels = next(load_images([decoded], do_rescale=True, num_channels=num_channels))
        return pixels, decoded.orientation, isinstance(decoded, Decoded) and num_channels == RGB

    with _opened(source) as file:
        warn_of_pages(file, source_name(source))
        pixels, orientation, is_picture = _named(source, "image 0", read)
    if is_picture or (len(pixels) == 1 and num_channels == RGB):
        pixels = pixels.expand(RGB, -1, -1)
    # Only 16-bit and float images have fractions here.
    whole = pixels.round().clamp(0, 255).to(torch.uint8)
    if is_picture or torch.equal(whole.to(torch.float32), pixels):
        return whole.contiguous(), orientation
    return pixels.contiguous(), orientation


def read_pair(
    image: Source, annotation: Source, frame: AnnotationFrame | None, num_channels: int = RGB
) -> tuple[Tensor, Source]:
    """Reads an image as `read_image` does, and returns it with the extended source of its map.

    With that source, `read_map` and `read_colors` rotate the map too, and reject lossy compression, which turns values
    along edges into those of other classes.

    Args:
        image, annotation: sources of the image and the map.
        frame: the pixels that a map of ambiguous size refers to; None for "upright", with a warning.
        num_channels: as in `read_image`.

    Raises:
        DatasetError: the image cannot be read.
    """
    pixels, orientation = read_with_orientation(image, num_channels)
    return pixels, {**annotation, "image_orientation": orientation, "frame": frame, "lossless": True}


def read_header(source: Source) -> tuple[int, int, int]:
    """The EXIF orientation of an image, and its height and width when upright, read from the header only.

    Raises:
        DatasetError: the header cannot be read.
    """

    def read() -> tuple[int, int, int]:
        try:
            with open_image(file) as image:
                width, height = image.size
                orientation = exif_orientation(image)
                # Pillow's size of a TIFF image is already upright.
                if orientation >= 5 and image.format != "TIFF":
                    height, width = width, height
                return orientation, height, width
        except ValueError:
            of_bands = bands_header(file, "image 0")
            if of_bands is None:
                raise
            return of_bands

    with _opened(source) as file:
        return _named(source, "image 0", read)


def check_stated_size(height: int, width: int, named_by: str) -> None:
    """Rejects the size of an image in its annotations if `read_image` would reject the image.

    Masks of that size are created before the image is read, for example to list the data.

    Args:
        height, width: the size in pixels.
        named_by: what states the size, for the message.

    Raises:
        DatasetError: it has more pixels than Pillow considers safe.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and height * width > limit:
        raise DatasetError(
            f"{named_by} has the size {height}x{width}, more than the {limit} pixels that Pillow considers safe: "
            "correct it, or raise PIL.Image.MAX_IMAGE_PIXELS if it is right."
        )


def is_of_stored_pixels(
    source: Source, size: tuple[int, int], upright: tuple[int, int], orientation: int, frame: AnnotationFrame | None
) -> bool:
    """Whether annotations refer to an image's pixels as stored instead of the upright image.

    Args:
        source: the image or its map, for the warning.
        size: (height, width) to which the annotations refer.
        upright: (height, width) of the upright image.
        orientation: EXIF orientation of the image, 1 to 8.
        frame: the user's choice for annotations of ambiguous size; None for "upright", with a warning.
    """
    if has_ambiguous_frame(upright, orientation):
        if frame is None:
            logger.warning_once(
                f"{source_name(source)}: the image is stored rotated or mirrored (EXIF orientation {orientation}), and "
                "the size of its annotations does not show whether they were made on the upright image or on the "
                "stored pixels. They are taken as upright: set annotation_frame to 'upright' or 'stored'."
            )
        return frame == "stored"
    return orientation >= 5 and size == upright[::-1]


def has_ambiguous_frame(upright: tuple[int, int], orientation: int) -> bool:
    """Whether an image is stored rotated or mirrored, but has the size of the upright image."""
    return orientation in (2, 3, 4) or (orientation >= 5 and upright[0] == upright[1])


def turn_upright(mask: np.ndarray, orientation: int) -> np.ndarray:
    """Rotates a mask (H, W), bool or uint8, of an image's stored pixels upright."""
    turned = Image.fromarray(mask.view(np.uint8)).transpose(EXIF_TURNS[orientation])
    return np.array(turned).view(mask.dtype)


def read_map(source: Source, height: int, width: int) -> Tensor:
    """Reads a map with one channel: (height, width), uint8 or int64, the value or palette index of each pixel.

    Raises:
        DatasetError: the map cannot be read, or has another size or several channels.
    """

    def read() -> Tensor:
        decoded = _decode_map(file, source, height, width, "segmentation map 0")
        return load_segmentation_maps([decoded], [(height, width)])[0]

    with _opened(source) as file:
        return _named(source, "segmentation map 0", read)


def _decode_map(file: BinaryIO, source: Source, height: int, width: int, label: str) -> Decoded:
    head = file.read(16) if source.get("lossless") else b""
    # The chunk of a WebP file's pixels is VP8L if they are lossless; it may follow a header, VP8X.
    is_lossy_webp = head.startswith(b"RIFF") and head[8:12] == b"WEBP" and b"VP8L" not in head + file.read()
    file.seek(0)
    if head.startswith(b"\xff\xd8\xff") or is_lossy_webp:
        raise ValueError(
            f"{label} is a JPEG or lossy WebP file, whatever its suffix, and its compression changes the values: save "
            "maps as PNG."
        )
    decoded = decode_image(file, label)
    if not isinstance(decoded, Decoded):
        raise ValueError(f"{label} is a NumPy array: save maps as PNG.")
    if decoded.changed:
        raise ValueError(f"{label} {decoded.changed}: save maps as PNG.")
    image, orientation = decoded.image, source.get("image_orientation", 1)
    # A map with its own orientation is already upright.
    if decoded.orientation == 1 and is_of_stored_pixels(
        source, (image.height, image.width), (height, width), orientation, source.get("frame")
    ):
        return decoded._replace(image=image.transpose(EXIF_TURNS[orientation]))
    return decoded


def read_colors(source: Source, height: int, width: int) -> Tensor:
    """Reads a map that encodes ids in its colors: (3, height, width), int64.

    Raises:
        DatasetError: the map cannot be read, or has another size, one channel or 16 bits per channel.
    """

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
    """Whether a map has several channels; reads only the header."""
    with _opened(source) as file:

        def read() -> bool:
            with open_image(file) as image:
                return image.mode in ("RGB", "RGBA")

        return _named(source, "image 0", read)


def png_palette(source: Source) -> list[int] | None:
    """The colors of a PNG file's palette, 65536 * red + 256 * green + blue; None if it has none. Reads the header."""
    with _opened(source) as file:

        def read() -> list[int] | None:
            with open_image(file) as image:
                if image.mode != "P" or image.format != "PNG" or image.palette is None:
                    return None
                red, green, blue = (image.palette.palette[channel::3] for channel in range(3))
                return [(r << 16) + (g << 8) + b for r, g, b in zip(red, green, blue, strict=False)]

        return _named(source, "image 0", read)


def check_regular(path: Path) -> None:
    """Rejects pipes, sockets and devices, which could block forever or have no end.

    Raises:
        DatasetError: the path is not a regular file.
    """
    if path.exists() and not path.is_file():
        raise DatasetError(f"{path} is not a file.")


def is_transparent(source: Source) -> bool:
    """Whether a color map has pixels that are not opaque. A map without an alpha channel is not decoded."""
    with _opened(source) as file:

        def read() -> bool:
            with open_image(file) as image:
                return image.mode == "RGBA" and any(image.getchannel("A").histogram()[:255])

        return _named(source, "image 0", read)


def read_small_text(path: Path, most: int = MOST_TEXT) -> str:
    """Reads a UTF-8 text file of bounded size, such as a list of files.

    Args:
        path: the file.
        most: the largest size, in bytes.

    Raises:
        DatasetError: there is no such file, it is larger, or it is not UTF-8.
    """
    if not path.exists():
        raise DatasetError(f"There is no file {path}.")
    check_regular(path)
    try:
        if path.stat().st_size > most:
            raise DatasetError(f"{path} has more than {most:,} bytes, too many for such a file: it is not read.")
        return read_text(path)
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror or error}.") from error
    except DatasetError:
        raise
    except ValueError as error:
        raise DatasetError(f"{path} cannot be read as UTF-8 text: {error}.") from error


def is_json_with(path: Path, keys: tuple[str, ...]) -> bool:
    """Whether the start of a file looks like a JSON object with one of these keys."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            head = file.read(HEAD).lstrip(b"\xef\xbb\xbf \t\r\n")
    except OSError:
        return False
    # Not only the name, which may also be a value, such as "images" for the kind of a project.
    return head.startswith(b"{") and any(re.search(rb'"%s"\s*:' % re.escape(key.encode()), head) for key in keys)


def read_json(path: Path) -> Any:
    """Reads a JSON file.

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
        raise DatasetError("An image has neither a file name nor contents: its row of the dataset is empty.")
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
    """Calls `read`; replaces `label` by the image's name in error messages."""
    try:
        return read()
    except ValueError as error:
        raise DatasetError(str(error).replace(label, source_name(source), 1)) from error

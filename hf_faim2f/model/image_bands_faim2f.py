"""Image files with any number of channels: NumPy's .npy, and TIFF files with several bands.

Pillow opens TIFF files with one to four bands, and with 8 bits if there are several; it drops bands, multiplies by
alpha, or cuts 16 bits to 8. So for models with other than three channels, this module reads TIFF files with several
bands. It uses Pillow only to parse the tags and, through libtiff, to unpack the segments (strips or tiles). Values keep
their type, and bands their order in the file.

Files are untrusted: the tags are checked before anything is allocated, and no segment is unpacked to more bytes than
its tags state.
"""

import io
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, TiffImagePlugin
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

ARRAY_SUFFIXES = (".npy",)
NPY_MAGIC = b"\x93NUMPY"
TIFF_MAGICS = {b"II*\0": "<", b"MM\0*": ">", b"II+\0": "<", b"MM\0+": ">"}
WIDTH, HEIGHT, BITS, COMPRESSION, FILL_ORDER, OFFSETS, ORIENTATION, BANDS = 256, 257, 258, 259, 266, 273, 274, 277
STRIP_ROWS, COUNTS, LAYOUT, PREDICTOR, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_COUNTS = (
    278, 279, 284, 317, 322, 323, 324, 325,
)  # fmt: skip
SAMPLE_FORMAT, MAX_SAMPLE_VALUE, S_MAX_SAMPLE_VALUE = 339, 281, 341
SUBFILE_TYPE = 254
KINDS = {1: "u", 2: "i", 3: "f"}
# The bytes of TIFF's types of integers, and the most entries of a directory.
INTEGERS, MOST_ENTRIES = {1: 1, 3: 2, 4: 4, 6: 1, 8: 2, 9: 4, 13: 4, 16: 8, 17: 8, 18: 8}, 65535
DEFLATE, BY_LIBTIFF = (8, 32946), (5, 32773, 50000)  # LZW, PackBits, Zstandard
NOT_LOSSLESS = "uncompressed, Deflate, LZW, PackBits and Zstandard files are read"
SEPARATE, DIFFERENCES = 2, 2  # bands stored one after another; samples stored as differences to the previous pixel
# Maximum number of values, as a multiple of the number of pixels that Pillow considers safe: as many as in RGB.
SAFE_BANDS = 3
# Maximum number of bytes, as a multiple of that number of pixels.
SAFE_BYTES = 8


class Bands(NamedTuple):
    """An image that was read from a file.

    Args:
        array: (C, H, W) of a TIFF file, or as stored in a .npy file; upright.
        white: the largest value that a sample can have; None if the file does not state it.
        orientation: the EXIF orientation, 1 to 8, that was undone.
        is_tiff: whether the file is a TIFF file.
    """

    array: np.ndarray
    white: float | None = None
    orientation: int = 1
    is_tiff: bool = True


def read_bands(source: Any, label: str, num_channels: int = 3) -> Bands | None:
    """Reads a .npy file, or a TIFF file that Pillow cannot read for this number of channels.

    Args:
        source: a path or an open binary file.
        label: name of the image in error messages.
        num_channels: number of channels that the model takes. TIFF files with one band, and all TIFF files for three
            channels, are left to Pillow.

    Returns:
        The image; None if Pillow should read the file.

    Raises:
        ValueError: the file is damaged, too large, of an unsupported kind, or has another number of bands than
            `num_channels`.
    """
    return _with_file(source, lambda file: _read(file, label, num_channels))


def bands_header(source: Any, label: str) -> tuple[int, int, int] | None:
    """EXIF orientation, and height and width when upright, of a .npy file or a TIFF file that Pillow does not open.

    Returns:
        None if Pillow should read the file.

    Raises:
        ValueError: a .npy file does not contain an image.
    """

    def read(file: BinaryIO) -> tuple[int, int, int] | None:
        head = file.read(len(NPY_MAGIC))
        file.seek(0)
        if head == NPY_MAGIC:
            shape, _ = _npy_header(file, label)
            # Channels are the shortest axis of three.
            sides = shape if len(shape) == 2 else shape[1:] if shape[0] <= shape[2] else shape[:2]
            return 1, sides[0], sides[1]
        tags = _tiff_tags(file)
        if tags is None or _number(tags, BANDS, 1) <= 1:
            return None
        orientation, sides = _number(tags, ORIENTATION, 1), (_number(tags, HEIGHT, 0), _number(tags, WIDTH, 0))
        orientation = orientation if 1 < orientation <= 8 else 1
        return (orientation, *(sides[::-1] if orientation >= 5 else sides))

    return _with_file(source, read)


def tiff_bands(source: Any) -> int | None:
    """The number of bands of a TIFF file; None if it is not one."""

    def read(file: BinaryIO) -> int | None:
        tags = _tiff_tags(file)
        return None if tags is None else _number(tags, BANDS, 1)

    return _with_file(source, read)


def tile_pixels(source: Any) -> int:
    """The number of pixels of a tile of a TIFF file; 0 if it has no tiles.

    Reads the directory itself: libtiff, which allocates a whole tile, accepts types and repeated entries that Pillow
    skips.
    """

    def read(file: BinaryIO) -> int:
        head = file.read(16)
        order, big = TIFF_MAGICS.get(head[:4]), b"+" in head[2:4]
        if order is None:
            return 0
        count, entry = (struct.Struct(order + form) for form in (("Q", "HHQ8s") if big else ("H", "HHI4s")))
        sides = {TILE_WIDTH: 0, TILE_HEIGHT: 0}

        def number(content: bytes) -> int:
            return int.from_bytes(content, "little" if order == "<" else "big")

        try:
            file.seek(number(head[8:] if big else head[4:8]))
            entries = min(*count.unpack(file.read(count.size)), MOST_ENTRIES)
            content = file.read(entries * entry.size)
            for tag, kind, values, value in entry.iter_unpack(content[: len(content) // entry.size * entry.size]):
                if tag in sides and kind in INTEGERS and values == 1:
                    if INTEGERS[kind] > len(value):  # it is elsewhere
                        file.seek(number(value))
                        value = file.read(INTEGERS[kind])
                    sides[tag] = max(sides[tag], number(value[: INTEGERS[kind]]))
        except (struct.error, OSError, ValueError, OverflowError):  # Pillow will raise an error
            pass
        return sides[TILE_WIDTH] * sides[TILE_HEIGHT]

    return _with_file(source, read) or 0


def _with_file(source: Any, read: Any) -> Any:
    """Calls `read` with a regular or open file at its beginning, and restores the position; None for other sources."""
    if isinstance(source, (str, os.PathLike)):
        try:
            if not stat.S_ISREG(os.stat(source).st_mode):
                return None
            with open(source, "rb") as file:
                return read(file)
        except OSError:
            return None  # opening it as an image will raise an error
        except ValueError as error:
            if "null" in str(error):  # a null character in the path
                return None
            raise
    if not (hasattr(source, "seek") and hasattr(source, "tell")):
        return None
    try:
        place = source.tell()
        source.seek(0)
    except (OSError, ValueError):  # closed, or a pipe: Pillow will raise an error
        return None
    try:
        return read(source)
    finally:
        source.seek(place)


def _read(file: BinaryIO, label: str, num_channels: int) -> Bands | None:
    head = file.read(len(NPY_MAGIC))
    file.seek(0)
    if head == NPY_MAGIC:
        return Bands(_read_npy(file, label), is_tiff=False)
    if num_channels == 3 or head[:4] not in TIFF_MAGICS:
        return None
    tags = _tiff_tags(file)
    count = 1 if tags is None else _number(tags, BANDS, 1)
    if tags is None or count == 1 or (num_channels == 1 and count == 3):
        return None  # Pillow reads these; three equal channels are gray
    if count != num_channels:
        raise ValueError(f"{label} has {count} bands, but the model takes {num_channels} channels.")
    try:
        return _read_tiff(file, tags, TIFF_MAGICS[head[:4]], label)
    except ValueError:
        raise
    except Exception as error:  # tags of unexpected types, or segments that cannot be unpacked
        raise ValueError(f"{label} cannot be decoded, the file may be truncated or damaged: {error}.") from error


def _check_size(label: str, pixels: int, channels: int, value_bytes: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and (
        pixels * max(channels, SAFE_BANDS) > SAFE_BANDS * limit or pixels * channels * value_bytes > SAFE_BYTES * limit
    ):
        raise ValueError(
            f"{label} has {pixels} pixels of {channels} channels, more than the {limit} of RGB that Pillow takes for "
            "safe: it may be a decompression bomb; if you trust the file, raise PIL.Image.MAX_IMAGE_PIXELS."
        )


def _npy_header(file: BinaryIO, label: str) -> tuple[tuple[int, ...], np.dtype]:
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    except Exception as error:
        raise ValueError(f"{label} cannot be opened as a NumPy array: {error}.") from error
    if dtype.kind not in "buif" or len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(
            f"{label} has an array of shape {shape} and type {dtype}: an image is (H, W, C), (C, H, W) or (H, W) of "
            "numbers."
        )
    _check_size(label, int(np.prod(shape, dtype=object)) * dtype.itemsize // SAFE_BYTES, 1, SAFE_BYTES)
    return shape, dtype


def _read_npy(file: BinaryIO, label: str) -> np.ndarray:
    _npy_header(file, label)
    file.seek(0)
    try:
        return np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:
        raise ValueError(f"{label} cannot be read as a NumPy array, the file may be truncated: {error}.") from error


def _tiff_tags(file: BinaryIO) -> Any:
    """The tags of a TIFF file's first image; None if there are none."""
    head = file.read(8)
    try:
        if head[:4] not in TIFF_MAGICS:
            return None
        if head[2:3] == b"+" or head[3:4] == b"+":  # BigTIFF
            head += file.read(8)
        tags = TiffImagePlugin.ImageFileDirectory_v2(head)
        file.seek(tags.next)
        tags.load(file)
    except Exception:  # Pillow will raise an error when it opens the file
        return None
    return tags


def warn_of_pages(source: Any, name: str) -> None:
    """Warns, once for each folder, of a TIFF file with several pages, of which only the first is read.

    A second page of another size, or marked as smaller or as a mask, belongs to the first, like a camera's thumbnail.

    Args:
        source: a path or an open binary file.
        name: path of the image.
    """

    def read(file: BinaryIO) -> bool:
        tags = _tiff_tags(file)
        if tags is None or not tags.next:
            return False
        try:
            size = tags.get(WIDTH), tags.get(HEIGHT)
            file.seek(tags.next)
            tags.load(file)
            return size == (tags.get(WIDTH), tags.get(HEIGHT)) and not _number(tags, SUBFILE_TYPE, 0) & 5
        except Exception:  # the first page may be readable
            return False

    if _with_file(source, read):
        logger.warning_once(
            f"{os.path.dirname(name) or name} has TIFF files of several pages, of which only the first is read: save "
            "each page as a file of its own."
        )


def _number(tags: Any, tag: int, default: int) -> int:
    value = tags.get(tag, default)
    return int(value[0] if isinstance(value, tuple) else value)


def _read_tiff(file: BinaryIO, tags: Any, order: str, label: str) -> Bands:
    count, height, width = (_number(tags, tag, 0) for tag in (BANDS, HEIGHT, WIDTH))
    if height < 1 or width < 1:
        raise ValueError(f"{label} is {height}x{width} pixels, so it is empty: remove it from the batch.")
    stored = _stored_type(tags, order, label)
    _check_size(label, height * width, count, stored.itemsize)
    image = np.zeros((count, height, width), stored.newbyteorder("="))
    for bands, top, left, block in _segments(file, tags, stored, (count, height, width), label):
        rows, columns = min(block.shape[0], height - top), min(block.shape[1], width - left)
        image[bands, top : top + rows, left : left + columns] = block[:rows, :columns].transpose(2, 0, 1)
    orientation = _number(tags, ORIENTATION, 1)
    image = _upright(image, orientation)
    stated = tags.get(S_MAX_SAMPLE_VALUE, tags.get(MAX_SAMPLE_VALUE))
    white = None if stated is None or stored.kind == "i" else float(np.max(stated))
    if white is not None and stored.kind == "u":
        white = float(2 ** max(int(white).bit_length(), 8) - 1)  # many files state the largest value in the image
    return Bands(image, white, orientation if 1 < orientation <= 8 else 1)


def _stored_type(tags: Any, order: str, label: str) -> np.dtype:
    """The type of the samples in the file."""
    bits, kinds = tags.get(BITS, (1,)), tags.get(SAMPLE_FORMAT, (1,))
    bits, kinds = ({*(value if isinstance(value, tuple) else (value,))} for value in (bits, kinds))
    kind = KINDS.get(next(iter(kinds))) if len(kinds) == 1 else None
    if kind is None or len(bits) != 1 or next(iter(bits)) not in ((16, 32, 64) if kind == "f" else (8, 16, 32)):
        raise ValueError(
            f"{label} has samples of {', '.join(map(str, sorted(bits)))} bits: save it with 8 or 16 bits, or floats, "
            "the same for every band."
        )
    packing, predictor = _number(tags, COMPRESSION, 1), _number(tags, PREDICTOR, 1)
    if packing not in (1, *DEFLATE, *BY_LIBTIFF) or _number(tags, FILL_ORDER, 1) != 1:
        raise ValueError(f"{label} has the compression {packing} of TIFF, but only {NOT_LOSSLESS}: save it as one.")
    if predictor not in (1, DIFFERENCES) or (predictor == DIFFERENCES and kind == "f"):
        raise ValueError(f"{label} has the predictor {predictor} of TIFF, which is not read: save it without one.")
    return np.dtype(f"{order}{kind}{next(iter(bits)) // 8}")


def _segments(
    file: BinaryIO, tags: Any, stored: np.dtype, shape: tuple[int, int, int], label: str
) -> Iterator[tuple[slice, int, int, np.ndarray]]:
    """Yields the bands, top row and left column of each strip or tile, and its samples (h, w, bands in it)."""
    count, height, width = shape
    tiled = TILE_WIDTH in tags
    rows = _number(tags, TILE_HEIGHT, 0) if tiled else min(_number(tags, STRIP_ROWS, height), height)
    columns = _number(tags, TILE_WIDTH, 0) if tiled else width
    offsets, counts = tags.get(TILE_OFFSETS if tiled else OFFSETS), tags.get(TILE_COUNTS if tiled else COUNTS)
    separate = _number(tags, LAYOUT, 1) == SEPARATE
    together = 1 if separate else count
    if rows < 1 or columns < 1:
        raise ValueError(f"{label} has segments without pixels: the file is damaged.")
    _check_size(label, rows * columns, together, stored.itemsize)
    places = [
        (slice(band, band + together), top, left)
        for band in range(0, count, together)
        for top in range(0, height, rows)
        for left in range(0, width, columns)
    ] if (count // together) * -(-height // rows) * -(-width // columns) == len(offsets or ()) else []  # fmt: skip
    if not places or len(counts or ()) != len(places):
        raise ValueError(f"{label} lists {len(offsets or ())} segments, which do not cover it: the file is damaged.")
    packing, has_differences = _number(tags, COMPRESSION, 1), _number(tags, PREDICTOR, 1) == DIFFERENCES
    for (bands, top, left), offset, length in zip(places, offsets, counts, strict=True):
        high = rows if tiled else min(rows, height - top)
        size = high * columns * together * stored.itemsize
        file.seek(offset)
        data = _unpacked(file.read(length), packing, high, size)
        if len(data) < size:
            raise ValueError(f"{label} cannot be decoded, the file may be truncated or damaged.")
        block = np.frombuffer(data, stored, high * columns * together).reshape(high, columns, together)
        block = block.astype(stored.newbyteorder("="))
        yield bands, top, left, np.cumsum(block, axis=1, dtype=block.dtype) if has_differences else block


def _unpacked(data: bytes, packing: int, rows: int, size: int) -> bytes:
    """Unpacks at most `size` bytes of a segment with `rows` rows."""
    if packing in DEFLATE:
        return zlib.decompressobj().decompress(data, size)
    if packing not in BY_LIBTIFF:
        return data
    # Packed into a gray image whose pixels are the bytes, so that libtiff neither swaps nor combines them.
    entries = {
        WIDTH: size // rows, HEIGHT: rows, BITS: 8, COMPRESSION: packing, 262: 1, BANDS: 1, STRIP_ROWS: rows,
        COUNTS: len(data),
    }  # fmt: skip
    start = 8 + 2 + 12 * (len(entries) + 1) + 4
    entries[OFFSETS] = start
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, entries[tag]) for tag in sorted(entries))
    whole = struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + directory + struct.pack("<I", 0) + data
    with TiffImagePlugin.TiffImageFile(io.BytesIO(whole)) as image:
        return np.asarray(image).tobytes()


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """(C, H, W) turned upright by its EXIF orientation."""
    if orientation in (5, 6, 7, 8):
        image = image.swapaxes(1, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, :, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def these_channels_first(pixels: Tensor, label: str, input_data_format: str | None, num_channels: int) -> Tensor:
    """Converts an array with this number of channels, other than three, to (num_channels, H, W).

    Raises:
        ValueError: it has another number of channels, or not where `input_data_format` says.
    """
    shape = tuple(pixels.shape)
    if pixels.ndim == 2 and num_channels == 1:
        return pixels[None]
    ends = {"channels_first": 0, "channels_last": 2} if pixels.ndim == 3 else {}
    places = [place for place, axis in ends.items() if shape[axis] == num_channels]
    if input_data_format is None and len(places) == 2:
        logger.warning_once(
            f"{label} has shape {shape}, whose channels can be at either end, and is read as channels_first: say with "
            "input_data_format where they are."
        )
    place = input_data_format or next(iter(places), None)
    if place not in places:
        raise ValueError(
            f"{label} has shape {shape}{f', read as {place}' if place else ''}, but the model takes {num_channels} "
            f"channel{'s'[: num_channels != 1]}: pass ({num_channels}, H, W) or (H, W, {num_channels})."
        )
    return pixels if place == "channels_first" else pixels.permute(2, 0, 1)


def check_pixels(source: Any, pixels: Any, do_rescale: bool) -> None:
    """Raises ValueError for an array or tensor of floats in 0..1, if the image processor rescales it.

    Prediction and training reject these; the image processor itself only warns, like those of transformers. Floats
    without fractions may be a nearly black image in 0..255. Float TIFF files have been scaled.

    Args:
        source: what the caller passed, decoded by `decode_image` if it is a file.
        pixels: its pixels, at least one: a tensor or an array.
        do_rescale: whether the image processor multiplies them by 1/255.
    """
    if isinstance(source, Bands) and not source.is_tiff:
        source = source.array
    dtype = getattr(source, "dtype", "")
    is_float = getattr(dtype, "kind", "") == "f" or "float" in str(dtype)  # that of a big-endian array is ">f8"
    if not do_rescale or not is_float:
        return
    if float(pixels.min()) >= 0 and float(pixels.max()) <= 1 and bool((pixels % 1 != 0).any()):
        raise ValueError(
            "image 0 is an array of floats in 0..1, but floats are taken as 0..255: multiply it by 255, or use uint8."
        )


__all__ = [
    "ARRAY_SUFFIXES",
    "Bands",
    "bands_header",
    "check_pixels",
    "read_bands",
    "these_channels_first",
    "tiff_bands",
    "tile_pixels",
    "warn_of_pages",
]

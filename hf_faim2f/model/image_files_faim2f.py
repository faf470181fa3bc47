"""Image files: supported formats, opening and decoding, and the value range stated in a file's header.

A file that cannot be used raises a ValueError with a one-sentence message.
"""

import os
import re
import stat
import struct
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, features
from transformers.utils import logging

from .image_bands_faim2f import read_bands, tiff_bands, tile_pixels

logger = logging.get_logger(__name__)

# The supported formats, by Pillow's names, and their file suffixes. Pillow opens more formats, but for some it starts
# another program (EPS) or uses decoders that are hardly tested on damaged files.
_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "WEBP": (".webp",),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k"),
}
# Formats that some builds of Pillow cannot decode, with their names in `PIL.features`.
_CODECS = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}


def _is_decoded(format_name: str) -> bool:
    codec = _CODECS.get(format_name)
    # `features.check` warns about names that this version of Pillow does not know.
    return codec is None or (codec in {*features.modules, *features.codecs} and bool(features.check(codec)))


IMAGE_FORMATS = tuple(name for name in _SUFFIXES if _is_decoded(name))
# The suffixes by which images in a folder are found.
IMAGE_SUFFIXES = tuple(suffix for name in IMAGE_FORMATS for suffix in _SUFFIXES[name])
READ_FORMATS = f"{', '.join(IMAGE_FORMATS[:-1])} and {IMAGE_FORMATS[-1]}"
EXIF_ORIENTATION = 0x0112
# The transposition that turns the stored pixels of each EXIF orientation upright.
EXIF_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# The attribute of a Pillow image that keeps what its header states.
HEADER = "_faim2f_header"
SIXTEEN_BITS = 65535
# If no 16-bit value exceeds this, the values may have only 12 bits or fewer.
TWELVE_BITS = 4095
TIFF_BITS_PER_SAMPLE, TIFF_PHOTOMETRIC, TIFF_MAX_SAMPLE_VALUE, TIFF_S_MAX_SAMPLE_VALUE = 258, 262, 281, 341
TIFF_COMPRESSION, TIFF_JPEG = 259, (6, 7)


class Decoded(NamedTuple):
    """A decoded, upright Pillow image, and what its file states about its values.

    Args:
        image: the upright image.
        orientation: the EXIF orientation, 1 to 8, that was undone.
        white: the largest value that a sample can have; None if the file does not state it.
        is_stretched: samples of fewer bits may have been scaled to 16 bits, as the PNG specification recommends.
        is_cut: samples have 16 bits, of which Pillow keeps the upper 8.
        is_inverted: 0 is white, and Pillow does not invert the values.
        changed: why the values differ from those of a label map's ids, as the predicate of a sentence; None if they do
            not.
        step: the factor by which Pillow scaled gray samples of 2 or 4 bits to 8; a label map's ids are the quotients.
    """

    image: Image.Image
    orientation: int = 1
    white: float | None = None
    is_stretched: bool = False
    is_cut: bool = False
    is_inverted: bool = False
    changed: str | None = None
    step: int = 1


def open_image(source: Any, label: str = "image 0") -> Image.Image:
    """Opens an image file without decoding it; `decode_image` does that.

    Args:
        source: a path, or an open binary file.
        label: name of the image in error messages.

    Raises:
        ValueError: it is not a regular file, or its format is not in `IMAGE_FORMATS`.
    """
    if isinstance(source, (str, os.PathLike)):
        try:
            mode = os.stat(source).st_mode
        except (OSError, ValueError) as error:  # ValueError: the path has a null character
            raise ValueError(f"{label} cannot be opened as an image: {error}.") from error
        # Opening a pipe blocks until something writes to it, and a device may never end.
        if not stat.S_ISREG(mode):
            kind = "" if stat.S_ISDIR(mode) else " but a pipe, a socket or a device: save the image in a file"
            raise ValueError(f"{label} is not a file{kind}.")
    try:
        return Image.open(source, formats=IMAGE_FORMATS)
    # On damaged files, Pillow's plugins raise any exception, including its decompression bomb warning and error.
    except Exception as error:
        other = _other_format(source)
        reason: Any = error
        if other:
            reason = f"it has the format {other}, and only {READ_FORMATS} files are read"
        elif isinstance(error, UnidentifiedImageError):  # its text includes the Python object
            reason = "cannot identify image file"
            bands = tiff_bands(source)
            if bands is not None and bands > 1:
                reason = f"it is a TIFF file of {bands} bands, and the model takes 3 channels of 8 bits"
        raise ValueError(f"{label} cannot be opened as an image: {reason}.") from error


def exif_orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image, 1 to 8. Of a PNG file that is not decoded yet, only the header is read."""
    # The PNG plugin's own method decodes the whole image to look for EXIF data after the pixels.
    orientation = Image.Image.getexif(image).get(EXIF_ORIENTATION, 1)
    return orientation if orientation in EXIF_TURNS else 1


def most_pixels(image: Image.Image) -> int:
    """The number of pixels of an undecoded image, or of a tile of its TIFF file, which is decoded whole, if larger."""
    return max(image.width * image.height, tile_pixels(getattr(image, "fp", None)) if image.format == "TIFF" else 0)


def is_deep(mode: str) -> bool:
    """Whether a mode of Pillow has more than 8 bits per sample."""
    return mode in ("I", "F") or mode.startswith("I;16")


def decode_image(source: Any, label: str = "image 0", num_channels: int = 3) -> Any:
    """Decodes a path, an open file or a PIL image to `Decoded` or `Bands`; returns anything else unchanged.

    Args:
        source: the image.
        label: name of the image in error messages.
        num_channels: number of channels that the model takes; see `read_bands`.

    Raises:
        ValueError: the image cannot be read.
    """
    if isinstance(source, Image.Image):
        decoded = _decode(source, label)
        if decoded.image is not source:  # the caller's own image is not upright
            logger.warning_once(
                f"{label} has the EXIF orientation {decoded.orientation} and was turned upright, but the image object "
                "that was passed is unchanged: its size, and a map or a drawing made for its pixels, may not fit. Pass "
                "PIL.ImageOps.exif_transpose(image) and use that everywhere."
            )
        return decoded
    is_path = isinstance(source, (str, os.PathLike))
    if not is_path and not hasattr(source, "read"):
        return source
    if isinstance(source, str) and re.match(r"[a-z]+://|data:", source):
        raise ValueError(f"{label} is an address ({source[:60]}): download the file and pass its path.")
    name = f"{label} ({os.fspath(source)})" if is_path else label
    bands = read_bands(source, name, num_channels)
    if bands is not None:
        return bands
    with open_image(source, name) as image:
        return _decode(image, name)


def _other_format(source: Any) -> str | None:
    """The name of an unsupported format, recognized by the first bytes of a file; None if they are unknown."""
    try:
        if isinstance(source, (str, os.PathLike)):
            with open(source, "rb") as file:
                head = file.read(16)
        else:
            source.seek(0)
            head = source.read(16)
        if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"mif1", b"msf1"):
            return "HEIC"
        for start, name in ((b"%PDF", "PDF"), (b"<svg", "SVG"), (b"<?xml", "XML")):
            if head.startswith(start):
                return name
        # Only looks at these bytes; no plugin opens the file.
        others = ((name, accepts) for name, (_, accepts) in Image.OPEN.items() if name not in IMAGE_FORMATS)
        return next((name for name, accepts in others if accepts is not None and accepts(head)), None)
    except Exception:  # the file cannot be read again, or a plugin needs more bytes
        return None


def _decode(image: Image.Image, label: str) -> Decoded:
    width, height = image.size
    if width == 0 or height == 0:
        raise ValueError(f"{label} is {height}x{width} pixels, so it is empty: remove it from the batch.")
    limit = Image.MAX_IMAGE_PIXELS
    # Only an undecoded file has tiles; images in memory are not limited.
    if getattr(image, "tile", None) and limit is not None and (pixels := most_pixels(image)) > limit:
        raise ValueError(
            f"{label} has {'' if pixels == width * height else 'a tile of '}{pixels} pixels, more than the {limit} "
            "that Pillow takes for safe: it may be a decompression bomb; if you trust the file, raise "
            "PIL.Image.MAX_IMAGE_PIXELS."
        )
    try:
        # Pillow itself applies the orientation when it decodes a TIFF image, and then drops it.
        orientation = exif_orientation(image) if image.format == "TIFF" else 1
        # Kept with the image, because decoding discards the header's tiles, and the caller may pass it again.
        if getattr(image, "tile", None) or not hasattr(image, HEADER):
            setattr(image, HEADER, (_samples(image), _changed(image), _step(image)))
        samples, changed, step = getattr(image, HEADER)
        image.load()
        # exif_transpose copies the image even if it is upright.
        turned = image.getexif().get(EXIF_ORIENTATION, 1)
        upright = ImageOps.exif_transpose(image) if turned in EXIF_TURNS else image
    except Exception as error:
        raise ValueError(
            f"{label} cannot be decoded, the file may be truncated or damaged, or closed before it was read: {error}."
        ) from error
    decoded = Decoded(upright, turned if turned in EXIF_TURNS else orientation, **samples, changed=changed, step=step)
    if decoded.is_cut:
        _check_cut(decoded, label)
    return decoded


def _samples(image: Image.Image) -> dict[str, Any]:
    """The fields of `Decoded` that the header of an undecoded file determines."""
    # The last entry of a tile, or that entry's first element, is the raw mode of the samples.
    is_16_bit = any(";16" in str(tile[3]) for tile in getattr(image, "tile", None) or ())
    is_cut = is_16_bit and not is_deep(image.mode)
    if image.format == "PNG":
        bits = _significant_bits(image) if is_16_bit else None
        return {"white": None if bits is None else 2**bits - 1, "is_stretched": True, "is_cut": is_cut}
    if image.format in ("PPM", "JPEG2000") and image.mode != "F":
        # Pillow scales the values from the range that these files state.
        return {"white": SIXTEEN_BITS}
    if image.format != "TIFF":
        return {}
    tags = image.tag_v2  # type: ignore[attr-defined]
    stated = tags.get(TIFF_S_MAX_SAMPLE_VALUE, tags.get(TIFF_MAX_SAMPLE_VALUE))
    white = None if stated is None else float(np.max(stated))
    if image.mode != "F":
        bits = max(tags.get(TIFF_BITS_PER_SAMPLE, (1,)))
        if white is not None:
            # Many files state the largest value in the image: round up to whole bits.
            bits = int(white).bit_length()
        white = float(2 ** max(bits, 8) - 1) if white is not None or bits < 16 else None
    is_inverted = tags.get(TIFF_PHOTOMETRIC) == 0 and is_deep(image.mode)  # Pillow inverts 8-bit images
    return {"white": white, "is_cut": is_cut, "is_inverted": is_inverted}


def _changed(image: Image.Image) -> str | None:
    """The field `changed` of `Decoded`, from the header of an undecoded file."""
    tags = getattr(image, "tag_v2", {})
    if image.format in ("JPEG", "MPO") or tags.get(TIFF_COMPRESSION) in TIFF_JPEG:
        return "is compressed as JPEG, which changes the values"
    if image.format in ("JPEG2000", "AVIF"):  # the header does not show whether the compression is lossless
        return f"is compressed as {image.format}, which may change the values"
    if image.mode == "L" and tags.get(TIFF_PHOTOMETRIC) == 0:
        return "is a TIFF file in which 0 is white, whose values Pillow inverts"
    if image.format == "PPM":
        white = SIXTEEN_BITS if image.mode == "I" else 255
        for tile in image.tile:  # type: ignore[attr-defined]
            maximum = tile[3][-1]
            if tile[0].startswith("ppm") and isinstance(maximum, int) and maximum != white:
                return f"states the largest value {maximum}, from which Pillow scales the values to {white}"
    return None


def _step(image: Image.Image) -> int:
    """The field `step` of `Decoded`, from the header of an undecoded file."""
    for tile in getattr(image, "tile", None) or ():
        mode = tile[3] if isinstance(tile[3], str) else str(tile[3][0]) if tile[3] else ""
        if mode.startswith(("L;2", "L;4")):
            return 255 // (2 ** int(mode[2]) - 1)
    return 1


def _significant_bits(image: Image.Image) -> int | None:
    """The number of significant bits that a PNG file states in its sBIT chunk; None without one."""
    file = image.fp  # type: ignore[attr-defined]
    if file is None:  # closed: decoding will raise
        return None
    place = file.tell()
    try:
        file.seek(8)  # skip the signature
        while True:
            length, kind = struct.unpack(">I4s", file.read(8))
            if kind == b"sBIT":
                bits = file.read(length)
                return max(bits[: 1 if length < 3 else 3])  # the others are for alpha
            if kind in (b"PLTE", b"IDAT", b"IEND"):
                return None
            file.seek(length + 4, os.SEEK_CUR)
    finally:
        file.seek(place)


def _check_cut(decoded: Decoded, label: str) -> None:
    """Raises ValueError if 16 bits were cut to the upper 8 and the image may be in the lower bits."""
    image, white = decoded.image, decoded.white
    bands = [band for band in image.getbands() if band in "LRGB"]  # neither alpha nor CMYK inks, in which 0 is white
    highest = max((int(np.asarray(image.getchannel(band)).max()) for band in bands), default=255)
    if white is None:
        white = TWELVE_BITS
    if white < SIXTEEN_BITS and highest <= int(white) >> 8:
        raise ValueError(
            f"{label} has 16 bits a channel, of which Pillow reads the upper 8, but no value above {int(white)}, so it "
            "may use fewer bits: save it with 8 bits a channel, or with values over the whole range of 16."
        )

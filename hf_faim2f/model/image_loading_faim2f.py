"""Images and segmentation maps, in whatever form they come, as tensors of one shape; what cannot be one is refused.

Every refusal is a ValueError of one sentence that names the image by its index in the batch.
"""

import os
import re
import stat
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError, features
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

# The formats that are read, by Pillow's names, and the suffixes of their files. Pillow opens others, some of them by
# starting another program (EPS), or by decoders that few have tried on damaged files.
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
# What not every build of Pillow can decode, by the names of `PIL.features`.
_CODECS = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}


def _is_decoded(format_name: str) -> bool:
    codec = _CODECS.get(format_name)
    # `features.check` warns about a name that this version of Pillow does not have.
    return codec is None or (codec in {*features.modules, *features.codecs} and bool(features.check(codec)))


IMAGE_FORMATS = tuple(name for name in _SUFFIXES if _is_decoded(name))
# What to look for in a folder: every walk over folders does.
IMAGE_SUFFIXES = tuple(suffix for name in IMAGE_FORMATS for suffix in _SUFFIXES[name])
READ_FORMATS = f"{', '.join(IMAGE_FORMATS[:-1])} and {IMAGE_FORMATS[-1]}"

EXIF_ORIENTATION = 0x0112
# What turns the stored pixels of each orientation upright.
EXIF_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIXTEEN_BITS = 65535
# Values of 16 bits that stay below this are as likely those of 12 bits or fewer.
TWELVE_BITS = 4095
# The same share of 0..255, for floats.
DARKEST_FLOAT = 16
TIFF_BITS_PER_SAMPLE, TIFF_PHOTOMETRIC, TIFF_MAX_SAMPLE_VALUE, TIFF_S_MAX_SAMPLE_VALUE = 258, 262, 281, 341
GRAY_MODES = ("1", "L", "LA")
MAP_MODES = ("1", "L", "P", "I", "F")


def load_images(images: Any, input_data_format: str | None = None, do_rescale: bool = False) -> Iterator[Tensor]:
    """Reads one image or a batch of them, one after the other, so that large photos need not be in memory together.

    Accepted: PIL images of any mode that Pillow turns into RGB, NumPy arrays, torch tensors, paths of regular files,
    open binary files; one, a list or tuple of them, or a 4-dimensional array or tensor. Files are of `IMAGE_FORMATS`.
    An image is turned upright by its EXIF orientation, so that what is predicted of a file is predicted of
    `PIL.ImageOps.exif_transpose(PIL.Image.open(file))`, and loses its alpha channel. Arrays are (H, W), (H, W, C) or
    (C, H, W) with 1 (gray), 2 (gray, alpha), 3 (RGB) or 4 (RGB, alpha) channels. Where `input_data_format` does not say
    which end the channels are at, it is the first if its size is 1 or 3, else the last if its size is, else the first
    if its size is 2 or 4, else the last.

    Values: 8-bit images stay 0..255, boolean and 1-bit ones become 0 and 255. Those of more bits (Pillow's "I;16", its
    "I" where a value exceeds 255, uint16 arrays) are scaled to 0..255 by the range that the file states (the bit depth
    of a TIFF or JPEG 2000 file, TIFF's MaxSampleValue or SMaxSampleValue rounded up to whole bits, PNG's sBIT, the
    maximum of a PGM), else from 0..65535; where nothing is stated and no value exceeds 4095, they may have 12 bits as
    well, and are refused. Other integers must be in 0..255. Float arrays and tensors are taken as they are. Float
    images of Pillow (mode "F", as of float TIFF files) are taken as 0..1 if they are within it, and as 0..255 if their
    largest value is from 16 to 255; others are refused, unless SMaxSampleValue states the largest value.

    Args:
        images: see above.
        input_data_format: "channels_first", "channels_last" or None.
        do_rescale: whether the caller multiplies the values by 1/255. If so, a float array in 0..1 earns a warning; if
            not, float images of Pillow are taken as they are.

    Yields:
        A tensor for each image, (1, H, W) if gray and (3, H, W) if RGB, float32, on the device it came on. It may
        share the memory of the image.

    Raises:
        ValueError: no image, or one that cannot be read, is empty, has NaN or infinite values, another shape, or values
            whose range cannot be told.
    """
    if input_data_format not in (None, "channels_first", "channels_last"):
        raise ValueError(
            f"input_data_format must be 'channels_first', 'channels_last' or None, got {input_data_format!r}."
        )
    for i, item in enumerate(_as_list(images, "image", batch_ranks=(4,))):
        yield _load_image(item, f"image {i}", input_data_format, do_rescale)


class Decoded(NamedTuple):
    """An image of Pillow, decoded and turned upright, and what its file says.

    Args:
        image: upright.
        orientation: EXIF's, 1 to 8, by which it was turned.
        white: the largest value that a sample can have; None where the file does not say.
        is_stretched: values of fewer than 16 bits may have been stretched over all 16, as PNG asks for.
        is_cut: samples of 16 bits of which Pillow keeps the upper 8.
        is_inverted: 0 is white, which Pillow leaves so.
    """

    image: Image.Image
    orientation: int = 1
    white: float | None = None
    is_stretched: bool = False
    is_cut: bool = False
    is_inverted: bool = False


def open_image(source: Any, label: str = "image 0") -> Image.Image:
    """An image file, of which no pixel is decoded yet. Decode it with `decode_image`.

    Args:
        source: a path, or an open binary file.
        label: what messages call it.

    Raises:
        ValueError: it is no regular file, or none of `IMAGE_FORMATS`.
    """
    if isinstance(source, (str, os.PathLike)):
        try:
            mode = os.stat(source).st_mode
        except (OSError, ValueError) as error:  # the latter of a path with a null character
            raise ValueError(f"{label} cannot be opened as an image: {error}.") from error
        # Opening a pipe waits for whoever writes into it, and a device may never end.
        if not stat.S_ISREG(mode):
            kind = "" if stat.S_ISDIR(mode) else " but a pipe, a socket or a device: save the image in a file"
            raise ValueError(f"{label} is no file{kind}.")
    try:
        return Image.open(source, formats=IMAGE_FORMATS)
    # Pillow's plugins let through whatever a broken file makes them raise, its own bomb warning and error included.
    except Exception as error:
        other = _other_format(source)
        reason: Any = error
        if other:
            reason = f"it has the format {other}, and only {READ_FORMATS} files are read"
        elif isinstance(error, UnidentifiedImageError):  # whose text goes on with Python's object
            reason = "cannot identify image file"
        raise ValueError(f"{label} cannot be opened as an image: {reason}.") from error


def exif_orientation(image: Image.Image) -> int:
    """EXIF's orientation of an image, 1 to 8. Of a PNG file that is not decoded, as far as its head has it."""
    # Without the PNG plugin's method, which decodes the whole image to look behind it.
    orientation = Image.Image.getexif(image).get(EXIF_ORIENTATION, 1)
    return orientation if orientation in EXIF_TURNS else 1


def eight_bit_image(source: Any, label: str = "image 0") -> Any:
    """An image whose pixels are bytes, decoded and upright, as Pillow's in mode "L" (gray) or "RGB"; one of Pillow's
    deeper modes as a tensor (H, W), float32, in 0..255; arrays and tensors as they are. `load_images` gives the same
    pixels of what comes out, with `do_rescale=True` of what went in.

    Raises:
        ValueError: it cannot be read.
    """
    decoded = decode_image(source, label)
    if not isinstance(decoded, Decoded):
        return decoded
    if _is_deep(decoded.image.mode):
        return _pixels_of_pil(decoded, label, do_rescale=True)[0]
    return _gray_or_rgb(decoded.image, label)


def _is_deep(mode: str) -> bool:
    return mode in ("I", "F") or mode.startswith("I;16")


def load_segmentation_maps(segmentation_maps: Any, sizes: list[tuple[int, int]]) -> list[Tensor]:
    """Reads the segmentation maps of a batch: the id of a class or an instance at every pixel.

    Args:
        segmentation_maps: as in `load_images`; arrays are (H, W), (1, H, W) or (H, W, 1) for one map in a list, and
            (B, H, W) or (B, 1, H, W) for a batch. PIL images have one channel; a palette's indices are the ids.
        sizes: (height, width) of each image.

    Returns:
        A tensor (H, W), uint8 or int64, for each image.

    Raises:
        ValueError: not as many maps as images, a map of another size than its image, ids that are no whole numbers.
    """
    items = _as_list(segmentation_maps, "segmentation map", batch_ranks=(3, 4))
    if len(items) != len(sizes):
        raise ValueError(f"There are {len(sizes)} images but {len(items)} segmentation maps: pass one map an image.")
    pairs = zip(items, sizes, strict=True)
    return [_load_map(item, f"segmentation map {i}", size) for i, (item, size) in enumerate(pairs)]


def _as_list(images: Any, kind: str, batch_ranks: tuple[int, ...]) -> list[Any]:
    if isinstance(images, (list, tuple)) or (
        isinstance(images, (np.ndarray, Tensor)) and images.ndim in batch_ranks and 0 not in images.shape[1:]
    ):
        images = list(images)
        if not images:
            raise ValueError(f"The list of {kind}s is empty: pass at least one {kind}.")
        return images
    if images is None:
        raise ValueError(f"There is no {kind}: got None.")
    return [images]


def _load_image(image: Any, label: str, input_data_format: str | None, do_rescale: bool) -> Tensor:
    image = decode_image(image, label)
    if isinstance(image, Decoded):
        return _pixels_of_pil(image, label, do_rescale)
    if not isinstance(image, (np.ndarray, Tensor)):
        raise ValueError(
            f"{label} is a {type(image).__name__}: pass a PIL image, a NumPy array, a torch tensor or the path of an "
            "image file."
        )
    if 0 in image.shape:
        raise ValueError(f"{label} has shape {tuple(image.shape)}, so it has no pixels: remove it from the batch.")
    is_float = image.dtype.kind == "f" if isinstance(image, np.ndarray) else image.is_floating_point()
    pixels = _pixels_of_array(image, label) if isinstance(image, np.ndarray) else _pixels_of_tensor(image, label)
    pixels = _channels_first(pixels, label, input_data_format)
    if is_float:
        _check_float_range(pixels, label, do_rescale)
    return pixels


def decode_image(source: Any, label: str = "image 0") -> Any:
    """`Decoded` for a path, an open file or a PIL image; anything else as it is.

    Raises:
        ValueError: it cannot be read.
    """
    if isinstance(source, Image.Image):
        return _decode(source, label)
    is_path = isinstance(source, (str, os.PathLike))
    if not is_path and not hasattr(source, "read"):
        return source
    if isinstance(source, str) and re.match(r"[a-z]+://|data:", source):
        raise ValueError(f"{label} is an address ({source[:60]}): download the file and pass its path.")
    name = f"{label} ({os.fspath(source)})" if is_path else label
    with open_image(source, name) as image:
        return _decode(image, name)


def _other_format(source: Any) -> str | None:
    """What the first bytes of a file tell of a format that is not read; None where they tell nothing."""
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
        # Looks at these bytes alone; no plugin opens the file.
        others = ((name, accepts) for name, (_, accepts) in Image.OPEN.items() if name not in IMAGE_FORMATS)
        return next((name for name, accepts in others if accepts is not None and accepts(head)), None)
    except Exception:  # a file that cannot be read again, or a plugin that takes it for longer
        return None


def _decode(image: Image.Image, label: str) -> Decoded:
    width, height = image.size
    if width == 0 or height == 0:
        raise ValueError(f"{label} is {height}x{width} pixels, so it has none: remove it from the batch.")
    limit = Image.MAX_IMAGE_PIXELS
    # Only a file that is still to be decoded has tiles; an image in memory has been paid for.
    if getattr(image, "tile", None) and limit is not None and width * height > limit:
        raise ValueError(
            f"{label} has {width * height} pixels, more than the {limit} that Pillow takes for safe: it may be a "
            "decompression bomb; if you trust the file, raise PIL.Image.MAX_IMAGE_PIXELS."
        )
    try:
        # Pillow turns TIFF images itself, and forgets it, when it decodes them.
        orientation = exif_orientation(image) if image.format == "TIFF" else 1
        samples = _samples(image)
        image.load()
        # exif_transpose copies the image also where there is nothing to turn.
        turned = image.getexif().get(EXIF_ORIENTATION, 1)
        upright = ImageOps.exif_transpose(image) if turned in EXIF_TURNS else image
    except Exception as error:
        raise ValueError(
            f"{label} cannot be decoded, the file may be truncated or damaged, or closed before it was read: {error}."
        ) from error
    decoded = Decoded(upright, turned if turned in EXIF_TURNS else orientation, **samples)
    if decoded.is_cut:
        _check_cut(decoded, label)
    return decoded


def _samples(image: Image.Image) -> dict[str, Any]:
    """The fields of `Decoded` that the head of a file tells, which is not decoded yet."""
    # The last entry of a tile, or the first one of that, is how its samples are stored.
    is_16_bit = any(";16" in str(tile[3]) for tile in getattr(image, "tile", None) or ())
    is_cut = is_16_bit and not _is_deep(image.mode)
    if image.format == "PNG":
        bits = _significant_bits(image) if is_16_bit else None
        return {"white": None if bits is None else 2**bits - 1, "is_stretched": True, "is_cut": is_cut}
    if image.format in ("PPM", "JPEG2000") and image.mode != "F":
        # Pillow has scaled them from the range that these files state.
        return {"white": SIXTEEN_BITS}
    if image.format != "TIFF":
        return {}
    tags = image.tag_v2  # type: ignore[attr-defined]
    stated = tags.get(TIFF_S_MAX_SAMPLE_VALUE, tags.get(TIFF_MAX_SAMPLE_VALUE))
    white = None if stated is None else float(np.max(stated))
    if image.mode != "F":
        bits = max(tags.get(TIFF_BITS_PER_SAMPLE, (1,)))
        if white is not None:
            # Many state the largest value that occurs: the bits that it needs are what is used.
            bits = int(white).bit_length()
        white = float(2 ** max(bits, 8) - 1) if white is not None or bits < 16 else None
    is_inverted = tags.get(TIFF_PHOTOMETRIC) == 0 and _is_deep(image.mode)  # of 8 bits, Pillow inverts it
    return {"white": white, "is_cut": is_cut, "is_inverted": is_inverted}


def _significant_bits(image: Image.Image) -> int | None:
    """How many bits of a sample a PNG file says to be significant in its chunk sBIT, where it has one."""
    file = image.fp  # type: ignore[attr-defined]
    if file is None:  # closed, which decoding will tell
        return None
    place = file.tell()
    try:
        file.seek(8)  # behind the signature
        while True:
            length, kind = struct.unpack(">I4s", file.read(8))
            if kind == b"sBIT":
                bits = file.read(length)
                return max(bits[: 1 if length < 3 else 3])  # what follows is of the alpha channel
            if kind in (b"PLTE", b"IDAT", b"IEND"):
                return None
            file.seek(length + 4, os.SEEK_CUR)
    finally:
        file.seek(place)


def _check_cut(decoded: Decoded, label: str) -> None:
    """ValueError if 16 bits were cut to their upper 8, and these may not be what is shown."""
    image, white = decoded.image, decoded.white
    bands = [band for band in image.getbands() if band in "LRGB"]  # neither alpha, nor inks, of which 0 is white
    highest = max((int(np.asarray(image.getchannel(band)).max()) for band in bands), default=255)
    if white is None:
        white = TWELVE_BITS
    if white < SIXTEEN_BITS and highest <= int(white) >> 8:
        raise ValueError(
            f"{label} has 16 bits a channel, of which Pillow reads the upper 8, but no value above {int(white)}, as of "
            "fewer bits: save it with 8 bits a channel, or with values over the whole range of 16."
        )


def _pixels_of_pil(decoded: Decoded, label: str, do_rescale: bool) -> Tensor:
    """(1, H, W) or (3, H, W), float32, from a decoded image."""
    image, mode = decoded.image, decoded.image.mode
    if not _is_deep(mode):
        image = _gray_or_rgb(image, label)
    array = np.asarray(image)
    pixels = torch.from_numpy(array.astype(np.float32))
    if mode == "F":
        _check_float_range(pixels, label, do_rescale=False)
        if do_rescale:
            pixels *= _float_scale(pixels, decoded.white, label)
    elif _is_deep(mode):
        low, high = int(array.min()), int(array.max())
        if low < 0 or high > SIXTEEN_BITS:
            raise ValueError(
                f"{label} has mode '{mode}' and values from {low} to {high}, neither 8 nor 16 bits: convert it to RGB "
                "first."
            )
        # An image in memory may be of 8 bits in this mode. Pillow long opened 16-bit PNG files in it.
        if mode != "I" or high > 255 or decoded.white is not None or decoded.image.format == "PNG":
            pixels /= _white(array, high, decoded, label) / 255
    if decoded.is_inverted:
        pixels = (255 if mode != "F" or do_rescale else 1) - pixels
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def _float_scale(pixels: Tensor, white: float | None, label: str) -> float:
    """The factor that takes a float image onto 0..255."""
    low, high = torch.stack(torch.aminmax(pixels)).tolist()
    if white is not None and low >= 0 and high <= white:
        return 255 / white if white else 1.0
    if white is None and low >= 0 and high <= 1:
        return 255.0
    # What rounds to 0..255 is within it: resampling overshoots.
    if white is None and low >= -0.5 and DARKEST_FLOAT <= high < 255.5:
        return 1.0
    stated = "" if white is None else f" where its file states {white:g} as the largest"
    raise ValueError(
        f"{label} is a float image with values from {low:g} to {high:g}{stated}, so that it is neither in 0..1 nor in "
        "0..255: scale it to 0..1."
    )


def _white(array: np.ndarray, high: int, decoded: Decoded, label: str) -> float:
    """The value of white in integers of more than 8 bits, of which the largest is `high`."""
    white = decoded.white
    if white is None:
        _check_sixteen_bits(high, label)
        return SIXTEEN_BITS
    if decoded.is_stretched and white < SIXTEEN_BITS:
        # PNG asks for samples that are stretched over all 16 bits, which leaves the lower ones nearly empty. Not every
        # writer does it.
        bits = int(white).bit_length()
        is_stretched = high > white or not (array & (2 ** (16 - bits) - 1) > 1).any()
        return SIXTEEN_BITS if is_stretched else white
    if high > white:
        raise ValueError(
            f"{label} has values up to {high}, but its file says that they end at {white:g}: save it in 8 bits, or "
            "with the range that it has."
        )
    return white


def _check_sixteen_bits(high: float, label: str) -> None:
    """ValueError if 16 bits whose range nothing states may be fewer. Black is black in any range."""
    if 0 < high <= TWELVE_BITS:
        raise ValueError(
            f"{label} has 16 bits but no value above {high:g}, and does not say how many bits are used: scale it to 8 "
            "bits (from 12 bits, multiply by 255 / 4095), or over the whole range of 16."
        )


def _gray_or_rgb(image: Image.Image, label: str) -> Image.Image:
    """An 8-bit image of any mode in mode "L" or "RGB"; itself, if it is in one of them."""
    mode = image.mode
    if mode in ("L", "RGB"):
        return image
    try:
        if mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # the way to RGB that Pillow does not warn about
        return image.convert("L" if mode in GRAY_MODES else "RGB")
    except ValueError as error:
        raise ValueError(f"{label} has mode '{mode}', which Pillow cannot turn into RGB: {error}.") from error


def _pixels_of_array(array: np.ndarray, label: str) -> Tensor:
    if array.dtype.kind not in "buif":
        raise ValueError(f"{label} is an array of dtype {array.dtype}: pixels must be real numbers.")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as that
        pixels = torch.from_numpy(array.astype(np.float32))
    if array.dtype.kind == "b":
        pixels *= 255
    elif array.dtype.kind == "u" and array.dtype.itemsize == 2:
        pixels = _eight_bits(pixels, label)
    elif array.dtype.kind in "iu" and array.dtype != np.uint8:
        _check_integers(pixels, label, array.dtype)
    return pixels


def _pixels_of_tensor(tensor: Tensor, label: str) -> Tensor:
    if tensor.is_complex() or tensor.is_quantized or tensor.layout != torch.strided:
        raise ValueError(f"{label} is a tensor of dtype {tensor.dtype}: pixels must be real numbers, stored densely.")
    pixels = tensor.detach().to(torch.float32)
    if tensor.dtype == torch.bool:
        pixels *= 255
    elif tensor.dtype == getattr(torch, "uint16", None):  # torch has it from 2.3 on
        pixels = _eight_bits(pixels, label)
    elif not tensor.is_floating_point() and tensor.dtype != torch.uint8:
        _check_integers(pixels, label, tensor.dtype)
    return pixels


def _eight_bits(pixels: Tensor, label: str) -> Tensor:
    """16-bit values, in 0..255."""
    if pixels.numel():
        _check_sixteen_bits(float(pixels.max()), label)
    return pixels / (SIXTEEN_BITS / 255)


def _check_integers(pixels: Tensor, label: str, dtype: Any) -> None:
    """ValueError unless integers, of a type that says nothing of their range, are in 0..255."""
    if not pixels.numel():
        return
    low, high = torch.stack(torch.aminmax(pixels)).tolist()
    if low < 0 or high > 255:
        raise ValueError(
            f"{label} has dtype {dtype} and values from {low:.0f} to {high:.0f}, but integers are taken as 0..255 and "
            "uint16 alone as 0..65535: scale it, or pass floats, which are taken as they are."
        )


def _channels_first(pixels: Tensor, label: str, input_data_format: str | None) -> Tensor:
    """(1, H, W) or (3, H, W) from (H, W), (C, H, W) or (H, W, C)."""
    shape = tuple(pixels.shape)
    if pixels.ndim == 2:
        return pixels[None]
    if pixels.ndim != 3:
        raise ValueError(
            f"{label} has shape {shape}: an image has 2 or 3 dimensions, and a batch is one array of 4 dimensions or a "
            "list of images."
        )
    if input_data_format is None:
        if shape[0] in (1, 3) and shape[2] in (1, 3):
            logger.warning_once(
                f"{label} has shape {shape}, whose channels can be at either end, and is read as channels_first: say "
                "with input_data_format where they are."
            )
        if shape[0] in (1, 3) or (shape[2] not in (1, 3) and shape[0] in (2, 4)):
            input_data_format = "channels_first"
        else:
            input_data_format = "channels_last"
    if input_data_format == "channels_last":
        pixels = pixels.permute(2, 0, 1)
    channels = pixels.shape[0]
    if channels not in (1, 2, 3, 4):
        raise ValueError(
            f"{label} has shape {shape}, read as {input_data_format} with {channels} channels, but an image has 1 "
            "(gray), 2 (gray, alpha), 3 (RGB) or 4 (RGB, alpha): say where they are with input_data_format, and pass "
            "several gray images as a list."
        )
    return pixels[:1] if channels == 2 else pixels[:3]


def _check_float_range(pixels: Tensor, label: str, do_rescale: bool) -> None:
    # One pass and one transfer for both bounds; a NaN anywhere comes out as NaN.
    low, high = torch.stack(torch.aminmax(pixels)).tolist()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"{label} has NaN or infinite values: clean it before it is preprocessed.")
    if do_rescale and low >= 0 and 0 < high <= 1:
        logger.warning_once(
            f"{label} is a float image with values in 0..1, and do_rescale=True divides them by 255 once more: pass "
            "do_rescale=False for such images."
        )


def _load_map(segmentation_map: Any, label: str, size: tuple[int, int]) -> Tensor:
    segmentation_map = decode_image(segmentation_map, label)
    if isinstance(segmentation_map, Decoded):
        segmentation_map = segmentation_map.image
        mode = segmentation_map.mode
        if mode not in MAP_MODES and not mode.startswith("I;16"):
            raise ValueError(
                f"{label} has mode '{mode}': it must have one channel that holds the id of a class or an instance."
            )
        segmentation_map = np.array(segmentation_map)
    if not isinstance(segmentation_map, (np.ndarray, Tensor)):
        raise ValueError(
            f"{label} is a {type(segmentation_map).__name__}: pass a PIL image, a NumPy array, a torch tensor or the "
            "path of a file."
        )
    ids = segmentation_map
    shape = tuple(ids.shape)
    if ids.ndim == 3 and 1 in (shape[0], shape[2]):
        ids = ids[0] if shape[0] == 1 else ids[..., 0]
    if ids.ndim != 2 or tuple(ids.shape) != tuple(size):
        raise ValueError(
            f"{label} has shape {shape} but its image is {size[0]}x{size[1]} (height x width, upright by its EXIF "
            "orientation): they must agree, one id a pixel."
        )
    ids = _whole_numbers(ids, label)
    if isinstance(ids, np.ndarray):
        ids = torch.from_numpy(ids.astype(np.uint8 if ids.dtype in (np.uint8, np.bool_) else np.int64))
    return ids.detach().to(torch.uint8 if ids.dtype in (torch.uint8, torch.bool) else torch.int64)


def _whole_numbers(ids: Any, label: str) -> Any:
    """`ids` as they are if they are integers or floats without fraction."""
    is_array = isinstance(ids, np.ndarray)
    if ids.dtype.kind not in "buif" if is_array else ids.is_complex():
        raise ValueError(f"{label} has dtype {ids.dtype}: ids are whole numbers.")
    is_float = ids.dtype.kind == "f" if is_array else ids.is_floating_point()
    with np.errstate(invalid="ignore"):  # NaN and infinity leave NaN, and are refused as fractions are
        if is_float and not bool((ids % 1 == 0).all()):
            raise ValueError(
                f"{label} has values that are no whole numbers: resize maps with nearest, and do not rescale them."
            )
    return ids

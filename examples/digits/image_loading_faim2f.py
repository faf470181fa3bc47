"""Images and segmentation maps, in whatever form they come, as tensors of one shape; what cannot be one is refused.

Every refusal is a ValueError of one sentence that names the image by its index in the batch.
"""

import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

EXIF_ORIENTATION = 0x0112
# 65535 / 257 = 255: the factor that takes the whole 16-bit range onto the whole 8-bit range.
SIXTEEN_TO_EIGHT_BITS = 257
GRAY_MODES = ("1", "L", "LA")
MAP_MODES = ("1", "L", "P", "I", "F")


def load_images(images: Any, input_data_format: str | None = None, do_rescale: bool = False) -> Iterator[Tensor]:
    """Reads one image or a batch of them, one after the other, so that large photos need not be in memory together.

    Accepted: PIL images of any mode that Pillow turns into RGB, NumPy arrays, torch tensors, paths, open binary files;
    one, a list or tuple of them, or a 4-dimensional array or tensor. An image is turned upright by its EXIF
    orientation, and loses its alpha channel. Arrays are (H, W), (H, W, C) or (C, H, W) with 1 (gray), 2 (gray, alpha),
    3 (RGB) or 4 (RGB, alpha) channels. Where `input_data_format` does not say which end the channels are at, it is the
    first if its size is 1 or 3, else the last if its size is, else the first if its size is 2 or 4, else the last.

    Values: 8-bit images stay 0..255, boolean and 1-bit ones become 0 and 255, 16-bit ones (Pillow's "I;16", its "I"
    where a value exceeds 255, uint16 arrays) are divided by 257. Every other type is taken as it is.

    Args:
        images: see above.
        input_data_format: "channels_first", "channels_last" or None.
        do_rescale: whether the caller multiplies the values by 1/255; if so, a float image in 0..1 earns a warning.

    Yields:
        A tensor for each image, (1, H, W) if gray and (3, H, W) if RGB, float32, on the device it came on. It may
        share the memory of the image.

    Raises:
        ValueError: no image, or one that cannot be read, is empty, has NaN or infinite values, or another shape.
    """
    if input_data_format not in (None, "channels_first", "channels_last"):
        raise ValueError(
            f"input_data_format must be 'channels_first', 'channels_last' or None, got {input_data_format!r}."
        )
    for i, item in enumerate(_as_list(images, "image", batch_ranks=(4,))):
        yield _load_image(item, f"image {i}", input_data_format, do_rescale)


def eight_bit_image(source: Any, label: str = "image 0") -> Any:
    """An image whose pixels are bytes, decoded and upright, as Pillow's in mode "L" (gray) or "RGB"; any other as it
    is, but read if it was a file. `load_images` gives the same pixels of what comes out.

    Raises:
        ValueError: it cannot be read.
    """
    image = _decode_file(source, label)
    if not isinstance(image, Image.Image) or image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return image
    return _gray_or_rgb(image, label)


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
    image = _decode_file(image, label)
    if isinstance(image, Image.Image):
        return _pixels_of_pil(image, label)
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


def _decode_file(source: Any, label: str) -> Any:
    """A decoded, upright PIL image for a path, an open file or a PIL image; anything else as it is."""
    if isinstance(source, Image.Image):
        return _decode(source, label)
    is_path = isinstance(source, (str, os.PathLike))
    if not is_path and not hasattr(source, "read"):
        return source
    if isinstance(source, str) and re.match(r"[a-z]+://|data:", source):
        raise ValueError(f"{label} is an address ({source[:60]}): download the file and pass its path.")
    name = f"{label} ({os.fspath(source)})" if is_path else label
    try:
        image = Image.open(source)
    # Pillow's plugins let through whatever a broken file makes them raise, its own bomb warning and error included.
    except Exception as error:
        raise ValueError(f"{name} cannot be opened as an image: {error}.") from error
    with image:
        return _decode(image, name)


def _decode(image: Image.Image, label: str) -> Image.Image:
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
        image.load()
        # exif_transpose copies the image also where there is nothing to turn.
        turned = image.getexif().get(EXIF_ORIENTATION, 1) in range(2, 9)
        return ImageOps.exif_transpose(image) if turned else image
    except Exception as error:
        raise ValueError(
            f"{label} cannot be decoded, the file may be truncated or damaged, or closed before it was read: {error}."
        ) from error


def _pixels_of_pil(image: Image.Image, label: str) -> Tensor:
    """(1, H, W) or (3, H, W), float32, from a decoded image."""
    mode = image.mode
    if mode not in ("I", "F") and not mode.startswith("I;16"):
        image = _gray_or_rgb(image, label)
    array = np.asarray(image)
    pixels = torch.from_numpy(array.astype(np.float32))
    if mode == "F":
        _check_float_range(pixels, label, do_rescale=False)
    elif mode == "I":
        low, high = int(array.min()), int(array.max())
        if low < 0 or high > 65535:
            raise ValueError(
                f"{label} has mode 'I' and values from {low} to {high}, neither 8 nor 16 bits: convert it to RGB first."
            )
        # Pillow long opened 16-bit PNG files in this mode, so values above 255 mean 16 bits.
        if high > 255:
            pixels /= SIXTEEN_TO_EIGHT_BITS
    elif mode.startswith("I;16"):
        pixels /= SIXTEEN_TO_EIGHT_BITS
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


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
        pixels /= SIXTEEN_TO_EIGHT_BITS
    return pixels


def _pixels_of_tensor(tensor: Tensor, label: str) -> Tensor:
    if tensor.is_complex() or tensor.is_quantized or tensor.layout != torch.strided:
        raise ValueError(f"{label} is a tensor of dtype {tensor.dtype}: pixels must be real numbers, stored densely.")
    pixels = tensor.detach().to(torch.float32)
    if tensor.dtype == torch.bool:
        pixels *= 255
    elif tensor.dtype == getattr(torch, "uint16", None):  # torch has it from 2.3 on
        pixels /= SIXTEEN_TO_EIGHT_BITS
    return pixels


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
    segmentation_map = _decode_file(segmentation_map, label)
    if isinstance(segmentation_map, Image.Image):
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

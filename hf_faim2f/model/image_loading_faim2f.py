"""Converts images and segmentation maps in any accepted form to tensors of uniform layout.

An invalid image raises a ValueError whose one-sentence message gives the image's index in the batch.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.utils import logging

from .channels_faim2f import RGB
from .image_bands_faim2f import ARRAY_SUFFIXES, Bands, check_pixels, these_channels_first
from .image_files_faim2f import (
    IMAGE_FORMATS,
    IMAGE_SUFFIXES,
    READ_FORMATS,
    SIXTEEN_BITS,
    TWELVE_BITS,
    Decoded,
    decode_image,
    exif_orientation,
    is_deep,
    open_image,
)

logger = logging.get_logger(__name__)

# A float image in 0..255 must have a value of at least this: the same fraction of 255 as TWELVE_BITS of 16 bits.
DARKEST_FLOAT = 16
GRAY_MODES = ("1", "L", "LA")
MAP_MODES = ("1", "L", "P", "I", "F")


def load_images(
    images: Any, input_data_format: str | None = None, do_rescale: bool = False, num_channels: int = RGB
) -> Iterator[Tensor]:
    """Reads one image or a batch lazily, so that large images are not all in memory at once.

    Accepts PIL images of any mode that Pillow converts to RGB, NumPy arrays, torch tensors, paths of regular files, and
    open binary files, in `IMAGE_FORMATS`: a single one, a list or tuple, or a 4-dimensional array or tensor. Images are
    rotated upright by their EXIF orientation, like `PIL.ImageOps.exif_transpose(PIL.Image.open(file))`, and the alpha
    channel is dropped.

    Arrays are (H, W), (H, W, C) or (C, H, W) with 1 (gray), 2 (gray, alpha), 3 (RGB) or 4 (RGB, alpha) channels. If
    `input_data_format` is None, the channel dimension is the first one if its size is 1 or 3, else the last if its size
    is 1 or 3, else the first if its size is 2 or 4, else the last.

    If `num_channels` is not three, an image must have exactly that many channels, which keep their order: arrays, TIFF
    files with any number of bands, and PIL images with alpha (LA for two, RGBA for four). For one channel, alpha is
    dropped, and three equal channels become one. NumPy's .npy files are read as arrays.

    Values:
    - 8-bit images stay 0..255. Boolean and 1-bit images become 0 and 255.
    - Images with more bits (Pillow's "I;16", its "I" if a value exceeds 255, uint16 arrays) are scaled to 0..255 from
      the range that the file states (the bit depth of a TIFF or JPEG 2000 file, TIFF's MaxSampleValue or
      SMaxSampleValue rounded up to whole bits, PNG's sBIT, the maximum of a PGM), else from 0..65535. If no range is
      stated and no value exceeds 4095, the image may have 12 bits, and is rejected.
    - Other integers must be in 0..255.
    - Float arrays and tensors are not changed. Float images of Pillow (mode "F", such as float TIFF files) are taken as
      0..1 if all values are in that range, as 0..255 if the largest value is 16 to 255, and are rejected otherwise,
      unless SMaxSampleValue states the largest value.

    Args:
        images: see above.
        input_data_format: "channels_first", "channels_last" or None.
        num_channels: number of channels that the model takes.
        do_rescale: the caller will multiply the values by 1/255. If true, a float array in 0..1 causes a warning; if
            false, float images of Pillow are not changed.

    Yields:
        For each image a float32 tensor, (1, H, W) if gray and (3, H, W) if RGB, or (num_channels, H, W), on the image's
        device. It may share memory with the image.

    Raises:
        ValueError: there is no image, or an image cannot be read, is empty, has NaN or infinite values, an unsupported
            shape, or values of unknown range.
    """
    if input_data_format not in (None, "channels_first", "channels_last"):
        raise ValueError(
            f"input_data_format must be 'channels_first', 'channels_last' or None, got {input_data_format!r}."
        )
    for i, item in enumerate(_as_list(images, "image", batch_ranks=(4,))):
        yield _load_image(item, f"image {i}", input_data_format, do_rescale, num_channels)


def eight_bit_image(source: Any, label: str = "image 0") -> Any:
    """Decodes an image to 8 bits; returns arrays and tensors unchanged.

    The result is a Pillow image of mode "L" or "RGB", or, if the mode had more bits, a float32 tensor (H, W) in 0..255.

    `load_images` with `do_rescale=True` reads the same pixels from the result as from `source`.

    Raises:
        ValueError: the image cannot be read.
    """
    decoded = decode_image(source, label)
    if not isinstance(decoded, Decoded):
        return decoded
    if is_deep(decoded.image.mode):
        return _pixels_of_pil(decoded, label, do_rescale=True)[0]
    return _gray_or_rgb(decoded.image, label)


def load_segmentation_maps(segmentation_maps: Any, sizes: list[tuple[int, int]]) -> list[Tensor]:
    """Reads the segmentation maps of a batch: the id of a class or an instance for every pixel.

    Args:
        segmentation_maps: as in `load_images`. Arrays are (H, W), (1, H, W) or (H, W, 1) for one map in a list, and
            (B, H, W) or (B, 1, H, W) for a batch. PIL images have one channel; the indices of a palette are the ids.
        sizes: (height, width) of each image.

    Returns:
        For each image a tensor (H, W), uint8 or int64.

    Raises:
        ValueError: the number of maps differs from that of the images, a map's size differs from its image's, or ids
            are not integers.
    """
    items = _as_list(segmentation_maps, "segmentation map", batch_ranks=(3, 4))
    if len(items) != len(sizes):
        raise ValueError(f"There are {len(sizes)} images but {len(items)} segmentation maps: pass one map per image.")
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


def _load_image(image: Any, label: str, input_data_format: str | None, do_rescale: bool, num_channels: int) -> Tensor:
    image = decode_image(image, label, num_channels)
    if isinstance(image, Decoded):
        return _pixels_of_pil(image, label, do_rescale, num_channels)
    if isinstance(image, Bands):
        if image.is_tiff:
            return _pixels_of_tiff(image, label, do_rescale)
        image, input_data_format = image.array, None
        if num_channels == RGB and image.ndim == 3 and not {image.shape[0], image.shape[2]} & {1, RGB}:
            raise ValueError(f"{label} has an array of shape {image.shape}, but the model takes 3 channels.")
    if not isinstance(image, (np.ndarray, Tensor)):
        raise ValueError(
            f"{label} is a {type(image).__name__}: pass a PIL image, a NumPy array, a torch tensor or the path of an "
            "image file."
        )
    if 0 in image.shape:
        raise ValueError(f"{label} has shape {tuple(image.shape)}, so it has no pixels: remove it from the batch.")
    is_float = image.dtype.kind == "f" if isinstance(image, np.ndarray) else image.is_floating_point()
    pixels = _pixels_of_array(image, label) if isinstance(image, np.ndarray) else _pixels_of_tensor(image, label)
    pixels = _channels_first(pixels, label, input_data_format, num_channels)
    if is_float:
        _check_float_range(pixels, label, do_rescale)
    return pixels


def _pixels_of_pil(decoded: Decoded, label: str, do_rescale: bool, num_channels: int = RGB) -> Tensor:
    """(1, H, W) or (3, H, W), or the other number of channels, float32, from a decoded image."""
    image, mode = decoded.image, decoded.image.mode
    if num_channels != RGB:
        image = _with_channels(decoded, label, num_channels)
    elif not is_deep(mode):
        image = _gray_or_rgb(image, label)
    array = np.asarray(image)
    pixels = torch.from_numpy(array.astype(np.float32))
    if mode == "F":
        _check_float_range(pixels, label, do_rescale=False)
        if do_rescale:
            pixels *= _float_scale(pixels, decoded.white, label)
    elif is_deep(mode):
        low, high = int(array.min()), int(array.max())
        if low < 0 or high > SIXTEEN_BITS:
            raise ValueError(
                f"{label} has mode '{mode}' and values from {low} to {high}, neither 8 nor 16 bits: convert it to RGB "
                "first."
            )
        # In mode I an image in memory may have 8 bits. Older versions of Pillow open 16-bit PNG files in this mode.
        if mode != "I" or high > 255 or decoded.white is not None or decoded.image.format == "PNG":
            pixels /= _white(array, high, decoded, label) / 255
    if decoded.is_inverted:
        pixels = (255 if mode != "F" or do_rescale else 1) - pixels
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def _float_scale(pixels: Tensor, white: float | None, label: str) -> float:
    """The factor that scales a float image to 0..255."""
    low, high = torch.stack(torch.aminmax(pixels)).tolist()
    if white is not None and low >= 0 and high <= white:
        return 255 / white if white else 1.0
    if white is None and low >= 0 and high <= 1:
        return 255.0
    # Values that round to 0..255 are accepted, because resampling overshoots.
    if white is None and low >= -0.5 and DARKEST_FLOAT <= high < 255.5:
        return 1.0
    stated = "" if white is None else f" where its file states {white:g} as the largest"
    raise ValueError(
        f"{label} is a float image with values from {low:g} to {high:g}{stated}, so that it is neither in 0..1 nor in "
        "0..255: scale it to 0..1."
    )


def _white(array: np.ndarray, high: int, decoded: Decoded, label: str) -> float:
    """The value of white in an integer image with more than 8 bits, whose largest value is `high`."""
    white = decoded.white
    if white is None:
        _check_sixteen_bits(high, label)
        return SIXTEEN_BITS
    if decoded.is_stretched and white < SIXTEEN_BITS:
        # The PNG specification tells writers to scale samples to all 16 bits, but not every writer does.
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
    """Raises ValueError if 16-bit values without a stated range may have fewer bits. All zeros are accepted."""
    if 0 < high <= TWELVE_BITS:
        raise ValueError(
            f"{label} has 16 bits but no value above {high:g}, and does not say how many bits are used: scale it to 8 "
            "bits (from 12 bits, multiply by 255 / 4095), or over the whole range of 16."
        )


def _gray_or_rgb(image: Image.Image, label: str) -> Image.Image:
    """An 8-bit image of any mode, converted to mode "L" or "RGB" if needed."""
    mode = image.mode
    if mode in ("L", "RGB"):
        return image
    try:
        if mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # direct conversion to RGB warns
        return image.convert("L" if mode in GRAY_MODES else "RGB")
    except ValueError as error:
        raise ValueError(f"{label} has mode '{mode}', which Pillow cannot turn into RGB: {error}.") from error


def _with_channels(decoded: Decoded, label: str, num_channels: int) -> Image.Image:
    """The image with this number of channels, other than three; ValueError if it has another number."""
    image, mode = decoded.image, decoded.image.mode
    if is_deep(mode) and num_channels == 1:
        return image
    if decoded.is_cut:
        raise ValueError(f"{label} has 16 bits a channel, of which Pillow reads the upper 8: save it as TIFF or .npy.")
    if num_channels == 1:
        image = _gray_or_rgb(image, label)
        bands = [np.asarray(band) for band in image.split()]
        if all(np.array_equal(band, bands[0]) for band in bands):
            return image.getchannel(0)
    if mode in ("LA", "RGBA", "RGBX") and len(mode) == num_channels:
        return image
    raise ValueError(
        f"{label} has mode '{mode}', but the model takes {num_channels} channel{'s'[: num_channels != 1]}: "
        + ("convert it to gray." if num_channels == 1 else "pass an array, a TIFF or a .npy file of as many.")
    )


def _pixels_of_tiff(bands: Bands, label: str, do_rescale: bool) -> Tensor:
    """(C, H, W) float32, from the bands of a TIFF file."""
    if bands.array.dtype.kind == "f":
        with np.errstate(over="ignore"):
            pixels = torch.from_numpy(bands.array.astype(np.float32))
        _check_float_range(pixels, label, do_rescale=False)
        return pixels * _float_scale(pixels, bands.white, label) if do_rescale else pixels
    if bands.white is None:
        return _pixels_of_array(bands.array, label)
    high = int(bands.array.max())
    if high > bands.white:
        raise ValueError(
            f"{label} has values up to {high}, but its file says that they end at {bands.white:g}: save it with the "
            "range that it has."
        )
    return torch.from_numpy(bands.array.astype(np.float32)) / (bands.white / 255)


def _pixels_of_array(array: np.ndarray, label: str) -> Tensor:
    if array.dtype.kind not in "buif":
        raise ValueError(f"{label} is an array of dtype {array.dtype}: pixels must be real numbers.")
    with np.errstate(over="ignore"):  # overflow gives infinity, which is rejected later
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
    elif tensor.dtype == getattr(torch, "uint16", None):  # since torch 2.3
        pixels = _eight_bits(pixels, label)
    elif not tensor.is_floating_point() and tensor.dtype != torch.uint8:
        _check_integers(pixels, label, tensor.dtype)
    return pixels


def _eight_bits(pixels: Tensor, label: str) -> Tensor:
    """16-bit values scaled to 0..255."""
    if pixels.numel():
        _check_sixteen_bits(float(pixels.max()), label)
    return pixels / (SIXTEEN_BITS / 255)


def _check_integers(pixels: Tensor, label: str, dtype: Any) -> None:
    """Raises ValueError if an integer is outside 0..255."""
    if not pixels.numel():
        return
    low, high = torch.stack(torch.aminmax(pixels)).tolist()
    if low < 0 or high > 255:
        raise ValueError(
            f"{label} has dtype {dtype} and values from {low:.0f} to {high:.0f}, but integers must be in 0..255, or in "
            "0..65535 for uint16: scale it, or pass floats, which are used unchanged."
        )


def _channels_first(pixels: Tensor, label: str, input_data_format: str | None, num_channels: int) -> Tensor:
    """(1, H, W) or (3, H, W), or (num_channels, H, W), from (H, W), (C, H, W) or (H, W, C)."""
    if num_channels != RGB:
        return these_channels_first(pixels, label, input_data_format, num_channels)
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
    low, high = torch.stack(torch.aminmax(pixels)).tolist()  # in one transfer; NaN propagates
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"{label} has NaN or infinite values: clean it before it is preprocessed.")
    if do_rescale and low >= 0 and 0 < high <= 1:
        logger.warning_once(
            f"{label} is a float image with values in 0..1, and is divided by 255 once more (do_rescale): "
            "multiply it by 255, or pass do_rescale=False to the image processor."
        )
    elif do_rescale and high > 2 * 255:  # resampling overshoots less
        logger.warning_once(f"{label} has floats up to {high:g}, but must be in 0..255 if rescale_factor is 1/255.")
    elif do_rescale and low <= -0.5 and high < DARKEST_FLOAT:
        logger.warning_once(
            f"{label} is a float image with values from {low:g} to {high:g}, as after normalization, and is divided by "
            "255 (do_rescale): pass the image as it was before, or do_rescale=False to the image processor, and "
            "do_normalize=False if it is normalized."
        )


def _load_map(segmentation_map: Any, label: str, size: tuple[int, int]) -> Tensor:
    ids = decode_image(segmentation_map, label)
    if isinstance(ids, Decoded):
        if ids.changed:
            raise ValueError(f"{label} {ids.changed}: save maps as PNG.")
        mode = ids.image.mode
        if mode not in MAP_MODES and not mode.startswith("I;16"):
            raise ValueError(
                f"{label} has mode '{mode}': it must have one channel that holds the id of a class or an instance."
            )
        ids = np.array(ids.image) // ids.step if ids.step > 1 else np.array(ids.image)
    elif isinstance(ids, Bands):
        ids = ids.array
    if not isinstance(ids, (np.ndarray, Tensor)):
        raise ValueError(
            f"{label} is a {type(ids).__name__}: pass a PIL image, a NumPy array, a torch tensor or the path of a file."
        )
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
    """Returns `ids` unchanged if they are integers or integer-valued floats; otherwise raises ValueError."""
    is_array = isinstance(ids, np.ndarray)
    if ids.dtype.kind not in "buif" if is_array else ids.is_complex():
        raise ValueError(f"{label} has dtype {ids.dtype}: ids are whole numbers.")
    is_float = ids.dtype.kind == "f" if is_array else ids.is_floating_point()
    with np.errstate(invalid="ignore"):  # NaN and infinity give NaN, which is rejected like a fraction
        if is_float and not bool((ids % 1 == 0).all()):
            raise ValueError(
                f"{label} has values that are not whole numbers: resize maps with nearest, and do not rescale them."
            )
    return ids


__all__ = [
    "ARRAY_SUFFIXES",
    "IMAGE_FORMATS",
    "IMAGE_SUFFIXES",
    "READ_FORMATS",
    "Bands",
    "Decoded",
    "check_pixels",
    "decode_image",
    "eight_bit_image",
    "exif_orientation",
    "load_images",
    "load_segmentation_maps",
    "open_image",
]

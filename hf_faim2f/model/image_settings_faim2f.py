"""The image processor's settings. Each has a function that validates it and returns the value to be saved."""

import difflib
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.utils import logging

from .channels_faim2f import RGB

logger = logging.get_logger(__name__)

# A single number S as `size` means a shortest edge of S and a longest edge of at most 4 S (as in ADE20K recipes).
DEFAULT_LONGEST_TO_SHORTEST = 4
BILINEAR = 2  # PIL.Image.Resampling.BILINEAR
# Keys that transformers 4.57 or 5.x writes into preprocessor_config.json; not settings.
SERVICE_KEYS = frozenset(
    "image_processor_type feature_extractor_type processor_class _processor_class _valid_processor_keys "
    "_valid_kwargs_names".split()
)

# Settings of transformers' image processors that have no effect here, as in Mask2Former.
WITHOUT_EFFECT = ("do_convert_rgb", "do_center_crop", "crop_size", "disable_grouping")


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be True or False, got {value!r}.")
    return bool(value)


def _integer(name: str, value: Any, least: float = -math.inf) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)) or value < least:
        bound = "" if least == -math.inf else f" of at least {least}"
        raise ValueError(f"{name} must be a whole number{bound}, got {value!r}.")
    return int(value)


def _number(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> float:
    is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    # math.isfinite overflows for large integers.
    is_finite = is_number and (abs(value) <= sys.float_info.max if isinstance(value, int) else math.isfinite(value))
    if not is_finite or not least <= value <= most:
        bounds = "" if most == math.inf else f" from {least} to {most}"
        raise ValueError(f"{name} must be a finite number{bounds}, got {value!r}.")
    return float(value)


def _channel_values(name: str, value: Any) -> float | list[float]:
    if isinstance(value, Iterable):
        return [_number(name, number) for number in value]
    return _number(name, value)


def _std(name: str, value: Any) -> float | list[float]:
    values = _channel_values(name, value)
    if (values if isinstance(values, float) else min(values, default=1.0)) <= 0:
        raise ValueError(f"{name} must be positive, got {value!r}.")
    return values


def fit_channels(name: str, value: float | list[float], num_channels: int) -> list[float]:
    """The mean or standard deviation of each channel, from one number for all or a list.

    Raises:
        ValueError: the list has another length than `num_channels`.
    """
    values = [value] * num_channels if isinstance(value, float) else value
    if len(values) == num_channels:
        return values
    count = "three (red, green, blue)" if num_channels == RGB else f"{num_channels} (num_channels)"
    raise ValueError(f"{name} must be one number or {count}, got {value!r}.")


def _height_width(name: str, value: Any) -> dict[str, int]:
    is_pair = isinstance(value, (list, tuple)) and len(value) == 2
    sides = {"height": value[0], "width": value[1]} if is_pair else _as_dict(value)
    if set(sides) != {"height", "width"}:
        raise ValueError(f"{name} must be {{'height': H, 'width': W}}, got {value!r}.")
    return {side: _integer(f"{name}['{side}']", number, 1) for side, number in sides.items()}


def _size(name: str, value: Any) -> dict[str, int]:
    if isinstance(value, (int, np.integer)):
        shortest = _integer(name, value, 1)
        return {"shortest_edge": shortest, "longest_edge": DEFAULT_LONGEST_TO_SHORTEST * shortest}
    if isinstance(value, (list, tuple)):
        return _height_width(name, value)
    edges = {key: number for key, number in _as_dict(value).items() if number is not None}
    if set(edges) == {"height", "width"}:
        return _height_width(name, edges)
    if set(edges) not in ({"shortest_edge"}, {"shortest_edge", "longest_edge"}):
        raise ValueError(
            f"{name} must be {{'height': H, 'width': W}} or {{'shortest_edge': S, 'longest_edge': L}} (the cap L can "
            f"be left out), got {value!r}."
        )
    return {edge: _integer(f"{name}['{edge}']", number, 1) for edge, number in edges.items()}


def _as_dict(value: Any) -> dict[str, Any]:
    try:
        return dict(value)  # transformers' SizeDict is not a Mapping
    except (TypeError, ValueError):
        return {}


def _two_sides(name: str, value: Any) -> list[int]:
    sides = list(value) if isinstance(value, (list, tuple)) else []
    if len(sides) != 2:
        raise ValueError(f"{name} must be a pair (height, width), got {value!r}.")
    return [_integer(name, side, 1) for side in sides]


def _label_ids(name: str, value: Any) -> list[int]:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        raise ValueError(f"{name} must be a list of class ids, got {value!r}.")
    return sorted({_integer(name, label_id, 0) for label_id in value})


Check = Callable[[str, Any], Any]
PREPROCESSING_SETTINGS: dict[str, Check] = {
    "do_resize": _flag,
    "size": _size,
    "do_rescale": _flag,
    "rescale_factor": _number,
    "do_normalize": _flag,
    "image_mean": _channel_values,
    "image_std": _std,
    "do_pad": _flag,
    "size_divisor": lambda name, value: _integer(name, value, 0),
    "pad_size": _height_width,
    "default_to_square": _flag,
    "ignore_index": _integer,
    "do_reduce_labels": _flag,
    "num_labels": lambda name, value: _integer(name, value, 1),
}
POST_PROCESSING_SETTINGS: dict[str, Check] = {
    "cls_sigmoid": _flag,
    "threshold": lambda name, value: _number(name, value, 0, 1),
    "mask_threshold": lambda name, value: _number(name, value, 0, 1),
    "top_k": lambda name, value: _integer(name, value, 1),
    "use_mask_score": _flag,
    "predict_all_pixels": _flag,
    "filter_empty_masks": _flag,
    "intermediate_size": _two_sides,
    "label_ids_to_fuse": _label_ids,
}
OPTIONAL_SETTINGS = frozenset({"pad_size", "ignore_index", "num_labels", "intermediate_size", "label_ids_to_fuse"})
SETTINGS = {**PREPROCESSING_SETTINGS, **POST_PROCESSING_SETTINGS}


def refuse_unknown(keywords: Iterable[str], known: Iterable[str], owner: str) -> None:
    """Raises TypeError for the first of `keywords` that is not in `known`; the message suggests the closest name."""
    known = sorted(known)
    for name in keywords:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise TypeError(f"{owner} has no setting `{name}`; did you mean `{nearest}`? It knows: {', '.join(known)}.")


def scale_and_shift(settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """`scale` and `shift`, (C, 1, 1) each: rescaling and normalization combined are `pixels * scale + shift`."""
    factor = settings["rescale_factor"] if settings["do_rescale"] else 1.0
    mean, std = settings["image_mean"], settings["image_std"]
    if not settings["do_normalize"]:
        mean, std = [0.0] * len(mean), [1.0] * len(mean)
    mean, std = (np.array(values, dtype=np.float64).reshape(-1, 1, 1) for values in (mean, std))
    scale, shift = ((values / std).astype(np.float32) for values in (factor, -mean))
    return torch.from_numpy(scale), torch.from_numpy(shift)


def near_settings(keywords: Iterable[str]) -> list[str]:
    """The keywords that are settings, or whose names resemble one."""
    return [name for name in keywords if difflib.get_close_matches(name, SETTINGS, n=1, cutoff=0.8)]


def square_if_asked(size: Any, default_to_square: bool) -> Any:
    """`size`, or (size, size) if it is a single number and `default_to_square` is true."""
    return (size, size) if default_to_square and isinstance(size, (int, np.integer)) else size


def with_own_names(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Translates keywords of transformers' Mask2Former image processor to the names used here.

    `reduce_labels` becomes `do_reduce_labels`. `resample` must be bilinear. The keywords in `WITHOUT_EFFECT` are
    dropped, with a warning if a crop is requested.

    Raises:
        ValueError: `resample` is not bilinear.
    """
    keywords = dict(keywords)
    if keywords.get("do_center_crop"):
        logger.warning_once(
            "do_center_crop has no effect, as in transformers' Mask2Former: masks of a crop would not fit the image. "
            "Crop images before they are processed."
        )
    for name in WITHOUT_EFFECT:
        keywords.pop(name, None)
    if "reduce_labels" in keywords:
        reduce_labels = keywords.pop("reduce_labels")
        keywords.setdefault("do_reduce_labels", reduce_labels)
    if keywords.pop("resample", None) not in (None, BILINEAR):
        raise ValueError("resample must be bilinear (PIL.Image.Resampling.BILINEAR), as in training.")
    return keywords


def takes_fractions(settings: Mapping[str, Any]) -> bool:
    """Whether an image processor's normalization is of pixels in 0..1 that it does not rescale to that range."""
    most = max(*settings["image_mean"], *settings["image_std"])
    return settings["do_normalize"] and not settings["do_rescale"] and most <= 1


def to_bytes(pixels: Tensor) -> Tensor:
    """Pixels for a graph of bytes, rounded to uint8.

    Raises:
        ValueError: they are not in 0..255.
    """
    least, most = pixels.aminmax()
    if least < -0.5 or most > 255.5:
        raise ValueError(
            f"image 0 has values from {float(least):g} to {float(most):g}, but the graph takes bytes (0..255): export "
            "the model with the input pixel_values."
        )
    return pixels.round().clamp(0, 255).to(torch.uint8)


# A factor below this share of 1/255 is not for pixels in 0..255.
MOST_DARKENED = 0.1
# A pixel above this is not in 0..1, even after resampling, which overshoots.
MOST_OF_ONE = 8


def warn_of_scale(settings: Mapping[str, Any], images: Iterable[Tensor]) -> None:
    """Warns if pixels and settings are of different ranges.

    That is, if pixels are rescaled although `image_mean` is for 0..255, or not rescaled although it is for 0..1, or if
    `rescale_factor` is for a larger range.
    """
    mean, factor = settings["image_mean"], settings["rescale_factor"]
    if not settings["do_normalize"]:
        return
    if settings["do_rescale"]:
        if min(mean) > 1 and factor < 0.1:
            logger.warning_once(
                f"image_mean {mean} is of pixels in 0..255, but do_rescale=True multiplies them by {factor:g} first: "
                "pass do_rescale=False, or divide image_mean and image_std by 255."
            )
        elif factor < MOST_DARKENED / 255 and all(float(image.max()) <= 255 for image in images):
            logger.warning_once(
                f"rescale_factor {factor:g} is for values above 255, but these pixels are in 0..255, to which integers "
                "of 16 bits are scaled first: use a rescale_factor of 1/255, or pass floats."
            )
    elif takes_fractions(settings) and any(float(image.max()) > MOST_OF_ONE for image in images):
        logger.warning_once(
            f"Some pixels are above 1, but image_mean {mean} is of pixels in 0..1, and do_rescale=False leaves them as "
            "they are: pass do_rescale=True for images in 0..255."
        )


# Enough for an 8K frame. Larger results come from a wrong size, or an extreme aspect ratio without a longest edge.
MAX_RESIZED_PIXELS = 2**25


def resized_size(height: int, width: int, size: Mapping[str, int], size_divisor: int = 0) -> tuple[int, int]:
    """(height, width) of an image after resizing.

    With `{"height": H, "width": W}` it is (H, W). With `{"shortest_edge": S, "longest_edge": L}` the image keeps its
    aspect ratio: its shorter side becomes S, or, if the longer side would then exceed L, the longer side becomes L.
    Sides are rounded to the nearest integer, halves up, as in detectron2's ResizeShortestEdge and Focoos.

    With a `size_divisor` above 0, sides are instead truncated to integers and then rounded up to multiples of
    `size_divisor`, as in transformers' Mask2Former. This changes the aspect ratio slightly.

    Raises:
        ValueError: the result has a side of 0 pixels, or more than 2**25 pixels.
    """
    if "height" in size:
        new_height, new_width = size["height"], size["width"]
    else:
        shortest, longest = float(size["shortest_edge"]), size.get("longest_edge")
        if size_divisor:
            new_height, new_width = get_size_with_aspect_ratio((height, width), size["shortest_edge"], longest)
        else:
            scale = shortest / min(height, width)
            exact = [shortest, scale * width] if height < width else [scale * height, shortest]
            if longest is not None and max(exact) > longest:
                scale = longest / max(exact)
                exact = [side * scale for side in exact]
            new_height, new_width = (int(side + 0.5) for side in exact)
    if size_divisor:
        new_height, new_width = (math.ceil(side / size_divisor) * size_divisor for side in (new_height, new_width))
    if min(new_height, new_width) == 0 or new_height * new_width > MAX_RESIZED_PIXELS:
        raise ValueError(
            f"{height}x{width} pixels would be resized to {new_height}x{new_width} (height x width): crop an image of "
            f"such an aspect ratio, or choose another size than {dict(size)}."
        )
    return new_height, new_width


def padded_sizes(sizes: list[tuple[int, int]], settings: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(height, width) of each image after padding.

    Raises:
        ValueError: an image is larger than `pad_size`.
    """
    if not settings["do_pad"]:
        return sizes
    if settings["pad_size"] is not None:
        padded = (settings["pad_size"]["height"], settings["pad_size"]["width"])
        for i, (height, width) in enumerate(sizes):
            if height > padded[0] or width > padded[1]:
                raise ValueError(
                    f"image {i} is {height}x{width} (height x width) and does not fit into pad_size "
                    f"{padded[0]}x{padded[1]}: choose a larger pad_size or a smaller size."
                )
    else:
        padded = tuple(map(max, zip(*sizes, strict=True)))
    return [padded] * len(sizes)

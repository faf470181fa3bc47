"""Augmentations of items: dataclasses that are called as `augmented = augmentation(item, generator)`.

All randomness comes from the generator. Images are resized bilinearly with antialiasing, like in Pillow, and maps by
nearest neighbor at the image processor's sampling positions. Geometric augmentations drop segments without pixels, make
ids contiguous, and drop `areas`, which refer to the original image.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from ..errors import nearest_name
from ..model.channels_faim2f import RGB
from ..model.image_processing_faim2f import resized_size
from ..model.segmentation_labels_faim2f import resize_segmentation_map
from .item import Item, drop_vanished, pixel_counts

# Color of padding, as in detectron2.
GRAY = 128


class Augmentation(Protocol):
    """The type of every augmentation."""

    def __call__(self, item: Item, generator: Generator) -> Item: ...


def uniform(low: float, high: float, generator: Generator) -> float:
    """A random number from [low, high)."""
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))


def integer(low: int, high: int, generator: Generator) -> int:
    """A random integer from low..high, inclusive."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def _moved(item: Item, image: Tensor, segments: Tensor, hidden: Tensor | None) -> Item:
    moved = item.copy()
    moved["image"], moved["segments"], moved["hidden"], moved["areas"] = image, segments, hidden, None
    return drop_vanished(moved)


def resize_item(item: Item, height: int, width: int) -> Item:
    """The item resized to (height, width)."""
    if tuple(item["segments"].shape) == (height, width):
        return item
    image = F.interpolate(item["image"][None], size=(height, width), mode="bilinear", antialias=True)[0]
    hidden = item["hidden"]
    if hidden is not None:
        hidden = torch.stack([resize_segmentation_map(layer, height, width) for layer in hidden])
    return _moved(item, image, resize_segmentation_map(item["segments"], height, width), hidden)


def crop_item(item: Item, top: int, left: int, height: int, width: int) -> Item:
    """The window of the item with this size and upper left corner, cut off at the edge of the image."""
    window = (..., slice(top, top + height), slice(left, left + width))
    hidden = item["hidden"]
    return _moved(
        item,
        item["image"][window].contiguous(),
        item["segments"][window].contiguous(),
        None if hidden is None else hidden[window].contiguous(),
    )


def pad_item(item: Item, height: int, width: int, fill: int = GRAY) -> Item:
    """The item, padded at the bottom and right to at least this size; the padding has color `fill` and no segment."""
    below, right = (max(0, new - old) for new, old in zip((height, width), item["segments"].shape, strict=True))
    if not below and not right:
        return item
    padded, hidden = item.copy(), item["hidden"]
    padded["image"] = F.pad(item["image"], (0, right, 0, below), value=fill)
    padded["segments"] = F.pad(item["segments"], (0, right, 0, below), value=-1)
    padded["hidden"] = None if hidden is None else F.pad(hidden, (0, right, 0, below), value=-1)
    return padded


def _require(condition: bool, augmentation: Any, rule: str) -> None:
    if not condition:
        raise ValueError(f"{augmentation}: {rule}.")


@dataclass(frozen=True)
class RandomFlip:
    """Flips horizontally, with this probability."""

    probability: float = 0.5

    def __post_init__(self) -> None:
        _require(0 <= self.probability <= 1, self, "probability must be in 0..1")

    def __call__(self, item: Item, generator: Generator) -> Item:
        if uniform(0, 1, generator) >= self.probability:
            return item
        flipped, hidden = item.copy(), item["hidden"]
        flipped["image"], flipped["segments"] = item["image"].flip(-1), item["segments"].flip(-1)
        flipped["hidden"] = None if hidden is None else hidden.flip(-1)
        return flipped


@dataclass(frozen=True)
class ResizeShortestEdge:
    """Resizes the shorter edge to a random length and keeps the aspect ratio (detectron2's ResizeShortestEdge).

    Args:
        edges: lengths in pixels. Style "choice" draws one of them, "range" an integer from the first to the second,
            inclusive.
        longest_edge: maximum length of the longer edge, in pixels; None for no limit.
        style: "choice" or "range".
    """

    edges: tuple[int, ...]
    longest_edge: int | None = None
    style: Literal["choice", "range"] = "choice"

    def __post_init__(self) -> None:
        _require(self.style in ("choice", "range"), self, "style must be 'choice' or 'range'")
        _require(len(self.edges) > 0 and min(self.edges) > 0, self, "edges must be one or more positive numbers")
        if self.style == "range":
            ordered = len(self.edges) == 2 and self.edges[0] <= self.edges[1]
            _require(ordered, self, "a range has two edges, the smaller first")

    def __call__(self, item: Item, generator: Generator) -> Item:
        if self.style == "range":
            edge = integer(self.edges[0], self.edges[1], generator)
        else:
            edge = self.edges[integer(0, len(self.edges) - 1, generator)]
        size = {"shortest_edge": edge}
        if self.longest_edge is not None:
            size["longest_edge"] = self.longest_edge
        rows, columns = item["segments"].shape
        return resize_item(item, *resized_size(rows, columns, size))


@dataclass(frozen=True)
class RandomCrop:
    """Crops a window at a random position; does not crop along an axis that is shorter than the window.

    Args:
        height, width: size of the window, in pixels.
        single_category_max_area: the largest fraction of the labeled pixels in the window that one class may have. Up
            to ten positions are drawn until one satisfies this and has at least two classes; the last one is accepted
            anyway. 1 accepts any position. (detectron2's RandomCrop_CategoryAreaConstraint, which follows DeepLab.)
    """

    height: int
    width: int
    single_category_max_area: float = 1.0

    def __post_init__(self) -> None:
        _require(min(self.height, self.width) > 0, self, "height and width must be positive")
        _require(0 < self.single_category_max_area <= 1, self, "single_category_max_area must be in 0..1, not 0")

    def __call__(self, item: Item, generator: Generator) -> Item:
        rows, columns = item["segments"].shape
        height, width = min(self.height, rows), min(self.width, columns)
        for _ in range(10):
            top = integer(0, rows - height, generator)
            left = integer(0, columns - width, generator)
            window = item["segments"][top : top + height, left : left + width]
            if self.single_category_max_area >= 1 or self._is_mixed(window, item["classes"]):
                break
        return crop_item(item, top, left, height, width)

    def _is_mixed(self, window: Tensor, classes: Tensor) -> bool:
        areas = pixel_counts(window, len(classes))
        by_class = torch.bincount(classes, weights=areas.double())
        by_class = by_class[by_class > 0]
        return len(by_class) > 1 and bool(by_class.max() < by_class.sum() * self.single_category_max_area)


@dataclass(frozen=True)
class LargeScaleJitter:
    """Resizes over a wide range of scales, then crops or pads to one size (Ghiasi et al., Simple Copy-Paste, 2021).

    The image is scaled to fit into (height, width) times a random number from [min_scale, max_scale). If it is then
    larger than (height, width), it is cropped at a random position, the same fraction for both axes, as in detectron2's
    FixedSizeCrop; if it is smaller, it is padded at the bottom and the right with `fill`.
    """

    height: int = 1024
    width: int = 1024
    min_scale: float = 0.1
    max_scale: float = 2.0
    fill: int = GRAY

    def __post_init__(self) -> None:
        _require(min(self.height, self.width) > 0, self, "height and width must be positive")
        _require(0 < self.min_scale <= self.max_scale, self, "scales must be positive, min_scale not above max_scale")
        _require(0 <= self.fill <= 255, self, "fill must be in 0..255")

    def __call__(self, item: Item, generator: Generator) -> Item:
        rows, columns = item["segments"].shape
        scale = uniform(self.min_scale, self.max_scale, generator)
        scale = min(self.height * scale / rows, self.width * scale / columns)
        # At least 1, because an edge of a very elongated image could become 0 pixels.
        resized = resize_item(item, max(1, round(rows * scale)), max(1, round(columns * scale)))
        rows, columns = resized["segments"].shape
        place = uniform(0, 1, generator)
        top, left = round(max(0, rows - self.height) * place), round(max(0, columns - self.width) * place)
        cropped = crop_item(resized, top, left, self.height, self.width)
        return pad_item(cropped, self.height, self.width, self.fill)


@dataclass(frozen=True)
class SSDColorJitter:
    """Changes brightness, contrast, saturation and hue, each with probability 1/2 (Liu et al., SSD, ECCV 2016).

    Brightness comes first; contrast comes before or after saturation and hue. Values and order are those of
    detectron2's ColorAugSSDTransform, whose "hue_delta=18" is in OpenCV's units of two degrees.

    Images with other than three channels have neither saturation nor hue: only brightness and contrast change, by the
    same amount in every channel. Images of floats outside 0..255, or all in 0..1, stay as they are.

    Args:
        brightness: maximum amount added to or subtracted from the values 0..255.
        contrast: range of the factor by which the values are multiplied.
        saturation: range of the factor by which the saturation (HSV) is multiplied.
        hue: maximum rotation of the hue (HSV) in either direction, in degrees.
    """

    brightness: float = 32
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: float = 36

    def __post_init__(self) -> None:
        for name in ("contrast", "saturation"):
            values = getattr(self, name)
            _require(len(values) == 2 and 0 <= values[0] <= values[1], self, f"{name} must be a range, low and high")
        _require(self.brightness >= 0 and self.hue >= 0, self, "brightness and hue must not be negative")

    def __call__(self, item: Item, generator: Generator) -> Item:
        pixels = item["image"].to(torch.float32)
        if item["image"].is_floating_point() and not (pixels.min() >= -0.5 and 1 < pixels.max() <= 255.5):
            return item
        is_rgb = len(pixels) == RGB
        if _toss(generator):
            pixels = (pixels + uniform(-self.brightness, self.brightness, generator)).clamp_(0, 255)
        contrast_first = _toss(generator)
        if contrast_first:
            pixels = self._contrast(pixels, generator)
        if _toss(generator) and is_rgb:
            pixels = scale_saturation(pixels, uniform(*self.saturation, generator))
        if _toss(generator) and is_rgb:
            pixels = turn_hue(pixels, uniform(-self.hue, self.hue, generator))
        if not contrast_first:
            pixels = self._contrast(pixels, generator)
        jittered = item.copy()
        jittered["image"] = pixels if item["image"].is_floating_point() else pixels.round_().to(torch.uint8)
        return jittered

    def _contrast(self, pixels: Tensor, generator: Generator) -> Tensor:
        if not _toss(generator):
            return pixels
        return (pixels * uniform(*self.contrast, generator)).clamp_(0, 255)


def _toss(generator: Generator) -> bool:
    return integer(0, 1, generator) == 1


def scale_saturation(pixels: Tensor, factor: float) -> Tensor:
    """Multiplies the saturation (HSV) of an image by `factor`, up to 1; keeps hue and value.

    Args:
        pixels: RGB (3, H, W), floats in 0..255.
    """
    value, least = pixels.amax(0), pixels.amin(0)
    spread = value - least
    # A channel is value * (1 - saturation * c), so its distance from the value is proportional to the saturation.
    most = value / spread.clamp(min=1e-6)
    return value - (value - pixels) * most.clamp(max=factor)


def turn_hue(pixels: Tensor, degrees: float) -> Tensor:
    """Rotates the hue (HSV) of an image by `degrees`; keeps saturation and value.

    Args:
        pixels: RGB (3, H, W), floats in 0..255.
    """
    red, green, blue = pixels
    value = pixels.amax(0)
    spread = value - pixels.amin(0)
    divisor = spread.clamp(min=1e-6)
    # In sixths of a circle, computed from the largest channel.
    hue = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    turned = []
    for offset in (5, 3, 1):
        position = (hue + (offset + degrees / 60)).remainder_(6)
        # Around the circle, a channel is at its minimum for two sixths, rises for one, is at its maximum for two, and
        # falls for one.
        turned.append(value - spread * torch.minimum(position, 4 - position).clamp_(0, 1))
    return torch.stack(turned)


AUGMENTATIONS: dict[str, type] = {
    cls.__name__: cls for cls in (RandomFlip, ResizeShortestEdge, RandomCrop, LargeScaleJitter, SSDColorJitter)
}


def channel_note(augmentations: Iterable[Any], num_channels: int) -> str | None:
    """A sentence about augmentations that change less in images with this number of channels, or None."""
    if num_channels == RGB or not any(isinstance(step, SSDColorJitter) for step in augmentations):
        return None
    return (
        f"Images of {num_channels} channel{'s'[: num_channels != 1]} have neither saturation nor hue: the color jitter "
        "of the recipe changes only brightness and contrast."
    )


def augment(item: Item, augmentations: Iterable[Augmentation], generator: Generator) -> Item:
    """Applies all augmentations in order."""
    for augmentation in augmentations:
        item = augmentation(item, generator)
    return item


def at_size(augmentations: Iterable[Any], size: int, whole: int | None = None) -> tuple[Augmentation, ...]:
    """The augmentations with all lengths in pixels scaled, for images of another size.

    Args:
        augmentations: the augmentations to scale.
        size: the new shorter edge of the images.
        whole: the shorter edge of the images for which the augmentations were designed; None for that of the crops.

    Raises:
        ValueError: none of the augmentations crops, so their size is unknown.
    """
    steps = tuple(augmentations)
    sides = [min(step.height, step.width) for step in _cropping(steps)]

    def scaled(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(scaled(side) for side in value)
        return value if value is None else max(1, round(value * size / (whole or sides[-1])))

    in_pixels = ("height", "width", "edges", "longest_edge")
    return tuple(
        dataclasses.replace(step, **{name: scaled(getattr(step, name)) for name in in_pixels if hasattr(step, name)})
        for step in steps
    )


def with_crop(augmentations: Iterable[Any], height: int, width: int) -> tuple[Augmentation, ...]:
    """The augmentations with the crop size, in pixels, replaced.

    Raises:
        ValueError: none of the augmentations crops.
    """
    steps = tuple(augmentations)
    cropping = _cropping(steps)
    return tuple(dataclasses.replace(step, height=height, width=width) if step in cropping else step for step in steps)


def _cropping(steps: tuple[Any, ...]) -> list[Any]:
    found = [step for step in steps if hasattr(step, "height")]
    if not found:
        raise ValueError(f"None of {', '.join(type(step).__name__ for step in steps)} has a size that could be set.")
    return found


def to_config(augmentations: Iterable[Any]) -> list[dict[str, Any]]:
    """The augmentations as plain data for JSON and YAML: [{"name": "RandomFlip", "probability": 0.5}, ...]."""
    return [{"name": type(step).__name__, **dataclasses.asdict(step)} for step in augmentations]


def from_config(config: Iterable[Mapping[str, Any]]) -> tuple[Augmentation, ...]:
    """The augmentations of a configuration from `to_config`; missing keywords have their default values.

    Raises:
        ValueError: an unknown augmentation or keyword; the message suggests the closest name.
    """
    steps = []
    for entry in config:
        values = dict(entry)
        name = str(values.pop("name", None))
        if name not in AUGMENTATIONS:
            raise ValueError(f"No augmentation is called {name!r}. {_nearest(name, AUGMENTATIONS)}")
        fields = [field.name for field in dataclasses.fields(AUGMENTATIONS[name])]
        for keyword in values:
            if keyword not in fields:
                raise ValueError(f"{name} has no {keyword!r}. {_nearest(keyword, fields)}")
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        try:
            steps.append(AUGMENTATIONS[name](**values))
        except TypeError as error:
            raise ValueError(f"{name} cannot be made of {values}: {error}.") from error
    return tuple(steps)


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    return f"Did you mean {nearest_name(name, known, 0.0)}? There are {', '.join(known)}."


def coco_augmentations(size: int = 1024) -> tuple[Augmentation, ...]:
    """Mask2Former's augmentations for COCO: flip and large-scale jitter to `size` x `size`."""
    return RandomFlip(), LargeScaleJitter(size, size)


def mask2former_semantic_augmentations(
    base: int = 640,
    height: int = 640,
    width: int = 640,
    longest_edge: int | None = 2560,
    single_category_max_area: float = 0.75,
) -> tuple[Augmentation, ...]:
    """Mask2Former's augmentations for semantic segmentation.

    The defaults are those for ADE20K. For Cityscapes: base 1024, crops of 512x1024 at any position, longest edge 4096.

    Args:
        base: the shorter edge is resized to 0.5, 0.6, ... or 2 times this, in pixels.
        height, width, single_category_max_area: as in `RandomCrop`.
        longest_edge: as in `ResizeShortestEdge`.
    """
    edges = tuple(math.floor(base * tenths / 10) for tenths in range(5, 21))
    return (
        ResizeShortestEdge(edges, longest_edge),
        RandomCrop(height, width, single_category_max_area),
        SSDColorJitter(),
        RandomFlip(),
    )


def focoos_augmentations(size: int = 640) -> tuple[Augmentation, ...]:
    """Focoos's augmentations for its FAI segmentation models.

    Args:
        size: side of the crops, 640 for ADE20K and 1024 for COCO; the shorter edge is resized to 0.5 to 2 times this.
    """
    return (
        SSDColorJitter(),
        RandomFlip(),
        ResizeShortestEdge((size // 2, 2 * size), 2048, style="range"),
        RandomCrop(size, size),
    )

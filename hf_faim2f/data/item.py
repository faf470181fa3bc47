"""The common representation of an image with its segments, and operations on segments."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from ..errors import DatasetError

# Far more than in real annotations. A few bytes of run lengths can cover a whole image, so without a limit a small file
# could require thousands of maps of the image's size.
MOST_LAYERS = 64
# Maximum number of values in these maps together, four bytes each: fewer maps for more than 8 million pixels.
MOST_LAYER_VALUES = 1 << 29
# In masks of instances, the value is this times (class + 1), plus the number of the instance.
INSTANCES_PER_CLASS = 1000
# The value of objects in binary masks of image editors and annotation tools; in most other masks, it means no class.
WHITE = 255
# How messages of the image processor begin: with the image's place in the batch.
IMAGE = re.compile(r"^image (\d+)")


class Item(TypedDict):
    """One image with its segments; the docstring of `hf_faim2f.data` describes each entry."""

    image: Tensor
    segments: Tensor
    hidden: Tensor | None
    classes: Tensor
    crowd: Tensor
    areas: Tensor | None
    image_id: int | str
    file_name: str
    height: int
    width: int


class SegmentCounts(NamedTuple):
    """Classes and sizes of the segments of one image.

    Args:
        size: number of pixels in the image.
        classes: class of each segment.
        pixels: number of pixels of each segment, including those covered by other segments.
        crowd: whether each segment is a crowd.
        labelled: number of pixels in at least one segment that is not a crowd.
    """

    size: int
    classes: list[int]
    pixels: list[int]
    crowd: list[bool]
    labelled: int

    @classmethod
    def disjoint(cls, size: int, classes: list[int], pixels: list[int], crowd: list[bool]) -> "SegmentCounts":
        """The counts of segments that do not overlap."""
        labelled = sum(area for area, is_crowd in zip(pixels, crowd, strict=True) if not is_crowd)
        return cls(size, classes, pixels, crowd, labelled)


def make_item(
    image: Tensor,
    segments: Tensor,
    classes: list[int],
    image_id: int | str,
    file_name: str,
    hidden: Tensor | None = None,
    crowd: list[bool] | None = None,
    areas: list[float] | None = None,
) -> Item:
    """Creates an item: converts the entries to their types, and takes `height` and `width` from the image."""
    return Item(
        image=image,
        segments=segments.to(torch.int32),
        hidden=hidden,
        classes=torch.tensor(classes, dtype=torch.int64),
        crowd=torch.tensor([False] * len(classes) if crowd is None else crowd, dtype=torch.bool),
        areas=None if areas is None else torch.tensor(areas, dtype=torch.float64),
        image_id=image_id,
        file_name=file_name,
        height=image.shape[-2],
        width=image.shape[-1],
    )


def image_error(error: ValueError, items: Sequence[Item]) -> DatasetError:
    """The error for images that cannot be processed at these settings; it names the image instead of its place."""
    text = str(error)
    found = IMAGE.match(text)
    if found is None and len(items) > 1:
        return DatasetError(text)
    item = items[0 if found is None else int(found[1])]
    name = f"Image {item['image_id']}" + (f" ({item['file_name']})" if item["file_name"] else "")
    return DatasetError(name + (f": {text}" if found is None else text[found.end() :]))


def paint_masks(masks: Iterable[tuple[int, np.ndarray]], height: int, width: int) -> tuple[Tensor, Tensor | None]:
    """Paints masks that may overlap: a map of the topmost segments, and layers with the segments that they cover.

    Args:
        masks: id and mask (height, width) of each segment, from the lowest to the topmost. Each is used only once, so a
            generator can produce one at a time.
        height, width: size of the maps.

    Returns:
        The topmost segment of each pixel (height, width), int32, -1 for none; and the segments that it covers
        (L, height, width), where L is the largest number of segments on one pixel minus one, or None if none overlap.

    Raises:
        ValueError: more than 65 segments lie on one pixel, or fewer in an image of more than 8 million pixels, because
            all layers together may have `MOST_LAYER_VALUES`.
    """
    top = np.full(height * width, -1, dtype=np.int32)
    layers: list[np.ndarray] = []
    most = min(MOST_LAYERS, MOST_LAYER_VALUES // max(1, height * width))
    for number, mask in masks:
        pixels = np.flatnonzero(mask)
        covered = top[pixels]
        top[pixels] = number
        below = covered >= 0
        pixels, covered = pixels[below], covered[below]
        depth = 0
        while len(pixels):
            if depth == len(layers):
                if depth == most:
                    large = f" of an image of {height}x{width} pixels, which needs too much memory: cut it into tiles"
                    raise ValueError(
                        f"more than {most + 1} segments lie on one pixel{large if most < MOST_LAYERS else ''}"
                    )
                layers.append(np.full(height * width, -1, dtype=np.int32))
            taken = layers[depth][pixels] >= 0
            layers[depth][pixels[~taken]] = covered[~taken]
            pixels, covered = pixels[taken], covered[taken]
            depth += 1
    segments = torch.from_numpy(top.reshape(height, width))
    if not layers:
        return segments, None
    hidden = np.empty((len(layers), height, width), dtype=np.int32)
    while layers:  # frees each layer, so that they do not exist twice
        layer = layers.pop()
        hidden[len(layers)] = layer.reshape(height, width)
    return segments, torch.from_numpy(hidden)


def index_values(ids: Tensor) -> tuple[list[int], Tensor]:
    """The distinct values of a map (H, W), ascending, and the index of each pixel's value, (H, W) int32."""
    values, places = np.unique(ids.numpy(), return_inverse=True) if _is_sparse(ids) else _distinct(ids)
    return values.tolist(), torch.from_numpy(places.astype(np.int32).reshape(tuple(ids.shape)))


def _is_sparse(ids: Tensor) -> bool:
    return ids.numel() == 0 or int(ids.max()) - int(ids.min()) >= 2**18


def _distinct(ids: Tensor) -> tuple[np.ndarray, np.ndarray]:
    # Counting takes a tenth of the time of sorting.
    least = int(ids.min())
    offsets = ids.numpy().astype(np.int64).ravel() - least
    counts = np.bincount(offsets)
    return np.flatnonzero(counts) + least, (np.cumsum(counts > 0) - 1)[offsets]


def pixel_counts(maps: Tensor, count: int) -> Tensor:
    """How often each of the ids 0..count-1 occurs in `maps`, of any shape: (count,), int64."""
    return torch.bincount(maps.flatten().long() + 1, minlength=count + 1)[1:]


def segment_areas(item: Item) -> Tensor:
    """Number of pixels of each segment, including those covered by other segments: (n,), int64."""
    areas = pixel_counts(item["segments"], len(item["classes"]))
    if item["hidden"] is not None:
        areas = areas + pixel_counts(item["hidden"], len(item["classes"]))
    return areas


def count_segments(item: Item) -> SegmentCounts:
    """Class, number of pixels and crowd flag of each segment of an item."""
    labelled = int((keep_segments(item, ~item["crowd"])["segments"] >= 0).sum())
    return SegmentCounts(
        item["segments"].numel(), item["classes"].tolist(), segment_areas(item).tolist(), item["crowd"].tolist(),
        labelled,
    )  # fmt: skip


def keep_segments(item: Item, keep: Tensor) -> Item:
    """The item with only the segments for which `keep` (n,) is true, in the same order, with contiguous ids.

    Segments covered by a removed one become visible.
    """
    if bool(keep.all()):
        return item
    # Id -1 indexes the last entry and thus stays -1.
    new_ids = torch.full((len(keep) + 1,), -1, dtype=torch.int32)
    new_ids[:-1][keep] = torch.arange(int(keep.sum()), dtype=torch.int32)
    segments, hidden = new_ids[item["segments"].long()], item["hidden"]
    if hidden is not None:
        segments, hidden = _lift(segments, new_ids[hidden.long()])
    kept = item.copy()
    kept["segments"], kept["hidden"] = segments, hidden
    kept["classes"], kept["crowd"] = item["classes"][keep], item["crowd"][keep]
    if item["areas"] is not None:
        kept["areas"] = item["areas"][keep]
    return kept


def _lift(segments: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """Fills empty pixels of the map from the layers of covered segments, and drops layers that become empty.

    The first layer holds the segment that was covered first, the lowest one, so the last layer is directly below the
    map.
    """
    segments, hidden = segments.clone(), hidden.clone()
    for layer in reversed(hidden.unbind()):
        rises = (segments < 0) & (layer >= 0)
        segments[rises] = layer[rises]
        layer[rises] = -1
    used = (hidden >= 0).flatten(1).any(1)
    return segments, hidden[used] if bool(used.any()) else None


def drop_vanished(item: Item) -> Item:
    """The item without segments that have no pixels (as after a crop), with contiguous ids."""
    hidden = item["hidden"]
    if hidden is not None and not bool((hidden >= 0).any()):
        item = item.copy()
        item["hidden"] = None
    return keep_segments(item, segment_areas(item) > 0)


def binary_masks(item: Item) -> Tensor:
    """The full mask of each segment, including covered pixels: (n, H, W), bool."""
    numbers = torch.arange(len(item["classes"]), dtype=torch.int32)[:, None, None]
    masks = item["segments"] == numbers
    if item["hidden"] is not None:
        for layer in item["hidden"]:
            masks |= layer == numbers
    return masks


def segment_mask(item: Item, number: int) -> Tensor:
    """The full mask of one segment, including covered pixels: (H, W), bool."""
    mask = item["segments"] == number
    for layer in item["hidden"] if item["hidden"] is not None else ():
        mask |= layer == number
    return mask


def class_map(item: Item) -> Tensor:
    """The class of the topmost segment at each pixel: (H, W), int64, -1 for none."""
    table = torch.cat([item["classes"], torch.tensor([-1])])
    return table[item["segments"].long()]

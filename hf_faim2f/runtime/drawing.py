"""Drawing segments over their image: a fixed color per class, and a readable label on each segment."""

import colorsys
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..data.item import Item, binary_masks
from ..masks import last_on_top

# The golden ratio as a fraction of the hue circle: the hues of consecutive classes are far apart, for any number.
HUE_STEP = 0.61803398875
OPACITY = 0.55
FONT_SIZE = 12
GAP = 4
# How much the rest of the image is darkened when segments are drawn alone.
DARKNESS = 0.75
# Segments that cover less of the image are drawn without a label, which would hide them.
LEAST_NAMED = 0.002


@dataclass
class Segments:
    """Segments to draw; all tensors are on the CPU.

    Args:
        masks: (n, H, W) bool.
        class_ids: (n,) int64.
        scores: (n,), or None.
    """

    masks: Tensor
    class_ids: Tensor
    scores: Tensor | None = None


def segments_of_item(item: Item) -> Segments:
    """The ground truth segments of an item."""
    return Segments(binary_masks(item), item["classes"])


def segments_of_map(label_map: Tensor) -> Segments:
    """One segment per class in a map (H, W) of class ids; negative ids stand for no class."""
    label_map = label_map.cpu()
    classes = label_map[label_map >= 0].unique()
    return Segments(label_map == classes[:, None, None], classes)


def segments_of_panoptic(panoptic: Mapping[str, Any]) -> Segments:
    """The segments in an image's result of `post_process_panoptic_segmentation` or its instance counterpart."""
    info = panoptic["segments_info"]
    ids = torch.tensor([segment["id"] for segment in info], dtype=torch.int64)
    return Segments(
        panoptic["segmentation"].cpu() == ids[:, None, None],
        torch.tensor([segment["label_id"] for segment in info], dtype=torch.int64),
        torch.tensor([segment["score"] for segment in info]) if all("score" in segment for segment in info) else None,
    )


def class_color(class_id: int) -> tuple[int, int, int]:
    """The RGB color of a class, which depends only on its id."""
    # Every other class is darker, so that classes with similar hues differ in lightness.
    value = (1.0, 0.75)[class_id % 2]
    red, green, blue = colorsys.hsv_to_rgb((class_id * HUE_STEP) % 1.0, 0.85, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_segments(image: Image.Image, segments: Segments, id2label: Mapping[int, str]) -> Image.Image:
    """Draws segments over an RGB copy of an image, tinted in their class's color and labeled.

    Masks are drawn with Pillow, because supervision's annotator is slow without OpenCV and puts smaller masks on top
    regardless of their scores.

    Args:
        image: of the masks' size.
        segments: drawn with the best score on top; without scores, with the smallest on top.
        id2label: the name of each class id.

    Raises:
        ImportError: supervision is not installed.
        ValueError: the sizes differ.
    """
    library = supervision()
    drawn = image.convert("RGB").copy()
    masks = segments.masks.numpy().astype(bool, copy=False)
    if masks.shape[-2:] != (image.height, image.width):
        raise ValueError(
            f"The masks are {masks.shape[-2]}x{masks.shape[-1]} pixels, but the image {image.height}x{image.width} "
            "(height x width): they must agree."
        )
    profiles = [_profile(mask) for mask in masks]
    shown = [number for number in _order(segments, profiles) if profiles[number].pixels]
    if not shown:
        return drawn
    class_ids = segments.class_ids.numpy().astype(int)
    scores = None if segments.scores is None else segments.scores.float().numpy()
    colors = [class_color(int(class_ids[number])) for number in shown]
    tint = _tint([masks[number] for number in shown], [profiles[number].box for number in shown], colors)
    drawn.paste(tint, mask=tint)
    least = LEAST_NAMED * masks[0].size
    named = [index for index, number in enumerate(shown) if profiles[number].pixels >= least]
    if not named:
        return drawn
    names = []
    for index in named:
        label = int(class_ids[shown[index]])
        score = "" if scores is None else f" {scores[shown[index]]:.2f}"
        names.append(id2label.get(label, str(label)) + score)
    # The library looks up colors by index: one per labeled segment.
    palette = library.ColorPalette([library.Color(*colors[index]) for index in named])
    text = library.ColorPalette([library.Color(*_text_color(colors[index])) for index in named])
    annotator = library.RichLabelAnnotator(
        color=palette, text_color=text, font_size=FONT_SIZE, text_padding=2,
        text_position=library.Position.CENTER, smart_position=True,
    )  # fmt: skip
    # Empty boxes at the centers of mass, because the library's own search for them takes longer than all the rest.
    centers = np.array([profiles[shown[index]].center * 2 for index in named], dtype=float)
    names_at = library.Detections(xyxy=centers, class_id=np.arange(len(named)))
    return annotator.annotate(drawn, names_at, labels=names)


def _tint(
    masks: Sequence[np.ndarray], boxes: Sequence[tuple[int, int, int, int]], colors: Sequence[tuple[int, int, int]]
) -> Image.Image:
    """An RGBA image with `OPACITY` inside the masks (H, W), transparent elsewhere; the last mask is on top."""
    height, width = masks[0].shape
    crops = [
        (mask[y_min : y_max + 1, x_min : x_max + 1], (x_min, y_min, x_max, y_max))
        for mask, (x_min, y_min, x_max, y_max) in zip(masks, boxes, strict=True)
    ]
    on_top = last_on_top(crops, (height, width))
    # Looking up a pixel's four bytes as one number takes a quarter of the time.
    table = np.array([(0, 0, 0, 0), *((*color, round(255 * OPACITY)) for color in colors)], dtype=np.uint8)
    pixels = table.view(np.uint32)[:, 0].take(on_top)
    return Image.frombuffer("RGBA", (width, height), pixels, "raw", "RGBA", 0, 1)


def draw_alone(image: Image.Image, segments: Segments, id2label: Mapping[int, str]) -> Image.Image:
    """Like `draw_segments`, with everything outside the segments darkened.

    Raises:
        ImportError: supervision is not installed.
        ValueError: the sizes differ.
    """
    library = supervision()
    masks = segments.masks.numpy().astype(bool)
    drawn = image.convert("RGB").copy()
    if masks.shape[-2:] == (image.height, image.width):  # else draw_segments raises
        boxes = np.zeros((len(masks), 4))  # unused: there are masks
        annotator = library.BackgroundOverlayAnnotator(color=library.Color(0, 0, 0), opacity=DARKNESS)
        drawn = annotator.annotate(drawn, library.Detections(xyxy=boxes, mask=masks))
    return draw_segments(drawn, segments, id2label)


def beside(panels: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """Arranges panels in a row, each below its caption."""
    height = max(panel.height for panel in panels)
    heading = FONT_SIZE + 2 * GAP
    row = Image.new("RGB", (sum(p.width for p in panels) + GAP * (len(panels) - 1), height + heading), "white")
    left = 0
    for panel, caption in zip(panels, captions, strict=True):
        ImageDraw.Draw(row).text((left + GAP, GAP // 2), caption, fill="black", font=ImageFont.load_default(FONT_SIZE))
        row.paste(panel, (left, heading))
        left += panel.width + GAP
    return row


def below(rows: Sequence[Image.Image]) -> Image.Image:
    """Stacks rows vertically."""
    sheet = Image.new("RGB", (max(r.width for r in rows), sum(r.height for r in rows) + GAP * (len(rows) - 1)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height + GAP
    return sheet


def scaled(image: Image.Image, segments: Segments, longest: int) -> tuple[Image.Image, Segments]:
    """Resizes an image and its masks so that the longer side is `longest` pixels, which keeps labels readable."""
    factor = longest / max(image.size)
    width, height = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    rows, columns = torch.arange(height) * image.height // height, torch.arange(width) * image.width // width
    masks = segments.masks[:, rows][:, :, columns]
    return (
        image.resize((width, height), Image.Resampling.BILINEAR),
        Segments(masks, segments.class_ids, segments.scores),
    )


@dataclass
class _Profile:
    """A mask's area in pixels, box (x_min, y_min, x_max, y_max, inclusive) and center of mass (x, y)."""

    pixels: int
    box: tuple[int, int, int, int] = (0, 0, 0, 0)
    center: tuple[int, int] = (0, 0)


def _profile(mask: np.ndarray) -> _Profile:
    """Measures a mask (H, W) bool by counting its pixels in each row and column."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not len(rows):
        return _Profile(0)
    x_min, y_min, x_max, y_max = (int(place) for place in (columns[0], rows[0], columns[-1], rows[-1]))
    crop = mask[y_min : y_max + 1, x_min : x_max + 1]
    in_columns, in_rows = (crop.view(np.uint8).sum(axis, dtype=np.int32) for axis in (0, 1))
    pixels = int(in_rows.sum())
    # Pixel centers have half-integer coordinates.
    x, y = (
        int(start + (counts @ (np.arange(len(counts)) + 0.5)) / pixels)
        for start, counts in ((x_min, in_columns), (y_min, in_rows))
    )
    return _Profile(pixels, (x_min, y_min, x_max, y_max), (x, y))


def _order(segments: Segments, profiles: Sequence[_Profile]) -> list[int]:
    """The drawing order: the best score last; without scores, the smallest last."""
    rank = segments.scores
    if rank is None:
        rank = -torch.tensor([profile.pixels for profile in profiles], dtype=torch.int64)
    return rank.argsort(stable=True).tolist()


def _text_color(color: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black on light colors, white on dark ones."""
    light = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140
    return (0, 0, 0) if light else (255, 255, 255)


def supervision() -> Any:
    """Imports the drawing library; raises an ImportError that says how to install it."""
    try:
        if "supervision" in sys.modules:  # all threads share the warning filters: change them only once
            return import_module("supervision")
        with warnings.catch_warnings():
            # It warns on import that it uses NumPy if OpenCV is not installed.
            warnings.simplefilter("ignore")
            library = import_module("supervision")
    except ImportError as error:
        raise ImportError(
            f"Drawing needs supervision, which cannot be imported ({error}): install hf-faim2f[draw]."
        ) from error
    return library

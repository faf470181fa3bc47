"""Drawing segments over their image: a fixed color per class, and a readable label on each segment.

Things are tinted; stuff, which covers most of an image, is tinted lightly, so that the image stays visible. Both are
outlined. Labels are on their segments, or beside small ones, and never overlap.
"""

import colorsys
import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from transformers.utils import logging

from ..data.item import Item, binary_masks
from ..masks import last_on_top

logger = logging.get_logger(__name__)

Color = tuple[int, int, int]  # RGB
Box = tuple[int, int, int, int]  # x_min, y_min, x_max, y_max in pixels, inclusive

# The golden ratio as a fraction of the hue circle: the hues of consecutive classes are far apart, for any number. With
# this first hue, color-blind people distinguish the first eight classes as well as those of Okabe and Ito's palette
# (least distance in Oklab 0.08 as protanopes and deuteranopes see them).
HUE_STEP = 0.61803398875
FIRST_HUE = 0.94
OPACITY, STUFF_OPACITY, OUTLINE_OPACITY = 0.55, 0.25, 0.9
# Fonts that Linux, macOS and Windows have, for names that Pillow's own font, which is for ASCII, cannot write.
FONTS = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "segoeui.ttf",
    "msyh.ttc", "YuGothM.ttc", "malgun.ttf", "Nirmala.ttf", "arial.ttf",
)  # fmt: skip
NO_CHARACTER = "\U0010ffff"  # no font has it
# Minimum font size of labels in pixels, and the divisors of the image's longer side that give the font size and the
# outline width.
FONT_SIZE = 12
TEXT_SCALE, OUTLINE_SCALE = 72, 600
GAP = 4
# How much the rest of the image is darkened when segments are drawn alone.
DARKNESS = 0.75
# Segments below this fraction of the image have no label, which would hide them.
LEAST_NAMED = 0.001
PADDING = 2  # beside a label's text, in pixels
# A label is beside its segment if it would hide it: if the segment's box has at most this many times the label's area.
SMALL = 4
# The distance of such a label from the box, in pixels.
DISTANCE = 2
# Weights in the score of a position: the fractions of the label on its segment and on other labels, and the fraction of
# a larger window around the label on its segment, which favors the middle of the segment's largest part.
ON_SEGMENT, ON_LABELS, AROUND = 4.0, 8.0, 1.0


@dataclass
class Segments:
    """Segments to draw; all tensors are on the CPU.

    Args:
        masks: (n, H, W) bool.
        class_ids: (n,) int64.
        scores: (n,), or None.
        stuff_ids: the classes that are drawn lightly.
        tracks: each segment's object id in a video, which selects its color and is part of its label; None for none.
    """

    masks: Tensor
    class_ids: Tensor
    scores: Tensor | None = None
    stuff_ids: Collection[int] = frozenset()
    tracks: Sequence[int | None] = ()


def segments_of_item(item: Item) -> Segments:
    """The ground truth segments of an item."""
    return Segments(binary_masks(item), item["classes"])


def segments_of_map(label_map: Tensor) -> Segments:
    """One segment per class in a map (H, W) of class ids; negative ids stand for no class."""
    label_map = label_map.cpu()
    classes = label_map[label_map >= 0].unique()
    return Segments(label_map == classes[:, None, None], classes)


def segments_of_panoptic(panoptic: Mapping[str, Any]) -> Segments:
    """The segments in an image's result of `post_process_panoptic_segmentation` or its instance counterpart.

    Classes whose segments were fused are stuff.
    """
    info = panoptic["segments_info"]
    ids = torch.tensor([segment["id"] for segment in info], dtype=torch.int64)
    return Segments(
        panoptic["segmentation"].cpu() == ids[:, None, None],
        torch.tensor([segment["label_id"] for segment in info], dtype=torch.int64),
        torch.tensor([segment["score"] for segment in info]) if all("score" in segment for segment in info) else None,
        frozenset(segment["label_id"] for segment in info if segment.get("was_fused")),
    )


def class_color(class_id: int) -> Color:
    """The RGB color of a class, which depends only on its id."""
    # Every other class is darker, so that classes with similar hues differ in lightness.
    value = (1.0, 0.75)[class_id % 2]
    red, green, blue = colorsys.hsv_to_rgb((FIRST_HUE + class_id * HUE_STEP) % 1.0, 0.85, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_segments(image: Image.Image, segments: Segments, id2label: Mapping[int, str]) -> Image.Image:
    """Draws segments over an RGB copy of an image, tinted in their class's color, outlined and labeled.

    A label is inside the largest visible part of its segment, or beside a small segment. Segments that cover less than
    `LEAST_NAMED` of the image, and small ones with no room beside them, have no label. Text and outlines grow with the
    image.

    Drawn with Pillow: without OpenCV, supervision's mask annotator is slow, and it puts smaller masks on top regardless
    of their scores. Its label annotator lets letters such as those of "snow" stick out of their background.

    Args:
        image: of the masks' size.
        segments: drawn with the best score on top; without scores, with the smallest on top.
        id2label: the name of each class id.

    Raises:
        ValueError: the sizes differ.
    """
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
    class_ids = segments.class_ids.tolist()
    tracks = segments.tracks or [None] * len(masks)
    # An object keeps its color even if its class changes.
    colors = [class_color(class_ids[n] if (track := tracks[n]) is None else track) for n in shown]
    crops = [
        (masks[number][y_min : y_max + 1, x_min : x_max + 1], (x_min, y_min, x_max, y_max))
        for number, (x_min, y_min, x_max, y_max) in ((number, profiles[number].box) for number in shown)
    ]
    on_top = last_on_top(crops, (image.height, image.width))
    opacities = [STUFF_OPACITY if class_ids[number] in segments.stuff_ids else OPACITY for number in shown]
    tint = _tint(on_top, colors, opacities)
    drawn.paste(tint, mask=tint)
    placement = LabelPlacement(on_top, max(FONT_SIZE, round(max(image.size) / TEXT_SCALE)))
    least = LEAST_NAMED * masks[0].size
    # The smallest segments come first, because they leave the least choice.
    for index, number in sorted(enumerate(shown), key=lambda pair: profiles[pair[1]].pixels):
        if profiles[number].pixels < least:
            continue
        name = id2label.get(class_ids[number], str(class_ids[number]))
        if tracks[number] is not None:
            name += f" #{tracks[number]}"
        if segments.scores is not None:
            name += f" {segments.scores[number].item():.2f}"
        box = placement.place(index + 1, profiles[number].box, name)
        if box is not None:
            _draw_label(drawn, box, name, colors[index], load_font(name, placement.font_size))
    return drawn


def _draw_label(image: Image.Image, box: Box, text: str, color: Color, font: Any) -> None:
    """Writes text into a box (x_min, y_min, x_max, y_max, inclusive) that is filled with a color."""
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle(box, radius=PADDING, fill=color)
    middle = (box[1] + box[3] + 1) / 2
    draw.text((box[0] + PADDING, middle), text, fill=_text_color(color), font=font, anchor="lm")


def _tint(on_top: np.ndarray, colors: Sequence[Color], opacities: Sequence[float]) -> Image.Image:
    """An RGBA image: segments with their opacities, outlined inside, and transparent elsewhere.

    Args:
        on_top: (H, W), the number of the segment at each pixel, from 1; 0 for none.
        colors, opacities: of each segment.
    """
    height, width = on_top.shape
    line = max(1, round(max(height, width) / OUTLINE_SCALE))
    edges = np.zeros((height, width), dtype=bool)
    for ahead, behind in (
        (np.s_[:, line:], np.s_[:, :-line]),
        (np.s_[line:], np.s_[:-line]),
    ):
        differ = on_top[ahead] != on_top[behind]
        edges[ahead] |= differ
        edges[behind] |= differ
    nothing = (0, 0, 0, 0)
    filled = [(*color, round(255 * opacity)) for color, opacity in zip(colors, opacities, strict=True)]
    outlined = [(*color, round(255 * OUTLINE_OPACITY)) for color in colors]
    table = np.array([nothing, *filled, nothing, *outlined], dtype=np.uint8)
    kind = np.min_scalar_type(len(table) - 1)
    numbers = on_top.astype(kind, copy=False) + edges * kind.type(len(colors) + 1)
    # Looking up a pixel's four bytes as one number takes a quarter of the time.
    pixels = table.view(np.uint32)[:, 0].take(numbers)
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
        font = load_font(caption, FONT_SIZE)
        ImageDraw.Draw(row).text((left + GAP, GAP // 2), caption, fill="black", font=font)
        row.paste(panel, (left, heading))
        left += panel.width + GAP
    return row


def load_font(text: str, size: int) -> Any:
    """A font of this size in pixels that has the characters of a text. If none has all, warns once."""
    place = None if text.isascii() else _font_file("".join(sorted(set(text) - set(map(chr, range(128))))))
    return ImageFont.load_default(size) if place is None else ImageFont.truetype(place, size)


@lru_cache(maxsize=4096)
def _font_file(characters: str) -> str | None:
    """The font that has the most of these characters, by its file; None for Pillow's own."""
    best, fewest = None, characters
    library = find_spec("matplotlib")  # it comes with supervision, and has a font
    own = [] if library is None else [str(Path(str(library.origin)).parent / "mpl-data" / "fonts" / "ttf" / FONTS[0])]
    for place in [*own, *FONTS]:
        try:
            font = ImageFont.truetype(place, FONT_SIZE)
        except OSError:  # not on this machine
            continue
        box = bytes(font.getmask(NO_CHARACTER))
        lacking = "".join(one for one in characters if bytes(font.getmask(one)) == box)
        if len(lacking) < len(fewest):
            best, fewest = str(font.path), lacking  # a name alone would be searched for again and again
        if not lacking:
            break
    if fewest:
        logger.warning_once("No font on this machine has all characters of the names, so that pictures show some as "
                            "boxes: install Noto Sans CJK.")  # fmt: skip
    return best


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
    return image.resize((width, height), Image.Resampling.BILINEAR), replace(segments, masks=masks)


@dataclass
class _Profile:
    """A mask's area in pixels and box (x_min, y_min, x_max, y_max, inclusive)."""

    pixels: int
    box: tuple[int, int, int, int] = (0, 0, 0, 0)


def _profile(mask: np.ndarray) -> _Profile:
    """Measures a mask (H, W) bool."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not len(rows):
        return _Profile(0)
    x_min, y_min, x_max, y_max = (int(place) for place in (columns[0], rows[0], columns[-1], rows[-1]))
    pixels = int(np.count_nonzero(mask[y_min : y_max + 1, x_min : x_max + 1]))
    return _Profile(pixels, (x_min, y_min, x_max, y_max))


def _order(segments: Segments, profiles: Sequence[_Profile]) -> list[int]:
    """The drawing order: the best score last; without scores, the smallest last."""
    rank = segments.scores
    if rank is None:
        rank = -torch.tensor([profile.pixels for profile in profiles], dtype=torch.int64)
    return rank.argsort(stable=True).tolist()


def _text_color(color: Color) -> Color:
    """Black or white, whichever has the higher contrast ratio to the color (WCAG 2.2): at least 4.58."""
    shares = [value / 255 for value in color]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (0, 0, 0) if (luminance + 0.05) ** 2 > 1.05 * 0.05 else (255, 255, 255)


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
            f"This needs supervision, which cannot be imported ({error}): install hf-faim2f[draw]."
        ) from error
    return library


class LabelPlacement:
    """Finds places for the labels of one image, one after the other.

    Compares all positions of a label on a grid whose cells are a third of the font size, by window sums from a
    summed-area table (Crow, SIGGRAPH 1984).

    Args:
        on_top: (H, W), the number of the visible segment at each pixel.
        font_size: font size in pixels.
    """

    def __init__(self, on_top: np.ndarray, font_size: int) -> None:
        self.font_size = font_size
        self.cell = max(1, font_size // 3)
        self.height, self.width = on_top.shape
        self.segments = on_top[self.cell // 2 :: self.cell, self.cell // 2 :: self.cell]  # (rows, columns) of cells
        self.taken = np.zeros(self.segments.shape, dtype=bool)
        self.draw = ImageDraw.Draw(Image.new("L", (1, 1)))

    def place(self, number: int, box: Box, text: str) -> Box | None:
        """Chooses the box of a segment's label and marks it as taken; None if there is no room.

        Args:
            number: the segment's number in the map.
            box: its box.
            text: the label.
        """
        font = load_font(text, self.font_size)
        _, _, right, bottom = self.draw.textbbox((0, 0), text, font=font)
        width, height = int(right) + 2 * PADDING, max(sum(font.getmetrics()), int(bottom))  # the height of a line
        if (box[2] - box[0] + 1) * (box[3] - box[1] + 1) > SMALL * width * height:
            corner = self._inside(number, box, width, height)
        else:
            corner = self._beside(box, width, height)
        if corner is None:
            return None
        self.taken[self._cells(corner, width, height)] = True
        return *corner, corner[0] + width - 1, corner[1] + height - 1

    def _inside(self, number: int, box: Box, width: int, height: int) -> tuple[int, int] | None:
        """The label's upper left corner on the segment's largest part."""
        cell = self.cell
        left, top = -(-box[0] // cell), -(-box[1] // cell)
        cells = np.s_[top : (box[3] + 1) // cell, left : (box[2] + 1) // cell]
        segment, taken = _table(self.segments[cells] == number), _table(self.taken[cells])
        across, down = -(-width // cell), -(-height // cell)
        rows, columns = (length - 1 for length in segment.shape)
        if rows < down or columns < across:
            return self._beside(box, width, height)
        margin = max(rows, columns) // 6
        on_segment = _window_sums(segment, down, across) / (down * across)
        on_labels = _window_sums(taken, down, across) / (down * across)
        around = _enlarged_sums(segment, down, across, margin) / ((down + 2 * margin) * (across + 2 * margin))
        score = ON_SEGMENT * on_segment - ON_LABELS * on_labels + AROUND * around
        row, column = np.unravel_index(score.argmax(), score.shape)
        if not on_segment[row, column] or on_labels[row, column]:
            return None
        return (left + int(column)) * cell, (top + int(row)) * cell

    def _beside(self, box: Box, width: int, height: int) -> tuple[int, int] | None:
        """The label's upper left corner above, below, right or left of the box, where it covers the fewest segments."""
        if width > self.width or height > self.height:
            return None
        x_min, y_min, x_max, y_max = box
        x = min(max(0, (x_min + x_max + 1 - width) // 2), self.width - width)
        y = min(max(0, (y_min + y_max + 1 - height) // 2), self.height - height)
        corners = (
            (x, y_min - DISTANCE - height),
            (x, y_max + 1 + DISTANCE),
            (x_max + 1 + DISTANCE, y),
            (x_min - DISTANCE - width, y),
        )
        free = [
            (left, top)
            for left, top in corners
            if 0 <= left <= self.width - width
            and 0 <= top <= self.height - height
            and not self.taken[self._cells((left, top), width, height)].any()
        ]
        if not free:
            return None
        return min(free, key=lambda corner: len(np.unique(self.segments[self._cells(corner, width, height)])))

    def _cells(self, corner: tuple[int, int], width: int, height: int) -> tuple[slice, slice]:
        """The cells that a label touches."""
        (left, top), cell = corner, self.cell
        return slice(top // cell, -(-(top + height) // cell)), slice(left // cell, -(-(left + width) // cell))


def _table(values: np.ndarray) -> np.ndarray:
    """The summed-area table of a bool array (rows, columns): (rows + 1, columns + 1) int32, of exclusive sums."""
    table = np.zeros((values.shape[0] + 1, values.shape[1] + 1), dtype=np.int32)
    values.cumsum(0, dtype=np.int32).cumsum(1, out=table[1:, 1:])
    return table


def _window_sums(table: np.ndarray, height: int, width: int) -> np.ndarray:
    """Sums over every window of this size inside the array."""
    strips = table[height:] - table[:-height]
    return strips[:, width:] - strips[:, :-width]


def _enlarged_sums(table: np.ndarray, height: int, width: int, margin: int) -> np.ndarray:
    """Sums over the same windows, each enlarged by the margin on all sides and clipped to the array."""
    rows, columns = table.shape[0] - 1, table.shape[1] - 1
    tops, lefts = np.arange(rows - height + 1), np.arange(columns - width + 1)
    strips = table[np.minimum(tops + height + margin, rows)] - table[np.maximum(tops - margin, 0)]
    return strips[:, np.minimum(lefts + width + margin, columns)] - strips[:, np.maximum(lefts - margin, 0)]

"""Synthetic scenes of handwritten digits over photographs: a dataset with exact ground truth that needs no download.

The digits are the 1,797 of scikit-learn (8x8, 16 gray levels; Alpaydin and Kaynak, UCI 1998), the backgrounds its two
photographs. A scene has 1 to 8 digits, scaled, rotated, colored and overlapping, and strokes and blots as distractors.
Training and test scenes share neither digits nor parts of photographs.
"""

import functools
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..family.digits import LABELS
from .item import Item, make_item

BACKGROUND = LABELS.index("background")

SPLITS = ("train", "test")
# Every fifth digit of each class and the lower right quarter of each photograph are held out for the test split.
HELD_OUT = 5
# Minimum ink of a digit's pixels; the strokes of 8x8 digits have soft edges.
INK = 0.35
# Digits may overlap, but at least this fraction of each stays visible, so that it can be recognized.
LEAST_VISIBLE = 0.85


def _sklearn_datasets() -> Any:
    """Imports scikit-learn's datasets; raises an ImportError that says how to install them."""
    try:
        return import_module("sklearn.datasets")
    except ImportError as error:
        raise ImportError(
            f"Scenes of digits need scikit-learn, which cannot be imported ({error}): pip install scikit-learn.",
            name=error.name,
        ) from error


@functools.cache
def _digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Ink (n, 8, 8) in 0..1 and class ids (n,)."""
    data = _sklearn_datasets().load_digits()
    held_out = np.zeros(len(data.target), dtype=bool)
    for digit in range(10):
        held_out[np.flatnonzero(data.target == digit)[::HELD_OUT]] = True
    chosen = held_out if split == "test" else ~held_out
    return (data.images[chosen] / 16).astype(np.float32), data.target[chosen].astype(np.int64)


@functools.cache
def _photographs(split: str) -> list[Image.Image]:
    """The parts of scikit-learn's photographs that belong to a split."""
    library = _sklearn_datasets()
    parts = []
    for name in ("china.jpg", "flower.jpg"):
        photograph = Image.fromarray(library.load_sample_image(name))
        width, height = photograph.size
        if split == "test":
            parts.append(photograph.crop((width // 2, height // 2, width, height)))
        else:
            parts += [photograph.crop((0, 0, width // 2, height)), photograph.crop((width // 2, 0, width, height // 2))]
    return parts


@dataclass(frozen=True)
class DigitScenes:
    """A sequence of scenes: `scenes[i]` is an `Item` that is composed deterministically when it is accessed.

    Args:
        split: "train" or "test".
        count: number of scenes.
        size: height and width of a scene, in pixels; at least 64.
        most: maximum number of digits in a scene; at least 1.
        seed: random seed of the scenes; all seeds use the same digits.

    Raises:
        ValueError: an unknown split, or a number out of range.
    """

    split: str
    count: int
    size: int = 128
    most: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"DigitScenes: split must be one of {', '.join(SPLITS)}, got {self.split!r}.")
        if self.count < 1 or self.size < 64 or self.most < 1:
            raise ValueError("DigitScenes: count and most must be at least 1, and size at least 64.")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < self.count:
            raise IndexError(index)  # also terminates iteration
        random = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
        canvas = _background(random, self.split, self.size)
        _clutter(random, canvas)
        inks, classes = _digits(self.split)
        segments = np.full((self.size, self.size), -1, dtype=np.int32)
        labels: list[int] = []
        whole: list[int] = []  # number of pixels of each digit, including covered ones
        for _ in range(int(random.integers(1, self.most + 1))):
            number = int(random.integers(len(inks)))
            alpha = _glyph(random, inks[number], self.size)
            for _ in range(10):  # attempts to place the digit, which is dropped if all fail
                top = int(random.integers(self.size - alpha.shape[0] + 1))
                left = int(random.integers(self.size - alpha.shape[1] + 1))
                window = (slice(top, top + alpha.shape[0]), slice(left, left + alpha.shape[1]))
                covered = segments.copy()
                covered[window][alpha > INK] = len(labels)
                visible = np.bincount(covered.ravel() + 1, minlength=len(labels) + 2)[1:-1]
                if (visible >= LEAST_VISIBLE * np.array(whole)).all():
                    segments = covered
                    labels.append(int(classes[number]))
                    whole.append(int((alpha > INK).sum()))
                    _write(random, canvas, alpha, window)
                    break
        # The rest is one more segment, so that the scene is panoptic ground truth, and also semantic and instance.
        segments[segments < 0] = len(labels)
        labels.append(BACKGROUND)
        pixels = torch.from_numpy(np.ascontiguousarray(np.asarray(canvas).transpose(2, 0, 1)))
        name = f"{self.split}-{self.seed}-{index}"
        return make_item(pixels, torch.from_numpy(segments), labels, index, name)


def _background(random: np.random.Generator, split: str, size: int) -> Image.Image:
    """A square crop of a photograph, with random scale, mirroring and brightness."""
    photographs = _photographs(split)
    photograph = photographs[int(random.integers(len(photographs)))]
    side = int(random.integers(64, min(photograph.size) + 1))
    left = int(random.integers(photograph.width - side + 1))
    top = int(random.integers(photograph.height - side + 1))
    square = photograph.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BILINEAR)
    if random.random() < 0.5:
        square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    gain, shift = random.uniform(0.6, 1.2), random.uniform(-20, 20)
    return Image.fromarray(np.clip(np.asarray(square) * gain + shift, 0, 255).astype(np.uint8))


def _clutter(random: np.random.Generator, canvas: Image.Image) -> None:
    """Draws up to 5 strokes and blots in random colors as distractors."""
    draw = ImageDraw.Draw(canvas)
    size = canvas.width
    for _ in range(int(random.integers(0, 6))):
        color: Any = tuple(int(value) for value in random.integers(0, 256, 3))
        x, y = (int(value) for value in random.integers(0, size, 2))
        length, angle = random.uniform(size / 12, size / 4), random.uniform(0, 2 * np.pi)
        end = (x + length * np.cos(angle), y + length * np.sin(angle))
        if random.random() < 0.6:
            draw.line((x, y, *end), fill=color, width=int(random.integers(2, 6)))
        else:
            radius = length / 5
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)


def _glyph(random: np.random.Generator, ink: np.ndarray, size: int) -> np.ndarray:
    """A digit's ink, scaled and rotated: (h, w), in 0..1, smaller than the scene."""
    side = int(size * random.uniform(0.24, 0.44))
    # With an empty margin, so that interpolation fades out at the edges.
    glyph = Image.fromarray(np.pad(ink, 1)).resize((side, side), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(glyph.rotate(random.uniform(-25, 25), Image.Resampling.BICUBIC, expand=True)), 0, 1)


def _write(random: np.random.Generator, canvas: Image.Image, alpha: np.ndarray, window: tuple[slice, slice]) -> None:
    """Draws a digit in a color that contrasts with the background."""
    pixels = np.asarray(canvas).copy()
    ground = pixels[window][alpha > INK].mean()
    # Light ink on dark background or dark ink on light background, with a random hue.
    level = random.uniform(170, 255) if ground < 110 else random.uniform(0, 50)
    color = np.clip(level + random.uniform(-30, 30, 3), 0, 255)
    # Sharpens the edges that interpolation has blurred.
    opacity = np.clip((alpha - INK) / 0.3 + 0.5, 0, 1)[..., None]
    pixels[window] = (opacity * color + (1 - opacity) * pixels[window]).astype(np.uint8)
    canvas.paste(Image.fromarray(pixels))

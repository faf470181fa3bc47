"""What a visitor's page remembers of a prediction: enough to draw it again with one segment alone."""

import zlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from ..runtime.drawing import Segments, draw_alone, draw_segments
from ..runtime.prediction import Prediction

# The longer side of what the page shows. Downloads have every pixel.
LONGEST = 1600


@dataclass(frozen=True)
class Row:
    """A segment in the legend.

    Args:
        area: in pixels of the picture.
        share: of the picture, 0..1.
    """

    class_id: int
    label: str
    score: float | None
    area: int
    share: float


@dataclass(frozen=True)
class Shown:
    """A prediction as the page has it, best segment first.

    Args:
        image: RGB, its longer side at most `LONGEST`.
        rows: a segment each.
        masks: of the segments at the image's size, one bit a pixel, compressed.
        chosen: the place of the segment that is shown alone; None for all of them.
        turn: how often something was chosen.
    """

    image: Image.Image
    rows: tuple[Row, ...]
    masks: tuple[bytes, ...]
    chosen: int | None = None
    turn: int = 0

    def mask(self, place: int) -> np.ndarray:
        """(H, W) bool."""
        width, height = self.image.size
        bits = np.frombuffer(zlib.decompress(self.masks[place]), dtype=np.uint8)
        return np.unpackbits(bits, count=width * height).reshape(height, width).astype(bool)

    def at(self, x: int, y: int) -> int | None:
        """The place of the best segment at a pixel of the image; None where there is none."""
        width, height = self.image.size
        if not (0 <= x < width and 0 <= y < height):
            return None
        return next((place for place in range(len(self.rows)) if self.mask(place)[y, x]), None)

    def choose(self, place: int | None) -> "Shown":
        """The same with this segment alone; with all, if it was alone already, or there is no such."""
        alone = place is not None and 0 <= place < len(self.rows) and place != self.chosen
        return replace(self, chosen=place if alone else None, turn=self.turn + 1)

    def draw(self) -> Image.Image:
        """The image with all segments, or with the chosen one."""
        names = {row.class_id: row.label for row in self.rows}
        places = range(len(self.rows)) if self.chosen is None else [self.chosen]
        rows = [self.rows[place] for place in places]
        scores = [row.score for row in rows if row.score is not None]
        width, height = self.image.size
        masks = np.stack([self.mask(place) for place in places]) if rows else np.zeros((0, height, width), dtype=bool)
        segments = Segments(
            torch.from_numpy(masks),
            torch.tensor([row.class_id for row in rows], dtype=torch.int64),
            torch.tensor(scores) if len(scores) == len(rows) else None,
        )
        draw = draw_segments if self.chosen is None else draw_alone
        return draw(self.image, segments, names)


def shown_of(prediction: Prediction) -> Shown:
    """What is remembered of a prediction."""
    height, width = prediction.size
    factor = min(1.0, LONGEST / max(height, width))
    image = prediction.image
    if factor < 1:
        size = (max(1, round(width * factor)), max(1, round(height * factor)))
        image = image.resize(size, Image.Resampling.BILINEAR)
    rows, masks = [], []
    for segment in prediction.segments:
        area = int(np.count_nonzero(segment.mask.numpy()))
        rows.append(Row(segment.class_id, segment.label, segment.score, area, area / (height * width)))
        # One at a time: a hundred whole masks would take a hundred times the picture.
        one = replace(prediction, segments=[segment]).masks((image.height, image.width))[0]
        masks.append(zlib.compress(np.packbits(one.numpy()).tobytes(), 1))
    return Shown(image, tuple(rows), tuple(masks))


__all__ = ["Row", "Shown", "shown_of"]

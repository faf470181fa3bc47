"""What is predicted of an image, the same objects whatever network it came from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .mask_run_lengths import encode_run_lengths

Box = tuple[int, int, int, int]


@dataclass
class Segment:
    """One segment. The mask is cropped to its box, so that memory follows the segment's size."""

    class_id: int
    label: str
    score: float | None  # 0..1; None in a semantic prediction, whose classes have none
    box: Box  # x_min, y_min, x_max, y_max in pixels of the image, all four inclusive
    mask: Tensor  # (y_max - y_min + 1, x_max - x_min + 1) bool, on the processor


@dataclass
class Prediction:
    """What is predicted of one image of H x W pixels.

    - **subtask**: "semantic", "instance" or "panoptic".
    - **label_map**: (H, W) int64, on the processor: the class of each pixel, -1 for none. Where instances overlap, that
      of the best score.
    - **segments**: best first. Of an instance prediction the detections, which may overlap; of a panoptic one the
      segments, where all stuff of a class is one; of a semantic one the classes that are in the map, by their ids.
    - **image**: what was looked at, RGB and upright by its EXIF orientation.
    - **id2label**: the name of each class.
    """

    subtask: str
    label_map: Tensor
    segments: list[Segment]
    image: Image.Image = field(repr=False)
    id2label: Mapping[int, str] = field(repr=False)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image in pixels."""
        return self.image.height, self.image.width

    def run_lengths(self) -> list[dict[str, Any]]:
        """Each segment's mask as COCO's compressed run lengths, {"size": [height, width], "counts": str}."""
        crops, boxes = [segment.mask.numpy() for segment in self.segments], [segment.box for segment in self.segments]
        return encode_run_lengths(crops, boxes, self.size)

    def segment_map(self) -> Tensor:
        """(H, W) int64: at each pixel the place in `segments` of the best that is there, -1 where none is."""
        return paint(self.segments, list(range(len(self.segments))), self.size)

    def masks(self, size: tuple[int, int] | None = None) -> Tensor:
        """(n, height, width) bool: the whole masks, by nearest neighbor if the size is not the image's."""
        if size == self.size:
            size = None
        height, width = size or self.size
        rows, columns = torch.arange(height) * self.size[0] // height, torch.arange(width) * self.size[1] // width
        masks = torch.zeros(len(self.segments), height, width, dtype=torch.bool)
        for whole, segment in zip(masks, self.segments, strict=True):
            x_min, y_min, x_max, y_max = segment.box
            # What is inside is without gaps: from the first to before the one past it.
            top, below = torch.searchsorted(rows, torch.tensor([y_min, y_max + 1])).tolist()
            left, right = torch.searchsorted(columns, torch.tensor([x_min, x_max + 1])).tolist()
            crop = segment.mask
            if size is not None:
                crop = crop[rows[top:below] - y_min][:, columns[left:right] - x_min]
            whole[top:below, left:right] = crop
        return masks

    def draw(self, longest: int | None = None) -> Image.Image:
        """The image with its segments tinted and named.

        Args:
            longest: the most pixels that a side shall have; None for the image's own size.

        Raises:
            ImportError: without supervision.
        """
        # Only who draws needs what drawing needs.
        from .drawing import Segments, draw_segments

        height, width = self.size
        factor = min(1.0, (longest or max(self.size)) / max(self.size))
        height, width = max(1, round(height * factor)), max(1, round(width * factor))
        image = self.image
        if factor < 1:
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        scores = [segment.score for segment in self.segments if segment.score is not None]
        segments = Segments(
            self.masks((height, width)),
            torch.tensor([segment.class_id for segment in self.segments], dtype=torch.int64),
            torch.tensor(scores) if len(scores) == len(self.segments) else None,
        )
        return draw_segments(image, segments, self.id2label)

    def to_json(self) -> list[dict[str, Any]]:
        """The segments as plain data, in order: class id, label, score, box, area in pixels, and run lengths."""
        return [
            {
                "class_id": segment.class_id,
                "label": segment.label,
                "score": segment.score,
                "box": list(segment.box),
                "area": int(np.count_nonzero(segment.mask.numpy())),
                "segmentation": run_lengths,
            }
            for segment, run_lengths in zip(self.segments, self.run_lengths(), strict=True)
        ]


def paint(segments: list[Segment], values: list[int], size: tuple[int, int]) -> Tensor:
    """(H, W) int64 with each segment's value in its mask, -1 where none is; the first lie on top."""
    crops = [(segment.mask.numpy(), segment.box) for segment in reversed(segments)]
    table = np.array([-1, *reversed(values)], dtype=np.int64)
    return torch.from_numpy(table.take(last_on_top(crops, size)))


def last_on_top(crops: Sequence[tuple[np.ndarray, Box]], size: tuple[int, int]) -> np.ndarray:
    """(H, W) of small whole numbers: at each pixel which of the masks, counted from 1, is the last there; 0 for none.

    Args:
        crops: masks, bool, each cropped to its box.
        size: (H, W) in pixels.
    """
    numbers = np.zeros(size, dtype=np.min_scalar_type(len(crops)))
    for number, (mask, (x_min, y_min, x_max, y_max)) in enumerate(crops, start=1):
        inside = numbers[y_min : y_max + 1, x_min : x_max + 1]
        # The last is the largest: a tenth of the time of writing where a mask is.
        np.maximum(inside, mask * numbers.dtype.type(number), out=inside)
    return numbers


__all__ = ["Prediction", "Segment", "last_on_top", "paint"]

"""What a visitor's page remembers of a prediction: enough to draw it again with one segment alone."""

import io
import json
import re
import tempfile
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..runtime.drawing import Segments, draw_alone, draw_segments
from ..runtime.prediction import Prediction
from ..version import __version__

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


# A prediction as files to take away: JSON, masks in a zip, and a COCO document.

# Of PNG: higher levels take much longer, for little.
COMPRESSION = 3
DATE = (1980, 1, 1, 0, 0, 0)  # of zip's entries: the same prediction is the same file


class Files(NamedTuple):
    """Paths of what can be downloaded."""

    document: Path
    masks: Path
    coco: Path


def write_files(prediction: Prediction, about: dict[str, Any], name: str, folder: Path) -> Files:
    """Writes the three files into a new folder in `folder`.

    - `segments.json`: `about`, the image's name and size, and `Prediction.to_json()`, as `faim2f predict` writes it;
    - `masks.zip`: each segment's mask in black and white, `labels.png` with each pixel's class (the largest value of
      the file, 255 or 65535, for none), and but for semantic predictions `segments.png` with each pixel's segment,
      counted from 1 in the JSON's order, 0 for none;
    - `coco.json`: a document of one image, whose annotations' masks are compressed run lengths.

    Args:
        about: what the JSON says besides.
        name: the image's.
    """
    place = Path(tempfile.mkdtemp(dir=folder))
    segments = prediction.to_json()
    image = {"file": name, "height": prediction.size[0], "width": prediction.size[1]}
    files = Files(place / "segments.json", place / "masks.zip", place / "coco.json")
    _write_json(files.document, {"image": image, **about, "segments": segments, "version": __version__})
    _write_json(files.coco, coco_document(prediction, segments, name))
    _write_masks(files.masks, prediction)
    return files


def coco_document(prediction: Prediction, segments: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """COCO's form of a prediction, which `pycocotools` reads. Boxes are x, y, width, height; category ids class ids."""
    annotations = []
    for number, segment in enumerate(segments, 1):
        x_min, y_min, x_max, y_max = segment["box"]
        annotation = {
            "id": number,
            "image_id": 1,
            "category_id": segment["class_id"],
            "segmentation": segment["segmentation"],
            "bbox": [x_min, y_min, x_max - x_min + 1, y_max - y_min + 1],
            "area": segment["area"],
            "iscrowd": 0,
        }
        if segment["score"] is not None:
            annotation["score"] = segment["score"]
        annotations.append(annotation)
    return {
        "info": {"description": f"{prediction.subtask} segmentation by hf-faim2f {__version__}"},
        "images": [{"id": 1, "file_name": name, "height": prediction.size[0], "width": prediction.size[1]}],
        "categories": [{"id": label, "name": text} for label, text in sorted(prediction.id2label.items())],
        "annotations": annotations,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, allow_nan=False, indent=1), encoding="utf-8")


def _write_masks(path: Path, prediction: Prediction) -> None:
    height, width = prediction.size
    with zipfile.ZipFile(path, "w") as archive:
        _put(archive, "labels.png", _map(prediction.label_map, len(prediction.id2label)))
        if prediction.subtask != "semantic":
            _put(archive, "segments.png", _map(prediction.segment_map() + 1, len(prediction.segments) + 1))
        for number, segment in enumerate(prediction.segments, 1):
            whole = np.zeros((height, width), dtype=bool)  # one at a time, however many there are
            x_min, y_min, x_max, y_max = segment.box
            whole[y_min : y_max + 1, x_min : x_max + 1] = segment.mask.numpy()
            # A label can be any text, and names a file on a stranger's disk.
            label = re.sub(r"[^A-Za-z0-9]+", "-", segment.label).strip("-")[:40] or f"class-{segment.class_id}"
            _put(archive, f"masks/{number:03d}-{label}.png", Image.fromarray(whole))


def _map(values: Tensor, count: int) -> Image.Image:
    """Whole numbers below `count`, and -1, in 8 bits where they do."""
    return Image.fromarray(values.numpy().astype(np.uint8 if count <= 255 else np.uint16))


def _put(archive: zipfile.ZipFile, name: str, image: Image.Image) -> None:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=COMPRESSION)
    archive.writestr(zipfile.ZipInfo(name, DATE), file.getvalue())


__all__ = ["Files", "Row", "Shown", "coco_document", "shown_of", "write_files"]

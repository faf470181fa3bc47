"""A prediction on the web page: a view that can be redrawn with one segment alone, and downloads."""

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

from ..runtime.drawing import Segments, draw_alone, draw_segments
from ..runtime.prediction import Prediction
from ..runtime.prediction_files import COMPRESSION, label_map_png, segment_map_png
from ..version import __version__

# Longer side in pixels of displayed images. Downloads have full resolution.
LONGEST = 1600
# Fixed date of zip entries, so that the same prediction gives the same file.
DATE = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class LegendRow:
    """A segment in the legend.

    Args:
        class_id, label, score: the segment's.
        area: in pixels of the original image.
        share: fraction of the image, 0 to 1.
        is_stuff: whether it is drawn lightly.
    """

    class_id: int
    label: str
    score: float | None
    area: int
    share: float
    is_stuff: bool = False


@dataclass(frozen=True)
class PageView:
    """The state of a visitor's page: a prediction in reduced form, from which it can be redrawn.

    Args:
        image: RGB, its longer side at most `LONGEST`.
        rows: one for each segment, best first.
        masks: the segments' masks at the image's size, packed to one bit per pixel and compressed.
        chosen: the row whose segment is shown alone; None for all segments.
        turn: counts the choices, so that each view's HTML differs from the last.
    """

    image: Image.Image
    rows: tuple[LegendRow, ...]
    masks: tuple[bytes, ...]
    chosen: int | None = None
    turn: int = 0

    def mask(self, place: int) -> np.ndarray:
        """The mask of a row's segment, (H, W) bool."""
        width, height = self.image.size
        bits = np.frombuffer(zlib.decompress(self.masks[place]), dtype=np.uint8)
        return np.unpackbits(bits, count=width * height).reshape(height, width).astype(bool)

    def row_at(self, x: int, y: int) -> int | None:
        """The row of the best segment at a pixel of the image; None if there is no segment."""
        width, height = self.image.size
        if not (0 <= x < width and 0 <= y < height):
            return None
        return next((place for place in range(len(self.rows)) if self.mask(place)[y, x]), None)

    def choose(self, place: int | None) -> "PageView":
        """This view with one segment alone; with all segments if it was alone already or the row does not exist."""
        alone = place is not None and 0 <= place < len(self.rows) and place != self.chosen
        return replace(self, chosen=place if alone else None, turn=self.turn + 1)

    def draw(self) -> Image.Image:
        """Draws the image with all segments, or with the chosen one."""
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
            frozenset(row.class_id for row in rows if row.is_stuff),
        )
        draw = draw_segments if self.chosen is None else draw_alone
        return draw(self.image, segments, names)


def view_of(prediction: Prediction) -> PageView:
    """The view of a prediction, shrunk to `LONGEST`."""
    height, width = prediction.size
    factor = min(1.0, LONGEST / max(height, width))
    image = prediction.image
    if factor < 1:
        size = (max(1, round(width * factor)), max(1, round(height * factor)))
        image = image.resize(size, Image.Resampling.BILINEAR)
    rows, masks = [], []
    for segment in prediction.segments:
        area = int(np.count_nonzero(segment.mask.numpy()))
        share, is_stuff = area / (height * width), segment.class_id in prediction.stuff_ids
        rows.append(LegendRow(segment.class_id, segment.label, segment.score, area, share, is_stuff))
        # One at a time: a hundred full-size masks would take a hundred times the memory of the image.
        one = replace(prediction, segments=[segment]).masks((image.height, image.width))[0]
        masks.append(zlib.compress(np.packbits(one.numpy()).tobytes(), 1))
    return PageView(image, tuple(rows), tuple(masks))


class Downloads(NamedTuple):
    """Paths of the downloadable files."""

    document: Path
    masks: Path
    coco: Path


def write_downloads(prediction: Prediction, about: dict[str, Any], name: str, folder: Path) -> Downloads:
    """Writes the downloads of a prediction into a new folder.

    - `segments.json`: `about`, the image's name and size, and `Prediction.to_json()`, as from `faim2f predict`;
    - `masks.zip`: each segment's mask in black and white, `labels.png` and, except for semantic predictions,
      `segments.png`, which `runtime.prediction_files` describes;
    - `coco.json`: the image as a COCO document, with masks as compressed run lengths.

    Args:
        prediction: the prediction.
        about: further facts for the JSON.
        name: the image's name.
        folder: the folder in which the new one is created.
    """
    place = Path(tempfile.mkdtemp(dir=folder))
    segments = prediction.to_json()
    image = {"file": name, "height": prediction.size[0], "width": prediction.size[1]}
    files = Downloads(place / "segments.json", place / "masks.zip", place / "coco.json")
    _write_json(files.document, {"image": image, **about, "segments": segments, "version": __version__})
    _write_json(files.coco, coco_document(prediction, segments, name))
    _write_masks(files.masks, prediction)
    return files


def coco_document(prediction: Prediction, segments: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """A prediction in COCO's format for `pycocotools`: boxes are x, y, width, height; category ids are class ids.

    Args:
        prediction: the prediction.
        segments: its `to_json()`.
        name: the image's name.
    """
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
        archive.writestr(zipfile.ZipInfo("labels.png", DATE), label_map_png(prediction))
        if prediction.subtask != "semantic":
            archive.writestr(zipfile.ZipInfo("segments.png", DATE), segment_map_png(prediction))
        for number, segment in enumerate(prediction.segments, 1):
            whole = np.zeros((height, width), dtype=bool)  # one full-size mask at a time
            x_min, y_min, x_max, y_max = segment.box
            whole[y_min : y_max + 1, x_min : x_max + 1] = segment.mask.numpy()
            file = io.BytesIO()
            Image.fromarray(whole).save(file, "PNG", compress_level=COMPRESSION)
            # A label can be any text, and becomes part of a file name on the visitor's disk.
            label = re.sub(r"[^A-Za-z0-9]+", "-", segment.label).strip("-")[:40] or f"class-{segment.class_id}"
            archive.writestr(zipfile.ZipInfo(f"masks/{number:03d}-{label}.png", DATE), file.getvalue())


__all__ = ["Downloads", "LegendRow", "PageView", "coco_document", "view_of", "write_downloads"]

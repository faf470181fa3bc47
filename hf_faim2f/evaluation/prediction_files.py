"""What was predicted, as files that the data sets' own evaluations read: COCO's panoptic form, and maps of classes."""

import hashlib
import json
import os
import re
import shutil
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data.dataset import Description
from ..data.item import Item
from ..family.panoptic import CITYSCAPES_CLASSES

FOLDER = "predictions"
PANOPTIC, SEMANTIC = "panoptic", "semantic"
SUFFIX = "_predictions"
# File systems take 255 bytes for a name; the digest and the suffix need some.
LONGEST_NAME = 200


class PredictionFiles:
    """Writes predictions as an `Evaluator` tells them, beside each other in several processes.

    `OUT/predictions/panoptic/ID.png` has the segment ids, id = R + 256 G + 256**2 B, and
    `OUT/predictions/panoptic_predictions.json` what each is, with the data set's own category ids: what panopticapi
    and COCO's server take. `OUT/predictions/semantic/ID.png` is a map of classes; of Cityscapes, in its label ids: what
    cityscapesscripts and its server take. Both are upright, as the items are: where annotations were made on the
    stored pixels of an image that EXIF turns, turn them before you compare.

    Args:
        out: the folder that gets `predictions`, which appears whole, at the end.
        description: of the data.
        label_ids: what a class is called in semantic maps, in the classes' order; None for the class.
    """

    def __init__(self, out: Path, description: Description, label_ids: tuple[int, ...] | None = None) -> None:
        self.folder = out / FOLDER
        self.partial = out / f".{FOLDER}.partial"
        self.description = description
        numbers = label_ids or tuple(range(len(description.labels)))
        self._numbers = np.array(numbers, dtype=np.uint8 if max(numbers) < 256 else np.uint16)
        self._category_ids = description.category_ids or tuple(range(len(description.labels)))
        self.annotations: list[dict[str, Any]] = []

    def begin(self) -> None:
        """Makes the folder. OSError: it cannot be."""
        for name in (PANOPTIC, SEMANTIC):
            (self.partial / name).mkdir(parents=True, exist_ok=True)

    def add(self, subtask: str, item: Item, prediction: Any) -> None:
        """Writes one prediction; for `Evaluator.watch`."""
        name = f"{_file_stem(item['image_id'])}.png"
        if subtask == SEMANTIC:
            Image.fromarray(self._numbers[prediction.cpu().numpy()]).save(self.partial / SEMANTIC / name)
        elif subtask == PANOPTIC:
            ids = prediction["segmentation"].cpu().numpy().clip(0).astype(np.uint32)  # -1 where nothing was found
            colors = np.stack([ids >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8)
            Image.fromarray(colors).save(self.partial / PANOPTIC / name)
            self.annotations.append(
                {
                    "image_id": item["image_id"],
                    "file_name": name,
                    "segments_info": [self._segment(info) for info in prediction["segments_info"]],
                }
            )

    def _segment(self, info: Mapping[str, Any]) -> dict[str, Any]:
        category = self._category_ids[info["label_id"]]
        return {"id": info["id"], "category_id": category, "score": info["score"]}

    def finish(self, annotations: list[dict[str, Any]]) -> Path:
        """Puts everything in its place, once, after the last prediction of all processes; the folder.

        Args:
            annotations: those of all processes.
        """
        if annotations:
            things = self.description.things
            categories = [
                {"id": category, "name": name, "isthing": int(label in things)}
                for label, (category, name) in enumerate(zip(self._category_ids, self.description.labels, strict=True))
            ]
            document = {"annotations": annotations, "categories": categories}
            path = self.partial / f"{PANOPTIC}{SUFFIX}.json"
            path.write_text(json.dumps(document), encoding="utf-8")
        for name in (PANOPTIC, SEMANTIC):
            if not any((self.partial / name).iterdir()):
                (self.partial / name).rmdir()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.partial.rename(self.folder)
        return self.folder

    def forget(self) -> None:
        """Takes away what was begun."""
        shutil.rmtree(self.partial, ignore_errors=True)


def cityscapes_label_ids() -> tuple[int, ...]:
    """Cityscapes' own ids of its evaluated classes, in the order of the train ids."""
    return tuple(CITYSCAPES_CLASSES)


def _file_stem(image_id: Any) -> str:
    """COCO's way to name a file after an id; whatever else an id is, it leads nowhere but here.

    An id that is no file name gets a part of its digest, so that no two of them have one name.
    """
    if isinstance(image_id, int) and image_id >= 0:
        return f"{image_id:012d}"
    own = str(image_id)
    name = re.sub(r"[^\w.-]", "_", unicodedata.normalize("NFC", own)).lstrip(".")
    if own and name == own and len(os.fsencode(name)) <= LONGEST_NAME:
        return name
    while len(os.fsencode(name)) > LONGEST_NAME:
        name = name[:-1]
    return f"{name or 'image'}-{hashlib.sha256(own.encode('utf-8', 'surrogateescape')).hexdigest()[:12]}"


__all__ = ["PredictionFiles", "cityscapes_label_ids"]

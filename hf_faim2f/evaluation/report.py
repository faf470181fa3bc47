"""What an evaluation leaves behind: `evaluation.json` with everything, and the classes as a Markdown table."""

import hashlib
import json
import math
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
from ..family.presets import CITYSCAPES_CLASSES

Results = Mapping[str, Mapping[str, Any]]

RESULTS_FILE = "evaluation.json"
TABLE_FILE = "per_class.md"


def without_nan(value: Any) -> Any:
    """JSON has no NaN: what a metric leaves undefined is null."""
    if isinstance(value, Mapping):
        return {key: without_nan(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def scalars(results: Results) -> dict[str, dict[str, float]]:
    """The numbers over all classes that are defined, per subtask, by the metric's name."""
    return {
        subtask: {
            name: float(value)
            for name, value in result.items()
            if isinstance(value, (int, float)) and not math.isnan(value)
        }
        for subtask, result in results.items()
    }


def undefined_classes(results: Results) -> list[str]:
    """The classes of which every metric is undefined: they are not in the truth."""
    defined: dict[str, bool] = {}
    for result in results.values():
        for name, values in result["per_class"].items():
            defined[name] = defined.get(name, False) or not all(math.isnan(value) for value in values.values())
    return [name for name, is_defined in defined.items() if not is_defined]


def metric_lines(numbers: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The numbers of `scalars` for a person, a line for each subtask, in per cent as they are."""
    return [
        f"{subtask} (%): " + ", ".join(f"{name} {value:.2f}" for name, value in values.items())
        for subtask, values in numbers.items()
    ]


def results_json(results: Results, about: Mapping[str, Any]) -> str:
    """All results, with what was evaluated on what in front."""
    return json.dumps({**about, "results": without_nan(results)}, indent=1) + "\n"


def per_class_table(results: Results, heading: str) -> str:
    """A row a class, a column a metric of each subtask, and the means below; a dash where a metric is undefined."""
    per_class: dict[str, dict[str, float]] = {}
    columns: list[tuple[str, str]] = []
    for subtask, result in results.items():
        for name, values in result["per_class"].items():
            for metric, value in values.items():
                if (subtask, metric) not in columns:
                    columns.append((subtask, metric))
                per_class.setdefault(name, {})[f"{subtask} {metric}"] = value
    titles = [f"{subtask} {metric}" for subtask, metric in columns]
    lines = [f"# {heading}", "", "In per cent.", ""]
    lines += [_row(["class", *titles]), _row(["---", *("---:" for _ in titles)])]
    for name, values in per_class.items():
        lines.append(_row([name, *(_number(values.get(title)) for title in titles)]))
    for subtask, result in results.items():
        if "per_category" in result:
            measures = list(next(iter(result["per_category"].values())))
            lines += ["", _row(["category", *(f"{subtask} {measure}" for measure in measures)])]
            lines += [_row(["---", *("---:" for _ in measures)])]
            for name, numbers in result["per_category"].items():
                lines.append(_row([name, *(_number(numbers[measure]) for measure in measures)]))
    lines += ["", _row(["over all classes", ""]), _row(["---", "---:"])]
    for subtask, numbers in scalars(results).items():
        lines += [_row([f"{subtask} {name}", _number(value)]) for name, value in numbers.items()]
    return "\n".join(lines) + "\n"


def cityscapes_lines(result: Mapping[str, Any]) -> list[str]:
    """What cityscapesscripts measured as the tables that it prints, in per cent: classes, and categories.

    It prints as nIoU what the paper calls iIoU: the IoU in which every instance weighs the same.
    """
    lines = []
    for plural, kind in (("classes", "class"), ("categories", "category")):
        lines += [f"{plural:<16}{'IoU':>8}{'nIoU':>8}"]
        rows = {**result[f"per_{kind}"]}
        rows["average"] = {"IoU": result[f"IoU_{kind}"], "iIoU": result[f"iIoU_{kind}"]}
        lines += [f"{name:<16}{_number(row['IoU']):>8}{_number(row['iIoU']):>8}" for name, row in rows.items()]
    return lines


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.2f}"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


# What was predicted, as files that the data sets' own evaluations read: COCO's panoptic form, and maps of classes.

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

"""The output of an evaluation: results as JSON and Markdown, and predictions for the datasets' own tools."""

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
from ..files import sha256_of
from ..masks import encode_run_lengths
from ..model.focoos_post_processing_faim2f import InstanceEvaluation

Results = Mapping[str, Mapping[str, Any]]

RESULTS_FILE = "evaluation.json"
TABLE_FILE = "per_class.md"
# The folder of the predictions and its name until all are written, its subfolders, and the suffix of the JSON file
# beside a subfolder.
FOLDER, PARTIAL = "predictions", ".predictions.partial"
PANOPTIC, SEMANTIC, INSTANCE = "panoptic", "semantic", "instance"
SUFFIX = "_predictions"
# File systems limit names to 255 bytes, including the digest and the suffix.
LONGEST_NAME = 200


def without_nan(value: Any) -> Any:
    """Replaces NaN by None, because JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: without_nan(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def scalars(results: Results, undefined: bool = False) -> dict[str, dict[str, float]]:
    """The defined values over all classes, by subtask and metric; with `undefined` also those that are NaN."""
    return {
        subtask: {
            name: float(value)
            for name, value in result.items()
            if isinstance(value, (int, float)) and (undefined or not math.isnan(value))
        }
        for subtask, result in results.items()
    }


def undefined_classes(results: Results) -> list[str]:
    """The classes whose metrics are all undefined, because they do not occur in the ground truth."""
    defined: dict[str, bool] = {}
    for result in results.values():
        for name, values in result["per_class"].items():
            defined[name] = defined.get(name, False) or not all(math.isnan(value) for value in values.values())
    return [name for name, is_defined in defined.items() if not is_defined]


def metric_lines(numbers: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The values of `scalars` as text, one line per subtask, in percent."""
    return [
        f"{subtask} (%): " + ", ".join(f"{name} {value:.2f}" for name, value in values.items())
        for subtask, values in numbers.items()
    ]


def results_json(results: Results, about: Mapping[str, Any]) -> str:
    """All results as JSON, after the facts in `about`."""
    return json.dumps({**about, "results": without_nan(results)}, indent=1) + "\n"


def per_class_table(results: Results, heading: str) -> str:
    """A Markdown table with one row per class and one column per metric, and the means below. Undefined values are
    dashes."""
    per_class: dict[str, dict[str, float]] = {}
    columns: list[tuple[str, str]] = []
    for subtask, result in results.items():
        for name, values in result["per_class"].items():
            for metric, value in values.items():
                if (subtask, metric) not in columns:
                    columns.append((subtask, metric))
                per_class.setdefault(name, {})[f"{subtask} {metric}"] = value
    titles = [f"{subtask} {metric}" for subtask, metric in columns]
    lines = [f"# {heading}", "", "In percent.", ""]
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


def folded_table(results: Results, data: str, split: str) -> dict[str, str]:
    """The table of the classes for a model card, by its caption.

    Args:
        results: of an evaluation.
        data, split: the name of the data, and the part of it.
    """
    caption = " ".join(f"Each class on {data} ({split})".replace("<", "&lt;").split())
    return {caption: per_class_table(results, "").partition("In percent.")[2].strip().replace("<", "&lt;")}


def per_class_lines(results: Results) -> list[str]:
    """The values of each class in aligned columns, in percent; a dash for undefined ones."""
    titles = [
        f"{subtask} {name}" for subtask, result in results.items() for name in next(iter(result["per_class"].values()))
    ]
    cells: dict[str, dict[str, float]] = {}
    for subtask, result in results.items():
        for label, values in result["per_class"].items():
            cells.setdefault(label, {}).update({f"{subtask} {name}": value for name, value in values.items()})
    width = max(map(len, ["class", *cells]))
    lines = ["  ".join(["class".ljust(width), *titles])]
    for label, values in cells.items():
        row = (_number(values.get(title)).rjust(len(title)) for title in titles)
        lines.append("  ".join([label.ljust(width), *row]))
    return lines


def cityscapes_lines(result: Mapping[str, Any]) -> list[str]:
    """The results of cityscapesscripts for classes and categories, in the layout of its own tables, in percent.

    Its nIoU is the paper's iIoU, which weights all instances equally.
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


class PredictionFiles:
    """Writes the predictions of an `Evaluator`. Several processes can write at the same time.

    `OUT/predictions/panoptic/ID.png` has the segment ids, id = R + 256 G + 256**2 B, and
    `OUT/predictions/panoptic_predictions.json` describes each segment, with the dataset's own category ids, in the
    format of panopticapi and COCO submissions. `OUT/predictions/semantic/ID.png` is a class map, with label ids for
    Cityscapes, in the format of cityscapesscripts and Cityscapes submissions.
    `OUT/predictions/instance_predictions.json` has the objects from which AP is computed, in the format of pycocotools
    (`COCO.loadRes`) and COCO submissions. All are upright, like the items. If annotations were made on the stored
    pixels of images with an EXIF rotation, rotate them before comparing.

    Args:
        out: the folder in which `predictions` is created, atomically at the end.
        description: the dataset's description.
        label_ids: the id of each class in semantic maps; None for the class ids.
    """

    def __init__(self, out: Path, description: Description, label_ids: tuple[int, ...] | None = None) -> None:
        self.folder = out / FOLDER
        self.partial = out / PARTIAL
        self.description = description
        numbers = label_ids or tuple(range(len(description.labels)))
        self._numbers = np.array(numbers, dtype=np.uint8 if max(numbers) < 256 else np.uint16)
        self._category_ids = description.category_ids or tuple(range(len(description.labels)))
        self.annotations: list[dict[str, Any]] = []

    def begin(self) -> None:
        """Creates the folder.

        Raises:
            OSError: it cannot be created.
        """
        for name in (PANOPTIC, SEMANTIC, INSTANCE):
            (self.partial / name).mkdir(parents=True, exist_ok=True)

    def add(self, subtask: str, item: Item, prediction: Any) -> None:
        """Writes one prediction; for `Evaluator.watch`."""
        stem = _file_stem(item["image_id"])
        name = f"{stem}.png"
        if subtask == INSTANCE:
            path = self.partial / INSTANCE / f"{stem}.json"
            path.write_text(json.dumps(self._objects(item, prediction)), encoding="utf-8")
        elif subtask == SEMANTIC:
            Image.fromarray(self._numbers[prediction.cpu().numpy()]).save(self.partial / SEMANTIC / name)
        elif subtask == PANOPTIC:
            ids = prediction["segmentation"].cpu().numpy().clip(0).astype(np.uint32)  # -1 for no segment
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

    def _objects(self, item: Item, found: InstanceEvaluation) -> list[dict[str, Any]]:
        """The objects of an image, as COCO's results."""
        # The box of an empty mask is all zeros, so its mask becomes a single empty pixel.
        boxes = [[x, y, max(x, right - 1), max(y, below - 1)] for x, y, right, below in found.boxes.int().tolist()]
        masks = found.masks.cpu().numpy()
        crops = [mask[y : below + 1, x : right + 1] for mask, (x, y, right, below) in zip(masks, boxes, strict=True)]
        runs = encode_run_lengths(crops, boxes, (item["height"], item["width"]))
        return [
            {
                "image_id": item["image_id"],
                "category_id": self._category_ids[label],
                "segmentation": run,
                "score": score,
            }
            for label, run, score in zip(found.class_ids.tolist(), runs, found.scores.tolist(), strict=True)
        ]

    def finish(self, annotations: list[dict[str, Any]]) -> Path:
        """Moves the predictions to their final folder. Call it once, after the last prediction of all processes.

        Args:
            annotations: the annotations of all processes.

        Returns:
            The folder.
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
        parts = sorted((self.partial / INSTANCE).iterdir())
        if parts:
            objects = [entry for part in parts for entry in json.loads(part.read_text(encoding="utf-8"))]
            (self.partial / f"{INSTANCE}{SUFFIX}.json").write_text(json.dumps(objects), encoding="utf-8")
            for part in parts:
                part.unlink()
        for name in (PANOPTIC, SEMANTIC, INSTANCE):
            if not any((self.partial / name).iterdir()):
                (self.partial / name).rmdir()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.partial.rename(self.folder)
        return self.folder

    def forget(self) -> None:
        """Removes unfinished predictions."""
        shutil.rmtree(self.partial, ignore_errors=True)


def cityscapes_label_ids() -> tuple[int, ...]:
    """Cityscapes' label ids of the evaluated classes, in the order of the train ids."""
    return tuple(CITYSCAPES_CLASSES)


def _file_stem(image_id: Any) -> str:
    """A file name for an image id, without suffix: COCO's form for integers, else a safe form of the id.

    If the id is not a safe file name, part of its digest is appended, so that names are unique.
    """
    if isinstance(image_id, int) and image_id >= 0:
        return f"{image_id:012d}"
    own = str(image_id)
    name = re.sub(r"[^\w.-]", "_", unicodedata.normalize("NFC", own)).lstrip(".")
    if own and name == own and len(os.fsencode(name)) <= LONGEST_NAME:
        return name
    while len(os.fsencode(name)) > LONGEST_NAME:
        name = name[:-1]
    return f"{name or 'image'}-{sha256_of(own.encode('utf-8', 'surrogateescape'))[:12]}"


__all__ = [
    "RESULTS_FILE",
    "TABLE_FILE",
    "PredictionFiles",
    "Results",
    "cityscapes_label_ids",
    "cityscapes_lines",
    "folded_table",
    "metric_lines",
    "per_class_lines",
    "per_class_table",
    "results_json",
    "scalars",
    "undefined_classes",
    "without_nan",
]

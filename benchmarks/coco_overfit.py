"""Overfits 16 photographs of COCO, which tests the whole chain from JSON to PQ, AP and mIoU.

    python benchmarks/coco_overfit.py --data COCO [--tasks panoptic instance semantic] [--steps N] [--size PIXELS]
        [--precision bf16] [--out DIR]

A new fai-m2f-s with random weights is trained on 16 photographs until it has memorized them, and evaluated on the same
16. Wrong labels, shifted masks, lost crowds or stuff treated as things would keep the figures low. They say nothing
about the model's quality on other photographs.

COCO has `train2017` and `annotations/panoptic_train2017{.json,/}`, in COCO's own layout. The first 16 photographs
without segments below 0.5 % of the image are used, those with a crowd first. They are copied to a temporary folder,
with annotations of three kinds made from the panoptic ones: COCO's panoptic format, COCO's instances as run lengths,
and a folder of masks. The package's Trainer trains one model on each kind of annotations. Then
`faim2f evaluate --predictions` reads the same annotations, and other programs evaluate the files that it wrote:
pycocotools, panopticapi if it is installed, and a plain count of pixels. Their figures must agree.
"""

import argparse
import contextlib
import io
import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measurement import record
from PIL import Image
from transformers.utils import logging

from hf_faim2f.cli import main as faim2f
from hf_faim2f.data.formats import DataSource, OpenData, open_data
from hf_faim2f.evaluation.evaluator import Evaluator
from hf_faim2f.masks import encode_run_lengths
from hf_faim2f.training.recipe import Recipe
from hf_faim2f.training.run import train
from hf_faim2f.training.start import start_model

MODEL, PHOTOGRAPHS, LEAST_SHARE, VOID = "fai-m2f-s-ade", 16, 0.005, 255
SPLIT = "train2017"
# Sampled points of the mask losses: the model's default takes half of the time and improves nothing at this size.
POINTS = 2048
# Format, split and measured subtasks of the data of each task.
TASKS = {
    "panoptic": ("coco-panoptic", SPLIT, ("semantic", "instance", "panoptic")),
    "instance": ("coco-instance", SPLIT, ("instance",)),
    "semantic": ("folder", "train", ("semantic",)),
}
# Maximum difference between figures in percent, due to rounding.
TOLERANCE = 1e-3


def chosen(root: Path) -> list[str]:
    """The file names, without suffix, of the photographs to learn."""
    found: list[tuple[bool, str]] = []
    items = open_data("coco-panoptic", DataSource(str(root)), "train").items
    for index in range(len(items)):
        item = items[index]
        segments, count = item["segments"], len(item["classes"])
        pixels = segments[segments >= 0].long().bincount(minlength=count)
        if count and int(pixels.min()) >= LEAST_SHARE * segments.numel():
            found.append((not bool(item["crowd"].any()), Path(item["file_name"]).stem))
    return [name for _, name in sorted(found, key=lambda entry: entry[0])[:PHOTOGRAPHS]]


def write_tree(root: Path, names: list[str], out: Path) -> None:
    """Copies the photographs, and writes their annotations in the three formats."""
    source = json.loads((root / "annotations" / f"panoptic_{SPLIT}.json").read_text())
    categories = source["categories"]
    annotations = [entry for entry in source["annotations"] if Path(entry["file_name"]).stem in names]
    ids = {entry["image_id"] for entry in annotations}
    images = [entry for entry in source["images"] if entry["id"] in ids]
    things = {entry["id"] for entry in categories if entry["isthing"]}
    label_of = {entry["id"]: label for label, entry in enumerate(categories)}
    maps = Path("annotations", f"panoptic_{SPLIT}")
    for folder in (SPLIT, maps, "train/images", "train/masks"):
        (out / folder).mkdir(parents=True)
    instances: list[dict[str, Any]] = []
    for entry in annotations:
        name = Path(entry["file_name"]).stem
        for folder in (SPLIT, "train/images"):
            shutil.copy(root / SPLIT / f"{name}.jpg", out / folder)
        shutil.copy(root / maps / entry["file_name"], out / maps)
        map_of_ids = Image.open(out / maps / entry["file_name"], formats=["PNG"])
        numbers = np.asarray(map_of_ids.convert("RGB")).astype(np.int64) @ [1, 256, 256**2]
        classes = np.full(numbers.shape, VOID, dtype=np.uint8)
        for segment in entry["segments_info"]:
            mask = numbers == segment["id"]
            if not segment["iscrowd"]:
                classes[mask] = label_of[segment["category_id"]]
            if segment["category_id"] in things:
                instances.append(_instance(segment, mask, entry["image_id"], len(instances) + 1))
        Image.fromarray(classes).save(out / "train" / "masks" / f"{name}.png")
    (out / "labels.txt").write_text("".join(f"{entry['name']}\n" for entry in categories))
    panoptic = {"images": images, "annotations": annotations, "categories": categories}
    (out / f"{maps}.json").write_text(json.dumps(panoptic))
    own = [entry for entry in categories if entry["id"] in things]
    document = {"images": images, "annotations": instances, "categories": own}
    (out / "annotations" / f"instances_{SPLIT}.json").write_text(json.dumps(document))


def _instance(segment: Mapping[str, Any], mask: np.ndarray, image_id: int, number: int) -> dict[str, Any]:
    rows, columns = (np.flatnonzero(mask.any(axis)).tolist() for axis in (1, 0))
    box = (columns[0], rows[0], columns[-1], rows[-1])
    height, width = mask.shape
    run_lengths = encode_run_lengths([mask[box[1] : box[3] + 1, box[0] : box[2] + 1]], [box], (height, width))[0]
    return {
        "id": number,
        "image_id": image_id,
        "category_id": segment["category_id"],
        "segmentation": run_lengths,
        "bbox": [box[0], box[1], box[2] - box[0] + 1, box[3] - box[1] + 1],
        "area": int(mask.sum()),
        "iscrowd": segment["iscrowd"],
    }


def recipe_of(steps: int) -> Recipe:
    """The recipe `digits` with fewer steps, smaller batches, twice its learning rate and a shorter average."""
    return Recipe(
        "overfit", steps, batch_size=4, learning_rate=1.2e-3, backbone_multiplier=1.0, schedule="cosine",
        warmup_steps=steps // 40, clip=5.0, ema_decay=0.98, backbone_steps=150,
    )  # fmt: skip


def learn(task: str, data: OpenData, out: Path, options: argparse.Namespace) -> float:
    """Trains a new model; returns the seconds that it took."""
    torch.manual_seed(0)
    description = data.description
    start = start_model(MODEL, description, image_size=options.size, from_scratch=True)
    start.model.config.train_num_points = POINTS
    things = sorted(description.things) or None
    evaluator = Evaluator(start.processor, description.id2label, TASKS[task][2], things, batch_size=4)
    items = [data.items[index] for index in range(len(data.items))]
    begin = time.perf_counter()
    train(
        start.model, start.processor, items, items, recipe_of(options.steps), out,
        evaluator=evaluator, save_every=options.steps, log_every=max(1, options.steps // 10),
        precision=options.precision,
    )  # fmt: skip
    return time.perf_counter() - begin


def judged(task: str, tree: Path, predictions: Path) -> dict[str, float]:
    """The metrics that other programs compute from the files of `faim2f evaluate --predictions`, in percent."""
    figures: dict[str, float] = {}
    annotations = tree / "annotations"
    with contextlib.redirect_stdout(io.StringIO()):
        if task != "semantic":
            from pycocotools.coco import COCO
            from pycocotools.cocoeval import COCOeval

            truth = COCO(str(annotations / f"instances_{SPLIT}.json"))
            found = truth.loadRes(str(predictions / "instance_predictions.json"))
            evaluation = COCOeval(truth, found, "segm")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            figures |= {f"instance {name}": 100 * evaluation.stats[i] for i, name in enumerate(("AP", "AP50", "AP75"))}
        if task == "panoptic":
            try:
                from panopticapi.evaluation import pq_compute
            except ImportError:
                pass
            else:
                results = pq_compute(
                    str(annotations / f"panoptic_{SPLIT}.json"),
                    str(predictions / "panoptic_predictions.json"),
                    str(annotations / f"panoptic_{SPLIT}"),
                    str(predictions / "panoptic"),
                )
                keys = {"PQ": "All", "PQ_th": "Things", "PQ_st": "Stuff"}
                figures |= {f"panoptic {name}": 100 * results[key]["pq"] for name, key in keys.items()}
    if task != "instance":
        figures["semantic mIoU"] = plain_miou(tree / "train" / "masks", predictions / "semantic")
    return figures


def plain_miou(masks: Path, maps: Path) -> float:
    """mIoU over all pixels, in percent."""
    both = np.zeros((VOID + 1, VOID + 1), dtype=np.int64)  # number of pixels by true and predicted class
    for path in sorted(masks.iterdir()):
        # In a folder of masks, ids are the photographs' names; in COCO, they are numbers with the same digits.
        true_map, found_map = (
            np.asarray(Image.open(png, formats=["PNG"])).astype(np.int64) for png in (path, maps / path.name)
        )
        pairs = true_map * (VOID + 1) + found_map
        both += np.bincount(pairs.ravel(), minlength=both.size).reshape(both.shape)
    both = both[:VOID]
    true, found, hits = both.sum(1), both.sum(0)[:VOID], both.diagonal()
    unions = true + found - hits
    return float(100 * np.mean(hits[true > 0] / unions[true > 0]))


def measure(task: str, model: Path, tree: Path, out: Path) -> tuple[dict[str, float], dict[str, float]]:
    """The metrics of `faim2f evaluate`, and those of other programs for its predictions."""
    format_name, split, _ = TASKS[task]
    words = ["evaluate", str(model), "--data", str(tree), "--format", format_name, "--split", split]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        status = faim2f([*words, "--out", str(out), "--predictions", "--no-card", "--batch-size", "4"])
    if status:
        raise SystemExit(errors.getvalue())
    results = json.loads((out / "evaluation.json").read_text())["results"]
    names = {"semantic": ("mIoU",), "instance": ("AP", "AP50", "AP75"), "panoptic": ("PQ", "PQ_th", "PQ_st")}
    own = {f"{subtask} {name}": results[subtask][name] for subtask in results for name in names[subtask]}
    return own, judged(task, tree, out / "predictions")


def main() -> None:
    """Trains, measures and compares; see the top of this file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--size", type=int, default=128, help="shorter side of the model's input in pixels")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="keeps the runs; the same command continues them")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        tree, out = Path(temporary, "tree"), options.out or Path(temporary, "out")
        write_tree(options.data, chosen(options.data), tree)
        for task in options.tasks:
            format_name, split, _ = TASKS[task]
            source = DataSource(str(tree), splits=(split, split))
            seconds = learn(task, open_data(format_name, source, "train"), out / task, options)
            own, others = measure(task, out / task / "final", tree, out / f"{task}-evaluation")
            figures[task] = {"minutes": round(seconds / 60, 1), **{name: round(own[name], 2) for name in own}}
            print(f"\n{task}: {options.steps} steps in {seconds / 60:.1f} minutes")
            for name, value in own.items():
                other = others.get(name)
                verdict = "not compared" if other is None else f"{other:.2f} by others"
                print(f"  {name:16} {value:6.2f}   {verdict}", flush=True)
                if other is not None and abs(other - value) > TOLERANCE:
                    raise SystemExit(f"{name} differs: {value} and {other}.")
    about = {"data": "COCO, 16 photographs", "steps": options.steps, "size": options.size}
    record("coco_overfit", {**about, "precision": options.precision, "figures": figures}, threads=options.threads)


if __name__ == "__main__":
    main()

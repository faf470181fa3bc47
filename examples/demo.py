"""`make demo`: runs the shipped digits model on held-out scenes, and converts a checkpoint in Focoos's layout.

1. `examples/digits/` is completed with the model's code to the Hub folder `demo-output/digits/`, which transformers'
   pipeline loads. The digits that it finds in six held-out scenes are printed beside the ground truth.
2. A checkpoint in Focoos's layout is converted to a Hub folder and run on a photograph. Its weights are random, so this
   demonstrates the steps, not the quality of a published model.

Writes images and JSON to `demo-output/`.
"""

import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hf_faim2f.conversion.focoos import focoos_state_dict
from PIL import Image
from sklearn.datasets import load_sample_image
from transformers import pipeline
from transformers.utils import logging

from hf_faim2f import FaiM2FForUniversalSegmentation, load_config
from hf_faim2f.data.digits import BACKGROUND, DigitScenes
from hf_faim2f.data.item import Item
from hf_faim2f.evaluation.evaluator import panoptic_reference
from hf_faim2f.evaluation.panoptic import PanopticMetric
from hf_faim2f.family.digits import LABELS, THING_IDS
from hf_faim2f.model.remote_code_faim2f import copy_remote_code
from hf_faim2f.runtime.drawing import Segments, below, beside, draw_segments, scaled, segments_of_item

DIGITS = Path(__file__).parent / "digits"
NAME = "fai-mf-m-ade"
OUT = Path("demo-output")
STUFF_IDS = frozenset(range(len(LABELS))).difference(THING_IDS)
SCENES, SEED = 6, 2026  # a seed that neither training nor evaluation used
PICTURED = (0, 2, 4)  # the scenes in the README's image
SUBTASKS = ("semantic", "instance", "panoptic")
UNTRAINED = (
    "   These weights are UNTRAINED (random, from a fixed seed), so the segments are meaningless.\n"
    "   Their scores are near 1/151, so thresholds are 0 here; otherwise leave thresholds at their defaults."
)


def segments_of_pipeline(
    found: list[dict[str, Any]], label2id: dict[str, int], size: tuple[int, int], stuff_ids: Collection[int] = ()
) -> Segments:
    """Converts the output of transformers' pipeline to segments for drawing."""
    masks = [torch.from_numpy(np.asarray(segment["mask"]) > 0) for segment in found]
    return Segments(
        torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.bool),
        torch.tensor([label2id[segment["label"]] for segment in found], dtype=torch.int64),
        torch.tensor([segment["score"] or 0.0 for segment in found]),
        stuff_ids,
    )


def digits_in(labels: list[str]) -> str:
    return " ".join(sorted(labels)) or "none"


def panoptic_of(segments: Segments, item: Item) -> dict[str, Any]:
    """Converts segments to a prediction for `PanopticMetric`."""
    ids = torch.zeros(item["height"], item["width"], dtype=torch.int32)
    for number, mask in enumerate(segments.masks, 1):
        ids[mask] = number
    info = [{"id": number, "label_id": int(label)} for number, label in enumerate(segments.class_ids, 1)]
    return {"segmentation": ids, "segments_info": info}


def show_digits() -> None:
    """Runs the shipped model on held-out scenes."""
    folder = OUT / "digits"
    shutil.copytree(DIGITS, folder)
    copy_remote_code(folder)
    start = time.perf_counter()
    segment = pipeline("image-segmentation", model=str(folder), trust_remote_code=True)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    print(f"1. {folder}: a model of {size:.1f} MB, loaded by pipeline in {time.perf_counter() - start:.1f} s")
    id2label = dict(enumerate(LABELS))
    label2id = {label: index for index, label in id2label.items()}
    scenes = DigitScenes("test", SCENES, seed=SEED)
    metric = PanopticMetric(id2label, THING_IDS)
    rows, pairs, right, there, told, seconds = [], [], 0, 0, 0, 0.0
    for index in range(len(scenes)):
        item = scenes[index]
        image = Image.fromarray(item["image"].permute(1, 2, 0).numpy())
        start = time.perf_counter()
        # The pipeline's default threshold, 0.9, would drop digits with lower scores.
        found = segment(image, subtask="panoptic", threshold=0.5)
        seconds += time.perf_counter() - start
        segments = segments_of_pipeline(found, label2id, (item["height"], item["width"]), STUFF_IDS)
        truth = [LABELS[label] for label in item["classes"].tolist() if label != BACKGROUND]
        said = [entry["label"] for entry in found if entry["label"] != LABELS[BACKGROUND]]
        common = (Counter(truth) & Counter(said)).total()
        right, there, told = right + common, there + len(truth), told + len(said)
        verdict = "all right" if common == len(truth) == len(said) else f"{common} right"
        print(f"   scene {index + 1}: truth {digits_in(truth):16} found {digits_in(said):16} {verdict}")
        metric.add_batch(predictions=[panoptic_of(segments, item)], references=[panoptic_reference(item)])
        panels = [scaled(image, segments, 256)[0]]
        for drawn in (replace(segments_of_item(item), stuff_ids=STUFF_IDS), segments):
            panels.append(draw_segments(*scaled(image, drawn, 256), id2label))
        rows.append(beside(panels, ("image", "truth", "found")))
        if index in PICTURED:
            digits = [number for number, entry in enumerate(found) if entry["label"] != LABELS[BACKGROUND]]
            scores = torch.tensor([found[number]["score"] for number in digits])
            alone = Segments(segments.masks[digits], segments.class_ids[digits], scores)
            pairs.append((panels[0], draw_segments(*scaled(image, alone, 256), id2label)))
    below(rows).save(OUT / "digits.png")
    before, after = zip(*pairs, strict=True)
    below([beside(before, ("before", "", "")), beside(after, ("after", "", ""))]).save(OUT / "before_after.png")
    print(
        f"   {right} of {there} digits found and named right, {told - right} more that are not there or misnamed; "
        f"PQ {metric.compute()['PQ']:.1f}; {1000 * seconds / SCENES:.0f} ms a scene -> {OUT / 'digits.png'}"
    )


def show_conversion() -> None:
    """Converts a checkpoint in Focoos's layout to a Hub folder, and runs it with the pipeline."""
    torch.manual_seed(0)
    state = focoos_state_dict(FaiM2FForUniversalSegmentation(load_config(NAME)))
    torch.save({"model": state}, OUT / "model_final.pth")
    start = time.perf_counter()
    command = ["focoos", OUT / "model_final.pth", OUT / NAME, "--info", NAME]
    subprocess.run([sys.executable, "-m", "conversion", *map(str, command)], check=True)
    print(f"2. {OUT / 'model_final.pth'}, {len(state)} tensors in Focoos's layout, converted to {OUT / NAME} in "
          f"{time.perf_counter() - start:.1f} s")  # fmt: skip
    print(UNTRAINED)
    image = Image.fromarray(load_sample_image("china.jpg"))
    segment = pipeline("image-segmentation", model=str(OUT / NAME), trust_remote_code=True)
    segment(image, subtask="semantic")  # the first call warms up
    for subtask in SUBTASKS:
        start = time.perf_counter()
        found = segment(image, subtask=subtask, threshold=0.0, mask_threshold=0.0, overlap_mask_area_threshold=0.0)
        seconds = time.perf_counter() - start
        config = segment.model.config
        stuff_ids = config.id2label if subtask == "semantic" else ()
        segments = segments_of_pipeline(found, config.label2id, (image.height, image.width), stuff_ids)
        draw_segments(image, segments, config.id2label).save(OUT / f"{subtask}.png")
        print(f"   {subtask:9} {len(found):3} segments in {seconds:.2f} s -> {OUT / f'{subtask}.png'}")
    processor, model = segment.image_processor, segment.model
    with torch.no_grad():
        outputs = model(**processor(image, return_tensors="pt"))
    detections = processor.post_process_detections(
        outputs, target_sizes=[(image.height, image.width)], threshold=0.0, id2label=model.config.id2label
    )[0]
    listed = [
        {
            "box": list(detection.box),
            "score": round(detection.score, 4),
            "class_id": detection.class_id,
            "label": detection.label,
            "mask_pixels": int(detection.mask.sum()),
        }
        for detection in detections
    ]
    (OUT / "detections.json").write_text(json.dumps(listed, indent=1) + "\n")
    print(f"   detections {len(listed):2} -> {OUT / 'detections.json'}")


def main() -> None:
    """Runs the demo in the working directory; every step prints its result and duration."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    show_digits()
    show_conversion()
    print(f"See the images in {OUT.resolve().name}/.")


if __name__ == "__main__":
    main()

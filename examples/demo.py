"""`make demo`: a checkpoint in Focoos's layout, converted, and run by transformers' pipeline on a photograph.

The pictures and the JSON of detections go to `demo-output/`. No weights can be downloaded here and none ship yet, so
the checkpoint is an untrained one: the demo shows that every step works from end to end, not what the model knows.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hf_faim2f.conversion.focoos import focoos_state_dict
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_image
from transformers import pipeline
from transformers.utils import logging

from hf_faim2f import FaiM2FForUniversalSegmentation, load_config

NAME = "fai-mf-m-ade"
OUT = Path("demo-output")
SUBTASKS = ("semantic", "instance", "panoptic")
UNTRAINED = (
    "These weights are UNTRAINED (random, from a fixed seed): the segments below are where random numbers put them.\n"
    "Scores of untrained weights are near 1/151, so thresholds are 0 here; leave them at their defaults for real ones."
)


def color_of(label: str) -> tuple[int, int, int]:
    """A stable, saturated color for a class name."""
    hue = sum(ord(letter) * (index + 7) for index, letter in enumerate(label)) % 360
    red, green, blue = Image.new("HSV", (1, 1), (hue * 255 // 360, 200, 230)).convert("RGB").getpixel((0, 0))  # type: ignore[misc]
    return red, green, blue


def overlay(image: Image.Image, segments: list[dict[str, Any]]) -> Image.Image:
    """The image with each segment's mask in its class's color and its name at the middle of the mask."""
    canvas = np.asarray(image, np.float32).copy()
    names = []
    for segment in segments:
        mask = np.asarray(segment["mask"]) > 0
        if mask.any():
            canvas[mask] = 0.45 * canvas[mask] + 0.55 * np.array(color_of(segment["label"]), np.float32)
            rows, columns = np.nonzero(mask)
            names.append((int(np.median(columns)), int(np.median(rows)), segment["label"]))
    picture = Image.fromarray(canvas.astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for x, y, label in names:
        draw.text((x, y), label, fill="white", stroke_width=2, stroke_fill="black", anchor="mm")
    return picture


def main() -> None:
    """Runs the demo from the working directory; every step says what it did and how long it took."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    torch.manual_seed(0)

    state = focoos_state_dict(FaiM2FForUniversalSegmentation(load_config(NAME)))
    torch.save({"model": state}, OUT / "model_final.pth")
    print(f"1. wrote {OUT / 'model_final.pth'}: {len(state)} tensors in Focoos's layout ({NAME})")

    start = time.perf_counter()
    command = ["focoos", OUT / "model_final.pth", OUT / NAME, "--info", NAME]
    subprocess.run([sys.executable, "-m", "conversion", *map(str, command)], check=True)
    print(f"2. converted it in {time.perf_counter() - start:.1f} s: {OUT / NAME} is a complete Hub repository")

    image = Image.fromarray(load_sample_image("china.jpg"))
    image.save(OUT / "photo.png")
    start = time.perf_counter()
    segment = pipeline("image-segmentation", model=str(OUT / NAME), trust_remote_code=True)
    print(f"3. pipeline loaded in {time.perf_counter() - start:.1f} s; the photograph is {image.width}x{image.height}")
    print(UNTRAINED)
    segment(image, subtask="semantic")  # the first call warms up
    for subtask in SUBTASKS:
        start = time.perf_counter()
        segments = segment(image, subtask=subtask, threshold=0.0, mask_threshold=0.0, overlap_mask_area_threshold=0.0)
        seconds = time.perf_counter() - start
        overlay(image, segments).save(OUT / f"{subtask}.png")
        print(f"   {subtask:9} {len(segments):3} segments in {seconds:.2f} s -> {OUT / f'{subtask}.png'}")

    processor, model = segment.image_processor, segment.model
    with torch.no_grad():
        outputs = model(**processor(image, return_tensors="pt"))
    start = time.perf_counter()
    detections = processor.post_process_detections(
        outputs, target_sizes=[(image.height, image.width)], threshold=0.0, id2label=model.config.id2label
    )[0]
    seconds = time.perf_counter() - start
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
    print(f"   detections {len(listed):2} in {seconds:.2f} s -> {OUT / 'detections.json'}")
    print(f"Look at the pictures in {OUT.resolve().name}/.")


if __name__ == "__main__":
    main()

"""A tree of a few generated street scenes in Cityscapes' layout, and the official program's scores of predictions."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# Label id: its color in the photograph and in the color map.
COLORS = {7: (128, 64, 128), 8: (244, 35, 232), 11: (70, 70, 70), 21: (107, 142, 35), 23: (70, 130, 180),
          24: (220, 20, 60), 26: (0, 0, 142), 33: (119, 11, 32), 1: (0, 0, 0), 4: (20, 20, 20)}  # fmt: skip
NAMES = {7: "road", 8: "sidewalk", 11: "building", 21: "vegetation", 23: "sky", 24: "person", 26: "car",
         33: "bicycle", 1: "ego vehicle", 4: "static"}  # fmt: skip
# The official program, with the function restored that NumPy 2.4 removed.
OFFICIAL_PROGRAM = """
import numpy, runpy, sys
if not hasattr(numpy, "in1d"):
    numpy.in1d = lambda values, among, invert=False: numpy.isin(values, among, invert=invert).ravel()
sys.argv = sys.argv[:1]
runpy.run_module("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling", run_name="__main__")
"""


def street(seed: int, height: int, width: int) -> np.ndarray:
    """Instance ids (height, width): sky, houses, a road with cars and people, the hood, and a group of bicycles."""
    random = np.random.default_rng(seed)
    ids = np.full((height, width), 23)
    horizon = int(height * random.uniform(0.35, 0.5))
    ids[horizon // 3 : horizon, : int(width * random.uniform(0.3, 0.6))] = 11
    ids[horizon // 2 : horizon, int(width * random.uniform(0.7, 0.8)) :] = 21
    ids[horizon:] = 7
    ids[horizon:, : width // 8] = 8
    for number in range(int(random.integers(2, 5))):
        kind = int(random.choice([24, 26]))
        tall, wide = (height // 3, width // 16) if kind == 24 else (height // 5, width // 6)
        top, left = int(random.integers(horizon - 4, height - tall - 4)), int(random.integers(0, width - wide))
        ids[top : top + tall, left : left + wide] = kind * 1000 + number
    ids[horizon : horizon + height // 10, -width // 10 :] = 33  # a group, not a single instance
    ids[-height // 16 :] = 1
    ids[0, :] = 4
    return ids


def write_cityscapes(root: Path, counts: dict[str, int], height: int = 96, width: int = 192) -> Path:
    """Writes `counts` images of each split, divided between two cities."""
    towns = {"train": ("aachen", "zurich"), "val": ("frankfurt", "munster")}
    for split, count in counts.items():
        for number in range(count):
            town = towns[split][number % 2]
            seed = number + (100 if split == "val" else 0)
            stem = f"{town}_{number:06d}_000019"
            ids = street(seed, height, width)
            labels = np.where(ids < 1000, ids, ids // 1000)
            color = np.array([COLORS.get(label, (0, 0, 0)) for label in range(34)])[labels]
            noise = np.random.default_rng(seed).normal(0, 10, color.shape)
            photo = root / "leftImg8bit" / split / town / f"{stem}_leftImg8bit.png"
            truth = root / "gtFine" / split / town
            for folder in (photo.parent, truth):
                folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((color + noise).clip(0, 255).astype(np.uint8)).save(photo)
            Image.fromarray(color.astype(np.uint8)).save(truth / f"{stem}_gtFine_color.png")
            Image.fromarray(labels.astype(np.uint8)).save(truth / f"{stem}_gtFine_labelIds.png")
            Image.fromarray(ids.astype(np.uint16)).save(truth / f"{stem}_gtFine_instanceIds.png")
            objects = [
                {"label": NAMES[value if value < 1000 else value // 1000], "polygon": _box(ids == value)}
                for value in np.unique(ids).tolist()
            ]
            polygons = {"imgHeight": height, "imgWidth": width, "objects": objects}
            (truth / f"{stem}_gtFine_polygons.json").write_text(json.dumps(polygons))
    return root


def _box(mask: np.ndarray) -> list[list[int]]:
    rows, columns = np.nonzero(mask)
    top, bottom, left, right = (int(value) for value in (rows.min(), rows.max(), columns.min(), columns.max()))
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def official_scores(tree: Path, predictions: Path, export: Path) -> tuple[dict[str, Any], str]:
    """The results that cityscapesscripts' program writes for these predictions, and its standard output."""
    environment = {
        **os.environ,
        "CITYSCAPES_DATASET": str(tree),
        "CITYSCAPES_RESULTS": str(predictions),
        "CITYSCAPES_EXPORT_DIR": str(export),
    }
    export.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", OFFICIAL_PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((export / "resultPixelLevelSemanticLabeling.json").read_text()), done.stdout

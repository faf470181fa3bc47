"""All metrics, with random predictions and references for each."""

from collections.abc import Callable
from typing import Any

import numpy as np

from hf_faim2f.evaluation import CityscapesMetric, InstanceMetric, PanopticMetric, SemanticMetric, StreamingMetric

NAMES = {0: "a", 1: "b", 2: "c"}
METRICS: dict[str, Callable[[], StreamingMetric]] = {
    "semantic": lambda: SemanticMetric(NAMES),
    "instance": lambda: InstanceMetric(NAMES),
    "panoptic": lambda: PanopticMetric(NAMES, [0, 1]),
    "cityscapes": CityscapesMetric,
}
Pair = tuple[Any, Any]


def pair(kind: str, seed: int, scale: int = 4) -> Pair:
    """A prediction and a reference for a metric."""
    rng = np.random.default_rng(seed)

    def enlarge(blocks: np.ndarray) -> np.ndarray:
        return np.kron(blocks, np.ones((scale, scale), dtype=np.int64))

    blocks = rng.integers(0, 3, (5, 5))
    guess = np.where(rng.random((5, 5)) < 0.7, blocks, rng.integers(0, 3, (5, 5)))
    if kind == "semantic":
        return enlarge(guess), enlarge(blocks)
    if kind == "cityscapes":
        ids = np.array([7, 24, 26])[blocks]
        instances = np.where(ids > 7, ids * 1000 + rng.integers(1, 4, ids.shape), ids)
        return enlarge(np.array([0, 11, 13])[guess]), enlarge(instances)
    if kind == "panoptic":
        info = [{"id": 1 + i, "label_id": i} for i in range(3)]
        present = [{**entry, "label_id": int(rng.integers(3))} for entry in info if entry["id"] - 1 in guess]
        return (
            {"segmentation": enlarge(guess + 1), "segments_info": present},
            {"segmentation": enlarge(blocks + 1), "segments_info": info},
        )
    masks = np.stack([enlarge(guess == i) for i in range(3)]).astype(bool)
    true = np.stack([enlarge(blocks == i) for i in range(3)]).astype(bool)
    scores = rng.integers(1, 4, 3) / 4  # many ties
    return {"masks": masks, "scores": scores, "labels": [0, 1, 2]}, {"masks": true, "labels": [0, 1, 2]}


def images(kind: str, count: int, seed: int = 0) -> list[Pair]:
    return [pair(kind, 1000 * seed + i) for i in range(count)]


def add(metric: StreamingMetric, pairs: list[tuple[int, Pair]]) -> StreamingMetric:
    if pairs:
        metric.add_batch(
            predictions=[prediction for _, (prediction, _) in pairs],
            references=[reference for _, (_, reference) in pairs],
            image_ids=[i for i, _ in pairs],
        )
    return metric

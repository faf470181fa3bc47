"""What bfloat16 changes in the answers of a trained model: the digits of this repository.

    python benchmarks/precision.py [SCENES]

The test scenes of `faim2f evaluate --format digits` are predicted in float32 and with weights and activations in
bfloat16, as `Predictor` runs them: mIoU, AP and PQ of both, the share of pixels whose label changes, and what
`precision="auto"` chooses on the first scenes. It is the only trained model here: on photographs (CamVid, COCO, ADE20K)
nothing has been measured.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from measurement import record

from hf_faim2f import Predictor
from hf_faim2f.data.digits import DigitScenes
from hf_faim2f.data.item import Item
from hf_faim2f.evaluation.evaluator import Evaluator
from hf_faim2f.family.digits import LABELS, THING_IDS
from hf_faim2f.runtime.precision import PICTURES
from hf_faim2f.zoo import open_model

MODEL = Path(__file__).parents[1] / "examples" / "digits"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
METRICS = {"semantic": "mIoU", "instance": "AP", "panoptic": "PQ"}


def main() -> None:
    """Prints and records the metrics and the changes."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    print(__doc__)
    scenes = DigitScenes("test", count)
    maps: dict[str, dict[Any, torch.Tensor]] = {name: {} for name in DTYPES}
    metrics: dict[str, dict[str, float]] = {}
    for name, dtype in DTYPES.items():
        model, processor = open_model(MODEL)
        model.optimize_for_inference().to(dtype)

        def keep(subtask: str, item: Item, answer: Any, name: str = name) -> None:
            if subtask == "semantic":
                maps[name][item["image_id"]] = answer.to(torch.uint8)

        evaluator = Evaluator(processor, dict(enumerate(LABELS)), tuple(METRICS), THING_IDS, watch=keep)
        found = evaluator(model, scenes)  # type: ignore[arg-type]
        metrics[name] = {metric: float(found[subtask][metric]) for subtask, metric in METRICS.items()}
        print(f"{name:10}", *(f"{metric} {value:.2f}" for metric, value in metrics[name].items()), flush=True)
    exact, rounded = maps.values()
    shares = torch.tensor([float((exact[key] != rounded[key]).double().mean()) for key in exact])
    print(f"pixels that change: {shares.mean():.3%} of all, at most {shares.max():.3%} of a scene")
    calibration = [scenes[index]["image"] for index in range(min(PICTURES, count))]
    choice = Predictor.from_pretrained(MODEL, device="cpu", precision="auto", calibration=calibration).precision_choice
    print(f"auto: {choice}")
    changed = {"mean": float(shares.mean()), "most": float(shares.max())}
    record("precision", {"scenes": count, "metrics": metrics, "changed": changed, "auto": str(choice)})


if __name__ == "__main__":
    main()

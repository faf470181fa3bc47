"""The effect of bfloat16 on the predictions of a trained model.

    python benchmarks/precision.py [MODEL [--data DATA] [--format F] [--split S] [--ignore-index N]] [--images N]

By default, MODEL is the one in this repository, on the test scenes of `faim2f evaluate --format digits`. The images are
predicted in float32 and with weights and activations in bfloat16, as `Predictor` runs them: the metrics of both, the
share of pixels whose label changes, and what `precision="auto"` chooses on the first images.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from measurement import record

from hf_faim2f import Predictor
from hf_faim2f.data.formats import DataSource, open_data
from hf_faim2f.data.item import Item
from hf_faim2f.evaluation.evaluator import Evaluator
from hf_faim2f.runtime.precision import PICTURES
from hf_faim2f.zoo import open_model

SHIPPED = Path(__file__).parents[1] / "examples" / "digits"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
METRICS = {"semantic": "mIoU", "instance": "AP", "panoptic": "PQ"}
TASKS = {"semantic": ("semantic",), "instance": ("instance",)}  # of "panoptic", all


def main() -> None:
    """Prints and records the metrics and the changes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", type=Path, default=SHIPPED)
    parser.add_argument("--data", default="", help="where the images and labels are (default: scenes of digits)")
    parser.add_argument("--format", default="digits")
    parser.add_argument("--split")
    parser.add_argument("--ignore-index", type=int, default=255)
    parser.add_argument("--images", type=int, default=500)
    options = parser.parse_args()
    source = DataSource(options.data, splits=(None, options.split), ignore_index=options.ignore_index)
    data = open_data(options.format, source, "validation").first(options.images)
    subtasks = TASKS.get(data.description.task, tuple(METRICS))
    maps: dict[str, dict[Any, torch.Tensor]] = {name: {} for name in DTYPES}
    metrics: dict[str, dict[str, float]] = {}
    for name, dtype in DTYPES.items():
        model, processor = open_model(options.model)
        model.optimize_for_inference().to(dtype)

        def keep(subtask: str, item: Item, answer: Any, name: str = name) -> None:
            if subtask == "semantic":
                maps[name][item["image_id"]] = answer.to(torch.uint8)

        things = sorted(data.description.things)
        evaluator = Evaluator(processor, data.description.id2label, subtasks, things, watch=keep)
        found = evaluator(model, data.items)
        metrics[name] = {METRICS[subtask]: float(found[subtask][METRICS[subtask]]) for subtask in subtasks}
        print(f"{name:10}", *(f"{metric} {value:.2f}" for metric, value in metrics[name].items()), flush=True)
    exact, rounded = maps.values()
    changed: dict[str, float] = {}
    if exact:
        shares = torch.tensor([float((exact[key] != rounded[key]).double().mean()) for key in exact])
        print(f"pixels that change: {shares.mean():.3%} of all, at most {shares.max():.3%} of an image")
        changed = {"mean": float(shares.mean()), "most": float(shares.max())}
    calibration = [data.items[index]["image"] for index in range(min(PICTURES, len(data.items)))]
    chosen = Predictor.from_pretrained(options.model, device="cpu", precision="auto", calibration=calibration)
    print(f"auto: {chosen.precision_choice}")
    name = "/".join(Path(data.description.name).parts[-2:])
    about = {"data": name, "images": len(data.items), "metrics": metrics, "changed": changed}
    record("precision", {**about, "auto": str(chosen.precision_choice)})


if __name__ == "__main__":
    main()

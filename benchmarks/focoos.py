"""Focoos's own code and ours in one process: the same weights, the same picture, end to end to Focoos's detections.

    PYTHONPATH=/path/to/focoos python benchmarks/focoos.py [RUNS]

Needs a checkout of FocoosAI's repository and the libraries that its models import (its image decoding and web client
need not work); without it, the script exits with an error in one sentence. The weights are rebuilt from the seeds in
`tests/reference`; the picture is 640x640; two threads. Both run the network and post-processing to detections, ours
also in bfloat16. At most 30 queries pass the threshold of the scores. Before anything is timed, the class
probabilities must agree to 1e-3 and the numbers of detections must be equal.

A matrix product of 2048 x 2048 in both precisions measures the machine. The network's multiply-accumulates at that rate
are a lower bound on its time.
"""

import importlib
import json
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from end_to_end import PRODUCT, SIZE, has_bfloat16, image
from measurement import THREADS, multiply_accumulates, record, row, time_in_turn
from torch import Tensor

from hf_faim2f import FaiM2FForUniversalSegmentation, FaiM2FImageProcessor

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.support.reference_models import FOLDER, checkpoint, reference_model

MODELS = {"s": "fai-m2f-s-ade", "m": "fai-mf-m-ade", "l": "fai-mf-l-ade"}
LARGEST_ERROR = 1e-3  # of class probabilities, because rounding decides where some queries attend
QUERIES = 30  # at most, that pass the threshold of the scores
MODULES = ("focoos.models.fai_mf.modelling", "focoos.models.fai_mf.processor", "focoos.model_manager", "focoos.ports")
Job = Callable[[], Any]


def focoos_code() -> list[Any]:
    """Focoos's modules, in the order of `MODULES`; ends the program with a sentence if one cannot be imported."""
    path = list(sys.path)
    # This file has the same name as Focoos's package.
    sys.path[:] = [folder for folder in path if Path(folder).resolve() != Path(__file__).resolve().parent]
    try:
        return [importlib.import_module(name) for name in MODULES]
    except Exception as error:  # its modules may raise any type on import
        raise SystemExit(
            f"Focoos's own code cannot be imported ({type(error).__name__}: {error}): put a checkout of FocoosAI's "
            "repository on PYTHONPATH, and install what its models need."
        ) from None
    finally:
        sys.path[:] = path


def theirs(name: str, modules: list[Any]) -> tuple[torch.nn.Module, Any]:
    """Focoos's network with the reference weights, in evaluation mode, and its processor."""
    modelling, processor, manager, ports = modules
    values = deepcopy(json.loads((FOLDER / f"{name}.json").read_text())["config"])
    config = manager.ConfigManager.from_dict(ports.ModelFamily("fai_mf"), values)
    network = modelling.FAIMaskFormer(config)
    found = network.load_state_dict(checkpoint(name), strict=False)
    keys = (*found.missing_keys, *found.unexpected_keys)
    wrong = [key for key in keys if "criterion" not in key and not key.startswith("pixel_")]
    if wrong:
        raise SystemExit(f"Focoos's {name} has other weights than tests/reference, such as {wrong[0]}: take 0.25.")
    return network.eval().requires_grad_(False), processor.MaskFormerProcessor(config).eval()


def jobs_of(name: str, modules: list[Any]) -> tuple[dict[str, Job], float]:
    """Focoos's and our jobs, end to end and the network alone; and the network's multiply-accumulates.

    Ends the program with a sentence if the results differ.
    """
    network, processor = theirs(name, modules)
    photo = image()  # (H, W, 3) uint8
    picture = torch.from_numpy(photo).permute(2, 0, 1)[None]

    @torch.inference_mode()
    def run_theirs() -> Any:
        return network(picture.float())

    def detect_theirs(threshold: float) -> list[Any]:
        return processor.postprocess(run_theirs(), picture, threshold=threshold)[0].detections

    threshold = passed_by(QUERIES, run_theirs().logits, detect_theirs)
    found: dict[str, Job] = {"Focoos, end to end": partial(detect_theirs, threshold), "Focoos, network": run_theirs}
    types = {"float32": torch.float32, **({"bfloat16": torch.bfloat16} if has_bfloat16() else {})}
    for title, dtype in types.items():
        run, detect = ours(reference_model(name).optimize_for_inference().to(dtype), photo, dtype, threshold)
        found |= {f"ours, {title}, end to end": detect, f"ours, {title}, network": run}
    error = float((run_theirs().logits - probabilities(found["ours, float32, network"]())).abs().max())
    counts = [len(found[f"{who}, end to end"]()) for who in ("Focoos", "ours, float32")]
    if error > LARGEST_ERROR or counts[0] != counts[1]:
        raise SystemExit(
            f"{name}: the answers differ, class probabilities by {error:.1e}, and {counts[0]} detections of Focoos "
            f"against {counts[1]} of ours: nothing was timed."
        )
    print(f"{name}: class probabilities differ by at most {error:.1e}, {counts[0]} detections in both")
    return found, multiply_accumulates(reference_model(name), torch.zeros(1, 3, *SIZE))


def passed_by(queries: int, probabilities: Tensor, detect: Callable[[float], list[Any]]) -> float:
    """A threshold that so many queries pass, or fewer if Focoos's code fails: it cannot write a mask of one column."""
    scores = probabilities.amax(-1).flatten().sort(descending=True).values
    for count in range(queries, 0, -1):
        threshold = float(scores[count - 1] + scores[count]) / 2
        try:
            if detect(threshold):
                return threshold
        except Exception:  # OpenCV's own type
            continue
    raise SystemExit("Focoos's own code finds nothing at any threshold.")


def ours(
    model: FaiM2FForUniversalSegmentation, photo: np.ndarray, dtype: torch.dtype, threshold: float
) -> tuple[Job, Job]:
    """The network alone, and end to end."""
    size = {"height": SIZE[0], "width": SIZE[1]}
    processor = FaiM2FImageProcessor.from_model_config(model.config, size=size)

    @torch.inference_mode()
    def run() -> Any:
        return model(processor(photo, return_tensors="pt")["pixel_values"].to(dtype))

    def detect() -> list[Any]:
        return processor.post_process_detections(run(), [SIZE], SIZE, threshold=threshold)[0]

    return run, detect


def probabilities(outputs: Any) -> Tensor:
    return outputs.class_queries_logits.float().softmax(-1)[..., :-1]


def main() -> None:
    """Prints and records the times, the lower bounds and our speedups."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    modules = focoos_code()
    print(__doc__)
    torch.set_num_threads(THREADS)
    squares = {"float32": torch.randn(PRODUCT, PRODUCT)}
    if has_bfloat16():
        squares["bfloat16"] = squares["float32"].bfloat16()
    figures: dict[str, Any] = {}
    for size, name in MODELS.items():
        jobs, macs = jobs_of(name, modules)
        products: dict[str, Job] = {f"product, {title}": partial(torch.mm, a, a) for title, a in squares.items()}
        times = time_in_turn({**jobs, **products}, runs)
        for who, seconds in times.items():
            print(row(who, seconds), flush=True)
        rates = {title: PRODUCT**3 / times[f"product, {title}"]["median"] for title in squares}
        bounds = {title: macs / rate for title, rate in rates.items()}
        for title, bound in bounds.items():
            faster = times["Focoos, end to end"]["median"] / times[f"ours, {title}, end to end"]["median"]
            above = times[f"ours, {title}, network"]["median"] / bound
            gflops = 2e-9 * rates[title]
            print(f"{size}, {title}: {faster:.1f} times as fast as Focoos end to end; the network takes {above:.1f} "
                  f"times its bound of {1000 * bound:.0f} ms at {gflops:.0f} GFLOP/s")  # fmt: skip
        figures[size] = {"seconds": times, "macs": macs, "bounds": bounds}
    record("focoos", {"runs": runs, "models": figures})


if __name__ == "__main__":
    main()

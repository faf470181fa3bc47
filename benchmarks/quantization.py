"""Float32 against int8 in ONNX Runtime on this machine's CPU: loss of quality, latency and file size.

    python benchmarks/quantization.py [SCENES]

The shipped digits model is exported (384x384, its training size, batch 1) and quantized by `faim2f quantize` for
ONNX Runtime and for TensorRT, with default settings on 64 scenes of the training split. mIoU and AP are measured on the
same SCENES held-out scenes (default 500) with the evaluator of `faim2f evaluate`. Latencies are medians of graphs run
in turn, on one thread. The ADE20K models, at 640x640, have random weights. Only their time and size are meaningful, so
all layers are quantized (an error of 1 is allowed).
"""

import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import torch
from measurement import record, row, time_in_turn
from PIL import Image
from torch import Tensor, nn
from transformers.utils import logging

from hf_faim2f import FaiM2FForUniversalSegmentation, FaiM2FImageProcessor, load_config
from hf_faim2f.data.digits import DigitScenes
from hf_faim2f.evaluation.evaluator import Evaluator
from hf_faim2f.export.onnx import export_onnx
from hf_faim2f.export.quantize import IMAGES, RUNTIMES, quantize
from hf_faim2f.family.digits import LABELS, THING_IDS

DIGITS = Path(__file__).parents[1] / "examples" / "digits"
MEMBERS = ("fai-m2f-s-ade", "fai-mf-m-ade", "fai-mf-l-ade", "bisenetformer-m-ade")
THREADS = 1  # with more threads, which wait for each other, the machine's load would distort the times
RUNS = {"digits": 50, "member": 10}


class Graph(nn.Module):
    """Wraps an ONNX graph that returns logits as a model for the evaluator."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        options.log_severity_level = 3
        path = str(folder / "model.onnx")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.place = nn.Parameter(torch.zeros(1))  # the evaluator uses the device and dtype of a parameter

    def forward(self, pixel_values: Tensor) -> Any:
        classes, masks = self.session.run(None, {"pixel_values": pixel_values.numpy()})
        return SimpleNamespace(
            class_queries_logits=torch.from_numpy(classes), masks_queries_logits=torch.from_numpy(masks)
        )


def compare(folders: dict[str, Path], size: int, runs: int) -> dict[str, Any]:
    """Latency and file size of each graph, printed and returned."""
    graphs = {name: Graph(folder) for name, folder in folders.items()}
    pixels = torch.randn(1, 3, size, size)
    times = time_in_turn({name: partial(graph, pixels) for name, graph in graphs.items()}, runs, warmup=3)
    figures = {}
    for name, folder in folders.items():
        megabytes = (folder / "model.onnx").stat().st_size / 1e6
        figures[name] = {"seconds": times[name], "megabytes": megabytes}
        print(f"{row(name, times[name])}  {megabytes:6.1f} MB", flush=True)
    return figures


def save_scenes(folder: Path, count: int) -> None:
    folder.mkdir()
    scenes = DigitScenes("train", count, seed=1)
    for i in range(count):
        Image.fromarray(scenes[i]["image"].permute(1, 2, 0).numpy()).save(folder / f"{i:04}.png")


def digits(root: Path, images: Path, scenes: int) -> dict[str, Any]:
    """The shipped model: time, size, mIoU and AP."""
    folders = {"float32": root / "digits"}
    export_onnx(DIGITS, folders["float32"], size=(384, 384), batch=1, verify=False)
    for runtime in RUNTIMES:
        folders[f"int8 for {runtime}"] = root / f"digits-{runtime}"
        for line in quantize(folders["float32"], folders[f"int8 for {runtime}"], images, runtime):
            print(f"   {line}")
    print("digits, 384x384:")
    figures = compare(folders, 384, RUNS["digits"])
    processor = FaiM2FImageProcessor.from_pretrained(folders["float32"])
    evaluator = Evaluator(processor, dict(enumerate(LABELS)), ("semantic", "instance"), THING_IDS, batch_size=1)
    for name, folder in folders.items():
        results = evaluator(Graph(folder), DigitScenes("test", scenes))  # type: ignore[arg-type]
        figures[name] |= {"mIoU": results["semantic"]["mIoU"], "AP": results["instance"]["AP"]}
        print(f"{name:28} mIoU {figures[name]['mIoU']:.2f}, AP {figures[name]['AP']:.2f}", flush=True)
    return figures


def member(name: str, root: Path, images: Path) -> dict[str, Any]:
    """A member of the family with random weights: time and size."""
    torch.manual_seed(0)
    model = FaiM2FForUniversalSegmentation(load_config(name)).eval()
    model.save_pretrained(root / name)
    FaiM2FImageProcessor.from_model_config(model.config).save_pretrained(root / name)
    folders = {"float32": root / f"{name}-onnx"}
    export_onnx(root / name, folders["float32"], size=(640, 640), batch=1, verify=False)
    for runtime in RUNTIMES:
        folders[f"int8 for {runtime}"] = root / f"{name}-{runtime}"
        quantize(folders["float32"], folders[f"int8 for {runtime}"], images, runtime, most_images=4, max_error=1.0)
    print(f"{name}, 640x640, random weights:")
    return compare(folders, 640, RUNS["member"])


def main() -> None:
    """Prints and records; `python benchmarks/quantization.py SCENES` for another number of held-out scenes than 500."""
    scenes = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    print(__doc__)
    torch.set_num_threads(THREADS)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="faim2f-") as folder:
        root = Path(folder)
        save_scenes(root / "scenes", IMAGES)
        figures = {"digits": digits(root, root / "scenes", scenes)}
        for name in MEMBERS:
            figures[name] = member(name, root, root / "scenes")
    record("quantization", {"scenes": scenes, "onnxruntime": onnxruntime.__version__, "models": figures}, THREADS)


if __name__ == "__main__":
    main()

"""Runtimes for the network in int8 on this machine's CPU, compared with float32 and bfloat16: time and quality.

    python benchmarks/int8.py [--runs 9] [--scenes 200] [--threads 1 2] [--models NAME ...]

Those whose library is not installed are skipped with a sentence:

- torch in float32 and in bfloat16, as `Predictor` runs it;
- onnxruntime, and its int8: the QDQ graph of `faim2f quantize`;
- openvino in float32 and bfloat16; its int8 of that QDQ graph, and of a graph that nncf quantized
  (`pip install openvino nncf`);
- inductor, and its int8: the x86 quantizer of torchao (`pip install --no-deps torchao`; it needs a C++ compiler).

All are timed in turn in one process, from pixel values to logits, batch 1, 640x640. The weights of the family's models
are random, so only their time is meaningful, and all layers are quantized. mIoU, AP and PQ are those of the shipped
digits model (384x384) on held-out scenes; there, `faim2f quantize` keeps layers in float whose quantization costs too
much, and the other quantizers use their defaults. All are calibrated on the same 64 pictures.
"""

import argparse
import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from measurement import record, row, time_in_turn
from PIL import Image
from torch import Tensor, nn
from transformers.utils import logging

from hf_faim2f import FaiM2FForUniversalSegmentation, FaiM2FImageProcessor, load_config
from hf_faim2f.data.digits import DigitScenes
from hf_faim2f.evaluation.evaluator import Evaluator
from hf_faim2f.export.graph import FaiM2FGraph, quietly
from hf_faim2f.export.onnx import export_onnx
from hf_faim2f.export.quantize import MAX_ERROR, quantize
from hf_faim2f.family.digits import LABELS, THING_IDS
from hf_faim2f.zoo import open_model

DIGITS = Path(__file__).parents[1] / "examples" / "digits"
MODELS = ("fai-m2f-s-ade", "fai-mf-m-ade")
IMAGES = 64
METRICS = {"semantic": "mIoU", "instance": "AP", "panoptic": "PQ"}
Network = Callable[[Tensor], tuple[Tensor, Tensor]]


class Subject:
    """A model in torch and as ONNX graphs in float and int8, with its calibration inputs.

    Args:
        name: the model's name in the output.
        folder: the model's folder.
        images: a folder of calibration images.
        size: (height, width) in pixels.
        max_error: see `quantize`.
        work: an empty folder.
    """

    def __init__(
        self, name: str, folder: Path, images: Path, size: tuple[int, int], max_error: float, work: Path
    ) -> None:
        self.name, self.size = name, size
        self.model, self.processor = open_model(folder)
        work.mkdir()
        self.float_graph, self.int8_graph = work / "float", work / "int8"
        export_onnx(folder, self.float_graph, size=size, batch=1, verify=False)
        quantize(self.float_graph, self.int8_graph, images, max_error=max_error)
        prepare = FaiM2FImageProcessor.from_pretrained(self.float_graph)
        pictures = [Image.open(path, formats=["PNG"]) for path in sorted(images.iterdir())]
        self.calibration = [prepare(picture, return_tensors="pt")["pixel_values"] for picture in pictures]

    def graph(self) -> FaiM2FGraph:
        return FaiM2FGraph(self.model, self.processor, batch=1, size=self.size)


def in_torch(subject: Subject, threads: int, dtype: torch.dtype) -> Network:
    model = FaiM2FForUniversalSegmentation(subject.model.config).eval()
    model.load_state_dict(subject.model.state_dict())
    model.optimize_for_inference().to(dtype)

    def run(pixels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            found = model(pixels.to(dtype))
        return found.class_queries_logits.float(), found.masks_queries_logits.float()

    return run


def in_inductor(subject: Subject, threads: int, int8: bool) -> Network:
    graph, pixels = subject.graph(), subject.calibration[0]
    with torch.no_grad(), quietly():
        module: Any = torch.export.export(graph, (pixels,)).module()
        if int8:
            from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
            from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

            quantizer = x86.X86InductorQuantizer()
            quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
            module = prepare_pt2e(module, quantizer)
            for batch in subject.calibration:
                module(batch)
            module = convert_pt2e(module)
        compiled = torch.compile(module, options={"freezing": True, "cpp.dynamic_threads": True})
        compiled(pixels)

    def run(pixels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            found = compiled(pixels)
        return found["class_queries_logits"], found["masks_queries_logits"]

    return run


def in_onnxruntime(subject: Subject, threads: int, int8: bool) -> Network:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    path = (subject.int8_graph if int8 else subject.float_graph) / "model.onnx"
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(pixels: Tensor) -> tuple[Tensor, Tensor]:
        classes, masks = session.run(None, {"pixel_values": pixels.numpy()})
        return torch.from_numpy(classes), torch.from_numpy(masks)

    return run


def in_openvino(subject: Subject, threads: int, int8: str | None = None, hint: str = "f32") -> Network:
    import openvino

    core = openvino.Core()
    model = core.read_model((subject.int8_graph if int8 == "qdq" else subject.float_graph) / "model.onnx")
    if int8 == "nncf":
        import nncf

        inputs = nncf.Dataset([pixels.numpy() for pixels in subject.calibration])
        with quietly():
            model = nncf.quantize(model, inputs, model_type=nncf.ModelType.TRANSFORMER, subset_size=IMAGES)
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(model, "CPU", settings)

    def run(pixels: Tensor) -> tuple[Tensor, Tensor]:
        classes, masks = compiled(pixels.numpy()).values()
        return torch.from_numpy(classes.copy()), torch.from_numpy(masks.copy())

    return run


WAYS: dict[str, tuple[Callable[..., Network], tuple[str, ...]]] = {
    "torch float32": (partial(in_torch, dtype=torch.float32), ()),
    "torch bfloat16": (partial(in_torch, dtype=torch.bfloat16), ()),
    "inductor float32": (partial(in_inductor, int8=False), ()),
    "inductor int8": (partial(in_inductor, int8=True), ("torchao",)),
    "onnxruntime float32": (partial(in_onnxruntime, int8=False), ()),
    "onnxruntime int8": (partial(in_onnxruntime, int8=True), ()),
    "openvino float32": (in_openvino, ("openvino",)),
    "openvino bfloat16": (partial(in_openvino, hint="bf16"), ("openvino",)),
    "openvino int8, QDQ": (partial(in_openvino, int8="qdq"), ("openvino",)),
    "openvino int8, nncf": (partial(in_openvino, int8="nncf"), ("openvino", "nncf")),
}


class Logits(nn.Module):
    """Wraps a network as a model for the evaluator."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.place = nn.Parameter(torch.zeros(1))  # the evaluator reads its device and dtype

    def forward(self, pixel_values: Tensor) -> Any:
        classes, masks = self.network(pixel_values)
        return SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)


def networks(subject: Subject, threads: int, chosen: list[str]) -> dict[str, Network]:
    """The networks that can be opened here, by name."""
    torch.set_num_threads(threads)
    opened = {}
    for name in chosen:
        open_way, needed = WAYS[name]
        if missing := [library for library in needed if importlib.util.find_spec(library) is None]:
            print(f"{name} is skipped: {' and '.join(missing)} is not installed.")
            continue
        try:
            opened[name] = open_way(subject, threads)
        except Exception as error:  # the libraries raise many types, for example for an unsupported operation
            print(f"{name} is skipped: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}")
    return opened


def times(subject: Subject, threads: int, runs: int, chosen: list[str]) -> dict[str, dict[str, float]]:
    """Times each network; prints and returns the seconds."""
    opened = networks(subject, threads, chosen)
    pixels = torch.randn(1, 3, *subject.size)
    print(f"{subject.name}, {subject.size[0]}x{subject.size[1]}, {threads} threads:")
    found = time_in_turn({name: partial(run, pixels) for name, run in opened.items()}, runs, warmup=2, threads=threads)
    for name, figures in found.items():
        print(row(name, figures), flush=True)
    return found


def quality(subject: Subject, scenes: int, threads: int, chosen: list[str]) -> dict[str, dict[str, float]]:
    """Evaluates each network on the digits; prints and returns mIoU, AP and PQ."""
    evaluator = Evaluator(subject.processor, dict(enumerate(LABELS)), tuple(METRICS), THING_IDS, batch_size=1)
    found = {}
    for name, network in networks(subject, threads, chosen).items():
        results = evaluator(Logits(network), DigitScenes("test", scenes))  # type: ignore[arg-type]
        found[name] = {metric: float(results[subtask][metric]) for subtask, metric in METRICS.items()}
        print(f"{name:28}", *(f"{metric} {value:.2f}" for metric, value in found[name].items()), flush=True)
    return found


def save_models(root: Path, names: list[str]) -> None:
    """Writes the calibration images, and the models with random weights."""
    (root / "images").mkdir()
    scenes = DigitScenes("train", IMAGES, seed=1)
    for i in range(IMAGES):
        Image.fromarray(scenes[i]["image"].permute(1, 2, 0).numpy()).save(root / "images" / f"{i:04}.png")
    for name in names:
        torch.manual_seed(0)
        model = FaiM2FForUniversalSegmentation(load_config(name)).eval()
        model.save_pretrained(root / name)
        FaiM2FImageProcessor.from_model_config(model.config).save_pretrained(root / name)


def main() -> None:
    """Prints the tables, and records each model when it is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=9, help="timed runs of each way (9)")
    parser.add_argument("--scenes", type=int, default=200, help="scenes of digits for the quality; 0 for none (200)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads (1 2)")
    parser.add_argument("--models", nargs="*", default=list(MODELS), help="models to time")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), metavar="WAY", help="ways to run")
    chosen = parser.parse_args()
    print(__doc__)
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="faim2f-") as folder:
        root = Path(folder)
        save_models(root, chosen.models)
        for name in chosen.models:
            subject = Subject(name, root / name, root / "images", (640, 640), 1.0, root / f"{name}-graphs")
            for threads in chosen.threads:
                record("int8", {"model": name, "seconds": times(subject, threads, chosen.runs, chosen.ways)}, threads)
        if chosen.scenes:
            subject = Subject("digits", DIGITS, root / "images", (384, 384), MAX_ERROR, root / "digits-graphs")
            threads = max(chosen.threads)
            found = quality(subject, chosen.scenes, threads, chosen.ways)
            record("int8", {"model": "digits", "scenes": chosen.scenes, "quality": found}, threads)


if __name__ == "__main__":
    main()

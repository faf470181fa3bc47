"""Exporting full-size Mask2Former models: nodes, operations and errors of graphs; time, memory and size of engines.

    python benchmarks/mask2former_export.py [EXPORT ...] [--precisions fp16 fp32] [--gpus sm75 ...]

The exports are those of `EXPORTS`, with random weights scaled to give confident predictions. Each transformers model is
saved, converted, exported with logits and with built-in post-processing, verified against torch by the exporter, and
built by `tensorrt-rtx` for each GPU in a fresh process. Engines are not run.
"""

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from hf_faim2f.conversion.mask2former import convert
from measurement import _memory, record
from torch import nn
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig, SwinConfig
from transformers.utils import logging
from untrained import CLASS_SPREAD, MASK_SPREAD, NO_OBJECT, photograph

from hf_faim2f import FaiM2FImageProcessor
from hf_faim2f.errors import ExportError
from hf_faim2f.export.graph_file import report
from hf_faim2f.export.onnx import export_onnx
from hf_faim2f.export.tensorrt import AHEAD_OF_TIME, export_tensorrt

THREADS = 2
STAGES = ["stage1", "stage2", "stage3", "stage4"]
# Subtask, outputs of the graph, labels and size of each.
EXPORTS: dict[str, tuple[str, str, int, tuple[int, int]]] = {
    "swin-base-coco-640": ("instance", "instances", 80, (640, 640)),
    "swin-base-coco-1024": ("instance", "instances", 80, (1024, 1024)),
    "r50-cityscapes-512x1024": ("semantic", "semantic", 19, (512, 1024)),
}


def published(name: str) -> Mask2FormerForUniversalSegmentation:
    """The architecture of facebook/mask2former-swin-base-coco-instance, or of the R50 for Cityscapes; random weights.

    Offsets, norms and queries are not at their initial values, and about twenty queries are confident in a class.
    """
    backbone: Any = ResNetConfig(out_features=STAGES)
    if name.startswith("swin-base"):
        backbone = SwinConfig(
            image_size=384, embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], window_size=12,
            drop_path_rate=0.3, out_features=STAGES,
        )  # fmt: skip
    torch.manual_seed(0)
    config = Mask2FormerConfig(backbone_config=backbone.to_dict(), num_labels=EXPORTS[name][2], num_queries=100)
    model = Mask2FormerForUniversalSegmentation(config).eval()
    pixels = FaiM2FImageProcessor(size={"height": 256, "width": 320})(photograph(640, 480), return_tensors="pt")
    decoder: Any = model.model.transformer_module
    *_, embedder = (m for m in decoder.decoder.mask_predictor.mask_embedder.modules() if isinstance(m, nn.Linear))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "sampling_offsets" in key or "attention_weights" in key:
                parameter.normal_(0, 0.05)
            elif "norm" in key or "relative_position_bias_table" in key:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for key, statistic in module.named_buffers():
                    if key == "running_mean":
                        statistic.normal_(0, 0.1)
                    elif key == "running_var":
                        statistic.uniform_(0.5, 2)
        decoder.queries_features.weight.normal_(0, 20)
        outputs = model(pixels["pixel_values"])
        embedder.weight.mul_(MASK_SPREAD / outputs.masks_queries_logits.std())
        embedder.bias.zero_()
        model.class_predictor.weight.mul_(CLASS_SPREAD / outputs.class_queries_logits.std(1).mean())
        model.class_predictor.bias.zero_()
        model.class_predictor.bias[-1] = NO_OBJECT
    return model


def converted(name: str, folder: Path) -> Path:
    """A faim2f model's folder, converted from the folder that transformers saves."""
    theirs, ours = folder / f"mask2former-{name}", folder / f"{name}-converted"
    published(name).save_pretrained(theirs)
    model = convert(str(theirs), ours, EXPORTS[name][0])
    print(
        f"{name}: converted, largest difference from transformers' {model.error:.1e} of the largest logit", flush=True
    )
    return ours


def graph(source: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Exports and verifies; returns the lines that `faim2f export onnx` prints."""
    start = time.perf_counter()
    lines = export_onnx(source, out, batch=1, **options)
    seconds = time.perf_counter() - start
    counted = report(out / "model.onnx")
    size = (out / "model.onnx").stat().st_size / 1e6
    name = f"{options['outputs']} of {options.get('input_name', 'pixel_values')}, {options.get('precision', 'fp32')}"
    print(f"  {name}: {counted}, {size:.0f} MB, in {seconds:.0f} s; {'; '.join(lines)}", flush=True)
    return {
        "graph": name,
        "nodes": counted.nodes.total(),
        "types": dict(counted.nodes),
        "gmacs": counted.macs / 1e9,
        "mb": size,
        "seconds": seconds,
        "compared": lines,
    }


def _build(source: Path, out: Path, gpu: str, answers: Any) -> None:
    start = time.perf_counter()
    try:
        export_tensorrt(source, out, gpu=gpu)
    except ExportError as error:
        answers.put({"gpu": gpu, "refused": str(error)})
        return
    seconds = time.perf_counter() - start
    engine = (out / "model.engine").stat().st_size / 1e6
    answers.put({"gpu": gpu, "seconds": seconds, "peak_mb": _memory("VmHWM"), "engine_mb": engine})


def build(source: Path, out: Path, gpu: str) -> dict[str, Any]:
    """Builds an engine in a fresh process, so that its peak memory is not affected by other builds."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    child = context.Process(target=_build, args=(source, out, gpu, answers))
    child.start()
    while child.is_alive() and answers.empty():
        child.join(1)
    child.join()
    found: dict[str, Any] = (
        {"gpu": gpu, "refused": f"the process ended with {child.exitcode}"} if answers.empty() else answers.get()
    )
    if "refused" in found:
        print(f"    {gpu}: {found['refused']}", flush=True)
    else:
        made = f"{found['engine_mb']:.0f} MB in {found['seconds']:.0f} s, {found['peak_mb']:.0f} MB at its peak"
        print(f"    {gpu}: {made}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("exports", nargs="*", metavar="EXPORT", help=", ".join(EXPORTS))
    parser.add_argument("--precisions", nargs="+", default=["fp16", "fp32"], choices=("fp16", "fp32"))
    parser.add_argument("--gpus", nargs="*", default=list(AHEAD_OF_TIME), choices=AHEAD_OF_TIME)
    parser.add_argument("--no-logits", action="store_true", help="only graphs with the answer in them")
    options = parser.parse_args()
    if unknown := set(options.exports) - set(EXPORTS):
        parser.error(f"no export is called {', '.join(sorted(unknown))}; there are {', '.join(EXPORTS)}")
    torch.set_num_threads(THREADS)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for name in options.exports or EXPORTS:
        _, outputs, _, size = EXPORTS[name]
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            source = converted(name, folder)
            figures: dict[str, Any] = {"export": name, "graphs": []}
            if not options.no_logits:
                figures["graphs"].append(graph(source, folder / "logits", outputs="logits", size=size))
            for precision in options.precisions:
                out = folder / precision
                made = graph(source, out, outputs=outputs, input_name="image", size=size, precision=precision)
                made["engines"] = [build(out, folder / f"{precision}-{gpu}", gpu) for gpu in options.gpus]
                figures["graphs"].append(made)
            record("mask2former_export", figures, THREADS)


if __name__ == "__main__":
    main()

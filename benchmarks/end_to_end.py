"""From an image in memory to its label map or instances: our models and transformers'.

    python benchmarks/end_to_end.py [RUNS]

One 8-bit image of 640x640, two threads, all contenders in turn in one process. Each runs its image processor, network
and post-processing. Weights are random, but the time of post-processing depends on the predictions, so every
post-processing gets the same realistic logits (see `post_processing.py`) instead of the network's outputs. Only the
graph with built-in post-processing uses its own logits.

- ours: `optimize_for_inference()` and the image processor's `post_process_*`; in float32, and in bfloat16 if the CPU
  has instructions for it;
- ours, graph: `faim2f export onnx --outputs semantic --input image`, in ONNX Runtime;
- transformers: Mask2Former with a ResNet-50, SegFormer-B0, with their own image processors. They, too, run at 640x640;
  their mIoU on ADE20K is published for a shorter side of 512, at which `peers.py` measures them.

A matrix product in each precision, in the same run, measures the speed of the machine. The multiply-accumulates of s, m
and l at that speed are a lower bound on the time of their networks alone, which are timed with it in turn in a second
round. Focoos's own code is not part of this benchmark.
"""

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from measurement import THREADS, multiply_accumulates, record, row, time_in_turn
from post_processing import realistic_logits
from torch import Tensor

from hf_faim2f import FaiM2FForUniversalSegmentation, FaiM2FImageProcessor
from hf_faim2f.family import load_config

SIZE = (640, 640)
ADE = {
    "s": "fai-m2f-s-ade",
    "m": "fai-mf-m-ade",
    "l": "fai-mf-l-ade",
    "BiSeNetFormer s": "bisenetformer-s-ade",
    "BiSeNetFormer m": "bisenetformer-m-ade",
    "BiSeNetFormer l": "bisenetformer-l-ade",
}
INSTANCES = "fai-mf-m-coco-ins"
PRODUCT = 2048  # rows and columns of the matrix product
PRODUCT_NAME = f"matrix product, {PRODUCT} x {PRODUCT}"
PRODUCTS = 5  # in a row
NETWORK_RUNS = 5  # the networks alone are timed this many times as often as the rest
PEER = "transformers, Mask2Former R50"


def image() -> np.ndarray:
    """(640, 640, 3) uint8: smooth shapes and noise."""
    draw = np.random.default_rng(0)
    coarse = torch.from_numpy(draw.uniform(0, 255, (1, 3, 12, 12)))
    smooth = torch.nn.functional.interpolate(coarse, size=SIZE, mode="bilinear")[0].permute(1, 2, 0).numpy()
    return np.clip(smooth + draw.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)


def realistic(classes: int, outputs: Any) -> Any:
    """Replaces the logits in the network's outputs by realistic ones of the same size."""
    key = (classes, tuple(outputs.masks_queries_logits.shape[2:]))
    if key not in REALISTIC:
        REALISTIC[key] = realistic_logits(*key)
    class_logits, mask_logits = REALISTIC[key]
    outputs.class_queries_logits, outputs.masks_queries_logits = class_logits, mask_logits
    return outputs


REALISTIC: dict[tuple[int, tuple[int, ...]], tuple[Tensor, Tensor]] = {}


def ours(name: str, dtype: torch.dtype, picture: np.ndarray, instances: bool = False) -> Callable[[], object]:
    torch.manual_seed(0)
    model = FaiM2FForUniversalSegmentation(load_config(name)).optimize_for_inference().to(dtype)
    processor = FaiM2FImageProcessor.from_model_config(model.config)
    classes = model.config.num_labels

    @torch.inference_mode()
    def run() -> object:
        pixel_values = processor(picture, return_tensors="pt")["pixel_values"]
        outputs = realistic(classes, model(pixel_values.to(dtype)))
        if instances:
            return processor.post_process_instance_segmentation(outputs, target_sizes=[SIZE])
        return processor.post_process_semantic_segmentation(outputs, target_sizes=[SIZE])

    return run


def graph(name: str, folder: Path, picture: np.ndarray) -> Callable[[], object]:
    """From the image's bytes to the label map, computed inside the graph."""
    import onnxruntime

    from hf_faim2f.export.onnx import export_onnx

    torch.manual_seed(0)
    model = FaiM2FForUniversalSegmentation(load_config(name))
    model.save_pretrained(folder / name)
    FaiM2FImageProcessor.from_model_config(model.config).save_pretrained(folder / name)
    out = folder / f"{name}-onnx"
    export_onnx(folder / name, out, outputs="semantic", input_name="image", size=SIZE, batch=1, verify=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = THREADS, 3
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"image": np.ascontiguousarray(picture.transpose(2, 0, 1))[None]})


def mask2former(picture: np.ndarray, labels: int, instances: bool = False) -> Callable[[], object]:
    torch.manual_seed(0)
    backbone = transformers.ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
    config = transformers.Mask2FormerConfig(backbone_config=backbone.to_dict(), num_labels=labels)
    model = transformers.Mask2FormerForUniversalSegmentation(config).eval().requires_grad_(False)
    processor = transformers.Mask2FormerImageProcessor(size=dict(zip(("height", "width"), SIZE, strict=True)))

    @torch.inference_mode()
    def run() -> object:
        outputs = realistic(labels, model(processor(picture, return_tensors="pt")["pixel_values"]))
        if instances:
            return processor.post_process_instance_segmentation(outputs, target_sizes=[SIZE])
        return processor.post_process_semantic_segmentation(outputs, target_sizes=[SIZE])

    return run


def segformer(picture: np.ndarray) -> Callable[[], object]:
    torch.manual_seed(0)
    model = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(num_labels=150)).eval()
    processor = transformers.SegformerImageProcessor(size=dict(zip(("height", "width"), SIZE, strict=True)))

    @torch.inference_mode()
    def run() -> object:
        outputs = model(processor(picture, return_tensors="pt")["pixel_values"])
        return processor.post_process_semantic_segmentation(outputs, target_sizes=[SIZE])

    return run


def has_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16 products."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def contenders(folder: Path) -> dict[str, Callable[[], object]]:
    picture = image()
    square = torch.randn(PRODUCT, PRODUCT)
    found: dict[str, Callable[[], object]] = {PRODUCT_NAME: lambda: square @ square}
    for size, name in ADE.items():
        found[f"ours, {size}"] = ours(name, torch.float32, picture)
        if has_bfloat16():
            found[f"ours, {size}, bfloat16"] = ours(name, torch.bfloat16, picture)
    found["ours, m, graph"] = graph(ADE["m"], folder, picture)
    found[PEER] = mask2former(picture, 150)
    found["transformers, SegFormer-B0"] = segformer(picture)
    found["ours, m, instances"] = ours(INSTANCES, torch.float32, picture, instances=True)
    found[f"{PEER}, instances"] = mask2former(picture, 80, instances=True)
    return found


def multiply(square: Tensor) -> None:
    """Several products, because the first after other work is slower."""
    for _ in range(PRODUCTS):
        square @ square


def bounds(runs: int) -> dict[str, dict[str, float]]:
    """Times the networks of s, m and l alone, prints them with their lower bounds, and returns both in seconds."""
    square = torch.randn(PRODUCT, PRODUCT)
    pixels = torch.randn(1, 3, *SIZE)
    jobs: dict[str, Callable[[], object]] = {}
    products: dict[str, float] = {}  # how many matrix products have the multiply-accumulates of the network
    for dtype in (torch.float32, torch.bfloat16) if has_bfloat16() else (torch.float32,):
        title = str(dtype).removeprefix("torch.")
        jobs[f"{PRODUCT_NAME}, {title}"] = partial(multiply, square.to(dtype))
        for size in "sml":
            torch.manual_seed(0)
            model = FaiM2FForUniversalSegmentation(load_config(ADE[size])).eval()
            if size not in products:
                products[size] = multiply_accumulates(model, pixels) / PRODUCT**3
            run = torch.inference_mode()(model.optimize_for_inference().to(dtype).forward)
            jobs[f"network, {size}, {title}"] = partial(run, pixels.to(dtype))
    times = time_in_turn(jobs, runs, warmup=2)
    for name, measured in times.items():
        if name.startswith(PRODUCT_NAME):
            measured |= {kind: seconds / PRODUCTS for kind, seconds in measured.items()}
        line = row(name, measured)
        if name.startswith("network"):
            _, size, title = name.split(", ")
            product = times[f"{PRODUCT_NAME}, {title}"]
            measured |= {f"bound, {kind}": products[size] * product[kind] for kind in ("median", "min")}
            line += "   bound {:.1f} ms: {:.2f} times; of the minima {:.2f}".format(
                1000 * measured["bound, median"],
                measured["median"] / measured["bound, median"],
                measured["min"] / measured["bound, min"],
            )
        print(line, flush=True)
    return times


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    transformers.utils.logging.set_verbosity_error()
    print(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        times = time_in_turn(contenders(Path(folder)), runs)
    for name, measured in times.items():
        print(row(name, measured))
    seconds = {name: measured["median"] for name, measured in times.items()}
    gflops = 2e-9 * PRODUCT**3 / seconds[PRODUCT_NAME]
    best = {
        size: min(value for name, value in seconds.items() if name.startswith(f"ours, {size}") and "inst" not in name)
        for size in ADE
    }
    ratios = {
        "Mask2Former R50 / ours m, float32": seconds[PEER] / seconds["ours, m"],
        "Mask2Former R50 / our best m": seconds[PEER] / best["m"],
        "SegFormer-B0 / ours s, float32": seconds["transformers, SegFormer-B0"] / seconds["ours, s"],
        "instances: Mask2Former R50 / ours m, float32": seconds[f"{PEER}, instances"] / seconds["ours, m, instances"],
    }
    print(f"matrix product: {gflops:.0f} GFLOP/s")
    alone = bounds(NETWORK_RUNS * runs)
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}")
    record("end_to_end", {"seconds": times, "gflops": gflops, "ratio": ratios, "network": alone})


if __name__ == "__main__":
    main()

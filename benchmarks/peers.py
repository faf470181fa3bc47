"""Alternative models and ours: from an 8-bit picture in memory to finished instances or label map.

    python benchmarks/peers.py [--runs N] [--threads N] [--only NAME ...] [--again]
    python benchmarks/peers_figure.py     # draws the results

Batch 1 on the CPU, random weights (nothing is downloaded), each at the picture size at which its authors publish its
metric, and each by its library's own inference path, in float32 and in bfloat16 (YOLO26 in float32 only, because
Ultralytics runs no other precision on a CPU). Instances are predicted in a 640x480 picture, the most common size in
COCO, and label maps for 683x512, the most common size in ADE20K.

The models' packages need not share an environment: run the script in each environment, with this package in it
(`pip install rfdetr ultralytics` and so on). Each row is measured in its own process and saved in `results/peers.json`.
Only missing rows are measured; rows whose package is missing are listed. In turn with the model, each process times a
matrix product (1024 x 1024, float32) and the network of fai-mf-m-ade at 640x640 in float32, so that rows from different
environments and times can be compared.

With random weights no query is confident, so post-processing would have nothing to do. Mask2Former, EoMT and ours get
realistic logits instead of their own, with 20 confident queries (`post_processing.py`); YOLO26 keeps its 20 best
detections, and RF-DETR gets a threshold that 20 pass. SegFormer's time does not depend on its predictions.

On a shared machine, two threads wait for each other: `--threads 1` measures the CPU time of one thread instead.
"""

import argparse
import importlib
import importlib.util
import json
import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measurement import RESULTS, THREADS, time_in_turn

PICTURES = {"COCO": (480, 640), "ADE20K": (512, 683)}  # height, width
PRODUCT, REFERENCE, REFERENCE_SIZE = 1024, "fai-mf-m-ade", 640
FOUND = 20  # instances
TINY = 8  # `--tiny` divides all sizes by it
STAGES = ["stage1", "stage2", "stage3", "stage4"]
Runner = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """A model in the table.

    Args:
        name: the displayed name, and the key in the results.
        data: key of `PICTURES`.
        package: the package that must be installed.
        size: the network's input for that picture, height x width.
        published: mask AP on COCO val2017 or single-scale mIoU on ADE20K val at this size; None if there is none.
        source: where the metric was published.
        license: of the code and the weights.
        build: takes a picture, (H, W, 3) uint8, and a divisor of all sizes; returns a function that returns the result.
    """

    name: str
    data: str
    package: str
    size: str
    published: float | None
    source: str
    license: str
    build: Callable[[np.ndarray, int], Runner]


def picture(size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8: smooth shapes and noise."""
    draw = np.random.default_rng(0)
    coarse = torch.from_numpy(draw.uniform(0, 255, (1, 3, 12, 12)))
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")[0].permute(1, 2, 0).numpy()
    return np.clip(smooth + draw.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)


def import_torchvision() -> None:
    """Imports torchvision if it is installed, even its CUDA build beside a CPU build of torch.

    That build cannot load its C++ operators, but looks up their names on import. No model here uses them.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        KEPT.append(library)  # the definitions are removed with the object
        importlib.import_module("torchvision")


KEPT: list[Any] = []


def realistic(outputs: Any) -> Any:
    """The outputs of a mask classification model with realistic logits of the same classes and size."""
    from post_processing import realistic_logits

    classes, grid = outputs.class_queries_logits.shape[2] - 1, tuple(outputs.masks_queries_logits.shape[2:])
    if (classes, grid) not in REALISTIC:
        REALISTIC[classes, grid] = realistic_logits(classes, grid, FOUND)
    outputs.class_queries_logits, outputs.masks_queries_logits = REALISTIC[classes, grid]
    return outputs


REALISTIC: dict[tuple[int, tuple[int, ...]], tuple[torch.Tensor, torch.Tensor]] = {}


def mask_classifier(model: Any, processor: Any, task: str, dtype: torch.dtype, image: np.ndarray) -> Runner:
    """Mask classification models, ours and transformers': image processor, network and `post_process_*`."""
    finish = getattr(processor, f"post_process_{task}_segmentation")

    @torch.inference_mode()
    def run() -> Any:
        values = processor(image, return_tensors="pt")
        outputs = model(pixel_values=values["pixel_values"].to(dtype))
        return finish(realistic(outputs), target_sizes=[image.shape[:2]])

    return run


def ours(name: str, size: int, task: str, dtype: torch.dtype, image: np.ndarray, divisor: int) -> Runner:
    from hf_faim2f import FaiM2FForUniversalSegmentation, FaiM2FImageProcessor
    from hf_faim2f.family import load_config

    model = FaiM2FForUniversalSegmentation(load_config(name)).optimize_for_inference().to(dtype)
    processor = FaiM2FImageProcessor.from_model_config(model.config, size={"shortest_edge": size // divisor})
    return mask_classifier(model, processor, task, dtype, image)


def mask2former(
    backbone: str, labels: int, size: int, longest: int, task: str, dtype: torch.dtype, image: np.ndarray, divisor: int
) -> Runner:
    import transformers

    kind = {"R50": transformers.ResNetConfig, "Swin-T": transformers.SwinConfig}[backbone]
    config = transformers.Mask2FormerConfig(backbone_config=kind(out_features=STAGES).to_dict(), num_labels=labels)
    model = transformers.Mask2FormerForUniversalSegmentation(config).eval().requires_grad_(False).to(dtype)
    sizes = {"shortest_edge": size // divisor, "longest_edge": longest // divisor}
    processor = transformers.Mask2FormerImageProcessor(size=sizes)
    return mask_classifier(model, processor, task, dtype, image)


def eomt(dtype: torch.dtype, image: np.ndarray, divisor: int) -> Runner:
    """EoMT-S for COCO panoptic: 200 queries in the last three blocks, without masked attention, as after training."""
    import transformers

    size = 640 // divisor
    config = transformers.EomtConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, num_blocks=3, num_queries=200, image_size=size,
        num_labels=133,
    )  # fmt: skip
    model = transformers.EomtForUniversalSegmentation(config).eval().requires_grad_(False).to(dtype)
    model.attn_mask_probs.zero_()
    processor = transformers.EomtImageProcessor(size={"shortest_edge": size, "longest_edge": size}, do_pad=True)
    return mask_classifier(model, processor, "panoptic", dtype, image)


def segformer(config: dict[str, Any], dtype: torch.dtype, image: np.ndarray, divisor: int) -> Runner:
    import transformers

    config = transformers.SegformerConfig(num_labels=150, **config)
    model = transformers.SegformerForSemanticSegmentation(config).eval().to(dtype)
    height, width = image.shape[:2]  # its authors keep the ratio, with a shorter side of 512
    processor = transformers.SegformerImageProcessor(size={"height": height, "width": width})

    @torch.inference_mode()
    def run() -> Any:
        outputs = model(processor(image, return_tensors="pt")["pixel_values"].to(dtype))
        return processor.post_process_semantic_segmentation(outputs, target_sizes=[(height, width)])

    return run


def rf_detr(kind: str, dtype: torch.dtype, image: np.ndarray, divisor: int) -> Runner:
    import rfdetr

    model = getattr(rfdetr, kind)(pretrain_weights=None, device="cpu")
    scores = np.sort(model.predict(image, threshold=0.0).confidence)[::-1]
    threshold = float(scores[FOUND])
    model.inference(dtype=dtype)  # its own optimization for inference: a traced graph
    return lambda: model.predict(image, threshold=threshold)


def yolo(size: str, image: np.ndarray, divisor: int) -> Runner:
    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp())
    os.environ.setdefault("YOLO_OFFLINE", "true")
    import ultralytics

    model = ultralytics.YOLO(f"yolo26{size}-seg.yaml")
    # nms=False: the published metric is that of the head without non-maximum suppression.
    options = {"imgsz": 640 // divisor, "device": "cpu", "verbose": False, "nms": False, "conf": 0.0, "max_det": FOUND}
    model.predict(image, **options)  # the first call sets the number of threads, which is later set again
    return lambda: model.predict(image, **options)


def rows() -> list[Row]:
    """The models of the table."""
    from hf_faim2f.family import find_preset

    found: list[Row] = []

    def add(
        name: str, data: str, package: str, size: str, published: float | None, source: str, terms: str, build: Any
    ):
        """A row for each precision. `build` takes the precision, and then what a row's does."""
        for suffix, dtype in (("", torch.float32), (", bfloat16", torch.bfloat16)):
            found.append(Row(name + suffix, data, package, size, published, source, terms, partial(build, dtype)))

    mine = "hf_faim2f", "Focoos's model card", "Apache-2.0; weights: not stated"
    zoo = "transformers", "Mask2Former's model zoo", "MIT; weights: CC BY-NC 4.0"
    for name in ("fai-mf-s-coco-ins", "fai-mf-m-coco-ins", "fai-mf-l-coco-ins"):
        size, published = find_preset(name).resolution, find_preset(name).published["segm/AP"]
        build = partial(ours, name, size, "instance")
        add(name, "COCO", mine[0], f"{size}x{size * 4 // 3}", published, *mine[1:], build)
    build = partial(ours, "fai-mf-m-coco-ins", 640, "instance")
    add("fai-mf-m-coco-ins at 640", "COCO", mine[0], "640x853", None, *mine[1:], build)
    for kind, side, published in (("Nano", 312, 40.3), ("Small", 384, 43.1), ("Medium", 432, 45.3)):
        name, source = f"RF-DETR-Seg-{kind[0]}", "RF-DETR's benchmarks page"
        build = partial(rf_detr, f"RFDETRSeg{kind}")
        add(name, "COCO", "rfdetr", f"{side}x{side}", published, source, "Apache-2.0", build)
    for letter, published in (("n", 33.9), ("s", 40.0), ("m", 44.1)):
        source, build = "Ultralytics' segmentation page", partial(yolo, letter)
        found.append(Row(f"YOLO26{letter}-seg", "COCO", "ultralytics", "480x640", published, source, "AGPL-3.0", build))
    for backbone, published in (("R50", 43.7), ("Swin-T", 45.0)):
        build = partial(mask2former, backbone, 80, 800, 1333, "instance")
        add(f"Mask2Former {backbone}, COCO", "COCO", zoo[0], "800x1067", published, *zoo[1:], build)
    add("EoMT-S, panoptic", "COCO", "transformers", "640x640", None, "EoMT's model zoo: PQ 46.7", "MIT", eomt)
    for name in ("fai-m2f-s-ade", "fai-mf-m-ade", "fai-mf-l-ade", *(f"bisenetformer-{size}-ade" for size in "sml")):
        published = find_preset(name).published["mIoU"]
        add(name, "ADE20K", mine[0], "640x854", published, *mine[1:], partial(ours, name, 640, "semantic"))
    b2 = {"depths": [3, 4, 6, 3], "hidden_sizes": [64, 128, 320, 512], "decoder_hidden_size": 768}
    for name, config, published in (("SegFormer-B0", {}, 37.4), ("SegFormer-B2", b2, 46.5)):
        source, terms = "SegFormer's paper, table 1", "NVIDIA's, non-commercial"
        add(name, "ADE20K", "transformers", "512x683", published, source, terms, partial(segformer, config))
    for backbone, published in (("R50", 47.2), ("Swin-T", 47.7)):
        build = partial(mask2former, backbone, 150, 512, 2048, "semantic")
        add(f"Mask2Former {backbone}, ADE20K", "ADE20K", zoo[0], "512x683", published, *zoo[1:], build)
    return found


def count(result: Any) -> int | None:
    """The number of instances or segments in a result of one of the libraries; None for a label map."""
    first = result[0] if isinstance(result, list) else result
    if isinstance(first, dict):
        return len(first["segments_info"])
    if hasattr(first, "boxes"):
        return len(first.boxes)
    return len(first) if hasattr(first, "confidence") else None


def measure(name: str, runs: int, threads: int, divisor: int) -> dict[str, Any]:
    """Times one row in turn with the matrix product and the reference network. Runs in its own process."""
    warnings.simplefilter("ignore")  # of tracing and of random weights
    import_torchvision()
    import transformers

    transformers.logging.set_verbosity_error()
    from hf_faim2f import FaiM2FForUniversalSegmentation
    from hf_faim2f.family import load_config

    row = next(row for row in rows() if row.name == name)
    load = os.getloadavg()[0]
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    height, width = PICTURES[row.data]
    run = row.build(picture((height // divisor, width // divisor)), divisor)
    network = FaiM2FForUniversalSegmentation(load_config(REFERENCE)).optimize_for_inference()
    values = torch.randn(1, 3, REFERENCE_SIZE // divisor, REFERENCE_SIZE // divisor)
    square = torch.randn(PRODUCT, PRODUCT)
    found = count(run())

    @torch.inference_mode()
    def reference() -> None:
        network(values)

    contenders: dict[str, Runner] = {"seconds": run, "product": lambda: square @ square, "reference": reference}
    clock = time.process_time if threads == 1 else time.perf_counter
    times = time_in_turn(contenders, runs, threads=threads, clock=clock)
    if torch.get_num_threads() != threads:
        raise RuntimeError(f"{row.name} ran on {torch.get_num_threads()} threads, not on {threads}.")
    return {
        **times,
        "threads": threads,
        "clock": "CPU" if threads == 1 else "wall",
        "found": found,
        "load": load,
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "package": f"{row.package} {version(row.package)}",
    }


def table(results: dict[str, Any]) -> list[str]:
    """The measured rows as a table in Markdown."""
    lines = [
        "| model | data | network's input | published | ms, median (least) | images/s | relative time | license |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows():
        if row.name not in results:
            continue
        figures = results[row.name]
        seconds, least = figures["seconds"]["median"], figures["seconds"]["min"]
        metric = "–" if row.published is None else f"{row.published:.1f} {'AP' if row.data == 'COCO' else 'mIoU'}"
        lines.append(
            f"| {row.name} | {row.data} | {row.size} | {metric} | {1000 * seconds:.0f} ({1000 * least:.0f}) | "
            f"{1 / seconds:.2f} | {seconds / figures['reference']['median']:.1f} | {row.license} |"
        )
    return lines


def main() -> None:
    """Measures the missing rows, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=THREADS, help="with 1, CPU time is measured")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="measure these rows only")
    parser.add_argument("--again", action="store_true", help="measure rows that are there, too")
    parser.add_argument("--out", type=Path, default=RESULTS / "peers.json")
    parser.add_argument("--tiny", action="store_true", help="small pictures, to test this script")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import_torchvision()
    results = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    names = [row.name for row in rows()]
    if unknown := [name for name in options.only or () if name not in names]:
        parser.error(f"no row is called {unknown[0]!r}; there are {', '.join(names)}")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as processes:
        for row in rows():
            is_there = results.get(row.name, {}).get("threads") == options.threads
            if (options.only and row.name not in options.only) or (is_there and not options.again):
                continue
            if importlib.util.find_spec(row.package) is None:
                print(f"{row.name} is left out: {row.package} is not installed here.", flush=True)
                continue
            arguments = row.name, options.runs, options.threads, TINY if options.tiny else 1
            results[row.name] = processes.submit(measure, *arguments).result()
            seconds = results[row.name]["seconds"]["median"]
            print(f"{row.name}: {1000 * seconds:.0f} ms, {results[row.name]['found']} found", flush=True)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()

# ruff: noqa: E402
"""One script for a GPU: exactness, latency, a training step and AOTInductor, as one JSON document.

    python benchmarks/gpu.py OUT.json [--device cuda] [--minutes 8] [--tiny]

Needs torch, transformers, Pillow, scipy (for the loss) and this checkout, not installed, and no network; weights are
rebuilt from the seeds in `tests/reference`, or random. A section that fails is recorded with its error, and one that
would begin after the time limit is left out. OUT.json is written after every section.

- exactness: all reference models in float32 (without TF32) against the recorded outputs, and in bfloat16 and float16
  against float32; post-processing on the device against the CPU;
- training: the loss on the device and on the CPU; a step of m in float32 and in bfloat16;
- aotinductor: `faim2f export torch` of m for the device, its latency and its time to load;
- latency: s, m, l and BiSeNetFormer m, plain, as a CUDA graph and compiled, and transformers' Mask2Former R50 and
  SegFormer-B0 and B5, in float16, batch 1 and 16, 640x640.

`--tiny` runs every section at small sizes with small models, to test this script on a CPU.
"""

import argparse
import copy
import importlib.util
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import hf_faim2f

if importlib.util.find_spec("hf_faim2f.conversion") is None:  # a checkout that is not installed
    import conversion

    sys.modules["hf_faim2f.conversion"] = hf_faim2f.conversion = conversion  # type: ignore[attr-defined]
from hf_faim2f import FaiM2FForUniversalSegmentation, FaiM2FImageProcessor
from hf_faim2f.family import load_config
from hf_faim2f.files import write_whole
from tests.support.reference_models import MODELS, outputs, pixels, reference_model, relative_error, small_model

KEYS = ("class_queries_logits", "masks_queries_logits")
OURS = {"s": "fai-m2f-s-ade", "m": "fai-mf-m-ade", "l": "fai-mf-l-ade", "BiSeNetFormer m": "bisenetformer-m-ade"}
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SEGFORMERS = {
    "SegFormer-B0": {},
    "SegFormer-B5": {"hidden_sizes": [64, 128, 320, 512], "depths": [3, 6, 40, 3], "decoder_hidden_size": 768},
}
MASKS, CLASSES = 12, 150
Job = Callable[[], object]


class Machine:
    """The device and the sizes of a run."""

    def __init__(self, device: str, tiny: bool, minutes: float) -> None:
        self.device, self.tiny = torch.device(device), tiny
        self.end = time.perf_counter() + 60 * minutes
        self.gpu = self.device.type == "cuda"
        self.size = 64 if tiny else 640
        self.batches = (1, 2) if tiny else (1, 16)
        self.runs = 2 if tiny else 20

    def model(self, name: str) -> FaiM2FForUniversalSegmentation:
        torch.manual_seed(0)
        return small_model() if self.tiny else FaiM2FForUniversalSegmentation(load_config(name)).eval()

    def is_late(self) -> bool:
        """Whether the time limit has passed."""
        return time.perf_counter() > self.end

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize(self.device)

    def milliseconds(self, job: Job) -> float:
        """The median of the runs of a job, after two for warming up."""
        seconds = []
        for run in range(self.runs + 2):
            self.wait()
            start = time.perf_counter()
            job()
            self.wait()
            if run >= 2:
                seconds.append(time.perf_counter() - start)
        return round(1000 * statistics.median(seconds), 3)


def exactness(machine: Machine) -> dict[str, Any]:
    """Errors relative to the largest value of each output."""
    found: dict[str, Any] = {}
    for name in MODELS[:1] if machine.tiny else MODELS:
        model, images, expected = reference_model(name), pixels(name), outputs(name)
        model = model.optimize_for_inference().to(machine.device)
        with torch.no_grad():
            exact = {key: model(images.to(machine.device))[key].float().cpu() for key in KEYS}
            found[name] = {"fp32": {key: relative_error(exact[key], expected[key]) for key in KEYS}}
            for half, dtype in HALVES.items():
                if half == "fp16" and not machine.gpu:
                    continue
                raw = copy.deepcopy(model).to(dtype)(images.to(machine.device, dtype))  # .to() converts in place
                # Rounding decides where some queries attend; the median says what is typical.
                found[name][half] = {key: _median_error(raw[key].float().cpu(), exact[key]) for key in KEYS}
    found["post_processing"] = _post_processing(machine)
    return found


def _median_error(ours: Tensor, theirs: Tensor) -> float:
    """The median over queries of the largest error of each, as a share of the largest value."""
    return float((ours - theirs).abs().flatten(2).amax(-1).median() / theirs.abs().max())


def _post_processing(machine: Machine) -> dict[str, Any]:
    """The share of pixels, and the number of segments, that differ between the device and the CPU."""
    side, draw = machine.size // 4, torch.Generator().manual_seed(0)
    coarse = 8 * torch.randn(1, 20, 5, 5, generator=draw)
    logits = {
        KEYS[0]: 4 * torch.randn(1, 20, CLASSES + 1, generator=draw),
        KEYS[1]: nn.functional.interpolate(coarse, size=(side, side), mode="bilinear"),
    }
    processor = FaiM2FImageProcessor.from_model_config(load_config(OURS["m"]))
    sizes = [(machine.size, machine.size)]
    answers = []
    for device in ("cpu", machine.device):
        here: Any = {name: values.to(device) for name, values in logits.items()}
        label_map = processor.post_process_semantic_segmentation(here, sizes)[0].cpu()
        panoptic = processor.post_process_panoptic_segmentation(here, 0.3, label_ids_to_fuse=set(), target_sizes=sizes)
        detections = processor.post_process_detections(here, sizes, sizes[0], threshold=0.3)
        answers.append((label_map, panoptic[0]["segmentation"].cpu(), len(detections[0])))
    (labels, segments, count), others = answers
    return {
        "label_map": float((labels != others[0]).double().mean()),
        "panoptic": float((segments != others[1]).double().mean()),
        "detections": [count, others[2]],
    }


def _step(machine: Machine, name: str, half: torch.dtype | None = None) -> Callable[[torch.device], Tensor]:
    """Forward, loss and backward of a new model on a device; returns the loss."""
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, machine.size, machine.size, generator=draw)
    cells = torch.randint(MASKS, (1, 1, 8, 8), generator=draw).float()
    ids = nn.functional.interpolate(cells, size=machine.size, mode="nearest")[0, 0]
    masks = (ids == torch.arange(MASKS)[:, None, None]).float()
    model = machine.model(name).train()
    classes = torch.arange(MASKS) % model.config.num_labels

    def run(device: torch.device) -> Tensor:
        model.to(device).zero_grad()
        torch.manual_seed(2)
        with torch.autocast(device.type, half, enabled=half is not None):
            labels = {"mask_labels": [masks.to(device)] * 2, "class_labels": [classes.to(device)] * 2}
            loss: Tensor = model(images.to(device), **labels).loss
        loss.backward()
        return loss.detach()

    return run


def _loss(machine: Machine) -> dict[str, float]:
    """The loss on the CPU and on the device. Points are drawn at random, by each device's own generator."""
    run = _step(machine, OURS["s"])
    return {"cpu": float(run(torch.device("cpu"))), "device": float(run(machine.device))}


def latency(machine: Machine) -> dict[str, Any]:
    """Milliseconds of the network by contender and batch; compiled only at batch 1, while there is time."""
    dtype = torch.float16 if machine.gpu else torch.float32
    found: dict[str, Any] = {}
    for title, make in _contenders(machine).items():
        network = make().to(machine.device, dtype)
        own = found.setdefault(title, {})
        for batch in machine.batches:
            images = torch.randn(batch, 3, machine.size, machine.size).to(machine.device, dtype)
            ways: dict[str, Callable[[], Job]] = {"plain": partial(_plain, network, images)}
            if title in OURS and machine.gpu:
                ways["CUDA graph"] = partial(_captured, network, images)
            if title in OURS and batch == 1 and not machine.tiny:
                ways["compiled"] = partial(_compiled, network, images)
            for way, prepare in ways.items():
                key = f"batch {batch}, {way}"
                try:
                    with torch.no_grad():
                        own[key] = "no time" if machine.is_late() else machine.milliseconds(prepare())
                except Exception as error:  # such as too little memory; other contenders still run
                    own[key] = f"{type(error).__name__}: {error}"[:300]
    return found


def _plain(network: nn.Module, images: Tensor) -> Job:
    return partial(network, images)


def _compiled(network: nn.Module, images: Tensor) -> Job:
    return partial(torch.compile(network, dynamic=False), images)


def _captured(network: nn.Module, images: Tensor) -> Job:
    """The network as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        network(images)
        network(images)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        network(images)
    return graph.replay


def _optimized(machine: Machine, name: str) -> nn.Module:
    return machine.model(name).optimize_for_inference()


def _segformer(config: Any) -> nn.Module:
    return transformers.SegformerForSemanticSegmentation(config).eval()


def _contenders(machine: Machine) -> dict[str, Callable[[], nn.Module]]:
    found: dict[str, Callable[[], nn.Module]] = {
        title: partial(_optimized, machine, name) for title, name in OURS.items()
    }
    if machine.tiny:
        return {"s": found["s"]}
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = transformers.ResNetConfig(out_features=stages).to_dict()
    mask2former = transformers.Mask2FormerConfig(backbone_config=backbone, num_labels=CLASSES)
    found["Mask2Former R50"] = lambda: transformers.Mask2FormerForUniversalSegmentation(mask2former).eval()
    for title, changes in SEGFORMERS.items():
        config = transformers.SegformerConfig(num_labels=CLASSES, **changes)
        found[title] = partial(_segformer, config)
    return found


def training(machine: Machine) -> dict[str, Any]:
    """The loss on both devices; milliseconds and peak memory of forward, loss and backward, batch 2."""
    found: dict[str, Any] = {"loss": _loss(machine)}
    for name, half in (("fp32", None), ("bf16", torch.bfloat16)):
        run = _step(machine, OURS["m"], half)
        if machine.gpu:
            torch.cuda.reset_peak_memory_stats(machine.device)
        found[name] = {"milliseconds": machine.milliseconds(partial(run, machine.device))}
        if machine.gpu:
            found[name]["megabytes"] = torch.cuda.max_memory_allocated(machine.device) / 2**20
    return found


def aotinductor(machine: Machine) -> dict[str, Any]:
    """The package of m (of the small model in a tiny run): its check, seconds to write and load, and milliseconds."""
    from hf_faim2f.export.aotinductor import export_package, open_package, read_description

    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "model", Path(folder) / "package"
        model = machine.model(OURS["m"])
        model.save_pretrained(source)
        FaiM2FImageProcessor.from_model_config(model.config).save_pretrained(source)
        start = time.perf_counter()
        size = (machine.size, machine.size)
        precision = "bf16" if machine.gpu else "fp32"
        lines = export_package(source, out, size=size, batch=1, precision=precision, device=machine.device.type)
        written = time.perf_counter()
        run = open_package(read_description(out))
        opened = time.perf_counter()
        images = torch.randn(1, 3, *size).to(machine.device)
        return {
            "checked": lines,
            "precision": precision,
            "seconds_to_write": written - start,
            "seconds_to_load": opened - written,
            "milliseconds": machine.milliseconds(lambda: run(images)),
        }


SECTIONS: dict[str, Callable[[Machine], dict[str, Any]]] = {
    "exactness": exactness,
    "training": training,
    "aotinductor": aotinductor,
    "latency": latency,
}


def main() -> None:
    """Runs the sections and writes the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=8.0, help="no section begins after this time (default: 8)")
    parser.add_argument("--sections", nargs="+", choices=tuple(SECTIONS), default=tuple(SECTIONS))
    parser.add_argument("--tiny", action="store_true", help="small sizes and models: a test of this script")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    transformers.utils.logging.set_verbosity_error()
    machine = Machine(options.device, options.tiny, options.minutes)
    start = time.perf_counter()
    document: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(machine.device) if machine.gpu else platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tiny": options.tiny,
    }
    for name in options.sections:
        if machine.is_late():
            document[name] = {"left_out": f"after {options.minutes:g} minutes"}
        else:
            try:
                document[name] = SECTIONS[name](machine)
            except Exception as error:  # other sections still run
                document[name] = {"error": f"{type(error).__name__}: {error}"[:1000]}
        document["seconds"] = round(time.perf_counter() - start, 1)
        write_whole(options.out, json.dumps(document, indent=2).encode())
        print(f"{name}: {json.dumps(document[name])[:2000]}", flush=True)


if __name__ == "__main__":
    main()

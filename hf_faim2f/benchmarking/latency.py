"""Latency and throughput of a predictor: preprocessing, network and post-processing, one after the other in one thread.

- **preprocess**: from decoded images in memory to the network's batch, (B, 3, H, W) on the CPU;
- **network**: from that batch to the outputs, on the runtime's device. On a GPU it is timed with CUDA events after all
  earlier work has finished, and includes the transfer of the batch;
- **postprocess**: from the outputs to a `Prediction` per image, at the image's own size, on the CPU;
- **end_to_end**: wall-clock time from the start of the first step to the end of the last. On a GPU it may exceed their
  sum by the time that the CPU waits for the GPU outside the timed events.

Unlike `Predictor.__call__`, this does not prepare images ahead in a background thread.
"""

import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ImageError, PredictorError, first_line
from ..export.onnx import LARGEST_SIDE, SMALLEST_SIDE, resizing_to
from ..model.image_processing_faim2f import FaiM2FImageProcessor, resized_size
from ..runtime.prediction import Prediction
from ..runtime.predictor import Predictor
from ..version import __version__

STEPS = ("preprocess", "network", "postprocess")
END_TO_END = "end_to_end"
Clock = Callable[[], float]
CPU_INFO = Path("/proc/cpuinfo")
# Packages whose versions are reported if a run has imported them.
LIBRARIES = ("torch", "transformers", "numpy", "onnxruntime", "tensorrt", "tensorrt_rtx")


@dataclass
class Contender:
    """A predictor with the images and the subtask to measure.

    Args:
        predictor: the predictor to time.
        images: decoded, of a type that `Predictor` accepts.
        subtask: as in `Predictor`; None for its default.

    Attributes:
        sizes: the distinct (height, width) of the images at the network, in order of appearance.
        gpu: the GPU that holds the outputs, known after the first run.

    Raises:
        PredictorError: the network does not support the subtask.
        ImageError: an image cannot be used.
    """

    predictor: Predictor
    images: Sequence[Any]
    subtask: str | None = None
    sizes: list[tuple[int, int]] = field(init=False)
    gpu: torch.device | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if not self.images:
            raise ImageError("There are no images to measure with: pass at least one.")
        self.subtask = self.predictor._check_request(self.subtask, None, None)[0]
        self.sizes = []
        self._pixels: list[tuple[int, int]] = []  # of each image, at the network and its own
        for place, image in enumerate(self.images):
            prepared = self.predictor._prepare((place, image))
            if prepared.error is not None:
                raise prepared.error
            height, width = prepared.values.shape[1:]
            if (height, width) not in self.sizes:
                self.sizes.append((height, width))
            self._pixels.append((height * width, prepared.image.width * prepared.image.height))

    def largest(self, count: int) -> list[Any]:
        """The images that need the most memory: the largest at the network, then those with the most pixels themselves.

        Returns:
            `count` images, but at least two; fewer if there are not so many.
        """
        places = sorted(range(len(self.images)), key=lambda place: self._pixels[place][1], reverse=True)
        first = max(places, key=lambda place: self._pixels[place][0])
        return [self.images[place] for place in dict.fromkeys([first, *places])][: max(count, 2)]

    def check_batch(self, batch_size: int) -> None:
        """Raises PredictorError if the network or the images do not allow this batch size."""
        name = self.predictor.network.name
        self.predictor._check_request(self.subtask, None, batch_size)
        if batch_size > 1 and len(self.sizes) > 1:
            first, second = (f"{height}x{width}" for height, width in self.sizes[:2])
            raise PredictorError(
                f"The images come to the network of {name} in {len(self.sizes)} sizes, such as {first} and {second} "
                "(height x width), and those of one batch must have one: choose the batch size 1, or one size."
            )

    def run(
        self, turn: int, batch_size: int, clock: Clock = time.perf_counter
    ) -> tuple[dict[str, float], list[Prediction]]:
        """Runs and times one batch.

        Args:
            turn: the index of the batch; after the last image, batches start again from the first.
            batch_size: number of images in a batch.
            clock: returns seconds.

        Returns:
            The seconds of each step and in total, and the predictions.

        Raises:
            PredictorError: the network fails.
        """
        places = [(turn * batch_size + k) % len(self.images) for k in range(batch_size)]
        chosen = [(place, self.images[place]) for place in places]
        gpu, network = self.gpu, self.predictor.network
        _wait(gpu)
        start = clock()
        prepared = [self.predictor._prepare(entry) for entry in chosen]
        batch = torch.stack([one.values for one in prepared])
        ready = clock()
        try:
            outputs, by_events = _on_gpu(network.run, batch, gpu) if gpu else (network.run(batch), None)
        except PredictorError:
            raise
        # Runtimes may raise any type, for example if GPU memory runs out or a kernel fails.
        except Exception as error:
            height, width = batch.shape[-2:]
            raise PredictorError(
                f"The network of {network.name} fails on {batch_size} {'image' if batch_size == 1 else 'images'} of "
                f"{height}x{width} at once: {first_line(error)}."
            ) from error
        done = clock()
        assert self.subtask is not None
        predictions = list(self.predictor._answers(prepared, outputs, self.subtask, None))
        _wait(gpu)
        end = clock()
        self.gpu = next((values.device for values in outputs.values() if values.is_cuda), None)
        seconds = {
            "preprocess": ready - start,
            "network": done - ready if by_events is None else by_events,
            "postprocess": end - done,
            END_TO_END: end - start,
        }
        return seconds, predictions


@dataclass(frozen=True)
class Latency:
    """Measurements of one contender at one batch size.

    Args:
        batch_size: images in a batch.
        seconds: the seconds of every run in order, for each of `STEPS` and `END_TO_END`.
    """

    batch_size: int
    seconds: dict[str, list[float]]

    @property
    def runs(self) -> int:
        """The number of measured runs."""
        return len(self.seconds[END_TO_END])

    def median(self, step: str = END_TO_END) -> float:
        """Median seconds per batch."""
        return statistics.median(self.seconds[step])

    def p99(self, step: str = END_TO_END) -> float:
        """99th percentile of the seconds per batch; the maximum of fewer than 100 runs."""
        ordered = sorted(self.seconds[step])
        return ordered[math.ceil(99 * len(ordered) / 100) - 1]

    def images_per_second(self, step: str = END_TO_END) -> float:
        """The number of images divided by the total time of all runs."""
        return self.batch_size * self.runs / max(sum(self.seconds[step]), 1e-9)


def measure_in_turn(
    jobs: Sequence[tuple[Contender, int]],
    runs: int,
    warm_up: int = 3,
    clock: Clock = time.perf_counter,
    after_each: Callable[[], object] = lambda: None,
) -> list[Latency]:
    """Measures several jobs in turn, A B C A B C ..., so that drift of the machine's speed affects all of them equally.

    Args:
        jobs: contenders, each with a batch size.
        runs: measured runs of each job, at least 1.
        warm_up: warm-up runs of each job, at least 1 (they detect whether outputs are on a GPU).
        clock: returns seconds.
        after_each: called after every run.

    Returns:
        One latency per job.

    Raises:
        PredictorError: a network does not accept the batch size, or fails.
        ValueError: `runs` or `warm_up` is below 1.
    """
    for name, number in (("runs", runs), ("warm_up", warm_up)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, not {number}.")
    for contender, batch_size in jobs:
        contender.check_batch(batch_size)
    measured: list[dict[str, list[float]]] = [{step: [] for step in (*STEPS, END_TO_END)} for _ in jobs]
    for turn in range(warm_up + runs):
        for (contender, batch_size), seconds in zip(jobs, measured, strict=True):
            taken, _ = contender.run(turn, batch_size, clock)
            if turn >= warm_up:
                for step, value in taken.items():
                    seconds[step].append(value)
            after_each()
    return [Latency(batch_size, seconds) for (_, batch_size), seconds in zip(jobs, measured, strict=True)]


def _wait(gpu: torch.device | None) -> None:
    """Waits until the GPU is idle."""
    if gpu is not None:
        torch.cuda.synchronize(gpu)


def _on_gpu(
    run: Callable[[Tensor], dict[str, Tensor]], batch: Tensor, gpu: torch.device
) -> tuple[dict[str, Tensor], float]:
    """Runs a batch; returns the outputs and the seconds between CUDA events before and after."""
    with torch.cuda.device(gpu):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        outputs = run(batch)
        after.record()
        torch.cuda.synchronize(gpu)
    return outputs, before.elapsed_time(after) / 1000


def describe_machine() -> dict[str, Any]:
    """Date (UTC), CPU, cores and load, torch's threads, GPUs and versions, as plain data."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    loaded = {name: getattr(sys.modules.get(name), "__version__", None) for name in LIBRARIES}
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        # Load average of the last minute: figures from a busy machine are unreliable.
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "hf-faim2f": __version__,
            "python": platform.python_version(),
            **{name: str(version) for name, version in loaded.items() if version},
        },
    }


def cpu_name() -> str:
    """The CPU model, if the system reports it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", CPU_INFO.read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def own_size(processor: FaiM2FImageProcessor) -> tuple[int, int]:
    """The (height, width) that the image processor resizes a square image to."""
    settings: dict[str, Any] = processor.to_dict()
    size: dict[str, int] = settings["size"]
    square = size.get("shortest_edge", 1)
    return resized_size(square, square, size, settings["size_divisor"])


def open_at_size(
    path: str | os.PathLike[str], runtime: str, device: str | None = None, size: tuple[int, int] | None = None
) -> Predictor:
    """Opens a predictor that resizes all images to one size.

    Args:
        path, runtime, device: as in `Predictor.from_pretrained`.
        size: (height, width) in pixels; None for the image processor's own.

    Raises:
        PredictorError: the model cannot be opened, or its graph does not accept the size.
    """
    if size is not None and not all(SMALLEST_SIDE <= side <= LARGEST_SIDE for side in size):
        raise PredictorError(
            f"size {size[0]}x{size[1]} (height x width) is not supported: each side must have {SMALLEST_SIDE} to "
            f"{LARGEST_SIDE} pixels."
        )
    predictor = Predictor.from_pretrained(path, runtime, device)
    network = predictor.network
    if size is None or size == network.size:
        return predictor
    if network.size is not None:
        raise PredictorError(
            f"The graph of {network.name} takes {network.size[0]}x{network.size[1]} pixels (height x width), not "
            f"{size[0]}x{size[1]}: leave the size out, or export it for that one."
        )
    return Predictor(replace(network, processor=resizing_to(network.processor, size)))


__all__ = [
    "END_TO_END",
    "STEPS",
    "Contender",
    "Latency",
    "cpu_name",
    "describe_machine",
    "measure_in_turn",
    "open_at_size",
    "own_size",
]

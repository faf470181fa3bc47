"""What a figure was measured with: the machine, and the versions of what ran."""

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
from ..model.image_processing_faim2f import FaiM2FImageProcessor, resized_size
from ..runtime.prediction import Prediction
from ..runtime.predictor import Predictor
from ..version import __version__

PROCESSORS = Path("/proc/cpuinfo")
# Told where a run has loaded them.
LIBRARIES = ("torch", "transformers", "numpy", "onnxruntime", "tensorrt", "tensorrt_rtx")


def describe_machine() -> dict[str, Any]:
    """Date (UTC), processor, its cores and how busy they are, torch's threads, GPUs, and versions, as plain data."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    loaded = {name: getattr(sys.modules.get(name), "__version__", None) for name in LIBRARIES}
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        # How many programs wanted a core in the minute before: figures of a busy machine are worth little.
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


def processor_name() -> str:
    """The processor's model, as well as the system tells it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", PROCESSORS.read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


# The size at which a predictor's network sees images, as its processor has it or as it is asked for.

SMALLEST_SIDE, LARGEST_SIDE = 32, 8192  # as in exported graphs


def own_size(processor: FaiM2FImageProcessor) -> tuple[int, int]:
    """(height, width) that the processor resizes to; of one that keeps proportions that of a square image."""
    settings: dict[str, Any] = processor.to_dict()
    size: dict[str, int] = settings["size"]
    square = size.get("shortest_edge", 1)
    return resized_size(square, square, size, settings["size_divisor"])


def open_at_size(
    path: str | os.PathLike[str], runtime: str, device: str | None = None, size: tuple[int, int] | None = None
) -> Predictor:
    """A predictor whose images are all resized to one size.

    Args:
        path, runtime, device: as `Predictor.from_pretrained` takes them.
        size: (height, width) in pixels; None for the processor's own way.

    Raises:
        PredictorError: there is no such predictor, or its graph does not take the size.
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
    settings: dict[str, Any] = network.processor.to_dict()
    settings.update(do_resize=True, size={"height": size[0], "width": size[1]}, size_divisor=0, pad_size=None)
    processor = FaiM2FImageProcessor.from_dict(settings)
    return Predictor(replace(network, processor=processor))


# How long a predictor takes for a batch, in its three steps, and how many images a second that makes.
#
# The steps are the predictor's own, one after the other in one thread (a `Predictor` that is called prepares images
# ahead, in another):
#
# - **preprocess**: from decoded images in memory to the batch that the network takes, (B, 3, H, W) on the processor;
# - **network**: from that batch to the network's outputs, where the runtime leaves them. Where that is a GPU it is
#   timed
#   by CUDA events on it, after it has done all earlier work, and what takes the batch there is part of it;
# - **postprocess**: from the outputs to a `Prediction` an image, at the image's own size, on the processor.
#
# **end_to_end** is one clock's time from the beginning of the first to the end of the last. On a processor the steps
# add
# up to it. On a GPU they may leave some of it out: what the processor waits for the GPU beyond its events.

STEPS = ("preprocess", "network", "postprocess")
END_TO_END = "end_to_end"
Clock = Callable[[], float]


@dataclass
class Contender:
    """A predictor with what it shall predict.

    Args:
        predictor: whose steps are timed.
        images: decoded ones, as `Predictor` takes them.
        subtask: as `Predictor` takes it.

    Attributes:
        sizes: the (height, width) that the images have at the network, padding included; each once, as they come.
        gpu: the one where the outputs are, once it has run.

    Raises:
        PredictorError: this network does not answer that.
        ImageError: an image cannot be used.
    """

    predictor: Predictor
    images: Sequence[Any]
    subtask: str | None = None
    sizes: list[tuple[int, int]] = field(init=False)
    gpu: torch.device | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if not self.images:
            raise ImageError("There is no image to measure with: pass at least one.")
        self.subtask = self.predictor._check_request(self.subtask, None, None)[0]
        self.sizes = []
        for place, image in enumerate(self.images):
            prepared = self.predictor._prepare((place, image))
            if prepared.error is not None:
                raise prepared.error
            height, width = prepared.values.shape[1:]
            if (height, width) not in self.sizes:
                self.sizes.append((height, width))

    def check_batch(self, batch_size: int) -> None:
        """PredictorError if images cannot go through this network so many at once."""
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
        """One batch, timed.

        Args:
            turn: which of the images: batch after batch, and after the last from the first on.
            batch_size: how many.
            clock: gives seconds.

        Returns:
            Seconds of each step and of all together; and the predictions, which are the predictor's for these images.

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
        # What an engine or a graph of a stranger makes of a batch, a GPU's memory that is full, a kernel that fails.
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
    """What was measured of one contender at one batch size.

    Args:
        batch_size: images at once.
        seconds: of every run, in their order, for each of `STEPS` and `END_TO_END`.
    """

    batch_size: int
    seconds: dict[str, list[float]]

    @property
    def runs(self) -> int:
        return len(self.seconds[END_TO_END])

    def median(self, step: str = END_TO_END) -> float:
        """Seconds a batch that half of the runs took at most; between the two in the middle of an even number."""
        return statistics.median(self.seconds[step])

    def p99(self, step: str = END_TO_END) -> float:
        """Seconds a batch that 99 of 100 runs took at most; of fewer than 100 runs the longest."""
        ordered = sorted(self.seconds[step])
        return ordered[math.ceil(99 * len(ordered) / 100) - 1]

    def images_per_second(self, step: str = END_TO_END) -> float:
        """All images over the time of all runs."""
        return self.batch_size * self.runs / max(sum(self.seconds[step]), 1e-9)


def measure_in_turn(
    jobs: Sequence[tuple[Contender, int]],
    runs: int,
    warm_up: int = 3,
    clock: Clock = time.perf_counter,
    after_each: Callable[[], object] = lambda: None,
) -> list[Latency]:
    """Latencies of several jobs: A B C A B C ..., so that a machine whose speed drifts slows all alike.

    Args:
        jobs: what is measured, each a contender with the number of images that go through it at once.
        runs: of each job, that count; at least 1.
        warm_up: runs of each before them that do not; at least 1, of which a GPU is known.
        clock: gives seconds.
        after_each: called after every run.

    Returns:
        One a job.

    Raises:
        PredictorError: a network does not take the batch, or fails.
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
    """Until the GPU has done what it was given."""
    if gpu is not None:
        torch.cuda.synchronize(gpu)


def _on_gpu(
    run: Callable[[Tensor], dict[str, Tensor]], batch: Tensor, gpu: torch.device
) -> tuple[dict[str, Tensor], float]:
    """Outputs, and the seconds between two events on the GPU's stream before and after."""
    with torch.cuda.device(gpu):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        outputs = run(batch)
        after.record()
        torch.cuda.synchronize(gpu)
    return outputs, before.elapsed_time(after) / 1000


__all__ = [
    "END_TO_END",
    "STEPS",
    "Contender",
    "Latency",
    "describe_machine",
    "measure_in_turn",
    "open_at_size",
    "own_size",
    "processor_name",
]

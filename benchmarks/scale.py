"""Growth of time and memory with the batch size, the image size, the network's input size, queries and classes.

    python benchmarks/scale.py [RUNS [AXIS ...]]        # such as: 3 "network, batch"

fai-mf-m-ade with random weights; post-processing gets the realistic logits of benchmarks/post_processing.py, because
random weights give noise. While one axis varies, the others are fixed: batch size 1, a network input of 640x640, 100
queries, 150 classes, an image of 640x640.

- network: against the batch size, the input's size, queries and classes;
- other steps: preprocessing, and post-processing to semantic maps, instances and panoptic segments, against the image's
  side from 256 to 4096, queries and classes, one image at a time.

The values of an axis run in turn, so that drift of the machine's speed affects all of them equally. "growth" is the
time per unit (image, pixel, query, class) relative to the smallest value: 1 is linear, less is better. Memory is the
peak growth of a fresh process at both ends of an axis. "kernel" is the median time that all cores spend in the
operating system, here mostly in page faults on memory that the C library returned to the kernel;
docs/memory_allocators.md describes how to avoid that.
"""

import math
import os
import resource
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from measurement import extra_memory, record, time_in_turn
from post_processing import realistic_logits
from torch import Tensor
from untrained import photograph

from hf_faim2f import FaiM2FForUniversalSegmentation, FaiM2FImageProcessor
from hf_faim2f.family import load_config
from hf_faim2f.model import focoos_post_processing_faim2f as focoos
from hf_faim2f.model import post_processing_faim2f as post

NAME, SIDE, QUERIES, CLASSES = "fai-mf-m-ade", 640, 100, 150
BATCHES = (1, 2, 4, 8, 16)
NETWORK_SIDES = (256, 512, 1024, 2048, 4096)
IMAGE_SIDES = (256, 512, 1024, 2048, 4096)
SEVERAL_QUERIES = (50, 100, 200, 400)
SEVERAL_CLASSES = (20, 150, 600, 1200)
STEPS = ("preprocess", "semantic", "detections", "panoptic")
Job = Callable[[], object]


def network(batch: int = 1, side: int = SIDE, queries: int = QUERIES, classes: int = CLASSES) -> Job:
    """One run of the network."""
    torch.manual_seed(0)
    config = load_config(NAME)
    config.num_queries = queries
    config.num_labels = classes
    model = FaiM2FForUniversalSegmentation(config).optimize_for_inference()
    images = torch.randn(batch, 3, side, side)

    def run() -> None:
        with torch.no_grad():
            model(pixel_values=images)

    return run


def logits(queries: int, classes: int) -> tuple[Tensor, Tensor]:
    """Realistic class and mask logits for `queries` queries; additional ones are confident in no object."""
    class_logits, mask_logits = realistic_logits(classes)
    if queries <= class_logits.shape[1]:
        sure_first = class_logits[0, :, -1].argsort()[:queries]
        return class_logits[:, sure_first], mask_logits[:, sure_first]
    unsure = class_logits[0, :, -1].argsort(descending=True)[:80]
    more = unsure.repeat(-(-queries // len(unsure)))[: queries - class_logits.shape[1]]
    return tuple(torch.cat([values, values[:, more]], 1) for values in (class_logits, mask_logits))  # type: ignore


def step_job(step: str, side: int = SIDE, queries: int = QUERIES, classes: int = CLASSES) -> Job:
    """Preprocessing of one image, or post-processing to its size."""
    processor = FaiM2FImageProcessor(size={"height": SIDE, "width": SIDE})
    if step == "preprocess":
        image = np.asarray(photograph(side, side))
        return partial(processor, image, return_tensors="pt")
    class_logits, mask_logits = logits(queries, classes)
    function: Callable[..., Any] = (
        focoos.post_process_detections if step == "detections" else getattr(post, f"post_process_{step}_segmentation")
    )
    options: dict[str, Any] = {"predict_all_pixels": True} if step == "detections" else {}
    sizes = [(SIDE, SIDE)] if step == "detections" else []
    call = partial(function, class_logits, mask_logits, *sizes, **options)
    call(target_sizes=[(64, 64)])
    return partial(call, target_sizes=[(side, side)])


AXES: dict[str, tuple[Callable[..., Job], str, tuple[int, ...], Callable[[int], float]]] = {
    "network, batch": (network, "batch", BATCHES, float),
    "network, side": (network, "side", NETWORK_SIDES, lambda side: side**2),
    "network, queries": (network, "queries", SEVERAL_QUERIES, float),
    "network, classes": (network, "classes", SEVERAL_CLASSES, float),
    **{
        f"{step}, image's side": (partial(step_job, step), "side", IMAGE_SIDES, lambda side: side**2) for step in STEPS
    },
    **{f"{step}, queries": (partial(step_job, step), "queries", SEVERAL_QUERIES, float) for step in STEPS[1:]},
    **{f"{step}, classes": (partial(step_job, step), "classes", SEVERAL_CLASSES, float) for step in STEPS[1:]},
}  # fmt: skip


def with_kernel_time(job: Job, kernel: list[float]) -> None:
    """Runs the job and appends the seconds that all cores spent in the kernel."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_stime
    job()
    kernel.append(resource.getrusage(resource.RUSAGE_SELF).ru_stime - before)


def main() -> None:
    """Prints the table; by default, for all axes and 3 runs."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    chosen = sys.argv[2:] or list(AXES)
    if unknown := set(chosen) - set(AXES):
        sys.exit(f"No axis is called {', '.join(sorted(unknown))}; there are: {'; '.join(AXES)}.")
    print(__doc__)
    print(f"{'':28}{'':>7} {'ms':>10} {'(min to max)':>22} {'MB':>7} {'kernel':>8} {'growth':>7}")
    table: dict[str, Any] = {}
    for axis in chosen:
        make, argument, values, units = AXES[axis]
        rows = table[axis] = {}
        jobs = {value: partial(make, **{argument: value}) for value in values}
        kernel: dict[str, list[float]] = {str(value): [] for value in values}
        contenders: dict[str, Job] = {
            str(value): partial(with_kernel_time, job(), kernel[str(value)]) for value, job in jobs.items()
        }
        times = time_in_turn(contenders, runs)
        for value, job in jobs.items():
            seconds = times[str(value)]
            in_kernel = statistics.median(kernel[str(value)][1:])  # without the warm-up
            rows[value] = {**seconds, "kernel": in_kernel}
            if value in (values[0], values[-1]):
                rows[value]["megabytes"] = extra_memory(job)
            smallest = rows[values[0]]["median"] / units(values[0])
            rows[value]["growth"] = seconds["median"] / units(value) / smallest
            spread = f"({1000 * seconds['min']:.1f} to {1000 * seconds['max']:.1f})"
            print(
                f"{axis:28}{value:7} {1000 * seconds['median']:10.1f} {spread:>22} "
                f"{rows[value].get('megabytes', math.nan):7.0f} {1000 * in_kernel:8.0f} {rows[value]['growth']:7.2f}",
                flush=True,
            )
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    record("scale", {"runs": runs, "model": NAME, "glibc_tunables": tunables, "axes": table})


if __name__ == "__main__":
    main()

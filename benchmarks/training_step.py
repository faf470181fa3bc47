"""One training step: ours against transformers' Mask2Former with a ResNet-50, on the same images and targets.

    python benchmarks/training_step.py [RUNS [NAME ...]] [--bf16 [--compile]] [--size N] [--batch N]

A step is forward, loss with deep supervision, backward and AdamW's step: batch 2 of 640x640, 12 binary masks in each
image, 150 classes, float32, random weights. NAME is a family member, by default fai-mf-m-ade.

Memory is the peak growth of a fresh process after its imports, over two steps: weights, gradients, AdamW's moments,
inputs, targets and activations kept for the backward pass. Time and memory are also given per image of the batch.

With --bf16, our models are compared with themselves in autocast to bfloat16 (`faim2f train --precision bf16`) instead,
also by their losses; times are CPU time of one thread. CPUs with AMX or AVX512-BF16 have instructions for it. With
--compile, both precisions are also compared with themselves compiled by torch.compile: forward pass, loss and backward
pass, in several graphs, because the matching of queries and targets is not compiled. Compilation takes minutes and is
not part of the times.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from functools import partial

import torch
import transformers
from measurement import extra_memory, record, row, time_in_turn
from torch import Tensor, nn
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig

from hf_faim2f import FaiM2FForUniversalSegmentation
from hf_faim2f.family import load_config

BATCH, SIZE, MASKS, CLASSES = 2, 640, 12, 150
PEER = "Mask2Former, ResNet-50"
PRECISIONS = ("fp32", "bf16")
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def targets(size: int = SIZE, batch: int = BATCH) -> tuple[list[Tensor], list[Tensor]]:
    """For each image 12 masks (12, size, size) that divide it into patches of 32 pixels, and their classes."""
    draw = torch.Generator().manual_seed(0)
    masks, classes = [], []
    for _ in range(batch):
        cells = torch.randint(MASKS, (1, 1, size // 32, size // 32), generator=draw).float()
        ids = nn.functional.interpolate(cells, size=size, mode="nearest")[0, 0].long()
        masks.append((ids == torch.arange(MASKS)[:, None, None]).float())
        classes.append(torch.randperm(CLASSES, generator=draw)[:MASKS])
    return masks, classes


def build(name: str) -> nn.Module:
    """A model with random weights, in training mode; nothing is downloaded."""
    torch.manual_seed(0)
    if name != PEER:
        return FaiM2FForUniversalSegmentation(load_config(name)).train()
    config = Mask2FormerConfig(backbone_config=ResNetConfig(out_features=STAGES), num_labels=CLASSES)
    return Mask2FormerForUniversalSegmentation(config).train()


def stepper(
    name: str, size: int = SIZE, half: bool = False, batch: int = BATCH, compiled: bool = False
) -> Callable[[], float]:
    """One step of a model with its optimizer; it returns the loss.

    Args:
        name: the model's name.
        size: height and width of the images.
        half: run the forward pass in autocast to bfloat16.
        batch: number of images.
        compiled: compile with torch.compile.
    """
    model = build(name)
    if compiled:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    mask_labels, class_labels = targets(size, batch)

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(pixel_values=images, mask_labels=mask_labels, class_labels=class_labels).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def two_steps(name: str, size: int = SIZE, half: bool = False, batch: int = BATCH) -> Callable[[], None]:
    """The job whose memory is measured, including the creation of the model and inputs."""

    def job() -> None:
        step = stepper(name, size, half, batch)
        step()
        step()  # in the first step, AdamW has no moments yet

    return job


def compare_precisions(names: list[str], runs: int, size: int, batch: int, with_compiled: bool) -> None:
    """Prints and records the CPU time of one thread, memory and loss of a step in float32 and in bfloat16.

    Args:
        names: the models' names.
        runs: repetitions.
        size: height and width of the images.
        batch: number of images.
        with_compiled: also measure each precision compiled; memory is measured for the eager step only.
    """
    torch.set_num_threads(1)
    amx, avx = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
    print(f"This CPU has AMX: {amx}, AVX512-BF16: {avx}.")
    steps: dict[str, Callable[[], float]] = {}
    jobs: dict[str, Callable[[], Callable[[], None]]] = {}
    first, seconds_to_compile = {}, {}
    for name, precision, compiled in itertools.product(names, PRECISIONS, (False, True) if with_compiled else (False,)):
        case, half = f"{name}, {precision}" + (", compiled" if compiled else ""), precision == "bf16"
        steps[case] = stepper(name, size, half, batch, compiled)
        start = time.perf_counter()
        first[case] = steps[case]()  # before the optimizer changes the weights, which are the same for all
        if compiled:
            steps[case]()  # in the second step, AdamW has its moments
            seconds_to_compile[case] = time.perf_counter() - start
            print(f"{case}: {seconds_to_compile[case]:.0f} s to compile and for two steps", flush=True)
        else:
            jobs[case] = partial(two_steps, name, size, half, batch)
    times = time_in_turn(steps, runs, threads=1, clock=time.process_time)
    memory = {case: extra_memory(job) for case, job in jobs.items()}
    last = {case: step() for case, step in steps.items()}
    for case in steps:
        base = f"{case.split(',')[0]}, fp32"
        needs = f"{memory[case]:6.0f} MB" if case in memory else ""
        print(row(case, times[case]), f"  {needs}  loss {first[case]:.3f}, after the runs {last[case]:.3f}")
        faster = f"{times[base]['median'] / times[case]['median']:.2f} times as fast as fp32"
        share = f", {memory[case] / memory[base]:.2f} of its memory" if case in memory else ""
        print(f"{'':28} {faster}{share}", flush=True)
    figures = {"runs": runs, "batch": batch, "size": size, "masks": MASKS, "amx": amx, "avx512_bf16": avx}
    losses = {"loss": first, "last_loss": last, "seconds_to_compile": seconds_to_compile}
    record("training_step_bf16", {**figures, "seconds": times, "megabytes": memory, **losses}, threads=1)


def main() -> None:
    """Prints times and memory; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="?", type=int, default=5)
    parser.add_argument("names", nargs="*", metavar="NAME", default=["fai-mf-m-ade"])
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true", help="with --bf16: also both precisions compiled")
    parser.add_argument("--size", type=int, default=SIZE, help="height and width, a multiple of 32")
    parser.add_argument("--batch", type=int, default=BATCH, help="images in a step")
    options = parser.parse_args()
    runs, size, batch = options.runs, options.size, options.batch
    if options.compile and not options.bf16:
        parser.error("--compile goes with --bf16")
    names = [*options.names, PEER]
    print(__doc__)
    transformers.logging.set_verbosity_error()
    if options.bf16:
        compare_precisions(options.names, runs, size, batch, options.compile)
        return
    times = time_in_turn({name: stepper(name, size, batch=batch) for name in names}, runs)
    memory = {name: extra_memory(partial(two_steps, name, size, batch=batch)) for name in names}
    times_as_fast = {name: times[PEER]["median"] / times[name]["median"] for name in names}
    times_the_memory = {name: memory[name] / memory[PEER] for name in names}
    for name in names:
        a_image = {key: value / batch for key, value in times[name].items()}
        print(row(f"{name}, a step", times[name]), f"  {memory[name]:6.0f} MB")
        print(row(f"{name}, an image", a_image), f"  {memory[name] / batch:6.0f} MB")
        print(
            f"{'':28} {times_as_fast[name]:.2f} times as fast, {times_the_memory[name]:.2f} of the memory", flush=True
        )
    figures = {"runs": runs, "batch": batch, "size": size, "masks": MASKS, "seconds": times, "megabytes": memory}
    record("training_step", {**figures, "times_as_fast": times_as_fast, "share_of_memory": times_the_memory})


if __name__ == "__main__":
    main()

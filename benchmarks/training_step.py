"""One training step: ours against transformers' Mask2Former with a ResNet-50, on the same images and targets.

    python benchmarks/training_step.py [RUNS [NAME ...]]

A step is forward, loss with deep supervision, backward and AdamW's step: batch 2 of 640x640, 12 binary masks in each
image, 150 classes, float32, random weights. NAME is a family member, by default fai-mf-m-ade.

Memory is the peak growth of a fresh process after its imports, over two steps: weights, gradients, AdamW's moments,
inputs, targets and activations kept for the backward pass. Time and memory are also given per image of the batch.
"""

import sys
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
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def targets() -> tuple[list[Tensor], list[Tensor]]:
    """For each image 12 masks (12, 640, 640) that divide it into patches of 32 pixels, and their classes."""
    draw = torch.Generator().manual_seed(0)
    masks, classes = [], []
    for _ in range(BATCH):
        cells = torch.randint(MASKS, (1, 1, SIZE // 32, SIZE // 32), generator=draw).float()
        ids = nn.functional.interpolate(cells, size=SIZE, mode="nearest")[0, 0].long()
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


def stepper(name: str) -> Callable[[], None]:
    """One step of a model with its optimizer."""
    model = build(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    mask_labels, class_labels = targets()

    def step() -> None:
        optimizer.zero_grad()
        model(pixel_values=images, mask_labels=mask_labels, class_labels=class_labels).loss.backward()
        optimizer.step()

    return step


def two_steps(name: str) -> Callable[[], None]:
    """The job whose memory is measured, including the creation of the model and inputs."""

    def job() -> None:
        step = stepper(name)
        step()
        step()  # in the first step, AdamW has no moments yet

    return job


def main() -> None:
    """Prints times and memory; see the top of this file."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    names = [*(sys.argv[2:] or ["fai-mf-m-ade"]), PEER]
    print(__doc__)
    transformers.logging.set_verbosity_error()
    times = time_in_turn({name: stepper(name) for name in names}, runs)
    memory = {name: extra_memory(partial(two_steps, name)) for name in names}
    times_as_fast = {name: times[PEER]["median"] / times[name]["median"] for name in names}
    times_the_memory = {name: memory[name] / memory[PEER] for name in names}
    for name in names:
        a_image = {key: value / BATCH for key, value in times[name].items()}
        print(row(f"{name}, a step", times[name]), f"  {memory[name]:6.0f} MB")
        print(row(f"{name}, an image", a_image), f"  {memory[name] / BATCH:6.0f} MB")
        print(
            f"{'':28} {times_as_fast[name]:.2f} times as fast, {times_the_memory[name]:.2f} of the memory", flush=True
        )
    figures = {"runs": runs, "batch": BATCH, "size": SIZE, "masks": MASKS, "seconds": times, "megabytes": memory}
    record("training_step", {**figures, "times_as_fast": times_as_fast, "share_of_memory": times_the_memory})


if __name__ == "__main__":
    main()

"""The largest number of images per forward pass that fits into memory.

A step keeps the recipe's batch size, for which its learning rate is tuned: smaller passes are accumulated; their
gradient is exactly that of the whole batch, except for batch norm statistics. transformers' `auto_find_batch_size`
would make the steps themselves smaller, and restart the training each time.

On a GPU, training passes are tried until one fits. On a CPU, a pass that is too large does not fail, but swaps, or the
kernel kills the process. There the memory is estimated from what autograd stores for a small pass.
"""

import copy
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import find_executable_batch_size, gather_object
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from ..data.collate import SegmentationCollator
from ..data.item import Item
from ..errors import SettingsError
from .recipe import Recipe

AUTO = "auto"
# Fraction of the memory to use. The rest is for other images with more segments, fragmentation and other programs.
SHARE = 0.85
# Peak memory of a pass on a CPU, relative to what autograd stores: temporary tensors and activation gradients. Measured
# in fresh processes: 1.5 to 1.7 (digits, fai-m2f-s-ade and fai-mf-m-ade, in fp32 and bf16).
TEMPORARIES = 1.6
# Files with the limit and the use of a container's memory (cgroup v2).
LIMIT, USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
GB = 1e9


@dataclass(frozen=True)
class Fitting:
    """The number of images per forward pass, and the reason.

    Args:
        images: images per forward pass in each process.
        why: a sentence for the user.
    """

    images: int
    why: str


def largest_batch(
    model: nn.Module,
    candidates: Sequence[Item],
    collator: SegmentationCollator,
    recipe: Recipe,
    precision: str,
    processes: int = 1,
) -> Fitting:
    """The largest divisor of each process's batch size that fits into memory. Every process must call it.

    Args:
        model: is copied, and not changed.
        candidates: augmented training items; the one with the most pixels, then segments, is used.
        collator: collates items into batches.
        recipe: its batch size is the largest that is considered.
        precision: "fp32", "bf16" or "fp16".
        processes: the number of processes among which the batch is divided.

    Raises:
        SettingsError: not even one image fits on the GPU.
    """
    own = recipe.batch_size // processes
    choices = [number for number in range(own, 0, -1) if own % number == 0]
    item = max(candidates, key=lambda one: (one["image"].numel(), len(one["classes"])))
    state = PartialState(cpu=not torch.cuda.is_available())
    with torch.random.fork_rng():
        on_gpu = state.device.type == "cuda"
        find = _largest_on_gpu if on_gpu else _largest_on_cpu
        images, memory = find(copy.deepcopy(model), item, collator, recipe, precision, choices, state.device)
    if processes > 1:
        images = min(gather_object([images]))
    passes = own // images
    made = "the recipe's batch" if passes * processes == 1 else f"{passes} x {processes} make the recipe's batch"
    return Fitting(
        images,
        f"Batch size auto: {images} images in a forward pass, {memory}; {made} of {recipe.batch_size}, so the learning "
        "rate stays.",
    )


def _largest_on_gpu(
    model: nn.Module,
    item: Item,
    collator: SegmentationCollator,
    recipe: Recipe,
    precision: str,
    choices: list[int],
    device: torch.device,
) -> tuple[int, str]:
    model = model.train().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    left = iter(choices[1:])
    index = torch.cuda.current_device() if device.index is None else device.index

    @find_executable_batch_size(starting_batch_size=choices[0], reduce_batch_size_fn=lambda: next(left, 0))
    def attempt(images: int) -> int:
        held = torch.empty(_of_optimizer(model, recipe), dtype=torch.uint8, device=device)
        for _ in range(2):  # the second pass needs more memory, because gradients already exist
            batch = _batch(item, images, collator, device)
            with _autocast(device, precision):
                loss = _loss(model, batch)
            loss.backward()
        torch.cuda.synchronize(device)
        del held
        return images

    torch.cuda.set_per_process_memory_fraction(SHARE, index)
    try:
        images: int = attempt()
    except RuntimeError as error:
        if "No executable batch size" not in str(error):
            raise
        raise SettingsError(
            "Not even one image fits into the GPU's memory: choose a smaller --image-size or --crop, or --precision "
            "bf16."
        ) from error
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    name = torch.cuda.get_device_name(index)
    return images, f"the most that fit into the memory of {name}" if images < choices[0] else f"which fit on {name}"


def _largest_on_cpu(
    model: nn.Module,
    item: Item,
    collator: SegmentationCollator,
    recipe: Recipe,
    precision: str,
    choices: list[int],
    device: torch.device,
) -> tuple[int, str]:
    model = model.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    tried = min(2, choices[0])  # batch norms may need two values
    with _autocast(device, precision):
        an_image = TEMPORARIES * kept_bytes(model, _batch(item, tried, collator, device)) / tried
    fixed = _of_optimizer(model, recipe) + sum(_size(one) for one in model.parameters() if one.requires_grad)
    # The measured copy of the model is freed before training.
    free = SHARE * free_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    images = next((number for number in choices if fixed + number * an_image <= free), 1)
    needed = (fixed + images * an_image) / GB
    if needed * GB > free:
        return images, f"although it takes about {needed:.1f} GB, and only {free / GB:.1f} GB are available"
    return images, f"which take about {needed:.1f} of {free / GB:.1f} GB of memory"


def kept_bytes(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """The bytes of the tensors that autograd stores in a forward pass for the backward pass, without the weights.

    Args:
        model: in training mode.
        batch: the model's arguments, with targets.
    """
    weights = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = _loss(model, batch)
    del loss
    return sum(size for place, size in kept.items() if place not in weights)


def free_memory() -> int:
    """The bytes of memory that are free on this machine, or within the limit of its container."""
    free = int(psutil.virtual_memory().available)
    try:
        return min(free, max(0, int(LIMIT.read_text()) - int(USED.read_text())))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return free


def _of_optimizer(model: nn.Module, recipe: Recipe) -> int:
    """The bytes of AdamW's two moments and of the averaged weights."""
    trained = sum(_size(one) for one in model.parameters() if one.requires_grad)
    return 2 * trained + (sum(map(_size, model.state_dict().values())) if recipe.ema_decay else 0)


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _batch(item: Item, images: int, collator: SegmentationCollator, device: torch.device) -> dict[str, Any]:
    batch = collator([item] * images)
    return {
        name: [one.to(device) for one in value] if isinstance(value, list) else value.to(device)
        for name, value in batch.items()
    }


def _loss(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """The loss of a pass. The number of segments is passed, so that processes do not synchronize to compute it."""
    segments = sum(len(labels) for labels in batch["class_labels"])
    loss: torch.Tensor = model(**batch, num_items_in_batch=max(1, segments)).loss
    return loss


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, TYPES[precision]) if precision in TYPES else nullcontext()


__all__ = ["AUTO", "Fitting", "free_memory", "kept_bytes", "largest_batch"]

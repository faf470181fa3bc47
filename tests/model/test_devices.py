"""What holds on every device: results in float32, areas in whole pixels, and operations that Apple's GPUs have."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torchgen
import yaml
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_faim2f import FaiM2FImageProcessor
from hf_faim2f.model import argmax_faim2f as argmax
from hf_faim2f.model import focoos_post_processing_faim2f as focoos
from hf_faim2f.model import post_processing_faim2f as post
from hf_faim2f.model import resize_faim2f as resize
from hf_faim2f.training.pixel_classes import pixel_coverage, pixel_log_probabilities
from tests.support.mask2former_models import ours_of, tiny
from tests.support.reference_models import BISENET, small_model

SIZES = [(480, 640), (90, 70)]
POST_PROCESSING: dict[str, Callable[..., Any]] = {
    "semantic": post.post_process_semantic_segmentation,
    "semantic scores": partial(post.post_process_semantic_segmentation, return_segmentation_scores=True),
    "instance": partial(post.post_process_instance_segmentation, threshold=0.2),
    "binary maps": partial(post.post_process_instance_segmentation, threshold=0.2, return_binary_maps=True),
    "panoptic": partial(
        post.post_process_panoptic_segmentation, threshold=0.2, overlap_mask_area_threshold=0.2, label_ids_to_fuse={1}
    ),
    "detections": partial(focoos.post_process_detections, network_size=(384, 384), threshold=0.2),
    "queries": partial(focoos.post_process_queries, network_size=(384, 384)),
}


def logits(queries: int = 60, classes: int = 20, side: int = 96) -> tuple[Tensor, Tensor]:
    """Confident queries with large smooth masks, many of which overlap."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(2, queries, 9, 9, generator=generator)
    masks = F.interpolate(8 * coarse - 4, size=(side, side), mode="bicubic")
    return 2 * torch.randn(2, queries, classes + 1, generator=generator), masks


def equal(ours: Any, theirs: Any) -> bool:
    """Whether two results of post-processing are the same to the bit."""
    if isinstance(ours, Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(equal(ours[key], theirs[key]) for key in ours)
    return equal(vars(ours), vars(theirs)) if hasattr(ours, "__dataclass_fields__") else ours == theirs


@pytest.mark.parametrize("name", POST_PROCESSING)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_change_results(name: str, dtype: torch.dtype) -> None:
    """People post-process where they ran the model: inside `with torch.autocast(...)`."""
    expected = POST_PROCESSING[name](*logits(), target_sizes=SIZES)
    assert len(expected) == 2
    with torch.autocast("cpu", dtype):
        assert equal(POST_PROCESSING[name](*logits(), target_sizes=SIZES), expected)


@pytest.mark.parametrize("name", POST_PROCESSING)
def test_the_default_dtype_does_not_change_results(name: str) -> None:
    """With `torch.set_default_dtype`, new tensors, and quotients of whole numbers, are in half precision."""
    inputs = logits()
    expected = POST_PROCESSING[name](*inputs, target_sizes=SIZES)
    resize.bilinear_resize.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert equal(POST_PROCESSING[name](*inputs, target_sizes=SIZES), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_areas_do_not_depend_on_the_precision_of_products() -> None:
    """GPUs, and CPUs after `set_float32_matmul_precision("medium")`, may round the factors of matrix products."""
    maps = torch.zeros(2, 4, 5)
    maps[0], maps[1, :, :2] = 0.9, 0.8
    table, size = maps.flatten(1).t().contiguous(), (1203, 1999)
    first, second = (resize.BilinearResize(a, b, torch.device("cpu")) for a, b in (((4, 5), (4, 5)), ((4, 5), size)))
    expected = (F.interpolate(maps[None], size=size, mode="bilinear")[0] >= 0.5).sum((1, 2))

    def rounded(a: Tensor, b: Tensor) -> Tensor:
        return torch.matmul(a.bfloat16().float(), b.bfloat16().float())

    for settled in (None, argmax.settle(argmax.tiles_of(table, (4, 5)), first, 1e-6, 0.5)):
        with mock.patch.object(Tensor, "__matmul__", rounded):
            _, areas = argmax.resized_argmax(
                lambda y, x: first.pixels(table, y, x), second, torch.arange(2), settled, 0.5
            )
        assert areas.tolist() == expected.tolist()


class Operations(TorchDispatchMode):
    """Collects the names of torch's operations and rejects float64, which Apple's GPUs lack."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, results)):
            assert not isinstance(value, Tensor) or value.dtype != torch.float64, f"{func} has float64"
        name, overload = func._schema.name.removeprefix("aten::"), func._schema.overload_name
        self.names.add(f"{name}.{overload}" if overload else name)
        return results


def kernels() -> dict[str, set[str]]:
    """The backends of each of torch's operations; "Composite..." stands for all that have the operations it calls."""
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    entries = {entry["func"].split("(")[0]: entry for entry in yaml.safe_load(path.read_text(encoding="utf-8"))}

    def backends(name: str) -> set[str]:
        entry = entries[name]
        own = {key.strip() for keys in entry.get("dispatch", {}) for key in keys.split(",")}
        if "structured_delegate" in entry:
            own |= backends(entry["structured_delegate"])
        return own or {"CompositeImplicitAutograd"}

    return {name: backends(name) for name in entries}


def predict(model: torch.nn.Module, images: Tensor, mask: Tensor) -> Any:
    """The logits of a batch."""
    with torch.no_grad():
        return model.eval()(pixel_values=images, pixel_mask=mask)


def step(model: torch.nn.Module, images: Tensor, masks: list[Tensor], classes: list[Tensor]) -> list[Tensor]:
    """The losses and gradients of a training step."""
    model.zero_grad()
    output = model.train()(pixel_values=images, mask_labels=masks, class_labels=classes)
    output.loss.backward()
    return [*output.loss_dict.values(), *(weight.grad for weight in model.parameters() if weight.grad is not None)]


def distill(model: torch.nn.Module, images: Tensor, points: Tensor) -> list[Tensor]:
    """What a student learns from, at some points."""
    output = predict(model, images, torch.ones_like(images[:, 0], dtype=torch.int64))
    masks, classes = output.masks_queries_logits, output.class_queries_logits
    return [
        pixel_log_probabilities(masks, classes, points, cls_sigmoid=False),
        pixel_coverage(masks, classes, points, cls_sigmoid=False),
    ]


def works_of(name: str, make: Callable[[], torch.nn.Module]) -> dict[str, tuple[Any, ...]]:
    """Prediction with padding, training, and training with labels that a collator left on the CPU."""
    model, images = make(), torch.randn(2, 3, 64, 96)
    mask = torch.ones(2, 64, 96, dtype=torch.int64)
    mask[1, 40:] = 0
    masks, classes = (
        [(torch.rand(n, 64, 96) > 0.7).float() for n in (3, 1)],
        [torch.tensor([0, 1, 0]), torch.tensor([1])],
    )
    return {
        f"{name}, prediction": (predict, model, images, mask),
        f"{name}, step": (step, model, images, masks, classes),
        f"{name}, step with labels on the CPU": (partial(step, masks=masks, classes=classes), model, images),
        f"{name}, distillation": (distill, model, images, torch.rand(50, 2)),
    }


def all_work() -> dict[str, tuple[Any, ...]]:
    """Functions of tensors and models, each with its arguments, on the CPU."""
    return {
        **{name: (partial(call, target_sizes=SIZES), *logits()) for name, call in POST_PROCESSING.items()},
        **works_of("fai", small_model),
        **works_of("bisenetformer", partial(small_model, **BISENET)),
        **works_of("mask2former", lambda: ours_of(tiny())),
    }


# On other devices, `scaled_dot_product_attention` chooses another kernel.
OF_CPUS = {"_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"}


def test_apple_gpus_have_every_operation() -> None:
    """No such GPU is needed: torch lists the backends of its operations, and MPS has all of these, but no float64."""
    known = kernels()
    for name, (work, *inputs) in all_work().items():
        with Operations() as seen:
            work(*inputs)
        assert len(seen.names) > 10, name
        missing = [
            operation
            for operation in seen.names - OF_CPUS
            if "MPS" not in known[operation] and not any(key.startswith("Composite") for key in known[operation])
        ]
        assert not missing, name


def test_images_are_prepared_without_float64() -> None:
    with Operations():
        FaiM2FImageProcessor(size={"height": 64, "width": 96})(torch.zeros(3, 50, 70, dtype=torch.uint8))


@pytest.mark.slow
def test_on_a_second_device_results_are_those_of_the_cpu() -> None:
    """An emulated device, which rejects what a GPU would; see `tests.support.second_device`."""
    command = [sys.executable, "-m", "tests.support.second_device"]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    differences = json.loads(result.stdout.splitlines()[-1])
    assert set(differences) == set(all_work())
    assert {name: value for name, value in differences.items() if value > (1e-4 if "," in name else 0)} == {}

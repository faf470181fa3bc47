"""What holds on every device: results in float32, areas in whole pixels, and operations that Apple's GPUs have."""

import json
import subprocess
import sys
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
from hf_faim2f.model import resize_faim2f as resize
from tests.support.device_work import POST_PROCESSING, SIZES, all_work, logits


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


@pytest.mark.large
def test_on_a_second_device_results_are_those_of_the_cpu() -> None:
    """An emulated device, which rejects what a GPU would; see `tests.support.second_device`."""
    command = [sys.executable, "-m", "tests.support.second_device"]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    differences = json.loads(result.stdout.splitlines()[-1])
    assert set(differences) == set(all_work())
    assert {name: value for name, value in differences.items() if value > (1e-4 if "," in name else 0)} == {}

"""A second device for torch, emulated on the CPU: what runs on it would find its tensors in the right place on a GPU.

As on a GPU, operations reject operands on two devices (except scalars, copies, and indices on the CPU), NumPy cannot
read the tensors, and, as on Apple's GPUs, there is no float64. A tensor of the device wraps a tensor on the CPU, and
torch's dispatcher hands over each operation. `python -m tests.support.second_device` runs in a process of its own,
because a device cannot be unregistered.
"""

import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from hf_faim2f import Predictor
from tests.support.device_work import all_work
from tests.support.lively_model import check_same, photographs, save_model

NAME = "emulated"
aten = torch.ops.aten
# Operations whose operands may be on two devices.
ACROSS = {
    aten.copy_.default,
    aten._copy_from.default,
    aten._to_copy.default,
    aten.index.Tensor,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}


class OnDevice(Tensor):
    """A tensor of the device, with the shape, strides and values of `raw`, which is on the CPU."""

    raw: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(cls, raw: Tensor) -> Any:
        assert raw.dtype != torch.float64, "the device has no float64"
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=f"{NAME}:0",
        )

    def __init__(self, raw: Tensor) -> None:
        self.raw = raw

    def tolist(self) -> Any:
        """Lists, which torch refuses for its subclasses."""
        return self.raw.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func is aten._fused_sdp_choice.default:
            return 0  # attention in plain operations
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        elsewhere = [value for value in tensors if not isinstance(value, OnDevice) and value.ndim]
        if elsewhere and (func not in ACROSS or ("index" in str(func) and not isinstance(args[0], OnDevice))):
            raise RuntimeError(f"{func} has operands on {NAME} and on the CPU.")
        wrappers = {id(raw_of(value)): value for value in tensors}
        target = kwargs.get("device")
        if target is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        results = func(*tree_map(raw_of, args), **tree_map(raw_of, kwargs))
        if target is not None and torch.device(target).type == "cpu":
            return results
        return tree_map(lambda value: wrappers[id(value)] if id(value) in wrappers else on_device(value), results)


def raw_of(value: Any) -> Any:
    """The tensor on the CPU behind a tensor of the device; other values as they are."""
    return value.raw if isinstance(value, OnDevice) else value


def on_device(value: Any) -> Any:
    """A tensor as one of the device; other values as they are."""
    return OnDevice(value) if isinstance(value, Tensor) and not isinstance(value, OnDevice) else value


class Device(_DummyBackendModule):
    """What torch asks about a device."""

    def is_available(self) -> bool:
        """There is one."""
        return True

    def device_count(self) -> int:
        """There is one."""
        return 1

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Autocast's types."""
        return [torch.bfloat16, torch.float16]


def install() -> torch.library.Library:
    """Registers the device. It works while the result is referenced."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=Device())
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    library = torch.library.Library("aten", "IMPL")

    def creates(name: str) -> None:
        packet, _, overload = name.partition(".")
        create = getattr(getattr(aten, packet), overload or "default")

        def on_the_cpu(*args: Any, **kwargs: Any) -> Any:
            return OnDevice(create(*args, **{**kwargs, "device": torch.device("cpu"), "pin_memory": None}))

        library.impl(name, on_the_cpu, "PrivateUse1")

    for name in ("empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step"):
        creates(name)

    def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
        raw_of(target).copy_(raw_of(source))
        return target

    library.impl("_copy_from", copy_from, "PrivateUse1")
    return library


def to_device(value: Any) -> Any:
    """A tensor, or a copy of a module, on the device; other values as they are."""
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).to(NAME)
    return value.to(NAME) if isinstance(value, Tensor) else value


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in lists, dictionaries, model outputs and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value]
    if hasattr(value, "__dataclass_fields__") and not hasattr(value, "items"):
        value = vars(value)
    parts = value.values() if hasattr(value, "items") else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def difference(work: Callable[..., Any], *inputs: Any) -> float:
    """The largest difference between the results of `work` on the CPU and on the device, relative to the largest value.

    It is infinite if some result is not on the device, or has another shape.
    """
    torch.manual_seed(0)
    expected = tensors_in(work(*inputs))
    torch.manual_seed(0)
    found = tensors_in(work(*tree_map(to_device, inputs)))
    assert expected and len(found) == len(expected)
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        if ours.device.type != NAME or ours.shape != theirs.shape:
            return float("inf")
        if theirs.numel():
            gap = (ours.detach().cpu().double() - theirs.detach().double()).abs().max()
            worst = max(worst, float(gap / theirs.detach().double().abs().max().clamp(min=1)))
    return worst


def predict(folder: Path) -> None:
    """Predicts photographs on the CPU and on the device, whose reader and writer threads share it; compares them."""
    save_model(folder)
    on_cpu, there = (Predictor.from_pretrained(folder, device=device) for device in ("cpu", NAME))
    assert there.network.device is not None and there.network.device.type == NAME
    for subtask in ("semantic", "instance", "panoptic"):
        check_same(list(there(photographs(), subtask)), list(on_cpu(photographs(), subtask)))


def main() -> None:
    """Prints the difference of each kind of work as JSON."""
    library = install()
    torch.set_num_threads(1)
    results = {name: difference(*work) for name, work in all_work().items()}
    with tempfile.TemporaryDirectory() as folder:
        predict(Path(folder) / "model")
    print(json.dumps(results))
    del library


if __name__ == "__main__":
    main()

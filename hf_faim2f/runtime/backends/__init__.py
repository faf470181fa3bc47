"""The runtimes that can run a model's network, one file each, and what each gives the predictor: a `Network`.

A runtime is a module with `open_network(name, device)`, and an entry of `RUNTIMES`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import Tensor

from ...errors import PredictorError
from ...model.configuration_faim2f import FaiM2FConfig
from ...model.image_processing_faim2f import FaiM2FImageProcessor

# Images in a batch, unless the caller, the runtime or the graph says otherwise.
BATCH_SIZE = 4


@dataclass
class Network:
    """A model that is ready to run.

    Args:
        name: the folder or Hub id that it came from, for messages.
        config: of the model.
        processor: makes its inputs and post-processes its outputs.
        run: takes the input, (B, 3, H, W) on the CPU, and returns the outputs by name, on whatever device they are.
        outputs: the kind of outputs, a key of `export.graph.OUTPUTS`.
        input_name: "pixel_values" (float32) or "image" (uint8); see `export.graph.INPUTS`.
        batch: the only batch size B that it accepts; None for any.
        size: the only (H, W) that it accepts; None for any.
        largest_batch: the largest batch that it accepts, if `batch` is None; None for no limit.
        sizes: the smallest and the largest (H, W) that it accepts, if `size` is None; None for no limits.
        usual_batch: the batch size of commands whose user chooses none. Larger batches pay on a GPU; on a CPU they
            rarely do, and they take memory.
    """

    name: str
    config: FaiM2FConfig
    processor: FaiM2FImageProcessor
    run: Callable[[Tensor], dict[str, Tensor]]
    outputs: str = "logits"
    input_name: str = "pixel_values"
    batch: int | None = None
    size: tuple[int, int] | None = None
    largest_batch: int | None = None
    sizes: tuple[tuple[int, int], tuple[int, int]] | None = None
    usual_batch: int = BATCH_SIZE


@dataclass(frozen=True)
class Runtime:
    """A runtime.

    Args:
        module: below `hf_faim2f.runtime`.
        extra: the extra of this package that installs the libraries it needs; empty for none.
    """

    module: str
    extra: str = ""


RUNTIMES = {
    "torch": Runtime("backends.torch"),
    "onnxruntime": Runtime("backends.onnxruntime", "onnx"),
    "tensorrt": Runtime("backends.tensorrt"),  # the engine names its library, and so the extra
}


def load_backend(runtime: str) -> Any:
    """The module of a runtime.

    Raises:
        PredictorError: there is no such runtime, or a library that it needs is missing.
    """
    if runtime not in RUNTIMES:
        raise PredictorError(f"runtime must be one of {', '.join(RUNTIMES)}, not {runtime!r}.")
    row = RUNTIMES[runtime]
    try:
        return import_module(f"..{row.module}", __name__)
    except ImportError as error:
        if not row.extra:
            raise
        raise PredictorError(
            f"The runtime {runtime} needs {error.name}, which cannot be imported ({error}): install "
            f"hf-faim2f[{row.extra}]."
        ) from error


def usual_batch_size(network: Network) -> int | None:
    """The batch size to use when the user chooses none; None for a network that accepts only one."""
    return None if network.batch is not None else min(network.usual_batch, network.largest_batch or BATCH_SIZE)


def check_numbers(name: str, outputs: Mapping[str, Tensor]) -> None:
    """Raises PredictorError if an output has a NaN, which every post-processing would turn into the first class.

    Infinite logits are fine. A sum finds a NaN much faster than a look at every value, so that comes first.

    Args:
        name: the network's, for the message.
        outputs: by name.
    """
    for key, values in outputs.items():
        if values.is_floating_point() and bool(values.sum().isnan()) and bool(values.isnan().any()):
            raise PredictorError(
                f"{name} answers with {key} that are NaN: its training diverged, or its precision is too low for it. "
                "Take an earlier checkpoint, or fp32."
            )


__all__ = ["BATCH_SIZE", "RUNTIMES", "Network", "Runtime", "check_numbers", "load_backend", "usual_batch_size"]

"""The runtimes that can run a model's network, and `Network`, their interface to the predictor.

A runtime has an entry in `RUNTIMES`, and either a module with `open_network(name, device)` or a format of
`export.formats`, which `open_format` opens.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from ...errors import ExportError, PredictorError
from ...model.configuration_faim2f import FaiM2FConfig
from ...model.image_processing_faim2f import FaiM2FImageProcessor
from ...zoo import open_settings

# Batch size unless the caller, the runtime or the graph sets another.
BATCH_SIZE = 4


@dataclass
class Network:
    """A model that is ready to run.

    Args:
        name: the folder or Hub id that it was loaded from, for messages.
        config: the model's configuration.
        processor: the image processor, which prepares inputs and post-processes outputs.
        run: takes the input, (B, 3, H, W) on the CPU, and returns the outputs by name, on any device.
        outputs: the kind of outputs, a key of `export.graph.OUTPUTS`.
        input_name: "pixel_values" (float32) or "image" (uint8); see `export.graph.INPUTS`.
        batch: the only batch size B that it accepts; None for any.
        size: the only (H, W) that it accepts; None for any.
        largest_batch: the largest batch that it accepts, if `batch` is None; None for no limit.
        sizes: the smallest and the largest (H, W) that it accepts, if `size` is None; None for no limits.
        usual_batch: the default batch size of commands. Larger batches pay off on a GPU; on a CPU they rarely do, and
            they take memory.
        device: where torch runs the network; None for other runtimes.
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
    device: torch.device | None = None


@dataclass(frozen=True)
class Runtime:
    """A runtime.

    Args:
        module: what is imported before a network is opened: a module with `open_network`, or, for a format of
            `export.formats`, the library that runs its files.
        extra: the extra of this package that installs its libraries; empty for none.
        is_format: whether it runs the export format of the same name, whose folders `open_format` opens.
    """

    module: str
    extra: str = ""
    is_format: bool = False


RUNTIMES = {
    "torch": Runtime(f"{__name__}.torch"),
    "onnxruntime": Runtime(f"{__name__}.onnxruntime", "onnx"),
    "tensorrt": Runtime(f"{__name__}.tensorrt"),  # depends on the library that engine.json names
    "aotinductor": Runtime(f"{__name__}.aotinductor"),
    "openvino": Runtime("openvino", "openvino", is_format=True),
    "executorch": Runtime("executorch.runtime", "executorch", is_format=True),
    "litert": Runtime("ai_edge_litert.interpreter", "litert", is_format=True),
}


def load_backend(runtime: str) -> Callable[..., Network]:
    """Imports a runtime, and returns the function that opens a network in it: `open_network(name, device)`.

    Raises:
        PredictorError: there is no such runtime, or one of its libraries is missing.
    """
    if runtime not in RUNTIMES:
        raise PredictorError(f"runtime must be one of {', '.join(RUNTIMES)}, not {runtime!r}.")
    row = RUNTIMES[runtime]
    try:
        module = import_module(row.module)
    except ImportError as error:
        if not row.extra:
            raise
        raise PredictorError(
            f"The runtime {runtime} needs {error.name}, which cannot be imported ({error}): install "
            f"hf-faim2f[{row.extra}]."
        ) from error
    return partial(open_format, runtime) if row.is_format else module.open_network


def open_format(format_name: str, name: str, device: str | None = None) -> Network:
    """Opens a folder of `export.formats.export_format` in the format's runtime.

    Args:
        format_name: a key of `export.formats.FORMATS`.
        name: a folder with the format's files, `format.json`, the model's configuration and its image processor.
        device: "cpu", or another device of the runtime, such as OpenVINO's "gpu" or "gpu:1"; None for the CPU.

    Raises:
        PredictorError: there is no such folder or device, or the folder is damaged or of another format, or its
            files name other classes than its configuration.
    """
    from ...export.formats import DESCRIPTION, FORMATS, open_exported, read_description
    from ...export.graph_file import check_labels

    try:
        description = read_description(Path(name), format_name)
        config, processor = open_settings(name, error=PredictorError)
        check_labels(description.folder / DESCRIPTION, config)
        run = open_exported(description, device)
    except ExportError as error:
        raise PredictorError(str(error)) from error
    batch, _, height, width = description.shape
    size = None if height is None or width is None else (height, width)
    check_size(description.folder / FORMATS[format_name].files[0], processor, size)
    return Network(
        name, config, processor, run, description.outputs, description.input_name, batch, size, usual_batch=1
    )


def usual_batch_size(network: Network) -> int | None:
    """The default batch size; None for a network that accepts only one."""
    return None if network.batch is not None else min(network.usual_batch, network.largest_batch or BATCH_SIZE)


def check_size(path: Path, processor: FaiM2FImageProcessor, size: tuple[int, int] | None) -> None:
    """Raises PredictorError if a network takes one (H, W), to which the image processor beside it does not resize.

    Args:
        path: the network's file, for the message.
        processor: the image processor.
        size: the only (H, W) that the network takes; None for any.
    """
    settings = processor.to_dict()
    wanted = size and {"height": size[0], "width": size[1]}
    if size and (not settings["do_resize"] or settings["size"] != wanted):
        raise PredictorError(
            f"{path} takes {size[0]}x{size[1]} pixels (height x width) and nothing else, but preprocessor_config.json "
            f"beside it does not resize to that: set its size to {wanted}, or export the model again."
        )


def check_numbers(name: str, outputs: Mapping[str, Tensor]) -> None:
    """Raises PredictorError if an output has NaN, which post-processing would silently turn into the first class.

    Infinite logits are allowed. The sum is checked first, because it is much faster than a check of every value.

    Args:
        name: the network's name, for the message.
        outputs: the outputs by name.
    """
    for key, values in outputs.items():
        if values.is_floating_point() and bool(values.sum().isnan()) and bool(values.isnan().any()):
            raise PredictorError(
                f"{name} outputs {key} that are NaN: its training diverged, or its precision is too low for it. "
                "Take an earlier checkpoint, or fp32."
            )


def check_outputs(network: Network, outputs: Mapping[str, Tensor]) -> None:
    """Checks outputs for NaN, and for the number of classes in the configuration, a separate file of an export.

    Args:
        network: the network.
        outputs: its outputs by name.

    Raises:
        PredictorError: an output has NaN or another number of classes.
    """
    check_numbers(network.name, outputs)
    logits, known = outputs.get("class_queries_logits"), network.config.num_labels
    found = known if logits is None else logits.shape[-1] - 1
    for name in ("segmentation", "class_ids"):
        if name in outputs and outputs[name].numel():
            found = max(found, int(outputs[name].max()) + 1)
    if found != known:
        raise PredictorError(
            f"{network.name} predicts {found} classes, but its config.json names {known}, so its files belong "
            "to different models: export the model again."
        )


__all__ = [
    "BATCH_SIZE",
    "RUNTIMES",
    "Network",
    "Runtime",
    "check_numbers",
    "check_outputs",
    "check_size",
    "load_backend",
    "open_format",
    "usual_batch_size",
]

"""The network in ONNX Runtime, from a folder written by `faim2f export onnx` or Optimum."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor
from transformers.utils import logging

from ...errors import PredictorError
from ...export.graph import INPUTS, OUTPUTS
from ...export.graph_file import listed, load_model
from ...zoo import open_settings, try_loading
from . import BATCH_SIZE, Network, check_size

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
ERRORS_ONLY = 3  # a log level of onnxruntime
logger = logging.get_logger(__name__)


def open_network(name: str, device: str | None = None) -> Network:
    """Opens the graph in a session.

    Args:
        name: a folder with `model.onnx`, the model's configuration and its image processor.
        device: "cpu", "cuda" or "cuda:N"; None for CUDA if this onnxruntime has it.

    Raises:
        PredictorError: there is no such folder or device, or the graph was not exported by this package.
    """
    path = Path(name) / "model.onnx"
    if not path.is_file():
        raise PredictorError(
            f"There is no file {path}: the runtime onnxruntime takes a folder that `faim2f export onnx` wrote."
        )
    providers = _providers(device)
    config, processor = open_settings(name, error=PredictorError)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = ERRORS_ONLY
    # ONNX Runtime's other format, ORT, can refer to other files.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    session = try_loading(
        name,
        "graph",
        lambda: onnxruntime.InferenceSession(load_model(path)[1], options, providers=[*providers, CPU]),
        PredictorError,
    )
    _check_provider(session, providers, device)
    outputs = [output.name for output in session.get_outputs()]
    kind = next((kind for kind, names in OUTPUTS.items() if list(names) == outputs), None)
    entry = session.get_inputs()[0]
    if kind is None or len(session.get_inputs()) != 1 or entry.name not in INPUTS or len(entry.shape) != 4:
        raise PredictorError(
            f"{path} turns {listed(i.name for i in session.get_inputs())} into {listed(outputs)}, which is not "
            "a graph of `faim2f export onnx`: export the model again."
        )
    batch, _, height, width = (side if isinstance(side, int) else None for side in entry.shape)
    size = None if height is None or width is None else (height, width)
    check_size(path, processor, size)

    def run(inputs: Tensor) -> dict[str, Tensor]:
        values = session.run(outputs, {entry.name: np.ascontiguousarray(inputs.numpy())})
        return {name: torch.from_numpy(value) for name, value in zip(outputs, values, strict=True)}

    usual = BATCH_SIZE if CUDA in session.get_providers() else 1
    return Network(name, config, processor, run, kind, entry.name, batch, size, usual_batch=usual)


def _providers(device: str | None) -> list[Any]:
    """The execution provider of a device; empty for the CPU, which is the default."""
    available = onnxruntime.get_available_providers()
    matched = re.fullmatch(r"(cpu|cuda)(?::(\d+))?", device or ("cuda" if CUDA in available else "cpu"))
    if matched is None:
        raise PredictorError(f"device must be cpu, cuda or cuda:N for onnxruntime, not {device!r}.")
    if matched[1] == "cpu":
        return []
    if CUDA not in available:
        raise PredictorError(
            f"This onnxruntime cannot run on {device}, it has only {', '.join(available)}: install onnxruntime-gpu in "
            "its place, or choose the device cpu."
        )
    return [(CUDA, {"device_id": matched[2] or "0"})]


def _check_provider(session: Any, providers: list[Any], device: str | None) -> None:
    """Checks that the provider started: ONNX Runtime itself continues without one that fails to start."""
    if providers and CUDA not in session.get_providers():
        told = "onnxruntime's CUDA provider did not start, as its own messages say"
        if device is not None:
            raise PredictorError(f"{told}: choose the device cpu, or repair the CUDA installation.")
        logger.warning_once(f"{told}: the network runs on the CPU.")


__all__ = ["open_network"]

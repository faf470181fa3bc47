"""`faim2f export openvino`: OpenVINO's intermediate representation, `openvino_model.xml` and `openvino_model.bin`.

The files are named as by Optimum Intel, and converted from our ONNX graph. In fp16 and bf16, weights are stored in
float16, which halves the file.
"""

import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import ExportError, first_line
from .formats import FORMATS, Description, check_tensors
from .graph import OUTPUTS, FaiM2FGraph
from .onnx import check_libraries, write_graph

# Without this package, OpenVINO does not report to its makers that it was imported, from a process that it starts.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
import openvino  # noqa: E402

# One per process, never freed: the CPU plugin sets the thread's signal stack and frees it with the core. With several
# cores, the next signal that Python handles after one is freed, such as Ctrl+C, crashes the process (2026.4).
CORE = openvino.Core()
TOPOLOGY, WEIGHTS = FORMATS["openvino"].files
# First bytes of OpenVINO's own format. Its readers of other formats, such as ONNX, follow references to any file.
HEAD = b"<?xml"
# OpenVINO's name of each type, and the device capability that the type needs.
TYPES = {"fp32": ("f32", ""), "fp16": ("f16", "FP16"), "bf16": ("bf16", "BF16")}


def write(graph: FaiM2FGraph, folder: Path, precision: str) -> None:
    """Writes the two files of a graph into `folder`.

    Raises:
        ExportError: a library for ONNX is missing, or OpenVINO cannot read the graph or write the files.
        OSError: the graph cannot be written.
    """
    check_libraries()
    with tempfile.TemporaryDirectory(prefix="faim2f-") as between:
        path = Path(between) / "model.onnx"
        write_graph(graph, path)
        if precision != "fp32" and graph.outputs == "semantic":
            # OpenVINO computes all inputs of a data-dependent shape in float32; here these are the whole network.
            import onnx

            from .candidates import keep_all

            model = onnx.load(path)
            keep_all(model)
            onnx.save(model, path)
        try:
            model = CORE.read_model(str(path))
            openvino.save_model(model, str(folder / TOPOLOGY), compress_to_fp16=precision != "fp32")
        except Exception as error:  # of OpenVINO's own classes
            if "iostream error" in str(error):
                raise ExportError(
                    f"OpenVINO cannot write its files ({first_line(error)}), and nothing was kept: is the disk of "
                    f"{folder.parent} full?"
                ) from error
            raise ExportError(
                f"OpenVINO {openvino.__version__} cannot convert this model ({first_line(error)}), and nothing was "
                "kept: please report it with the model's config.json."
            ) from error


def open_files(
    description: Description, contents: Mapping[str, bytes], device: str | None
) -> Callable[[Tensor], dict[str, Tensor]]:
    """Compiles the network for a device; see `formats.open_exported`.

    The CPU uses as many threads as torch. It runs fp16 and bf16 exports in float32, unless it has
    instructions for that type.
    """
    place = (device or "cpu").upper().replace(":", ".")
    # The first of several GPUs is GPU.0, which OpenVINO also calls GPU.
    if not {place, f"{place}.0"} & set(CORE.available_devices):
        able = ", ".join(name.lower() for name in CORE.available_devices)
        raise ExportError(f"There is no device {device!r} for openvino here: choose one of {able}.")
    path = description.folder / TOPOLOGY
    if not contents[TOPOLOGY].startswith(HEAD):
        raise ExportError(f"{path} is not an OpenVINO file: export the model again.")
    kind, needed = TYPES[description.precision]
    if needed not in ("", *CORE.get_property(place, "OPTIMIZATION_CAPABILITIES")):
        kind = "f32"
    settings = {"INFERENCE_PRECISION_HINT": kind, "PERFORMANCE_HINT": "LATENCY"}
    if place == "CPU":
        settings["INFERENCE_NUM_THREADS"] = str(torch.get_num_threads())
    try:
        model = CORE.read_model(contents[TOPOLOGY], contents[WEIGHTS])
        inputs = [
            (port.get_any_name(), [None if side.is_dynamic else side.get_length() for side in port.partial_shape])
            for port in model.inputs
        ]
        check_tensors(description, inputs, [port.get_any_name() for port in model.outputs])
        compiled = CORE.compile_model(model, place, settings)
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(
            f"OpenVINO {openvino.__version__} cannot open {path} ({first_line(error)}): export the model again."
        ) from error
    request, lock = compiled.create_infer_request(), threading.Lock()
    names = OUTPUTS[description.outputs]

    def run(inputs: Tensor) -> dict[str, Tensor]:
        with lock:  # a request runs one batch at a time, and each run overwrites the outputs
            request.infer([np.ascontiguousarray(inputs.numpy())])
            return {name: torch.from_numpy(request.get_tensor(name).data.copy()) for name in names}

    return run


__all__ = ["open_files", "write"]

"""`faim2f export executorch`: a program for ExecuTorch, `model.pte`, which delegates what it can to XNNPACK.

Programs have a fixed image size and batch size, for which their memory is planned.
"""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ExportError, first_line
from .formats import FORMATS, Description, check_tensors
from .graph import OUTPUTS, FaiM2FGraph, quietly

(PROGRAM,) = FORMATS["executorch"].files


def write(graph: FaiM2FGraph, folder: Path, precision: str) -> None:
    """Writes the program of a graph of a fixed size into `folder`.

    Raises:
        ExportError: torch cannot export the graph, or ExecuTorch cannot lower it.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    try:
        with quietly(), torch.no_grad():
            exported = torch.export.export(graph, (), kwargs=graph.sample())
            lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
            content = lowered.to_executorch().buffer
    except Exception as error:  # of torch's exporter or ExecuTorch
        raise ExportError(
            f"ExecuTorch cannot convert this model ({first_line(error)}), and nothing was kept: please report it with "
            "the model's config.json."
        ) from error
    (folder / PROGRAM).write_bytes(content)


def open_files(
    description: Description, contents: Mapping[str, bytes], device: str | None
) -> Callable[[Tensor], dict[str, Tensor]]:
    """Opens the program on the CPU; see `formats.open_exported`."""
    from executorch.runtime import Runtime

    if device not in (None, "cpu"):
        raise ExportError(f"There is no device {device!r} for executorch here: its programs run on the cpu.")
    path, names = description.folder / PROGRAM, tuple(OUTPUTS[description.outputs])
    try:
        program: Any = Runtime.get().load_program(contents[PROGRAM])
        method: Any = program.load_method("forward")
        described = method.metadata
        shapes = [list(described.input_tensor_meta(i).sizes()) for i in range(described.num_inputs())]
        count = described.num_outputs()
    except Exception as error:
        raise ExportError(f"ExecuTorch cannot open {path} ({first_line(error)}): export the model again.") from error
    # A program has no output names; its outputs are in the graph's order.
    found = names if count == len(names) else [""] * count
    check_tensors(description, [(description.input_name, shape) for shape in shapes], found)
    # A method refers to memory of its program, and its next run overwrites the outputs.
    return _Runner(program, method, names)


class _Runner:
    def __init__(self, program: Any, method: Any, names: tuple[str, ...]) -> None:
        self.program, self.method, self.names = program, method, names
        self.lock = threading.Lock()

    def __call__(self, inputs: Tensor) -> dict[str, Tensor]:
        with self.lock:
            outputs = self.method.execute([inputs.contiguous()])
            return {name: values.clone() for name, values in zip(self.names, outputs, strict=True)}


__all__ = ["open_files", "write"]

"""`faim2f export litert`: a flat buffer for LiteRT, the successor of TensorFlow Lite, `model.tflite`.

Files have a fixed image size and batch size.
"""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ExportError, first_line
from .formats import FORMATS, Description, check_tensors
from .graph import FaiM2FGraph, quietly

(FILE,) = FORMATS["litert"].files


def write(graph: FaiM2FGraph, folder: Path, precision: str) -> None:
    """Writes the file of a graph of a fixed size into `folder`.

    Raises:
        ExportError: litert-torch cannot convert the graph.
        OSError: a file cannot be written.
    """
    import litert_torch

    try:
        with quietly(), torch.no_grad():
            litert_torch.convert(graph, sample_kwargs=graph.sample()).export(str(folder / FILE))
    except OSError:  # such as a full disk
        raise
    except Exception as error:  # of torch's exporter, JAX or LiteRT
        raise ExportError(
            f"LiteRT cannot convert this model ({first_line(error)}), and nothing was kept: please report it with the "
            "model's config.json."
        ) from error


def open_files(
    description: Description, contents: Mapping[str, bytes], device: str | None
) -> Callable[[Tensor], dict[str, Tensor]]:
    """Opens the file on the CPU, with as many threads as torch; see `formats.open_exported`."""
    from ai_edge_litert.interpreter import Interpreter

    if device not in (None, "cpu"):
        raise ExportError(f"There is no device {device!r} for litert here: its files run on the cpu.")
    path = description.folder / FILE
    try:
        interpreter: Any = Interpreter(model_content=contents[FILE], num_threads=torch.get_num_threads())
        runner: Any = interpreter.get_signature_runner()
        inputs = [(name, list(map(int, row["shape"]))) for name, row in runner.get_input_details().items()]
        outputs = list(runner.get_output_details())
    except Exception as error:
        raise ExportError(f"LiteRT cannot open {path} ({first_line(error)}): export the model again.") from error
    check_tensors(description, inputs, outputs)
    lock = threading.Lock()

    def run(values: Tensor) -> dict[str, Tensor]:
        with lock:  # an interpreter runs one batch at a time
            found = runner(**{description.input_name: values.numpy()})
            return {name: torch.from_numpy(array.copy()) for name, array in found.items()}

    return run


__all__ = ["open_files", "write"]

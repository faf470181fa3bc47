"""A folder that `faim2f export onnx` wrote: its graph, and the settings beside it.

An ONNX file can name other files that hold its tensors, anywhere on the disk. What this package writes is one file, so
a graph with such a tensor is refused before any other file is opened, and libraries get the bytes that were checked.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..model.configuration_faim2f import FaiM2FConfig
from ..model.image_processing_faim2f import FaiM2FImageProcessor
from .errors import ExportError
from .graph import INPUTS, OUTPUTS

# Parts of a graph: nodes, attributes, tensors, dimensions. The largest of the family's has less than a hundredth.
MOST_PARTS = 1 << 22
LONGEST_NAME, MOST_NAMES = 60, 8


def load_model(path: Path) -> tuple[Any, bytes]:
    """The file as an `onnx.ModelProto`, and its bytes, which have every tensor in them.

    Raises:
        ExportError: it cannot be read, is no ONNX file, is larger than one can be, or names another file.
    """
    try:
        import onnx
    except ImportError:
        raise ExportError("reading ONNX graphs needs onnx, which is not installed: pip install onnx.") from None
    from google.protobuf.message import DecodeError

    most = onnx.checker.MAXIMUM_PROTOBUF
    if not path.is_file():  # a pipe would be waited for
        raise ExportError(f"{path} is no file.")
    try:
        with path.open("rb") as file:
            content = file.read(min(path.stat().st_size, most) + 1)
    except OSError as error:
        raise ExportError(f"{path} cannot be read ({error.strerror or error}).") from None
    if len(content) > most:
        raise ExportError(f"{path} has more than {most} bytes, which no ONNX file can have.")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except (DecodeError, ValueError) as error:  # text in it that is no UTF-8
        raise ExportError(f"{path} is no ONNX file that can be read ({_one_line(error)}).") from None
    _check_parts(model, path)
    return model, content


def _check_parts(model: Any, path: Path) -> None:
    """Every tensor of the graph, wherever it is: initializers, attributes, subgraphs, functions, sparse tensors; and
    every text, which protobuf gives as bytes where it is no UTF-8."""
    parts = [model]
    count = 0
    while parts:
        part = parts.pop()
        count += 1
        if count > MOST_PARTS:
            raise ExportError(f"{path} has more than {MOST_PARTS} parts, which no graph of a model needs.")
        is_tensor = part.DESCRIPTOR.name == "TensorProto"
        if is_tensor and (part.external_data or part.data_location == part.EXTERNAL):
            named = next((entry.value for entry in part.external_data if entry.key == "location"), "")
            raise ExportError(
                f"{path} names another file, {named[:100]!r}, for its tensor {part.name[:100]!r}: it is not read. "
                "Graphs of `faim2f export onnx` are one file; save this one with its weights inside."
            )
        for field, value in part.ListFields():
            if field.message_type is not None:
                parts.extend([value] if hasattr(value, "DESCRIPTOR") else value)
            elif field.type == field.TYPE_STRING and bytes in map(type, [value] if isinstance(value, bytes) else value):
                raise ExportError(f"{path} has a {field.name} that is no UTF-8: it is damaged.")


def read_graph(path: Path) -> tuple[Any, str]:
    """The graph (an `onnx.ModelProto`, weights and all) and which kind of outputs it has, a key of `OUTPUTS`.

    Raises:
        ExportError: the file cannot be read, or is no graph of `faim2f export onnx`.
    """
    model, _ = load_model(path)
    names = [value.name for value in model.graph.output]
    kind = next((kind for kind, known in OUTPUTS.items() if list(known) == names), None)
    if kind is None or [value.name for value in model.graph.input] not in ([name] for name in INPUTS):
        returned = f"it returns {listed(names)}" if names else "it is empty"
        raise ExportError(f"{path} is no graph that `faim2f export onnx` wrote ({returned}); export the model by that.")
    return model, kind


def listed(names: Iterable[str]) -> str:
    """Names of a stranger's file for a sentence: printable, short and not too many."""
    shown = ["".join(c if c.isprintable() else "?" for c in name[:LONGEST_NAME]) for name in names]
    more = f" and {len(shown) - MOST_NAMES} more" if len(shown) > MOST_NAMES else ""
    return ", ".join(shown[:MOST_NAMES]) + more


def read_settings(folder: Path) -> tuple[FaiM2FConfig, FaiM2FImageProcessor]:
    """Configuration and image processor beside a graph.

    Raises:
        ExportError: they are not there, or do not fit.
    """
    try:
        return FaiM2FConfig.from_pretrained(folder), FaiM2FImageProcessor.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise ExportError(
            f"{folder} must hold the config.json and preprocessor_config.json that `faim2f export onnx` wrote beside "
            f"the graph ({_one_line(error)})."
        ) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


__all__ = ["listed", "load_model", "read_graph", "read_settings"]

"""A folder that `faim2f export onnx` wrote: its graph, and the settings beside it."""

from pathlib import Path
from typing import Any

from ..model.configuration_faim2f import FaiM2FConfig
from ..model.image_processing_faim2f import FaiM2FImageProcessor
from .errors import ExportError
from .graph import INPUTS, OUTPUTS


def read_graph(path: Path) -> tuple[Any, str]:
    """The graph (an `onnx.ModelProto`, weights and all) and which kind of outputs it has, a key of `OUTPUTS`.

    Raises:
        ExportError: the file cannot be read, or is no graph of `faim2f export onnx`.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path)
    except (DecodeError, ValueError, OSError, onnx.checker.ValidationError) as error:
        raise ExportError(f"{path} is no ONNX file that can be read ({_one_line(error)}).") from None
    names = [value.name for value in model.graph.output]
    kind = next((kind for kind, known in OUTPUTS.items() if list(known) == names), None)
    if kind is None or [value.name for value in model.graph.input] not in ([name] for name in INPUTS):
        returned = f"it returns {', '.join(names)}" if names else "it is empty"
        raise ExportError(f"{path} is no graph that `faim2f export onnx` wrote ({returned}); export the model by that.")
    return model, kind


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


__all__ = ["read_graph", "read_settings"]

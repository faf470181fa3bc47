"""An exporter's graph without its leftovers: constants worked out, and names for what may vary."""

import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import onnx_ir
import onnxscript.optimizer
from onnx_ir.passes.common import ShapeInferencePass

from ..errors import ExportError
from ..model.configuration_faim2f import FaiM2FConfig
from ..model.image_processing_faim2f import FaiM2FImageProcessor
from .graph import INPUTS, OUTPUTS

# An upper bound of what a constant may take: the position embeddings of the largest size are far below it.
LARGEST_CONSTANT = 2**30
ROUNDS = 8


@contextmanager
def quietly() -> Iterator[None]:
    """Without the exporters' progress and warnings, which are of their insides; errors still come through."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def clean(model: onnx_ir.Model, dimensions: Mapping[str, Sequence[int | str]]) -> None:
    """Folds, in place, everything that does not depend on the input, and sets the shapes of inputs and outputs.

    Exporters leave the computation of shapes and position embeddings in a graph also where the size is fixed, each in
    its own way. Shapes and constants are worked out in turn until nothing changes; what is left is the network.

    Args:
        model: the graph.
        dimensions: of each input and output by name, numbers where they are fixed and names where they vary.
    """
    for value in (*model.graph.inputs, *model.graph.outputs):
        if str(value.name) in dimensions:
            value.shape = onnx_ir.Shape(dimensions[str(value.name)])
    with quietly():
        count = -1
        for _ in range(ROUNDS):
            onnxscript.optimizer.fold_constants(
                model,
                onnx_shape_inference=True,
                input_size_limit=LARGEST_CONSTANT,
                output_size_limit=LARGEST_CONSTANT,
                should_fold=lambda node: True,
            )
            onnxscript.optimizer.optimize(model, num_iterations=1)
            ShapeInferencePass(data_prop=True)(model)
            if len(model.graph) == count:
                break
            count = len(model.graph)
    # What exporters note of themselves: the stack of every node, with the paths of this machine in it.
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            # The exporters' own names of what varies agree neither with each other nor with those of the inputs.
            if not value.is_graph_output() and value.shape is not None and not value.shape.is_static():
                value.shape = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for value in model.graph.outputs:
        if str(value.name) in dimensions:
            value.shape = onnx_ir.Shape(dimensions[str(value.name)])


# A folder that `faim2f export onnx` wrote: its graph, and the settings beside it.
#
# An ONNX file can name other files that hold its tensors, anywhere on the disk. What this package writes is one file,
# so
# a graph with such a tensor is refused before any other file is opened, and libraries get the bytes that were
# checked.

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
    return model, kind_of(model, path)


def kind_of(model: Any, path: Path) -> str:
    """The kind of outputs of a graph, a key of `OUTPUTS`.

    Args:
        model: the graph, an `onnx.ModelProto`.
        path: its file, for the message.

    Raises:
        ExportError: it is not a graph of `faim2f export onnx`.
    """
    names = [value.name for value in model.graph.output]
    kind = next((kind for kind, known in OUTPUTS.items() if list(known) == names), None)
    if kind is None or [value.name for value in model.graph.input] not in ([name] for name in INPUTS):
        returned = f"it returns {listed(names)}" if names else "it is empty"
        raise ExportError(f"{path} is no graph that `faim2f export onnx` wrote ({returned}); export the model by that.")
    return kind


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


# What a graph is made of: its nodes by type, and how many multiplications with additions it takes.


@dataclass
class GraphReport:
    """`nodes`: how many of each type; `macs`: multiply-accumulates of convolutions and matrix products."""

    nodes: Counter[str]
    macs: int

    def __str__(self) -> str:
        types = ", ".join(f"{count} {name}" for name, count in self.nodes.most_common())
        return f"{self.nodes.total()} nodes ({types}), {self.macs / 1e9:.2f} GMACs"


def report(path: Path | str, batch: int = 1, size: tuple[int, int] | None = None) -> GraphReport:
    """Reads an ONNX file and counts.

    Args:
        path: `model.onnx`.
        batch: images at once, where the graph leaves that open.
        size: (height, width), where the graph leaves that open; the nodes are counted as they are in the file.

    Raises:
        ValueError: the graph leaves the size open and none is given.
        ExportError: it is no ONNX file, or names another file for its tensors.
    """
    model = onnx_ir.serde.deserialize_model(load_model(Path(path))[0])
    nodes = Counter(node.op_type for node in model.graph)
    fixed = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        open_sides = dict(zip((0, 2, 3), (batch, *(size or (None, None))), strict=True))
        sides = [side if isinstance(side, int) else open_sides.get(i) for i, side in enumerate(value.shape)]
        if None in sides:
            raise ValueError(f"{path} takes any size: give the (height, width) to count for.")
        fixed[str(value.name)] = [int(side) for side in sides if side is not None]
    for value in model.graph.outputs:
        value.shape = None
    clean(model, fixed)
    return GraphReport(nodes, sum(_macs(node) for node in model.graph))


def _macs(node: onnx_ir.Node) -> int:
    if node.op_type not in ("Conv", "MatMul", "Gemm"):
        return 0
    output, left, right = (_sides(value) for value in (node.outputs[0], node.inputs[0], node.inputs[1]))
    if node.op_type == "Conv":  # the weight is (out, in / groups, kernel height, kernel width)
        return math.prod(output) * math.prod(right[1:])
    transposed = node.op_type == "Gemm" and bool(node.attributes.get_int("transA", False))
    return math.prod(output) * left[0 if transposed else -1]


def _sides(value: onnx_ir.Value | None) -> list[int]:
    if value is None or value.shape is None or not value.shape.is_static():
        raise ValueError(f"The shape of {value.name if value else None!r} cannot be told from that of the input.")
    return [int(side) for side in value.shape if isinstance(side, int)]


__all__ = ["GraphReport", "clean", "listed", "load_model", "quietly", "read_graph", "read_settings", "report"]

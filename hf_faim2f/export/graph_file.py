"""ONNX graphs: safe reading, simplification after export, extraction of subgraphs, and operation counts.

An ONNX file can refer to other files that hold its tensors, anywhere on the disk. This package writes single files, so
graphs with external tensors are rejected before any other file is opened, and libraries get the checked bytes.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ExportError, first_line
from ..model.configuration_faim2f import FaiM2FConfig
from ..model.image_processing_faim2f import FaiM2FImageProcessor
from ..zoo import open_settings
from .graph import INPUTS, OUTPUTS, quietly

# Imported where they are used: a missing library must be one sentence, and reading settings needs none.
if TYPE_CHECKING:
    import onnx_ir

# Maximum number of nodes, attributes, tensors and dimensions. Models of this family have less than 1 % of it.
MOST_PARTS = 1 << 22
# Limits for names from a file in a message: characters per name, and number of names.
LONGEST_NAME, MOST_NAMES = 60, 8
# Maximum number of elements of a folded constant; position embeddings of the largest image size have far fewer.
LARGEST_CONSTANT = 2**30
# Maximum number of rounds of constant folding and shape inference; two or three usually suffice.
ROUNDS = 8
# Node types that can have weights.
LAYERS = ("Conv", "MatMul", "Gemm")


def load_model(path: Path) -> tuple[Any, bytes]:
    """Reads a file as an `onnx.ModelProto`; returns it and the file's bytes, which include all tensors.

    Raises:
        ExportError: the file cannot be read, is not an ONNX file, is too large for one, or refers to another file.
    """
    try:
        import onnx
    except ImportError:
        raise ExportError(
            "reading ONNX graphs needs onnx, which is not installed: pip install 'hf-faim2f[onnx]'."
        ) from None
    from google.protobuf.message import DecodeError

    most = onnx.checker.MAXIMUM_PROTOBUF
    if not path.is_file():  # reading a pipe would block
        raise ExportError(f"{path} is not a file.")
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
    except (DecodeError, ValueError) as error:  # ValueError: text that is not UTF-8
        raise ExportError(f"{path} is not a readable ONNX file ({first_line(error, kind=False)}).") from None
    _check_parts(model, path)
    return model, content


def _check_parts(model: Any, path: Path) -> None:
    """Checks all tensors (in initializers, attributes, subgraphs, functions and sparse tensors) and all strings.

    protobuf returns a string that is not UTF-8 as bytes.
    """
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
                raise ExportError(f"{path} has a {field.name} that is not UTF-8: it is damaged.")


def read_graph(path: Path) -> tuple[Any, str]:
    """Reads a graph as an `onnx.ModelProto`; returns it and its kind of outputs, a key of `OUTPUTS`.

    Raises:
        ExportError: the file cannot be read, or was not written by `faim2f export onnx`.
    """
    model, _ = load_model(path)
    return model, kind_of(model, path)


def kind_of(model: Any, path: Path) -> str:
    """The kind of outputs of a graph, a key of `OUTPUTS`.

    Args:
        model: the graph, an `onnx.ModelProto`.
        path: its file, for the message.

    Raises:
        ExportError: it was not written by `faim2f export onnx`.
    """
    names = [value.name for value in model.graph.output]
    kind = next((kind for kind, known in OUTPUTS.items() if list(known) == names), None)
    if kind is None or [value.name for value in model.graph.input] not in ([name] for name in INPUTS):
        returned = f"it returns {listed(names)}" if names else "it is empty"
        raise ExportError(
            f"{path} is not a graph that `faim2f export onnx` wrote ({returned}): export the model with that command."
        )
    return kind


def listed(names: Iterable[str]) -> str:
    """Formats names from an untrusted file for a message: printable and limited in length and number."""
    shown = ["".join(c if c.isprintable() else "?" for c in name[:LONGEST_NAME]) for name in names]
    more = f" and {len(shown) - MOST_NAMES} more" if len(shown) > MOST_NAMES else ""
    return ", ".join(shown[:MOST_NAMES]) + more


def read_settings(folder: Path) -> tuple[FaiM2FConfig, FaiM2FImageProcessor]:
    """Reads the configuration and the image processor in a graph's folder.

    Raises:
        ExportError: they are missing or unusable.
    """
    try:
        return open_settings(folder, error=ExportError)
    except ExportError as error:
        raise ExportError(
            f"{folder} must hold the config.json and preprocessor_config.json that `faim2f export onnx` wrote beside "
            f"the graph ({first_line(error, kind=False)})."
        ) from None


def check_labels(description: Path, config: FaiM2FConfig) -> None:
    """Compares the labels in an export's description with those of the configuration beside it, which are used.

    Args:
        description: a checked `format.json`, `compiled.json` or `engine.json`.
        config: the configuration in its folder.

    Raises:
        ExportError: they differ, so that classes could get the names of another model.
    """
    labels = json.loads(description.read_text(encoding="utf-8")).get("labels")
    own = [config.id2label[class_id] for class_id in range(config.num_labels)]
    if labels is None or labels == own:
        return
    differing = "its labels are not those of config.json beside it"
    if isinstance(labels, list) and len(labels) == len(own):
        class_id = next(number for number, name in enumerate(own) if labels[number] != name)
        theirs, ours = (repr(str(name)[:LONGEST_NAME]) for name in (labels[class_id], own[class_id]))
        differing = f"it calls class {class_id} {theirs}, but config.json beside it {ours}"
    raise ExportError(
        f"{description} may be of another model, because {differing}: export the model again, or, if you renamed "
        "classes, write the same names into both files."
    )


def clean(model: "onnx_ir.Model", dimensions: Mapping[str, Sequence[int | str]]) -> None:
    """Folds everything that does not depend on the input, in-place, and sets the shapes of inputs and outputs.

    Exporters leave the computation of shapes and position embeddings in the graph even if the size is fixed. Shape
    inference and constant folding alternate until nothing changes.

    Args:
        model: the graph.
        dimensions: dimensions of each input and output by name: numbers if fixed, names if dynamic.
    """
    import onnx_ir
    import onnxscript.optimizer
    from onnx_ir.passes.common import ShapeInferencePass

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
    # Exporters record the Python stack of every node, with local paths.
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            # The exporters' own names of dynamic dimensions do not match those of the inputs.
            if not value.is_graph_output() and value.shape is not None and not value.shape.is_static():
                value.shape = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for value in model.graph.outputs:
        if str(value.name) in dimensions:
            value.shape = onnx_ir.Shape(dimensions[str(value.name)])


def name_nodes(model: Any) -> None:
    """Gives every node a unique name, in-place, so that layers can be selected by name."""
    taken: set[str] = set()
    for i, node in enumerate(model.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_number_{i}"
        taken.add(node.name)


def layers_with_weights(model: Any) -> list[str]:
    """The names of the convolutions and matrix products with weights, in graph order."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [node.name for node in model.graph.node if _has_weights(node, weights)]


def _has_weights(node: Any, weights: set[str]) -> bool:
    return node.op_type in LAYERS and node.input[1] in weights


def logits_of(model: Any, kind: str, layers: Sequence[str], path: Path) -> list[str]:
    """The names of the class logits tensor and the mask logits tensor.

    In a graph with post-processing, these are the inputs of the first Softmax or Sigmoid over classes and of the
    Sigmoid over masks. Class logits come from a layer with weights, mask logits from a product of two activations.

    Args:
        model: the graph, an `onnx.ModelProto`.
        kind: its kind of outputs, a key of `OUTPUTS`.
        layers: names of its layers with weights.
        path: its file, for the message.

    Raises:
        ExportError: they are not found.
    """
    if kind == "logits":
        return [value.name for value in model.graph.output]
    weights = {tensor.name for tensor in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    inside = _ancestors(model, {name for node in model.graph.node if node.name in layers for name in node.input})
    classes, masks = set(), set()
    for node in model.graph.node:
        if node.op_type not in ("Softmax", "Sigmoid") or inside.intersection(node.output):
            continue
        made_of = producers.get(node.input[0])
        while made_of is not None and made_of.op_type not in LAYERS:
            made_of = next((producers[name] for name in made_of.input if name in producers), None)
        if made_of is not None and _has_weights(made_of, weights):
            classes.add(node.input[0])
        elif made_of is not None:
            masks.add(made_of.output[0])
    if len(classes) != 1 or len(masks) != 1:
        raise ExportError(
            f"{path} is not a graph that `faim2f export onnx` wrote (its class and mask logits are not found): "
            "export the model with that command."
        )
    return [*classes, *masks]


def _ancestors(model: Any, names: set[str]) -> set[str]:
    """The names of all tensors on which the given ones depend, including themselves."""
    found = set(names)
    for node in reversed(model.graph.node):
        if found.intersection(node.output):
            found.update(node.input)
    return found


def cut_at(model: Any, ends: Sequence[str]) -> Any:
    """A copy of a graph that returns only these tensors, without the nodes that they do not need."""
    import onnx

    network = onnx.ModelProto()
    network.CopyFrom(model)
    needed = _ancestors(model, set(ends))
    kept = [node for node in model.graph.node if needed.intersection(node.output)]
    weights = [tensor for tensor in model.graph.initializer if tensor.name in needed]
    del network.graph.node[:], network.graph.output[:], network.graph.initializer[:]
    network.graph.node.extend(kept)
    network.graph.initializer.extend(weights)
    network.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ends)
    return network


@dataclass
class GraphReport:
    """The number of nodes of each type, and the multiply-accumulates of convolutions and matrix products."""

    nodes: Counter[str]
    macs: int

    def __str__(self) -> str:
        types = ", ".join(f"{count} {name}" for name, count in self.nodes.most_common())
        return f"{self.nodes.total()} nodes ({types}), {self.macs / 1e9:.2f} GMACs"


def report(path: Path | str, batch: int = 1, size: tuple[int, int] | None = None) -> GraphReport:
    """Counts the operations of an ONNX file.

    Args:
        path: `model.onnx`.
        batch: the batch size to count for, if it is dynamic in the graph.
        size: (height, width) to count for, if they are dynamic in the graph. The node counts are those of the file.

    Raises:
        ValueError: the graph has a dynamic size and none is given.
        ExportError: it is not an ONNX file, or refers to another file for its tensors.
    """
    read, _ = load_model(Path(path))
    import onnx_ir

    from .candidates import keep_all

    nodes = Counter(node.op_type for node in read.graph.node)
    keep_all(read)  # how many classes can win depends on the image
    model = onnx_ir.serde.deserialize_model(read)
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


def _macs(node: "onnx_ir.Node") -> int:
    if node.op_type not in ("Conv", "MatMul", "Gemm"):
        return 0
    output, left, right = (_sides(value) for value in (node.outputs[0], node.inputs[0], node.inputs[1]))
    if node.op_type == "Conv":  # the weight is (out, in / groups, kernel height, kernel width)
        return math.prod(output) * math.prod(right[1:])
    transposed = node.op_type == "Gemm" and bool(node.attributes.get_int("transA", False))
    return math.prod(output) * left[0 if transposed else -1]


def _sides(value: "onnx_ir.Value | None") -> list[int]:
    if value is None or value.shape is None or not value.shape.is_static():
        raise ValueError(f"The shape of {value.name if value else None!r} cannot be told from that of the input.")
    return [int(side) for side in value.shape if isinstance(side, int)]


__all__ = [
    "LAYERS",
    "GraphReport",
    "check_labels",
    "clean",
    "cut_at",
    "kind_of",
    "layers_with_weights",
    "listed",
    "load_model",
    "logits_of",
    "name_nodes",
    "read_graph",
    "read_settings",
    "report",
]

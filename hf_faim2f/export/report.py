"""What a graph is made of: its nodes by type, and how many multiplications with additions it takes."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx_ir

from .clean import clean
from .graph_file import load_model


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


__all__ = ["GraphReport", "report"]

"""Semantic outputs in a graph: only classes that can win some pixel are summed, resized and compared.

The plain graph resizes the sums of all classes to the image, and spends most of its time on classes that win nowhere. A
class is skipped if in every window of mask logits its upper bound is below another's lower bound. Bounds are products
of class probabilities with pooled masks: mask probabilities rise with mask logits, interpolated logits lie between
those around them, and class probabilities are not negative. Which classes are left depends on the image, so the number
of channels is dynamic. TensorRT does not support that; `keep_all` restores the plain graph for it.

`model/argmax_faim2f.py` applies the same idea in torch, and also finds the winner of whole tiles this way.
"""

from typing import Any

import numpy as np
import onnx_ir

# The bounds are those of windows of WINDOW x WINDOW mask logits, STEP apart. A pixel of the image is a mean of sums at
# two neighboring rows and columns of the grid on which they are computed. Those take mask logits of three neighboring
# rows and columns, if that grid is not coarser, and each three lie in one window.
WINDOW, STEP = 4, 2
# Tolerance per query for rounding of the sums, when an upper bound is compared with the best lower bound.
ROUNDING = 1e-6
# Prefix of the names of all added nodes and tensors.
PREFIX = "candidates_"


class _Writer:
    """Inserts nodes before a node of a graph."""

    def __init__(self, graph: onnx_ir.Graph, before: onnx_ir.Node) -> None:
        self.graph, self.before = graph, before

    def constant(self, name: str, values: Any, kind: type = np.int64) -> onnx_ir.Value:
        array: np.ndarray = np.array(values, kind)
        tensor = onnx_ir.tensor(array, name=f"{PREFIX}{name}")
        kinds = onnx_ir.TensorType(tensor.dtype)
        value = onnx_ir.Value(name=tensor.name, type=kinds, shape=onnx_ir.Shape(array.shape))
        value.const_value = tensor
        self.graph.register_initializer(value)
        return value

    def __call__(self, kind: str, name: str, *inputs: onnx_ir.Value, outputs: int = 1, **attributes: Any) -> Any:
        node = onnx_ir.node(kind, inputs, attributes, num_outputs=outputs, name=f"{PREFIX}{name}")
        for i, value in enumerate(node.outputs):
            value.name = f"{PREFIX}{name}" + (f"_{i}" if i else "")
        self.graph.insert_before(self.before, node)
        return node.outputs[0] if outputs == 1 else node.outputs


def keep_candidates(model: onnx_ir.Model, labels: int, queries: int, resizes_up: bool) -> None:
    """Changes a graph with semantic outputs, in-place, so that it computes only classes that can win.

    The label map stays the same, and the scores are the same up to the order in which products are summed.

    Args:
        model: a graph of `FaiM2FGraph` with outputs "semantic", as exported.
        labels, queries: the model's numbers of labels and of queries.
        resizes_up: mask logits are known to be resized to a grid at least as fine as their own. They are then pooled
            before resizing, on the smaller grid.

    Raises:
        ValueError: the graph has an unexpected structure.
    """
    graph = model.graph
    winner = _one(node for node in graph if node.op_type == "ArgMax")
    resize = _producer(winner.inputs[0], "Resize")
    fold = _producer(resize.inputs[0], "Reshape")  # (B, C, h * w) to (B, C, h, w)
    product = _producer(fold.inputs[0], "MatMul")
    classes, flat = product.inputs  # (B, C, Q), (B, Q, h * w)
    assert classes is not None and flat is not None
    sigmoid = _producer(_producer(flat, "Reshape").inputs[0], "Sigmoid")
    logits = _producer(sigmoid.inputs[0], "Resize").inputs[0] if resizes_up else sigmoid.inputs[0]
    assert logits is not None
    write = _Writer(graph, product)
    # 1. Bounds of each class in each window.
    chosen = _candidates(write, logits, classes, labels, queries)
    # 2. Their sums, resized.
    product.replace_input_with(0, write("Gather", "classes", classes, chosen, axis=1))
    before_fold, before_resize = _Writer(graph, fold), _Writer(graph, resize)
    sums = fold.outputs[0].shape
    if sums is not None and sums.is_static():
        shape = before_fold.constant("grid", [0, 0, *sums[2:]])
    else:
        shape = before_fold("Shape", "sides", sigmoid.outputs[0], start=2)
        shape = before_fold("Concat", "grid", before_fold.constant("same", [0, 0]), shape, axis=0)
    fold.replace_input_with(1, shape)
    fold.attributes.pop("allowzero", None)
    size = resize.inputs[3]
    assert size is not None
    if size.const_value is not None:
        size = before_resize.constant("size", size.const_value.numpy()[2:])
    else:
        bounds = (before_resize.constant(name, [place]) for name, place in (("two", 2), ("four", 4)))
        size = before_resize("Slice", "size", size, *bounds)
    resize.replace_input_with(3, size)
    resize.attributes["axes"] = onnx_ir.AttrInt64s("axes", [2, 3])
    for node in (product, fold, resize):
        node.outputs[0].shape = None
    # 3. Map indices among the candidates to classes.
    place = winner.outputs[0]
    readers = [(node, i) for node, i in place.uses() if node.op_type != "GatherElements"]
    label = onnx_ir.node("Gather", [chosen, place], {"axis": 0}, name=f"{PREFIX}label")
    label.outputs[0].name = f"{PREFIX}label"
    graph.insert_after(winner, label)
    for node, i in readers:
        node.replace_input_with(i, label.outputs[0])


def _candidates(
    write: _Writer, logits: onnx_ir.Value, classes: onnx_ir.Value, count: int, queries: int
) -> onnx_ir.Value:
    """The classes (K,) int64, ascending, that can win a pixel of some image of the batch."""
    minus = write.constant("minus", -1, np.float32)
    pooling: dict[str, Any] = {"kernel_shape": [WINDOW] * 2, "strides": [STEP] * 2, "pads": [1] * 4}
    highest = write("MaxPool", "highest_logits", logits, **pooling)
    lowest = write("MaxPool", "least_negated", write("Mul", "negated", logits, minus), **pooling)
    bounds = []
    rows = write.constant("rows", [0, queries, -1])
    for name, pooled in (("highest", highest), ("lowest", write("Mul", "lowest_logits", lowest, minus))):
        masks = write("Reshape", f"{name}_rows", write("Sigmoid", f"{name}_masks", pooled), rows)
        bounds.append(write("MatMul", f"{name}_sums", classes, masks))  # (B, C, windows)
    best = write("ReduceMax", "best", bounds[1], write.constant("over_classes", [1]), keepdims=1)
    margin = write.constant("rounding", ROUNDING * queries, np.float32)
    # Negated so that NaN keeps every class.
    beaten = write("Greater", "beaten", best, write("Add", "with_rounding", bounds[0], margin))
    stays = write("Cast", "stays_somewhere", write("Not", "stays", beaten), to=onnx_ir.DataType.FLOAT)
    stays = write("ReduceMax", "candidates", stays, write.constant("everywhere", [0, 2]), keepdims=0)  # (C,)
    number = write("ReduceSum", "number", stays, write.constant("all", [0]), keepdims=1)
    number = write("Cast", "count", number, to=onnx_ir.DataType.INT64)
    # Keys without ties, candidates first and in order.
    keys = write("Mul", "scaled", stays, write.constant("labels", count, np.float32))
    keys = write("Sub", "keys", keys, write.constant("order", range(count), np.float32))
    return write("TopK", "sorted", keys, number, outputs=2, axis=0, largest=1, sorted=1)[1]


def keep_all(model: Any) -> None:
    """Undoes `keep_candidates`, in-place: the graph compares all classes again. The label map stays the same.

    Args:
        model: an `onnx.ModelProto`; unchanged unless `keep_candidates` was applied to it.
    """
    # Readers of the selected class probabilities read all of them instead, and those of the class read the index.
    sources = {f"{PREFIX}classes": 0, f"{PREFIX}label": 1}
    instead = {n.output[0]: n.input[sources[n.name]] for n in model.graph.node if n.name in sources}
    if not instead:
        return
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = instead.get(name, name)
    read = {value.name for value in model.graph.output}
    for node in reversed(list(model.graph.node)):
        if node.name.startswith(PREFIX) and not read.intersection(node.output):
            model.graph.node.remove(node)
        else:
            read.update(node.input)
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name not in read]:
        model.graph.initializer.remove(tensor)


def _one(nodes: Any) -> onnx_ir.Node:
    found = list(nodes)
    if len(found) != 1:
        raise ValueError(f"{len(found)} nodes of a type that should occur once.")
    return found[0]


def _producer(value: onnx_ir.Value | None, kind: str) -> onnx_ir.Node:
    node = value.producer() if value is not None else None
    if node is None or node.op_type != kind:
        raise ValueError(f"{kind} expected, not {node.op_type if node else None}.")
    return node


__all__ = ["keep_all", "keep_candidates"]

"""Semantic outputs in a graph: only classes that can win some pixel are resized to the image and compared.

The plain graph resizes the sums of all classes to the image, and spends most of its time on classes that win nowhere. A
pixel of the image is interpolated from the four corners of a cell of the grid of sums. The cell's champion is the mean
of the classes that win at its corners; at each of its pixels, one of them is at least as high. So a class that is below
the champion at all four corners wins none of the cell's pixels, and one that is below in every cell is skipped. Which
classes are left depends on the image, so the number of channels is dynamic. TensorRT does not support that; `keep_all`
restores the plain graph for it.

`model/argmax_faim2f.py` has the same purpose in torch, but fills whole tiles and cells.
"""

from typing import Any

import numpy as np
import onnx_ir

# Champions are sought among the classes with the highest mean probability. Few images have more classes than this.
LEADERS = 16
# Numbers of classes, those with the highest mean probability, whose sums may be enough. They are if an upper bound of
# all others is below every champion: a class that has, for each query, the highest of their probabilities.
LEVELS = (16, 24, 32, 40, 48, 64, 96)
# Tolerance for rounding in sums and their interpolation: a share of the champion's sum, and an amount for sums so small
# that float32 rounds them coarsely.
ROUNDING, SMALLEST = 1e-4, 1e-30
FLOAT, INT64, BOOL = onnx_ir.DataType.FLOAT, onnx_ir.DataType.INT64, onnx_ir.DataType.BOOL
# Prefix of the names of all added nodes and tensors. `keep_all` leaves those that compute sizes.
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

    def slice(self, name: str, value: onnx_ir.Value, start: int, end: int, axis: int) -> onnx_ir.Value:
        bounds = (
            self.constant(f"{name}_{word}", [place]) for word, place in (("from", start), ("to", end), ("axis", axis))
        )
        return self("Slice", name, value, *bounds)


def keep_candidates(model: onnx_ir.Model, labels: int) -> None:
    """Changes a graph with semantic outputs, in-place, so that it resizes only classes that can win.

    The label map stays the same, and the scores are the same up to the order in which products are summed.

    Args:
        model: a graph of `FaiM2FGraph` with outputs "semantic", as exported.
        labels: the model's number of labels.

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
    masks = _producer(_producer(flat, "Reshape").inputs[0], "Sigmoid").outputs[0]  # (B, Q, h, w)
    write = _Writer(graph, product)
    sums = fold.outputs[0].shape
    if sums is not None and sums.is_static():
        grid = write.constant("grid", [0, 0, *sums[2:]])
    else:
        grid = write("Shape", "sides", masks, start=2)
        grid = write("Concat", "grid", write.constant("same", [0, 0]), grid, axis=0)

    # 1. What a class must reach at some grid point to win near it, and the first classes, which are enough.
    order, least, count = _leaders(write, classes, flat, grid, labels)
    first = order if count is None else write("Slice", "first", order, write.constant("start", [0]), count)
    # 2. Their sums.
    product.replace_input_with(0, write("Gather", "classes", classes, first, axis=1))
    fold.replace_input_with(1, grid)
    fold.attributes.pop("allowzero", None)
    # 3. Those of them that reach it somewhere, in the order of the model's labels.
    write = _Writer(graph, resize)
    chosen, places = _reaching(write, fold.outputs[0], least, first, labels)
    resize.replace_input_with(0, write("Gather", "sums", fold.outputs[0], places, axis=1))
    size = resize.inputs[3]
    assert size is not None
    if size.const_value is not None:
        size = write.constant("size", size.const_value.numpy()[2:])
    else:
        bounds = (write.constant(name, [place]) for name, place in (("two", 2), ("four", 4)))
        size = write("Slice", "size", size, *bounds)
    resize.replace_input_with(3, size)
    resize.attributes["axes"] = onnx_ir.AttrInt64s("axes", [2, 3])
    for node in (product, fold, resize):
        node.outputs[0].shape = None
    # 4. Map indices among the candidates to classes.
    place = winner.outputs[0]
    readers = [(node, i) for node, i in place.uses() if node.op_type != "GatherElements"]
    label = onnx_ir.node("Gather", [chosen, place], {"axis": 0}, name=f"{PREFIX}label")
    label.outputs[0].name = f"{PREFIX}label"
    graph.insert_after(winner, label)
    for node, i in readers:
        node.replace_input_with(i, label.outputs[0])


def _leaders(
    write: _Writer, classes: onnx_ir.Value, flat: onnx_ir.Value, grid: onnx_ir.Value, labels: int
) -> tuple[onnx_ir.Value, onnx_ir.Value, onnx_ir.Value | None]:
    """The classes (C,) by falling mean probability; the smallest sum (B, 1, h, w) of a champion of the cells around
    each grid point; and how many classes (1,) are enough, None for all."""
    totals = write("ReduceSum", "totals", classes, write.constant("images_and_queries", [0, 2]), keepdims=0)  # (C,)
    # NaN cannot be sorted, and excludes nothing: such a class becomes a leader.
    infinite = write.constant("infinite", np.inf, np.float32)
    totals = write("Where", "sortable", write("IsNaN", "nan", totals), infinite, totals)
    order = write("TopK", "order", totals, write.constant("labels", [labels]), outputs=2, axis=0)[1]
    leaders, levels = min(LEADERS, labels), [level for level in LEVELS if LEADERS <= level < labels]
    ranked = write("Gather", "ranked", classes, order, axis=1)
    rows = [write.slice("leaders", ranked, 0, leaders, 1)]
    for level in levels:
        rest = write.slice(f"rest_{level}", ranked, level, labels, 1)
        rows.append(write("ReduceMax", f"highest_{level}", rest, write.constant(f"over_{level}", [1]), keepdims=1))
    sums = write("MatMul", "leading_products", write("Concat", "rows", *rows, axis=1), flat)
    sums = write("Reshape", "leading_sums", sums, grid)  # (B, leaders + levels, h, w)
    leading = write.slice("leaders_sums", sums, 0, leaders, 1)
    least = _least(write, leading)
    if not levels:
        return order, least, None
    rest = write.slice("rest_sums", sums, leaders, leaders + len(levels), 1)
    # A level is enough if the rest is below everywhere; if it is NaN somewhere, it is not.
    enough = _everywhere(write, write("Less", "below", rest, least), "enough")
    counts = write("Where", "counts", enough, write.constant("levels", levels), write.constant("all", [labels]))
    return order, least, write("ReduceMin", "count", counts, write.constant("over_levels", [0]), keepdims=1)


def _reaching(
    write: _Writer, sums: onnx_ir.Value, least: onnx_ir.Value, classes: onnx_ir.Value, labels: int
) -> tuple[onnx_ir.Value, onnx_ir.Value]:
    """The classes (K,) int64 whose sums reach the smallest at some point, ascending, and their places in `sums`."""
    beaten = _everywhere(write, write("Less", "beaten", sums, least), "beaten_everywhere")  # (K,)
    stays = write("Cast", "stays", write("Not", "not_beaten", beaten), to=FLOAT)
    number = write("ReduceSum", "number", stays, write.constant("over_classes", [0]), keepdims=1)
    number = write("Cast", "candidates", number, to=INT64)
    # Keys without ties, candidates first and in the order of the labels.
    keys = write("Mul", "scaled", stays, write.constant("labels_float", labels, np.float32))
    keys = write("Sub", "keys", keys, write("Cast", "class_float", classes, to=FLOAT))
    places = write("TopK", "sorted", keys, number, outputs=2, axis=0, largest=1, sorted=1)[1]
    return write("Gather", "chosen", classes, places, axis=0), places


def _least(write: _Writer, sums: onnx_ir.Value) -> onnx_ir.Value:
    """The smallest sum (B, 1, h, w) at each point of a champion of a cell around it, less a tolerance for rounding.

    A cell's champion is the mean of the four classes that win at its corners. One of them is at least as high at every
    pixel of the cell.
    """
    winners = write("Cast", "winners_float", write("ArgMax", "winners", sums, axis=1, keepdims=1), to=FLOAT)
    winners = write("Pad", "padded", winners, write.constant("one", [0, 0, 1, 1, 0, 0, 1, 1]), mode="edge")
    axes, end = write.constant("sides_axes", [2, 3]), np.iinfo(np.int64).max
    neighbors = []  # the winners at the 3 x 3 points around each point
    for y, x in np.ndindex(3, 3):
        bounds = write.constant(f"from_{y}_{x}", [y, x]), write.constant(f"to_{y}_{x}", [y - 2 or end, x - 2 or end])
        neighbors.append(write("Slice", f"winners_{y}_{x}", winners, *bounds, axes))
    neighbors = write("Cast", "neighbors", write("Concat", "neighbors_float", *neighbors, axis=1), to=INT64)
    reached = write("GatherElements", "reached", sums, neighbors, axis=1)  # (B, 9, h, w)
    at = [write.slice(f"reached_{i}", reached, i, i + 1, 1) for i in range(9)]
    pairs = [[write("Add", f"pair_{y}_{x}", at[3 * y + x], at[3 * y + x + 1]) for x in (0, 1)] for y in (0, 1, 2)]
    cells = [write("Add", f"cell_{y}_{x}", pairs[y][x], pairs[y + 1][x]) for y in (0, 1) for x in (0, 1)]
    share = write.constant("share", (1 - ROUNDING) / 4, np.float32)
    least = write("Mul", "least_share", write("Min", "smallest", *cells), share)
    return write("Sub", "least", least, write.constant("smallest_sum", SMALLEST, np.float32))


def _everywhere(write: _Writer, maps: onnx_ir.Value, name: str) -> onnx_ir.Value:
    """Which channels (N,) of maps (B, N, h, w) of bool are true everywhere."""
    numbers = write("Cast", f"{name}_float", maps, to=FLOAT)
    least = write("ReduceMin", f"{name}_least", numbers, write.constant(f"{name}_axes", [0, 2, 3]), keepdims=0)
    return write("Cast", name, least, to=BOOL)


def keep_all(model: Any) -> None:
    """Undoes `keep_candidates`, in-place: the graph compares all classes again. The label map stays the same.

    Args:
        model: an `onnx.ModelProto`; unchanged unless `keep_candidates` was applied to it.
    """
    # Readers of the selected class probabilities and sums read all of them instead, and those of the class the index.
    sources = {f"{PREFIX}classes": 0, f"{PREFIX}sums": 0, f"{PREFIX}label": 1}
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

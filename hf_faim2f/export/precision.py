"""Reads and changes the precision of an ONNX graph.

TensorRT builds strongly typed networks: it uses the graph's types unchanged, so any cast must be in the graph.
"""

import onnx
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

# A graph's precision is the first of these types that any weight has, unless it is quantized.
WEIGHT_TYPES = {TensorProto.BFLOAT16: "bf16", TensorProto.FLOAT16: "fp16"}
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
PRODUCTS = ("MatMul", "Gemm")


def precision_of(model: ModelProto) -> str:
    """ "int8" for a graph with quantization nodes, else "bf16", "fp16" or "fp32" by the types of its weights."""
    types = {node.op_type for node in model.graph.node}
    if types.issuperset(QUANTIZERS):
        return "int8"
    weights = {tensor.data_type for tensor in model.graph.initializer}
    return next((name for kind, name in WEIGHT_TYPES.items() if kind in weights), "fp32")


def halves_to_bfloat16(model: ModelProto) -> None:
    """Converts all float16 weights, constants and casts of the graph to bfloat16, in-place."""
    for tensor in model.graph.initializer:
        _to_bfloat16(tensor)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        kind = value.type.tensor_type
        if kind.elem_type == TensorProto.FLOAT16:
            kind.elem_type = TensorProto.BFLOAT16
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _to_bfloat16(attribute.t)
            elif attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.BFLOAT16


def _to_bfloat16(tensor: TensorProto) -> None:
    if tensor.data_type != TensorProto.FLOAT16:
        return
    values = torch.from_numpy(numpy_helper.to_array(tensor).copy()).to(torch.bfloat16)
    raw = values.view(torch.int16).numpy().tobytes()
    tensor.CopyFrom(helper.make_tensor(tensor.name, TensorProto.BFLOAT16, tuple(tensor.dims), raw, raw=True))


def products_in_half(model: ModelProto) -> int:
    """Converts all float32 matrix products to float16 by adding casts, in-place; returns their number.

    float16 has the 10 mantissa bits of TF32, in which TensorRT usually multiplies float32, and a smaller range: 6e-8 to
    65504.
    """
    graph: GraphProto = model.graph
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.input, *inferred.output)}
    nodes: list[NodeProto] = []
    halves: dict[str, str] = {}
    count = 0
    for node in graph.node:
        if node.op_type not in PRODUCTS or types.get(node.output[0]) != TensorProto.FLOAT:
            nodes.append(node)
            continue
        count += 1
        for i, name in enumerate(node.input):
            if name and name not in halves:
                halves[name] = f"{name}_as_half"
                nodes.append(_cast(name, halves[name], TensorProto.FLOAT16))
            if name:
                node.input[i] = halves[name]
        product = node.output[0]
        node.output[0] = f"{product}_in_half"
        nodes += [node, _cast(node.output[0], product, TensorProto.FLOAT)]
    # Copies, because clearing the graph empties the nodes.
    kept = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    return count


def _cast(source: str, target: str, kind: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"cast_{target}", to=kind)


__all__ = ["halves_to_bfloat16", "precision_of", "products_in_half"]

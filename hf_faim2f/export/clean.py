"""An exporter's graph without its leftovers: constants worked out, and names for what may vary."""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO

import onnx_ir
import onnxscript.optimizer
from onnx_ir.passes.common import ShapeInferencePass

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


__all__ = ["clean", "quietly"]

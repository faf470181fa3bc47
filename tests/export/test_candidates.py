"""Semantic outputs computed from candidate classes equal those of all classes, for any logits."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch.nn import functional as F

from hf_faim2f import FaiM2FImageProcessor
from hf_faim2f.export.candidates import PREFIX, keep_all
from hf_faim2f.export.graph_file import layers_with_weights, logits_of, name_nodes
from hf_faim2f.export.onnx import export_onnx
from tests.support.reference_models import small_model

QUERIES, SIZE, GRID = 10, (96, 128), (24, 32)
# The size, the intermediate size, the number of classes and `cls_sigmoid` of each graph.
GRAPHS: dict[str, Any] = {
    "fixed": (SIZE, (40, 48), 20, False),
    "any": (None, None, 40, False),
    "coarse": (None, (8, 8), 12, False),
    "one row": (None, (1, 9), 20, True),
}


class End:
    """The part of a graph after the logits: returns the label map, the scores, and what the graph finds out.

    Args:
        model: the graph, an `onnx.ModelProto`.
        ends: the names of its class and mask logits.
        count: the number of classes.
    """

    def __init__(self, model: Any, ends: list[str], count: int) -> None:
        model = model.FromString(model.SerializeToString())
        for name, shape in zip(ends, (["batch", QUERIES, count + 1], ["batch", QUERIES, "pixels"]), strict=True):
            model.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
            for node in model.graph.node:
                node.output[:] = [f"{made}_unused" if made == name else made for made in node.output]
        # The classes that are resized, and the number of those whose sums are computed.
        for name in [f"{PREFIX}chosen", f"{PREFIX}count"]:
            if any(name in node.output for node in model.graph.node):
                model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None))
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        content = model.SerializeToString()
        self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self.names = [model.graph.input[0].name, *ends]

    def __call__(self, classes: torch.Tensor, masks: torch.Tensor) -> list[np.ndarray]:
        """Class logits (B, Q, C + 1) and mask logits (B, Q, h, w) to (B, H, W), (B, H, W), (K,) and (1,)."""
        pixels = np.zeros((len(classes), 3, *SIZE), np.float32)
        given = (pixels, classes.numpy(), masks.flatten(2).numpy())
        return self.session.run(None, dict(zip(self.names, given, strict=True)))


@pytest.fixture(
    scope="module",
    params=[name if name == "any" else pytest.param(name, marks=pytest.mark.large) for name in GRAPHS],
)
def graphs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[End, End, str, int]:
    """An exported graph, the same with all classes compared, its name, and the number of its classes."""
    folder = tmp_path_factory.mktemp("graphs")
    size, middle, count, cls_sigmoid = GRAPHS[request.param]
    model = small_model(num_labels=count, decoder_layers=1)
    model.save_pretrained(folder / "model")
    processor = FaiM2FImageProcessor.from_model_config(model.config, intermediate_size=middle, cls_sigmoid=cls_sigmoid)
    processor.save_pretrained(folder / "model")
    export_onnx(folder / "model", folder / "out", "semantic", size=size, batch=None, verify=False)
    found = onnx.load(folder / "out" / "model.onnx")
    onnx.checker.check_model(found)
    name_nodes(found)
    ends = logits_of(found, "semantic", layers_with_weights(found), Path("model.onnx"))
    ours = End(found, ends, count)
    keep_all(found)
    onnx.checker.check_model(found)
    assert "TopK" not in {node.op_type for node in found.graph.node}
    return ours, End(found, ends, count), request.param, count


def logits(kind: str, batch: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    classes = torch.randn(batch, QUERIES, count + 1, generator=draw)
    coarse = 6 * torch.randn(batch, QUERIES, 5, 6, generator=draw)
    masks = F.interpolate(coarse, GRID, mode="bicubic")
    if kind != "noise":  # queries that are confident in few classes
        classes[:, torch.arange(QUERIES), torch.arange(QUERIES) % 4] += 8
    else:
        masks = 3 * torch.randn(masks.shape, generator=draw)
    if kind == "ties":  # classes 4 to 7 equal classes 0 to 3, and one query is undecided
        classes[..., 4:8] = classes[..., :4]
        classes[:, 0] = 0
    if kind == "one class":
        classes[..., 7] += 30
    if kind == "void":
        classes[..., -1] += 30
    if kind == "different images":  # whose classes have nothing in common
        for image, of_queries in enumerate(classes):
            of_queries[torch.arange(QUERIES), torch.arange(QUERIES) % 4] -= 8
            of_queries[torch.arange(QUERIES), (torch.arange(QUERIES) % 4 + 4 * image) % count] += 8
    if kind in ("columns", "rows", "corner", "seam"):  # class 4 wins only between points of the grid of sums
        classes[:] = torch.cat([torch.full((QUERIES, count), -60.0), torch.full((QUERIES, 1), 60.0)], dim=1)
        classes[:, torch.arange(5), torch.arange(5)] = 90
        masks[:, :4], masks[:, 4] = -30, -0.2 if kind == "corner" else 0.95  # 45 and 72 %
        first, second = (slice(5), slice(3, None)) if kind == "seam" else (slice(16), slice(16, None))
        above, below = slice(12), slice(12, None)
        if kind == "rows":
            masks[:, 0, above] = masks[:, 1, below] = 30
        elif kind == "corner":
            masks[:, 0, above, first] = masks[:, 1, above, second] = 30
            masks[:, 2, below, first] = masks[:, 3, below, second] = 30
        else:  # "seam" is between columns of 8 x 8, which are in no common window of a finer grid
            masks[:, 0, :, first] = masks[:, 1, :, second] = 30
    if kind == "saturated":
        masks = 300 * masks.sign()
    return classes, masks


KINDS = (
    "noise", "peaked", "ties", "one class", "void", "saturated", "different images", "columns", "rows", "corner", "seam"
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 3])
def test_same_label_map(graphs: Any, kind: str, batch: int) -> None:
    few, all_classes, name, count = graphs
    classes, masks = logits(kind, batch, count)
    label_map, scores, chosen, *_ = few(classes, masks)
    theirs, expected = all_classes(classes, masks)
    assert np.array_equal(label_map, theirs)
    assert np.allclose(scores, expected, rtol=1e-6, atol=0)
    # torch in float64: pixels may only differ where two classes are nearly equal.
    _, middle, _, cls_sigmoid = GRAPHS[name]
    sums = F.interpolate(masks.double(), middle or GRID, mode="bilinear").sigmoid()
    probabilities = classes.double().sigmoid() if cls_sigmoid else classes.double().softmax(-1)
    sums = torch.einsum("bqc,bqhw->bchw", probabilities[..., :-1], sums)
    sums = F.interpolate(sums, SIZE, mode="bilinear")
    won = sums.gather(1, torch.from_numpy(label_map.astype(np.int64))[:, None])[:, 0]
    assert (sums.amax(1) - won).max() <= 1e-5 * sums.max()
    assert set(sums.argmax(1).unique().tolist()) <= set(chosen.tolist())


def test_a_class_that_wins_only_between_grid_points(graphs: Any) -> None:
    few, _, name, count = graphs
    kinds = {"fixed": ("columns", "rows"), "any": ("columns", "rows", "corner"), "coarse": ("seam",)}
    for kind in kinds.get(name, ()):
        assert 0 < (few(*logits(kind, 1, count))[0] == 4).mean() < 0.2, kind


@pytest.mark.parametrize("label", [0, 5])
def test_a_class_that_is_not_a_number_excludes_nothing(graphs: Any, label: int) -> None:
    few, all_classes, _, count = graphs
    classes, masks = logits("one class", 2, count)
    classes[0, 2, label] = torch.nan
    for ours, theirs in zip(few(classes, masks), all_classes(classes, masks), strict=False):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=0)


def test_fewer_classes_are_resized(graphs: Any) -> None:
    few, _, name, count = graphs
    if GRAPHS[name][-1]:
        return  # the logits are meant for a softmax
    assert few(*logits("peaked", 2, count))[2].tolist() == [0, 1, 2, 3]
    assert few(*logits("one class", 2, count))[2].tolist() == [7]
    classes, masks = logits("peaked", 1, count)
    classes[0, 2] = torch.nan  # which excludes no class
    assert len(few(classes, masks)[2]) == count


def test_sums_of_classes_that_cannot_win_are_not_computed(graphs: Any) -> None:
    few, _, name, count = graphs
    if GRAPHS[name][-1] or count == 12:  # fewer than LEADERS: all are computed
        return
    assert few(*logits("peaked", 2, count))[3] == 16
    # Undecided queries prefer each class a little, so that the bound for many classes is not below.
    assert few(*logits("noise", 2, count))[3] > 16

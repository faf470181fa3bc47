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
# The size, the intermediate size and the number of classes of each graph.
GRAPHS: dict[str, Any] = {"fixed": (SIZE, (40, 48), 20), "any": (None, None, 40), "coarse": (None, (8, 8), 12)}


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


@pytest.fixture(scope="module", params=list(GRAPHS))
def graphs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[End, End, Any, int]:
    """An exported graph, the same with all classes compared, the size of the grid of its sums, and its classes."""
    folder = tmp_path_factory.mktemp("graphs")
    size, middle, count = GRAPHS[request.param]
    model = small_model(num_labels=count, decoder_layers=1)
    model.save_pretrained(folder / "model")
    FaiM2FImageProcessor.from_model_config(model.config, intermediate_size=middle).save_pretrained(folder / "model")
    export_onnx(folder / "model", folder / "out", "semantic", size=size, batch=None, verify=False)
    found = onnx.load(folder / "out" / "model.onnx")
    onnx.checker.check_model(found)
    name_nodes(found)
    ends = logits_of(found, "semantic", layers_with_weights(found), Path("model.onnx"))
    ours = End(found, ends, count)
    keep_all(found)
    onnx.checker.check_model(found)
    assert "TopK" not in {node.op_type for node in found.graph.node}
    return ours, End(found, ends, count), middle or GRID, count


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
    if kind in ("between", "seam"):  # class 2 wins only between two columns of the grid of sums, in "seam" of 8x8
        classes[:] = torch.cat([torch.zeros(QUERIES, count), torch.full((QUERIES, 1), 60.0)], dim=1)
        classes[:, torch.arange(3), torch.arange(3)] = 90
        masks[:, :2], masks[:, 2] = -30, 0.8  # 69 %
        end, start = (5, 3) if kind == "seam" else (16, 16)
        masks[:, 0, :, :end] = masks[:, 1, :, start:] = 30
    if kind == "saturated":
        masks = 300 * masks.sign()
    return classes, masks


@pytest.mark.parametrize("kind", ["noise", "peaked", "ties", "one class", "void", "saturated", "between", "seam"])
@pytest.mark.parametrize("batch", [1, 3])
def test_same_label_map(graphs: Any, kind: str, batch: int) -> None:
    few, all_classes, middle, count = graphs
    classes, masks = logits(kind, batch, count)
    label_map, scores, chosen, *_ = few(classes, masks)
    theirs, expected = all_classes(classes, masks)
    assert np.array_equal(label_map, theirs)
    assert np.allclose(scores, expected, rtol=1e-6, atol=0)
    # torch in float64: pixels may only differ where two classes are nearly equal.
    sums = F.interpolate(masks.double(), middle, mode="bilinear").sigmoid()
    sums = torch.einsum("bqc,bqhw->bchw", classes.double().softmax(-1)[..., :-1], sums)
    sums = F.interpolate(sums, SIZE, mode="bilinear")
    won = sums.gather(1, torch.from_numpy(label_map.astype(np.int64))[:, None])[:, 0]
    assert (sums.amax(1) - won).max() <= 1e-5 * sums.max()
    assert set(sums.argmax(1).unique().tolist()) <= set(chosen.tolist())


def test_between_two_columns_a_third_class_wins(graphs: Any) -> None:
    few, _, _, count = graphs
    kind = "seam" if count == 12 else "between"
    assert 0 < (few(*logits(kind, 1, count))[0] == 2).mean() < 0.2


def test_fewer_classes_are_resized(graphs: Any) -> None:
    few, _, _, count = graphs
    assert few(*logits("peaked", 2, count))[2].tolist() == [0, 1, 2, 3]
    assert few(*logits("one class", 2, count))[2].tolist() == [7]
    classes, masks = logits("peaked", 1, count)
    classes[0, 2] = torch.nan  # which excludes no class
    assert len(few(classes, masks)[2]) == count


def test_sums_of_classes_that_cannot_win_are_not_computed(graphs: Any) -> None:
    few, _, _, count = graphs
    if count == 12:  # fewer than LEADERS: all are computed
        return
    assert few(*logits("peaked", 2, count))[3] == 16
    # Undecided queries prefer each class a little, so that the bound for many classes is not below.
    assert few(*logits("noise", 2, count))[3] > 16

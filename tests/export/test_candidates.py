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
from hf_faim2f.export.candidates import keep_all
from hf_faim2f.export.graph_file import layers_with_weights, logits_of, name_nodes
from hf_faim2f.export.onnx import export_onnx
from tests.support.reference_models import small_model

CLASSES, QUERIES, SIZE = 20, 10, (96, 128)
GRID, COARSE = (24, 32), (8, 8)


class End:
    """The part of a graph after the logits: returns the label map, the scores, and the classes that are compared.

    Args:
        model: the graph, an `onnx.ModelProto`.
        ends: the names of its class and mask logits.
    """

    def __init__(self, model: Any, ends: list[str]) -> None:
        model = model.FromString(model.SerializeToString())
        for name, shape in zip(ends, (["batch", QUERIES, CLASSES + 1], ["batch", QUERIES, "pixels"]), strict=True):
            model.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
            for node in model.graph.node:
                node.output[:] = [f"{made}_unused" if made == name else made for made in node.output]
        if chosen := [name for node in model.graph.node if node.op_type == "TopK" for name in node.output[1:]]:
            model.graph.output.append(onnx.helper.make_tensor_value_info(chosen[-1], onnx.TensorProto.INT64, None))
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        content = model.SerializeToString()
        self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self.names = [model.graph.input[0].name, *ends]

    def __call__(self, classes: torch.Tensor, masks: torch.Tensor) -> list[np.ndarray]:
        """Class logits (B, Q, C + 1) and mask logits (B, Q, h, w) to (B, H, W), (B, H, W) and (K,)."""
        pixels = np.zeros((len(classes), 3, *SIZE), np.float32)
        given = (pixels, classes.numpy(), masks.flatten(2).numpy())
        return self.session.run(None, dict(zip(self.names, given, strict=True)))


@pytest.fixture(scope="module", params=["fixed", "any", "coarse"])
def graphs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[End, End, Any]:
    """An exported graph, the same with all classes compared, and the size of the grid of its sums."""
    folder = tmp_path_factory.mktemp("graphs")
    model = small_model(num_labels=CLASSES, decoder_layers=1)
    size, middle = {"fixed": (SIZE, (40, 48)), "any": (None, None), "coarse": (None, COARSE)}[request.param]
    model.save_pretrained(folder / "model")
    FaiM2FImageProcessor.from_model_config(model.config, intermediate_size=middle).save_pretrained(folder / "model")
    export_onnx(folder / "model", folder / "out", "semantic", size=size, batch=None, verify=False)
    found = onnx.load(folder / "out" / "model.onnx")
    onnx.checker.check_model(found)
    name_nodes(found)
    ends = logits_of(found, "semantic", layers_with_weights(found), Path("model.onnx"))
    ours = End(found, ends)
    keep_all(found)
    onnx.checker.check_model(found)
    assert "TopK" not in {node.op_type for node in found.graph.node}
    return ours, End(found, ends), middle or GRID


def logits(kind: str, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    classes = torch.randn(batch, QUERIES, CLASSES + 1, generator=draw)
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
    if kind == "seam":  # class 2 wins only between columns that are in no common window and make a grid of 8x8
        classes[:] = torch.cat([torch.zeros(QUERIES, CLASSES), torch.full((QUERIES, 1), 60.0)], dim=1)
        classes[:, torch.arange(3), torch.arange(3)] = 90
        masks[:, :2], masks[:, 2] = -30, 0.405  # 60 %
        masks[:, 0, :, :5] = masks[:, 1, :, 3:] = 30
    if kind == "saturated":
        masks = 300 * masks.sign()
    return classes, masks


@pytest.mark.parametrize("kind", ["noise", "peaked", "ties", "one class", "void", "saturated", "seam"])
@pytest.mark.parametrize("batch", [1, 3])
def test_same_label_map(graphs: Any, kind: str, batch: int) -> None:
    few, all_classes, middle = graphs
    classes, masks = logits(kind, batch)
    label_map, scores, chosen = few(classes, masks)
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


def test_fewer_classes_are_resized(graphs: Any) -> None:
    few, _, middle = graphs
    if middle == COARSE:
        return  # whose windows are a large part of the image
    assert few(*logits("peaked", 2))[-1].tolist() == [0, 1, 2, 3]
    assert few(*logits("one class", 2))[-1].tolist() == [7]
    assert len(few(*logits("noise", 1))[-1]) > 10
    classes, masks = logits("peaked", 1)
    classes[0, 2] = torch.nan  # which excludes no class
    assert len(few(classes, masks)[-1]) == CLASSES

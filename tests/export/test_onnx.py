"""ONNX graphs, exported by transformers on 5.x and by Optimum on 4.57, give the results of torch and the processor."""

import copy
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import RTDetrResNetConfig
from transformers.utils import logging

from hf_faim2f import FaiM2FForUniversalSegmentation, FaiM2FImageProcessor, load_config
from hf_faim2f.cli.export import main
from hf_faim2f.errors import ExportError, PredictorError
from hf_faim2f.export import check
from hf_faim2f.export import graph_file as report
from hf_faim2f.export import onnx as export_onnx_module
from hf_faim2f.export.calibration import choose_images
from hf_faim2f.export.graph import OUTPUTS, FaiM2FGraph
from hf_faim2f.export.graph_file import load_model, read_graph
from hf_faim2f.export.graph_file import report as count
from hf_faim2f.export.onnx import export_onnx
from hf_faim2f.export.quantize import quantize
from hf_faim2f.export.tensorrt import export_tensorrt
from hf_faim2f.runtime import Predictor
from tests.support import forks
from tests.support.reference_models import BISENET, MODELS, reference_model, small_model

HAS_OPTIMUM = importlib.util.find_spec("optimum") is not None
SIZE = (96, 128)
# Node types of a graph with a fixed size: without shape computations, branches or computed constants.
NETWORK = {
    "Add", "AveragePool", "Cast", "Clip", "Concat", "Conv", "Floor", "GreaterOrEqual", "LayerNormalization", "MatMul",
    "MaxPool", "Mul", "ReduceMax", "Relu", "Reshape", "Resize", "Softmax", "Transpose", "Unsqueeze",
}  # fmt: skip
# Node types that post-processing adds.
POST_PROCESSING = {
    "ArgMax", "Div", "Equal", "Gather", "GatherElements", "Greater", "IsNaN", "Less", "Min", "Not", "Or", "Pad",
    "ReduceMin", "ReduceSum", "Sigmoid", "Slice", "Squeeze", "Sub", "TopK", "Where",
}  # fmt: skip
NEVER = {"If", "Loop", "Scan", "Einsum", "NonZero", "BatchNormalization", "SequenceAt", "Random", "Dropout"}


def lively_model(**overrides: Any) -> FaiM2FForUniversalSegmentation:
    """A tiny model whose label maps have several classes and whose queries are confident."""
    model = small_model(**{"decoder_layers": 3, **overrides})
    with torch.no_grad():
        model.transformer_decoder.class_predictor.weight.mul_(8)
        last: Any = model.transformer_decoder.mask_embedder.layers[-1]
        last.weight.mul_(4)
    return model


def pictures(batch: int, size: tuple[int, int]) -> torch.Tensor:
    """uint8 images (batch, 3, height, width) with structure at several scales."""
    coarse = torch.nn.functional.interpolate(torch.randn(batch, 3, 6, 8), size=size, mode="bilinear")
    return ((coarse + 0.2 * torch.randn(batch, 3, *size)) * 60 + 120).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    # With stuff classes, which the model returns in addition to the logits.
    model = lively_model(use_mask_score=True, predict_all_pixels=False, top_k=10, label_ids_to_fuse=[3, 4])
    model.save_pretrained(path)
    FaiM2FImageProcessor.from_model_config(model.config, size={"shortest_edge": 64}).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def exported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of `faim2f export onnx MODEL OUT_DIR`."""
    out = tmp_path_factory.mktemp("exported") / "out"
    with redirect_stdout(StringIO()) as printed:
        assert main(["onnx", str(folder), str(out)]) == 0
    return out, printed.getvalue()


@pytest.fixture(scope="module")
def parts(folder: Path) -> tuple[FaiM2FForUniversalSegmentation, FaiM2FImageProcessor]:
    return FaiM2FForUniversalSegmentation.from_pretrained(folder).eval(), FaiM2FImageProcessor.from_pretrained(folder)


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path / "model.onnx"), options, providers=["CPUExecutionProvider"])


def run(path: Path, inputs: torch.Tensor) -> dict[str, np.ndarray]:
    opened = session(path)
    names = [output.name for output in opened.get_outputs()]
    return dict(zip(names, opened.run(names, {opened.get_inputs()[0].name: inputs.numpy()}), strict=True))


def node_types(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path / "model.onnx").graph.node}


def error(ours: np.ndarray, theirs: torch.Tensor) -> float:
    assert ours.shape == tuple(theirs.shape)
    return float(np.abs(ours - theirs.numpy()).max() / theirs.abs().max())


def outputs_of(model: FaiM2FForUniversalSegmentation, pixel_values: torch.Tensor) -> Any:
    with torch.no_grad():
        return model(pixel_values)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"cls_sigmoid": True, "intermediate_size": None},
    {"use_mask_score": False},
    {"predict_all_pixels": True, "use_mask_score": False, "filter_empty_masks": False},
    {"predict_all_pixels": True, "mask_threshold": 0.3},
    {"top_k": 4, "use_mask_score": False},
    {"mask_threshold": 0.9, "filter_empty_masks": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: ",".join(settings) or "as saved")
@pytest.mark.parametrize("batch", [1, 2])
def test_post_processing_in_the_graph(batch: int, settings: dict[str, Any], parts: Any) -> None:
    model, processor = parts
    processor = FaiM2FImageProcessor.from_model_config(
        model.config, **{"intermediate_size": (40, 48), "threshold": 0.0, **settings}
    )
    graphs = {kind: FaiM2FGraph(model, processor, kind, "image", batch=batch) for kind in OUTPUTS}
    image = pictures(batch, SIZE)
    ours = {kind: graph(image=image) for kind, graph in graphs.items()}
    pixel_values = torch.stack([processor(i, do_resize=False, return_tensors="pt").pixel_values[0] for i in image])
    theirs = outputs_of(model, pixel_values)
    sizes = [SIZE] * batch

    assert torch.allclose(ours["logits"]["masks_queries_logits"], theirs.masks_queries_logits, atol=1e-4)
    maps = processor.post_process_semantic_segmentation(theirs, sizes, return_segmentation_scores=True)
    for expected, label_map, scores in zip(maps, *ours["semantic"].values(), strict=True):
        assert label_map.dtype == torch.uint8 and len(label_map.unique()) > 1
        found = check.Comparison()
        found.label_map(label_map, expected.segmentation_scores, 1e-5)
        assert found.unexplained == 0
        # Sigmoids can saturate, so classes may tie over whole regions.
        assert found.differing < 1e-3 * found.pixels or processor.cls_sigmoid
        assert torch.allclose(scores, expected.segmentation_scores.amax(0), atol=1e-5)

    queries = processor.post_process_queries(theirs, sizes, network_size=SIZE)
    for i, expected in enumerate(queries):
        assert torch.equal(ours["queries"]["class_ids"][i], expected.class_ids)
        assert torch.allclose(ours["queries"]["scores"][i], expected.scores, atol=1e-5)
        assert (ours["queries"]["masks"][i].bool() != expected.masks).float().mean() < 1e-4

    detections = processor.post_process_detections(theirs, sizes, network_size=SIZE)
    for i, expected in enumerate(detections):
        ids, scores, boxes, masks = (values[i] for values in ours["instances"].values())
        assert torch.equal(scores, scores.sort(descending=True).values)
        kept = int((scores > 0).sum()) if processor.filter_empty_masks else len(scores)
        assert kept == len(expected) > 0
        expected = sorted(expected, key=lambda detection: -detection.score)
        for k, detection in enumerate(expected):
            assert abs(float(scores[k]) - detection.score) < 1e-5
            assert int(ids[k]) == detection.class_id
            assert tuple(boxes[k].tolist()) == detection.box
            x_min, y_min, x_max, y_max = detection.box
            inside = masks[k, y_min : y_max + 1, x_min : x_max + 1].bool()
            assert (inside != detection.mask).float().mean() < 1e-3
            assert int(masks[k].sum()) == int(inside.sum())


def test_more_than_255_labels() -> None:
    model = small_model(num_labels=300, decoder_layers=1)
    graph = FaiM2FGraph(model, FaiM2FImageProcessor.from_model_config(model.config), "semantic")
    assert graph(pixel_values=torch.randn(1, 3, 64, 64))["segmentation"].dtype == torch.int32


def test_the_model_given_stays_as_it_is(parts: Any) -> None:
    model, processor = parts
    before, keys = model.config.to_dict(), list(model.state_dict())
    FaiM2FGraph(model, processor, precision="fp16")
    assert model.config.to_dict() == before and list(model.state_dict()) == keys and model.dtype == torch.float32
    assert model.config._attn_implementation == "sdpa"


def test_any_number_and_size(exported: tuple[Path, str], parts: Any) -> None:
    out, printed = exported
    assert "largest error" in printed and "(0 without a tie)" in printed and "GMACs" in printed
    opened = session(out)
    assert [(i.name, i.shape, i.type) for i in opened.get_inputs()] == [
        ("pixel_values", ["batch", 3, "height", "width"], "tensor(float)")
    ]
    assert [(o.name, o.shape, o.type) for o in opened.get_outputs()] == [
        ("class_queries_logits", ["batch", 10, 6], "tensor(float)"),
        ("masks_queries_logits", ["batch", 10, "mask_height", "mask_width"], "tensor(float)"),
    ]
    for batch, size in ((1, (64, 64)), (3, (96, 128)), (2, (67, 101)), (1, (32, 32)), (1, (33, 190))):
        pixel_values = torch.randn(batch, 3, *size)
        ours, theirs = run(out, pixel_values), outputs_of(parts[0], pixel_values)
        assert all(error(ours[name], theirs[name]) < 1e-4 for name in ours)
    model = onnx.load(out / "model.onnx")
    assert model.opset_import[0].version == 18
    assert not node_types(out) & NEVER

    # The folder equals the model's, except that the weights are in the graph.
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "preprocessor_config.json", "modeling_faim2f.py"} <= names
    assert not any("safetensors" in name for name in names)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "faim2f" and "AutoConfig" in config["auto_map"]
    assert FaiM2FImageProcessor.from_pretrained(out).size == {"shortest_edge": 64}
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_fixed_size(folder: Path, parts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["onnx", str(folder), str(out), "--size", "96x128", "--batch", "1", "--opset", "20", "--no-check"]) == 0
    printed = capsys.readouterr().out
    assert "not verified (--no-check)" in printed
    assert "the exported image processor resizes to 96x128" in printed
    assert node_types(out) <= NETWORK
    model = onnx.load(out / "model.onnx")
    assert model.opset_import[0].version == 20
    assert [o.shape for o in session(out).get_outputs()] == [[1, 10, 6], [1, 10, 24, 32]]
    assert FaiM2FImageProcessor.from_pretrained(out).size == {"height": 96, "width": 128}

    # Auxiliary outputs, which only training needs, are not in the graph: one product gives the classes, and one the
    # masks.
    inferred = onnx.shape_inference.infer_shapes(model)
    shapes = [
        [d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*inferred.graph.value_info, *inferred.graph.output)
    ]
    produced = {o for node in inferred.graph.node if node.op_type == "MatMul" for o in node.output}
    named = {v.name: s for v, s in zip((*inferred.graph.value_info, *inferred.graph.output), shapes, strict=True)}
    products = [named[name] for name in produced if name in named]
    assert sum(shape[-1] == 6 and shape[:2] == [1, 10] for shape in products) == 1
    assert sum(shape == [1, 10, 24 * 32] for shape in products) == 1

    graph = FaiM2FGraph(*parts, batch=1, size=SIZE)
    counter = FlopCounterMode(display=False)
    with counter:
        graph(**graph.sample())
    counted = count(out / "model.onnx")
    assert counted.macs == counter.get_total_flops() / 2
    assert counted.nodes["MatMul"] > 50 and "GMACs" in str(counted)


@pytest.mark.large  # exports
@pytest.mark.newest_only
def test_an_exporter_that_returns_torch_s_program(
    folder: Path, parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers 5.20 does, the last version for Python 3.10."""
    from transformers.exporters.exporter_onnx import OnnxExporter

    export = OnnxExporter.export
    monkeypatch.setattr(
        OnnxExporter, "export", lambda *args, **named: torch.onnx.ONNXProgram(export(*args, **named).program, None)
    )
    export_onnx(folder, tmp_path / "out", size=(64, 96), batch=1, verify=False)
    inputs = torch.randn(1, 3, 64, 96)
    found, expected = run(tmp_path / "out", inputs), outputs_of(parts[0], inputs)
    assert error(found["masks_queries_logits"], expected.masks_queries_logits) < 1e-4


def test_a_report_of_a_graph_of_any_size_needs_one(exported: tuple[Path, str], parts: Any) -> None:
    path = exported[0] / "model.onnx"
    with pytest.raises(ValueError, match="give the \\(height, width\\)"):
        count(path)
    fixed = FaiM2FGraph(*parts, batch=2, size=SIZE)
    with FlopCounterMode(display=False) as counter:
        fixed(**fixed.sample())
    assert count(path, batch=2, size=SIZE).macs == counter.get_total_flops() / 2


@pytest.mark.large  # exports instances
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param("semantic", ["--batch", "2", "--size", "96x128"], id="semantic"),
        pytest.param("instances", [], id="instances of any number and size"),
    ],
)
def test_bytes_in_and_answers_out(kind: str, options: list[str], folder: Path, parts: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["onnx", str(folder), str(out), "--outputs", kind, "--input", "image", *options]) == 0
    graph = FaiM2FGraph(parts[0], parts[1], kind, "image")
    image = pictures(2, SIZE)
    with torch.no_grad():
        theirs = graph(image=image)
    ours = run(out, image)
    assert session(out).get_inputs()[0].type == "tensor(uint8)"
    assert list(ours) == list(theirs) == list(OUTPUTS[kind])
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.numpy().dtype and ours[name].shape == expected.shape
        if expected.is_floating_point():
            assert error(ours[name], expected) < 1e-5
        else:
            assert (ours[name] == expected.numpy()).mean() > 0.999
    types = node_types(out)
    assert not types & NEVER
    if options:
        assert types <= NETWORK | POST_PROCESSING


@pytest.mark.large
@pytest.mark.parametrize(
    "kind",
    [
        "logits",
        # `test_bytes_in_and_answers_out` tests post-processing with both exporters.
        *(pytest.param(kind, marks=pytest.mark.newest_only) for kind in ("semantic", "instances", "queries")),
    ],
)
def test_bisenetformer_of_any_number_and_size(kind: str, tmp_path: Path) -> None:
    """Masks at 1/8, and spatial means in the pixel decoder, for sizes that were not traced."""
    model = lively_model(decoder_layers=1, use_mask_score=True, predict_all_pixels=False, top_k=10, **BISENET)
    processor = FaiM2FImageProcessor.from_model_config(model.config, size={"shortest_edge": 64})
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    export_onnx(tmp_path / "model", tmp_path / "out", outputs=kind, input_name="image", verify=False)
    graph = FaiM2FGraph(model, processor, kind, "image")
    for batch, size in ((2, SIZE), (1, (33, 190))):
        image = pictures(batch, size)
        with torch.no_grad():
            theirs = graph(image=image)
        ours = run(tmp_path / "out", image)
        assert list(ours) == list(OUTPUTS[kind])
        for name, expected in theirs.items():
            assert ours[name].dtype == expected.numpy().dtype and ours[name].shape == expected.shape
            if expected.is_floating_point():
                assert error(ours[name], expected) < 1e-4
            else:
                assert (ours[name] == expected.numpy()).mean() > 0.999
        if kind == "logits":
            assert ours["masks_queries_logits"].shape[2:] == tuple(-(-side // 8) for side in size)
    assert not node_types(tmp_path / "out") & NEVER
    assert FaiM2FImageProcessor.from_pretrained(tmp_path / "out").mask_stride == 8


@pytest.mark.large
def test_resnet_d_of_any_number_and_size(tmp_path: Path) -> None:
    """The backbone of Focoos's large and COCO models. Its pooling rounds odd sizes up."""
    backbone = RTDetrResNetConfig(embedding_size=8, hidden_sizes=[16, 32, 64, 128], depths=[1, 2, 1, 1])
    model = lively_model(decoder_layers=1, backbone_config=backbone.to_dict())
    model.save_pretrained(tmp_path / "model")
    FaiM2FImageProcessor.from_model_config(model.config, size={"shortest_edge": 64}).save_pretrained(tmp_path / "model")
    export_onnx(tmp_path / "model", tmp_path / "out")
    for batch, size in ((2, SIZE), (1, (33, 190)), (3, (101, 67)), (1, (160, 96))):
        pixel_values = torch.randn(batch, 3, *size)
        ours, theirs = run(tmp_path / "out", pixel_values), outputs_of(model, pixel_values)
        assert max(error(ours[key], theirs[key]) for key in ours) < 1e-4, size


@pytest.mark.large
def test_half_precision(folder: Path, parts: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_onnx(folder, out, size=SIZE, batch=2, precision="fp16")
    model = onnx.load(out / "model.onnx")
    weights = [tensor for tensor in model.graph.initializer if tensor.name.endswith("weight")]
    assert weights and all(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in weights)
    opened = session(out)
    assert {value.type for value in (*opened.get_inputs(), *opened.get_outputs())} == {"tensor(float)"}
    pixel_values = torch.randn(2, 3, *SIZE)
    ours, theirs = run(out, pixel_values), outputs_of(parts[0], pixel_values)
    assert 1e-5 < max(error(ours[name], theirs[name]) for name in ours) < 0.1


@pytest.mark.large  # full-size models
@pytest.mark.parametrize("name", MODELS)
def test_every_member_of_the_family(name: str, tmp_path: Path) -> None:
    """With the reference weights. Random weights would not do: with nine layers, rounding decides what a query attends
    to, and torch's own outputs vary by a few percent."""
    model = reference_model(name)
    assert model.config.num_labels == load_config(name).num_labels
    model.save_pretrained(tmp_path / "model")
    FaiM2FImageProcessor.from_model_config(model.config).save_pretrained(tmp_path / "model")
    export_onnx(tmp_path / "model", tmp_path / "out", size=SIZE, batch=1, verify=False)
    graph = FaiM2FGraph(model, FaiM2FImageProcessor.from_pretrained(tmp_path / "out"), batch=1, size=SIZE)
    pixel_values = graph.sample()["pixel_values"]
    ours, theirs = run(tmp_path / "out", pixel_values), outputs_of(model, pixel_values)
    assert list(ours) == ["class_queries_logits", "masks_queries_logits"]
    assert max(error(ours[key], theirs[key]) for key in ours) < 1e-4
    processor = FaiM2FImageProcessor.from_pretrained(tmp_path / "out")
    mapped, expected = (
        processor.post_process_semantic_segmentation(outputs, [SIZE])[0]
        for outputs in ({key: torch.from_numpy(value) for key, value in ours.items()}, theirs)
    )
    assert (mapped != expected).float().mean() < 1e-4
    pooled = {"ReduceMean", "Sigmoid"} if model.config.pixel_decoder_type == "bisenet" else set()
    assert node_types(tmp_path / "out") <= NETWORK | pooled


def mistake(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The command's error message; asserts that it is one sentence and the only output."""
    assert main(["onnx", *map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("faim2f export: ") and printed.err.count("\n") == 1
    assert "Traceback" not in printed.err
    return printed.err


def test_mistakes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert "opset 16 cannot be written: choose 18 to 20" in mistake(capsys, folder, out, "--opset", 16)
    assert "size 16x640" in mistake(capsys, folder, out, "--size", "16x640")
    assert "size 64x99999" in mistake(capsys, folder, out, "--size", "64x99999")
    assert "batch must be at least 1" in mistake(capsys, folder, out, "--batch", 0)
    assert "is not a model folder" in mistake(capsys, tmp_path, out)
    assert "is not a folder" in mistake(capsys, folder, tmp_path / "not" / "there")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "mask2former"}')
    assert "holds a model of type 'mask2former'" in mistake(capsys, other, out)
    (other / "config.json").write_text('{"model_type": "faim2f", "num_queries": -3}')
    for name in ("preprocessor_config.json", "model.safetensors"):
        shutil.copy(folder / name, other)
    assert "num_queries" in mistake(capsys, other, out)
    shutil.copytree(folder, tmp_path / "copy")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (tmp_path / "copy" / "preprocessor_config.json").write_text(json.dumps({**settings, "do_rescale": False}))
    assert "takes pixels in 0..1" in mistake(capsys, tmp_path / "copy", out, "--input", "image")
    (tmp_path / "copy" / "preprocessor_config.json").unlink()
    assert "has no preprocessor_config.json, which says how images are" in mistake(capsys, tmp_path / "copy", out)
    shutil.rmtree(tmp_path / "copy")
    (other / "model.safetensors").unlink()
    (other / "openvino_model.xml").touch()
    assert "is an export already (it has openvino_model.xml): name the folder" in mistake(capsys, other, out)
    assert "exists already" in mistake(capsys, folder, other)
    with pytest.raises(SystemExit, match="2"):
        main(["onnx", str(folder), str(out), "--size", "large"])
    assert "neither HEIGHTxWIDTH, such as 640x640, nor dynamic" in capsys.readouterr().err
    monkeypatch.setattr(export_onnx_module, "_has", lambda module: module not in ("onnx", "onnxscript"))
    assert "needs onnx and onnxscript, which are not installed: pip install" in mistake(capsys, folder, out)
    assert not out.exists() and {path.name for path in tmp_path.iterdir()} == {"other"}
    with pytest.raises(ExportError, match="outputs must be one of logits"):
        export_onnx(folder, out, outputs="masks")


@pytest.mark.parametrize(("kind", "of_graph"), [("triton", 0), ("triton", 1), ("web", 0)])
def test_exports_name_libraries_that_are_missing(kind: str, of_graph: int, folder: Path, tmp_path: Path) -> None:
    source = folder
    if of_graph:
        source = tmp_path / "graph"
        shutil.copytree(folder, source, ignore=shutil.ignore_patterns("*.safetensors"))
        (source / "model.onnx").touch()
    done = forks.run(forks.WITHOUT_ONNX, "export", kind, source, tmp_path / "out")
    # With transformers 4.57, the exporter is Optimum's.
    extra = "onnx" if of_graph or not HAS_OPTIMUM else "optimum"
    assert done.returncode == 2 and done.error.count("\n") == 1 and f"pip install 'hf-faim2f[{extra}]'" in done.error


@pytest.mark.large
def test_a_graph_that_does_not_agree_is_not_kept(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the exporter had dropped a bias, which only the comparison can detect."""
    written = export_onnx_module._save

    def damage(exported: Any, path: Path) -> None:
        written(exported, path)
        model = onnx.load(path)
        bias = next(t for t in model.graph.initializer if t.name.endswith("class_predictor.bias"))
        bias.raw_data = (np.frombuffer(bias.raw_data, np.float32) + 1).tobytes()
        onnx.save(model, path)

    monkeypatch.setattr(export_onnx_module, "_save", damage)
    logging.disable_progress_bar()  # as `faim2f` does
    told = mistake(capsys, folder, tmp_path / "out", "--size", "64x64", "--batch", "1")
    assert "does not agree with the model" in told and "--no-check" in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "name", "told"),
    [
        (*(("hf_faim2f.export.optimum", "export_graph") if HAS_OPTIMUM else
           ("hf_faim2f.export.onnx", "_export_by_transformers")),
         "a backbone of type 'faim2f_stdc', cannot be exported to ONNX (RuntimeError: no such operator)"),
        pytest.param(
            "hf_faim2f.export.candidates", "keep_candidates", "cannot be exported to ONNX (RuntimeError: no such",
            marks=pytest.mark.large,
        ),
        pytest.param(
            "onnxruntime", "InferenceSession", "cannot open the exported graph (RuntimeError: no such operator)",
            marks=[pytest.mark.newest_only, pytest.mark.large],  # Optimum itself opens the graph
        ),
    ],
)  # fmt: skip
def test_failures_of_an_exporter_are_sentences(
    module: str, name: str, told: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such operator.\nIt is not there.")

    monkeypatch.setattr(f"{module}.{name}", fail)
    logging.disable_progress_bar()
    found = mistake(capsys, folder, tmp_path / "out", "--size", "64x64", "--batch", "1", "--outputs", "semantic")
    assert told in found and "please report it with the model's config.json." in found
    assert list(tmp_path.iterdir()) == []


def test_a_size_is_also_that_of_a_processor_that_does_not_resize(tmp_path: Path) -> None:
    processor = FaiM2FImageProcessor(do_resize=False, pad_size={"height": 200, "width": 200}, size_divisor=32)
    image = np.zeros((50, 70, 3), np.uint8)
    resized = export_onnx_module.resizing_to(processor, (64, 90))
    assert resized(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 64, 90)
    # Images of a calibration are prepared as `Predictor` does, without padding.
    Image.fromarray(image).save(tmp_path / "a.png")
    entry = onnx.helper.make_tensor_value_info("pixel_values", onnx.TensorProto.FLOAT, [1, 3, None, None])
    calibration = choose_images(tmp_path, processor, entry, 1, 1)
    assert next(calibration.inputs()).shape == (1, 3, 50, 70)


def test_ties_are_told_from_errors() -> None:
    found, rounding = check.Comparison(), check.Comparison()
    sums = torch.tensor([[[1.0, 2.0, 3.0]], [[1.0005, 1.0, 3.0]]])  # (C, H, W)
    found.label_map(torch.tensor([[0, 1, 0]]), sums, 1e-3)
    assert (found.pixels, found.differing, found.unexplained) == (3, 2, 1)
    rows = torch.stack([torch.ones(40, 40), 2 * torch.ones(40, 40)])
    found, off = check.Comparison(), torch.ones(40, 40, dtype=torch.int64)
    off[0, :3] = 0  # 3 of 1600 pixels, where 2 may be on the wrong side of a threshold
    found.label_map(off, rows)
    rounding.label_map(torch.ones(40, 40, dtype=torch.int64), rows)
    assert found.unexplained == 3 and not found.agrees(rounding) and found.moved(rounding)["segmentation"].all()
    found, rounding = check.Comparison(), check.Comparison()
    found.numbers("logits", np.array([[np.nan]]), torch.ones(1, 1))
    rounding.numbers("logits", np.array([[1.3]]), torch.ones(1, 1))  # whatever torch's own error is
    assert not found.agrees(rounding) and found.moved(rounding)["logits"].all()
    with pytest.raises(ExportError, match=r"gives \(2, 1\) where the model gives \(1, 1\)"):
        found.numbers("logits", np.ones((2, 1)), torch.ones(1, 1))
    with pytest.raises(ExportError, match="are not finite, in float64 too"):
        found.numbers("logits", np.ones((1, 1)), torch.full((1, 1), np.nan))


def test_the_measure_is_how_far_torch_is_from_float64() -> None:
    """The graph is exact for all four queries except the third, for which torch in float32 is wrong, too."""
    exact = torch.tensor([[[1.0], [0.5], [0.25], [-1.0]]], dtype=torch.float64)  # (B, Q, 1)
    rounded = exact.numpy() + np.array([1e-6, 1e-6, 0.01, 1e-6])[None, :, None]
    rounding = check.Comparison()
    rounding.numbers("logits", rounded, exact)
    for distances, agrees, moved in (
        ([4e-6, 1e-6, 0.04, 0], True, [False] * 4),
        ([4e-6, 1e-6, 0.06, 0], True, [False, False, True, False]),  # 6 times torch's error, for this query only
        ([9e-6, 0.01, 0, 0], True, [False, True, False, False]),
        ([1e-3, 1e-3, 1e-3, 1e-3], False, [True, True, False, True]),  # no query has torch's typical error
    ):
        found = check.Comparison()
        found.numbers("logits", exact.numpy() + np.array(distances)[None, :, None], exact)
        assert found.agrees(rounding) == agrees
        assert found.moved(rounding)["logits"].tolist() == moved


def rounded_model() -> FaiM2FForUniversalSegmentation:
    """A model whose first query has masks near 0, so that rounding decides what it attends to."""
    model = lively_model(num_queries=20, decoder_layers=3)
    decoder: Any = model.transformer_decoder
    with torch.no_grad():
        last = decoder.mask_embedder.layers[-1]
        last.weight.mul_(4)
        _, embedding = decoder._embed(decoder.query_features.weight[:1])
        last.bias -= embedding[0]
        decoder.layers[0].cross_attention.out_proj.weight.mul_(0.05)
        for layer in decoder.layers:  # limits the effect on other queries
            layer.self_attention.out_proj.weight.mul_(1e-3)
    return model


LARGE = [pytest.mark.newest_only, pytest.mark.large]
NEWEST_KINDS = [pytest.param(kind, marks=LARGE) for kind in ("semantic", "instances", "queries")]


@pytest.fixture(scope="module", params=["logits", *NEWEST_KINDS])  # the check does not depend on the exporter
def undamaged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A graph of `rounded_model`, with the other arguments of `check`."""
    source, out = (tmp_path_factory.mktemp("rounded") / name for name in ("model", "out"))
    model = rounded_model()
    processor = FaiM2FImageProcessor.from_model_config(model.config)
    model.save_pretrained(source)
    processor.save_pretrained(source)
    export_onnx(source, out, outputs=request.param, size=(160, 192), batch=1, verify=False)
    graph = FaiM2FGraph(model, processor, request.param, batch=1, size=(160, 192))
    return out / "model.onnx", graph, model, processor


def test_rounding_is_told_from_a_wrong_graph(undamaged: Any) -> None:
    _, graph, model, _ = undamaged
    (line,) = check.check(*undamaged)
    pixel_values = graph.sample()["pixel_values"]
    exact = copy.deepcopy(model).double()
    theirs, ours = outputs_of(exact, pixel_values.double()), outputs_of(model, pixel_values)
    distances = (theirs.masks_queries_logits - ours.masks_queries_logits).abs().amax((0, 2, 3))
    distances /= theirs.masks_queries_logits.abs().max()
    assert distances[0] > 1e-3 and distances[1:].median() < 1e-5  # why the check runs in float64
    assert "against float64 in torch on 1x3x160x192: largest error" in line


def swap_weights(graph: onnx.GraphProto) -> None:
    """Swaps two rows of one matrix in the decoder."""
    weight = next(t for t in graph.initializer if len(t.dims) == 2 and t.dims[0] == t.dims[1] == 32)
    values = onnx.numpy_helper.to_array(weight).copy()
    values[[3, 11]] = values[[11, 3]]
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))


def resize_by_nearest(graph: onnx.GraphProto) -> None:
    """Changes all bilinear resizing to nearest neighbor."""
    modes = [a for node in graph.node if node.op_type == "Resize" for a in node.attribute if a.name == "mode"]
    assert any(mode.s == b"linear" for mode in modes)
    for mode in modes:
        mode.s = b"nearest"


def align_corners(graph: onnx.GraphProto) -> None:
    node = [node for node in graph.node if node.op_type == "Resize"][-1]
    attribute = next(a for a in node.attribute if a.name == "coordinate_transformation_mode")
    attribute.s = b"align_corners"


def shift_masks(graph: onnx.GraphProto) -> None:
    """Shifts the last output with columns (mask logits, label map or masks) by one pixel to the right."""
    output = next(o for o in graph.output if o.name in ("masks_queries_logits", "segmentation", "masks"))
    axis = len(output.type.tensor_type.shape.dim) - 1
    for node in graph.node:
        for i, name in enumerate(node.output):
            if name == output.name:
                node.output[i] = "before"
    for name, values in (("zero", [0]), ("one", [1]), ("less", [-1]), ("axis", [axis])):
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(values, np.int64), f"shift_{name}"))
    graph.node.extend(
        [
            onnx.helper.make_node("Slice", ["before", "shift_zero", "shift_one", "shift_axis"], ["first"]),
            onnx.helper.make_node("Slice", ["before", "shift_zero", "shift_less", "shift_axis"], ["rest"]),
            onnx.helper.make_node("Concat", ["first", "rest"], [output.name], axis=axis),
        ]
    )


@pytest.mark.parametrize("damage", [swap_weights, resize_by_nearest, align_corners, shift_masks])
def test_a_wrong_graph_is_refused_by_the_same_tolerance(undamaged: Any, damage: Any, tmp_path: Path) -> None:
    path, *rest = undamaged
    model = onnx.load(path)
    damage(model.graph)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="does not agree with the model"):
        check.check(tmp_path / "model.onnx", *rest)


@pytest.mark.newest_only
@pytest.mark.parametrize("fault", [None, "none", "worst", "repeated", "boxes"])
def test_the_best_instances_are_chosen(fault: str | None) -> None:
    """Of 20 queries, the 4 best; masks and scores of the others would match the model as well."""
    model = lively_model(num_queries=20, top_k=4)
    processor = FaiM2FImageProcessor.from_model_config(model.config)
    graph, whole = (FaiM2FGraph(model, processor, "instances", batch=1, size=(96, 128)) for _ in range(2))
    whole.top_k = 20

    @torch.no_grad()
    def run(inputs: torch.Tensor) -> dict[str, Any]:
        rows = {"worst": [*range(16, 20)], "repeated": [0] * 4}.get(str(fault), [*range(4)])
        answers = {name: values.numpy()[:, rows] for name, values in whole(inputs).items()}
        if fault == "none":
            answers["scores"] = np.zeros_like(answers["scores"])
        if fault == "boxes":  # of which the other outputs tell nothing
            answers["boxes"] = answers["boxes"][..., [1, 0, 3, 2]]
        return answers

    exported = check.Exported("torch", run)
    if fault is None:
        assert "largest error" in check.check(exported, graph, model, processor)[0]
    else:
        with pytest.raises(ExportError, match="does not agree with the model"):
            check.check(exported, graph, model, processor)


def external(name: str, location: str) -> onnx.TensorProto:
    tensor = onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, [4], np.ones(4, np.float32).tobytes(), raw=True)
    onnx.external_data_helper.set_external_data(tensor, location)
    tensor.ClearField("raw_data")
    return tensor


def in_an_initializer(model: onnx.ModelProto, location: str) -> None:
    model.graph.initializer.append(external("w", location))


def without_the_mark(model: onnx.ModelProto, location: str) -> None:
    """Declares the data as internal, but keeps the reference to a file."""
    tensor = external("w", location)
    tensor.data_location = onnx.TensorProto.DEFAULT
    model.graph.initializer.append(tensor)


def in_a_constant(model: onnx.ModelProto, location: str) -> None:
    model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["c"], value=external("w", location)))


def in_a_branch(model: onnx.ModelProto, location: str) -> None:
    branch = onnx.helper.make_graph([], "then", [], [], [external("w", location)])
    model.graph.node.insert(0, onnx.helper.make_node("If", ["c"], [], then_branch=branch, else_branch=branch))


def in_a_function(model: onnx.ModelProto, location: str) -> None:
    node = onnx.helper.make_node("Constant", [], ["y"], value=external("w", location))
    model.functions.append(onnx.helper.make_function("own", "f", [], ["y"], [node], model.opset_import))


def in_a_sparse_tensor(model: onnx.ModelProto, location: str) -> None:
    sparse = onnx.SparseTensorProto(dims=[8])
    sparse.values.CopyFrom(external("w", location))
    model.graph.sparse_initializer.append(sparse)


@pytest.mark.parametrize(
    ("put", "location"),
    [
        *((in_an_initializer, location) for location in ("../secret", "link", "beside", "/etc/hostname", "")),
        *((put, "../secret") for put in (without_the_mark, in_a_constant, in_a_branch, in_a_function)),
        (in_a_sparse_tensor, "../secret"),
    ],
)
def test_a_file_that_names_another_is_refused(
    put: Any, location: str, exported: tuple[Path, str], tmp_path: Path
) -> None:
    """By every reader of graphs, whether or not the file exists."""
    out = tmp_path / "out"
    shutil.copytree(exported[0], out)
    (out / "beside").write_bytes(bytes(16))
    (out / "link").symlink_to(tmp_path / "secret")
    model = onnx.load(out / "model.onnx")
    put(model, location)
    (out / "model.onnx").write_bytes(model.SerializeToString())

    with pytest.raises(ExportError, match="names another file"):
        load_model(out / "model.onnx")
    with pytest.raises(ExportError, match="names another file"):
        read_graph(out / "model.onnx")
    with pytest.raises(ExportError, match="names another file"):
        count(out / "model.onnx", size=(64, 64))
    with pytest.raises(PredictorError, match="names another file"):
        Predictor.from_pretrained(out, "onnxruntime")
    images = tmp_path / "images"
    images.mkdir()
    with pytest.raises(ExportError, match="names another file"):
        quantize(out, tmp_path / "int8", images)
    if importlib.util.find_spec("tensorrt_rtx"):
        with pytest.raises(ExportError, match="names another file"):
            export_tensorrt(out, tmp_path / "engine", gpu="sm86")


def test_a_graph_that_is_no_file_or_no_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(ExportError, match="is not a file"):
        load_model(path)
    os.mkfifo(path)
    with pytest.raises(ExportError, match="is not a file"):  # without waiting for it
        load_model(path)
    path.unlink()
    path.write_bytes(b"\\xff" * 100)
    with pytest.raises(ExportError, match="is not a readable ONNX file"):
        load_model(path)
    path.write_bytes(onnx.ModelProto(producer_name="x" * 200).SerializeToString())
    assert load_model(path)[1] == path.read_bytes()
    monkeypatch.setattr(onnx.checker, "MAXIMUM_PROTOBUF", 100)
    with pytest.raises(ExportError, match="has more than 100 bytes"):
        load_model(path)


def test_reports_count_by_type() -> None:
    counted = report.GraphReport(nodes=report.Counter({"Conv": 2, "Add": 1}), macs=1_500_000_000)
    assert str(counted) == "3 nodes (2 Conv, 1 Add), 1.50 GMACs"


@pytest.mark.skipif(not HAS_OPTIMUM, reason="needs Optimum, which needs transformers 4.57")
class TestOptimum:
    def test_its_classes_load_what_is_exported(self, exported: tuple[Path, str], parts: Any) -> None:
        from optimum.onnxruntime import ORTModelForCustomTasks

        loaded = ORTModelForCustomTasks.from_pretrained(exported[0], trust_remote_code=True)
        pixel_values = torch.randn(2, 3, 70, 90)
        ours, theirs = loaded(pixel_values=pixel_values), outputs_of(parts[0], pixel_values)
        assert all(error(ours[name].numpy(), theirs[name]) < 1e-4 for name in OUTPUTS["logits"])
        maps = parts[1].post_process_semantic_segmentation(ours, [(70, 90)] * 2)
        assert torch.equal(maps[0], parts[1].post_process_semantic_segmentation(theirs, [(70, 90)] * 2)[0])

    @pytest.mark.large
    def test_its_command_with_the_model_registered(self, folder: Path, parts: Any, tmp_path: Path) -> None:
        from optimum.onnxruntime import ORTModelForCustomTasks

        arguments = ["export", "onnx", "--model", folder, "--task", "image-segmentation", "--trust-remote-code"]
        command = [sys.executable, "-m", "hf_faim2f.export.optimum", *arguments, tmp_path / "out"]
        result = subprocess.run([*map(str, command)], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        loaded = ORTModelForCustomTasks.from_pretrained(tmp_path / "out", trust_remote_code=True)
        pixel_values = torch.randn(1, 3, 100, 75)
        ours, theirs = loaded(pixel_values=pixel_values), outputs_of(parts[0], pixel_values)
        assert list(ours) == list(OUTPUTS["logits"])
        assert all(error(ours[name].numpy(), theirs[name]) < 1e-4 for name in ours)
        assert not node_types(tmp_path / "out") & NEVER

    @pytest.mark.large
    def test_its_functions_take_remote_models(self, folder: Path, tmp_path: Path) -> None:
        from optimum.exporters.onnx import main_export, onnx_export_from_model
        from transformers import AutoModelForUniversalSegmentation

        from hf_faim2f.export.optimum import register

        register()
        register()
        main_export(str(folder), tmp_path / "main", task="image-segmentation", trust_remote_code=True)
        model = AutoModelForUniversalSegmentation.from_pretrained(folder, trust_remote_code=True)
        onnx_export_from_model(model, tmp_path / "from model", task="image-segmentation")
        pixel_values = torch.randn(1, 3, 64, 96)
        ours, theirs = (run(tmp_path / name, pixel_values) for name in ("main", "from model"))
        assert all(np.array_equal(ours[name], theirs[name]) for name in OUTPUTS["logits"])

    def test_its_graphs_are_taken_by_what_runs_in_the_newest_environment_alone(
        self, folder: Path, tmp_path: Path
    ) -> None:
        """In int8, with every layer, and as an engine; everything else about them is tested with the other exporter's
        graphs."""
        export_onnx(folder, tmp_path / "float", size=SIZE, batch=1, verify=False)
        images = tmp_path / "images"
        images.mkdir()
        for i, pixels in enumerate(pictures(3, SIZE)):
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(images / f"{i}.png")
        lines = quantize(tmp_path / "float", tmp_path / "int8", images, "tensorrt", max_error=1.0)
        model = onnx.load(tmp_path / "float" / "model.onnx")
        weights = {tensor.name for tensor in model.graph.initializer}
        layers = sum(n.op_type in ("Conv", "MatMul", "Gemm") and n.input[1] in weights for n in model.graph.node)
        assert layers > 40
        assert f"{layers} of {layers} layers with weights are in int8, for tensorrt" in lines
        if importlib.util.find_spec("tensorrt_rtx"):
            export_tensorrt(tmp_path / "int8", tmp_path / "engine", precision="int8", gpu="sm86")
            assert (tmp_path / "engine" / "model.engine").stat().st_size > 1e6


def test_a_graph_tells_nothing_of_the_machine_that_made_it(exported: tuple[Path, str]) -> None:
    """Exporters record the stack of every node, which contains local paths."""
    content = (exported[0] / "model.onnx").read_bytes()
    assert b"stack_trace" not in content and b".py" not in content
    graph = onnx.load_from_string(content)
    assert not any(node.metadata_props or node.doc_string for node in graph.graph.node)
    assert {entry.key for entry in graph.metadata_props} == {"faim2f.outputs", "faim2f.input", "faim2f.precision"}

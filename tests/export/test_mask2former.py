"""Mask2Former as graphs: Swin's windows and deformable attention, at fixed and dynamic sizes, in float and in int8.

The models are tiny but have every part of the large ones: two layers per stage, so that windows are shifted; sides that
are not multiples of a window; three levels. benchmarks/mask2former_export.py does the same at full width.
"""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from transformers import ConvNextConfig, ResNetConfig, SwinBackbone, SwinConfig

from hf_faim2f import FaiM2FForUniversalSegmentation, FaiM2FImageProcessor
from hf_faim2f.cli.export import main
from hf_faim2f.export.graph import FaiM2FGraph, SwinForGraphs
from hf_faim2f.export.onnx import export_onnx
from hf_faim2f.export.quantize import RUNTIMES, quantize
from hf_faim2f.export.tensorrt import export_tensorrt
from tests.support.lively_model import photographs
from tests.support.mask2former_models import KEYS, STAGES, ours_of, tiny
from tests.support.reference_models import relative_error, small_model

HAS_LIBRARY = importlib.util.find_spec("tensorrt_rtx") is not None
HAS_OPTIMUM = importlib.util.find_spec("optimum") is not None
SIZE = (72, 100)  # maps of 18x25, 9x13, 5x7 and 3x4: all need padded rows or columns
OTHERS = ((1, (64, 64)), (2, (101, 67)), (1, (40, 190)))
SWIN = SwinConfig(embed_dim=16, depths=[2, 1, 2, 1], num_heads=[2, 2, 2, 4], window_size=4, out_features=STAGES)
RESNET = ResNetConfig(
    embedding_size=8, hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1], layer_type="basic", out_features=STAGES
)
BACKBONES = {"swin": SWIN, "resnet": RESNET}
NEVER = {
    "If",
    "Loop",
    "Scan",
    "Einsum",
    "NonZero",
    "Range",
    "Shape",
    "ConstantOfShape",
    "Mod",
    "Sin",
    "Cos",
    "ScatterND",
}


def model_of(backbone: SwinConfig | ResNetConfig, decoder_layers: int = 2) -> FaiM2FForUniversalSegmentation:
    """A converted model with confident classes and masks."""
    model = ours_of(tiny(backbone, encoder_layers=1, decoder_layers=decoder_layers + 1))
    with torch.no_grad():
        model.transformer_decoder.class_predictor.weight.mul_(8)
        last: Any = model.transformer_decoder.mask_embedder.layers[-1]
        last.weight.mul_(4)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name in BACKBONES:
        model = model_of(BACKBONES[name])
        model.save_pretrained(root / name)
        FaiM2FImageProcessor.from_model_config(model.config, size={"shortest_edge": 72}).save_pretrained(root / name)
    return {name: root / name for name in BACKBONES}


def run(path: Path, inputs: torch.Tensor) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = onnxruntime.InferenceSession(str(path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {session.get_inputs()[0].name: inputs.numpy()}), strict=True))


@pytest.mark.parametrize("any_size", [True, False])
@pytest.mark.parametrize(("window", "patch", "stages"), [(4, 4, STAGES), (7, 4, ["stage2", "stage4"]), (6, 2, STAGES)])
def test_swin_for_graphs_equals_transformers(window: int, patch: int, stages: list[str], any_size: bool) -> None:
    """With nonzero position biases, and with sides of every remainder modulo window and patch size."""
    config = SwinConfig(
        embed_dim=16, depths=[2, 2, 3, 2], num_heads=[1, 2, 2, 4], window_size=window, patch_size=patch,
        out_features=stages, qkv_bias=window != 7,
    )  # fmt: skip
    theirs = SwinBackbone(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    ours = SwinForGraphs(theirs, any_size).eval()
    for size in ((64, 96), (97, 130), (33, 65), (32, 32)):
        pixels = torch.randn(2, 3, *size)
        with torch.no_grad():
            for one, other in zip(ours(pixels).feature_maps, theirs(pixels).feature_maps, strict=True):
                assert one.shape == other.shape and relative_error(one, other) < 1e-5, size


@pytest.mark.slow  # exports and builds an engine for each
@pytest.mark.parametrize("backbone", [pytest.param("swin", marks=pytest.mark.large), "resnet"])
def test_a_fixed_size(backbone: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Everything static is folded, and the graph's outputs equal those of the model and its processor."""
    out = tmp_path / "out"
    options: dict[str, Any] = {"input_name": "image", "size": SIZE, "batch": 1}
    kind = {"swin": "instances", "resnet": "semantic"}[backbone]
    lines = export_onnx(folders[backbone], out, outputs=kind, **options)
    assert len(lines) == 1 and "1x3x72x100: largest error" in lines[0]
    graph = onnx.load(out / "model.onnx").graph
    types = {node.op_type for node in graph.node}
    assert "GridSample" in types and not types & NEVER
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
    if backbone == "swin":
        # The mask of the 5 x 7 windows of stage 1 is not stored per head, merged with the biases.
        assert 2 * 5 * 7 * 16 * 16 not in [int(np.prod(tensor.dims)) for tensor in graph.initializer]
    model = FaiM2FForUniversalSegmentation.from_pretrained(folders[backbone]).eval()
    expected = FaiM2FGraph(model, FaiM2FImageProcessor.from_pretrained(out), kind, **options)
    image = expected.sample(seed=5)["image"]
    with torch.no_grad():
        theirs = expected(image=image)
    for name, ours in run(out, image).items():
        if theirs[name].is_floating_point():
            assert relative_error(torch.from_numpy(ours), theirs[name]) < 1e-3
        else:
            assert (ours == theirs[name].numpy()).mean() > 0.999


@pytest.mark.slow
@pytest.mark.large
@pytest.mark.parametrize("backbone", BACKBONES)
def test_any_size(backbone: str, tmp_path: Path) -> None:
    """Slow, because exporters reason about symbolic sizes. Outputs are checked at sizes that neither export nor
    verification used. The model has each part once, and Swin blocks with and without shifted windows."""
    config = SwinConfig(**{**SWIN.to_dict(), "depths": [2, 1, 1, 1]}) if backbone == "swin" else RESNET
    model = model_of(config, decoder_layers=1)
    model.save_pretrained(tmp_path / "model")
    FaiM2FImageProcessor.from_model_config(model.config, size={"shortest_edge": 72}).save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    assert main(["onnx", str(tmp_path / "model"), str(out), "--no-check"]) == 0
    for batch, size in OTHERS:
        pixels = torch.randn(batch, 3, *size)
        with torch.no_grad():
            theirs = model(pixels)
        ours = run(out, pixels)
        assert all(relative_error(torch.from_numpy(ours[key]), theirs[key]) < 1e-4 for key in KEYS), size


def test_any_size_is_refused_where_it_was_never_seen_to_be_right(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbones = {
        "'convnext'": ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], out_features=STAGES),
        "use_absolute_embeddings": SwinConfig(**{**SWIN.to_dict(), "use_absolute_embeddings": True}),
    }
    for number, (named, backbone) in enumerate(backbones.items()):
        small_model(backbone_config=backbone.to_dict(), decoder_layers=1).save_pretrained(tmp_path / str(number))
        FaiM2FImageProcessor().save_pretrained(tmp_path / str(number))
        capsys.readouterr()  # discards the output of saving
        assert main(["onnx", str(tmp_path / str(number)), str(tmp_path / "out")]) == 2
        told = [line for line in capsys.readouterr().err.splitlines() if line and "Loading weights" not in line]
        assert len(told) == 1 and named in told[0] and "--size 640x640" in told[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not HAS_OPTIMUM, reason="needs Optimum, which needs transformers 4.57")
def test_optimums_own_command_refuses_swin(folders: dict[str, Path]) -> None:
    """Optimum traces transformers' own forward pass, in which branches of Swin become constant for one size."""
    from hf_faim2f.errors import ExportError
    from hf_faim2f.export.optimum import FaiM2FOnnxConfig

    for name, path in folders.items():
        config = FaiM2FForUniversalSegmentation.from_pretrained(path).config
        if name == "swin":
            with pytest.raises(ExportError, match="'swin' branches on the size"):
                FaiM2FOnnxConfig(config, task="image-segmentation")
        else:
            FaiM2FOnnxConfig(config, task="image-segmentation")


@pytest.mark.large
@pytest.mark.newest_only
@pytest.mark.slow  # exports, calibrates and builds engines
@pytest.mark.parametrize("backbone", BACKBONES)
def test_logits_engines_and_int8(backbone: str, tmp_path: Path) -> None:
    """One graph with logits: it equals transformers' model and uses only standard operations; TensorRT builds it; in
    both kinds of int8, layers of windows and of deformable attention are quantized, and the graphs run."""
    theirs = tiny(BACKBONES[backbone], encoder_layers=1, decoder_layers=3)
    model = ours_of(theirs)
    model.save_pretrained(tmp_path / "model")
    FaiM2FImageProcessor.from_model_config(model.config, size={"shortest_edge": 72}).save_pretrained(tmp_path / "model")
    export_onnx(tmp_path / "model", tmp_path / "float", size=SIZE, batch=1)
    graph = onnx.load(tmp_path / "float" / "model.onnx").graph
    types = {node.op_type for node in graph.node}
    assert "GridSample" in types and not types & {"If", "Loop", "Scan", "Einsum", "NonZero"}
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
    (tmp_path / "images").mkdir()
    for i, image in enumerate(photographs()[:4]):
        Image.fromarray(np.asarray(image)).save(tmp_path / "images" / f"{i}.png")
    pixels = torch.randn(1, 3, *SIZE)
    exact = run(tmp_path / "float", pixels)
    with torch.no_grad():
        expected = theirs(pixels)
    assert all(relative_error(torch.from_numpy(exact[key]), expected[key]) <= 1e-3 for key in KEYS)
    for runtime in RUNTIMES:
        out = tmp_path / runtime
        lines = quantize(tmp_path / "float", out, tmp_path / "images", runtime, max_error=1.0)
        assert any("layers with weights are in int8" in line for line in lines)
        nodes = onnx.load(out / "model.onnx").graph.node
        counted = [node.op_type for node in nodes]
        assert counted.count("DequantizeLinear") > 40 and counted.count("GridSample") == 3
        ours = run(out, pixels)
        errors = [relative_error(torch.from_numpy(ours[key]), torch.from_numpy(exact[key])) for key in KEYS]
        assert max(errors) > 1e-4 and all(np.isfinite(ours[key]).all() for key in KEYS)
    if HAS_LIBRARY:
        export_tensorrt(tmp_path / "tensorrt", tmp_path / "engine", gpu="sm86", precision="int8")
        assert (tmp_path / "engine" / "model.engine").stat().st_size > 10_000
        for gpu in ("sm75", "sm120"):
            export_tensorrt(tmp_path / "float", tmp_path / gpu, gpu=gpu)
            assert (tmp_path / gpu / "model.engine").stat().st_size > 10_000

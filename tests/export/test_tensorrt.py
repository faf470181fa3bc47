"""TensorRT engines, built ahead of time by tensorrt-rtx for GPUs that are not present: all nodes are supported.

Engines cannot be opened or run without their GPU. The tests check that they are built, and their description; changes
to a graph before it is built are tested in onnxruntime.
"""

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from hf_faim2f import FaiM2FForUniversalSegmentation, FaiM2FImageProcessor, load_config
from hf_faim2f.cli.export import main
from hf_faim2f.errors import ExportError
from hf_faim2f.export import engine as engine_module
from hf_faim2f.export import tensorrt
from hf_faim2f.export.onnx import export_onnx
from hf_faim2f.export.precision import halves_to_bfloat16, precision_of, products_in_half
from hf_faim2f.export.tensorrt import export_tensorrt
from hf_faim2f.model.image_processing_faim2f import resized_size
from tests.support.reference_models import reference_model, small_model

HAS_LIBRARY = importlib.util.find_spec("tensorrt_rtx") is not None
needs_library = pytest.mark.skipif(not HAS_LIBRARY, reason="needs tensorrt-rtx (pip install 'hf-faim2f[tensorrt-rtx]')")
SIZE = (96, 128)
GPUS = ("sm75", "sm86", "sm89", "sm120")
# Small, medium and large, and a BiSeNetFormer, at a small size: engines have the same nodes at any size, and build
# faster. The other two BiSeNetFormers differ only in the number of nodes.
MEMBERS = ("fai-m2f-s-ade", "fai-mf-m-ade", "fai-mf-l-ade", "bisenetformer-m-ade")
MEMBER_SIZE = (320, 320)


def quantize(source: Path, target: Path) -> None:
    """Quantizes an ONNX folder to int8 (QDQ), calibrated on noise: the nodes are right, the weights useless."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    taken = onnx.load(source / "model.onnx").graph.input[0]
    shape = [side.dim_value for side in taken.type.tensor_type.shape.dim]

    class Noise(CalibrationDataReader):
        def __init__(self) -> None:
            noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
            self.batches: Iterator[Any] = iter([{taken.name: noise}])

        def get_next(self) -> Any:
            return next(self.batches, None)

    target.mkdir()
    for path in source.iterdir():
        if path.name != "model.onnx":
            (target / path.name).write_bytes(path.read_bytes())
    quantize_static(
        source / "model.onnx",
        target / "model.onnx",
        Noise(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv", "MatMul"],
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    model = small_model(decoder_layers=1, top_k=10, use_mask_score=True)
    model.save_pretrained(path)
    FaiM2FImageProcessor.from_model_config(model.config, size={"shortest_edge": 64}).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def graphs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """ONNX folders of the tiny model by precision."""
    root = tmp_path_factory.mktemp("graphs")
    for precision in ("fp32", "fp16"):
        settings: dict[str, Any] = {"outputs": "semantic", "input_name": "image", "size": SIZE, "batch": 1}
        export_onnx(folder, root / precision, precision=precision, verify=False, **settings)
    quantize(root / "fp32", root / "int8")
    return {precision: root / precision for precision in ("fp32", "fp16", "int8")}


def described(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "engine.json").read_text())


def check_engine(out: Path, source: Path, gpu: str, precision: str) -> dict[str, Any]:
    """Checks what can be checked of an engine without opening it; returns its description."""
    import tensorrt_rtx as trt

    engine, found = (out / "model.engine").read_bytes(), described(out)
    assert found["engine"] == {"sha256": hashlib.sha256(engine).hexdigest(), "bytes": len(engine)}
    assert found["onnx"]["sha256"] == hashlib.sha256((source / "model.onnx").read_bytes()).hexdigest()
    assert (found["gpu"], found["precision"]) == (gpu, precision)
    assert found["library"] == {"name": "tensorrt-rtx", "version": trt.__version__}
    runtime = trt.Runtime(engine_module.logger_of(trt))
    assert not runtime.get_engine_validity(engine)[1] & int(trt.EngineInvalidityDiagnostics.MALFORMED_ENGINE)
    assert len(engine) > 1e6
    return found


def export(source: Path, out: Path, *arguments: object) -> None:
    assert main(["tensorrt", str(source), str(out), *map(str, arguments)]) == 0


@needs_library
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_engines(
    precision: str, gpu: str, graphs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    export(graphs[precision], out, "--precision", precision, "--gpu", gpu)
    printed = capsys.readouterr().out
    assert f"built for {gpu} and not opened or run" in printed and printed.endswith(f"{out}: written\n")
    found = check_engine(out, graphs[precision], gpu, precision)
    assert ("matrix products that are float32" in printed) == (gpu == "sm75")
    assert (found["float32_products_in"] == "float16") == (gpu == "sm75")
    assert found["outputs_kind"] == "semantic"
    assert found["inputs"] == [{"name": "image", "shape": [1, 3, *SIZE], "type": "uint8"}]
    assert found["outputs"] == [
        {"name": "segmentation", "shape": [1, *SIZE], "type": "uint8"},
        {"name": "segmentation_scores", "shape": [1, *SIZE], "type": "float32"},
    ]
    assert found["labels"] == [f"LABEL_{i}" for i in range(5)]
    # The folder equals the ONNX folder, with the engine in place of the graph.
    names = {path.name for path in graphs[precision].iterdir()} - {"model.onnx"}
    assert {path.name for path in out.iterdir()} == names | {"model.engine", "engine.json"}
    assert FaiM2FImageProcessor.from_pretrained(out).size == {"height": SIZE[0], "width": SIZE[1]}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.large
@pytest.mark.slow  # exports and builds an engine for each
@needs_library
@pytest.mark.parametrize("kind", ["logits", "instances", "queries"])
def test_any_number_and_size(kind: str, folder: Path, tmp_path: Path) -> None:
    """From the model's folder: the parser accepts every operation of every kind of outputs."""
    out = tmp_path / "out"
    ranges = ["--batches", "1:2:4", "--sizes", "32x64:96x96:512x640"] if kind == "logits" else []
    export(folder, out, "--gpu", "sm86", "--outputs", kind, "--no-check", *ranges)
    found = described(out)
    smallest, usual, largest = ([1, 3, 64, 64], [1, 3, 64, 64], [8, 3, 128, 128])  # for the processor's images
    if ranges:
        smallest, usual, largest = ([1, 3, 32, 64], [2, 3, 96, 96], [4, 3, 512, 640])
    assert found["inputs"] == [
        {
            "name": "pixel_values",
            "shape": [-1, 3, -1, -1],
            "type": "float32",
            "profile": {"smallest": smallest, "usual": usual, "largest": largest},
        }
    ]
    shapes = {
        "logits": [[-1, 10, 6], [-1, 10, -1, -1]],
        "instances": [[-1, 10], [-1, 10], [-1, 10, 4], [-1, 10, -1, -1]],
        "queries": [[-1, 10], [-1, 10], [-1, 10, -1, -1]],
    }
    assert [output["shape"] for output in found["outputs"]] == shapes[kind]
    types = [output["type"] for output in found["outputs"]]
    assert types[-1] == ("float32" if kind == "logits" else "uint8")
    assert FaiM2FImageProcessor.from_pretrained(out).size == {"shortest_edge": 64}


@pytest.mark.large
@needs_library
def test_any_number_of_one_size_for_turing(folder: Path, tmp_path: Path) -> None:
    """Products with dynamic shapes are also converted to float16; a model is exported in float32."""
    out = tmp_path / "out"
    options = {"outputs": "semantic", "size": SIZE}
    lines = export_tensorrt(folder, out, gpu="sm75", batches=(1, 1, 4), verify=False, **options)
    assert "matrix products that are float32" in lines[0]
    assert described(out)["precision"] == "fp32"
    assert described(out)["inputs"][0]["profile"]["largest"] == [4, 3, *SIZE]


@pytest.mark.large
@needs_library
def test_bfloat16(folder: Path, graphs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--outputs", "semantic", "--input", "image", "--size", "96x128", "--batch", 1]
    export(folder, tmp_path / "model", "--gpu", "sm89", "--precision", "bf16", *options)
    printed = capsys.readouterr().out
    assert "fp16 in onnxruntime against float64 in torch" in printed and "bf16 was made of a graph in fp16" in printed
    assert described(tmp_path / "model")["precision"] == "bf16"
    export(graphs["fp16"] / "model.onnx", tmp_path / "graph", "--gpu", "sm120", "--precision", "bf16")
    check_engine(tmp_path / "graph", graphs["fp16"], "sm120", "bf16")
    assert "sm75 (Turing) has no bfloat16" in mistake(
        capsys, graphs["fp16"], tmp_path / "out", "--gpu", "sm75", "--precision", "bf16"
    )


@needs_library
@pytest.mark.slow
@pytest.mark.large  # `test_engines` with full models
@pytest.mark.parametrize("name", MEMBERS)
def test_the_family(name: str, tmp_path: Path) -> None:
    """Small, medium and large members, for every GPU in every precision."""
    model = FaiM2FForUniversalSegmentation(load_config(name)).eval()
    model.save_pretrained(tmp_path / "model")
    FaiM2FImageProcessor.from_model_config(model.config).save_pretrained(tmp_path / "model")
    settings: dict[str, Any] = {"outputs": "semantic", "input_name": "image", "size": MEMBER_SIZE, "batch": 1}
    for precision in ("fp32", "fp16", "int8"):
        source, out = tmp_path / precision, tmp_path / "out"
        if precision == "int8":
            quantize(tmp_path / "fp32", source)
        else:
            export_onnx(tmp_path / "model", source, precision=precision, verify=False, **settings)
        for gpu in GPUS:
            export_tensorrt(source, out, precision=precision, gpu=gpu)
            found = check_engine(out, source, gpu, precision)
            assert len(found["labels"]) == model.config.num_labels
            for path in out.iterdir():
                path.unlink()
            out.rmdir()


def run(model: onnx.ModelProto, image: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: image})


def with_real_halves(model: onnx.ModelProto) -> onnx.ModelProto:
    """Makes onnxruntime round to float16. On a CPU it multiplies in float32, and removes adjacent casts to and from
    float16; it does not remove the Identity nodes that are inserted here between them."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    nodes = list(copy.graph.node)
    del copy.graph.node[:]
    for node in nodes:
        copy.graph.node.append(node)
        if node.op_type in ("MatMul", "Gemm") or (node.op_type == "Cast" and node.output[0].endswith("_as_half")):
            last = copy.graph.node[-1]
            name, last.output[0] = last.output[0], f"{last.output[0]}_rounded"
            copy.graph.node.append(helper.make_node("Identity", [last.output[0]], [name]))
    return copy


@pytest.mark.parametrize("name", ["tiny", pytest.param("fai-mf-m-ade", marks=[pytest.mark.slow, pytest.mark.large])])
def test_products_in_half_say_the_same(name: str, graphs: dict[str, Path], tmp_path: Path) -> None:
    """The graph of Turing's engines gives the label maps of float32."""
    path = graphs["fp32"]
    if name != "tiny":
        model = reference_model(name)
        model.save_pretrained(tmp_path / "model")
        FaiM2FImageProcessor.from_model_config(model.config).save_pretrained(tmp_path / "model")
        path = tmp_path / "graph"
        settings: dict[str, Any] = {"outputs": "semantic", "input_name": "image", "size": SIZE, "batch": 1}
        export_onnx(tmp_path / "model", path, verify=False, **settings)
    model = onnx.load(path / "model.onnx")
    products = sum(node.op_type in ("MatMul", "Gemm") for node in model.graph.node)
    noise = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 8) * 255, size=SIZE, mode="bilinear")
    image = noise.to(torch.uint8).numpy()
    labels, scores = run(model, image)
    assert products_in_half(model) == products > 20
    assert products_in_half(model) == 0
    onnx.checker.check_model(model, full_check=True)
    halved_labels, halved_scores = run(with_real_halves(model), image)
    assert (labels == halved_labels).mean() > 0.99
    assert 1e-6 < np.abs(scores - halved_scores).max() / scores.max() < 0.02


def test_halves_to_bfloat16(graphs: dict[str, Path]) -> None:
    model = onnx.load(graphs["fp16"] / "model.onnx")
    halves = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    halves_to_bfloat16(model)
    assert precision_of(model) == "bf16"
    changed = [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.BFLOAT16]
    assert len(changed) > 50
    for tensor in changed:
        bits = np.frombuffer(tensor.raw_data, np.uint16).astype(np.uint32) << 16
        ours, theirs = bits.view(np.float32).reshape(tuple(tensor.dims)), halves[tensor.name].astype(np.float32)
        assert (np.abs(ours - theirs) <= 2.0**-8 * np.abs(theirs)).all()
    assert b"FLOAT16" not in {a.name for n in model.graph.node for a in n.attribute}
    casts = {a.i for n in model.graph.node if n.op_type == "Cast" for a in n.attribute}
    assert TensorProto.BFLOAT16 in casts and TensorProto.FLOAT16 not in casts


def test_precision_is_told_by_the_graph(graphs: dict[str, Path]) -> None:
    assert {name: precision_of(onnx.load(path / "model.onnx")) for name, path in graphs.items()} == {
        name: name for name in graphs
    }


def mistake(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The command's error message; asserts that it is one sentence and the only output."""
    capsys.readouterr()
    assert main(["tensorrt", *map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("faim2f export: ") and printed.err.count("\n") == 1
    assert "Traceback" not in printed.err
    return printed.err


@needs_library
def test_mistakes(folder: Path, graphs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, fp32, sm86 = tmp_path / "out", graphs["fp32"], ("--gpu", "sm86")
    assert "exists already" in mistake(capsys, fp32, folder, *sm86)
    assert "is not a folder" in mistake(capsys, fp32, tmp_path / "not" / "there", *sm86)
    assert "is not a folder here" in mistake(capsys, tmp_path / "nothing", out, *sm86)
    text = tmp_path / "model.onnx"
    text.write_text("no graph")
    assert "is not a readable ONNX file" in mistake(capsys, text, out, *sm86)
    text.write_bytes(b"")
    assert "is not a graph that `faim2f export onnx` wrote (it is empty)" in mistake(capsys, text, out, *sm86)
    text.write_bytes((fp32 / "model.onnx").read_bytes())
    assert "must hold the config.json" in mistake(capsys, text, out, *sm86)
    text.unlink()
    assert "whose outputs and size cannot be chosen" in mistake(
        capsys, fp32, out, *sm86, "--outputs", "logits", "--size", "64x64"
    )
    assert "is in fp32, and an engine takes its types" in mistake(capsys, fp32, out, *sm86, "--precision", "fp16")
    assert "has no QuantizeLinear" in mistake(capsys, fp32, out, *sm86, "--precision", "int8")
    assert "int8 is built from an ONNX graph" in mistake(capsys, folder, out, *sm86, "--precision", "int8")
    shutil.copytree(folder, tmp_path / "both")
    shutil.copyfile(graphs["int8"] / "model.onnx", tmp_path / "both" / "model.onnx")
    # Not the graph, which may be of other weights.
    assert "int8 is built from an ONNX graph" in mistake(capsys, tmp_path / "both", out, *sm86, "--precision", "int8")
    shutil.rmtree(tmp_path / "both")
    assert "no range of batches" in mistake(capsys, fp32, out, *sm86, "--batches", "1:2:3")
    assert "no range of sizes" in mistake(capsys, fp32, out, *sm86, "--sizes", "64x64:96x96:128x128")
    assert "batches 4:2:8 must be smallest:usual:largest" in mistake(capsys, folder, out, *sm86, "--batches", "4:2:8")
    assert "sizes 16x16:" in mistake(capsys, folder, out, *sm86, "--sizes", "16x16:64x64:64x64")
    assert "keeps no timing cache" in mistake(capsys, fp32, out, *sm86, "--timing-cache", tmp_path / "cache")
    for wrong in (["--gpu", "sm70"], ["--precision", "fp8"], ["--batches", "1:2"], ["--sizes", "64x64"]):
        with pytest.raises(SystemExit, match="2"):
            main(["tensorrt", str(fp32), str(out), *wrong])
    with pytest.raises(ExportError, match="gpu must be one of current, sm75"):
        export_tensorrt(fp32, out, gpu="sm70")
    assert list(tmp_path.iterdir()) == []


def test_sizes_of_the_processor_and_of_the_engine() -> None:
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 3, "height", "width"])
    graph = onnx.ModelProto(graph=onnx.GraphProto(input=[image]))
    request = tensorrt.Request("tensorrt-rtx", None, "sm86", None, (1, 1, 2), ((96, 96), (96, 128), (128, 160)), None)
    for size, fits in (
        ({"shortest_edge": 96, "longest_edge": 200}, True),
        ({"shortest_edge": 64}, False),
        ({"height": 128, "width": 160}, True),
        ({"height": 160, "width": 128}, False),
    ):
        processor = FaiM2FImageProcessor(size=size)
        if fits:
            shapes = [(1, 3, 96, 96), (1, 3, 96, 128), (2, 3, 128, 160)]
            assert tensorrt._profile(graph, processor, request) == shapes
        else:
            with pytest.raises(ExportError, match="which is beyond the engine's sizes, 96x96 to 128x160: name"):
                tensorrt._profile(graph, processor, request)


@pytest.mark.parametrize(
    ("settings", "smallest", "usual", "largest", "end"),
    [
        ({}, (64, 64), (640, 640), (1280, 1280), "up to the aspect ratio 2:1 fit"),
        ({"size": {"shortest_edge": 48}, "size_divisor": 32}, (48, 48), (64, 64), (96, 96), "ratio 2:1 fit"),
        ({"size": {"shortest_edge": 800, "longest_edge": 1333}}, (64, 64), (800, 800), (1333, 1333), None),
        ({"size": {"shortest_edge": 64, "longest_edge": 80}}, (40, 40), (64, 64), (80, 80), None),
        ({"size": {"shortest_edge": 800, "longest_edge": 640}}, (64, 64), (640, 640), (640, 640), None),
        ({"size": {"height": 512, "width": 1024}}, (64, 64), (512, 1024), (512, 1024), None),
        ({"do_resize": False}, *tensorrt.SIZES, None),
    ],
)
def test_default_sizes_hold_photographs(
    settings: dict[str, Any], smallest: Any, usual: Any, largest: Any, end: str | None
) -> None:
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 3, "height", "width"])
    graph = onnx.ModelProto(graph=onnx.GraphProto(input=[image]))
    request = tensorrt.Request("tensorrt-rtx", None, "sm86", None, None, None, None)
    processor = FaiM2FImageProcessor(**settings)
    profile = tensorrt._profile(graph, processor, request)
    assert profile is not None and [shape[2:] for shape in profile] == [smallest, usual, largest]
    told = tensorrt._end_of_sizes(profile, processor)
    assert len(told) == (end is not None) and all(end is not None and end in line for line in told)
    if processor.do_resize:
        for shape in ((1920, 1080), (1080, 1920), (2000, 1000), (3000, 3001)):
            made = resized_size(*shape, processor.size, processor.size_divisor or 0)
            assert all(low <= side <= high for low, side, high in zip(smallest, made, largest, strict=True))


@pytest.mark.parametrize(
    ("longest", "largest", "limits"),
    [
        (2560, (640, 2048), "portrait images of up to the aspect ratio 1:1 and landscape images of up to the aspect "
         "ratio 3.2:1"),
        (2048, (640, 2048), "portrait images of up to the aspect ratio 1:1"),
        (2560, (1280, 1280), "images of up to the aspect ratio 2:1"),
        (1280, (1280, 1280), None),
    ],
)  # fmt: skip
def test_limits_on_portrait_and_landscape_images(longest: int, largest: tuple[int, int], limits: str | None) -> None:
    processor = FaiM2FImageProcessor(size={"shortest_edge": 640, "longest_edge": longest})
    profile = [(1, 3, *size) for size in ((64, 64), (640, 640), largest)]
    told = tensorrt._end_of_sizes(profile, processor)
    assert [line.split(" fit into")[0] for line in told] == ([] if limits is None else [limits])


@needs_library
def test_nodes_that_the_parser_refuses(
    graphs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in graphs["fp32"].glob("*.json"):
        (source / path.name).write_bytes(path.read_bytes())
    model = onnx.load(graphs["fp32"] / "model.onnx")
    first, second = [node for node in model.graph.node if node.op_type == "Relu"][:2]
    first.name, first.op_type, second.name, second.op_type = "one", "Bogus", "two", "Det"
    onnx.save(model, source / "model.onnx")
    told = mistake(capsys, source, tmp_path / "out", "--gpu", "sm86")
    assert "refuses 2 nodes of the graph: one (Bogus): " in told and "; two (Det): " in told
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@needs_library
def test_what_the_builder_refuses(graphs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A float32 matrix product for Turing, left unconverted: the reason for `products_in_half`."""
    monkeypatch.setattr(tensorrt, "WITHOUT_FLOAT32_PRODUCTS", ())
    with pytest.raises(ExportError, match="cannot build for sm75: .*FP32 GEMM is not supported"):
        export_tensorrt(graphs["fp32"], tmp_path / "out", gpu="sm75")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [pytest.param(False, marks=pytest.mark.large), True])
def test_an_engine_that_disagrees_with_its_graph(
    wrong: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is simulated, by the graph: one query, or all of them, give other logits."""
    export_onnx(folder, tmp_path / "onnx", size=SIZE, batch=1, verify=False)
    content = (tmp_path / "onnx" / "model.onnx").read_bytes()
    model = onnx.load_from_string(content)
    names = [output.name for output in model.graph.output]

    class Runner:
        def __init__(self, *opened: Any) -> None: ...

        def __call__(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
            found = dict(zip(names, map(torch.from_numpy, run(model, batch.numpy())), strict=True))
            for values in found.values():
                values[:, : None if wrong else 1] *= -1
            return found

    for name, value in {"gpu_here": "sm86", "open_engine": (None, None)}.items():
        monkeypatch.setattr(tensorrt, name, lambda *arguments, value=value: value)
    monkeypatch.setattr(tensorrt, "read_description", lambda folder: SimpleNamespace(input_name="pixel_values"))
    monkeypatch.setattr(tensorrt, "EngineRunner", Runner)
    request = tensorrt.Request("tensorrt-rtx", None, "sm86", "fp16", None, None, None)
    arguments = (tmp_path, content, (1, 3, *SIZE), FaiM2FImageProcessor(), request)
    if not wrong:
        assert "class_queries_logits by at most" in tensorrt._try_engine(*arguments)
        return
    with pytest.raises(ExportError, match=r"disagrees with its graph: a tenth of its \w+_logits differ by"):
        tensorrt._try_engine(*arguments)


class TestWhatIsThere:
    """Combinations of installed libraries and present GPUs, simulated; nothing is built."""

    @pytest.fixture(autouse=True)
    def _machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def choose(self, installed: set[str], here: str | None, gpu: str, library: str | None = None) -> tuple[str, str]:
        def found(name: str) -> Any:
            return name if name in installed else None

        with self.monkeypatch.context() as patch:
            patch.setattr(engine_module.importlib.util, "find_spec", found)
            patch.setattr(tensorrt, "gpu_here", lambda: here)
            chosen = tensorrt._choose_library(library, gpu)
            return chosen, tensorrt._target(chosen, gpu)

    def test_choices(self) -> None:
        both = {"tensorrt", "tensorrt_rtx"}
        assert self.choose(both, "sm75", "current") == ("tensorrt", "sm75")
        assert self.choose(both, "sm75", "sm75") == ("tensorrt", "sm75")
        assert self.choose(both, "sm75", "sm86") == ("tensorrt-rtx", "sm86")
        assert self.choose(both, None, "sm86") == ("tensorrt-rtx", "sm86")
        assert self.choose(both, "sm86", "current", "tensorrt-rtx") == ("tensorrt-rtx", "sm86")
        assert self.choose({"tensorrt"}, "sm90", "current") == ("tensorrt", "sm90")

    def test_refusals(self) -> None:
        def refused(*arguments: Any) -> str:
            with pytest.raises(ExportError) as told:
                self.choose(*arguments)
            return str(told.value)

        assert "neither is installed: pip install 'hf-faim2f[tensorrt-rtx]'" in refused(set(), "sm86", "current")
        assert "tensorrt is not installed" in refused({"tensorrt_rtx"}, "sm86", "current", "tensorrt")
        assert "for the GPU of its machine only, and there is none here" in refused({"tensorrt"}, None, "sm86")
        assert "for the GPU of its machine only, and that is sm75 here" in refused({"tensorrt"}, "sm75", "sm86")
        assert "only, of which there is none here: to build for sm86" in refused({"tensorrt"}, None, "sm86", "tensorrt")
        assert "for the GPU of this machine, but " in refused({"tensorrt_rtx"}, None, "current")

    def test_a_library_that_does_not_load(self) -> None:
        def broken(name: str) -> Any:
            raise ImportError("libnvinfer.so: cannot open shared object file")

        self.monkeypatch.setattr(engine_module.importlib.util, "find_spec", lambda name: name)
        self.monkeypatch.setattr(engine_module.importlib, "import_module", broken)
        with pytest.raises(ExportError, match="tensorrt is installed but cannot be loaded \\(libnvinfer"):
            engine_module.import_library("tensorrt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@needs_library
def test_the_gpu_of_a_machine_without_one(
    graphs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = mistake(capsys, graphs["fp32"], tmp_path / "out")
    assert "name the GPU that it is for, one of sm75, sm80" in told


@pytest.mark.skipif(not torch.cuda.is_available(), reason="engines are opened on their GPU, and there is none here")
def test_the_gpu_of_a_machine_with_one(graphs: dict[str, Path], tmp_path: Path) -> None:
    lines = export_tensorrt(graphs["fp16"], tmp_path / "out")
    assert "was run on the" in lines[-1]

"""Graphs in int8: which layers are quantized, the calibration images, the error, and the runtimes that accept them."""

import functools
import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from PIL import Image, ImageOps
from torch import nn

from hf_faim2f import FaiM2FImageProcessor
from hf_faim2f import cli as command_line
from hf_faim2f.cli.quantize import main
from hf_faim2f.data.digits import DigitScenes
from hf_faim2f.errors import ExportError, PredictorError
from hf_faim2f.evaluation.evaluator import Evaluator
from hf_faim2f.export import quantize as quantize_module
from hf_faim2f.export.calibration import choose_images
from hf_faim2f.export.graph_file import name_nodes
from hf_faim2f.export.onnx import export_onnx
from hf_faim2f.export.quantize import Change, error_of, quantize
from hf_faim2f.export.tensorrt import export_tensorrt
from hf_faim2f.family.digits import LABELS, THING_IDS
from hf_faim2f.runtime import Predictor
from tests.support.lively_model import lively_model, photographs, save_model
from tests.support.reference_models import BISENET, small_model
from tests.support.shared import exported

HAS_LIBRARY = importlib.util.find_spec("tensorrt_rtx") is not None
needs_library = pytest.mark.skipif(not HAS_LIBRARY, reason="needs tensorrt-rtx (pip install 'hf-faim2f[tensorrt-rtx]')")
DIGITS = Path(__file__).parents[2] / "examples" / "digits"
SIZE = (64, 96)
# All kinds of outputs and both inputs; fixed and dynamic shapes, and a batch that the images do not fill.
GRAPHS: dict[str, dict[str, Any]] = {
    "logits": {},
    "semantic": {"input_name": "image", "size": SIZE, "batch": 2},
    "instances": {"input_name": "image"},
    "queries": {"size": SIZE, "batch": 1},
}
KINDS = [kind for kind in GRAPHS if kind != "instances"]  # exporting instances takes longest
ANY_ERROR = 1.0
Quantized = Callable[[str, str], tuple[Path, list[str]]]


def save_images(folder: Path, images: list[Image.Image]) -> Path:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        image.save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_images(tmp_path_factory.mktemp("images") / "photographs", photographs())


class Graphs(dict[str, Path]):
    """ONNX folders of a tiny model by kind of outputs, each exported on first use."""

    def __init__(self, root: Path) -> None:
        self.model = save_model(root / "tiny")

    def __missing__(self, kind: str) -> Path:
        self[kind] = exported(self.model, outputs=kind, **GRAPHS[kind])
        return self[kind]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    return Graphs(tmp_path_factory.mktemp("graphs"))


@pytest.fixture(scope="module")
def quantized(graphs: Graphs, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """A graph in int8 for a runtime, with any error allowed, and the lines of its report. The folder is read-only."""

    @functools.cache
    def made(kind: str, runtime: str) -> tuple[Path, list[str]]:
        out = tmp_path_factory.mktemp("int8") / "out"
        return out, quantize(graphs[kind], out, images, runtime, max_error=ANY_ERROR)

    return made


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of digits from the split that the shipped model was trained on."""
    made = DigitScenes("train", 24, seed=9)
    pictures = [Image.fromarray(made[i]["image"].permute(1, 2, 0).numpy()) for i in range(len(made))]
    return save_images(tmp_path_factory.mktemp("images") / "scenes", pictures)


@pytest.fixture(scope="module")
def digits() -> Path:
    return exported(DIGITS, size=(256, 256), batch=1)


@pytest.fixture(scope="module")
def digits_for_tensorrt(digits: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("int8") / "digits"
    quantize(digits, out, scenes, "tensorrt")
    return out


def session(folder: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "quantization.json").read_text())


def with_weights(model: onnx.ModelProto) -> set[str]:
    weights = {tensor.name for tensor in model.graph.initializer}
    return {n.name for n in model.graph.node if n.op_type in ("Conv", "MatMul", "Gemm") and n.input[1] in weights}


def reads_int8(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Nodes with two dequantized inputs, by name."""
    made = {output for node in model.graph.node if node.op_type == "DequantizeLinear" for output in node.output}
    return {
        node.name: node
        for node in model.graph.node
        if node.op_type in ("Conv", "MatMul", "Gemm") and made.issuperset(node.input[:2])
    }


@pytest.mark.slow  # exports every kind of graph
@pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize(
    "kind", ["logits", *(pytest.param(kind, marks=pytest.mark.large) for kind in GRAPHS if kind != "logits")]
)
def test_every_layer_with_weights_and_nothing_else(
    kind: str, runtime: str, graphs: Graphs, quantized: Quantized
) -> None:
    out, lines = quantized(kind, runtime)
    before, after = onnx.load(graphs[kind] / "model.onnx"), onnx.load(out / "model.onnx")
    onnx.checker.check_model(after, full_check=True)
    layers = with_weights(before)
    assert len(layers) > 40 and set(reads_int8(after)) == layers == set(report(out)["quantized"])
    # All other nodes are still in the graph, including products without weights.
    assert [n.name for n in before.graph.node if n.op_type == "MatMul" and n.name not in layers]
    assert {n.name for n in after.graph.node} >= {n.name for n in before.graph.node if n.op_type != "Relu"}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in after.graph.initializer}
    producers = {output: node for node in after.graph.node for output in node.output}
    signed = runtime == "tensorrt"
    for node in reads_int8(after).values():
        weight, scale, zero = (constants[name] for name in producers[node.input[1]].input)
        channels = weight.shape[0 if node.op_type == "Conv" else 1]
        assert weight.dtype == np.int8 and scale.shape == (channels,) and not zero.any()
        largest = int(np.abs(weight.astype(np.int64)).max())
        # x86 CPUs without VNNI sum two products of uint8 and int8 in 16 bits.
        assert largest >= 127 if signed else 2 * 255 * largest < 2**15
        zero = constants[producers[node.input[0]].input[2]]
        assert zero.dtype == (np.int8 if signed else np.uint8) and zero.ndim == 0
        assert not (signed and zero)
    assert f"{len(layers)} of {len(layers)} layers with weights are in int8, for {runtime}" in lines
    # Names, types and shapes of inputs and outputs are unchanged.
    for mine, theirs in zip((session(out), session(graphs[kind])), (session(graphs[kind]), session(out)), strict=True):
        for value, other in zip(
            (*mine.get_inputs(), *mine.get_outputs()), (*theirs.get_inputs(), *theirs.get_outputs()), strict=True
        ):
            assert (value.name, value.shape, value.type) == (other.name, other.shape, other.type)
    assert {path.name for path in out.iterdir()} == {path.name for path in graphs[kind].iterdir()} | {
        "quantization.json"
    }
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_it_says_nearly_what_float_says(graphs: Graphs, quantized: Quantized) -> None:
    out, _ = quantized("logits", "onnxruntime")
    pixels = FaiM2FImageProcessor.from_pretrained(graphs["logits"])(photographs()[0], return_tensors="np").pixel_values
    ours, theirs = (session(folder).run(None, {"pixel_values": pixels}) for folder in (out, graphs["logits"]))
    for a, b in zip(ours, theirs, strict=True):
        assert 1e-4 < np.abs(a - b).mean() / np.abs(b).mean() < 0.25


@pytest.mark.large
def test_the_error_is_what_its_name_says(graphs: Graphs, images: Path, tmp_path: Path) -> None:
    """Recomputed from both files for the images that the report names. A graph with post-processing has the same error,
    although its logits are internal."""
    found = {}
    fixed = exported(graphs.model, size=SIZE, batch=1)  # at the size of the other graph
    for kind in ("queries", "logits"):
        out = tmp_path / kind
        source = graphs[kind] if kind == "queries" else fixed
        quantize(source, out, images, max_error=ANY_ERROR)
        found[kind] = report(out)
    assert found["queries"]["error"]["measured"] == pytest.approx(found["logits"]["error"]["measured"], rel=0.05)
    processor = FaiM2FImageProcessor.from_pretrained(fixed)
    held_out = found["logits"]["images"]["held_out"]
    smaller = larger = 0.0
    for name in held_out:
        pixels = processor(Image.open(images / name), return_tensors="np").pixel_values
        scored = []
        best = None
        for folder in (fixed, tmp_path / "logits"):
            classes, masks = (torch.from_numpy(v)[0] for v in session(folder).run(None, {"pixel_values": pixels}))
            probabilities = classes.softmax(-1)[:, :-1]
            best = probabilities.argmax(-1) if best is None else best
            scored.append(probabilities[torch.arange(len(best)), best][:, None, None] * masks.sigmoid())
        smaller += float(torch.minimum(*scored).sum())
        larger += float(torch.maximum(*scored).sum())
    error = found["logits"]["error"]
    assert error["measured"] == pytest.approx(1 - smaller / larger, rel=1e-2) and error["measured"] > 1e-3
    assert error["measured"] <= error["worst_image"] <= 1


@pytest.mark.large
def test_copies_that_fill_a_batch_do_not_count(graphs: Graphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_images(tmp_path / "images", [*photographs(), *map(ImageOps.mirror, photographs())])
    counts: list[int] = []

    def counted(changes: list[Change]) -> float:
        counts.append(len(changes))
        return error_of(changes)

    monkeypatch.setattr(quantize_module, "error_of", counted)
    quantize(graphs["semantic"], tmp_path / "out", folder, max_error=ANY_ERROR)  # in batches of 2
    assert len(report(tmp_path / "out")["images"]["held_out"]) == 3 and counts == [3, 3, 1, 1, 1]


@pytest.mark.large
def test_bisenetformer_is_quantized_whole(images: Path, tmp_path: Path) -> None:
    model = small_model(**BISENET, decoder_layers=2, threshold=0.1)
    FaiM2FImageProcessor.from_model_config(model.config, size={"shortest_edge": 64}).save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    export_onnx(tmp_path / "model", tmp_path / "graph", size=SIZE, batch=1, verify=False)
    quantize(tmp_path / "graph", tmp_path / "out", images, max_error=0.2)
    report = json.loads((tmp_path / "out" / "quantization.json").read_text())
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    assert sum(node.op_type == "Conv" for node in graph.node) == convolutions
    assert len(report["quantized"]) > convolutions and report["left_in_float"] == []
    assert FaiM2FImageProcessor.from_pretrained(tmp_path / "out").mask_stride == 8


def test_error_of_changes() -> None:
    assert error_of([Change(1.0, 1.0, 0.0)]) == 0 and error_of([Change(0.0, 2.0, 1.0)]) == 1
    assert error_of([Change(1.0, 2.0, 0.0), Change(2.0, 2.0, 0.0)]) == 0.25
    assert error_of([Change(0.0, 0.0, 0.0)]) == 0
    sure = torch.tensor([[0.5, 0.1]]), torch.tensor([[1.0, 0.0]])
    changed = quantize_module._change(sure, (torch.tensor([[0.25, 0.9]]), torch.tensor([[1.0, 0.5]])))
    # The best class in float counts, for which int8 gives 0.25 and 0.125, and float 0.5 and 0.
    assert (changed.intersection, changed.union) == (0.25, 0.625)
    assert error_of([quantize_module._change(sure, (torch.tensor([[np.nan, 0.0]]), sure[1]))]) == 1


@pytest.mark.parametrize("kind", ["semantic", "queries"])
def test_ranges_are_those_of_the_images(kind: str, images: Path, quantized: Quantized) -> None:
    """The first layer reads `pixel_values`: for both inputs, its range is that of the images named in the report."""
    out, _ = quantized(kind, "onnxruntime")
    model = onnx.load(out / "model.onnx")
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    producers = {output: node for node in model.graph.node for output in node.output}
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    scale = constants[producers[first.input[0]].input[1]]
    processor = FaiM2FImageProcessor.from_pretrained(out)
    names = report(out)["images"]["calibration"]
    values = [processor(Image.open(images / name), return_tensors="np").pixel_values for name in names]
    span = max(v.max() for v in values) - min(v.min() for v in values)
    assert scale == pytest.approx(span / 255, rel=0.02)


def test_a_graph_of_a_diverged_training_is_refused(graphs: Graphs, images: Path, tmp_path: Path) -> None:
    """One weight is NaN, which `faim2f export` would reject: the graph is neither quantized nor run."""
    folder = tmp_path / "nan"
    shutil.copytree(graphs["logits"], folder)
    model = onnx.load(folder / "model.onnx")
    weight = max(model.graph.initializer, key=lambda one: int(np.prod(one.dims)))
    values = numpy_helper.to_array(weight).copy()
    values.flat[0] = np.nan
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(ExportError, match="the graph answers these images with values that are not finite"):
        quantize(folder, tmp_path / "int8", images)
    assert not (tmp_path / "int8").exists()
    with pytest.raises(PredictorError, match="nan outputs .* that are NaN"):
        Predictor.from_pretrained(folder, "onnxruntime", "cpu")(str(next(images.iterdir())))


def test_images_of_different_sizes_are_no_batch(tmp_path: Path) -> None:
    """A graph with a fixed batch and any size; the image processor keeps the aspect ratio."""
    for number, width in enumerate((64, 96, 96)):
        Image.new("RGB", (width, 64)).save(tmp_path / f"{number}.png")
    processor = FaiM2FImageProcessor(size={"shortest_edge": 64})
    sides = [2, 3, None, None]
    with pytest.raises(ExportError, match="the graph takes 2 images at once, which must be of one size"):
        choose_images(
            tmp_path, processor, onnx.helper.make_tensor_value_info("pixel_values", onnx.TensorProto.FLOAT, sides), 9, 1
        )
    one = onnx.helper.make_tensor_value_info("pixel_values", onnx.TensorProto.FLOAT, [1, *sides[1:]])
    assert len(choose_images(tmp_path, processor, one, 9, 1).paths) == 2


def test_arrays_that_predictor_refuses_are_left_out(tmp_path: Path) -> None:
    pixels = np.array(photographs()[0])
    np.save(tmp_path / "good.npy", pixels)
    np.save(tmp_path / "scaled.npy", pixels / 255)
    np.save(tmp_path / "deep.npy", pixels.astype(np.float32) * 12)
    processor = FaiM2FImageProcessor(size={"height": 64, "width": 96})
    values = onnx.helper.make_tensor_value_info("pixel_values", onnx.TensorProto.FLOAT, [1, 3, 64, 96])
    chosen = choose_images(tmp_path, processor, values, 9, 1)
    assert [path.name for path in chosen.paths + chosen.held_out_paths] == ["deep.npy", "good.npy"]
    assert [problem.split(" is ")[0] for problem in chosen.skipped] == ["scaled.npy"]
    of_bytes = onnx.helper.make_tensor_value_info("image", onnx.TensorProto.UINT8, [1, 3, 64, 96])
    chosen = choose_images(tmp_path, processor, of_bytes, 9, 1)
    assert [path.name for path in chosen.paths] == ["good.npy"]
    problems = sorted(chosen.skipped)
    assert problems[0].startswith("deep.npy has values from") and problems[1].startswith("scaled.npy is an array")


def test_maps_of_labels_are_no_images(tmp_path: Path) -> None:
    given = onnx.helper.make_tensor_value_info("pixel_values", onnx.TensorProto.FLOAT, [1, 3, None, None])
    for number, (name, files) in enumerate(
        (
            ("masks", []),
            ("trainannot/town", []),
            ("mixed", ["_classes.csv", "a_mask.png"]),
            ("classified", ["_classes.csv"]),
            ("images_with_labels", []),
            ("annotations/images", []),
        )
    ):
        root = tmp_path / str(number)
        (root / "train").mkdir(parents=True)
        for folder in (root / "images", root / name):
            folder.mkdir(parents=True)
            photographs()[0].save(folder / "a.png")
        for file in files:
            (root / name / file).touch()
        if number > 2:
            assert len(choose_images(root, FaiM2FImageProcessor(), given, 9, 1).paths) == 1
            continue
        with pytest.raises(ExportError, match=f"{root / name} has maps of labels.*: name a folder"):
            choose_images(root, FaiM2FImageProcessor(), given, 9, 1)
    (tmp_path / "linked" / "images").mkdir(parents=True)
    photographs()[0].save(tmp_path / "linked" / "images" / "a.png")
    (tmp_path / "linked" / "masks").symlink_to(tmp_path / "5" / "images")
    with pytest.raises(ExportError, match="linked/masks has maps of labels"):
        choose_images(tmp_path / "linked", FaiM2FImageProcessor(), given, 9, 1)


def test_a_graph_that_onnxruntime_cannot_open_is_a_sentence(graphs: Graphs, images: Path, tmp_path: Path) -> None:
    shutil.copytree(graphs["logits"], tmp_path / "newer")
    model = onnx.load(tmp_path / "newer" / "model.onnx")
    model.ir_version = 99
    onnx.save(model, tmp_path / "newer" / "model.onnx")
    with pytest.raises(ExportError, match=r"^ONNX Runtime .* cannot open the graph \(.*99.*\): export the model"):
        quantize(tmp_path / "newer", tmp_path / "int8", images)


def test_images_are_bounded_shared_out_and_reported(graphs: Graphs, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for name in ("a/one.png", "a/two.jpg", "b/three.PNG", "b/c/four.png", "five.png", "six.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        photographs()[0].save(folder / name)
    (folder / "broken.png").write_bytes((folder / "six.png").read_bytes()[:100])
    (folder / "text.jpg").write_text("no image")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_text("no image")
    lines = quantize(graphs["semantic"], tmp_path / "all", folder, max_error=ANY_ERROR)
    found = report(tmp_path / "all")["images"]
    used = found["calibration"] + found["held_out"]
    assert sorted(used) == ["a/one.png", "a/two.jpg", "b/c/four.png", "b/three.PNG", "five.png", "six.png"]
    assert len(found["held_out"]) == 2 and len(found["skipped"]) == 2
    assert {problem.split()[0].rstrip(":,") for problem in found["skipped"]} == {"broken.png", "text.jpg"}
    assert sum(line.startswith("left out: ") for line in lines) == 2
    assert str(folder) not in json.dumps(report(tmp_path / "all"))
    quantize(graphs["semantic"], tmp_path / "three", folder, most_images=3, max_error=ANY_ERROR)
    found = report(tmp_path / "three")["images"]
    assert len(found["calibration"]) == 2 and len(found["held_out"]) == 1
    lines = quantize(graphs["semantic"], tmp_path / "one", folder, most_images=1, max_error=ANY_ERROR)
    found = report(tmp_path / "one")["images"]
    assert found["calibration"] == found["held_out"] and "calibrated on 1 image; " in lines[0]
    assert "the same one, because there is no other" in lines[0]


def test_one_batch_is_in_memory_at_a_time(
    graphs: Graphs, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calibrator keeps everything that a call collects, so it is called once per batch."""
    from onnxruntime.quantization import MinMaxCalibrater

    collected: list[int] = []
    collect = MinMaxCalibrater.collect_data

    def counting(self: Any, reader: Any) -> None:
        batches = []
        while (batch := reader.get_next()) is not None:
            batches.append(batch)
        collected.append(len(batches))
        remaining = iter(batches)
        collect(self, SimpleNamespace(get_next=lambda: next(remaining, None)))

    monkeypatch.setattr(MinMaxCalibrater, "collect_data", counting)
    quantize(graphs["queries"], tmp_path / "out", images, max_error=ANY_ERROR)
    assert collected == [1] * len(report(tmp_path / "out")["images"]["calibration"])


@pytest.mark.large
def test_a_sensitive_layer_stays_in_float(images: Path, tmp_path: Path) -> None:
    """A weight of 10,000 on a channel that is always 0 has no effect in float, but in int8 rounds all other weights to
    0."""
    model: Any = lively_model()
    with torch.no_grad():
        model.backbone.stem.normalization.bias[0] = -1000.0
        model.backbone.stages[0].convolution.weight[:, 0] = 1e4
    model.save_pretrained(tmp_path / "model")
    FaiM2FImageProcessor.from_model_config(model.config, size={"shortest_edge": 64}).save_pretrained(tmp_path / "model")
    export_onnx(tmp_path / "model", tmp_path / "onnx", size=SIZE, batch=1, verify=False)
    graph = onnx.load(tmp_path / "onnx" / "model.onnx").graph
    weights = {tensor.name: np.abs(numpy_helper.to_array(tensor)).max(initial=0) for tensor in graph.initializer}
    outlier = [n.name for n in graph.node if n.op_type == "Conv" and weights[n.input[1]] > 1000]
    assert len(outlier) == 1

    quantize(tmp_path / "onnx", tmp_path / "whole", images, max_error=ANY_ERROR)
    spoiled = report(tmp_path / "whole")["error"]["measured"]
    allowed = spoiled / 2
    lines = quantize(tmp_path / "onnx", tmp_path / "out", images, max_error=allowed)
    found = report(tmp_path / "out")
    assert found["left_in_float"][0]["nodes"] == outlier
    assert found["left_in_float"][0]["error_if_they_alone_were_in_int8"] > allowed
    assert found["error"]["measured"] <= allowed < found["error"]["with_every_layer_in_int8"] == pytest.approx(spoiled)
    left = {name for group in found["left_in_float"] for name in group["nodes"]}
    after = onnx.load(tmp_path / "out" / "model.onnx")
    assert (
        set(reads_int8(after))
        == set(found["quantized"])
        == with_weights(onnx.load(tmp_path / "onnx" / "model.onnx")) - left
    )
    assert len(left) < 5
    assert any(line.startswith(f"left in float: {outlier[0]} (in int8, it alone changes ") for line in lines)
    assert any("with every layer in int8 the error would be" in line for line in lines)


class Layers:
    """Stands for `Trials`: layers are named by numbers, and the error is the sum of their errors."""

    def __init__(self, errors: dict[str, float]) -> None:
        self.errors = errors
        self.asked = 0

    def error(self, nodes: list[str], count: int | None = None) -> float:
        self.asked += 1
        return sum(self.errors.get(name, 0.0) for name in nodes)


class TestTheSearch:
    NAMES = [str(i) for i in range(40)]

    def test_nothing_is_searched_where_all_is_well(self) -> None:
        trials: Any = Layers({"3": 0.01})
        choice = quantize_module._choose(trials, self.NAMES, 0.015)
        assert choice.quantized == self.NAMES and not choice.left_out and trials.asked == choice.trials == 1

    def test_the_fewest_that_do_worst_first(self) -> None:
        trials: Any = Layers({"7": 0.5, "8": 0.3, "33": 0.1, "20": 0.01})
        choice = quantize_module._choose(trials, self.NAMES, 0.05)
        assert [group.nodes for group in choice.left_out] == [["7"], ["8"], ["33"]]
        assert [group.error for group in choice.left_out] == [0.5, 0.3, 0.1]
        assert choice.quantized == [name for name in self.NAMES if name not in ("7", "8", "33")]
        assert choice.whole_error == pytest.approx(0.91) and trials.asked == choice.trials < 40

    def test_it_ends(self) -> None:
        """If every layer has a small error, whole groups stay in float after a number of trials."""
        names = [str(i) for i in range(500)]
        trials: Any = Layers(dict.fromkeys(names, 0.001))
        choice = quantize_module._choose(trials, names, 0.1)
        assert 0 < len(choice.quantized) <= 100 and trials.asked < 2.5 * quantize_module.MOST_TRIALS

    def test_nothing_can_be_quantized(self) -> None:
        trials: Any = Layers(dict.fromkeys(self.NAMES, 0.02))
        with pytest.raises(ExportError, match="no layer can be in int8 .* at most 0.015: all of them change 0.800"):
            quantize_module._choose(trials, self.NAMES, 0.015)
        with pytest.raises(ExportError, match=r"all of them change 0.800; .* probability of 0.07 .* as untrained"):
            quantize_module._choose(trials, self.NAMES, 0.015, confidence=0.07)

    def test_trained_weights_are_sure_of_their_classes(self) -> None:
        unsure, sure = torch.full((5, 9), 0.1), torch.zeros(5, 9)
        sure[0, 3] = 0.95  # one query has a class, the others "no object"
        for sigmoid, low in ((False, 0.1), (True, 0.9)):
            assert quantize_module._confidence(unsure, sigmoid) == pytest.approx(low)
            assert quantize_module._confidence(sure, sigmoid) > 0.98
        assert quantize_module._confidence(torch.full((5, 9), 0.5), True) == 0.5


def test_the_report(graphs: Graphs, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = graphs["logits"], tmp_path / "out"
    assert main([str(source), str(out), "--images", str(images), "--for", "tensorrt", "--max-error", "0.9"]) == 0
    printed = capsys.readouterr().out
    found = report(out)
    for key, folder in (("source", source), ("graph", out)):
        content = (folder / "model.onnx").read_bytes()
        assert found[key] == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    assert found["for"] == "tensorrt" and found["error"]["allowed"] == 0.9
    assert found["versions"]["onnxruntime"] == onnxruntime.__version__
    assert f"int8 has an error of {found['error']['measured']:.3f} on scored masks" in printed
    assert printed.endswith(f"{out}: written\n")
    notes = {entry.key: entry.value for entry in onnx.load(out / "model.onnx").metadata_props}
    assert notes["faim2f.precision"] == "int8" and not any(key.startswith("onnx.") for key in notes)


@pytest.mark.large
def test_digits_are_found_as_before(digits: Path, scenes: Path, tmp_path: Path) -> None:
    """With default settings, on 60 scenes, so that metrics vary more than in the benchmark."""

    class Graph(nn.Module):
        def __init__(self, folder: Path) -> None:
            super().__init__()
            self.session, self.place = session(folder), nn.Parameter(torch.zeros(1))

        def forward(self, pixel_values: torch.Tensor) -> Any:
            classes, masks = self.session.run(None, {"pixel_values": pixel_values.numpy()})
            return SimpleNamespace(
                class_queries_logits=torch.from_numpy(classes), masks_queries_logits=torch.from_numpy(masks)
            )

    quantize(digits, tmp_path / "out", scenes)
    found = report(tmp_path / "out")
    assert found["error"]["measured"] <= 0.015 and len(found["quantized"]) > 60
    assert (tmp_path / "out" / "model.onnx").stat().st_size < 0.6 * (digits / "model.onnx").stat().st_size
    processor = FaiM2FImageProcessor.from_pretrained(digits)
    evaluator = Evaluator(processor, dict(enumerate(LABELS)), ("semantic", "instance"), THING_IDS, batch_size=1)
    held_out: Any = DigitScenes("test", 60, seed=31)
    before, after = (evaluator(Graph(folder), held_out) for folder in (digits, tmp_path / "out"))
    assert after["semantic"]["mIoU"] > before["semantic"]["mIoU"] - 2
    assert after["instance"]["AP"] > before["instance"]["AP"] - 2

    image = Image.fromarray(held_out[0]["image"].permute(1, 2, 0).numpy())
    predictions = [
        Predictor.from_pretrained(str(folder), runtime="onnxruntime")(image, subtask="instance")[0]
        for folder in (digits, tmp_path / "out")
    ]
    ours, theirs = (sorted(one.class_id for one in made.segments if (one.score or 0) > 0.8) for made in predictions)
    assert ours and ours == theirs
    assert (predictions[0].label_map == predictions[1].label_map).float().mean() > 0.97


@needs_library
@pytest.mark.slow  # exports instances
@pytest.mark.parametrize("kind", ["semantic", pytest.param("instances", marks=pytest.mark.large)])
def test_tensorrt_builds_it(kind: str, quantized: Quantized, tmp_path: Path) -> None:
    ranges = {} if kind == "semantic" else {"sizes": ((64, 64), (64, 96), (256, 256)), "batches": (1, 1, 2)}
    export_tensorrt(quantized(kind, "tensorrt")[0], tmp_path / "engine", precision="int8", gpu="sm86", **ranges)
    assert json.loads((tmp_path / "engine" / "engine.json").read_text())["precision"] == "int8"


@pytest.mark.large
@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["sm75", "sm86", "sm89", "sm120"])
def test_tensorrt_builds_the_digits(gpu: str, digits_for_tensorrt: Path, tmp_path: Path) -> None:
    export_tensorrt(digits_for_tensorrt, tmp_path / "engine", precision="int8", gpu=gpu)
    assert (tmp_path / "engine" / "model.engine").stat().st_size > 1e6


def mistake(capsys: pytest.CaptureFixture[str], source: Path, out: Path, images: Path, *more: object) -> str:
    """The command's error message; asserts that it is one sentence, and that no file was written."""
    capsys.readouterr()
    before = set(out.parent.iterdir()) if out.parent.is_dir() else set()
    assert main([str(source), str(out), "--images", str(images), *map(str, more)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("faim2f quantize: ") and printed.err.count("\n") == 1
    assert "Traceback" not in printed.err
    assert (set(out.parent.iterdir()) if out.parent.is_dir() else set()) == before
    return printed.err


def changed(source: Path, target: Path, change: Any) -> Path:
    """A copy of an ONNX folder with a modified graph."""
    target.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (target / name).write_bytes((source / name).read_bytes())
    model = onnx.load(source / "model.onnx")
    change(model)
    onnx.save(model, target / "model.onnx")
    return target


def test_mistakes(
    graphs: Graphs,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, out, tiny = graphs["semantic"], tmp_path / "out", graphs.model
    assert "exists already" in mistake(capsys, source, tiny, images)
    assert "is not a folder; make it first" in mistake(capsys, source, tmp_path / "not" / "there", images)
    assert "has no model.onnx: name a folder that `faim2f export onnx` wrote" in mistake(capsys, tiny, out, images)
    assert "is not a folder; name one with images" in mistake(capsys, source, out, tmp_path / "nothing")
    assert "is not a folder; name one with images" in mistake(capsys, source, out, images / "00.png")
    assert "at least 1, not 0" in mistake(capsys, source, out, images, "--max-images", 0)
    assert "above 0 and at most 1, not 0.0" in mistake(capsys, source, out, images, "--max-error", 0)
    assert "not nan" in mistake(capsys, source, out, images, "--max-error", "nan")
    monkeypatch.setattr(quantize_module, "MOST_TRIALS", 1)  # the search gives up on all layers at once
    assert "no layer can be in int8" in mistake(capsys, source, out, images, "--max-error", "1e-9")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("no image")
    assert "has no image in it (.jpg, " in mistake(capsys, source, out, empty)
    (empty / "text.jpg").write_text("no image")
    told = mistake(capsys, source, out, empty)
    assert "none of the 1 images in" in told and "text.jpg" in told
    for wrong in (["--for", "coreml"], ["--max-images", "many"], ["--imges", "x"]):
        with pytest.raises(SystemExit, match="2"):
            main([str(source), str(out), "--images", str(images), *wrong])
    with pytest.raises(SystemExit, match="2"):
        main([str(source), str(out)])
    with pytest.raises(ExportError, match="must be one of onnxruntime, tensorrt, not 'coreml'"):
        quantize(source, out, images, "coreml")


@pytest.mark.large
def test_graphs_that_cannot_be_quantized(
    graphs: Graphs, quantized: Quantized, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, root = tmp_path / "out", tmp_path / "sources"
    root.mkdir()
    int8, _ = quantized("logits", "onnxruntime")
    assert "is quantized already: name the float32 graph" in mistake(capsys, int8, out, images)
    half = exported(graphs.model, size=SIZE, precision="fp16")
    assert "is in fp16, and int8 is made of fp32" in mistake(capsys, half, out, images)

    other = changed(graphs["logits"], root / "other", lambda model: model.graph.output.pop())
    assert "is not a graph that `faim2f export onnx` wrote (it returns class_" in mistake(capsys, other, out, images)

    def without_classes(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            if node.op_type == "Softmax":
                node.op_type = "LogSoftmax"

    cut = changed(graphs["semantic"], root / "cut", without_classes)
    assert "its class and mask logits are not found" in mistake(capsys, cut, out, images)
    text = changed(graphs["logits"], root / "text", lambda model: None)
    (text / "model.onnx").write_text("no graph")
    assert "is not a readable ONNX file" in mistake(capsys, text, out, images)
    alone = changed(graphs["logits"], root / "alone", lambda model: None)
    (alone / "preprocessor_config.json").unlink()
    assert "must hold the config.json and preprocessor_config.json" in mistake(capsys, alone, out, images)
    sized = changed(graphs["queries"], root / "sized", lambda model: None)
    settings = json.loads((sized / "preprocessor_config.json").read_text())
    (sized / "preprocessor_config.json").write_text(json.dumps({**settings, "size": {"height": 32, "width": 32}}))
    assert "makes images of 32x32 (height x width), and the graph takes 64x96" in mistake(capsys, sized, out, images)


def test_libraries_that_are_not_there(
    graphs: Graphs, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ExportError, match="needs onnx and onnxruntime, which are not installed: pip install 'hf-faim2f"
    ):
        quantize(graphs["logits"], tmp_path / "out", images)


def test_the_command_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        command_line.main(["--help"])
    assert "quantize" in capsys.readouterr().out
    assert command_line.COMMANDS["quantize"].extra == "onnx"


def test_nodes_without_names_of_their_own() -> None:
    nodes = [onnx.helper.make_node("Relu", ["x"], [f"y{i}"], name="same" if i < 2 else "") for i in range(4)]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], []))
    name_nodes(model)
    names = [node.name for node in model.graph.node]
    assert names[0] == "same" and len(set(names)) == 4 and all(names)

"""Model repositories for Triton: their configuration, parsed with the client library's protobuf, and their graph."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from google.protobuf import text_format

from hf_faim2f.cli import main
from hf_faim2f.errors import ExportError
from hf_faim2f.export.triton import export_triton
from hf_faim2f.files import sha256_of
from hf_faim2f.runtime import Predictor, PredictorError
from tests.support.lively_model import LABELS, save_model
from tests.support.shared import exported


def model_config(path: Path) -> Any:
    """Parses a configuration with tritonclient's own message; importing its package would also import a gRPC client."""
    package = importlib.util.find_spec("tritonclient")
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs tritonclient, whose protobuf parses config.pbtxt")
    file = Path(package.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    name = "tests_triton_model_config_pb2"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return text_format.Parse(path.read_text(encoding="utf-8"), sys.modules[name].ModelConfig())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("triton") / "tiny")


@pytest.mark.large
def test_the_repository_of_a_graph(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = exported(model, outputs="logits"), tmp_path / "repository"
    words = ["--name", "segmenter", "--max-batch", "6", "--batch-wait", "2.5", "--json"]
    assert main(["export", "triton", str(source), str(out), *words]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["model"] == "segmenter" and {"segmenter/config.pbtxt", "segmenter/1/model.onnx"} <= {
        file["name"] for file in document["files"]
    }
    assert "no server has run it" in document["notes"][-1]
    folder = out / "segmenter"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {"config.pbtxt", "labels.txt", "1/model.onnx", "config.json", "preprocessor_config.json"}
    assert (folder / "labels.txt").read_text().splitlines() == list(LABELS.values())
    config = model_config(folder / "config.pbtxt")
    assert (config.name, config.backend, config.max_batch_size) == ("segmenter", "onnxruntime", 6)
    assert config.dynamic_batching.max_queue_delay_microseconds == 2500
    assert config.parameters["faim2f.outputs"].string_value == "logits"
    session = onnxruntime.InferenceSession(str(folder / "1" / "model.onnx"))
    values = session.run(None, {config.input[0].name: np.zeros((3, 3, 64, 96), dtype=np.float32)})
    kinds = type(config.input[0]).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_name
    assert list(config.input[0].dims) == [3, -1, -1] and config.input[0].data_type == kinds["TYPE_FP32"].number
    assert [one.name for one in config.output] == [one.name for one in session.get_outputs()]
    for one, value in zip(config.output, values, strict=True):
        assert one.data_type == kinds["TYPE_FP32"].number and value.dtype == np.float32
        assert all(side in (-1, own) for side, own in zip(one.dims, value.shape[1:], strict=True))
    # A label file of an output would name the places of its values, which are not the classes.
    assert [one.label_filename for one in config.output] == ["", ""]


def test_a_fixed_batch_is_not_batched(model: Path, tmp_path: Path) -> None:
    source = exported(model, outputs="semantic", input_name="image", size=(64, 96), batch=1)
    export_triton(source, tmp_path / "a", name="fixed")
    config = model_config(tmp_path / "a" / "fixed" / "config.pbtxt")
    assert config.max_batch_size == 0 and not config.HasField("dynamic_batching")
    assert list(config.input[0].dims) == [1, 3, 64, 96] and list(config.output[0].dims) == [1, 64, 96]
    with pytest.raises(ExportError, match="has a fixed batch size"):
        export_triton(source, tmp_path / "b", largest_batch=4)
    with pytest.raises(ExportError, match="is an export already, whose outputs cannot be chosen"):
        export_triton(source, tmp_path / "b", outputs="logits")
    with pytest.raises(ExportError, match="cannot be a model's name"):
        export_triton(source, tmp_path / "b", name="../x")
    assert not (tmp_path / "b").exists()


def test_engines_are_those_of_triton_s_library(model: Path, tmp_path: Path) -> None:
    """With descriptions only: a plan of `tensorrt` can only be built on its GPU."""
    engine = tmp_path / "engine"
    engine.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (engine / name).write_bytes((model / name).read_bytes())
    (engine / "model.engine").write_bytes(b"a plan")
    profile = {"smallest": [1, 3, 64, 64], "usual": [1, 3, 64, 64], "largest": [4, 3, 128, 128]}
    described = {
        "outputs_kind": "semantic",
        "inputs": [{"name": "image", "shape": [-1, 3, -1, -1], "type": "uint8", "profile": profile}],
        "outputs": [
            {"name": "segmentation", "shape": [-1, -1, -1], "type": "uint8"},
            {"name": "segmentation_scores", "shape": [-1, -1, -1], "type": "float32"},
        ],
        "gpu": "sm86",
        "library": {"name": "tensorrt-rtx", "version": "1.7"},
        "engine": {"sha256": sha256_of(b"a plan")},
    }
    labels = list(LABELS.values())
    (engine / "engine.json").write_text(json.dumps(described))
    with pytest.raises(ExportError, match="Triton opens engines of the library tensorrt alone"):
        export_triton(engine, tmp_path / "out")
    described["library"] = {"name": "tensorrt", "version": "10.7"}
    (engine / "engine.json").write_text(json.dumps(described))
    for other in (["anchor"], [*labels[:-1], "anchor"]):
        (engine / "engine.json").write_text(json.dumps({**described, "labels": other}))
        with pytest.raises(ExportError, match="engine.json may be of another model, because it"):
            export_triton(engine, tmp_path / "out")
        with pytest.raises(PredictorError, match="engine.json may be of another model, because it"):
            Predictor.from_pretrained(engine, "tensorrt")  # says so before it looks for a GPU
    large = [{**described["inputs"][0], "profile": {**profile, "smallest": [2, 3, 64, 64]}}]
    (engine / "engine.json").write_text(json.dumps({**described, "labels": labels, "inputs": large}))
    with pytest.raises(ExportError, match="takes 2 to 4 images at once, and Triton's batches have any size from 1"):
        export_triton(engine, tmp_path / "out")
    (engine / "engine.json").write_text(json.dumps({**described, "labels": labels}))
    with pytest.raises(ExportError, match="takes at most 4 images at once, not 5"):
        export_triton(engine, tmp_path / "out", largest_batch=5)
    export_triton(engine, tmp_path / "out")
    assert (tmp_path / "out" / "engine" / "1" / "model.plan").read_bytes() == b"a plan"
    config = model_config(tmp_path / "out" / "engine" / "config.pbtxt")
    assert (config.backend, config.max_batch_size, list(config.input[0].dims)) == ("tensorrt", 4, [3, -1, -1])

"""OpenVINO: its files give torch's outputs, the runtime opens them, and damaged or foreign files are rejected."""

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_faim2f import FaiM2FImageProcessor
from hf_faim2f.cli.export import main
from hf_faim2f.errors import ExportError
from hf_faim2f.export import formats
from hf_faim2f.export.formats import FORMATS, export_format, open_exported, read_description
from hf_faim2f.files import sha256_of
from hf_faim2f.runtime import Predictor, PredictorError
from hf_faim2f.runtime.backends import RUNTIMES
from hf_faim2f.zoo import RUNTIME_FILES, runtimes_of
from tests.support.forks import WITHOUT_ONNX
from tests.support.lively_model import check_same, photographs, save_model

openvino = pytest.importorskip("openvino", reason="needs OpenVINO: pip install 'hf-faim2f[openvino]'")
openvino_files = importlib.import_module("hf_faim2f.export.openvino")
SIZE = (64, 96)
FILES = ("openvino_model.xml", "openvino_model.bin")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def exported(model_folder: Path) -> Path:
    """Logits, for any image size and batch size."""
    out = model_folder.parent / "exported"
    lines = export_format("openvino", model_folder, out)
    assert [line.partition(":")[0] for line in lines] == [
        f"fp32 in openvino against float64 in torch on {shape}" for shape in ("2x3x130x166", "1x3x97x64")
    ]
    return out


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "copied")


def refusal(folder: Path, device: str | None = None) -> str:
    with pytest.raises(PredictorError) as error:
        Predictor.from_pretrained(folder, "openvino", device)
    return str(error.value)


def describe(folder: Path, **changes: Any) -> None:
    path = folder / "format.json"
    values = {**json.loads(path.read_text()), **changes}
    values["files"] = {name: {"sha256": sha256_of(folder / name)} for name in FILES}
    path.write_text(json.dumps(values))


def test_the_files_give_what_torch_gives(model_folder: Path, exported: Path) -> None:
    names = {path.name for path in model_folder.iterdir()} - {"model.safetensors"}
    assert {path.name for path in exported.iterdir()} == names | {*FILES, "format.json"}
    assert str(exported.parent).encode() not in (exported / FILES[0]).read_bytes()  # no paths of this machine
    assert runtimes_of(exported) == ["openvino"]
    ours, plain = Predictor.from_pretrained(exported, "openvino"), Predictor.from_pretrained(model_folder)
    assert ours.subtasks == plain.subtasks == ("instance", "semantic", "panoptic")
    for subtask in ours.subtasks:
        threshold = None if subtask == "semantic" else 0.1
        found, expected = (one(photographs(), subtask, threshold, batch_size=2) for one in (ours, plain))
        check_same(found, expected, stray=2e-4)
    for shape in ((1, 3, 32, 32), (3, 3, 33, 40)):
        pixels = torch.randn(shape)
        for name, values in ours.network.run(pixels).items():
            wanted = plain.network.run(pixels)[name]
            assert float((values - wanted).abs().max() / wanted.abs().max()) <= 1e-3
    # Outputs of one batch are not overwritten by the next.
    first = ours.network.run(pixels)["class_queries_logits"]
    kept = first.clone()
    ours.network.run(torch.zeros(3, 3, 33, 40))
    assert torch.equal(first, kept)


@pytest.mark.large
def test_label_maps_of_a_fixed_size_with_small_weights(
    model_folder: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    graph = ["--outputs", "semantic", "--input", "image", "--size", "64x96", "--batch", "1", "--precision", "fp16"]
    assert main(["openvino", str(model_folder), str(out), *graph, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["verified"] and told["format"]["input"] == {"name": "image", "shape": [1, 3, 64, 96]}
    assert told["notes"][0].startswith("fp16 in openvino against float64 in torch on 1x3x64x96")
    assert FaiM2FImageProcessor.from_pretrained(out).size == {"height": 64, "width": 96}
    weights = [(folder / FILES[1]).stat().st_size for folder in (out, exported)]
    assert weights[0] < 0.55 * weights[1]
    network = Predictor.from_pretrained(out, "openvino").network
    assert (network.outputs, network.batch, network.size) == ("semantic", 1, SIZE)
    resized = shutil.copytree(model_folder, tmp_path / "resized")
    plain, rounded = Predictor.from_pretrained(resized), Predictor.from_pretrained(resized, precision="fp16")
    for predictor in (plain, rounded):
        predictor.network.processor.size = {"height": 64, "width": 96}
    # Images of the network's size, so that only rounding to float16 differs.
    pictures = [picture.convert("RGB").resize(SIZE[::-1]) for picture in photographs()]
    answers = (one(pictures, "semantic") for one in (plain, rounded, Predictor.from_pretrained(out, "openvino")))
    for expected, in_torch, found in zip(*answers, strict=True):
        usual, changed = (float((one.label_map != expected.label_map).float().mean()) for one in (in_torch, found))
        assert changed <= usual + 0.02
    processor = FaiM2FImageProcessor.from_pretrained(out)
    for name, value in (("size", {"height": 64, "width": 64}), ("do_resize", False)):
        setattr(processor, name, value)
        processor.save_pretrained(out)
        assert f"{out / FILES[0]} takes 64x96 pixels (height x width) and nothing else, but" in refusal(out)


def test_a_network_that_differs_is_not_kept(
    model_folder: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(graph: Any, folder: Path, precision: str) -> None:  # writes an existing export
        for name in FILES:
            shutil.copyfile(exported / name, folder / name)

    def wrong(*given: Any) -> Callable[[Tensor], dict[str, Tensor]]:
        run = open_exported(*given)
        return lambda inputs: {name: values * 1.01 for name, values in run(inputs).items()}

    monkeypatch.setattr("hf_faim2f.export.openvino.write", write)
    assert len(export_format("openvino", model_folder, tmp_path / "right")) == 2
    shutil.rmtree(tmp_path / "right")
    monkeypatch.setattr(formats, "open_exported", wrong)
    with pytest.raises(ExportError, match="does not agree with the model .* nothing was kept"):
        export_format("openvino", model_folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_several_devices_needs_no_number(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core = openvino_files.CORE
    several = SimpleNamespace(
        available_devices=["CPU.0", "CPU.1"], get_property=core.get_property, read_model=core.read_model,
        compile_model=core.compile_model,
    )  # fmt: skip
    monkeypatch.setattr(openvino_files, "CORE", several)
    assert Predictor.from_pretrained(exported, "openvino", "cpu")(photographs()[0])
    assert "There is no device 'gpu' for openvino here: choose one of cpu.0, cpu.1." in refusal(exported, "gpu")


def test_what_was_not_exported_by_this_package_is_refused(folder: Path, exported: Path) -> None:
    assert read_description(exported, "openvino").shape == (None, 3, None, None)
    with pytest.raises(PredictorError, match="has openvino_model.xml and no weights for torch"):
        Predictor.from_pretrained(exported)
    assert "There is no device 'abacus' for openvino here: choose one of cpu" in refusal(folder, "abacus")
    (folder / FILES[1]).write_bytes(b"other weights")
    assert "is not the file that format.json describes (its SHA-256 differs)" in refusal(folder)
    describe(folder)
    assert "cannot open" in refusal(folder) and "export the model again" in refusal(folder)
    (folder / FILES[0]).write_bytes(b"\x08\x08" + b"an ONNX graph could name files")
    describe(folder)
    assert "is not an OpenVINO file" in refusal(folder)
    (folder / FILES[0]).unlink()
    assert "There is no file" in refusal(folder) and "`faim2f export openvino` writes" in refusal(folder)


@pytest.mark.parametrize(
    "changes, told",
    [
        (
            {"input": {"name": "pixel_values", "shape": [1, 3, 64, 96]}},
            "has different inputs or outputs than",
        ),
        ({"outputs_kind": "semantic"}, "has different inputs or outputs than"),
        ({"outputs_kind": "poems"}, "does not describe an export"),
        ({"format": "abacus"}, "does not describe an export"),
        ({"precision": "fp7"}, "does not describe an export"),
        ({"input": {"name": "pixel_values", "shape": [None, 3, 64, None]}}, "does not describe an export"),
        ({"input": {"name": "pixel_values", "shape": [1, 3, 64, float("inf")]}}, "does not describe an export"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(changes: dict[str, Any], told: str, folder: Path) -> None:
    describe(folder, **changes)
    assert told in refusal(folder)


def test_a_configuration_with_other_labels_is_refused(folder: Path) -> None:
    """As after `config.json` was copied from a model with as many classes; renaming a class in both files is fine."""
    config = json.loads((folder / "config.json").read_text())
    number = len(config["id2label"]) - 1
    before = config["id2label"][str(number)]
    config["id2label"][str(number)], config["label2id"] = "anchor", None
    (folder / "config.json").write_text(json.dumps(config))
    told = refusal(folder)
    assert f"it calls class {number} {before!r}, but config.json beside it 'anchor'" in told
    assert "export the model again" in told
    labels = json.loads((folder / "format.json").read_text())["labels"]
    describe(folder, labels=[*labels[:-1], "anchor"])
    assert Predictor.from_pretrained(folder, "openvino").network.config.id2label[number] == "anchor"


def test_a_description_of_any_depth_is_refused(folder: Path) -> None:
    (folder / "format.json").write_text("[" * 100_000)
    assert "does not describe an export (RecursionError" in refusal(folder)


def test_requests_that_cannot_be_met(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["openvino", str(model_folder), str(tmp_path / "out"), "--size", "8x8"]) == 2
    assert "each side must have" in capsys.readouterr().err
    find = formats.importlib.util.find_spec
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None if name == "openvino" else find(name))
    assert main(["openvino", str(model_folder), str(tmp_path / "out")]) == 2
    assert "OpenVINO needs openvino, which is not installed: pip install 'hf-faim2f[openvino]'" in (
        capsys.readouterr().err
    )
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_no_fault_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("Exception from src/core.cpp:1:\nbasic_ios::clear: iostream error")

    module = importlib.import_module("hf_faim2f.export.openvino")
    monkeypatch.setattr(module, "write_graph", lambda graph, path: None)
    monkeypatch.setattr(module, "CORE", SimpleNamespace(read_model=lambda path: None))
    monkeypatch.setattr(openvino, "save_model", full)
    graph: Any = SimpleNamespace(outputs="logits")
    with pytest.raises(ExportError, match=f"cannot write its files .* is the disk of {tmp_path} full"):
        module.write(graph, tmp_path / "staging", "fp32")


@pytest.mark.large
def test_it_runs_without_onnx(model_folder: Path, exported: Path, tmp_path: Path) -> None:
    photographs()[0].save(tmp_path / "a.png")
    words = [exported, tmp_path / "a.png", "--runtime", "openvino", "--no-overlays", "--out", tmp_path / "out"]
    command = [sys.executable, "-c", WITHOUT_ONNX, "predict", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "out" / "a.json").is_file(), done.stderr
    done = subprocess.run([*command[:3], "export", "openvino", str(model_folder), str(tmp_path / "ov")],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2 and "pip install 'hf-faim2f[onnx]'" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.large
def test_openvino_reports_nothing() -> None:
    script = """
import hf_faim2f.export.openvino
from openvino.tools.ovc import telemetry, telemetry_utils
print(telemetry_utils.tm.__name__, type(telemetry).__module__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["openvino.tools.ovc.telemetry_stub"] * 2


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_that_runs_here_has_its_runtime(name: str) -> None:
    row = FORMATS[name]
    if row.runs is not None:
        assert RUNTIMES[row.runs].extra == row.extra and RUNTIME_FILES[row.runs] == row.files[0]


@pytest.mark.large
def test_signals_are_handled_after_networks_are_closed(exported: Path) -> None:
    script = """
import gc, signal, sys
from hf_faim2f.runtime import Predictor
opened = [Predictor.from_pretrained(sys.argv[1], "openvino") for _ in range(3)]
while opened:  # in the order of their opening
    opened.pop(0)
    gc.collect()
    signal.signal(signal.SIGUSR1, lambda *_: print(len(opened), flush=True))
    signal.raise_signal(signal.SIGUSR1)
"""
    done = subprocess.run([sys.executable, "-c", script, str(exported)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "2\n1\n0\n"), done.stderr

"""AOTInductor packages: their outputs, the contents of their folder, and when they are rejected."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hf_faim2f import FaiM2FImageProcessor
from hf_faim2f.cli.benchmark import choose_runtimes
from hf_faim2f.cli.export import main
from hf_faim2f.export import aotinductor
from hf_faim2f.export.aotinductor import export_package, instruction_sets, read_description, system_here, torch_release
from hf_faim2f.files import sha256_of
from hf_faim2f.runtime import Predictor, PredictorError
from hf_faim2f.zoo import runtimes_of
from tests.support.lively_model import check_same, photographs, save_model

SIZE = (64, 96)
HAS_COMPILER = any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")
# Opens a package in a process without a compiler, and saves its outputs.
WITHOUT_COMPILER = """
import sys, torch
from hf_faim2f.runtime import Predictor
torch.set_num_threads(1)
network = Predictor.from_pretrained(sys.argv[1], "aotinductor").network
outputs = network.run(torch.load(sys.argv[2]))
torch.save(outputs, sys.argv[3])
"""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.large
@pytest.mark.slow  # compiles
@needs_compiler
def test_a_package_says_what_torch_says(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["torch", str(model_folder), str(out)]) == 0
    printed = capsys.readouterr().out
    assert "fp32 in aotinductor against float64 in torch on 2x3x130x166" in printed  # verified at two sizes
    assert "on 1x3x97x64" in printed and "native code" in printed

    # The folder equals the model's, with the package in place of the weights.
    names = {path.name for path in model_folder.iterdir()} - {"model.safetensors"}
    assert {path.name for path in out.iterdir()} == names | {"model.pt2", "compiled.json"}
    assert FaiM2FImageProcessor.from_pretrained(out).size == {"shortest_edge": 64, "longest_edge": 160}
    found = json.loads((out / "compiled.json").read_text())
    assert found["input"] == {"name": "pixel_values", "shape": [None, 3, None, None]}
    assert found["cpu"]["instruction_sets"] == list(instruction_sets()) and found["labels"][0] == "sky"
    assert found["package"]["sha256"] == sha256_of(out / "model.pt2")

    # Any image size and batch size, for every subtask.
    package, plain = Predictor.from_pretrained(out, "aotinductor"), Predictor.from_pretrained(model_folder)
    for subtask in ("semantic", "instance", "panoptic"):
        threshold = None if subtask == "semantic" else 0.1
        ours, theirs = (one(photographs(), subtask, threshold, batch_size=2) for one in (package, plain))
        check_same(ours, theirs, stray=2e-4)
    for shape in ((1, 3, 32, 32), (3, 3, 33, 40)):
        pixels = torch.randn(shape)
        for name, values in package.network.run(pixels).items():
            expected = plain.network.run(pixels)[name]
            assert float((values - expected).abs().max() / expected.abs().max()) <= 1e-5

    # Another process, where no compiler can be found.
    torch.save(pixels, tmp_path / "pixels.pt")
    command = [sys.executable, "-c", WITHOUT_COMPILER, str(out), str(tmp_path / "pixels.pt"), str(tmp_path / "out.pt")]
    environment = {**os.environ, "PATH": str(tmp_path), "CXX": "/nowhere/g++"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, values in torch.load(tmp_path / "out.pt").items():
        torch.testing.assert_close(values, package.network.run(pixels)[name])


@pytest.mark.large
@pytest.mark.slow  # compiles
@needs_compiler
def test_bfloat16_with_the_label_map_inside(model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lines = export_package(model_folder, out, "semantic", "image", size=SIZE, batch=1, precision="bf16")
    assert len(lines) == 1 and lines[0].startswith("bf16 in aotinductor against float64 in torch on 1x3x64x96")
    package = Predictor.from_pretrained(out, "aotinductor")
    assert package.subtasks == ("semantic",) and package.network.size == SIZE and package.network.batch == 1
    folder = shutil.copytree(model_folder, tmp_path / "resized")
    resized, rounded = (Predictor.from_pretrained(folder, precision=precision) for precision in ("fp32", "bf16"))
    for predictor in (resized, rounded):
        predictor.network.processor.size = dict(zip(("height", "width"), SIZE, strict=True))
    # Images of the network's size, so that only rounding to bfloat16 differs. In one of them it may change what a query
    # attends to, in torch as well as in the package; so the means over many are compared.
    draw = np.random.default_rng(0)
    shapes = [Image.fromarray(draw.integers(0, 256, (8, 12, 3), np.uint8)) for _ in range(40)]
    pictures = [picture.convert("RGB").resize(SIZE[::-1]) for picture in (*photographs(), *shapes)]
    exact, own, ours = (one(pictures, "semantic") for one in (resized, rounded, package))
    usual, changed = (
        np.mean([float((a.label_map != b.label_map).float().mean()) for a, b in zip(found, exact, strict=True)])
        for found in (own, ours)
    )
    assert 0 < changed <= usual + 0.005


# Checks before a package is opened, on folders whose package is not a real one.


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    out = tmp_path / "package"
    out.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copyfile(model_folder / name, out / name)
    (out / "model.pt2").write_bytes(b"no package")
    describe(out)
    return out


def describe(folder: Path, **changes: Any) -> None:
    values = {
        "outputs_kind": "logits",
        "input": {"name": "pixel_values", "shape": [None, 3, None, None]},
        "precision": "fp32",
        "device": "cpu",
        "gpu": None,
        "cpu": {"system": system_here(), "instruction_sets": list(instruction_sets())},
        "torch": torch_release(),
        "package": {"sha256": sha256_of(folder / "model.pt2"), "bytes": 10},
    }
    (folder / "compiled.json").write_text(json.dumps({**values, **changes}))


def refusal(folder: Path, device: str | None = None) -> str:
    with pytest.raises(PredictorError) as error:
        Predictor.from_pretrained(folder, "aotinductor", device)
    return str(error.value)


def test_another_cpu_is_a_sentence(folder: Path) -> None:
    sets = [*instruction_sets(), "avx1024", "zmm_dreams"]
    describe(folder, cpu={"system": system_here(), "instruction_sets": sets})
    told = refusal(folder)
    assert "compiled for a CPU with avx1024, zmm_dreams, which the CPU of this machine does not have" in told
    # Fewer instruction sets are fine: the next check, of the file, fails.
    describe(folder, cpu={"system": system_here(), "instruction_sets": list(instruction_sets())[:2]})
    assert "torch cannot open" in refusal(folder)


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"cpu": {"system": "Plan9 mips", "instruction_sets": []}}, "compiled for Plan9 mips, and this is"),
        ({"torch": "1.13"}, "compiled by torch 1.13, and"),
        ({"device": "cuda", "gpu": "sm00"}, "compiled for a GPU of type sm00, but this machine has"),
        ({"package": {"sha256": "0" * 64}}, "is not the file that compiled.json describes"),
        ({"package": {}}, "does not describe a package"),
        ({"device": "abacus"}, "does not describe a package"),
        ({"input": {"name": "pixel_values", "shape": [None, 3, 64, None]}}, "does not describe a package"),
        ({"input": {"name": "pixel_values", "shape": [1, 3, 64, float("inf")]}}, "does not describe a package"),
        ({"input": {"name": "pixel_values", "shape": [1, 3, 64, 96]}}, "beside it does not resize to that"),
        ({"labels": ["anchor"]}, "its labels are not those of config.json beside it"),
        ({"labels": 3}, "its labels are not those of config.json beside it"),
    ],
)
def test_what_does_not_fit_is_not_opened(changes: dict[str, Any], told: str, folder: Path, monkeypatch: Any) -> None:
    def never(path: str) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr(torch._inductor, "aoti_load_package", never)
    describe(folder, **changes)
    assert told in refusal(folder)


def test_files_that_are_missing_or_damaged(folder: Path) -> None:
    assert read_description(folder).shape == (None, 3, None, None)
    assert "was compiled for cpu and cannot run on cuda" in refusal(folder, "cuda")
    for content in ("[]", "[" * 100_000):
        (folder / "compiled.json").write_text(content)
        assert "does not describe a package" in refusal(folder)
    (folder / "compiled.json").unlink()
    assert "There is no file" in refusal(folder) and "`faim2f export torch` wrote" in refusal(folder)


def test_native_code_runs_only_if_it_is_asked_for_by_name(folder: Path) -> None:
    assert runtimes_of(folder) == ["torch"] and choose_runtimes(str(folder), None) == ["torch"]
    assert choose_runtimes(str(folder), ["aotinductor", "torch"]) == ["aotinductor"]
    with pytest.raises(PredictorError, match="if you trust where it comes from, choose the runtime aotinductor"):
        Predictor.from_pretrained(folder)
    with pytest.raises(PredictorError, match="The precision of aotinductor is that of its graph"):
        Predictor.from_pretrained(folder, "aotinductor", precision="bf16")


@pytest.mark.parametrize("place", ["export", "compiler", "package"])
def test_a_full_disk_is_no_fault_of_the_model(
    place: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def compiler(*_: object, **__: object) -> None:
        raise RuntimeError("C++ compile error\nld: final link failed: No space left on device")

    def package(_: object, package_path: Any, **__: object) -> None:
        package_path.write(b"a package")  # a file of its own would abort the process

    monkeypatch.setattr(torch.export, "export", full if place == "export" else lambda *_, **__: None)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compiler if place == "compiler" else package)
    monkeypatch.setattr(Path, "write_bytes", full)
    assert main(["torch", str(model_folder), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.splitlines()[-1:] == ["faim2f export: No space left on device."]
    assert list(tmp_path.iterdir()) == []


def test_without_a_compiler(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(aotinductor.shutil, "which", lambda name: None)
    assert main(["torch", str(model_folder), str(tmp_path / "out")]) == 2
    assert "needs a C++ compiler, and torch finds none" in capsys.readouterr().err
    assert main(["torch", str(model_folder), str(tmp_path / "out"), "--size", "8x8"]) == 2
    assert "each side must have" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["torch", str(model_folder), str(tmp_path / "out"), "--device", "cuda"]) == 2
        assert "torch finds none here" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

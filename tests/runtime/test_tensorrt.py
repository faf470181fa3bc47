"""TensorRT engines as a runtime: checks before an engine is opened and, on a GPU, the same results as torch.

Engines are built ahead of time, for a GPU that need not be present.
"""

import importlib.util
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_faim2f import FaiM2FImageProcessor
from hf_faim2f.cli.predict import main as predict
from hf_faim2f.errors import ExportError
from hf_faim2f.export import engine as engine_module
from hf_faim2f.export.engine import TYPES, gpu_here, open_engine, read_description, read_engine
from hf_faim2f.export.tensorrt import AHEAD_OF_TIME, export_tensorrt
from hf_faim2f.runtime import Predictor, PredictorError
from tests.support.lively_model import lively_model, photographs, save_model
from tests.support.shared import exported

HAS_LIBRARY = importlib.util.find_spec("tensorrt_rtx") is not None
HAS_GPU = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(
    not HAS_LIBRARY, reason="needs tensorrt-rtx (pip install 'hf-faim2f[tensorrt-rtx]') to build engines"
)
without_gpu = pytest.mark.skipif(HAS_GPU, reason="there is a GPU here")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    lively_model().save_pretrained(folder)
    FaiM2FImageProcessor(size=64).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine with dynamic sizes and up to 3 images, for the GPU of this machine, or for another one."""
    root = tmp_path_factory.mktemp("engines")
    # The graph that other tests also use, with this model's own processor.
    shutil.copytree(exported(save_model(root / "tiny"), outputs="logits"), root / "graph")
    shutil.copy(source / "preprocessor_config.json", root / "graph")
    export_tensorrt(
        root / "graph", root / "engine", gpu=(gpu_here() or "sm86"), library="tensorrt-rtx", batches=(1, 1, 3),
        sizes=((64, 64), (64, 96), (128, 128)),
    )  # fmt: skip
    return root / "engine"


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(built, tmp_path / "engine"))


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(PredictorError) as told:
        Predictor.from_pretrained(folder, runtime="tensorrt", **options)
    message = str(told.value)
    assert message.endswith(".") and "\n" not in message
    return message


def test_the_description_says_what_was_built(built: Path) -> None:
    engine = read_description(built)
    assert (engine.outputs, engine.input_name) == ("logits", "pixel_values")
    assert (engine.smallest, engine.largest) == ((1, 3, 64, 64), (3, 3, 128, 128))
    assert engine.gpu in (*AHEAD_OF_TIME, gpu_here()) and engine.library == "tensorrt-rtx"
    assert read_engine(engine) == (built / "model.engine").read_bytes()


@without_gpu
def test_a_machine_without_a_gpu(built: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "runs on an NVIDIA GPU (sm86), and" in refusal(built)
    photographs()[0].save(tmp_path / "photo.png")
    arguments = [str(built), str(tmp_path / "photo.png"), "--out", str(tmp_path / "out"), "--runtime", "tensorrt"]
    assert predict(arguments) == 2
    told = capsys.readouterr().err
    assert "runs on an NVIDIA GPU (sm86)" in told and "Traceback" not in told
    assert not (tmp_path / "out").exists()


def test_no_folder_of_an_engine(source: Path, tmp_path: Path) -> None:
    assert "There is no file" in refusal(source) and "`faim2f export tensorrt`" in refusal(source)
    assert "There is no file" in refusal(tmp_path / "nothing")


@pytest.mark.parametrize("device", ["cpu", "cuda:x", "mps"])
def test_other_devices(built: Path, device: str) -> None:
    assert f"device must be cuda or cuda:N for tensorrt, not {device!r}." in refusal(built, device=device)


SPOILED: dict[str, Callable[[dict[str, Any]], object]] = {
    "a missing key": lambda values: values.pop("library"),
    "another library": lambda values: values["library"].update(name="os"),
    "other outputs": lambda values: values.update(outputs_kind="boxes"),
    "no input": lambda values: values.update(inputs=[]),
    "an input of no name": lambda values: values["inputs"][0].update(name="x"),
    "sizes the wrong way": lambda values: values["inputs"][0]["profile"].update(smallest=[9, 3, 900, 900]),
    "sizes that are open": lambda values: values["inputs"][0].pop("profile"),
    "a shape of three": lambda values: values["inputs"][0]["profile"].update(smallest=[3, 8, 8], largest=[3, 8, 8]),
    "numbers without end": lambda values: values["inputs"][0]["profile"].update(largest=[math.inf] * 4),
    "text for numbers": lambda values: values["inputs"][0]["profile"].update(largest="many"),
    "a list for the whole": lambda values: values.update(engine=["sha256"]),
    "a number for a text": lambda values: values.update(gpu=86),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_description_of_something_else(folder: Path, what: str) -> None:
    values = json.loads((folder / "engine.json").read_text())
    SPOILED[what](values)
    (folder / "engine.json").write_text(json.dumps(values))
    assert "does not describe an engine" in refusal(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "3", '{"inputs": 3}', "\udcff", "[" * 100_000])
def test_a_description_that_is_none(folder: Path, content: str) -> None:
    (folder / "engine.json").write_bytes(content.encode(errors="surrogateescape"))
    assert "does not describe an engine" in refusal(folder)


def test_a_description_of_any_length_is_not_read(folder: Path) -> None:
    with (folder / "engine.json").open("ab") as file:
        file.write(b" " * (1 << 20))
    assert "is larger than any description" in refusal(folder)


def test_an_engine_that_is_not_the_one_described(folder: Path) -> None:
    content = (folder / "model.engine").read_bytes()
    for other in (content[:-1], content + b"\0", bytes([content[0] ^ 1]) + content[1:]):
        (folder / "model.engine").write_bytes(other)
        with pytest.raises(ExportError, match="SHA-256 is another"):
            read_engine(read_description(folder))


def test_another_gpu_or_version(built: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a simulated GPU; the errors come before the GPU is used."""
    engine = read_description(built)
    monkeypatch.setattr(engine_module, "gpu_here", lambda device=None: "sm53")
    with pytest.raises(ExportError, match=f"was built for {engine.gpu}, and the GPU here is sm53"):
        open_engine(engine)
    monkeypatch.setattr(engine_module, "gpu_here", lambda device=None: engine.gpu)
    values = json.loads((folder / "engine.json").read_text())
    values["library"]["version"] = "1.0.0.1"
    (folder / "engine.json").write_text(json.dumps(values))
    with pytest.raises(ExportError, match=r"was built by tensorrt-rtx 1\.0\.0\.1, and .* is installed, which cannot"):
        open_engine(read_description(folder))
    values["library"]["name"] = "tensorrt"
    (folder / "engine.json").write_text(json.dumps(values))
    if importlib.util.find_spec("tensorrt") is None:
        with pytest.raises(ExportError, match=r"tensorrt is not installed: pip install 'hf-faim2f\[tensorrt\]'"):
            open_engine(read_description(folder))


def test_every_type_of_a_graph_has_torchs(built: Path) -> None:
    """All types that `engine.json` names for this package's graphs, by the library's names."""
    import tensorrt_rtx as trt

    from hf_faim2f.export.tensorrt import _type_name

    described = json.loads((built / "engine.json").read_text())
    names = {_type_name(getattr(trt.DataType, name)): kind for name, kind in TYPES.items()}
    for entry in (*described["inputs"], *described["outputs"]):
        assert str(names[entry["type"]]) == f"torch.{entry['type']}"
    assert {"uint8", "int32", "int64"} <= set(names)


@pytest.mark.skipif(not HAS_GPU, reason="engines run on the GPU that they are for, and there is none here")
@pytest.mark.parametrize("library", ["tensorrt-rtx", "tensorrt"])
def test_an_engine_says_what_torch_says(source: Path, tmp_path: Path, library: str) -> None:
    """Alternating and repeated batch sizes and shapes, so that buffers and captured graphs are reused."""
    if not engine_module.is_installed(library):
        pytest.skip(f"{library} is not installed")
    export_tensorrt(
        source, tmp_path / "engine", gpu="current", library=library, batches=(1, 1, 3),
        sizes=((64, 64), (64, 96), (128, 128)), verify=False,
    )  # fmt: skip
    predictor = Predictor.from_pretrained(tmp_path / "engine", runtime="tensorrt")
    reference = Predictor.from_pretrained(source, device="cpu")
    for _ in range(2):
        for batch_size in (1, 3):
            ours = predictor(photographs(), "semantic", batch_size=batch_size)
            theirs = reference(photographs(), "semantic", batch_size=batch_size)
            for one, other in zip(ours, theirs, strict=True):
                assert (one.label_map == other.label_map).float().mean() > 0.98
    with pytest.raises(PredictorError, match="takes at most 3 images at once, not 4"):
        predictor(photographs(), batch_size=4)

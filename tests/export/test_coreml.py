"""Core ML: a complete package is written, with our names of outputs; it is not run."""

from pathlib import Path

import pytest

from hf_faim2f.cli.export import main
from hf_faim2f.errors import ExportError
from hf_faim2f.export.formats import FORMATS, export_format, read_description
from hf_faim2f.zoo import runtimes_of
from tests.support.lively_model import save_model

coremltools = pytest.importorskip("coremltools", reason="needs coremltools: pip install 'hf-faim2f[coreml]'")


def test_a_package_has_our_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = save_model(tmp_path / "tiny"), tmp_path / "out"
    with pytest.raises(ExportError, match="Core ML has no inputs of bytes.* pixel_values"):
        export_format("coreml", model, out, input_name="image", size=(64, 96))
    assert not out.exists()
    assert main(["coreml", str(model), str(out), "--size", "64x96", "--precision", "fp16"]) == 0
    assert "not verified (this package has no runtime for it)" in capsys.readouterr().out
    assert read_description(out, "coreml").shape == (1, 3, 64, 96) and runtimes_of(out) == ["torch"]
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    names = {path.name for path in model.iterdir()} - {"model.safetensors"}
    assert files == names | {*FORMATS["coreml"].files, "format.json"}
    package = coremltools.models.MLModel(str(out / "model.mlpackage"), skip_model_load=True)
    described = package.get_spec().description
    shapes = {one.name: tuple(one.type.multiArrayType.shape) for one in (*described.input, *described.output)}
    assert shapes == {
        "pixel_values": (1, 3, 64, 96),
        "class_queries_logits": (1, 12, 6),
        "masks_queries_logits": (1, 12, 16, 24),
    }

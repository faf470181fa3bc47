"""ExecuTorch and LiteRT: their files give torch's outputs, and are only opened if their runtime is named."""

from pathlib import Path

import pytest
import torch

from hf_faim2f.cli.export import main
from hf_faim2f.runtime import Predictor, PredictorError
from hf_faim2f.zoo import runtimes_of
from tests.support.lively_model import check_same, photographs, save_model


@pytest.mark.parametrize(
    "name, library, file",
    [("executorch", "executorch.runtime", "model.pte"), ("litert", "litert_torch", "model.tflite")],
)
def test_files_of_one_size_give_what_torch_gives(
    name: str, library: str, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(library, reason=f"needs another library: pip install 'hf-faim2f[{name}]'")
    model, out = save_model(tmp_path / "tiny"), tmp_path / "out"
    assert main([name, str(model), str(out)]) == 2
    assert " needs a fixed image size: pass one, such as --size 640x640." in capsys.readouterr().err
    assert main([name, str(model), str(out), "--size", "64x96"]) == 0
    assert f"fp32 in {name} against float64 in torch on 1x3x64x96" in capsys.readouterr().out
    names = {path.name for path in model.iterdir()} - {"model.safetensors"}
    assert {path.name for path in out.iterdir()} == names | {file, "format.json"}

    ours, plain = Predictor.from_pretrained(out, name), Predictor.from_pretrained(model)
    plain.network.processor.size = {"height": 64, "width": 96}
    assert (ours.network.batch, ours.network.size) == (1, (64, 96)) and runtimes_of(out) == ["torch"]
    for subtask in ours.subtasks:
        threshold = None if subtask == "semantic" else 0.1
        found, expected = (one(photographs(), subtask, threshold) for one in (ours, plain))
        check_same(found, expected, stray=2e-4)
    pixels = torch.randn(1, 3, 64, 96)
    first = ours.network.run(pixels)
    ours.network.run(torch.zeros(1, 3, 64, 96))  # does not overwrite the outputs of the first run
    for key, values in plain.network.run(pixels).items():
        assert float((first[key] - values).abs().max() / values.abs().max()) <= 1e-3

    for device, told in (("gpu", f"There is no device 'gpu' for {name} here"), (None, "SHA-256 differs")):
        if device is None:
            (out / file).write_bytes(b"no network")
        with pytest.raises(PredictorError, match=told):
            Predictor.from_pretrained(out, name, device)

"""ExecuTorch: a program gives what torch gives, and is opened only where its runtime is named."""

from pathlib import Path

import pytest
import torch

from hf_faim2f.cli.export import main
from hf_faim2f.runtime import Predictor, PredictorError
from hf_faim2f.zoo import runtimes_of
from tests.support.lively_model import check_same, photographs, save_model

pytest.importorskip("executorch.runtime", reason="needs ExecuTorch: pip install 'hf-faim2f[executorch]'")


def test_a_program_gives_what_torch_gives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = save_model(tmp_path / "tiny"), tmp_path / "out"
    assert main(["executorch", str(model), str(out)]) == 2
    assert "ExecuTorch takes images of one size: name it, such as --size 640x640." in capsys.readouterr().err
    assert main(["executorch", str(model), str(out), "--size", "64x96"]) == 0
    assert "fp32 in executorch against float64 in torch on 1x3x64x96" in capsys.readouterr().out
    names = {path.name for path in model.iterdir()} - {"model.safetensors"}
    assert {path.name for path in out.iterdir()} == names | {"model.pte", "format.json"}

    ours, plain = Predictor.from_pretrained(out, "executorch"), Predictor.from_pretrained(model)
    plain.network.processor.size = {"height": 64, "width": 96}
    assert (ours.network.batch, ours.network.size) == (1, (64, 96)) and runtimes_of(out) == ["torch"]
    for subtask in ours.subtasks:
        threshold = None if subtask == "semantic" else 0.1
        found, expected = (one(photographs(), subtask, threshold) for one in (ours, plain))
        check_same(found, expected, stray=2e-4)
    pixels = torch.randn(1, 3, 64, 96)
    first = ours.network.run(pixels)
    ours.network.run(torch.zeros(1, 3, 64, 96))  # leaves what the first run returned
    for name, values in plain.network.run(pixels).items():
        assert float((first[name] - values).abs().max() / values.abs().max()) <= 1e-3

    for device, told in (("gpu", "There is no device 'gpu' for executorch here"), (None, "SHA-256 is another")):
        if device is None:
            (out / "model.pte").write_bytes(b"no program")
        with pytest.raises(PredictorError, match=told):
            Predictor.from_pretrained(out, "executorch", device)

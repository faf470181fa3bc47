"""`precision="auto"`: bfloat16 if the device multiplies it natively and predictions of calibration images agree."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hf_faim2f.cli.predict import main
from hf_faim2f.errors import ImageError
from hf_faim2f.runtime import Predictor, PredictorError, precision, predictor
from hf_faim2f.runtime.precision import choose_precision, multiplies_bfloat16
from hf_faim2f.runtime.prediction import Prediction, Segment
from hf_faim2f.training import run as training
from tests.support.lively_model import photographs, save_model

LABELS = {0: "sky", 1: "cat"}


def segment(class_id: int, score: float, left: int = 0, side: int = 4) -> Segment:
    """A square of 4x4 pixels, starting at column `left`."""
    mask = torch.ones(side, side, dtype=torch.bool)
    return Segment(class_id, LABELS[class_id], score, (left, 0, left + side - 1, side - 1), mask)


def answers(changed: int = 0, *segments: Segment) -> Callable[[Any, str], list[Prediction]]:
    """A predictor whose label map of 20x20 pixels is 0 except for `changed` pixels, and which returns these
    segments."""
    label_map = torch.zeros(400, dtype=torch.long)
    label_map[:changed] = 1

    def predict(image: Any, subtask: str) -> list[Prediction]:
        if image == "broken":
            raise ImageError("broken")
        found = [] if subtask == "semantic" else list(segments)
        return [Prediction(subtask, label_map.view(20, 20), found, Image.new("RGB", (20, 20)), LABELS)]

    return predict


CAT = segment(1, 0.9)


@pytest.mark.parametrize(
    "rounded, chosen, why",
    [
        (answers(0, CAT), "bf16", "2 calibration images keep their segments in bfloat16, and 0.00% of the pixels"),
        (answers(4, CAT), "bf16", "and 1.00% of the pixels change their label"),
        (answers(5, CAT), "fp32", "changes the label of 1.2% of the pixels of calibration image 1, and 1% may change"),
        (answers(0), "fp32", "changes segments of calibration image 1 (cat)"),
        (answers(0, segment(0, 0.9)), "fp32", "changes segments"),
        (answers(0, CAT, segment(1, 0.9)), "fp32", "changes segments"),  # a second segment at the same place
        (answers(0, segment(1, 0.6)), "bf16", "keep their segments"),  # scores may change
        (answers(0, segment(1, 0.9, left=1)), "fp32", "changes segments"),  # 12 of 20 pixels overlap
        (answers(0, CAT, segment(0, 0.53, left=9)), "bf16", "keep"),  # within SCORE_MARGIN of the threshold
        (answers(0, CAT, segment(0, 0.56, left=9)), "fp32", "changes segments of calibration image 1 (sky)"),
    ],
)
def test_what_agreement_is(rounded: Any, chosen: str, why: str) -> None:
    choice = choose_precision(answers(0, CAT), rounded, ["one", "broken", "two"], "panoptic", 0.5)
    assert choice.precision == chosen and why in choice.reason


def test_label_maps_of_a_semantic_model_are_compared_alone() -> None:
    """Without segments, nothing is said about them."""
    for images, told in ((["one"], "1 calibration image"), (["one", "two"], "2 calibration images")):
        choice = choose_precision(answers(0, CAT), answers(2), images, "semantic", 0.5)
        assert str(choice) == f"bf16: on {told}, 0.50% of the pixels change their label in bfloat16."


def test_images_that_say_nothing() -> None:
    choice = choose_precision(answers(), answers(), ["broken"], "semantic", 0.5)
    assert str(choice) == "fp32: none of the calibration images can be read."

    def fails(image: Any, subtask: str) -> list[Prediction]:
        raise PredictorError("It outputs logits that are NaN.")

    assert "cannot be predicted in both" in choose_precision(answers(), fails, ["one"], "semantic", 0.5).reason


@pytest.mark.parametrize(
    "capabilities, machine, expected",
    [
        ({"avx512_bf16": True}, "x86_64", True),
        ({"amx_bf16": True, "avx512_bf16": False}, "x86_64", True),
        ({"avx512_f": True, "avx512_vnni": True}, "x86_64", False),  # bfloat16 would be computed in float32 and rounded
        ({"bf16": True}, "aarch64", True),
        ({"bf16": False, "fp16_arith": True}, "aarch64", False),
    ],
)
def test_which_cpus_multiply_bfloat16(
    capabilities: dict[str, bool], machine: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(precision.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert multiplies_bfloat16(torch.device("cpu")) is expected
    assert not multiplies_bfloat16(torch.device("meta"))


@pytest.mark.parametrize("has_instructions", [False, True])
def test_16_bit_floats_that_a_cpu_emulates_are_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_instructions: bool
) -> None:
    said: list[str] = []
    monkeypatch.setattr(precision, "_has_instructions", lambda chosen: has_instructions)
    monkeypatch.setattr(precision.logger, "warning_once", said.append)
    monkeypatch.setattr(training, "multiplies_bfloat16", lambda device: has_instructions)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = save_model(tmp_path / "tiny")
    for chosen in ("fp32", "bf16", "fp16"):
        Predictor.from_pretrained(folder, device="cpu", precision=chosen)
    training.check_precision("bf16")
    told = [text.partition(":")[0] for text in said if "Use fp32" in text]
    kinds = [] if has_instructions else ["bfloat16", "float16", "bfloat16"]
    assert told == [f"This CPU has no instructions that multiply {kind}" for kind in kinds]
    with pytest.raises(ValueError, match=f"needs a GPU, .*: use {'bf16' if has_instructions else 'fp32'}"):
        training.check_precision("fp16")


def test_the_predictor_and_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_model(tmp_path / "tiny")
    with pytest.raises(PredictorError, match="go together"):
        Predictor.from_pretrained(folder, precision="auto")
    with pytest.raises(PredictorError, match="go together"):
        Predictor.from_pretrained(folder, calibration=photographs())
    assert Predictor.from_pretrained(folder).precision_choice is None

    monkeypatch.setattr(predictor, "multiplies_bfloat16", lambda device: False)
    plain = Predictor.from_pretrained(folder, device="cpu", precision="auto", calibration=photographs())
    assert str(plain.precision_choice) == "fp32: this cpu has no instructions that multiply bfloat16."

    monkeypatch.setattr(predictor, "multiplies_bfloat16", lambda device: True)
    # The model's masks are noise, which bfloat16 changes.
    plain = Predictor.from_pretrained(folder, device="cpu", precision="auto", calibration=photographs())
    assert plain.precision_choice is not None and plain.precision_choice.precision == "fp32"
    exact = Predictor.from_pretrained(folder, device="cpu")(photographs()[0], "semantic")[0]
    assert torch.equal(plain(photographs()[0], "semantic")[0].label_map, exact.label_map)
    monkeypatch.setattr(precision, "MOST_CHANGED", 1.0)
    monkeypatch.setattr(precision, "LEAST_OVERLAP", 0.0)
    monkeypatch.setattr(precision, "SCORE_MARGIN", 1.0)
    chosen = Predictor.from_pretrained(folder, device="cpu", precision="auto", calibration=photographs()[:1])
    for network, dtype in ((chosen, torch.bfloat16), (plain, torch.float32)):
        outputs = network.network.run(torch.zeros(1, 3, 64, 64))
        assert outputs["masks_queries_logits"].dtype == dtype
    photographs()[0].save(tmp_path / "photo.png")
    arguments = [str(folder), str(tmp_path / "photo.png"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*arguments, "--precision", "auto", "--no-overlays"]) == 0
    assert "Precision bf16: 1 calibration image keeps its segments in bfloat16, and" in capsys.readouterr().out
    assert main([*arguments, "--precision", "auto", "--ray", "local"]) == 2
    assert "--precision auto cannot be combined with --ray" in capsys.readouterr().err

"""The shipped model: complete, small, with this package's code, and as good on held-out scenes as its card states."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation

from hf_faim2f.data.digits import DigitScenes, _digits, _photographs
from hf_faim2f.evaluation.evaluator import Evaluator
from hf_faim2f.family.digits import LABELS, THING_IDS
from hf_faim2f.model.remote_code_faim2f import copy_remote_code
from tests.support.shipped_digits import DIGITS, complete_digits

FOLDER = DIGITS
# Above the variation between samples of 60 scenes.
SLACK = 6.0


def said() -> dict[str, float]:
    """The card's metrics by name."""
    results = ModelCard.load(FOLDER / "README.md").data.eval_results
    return {result.metric_name: result.metric_value for result in results}


def test_it_is_a_whole_and_small_hub_folder() -> None:
    names = {file.name for file in FOLDER.iterdir() if file.name != "__pycache__"}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "curve.png"} <= names
    assert not [name for name in names if not name.endswith((".json", ".safetensors", ".py", ".md", ".png"))]
    assert sum((FOLDER / name).stat().st_size for name in names) <= 12e6
    kinds = {tensor.dtype for tensor in load_file(FOLDER / "model.safetensors").values()}
    assert kinds == {torch.float16, torch.int64}  # int64: the counters of batch norms


def test_its_code_is_the_package_s(tmp_path: Path) -> None:
    """The repository has the code only once; the completed folder has identical code."""
    copy_remote_code(tmp_path)
    completed = complete_digits(tmp_path / "digits")
    here = {file.name: file.read_text(encoding="utf-8") for file in completed.glob("*.py")}
    assert here == {file.name: file.read_text(encoding="utf-8") for file in tmp_path.glob("*.py")}
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=FOLDER, capture_output=True, text=True, check=False)
    assert listed.stdout == ""


def test_it_finds_digits_that_it_has_not_seen_as_its_card_says(tmp_path: Path) -> None:
    folder = complete_digits(tmp_path / "digits")
    model = AutoModelForUniversalSegmentation.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    assert next(model.parameters()).dtype == torch.float32  # the file is stored in half precision
    evaluator = Evaluator(processor, dict(enumerate(LABELS)), ("semantic", "instance"), THING_IDS)
    results = evaluator(model, DigitScenes("test", 60, seed=31))  # type: ignore[arg-type]
    figures = said()
    assert results["instance"]["AP"] >= figures["instance AP"] - SLACK
    assert results["semantic"]["mIoU"] >= figures["semantic mIoU"] - SLACK


def test_its_card_names_command_figures_and_curve() -> None:
    card = ModelCard.load(FOLDER / "README.md")
    assert card.data.pipeline_tag == "image-segmentation" and card.data.library_name == "transformers"
    figures = said()
    assert {"instance AP", "semantic mIoU", "panoptic PQ"} <= set(figures)
    for name, value in figures.items():
        assert f"| {name} | {value:.1f} |" in card.text
    assert "faim2f train --format digits --model digits --recipe digits" in card.text
    assert re.search(r"!\[.*\]\(curve.png\)", card.text)


@pytest.mark.parametrize("part", [_digits, _photographs])
def test_training_and_held_out_scenes_share_nothing(part) -> None:
    """They share neither a digit nor a part of a photograph; held-out figures are meaningless otherwise."""
    train, test = part("train"), part("test")
    if part is _digits:
        seen = {ink.tobytes() for ink in train[0]}
        assert len(train[0]) + len(test[0]) == 1797 and not any(ink.tobytes() in seen for ink in test[0])
    else:
        seen_rows = {photograph.crop((x, y, x + 24, y + 1)).tobytes() for photograph in train
                     for y in range(0, photograph.height) for x in range(0, photograph.width - 24)}  # fmt: skip
        for photograph in test:
            rows = [photograph.crop((0, y, 24, y + 1)).tobytes() for y in range(photograph.height)]
            flat = [len(set(row)) <= 6 for row in rows]  # plain sky may repeat
            assert not any(row in seen_rows for row, even in zip(rows, flat, strict=True) if not even)

"""The examples, run as scripts on generated data."""

import csv
import os
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hf_faim2f import FaiM2FForUniversalSegmentation, FaiM2FImageProcessor
from hf_faim2f.data.digits import BACKGROUND, DigitScenes
from hf_faim2f.family.digits import LABELS
from tests.support.hub_server import running_hub
from tests.support.reference_models import small_model
from tests.support.shipped_digits import DIGITS, complete_digits

EXAMPLES = Path(__file__).parents[2] / "examples"


def main_of(name: str) -> Any:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Counter[str]]]:
    """A folder of scenes that the shipped model was not trained on, and the digits in each."""
    folder = tmp_path_factory.mktemp("photographs")
    scenes, truth = DigitScenes("test", 3, seed=2027), []
    for number in range(3):
        scene = scenes[number]
        Image.fromarray(scene["image"].permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
        truth.append(Counter(LABELS[label] for label in scene["classes"].tolist() if label != BACKGROUND))
    return folder, truth


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model with its remote code."""
    return complete_digits(tmp_path_factory.mktemp("model") / "digits")


def nearly(found: Counter[str], truth: Counter[str]) -> bool:
    """Whether all but one of the digits were found, with at most two false positives: the model is small."""
    found = Counter({label: count for label, count in found.items() if label != "background"})
    return (truth - found).total() <= 1 and (found - truth).total() <= 2


def test_loading_lists_what_is_there(
    photographs: tuple[Path, list[Counter[str]]], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, truth = photographs
    main_of("load")(str(folder / "0.png"), str(model))
    objects: list[str] = []
    shares: list[str] = []
    for line in capsys.readouterr().out.splitlines():
        (objects if "box" in line else shares).append(line)
    found = Counter(line.partition(":")[0] for line in objects)
    assert nearly(found, truth[0])
    assert 97 <= sum(int(line.split()[1].rstrip("%")) for line in shares) <= 103
    with pytest.raises(SystemExit, match="is not a file: name an image"):
        main_of("load")(str(folder / "none.png"))


def test_the_pipeline_writes_masks(photographs: tuple[Path, list[Counter[str]]], model: Path, tmp_path: Path) -> None:
    folder, truth = photographs
    main_of("segmentation_pipeline")(str(folder / "1.png"), str(tmp_path / "masks"), str(model))
    masks = sorted((tmp_path / "masks").iterdir())
    found = Counter(path.stem.split("-", 1)[1] for path in masks)
    assert nearly(found, truth[1])
    for path in masks:
        mask = Image.open(path)
        assert mask.size == (128, 128) and np.asarray(mask).any()


@pytest.mark.newest_only
@pytest.mark.large  # exports and builds an engine
def test_exported_and_run(
    photographs: tuple[Path, list[Counter[str]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, truth = photographs
    main_of("export_and_run")(str(folder / "2.png"), str(tmp_path / "out"))
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("class_ids int64[1, 20]") for line in lines)
    found = Counter(line.partition(":")[0] for line in lines if line.partition(":")[0] in LABELS)
    assert nearly(found, truth[2])
    assert (tmp_path / "out" / "engine" / "model.engine").stat().st_size > 1e6
    assert Image.open(tmp_path / "out" / "overlay.png").size == (128, 128)


def test_a_folder_becomes_a_table(
    photographs: tuple[Path, list[Counter[str]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, truth = photographs
    shutil.copytree(folder, tmp_path / "photographs")
    (tmp_path / "photographs" / "broken.png").write_bytes(b"no image")
    assert main_of("batch_folder")(str(tmp_path / "photographs"), str(tmp_path / "table.csv")) == 1
    assert "broken.png" in capsys.readouterr().err
    with (tmp_path / "table.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for number, digits in enumerate(truth):
        found = Counter(row["label"] for row in rows if row["image"] == f"{number}.png")
        assert nearly(found, digits)


@pytest.mark.large
@pytest.mark.newest_only
@pytest.mark.slow  # two processes import transformers
def test_publishing_says_what_goes_up_and_sends_it(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DIGITS, tmp_path / "digits", ignore=shutil.ignore_patterns("*.py")))
    token = "hf_" + "example" * 5
    with running_hub({token: "someone"}) as hub:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment = {
            **kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / "publish.py"), str(folder), "someone/digits", "--send"],
            capture_output=True, text=True, check=False, env=environment, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "new: model.safetensors" in done.stdout and " files sent in " in done.stdout
        assert token not in done.stdout + done.stderr
        repo = hub.repos["someone/digits"]
        there = repo.trees[repo.branches["main"]]
        assert repo.private and {path.name for path in DIGITS.iterdir() if path.is_file()} <= set(there)
        assert "modeling_faim2f.py" in there  # added, because the folder had none


def segmented_squares(folder: Path, count: int) -> None:
    """Images with one bright square on dark ground: class 1 on class 0."""
    random = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    (folder / "labels.txt").write_text("ground\nsquare\n")
    for number in range(count):
        top, left = random.integers(4, 36, 2)
        mask = np.zeros((64, 64), dtype=np.uint8)
        mask[top : top + 24, left : left + 24] = 1
        image = np.where(mask[..., None] == 1, 220, 40) + random.integers(-20, 20, (64, 64, 3))
        Image.fromarray(image.astype(np.uint8)).save(folder / "images" / f"{number}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")


def test_fine_tuning_a_folder_leaves_a_model_of_its_classes(tmp_path: Path) -> None:
    segmented_squares(tmp_path / "data", 8)
    model = small_model(decoder_layers=1)
    model.save_pretrained(tmp_path / "model")
    processor = FaiM2FImageProcessor.from_model_config(model.config, size={"shortest_edge": 64})
    processor.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    main_of("finetune_folder")(str(tmp_path / "model"), str(tmp_path / "data"), str(tmp_path / "out"), 10)
    tuned = FaiM2FForUniversalSegmentation.from_pretrained(tmp_path / "out")
    assert tuned.config.id2label == {0: "ground", 1: "square"}
    assert (tmp_path / "out" / "modeling_faim2f.py").exists()


@pytest.mark.newest_only
@pytest.mark.parametrize(
    ("example", "words"),
    [
        ("finetune_folder", "MODEL_FOLDER DATA_FOLDER OUT_FOLDER"),
        ("publish", "MODEL_FOLDER OWNER/NAME"),
        ("load", "IMAGE [MODEL]"),
    ],
)
def test_examples_say_how_they_are_called(example: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [f"{example}.py"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / f"{example}.py"), run_name="__main__")
    # Python prints the message to standard error and exits with 1.
    assert isinstance(ended.value.code, str) and words in ended.value.code

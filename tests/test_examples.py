"""The examples, run as a person would, on data that the test writes."""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hf_faim2f import FaiM2FForUniversalSegmentation, FaiM2FImageProcessor

from .reference_models import small_model

EXAMPLES = Path(__file__).parent.parent / "examples"


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
    main = runpy.run_path(str(EXAMPLES / "finetune_folder.py"))["main"]
    main(str(tmp_path / "model"), str(tmp_path / "data"), str(tmp_path / "out"), 10)
    tuned = FaiM2FForUniversalSegmentation.from_pretrained(tmp_path / "out")
    assert tuned.config.id2label == {0: "ground", 1: "square"}
    assert (tmp_path / "out" / "modeling_faim2f.py").exists()


def test_fine_tuning_says_how_it_is_called() -> None:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / "finetune_folder.py")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1 and "MODEL_FOLDER DATA_FOLDER OUT_FOLDER" in result.stderr
    assert "Traceback" not in result.stderr

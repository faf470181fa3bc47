"""Notes and errors about the data that `faim2f train` and `faim2f evaluate` print before they start."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_faim2f import FaiM2FImageProcessor
from hf_faim2f.cli import main
from tests.support.hub_data import memory
from tests.support.hub_data import png as encoded
from tests.support.image_files import photo, save
from tests.support.reference_models import small_model
from tests.support.shapes import LABELS, shapes, write_folder, write_tree

QUICK = ["--batch-size", "2", "--image-size", "64", "--samples", "0", "--eval-limit", "1", "--no-tensorboard",
         "--steps", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "model"
    model = small_model(id2label=dict(enumerate(LABELS)), decoder_layers=1)
    model.save_pretrained(folder)
    FaiM2FImageProcessor.from_model_config(model.config, size={"shortest_edge": 64}).save_pretrained(folder)
    return folder


def train(model: Path, data: Path, out: Path, form: str, *more: str) -> int:
    return main(
        ["train", "--model", str(model), "--data", str(data), "--format", form, "--out", str(out), *QUICK, *more]
    )


def evaluate(model: Path, data: Path, out: Path, form: str, *more: str) -> int:
    return main(["evaluate", str(model), "--data", str(data), "--format", form, "--out", str(out), "--no-card", *more])


def table_of(printed: str) -> dict[str, list[str]]:
    lines = printed.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("Pixels and segments of each class"))
    return {line.split()[0]: line.split()[1:] for line in lines[start + 2 : start + 2 + len(LABELS)]}


def test_a_training_says_what_it_learns_from(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part, seed in (("train", 0), ("val", 500)):
        write_folder(tmp_path / "data" / part, 2, seed)
    for path in (tmp_path / "data" / "train" / "masks").iterdir():  # removes all bars
        ids = np.asarray(Image.open(path))
        Image.fromarray(np.where(ids == 3, 0, ids).astype(np.uint8)).save(path)
    assert train(model, tmp_path / "data", tmp_path / "run", "folder") == 0
    printed = capsys.readouterr().out
    found = table_of(printed)
    for column, (seeds, gone) in enumerate((((0, 1), {3: 0}), ((500,), {}))):
        for label, name in enumerate(LABELS):
            maps = [np.array(classes)[ids] for _, ids, classes in map(shapes, seeds)]
            maps = [np.vectorize(lambda value: gone.get(value, value))(ids) for ids in maps]  # noqa: B023
            pixels, images = sum(int((ids == label).sum()) for ids in maps), sum((ids == label).any() for ids in maps)
            assert found[name][2 * column : 2 * column + 2] == [f"{pixels:,}", str(images)], name
    assert "Never in the training data, and so not learned: " in printed
    assert "bar" in next(line for line in printed.splitlines() if line.startswith("Never in the training data"))
    assert printed.index("Pixels and segments") < printed.index("Recipe finetune: 1 step of ")


def test_an_evaluation_says_what_the_truth_lacks(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data" / "val"
    save(root / "images" / "0.png", photo(64, 64))
    save(root / "masks" / "0.png", np.zeros((64, 64), dtype=np.uint8))
    (root / "labels.txt").write_text("\n".join(LABELS))
    assert evaluate(model, tmp_path / "data", tmp_path / "out", "folder", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (
        document["notes"][0] == "Absent from the ground truth, so neither measured nor in the means: square, disc, bar."
    )
    assert evaluate(model, tmp_path / "data", tmp_path / "out", "folder") == 0
    assert document["notes"][0] in capsys.readouterr().out


def write_coco(root: Path, **changes: Any) -> Path:
    write_tree("coco-instance", root, 2)
    for part in ("train2017", "val2017"):
        path = root / "annotations" / f"instances_{part}.json"
        document = json.loads(path.read_text())
        for annotation in document["annotations"]:
            annotation.update(changes)
        path.write_text(json.dumps(document))
    return root


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"iscrowd": 1}, "are crowds (iscrowd 1), which are not training targets"),
        ({"iscrowd": "0"}, "has the iscrowd '0': it must be the number 0, or 1 for a crowd"),
        ({"segmentation": {"size": [64, 64], "counts": [4096]}}, "has no segment in any of its 2 images"),
    ],
)
def test_a_training_on_nothing_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: str
) -> None:
    data, out = write_coco(tmp_path / "data", **changes), tmp_path / "run"
    assert train(model, data, out, "coco-instance") == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("faim2f train: ") and words in error[0] and not out.exists()


def test_objects_beyond_the_queries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = small_model(id2label={0: "cell"}, decoder_layers=1, num_queries=5)
    few.save_pretrained(tmp_path / "model")
    FaiM2FImageProcessor.from_model_config(few.config, size={"shortest_edge": 64}).save_pretrained(tmp_path / "model")
    for part in ("train", "val"):
        save(tmp_path / "data" / part / "images" / "0.png", photo(64, 64))
        ids = np.kron(np.arange(1, 65, dtype=np.uint8).reshape(8, 8), np.ones((8, 8), dtype=np.uint8))
        save(tmp_path / "data" / part / "masks" / "0.png", ids)
        (tmp_path / "data" / part / "labels.txt").write_text("cell\n")
    words = "0.png has 64 segments, but the model only 5 queries, each for one: 59 of the 64 segments of 1 image get"
    more = ["--task", "instance"]
    assert train(tmp_path / "model", tmp_path / "data", tmp_path / "run", "folder", *more, "--batch-size", "1") == 0
    printed = capsys.readouterr().out
    assert words in printed and "Pass --queries N for a new model, or with --new-labels." in printed
    assert evaluate(tmp_path / "model", tmp_path / "data", tmp_path / "out", "folder", *more) == 0
    assert words in capsys.readouterr().out


def test_rows_without_file_names_are_trained_on_measured_and_written(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = memory(4).to_dict()
    data["image"] = [{"bytes": encoded(shapes(k)[0]), "path": None} for k in range(4)]
    data["label"] = [
        {"bytes": encoded(np.array(shapes(k)[2], dtype=np.uint8)[shapes(k)[1]]), "path": None} for k in range(4)
    ]
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(data, memory(4).features).to_parquet(str(tmp_path / "data" / f"{split}.parquet"))
    more = ["--labels", ",".join(LABELS)]
    assert train(model, tmp_path / "data", tmp_path / "run", "hub", *more, "--eval-limit", "4") == 0
    out = tmp_path / "out"
    assert evaluate(tmp_path / "run" / "final", tmp_path / "data", out, "hub", *more, "--predictions") == 0
    written = sorted(path.name for path in (out / "predictions" / "semantic").iterdir())
    assert written == [f"{k:012d}.png" for k in range(4)]
    capsys.readouterr()
    # A single file has no split to evaluate on.
    assert train(model, tmp_path / "data" / "train.parquet", tmp_path / "other", "hub", *more) == 2
    assert "train.parquet is a single file, not divided into training and validation data" in capsys.readouterr().err


def test_a_run_is_not_told_to_have_made_fewer_steps(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_folder(tmp_path / "data", 4)
    assert train(model, data, tmp_path / "run", "folder", "--steps", "2", "--save-every", "2") == 0
    assert train(model, data, tmp_path / "run", "folder", "--steps", "1") == 2
    assert "has a run of 2 steps, more than 1: choose at least as many, or another --out" in capsys.readouterr().err


def test_binary_masks_are_refused_with_what_to_pass(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[20:40, 20:40] = 255
    for part in ("train", "val"):
        save(tmp_path / "data" / part / "images" / "0.png", photo(64, 64))
        save(tmp_path / "data" / part / "masks" / "0.png", mask)
        (tmp_path / "data" / part / "labels.txt").write_text("background\nlesion\n")
    new = ["--new-labels"]
    assert train(model, tmp_path / "data", tmp_path / "run", "folder", *new) == 2
    assert "no pixel would be 'lesion'" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert (
        train(model, tmp_path / "data", tmp_path / "run", "folder", *new, "--ignore-index", "-1", "--batch-size", "1")
        == 0
    )
    printed = capsys.readouterr().out
    table, evaluation = printed.split("Each class with the weights of")
    assert [line.split() for line in table.splitlines() if line.startswith("lesion")] == [
        ["lesion", "400", "1", "400", "1"]
    ]
    assert "lesion" in evaluation
    assert evaluate(tmp_path / "run" / "final", tmp_path / "data", tmp_path / "out", "folder") == 2
    assert "pass --ignore-index -1" in capsys.readouterr().err

"""`faim2f evaluate`: its files match the evaluator and plain counts, and huggingface_hub reads the card."""

import errno
import hashlib
import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import EvalResult, ModelCard
from PIL import Image

from hf_faim2f import FaiM2FConfig, FaiM2FImageProcessor
from hf_faim2f.cli import evaluate, main
from hf_faim2f.data.dataset import Description
from hf_faim2f.data.formats import FORMATS, DataSource, open_data
from hf_faim2f.errors import ModelError
from hf_faim2f.evaluation.evaluator import Evaluator, check_classes
from hf_faim2f.hub.card import model_card
from hf_faim2f.hub.card_facts import Training
from hf_faim2f.hub.results import (
    Measured,
    is_for_training,
    is_on_training,
    known_metric,
    merge_results,
    results_text,
    update_card,
)
from hf_faim2f.model.focoos_post_processing_faim2f import evaluate_semantic
from hf_faim2f.training import Recipe
from hf_faim2f.training.run import train
from hf_faim2f.zoo import open_model
from tests.support import forks
from tests.support.reference_models import small_model
from tests.support.shapes import LABELS, Shapes, write_tree

CARD = """---
license: other
tags:
- flowers
model-index:
- name: flowerer
  results:
  - task:
      type: image-segmentation
      name: semantic segmentation
    dataset:
      name: meadows
      type: meadows
      split: val
    metrics:
    - type: mean_iou
      value: 12.5
      name: mIoU
base_model: someone/else
---

# Flowerer

Its own words,   with two spaces at the end.  

| a | table |
"""  # noqa: W291


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data in two formats, three images per split, and a model trained briefly on it."""
    root = tmp_path_factory.mktemp("evaluate")
    for name in ("folder", "coco-panoptic"):
        write_tree(name, root / name, 3)
    model = small_model(id2label=dict(enumerate(LABELS)), decoder_layers=1)
    processor = FaiM2FImageProcessor.from_model_config(model.config, size={"shortest_edge": 64})
    recipe = Recipe("short", steps=60, batch_size=8, learning_rate=2e-3, backbone_multiplier=1.0, clip=1.0)
    train(model, processor, Shapes(480), None, recipe, root / "run")  # type: ignore[arg-type]
    shutil.copytree(root / "run" / "final", root / "model")
    return root


@pytest.fixture
def model(trees: Path, tmp_path: Path) -> Path:
    shutil.copytree(trees / "model", tmp_path / "flowerer")
    return tmp_path / "flowerer"


def command(trees: Path, model: Path, out: Path, name: str = "folder", *more: str) -> list[str]:
    return ["evaluate", str(model), "--data", str(trees / name), "--format", name, "--out", str(out), *more]


def test_the_files_have_what_the_evaluator_measures(
    trees: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(command(trees, model, out, "coco-panoptic", "--subtasks", "semantic,instance,panoptic")) == 0
    printed = capsys.readouterr().out
    loaded, processor = open_model(model)
    data = open_data("coco-panoptic", DataSource(str(trees / "coco-panoptic")), "validation")
    evaluator = Evaluator(processor, loaded.config.id2label, ("semantic", "instance", "panoptic"), (1, 2, 3))
    expected = evaluator(loaded, data.items)
    assert expected["semantic"]["mIoU"] > 0 and expected["panoptic"]["PQ"] > 0
    document = json.loads((out / "evaluation.json").read_text())
    assert document["data"] == {
        "format": "coco-panoptic", "name": "coco-panoptic", "split": "val2017", "task": "panoptic"
    }  # fmt: skip
    assert document["images"] == 3 and document["left_out"] == [] and document["model"] == str(model)
    assert document["weights"] == hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    for subtask, result in expected.items():
        for name, value in result.items():
            found = document["results"][subtask][name]
            if name == "per_class":
                for label, numbers in value.items():
                    for metric, number in numbers.items():
                        read = found[label][metric]
                        assert (read is None) if math.isnan(number) else read == pytest.approx(number), (label, metric)
            else:
                assert (found is None) if math.isnan(value) else found == pytest.approx(value), (subtask, name)
    assert f"mIoU {expected['semantic']['mIoU']:.2f}" in printed and f"PQ {expected['panoptic']['PQ']:.2f}" in printed

    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in
            (out / "per_class.md").read_text().splitlines() if line.startswith("|")]  # fmt: skip
    assert rows[0][:3] == ["class", "semantic IoU", "semantic ACC"] and [row[0] for row in rows[2:6]] == list(LABELS)
    for row in rows[2:6]:
        iou = expected["semantic"]["per_class"][row[0]]["IoU"]
        assert row[1] == ("–" if math.isnan(iou) else f"{iou:.2f}")
    assert rows[2][rows[0].index("instance AP")] == "–"  # the ground is not a thing
    assert ["semantic mIoU", f"{expected['semantic']['mIoU']:.2f}"] in rows


def test_miou_counted_by_hand(trees: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    for name in ("semantic/other.png", "instance/other.json"):  # left by another, killed evaluation
        (out / ".predictions.partial" / name).parent.mkdir(parents=True)
        (out / ".predictions.partial" / name).write_text('[{"image_id": "other"}]')
    assert main(command(trees, model, out, "folder", "--no-card", "--predictions")) == 0
    assert len(list((out / "predictions" / "semantic").iterdir())) == 3
    assert [path.name for path in (out / "predictions").iterdir()] == ["semantic"]
    loaded, processor = open_model(model)
    items = open_data("folder", DataSource(str(trees / "folder")), "validation").items
    intersection, union, present = np.zeros(4), np.zeros(4), np.zeros(4, dtype=bool)
    for number in range(3):
        item = items[number]
        inputs = processor([item["image"]], input_data_format="channels_first", return_tensors="pt")
        with torch.no_grad():
            outputs = loaded.eval()(**inputs)
        predicted = evaluate_semantic(
            outputs.class_queries_logits, outputs.masks_queries_logits, (64, 64), [(64, 64)], cls_sigmoid=False
        )[0].numpy()
        true = item["classes"].numpy()[item["segments"].numpy()]
        for label in range(4):
            intersection[label] += ((predicted == label) & (true == label)).sum()
            union[label] += ((predicted == label) | (true == label)).sum()
            present[label] |= (true == label).any()
    by_hand = 100 * (intersection[present] / union[present]).mean()
    document = json.loads((out / "evaluation.json").read_text())
    assert document["results"]["semantic"]["mIoU"] == pytest.approx(by_hand)
    assert list(document["results"]) == ["semantic"]
    # Files that the next evaluation does not write are removed, or reported as those of an earlier one.
    assert (out / "confusion.csv").is_file()
    more = ["--no-card", "--subtasks", "panoptic", "--limit", "1", "--json"]
    capsys.readouterr()
    assert main(command(trees, model, out, "coco-panoptic", *more)) == 0
    assert not list(out.glob("confusion.*"))
    assert any(
        "predictions is from an earlier evaluation" in note for note in json.loads(capsys.readouterr().out)["notes"]
    )


def results_of(model: Path) -> dict[tuple[str, str], EvalResult]:
    card = ModelCard.load(model / "README.md")
    return {(r.dataset_type, r.metric_name): r for r in card.data.eval_results}


def test_results_are_merged_into_the_card(
    trees: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other results stay, a second evaluation of the same data replaces its own results, and the card's text is
    unchanged."""
    path, out = model / "README.md", tmp_path / "out"
    path.write_text(CARD)
    words = CARD.split("---\n", 2)[2]
    assert main(command(trees, model, out)) == 0
    found = results_of(model)
    document = json.loads((out / "evaluation.json").read_text())["results"]["semantic"]
    old = found["meadows", "mIoU"]
    assert old.metric_value == 12.5 and old.dataset_split == "val"
    new = found["folder", "semantic mIoU"]
    assert new.metric_value == pytest.approx(document["mIoU"], abs=1e-4) and new.metric_type == "mean_iou"
    assert (new.dataset_name, new.dataset_split, new.task_type) == ("folder", "val", "image-segmentation")
    count = len(found)
    assert main(command(trees, model, tmp_path / "coco", "coco-panoptic", "--subtasks", "panoptic")) == 0
    assert len(results_of(model)) > count and ("coco-panoptic", "panoptic PQ") in results_of(model)
    count = len(results_of(model))
    # Several subtasks of one dataset, added twice.
    several = Measured(
        "x", "x", "val", 3, 0, {"semantic": {"mIoU": 1.0}, "instance": {"AP": 2.0}, "panoptic": {"PQ": 3.0}}
    )
    for _ in range(2):
        update_card(model, several.results())
    results = ModelCard.load(path).data.eval_results
    assert sorted(r.metric_name for r in results if r.dataset_type == "x") == [
        "instance AP",
        "panoptic PQ",
        "semantic mIoU",
    ]
    count += 3
    # Results of another model on the same data.
    update = Measured("folder", "folder", "val", 3, 0, {"semantic": {"mIoU": 77.0}})
    update_card(model, update.results())
    assert len(results_of(model)) == count
    assert results_of(model)["folder", "semantic mIoU"].metric_value == 77.0
    assert main(command(trees, model, out)) == 0
    assert results_of(model)["folder", "semantic mIoU"].metric_value == new.metric_value
    text = path.read_text()
    assert text.endswith(words) and text.index("license: other") < text.index("base_model: someone/else")
    card = ModelCard.load(path)
    assert card.data.license == "other" and card.data.tags == ["flowers"] and card.data.model_name == "flowerer"
    assert not [entry.name for entry in model.iterdir() if "partial" in entry.name]
    before = path.read_bytes()
    assert main(command(trees, model, out, "folder", "--no-card")) == 0
    assert main(command(trees, model, out, "folder", "--limit", "1")) == 0
    assert path.read_bytes() == before
    assert json.loads((out / "evaluation.json").read_text())["images"] == 1
    assert main(["card", str(model), "--evaluation", str(out)]) == 2  # `faim2f card` rejects it, too
    assert "covers only 1 images (--limit)" in capsys.readouterr().err and path.read_bytes() == before


def test_a_model_without_card_gets_one(
    trees: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "README.md").unlink(missing_ok=True)
    unlabeled = shutil.copytree(trees / "folder", tmp_path / "unlabeled")
    for path in (unlabeled / "val" / "masks").iterdir():
        Image.new("L", Image.open(path).size, 255).save(path)
    assert main(["evaluate", str(model), "--data", str(unlabeled), "--out", str(tmp_path / "none")]) == 0
    assert capsys.readouterr().out.strip().endswith("README.md gets no result: none is defined.")
    assert not ModelCard.load(model / "README.md").data.eval_results
    assert main(command(trees, model, tmp_path / "out")) == 0
    card = ModelCard.load(model / "README.md")
    assert card.data.model_name == "flowerer" and card.data.library_name == "transformers"
    assert card.text.strip() == "# flowerer" and len(card.data.eval_results) >= 4


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_generated_results_section_follows_the_metadata(
    line_end: str, trees: Path, model: Path, tmp_path: Path
) -> None:
    path, out = model / "README.md", tmp_path / "out"
    before = path.read_text()
    assert "Not evaluated yet" in before  # written by training
    path.write_bytes(before.replace("\n", line_end).encode())
    for subtask, metric in (("semantic", "mIoU"), ("panoptic", "PQ")):
        assert main(command(trees, model, out, "coco-panoptic", "--subtasks", subtask)) == 0
        value = json.loads((out / "evaluation.json").read_text())["results"][subtask][metric]
        text = path.read_bytes().decode()
        assert f"| {subtask} {metric} | {value:.1f} |{line_end}" in text and "Not evaluated yet" not in text
        assert text.count("<summary>Each class on coco-panoptic (val2017)</summary>") == 1
    assert re.search(r"^\| class \| semantic IoU \|.* panoptic PQ \|", text, re.MULTILINE)  # both evaluations
    assert text.count("\n") == text.count(line_end) and "\r\r" not in text
    after = text.replace("\r\n", "\n")
    body = re.compile("\n# .*?(?=## Results)|## Speed.*", re.DOTALL)
    assert body.findall(after) == body.findall(before)  # the rest is unchanged
    path.write_text(after)
    assert main(["card", str(model), "--repository", "run/final"]) == 0
    assert path.read_text() == after  # as that command writes it


def test_images_that_were_left_out_are_in_the_card_too() -> None:
    whole, part = (Measured("a", "A", "val", 9, left, {"semantic": {"mIoU": 1.0}}).results() for left in (0, 2))
    assert whole[0].metric_args is None and part[0].metric_args == {"images": 9, "left_out": 2}
    card = merge_results(merge_results("# Words\r\n", "m", whole), "m", part)
    assert card.count("mean_iou") == 1 and card.endswith("# Words\r\n")
    # The results of another subtask, on all images of the same data, stay beside them.
    other = Measured("a", "A", "val", 11, 0, {"panoptic": {"PQ": 2.0}}).results()
    for first, second in ((other, part), (part, other)):
        results = ModelCard(merge_results(merge_results("", "m", first), "m", second)).data.eval_results
        assert {one.metric_name: one.metric_args for one in results} == {
            "semantic mIoU": {"images": 9, "left_out": 2}, "panoptic PQ": None
        }  # fmt: skip
        text = results_text(results, {})
        assert "On A (val), in percent:\n\n| metric | value |\n| --- | ---: |\n| panoptic PQ | 2.0 |" in text
        assert "On A (val), unusable images or annotations left out: 2, in percent:" in text
    # Older cards have it for all results on the data, and not for each metric.
    old = [replace(one, dataset_args=one.metric_args, metric_args=None) for one in part]
    for new, expected in ((other, {"images": 9, "left_out": 2}), (whole, None)):
        results = ModelCard(merge_results(merge_results("", "m", old), "m", new)).data.eval_results
        by_name = {one.metric_name: one for one in results}
        assert by_name["semantic mIoU"].metric_args == expected
        assert all(one.dataset_args is None for one in results)


def test_broken_images_are_named_or_skipped(
    trees: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data" / "folder", tmp_path / "out"
    shutil.copytree(trees / "folder", data)
    (data / "val" / "images" / "001.png").write_bytes(b"no image")
    card = (model / "README.md").read_bytes()  # written by training
    assert main(command(data.parent, model, out)) == 2
    captured = capsys.readouterr()
    assert "001.png" in captured.err.strip().splitlines()[-1] and "Traceback" not in captured.err
    assert not out.exists() and (model / "README.md").read_bytes() == card
    assert main(command(data.parent, model, out, "folder", "--skip-bad")) == 0
    printed = capsys.readouterr().out
    assert "1 image was left out:" in printed and "001.png" in printed
    assert (
        "On folder (val), unusable images or annotations left out: 1, in percent:" in (model / "README.md").read_text()
    )
    document = json.loads((out / "evaluation.json").read_text())
    assert document["images"] == 2 and len(document["left_out"]) == 1 and "001.png" in document["left_out"][0]


def test_settings_from_a_file(trees: Path, model: Path, tmp_path: Path) -> None:
    card = (model / "README.md").read_bytes()
    config, out = tmp_path / "evaluate.yaml", tmp_path / "out"
    config.write_text(f"model: nowhere\ndata: {trees / 'folder'}\nformat: folder\nout: {out}\nimage_size: 96\n")
    assert main(["evaluate", str(model), "--config", str(config), "--precision", "bf16", "--split", "train"]) == 0
    document = json.loads((out / "evaluation.json").read_text())
    assert document["image_size"] == {"shortest_edge": 96, "longest_edge": 384}
    assert document["precision"] == "bf16" and document["data"]["split"] == "train"
    assert (model / "README.md").read_bytes() == card


def test_a_card_states_results_with_the_model_s_own_settings_alone(
    trees: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, card = tmp_path / "out", model / "README.md"
    assert main(command(trees, model, out, "folder", "--image-size", "64")) == 0  # the model's own
    before = card.read_bytes()
    assert b"semantic mIoU" in before
    assert main(["card", str(model), "--evaluation", str(out), "--repository", "run/final"]) == 0
    assert card.read_bytes() == before  # the same results of the same data
    for more, told in (
        (["--image-size", "96"], "images of another size"),
        (["--precision", "bf16"], "the precision bf16"),
        (["--inference", "sliding", "--window", "64x64"], "sliding windows"),
    ):
        capsys.readouterr()
        assert main(command(trees, model, out, "folder", *more)) == 0
        assert f"uses {told} instead of the model's own settings: the card is left" in capsys.readouterr().out
        assert main(["card", str(model), "--evaluation", str(out)]) == 2
        assert f"is an evaluation with {told}, but a card states" in capsys.readouterr().err
        assert card.read_bytes() == before


def test_results_on_undivided_data_do_not_pass_for_those_of_a_split(
    trees: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All images include those of the training if the model was trained on this data, and else may include them."""
    data, out, path = tmp_path / "meadows", tmp_path / "out", model / "README.md"
    shutil.copytree(trees / "folder" / "val", data)
    words = ["evaluate", str(model), "--data", str(data), "--format", "folder", "--out", str(out), "--split", "all"]
    assert main(words) == 0
    assert ", too." in capsys.readouterr().out.splitlines()[-1]
    assert {result.dataset_split for result in results_of(model).values()} == {"all"}
    assert "On meadows (all: every image, perhaps also those of the training), in percent:" in path.read_text()

    config = FaiM2FConfig.from_pretrained(model)
    training = Training("finetune", {"steps": 1}, data="meadows", split="train", images=2)
    path.write_text(model_card("flowerer", config, training=training))
    before = path.read_bytes()
    assert main(words) == 0
    assert "meadows (all) may have images of the training: the card is left alone" in capsys.readouterr().out
    assert main(["card", str(model), "--evaluation", str(out)]) == 2
    assert "on meadows (all), which may have images of the training: evaluate on images" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert main([*words[:-1], "val"]) == 0
    assert "On meadows (val), in percent:" in path.read_text()


def test_a_card_states_no_results_on_images_of_the_training(
    trees: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the name of the split, without a card, and by the training that the card records."""
    out, path = tmp_path / "out", model / "README.md"
    path.unlink()
    assert main(command(trees, model, out, "folder", "--split", "train", "--json")) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["card"] is None and not path.exists()
    assert any("folder (train) may have images of the training: the card is left" in note for note in document["notes"])
    training = Training("finetune", {"steps": 1}, data="folder", split="val", images=3)
    path.write_text(model_card("flowerer", FaiM2FConfig.from_pretrained(model), training=training))
    before = path.read_bytes()
    assert main(command(trees, model, out)) == 0
    assert "folder (val) may have images of the training" in capsys.readouterr().out
    assert main(["card", str(model), "--evaluation", str(out)]) == 2
    assert "on folder (val), which may have images of the training" in capsys.readouterr().err
    assert path.read_bytes() == before
    # Of other data than that of the training, any split is fine.
    other = replace(training, data="meadows", split="train")
    path.write_text(model_card("flowerer", FaiM2FConfig.from_pretrained(model), training=other))
    assert main(command(trees, model, out, "folder", "--split", "train")) == 0
    assert "On folder (train: images for training), in percent:" in path.read_text()
    path.write_bytes(before)
    names = ("train2017", "trainval", "fold1_train", "val", "constrained")
    assert [is_for_training(name) for name in names] == [True, True, True, False, False]
    same = [("all", "train"), ("val", "all"), ("val", "val"), ("train", "val"), ("val[:9%]", "val")]
    same += [("val", "val[:9%]"), ("trainval", ""), ("train[:9%]", "train[:9%]")]
    held_out = [("val", "train"), ("train[90%:]", "train[:90%]"), ("test", "trainval"), ("test", None)]
    assert [is_on_training(*pair) for pair in (*same, *held_out)] == [True] * 8 + [False] * 4
    # Results of older versions say what they are, and are not the known metric of the model.
    update_card(model, Measured("folder", "folder", "train", 3, 0, {"semantic": {"mIoU": 99.0}}).results())
    assert "On folder (train: images for training), in percent:" in path.read_text()
    assert known_metric(str(model), "semantic", 4) is None
    update_card(model, Measured("folder", "folder", "test", 3, 0, {"semantic": {"mIoU": 66.0}}).results())
    assert "On folder (test), in percent:" in path.read_text()
    metric = known_metric(str(model), "semantic", 4)
    assert metric is not None and (metric.value, metric.dataset) == (66.0, "folder (test)")


def test_a_file_of_annotations_is_a_split_of_its_own(trees: Path, model: Path, tmp_path: Path) -> None:
    """Roboflow calls the files of all splits the same, so their names do not tell one from another."""
    path, out, data = model / "README.md", tmp_path / "out", tmp_path / "data"
    write_tree("coco-instance", data, 3)
    annotations, images = data / "annotations" / "instances_val2017.json", data / "val2017"
    training = Training("finetune", {"steps": 1}, data=annotations.stem, split="all", images=2)
    path.write_text(model_card("flowerer", FaiM2FConfig.from_pretrained(model), training=training))
    before = path.read_text()
    words = ["evaluate", str(model), "--annotations", str(annotations), "--images", str(images)]
    assert main([*words, "--out", str(out)]) == 0
    assert path.read_text() != before and f"On {annotations.stem} (all" in path.read_text()
    path.write_text(before)
    assert main(["card", str(model), "--evaluation", str(out)]) == 0
    assert f"On {annotations.stem} (all" in path.read_text()


@pytest.mark.parametrize("name", ["folder", "coco", "yolo", "ade20k"])
def test_both_commands_give_a_dataset_the_same_id(
    name: str, trees: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`evaluate` adds the results of a format to the card, and `card --evaluation` adds none besides."""
    title = FORMATS[name].title or "meadows"
    opened = open_data("folder", DataSource(str(trees / "folder")), "validation")
    monkeypatch.setattr(evaluate, "open_data", lambda *_: opened)
    monkeypatch.setattr(evaluate.EvaluateSettings, "resolved", lambda self: self)
    out = tmp_path / "out"
    assert main(["evaluate", str(model), "--data", "meadows", "--format", name, "--out", str(out)]) == 0
    before = [(r.dataset_type, r.dataset_name, r.metric_name) for r in results_of(model).values()]
    assert {dataset for _, dataset, _ in before} == {title}
    assert main(["card", str(model), "--evaluation", str(out)]) == 0
    assert [(r.dataset_type, r.dataset_name, r.metric_name) for r in results_of(model).values()] == before


WRONG: list[tuple[list[str], str]] = [
    (["--subtasks", "instance"], "semantic truth, by which semantic segmentation can be measured, but not 'instance'"),
    (["--labels", "a,b,c"], "has 4 classes, but .* 3: the model cannot be evaluated on this data"),
    (["--labels", "square,ground,disc,bar"], "Class 0 is 'ground' in .*: both have the same labels, in another order"),
    (["--labels", "ground,disc,circle,bar"], "'disc' is class 2 of the model, but class 1 of the data: .* --by-ids"),
    (["--labels", "Petal,leaf,stem,root"], "Class 0 is 'ground' in .* and no other class has .* --by-ids"),
    (["--data", "nowhere"], "There is no folder nowhere"),
    (["--out", "{model}"], "is not empty and contains no evaluation.json: choose another out"),
    (["--out", "{model}/config.json/out"], "config.json is not a folder that can be written: choose another place for"),
    (["--limt", "3"], "there is no argument --limt; did you mean --limit"),
    (["--split", "test"], "has no part 'test'; it is divided into train, val: rename one, or pass --split"),
]


@pytest.mark.parametrize(("wrong", "expected"), WRONG, ids=[" ".join(case[0]) for case in WRONG])
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    trees: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: list[str], expected: str
) -> None:
    out = tmp_path / "out"
    before = {path.name: path.stat().st_mtime_ns for path in model.iterdir()}
    try:
        status: Any = main(command(trees, model, out, "folder", *(word.format(model=model) for word in wrong)))
    except SystemExit as stop:
        status = stop.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and len(lines) == 1 and lines[0].startswith("faim2f evaluate: ")
    assert re.search(expected, lines[0]), lines[0]
    assert not out.exists() and before == {path.name: path.stat().st_mtime_ns for path in model.iterdir()}


def test_an_image_size_for_a_model_that_does_not_resize_is_refused(
    trees: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise it would be recorded, and have no effect."""
    copied = shutil.copytree(model, tmp_path / "model")
    FaiM2FImageProcessor.from_pretrained(copied, do_resize=False).save_pretrained(copied)
    assert main(command(trees, copied, tmp_path / "out", "folder", "--image-size", "48")) == 2
    assert f"processor of {copied} does not resize (do_resize): leave --image-size out" in capsys.readouterr().err


def test_an_image_that_is_too_narrow_is_named(
    trees: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trees / "folder", tmp_path / "folder")
    first = min((tmp_path / "folder" / "val" / "images").iterdir())
    Image.new("RGB", (4, 9000)).save(first)
    Image.new("L", (4, 9000)).save(tmp_path / "folder" / "val" / "masks" / f"{first.stem}.png")
    settings = json.loads((model / "preprocessor_config.json").read_text())
    settings["size"] = {"shortest_edge": 64, "longest_edge": 128}
    (model / "preprocessor_config.json").write_text(json.dumps(settings))
    assert main(command(tmp_path, model, tmp_path / "out", "folder", "--predictions")) == 2
    printed = capsys.readouterr().err.splitlines()[-1]
    assert re.search(rf"faim2f evaluate: Image .*{first.name}.*: 9000x4 pixels would be resized to 128x0", printed)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_does_not_lose_the_results(
    trees: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "evaluation.json")

    monkeypatch.setattr(evaluate, "write_whole", fail)
    assert main(command(trees, model, tmp_path / "out", "folder")) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == "faim2f evaluate: evaluation.json: No space left on device."
    assert "semantic (%): mIoU" in captured.out


def test_too_little_memory_is_one_sentence(
    trees: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(Evaluator, "_add", fail)
    assert main(command(trees, model, tmp_path / "out", "folder", "--predictions")) == 2
    printed = capsys.readouterr().err.splitlines()[-1]
    assert "too little free memory for batches of 8 images: pass a smaller --batch-size, or --precision bf16" in printed
    assert not (tmp_path / "out").exists()


def test_a_card_that_cannot_be_read_is_told_before_anything_is_measured(
    trees: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for metadata in ("model-index: 3", "a: [1"):
        (model / "README.md").write_text(f"---\n{metadata}\n---\n\n# Words\n")
        assert main(command(trees, model, tmp_path / "out")) == 2
        error = capsys.readouterr().err
        assert "README.md cannot be updated, its metadata cannot be read" in error and "--no-card" in error
        assert not (tmp_path / "out").exists()
    assert main(command(trees, model, tmp_path / "out", "folder", "--no-card")) == 0


def test_other_names_of_as_many_classes_are_noted(
    trees: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(trees, model, tmp_path / "out", "folder", "--labels", "ground,square,circle,bar")) == 0
    assert "Class 2 is 'disc' in" in (printed := capsys.readouterr().out)
    assert "compared by their ids (names that differ: 1 of 4)" in printed
    assert main(command(trees, model, tmp_path / "out", "folder", "--labels", "Ground,square_,DISC,bar")) == 0
    assert "by their ids" not in capsys.readouterr().out
    config = small_model(id2label={0: "cat", 1: "Cat", 2: "dog"}).config  # unless names differ only in this
    with pytest.raises(ModelError, match="Class 0 is 'cat' in m, but 'Cat' in data: both have the same labels, in ano"):
        check_classes("m", config, Description("data", "semantic", ("Cat", "cat", "dog")))
    assert not check_classes("m", config, Description("data", "semantic", ("cat", "Cat", "dog")))
    for labels in ("petal,leaf,stem,root", "square,ground,disc,bar"):
        assert main(command(trees, model, tmp_path / "out", "folder", "--labels", labels, "--by-ids")) == 0
        assert "Class 0 is 'ground' in" in capsys.readouterr().out
    # Names that say nothing.
    config = json.loads((model / "config.json").read_text())
    config["id2label"] = {str(index): f"LABEL_{index}" for index in range(4)}
    (model / "config.json").write_text(json.dumps(config))
    assert main(command(trees, model, tmp_path / "out", "folder")) == 0
    assert "Class 0 is 'LABEL_0' in" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_measure_what_one_does(trees: Path, model: Path, tmp_path: Path) -> None:
    assert main(command(trees, model, tmp_path / "one", "coco-panoptic")) == 0
    # test_cityscapes.py starts them with `accelerate launch`.
    results = forks.run_together(forks.COMMAND, *command(trees, model, tmp_path / "two", "coco-panoptic"))
    assert [result.returncode for result in results] == [0, 0], results[0].error + results[1].error
    printed = "".join(result.out for result in results)
    assert printed.count("Written: ") == 1 and printed.count("mIoU_mmseg") == 1
    one, two = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two"))
    assert one["images"] == two["images"] == 3
    for subtask, numbers in one["results"].items():
        for name, value in numbers.items():
            if value is None or name == "per_class":
                assert (two["results"][subtask][name] is None) == (value is None)
            else:
                assert two["results"][subtask][name] == pytest.approx(value, rel=1e-6), (subtask, name)

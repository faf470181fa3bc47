"""Cityscapes from the distributed tree to the official figures: recipe, two processes, whole images and windows."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_faim2f.conversion.mask2former import convert_config
from PIL import Image
from transformers import Mask2FormerConfig, ResNetConfig, ResNetForImageClassification

from hf_faim2f import FaiM2FConfig, FaiM2FForUniversalSegmentation, FaiM2FImageProcessor
from hf_faim2f.cli import main
from hf_faim2f.data import load_cityscapes
from hf_faim2f.data.dataset import Description
from hf_faim2f.errors import ModelError
from hf_faim2f.evaluation.evaluator import Evaluator
from hf_faim2f.family.mask2former import mask2former_values
from hf_faim2f.family.presets import CITYSCAPES_CLASSES
from hf_faim2f.model.focoos_post_processing_faim2f import evaluate_semantic
from hf_faim2f.training import Recipe, find_recipe
from hf_faim2f.training.recipe import parameter_groups
from hf_faim2f.training.run import lone_process, split_batch, train
from hf_faim2f.training.start import recipe_at, start_model
from tests.support import forks
from tests.support.cityscapes_tree import official_scores, write_cityscapes
from tests.support.mask2former_models import small_mask2former
from tests.support.reference_models import small_model
from tests.support.train_in_processes import ROOT

NAMES = tuple(CITYSCAPES_CLASSES.values())
HEIGHT, WIDTH = 96, 192
SLIDING = ["--inference", "sliding", "--window"]


@pytest.fixture(scope="module")
def city(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tree`, the dataset; `model`, a small untrained Mask2Former for the 19 classes; `learnt`, a faster
    model, trained briefly."""
    root = tmp_path_factory.mktemp("city")
    write_cityscapes(root / "tree", {"train": 6, "val": 3}, HEIGHT, WIDTH)
    model = small_mask2former(id2label=dict(enumerate(NAMES)), init_std=3.0)
    model.config.postprocessing_type = "semantic"
    model.save_pretrained(root / "model")
    FaiM2FImageProcessor.from_model_config(
        model.config, size={"shortest_edge": HEIGHT, "longest_edge": 4 * HEIGHT}
    ).save_pretrained(root / "model")
    model = small_model(id2label=dict(enumerate(NAMES)), decoder_layers=1)
    processor = FaiM2FImageProcessor.from_model_config(model.config, size={"shortest_edge": HEIGHT // 2})
    recipe = Recipe("short", steps=60, batch_size=3, learning_rate=3e-3, backbone_multiplier=1.0, clip=1.0)
    train(model, processor, load_cityscapes(root / "tree", "train"), None, recipe, root / "run")
    shutil.copytree(root / "run" / "final", root / "learnt")
    return root


def evaluation(city: Path, out: Path, *more: str, model: Path | None = None) -> list[str]:
    return ["evaluate", str(model or city / "model"), "--data", str(city / "tree"), "--format", "cityscapes",
            "--out", str(out), "--no-card", *more]  # fmt: skip


def launched(*arguments: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Runs a command with `accelerate launch` on CPUs, where `--multi_gpu` makes it start several processes, too."""
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes),
         "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
         "-m", "hf_faim2f.cli", *arguments],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip


def assert_official(measured: dict[str, Any], said: dict[str, Any]) -> None:
    """Compares our results with the official ones. `evaluation.json` has null instead of NaN, and percent instead of
    fractions."""

    def same(one: float | None, other: float) -> bool:
        return math.isnan(other) if one is None else one == pytest.approx(100 * other, abs=1e-6)

    for kind, ours in (("Classes", "class"), ("Categories", "category")):
        assert same(measured[f"IoU_{ours}"], said[f"averageScore{kind}"])
        assert same(measured[f"iIoU_{ours}"], said[f"averageScoreInst{kind}"])
    for kind, key in (("per_class", "classScores"), ("per_category", "categoryScores")):
        for name, row in measured[kind].items():
            assert same(row["IoU"], said[key][name]), name
            weighted = said[key.replace("Scores", "InstScores")].get(name, math.nan)
            assert same(row["iIoU"], weighted), name
    assert len(measured["per_class"]) == 19 and len(measured["per_category"]) == 7


@pytest.mark.large
@pytest.mark.slow
def test_two_processes_train_go_on_and_measure(city: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trains with two processes, continues with more steps in one, then compares evaluations by two and by one."""
    run = tmp_path / "run"
    command = ["train", "--model", str(city / "model"), "--data", str(city / "tree"), "--format", "cityscapes",
               "--recipe", "cityscapes", "--batch-size", "4", "--image-size", str(HEIGHT), "--samples", "1",
               "--no-tensorboard", "--save-every", "1", "--log-every", "1", "--out", str(run)]  # fmt: skip
    # test_train.py starts them with torchrun.
    first = forks.run_together(forks.COMMAND, *command, "--steps", "2", "--eval-limit", "2")
    printed, told = "".join(process.out for process in first), "".join(process.error for process in first)
    assert [process.returncode for process in first] == [0, 0], told
    assert "Recipe cityscapes: 2 steps of 4 images (2 x 2), fp32 on " in printed
    assert "Training on 6 images of Cityscapes (train) (train)" in printed
    assert told.count("Each process has batch norm statistics of its own") == 1
    assert printed.count("The trained model is in") == 1
    capsys.readouterr()
    assert main([*command, "--steps", "3", "--eval-limit", "3"]) == 0
    second = capsys.readouterr().out
    assert "it continues after step 2." in second and "3 steps of 4 images (1 x 4), fp32 on " in second
    log = json.loads((run / "log.json").read_text())
    assert [entry["step"] for entry in log["log"] if "loss" in entry] == [1, 2, 3]
    assert all(math.isfinite(entry["loss"]) for entry in log["log"] if "loss" in entry)
    crop = next(step for step in log["recipe"]["augmentations"] if step["name"] == "RandomCrop")
    assert (crop["height"], crop["width"]) == (HEIGHT // 2, WIDTH // 2)  # for images of 1024x2048, crops are 512x1024
    processor = FaiM2FImageProcessor.from_pretrained(run / "final")
    assert dict(processor.size)["shortest_edge"] == HEIGHT

    windows = ["--inference", "sliding", "--window", "48x96", "--stride", "32x64", "--predictions"]
    two = launched(*evaluation(city, tmp_path / "two", *windows, model=run / "final"))
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("nIoU") == 2 and two.stdout.count("Written: ") == 1
    assert main(evaluation(city, tmp_path / "one", *windows, model=run / "final")) == 0
    results = [json.loads((tmp_path / name / "evaluation.json").read_text())["results"] for name in ("one", "two")]
    assert results[0] == results[1] and set(results[0]) == {"semantic", "cityscapes"}
    maps = [sorted((tmp_path / name / "predictions" / "semantic").iterdir()) for name in ("one", "two")]
    assert len(maps[0]) == 3 and [p.name for p in maps[0]] == [p.name for p in maps[1]]
    assert all(one.read_bytes() == other.read_bytes() for one, other in zip(*maps, strict=True))


def test_the_figures_are_those_of_cityscapesscripts(
    city: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Evaluation is at the ground truth's size, whatever the network's input: here whole images at twice that size,
    then windows."""
    out = tmp_path / "whole"
    model = city / "learnt"
    assert main(evaluation(city, out, "--predictions", "--image-size", str(2 * HEIGHT), model=model)) == 0
    printed = capsys.readouterr().out
    document = json.loads((out / "evaluation.json").read_text())
    whole = document["results"]["cityscapes"]
    assert document["inference"] == "whole" and document["image_size"]["shortest_edge"] == 2 * HEIGHT
    for path in (out / "predictions" / "semantic").iterdir():
        with Image.open(path) as picture:
            assert picture.size == (WIDTH, HEIGHT) and set(np.unique(np.asarray(picture))) <= set(CITYSCAPES_CLASSES)
    assert_official(whole, official_scores(city / "tree", out / "predictions" / "semantic", tmp_path / "official")[0])
    semantic = document["results"]["semantic"]["per_class"]
    for name in ("road", "building", "sky", "person", "car"):
        assert whole["per_class"][name]["IoU"] == pytest.approx(semantic[name]["IoU"], abs=1e-6) != 0, name
    # Printed in the layout of cityscapesscripts, and in the table.
    assert re.search(rf"^road +{whole['per_class']['road']['IoU']:.2f} +–$", printed, re.MULTILINE)
    assert re.search(rf"^car +{whole['per_class']['car']['IoU']:.2f} +{whole['per_class']['car']['iIoU']:.2f}$",
                     printed, re.MULTILINE)  # fmt: skip
    assert re.search(r"^categories +IoU +nIoU$", printed, re.MULTILINE)
    assert re.search(rf"^vehicle +{whole['per_category']['vehicle']['IoU']:.2f} ", printed, re.MULTILINE)
    table = (out / "per_class.md").read_text()
    assert "| category | cityscapes IoU | cityscapes iIoU |" in table and "| cityscapes iIoU_class |" in table

    again = tmp_path / "windows"
    more = ["--inference", "sliding", "--window", "64x64", "--predictions"]
    assert main(evaluation(city, again, *more, model=model)) == 0
    document = json.loads((again / "evaluation.json").read_text())
    assert document["inference"] == {"window": [64, 64], "stride": [42, 42]}
    said, _ = official_scores(city / "tree", again / "predictions" / "semantic", tmp_path / "official-windows")
    assert_official(document["results"]["cityscapes"], said)

    def figure(name: str, *arguments: str) -> float:
        assert main(evaluation(city, tmp_path / name, *arguments, model=model)) == 0
        return json.loads((tmp_path / name / "evaluation.json").read_text())["results"]["cityscapes"]["IoU_class"]

    at_once = figure("plain")
    assert figure("one-window", *SLIDING, "512x1024") == pytest.approx(at_once, abs=0.05)
    assert document["results"]["cityscapes"]["IoU_class"] != pytest.approx(at_once, abs=0.05)


def test_panoptic_truth_has_cityscapes_figures_too(city: Path, tmp_path: Path) -> None:
    assert main(evaluation(city, tmp_path / "out", "--task", "panoptic", "--limit", "1")) == 0
    results = json.loads((tmp_path / "out" / "evaluation.json").read_text())["results"]
    assert set(results) == {"semantic", "instance", "panoptic", "cityscapes"}


def test_without_instances_the_measure_is_left_out_and_said(
    city: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(city / "tree", tmp_path / "tree")
    next((tmp_path / "tree" / "gtFine" / "val").glob("munster/*_instanceIds.png")).unlink()
    shutil.copytree(city / "model", tmp_path / "model")
    assert main(evaluation(tmp_path, tmp_path / "out")) == 0
    assert "munster_000001_000019 has no *_gtFine_labelIds.png with" in capsys.readouterr().out
    assert set(json.loads((tmp_path / "out" / "evaluation.json").read_text())["results"]) == {"semantic"}


WRONG = [
    (["--window", "64x64"], "window is for --inference sliding"),
    (["--inference", "sliding"], "--inference sliding needs --window"),
    ([*SLIDING, "64"], "--window must be HEIGHTxWIDTH in pixels, such as 512x1024, not '64'"),
    ([*SLIDING, "16x64"], "--window must have at least 32 pixels a side, not 16x64"),
    ([*SLIDING, "64x64", "--stride", "65x8"], "so that no pixel is left out, not 65x8"),
    ([*SLIDING, "64x64", "--task", "panoptic"], "no instance segments, which could span se"),
    (["--inference", "slide"], "must be one of whole, sliding, not 'slide'. Did you mean 'sliding'"),
    (["--task", "instance"], "has 19 classes, but Cityscapes (val) 8"),
    (["--task", "instance", "--predictions"], "has 19 classes, but Cityscapes (val) 8"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "expected"), WRONG, ids=[" ".join(case[0]) for case in WRONG])
def test_mistakes_are_one_sentence(
    city: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: list[str], expected: str
) -> None:
    assert main(evaluation(city, tmp_path / "out", *wrong)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("faim2f evaluate: ") and expected in lines[0], lines
    assert not (tmp_path / "out").exists()


def test_predictions_of_an_evaluation_that_stops_are_gone(
    city: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(city / "tree", tmp_path / "tree")
    shutil.copytree(city / "model", tmp_path / "model")
    photo = next((tmp_path / "tree" / "leftImg8bit" / "val" / "munster").iterdir())
    photo.write_bytes(photo.read_bytes()[:200])
    assert main(evaluation(tmp_path, tmp_path / "out", "--predictions")) == 2
    assert photo.name in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_padding_is_no_part_of_what_is_measured(city: Path) -> None:
    """With a processor that pads: the network does not see the padding, and masks are not stretched over it."""
    model = small_model(id2label=dict(enumerate(NAMES)), init_std=3.0)
    processor = FaiM2FImageProcessor.from_model_config(
        model.config, size={"shortest_edge": 72}, pad_size={"height": 96, "width": 160}
    )
    items = load_cityscapes(city / "tree").select([0])
    found: list[torch.Tensor] = []
    evaluator = Evaluator(processor, dict(enumerate(NAMES)), watch=lambda _, item, prediction: found.append(prediction))
    evaluator(model, items)
    inputs = processor([items[0]["image"]], input_data_format="channels_first", return_tensors="pt")
    assert inputs["pixel_values"].shape[-2:] == (96, 160)  # 72x144, padded
    with torch.no_grad():
        alone = model(inputs["pixel_values"][..., :72, :144])
        padded = model(inputs["pixel_values"])
    target = [(HEIGHT, WIDTH)]
    expected = evaluate_semantic(alone.class_queries_logits, alone.masks_queries_logits, (72, 144), target)[0]
    stretched = evaluate_semantic(padded.class_queries_logits, padded.masks_queries_logits, (96, 160), target)[0]
    assert torch.equal(found[0], expected) and not torch.equal(found[0], stretched)


def test_the_architecture_is_the_published_one() -> None:
    """The configuration equals that of a converted published model; the model has its 44 million parameters."""
    backbone = ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
    theirs = Mask2FormerConfig(backbone_config=backbone.to_dict(), id2label=dict(enumerate(NAMES)))
    expected = convert_config(theirs, "semantic").to_dict()
    own = FaiM2FConfig(**mask2former_values("mask2former-r50"), id2label=dict(enumerate(NAMES))).to_dict()
    differing = {key for key in expected if expected[key] != own[key]}
    assert differing <= {"use_mask_score", "predict_all_pixels", "backbone_config"}  # the first two depend on the data
    for key in ("depths", "hidden_sizes", "embedding_size", "layer_type", "downsample_in_bottleneck", "out_features"):
        assert expected["backbone_config"][key] == own["backbone_config"][key]
    with torch.device("meta"):
        model = FaiM2FForUniversalSegmentation(FaiM2FConfig(**mask2former_values("mask2former-r50"), num_labels=19))
    assert 43.9e6 < sum(parameter.numel() for parameter in model.parameters()) < 44.1e6


def test_the_recipe_is_the_published_one() -> None:
    """All numbers of configs/cityscapes/semantic-segmentation in Mask2Former's repository."""
    recipe = find_recipe("cityscapes")
    assert (recipe.steps, recipe.batch_size, recipe.learning_rate, recipe.weight_decay) == (90_000, 16, 1e-4, 0.05)
    assert (recipe.backbone_multiplier, recipe.clip, recipe.warmup_steps, recipe.schedule) == (0.1, 0.01, 0, "poly")
    assert recipe.rate(45_000) == pytest.approx(0.5**0.9) and recipe.sync_norm and recipe.evaluation_size == 1024
    resize, crop, color, flip = recipe.augmentations
    assert resize.edges == tuple(int(x * 0.1 * 1024) for x in range(5, 21)) and resize.longest_edge == 4096
    assert (crop.height, crop.width, crop.single_category_max_area) == (512, 1024, 1.0)
    assert type(color).__name__ == "SSDColorJitter" and flip.probability == 0.5


def test_synchronized_norms_are_not_decayed() -> None:
    model = small_model()
    plain = [(len(group["params"]), group["lr"]) for group in parameter_groups(model, find_recipe("cityscapes"))]
    model.backbone = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model.backbone)
    synchronized = parameter_groups(model, find_recipe("cityscapes"))
    assert [(len(group["params"]), group["lr"]) for group in synchronized] == plain


def test_sizes_of_the_recipe() -> None:
    """`image_size` is the size of whole images; crops scale with it, unless given."""
    recipe = find_recipe("cityscapes")
    half = recipe_at(recipe, 512)
    crops = {(step.height, step.width) for step in half.augmentations if hasattr(step, "height")}
    assert crops == {(256, 512)} and half.evaluation_size == 512
    assert half.augmentations[0].edges[0] == 256 and half.augmentations[0].longest_edge == 2048
    told = recipe_at(recipe, None, (384, 768))
    assert (told.augmentations[1].height, told.augmentations[1].width) == (384, 768)
    assert told.augmentations[0] == recipe.augmentations[0] and told.evaluation_size == 1024
    small = recipe_at(find_recipe("finetune"), 320)
    assert {step.height for step in small.augmentations if hasattr(step, "height")} == {320}


def test_the_batch_is_that_of_all_processes(
    city: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = find_recipe("cityscapes")
    for processes, at_once, expected in ((1, None, (16, 1)), (2, None, (8, 1)), (2, 2, (2, 4)), (16, None, (1, 1))):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        assert split_batch(recipe, at_once) == expected
    monkeypatch.setenv("WORLD_SIZE", "3")
    command = ["train", "--model", str(city / "model"), "--data", str(city / "tree"), "--format", "cityscapes",
               "--recipe", "cityscapes", "--out", str(tmp_path / "out")]  # fmt: skip
    assert main(command) == 2
    assert capsys.readouterr().err == (
        "faim2f train: The recipe's batch of 16 is not a multiple of 5 images in 3 processes: choose another number of "
        "processes, batch_size or per_device_batch_size.\n"
    )
    monkeypatch.delenv("WORLD_SIZE")
    assert main([*command, "--crop", "64by64"]) == 2
    assert "--crop must be HEIGHTxWIDTH" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_launcher_that_starts_one_process_of_several_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    assert lone_process() is None
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert lone_process() is None
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert "one process instead of several" in str(lone_process())
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert lone_process() is None


def test_a_new_mask2former_on_a_trained_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A classifier of transformers, like microsoft/resnet-50, but with fewer and narrower layers."""
    from hf_faim2f.training import start as module

    small = {**mask2former_values("mask2former-r50")["backbone_config"], "embedding_size": 16,
             "hidden_sizes": [16, 24, 32, 48], "depths": [1, 2, 1, 1], "layer_type": "basic"}  # fmt: skip
    monkeypatch.setitem(module.MASK2FORMER, "mask2former-r50", small)
    config = ResNetConfig.from_dict({**small, "num_labels": 7})
    config.out_features = None
    classifier = ResNetForImageClassification(config).eval()
    with torch.no_grad():
        for buffer in classifier.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
    classifier.save_pretrained(tmp_path / "resnet")
    description = Description("streets", "panoptic", NAMES, frozenset(range(11, 19)))
    start = start_model("mask2former-r50", description, backbone=str(tmp_path / "resnet"), image_size=64)
    assert not start.new_backbone and f"on the backbone of {tmp_path / 'resnet'}" in start.notes[0]
    assert start.model.config.pixel_decoder_type == "deformable" and start.model.config.decoder_layers == 9
    assert start.model.config.label_ids_to_fuse == start.processor.label_ids_to_fuse == list(range(11))
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = classifier(pixels, output_hidden_states=True).hidden_states
        maps = start.model.eval().backbone(pixels).feature_maps
    assert all(torch.equal(one, other) for one, other in zip(maps, expected[-4:], strict=True))

    def refused(**changes: Any) -> str:
        broken = tmp_path / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(tmp_path / "resnet", broken)
        content = json.loads((broken / "config.json").read_text())
        (broken / "config.json").write_text(json.dumps({**content, **changes}))
        with pytest.raises(ModelError) as error:
            start_model("mask2former-r50", description, backbone=str(broken))
        return str(error.value)

    assert "is of type 'detr', but the backbone of mask2former-r50 is of type 'resnet'" in refused(model_type="detr")
    assert "does not fit mask2former-r50: its depths is [2, 2, 1, 1], not [1, 2, 1, 1]" in refused(depths=[2, 2, 1, 1])
    monkeypatch.setitem(module.MASK2FORMER, "mask2former-r50", {**small, "hidden_sizes": [16, 24, 32, 64]})
    assert "weights are missing or of another shape, the first" in refused()
    (tmp_path / "resnet" / "model.safetensors").rename(tmp_path / "resnet" / "pytorch_model.bin")
    assert "The weights of" in refused() and "cannot be loaded" in refused()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="is not a model folder: it has no config.json"):
        start_model("mask2former-r50", description, backbone=str(tmp_path / "empty"))

"""`faim2f train` from the command line, on generated datasets."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from hf_faim2f import FaiM2FForUniversalSegmentation, FaiM2FImageProcessor, load_config
from hf_faim2f.cli import main
from hf_faim2f.cli.settings import read_settings_file
from hf_faim2f.cli.train_setup import TrainSettings
from hf_faim2f.data.dataset import Description
from hf_faim2f.errors import ModelError, SettingsError
from hf_faim2f.training import run
from hf_faim2f.training.start import start_model
from hf_faim2f.zoo import open_model
from tests.support.reference_models import small_model
from tests.support.shapes import LABELS, write_folder, write_tree
from tests.support.train_in_processes import ROOT

QUICK = ["--batch-size", "2", "--image-size", "64", "--samples", "1", "--eval-limit", "1", "--no-tensorboard"]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A folder with six images per split, and a small model with its classes."""
    root = tmp_path_factory.mktemp("train")
    data = write_tree("folder", root / "data", 6)
    model = small_model(id2label=dict(enumerate(LABELS)), decoder_layers=1)
    model.save_pretrained(root / "model")
    FaiM2FImageProcessor.from_model_config(model.config, size={"shortest_edge": 64}).save_pretrained(root / "model")
    return {"data": str(data), "model": str(root / "model")}


def arguments(places: dict[str, str], out: Path, *more: str) -> list[str]:
    return ["train", "--model", places["model"], "--data", places["data"], "--format", "folder", "--out", str(out),
            *QUICK, *more]  # fmt: skip


def history(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "log.json").read_text())["log"]


def test_a_run_by_a_file_and_flags_leaves_everything(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Losses, learning rate and metrics are on the console, in TensorBoard's file, in the log and in the plot."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, config = tmp_path / "out", tmp_path / "run.yaml"
    settings = {**places, "format": "folder", "out": str(out), "steps": 99, "batch-size": 4, "image_size": 64,
                "per_device_batch_size": 2, "evaluate_every": 1, "log-every": 1, "eval_limit": 3, "samples": 2,
                "subtasks": ["semantic"], "learning_rate": 1e-3}  # fmt: skip
    config.write_text(yaml.safe_dump(settings))
    assert main(["train", "--config", str(config), "--steps", "2"]) == 0
    printed = capsys.readouterr().out
    assert "6 images of" in printed and "evaluating semantic results on 3 (val)" in printed
    assert "2 steps of 4 images (1 x 2, accumulated 2 times), fp32" in printed
    log = history(out)
    lines = printed.splitlines()
    heading = next(index for index, line in enumerate(lines) if line.split()[:1] == ["step"])
    assert lines[heading].split() == ["step", "loss", "class", "mask", "dice", "gradient", "rate"]
    rows = [line.split() for line in lines[heading + 1 :] if len(line.split()) == 7]
    keys = ("step", "loss", "loss_ce", "loss_mask", "loss_dice", "grad_norm", "learning_rate")
    logged = [[entry[key] for key in keys] for entry in log if "loss" in entry]
    assert [[float(cell) for cell in row] for row in rows] == [pytest.approx(entry, rel=0.05) for entry in logged]
    assert "{'" not in printed
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2]
    measured = [entry for entry in log if "eval_semantic_mIoU" in entry]
    assert [entry["step"] for entry in measured] == [1, 2]
    for entry in measured:
        figure = f"semantic (%): mIoU {entry['eval_semantic_mIoU']:.2f},"
        assert any(line.split(maxsplit=1)[0] == str(entry["step"]) and figure in line for line in lines), figure
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    curve = [(event.step, event.value) for event in events.Scalars("eval/semantic_mIoU")]
    assert curve == [(entry["step"], pytest.approx(entry["eval_semantic_mIoU"], rel=1e-5)) for entry in measured]
    assert {"train/loss", "train/loss_ce", "train/loss_mask", "train/learning_rate"} <= set(events.Tags()["scalars"])

    assert Image.open(out / "curve.png").format == "PNG"
    for step in (1, 2):
        with Image.open(out / "samples" / f"step-{step}.png") as sheet:
            assert sheet.width == 3 * 320 + 2 * 4 and sheet.height > 2 * 320  # three panels side by side, two rows
    model, processor = open_model(out / "final")
    assert model.config.id2label == dict(enumerate(LABELS)) and dict(processor.size)["shortest_edge"] == 64
    assert (out / "final" / "modeling_faim2f.py").exists() and not list(out.glob(".*"))
    kept = yaml.safe_load((out / "run.yaml").read_text())
    assert kept["steps"] == 2 and kept["batch_size"] == 4 and kept["subtasks"] == ["semantic"]


def test_the_same_command_goes_on_and_another_is_refused(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = arguments(places, out, "--save-every", "1", "--log-every", "1")
    assert main([*command, "--steps", "2"]) == 0
    first = history(out)
    assert "continues" not in capsys.readouterr().out
    assert main([*command, "--steps", "3"]) == 0
    assert "has a run with these settings: it continues after step 2." in capsys.readouterr().out
    log = history(out)
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3]
    assert [entry["loss"] for entry in log if "loss" in entry][:2] == [e["loss"] for e in first if "loss" in e]
    before = {path: path.stat().st_mtime_ns for path in out.glob("checkpoint-*/*")}
    assert main([*command, "--steps", "3"]) == 0
    assert "all 3 steps are done" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("checkpoint-*/*")}
    assert [entry["step"] for entry in history(out) if "loss" in entry] == [1, 2, 3]
    assert main([*command, "--seed", "5"]) == 2
    assert "has a run with the default seed, not with seed 5: choose another out" in capsys.readouterr().err


@pytest.mark.newest_only
def test_broken_images_are_named_or_skipped(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(places["data"], data)
    (data / "train" / "images" / "003.png").write_bytes(b"no image")
    (data / "train" / "masks" / "004.png").unlink()
    (data / "val" / "masks" / "001.png").write_bytes((data / "val" / "masks" / "001.png").read_bytes()[:40])
    command = arguments({**places, "data": str(data)}, out, "--steps", "4", "--eval-limit", "3", "--workers", "1")
    assert main(command) == 2
    assert "004.png has no mask" in capsys.readouterr().err and not out.exists()
    shutil.copy(data / "train" / "masks" / "003.png", data / "train" / "masks" / "004.png")
    # The broken image fails during the run, whose incomplete output is then removed.
    assert main(command) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("faim2f train: ") and "003.png" in error and "Traceback" not in error
    assert not out.exists()
    (data / "train" / "masks" / "004.png").unlink()
    assert main([*command, "--skip-bad"]) == 0
    printed = capsys.readouterr().out
    assert "3 images were left out:" in printed and "results on 2 (val)" in printed
    skipped = (out / "skipped.txt").read_text().splitlines()
    assert [name for name in ("train/images/003.png", "train/images/004.png", "val/masks/001.png")
            if any(name in line for line in skipped)] and len(skipped) == 3  # fmt: skip
    assert all(line in printed for line in skipped)


@pytest.mark.parametrize("recipe", ["finetune", "digits"])
def test_an_image_that_is_too_narrow_is_named(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: str
) -> None:
    """It fails in an augmentation, or in the image processor."""
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(places["data"], data)
    for folder, mode in (("images", "RGB"), ("masks", "L")):
        Image.new(mode, (4, 9000)).save(data / "train" / folder / "004.png")
    command = arguments({**places, "data": str(data)}, out, "--recipe", recipe, "--batch-size", "6", "--steps", "1")
    assert main(command) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"faim2f train: Image .*004.png.*: 9000x4 pixels would be resized to \d+x0", error), error
    assert not out.exists()


WRONG = [
    (["--format", "foldr"], "No format is called 'foldr'. Known: ade20k, .* Did you mean 'folder'"),
    (["--format", "cityscapes"], "There is no folder .*leftImg8bit"),
    (["--recipe", "finetun"], "--recipe must be one of .*, not 'finetun'. Did you mean 'finetune'"),
    (["--data", "nowhere"], "There is no folder nowhere"),
    (["--data", "{empty}"], "empty does not say what its classes are called: write labels.txt there"),
    (["--model", "{empty}"], "is not a model folder: it has no config.json"),
    (["--model", "no/such-model"], "no/such-model is not a folder here, and loading its configuration from the Hub f"),
    (["--labels", "a,b,c"], "has 4 classes, but .* 3: choose other data, or train with new labels"),
    (["--labels", "a,b,c,d"], "Class 0 is 'ground' in .*, but 'a' in"),
    (["--subtasks", "semantic,panoptik"], "must be one of semantic, instance, panoptic, not 'panoptik'"),
    (["--subtasks", "panoptic"], "semantic truth, by which semantic segmentation can be measured, but not 'panoptic'"),
    (["--task", "panoptic"], "format folder is for semantic or instance, not for panoptic"),
    (["--per-device-batch-size", "3"], "batch of 2 is not a multiple of 3 images in 1 processes"),
    (["--steps", "0"], "--steps must be at least 1, not '0'"),
    (["--steps", "many"], "--steps must be a whole number, not 'many'"),
    (["--stesp", "4"], "there is no argument --stesp; did you mean --steps"),
    (["--out", "{full}"], "is not empty and does not contain a run .run.yaml.: choose another out"),
    (["--out", "{full}/thing.txt"], "is a file: choose another out"),
    (["--precision", "fp16"], "precision fp16 needs a GPU"),
    (["--backbone", "somewhere"], "has a trained backbone: backbone is for new models"),
    (["--config", "nowhere.yaml"], "nowhere.yaml cannot be read: No such file"),
]


@pytest.mark.parametrize(("wrong", "expected"), WRONG, ids=[" ".join(case[0]) for case in WRONG])
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: list[str], expected: str
) -> None:
    empty, full, out = tmp_path / "empty", tmp_path / "full", tmp_path / "out"
    empty.mkdir()
    full.mkdir()
    (full / "thing.txt").write_text("mine")
    if wrong == ["--precision", "fp16"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    try:
        status: Any = main(arguments(places, out, *(word.format(empty=empty, full=full) for word in wrong)))
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert status == 2
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("faim2f train: "), captured.err
    assert re.search(expected, lines[0]), lines[0]
    assert not out.exists() and [path.name for path in full.iterdir()] == ["thing.txt"] and not list(empty.iterdir())


def test_what_is_missing_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--model", "digits", "--out", "x"]) == 2
    assert capsys.readouterr().err.strip() == (
        "faim2f train: format is missing: pass --format, or write `format: ...` into the file of --config."
    )


def test_a_license_that_cannot_be_one_is_refused_first(capsys: pytest.CaptureFixture[str]) -> None:
    own = "write `license: other` and `license_name: NAME` into the metadata of the model's card."
    for license, told in (
        ("of my own", f"--license 'of my own' is not a license id of the Hub: pass one such as apache-2.0, or {own}"),
        ("other", f"--license other does not say which license: leave it out, and {own}"),
    ):
        assert main(["train", "--model", "no-such-model", "--out", "x", "--license", license]) == 2
        assert capsys.readouterr().err.strip() == f"faim2f train: {told}"


FILES = [
    ("steps: 3\nbatchsize: 4\n", "has the key 'batchsize', which is not a setting; did you mean `batch_size`?"),
    ("3: 4\n", "has the key 3, which is not a setting"),
    ("batch_size: 4\nbatch-size: 4\n", "has batch_size twice"),
    ("steps: 4\nseed: 1\nsteps: 5\n", "has 'steps' twice"),
    ("steps: 1.5\n", "steps must be a whole number, not 1.5"),
    ("skip_bad: perhaps\n", "skip_bad must be true or false, not 'perhaps'"),
    ("steps: [1, 2]\n", "steps must be a whole number, not a list"),
    ("learning_rate: .nan\n", "learning_rate must be a number, not nan"),
    ("- a\n", "must have one `name: value` per line, but is a list"),
    ("steps: [\n", "is not YAML \\(line 2\\)"),
    ("model: !!python/object/apply:os.getcwd []\n", "is not YAML \\(line 1\\): could not determine a constructor"),
    ("# " + "x" * (1 << 20) + "\n", "has more than 1048576 bytes"),
    ("a: &a [x]\nb: &b [*a, *a]\nsteps: [*b, *b]\n", "has the key 'a'"),
]


@pytest.mark.parametrize(("content", "expected"), FILES, ids=range(len(FILES)))
def test_files_of_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, expected: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    assert main(["train", "--config", str(path)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and str(path) in lines[0] and re.search(expected, lines[0]), lines


def test_words_of_a_file_stay_as_written(tmp_path: Path) -> None:
    """YAML itself reads the class names as [False, True, 8, 1.0], and the class weights' names, too."""
    path = tmp_path / "run.yaml"
    path.write_text(
        "labels: [no, yes, 010, 1.0, 'a b']\nclass_weights: {no: 2, 010: .5}\nout: 2026-11-29\nsteps: 0x10\n"
    )
    settings = read_settings_file(TrainSettings, path)
    assert settings == {
        "labels": ("no", "yes", "010", "1.0", "a b"), "class_weights": ("no: 2", "010: .5"), "out": "2026-11-29",
        "steps": 16,
    }  # fmt: skip
    path.write_text("labels: [no, null]\n")
    with pytest.raises(SettingsError, match="labels must be a list of words, not a list"):
        read_settings_file(TrainSettings, path)


def test_a_missing_package_is_named(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert main(arguments(places, tmp_path / "out", "--tensorboard")) == 2
    error = capsys.readouterr().err
    assert "tensorboard" in error and "install hf-faim2f[train]" in error and not (tmp_path / "out").exists()


def test_without_the_libraries_of_training_the_command_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.startswith("hf_faim2f.cli")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert main(["train"]) == 2
    error = capsys.readouterr().err
    assert "faim2f train needs accelerate" in error and "install hf-faim2f[train]" in error


def test_a_trained_model_gets_new_labels(
    places: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The data has fewer labels than the model; matching weights are kept, and one line lists the others, without
    transformers' own table."""
    data, out = tmp_path / "flowers", tmp_path / "out"
    write_folder(data, 4)
    for mask in (data / "masks").iterdir():
        with Image.open(mask) as image:
            image.point(lambda value: min(value, 1)).save(mask)
    (data / "labels.txt").write_text("meadow\nflower\n")
    command = arguments({**places, "data": str(data)}, out, "--steps", "1", "--new-labels", "--learning-rate", "0")
    assert main(command) == 0
    printed = capfd.readouterr()
    assert (
        f"{places['model']} gets the 2 labels of {data}; new and random: transformer_decoder.class_predictor.bias, "
        "transformer_decoder.class_predictor.weight.\n" in printed.out
    )
    assert "MISMATCH" not in printed.out + printed.err and "ckpt" not in printed.out + printed.err
    assert "newly initialized" not in printed.out + printed.err
    model, _ = open_model(out / "final")
    assert model.config.id2label == {0: "meadow", 1: "flower"}
    old = FaiM2FForUniversalSegmentation.from_pretrained(places["model"]).state_dict()
    new = model.state_dict()
    assert {name for name in new if new[name].shape != old[name].shape} == {
        "transformer_decoder.class_predictor.weight", "transformer_decoder.class_predictor.bias"
    }  # fmt: skip
    queries = next(name for name in new if "quer" in name and name.endswith("weight"))
    assert torch.allclose(new[queries], old[queries])


@pytest.mark.parametrize("queries", [4, 10, 17])
def test_a_relabelled_model_keeps_the_queries_that_it_has_learned(places: dict[str, str], queries: int) -> None:
    """Fewer queries: the first ones are kept. More: the additional ones are initialized like in a new model, and return
    outputs."""
    old = open_model(places["model"])[0]
    description = Description("cars", "instance", ("road", "car"), frozenset({1}))
    start = start_model(places["model"], description, new_labels=True, queries=queries)
    model, learned = start.model, old.config.num_queries
    assert learned == 10 and model.config.num_queries == queries
    kept = min(queries, learned)
    for name in ("query_features", "query_position"):
        old_rows = old.get_parameter(f"transformer_decoder.{name}.weight")
        rows = model.get_parameter(f"transformer_decoder.{name}.weight")
        assert rows.shape == (queries, old_rows.shape[1]) and rows.requires_grad
        assert torch.equal(rows[:kept], old_rows[:kept])
        new = rows[kept:]
        assert len(new) == 0 or 0.5 < float(new.detach().std()) / model.config.init_std < 1.5
    changed = {"transformer_decoder.class_predictor.weight", "transformer_decoder.class_predictor.bias"}
    for name, tensor in model.state_dict().items():
        if name not in changed and "query_" not in name:
            assert torch.equal(tensor, old.state_dict()[name]), name
    answer = model(torch.zeros(1, 3, 64, 64))
    assert answer.class_queries_logits.shape == (1, queries, 3) and answer.masks_queries_logits.shape[1] == queries
    ends = {
        4: "; 4 of the 10 learned queries are kept.",
        10: "transformer_decoder.class_predictor.weight.",
        17: "; of 17 queries 10 are the learned ones, and 7 are new.",
    }
    assert start.notes[0].endswith(ends[queries])


@pytest.mark.parametrize("name", ["digits", "fai-m2f-s-ade", "bisenetformer-s-ade", "mask2former-r50"])
def test_a_new_model_has_as_many_queries_as_it_is_told(name: str) -> None:
    description = Description("cars", "semantic", ("road", "car"))
    with torch.device("meta"):
        model = start_model(name, description, queries=7, from_scratch=True).model
    assert model.config.num_queries == 7
    assert model.get_parameter("transformer_decoder.query_features.weight").shape[0] == 7


def test_queries_go_with_new_labels_and_into_the_final_folder(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(places, tmp_path / "out", "--queries", "12")) == 2
    assert "set their number only for a new model or together with new labels" in capsys.readouterr().err
    assert main(arguments(places, tmp_path / "out", "--queries", "0", "--new-labels")) == 2
    assert main(arguments(places, tmp_path / "out", "--queries", "12", "--new-labels", "--steps", "1")) == 0
    assert open_model(tmp_path / "out" / "final")[0].config.num_queries == 12


def test_new_models_have_the_labels_and_the_post_processing_of_the_data(tmp_path: Path) -> None:
    panoptic = Description("streets", "panoptic", ("road", "car"), frozenset({1}))
    start = start_model("digits", panoptic, image_size=96)
    assert start.model.config.id2label == {0: "road", 1: "car"} and start.model.config.label2id["car"] == 1
    assert start.model.config.postprocessing_type == "panoptic" and dict(start.processor.size)["shortest_edge"] == 96
    assert start.processor.label_ids_to_fuse == [0]
    assert start.model(torch.zeros(1, 3, 64, 64)).class_queries_logits.shape[-1] == 3
    instance = Description("cars", "instance", ("car",), frozenset({0}))
    start = start_model("fai-m2f-s-ade", instance, from_scratch=True)
    assert start.model.config.num_labels == 1 and start.model.config.use_mask_score
    assert start.model.config.backbone_config.depths == load_config("fai-m2f-s-ade").backbone_config.depths
    assert dict(start.processor.size)["shortest_edge"] == 640
    assert "its weights are random" in start.notes[0]


def test_a_new_model_on_a_trained_backbone(tmp_path: Path, places: dict[str, str]) -> None:
    description = Description("cars", "semantic", ("road", "car"))
    start_model("digits", description).model.save_pretrained(tmp_path / "trained")
    FaiM2FImageProcessor().save_pretrained(tmp_path / "trained")
    trained, _ = open_model(tmp_path / "trained")
    start = start_model("digits", description, backbone=str(tmp_path / "trained"))
    for name, tensor in start.model.backbone.state_dict().items():
        assert torch.equal(tensor, trained.backbone.state_dict()[name]), name
    with pytest.raises(ModelError, match="backbone of .* does not fit digits"):
        start_model("digits", description, backbone=places["model"])


def test_models_that_cannot_be_loaded(tmp_path: Path, places: dict[str, str]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "detr"}')
    with pytest.raises(ModelError, match="is a model of type 'detr', not 'faim2f'"):
        open_model(other)
    (other / "config.json").write_text("{")
    with pytest.raises(ModelError, match="The configuration of .*other cannot be loaded: "):
        open_model(other)
    broken = tmp_path / "broken"
    shutil.copytree(places["model"], broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "num_queries": 11}))
    with pytest.raises(ModelError, match="are not those of its config.json: .* of another shape, the first "):
        open_model(broken)
    (broken / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ModelError, match="The weights of .*broken cannot be loaded: "):
        open_model(broken)


def test_a_new_backbone_learns_first_and_a_trained_one_does_not(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--recipe", "digits", "--steps", "1"]
    asked = [*more, "--backbone-steps", "2"]
    assert main(arguments({**places, "model": "digits"}, tmp_path / "new", *asked)) == 0
    assert ", after 2 of the backbone alone." in capsys.readouterr().out
    assert open_model(tmp_path / "new" / "final")[0].config.id2label == dict(enumerate(LABELS))
    assert main(arguments(places, tmp_path / "trained", *more)) == 0
    assert "of the backbone alone" not in capsys.readouterr().out
    assert main(arguments(places, tmp_path / "asked", *asked)) == 2
    assert "--backbone-steps is for a new backbone, and that of" in capsys.readouterr().err
    assert not (tmp_path / "asked").exists()


def test_a_damaged_backbone_of_an_interrupted_run_is_one_sentence(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = arguments({**places, "model": "digits"}, tmp_path / "out", "--recipe", "digits", "--steps", "1",
                        "--backbone-steps", "2")  # fmt: skip

    def interrupt(*inputs: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train_backbone", interrupt)
    assert main(command) == 130
    monkeypatch.undo()
    (tmp_path / "out" / "backbone.safetensors").write_bytes(b"damaged")
    assert main(command) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("faim2f train: ") and "backbone.safetensors is damaged, or the backbone of" in error


@pytest.mark.large
@pytest.mark.newest_only
@pytest.mark.slow
def test_two_processes_by_torchrun_print_and_write_once(places: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "hf_faim2f.cli",
         *arguments(places, out, "--steps", "2", "--log-every", "1", "--eval-limit", "5")],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Training on") == 1 and "2 steps of 2 images (2 x 1), fp32" in result.stdout
    assert result.stdout.count("The trained model is in") == 1
    assert [entry["step"] for entry in history(out) if "loss" in entry] == [1, 2]
    assert open_model(out / "final")[0].config.num_labels == len(LABELS)
    again = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1",
         "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "hf_faim2f.cli",
         *arguments(places, out, "--steps", "3", "--eval-limit", "5")],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert "it continues after step 2." in again.stdout

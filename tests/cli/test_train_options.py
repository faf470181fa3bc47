"""Options of `faim2f train`: class weights, experiment trackers, automatic batch size, the best weights, bfloat16, a
teacher."""

import json
import shutil
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open

from hf_faim2f import FaiM2FImageProcessor
from hf_faim2f.cli import main, train, train_setup
from hf_faim2f.cli.train_setup import TrainSettings, prepare
from hf_faim2f.data.augmentation import RandomFlip
from hf_faim2f.training import run as training
from hf_faim2f.zoo import open_model
from tests.support.painting_teacher import painting_teacher
from tests.support.reference_models import small_model
from tests.support.shapes import LABELS, write_folder, write_tree

QUICK = ["--batch-size", "2", "--image-size", "64", "--samples", "0", "--eval-limit", "2", "--no-tensorboard",
         "--log-every", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("options")
    data = write_tree("folder", root / "data", 6)
    model = small_model(id2label=dict(enumerate(LABELS)), decoder_layers=1, train_num_points=64)
    model.save_pretrained(root / "model")
    FaiM2FImageProcessor.from_model_config(model.config, size={"shortest_edge": 64}).save_pretrained(root / "model")
    return {"data": str(data), "model": str(root / "model")}


def run(places: dict[str, str], out: Path, *more: str) -> int:
    fixed = ["train", "--model", places["model"], "--data", places["data"], "--format", "folder", "--out", str(out)]
    return main([*fixed, *QUICK, *more])


def recorded(out: Path) -> dict[str, Any]:
    return yaml.safe_load((out / "run.yaml").read_text())


@pytest.mark.newest_only
def test_balanced_class_weights_stay_in_the_configuration(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Six grounds, three squares, two discs and two bars. A resumed run keeps the weights even if the data has
    changed."""
    expected = [13 / (4 * number) for number in (6, 3, 2, 2)]
    out = tmp_path / "out"
    options = ["--class-weights", "balanced", "--save-every", "1"]
    assert run(places, out, *options, "--steps", "1") == 0
    assert "Class weights in the loss: ground 0.542, square 1.08, disc 1.62, bar 1.62." in capsys.readouterr().out
    assert open_model(out / "final")[0].config.label_weights == pytest.approx(expected)
    assert recorded(out)["class_weights"] == ["balanced"]
    card = (out / "final" / "README.md").read_text()
    assert "- class weights: 0.542 to 1.62 (label_weights in the configuration)" in card
    config = json.loads((out / "checkpoint-1" / "config.json").read_text())
    config["label_weights"] = [1.0, 2.0, 3.0, 4.0]
    (out / "checkpoint-1" / "config.json").write_text(json.dumps(config))
    assert run(places, out, *options, "--steps", "2") == 0
    assert open_model(out / "final")[0].config.label_weights == [1.0, 2.0, 3.0, 4.0]
    assert run(places, out, "--steps", "2") == 2
    assert "has a run with class_weights ['balanced'], not with the default class_weights" in capsys.readouterr().err
    # A model that has class weights keeps them.
    assert run({**places, "model": str(out / "final")}, tmp_path / "more", "--steps", "1") == 0
    assert "Class weights in the loss, of the model: ground 1, square 2, disc 3, bar 4." in capsys.readouterr().out


@pytest.mark.newest_only
def test_a_run_is_not_resumed_under_other_labels(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the same settings but other names in the data, the weights would belong to the wrong names."""
    data, out = write_tree("folder", tmp_path / "data"), tmp_path / "out"
    own = {**places, "data": str(data)}
    assert run(own, out, "--new-labels", "--steps", "1") == 0
    before = (out / "final" / "config.json").read_bytes()
    for labels, said in (
        (LABELS[::-1], "Class 0 is 'ground' in {}, but 'bar' in "),
        ((*LABELS, "cone"), "{} has 4 classes, but "),
    ):
        for part in ("train", "val"):
            (data / part / "labels.txt").write_text("\n".join(labels))
        for steps in ("1", "2"):
            assert run(own, out, "--new-labels", "--steps", steps) == 2
            error = capsys.readouterr().err.strip().splitlines()[-1]
            assert said.format(out / "checkpoint-1") in error and "choose another out, or resume with the" in error
    assert (out / "final" / "config.json").read_bytes() == before


@pytest.mark.newest_only
def test_a_resumed_run_says_that_its_data_has_changed(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """New images are fine to learn from; but the best of two evaluations must be of the same images."""
    data, out, best = write_tree("folder", tmp_path / "data"), tmp_path / "out", tmp_path / "best"
    own, chosen = {**places, "data": str(data)}, ["--best", "mIoU", "--evaluate-every", "1"]
    assert run(own, out, "--steps", "1") == run(own, best, *chosen, "--steps", "1") == 0
    assert run(own, out, "--steps", "2") == 0
    assert "has changed" not in capsys.readouterr().out
    for folder in ("images", "masks"):
        first = min((data / "train" / folder).iterdir())
        shutil.copy(first, first.with_stem("added"))
    assert run(own, out, "--steps", "3") == 0
    found = capsys.readouterr().out
    assert f"The train data has changed since the run in {out} was last started: 2 images, " in found
    counts = json.loads((out / "counts.json").read_text())["train"]
    assert f" before, 3 images, {sum(counts['segments'].values())} segments, {3 * 64 * 64:,} pixels now." in found
    assert run(own, out, "--steps", "3") == 0
    assert "has changed" not in capsys.readouterr().out
    assert run(own, out, "--steps", "3", "--eval-limit", "1") == run(own, out, "--steps", "3", "--skip-bad") == 0
    assert run(own, out, "--steps", "3") == 0
    assert "has changed" not in capsys.readouterr().out
    for mask in (data / "val" / "masks").iterdir():
        Image.fromarray(np.array([0, 2, 3, 1], dtype=np.uint8)[np.asarray(Image.open(mask))]).save(mask)
    assert run(own, out, "--steps", "3") == 0
    assert "The validation data has changed" in (found := capsys.readouterr().out)
    assert ": still 2 images, " in found and "pixels, but of other classes." in found
    assert run(own, best, *chosen, "--steps", "1") == 2
    error = capsys.readouterr().err
    assert "The validation data has changed" in error and "before and after cannot be compared for --best" in error


@pytest.mark.newest_only
def test_named_class_weights_from_a_flag_a_mapping_and_a_file(places: dict[str, str], tmp_path: Path) -> None:
    file, settings = tmp_path / "weights.txt", tmp_path / "settings.yaml"
    file.write_text("disc: 3\nbar: 0.5\n")
    settings.write_text("class_weights:\n  disc: 3\n  bar: 0.5\n")
    for number, options in enumerate((["--class-weights", "disc:3, bar:0.5"], ["--class-weights", str(file)],
                                      ["--config", str(settings)])):  # fmt: skip
        out = tmp_path / str(number)
        assert run(places, out, *options, "--steps", "1") == 0
        assert open_model(out / "final")[0].config.label_weights == [1.0, 1.0, 3.0, 0.5]
        assert recorded(out)["class_weights"] == ["disc: 3", "bar: 0.5"]


def test_mirrored_classes_are_noted_unless_nothing_is_mirrored(places: dict[str, str], tmp_path: Path) -> None:
    data = write_tree("folder", tmp_path / "data", 6)
    for part in ("train", "val"):
        (data / part / "labels.txt").write_text("ground\nleft lung\nRight Lung\nleft\n")
    settings = TrainSettings(data=str(data), format="folder", model=places["model"], new_labels=True, out="out")
    notes = prepare(settings).notes
    assert any("keeps the classes 'left lung' and 'Right Lung' as they are: pass --no-flip" in note for note in notes)
    prepared = prepare(replace(settings, flip=False))
    assert not any("mirrors" in note for note in prepared.notes)
    assert not any(isinstance(step, RandomFlip) for step in prepared.recipe.augmentations) and prepared.recipe.steps
    assert not any("mirrors" in note for note in prepare(TrainSettings(**places, format="folder", out="out")).notes)


def test_training_at_other_sizes_than_evaluation_is_noted(places: dict[str, str], tmp_path: Path) -> None:
    """The model's images have a shorter edge of 64 pixels; the recipe's crops are made for 640."""
    settings = TrainSettings(**places, format="folder", out="out")
    told = "a shorter edge of 320 to 1280 pixels, but the image processor of the model to 64: pass --image-size 64"
    assert any(told in note for note in prepare(settings).notes)
    assert not any("shorter edge" in note for note in prepare(replace(settings, image_size=64)).notes)
    assert not any("shorter edge" in note for note in prepare(replace(settings, recipe="digits")).notes)
    whole = shutil.copytree(places["model"], tmp_path / "whole")
    FaiM2FImageProcessor.from_pretrained(whole, do_resize=False).save_pretrained(whole)
    assert not any("shorter edge" in note for note in prepare(replace(settings, model=str(whole))).notes)


def test_steps_of_fewer_images_than_the_batch_are_noted(
    places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = TrainSettings(**places, format="folder", out="out")
    train._announce(prepare(settings))
    said = "But each step has at most 6 images, as there are no more; the learning rate is for 8."
    assert said in capsys.readouterr().out
    train._announce(prepare(replace(settings, batch_size=6)))
    assert "each step has" not in capsys.readouterr().out


def test_a_best_that_is_never_defined_is_said(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_tree("folder", tmp_path / "data", 2)
    for mask in (data / "val" / "masks").iterdir():
        Image.new("L", (64, 64), 255).save(mask)
    options = ["--steps", "1", "--evaluate-every", "1", "--best", "mIoU"]
    assert run({**places, "data": str(data)}, tmp_path / "out", *options) == 0
    said = "mIoU was undefined in every evaluation, so the weights are those of the last step."
    assert said in capsys.readouterr().out


def test_a_run_does_not_go_on_without_its_best_weights(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of the last step would replace them in `final`."""
    out = tmp_path / "out"
    options = ["--steps", "2", "--evaluate-every", "1", "--best", "mIoU"]
    assert run(places, out, *options) == 0
    final = (out / "final" / "model.safetensors").read_bytes()
    best = out / "best"
    for name, expected in (
        ("model.safetensors", f"{best / 'model.safetensors'} is damaged: copy it again."),
        ("best.json", f"{best / 'best.json'} is damaged: copy it again, or choose another out."),
        ("", f"{best} is missing, with the weights of the best evaluation so far: copy it back"),
    ):
        if name:
            (best / name).write_bytes(b"damaged")
        else:
            shutil.rmtree(best)
        capsys.readouterr()
        assert run(places, out, *options) == 2
        assert expected in capsys.readouterr().err
        assert (out / "final" / "model.safetensors").read_bytes() == final


WRONG = [
    (["--class-weights", "disk:3"], "class_weights names 'disk', which is not a class of the data. Did you mean"),
    (["--class-weights", "inverse"], "class_weights must be balanced, NAME:WEIGHT,... or a file of such lines"),
    (["--class-weights", "balanced", "--labels", "ground,square,disc,bar,cone", "--new-labels"],
     "Balanced class weights need every class in the training data, but 'cone' is in no image"),
    (["--best", "mIuU", "--evaluate-every", "1"], "There is no metric 'mIuU' here. The evaluation has: semantic"),
    (["--best", "mIoU"], "--best compares evaluations during training: pass --evaluate-every N, too"),
    (["--patience", "3"], "--patience needs a metric to improve: name one with --best"),
    (["--batch-size", "auto", "--per-device-batch-size", "1"], "--batch-size auto chooses --per-device-batch-size"),
    (["--batch-size", "automatic"], "--batch-size must be a whole number or auto, not 'automatic'"),
    (["--report-to", "wandb"], "report_to wandb needs wandb, which is not installed: `pip install wandb`"),
    (["--unlabelled", "pictures"], "--unlabelled names a folder of images that only a teacher can label: "
     "pass --teacher, too."),
    (["--teacher-weight", "2"], "--teacher-weight requires a teacher: name one with --teacher, too."),
    (["--teacher", "digits"], "--teacher digits is a new model with random weights: name a trained one"),
    (["--teacher", "large", "--teacher-weight", "0"], "--teacher-weight 0 disables the teacher"),
    (["--teacher", "large", "--batch-size", "auto"], "--batch-size auto measures the memory without a teacher"),
    (["--teacher", "large"], "large is not a folder here, nor the name of a published model, nor a Hub id"),
    (["--teacher", "fai-mf-m-ade"], "fai-mf-m-ade has 150 classes, but "),
    (["--teacher", "large", "--unlabelled", "pictures"], "There is no folder pictures."),
    (["--recipe", "digits", "--crop", "64x64"], "The recipe digits does not crop: leave out crop (--crop)"),
    (["--report-to", "wand"], "--report-to must be one of tensorboard, trackio, wandb, mlflow, not 'wand'."),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "expected"), WRONG, ids=[" ".join(case[0]) for case in WRONG])
def test_a_mistake_is_refused_before_the_training(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    wrong: list[str], expected: str,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert run(places, tmp_path / "out", *wrong) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("faim2f train: ") and expected in lines[0], lines
    assert not (tmp_path / "out").exists()


@pytest.mark.large
@pytest.mark.newest_only
def test_the_batch_that_fits_is_recorded_and_resumed(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr("hf_faim2f.training.batch_size.free_memory", lambda: 1)  # fits one image, with a warning
    assert run(places, out, "--batch-size", "auto", "--steps", "1", "--save-every", "1") == 0
    printed = capsys.readouterr().out
    assert "Batch size auto: 1 images in a forward pass, although it takes about" in printed
    assert "1 step of 8 images (1 x 1, accumulated 8 times), fp32" in printed
    assert recorded(out)["per_device_batch_size"] == 1 and "batch_size" not in recorded(out)
    monkeypatch.undo()
    assert run(places, out, "--batch-size", "auto", "--steps", "2") == 0
    assert "Batch size auto: 1 images in a forward pass, as before." in capsys.readouterr().out
    assert recorded(out)["per_device_batch_size"] == 1
    settings = ["--batch-size", "4", "--per-device-batch-size", "auto", "--steps", "1"]
    assert run(places, tmp_path / "other", *settings) == 0
    assert "1 step of 4 images (1 x 4), fp32" in capsys.readouterr().out
    assert recorded(tmp_path / "other")["batch_size"] == 4


def test_too_large_a_batch_is_one_sentence(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(train, "train", fail)
    assert run(places, tmp_path / "out", "--steps", "1") == 2
    assert "Forward passes of 2 images do not fit into the memory of the GPU: pass --batch-size auto" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_one_image_of_one_pixel_for_batch_norm_is_one_sentence(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(places, out, "--steps", "1", "--batch-size", "1", "--image-size", "32") == 2
    assert "Batch norm needs more than one value per channel, and a batch of one image" in capsys.readouterr().err
    assert not out.exists()


def test_trackers_get_what_the_trainer_logs(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard, and a stand-in for trackio's library; nothing is sent to a Space unless one is named."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told: dict[str, Any] = {"logs": []}
    trackio: Any = ModuleType("trackio")
    trackio.__spec__, trackio.__version__ = ModuleSpec("trackio", None), "0.43.0"
    trackio.init = lambda **settings: told.update(settings)
    trackio.config = type("Config", (dict,), {"update": lambda self, values, **_: dict.update(self, values)})()
    trackio.context_vars = SimpleNamespace(current_space_id=SimpleNamespace(get=lambda: None))
    trackio.log = told["logs"].append
    trackio.finish = lambda: told.update(finished=True)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    out = tmp_path / "flowers"
    options = ["--report-to", "tensorboard,trackio", "--steps", "2", "--evaluate-every", "1"]
    options += ["--best", "mIoU", "--patience", "5", "--precision", "bf16"]
    assert run(places, out, *options) == 0
    printed = capsys.readouterr().out
    assert told["name"] == "flowers" and told["space_id"] is None and told["finished"]
    losses = [log["train/loss"] for log in told["logs"] if "train/loss" in log]
    log = json.loads((out / "log.json").read_text())
    assert losses == [entry["loss"] for entry in log["log"] if "loss" in entry] and len(losses) == 2
    assert torch.tensor(losses).isfinite().all()
    measured = [log["eval/semantic_mIoU"] for log in told["logs"] if "eval/semantic_mIoU" in log]
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert measured == pytest.approx([event.value for event in events.Scalars("eval/semantic_mIoU")], rel=1e-5)

    # The final output of the run, and the files next to the model.
    best = log["best"]
    assert f"The weights are those of step {best['step']}, the best by semantic mIoU ({best['value']:.2f})." in printed
    classes = log["results"]["semantic"]["per_class"]
    heading = printed.splitlines().index("class   semantic IoU  semantic ACC")
    rows = [line.split() for line in printed.splitlines()[heading + 1 : heading + 5]]
    shown = {name: "–" if iou["IoU"] is None else f"{iou['IoU']:.2f}" for name, iou in classes.items()}
    assert {row[0]: row[1] for row in rows} == shown
    for name in ("confusion.png", "confusion.csv", "per_class.md"):
        assert (out / name).stat().st_size > 50
    assert "confusion.png is the confusion matrix." in printed
    # Mixed precision: the saved weights are still float32.
    files = sorted(out.glob("*/*.safetensors"))
    assert {path.parent.name for path in files} == {"best", "checkpoint-2", "final"}
    for path in files:
        with safe_open(path, "pt") as weights:
            kinds = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
        assert kinds <= {"F32", "I64"}, path
    # `evaluate` counts the same confusion matrix for the final weights.
    words = ["evaluate", str(out / "final"), "--data", places["data"], "--format", "folder", "--limit", "2"]
    assert main([*words, "--out", str(tmp_path / "evaluation")]) == 0
    assert (tmp_path / "evaluation" / "confusion.csv").read_text() == (out / "confusion.csv").read_text()
    assert (tmp_path / "evaluation" / "confusion.png").is_file()


@pytest.mark.newest_only
def test_precision_auto_is_what_the_device_multiplies_and_stays_in_a_resumed_run(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, device = tmp_path / "out", "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setattr(training, "multiplies_bfloat16", lambda device: True)
    assert run(places, out, "--precision", "auto", "--steps", "1", "--save-every", "1") == 0
    printed = capsys.readouterr().out
    assert f"Precision auto: bf16: this {device} multiplies bfloat16." in printed and "), bf16 on " in printed
    assert recorded(out)["precision"] == "bf16" and "- precision: bf16" in (out / "final" / "README.md").read_text()

    monkeypatch.setattr(training, "multiplies_bfloat16", lambda device: False)
    assert str(training.native_precision()) == f"fp32: this {device} has no instructions that multiply bfloat16."
    assert run(places, out, "--precision", "auto", "--steps", "2", "--save-every", "1") == 0
    assert "Precision auto: bf16, as before." in capsys.readouterr().out


@pytest.mark.large
def test_a_teacher_and_pictures_without_labels(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher is printed, logged and on the card; resuming needs the same settings; a broken image is named or
    skipped."""
    random = ["--teacher", places["model"], "--steps", "1"]
    assert run(places, tmp_path / "random", *random) == 2
    assert "labeled segments in 6 images of" in (said := capsys.readouterr().err) and "weights are random" in said
    assert not (tmp_path / "random").exists()

    monkeypatch.setattr(train_setup, "open_teacher", lambda name, *_: painting_teacher(2.0, name=name, notes=("Yes.",)))
    pictures = write_folder(tmp_path / "more", 3, seed=50) / "images"
    (pictures / "broken.png").write_bytes(b"no picture")
    (pictures / "000.png").write_bytes(Path(places["data"], "val", "images", "000.png").read_bytes())
    out = tmp_path / "out"
    options = ["--teacher", "large", "--unlabelled", str(pictures), "--teacher-weight", "2", "--save-every", "1"]
    assert run(places, out, *options, "--steps", "1") == 2
    assert f"{pictures / 'broken.png'}" in capsys.readouterr().err and not out.exists()
    assert run(places, out, *options, "--skip-bad", "--steps", "2", "--per-device-batch-size", "1") == 0
    printed = capsys.readouterr()
    assert f"3 images of {pictures} without labels, half of each batch on average." in printed.out
    assert f"1 evaluation image is also in {pictures}, where the teacher labels them, so the metrics" in printed.out
    assert "Yes." in printed.out and "t. pixel" in printed.out and "broken.png" in printed.out + printed.err
    assert "broken.png" in (out / "skipped.txt").read_text()
    log = [entry for entry in json.loads((out / "log.json").read_text())["log"] if "loss" in entry]
    assert len(log) == 2 and all(entry["teacher_pixel"] > 0 for entry in log)
    card = (out / "final" / "README.md").read_text()
    assert "- teacher: large; the weight of its losses is 2" in card
    assert "- images without labels: 3, labeled by the teacher only" in card and "by the teacher" in card
    assert recorded(out)["teacher"] == "large" and recorded(out)["unlabelled"] == str(pictures)
    assert run(places, out, *options, "--skip-bad", "--steps", "3") == 0
    assert "it continues after step 2." in capsys.readouterr().out
    assert run(places, out, "--steps", "4", "--save-every", "1", "--skip-bad") == 2
    assert "has a run with teacher large, not with the default teacher" in capsys.readouterr().err

"""`faim2f predict`: its files match the predictor's results, are written atomically, and stay inside the folder."""

import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from hf_faim2f import FaiM2FForUniversalSegmentation, FaiM2FImageProcessor
from hf_faim2f.cli import main
from hf_faim2f.cli import predict as command
from hf_faim2f.cli.predict_video import EarlierOutputs
from hf_faim2f.errors import sentence
from hf_faim2f.export.onnx import export_onnx
from hf_faim2f.files import FoundFile, find_files
from hf_faim2f.model.image_loading_faim2f import IMAGE_SUFFIXES
from hf_faim2f.runtime import Prediction, Predictor, prediction_files
from hf_faim2f.runtime import predictor as predictor_module
from hf_faim2f.runtime.prediction_files import (
    FILM,
    LINES,
    OVERLAY,
    SEGMENTS,
    THREADS,
    PredictionWriter,
    map_png,
    output_names,
)
from tests.support.lively_model import lively_model, photographs, save_model

ONE = {"x.json", "x.labels.png", "x.segments.png", "x.overlay.jpg"}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """`photos/a/x.png`, `photos/b/x.png`, `photos/b/y.jpg`, and files that are not images."""
    folder = tmp_path / "photos"
    for name, image in zip(("a/x.png", "b/x.png", "b/y.jpg"), photographs(), strict=False):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name)
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"no image")
    return folder


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def predict(*arguments: object) -> int:
    return main(["predict", *map(str, arguments)])


@pytest.mark.parametrize("subtask", ["instance", "semantic", "panoptic"])
def test_the_files_say_what_the_predictor_says(
    subtask: str,
    model_folder: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    threshold = [] if subtask == "semantic" else ["--threshold", "0.1"]
    assert predict(model_folder, photos, "--out", out, "--subtask", subtask, *threshold, "--batch-size", 2) == 0
    stems = ["a/x", "b/x", "b/y"]
    suffixes = [name.removeprefix("x") for name in ONE if subtask != "semantic" or "segments" not in name]
    assert files_of(out) == {stem + suffix for stem in stems for suffix in suffixes}
    printed = capsys.readouterr()
    assert "3 images to predict." in printed.out and "Written: 3 of 3" in printed.out and printed.err == ""
    sources = [photos / "a/x.png", photos / "b/x.png", photos / "b/y.jpg"]
    expected = Predictor.from_pretrained(model_folder)(sources, subtask, 0.1 if threshold else None, 2)
    for stem, source, prediction in zip(stems, sources, expected, strict=True):
        document = json.loads((out / f"{stem}.json").read_text())
        assert document["image"] == {
            "file": str(source), "height": prediction.size[0], "width": prediction.size[1]
        }  # fmt: skip
        assert document["subtask"] == subtask and document["runtime"] == "torch"
        assert document["segments"] == prediction.to_json() and prediction.segments
        labels = np.asarray(Image.open(out / f"{stem}.labels.png")).astype(int)
        assert np.array_equal(np.where(labels == 255, -1, labels), prediction.label_map.numpy())
        overlay = Image.open(out / f"{stem}.overlay.jpg")
        assert overlay.format == "JPEG" and overlay.size == prediction.image.size
        if subtask != "semantic":
            segments = np.asarray(Image.open(out / f"{stem}.segments.png")).astype(int)
            assert np.array_equal(segments, prediction.segment_map().numpy() + 1)
            classes = np.array([-1, *(entry["class_id"] for entry in document["segments"])])
            assert np.array_equal(classes[segments], prediction.label_map.numpy())
            first = coco_mask.decode(document["segments"][0]["segmentation"]).astype(bool)
            assert np.array_equal(first, segments == 1)  # the best segment is on top


@pytest.mark.parametrize("more", [[], ["--tiles", "4000", "--precision", "bf16"]])
def test_the_files_say_which_settings_applied(
    more: list[str], model_folder: Path, photos: Path, tmp_path: Path
) -> None:
    """The model's threshold is for instances only."""
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    settings = json.loads((model / "preprocessor_config.json").read_text())
    (model / "preprocessor_config.json").write_text(json.dumps({**settings, "threshold": 0.07}))
    predictor = Predictor.from_pretrained(model, precision="bf16" if more else "fp32")
    for subtask, given, threshold in (
        ("instance", [], 0.07),
        ("panoptic", [], 0.5),
        ("semantic", [], None),
        ("panoptic", ["--threshold", "0.2"], 0.2),
    ):
        words = ["--subtask", subtask, "--out", tmp_path / "out", "--overwrite", "--no-overlays", *given, *more]
        assert predict(model, photos / "a" / "x.png", *words) == 0
        document = json.loads((tmp_path / "out" / "x.json").read_text())
        assert document["threshold"] == threshold and document["precision"] == ("bf16" if more else "fp32")
        expected = predictor(photos / "a" / "x.png", subtask, threshold)[0]
        assert [one["class_id"] for one in document["segments"]] == [one.class_id for one in expected.segments]


def test_a_graph_says_what_torch_says(model_folder: Path, photos: Path, tmp_path: Path) -> None:
    export_onnx(model_folder, tmp_path / "graph", size=(64, 96), batch=2, outputs="instances", verify=False)
    shutil.copytree(model_folder, tmp_path / "model")
    shutil.copy(tmp_path / "graph" / "preprocessor_config.json", tmp_path / "model")
    assert predict(tmp_path / "graph", photos, "--out", tmp_path / "ours", "--runtime", "onnxruntime") == 0
    assert predict(tmp_path / "model", photos, "--out", tmp_path / "theirs", "--device", "cpu") == 0
    assert files_of(tmp_path / "ours") == files_of(tmp_path / "theirs")
    for path in sorted((tmp_path / "ours").rglob("*.json")):
        ours, theirs = (
            json.loads(p.read_text())["segments"]
            for p in (path, tmp_path / "theirs" / path.relative_to(tmp_path / "ours"))
        )
        assert [one["class_id"] for one in ours] == [one["class_id"] for one in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert abs(one["score"] - other["score"]) < 1e-4
            iou = coco_mask.iou([one["segmentation"]], [other["segmentation"]], [0])
            assert iou[0, 0] > 0.99


def test_bad_images_are_told_and_left_out(
    model_folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    (photos / "a" / "broken.png").write_bytes((photos / "a" / "x.png").read_bytes()[:500])
    (photos / "a" / "no\nimage.jpg").write_text("no image")
    os.mkfifo(photos / "pipe.png")
    Image.new("1", (1500, 1500)).save(photos / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    assert predict(model_folder, photos, photos / "pipe.png", "--out", out, "--no-overlays") == 1
    told = capsys.readouterr().out
    problems = (out / "left_out.txt").read_text().splitlines()
    assert len(problems) == 4 and "4 images were left out" in told and "Written: 3 of 7" in told
    patterns = (
        "large.png",
        "broken.png cannot be decoded",
        "no.image.jpg.* cannot be opened",
        "pipe.png is not a file",
    )
    for pattern, problem in zip(patterns, problems, strict=True):
        assert re.search(pattern, problem) and problem in told
    made = {f"{stem}{suffix}" for stem in ("a/x", "b/x", "b/y") for suffix in (".json", ".labels.png", ".segments.png")}
    assert files_of(out) == made | {"left_out.txt"}
    # The next run into the same folder does not list them.
    assert predict(model_folder, photos / "a" / "x.png", "--out", out, "--overwrite", "--no-overlays") == 0
    assert files_of(out) == made | {"x.json", "x.labels.png", "x.segments.png"}


def test_mistakes_are_one_sentence_and_leave_nothing(
    model_folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    image = photos / "a" / "x.png"

    def told(*arguments: object) -> str:
        try:
            status = predict(*arguments)
        except SystemExit as exit:
            status = exit.code  # type: ignore[assignment]
        printed = capsys.readouterr()
        assert status == 2 and not out.exists() and printed.out == ""
        assert printed.err.startswith("faim2f predict: ") and printed.err.count("\n") == 1
        return printed.err

    assert "There is no file or folder nowhere.png" in told(model_folder, image, "nowhere.png", "--out", out)
    assert "There is no image in" in told(model_folder, tmp_path / "*.gif", "--out", out)
    (tmp_path / "empty").mkdir()
    assert "empty (.jpg, " in told(model_folder, tmp_path / "empty", "--out", out)
    assert "has no config.json" in told(photos, image, "--out", out)
    assert "did you mean --threshold?" in told(model_folder, image, "--out", out, "--treshold", "0.5")
    assert "--out" in told(model_folder, image)
    assert "--runtime cannot be 'tpu'; choose from torch, " in told(
        model_folder, image, "--out", out, "--runtime", "tpu"
    )
    assert "from 0 to 1, not 2" in told(model_folder, image, "--out", out, "--threshold", "2")
    assert "has no threshold" in told(model_folder, image, "--out", out, "--threshold", "0.5", "--subtask", "semantic")
    assert "at least 1, not 0" in told(model_folder, image, "--out", out, "--batch-size", "0")
    assert "no device 'gpu'" in told(model_folder, image, "--out", out, "--device", "gpu")
    assert "is not empty: choose a new folder" in told(model_folder, image, "--out", photos)
    assert "is a file" in told(model_folder, image, "--out", image)


def test_what_is_there_is_kept_and_nothing_leaves_the_folder(
    model_folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, elsewhere = photos / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    out.mkdir()
    (out / "x.json").write_text("mine")
    assert predict(model_folder, photos / "a" / "x.png", "--out", out) == 2
    assert files_of(out) == {"x.json"} and (out / "x.json").read_text() == "mine"
    # Overlays of the first run are not read as images.
    for _ in range(2):
        assert predict(model_folder, photos / "**" / "*.png", photos, "--out", out, "--overwrite") == 0
    assert (out / "x.json").read_text() == "mine" and len(files_of(out)) == 1 + 3 * 4
    # A link in place of a folder.
    shutil.rmtree(out)
    out.mkdir()
    (out / "b").symlink_to(elsewhere)
    capsys.readouterr()
    assert predict(model_folder, photos, "--out", out, "--overwrite", "--no-overlays") == 2
    assert "is a link that leads out of" in capsys.readouterr().err and files_of(elsewhere) == set()
    # Incomplete files never appear.
    shutil.rmtree(out)

    def full(source: Any, target: Any) -> None:
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(os, "replace", full)
    assert predict(model_folder, photos, "--out", out) == 2
    assert "No space left on device" in capsys.readouterr().err and files_of(out) == set()


def test_predictions_of_earlier_runs_under_other_names_are_told(
    model_folder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An image is named after more of its path beside another one of the same name."""
    out, words = tmp_path / "out", ["--no-overlays", "--overwrite"]
    for images, told in ((["a/x.png"], False), (["a/x.png"], False), (["a/x.png", "b/x.png"], True)):
        capsys.readouterr()
        assert predict(model_folder, *(photos / name for name in images), "--out", out, *words) == 0
        words_of_run = f"From earlier runs, 1 under other names stay, such as {out / 'x.json'}."
        assert (words_of_run in capsys.readouterr().out) == told
    assert {"x.json", "a/x.json", "b/x.json"} <= files_of(out)


@pytest.mark.parametrize("more", [[], ["--tiles", 4000]])
def test_an_image_that_is_left_out_keeps_its_earlier_prediction(
    more: list[Any], model_folder: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = [photos / "a" / "x.png", photos / "b" / "y.jpg", "--out", out, "--overwrite", *more]
    assert predict(model_folder, *words) == 0
    kept = files_of(out)
    (photos / "a" / "x.png").write_bytes(b"no image")
    assert predict(model_folder, *words) == 1
    assert kept == ONE | {name.replace("x", "y", 1) for name in ONE} and files_of(out) == kept | {"left_out.txt"}


@pytest.mark.parametrize("more", [[], ["--tiles", 4000]])
def test_no_json_describes_the_files_of_another_prediction(
    more: list[Any], model_folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the disk is full after the first file of the new prediction."""
    words = [photos / "a" / "x.png", "--out", tmp_path / "out", "--overwrite", *more]
    assert predict(model_folder, *words, "--subtask", "panoptic") == 0
    replace, count = os.replace, 0

    def full(source: Any, target: Any) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert predict(model_folder, *words) == 2
    assert count == 2 and files_of(tmp_path / "out") == ONE - {"x.json"}


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--batch-size", 2], "batches of 2 images: pass a smaller --batch-size, or --precision bf16"),
        (["--tiles", 64, "--batch-size", 1], "one image: pass --precision bf16"),
    ],
)
def test_too_little_memory_is_one_sentence(
    more: list[Any], part: str, model_folder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(Predictor, "_run", fail)
    assert predict(model_folder, photos, "--out", tmp_path / "out", *more) == 2
    printed = capsys.readouterr().err
    assert f"faim2f predict: The GPU has too little free memory for {part}" in printed and "Traceback" not in printed


def test_an_interrupted_run_leaves_whole_files(
    model_folder: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = PredictionWriter.write

    def interrupted(writer: PredictionWriter, index: int, made: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        written(writer, index, made)

    monkeypatch.setattr(PredictionWriter, "write", interrupted)
    assert predict(model_folder, photos, "--out", tmp_path / "out", "--batch-size", 1) == 130
    assert files_of(tmp_path / "out") == {f"a/{name}" for name in ONE}


@pytest.mark.parametrize(
    ("form", "files"),
    [
        ("coco", {"images/a/x.png", "annotations/instances_default.json"}),
        ("yolo", {"images/a/x.png", "labels/a/x.txt", "data.yaml"}),
        ("labelme", {"a/x.png", "a/x.json", "labels.txt"}),
    ],
)
def test_an_interrupted_run_leaves_whole_annotations_and_says_what_it_left_out(
    form: str, files: set[str], model_folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    written, out = PredictionWriter.write, tmp_path / "out"

    def interrupted(writer: PredictionWriter, index: int, made: Any) -> None:
        if index == 2:
            raise KeyboardInterrupt
        written(writer, index, made)

    monkeypatch.setattr(PredictionWriter, "write", interrupted)
    (photos / "b" / "x.png").write_bytes(b"no image")
    out.mkdir()
    (out / "left_out.txt").write_text("that of an earlier run")
    words = ["--out", out, "--overwrite", "--batch-size", 1, "--annotations", form]
    assert predict(model_folder, photos, *words) == 130
    assert files_of(out / "annotations") == files
    if form == "coco":
        document = json.loads((out / "annotations" / "annotations" / "instances_default.json").read_text())
        assert [image["file_name"] for image in document["images"]] == ["a/x.png"] and document["annotations"]
    assert (out / "left_out.txt").read_text().count("\n") == 1 and "1 image was left out:" in capsys.readouterr().out
    shutil.rmtree(out / "annotations")
    (photos / "b" / "x.png").unlink()
    monkeypatch.setattr(PredictionWriter, "write", written)
    monkeypatch.setattr(Predictor, "_run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert predict(model_folder, photos, *words) == 130
    assert not (out / "left_out.txt").exists()
    monkeypatch.undo()
    (out / "annotations").mkdir(exist_ok=True)
    capsys.readouterr()
    assert predict(model_folder, photos / "a" / "x.png", "--out", out, "--overwrite") == 0
    assert f"{out / 'annotations'} has the labels of an earlier run, not of these" in capsys.readouterr().out


def test_files_are_written_beside_the_network(
    model_folder: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Files are written in order in one other thread, with a bounded queue; none is lost, and the bar counts written
    ones."""
    for number in range(12):
        shutil.copy(photos / "a" / "x.png", photos / f"{number:02}.png")
    (photos / "03.png").write_text("no image")
    monkeypatch.setattr(prediction_files, "MOST_WAITING", 2)
    written, waiting, counted = PredictionWriter.write, [], []
    release = threading.Event()

    def slowly(writer: PredictionWriter, index: int, made: Any) -> None:
        assert threading.current_thread().name.startswith("faim2f-writing")
        release.wait(timeout=60)  # until the queue is full and the main thread waits
        written(writer, index, made)

    class Watched(PredictionWriter):
        def put(self, index: int, made: Any) -> None:
            super().put(index, made)
            waiting.append(len(self.waiting))
            if len(self.waiting) == 2:
                release.set()

        def _finish_first(self) -> None:
            super()._finish_first()
            counted.append(1)

    monkeypatch.setattr(PredictionWriter, "write", slowly)
    monkeypatch.setattr(command, "PredictionWriter", Watched)
    assert predict(model_folder, photos, "--out", tmp_path / "out", "--batch-size", 2) == 1
    stems = ["a/x", "b/x", "b/y", *(f"{number:02}" for number in range(12) if number != 3)]
    expected = {f"{stem}{name.removeprefix('x')}" for stem in stems for name in ONE}
    assert files_of(tmp_path / "out") == expected | {"left_out.txt"}
    assert max(waiting) == 2 and len(counted) == len(waiting) == len(stems)
    assert not any(thread.name.startswith("faim2f-") for thread in threading.enumerate())


@pytest.mark.parametrize("when", [0, 2])
def test_a_disk_that_is_full_ends_the_run(
    when: int,
    model_folder: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One sentence, whether the first or a later file does not fit; files written before are complete."""
    out = tmp_path / "out"
    begun = []
    counting, others_done = threading.Lock(), threading.Semaphore(0)
    written = PredictionWriter.write

    def watched(writer: PredictionWriter, index: int, made: Any) -> None:
        with counting:
            begun.append(index)
            is_last = len(begun) == when + 1
        if is_last:
            for _ in range(when):  # including those that another thread is writing
                others_done.acquire()
            monkeypatch.setattr(os, "replace", full)
        written(writer, index, made)
        others_done.release()

    def full(source: Any, target: Any) -> None:
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(PredictionWriter, "write", watched)
    assert predict(model_folder, photos, "--out", out, "--batch-size", 1) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("faim2f predict: ") and told.endswith("No space left on device.")
    # Another thread may have started on the next image by then; it leaves no file.
    assert list(range(when + 1)) == sorted(begun)[: when + 1] and len(begun) <= when + THREADS
    assert files_of(out) == {f"{stem}{name.removeprefix('x')}" for stem in ["a/x", "b/x"][:when] for name in ONE}


def test_large_photographs_go_into_smaller_batches(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large images are read ahead in smaller numbers, with the same predictions."""
    predictor = Predictor.from_pretrained(model_folder)
    batches: list[int] = []
    run = predictor.network.run

    def watched(values: torch.Tensor) -> dict[str, torch.Tensor]:
        batches.append(len(values))
        return run(values)

    predictor.network.run = watched
    images = [photographs()[0]] * 5
    expected = [one.to_json() for one in predictor(images, "instance", 0.1, 4)]
    assert batches == [4, 1]
    monkeypatch.setattr(predictor_module, "MOST_WAITING_PIXELS", images[0].width * images[0].height)
    batches.clear()
    small = [one.to_json() for one in predictor(images, "instance", 0.1, 4)]
    assert batches == [2, 2, 1]
    for one, other in zip(small, expected, strict=True):
        assert [(s["class_id"], s["box"]) for s in one] == [(s["class_id"], s["box"]) for s in other]


PEAK_OF_COMMAND = """
import re, sys
from pathlib import Path
from hf_faim2f.cli import main
status = main(sys.argv[1:])
print("peak", re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
sys.exit(status)
"""


@pytest.mark.large
@pytest.mark.skipif(sys.platform != "linux", reason="The peak of memory is read as Linux tells it.")
@pytest.mark.parametrize("subtask", ["panoptic", "semantic", "instance"])
def test_a_photograph_of_24_megapixels_takes_bounded_memory(subtask: str, tmp_path: Path) -> None:
    """The whole command with 150 classes: the class scores at full size alone would take 14 GB."""
    config = lively_model().config
    config.id2label = {number: f"class {number}" for number in range(150)}
    torch.manual_seed(0)
    model = FaiM2FForUniversalSegmentation(config)
    with torch.no_grad():
        model.transformer_decoder.class_predictor.weight.normal_(0, 1)
    model.save_pretrained(tmp_path / "model")
    FaiM2FImageProcessor.from_model_config(config).save_pretrained(tmp_path / "model")
    photographs()[0].resize((6000, 4000)).save(tmp_path / "large.jpg")
    words = ["predict", "model", "large.jpg", "--out", "out", "--subtask", subtask, "--device", "cpu"]
    words += [] if subtask == "semantic" else ["--threshold", "0.01"]
    ran = subprocess.run(
        [sys.executable, "-c", PEAK_OF_COMMAND, *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    document = json.loads((tmp_path / "out" / "large.json").read_text())
    assert document["image"]["width"] == 6000 and document["segments"]
    peak = int(ran.stdout.split()[-1]) / 1024**2
    assert peak < 4, f"{peak:.2f} GiB"


def test_images_are_found_once(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(*words: object) -> list[Path]:
        return [one.path for one in find_files([str(word) for word in words], IMAGE_SUFFIXES, "image")]

    every = [photos / name for name in ("a/x.png", "b/x.png", "b/y.jpg")]
    assert found(photos) == every
    assert found(photos / "**" / "*", photos, every[0]) == every
    assert found(photos / "*" / "x.png") == every[:2]
    assert found(photos / "notes.txt") == found(photos / "*.txt") == [photos / "notes.txt"]  # named, so not skipped
    odd = photos / "[a]*.png"
    every[0].rename(odd)
    assert found(odd) == [odd]
    monkeypatch.chdir(photos)
    assert found("b", "../photos/b/x.png") == [Path("b/x.png"), Path("b/y.jpg")]


@pytest.mark.parametrize(
    ("copy", "document"),
    [
        ("annotations/images/a/x.png", "a/x.json"),  # COCO and YOLO
        ("annotations/images/x.jpg", "images/x.json"),  # labelme
        ("annotations/images/a/images_/x.jpg", "a/images/x.json"),  # YOLO
    ],
)
def test_copies_of_predicted_images_are_outputs(copy: str, document: str, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    for path in (run / copy, run / document):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    assert not EarlierOutputs(other, [str(tmp_path)])(run / copy)
    (run / document).write_text('{\n "image": {\n  "file": "x"\n },\n "subtask": "semantic"\n}')
    assert EarlierOutputs(other, [str(tmp_path)])(run / copy)
    for named in (run / "annotations", run / copy, run / "annotations" / "*" / "*.jpg", tmp_path / "*" / "annotations"):
        assert not EarlierOutputs(other, [str(named)])(run / copy)
    assert EarlierOutputs(other, [str(run), str(run / document)])(run / copy)


def test_overlays_need_no_further_library(
    model_folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    assert predict(model_folder, photos / "a" / "x.png", "--out", tmp_path / "out", "--subtask", "instance") == 0
    assert (tmp_path / "out" / "x.overlay.jpg").is_file()


@pytest.mark.parametrize("more", [[], ["--annotations", "coco"]])
def test_outputs_of_earlier_runs_are_no_photographs(
    more: list[str], model_folder: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In folders that are searched, and named as by a shell's pattern; but the images beside them are predicted."""
    mine = ["a/x.labels.png", "a/x.overlay.jpg"]
    for name in mine:  # without a prediction's JSON, and outside of --out
        photographs()[0].save(photos / name)
    images = {"a/x.png", "b/x.png", "b/y.jpg", *mine}

    def predicted(*words: object) -> set[str]:
        assert predict(model_folder, *words) == 0
        out = Path(str(words[words.index("--out") + 1]))
        files = [json.loads(path.read_text())["image"]["file"] for path in sorted(out.rglob("[xy]*.json"))]
        return {os.path.relpath(file, photos) for file in files}

    assert predicted(photos, "--out", photos / "run1", *more) == images
    assert "skipped" not in capsys.readouterr().out
    (photos / "run1" / "b" / "x.json").unlink()  # as by an interruption: recognized inside of --out only
    again = predicted(photos, "--out", photos / "run1", "--overwrite")
    copies = 5 if more else 0
    assert f"{copies + 15} outputs of earlier predictions are skipped, such as " in capsys.readouterr().out
    assert again == images
    assert predicted(photos, "--out", photos / "run2") == images
    assert f"{copies + 15} outputs of earlier predictions are skipped" in capsys.readouterr().out
    (photos / "annotations").mkdir()
    photographs()[0].save(photos / "annotations" / "x.png")  # the user's own
    assert predicted(photos, "--out", photos / "run3") == {*images, "annotations/x.png"}
    capsys.readouterr()
    shutil.rmtree(photos / "annotations")
    shutil.rmtree(photos / "run3")
    shutil.rmtree(photos / "run1")
    shutil.rmtree(photos / "run2")
    # The output folder contains the images.
    folder, words = photos / "b", ["--out", photos / "b", "--overwrite"]
    assert predicted(photos, *words) == images
    shutil.rmtree(photos / "b" / "a")
    shutil.rmtree(photos / "b" / "b")
    assert predicted(folder, *words) == predicted(*folder.glob("*.[jp][pn]g"), *words) == {"b/x.png", "b/y.jpg"}
    assert "6 outputs of earlier predictions are skipped" in capsys.readouterr().out
    names = files_of(folder)
    assert names == {
        f"{name}{end}" for name in "xy" for end in (".json", ".labels.png", ".segments.png", ".overlay.jpg")
    } | {"x.png", "y.jpg"}
    assert predict(model_folder, folder / "x.labels.png", *words) == 2
    assert "There is nothing to predict: 1 output of an earlier prediction is skipped: " in capsys.readouterr().err
    (folder / "x.png").unlink()
    (folder / "y.jpg").unlink()
    assert predict(model_folder, folder, *words) == 2
    assert ", only outputs of earlier predictions." in capsys.readouterr().err and files_of(folder) < names


def test_names_are_those_of_what_was_asked_for(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def names(*words: object) -> list[str]:
        return [str(name) for name in output_names(find_files([str(word) for word in words], IMAGE_SUFFIXES, "image"))]

    assert names(photos / "a" / "x.png") == names(photos / "a") == names(photos / "a" / "*.png") == ["x"]
    assert names(photos) == names(photos / "**" / "*") == ["a/x", "b/x", "b/y"]
    assert names(tmp_path / "ph*" / "a") == ["photos/a/x"]
    assert names(photos / "a" / "x.png", photos / "b") == ["a/x", "b/x", "y"]
    shutil.copytree(photos, tmp_path / "more" / "photos")
    assert names(photos / "a", tmp_path / "more" / "photos" / "a") == [f"{tmp_path.name}/photos/a/x", "more/photos/a/x"]
    monkeypatch.chdir(photos / "a")
    assert names("../b/../a/x.png", "../b") == ["a/x", "b/x", "y"]


def test_names_do_not_collide() -> None:
    def names(*paths: str) -> list[str]:
        return [
            str(name)
            for name in output_names([FoundFile(Path("/data", path), len(Path(path).parts)) for path in paths])
        ]

    assert names("a/x.png", "b/x.png") == ["a/x", "b/x"]
    assert names("x.png", "x.jpg", "X.PNG") == ["x", "x.jpg", "X.PNG"]
    assert names("x.png", "x.jpg", "x.jpg.png") == ["x", "x.jpg", "x.jpg.png"]
    assert names("x.json/y.png", "x.png") == ["x.json/y", "x.png"]  # x.json is an output folder
    long = "n" * 240
    first, second = names(f"{long}1.png", f"{long}2.png")
    assert len(first) < 220 > len(second) and first != second
    many = names(*(f"{folder}/{stem}.{kind}" for folder in "aA" for stem in ("x", "X", "é", "e\u0301")
                   for kind in ("png", "jpg", "PNG")))  # fmt: skip
    assert len({prediction_files._file_system_key(Path(name)) for name in many}) == len(many) == 24


@pytest.mark.parametrize("stem", ["n" * 200, "n" * 201, "n" * 240, "é" * 101])
def test_files_with_long_names_can_be_written(stem: str, tmp_path: Path) -> None:
    """File systems limit names, also those of temporary files, to 255 bytes."""
    found = [FoundFile(Path(f"/data/{stem}.{kind}"), 1) for kind in ("png", "jpg")]
    for name in output_names(found):
        for suffix in (OVERLAY, SEGMENTS, FILM, LINES):
            prediction_files.write_inside(tmp_path, tmp_path / f"{name}{suffix}", b"x")
    assert len(list(tmp_path.iterdir())) == 8


@pytest.mark.parametrize("more", [[], ["--tiles", 4000]])
def test_files_that_are_no_prediction_are_kept(
    more: list[Any], model_folder: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as labelme's annotations beside the images."""
    folder = photos / "a"
    words = [folder / "x.png", "--out", folder, "--overwrite", "--no-overlays", *more]
    (folder / "x.frames.jsonl").write_text("mine")
    (folder / "x.json").write_text('{"version": "5.0.1", "shapes": [], "imagePath": "x.png"}')
    kept = files_of(folder)
    assert predict(model_folder, *words) == 2
    assert "x.json is not a prediction, and would be replaced" in capsys.readouterr().err
    assert files_of(folder) == kept
    (folder / "x.json").unlink()
    assert predict(model_folder, *words) == 0 and kept <= files_of(folder)
    assert predict(model_folder, *words) == 0 and files_of(folder) & {"x.json", "x.frames.jsonl"} == {"x.json"}


def test_nothing_of_other_settings_stays_beside_a_prediction(tmp_path: Path) -> None:
    """For example segments.png of an instance prediction, whose numbers do not match the new JSON."""
    out, elsewhere, image = tmp_path / "out", tmp_path / "elsewhere", Image.new("RGB", (4, 4))
    for folder in (out, elsewhere):
        folder.mkdir()
        for suffix in (".segments.png", ".overlay.jpg"):
            (folder / f"x{suffix}").touch()
    document = {"image": {"file": "x.png"}, "subtask": "instance"}
    (out / "x.json").write_text(json.dumps(document, indent=1))
    prediction = Prediction("semantic", torch.zeros(4, 4, dtype=torch.int64), [], image, {0: "a"})
    image.save(tmp_path / "x.png")
    with PredictionWriter(out, [tmp_path / "x.png"], [Path("x")], {}, overlays=False) as writer:
        writer.put(0, prediction)
    assert files_of(out) == {"x.json", "x.labels.png"}
    (out / "link").symlink_to(elsewhere)
    writer = PredictionWriter(out, [tmp_path / "x.png"], [Path("link/x")], {}, overlays=False)
    with pytest.raises(OSError, match="is a link that leads out of"):
        writer.write(0, prediction)
    assert len(files_of(elsewhere)) == 2


def test_a_file_that_does_not_fit_is_named(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with pytest.raises(OSError) as caught:
            prediction_files.write_inside(tmp_path, tmp_path / "x.json", bytes(100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sentence(caught.value) == f"{tmp_path / 'x.json'}: File too large."


def test_maps_of_many_classes() -> None:
    values = torch.tensor([[-1, 0], [254, 7]])
    for count, kind, none in ((255, np.uint8, 255), (256, np.uint16, 65535)):
        picture = Image.open(io.BytesIO(map_png(values.numpy(), count)))
        read = np.asarray(picture)
        assert read.dtype == kind and read.tolist() == [[none, 0], [254, 7]]
        assert picture.mode in ("L", "I;16")  # gray, so that every reader returns one number per pixel

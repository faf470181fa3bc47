"""`faim2f predict` on videos: frames, times, audio, identities, interruptions, and damaged or malicious videos."""

import functools
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from hf_faim2f.cli import main
from hf_faim2f.errors import PredictorError
from hf_faim2f.runtime import Predictor
from hf_faim2f.runtime.drawing import class_color
from hf_faim2f.runtime.prediction import Prediction, Segment
from hf_faim2f.runtime.tracking import Tracker
from hf_faim2f.runtime.video import Film, FilmWriter
from tests.support.films import moving_digits, read_film, write_film
from tests.support.lively_model import photographs, save_model
from tests.support.shared import shared_folder
from tests.support.shipped_digits import DIGITS as SHIPPED

av = pytest.importorskip("av")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


def predict(*arguments: object) -> int:
    return main(["predict", *map(str, arguments)])


def numbered(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Frames that encode their number: bit k is the brightness of the k-th of six columns."""
    frames = []
    for number in range(count):
        pixels = np.full((height, width, 3), 128, dtype=np.uint8)
        for bit in range(6):
            pixels[:, 10 * bit : 10 * bit + 10] = 220 if number >> bit & 1 else 30
        frames.append(pixels)
    return frames


def number_of(pixels: np.ndarray) -> int:
    gray = pixels.mean(2)
    return sum(int(gray[8:40, 10 * bit + 3 : 10 * bit + 7].mean() > 128) << bit for bit in range(6))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


FRAMES = 24
UNEVEN = [0, 40, 50, 133, 134, 300, 301, 302, 400, 900, 901, 1000]


@pytest.mark.parametrize(("suffix", "sound"), [(".mp4", "aac"), (".mkv", None), (".avi", None), (".mov", "pcm_s16le")])
def test_frames_are_neither_lost_nor_doubled_and_keep_their_times(
    suffix: str, sound: str | None, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With irregular time stamps where the container supports them, in the JSON lines and in the video."""
    film, out = tmp_path / f"clip{suffix}", tmp_path / "out"
    codec, stamps = ("mpeg4", [40 * n for n in range(12)]) if suffix == ".avi" else ("libx264", UNEVEN)
    time_base = Fraction(1, 25) if suffix == ".avi" else Fraction(1, 1000)
    stamps = [stamp // 40 for stamp in stamps] if suffix == ".avi" else stamps
    write_film(film, numbered(12), stamps, time_base=time_base, sound=sound, codec=codec)
    assert predict(tiny, film, "--out", out, "--threshold", 0.99) == 0
    given, made = read_film(film), read_film(out / "clip.overlay.mp4")
    assert [number_of(frame) for frame in given.frames] == list(range(12))
    assert [number_of(frame) for frame in made.frames] == list(range(12))
    assert made.seconds == pytest.approx(given.seconds, abs=1e-3)
    if suffix != ".avi":
        assert given.seconds == pytest.approx([stamp / 1000 for stamp in UNEVEN], abs=1e-3)
    lines = lines_of(out / "clip.frames.jsonl")
    assert [line["frame"] for line in lines] == list(range(12))
    assert [line["time"] for line in lines] == pytest.approx(given.seconds, abs=1e-5)
    document = json.loads((out / "clip.json").read_text())
    assert document["film"] == {"file": str(film), "height": 48, "width": 64}
    assert document["frames"] == 12 and document["whole"] and document["sound"] == (sound and "kept")
    assert made.sound == given.sound and bool(sound) == bool(made.sound)
    assert {path.name for path in out.iterdir()} == {"clip.json", "clip.frames.jsonl", "clip.overlay.mp4"}
    assert re.search(r"clip\S+: 12 frames in [\d.]+ seconds \([\d.]+ per second\), in ", capsys.readouterr().out)


def test_sound_that_mp4_does_not_take_is_left_out(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    film, out = tmp_path / "clip.avi", tmp_path / "out"
    write_film(film, numbered(12), range(12), time_base=Fraction(1, 25), sound="pcm_u8", codec="mpeg4")
    assert read_film(film).sound > 0
    assert predict(tiny, film, "--out", out, "--threshold", 0.999) == 0
    assert "its audio is left out, at least in part, because MP4 does not support its codec" in capsys.readouterr().out
    made = read_film(out / "clip.overlay.mp4")
    assert made.sound == 0 and [number_of(frame) for frame in made.frames] == list(range(12))
    assert json.loads((out / "clip.json").read_text())["sound"] == "left out"


@pytest.mark.parametrize(("suffix", "start"), [(".ts", 3600), (".mkv", 5), (".mp4", 5)])
def test_times_count_from_the_start_of_the_film(suffix: str, start: int, tmp_path: Path) -> None:
    """As in players, because a recording's time stamps may start at any value."""
    write_film(tmp_path / f"clip{suffix}", numbered(12), start=start, sound="aac", sound_seconds=0.48)
    made = tmp_path / "made.mp4"
    with Film(tmp_path / f"clip{suffix}") as film, made.open("w+b") as file:
        frames = list(film.frames())
        writer = FilmWriter(file, film, (64, 48))
        for frame in frames:
            writer.add(frame.image, frame.pts)
        writer.finish()
        assert film.problem(len(frames)) is None
    assert [frame.seconds for frame in frames] == pytest.approx([0.04 * n for n in range(12)], abs=0.03)
    written = read_film(made)
    assert written.seconds == pytest.approx([frame.seconds for frame in frames], abs=1e-3)
    with av.open(str(made)) as container:
        stamps = [packet.pts * packet.time_base for packet in container.demux(audio=0) if packet.size]
    assert 0.4 < stamps[-1] < 0.6


def test_joined_recordings_go_on_after_one_another(tmp_path: Path) -> None:
    """Their clocks start again: the frames of the second must not pass within a moment."""
    film = tmp_path / "clip.ts"
    write_film(film, numbered(12))
    film.write_bytes(film.read_bytes() * 3)
    with Film(film) as opened:
        seconds = [frame.seconds for frame in opened.frames()]
    assert len(seconds) == 36
    assert np.diff(seconds) == pytest.approx(0.04, abs=1e-3)


def test_a_stream_s_first_frames_may_lack_time_stamps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first time stamp of a stream is its start, after the frames that came before it."""
    film = tmp_path / "clip.mkv"
    write_film(film, numbered(6))
    with Film(film) as opened:
        decoded = list(opened._decoded())
        decoded[0].pts = decoded[1].pts = None
        monkeypatch.setattr(opened, "is_live", True)
        monkeypatch.setattr(opened, "_decoded", lambda: iter(decoded))
        seconds = [frame.seconds for frame in opened.frames()]
    assert seconds == pytest.approx([0.04 * index for index in range(6)], abs=0.01)


def test_the_lines_say_what_the_predictor_says(tiny: Path, tmp_path: Path) -> None:
    """For every second frame of a video."""
    pictures = [photographs()[0].resize((96, 64)), photographs()[1].resize((96, 64))] * 3
    write_film(tmp_path / "clip.mkv", [np.asarray(one) for one in pictures], codec="libx264")
    assert predict(tiny, tmp_path / "clip.mkv", "--every", 2, "--threshold", 0.1, "--out", tmp_path / "out") == 0
    lines = lines_of(tmp_path / "out" / "clip.frames.jsonl")
    assert [line["frame"] for line in lines] == [0, 2, 4]
    decoded = [Image.fromarray(frame) for frame in read_film(tmp_path / "clip.mkv").frames[::2]]
    expected = Predictor.from_pretrained(tiny)(decoded, threshold=0.1)
    assert [line["segments"] for line in lines] == [one.to_json() for one in expected]
    assert any(line["segments"] for line in lines)
    made = read_film(tmp_path / "out" / "clip.overlay.mp4")
    assert made.seconds == pytest.approx([0, 0.08, 0.16])
    # The video shows the drawings, up to compression.
    drawn = np.asarray(expected[0].draw()).astype(int)
    assert np.abs(made.frames[0].astype(int) - drawn).mean() < 12


@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_films_of_turned_cameras_are_upright(rotation: int, tiny: Path, tmp_path: Path) -> None:
    pixels = np.full((48, 96, 3), 40, dtype=np.uint8)
    pixels[:12, :24] = (230, 60, 60)
    write_film(tmp_path / "clip.mp4", [pixels] * 3, rotation=rotation)
    assert predict(tiny, tmp_path / "clip.mp4", "--threshold", 0.999, "--out", tmp_path / "out") == 0
    made = read_film(tmp_path / "out" / "clip.overlay.mp4")
    assert read_film(tmp_path / "clip.mp4").rotation in (rotation, -rotation) and made.rotation == 0
    expected = np.rot90(pixels, rotation // 90)  # counterclockwise, like the rotation flag
    assert made.frames[0].shape == expected.shape
    assert np.abs(made.frames[0].astype(int) - expected).mean() < 6


def test_odd_sizes_are_written(tiny: Path, tmp_path: Path) -> None:
    """The last row and column are repeated. MPEG-4 supports odd sizes."""
    write_film(tmp_path / "clip.avi", numbered(3, 47, 63), [0, 1, 2], time_base=Fraction(1, 25), codec="mpeg4")
    assert predict(tiny, tmp_path / "clip.avi", "--threshold", 0.999, "--out", tmp_path / "out") == 0
    made = read_film(tmp_path / "out" / "clip.overlay.mp4")
    assert made.frames[0].shape == (48, 64, 3) and [number_of(frame) for frame in made.frames] == [0, 1, 2]
    assert json.loads((tmp_path / "out" / "clip.json").read_text())["film"]["height"] == 47


# ---------------------------------------------------------------------------------------------------------- identities


def tracked(folder: Path) -> None:
    folder.mkdir()
    scenes = moving_digits(FRAMES)
    stamps = np.cumsum([0] + [(30, 30, 70)[n % 3] for n in range(FRAMES - 1)]).tolist()
    write_film(folder / "clip.mp4", [scene.pixels for scene in scenes], stamps)
    words = ["--track", "--subtask", "instance", "--device", "cpu", "--out", folder / "out"]
    assert predict(SHIPPED, folder / "clip.mp4", *words) == 0


@pytest.fixture(scope="module")
def digits() -> Path:
    pytest.importorskip("trackers")
    return shared_folder("a film of moving digits", tracked)


def identity_f1(lines: list[dict[str, Any]], truth: list[dict[int, np.ndarray]]) -> float:
    """IDF1 (Ristani et al., 2016): true objects are assigned to track ids one to one so that the most frames match."""
    numbers = sorted({s["track"] for line in lines for s in line["segments"] if "track" in s})
    objects = sorted({number for masks in truth for number in masks})
    agree = np.zeros((len(objects), len(numbers)))
    found = sum("track" in segment for line in lines for segment in line["segments"])
    there = sum(len(masks) for masks in truth)
    for line, masks in zip(lines, truth, strict=True):
        for segment in line["segments"]:
            mask = coco_mask.decode(segment["segmentation"]).astype(bool)
            for number, own in masks.items():
                if "track" in segment and (mask & own).sum() >= 0.5 * (mask | own).sum():
                    agree[objects.index(number), numbers.index(segment["track"])] += 1
    rows, columns = linear_sum_assignment(-agree)
    return float(2 * agree[rows, columns].sum() / (found + there))


def test_objects_keep_their_identities(digits: Path) -> None:
    lines = lines_of(digits / "out" / "clip.frames.jsonl")
    truth = [scene.masks for scene in moving_digits(FRAMES)]
    assert len(lines) == FRAMES and max(map(len, truth)) == 4
    assert identity_f1(lines, truth) >= 0.9
    # Sanity check of the metric: ids that change half-way give a low value.
    for line in lines[FRAMES // 2 :]:
        for segment in line["segments"]:
            if "track" in segment:
                segment["track"] += 100
    assert identity_f1(lines, truth) < 0.75


def test_objects_with_the_same_box_are_told_apart() -> None:
    """For example, one object that is detected as two classes."""
    pytest.importorskip("trackers")
    tracker, mask = Tracker(), torch.ones(31, 31, dtype=torch.bool)
    for number in range(3):
        boxes = [(10, 10, 40, 40), (10, 10, 40, 40), (60, 60, 90, 90)]
        things = [Segment(k, "", 0.9 - 0.1 * k, box, mask) for k, box in enumerate(boxes)]
        image = Image.new("RGB", (100, 100))
        tracker.update(Prediction("instance", torch.zeros(100, 100), things, image, {}), 0.04 * number)
        assert [thing.track for thing in things] == [1, 2, 3]


@pytest.mark.parametrize(("speed", "objects"), [(3, 1), (0, 1), (12, 3), (30, 3)])
def test_a_stray_pixel_in_one_frame_changes_no_identity(speed: int, objects: int) -> None:
    """Also of a row of like objects, each of which moves to the place of the next if they are fast."""
    pytest.importorskip("trackers")
    tracker = Tracker()
    for frame in range(10):
        things = []
        for number in range(objects):
            mask, x = torch.zeros(300, 1000, dtype=torch.bool), 100 + 80 * number + speed * frame
            mask[60:160, x : x + 60] = True
            if frame == 4 and number == 0:
                mask[200, x + 260] = True
            rows, columns = mask.any(1).nonzero()[:, 0].tolist(), mask.any(0).nonzero()[:, 0].tolist()
            box = (columns[0], rows[0], columns[-1], rows[-1])
            things.append(Segment(0, "", 0.9, box, mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]))
        image = Image.new("RGB", (1000, 300))
        tracker.update(Prediction("instance", torch.zeros(300, 1000), things, image, {}), 0.1 * frame)
        assert [thing.track for thing in things] == list(range(1, objects + 1)), frame


def test_an_object_that_left_does_not_name_another_at_its_last_place() -> None:
    pytest.importorskip("trackers")
    tracker = Tracker()
    places = {**{frame: 100 + 20 * frame for frame in range(6)}, 10: 200}
    for frame in range(11):
        x = places.get(frame)
        things = [] if x is None else [Segment(0, "", 0.9, (x, 60, x + 29, 99), torch.ones(40, 30, dtype=torch.bool))]
        image = Image.new("RGB", (1000, 300))
        tracker.update(Prediction("instance", torch.zeros(300, 1000), things, image, {}), frame / 30)
        assert [thing.track for thing in things] == ([] if x is None else [1 if frame < 6 else 2]), frame


@pytest.mark.parametrize("step", [1.0, 1.1, 60.0])
def test_an_object_of_every_frame_keeps_its_identity_however_far_apart_they_are(step: float) -> None:
    """As with --every, in time lapses and after gaps. One that is missing in a frame was out of sight for longer."""
    pytest.importorskip("trackers")
    tracker = Tracker()
    for frame in range(6):
        boxes = [(10, 10, 40, 40), (60, 60, 90, 90)][: 1 if frame == 3 else 2]
        things = [Segment(0, "", 0.9, box, torch.ones(31, 31, dtype=torch.bool)) for box in boxes]
        image = Image.new("RGB", (100, 100))
        tracker.update(Prediction("instance", torch.zeros(100, 100), things, image, {}), 0.1 + step * frame)
        assert [thing.track for thing in things] == [1, 2 if frame < 3 else 3][: len(boxes)], frame


def test_an_object_keeps_its_color(digits: Path) -> None:
    """Checks the most frequent object, inside its mask."""
    lines, film = lines_of(digits / "out" / "clip.frames.jsonl"), read_film(digits / "out" / "clip.overlay.mp4")
    given = read_film(digits / "clip.mp4")
    counts = Counter(s["track"] for line in lines for s in line["segments"] if "track" in s)
    number, count = counts.most_common(1)[0]
    assert count >= FRAMES - 2
    colors = np.array([class_color(other) for other in range(1, 1 + max(counts))])
    checked = 0
    for line, drawn, plain in zip(lines, film.frames, given.frames, strict=True):
        seen = np.zeros(plain.shape[:2], dtype=int)
        for segment in line["segments"]:
            if "track" in segment:
                seen += coco_mask.decode(segment["segmentation"]) * (1 if segment["track"] == number else 2)
        alone = ndimage.binary_erosion(seen == 1, iterations=2)  # without outlines
        if alone.sum() > 50:
            # The opacity of things is 0.55; labels may cover part of the mask.
            tint = np.median((drawn[alone] - 0.45 * plain[alone]) / 0.55, axis=0)
            assert np.abs(colors - tint).sum(1).argmin() == number - 1
            checked += 1
    assert checked > FRAMES / 2


# ------------------------------------------------------------------------------------------------------- bad films


def told(arguments: list[object], capsys: pytest.CaptureFixture[str], status: int) -> str:
    try:
        found = predict(*arguments)
    except SystemExit as stop:
        found = int(stop.code or 0)
    printed = capsys.readouterr()
    assert found == status, printed
    return printed.out if status == 1 else printed.err


def test_bad_films_are_a_sentence(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one run with a good video, which is written."""
    write_film(tmp_path / "good.mp4", numbered(4))
    whole = (tmp_path / "good.mp4").read_bytes()
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no film at all\n" * 100)
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])  # lacks the index, which is at the end
    (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\n{tmp_path / 'good.mp4'}\n#EXT-X-ENDLIST\n")
    (tmp_path / "script.mp4").write_text(f"ffconcat version 1.0\nfile '{tmp_path / 'good.mp4'}'\n")
    sound_only(tmp_path / "sound.mp4")
    names = ("empty", "text", "cut", "list", "script", "sound", "good")
    out = tmp_path / "out"
    printed = told([tiny, *(tmp_path / f"{name}.mp4" for name in names), "--out", out], capsys, 1)
    problems = (out / "left_out.txt").read_text().splitlines()
    reasons = [
        "cannot be opened as a video: it is empty.",
        "text.mp4 cannot be opened as a video: ",
        "cut.mp4 cannot be opened as a video: .*truncated",
        "list.mp4 cannot be opened as a video",
        "script.mp4 cannot be opened as a video",
        "sound.mp4 has no video stream",
    ]
    assert len(problems) == 6 and "6 files were left out:" in printed and "Written: 1 of 7" in printed
    for reason, problem in zip(reasons, problems, strict=True):
        assert re.search(reason, problem) and "<none>" not in problem
    assert {path.name.partition(".")[0] for path in out.iterdir()} == {"good", "left_out"}


def sound_only(path: Path) -> None:
    import av

    with av.open(str(path), "w") as container:
        audio: Any = container.add_stream("aac", rate=48000, layout="mono")
        for start in range(0, 9600, 1024):
            tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
            tone.rate, tone.pts = 48000, start
            container.mux(audio.encode(tone))
        container.mux(audio.encode(None))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_what_a_truncated_film_has_is_written_and_said(
    suffix: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A video with the index at its beginning, cut in the middle."""
    generator = np.random.default_rng(0)
    noise = [np.maximum(frame // 2, generator.integers(0, 90, frame.shape, dtype=np.uint8)) for frame in numbered(40)]
    settings = {"movflags": "faststart"} if suffix == ".mp4" else {}
    film, out = tmp_path / f"clip{suffix}", tmp_path / "out"
    write_film(film, noise, sound=None, **settings)
    film.write_bytes(film.read_bytes()[: os.path.getsize(film) // 2])
    printed = told([tiny, film, "--out", out, "--threshold", 0.999], capsys, 1)
    count = len(lines_of(out / "clip.frames.jsonl"))
    assert 5 < count < 35 and len(read_film(out / "clip.overlay.mp4").frames) == count
    assert "is truncated or damaged" in printed and f"{count} of its frames could be read" in printed
    assert "Written: 1 of 1" in printed
    assert not json.loads((out / "clip.json").read_text())["whole"]


def test_frames_are_bounded(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_film(tmp_path / "large.mp4", numbered(2, 200, 300))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    printed = told([tiny, tmp_path / "large.mp4", "--out", tmp_path / "out"], capsys, 1)
    assert "has frames of 200x300 pixels (height x width), more than the 50000" in printed
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["left_out.txt"]


@pytest.mark.parametrize(("height", "width", "reason"), [(200, 300, "more than the 50000"), (2, 4096, "resized to 0x")])
def test_a_late_frame_that_cannot_be_used_ends_the_film(
    height: int, width: int, reason: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    film, out = tmp_path / "clip.ts", tmp_path / "out"
    write_film(tmp_path / "later.ts", numbered(2, height, width))
    write_film(film, numbered(12))
    film.write_bytes(film.read_bytes() + (tmp_path / "later.ts").read_bytes())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    printed = told([tiny, film, "--out", out, "--threshold", 0.999], capsys, 1)
    assert reason in printed and "the video ends before this frame, with 12 of its frames written." in printed
    assert [line["frame"] for line in lines_of(out / "clip.frames.jsonl")] == list(range(12))
    assert [number_of(frame) for frame in read_film(out / "clip.overlay.mp4").frames] == list(range(12))
    document = json.loads((out / "clip.json").read_text())
    assert document["frames"] == 12 and not document["whole"]


def test_a_network_that_fails_late_keeps_the_frames_before(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_film(tmp_path / "clip.mp4", numbered(30))
    run, count = Predictor._run, 0

    def failing(predictor: Predictor, values: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        nonlocal count
        count += 1
        if count == 25:
            raise PredictorError("tiny outputs masks_queries_logits that are NaN.")
        return run(predictor, values)

    monkeypatch.setattr(Predictor, "_run", failing)
    out = tmp_path / "out"
    assert "that are NaN" in told([tiny, tmp_path / "clip.mp4", "--out", out, "--batch-size", 1], capsys, 2)
    lines = lines_of(out / "clip.frames.jsonl")
    assert 0 < len(lines) < 25 and len(read_film(out / "clip.overlay.mp4").frames) == len(lines)
    document = json.loads((out / "clip.json").read_text())
    assert document["frames"] == len(lines) and not document["whole"]


def test_a_film_and_an_image_of_one_name_replace_each_other(tiny: Path, tmp_path: Path) -> None:
    out, film, photo = tmp_path / "out", tmp_path / "clip.mp4", tmp_path / "clip.png"
    write_film(film, numbered(2))
    photographs()[0].save(photo)
    of_film = {"clip.json", "clip.frames.jsonl", "clip.overlay.mp4"}
    of_photo = {"clip.json", "clip.labels.png", "clip.segments.png", "clip.overlay.jpg"}
    for source, names in ((film, of_film), (photo, of_photo), (film, of_film)):
        assert predict(tiny, source, "--out", out, "--overwrite") == 0
        assert {path.name for path in out.iterdir()} == names
    film.write_bytes(b"no film")
    assert predict(tiny, film, "--out", out, "--overwrite") == 1
    assert {path.name for path in out.iterdir()} == {*of_film, "left_out.txt"}


def test_a_stated_length_is_not_relied_on(tiny: Path, tmp_path: Path) -> None:
    """The header states a duration of days."""
    film = tmp_path / "clip.mp4"
    write_film(film, numbered(3))
    content = bytearray(film.read_bytes())
    for box in (b"mvhd", b"mdhd"):
        place = content.index(box) + 4
        content[place + 16 : place + 20] = (2**31 - 1).to_bytes(4, "big")
    film.write_bytes(bytes(content))
    assert predict(tiny, film, "--threshold", 0.999, "--out", tmp_path / "out") == 0
    assert len(lines_of(tmp_path / "out" / "clip.frames.jsonl")) == 3


def test_mistakes_are_one_sentence(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_film(tmp_path / "clip.mp4", numbered(2))
    photographs()[0].save(tmp_path / "photo.png")
    clip, photo, out = tmp_path / "clip.mp4", tmp_path / "photo.png", tmp_path / "out"

    def refused(*words: object) -> str:
        text = told([tiny, *words, "--out", out], capsys, 2)
        assert text.count("\n") == 1 and not out.exists()
        return text

    assert "--track is for video, but no video is named" in refused(photo, "--track")
    assert "--every is for video, but no video is named" in refused(photo, "--every", 2)
    assert "--every must be at least 1, not 0" in refused(clip, "--every", 0)
    assert "choose another --subtask" in refused(clip, "--track", "--subtask", "semantic")
    assert "--annotations is for images, but a video is named" in refused(clip, "--annotations", "coco")
    assert "--ray does not predict video" in refused(clip, "--ray", "local")
    monkeypatch.setitem(sys.modules, "av", None)
    assert "install hf-faim2f[video]" in refused(clip)


def test_films_in_folders_are_said(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mixed"
    (folder / "below").mkdir(parents=True)
    photographs()[0].save(folder / "photo.png")
    write_film(folder / "below" / "clip.mp4", numbered(2))
    assert predict(tiny, folder, "--out", tmp_path / "first", "--threshold", 0.999) == 0
    printed = capsys.readouterr().out
    assert f"1 video is skipped: {folder}/below/clip.mp4; to predict videos, name them" in printed
    # Named explicitly or by a pattern of videos, they are predicted along with the images.
    assert predict(tiny, folder, folder / "below" / "*.mp4", "--out", tmp_path / "second", "--threshold", 0.999) == 0
    printed = capsys.readouterr().out
    assert "skipped" not in printed and "Written: 2 of 2" in printed
    assert {path.name for path in (tmp_path / "second").rglob("*") if path.is_file()} >= {
        "photo.json", "clip.json", "clip.overlay.mp4",
    }  # fmt: skip
    # Overlays of an earlier run beside them are no videos to predict.
    words = ["--out", folder / "below", "--overwrite", "--threshold", 0.999]
    for again in (False, True):
        assert predict(tiny, folder / "below" / "*.mp4", *words) == 0
        printed = capsys.readouterr().out
        assert ("1 output of an earlier prediction is skipped: " in printed) == again and "Written: 1 of 1" in printed
    (folder / "photo.png").unlink()
    text = told([tiny, folder, "--out", tmp_path / "third"], capsys, 2)
    assert f"There is no image in {folder}" in text and "only videos: " in text and "clip.mp4" in text


def test_an_address_is_read_and_a_camera_that_is_not_there_is_said(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_film(tmp_path / "clip.mp4", numbered(3), movflags="faststart")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/clip.mp4"
        assert predict(tiny, address, "--out", tmp_path / "out", "--threshold", 0.999) == 0
        assert len(lines_of(tmp_path / "out" / "clip.frames.jsonl")) == 3
        capsys.readouterr()
        secret = address.replace("//", "//me:password@") + "?key=password"
        assert predict(tiny, secret, "--out", tmp_path / "secret", "--threshold", 0.999) == 0
        document = (tmp_path / "secret" / "clip.json").read_text()
        assert json.loads(document)["film"]["file"] == address and "password" not in document
        assert "password" not in capsys.readouterr().out
        missing = address.replace("clip", "none")
        secret = missing.replace("//", "//me:password@")
        printed = told([tiny, secret, "999", "--out", tmp_path / "none"], capsys, 1)
        assert "password" not in printed and "password" not in (tmp_path / "none" / "left_out.txt").read_text()
    finally:
        server.shutdown()
        server.server_close()
    assert f"{missing} cannot be opened: " in printed and "There is no camera 999" in printed


def test_a_stream_that_falls_silent_is_said(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job that records a camera must notice that it failed; but its frames are not damaged."""
    write_film(tmp_path / "clip.ts", numbered(30))
    content, done = (tmp_path / "clip.ts").read_bytes(), threading.Event()

    class Silent(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)
            self.wfile.flush()
            done.wait(60)

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setattr("hf_faim2f.runtime.video.PATIENCE", (10.0, 0.5))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address, out = f"http://127.0.0.1:{server.server_port}/clip.ts", tmp_path / "out"
        printed = told([tiny, address, "--out", out, "--threshold", 0.999], capsys, 1)
    finally:
        done.set()
        server.shutdown()
        server.server_close()
    document = json.loads((out / "clip.json").read_text())
    assert document["frames"] > 20 and not document["whole"]
    frames = f"{document['frames']} of its frames could be read, and are written."
    assert f"{address} ended early (it sent nothing for 0.5 seconds): {frames}" in printed


# ----------------------------------------------------------------------------------------------------- interruptions

INTERRUPTED = """
import os, signal, sys
from hf_faim2f.cli import main, predict_video
line, count = predict_video._line, 0
def counting(*arguments):
    global count
    count += 1
    if count == 7:
        os.kill(os.getpid(), int(sys.argv[1]))  # in the middle of writing a frame
        os.kill(os.getpid(), int(sys.argv[1]))  # and once more
    return line(*arguments)
predict_video._line = counting
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.large)])
def test_an_interrupt_leaves_a_film_that_plays(number: int, tiny: Path, tmp_path: Path) -> None:
    write_film(tmp_path / "clip.mp4", numbered(60), sound="aac", sound_seconds=2.4)
    words = ["predict", str(tiny), "clip.mp4", "--out", "out", "--threshold", "0.999"]
    ran = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(int(number)), *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode == 130 and "Traceback" not in ran.stderr, ran.stderr
    assert "interrupted; " in ran.stderr
    made, lines = read_film(tmp_path / "out" / "clip.overlay.mp4"), lines_of(tmp_path / "out" / "clip.frames.jsonl")
    assert [number_of(frame) for frame in made.frames] == [line["frame"] for line in lines] == list(range(7))
    document = json.loads((tmp_path / "out" / "clip.json").read_text())
    assert not document["whole"] and document["frames"] == 7
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "clip.json", "clip.frames.jsonl", "clip.overlay.mp4",
    }  # fmt: skip


def test_nothing_is_left_of_a_film_that_cannot_be_written(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hf_faim2f.cli import predict_video

    write_film(tmp_path / "clip.mp4", numbered(8))

    def full(*_: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(predict_video, "_line", full)
    assert "No space left on device." in told([tiny, tmp_path / "clip.mp4", "--out", tmp_path / "out"], capsys, 2)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.large
@pytest.mark.skipif(sys.platform != "linux", reason="The peak of memory is read as Linux tells it.")
@pytest.mark.slow
def test_memory_does_not_grow_with_the_film(tiny: Path, tmp_path: Path) -> None:
    """Compares the peaks for 40 and 400 frames; the additional pixels alone are 250 MB."""
    program = (
        "import re, sys\nfrom pathlib import Path\nfrom hf_faim2f.cli import main\nmain(sys.argv[1:])\n"
        "print('peak', re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])\n"
    )
    peaks = []
    for count in (40, 400):
        frames = (numbered(1, 360, 640)[0] for _ in range(count))
        write_film(tmp_path / f"{count}.mp4", frames)
        words = ["predict", str(tiny), f"{count}.mp4", "--out", f"out{count}", "--threshold", "0.999"]
        ran = subprocess.run(
            [sys.executable, "-c", program, *words], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        peaks.append(int(ran.stdout.split()[-1]) / 1024)
    assert peaks[1] < peaks[0] + 60, peaks

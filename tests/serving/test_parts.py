"""The page's parts without a browser: untrusted uploads, available networks, and the operator's errors."""

import io
import json
import os
import shutil
import socket
import threading
import uuid
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from PIL import Image

from hf_faim2f.cli import main
from hf_faim2f.errors import WebError
from hf_faim2f.runtime import Prediction, Predictor, PredictorError, Segment
from hf_faim2f.runtime.drawing import DARKNESS, Segments, draw_alone, draw_segments, segments_of_panoptic, supervision
from hf_faim2f.serving import space as web
from hf_faim2f.serving.page import example_pictures, legend_html, message_html
from hf_faim2f.serving.rendering import LONGEST, view_of, write_downloads
from hf_faim2f.serving.requests import (
    Choice,
    Limits,
    Request,
    RequestHandler,
    display_name,
    open_choices,
    open_picture,
)
from hf_faim2f.serving.server import Settings, free_port, serving
from tests.support.lively_model import photographs, save_model
from tests.support.shared import exported

LIMITS = Limits(megabytes=1, megapixels=0.5, seconds=60)
HOSTILE = '../..\\<script>alert("1")</script>{{x}}${y}`'


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def choices(model_folder: Path) -> dict[str, Choice]:
    return open_choices(str(model_folder))[0]


def request_of(path: Path, **changes: Any) -> Request:
    return replace(Request(path, path.name, "torch", "instance", 0.1), **changes)


def large_prediction() -> Prediction:
    """Overlapping squares in an image that is displayed at half its size."""
    names = {0: "sky", 1: HOSTILE}
    image = Image.new("RGB", (2 * LONGEST, 400), (200, 100, 50))
    segments = [
        Segment(1, HOSTILE, 0.9, (100, 100, 299, 299), torch.ones(200, 200, dtype=torch.bool)),
        Segment(0, "sky", 0.5, (200, 200, 399, 399), torch.ones(200, 200, dtype=torch.bool)),
    ]
    return Prediction("instance", torch.full((400, 2 * LONGEST), -1), segments, image, names)


def test_files_of_strangers_are_judged_by_their_heads(tmp_path: Path) -> None:
    def refused(name: str, content: bytes) -> str:
        path = tmp_path / "upload"
        path.write_bytes(content)
        with pytest.raises(WebError) as error:
            open_picture(path, display_name(name), LIMITS)
        text = str(error.value)
        assert str(tmp_path) not in text and "\n" not in text and text.endswith(".")
        return text

    file = io.BytesIO()
    Image.new("1", (20000, 20000)).save(file, "PNG")  # 400 million pixels in a few bytes
    assert len(file.getvalue()) < 100_000
    assert "has more than 0.5 million pixels" in refused("bomb.png", file.getvalue())
    file = io.BytesIO()
    Image.new("RGB", (1000, 600)).save(file, "PNG")
    assert "has 1000x600 pixels, 0.6 million, and this page takes 0.5 million" in refused("a.png", file.getvalue())
    assert "more than 1 MB" in refused("a.png", bytes(1_000_001))
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    for content in (b"", b"GIF89a", b"<svg xmlns='http://www.w3.org/2000/svg'/>", postscript):
        assert "x?y.png cannot be read as an image" in refused("/etc/x\ny.png", content)
    assert display_name("..\\..\\a/b.png") == "b.png" and display_name("a/") == "picture"
    assert len(display_name("x" * 1000)) == 60


def test_work_answers_as_the_predictor_and_within_its_time(
    choices: dict[str, Choice], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.png"
    photographs()[0].save(path)
    work = RequestHandler(choices, LIMITS, tmp_path)
    expected = Predictor.from_pretrained(model_folder)(path, "instance", 0.1)[0]
    shown, files = work(request_of(path))
    assert expected.segments and np.array_equal(np.asarray(shown.draw()), np.asarray(expected.draw()))
    document = json.loads(files.document.read_text())
    assert document["segments"] == expected.to_json() and document["threshold"] == 0.1
    assert document["model"] == "tiny" and document["runtime"] == "torch"
    for changes, part in (
        ({"network": "abacus"}, "no runtime of that name"),
        ({"subtask": "magic"}, "subtask must be one of"),
        ({"threshold": float("nan")}, "threshold must be from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=part):
            work(request_of(path, **changes))
    assert json.loads(work(request_of(path, subtask="semantic"))[1].document.read_text())["threshold"] is None
    # A request over the time limit fails, and so does one that waits for it; then requests work again.
    release = threading.Event()
    network = choices["torch"].predictor.network
    run = network.run
    monkeypatch.setattr(network, "run", lambda values: (release.wait(60), run(values))[1])
    slow = RequestHandler(choices, replace(LIMITS, seconds=0.2), tmp_path)
    with pytest.raises(WebError, match="longer than 0.2 seconds"):
        slow(request_of(path))
    with pytest.raises(WebError, match="previous image is still being processed"):
        slow(request_of(path))
    release.set()
    slow.limits = LIMITS
    assert slow(request_of(path))[0].rows == shown.rows
    for one in (work, slow):
        one.close()


def test_only_what_was_uploaded_is_read(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any client may send the page's requests, with the path of any file, and with the address of one."""
    private, examples = tmp_path / "private.png", tmp_path / "examples"
    examples.mkdir()
    for path in (private, examples / "a.png"):
        photographs()[0].save(path)
    asked: list[str] = []

    async def download(url: str, *_: Any, **__: Any) -> str:
        asked.append(url)
        return str(private)

    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", download)
    marked = {"meta": {"_type": "gradio.FileData"}}
    with serving(Settings(str(model_folder), examples=examples, port=0)) as (address, _):
        folder = Path(os.environ["GRADIO_TEMP_DIR"])

        def post(place: str, body: bytes, kind: str = "application/json") -> Any:
            with urlopen(HttpRequest(f"{address}/gradio_api/{place}", body, {"Content-Type": kind})) as answer:
                return json.load(answer)

        def answer_to(given: dict[str, Any]) -> str:
            session = uuid.uuid4().hex
            document = {"data": [given, "torch", "instance", 0.1], "fn_index": segment["id"], "session_hash": session}
            post("queue/join", json.dumps(document).encode())
            with urlopen(f"{address}/gradio_api/queue/data?session_hash={session}", timeout=60) as lines:
                return next(line.decode() for line in lines if b"process_completed" in line)

        with urlopen(f"{address}/config") as answer:
            config = json.load(answer)
        segment = next(one for one in config["dependencies"] if len(one["inputs"]) == 4)
        (samples,) = (one["props"]["samples"] for one in config["components"] if one["type"] == "dataset")
        form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="b.png"\r\n\r\n%s\r\n--x--\r\n'
        (uploaded,) = post("upload", form % private.read_bytes(), "multipart/form-data; boundary=x")
        for given in (samples[0][0], {"path": uploaded}, {"path": uploaded, **marked}):
            assert "data-place" in answer_to(given)
        link, pipe = folder / "link.png", tmp_path / "pipe"
        link.symlink_to(private)
        os.mkfifo(pipe)
        for path in (private, link, pipe, folder / "none.png", folder / ".." / "x"):
            assert "did not come from this page: reload it." in answer_to({"path": str(path)}), path
        for path in (private, pipe):  # these are refused by Gradio
            assert "data-place" not in answer_to({"path": str(path), **marked})
        web_file = {"path": "http://192.0.2.1/large.png", **marked}
        for place in ("queue/join", "run/segment", "run/upload", "call/segment", "component_server"):
            for field in range(4):
                data: list[Any] = [None, "torch", "instance", 0.1]
                data[field] = [{"deep": web_file}] if field else web_file
                document = {"data": data, "fn_index": segment["id"], "session_hash": "x"}
                with pytest.raises(HTTPError) as refused:
                    post(place, json.dumps(document).encode())
                assert refused.value.code == 400 and b"no files from other addresses" in refused.value.read()
        with pytest.raises(HTTPError, match="400"):
            post("queue/join", b"[" * 500_000)
    assert not asked


def test_what_is_shown_is_remembered_small_and_labels_stay_text(tmp_path: Path) -> None:
    prediction = large_prediction()
    shown = view_of(prediction)
    assert shown.image.size == (LONGEST, 200) and sum(map(len, shown.masks)) < 10_000
    assert np.array_equal(np.asarray(shown.draw()), np.asarray(prediction.draw(LONGEST)))
    light = replace(prediction, stuff_ids={0})
    assert np.array_equal(np.asarray(view_of(light).draw()), np.asarray(light.draw(LONGEST)))
    assert not np.array_equal(np.asarray(light.draw(LONGEST)), np.asarray(prediction.draw(LONGEST)))
    assert [shown.row_at(*place) for place in ((60, 60), (120, 120), (180, 180), (300, 10), (-1, 0), (0, 200))] == [
        0, 0, 1, None, None, None
    ]  # fmt: skip
    assert shown.choose(1).chosen == 1 and shown.choose(1).choose(1).chosen is None and shown.choose(7).chosen is None
    assert [row.area for row in shown.rows] == [40000, 40000]
    text = legend_html(shown.choose(0)) + message_html(HOSTILE, wrong=True)
    assert "<script" not in text and "{{" not in text and "${" not in text and "`" not in text
    assert 'aria-pressed="true"' in text and 'role="alert"' in text
    files = write_downloads(prediction, {}, display_name(HOSTILE), tmp_path)
    with zipfile.ZipFile(files.masks) as archive:
        names = archive.namelist()
        assert [name for name in names if ".." in name or "\\" in name or "<" in name or name.startswith("/")] == []
        assert np.asarray(Image.open(archive.open(names[-1]))).sum() == 40000


@pytest.mark.slow  # exports a graph, because the networks are opened from real files
def test_what_a_folder_has_files_for_is_offered(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(exported(model_folder, outputs="semantic", size=(64, 96), batch=2), tmp_path / "graph")
    choices, notes = open_choices(str(model_folder), [str(tmp_path / "graph")])
    assert list(choices) == ["torch", "onnxruntime"] and not notes
    assert choices["torch"].predictor.subtasks == ("instance", "semantic", "panoptic")
    assert choices["onnxruntime"].predictor.subtasks == ("semantic",)
    # An engine that cannot run here gives a note, or an error if there is nothing else.
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for file in model_folder.iterdir():
        (mixed / file.name).symlink_to(file)
    (mixed / "model.engine").write_bytes(b"no engine")
    choices, notes = open_choices(str(mixed))
    assert list(choices) == ["torch"] and not notes  # it can execute any code, and nobody named it
    choices, notes = open_choices(str(model_folder), [str(mixed)])
    assert len(choices) == 2 and len(notes) == 1 and notes[0].startswith("Not offered: ")
    for file in mixed.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(PredictorError, match="if you trust where it comes from, choose the runtime tensorrt"):
        open_choices(str(mixed))
    with pytest.raises(PredictorError, match="engine.json"):
        open_choices(str(model_folder), [str(mixed)])
    config = json.loads((tmp_path / "graph" / "config.json").read_text())
    config["id2label"]["0"] = "other"
    config["label2id"] = {name: int(label) for label, name in config["id2label"].items()}
    (tmp_path / "graph" / "config.json").write_text(json.dumps(config))
    with pytest.raises(PredictorError, match="has other labels than"):
        open_choices(str(model_folder), [str(tmp_path / "graph")])


def test_mistakes_of_the_command_are_told(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def told_by(*arguments: object) -> str:
        try:
            status = main(["app", *map(str, arguments)])
        except SystemExit as error:
            status = int(error.code or 0)
        printed = capsys.readouterr().err
        assert status == 2 and printed.count("\n") == 1 and "Traceback" not in printed, printed
        return printed

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cannot be served at 127.0.0.1, port {port} (Address already in use)" in told_by(
            model_folder, "--port", port
        )
    assert "cannot be served at 192.0.2.1" in told_by(model_folder, "--host", "192.0.2.1", "--port", 0)
    assert "has no config.json" in told_by(tmp_path, "--port", 0)
    assert "There is no folder" in told_by(model_folder, "--examples", tmp_path / "none")
    assert "There is no image in" in told_by(model_folder, "--examples", tmp_path, "--port", 0)
    assert "not a port" in told_by(model_folder, "--port", "80000")
    assert "not a number above 0" in told_by(model_folder, "--time-limit", "nan")
    assert "'89.5' is more than the 89 that Pillow" in told_by(model_folder, "--max-megapixels", "89.5")
    assert web.main({}) == 2 and "set FAIM2F_MODEL" in capsys.readouterr().err
    assert web.main({"FAIM2F_MODEL": "x", "GRADIO_SERVER_PORT": "many"}) == 2
    settings = web.settings_of({"FAIM2F_MODEL": "x", "GRADIO_SERVER_NAME": "0.0.0.0", "FAIM2F_EXPORTS": "a, b"})
    assert settings.host == "0.0.0.0" and settings.exports == ("a", "b") and settings.port == 7860
    assert free_port("127.0.0.1", 0) > 0 and web.settings_of({"FAIM2F_MODEL": "x"}).host == "127.0.0.1"


def test_examples_are_pictures_that_the_page_takes(tmp_path: Path) -> None:
    assert example_pictures(None, {0: "sky"}, LIMITS, tmp_path) == []
    Image.new("RGB", (30, 20)).save(tmp_path / "b.png")
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg")
    assert [path.name for path in example_pictures(tmp_path, {0: "sky"}, LIMITS, tmp_path)] == ["a.jpg", "b.png"]
    Image.new("RGB", (1000, 1000)).save(tmp_path / "c.png")
    with pytest.raises(WebError, match="c.png has 1000x1000 pixels"):
        example_pictures(tmp_path, {0: "sky"}, LIMITS, tmp_path)


def test_alone_is_the_segment_on_what_is_dark() -> None:
    image = Image.new("RGB", (120, 80), (100, 120, 140))
    masks = torch.zeros(1, 80, 120, dtype=torch.bool)
    masks[0, 10:70, 10:60] = True
    segments = Segments(masks, torch.tensor([3]))
    full, alone = (np.asarray(draw(image, segments, {3: "cat"})) for draw in (draw_segments, draw_alone))
    assert np.array_equal(alone[10:70, 10:60], full[10:70, 10:60])
    assert np.abs(alone[:, 70:] - (1 - DARKNESS) * np.array([100, 120, 140])).max() <= 1
    with pytest.raises(ValueError, match="they must agree"):
        draw_alone(image.resize((20, 20)), segments, {})


def test_the_drawing_library_reads_transformers_answers_the_same() -> None:
    segmentation = torch.tensor([[0, 0, 1], [0, 2, 2]])
    info = [{"id": 1, "label_id": 5, "score": 0.5}, {"id": 2, "label_id": 4, "score": 0.9}]
    answer = {"segmentation": segmentation, "segments_info": info}
    ours = segments_of_panoptic(answer)
    theirs = supervision().Detections.from_transformers(answer, id2label={4: "cow", 5: "cat"})
    assert np.array_equal(theirs.mask.astype(bool), ours.masks.numpy())
    assert theirs.class_id.tolist() == ours.class_ids.tolist()
    assert np.allclose(theirs.confidence, ours.scores.numpy())

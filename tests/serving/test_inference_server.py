"""`faim2f serve`: the Hub's interface with its real client, batching, rejected requests, and shutdown."""

import asyncio
import base64
import contextlib
import http.client
import io
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import InferenceClient
from PIL import Image
from pycocotools import mask as coco
from torch import Tensor
from transformers import pipeline

from hf_faim2f import FaiM2FConfig, FaiM2FImageProcessor, Predictor
from hf_faim2f.cli import main
from hf_faim2f.cli.serve import build_parser
from hf_faim2f.errors import PredictorError
from hf_faim2f.model.inference_api_faim2f import Parameters, RequestError, open_picture
from hf_faim2f.runtime.backends import Network
from hf_faim2f.serving.batching import Batcher, BoundedFile, Job
from hf_faim2f.serving.inference_server import TOKEN, InferenceServer, ServeSettings, token_for
from hf_faim2f.serving.requests import Limits
from tests.support.shipped_digits import complete_digits
from tests.support.weights_server import go_online

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from hf_faim2f.serving.inference import FACTS, LOGGER, HeldResponse, JsonLines, _picture_and_parameters

ROOT = Path(__file__).parents[2]
SCENE = ROOT / "docs" / "images" / "scene.jpg"
LIMITS = Limits(megabytes=1, megapixels=0.5, seconds=30, waiting=64)
COLORS = 16
POISON = COLORS - 1  # the network fails on batches with this color


class Reader:
    """A network that finds one segment in every picture: it covers the picture, and its class is the picture's
    color."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.is_held, self.held = False, threading.Event()
        self.held.set()

    def __call__(self, batch: Tensor) -> dict[str, Tensor]:
        self.is_held = not self.held.is_set()
        assert self.held.wait(60)
        colors = (batch[:, 0].mean((1, 2)) * COLORS).long()
        if POISON in colors:
            raise RuntimeError("poison")
        self.batches.append(len(batch))
        classes = torch.full((len(batch), 2, COLORS + 1), -20.0)
        classes[:, 1, COLORS] = 20.0  # the second query finds nothing
        classes[torch.arange(len(batch)), 0, colors] = 20.0
        masks = torch.full((len(batch), 2, batch.shape[2] // 4, batch.shape[3] // 4), 20.0)
        return {"class_queries_logits": classes, "masks_queries_logits": masks}

    def predictor(self, channels: int = 3, **more: Any) -> Predictor:
        names = {number: f"color {number}" for number in range(COLORS)}
        config = FaiM2FConfig(id2label=names, num_queries=2)
        size = {"shortest_edge": 32, "longest_edge": 64}
        processor = FaiM2FImageProcessor(size=size, do_normalize=False, num_channels=channels)
        return Predictor(Network("reader", config, processor, self, usual_batch=8, **more))


def picture(color: int, width: int = 40, height: int = 40) -> bytes:
    """A PNG file of one color."""
    return as_png(Image.new("RGB", (width, height), ((256 * color + 128) // COLORS,) * 3))


def as_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@contextlib.contextmanager
def running(server: InferenceServer) -> Iterator[InferenceServer]:
    """Runs a server in a thread."""
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        until(lambda: server.uvicorn.started)
        yield server
    finally:
        server.stop()
        thread.join(60)
        assert not thread.is_alive()


def until(is_true: Callable[[], object]) -> None:
    ends = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < ends
        time.sleep(0.005)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return complete_digits(tmp_path_factory.mktemp("serve") / "digits")


@pytest.fixture
def reader() -> Reader:
    return Reader()


@pytest.fixture
def server(reader: Reader) -> Iterator[InferenceServer]:
    with running(InferenceServer(ServeSettings("", port=0, limits=LIMITS), reader.predictor())) as server:
        yield server
        reader.held.set()


def ask(
    server: InferenceServer, body: bytes | None = None, path: str = "/", method: str = "POST", **headers: str
) -> tuple[int, dict[str, str], Any]:
    """Sends a request; returns its status, headers and document."""
    host, _, port = server.address.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        text = response.read()
        own = {name.lower(): value for name, value in response.getheaders()}
        return response.status, own, json.loads(text) if own["content-type"] == "application/json" else text.decode()
    finally:
        connection.close()


def masks_of(document: list[dict[str, Any]]) -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one["mask"])))) for one in document]


def test_the_hub_s_client_gets_the_answers_of_transformers_pipeline(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = pipeline("image-segmentation", model=str(digits), trust_remote_code=True, device="cpu")
    go_online(monkeypatch)
    requests: list[tuple[Any, dict[str, Any]]] = [
        (str(SCENE), {}),
        (SCENE.read_bytes(), {"subtask": "instance"}),
        (as_png(Image.open(SCENE).crop((60, 20, 330, 300))), {"subtask": "semantic"}),
        (SCENE, {"subtask": "panoptic", "threshold": 0.2, "mask_threshold": 0.7, "overlap_mask_area_threshold": 0.1}),
        (SCENE, {"subtask": "instance", "threshold": 0.0}),
        (as_png(Image.open(SCENE).convert("L")), {"threshold": 1.0}),
    ]
    with running(InferenceServer(ServeSettings(str(digits), port=0))) as server:
        client = InferenceClient(server.address)
        for given, parameters in requests:
            found = client.image_segmentation(given, **parameters)
            opened: Any = Image.open(io.BytesIO(given)) if isinstance(given, bytes) else str(given)
            wanted = expected(opened, **parameters)
            assert [one.label for one in found] == [one["label"] for one in wanted]
            assert found or parameters == {"threshold": 1.0}
            for one, other in zip(found, wanted, strict=True):
                assert one.score == (None if other["score"] is None else pytest.approx(other["score"], abs=1e-5))
                assert one.mask.mode == "L" and np.array_equal(np.asarray(one.mask), np.asarray(other["mask"]))
        with pytest.raises(Exception, match="threshold must be a number from 0 to 1, not 3"):
            client.image_segmentation(SCENE, threshold=3)
        # The same masks as run lengths, for clients that accept only JSON.
        body = SCENE.read_bytes()
        _, _, as_pictures = ask(server, body, "/?subtask=instance&threshold=0.5", content_type="image/jpeg")
        status, headers, lengths = ask(server, body, "/?subtask=instance&threshold=0.5", accept="application/json")
        assert status == 200 and headers["content-type"] == "application/json" and len(lengths) == len(as_pictures) > 3
        for one, other, mask in zip(lengths, as_pictures, masks_of(as_pictures), strict=True):
            assert (one["label"], one["score"]) == (other["label"], other["score"])
            assert np.array_equal(coco.decode(one["mask"]), mask // 255)


@pytest.mark.parametrize(
    ("accept", "as_run_lengths"),
    [
        ("Application/JSON", True),
        ("application/json, */*;q=0", True),
        ("application/json;q=0, image/png", False),
        ("application/json, */*; q=0.1", False),
        ("application/jsonl", False),
    ],
)
def test_masks_are_what_the_client_accepts(server: InferenceServer, accept: str, as_run_lengths: bool) -> None:
    (segment,) = ask(server, picture(3), accept=accept)[2]
    assert isinstance(segment["mask"], dict) == as_run_lengths


def test_batches_never_swap_answers(server: InferenceServer, reader: Reader) -> None:
    """64 concurrent clients, with pictures of three sizes at the network, identified by color and size."""
    sizes = [(40, 40), (41, 80), (90, 45), (39, 39)]
    asked = [(number % POISON, *sizes[number % 4]) for number in range(128)]

    def segment(given: tuple[int, int, int]) -> str:
        name = f"{given[0]}-{given[1]}"
        status, headers, found = ask(server, picture(*given), content_type="image/png", x_request_id=name)
        assert status == 200 and headers["x-request-id"] == name
        assert [one["label"] for one in found] == [f"color {given[0]}"] and found[0]["score"] > 0.99
        (mask,) = masks_of(found)
        assert mask.shape == given[2:0:-1] and mask.all()
        return name

    with ThreadPoolExecutor(64) as clients:
        assert list(clients.map(segment, asked)) == [f"{color}-{width}" for color, width, _ in asked]
    assert sum(reader.batches) == 1 + len(asked) and max(reader.batches) > 1  # one is the warm-up
    text = ask(server, method="GET", path="/metrics")[2]
    assert 'faim2f_requests_total{status="200"} 128.0' in text and "faim2f_accepted_requests 0.0" in text
    assert f"faim2f_batch_images_count {len(reader.batches) - 1:.1f}" in text
    assert "faim2f_batch_images_sum 128.0" in text


def test_a_fault_stays_with_its_request(
    server: InferenceServer, reader: Reader, caplog: pytest.LogCaptureFixture
) -> None:
    reader.held.clear()
    with ThreadPoolExecutor(7) as clients:
        first = clients.submit(ask, server, picture(0))
        until(lambda: reader.is_held)
        answers = [clients.submit(ask, server, picture(color)) for color in (1, POISON, 2, 3, POISON, 4)]
        until(lambda: sum(map(len, server.batcher.groups.values())) == 6)  # they form one batch
        reader.held.set()
        assert first.result()[0] == 200
        found = [answer.result() for answer in answers]
    assert [status for status, _, _ in found] == [200, 500, 200, 200, 500, 200]
    assert [found[place][2][0]["label"] for place in (0, 2, 3, 5)] == ["color 1", "color 2", "color 3", "color 4"]
    assert list(found[1][2]) == ["error"] and found[1][2]["error"].startswith("The server failed on this image;")
    logged = [record.facts["request"] for record in caplog.records if record.exc_info]
    assert sorted(logged) == sorted(found[place][1]["x-request-id"] for place in (1, 4))


def bomb() -> bytes:
    return as_png(Image.new("1", (20000, 20000)))  # 400 million pixels in a few bytes


def as_json(inputs: object, **more: object) -> bytes:
    inputs = base64.b64encode(inputs).decode() if isinstance(inputs, bytes) else inputs
    return json.dumps({"inputs": inputs, **more}).encode()


JSON = {"content_type": "application/json"}
REFUSED: dict[str, tuple[bytes, dict[str, str], int, str]] = {
    "nothing": (b"", {}, 400, "cannot be read as an image"),
    "no picture": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", {}, 400, "cannot be read as an image"),
    "a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", {}, 400, "cannot be read as an image"),
    "truncated": (picture(1)[:-40], {}, 400, "The file cannot be decoded"),
    "pixels": (picture(1, 1000, 600), {}, 413, "has 1000x600 pixels, 0.6 million, and this server takes 0.5 million"),
    "a bomb": (bomb(), {}, 413, "has more than 0.5 million pixels"),
    "a strip": (picture(1, 100_000, 1), {}, 400, "would be resized to"),
    "bytes": (bytes(1_000_001), {}, 413, "has more than 1 MB"),
    "many bytes": (bytes(3_000_000), JSON, 413, "has more than 1 MB"),
    "bytes in base64": (as_json(bytes(1_000_001)), JSON, 413, "has more than 1 MB"),
    "type": (picture(1), {"content_type": "text/plain"}, 415, "The content type 'text/plain' is not supported"),
    "form": (picture(1), {"content_type": "multipart/form-data; boundary=x"}, 415, "is not supported"),
    "packed": (picture(1), {"content_encoding": "gzip"}, 415, "without Content-Encoding"),
    "no JSON": (b"{", JSON, 400, "The body is not valid JSON"),
    "deep": (b"[" * 1000, JSON, 400, "The body is not valid JSON"),
    "deeper": (b"[" * 500_000, JSON, 400, "The body has too many values"),
    "lists": (as_json([[]]), JSON, 400, "inputs must be an image's file in base64, not a list."),
    "no UTF-8": (b'{"inputs": "\xff"}', JSON, 400, "The body is not valid JSON"),
    "no inputs": (b'{"image": "x"}', JSON, 400, "has no field inputs"),
    "no object": (b'["inputs"]', JSON, 400, "has no field inputs"),
    "no base64": (as_json("a picture"), JSON, 400, "inputs is not base64"),
    "an address": (as_json("https://example.com/cat.jpg"), JSON, 400, "nothing is fetched from other hosts"),
    "a number": (as_json(5), JSON, 400, "inputs must be an image's file in base64, not 5"),
    "parameters": (as_json("", parameters=[1]), JSON, 400, "parameters must be an object"),
    "unknown": (as_json("", parameters={"treshold": 1}), JSON, 400, "no parameter 'treshold': choose from subtask"),
    "subtask": (as_json("", parameters={"subtask": ["x"]}), JSON, 400, "subtask must be one of panoptic, instance"),
    "NaN": (as_json("", parameters={"threshold": float("nan")}), JSON, 400, "threshold must be a number from 0 to 1"),
    "a field": (as_json("", parameter={"threshold": 1}), JSON, 400, "no field 'parameter': put settings into"),
    "beside": (as_json("", threshold=0.3), JSON, 400, "threshold is next to the field parameters: put it inside"),
    "range": (as_json("", parameters={"mask_threshold": -1}), JSON, 400, "mask_threshold must be a number"),
    "bool": (as_json("", parameters={"overlap_mask_area_threshold": True}), JSON, 400, "must be a number"),
    "twice": (b'{"inputs": "", "inputs": "x"}', JSON, 400, "more than once"),
    "twice inside": (
        b'{"inputs": "", "parameters": {"threshold": 0.1, "threshold": 0.9}}',
        JSON,
        400,
        "more than once",
    ),
    "long": (as_json("", parameters={"subtask": "x" * 9999}), JSON, 400, "..."),
}


def test_what_is_wrong_is_refused_in_one_sentence(server: InferenceServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    for kind, (body, headers, status, part) in REFUSED.items():
        found, own, document = ask(server, body, **headers)
        assert (found, list(document)) == (status, ["error"]) and part in document["error"], (kind, found, document)
        text = document["error"]
        assert "\n" not in text and text.endswith((".", "...")) and len(text) < 300 and "Traceback" not in text, kind
        assert own["content-type"] == "application/json" and own["x-content-type-options"] == "nosniff"
    assert ask(server, picture(3), "/?threshold=x")[0] == 400
    assert "more than once" in ask(server, picture(3), "/?threshold=0.1&threshold=0.9")[2]["error"]
    assert ask(server, picture(3), "/?threshold=0.5&subtask=semantic")[2][0]["score"] is None
    assert ask(server, as_json(picture(3), parameters=None, options={"use_cache": True}), **JSON)[0] == 200
    data_url = f"data:image/png;base64,{base64.b64encode(picture(4)).decode()}"
    assert ask(server, as_json(data_url, parameters={"threshold": None}), **JSON)[2][0]["label"] == "color 4"
    for path, method, status in (
        ("/a", "POST", 404),
        ("/", "GET", 405),
        ("/docs", "GET", 404),
        ("/health", "PUT", 405),
    ):
        found, own, document = ask(server, None, path, method)
        assert (own.get("allow") is not None) == (status == 405)
        assert found == status and "GET /health, /ready or /metrics" in document["error"]
    assert ask(server, None, "/health", "GET")[2] == {"status": "ok"}
    assert ask(server, None, "/ready", "GET")[2] == {"status": "ready"}
    assert server.app.accepted == 0 and server.batcher.is_alive
    # One JSON line per request, with its facts but not its content; none for the operators' paths.
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records if record.name == LOGGER]
    assert len(lines) == len(REFUSED) + 9 and all(line["message"] == "request" for line in lines)
    assert {"time", "level", "request", "method", "path", "status", "seconds"} <= set(lines[0])
    good = [line for line in lines if line["status"] == 200]
    assert len(good) == 3 and all((line["height"], line["width"], line["segments"]) == (40, 40, 1) for line in good)
    text = json.dumps(lines)
    assert "EPSF" not in text and base64.b64encode(picture(4)).decode()[:40] not in text


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (4, "RGBA")])
def test_models_of_other_channels_are_served(channels: int, mode: str, reader: Reader) -> None:
    settings = ServeSettings("", port=0, limits=LIMITS)
    with running(InferenceServer(settings, reader.predictor(channels))) as server:
        assert reader.batches == [1]
        body = as_png(Image.open(io.BytesIO(picture(3))).convert(mode))
        assert [one["label"] for one in ask(server, body)[2]] == ["color 3"]


def test_a_network_of_other_sizes_is_not_warmed_up(reader: Reader, caplog: pytest.LogCaptureFixture) -> None:
    predictor = reader.predictor(sizes=((32, 48), (32, 64)))
    with running(InferenceServer(ServeSettings("", port=0, limits=LIMITS), predictor)) as server:
        assert not reader.batches and "takes longer: image 0 was prepared as 32x32 pixels" in caplog.text
        assert ask(server, picture(3, 60, 40))[2][0]["label"] == "color 3"


@pytest.mark.parametrize(
    "body",
    [
        b'{"inputs": [' + b"[]," * 400_000 + b"[]]}",
        b'{"inputs": ' + b"[" * 500_000,
        b'{"inputs": "", "options": [' + b'"ab",' * 200_000 + b"1]}",
        json.dumps({"inputs": "", "options": {str(number): number for number in range(100_000)}}).encode(),
        b'{"inputs": "", "parameters": {"subtask": "' + b"\\u00e4" * 200_000 + b'"}}',
        b'{"inputs": [[[]]]}',
    ],
)  # fmt: skip
def test_json_takes_little_more_memory_than_its_size(body: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(RequestError) as refused:
            _picture_and_parameters(True, body, [])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * len(body) + 100_000 and len(str(refused.value)) < 150, (peak, len(body))
    assert "[]" not in str(refused.value)


def test_parameters_of_the_address_count_beside_those_of_the_body() -> None:
    query = [("threshold", "0.3")]
    for body in (as_json(b"x", parameters={"subtask": "instance"}), as_json(b"x", parameters=None), as_json(b"x")):
        assert _picture_and_parameters(True, body, query)[1].threshold == 0.3
    assert (
        _picture_and_parameters(True, as_json(b"x", parameters={"subtask": "instance"}), query)[1].subtask == "instance"
    )
    with pytest.raises(RequestError, match="'threshold' is in the address and in parameters: leave it out of one"):
        _picture_and_parameters(True, as_json(b"x", parameters={"threshold": 0.2}), query)


def test_a_full_queue_and_a_client_that_leaves(server: InferenceServer, reader: Reader) -> None:
    server.app.limits = Limits(megabytes=1, megapixels=0.5, seconds=30, waiting=3)
    reader.held.clear()
    host, _, port = server.address.removeprefix("http://").partition(":")
    body = picture(5)
    head = f"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    leaving = [socket.create_connection((host, int(port))) for _ in range(2)]
    for connection in leaving:
        connection.sendall(head + body)
    sending = socket.create_connection((host, int(port)))
    sending.sendall(head + body[:10])  # takes a slot, too
    until(lambda: server.app.accepted == 3)
    status, headers, document = ask(server, body)
    assert status == 503 and headers["retry-after"] == "1" and "is busy with 3 requests" in document["error"]
    assert ask(server, None, "/health", "GET")[0] == 200
    for connection in (*leaving, sending):
        connection.close()
    until(lambda: server.app.accepted == 0)
    reader.held.set()
    assert ask(server, body)[2][0]["label"] == "color 5"
    assert sum(reader.batches) <= 1 + 1 + 2  # the warm-up, this picture, and those already at the network
    assert 'faim2f_requests_total{status="499"} 3.0' in ask(server, None, "/metrics", "GET")[2]


def test_what_takes_too_long_is_given_up(server: InferenceServer, reader: Reader) -> None:
    server.app.limits = Limits(megabytes=1, megapixels=0.5, seconds=0.3)
    reader.held.clear()
    for _ in range(2):
        status, _, document = ask(server, picture(6))
        assert status == 504 and "longer than 0.3 seconds and was stopped" in document["error"]
    host, _, port = server.address.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as slow:
        slow.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nx")
        answer = slow.makefile("rb").readline()
    assert b" 408 " in answer
    reader.held.set()
    server.app.limits = LIMITS
    assert ask(server, picture(7))[2][0]["label"] == "color 7"
    until(lambda: server.app.accepted == 0)


def test_a_cancelled_job_holds_no_data(reader: Reader) -> None:
    """In the queue of any stage; the queue of requests, which bounds the memory, no longer counts it."""
    batcher = Batcher(reader.predictor(), batch_size=1)
    outputs: list[weakref.ref[Tensor]] = []
    run = batcher.predictor._run

    def watched(values: list[Tensor]) -> list[dict[str, Tensor]]:
        made = run(values)
        outputs.extend(weakref.ref(own["masks_queries_logits"]) for own in made)
        return made

    batcher.predictor._run = watched  # type: ignore[method-assign]
    busy = threading.Event()

    def submitted() -> Job:
        job = Job(picture(5), Parameters())
        batcher.submit(job)
        return job

    for _ in range(2):
        batcher.decoding.submit(busy.wait, 60)
    encoded = submitted()
    encoded.answer.cancel()
    assert encoded.picture == b""
    busy.set()
    reader.held.clear()
    running = submitted()
    until(lambda: reader.is_held)
    decoded = submitted()
    until(lambda: decoded.arrived)
    decoded.answer.cancel()
    assert decoded.values is None
    busy.clear()
    for _ in range(2):
        batcher.answering.submit(busy.wait, 60)
    reader.held.set()
    until(lambda: "waited" in running.facts)
    assert outputs[0]() is not None
    running.answer.cancel()
    until(lambda: outputs[0]() is None)
    busy.set()
    assert json.loads(submitted().answer.result(60))[0]["label"] == "color 5"
    batcher.close()


def test_decoding_ends_with_its_time() -> None:
    """Some small files take hours to decode: Pillow reads a file in chunks, and reading fails after the time limit."""
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "JPEG", progressive=True, quality=95)
    job = Job(file.getvalue(), Parameters(), seconds=60)
    opened = open_picture(BoundedFile(job))
    opened.decodermaxblock = 1 << 12
    job.started -= 60
    with pytest.raises(RequestError, match="longer than 60 seconds"):
        opened.load()


def test_an_answer_keeps_its_place_until_it_is_taken() -> None:
    released, sent = [], []

    async def send_slowly(message: dict[str, Any]) -> None:
        sent.append(message)
        if len(sent) == 3:
            await asyncio.sleep(60)

    scope: dict[str, Any] = {FACTS: {}}
    response = HeldResponse(bytes(1 << 20), 0.1, lambda: released.append(len(sent)))
    asyncio.run(response(scope, None, send_slowly))
    assert released == [3] and "did not receive the answer" in scope[FACTS]["error"]


def test_other_hosts_need_a_token(
    reader: Reader, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    assert main(["serve", "none", "--host", "0.0.0.0"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and f"set {TOKEN} to a token" in said.err
    monkeypatch.setenv(TOKEN, "short")
    assert main(["serve", "none"]) == 2 and "at least 16" in capsys.readouterr().err
    token = "a-token-of-many-letters"
    monkeypatch.setenv(TOKEN, token)
    assert token_for("0.0.0.0") == token
    with running(InferenceServer(ServeSettings("", host="0.0.0.0", port=0), reader.predictor())) as server:
        for headers in ({}, {"authorization": "Bearer a-token-of-many-letterz"}, {"authorization": f"Basic {token}"}):
            status, own, document = ask(server, picture(1), **headers)
            assert status == 401 and own["www-authenticate"] == "Bearer" and "requires its token" in document["error"]
            assert ask(server, None, "/metrics", "GET", **headers)[0] == 401
        assert ask(server, None, "/health", "GET")[0] == ask(server, None, "/ready", "GET")[0] == 200
        assert ask(server, picture(1), authorization=f"bearer {token}")[2][0]["label"] == "color 1"
        go_online(monkeypatch)
        client = InferenceClient(server.address.replace("0.0.0.0", "127.0.0.1"), token=token)
        assert client.image_segmentation(picture(2))[0].label == "color 2"


def test_mistakes_of_the_operator(reader: Reader, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["serve", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with running(InferenceServer(ServeSettings("", port=0), reader.predictor())) as server:
        port = int(server.address.rpartition(":")[2])
        with pytest.raises(OSError, match=f"cannot be served at 127.0.0.1, port {port}"):
            InferenceServer(ServeSettings("", port=port), reader.predictor())
    predictor = reader.predictor()
    predictor.network.outputs = "instances"
    with pytest.raises(PredictorError, match="export it with the outputs logits"):
        Batcher(predictor)
    with pytest.raises(SystemExit) as stop:
        main(["serve", "x", "--queue", "0"])
    assert stop.value.code == 2


@pytest.mark.slow  # starts the command
def test_sigterm_finishes_what_was_accepted(digits: Path) -> None:
    command = [sys.executable, "-m", "hf_faim2f.cli", "serve", str(digits), "--port", "0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            line = process.stdout.readline()
            found = re.fullmatch(r"The model is at http://(127\.0\.0\.1):(\d+) \(Ctrl\+C ends it\)\.\n", line)
            assert found, (line, process.stderr.read() if not line else "")
            body = SCENE.read_bytes()
            connections = [http.client.HTTPConnection(found[1], int(found[2]), timeout=120) for _ in range(12)]
            for connection in connections:
                connection.request("POST", "/", body, {"Content-Type": "image/jpeg"})
            probe = http.client.HTTPConnection(found[1], int(found[2]), timeout=120)

            def count(pattern: str) -> int:
                probe.request("GET", "/metrics")
                counted = re.search(pattern, probe.getresponse().read().decode())
                return int(counted[1]) if counted else 0

            until(lambda: count(r"faim2f_accepted_requests (\d+)") + count(r'total\{status="200"\} (\d+)') >= 12)
            assert count(r"faim2f_accepted_requests (\d+)") > 0
            process.send_signal(signal.SIGTERM)
            answers = [connection.getresponse() for connection in connections]
            documents = [json.loads(answer.read()) for answer in answers]
            assert [answer.status for answer in answers] == [200] * 12 and all(documents)
            assert process.wait(120) == 0
            log = process.stderr.read()
            lines = [json.loads(one) for one in log.splitlines() if one.startswith("{")]
            assert sum(one["message"] == "request" for one in lines) == 12 and "Traceback" not in log
        finally:
            process.kill()


@pytest.mark.large
@pytest.mark.slow  # half a minute of load
@pytest.mark.newest_only
def test_a_load_loses_and_doubles_nothing() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "serve.py"), "--clients", "64", "--seconds", "30"]
    done = subprocess.run(
        [*command, "--own-seconds", "1", "--json"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    found = json.loads(done.stdout) if done.stdout else {}
    assert done.returncode == 0 and found["problems"] == [], (found, done.stderr)
    assert found["answered"] == found["sent"] == found["counted_by_server"] >= 64 and found["images_a_batch"] > 1


def test_the_container_runs_the_command_as_an_ordinary_user() -> None:
    lines = (ROOT / "examples" / "serve" / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    last = dict(steps)
    words = [*json.loads(last["ENTRYPOINT"]), *json.loads(last["CMD"])]
    assert words[:2] == ["faim2f", "serve"]
    options = build_parser().parse_args(words[2:])
    assert (options.host, str(options.port)) == ("0.0.0.0", last["EXPOSE"])
    assert last["USER"] not in ("root", "0") and f"127.0.0.1:{options.port}/ready" in last["HEALTHCHECK"]
    assert last["STOPSIGNAL"] == "SIGTERM"
    copied = [name for step, rest in steps if step == "COPY" for name in rest.split()[:-1]]
    assert copied and all((ROOT / name).exists() for name in copied)


@pytest.mark.slow
@pytest.mark.newest_only
@pytest.mark.skipif(shutil.which("docker") is None, reason="needs Docker, to build the container")
def test_the_container_is_built() -> None:
    dockerfile = (ROOT / "examples" / "serve" / "Dockerfile").read_text()
    base = next(line.split()[1] for line in dockerfile.splitlines() if line.startswith("FROM "))
    if subprocess.run(["docker", "image", "inspect", base], capture_output=True, check=False).returncode:
        pytest.skip(f"needs Docker with the image {base}, and tests download nothing")
    subprocess.run(["docker", "build", "-f", "examples/serve/Dockerfile", "."], cwd=ROOT, check=True)

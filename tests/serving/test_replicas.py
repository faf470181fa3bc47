"""`faim2f serve --ray`: requests whose replica dies, with a real Ray, and with handles that fail like Ray's."""

import asyncio
import http.client
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from hf_faim2f.cli import main
from hf_faim2f.cli.serve import build_parser
from hf_faim2f.errors import BulkError
from hf_faim2f.model.inference_api_faim2f import Parameters, RequestError
from hf_faim2f.serving.batching import Job
from hf_faim2f.serving.inference_server import InferenceServer, ServeSettings
from hf_faim2f.serving.requests import Limits
from tests.support.lively_model import photographs, save_model

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("ray.serve", reason="needs Ray Serve: pip install 'ray[serve]'", exc_type=ImportError)

import ray.exceptions
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from hf_faim2f.serving.inference import InferenceApp, Metrics
from hf_faim2f.serving.replicas import ATTEMPTS, Outcome, RayBatcher, application_name, room_for

PATIENCE = 300  # seconds; Ray starts slowly on a loaded machine
CLIENTS, REQUESTS = 8, 80


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("replicas") / "model")


def pictures() -> list[bytes]:
    files = []
    for image in photographs():
        file = io.BytesIO()
        image.save(file, "PNG")
        files.append(file.getvalue())
    return files


def ask(port: int, body: bytes | None, name: str = "x", path: str = "/?threshold=0.1") -> tuple[int, str, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("GET" if body is None else "POST", path, body, {"X-Request-Id": name})
        answer = connection.getresponse()
        return answer.status, answer.headers["x-request-id"], answer.read()
    finally:
        connection.close()


@pytest.fixture(scope="module")
def expected(model: Path) -> list[bytes]:
    """The answers of the server without Ray."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the replicas
    server = InferenceServer(ServeSettings(str(model), port=0))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        answers = [ask(int(server.address.rpartition(":")[2]), file) for file in pictures()]
    finally:
        server.stop()
        thread.join()
        torch.set_num_threads(threads)
    assert [status for status, _, _ in answers] == [200] * len(answers)
    return [body for _, _, body in answers]


class Command:
    """`faim2f serve --ray local` with two replicas of one thread each."""

    def __init__(self, model: Path, log: Path) -> None:
        self.ray = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # socket addresses have at most 107 characters
        self.log = log
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_TMPDIR": str(self.ray), "PYTHONUNBUFFERED": "1"}
        environment.pop("RAY_ADDRESS", None)
        words = [sys.executable, "-m", "hf_faim2f.cli", "serve", str(model), "--port", "0", "--time-limit", "300"]
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [*words, "--ray", "local", "--replicas", "2"], stdout=subprocess.PIPE, stderr=errors, text=True,
                env=environment,
            )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.fullmatch(r"The model is at http://127\.0\.0\.1:(\d+) \(Ctrl\+C ends it\)\.\n", line)
        assert found, (line, log.read_text())
        self.port = int(found[1])

    def replicas(self) -> list[psutil.Process]:
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if child.cmdline()[0].startswith("ray::ServeReplica") and child.status() != psutil.STATUS_ZOMBIE:
                    found.append(child)
            except (psutil.Error, IndexError):
                continue
        return found

    def close(self) -> None:
        family = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.process.kill()
        self.process.communicate()
        for child in family:
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue
        shutil.rmtree(self.ray, ignore_errors=True)


@pytest.fixture
def command(model: Path, tmp_path: Path) -> Iterator[Command]:
    if sys.platform != "linux":
        pytest.skip("Processes are killed as Linux does it.")
    command = Command(model, tmp_path / "log")
    try:
        yield command
    finally:
        command.close()


@pytest.mark.large
@pytest.mark.slow  # Ray takes seconds to start, here and in each replica
def both(command: Command) -> list[psutil.Process]:
    """The two replicas, once both have started."""
    ends = time.monotonic() + PATIENCE
    while len(found := command.replicas()) < 2:
        assert time.monotonic() < ends
        time.sleep(0.1)
    return found


def test_a_killed_replica_loses_no_request(command: Command, expected: list[bytes]) -> None:
    files = pictures()
    first = both(command)
    done: list[int] = []

    def segment(number: int) -> tuple[int, str, bytes]:
        answer = ask(command.port, files[number % len(files)], str(number))
        done.append(number)
        return answer

    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = [clients.submit(segment, number) for number in range(REQUESTS)]
        while len(done) < REQUESTS // 4:  # every client is waiting for an answer
            time.sleep(0.001)
        first[0].kill()
        found = [answer.result() for answer in answers]
    assert len(done) == REQUESTS and command.process.poll() is None
    for number, (status, name, body) in enumerate(found):
        assert (status, name) == (200, str(number)), body
        assert body == expected[number % len(files)]
    # Its requests were retried on the other one, the HTTP interface did not change, and a new replica replaces it.
    assert f'faim2f_requests_total{{status="200"}} {REQUESTS}.0' in ask(command.port, None, path="/metrics")[2].decode()
    lines = [json.loads(line) for line in command.log.read_text().splitlines() if line.startswith("{")]
    assert sum(line["message"] == "request" for line in lines) == REQUESTS
    assert 1 <= sum(line["message"] == "A replica died with a request." for line in lines) <= CLIENTS
    both(command)
    assert ask(command.port, files[0])[2] == expected[0]
    assert ask(command.port, b"no picture")[0] == 400
    assert ask(command.port, None, path="/ready")[0] == 200
    command.process.send_signal(signal.SIGTERM)
    assert command.process.wait(PATIENCE) == 0
    assert "Traceback" not in command.log.read_text()


class Response:
    """The response of a Ray handle, which can be awaited once."""

    def __init__(self, result: Any) -> None:
        self.result, self.cancelled = result, False

    def __await__(self) -> Iterator[Any]:
        return self._wait().__await__()

    async def _wait(self) -> Any:
        if isinstance(self.result, float):
            await asyncio.sleep(self.result)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """A deployment handle whose calls return or raise the given results in turn."""

    def __init__(self, *results: Any) -> None:
        self.segment = self
        self.results, self.responses = list(results), list[Response]()
        self.asked: list[tuple[Any, ...]] = []

    def remote(self, *arguments: Any) -> Response:
        self.asked.append(arguments)
        self.responses.append(Response(self.results.pop(0)))
        return self.responses[-1]


def batcher_of(handle: Handle, batches: list[tuple[int, float]]) -> RayBatcher:
    batcher = object.__new__(RayBatcher)
    batcher.handle, batcher.closing, batcher.tasks = handle, False, set()
    batcher.failed_at, batcher.answered_at = None, 0.0
    batcher.on_batch = lambda count, seconds: batches.append((count, seconds))
    return batcher


GOOD = Outcome(b"[]", "", 200, {"segments": 0}, [(3, 0.5)])
REFUSED = Outcome(b"", "The picture has too many pixels.", 413, {}, [])
DIED, GONE = ray.exceptions.ActorDiedError(), ray.exceptions.ActorUnavailableError("gone", None)


@pytest.mark.parametrize(
    ("results", "answer", "status", "text"),
    [
        ((GOOD,), b"[]", 200, ""),
        ((DIED, GONE, GOOD), b"[]", 200, ""),
        ((DIED, REFUSED), None, 413, "too many pixels"),
        ((DIED,) * ATTEMPTS, None, 500, f"{ATTEMPTS} replicas of the model died with this image"),
        ((ValueError("a bug"),), None, 500, "its log has the reason"),
        ((DeploymentUnavailableError(DeploymentID("x", "y")),), None, 503, "No replica of the model can be started"),
    ],
)
def test_what_a_replica_dies_with_is_asked_again(
    results: tuple[Any, ...], answer: bytes | None, status: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_faim2f.serving.replicas.RETRY_SECONDS", 0.001)
    handle, batches = Handle(*results), list[tuple[int, float]]()
    job = Job(b"picture", Parameters(), True, 20.0, "its-id")

    async def segment() -> bytes:
        batcher_of(handle, batches).submit(job)
        return await asyncio.wrap_future(job.answer)

    if answer is None:
        with pytest.raises(RequestError, match=text) as refusal:
            asyncio.run(segment())
        assert refusal.value.status == status
    else:
        assert asyncio.run(segment()) == answer and batches == GOOD.batches and job.facts == GOOD.facts
    assert len(handle.asked) == len(results) and not handle.results
    for picture, parameters, as_run_lengths, seconds, request in handle.asked:
        assert (picture, parameters, as_run_lengths, request) == (b"picture", Parameters(), True, "its-id")
        assert 0 < seconds <= 20


@pytest.mark.parametrize("failure", [(DIED,) * ATTEMPTS, (DeploymentUnavailableError(DeploymentID("x", "y")),)])
def test_a_server_without_replicas_is_not_ready(failure: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_faim2f.serving.replicas.RETRY_SECONDS", 0.001)
    batcher = batcher_of(Handle(*failure, REFUSED, *failure), [])
    app = InferenceApp(batcher, Limits(), None, Metrics())

    async def status_after_a_request() -> int:
        job = Job(b"picture", Parameters())
        batcher.submit(job)
        with pytest.raises(RequestError):
            await asyncio.wrap_future(job.answer)
        return (await app.ready()).status_code

    assert asyncio.run(app.ready()).status_code == 200
    assert asyncio.run(status_after_a_request()) == 503 and batcher.is_alive
    assert asyncio.run(status_after_a_request()) == 200  # a replica refused the picture
    assert asyncio.run(status_after_a_request()) == 503
    monkeypatch.setattr("hf_faim2f.serving.replicas.NOT_READY_SECONDS", 0.0)
    assert asyncio.run(app.ready()).status_code == 200


def test_an_image_that_replicas_die_of_leaves_the_server_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_faim2f.serving.replicas.RETRY_SECONDS", 0.001)
    batcher = batcher_of(Handle(DIED, GOOD, *(DIED,) * (ATTEMPTS - 1)), [])

    async def segment() -> bool:
        jobs = [Job(b"picture", Parameters()) for _ in range(2)]
        for job in jobs:  # the first dies, and the second is answered meanwhile
            batcher.submit(job)
        with pytest.raises(RequestError, match="replicas of the model died with this image"):
            await asyncio.wrap_future(jobs[0].answer)
        await asyncio.wrap_future(jobs[1].answer)
        return batcher.is_ready

    assert asyncio.run(segment())


def test_late_and_cancelled_requests_leave_their_replica() -> None:
    handle = Handle(60.0)

    async def segment() -> None:
        batcher = batcher_of(handle, [])
        left, late = Job(b"", Parameters()), Job(b"", Parameters(), seconds=0.0)
        batcher.submit(left)
        batcher.submit(late)
        with pytest.raises(RequestError, match="longer than 0 seconds"):
            await asyncio.wrap_future(late.answer)
        await asyncio.sleep(0.01)
        left.answer.cancel()
        while batcher.tasks:
            await asyncio.sleep(0.001)

    asyncio.run(segment())
    assert [response.cancelled for response in handle.responses] == [True]


def test_room_for_replicas() -> None:
    machine, big = {"CPU": 8.0}, {"CPU": 16.0, "GPU": 4.0}
    assert room_for([machine], None, None) == ((4, 2, 0), (4, 4))
    assert room_for([machine], None, (2, 2)) == ((2, 4, 0), (2, 2))
    assert room_for([machine], None, (1, 20)) == ((8, 1, 0), (1, 20))  # a cluster can grow
    assert room_for([machine, big], None, None) == ((4, 4, 1), (4, 4))
    assert room_for([machine, big], "cpu", (3, 3)) == ((3, 8, 0), (3, 3))
    with pytest.raises(BulkError, match="Ray has 4 GPUs, one for each replica: pass --replicas 4, not 5"):
        room_for([big], None, (5, 9))
    with pytest.raises(BulkError, match="no GPU on any machine"):
        room_for([machine], "cuda", (1, 1))


def test_mistakes(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    options = build_parser().parse_args(["x", "--ray", "auto", "--replicas", "2-8"])
    assert (options.ray, options.replicas) == ("auto", (2, 8))
    for words, text in {
        ("--replicas", "2"): "--replicas is for --ray",
        ("--ray", "here"): "not 'here'",
        ("--ray", "ray://host:10001"): "is for the Ray Client",
        ("--ray", "local", "--device", "cuda:1"): "Ray assigns the GPUs",
        ("--ray", "local", "--runtime", "openvino"): "openvino",  # before Ray starts
    }.items():
        assert main(["serve", str(model), "--port", "0", *words]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1 and text in said.err, said.err
    assert main(["serve", str(model / "none"), "--port", "0", "--ray", "local"]) == 2
    for number in ("0", "3-2", "x", "-2", "2-"):
        with pytest.raises(SystemExit) as stop:
            main(["serve", "x", "--ray", "local", f"--replicas={number}"])
        assert stop.value.code == 2
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "ray.serve", None)
        context.delattr(ray, "serve")
        assert main(["serve", str(model), "--port", "0", "--ray", "local"]) == 2
        assert "install hf-faim2f[ray]" in capsys.readouterr().err
    assert re.fullmatch(r"faim2f-[A-Za-z0-9.-]+-127\.0\.0\.1-8000", application_name("http://127.0.0.1:8000"))

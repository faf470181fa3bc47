"""Downloads from a faulty server: each fault is survived or reported in one sentence, and no data is lost."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_faim2f import download as module
from hf_faim2f.download import download_file
from hf_faim2f.errors import ModelError
from tests.support.weights_server import Fault, WeightsServer, go_online, running_weights_server

CONTENT = b"PK\x03\x04" + bytes(range(256)) * 400
PATH = "/a/model_final.pth"
FORK: Any = multiprocessing.get_context("fork")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WeightsServer]:
    go_online(monkeypatch)
    monkeypatch.setattr(module, "URL_WAITS", (0.0,) * 4)
    monkeypatch.setattr(module, "WAITS", (0.0,) * 2)
    with running_weights_server() as server:
        server.files[PATH] = CONTENT
        yield server


def fetch(server: WeightsServer, out: Path, **more: Any) -> None:
    download_file(f"{server.url}{PATH}", out / "model.pth", "tiny", **more)


def refused(server: WeightsServer, out: Path, **more: Any) -> str:
    """The message of a failed download, which must be one sentence and leave no file under the final name."""
    with pytest.raises(ModelError) as error:
        fetch(server, out, **more)
    assert "\n" not in str(error.value) and not (out / "model.pth").exists()
    return str(error.value)


def test_a_whole_file_and_nothing_else_is_left(server: WeightsServer, tmp_path: Path) -> None:
    sizes: list[int | None] = []
    fetch(server, tmp_path, size=len(CONTENT), announce=sizes.append)
    assert (tmp_path / "model.pth").read_bytes() == CONTENT and sizes == [len(CONTENT)]
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"] and server.ranges == [None]


@pytest.mark.parametrize(
    "faults",
    [
        [Fault("cut", times=3)],
        [Fault("drop")],
        [Fault(500), Fault(503), Fault("cut")],
        [Fault(429, headers={"Retry-After": "0"})],
        [Fault("cut"), Fault("whole")],
        [Fault("cut"), Fault("elsewhere")],
        [Fault("cut"), Fault(416)],
    ],
    ids=lambda faults: "-".join(str(fault.how) for fault in faults),
)
@pytest.mark.parametrize("validators", [True, False])
def test_passing_faults_are_survived(
    server: WeightsServer, tmp_path: Path, faults: list[Fault], validators: bool
) -> None:
    server.faults, server.validators = faults, validators
    fetch(server, tmp_path)
    assert (tmp_path / "model.pth").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_a_cut_download_continues_where_it_stopped(server: WeightsServer, tmp_path: Path) -> None:
    server.faults = [Fault("cut", at=49_152), Fault(500, times=9)]
    assert "failed at every attempt (500): 49.2 kB are kept, and the same command continues" in refused(
        server, tmp_path
    )
    assert (tmp_path / "model.pth.partial").read_bytes() == CONTENT[:49_152]
    server.faults, server.asked = [], []
    fetch(server, tmp_path)
    assert server.ranges == ["bytes=49152-"] and (tmp_path / "model.pth").read_bytes() == CONTENT


def test_bytes_of_two_versions_are_never_mixed(server: WeightsServer, tmp_path: Path) -> None:
    server.faults = [Fault("cut", at=49_152), Fault(500, times=9)]
    refused(server, tmp_path)
    server.faults = []
    server.files[PATH] = other = CONTENT[::-1]
    fetch(server, tmp_path)
    assert (tmp_path / "model.pth").read_bytes() == other


def test_a_partial_file_of_another_url_is_not_continued(server: WeightsServer, tmp_path: Path) -> None:
    server.faults = [Fault("cut", at=49_152), Fault(500, times=9)]
    refused(server, tmp_path)
    server.faults, server.asked = [], []
    server.files["/b.pth"] = CONTENT[::-1]
    download_file(f"{server.url}/b.pth?key=secret", tmp_path / "model.pth", "tiny")
    assert server.ranges == [None] and (tmp_path / "model.pth").read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize(
    ("fault", "words", "requests"),
    [
        (Fault(404, 9), "(404)", 1),
        (Fault(403, 9), "refuses the download (403)", 1),
        (Fault(407, 9), "check your proxy", 1),
        (Fault(418, 9), "status 418", 1),
        (Fault(500, 9), "failed at every attempt (500)", 5),
        (Fault(429, 9, {"Retry-After": "3600"}), "no requests for 3600 seconds", 1),
        (Fault(429, 9), "failed at every attempt (429)", 5),
        (Fault("page", 9), "a web page instead of weights", 1),
        (Fault("disguised", 9), "a web page instead of weights", 1),
        (Fault("drop", 9), "failed or was lost", 3),
        (Fault("whole", 9, {"Content-Encoding": "gzip"}), "compressed (gzip)", 1),
        (Fault("whole", 9, {"Content-Length": str(10**13)}), "more than any published model", 1),
        (Fault(302, 9, {"Location": "file:///etc/passwd"}), "a/model_final.pth cannot be downloaded", 1),
        (Fault(302, 9, {"Location": "ftp://127.0.0.1/x"}), "a/model_final.pth cannot be downloaded", 1),
    ],
    ids=lambda value: str(value.how) if isinstance(value, Fault) else "",
)
def test_lasting_faults_become_one_sentence(
    server: WeightsServer, tmp_path: Path, fault: Fault, words: str, requests: int
) -> None:
    server.faults = [fault]
    message = refused(server, tmp_path)
    assert words in message and "127.0.0.1" in message, message
    assert len(server.asked) == requests
    server.faults = []
    fetch(server, tmp_path)  # the same call succeeds once the server recovers
    assert (tmp_path / "model.pth").read_bytes() == CONTENT


def test_a_file_of_another_size_than_before_is_refused_before_it_comes(server: WeightsServer, tmp_path: Path) -> None:
    assert "it has changed, and is refused" in refused(server, tmp_path, size=7)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://a/b", "/etc/passwd", "https:///x", ""])
def test_only_web_servers_are_asked(url: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a URL to download from"):
        download_file(url, tmp_path / "x", "tiny")


def test_secrets_of_a_url_are_not_shown_or_kept(server: WeightsServer, tmp_path: Path) -> None:
    server.faults = [Fault("cut"), Fault(404, 9)]
    url = f"{server.url.replace('://', '://me:hunter2@')}{PATH}?token=hunter3"
    with pytest.raises(ModelError) as error:
        download_file(url, tmp_path / "model.pth", "tiny")
    kept = "".join(path.read_text(errors="replace") for path in tmp_path.glob("*.json"))
    assert "hunter" not in str(error.value) + kept and PATH in kept


def test_offline_is_said_at_once(server: WeightsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_online(monkeypatch, False)
    assert "tiny is not in the cache, and HF_HUB_OFFLINE is set" in refused(server, tmp_path)
    assert not server.asked


def test_nobody_there(tmp_path: Path, server: WeightsServer) -> None:
    with pytest.raises(ModelError, match=r"The connection to 127\.0\.0\.1, which has tiny, failed"):
        download_file("http://127.0.0.1:1/model.pth", tmp_path / "model.pth", "tiny")


def test_a_disk_without_room_is_said_before_anything_comes(
    server: WeightsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 5000))
    assert "has 5.0 kB free, but 102.4 kB remain to be downloaded" in refused(server, tmp_path)


def in_another_process(server: WeightsServer, out: Path, limit: int | None = None) -> Any:
    """A forked process (importing torch takes seconds), and the queue of its results."""
    told: Any = FORK.Queue()

    def run() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            fetch(server, out)
        except KeyboardInterrupt as stop:
            told.put(f"interrupted: {stop}")
        except ModelError as error:
            told.put(str(error))

    process = FORK.Process(target=run)
    process.start()
    return process, told


def test_a_full_disk_keeps_what_fits(server: WeightsServer, tmp_path: Path) -> None:
    """A limit on the file size simulates a full disk: the same system call fails."""
    process, queue = in_another_process(server, tmp_path, 30_000)
    told = queue.get(timeout=60)
    process.join()
    assert "cannot be written (File too large): make room" in told and "30.0 kB are kept" in told, told
    fetch(server, tmp_path)
    assert server.ranges[-1] == "bytes=30000-" and (tmp_path / "model.pth").read_bytes() == CONTENT


def test_an_interrupted_download_continues(server: WeightsServer, tmp_path: Path) -> None:
    server.faults = [Fault("hang", at=49_152)]
    process, told = in_another_process(server, tmp_path)
    assert server.reached.wait(60)
    partial = tmp_path / "model.pth.partial"
    while not partial.exists() or partial.stat().st_size < 49_152:
        assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    assert told.get(timeout=60) == "interrupted: 49.2 kB of tiny have arrived; the same command continues from there."
    process.join()
    fetch(server, tmp_path)
    assert server.ranges[-1] == "bytes=49152-" and (tmp_path / "model.pth").read_bytes() == CONTENT


def test_a_process_killed_before_the_last_step(server: WeightsServer, tmp_path: Path) -> None:
    (tmp_path / "model.pth.partial").write_bytes(CONTENT)
    progress = {"url": f"{server.url}{PATH}", "total": len(CONTENT), "validator": None}
    (tmp_path / "model.pth.partial.json").write_text(json.dumps(progress))
    fetch(server, tmp_path)
    assert not server.asked and (tmp_path / "model.pth").read_bytes() == CONTENT


@pytest.mark.parametrize("hops", [["http://hop/x"], ["https://hop/x", "http://hop/y"], []])
def test_every_redirect_must_be_encrypted(hops: list[str]) -> None:
    response = SimpleNamespace(
        url="https://b/x" if hops else "http://b/x", status_code=200, history=[SimpleNamespace(url=hop) for hop in hops]
    )
    with pytest.raises(ModelError, match="https://a/x leads to http://.*, which is not encrypted: refused"):
        module._check_answer("https://a/x", response, "it")

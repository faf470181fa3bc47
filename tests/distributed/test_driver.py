"""Bulk inference with a real Ray: workers and the driver are killed, and no image is lost or duplicated."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from hf_faim2f.data.digits import DigitScenes
from hf_faim2f.runtime import Predictor
from tests.support.parquet_rows import check_rows, rows_of

pytest.importorskip("ray")
pytestmark = [
    # Ray takes seconds to start, here and in each worker.
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="Processes are killed as Linux does it."),
]
MODEL = Path(__file__).parents[2] / "examples" / "digits"
# Seconds to wait before a process counts as stuck.
PATIENCE = 300
# Runs in every process: opening an image whose name starts with "b" or "c" blocks while a file with that letter exists;
# the waiting process leaves its pid.
GATES = """
import os, time
from pathlib import Path
from PIL import Image
opened, gates = Image.open, Path(os.environ["FAIM2F_GATES"])
def wait_and_open(file, *arguments, **settings):
    gate = gates / Path(str(file)).name[0]
    while gate.exists():
        (gates / f"{gate.name}-{os.getpid()}").touch()
        time.sleep(0.02)
    return opened(file, *arguments, **settings)
Image.open = wait_and_open
"""


class Run:
    """The command in its own processes, with its folders and environment.

    Args:
        root: an existing folder for everything.
    """

    def __init__(self, root: Path) -> None:
        self.photos, self.gates, self.out = root / "photos", root / "gates", root / "out"
        self.photos.mkdir()
        self.gates.mkdir()
        (root / "site").mkdir()
        (root / "site" / "sitecustomize.py").write_text(GATES)
        # Socket addresses in this folder must have at most 107 characters.
        self.ray = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
        self.environment = {
            **os.environ,
            "FAIM2F_GATES": str(self.gates),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(root / "site"),
            "RAY_TMPDIR": str(self.ray),
        }
        self.environment.pop("RAY_ADDRESS", None)
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, *arguments: object) -> "subprocess.Popen[str]":
        words = [sys.executable, "-m", "hf_faim2f.cli", "predict", MODEL, self.photos, "--out", self.out]
        words += ["--ray", "local", *arguments]
        process = subprocess.Popen(
            [str(word) for word in words], env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, start_new_session=True,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def parts(self) -> dict[str, int]:
        """The finished parts, with the time when each was written."""
        return {path.name: path.stat().st_mtime_ns for path in self.out.glob("part-*.parquet")}

    def waiting(self, gate: str) -> set[int]:
        """The pids of the processes that waited at a gate."""
        return {int(path.name.partition("-")[2]) for path in self.gates.glob(f"{gate}-*")}

    def until(self, what: Callable[[], object], process: "subprocess.Popen[str] | None" = None) -> None:
        end = time.monotonic() + PATIENCE
        while not what():
            assert process is None or process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.02)

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.communicate()
        self.until(lambda: not self.alive())
        shutil.rmtree(self.ray, ignore_errors=True)

    def alive(self) -> list[Path]:
        """The Ray processes that this run started."""
        mark = f"RAY_TMPDIR={self.ray}\0".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (path / "environ").read_bytes() and (path / "cmdline").read_bytes():
                    found.append(path)
            except OSError:
                continue
        return found


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path)
    yield run
    run.close()


@pytest.mark.large
def test_whoever_is_killed_nothing_is_lost_or_doubled(run: Run) -> None:
    scenes = DigitScenes("test", 24, size=64)
    names = [f"{'abc'[index // 8]}{index:02}.png" for index in range(24)]
    for index, name in enumerate(names):
        Image.fromarray(scenes[index]["image"].permute(1, 2, 0).numpy()).save(run.photos / name)
    for gate in "bc":
        (run.gates / gate).touch()
    arguments = ("--part-size", 4, "--workers", 1)

    # Kill a worker in the middle of a part: another one predicts it, and the run continues.
    driver = run.start(*arguments)
    run.until(lambda: len(run.parts()) == 2 and run.waiting("b"), driver)
    first = run.waiting("b")
    os.kill(first.pop(), signal.SIGKILL)
    run.until(lambda: len(run.waiting("b")) == 2, driver)
    (run.gates / "b").unlink()
    # Kill the driver in the middle of a part: all processes end with it.
    run.until(lambda: len(run.parts()) == 4 and run.waiting("c"), driver)
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate()
    run.until(lambda: not run.alive())
    before = run.parts()
    assert len(before) == 4 and len(rows_of(run.out)) == 16
    # Leave an unfinished part; its rows must not be read.
    (run.out / "_run" / "unfinished" / "part-00004-of-00006.parquet.0").write_bytes(b"half")
    assert any((run.out / "_run" / "tries").iterdir())

    # The same command continues, and predicts no part twice.
    (run.gates / "c").unlink()
    driver = run.start(*arguments)
    told, problems = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 0, (told, problems)
    assert "24 images in 6 parts" in told and "16 images are finished from an earlier run." in told
    assert "Written: 24 of 24" in told and "Traceback" not in problems
    after = run.parts()
    assert len(after) == 6 and before.items() <= after.items()
    assert not list((run.out / "_run" / "unfinished").iterdir()) and not list((run.out / "_run" / "tries").iterdir())
    rows = rows_of(run.out)
    sources = [run.photos / name for name in names]
    assert list(rows) == [str(source) for source in sources]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the workers
    check_rows(list(rows.values()), Predictor.from_pretrained(MODEL, device="cpu")(sources, batch_size=4))
    torch.set_num_threads(threads)
    assert sum(len(row["segments"]) for row in rows.values()) > 48

"""How every benchmark here measures: ours and the peer's in turn, in one process; medians with their spread."""

import json
import multiprocessing
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

RESULTS = Path(__file__).parent / "results"
THREADS = 2


def time_in_turn(
    contenders: dict[str, Callable[[], object]], runs: int, warmup: int = 1
) -> dict[str, dict[str, float]]:
    """Seconds of each contender: A B A B ..., so that a machine whose speed drifts slows both alike.

    Returns:
        For each name its median, minimum and maximum over `runs`, after `warmup` runs that are not counted.
    """
    torch.set_num_threads(THREADS)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for run in range(warmup + runs):
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender()
            if run >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for name, values in seconds.items()
    }


def _memory(field: str) -> float:
    """A field of this process's status, in MB; the operating system is Linux."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status).group(1)) / 1024  # type: ignore[union-attr]


def _peak_in_child(prepare: Callable[[], Callable[[], object]], answers: Any) -> None:
    torch.set_num_threads(THREADS)
    job = prepare()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _memory("VmRSS")
    job()
    answers.put(_memory("VmHWM") - before)


def extra_memory(prepare: Callable[[], Callable[[], object]]) -> float:
    """MB by which resident memory grows, at its peak, while the job runs, in a process of its own.

    Args:
        prepare: a function of a module (it is sent to a fresh process) that makes the inputs and returns the job.
    """
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    child = context.Process(target=_peak_in_child, args=(prepare, answers))
    child.start()
    megabytes = answers.get()
    child.join()
    return megabytes


def record(benchmark: str, figures: dict[str, Any], threads: int = THREADS) -> None:
    """Appends one line of JSON to `results/BENCHMARK.jsonl`: what was measured, with what, and when."""
    RESULTS.mkdir(exist_ok=True)
    line = {
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": platform.machine(),
        "threads": threads,
        **figures,
    }
    with (RESULTS / f"{benchmark}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def row(name: str, figures: dict[str, float], unit: float = 1000.0) -> str:
    """One line of a table: median and spread, in milliseconds unless `unit` says otherwise."""
    median, least, most = (unit * figures[key] for key in ("median", "min", "max"))
    return f"{name:28} {median:9.1f} ms   ({least:.1f} to {most:.1f})"

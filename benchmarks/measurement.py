"""Timing of contenders in turn in one process (medians with their range), and peak memory.

`torch.utils.benchmark` is not used, because its timers repeat one statement. Here contenders alternate, which cancels
drift on a machine that other programs use, and several steps are timed within one run.
"""

import json
import multiprocessing
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

RESULTS = Path(__file__).parent / "results"
THREADS = 2


def time_in_turn(
    contenders: Mapping[str, Callable[[], object]],
    runs: int,
    warmup: int = 1,
    *,
    threads: int = THREADS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """Times contenders alternately, A B A B ..., so that drift of the machine's speed affects all of them equally.

    Returns:
        Median, minimum and maximum seconds of each over `runs`, after `warmup` warm-up runs. With `time.process_time`
        as `clock` and one thread, they are CPU seconds, on which other programs have little effect.
    """
    torch.set_num_threads(threads)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for run in range(warmup + runs):
        for name, contender in contenders.items():
            start = clock()
            contender()
            if run >= warmup:
                seconds[name].append(clock() - start)
    return {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for name, values in seconds.items()
    }


def multiply_accumulates(model: torch.nn.Module, pixels: torch.Tensor) -> float:
    """Those of the network's convolutions and matrix products, as torch counts them.

    The model must not be optimized for inference, because torch does not know the fused operations.
    """
    with FlopCounterMode(display=False) as counter:
        model.requires_grad_(False)(pixels)
    return counter.get_total_flops() / 2


def _memory(field: str) -> float:
    """A field of this process's status in MB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status).group(1)) / 1024  # type: ignore[union-attr]


def _peak_in_child(prepare: Callable[[], Callable[[], object]], answers: Any) -> None:
    torch.set_num_threads(THREADS)
    job = prepare()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _memory("VmRSS")
    job()
    answers.put(_memory("VmHWM") - before)


def extra_memory(prepare: Callable[[], Callable[[], object]]) -> float:
    """Peak growth of resident memory in MB while the job runs, in a fresh process.

    Args:
        prepare: a module-level function (it is pickled) that creates the inputs and returns the job.

    Raises:
        RuntimeError: the process ended without a result, for example because it was killed for lack of memory.
    """
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    child = context.Process(target=_peak_in_child, args=(prepare, answers))
    child.start()
    while child.is_alive() and answers.empty():
        child.join(1)
    child.join()
    if answers.empty():
        raise RuntimeError(f"The process that measures memory ended with status {child.exitcode}.")
    return answers.get()


def record(benchmark: str, figures: dict[str, Any], threads: int = THREADS) -> None:
    """Appends the figures, versions, threads and date as a line of JSON to `results/BENCHMARK.jsonl`."""
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
    """Formats a line of a table: median and range, in milliseconds by default."""
    median, least, most = (unit * figures[key] for key in ("median", "min", "max"))
    return f"{name:28} {median:9.1f} ms   ({least:.1f} to {most:.1f})"

"""Peak memory of a predictor in a fresh process, relative to the memory before the model was loaded.

On Linux it is the resident set in `/proc/self/status`, including mapped files; elsewhere the less precise peak that the
standard library's `resource` reports. On a GPU it is the peak of torch's allocator, and the decrease of free memory.
The latter also covers runtimes with their own allocators, but other programs on the GPU distort it.
"""

import multiprocessing
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..errors import PredictorError
from ..runtime.predictor import Predictor
from .latency import Contender

# Two runs on each of the first two images of `Contender.largest`: a first run may allocate what later ones reuse.
RUNS = 4
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"
RESIDENT = "peak resident set of a fresh process above its resident set before the model was loaded"
NO_RESET = f"{RESIDENT}; the peak could not be reset here and is that of the whole process: rather too high"
GROWTH = "growth of a fresh process's peak resident set from before the model was loaded: rather too low"
UNKNOWN = "not measured: this operating system does not report it"


@dataclass
class PeakMemory:
    """Peak bytes above those before the model was loaded; None if not measured.

    Args:
        how: how the process's memory was measured.
        before: resident bytes before the model was loaded, including libraries and images.
        loading: the peak while loading the model.
        running: the peak while predicting, for each batch size, in ascending order.
        gpu_allocated: torch's peak on the GPU, for each batch size.
        gpu_taken: the decrease of free GPU memory, for each batch size.
    """

    how: str
    before: int | None = None
    loading: int | None = None
    running: dict[int, int | None] = field(default_factory=dict)
    gpu_allocated: dict[int, int] = field(default_factory=dict)
    gpu_taken: dict[int, int] = field(default_factory=dict)


def measure_memory(
    open_predictor: Callable[[], Predictor],
    images: Sequence[Any],
    subtask: str | None,
    batch_sizes: Sequence[int],
    *,
    modules: Sequence[str] = (),
    gpu: str | None = None,
    threads: int | None = None,
) -> PeakMemory:
    """Measures the memory of a predictor, which is opened and run in a fresh process.

    The process is started with multiprocessing's "spawn", so scripts must call this under `if __name__ == "__main__"`.

    Args:
        open_predictor: a module-level function, or a `functools.partial` of one; it is pickled.
        images, subtask: as in `Contender`; arrays or PIL images. Only the first are used, as many as the largest batch
            has but at least two, so pass the largest first.
        batch_sizes: measured in ascending order.
        modules: imported first, so that libraries do not count.
        gpu: the GPU whose memory is also measured, such as "cuda:0".
        threads: torch's number of threads; None for its default.

    Raises:
        PredictorError: the predictor cannot be opened or fails, or the process died.
    """
    ascending = sorted(set(batch_sizes))
    sent = list(images[: max(ascending[-1], 2)])
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, open_predictor, sent, subtask, ascending, tuple(modules), gpu, threads)
    child = context.Process(target=_answer, args=arguments, daemon=True)
    try:
        child.start()
        sender.close()
        try:
            made = receiver.recv()
        except EOFError:
            child.join()
            raise PredictorError(
                f"The process that should measure memory ended without a result (status {child.exitcode}): there may "
                "be too little memory."
            ) from None
    finally:
        receiver.close()
        if child.is_alive():
            child.terminate()
            child.join()
    if isinstance(made, str):
        raise PredictorError(made)
    return made


def _answer(sender: Any, *arguments: Any) -> None:
    """Runs in the fresh process: sends the measurements, or an error message."""
    # The parent handles Ctrl+C and terminates this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable_progress_bar()
    try:
        made: PeakMemory | str = _measure(*arguments)
    except (ValueError, OSError, ImportError) as error:
        made = " ".join(str(error).split())
    sender.send(made)


def _measure(
    open_predictor: Callable[[], Predictor],
    images: Sequence[Any],
    subtask: str | None,
    batch_sizes: Sequence[int],
    modules: Sequence[str],
    gpu: str | None,
    threads: int | None,
) -> PeakMemory:
    if threads is not None:
        torch.set_num_threads(threads)
    for module in modules:
        import_module(module)
    free = _free(gpu) if gpu else 0
    resettable = _reset()
    before = _resident(resettable)
    memory = PeakMemory(_how(before, resettable), before)

    def above() -> int | None:
        peak = _peak()
        return None if peak is None or before is None else max(0, peak - before)

    predictor = open_predictor()
    memory.loading = above()
    contender = Contender(predictor, images, subtask)
    for batch_size in batch_sizes:
        contender.check_batch(batch_size)
        _reset()
        if gpu:
            torch.cuda.reset_peak_memory_stats(gpu)
        for turn in range(RUNS):
            contender.run(turn, batch_size)
        memory.running[batch_size] = above()
        if gpu:
            memory.gpu_allocated[batch_size] = torch.cuda.max_memory_allocated(gpu)
            memory.gpu_taken[batch_size] = max(0, free - _free(gpu))
    return memory


def _free(gpu: str) -> int:
    """Free bytes on a GPU, measured after this process has created its context there."""
    torch.zeros(1, device=gpu)
    torch.cuda.synchronize(gpu)
    return torch.cuda.mem_get_info(gpu)[0]


def _reset() -> bool:
    """Resets the peak; returns whether that succeeded."""
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:
        return False
    return True


def _how(before: int | None, resettable: bool) -> str:
    if before is None:
        return UNKNOWN
    if not STATUS.exists():
        return GROWTH
    return RESIDENT if resettable else NO_RESET


def _resident(resettable: bool) -> int | None:
    return _status("VmRSS") if STATUS.exists() else _peak()


def _peak() -> int | None:
    if STATUS.exists():
        return _status("VmHWM")
    try:
        resource = import_module("resource")
    except ImportError:
        return None
    # In bytes on macOS, in kilobytes elsewhere.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(name: str) -> int:
    """A field of this process's status, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


__all__ = ["PeakMemory", "measure_memory"]

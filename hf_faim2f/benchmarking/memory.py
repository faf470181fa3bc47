"""How much memory a predictor takes at its most, in a process of its own, above what was taken before it was loaded.

A process's memory is its resident set, mapped files among it, as Linux counts it in `/proc/self/status`; elsewhere the
standard library's `resource` tells how much the most so far was, from which less can be known. On a GPU it is what
torch's allocator had in use at the most, and how much less of the GPU's memory was free at the end than before: of
runtimes with an allocator of their own only that tells, and other programs on the GPU disturb it.
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

# The first may set things up that the second finds.
RUNS = 2
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"
RESIDENT = "peak resident set of a fresh process above its resident set before the model was loaded"
NO_RESET = f"{RESIDENT}; the peak is that of the whole process, for it could not be reset here: rather too high"
GROWTH = "growth of a fresh process's peak resident set from before the model was loaded: rather too low"
UNKNOWN = "not measured: this operating system does not tell"


@dataclass
class PeakMemory:
    """Bytes, above those before the model was loaded; None for what was not measured.

    Args:
        how: what the numbers of the process are.
        before: resident then, the libraries and the images among it.
        loading: at the most, until the model was ready to run.
        running: for each batch size at the most, until images of it were predicted; the smaller ones come before.
        gpu_allocated: for each batch size torch's peak on the GPU.
        gpu_taken: for each batch size, what of the GPU was no longer free.
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
    """Opens a predictor in a fresh process and predicts there.

    The process is one of multiprocessing's spawn: a script calls this below `if __name__ == "__main__"`.

    Args:
        open_predictor: a function of a module, or a `functools.partial` of one; it is sent to the process.
        images, subtask: as `Contender` takes them; arrays or PIL images, of which the first go through the network.
        batch_sizes: images at once, each measured in ascending order.
        modules: to import before, so that libraries do not count.
        gpu: such as "cuda:0", if the memory of a GPU is asked for, too.
        threads: of torch; None for its own number.

    Raises:
        PredictorError: the predictor cannot be opened or fails, or its process ended.
    """
    ascending = sorted(set(batch_sizes))
    sent = list(images[: ascending[-1]])
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
    """In the other process: sends what was measured, or the sentence that says why not."""
    # Whoever interrupts means the process that started this one, which ends it.
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
    """Bytes that are free on a GPU, on which this process has made its own things."""
    torch.zeros(1, device=gpu)
    torch.cuda.synchronize(gpu)
    return torch.cuda.mem_get_info(gpu)[0]


def _reset() -> bool:
    """Lets the peak count from here; whether that can be."""
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
    """A line of this process's status in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


__all__ = ["PeakMemory", "measure_memory"]

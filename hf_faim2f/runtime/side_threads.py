"""Threads for what goes on beside the network: reading, answering, writing.

torch gives every thread that asks for it a team of as many threads as there are cores. Two teams on the same cores wait
for each other most of the time; so a side thread works alone, and there may be several.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from typing import Any

import torch

# Of the scheduler: where cores are scarce the network comes first. All side threads together still get every core
# whenever the network waits for them.
LESS_URGENT = 5
# Up to so many cores, the network and the side threads take turns. A team of the network's threads waits for the
# slowest, and so stands still as a whole while a side thread has one core of it: of two cores the other one, too. More
# than two have not been measured.
FEW_CORES = 2
# Seconds after which it is asked whether the process still computes, and the least share of one core that it does.
LOOK, LEAST_SHARE = 0.01, 0.5
# Seconds that the network waits at most: what computes need not be a side thread.
LONGEST_WAIT = 2.0


class SideThreads(ThreadPoolExecutor):
    """An executor in each of whose threads torch works without others to help; each piece of work takes one of `cores`,
    and waits for it."""

    def __init__(
        self, name: str, count: int, cores: AbstractContextManager[Any], watch: Callable[[Future[Any]], None]
    ) -> None:
        super().__init__(count, thread_name_prefix=f"faim2f-{name}", initializer=_work_alone)
        self._cores, self._watch = cores, watch

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        future = super().submit(self._on_a_core, work, *arguments, **named)
        self._watch(future)
        return future

    def _on_a_core(self, work: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        with self._cores:
            return work(*arguments, **named)


class SideWork:
    """All that goes on beside one network.

    Args:
        in_turn: the network waits for it, and it has every core meanwhile; else both go on at the same time.
    """

    def __init__(self, in_turn: bool) -> None:
        self.in_turn = in_turn
        # In turn with the network, as much is computed as there are cores: more of it at a time would wait for Python's
        # lock, and for the caches, in which each piece of work has its own megabytes.
        self._cores: AbstractContextManager[Any] = contextlib.nullcontext()
        if in_turn:
            self._cores = threading.Semaphore(torch.get_num_threads())
        self._unfinished: set[Future[Any]] = set()
        self._changing = threading.Lock()

    def threads(self, name: str, most: int | None = None, waits: bool = False) -> SideThreads:
        """An executor for one kind of work.

        Args:
            name: what its threads are called, after "faim2f-".
            most: of them; None for as many as the cores allow.
            waits: the work may wait long for what is no core, such as a disk far away. No core is counted as taken by
                it, so that other work goes on.
        """
        cores = torch.get_num_threads()
        # Beside the network half of the cores, for it needs some.
        count = cores if self.in_turn else max(1, cores // 2)
        taken = contextlib.nullcontext() if waits else self._cores
        return SideThreads(name, count if most is None else min(count, most), taken, self._watch)

    def let_finish(self) -> None:
        """Before the network's turn: waits for all that was submitted, as long as it computes. What waits for a disk
        takes no core from the network."""
        end = time.perf_counter() + LONGEST_WAIT
        while self.in_turn and (unfinished := self._copy()) and time.perf_counter() < end:
            begin, computed = time.perf_counter(), time.process_time()
            wait(unfinished, timeout=LOOK)
            if time.process_time() - computed < LEAST_SHARE * (time.perf_counter() - begin):
                return

    def _copy(self) -> list[Future[Any]]:
        with self._changing:
            return [future for future in self._unfinished if not future.done()]

    def _watch(self, future: Future[Any]) -> None:
        with self._changing:
            self._unfinished.add(future)
        future.add_done_callback(self._forget)

    def _forget(self, future: Future[Any]) -> None:
        with self._changing:
            self._unfinished.discard(future)


def few_cores() -> bool:
    """Whether torch's threads fill the cores that this process may use, and these are few."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # but on Linux
        cores = os.cpu_count() or 1
    return torch.get_num_threads() > 1 and cores <= FEW_CORES


_setting = threading.Lock()


def _work_alone() -> None:
    with _setting:
        others = torch.get_num_threads()
        torch.set_num_threads(1)
        # The number is this thread's own, but that of threads to come is set with it: they get theirs back from one
        # that ends at once.
        if others > 1:
            restorer = threading.Thread(target=torch.set_num_threads, args=(others,))
            restorer.start()
            restorer.join()
    if sys.platform == "linux":  # elsewhere the whole process would be
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LESS_URGENT)


__all__ = ["SideThreads", "SideWork", "few_cores"]

"""Threads for what goes on beside the network: reading, answering, writing.

torch gives every thread that asks for it a team of as many threads as there are cores. Two teams on the same cores wait
for each other most of the time; so a side thread works alone, and there may be several.
"""

import contextlib
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

# Of the scheduler: where cores are scarce the network comes first. All side threads together still get every core
# whenever the network waits for them.
LESS_URGENT = 5


def side_threads(name: str, count: int = 1) -> ThreadPoolExecutor:
    """An executor with `count` threads, in each of which torch works without others to help.

    Args:
        name: what the threads are called, after "faim2f-".
        count: at least 1.
    """
    return ThreadPoolExecutor(count, thread_name_prefix=f"faim2f-{name}", initializer=_work_alone)


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


__all__ = ["side_threads"]

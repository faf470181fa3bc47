"""What a process that does nothing but predict sets for the whole of itself; a library would have no right to."""

import contextlib
import ctypes
import platform
import sys
from collections.abc import Iterator

# Seconds after which a thread that runs Python lets another in; Python's own are 5 ms. The network is a few hundred
# short calls: were it to wait so long at some of them, its cores would stand still.
TURN = 0.0002
# Of glibc's malloc.h. One heap, so that what one thread frees another finds; large pieces come from it, too, and memory
# goes back to the operating system only where more than `MOST_KEPT` bytes at its end are free.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8
MOST_KEPT, GROWTH = 1 << 30, 1 << 26


def keep_freed_memory() -> bool:
    """Lets this process use its memory again, instead of giving it back and asking for it at every image.

    Each page that is asked for anew must be found and cleared, which takes longest where maps are large
    (`benchmarks/scale.py`). Other programs can set the same for themselves:
    GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1073741824:glibc.malloc.arena_max=1

    Returns:
        whether it was done: with glibc alone, the C library of most Linux systems.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {M_ARENA_MAX: 1, M_MMAP_MAX: 0, M_TRIM_THRESHOLD: MOST_KEPT, M_TOP_PAD: GROWTH}
    answers = [mallopt(name, value) for name, value in settings.items()]
    return 0 not in answers


@contextlib.contextmanager
def short_turns() -> Iterator[None]:
    """Within it, threads of Python take turns after `TURN` seconds."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(TURN, before))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


__all__ = ["keep_freed_memory", "short_turns"]

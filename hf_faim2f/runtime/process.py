"""What a process that does nothing but predict sets for the whole of itself; a library would have no right to."""

import contextlib
import ctypes
import platform
import sys
from collections.abc import Iterator

# Seconds after which a thread that runs Python lets another in; Python's own are 5 ms. The network is a few hundred
# short calls: were it to wait so long at some of them, its cores would stand still.
TURN = 0.0002
# Of glibc's malloc.h. One arena, so that what one thread frees another finds; and memory goes back to the operating
# system not as soon as it is free, but where there is more of it than this, or in one piece larger than glibc lets
# its heap take.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8
MOST_KEPT, LARGEST_OF_HEAP, GROWTH = 1 << 30, 1 << 25, 1 << 26


def keep_freed_memory() -> bool:
    """Lets this process use its memory again, instead of giving it back and asking for it at every image.

    Each page that is asked for anew must be found and cleared: of fai-mf-m-ade at 640x640 some ten thousand an image.
    At most `MOST_KEPT` bytes are kept.

    Returns:
        whether it was done: with glibc alone, the C library of most Linux systems.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {
        M_ARENA_MAX: 1,
        M_MMAP_THRESHOLD: LARGEST_OF_HEAP,
        M_TRIM_THRESHOLD: MOST_KEPT,
        M_TOP_PAD: GROWTH,
    }
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

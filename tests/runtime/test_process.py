"""What a process that predicts sets for itself: memory that stays, and short turns."""

import platform
import subprocess
import sys

import pytest

from hf_faim2f.runtime.process import TURN, short_turns

# Page faults of twenty rounds of five arrays, all held at once and then freed, before and after.
FAULTS = """
import resource
import numpy as np
from hf_faim2f.runtime.process import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        [np.ones(10_000_000, np.uint8) for _ in range(5)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
assert keep_freed_memory()
faults()  # from now on it is kept
print(first, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the memory of glibc is set, and of no other C library")
def test_freed_memory_is_used_again() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    given_back, kept = map(int, done.stdout.split())
    # 50 MB are 12,200 pages, or some dozens where they are huge.
    assert given_back > 400 and kept < 0.05 * given_back, done.stdout


def test_turns_are_short_within_and_as_before_behind() -> None:
    before = sys.getswitchinterval()
    with pytest.raises(KeyError), short_turns():
        assert sys.getswitchinterval() == pytest.approx(TURN)
        raise KeyError
    assert sys.getswitchinterval() == pytest.approx(before)

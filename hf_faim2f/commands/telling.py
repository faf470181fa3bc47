"""What a command tells: a mistake in one sentence on standard error, the rest on standard output, and both once."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from ..data.errors import DatasetError

# What a person can get wrong. Everything else is a mistake of ours, and keeps its traceback.
MISTAKES = (ValueError, OSError, ImportError)
MISTAKE = 2
INTERRUPTED = 130
# Problems that are listed one by one; a file has them all.
MOST_LISTED = 10


def is_main_process() -> bool:
    """Whether this process tells and writes: the first of those that `accelerate launch` or `torchrun` started."""
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str) -> None:
    """Prints, in the main process."""
    if is_main_process():
        print(text, flush=True)


def mistake(program: str, error: BaseException, *, everywhere: bool = False) -> int:
    """Tells what was wrong; the exit status.

    Args:
        everywhere: whether the process that found it tells it, because the others may not have; or the main one.
    """
    if is_main_process() or everywhere:
        if everywhere:
            print(file=sys.stderr)  # a progress bar is in this line
        print(f"{program}: {sentence(error)}", file=sys.stderr, flush=True)
    return MISTAKE


def sentence(error: BaseException) -> str:
    """An error's message in one line."""
    text = str(error)
    if isinstance(error, DatasetError):
        # One that comes from a process that reads items has that process's traceback in front.
        text = text.rpartition(f"{DatasetError.__name__}: ")[2]
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return " ".join(text.split())


def require_packages(names: Sequence[str], extra: str) -> None:
    """ImportError that names the first of these packages that cannot be imported, and what to install."""
    for name in names:
        try:
            import_module(name)
        except ImportError as error:
            raise ImportError(
                f"This needs {name}, which cannot be imported ({error}): install hf-faim2f[{extra}]."
            ) from error


def say_skipped(problems: Sequence[str]) -> None:
    """How many problems were skipped, and which."""
    if not problems:
        return
    say(f"{len(problems)} {'image was' if len(problems) == 1 else 'images were'} left out:")
    for problem in problems[:MOST_LISTED]:
        say(f"  {problem}")
    if len(problems) > MOST_LISTED:
        say(f"  and {len(problems) - MOST_LISTED} more")

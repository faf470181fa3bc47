"""What a command tells: a mistake in one sentence on standard error, the rest on standard output, and both once.

And what it ends with: the exit statuses of all commands are here, and in the help of `faim2f`.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from importlib import import_module
from typing import Any

from ..errors import DatasetError

# What a person can get wrong. Everything else is a mistake of ours, and keeps its traceback.
MISTAKES = (ValueError, OSError, ImportError)
DONE, SOME_LEFT_OUT, MISTAKE, INTERRUPTED = 0, 1, 2, 130
STATUSES = {
    DONE: "done",
    SOME_LEFT_OUT: "done, but images that cannot be used were left out (predict)",
    MISTAKE: "a mistake in what was asked, told in one sentence on standard error",
    INTERRUPTED: "interrupted, as by Ctrl+C",
}
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
        if everywhere and sys.stderr.isatty():
            print(file=sys.stderr)  # a progress bar is in this line
        print(f"{program}: {sentence(error)}", file=sys.stderr, flush=True)
    return MISTAKE


def interrupted(program: str, what_now: str = "") -> int:
    """Tells that a person stopped it, and what is left; the exit status."""
    if is_main_process():
        if sys.stderr.isatty():
            print(file=sys.stderr)  # a progress bar, or ^C, is in this line
        text = f"{program}: interrupted; {what_now}" if what_now else f"{program}: interrupted."
        print(text, file=sys.stderr, flush=True)
    return INTERRUPTED


def no_bars(shown: bool = True) -> bool | None:
    """What tqdm's `disable` is to be: True for none, or None, for one only where standard error is a terminal.

    Args:
        shown: whether this process is to show one at all.
    """
    return None if shown else True


def silence_libraries() -> None:
    """Turns off the progress bars of libraries: those of loading always, and all where no terminal shows them."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # a model is read in a moment; the bar would only bury the sentences
    if sys.stderr.isatty():
        return
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    datasets: Any = sys.modules.get("datasets")
    if datasets is not None:
        datasets.disable_progress_bars()


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


# What --json prints: one document on standard output, and nothing else there, whatever a library writes.


@contextmanager
def one_document(asked: bool) -> Iterator[Callable[[Any], None]]:
    """Gives a function that takes the document; at the end it is printed, by the main process.

    Until then all that is written to standard output goes to standard error, also by libraries in C and by processes
    that are started. A command that ends with a mistake gives no document, and prints none.

    Args:
        asked: whether --json was; without it nothing is printed, and standard output stays what it is.
    """
    documents: list[Any] = []
    if not asked:
        yield documents.append
        return
    with redirect_stdout(sys.stderr), _descriptor_of_errors():
        yield documents.append
        text = json.dumps(documents[-1], allow_nan=False, indent=1) if documents else None
    if text is not None and is_main_process():
        print(text, flush=True)


@contextmanager
def _descriptor_of_errors() -> Iterator[None]:
    """Descriptor 1 is a copy of 2 meanwhile."""
    with ExitStack() as stack:
        try:
            kept = os.dup(1)
            stack.callback(os.close, kept)
            os.dup2(2, 1)
            stack.callback(os.dup2, kept, 1)
        except OSError:
            pass  # one of them is closed, and nothing can be written there
        yield

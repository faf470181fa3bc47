"""What commands print, and how they end: mistakes in one sentence, --json documents, exit statuses.

Mistakes go to standard error, everything else to standard output. In a distributed run the main process alone prints.
With --json, standard output is one JSON document and nothing else, whatever a library writes.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import DatasetError
from ..errors import sentence as one_line

# What a person can get wrong; everything else is a bug and keeps its traceback. Not `FaiM2FError` alone: model/ travels
# without this package's errors and raises ValueError, as do transformers and huggingface_hub for bad names and configs.
MISTAKES = (ValueError, OSError, ImportError)
DONE, SOME_LEFT_OUT, MISTAKE, INTERRUPTED = 0, 1, 2, 130
STATUSES = {
    DONE: "done",
    SOME_LEFT_OUT: "done, but images that cannot be used were left out (predict)",
    MISTAKE: "wrong arguments or unusable input; one sentence on standard error says what",
    INTERRUPTED: "interrupted, for example with Ctrl+C",
}
# Problems that are printed one by one; a file lists all of them.
MOST_LISTED = 10


def is_main_process() -> bool:
    """Whether this is the process that prints and writes: the first that `accelerate launch` or `torchrun` started."""
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str) -> None:
    """Prints a line in the main process."""
    if is_main_process():
        print(text, flush=True)


def mistake(program: str, error: BaseException, *, everywhere: bool = False) -> int:
    """Prints what was wrong in one sentence; returns the exit status.

    Args:
        program: what the sentence begins with.
        error: what was raised.
        everywhere: print it in whichever process it happened, as others may not have met it; else in the main one.
    """
    if is_main_process() or everywhere:
        if everywhere and sys.stderr.isatty():
            print(file=sys.stderr)  # a progress bar is in this line
        print(f"{program}: {sentence(error)}", file=sys.stderr, flush=True)
    return MISTAKE


def interrupted(program: str, what_now: str = "") -> int:
    """Prints that the command was interrupted, and what is left; returns the exit status."""
    if is_main_process():
        if sys.stderr.isatty():
            print(file=sys.stderr)  # a progress bar, or ^C, is in this line
        text = f"{program}: interrupted; {what_now}" if what_now else f"{program}: interrupted."
        print(text, file=sys.stderr, flush=True)
    return INTERRUPTED


def no_bars(shown: bool = True) -> bool | None:
    """The value of tqdm's `disable`: True for no bar; None for a bar only if standard error is a terminal.

    Args:
        shown: whether this process may show one at all.
    """
    return None if shown else True


def silence_libraries() -> None:
    """Turns off libraries' progress bars: those of loading always, all of them if there is no terminal."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # a model loads in a moment
    if sys.stderr.isatty():
        return
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    datasets: Any = sys.modules.get("datasets")
    if datasets is not None:
        datasets.disable_progress_bars()


def sentence(error: BaseException) -> str:
    """An error's message in one line; see `errors.sentence`."""
    if isinstance(error, DatasetError):
        # One raised in a data loader's process carries that process's traceback in front.
        return " ".join(str(error).rpartition(f"{DatasetError.__name__}: ")[2].split())
    return one_line(error)


def require_packages(names: Sequence[str], extra: str) -> None:
    """Raises an ImportError that names the first of these packages that is missing, and what to install."""
    for name in names:
        try:
            import_module(name)
        except ImportError as error:
            raise ImportError(
                f"This needs {name}, which cannot be imported ({error}): install hf-faim2f[{extra}]."
            ) from error


def say_skipped(problems: Sequence[str]) -> None:
    """Prints how many images were left out, and why."""
    if not problems:
        return
    say(f"{len(problems)} {'image was' if len(problems) == 1 else 'images were'} left out:")
    for problem in problems[:MOST_LISTED]:
        say(f"  {problem}")
    if len(problems) > MOST_LISTED:
        say(f"  and {len(problems) - MOST_LISTED} more")


def emit_predicted(emit: Callable[[Any], None], out: Path, images: int, problems: list[str]) -> int:
    """Passes the JSON document of `faim2f predict` to `emit`; returns the exit status."""
    emit({"out": str(out), "images": images, "written": images - len(problems), "left_out": problems})
    return SOME_LEFT_OUT if problems else DONE


@contextmanager
def one_document(asked: bool) -> Iterator[Callable[[Any], None]]:
    """Gives a function that takes the JSON document, which the main process prints at the end.

    Until then everything that is written to standard output goes to standard error, even by C libraries and
    subprocesses. A command that ends with a mistake passes no document, and prints none.

    Args:
        asked: whether --json was given; without it nothing is printed, and standard output is left alone.
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
    """Makes file descriptor 1 a copy of 2 while the context lasts."""
    with ExitStack() as stack:
        try:
            kept = os.dup(1)
            stack.callback(os.close, kept)
            os.dup2(2, 1)
            stack.callback(os.dup2, kept, 1)
        except OSError:
            pass  # one of them is closed
        yield

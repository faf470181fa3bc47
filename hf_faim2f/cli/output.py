"""Output of commands: errors in one sentence, --json documents, exit statuses.

Errors go to standard error, everything else to standard output. In a distributed run only the main process prints. With
--json, standard output is a single JSON document, even if libraries print.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import DatasetError, SettingsError
from ..errors import out_of_memory as memory_sentence
from ..errors import sentence as one_line

# Errors that the user can cause; any other is a bug and keeps its traceback. These are broader than `FaiM2FError`,
# because model/, which also works without this package, raises ValueError, as do transformers and huggingface_hub for
# bad names and configurations.
MISTAKES = (ValueError, OSError, ImportError)
DONE, SOME_LEFT_OUT, MISTAKE, INTERRUPTED = 0, 1, 2, 130
STATUSES = {
    DONE: "done",
    SOME_LEFT_OUT: "done, but unusable images were skipped (predict) or problems were found (data check)",
    MISTAKE: "invalid arguments or unusable input; one sentence on standard error",
    INTERRUPTED: "interrupted, for example with Ctrl+C",
}
# Seconds after which an interrupt that Python dropped is raised again.
AGAIN = 0.05
# Number of skipped images that are printed; a file lists all of them.
MOST_LISTED = 10


def is_main_process() -> bool:
    """Whether this is the main process, which prints and writes: the first one of `accelerate launch` or `torchrun`."""
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str) -> None:
    """Prints a line if this is the main process."""
    if is_main_process():
        print(text, flush=True)


def mistake(program: str, error: BaseException, *, everywhere: bool = False) -> int:
    """Prints an error in one sentence and returns the exit status.

    Args:
        program: the beginning of the sentence.
        error: the exception.
        everywhere: print in any process, for errors that other processes may not have; else only in the main one.
    """
    if is_main_process() or everywhere:
        if everywhere and sys.stderr.isatty():
            print(file=sys.stderr)  # end the line of a progress bar
        print(f"{program}: {sentence(error)}", file=sys.stderr, flush=True)
    return MISTAKE


def out_of_memory(program: str, images: int) -> int:
    """Prints that a GPU has too little memory for batches of this many images; returns the exit status."""
    return mistake(program, SettingsError(memory_sentence(images)), everywhere=True)


def interrupted(program: str, what_now: str = "") -> int:
    """Prints that the command was interrupted and what was kept; returns the exit status."""
    if is_main_process():
        if sys.stderr.isatty():
            print(file=sys.stderr)  # end the line of a progress bar or of ^C
        text = f"{program}: interrupted; {what_now}" if what_now else f"{program}: interrupted."
        print(text, file=sys.stderr, flush=True)
    return INTERRUPTED


@contextmanager
def sigterm_interrupts(processes: int) -> Iterator[None]:
    """Makes SIGTERM, with which schedulers end jobs, interrupt the block like Ctrl+C, and ensures that neither is lost.

    Python only reports exceptions from weak reference callbacks, destructors and fork hooks. An interrupt that is
    dropped this way is raised again a moment later.

    In a distributed run SIGTERM keeps its effect: torchrun sends it to the other processes when one has failed, and
    they may be in a collective operation that cannot be interrupted. In forked processes, SIGTERM ends the process.

    Args:
        processes: the number of processes in the run.
    """
    if processes > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    own = os.getpid()

    def interrupt(number: int, frame: Any) -> None:
        if os.getpid() != own:
            os._exit(128 + number)
        raise KeyboardInterrupt

    def dropped(what: Any) -> None:
        if has_alarm and issubclass(what.exc_type, KeyboardInterrupt) and os.getpid() == own:
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
        else:
            report(what)

    has_alarm = hasattr(signal, "SIGALRM")  # not on Windows
    report, sys.unraisablehook = sys.unraisablehook, dropped
    numbers = (signal.SIGTERM, signal.SIGALRM) if has_alarm else (signal.SIGTERM,)
    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    finally:
        sys.unraisablehook = report
        if has_alarm:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def no_bars(shown: bool = True) -> bool | None:
    """The value of tqdm's `disable`: True for no bar; None for a bar only if standard error is a terminal.

    Args:
        shown: whether this process may show a bar.
    """
    return None if shown else True


def silence_libraries() -> None:
    """Turns off libraries' progress bars: always those for loading weights, and all of them without a terminal."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # loading takes only a moment
    if sys.stderr.isatty():
        return
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    datasets: Any = sys.modules.get("datasets")
    if datasets is not None:
        datasets.disable_progress_bars()


def sentence(error: BaseException) -> str:
    """An exception's message in one line; see `errors.sentence`."""
    if isinstance(error, DatasetError):
        # The message of an exception from a data loader's process starts with that process's traceback.
        return " ".join(str(error).rpartition(f"{DatasetError.__name__}: ")[2].split())
    return one_line(error)


def use_weights_url(url: str | None, *names: str) -> None:
    """Makes this command download published models from a mirror: the value of --weights-url, None for no mirror.

    Args:
        url: see `zoo.resolve`.
        names: the names of the models on the command line.

    Raises:
        ValueError: it is no URL, or none of the names is that of a published model.
    """
    if url is None:
        return
    from ..download import WEIGHTS_URL, check_url
    from ..zoo import published_source

    check_url(url)
    if not any(published_source(name) for name in names):
        raise SettingsError(f"--weights-url is for published models, and {names[0]} is not one: leave it out.")
    os.environ[WEIGHTS_URL] = url


@contextmanager
def own_weights_url() -> Iterator[None]:
    """Restores the environment variable that `use_weights_url` sets."""
    from ..download import WEIGHTS_URL

    before = os.environ.get(WEIGHTS_URL)
    try:
        yield
    finally:
        os.environ.pop(WEIGHTS_URL, None)
        if before is not None:
            os.environ[WEIGHTS_URL] = before


def require_packages(names: Sequence[str], extra: str) -> None:
    """Raises an ImportError if one of these packages is missing; the message says what to install."""
    for name in names:
        try:
            import_module(name)
        except ImportError as error:
            raise ImportError(
                f"This needs {name}, which cannot be imported ({error}): install hf-faim2f[{extra}]."
            ) from error


def say_skipped(problems: Sequence[str], kind: str = "image") -> None:
    """Prints how many images, or files of another kind, were skipped, and why."""
    if not problems:
        return
    say(f"{len(problems)} {kind} was left out:" if len(problems) == 1 else f"{len(problems)} {kind}s were left out:")
    for problem in problems[:MOST_LISTED]:
        say(f"  {problem}")
    if len(problems) > MOST_LISTED:
        say(f"  and {len(problems) - MOST_LISTED} more")


def emit_predicted(
    emit: Callable[[Any], None], out: Path, images: int, problems: list[str], written: int | None = None
) -> int:
    """Passes the JSON document of `faim2f predict` to `emit`; returns the exit status."""
    written = images - len(problems) if written is None else written
    emit({"out": str(out), "images": images, "written": written, "left_out": problems})
    return SOME_LEFT_OUT if problems else DONE


@contextmanager
def one_document(asked: bool) -> Iterator[Callable[[Any], None]]:
    """Yields a function that takes the JSON document; the main process prints it at the end.

    Until then, everything written to standard output is redirected to standard error, including output of C libraries
    and subprocesses. A command that fails passes no document, and none is printed.

    Args:
        asked: whether --json was given; otherwise nothing is printed or redirected.
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
    """Redirects file descriptor 1 to 2 within the context."""
    with ExitStack() as stack:
        try:
            kept = os.dup(1)
            stack.callback(os.close, kept)
            os.dup2(2, 1)
            stack.callback(os.dup2, kept, 1)
        except OSError:
            pass  # one of the descriptors is closed
        yield

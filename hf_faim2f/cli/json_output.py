"""What --json prints: one document on standard output, and nothing else there, whatever a library writes."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any

from .output import is_main_process


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

"""Loading weights without transformers' own report: what does not fit is told in one sentence by whoever loads."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def quiet_loading() -> Iterator[None]:
    """A block in which transformers warns of nothing, such as by its table of weights of another shape."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


__all__ = ["quiet_loading"]

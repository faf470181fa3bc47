"""Loading weights without transformers' own report: what does not fit is told in one sentence by whoever loads."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

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


def unfit_weights(info: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The names of weights that were missing, and of those that had another shape, sorted.

    Args:
        info: `output_loading_info` of transformers, whose 4.57 has names where 5.x has names with shapes.
    """
    mismatched = [entry if isinstance(entry, str) else str(entry[0]) for entry in info["mismatched_keys"]]
    return sorted(map(str, info["missing_keys"])), sorted(mismatched)


__all__ = ["quiet_loading", "unfit_weights"]

"""Libraries that only evaluation needs: imported when first used, and named with a remedy where they are missing."""

from importlib import import_module
from types import ModuleType

REMEDY = "install hf-faim2f[evaluate]"


def library(name: str) -> ModuleType:
    """The module of this dotted name.

    Raises:
        ImportError: where it cannot be imported, in a sentence that says what to install.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise missing(name, error) from error


def missing(name: str, error: ImportError) -> ImportError:
    """The error to raise where `name` could not be imported because of `error`."""
    return ImportError(f"Evaluation needs {name}, which cannot be imported ({error}): {REMEDY}.", name=name)

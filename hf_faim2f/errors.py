"""The exceptions of this package, and helpers for their messages.

Every message is one sentence for the user: what is wrong, where, and what to do. Commands print it without a traceback
and exit with status 2.
"""

import difflib
from collections.abc import Iterable


class FaiM2FError(ValueError):
    """Base class of all errors caused by invalid input: arguments, files, data or models."""


class ConversionError(FaiM2FError):
    """A checkpoint of another library cannot be converted."""


class DatasetError(FaiM2FError):
    """A dataset, or one of its files, cannot be used."""


class ModelError(FaiM2FError):
    """A model cannot be loaded, or its weights are unusable."""


class DamagedFileError(ModelError):
    """The checksum of a downloaded file differs from the one listed on the Hub."""


class PredictorError(ModelError):
    """A model cannot run with the requested runtime, device or settings."""


class ImageError(FaiM2FError):
    """An image cannot be read."""


class VideoError(FaiM2FError):
    """A video file, a stream or a camera cannot be read, or a video cannot be encoded."""


class DivergenceError(FaiM2FError, RuntimeError):
    """Training diverged: a loss, a gradient or a weight is not finite.

    Attributes:
        bad_weights: the step whose weights give a loss that is not finite; None if unknown.
    """

    bad_weights: int | None = None


class ExportError(FaiM2FError):
    """A model cannot be exported, quantized or built with the given settings."""


class HubError(FaiM2FError):
    """The Hub rejected a request, or could not be reached."""


class FolderError(FaiM2FError):
    """A folder cannot be published."""


class BulkError(FaiM2FError):
    """A distributed run cannot start or continue."""


class WebError(FaiM2FError):
    """A request to the web app cannot be served; the message is shown on the page."""


class SettingsError(FaiM2FError):
    """A setting is unknown, missing or invalid."""


def nearest_name(name: str, known: Iterable[str], cutoff: float = 0.4) -> str | None:
    """The known name most similar to `name`, or None if none is similar enough.

    Args:
        name: what the user typed.
        known: the valid names.
        cutoff: minimum similarity, 0 to 1 (`difflib.SequenceMatcher.ratio`).
    """
    return next(iter(difflib.get_close_matches(name, list(known), 1, cutoff)), None)


def sentence(error: BaseException) -> str:
    """An error's message on one line; an operating system's error as "FILE: REASON."."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return " ".join(text.split())


def first_line(error: BaseException, *, kind: bool = True) -> str:
    """The first line of an error's message, without the final period.

    Args:
        error: the exception.
        kind: prefix the name of its class, as in "KeyError: 'weight'".
    """
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "").rstrip(".")
    if not line:
        return f"{type(error).__name__}: no reason given" if kind else type(error).__name__
    return f"{type(error).__name__}: {line}" if kind else line


__all__ = [
    "BulkError",
    "ConversionError",
    "DamagedFileError",
    "DatasetError",
    "DivergenceError",
    "ExportError",
    "FaiM2FError",
    "FolderError",
    "HubError",
    "ImageError",
    "ModelError",
    "PredictorError",
    "SettingsError",
    "VideoError",
    "WebError",
    "first_line",
    "nearest_name",
    "sentence",
]

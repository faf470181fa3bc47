"""The exceptions of this package, and helpers for their messages.

Every message is one sentence for the user: what is wrong, where, and what to do. Commands print it without a traceback
and exit with status 2.

`hub_error` turns errors of the Hub and the network into such sentences, without tokens. huggingface_hub uses `requests`
up to 0.36, then `httpx`, then `httpx2`. Their exceptions are classified by the status of the response or, if there is
none, by the module of the exception's class.
"""

import difflib
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import constants, get_token
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

# HTTP status codes after which another attempt may succeed.
TRANSIENT = frozenset([408, 425, 429, 500, 502, 503, 504])
NETWORK_MODULES = ("requests", "urllib3", "httpx", "httpx2", "httpcore", "httpcore2", "http.client", "socket", "ssl")
LOOKS_LIKE_A_TOKEN = re.compile(r"\bhf_[A-Za-z0-9_]{8,}|(?<=Bearer )\S+|(?<=://)[^/@\s]+:[^/@\s]+(?=@)")
MOST_CHARACTERS = 300
_Loaded = TypeVar("_Loaded")


class FaiM2FError(ValueError):
    """Base class of all errors caused by invalid input: arguments, files, data or models."""


class ConversionError(FaiM2FError):
    """A checkpoint of another library cannot be converted."""


class DatasetError(FaiM2FError):
    """A dataset, or one of its files, cannot be used."""


class MissingPartError(DatasetError):
    """A dataset has no part of the requested name."""


class UnusableImageError(DatasetError):
    """One image of a dataset, or its annotations, cannot be used; others may be."""


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


def equal_names(names: Iterable[str]) -> tuple[str, str] | None:
    """The first two names that look the same: they differ at most in spaces and in their Unicode form; None if none."""
    first: dict[str, str] = {}
    for name in names:
        shown = unicodedata.normalize("NFC", " ".join(name.split()))
        if shown in first:
            return first[shown], name
        first[shown] = name
    return None


def sentence(error: BaseException) -> str:
    """An error's message on one line; an operating system's error as "FILE: REASON."."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return " ".join(text.split())


def with_name(error: BaseException, name: str, path: str | os.PathLike[str] = "") -> str:
    """The message of an error about "image 0" or "image 0 (PATH)", as the reader calls it, with another name for it."""
    called = rf"image 0(?: \({re.escape(os.fspath(path))}\))?"
    return re.sub(called, lambda _: name, str(error), count=1)


def out_of_memory(images: int) -> str:
    """The sentence for a GPU that has too little memory for batches of this many images."""
    batches = "one image" if images == 1 else f"batches of {images} images"
    advice = "--precision bf16" if images == 1 else "a smaller --batch-size, or --precision bf16"
    return f"The GPU has too little free memory for {batches}: pass {advice}, or stop what else uses it."


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


def try_loading(
    name: str | Path, what: str, load: Callable[[], _Loaded], error: type[ValueError] = ModelError
) -> _Loaded:
    """Calls `load`, and turns any exception into `error` with a one-sentence message.

    Args:
        name: the folder or Hub id, for the message.
        what: what is loaded, as in "The {what} of {name}".
        load: reads untrusted files or the network, and may raise any exception.
        error: the exception class to raise.
    """
    try:
        return load()
    except Exception as reason:
        if Path(name).is_dir():
            raise error(f"The {what} of {name} cannot be loaded: {first_line(reason)}.") from reason
        raise error(
            f"{name} is not a folder here, and loading its {what} from the Hub failed: {first_line(reason)}."
        ) from reason


def redacted(text: str) -> str:
    """The text with the current tokens, and anything that looks like a token, replaced by asterisks."""
    for secret in (get_token(), os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN")):
        if secret and secret.strip():
            text = text.replace(secret.strip(), "***")
    return LOOKS_LIKE_A_TOKEN.sub("***", text)


def status_of(error: BaseException) -> int | None:
    """The HTTP status code of the response that caused an error; None if there was no response."""
    for one in _chain(error):
        response = getattr(one, "response", None)
        status = getattr(response, "status_code", None)
        if isinstance(status, int):
            return status
    return None


def is_network_error(error: BaseException) -> bool:
    """Whether the Hub could not be reached, or the connection was lost."""
    if status_of(error) is not None:
        return False
    return any(
        isinstance(one, (ConnectionError, TimeoutError))
        or any(kind.__module__.split(".")[0] in NETWORK_MODULES for kind in type(one).__mro__)
        for one in _chain(error)
        if not isinstance(one, OfflineModeIsEnabled)
    )


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed if repeated."""
    if any(isinstance(one, OfflineModeIsEnabled) for one in _chain(error)):
        return False
    return status_of(error) in TRANSIENT or is_network_error(error)


def wait_asked_for(error: BaseException) -> float | None:
    """The delay in seconds that the Hub asks for (Retry-After); None if the response has none."""
    for one in _chain(error):
        headers = getattr(getattr(one, "response", None), "headers", None)
        value = headers.get("Retry-After", "") if headers is not None else ""
        if str(value).strip().isdigit():
            return float(value)
    return None


def hub_error(error: BaseException, repository: str) -> HubError:
    """Turns an exception into an error with a one-sentence message that says what to do, without tokens.

    Args:
        error: an exception of huggingface_hub.
        repository: the requested repository.
    """
    return HubError(redacted(" ".join(_hub_sentence(error, repository).split())))


def _hub_sentence(error: BaseException, repository: str) -> str:
    again = "nothing was committed; run the same command later, and what has been uploaded is not sent again."
    chain = list(_chain(error))
    if any(isinstance(one, OfflineModeIsEnabled) for one in chain):
        return "HF_HUB_OFFLINE is set, so nothing can be sent to the Hub: unset it."
    if any(isinstance(one, HFValidationError) for one in chain):
        return f"{repository!r} is not the name of a repository: it must be OWNER/NAME ({_hub_words(error)})."
    status = status_of(error)
    if status == 401:
        return (
            f"The Hub rejected the token (401), or {repository} is not visible to it: log in with `hf auth login`, or "
            "set HF_TOKEN to a token with write permission."
        )
    if status == 403:
        return (
            f"The token may not write to {repository} (403): use one with write permission from a member of "
            f"{repository.partition('/')[0]}."
        )
    if status == 404:
        return f"{repository} or its revision is not on the Hub, or is not visible to the token (404)."
    if status in (409, 412):
        return f"{repository} was changed by someone else meanwhile ({status}): run the same command again."
    if status == 413:
        return f"A file is too large for the Hub (413): save the model in smaller shards ({_hub_words(error)})."
    if status == 429:
        wait = wait_asked_for(error)
        for_how_long = f"for {wait:.0f} seconds" if wait else "for some minutes"
        return f"The Hub accepts no more requests {for_how_long} (429); {again}"
    if status is not None and status >= 500:
        return f"The Hub failed ({status}) at every attempt; {again}"
    if status is not None:
        return f"The Hub refused {repository} ({status}): {_hub_words(error)}"
    if is_network_error(error):
        lost = f"The Hub at {constants.ENDPOINT} cannot be reached, or the connection was lost"
        return f"{lost} ({_hub_words(error)}); {again}"
    return f"{repository} could not be published: {_hub_words(error)}"


def _hub_words(error: BaseException) -> str:
    """The message in the Hub's response, or else that of the innermost error, shortened to one line."""
    chain = list(_chain(error))
    answers = [getattr(one, "server_message", None) for one in chain]
    for one in [*filter(None, answers), *reversed(chain)]:
        text = " ".join(str(one).split())
        if text:
            return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + "…"
    return type(error).__name__


def _chain(error: BaseException | None) -> Iterator[Any]:
    """The error and its causes; stops if the chain has a cycle."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


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
    "UnusableImageError",
    "VideoError",
    "WebError",
    "equal_names",
    "first_line",
    "hub_error",
    "is_network_error",
    "is_transient",
    "nearest_name",
    "out_of_memory",
    "redacted",
    "sentence",
    "status_of",
    "try_loading",
    "wait_asked_for",
]

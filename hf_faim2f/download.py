"""Downloads untrusted files: one from any URL, or a model's from the Hub.

A file from a URL is written to `NAME.partial`, and renamed when it is complete. After an interruption, the same call
continues where the last one stopped. Requests go through huggingface_hub's session, so its settings of proxies,
certificates and offline mode apply.

Files from the Hub are compared with the SHA-256 listed there; huggingface_hub compares only sizes.
"""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import constants, get_session, snapshot_download
from huggingface_hub.utils import tqdm

from .errors import (
    TRANSIENT,
    DamagedFileError,
    ModelError,
    first_line,
    is_network_error,
    is_transient,
    redacted,
    wait_asked_for,
)
from .files import sha256_of, write_whole

# The files to download for a model of the Hub; no remote code.
MODEL_FILES = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "README.md",
    "model*.safetensors",
    "model.safetensors.index.json",
)
# Seconds to wait before the second and the third attempt. No retry after an attempt that took longer than PATIENCE.
WAITS, PATIENCE = (0.5, 1.0), 10.0
# Environment variable with a mirror of the published checkpoints; see `zoo.resolve`.
WEIGHTS_URL = "FAIM2F_WEIGHTS_URL"
SHA256 = re.compile(r"[0-9a-f]{64}")
# Seconds before each retry of a URL. The list starts over whenever bytes arrive; for a host that never responded, WAITS
# applies instead. LONGEST_WAIT limits the delay that a server may ask for (Retry-After).
URL_WAITS, LONGEST_WAIT = (0.5, 1.0, 2.0, 4.0), 60.0
# Limit on the size of a file, in bytes; the largest published checkpoint has 0.9 GB.
MOST_BYTES = 4 << 30
# Bytes per read. A larger chunk would lose more when the connection is lost.
CHUNK = 1 << 14
WEB_PAGE = re.compile(rb"\s*<(!doctype|html|head|\?xml|body)", re.IGNORECASE)
# Errors of the network libraries after which a retry is useless: a part of a message, and names of classes.
BAD_CERTIFICATE = "CERTIFICATE_VERIFY_FAILED"
BAD_REDIRECTS = ("InvalidSchema", "InvalidURL", "TooManyRedirects", "UnsupportedProtocol")
TRANSFER = "the same command continues from there"


def has_weights(folder: Path) -> bool:
    """Whether a folder has weights for torch, whole or split, in safetensors or in torch's own format."""
    return any(path for pattern in ("*.safetensors*", "pytorch_model*.bin*") for path in folder.glob(pattern))


@dataclass
class Progress:
    """The state of a partial download, which is stored beside the file.

    Args:
        url: its source, without secrets.
        total: size of the whole file in bytes; None if the server does not state it.
        validator: the ETag or the date of the server's version; None if the server states neither.
    """

    url: str
    total: int | None
    validator: str | None


class _TryAgain(Exception):
    """A failed attempt after which a retry may succeed; `response` is the server's response, if there was one."""

    def __init__(self, reason: str, response: Any = None) -> None:
        super().__init__(reason)
        self.response = response


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids requests."""
    return bool(constants.HF_HUB_OFFLINE)


def download_file(
    url: str,
    path: Path,
    what: str,
    size: int | None = None,
    announce: Callable[[int | None], object] = lambda _: None,
    remedy: str = "",
) -> None:
    """Downloads a file, and continues an interrupted download.

    Only one process may download to a path at a time.

    Args:
        url: an http or https URL.
        path: the file to write; its folder must exist.
        what: what the file is called in messages and beside the progress bar.
        size: the size that the file must have, in bytes; None if unknown.
        announce: called once with the size of the file (None if unknown) before its bytes arrive.
        remedy: what follows the message about a file of another size: what to do if it is trusted.

    Raises:
        ModelError: the file cannot be downloaded. Bytes that arrived stay in the partial file.
        KeyboardInterrupt: the user pressed Ctrl+C; the message says how much has arrived.
    """
    check_url(url)
    if is_offline():
        raise ModelError(
            f"{what} is not in the cache, and HF_HUB_OFFLINE is set: unset it, or copy the cache from a machine that "
            "has the model."
        )
    partial = path.with_name(f"{path.name}.partial")
    failures, answered, announced = 0, False, False
    while not _is_whole(url, partial):
        before = _size_of(partial)
        try:
            with _get(url, _headers(url, partial)) as (response, chunks):
                answered = True
                _check_answer(url, response, what)
                progress = _begin(url, response, partial, size, remedy)
                if not announced:
                    announce(progress.total)
                    announced = True
                _receive(chunks, partial, progress, what)
            break
        except KeyboardInterrupt:
            kept = size_in_words(_size_of(partial))
            raise KeyboardInterrupt(f"{kept} of {what} have arrived; {TRANSFER}.") from None
        except ModelError:
            raise
        # The exceptions of the HTTP libraries that huggingface_hub uses have no common base class.
        except Exception as error:
            failures = 1 if _size_of(partial) > before else failures + 1
            waits = URL_WAITS if answered else WAITS
            if failures > len(waits) or not _may_pass(error):
                raise ModelError(_refusal(url, error, partial, what)) from error
            asked = wait_asked_for(error)
            if asked is not None and asked > LONGEST_WAIT:
                raise ModelError(
                    f"{bare_url(url)} accepts no requests for {asked:.0f} seconds: run the same command after that."
                ) from error
            time.sleep(waits[failures - 1] if asked is None else asked)
    partial.replace(path)
    _progress_file(partial).unlink(missing_ok=True)


def check_url(url: str) -> None:
    """Raises ModelError unless a URL is an http or https URL."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ModelError(f"{bare_url(url)} is not a URL to download from: it must start with https:// or http://.")


@contextmanager
def _get(url: str, headers: dict[str, str]) -> Iterator[tuple[Any, Iterator[bytes]]]:
    """Sends a request; yields the response and the chunks of its body."""
    session: Any = get_session()
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    if callable(getattr(session, "stream", None)):  # an httpx client, as of huggingface_hub 1.0
        with session.stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
            yield response, response.iter_bytes()  # as they arrive
    else:
        with session.get(url, headers=headers, timeout=timeout, stream=True) as response:
            yield response, response.iter_content(CHUNK)


def _headers(url: str, partial: Path) -> dict[str, str]:
    """The headers of a request: for the missing bytes if the partial file is from this URL; otherwise it is removed."""
    headers = {"Accept-Encoding": "identity"}  # compressed bytes could not be counted or continued
    progress, here = _read_progress(partial), _size_of(partial)
    if (
        progress is None
        or progress.url != bare_url(url)
        or not here
        or (progress.total is not None and here >= progress.total)
    ):
        partial.unlink(missing_ok=True)
        return headers
    headers["Range"] = f"bytes={here}-"
    if progress.validator is not None and not progress.validator.startswith("W/"):
        headers["If-Range"] = progress.validator  # a server with another version then sends all of it
    return headers


def _check_answer(url: str, response: Any, what: str) -> None:
    """Checks that the body of a response can be the file.

    Raises:
        ModelError: it is not the file, and a retry would not help.
        _TryAgain: a retry may succeed.
    """
    status, name = response.status_code, bare_url(url)
    for hop in (*response.history, response):
        scheme = urlsplit(str(hop.url)).scheme
        if scheme not in ("http", "https") or (url.startswith("https:") and scheme != "https"):
            raise ModelError(f"{name} leads to {bare_url(str(hop.url))}, which is not encrypted: refused.")
    elsewhere = "name a mirror by --weights-url or FAIM2F_WEIGHTS_URL, or convert a file that you have"
    if status in (404, 410):
        raise ModelError(f"There is no file {name} ({status}), so {what} cannot be downloaded: {elsewhere}.")
    if status in (401, 403, 407, 451):
        raise ModelError(f"{name} refuses the download ({status}): check your proxy, or {elsewhere}.")
    if status == 416 or status in TRANSIENT:
        raise _TryAgain(f"status {status}", response)
    if status not in (200, 206):
        raise ModelError(f"{name} answers with the status {status} instead of a file: {elsewhere}.")
    if response.headers.get("Content-Type", "").lower().startswith(("text/html", "application/xhtml")):
        raise ModelError(_web_page(url))
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding not in ("", "identity"):
        raise ModelError(f"{name} sends its file compressed ({encoding}), which was not asked for: {elsewhere}.")


def _begin(url: str, response: Any, partial: Path, size: int | None, remedy: str) -> Progress:
    """Checks the announced size and range, and records the download's source.

    Raises:
        ModelError: the file has another size than `size`, is too large, or does not fit on the disk.
        _TryAgain: the server sends another part of the file than requested.
    """
    headers, here = response.headers, _size_of(partial)
    length = headers.get("Content-Length", "")
    total = int(length) if length.isdigit() else None
    validator = headers.get("ETag") or headers.get("Last-Modified")
    if response.status_code == 206:
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", headers.get("Content-Range", ""))
        total = int(found[3]) if found and found[3].isdigit() else None
        known = _read_progress(partial)
        same = known is not None and known.total in (total, None) and known.validator in (validator, None)
        if found is None or int(found[1]) != here or not same:
            partial.unlink(missing_ok=True)
            raise _TryAgain("the server sent another part of the file than it was asked for")
    else:
        here = 0  # the server sends the whole file
    if size is not None and total is not None and total != size:
        raise ModelError(
            f"{bare_url(url)} has {total} bytes now, and had {size} when it was first downloaded: it has changed, and "
            f"is refused.{remedy}"
        )
    if total is not None and total > MOST_BYTES:
        raise ModelError(f"{bare_url(url)} has {size_in_words(total)}, more than any published model: refused.")
    _check_disk(partial, (total or 0) - here)
    progress = Progress(bare_url(url), total, validator)
    with _disk_errors(partial):
        if here == 0:
            partial.unlink(missing_ok=True)
        write_whole(_progress_file(partial), json.dumps(asdict(progress)))
    return progress


def _receive(chunks: Iterator[bytes], partial: Path, progress: Progress, what: str) -> None:
    """Appends the body of a response to the partial file, with a progress bar on a terminal.

    Raises:
        ModelError: it is a web page, too large, or cannot be written.
        _TryAgain: the body ended too early.
    """
    here = _size_of(partial)
    with _disk_errors(partial):
        file = partial.open("ab", buffering=0)  # so that closing it on a full disk has nothing left to write
    bar = tqdm(total=progress.total, initial=here, desc=what, unit="B", unit_scale=True, disable=None)
    with file, bar:
        for chunk in chunks:
            if here == 0 and WEB_PAGE.match(chunk):
                raise ModelError(_web_page(progress.url))
            here += len(chunk)
            if here > (MOST_BYTES if progress.total is None else progress.total):
                raise ModelError(f"{bare_url(progress.url)} sends more bytes than it announced: refused.")
            with _disk_errors(partial):
                rest = memoryview(chunk)
                while rest:
                    rest = rest[file.write(rest) :]
            bar.update(len(chunk))
    if progress.total is not None and here < progress.total:
        raise _TryAgain(f"the connection ended after {here} of {progress.total} bytes")


@contextmanager
def _disk_errors(partial: Path) -> Iterator[None]:
    """Turns errors of the file system into a ModelError. Wraps no network access, whose errors can be OSErrors, too."""
    try:
        yield
    except OSError as error:
        raise ModelError(
            f"{partial.parent} cannot be written ({error.strerror or error}): make room, or set FAIM2F_CACHE to "
            f"another folder; {size_in_words(_size_of(partial))} are kept, and {TRANSFER}."
        ) from error


def _check_disk(partial: Path, missing: int) -> None:
    free = shutil.disk_usage(partial.parent).free
    if missing > free:
        raise ModelError(
            f"The disk of {partial.parent} has {size_in_words(free)} free, but {size_in_words(missing)} remain to "
            "be downloaded: make room, or set FAIM2F_CACHE to a folder on another disk."
        )


def _may_pass(error: Exception) -> bool:
    """Whether a retry may succeed."""
    return (isinstance(error, _TryAgain) or is_transient(error)) and not (
        BAD_CERTIFICATE in str(error) or type(error).__name__ in BAD_REDIRECTS
    )


def _refusal(url: str, error: Exception, partial: Path, what: str) -> str:
    """The error message for a download that failed at every attempt, or with an unexpected error."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    here = _size_of(partial)
    again = f"{size_in_words(here)} are kept, and {TRANSFER}" if here else "run the same command later"
    if status is not None:
        return f"{bare_url(url)} failed at every attempt ({status}): {again}."
    reason = redacted(first_line(error, kind=False))
    if BAD_CERTIFICATE in reason:
        return (
            f"The certificate of {urlsplit(url).hostname} is not trusted here ({reason}): behind a proxy that has its "
            "own, set SSL_CERT_FILE to a file with its certificate."
        )
    if is_network_error(error) and type(error).__name__ not in BAD_REDIRECTS:
        return f"The connection to {urlsplit(url).hostname}, which has {what}, failed or was lost ({reason}): {again}."
    return f"{bare_url(url)} cannot be downloaded ({reason}): {again}."


def _web_page(url: str) -> str:
    return (
        f"{bare_url(url)} answers with a web page instead of weights: a proxy or a login may be in the way; open it in "
        "a browser, or name a mirror by --weights-url or FAIM2F_WEIGHTS_URL."
    )


def bare_url(url: str) -> str:
    """A URL without the parts that may be secret: user, password, query and fragment."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}" if parts.scheme else url


def size_in_words(count: int) -> str:
    """A number of bytes in decimal units, such as "55.9 MB"."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


def _is_whole(url: str, partial: Path) -> bool:
    """Whether the partial file is complete, because a process stopped before it could rename the file."""
    progress = _read_progress(partial)
    return progress is not None and progress.url == bare_url(url) and progress.total == _size_of(partial) > 0


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _progress_file(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.json")


def _read_progress(partial: Path) -> Progress | None:
    try:
        return Progress(**json.loads(_progress_file(partial).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


# ----------------------------------------------------------------------------------------------------------------- Hub


def download_model(name: str, revision: str | None = None, patterns: Sequence[str] = MODEL_FILES) -> Path:
    """Downloads a Hub model to the Hub's cache, resuming an interrupted download.

    Args:
        name: "owner/name".
        revision: a branch, tag or commit.
        patterns: names of the files to download, with wildcards.

    Returns:
        The model's folder in the cache.

    Raises:
        DamagedFileError: a file's SHA-256 differs from the one listed on the Hub; the file is removed from the cache.
        Exception: any exception of huggingface_hub, if there is no such model or the Hub cannot be reached.
    """
    folder = Path(_snapshot(name, revision, patterns))
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        # The cache names large files after the SHA-256 listed on the Hub, and small ones after git's hash. Without
        # symbolic links, it keeps the original names.
        blob = file.resolve()
        if SHA256.fullmatch(blob.name) and sha256_of(blob) != blob.name:
            file.unlink()
            blob.unlink()
            raise DamagedFileError(
                f"{file.name} arrived without the SHA-256 that the Hub lists, and was removed: load it again."
            )
    return folder


def _snapshot(name: str, revision: str | None, patterns: Sequence[str]) -> str:
    """Downloads with retries, because versions of huggingface_hub differ in what they retry themselves."""
    for wait in WAITS:
        started = time.monotonic()
        try:
            return snapshot_download(name, revision=revision, allow_patterns=list(patterns))
        # The exceptions of the HTTP libraries that huggingface_hub uses have no common base class.
        except Exception as error:
            if not is_transient(error) or time.monotonic() - started > PATIENCE:
                raise
        time.sleep(wait)
    return snapshot_download(name, revision=revision, allow_patterns=list(patterns))


__all__ = [
    "MODEL_FILES",
    "MOST_BYTES",
    "WEIGHTS_URL",
    "bare_url",
    "check_url",
    "download_file",
    "download_model",
    "is_offline",
    "size_in_words",
]

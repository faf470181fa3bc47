"""The cache of converted models: published checkpoints are downloaded once, converted, and kept as model folders.

It is the folder `faim2f` in HF_HOME, or FAIM2F_CACHE. Each source has an entry:

    fai-mf-m-ade-0a1b2c3d/        the model's name, and the start of the SHA-256 of the source's URL
        record.json               the downloaded file and the converted model
        lock                      held by the process that downloads and converts
        model_final.pth.partial   while downloading
        1-4e5f60718293/           version of the conversion, and start of the SHA-256 of the downloaded file
            fai-mf-m-ade/         the converted model

The downloaded file is deleted after its conversion. The record is kept even if the model is removed: if the file is
downloaded again and differs in size or hash, it is rejected.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock
from safetensors import SafetensorError

from .download import bare_url, check_url, download_file, size_in_words
from .errors import ConversionError, ModelError, first_line
from .files import md5_of, sha256_of, write_whole

# Version of the conversions. Raise it when their results change: cached models are then converted again.
VERSION = 2
RECORD, LOCK = "record.json", "lock"
SOON = 0.05  # seconds to wait for a lock before another process is assumed to hold it
ENTRY = re.compile(r"[\w.-]+-[0-9a-f]{8}")
# Limit on the size of a record in bytes, far above any real one.
MOST_BYTES = 1 << 16


@dataclass(frozen=True)
class Source:
    """Where a published model comes from, and how it becomes a model folder.

    Args:
        name: the model's name, for messages.
        title: the name of its folder.
        url: identifies the source; for a file, the URL to download it from.
        license: the license of the weights, for messages.
        convert: called with the downloaded file or folder, and the folder to write; returns notes for the user.
        fetch: downloads the source's files, and returns their folder and a digest of them; None to download `url`.
        sha256: the SHA-256 that the file must have; None if unknown.
        md5: the first digits of the MD5 that it must have; None if unknown.
    """

    name: str
    title: str
    url: str
    license: str
    convert: Callable[[Path, Path], Sequence[str]]
    fetch: Callable[[], tuple[Path, str]] | None = None
    sha256: str | None = None
    md5: str | None = None


@dataclass(frozen=True)
class Record:
    """What the cache knows about a source.

    Args:
        name, url: as in `Source`.
        size, sha256: of the first file that was downloaded and converted, in bytes and hexadecimal; else None.
        seen: the date of that download, UTC.
        version: the version of the conversion.
        folder: the converted model's folder, relative to the entry.
        weights: the size of its weights in bytes.
    """

    name: str
    url: str
    size: int | None = None
    sha256: str | None = None
    seen: str | None = None
    version: int | None = None
    folder: str | None = None
    weights: int | None = None


@dataclass(frozen=True)
class Entry:
    """A source in the cache.

    Args:
        folder: its folder.
        record: its record.
        model: the folder of the converted model; None if there is none of the current `VERSION`.
    """

    folder: Path
    record: Record
    model: Path | None

    @property
    def size(self) -> int:
        """The bytes that `clean` would free."""
        return sum(path.stat().st_size for part in _removable(self.folder) for path in _files_of(part))


def cache_folder() -> Path:
    """The folder of the cache, which need not exist."""
    own = os.environ.get("FAIM2F_CACHE", "").strip()
    return Path(own).expanduser() if own else Path(constants.HF_HOME) / "faim2f"


def cached_model(name: str, url: str) -> Path | None:
    """The folder of a converted model in the cache, without network access; None if there is none.

    Args:
        name, url: as in `Source`.
    """
    return _model_of(entry_folder(name, url))


def converted_model(source: Source) -> Path:
    """The folder of a converted model; downloads and converts it unless it is in the cache.

    Raises:
        ModelError: it cannot be downloaded or converted, or its file has changed; one sentence.
        OSError: the cache cannot be written.
        KeyboardInterrupt: a download was interrupted; the message says how much has arrived.
    """
    entry = entry_folder(source.name, source.url)
    if model := _model_of(entry):
        return model
    if source.fetch is None:
        check_url(source.url)
    try:
        entry.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(
            f"The cache {cache_folder()} cannot be written ({error.strerror}): set FAIM2F_CACHE to another folder."
        ) from error
    with _locked(entry, source.name):
        # Another process may have converted it in the meantime.
        return _model_of(entry) or _make(entry, source)


def _make(entry: Path, source: Source) -> Path:
    known = _read_record(entry) or Record(source.name, bare_url(source.url))
    write_whole(entry / RECORD, _text_of(known))  # so that `entries` can name a partial download
    if source.fetch is None:
        path = entry / Path(urlsplit(source.url).path).name
        if not path.is_file():
            download_file(
                source.url, path, source.name, known.size, lambda size: _announce(source, size), _remedy(entry)
            )
        digest, size = sha256_of(path), path.stat().st_size
        try:
            _check_file(path, source, known, digest, size, entry)
        except ModelError:
            path.unlink()
            raise
    else:
        path, digest = source.fetch()
        size = sum(file.stat().st_size for file in path.iterdir())
    for old in entry.iterdir():  # left by a process that was killed, or by an earlier version
        if old.is_dir():
            shutil.rmtree(old)
    out = entry / f"{VERSION}-{digest[:12]}" / source.title
    out.parent.mkdir()
    _convert(path, out, source, entry)
    weights = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    seen = known.seen or datetime.now(timezone.utc).strftime("%Y-%m-%d")
    done = replace(known, size=size, sha256=digest, seen=seen, version=VERSION, weights=weights,
                   folder=str(out.relative_to(entry)))  # fmt: skip
    write_whole(entry / RECORD, _text_of(done), durable=True)
    if source.fetch is None:
        path.unlink()
    return out


def _remedy(entry: Path) -> str:
    """What to do if a published file has changed and is trusted."""
    return f" If you trust the new file, delete {entry / RECORD}."


def _check_file(path: Path, source: Source, known: Record, digest: str, size: int, entry: Path) -> None:
    """Raises ModelError if a downloaded file differs from the published one, or from that of an earlier download."""
    url = bare_url(source.url)
    if source.sha256 is not None and digest != source.sha256:
        raise ModelError(f"{url} has the SHA-256 {digest}, and {source.name} has {source.sha256}: refused and removed.")
    if source.md5 is not None and not (md5 := md5_of(path)).startswith(source.md5):
        raise ModelError(
            f"{url} has the MD5 {md5}, and that of {source.name} starts with {source.md5}: refused and removed."
        )
    if known.sha256 is not None and digest != known.sha256:
        raise ModelError(
            f"{url} has changed since {known.seen}: it had {known.size} bytes and the SHA-256 {known.sha256}, and "
            f"has {size} and {digest}; it is refused.{_remedy(entry)}"
        )


def _convert(path: Path, out: Path, source: Source, entry: Path) -> None:
    try:
        for note in source.convert(path, out):
            print(f"{source.name}: {note}", file=sys.stderr, flush=True)
    except ConversionError as error:
        if source.fetch is None:
            path.unlink()  # otherwise the next call would convert the same file again
        raise ModelError(
            f"{bare_url(source.url)} is not usable as {source.name}, and was removed from the cache: "
            f"{first_line(error, kind=False)}."
        ) from error
    except (OSError, SafetensorError) as error:  # such as a full disk
        reason = getattr(error, "strerror", None) or first_line(error, kind=False)
        raise ModelError(
            f"{source.name} was downloaded, but could not be written to {entry} ({reason}): make room, or set "
            "FAIM2F_CACHE to another folder, and run the same command again."
        ) from error


def _announce(source: Source, size: int | None) -> None:
    how_large = "unknown size" if size is None else size_in_words(size)
    print(
        f"{source.name}: {how_large} from {bare_url(source.url)}, license {source.license}; kept in {cache_folder()}.",
        file=sys.stderr,
        flush=True,
    )


@contextmanager
def _locked(entry: Path, name: str) -> Iterator[None]:
    """Holds the lock of an entry; prints a line if it has to wait for another process."""
    with ExitStack() as stack:
        try:
            stack.enter_context(WeakFileLock(entry / LOCK, timeout=SOON))
        except TimeoutError:
            print(f"{name} is being downloaded by another process: waiting for it.", file=sys.stderr, flush=True)
            stack.enter_context(WeakFileLock(entry / LOCK))
        yield


def entry_folder(name: str, url: str) -> Path:
    """The folder of a source in the cache; see `Source`."""
    slug = re.sub(r"[^\w.-]+", "-", name).strip("-.")[:80]
    return cache_folder() / f"{slug}-{sha256_of(bare_url(url).encode())[:8]}"


def _model_of(entry: Path, record: Record | None = None) -> Path | None:
    """The converted model of an entry; None if it is missing, incomplete or of another version."""
    record = record or _read_record(entry)
    if record is None or record.version != VERSION or record.folder is None:
        return None
    model = entry / record.folder
    if not (model / "config.json").is_file():
        return None
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    return model if weights == record.weights else None


def _text_of(record: Record) -> str:
    return json.dumps(asdict(record), indent=1) + "\n"


def _read_record(entry: Path) -> Record | None:
    """The record of an entry; None if there is none.

    Raises:
        ModelError: it cannot be read. Without it, a changed file would not be noticed.
    """
    path = entry / RECORD
    try:
        with path.open("rb") as file:
            values = json.loads(file.read(MOST_BYTES))
        record = Record(**values)
        if record.folder is not None and (".." in Path(record.folder).parts or Path(record.folder).is_absolute()):
            raise ValueError("its folder is elsewhere")
        return record
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path} cannot be read ({first_line(error, kind=False)}): delete it.") from error


def entries() -> list[Entry]:
    """The sources in the cache, sorted by name. Other folders are left out.

    Raises:
        ModelError: a record cannot be read.
    """
    root = cache_folder()
    found = []
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        if not ENTRY.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
            continue
        record = _read_record(folder)
        if record is not None and entry_folder(record.name, record.url) == folder:
            found.append(Entry(folder, record, _model_of(folder, record)))
    return found


def clean(entry: Entry) -> None:
    """Removes the model and any partial download of a source, and keeps its record.

    Raises:
        ModelError: another process is using the entry.
        OSError: a file cannot be removed.
    """
    try:
        with WeakFileLock(entry.folder / LOCK, timeout=SOON):
            for path in _removable(entry.folder):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    except TimeoutError as error:
        raise ModelError(f"{entry.record.name} is being downloaded by another process, and was not removed.") from error


def _removable(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.name not in (RECORD, LOCK)]


def _files_of(path: Path) -> Iterator[Path]:
    yield from (file for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


__all__ = [
    "VERSION",
    "Entry",
    "Record",
    "Source",
    "cache_folder",
    "cached_model",
    "clean",
    "converted_model",
    "entries",
    "entry_folder",
]

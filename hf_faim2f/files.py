"""Reading and writing files: text, listing folders, digests, and files and folders that appear whole or not at all."""

import codecs
import fnmatch
import glob
import hashlib
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

logger = logging.getLogger(__name__)

BLOCK = 1 << 20  # bytes
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: Path) -> str:
    """The text of a file, without a byte order mark, its lines ending in "\\n".

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8, in words that say what it is and follow "...: ".
    """
    return decode_text(path.read_bytes())


def decode_text(content: bytes) -> str:
    """The text of the contents of a file; see `read_text`."""
    # Without a mark, text of few letters beyond ASCII is UTF-8 to the letter, with a zero beside each of them.
    if content.startswith(UTF_16) or b"\0" in content:
        raise ValueError('it is UTF-16, which Notepad calls "Unicode", or no text: save it as UTF-8')
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is in another encoding: save it as UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def files_below(folder: Path) -> Iterator[Path]:
    """The files in a folder and below it, by name, those of a folder before those of its folders.

    What is hidden is not looked for. Links are followed, except those to a folder that they are in. A folder that
    cannot be read is left out with a warning.
    """
    return _files_below(str(folder), ())


def _files_below(folder: str, above: tuple[str, ...]) -> Iterator[Path]:
    here = os.path.realpath(folder)
    if here in above:
        return
    try:
        with os.scandir(folder) as found:
            entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        logger.warning(f"{folder} is left out: {error.strerror or error}.")
        return
    yield from (Path(folder, entry.name) for entry in entries if _is(entry.is_file))
    for entry in entries:
        if _is(entry.is_dir):
            yield from _files_below(os.path.join(folder, entry.name), (*above, here))


def _is(test: Callable[[], bool]) -> bool:
    """A test of an entry; a link in a circle of links alone is nothing."""
    try:
        return test()
    except OSError:
        return False


def files_of_pattern(pattern: str) -> list[tuple[Path, bool]]:
    """The files that a pattern stands for, by name, and those in the folders that it stands for.

    Args:
        pattern: as in `glob`, with `**` for any folders.

    Returns:
        Each file, and whether the pattern stands for the file itself and not for a folder above it.
    """
    parts = Path(pattern).parts
    if "**" not in parts:
        paths = [Path(name) for name in sorted(glob.glob(pattern))]
        folders = [path for path in paths if path.is_dir()]
        return [(path, True) for path in paths if not path.is_dir()] + [
            (file, False) for folder in folders for file in files_below(folder)
        ]
    place = parts.index("**")
    head, tail = Path(*parts[:place]), parts[place:]
    heads = sorted(glob.glob(str(head))) if glob.has_magic(str(head)) else [str(head)]
    found: dict[Path, bool] = {}
    for base in map(Path, heads):
        for path in files_below(base) if base.is_dir() else ():
            own = path.relative_to(base).parts
            itself = _fits(own, tail)
            if itself or any(_fits(own[:depth], tail) for depth in range(len(own))):
                found[path] = found.get(path, False) or itself
    return sorted(found.items())


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path fit those of a pattern, of which `**` is for any number."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_fits(parts[count:], pattern[1:]) for count in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatch(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def place_of(path: Path) -> str:
    """The same for all ways to a file through links to folders; a link to a file is a file of its own."""
    return os.path.join(os.path.realpath(path.parent), path.name)


def sha256_of(source: "Path | bytes") -> str:
    """The hexadecimal SHA-256 digest of a file, which is read in blocks, or of bytes.

    Raises:
        OSError: the file cannot be read.
    """
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    digest = hashlib.sha256()
    with source.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_whole(
    path: Path,
    content: "str | bytes | Callable[[BinaryIO], object]",
    *,
    beside: Path | None = None,
    durable: bool = False,
) -> None:
    """Writes a file so that a reader finds the old contents or all of the new.

    Two processes that write the same path do not meet: each writes a file of its own, and the last to finish wins.

    Args:
        path: the file; its folder exists.
        content: text (written as UTF-8), bytes, or a function that writes to the binary file it is given.
        beside: the folder of the unfinished file, on the same file system; that of `path` by default.
        durable: flush to the disk before the rename, so that a power failure leaves no empty file.

    Raises:
        OSError: it cannot be written; nothing unfinished is left.
    """
    partial = (beside or path.parent) / f".{path.name}.{uuid.uuid4().hex}.partial"
    try:
        with partial.open("xb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode("utf-8") if isinstance(content, str) else content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_new_folder(out_dir: Path, error: type[Exception]) -> None:
    """Before any work is done for it.

    Args:
        out_dir: a folder that does not exist, in one that does.
        error: what is raised where that is not so, with one sentence that says what to do.
    """
    if out_dir.exists():
        raise error(f"{out_dir} exists already; name a new folder, or remove this one.")
    if not out_dir.parent.is_dir():
        raise error(f"{out_dir.parent} is no folder; make it first, or name another place for {out_dir.name}.")


@contextmanager
def new_folder(out_dir: Path) -> Iterator[Path]:
    """A place to write in, which becomes `out_dir` at the end, and is gone if the block is left by an error."""
    # Beside its goal, so that the last step is a rename within one file system, which either happens or does not.
    staging = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        yield staging
        _publish_permissions(staging)
        staging.rename(out_dir)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _publish_permissions(folder: Path) -> None:
    """A temporary folder, and what safetensors writes, is for its owner alone; the result is as any new file is."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~umask)


__all__ = [
    "check_new_folder",
    "decode_text",
    "files_below",
    "files_of_pattern",
    "new_folder",
    "place_of",
    "read_text",
    "sha256_of",
    "write_whole",
]

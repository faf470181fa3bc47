"""Reads, finds, hashes and writes files.

Writing is atomic: `write_whole` for a file, `new_folder` for a folder.
"""

import codecs
import errno
import fnmatch
import glob
import hashlib
import itertools
import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import yaml

from .errors import SettingsError, first_line

logger = logging.getLogger(__name__)

BLOCK = 1 << 20  # bytes
MOST_ALIASED = 1 << 20  # nodes and characters that the aliases of a YAML file may stand for in all
# Photographs in formats that Pillow, or some of its builds, cannot read.
UNREAD = tuple(".heic .heif .hif .avif .jxl .jp2 .j2k .dng .cr2 .cr3 .nef .arw .orf .raf .rw2 .psd".split())
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: Path) -> str:
    """Reads a UTF-8 text file; drops a byte order mark and turns every line ending into "\\n".

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8. The message names the encoding, and is meant to follow "FILE: ".
    """
    return decode_text(path.read_bytes())


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON, or holds something else. The message is meant to follow "FILE: ".
    """
    try:
        values = json.loads(read_text(path))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(values, dict):
        raise ValueError(f"it holds a {type(values).__name__}")
    return values


class YamlLoader(yaml.SafeLoader):
    """YAML loader for untrusted files: bounds what aliases stand for, which can make a huge document of a small file.

    The size of a node is its number of nodes and characters, with aliases written out.
    """

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.size = self.aliased = 0
        self.sizes: dict[int, int] = {}  # by the id of a composed node

    def compose_node(self, parent: Any, index: Any) -> Any:
        is_alias, before = self.check_event(yaml.AliasEvent), self.size
        node = super().compose_node(parent, index)
        if is_alias:
            own = self.sizes.get(id(node), MOST_ALIASED + 1)  # without a size, it contains the alias
            self.size, self.aliased = self.size + own, self.aliased + own
            if self.aliased > MOST_ALIASED:
                raise yaml.YAMLError("its aliases stand for a huge document: write the values in their place")
        else:
            self.size += 1 + (len(node.value) if isinstance(node, yaml.ScalarNode) else 0)
            self.sizes[id(node)] = self.size - before
        return node


def yaml_problem(error: Exception) -> str:
    """The line and the reason of an error in reading YAML, to follow "FILE is not YAML"."""
    mark = getattr(error, "problem_mark", None)
    where = f" (line {mark.line + 1})" if mark else ""
    return f"{where}: {getattr(error, 'problem', None) or first_line(error, kind=False)}"


def decode_text(content: bytes) -> str:
    """Decodes the contents of a text file; see `read_text`.

    Raises:
        ValueError: it is not UTF-8; see `read_text`.
    """
    # ASCII text in UTF-16 is also valid UTF-8, with a zero byte next to each letter. It may lack a byte order mark.
    if content.startswith(UTF_16) or b"\0" in content:
        raise ValueError('it is UTF-16, which Notepad calls "Unicode", or not text: save it as UTF-8')
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is in another encoding: save it as UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def files_below(folder: Path, suffixes: Collection[str] | None = None) -> Iterator[Path]:
    """Lists the files in a folder and its subfolders, sorted by name, files before subfolders.

    Hidden files and folders are skipped. Symbolic links are followed, except those to a folder that contains them; a
    link to nothing counts as a file, which cannot be read. A folder that cannot be read is skipped with a warning.

    Args:
        folder: the folder to search.
        suffixes: lowercase suffixes of the files to list; None for all files.
    """
    for path in _files_below(str(folder), ()):
        if suffixes is None or path.suffix.lower() in suffixes:
            yield path


def warn_of_unread(place: str, files: Iterable[Path], suffixes: Collection[str]) -> None:
    """Warns of photographs in formats that are not among `suffixes`, because a search for these leaves them out."""
    unread = [file for file in files if file.suffix.lower() in UNREAD and file.suffix.lower() not in suffixes]
    if unread:
        what = f"{len(unread)} files are" if len(unread) > 1 else "a file is"
        logger.warning(
            f"{place}: {what} left out, such as {unread[0].name}, in a format that is not read: convert to JPEG or PNG."
        )


def _files_below(folder: str, above: tuple[str, ...]) -> Iterator[Path]:
    here = os.path.realpath(folder)
    if any(path == here or path.startswith(os.path.join(here, "")) for path in above):
        return  # a link to a parent folder
    try:
        with os.scandir(folder) as found:
            entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        logger.warning(f"{folder} is left out: {error.strerror or error}.")
        return
    yield from (Path(folder, entry.name) for entry in entries if _is(entry.is_file) or _is_broken(entry))
    for entry in entries:
        if _is(entry.is_dir):
            yield from _files_below(os.path.join(folder, entry.name), (*above, here))


def _is(test: Callable[[], bool]) -> bool:
    """Runs a test of a directory entry; False for a symbolic link that points to itself."""
    try:
        return test()
    except OSError:
        return False


def _is_broken(entry: "os.DirEntry[str]") -> bool:
    """Whether a directory entry is a link to nothing, such as a file of a disk that is not mounted."""
    return _is(entry.is_symlink) and not os.path.exists(entry.path)


def files_of_pattern(pattern: str) -> list[tuple[Path, bool]]:
    """Lists the files that match a pattern, and all files in folders that match it, sorted by name.

    Args:
        pattern: a `glob` pattern; `**` matches any number of folders.

    Returns:
        Pairs of a file and whether the pattern matches the file itself (True) or only one of its folders (False).
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
            itself = _matches(own, tail)
            if itself or any(_matches(own[:depth], tail) for depth in range(len(own))):
                found[path] = found.get(path, False) or itself
    return sorted(found.items())


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path match those of a pattern, in which `**` matches any number of parts."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[count:], pattern[1:]) for count in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatch(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def place_of(path: Path) -> str:
    """The path with links to folders resolved, to identify duplicates. A link to a file counts as a separate file."""
    return os.path.join(os.path.realpath(path.parent), path.name)


class FoundFile(NamedTuple):
    """A file found for a command-line argument.

    Attributes:
        path: path of the file.
        depth: how many trailing parts of the path, including the file name, were found rather than typed.
    """

    path: Path
    depth: int


def find_files(
    words: Sequence[str],
    suffixes: Collection[str],
    kind: str,
    otherwise: Collection[str] = (),
    is_output: Callable[[Path], bool] = lambda path: False,
) -> list[FoundFile]:
    """Finds the files named on the command line: files, folders (searched recursively) and glob patterns.

    Each file is returned once. A file that is named, or matches a pattern such as `*.png`, may have any suffix; folders
    and patterns that end in `*` give only files with one of `suffixes`. Hidden files are skipped.

    Args:
        words: the arguments.
        suffixes: file suffixes in lowercase.
        kind: what the files are called in messages, such as "image".
        otherwise: suffixes to search for in folders that have no files with `suffixes`.
        is_output: recognizes outputs of earlier runs, which are skipped.

    Raises:
        SettingsError: an argument matches no file.
    """
    found: dict[str, FoundFile] = {}
    for word in words:
        path = base = Path(word)
        named: set[Path] = set()
        if path.is_dir():
            below = list(files_below(path))
        elif os.path.lexists(path):
            if not is_output(path):
                found.setdefault(place_of(path), FoundFile(path, 1))
            continue
        elif glob.has_magic(word):
            matches, base = files_of_pattern(word), above_pattern(word)
            below = [match for match, _ in matches]
            named = {match for match, itself in matches if itself and not word.endswith("*")}
        else:
            raise SettingsError(f"There is no file or folder {printable(word)}.")
        if kind == "image":
            warn_of_unread(printable(word), (file for file in below if file not in named), suffixes)
        matching = [file for file in below if file in named or file.suffix.lower() in suffixes]
        files = [file for file in matching if not is_output(file)]
        if not files and path.is_dir():
            files = [file for file in below if file.suffix.lower() in otherwise and not is_output(file)]
        if not files:
            only = ", only outputs of earlier predictions" if matching else ""
            raise SettingsError(f"There is no {kind} in {printable(word)} ({', '.join(suffixes)}){only}.")
        for file in files:
            depth = len(Path(os.path.relpath(file, base)).parts)
            found.setdefault(place_of(file), FoundFile(file, depth))
    return list(found.values())


def above_pattern(word: str) -> Path:
    """The folder that a glob pattern names before its first wildcard."""
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), Path(word).parts))


def printable(text: object) -> str:
    """Text that may contain a file name, with every unprintable character replaced by "?"."""
    return "".join(character if character.isprintable() else "?" for character in str(text))


def sha256_of(source: "Path | bytes") -> str:
    """The hexadecimal SHA-256 digest of bytes, or of a file, which is read in blocks.

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


def md5_of(path: Path) -> str:
    """The hexadecimal MD5 of a file, which some publishers put into file names. It does not protect from forgery.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
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
    """Writes a file atomically: readers see either the old contents or the new.

    Two processes may write the same path: each writes its own temporary file, and the last to finish wins.

    Args:
        path: the file; its folder must exist.
        content: text (written as UTF-8), bytes, or a function that writes to the binary file it is given.
        beside: folder for the temporary file, on the same file system; by default that of `path`.
        durable: flush to disk before the rename, so that a power failure leaves no empty file.

    Raises:
        OSError: the file cannot be written. The temporary file is removed.
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
    """Checks, before any work is done, that a folder can be created: it must not exist, but its parent must.

    Args:
        out_dir: the folder.
        error: the exception class to raise otherwise.
    """
    if os.path.lexists(out_dir):  # also a link to nothing
        raise error(f"{out_dir} exists already; name a new folder, or remove this one.")
    if not out_dir.parent.is_dir():
        raise error(f"{out_dir.parent} is not a folder; make it first, or name another place for {out_dir.name}.")


def check_empty_folder(out_dir: Path, error: type[Exception], or_else: str = "", flag: str = "--out") -> None:
    """Checks, before any work is done, that an `--out` folder is new or empty, and can be written.

    Args:
        out_dir: the folder.
        error: the exception class to raise otherwise.
        or_else: another remedy for the message about a folder that is not empty, such as ", or pass --overwrite".
        flag: what names the folder on the command line.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise error(f"{out_dir} is a file: choose another folder for {flag}.")
    if out_dir.is_dir() and any(out_dir.iterdir()):
        raise error(f"{out_dir} is not empty: choose a new folder for {flag}{or_else}.")
    check_writable(out_dir, error, flag)


def check_writable(out_dir: Path, error: type[Exception], flag: str = "--out") -> None:
    """Raises `error` if a folder to write can be neither written nor made; `flag` is as in `check_empty_folder`."""
    place = next(filter(os.path.lexists, (out_dir.absolute(), *out_dir.absolute().parents)))  # also a link to nothing
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise error(f"{place} is not a folder that can be written: choose another place for {flag}.")


@contextmanager
def new_folder(out_dir: Path) -> Iterator[Path]:
    """Yields a temporary folder to write to. At the end it becomes `out_dir`; after an error, it is removed.

    An existing `out_dir` may be a mount, a link or the current folder, which cannot be replaced. So it stays, and the
    files are moved into it.

    Args:
        out_dir: a folder that does not exist, or is empty; its parents are created.
    """
    place = out_dir.absolute()
    place.parent.mkdir(parents=True, exist_ok=True)
    # Beside `out_dir`, so that the final rename stays within one file system; inside it if only it can be written.
    inside = place.is_dir() and not os.access(place.parent, os.W_OK)
    staging = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place if inside else place.parent))
    try:
        yield staging
        _apply_umask(staging)
        if place.is_dir():
            _move_files(staging, place)
        else:
            staging.rename(place)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _move_files(staging: Path, out_dir: Path) -> None:
    """Moves what is in a temporary folder into an empty folder, which may be in another file system.

    Raises:
        OSError: the folder is not empty, or cannot be written; nothing is left in it.
    """
    if any(path != staging for path in out_dir.iterdir()):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(out_dir))
    paths = list(staging.iterdir())
    try:
        for path in paths:
            shutil.move(path, out_dir / path.name)
    except BaseException:
        for path in paths:
            target = out_dir / path.name
            shutil.rmtree(target, ignore_errors=True) if target.is_dir() else target.unlink(missing_ok=True)
        raise
    shutil.rmtree(staging, ignore_errors=True)


def _apply_umask(folder: Path) -> None:
    """Sets default permissions on a temporary folder and its files; `mkdtemp` and safetensors make them private."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


__all__ = [
    "FoundFile", "YamlLoader", "above_pattern", "check_empty_folder", "check_new_folder", "check_writable",
    "decode_text", "files_below", "files_of_pattern", "find_files", "md5_of", "new_folder", "place_of", "printable",
    "read_object", "read_text", "sha256_of", "write_whole",
]  # fmt: skip

"""Which rows of which files hold images: of Parquet files, of data sets of the Hub, and of those that `datasets` saved.

Of the Hub, the Parquet files of one commit are read, or, where a data set has none, those that the Hub itself made of
it (its branch `refs/convert/parquet`).
"""

import glob
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import snapshot_download

from ..data.readers.hub import IMAGE_NAMES
from ..errors import BulkError, first_line
from ..files import files_below, files_of_pattern
from .pieces import Piece, printable

SUFFIX = ".parquet"
# What `Dataset.save_to_disk` and `DatasetDict.save_to_disk` leave in a folder.
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
CONVERTED = "refs/convert/parquet"
# Of a Parquet file: how long its description is, and a mark, are its last bytes.
TAIL = 8


@dataclass(frozen=True)
class Found:
    """Pieces, and a stamp for each: another where the file is another."""

    pieces: list[Piece]
    stamps: list[str]


def names_rows(word: str) -> bool:
    """Whether a word stands for files of rows and not for image files: those are what is on this machine."""
    path = Path(word)
    if path.is_dir():
        return _is_saved(path) or any(_parquet_below(path))
    if os.path.lexists(path):
        return path.suffix == SUFFIX
    if glob.has_magic(word):
        return word.endswith(SUFFIX)
    return HUB_NAME.fullmatch(word) is not None


def find_rows(words: Sequence[str], column: str | None = None, split: str | None = None) -> Found:
    """The rows that words stand for; each file's once.

    Args:
        words: Parquet files, folders with some below them, patterns, folders that `datasets` saved, names of the Hub.
        column: of images, where it cannot be guessed.
        split: of a saved data set its name; else the files whose name, or a folder's above it, begins with it.

    Raises:
        BulkError: a word stands for nothing, or a file cannot be read, or has no column of images.
    """
    found: dict[tuple[str, str | None], tuple[Piece, str]] = {}
    for word in words:
        path = Path(word)
        if path.is_dir() and _is_saved(path):
            pieces = _saved(path, column, split)
        elif path.is_dir():
            files = _of_split(sorted(_parquet_below(path)), path, split)
            pieces = (_piece(file, printable(str(file)), column) for file in files)
        elif os.path.lexists(path):
            pieces = iter([_piece(path, printable(word), column)])
        elif glob.has_magic(word):
            matches = [path for path, itself in files_of_pattern(word) if itself]
            files = _of_split(matches, None, split)
            pieces = (_piece(file, printable(str(file)), column) for file in files)
        else:
            pieces = _of_hub(word, column, split)
        own = list(pieces)
        for piece, stamp in own:
            found.setdefault((piece.path, piece.repo), (piece, stamp))
        if not own:
            raise BulkError(f"There is no Parquet file in {printable(word)}{_told(split)}.")
    filled = [(piece, stamp) for piece, stamp in found.values() if piece.count]
    if not filled:
        raise BulkError(f"The files of {', '.join(map(printable, words))} have no rows.")
    return Found([piece for piece, _ in filled], [stamp for _, stamp in filled])


def _is_saved(path: Path) -> bool:
    return (path / SAVED).is_file() or (path / SAVED_SPLITS).is_file()


def _parquet_below(path: Path) -> Iterator[Path]:
    """What is hidden, or of a run like this one, is not looked for."""
    for file in files_below(path):
        if file.name.endswith(SUFFIX) and not any(part.startswith("_") for part in file.relative_to(path).parts):
            yield file


def _of_split(files: Sequence[Path], root: Path | None, split: str | None) -> list[Path]:
    if split is None:
        return list(files)
    parts = [(file.relative_to(root) if root else file).parts for file in files]
    chosen = [file for file, own in zip(files, parts, strict=True) if any(part.startswith(split) for part in own)]
    if not chosen:
        raise BulkError(f"No Parquet file's name, nor a folder's above it, begins with the split {split!r}.")
    return chosen


def _told(split: str | None) -> str:
    return f" of the split {split!r}" if split else ""


def _piece(
    path: Path, key: str, column: str | None, repo: str | None = None, revision: str | None = None, inside: str = ""
) -> tuple[Piece, str]:
    """All rows of a Parquet file, by its last bytes alone; these may be the same of other rows, but not when it was
    written, which the Hub's commit says better."""
    if path.exists() and not path.is_file():  # a pipe would be waited for, perhaps for ever
        raise BulkError(f"{key} is no file.")
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            length = int.from_bytes(file.read(4), "little")
            file.seek(max(0, size - TAIL - length))
            written = "" if repo else os.fstat(file.fileno()).st_mtime_ns
            stamp = hashlib.sha256(file.read(length) + f"{size} {written}".encode()).hexdigest()
        description = pq.read_metadata(path)
        schema = description.schema.to_arrow_schema()
    except (OSError, pa.ArrowException, ValueError) as error:  # names of columns may be no UTF-8
        raise BulkError(f"{key} cannot be read as a Parquet file: {first_line(error)}.") from error
    chosen = _choose_column({field.name: _kind(field.type) for field in schema}, key, column)
    place = inside or str(path.absolute())
    return Piece(place, key, 0, description.num_rows, chosen, repo, revision), stamp


def _kind(kind: pa.DataType) -> str:
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return "bytes"
    if pa.types.is_struct(kind) and any(_kind(field.type) == "bytes" for field in kind if field.name == "bytes"):
        return "image"
    return str(kind) if len(str(kind)) <= 40 else type(kind).__name__


def _choose_column(kinds: dict[str, str], name: str, column: str | None) -> str:
    listing = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
    able = [name for name, kind in kinds.items() if kind in ("image", "bytes")]
    if column is not None:
        if column not in kinds:
            raise BulkError(f"{name} has no column {column!r}. Its columns: {listing}.")
        if column not in able:
            raise BulkError(f"The column {column!r} of {name} holds no images. Its columns: {listing}.")
        return column
    by_name = {one.lower(): one for one in able}
    guess = next((by_name[usual] for usual in IMAGE_NAMES if usual in by_name), None)
    if guess is None and len(able) == 1:
        guess = able[0]
    if guess is None:
        raise BulkError(
            f"Which column of {name} has the images cannot be told: name it with --column. Its columns: {listing}."
        )
    return guess


def _saved(path: Path, column: str | None, split: str | None) -> Iterator[tuple[Piece, str]]:
    """A folder that `datasets` saved, whole or of one split."""
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # its files may be anything
        raise BulkError(f"{path} cannot be read as a data set that `datasets` saved: {first_line(error)}.") from error
    if isinstance(loaded, datasets.Dataset):
        if split is not None:
            raise BulkError(f"{path} is one data set without splits: leave --split out.")
        parts = {"": loaded}
    elif split is not None and split not in loaded:
        raise BulkError(f"{path} has no split {split!r}. Its splits: {', '.join(loaded)}.")
    else:
        parts = {name: data for name, data in loaded.items() if split in (None, name)}
    for name, data in parts.items():
        folder = path / name
        key = printable(str(folder))
        kinds = {field.name: _kind(field.type) for field in data.features.arrow_schema}
        chosen = _choose_column(kinds, key, column)
        stamp = hashlib.sha256((folder / SAVED).read_bytes()).hexdigest()
        yield Piece(str(folder.absolute()), key, 0, len(data), chosen), stamp


def _of_hub(name: str, column: str | None, split: str | None) -> Iterator[tuple[Piece, str]]:
    """The Parquet files of a data set of the Hub, which are downloaded: how many rows they have stands in them."""
    missing = f"There is no file or folder {printable(name)}"
    try:
        folder = _snapshot(name, None)
        files = sorted(_parquet_below(folder))
        if not files:
            folder = _snapshot(name, CONVERTED)
            files = sorted(_parquet_below(folder))
    except Exception as error:  # whatever a name, the network and the library make of it
        raise BulkError(f"{missing}, and a data set of the Hub cannot be had by that name: {first_line(error)}."
                        ) from error  # fmt: skip
    if not files:
        raise BulkError(f"The data set {name} of the Hub has no Parquet files: download it, and name its folder.")
    for file in _of_split(files, folder, split):
        inside = file.relative_to(folder).as_posix()
        yield _piece(file, f"{name}/{printable(inside)}", column, name, folder.name, inside)


def _snapshot(name: str, revision: str | None) -> Path:
    patterns = [f"*{SUFFIX}"]
    return Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=patterns))


__all__ = ["Found", "find_rows", "names_rows"]

"""Images in rows of Parquet files and saved datasets: finding and reading them.

For a dataset on the Hub, the Parquet files of one commit are read. If it has none, those that the Hub generated from it
(in its branch `refs/convert/parquet`) are read instead.
"""

import glob
import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import hf_hub_download, snapshot_download

from ..errors import BulkError, first_line
from ..files import above_pattern, files_below, files_of_pattern, place_of, sha256_of
from .parts import Piece, escape_path
from .plan import FOLDER

SUFFIX = ".parquet"
# Folders whose Parquet files are no data: of a bulk run, of Delta tables, and of Spark jobs that go on.
NOT_ROWS = frozenset({FOLDER, "_delta_log", "_temporary"})
# Files that identify the output of `Dataset.save_to_disk` and `DatasetDict.save_to_disk`.
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
CONVERTED = "refs/convert/parquet"
# The start of the names of folders there that have only the first rows of a large dataset.
PARTIAL = "partial-"
# The last bytes of a Parquet file: the length of its footer, and a magic number.
TAIL = 8
# Rows in memory at a time; images are large.
ROWS_AT_ONCE = 8
# Maximum bytes of an image in a row, far above those of a photograph.
MOST_BYTES = 1 << 30


@dataclass(frozen=True)
class FoundRows:
    """Pieces, each with a stamp that changes when its file changes."""

    pieces: list[Piece]
    stamps: list[str]


class Entry(NamedTuple):
    """An image, or an error message.

    Attributes:
        key: the image's key in the results.
        file: the image's file name in its row, if any.
        source: the path of a file, or an open file; None if there is no image.
        error: one sentence, or None.
    """

    key: str
    file: str | None
    source: Any
    error: str | None


def names_rows(word: str, out: Path | None = None) -> bool:
    """Whether a command-line argument names files of rows rather than image files. Files inside `out` do not count."""
    path = Path(word)
    if path.is_dir():
        return _is_saved(path) or any(_outside(_parquet_below(path), out))
    if os.path.lexists(path):
        return path.suffix == SUFFIX
    if glob.has_magic(word):
        return word.endswith(SUFFIX)
    return HUB_NAME.fullmatch(word) is not None


def find_rows(
    words: Sequence[str], column: str | None = None, split: str | None = None, out: Path | None = None
) -> FoundRows:
    """Finds the files of rows that the command line names, without duplicates.

    Args:
        words: Parquet files, folders with Parquet files below them, glob patterns, folders saved by `datasets`, Hub
            ids.
        column: the column of images; None to guess it.
        split: the name of a split of a saved dataset; for Parquet files, in the name of the file or of a folder above
            it, up to the one that `words` name, see `files_of_split`.
        out: the output folder, which is not searched.

    Raises:
        BulkError: an argument matches nothing, or a file cannot be read or has no column of images.
    """
    found: dict[tuple[str, str | None], tuple[Piece, str]] = {}
    for word in words:
        path = Path(word)
        if path.is_dir() and _is_saved(path):
            pieces = _saved_pieces(path, column, split)
        elif path.is_dir():
            files = _files_of_split(sorted(_outside(_parquet_below(path), out)), path, split)
            pieces = (_parquet_piece(file, escape_path(str(file)), column) for file in files)
        elif os.path.lexists(path):
            files = _files_of_split([path], path.parent, split)
            pieces = (_parquet_piece(file, escape_path(word), column) for file in files)
        elif glob.has_magic(word):
            matches = (path for path, itself in files_of_pattern(word) if itself)
            files = _files_of_split(list(_outside(matches, out)), above_pattern(word), split)
            pieces = (_parquet_piece(file, escape_path(str(file)), column) for file in files)
        else:
            pieces = _hub_pieces(word, column, split)
        own = list(pieces)
        columns = {piece.column: piece.key for piece, _ in own if piece.count}
        if len(columns) > 1:
            (first, one), (second, other), *_ = columns.items()
            raise BulkError(
                f"{one} seems to have its images in the column {first!r}, and {other} in {second!r}: name only what "
                "has images, or its --split, or pass --column if all of it has that column."
            )
        for piece, stamp in own:
            found.setdefault((_identity(piece), piece.repo), (piece, stamp))
        if not own:
            of_split = f" of the split {split!r}" if split else ""
            raise BulkError(f"There is no Parquet file in {escape_path(word)}{of_split}.")
    filled = [(piece, stamp) for piece, stamp in found.values() if piece.count]
    if not filled:
        raise BulkError(f"The files of {', '.join(map(escape_path, words))} have no rows.")
    return FoundRows([piece for piece, _ in filled], [stamp for _, stamp in filled])


def read_pieces(pieces: Sequence[Piece]) -> Iterator[Entry]:
    """Reads exactly the images of a part in order, a few rows at a time.

    Raises:
        BulkError: a file of rows is missing, or has changed since the run began.
    """
    for piece in pieces:
        if piece.column is None:
            yield Entry(piece.key, None, piece.path, None)
            continue
        path = _local_path(piece)
        rows = _saved_rows(path, piece) if path.is_dir() else _parquet_rows(path, piece)
        read = 0
        for key, value in zip(piece.image_keys(), rows, strict=False):
            yield _entry(key, value)
            read += 1
        if read < piece.count:
            raise BulkError(f"{piece.key} has fewer rows than when the run began: start again in another folder.")


def _is_saved(path: Path) -> bool:
    return (path / SAVED).is_file() or (path / SAVED_SPLITS).is_file()


def _parquet_below(path: Path) -> Iterator[Path]:
    """The Parquet files below a folder, except hidden ones and those in `NOT_ROWS`."""
    for file in files_below(path):
        if file.name.endswith(SUFFIX) and NOT_ROWS.isdisjoint(file.relative_to(path).parent.parts):
            yield file


def _identity(piece: Piece) -> str:
    """The same text for all paths of a local file or of a saved dataset; the path of a file on the Hub."""
    path = Path(piece.path)
    return piece.path if piece.repo is not None else os.path.realpath(path) if path.is_dir() else place_of(path)


def _outside(files: Iterable[Path], out: Path | None) -> Iterator[Path]:
    """The files that are not inside `out`, which has the results of earlier runs of the command."""
    inside = None if out is None else os.path.realpath(out) + os.sep
    return (file for file in files if inside is None or not place_of(file).startswith(inside))


def _files_of_split(files: Sequence[Path], root: Path, split: str | None) -> list[Path]:
    if split is None:
        return list(files)
    from ..data.readers.hub import files_of_split  # imports `datasets`

    chosen = files_of_split(files, root, split)
    if not chosen:
        raise BulkError(
            f"No Parquet file in {escape_path(str(root))} is of the split {split!r}, by its name or that of a folder "
            "up to this one."
        )
    return chosen


def _parquet_piece(
    path: Path, key: str, column: str | None, repo: str | None = None, revision: str | None = None, inside: str = ""
) -> tuple[Piece, str]:
    """All rows of a Parquet file, and a stamp of its footer, size and modification time.

    The time is omitted for a file from the Hub, which is identified by its commit.
    """
    if path.exists() and not path.is_file():  # opening a pipe could block forever
        raise BulkError(f"{key} is not a file.")
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            length = int.from_bytes(file.read(4), "little")
            file.seek(max(0, size - TAIL - length))
            modified = "" if repo else os.fstat(file.fileno()).st_mtime_ns
            stamp = hashlib.sha256(file.read(length) + f"{size} {modified}".encode()).hexdigest()
        description = pq.read_metadata(path)
        schema = description.schema.to_arrow_schema()
    except (OSError, pa.ArrowException, ValueError) as error:  # column names may not be UTF-8
        raise BulkError(f"{key} cannot be read as a Parquet file: {first_line(error)}.") from error
    chosen = _choose_column({field.name: _kind(field.type) for field in schema}, key, column)
    place = inside or str(path.absolute())
    return Piece(place, key, 0, description.num_rows, chosen, repo, revision), stamp


def _kind(kind: pa.DataType) -> str:
    """The kind of a column: "image" (a struct with bytes), "bytes", or the name of its type."""
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return "bytes"
    if pa.types.is_struct(kind) and any(_kind(field.type) == "bytes" for field in kind if field.name == "bytes"):
        return "image"
    return str(kind) if len(str(kind)) <= 40 else type(kind).__name__


def _choose_column(kinds: dict[str, str], name: str, column: str | None) -> str:
    from ..data.readers.hub import IMAGE_NAMES  # imports `datasets`, which workers on image files do not need

    listing = " ".join(", ".join(f"{name} ({kind})" for name, kind in kinds.items()).split())  # one line
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
            f"The image column of {name} cannot be determined: name it with --column. Its columns: {listing}."
        )
    return guess


def _saved_pieces(path: Path, column: str | None, split: str | None) -> Iterator[tuple[Piece, str]]:
    """The rows of a dataset saved by `datasets`, or of one of its splits."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # its files may contain anything
        raise BulkError(f"{path} cannot be read as a dataset that `datasets` saved: {first_line(error)}.") from error
    if isinstance(loaded, datasets.Dataset):
        if split is not None:
            raise BulkError(f"{path} is one dataset without splits: leave --split out.")
        parts = {"": loaded}
    elif split is not None and split not in loaded:
        raise BulkError(f"{path} has no split {split!r}. Its splits: {', '.join(loaded)}.")
    else:
        parts = {name: data for name, data in loaded.items() if split in (None, name)}
    for name, data in parts.items():
        folder = path / name
        key = escape_path(str(folder))
        kinds = {field.name: _kind(field.type) for field in data.features.arrow_schema}
        chosen = _choose_column(kinds, key, column)
        yield Piece(str(folder.absolute()), key, 0, len(data), chosen), sha256_of(folder / SAVED)


def _hub_pieces(name: str, column: str | None, split: str | None) -> Iterator[tuple[Piece, str]]:
    """The Parquet files of a dataset on the Hub, which are downloaded to read their numbers of rows."""
    missing, is_converted = f"There is no file or folder {escape_path(name)}", False
    try:
        folder = _download(name, None)
        files = sorted(_parquet_below(folder))
        if not files:
            is_converted = True
            folder = _download(name, CONVERTED)
            files = sorted(_parquet_below(folder))
    except Exception as error:  # depends on the name, the network and the library
        raise BulkError(
            f"{missing}, and no dataset of that name can be downloaded from the Hub: {first_line(error)}."
        ) from error
    if not files:
        raise BulkError(f"The dataset {name} on the Hub has no Parquet files: download it, and name its folder.")
    if is_converted:
        _check_converted(name, [file.relative_to(folder).parts for file in files])
    for file in _files_of_split(files, folder, split):
        inside = file.relative_to(folder).as_posix()
        yield _parquet_piece(file, f"{name}/{escape_path(inside)}", column, name, folder.name, inside)


def _check_converted(name: str, places: Sequence[tuple[str, ...]]) -> None:
    """Raises BulkError if the Hub's own Parquet files, CONFIGURATION/SPLIT/FILE, are a part of a dataset, or several
    configurations of it, which have images in common."""
    if any(part.startswith(PARTIAL) for parts in places for part in parts):
        raise BulkError(
            f"The Hub converted only a part of the dataset {name} to Parquet: download it, and name its folder."
        )
    if len(found := sorted({parts[0] for parts in places})) > 1:
        raise BulkError(
            f"The dataset {name} has several configurations ({', '.join(map(escape_path, found))}): download one with "
            f"`hf download {name} --repo-type dataset --revision {CONVERTED} --include '{escape_path(found[0])}/*' "
            "--local-dir DIR`, and name DIR."
        )


def _download(name: str, revision: str | None) -> Path:
    patterns = [f"*{SUFFIX}"]
    return Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=patterns))


def _local_path(piece: Piece) -> Path:
    """The path of a file of rows on this machine; a file on the Hub is downloaded unless it is in the cache."""
    if piece.repo is None:
        path = Path(piece.path)
        if not path.exists():
            raise BulkError(
                f"There is no {escape_path(piece.path)} on a machine of the cluster: put it where all of them see it."
            )
        return path
    try:
        return Path(hf_hub_download(piece.repo, piece.path, repo_type="dataset", revision=piece.revision))
    except Exception as error:  # depends on the network and the library
        raise BulkError(f"{piece.key} cannot be downloaded from the Hub: {first_line(error)}.") from error


def _entry(key: str, value: Any) -> Entry:
    """The image of a row: bytes, or a mapping with bytes and a file name.

    An untrusted row could name any local file instead of bytes, so files are never opened.
    """
    if isinstance(value, str):
        return Entry(key, None, None, f"{key} {value}")
    data, name = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (value, None)
    name = None if name is None else escape_path(str(name))
    if data is None and name is not None:
        return Entry(key, name, None, f"{key} names the file {name} in place of an image's contents: it is not read.")
    if not data:
        return Entry(key, name, None, f"{key} has no image: it is empty.")
    if len(data) > MOST_BYTES:
        return Entry(key, name, None, f"{key} has {len(data)} bytes, more than an image may have here.")
    return Entry(key, name, io.BytesIO(data), None)


def _parquet_rows(path: Path, piece: Piece) -> Iterator[Any]:
    """The values of the image column in the piece's rows; an error message (str) for a row that cannot be read."""
    try:
        file = pq.ParquetFile(path, pre_buffer=False)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise BulkError(f"{piece.key} cannot be read as a Parquet file: {first_line(error)}.") from error
    with file:
        start = 0
        end = piece.first + piece.count
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            low, high = max(piece.first - start, 0), min(end - start, rows)
            if low < high:
                yield from _rows_of_group(file, group, piece, low, high)
            start += rows


def _rows_of_group(file: pq.ParquetFile, group: int, piece: Piece, low: int, high: int) -> Iterator[Any]:
    """Rows `low` to `high` of a row group. After a damaged row, the rest of the group cannot be read."""
    place = 0
    try:
        for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[piece.column]):
            before, place = place, place + batch.num_rows
            if place > low:
                own = batch.column(0)[max(low - before, 0) : high - before]
                yield from map(_python_value, own)
            if place >= high:
                break
    except (OSError, pa.ArrowException, ValueError) as error:
        reason = f"cannot be read: {first_line(error)}."
        yield from [reason] * (high - max(low, place))


def _python_value(value: pa.Scalar) -> Any:
    """A value of the column, or an error message (str) if it cannot be read, such as for a name that is not UTF-8."""
    try:
        return value.as_py()
    except ValueError as error:
        return f"cannot be read: {first_line(error)}."


def _saved_rows(path: Path, piece: Piece) -> Iterator[Any]:
    import datasets

    try:
        data = datasets.load_from_disk(str(path)).with_format(None).select_columns([piece.column])
        if isinstance(data.features[piece.column], datasets.Image):
            data = data.cast_column(piece.column, datasets.Image(decode=False))
    except Exception as error:  # its files may contain anything
        raise BulkError(
            f"{piece.key} cannot be read as a dataset that `datasets` saved: {first_line(error)}."
        ) from error
    for row in range(piece.first, min(piece.first + piece.count, len(data))):
        yield data[row][piece.column]


__all__ = ["Entry", "FoundRows", "find_rows", "names_rows", "read_pieces"]

"""Datasets with an image column and a segmentation column: from the Hub, from Parquet files, or already loaded.

The columns are found by their names and types, unless the caller names them. A segmentation is encoded as in
`data.readers.folder`, and stored as an image or as bytes. An item's id is the row's `image_id`, else the stem of its
image's file name, else (if these are missing or not unique) the row number.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from datasets.fingerprint import generate_random_fingerprint
from datasets.table import InMemoryTable, concat_tables
from huggingface_hub.constants import HF_HUB_CACHE

from ...errors import DatasetError, MissingPartError
from ...files import files_below, place_of
from ..dataset import IMAGE_FEATURE, PARTS, ItemReader, Problems, Task, kind_of_part, source_of
from ..files import AnnotationFrame, check_regular
from ..item import Item, SegmentCounts
from .folder import describe_maps, map_reader
from .maps import SemanticMapReader, refuse_ignored_white

# In order of preference.
IMAGE_NAMES = ("image", "img", "images", "photo", "picture", "input", "pixel_values")
MAP_NAMES = (
    "annotation", "segmentation", "segmentation_mask", "segmentation_map", "semantic_segmentation", "semantic_mask",
    "mask", "masks", "label", "labels", "annotations", "seg_map", "seg", "label_map", "gt", "ground_truth", "target",
)  # fmt: skip


def load_hub(
    source: str | Path | Sequence[str | Path] | datasets.Dataset,
    split: str | None = None,
    *,
    labels: Sequence[str],
    task: Task = "semantic",
    image_column: str | None = None,
    map_column: str | None = None,
    ignore_index: int | None = 255,
    reduce_labels: bool = False,
    skip_bad: bool = False,
    annotation_frame: AnnotationFrame | None = None,
) -> datasets.Dataset:
    """Loads a dataset with an image column and a segmentation column.

    Args:
        source: the name of a dataset on the Hub, one or several Parquet files, a folder of them, or a
            `datasets.Dataset`. As usual, `datasets` downloads what is not in its cache, and caches an Arrow copy of
            Parquet files.
        split: split of a dataset on the Hub; of a folder, only its files are read (see `in_split`).
        labels: class names in the order of their ids.
        task, ignore_index, reduce_labels, annotation_frame: as in `load_folder`.
        image_column, map_column: names of the columns, if they cannot be guessed.
        skip_bad: skip Parquet files that cannot be read, and list them in `describe(dataset).skipped`.

    Raises:
        DatasetError: the source cannot be loaded, has no such split (MissingPartError), or the columns cannot be
            guessed; the message lists them.
    """
    if isinstance(source, (dict, datasets.IterableDataset)):  # a DatasetDict is a dict
        raise DatasetError(
            f"load_hub takes one split as a datasets.Dataset, not {type(source).__name__}: "
            + (f"pass one of {', '.join(map(repr, source))}." if isinstance(source, dict) else "do not stream it.")
        )
    problems = Problems(skip_bad)
    trusted = isinstance(source, datasets.Dataset)
    dataset = source if isinstance(source, datasets.Dataset) else _load(source, split, problems)
    name = "the dataset" if trusted else str(source)
    image, annotation = _columns(dataset, name, task, image_column, map_column)
    for column in (image, annotation):
        if isinstance(dataset.features[column], datasets.Image):
            dataset = dataset.cast_column(column, IMAGE_FEATURE)
    description = describe_maps(name, task, tuple(labels), problems.report(name), annotation_frame)
    of_map = map_reader(description, ignore_index, reduce_labels, image, annotation)
    reader = of_map if trusted else RestrictedReader(description, of_map, (image, annotation))
    dataset = _with_ids(dataset, image)
    # Other columns may also hold images, which must not be decoded.
    read = [image, annotation, *(c for c in ("image_id", "file_name") if c in dataset.features)]
    dataset = dataset.with_transform(reader, columns=read)
    if isinstance(of_map, SemanticMapReader):

        def values(row: Mapping[str, Any]) -> list[int]:
            if isinstance(reader, RestrictedReader):
                reader.check(row)
            return of_map.values(row)

        refuse_ignored_white(dataset, values, ignore_index, reduce_labels)
    return dataset


@dataclass(frozen=True)
class RestrictedReader(ItemReader):
    """Prevents rows from reading arbitrary local files.

    The rows are untrusted, and can refer to any file on this machine instead of an image's contents. Only contents
    stored in the dataset itself, and files that were downloaded with it, are read.

    Args:
        reader: the reader of rows that pass the check.
        columns: names of the image column and the map column.
    """

    reader: ItemReader
    columns: tuple[str, str]

    @property
    def source_columns(self) -> tuple[str, str]:
        """Names of the image column and the map column."""
        return self.columns

    def may_open(self, path: str) -> bool:
        """Whether a file was downloaded with a dataset."""
        return is_downloaded(path)

    def read(self, row: Mapping[str, Any]) -> Item:
        """The item of a row."""
        self.check(row)
        return self._own_reader.read(row)

    def count(self, row: Mapping[str, Any]) -> SegmentCounts:
        """Counts the segments of a row."""
        self.check(row)
        return self._own_reader.count(row)

    @property
    def _own_reader(self) -> ItemReader:
        """The reader, with the description of this one, of which `with_channels` replaces the number of channels."""
        return replace(self.reader, description=self.description)

    def check(self, row: Mapping[str, Any]) -> None:
        """Rejects files that were not downloaded with the dataset.

        Raises:
            DatasetError: the row refers to such a file.
        """
        for column in self.columns:
            source = source_of(row[column])
            path = source.get("path")
            if source.get("bytes") is None and path is not None and not is_downloaded(path):
                raise DatasetError(
                    f"A row of {self.description.name} names the file {path} in place of an image's contents, which "
                    "was not downloaded with it: it is not read. To allow it, load the dataset yourself and pass the "
                    "datasets.Dataset."
                )


def _with_ids(dataset: datasets.Dataset, image: str) -> datasets.Dataset:
    """The dataset with a unique `image_id` in each row: its own, else the stem of the image's file name, else (if these
    are missing or not unique) the row number, from 0."""
    if "image_id" in dataset.features:
        own = dataset.select_columns(["image_id"]).with_format("arrow")[:].column("image_id")
        usable = any(test(own.type) for test in (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string))
        if usable and own.null_count == 0 and pc.count_distinct(own).as_py() == len(own):
            return dataset
        dataset = dataset.remove_columns(["image_id"])
    table = dataset.data
    ids: list[Any] = [PurePath(path).stem if path else "" for path in _paths(table.column(image))]
    if "" in ids or len(set(ids)) < len(ids):
        ids = list(range(len(ids)))
    kind = datasets.Value("string" if ids and isinstance(ids[0], str) else "int64")
    # After `shuffle` or `select`, `add_column` would copy all images.
    column = InMemoryTable.from_pydict({"image_id": ids}, schema=pa.schema({"image_id": kind.pa_type}))
    table = concat_tables([table, column], axis=1)
    info = dataset.info.copy()
    info.features = datasets.Features({**dataset.features, "image_id": kind})
    table = table.replace_schema_metadata(info.features.arrow_schema.metadata)
    # Computing a fingerprint would read all contents.
    return datasets.Dataset(table, info, dataset.split, dataset._indices, generate_random_fingerprint())


def _paths(column: pa.ChunkedArray) -> list[str | None]:
    """The path in each entry of an image column; None for bytes."""
    if not pa.types.is_struct(column.type) or column.type.get_field_index("path") < 0:
        return [None] * len(column)
    return [path for chunk in column.chunks for path in chunk.field("path").to_pylist()]


def is_downloaded(path: str) -> bool:
    """Whether a file is in the download caches of `datasets` or huggingface_hub."""
    downloads = (Path(HF_HUB_CACHE), Path(datasets.config.HF_CACHE_HOME))
    return any(Path(path).resolve().is_relative_to(folder.resolve()) for folder in downloads)


def _load(source: str | Path | Sequence[str | Path], split: str | None, problems: Problems) -> datasets.Dataset:
    if isinstance(source, (str, Path)) and not Path(source).exists() and not str(source).endswith(".parquet"):
        try:
            loaded = datasets.load_dataset(str(source), split=split)
        # The network, the Hub and the library's many builders raise many types of exceptions.
        except Exception as error:
            is_missing = isinstance(error, ValueError) and str(error).startswith("Unknown split")
            raise (MissingPartError if is_missing else DatasetError)(
                f"{source} is not a local Parquet file, and loading it from the Hub failed: "
                f"{type(error).__name__}: {error}"
            ) from error
        if not isinstance(loaded, datasets.Dataset):
            raise DatasetError(f"{source} has the splits {', '.join(map(str, loaded))}: name one.")
        return loaded
    files = []
    for path in _parquet_files(source, split):
        try:
            check_regular(path)
            pyarrow.parquet.read_schema(path)
        except DatasetError as error:
            problems.add(error)
        except (OSError, pyarrow.ArrowException) as error:
            problems.add(f"{path} cannot be read as a Parquet file: {error}.")
        else:
            files.append(str(path))
    if not files:
        raise DatasetError(f"None of the Parquet files of {source} can be read. The first: {problems.messages[0]}")
    try:
        return datasets.Dataset.from_parquet(files)
    except Exception as error:
        cause = error.__cause__ or error
        raise DatasetError(f"The Parquet files {', '.join(files)} cannot be read: {cause}.") from error


def _parquet_files(source: str | Path | Sequence[str | Path], split: str | None) -> list[Path]:
    paths = [Path(source)] if isinstance(source, (str, Path)) else [Path(path) for path in source]
    if len(paths) != 1 or not paths[0].is_dir():
        return paths
    root = paths[0]
    found = sorted({place_of(path): path for path in files_below(root) if path.suffix == ".parquet"}.values())
    if split is not None:
        found = files_of_split(found, root, split)
    if not found:
        kind = DatasetError if split is None else MissingPartError
        raise kind(f"{root} has no Parquet file{f' of the split {split!r}' if split else ''}.")
    return found


def files_of_split(files: Sequence[Path], root: Path, split: str) -> list[Path]:
    """The files of a split in a folder, by their paths in it (see `in_split`), or else by another name of the same
    part, such as `valid` for "validation", or by the folder's own name too."""
    own = Path(os.path.abspath(root)).name
    same = next(([name for name in names if name != split] for names in PARTS.values() if split in names), [])
    for folders, names in [((), [split]), ((), same), ((own,), [split])]:
        by_name = {
            name: found
            for name in names
            if (found := [file for file in files if in_split((*folders, *file.relative_to(root).parts), name)])
        }
        if len(set(map(tuple, by_name.values()))) > 1:  # `val` is also found in the name `valid`
            raise DatasetError(f"{root} has no split {split!r}, but {', '.join(by_name)}: name one of them.")
        if by_name:
            return next(iter(by_name.values()))
    return []


def in_split(parts: Sequence[str], split: str) -> bool:
    """Whether a file is of a split, by the first word of its name, or else of the nearest folder that names a split.

    "train" is also the split of `training-0.parquet` and `train0001.parquet`, as in `datasets`, but not of
    `trainval-0.parquet` or `train/test-0.parquet`. A name of no part, such as "fold1", is also the split of
    `fold1/train-0.parquet`, but not of `fold10/train-0.parquet`.

    Args:
        parts: the folders and the file on the path to it, as in `PurePath.parts`.
        split: name of the split.
    """
    kind = kind_of_part(split)
    for name in reversed(parts):
        word = re.split(r"[^a-z]", name, maxsplit=1, flags=re.IGNORECASE)[0]
        after = name[len(split) :][:1]
        is_longer = after.isalpha() or (after.isdigit() and split[-1:].isdigit())
        if name.startswith(split) and (not is_longer or (after.isalpha() and kind == kind_of_part(word) is not None)):
            return True
        if kind is not None and kind_of_part(word) not in (None, kind):
            return False
    return False


def _columns(
    dataset: datasets.Dataset, name: str, task: Task, image_column: str | None, map_column: str | None
) -> tuple[str, str]:
    """The names of the image column and the segmentation column.

    For the task "instance", a column with that word in its name is preferred to all others, and none with "semantic" is
    chosen among several.

    Raises:
        DatasetError: they cannot be guessed.
    """
    kinds = {column: _kind(feature) for column, feature in dataset.features.items()}
    listing = " ".join(", ".join(f"{column} ({kind})" for column, kind in kinds.items()).split())  # one line
    for column in (image_column, map_column):
        if column is not None and column not in kinds:
            raise DatasetError(f"{name} has no column {column!r}. Its columns: {listing}.")
    pictures = [column for column, kind in kinds.items() if kind in ("image", "bytes")]
    free = [column for column in pictures if column not in (image_column, map_column)]
    if image_column is None:
        image_column = _guess(free, IMAGE_NAMES)
        free = [column for column in free if column != image_column]
    if map_column is None:
        named = [column for column in free if "instance" in column.lower()] if task == "instance" else []
        others = [column for column in free if task != "instance" or "semantic" not in column.lower()]
        map_column = named[0] if len(named) == 1 else _guess(others, MAP_NAMES)
        if map_column is None and len(free) == 1 and image_column:  # any name will do
            map_column = free[0]
    if image_column is None and len(free) == 2 and map_column in free:
        image_column = next(column for column in free if column != map_column)
    if image_column is None or map_column is None or image_column == map_column:
        missing, usual = ("images", IMAGE_NAMES) if image_column is None else ("segmentations", MAP_NAMES)
        raise DatasetError(
            f"The column of {missing} in {name} cannot be determined: rename it to {usual[0]}, or pass image_column "
            f"and map_column in Python. Its columns: {listing}."
        )
    return image_column, map_column


def _guess(columns: list[str], names: Sequence[str]) -> str | None:
    by_name = {column.lower(): column for column in columns}
    return next((by_name[name] for name in names if name in by_name), None)


def _kind(feature: Any) -> str:
    if isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"}):
        return "image"
    if isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary"):
        return "bytes"
    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__

"""Datasets whose rows become items when they are read, and checks of whole datasets.

A row refers to an image and its annotations. Listing a dataset only checks what is visible without decoding: missing
files and inconsistent annotations. A broken image is found only when it is read. There are two ways to exclude it:
`without_bad_items` reads everything once beforehand, which is exact and takes as long as decoding an epoch;
`TrainingItems(skip_bad=True)` replaces a broken item by its neighbor, at no cost, but only for training, not a metric.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import datasets
import pyarrow
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from transformers.utils import logging

from ..errors import DatasetError, MissingPartError, UnusableImageError, equal_names
from .files import UNNAMED, AnnotationFrame, Source, has_ambiguous_frame, is_of_stored_pixels, read_header, source_name
from .item import Item, SegmentCounts, count_segments

logger = logging.get_logger(__name__)

Task = Literal["semantic", "instance", "panoptic"]
# The source of an image, and that of its map or the (height, width) to which its annotations refer.
Pair = tuple[Source, Source | tuple[int, int]]

IMAGE_FEATURE = datasets.Image(decode=False)
# Common columns of readers of folders and annotation files.
ROW_FEATURES = {"image": IMAGE_FEATURE, "file_name": datasets.Value("string"), "image_id": datasets.Value("string")}
# In data that is not divided into parts, every tenth image is for validation.
HELD_OUT = 10
# The parts of data, and the words that name them.
PARTS = {
    "train": ("train", "training", "trainset"),
    "val": ("val", "valid", "validation", "dev", "eval", "valset"),
    "test": ("test", "testing", "testset"),
}
# Threads that read image headers, to hide the latency of network file systems.
HEADER_THREADS = 8
# Maximum number of file names in a warning.
MOST_NAMED = 10


def source_of(value: Any) -> Source:
    """The undecoded image in an entry of a column of images or bytes.

    Raises:
        DatasetError: the entry is neither an image nor bytes.
    """
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if isinstance(value, Mapping):
        return value
    raise DatasetError(
        f"{UNNAMED} has {'nothing' if value is None else type(value).__name__} where an image is expected: the "
        "entry is empty, or this is the wrong column."
    )


@dataclass(frozen=True)
class Description:
    """Metadata of a dataset.

    Args:
        name: the dataset's name for messages and model cards.
        task: the kind of segments: "semantic" (one per class in the image), "instance" (one per object) or "panoptic"
            (both).
        labels: class names in the order of their ids.
        things: the classes with separate instances, as opposed to stuff.
        category_ids: the dataset's own ids of the classes, in the order of `labels`, if they differ.
        annotation_frame: the pixels that annotations of ambiguous size refer to, if an image is stored rotated or
            mirrored: "upright" or "stored"; see `hf_faim2f.data.files`.
        num_channels: number of channels of the images.
        skipped: with `skip_bad`, one sentence for each image that was skipped when the dataset was listed.
    """

    name: str
    task: Task
    labels: tuple[str, ...]
    things: frozenset[int] = frozenset()
    skipped: tuple[str, ...] = ()
    category_ids: tuple[int, ...] | None = None
    annotation_frame: AnnotationFrame | None = None
    num_channels: int = 3

    def __post_init__(self) -> None:
        if self.task not in get_args(Task):
            raise ValueError(f"task must be one of {', '.join(get_args(Task))}; got {self.task!r}.")
        if self.annotation_frame not in (None, *get_args(AnnotationFrame)):
            raise ValueError(f"annotation_frame must be 'upright', 'stored' or None; got {self.annotation_frame!r}.")
        # An id2label dictionary would become a tuple of its ids.
        if not self.labels or not all(isinstance(label, str) for label in self.labels):
            raise DatasetError(
                f"labels of {self.name} must be class names in the order of their ids, 0, 1, 2 and so on, not "
                f"{', '.join(map(repr, self.labels)) or 'none'}."
            )
        if same := equal_names(self.labels):
            names = f"{same[0]!a} and {same[1]!a}"
            raise DatasetError(f"{self.name} has the class names {names}, which read the same: rename or merge them.")

    @property
    def id2label(self) -> dict[int, str]:
        """The labels as in a model's configuration."""
        return dict(enumerate(self.labels))


@dataclass(frozen=True)
class ItemReader(ABC):
    """Converts rows to items. `datasets` calls it for the rows that are read, and pickles it for worker processes."""

    description: Description

    @abstractmethod
    def read(self, row: Mapping[str, Any]) -> Item:
        """The item of one row.

        Raises:
            DatasetError: one of its files cannot be used.
        """

    def count(self, row: Mapping[str, Any]) -> SegmentCounts:
        """Counts the segments of one row. Readers override this if it is faster than reading the whole item.

        Raises:
            DatasetError: one of its files cannot be used.
        """
        return count_segments(self.read(row))

    @property
    def source_columns(self) -> tuple[str, str]:
        """Names of the image column and the map column. Without the latter, annotations have the row's size."""
        return "image", "annotation"

    def may_open(self, path: str) -> bool:
        """Whether a file that a row names may be opened."""
        return True

    def named(self, function: Callable[[Mapping[str, Any]], Any], row: Mapping[str, Any]) -> Any:
        """Calls `function` with a row; errors about an image without a file name mention the row's id instead."""
        try:
            return function(row)
        except DatasetError as error:
            if UNNAMED not in str(error):
                raise
            raise DatasetError(str(error).replace(UNNAMED, f"the image with the id {row.get('image_id')}")) from error

    def __call__(self, rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        items = [self.named(self.read, row) for row in _split(rows)]
        # The keys do not come from the first item, because there may be no rows.
        return {name: [item[name] for item in items] for name in Item.__annotations__}  # type: ignore[literal-required]


def _split(rows: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """Converts a batch of columns to a list of rows."""
    count = len(next(iter(rows.values()), []))
    return [{name: column[index] for name, column in rows.items()} for index in range(count)]


def lazy_dataset(columns: dict[str, list[Any]], features: dict[str, Any], reader: ItemReader) -> datasets.Dataset:
    """Creates a dataset whose rows are kept in memory as Arrow columns and converted to items by `reader`.

    Raises:
        DatasetError: there are no rows, or a file name is not UTF-8.
    """
    if not next(iter(columns.values())):
        sentences = [f"{reader.description.name} has no image that could be used.", *reader.description.skipped[:1]]
        raise DatasetError(" ".join(sentences))
    try:
        return datasets.Dataset.from_dict(columns, datasets.Features(features)).with_transform(reader)
    except UnicodeEncodeError as error:  # Python's stand-in for the bytes of such a name
        raise DatasetError(f"The file name {error.object!a} is not UTF-8: rename the file, or remove it.") from error


def hold_out(dataset: datasets.Dataset, wanted: str, name: str) -> datasets.Dataset:
    """Divides data without parts: every tenth image is "val", the others are "train", and "all" is both.

    Raises:
        MissingPartError: `wanted` is another part.
        DatasetError: there is only one image.
    """
    if wanted == "all":
        return dataset
    if wanted not in ("train", "val"):
        raise MissingPartError(
            f"{name} has no part {wanted!r}: it is not divided, so every tenth image of it is 'val', the others are "
            "'train', and both are 'all'."
        )
    if len(dataset) < 2:
        raise DatasetError(f"{name} has one image that can be used: there is none left for validation.")
    return dataset.select([index for index in range(len(dataset)) if (index % HELD_OUT == 0) == (wanted == "val")])


def find_part(parts: Collection[str], wanted: str, name: str) -> str | None:
    """The part of divided data that is called `wanted` or by a synonym of it ("valid" for "val").

    Args:
        parts: the parts' own names.
        wanted: the part's name.
        name: name of the data, for messages.

    Returns:
        The part's own name; None if the data is not divided.

    Raises:
        DatasetError: there is no such part (MissingPartError), or several.
    """
    if wanted in parts:
        return wanted
    others = [part for part in parts if kind_of_part(part) == kind_of_part(wanted) is not None]
    if len(others) == 1:
        return others[0]
    if not any(kind_of_part(part) for part in parts):
        return None
    raise (DatasetError if others else MissingPartError)(
        f"{name} has {'several parts' if others else 'no part'} {wanted!r}; it is divided into "
        f"{', '.join(sorted(parts))}: rename one, or pass --split (evaluate) or --train-split and --eval-split (train)."
    )


def kind_of_part(name: str) -> str | None:
    """The purpose of a part, "train", "val" or "test", by the words in its name; None if no word shows it."""
    for word in re.findall("[a-z]+", name.lower()):
        for kind, words in PARTS.items():
            if word in words:
                return kind
    return None


class _RowTransform:
    """A `datasets` transform that applies a function to each row."""

    def __init__(self, function: Callable[[Mapping[str, Any]], Any]) -> None:
        self.function = function

    def __call__(self, rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        return {"result": [self.function(row) for row in _split(rows)]}


def from_rows(dataset: datasets.Dataset, function: Callable[[Mapping[str, Any]], Any]) -> Callable[[int], Any]:
    """Applies `function` to rows instead of reading items: maps an index to the result for that row."""
    rows = dataset.with_transform(_RowTransform(function), columns=dataset.format["columns"])
    return lambda index: rows[index]["result"]


def reader_of(dataset: datasets.Dataset) -> ItemReader:
    """The reader of a dataset from this package, also after `select`, `shuffle` or `train_test_split`.

    Raises:
        ValueError: the dataset is not from this package, or its format was changed.
    """
    reader = dataset.format["format_kwargs"].get("transform")
    if not isinstance(reader, ItemReader):
        raise ValueError("This dataset was not read by hf_faim2f.data, or its format was changed since.")
    return reader


def with_channels(dataset: datasets.Dataset, num_channels: int) -> datasets.Dataset:
    """The dataset with images of this number of channels."""
    reader = replace(reader_of(dataset), description=replace(describe(dataset), num_channels=num_channels))
    return dataset.with_transform(reader, columns=dataset.format["columns"])


def describe(dataset: datasets.Dataset) -> Description:
    """The metadata of a dataset from this package, also after `select`, `shuffle` or `train_test_split`.

    Raises:
        ValueError: the dataset is not from this package, or its format was changed.
    """
    return reader_of(dataset).description


@dataclass(frozen=True)
class BadItem:
    """An item that cannot be read."""

    index: int
    error: str


@dataclass
class Problems:
    """Collects problems with images while a dataset is listed, for its description; raises them without `skip_bad`."""

    skip_bad: bool
    messages: list[str] = field(default_factory=list)

    def add(self, problem: str | DatasetError) -> None:
        """Records a problem.

        Raises:
            UnusableImageError: the problem, unless `skip_bad`.
        """
        if not self.skip_bad:
            raise UnusableImageError(str(problem))
        self.messages.append(str(problem))

    def report(self, name: str) -> tuple[str, ...]:
        """All problems; logs a warning if there are any."""
        if self.messages:
            logger.warning(f"{name}: skipped problems: {len(self.messages)}. The first: {self.messages[0]}")
        return tuple(self.messages)


class _Probe(TorchDataset[str | None]):
    """Maps an index to the error message of reading that item, or None."""

    def __init__(self, dataset: datasets.Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> str | None:
        try:
            self.dataset[index]
        except DatasetError as error:
            return str(error)
        return None


def find_bad_items(dataset: datasets.Dataset, num_workers: int = 0) -> list[BadItem]:
    """Reads every item once and returns those that cannot be read.

    Args:
        dataset: the dataset.
        num_workers: number of worker processes; 0 to read in this process.
    """
    loader = DataLoader(_Probe(dataset), batch_size=None, num_workers=num_workers)
    return [BadItem(index, error) for index, error in enumerate(loader) if error is not None]


def without_bad_items(dataset: datasets.Dataset, num_workers: int = 0) -> tuple[datasets.Dataset, list[BadItem]]:
    """Returns the dataset without unreadable items, and a list of these. Reads every item once.

    Raises:
        DatasetError: no item can be read.
    """
    bad = find_bad_items(dataset, num_workers)
    if not bad:
        return dataset, []
    logger.warning(f"{len(bad)} of {len(dataset)} images were left out. The first: {bad[0].error}")
    if len(bad) == len(dataset):
        raise DatasetError(f"None of the {len(dataset)} images can be used. The first: {bad[0].error}")
    left_out = {item.index for item in bad}
    return dataset.select([index for index in range(len(dataset)) if index not in left_out]), bad


def warn_of_rotated(dataset: datasets.Dataset, frame: AnnotationFrame | None) -> None:
    """Warns about images that are stored rotated or mirrored, unless their annotations are clearly upright.

    Reads only file headers, at 0.1 ms each. Unreadable files are reported when they are used.

    Args:
        dataset: a dataset from a reader of this package.
        frame: the user's choice for annotations of ambiguous size, which silences the warning about them.
    """
    name = describe(dataset).name
    names = frames_of(dataset)
    if names["stored"]:
        logger.warning(
            f"{name}: {_count(names['stored'])} stored rotated (EXIF orientation), with annotations of the size of the "
            f"stored pixels, which are turned upright with them: {_listed(names['stored'])}."
        )
    if names["unclear"] and frame is None:
        logger.warning(
            f"{name}: {_count(names['unclear'])} stored rotated or mirrored (EXIF orientation), and the size of the "
            "annotations does not show whether they were made on the upright image or on its stored pixels. They are "
            "taken as upright; if they were made on the stored pixels, pass --annotation-frame stored (in Python "
            f"annotation_frame='stored'), else 'upright', which silences this: {_listed(names['unclear'])}."
            + (" Other annotations of this dataset were made on the stored pixels." if names["stored"] else "")
        )


def frames_of(dataset: datasets.Dataset) -> dict[str, list[str]]:
    """The images that are stored rotated or mirrored and whose annotations do not clearly refer to the upright image.

    Returns:
        Names of images: "stored" if their annotations refer to the stored pixels, "unclear" if their size is ambiguous.
    """
    names: dict[str, list[str]] = {"stored": [], "unclear": []}
    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        for kind, image in pool.map(_frame_of, _pairs(dataset)):
            if kind in names:
                names[kind].append(image)
    return names


def _pairs(dataset: datasets.Dataset) -> Iterator[Pair]:
    reader = reader_of(dataset)
    columns: tuple[str, ...] = reader.source_columns
    if columns[1] not in dataset.column_names:
        columns = (columns[0], "height", "width")

    def source(value: Any) -> dict[str, Any]:
        is_struct = isinstance(value, pyarrow.StructScalar) and value.is_valid
        data, path = (value["bytes"], value["path"].as_py()) if is_struct else (value, None)
        if isinstance(data, pyarrow.BinaryScalar) and data.is_valid:
            # A view of a memory-mapped file, of which only the header is read.
            return {"bytes": pyarrow.BufferReader(data.as_buffer()), "path": path}
        return {"bytes": None, "path": path if path is not None and reader.may_open(path) else None}

    for table in dataset.with_format("arrow", columns=list(columns)).iter(256):
        for image, *annotation in zip(*(table.column(column) for column in columns), strict=True):
            size = [value.as_py() for value in annotation] if len(annotation) == 2 else []
            yield source(image), (size[0], size[1]) if size else source(annotation[0])


def _frame_of(pair: Pair) -> tuple[str, str]:
    """What the annotations of an image refer to ("unclear", "stored" or "upright"), and the image's name."""
    image, annotation = pair
    name = source_name(image)
    try:
        orientation, *upright = read_header(image)
        if orientation == 1:
            return "upright", ""
        if not isinstance(annotation, tuple):
            own, *size = read_header(annotation)
            if own != 1:
                return "upright", ""
            annotation = (size[0], size[1])
    except DatasetError:
        return "upright", ""
    height, width = upright
    if annotation not in ((height, width), (width, height)):
        return "upright", ""  # reading the item will raise
    if has_ambiguous_frame((height, width), orientation):
        return "unclear", name
    is_stored = is_of_stored_pixels(image, annotation, (height, width), orientation, None)
    return ("stored" if is_stored else "upright"), name


def _count(names: list[str]) -> str:
    return "1 image is" if len(names) == 1 else f"{len(names)} images are"


def _listed(names: list[str]) -> str:
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} others" if more > 0 else "")

"""Entries of a row, in the forms in which data sets store them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal, get_args

import datasets
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from transformers.utils import logging

from ..errors import DatasetError
from .files import UNNAMED, AnnotationFrame, Source
from .item import Item, SegmentCounts, count_segments

IMAGE_FEATURE = datasets.Image(decode=False)
# What the readers of folders and annotation files write for each image.
ROW_FEATURES = {"image": IMAGE_FEATURE, "file_name": datasets.Value("string"), "image_id": datasets.Value("string")}


def source_of(value: Any) -> Source:
    """An undecoded image, from a column of images or of bytes."""
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if isinstance(value, Mapping):
        return value
    raise DatasetError(
        f"{UNNAMED} has {'nothing' if value is None else type(value).__name__} where an image is expected: the column "
        "is empty there, or another."
    )


def identity(row: Mapping[str, Any], image: str) -> tuple[int | str, str]:
    """(image id, file name) of a row. Where it has no file name, that is its image's, or, without one, its id."""
    image_id = row["image_id"]
    path = str(source_of(row[image]).get("path") or "")
    return image_id, row.get("file_name") or PurePath(path).name or str(image_id)


# A `datasets.Dataset` whose rows say where things are, and become items when they are read.

Task = Literal["semantic", "instance", "panoptic"]


@dataclass(frozen=True)
class Description:
    """What a data set is, beside its items.

    Args:
        name: for messages and cards.
        task: what its segments are: "semantic" (a segment for each class in the image), "instance" (one for each
            thing), "panoptic" (both).
        labels: class names in the order of their ids.
        things: the classes that are counted, in contrast to stuff.
        category_ids: what the data set itself calls the classes, where it numbers them otherwise; in their order.
        annotation_frame: what the annotations of an image refer to that is stored turned, where their size does not
            tell; see `hf_faim2f.data.files`.
        skipped: with `skip_bad`, why images were left out when the data set was listed, a sentence each.
    """

    name: str
    task: Task
    labels: tuple[str, ...]
    things: frozenset[int] = frozenset()
    skipped: tuple[str, ...] = ()
    category_ids: tuple[int, ...] | None = None
    annotation_frame: AnnotationFrame | None = None

    def __post_init__(self) -> None:
        if self.task not in get_args(Task):
            raise ValueError(f"task must be one of {', '.join(get_args(Task))}; got {self.task!r}.")
        if self.annotation_frame not in (None, *get_args(AnnotationFrame)):
            raise ValueError(f"annotation_frame must be 'upright', 'stored' or None; got {self.annotation_frame!r}.")
        # Not an id2label, whose ids a tuple would take for names.
        if not self.labels or not all(isinstance(label, str) for label in self.labels):
            raise DatasetError(
                f"labels of {self.name} must be class names in the order of their ids, 0, 1, 2 and so on, not "
                f"{', '.join(map(repr, self.labels)) or 'none'}."
            )

    @property
    def id2label(self) -> dict[int, str]:
        """As a model's configuration has it."""
        return dict(enumerate(self.labels))


@dataclass(frozen=True)
class ItemReader(ABC):
    """Makes items of rows; `datasets` calls it for the rows that are asked for, and it travels to the workers."""

    description: Description

    @abstractmethod
    def read(self, row: Mapping[str, Any]) -> Item:
        """The item of one row.

        Raises:
            DatasetError: a file of it cannot be used.
        """

    def count(self, row: Mapping[str, Any]) -> SegmentCounts:
        """The segments of one row, counted. Readers override it where that needs less than the whole item.

        Raises:
            DatasetError: a file of it cannot be used.
        """
        return count_segments(self.read(row))

    def named(self, function: Callable[[Mapping[str, Any]], Any], row: Mapping[str, Any]) -> Any:
        """What `function` makes of a row; an error about an image that has no file name has the row's id."""
        try:
            return function(row)
        except DatasetError as error:
            if UNNAMED not in str(error):
                raise
            raise DatasetError(str(error).replace(UNNAMED, f"the image with the id {row.get('image_id')}")) from error

    def __call__(self, rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        count = len(next(iter(rows.values()), []))
        items = [self.named(self.read, {name: column[i] for name, column in rows.items()}) for i in range(count)]
        # Named here, not taken from the first item, so that no rows give no items and not an error.
        return {name: [item[name] for item in items] for name in Item.__annotations__}  # type: ignore[literal-required]


def lazy_dataset(columns: dict[str, list[Any]], features: dict[str, Any], reader: ItemReader) -> datasets.Dataset:
    """The data set of these rows, which are kept in memory as Arrow columns, read by `reader`."""
    if not next(iter(columns.values())):
        raise DatasetError(f"{reader.description.name} has no image that could be used.")
    return datasets.Dataset.from_dict(columns, datasets.Features(features)).with_transform(reader)


class _Rows:
    """A transform that gives for each row what a function makes of it."""

    def __init__(self, function: Callable[[Mapping[str, Any]], Any]) -> None:
        self.function = function

    def __call__(self, rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        count = len(next(iter(rows.values()), []))
        return {"made": [self.function({name: column[i] for name, column in rows.items()}) for i in range(count)]}


def from_rows(dataset: datasets.Dataset, function: Callable[[Mapping[str, Any]], Any]) -> Callable[[int], Any]:
    """What `function` makes of a row of that index, as the reader of the data set would be given it."""
    rows = dataset.with_transform(_Rows(function), columns=dataset.format["columns"])
    return lambda index: rows[index]["made"]


def reader_of(dataset: datasets.Dataset) -> ItemReader:
    """The reader of a data set from this package, also after `select`, `shuffle` or `train_test_split`.

    Raises:
        ValueError: it is another one, or its format was set anew.
    """
    reader = dataset.format["format_kwargs"].get("transform")
    if not isinstance(reader, ItemReader):
        raise ValueError("This data set was not read by hf_faim2f.data, or its format was changed since.")
    return reader


def describe(dataset: datasets.Dataset) -> Description:
    """Task, labels and so on of a data set from this package, also after `select`, `shuffle` or `train_test_split`.

    Raises:
        ValueError: it is another one, or its format was set anew.
    """
    return reader_of(dataset).description


# Going on where something is broken: leaving it out, counting it, naming it.
#
# Listing a data set finds what can be seen without decoding a pixel: missing partners, annotations that contradict
# each
# other. A broken image shows only when it is read, and a `datasets.Dataset` is read when its items are asked for. So
# there are two ways on: `without_bad_items` reads everything once beforehand, at the price of an epoch's decoding,
# and
# is exact; `TrainingItems(skip_bad=True)` puts a neighbour in the place of an item that turns out broken, at no
# price,
# which is right for training and wrong for a metric.

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class BadItem:
    """An item that cannot be read."""

    index: int
    error: str


@dataclass
class Problems:
    """What is wrong with images that are being listed: raised, or with `skip_bad` kept for the description."""

    skip_bad: bool
    messages: list[str] = field(default_factory=list)

    def add(self, problem: str | DatasetError) -> None:
        """
        Raises:
            DatasetError: the problem, unless it shall be skipped.
        """
        error = problem if isinstance(problem, DatasetError) else DatasetError(problem)
        if not self.skip_bad:
            raise error
        self.messages.append(str(error))

    def report(self, name: str) -> tuple[str, ...]:
        """All problems; they are logged, too, so that a person sees them."""
        if self.messages:
            logger.warning(f"{name}: skipped problems: {len(self.messages)}. The first: {self.messages[0]}")
        return tuple(self.messages)


class _Probe(TorchDataset[str | None]):
    """For each index the error that reading that item raises, None if there is none."""

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
    """Reads every item once.

    Args:
        num_workers: processes to read with; 0 for this one.
    """
    loader = DataLoader(_Probe(dataset), batch_size=None, num_workers=num_workers)
    return [BadItem(index, error) for index, error in enumerate(loader) if error is not None]


def without_bad_items(dataset: datasets.Dataset, num_workers: int = 0) -> tuple[datasets.Dataset, list[BadItem]]:
    """The data set with only the items that can be read, and the others. Reads every item once.

    Raises:
        DatasetError: none can be read.
    """
    bad = find_bad_items(dataset, num_workers)
    if not bad:
        return dataset, []
    logger.warning(f"{len(bad)} of {len(dataset)} images were left out. The first: {bad[0].error}")
    if len(bad) == len(dataset):
        raise DatasetError(f"None of the {len(dataset)} images can be used. The first: {bad[0].error}")
    left_out = {item.index for item in bad}
    return dataset.select([index for index in range(len(dataset)) if index not in left_out]), bad

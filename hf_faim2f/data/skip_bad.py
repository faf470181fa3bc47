"""Going on where something is broken: leaving it out, counting it, naming it.

Listing a data set finds what can be seen without decoding a pixel: missing partners, annotations that contradict each
other. A broken image shows only when it is read, and a `datasets.Dataset` is read when its items are asked for. So
there are two ways on: `without_bad_items` reads everything once beforehand, at the price of an epoch's decoding, and
is exact; `TrainingItems(skip_bad=True)` puts a neighbour in the place of an item that turns out broken, at no price,
which is right for training and wrong for a metric.
"""

from dataclasses import dataclass, field

import datasets
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from transformers.utils import logging

from .errors import DatasetError

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

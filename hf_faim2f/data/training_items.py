"""A data set as a training sees it: augmented, reproducible, and going on where an item is broken."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset
from transformers.utils import logging

from .augmentation import Augmentation, augment
from .errors import DatasetError
from .item import Item
from .skip_bad import BadItem

logger = logging.get_logger(__name__)


class TrainingItems(TorchDataset[Item]):
    """Augmented items, by index.

    What is drawn for an item depends on the seed, the epoch and the index alone: not on the number of workers, nor on
    what was read before, so a run that is resumed in the middle of an epoch goes on as it would have.

    Args:
        dataset: from one of the readers, or any other sequence of items.
        augmentations: what is done to each item, in this order.
        seed: of everything that is drawn.
        skip_bad: an item that cannot be read is replaced by the next one that can, which is then seen twice an epoch;
            a warning names it, and `bad_items` tells them all. The items keep their number, so batches and resuming
            stay as they are.
    """

    def __init__(
        self,
        dataset: Sequence[Item],
        augmentations: Iterable[Augmentation] = (),
        seed: int = 0,
        skip_bad: bool = False,
    ) -> None:
        self.dataset = dataset
        self.augmentations = tuple(augmentations)
        self.seed = seed
        self.skip_bad = skip_bad
        # In shared memory, so that workers that live for several epochs see the epoch change, and their findings are
        # seen here.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._is_bad = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Must be called before each epoch; without it every epoch draws the same."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Item:
        """
        Raises:
            DatasetError: the item cannot be read; with `skip_bad`, none can.
        """
        index = range(len(self))[index]  # also a negative one; and iteration ends
        item = self._read(index)
        seeds = np.random.SeedSequence([self.seed, int(self._epoch), index])
        generator = torch.Generator().manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> np.uint64(1)))
        return augment(item, self.augmentations, generator)

    def _read(self, index: int) -> Item:
        if not self.skip_bad:
            return self.dataset[index]
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            if self._is_bad[candidate]:
                continue
            try:
                return self.dataset[candidate]
            except DatasetError as error:
                self._is_bad[candidate] = True
                logger.warning(f"Skipped: {error}")
        raise DatasetError(f"None of the {len(self)} images can be read.")

    def bad_items(self) -> list[BadItem]:
        """The items that were found to be broken so far, in this process and its workers; each is tried once more.

        A distributed run has one such object in every process, each of which knows what it has read.
        """
        found = []
        for index in self._is_bad.nonzero()[:, 0].tolist():
            try:
                self.dataset[index]
            except DatasetError as error:
                found.append(BadItem(index, str(error)))
        return found

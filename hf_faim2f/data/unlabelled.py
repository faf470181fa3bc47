"""Pictures without labels, and their mixture with labeled items for a training with a teacher."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ..errors import DatasetError
from .collate import TrainingItems
from .dataset import HEADER_THREADS, Problems
from .files import file_source, list_images, read_header, read_image
from .item import Item, make_item


class UnlabelledItem(Item):
    """An item without segments because nobody labeled it, not because nothing is in it."""

    is_unlabelled: bool


def is_unlabelled(item: Mapping[str, Any]) -> bool:
    """Whether an item, augmented or not, is of `UnlabelledImages`."""
    return bool(item.get("is_unlabelled", False))


class UnlabelledImages(Sequence[Item]):
    """The pictures of a folder and its subfolders, as items without segments.

    Args:
        folder: the folder.
        skip_bad: leave out pictures whose header cannot be read; `skipped` has a sentence for each.

    Attributes:
        skipped: see above.

    Raises:
        DatasetError: there is no such folder, no picture in it, or, without `skip_bad`, one that cannot be read.
    """

    def __init__(self, folder: str | Path, skip_bad: bool = False) -> None:
        found = list_images(Path(folder))
        problems = Problems(skip_bad)
        with ThreadPoolExecutor(HEADER_THREADS) as pool:
            errors = list(pool.map(_error_of, found))
        for error in filter(None, errors):
            problems.add(error)
        self.folder = Path(folder)
        self.paths = [path for path, error in zip(found, errors, strict=True) if error is None]
        self.skipped = problems.report(str(folder))
        if not self.paths:
            raise DatasetError(f"None of the {len(found)} images of {folder} can be read. The first: {errors[0]}")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Item:  # type: ignore[override]
        """The item of one picture.

        Raises:
            DatasetError: the picture cannot be read.
        """
        path = self.paths[index]
        image = read_image(file_source(path))
        name = path.relative_to(self.folder)
        no_segment = torch.full(image.shape[-2:], -1)
        item = make_item(image, no_segment, [], name.with_suffix("").as_posix(), name.as_posix())
        return UnlabelledItem(**item, is_unlabelled=True)  # type: ignore[misc]


def _error_of(path: Path) -> DatasetError | None:
    try:
        read_header(file_source(path))
    except DatasetError as error:
        return error
    return None


class MixedItems(Sequence[Item]):
    """Labeled and unlabeled items in equal numbers: the fewer ones are repeated.

    Drawn in random order, half of a batch is labeled on average, however many there are of both. `TrainingItems`
    augments repeated items differently.

    Args:
        labelled: items with segments.
        unlabelled: items without.
    """

    def __init__(self, labelled: Sequence[Item], unlabelled: UnlabelledImages) -> None:
        self.labelled = labelled
        self.unlabelled = unlabelled

    def __len__(self) -> int:
        return 2 * max(len(self.labelled), len(self.unlabelled))

    def __getitem__(self, index: int) -> Item:  # type: ignore[override]
        index = range(len(self))[index]
        half = len(self) // 2
        if index < half:
            return self.labelled[index % len(self.labelled)]
        return self.unlabelled[(index - half) % len(self.unlabelled)]


def labelled_part(items: Any) -> Any:
    """The same training items without those that have no labels."""
    if isinstance(items, TrainingItems) and isinstance(items.dataset, MixedItems):
        return TrainingItems(items.dataset.labelled, items.augmentations, items.seed, items.skip_bad)
    return items


__all__ = ["MixedItems", "UnlabelledImages", "is_unlabelled", "labelled_part"]

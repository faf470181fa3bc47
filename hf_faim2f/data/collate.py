"""Items for training: reproducible augmentation, collation into batches, and unlabeled images."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset as TorchDataset
from transformers.utils import logging

from ..errors import DatasetError
from ..masks import maps_among
from ..model.channels_faim2f import RGB
from ..model.image_processing_faim2f import FaiM2FImageProcessor, resized_size
from ..model.segmentation_labels_faim2f import resize_segmentation_map
from .augmentation import Augmentation, augment
from .dataset import HEADER_THREADS, BadItem, Problems
from .files import file_source, list_images, read_header, read_image
from .item import (
    Item,
    binary_masks,
    drop_vanished,
    image_error,
    keep_segments,
    make_item,
    pixel_counts,
    segment_areas,
)

logger = logging.get_logger(__name__)


@dataclass
class SegmentationCollator:
    """Collates items into a batch, for a DataLoader or transformers' Trainer.

    Trainer needs `remove_unused_columns=False`; otherwise it removes the entries of items that are not arguments of the
    model before collation.

    Images are normalized and padded by the image processor: to the largest in the batch, or to its `pad_size`. Crowds
    and segments without pixels are not targets.

    Args:
        processor: the image processor.
        compact: return one map of segment ids per image instead of one binary mask per segment, so that memory does not
            grow with the number of segments.
        overlap_tolerance: a map contains only the topmost segments. If a segment would lose more than this fraction of
            its pixels, its image gets binary masks nevertheless. With 1, every image gets a map, and segments that are
            completely covered are not targets; with 0, nothing is lost.
        do_resize: also resize images and segments, if the image processor does; for items that are not augmented.
    """

    processor: FaiM2FImageProcessor
    compact: bool = True
    overlap_tolerance: float = 0.1
    do_resize: bool = False

    def __call__(self, items: list[Item]) -> dict[str, Any]:
        """Collates items.

        Returns:
            - **pixel_values** (B, C, H, W), float32, 0 in the padding.
            - **pixel_mask** (B, H, W), int64, 1 on the image, including the padding of augmentations.
            - **mask_labels**: for each image its segment ids (H, W), int32, -1 for none; or binary masks (n, H, W),
              float32.
            - **class_labels**: for each image its classes (n,), int64.

        Raises:
            ValueError: there are no items.
            DatasetError: the image processor's settings do not allow an image, or a batch of these sizes.
        """
        if not items:
            raise ValueError("A batch needs at least one item.")
        images = [item["image"] for item in items]
        do_resize = self.do_resize and self.processor.do_resize  # type: ignore[attr-defined]
        try:
            encoded = self.processor.preprocess(
                images, input_data_format="channels_first", return_tensors="pt", do_resize=do_resize
            )
        except ValueError as error:
            raise image_error(error, items) from error
        height, width = encoded["pixel_values"].shape[-2:]
        masks, classes = zip(*(self._labels(item, height, width) for item in items), strict=True)
        return {
            "pixel_values": encoded["pixel_values"],
            "pixel_mask": encoded["pixel_mask"],
            "mask_labels": list(masks),
            "class_labels": list(classes),
        }

    def _labels(self, item: Item, height: int, width: int) -> tuple[Tensor, Tensor]:
        item = keep_segments(item, ~item["crowd"])
        if self.do_resize and self.processor.do_resize:  # type: ignore[attr-defined]
            item = self._resized(item)
        item = drop_vanished(item)
        below, right = height - item["segments"].shape[-2], width - item["segments"].shape[-1]
        if self.compact and self._loss_by_overlap(item) <= self.overlap_tolerance:
            visible = pixel_counts(item["segments"], len(item["classes"])) > 0
            top = item.copy()
            top["hidden"] = None
            top = keep_segments(top, visible)
            return F.pad(top["segments"], (0, right, 0, below), value=-1), top["classes"]
        return F.pad(binary_masks(item).float(), (0, right, 0, below)), item["classes"]

    def _resized(self, item: Item) -> Item:
        settings: dict[str, Any] = self.processor.to_dict()
        height, width = item["image"].shape[-2:]
        size = resized_size(height, width, settings["size"], settings["size_divisor"])
        resized, hidden = item.copy(), item["hidden"]
        resized["segments"] = resize_segmentation_map(item["segments"], *size)
        if hidden is not None:
            resized["hidden"] = torch.stack([resize_segmentation_map(layer, *size) for layer in hidden])
        return resized

    @staticmethod
    def _loss_by_overlap(item: Item) -> float:
        """The largest fraction of a segment's pixels that is covered by others, over all segments of an item."""
        if item["hidden"] is None:
            return 0.0
        covered = pixel_counts(item["hidden"], len(item["classes"]))
        return float((covered / segment_areas(item)).max())


class TrainingItems(TorchDataset[Item]):
    """A dataset of augmented items.

    The random numbers for an item depend only on the seed, the epoch and the index, not on the number of workers or the
    order of access. Therefore a run that is resumed in the middle of an epoch gives the same results.

    Args:
        dataset: a dataset from one of the readers, or any other sequence of items.
        augmentations: applied to each item, in this order.
        seed: random seed.
        skip_bad: replace an unreadable item by the next readable one, which is then seen twice per epoch. A warning
            names the bad item, and `bad_items` lists all. The number of items does not change, so batches and resuming
            are not affected.
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
        # In shared memory, so that persistent workers see the new epoch, and this process sees the bad items they find.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._is_bad = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Must be called before each epoch; otherwise every epoch uses the same random numbers."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Item:
        """The augmented item.

        Raises:
            DatasetError: the item cannot be read or augmented, or, with `skip_bad`, no item can be read.
        """
        index = range(len(self))[index]  # supports negative indices, and terminates iteration
        item = self._read(index)
        seeds = np.random.SeedSequence([self.seed, int(self._epoch), index])
        generator = torch.Generator().manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> np.uint64(1)))
        try:
            return augment(item, self.augmentations, generator)
        except ValueError as error:  # for example an image so narrow that it would be resized to no pixels
            raise image_error(error, [item]) from error

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
        """The items that could not be read so far, in this process and its workers; reads each of them again.

        In a distributed run, each process knows only the items that it has read.
        """
        found = []
        for index in self._is_bad.nonzero()[:, 0].tolist():
            try:
                self.dataset[index]
            except DatasetError as error:
                found.append(BadItem(index, str(error)))
        return found


class UnlabelledItem(Item):
    """An item without segments because it is not labeled, as opposed to an image without objects."""

    is_unlabelled: bool


def is_unlabelled(item: Mapping[str, Any]) -> bool:
    """Whether an item, augmented or not, comes from `UnlabelledImages`."""
    return bool(item.get("is_unlabelled", False))


class UnlabelledImages(Sequence[Item]):
    """The images of a folder and its subfolders, as items without segments.

    Args:
        folder: the folder.
        skip_bad: leave out images whose header cannot be read.
        num_channels: number of channels of the images.

    Attributes:
        skipped: one sentence for each image that was left out.

    Raises:
        DatasetError: there is no such folder, no image in it that can be read, or a folder of maps in it; or, without
            `skip_bad`, an image cannot be read.
    """

    def __init__(self, folder: str | Path, skip_bad: bool = False, num_channels: int = RGB) -> None:
        found = list_images(Path(folder))
        if (reason := maps_among(Path(folder), found)) is not None:
            raise DatasetError(reason)
        problems = Problems(skip_bad)
        with ThreadPoolExecutor(HEADER_THREADS) as pool:
            errors = list(pool.map(_error_of, found))
        for error in filter(None, errors):
            problems.add(error)
        self.folder, self.num_channels = Path(folder), num_channels
        self.paths = [path for path, error in zip(found, errors, strict=True) if error is None]
        self.skipped = problems.report(str(folder))
        if not self.paths:
            raise DatasetError(f"None of the {len(found)} images of {folder} can be read. The first: {errors[0]}")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Item:  # type: ignore[override]
        """The item of one image.

        Raises:
            DatasetError: the image cannot be read.
        """
        path = self.paths[index]
        image = read_image(file_source(path), self.num_channels)
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
    """Labeled and unlabeled items in equal numbers; the smaller set is repeated.

    So with random sampling, half of a batch is labeled on average, whatever the sizes of the two sets. `TrainingItems`
    augments each repetition differently.

    Args:
        labelled: items with segments.
        unlabelled: items without segments.
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
    """The training items without the unlabeled ones."""
    if isinstance(items, TrainingItems) and isinstance(items.dataset, MixedItems):
        return TrainingItems(items.dataset.labelled, items.augmentations, items.seed, items.skip_bad)
    return items

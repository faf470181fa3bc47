"""Items to a batch that the model takes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset as TorchDataset
from transformers.utils import logging

from ..errors import DatasetError
from ..model.image_processing_faim2f import FaiM2FImageProcessor, resized_size
from ..model.segmentation_labels_faim2f import resize_segmentation_map
from .augmentation import Augmentation, augment
from .dataset import BadItem
from .item import Item, binary_masks, drop_vanished, keep_segments, pixel_counts, segment_areas


@dataclass
class SegmentationCollator:
    """Makes a batch of items, for a DataLoader or transformers' Trainer.

    Trainer needs `remove_unused_columns=False`: it would take away the parts of items that no argument of the model is
    called after, before they come here.

    Images are normalized and padded as the processor says: to the largest of the batch, or to its `pad_size`. Crowds
    are no targets, and neither are segments without a pixel.

    Args:
        processor: whose rescaling, normalization and padding are used.
        compact: give one map of segment ids for each image, so that memory does not grow with the number of segments,
            instead of a binary mask for each segment.
        overlap_tolerance: a map shows only the topmost segment. An image of which some segment would lose more than
            this share of its pixels so is given as binary masks nevertheless. With 1 everything is a map, and what
            is covered completely is no target; with 0 nothing is lost.
        do_resize: also resize images and segments, to the processor's `size`; for items that are not augmented.
    """

    processor: FaiM2FImageProcessor
    compact: bool = True
    overlap_tolerance: float = 0.1
    do_resize: bool = False

    def __call__(self, items: list[Item]) -> dict[str, Any]:
        """
        Returns:
            - **pixel_values** (B, 3, H, W), float32, 0 in the padding.
            - **pixel_mask** (B, H, W), int64, 1 on the image (which includes what an augmentation padded).
            - **mask_labels**: for each image the segment ids (H, W), int32, -1 where there is none; or, see above,
              binary masks (n, H, W), float32.
            - **class_labels**: for each image (n,), int64.

        Raises:
            ValueError: the images cannot be one batch, as the processor's settings are; the message says why.
        """
        if not items:
            raise ValueError("A batch needs at least one item.")
        images = [item["image"] for item in items]
        encoded = self.processor.preprocess(
            images, input_data_format="channels_first", return_tensors="pt", do_resize=self.do_resize
        )
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
        if self.do_resize:
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
        """The largest share of its pixels that a segment has beneath others, of all segments of an item."""
        if item["hidden"] is None:
            return 0.0
        covered = pixel_counts(item["hidden"], len(item["classes"]))
        return float((covered / segment_areas(item)).max())


# A data set as a training sees it: augmented, reproducible, and going on where an item is broken.

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

"""A model over a data set: predictions at each image's own size, straight into the metrics; nothing piles up."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..data.item import Item, binary_masks, class_map
from ..model.image_processing_faim2f import FaiM2FImageProcessor
from ..model.post_processing_faim2f import (
    InstanceEvaluation,
    evaluate_instances,
    evaluate_semantic,
    post_process_panoptic_segmentation,
)
from .instance import InstanceMetric
from .panoptic import PanopticMetric
from .semantic import SemanticMetric
from .streaming import StreamingMetric

SUBTASKS = ("semantic", "instance", "panoptic")
VOID = 255
# Detections that count in COCO's average precision.
MOST_DETECTIONS = 100


def _batches(items: Sequence[Item], indices: Sequence[int], batch_size: int) -> Iterator[list[Item]]:
    """Items that follow each other and have one size, so that no image is padded for another's sake."""
    batch: list[Item] = []
    for index in indices:
        item = items[index]
        if batch and (len(batch) == batch_size or batch[0]["image"].shape != item["image"].shape):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


@dataclass
class Evaluator:
    """Measures a model: mIoU, AP and PQ, by the paths behind the FAI models' published figures.

    Args:
        processor: how images are prepared; its `cls_sigmoid` also says how classes are read.
        id2label: the name of each class id.
        subtasks: which of "semantic", "instance" and "panoptic" to measure.
        thing_ids: classes with instances, for AP and PQ; None means all of them.
        batch_size: images of one size that go through the model together.
        half: the type in which the model computes by autocast; None for its own. Post-processing is float32 always.

    Raises:
        ValueError: an unknown subtask.
    """

    processor: FaiM2FImageProcessor
    id2label: dict[int, str]
    subtasks: Sequence[str] = ("semantic",)
    thing_ids: Collection[int] | None = None
    batch_size: int = 8
    half: torch.dtype | None = None

    def __post_init__(self) -> None:
        for subtask in self.subtasks:
            if subtask not in SUBTASKS:
                raise ValueError(f"subtasks: {subtask!r} is none of {', '.join(SUBTASKS)}.")
        if self.thing_ids is None:
            self.thing_ids = tuple(self.id2label)

    def _metrics(self) -> dict[str, StreamingMetric]:
        things = {index: name for index, name in self.id2label.items() if index in self._things}
        makers = {
            "semantic": lambda: SemanticMetric(self.id2label, ignore_index=VOID),
            "instance": lambda: InstanceMetric(things, max_detections=MOST_DETECTIONS),
            "panoptic": lambda: PanopticMetric(self.id2label, self._things),
        }
        return {subtask: makers[subtask]() for subtask in self.subtasks}

    @property
    def _things(self) -> Collection[int]:
        assert self.thing_ids is not None
        return self.thing_ids

    @torch.no_grad()
    def __call__(
        self, model: nn.Module, items: Sequence[Item], process: int = 0, processes: int = 1
    ) -> dict[str, dict[str, Any]]:
        """
        Args:
            model: a `FaiM2FForUniversalSegmentation`, wherever it is; it is in evaluation mode for the while.
            items: the data set.
            process, processes: which share of the items this process takes; with several, each must call this, and
                each gets the result over all items.

        Returns:
            For each subtask what its metric computes, in per cent.
        """
        metrics = self._metrics()
        was_training = model.training
        model.eval()
        try:
            for batch in _batches(items, range(process, len(items), processes), self.batch_size):
                self._add(model, batch, metrics)
        finally:
            model.train(was_training)
        for metric in metrics.values():
            if processes > 1:
                metric.gather()
        return {subtask: metric.compute() for subtask, metric in metrics.items()}

    def _add(self, model: nn.Module, batch: list[Item], metrics: dict[str, StreamingMetric]) -> None:
        parameter = next(model.parameters())
        inputs = self.processor(
            [item["image"] for item in batch], input_data_format="channels_first", return_tensors="pt"
        )
        pixels = inputs["pixel_values"].to(parameter.device, parameter.dtype)
        with torch.autocast(pixels.device.type, self.half, enabled=self.half is not None):
            outputs = model(pixel_values=pixels)
        logits = (outputs.class_queries_logits, outputs.masks_queries_logits)
        sizes = [tuple(item["image"].shape[-2:]) for item in batch]
        sigmoid = self.processor.cls_sigmoid  # type: ignore[attr-defined]
        network = pixels.shape[-2:]
        ids = [item["image_id"] for item in batch]
        if "semantic" in metrics:
            maps = evaluate_semantic(*logits, network, sizes, cls_sigmoid=sigmoid)
            references: list[Any] = [semantic_reference(item) for item in batch]
            metrics["semantic"].add_batch(predictions=maps, references=references, image_ids=ids)
        if "instance" in metrics:
            found = evaluate_instances(*logits, network, sizes, cls_sigmoid=sigmoid, top_k=MOST_DETECTIONS)
            references = [instance_reference(item, self._things) for item in batch]
            metrics["instance"].add_batch(
                predictions=[self._of_things(instances) for instances in found], references=references, image_ids=ids
            )
        if "panoptic" in metrics:
            panoptic = post_process_panoptic_segmentation(
                *logits, label_ids_to_fuse=set(), target_sizes=sizes, cls_sigmoid=sigmoid, intermediate_size=None
            )
            references = [panoptic_reference(item) for item in batch]
            metrics["panoptic"].add_batch(predictions=panoptic, references=references, image_ids=ids)

    def _of_things(self, found: InstanceEvaluation) -> InstanceEvaluation:
        keep = torch.isin(found.class_ids, torch.tensor(sorted(self._things), device=found.class_ids.device))
        return InstanceEvaluation(found.scores[keep], found.class_ids[keep], found.boxes[keep], found.masks[keep])


def semantic_reference(item: Item) -> torch.Tensor:
    """(H, W), int64: class ids, and 255 where no segment, or a crowd, is."""
    classes = item["classes"].masked_fill(item["crowd"], -1)
    item = item.copy()
    item["classes"] = classes
    classes = class_map(item)
    return classes.masked_fill(classes < 0, VOID)


def instance_reference(item: Item, thing_ids: Collection[int]) -> dict[str, Any]:
    """Whole masks of the things, with classes, crowd flags and, where the data set gives them, areas."""
    keep = torch.isin(item["classes"], torch.tensor(sorted(thing_ids)))
    reference = {"masks": binary_masks(item)[keep], "labels": item["classes"][keep], "iscrowd": item["crowd"][keep]}
    if item["areas"] is not None:
        reference["areas"] = item["areas"][keep]
    return reference


def panoptic_reference(item: Item) -> dict[str, Any]:
    """A map of segment ids from 1, 0 for void, and what each is."""
    segments_info = [
        {"id": number + 1, "label_id": int(label), "iscrowd": bool(crowd)}
        for number, (label, crowd) in enumerate(zip(item["classes"], item["crowd"], strict=True))
    ]
    return {"segmentation": item["segments"] + 1, "segments_info": segments_info}

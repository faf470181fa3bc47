"""Evaluates a model on a dataset. Predictions, at each image's own size, are counted immediately and not kept."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.dataset import Description
from ..data.item import Item, binary_masks, class_map, image_error
from ..errors import ModelError
from ..model.configuration_faim2f import FaiM2FConfig
from ..model.focoos_post_processing_faim2f import InstanceEvaluation, evaluate_instances, evaluate_semantic
from ..model.image_processing_faim2f import FaiM2FImageProcessor
from ..model.post_processing_faim2f import post_process_panoptic_segmentation
from ..runtime.backends import check_numbers
from ..runtime.tiles import Windows, segment_by_windows
from .cityscapes import CityscapesMetric
from .instance import InstanceMetric
from .panoptic import PanopticMetric
from .semantic import SemanticMetric
from .streaming import StreamingMetric

SUBTASKS = ("semantic", "instance", "panoptic")
# Tasks that can be evaluated on data of each task: instance data does not label the background, and semantic data does
# not separate objects.
MEASURABLE: dict[str, tuple[str, ...]] = {
    "semantic": ("semantic",),
    "instance": ("instance",),
    "panoptic": ("semantic", "instance", "panoptic"),
}
# The value of pixels without a class in ground truth maps, and the value used instead if it is the id of a class.
VOID, OTHER_VOID = 255, -1
# Maximum number of detections per image in COCO's average precision.
MOST_DETECTIONS = 100
# Maximum number of pixels in a batch, regardless of the batch size: two images of Cityscapes.
MOST_PIXELS = 2**22
# Measured in addition to the semantic subtask if the dataset has the files for it.
CITYSCAPES = "cityscapes"
# What a class is called that has no name, and the signs that names may differ in.
UNNAMED, SIGNS = re.compile(r"label\d+"), re.compile(r"[\s_-]+")


def choose_subtasks(description: Description, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The tasks to evaluate: the requested ones, or all that the annotations support.

    Raises:
        ValueError: a requested task cannot be evaluated on the data.
    """
    possible, truth = MEASURABLE[description.task], f"{description.task} truth"
    if description.task == "panoptic" and not description.things:
        possible, truth = ("semantic", "panoptic"), "panoptic truth without things"
    for subtask in wanted or ():
        if subtask not in possible:
            raise ValueError(
                f"{description.name} has {truth}, by which {' and '.join(possible)} segmentation can be measured, but "
                f"not {subtask!r}."
            )
    return tuple(dict.fromkeys(wanted)) if wanted else possible


def check_classes(name: str, config: FaiM2FConfig, description: Description, by_ids: bool = False) -> list[str]:
    """Checks by their names that the class ids of a model and of the data mean the same.

    Names that differ only in case, spaces, hyphens and underscores are the same, unless those of one side differ only
    in this.

    Args:
        name: the model, for messages.
        config: its configuration.
        description: that of the data.
        by_ids: compare classes by their ids whatever their names.

    Returns:
        A note if some names differ.

    Raises:
        ModelError: the numbers of classes differ; or, unless `by_ids`, a name has another id, or no name is the same.
    """
    data, own = description.name, [config.id2label[index] for index in sorted(config.id2label)]
    if len(own) != len(description.labels):
        raise ModelError(
            f"{name} has {len(own)} classes, but {data} {len(description.labels)}: the model cannot be evaluated on "
            "this data."
        )
    mine, theirs = ([SIGNS.sub("", label.casefold()) for label in labels] for labels in (own, description.labels))
    if len(set(mine)) < len(own) or len(set(theirs)) < len(own):  # some differ only in this
        mine, theirs = own, list(description.labels)
    differing = [index for index, (one, other) in enumerate(zip(mine, theirs, strict=True)) if one != other]
    if not differing:
        return []
    first = differing[0]
    difference = f"Class {first} is {own[first]!r} in {name}, but {description.labels[first]!r} in {data}"
    if not by_ids:
        how = "Bring those of the data into the model's order, or pass --by-ids if the ids mean the same."
        if sorted(mine) == sorted(theirs):
            raise ModelError(
                f"{difference}: both have the same labels, in another order, and classes are compared by their ids. "
                f"{how}"
            )
        for index in differing:
            if mine.count(mine[index]) == theirs.count(mine[index]) == 1:
                raise ModelError(
                    f"{difference}, and {own[index]!r} is class {index} of the model, but class "
                    f"{theirs.index(mine[index])} of the data: classes are compared by their ids. {how}"
                )
        if len(differing) == len(own) and not all(map(UNNAMED.fullmatch, mine)):
            raise ModelError(
                f"{difference}, and no other class has the same name in both: evaluate a model of the data's classes, "
                "or pass --by-ids if the ids mean the same."
            )
    return [f"{difference}: the classes are compared by their ids (names that differ: {len(differing)} of {len(own)})."]


def _batches(items: Sequence[Item], indices: Sequence[int], batch_size: int) -> Iterator[list[Item]]:
    """Batches of consecutive items whose images have the same size, so that they need no padding."""
    batch: list[Item] = []
    for index in indices:
        item = items[index]
        pixels = (len(batch) + 1) * item["segments"].numel()
        full = len(batch) == batch_size or pixels > MOST_PIXELS
        if batch and (full or batch[0]["image"].shape != item["image"].shape):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


@dataclass
class Evaluator:
    """Measures a model's mIoU, AP and PQ, with the post-processing used for the published figures of the FAI models.

    Args:
        processor: the model's image processor; its `cls_sigmoid` also selects the scoring of classes.
        id2label: the name of each class id.
        subtasks: which of "semantic", "instance" and "panoptic" to measure.
        thing_ids: the classes with instances, for AP and PQ; None for all.
        batch_size: maximum number of images per forward pass; only images of the same size share one.
        half: the dtype of autocast; None to run without. Post-processing is always float32.
        windows: sliding windows over the image, for the semantic subtask only; None for the whole image at once.
        cityscapes_truth: the `*_gtFine_labelIds.png` of each image id, with its `*_gtFine_instanceIds.png` beside it.
            cityscapesscripts then also evaluates the semantic maps; the class ids must be train ids.
        watch: called with the subtask, the item and the prediction for each semantic map, each image's instances (an
            `InstanceEvaluation`) and each panoptic result.

    Attributes:
        confusion: (C, C), the pixels of the last evaluation; rows are the ground truth, columns the predictions. None
            before the first evaluation, and without the semantic subtask.

    Raises:
        ValueError: a subtask is unknown, or is not semantic and there are `windows`.
    """

    processor: FaiM2FImageProcessor
    id2label: dict[int, str]
    subtasks: Sequence[str] = ("semantic",)
    thing_ids: Collection[int] | None = None
    batch_size: int = 8
    half: torch.dtype | None = None
    windows: Windows | None = None
    cityscapes_truth: Mapping[Any, Path] | None = None
    watch: Callable[[str, Item, Any], None] | None = None
    confusion: np.ndarray | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for subtask in self.subtasks:
            if subtask not in SUBTASKS:
                raise ValueError(f"subtasks: {subtask!r} is none of {', '.join(SUBTASKS)}.")
            if subtask != "semantic" and self.windows is not None:
                raise ValueError(
                    f"Windows give semantic maps, but no {subtask} segments, which could span several windows: measure "
                    "the subtask semantic only, or whole images."
                )
        if self.thing_ids is None:
            self.thing_ids = tuple(self.id2label)

    def _metrics(self) -> dict[str, StreamingMetric]:
        things = {index: name for index, name in self.id2label.items() if index in self._things}
        makers = {
            "semantic": lambda: SemanticMetric(self.id2label, ignore_index=self._void),
            "instance": lambda: InstanceMetric(things, max_detections=MOST_DETECTIONS),
            # As predicted: what the model fuses, it has fused.
            "panoptic": lambda: PanopticMetric(self.id2label, self._things, fuse_stuff=False),
        }
        metrics = {subtask: makers[subtask]() for subtask in self.subtasks}
        if self.cityscapes_truth is not None and "semantic" in metrics:
            metrics[CITYSCAPES] = CityscapesMetric()
        return metrics

    def metric_names(self) -> list[str]:
        """The values that an evaluation has over all classes, as "subtask metric", such as "semantic mIoU"."""
        return [
            f"{subtask} {name}"
            for subtask, metric in self._metrics().items()
            for name, value in metric._result().items()
            if isinstance(value, (int, float))
        ]

    @property
    def _void(self) -> int:
        return OTHER_VOID if VOID in self.id2label else VOID

    @property
    def _things(self) -> Collection[int]:
        assert self.thing_ids is not None
        return self.thing_ids

    @torch.no_grad()
    def __call__(
        self, model: nn.Module, items: Sequence[Item], process: int = 0, processes: int = 1
    ) -> dict[str, dict[str, Any]]:
        """Measures a model on all items.

        Args:
            model: a `FaiM2FForUniversalSegmentation` on any device; it is in evaluation mode during the call.
            items: the dataset.
            process, processes: the rank of this process and the number of processes. Each process evaluates its share
                of the items, and all of them get the result over all items.

        Returns:
            The result of each subtask's metric, in percent; with `cityscapes_truth`, also that of "cityscapes".

        Raises:
            PredictorError: the model's outputs contain NaN.
            DatasetError: the image processor refuses an image, such as one that it would resize to no pixels.
        """
        metrics = self._metrics()
        was_training, own = model.training, vars(model)
        model.eval()
        prepared = own.get("forward")
        if "_original_forward" in own:  # accelerate's mixed precision; here `half` decides
            own["forward"] = own["_original_forward"]
        try:
            for batch in _batches(items, range(process, len(items), processes), self.batch_size):
                self._add(model, batch, metrics)
        finally:
            if "_original_forward" in own:
                own["forward"] = prepared
            model.train(was_training)
        for metric in metrics.values():
            if processes > 1:
                metric.gather()
        semantic = metrics.get("semantic")
        self.confusion = semantic.confusion if isinstance(semantic, SemanticMetric) else None
        return {subtask: metric.compute() for subtask, metric in metrics.items()}

    def _add(self, model: nn.Module, batch: list[Item], metrics: dict[str, StreamingMetric]) -> None:
        parameter = next(model.parameters())
        images = [item["image"] for item in batch]
        try:  # images of the same size need no padding
            inputs = self.processor(images, input_data_format="channels_first", return_tensors="pt", do_pad=False)
        except ValueError as error:
            raise image_error(error, batch) from error
        pixels = inputs["pixel_values"].to(parameter.device, parameter.dtype)
        network = (pixels.shape[2], pixels.shape[3])
        sizes = [(item["image"].shape[1], item["image"].shape[2]) for item in batch]
        sigmoid = self.processor.cls_sigmoid  # type: ignore[attr-defined]
        ids = [item["image_id"] for item in batch]

        def run(values: torch.Tensor) -> dict[str, torch.Tensor]:
            with torch.autocast(values.device.type, self.half, enabled=self.half is not None):
                outputs = model(pixel_values=values)
            logits = {name: getattr(outputs, name) for name in ("class_queries_logits", "masks_queries_logits")}
            check_numbers("The model", logits)
            return logits

        if self.windows is not None:
            maps = [
                segment_by_windows(
                    run, image, self.windows, size, cls_sigmoid=sigmoid, batch_size=self.batch_size
                )
                for image, size in zip(pixels, sizes, strict=True)
            ]  # fmt: skip
            self._add_maps(maps, batch, metrics)
            return
        outputs = run(pixels)
        logits = (outputs["class_queries_logits"], outputs["masks_queries_logits"])
        references: list[Any]
        if "semantic" in metrics:
            self._add_maps(evaluate_semantic(*logits, network, sizes, cls_sigmoid=sigmoid), batch, metrics)
        if "instance" in metrics:
            found = evaluate_instances(*logits, network, sizes, cls_sigmoid=sigmoid, top_k=MOST_DETECTIONS)
            found = [self._of_things(instances) for instances in found]
            references = [instance_reference(item, self._things) for item in batch]
            metrics["instance"].add_batch(predictions=found, references=references, image_ids=ids)
            self._tell("instance", batch, found)
        if "panoptic" in metrics:
            panoptic = post_process_panoptic_segmentation(
                *logits, label_ids_to_fuse=self._stuff, target_sizes=sizes, cls_sigmoid=sigmoid, intermediate_size=None,
                unique_ids=True,
            )  # fmt: skip
            references = [panoptic_reference(item) for item in batch]
            metrics["panoptic"].add_batch(predictions=panoptic, references=references, image_ids=ids)
            self._tell("panoptic", batch, panoptic)

    def _add_maps(self, maps: list[torch.Tensor], batch: list[Item], metrics: dict[str, StreamingMetric]) -> None:
        ids = [item["image_id"] for item in batch]
        references = [semantic_reference(item, self._void) for item in batch]
        metrics["semantic"].add_batch(predictions=maps, references=references, image_ids=ids)
        if CITYSCAPES in metrics:
            assert self.cityscapes_truth is not None
            files = [self.cityscapes_truth[image_id] for image_id in ids]
            metrics[CITYSCAPES].add_batch(predictions=maps, references=files, image_ids=ids)
        self._tell("semantic", batch, maps)

    def _tell(self, subtask: str, batch: list[Item], predictions: Sequence[Any]) -> None:
        if self.watch is not None:
            for item, prediction in zip(batch, predictions, strict=True):
                self.watch(subtask, item, prediction)

    @property
    def _stuff(self) -> Collection[int]:
        """The stuff classes: those of the image processor, else all classes that are not things."""
        own = self.processor.label_ids_to_fuse
        return set(self.id2label).difference(self._things) if own is None else own

    def _of_things(self, found: InstanceEvaluation) -> InstanceEvaluation:
        keep = torch.isin(found.class_ids, torch.tensor(sorted(self._things), device=found.class_ids.device))
        return InstanceEvaluation(found.scores[keep], found.class_ids[keep], found.boxes[keep], found.masks[keep])


def semantic_reference(item: Item, void: int = VOID) -> torch.Tensor:
    """(H, W) int64: class ids; `void`, which must be the id of no class, outside segments and in crowds."""
    classes = item["classes"].masked_fill(item["crowd"], -1)
    item = item.copy()
    item["classes"] = classes
    classes = class_map(item)
    return classes.masked_fill(classes < 0, void)


def instance_reference(item: Item, thing_ids: Collection[int]) -> dict[str, Any]:
    """The full-size masks of the things, with classes, crowd flags and, if the dataset has them, areas."""
    keep = torch.isin(item["classes"], torch.tensor(sorted(thing_ids)))
    reference = {"masks": binary_masks(item)[keep], "labels": item["classes"][keep], "iscrowd": item["crowd"][keep]}
    if item["areas"] is not None:
        reference["areas"] = item["areas"][keep]
    return reference


def panoptic_reference(item: Item) -> dict[str, Any]:
    """A map of segment ids, from 1, with 0 for void, and its `segments_info`."""
    segments_info = [
        {"id": number + 1, "label_id": int(label), "iscrowd": bool(crowd)}
        for number, (label, crowd) in enumerate(zip(item["classes"], item["crowd"], strict=True))
    ]
    return {"segmentation": item["segments"] + 1, "segments_info": segments_info}

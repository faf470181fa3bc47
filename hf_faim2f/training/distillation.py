"""Distillation: a student learns from the predictions of a trained model, the teacher, in addition to labels.

The teacher sees the same augmented pixels as the student, normalized by its own image processor. A crop is not enlarged
to its size for whole images: objects keep the scale that they have for the teacher in whole images. It gives

- **segments**: the queries that its own post-processing would keep, with soft masks. The student's queries are matched
  to them as to labels: `teacher_ce`, `teacher_mask`, `teacher_dice`;
- **classes of pixels**: the distribution over the classes at random points (`pixel_classes.py`), which also conveys its
  uncertainty: `teacher_pixel` (Hinton et al., "Distilling the Knowledge in a Neural Network", 2015; per pixel as in Liu
  et al., "Structured Knowledge Distillation", CVPR 2019, section 3.2). Each point is weighted by the teacher's
  confidence that there is any segment.

In images without labels, these are the only losses.

Both are in the frame of the student's padded batch: coordinates are in 0..1 over its whole height and width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.collate import SegmentationCollator, TrainingItems, is_unlabelled
from ..data.dataset import Description
from ..data.item import Item, binary_masks, keep_segments
from ..errors import ModelError
from ..family import ALIASES, FAMILY, load_config
from ..model.configuration_faim2f import FaiM2FConfig
from ..model.image_processing_faim2f import FaiM2FImageProcessor, resize_image, resized_size
from ..model.modeling_faim2f import FaiM2FForUniversalSegmentation
from ..model.padding_faim2f import image_sizes
from ..model.point_sampling_faim2f import MaskProduct, Masks, SegmentTargets, zero_of
from ..zoo import label_difference, open_model
from .pixel_classes import pixel_class_loss, pixel_coverage, pixel_log_probabilities

# Weight of the pixel-class loss among the teacher's losses: as large as that of the mask loss.
PIXEL_WEIGHT = 5.0
# A teacher first predicts this many labeled images, and must find this fraction of their segments.
CHECKED_PICTURES, LEAST_FOUND = 8, 0.1
CHECKED_POINTS = 20_000
Size = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Teacher:
    """A trained model to learn from; see `open_teacher`.

    Args:
        name: its folder, published name or Hub id.
        model, processor: the model, in evaluation mode, and its image processor.
        classes: (C,), the student's class id of each of the teacher's classes.
        fused: the student's classes that have at most one segment per image (stuff; all classes in semantic
            segmentation). The teacher's segments of such a class are merged.
        weight: weight of its losses relative to those of the labels.
        notes: sentences for the user.
    """

    name: str
    model: FaiM2FForUniversalSegmentation
    processor: FaiM2FImageProcessor
    classes: Tensor
    fused: frozenset[int] = frozenset()
    weight: float = 1.0
    notes: tuple[str, ...] = ()

    @property
    def short_name(self) -> str:
        """The name for a card; for a folder, only the last part of its path."""
        return Path(self.name).resolve().name if Path(self.name).is_dir() else self.name


@dataclass
class Answers:
    """A teacher's predictions for a batch of B images, in the frame of the student's batch.

    Args:
        masks: for each image its soft masks (n_i, h, w), in 0..1; h and w are the same for all images.
        classes: for each image (n_i,), the student's class ids.
        points: (P, 2), (x, y) in 0..1.
        probabilities: (B, C, P), of the student's classes at the points.
        weights: (B, P), in 0..1, the confidence that there is any segment at each point; 0 in the padding.
    """

    masks: list[Tensor]
    classes: list[Tensor]
    points: Tensor
    probabilities: Tensor
    weights: Tensor


def open_teacher(
    name: str | Path, description: Description, items: "Sequence[Item] | TrainingItems", weight: float = 1.0
) -> Teacher:
    """Opens a teacher, and checks that it fits the data.

    Args:
        name: a folder, a published name or a Hub id, also of transformers' Mask2Former; see `zoo.open_model`.
        description: of the data that the student learns from. The teacher must have its labels; if their order differs,
            they are matched by name.
        items: items of the data, without augmentation. The teacher predicts some of them, to detect weights that are
            random or were trained on other data with the same labels.
        weight: weight of the teacher's losses relative to those of the labels.

    Raises:
        ModelError: the model cannot be opened; it has other labels or another number of channels; it does not
            distinguish instances, but the data does; or it finds hardly any of the labeled segments.
    """
    text = str(name)
    if text in (*FAMILY, *ALIASES) and not Path(text).is_dir():
        _class_ids(text, load_config(text), description)  # reported before anything is downloaded
    model, processor = open_model(text)
    classes = _class_ids(text, model.config, description)
    if model.config.postprocessing_type == "semantic" and description.task != "semantic":
        raise ModelError(
            f"The teacher {text} was trained for semantic segmentation and does not distinguish instances, as "
            f"{description.name} does: choose a teacher for {description.task} segmentation."
        )
    if model.config.num_channels != description.num_channels:
        raise ModelError(
            f"The teacher {text} takes images of {model.config.num_channels} channels, but those of {description.name} "
            f"have {description.num_channels}: choose another teacher."
        )
    fused = set(description.id2label)
    if description.task != "semantic":
        fused = fused - description.things if description.task == "panoptic" else set()
    model.optimize_for_inference()
    teacher = Teacher(text, model, processor, torch.tensor(classes), frozenset(fused), weight)
    notes = [_agreement(teacher, description, items)]
    if classes != sorted(classes):
        notes.append(f"{text} has the labels of {description.name} in another order; they are matched by name.")
    return replace(teacher, notes=tuple(notes))


def _class_ids(name: str, config: FaiM2FConfig, description: Description) -> list[int]:
    """The data's class id of each class of the teacher; ModelError if the labels differ."""
    difference = label_difference(name, config, description.name, description.labels)
    if difference is None:
        return list(range(config.num_labels))
    own = [config.id2label[index] for index in sorted(config.id2label)]
    if len(set(own)) == len(own) and sorted(own) == sorted(description.labels):
        return [description.labels.index(label) for label in own]
    raise ModelError(
        f"{difference}: a teacher must have the labels of the data, in any order. Choose another teacher, or train one "
        "on this data."
    )


def _agreement(teacher: Teacher, description: Description, items: "Sequence[Item] | TrainingItems") -> str:
    """A sentence on how many labeled segments the teacher finds; ModelError if there are too few."""
    generator = torch.Generator().manual_seed(0)
    found, wanted, pictures = 0, 0, 0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for index in torch.randperm(len(items), generator=generator).tolist():
            item = keep_segments(items[index], ~items[index]["crowd"])
            if not len(item["classes"]):
                continue
            hits = _found_segments(teacher, item)
            found, wanted, pictures = found + int(hits.sum()), wanted + len(hits), pictures + 1
            if pictures == CHECKED_PICTURES:
                break
    said = f"{found} of the {wanted} labeled segments in {pictures} images of {description.name}"
    if found < LEAST_FOUND * wanted or not wanted:
        raise ModelError(
            f"The teacher {teacher.name} finds {said} (of the right class, IoU above 0.5): its weights are random, or "
            "it was trained on other data. Choose a model that `faim2f evaluate` shows to be good on this data."
        )
    return f"The teacher {teacher.name} finds {said} (of the right class, IoU above 0.5)."


def _found_segments(teacher: Teacher, item: Item) -> Tensor:
    """(n,) bool: whether a segment of the teacher has the class of a labeled one, and covers it well.

    "Well" means an IoU halfway between that of the whole image and 1: 0.5 for small segments, more for large ones. So
    random weights that predict one class for the whole image find nothing, even if most of it has that class.
    """
    whole = torch.ones(1, *item["image"].shape[-2:], dtype=torch.long)
    inputs = teacher_inputs(teacher.processor, [item])
    answers = answer(teacher, inputs, whole, torch.rand(1, 2))
    points = torch.rand(CHECKED_POINTS, 2)
    device = torch.device("cpu")
    masks, classes = _united(binary_masks(item), item["classes"], teacher.fused)
    count = len(teacher.classes)
    labelled = SegmentTargets([masks], [classes], count, 1, device).sample_all(0, points) > 0.5
    taught = SegmentTargets(answers.masks, answers.classes, count, 1, device).sample_all(0, points) > 0.5
    both = labelled.float() @ taught.float().T  # (n, m)
    either = labelled.sum(1, keepdim=True) + taught.sum(1) - both
    same = classes[:, None] == answers.classes[0]
    enough = 0.5 + 0.5 * labelled.float().mean(1, keepdim=True)
    hits: Tensor = ((both >= enough * either) & (both > 0) & same).any(1)
    return hits


def teacher_inputs(
    processor: FaiM2FImageProcessor, items: Sequence[Item], student: SegmentationCollator | None = None
) -> dict[str, Tensor]:
    """`pixel_values` and `pixel_mask` of a batch for the teacher, resized and normalized by its image processor.

    Args:
        processor: the teacher's.
        items: the batch.
        student: the student's collator. If it does not resize the items, they are crops at the scale of its image
            processor's size, and are resized by the ratio of the teacher's size to that size. None for whole images.
    """
    images = [item["image"] for item in items]
    are_crops = student is not None and not student.do_resize
    if student is not None and are_crops:
        sizes = [_size_of_crop(item, processor, student.processor) for item in items]
        images = [
            image if image.shape[-2:] == size else resize_image(image.float(), *size)
            for image, size in zip(images, sizes, strict=True)
        ]
    encoded = processor.preprocess(
        images, input_data_format="channels_first", return_tensors="pt", do_pad=True,
        do_resize=False if are_crops else None,
    )  # fmt: skip
    return {"pixel_values": encoded["pixel_values"], "pixel_mask": encoded["pixel_mask"]}


def _size_of_crop(item: Item, teacher: FaiM2FImageProcessor, student: FaiM2FImageProcessor) -> Size:
    """The size (h, w) at which the teacher sees a crop, `item`, of an image at the student's scale."""
    height, width = item["image"].shape[-2:]
    # An item keeps the size of the whole image, by which both would resize it.
    own, of_student = (
        resized_size(item["height"], item["width"], processor.size, processor.size_divisor or 0) if processor.do_resize
        else (item["height"], item["width"])
        for processor in (teacher, student)
    )  # fmt: skip
    down, right = (
        max(1, round(side * mine / theirs)) for side, mine, theirs in zip((height, width), own, of_student, strict=True)
    )
    return resized_size(height, width, {"height": down, "width": right}, teacher.size_divisor or 0)


@dataclass
class DistillationCollator:
    """Adds `teacher_inputs` and `is_labelled` (B,), bool, whether each image has labels, to the student's batch."""

    student: SegmentationCollator
    processor: FaiM2FImageProcessor

    def __call__(self, items: list[Item]) -> dict[str, Any]:
        batch = self.student(items)
        batch["teacher_inputs"] = teacher_inputs(self.processor, items, self.student)
        batch["is_labelled"] = torch.tensor([not is_unlabelled(item) for item in items])
        return batch


def points_of_step(count: int, seed: int, step: int) -> Tensor:
    """Random points (count, 2), sorted by y, that depend on seed and step only, so that a resumed run has the same."""
    seeds = np.random.SeedSequence([seed, step])
    generator = torch.Generator().manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> np.uint64(1)))
    points = torch.rand(count, 2, generator=generator)
    return points[points[:, 1].argsort()]


@torch.no_grad()
def answer(teacher: Teacher, inputs: dict[str, Tensor], pixel_mask: Tensor, points: Tensor) -> Answers:
    """The teacher's predictions for a batch.

    Args:
        teacher: on the device of the inputs.
        inputs: see `teacher_inputs`.
        pixel_mask: of the student's batch, (B, H, W).
        points: (P, 2), (x, y) in 0..1, at which the classes of pixels are compared.
    """
    frame: Size = (pixel_mask.shape[1], pixel_mask.shape[2])
    outputs = teacher.model(**inputs)
    config, processor = teacher.model.config, teacher.processor
    ids = teacher.classes.to(points.device)
    segments, probabilities, weights = [], [], []
    sizes = image_sizes(pixel_mask)
    for (height, width), own in zip(sizes, processor.remove_padding(outputs, inputs["pixel_mask"]), strict=True):
        class_logits, masks = own["class_queries_logits"].float(), own["masks_queries_logits"].float()
        segments.append(_segments(teacher, class_logits[0], masks[0]))
        # In the teacher's frame, which has no padding.
        there = points * points.new_tensor([frame[1] / width, frame[0] / height])
        how = {"cls_sigmoid": config.cls_sigmoid}
        of_classes = pixel_log_probabilities(masks, class_logits, there, **how).exp()
        probabilities.append(torch.empty_like(of_classes).index_copy_(1, ids, of_classes))
        inside = (there <= 1).all(1)
        weights.append(pixel_coverage(masks, class_logits, there, **how) * inside)
    grid = _grid([masks.shape[-2:] for masks, _ in segments], sizes, frame)
    return Answers(
        [_in_frame(masks, size, frame, grid) for (masks, _), size in zip(segments, sizes, strict=True)],
        [classes for _, classes in segments],
        points,
        torch.cat(probabilities),
        torch.cat(weights),
    )


def _segments(teacher: Teacher, class_logits: Tensor, mask_logits: Tensor) -> tuple[Tensor, Tensor]:
    """The confident queries of an image: soft masks (n, h, w), and the student's class ids (n,).

    A query's score is that of the image processor's post-processing: the probability of its best class, with
    `use_mask_score` times the mean probability inside its mask; it must reach the image processor's `threshold`.

    Args:
        class_logits: (Q, C+1).
        mask_logits: (Q, h, w).
    """
    processor = teacher.processor
    chances = class_logits.sigmoid() if teacher.model.config.cls_sigmoid else class_logits.softmax(-1)
    scores, classes = chances[:, :-1].max(1)
    kept = scores >= processor.threshold
    masks, scores, classes = mask_logits[kept].sigmoid(), scores[kept], classes[kept]
    inside = masks > 0.5
    pixels = inside.flatten(1).sum(1)
    if processor.use_mask_score:
        scores = scores * (masks * inside).flatten(1).sum(1) / pixels.clamp(min=1)
    kept = (pixels > 0) & (scores >= processor.threshold)
    return _united(masks[kept], teacher.classes.to(classes.device)[classes[kept]], teacher.fused)


def _united(masks: Tensor, classes: Tensor, fused: frozenset[int]) -> tuple[Tensor, Tensor]:
    """Merges the masks (n, h, w), bool or in 0..1, of each class (n,) in `fused`; returns masks and classes."""
    united = [label for label in classes.unique().tolist() if label in fused]
    if not united:
        return masks, classes
    single = torch.tensor([label not in fused for label in classes.tolist()], device=classes.device)
    wholes = torch.stack([masks[classes == label].amax(0) for label in united])
    return torch.cat([masks[single], wholes]), torch.cat([classes[single], classes.new_tensor(united)])


def _grid(grids: Sequence[Sequence[int]], sizes: Sequence[Size], frame: Size) -> Size:
    """The size (h, w) of maps of the whole frame that are at least as fine as the teacher's maps of its images."""
    height, width = (
        max(math.ceil(grid[axis] * frame[axis] / size[axis]) for grid, size in zip(grids, sizes, strict=True))
        for axis in (0, 1)
    )
    return height, width


def _in_frame(maps: Tensor, size: Size, frame: Size, grid: Size) -> Tensor:
    """Resamples maps (n, h, w) of an image at the upper left of a frame to maps (n, *grid) of the whole frame.

    Args:
        maps: in 0..1.
        size: (height, width) of the image.
        frame: (height, width) of the frame; the maps are 0 outside of the image.
        grid: (height, width) of the result.
    """
    if size == frame and maps.shape[-2:] == grid:
        return maps
    # The centers of the grid's cells, in 0..1 over the image.
    y, x = (
        (torch.arange(cells, device=maps.device) + 0.5) / cells * (whole / own)
        for cells, whole, own in zip(grid, frame, size, strict=True)
    )
    where = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None]  # (1, h, w, 2)
    sampled = nn.functional.grid_sample(maps[None], 2 * where - 1, align_corners=False, padding_mode="border")[0]
    return (sampled * (where <= 1).all(-1)).clamp(0, 1)


class DistillationLoss(nn.Module):
    """The losses of the labels and those of the teacher, in place of the model's criterion for one forward pass.

    Args:
        criterion: the model's `FaiM2FLoss`.
        teacher, answers: the teacher, and its predictions for the batch.
        is_labelled: (B,) bool, which images of the batch have labels.
        segments: number of the teacher's segments in the whole (accumulated, distributed) batch.
        images: number of images in the whole batch.
    """

    def __init__(
        self, criterion: nn.Module, teacher: Teacher, answers: Answers, is_labelled: Tensor, segments: Tensor,
        images: Tensor,
    ) -> None:  # fmt: skip
        super().__init__()
        self.criterion = criterion
        self.teacher = teacher  # a dataclass, so the model is not registered as a submodule
        self.answers = answers
        self.is_labelled = is_labelled
        self.segments = segments
        self.images = images

    def forward(
        self,
        masks: Masks,
        class_logits: Tensor,
        mask_labels: list[Tensor],
        class_labels: list[Tensor],
        auxiliary_predictions: "list[dict[str, Any]] | None" = None,
        num_items_in_batch: "Tensor | int | None" = None,
    ) -> dict[str, Tensor]:
        """Returns the losses of `FaiM2FLoss`, and `teacher_ce`, `teacher_mask`, `teacher_dice` (also with `_i`) and
        `teacher_pixel`, weighted. The arguments are those of `FaiM2FLoss`; entries of unlabeled images are ignored."""
        auxiliary = auxiliary_predictions or []
        answers, weight = self.answers, self.teacher.weight
        taught = self.criterion(masks, class_logits, answers.masks, answers.classes, auxiliary, self.segments)
        places = self.is_labelled.nonzero()[:, 0].tolist()
        if len(places) == len(class_labels):
            losses = self.criterion(masks, class_logits, mask_labels, class_labels, auxiliary, num_items_in_batch)
        elif places:
            own = _of_images(
                [{"masks_queries_logits": masks, "class_queries_logits": class_logits}, *auxiliary], places
            )
            losses = self.criterion(
                own[0]["masks_queries_logits"], own[0]["class_queries_logits"],
                [mask_labels[place] for place in places], [class_labels[place] for place in places],
                own[1:], num_items_in_batch,
            )  # fmt: skip
        else:  # with the same names, because all processes log the same losses
            losses = {name: zero_of(masks) for name in taught}
        for name, value in taught.items():
            losses[name.replace("loss_", "teacher_", 1)] = weight * value
        is_sigmoid = bool(self.criterion.config.cls_sigmoid)  # type: ignore[union-attr]
        predicted = pixel_log_probabilities(masks, class_logits, answers.points, cls_sigmoid=is_sigmoid)
        pixels = pixel_class_loss(predicted, answers.probabilities, answers.weights, self.images)
        losses["teacher_pixel"] = PIXEL_WEIGHT * weight * pixels
        return losses


def _of_images(predictions: Sequence[dict[str, Any]], places: list[int]) -> list[dict[str, Any]]:
    """Selects some images from predictions of a batch, which are dictionaries with the names of the model's outputs."""
    features: dict[int, Tensor] = {}  # all predictions share their features; the selected ones must, too

    def chosen(masks: Masks) -> Masks:
        if not isinstance(masks, MaskProduct):
            return masks[places]
        if id(masks.features) not in features:
            features[id(masks.features)] = masks.features[places]
        return MaskProduct(masks.embedding[places], features[id(masks.features)])

    return [
        {
            "masks_queries_logits": chosen(prediction["masks_queries_logits"]),
            "class_queries_logits": prediction["class_queries_logits"][places],
        }
        for prediction in predictions
    ]


__all__ = ["Answers", "DistillationCollator", "DistillationLoss", "Teacher", "answer", "open_teacher"]

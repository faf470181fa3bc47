"""The preparation of `faim2f train`: its settings, checked, and the data and the model that they name, opened."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
from transformers import set_seed

from ..data.augmentation import RandomFlip, ResizeShortestEdge, channel_note
from ..data.collate import MixedItems, SegmentationCollator, TrainingItems, UnlabelledImages
from ..data.counts import ClassCounts, check_crops, check_same_labels, check_targets, count_classes
from ..data.dataset import without_bad_items
from ..data.formats import OpenData, open_data
from ..data.item import Item
from ..errors import DatasetError, SettingsError
from ..evaluation.evaluator import SUBTASKS, Evaluator, choose_subtasks
from ..hub.sections import OWN_LICENSE, check_license
from ..training.batch_size import AUTO, largest_batch
from ..training.distillation import Teacher, open_teacher
from ..training.final import check_best, find_metric
from ..training.progress import REPORTERS, check_reporters
from ..training.recipe import BALANCED, RECIPES, Recipe, balanced_weights, find_recipe, read_class_weights, weight_words
from ..training.run import PRECISIONS, check_precision, native_precision, process_count, shortened, split_batch
from ..training.run_folder import (
    BACKBONE,
    RUN_FILE,
    changes_of_data,
    check_labels,
    checkpoint_step,
    last_checkpoint,
    newest_checkpoint,
    recorded_settings,
)
from ..training.start import NEW_MODELS, UNPUBLISHED, Start, is_new, recipe_at, start_model
from .output import require_packages, use_weights_url
from .parser import MODEL_HELP, WEIGHTS_URL_HELP
from .settings import ModelDataSettings, given, read_size, require, setting

PACKAGES = ("matplotlib", "faster_coco_eval", "hotcoco")
# Largest batch size of an evaluation.
EVALUATION_BATCH = 8


@dataclass(frozen=True)
class TrainSettings(ModelDataSettings):
    """The settings of `faim2f train`."""

    model: str | None = setting(
        str,
        f"model to start from (required): {MODEL_HELP}; {' and '.join(UNPUBLISHED)} are new models with RANDOM weights",
    )
    weights_url: str | None = setting(str, WEIGHTS_URL_HELP)
    from_scratch: bool = setting(
        bool,
        f"start from RANDOM weights, with the architecture that --model names: {', '.join(NEW_MODELS)}",
        False,
    )
    new_labels: bool = setting(
        bool, "give a trained model the labels of the data; weights that no longer fit are reinitialized"
    )
    backbone: str | None = setting(
        str,
        "for a new model: folder, published name or Hub id of the model that provides the backbone's weights (default: "
        "random weights)",
    )
    queries: int | None = setting(
        int, "number of queries, the limit of segments in an image, for a new model or with --new-labels; trained "
        "queries are kept (default: the model's)", least=1
    )  # fmt: skip
    teacher: str | None = setting(
        str, "trained model with the same labels, to distill from in addition to the labels: folder, published name or "
        "Hub id (default: labels only)"
    )  # fmt: skip
    teacher_weight: float = setting(float, "weight of the teacher's losses, relative to the labels'", 1.0, least=0)
    unlabelled: str | None = setting(
        str, "folder of images without labels, to learn from --teacher alone; half of each batch on "
        "average (default: none)"
    )  # fmt: skip
    license: str | None = setting(
        str, "license of the trained weights, for the card: a Hub license id, such as apache-2.0 (default: none)"
    )
    out: str | None = setting(str, "the folder of the run (required)")
    recipe: str = setting(str, "training recipe", "finetune", choices=tuple(RECIPES))
    steps: int | None = setting(int, "optimizer steps (default: the recipe's)", least=1)
    batch_size: int | str | None = setting(
        int, "images per step, over all processes, or auto: the recipe's, in forward passes of as many images as "
        "fit into memory (default: the recipe's)", least=1, also=(AUTO,)
    )  # fmt: skip
    per_device_batch_size: int | str | None = setting(
        int, "images per forward pass on each device, or auto: as many as fit into memory; gradients are accumulated "
        "(default: the whole share of the device)", least=1, also=(AUTO,)
    )  # fmt: skip
    backbone_steps: int | None = setting(
        int, "steps that train only a new backbone, before the whole model (default: the recipe's)", least=0
    )
    crop: str | None = setting(str, "size of the training crops, HEIGHTxWIDTH in pixels (default: the recipe's)")
    flip: bool = setting(
        bool, "mirror images at random, if the recipe does; pass --no-flip if classes are left and right", True
    )
    learning_rate: float | None = setting(float, "peak learning rate (default: the recipe's)", least=0)
    class_weights: tuple[str, ...] | None = setting(
        tuple, "class weights in the classification loss: balanced, by the number of segments in the data; or "
        "NAME:WEIGHT,... or a file of such lines, else 1 (default: 1 for each)", words=(BALANCED,), pairs=True
    )  # fmt: skip
    precision: str = setting(
        str, "floating-point precision, or auto: bf16 if the CPU or GPU supports it natively, else fp32", "fp32",
        choices=(*PRECISIONS, AUTO),
    )  # fmt: skip
    seed: int = setting(int, "random seed", 0, least=0)
    workers: int = setting(int, "processes that load images", 0, least=0)
    train_split: str | None = setting(str, "split to train on (default: the format's usual split)")
    eval_split: str | None = setting(str, "split to evaluate on (default: the format's usual split)")
    subtasks: tuple[str, ...] | None = setting(tuple, "what to evaluate (default: all that the annotations support)",
                                               choices=SUBTASKS)  # fmt: skip
    eval_limit: int | None = setting(int, "evaluate on only this many images (default: all)", least=1)
    evaluate_every: int = setting(int, "steps between evaluations; 0 to evaluate only at the end", 0, least=0)
    best: str | None = setting(
        str, 'keep the weights of the evaluation with the best value of this metric, such as "semantic mIoU" (default: '
        "the weights of the last step)"
    )  # fmt: skip
    patience: int | None = setting(
        int, "with --best: stop after this many evaluations in a row without improvement (default: take all steps)",
        least=1,
    )  # fmt: skip
    save_every: int = setting(int, "steps between checkpoints", 500, least=1)
    log_every: int = setting(int, "steps between log lines", 50, least=1)
    samples: int = setting(int, "images to draw with ground truth and prediction at each evaluation", 4, least=0)
    tensorboard: bool = setting(bool, "also write TensorBoard logs to OUT/tensorboard", True)
    report_to: tuple[str, ...] | None = setting(
        tuple, "experiment trackers to report to, through transformers' Trainer (default: none)", choices=REPORTERS
    )


@dataclass
class TrainRun:
    """A training run with checked settings, and opened data and model; nothing is written yet."""

    settings: TrainSettings
    recipe: Recipe
    out: Path
    checkpoint: Path | None
    train: OpenData
    evaluation: OpenData
    start: Start
    evaluator: Evaluator
    at_once: int
    samples: list[Item]
    skipped: list[str]
    left_out: int  # number of evaluation images
    counts: dict[str, ClassCounts]
    notes: list[str]
    teacher: Teacher | None = None
    unlabelled: UnlabelledImages | None = None
    shared: int = 0  # number of evaluation images that are training images, too; found later

    @property
    def items(self) -> Any:
        """The items to train on, with or without labels."""
        return self.train.items if self.unlabelled is None else MixedItems(self.train.items, self.unlabelled)


def prepare(settings: TrainSettings) -> TrainRun:
    """Checks the settings, and opens data and model.

    Raises:
        ValueError, OSError, ImportError: invalid settings or unusable input; one sentence.
    """
    require(settings, "model", "out")
    license_note = check_license(settings.license) if settings.license is not None else None
    if settings.license == "other":  # the card of a new model has no name for it
        raise SettingsError(f"--license other does not say which license: leave it out, and {OWN_LICENSE}.")
    use_weights_url(settings.weights_url, str(settings.model), str(settings.backbone), str(settings.teacher))
    _check_teacher(settings)
    settings = settings.resolved()
    if settings.batch_size == AUTO:
        if settings.per_device_batch_size not in (None, AUTO):
            raise SettingsError("--batch-size auto chooses --per-device-batch-size: leave one of them out.")
        settings = replace(settings, batch_size=None, per_device_batch_size=AUTO)
    recipe = _recipe(settings)
    check_precision(settings.precision)
    split_batch(recipe, _given_images(settings))
    check_reporters(settings.report_to or ())
    if settings.best is None and settings.patience is not None:
        raise SettingsError("--patience needs a metric to improve: name one with --best.")
    if settings.best is not None and not settings.evaluate_every:
        raise SettingsError("--best compares evaluations during training: pass --evaluate-every N, too.")
    require_packages((*PACKAGES, *(["tensorboard"] if settings.tensorboard else [])), "train")
    out = Path(str(settings.out))
    if settings.class_weights is not None and settings.class_weights != (BALANCED,):
        settings = replace(settings, class_weights=weight_words(settings.class_weights))
    settings, precision_note = _resolve_precision(settings, out)
    checkpoint = last_checkpoint(out, given(settings))
    if checkpoint is not None and checkpoint_step(checkpoint) > recipe.steps:
        raise SettingsError(
            f"{out} has a run of {checkpoint_step(checkpoint)} steps, more than {recipe.steps}: choose at "
            "least as many, or another --out."
        )
    source, format_name = settings.source((settings.train_split, settings.eval_split)), str(settings.format)
    if format_name == "hub" and Path(source.root).is_file():
        raise DatasetError(
            f"{source.root} is a single file, not divided into training and validation data: put a file whose name "
            "begins with train and one whose name begins with validation into a folder, and pass that."
        )
    train_data = open_data(format_name, source, "train")
    evaluation = open_data(format_name, source, "validation")
    check_same_labels(train_data.description, evaluation.description)
    if checkpoint is not None:
        check_labels(checkpoint, train_data.description.name, train_data.description.labels)
    subtasks = choose_subtasks(train_data.description, settings.subtasks)
    set_seed(settings.seed)
    start = start_model(
        str(settings.model), train_data.description,
        new_labels=settings.new_labels, backbone=settings.backbone,
        image_size=settings.image_size or (recipe.evaluation_size if is_new_model(settings) else None),
        queries=settings.queries, from_scratch=settings.from_scratch, channels=settings.channels,
    )  # fmt: skip
    channels = start.model.config.num_channels
    train_data, evaluation = train_data.with_channels(channels), evaluation.with_channels(channels)
    if not start.new_backbone:
        if settings.backbone_steps and checkpoint is None:  # earlier versions ignored it
            name = settings.backbone or settings.model
            raise SettingsError(f"--backbone-steps is for a new backbone, and that of {name} is trained: leave it out.")
        recipe = replace(recipe, backbone_steps=0)
    unlabelled = None
    if settings.unlabelled is not None:
        unlabelled = UnlabelledImages(settings.unlabelled, settings.skip_bad, channels)
    skipped = [*train_data.description.skipped, *evaluation.description.skipped]
    skipped = list(dict.fromkeys([*skipped, *(unlabelled.skipped if unlabelled is not None else ())]))
    left_out = len(evaluation.description.skipped)
    if settings.eval_limit is not None:
        evaluation = evaluation.first(settings.eval_limit)
    if settings.skip_bad and isinstance(evaluation.items, datasets.Dataset):
        items, bad = without_bad_items(evaluation.items, settings.workers)
        evaluation = replace(evaluation, items=items)
        skipped += [one.error for one in bad]
        left_out += len(bad)
    counts = {
        "train": count_classes(train_data.items, train_data.description, skip_bad=settings.skip_bad),
        "validation": count_classes(evaluation.items, evaluation.description, skip_bad=settings.skip_bad),
    }
    _check_targets(settings, recipe, train_data, start, counts["train"])
    goes_on = checkpoint is not None or (out / BACKBONE).is_file()
    changes = changes_of_data(out, counts, given(settings)) if goes_on else {}
    if settings.best is not None and "validation" in changes:
        raise SettingsError(
            f"{changes['validation']} Evaluations before and after cannot be compared for --best: restore the data, or "
            "choose another --out."
        )
    notes = [*changes.values(), *([f"For the card: {license_note}."] if license_note else [])]
    notes += [*precision_note, *_weigh_classes(settings, start, train_data, counts["train"], checkpoint)]
    labels = train_data.description.labels
    notes += filter(None, (channel_note(recipe.augmentations, channels), _flip_note(recipe, labels)))
    notes += filter(None, [_scale_note(recipe, start) if checkpoint is None else None])
    if settings.per_device_batch_size == AUTO:
        images, note = _fitting_images(settings, recipe, train_data, start, counts["train"], checkpoint)
        settings = replace(settings, per_device_batch_size=images)
        notes.append(note)
    at_once, _ = split_batch(recipe, _given_images(settings))
    description = train_data.description
    teacher = None
    if settings.teacher is not None:
        known = TrainingItems(train_data.items, skip_bad=settings.skip_bad)
        teacher = open_teacher(settings.teacher, description, known, settings.teacher_weight)
        notes += teacher.notes
    evaluator = Evaluator(
        start.processor, description.id2label, subtasks, sorted(description.things),
        min(EVALUATION_BATCH, at_once),
    )  # fmt: skip
    if settings.best is not None:
        metric = find_metric(settings.best, evaluator)
        if checkpoint is not None:
            check_best(checkpoint, metric)
    count = min(settings.samples, len(evaluation.items))
    samples = [evaluation.items[number * len(evaluation.items) // count] for number in range(count)]
    return TrainRun(
        settings,
        recipe,
        out,
        checkpoint,
        train_data,
        evaluation,
        start,
        evaluator,
        at_once,
        samples,
        list(dict.fromkeys(skipped)),
        left_out,
        counts,
        notes,
        teacher,
        unlabelled,
    )


def _check_teacher(settings: TrainSettings) -> None:
    """Raises SettingsError for settings that cannot be combined with a teacher, or that need one."""
    if settings.teacher is None:
        if settings.unlabelled is not None:
            raise SettingsError(
                "--unlabelled names a folder of images that only a teacher can label: pass --teacher, too."
            )
        if settings.teacher_weight != 1:
            raise SettingsError("--teacher-weight requires a teacher: name one with --teacher, too.")
        return
    if is_new(settings.teacher):
        raise SettingsError(
            f"--teacher {settings.teacher} is a new model with random weights: name a trained one to learn from."
        )
    if not settings.teacher_weight:
        raise SettingsError("--teacher-weight 0 disables the teacher: leave --teacher out.")
    if AUTO in (settings.batch_size, settings.per_device_batch_size):
        raise SettingsError(
            "--batch-size auto measures the memory without a teacher: with --teacher, give --per-device-batch-size a "
            "number."
        )


def _check_targets(settings: TrainSettings, recipe: Recipe, data: OpenData, start: Start, counts: ClassCounts) -> None:
    """Raises DatasetError if there are no segments to learn from in the data, or in the recipe's crops of it."""
    items = TrainingItems(data.items, recipe.augmentations, settings.seed)
    collator = SegmentationCollator(start.processor, do_resize=not recipe.augmentations)
    check_targets(counts, data.description.name)
    check_crops(items, lambda item: len(collator([item])["class_labels"][0]), counts, data.description.name)


def _scale_note(recipe: Recipe, start: Start) -> str | None:
    """A sentence if the recipe never trains at the size at which the model is evaluated, or None."""
    edges = [edge for step in recipe.augmentations if isinstance(step, ResizeShortestEdge) for edge in step.edges]
    size = start.processor.to_dict()["size"].get("shortest_edge")
    resizes = start.processor.do_resize  # type: ignore[attr-defined]
    if not edges or size is None or not resizes or min(edges) <= size <= max(edges):
        return None
    return (
        f"The recipe resizes images to a shorter edge of {min(edges)} to {max(edges)} pixels, but the image processor "
        f"of the model to {size}: pass --image-size {size} to train at the scale of evaluations and predictions."
    )


def _flip_note(recipe: Recipe, labels: Sequence[str]) -> str | None:
    """A sentence about classes such as "left lung" and "right lung", which a mirrored image exchanges, or None."""
    if not any(isinstance(step, RandomFlip) for step in recipe.augmentations):
        return None
    by_name = {label.lower(): label for label in labels}
    pairs = [(label, by_name.get(name.replace("left", "right"))) for name, label in by_name.items() if "left" in name]
    for left, right in pairs:
        if right is not None:
            return (
                f"The recipe mirrors images at random, but keeps the classes {left!r} and {right!r} as they are: pass "
                "--no-flip if a mirrored image exchanges them."
            )
    return None


def _given_images(settings: TrainSettings) -> int | None:
    given_images = settings.per_device_batch_size
    return given_images if isinstance(given_images, int) else None


def _resolve_precision(settings: TrainSettings, out: Path) -> tuple[TrainSettings, list[str]]:
    """The settings with a precision for `--precision auto`, and a note; a resumed run keeps its precision."""
    if settings.precision != AUTO:
        return settings, []
    if newest_checkpoint(out) is not None and (out / RUN_FILE).is_file():
        before = recorded_settings(out).get("precision", "fp32")
        check_precision(before)
        return replace(settings, precision=before), [f"Precision auto: {before}, as before."]
    choice = native_precision()
    return replace(settings, precision=choice.precision), [f"Precision auto: {choice}"]


def _fitting_images(
    settings: TrainSettings, recipe: Recipe, data: OpenData, start: Start, counts: ClassCounts, checkpoint: Path | None
) -> tuple[int, str]:
    """The images in a forward pass for `--batch-size auto`, and a note; a resumed run keeps its number."""
    if checkpoint is not None:
        before = recorded_settings(Path(str(settings.out))).get("per_device_batch_size")
        if isinstance(before, int):
            return before, f"Batch size auto: {before} images in a forward pass, as before."
    items = TrainingItems(data.items, recipe.augmentations, settings.seed, settings.skip_bad)
    collator = SegmentationCollator(start.processor, do_resize=not recipe.augmentations)
    most = max(counts.targets, key=lambda index: counts.targets[index])
    candidates = [items[index] for index in dict.fromkeys([most, 0, len(items) // 2, len(items) - 1])]
    fitting = largest_batch(start.model, candidates, collator, recipe, settings.precision, process_count())
    return fitting.images, fitting.why


def _weigh_classes(
    settings: TrainSettings, start: Start, data: OpenData, counts: ClassCounts, checkpoint: Path | None
) -> list[str]:
    """Sets the class weights of the model, and returns a note with them. A resumed run keeps its weights."""
    config, words, labels = start.model.config, settings.class_weights, data.description.labels
    if words is not None and checkpoint is not None:
        config.label_weights = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["label_weights"]
    elif words == (BALANCED,):
        config.label_weights = balanced_weights(counts)
    elif words is not None:
        config.label_weights = read_class_weights(words, labels)
    if config.label_weights is None:
        return []
    named = [f"{label} {weight:.3g}" for label, weight in zip(labels, config.label_weights, strict=True)]
    return [f"Class weights in the loss{'' if words else ', of the model'}: {', '.join(named)}."]


def is_new_model(settings: TrainSettings) -> bool:
    """Whether the settings ask for a new model with random weights."""
    return is_new(str(settings.model), settings.from_scratch or settings.backbone is not None)


def _recipe(settings: TrainSettings) -> Recipe:
    recipe = find_recipe(settings.recipe)
    if settings.steps is not None:
        recipe = shortened(recipe, settings.steps)
    names = ("batch_size", "learning_rate", "backbone_steps")  # auto is the recipe's batch size
    changes: dict[str, Any] = {name: getattr(settings, name) for name in names}
    recipe = replace(recipe, **{name: value for name, value in changes.items() if value is not None})
    if not settings.flip:
        steps = tuple(step for step in recipe.augmentations if not isinstance(step, RandomFlip))
        recipe = replace(recipe, augmentations=steps)
    crop = None if settings.crop is None else read_size(settings.crop, "--crop")
    return recipe_at(recipe, settings.image_size, crop)


__all__ = ["TrainRun", "TrainSettings", "is_new_model", "prepare"]

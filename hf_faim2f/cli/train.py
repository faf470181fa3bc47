"""`faim2f train`: trains or fine-tunes a model on a dataset, following a recipe."""

import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import set_seed
from transformers.utils import logging

from ..data.check import shared_note
from ..data.collate import SegmentationCollator, TrainingItems
from ..data.counts import (
    ClassCounts,
    check_crops,
    check_targets,
    class_table,
    count_classes,
    evaluation_notes,
    number_of,
    query_note,
    training_notes,
)
from ..data.dataset import without_bad_items
from ..data.formats import OpenData, choose_subtasks, find_format, open_data
from ..data.item import Item
from ..errors import DatasetError, DivergenceError, PredictorError, SettingsError
from ..evaluation.evaluator import SUBTASKS, Evaluator
from ..hub.results import CARD
from ..hub.sections import holes
from ..runtime.drawing import supervision
from ..training.recipe import RECIPES, Recipe, find_recipe
from ..training.run import (
    BACKBONE,
    FINAL,
    PRECISIONS,
    check_precision,
    lone_process,
    process_count,
    shortened,
    split_batch,
    train,
)
from ..training.run_folder import TrainedOn, begin_run, checkpoint_step, last_checkpoint, newest_checkpoint
from ..training.start import NEW_MODELS, UNPUBLISHED, Start, is_new, recipe_at, start_model
from .output import (
    DONE,
    MISTAKES,
    interrupted,
    is_main_process,
    mistake,
    require_packages,
    say,
    say_skipped,
    use_weights_url,
)
from .parser import MODEL_HELP, WEIGHTS_URL_HELP, OneSentenceParser
from .settings import DataSettings, given, parse_settings, read_size, require, setting, settings_parser

PROGRAM = "faim2f train"
DESCRIPTION = "Trains or fine-tunes a model. Running the same command again resumes from the last checkpoint in OUT."
EXAMPLES = (
    (
        "Fine-tune a model for the labels of your own folder",
        "--model my-model --new-labels --data flowers --format folder --recipe finetune --out run",
    ),
    (
        "With settings from a file, for 2,000 steps in bfloat16",
        "--config settings.yaml --steps 2000 --precision bf16 --out run",
    ),
)
PACKAGES = ("matplotlib", "faster_coco_eval", "hotcoco")
SKIPPED_FILE = "skipped.txt"
# Largest batch size of an evaluation.
EVALUATION_BATCH = 8


@dataclass(frozen=True)
class TrainSettings(DataSettings):
    """The settings of `faim2f train`."""

    model: str | None = setting(
        str,
        f"model to start from (required): {MODEL_HELP}; {' and '.join(UNPUBLISHED)} are new models with RANDOM weights",
    )
    weights_url: str | None = setting(str, WEIGHTS_URL_HELP)
    from_scratch: bool = setting(
        bool,
        f"start a new model with RANDOM weights, of the architecture that --model names: {', '.join(NEW_MODELS)}",
        False,
    )
    new_labels: bool = setting(
        bool, "give a trained model the labels of the data; weights that no longer fit are reinitialized"
    )
    backbone: str | None = setting(
        str,
        "for a new model: folder, published name or Hub id of a model whose backbone weights to use (default: "
        "random weights)",
    )
    queries: int | None = setting(
        int, "number of queries, which limits the segments in an image, for a new model or with --new-labels; trained "
        "queries are kept (default: the model's)", least=1
    )  # fmt: skip
    license: str | None = setting(
        str, "license of the trained weights, for the card: a Hub license id, such as apache-2.0 (default: none)"
    )
    out: str | None = setting(str, "the folder of the run (required)")
    recipe: str = setting(str, "training recipe", "finetune", choices=tuple(RECIPES))
    steps: int | None = setting(int, "optimizer steps (default: the recipe's)", least=1)
    batch_size: int | None = setting(int, "images in each step, over all processes (default: the recipe's)", least=1)
    per_device_batch_size: int | None = setting(
        int, "images per forward pass on each device; gradients are accumulated (default: all)", least=1
    )
    backbone_steps: int | None = setting(
        int, "steps that train a new backbone alone, before the whole model (default: the recipe's)", least=0
    )
    crop: str | None = setting(str, "size of the training crops, HEIGHTxWIDTH in pixels (default: the recipe's)")
    learning_rate: float | None = setting(float, "peak learning rate (default: the recipe's)", least=0)
    precision: str = setting(str, "floating-point precision", "fp32", choices=PRECISIONS)
    seed: int = setting(int, "random seed", 0, least=0)
    workers: int = setting(int, "processes that load images", 0, least=0)
    train_split: str | None = setting(str, "split to train on (default: the format's usual split)")
    eval_split: str | None = setting(str, "split to evaluate on (default: the format's usual split)")
    subtasks: tuple[str, ...] | None = setting(tuple, "what to evaluate (default: all that the annotations support)",
                                               choices=SUBTASKS)  # fmt: skip
    eval_limit: int | None = setting(int, "evaluate on this many images only (default: all)", least=1)
    evaluate_every: int = setting(int, "steps between evaluations; 0 to evaluate only at the end", 0, least=0)
    save_every: int = setting(int, "steps between checkpoints", 500, least=1)
    log_every: int = setting(int, "steps between log lines", 50, least=1)
    samples: int = setting(int, "images to draw with ground truth and prediction at each evaluation", 4, least=0)
    tensorboard: bool = setting(bool, "also write TensorBoard logs to OUT/tensorboard", True)


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
    subtasks: tuple[str, ...]
    samples: list[Item]
    skipped: list[str]
    left_out: int  # number of evaluation images
    counts: dict[str, ClassCounts]


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Runs the command; returns 0, or 2 after one sentence on standard error."""
    if not is_main_process():
        logging.set_verbosity_error()
    try:
        prepared = prepare(parse_settings(TrainSettings, build_parser(program), arguments))
    except MISTAKES as error:
        return mistake(program, error)
    return run(prepared, program)


def build_parser(program: str = PROGRAM) -> OneSentenceParser:
    """Builds the command's parser."""
    return settings_parser(TrainSettings, OneSentenceParser(prog=program, description=DESCRIPTION, examples=EXAMPLES))


def prepare(settings: TrainSettings) -> TrainRun:
    """Checks the settings, and opens data and model.

    Raises:
        ValueError, OSError, ImportError: invalid settings or unusable input; one sentence.
    """
    require(settings, "model", "out")
    use_weights_url(settings.weights_url, str(settings.model), str(settings.backbone))
    settings = settings.resolved()
    recipe = _recipe(settings)
    check_precision(settings.precision)
    split_batch(recipe, settings.per_device_batch_size)
    require_packages((*PACKAGES, *(["tensorboard"] if settings.tensorboard else [])), "train")
    if settings.samples:
        supervision()
    out = Path(str(settings.out))
    checkpoint = last_checkpoint(out, given(settings))
    if checkpoint is not None and checkpoint_step(checkpoint) > recipe.steps:
        raise SettingsError(
            f"{out} has a run of {checkpoint_step(checkpoint)} steps, more than {recipe.steps}: choose as many, "
            "or another --out."
        )
    source, format_name = settings.source((settings.train_split, settings.eval_split)), str(settings.format)
    if format_name == "hub" and Path(source.root).is_file():
        raise DatasetError(
            f"{source.root} is one part, for training and evaluation alike: put a file whose name "
            "begins with train and one whose name begins with validation into a folder, and pass that."
        )
    train_data = open_data(format_name, source, "train")
    evaluation = open_data(format_name, source, "validation")
    if evaluation.description.labels != train_data.description.labels:
        raise DatasetError(f"{evaluation.description.name} has other labels than {train_data.description.name}.")
    subtasks = choose_subtasks(train_data.description, settings.subtasks)
    set_seed(settings.seed)
    start = start_model(
        str(settings.model), train_data.description,
        new_labels=settings.new_labels, backbone=settings.backbone,
        image_size=settings.image_size or (recipe.evaluation_size if _is_new(settings) else None),
        queries=settings.queries, from_scratch=settings.from_scratch,
    )  # fmt: skip
    if not start.new_backbone:
        recipe = replace(recipe, backbone_steps=0)
    skipped = list(dict.fromkeys([*train_data.description.skipped, *evaluation.description.skipped]))
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
        subtasks,
        samples,
        list(dict.fromkeys(skipped)),
        left_out,
        counts,
    )


def _check_targets(settings: TrainSettings, recipe: Recipe, data: OpenData, start: Start, counts: ClassCounts) -> None:
    """Raises DatasetError if there are no segments to learn from in the data, or in the recipe's crops of it."""
    items = TrainingItems(data.items, recipe.augmentations, settings.seed)
    collator = SegmentationCollator(start.processor, do_resize=not recipe.augmentations)
    check_targets(counts, data.description.name)
    check_crops(items, lambda item: len(collator([item])["class_labels"][0]), counts, data.description.name)


def _is_new(settings: TrainSettings) -> bool:
    return is_new(str(settings.model), settings.from_scratch or settings.backbone is not None)


def _recipe(settings: TrainSettings) -> Recipe:
    recipe = find_recipe(settings.recipe)
    if settings.steps is not None:
        recipe = shortened(recipe, settings.steps)
    names = ("batch_size", "learning_rate", "backbone_steps")
    changes: dict[str, Any] = {name: getattr(settings, name) for name in names}
    recipe = replace(recipe, **{name: value for name, value in changes.items() if value is not None})
    crop = None if settings.crop is None else read_size(settings.crop, "--crop")
    return recipe_at(recipe, settings.image_size, crop)


def run(prepared: TrainRun, program: str) -> int:
    """Trains, prints the results, and returns the exit status."""
    settings, recipe, out = prepared.settings, prepared.recipe, prepared.out
    model, processor = prepared.start.model, prepared.start.processor
    _announce(prepared)
    was_there = out.exists()
    _together()
    if is_main_process():
        try:
            begin_run(out, given(settings))
        except OSError as error:
            return mistake(program, error)
    _together()
    items = TrainingItems(prepared.train.items, recipe.augmentations, settings.seed, settings.skip_bad)
    description = prepared.train.description
    evaluator = Evaluator(
        processor, description.id2label, prepared.subtasks, sorted(description.things) or None,
        min(EVALUATION_BATCH, split_batch(recipe, settings.per_device_batch_size)[0]),
    )  # fmt: skip
    try:
        with _sigterm_interrupts():
            train(
                model, processor, items, prepared.evaluation.items, recipe, out,
                evaluator=evaluator,
                per_device_batch_size=settings.per_device_batch_size,
                evaluate_every=settings.evaluate_every,
                save_every=settings.save_every,
                log_every=settings.log_every,
                workers=settings.workers,
                seed=settings.seed,
                precision=settings.precision,
                # Augmentations resize the images; without any, the image processor does.
                collator=SegmentationCollator(processor, do_resize=not recipe.augmentations),
                tensorboard=settings.tensorboard,
                samples=prepared.samples,
                about=_about(prepared),
            )  # fmt: skip
    except (DatasetError, PredictorError, OSError) as error:
        _clear(out, was_there)
        return mistake(program, error, everywhere=True)
    except DivergenceError as error:  # in all processes
        _clear(out, was_there)
        return mistake(program, DivergenceError(f"{error} {_kept(out)}"))
    except KeyboardInterrupt:  # or SIGTERM
        return interrupted(program, f"the same command resumes from the last checkpoint in {out}, if there is one.")
    skipped = [*prepared.skipped, *_of_all_processes([bad.error for bad in items.bad_items()])]
    if is_main_process():
        if skipped:
            (out / SKIPPED_FILE).write_text("\n".join(dict.fromkeys(skipped)) + "\n", encoding="utf-8")
        say_skipped(list(dict.fromkeys(skipped)))
        say(f"The trained model is in {out / FINAL}, the curve, the log and samples beside it.")
        text = (out / FINAL / CARD).read_text(encoding="utf-8")
        for hole in holes(text, [path.name for path in (out / FINAL).iterdir()]):
            say(f"  before it can be published: {hole}")
    return DONE


def _about(prepared: TrainRun) -> TrainedOn:
    """The facts about the data and the initial weights for the card."""
    settings, learned, measured = prepared.settings, prepared.train, prepared.evaluation
    row = find_format(str(settings.format))
    title = row.title_of(settings.source((None, None)))
    name = str(settings.model)
    started = Path(name).resolve().name if Path(name).is_dir() else name
    if _is_new(settings):
        started = f"random weights, as a new {name}"
    if settings.backbone is not None:
        backbone = settings.backbone
        backbone = Path(backbone).resolve().name if Path(backbone).is_dir() else backbone
        started = f"random weights, as a new {name}, but for the backbone of {backbone}"
    return TrainedOn(
        data=title,
        dataset_type=str(settings.format) if row.title else title,
        split=learned.split,
        images=len(learned.items),
        evaluation_split=measured.split,
        evaluation_images=len(measured.items),
        left_out=prepared.left_out,
        is_whole=settings.eval_limit is None,
        started_from=started,
        license=settings.license,
    )


def _kept(out: Path) -> str:
    """A sentence about the checkpoint from which training can continue after a divergence."""
    checkpoint = newest_checkpoint(out)
    if checkpoint is None:
        return "There is no earlier checkpoint."
    return f"{checkpoint} is from before: `--model {checkpoint}` trains it with other settings and another --out."


def _announce(prepared: TrainRun) -> None:
    settings, recipe = prepared.settings, prepared.recipe
    at_once, accumulated = split_batch(recipe, settings.per_device_batch_size)
    for note in [*prepared.start.notes, *filter(None, [lone_process()])]:
        say(note)
    learned, measured = prepared.train, prepared.evaluation
    say(
        f"{number_of(len(learned.items), 'image')} of {learned.description.name} ({learned.split}) to train on, "
        f"{len(measured.items)} ({measured.split}) to evaluate {', '.join(prepared.subtasks)} on."
    )
    for line in class_table(prepared.counts):
        say(line)
    too_many = query_note(prepared.counts["train"], prepared.start.model.config.num_queries)
    shared = shared_note(learned, measured) if is_main_process() else None
    for note in [
        *training_notes(prepared.counts["train"]),
        *filter(None, [shared]),
        *(f"To evaluate on: {note}" for note in evaluation_notes(prepared.counts["validation"])),
        *([f"{too_many} Pass --queries N for a new model, or with --new-labels."] if too_many else []),
    ]:
        say(note)
    say(
        f"Recipe {recipe.name}: {number_of(recipe.steps, 'step')} of {number_of(recipe.batch_size, 'image')} "
        f"({process_count()} x {at_once}"
        + (f", accumulated {accumulated} times" if accumulated > 1 else "")
        + f"), {settings.precision}"
        + (f", after {recipe.backbone_steps} of the backbone alone." if recipe.backbone_steps else ".")
    )
    if prepared.checkpoint is not None:
        step = checkpoint_step(prepared.checkpoint)
        progress = f"it continues after step {step}" if step < recipe.steps else f"all {recipe.steps} steps are done"
        say(f"{prepared.out} has a run with these settings: {progress}.")


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Makes SIGTERM, with which schedulers end jobs, interrupt the block like Ctrl+C.

    Not in a distributed run, where torchrun sends SIGTERM to the other processes when one has failed, and they may be
    in a collective operation that cannot be interrupted. Nor in processes that this one forks.
    """
    if process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    own = os.getpid()

    def interrupt(number: int, frame: Any) -> None:
        if os.getpid() != own:
            os._exit(128 + number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _clear(out: Path, was_there: bool) -> None:
    """Removes the folder of a run that stopped before its first checkpoint."""
    kept = [out / FINAL, out / BACKBONE, *out.glob("checkpoint-*"), *out.glob("diverged-*")]
    if is_main_process() and not was_there and not any(path.exists() for path in kept):
        shutil.rmtree(out, ignore_errors=True)


def _together() -> None:
    """Waits until all processes have reached this point."""
    if process_count() > 1:
        PartialState(cpu=not torch.cuda.is_available()).wait_for_everyone()


def _of_all_processes(problems: list[str]) -> list[str]:
    return gather_object(problems) if process_count() > 1 else problems

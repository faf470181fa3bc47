"""`faim2f train`: trains or fine-tunes a model on a dataset, following a recipe."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers.utils import logging

from ..data.check import shared_images, shared_note
from ..data.collate import SegmentationCollator, TrainingItems
from ..data.counts import class_table, evaluation_notes, number_of, query_note, training_notes
from ..data.formats import dataset_type, find_format
from ..errors import DatasetError, DivergenceError, ModelError, SettingsError
from ..evaluation.report import TABLE_FILE, per_class_lines
from ..evaluation.semantic import CONFUSION_PICTURE
from ..hub.results import CARD
from ..hub.sections import holes
from ..training.final import BEST, FINAL, is_stopped_early
from ..training.run import lone_process, process_count, split_batch, train
from ..training.run_folder import BACKBONE, TrainedOn, begin_run, checkpoint_step, newest_checkpoint
from .output import DONE, MISTAKES, interrupted, is_main_process, mistake, say, say_skipped, sigterm_interrupts
from .parser import OneSentenceParser
from .settings import given, parse_settings, settings_parser
from .train_setup import TrainRun, TrainSettings, is_new_model, prepare

PROGRAM = "faim2f train"
DESCRIPTION = "Trains or fine-tunes a model. Running the same command again resumes from the last checkpoint in OUT."
EXAMPLES = (
    (
        "Fine-tune a model for the labels of your own folder",
        "--model my-model --new-labels --data flowers --format folder --recipe finetune --out run",
    ),
    (
        "Distill a large model into a small one, also on images without labels",
        "--model fai-m2f-s-ade --new-labels --data flowers --format folder --teacher large/final "
        "--unlabelled more-flowers --out small",
    ),
    (
        "With settings from a file, for 2,000 steps in bfloat16",
        "--config settings.yaml --steps 2000 --precision bf16 --out run",
    ),
)
SKIPPED_FILE = "skipped.txt"
# The error message of torch's batch norms in training for a batch with one value per channel.
ONE_VALUE = "Expected more than 1 value per channel when training"


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


def run(prepared: TrainRun, program: str) -> int:
    """Trains, prints the results, and returns the exit status."""
    settings, recipe, out = prepared.settings, prepared.recipe, prepared.out
    model, processor = prepared.start.model, prepared.start.processor
    _announce(prepared)
    was_there = out.exists()
    _together()
    if is_main_process():
        try:
            begin_run(out, given(settings), prepared.counts)
        except OSError as error:
            return mistake(program, error)
    _together()
    items = TrainingItems(prepared.items, recipe.augmentations, settings.seed, settings.skip_bad)
    try:
        with sigterm_interrupts(process_count()):
            trainer = train(
                model, processor, items, prepared.evaluation.items, recipe, out,
                evaluator=prepared.evaluator,
                per_device_batch_size=prepared.at_once,
                evaluate_every=settings.evaluate_every,
                save_every=settings.save_every,
                log_every=settings.log_every,
                workers=settings.workers,
                seed=settings.seed,
                precision=settings.precision,
                # Augmentations resize the images; without any, the image processor does.
                collator=SegmentationCollator(processor, do_resize=not recipe.augmentations),
                tensorboard=settings.tensorboard,
                report_to=settings.report_to or (),
                best=settings.best,
                patience=settings.patience,
                samples=prepared.samples,
                about=_about(prepared),
                teacher=prepared.teacher,
            )  # fmt: skip
    except (DatasetError, ModelError, SettingsError, OSError) as error:
        _clear(out, was_there)
        return mistake(program, error, everywhere=True)
    except DivergenceError as error:  # in all processes
        _clear(out, was_there)
        return mistake(program, DivergenceError(f"{error} {_kept(out)}"))
    except torch.OutOfMemoryError:
        _clear(out, was_there)
        return mistake(program, _too_large(prepared.at_once), everywhere=True)
    except ValueError as error:
        if ONE_VALUE not in str(error):
            raise
        _clear(out, was_there)
        return mistake(program, _too_small(), everywhere=True)
    except KeyboardInterrupt:  # or SIGTERM
        return interrupted(program, f"the same command resumes from the last checkpoint in {out}, if there is one.")
    skipped = [*prepared.skipped, *_of_all_processes([bad.error for bad in items.bad_items()])]
    if is_main_process():
        if skipped:
            (out / SKIPPED_FILE).write_text("\n".join(dict.fromkeys(skipped)) + "\n", encoding="utf-8")
        say_skipped(list(dict.fromkeys(skipped)))
        if trainer.results is not None:
            step, results = trainer.results
            say(f"Each class with the weights of step {step}, in percent (also in {out / TABLE_FILE}):")
            for line in per_class_lines(results):
                say(line)
            if _about(prepared).is_on_training:
                say(f"The card omits them, as {prepared.evaluation.split} may have images of the training.")
            if (out / CONFUSION_PICTURE).is_file():
                say(f"{out / CONFUSION_PICTURE} is the confusion matrix.")
        if trainer.best is not None:
            say(f"The weights are those of {trainer.best}.")
        elif settings.best is not None:
            say(f"{settings.best} was undefined in every evaluation, so the weights are those of the last step.")
        say(f"The trained model is in {out / FINAL}, the curve, the log and samples next to it.")
        text = (out / FINAL / CARD).read_text(encoding="utf-8")
        for hole in holes(text, [path.name for path in (out / FINAL).iterdir()]):
            say(f"  before it can be published: {hole}")
    return DONE


def _about(prepared: TrainRun) -> TrainedOn:
    """The facts about the data and the initial weights for the card."""
    settings, learned, measured = prepared.settings, prepared.train, prepared.evaluation
    title = find_format(str(settings.format)).title_of(settings.source((None, None)), learned.description.labels)
    name = str(settings.model)
    started = Path(name).resolve().name if Path(name).is_dir() else name
    if is_new_model(settings):
        started = f"random weights, as a new {name}"
    if settings.backbone is not None:
        backbone = settings.backbone
        backbone = Path(backbone).resolve().name if Path(backbone).is_dir() else backbone
        started = f"random weights, as a new {name}, but for the backbone of {backbone}"
    return TrainedOn(
        data=title,
        dataset_type=dataset_type(str(settings.format), title),
        split=learned.split,
        images=len(learned.items),
        evaluation_split=measured.split,
        evaluation_images=len(measured.items),
        left_out=prepared.left_out,
        is_whole=settings.eval_limit is None,
        shared=prepared.shared,
        started_from=started,
        license=settings.license,
        teacher=None if prepared.teacher is None else prepared.teacher.short_name,
        teacher_weight=settings.teacher_weight,
        unlabelled=0 if prepared.unlabelled is None else len(prepared.unlabelled),
    )


def _kept(out: Path) -> str:
    """A sentence about the checkpoint from which training can continue after a divergence."""
    checkpoint = newest_checkpoint(out)
    if checkpoint is None:
        return "There is no earlier checkpoint."
    return f"To continue from the last checkpoint, pass --model {checkpoint}, other settings and another --out."


def _announce(prepared: TrainRun) -> None:
    settings, recipe = prepared.settings, prepared.recipe
    at_once, accumulated = split_batch(recipe, prepared.at_once)
    for note in [*prepared.start.notes, *filter(None, [lone_process()])]:
        say(note)
    learned, measured = prepared.train, prepared.evaluation
    say(
        f"Training on {number_of(len(learned.items), 'image')} of {learned.description.name} ({learned.split}), "
        f"evaluating {', '.join(prepared.evaluator.subtasks)} results on {len(measured.items)} ({measured.split})."
    )
    if prepared.unlabelled is not None:
        say(f"{number_of(len(prepared.unlabelled), 'image')} of {settings.unlabelled} without labels, half of each "
            "batch on average.")  # fmt: skip
    for line in class_table(prepared.counts):
        say(line)
    too_many = query_note(prepared.counts["train"], prepared.start.model.config.num_queries)
    shared = []
    if is_main_process():
        prepared.shared = len(found := shared_images(learned, measured))
        shared.append(shared_note(found))
        if prepared.unlabelled is not None:
            unlabelled = replace(learned, items=prepared.unlabelled)
            where = f"in {settings.unlabelled}, where the teacher labels them"
            shared.append(shared_note(shared_images(unlabelled, measured), where))
    for note in [
        *training_notes(prepared.counts["train"]),
        *filter(None, shared),
        *(f"To evaluate on: {note}" for note in evaluation_notes(prepared.counts["validation"])),
        *([f"{too_many} Pass --queries N for a new model, or with --new-labels."] if too_many else []),
        *prepared.notes,
    ]:
        say(note)
    say(
        f"Recipe {recipe.name}: {number_of(recipe.steps, 'step')} of {number_of(recipe.batch_size, 'image')} "
        f"({process_count()} x {at_once}"
        + (f", accumulated {accumulated} times" if accumulated > 1 else "")
        + f"), {settings.precision} on {'CUDA' if torch.cuda.is_available() else 'the CPU'}"
        + (f", after {recipe.backbone_steps} of the backbone alone." if recipe.backbone_steps else ".")
    )
    if len(prepared.items) < recipe.batch_size:
        say(f"But each step has at most {number_of(len(prepared.items), 'image')}, as there are no more; the learning "
            f"rate is for {recipe.batch_size}.")  # fmt: skip
    if prepared.checkpoint is not None:
        step = checkpoint_step(prepared.checkpoint)
        progress = f"it continues after step {step}" if step < recipe.steps else f"all {recipe.steps} steps are done"
        if step < recipe.steps and is_stopped_early(prepared.checkpoint, settings.patience):
            progress = f"it was stopped early, after step {step}"
        say(f"{prepared.out} has a run with these settings: {progress}.")


def _too_large(images: int) -> SettingsError:
    return SettingsError(
        f"Forward passes of {images} images do not fit into the memory of the GPU: pass --batch-size auto, a smaller "
        "--per-device-batch-size or --crop, or --precision bf16."
    )


def _too_small() -> SettingsError:
    return SettingsError(
        "Batch norm needs more than one value per channel, and a batch of one image of so few pixels has only one: "
        "pass a larger --image-size or, unless it was the last batch of an epoch, at least two images in "
        "--per-device-batch-size."
    )


def _clear(out: Path, was_there: bool) -> None:
    """Removes the folder of a run that stopped before its first checkpoint."""
    kept = [out / FINAL, out / BEST, out / BACKBONE, *out.glob("checkpoint-*"), *out.glob("diverged-*")]
    if is_main_process() and not was_there and not any(path.exists() for path in kept):
        shutil.rmtree(out, ignore_errors=True)


def _together() -> None:
    """Waits until all processes have reached this point."""
    if process_count() > 1:
        PartialState(cpu=not torch.cuda.is_available()).wait_for_everyone()


def _of_all_processes(problems: list[str]) -> list[str]:
    return gather_object(problems) if process_count() > 1 else problems

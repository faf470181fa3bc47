"""A training from its data to its folder: checkpoints, the trained model, its log, its curve and its samples."""

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_file
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from ..data.augmentation import to_config
from ..data.collate import SegmentationCollator
from ..data.item import Item
from ..errors import DivergenceError
from ..evaluation.evaluator import Evaluator
from ..evaluation.report import without_nan
from ..files import write_whole
from ..hub.results import CARD
from ..hub.sections import images_of
from ..model.image_processing_faim2f import FaiM2FImageProcessor
from ..model.modeling_faim2f import FaiM2FForUniversalSegmentation
from .backbone import train_backbone
from .progress import SAMPLES, CurveCallback, EvaluateLastCallback, SamplesCallback, draw_curve, print_table
from .recipe import Recipe
from .run_folder import (
    TrainedOn,
    card_of,
    checkpoint_step,
    newest_checkpoint,
    remove_unfinished,
    set_aside,
    training_of,
    writing,
)
from .trainer import FaiM2FTrainer

logger = logging.get_logger(__name__)
FINAL = "final"
LOG = "log.json"
CURVE = "curve.png"
BACKBONE = "backbone.safetensors"
BACKBONE_LOG = "backbone.json"
TENSORBOARD = "tensorboard"
PRECISIONS = ("fp32", "bf16", "fp16")


def train(
    model: FaiM2FForUniversalSegmentation,
    processor: FaiM2FImageProcessor,
    train_items: "Sequence[Item] | Dataset[Item]",
    eval_items: "Sequence[Item] | None",
    recipe: Recipe,
    out_dir: Path,
    *,
    evaluator: Evaluator | None = None,
    per_device_batch_size: int | None = None,
    evaluate_every: int = 0,
    save_every: int = 500,
    log_every: int = 50,
    workers: int = 0,
    seed: int = 0,
    precision: str = "fp32",
    collator: SegmentationCollator | None = None,
    tensorboard: bool = False,
    samples: Sequence[Item] = (),
    about: TrainedOn | None = None,
) -> FaiM2FTrainer:
    """Trains `model` by `recipe` and writes it to `out_dir/final`; goes on where an earlier run in `out_dir` stopped.

    `final` has its card and is there before the last evaluation, which then adds its metrics. Run by `accelerate
    launch` or `torchrun` it takes part in their processes; the main one writes.

    Args:
        model: trained weights, or a new model.
        processor: how images are prepared; saved with the model.
        train_items: items, augmented or not.
        eval_items: what is evaluated every `evaluate_every` steps and at the end (0: at the end alone); None for no
            evaluation.
        recipe: see `recipe.py`.
        out_dir: the run's folder: `checkpoint-N`, `final` (a complete Hub folder), `log.json` and `curve.png`.
        evaluator: which metrics; needed where there are `eval_items`.
        per_device_batch_size: images at once; batches are accumulated up to the recipe's size. All of it by default.
        save_every, log_every: in steps.
        workers: processes that read items.
        seed: of everything that is drawn.
        precision: "fp32", "bf16" or "fp16" (mixed).
        collator: how items become a batch; by default compact maps, resized as the processor says.
        tensorboard: write `out_dir/tensorboard`, too.
        samples: items that every evaluation draws with the model's prediction, to `out_dir/samples`.
        about: what the card says of the data and the start; without it the card has a hole there, for a person.

    Returns:
        The trainer, with its log in `state.log_history`.

    Raises:
        ValueError: batch sizes that do not divide the recipe's, or a precision that is unknown or cannot be here.
        DivergenceError: a loss, a gradient or a weight is not finite; in all processes. Checkpoints stay as they were.
        OSError: something cannot be written.
    """
    at_once, accumulated = split_batch(recipe, per_device_batch_size)
    check_precision(precision)
    evaluates = evaluator is not None and eval_items is not None
    arguments = TrainingArguments(
        output_dir=str(out_dir),
        max_steps=recipe.steps,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=accumulated,
        max_grad_norm=recipe.clip,
        logging_steps=log_every,
        save_steps=save_every,
        save_total_limit=2,
        eval_strategy="steps" if evaluate_every and evaluates else "no",
        eval_steps=evaluate_every or None,
        dataloader_num_workers=workers,
        remove_unused_columns=False,
        seed=seed,
        data_seed=seed,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        report_to=[],
        disable_tqdm=not sys.stderr.isatty(),  # a line for each log in its place
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
    )
    trainer = FaiM2FTrainer(
        recipe=recipe,
        evaluator=evaluator,
        model=model,
        args=arguments,
        train_dataset=train_items,
        eval_dataset=eval_items,
        data_collator=collator or SegmentationCollator(processor, do_resize=True),
        processing_class=processor,  # so that each checkpoint is a model's folder, too
    )
    last = newest_checkpoint(out_dir)
    if trainer.is_world_process_zero():
        remove_unfinished(out_dir)
    print_table(trainer)
    final = FinalFolder(trainer, processor, recipe, out_dir, precision, about)
    trainer.add_callback(final)
    if evaluates:
        trainer.add_callback(EvaluateLastCallback())
        trainer.add_callback(CurveCallback(out_dir / CURVE))
        if samples:
            trainer.add_callback(SamplesCallback(trainer, samples, out_dir / SAMPLES))
    if tensorboard and trainer.is_world_process_zero():
        trainer.add_callback(_tensorboard(out_dir / TENSORBOARD, last))
    if recipe.sync_norm and arguments.world_size > 1 and not model.config.backbone_freeze_norm:
        _synchronize_norms(model)
    # The faster layout for convolutions, on processors and on GPUs; the values are the same.
    model.to(memory_format=torch.channels_last)
    if last is None and recipe.backbone_steps:
        _train_backbone(trainer, recipe, seed, workers, log_every, out_dir)
    if last is None or checkpoint_step(last) < recipe.steps:
        try:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        except DivergenceError as error:
            if error.bad_weights is not None and trainer.is_world_process_zero():
                set_aside(out_dir, error.bad_weights)
            raise
        if trainer.is_world_process_zero():
            final.log_into_checkpoint()
    else:  # a finished run: transformers would make one step more
        trainer.load_finished(last)
        final.write(new_weights=False)
    results: dict[str, Any] = {}
    if evaluator is not None and eval_items is not None:
        if trainer.results is not None and trainer.results[0] == trainer.state.global_step:
            results = trainer.results[1]
        else:  # a finished run that was started again
            results = evaluator(trainer.averaged_model(), eval_items, arguments.process_index, arguments.world_size)
            trainer.results = (trainer.state.global_step, results)
    if trainer.is_world_process_zero():
        draw_curve(trainer.state.log_history, out_dir / CURVE)
        final.write_card(results)
        described = {**vars(recipe), "augmentations": to_config(recipe.augmentations)}
        log = {"recipe": described, "results": without_nan(results), "log": trainer.state.log_history}
        (out_dir / LOG).write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    # Whoever returns from here finds the folder whole. A process that went on and ended would break the connections
    # of one that still works.
    trainer.accelerator.wait_for_everyone()
    return trainer


class FinalFolder(TrainerCallback):
    """`final`, the Hub folder of the averaged weights: written after the last step, before that is evaluated.

    Args:
        trainer, processor: what is saved.
        recipe, precision, about: what its card tells.
        out_dir: of the run.
    """

    def __init__(
        self,
        trainer: FaiM2FTrainer,
        processor: FaiM2FImageProcessor,
        recipe: Recipe,
        out_dir: Path,
        precision: str,
        about: TrainedOn | None,
    ) -> None:
        self.trainer = trainer
        self.processor = processor
        self.recipe = recipe
        self.out_dir = out_dir
        self.precision = precision
        self.about = about

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes it after the last step, and that step's checkpoint: an evaluation that fails costs no training."""
        if state.global_step >= state.max_steps:
            self.write(new_weights=True)
            self.trainer._save_checkpoint(self.trainer.model, trial=None)
            control.should_save = False

    def log_into_checkpoint(self) -> None:
        """Gives the last step's checkpoint the log that it was written before."""
        state = self.out_dir / f"checkpoint-{self.trainer.state.global_step}" / TRAINER_STATE_NAME
        if state.is_file():
            partial = state.with_name(f".{state.name}.partial")
            self.trainer.state.save_to_json(str(partial))
            os.replace(partial, state)

    def write(self, *, new_weights: bool) -> None:
        """Writes the model, its processor and its card, beside `final` first, so that `final` is whole or not there.

        Args:
            new_weights: of an earlier `final`'s card what was measured goes.
        """
        self.trainer.check_weights()
        if not self.trainer.is_world_process_zero():
            return
        folder = self.out_dir / FINAL
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        before = _text(folder / CARD)
        with writing(partial):
            self.trainer.averaged_model().save_pretrained(partial)
            self.processor.save_pretrained(partial)
            self._write_card(partial, before, {}, keep_results=not new_weights)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)

    def write_card(self, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Writes the card of `final` anew, with what was measured and the run's curve."""
        folder = self.out_dir / FINAL
        self._write_card(folder, _text(folder / CARD), results, keep_results=True)

    def _write_card(
        self, folder: Path, before: str, results: Mapping[str, Mapping[str, Any]], *, keep_results: bool
    ) -> None:
        curve = self.out_dir / CURVE
        if curve.is_file():
            shutil.copyfile(curve, folder / CURVE)
        history = self.trainer.state.log_history
        training = training_of(
            self.recipe, self.about, history, self.precision, self.trainer.args.seed,
            CURVE if curve.is_file() else None,
        )  # fmt: skip
        config = self.trainer.averaged_model().config
        try:
            text = card_of(
                config, self.processor, self.out_dir, training, self.about, results, before, keep_results=keep_results
            )
        except ValueError as error:  # a person has written metadata that cannot be read
            logger.warning(f"{self.out_dir / FINAL / CARD} stays as it was: {error}.")
            text = before
        write_whole(folder / CARD, text)
        if CURVE not in images_of(text):  # a person's own section on the training has none
            (folder / CURVE).unlink(missing_ok=True)


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", errors="replace") if path.is_file() else ""


def split_batch(recipe: Recipe, per_device_batch_size: int | None = None) -> tuple[int, int]:
    """How many images go through the model at once in each process, and how many such batches make a step.

    The recipe's batch is that of all processes together: of 16 images, each of 2 takes 8, at once or in parts.

    Raises:
        ValueError: the recipe's batch cannot be divided so.
    """
    processes = process_count()
    at_once = per_device_batch_size or max(1, recipe.batch_size // processes)
    if recipe.batch_size % (at_once * processes):
        raise ValueError(
            f"The recipe's batch of {recipe.batch_size} is no multiple of {at_once} images in {processes} processes: "
            "choose another number of processes, batch_size or per_device_batch_size."
        )
    return at_once, recipe.batch_size // (at_once * processes)


def _synchronize_norms(model: FaiM2FForUniversalSegmentation) -> None:
    """Makes the backbone's batch norms count over all processes; torch has that for GPUs only, which is said."""
    if torch.cuda.is_available():
        model.backbone = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model.backbone)
    elif int(os.environ.get("RANK", "0")) == 0:
        logger.warning("Batch norms count in each process by itself: torch synchronizes them on GPUs only.")


def check_precision(precision: str) -> None:
    """ValueError for a precision that is unknown, or that only a GPU has."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be fp32, bf16 or fp16, got {precision!r}.")
    if precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("precision fp16 needs a GPU, and there is none here: use bf16.")


def _tensorboard(folder: Path, last: Path | None) -> TrainerCallback:
    """transformers' callback on a folder of ours; of a resumed run, what came after the checkpoint is hidden."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(str(folder), purge_step=checkpoint_step(last) + 1 if last else None))


def process_count() -> int:
    """How many processes `accelerate launch` or `torchrun` has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def lone_process() -> str | None:
    """A sentence where `accelerate launch` was asked for several processes and has started one; otherwise None.

    It does so without GPUs, and says nothing. What shows it is the address where the others would meet.
    """
    if "WORLD_SIZE" in os.environ or "MASTER_ADDR" not in os.environ or "ACCELERATE_USE_CPU" not in os.environ:
        return None
    return (
        "Accelerate has started one process, not several: without GPUs it starts several with --multi_gpu in place of "
        "--cpu, whatever the name says."
    )


def _train_backbone(
    trainer: FaiM2FTrainer, recipe: Recipe, seed: int, workers: int, log_every: int, out_dir: Path
) -> None:
    """The recipe's backbone steps. Every process takes them on the same items, and then has what the main one found."""
    model: Any = trainer.model
    kept, main = out_dir / BACKBONE, trainer.is_world_process_zero()
    if kept.is_file():  # a run that was stopped after these steps and before its first checkpoint
        load_model(model.backbone, kept)
    else:
        items: Any = trainer.train_dataset
        log = train_backbone(
            model,
            items,
            trainer.data_collator,
            recipe,
            seed=seed,
            workers=workers,
            log_every=log_every,
            progress=main,
        )
        if main:
            out_dir.mkdir(parents=True, exist_ok=True)
            (out_dir / BACKBONE_LOG).write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
            state = {name: tensor.contiguous() for name, tensor in model.backbone.state_dict().items()}
            with writing(Path(f"{kept}.part")):
                save_file(state, f"{kept}.part")
            os.replace(f"{kept}.part", kept)
    if trainer.args.world_size > 1:
        for tensor in model.backbone.state_dict().values():
            torch.distributed.broadcast(tensor, 0)


def shortened(recipe: Recipe, steps: int) -> Recipe:
    """The recipe at another length; warm-up and the backbone's own steps are shortened with it, never lengthened."""
    share = min(1.0, steps / recipe.steps)
    return replace(
        recipe,
        steps=steps,
        warmup_steps=min(recipe.warmup_steps, max(1, steps // 10)),
        backbone_steps=round(recipe.backbone_steps * share),
    )

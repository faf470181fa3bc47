"""A training run: from items to a folder with checkpoints, the trained model, log, plot and samples."""

import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save
from torch.utils.data import Dataset
from transformers import TrainingArguments
from transformers.utils import logging

from ..data.augmentation import to_config
from ..data.collate import SegmentationCollator, TrainingItems, labelled_part
from ..data.item import Item
from ..errors import DivergenceError, ModelError, SettingsError
from ..evaluation.evaluator import Evaluator
from ..evaluation.report import TABLE_FILE, per_class_table, scalars, without_nan
from ..evaluation.semantic import write_confusion
from ..files import read_object, write_whole
from ..model.image_processing_faim2f import FaiM2FImageProcessor
from ..model.modeling_faim2f import FaiM2FForUniversalSegmentation
from ..runtime.precision import Choice, multiplies_bfloat16, warn_if_emulated
from .backbone import train_backbone
from .batch_size import AUTO
from .distillation import DistillationCollator, Teacher
from .final import CURVE, FINAL, BestCallback, FinalFolder, find_metric, is_evaluated, is_stopped_early
from .progress import (
    SAMPLES,
    CurveCallback,
    EvaluateLastCallback,
    SamplesCallback,
    check_reporters,
    draw_curve,
    print_metrics,
    print_table,
    reporter_settings,
    tensorboard_callback,
)
from .recipe import Recipe
from .run_folder import (
    BACKBONE,
    TrainedOn,
    check_labels,
    checkpoint_step,
    newest_checkpoint,
    reading,
    remove_unfinished,
    set_aside,
    writing,
)
from .trainer import FaiM2FTrainer

logger = logging.get_logger(__name__)
LOG = "log.json"
RECIPE_FILE = "recipe.json"
# Fields of the recipe that may change when a run is resumed: names, and the number of steps, which changes the warm-up.
FREE_IN_RECIPE = frozenset(["name", "source", "steps", "warmup_steps"])
BACKBONE_LOG = "backbone.json"
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
    report_to: Sequence[str] = (),
    best: str | None = None,
    patience: int | None = None,
    samples: Sequence[Item] = (),
    about: TrainedOn | None = None,
    teacher: Teacher | None = None,
) -> FaiM2FTrainer:
    """Trains `model` by `recipe` and writes it to `out_dir/final`. Resumes an earlier run in `out_dir`.

    `final` is written with its card before the last evaluation, whose metrics are added afterwards. With `best`, it is
    written again if an earlier evaluation was better. Under `accelerate launch` or `torchrun`, all processes train
    together, and the main process writes.

    Args:
        model: a trained or new model.
        processor: its image processor, which is saved with it.
        train_items: training items, augmented or not.
        eval_items: the items to evaluate; None for no evaluation.
        recipe: see `recipe.py`. A resumed run must have the recipe that it began with, except for its steps.
        out_dir: the run's folder: `checkpoint-N`, `final` (a complete Hub folder), `recipe.json`, `log.json` and
            `curve.png`; with an evaluator also `per_class.md` and, for the semantic subtask, `confusion.png` and
            `confusion.csv`.
        evaluator: computes the metrics on `eval_items`; pass both or neither.
        per_device_batch_size: images per forward pass; by default the recipe's batch size. Gradients of smaller batches
            are accumulated.
        evaluate_every: steps between evaluations; 0 to evaluate only at the end.
        save_every, log_every: steps between checkpoints and between log entries.
        workers: number of processes that read items.
        seed: for all random numbers.
        precision: "fp32", or "bf16" or "fp16" (mixed precision), or "auto", see `native_precision`.
        collator: collates items into batches; by default compact maps, resized by the image processor's settings unless
            `train_items` are `TrainingItems` with augmentations, which resize them.
        tensorboard: also write `out_dir/tensorboard`.
        report_to: experiment trackers of transformers' Trainer, of `progress.REPORTERS`.
        best: a metric of the evaluator, such as "semantic mIoU": `final` gets the weights of the evaluation in which it
            is largest; None for those of the last step.
        patience: with `best`, stop after this many evaluations in a row without improvement; None to take all steps.
        samples: items to draw with the model's predictions at every evaluation, in `out_dir/samples`.
        about: facts for the card about the data and the initial weights; without it the card has placeholders.
        teacher: from `distillation.open_teacher`; a model to distill from, in addition to labels. `train_items` may be
            of `MixedItems`, some without labels.

    Returns:
        The trainer, with its log in `state.log_history`.

    Raises:
        ValueError: the batch size does not divide the recipe's, the precision is unknown or unavailable, there is no
            such metric, `best` is given without evaluations, one of evaluator and items is given without the other, or
            the run in `out_dir` has other labels or another recipe.
        ModelError: the backbone that was trained in `out_dir` is damaged, or does not fit the model; or the last
            checkpoint is damaged.
        ImportError: the library of an experiment tracker is missing.
        DivergenceError: a loss, a gradient or a weight is not finite; raised in all processes. No checkpoint is
            overwritten.
        OSError: something cannot be written.
    """
    at_once, accumulated = split_batch(recipe, per_device_batch_size)
    check_precision(precision)
    precision = native_precision().precision if precision == AUTO else precision
    check_reporters(report_to)
    evaluates = evaluator is not None and eval_items is not None
    if best is None and patience is not None:
        raise ValueError("patience needs a metric to improve: choose one with best.")
    if best is not None and (evaluator is None or eval_items is None or not evaluate_every):
        raise ValueError("best compares evaluations during training: pass an evaluator, items and evaluate_every.")
    if not evaluates and (evaluate_every or samples or evaluator is not None or eval_items is not None):
        raise ValueError(
            "An evaluation needs both evaluator and eval_items: pass both, or omit them together with evaluate_every "
            "and samples."
        )
    augmented = isinstance(train_items, TrainingItems) and bool(train_items.augmentations)
    collator = collator or SegmentationCollator(processor, do_resize=not augmented)
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
        **reporter_settings(report_to, out_dir),
        disable_tqdm=not sys.stderr.isatty(),  # without a terminal, the printed rows are enough
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
        data_collator=collator if teacher is None else DistillationCollator(collator, teacher.processor),
        teacher=teacher,
        processing_class=processor,  # saved with each checkpoint, so that it is a complete model folder
    )
    last = newest_checkpoint(out_dir)
    if last is not None:
        check_labels(last, "the model", [label for _, label in sorted(model.config.id2label.items())])
    _keep_recipe(out_dir, recipe, last, write=trainer.is_world_process_zero())
    if trainer.is_world_process_zero():
        remove_unfinished(out_dir)
    print_table(trainer)
    chosen = None
    if best is not None and evaluator is not None:
        chosen = BestCallback(trainer, processor, out_dir, find_metric(best, evaluator), patience)
        chosen.begin(resumed=last is not None)
        trainer.add_callback(chosen)
    final = FinalFolder(trainer, processor, recipe, out_dir, precision, about)
    trainer.add_callback(final)
    if evaluates:
        trainer.add_callback(EvaluateLastCallback())
        trainer.add_callback(CurveCallback(out_dir / CURVE))
        if samples:
            trainer.add_callback(SamplesCallback(trainer, samples, out_dir / SAMPLES))
    if (tensorboard or "tensorboard" in report_to) and trainer.is_world_process_zero():
        trainer.add_callback(tensorboard_callback(out_dir, last))
    if recipe.sync_norm and arguments.world_size > 1 and not model.config.backbone_freeze_norm:
        _synchronize_norms(model)
    # The faster memory layout for convolutions, on CPUs and GPUs.
    model.to(memory_format=torch.channels_last)
    if last is None and recipe.backbone_steps:
        _train_backbone(trainer, collator, recipe, out_dir)
    if last is None or not (checkpoint_step(last) >= recipe.steps or is_stopped_early(last, patience)):
        try:
            with reading(last):
                trainer.train(resume_from_checkpoint=None if last is None else str(last))
        except DivergenceError as error:
            if error.bad_weights is not None and trainer.is_world_process_zero():
                set_aside(out_dir, error.bad_weights)
            raise
        if trainer.is_world_process_zero():
            final.log_into_checkpoint()
        trained = True
    else:  # transformers would train one more step
        with reading(last):
            trainer.load_finished(last)
        trained = False
        if evaluates and not is_evaluated(trainer.state.log_history, trainer.state.global_step):
            trainer.evaluate()  # the run was interrupted during its last evaluation
            if trainer.is_world_process_zero():
                final.log_into_checkpoint()
    step = trainer.state.global_step
    if chosen is not None and chosen.restore() and chosen.best is not None:
        trainer.best = chosen.best
        step = chosen.best.step
    if not trained or step < recipe.steps:  # otherwise it has been written with these weights
        final.write(new_weights=trained)
    results: dict[str, Any] = {}
    if evaluator is not None and eval_items is not None:
        if trainer.results is not None and trainer.results[0] == step:
            results = trainer.results[1]
        else:  # the evaluation was in an earlier process
            results = evaluator(trainer.averaged_model(), eval_items, arguments.process_index, arguments.world_size)
            trainer.results = (step, results)
            if trainer.is_world_process_zero():
                print_metrics(step, scalars(results))
    if trainer.is_world_process_zero():
        draw_curve(trainer.state.log_history, out_dir / CURVE)
        final.write_card(results)
        if results and evaluator is not None:
            write_whole(out_dir / TABLE_FILE, per_class_table(results, f"{FINAL}, of step {step}"))
            if evaluator.confusion is not None:
                write_confusion(evaluator.confusion, list(evaluator.id2label.values()), out_dir)
        log = {"recipe": _described(recipe), "results": without_nan(results), "log": trainer.state.log_history}
        if trainer.best is not None:
            log["best"] = vars(trainer.best)
        write_whole(out_dir / LOG, json.dumps(log, indent=1) + "\n")
    # Wait until the folder is complete: a process that exits earlier would break the others' connections.
    trainer.accelerator.wait_for_everyone()
    return trainer


def split_batch(recipe: Recipe, per_device_batch_size: int | None = None) -> tuple[int, int]:
    """The images per forward pass in each process, and the number of forward passes per step.

    The recipe's batch is divided among all processes: with 2 processes and a batch of 16 images, each takes 8, in one
    or several forward passes.

    Raises:
        ValueError: the recipe's batch size is not a multiple of the images in one forward pass of all processes.
    """
    processes = process_count()
    at_once = per_device_batch_size or max(1, recipe.batch_size // processes)
    if recipe.batch_size % (at_once * processes):
        raise ValueError(
            f"The recipe's batch of {recipe.batch_size} is not a multiple of {at_once} images in {processes} "
            "processes: choose another number of processes, batch_size or per_device_batch_size."
        )
    return at_once, recipe.batch_size // (at_once * processes)


def _described(recipe: Recipe) -> dict[str, Any]:
    return {**vars(recipe), "augmentations": to_config(recipe.augmentations)}


def _keep_recipe(out_dir: Path, recipe: Recipe, last: Path | None, write: bool) -> None:
    """Records the recipe in a run's folder; raises SettingsError if a run that is resumed there has another one.

    The optimizer's state, in the checkpoint `last`, contains the learning rate and the weight decay.
    """
    path, before = out_dir / RECIPE_FILE, {}
    now = json.loads(json.dumps(_described(recipe)))  # with lists instead of tuples
    if path.is_file() and (last is not None or (out_dir / BACKBONE).is_file()):
        try:
            before = read_object(path)
        except (OSError, ValueError) as error:
            raise SettingsError(f"{path} cannot be read: choose another out, or remove the file.") from error
    free = FREE_IN_RECIPE | frozenset([] if last is None else ["backbone_steps"])  # which are over
    for name in sorted({*before} & {*now} - free):
        if before[name] != now[name]:
            raise SettingsError(
                f"{out_dir} has a run whose recipe has {name} {before[name]}, not {now[name]}: choose another out, or "
                "resume with the same recipe."
            )
    if write:
        out_dir.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(now, indent=1) + "\n")


def _synchronize_norms(model: FaiM2FForUniversalSegmentation) -> None:
    """Synchronizes the backbone's batch norms over all processes. torch supports this on GPUs only; else it warns."""
    if torch.cuda.is_available():
        model.backbone = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model.backbone)
    elif int(os.environ.get("RANK", "0")) == 0:
        logger.warning("Each process has batch norm statistics of its own: torch synchronizes them on GPUs only.")


def check_precision(precision: str) -> None:
    """Raises ValueError for an unknown precision, or for fp16 without a GPU; warns if a CPU only emulates bf16."""
    if precision not in (*PRECISIONS, AUTO):
        raise ValueError(f"precision must be fp32, bf16, fp16 or auto, got {precision!r}.")
    if precision == "fp16" and not torch.cuda.is_available():
        raise ValueError(f"precision fp16 needs a GPU, and there is none here: use {native_precision().precision}.")
    warn_if_emulated(precision, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def native_precision() -> Choice:
    """What precision "auto" means for training on this machine: bf16 if its device supports bfloat16, else fp32.

    Unlike for inference, no outputs are compared: weights, gradient sums and the optimizer stay float32.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if multiplies_bfloat16(device):
        return Choice("bf16", f"this {device.type} multiplies bfloat16")
    return Choice("fp32", f"this {device.type} has no instructions that multiply bfloat16")


def process_count() -> int:
    """The number of processes that `accelerate launch` or `torchrun` started."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def lone_process() -> str | None:
    """A warning if `accelerate launch` was asked for several processes but started only one; else None.

    On machines without GPUs it does so silently, but still sets MASTER_ADDR, the address for the other processes.
    """
    if "WORLD_SIZE" in os.environ or "MASTER_ADDR" not in os.environ or "ACCELERATE_USE_CPU" not in os.environ:
        return None
    return (
        "Accelerate started one process instead of several. On a machine without GPUs, it starts several with "
        "--multi_gpu, despite the name, and not with --cpu."
    )


def _train_backbone(trainer: FaiM2FTrainer, collator: SegmentationCollator, recipe: Recipe, out_dir: Path) -> None:
    """Trains the backbone alone, with labels only. Every process uses the same items, all of each batch, and then gets
    the weights of the main process. With fp16, which needs a gradient scaler, it trains in float32."""
    model: Any = trainer.model
    arguments = trainer.args
    kept, main = out_dir / BACKBONE, trainer.is_world_process_zero()
    if kept.is_file():  # the run stopped between these steps and its first checkpoint
        try:
            load_model(model.backbone, kept)
        except (RuntimeError, SafetensorError) as error:
            raise ModelError(
                f"{kept} is damaged, or the backbone of another model than this one, of type "
                f"{model.config.backbone_config.model_type!r}: choose another out, or remove the file."
            ) from error
    else:
        log = train_backbone(
            model,
            labelled_part(trainer.train_dataset),
            collator,
            recipe,
            at_once=arguments.train_batch_size,
            autocast=trainer.accelerator.autocast if arguments.bf16 else nullcontext,
            seed=arguments.seed,
            workers=arguments.dataloader_num_workers,
            log_every=int(arguments.logging_steps),
            progress=main,
        )
        if main:
            out_dir.mkdir(parents=True, exist_ok=True)
            write_whole(out_dir / BACKBONE_LOG, json.dumps(log, indent=1) + "\n")
            state = {name: tensor.contiguous() for name, tensor in model.backbone.state_dict().items()}
            with writing(kept):
                write_whole(kept, save(state))
    if arguments.world_size > 1:
        for tensor in model.backbone.state_dict().values():
            torch.distributed.broadcast(tensor, 0)


def shortened(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with another number of steps. Fewer steps also mean fewer warm-up and backbone steps."""
    share = min(1.0, steps / recipe.steps)
    return replace(
        recipe,
        steps=steps,
        warmup_steps=min(recipe.warmup_steps, max(1, steps // 10)),
        backbone_steps=round(recipe.backbone_steps * share),
    )

"""A training from its data to its folder: checkpoints, the trained model, its log and its curve."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..data.augmentation import to_config
from ..data.collate import SegmentationCollator
from ..data.item import Item
from ..evaluation.run import Evaluator
from ..model.image_processing_faim2f import FaiM2FImageProcessor
from ..model.modeling_faim2f import FaiM2FForUniversalSegmentation
from .recipe import Recipe
from .trainer import FaiM2FTrainer

FINAL = "final"
LOG = "log.json"
CURVE = "curve.png"


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
) -> FaiM2FTrainer:
    """Trains `model` by `recipe` and writes it to `out_dir/final`; goes on where an earlier run in `out_dir` stopped.

    Args:
        model: trained weights, or a new model.
        processor: how images are prepared; saved with the model.
        train_items: items, augmented or not.
        eval_items: what is evaluated every `evaluate_every` steps (0: at the end alone); None for no evaluation.
        recipe: see `recipe.py`.
        out_dir: the run's folder: `checkpoint-N`, `final` (a complete Hub folder), `log.json` and `curve.png`.
        evaluator: which metrics; needed where there are `eval_items`.
        per_device_batch_size: images at once; batches are accumulated up to the recipe's size. All of it by default.
        save_every, log_every: in steps.
        workers: processes that read items.
        seed: of everything that is drawn.
        precision: "fp32", "bf16" or "fp16" (mixed).
        collator: how items become a batch; by default compact maps, resized as the processor says.

    Returns:
        The trainer, with its log in `state.log_history`.

    Raises:
        ValueError: batch sizes that do not divide the recipe's, or an unknown precision.
    """
    if precision not in ("fp32", "bf16", "fp16"):
        raise ValueError(f"precision must be fp32, bf16 or fp16, got {precision!r}.")
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else _processes()
    at_once = per_device_batch_size or max(1, recipe.batch_size // processes)
    if recipe.batch_size % (at_once * processes):
        raise ValueError(
            f"The recipe's batch of {recipe.batch_size} is no multiple of {at_once} images in {processes} processes."
        )
    arguments = TrainingArguments(
        output_dir=str(out_dir),
        max_steps=recipe.steps,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=recipe.batch_size // (at_once * processes),
        max_grad_norm=recipe.clip,
        logging_steps=log_every,
        save_steps=save_every,
        save_total_limit=2,
        eval_strategy="steps" if evaluate_every and eval_items is not None else "no",
        eval_steps=evaluate_every or None,
        dataloader_num_workers=workers,
        remove_unused_columns=False,
        seed=seed,
        data_seed=seed,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        report_to=[],
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
    )
    last = get_last_checkpoint(str(out_dir)) if out_dir.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    results = {}
    if evaluator is not None and eval_items is not None:
        results = evaluator(trainer.averaged_model(), eval_items, arguments.process_index, processes)
    if trainer.is_world_process_zero():
        final = out_dir / FINAL
        trainer.averaged_model().save_pretrained(final)
        processor.save_pretrained(final)
        described = {**vars(recipe), "augmentations": to_config(recipe.augmentations)}
        log = {"recipe": described, "results": _without_nan(results), "log": trainer.state.log_history}
        (out_dir / LOG).write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
        draw_curve(trainer.state.log_history, out_dir / CURVE)
    return trainer


def _processes() -> int:
    """How many processes `accelerate launch` or `torchrun` has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: what a metric leaves undefined is null."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def shortened(recipe: Recipe, steps: int) -> Recipe:
    """The recipe at another length, its warm-up shortened with it."""
    return replace(recipe, steps=steps, warmup_steps=min(recipe.warmup_steps, max(1, steps // 10)))


def draw_curve(history: list[dict[str, Any]], path: Path) -> None:
    """Losses against steps, and below them the metrics where there were evaluations, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    losses = [entry for entry in history if "loss" in entry]
    metrics = [entry for entry in history if any(key.startswith("eval_") for key in entry)]
    figure, axes = pyplot.subplots(2 if metrics else 1, 1, figsize=(8, 8 if metrics else 4), squeeze=False)
    for name in ("loss_ce", "loss_mask", "loss_dice"):
        points = [(entry["step"], entry[name]) for entry in losses if name in entry]
        if points:
            axes[0, 0].plot(*zip(*points, strict=True), label=name)
    axes[0, 0].set(xlabel="step", ylabel="loss of the last layer", yscale="log")
    axes[0, 0].legend()
    for name in ("eval_semantic_mIoU", "eval_instance_AP", "eval_panoptic_PQ"):
        points = [(entry["step"], entry[name]) for entry in metrics if name in entry]
        if points:
            axes[1, 0].plot(*zip(*points, strict=True), marker="o", label=name.removeprefix("eval_"))
    if metrics:
        axes[1, 0].set(xlabel="step", ylabel="per cent", ylim=(0, 100))
        axes[1, 0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)

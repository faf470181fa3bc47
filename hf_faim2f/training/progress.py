"""What a run draws as it goes: its curve, and what the model makes of a few images that stay the same."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..data.item import Item
from ..evaluation.evaluator import SUBTASKS, Evaluator
from ..evaluation.report import metric_lines
from ..runtime.drawing import Segments, below, beside, draw_segments, scaled, segments_of_item, segments_of_map
from ..runtime.drawing import segments_of_panoptic as of_panoptic

SAMPLES = "samples"
# Longer side of a sample, in pixels.
PANEL = 320
CAPTIONS = ("image", "truth", "prediction")


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
    if losses:
        axes[0, 0].legend()
    named = False
    for name in ("eval_semantic_mIoU", "eval_instance_AP", "eval_panoptic_PQ"):
        points = [(entry["step"], entry[name]) for entry in metrics if name in entry]
        if points:
            axes[1, 0].plot(*zip(*points, strict=True), marker="o", label=name.removeprefix("eval_"))
            named = True
    if metrics:
        axes[1, 0].set(xlabel="step", ylabel="per cent", ylim=(0, 100))
        if named:
            axes[1, 0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


@torch.no_grad()
def predict_segments(model: nn.Module, evaluator: Evaluator, item: Item) -> Segments:
    """What the model finds in an item's image, by the richest of the evaluator's subtasks, at the image's size."""
    processor: Any = evaluator.processor
    parameter = next(model.parameters())
    inputs = processor([item["image"]], input_data_format="channels_first", return_tensors="pt")
    outputs = model(pixel_values=inputs["pixel_values"].to(parameter.device, parameter.dtype))
    sizes = [tuple(item["image"].shape[-2:])]
    if "panoptic" in evaluator.subtasks:
        return of_panoptic(processor.post_process_panoptic_segmentation(outputs, target_sizes=sizes)[0])
    if "instance" in evaluator.subtasks:
        return of_panoptic(processor.post_process_instance_segmentation(outputs, target_sizes=sizes)[0])
    return segments_of_map(processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)[0])


def draw_sample(item: Item, predicted: Segments, id2label: dict[int, str]) -> Image.Image:
    """Image, truth and prediction in a row."""
    image = Image.fromarray(item["image"].permute(1, 2, 0).numpy())
    panels = [scaled(image, segments_of_item(item), PANEL)[0]]
    panels += [
        draw_segments(*scaled(image, segments, PANEL), id2label) for segments in (segments_of_item(item), predicted)
    ]
    return beside(panels, CAPTIONS)


class CurveCallback(TrainerCallback):
    """Writes the curve anew at every evaluation."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            draw_curve(state.log_history, self.path)


class SamplesCallback(TrainerCallback):
    """Draws a few items with their truth and the averaged model's prediction at every evaluation.

    Args:
        trainer: whose averaged model predicts.
        items: which are drawn.
        folder: of the pictures `step-N.png`.
    """

    def __init__(self, trainer: Any, items: Sequence[Item], folder: Path) -> None:
        self.trainer = trainer
        self.items = items
        self.folder = folder

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        model, evaluator = self.trainer.averaged_model(), self.trainer.evaluator
        was_training = model.training
        model.eval()
        try:
            rows = [
                draw_sample(item, predict_segments(model, evaluator, item), evaluator.id2label) for item in self.items
            ]
        finally:
            model.train(was_training)
        self.folder.mkdir(parents=True, exist_ok=True)
        below(rows).save(self.folder / f"step-{state.global_step}.png")


class EvaluateLastCallback(TrainerCallback):
    """The last step is evaluated and logged, whatever the intervals are."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True
            control.should_log = True
        return control


# What a run prints as it goes: a table of losses, and metrics in per cent, in place of transformers' dictionaries.

# Heading and key of each column; the three kinds are those of the last layer, and `loss` is the sum over all layers.
COLUMNS = {"loss": "loss", "class": "loss_ce", "mask": "loss_mask", "dice": "loss_dice", "gradient": "grad_norm"}


class TableCallback(TrainerCallback):
    """A row of losses for each log, and a line of metrics for each subtask of an evaluation."""

    def __init__(self) -> None:
        self.has_heading = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: "dict[str, Any] | None" = None,
        **kwargs: Any,
    ) -> None:
        """Prints what was logged, beside a progress bar where there is one."""
        if not state.is_world_process_zero or not logs:
            return
        measured = {
            subtask: {
                key.removeprefix(f"eval_{subtask}_"): value
                for key, value in logs.items()
                if key.startswith(f"eval_{subtask}_")
            }
            for subtask in SUBTASKS
        }
        for line in metric_lines({subtask: values for subtask, values in measured.items() if values}):
            tqdm.write(f"{state.global_step:>8}  {line}")
        if "learning_rate" not in logs:
            return
        if not self.has_heading:
            tqdm.write(f"{'step':>8}" + "".join(f"{name:>10}" for name in COLUMNS) + f"{'rate':>10}")
            self.has_heading = True
        cells = [_cell(logs.get(key)) for key in COLUMNS.values()]
        skipped = logs.get("skipped_steps")
        note = f"  {skipped} skipped by the gradient scaler" if skipped else ""
        tqdm.write(f"{state.global_step:>8}" + "".join(cells) + f"{logs['learning_rate']:>10.1e}{note}")


class BarCallback(ProgressCallback):
    """transformers' progress bar without its dictionaries."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: `TableCallback` prints."""


def print_table(trainer: Any) -> None:
    """Makes a trainer print the table in place of what transformers prints."""
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(BarCallback)
    trainer.add_callback(TableCallback())


def _cell(value: Any) -> str:
    """Ten characters; a dash for what was not logged."""
    return f"{'–':>10}" if value is None else f"{value:>10.4f}" if abs(value) < 1000 else f"{value:>10.3g}"


__all__ = ["BarCallback", "TableCallback", "print_table"]

"""Progress of a training run: printed losses and metrics, a plot, experiment trackers, and predictions for a few fixed
images."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
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
from ..errors import SettingsError
from ..evaluation.evaluator import SUBTASKS, Evaluator
from ..evaluation.report import metric_lines
from ..model.channels_faim2f import picture_of
from ..runtime.drawing import Segments, below, beside, draw_segments, scaled, segments_of_item, segments_of_map
from ..runtime.drawing import segments_of_panoptic as of_panoptic
from .run_folder import checkpoint_step

SAMPLES = "samples"
TENSORBOARD = "tensorboard"
# Experiment trackers, by the names of transformers' Trainer and of their packages.
REPORTERS = ("tensorboard", "trackio", "wandb", "mlflow")
PANEL = 320  # the longer side of a sample, in pixels
CAPTIONS = ("image", "truth", "prediction")
# Heading and key of each printed column. `loss` is the sum over all layers; the others are of the last layer.
COLUMNS = {"loss": "loss", "class": "loss_ce", "mask": "loss_mask", "dice": "loss_dice", "gradient": "grad_norm"}
# Additional columns with a teacher: its losses of the same kinds, and that of the pixel classes.
TEACHER_COLUMNS = {
    "t. class": "teacher_ce",
    "t. mask": "teacher_mask",
    "t. dice": "teacher_dice",
    "t. pixel": "teacher_pixel",
}


def draw_curve(history: list[dict[str, Any]], path: Path) -> None:
    """Plots the losses, and below them the evaluation metrics, over the steps; writes a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    losses = [entry for entry in history if "loss" in entry]
    metrics = [entry for entry in history if any(key.startswith("eval_") for key in entry)]
    figure, axes = pyplot.subplots(2 if metrics else 1, 1, figsize=(8, 8 if metrics else 4), squeeze=False)
    for name in ("loss_ce", "loss_mask", "loss_dice", *TEACHER_COLUMNS.values()):
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
        axes[1, 0].set(xlabel="step", ylabel="percent", ylim=(0, 100))
        if named:
            axes[1, 0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


@torch.no_grad()
def predict_segments(model: nn.Module, evaluator: Evaluator, item: Item) -> Segments:
    """Predicts an image at its own size, by the first of panoptic, instance and semantic that the evaluator measures.

    Args:
        model: in evaluation mode.
        evaluator: its image processor prepares the image.
        item: the image.
    """
    processor: Any = evaluator.processor
    parameter = next(model.parameters())
    inputs = processor([item["image"]], input_data_format="channels_first", return_tensors="pt")
    outputs = model(pixel_values=inputs["pixel_values"].to(parameter.device, parameter.dtype))
    sizes = [tuple(item["image"].shape[-2:])]
    if "panoptic" in evaluator.subtasks:
        segments = of_panoptic(processor.post_process_panoptic_segmentation(outputs, target_sizes=sizes)[0])
    elif "instance" in evaluator.subtasks:
        segments = of_panoptic(processor.post_process_instance_segmentation(outputs, target_sizes=sizes)[0])
    else:
        segments = segments_of_map(processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)[0])
    things = evaluator.thing_ids
    if things is None:
        things = () if list(evaluator.subtasks) == ["semantic"] else evaluator.id2label
    return replace(segments, stuff_ids=frozenset(evaluator.id2label).difference(things))


def draw_sample(item: Item, predicted: Segments, id2label: dict[int, str]) -> Image.Image:
    """Draws an image, its ground truth and a prediction side by side; both use the prediction's stuff classes."""
    image = picture_of(item["image"])
    truth = replace(segments_of_item(item), stuff_ids=predicted.stuff_ids)
    panels = [scaled(image, truth, PANEL)[0]]
    panels += [draw_segments(*scaled(image, segments, PANEL), id2label) for segments in (truth, predicted)]
    return beside(panels, CAPTIONS)


def check_reporters(names: Sequence[str]) -> None:
    """Checks that experiment trackers are known and installed.

    Raises:
        SettingsError: one is not in `REPORTERS`.
        ImportError: the library of one is missing; the message names the command that installs it.
    """
    for name in names:
        if name not in REPORTERS:
            raise SettingsError(f"report_to must be one of {', '.join(REPORTERS)}, not {name!r}.")
        if find_spec(name) is None:
            raise ImportError(f"report_to {name} needs {name}, which is not installed: `pip install {name}`.")


def reporter_settings(names: Sequence[str], out_dir: Path) -> dict[str, Any]:
    """The settings of `TrainingArguments` for experiment trackers. `tensorboard_callback` is for TensorBoard.

    Args:
        names: names in `REPORTERS`.
        out_dir: the run's folder, whose name becomes the run's.
    """
    return {
        "report_to": [name for name in names if name != TENSORBOARD],
        "run_name": out_dir.resolve().name,
        # transformers 4.57 would create a Space by default.
        "trackio_space_id": os.environ.get("TRACKIO_SPACE_ID"),
    }


def tensorboard_callback(out_dir: Path, last: Path | None) -> TrainerCallback:
    """transformers' callback for TensorBoard, writing to `out_dir/tensorboard`.

    Args:
        out_dir: the run's folder.
        last: the checkpoint from which a run is resumed, or None; steps that were logged after it are hidden.
    """
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    purge = None if last is None else checkpoint_step(last) + 1
    return TensorBoardCallback(SummaryWriter(str(out_dir / TENSORBOARD), purge_step=purge))


class CurveCallback(TrainerCallback):
    """Draws the curve at every evaluation."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            draw_curve(state.log_history, self.path)


class SamplesCallback(TrainerCallback):
    """Draws some items with their ground truth and the averaged model's prediction at every evaluation.

    Args:
        trainer: the trainer with the averaged model.
        items: what to draw.
        folder: where `step-N.png` is written.
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
    """Evaluates and logs after the last step, regardless of the intervals."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True
            control.should_log = True
        return control


class TableCallback(TrainerCallback):
    """Prints one row of losses per log entry, and one line of metrics per subtask of an evaluation."""

    def __init__(self) -> None:
        self.has_heading = False
        self.columns = COLUMNS

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: "dict[str, Any] | None" = None,
        **kwargs: Any,
    ) -> None:
        """Prints the logged values, above the progress bar if there is one."""
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
        print_metrics(state.global_step, {subtask: values for subtask, values in measured.items() if values})
        if "learning_rate" not in logs:
            return
        if not self.has_heading:
            taught = any(key in logs for key in TEACHER_COLUMNS.values())
            self.columns = {**COLUMNS, **(TEACHER_COLUMNS if taught else {})}
            tqdm.write(f"{'step':>8}" + "".join(f"{name:>10}" for name in self.columns) + f"{'rate':>10}")
            self.has_heading = True
        cells = [_cell(logs.get(key)) for key in self.columns.values()]
        skipped = logs.get("skipped_steps")
        note = f"  {skipped} skipped by the gradient scaler" if skipped else ""
        tqdm.write(f"{state.global_step:>8}" + "".join(cells) + f"{logs['learning_rate']:>10.1e}{note}")


class BarCallback(ProgressCallback):
    """transformers' progress bar without the printed dictionaries."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Prints nothing, because `TableCallback` does."""


def print_metrics(step: int, numbers: Mapping[str, Mapping[str, float]]) -> None:
    """Prints one line of metrics per subtask, in percent."""
    for line in metric_lines(numbers):
        tqdm.write(f"{step:>8}  {line}")


def print_table(trainer: Any) -> None:
    """Makes a trainer print `TableCallback`'s rows instead of transformers' dictionaries."""
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(BarCallback)
    trainer.add_callback(TableCallback())


def _cell(value: Any) -> str:
    """Formats a table cell of ten characters; a value that was not logged is a dash."""
    return f"{'–':>10}" if value is None else f"{value:>10.4f}" if abs(value) < 1000 else f"{value:>10.3g}"


__all__ = [
    "REPORTERS",
    "SAMPLES",
    "BarCallback",
    "CurveCallback",
    "EvaluateLastCallback",
    "SamplesCallback",
    "TableCallback",
    "check_reporters",
    "draw_curve",
    "print_metrics",
    "print_table",
    "reporter_settings",
    "tensorboard_callback",
]

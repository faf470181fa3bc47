"""What a run prints as it goes: a table of losses, and metrics in per cent, in place of transformers' dictionaries."""

from typing import Any

from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..evaluation.evaluator import SUBTASKS
from ..evaluation.report import metric_lines

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

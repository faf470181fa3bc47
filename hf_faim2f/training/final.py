"""The weights that a run keeps: `best`, those with the best evaluation so far, and `final`, its result."""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_model
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from ..errors import ModelError, SettingsError, nearest_name
from ..evaluation.evaluator import Evaluator
from ..files import write_whole
from ..hub.results import CARD
from ..hub.sections import images_of
from ..model.image_processing_faim2f import FaiM2FImageProcessor
from .recipe import Recipe
from .run_folder import FINAL, Best, TrainedOn, card_of, training_of, writing
from .trainer import FaiM2FTrainer

logger = logging.get_logger(__name__)
CURVE = "curve.png"
BEST = "best"
BEST_FILE = "best.json"
# The names under which `save_pretrained` saves weights, whole or in parts.
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def find_metric(name: str, evaluator: Evaluator) -> str:
    """Resolves the name of an evaluation metric to its full form, "subtask metric".

    Args:
        name: "semantic mIoU", also with underscores or as in the log ("eval_semantic_mIoU"); or "mIoU", for the first
            subtask that has it.
        evaluator: the evaluator that computes the metric.

    Raises:
        SettingsError: there is no such metric; the message lists the known ones.
    """
    known = evaluator.metric_names()
    wanted = name.strip().removeprefix("eval_").replace(" ", "_").lower()
    for metric in known:
        subtask, _, short = metric.lower().partition(" ")
        if wanted in (f"{subtask}_{short}", short):
            return metric
    nearest = nearest_name(name, [*known, *(metric.partition(" ")[2] for metric in known)], 0.6)
    hint = f" Did you mean {nearest!r}?" if nearest else ""
    raise SettingsError(f"There is no metric {name!r} here. The evaluation has: {', '.join(known)}.{hint}")


class BestCallback(TrainerCallback):
    """Keeps the evaluated weights with the highest value of a metric in `best`, and stops a run without progress.

    `best` is a model folder with the weights that are evaluated, averaged if the recipe averages them, and `best.json`.
    It is the only record of the choice. Evaluations without improvement are counted in the trainer's log, which every
    checkpoint contains. So a resumed run makes the same choice.

    Args:
        trainer, processor: what to save.
        out_dir: the run's folder.
        metric: "subtask metric"; larger is better, as for every metric of the evaluator.
        patience: the number of evaluations in a row without improvement after which the run stops; None for no limit.

    Attributes:
        best: the best evaluation so far; None before the first one in which the metric is defined.
    """

    def __init__(
        self,
        trainer: FaiM2FTrainer,
        processor: FaiM2FImageProcessor,
        out_dir: Path,
        metric: str,
        patience: int | None = None,
    ) -> None:
        self.trainer = trainer
        self.processor = processor
        self.folder = out_dir / BEST
        self.metric = metric
        self.key = "eval_" + metric.replace(" ", "_")
        self.patience = patience
        self.best: Best | None = None
        self._evaluation: tuple[dict[str, dict[str, Any]], Any] | None = None  # results and confusion matrix of `best`

    def begin(self, resumed: bool) -> None:
        """Reads `best` of a resumed run, or removes that of an earlier run. Call it in all processes."""
        before = self.folder.with_name(f".{BEST}.before")
        if self.trainer.is_world_process_zero():
            if not resumed:
                shutil.rmtree(self.folder, ignore_errors=True)
            elif before.is_dir() and not self.folder.exists():  # the run was killed between the two renames
                before.rename(self.folder)
            shutil.rmtree(before, ignore_errors=True)
        self.trainer.accelerator.wait_for_everyone()
        best = _read_best(self.folder)
        self.best = best if best is not None and best.metric == self.metric else None

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: "dict[str, float] | None" = None,
        **kwargs: Any,
    ) -> TrainerControl:
        """Keeps better weights. Otherwise stops the run, with a checkpoint, if patience is exhausted."""
        value = (metrics or {}).get(self.key)  # missing if it is undefined
        if value is not None and (self.best is None or value > self.best.value):
            self.best = Best(self.metric, state.global_step, value)
            assert self.trainer.results is not None and self.trainer.evaluator is not None
            self._evaluation = self.trainer.results[1], self.trainer.evaluator.confusion
            if self.trainer.is_world_process_zero():
                self._write()
                tqdm.write(f"{state.global_step:>8}  the best {self.metric} so far")
        elif _is_out_of_patience(state.log_history, self.best, self.patience):
            control.should_training_stop = control.should_save = True
        return control

    def _write(self) -> None:
        assert self.best is not None
        partial = self.folder.with_name(f".{BEST}.partial")
        before = self.folder.with_name(f".{BEST}.before")
        shutil.rmtree(partial, ignore_errors=True)
        with writing(partial):
            self.trainer.averaged_model().save_pretrained(partial)
            self.processor.save_pretrained(partial)
            write_whole(partial / BEST_FILE, json.dumps(asdict(self.best), indent=1) + "\n")
        if self.folder.exists():
            self.folder.rename(before)
        partial.rename(self.folder)
        shutil.rmtree(before, ignore_errors=True)

    def restore(self) -> bool:
        """Loads the best weights, and the results of their evaluation if this process has seen it. Call it in all
        processes, after the training.

        Returns:
            Whether there are best weights.
        """
        self.trainer.accelerator.wait_for_everyone()  # the main process may still be writing them
        if self.best is None:
            return False
        try:
            load_model(self.trainer.averaged_model(), self.folder / SAFE_WEIGHTS_NAME)
        except SafetensorError as error:
            raise ModelError(f"{self.folder / SAFE_WEIGHTS_NAME} is damaged: copy it again.") from error
        if self._evaluation is not None:
            results, confusion = self._evaluation
            self.trainer.results = (self.best.step, results)
            assert self.trainer.evaluator is not None
            self.trainer.evaluator.confusion = confusion
        return True


def is_stopped_early(checkpoint: Path, patience: int | None) -> bool:
    """Whether a run was stopped at a checkpoint because `patience` evaluations after the best one were not better."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    return _is_out_of_patience(state.log_history, _read_best(checkpoint.parent / BEST), patience)


def check_best(checkpoint: Path, metric: str) -> None:
    """Checks that the best weights are there if the log of a checkpoint has the metric, "subtask metric".

    Raises:
        ModelError: they are not. Other weights would replace them in `final`.
    """
    folder, key = checkpoint.parent / BEST, "eval_" + metric.replace(" ", "_")
    history = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).log_history
    is_there = _read_best(folder) is not None or folder.with_name(f".{BEST}.before").is_dir()
    if not is_there and any(key in entry for entry in history):
        raise ModelError(
            f"{folder} is missing, with the weights of the best evaluation so far: copy it back, or choose another out."
        )


def is_evaluated(history: Sequence[Mapping[str, Any]], step: int) -> bool:
    """Whether a trainer's log has an evaluation after this step."""
    return any(entry["step"] == step and any(key.startswith("eval_") for key in entry) for entry in history)


def _read_best(folder: Path) -> Best | None:
    path = folder / BEST_FILE
    try:
        return Best(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
    except (ValueError, TypeError) as error:
        raise ModelError(f"{path} is damaged: copy it again, or choose another out.") from error


def _is_out_of_patience(history: Sequence[Mapping[str, Any]], best: Best | None, patience: int | None) -> bool:
    since = 0 if best is None else best.step
    after = {entry["step"] for entry in history if entry["step"] > since and is_evaluated([entry], entry["step"])}
    return patience is not None and len(after) >= patience


class FinalFolder(TrainerCallback):
    """Writes `final`, the Hub folder of the averaged weights, after the last step and before the last evaluation.

    Args:
        trainer, processor: what to save.
        recipe, precision, about: facts for the card.
        out_dir: the run's folder.
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
        """Also writes the last checkpoint before the evaluation, so that a failing evaluation loses no training."""
        if state.global_step >= state.max_steps:
            self.write(new_weights=True)
            self.trainer._save_checkpoint(self.trainer.model, trial=None)
            control.should_save = False

    def log_into_checkpoint(self) -> None:
        """Adds the last evaluation to the log in the last checkpoint, which was written before it."""
        state = self.out_dir / f"checkpoint-{self.trainer.state.global_step}" / TRAINER_STATE_NAME
        if state.is_file():
            partial = state.with_name(f".{state.name}.partial")
            self.trainer.state.save_to_json(str(partial))
            os.replace(partial, state)

    def write(self, *, new_weights: bool) -> None:
        """Writes the model, its image processor and its card atomically.

        Args:
            new_weights: whether the weights changed, so that results in the card of an earlier `final` are dropped.
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
        for own in [] if new_weights or not folder.is_dir() else list(folder.iterdir()):
            # What the user added to the same model, such as a license; not the same weights in other files.
            if not WEIGHTS.fullmatch(own.name) and not (partial / own.name).exists():
                # A copy, so that an interruption loses nothing.
                if own.is_dir() and not own.is_symlink():
                    shutil.copytree(own, partial / own.name, symlinks=True)
                else:
                    shutil.copy2(own, partial / own.name, follow_symlinks=False)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)

    def write_card(self, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Rewrites the card of `final` with the results and the curve."""
        folder = self.out_dir / FINAL
        self._write_card(folder, _text(folder / CARD), results, keep_results=True)

    def _write_card(
        self, folder: Path, before: str, results: Mapping[str, Mapping[str, Any]], *, keep_results: bool
    ) -> None:
        curve = self.out_dir / CURVE
        if curve.is_file():
            shutil.copyfile(curve, folder / CURVE)
        history = self.trainer.state.log_history
        config = self.trainer.averaged_model().config
        training = training_of(
            self.recipe, self.about, history, self.precision, self.trainer.args.seed,
            CURVE if curve.is_file() else None, self.trainer.state.global_step, self.trainer.best,
            config.label_weights,
        )  # fmt: skip
        try:
            text = card_of(
                config, self.processor, self.out_dir, training, self.about, results, before, keep_results=keep_results
            )
        except ValueError as error:  # the metadata was edited, and is invalid
            logger.warning(f"{self.out_dir / FINAL / CARD} was not changed: {error}.")
            text = before
        write_whole(folder / CARD, text)
        if CURVE not in images_of(text):  # for example if the training section is hand-written
            (folder / CURVE).unlink(missing_ok=True)


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", errors="replace") if path.is_file() else ""


__all__ = [
    "BEST",
    "CURVE",
    "FINAL",
    "BestCallback",
    "FinalFolder",
    "check_best",
    "find_metric",
    "is_evaluated",
    "is_stopped_early",
]

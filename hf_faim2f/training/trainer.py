"""Losses of a part of a batch, scaled so that the gradients of all parts add up to those of the whole batch.

A step's batch may be cut into parts: accumulated one after the other, computed by several processes, or both. Every
loss of this model is a sum over segments or queries, divided by something that only the whole batch knows:

- mask and dice losses, and sigmoid classification: by the number of segments;
- softmax classification: by the sum of the class weights of all queries. In an image of n segments the matching gives
  min(n, Q) of the Q queries a segment, whichever they are, and each weighs 1; the others are "no object", and each
  weighs `no_object_weight`. So the sum is known before the model has run, and is the same for every prediction layer.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from ..data.item import Item
from ..errors import DivergenceError
from ..evaluation.evaluator import Evaluator
from ..zoo import check_finite, first_not_finite
from .recipe import Recipe, make_optimizer, make_schedule
from .run_folder import writing


class BatchTotals(NamedTuple):
    """What a batch's losses are divided by, each a float32 tensor ()."""

    segments: Tensor
    class_weight: Tensor


def batch_totals(class_labels: Sequence[Tensor], config: Any, device: "torch.device | None" = None) -> BatchTotals:
    """The totals of these images; those of several parts are summed to get the whole batch's.

    Args:
        class_labels: per image (n_i,).
        config: `FaiM2FConfig`.
        device: where the totals shall be.
    """
    counts = [len(labels) for labels in class_labels]
    matched = sum(min(count, config.num_queries) for count in counts)
    unmatched = len(counts) * config.num_queries - matched
    return BatchTotals(
        torch.tensor(float(sum(counts)), device=device),
        torch.tensor(matched + config.no_object_weight * unmatched, device=device),
    )


def whole_batch_losses(
    loss_dict: Mapping[str, Tensor], class_labels: Sequence[Tensor], totals: BatchTotals, config: Any, processes: int
) -> dict[str, Tensor]:
    """The share that a part of the batch has in each of the whole batch's losses, times the number of processes.

    The sum over all accumulated parts, averaged over the processes as DistributedDataParallel averages gradients, is
    the loss of the whole batch.

    Args:
        loss_dict: what the model returned for the part, called with `num_items_in_batch=totals.segments`.
        class_labels: of the part.
        totals: of the whole batch.
        config: `FaiM2FConfig`.
        processes: how many there are.
    """
    losses = {}
    for name, value in loss_dict.items():
        share: Tensor | float = 1.0
        if name.startswith("loss_ce") and not config.cls_sigmoid:
            # The model divides this one by the part's own sum of weights.
            share = batch_totals(class_labels, config, value.device).class_weight / totals.class_weight
        losses[name] = value * share * processes
    return losses


# Divergence: a loss, a gradient or a weight that is NaN or infinite stops a run before anything of it is kept.

# A gradient scaler that has gone down to this still finds gradients that overflow: they do so without any scale.
LEAST_SCALE = 1.0


def diverged(step: int, what: str, learning_rate: float) -> DivergenceError:
    """The error for a step.

    Args:
        step: counted from 1.
        what: is not finite, such as "loss_mask is nan".
        learning_rate: the largest of the step.
    """
    return DivergenceError(
        f"The training diverged in step {step}: {what}, at a learning rate of {learning_rate:.3g}. Try a lower one "
        f"({learning_rate / 10:.1g}, say), a longer warm-up, stronger clipping or, in fp16, another precision."
    )


class DivergenceCallback(TrainerCallback):
    """Has the trainer look at each step's losses and gradients before the optimizer takes it."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raises DivergenceError in all processes, or in none."""
        self.trainer.check_step()


def gradient_norm(parameters: Any) -> Tensor:
    """The norm of all gradients, (), which is finite where they all are."""
    return torch.nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])


# transformers' Trainer with recipes, named losses, averaged weights and metrics that stream.

AVERAGE_FILE = "average.safetensors"


class AverageCallback(TrainerCallback):
    """Keeps an exponential moving average of the weights, in every checkpoint too, so that a resumed run goes on."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts from the model as it is, or, where a run is resumed, from the checkpoint's average."""
        self.averaged.to(args.device)
        if state.global_step == 0:
            self.averaged.module.load_state_dict(kwargs["model"].state_dict())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """One more step into the average."""
        self.averaged.update_parameters(kwargs["model"])

    def save(self, folder: Path) -> None:
        """Writes the average beside a checkpoint."""
        state = {key: value.contiguous().cpu() for key, value in self.averaged.state_dict().items()}
        save_file(state, folder / AVERAGE_FILE)

    def load(self, folder: Path) -> None:
        """Reads the average of a checkpoint."""
        self.averaged.load_state_dict(load_file(folder / AVERAGE_FILE))


class FaiM2FTrainer(Trainer):
    """Trains by a recipe. Named losses are logged; accumulated and distributed batches make the step of the whole one.

    A step of which a loss or a gradient is not finite is not taken: all processes raise DivergenceError, and weights
    and checkpoints stay as they were. In fp16 the gradient scaler skips such steps as long as it can scale down.

    Args:
        recipe: optimizer, schedule, clipping and averaging.
        evaluator: measures the model on `eval_dataset`; without one there is no evaluation.
        kwargs: as `Trainer` takes them.

    Attributes:
        results: the step of the last evaluation and, per subtask, all that it measured.
    """

    optimizer: Any
    lr_scheduler: Any
    control: Any

    def __init__(self, *, recipe: Recipe, evaluator: Evaluator | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.recipe = recipe
        self.evaluator = evaluator
        # Our compute_loss divides by what all accumulated batches have itself.
        self.model_accepts_loss_kwargs = True
        self._named: dict[str, Tensor] = {}  # sums since the last log
        self._steps = 0  # that they are of
        self._of_step: dict[str, Tensor] = {}  # of the step that is being made, over its accumulated batches
        self._skipped = 0  # steps that the scaler skipped since the last log
        self.add_callback(DivergenceCallback(self))
        self.results: tuple[int, dict[str, dict[str, Any]]] | None = None
        self.average = AverageCallback(self.model, recipe.ema_decay) if recipe.ema_decay else None
        if self.average is not None:
            self.add_callback(self.average)

    def create_optimizer(self, *_: Any, **__: Any) -> torch.optim.Optimizer:
        """The recipe's, whatever the arguments say."""
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model, self.recipe)
        return self.optimizer

    def create_scheduler(self, *_: Any, **__: Any) -> Any:
        """The recipe's, whatever the arguments say."""
        if self.lr_scheduler is None:
            self.lr_scheduler = make_schedule(self.optimizer, self.recipe)
        return self.lr_scheduler

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | None:
        """(2,): the totals of all accumulated batches, over all processes; see `whole_batch.py`.

        transformers asks once an optimizer step, counts `labels`, of which there are none here, and hands what it gets
        to `compute_loss`.
        """
        class_labels = [labels for batch in batch_samples for labels in batch["class_labels"]]
        totals = torch.stack(batch_totals(class_labels, self.model.config, device))
        return self.accelerator.reduce(totals, "sum") if self.args.world_size > 1 else totals

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: "Tensor | int | None" = None,
    ) -> Any:
        """The sum of the named losses, each of which is remembered for the log.

        `num_items_in_batch` is what `_get_num_items_in_batch` gave, or None where the batch is whole.
        """
        config = self.model.config
        if isinstance(num_items_in_batch, Tensor):
            totals, processes = BatchTotals(*num_items_in_batch.unbind()), self.args.world_size
        else:
            totals, processes = batch_totals(inputs["class_labels"], config, self.args.device), 1
        self.model.criterion.refuse_non_finite = False  # `check_step` does, once a step and in all processes together
        try:
            outputs = model(**inputs, num_items_in_batch=totals.segments)
        finally:
            self.model.criterion.refuse_non_finite = True
        losses = whole_batch_losses(outputs.loss_dict, inputs["class_labels"], totals, config, processes)
        for name, value in losses.items():
            kept = self._of_step.get(name, torch.zeros((), device=value.device))
            self._of_step[name] = kept + value.detach()
        loss = torch.stack(list(losses.values())).sum()
        return (loss, outputs) if return_outputs else loss

    def check_step(self) -> None:
        """Before the optimizer's step: keeps its losses for the log, where they and the gradients are finite.

        Raises:
            DivergenceError: they are not, in any of the processes; it is raised in all. Not for gradients that the
                scaler of mixed precision finds, skips and scales down.
        """
        losses, self._of_step = self._of_step, {}
        total = torch.stack(list(losses.values())).sum()
        norm = gradient_norm(self.model.parameters()).to(total.device)
        wrong = torch.stack([total, norm]).isfinite().logical_not().float()
        if self.args.world_size > 1:
            wrong = self.accelerator.reduce(wrong, "sum")
        wrong_loss, wrong_gradient = wrong.bool().tolist()
        if not wrong_loss and not wrong_gradient:
            for name, value in losses.items():
                self._named[name] = self._named.get(name, torch.zeros_like(value)) + value
            self._steps += 1
            return
        scaler = self.accelerator.scaler
        if wrong_gradient and scaler is not None and scaler.get_scale() > LEAST_SCALE:
            self._skipped += 1
            return
        what = "the gradient is not finite"
        if wrong_loss:
            own = [f"{name} is {float(value)}" for name, value in losses.items() if not value.isfinite()]
            what = own[0] if own else "a loss of another process is not finite"
        error = diverged(self.state.global_step + 1, what, self._largest_rate())
        error.bad_weights = self.state.global_step if wrong_loss else None
        raise error

    def _largest_rate(self) -> float:
        groups = [] if self.optimizer is None else self.optimizer.param_groups  # none where a finished run is loaded
        return max((float(group["lr"]) for group in groups), default=self.recipe.learning_rate)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the mean of each named loss since the last log; intermediate predictions' are summed by kind.

        Steps that the scaler of mixed precision skipped do not count; `skipped_steps` says how many, where there are.
        """
        if "loss" in logs and self._skipped:
            logs["skipped_steps"], self._skipped = self._skipped, 0
            if not self._steps:
                del logs["loss"]  # transformers has 0, or a loss of other steps
        if "loss" in logs and self._steps:
            for name, value in self._named.items():
                kind, number = name, name.rpartition("_")[2]
                if number.isdigit():
                    kind = name.removesuffix(f"_{number}") + "_intermediate"
                mean = float(self.accelerator.reduce(value, "mean")) / self._steps
                logs[kind] = round(logs.get(kind, 0.0) + mean, 4)
            if "skipped_steps" in logs:
                kinds = [f"loss_{kind}{suffix}" for kind in ("ce", "mask", "dice") for suffix in ("", "_intermediate")]
                logs["loss"] = round(sum(logs.get(kind, 0.0) for kind in kinds), 4)
            self._named, self._steps = {}, 0
        super().log(logs, *args, **kwargs)

    def check_weights(self) -> None:
        """DivergenceError where a weight, or its average, is not finite: nothing is written of such a model."""
        for model in {id(each): each for each in (self.model, self.averaged_model())}.values():
            name = first_not_finite(model)
            if name is not None:
                raise diverged(self.state.global_step, f"{name} is not finite after it", self._largest_rate())

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.check_weights()
        # The average first, and transformers' state of the trainer last, by which a checkpoint is known to be whole.
        folder = Path(self._get_output_dir(trial=None)) / f"checkpoint-{self.state.global_step}"
        with writing(folder) if self.args.should_save else nullcontext():
            if self.average is not None and self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                self.average.save(folder)
            super()._save_checkpoint(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: "nn.Module | None" = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        check_finite(resume_from_checkpoint, self.model, DivergenceError)
        if self.average is not None:
            self.average.load(Path(resume_from_checkpoint))
            check_finite(f"{resume_from_checkpoint}/{AVERAGE_FILE}", self.average.averaged, DivergenceError)

    def load_finished(self, checkpoint: Path) -> None:
        """Weights, their average and the log of a checkpoint after which there is no step left."""
        self._load_from_checkpoint(str(checkpoint), self.model)
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        self.averaged_model().to(self.args.device)

    def averaged_model(self) -> Any:
        """What is evaluated and kept: the averaged weights, or the model where the recipe keeps no average."""
        return self.average.averaged.module if self.average is not None else self.model

    def evaluate(
        self,
        eval_dataset: "Sequence[Item] | None" = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Metrics of the averaged weights; each image's predictions go straight into them."""
        items = self.eval_dataset if eval_dataset is None else eval_dataset
        if self.evaluator is None or items is None:
            raise ValueError("evaluate needs an evaluator and an eval_dataset; give both to FaiM2FTrainer.")
        model = self.averaged_model()
        results = self.evaluator(model, items, self.args.process_index, self.args.world_size)
        self.results = (self.state.global_step, results)
        metrics = {
            f"{metric_key_prefix}_{subtask}_{name}": float(value)
            for subtask, result in results.items()
            for name, value in result.items()
            if isinstance(value, (int, float)) and not math.isnan(value)
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


__all__ = ["LEAST_SCALE", "DivergenceCallback", "DivergenceError", "diverged", "gradient_norm"]

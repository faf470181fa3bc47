"""transformers' Trainer with recipes, named losses, exact whole-batch losses, averaged weights and divergence checks.

**Whole-batch losses.** A step's batch can be split by gradient accumulation, over several processes, or both.
`whole_batch_losses` scales the losses of a part so that the gradients of all parts add up to those of the whole batch.
Each loss is a sum over segments or queries, divided by a total over the whole batch:

- mask and dice losses, and sigmoid classification: the number of segments;
- softmax classification: the sum of the class weights of all queries. In an image with n segments, the matching assigns
  a segment to min(n, Q) of the Q queries, whichever they are, and each of them weighs 1; the others are "no object" and
  weigh `no_object_weight`. So this sum is known before the forward pass, and is the same for every prediction layer.
  With `label_weights`, each matched query weighs as much as the class of its segment. The sum is then an estimate in
  images with more segments than queries: the mean weight of all their segments stands for that of the matched ones.

**Divergence.** If a loss, a gradient or a weight is NaN or infinite, all processes stop before the step takes effect.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from ..data.item import Item
from ..errors import DivergenceError, SettingsError
from ..evaluation.evaluator import Evaluator
from ..zoo import check_finite, first_not_finite
from .distillation import Answers, DistillationLoss, Teacher, answer, points_of_step
from .recipe import AVERAGE_FILE, AverageCallback, Recipe, follow_recipe, gradient_norm, make_optimizer, make_schedule
from .run_folder import Best, writing

# What distillation adds to a batch; these entries are not passed to the model.
OF_TEACHER = frozenset({"teacher_inputs", "is_labelled", "answers"})
UNUSED = ("compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func")  # Trainer's, never called here
# If gradients overflow at this scale of the fp16 gradient scaler, they would also overflow without scaling.
LEAST_SCALE = 1.0


class BatchTotals(NamedTuple):
    """The totals by which the losses of a batch are divided, float32 tensors of shape ()."""

    segments: Tensor
    class_weight: Tensor


def batch_totals(class_labels: Sequence[Tensor], config: Any, device: "torch.device | None" = None) -> BatchTotals:
    """The totals of some images. The totals of parts add up to those of the whole batch.

    Args:
        class_labels: the class ids of each image, (n_i,).
        config: `FaiM2FConfig`.
        device: the device of the result.
    """
    counts = [len(labels) for labels in class_labels]
    matched = sum(min(count, config.num_queries) for count in counts)
    unmatched = len(counts) * config.num_queries - matched
    weight = float(matched)
    if config.label_weights is not None:
        weights = torch.tensor(config.label_weights)
        means = [float(weights[labels.cpu().long()].mean()) for labels in class_labels if len(labels)]
        sizes = [min(count, config.num_queries) for count in counts if count]
        weight = sum(size * mean for size, mean in zip(sizes, means, strict=True))
    return BatchTotals(
        torch.tensor(float(sum(counts)), device=device),
        torch.tensor(weight + config.no_object_weight * unmatched, device=device),
    )


def whole_batch_losses(
    loss_dict: Mapping[str, Tensor],
    class_labels: Sequence[Tensor],
    totals: BatchTotals,
    config: Any,
    processes: int,
    kind: str = "loss",
) -> dict[str, Tensor]:
    """The contribution of a part of the batch to each loss of the whole batch, times the number of processes.

    Summed over accumulated parts, and averaged over processes as DistributedDataParallel averages gradients, the
    results are the losses of the whole batch.

    Args:
        loss_dict: the model's losses for the part, called with `num_items_in_batch=totals.segments`.
        class_labels: the class ids of each image of the part.
        totals: the totals of the whole batch.
        config: `FaiM2FConfig`.
        processes: the number of processes.
        kind: the first word of the losses' names.
    """
    losses = {}
    for name, value in loss_dict.items():
        share: Tensor | float = 1.0
        if name.startswith(f"{kind}_ce") and not config.cls_sigmoid:
            # The model divides this loss by the sum of weights of the part.
            total = totals.class_weight.clamp(min=torch.finfo(torch.float32).tiny)  # 0 without any query that counts
            share = batch_totals(class_labels, config, value.device).class_weight / total
        losses[name] = value * share * processes
    return losses


def labels_of(batch: Mapping[str, Any]) -> list[Tensor]:
    """The class ids of each image of a batch that has labels."""
    labels: list[Tensor] = batch["class_labels"]
    known = batch.get("is_labelled")
    return labels if known is None else [one for one, is_known in zip(labels, known.tolist(), strict=True) if is_known]


def diverged(step: int, what: str, learning_rate: float) -> DivergenceError:
    """The error that stops a run.

    Args:
        step: the step, counted from 1.
        what: the value that is not finite, such as "loss_mask is nan".
        learning_rate: the largest learning rate of the step.
    """
    return DivergenceError(
        f"The training diverged in step {step}: {what}, at a learning rate of {learning_rate:.3g}. Try a lower one, "
        f"such as {learning_rate / 10:.1g}, a longer warm-up, stronger clipping or, with fp16, another precision."
    )


class StepCallback(TrainerCallback):
    """Tells the data the epoch, keeps a resumed run to its own arguments, and checks each step."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Replaces the intervals and batch size of a resumed run's checkpoint, which transformers would keep."""
        state.compute_steps(args, state.max_steps)
        state.train_batch_size = args.train_batch_size

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Tells the data the epoch. Accelerate does not if it divides batches among processes or skips any."""
        data = self.trainer.train_dataset
        if hasattr(data, "set_epoch") and hasattr(data, "__len__"):
            batches = len(kwargs["train_dataloader"])
            data.set_epoch(state.global_step // max(1, math.ceil(batches / args.gradient_accumulation_steps)))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raises DivergenceError in all processes or in none; see `FaiM2FTrainer.check_step`."""
        self.trainer.check_step()


class FaiM2FTrainer(Trainer):
    """Trains by a recipe, and logs each loss by name.

    If the loss or the gradient of a step is not finite, all processes raise DivergenceError, and neither weights nor
    checkpoints change. With fp16, the gradient scaler skips such steps as long as it can reduce its scale.
    With averaging, `evaluate`, `predict` and `save_model` use the averaged weights; checkpoints have both.

    Args:
        recipe: the optimizer, schedule, steps, clipping, averaging and points of the losses. They replace those of
            `args`, see `follow_recipe`.
        evaluator: evaluates the model on `eval_dataset`; None for no evaluation.
        teacher: a model to distill from; the data collator must then be a `DistillationCollator`.
        kwargs: passed on to `Trainer`.

    Raises:
        SettingsError: the arguments ask for something that this trainer does not do, such as `compute_metrics`.

    Attributes:
        results: the step of the last evaluation, and the metrics of each subtask. After `run.train`, of the evaluation
            of the final weights.
        best: after `run.train`, the evaluation for which the weights were chosen; None for those of the last step.
    """

    optimizer: Any
    lr_scheduler: Any
    control: Any
    model: Any

    def __init__(
        self, *, recipe: Recipe, evaluator: Evaluator | None = None, teacher: Teacher | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if self.args.eval_strategy != "no" and evaluator is None:
            raise SettingsError("eval_strategy needs an evaluator: pass one, or leave eval_strategy out.")
        follow_recipe(self.args, recipe, [name for name in UNUSED if kwargs.get(name) is not None])
        if recipe.mask_points is not None:
            self.model.config.train_num_points = recipe.mask_points
        self._train_batch_size = self.args.train_batch_size  # for one GPU
        self.recipe, self.evaluator, self.teacher = recipe, evaluator, teacher
        if teacher is not None:
            teacher.model.to(self.args.device)
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the totals of all accumulated batches
        self._named: dict[str, Tensor] = {}  # each loss, summed over the steps since the last log
        self._steps = self._skipped = 0  # the number of these steps, and of those that the scaler skipped since then
        self._of_step: dict[str, Tensor] = {}  # each loss of the current step, summed over accumulated batches
        self.add_callback(StepCallback(self))
        self.results: tuple[int, dict[str, dict[str, Any]]] | None = None
        self.best: Best | None = None
        self.average = AverageCallback(self.model, recipe.ema_decay) if recipe.ema_decay else None
        if self.average is not None:
            self.add_callback(self.average)

    def _inner_training_loop(self, batch_size: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains with the batch size of the arguments. transformers 4.57 would take that of a resumed checkpoint."""
        own = batch_size if self.args.auto_find_batch_size else self.args.train_batch_size
        return super()._inner_training_loop(own, *args, **kwargs)

    def create_optimizer(self, *_: Any, **__: Any) -> torch.optim.Optimizer:
        """The recipe's optimizer, regardless of the training arguments."""
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model, self.recipe)
        return self.optimizer

    def create_scheduler(self, *_: Any, **__: Any) -> Any:
        """The recipe's schedule, regardless of the training arguments; from its start if `train` is called again."""
        if self.lr_scheduler is None:
            self.lr_scheduler, self._created_lr_scheduler = make_schedule(self.optimizer, self.recipe), True
        return self.lr_scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:  # has the rates of its own schedule, which may have had another number of steps
            schedule = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # of accelerate's, with DeepSpeed
            schedule._last_lr = [base * self.recipe.rate(schedule.last_epoch) for base in schedule.base_lrs]
            for group, rate in zip(self.optimizer.param_groups, schedule._last_lr, strict=True):
                group["lr"] = rate

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | None:
        """The `BatchTotals` of all accumulated batches and processes, as a tensor (2,).

        With a teacher also the `BatchTotals` of its segments and the number of images, (5,). Its predictions are
        stored in the batches.

        transformers calls this once per optimizer step and passes the result to `compute_loss`. Its own version counts
        `labels`, which this model's batches do not have.
        """
        if not batch_samples:  # transformers 4.57, at the end of an epoch in which a run was resumed
            return None
        for batch in batch_samples if self.teacher is not None else []:
            batch["answers"] = self._answers(batch, device)
        totals = torch.stack([sum(part) for part in zip(*(self._totals(batch, device) for batch in batch_samples),
                                                        strict=True)])  # fmt: skip
        return self.accelerator.reduce(totals, "sum") if self.args.world_size > 1 else totals

    def _totals(self, batch: Mapping[str, Any], device: torch.device) -> list[Tensor]:
        """The totals of a batch, see `_get_num_items_in_batch`."""
        config, answers = self.model.config, batch.get("answers")
        if answers is None:
            return list(batch_totals(batch["class_labels"], config, device))
        images = torch.tensor(float(len(answers.classes)), device=device)
        return [
            *batch_totals(labels_of(batch), config, device), *batch_totals(answers.classes, config, device), images
        ]  # fmt: skip

    def _answers(self, batch: Mapping[str, Any], device: torch.device) -> Answers:
        """The teacher's predictions for a batch. Its masks could overflow float16, so it then runs in float32."""
        assert self.teacher is not None
        points = points_of_step(self.model.config.train_num_points, self.args.seed, self.state.global_step).to(device)
        inputs = {name: value.to(device) for name, value in batch["teacher_inputs"].items()}
        with self.accelerator.autocast() if self.args.bf16 else nullcontext():
            return answer(self.teacher, inputs, batch["pixel_mask"].to(device), points)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: "Tensor | int | None" = None,
    ) -> Any:
        """The sum of the named losses. Each of them is also kept for the log.

        `num_items_in_batch` is the result of `_get_num_items_in_batch`; None if `inputs` is the whole batch.
        """
        config, device = self.model.config, self.args.device
        if self.teacher is not None and "answers" not in inputs:
            inputs = {**inputs, "answers": self._answers(inputs, device)}
        if isinstance(num_items_in_batch, Tensor):
            numbers, processes = list(num_items_in_batch.unbind()), self.args.world_size
        else:
            numbers, processes = self._totals(inputs, device), 1
        totals = BatchTotals(*numbers[:2])
        owner = getattr(self.model, "get_base_model", lambda: self.model)()  # setting PEFT's attributes has no effect
        criterion = owner.criterion
        criterion.refuse_non_finite = False  # `check_step` does, in all processes
        if self.teacher is not None:
            owner.criterion = DistillationLoss(
                criterion, self.teacher, inputs["answers"], inputs["is_labelled"], numbers[2], numbers[4]
            )
        try:
            of_model = {name: value for name, value in inputs.items() if name not in OF_TEACHER}
            outputs = model(**of_model, num_items_in_batch=totals.segments)
        finally:
            owner.criterion = criterion
            criterion.refuse_non_finite = True
        own = {name: value for name, value in outputs.loss_dict.items() if name.startswith("loss_")}
        losses = whole_batch_losses(own, labels_of(inputs), totals, config, processes)
        if self.teacher is not None:
            taught = {name: value for name, value in outputs.loss_dict.items() if name not in own}
            of_teacher = BatchTotals(*numbers[2:4])
            losses |= whole_batch_losses(taught, inputs["answers"].classes, of_teacher, config, processes, "teacher")
        for name, value in losses.items() if model.training else ():
            self._of_step[name] = self._of_step.get(name, 0) + value.detach()
        loss = torch.stack(list(losses.values())).sum()
        return (loss, outputs) if return_outputs else loss

    def check_step(self) -> None:
        """Checks losses and gradients before the optimizer's step, and keeps the losses for the log.

        Raises:
            DivergenceError: a loss or a gradient in any process is not finite; raised in all processes. Overflows in
                mixed precision that the gradient scaler handles are not errors.
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
        groups = [] if self.optimizer is None else self.optimizer.param_groups  # none if a finished run was loaded
        return max((float(group["lr"]) for group in groups), default=self.recipe.learning_rate)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the mean of each named loss since the last log entry; losses of intermediate layers are summed by kind.

        Steps that the gradient scaler skipped do not count; `skipped_steps` is their number, if there are any.
        """
        if not math.isfinite(logs.get("grad_norm", 0.0)):
            del logs["grad_norm"]  # of such a step
        if "loss" in logs and self._skipped:
            logs["skipped_steps"], self._skipped = self._skipped, 0
            if not self._steps:
                del logs["loss"]  # transformers would log 0, or the loss of other steps
        if "loss" in logs and self._steps:
            means: dict[str, float] = {}
            for name, value in self._named.items():
                own, _, number = name.rpartition("_")
                kind = f"{own}_intermediate" if number.isdigit() else name
                mean = float(self.accelerator.reduce(value, "mean")) / self._steps
                means[kind] = round(means.get(kind, 0.0) + mean, 4)
            logs |= means
            if "skipped_steps" in logs:
                logs["loss"] = round(sum(means.values()), 4)
            self._named, self._steps = {}, 0
        super().log(logs, *args, **kwargs)

    def check_weights(self) -> None:
        """Raises DivergenceError if a weight or an averaged weight is not finite, so that such a model is not saved."""
        for model in {id(each): each for each in (self.model, self.averaged_model())}.values():
            name = first_not_finite(model)
            if name is not None:
                raise diverged(self.state.global_step, f"{name} is not finite after it", self._largest_rate())

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.check_weights()
        # The average is written first: a checkpoint counts as complete once transformers has written the trainer's
        # state, which comes last.
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
        """Loads the weights, their average and the log of the last checkpoint of a finished run."""
        self._load_from_checkpoint(str(checkpoint), self.model)
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        self.averaged_model().to(self.args.device)

    def averaged_model(self) -> Any:
        """The model that is evaluated and saved: with averaged weights if the recipe averages them."""
        return self.average.averaged.module if self.average is not None else self.model

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        trained, self.model = self.model, self.averaged_model()
        try:
            yield
        finally:
            self.model = trained

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the averaged weights. (In calls by transformers for a checkpoint, the model's; it stores both.)"""
        with nullcontext() if _internal_call and output_dir is not None else self._averaged():
            super().save_model(output_dir, _internal_call)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Like transformers' method, with the averaged weights."""
        with self._averaged():
            return super().predict(*args, **kwargs)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.average is not None:
            self.average.load(Path(self.state.best_model_checkpoint))

    def evaluate(
        self,
        eval_dataset: "Sequence[Item] | None" = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluates the averaged weights and logs the metrics; ValueError without an evaluator or items."""
        items = self.eval_dataset if eval_dataset is None else eval_dataset
        if self.evaluator is None or items is None:
            raise ValueError("evaluate needs an evaluator and an eval_dataset: pass both to FaiM2FTrainer.")
        model = self.averaged_model()
        if self.args.world_size > 1:
            for buffer in model.buffers():  # batch norms have the statistics of their process; the main one's are saved
                torch.distributed.broadcast(buffer, 0)
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


__all__ = ["DivergenceError", "FaiM2FTrainer", "batch_totals", "diverged", "gradient_norm", "whole_batch_losses"]

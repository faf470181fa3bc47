"""transformers' Trainer with recipes, named losses, averaged weights and metrics that stream."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data.item import Item
from ..evaluation.run import Evaluator
from .recipe import Recipe, make_optimizer, make_schedule

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
    """Trains by a recipe. Named losses are logged; gradient accumulation and several processes count masks globally.

    Args:
        recipe: optimizer, schedule, clipping and averaging.
        evaluator: measures the model on `eval_dataset`; without one there is no evaluation.
        kwargs: as `Trainer` takes them.
    """

    optimizer: Any
    lr_scheduler: Any
    control: Any

    def __init__(self, *, recipe: Recipe, evaluator: Evaluator | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.recipe = recipe
        self.evaluator = evaluator
        # Our compute_loss divides by the masks of all accumulated batches itself.
        self.model_accepts_loss_kwargs = True
        self._named: dict[str, Tensor] = {}
        self._counted = 0
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
        """Masks of all accumulated batches, over all processes. (transformers counts `labels`; there are none.)"""
        count = torch.tensor(sum(len(labels) for batch in batch_samples for labels in batch["class_labels"]))
        count = count.to(device)
        return self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: "Tensor | int | None" = None,
    ) -> Any:
        """The sum of the named losses, each of which is remembered for the log.

        The mask losses are sums over the masks here, divided by all masks of the step: gradients of accumulated
        batches add up, and those of processes are averaged, for which their number makes up.
        """
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        parts = self.args.gradient_accumulation_steps
        losses = {}
        for name, value in outputs.loss_dict.items():
            whole = name.startswith("loss_ce") and not self.model.config.cls_sigmoid
            losses[name] = value / parts if whole or num_items_in_batch is None else value * self.args.world_size
            kept = self._named.get(name, torch.zeros((), device=value.device))
            self._named[name] = kept + losses[name].detach()
        self._counted += 1
        loss = torch.stack(list(losses.values())).sum()
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the mean of each named loss since the last log; intermediate predictions' are summed by kind."""
        if "loss" in logs and self._counted:
            steps = self._counted / self.args.gradient_accumulation_steps
            for name, value in self._named.items():
                kind, number = name, name.rpartition("_")[2]
                if number.isdigit():
                    kind = name.removesuffix(f"_{number}") + "_intermediate"
                mean = float(self.accelerator.reduce(value, "mean")) / steps
                logs[kind] = round(logs.get(kind, 0.0) + mean, 4)
            self._named, self._counted = {}, 0
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # First, so that a run that is killed in between has no checkpoint that looks whole and lacks its average.
        folder = Path(self._get_output_dir(trial=None)) / f"checkpoint-{self.state.global_step}"
        if self.average is not None and self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            self.average.save(folder)
        super()._save_checkpoint(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: "nn.Module | None" = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.average is not None:
            self.average.load(Path(resume_from_checkpoint))

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
        metrics = {
            f"{metric_key_prefix}_{subtask}_{name}": float(value)
            for subtask, result in results.items()
            for name, value in result.items()
            if isinstance(value, (int, float)) and not math.isnan(value)
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

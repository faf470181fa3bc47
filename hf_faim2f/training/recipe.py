"""Recipes: hyperparameters from publications and our own, as data.

Class weights of the classification loss are not part of a recipe, because they depend on the data of a run.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from ..data.augmentation import (
    Augmentation,
    RandomCrop,
    RandomFlip,
    ResizeShortestEdge,
    SSDColorJitter,
    coco_augmentations,
    focoos_augmentations,
    mask2former_semantic_augmentations,
)
from ..data.counts import ClassCounts
from ..errors import DatasetError, SettingsError, nearest_name
from ..files import read_text

logger = logging.get_logger(__name__)

AVERAGE_FILE = "average.safetensors"
# Training arguments from which transformers would create a schedule, and an optimizer.
OF_SCHEDULE = ("lr_scheduler_type", "warmup_steps", "warmup_ratio")
OF_OPTIMIZER = ("optim", "adam_beta1", "adam_beta2", "adam_epsilon")
ADAMW = ("adamw_torch", "adamw_torch_fused")  # the recipe's optimizer by its names in transformers
# Modules without weight decay, as in Mask2Former's training script. Neither biases nor embeddings of positions, such
# as Swin's `relative_position_bias_table`, are decayed.
UNDECAYED = (nn.LayerNorm, nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, nn.Embedding)

# For images of 640 pixels. In the same time, a new model learns more from many small crops than from a few large ones.
SMALL_CROPS = (
    ResizeShortestEdge((213, 640), None, style="range"),
    RandomCrop(284, 379),
    SSDColorJitter(),
    RandomFlip(),
)
# The setting for class weights that are balanced by the data.
BALANCED = "balanced"
# Bounds of balanced weights; otherwise a class with few segments would dominate the loss.
LEAST, MOST = 0.1, 10.0


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of a training run.

    Args:
        name: the recipe's name.
        steps: optimizer steps.
        batch_size: images per step, over all processes and accumulated batches.
        learning_rate: AdamW's peak learning rate, reached after warm-up. It is for steps of `batch_size` images.
        backbone_multiplier: factor on the learning rate for the backbone's parameters.
        weight_decay: applies to weights, but not to norms, embeddings and biases.
        schedule: "step" (divided by 10 at 0.9 and again at 0.95 of the steps), "poly" (power 0.9, to 0) or "cosine"
            (to 0).
        warmup_steps: steps over which the learning rate rises from 0.
        clip: the gradient norm is clipped to this.
        ema_decay: decay of the exponential moving average of the weights, which is evaluated and saved; 0 for none.
        mask_points: points at which matching and losses compare masks; None for the model's own `train_num_points`.
        backbone_steps: steps that train a new backbone alone, before the whole model (see `backbone.py`). They do not
            count toward `steps`.
        backbone_learning_rate: peak learning rate of the backbone steps.
        evaluation_size: for new models, the shorter edge of evaluated images in pixels; None for the model's own.
        sync_norm: synchronize batch norms over all processes, if each has a GPU.
        augmentations: applied to each training item by `TrainingItems`; the collator then does not resize.
        source: where the values come from.
    """

    name: str
    steps: int
    batch_size: int
    learning_rate: float = 1e-4
    backbone_multiplier: float = 0.1
    weight_decay: float = 0.05
    schedule: str = "step"
    warmup_steps: int = 0
    clip: float = 0.01
    ema_decay: float = 0.0
    mask_points: int | None = None
    backbone_steps: int = 0
    backbone_learning_rate: float = 1e-3
    evaluation_size: int | None = None
    sync_norm: bool = False
    augmentations: tuple[Augmentation, ...] = ()
    source: str = ""

    def rate(self, step: int) -> float:
        """The factor of the learning rate at a step, 0..1."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        share = min(step / max(self.steps, 1), 1.0)
        if self.schedule == "step":
            return 1.0 if share < 0.9 else 0.1 if share < 0.95 else 0.01
        if self.schedule == "poly":
            return (1 - share) ** 0.9
        return 0.5 * (1 + math.cos(math.pi * share))

    def __post_init__(self) -> None:
        if self.schedule not in ("step", "poly", "cosine"):
            raise ValueError(f"Recipe {self.name}: schedule must be step, poly or cosine, got {self.schedule!r}.")


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("ade20k-semantic", steps=160_000, batch_size=16, schedule="poly",
               augmentations=mask2former_semantic_augmentations(),
               source="Mask2Former (CVPR 2022), section 4.1, semantic segmentation"),
        Recipe("coco-instance", steps=368_750, batch_size=16, schedule="step", warmup_steps=10,
               augmentations=coco_augmentations(1024),
               source="Mask2Former (CVPR 2022), section 4.1, 50 epochs"),
        Recipe("coco-panoptic", steps=368_750, batch_size=16, schedule="step", warmup_steps=10,
               augmentations=coco_augmentations(1024),
               source="Mask2Former (CVPR 2022), section 4.1, 50 epochs"),
        # For semantic, instance and panoptic segmentation.
        Recipe("cityscapes", steps=90_000, batch_size=16, schedule="poly", evaluation_size=1024, sync_norm=True,
               augmentations=mask2former_semantic_augmentations(1024, 512, 1024, 4096, 1.0),
               source="Mask2Former (CVPR 2022), appendix A.1, and its published configs/cityscapes"),
        Recipe("finetune", steps=2_000, batch_size=8, schedule="cosine", warmup_steps=100, clip=0.1, ema_decay=0.999,
               augmentations=focoos_augmentations(640),
               source="our own, for a few hundred images, starting from trained weights"),
        Recipe("from-scratch", steps=6_000, batch_size=8, learning_rate=6e-4, backbone_multiplier=1.0,
               schedule="cosine", warmup_steps=100, clip=5.0, ema_decay=0.998,
               mask_points=2048, evaluation_size=640, augmentations=SMALL_CROPS,
               source="our own, for a few hundred images, starting from random weights; measured on CamVid"),
        Recipe("digits", steps=9_000, batch_size=8, learning_rate=6e-4, backbone_multiplier=1.0, schedule="cosine",
               warmup_steps=150, clip=5.0, ema_decay=0.998, backbone_steps=4_000,
               source="our own, for scenes of digits, from scratch; 72 minutes on one CPU core"),
    )
}  # fmt: skip


def find_recipe(name: str) -> Recipe:
    """Looks up a recipe by name.

    Raises:
        ValueError: there is no such recipe; the message lists the known ones.
    """
    if name not in RECIPES:
        nearest = nearest_name(name, RECIPES)
        hint = f" Did you mean {nearest!r}?" if nearest else ""
        raise ValueError(f"There is no recipe {name!r}. Known: {', '.join(RECIPES)}.{hint}")
    return RECIPES[name]


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, object]]:
    """AdamW's parameter groups: backbone or not, decayed or not. Frozen parameters are left out."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            decayed = not isinstance(module, UNDECAYED) and not name.endswith("bias") and "position" not in name
            # Not only at the start: torch.compile, DistributedDataParallel and PEFT prefix the names.
            groups.setdefault(("backbone" in module_name.split("."), decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": recipe.learning_rate * (recipe.backbone_multiplier if backbone else 1.0),
            "weight_decay": recipe.weight_decay if decayed else 0.0,
        }
        for (backbone, decayed), parameters in sorted(groups.items(), key=lambda group: group[0])
    ]


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """The recipe's AdamW, for a Trainer or your own training loop."""
    return torch.optim.AdamW(parameter_groups(model, recipe), lr=recipe.learning_rate)


def make_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe) -> torch.optim.lr_scheduler.LambdaLR:
    """The recipe's learning rate schedule. Call its `step` once per optimizer step."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.rate)


def averaged_weights(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of a model's weights and buffers; call its `update_parameters` after each step.

    After n updates the decay is (1 + n) / (10 + n), up to `decay`, as in TensorFlow's ExponentialMovingAverage. With a
    fixed decay of 0.998, 500 steps would leave more than a third of a new model's random weights in the average.
    Integers, such as Swin's indices, are copied.
    """

    def update(averaged: Any, current: Any, count: Tensor | int) -> None:
        if not averaged[0].is_floating_point():  # all tensors of a call have one type
            torch._foreach_copy_(averaged, current)
            return
        get_ema_multi_avg_fn(min(decay, (1 + int(count)) / (10 + int(count))))(averaged, current, count)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)


class AverageCallback(TrainerCallback):
    """Keeps an exponential moving average of the weights and saves it with every checkpoint."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.averaged = averaged_weights(model, decay)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts from the model's weights, unless the run is resumed with the average of its checkpoint."""
        self.averaged.to(args.device)
        if state.global_step == 0:
            self.averaged.module.load_state_dict(kwargs["model"].state_dict())
            self.averaged.n_averaged.zero_()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Updates the average after a step."""
        self.averaged.update_parameters(kwargs["model"])

    def save(self, folder: Path) -> None:
        """Writes the average to a checkpoint."""
        state = {key: value.contiguous().cpu() for key, value in self.averaged.state_dict().items()}
        save_file(state, folder / AVERAGE_FILE)

    def load(self, folder: Path) -> None:
        """Reads the average of a checkpoint."""
        self.averaged.load_state_dict(load_file(folder / AVERAGE_FILE))


def gradient_norm(parameters: Any) -> Tensor:
    """The norm of all gradients, a scalar tensor. It is finite if all gradients are."""
    return torch.nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])


def follow_recipe(arguments: TrainingArguments, recipe: Recipe, unused: Sequence[str] = ()) -> None:
    """Sets the steps and clipping of training arguments to the recipe's; warns of others that the recipe overrides.

    A process also uses one GPU only: if there were more, Trainer would use `torch.nn.DataParallel`, which splits each
    image's masks instead of the batch.

    Args:
        arguments: changed in-place. `max_steps` may be less than the recipe's steps, to stop early.
        recipe: the recipe.
        unused: names of arguments that the caller passed, but that would have no effect.

    Raises:
        SettingsError: there are `unused` arguments, label smoothing is requested, or `max_steps` exceeds the recipe's
            steps.
    """
    unused = [*unused, *(["label_smoothing_factor"] if arguments.label_smoothing_factor else [])]
    if unused:
        raise SettingsError(
            f"FaiM2FTrainer does not use {unused[0]}: leave it out, and measure with an evaluator, or take "
            "transformers' own Trainer."
        )
    if arguments.max_steps > recipe.steps:
        raise SettingsError(
            f"max_steps is {arguments.max_steps}, but the learning rate of the recipe {recipe.name} ends after "
            f"{recipe.steps} steps: pass dataclasses.replace(recipe, steps={arguments.max_steps})."
        )
    usual = {field.name: field.default for field in fields(TrainingArguments)}
    has_epochs = arguments.max_steps <= 0 and arguments.num_train_epochs != usual["num_train_epochs"]
    if arguments.max_steps <= 0:
        arguments.max_steps = recipe.steps
    own = {"learning_rate": recipe.learning_rate, "weight_decay": recipe.weight_decay, "max_grad_norm": recipe.clip}
    told = [name for name, value in own.items() if getattr(arguments, name) not in (usual[name], value)]
    told += [name for name in OF_SCHEDULE if getattr(arguments, name, None) not in (usual.get(name), None, 0)]
    ignored = [name for name in OF_OPTIMIZER if getattr(arguments, name) not in (usual[name], *ADAMW)]
    if ignored := [*ignored, *(["num_train_epochs"] if has_epochs else [])]:
        logger.warning(
            f"FaiM2FTrainer ignores {', '.join(ignored)}: it uses AdamW with its usual betas, for the steps of the "
            f"recipe {recipe.name}."
        )
    if told:
        logger.warning(
            f"FaiM2FTrainer takes {', '.join(told)} from the recipe {recipe.name}, and not from its args: change the "
            "recipe with dataclasses.replace."
        )
    arguments.max_grad_norm = recipe.clip
    if arguments.push_to_hub and recipe.ema_decay and arguments.hub_strategy != HubStrategy.END:
        logger.warning(
            "The Hub gets the model from save_model and push_to_hub only, because checkpoints hold the weights before "
            "averaging."
        )
        arguments.hub_strategy = HubStrategy.END
    if arguments.n_gpu > 1:
        logger.warning(
            f"Training uses one of {arguments.n_gpu} GPUs. To use all, start a process for each with torchrun or "
            "accelerate launch."
        )
        arguments._n_gpu = 1  # as Trainer does for models that are spread over GPUs


def balanced_weights(counts: ClassCounts) -> list[float]:
    """Weights that give each of C classes the same share of the loss: N / (C n) for a class with n of N segments.

    This is scikit-learn's "balanced" (King and Zeng, "Logistic Regression in Rare Events Data", 2001). It counts
    segments, not pixels, because the loss classifies one query for each segment. Without bounds, the mean over the
    segments is 1. Weights are limited to 0.1..10. A class without segments in a sample of the data gets 10.

    Args:
        counts: counts of the training data.

    Raises:
        DatasetError: a class does not occur in the data.
    """
    if counts.absent and not counts.is_sample:
        raise DatasetError(
            f"Balanced class weights need every class in the training data, but {counts.absent[0]!r} is in no image: "
            "remove it from the labels, or name the weights (--class-weights NAME:WEIGHT,...)."
        )
    total = sum(counts.segments)
    return [
        min(MOST, max(LEAST, total / (len(counts.segments) * number))) if number else MOST for number in counts.segments
    ]


def weight_words(words: Sequence[str]) -> tuple[str, ...]:
    """Normalizes the user's class weights to "NAME: WEIGHT".

    Args:
        words: entries NAME:WEIGHT, or one file with an entry per line; empty lines and lines starting with # are
            skipped.

    Raises:
        SettingsError: an entry has another format, or the file is not text.
        OSError: the file cannot be read.
    """
    if len(words) == 1 and Path(words[0]).is_file():
        try:
            lines = [line.strip() for line in read_text(Path(words[0])).split("\n")]
        except ValueError as error:
            raise SettingsError(f"{words[0]}: {error}.") from error
        words = [line for line in lines if line and not line.startswith("#")]
    for word in words:
        if ":" not in word:
            raise SettingsError(
                f"class_weights must be {BALANCED}, NAME:WEIGHT,... or a file of such lines, not {word!r}."
            )
    return tuple(": ".join(part.strip() for part in word.rsplit(":", 1)) for word in words)


def read_class_weights(words: Sequence[str], labels: Sequence[str]) -> list[float]:
    """The weight of each class: 1 if it is not named.

    Args:
        words: from `weight_words`.
        labels: the class names in the order of their ids.

    Raises:
        SettingsError: a name is unknown or repeated, or a weight is not a number above 0.
    """
    weights: dict[str, float] = {}
    for word in words:
        name, _, number = word.rpartition(": ")
        if name not in labels:
            nearest = nearest_name(name, labels)
            hint = f" Did you mean {nearest!r}?" if nearest else ""
            raise SettingsError(f"class_weights names {name!r}, which is not a class of the data.{hint}")
        if name in weights:
            raise SettingsError(f"class_weights names {name!r} twice.")
        try:
            weights[name] = float(number)
        except ValueError:
            weights[name] = math.nan
        if not 0 < weights[name] < math.inf:
            raise SettingsError(f"class_weights: the weight of {name!r} must be a number above 0, not {number!r}.")
    return [weights.get(label, 1.0) for label in labels]

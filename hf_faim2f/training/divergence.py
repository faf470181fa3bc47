"""Divergence: a loss, a gradient or a weight that is NaN or infinite stops a run before anything of it is kept."""

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# A gradient scaler that has gone down to this still finds gradients that overflow: they do so without any scale.
LEAST_SCALE = 1.0


class DivergenceError(RuntimeError):
    """A training has diverged. One sentence of what was seen in which step, and one of what to try.

    Attributes:
        bad_weights: the step after which the weights were such that the losses of the next are not finite; None where
            that is not known.
    """

    bad_weights: int | None = None


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


__all__ = ["LEAST_SCALE", "DivergenceCallback", "DivergenceError", "diverged", "gradient_norm"]

"""The check for weights that are NaN or infinite: with them a model answers one class everywhere, and says nothing."""

from pathlib import Path

import torch
from torch import nn


def first_not_finite(model: nn.Module) -> str | None:
    """The name of the first parameter or buffer with a value that is NaN or infinite; None where all are finite."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return name
    return None


def check_finite(source: str | Path, model: nn.Module, error: type[Exception]) -> None:
    """Before a model answers, is trained further, or is exported.

    Args:
        source: the folder or Hub id that the weights came from, for the message.
        model: with its weights loaded.
        error: what is raised where a weight is not finite, with one sentence that says what to do.
    """
    name = first_not_finite(model)
    if name is not None:
        raise error(
            f"{source} has weights that are not finite, the first {name}: the training that wrote them diverged. Take "
            "an earlier checkpoint, or train again with a lower learning rate."
        )


__all__ = ["check_finite", "first_not_finite"]

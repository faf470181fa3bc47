"""Compatibility with transformers 4.57 and 5.x: names that moved, and defaults and initialization that changed."""

from typing import Any

import transformers
from torch import Tensor

try:  # transformers 5.x
    from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
except ImportError:  # transformers 4.57
    from transformers.utils.backbone_utils import BackboneConfigMixin, BackboneMixin

try:  # transformers 5.x; does not change loaded weights
    from transformers.initialization import copy_ as initialize_with
except ImportError:  # transformers 4.57, which initializes only new weights

    def initialize_with(tensor: Tensor, other: Tensor) -> Tensor:
        """Copies `other` into a new weight."""
        return tensor.data.copy_(other)


def start_backbone(backbone: BackboneMixin, config: Any) -> None:
    """Sets `stage_names` and `out_features`; in 5.x the mixin does this, in 4.57 each backbone has to."""
    if hasattr(backbone, "_init_backbone"):
        backbone._init_backbone(config)


def returns_dictionary(config: Any, return_dict: bool | None) -> bool:
    """Whether a call returns a ModelOutput: `return_dict`, or the configuration's value if that is None.

    `torchscript=True` in the configuration (in 5.x only read from files) means tuples, for `torch.jit.trace`.
    """
    if return_dict is None:
        return bool(config.return_dict) and not getattr(config, "torchscript", False)
    return return_dict


class CheckpointsWithoutReentry:
    """Mixin of models: gradient checkpointing is not reentrant, unless the caller asks for it.

    Reentrant checkpointing, the default of 4.57, drops the gradients of a layer whose inputs need none, such as the
    first trained layer behind a frozen backbone.
    """

    if transformers.__version__.startswith("4."):

        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
            """Like transformers' method, with its 5.x default of `{"use_reentrant": False}`."""
            super().gradient_checkpointing_enable(  # type: ignore[misc]
                gradient_checkpointing_kwargs or {"use_reentrant": False}
            )

    def enable_input_require_grads(self) -> None:
        """Does nothing: only reentrant checkpointing needs inputs that require gradients."""

    def disable_input_require_grads(self) -> None:
        """Does nothing, like `enable_input_require_grads`."""


__all__ = [
    "BackboneConfigMixin",
    "BackboneMixin",
    "CheckpointsWithoutReentry",
    "initialize_with",
    "returns_dictionary",
    "start_backbone",
]

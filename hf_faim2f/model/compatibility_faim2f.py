"""Bridges transformers 4.57 and 5.x: names that moved, and a step that became implicit."""

from typing import Any

from torch import Tensor

try:  # transformers 5.x
    from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
except ImportError:  # transformers 4.57
    from transformers.utils.backbone_utils import BackboneConfigMixin, BackboneMixin

try:  # transformers 5.x; leaves loaded weights alone
    from transformers.initialization import copy_ as initialize_with
except ImportError:  # transformers 4.57, which calls it for new weights only

    def initialize_with(tensor: Tensor, other: Tensor) -> Tensor:
        """Copies `other` into a new weight."""
        return tensor.data.copy_(other)


def start_backbone(backbone: BackboneMixin, config: Any) -> None:
    """Sets `stage_names` and `out_features`, which 4.57 leaves to each backbone and 5.x does in the mixin."""
    if hasattr(backbone, "_init_backbone"):
        backbone._init_backbone(config)


def returns_dictionary(config: Any, return_dict: bool | None) -> bool:
    """Whether a call returns a ModelOutput: `return_dict`, or the configuration's value if that is None.

    `torchscript` in the configuration, which 5.x only keeps from files, means tuples, for `torch.jit.trace`.
    """
    if return_dict is None:
        return bool(config.return_dict) and not getattr(config, "torchscript", False)
    return return_dict


__all__ = ["BackboneConfigMixin", "BackboneMixin", "initialize_with", "returns_dictionary", "start_backbone"]

"""Compatibility with transformers 4.57 and 5.x: names that moved, and initialization that became implicit."""

from typing import Any

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


__all__ = ["BackboneConfigMixin", "BackboneMixin", "initialize_with", "returns_dictionary", "start_backbone"]

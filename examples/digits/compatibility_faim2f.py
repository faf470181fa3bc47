"""The one place where transformers 4.57 and 5.x are bridged: names that moved, and a step that became implicit."""

from typing import Any

from torch import Tensor

try:  # transformers 5.x
    from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
except ImportError:  # transformers 4.57
    from transformers.utils.backbone_utils import BackboneConfigMixin, BackboneMixin

try:  # transformers 5.x, where it leaves alone what was loaded
    from transformers.initialization import copy_ as initialize_with
except ImportError:  # transformers 4.57, which does not ask for what was loaded

    def initialize_with(tensor: Tensor, other: Tensor) -> Tensor:
        """Copies into a weight that is new."""
        return tensor.data.copy_(other)


def start_backbone(backbone: BackboneMixin, config: Any) -> None:
    """Sets `stage_names` and `out_features`, which 4.57 leaves to each backbone and 5.x does in the mixin."""
    if hasattr(backbone, "_init_backbone"):
        backbone._init_backbone(config)


def returns_dictionary(config: Any, return_dict: bool | None) -> bool:
    """What a call returns whose caller says `return_dict`: where None, what the configuration says.

    `torchscript`, which 4.57 has as a parameter and 5.x keeps as it finds it, means tuples, for `torch.jit.trace`.
    """
    if return_dict is None:
        return bool(config.return_dict) and not getattr(config, "torchscript", False)
    return return_dict


__all__ = ["BackboneConfigMixin", "BackboneMixin", "initialize_with", "returns_dictionary", "start_backbone"]

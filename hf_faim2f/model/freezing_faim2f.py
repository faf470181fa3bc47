"""Frozen parts of a model's backbone, and frozen batch norms."""

from typing import Any

from torch import nn

BatchNorm = nn.modules.batchnorm._BatchNorm  # also SyncBatchNorm, to which distributed training converts


class FreezesBackbone:
    """Mixin of models: the parts that `backbone_freeze_at` and `backbone_freeze_norm` name are not trained.

    Their parameters require no gradient from the start, because DistributedDataParallel and optimizers look at them
    before the model first goes into training mode.
    """

    config: Any
    backbone: Any
    is_optimized_for_inference: bool

    @classmethod
    def from_pretrained(cls, *inputs: Any, **kwargs: Any) -> Any:
        """Like the parent's method; the loaded parameters are frozen as configured."""
        loaded = super().from_pretrained(*inputs, **kwargs)  # type: ignore[misc]
        (loaded[0] if isinstance(loaded, tuple) else loaded)._freeze()
        return loaded

    def train(self, mode: bool = True) -> Any:
        """Sets training or evaluation mode; frozen parts of the backbone stay frozen.

        Raises:
            ValueError: the model was optimized for inference.
        """
        if mode and self.is_optimized_for_inference:
            raise ValueError(
                "A model that was optimized for inference lost its batch norms and cannot be trained: load it again."
            )
        super().train(mode)  # type: ignore[misc]
        if not mode:
            return self
        self._freeze()
        # PEFT does not save the statistics of frozen layers with its adapters, so they must not change.
        for module in self.modules() if hasattr(self, "peft_config") else ():  # type: ignore[attr-defined]
            if isinstance(module, BatchNorm) and not module.weight.requires_grad:
                module.eval()
        return self

    def _freeze(self) -> None:
        """Freezes the parts of the backbone that the configuration names; ValueError if it has no such parts."""
        for stage in self._frozen_stages():
            stage.requires_grad_(False)
        for module in self.backbone.modules() if self.config.backbone_freeze_norm else ():
            if isinstance(module, BatchNorm):
                module.eval().requires_grad_(False)

    def _frozen_stages(self) -> list[nn.Module]:
        """The stem and stages that `backbone_freeze_at` freezes."""
        count = self.config.backbone_freeze_at
        if count < 0:
            return []
        backbone = self.backbone
        if hasattr(backbone, "stem") and hasattr(backbone, "stages"):
            return [backbone.stem, *backbone.stages[:count]]
        if hasattr(backbone, "embedder") and hasattr(getattr(backbone, "encoder", None), "stages"):
            return [backbone.embedder, *backbone.encoder.stages[:count]]
        raise ValueError(
            f"FaiM2FConfig: `backbone_freeze_at` = {count} is for STDC and ResNet; of {type(backbone).__name__} freeze "
            "parameters yourself by `requires_grad_(False)`."
        )


__all__ = ["FreezesBackbone"]

"""ResNet variants a, b and c in the shape of Focoos's models; variant d is transformers' `RTDetrResNetBackbone`.

They differ from it in the stem (a and b: one 7x7 convolution) and in the strided shortcut (one strided 1x1
convolution in place of a pooling before it), so only these are replaced.
"""

from torch import nn
from transformers import RTDetrResNetBackbone
from transformers.models.rt_detr.modeling_rt_detr_resnet import RTDetrResNetConvLayer, RTDetrResNetShortCut

from .configuration_faim2f import FaiM2FResNetConfig


class FaiM2FResNetBackbone(RTDetrResNetBackbone):
    """ResNet-18 to 152, variants a, b and c: feature maps at 1/4 (the stem and stage1) to 1/32."""

    config_class = FaiM2FResNetConfig
    _supports_sdpa = True  # any implementation of attention will do where there is none

    def __init__(self, config: FaiM2FResNetConfig) -> None:
        super().__init__(config)
        if config.variant in ("a", "b"):
            stem = RTDetrResNetConvLayer(
                config.num_channels, config.embedding_size, kernel_size=7, stride=2, activation=config.hidden_act
            )
            self.embedder.embedder = nn.Sequential(stem)
        for in_channels, out_channels, stage in zip(
            config.hidden_sizes, config.hidden_sizes[1:], self.encoder.stages[1:], strict=False
        ):
            stage.layers[0].shortcut = RTDetrResNetShortCut(in_channels, out_channels, stride=2)
        # The modules just made have not been through the initialization that the parent's constructor ended with.
        self.post_init()


__all__ = ["FaiM2FResNetBackbone", "FaiM2FResNetConfig"]

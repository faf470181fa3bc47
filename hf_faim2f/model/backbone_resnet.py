"""ResNet variants a, b and c, as in Focoos's models; variant d is transformers' `RTDetrResNetBackbone`.

They differ from variant d in the stem (a and b: one 7x7 convolution) and in the strided shortcut (a strided 1x1
convolution instead of pooling and a 1x1 convolution), so only these parts are replaced.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PretrainedConfig, RTDetrResNetBackbone
from transformers.models.rt_detr.modeling_rt_detr_resnet import RTDetrResNetConvLayer, RTDetrResNetShortCut

from .compatibility_faim2f import BackboneConfigMixin
from .configuration_checks_faim2f import ReadFromFile, choose_feature_maps, is_int, refuse_unknown_keywords, require


class FaiM2FResNetConfig(ReadFromFile, BackboneConfigMixin, PretrainedConfig):
    """Configuration of the ResNet variants a, b and c of Focoos's models (variant d is transformers' RTDetrResNet).

    Variants (He et al., "Bag of Tricks", CVPR 2019, section 4): "a" has the stride in a bottleneck's first 1x1
    convolution and "b" in its 3x3 convolution; both have the 7x7 stem. "c" is "b" with a stem of three 3x3
    convolutions. In all of them the strided shortcut is one strided 1x1 convolution.

    Args:
        variant: "a", "b" or "c".
        num_channels, embedding_size, hidden_sizes, depths, layer_type, hidden_act: as in `RTDetrResNetConfig`.
        out_features, out_indices: which of "stem", "stage1" (1/4) ... "stage4" (1/32) the backbone returns.
    """

    model_type = "faim2f_resnet"

    def __init__(
        self,
        variant: str = "c",
        num_channels: int = 3,
        embedding_size: int = 64,
        hidden_sizes: Sequence[int] = (256, 512, 1024, 2048),
        depths: Sequence[int] = (3, 4, 6, 3),
        layer_type: str = "bottleneck",
        hidden_act: str = "relu",
        out_features: list[str] | None = None,
        out_indices: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        refuse_unknown_keywords(type(self), kwargs)
        kwargs.pop("stage_names", None)
        super().__init__(**kwargs)
        self.variant = variant
        self.num_channels = num_channels
        self.embedding_size = embedding_size
        self.hidden_sizes = list(hidden_sizes)
        self.depths = list(depths)
        self.layer_type = layer_type
        self.hidden_act = hidden_act
        require(self, variant in ("a", "b", "c"), "variant", '"a", "b" or "c" (variant d is RTDetrResNetConfig)')
        require(self, layer_type in ("basic", "bottleneck"), "layer_type", '"basic" or "bottleneck"')
        four = len(self.depths) == len(self.hidden_sizes) == 4 and all(is_int(d, 1) for d in self.depths)
        require(self, four, "depths", "four positive integers, as many as hidden_sizes")
        self.stage_names = ["stem", "stage1", "stage2", "stage3", "stage4"]
        choose_feature_maps(self, out_features, out_indices)

    @property
    def downsample_in_bottleneck(self) -> bool:
        """Whether a bottleneck's stride is in its first 1x1 convolution (variant a) instead of the 3x3."""
        return self.variant == "a"

    @property
    def downsample_in_first_stage(self) -> bool:
        """Always False: the stem's pooling already reduces the image to 1/4."""
        return False


class FaiM2FResNetBackbone(RTDetrResNetBackbone):
    """ResNet-18 to 152, variants a, b and c: feature maps at 1/4 (the stem and stage1) to 1/32."""

    config_class = FaiM2FResNetConfig
    _supports_sdpa = True  # there is no attention, so any implementation is fine

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
        # Again, to initialize the modules added after the parent's constructor.
        self.post_init()


__all__ = ["FaiM2FResNetBackbone", "FaiM2FResNetConfig"]

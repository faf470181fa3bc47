"""The pixel decoder: a feature pyramid, with transformer layers on its coarsest level where the configuration asks.

Lin et al., "Feature Pyramid Networks" (CVPR 2017), as MaskFormer (Cheng et al., NeurIPS 2021, section 3.2) uses it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_faim2f import FaiM2FAttention, sine_position_embedding
from .configuration_faim2f import FaiM2FConfig


@dataclass
class PixelDecoderOutput:
    """mask_features (B, mask_feature_size, H/4, W/4); pyramid: the three coarsest maps (B, feature_size, h, w),
    coarse to fine."""

    mask_features: Tensor
    pyramid: list[Tensor]


class FaiM2FConvolution(nn.Module):
    """Convolution without bias, batch norm and, if named, an activation; keeps the size."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, activation: str | None = None) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.normalization = nn.BatchNorm2d(out_channels)
        self.activation = ACT2FN[activation] if activation else None

    def forward(self, hidden_state: Tensor) -> Tensor:
        hidden_state = self.normalization(self.convolution(hidden_state))
        return hidden_state if self.activation is None else self.activation(hidden_state)


class FaiM2FEncoderLayer(GradientCheckpointingLayer):
    """Pre-norm transformer encoder layer (Carion et al., DETR, appendix A.4)."""

    def __init__(self, config: FaiM2FConfig) -> None:
        super().__init__()
        size = config.feature_size
        self.self_attention_norm = nn.LayerNorm(size)
        self.self_attention = FaiM2FAttention(config, size, config.encoder_attention_heads, config.encoder_dropout)
        self.feed_forward_norm = nn.LayerNorm(size)
        self.linear1 = nn.Linear(size, config.encoder_feedforward_dim)
        self.activation = ACT2FN[config.activation_function]
        self.linear2 = nn.Linear(config.encoder_feedforward_dim, size)
        self.dropout = nn.Dropout(config.encoder_dropout)

    def forward(self, hidden_states: Tensor, position: Tensor) -> Tensor:
        """(B, hw, feature_size) to the same; `position` (1, hw, feature_size)."""
        normed = self.self_attention_norm(hidden_states)
        placed = normed + position
        attended, _ = self.self_attention(placed, placed, normed)
        hidden_states = hidden_states + self.dropout(attended)
        inner = self.dropout(self.activation(self.linear1(self.feed_forward_norm(hidden_states))))
        return hidden_states + self.dropout(self.linear2(inner))


class FaiM2FPixelDecoder(nn.Module):
    """Backbone feature maps, fine to coarse, to mask features and the three levels that the queries look at."""

    def __init__(self, config: FaiM2FConfig, in_channels: list[int]) -> None:
        """
        Args:
            in_channels: channels of the backbone's feature maps, fine to coarse.
        """
        super().__init__()
        size = config.feature_size
        coarsest = in_channels[-1]
        self.input_projection = nn.Conv2d(coarsest, size, 1) if config.encoder_layers else None
        self.encoder_layers = nn.ModuleList([FaiM2FEncoderLayer(config) for _ in range(config.encoder_layers)])
        self.encoder_norm = nn.LayerNorm(size) if config.encoder_layers else None
        # Coarse to fine, as the forward pass goes; the coarsest level has no lateral connection.
        self.lateral_convolutions = nn.ModuleList(
            [FaiM2FConvolution(channels, size, 1) for channels in reversed(in_channels[:-1])]
        )
        first = FaiM2FConvolution(size if config.encoder_layers else coarsest, size, 3, "relu")
        self.output_convolutions = nn.ModuleList(
            [first, *(FaiM2FConvolution(size, size, 3, "relu") for _ in in_channels[:-1])]
        )
        self.mask_projection = nn.Conv2d(size, config.mask_feature_size, 3, padding=1)

    def _encode(self, features: Tensor) -> Tensor:
        """The coarsest map (B, C, h, w) through the transformer layers, as (B, feature_size, h, w)."""
        assert self.input_projection is not None and self.encoder_norm is not None
        features = self.input_projection(features)
        position = sine_position_embedding(features)
        hidden_states = features.flatten(2).transpose(1, 2)  # (B, hw, C)
        for layer in self.encoder_layers:
            hidden_states = layer(hidden_states, position)
        # `reshape` would ask whether a copy is needed, which torch.compile cannot say of a batch of unknown size.
        return self.encoder_norm(hidden_states).transpose(1, 2).contiguous().view(features.shape)

    def forward(self, feature_maps: tuple[Tensor, ...]) -> PixelDecoderOutput:
        """`feature_maps`: (B, channels, H/stride, W/stride) each, fine to coarse."""
        fine_to_coarse = list(feature_maps)
        coarsest = fine_to_coarse.pop()
        if self.input_projection is not None:
            coarsest = self._encode(coarsest)
        pyramid = [self.output_convolutions[0](coarsest)]
        for lateral, output in zip(self.lateral_convolutions, self.output_convolutions[1:], strict=True):
            pyramid.append(output(_add_upsampled(lateral(fine_to_coarse.pop()), pyramid[-1])))
        return PixelDecoderOutput(mask_features=self.mask_projection(pyramid[-1]), pyramid=pyramid[:3])


def _add_upsampled(level: Tensor, coarser: Tensor) -> Tensor:
    """level (B, C, h, w), which nobody else reads, plus the coarser level, brought to its size by nearest neighbor."""
    # Those that read the graph know resizing better; and even a look at a size would tie them to it.
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if tracing or torch.is_grad_enabled() or not _is_twice(level, coarser):
        return level + nn.functional.interpolate(coarser, size=level.shape[-2:], mode="nearest")
    # Each pixel is added to four where they are, and no map of the large size is made only to be added.
    level.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).add_(coarser[:, :, :, None, :, None])
    return level


def _is_twice(level: Tensor, coarser: Tensor) -> bool:
    """Odd sizes are not."""
    return level.shape[-2] == 2 * coarser.shape[-2] and level.shape[-1] == 2 * coarser.shape[-1]


__all__ = ["FaiM2FPixelDecoder", "PixelDecoderOutput"]

"""Pixel decoders: from backbone feature maps to mask features and the three levels that the queries attend to.

- `FaiM2FPixelDecoder`: a feature pyramid (Lin et al., "Feature Pyramid Networks", CVPR 2017), as MaskFormer uses it
  (Cheng et al., NeurIPS 2021, section 3.2), optionally with transformer layers on its coarsest level.
- `FaiM2FDeformablePixelDecoder`: Mask2Former's own (Cheng et al., CVPR 2022, appendix B): deformable attention (Zhu et
  al., "Deformable DETR", ICLR 2021, section 4.1) over three levels, then a feature pyramid up to the finest level. The
  attention samples with `grid_sample`, which every runtime supports.

`pixel_decoder_bisenet.py` has the third, that of BiSeNetFormer.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations import use_kernel_forward_from_hub
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_faim2f import FaiM2FAttention, LearnedTable, sine_position_embedding
from .configuration_faim2f import FaiM2FConfig


@dataclass
class PixelDecoderOutput:
    """The output of a pixel decoder."""

    mask_features: Tensor  # (B, mask_feature_size, H/4, W/4), H/8 and W/8 in BiSeNetFormer
    pyramid: list[Tensor]  # the decoder's levels, (B, feature_size, h, w) each, coarse to fine


class FaiM2FConvolution(nn.Module):
    """Convolution without bias, batch norm and an optional activation; keeps the spatial size."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, activation: str | None = None) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.normalization = nn.BatchNorm2d(out_channels)
        self.activation = ACT2FN[activation] if activation else None

    def forward(self, hidden_state: Tensor) -> Tensor:
        """(B, in, h, w) to (B, out, h, w)."""
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
    """Feature pyramid, with transformer layers on the coarsest level if `encoder_layers` is not 0."""

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
        # Coarse to fine, in the order of the forward pass; the coarsest level has no lateral connection.
        self.lateral_convolutions = nn.ModuleList(
            [FaiM2FConvolution(channels, size, 1) for channels in reversed(in_channels[:-1])]
        )
        first = FaiM2FConvolution(size if config.encoder_layers else coarsest, size, 3, "relu")
        self.output_convolutions = nn.ModuleList(
            [first, *(FaiM2FConvolution(size, size, 3, "relu") for _ in in_channels[:-1])]
        )
        self.mask_projection = nn.Conv2d(size, config.mask_feature_size, 3, padding=1)

    def _encode(self, features: Tensor) -> Tensor:
        """Applies the transformer layers to the coarsest map (B, C, h, w); returns (B, feature_size, h, w)."""
        assert self.input_projection is not None and self.encoder_norm is not None
        features = self.input_projection(features)
        position = sine_position_embedding(features)
        hidden_states = features.flatten(2).transpose(1, 2)  # (B, hw, C)
        for layer in self.encoder_layers:
            hidden_states = layer(hidden_states, position)
        # Not `reshape`: with a dynamic batch size, torch.compile cannot tell whether it copies.
        return self.encoder_norm(hidden_states).transpose(1, 2).contiguous().view(features.shape)

    def forward(self, feature_maps: tuple[Tensor, ...]) -> PixelDecoderOutput:
        """`feature_maps`: (B, channels, H/stride, W/stride) each, fine to coarse."""
        fine_to_coarse = list(feature_maps)
        coarsest = fine_to_coarse.pop()
        if self.input_projection is not None:
            coarsest = self._encode(coarsest)
        pyramid = [self.output_convolutions[0](coarsest)]
        for lateral, output in zip(self.lateral_convolutions, self.output_convolutions[1:], strict=True):
            pyramid.append(output(_add_upsampled(lateral, fine_to_coarse.pop(), pyramid[-1])))
        return PixelDecoderOutput(mask_features=self.mask_projection(pyramid[-1]), pyramid=pyramid[:3])


def _add_upsampled(lateral: nn.Module, feature_map: Tensor, coarser: Tensor) -> Tensor:
    """The layer's output (B, C, h, w) plus the coarser level, upsampled by nearest neighbor."""
    level = lateral(feature_map)
    # Traced graphs use the standard operation and must not depend on the traced image size.
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    # A forward hook may keep the layer's output, which must then not change.
    if (
        tracing or torch.is_grad_enabled() or not _is_twice(level, coarser)
        or any(module._forward_hooks for module in lateral.modules())
    ):  # fmt: skip
        return level + nn.functional.interpolate(coarser, size=level.shape[-2:], mode="nearest")
    # Adds each coarse pixel to its four fine pixels, without a full-size temporary.
    level.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).add_(coarser[:, :, :, None, :, None])
    return level


def _is_twice(level: Tensor, coarser: Tensor) -> bool:
    """Whether each side is exactly twice that of the coarser level; false for odd sizes."""
    return level.shape[-2] == 2 * coarser.shape[-2] and level.shape[-1] == 2 * coarser.shape[-1]


NUM_LEVELS = 3  # the coarsest of the backbone's feature maps
NORM_GROUPS = 32


class FaiM2FSamplingOffsets(nn.Linear):
    """Linear layer from a token to its sampling offsets in pixels: (x, y) for each head, level and point."""

    def __init__(self, size: int, num_heads: int, num_points: int) -> None:
        super().__init__(size, num_heads * NUM_LEVELS * num_points * 2)
        self.num_heads, self.num_points = num_heads, num_points

    def first_offsets(self) -> Tensor:
        """Initial bias: each head samples in its own direction, and each point is one pixel further out."""
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        directions = torch.stack((angles.cos(), angles.sin()), -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)  # project onto the border of a square
        steps = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        offsets = directions[:, None, None] * steps[None, None, :, None]  # (heads, 1, points, 2)
        return offsets.expand(-1, NUM_LEVELS, -1, -1).flatten()


class FaiM2FPointWeights(nn.Linear):
    """Linear layer from a token to the weights of its points before the softmax; initialized to zero."""


@use_kernel_forward_from_hub("MultiScaleDeformableAttention")
class FaiM2FDeformableSampling(nn.Module):
    """Samples every level at the points of each token, and computes the weighted sum of the samples.

    `from_pretrained(..., use_kernels=True)` replaces `forward` by a kernel from the Hub, if the package `kernels` and a
    GPU are available. The kernel's name and signature are those of transformers' Deformable DETR.
    """

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor | None,
        value_spatial_shapes_list: list[tuple[int, int]],
        level_start_index: Tensor | None,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        """
        Args:
            value: (B, S, heads, d), the tokens of all levels.
            value_spatial_shapes: (levels, 2), each level's (h, w), for kernels.
            value_spatial_shapes_list: the same as a list.
            level_start_index: (levels,), the index in S at which each level starts, for kernels.
            sampling_locations: (B, Q, heads, levels, points, 2), x and y, 0..1 within the map.
            attention_weights: (B, Q, heads, levels, points), which sum to 1 for each head.
            im2col_step: number of images that a kernel processes at once.

        Returns:
            (B, Q, heads * d)
        """
        batch, _, heads, size = value.shape
        count = sampling_locations.shape[1]
        # (B * heads, ...): `grid_sample` takes heads as separate images.
        maps = value.flatten(2).transpose(1, 2).reshape(batch * heads, size, -1)  # (B * heads, d, S)
        grids = (2 * sampling_locations - 1).transpose(1, 2).flatten(0, 1)  # (B * heads, Q, levels, points, 2)
        weights = attention_weights.transpose(1, 2).flatten(0, 1)  # (B * heads, Q, levels, points)
        # Not `unflatten` or `split`: a traced graph would contain the traced image size as a constant.
        levels = _levels(maps, 2, value_spatial_shapes_list)
        attended: Tensor | None = None
        for index, (level, (height, width)) in enumerate(zip(levels, value_spatial_shapes_list, strict=True)):
            level = level.reshape(batch * heads, -1, height, width)
            sampled = nn.functional.grid_sample(level, grids[:, :, index], align_corners=False)
            part = (sampled * weights[:, None, :, index]).sum(-1)  # (B * heads, d, Q)
            attended = part if attended is None else attended + part
        assert attended is not None
        return attended.reshape(batch, -1, count).transpose(1, 2)


class FaiM2FDeformableAttention(nn.Module):
    """Each token attends to a few points in every level, at predicted offsets from its own position."""

    def __init__(self, size: int, num_heads: int, num_points: int) -> None:
        super().__init__()
        self.num_heads, self.num_points = num_heads, num_points
        self.sampling_offsets = FaiM2FSamplingOffsets(size, num_heads, num_points)
        self.attention_weights = FaiM2FPointWeights(size, num_heads * NUM_LEVELS * num_points)
        self.value_proj = nn.Linear(size, size)
        self.output_proj = nn.Linear(size, size)
        self.sampling = FaiM2FDeformableSampling()

    def forward(self, placed: Tensor, values: Tensor, places: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        """
        Args:
            placed: (B, S, size), the tokens of all levels with position embeddings; they predict points and weights.
            values: (B, S, size), the tokens without position embeddings.
            places: (S, 2), x and y of each token in its level, in 0..1; float32 or float64.
            sizes: (height, width) of each level; their products sum to S.

        Returns:
            (B, S, size)
        """
        batch, count, _ = placed.shape
        heads, points = self.num_heads, self.num_points
        # All inputs of the sampling have the type of `places`, because bfloat16 cannot represent every pixel's center.
        precise = places.dtype
        offsets = self.sampling_offsets(placed).to(precise).view(batch, count, heads, NUM_LEVELS, points, 2)
        weights = self.attention_weights(placed).to(precise).view(batch, count, heads, NUM_LEVELS * points).softmax(-1)
        scales = torch.cat([offsets.new_full((1,), 1.0) / side for height, width in sizes for side in (width, height)])
        attended = self.sampling(
            self.value_proj(values).to(precise).view(batch, count, heads, -1),
            *self._levels_of(sizes, placed),
            places[None, :, None, None, None] + offsets * scales.view(NUM_LEVELS, 1, 2),
            weights.view(batch, count, heads, NUM_LEVELS, points),
            batch,
        )
        return self.output_proj(attended.to(placed.dtype))

    def _levels_of(
        self, sizes: list[tuple[int, int]], tokens: Tensor
    ) -> tuple[Tensor | None, list[tuple[int, int]], Tensor | None]:
        """The sizes and start indices of the levels, as kernels require them.

        Without a kernel, the tensors are None, so that traced graphs do not contain them.
        """
        if "forward" not in vars(self.sampling):  # no kernel has replaced it
            return None, sizes, None
        shapes = torch.tensor(sizes, dtype=torch.long)
        areas = shapes.prod(1)
        return shapes.to(tokens.device), sizes, (areas.cumsum(0) - areas).to(tokens.device)


class FaiM2FDeformableLayer(GradientCheckpointingLayer):
    """Deformable attention and a feed-forward network, post-norm."""

    def __init__(self, config: FaiM2FConfig) -> None:
        super().__init__()
        size = config.feature_size
        self.attention = FaiM2FDeformableAttention(size, config.encoder_attention_heads, config.encoder_points)
        self.attention_norm = nn.LayerNorm(size)
        self.linear1 = nn.Linear(size, config.encoder_feedforward_dim)
        self.linear2 = nn.Linear(config.encoder_feedforward_dim, size)
        self.feed_forward_norm = nn.LayerNorm(size)
        self.dropout = nn.Dropout(config.encoder_dropout)

    def forward(self, tokens: Tensor, position: Tensor, places: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        """tokens (B, S, size) to the same; position (1, S, size); the rest as in `FaiM2FDeformableAttention`."""
        attended = self.attention(tokens + position, tokens, places, sizes)
        tokens = self.attention_norm(tokens + self.dropout(attended))
        inner = self.dropout(nn.functional.relu(self.linear1(tokens)))
        return self.feed_forward_norm(tokens + self.dropout(self.linear2(inner)))


class FaiM2FGroupNormConvolution(nn.Module):
    """Convolution, group norm and an optional ReLU; keeps the spatial size."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, bias: bool = False, relu: bool = False
    ) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
        self.normalization = nn.GroupNorm(NORM_GROUPS, out_channels)
        self.relu = relu

    def forward(self, hidden_state: Tensor) -> Tensor:
        """(B, in, h, w) to (B, out, h, w)."""
        hidden_state = self.normalization(self.convolution(hidden_state))
        return hidden_state.relu() if self.relu else hidden_state


class FaiM2FDeformablePixelDecoder(nn.Module):
    """Converts backbone feature maps to mask features and the three levels that the queries attend to."""

    def __init__(self, config: FaiM2FConfig, in_channels: list[int]) -> None:
        """
        Args:
            in_channels: channels of the backbone's feature maps, fine to coarse, at least 4.
        """
        super().__init__()
        size = config.feature_size
        *finer, third, second, first = in_channels
        # Coarse to fine, in the order of the forward pass.
        self.input_projections = nn.ModuleList(
            [FaiM2FGroupNormConvolution(channels, size, 1, bias=True) for channels in (first, second, third)]
        )
        self.level_embedding = LearnedTable(NUM_LEVELS, size)
        self.encoder_layers = nn.ModuleList([FaiM2FDeformableLayer(config) for _ in range(config.encoder_layers)])
        self.lateral_convolutions = nn.ModuleList(
            [FaiM2FGroupNormConvolution(channels, size, 1) for channels in reversed(finer)]
        )
        self.output_convolutions = nn.ModuleList([FaiM2FGroupNormConvolution(size, size, 3, relu=True) for _ in finer])
        self.mask_projection = nn.Conv2d(size, config.mask_feature_size, 1)

    def forward(self, feature_maps: tuple[Tensor, ...]) -> PixelDecoderOutput:
        """`feature_maps`: (B, channels, H/stride, W/stride) each, fine to coarse."""
        fine_to_coarse = list(feature_maps)
        tokens, positions, places, sizes = [], [], [], []
        level_embedding = self.level_embedding()
        for index, projection in enumerate(self.input_projections):
            level = projection(fine_to_coarse.pop())
            sizes.append((level.shape[2], level.shape[3]))
            tokens.append(level.flatten(2).transpose(1, 2))
            positions.append(sine_position_embedding(level) + level_embedding[index])
            places.append(_centers(level))
        hidden_states, position, centers = torch.cat(tokens, 1), torch.cat(positions, 1), torch.cat(places)
        for layer in self.encoder_layers:
            hidden_states = layer(hidden_states, position, centers, sizes)
        parts = _levels(hidden_states, 1, sizes)
        batch = hidden_states.shape[0]
        pyramid = [
            part.transpose(1, 2).reshape(batch, -1, height, width)
            for part, (height, width) in zip(parts, sizes, strict=True)
        ]
        finest = pyramid[-1]
        for lateral, output in zip(self.lateral_convolutions, self.output_convolutions, strict=True):
            level = lateral(fine_to_coarse.pop())
            finest = output(
                level + nn.functional.interpolate(finest, size=level.shape[-2:], mode="bilinear", align_corners=False)
            )
        return PixelDecoderOutput(mask_features=self.mask_projection(finest), pyramid=pyramid)


def _levels(tokens: Tensor, axis: int, sizes: list[tuple[int, int]]) -> list[Tensor]:
    """Splits tokens, concatenated along an axis, into levels."""
    parts, start = [], 0
    for height, width in sizes:  # not `split`: a traced graph would keep the traced size
        parts.append(tokens.narrow(axis, start, height * width))
        start = start + height * width
    return parts


def _centers(level: Tensor) -> Tensor:
    """(h * w, 2), x and y in 0..1 of each pixel's center in a map (B, C, h, w), in float32 at least."""
    height, width = level.shape[-2:]
    dtype = torch.promote_types(level.dtype, torch.float32)
    rows = (torch.arange(height, dtype=dtype, device=level.device) + 0.5) / height
    columns = (torch.arange(width, dtype=dtype, device=level.device) + 0.5) / width
    return torch.stack((columns[None].expand(height, width), rows[:, None].expand(height, width)), -1).flatten(0, 1)


__all__ = [
    "FaiM2FConvolution",
    "FaiM2FDeformableAttention",
    "FaiM2FDeformablePixelDecoder",
    "FaiM2FDeformableSampling",
    "FaiM2FPixelDecoder",
    "FaiM2FPointWeights",
    "FaiM2FSamplingOffsets",
    "PixelDecoderOutput",
]

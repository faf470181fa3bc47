"""Swin for graphs: transformers' weights, in arithmetic whose shapes follow the image by themselves.

transformers' own forward asks of each map whether it needs padding, and branches on the answer. An exporter of symbolic
shapes then carries a question about remainders for every layer and solves them together, without end; a tracing one
writes down the answers of the image that it traced, which are wrong for others. Here a map is padded to whole windows,
by nothing where nothing is missing, so that there is no question (Liu et al., ICCV 2021, section 3.2).

Besides, what a graph need not say twice is said once: queries, keys and values are one product, the position biases are
made tables, and the mask of shifted windows is made once a stage and apart from them; with them it would be a constant
of hundreds of megabytes for an image of 1024x1024.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SwinBackbone
from transformers.modeling_outputs import BackboneOutput

MASKED = -100.0  # added between parts of a window that are no neighbours in the image, as in training


class SwinForGraphs(nn.Module):
    """A `SwinBackbone` as the model calls it; in evaluation mode only.

    Args:
        backbone: of transformers 4.57 or 5.x. Its modules are shared, or copied where they are merged.
        any_size: whether the graph takes images of any size; else maps that need no padding get none.
    """

    def __init__(self, backbone: SwinBackbone, any_size: bool) -> None:
        super().__init__()
        swin = backbone.swin if hasattr(backbone, "swin") else backbone  # 5.x, 4.57
        self.any_size, self.window = any_size, int(backbone.config.window_size)
        self.patch = swin.embeddings.patch_embeddings.projection
        self.patch_norm = swin.embeddings.norm
        self.positions = swin.embeddings.position_embeddings
        self.stages = nn.ModuleList([SwinStageForGraphs(stage, self.window, any_size) for stage in swin.encoder.layers])
        # The stem's own map is stage 0; the norms are those of the maps that go out, by the names of their stages.
        self.norms: Mapping[str, nn.Module] = backbone.hidden_states_norms
        self.names = list(backbone.stage_names)

    def forward(self, pixel_values: Tensor, return_dict: bool = True) -> BackboneOutput:
        """(B, 3, H, W) to the feature maps that the configuration asks for, (B, channels, H/stride, W/stride) each."""
        height, width = self.patch.kernel_size
        pixel_values = _pad(pixel_values, (2, 3), (int(height), int(width)), self.any_size)
        hidden_state = self.patch(pixel_values).permute(0, 2, 3, 1)  # (B, h, w, C), here and everywhere
        hidden_state = self.patch_norm(hidden_state)
        if self.positions is not None:
            hidden_state = hidden_state + self.positions.view(1, *hidden_state.shape[1:])
        maps = [hidden_state]
        for stage in self.stages:
            before, hidden_state = stage(hidden_state)
            maps.append(before)
        named = zip(self.names, maps, strict=True)
        features = [self.norms[name](found).permute(0, 3, 1, 2) for name, found in named if name in self.norms]
        return BackboneOutput(feature_maps=tuple(features))


class SwinStageForGraphs(nn.Module):
    """Layers with windows that lie on the grid and that are shifted, in turn, and the merging of patches behind."""

    def __init__(self, stage: Any, window: int, any_size: bool) -> None:
        super().__init__()
        self.window, self.any_size = window, any_size
        self.layers = nn.ModuleList([SwinLayerForGraphs(layer, window) for layer in stage.blocks])
        self.merge_norm: Any = None
        self.merge: Any = None
        if stage.downsample is not None:
            self.merge_norm, self.merge = stage.downsample.norm, stage.downsample.reduction

    def forward(self, hidden_state: Tensor) -> tuple[Tensor, Tensor]:
        """(B, h, w, C) to the same, and what the next stage begins with, (B, h/2, w/2, 2 C) rounded up."""
        batch, height, width, channels = hidden_state.shape
        rows, columns = (_parts(side, self.window) for side in (height, width))
        mask: Tensor | None = None
        layer: Any
        for layer in self.layers:
            if layer.shift and mask is None:
                mask = _shifted_mask(rows, columns, self.window, layer.shift, hidden_state)
            hidden_state = layer(hidden_state, rows, columns, mask if layer.shift else None, self.any_size)
        if self.merge is None:
            return hidden_state, hidden_state
        padded = _pad(hidden_state, (1, 2), (2, 2), self.any_size)
        pairs = padded.reshape(batch, _parts(height, 2), 2, _parts(width, 2), 2, channels)
        merged = pairs.permute(0, 1, 3, 4, 2, 5).flatten(3)  # the left ones first, of which the upper
        return hidden_state, self.merge(self.merge_norm(merged))


class SwinLayerForGraphs(nn.Module):
    """Attention within windows and a feed-forward network, each with its norm before it."""

    bias: Tensor

    def __init__(self, layer: Any, window: int) -> None:
        super().__init__()
        self.window, self.shift = window, int(layer.shift_size)
        attention = layer.attention
        if hasattr(attention, "q_proj"):  # 5.x
            projections = [attention.q_proj, attention.k_proj, attention.v_proj]
            self.output, table, index = attention.o_proj, *_table(attention.relative_position_bias)
            self.feed_forward: nn.Module = layer.mlp
        else:  # 4.57
            projections = [attention.self.query, attention.self.key, attention.self.value]
            self.output, table, index = attention.output.dense, *_table(attention.self)
            self.feed_forward = nn.Sequential(layer.intermediate, layer.output)
        self.attention_norm, self.feed_forward_norm = layer.layernorm_before, layer.layernorm_after
        self.heads = table.shape[1]
        self.projection = _as_one(projections, self.heads)
        bias = table.detach()[index.view(-1)].view(window**2, window**2, self.heads).permute(2, 0, 1).contiguous()
        self.register_buffer("bias", bias)  # (heads, N, N), where N = window * window

    def forward(self, hidden_state: Tensor, rows: int, columns: int, mask: Tensor | None, any_size: bool) -> Tensor:
        """hidden_state (B, h, w, C) to the same, in rows x columns windows; mask (rows * columns, 1, N, N)."""
        batch, height, width, channels = hidden_state.shape
        side, heads = self.window, self.heads
        inner = _pad(self.attention_norm(hidden_state), (1, 2), (side, side), any_size)
        if self.shift:
            inner = _roll(_roll(inner, 1, self.shift), 2, self.shift)
        inner = inner.view(batch, rows, side, columns, side, channels).transpose(2, 3)
        inner = self.projection(inner.reshape(batch, rows * columns, side * side, channels))  # q, k and v
        query, key, value = inner.unflatten(3, (3, heads, channels // heads)).permute(3, 0, 1, 4, 2, 5).unbind(0)
        scores = torch.matmul(query, key.transpose(-1, -2)) + self.bias  # (B, windows, heads, N, N)
        if mask is not None:
            scores = scores + mask
        attended = torch.matmul(scores.softmax(-1), value).transpose(2, 3).flatten(3)  # (B, windows, N, C)
        attended = self.output(attended).view(batch, rows, columns, side, side, channels).transpose(2, 3)
        attended = attended.reshape(batch, rows * side, columns * side, channels)
        if self.shift:
            attended = _roll(_roll(attended, 1, rows * side - self.shift), 2, columns * side - self.shift)
        if any_size or rows * side != height:
            attended = attended.narrow(1, 0, height)
        if any_size or columns * side != width:
            attended = attended.narrow(2, 0, width)
        hidden_state = hidden_state + attended
        return hidden_state + self.feed_forward(self.feed_forward_norm(hidden_state))


def _parts(side: int, length: int) -> int:
    """How many parts of a length a side has, the last of them perhaps not whole."""
    return (side + length - 1) // length


def _pad(maps: Tensor, axes: tuple[int, int], lengths: tuple[int, int], any_size: bool) -> Tensor:
    """Zeros behind rows and columns, up to whole parts of these lengths."""
    down, right = (_parts(maps.shape[a], n) * n - maps.shape[a] for a, n in zip(axes, lengths, strict=True))
    if not any_size and down == 0 and right == 0:
        return maps
    behind = (0, 0) if axes[1] == 2 else ()  # the channels, where they come last
    return F.pad(maps, (*behind, 0, right, 0, down))


def _roll(maps: Tensor, axis: int, count: int) -> Tensor:
    """The first so many rows or columns behind the others; `torch.roll` counts by remainders."""
    return torch.cat((maps.narrow(axis, count, maps.shape[axis] - count), maps.narrow(axis, 0, count)), axis)


def _shifted_mask(rows: int, columns: int, window: int, shift: int, like: Tensor) -> Tensor:
    """(rows * columns, 1, N, N): 0 between pixels that are neighbours also before the shift, `MASKED` between others.

    Only the last window of a row or column has pixels from the other end of the image, its last `shift`.
    """
    areas = []
    for count in (rows, columns):
        places = torch.arange(count * window, device=like.device)
        # 0 for all windows but the last; pairs are compared within a window, so that they need no numbers of their own.
        area = (places >= count * window - shift).to(like.dtype)
        areas.append(area.view(count, window))
    vertical, horizontal = areas
    area = 2 * vertical[:, None, :, None] + horizontal[None, :, None, :]  # (rows, columns, window, window)
    area = area.reshape(rows * columns, 1, window * window)
    differ = (area[:, :, :, None] - area[:, :, None, :]).abs()
    return differ.clamp(max=1) * MASKED


def _table(module: Any) -> tuple[Tensor, Tensor]:
    return module.relative_position_bias_table, module.relative_position_index


def _as_one(projections: list[nn.Linear], heads: int) -> nn.Linear:
    """Three layers of one input as one, with the scale of attention in the first of them."""
    size = projections[0].in_features
    scales = (float(size // heads) ** -0.5, 1.0, 1.0)
    merged = nn.Linear(size, 3 * size, bias=projections[0].bias is not None)
    pairs = list(zip(projections, scales, strict=True))
    with torch.no_grad():
        merged.weight.copy_(torch.cat([layer.weight * scale for layer, scale in pairs]))
        if merged.bias is not None:
            merged.bias.copy_(torch.cat([layer.bias * scale for layer, scale in pairs]))
    return merged


__all__ = ["SwinForGraphs"]

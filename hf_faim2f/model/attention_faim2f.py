"""Multi-head attention, eager or SDPA, and position embeddings."""

import math
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from .configuration_faim2f import FaiM2FConfig

logger = logging.get_logger(__name__)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float = 1.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(query @ key^T * scaling + mask) @ value, and the weights: (B, Q, heads, d) and (B, heads, Q, K)."""
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


class FaiM2FAttention(nn.Module):
    """Multi-head attention with separate query, key and value: only the first two include position embeddings."""

    is_causal = False

    def __init__(self, config: FaiM2FConfig, size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.head_dim = size // num_heads
        self.dropout = dropout
        self.q_proj = nn.Linear(size, size)
        self.k_proj = nn.Linear(size, size)
        self.v_proj = nn.Linear(size, size)
        self.out_proj = nn.Linear(size, size)

    def _heads(self, states: Tensor) -> Tensor:
        return states.view(states.shape[0], -1, self.num_heads, self.head_dim).transpose(1, 2)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            query: (B, Q, size); key, value: (B, K, size).
            attention_mask: broadcastable to (B, heads, Q, K), added to the scores.
            output_attentions: also return the weights.

        Returns:
            (B, Q, size) and the weights (B, heads, Q, K), None unless `output_attentions`.
        """
        implementation = self.config._attn_implementation
        attend = eager_attention
        if implementation not in (None, "eager"):
            if output_attentions:
                logger.warning_once(
                    f"`{implementation}` attention does not return its weights: output_attentions=True takes "
                    '`eager` instead, which is slower; load with attn_implementation="eager" to choose it.'
                )
            else:
                attend = ALL_ATTENTION_FUNCTIONS[implementation]
        attended, weights = attend(
            self,
            self._heads(self.q_proj(query)),
            self._heads(self.k_proj(key)),
            self._heads(self.v_proj(value)),
            attention_mask,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.head_dim**-0.5,
            is_causal=False,
        )
        output = self.out_proj(attended.reshape(query.shape))
        return output, weights if output_attentions else None


TEMPERATURE = 10000.0
EPS = 1e-6
# Maximum number of cached embeddings: three levels and the encoder, for a few image sizes.
MOST_KEPT = 16
_kept: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()


def sine_position_embedding(features: Tensor) -> Tensor:
    """Sine embedding of rows and columns (Carion et al., DETR, appendix A.4), normalized to 2 pi over the map.

    Args:
        features: (B, C, h, w); only its size, dtype and device matter. C is divisible by 4.

    Returns:
        (1, h * w, C): the first half of the channels encodes the row, the second the column. Computed in float32 and
        returned in the dtype of `features`. The result is cached: do not modify it.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # becomes a constant, or part of the graph
        return _embed(features)
    key = (*features.shape[1:], features.dtype, features.device)
    found = _kept.pop(key, None)
    if found is None:
        # A tensor created in inference mode could not be used in training.
        with torch.inference_mode(False), torch.no_grad():
            found = _embed(features)
        if type(found) is not Tensor:  # a fake tensor, or one of another mode
            return found
    _kept[key] = found
    while len(_kept) > MOST_KEPT:
        _kept.popitem(last=False)
    return found


def _embed(features: Tensor) -> Tensor:
    _, channels, height, width = features.shape
    half = channels // 2
    exponents = torch.arange(half // 2, dtype=torch.float32, device=features.device) * (2.0 / half)
    frequencies = TEMPERATURE**exponents  # each for a sine and a cosine
    axes = []
    for length in (height, width):
        places = torch.arange(1, length + 1, dtype=torch.float32, device=features.device)
        angles = (places / (length + EPS) * (2 * math.pi))[:, None] / frequencies  # (length, half / 2)
        axes.append(torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1))  # (length, half)
    rows = axes[0][:, None].expand(height, width, half)
    columns = axes[1][None].expand(height, width, half)
    return torch.cat((rows, columns), dim=-1).view(1, height * width, channels).to(features.dtype)


class LearnedTable(nn.Embedding):
    """A table of embeddings that is always read in full.

    Call it instead of reading `weight`: when accelerate offloads weights, they exist only during the module's forward.
    """

    def forward(self) -> Tensor:  # type: ignore[override]
        """(num_embeddings, embedding_dim)"""
        return self.weight


__all__ = ["FaiM2FAttention", "LearnedTable", "sine_position_embedding"]

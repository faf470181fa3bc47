"""Multi-head attention in transformers' two implementations, eager and SDPA, with a mask that says where to look."""

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
    """softmax(query keyT * scaling) value, with its weights: (B, Q, heads, d) and (B, heads, Q, K)."""
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


class FaiM2FAttention(nn.Module):
    """Multi-head attention whose query, key and value come apart (the position is added to the first two only)."""

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
            attention_mask: boolean, broadcastable to (B, heads, Q, K), True where attention may go.
            output_attentions: also return the weights.

        Returns:
            (B, Q, size) and the weights (B, heads, Q, K), or None if they were not asked for.
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


__all__ = ["FaiM2FAttention"]

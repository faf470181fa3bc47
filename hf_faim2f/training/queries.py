"""Another number of queries for a trained model: what the learned ones know stays."""

from typing import Any

import torch
from torch import nn

from ..model.modeling_faim2f import FaiM2FForUniversalSegmentation


@torch.no_grad()
def resize_queries(model: FaiM2FForUniversalSegmentation, queries: int) -> None:
    """Gives a model so many queries: the first of its own as far as they go, and further ones that are new.

    Args:
        model: whose `query_features` and `query_position` (Q, channels) become (queries, channels). Nothing else of it
            depends on their number.
        queries: at least 1.
    """
    decoder: Any = model.transformer_decoder
    for name in ("query_features", "query_position"):
        learned: nn.Embedding = getattr(decoder, name)
        weight = learned.weight
        resized = type(learned)(queries, learned.embedding_dim, device=weight.device, dtype=weight.dtype)
        nn.init.normal_(resized.weight, std=model.config.init_std)  # as those of a new model
        kept = min(queries, learned.num_embeddings)
        resized.weight[:kept] = learned.weight[:kept]
        setattr(decoder, name, resized)
    model.config.num_queries = queries


__all__ = ["resize_queries"]

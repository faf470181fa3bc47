"""Where a pixel is: the sine position embedding of DETR; and tables that are learned."""

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

TEMPERATURE = 10000.0
EPS = 1e-6
# Embeddings that are kept, the last used: three levels and the encoder's of a few sizes of images.
MOST_KEPT = 16
_kept: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()


def sine_position_embedding(features: Tensor) -> Tensor:
    """Sine embedding of rows and columns (Carion et al., DETR, appendix A.4), normalized to 2 pi over the map.

    Args:
        features: (B, C, h, w), read for its size, type and device; C is divisible by 4.

    Returns:
        (1, h * w, C): the first half of the channels tells the row, the second the column; computed in float32 and
        returned in the type of `features`. It is kept for the next map of that size: do not write into it.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # there it becomes a constant, or part of the graph
        return _embed(features)
    key = (*features.shape[1:], features.dtype, features.device)
    found = _kept.pop(key, None)
    if found is None:
        # One made in inference mode could not be used where gradients are wanted.
        with torch.inference_mode(False), torch.no_grad():
            found = _embed(features)
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
    """A table of embeddings that is read whole.

    By a call, not by its `weight`: weights that are offloaded (accelerate) are there only while their module is called.
    """

    def forward(self) -> Tensor:  # type: ignore[override]
        """(num_embeddings, embedding_dim)"""
        return self.weight


__all__ = ["LearnedTable", "sine_position_embedding"]

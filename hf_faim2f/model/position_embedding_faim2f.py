"""Where a pixel is: the sine position embedding of DETR, and the pixels that padding did not make."""

import math

import torch
from torch import Tensor

TEMPERATURE = 10000.0
EPS = 1e-6


def valid_pixels(pixel_mask: Tensor | None, size: tuple[int, int]) -> Tensor | None:
    """`pixel_mask` (B, H, W) brought to a level's `size` (h, w): (B, h, w), True where the image is. None stays None.

    A pixel of the level is the image's if its centre is; the first one always is, so that no row is left empty.
    """
    if pixel_mask is None:
        return None
    valid = torch.nn.functional.interpolate(pixel_mask[:, None].float(), size=size, mode="nearest")[:, 0] > 0.5
    first = torch.zeros_like(valid[:1])
    first[:, 0, 0] = True
    return valid | first


def sine_position_embedding(features: Tensor, valid: Tensor | None = None) -> Tensor:
    """Sine embedding of rows and columns (Carion et al., DETR, appendix A.4), normalized to 2 pi over the image.

    Args:
        features: (B, C, h, w), read for its size, type and device; C is divisible by 4.
        valid: (B, h, w), True where the image is: rows and columns are counted, and normalized, over these alone.

    Returns:
        (B, h * w, C), or (1, h * w, C) without `valid`: the first half of the channels tells the row, the second the
        column; computed in float32 and returned in the type of `features`.
    """
    _, channels, height, width = features.shape
    device = features.device
    if valid is None:
        rows = torch.arange(1, height + 1, dtype=torch.float32, device=device)[None, :, None].expand(1, height, width)
        columns = torch.arange(1, width + 1, dtype=torch.float32, device=device)[None, None, :].expand(1, height, width)
    else:
        rows = valid.cumsum(1, dtype=torch.float32)
        columns = valid.cumsum(2, dtype=torch.float32)
    half = channels // 2
    exponents = torch.arange(half // 2, dtype=torch.float32, device=device) * (2.0 / half)
    frequencies = TEMPERATURE**exponents  # each for a sine and a cosine
    parts = []
    for places, last in ((rows, rows[:, -1:, :]), (columns, columns[:, :, -1:])):
        angles = (places / (last + EPS) * (2 * math.pi))[..., None] / frequencies  # (B, h, w, half / 2)
        parts.append(torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2))  # (B, h, w, half)
    return torch.cat(parts, dim=-1).flatten(1, 2).to(features.dtype)


__all__ = ["sine_position_embedding", "valid_pixels"]

"""Padding: which part of a padded batch each image covers, in pixels and in mask logits.

The image processor pads the images of a batch to one size at the bottom and the right, and marks padding with 0 in
`pixel_mask`. The model sets the mask logits of padding to `PADDING_LOGIT`, and post-processing crops it before it
resizes masks to the image. The outputs thus mark padding themselves, and callers need not keep `pixel_mask`.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

# Sentinel mask logit of padding: a probability of 2e-44; exactly representable in float16 and bfloat16.
PADDING_LOGIT = -100.5


def image_sizes(pixel_mask: Tensor) -> list[tuple[int, int]]:
    """(height, width) in pixels of each image of a padded batch.

    Args:
        pixel_mask: (B, H, W), True or 1 on the image, else 0.

    Raises:
        ValueError: the mask of an image is empty, or is not a rectangle in the upper left corner.
    """
    mask = pixel_mask.bool()
    heights, widths = mask.any(2).sum(1), mask.any(1).sum(1)
    rows, columns = (torch.arange(side, device=mask.device) for side in mask.shape[1:])
    rectangles = (rows < heights[:, None])[:, :, None] & (columns < widths[:, None])[:, None, :]
    regular = (mask == rectangles).flatten(1).all(1) & (heights > 0)
    sizes = []
    for i, (height, width, is_regular) in enumerate(torch.stack([heights, widths, regular], 1).tolist()):
        if not is_regular:
            raise ValueError(
                f"pixel_mask of image {i} must be 1 on a rectangle in the upper left corner, which is the image, and 0 "
                "on the padding: pad images at the bottom and on the right, as the image processor does."
            )
        sizes.append((height, width))
    return sizes


def stride_of(side: int, own: int) -> int:
    """The stride of mask logits: pixels of the image per pixel of the logits.

    Args:
        side: height or width of the image.
        own: the same of its mask logits.

    Returns:
        2, 4 or 8, whichever gives exactly this size after rounding up; else the nearest integer, such as the patch size
        of a vision transformer. For small images, rounding `side / own` alone is wrong: an image of 33 pixels has
        logits of 5 at a stride of 8.
    """
    return next((stride for stride in (2, 4, 8) if -(-side // stride) == own), round(side / own))


def fill_padding(mask_logits: Tensor, pixel_mask: Tensor | None) -> Tensor:
    """Mask logits (B, Q, h, w), set to `PADDING_LOGIT` where `pixel_mask` (B, H, W), if there is one, is 0."""
    if pixel_mask is None:
        return mask_logits
    steps = [stride_of(side, own) for side, own in zip(pixel_mask.shape[1:], mask_logits.shape[2:], strict=True)]
    height, width = mask_logits.shape[2:]
    inside = pixel_mask[:, :: steps[0], :: steps[1]][:, :height, :width].bool()
    return mask_logits.masked_fill(~inside[:, None].to(mask_logits.device), PADDING_LOGIT)


def masks_in_frame(
    masks: Sequence[Tensor], frame: tuple[int, int], pixel_mask: Tensor | None = None
) -> Sequence[Tensor]:
    """Target masks in the frame of a batch: masks of the size of their own image are padded like the image.

    Args:
        masks: for each image (n, h, w), or a map of segment ids (h, w): of the size of `pixel_values` or of the image's
            part of it, or, at another resolution, all in the same proportion to either.
        frame: (H, W) of `pixel_values`.
        pixel_mask: (B, H, W), as in `image_sizes`; None for images without padding.

    Raises:
        ValueError: the masks of an image are transposed, or have a size that is none of these.
    """
    if any(not isinstance(mask, Tensor) or mask.ndim not in (2, 3) for mask in masks):
        return masks  # `SegmentTargets` says what is wrong with them
    if all(mask.shape[-2:] == frame for mask in masks):
        return masks
    # Masks of an image without segments may have any size.
    shapes = [tuple(mask.shape[-2:]) if mask.ndim == 2 or len(mask) else None for mask in masks]
    known = [shape for shape in shapes if shape is not None]
    if all(shape == frame for shape in known):
        return [_padded(mask, shape, frame) for mask, shape in zip(masks, shapes, strict=True)]
    for i, shape in enumerate(shapes):
        if shape == frame[::-1] and shape != frame:
            raise ValueError(
                f"The masks of image {i} are {shape[0]}x{shape[1]} (height x width), and pixel_values "
                f"{frame[0]}x{frame[1]}: transpose them."
            )
    if pixel_mask is not None and len(shapes) != len(pixel_mask):
        return masks
    sizes = [frame] * len(shapes) if pixel_mask is None else image_sizes(pixel_mask)
    if all(shape in (None, size, frame) for shape, size in zip(shapes, sizes, strict=True)):
        return [_padded(mask, shape, frame) for mask, shape in zip(masks, shapes, strict=True)]
    largest = (max(height for height, _ in known), max(width for _, width in known))
    for i, (shape, size) in enumerate(zip(shapes, sizes, strict=True)):
        # Smaller masks are padded to the largest, so each must cover the same fraction of it as its image of the frame.
        sides = zip(shape or largest, largest, size, frame, strict=True)
        if shape not in (None, largest) and any(abs(own - most * part / whole) > 1 for own, most, part, whole in sides):
            own = f"mask_labels[{i}] is {shape[0]}x{shape[1]} (height x width)"
            if pixel_mask is None:
                raise ValueError(
                    f"{own}, but others in the batch reach {largest[0]}x{largest[1]}: resize the masks like the "
                    "images, or, if the images were padded, pass pixel_mask."
                )
            raise ValueError(
                f"{own}, but its image {size[0]}x{size[1]} in a batch of {frame[0]}x{frame[1]}: resize the masks with "
                "the image."
            )
    return [_padded(mask, shape, largest) for mask, shape in zip(masks, shapes, strict=True)]


def _padded(mask: Tensor, shape: tuple[int, ...] | None, size: tuple[int, int]) -> Tensor:
    """A mask (n, h, w) or a map of segment ids (h, w), padded with pixels of no segment at the bottom and right."""
    if shape is None or shape == size:
        return mask if shape == size else mask.new_zeros((0, *size))
    if mask.ndim == 2 and not mask.dtype.is_signed:
        mask = mask.to(torch.int32)
    missing = (0, size[1] - shape[1], 0, size[0] - shape[0])
    return torch.nn.functional.pad(mask, missing, value=-1 if mask.ndim == 2 else 0)


def group_by_size(sizes: list[tuple[int, int]]) -> list[list[int]]:
    """Batch indices grouped by image size, in order of first appearance."""
    return [[place for place, own in enumerate(sizes) if own == size] for size in dict.fromkeys(sizes)]


def join_outputs(groups: list[list[int]], parts: list[Any], grid: Sequence[int]) -> dict[str, Any]:
    """Joins the outputs of groups of images, in the order of the batch.

    Args:
        groups: for each group, the batch indices of its images.
        parts: the model outputs of each group.
        grid: minimum (h, w) of the joined mask logits; smaller masks are filled up with `PADDING_LOGIT`.
    """
    order = torch.tensor([place for places in groups for place in places]).argsort()

    def join(tensors: Iterable[Tensor]) -> Tensor:
        whole = torch.cat(list(tensors))
        return whole[order.to(whole.device)]

    def join_logits(outputs: Sequence[Any]) -> dict[str, Tensor]:
        masks = [output["masks_queries_logits"] for output in outputs]
        return {
            "class_queries_logits": join(output["class_queries_logits"] for output in outputs),
            "masks_queries_logits": _stack_masks(groups, masks, grid),
        }

    values: dict[str, Any] = join_logits(parts)
    for name in ("hidden_states", "attentions", "cross_attentions"):
        layers = [getattr(part, name) for part in parts]
        if layers[0] is not None:
            values[name] = tuple(join(layer) for layer in zip(*layers, strict=True))
    auxiliary = [part.auxiliary_logits for part in parts]
    if auxiliary[0] is not None:
        values["auxiliary_logits"] = [join_logits(layer) for layer in zip(*auxiliary, strict=True)]
    return values


def _stack_masks(groups: list[list[int]], parts: list[Tensor], grid: Sequence[int]) -> Tensor:
    """Mask logits (n_i, Q, h_i, w_i) of groups of images as one tensor (B, Q, h, w), padded with `PADDING_LOGIT`."""
    height = max(grid[0], *(logits.shape[2] for logits in parts))
    width = max(grid[1], *(logits.shape[3] for logits in parts))
    whole = parts[0].new_full((sum(map(len, groups)), parts[0].shape[1], height, width), PADDING_LOGIT)
    for places, logits in zip(groups, parts, strict=True):
        whole[places, :, : logits.shape[2], : logits.shape[3]] = logits
    return whole


def own_logits(mask_logits: Tensor) -> list[Tensor]:
    """The mask logits (Q, h, w) of each image of a batch (B, Q, H, W), without rows and columns of padding."""
    below, right = ((edge == PADDING_LOGIT).flatten(1).all(1) for edge in (mask_logits[:, :, -1], mask_logits[..., -1]))
    own = list(mask_logits)
    for i in (below | right).nonzero()[:, 0].tolist():
        inside = (mask_logits[i] != PADDING_LOGIT).any(0)
        height, width = int(inside.any(1).sum()), int(inside.any(0).sum())
        if height and width:
            own[i] = mask_logits[i, :, :height, :width]
    return own


def own_network_size(network: tuple[int, int], grid: tuple[int, int], own: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels of an image in `pixel_values`, without padding.

    Args:
        network: (height, width) of the batch's `pixel_values`.
        grid: (height, width) of the batch's mask logits.
        own: (height, width) of the image's own mask logits.

    Returns:
        The exact size for sides divisible by the stride of the logits; otherwise, less than one stride more.
    """
    height, width = (
        side if whole == part else min(side, part * stride_of(side, whole))
        for side, whole, part in zip(network, grid, own, strict=True)
    )
    return height, width


__all__ = [
    "PADDING_LOGIT",
    "fill_padding",
    "group_by_size",
    "image_sizes",
    "join_outputs",
    "masks_in_frame",
    "own_logits",
    "own_network_size",
    "stride_of",
]

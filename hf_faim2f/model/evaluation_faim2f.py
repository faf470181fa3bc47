"""The predictions behind the FAI models' published mIoU and AP, with the numbers of Focoos's `eval_postprocess`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .argmax_faim2f import resized_argmax, settle, tiles_of
from .padding_faim2f import own_network_size
from .post_processing_faim2f import (
    check_fractions,
    check_inputs,
    class_probabilities,
    classes_that_can_win,
    each_image,
    grid_of,
    pair,
    table_of,
)
from .resize_faim2f import MaskEnlargement, as_they_are, bilinear_resize, pixels_of, resized_masks, rows_of


@dataclass
class InstanceEvaluation:
    """The `top_k` pairs of query and class from which average precision is computed, best score first."""

    scores: Tensor  # (K,) float32, 0..1
    class_ids: Tensor  # (K,) int64
    boxes: Tensor  # (K, 4) float32: x_min, y_min, x_max, y_max with exclusive maxima; zeros for an empty mask
    masks: Tensor  # (K, H, W) bool


@torch.no_grad()
def evaluate_semantic(
    class_queries_logits: Tensor,
    masks_queries_logits: Tensor,
    network_size: Sequence[int],
    target_sizes: Iterable[Sequence[int]] | Tensor | None = None,
    *,
    cls_sigmoid: bool = False,
) -> list[Tensor]:
    """The semantic maps behind the FAI models' published mIoU.

    As Focoos's `eval_postprocess` for semantic models: mask *probabilities* are resized to the network's input size and
    then to the image, and each pixel gets the class of the largest sum over queries.

    Args:
        class_queries_logits: (B, Q, C + 1), raw.
        masks_queries_logits: (B, Q, h, w), raw.
        network_size: (height, width) of `pixel_values`.
        target_sizes: (height, width) in pixels for each image; `network_size` where None.
        cls_sigmoid: class probabilities are sigmoids instead of a softmax.

    Returns:
        For each image an int64 map (H, W) of class ids in 0..C-1.

    Raises:
        ValueError: shapes or sizes do not fit.
    """
    sizes = check_inputs(class_queries_logits, masks_queries_logits, target_sizes)
    whole = pair("network_size", network_size)
    results = []
    for i, (class_logits, mask_logits) in enumerate(each_image(class_queries_logits, masks_queries_logits)):
        network = own_network_size(whole, grid_of(masks_queries_logits[0]), grid_of(mask_logits))
        # Resizing is linear, so the sums over queries can be formed first, on the smallest grid.
        sums = table_of(mask_logits.float()).sigmoid_() @ class_probabilities(class_logits, cls_sigmoid)
        rounding = 1e-6 * len(class_logits)
        to_network = bilinear_resize(grid_of(mask_logits), network, mask_logits.device)
        to_image = bilinear_resize(network, sizes[i] if sizes else network, mask_logits.device)
        tiles = tiles_of(sums, grid_of(mask_logits))
        classes = classes_that_can_win(tiles, rounding)
        tiles = tiles._replace(lowest=tiles.lowest[:, classes], highest=tiles.highest[:, classes])
        sums_at = partial(
            pixels_of, to_network, sums[:, classes].contiguous(), len(classes), as_they_are, in_place=True
        )
        results.append(resized_argmax(sums_at, to_image, classes, settle(tiles, to_network, rounding))[0])
    return results


@torch.no_grad()
def evaluate_instances(
    class_queries_logits: Tensor,
    masks_queries_logits: Tensor,
    network_size: Sequence[int],
    target_sizes: Iterable[Sequence[int]] | Tensor | None = None,
    *,
    cls_sigmoid: bool = False,
    top_k: int = 100,
    mask_threshold: float = 0.5,
) -> list[InstanceEvaluation]:
    """The instances behind the FAI models' published average precision.

    As Focoos's `eval_postprocess` for instance models: takes the `top_k` best pairs of query and class; resizes mask
    *probabilities* to the network's input size and then to the image; a pair's score is its class probability times
    the mean mask probability inside the mask.

    Args:
        class_queries_logits: (B, Q, C + 1), raw.
        masks_queries_logits: (B, Q, h, w), raw.
        network_size: (height, width) of `pixel_values`.
        target_sizes: (height, width) in pixels for each image; `network_size` where None.
        cls_sigmoid: class probabilities are sigmoids instead of a softmax.
        top_k: how many pairs, at most Q * C.
        mask_threshold: mask probability that a mask's pixels exceed, 0..1.

    Returns:
        For each image an `InstanceEvaluation` with K = min(top_k, Q * C).

    Raises:
        ValueError: shapes, sizes or thresholds do not fit.
    """
    sizes = check_inputs(class_queries_logits, masks_queries_logits, target_sizes)
    whole = pair("network_size", network_size)
    check_fractions(mask_threshold=mask_threshold)
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}.")
    results = []
    for i, (class_logits, mask_logits) in enumerate(each_image(class_queries_logits, masks_queries_logits)):
        network = own_network_size(whole, grid_of(masks_queries_logits[0]), grid_of(mask_logits))
        device = mask_logits.device
        probabilities = class_probabilities(class_logits, cls_sigmoid)
        scores, pairs = probabilities.flatten().topk(min(top_k, probabilities.numel()))
        queries, class_ids = pairs.div(probabilities.shape[1], rounding_mode="floor"), pairs % probabilities.shape[1]
        queries, row_of_pair = queries.unique(return_inverse=True)
        table = table_of(mask_logits[queries].float()).sigmoid_()
        to_network = bilinear_resize(grid_of(mask_logits), network, device)
        to_image = bilinear_resize(network, sizes[i] if sizes else network, device)
        masks, pixels, totals = resized_masks(
            rows_of(to_network, table, len(queries)), to_image, len(queries), lambda probs: probs > mask_threshold
        )
        boxes = MaskEnlargement(to_image.size_out, to_image.size_out, device).boxes(masks)
        boxes[:, 2:] += 1  # exclusive; 0 without pixels (-1)
        scores, order = (scores * (totals / (pixels + 1e-6))[row_of_pair]).sort(descending=True, stable=True)
        rows = row_of_pair[order]
        results.append(InstanceEvaluation(scores, class_ids[order], boxes.clamp(min=0).float()[rows], masks[rows]))
    return results

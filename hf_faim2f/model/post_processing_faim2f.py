"""Segmentations from class and mask logits, numerically equal to those of transformers' Mask2Former.

Pure functions on tensors. They follow "Masked-attention Mask Transformer for Universal Image Segmentation" (Cheng et
al., CVPR 2022, https://arxiv.org/abs/2112.01527) and "Per-Pixel Classification is Not All You Need for Semantic
Segmentation" (Cheng et al., NeurIPS 2021, https://arxiv.org/abs/2107.06278, section 3.4).

All take raw logits: `class_queries_logits` (B, Q, C + 1), the no-object class last, and `masks_queries_logits`
(B, Q, h, w), on any device, in any floating-point dtype, inside autocast or not. They compute in float32 and return a
list with one entry per image, on the logits' device. With `cls_sigmoid` each class has its own sigmoid, and the last
column is ignored.

Two techniques make them fast. `argmax_faim2f.py` finds the winner of each resized pixel without resizing every channel.
And a mask's score is at most 1, so a query whose class score is below the threshold is dropped before its mask is read.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .argmax_faim2f import Tiles, classes_that_can_win, mixed_cells, resized_argmax, settle, shortlists, tiles_of
from .padding_faim2f import own_logits
from .resize_faim2f import (
    BilinearResize,
    Size,
    bilinear_resize,
    grid_of,
    nearest_axis,
    pair,
    pieces,
    pixels_of,
    rows_of,
    table_of,
)

P = ParamSpec("P")
R = TypeVar("R")

# Number of top-scoring queries from which the lower bound at each pixel is computed.
SUREST = 16


def in_float32(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates post-processing, whose first argument is a tensor: no gradients, and no autocast to half precision."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        logits = next(iter((*args, *kwargs.values())), None)
        kind = logits.device.type if isinstance(logits, Tensor) else "cpu"
        inside = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # not every device has it
        with torch.no_grad(), torch.autocast(kind, enabled=False) if inside else nullcontext():
            return function(*args, **kwargs)

    return run


@dataclass
class SemanticSegmentation:
    """A label map with its scores, like `SemanticSegmentationPostProcessorOutput` of transformers 5.x."""

    segmentation: Tensor  # (H, W) int64, class ids
    segmentation_scores: Tensor  # (C, H, W) float32, sums over queries of class times mask probability


@in_float32
def post_process_semantic_segmentation(
    class_queries_logits: Tensor,
    masks_queries_logits: Tensor,
    target_sizes: Iterable[Sequence[int]] | Tensor | None = None,
    *,
    cls_sigmoid: bool = False,
    intermediate_size: Size | None = (384, 384),
    return_segmentation_scores: bool = False,
) -> list[Tensor] | list[SemanticSegmentation]:
    """The class of every pixel: the largest sum, over queries, of class probability times mask probability.

    Follows transformers' `Mask2FormerImageProcessor.post_process_semantic_segmentation`: mask logits are resized to
    `intermediate_size`, the sums are computed at that size and then resized to the target.

    Args:
        class_queries_logits: (B, Q, C + 1), raw.
        masks_queries_logits: (B, Q, h, w), raw.
        target_sizes: (height, width) in pixels of each image's result; None for the intermediate size.
        cls_sigmoid: class probabilities are sigmoids instead of a softmax.
        intermediate_size: (height, width) to which logits are resized first; None keeps their own grid.
        return_segmentation_scores: also return all classes' sums at every pixel, which takes C floats per pixel.

    Returns:
        For each image an int64 map (H, W) of class ids in 0..C-1, or, with scores, a `SemanticSegmentation`.

    Raises:
        ValueError: shapes or sizes do not fit.
    """
    sizes = check_inputs(class_queries_logits, masks_queries_logits, target_sizes)
    results: list[Any] = []
    for i, (class_logits, mask_logits) in enumerate(each_image(class_queries_logits, masks_queries_logits)):
        middle = grid_of(mask_logits) if intermediate_size is None else pair("intermediate_size", intermediate_size)
        mask_logits = mask_logits.float()
        probabilities, device = class_probabilities(class_logits, cls_sigmoid), mask_logits.device  # (Q, C)
        to_middle = bilinear_resize(grid_of(mask_logits), middle, device)
        to_target = bilinear_resize(middle, sizes[i] if sizes else middle, device)
        table, rounding = table_of(mask_logits), 1e-6 * len(probabilities)
        if return_segmentation_scores:
            count, finish = probabilities.shape[1], partial(_sum_over_queries, probabilities=probabilities)
            results.append(_semantic_scores(rows_of(to_middle, table, count, finish), to_target, count))
            continue
        # Few of hundreds of classes can win. Drop those that provably cannot, by bounds on the sums.
        classes = _classes_of_weight(mask_logits, probabilities) if to_middle.identity else None
        weights = probabilities if classes is None else probabilities[:, classes]
        tiles = _bounds_of_sums(tiles_of(table, grid_of(mask_logits), mixed_cells(to_middle, to_target)), weights)
        kept = classes_that_can_win(tiles, rounding)
        tiles, weights = tiles.of(kept), weights.index_select(1, kept)
        classes, sums_of = kept if classes is None else classes[kept], partial(_sums_at, to_middle, table)
        leading, settled = shortlists(weights, tiles, sums_of, rounding), settle(tiles, to_middle, rounding)
        results.append(resized_argmax(sums_of(weights), to_target, classes, settled, shorter=leading)[0])
    return results


@in_float32
def post_process_instance_segmentation(
    class_queries_logits: Tensor,
    masks_queries_logits: Tensor,
    threshold: float = 0.5,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
    target_sizes: Iterable[Sequence[int]] | Tensor | None = None,
    return_coco_annotation: bool = False,
    return_binary_maps: bool = False,
    *,
    cls_sigmoid: bool = False,
    intermediate_size: Size | None = (384, 384),
) -> list[dict[str, Any]]:
    """The instances of each image: of the Q best pairs of query and class, those whose score reaches the threshold.

    Follows transformers' `Mask2FormerImageProcessor.post_process_instance_segmentation`: a pair's score is its class
    probability times the mean mask probability inside its mask; masks (logit above 0) are computed at
    `intermediate_size` and resized to the target by nearest neighbor; in the map, later instances cover earlier ones.

    Args:
        class_queries_logits: (B, Q, C + 1), raw.
        masks_queries_logits: (B, Q, h, w), raw.
        threshold: minimum score of an instance, 0..1.
        mask_threshold: checked, but without effect, as in transformers: masks are cut at logit 0.
        overlap_mask_area_threshold: likewise.
        target_sizes: (height, width) in pixels of each image's result; None for the intermediate size.
        return_coco_annotation: return the map as run lengths, one list for each id in the map, in ascending order. If
            some pixel has no instance, the first list is that of the background, -1, and id k has list k + 1. An
            instance that is covered completely has no list. A list is start, length, start, length, ...; starts are
            in row-major order and count from 1.
        return_binary_maps: return one map per instance, which shows overlaps.
        cls_sigmoid: class probabilities are sigmoids instead of a softmax.
        intermediate_size: (height, width) to which logits are resized first; None keeps their own grid.

    Returns:
        For each image a dict of `segmentation`, a float32 map (H, W) of instance ids, -1 where there is none (or run
        lengths, or float32 (n, H, W) of 0 and 1 if n > 0), and `segments_info`, a list of dicts of `id` (from 0),
        `label_id`, `was_fused` (False) and `score` (six decimals).

    Raises:
        ValueError: shapes, sizes or thresholds do not fit, or both return formats are requested.
    """
    sizes = check_inputs(class_queries_logits, masks_queries_logits, target_sizes)
    check_fractions(
        threshold=threshold, mask_threshold=mask_threshold, overlap_mask_area_threshold=overlap_mask_area_threshold
    )
    if return_coco_annotation and return_binary_maps:
        raise ValueError("return_coco_annotation and return_binary_maps exclude each other: set at most one of them.")
    results = []
    for i, (class_logits, mask_logits) in enumerate(each_image(class_queries_logits, masks_queries_logits)):
        middle = grid_of(mask_logits) if intermediate_size is None else pair("intermediate_size", intermediate_size)
        device, num_queries = mask_logits.device, len(class_logits)
        probabilities = class_probabilities(class_logits, cls_sigmoid)
        # The same call as in transformers, to get the same order of instances.
        scores, pairs = probabilities.flatten().topk(num_queries, sorted=False)
        candidates = (scores >= threshold).nonzero()[:, 0]
        scores, pairs = scores[candidates], pairs[candidates]
        queries, labels = pairs.div(probabilities.shape[1], rounding_mode="floor"), pairs % probabilities.shape[1]
        height, width = sizes[i] if sizes else middle
        rows, columns = (nearest_axis(a, b).to(device) for a, b in zip(middle, (height, width), strict=True))
        queries, mask_of_pair = queries.unique(return_inverse=True)
        masks, pixels, mask_scores = _masks_above_zero(mask_logits[queries], middle)
        scores = scores * mask_scores[mask_of_pair]
        seen = pixels > 0
        if height < middle[0] or width < middle[1]:  # only then can nearest neighbor miss a mask
            seen = masks[:, rows.unique()][:, :, columns.unique()].flatten(1).any(1)
        painted = torch.full(middle, -1.0, dtype=torch.float32, device=device)
        segments: list[dict[str, Any]] = []
        shown: list[int] = []
        pairs_on_host = (scores.tolist(), labels.tolist(), mask_of_pair.tolist(), seen[mask_of_pair].tolist())
        for score, label, k, visible in zip(*pairs_on_host, strict=True):
            if visible and score >= threshold:
                painted.masked_fill_(masks[k], len(segments))
                segments.append({"id": len(segments), "label_id": label, "was_fused": False, "score": round(score, 6)})
                shown.append(k)
        if return_binary_maps and shown:
            segmentation = torch.empty(len(shown), height, width, dtype=torch.float32, device=device)
            for target, k in zip(segmentation, shown, strict=True):
                target.copy_(masks[k].index_select(0, rows).index_select(1, columns))
        else:
            segmentation = painted.index_select(0, rows).index_select(1, columns)
        result = _run_lengths(segmentation) if return_coco_annotation else segmentation
        results.append({"segmentation": result, "segments_info": segments})
    return results


@in_float32
def post_process_panoptic_segmentation(
    class_queries_logits: Tensor,
    masks_queries_logits: Tensor,
    threshold: float = 0.5,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
    label_ids_to_fuse: Iterable[int] | None = None,
    target_sizes: Iterable[Sequence[int]] | Tensor | None = None,
    *,
    cls_sigmoid: bool = False,
    intermediate_size: Size | None = (384, 384),
    unique_ids: bool = False,
) -> list[dict[str, Any]]:
    """One segment per pixel, things and stuff together.

    Follows transformers' `Mask2FormerImageProcessor.post_process_panoptic_segmentation`: queries whose best class is
    not "no object" and scores above the threshold compete for each pixel by score times mask probability. A query that
    wins too little of the area in which its own product reaches `mask_threshold` is dropped.

    Args:
        class_queries_logits: (B, Q, C + 1), raw.
        masks_queries_logits: (B, Q, h, w), raw.
        threshold: a query's class score must exceed it, 0..1.
        mask_threshold: a query's area consists of the pixels at which its score times mask probability reaches this,
            0..1.
        overlap_mask_area_threshold: the fraction of this area that a query must win, 0..1.
        label_ids_to_fuse: stuff classes, whose segments share one id; None for none. As in transformers, counting
            continues from the shared id after a fused segment, so ids can repeat, even between a stuff segment and a
            thing.
        target_sizes: (height, width) in pixels of each image's result; None for the intermediate size.
        cls_sigmoid: class probabilities are sigmoids instead of a softmax; there is no no-object class then.
        intermediate_size: (height, width) to which logits are resized first; None keeps their own grid.
        unique_ids: unlike transformers, list a fused class once, with its best score, and count ids from 1 without
            gaps or repetition. Has no effect without classes to fuse.

    Returns:
        For each image a dict of `segmentation`, an int32 map (H, W) of segment ids, 0 where there is none, and
        `segments_info`, a list of dicts of `id` (from 1), `label_id`, `was_fused` and `score` (six decimals). Without
        any query above the threshold the map is float32 and -1 everywhere.

    Raises:
        ValueError: shapes, sizes or thresholds do not fit.
    """
    sizes = check_inputs(class_queries_logits, masks_queries_logits, target_sizes)
    check_fractions(
        threshold=threshold, mask_threshold=mask_threshold, overlap_mask_area_threshold=overlap_mask_area_threshold
    )
    fused = frozenset(() if label_ids_to_fuse is None else label_ids_to_fuse)
    num_labels = class_queries_logits.shape[-1] - 1
    results: list[dict[str, Any]] = []
    for i, (class_logits, mask_logits) in enumerate(each_image(class_queries_logits, masks_queries_logits)):
        middle = grid_of(mask_logits) if intermediate_size is None else pair("intermediate_size", intermediate_size)
        device, size = mask_logits.device, sizes[i] if sizes else middle
        if cls_sigmoid:
            scores, labels = class_probabilities(class_logits, cls_sigmoid).max(-1)
        else:
            scores, labels = class_logits.float().softmax(-1).max(-1)
        kept = (labels.ne(num_labels) & (scores > threshold)).nonzero()[:, 0]
        if len(kept) == 0:
            nothing = torch.full(size, -1.0, dtype=torch.float32, device=device)
            results.append({"segmentation": nothing, "segments_info": []})
            continue
        scores, labels = scores[kept], labels[kept]
        to_middle = bilinear_resize(grid_of(mask_logits), middle, device)
        finish = partial(_weigh_by_score, scores=scores)
        table = table_of(mask_logits[kept].float())
        tiles = tiles_of(table, grid_of(mask_logits))
        tiles = tiles._replace(lowest=tiles.lowest.sigmoid() * scores, highest=tiles.highest.sigmoid() * scores)
        winners, areas = resized_argmax(
            partial(pixels_of, to_middle, table, len(kept), finish, in_place=True),
            bilinear_resize(middle, size, device),
            torch.arange(len(kept), dtype=torch.int32, device=device),
            settle(tiles, to_middle, 1e-5, mask_threshold),
            mask_threshold,
        )
        won = torch.bincount(winners.view(-1), minlength=len(kept))
        stays = (won > 0) & (areas > 0) & (won.float() / areas > overlap_mask_area_threshold)
        ids = [0] * len(kept)
        segments: list[dict[str, Any]] = []
        id_of_fused: dict[int, int] = {}
        listed: dict[int, dict[str, Any]] = {}
        segment_id = 0
        for k, (stay, label, score) in enumerate(zip(stays.tolist(), labels.tolist(), scores.tolist(), strict=True)):
            if not stay:
                continue
            if unique_ids and label in listed:
                ids[k] = listed[label]["id"]
                listed[label]["score"] = max(listed[label]["score"], round(score, 6))
                continue
            segment_id = len(segments) + 1 if unique_ids else id_of_fused.get(label, segment_id + 1)
            if label in fused:
                id_of_fused[label] = segment_id
            ids[k] = segment_id
            segments.append(
                {"id": segment_id, "label_id": label, "was_fused": label in fused, "score": round(score, 6)}
            )
            if label in fused:
                listed[label] = segments[-1]
        id_of_winner = torch.tensor(ids, dtype=torch.int32, device=device)
        segmentation = id_of_winner.index_select(0, winners.view(-1)).view(size)
        results.append({"segmentation": segmentation, "segments_info": segments})
    return results


def each_image(class_queries_logits: Tensor, masks_queries_logits: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Class logits (Q, C + 1) and mask logits (Q, h, w) of each image, without the padding of the batch."""
    if class_queries_logits.isnan().any():
        # Otherwise the result would look valid: one class everywhere, or nothing.
        warnings.warn(
            "class_queries_logits have NaN, so the segmentations mean nothing: the model's weights are not finite, or "
            "its precision is too low.",
            RuntimeWarning,
            stacklevel=4,
        )
    return zip(class_queries_logits, own_logits(masks_queries_logits), strict=True)


def class_probabilities(class_logits: Tensor, cls_sigmoid: bool) -> Tensor:
    """(Q, C) in 0..1, without the no-object class."""
    class_logits = class_logits.float()
    return (class_logits.sigmoid() if cls_sigmoid else class_logits.softmax(-1))[:, :-1]


def _sum_over_queries(logits: Tensor, out: Tensor, probabilities: Tensor) -> None:
    torch.mm(logits.sigmoid_(), probabilities, out=out)  # (pixels, Q) @ (Q, C)


def _sums_at(resize: BilinearResize, table: Tensor, weights: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return partial(pixels_of, resize, table, weights.shape[1], partial(_sum_over_queries, probabilities=weights))


def _weigh_by_score(logits: Tensor, out: Tensor, scores: Tensor) -> None:
    torch.mul(logits.sigmoid_(), scores, out=out)


def _bounds_of_sums(mask_logits: Tiles, probabilities: Tensor) -> Tiles:
    """Bounds on each class's sum in each tile. Sigmoids are monotone, and probabilities are not negative."""
    lowest, highest = mask_logits.lowest.sigmoid() @ probabilities, mask_logits.highest.sigmoid() @ probabilities
    return mask_logits._replace(lowest=lowest, highest=highest)


def _classes_of_weight(mask_logits: Tensor, probabilities: Tensor) -> Tensor:
    """The classes, int64 in ascending order, whose sum over queries can be the largest at some resized pixel.

    A class's sum is at most the sum of its probabilities over all queries, and at every pixel some class has at least
    `least_best_product`: classes below that bound cannot win.
    """
    scores, _ = probabilities.max(1)
    return (~(probabilities.sum(0) < least_best_product(mask_logits, scores))).nonzero()[:, 0]  # `~`: keeps NaN


def least_best_product(mask_logits: Tensor, scores: Tensor) -> Tensor:
    """A lower bound, valid at every resized pixel, of the largest score (Q,) times mask probability (Q, h, w).

    At each grid point, one of the top-scoring queries has a product of at least `least`. One of a pixel's four corners
    has a weight of at least 1/4, so the best query at that corner has at least `least` / 4 at the pixel.
    """
    surest = scores.topk(min(SUREST, len(scores))).indices
    products = mask_logits.index_select(0, surest).float().sigmoid_().mul_(scores[surest, None, None])
    return products.amax(0).amin() * (0.25 - 1e-4)  # with a margin for rounding errors


def _semantic_scores(
    sums: Callable[[int, int], Tensor], to_target: BilinearResize, channels: int
) -> SemanticSegmentation:
    height, width = to_target.size_out
    scores = torch.empty(channels, height, width, dtype=torch.float32, device=to_target.rows.low.device)
    labels = torch.empty(height, width, dtype=torch.int64, device=scores.device)
    for band in to_target.bands(channels):
        table = sums(band.first, band.last)
        for top, bottom in to_target.steps(band.top, band.bottom, channels):
            values = to_target.whole_rows(table, top, bottom, band.first)
            scores[:, top:bottom] = values.t().view(channels, bottom - top, width)
            labels[top:bottom] = values.argmax(1).view(bottom - top, width)
    return SemanticSegmentation(labels, scores)


def _masks_above_zero(mask_logits: Tensor, size: Size) -> tuple[Tensor, Tensor, Tensor]:
    """Binary masks (n, *size) of the resized logits above 0, pixel counts (n,), and mean probabilities inside (n,)."""
    masks = torch.empty(len(mask_logits), *size, dtype=torch.bool, device=mask_logits.device)
    pixels, totals = torch.empty(2, len(mask_logits), dtype=torch.float32, device=mask_logits.device)
    for part in pieces(len(mask_logits), size[0] * size[1]):
        logits = F.interpolate(mask_logits[part][None].float(), size=size, mode="bilinear", align_corners=False)[0]
        inside = logits.clone().gt_(0)  # in-place, so that it stays float: summing booleans is slow
        masks[part] = inside
        pixels[part] = inside.flatten(1).sum(1)
        totals[part] = logits.sigmoid_().mul_(inside).flatten(1).sum(1)
    return masks, pixels, totals / (pixels + 1e-6)


def _run_lengths(segmentation: Tensor) -> list[list[int]]:
    """For each id of the map, in ascending order: start (from 1, row-major), length, start, length, ..."""
    ids = segmentation.flatten().cpu().numpy()
    starts = np.concatenate([[0], np.flatnonzero(ids[1:] != ids[:-1]) + 1])
    lengths = np.diff(np.append(starts, len(ids)))
    runs, ids = np.stack([starts + 1, lengths], 1), ids[starts]
    return [runs[ids == segment].flatten().tolist() for segment in np.unique(ids)]


def check_inputs(class_logits: Tensor, mask_logits: Tensor, target_sizes: Iterable[Any] | None) -> list[Size]:
    """Raises ValueError if logits or sizes do not fit; returns the target sizes, [] for None."""
    if not isinstance(class_logits, Tensor) or not isinstance(mask_logits, Tensor):
        raise ValueError(
            "class_queries_logits and masks_queries_logits must be torch tensors, not "
            f"{type(class_logits).__name__} and {type(mask_logits).__name__}: use torch.from_numpy for arrays."
        )
    if class_logits.ndim != 3 or class_logits.shape[1] < 1 or class_logits.shape[2] < 2:
        raise ValueError(
            "class_queries_logits must have the shape (batch, queries, classes + 1) with at least one query and one "
            f"class, not {tuple(class_logits.shape)}."
        )
    if mask_logits.ndim != 4 or 0 in mask_logits.shape[1:]:
        raise ValueError(
            "masks_queries_logits must have the shape (batch, queries, height, width) with at least one pixel, not "
            f"{tuple(mask_logits.shape)}."
        )
    if class_logits.shape[:2] != mask_logits.shape[:2]:
        raise ValueError(
            "class_queries_logits and masks_queries_logits must agree in batch and queries, but are "
            f"{tuple(class_logits.shape)} and {tuple(mask_logits.shape)}."
        )
    if target_sizes is None:
        return []
    sizes = [pair("each of target_sizes", size) for size in target_sizes]
    if len(sizes) != len(class_logits):
        raise ValueError(
            f"target_sizes must give one (height, width) for each image, but there are {len(sizes)} for a batch of "
            f"{len(class_logits)}."
        )
    return sizes


def check_fractions(**thresholds: float) -> None:
    """Raises ValueError for the first threshold that is not in 0..1."""
    for name, value in thresholds.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie between 0 and 1, not {value}.")

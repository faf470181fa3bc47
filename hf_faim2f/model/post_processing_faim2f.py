"""From class and mask logits to segmentations: pure functions on tensors.

Three families, by whose numbers they give:

- `post_process_semantic_segmentation`, `post_process_instance_segmentation`, `post_process_panoptic_segmentation`:
  those of transformers' Mask2Former, at a fraction of its time and memory. They follow "Masked-attention Mask
  Transformer for Universal Image Segmentation" (https://arxiv.org/abs/2112.01527) and "Per-Pixel Classification is Not
  All You Need for Semantic Segmentation" (https://arxiv.org/abs/2107.06278, section 3.4).
- `post_process_detections`, `post_process_queries`: those of Focoos's processor, which the FAI models' users know.
- `evaluate_semantic`, `evaluate_instances`: the paths behind the published mIoU and AP of the FAI models.

All take raw logits, the no-object class last: `class_queries_logits` (B, Q, C + 1) and `masks_queries_logits`
(B, Q, h, w), on any device and in any floating type (the arithmetic is float32), and give a list with one entry an
image, on the logits' device. With `cls_sigmoid` each class has its own sigmoid, and the last column is dropped unread.

Why they are fast and lean is in `resize_faim2f.py`, and in one more observation: a mask's score is at most 1, so a
query whose class score is below the threshold can be left out before its mask is touched.
"""

import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .padding_faim2f import own_logits, own_network_size
from .resize_faim2f import (
    BilinearResize,
    MaskEnlargement,
    Region,
    Size,
    Tiles,
    as_they_are,
    bilinear_resize,
    nearest_axis,
    pieces,
    pixels_of,
    regions_of,
    resized_argmax,
    resized_masks,
    rows_of,
    settle,
    tiles_of,
)

# So many queries of the best class scores nearly always cover the picture.
SUREST = 16
# Bytes of binary masks that are worked on together.
GROUP_BYTES = 2**26


@dataclass
class SemanticSegmentation:
    """A semantic map with its evidence, as transformers 5.x's `SemanticSegmentationPostProcessorOutput`."""

    segmentation: Tensor  # (H, W) int64, class ids
    segmentation_scores: Tensor  # (C, H, W) float32, sums over queries of class times mask probability


@dataclass
class Detection:
    """One segmented object. The mask is cropped to its box, so that memory follows the object's size."""

    box: tuple[int, int, int, int]  # x_min, y_min, x_max, y_max in pixels of the image, all four inclusive
    score: float  # 0..1
    class_id: int
    label: str | None  # the class's name, where `id2label` was given
    mask: Tensor  # (y_max - y_min + 1, x_max - x_min + 1) bool


@dataclass
class QueryPredictions:
    """What each query says, in the queries' order and unfiltered: the output in the FAI models' cards."""

    class_ids: Tensor  # (Q,) int64
    scores: Tensor  # (Q,) float32, 0..1
    masks: Tensor  # (Q, H, W) bool


@dataclass
class InstanceEvaluation:
    """The `top_k` pairs of query and class that average precision is computed from, best score first."""

    scores: Tensor  # (K,) float32, 0..1
    class_ids: Tensor  # (K,) int64
    boxes: Tensor  # (K, 4) float32: x_min, y_min, x_max, y_max with exclusive maxima; zeros for an empty mask
    masks: Tensor  # (K, H, W) bool


@torch.no_grad()
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
    `intermediate_size`, the sums are made there, and the sums are resized to the target.

    Args:
        class_queries_logits: (B, Q, C + 1), raw.
        masks_queries_logits: (B, Q, h, w), raw.
        target_sizes: (height, width) in pixels for each image; the intermediate size where None.
        cls_sigmoid: class probabilities are sigmoids instead of a softmax.
        intermediate_size: (height, width); None keeps the logits' own grid.
        return_segmentation_scores: also give every class's sum at every pixel. This takes memory for C values a pixel.

    Returns:
        for each image an int64 map (H, W) of class ids in 0..C-1, or, with scores, a `SemanticSegmentation`.

    Raises:
        ValueError: where shapes or sizes do not fit.
    """
    sizes = _check(class_queries_logits, masks_queries_logits, target_sizes)
    results: list[Any] = []
    for i, (class_logits, mask_logits) in enumerate(_each(class_queries_logits, masks_queries_logits)):
        middle = _intermediate(intermediate_size, mask_logits)
        mask_logits = mask_logits.float()
        probabilities, device = _class_probabilities(class_logits, cls_sigmoid), mask_logits.device  # (Q, C)
        to_middle = bilinear_resize(_grid(mask_logits), middle, device)
        to_target = bilinear_resize(middle, sizes[i] if sizes else middle, device)
        if return_segmentation_scores:
            finish = partial(_sum_over_queries, probabilities=probabilities)
            sums = rows_of(to_middle, _table(mask_logits), probabilities.shape[1], finish)
            results.append(_semantic_scores(sums, to_target, probabilities.shape[1]))
            continue
        table, rounding = _table(mask_logits), 1e-6 * len(probabilities)
        # Of hundreds of classes few can win. Some are found out without any sum, others by bounds of them.
        classes = _classes_of_weight(mask_logits, probabilities) if to_middle.identity else None
        heavy = probabilities if classes is None else probabilities[:, classes]
        tiles = _bounds_of_sums(tiles_of(table, _grid(mask_logits)), heavy)
        kept = _classes_that_can_win(tiles, rounding)
        tiles = tiles._replace(lowest=tiles.lowest[:, kept], highest=tiles.highest[:, kept])
        classes = kept if classes is None else classes[kept]
        finish = partial(_sum_over_queries, probabilities=probabilities[:, classes].contiguous())
        sums_at = partial(pixels_of, to_middle, table, len(classes), finish)
        results.append(resized_argmax(sums_at, to_target, classes, settle(tiles, to_middle, rounding))[0])
    return results


@torch.no_grad()
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
    """The instances of an image: the Q best pairs of query and class whose score reaches the threshold.

    Follows transformers' `Mask2FormerImageProcessor.post_process_instance_segmentation`: a pair's score is its class
    probability times the mean mask probability inside its mask; masks (logit above 0) are made at `intermediate_size`
    and enlarged to the target by nearest neighbour; in the map a later instance covers an earlier one.

    Args:
        class_queries_logits: (B, Q, C + 1), raw.
        masks_queries_logits: (B, Q, h, w), raw.
        threshold: least score of an instance, 0..1.
        mask_threshold: accepted, checked and, as in transformers, without effect here: masks are cut at logit 0.
        overlap_mask_area_threshold: likewise.
        target_sizes: (height, width) in pixels for each image; the intermediate size where None.
        return_coco_annotation: give the map as run lengths, one list for each id of the map in rising order: first
            that of the background, -1, wherever some pixel has no instance, so that the instance of id k is then list
            k + 1; an instance that others cover has no list. A list is start (from 1, row by row), length, start,
            length, ...
        return_binary_maps: give one map an instance, which shows overlaps.
        cls_sigmoid: class probabilities are sigmoids instead of a softmax.
        intermediate_size: (height, width); None keeps the logits' own grid.

    Returns:
        for each image a dict of `segmentation`, a float32 map (H, W) of instance ids, -1 where there is none (or run
        lengths, or float32 (n, H, W) of 0 and 1 where n > 0), and `segments_info`, for each instance a dict of `id`
        (from 0), `label_id`, `was_fused` (False) and `score` (six decimals).

    Raises:
        ValueError: where shapes, sizes or thresholds do not fit, or both kinds of return are asked for.
    """
    sizes = _check(class_queries_logits, masks_queries_logits, target_sizes)
    _check_fractions(
        threshold=threshold, mask_threshold=mask_threshold, overlap_mask_area_threshold=overlap_mask_area_threshold
    )
    if return_coco_annotation and return_binary_maps:
        raise ValueError("return_coco_annotation and return_binary_maps exclude each other: set at most one of them.")
    results = []
    for i, (class_logits, mask_logits) in enumerate(_each(class_queries_logits, masks_queries_logits)):
        middle = _intermediate(intermediate_size, mask_logits)
        device, num_queries = mask_logits.device, len(class_logits)
        probabilities = _class_probabilities(class_logits, cls_sigmoid)
        # the same call as in transformers, for the same order of the instances
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
        if height < middle[0] or width < middle[1]:  # only then can nearest neighbour step over a mask
            seen = masks[:, rows.unique()][:, :, columns.unique()].flatten(1).any(1)
        painted = torch.full(middle, -1.0, device=device)
        segments: list[dict[str, Any]] = []
        shown: list[int] = []
        pairs_on_host = (scores.tolist(), labels.tolist(), mask_of_pair.tolist(), seen[mask_of_pair].tolist())
        for score, label, k, visible in zip(*pairs_on_host, strict=True):
            if visible and score >= threshold:
                painted.masked_fill_(masks[k], len(segments))
                segments.append({"id": len(segments), "label_id": label, "was_fused": False, "score": round(score, 6)})
                shown.append(k)
        if return_binary_maps and shown:
            segmentation = torch.empty(len(shown), height, width, device=device)
            for target, k in zip(segmentation, shown, strict=True):
                target.copy_(masks[k].index_select(0, rows).index_select(1, columns))
        else:
            segmentation = painted.index_select(0, rows).index_select(1, columns)
        result = _run_lengths(segmentation) if return_coco_annotation else segmentation
        results.append({"segmentation": result, "segments_info": segments})
    return results


@torch.no_grad()
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
    """One segment a pixel, things and stuff together.

    Follows transformers' `Mask2FormerImageProcessor.post_process_panoptic_segmentation`: queries whose best class is
    an object of score above the threshold compete for each pixel with score times mask probability; one that wins too
    little of the area where its own product reaches `mask_threshold` is dropped.

    Args:
        class_queries_logits: (B, Q, C + 1), raw.
        masks_queries_logits: (B, Q, h, w), raw.
        threshold: a query's class score must exceed it, 0..1.
        mask_threshold: the least product of score and mask probability that counts as the query's area, 0..1.
        overlap_mask_area_threshold: the fraction of this area that a query must win, 0..1.
        label_ids_to_fuse: classes whose segments share one id ("stuff"); none where None. As in transformers, the
            segment after a fused one continues counting from the fused id, so that ids can repeat, and a segment of a
            stuff class and one of a thing can become one.
        target_sizes: (height, width) in pixels for each image; the intermediate size where None.
        cls_sigmoid: class probabilities are sigmoids instead of a softmax; there is no no-object class then.
        intermediate_size: (height, width); None keeps the logits' own grid.
        unique_ids: fuse better than transformers: a fused class is listed once, with its best score, and ids are
            counted from 1 without gap or repetition. Without classes to fuse it changes nothing.

    Returns:
        for each image a dict of `segmentation`, an int32 map (H, W) of segment ids, 0 where there is none, and
        `segments_info`, for each segment a dict of `id` (from 1), `label_id`, `was_fused` and `score` (six decimals).
        Without any query above the threshold the map is float32 and -1 everywhere.

    Raises:
        ValueError: where shapes, sizes or thresholds do not fit.
    """
    sizes = _check(class_queries_logits, masks_queries_logits, target_sizes)
    _check_fractions(
        threshold=threshold, mask_threshold=mask_threshold, overlap_mask_area_threshold=overlap_mask_area_threshold
    )
    fused = frozenset(() if label_ids_to_fuse is None else label_ids_to_fuse)
    num_labels = class_queries_logits.shape[-1] - 1
    results: list[dict[str, Any]] = []
    for i, (class_logits, mask_logits) in enumerate(_each(class_queries_logits, masks_queries_logits)):
        middle = _intermediate(intermediate_size, mask_logits)
        device, size = mask_logits.device, sizes[i] if sizes else middle
        if cls_sigmoid:
            scores, labels = _class_probabilities(class_logits, cls_sigmoid).max(-1)
        else:
            scores, labels = class_logits.float().softmax(-1).max(-1)
        kept = (labels.ne(num_labels) & (scores > threshold)).nonzero()[:, 0]
        if len(kept) == 0:
            results.append({"segmentation": torch.full(size, -1.0, device=device), "segments_info": []})
            continue
        scores, labels = scores[kept], labels[kept]
        to_middle = bilinear_resize(_grid(mask_logits), middle, device)
        finish = partial(_weigh_by_score, scores=scores)
        table = _table(mask_logits[kept].float())
        tiles = tiles_of(table, _grid(mask_logits))
        tiles = tiles._replace(lowest=tiles.lowest.sigmoid() * scores, highest=tiles.highest.sigmoid() * scores)
        winners, areas = resized_argmax(
            partial(pixels_of, to_middle, table, len(kept), finish, in_place=True),
            bilinear_resize(middle, size, device),
            torch.arange(len(kept), dtype=torch.int32, device=device),
            settle(tiles, to_middle, 1e-5, mask_threshold),
            mask_threshold,
        )
        won = torch.bincount(winners.view(-1), minlength=len(kept))
        stays = (won > 0) & (areas > 0) & (won / areas > overlap_mask_area_threshold)
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


@torch.no_grad()
def post_process_detections(
    class_queries_logits: Tensor,
    masks_queries_logits: Tensor,
    network_size: Sequence[int],
    target_sizes: Iterable[Sequence[int]] | Tensor | None = None,
    *,
    id2label: Mapping[int, str] | None = None,
    cls_sigmoid: bool = False,
    threshold: float = 0.5,
    mask_threshold: float = 0.5,
    top_k: int = 100,
    use_mask_score: bool = True,
    predict_all_pixels: bool = False,
    filter_empty_masks: bool = True,
) -> list[list[Detection]]:
    """Segmented objects with box, score, class and mask.

    Gives the numbers of Focoos's `MaskFormerProcessor` (focoos 0.25), except that masks are cropped to the whole of
    their box (Focoos's crop lacks the last row and column), that batches of any size work, and that
    `filter_empty_masks` looks at pixels also where `use_mask_score` is set (Focoos, which has it off in its models'
    configurations, then looks at the sum of a mask scaled by 1e-3, and would lose every mask under 1000 pixels).

    Args:
        class_queries_logits: (B, Q, C + 1), raw.
        masks_queries_logits: (B, Q, h, w), raw.
        network_size: (height, width) of `pixel_values`: mask probabilities are resized to it before they are cut.
        target_sizes: (height, width) in pixels for each image; `network_size` where None.
        id2label: the classes' names, of all C classes and no others.
        cls_sigmoid: class probabilities are sigmoids instead of a softmax.
        threshold: a detection's score must exceed it, 0..1; 0 keeps all.
        mask_threshold: least mask probability inside a mask, 0..1.
        top_k: at most so many detections an image; where there are fewer than Q, they come best score first.
        use_mask_score: the score is the class probability times the mean mask probability inside the mask, instead of
            the class probability alone.
        predict_all_pixels: every pixel belongs to the query of largest class probability times mask probability,
            instead of to each mask that reaches `mask_threshold`.
        filter_empty_masks: leave out masks of at most one pixel at the network's size, and those of which nothing is
            left at the image's. Otherwise a mask without pixels has the box (0, 0, 0, 0) and a mask of one False.

    Returns:
        for each image its detections, in the queries' order, or best first where Q > `top_k`.

    Raises:
        ValueError: where shapes, sizes or thresholds do not fit.
    """
    sizes = _check(class_queries_logits, masks_queries_logits, target_sizes)
    whole = _size("network_size", network_size)
    _check_fractions(threshold=threshold, mask_threshold=mask_threshold)
    if id2label is not None:
        _check_names(id2label, class_queries_logits.shape[2] - 1)
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}.")
    results = []
    for i, (class_logits, mask_logits) in enumerate(_each(class_queries_logits, masks_queries_logits)):
        network = own_network_size(whole, _grid(masks_queries_logits[0]), _grid(mask_logits))
        queries = _NetworkSizeQueries(class_logits, mask_logits, network, cls_sigmoid, mask_threshold)
        if predict_all_pixels:
            queries.share_pixels()
        candidates = torch.arange(len(class_logits), device=mask_logits.device)
        if threshold > 0:  # a mask's score is at most 1
            candidates = (queries.class_scores > threshold).nonzero()[:, 0]
        to_image = MaskEnlargement(network, sizes[i] if sizes else network, mask_logits.device)
        found: list[tuple[float, bool, Detection]] = []
        for group in _groups(candidates, network):
            masks, pixels, mask_scores = queries.masks(group)
            scores = queries.class_scores[group] * mask_scores if use_mask_score else queries.class_scores[group]
            boxes = to_image.boxes_of_parts(masks)
            rows = zip(
                scores.tolist(), queries.class_ids[group].tolist(), pixels.tolist(), boxes.tolist(), masks, strict=True
            )
            for score, class_id, count, box, (region, mask) in rows:
                if threshold > 0 and not score > threshold:
                    continue
                label = None if id2label is None else id2label[class_id]
                detection = Detection((0, 0, 0, 0), score, class_id, label, mask.new_zeros(1, 1))
                if box[2] >= 0:
                    detection.box = tuple(box)
                    detection.mask = to_image.crop(mask, box, (region.top, region.left))
                found.append((score, count <= 1 or box[2] < 0, detection))
        if len(class_logits) > top_k:  # before the empty ones go, as in Focoos
            found = sorted(found, key=lambda item: -item[0])[:top_k]
        results.append([detection for _, empty, detection in found if not (empty and filter_empty_masks)])
    return results


@torch.no_grad()
def post_process_queries(
    class_queries_logits: Tensor,
    masks_queries_logits: Tensor,
    network_size: Sequence[int],
    target_sizes: Iterable[Sequence[int]] | Tensor | None = None,
    *,
    cls_sigmoid: bool = False,
    mask_threshold: float = 0.5,
    use_mask_score: bool = True,
    predict_all_pixels: bool = False,
) -> list[QueryPredictions]:
    """Every query's class, score and mask, unfiltered: the output that the FAI models' cards describe.

    The steps and arguments are those of `post_process_detections`. The masks take Q * H * W bytes an image.

    Returns:
        for each image `class_ids` (Q,), `scores` (Q,) in 0..1 and `masks` (Q, H, W), bool, at the image's size.

    Raises:
        ValueError: where shapes, sizes or thresholds do not fit.
    """
    sizes = _check(class_queries_logits, masks_queries_logits, target_sizes)
    whole = _size("network_size", network_size)
    _check_fractions(mask_threshold=mask_threshold)
    results = []
    for i, (class_logits, mask_logits) in enumerate(_each(class_queries_logits, masks_queries_logits)):
        network = own_network_size(whole, _grid(masks_queries_logits[0]), _grid(mask_logits))
        device, size = mask_logits.device, sizes[i] if sizes else network
        queries = _NetworkSizeQueries(class_logits, mask_logits, network, cls_sigmoid, mask_threshold)
        if predict_all_pixels:
            queries.share_pixels()
        to_image = MaskEnlargement(network, size, device)
        everyone = torch.arange(len(class_logits), device=device)
        scores, image_masks = (
            queries.class_scores.clone(),
            torch.zeros(len(everyone), *size, dtype=torch.bool, device=device),
        )
        for group in _groups(everyone, network):
            masks, _, mask_scores = queries.masks(group)
            if use_mask_score:
                scores[group] *= mask_scores
            boxes = to_image.boxes_of_parts(masks).tolist()
            for query, (region, mask), box in zip(group.tolist(), masks, boxes, strict=True):
                x_min, y_min, x_max, y_max = box
                if x_max >= 0:
                    crop = to_image.crop(mask, box, (region.top, region.left))
                    image_masks[query, y_min : y_max + 1, x_min : x_max + 1] = crop
        results.append(QueryPredictions(queries.class_ids, scores, image_masks))
    return results


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

    Gives the numbers of Focoos's `eval_postprocess` for semantic models: mask *probabilities* are resized to the
    network's input and then to the image, and each pixel has the class of the largest sum over queries.

    Args:
        class_queries_logits: (B, Q, C + 1), raw.
        masks_queries_logits: (B, Q, h, w), raw.
        network_size: (height, width) of `pixel_values`.
        target_sizes: (height, width) in pixels for each image; `network_size` where None.
        cls_sigmoid: class probabilities are sigmoids instead of a softmax.

    Returns:
        for each image an int64 map (H, W) of class ids in 0..C-1.

    Raises:
        ValueError: where shapes or sizes do not fit.
    """
    sizes = _check(class_queries_logits, masks_queries_logits, target_sizes)
    whole = _size("network_size", network_size)
    results = []
    for i, (class_logits, mask_logits) in enumerate(_each(class_queries_logits, masks_queries_logits)):
        network = own_network_size(whole, _grid(masks_queries_logits[0]), _grid(mask_logits))
        # Resizing is linear in the probabilities, so the sums over queries can be made first, on the smallest grid.
        sums = _table(mask_logits.float()).sigmoid_() @ _class_probabilities(class_logits, cls_sigmoid)
        rounding = 1e-6 * len(class_logits)
        to_network = bilinear_resize(_grid(mask_logits), network, mask_logits.device)
        to_image = bilinear_resize(network, sizes[i] if sizes else network, mask_logits.device)
        tiles = tiles_of(sums, _grid(mask_logits))
        classes = _classes_that_can_win(tiles, rounding)
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

    Gives the numbers of Focoos's `eval_postprocess` for instance models: the `top_k` best pairs of query and class;
    mask *probabilities* are resized to the network's input and then to the image; a pair's score is its class
    probability times the mean mask probability inside the mask.

    Args:
        class_queries_logits: (B, Q, C + 1), raw.
        masks_queries_logits: (B, Q, h, w), raw.
        network_size: (height, width) of `pixel_values`.
        target_sizes: (height, width) in pixels for each image; `network_size` where None.
        cls_sigmoid: class probabilities are sigmoids instead of a softmax.
        top_k: how many pairs, at most Q * C.
        mask_threshold: mask probability that a mask's pixels exceed, 0..1.

    Returns:
        for each image an `InstanceEvaluation` with K = min(top_k, Q * C).

    Raises:
        ValueError: where shapes, sizes or thresholds do not fit.
    """
    sizes = _check(class_queries_logits, masks_queries_logits, target_sizes)
    whole = _size("network_size", network_size)
    _check_fractions(mask_threshold=mask_threshold)
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}.")
    results = []
    for i, (class_logits, mask_logits) in enumerate(_each(class_queries_logits, masks_queries_logits)):
        network = own_network_size(whole, _grid(masks_queries_logits[0]), _grid(mask_logits))
        device = mask_logits.device
        probabilities = _class_probabilities(class_logits, cls_sigmoid)
        scores, pairs = probabilities.flatten().topk(min(top_k, probabilities.numel()))
        queries, class_ids = pairs.div(probabilities.shape[1], rounding_mode="floor"), pairs % probabilities.shape[1]
        queries, row_of_pair = queries.unique(return_inverse=True)
        table = _table(mask_logits[queries].float()).sigmoid_()
        to_network = bilinear_resize(_grid(mask_logits), network, device)
        to_image = bilinear_resize(network, sizes[i] if sizes else network, device)
        masks, pixels, totals = resized_masks(
            rows_of(to_network, table, len(queries)), to_image, len(queries), lambda probs: probs > mask_threshold
        )
        boxes = MaskEnlargement(to_image.size_out, to_image.size_out, device).boxes(masks)
        boxes[:, 2:] += 1  # exclusive, and 0 where there was no pixel (-1)
        scores, order = (scores * (totals / (pixels + 1e-6))[row_of_pair]).sort(descending=True, stable=True)
        rows = row_of_pair[order]
        results.append(InstanceEvaluation(scores, class_ids[order], boxes.clamp(min=0).float()[rows], masks[rows]))
    return results


def _each(class_queries_logits: Tensor, masks_queries_logits: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Class logits (Q, C + 1) and mask logits (Q, h, w) of each image, without the padding of the batch."""
    if class_queries_logits.isnan().any():
        # The segmentations look like any: one class everywhere, or nothing.
        warnings.warn(
            "class_queries_logits have NaN, so the segmentations mean nothing: the model's weights are not finite, or "
            "its precision is too low.",
            RuntimeWarning,
            stacklevel=3,
        )
    return zip(class_queries_logits, own_logits(masks_queries_logits), strict=True)


def _class_probabilities(class_logits: Tensor, cls_sigmoid: bool) -> Tensor:
    """(Q, C) in 0..1, without the no-object class."""
    class_logits = class_logits.float()
    return (class_logits.sigmoid() if cls_sigmoid else class_logits.softmax(-1))[:, :-1]


def _grid(mask_logits: Tensor) -> Size:
    return mask_logits.shape[1], mask_logits.shape[2]


def _table(maps: Tensor) -> Tensor:
    """Maps (K, h, w) as the table (h * w, K) that a `BilinearResize` reads; new memory."""
    return maps.flatten(1).t().clone(memory_format=torch.contiguous_format)


def _sum_over_queries(logits: Tensor, out: Tensor, probabilities: Tensor) -> None:
    torch.mm(logits.sigmoid_(), probabilities, out=out)  # (pixels, Q) @ (Q, C)


def _weigh_by_score(logits: Tensor, out: Tensor, scores: Tensor) -> None:
    torch.mul(logits.sigmoid_(), scores, out=out)


def _bounds_of_sums(mask_logits: Tiles, probabilities: Tensor) -> Tiles:
    """Bounds of each class's sum in each tile: sigmoids rise with their logits, and probabilities are not negative."""
    lowest, highest = mask_logits.lowest.sigmoid() @ probabilities, mask_logits.highest.sigmoid() @ probabilities
    return Tiles(mask_logits.shape, lowest, highest)


def _classes_of_weight(mask_logits: Tensor, probabilities: Tensor) -> Tensor:
    """The classes, int64 in rising order, whose sum over queries can be the largest at a pixel between four points of
    the masks' grid. What is left out is proven to lose; see `_least_somewhere`."""
    scores, _ = probabilities.max(1)
    # What is not a number is not left out.
    return (~(probabilities.sum(0) < _least_somewhere(mask_logits, scores))).nonzero()[:, 0]


def _least_somewhere(mask_logits: Tensor, scores: Tensor) -> Tensor:
    """What the largest product of score (Q,) and mask probability (Q, h, w) has at least at every resized pixel.

    At each point of the grid, one of the surest queries has at least `least`. Of a pixel's four corners one weighs a
    quarter or more, and the query that is best there has so much of `least` at the pixel.
    """
    surest = scores.topk(min(SUREST, len(scores))).indices
    products = mask_logits.index_select(0, surest).float().sigmoid_().mul_(scores[surest, None, None])
    least = products.amax(0).amin()
    # Computed values have errors of a few units in their last place.
    return least * (0.25 - 1e-4)


def _classes_that_can_win(tiles: Tiles, rounding: float) -> Tensor:
    """The classes, int64 in rising order, that can be the largest somewhere: those whose upper bound is not below
    another's lower bound in every tile. What is left out is proven to lose: this is no approximation."""
    best = tiles.lowest.amax(1, keepdim=True)
    return (~(tiles.highest + rounding < best)).any(0).nonzero()[:, 0]


def _semantic_scores(
    sums: Callable[[int, int], Tensor], to_target: BilinearResize, channels: int
) -> SemanticSegmentation:
    height, width = to_target.size_out
    device = to_target.rows.low.device
    scores = torch.empty(channels, height, width, device=device)
    labels = torch.empty(height, width, dtype=torch.int64, device=device)
    for band in to_target.bands(channels):
        table = sums(band.first, band.last)
        for top, bottom in to_target.steps(band.top, band.bottom, channels):
            values = to_target.whole_rows(table, top, bottom, band.first)
            scores[:, top:bottom] = values.t().view(channels, bottom - top, width)
            labels[top:bottom] = values.argmax(1).view(bottom - top, width)
    return SemanticSegmentation(labels, scores)


def _masks_above_zero(mask_logits: Tensor, size: Size) -> tuple[Tensor, Tensor, Tensor]:
    """Binary masks (n, *size) of the resized logits above 0, their pixels (n,), and the mean probability inside."""
    masks = torch.empty(len(mask_logits), *size, dtype=torch.bool, device=mask_logits.device)
    pixels, totals = (torch.empty(len(mask_logits), device=mask_logits.device) for _ in range(2))
    for part in pieces(len(mask_logits), size[0] * size[1]):
        logits = F.interpolate(mask_logits[part][None].float(), size=size, mode="bilinear", align_corners=False)[0]
        inside = logits.clone().gt_(0)  # in place, which gives numbers: sums of truth values are slow
        masks[part] = inside
        pixels[part] = inside.flatten(1).sum(1)
        totals[part] = logits.sigmoid_().mul_(inside).flatten(1).sum(1)
    return masks, pixels, totals / (pixels + 1e-6)


def _run_lengths(segmentation: Tensor) -> list[list[int]]:
    """For each id of the map, in rising order: start (from 1, row by row), length, start, length, ..."""
    ids = segmentation.flatten().cpu().numpy()
    starts = np.concatenate([[0], np.flatnonzero(ids[1:] != ids[:-1]) + 1])
    lengths = np.diff(np.append(starts, len(ids)))
    runs, ids = np.stack([starts + 1, lengths], 1), ids[starts]
    return [runs[ids == segment].flatten().tolist() for segment in np.unique(ids)]


def _groups(queries: Tensor, network: Size) -> tuple[Tensor, ...]:
    """Queries (n,) in groups whose masks at the network's size are of bounded size together."""
    return queries.split(max(1, GROUP_BYTES // (network[0] * network[1]))) if len(queries) else ()


class _NetworkSizeQueries:
    """One image's queries as Focoos sees them: mask probabilities, resized to the network's input, and then cut.

    What is worked out of a mask is the part of the picture in which it can be.
    """

    def __init__(
        self, class_logits: Tensor, mask_logits: Tensor, network: Size, cls_sigmoid: bool, mask_threshold: float
    ):
        self.class_scores, self.class_ids = _class_probabilities(class_logits, cls_sigmoid).max(-1)
        self.mask_logits, self.mask_threshold = mask_logits, mask_threshold
        self.resize = bilinear_resize(_grid(mask_logits), network, mask_logits.device)
        # Of each pixel (H, W), and of each query (Q,) the number by which it stands there; see `share_pixels`.
        self.owners: Tensor | None = None
        self.numbers: list[int] = []

    def probabilities(self, queries: Tensor) -> Tensor:
        """(n, h, w) in 0..1, new memory."""
        return self.mask_logits.index_select(0, queries).float().sigmoid_()

    def share_pixels(self) -> None:
        """From here on a pixel belongs to the one query of largest class score times mask probability."""
        # A product is at most the class score: what is left out is proven to own nothing.
        least = _least_somewhere(self.mask_logits, self.class_scores)
        able = (~(self.class_scores < least)).nonzero()[:, 0]
        products = _table(self.probabilities(able)).mul_(self.class_scores[able])
        grid = bilinear_resize(self.resize.size_in, self.resize.size_in, products.device)
        products_at = partial(pixels_of, grid, products, len(able), as_they_are, in_place=True)
        numbers = torch.arange(len(able), device=products.device)
        owners, _ = resized_argmax(products_at, self.resize, numbers.int())
        self.owners = owners.byte() if len(able) < 256 else owners  # bytes are compared fastest
        of_all = torch.full_like(self.class_ids, len(able))  # sentinel id that no pixel has
        self.numbers = of_all.index_copy_(0, able, numbers).tolist()

    def masks(self, queries: Tensor) -> tuple[list[tuple[Region, Tensor]], Tensor, Tensor]:
        """Masks at the network's size, bool, each with the part of the picture that it is of, outside of which nothing
        is set; their pixels (n,) and their scores (n,) in 0..1."""
        probabilities = self.probabilities(queries)
        if self.owners is None:
            # A pixel reaches the threshold where one of its corners does, but for rounding.
            able = torch.ge(probabilities, self.mask_threshold - 1e-6, out=torch.empty_like(probabilities))
            regions = [self.resize.reach(region) for region in regions_of(able.amax(2), able.amax(1))]
        else:
            regions = self._regions_of_owners(queries)
        found: list[tuple[Region, Tensor]] = []
        pixels, totals = (torch.zeros(len(queries), device=queries.device) for _ in range(2))
        for place, (query, region) in enumerate(zip(queries.tolist(), regions, strict=True)):
            shape = region.bottom - region.top, region.right - region.left
            mask = torch.empty(shape, dtype=torch.bool, device=queries.device)
            found.append((region, mask))
            for step in self.resize.parts(region):
                resized = self.resize.part(probabilities[place], step)
                rows = mask[step.top - region.top : step.bottom - region.top]
                if self.owners is None:
                    rows.copy_(torch.ge(resized, self.mask_threshold, out=torch.empty_like(resized)))
                else:
                    rows.copy_(self._owned(query, step).view(torch.bool))
                pixels[place] += rows.sum()
                totals[place] += resized.mul_(rows).sum()
        # Focoos weighs masks by 1e-3 and adds 1e-5 below the line: a tenth of a per cent for a mask of ten pixels
        return found, pixels.long(), totals * 1e-3 / (pixels * 1e-3 + 1e-5)

    def _regions_of_owners(self, queries: Tensor) -> list[Region]:
        height, width = self.resize.size_out
        rows = torch.empty(len(queries), height, dtype=torch.uint8, device=queries.device)
        columns = torch.empty(len(queries), width, dtype=torch.uint8, device=queries.device)
        everywhere = Region(0, height, 0, width)
        for place, query in enumerate(queries.tolist()):
            owned = self._owned(query, everywhere)
            torch.amax(owned, 1, out=rows[place])
            torch.amax(owned, 0, out=columns[place])
        # A pixel more on each side, which enlarging reads.
        return [
            Region(
                max(0, region.top - 1), min(height, region.bottom + 1),
                max(0, region.left - 1), min(width, region.right + 1),
            )
            for region in regions_of(rows, columns)
        ]  # fmt: skip

    def _owned(self, query: int, region: Region) -> Tensor:
        """1 at the query's own pixels, 0 elsewhere: bytes, new memory."""
        assert self.owners is not None
        part = self.owners[region.top : region.bottom, region.left : region.right]
        owned = torch.empty(part.shape, dtype=torch.uint8, device=part.device)
        # Into bytes, which takes a tenth of the time of making truth values.
        return torch.eq(part, self.numbers[query], out=owned)


def _intermediate(size: Sequence[int] | None, mask_logits: Tensor) -> Size:
    return _grid(mask_logits) if size is None else _size("intermediate_size", size)


def _size(name: str, value: Iterable[Any]) -> Size:
    try:
        height, width = (operator.index(side) for side in value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be two whole numbers, (height, width), not {value!r}.") from None
    if height < 1 or width < 1:
        raise ValueError(f"{name} must be a positive (height, width), not ({height}, {width}).")
    return height, width


def _check(class_logits: Tensor, mask_logits: Tensor, target_sizes: Iterable[Any] | None) -> list[Size]:
    """Raises on logits or sizes that do not fit; returns the target sizes, [] for None."""
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
    sizes = [_size("each of target_sizes", size) for size in target_sizes]
    if len(sizes) != len(class_logits):
        raise ValueError(
            f"target_sizes must give one (height, width) for each image, but there are {len(sizes)} for a batch of "
            f"{len(class_logits)}."
        )
    return sizes


def _check_names(id2label: Mapping[int, str], classes: int) -> None:
    for label in sorted(set(id2label) ^ set(range(classes)), key=str)[:1]:
        wrong = "no class of theirs" if label in id2label else "without a name"
        raise ValueError(
            f"id2label must name the classes 0 to {classes - 1} of these logits, but {label!r} is {wrong}: pass the "
            "model's own, model.config.id2label."
        )


def _check_fractions(**thresholds: float) -> None:
    for name, value in thresholds.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie between 0 and 1, not {value}.")

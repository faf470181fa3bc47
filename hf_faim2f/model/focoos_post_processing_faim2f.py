"""Post-processing that is numerically equal to that of Focoos's library.

- `post_process_detections` and `post_process_queries`: as in its processor.
- `evaluate_semantic` and `evaluate_instances`: as in its evaluation, which gave the published mIoU and AP.

Unlike transformers' post-processing, these functions resize mask *probabilities* to the network's input size, and then
either the thresholded masks or the probabilities to the image.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .argmax_faim2f import classes_that_can_win, mixed_cells, resized_argmax, settle, shortlists, tiles_of
from .padding_faim2f import own_network_size
from .post_processing_faim2f import (
    check_fractions,
    check_inputs,
    class_probabilities,
    each_image,
    in_float32,
    least_best_product,
)
from .resize_faim2f import (
    BilinearResize,
    MaskEnlargement,
    Region,
    Size,
    as_they_are,
    bilinear_resize,
    grid_of,
    pair,
    pixels_of,
    regions_of,
    resized_masks,
    rows_of,
    table_of,
)

# Maximum size in bytes of the binary masks of a group of queries.
GROUP_BYTES = 2**26


@dataclass
class Detection:
    """One segmented object. The mask is cropped to its box, so that its memory is proportional to the object's size."""

    box: tuple[int, int, int, int]  # x_min, y_min, x_max, y_max in pixels of the image, all four inclusive
    score: float  # 0..1
    class_id: int
    label: str | None  # the class's name, if `id2label` was given
    mask: Tensor  # (y_max - y_min + 1, x_max - x_min + 1) bool


@dataclass
class QueryPredictions:
    """The prediction of every query, in order and unfiltered: the output that the FAI models' cards describe."""

    class_ids: Tensor  # (Q,) int64
    scores: Tensor  # (Q,) float32, 0..1
    masks: Tensor  # (Q, H, W) bool


@in_float32
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
    """Segmented objects with box, score, class and mask, as returned by Focoos's `MaskFormerProcessor` (focoos 0.25).

    Differences from Focoos: masks are cropped to their whole box (Focoos's crop lacks the last row and column); batches
    of any size work; and `filter_empty_masks` counts pixels also with `use_mask_score`. (Focoos's models do not use
    that setting. With it, Focoos compares the sum of a mask scaled by 1e-3 and drops every mask under 1000 pixels.)

    Args:
        class_queries_logits: (B, Q, C + 1), raw.
        masks_queries_logits: (B, Q, h, w), raw.
        network_size: (height, width) of `pixel_values`, to which mask probabilities are resized before thresholding.
        target_sizes: (height, width) in pixels of each image's result; None for `network_size`.
        id2label: names of exactly the C classes.
        cls_sigmoid: class probabilities are sigmoids instead of a softmax.
        threshold: a detection's score must exceed it, 0..1; 0 keeps all.
        mask_threshold: minimum probability of a mask's pixels, 0..1.
        top_k: maximum number of detections per image; if Q is larger, they are sorted by descending score.
        use_mask_score: the score is the class probability times the mean mask probability inside the mask, instead of
            the class probability alone.
        predict_all_pixels: assign each pixel to the query with the largest class probability times mask probability,
            instead of to every mask that reaches `mask_threshold`.
        filter_empty_masks: drop masks of at most one pixel at the network's input size, and masks that are empty at the
            image's size. Otherwise an empty mask has the box (0, 0, 0, 0) and a single pixel that is False.

    Returns:
        For each image its detections, in the order of the queries, or by descending score if Q > `top_k`.

    Raises:
        ValueError: shapes, sizes or thresholds do not fit.
    """
    sizes = check_inputs(class_queries_logits, masks_queries_logits, target_sizes)
    whole = pair("network_size", network_size)
    check_fractions(threshold=threshold, mask_threshold=mask_threshold)
    if id2label is not None:
        _check_names(id2label, class_queries_logits.shape[2] - 1)
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}.")
    results = []
    for i, (class_logits, mask_logits) in enumerate(each_image(class_queries_logits, masks_queries_logits)):
        network = own_network_size(whole, grid_of(masks_queries_logits[0]), grid_of(mask_logits))
        queries = NetworkSizeQueries(class_logits, mask_logits, network, cls_sigmoid, mask_threshold)
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
        if len(class_logits) > top_k:  # before empty masks are dropped, as in Focoos
            found = sorted(found, key=lambda item: -item[0])[:top_k]
        results.append([detection for _, empty, detection in found if not (empty and filter_empty_masks)])
    return results


@in_float32
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

    Steps and arguments are those of `post_process_detections`. The masks take Q * H * W bytes per image.

    Returns:
        For each image `class_ids` (Q,), `scores` (Q,) in 0..1 and `masks` (Q, H, W), bool, at the image's size.

    Raises:
        ValueError: shapes, sizes or thresholds do not fit.
    """
    sizes = check_inputs(class_queries_logits, masks_queries_logits, target_sizes)
    whole = pair("network_size", network_size)
    check_fractions(mask_threshold=mask_threshold)
    results = []
    for i, (class_logits, mask_logits) in enumerate(each_image(class_queries_logits, masks_queries_logits)):
        network = own_network_size(whole, grid_of(masks_queries_logits[0]), grid_of(mask_logits))
        device, size = mask_logits.device, sizes[i] if sizes else network
        queries = NetworkSizeQueries(class_logits, mask_logits, network, cls_sigmoid, mask_threshold)
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


def _groups(queries: Tensor, network: Size) -> tuple[Tensor, ...]:
    """Splits queries (n,) into groups whose masks at the network's input size fit in `GROUP_BYTES`."""
    return queries.split(max(1, GROUP_BYTES // (network[0] * network[1]))) if len(queries) else ()


class NetworkSizeQueries:
    """The queries of one image, with masks thresholded from probabilities resized to the network's input size.

    Of each mask, only the region that can have pixels is computed.
    """

    def __init__(
        self, class_logits: Tensor, mask_logits: Tensor, network: Size, cls_sigmoid: bool, mask_threshold: float
    ):
        self.class_scores, self.class_ids = class_probabilities(class_logits, cls_sigmoid).max(-1)
        self.mask_logits, self.mask_threshold = mask_logits, mask_threshold
        self.resize = bilinear_resize(grid_of(mask_logits), network, mask_logits.device)
        # Set by `share_pixels`: the owner of each pixel (H, W), and each query's number in that map.
        self.owners: Tensor | None = None
        self.numbers: list[int] = []

    def probabilities(self, queries: Tensor) -> Tensor:
        """(n, h, w) in 0..1, in new memory."""
        return self.mask_logits.index_select(0, queries).float().sigmoid_()

    def share_pixels(self) -> None:
        """Assigns each pixel to the query with the largest class score times mask probability."""
        # A product is at most the class score, so the other queries cannot own a pixel.
        least = least_best_product(self.mask_logits, self.class_scores)
        able = (~(self.class_scores < least)).nonzero()[:, 0]
        products = table_of(self.probabilities(able)).mul_(self.class_scores[able])
        grid = bilinear_resize(self.resize.size_in, self.resize.size_in, products.device)
        products_at = partial(pixels_of, grid, products, len(able), as_they_are, in_place=True)
        numbers = torch.arange(len(able), device=products.device)
        owners, _ = resized_argmax(products_at, self.resize, numbers.int())
        self.owners = owners.byte() if len(able) < 256 else owners  # comparing bytes is fastest
        of_all = torch.full_like(self.class_ids, len(able))  # sentinel id that no pixel has
        self.numbers = of_all.index_copy_(0, able, numbers).tolist()

    def masks(self, queries: Tensor) -> tuple[list[tuple[Region, Tensor]], Tensor, Tensor]:
        """Masks at the network's input size as (region, pixels); pixel counts (n,); scores (n,) in 0..1."""
        probabilities = self.probabilities(queries)
        if self.owners is None:
            # A pixel can reach the threshold only if one of its corners does (minus rounding).
            able = torch.ge(probabilities, self.mask_threshold - 1e-6, out=torch.empty_like(probabilities))
            regions = [self.resize.reach(region) for region in regions_of(able.amax(2), able.amax(1))]
        else:
            regions = self._regions_of_owners(queries)
        found: list[tuple[Region, Tensor]] = []
        pixels, totals = torch.zeros(2, len(queries), dtype=torch.float32, device=queries.device)
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
        # Focoos scales masks by 1e-3 and adds 1e-5 to the denominator: 0.1 % less for a mask of ten pixels.
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
        # With a margin of one pixel, which resizing to the image reads.
        return [
            Region(
                max(0, region.top - 1), min(height, region.bottom + 1),
                max(0, region.left - 1), min(width, region.right + 1),
            )
            for region in regions_of(rows, columns)
        ]  # fmt: skip

    def _owned(self, query: int, region: Region) -> Tensor:
        """1 at the pixels that the query owns, 0 elsewhere; uint8, in new memory."""
        assert self.owners is not None
        part = self.owners[region.top : region.bottom, region.left : region.right]
        owned = torch.empty(part.shape, dtype=torch.uint8, device=part.device)
        # Writing bytes is ten times as fast as creating booleans.
        return torch.eq(part, self.numbers[query], out=owned)


def _check_names(id2label: Mapping[int, str], classes: int) -> None:
    for label in sorted(set(id2label) ^ set(range(classes)), key=str)[:1]:
        wrong = "is not one of them" if label in id2label else "has no name"
        raise ValueError(
            f"id2label must name the classes 0 to {classes - 1} of these logits, but {label!r} {wrong}: pass the "
            "model's own, model.config.id2label."
        )


@dataclass
class InstanceEvaluation:
    """The `top_k` pairs of query and class from which average precision is computed, by descending score."""

    scores: Tensor  # (K,) float32, 0..1
    class_ids: Tensor  # (K,) int64
    boxes: Tensor  # (K, 4) float32: x_min, y_min, x_max, y_max with exclusive maxima; zeros for an empty mask
    masks: Tensor  # (K, H, W) bool


@in_float32
def evaluate_semantic(
    class_queries_logits: Tensor,
    masks_queries_logits: Tensor,
    network_size: Sequence[int],
    target_sizes: Iterable[Sequence[int]] | Tensor | None = None,
    *,
    cls_sigmoid: bool = False,
) -> list[Tensor]:
    """The label maps from which the published mIoU of the FAI models is computed.

    As in Focoos's `eval_postprocess` for semantic models, mask *probabilities* are resized to the network's input size
    and then to the image, and each pixel gets the class with the largest sum over queries.

    Args:
        class_queries_logits: (B, Q, C + 1), raw.
        masks_queries_logits: (B, Q, h, w), raw.
        network_size: (height, width) of `pixel_values`.
        target_sizes: (height, width) in pixels of each image's result; None for `network_size`.
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
        # Resizing is linear, so the sums over queries can be computed first, on the smallest grid.
        sums = table_of(mask_logits.float()).sigmoid_() @ class_probabilities(class_logits, cls_sigmoid)
        rounding = 1e-6 * len(class_logits)
        to_network = bilinear_resize(grid_of(mask_logits), network, mask_logits.device)
        to_image = bilinear_resize(network, sizes[i] if sizes else network, mask_logits.device)
        tiles = tiles_of(sums, grid_of(mask_logits), mixed_cells(to_network, to_image))
        classes = classes_that_can_win(tiles, rounding)
        tiles, sums, sums_of = tiles.of(classes), sums.index_select(1, classes), partial(_resized, to_network)
        leading, settled = shortlists(sums, tiles, sums_of, rounding), settle(tiles, to_network, rounding)
        results.append(resized_argmax(sums_of(sums), to_image, classes, settled, shorter=leading)[0])
    return results


def _resized(resize: BilinearResize, sums: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return partial(pixels_of, resize, sums, sums.shape[1], as_they_are, in_place=True)


@in_float32
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
    """The instances from which the published average precision of the FAI models is computed.

    As in Focoos's `eval_postprocess` for instance models: takes the `top_k` best pairs of query and class; resizes mask
    *probabilities* to the network's input size and then to the image; a pair's score is its class probability times
    the mean mask probability inside the mask.

    Args:
        class_queries_logits: (B, Q, C + 1), raw.
        masks_queries_logits: (B, Q, h, w), raw.
        network_size: (height, width) of `pixel_values`.
        target_sizes: (height, width) in pixels of each image's result; None for `network_size`.
        cls_sigmoid: class probabilities are sigmoids instead of a softmax.
        top_k: maximum number of pairs.
        mask_threshold: the probability of a mask's pixels must exceed this, 0..1.

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

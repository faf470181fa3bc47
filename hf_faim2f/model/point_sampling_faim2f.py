"""Point sampling of masks for the loss: predictions, and targets as binary masks or as maps of segment ids.

Points are (x, y) in [0, 1] over the whole map; (0, 0) is the upper left corner of the upper left pixel. Values outside
the map are 0, as in `grid_sample` with `align_corners=False` and zero padding.

A predicted mask is the product of a query's embedding and the mask features. `MaskProduct` keeps the factors. Training
needs most masks only at a few thousand points. Sampling is linear, so the features are sampled before the product. Only
matched masks are computed in full.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinearly samples `maps` (N, C, h, w) at `points` (N, P, 2): (N, C, P)."""
    return nn.functional.grid_sample(maps, 2 * points[:, :, None] - 1, align_corners=False)[..., 0]


def sample_shared(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinearly samples all `maps` (N, h, w) at the same `points` (P, 2): (N, P).

    On a CPU, `grid_sample` processes one image per thread and recomputes the sampling positions for each image. The
    maps are therefore passed as channels of as many images as there are threads.
    """
    count = len(maps)
    if count == 0:
        return maps.new_zeros(0, len(points))
    groups = 1
    if maps.device.type == "cpu":
        groups = next(n for n in range(min(torch.get_num_threads(), count), count + 1) if count % n == 0)
    grouped = maps.view(groups, count // groups, *maps.shape[1:])
    return sample_points(grouped, points.expand(groups, -1, -1)).reshape(count, len(points))


def draw_points(count: int, device: torch.device) -> Tensor:
    """Uniform random points (count, 2), sorted by y, so that maps are read in memory order."""
    points = torch.rand(1, count, 2, dtype=torch.float32, device=device)[0]
    return points[points[:, 1].argsort()]


def most_uncertain(logits: Tensor, candidates: Tensor, count: int) -> Tensor:
    """Indices of the candidates at which each mask is most uncertain (PointRend, CVPR 2020, section 3.1).

    Args:
        logits: (N, h, w), raw.
        candidates: (P, 2), the same for all masks.
        count: number of points to select, at most P.

    Returns:
        (N, count), indices into `candidates`, unordered.
    """
    sure = sample_shared(logits, candidates).abs_()  # (N, P)
    if sure.device.type == "cpu" and 0 < count < sure.shape[1]:
        # NumPy's partial sort is vectorized and much faster than torch's.
        return torch.from_numpy(np.argpartition(sure.numpy(), count - 1, axis=1)[:, :count])
    return sure.topk(count, dim=1, largest=False, sorted=False).indices


def _corners(points: Tensor, height: int, width: int) -> tuple[list[Tensor], list[Tensor]]:
    """The four pixels around each of `points` (..., 2) as flat indices, and their bilinear weights (0 outside)."""
    x, y = points[..., 0] * width - 0.5, points[..., 1] * height - 0.5
    left, top = x.floor(), y.floor()
    indices, weights = [], []
    for row, row_weight in ((top, top + 1 - y), (top + 1, y - top)):
        for column, column_weight in ((left, left + 1 - x), (left + 1, x - left)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            indices.append(row.clamp(0, height - 1).long() * width + column.clamp(0, width - 1).long())
            weights.append(row_weight * column_weight * inside)
    return indices, weights


# Dtypes for which torch lacks most operations, and the wider ones to convert them to.
WIDER = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}


def _is_integer(values: Tensor) -> bool:
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)


def _is_wrong(mask: Tensor, count: int, ignore_value: int) -> Tensor:
    """(), on the mask's device: whether masks (n, H, W) exceed 0..1, or a map (H, W) has unknown segment ids."""
    if mask.ndim == 2:
        # torch wraps a number that a small type cannot hold, such as -1 in uint8, so that it equals 255.
        mask = mask.to(torch.int32) if mask.element_size() < 4 else mask
        return ((mask >= count) & (mask != ignore_value)).any()
    if mask.dtype == torch.bool or mask.numel() == 0:
        return torch.zeros((), dtype=torch.bool, device=mask.device)
    low, high = mask.aminmax()
    return ~((low >= 0) & (high <= 1))  # negated so that NaN counts as wrong


class SegmentTargets:
    """The segments of a batch of images, as binary masks or as maps of segment ids.

    Sampling a map of ids gives the same values as sampling its binary masks: a segment's mask at a point is the sum of
    the bilinear weights of the corners with its id. A map takes H * W integers, regardless of the number of segments.
    """

    def __init__(
        self,
        mask_labels: list[Tensor],
        class_labels: list[Tensor],
        num_labels: int,
        batch_size: int,
        device: torch.device,
        ignore_value: int = 255,
    ) -> None:
        """
        Args:
            mask_labels: per image (n, H, W) of any real dtype with values from 0 to 1, or (H, W) of an integer dtype
                with the ids 0..n-1, and a negative id, or `ignore_value` if it is at least n, where there is no
                segment.
            class_labels: per image (n,), of an integer dtype.
            num_labels: number of classes of the model, for validation.
            batch_size: number of images in the predictions.
            device: device of the predictions, to which the targets are moved.
            ignore_value: like any negative id, marks pixels of no segment in a map, unless it is the id of a segment:
                one of 0..n-1 always has a class in `class_labels`.

        Raises:
            ValueError: the targets are invalid; the message gives the index of the image.
        """
        if len(mask_labels) != batch_size or len(class_labels) != batch_size:
            raise ValueError(
                f"mask_labels and class_labels must have one entry per image: {batch_size} images, "
                f"{len(mask_labels)} mask_labels, {len(class_labels)} class_labels."
            )
        for name, given in (("mask_labels", mask_labels), ("class_labels", class_labels)):
            for index, item in enumerate(given):
                if not isinstance(item, Tensor):
                    raise ValueError(f"{name}[{index}] is a {type(item).__name__}, not a tensor: pass torch tensors.")
        self.device = device
        self.classes = [labels.to(self.device, torch.long) for labels in class_labels]
        self.counts = [len(labels) for labels in class_labels]
        self.maps = []
        for index, (mask, labels) in enumerate(zip(mask_labels, class_labels, strict=True)):
            if labels.ndim != 1:
                raise ValueError(f"class_labels[{index}] must be of shape (n,), got {tuple(labels.shape)}.")
            if len(labels) and not _is_integer(labels):
                raise ValueError(f"class_labels[{index}] must be of an integer type, got {labels.dtype}.")
            if mask.ndim == 3 and len(mask) != len(labels):
                raise ValueError(f"mask_labels[{index}] has {len(mask)} masks, class_labels[{index}] {len(labels)}.")
            if mask.ndim not in (2, 3) or (mask.ndim == 2 and not _is_integer(mask)):
                raise ValueError(
                    f"mask_labels[{index}] must be (n, H, W), or a map of segment ids (H, W) of an integer type; "
                    f"got {tuple(mask.shape)} of {mask.dtype}."
                )
            self.maps.append(mask.to(self.device, WIDER.get(mask.dtype, mask.dtype)))
        self.all_classes = torch.cat(self.classes) if self.classes else torch.zeros(0, dtype=torch.long)
        self._check_values(num_labels, ignore_value)
        self._pad_to_largest()
        self.first = torch.tensor([0, *self.counts[:-1]], device=self.device).cumsum(0)

    def _check_values(self, num_labels: int, ignore_value: int) -> None:
        """Raises ValueError for invalid classes or mask values. Valid batches need one device synchronization."""
        flags = [((self.all_classes < 0) | (self.all_classes >= num_labels)).any()]
        flags += [_is_wrong(mask, count, ignore_value) for mask, count in zip(self.maps, self.counts, strict=True)]
        if not bool(torch.stack(flags).any()):
            return
        for index, (ids, mask, count) in enumerate(zip(self.classes, self.maps, self.counts, strict=True)):
            wrong = sorted({int(label) for label in ids if not 0 <= int(label) < num_labels})
            if wrong:
                raise ValueError(f"class_labels[{index}] has ids outside of 0..{num_labels - 1}: {wrong}.")
            if not bool(_is_wrong(mask, count, ignore_value)):
                continue
            if mask.ndim == 3:
                low, high = (float(value) for value in mask.aminmax())
                raise ValueError(
                    f"mask_labels[{index}] has values from {low:g} to {high:g}, but a mask is 1 on its segment and 0 "
                    "elsewhere: pass it as bool, or scale it to 0..1."
                )
            unknown = [i for i in mask.unique().tolist() if i >= count and i != ignore_value]
            raise ValueError(
                f"mask_labels[{index}] is a map of segment ids and has {unknown[:8]}, but class_labels[{index}] names "
                f"{count} segments, whose ids count from 0: renumber them, and make pixels of no segment -1."
            )

    def _pad_to_largest(self) -> None:
        """Pads smaller maps at the bottom and right with pixels of no segment, to the largest size of the batch."""
        height = max((mask.shape[-2] for mask in self.maps), default=0)
        width = max((mask.shape[-1] for mask in self.maps), default=0)
        for index, mask in enumerate(self.maps):
            below, right = height - mask.shape[-2], width - mask.shape[-1]
            if below or right:
                value = -1 if mask.ndim == 2 else 0
                mask = mask.to(torch.int32) if mask.ndim == 2 and not mask.dtype.is_signed else mask
                self.maps[index] = nn.functional.pad(mask, (0, right, 0, below), value=value)

    def class_of(self, image: Tensor, segment: Tensor) -> Tensor:
        """The class ids (N,) of segments (N,) in images (N,)."""
        return self.all_classes[self.rows_of(image, segment)]

    def sample_all(self, image: int, points: Tensor) -> Tensor:
        """All segments of one image at the same `points` (P, 2): (n, P), in [0, 1]."""
        targets, count = self.maps[image], self.counts[image]
        if targets.ndim == 3:
            # In small groups, so that not all masks are converted to float at once.
            return torch.cat([sample_shared(part.float(), points) for part in targets.split(8)])
        values = torch.zeros(count + 1, len(points), dtype=torch.float32, device=self.device)
        for index, weight in zip(*_corners(points, *targets.shape), strict=True):
            ids = targets.flatten()[index].long()
            # Pixels of no segment go to an extra row, which is dropped.
            ids = torch.where((ids >= 0) & (ids < count), ids, count)
            values.scatter_add_(0, ids[None], weight[None])
        return values[:count]

    def sample_padded(self, points: Tensor) -> Tensor:
        """All segments of all images at the same `points` (P, 2): (B, n, P), n the largest count; padded with 0."""
        values = torch.zeros(
            len(self.maps), max(self.counts, default=0), len(points), dtype=torch.float32, device=self.device
        )
        for image, count in enumerate(self.counts):
            values[image, :count] = self.sample_all(image, points)
        return values

    def padded_classes(self) -> Tensor:
        """The class of each segment, (B, n), in the layout of `sample_padded`."""
        return nn.utils.rnn.pad_sequence(self.classes, batch_first=True)

    def rows_of(self, image: Tensor, segment: Tensor) -> Tensor:
        """The rows (N,) of `sample_batch` for segments (N,) of images (N,)."""
        return self.first[image] + segment

    def sample_batch(self, points: Tensor) -> Tensor:
        """All segments of all images at the same `points` (P, 2): (sum of n, P), in [0, 1], ordered by image."""
        return torch.cat([self.sample_all(image, points) for image in range(len(self.maps))])


@dataclass
class MaskProduct:
    """The factors of a batch's masks: embedding (B, Q, C), and features (B, C, h, w), shared by all predictions."""

    embedding: Tensor
    features: Tensor

    def __len__(self) -> int:
        return len(self.embedding)

    @property
    def device(self) -> torch.device:
        """The device of the masks."""
        return self.embedding.device

    def full(self) -> Tensor:
        """All masks (B, Q, h, w), raw."""
        return self.flat().unflatten(2, self.features.shape[-2:])

    def flat(self) -> Tensor:
        """The same as (B, Q, h * w)."""
        features = self.features.flatten(2)  # (B, C, hw)
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if not traced and len(features) == 1:
            # `bmm` in bfloat16 on a CPU would copy channels-last features, and take twice as long.
            return torch.mm(self.embedding[0], features[0])[None]
        return torch.matmul(self.embedding, features)


Masks = Tensor | MaskProduct


def matched_masks(
    predictions: Sequence[Masks], matched: Sequence[tuple[Tensor, Tensor]], counts: Sequence[int]
) -> list[Tensor]:
    """The matched masks of all predictions, image by image.

    Args:
        predictions: S predictions for B images.
        matched: for each prediction, images (N,) in ascending order and queries (N,).
        counts: number of matches per image, equal for all predictions.

    Returns:
        For each image (S, n, h, w), raw.
    """
    of_layers = []  # for each prediction and image, (n, h, w), or (n, C) for products
    for masks, (image, query) in zip(predictions, matched, strict=True):
        if isinstance(masks, MaskProduct):
            rows = masks.embedding[image, query]
        else:
            # index_select on a flat table: its backward is much faster than that of indexing with two tensors.
            rows = masks.flatten(0, 1).index_select(0, image * masks.shape[1] + query)
        of_layers.append(rows.split(list(counts)))
    of_images = [torch.stack(parts) for parts in zip(*of_layers, strict=True)]
    first = predictions[0]
    if not isinstance(first, MaskProduct):
        return of_images
    # One product for all layers of an image, so that the gradient of its features is computed once.
    size = first.features.shape[-2:]
    return [
        torch.matmul(rows, features.flatten(1)).unflatten(2, size)
        for rows, features in zip(of_images, first.features.unbind(), strict=True)
    ]


def zero_of(masks: Masks) -> Tensor:
    """0, connected to the autograd graph of the masks with zero gradients."""
    if isinstance(masks, MaskProduct):
        return masks.embedding.sum() * 0.0 + masks.features.sum() * 0.0
    return masks.sum() * 0.0


def values_at(predictions: Sequence[Masks], images: slice, points: Tensor) -> Iterator[Tensor]:
    """For each prediction, all masks of `images` at `points` (P, 2): (b, Q, P), float32, in new memory."""
    sampled: tuple[Tensor, Tensor] | None = None  # features, and their sampled values
    for masks in predictions:
        if isinstance(masks, MaskProduct):
            embedding, features = masks.embedding[images].float(), masks.features
            if features.shape[-2] * features.shape[-1] > len(points):
                if sampled is None or sampled[0] is not features:
                    part = features[images].float()
                    sampled = features, sample_points(part, points.expand(len(part), -1, -1))  # (b, C, P)
                yield embedding @ sampled[1]
                continue
            whole = MaskProduct(embedding, features[images].float()).full()  # fewer pixels than points
        else:
            whole = masks[images].float()
        yield sample_shared(whole.flatten(0, 1), points).view(*whole.shape[:2], len(points))


__all__ = [
    "MaskProduct",
    "Masks",
    "SegmentTargets",
    "draw_points",
    "matched_masks",
    "most_uncertain",
    "sample_points",
    "sample_shared",
    "values_at",
    "zero_of",
]

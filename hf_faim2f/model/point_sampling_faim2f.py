"""Masks at points: predictions by `grid_sample`, targets (binary masks or one map of segment ids) by their corners.

Points are (x, y) in [0, 1] over the whole map, (0, 0) the upper left corner of the upper left pixel; outside of the
map everything is 0, as `grid_sample` with `align_corners=False` and zero padding has it.
"""

import torch
from torch import Tensor, nn


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of `maps` (N, C, h, w) at `points` (N, P, 2): (N, C, P)."""
    return nn.functional.grid_sample(maps, 2 * points[:, :, None] - 1, align_corners=False)[..., 0]


def uncertain_points(logits: Tensor, num_points: int, oversample_ratio: float, importance_ratio: float) -> Tensor:
    """Points for each mask, most of them where it is least sure (Kirillov et al., PointRend, section 3.1).

    Args:
        logits: (N, 1, h, w), raw.
        num_points: how many points a mask gets, P.
        oversample_ratio: candidates per point, drawn uniformly.
        importance_ratio: the share of the points that are the least sure candidates; the others are uniform.

    Returns:
        (N, P, 2), in [0, 1].
    """
    count = len(logits)
    candidates = torch.rand(count, int(num_points * oversample_ratio), 2, device=logits.device)
    sure = sample_points(logits, candidates)[:, 0].abs()
    num_uncertain = int(importance_ratio * num_points)
    least_sure = sure.topk(num_uncertain, dim=1, largest=False, sorted=False).indices
    chosen = candidates.gather(1, least_sure[..., None].expand(-1, -1, 2))
    if num_uncertain == num_points:
        return chosen
    return torch.cat([chosen, torch.rand(count, num_points - num_uncertain, 2, device=logits.device)], dim=1)


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


class SegmentTargets:
    """The segments of a batch of images, as binary masks or as maps of segment ids, sampled without copying them.

    A map of ids gives the values that its binary masks would: a segment's mask at a point is the summed weight of
    the corners that carry its id. It takes H * W integers however many segments there are.
    """

    def __init__(
        self, mask_labels: list[Tensor], class_labels: list[Tensor], num_labels: int, predictions: Tensor
    ) -> None:
        """
        Args:
            mask_labels: per image (n, H, W) of any real type, or (H, W) of an integer type.
            class_labels: per image (n,).
            num_labels: classes of the model, for the check.
            predictions: (B, Q, h, w), for the batch size and the device.

        Raises:
            ValueError: the targets do not fit; the message says which image's.
        """
        if len(mask_labels) != len(predictions) or len(class_labels) != len(predictions):
            raise ValueError(
                f"mask_labels and class_labels must have one entry per image: {len(predictions)} images, "
                f"{len(mask_labels)} mask_labels, {len(class_labels)} class_labels."
            )
        self.device = predictions.device
        self.classes = [labels.to(self.device, torch.long) for labels in class_labels]
        self.counts = [len(labels) for labels in class_labels]
        self.maps = []
        for index, (mask, labels) in enumerate(zip(mask_labels, class_labels, strict=True)):
            if labels.ndim != 1:
                raise ValueError(f"class_labels[{index}] must be of shape (n,), got {tuple(labels.shape)}.")
            if mask.ndim == 3 and len(mask) != len(labels):
                raise ValueError(f"mask_labels[{index}] has {len(mask)} masks, class_labels[{index}] {len(labels)}.")
            if mask.ndim not in (2, 3) or (mask.ndim == 2 and mask.is_floating_point()):
                raise ValueError(
                    f"mask_labels[{index}] must be (n, H, W), or a map of segment ids (H, W) of an integer type; "
                    f"got {tuple(mask.shape)} of {mask.dtype}."
                )
            self.maps.append(mask.to(self.device))
        self._pad_to_largest()
        self.all_classes = torch.cat(self.classes) if self.classes else torch.zeros(0, dtype=torch.long)
        if bool(((self.all_classes < 0) | (self.all_classes >= num_labels)).any()):
            for index, ids in enumerate(self.classes):
                wrong = sorted({int(label) for label in ids if not 0 <= int(label) < num_labels})
                if wrong:
                    raise ValueError(f"class_labels[{index}] has ids outside of 0..{num_labels - 1}: {wrong}.")
        self.first = torch.tensor([0, *self.counts[:-1]], device=self.device).cumsum(0)

    def _pad_to_largest(self) -> None:
        """Maps of one batch cover the same area: smaller ones are padded below and to the right, with no segment."""
        height = max((mask.shape[-2] for mask in self.maps), default=0)
        width = max((mask.shape[-1] for mask in self.maps), default=0)
        for index, mask in enumerate(self.maps):
            below, right = height - mask.shape[-2], width - mask.shape[-1]
            if below or right:
                value = -1 if mask.ndim == 2 else 0
                mask = mask.to(torch.int32) if mask.ndim == 2 and not mask.dtype.is_signed else mask
                self.maps[index] = nn.functional.pad(mask, (0, right, 0, below), value=value)

    def class_of(self, image: Tensor, segment: Tensor) -> Tensor:
        """The class ids (N,) of `segment` (N,) in `image` (N,)."""
        return self.all_classes[self.first[image] + segment]

    def sample_all(self, image: int, points: Tensor) -> Tensor:
        """All segments of one image at the same `points` (P, 2): (n, P), in [0, 1]."""
        targets, count = self.maps[image], self.counts[image]
        indices, weights = _corners(points, *targets.shape[-2:])
        values = torch.zeros(count + 1, len(points), device=self.device)
        for index, weight in zip(indices, weights, strict=True):
            if targets.ndim == 3:
                values[:count] += targets.flatten(1)[:, index].float() * weight
            else:
                ids = targets.flatten()[index].long()
                # What belongs to no segment is gathered in one more row, which is dropped.
                ids = torch.where((ids >= 0) & (ids < count), ids, count)
                values.scatter_add_(0, ids[None], weight[None])
        return values[:count]

    def sample_each(self, image: Tensor, segment: Tensor, points: Tensor) -> Tensor:
        """Each segment (`image` (N,), `segment` (N,)) at its own `points` (N, P, 2): (N, P), in [0, 1]."""
        values = torch.empty(points.shape[:2], device=self.device)
        for number, targets in enumerate(self.maps):
            rows = (image == number).nonzero()[:, 0]
            indices, weights = _corners(points[rows], *targets.shape[-2:])
            total = torch.zeros_like(weights[0])
            for index, weight in zip(indices, weights, strict=True):
                if targets.ndim == 3:
                    total += targets.flatten(1)[segment[rows][:, None], index].float() * weight
                else:
                    total += (targets.flatten()[index] == segment[rows][:, None]) * weight
            values[rows] = total
        return values


__all__ = ["SegmentTargets", "sample_points", "uncertain_points"]

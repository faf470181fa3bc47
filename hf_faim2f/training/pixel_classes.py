"""The class distribution at each pixel that a prediction implies, and a loss on it.

Query q predicts class c with probability p_q(c) and pixel x with probability sigmoid(m_q(x)). The score of a class at a
pixel is s_c(x) = sum_q p_q(c) sigmoid(m_q(x)) (Cheng et al., "MaskFormer", NeurIPS 2021, section 3.4, semantic
inference). Divided by their sum over the classes, the scores are a distribution. Its cross-entropy with the labels, or
with the distribution of another model, trains all queries together, without matching.
"""

import torch
from torch import Tensor, nn

from ..model.point_sampling_faim2f import Masks, SegmentTargets, values_at

# The least score of a class relative to the largest possible one at a pixel: its logarithm and its gradient,
# 1 / score, stay finite, even summed over a batch.
LEAST_SCORE = 1e-20


def pixel_log_probabilities(masks: Masks, class_logits: Tensor, points: Tensor, *, cls_sigmoid: bool) -> Tensor:
    """The logarithm of the probability of each class at some points, differentiable, computed in float32.

    Args:
        masks: the raw masks of all queries, (B, Q, h, w), or a `MaskProduct`.
        class_logits: (B, Q, C+1), raw; the last one is "no object".
        points: (P, 2), (x, y) in [0, 1] over the masks, the same for all images; see `point_sampling_faim2f`.
        cls_sigmoid: whether the classes of a query are independent, as in the configuration. Otherwise they compete
            with each other and with "no object".

    Returns:
        (B, C, P); at each point the probabilities of the classes add up to 1. Values and gradients are finite for
        logits of any size.
    """
    with torch.autocast(class_logits.device.type, enabled=False):
        mask_logits = next(values_at([masks], slice(None), points))  # (B, Q, P)
        logits = class_logits.float()
        class_scores = (nn.functional.logsigmoid(logits) if cls_sigmoid else logits.log_softmax(-1))[..., :-1]
        mask_scores = nn.functional.logsigmoid(mask_logits)
        # Scores are relative to the most confident query for each class, and to the most confident one at each point,
        # so that the products neither underflow nor lose precision.
        class_largest = class_scores.detach().amax(1, keepdim=True)  # (B, 1, C)
        mask_largest = mask_scores.detach().amax(1, keepdim=True)  # (B, 1, P)
        scores = (class_scores - class_largest).exp().transpose(1, 2) @ (mask_scores - mask_largest).exp()
        # A term that all classes share at a point cancels, so `mask_largest` is not added again.
        return (scores.clamp(min=LEAST_SCORE).log() + class_largest.transpose(1, 2)).log_softmax(1)


def pixel_coverage(masks: Masks, class_logits: Tensor, points: Tensor, *, cls_sigmoid: bool) -> Tensor:
    """The confidence that there is any segment at some points: (B, P), 0..1.

    It is the maximum over the queries of class probability times mask probability. The class probability is that of any
    class, or, for independent classes, of the most probable one. Where the confidence is low, the class distribution is
    not meaningful.

    Args:
        masks, class_logits, points, cls_sigmoid: as in `pixel_log_probabilities`.
    """
    with torch.autocast(class_logits.device.type, enabled=False):
        logits = class_logits.float()
        things = logits[..., :-1].sigmoid().amax(-1) if cls_sigmoid else 1 - logits.softmax(-1)[..., -1]  # (B, Q)
        mask_logits = next(values_at([masks], slice(None), points))
        return (things[..., None] * mask_logits.sigmoid()).amax(1)


def pixel_class_loss(
    log_probabilities: Tensor, targets: Tensor, weights: Tensor | None = None, images: "Tensor | int | None" = None
) -> Tensor:
    """The cross-entropy between target distributions and predicted ones, at some points.

    It is a sum over images divided by their number, so the losses of the parts of a batch, each divided by the number
    of images in the whole batch, add up to that of the whole batch.

    Args:
        log_probabilities: (B, C, P), see `pixel_log_probabilities`.
        targets: the probabilities of the classes, (B, C, P).
        weights: (B, P), of the points, 0 for those that are not compared; None for 1. The mean is over all points,
            regardless of their weights.
        images: the number of images to divide by; None for B.

    Returns:
        A scalar, in nats per point. Its minimum, the entropy of the targets, is reached where both agree.
    """
    cross = -(targets * log_probabilities).sum(1)  # (B, P)
    if weights is not None:
        cross = cross * weights
    return cross.mean(1).sum() / (len(cross) if images is None else images)


def classes_of_segments(targets: SegmentTargets, points: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
    """The class distributions that labels imply at some points.

    Args:
        targets: the segments of a batch.
        points: (P, 2), (x, y) in [0, 1] over the masks.
        num_labels: number of classes.

    Returns:
        Probabilities (B, C, P), mixed between pixels of different classes, and 0 for all classes outside of all
        segments; and weights (B, P), from 0 outside of all segments to 1 inside one.
    """
    values = targets.sample_padded(points)  # (B, n, P)
    scores = values.new_zeros(len(values), num_labels, len(points))
    classes = targets.padded_classes()  # padding has class 0, but its values are 0
    scores.scatter_add_(1, classes[..., None].expand(values.shape), values)
    total = scores.sum(1, keepdim=True)
    return scores / total.clamp(min=torch.finfo(total.dtype).tiny), total[:, 0].clamp(max=1)


__all__ = ["classes_of_segments", "pixel_class_loss", "pixel_coverage", "pixel_log_probabilities"]

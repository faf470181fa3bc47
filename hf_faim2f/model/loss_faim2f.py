"""The training loss: set matching, classification, and point-sampled mask losses with deep supervision.

Cheng et al., "Mask2Former" (CVPR 2022, sections 3.2 and 3.3), with the point sampling of PointRend (Kirillov et al.,
CVPR 2020, section 3.1). All layers and images are matched together: the costs are computed on the device and moved to
the host in one transfer, where scipy solves the assignments.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .configuration_faim2f import FaiM2FConfig
from .point_sampling_faim2f import (
    MaskProduct,
    Masks,
    SegmentTargets,
    draw_points,
    matched_masks,
    most_uncertain,
    sample_points,
    values_at,
    zero_of,
)

try:
    from scipy.optimize import linear_sum_assignment
except ImportError:  # needed only for training
    linear_sum_assignment = None

# Maximum number of mask values at sampled points in memory at once; each takes about 20 bytes, with temporaries.
POINTS_AT_ONCE = 1 << 22


class FaiM2FLoss(nn.Module):
    """The weighted losses of every prediction of a batch; has the call signature of transformers' `Mask2FormerLoss`.

    Attributes:
        refuse_non_finite: raise if a loss is NaN or infinite. transformers' `Trainer` would replace such a loss in its
            log and continue with NaN weights. Training loops that check the losses themselves set this to False.
    """

    def __init__(self, config: FaiM2FConfig) -> None:
        super().__init__()
        self.config = config
        self.refuse_non_finite = True

    def forward(
        self,
        masks_queries_logits: Masks,
        class_queries_logits: Tensor,
        mask_labels: list[Tensor],
        class_labels: list[Tensor],
        auxiliary_predictions: "list[dict[str, Any]] | None" = None,
        num_items_in_batch: "Tensor | int | None" = None,
    ) -> dict[str, Tensor]:
        """
        Args:
            masks_queries_logits: (B, Q, h, w), raw, or a `MaskProduct`, whose masks are computed only where needed.
            class_queries_logits: (B, Q, C+1), raw.
            mask_labels: for each image either n_i masks (n_i, H, W), bool or numbers from 0 to 1 (soft masks: the
                target probabilities), or one map of segment ids (H, W) of an integer dtype, whose values 0..n_i-1
                index `class_labels`; pixels of no segment are negative, or the configuration's `ignore_value` if it is
                at least n_i.
            class_labels: for each image (n_i,), class ids 0..C-1.
            auxiliary_predictions: the intermediate predictions, dictionaries with the two names above.
            num_items_in_batch: number of segments by which the mask losses (and the sigmoid classification loss) are
                divided; None for the number in this batch, averaged over all processes.

        Returns:
            `loss_ce`, `loss_mask`, `loss_dice`, already weighted, and the same with `_i` for the i-th of
            `auxiliary_predictions`. Their sum is the total loss.

        Raises:
            ValueError: targets do not fit the predictions or each other; the message names the image.
            FloatingPointError: a loss is NaN or infinite (see `refuse_non_finite`); not raised in float16 autocast,
                where a gradient scaler skips such steps.
            ImportError: scipy is missing.
        """
        if linear_sum_assignment is None:
            raise ImportError("Training needs scipy for the matching; install it with `pip install scipy`.")
        targets = SegmentTargets(
            mask_labels,
            class_labels,
            self.config.num_labels,
            len(class_queries_logits),
            class_queries_logits.device,
            self.config.ignore_value,
        )
        auxiliary = auxiliary_predictions or []
        masks: list[Masks] = [*(item["masks_queries_logits"] for item in auxiliary), masks_queries_logits]
        of_classes = [*(item["class_queries_logits"] for item in auxiliary), class_queries_logits]
        classes = torch.stack([logits.float() for logits in of_classes])  # (S, B, Q, C+1)

        # In full precision, because of cancellation in the costs.
        with torch.autocast(classes.device.type, enabled=False):
            matched = self._match(masks, classes, targets)
        num_masks = self._num_masks(targets, num_items_in_batch)
        loss_ce = self._class_losses(classes, matched, targets, num_masks)
        counts = [min(count, classes.shape[2]) for count in targets.counts]  # number of matches per image
        loss_mask, loss_dice = self._mask_losses(masks, matched, counts, targets, num_masks)
        losses = {}
        for index in range(len(masks)):
            suffix = "" if index == len(masks) - 1 else f"_{index}"
            losses[f"loss_ce{suffix}"] = self.config.class_weight * loss_ce[index]
            losses[f"loss_mask{suffix}"] = self.config.mask_weight * loss_mask[index]
            losses[f"loss_dice{suffix}"] = self.config.dice_weight * loss_dice[index]
        if self.refuse_non_finite and not _is_scaled(classes.device):
            finite = torch.stack([value.detach() for value in losses.values()]).isfinite().tolist()  # one transfer
            wrong = [name for name, is_finite in zip(losses, finite, strict=True) if not is_finite]
            if wrong:
                raise FloatingPointError(
                    f"{wrong[0]} is {float(losses[wrong[0]].detach())}: the training has diverged, or the weights or "
                    "images that it was given are not finite. Go back to the last good checkpoint, with a lower "
                    "learning rate, a longer warm-up or stronger clipping of the gradient."
                )
        return losses

    @staticmethod
    def _num_masks(targets: "SegmentTargets", num_items_in_batch: "Tensor | int | None") -> Tensor:
        if num_items_in_batch is not None:
            return torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=targets.device).clamp(min=1)
        count = torch.tensor(float(sum(targets.counts)), dtype=torch.float32, device=targets.device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(count)
            count = count / torch.distributed.get_world_size()
        return count.clamp(min=1)

    @torch.no_grad()
    def _match(self, masks: list[Masks], classes: Tensor, targets: "SegmentTargets") -> list[tuple[Tensor, ...]]:
        """For each prediction, the matched (image, query, segment), (N,) each, on the device, ordered by image.

        The cost is -class_cost * p(class) + mask_cost * cross-entropy + dice_cost * dice. The last two are computed at
        uniform random points shared by all predictions. Cross-entropy is linear in the target t, softplus(x) - x t, so
        one matrix product with the targets gives it for all pairs.
        """
        sets, batch, queries, _ = classes.shape
        points = draw_points(self.config.train_num_points, targets.device)
        wanted = targets.sample_padded(points)  # (B, n, P), n: the largest number of segments per image
        wanted_sum = wanted.sum(-1)[:, None]  # (B, 1, n)
        chances = classes.sigmoid() if self.config.cls_sigmoid else classes.softmax(-1)
        # (S, B, Q, n): minus the probability of each segment's class
        costs = -self.config.class_cost * chances.gather(
            3, targets.padded_classes()[None, :, None].expand(sets, -1, queries, -1)
        )
        # Channels to sample per image: masks, or the features of a product.
        channels = max(queries, *(mask.features.shape[1] for mask in masks if isinstance(mask, MaskProduct)), 1)
        images_at_once = max(1, POINTS_AT_ONCE // (channels * len(points)))
        zero = torch.zeros((), dtype=torch.float32, device=classes.device)
        # Reused in every step: page faults on fresh memory take longer than the arithmetic.
        scratch: Tensor | None = None
        for start in range(0, batch, images_at_once):
            part = slice(start, start + images_at_once)
            transposed = wanted[part].transpose(1, 2)  # (b, P, n)
            for cost, logits in zip(costs[:, part], values_at(masks, part, points), strict=True):
                if scratch is None or scratch.shape != logits.shape:
                    scratch = torch.empty_like(logits)
                softplus = torch.logaddexp(logits, zero, out=scratch)
                cross = softplus.sum(-1, keepdim=True) - logits @ transposed
                probabilities = torch.sigmoid(logits, out=scratch)
                overlap = 2 * (probabilities @ transposed) + 1
                dice = 1 - overlap / (probabilities.sum(-1, keepdim=True) + wanted_sum[part] + 1)
                cost += self.config.mask_cost / len(points) * cross + self.config.dice_cost * dice
        # scipy rejects NaN. Diverged predictions are matched last and show up in the losses.
        on_host = torch.nan_to_num(costs, nan=1e30, posinf=1e30, neginf=1e30).cpu().numpy()
        matched = []
        for index in range(sets):
            rows: list[list[int]] = [[], [], []]
            for image, count in enumerate(targets.counts):
                query, segment = linear_sum_assignment(on_host[index, image, :, :count])
                rows[0] += [image] * len(query)
                rows[1] += query.tolist()
                rows[2] += segment.tolist()
            matched.append(rows)
        # One transfer back: (3, all matches), split by prediction.
        lengths = [len(rows[0]) for rows in matched]
        flat = torch.tensor([[value for rows in matched for value in rows[k]] for k in range(3)], dtype=torch.long)
        return [tuple(part) for part in flat.to(targets.device).split(lengths, dim=1)]

    def _class_losses(
        self, classes: Tensor, matched: list[tuple[Tensor, ...]], targets: "SegmentTargets", num_masks: Tensor
    ) -> Tensor:
        """(S,): weighted cross-entropy, or summed binary cross-entropy per segment for sigmoid classification.

        The weight of a query is that of the class of its matched segment.
        """
        sets, batch, queries, columns = classes.shape
        wanted = torch.full((sets, batch, queries), columns - 1, dtype=torch.long, device=classes.device)
        for index, (image, query, segment) in enumerate(matched):
            wanted[index, image, query] = targets.class_of(image, segment)
        weight = classes.new_ones(columns)
        if self.config.label_weights is not None:
            weight[:-1] = weight.new_tensor(self.config.label_weights)
        if self.config.cls_sigmoid:
            one_hot = nn.functional.one_hot(wanted, columns)[..., :-1].to(classes.dtype)
            losses = nn.functional.binary_cross_entropy_with_logits(classes[..., :-1], one_hot, reduction="none")
            return (losses.sum(-1) * weight[wanted]).flatten(1).sum(1) / num_masks
        weight[-1] = self.config.no_object_weight
        losses = nn.functional.cross_entropy(classes.flatten(0, 2), wanted.flatten(), weight, reduction="none")
        total = weight[wanted].flatten(1).sum(1)  # 0 where nothing is matched and "no object" weighs nothing
        return losses.view(sets, -1).sum(1) / total.clamp(min=torch.finfo(total.dtype).tiny)

    def _mask_losses(
        self,
        masks: list[Masks],
        matched: list[tuple[Tensor, ...]],
        counts: list[int],
        targets: "SegmentTargets",
        num_masks: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy and dice of each prediction (S,), at each matched mask's most uncertain points and random ones.

        All masks share the candidates and the random points. Each mask still gets uniformly random points, but drawing
        them and sampling the targets is done once. All layers of an image are processed together.
        """
        count, importance = self.config.train_num_points, self.config.importance_sample_ratio
        num_uncertain = int(importance * count)
        candidates = draw_points(int(count * self.config.oversample_ratio), targets.device)
        others = draw_points(count - num_uncertain, targets.device)
        wanted_others = targets.sample_batch(others)  # (segments of the batch, number of random points)
        wanted_candidates = targets.sample_batch(candidates)
        rows_at_once = max(1, POINTS_AT_ONCE // len(candidates))
        cross_sum = dice_sum = torch.zeros(len(masks), dtype=torch.float32, device=targets.device)
        if sum(counts) == 0:
            # Stays in the autograd graph, so that every process reduces the same gradients.
            zero = torch.stack([zero_of(mask) for mask in masks])
            return zero, zero
        of_images = matched_masks(masks, [(image, query) for image, query, _ in matched], counts)
        segments = [segment.split(counts) for _, _, segment in matched]
        for image, (logits_of_image, number) in enumerate(zip(of_images, counts, strict=True)):
            if number == 0:
                continue
            rows_of_image = targets.first[image] + torch.stack([segment[image] for segment in segments])  # (S, n)
            crosses, dices = [], []
            for logits, rows in zip(
                logits_of_image.flatten(0, 1).float().split(rows_at_once),
                rows_of_image.flatten().split(rows_at_once),
                strict=True,
            ):
                with torch.no_grad():
                    chosen = most_uncertain(logits, candidates, num_uncertain)  # (r, U)
                    points = torch.cat([_picked(candidates, chosen), others.expand(len(rows), -1, -1)], dim=1)
                    at_chosen = wanted_candidates.index_select(0, rows).gather(1, chosen)
                    wanted = torch.cat([at_chosen, wanted_others.index_select(0, rows)], dim=1)  # (r, P)
                sampled = sample_points(logits[:, None], points)[:, 0]  # (r, P)
                crosses.append(
                    nn.functional.binary_cross_entropy_with_logits(sampled, wanted, reduction="none").mean(1)
                )
                chances = sampled.sigmoid()
                overlap = 2 * (chances * wanted).sum(1) + 1
                dices.append(1 - overlap / (chances.sum(1) + wanted.sum(1) + 1))
            cross_sum = cross_sum + torch.cat(crosses).view(-1, number).sum(1)
            dice_sum = dice_sum + torch.cat(dices).view(-1, number).sum(1)
        return cross_sum / num_masks, dice_sum / num_masks


def _is_scaled(device: torch.device) -> bool:
    """Whether the network runs in float16 autocast, in which a gradient scaler handles overflows."""
    return torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16


def _picked(points: Tensor, chosen: Tensor) -> Tensor:
    """points[chosen]: (n, U, 2) of (P, 2) and (n, U)."""
    return points.index_select(0, chosen.flatten()).unflatten(0, chosen.shape)


__all__ = ["FaiM2FLoss"]

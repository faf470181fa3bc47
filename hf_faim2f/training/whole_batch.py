"""Losses of a part of a batch, scaled so that the gradients of all parts add up to those of the whole batch.

A step's batch may be cut into parts: accumulated one after the other, computed by several processes, or both. Every
loss of this model is a sum over segments or queries, divided by something that only the whole batch knows:

- mask and dice losses, and sigmoid classification: by the number of segments;
- softmax classification: by the sum of the class weights of all queries. In an image of n segments the matching gives
  min(n, Q) of the Q queries a segment, whichever they are, and each weighs 1; the others are "no object", and each
  weighs `no_object_weight`. So the sum is known before the model has run, and is the same for every prediction layer.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class BatchTotals(NamedTuple):
    """What a batch's losses are divided by, each a float32 tensor ()."""

    segments: Tensor
    class_weight: Tensor


def batch_totals(class_labels: Sequence[Tensor], config: Any, device: "torch.device | None" = None) -> BatchTotals:
    """The totals of these images; those of several parts are summed to get the whole batch's.

    Args:
        class_labels: per image (n_i,).
        config: `FaiM2FConfig`.
        device: where the totals shall be.
    """
    counts = [len(labels) for labels in class_labels]
    matched = sum(min(count, config.num_queries) for count in counts)
    unmatched = len(counts) * config.num_queries - matched
    return BatchTotals(
        torch.tensor(float(sum(counts)), device=device),
        torch.tensor(matched + config.no_object_weight * unmatched, device=device),
    )


def whole_batch_losses(
    loss_dict: Mapping[str, Tensor], class_labels: Sequence[Tensor], totals: BatchTotals, config: Any, processes: int
) -> dict[str, Tensor]:
    """The share that a part of the batch has in each of the whole batch's losses, times the number of processes.

    The sum over all accumulated parts, averaged over the processes as DistributedDataParallel averages gradients, is
    the loss of the whole batch.

    Args:
        loss_dict: what the model returned for the part, called with `num_items_in_batch=totals.segments`.
        class_labels: of the part.
        totals: of the whole batch.
        config: `FaiM2FConfig`.
        processes: how many there are.
    """
    losses = {}
    for name, value in loss_dict.items():
        share: Tensor | float = 1.0
        if name.startswith("loss_ce") and not config.cls_sigmoid:
            # The model divides this one by the part's own sum of weights.
            share = batch_totals(class_labels, config, value.device).class_weight / totals.class_weight
        losses[name] = value * share * processes
    return losses

"""The loss, forward and backward: ours against transformers' `Mask2FormerLoss` on the same predictions and targets.

7 layers, batch 2, 100 queries, 80 classes, 12 masks of 640x640 in each image, mask logits at 160x160. Ours accepts
targets as binary masks, as transformers does, and as one map of segment ids per image. Two kinds of inputs:

- "masks": the mask logits of every layer, which get gradients;
- "embeddings": the decoder's mask embeddings of every layer and 256 mask features, which get gradients. transformers
  computes all masks from them, as its model does; ours gets unevaluated products, as from our model.
"""

import sys
from collections.abc import Callable
from functools import partial

import torch
from measurement import extra_memory, record, row, time_in_turn
from torch import Tensor
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from hf_faim2f import FaiM2FConfig
from hf_faim2f.model.loss_faim2f import FaiM2FLoss
from hf_faim2f.model.point_sampling_faim2f import MaskProduct

LAYERS, BATCH, QUERIES, CLASSES, MASKS, SIZE, CHANNELS = 7, 2, 100, 80, 12, 640, 256
WEIGHTS = {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}


def targets(masks: int, compact: bool) -> tuple[list[Tensor], list[Tensor]]:
    """A map of segment ids per image, or its binary masks, and the class of each segment."""
    cells = torch.arange(masks).repeat(-(-400 // masks))[:400].view(1, 1, 20, 20).float()
    ids = torch.nn.functional.interpolate(cells, size=SIZE, mode="nearest")[0, 0].to(torch.int32)
    binary = torch.stack([ids == index for index in range(masks)]).float()
    return [ids if compact else binary] * BATCH, [torch.randint(0, CLASSES, (masks,)) for _ in range(BATCH)]


def smooth_masks(count: int) -> Tensor:
    """(BATCH, count, SIZE / 4, SIZE / 4)."""
    return torch.nn.functional.interpolate(4 * torch.randn(BATCH, count, 10, 10), size=SIZE // 4, mode="bilinear")


def job(ours: bool, compact: bool, embeddings: bool, masks: int = MASKS) -> Callable[[], None]:
    """Forward and backward of one contender."""
    torch.manual_seed(0)
    logits = [torch.randn(BATCH, QUERIES, CLASSES + 1).requires_grad_() for _ in range(LAYERS)]
    if embeddings:
        features = smooth_masks(CHANNELS).requires_grad_()
        leaves = [(torch.randn(BATCH, QUERIES, CHANNELS) / CHANNELS**0.5).requires_grad_() for _ in range(LAYERS)]
    else:
        leaves = [smooth_masks(QUERIES).requires_grad_() for _ in range(LAYERS)]
    mask_labels, class_labels = targets(masks, compact)
    loss = (
        FaiM2FLoss(FaiM2FConfig(num_labels=CLASSES))
        if ours
        else Mask2FormerLoss(Mask2FormerConfig(num_labels=CLASSES), WEIGHTS)
    )

    def run() -> None:
        for tensor in (*logits, *leaves, *([features] if embeddings else [])):
            tensor.grad = None
        *auxiliary, last = [
            {"class_queries_logits": classes, "masks_queries_logits": prediction}
            for classes, prediction in zip(logits, predictions(), strict=True)
        ]
        losses = loss(last["masks_queries_logits"], last["class_queries_logits"], mask_labels, class_labels, auxiliary)
        torch.stack(list(losses.values())).sum().backward()

    def predictions() -> list[Tensor] | list[MaskProduct]:
        if not embeddings:
            return leaves
        products = [MaskProduct(embedding, features) for embedding in leaves]
        return products if ours else [product.full() for product in products]

    return run


KINDS = {
    "masks": {
        "ours, maps": partial(job, True, True, False),
        "ours, masks": partial(job, True, False, False),
        "transformers": partial(job, False, False, False),
    },
    "embeddings": {
        "ours, maps": partial(job, True, True, True),
        "ours, masks": partial(job, True, False, True),
        "transformers": partial(job, False, False, True),
    },
}


def main() -> None:
    """Prints times and memory; `python benchmarks/loss.py RUNS` for another number of runs than 7."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    print(__doc__)
    seconds, memory, ratios = {}, {}, {}
    for way, makers in KINDS.items():
        seconds[way] = times = time_in_turn({kind: make() for kind, make in makers.items()}, runs)
        memory[way] = {kind: extra_memory(make) for kind, make in makers.items()}
        for kind in makers:
            print(row(f"from {way}: {kind}", times[kind]), f"  {memory[way][kind]:7.0f} MB extra")
        ratios[way] = {kind: times["transformers"]["median"] / times[kind]["median"] for kind in makers}
        print("transformers / ours:", ", ".join(f"{kind}: {ratios[way][kind]:.2f}" for kind in list(makers)[:2]))
    record("loss", {"seconds": seconds, "extra_megabytes": memory, "ratio": ratios})


if __name__ == "__main__":
    main()

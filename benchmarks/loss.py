"""The loss, forward and backward: ours against transformers' `Mask2FormerLoss` on the same predictions and targets.

7 layers, batch 2, 100 queries, 80 classes, 12 masks of 640x640 in each image, mask logits at 160x160. Ours takes the
masks as binary masks, as transformers does, and as one map of segment ids per image.
"""

import sys
from collections.abc import Callable

import torch
from measurement import extra_memory, record, row, time_in_turn
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from hf_faim2f import FaiM2FConfig
from hf_faim2f.model.loss_faim2f import FaiM2FLoss

LAYERS, BATCH, QUERIES, CLASSES, MASKS, SIZE = 7, 2, 100, 80, 12, 640


def inputs(masks: int) -> tuple[list[dict[str, torch.Tensor]], list[torch.Tensor], list[torch.Tensor]]:
    """Predictions of every layer, a map of segment ids per image, and the class of each segment."""
    torch.manual_seed(0)
    layers = []
    for _ in range(LAYERS):
        coarse = 4 * torch.randn(BATCH, QUERIES, 10, 10)
        logits = torch.nn.functional.interpolate(coarse, size=SIZE // 4, mode="bilinear").requires_grad_()
        classes = torch.randn(BATCH, QUERIES, CLASSES + 1).requires_grad_()
        layers.append({"masks_queries_logits": logits, "class_queries_logits": classes})
    cells = torch.arange(masks).repeat(-(-400 // masks))[:400].view(1, 1, 20, 20).float()
    ids = torch.nn.functional.interpolate(cells, size=SIZE, mode="nearest")[0, 0].to(torch.int32)
    return layers, [ids] * BATCH, [torch.randint(0, CLASSES, (masks,)) for _ in range(BATCH)]


def job(kind: str, masks: int = MASKS) -> Callable[[], None]:
    """Forward and backward of one of "ours, maps", "ours, masks" and "transformers"."""
    layers, maps, classes = inputs(masks)
    *auxiliary, last = layers
    arguments = (last["masks_queries_logits"], last["class_queries_logits"])
    if kind == "transformers":
        weights = {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
        theirs = Mask2FormerLoss(Mask2FormerConfig(num_labels=CLASSES), weights)
    else:
        ours = FaiM2FLoss(FaiM2FConfig(num_labels=CLASSES))
    targets = maps if kind == "ours, maps" else [
        torch.stack([ids == index for index in range(masks)]).float() for ids in maps
    ]  # fmt: skip

    def run() -> None:
        for layer in layers:
            for tensor in layer.values():
                tensor.grad = None
        if kind == "transformers":
            losses = theirs(*arguments, targets, classes, auxiliary)
        else:
            losses = ours(*arguments, targets, classes, auxiliary)
        torch.stack(list(losses.values())).sum().backward()

    return run


KINDS = ("ours, maps", "ours, masks", "transformers")


def ours_maps() -> Callable[[], None]:
    return job(KINDS[0])


def ours_masks() -> Callable[[], None]:
    return job(KINDS[1])


def transformers() -> Callable[[], None]:
    return job(KINDS[2])


def main() -> None:
    """Prints times and memory; `python benchmarks/loss.py RUNS` for other than 5 runs."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print(__doc__)
    times = time_in_turn({kind: job(kind) for kind in KINDS}, runs)
    memory = {
        kind: extra_memory(prepare) for kind, prepare in zip(KINDS, (ours_maps, ours_masks, transformers), strict=True)
    }
    for kind in KINDS:
        print(row(kind, times[kind]), f"  {memory[kind]:7.0f} MB extra")
    ratios = {kind: times["transformers"]["median"] / times[kind]["median"] for kind in KINDS[:2]}
    print("transformers / ours:", ", ".join(f"{kind}: {ratio:.2f}" for kind, ratio in ratios.items()))
    record("loss", {"seconds": times, "extra_megabytes": memory, "ratio": ratios})


if __name__ == "__main__":
    main()

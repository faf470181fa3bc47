"""Mask2Former with the same weights in our code and in transformers': Swin-T and ResNet-50, in eager mode.

    python benchmarks/mask2former.py [RUNS]

Two threads, float32, 640x640, 100 queries, 80 classes, random weights. Contenders run in turn:

- forward: the network in evaluation mode; ours also after `optimize_for_inference()`;
- end to end: from an 8-bit image of 640x640 to its instances. Both post-process the realistic logits of
  `post_processing.py`, because random weights give noise;
- training step: forward, loss with deep supervision, backward and AdamW's step, batch 1 with 12 masks.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers
from end_to_end import SIZE, image, realistic
from hf_faim2f.conversion.mask2former import convert_config, convert_state_dict
from measurement import record, row, time_in_turn
from torch import nn
from training_step import targets
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig, SwinConfig

from hf_faim2f import FaiM2FForUniversalSegmentation, FaiM2FImageProcessor

STAGES = ["stage1", "stage2", "stage3", "stage4"]
CLASSES = 80
BACKBONES = {
    "Swin-T": SwinConfig(embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], out_features=STAGES),
    "ResNet-50": ResNetConfig(out_features=STAGES),
}
Job = Callable[[], object]


def both(backbone: str) -> tuple[Mask2FormerForUniversalSegmentation, FaiM2FForUniversalSegmentation]:
    """transformers' model with random weights, and ours with the same."""
    torch.manual_seed(0)
    config = Mask2FormerConfig(backbone_config=BACKBONES[backbone].to_dict(), num_labels=CLASSES)
    theirs = Mask2FormerForUniversalSegmentation(config)
    ours = FaiM2FForUniversalSegmentation(convert_config(theirs.config, "instance"))
    ours.load_state_dict(convert_state_dict(theirs.state_dict(), ours.config))
    return theirs, ours


def forward(model: nn.Module) -> Job:
    model.eval()
    pixel_values = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(1))

    @torch.inference_mode()
    def run() -> object:
        return model(pixel_values)

    return run


def end_to_end(model: nn.Module) -> Job:
    model.eval()
    size = {"height": SIZE[0], "width": SIZE[1]}
    kind = transformers.Mask2FormerImageProcessor
    processor: Any = kind(size=size)
    if isinstance(model, FaiM2FForUniversalSegmentation):
        processor = FaiM2FImageProcessor.from_model_config(model.config, size=size)
    picture = image()

    @torch.inference_mode()
    def run() -> object:
        outputs = realistic(CLASSES, model(processor(picture, return_tensors="pt")["pixel_values"]))
        return processor.post_process_instance_segmentation(outputs, target_sizes=[SIZE])

    return run


def training_step(model: nn.Module) -> Job:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    pixel_values = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    mask_labels, class_labels = ([values[0]] for values in targets(SIZE[0]))
    class_labels = [class_labels[0] % CLASSES]

    def run() -> None:
        optimizer.zero_grad()
        model(pixel_values=pixel_values, mask_labels=mask_labels, class_labels=class_labels).loss.backward()
        optimizer.step()

    return run


def main() -> None:
    """Prints times and speedups."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    print(__doc__)
    transformers.utils.logging.set_verbosity_error()
    figures: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    for backbone in BACKBONES:
        theirs, ours = both(backbone)
        outputs = [model.eval()(torch.randn(1, 3, 320, 320, generator=torch.Generator().manual_seed(2)))
                   for model in (theirs, ours)]  # fmt: skip
        peer, own = (values.masks_queries_logits.detach() for values in outputs)
        error = float((peer - own).abs().max() / peer.abs().max())
        print(f"{backbone}: ours differ from transformers' by at most {error:.1e} of the largest mask logit")
        for question, make in (("forward", forward), ("end to end", end_to_end), ("training step", training_step)):
            jobs = {"transformers": make(theirs), "ours": make(ours)}
            if question != "training step":
                jobs["ours, optimized"] = make(both(backbone)[1].optimize_for_inference())
            times = time_in_turn(jobs, runs)
            for who, seconds in times.items():
                name = f"{backbone}, {question}, {who}"
                figures[name] = seconds
                ratio = times["transformers"]["median"] / seconds["median"]
                print(f"{row(f'{name:46}', seconds)}   {ratio:.2f}", flush=True)
                if who != "transformers":
                    ratios[name] = ratio
    record("mask2former", {"runs": runs, "seconds": figures, "times_as_fast": ratios})


if __name__ == "__main__":
    main()

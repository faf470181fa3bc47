"""The model outputs."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class FaiM2FForUniversalSegmentationOutput(ModelOutput):
    """Output of `FaiM2FForUniversalSegmentation`, for the image processor's `post_process_*` methods.

    Args:
        loss: (), the weighted sum; only with `mask_labels` and `class_labels`.
        loss_dict: its weighted components: `loss_ce`, `loss_mask`, `loss_dice`, and the same with `_i` for the i-th
            intermediate prediction.
        class_queries_logits: (B, Q, num_labels + 1), raw; the last class is "no object".
        masks_queries_logits: (B, Q, H/4, W/4), H/8 and W/8 in BiSeNetFormer; raw: the sigmoid is the probability of a
            pixel. Where `pixel_mask` marks padding they are `PADDING_LOGIT` (-100.5); the image processor's
            `post_process_*` methods remove it.
        auxiliary_logits: the intermediate predictions, each a dictionary of the two names above.
        hidden_states: the queries (B, Q, hidden_dim) before the first and after each decoder layer.
        attentions: the decoder's self-attention (B, heads, Q, Q) per layer.
        cross_attentions: the decoder's cross-attention (B, heads, Q, h * w) per layer, at 1/32, 1/16, 1/8 in turn; at
            1/32 and 1/16 in BiSeNetFormer.
        fused_classes: (B, num_labels), bool: the stuff classes (`label_ids_to_fuse` of the configuration), which the
            image processor reads; None if the configuration does not have them.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    class_queries_logits: Tensor | None = None
    masks_queries_logits: Tensor | None = None
    auxiliary_logits: list[dict[str, Tensor]] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    fused_classes: Tensor | None = None


@dataclass
class FaiM2FForSemanticSegmentationOutput(FaiM2FForUniversalSegmentationOutput):
    """Output of `FaiM2FForSemanticSegmentation`: `loss` and `logits` first, then the universal model's output.

    Args:
        logits: (B, num_labels, h, w), of the masks' size, float32: logarithms of the class scores, see
            `semantic_logits`. Resize them bilinearly and take the argmax, as for any semantic model. The image
            processor's `post_process_semantic_segmentation` is more accurate: it resizes masks before summing them, and
            removes padding. In a padded batch, the logits also cover the padding, where they are meaningless: resize
            them to the size of `pixel_values` and crop each image before resizing it further.
    """

    logits: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("logits", "loss"):
            if name in self:
                self.move_to_end(name, last=False)


# Added to a class's score before the logarithm.
LEAST_SCORE = 1e-6


def fused_classes(class_logits: Tensor, config: Any) -> Tensor | None:
    """(B, num_labels), true for the classes to fuse; None if they are unknown.

    A tensor, because only tensors are gathered from several GPUs.

    Args:
        class_logits: (B, Q, C+1), for its batch size and device.
        config: the model's configuration.
    """
    stuff = config.label_ids_to_fuse
    if stuff is None:
        return None
    fused = torch.tensor([label in stuff for label in range(config.num_labels)])
    # `len` would make the batch size a constant in exported graphs.
    return fused.to(class_logits.device, non_blocking=True).expand(class_logits.shape[0], -1)


def semantic_logits(class_queries_logits: Tensor, masks_queries_logits: Tensor, cls_sigmoid: bool = False) -> Tensor:
    """Per-pixel class logits at the resolution of the masks.

    A class's score at a pixel is the sum over queries of class probability times mask probability ("Per-Pixel
    Classification is Not All You Need for Semantic Segmentation", section 3.4). The logit is its logarithm, so the
    argmax is that of the scores, the softmax normalizes the scores to sum to 1, and cross-entropy is the negative
    logarithm of the true class's normalized score. Bilinear resizing of logarithms preserves thin objects that resized
    scores lose.

    Args:
        class_queries_logits: (B, Q, C + 1), raw; the last class is "no object".
        masks_queries_logits: (B, Q, h, w), raw.
        cls_sigmoid: class probabilities are sigmoids instead of a softmax.

    Returns:
        (B, C, h, w), float32, at least log(1e-6).
    """
    with torch.autocast(class_queries_logits.device.type, enabled=False):
        classes = class_queries_logits.float()
        chances = (classes.sigmoid() if cls_sigmoid else classes.softmax(-1))[..., :-1]  # (B, Q, C)
        scores = chances.transpose(1, 2) @ masks_queries_logits.float().sigmoid().flatten(2)  # (B, C, h * w)
        return (scores + LEAST_SCORE).log().unflatten(2, masks_queries_logits.shape[-2:])


__all__ = [
    "FaiM2FForSemanticSegmentationOutput",
    "FaiM2FForUniversalSegmentationOutput",
    "fused_classes",
    "semantic_logits",
]

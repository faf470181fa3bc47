"""Work whose results must not depend on the device: post-processing, models, training steps and distillation."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_faim2f.model import focoos_post_processing_faim2f as focoos
from hf_faim2f.model import post_processing_faim2f as post
from hf_faim2f.training.pixel_classes import pixel_coverage, pixel_log_probabilities
from tests.support.mask2former_models import ours_of, tiny
from tests.support.reference_models import BISENET, small_model

SIZES = [(480, 640), (90, 70)]
POST_PROCESSING: dict[str, Callable[..., Any]] = {
    "semantic": post.post_process_semantic_segmentation,
    "semantic scores": partial(post.post_process_semantic_segmentation, return_segmentation_scores=True),
    "instance": partial(post.post_process_instance_segmentation, threshold=0.2),
    "binary maps": partial(post.post_process_instance_segmentation, threshold=0.2, return_binary_maps=True),
    "panoptic": partial(
        post.post_process_panoptic_segmentation, threshold=0.2, overlap_mask_area_threshold=0.2, label_ids_to_fuse={1}
    ),
    "detections": partial(focoos.post_process_detections, network_size=(384, 384), threshold=0.2),
    "queries": partial(focoos.post_process_queries, network_size=(384, 384)),
}


def logits(queries: int = 60, classes: int = 20, side: int = 96) -> tuple[Tensor, Tensor]:
    """Confident queries with large smooth masks, many of which overlap."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(2, queries, 9, 9, generator=generator)
    masks = F.interpolate(8 * coarse - 4, size=(side, side), mode="bicubic")
    return 2 * torch.randn(2, queries, classes + 1, generator=generator), masks


def predict(model: torch.nn.Module, images: Tensor, mask: Tensor) -> Any:
    """The logits of a batch."""
    with torch.no_grad():
        return model.eval()(pixel_values=images, pixel_mask=mask)


def step(model: torch.nn.Module, images: Tensor, masks: list[Tensor], classes: list[Tensor]) -> list[Tensor]:
    """The losses and gradients of a training step."""
    model.zero_grad()
    output = model.train()(pixel_values=images, mask_labels=masks, class_labels=classes)
    output.loss.backward()
    return [*output.loss_dict.values(), *(weight.grad for weight in model.parameters() if weight.grad is not None)]


def distill(model: torch.nn.Module, images: Tensor, points: Tensor) -> list[Tensor]:
    """What a student learns from, at some points."""
    output = predict(model, images, torch.ones_like(images[:, 0], dtype=torch.int64))
    masks, classes = output.masks_queries_logits, output.class_queries_logits
    return [
        pixel_log_probabilities(masks, classes, points, cls_sigmoid=False),
        pixel_coverage(masks, classes, points, cls_sigmoid=False),
    ]


def works_of(name: str, make: Callable[[], torch.nn.Module]) -> dict[str, tuple[Any, ...]]:
    """Prediction with padding, training, and training with labels that a collator left on the CPU."""
    model, images = make(), torch.randn(2, 3, 64, 96)
    mask = torch.ones(2, 64, 96, dtype=torch.int64)
    mask[1, 40:] = 0
    masks, classes = (
        [(torch.rand(n, 64, 96) > 0.7).float() for n in (3, 1)],
        [torch.tensor([0, 1, 0]), torch.tensor([1])],
    )
    return {
        f"{name}, prediction": (predict, model, images, mask),
        f"{name}, step": (step, model, images, masks, classes),
        f"{name}, step with labels on the CPU": (partial(step, masks=masks, classes=classes), model, images),
        f"{name}, distillation": (distill, model, images, torch.rand(50, 2)),
    }


def all_work() -> dict[str, tuple[Any, ...]]:
    """Functions of tensors and models, each with its arguments, on the CPU."""
    return {
        **{name: (partial(call, target_sizes=SIZES), *logits()) for name, call in POST_PROCESSING.items()},
        **works_of("fai", small_model),
        **works_of("bisenetformer", partial(small_model, **BISENET)),
        **works_of("mask2former", lambda: ours_of(tiny())),
    }

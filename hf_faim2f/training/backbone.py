"""Backbones for new models: training one from scratch before the whole model, and loading a trained one.

The published models start from backbones that were trained on ImageNet. With a random backbone, masks improve early but
classes do not, because a query gets useful gradients for its class only once its mask is good. So the backbone is first
trained alone to classify segments: a linear probe on each feature level predicts the class of a segment from the mean
of its features. The probes are discarded afterwards.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from tqdm.auto import tqdm
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES

from ..data.item import Item
from ..download import download_model
from ..errors import ModelError
from ..model.configuration_faim2f import FaiM2FConfig
from ..model.modeling_faim2f import FaiM2FForUniversalSegmentation
from ..zoo import MASK2FORMER_TYPE, check_finite, load_weights, model_type, open_model, try_loading
from .recipe import Recipe, parameter_groups
from .trainer import diverged, gradient_norm

WARMUP = 0.04  # as a fraction of the steps
# Settings of a backbone that change its computation, but not the shapes of its weights.
ARCHITECTURE = (
    "layer_type",
    "depths",
    "hidden_act",
    "downsample_in_bottleneck",
    "downsample_in_first_stage",
    "window_size",
    "qkv_bias",
)


def segment_means(features: Tensor, mask_labels: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """The mean of the features over each segment.

    Args:
        features: one feature level, (B, C, h, w).
        mask_labels: for each image a map of segment ids (H, W), or binary masks (n, H, W).
        counts: the number n of segments in each image.

    Returns:
        (sum of n, C), in the order of the images.
    """
    means = []
    for maps, labels, count in zip(features, mask_labels, counts, strict=True):
        masks = labels == torch.arange(count, device=labels.device)[:, None, None] if labels.ndim == 2 else labels
        # In chunks, to limit the memory for full-size float masks.
        parts = [
            nn.functional.adaptive_avg_pool2d(part[None].to(maps), tuple(maps.shape[-2:]))[0] for part in masks.split(8)
        ]
        shares = torch.cat(parts) if parts else maps.new_zeros(0, *maps.shape[-2:])  # (n, h, w), 0..1
        weights = shares.flatten(1) / shares.flatten(1).sum(1, keepdim=True).clamp(min=1e-6)
        means.append(weights @ maps.flatten(1).t())
    return torch.cat(means)


def train_backbone(
    model: nn.Module,
    items: "Sequence[Item] | Dataset[Item]",
    collator: Callable[[list[Item]], dict[str, Any]],
    recipe: Recipe,
    *,
    at_once: int | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    seed: int = 0,
    workers: int = 0,
    log_every: int = 0,
    progress: bool = False,
) -> list[dict[str, float]]:
    """Trains `model.backbone` for the recipe's `backbone_steps`, and leaves the rest of the model unchanged.

    Args:
        model: a `FaiM2FForUniversalSegmentation`, on the device to train on.
        items, collator: as for training the whole model.
        recipe: gives the batch size, `backbone_steps`, `backbone_learning_rate` and `weight_decay`.
        at_once: images per forward pass; None for the whole batch. The gradients of smaller passes are accumulated.
        autocast: the context of the backbone's forward passes, for mixed precision without a gradient scaler.
        seed: determines the order of the items.
        workers: number of processes that read items.
        log_every: steps between log entries; 0 for no log.
        progress: show a progress bar on a terminal.

    Returns:
        The log: the step, the loss (mean over the levels), and each level's accuracy, 0..1: the fraction of segments
        that its probe classified correctly.

    Raises:
        DivergenceError: the loss or the gradient of a step is not finite; that step is not taken.
    """
    backbone: Any = model.backbone
    device = next(backbone.parameters()).device
    config: Any = model.config
    probes = nn.ModuleList([nn.Linear(channels, config.num_labels) for channels in backbone.channels])
    for probe in probes:
        nn.init.zeros_(probe.weight)  # type: ignore[arg-type]
        nn.init.zeros_(probe.bias)  # type: ignore[arg-type]
    probes.to(device)
    groups = parameter_groups(nn.ModuleList([backbone, probes]), recipe)
    optimizer = torch.optim.AdamW([{**group, "lr": recipe.backbone_learning_rate} for group in groups])
    warmup = max(1, int(WARMUP * recipe.backbone_steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / recipe.backbone_steps)),
    )
    was_training = model.training
    model.train()
    log = []
    batches = _batches(items, collator, recipe, seed, workers)
    bar = tqdm(batches, desc="backbone", total=recipe.backbone_steps, disable=None if progress else True)
    for step, batch in enumerate(bar, 1):
        counts = [len(labels) for labels in batch["class_labels"]]
        if sum(counts):
            optimizer.zero_grad()
            passes: list[Tensor] = []  # of each the share in the loss, and in each level's accuracy
            for start in range(0, len(counts), at_once or len(counts)):
                part = slice(start, start + (at_once or len(counts)))
                if not sum(counts[part]):
                    continue
                classes = torch.cat(batch["class_labels"][part]).to(device)
                masks = [labels.to(device) for labels in batch["mask_labels"][part]]
                with autocast():
                    levels = backbone(batch["pixel_values"][part].to(device), return_dict=True).feature_maps
                logits = [
                    probe(segment_means(level.float(), masks, counts[part]))
                    for probe, level in zip(probes, levels, strict=True)
                ]
                share = len(classes) / sum(counts)
                loss = share * torch.stack([nn.functional.cross_entropy(level, classes) for level in logits]).mean()
                loss.backward()
                hits = [share * (level.argmax(1) == classes).float().mean() for level in logits]
                passes.append(torch.stack([loss.detach(), *hits]))
            total, *shares_named = torch.stack(passes).sum(0)
            if not torch.stack([total, gradient_norm(backbone.parameters())]).isfinite().all():
                raise diverged(step, f"the loss of the backbone alone is {float(total):g}, and its gradient not finite",
                               optimizer.param_groups[0]["lr"])  # fmt: skip
            optimizer.step()
            if log_every and step % log_every == 0:
                named = {f"named_{index}": round(float(one), 4) for index, one in enumerate(shares_named)}
                log.append({"backbone_step": step, "backbone_loss": round(float(total), 4), **named})
                shares = ", ".join(f"{100 * share:.0f}" for share in named.values())
                bar.set_postfix_str(f"loss {log[-1]['backbone_loss']:.4f}, segments named (%): {shares}")
        schedule.step()
    model.train(was_training)
    return log


def _batches(
    items: "Sequence[Item] | Dataset[Item]",
    collator: Callable[[list[Item]], dict[str, Any]],
    recipe: Recipe,
    seed: int,
    workers: int,
) -> Iterator[dict[str, Any]]:
    """The batches of all backbone steps: epochs of items in random order, each with other random augmentations."""
    generator = torch.Generator().manual_seed(seed)
    in_epoch = max(1, len(items) // recipe.batch_size)  # type: ignore[arg-type]
    for epoch, start in enumerate(range(0, recipe.backbone_steps, in_epoch)):
        if hasattr(items, "set_epoch"):
            items.set_epoch(epoch)
        count = min(in_epoch, recipe.backbone_steps - start) * recipe.batch_size
        sampler = RandomSampler(items, num_samples=count, generator=generator)  # type: ignore[arg-type]
        yield from DataLoader(
            items,  # type: ignore[arg-type]
            batch_size=recipe.batch_size,
            sampler=sampler,
            collate_fn=collator,
            num_workers=workers,
        )


def load_backbone(model: FaiM2FForUniversalSegmentation, source: str, name: str) -> None:
    """Loads the weights of a trained backbone into a model.

    Args:
        model: the model whose backbone gets the weights.
        source: a folder, published name or Hub id of a model of this package, or of transformers. Weights of the latter
            are read from safetensors only.
        name: the model's name, for error messages.

    Raises:
        ModelError: there is no such model, its backbone has another type or shape, or its weights are not finite.
    """
    kind = model_type(source)
    if kind == FaiM2FConfig.model_type or (kind == MASK2FORMER_TYPE and not Path(source).is_dir()):
        trained = open_model(source)[0].backbone
        try:
            model.backbone.load_state_dict(trained.state_dict())
        except RuntimeError as error:
            raise ModelError(f"The backbone of {source} does not fit {name}: its shape differs.") from error
        return
    own = model.config.backbone_config
    if kind != own.model_type or kind not in MODEL_FOR_BACKBONE_MAPPING_NAMES:
        raise ModelError(f"{source} is of type {kind!r}, but the backbone of {name} is of type {own.model_type!r}.")
    place = Path(source) if Path(source).is_dir() else try_loading(source, "files", lambda: download_model(source))
    theirs = try_loading(source, "configuration", lambda: AutoConfig.from_pretrained(place))
    for key in ARCHITECTURE:
        if getattr(theirs, key, None) != getattr(own, key, None):
            raise ModelError(
                f"The backbone of {source} does not fit {name}: its {key} is {getattr(theirs, key, None)}, not "
                f"{getattr(own, key, None)}."
            )
    trained, missing, mismatched = load_weights(
        source, lambda **how: type(model.backbone).from_pretrained(place, config=own, use_safetensors=True, **how)
    )
    wrong = sorted(missing + mismatched)
    if wrong:
        raise ModelError(
            f"The backbone of {source} does not fit {name}: {len(wrong)} weights are missing or of another shape, the "
            f"first {wrong[0]}."
        )
    check_finite(source, trained)
    model.backbone.load_state_dict(trained.state_dict())


__all__ = ["load_backbone", "segment_means", "train_backbone"]

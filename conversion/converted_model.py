"""Shared by all conversions: validation of weights, comparison with the original's outputs, writing the Hub folder."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_faim2f.errors import ConversionError
from hf_faim2f.files import new_folder
from hf_faim2f.hub.card import Provenance, model_card
from hf_faim2f.model.image_processing_faim2f import FaiM2FImageProcessor
from hf_faim2f.model.modeling_faim2f import FaiM2FForUniversalSegmentation

LOGITS = ("class_queries_logits", "masks_queries_logits")
# Number of feature levels to which the transformer decoder's layers attend in turn.
NUM_LEVELS = 3
LEVEL_EMBEDDING = "transformer_decoder.level_embedding.weight"
INPUT_PROJECTION = re.compile(r"transformer_decoder\.input_projections\.(\d)\.")


@dataclass(frozen=True)
class ConvertedModel:
    """The result of a successful conversion.

    Args:
        name: name of the model.
        notes: sentences for the user.
        error: the largest difference from the original's logits, as a fraction of the largest logit; None if the
            original was not run.
    """

    name: str
    notes: list[str] = field(default_factory=list)
    error: float | None = None


def check_keys(missing: Iterable[str], unexpected: Iterable[str], where: str, remedy: str) -> None:
    """Checks that a checkpoint has exactly the keys that its configuration implies.

    Args:
        missing: keys that the configuration implies and the checkpoint lacks.
        unexpected: keys of the checkpoint that the configuration does not imply.
        where: name of the checkpoint for error messages.
        remedy: end of the message: why the two differ and what to do.

    Raises:
        ConversionError: a key is missing or unexpected; the message names the first and counts the others.
    """
    for kind, keys in (("lacks", list(missing)), ("has the unexpected", list(unexpected))):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ConversionError(f"{where} {kind} key {keys[0]!r}{more}: {remedy}")


def check_weight(key: str, tensor: torch.Tensor, where: str) -> None:
    """Checks that values are floating-point and finite, and variances not negative.

    Raises:
        ConversionError: the tensor has another dtype or an invalid value.
    """
    if not tensor.is_floating_point():
        raise ConversionError(f"{where}: {key!r} holds {tensor.dtype} where floating-point weights were expected.")
    if not torch.isfinite(tensor).all():
        raise ConversionError(f"{where}: {key!r} has values that are not finite; the training run diverged.")
    if key.endswith("running_var") and (tensor < 0).any():
        raise ConversionError(f"{where}: {key!r} has negative values, which a variance cannot have.")


def drop_unused_levels(weights: dict[str, torch.Tensor], decoder_layers: int) -> dict[str, torch.Tensor]:
    """Drops embeddings and projections of levels that a decoder with fewer layers than levels never reads.

    Args:
        weights: weights by this package's names.
        decoder_layers: number of decoder layers.
    """
    levels = min(NUM_LEVELS, decoder_layers)
    kept = {
        key: tensor
        for key, tensor in weights.items()
        if not (match := INPUT_PROJECTION.match(key)) or int(match[1]) < levels
    }
    if LEVEL_EMBEDDING in kept:
        kept[LEVEL_EMBEDDING] = kept[LEVEL_EMBEDDING][:levels].clone()
    return kept


def largest_difference(ours: Any, theirs: Any) -> float:
    """The largest difference between two models' logits, as a fraction of the largest logit of the second."""
    return max(
        float((ours[key] - theirs[key]).abs().max() / theirs[key].abs().max().clamp(min=1e-12)) for key in LOGITS
    )


def write_model_folder(
    out_dir: Path,
    name: str,
    model: FaiM2FForUniversalSegmentation,
    processor: FaiM2FImageProcessor,
    provenance: Provenance,
) -> None:
    """Writes a complete Hub repository to `out_dir` atomically: weights, configurations, code and model card.

    Args:
        out_dir: a folder that does not exist yet.
        name: the model's name on its card.
        provenance: the origin of the weights, for the card.

    Raises:
        OSError: the folder cannot be written.
    """
    with new_folder(out_dir) as staging:
        model.save_pretrained(staging)
        processor.save_pretrained(staging)
        (staging / "README.md").write_text(model_card(name, model.config, provenance), encoding="utf-8")


__all__ = [
    "NUM_LEVELS",
    "ConvertedModel",
    "check_keys",
    "check_weight",
    "drop_unused_levels",
    "largest_difference",
    "write_model_folder",
]

"""What every conversion shares: checking weights, comparing outputs with the original's, writing the Hub folder."""

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
# Feature levels that the transformer decoder's layers attend to, in turn.
NUM_LEVELS = 3
LEVEL_EMBEDDING = "transformer_decoder.level_embedding.weight"
INPUT_PROJECTION = re.compile(r"transformer_decoder\.input_projections\.(\d)\.")


@dataclass(frozen=True)
class ConvertedModel:
    """A conversion that succeeded.

    Args:
        name: what the model is called.
        notes: sentences for the user.
        error: the largest difference from the original's logits, as a share of the largest logit; None where the
            original was not run.
    """

    name: str
    notes: list[str] = field(default_factory=list)
    error: float | None = None


def check_keys(missing: Iterable[str], unexpected: Iterable[str], where: str, remedy: str) -> None:
    """Requires that a checkpoint has exactly the keys that its configuration implies.

    Args:
        missing: keys that the configuration implies and the checkpoint lacks.
        unexpected: keys of the checkpoint that the configuration does not imply.
        where: what to call the checkpoint in errors.
        remedy: ends the message: why the two differ and what to do.

    Raises:
        ConversionError: there is a key of either kind; the message names the first and counts the others.
    """
    for kind, keys in (("lacks", list(missing)), ("has the unexpected", list(unexpected))):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ConversionError(f"{where} {kind} key {keys[0]!r}{more}: {remedy}")


def check_weight(key: str, tensor: torch.Tensor, where: str) -> None:
    """Requires floating-point, finite values, and variances that are not negative.

    Raises:
        ConversionError: the tensor has another type or an impossible value.
    """
    if not tensor.is_floating_point():
        raise ConversionError(f"{where}: {key!r} holds {tensor.dtype} where floating-point weights were expected.")
    if not torch.isfinite(tensor).all():
        raise ConversionError(f"{where}: {key!r} has values that are not finite; the training run diverged.")
    if key.endswith("running_var") and (tensor < 0).any():
        raise ConversionError(f"{where}: {key!r} has negative values, which a variance cannot have.")


def drop_unused_levels(weights: dict[str, torch.Tensor], decoder_layers: int) -> dict[str, torch.Tensor]:
    """Removes what a decoder with fewer layers than levels never reads: embeddings and projections of the last levels.

    Args:
        weights: by this package's names.
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
    """The largest difference between two models' logits, as a share of the largest logit of the second."""
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
    """Writes a complete Hub repository to `out_dir`: weights, configurations, code and card; all of it, or nothing.

    Args:
        out_dir: a folder that does not exist.
        name: the model's name on its card.
        provenance: where the weights came from, for the card.

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

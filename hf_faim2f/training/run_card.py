"""The card of a run: its data, recipe, curve and metrics, so that what a training wrote can be published as it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.augmentation import to_config
from ..evaluation.report import per_class_table, scalars
from ..hub.card import Training, model_card, title_of, without_results
from ..hub.results import Measured
from ..model.configuration_faim2f import FaiM2FConfig
from ..model.image_processing_faim2f import FaiM2FImageProcessor
from .recipe import Recipe

# The losses of the last layer, and what the card calls them.
LOSSES = {"loss": "all layers", "loss_ce": "class", "loss_mask": "mask", "loss_dice": "dice"}


@dataclass(frozen=True)
class TrainedOn:
    """What a run's card says that the recipe does not know.

    Args:
        data: what the data is called; never a path of this machine.
        dataset_type: the data set's id, such as "ade20k".
        split, images: what was trained on, and how many images.
        evaluation_split, evaluation_images: likewise what was evaluated on.
        left_out: images that could not be read.
        is_whole: whether all of that part was evaluated; what was measured on less is not told in the card.
        started_from: the id on the Hub or the name of the model that it began as.
        license: of the weights, as the Hub calls it; None leaves it to a person.
    """

    data: str
    dataset_type: str
    split: str
    images: int
    evaluation_split: str
    evaluation_images: int
    left_out: int = 0
    is_whole: bool = True
    started_from: str | None = None
    license: str | None = None


def training_of(
    recipe: Recipe,
    about: TrainedOn | None,
    history: Sequence[Mapping[str, Any]],
    precision: str,
    seed: int,
    curve: str | None,
) -> Training:
    """What a card tells of a training; its log is `history`."""
    settings: dict[str, Any] = {
        "steps": recipe.steps,
        "images of a step": recipe.batch_size,
        "optimizer": f"AdamW, learning rate {recipe.learning_rate:g} (the backbone's times "
        f"{recipe.backbone_multiplier:g}), weight decay {recipe.weight_decay:g}, gradients clipped at {recipe.clip:g}",
        "schedule": f"{recipe.schedule}; warm-up steps: {recipe.warmup_steps}",
    }
    if recipe.ema_decay:
        settings["weights"] = f"their moving average, decay {recipe.ema_decay:g}"
    if recipe.backbone_steps:
        settings["steps of the backbone alone before"] = recipe.backbone_steps
    settings |= {"precision": precision, "seed": seed}
    last: Mapping[str, Any] = next((entry for entry in reversed(history) if "loss" in entry), {})
    return Training(
        recipe.name,
        settings,
        [str(step["name"]) for step in to_config(recipe.augmentations)],
        data=about.data if about else None,
        split=about.split if about else None,
        images=about.images if about else None,
        started_from=about.started_from if about else None,
        losses={name: round(float(last[key]), 4) for key, name in LOSSES.items() if key in last},
        curve=curve,
    )


def card_of(
    config: FaiM2FConfig,
    processor: FaiM2FImageProcessor,
    out_dir: Path,
    training: Training,
    about: TrainedOn | None,
    results: Mapping[str, Mapping[str, Any]],
    before: str,
    *,
    keep_results: bool,
) -> str:
    """The README.md of a run's model.

    Args:
        out_dir: the run's folder, whose name the model gets.
        results: what was measured of it, in per cent; empty before it was.
        before: the card that this one replaces; what a person wrote in it stays.
        keep_results: whether what it has of measurements is of these weights.

    Raises:
        ValueError: the metadata of the card before cannot be read.
    """
    before = before if keep_results else without_results(before)
    measured, tables = [], {}
    if results and about is not None and about.is_whole:
        measured = Measured(
            about.dataset_type, about.data, about.evaluation_split, about.evaluation_images, about.left_out,
            scalars(results),
        ).results()  # fmt: skip
        title = " ".join(f"Each class on {about.data} ({about.evaluation_split})".replace("<", "&lt;").split())
        tables[title] = per_class_table(results, "").partition("In per cent.")[2].strip().replace("<", "&lt;")
    name = out_dir.resolve().name
    return model_card(
        title_of(before) or name,
        config,
        size=processor.to_dict()["size"],
        results=measured,
        tables=tables,
        license=about.license if about else None,
        repository=f"{name}/final",
        before=before,
        training=training,
    )


__all__ = ["LOSSES", "TrainedOn", "card_of", "training_of"]

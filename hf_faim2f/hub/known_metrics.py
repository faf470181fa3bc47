"""How good a model is known to be: by its card's metadata, or by what was published of the family's members."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..family import ALIASES, FAMILY
from .results import CARD

# What each subtask is measured by first, as `results` names it; and in `family`'s published figures.
FIRST_METRIC = {"semantic": "mIoU", "instance": "AP", "panoptic": "PQ"}
PUBLISHED = {"semantic": "mIoU", "instance": "segm/AP"}


@dataclass(frozen=True)
class Metric:
    """A figure of a model's quality.

    Args:
        name: such as "instance AP".
        value: in per cent.
        dataset: what it was measured on, and which part.
        source: who says so.
    """

    name: str
    value: float
    dataset: str
    source: str


def known_metric(name: str, subtask: str, num_labels: int) -> Metric | None:
    """The first metric of a subtask that is known of a model.

    A card's own results come before published ones, which are told of models that their card, or without one their
    folder, calls by the name of a member of the family, with as many classes.

    Args:
        name: the model's folder, or its id on the Hub.
        subtask: "semantic", "instance" or "panoptic".
        num_labels: the model's number of classes.
    """
    data = _card_data(name)
    wanted = f"{subtask} {FIRST_METRIC[subtask]}"
    for result in getattr(data, "eval_results", None) or []:
        value = result.metric_value
        if result.metric_name == wanted and isinstance(value, (int, float)) and not isinstance(value, bool):
            split = f" ({result.dataset_split})" if result.dataset_split else ""
            return Metric(wanted, float(value), f"{result.dataset_name}{split}", f"the card of {name}")
    called = getattr(data, "model_name", None) or Path(name).resolve().name
    preset = FAMILY.get(ALIASES.get(called, called))
    figure = preset.published.get(PUBLISHED.get(subtask, "")) if preset is not None else None
    if preset is None or figure is None or len(preset.labels) != num_labels:
        return None
    return Metric(wanted, float(figure), str(preset.published["dataset"]), f"published by Focoos of {preset.name}")


def _card_data(name: str) -> Any:
    """The metadata of a model's card; None where there is no card that can be read."""
    path = Path(name) / CARD
    try:
        if Path(name).is_dir():
            return ModelCard.load(path).data if path.is_file() else None
        return ModelCard.load(name).data
    # A metric is good to have: whatever a stranger's metadata or the network makes go wrong, there is none.
    except Exception:
        return None


__all__ = ["FIRST_METRIC", "Metric", "known_metric"]

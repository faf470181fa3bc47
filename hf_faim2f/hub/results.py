"""Evaluation results in a model card's metadata, as the Hub shows them (`model-index`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..family import ALIASES, FAMILY
from ..files import write_whole

CARD = "README.md"
TASK = "image-segmentation"
TASK_NAME = "Image Segmentation"
# The Hub's name of a metric's kind, where it has one.
METRIC_TYPES = {"mIoU": "mean_iou", "AP": "map", "pACC": "accuracy", "mACC": "mean_accuracy"}


@dataclass(frozen=True)
class Measured:
    """What was measured on which data.

    Args:
        dataset_type: the data set's id, such as "ade20k".
        dataset_name: the data set's name.
        split: which part of it.
        images: how many were evaluated.
        left_out: how many could not be read.
        metrics: per subtask and name of a metric its value, in per cent.
    """

    dataset_type: str
    dataset_name: str
    split: str
    images: int
    left_out: int
    metrics: Mapping[str, Mapping[str, float]]

    def results(self) -> list[EvalResult]:
        """One a metric."""
        args = {"images": self.images, "left_out": self.left_out} if self.left_out else None
        return [
            EvalResult(
                task_type=TASK,
                # One name for all: a card keeps one for all results of a task on a data set.
                task_name=TASK_NAME,
                dataset_type=self.dataset_type,
                dataset_name=self.dataset_name,
                dataset_split=self.split,
                dataset_args=args,
                metric_type=METRIC_TYPES.get(name, name.lower()),
                metric_name=f"{subtask} {name}",
                metric_value=round(value, 4),
            )
            for subtask, values in self.metrics.items()
            for name, value in values.items()
        ]


def merge_results(card: str, model_name: str, new: list[EvalResult]) -> str:
    """The card with these results in its metadata; all else of it stays.

    A result of the same task, data set, split and metric is replaced, every other one is kept.

    Args:
        card: the contents of a README.md.
        model_name: for a card that does not name its model.
        new: the results.

    Raises:
        ValueError: the card's metadata is not what the Hub takes.
    """
    try:
        parsed = ModelCard(card, ignore_metadata_errors=False)
    except (ValueError, TypeError, LookupError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(f"its metadata cannot be read ({str(error).splitlines()[0]})") from error
    data: Any = parsed.data
    replaced = {_identity(result) for result in new}
    kept = [result for result in data.eval_results or [] if _identity(result) not in replaced]
    data.model_name = data.model_name or model_name
    data.eval_results = kept + new
    return str(parsed)


def new_card(model_name: str) -> str:
    """The card of a model that has none."""
    data = ModelCardData(library_name="transformers", pipeline_tag=TASK, tags=["faim2f"], model_name=model_name)
    return f"---\n{data.to_yaml()}\n---\n\n# {model_name}\n"


def update_card(folder: Path, new: list[EvalResult]) -> None:
    """Merges results into the card of a model's folder, which is replaced in one step.

    Raises:
        ValueError: the card's metadata is not what the Hub takes.
        OSError: the card cannot be read or written.
    """
    path = folder / CARD
    name = folder.resolve().name
    # Bytes, not text: whatever ends its lines, the card's own words stay as they are.
    before = path.read_bytes().decode("utf-8-sig") if path.exists() else new_card(name)
    write_whole(path, merge_results(before, name, new))


def _identity(result: EvalResult) -> tuple[str | None, ...]:
    return (
        result.task_type, result.task_name, result.dataset_type, result.dataset_name, result.dataset_config,
        result.dataset_split, result.metric_type, result.metric_name,
    )  # fmt: skip


# How good a model is known to be: by its card's metadata, or by what was published of the family's members.

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

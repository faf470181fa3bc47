"""Evaluation results in a model card's metadata (`model-index`), and the known quality metric of a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..errors import first_line
from ..family import ALIASES, FAMILY
from ..files import write_whole

CARD = "README.md"
TASK = "image-segmentation"
TASK_NAME = "Image Segmentation"
# The Hub's metric types, for metrics that have one.
METRIC_TYPES = {"mIoU": "mean_iou", "AP": "map", "pACC": "accuracy", "mACC": "mean_accuracy"}
# The main metric of each subtask, and its name in the figures that Focoos published.
FIRST_METRIC = {"semantic": "mIoU", "instance": "AP", "panoptic": "PQ"}
PUBLISHED = {"semantic": "mIoU", "instance": "segm/AP"}


@dataclass(frozen=True)
class Measured:
    """The results of an evaluation.

    Args:
        dataset_type: the dataset's id, such as "ade20k".
        dataset_name: the dataset's name.
        split: the evaluated split.
        images: number of evaluated images.
        left_out: number of images that could not be read.
        metrics: the metrics of each subtask by name, in percent.
    """

    dataset_type: str
    dataset_name: str
    split: str
    images: int
    left_out: int
    metrics: Mapping[str, Mapping[str, float]]

    def results(self) -> list[EvalResult]:
        """One result for each metric, in the Hub's form."""
        args = {"images": self.images, "left_out": self.left_out} if self.left_out else None
        return [
            EvalResult(
                task_type=TASK,
                # The same for all subtasks, because a card keeps one name for all results on a dataset.
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


def parse_card(card: str) -> tuple[dict[str, Any], str]:
    """Splits a card into its metadata (empty if there is none) and the text below.

    Raises:
        ValueError: the metadata is invalid.
    """
    if not card.lstrip().startswith("---"):
        return {}, card
    parsed = _parse(card)
    return parsed.data.to_dict(), parsed.text


def merge_results(card: str, model_name: str, new: list[EvalResult]) -> str:
    """Adds results to a card's metadata and changes nothing else.

    A new result replaces one with the same task, dataset, split and metric.

    Args:
        card: the contents of a README.md.
        model_name: used if the card does not name its model.
        new: the results.

    Raises:
        ValueError: the metadata is invalid.
    """
    parsed = _parse(card)
    data: Any = parsed.data
    replaced = {_identity(result) for result in new}
    kept = [result for result in data.eval_results or [] if _identity(result) not in replaced]
    data.model_name = data.model_name or model_name
    data.eval_results = kept + new
    return str(parsed)


def update_card(folder: Path, new: list[EvalResult]) -> None:
    """Adds results to the card of a model's folder; a folder without a card gets a short one.

    Raises:
        ValueError: the card's metadata is invalid.
        OSError: the card cannot be read or written.
    """
    path = folder / CARD
    name = folder.resolve().name
    if path.exists():
        before = path.read_bytes().decode("utf-8-sig")  # not read_text, which would change the line endings
    else:
        data = ModelCardData(library_name="transformers", pipeline_tag=TASK, tags=["faim2f"], model_name=name)
        before = f"---\n{data.to_yaml()}\n---\n\n# {name}\n"
    write_whole(path, merge_results(before, name, new))


def _parse(card: str) -> ModelCard:
    try:
        return ModelCard(card, ignore_metadata_errors=False)
    # What huggingface_hub and YAML raise for malformed metadata.
    except (ValueError, TypeError, LookupError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(f"its metadata cannot be read ({first_line(error, kind=False)})") from error


def _identity(result: EvalResult) -> tuple[str | None, ...]:
    return (
        result.task_type, result.task_name, result.dataset_type, result.dataset_name, result.dataset_config,
        result.dataset_split, result.metric_type, result.metric_name,
    )  # fmt: skip


@dataclass(frozen=True)
class Metric:
    """A metric of a model, and where it was found.

    Args:
        name: such as "instance AP".
        value: in percent.
        dataset: the dataset and its split.
        source: where the value comes from.
    """

    name: str
    value: float
    dataset: str
    source: str


def known_metric(name: str, subtask: str, num_labels: int, folder: Path | None = None) -> Metric | None:
    """The main metric of a subtask: from the model's card, else the published one; None if there is neither.

    The published metric is used if the model has the name and the number of classes of a family member. The name is
    taken from the card, else from the folder.

    Args:
        name: the model's folder or Hub id.
        subtask: "semantic", "instance" or "panoptic".
        num_labels: the model's number of classes.
        folder: the folder with the model's card, if it differs from `name`.
    """
    data = _card_data(name if folder is None else str(folder))
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
    """The metadata of a model's card; None if there is no readable card."""
    path = Path(name) / CARD
    try:
        if Path(name).is_dir():
            return ModelCard.load(path).data if path.is_file() else None
        return ModelCard.load(name).data
    # Best-effort: any failure, of the network or from malformed metadata, just means that no metric is known.
    except Exception:
        return None


__all__ = ["FIRST_METRIC", "Measured", "Metric", "known_metric", "merge_results", "parse_card", "update_card"]

"""Evaluation results in a model card's metadata (`model-index`) and text, and the known quality metric of a model."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..family import ALIASES, FAMILY
from ..files import sha256_of, write_whole
from .sections import MARK, TASK, Section, edit_generated, load_card, parse_card, plain, split_sections

CARD = "README.md"
TASK_NAME = "Image Segmentation"
# The Hub's metric types, for metrics that have one.
METRIC_TYPES = {"mIoU": "mean_iou", "AP": "map", "pACC": "accuracy", "mACC": "mean_accuracy"}
# The main metric of each subtask, and its name in the figures that Focoos published.
FIRST_METRIC = {"semantic": "mIoU", "instance": "AP", "panoptic": "PQ"}
# The split that has all images of data which is not divided.
WHOLE = "all"
# The source of published figures.
FOCOOS = "Focoos"
PUBLISHED = {"semantic": "mIoU", "instance": "segm/AP"}
DETAILS = re.compile(r"<details><summary>(.*?)</summary>\s*(.*?)\s*</details>", re.DOTALL)

# In a table of the classes, between cells; and the heading of the part that has a value in each row.
BETWEEN_CELLS, TOTALS = re.compile(r"(?<!\\)\|"), "over all classes"


@dataclass(frozen=True)
class Measured:
    """The results of an evaluation.

    Args:
        dataset_type: the dataset's id, such as "ade20k".
        dataset_name: the dataset's name.
        split: the evaluated split.
        images: number of evaluated images.
        left_out: number of images that could not be read.
        metrics: the metrics of each subtask by name, in percent; NaN for those that are undefined.
    """

    dataset_type: str
    dataset_name: str
    split: str
    images: int
    left_out: int
    metrics: Mapping[str, Mapping[str, float]]

    def results(self) -> list[EvalResult]:
        """One result for each metric, in the Hub's form; for `merged_results` also those that are NaN."""
        args = {"images": self.images, "left_out": self.left_out} if self.left_out else None
        return [
            EvalResult(
                task_type=TASK,
                # The same for all subtasks, because a card keeps one name for all results on a dataset.
                task_name=TASK_NAME,
                dataset_type=self.dataset_type,
                dataset_name=self.dataset_name,
                dataset_split=self.split,
                metric_args=args,  # not `dataset_args`, of which all results on a dataset have those of the first
                metric_type=METRIC_TYPES.get(name, name.lower()),
                metric_name=f"{subtask} {name}",
                metric_value=round(value, 4),
            )
            for subtask, values in self.metrics.items()
            for name, value in values.items()
        ]


def weights_digest(folder: Path) -> str | None:
    """The SHA-256 of the weights in a model's folder, or of their digests if there are several files; None if none."""
    digests = [sha256_of(path) for path in sorted(folder.glob("*.safetensors")) if path.is_file()]
    return sha256_of("".join(digests).encode()) if len(digests) > 1 else next(iter(digests), None)


def is_for_training(split: str | None) -> bool:
    """Whether a split's name says that its images are for training, such as "train", "train2017" or "trainval"."""
    # A slice such as "train[90%:]" may be held out from the training.
    return "[" not in str(split) and re.search("(?<![a-z])train", str(split).lower()) is not None


def is_on_training(split: str, trained: str | None) -> bool:
    """Whether a split of the data of the training has, or by its name may have, images of the training.

    A slice such as "train[90%:]" has images of its split, but counts as having none of another slice.

    Args:
        split: the evaluated split; "all" if the data was not divided.
        trained: the split of the training; None if unknown.
    """
    if trained is None or ("[" in split and "[" in trained):
        is_same = split == trained
    else:
        is_same = split.partition("[")[0] == trained.partition("[")[0]
    return is_same or WHOLE in (split, trained) or is_for_training(split)


def other_settings(
    inference: Any, precision: str, size: Mapping[str, Any] | None, own_size: Mapping[str, Any] | None
) -> str | None:
    """What an evaluation used instead of the model's own settings, with which a card states results; None for nothing.

    Args:
        inference: "whole", or sliding windows.
        precision: such as "fp32".
        size: the `size` of the image processor that was used; None if unknown.
        own_size: that of the model's own; None if unknown.
    """
    if inference != "whole":
        return "sliding windows"
    if precision != "fp32":
        return f"the precision {precision}"
    sizes = [{key: value for key, value in one.items() if value} for one in (size, own_size) if one is not None]
    if len(sizes) == 2 and sizes[0] != sizes[1]:
        return "images of another size"
    return None


def merge_results(card: str, model_name: str, new: list[EvalResult]) -> str:
    """Adds results to a card's metadata and changes nothing else.

    See `merged_results` for those that they replace.

    Args:
        card: the contents of a README.md.
        model_name: used if the card does not name its model.
        new: the results.

    Raises:
        ValueError: the metadata is invalid.
    """
    parsed = load_card(card)
    data: Any = parsed.data
    data.model_name = data.model_name or model_name
    data.eval_results = merged_results(data.eval_results or [], new)
    return str(parsed)


def merged_results(before: Sequence[EvalResult], new: Sequence[EvalResult]) -> list[EvalResult]:
    """The results of a card and new ones.

    A new result replaces one with the same task, dataset, split and metric. One that is NaN, because its metric is
    undefined, only removes it: an old value would stay beside the new ones of other metrics.
    """

    def identity(result: EvalResult) -> tuple[Any, ...]:
        return result.unique_identifier, result.metric_type, result.metric_name

    replaced = {identity(result) for result in new}
    kept = [result for result in before if identity(result) not in replaced]
    for result in kept:  # of an older version of this package, for all results on the dataset
        if isinstance(result.dataset_args, dict) and set(result.dataset_args) == {"images", "left_out"}:
            result.metric_args, result.dataset_args = result.dataset_args, None
    return [*kept, *(one for one in new if not (isinstance(one.metric_value, float) and math.isnan(one.metric_value)))]


def folded_tables(words: str) -> dict[str, str]:
    """The collapsed tables of a card's generated Results section, by caption."""
    found = [section for section in split_sections(words) if section.heading == "Results" and section.is_generated]
    return dict(DETAILS.findall(found[0].text)) if found else {}


def merge_tables(before: Mapping[str, str], new: Mapping[str, str]) -> dict[str, str]:
    """Adds tables of the classes to those of a card.

    A new table replaces the earlier one of the same caption, except for columns of subtasks that it lacks: these stay,
    as do their results in the metadata.

    Args:
        before, new: tables by caption.
    """
    return {
        **before,
        **{name: _merged(before[name], table) if name in before else table for name, table in new.items()},
    }


def _merged(before: str, new: str) -> str:
    old, own = _columns(before), _columns(new)
    measured = {title.split()[0] for columns in own.values() for title in columns}
    order = {subtask: place for place, subtask in enumerate(FIRST_METRIC)}
    parts = []
    for kind in sorted({**old, **own}, key=lambda kind: kind == TOTALS):
        kept = {title: cells for title, cells in old.get(kind, {}).items() if title.split()[0] not in measured}
        columns = kept | own.get(kind, {})
        titles = sorted(columns, key=lambda title: order.get(title.split()[0], len(order)))
        # All classes, in the order of a column that has most of them.
        names = dict.fromkeys(name for cells in sorted(columns.values(), key=len, reverse=True) for name in cells)
        rows = [[kind, *titles], ["---", *("---:" for _ in titles)]]
        rows += [[name, *(columns[title].get(name, "–") for title in titles)] for name in names]
        if kind == TOTALS:
            rows = [[kind, ""], ["---", "---:"], *([title, columns[title][""]] for title in titles)]
        parts += ["\n".join(f"| {' | '.join(row)} |" for row in rows)] if titles else []
    return "\n\n".join(parts)


def _columns(text: str) -> dict[str, dict[str, dict[str, str]]]:
    """The cells of Markdown tables by the table's first heading, the column's title and the row's name.

    In the table of the totals, each row counts as a column, whose only cell has an empty name.
    """
    tables: dict[str, dict[str, dict[str, str]]] = {}
    for part in text.split("\n\n"):
        rows = [[cell.strip() for cell in BETWEEN_CELLS.split(line)[1:-1]] for line in part.splitlines()]
        if len({len(row) for row in rows}) != 1 or len(rows) < 2 or len(rows[0]) < 2:
            continue  # no table
        titles, _, *body = rows
        tables[titles[0]] = {
            title: {row[0]: row[place] for row in body} for place, title in enumerate(titles) if place
        } if titles[0] != TOTALS else {row[0]: {"": row[1]} for row in body}  # fmt: skip
    return tables


def results_text(results: Sequence[EvalResult], tables: Mapping[str, str]) -> str:
    """The text of a card's Results section: a table for each dataset, and further tables by caption, collapsed."""
    if not results and not tables:
        return "Not evaluated yet. `faim2f evaluate` measures the model and adds its results here."
    groups: dict[tuple[str, ...], list[EvalResult]] = {}
    for result in results:
        args = result.metric_args if isinstance(result.metric_args, dict) else {}
        about = (result.dataset_name, result.dataset_split, result.dataset_config, args.get("left_out"))
        key = tuple(plain(part or "") for part in about)
        groups.setdefault(key, []).append(result)
    parts = []
    for (dataset, split, source, left_out), group in groups.items():
        who = f", {source}" if source else ""
        who += f", unusable images or annotations left out: {left_out}" if left_out else ""
        part = f"{split}: images for training" if is_for_training(split) else split
        part = f"{WHOLE}: every image, perhaps also those of the training" if split == WHOLE else part
        lines = [f"On {dataset}{f' ({part})' if part else ''}{who}, in percent:", ""]
        lines += ["| metric | value |", "| --- | ---: |"]
        lines += [f"| {plain(result.metric_name or result.metric_type)} | {_value(result)} |" for result in group]
        parts.append("\n".join(lines))
    for summary, table in tables.items():
        parts.append(f"<details><summary>{summary}</summary>\n\n{table}\n\n</details>")
    return "\n\n".join(parts)


def _value(result: EvalResult) -> str:
    value = result.metric_value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return plain(value)
    return f"{value:.2f}" if result.source_url else f"{value:.1f}"


def update_card(folder: Path, new: list[EvalResult], tables: Mapping[str, str] | None = None) -> None:
    """Adds results to the card of a model's folder; a folder without a card gets a short one.

    They are added to the metadata and, if it is generated, to the Results section; the rest of the card stays.

    Args:
        folder: the model's folder.
        new: the results.
        tables: Markdown tables for the section, by caption.

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
    write_whole(path, _renewed_section(merge_results(before, name, new), tables or {}))


def _renewed_section(card: str, tables: Mapping[str, str]) -> str:
    """Writes the results in a card's metadata into its generated Results section, if it has one."""
    data: Any = load_card(card).data
    results = data.eval_results or []

    def edit(section: Section, text: str) -> str:
        if section.heading != "Results":
            return text
        shown = results_text(results, merge_tables(folded_tables(str(section)), tables))
        line_end = "\r\n" if "\r\n" in text else "\n"
        return f"## Results\n\n{MARK}\n\n{shown}".replace("\n", line_end) + text[len(text.rstrip()) :]

    return edit_generated(card, edit)


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

    The published metric is used for a published name, and for a folder or Hub id whose card has Focoos's figures, as a
    conversion writes it, if it has the number of classes of that family member. Other names say nothing of the weights.

    Args:
        name: the model's folder, Hub id or published name.
        subtask: "semantic", "instance" or "panoptic".
        num_labels: the model's number of classes.
        folder: the folder with the model's card, if it differs from `name`.
    """
    data = _card_data(name if folder is None else str(folder))
    wanted = f"{subtask} {FIRST_METRIC[subtask]}"
    results = getattr(data, "eval_results", None) or []
    for result in (one for one in results if not is_for_training(one.dataset_split)):
        value = result.metric_value
        if result.metric_name == wanted and isinstance(value, (int, float)) and not isinstance(value, bool):
            split = f" ({result.dataset_split})" if result.dataset_split else ""
            return Metric(wanted, float(value), f"{result.dataset_name}{split}", f"the card of {name}")
    called = name
    if Path(name).is_dir() or ALIASES.get(name, name) not in FAMILY:
        called = data.model_name if any(result.source_name == FOCOOS for result in results) else ""
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


__all__ = [
    "FIRST_METRIC",
    "FOCOOS",
    "WHOLE",
    "Measured",
    "Metric",
    "folded_tables",
    "is_for_training",
    "is_on_training",
    "known_metric",
    "merge_results",
    "merge_tables",
    "merged_results",
    "other_settings",
    "parse_card",
    "results_text",
    "update_card",
    "weights_digest",
]

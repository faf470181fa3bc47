"""What an evaluation leaves behind: `evaluation.json` with everything, and the classes as a Markdown table."""

import json
import math
from collections.abc import Mapping
from typing import Any

Results = Mapping[str, Mapping[str, Any]]

RESULTS_FILE = "evaluation.json"
TABLE_FILE = "per_class.md"


def without_nan(value: Any) -> Any:
    """JSON has no NaN: what a metric leaves undefined is null."""
    if isinstance(value, Mapping):
        return {key: without_nan(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def scalars(results: Results) -> dict[str, dict[str, float]]:
    """The numbers over all classes that are defined, per subtask, by the metric's name."""
    return {
        subtask: {
            name: float(value)
            for name, value in result.items()
            if isinstance(value, (int, float)) and not math.isnan(value)
        }
        for subtask, result in results.items()
    }


def undefined_classes(results: Results) -> list[str]:
    """The classes of which every metric is undefined: they are not in the truth."""
    defined: dict[str, bool] = {}
    for result in results.values():
        for name, values in result["per_class"].items():
            defined[name] = defined.get(name, False) or not all(math.isnan(value) for value in values.values())
    return [name for name, is_defined in defined.items() if not is_defined]


def metric_lines(numbers: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The numbers of `scalars` for a person, a line for each subtask, in per cent as they are."""
    return [
        f"{subtask} (%): " + ", ".join(f"{name} {value:.2f}" for name, value in values.items())
        for subtask, values in numbers.items()
    ]


def results_json(results: Results, about: Mapping[str, Any]) -> str:
    """All results, with what was evaluated on what in front."""
    return json.dumps({**about, "results": without_nan(results)}, indent=1) + "\n"


def per_class_table(results: Results, heading: str) -> str:
    """A row a class, a column a metric of each subtask, and the means below; a dash where a metric is undefined."""
    per_class: dict[str, dict[str, float]] = {}
    columns: list[tuple[str, str]] = []
    for subtask, result in results.items():
        for name, values in result["per_class"].items():
            for metric, value in values.items():
                if (subtask, metric) not in columns:
                    columns.append((subtask, metric))
                per_class.setdefault(name, {})[f"{subtask} {metric}"] = value
    titles = [f"{subtask} {metric}" for subtask, metric in columns]
    lines = [f"# {heading}", "", "In per cent.", ""]
    lines += [_row(["class", *titles]), _row(["---", *("---:" for _ in titles)])]
    for name, values in per_class.items():
        lines.append(_row([name, *(_number(values.get(title)) for title in titles)]))
    for subtask, result in results.items():
        if "per_category" in result:
            measures = list(next(iter(result["per_category"].values())))
            lines += ["", _row(["category", *(f"{subtask} {measure}" for measure in measures)])]
            lines += [_row(["---", *("---:" for _ in measures)])]
            for name, numbers in result["per_category"].items():
                lines.append(_row([name, *(_number(numbers[measure]) for measure in measures)]))
    lines += ["", _row(["over all classes", ""]), _row(["---", "---:"])]
    for subtask, numbers in scalars(results).items():
        lines += [_row([f"{subtask} {name}", _number(value)]) for name, value in numbers.items()]
    return "\n".join(lines) + "\n"


def cityscapes_lines(result: Mapping[str, Any]) -> list[str]:
    """What cityscapesscripts measured as the tables that it prints, in per cent: classes, and categories.

    It prints as nIoU what the paper calls iIoU: the IoU in which every instance weighs the same.
    """
    lines = []
    for plural, kind in (("classes", "class"), ("categories", "category")):
        lines += [f"{plural:<16}{'IoU':>8}{'nIoU':>8}"]
        rows = {**result[f"per_{kind}"]}
        rows["average"] = {"IoU": result[f"IoU_{kind}"], "iIoU": result[f"iIoU_{kind}"]}
        lines += [f"{name:<16}{_number(row['IoU']):>8}{_number(row['iIoU']):>8}" for name, row in rows.items()]
    return lines


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.2f}"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

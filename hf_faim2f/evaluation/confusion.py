"""The confusion matrix of a semantic evaluation, as a picture and as a table of pixel counts."""

import csv
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..files import write_whole

CONFUSION_PICTURE = "confusion.png"
CONFUSION_TABLE = "confusion.csv"
# Classes in the picture; of more classes, the most confused ones are drawn.
MOST_CLASSES = 20
# Characters of a class name in the picture.
LONGEST_LABEL = 22
OTHERS = "(other classes)"


class Confusion(NamedTuple):
    """A confusion matrix to draw: rows are true classes, columns predicted ones.

    Args:
        rows: ids of the true classes; only classes with pixels in the ground truth.
        columns: ids of the predicted classes.
        percent: (rows, columns), in percent of the true pixels of the row's class.
        others: (rows,), what is predicted as a class that is not in `columns`, in percent; None if all classes are.
    """

    rows: list[int]
    columns: list[int]
    percent: np.ndarray
    others: np.ndarray | None


def row_percent(counts: np.ndarray) -> np.ndarray:
    """The counts (C, C) in percent of their row's sum; NaN in rows without counts."""
    total = counts.sum(1, keepdims=True)
    return np.divide(100.0 * counts, total, out=np.full(counts.shape, np.nan), where=total > 0)


def most_confused(counts: np.ndarray, most: int = MOST_CLASSES) -> Confusion:
    """Chooses the part of a confusion matrix to draw.

    Args:
        counts: (C, C) numbers of pixels; rows are the ground truth, columns the predictions.
        most: the number of classes to keep. They are those of the largest confusions, in percent of the true class.
    """
    percent = row_percent(counts)
    number = len(counts)
    kept = list(range(number))
    if number > most:
        confused = np.where(np.isnan(percent), -1.0, percent)
        np.fill_diagonal(confused, -1.0)
        order = np.argsort(-confused, axis=None, kind="stable")
        pairs = np.stack(np.unravel_index(order, confused.shape), axis=1)
        kept = sorted(list(dict.fromkeys(pairs[confused.flat[order] > 0].flatten().tolist()))[:most])
        for label in range(number):  # fewer are confused at all
            if len(kept) < most and label not in kept and counts[label].any():
                kept = sorted([*kept, label])
    rows = [label for label in kept if counts[label].any()]
    part = percent[np.ix_(rows, kept)]
    others = None
    if len(kept) < number:
        left_out = sorted(set(range(number)) - set(kept))
        others = percent[np.ix_(rows, left_out)].sum(1)
    return Confusion(rows, kept, part, others)


def write_confusion(counts: np.ndarray, names: Sequence[str], folder: Path, *, picture: bool = True) -> list[Path]:
    """Writes `confusion.csv`, the numbers of pixels of every pair of classes, and `confusion.png`.

    Args:
        counts: (C, C) numbers of pixels; rows are the ground truth, columns the predictions.
        names: the class names in the order of their ids.
        folder: an existing folder.
        picture: whether to draw; needs matplotlib.

    Returns:
        The files.

    Raises:
        OSError: a file cannot be written.
        ImportError: matplotlib is missing.
    """
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["truth \\ predicted", *names])
    writer.writerows([name, *row] for name, row in zip(names, counts.tolist(), strict=True))
    paths = [folder / CONFUSION_TABLE]
    write_whole(paths[0], table.getvalue())
    if picture and counts.any():
        paths.append(folder / CONFUSION_PICTURE)
        write_whole(paths[1], draw_confusion(counts, names))
    return paths


def draw_confusion(counts: np.ndarray, names: Sequence[str], most: int = MOST_CLASSES) -> bytes:
    """Draws a confusion matrix, in percent of the pixels of each true class, as a PNG.

    Args:
        counts, names: as in `write_confusion`; at least one count is not 0.
        most: as in `most_confused`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import PowerNorm

    drawn = most_confused(counts, most)
    values = drawn.percent if drawn.others is None else np.column_stack([drawn.percent, drawn.others])
    rows = [_label(names[label]) for label in drawn.rows]
    columns = [_label(names[label]) for label in drawn.columns] + ([] if drawn.others is None else [OTHERS])
    cell = 0.46  # inches
    size = (3.0 + cell * len(columns), 2.6 + cell * len(rows))
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    # With the root of the value as brightness, a confusion of one percent can be seen.
    axes.imshow(values, cmap="Blues", norm=PowerNorm(0.5, 0, 100), aspect="equal")
    axes.set_xticks(range(len(columns)), columns, rotation=90)
    axes.set_yticks(range(len(rows)), rows)
    for text in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        text.set_parse_math(False)
    axes.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white")
    axes.tick_params(which="minor", length=0)
    for row, label in enumerate(drawn.rows):
        for column in range(len(columns)):
            value = float(values[row, column])
            if value >= 0.05:
                is_right = column < len(drawn.columns) and drawn.columns[column] == label
                axes.text(
                    column, row, f"{value:.0f}" if value >= 9.95 else f"{value:.1f}", ha="center", va="center",
                    fontsize=9, fontweight="bold" if is_right else "normal", color="white" if value > 40 else "black",
                )  # fmt: skip
    chosen = f"; the {len(drawn.columns)} most confused of {len(names)} classes" if drawn.others is not None else ""
    figure.suptitle(f"Predicted pixels in percent of each true class{chosen}", fontsize=11, wrap=True)
    axes.set(xlabel="predicted", ylabel="truth")
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)
    return file.getvalue()


def _label(name: str) -> str:
    return name if len(name) <= LONGEST_LABEL else name[: LONGEST_LABEL - 1] + "…"


__all__ = ["CONFUSION_PICTURE", "CONFUSION_TABLE", "draw_confusion", "most_confused", "row_percent", "write_confusion"]

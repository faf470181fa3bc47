"""Semantic segmentation: intersection over union and accuracy from a confusion matrix, and its picture and table.

Follows Focoos's evaluator, which is detectron2's `SemSegEvaluator`; mmsegmentation's mean is returned as well. The
metrics are defined in "Fully Convolutional Networks for Semantic Segmentation" (https://arxiv.org/abs/1411.4038,
section 5).

The confusion matrix takes one `torch.bincount` per image. torchmetrics does the same internally, but would be one more
dependency, and its state cannot be merged across processes without its own synchronization.
"""

import csv
import io
import warnings
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..files import write_whole
from .streaming import MAP, PERCENT, Features, StreamingMetric, check_same_size, mean, read_map

CONFUSION_PICTURE = "confusion.png"
CONFUSION_TABLE = "confusion.csv"
# Maximum number of classes in the picture; the most confused ones are drawn.
MOST_CLASSES = 20
# Characters of a class name in the picture.
LONGEST_LABEL = 22
OTHERS = "(other classes)"

USUAL_VOID = 255


class SemanticMetric(StreamingMetric):
    """mIoU, fwIoU, mean accuracy and pixel accuracy, over all images and per class.

    Predictions and references are maps (H, W) of class ids in 0..C-1. Both can be tensors (which are counted on their
    device), arrays, Pillow images or lists. Pixels that are `ignore_index` in the reference do not count. The metric
    keeps the confusion matrix, (C, C).

    `compute` returns, in percent, with the intersection, union and ground truth of a class in pixels over all images:

    - `mIoU`: the mean of intersection / union over the classes in the ground truth, as in Focoos and detectron2.
    - `mIoU_mmseg`: the same over the classes in the ground truth or in any prediction, as in mmsegmentation: a class
      that is only predicted counts as 0. It differs from `mIoU` only if a predicted class has no ground truth.
    - `fwIoU`: the mean of the IoU, weighted by each class's fraction of the ground truth.
    - `mACC`: the mean of intersection / ground truth over the classes in the ground truth.
    - `pACC`: the fraction of pixels with the right class.
    - `per_class`: {name: {`IoU`, `ACC`}}; NaN for a class that does not occur in the ground truth.

    Args:
        id2label: the name of each class id, 0..C-1.
        ignore_index: the value of reference pixels that do not count; None if all count.

    Raises:
        ValueError: the class ids are not 0..C-1, or `ignore_index` is 255 and so is one of them.
    """

    DESCRIPTION = "Intersection over union and accuracy of semantic segmentation, over all pixels of all images."
    CITATION = "https://arxiv.org/abs/1411.4038"
    INPUTS = """
        predictions: for each image a map (H, W) of class ids.
        references: for each image a map (H, W) of class ids, or ignore_index where a pixel does not count.
    """

    def __init__(self, id2label: Mapping[int, str], ignore_index: int | None = USUAL_VOID):
        self.ignore_index = ignore_index
        super().__init__(id2label)
        if list(self.class_names) != list(range(len(self.class_names))):
            raise ValueError(
                f"Semantic segmentation needs the class ids 0 to {len(self.class_names) - 1} for "
                f"{len(self.class_names)} classes, not {min(self.class_names)} to {max(self.class_names)}."
            )
        if ignore_index == USUAL_VOID and ignore_index in self.class_names:  # the default would drop a class
            raise ValueError(
                f"ignore_index is {ignore_index}, which is the class {self.class_names[ignore_index]!r}: pass the "
                "value of pixels without a class, such as -1, or None if there are none."
            )

    def _features(self) -> Features:
        return Features({"predictions": MAP, "references": MAP})

    def _update(self, prediction: Any, reference: Any, image_id: Hashable | None, name: str) -> None:
        predicted = read_map(prediction, "prediction", name)
        true = read_map(reference, "reference", name).to(predicted.device)
        check_same_size(predicted.shape, true.shape, name)
        classes = len(self.class_names)
        if self.ignore_index is not None:
            counted = true != self.ignore_index
            predicted, true = predicted[counted], true[counted]
        if not true.numel():
            return
        for labels, what in ((predicted, "prediction"), (true, "reference")):
            for label in labels.aminmax():
                self._check_label(label.item(), what, name)
        counts = torch.bincount((true * classes + predicted).view(-1), minlength=classes**2)
        self._confusion += counts.view(classes, classes).cpu().numpy()

    @property
    def confusion(self) -> np.ndarray:
        """(C, C) int64: the numbers of pixels counted so far; rows are the ground truth, columns the predictions."""
        return self._confusion.copy()

    def _result(self) -> dict[str, Any]:
        right = np.diag(self._confusion).astype(float)
        true, predicted = self._confusion.sum(1).astype(float), self._confusion.sum(0).astype(float)
        union = true + predicted - right
        occurs = true > 0  # implies a non-empty union
        iou, accuracy = (
            PERCENT * np.divide(right, by, out=np.full_like(right, np.nan), where=occurs) for by in (union, true)
        )
        pixels = true.sum()
        return {
            "mIoU": mean(iou[occurs].tolist()),
            "mIoU_mmseg": mean(np.where(occurs, iou, 0)[union > 0].tolist()),
            "fwIoU": float((iou * true)[occurs].sum() / pixels) if pixels else float("nan"),
            "mACC": mean(accuracy[occurs].tolist()),
            "pACC": float(PERCENT * right.sum() / pixels) if pixels else float("nan"),
            "per_class": {
                name: {"IoU": float(iou[i]), "ACC": float(accuracy[i])} for i, name in self.class_names.items()
            },
        }

    def _clear(self) -> None:
        self._confusion = np.zeros((len(self.class_names),) * 2, dtype=np.int64)

    def _state(self) -> np.ndarray:
        return self.confusion

    def _absorb(self, state: np.ndarray) -> None:
        self._confusion += state

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "ignore_index": self.ignore_index}


class Confusion(NamedTuple):
    """A confusion matrix to draw: rows are true classes, columns predicted ones.

    Args:
        rows: ids of the true classes; only classes with pixels in the ground truth.
        columns: ids of the predicted classes.
        percent: (rows, columns), in percent of the true pixels of the row's class.
        others: (rows,), the percentage predicted as classes that are not in `columns`; None if all classes are.
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

"""The confusion matrix of an evaluation: its numbers, the classes that are drawn, and the files."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_faim2f.evaluation.evaluator import Evaluator, semantic_reference
from hf_faim2f.evaluation.semantic import SemanticMetric, draw_confusion, most_confused, row_percent, write_confusion
from tests.support.shapes import LABELS, THINGS, Shapes
from tests.support.short_training import processor_of, shapes_model


def test_the_evaluator_keeps_the_pixels_of_every_pair_of_classes() -> None:
    """Counted one at a time, from the maps that the evaluator shows; the metrics follow from the same numbers."""
    model = shapes_model()
    maps: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watch(subtask: str, item: dict, prediction: torch.Tensor) -> None:
        if subtask == "semantic":
            maps.append((semantic_reference(item), prediction))  # type: ignore[arg-type]

    evaluator = Evaluator(
        processor_of(model), model.config.id2label, ("semantic", "panoptic"), THINGS, watch=watch,  # type: ignore[arg-type]
    )  # fmt: skip
    assert evaluator.confusion is None
    results = evaluator(model, Shapes(3))
    counted = np.zeros((4, 4), dtype=int)
    for truth, predicted in maps:
        for row, column in zip(truth.flatten().tolist(), predicted.flatten().tolist(), strict=True):
            if row != 255:
                counted[row, column] += 1
    assert len(maps) == 3 and (evaluator.confusion == counted).all()
    recall = np.diag(row_percent(counted))
    for name, value in zip(LABELS, recall, strict=True):
        assert results["semantic"]["per_class"][name]["ACC"] == pytest.approx(value, nan_ok=True)
    Evaluator.__call__(evaluator, model, Shapes(1))
    assert evaluator.confusion is not None and evaluator.confusion.sum() == 64 * 64
    without = Evaluator(processor_of(model), model.config.id2label, ("panoptic",), THINGS)
    without(model, Shapes(1))
    assert without.confusion is None


def test_the_metric_shows_its_counts_without_giving_them_away() -> None:
    metric = SemanticMetric({0: "a", 1: "b"})
    metric.add(prediction=[[0, 1], [1, 1]], reference=[[0, 0], [1, 255]])
    assert metric.confusion.tolist() == [[1, 1], [0, 1]]
    metric.confusion[:] = 7
    assert metric.compute()["pACC"] == pytest.approx(200 / 3) and metric.confusion.sum() == 0


def test_few_classes_are_all_drawn_but_only_true_ones_have_a_row() -> None:
    drawn = most_confused(np.array([[9, 1, 0], [0, 0, 0], [1, 0, 1]]))
    assert drawn.rows == [0, 2] and drawn.columns == [0, 1, 2] and drawn.others is None
    assert drawn.percent.tolist() == [[90, 10, 0], [50, 0, 50]]


def test_of_many_classes_the_most_confused_are_drawn_and_the_rest_is_summed() -> None:
    counts = 100 * np.eye(30, dtype=int)
    counts[5, 9], counts[20, 2], counts[7, 8] = 50, 30, 1
    counts[3] = 0  # never in the truth
    drawn = most_confused(counts, most=5)
    assert drawn.columns == [2, 5, 7, 9, 20] and drawn.rows == drawn.columns  # 8 would be the sixth
    assert drawn.others is not None
    assert np.column_stack([drawn.percent, drawn.others]).sum(1) == pytest.approx(100)
    assert drawn.others[2] == pytest.approx(100 / 101) and drawn.percent[4, 0] == pytest.approx(3000 / 130)
    perfect = most_confused(100 * np.eye(30, dtype=int), most=4)
    assert perfect.columns == [0, 1, 2, 3] and perfect.others is not None and not perfect.others.any()


def test_the_files(tmp_path: Path) -> None:
    counts, names = np.array([[9, 1], [0, 4]]), ["sky, blue", "$x$ " + "long " * 10]
    assert [path.name for path in write_confusion(counts, names, tmp_path)] == ["confusion.csv", "confusion.png"]
    rows = list(csv.reader((tmp_path / "confusion.csv").read_text().splitlines()))
    assert rows == [["truth \\ predicted", *names], [names[0], "9", "1"], [names[1], "0", "4"]]
    with Image.open(tmp_path / "confusion.png") as picture:
        assert picture.format == "PNG" and picture.width > 300
    with Image.open(io.BytesIO(draw_confusion(np.eye(60, dtype=int), [str(n) for n in range(60)]))) as picture:
        assert picture.width < 2000  # 20 classes
    (tmp_path / "empty").mkdir()
    assert len(write_confusion(0 * counts, names, tmp_path / "empty")) == 1

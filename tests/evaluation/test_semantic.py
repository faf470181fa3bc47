"""mIoU and accuracy compared with scikit-learn and hotcoco, which follows mmsegmentation; and the confusion matrix."""

import csv
import io
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hotcoco.semantic import SemanticEval
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import accuracy_score, jaccard_score, recall_score

from hf_faim2f import FaiM2FImageProcessor
from hf_faim2f.data.item import make_item
from hf_faim2f.evaluation.evaluator import Evaluator, semantic_reference
from hf_faim2f.evaluation.semantic import SemanticMetric, draw_confusion, most_confused, row_percent, write_confusion
from hf_faim2f.runtime.tiles import Windows
from tests.support.reference_models import small_model
from tests.support.shapes import LABELS, THINGS, Shapes
from tests.support.short_training import processor_of, shapes_model

IGNORE = 255


def names(classes: int) -> dict[int, str]:
    return {i: f"class {i}" for i in range(classes)}


def scenes(seed: int, images: int, classes: int, occurring: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Predictions and references (H, W). References only have classes below `occurring`, and a tenth of ignored
    pixels."""
    rng = np.random.default_rng(seed)
    predictions, references = [], []
    for _ in range(images):
        size = tuple(rng.integers(1, 12, 2))
        true = rng.integers(0, occurring, size)
        predicted = np.where(rng.random(size) < 0.6, true, rng.integers(0, classes, size))
        true[rng.random(size) < 0.1] = IGNORE
        predictions.append(predicted)
        references.append(true)
    return predictions, references


def expected(predictions: list[np.ndarray], references: list[np.ndarray], classes: int) -> dict[str, Any]:
    """The metrics from scikit-learn, with all counted pixels as one list."""
    true = np.concatenate([image.ravel() for image in references])
    predicted = np.concatenate([image.ravel() for image in predictions])[true != IGNORE]
    true = true[true != IGNORE]
    labels = np.arange(classes)
    in_truth, in_either = np.isin(labels, true), np.isin(labels, np.concatenate([true, predicted]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about classes that do not occur
        iou = jaccard_score(true, predicted, labels=labels, average=None)
        accuracy = recall_score(true, predicted, labels=labels, average=None)
        weighted = jaccard_score(true, predicted, labels=labels, average="weighted")
    return {
        "mIoU": 100 * iou[in_truth].mean(),
        "mIoU_mmseg": 100 * iou[in_either].mean(),
        "fwIoU": 100 * weighted,
        "mACC": 100 * accuracy[in_truth].mean(),
        "pACC": 100 * accuracy_score(true, predicted),
        "per_class": {
            f"class {i}": {
                "IoU": 100 * iou[i] if in_truth[i] else math.nan,
                "ACC": 100 * accuracy[i] if in_truth[i] else math.nan,
            }
            for i in labels
        },
    }


def assert_same(result: dict[str, Any], expectation: dict[str, Any]) -> None:
    assert list(result) == list(expectation)
    for name, value in expectation.items():
        if isinstance(value, dict):
            assert_same(result[name], value)
        else:
            assert result[name] == pytest.approx(value, abs=1e-6, nan_ok=True), name


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    images=st.integers(1, 4),
    classes=st.integers(2, 8),
    missing=st.integers(0, 4),
)
def test_equals_scikit_learn(seed: int, images: int, classes: int, missing: int) -> None:
    predictions, references = scenes(seed, images, classes, max(1, classes - missing))
    references[0][0, 0] = 0  # at least one pixel counts
    metric = SemanticMetric(names(classes), IGNORE)
    for prediction, reference in zip(predictions, references, strict=True):
        metric.add_batch(predictions=[prediction], references=[reference])
    assert_same(metric.compute(), expected(predictions, references, classes))


def test_equals_mmsegmentation_as_hotcoco_gives_it() -> None:
    predictions, references = scenes(3, 6, 9, 6)
    metric, library = SemanticMetric(names(9), IGNORE), SemanticEval(9, ignore_index=IGNORE)
    for prediction, reference in zip(predictions, references, strict=True):
        library.update(reference.astype(np.int64), prediction.astype(np.int64))
    result = metric.compute(predictions=predictions, references=references)
    theirs = library.report()["metrics"]
    assert result["mIoU_mmseg"] == pytest.approx(100 * theirs["mIoU"], abs=1e-6)
    assert result["mACC"] == pytest.approx(100 * theirs["mAcc"], abs=1e-6)
    assert result["pACC"] == pytest.approx(100 * theirs["aAcc"], abs=1e-6)
    assert result["fwIoU"] == pytest.approx(100 * theirs["fwIoU"], abs=1e-6)


def test_by_hand_with_a_class_that_is_only_predicted_and_one_that_never_occurs() -> None:
    # Ground truth: two pixels of a, one of b, one ignored. Predicted: a, c, b, and anything.
    metric = SemanticMetric({0: "a", 1: "b", 2: "c", 3: "d"}, ignore_index=9)
    result = metric.compute(predictions=[[[0, 2], [1, 77]]], references=[[[0, 0], [1, 9]]])
    assert result["mIoU"] == pytest.approx((50 + 100) / 2)
    assert result["mIoU_mmseg"] == pytest.approx((50 + 100 + 0) / 3)
    assert result["fwIoU"] == pytest.approx((2 * 50 + 100) / 3)
    assert result["mACC"] == pytest.approx((50 + 100) / 2)
    assert result["pACC"] == pytest.approx(200 / 3)
    assert math.isnan(result["per_class"]["c"]["IoU"]) and math.isnan(result["per_class"]["d"]["ACC"])


def read_only(values: np.ndarray) -> np.ndarray:
    values = values.copy()
    values.flags.writeable = False
    return values


@pytest.mark.filterwarnings("error")
def test_takes_tensors_pictures_and_floats_alike() -> None:
    predictions, references = scenes(1, 1, 5, 5)
    results = [
        SemanticMetric(names(5), IGNORE).compute(predictions=[kind(predictions[0])], references=[kind(references[0])])
        for kind in (
            lambda x: x,
            torch.from_numpy,
            lambda x: torch.from_numpy(x).float(),
            lambda x: Image.fromarray(x.astype(np.uint8)),
            lambda x: x.astype(np.uint16),
            lambda x: x.tolist(),
            read_only,
        )
    ]
    for result in results[1:]:
        assert_same(result, results[0])


def test_nothing_counts() -> None:
    result = SemanticMetric(names(2)).compute(predictions=[[[0]]], references=[[[IGNORE]]])
    assert all(math.isnan(value) for name, value in result.items() if name != "per_class")


def test_without_an_ignored_value() -> None:
    with pytest.raises(ValueError, match="class 255 of the reference"):
        SemanticMetric(names(2), ignore_index=None).add(prediction=[[0]], reference=[[IGNORE]])


@pytest.mark.parametrize(
    ("prediction", "reference", "message"),
    [
        ([[0, 1]], [[0], [1]], "image 'street': the prediction is 1x2 pixels .* but the reference is 2x1"),
        ([[0, 3]], [[0, 0]], "image 'street': class 3 of the prediction is not one of the 3 classes"),
        ([[0, -1]], [[0, 0]], "class -1 of the prediction"),
        ([[0, 0]], [[0, 4]], "image 'street': class 4 of the reference"),
        ([0, 1], [0, 1], r"must be a map \(height, width\)"),
        (np.zeros((3, 2, 2)), np.zeros((2, 2)), r"must be a map \(height, width\) .* not 3x2x2"),
        ([[0.5, 0]], [[0, 0]], "are these scores"),
        ("a.png", [[0]], "not a map of whole numbers"),
    ],
)
def test_mistakes_are_named_and_nothing_is_counted(prediction: Any, reference: Any, message: str) -> None:
    metric = SemanticMetric(names(3))
    with pytest.raises(ValueError, match=message):
        metric.add(prediction=prediction, reference=reference, image_id="street")
    assert len(metric) == 0 and not metric.state_dict()["counts"].any()


def test_classes_must_be_the_first_numbers() -> None:
    with pytest.raises(ValueError, match="needs the class ids 0 to 1 for 2 classes, not 1 to 2"):
        SemanticMetric({1: "a", 2: "b"})


def test_a_class_with_the_number_of_the_usual_void_counts() -> None:
    """With more than 255 classes, the class with the id 255 is evaluated, and pixels without a class are not."""
    many = names(300)
    with pytest.raises(ValueError, match="ignore_index is 255, which is the class 'class 255': pass the value of"):
        SemanticMetric(many)
    segments = torch.tensor([[0, 0, 1, 1], [-1, -1, -1, -1]])
    item = make_item(torch.zeros(3, 2, 4, dtype=torch.uint8), segments, [254, 255], 0, "a.png")
    evaluator = Evaluator(FaiM2FImageProcessor(), many, ("semantic",))
    metrics = evaluator._metrics()
    evaluator._add_maps([torch.full((2, 4), 254)], [item], metrics)
    result = metrics["semantic"].compute()
    assert result["pACC"] == 50 and result["per_class"]["class 255"]["ACC"] == 0


def test_the_evaluator_keeps_the_pixels_of_every_pair_of_classes() -> None:
    """Compared with the maps that the evaluator passes to `watch`, counted pixel by pixel; metrics match these
    counts."""
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


def test_mixed_precision_of_a_training_does_not_change_an_evaluation() -> None:
    """accelerate makes the model's own `forward` one in bfloat16, which evaluates other weights than those saved."""
    model, items = small_model(num_labels=3), Shapes(2)
    evaluator = Evaluator(processor_of(model), dict(enumerate(LABELS)))
    expected = evaluator(model, items)
    seen: list[bool] = []
    model.pixel_decoder.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    try:
        prepared = accelerator.prepare_model(model)
        np.testing.assert_equal(evaluator(prepared, items), expected)
        assert seen and not any(seen)
        prepared(torch.zeros(1, 3, 64, 64))
        assert seen[-1]
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


class FixedPredictions(torch.nn.Module):
    """Predicts four queries for any image of 64 x 64 pixels: two of them the left half, two a quarter each."""

    def __init__(self) -> None:
        super().__init__()
        self.parameter = torch.nn.Parameter(torch.zeros(()))

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        classes = torch.tensor(
            [[3, -9, -9, -9, 6], [-9, 2, -9, -9, -9], [-9, -9, 1.5, 1.4, -9], [-9, 3, -9, -9, 6]]
        )  # fmt: skip
        masks = torch.full((4, 64, 64), -9.0)
        masks[:2, :, :32] = masks[2, :32, 32:] = masks[3, 32:, 32:] = 9
        repeated = (len(pixel_values), 1, 1)
        return SimpleNamespace(
            class_queries_logits=classes[None].repeat(repeated),
            masks_queries_logits=masks[None].repeat(*repeated, 1),
        )


@pytest.mark.parametrize("windows", [None, Windows((64, 64))])
@pytest.mark.parametrize(("cls_sigmoid", "miou", "ap", "pq"), [(True, 100, 100, 100), (False, 400 / 9, 75, 100 / 3)])
def test_classes_are_scored_as_the_processor_says(
    cls_sigmoid: bool, miou: float, ap: float, pq: float, windows: Windows | None
) -> None:
    """By hand. With sigmoids, the queries 0, 2 and 3 score 0.95, 0.82 and 0.95 for their classes, more than query 1
    with 0.88 for a wrong one. With a softmax they lose to "no object" or to another class: 0.05, 0.52 and 0.05."""
    segments = torch.zeros(64, 64, dtype=torch.int32)
    segments[:32, 32:], segments[32:, 32:] = 1, 2
    items = [make_item(torch.zeros(3, 64, 64, dtype=torch.uint8), segments, [0, 2, 1], i, "a.png") for i in range(3)]
    processor = FaiM2FImageProcessor(size={"height": 64, "width": 64}, cls_sigmoid=cls_sigmoid)
    subtasks = ("semantic",) if windows else ("semantic", "instance", "panoptic")
    evaluator = Evaluator(processor, dict(enumerate(LABELS)), subtasks, THINGS, batch_size=2, windows=windows)
    results = evaluator(FixedPredictions(), items)
    assert results["semantic"]["mIoU"] == pytest.approx(miou)
    if windows is None:
        assert results["instance"]["AP"] == pytest.approx(ap)
        assert results["panoptic"]["PQ"] == pytest.approx(pq)


def test_crowds_are_void_for_the_semantic_metric() -> None:
    segments = torch.tensor([[0, 1, -1], [2, 2, 1]], dtype=torch.int32)
    item = make_item(
        torch.zeros(3, 2, 3, dtype=torch.uint8), segments, [7, 5, 3], 0, "a.png", crowd=[False, True, False]
    )
    assert semantic_reference(item).tolist() == [[7, 255, 255], [3, 3, 255]]
    assert semantic_reference(item, void=-1).tolist() == [[7, -1, -1], [3, 3, -1]]
    assert item["classes"].tolist() == [7, 5, 3]


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
    counts[3] = 0  # never in the ground truth
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

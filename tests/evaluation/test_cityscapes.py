"""IoU and iIoU compared with cityscapesscripts' own program, run on files in the official layout."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cityscapesscripts.helpers.labels import labels as CITYSCAPES
from PIL import Image

from hf_faim2f.evaluation import CityscapesMetric
from tests.support.cityscapes_tree import official_scores

TRAINED = {label.trainId: label.id for label in CITYSCAPES if not label.ignoreInEval}


def scene(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A prediction in train ids and a map of instance ids, made of blocks, with ignored classes and groups."""
    rng = np.random.default_rng(seed)
    blocks = rng.choice([7, 8, 11, 21, 23, 26, 24, 25, 33, 1, 4, 29, 0], (6, 8))
    with_instances = np.isin(blocks, [24, 25, 26, 29, 33]) & (rng.random(blocks.shape) < 0.8)
    blocks = np.where(with_instances, blocks * 1000 + rng.integers(1, 30, blocks.shape), blocks)
    instances = np.kron(blocks, np.ones((5, 4), dtype=np.int64))
    classes = np.where(instances < 1000, instances, instances // 1000)
    train_id = {label.id: label.trainId for label in CITYSCAPES}
    right = np.vectorize(train_id.__getitem__)(classes)
    guess = np.where(rng.random(right.shape) < 0.5, right, rng.choice([*TRAINED, 255], right.shape))
    return np.where((guess >= 0) & (guess <= 18), guess, 255), instances


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cityscapes")
    for folder in ("gtFine/val/aachen", "results", "export"):
        (root / folder).mkdir(parents=True)
    for i in range(3):
        prediction, instances = scene(i)
        stem = f"aachen_{i:06d}_000019"
        classes = np.where(instances < 1000, instances, instances // 1000)
        truth = root / "gtFine/val/aachen"
        Image.fromarray(classes.astype(np.uint8)).save(truth / f"{stem}_gtFine_labelIds.png")
        Image.fromarray(instances.astype(np.uint16)).save(truth / f"{stem}_gtFine_instanceIds.png")
        ids = np.vectorize(lambda value: TRAINED.get(value, 0))(prediction)
        Image.fromarray(ids.astype(np.uint8)).save(root / "results" / f"{stem}.png")
    return root


@pytest.fixture(scope="module")
def official(tree: Path) -> tuple[dict[str, Any], str]:
    """The results that the program writes, and its standard output."""
    return official_scores(tree, tree / "results", tree / "export")


def assert_equal_to_program(result: dict[str, Any], written: dict[str, Any]) -> None:
    for name, key in {
        "IoU_class": "averageScoreClasses",
        "iIoU_class": "averageScoreInstClasses",
        "IoU_category": "averageScoreCategories",
        "iIoU_category": "averageScoreInstCategories",
    }.items():
        assert 0 < result[name] < 100
        assert result[name] == pytest.approx(100 * written[key], abs=1e-6), name
    for kind, keys in {
        "per_class": ("classScores", "classInstScores"),
        "per_category": ("categoryScores", "categoryInstScores"),
    }.items():
        for name, scores in result[kind].items():
            for measure, key in zip(("IoU", "iIoU"), keys, strict=True):
                expectation = 100 * written[key][name]
                assert scores[measure] == pytest.approx(expectation, abs=1e-6, nan_ok=True), (name, measure)
    defined = [name for name, value in written["classScores"].items() if not math.isnan(value)]
    assert defined and set(defined) <= set(result["per_class"])
    assert len(result["per_class"]) == 19 and len(result["per_category"]) == 7


def test_arrays_equal_the_program(official: tuple[dict[str, Any], str]) -> None:
    metric = CityscapesMetric()
    for i in range(3):
        prediction, instances = scene(i)
        metric.add_batch(predictions=[prediction], references=[instances])
    assert_equal_to_program(metric.compute(), official[0])


def test_files_equal_the_program(tree: Path, official: tuple[dict[str, Any], str]) -> None:
    truths = sorted(tree.glob("gtFine/val/*/*_labelIds.png"))
    predictions = sorted(tree.glob("results/*.png"))
    result = CityscapesMetric(train_ids=False).compute(predictions=predictions, references=[str(p) for p in truths])
    assert_equal_to_program(result, official[0])
    # the program prints three decimals
    printed = [line.split()[-2:] for line in official[1].splitlines() if line.startswith("Score Average")]
    ours = [["IoU_class", "iIoU_class"], ["IoU_category", "iIoU_category"]]
    assert [[f"{result[name] / 100:5.3f}" for name in names] for names in ours] == printed


def test_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    prediction, instances = scene(7)
    CityscapesMetric().compute(predictions=[prediction], references=[instances])
    assert capfd.readouterr() == ("", "")


def test_by_hand() -> None:
    """Two cars of 4 and 1 pixels, of which the small one is found: half of IoU's union, but most of iIoU's weight."""
    instances = np.array([[26001, 26001, 26001, 26001, 26002, 7]])
    prediction = np.array([[0, 0, 0, 0, 13, 0]])
    result = CityscapesMetric().compute(predictions=[prediction], references=[instances])
    assert result["per_class"]["car"]["IoU"] == pytest.approx(100 / 5)
    # each car has the same weight, whatever its size: 12794.02 pixels, the average; no false positives
    assert result["per_class"]["car"]["iIoU"] == pytest.approx(50)
    assert result["per_class"]["road"]["IoU"] == pytest.approx(100 / 5)
    assert math.isnan(result["per_class"]["road"]["iIoU"]) and math.isnan(result["per_class"]["sky"]["IoU"])


GROUND = np.full((2, 2), 7)


@pytest.mark.parametrize(
    ("prediction", "reference", "message"),
    [
        (np.zeros((1, 2), int), GROUND, "image 'aachen': the prediction is 1x2 .* but the reference is 2x2"),
        (np.full((2, 2), 19), GROUND, "image 'aachen': the prediction has the value 19, but may have the train ids"),
        (np.full((2, 2), -1), GROUND, "has the value -1"),
        (np.full((2, 2), 999), GROUND, "has the value 999"),
        (
            np.zeros((2, 2), int),
            GROUND + 100,
            "the reference has the instance id 107, which Cityscapes does not define",
        ),
        (np.zeros((2, 2), int), GROUND * 1000, "the reference has the instance id 7000"),
        (
            np.zeros((2, 2), int),
            "missing_gtFine_labelIds.png",
            "the reference missing_gtFine_instanceIds.png cannot be",
        ),
        ("missing.png", GROUND, "the prediction missing.png cannot be read"),
    ],
)
def test_mistakes_are_named_and_nothing_is_counted(prediction: Any, reference: Any, message: str) -> None:
    metric = CityscapesMetric()
    with pytest.raises(ValueError, match=message):
        metric.add(prediction=prediction, reference=reference, image_id="aachen")
    assert len(metric) == 0 and not metric.state_dict()["counts"]["confusion"].any()


def test_own_ids_are_checked_too() -> None:
    with pytest.raises(ValueError, match="has the value 34, but may have Cityscapes' ids 0 to 33"):
        CityscapesMetric(train_ids=False).add(prediction=np.full((2, 2), 34), reference=GROUND)


def test_complaints_of_cityscapesscripts_become_errors(tmp_path: Path) -> None:
    """The library calls sys.exit; our error has its message."""
    Image.fromarray(np.full((3, 2), 7, dtype=np.uint8)).save(tmp_path / "a_labelIds.png")  # the sizes differ
    Image.fromarray(GROUND.astype(np.uint16)).save(tmp_path / "a_instanceIds.png")
    with pytest.raises(ValueError, match=r"image 'aachen': cityscapesscripts says: ERROR: Image heights .* not equal"):
        CityscapesMetric().add(
            prediction=np.zeros((2, 2), int), reference=tmp_path / "a_labelIds.png", image_id="aachen"
        )
    with pytest.raises(ValueError, match=r"is not a \*_labelIds.png"):
        CityscapesMetric().add(prediction=np.zeros((2, 2), int), reference=tmp_path / "a_instanceIds.png")

"""Class weights: balanced ones compared with scikit-learn's, named ones, and rejected ones."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from hf_faim2f.data.counts import ClassCounts
from hf_faim2f.errors import DatasetError, SettingsError
from hf_faim2f.training.recipe import balanced_weights, read_class_weights, weight_words

LABELS = ("sky", "car: red", "tree")


def counts(*segments: int, total: int = 3) -> ClassCounts:
    none = (0,) * len(segments)
    return ClassCounts(LABELS, "semantic", total, 3, 0, none, segments, 0, 0, {0: 1}, "a.png")


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    segments = (7, 2, 5)
    drawn = np.repeat(np.arange(3), segments)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=drawn)
    assert balanced_weights(counts(*segments)) == pytest.approx(expected.tolist())
    assert sum(n * w for n, w in zip(segments, expected, strict=True)) == pytest.approx(sum(segments))


def test_balanced_weights_are_bounded() -> None:
    assert balanced_weights(counts(10_000, 1, 9_999)) == [pytest.approx(2 / 3), 10.0, pytest.approx(20_000 / 29_997)]
    assert balanced_weights(counts(1, 1, 10_000))[:2] == [10.0, 10.0]


def test_a_class_that_never_occurs_is_refused_unless_it_may_just_be_rare() -> None:
    with pytest.raises(DatasetError, match="every class in the training data, but 'car: red' is in no image"):
        balanced_weights(counts(4, 0, 4))
    assert balanced_weights(counts(4, 0, 4, total=900)) == [pytest.approx(2 / 3), 10.0, pytest.approx(2 / 3)]


def test_named_weights_and_a_file_of_them(tmp_path: Path) -> None:
    assert read_class_weights(weight_words(["tree:2", "car: red : 0.5"]), LABELS) == [1.0, 0.5, 2.0]
    path = tmp_path / "weights.txt"
    path.write_text("# rare ones\r\n\r\ntree: 2\r\ncar: red: 5e-1\r\n", encoding="utf-8-sig")
    assert weight_words([str(path)]) == ("tree: 2", "car: red: 5e-1")
    assert read_class_weights(weight_words([str(path)]), LABELS) == [1.0, 0.5, 2.0]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["treee: 2"], "names 'treee', which is not a class of the data. Did you mean 'tree'"),
        (["tree: 2", "tree: 3"], "names 'tree' twice"),
        (["tree: 0"], "the weight of 'tree' must be a number above 0, not '0'"),
        (["tree: nan"], "must be a number above 0, not 'nan'"),
        (["tree: two"], "must be a number above 0, not 'two'"),
        (["inverse"], "class_weights must be balanced, NAME:WEIGHT,... or a file of such lines, not 'inverse'"),
    ],
)
def test_wrong_weights_are_refused(words: list[str], expected: str) -> None:
    with pytest.raises(SettingsError, match=expected):
        read_class_weights(weight_words(words), LABELS)

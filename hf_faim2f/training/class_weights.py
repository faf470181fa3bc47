"""Class weights in the classification loss: balanced by the data, or given for each class."""

import math
from collections.abc import Sequence
from pathlib import Path

from ..data.counts import ClassCounts
from ..errors import DatasetError, SettingsError, nearest_name
from ..files import read_text

BALANCED = "balanced"
# Bounds of balanced weights; otherwise a class with few segments would dominate the loss.
LEAST, MOST = 0.1, 10.0


def balanced_weights(counts: ClassCounts) -> list[float]:
    """Weights by which every class has the same share of the loss: N / (C n) for a class with n of N segments.

    This is scikit-learn's "balanced" (King and Zeng, "Logistic Regression in Rare Events Data", 2001). It counts
    segments, not pixels, because the loss classifies one query for each segment. Without bounds, the mean over the
    segments is 1. Weights are limited to 0.1..10. A class without segments in a sample of the data gets 10.

    Args:
        counts: counts of the training data.

    Raises:
        DatasetError: a class does not occur in the data.
    """
    if counts.absent and not counts.is_sample:
        raise DatasetError(
            f"Balanced class weights need every class in the training data, but {counts.absent[0]!r} is in no image: "
            "remove it from the labels, or name the weights (--class-weights NAME:WEIGHT,...)."
        )
    total = sum(counts.segments)
    return [
        min(MOST, max(LEAST, total / (len(counts.segments) * number))) if number else MOST for number in counts.segments
    ]


def weight_words(words: Sequence[str]) -> tuple[str, ...]:
    """The weights that the user gave, as "NAME: WEIGHT".

    Args:
        words: of this form; or one file with such lines, in which empty lines and those that start with # are skipped.

    Raises:
        SettingsError: a word is of another form, or the file is not text.
        OSError: the file cannot be read.
    """
    if len(words) == 1 and Path(words[0]).is_file():
        try:
            lines = [line.strip() for line in read_text(Path(words[0])).split("\n")]
        except ValueError as error:
            raise SettingsError(f"{words[0]}: {error}.") from error
        words = [line for line in lines if line and not line.startswith("#")]
    for word in words:
        if ":" not in word:
            raise SettingsError(
                f"class_weights must be {BALANCED}, NAME:WEIGHT,... or a file of such lines, not {word!r}."
            )
    return tuple(": ".join(part.strip() for part in word.rsplit(":", 1)) for word in words)


def read_class_weights(words: Sequence[str], labels: Sequence[str]) -> list[float]:
    """The weight of each class: 1 if it is not named.

    Args:
        words: as `weight_words` returns them.
        labels: the class names in the order of their ids.

    Raises:
        SettingsError: a name is unknown or repeated, or a weight is not a number above 0.
    """
    weights: dict[str, float] = {}
    for word in words:
        name, _, number = word.rpartition(": ")
        if name not in labels:
            nearest = nearest_name(name, labels)
            hint = f" Did you mean {nearest!r}?" if nearest else ""
            raise SettingsError(f"class_weights names {name!r}, which is not a class of the data.{hint}")
        if name in weights:
            raise SettingsError(f"class_weights names {name!r} twice.")
        try:
            weights[name] = float(number)
        except ValueError:
            weights[name] = math.nan
        if not 0 < weights[name] < math.inf:
            raise SettingsError(f"class_weights: the weight of {name!r} must be a number above 0, not {number!r}.")
    return [weights.get(label, 1.0) for label in labels]


__all__ = ["BALANCED", "balanced_weights", "read_class_weights", "weight_words"]

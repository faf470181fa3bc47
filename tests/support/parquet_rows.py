"""For tests of bulk inference: a run's rows, and their comparison with the predictor's results."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from pycocotools import mask as coco_mask

from hf_faim2f.runtime import Prediction


def rows_of(out: Path) -> dict[str, dict[str, Any]]:
    """The rows of all parts by key, read with a plain reader; asserts that each key occurs once."""
    rows = pq.read_table(out).to_pylist()
    by_key = {row["key"]: row for row in rows}
    assert len(by_key) == len(rows)
    return by_key


def check_rows(rows: Sequence[dict[str, Any]], expected: Sequence[Prediction]) -> None:
    """Asserts that rows have the expected segments; scores may differ by rounding."""
    assert len(rows) == len(expected)
    for row, prediction in zip(rows, expected, strict=True):
        assert (row["height"], row["width"]) == prediction.size and row["error"] is None
        assert row["subtask"] == prediction.subtask
        theirs = prediction.to_json()
        for name in ("class_id", "label", "box", "area", "segmentation"):
            assert [one[name] for one in row["segments"]] == [one[name] for one in theirs]
        for ours, other in zip(row["segments"], theirs, strict=True):
            assert ours.keys() == other.keys()
            assert ours["score"] == other["score"] or abs(ours["score"] - other["score"]) < 1e-5
            assert coco_mask.area(ours["segmentation"]) == ours["area"] > 0

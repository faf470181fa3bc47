"""Readers of untrusted bytes keep their contract on the corpus, and on inputs that atheris derives from it in a second
each.

To fuzz for longer: python -m tests.fuzz TARGET SECONDS
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .targets import TARGETS, prepare

CORPUS = Path(__file__).parent / "corpus"
SECONDS = 1
# A file of each target that is read whole; if all were refused at once, fuzzing would explore nothing.
ACCEPTED = {
    "pickle": "ordered",
    "coco_instance": "whole.json",
    "coco_panoptic": "whole.json",
    "yolo_labels": "polygons.txt",
    "yolo_yaml": "dict.yaml",
    "labelme": "shapes.json",
    "supervisely": "objects.json",
    "palette": "names.txt",
    "run_lengths": "counts",
    "compressed_run_lengths": "eye",
    "detectron2_yaml": "whole.yaml",
    "settings_yaml": "train.yaml",
    "parquet": "plain",
    "onnx": "logits",
    "upload": "png",
}


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_kept_corpus(path: Path, tmp_path: Path) -> None:
    """The whole file, and the file truncated at several places."""
    prepare(tmp_path)
    data = path.read_bytes()
    for cut in range(9):
        TARGETS[path.parent.name](data[: len(data) - cut * len(data) // 8], tmp_path)


def test_every_target_has_a_corpus() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS) == set(ACCEPTED)


@pytest.mark.parametrize("name", TARGETS)
def test_a_whole_file_is_read(name: str, tmp_path: Path) -> None:
    prepare(tmp_path)
    assert TARGETS[name].read((CORPUS / name / ACCEPTED[name]).read_bytes(), tmp_path) is not None


@pytest.mark.large
@pytest.mark.slow  # imports everything again, instrumented
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="needs atheris (the extra `fuzz`)")
def test_a_few_seconds_of_fuzzing(tmp_path: Path) -> None:
    """All targets in turn, in one process that imports once."""
    command = [sys.executable, "-m", "tests.fuzz", "all", str(SECONDS), str(tmp_path / "found")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads do not survive a fork
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert {path.name for path in (tmp_path / "found").iterdir()} == set(TARGETS)

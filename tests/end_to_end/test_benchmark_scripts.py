"""Benchmark scripts for machines that are not available here, tested as far as possible."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.reference_models import MODELS, RELATIVE_ERROR

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


@pytest.mark.large
@pytest.mark.slow  # starts a process that runs a reference model
@pytest.mark.newest_only
def test_the_script_for_a_gpu_runs_on_a_cpu_at_small_sizes(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    sections = ("exactness", "training", "latency")  # tests/export/test_aotinductor.py compiles the package
    done = run(BENCHMARKS / "gpu.py", out, "--tiny", "--device", "cpu", "--sections", *sections)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    exact = found["exactness"]
    assert all(error <= RELATIVE_ERROR for error in exact[MODELS[0]]["fp32"].values())
    assert all(0 < error < 0.2 for error in exact[MODELS[0]]["bf16"].values())
    first, second = exact["post_processing"].pop("detections")
    assert exact["post_processing"] == {"label_map": 0, "panoptic": 0} and first == second > 0
    losses = found["training"]["loss"]
    assert losses["cpu"] == pytest.approx(losses["device"], rel=1e-4) and losses["cpu"] > 0
    assert found["training"]["bf16"]["milliseconds"] > 0
    assert set(found["latency"]["s"]) == {"batch 1, plain", "batch 2, plain"}
    assert all(isinstance(value, float) for value in found["latency"]["s"].values())

    # After the time limit no section starts, and the document records that.
    done = run(BENCHMARKS / "gpu.py", out, "--tiny", "--device", "cpu", "--minutes", "0", "--sections", "latency")
    assert done.returncode == 0 and json.loads(out.read_text())["latency"] == {"left_out": "after 0 minutes"}


@pytest.mark.slow  # starts a process
@pytest.mark.newest_only
def test_without_focoos_code_its_script_ends_with_a_sentence(tmp_path: Path) -> None:
    done = run(BENCHMARKS / "focoos.py", "1", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if "Focoos" in line]
    assert line.startswith("Focoos's own code cannot be imported (") and "on PYTHONPATH" in line


@pytest.mark.large
@pytest.mark.slow  # starts processes
@pytest.mark.newest_only
def test_peers_measures_what_is_missing_and_names_what_is_not_installed(tmp_path: Path) -> None:
    out = tmp_path / "peers.json"
    names = ["fai-m2f-s-ade", "SegFormer-B0"]
    options = ("--tiny", "--runs", 1, "--threads", 1, "--out", out, "--only")
    done = run(BENCHMARKS / "peers.py", *options, *names)
    assert done.returncode == 0, done.stderr
    measured = json.loads(out.read_text())
    assert list(measured) == names
    for figures in measured.values():
        assert all(figures[key]["median"] > 0 for key in ("seconds", "product", "reference"))
    table = [line.split("|")[1:5] for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [" SegFormer-B0 ", " ADE20K ", " 512x683 ", " 37.4 mIoU "] in table and len(table) == 4

    done = run(BENCHMARKS / "peers.py", *options, *names, "RF-DETR-Seg-N")
    assert done.returncode == 0 and json.loads(out.read_text()) == measured
    if importlib.util.find_spec("rfdetr") is None:
        assert "RF-DETR-Seg-N is left out: rfdetr is not installed here." in done.stdout
    done = run(BENCHMARKS / "peers.py", "--only", "SegFormer-B9")
    assert done.returncode == 2 and "no row is called 'SegFormer-B9'" in done.stderr

    done = run(BENCHMARKS / "peers_figure.py", "--results", out, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Drawn: peers_ade20k.svg\n" and "<svg" in (tmp_path / "peers_ade20k.svg").read_text()

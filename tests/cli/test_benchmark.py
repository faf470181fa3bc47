"""`faim2f benchmark`: it times the predictor's own steps, reports exact figures, and writes its files atomically."""

import argparse
import functools
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import EvalResult
from PIL import Image

from hf_faim2f import FaiM2FImageProcessor, load_config
from hf_faim2f.benchmarking import comparison
from hf_faim2f.benchmarking import latency as latency_module
from hf_faim2f.benchmarking import memory as memory_module
from hf_faim2f.benchmarking.comparison import figure_of, generated_pictures
from hf_faim2f.benchmarking.latency import (
    END_TO_END,
    STEPS,
    Contender,
    Latency,
    describe_machine,
    measure_in_turn,
    open_at_size,
    own_size,
)
from hf_faim2f.benchmarking.memory import PeakMemory, measure_memory
from hf_faim2f.cli import benchmark as command
from hf_faim2f.cli import main
from hf_faim2f.export.onnx import export_onnx
from hf_faim2f.family import FAMILY
from hf_faim2f.hub.card import model_card
from hf_faim2f.hub.card_facts import Provenance
from hf_faim2f.hub.results import known_metric, update_card
from hf_faim2f.runtime import Predictor, PredictorError
from tests.support.lively_model import check_same, photographs, save_model
from tests.support.reference_models import small_model
from tests.support.shared import exported

SIZE = (64, 96)
GREED = 300_000_000  # bytes per image, far above the differences between two runs
FILES = {"results.json", "table.md", "plot.png"}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("models") / "tiny")
    results = [
        EvalResult("image-segmentation", "photos", "Photographs", metric, value, dataset_split="test",
                   metric_name=name)
        for metric, value, name in (("ap50", 77.0, "instance AP50"), ("map", 51.5, "instance AP"),
                                    ("mean_iou", 62.25, "semantic mIoU"))
    ]  # fmt: skip
    update_card(folder, results)
    return folder


@pytest.fixture(scope="module")
def graph_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph with batch size 2 and a fixed image size."""
    folder = tmp_path_factory.mktemp("graphs") / "graph"
    export_onnx(model_folder, folder, size=SIZE, batch=2, verify=False)
    return folder


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """Replaces the measurement of memory with invented values; returns the requested measurements."""
    asked: list[tuple[Any, dict[str, Any]]] = []

    def invented(opening: Any, images: Any, subtask: Any, batch_sizes: Any, **settings: Any) -> PeakMemory:
        asked.append(((opening, images, subtask, batch_sizes), settings))
        return PeakMemory("invented", 10, 20_000_000, {size: 15_000_000 * size for size in batch_sizes})

    monkeypatch.setattr(comparison, "measure_memory", invented)
    return asked


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def benchmark(*arguments: object) -> int:
    return main(["benchmark", *map(str, arguments)])


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def ticking(step: float = 1.0) -> Callable[[], float]:
    """A clock that advances by one step whenever it is read."""
    return functools.partial(next, itertools.count(0.0, step))


def test_results_say_what_was_measured(
    model_folder: Path, graph_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    flags = ["--out", out, "--runs", 3, "--warm-up", 2, "--batch-sizes", 2, "--device", "cpu", "--threads", 1]
    assert benchmark(model_folder, graph_folder, *flags, "--size", "64x96") == 0
    assert files_of(out) == FILES and files_of(out.parent) == {"out"}
    document = json.loads((out / "results.json").read_text())
    assert document["runs"] == 3 and document["warm_up"] == 2 and document["device_asked_for"] == "cpu"
    machine = document["machine"]
    assert (
        machine["threads"] == 1 and machine["processor"] and machine["cores"] >= 1 and machine["date"].startswith("2")
    )
    assert machine["versions"]["torch"] == torch.__version__ and "onnxruntime" in machine["versions"]
    results = document["results"]
    assert [(one["name"], one["runtime"]) for one in results] == [("tiny", "torch"), ("graph", "onnxruntime")]
    printed = capsys.readouterr().out
    table = (out / "table.md").read_text()
    assert table in printed and "p99 of 3 runs is the longest" in table and "median / p99 of 3 runs after 2" in table
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    head, rows = rows[0], rows[2:]
    assert len(rows) == 2 and all(len(row) == len(head) for row in rows)
    for one, row in zip(results, rows, strict=True):
        assert one["network_sizes"] == [list(SIZE)] and one["subtask"] == "instance" and one["outputs_on"] == "cpu"
        assert "2 generated images of 64x96" in one["images"]
        (batch,) = one["batches"]
        assert batch["batch"] == 2 and batch["runs"] == 3 and batch["network_timed_by"] == "the clock"
        seconds = batch["seconds"]
        assert list(seconds) == [*STEPS, END_TO_END]
        # The steps add up to the total, in every run.
        parts = np.sum([seconds[step]["all"] for step in STEPS], axis=0)
        assert np.allclose(parts, seconds[END_TO_END]["all"], rtol=0, atol=1e-6)
        for name, entry in seconds.items():
            assert len(entry["all"]) == 3 and min(entry["all"]) > 0
            assert entry["median"] == pytest.approx(np.median(entry["all"])) and entry["p99"] == max(entry["all"])
            assert batch["images_per_second"][name] == pytest.approx(2 / np.mean(entry["all"]))
        assert batch["peak_memory_bytes"] >= batch["running_memory_bytes"] >= 0 and batch["gpu_memory_bytes"] is None
        assert one["memory"]["loading_bytes"] > 0 and one["memory"]["before_bytes"] > 10_000_000
        cells = dict(zip(head, row, strict=True))
        assert cells["model"] == one["name"] and cells["batch"] == "2" and cells["input"] == "64x96"
        assert cells["end to end"] == " / ".join(f"{1000 * seconds[END_TO_END][key]:.1f}" for key in ("median", "p99"))
        assert cells["network alone"] == f"{batch['images_per_second']['network']:.1f}"
        assert cells["peak MB"] == f"{batch['peak_memory_bytes'] / 1e6:.0f}"
    assert "graph in onnxruntime: no metric is known" in table
    # The model's card has a metric for the model's own size, which differs from the benchmark's.
    assert results[0]["metric"] is None
    assert "'s metric is left out: it is valid for images resized to a shorter side of 64" in printed
    with Image.open(out / "plot.png") as plot:
        assert plot.format == "PNG" and min(plot.size) > 300
        assert len(plot.convert("RGB").getcolors(1 << 24)) > 20


@pytest.mark.parametrize("subtask", ["semantic", "instance", "panoptic"])
def test_what_is_timed_is_the_predictor(subtask: str, model_folder: Path) -> None:
    predictor = Predictor.from_pretrained(model_folder, device="cpu")
    images = [photographs()[index] for index in (0, 2, 4)]  # of one size
    contender = Contender(predictor, images, subtask)
    assert contender.sizes == [tuple(predictor._prepare((0, images[0])).values.shape[1:])]
    expected = predictor(images, subtask, batch_size=1)
    assert any(prediction.segments for prediction in expected)
    for turn, places in ((0, (0, 1)), (1, (2, 0)), (2, (1, 2)), (3, (0, 1))):
        seconds, predictions = contender.run(turn, 2)
        check_same(predictions, [expected[place] for place in places])
        assert sum(seconds[step] for step in STEPS) == pytest.approx(seconds[END_TO_END], abs=1e-9)
    assert contender.gpu is None
    assert Contender(predictor, images).subtask == "instance"  # the task that it was trained for


def test_a_size_is_that_of_the_network_and_changes_nothing_else(model_folder: Path, graph_folder: Path) -> None:
    resized = open_at_size(model_folder, "torch", "cpu", SIZE)
    assert own_size(resized.network.processor) == SIZE
    assert own_size(open_at_size(model_folder, "torch", "cpu").network.processor) == (64, 64)
    images = photographs()[:2]
    assert Contender(resized, images).sizes == [SIZE]
    before = Predictor.from_pretrained(model_folder).network.processor.to_dict()
    after = resized.network.processor.to_dict()
    assert {key for key in before if before[key] != after[key]} == {"size"}
    graph = open_at_size(graph_folder, "onnxruntime", "cpu", SIZE)
    check_same(graph(images, "semantic"), resized(images, "semantic"), stray=0.01)


def test_every_job_runs_in_turn_and_only_runs_after_the_warm_up_count(model_folder: Path) -> None:
    predictor = Predictor.from_pretrained(model_folder, device="cpu")
    events: list[tuple[str, int]] = []

    def watched(name: str) -> Contender:
        def run(batch: torch.Tensor) -> Any:
            events.append((name, len(batch)))
            return predictor.network.run(batch)

        return Contender(Predictor(replace(predictor.network, run=run)), photographs()[:1])

    first, second = watched("first"), watched("second")
    jobs = [(first, 1), (first, 3), (second, 1)]
    ticks: list[int] = []
    latencies = measure_in_turn(jobs, 4, 2, ticking(), lambda: ticks.append(len(events)))
    assert events == [("first", 1), ("first", 3), ("second", 1)] * 6 and ticks == list(range(1, 19))
    for latency, (_, batch_size) in zip(latencies, jobs, strict=True):
        assert latency.runs == 4 and latency.batch_size == batch_size
        # The clock is read before the first step and after each of the three.
        assert latency.seconds == {**{step: [1.0] * 4 for step in STEPS}, END_TO_END: [3.0] * 4}
        assert latency.images_per_second() == batch_size / 3 and latency.images_per_second("network") == batch_size
    for runs, warm_up in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="must be at least 1, not 0"):
            measure_in_turn(jobs, runs, warm_up)


@pytest.mark.parametrize("count", [1, 2, 3, 30, 99, 100, 101, 250])
def test_percentiles_are_numpys(count: int) -> None:
    values = np.random.default_rng(count).exponential(size=count).tolist()
    latency = Latency(4, dict.fromkeys((*STEPS, END_TO_END), values))
    assert latency.median() == pytest.approx(np.median(values))
    assert latency.p99() == np.percentile(values, 99, method="inverted_cdf")
    assert (latency.p99() == max(values)) == (count < 100)
    assert latency.images_per_second() == pytest.approx(4 * count / sum(values))


def test_on_a_gpu_events_time_the_network_and_every_step_waits(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a fake GPU; checks the order of operations."""
    events: list[str] = []
    predictor = Predictor.from_pretrained(model_folder, device="cpu")

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            events.append("record")

        def elapsed_time(self, other: Any) -> float:
            events.append("elapsed")
            return 250.0  # milliseconds

    class Chosen:
        def __init__(self, gpu: Any) -> None:
            assert gpu == torch.device("cuda:1")

        def __enter__(self) -> None: ...

        def __exit__(self, *_: Any) -> None: ...

    def run(batch: torch.Tensor) -> Any:
        events.append("run")
        return predictor.network.run(batch)

    def clock() -> float:
        events.append("clock")
        return float(len(events))

    monkeypatch.setattr(latency_module.torch.cuda, "Event", Event)
    monkeypatch.setattr(latency_module.torch.cuda, "device", Chosen)
    monkeypatch.setattr(latency_module.torch.cuda, "synchronize", lambda gpu: events.append("wait"))
    contender = Contender(Predictor(replace(predictor.network, run=run)), photographs()[:1])
    contender.gpu = torch.device("cuda:1")
    seconds, _ = contender.run(0, 1, clock)
    assert events == ["wait", "clock", "clock", "record", "run", "record", "wait", "elapsed", "clock", "wait", "clock"]
    assert seconds["network"] == 0.25 and seconds[END_TO_END] == 9.0
    assert contender.gpu is None  # the outputs were not on a GPU here


def test_memory_is_measured_on_the_largest_images(model_folder: Path) -> None:
    """The most pixels at the network, which keeps the aspect ratio, are those of the panorama."""
    sizes = [(64, 64), (500, 400), (64, 256), (80, 64)]
    images = [Image.new("RGB", size) for size in sizes]
    contender = Contender(Predictor.from_pretrained(model_folder, device="cpu"), images)
    assert [image.size for image in contender.largest(1)] == [(64, 256), (500, 400)]
    assert [image.size for image in contender.largest(3)] == [(64, 256), (500, 400), (80, 64)]
    assert len(contender.largest(9)) == 4


def open_greedy(folder: Path) -> Predictor:
    """A predictor that allocates `GREED` bytes more per image while its network runs."""
    predictor = Predictor.from_pretrained(folder, device="cpu")

    def run(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        torch.ones(len(batch) * GREED, dtype=torch.uint8)
        return predictor.network.run(batch)

    return Predictor(replace(predictor.network, run=run))


def open_nothing() -> Predictor:
    raise PredictorError("There is\nnothing to open.")


def open_and_die() -> Predictor:
    os._exit(9)


@pytest.mark.large
@pytest.mark.skipif(not memory_module.STATUS.exists(), reason="only Linux tells a process's peak exactly")
def test_memory_is_what_the_run_takes(model_folder: Path) -> None:
    images = photographs()[:1] * 2
    plain: Any
    greedy: Any
    plain, greedy = (
        measure_memory(functools.partial(opening, model_folder), images, "semantic", [2, 1],
                       modules=["hf_faim2f.runtime.backends.torch"], threads=1)
        for opening in (Predictor.from_pretrained, open_greedy)
    )  # fmt: skip
    assert plain.how == greedy.how == memory_module.RESIDENT and list(plain.running) == [1, 2]
    assert plain.gpu_allocated == plain.gpu_taken == {}
    assert 0 <= plain.loading < GREED > plain.running[2] and greedy.loading < GREED
    for batch_size in (1, 2):
        more = greedy.running[batch_size] - plain.running[batch_size]
        assert 0.9 < more / (batch_size * GREED) < 1.2


@pytest.mark.large
def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(PredictorError, match=r"^There is nothing to open\.$"):
        measure_memory(open_nothing, photographs()[:1], None, [1])
    with pytest.raises(PredictorError, match=r"ended without a result \(status 9\)"):
        measure_memory(open_and_die, photographs()[:1], None, [1])


def test_memory_of_a_gpu_is_asked_for_at_each_batch(monkeypatch: pytest.MonkeyPatch, model_folder: Path) -> None:
    """With a fake GPU; checks which values are read when."""
    played: Any = memory_module.torch.cuda
    events: list[str] = []
    free = iter([1000, 700, 500])

    def asked(gpu: str) -> int:
        events.append("asked")
        return 10 * len(events)

    monkeypatch.setattr(memory_module, "_free", lambda gpu: next(free))
    monkeypatch.setattr(played, "reset_peak_memory_stats", lambda gpu: events.append(f"reset {gpu}"))
    monkeypatch.setattr(played, "max_memory_allocated", asked)
    opening = functools.partial(Predictor.from_pretrained, model_folder, "torch", "cpu")
    memory = memory_module._measure(opening, photographs()[:1], None, [1, 2], [], "cuda:1", None)
    assert events == ["reset cuda:1", "asked", "reset cuda:1", "asked"]
    assert memory.gpu_allocated == {1: 20, 2: 40} and memory.gpu_taken == {1: 300, 2: 500}


def test_other_systems_tell_less(monkeypatch: pytest.MonkeyPatch, model_folder: Path, tmp_path: Path) -> None:
    opening = functools.partial(Predictor.from_pretrained, model_folder, "torch", "cpu")
    arguments: Any = (opening, photographs()[:1], None, [1], [], None, None)
    monkeypatch.setattr(memory_module, "CLEAR", tmp_path / "nowhere" / "clear_refs")
    assert memory_module._measure(*arguments).how == memory_module.NO_RESET
    monkeypatch.setattr(memory_module, "STATUS", tmp_path / "status")
    measured: Any = memory_module._measure(*arguments)
    assert measured.how == memory_module.GROWTH and measured.running[1] >= 0 and measured.before > 10_000_000

    def no_module(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(memory_module, "import_module", no_module)
    measured = memory_module._measure(*arguments)
    assert measured.how == memory_module.UNKNOWN
    assert measured.before is measured.loading is measured.running[1] is None


def test_metrics_are_the_cards_or_the_familys(model_folder: Path, tmp_path: Path) -> None:
    metric = known_metric(str(model_folder), "instance", 5)
    assert metric is not None and metric.source == f"the card of {model_folder}"
    assert (metric.name, metric.value, metric.dataset) == ("instance AP", 51.5, "Photographs (test)")
    assert known_metric(str(model_folder), "semantic", 5).value == 62.25
    assert known_metric(str(model_folder), "panoptic", 5) is None
    for name, preset in FAMILY.items():
        folder = tmp_path / name
        folder.mkdir()
        task = preset.config["postprocessing_type"]
        # The name of a folder, or of its card, tells nothing of the weights.
        assert known_metric(str(folder), task, len(preset.labels)) is None
        (folder / "README.md").write_text(model_card(name, load_config(name)))
        assert known_metric(str(folder), task, len(preset.labels)) is None
        (folder / "README.md").write_text(
            model_card(name, load_config(name), Provenance("w", "0" * 64, published=True))
        )
        metric = known_metric(str(folder), task, len(preset.labels))
        assert metric.value == preset.published[{"semantic": "mIoU", "instance": "segm/AP"}[task]]
        assert metric.dataset == preset.published["dataset"] and name in metric.source
        assert known_metric(str(folder), task, 5) is None  # trained for another number of classes
        assert known_metric(str(folder), "panoptic", len(preset.labels)) is None
        assert known_metric(name, task, len(preset.labels), folder) == metric
        assert known_metric("me/model", task, len(preset.labels), folder) == metric  # the same card on the Hub
        (folder / "README.md").write_text(model_card(name, load_config(name)))
        assert known_metric(f"me/{name}", task, len(preset.labels), folder) is None
    (folder / "README.md").write_text("---\nmodel-index:\n- name: flowers\n  results: []\n---\n")
    assert known_metric(str(folder), task, len(preset.labels)) is None
    (folder / "README.md").write_text("---\nmodel-index: 3\n---\n")
    assert known_metric(str(tmp_path), "semantic", 150) is None


def points(axis: Any, kind: str) -> list[tuple[float, float]]:
    return [
        (float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in axis.get_lines() if line.get_gid() == kind
    ]


def test_the_plot_has_a_point_for_each_model_with_a_metric(
    no_processes: list[Any], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model_folder, tmp_path / "other" / "tiny")
    shutil.copytree(model_folder, tmp_path / "unknown")
    (tmp_path / "unknown" / "README.md").unlink()
    models = [model_folder, tmp_path / "other" / "tiny", tmp_path / "unknown"]
    flags = ["--runs", 2, "--warm-up", 1, "--batch-sizes", 1, 3, 1, "--device", "cpu"]
    assert benchmark(*models, "--out", tmp_path / "out", *flags) == 0
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [one["name"] for one in document["results"]] == [f"{model_folder.parent.name}/tiny", "other/tiny", "unknown"]
    assert [[batch["batch"] for batch in one["batches"]] for one in document["results"]] == [[1, 3]] * 3
    assert [[batch["peak_memory_bytes"] for batch in one["batches"]] for one in document["results"]] == (
        [[20_000_000, 45_000_000]] * 3
    )
    assert [asked[3] for asked, _ in no_processes] == [(1, 3)] * 3
    figure = figure_of(document)
    quality, times = figure.axes
    for kind in (END_TO_END, "network"):
        expected = [(one["batches"][0]["images_per_second"][kind], 51.5) for one in document["results"][:2]]
        assert points(quality, kind) == expected
    assert {text.get_text() for text in quality.texts} == {
        f"{model_folder.parent.name}/tiny (torch)",
        "other/tiny (torch)",
    }
    assert "frames per second" in quality.get_xlabel() and quality.get_ylabel() == "instance AP, percent"
    assert "Photographs (test)" in quality.get_title() and "milliseconds" in times.get_xlabel()
    assert len(times.patches) == 3 * len(STEPS)
    for container, step in zip(times.containers, STEPS, strict=True):
        widths = [bar.get_width() / 1000 for bar in container]
        assert widths == pytest.approx([one["batches"][0]["seconds"][step]["median"] for one in document["results"]])
    assert "unknown (torch)" in figure.get_supxlabel() and "tiny" not in figure.get_supxlabel()
    # Without a metric, only the times are drawn.
    for one in document["results"]:
        one["metric"] = None
    (times,) = figure_of(document).axes
    assert len(times.patches) == 9
    # Exports get the metric of the model that they were made from.
    flags += ["--metrics-from", model_folder, "--subtask", "semantic"]
    assert benchmark(models[2], "--out", tmp_path / "more", *flags) == 0
    document = json.loads((tmp_path / "more" / "results.json").read_text())
    assert document["results"][0]["metric"]["value"] == 62.25
    assert document["results"][0]["metric"]["source"] == f"the card of {model_folder}"
    # But not if they are quantized, or were exported for another size than the one that it was measured at.
    (models[2] / "quantization.json").write_text("{}")
    capsys.readouterr()
    assert benchmark(models[2], "--out", tmp_path / "quantized", *flags) == 0
    assert json.loads((tmp_path / "quantized" / "results.json").read_text())["results"][0]["metric"] is None
    note = f"The metric of {model_folder} is left out for {models[2]}, which is quantized and so has another."
    assert note in capsys.readouterr().out
    (models[2] / "quantization.json").unlink()
    options = argparse.Namespace(metrics_from=str(model_folder))
    contender = Contender(Predictor.from_pretrained(models[2], device="cpu"), photographs()[:1], "semantic")
    for precision, value in (("int8", None), ("bf16", 62.25)):
        (models[2] / "engine.json").write_text(json.dumps({"precision": precision}))
        notes: list[str] = []
        metric = command._metric(options, str(models[2]), "tensorrt", contender, notes)
        assert (metric and metric.value) == value and len(notes) == 1
        assert command._metric(options, str(models[2]), "torch", contender, []).value == 62.25
    assert notes == [f"The metric of {model_folder} is that of float32, and {models[2]} computes in bf16."]
    (models[2] / "engine.json").unlink()
    processor = FaiM2FImageProcessor.from_pretrained(models[2])
    FaiM2FImageProcessor.from_dict(processor.to_dict(), size={"height": 64, "width": 96}).save_pretrained(models[2])
    capsys.readouterr()
    assert benchmark(models[2], "--out", tmp_path / "resized", *flags) == 0
    assert json.loads((tmp_path / "resized" / "results.json").read_text())["results"][0]["metric"] is None
    printed = capsys.readouterr().out
    note = f"The metric of {model_folder} for {models[2]} is left out: it is valid for images resized to a shorter side"
    assert f"{note} of 64" in printed and ", and here they are resized to 64x96." in printed
    # Squares keep a square's aspect ratio, but not that of other images.
    assert benchmark(models[2], "--out", tmp_path / "square", *flags, "--size", "64x64") == 0
    assert json.loads((tmp_path / "square" / "results.json").read_text())["results"][0]["metric"] is None
    capsys.readouterr()


def test_frame_rates_far_apart_and_other_data_sets_have_their_axes() -> None:
    def result(name: str, rate: float, dataset: str) -> dict[str, Any]:
        seconds = {step: {"median": 0.3 / rate} for step in STEPS} | {END_TO_END: {"median": 1 / rate}}
        batch = {"batch": 1, "images_per_second": {END_TO_END: rate, "network": 2 * rate}, "seconds": seconds}
        metric = {"name": "semantic mIoU", "value": 40.0, "dataset": dataset, "source": ""}
        return {"name": name, "runtime": "torch", "metric": metric, "batches": [batch]}

    results = [result("a", 1.0, "ADE20K"), result("b", 100.0, "ADE20K"), result("c", 5.0, "COCO")]
    first, second, _ = figure_of({"machine": describe_machine(), "results": results}).axes
    assert first.get_xscale() == "log" and points(first, END_TO_END) == [(1.0, 40.0), (100.0, 40.0)]
    assert second.get_xscale() == "linear" and points(second, END_TO_END) == [(5.0, 40.0)]
    for axis in (first, second):
        for x, y in points(axis, END_TO_END) + points(axis, "network"):
            assert axis.get_xlim()[0] <= x <= axis.get_xlim()[1] and axis.get_ylim()[0] < y < axis.get_ylim()[1]


def test_a_graph_of_a_fixed_batch_is_measured_at_it(
    no_processes: list[Any], model_folder: Path, graph_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = tmp_path / "photo.png"
    photographs()[1].save(photo)
    flags = ["--runs", 1, "--warm-up", 1, "--device", "cpu", "--images", photo]
    runtimes = ["--runtime", "onnxruntime", "torch"]
    assert benchmark(model_folder, graph_folder, "--out", tmp_path / "out", *flags, *runtimes) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert [(one["runtime"], [batch["batch"] for batch in one["batches"]]) for one in results] == [
        ("torch", [1, 4, 8]),
        ("onnxruntime", [2]),
    ]
    assert results[0]["images"] == "1 image of 241x155" and results[0]["network_sizes"] == [[100, 64]]
    (opening, images, subtask, batch_sizes), settings = no_processes[1]
    assert opening.args == (str(graph_folder), "onnxruntime", "cpu", None) and batch_sizes == (2,)
    assert settings["modules"] == ["hf_faim2f.runtime.backends.onnxruntime"] and settings["gpu"] is None
    assert np.array_equal(np.asarray(images[0]), np.asarray(photographs()[1])) and subtask == "instance"
    capsys.readouterr()


def test_images_of_several_sizes_go_one_by_one(
    no_processes: list[Any], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    for index, image in enumerate(photographs()):
        image.save(tmp_path / "photos" / f"{index}.png")
    flags = ["--runs", 1, "--warm-up", 1, "--device", "cpu", "--images", tmp_path / "photos"]
    assert benchmark(model_folder, "--out", tmp_path / "out", *flags) == 0
    assert "so they are processed one by one" in capsys.readouterr().out
    (one,) = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert [batch["batch"] for batch in one["batches"]] == [1] and len(one["network_sizes"]) > 1
    assert "5 images of 3 sizes" in one["images"]
    assert benchmark(model_folder, "--out", tmp_path / "more", *flags, "--batch-sizes", 2) == 2
    assert "and those of one batch must have one" in capsys.readouterr().err
    assert benchmark(model_folder, "--out", tmp_path / "more", *flags, "--batch-sizes", 2, "--size", "64x64") == 0


def test_generated_pictures_are_the_same_every_time() -> None:
    first, second = (generated_pictures((40, 72), 3) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one.size == (72, 40) and one.mode == "RGB" and np.array_equal(np.asarray(one), np.asarray(other))
    assert not np.array_equal(np.asarray(first[0]), np.asarray(first[1])) and np.asarray(first[0]).std() > 10


def test_models_run_where_their_folders_have_files(tmp_path: Path) -> None:
    for folder, files in {
        "model": ["model.safetensors"], "graph": ["model.onnx"], "both": ["model.onnx", "pytorch_model.bin"],
        "engine": ["model.engine"],
    }.items():  # fmt: skip
        (tmp_path / folder).mkdir()
        for file in files:
            (tmp_path / folder / file).touch()
    all_runtimes = {"model": ["torch"], "graph": ["onnxruntime"], "both": ["torch", "onnxruntime"],
                    "engine": ["torch"], "nowhere": ["torch"]}  # fmt: skip
    for folder, runtimes in all_runtimes.items():
        assert command.choose_runtimes(str(tmp_path / folder), None) == runtimes
    assert command.choose_runtimes(str(tmp_path / "engine"), ["tensorrt"]) == ["tensorrt"]  # native code
    both = str(tmp_path / "both")
    assert command.choose_runtimes(both, ["onnxruntime", "torch", "torch"]) == ["onnxruntime", "torch"]
    assert command.choose_runtimes(str(tmp_path / "model"), ["onnxruntime", "tensorrt"]) == [
        "onnxruntime"
    ]  # it refuses
    assert command.short_names(["a/x", "b/x", "b/y"]) == {"a/x": "a/x", "b/x": "b/x", "b/y": "y"}


def test_mistakes_are_one_sentence_and_leave_nothing(
    no_processes: list[Any], model_folder: Path, graph_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    photo = tmp_path / "photo.png"
    photographs()[0].save(photo)
    before = files_of(tmp_path)

    def told(*arguments: object, where: Path = out) -> str:
        try:
            status = benchmark(*arguments, "--out", where)
        except SystemExit as exit:
            status = exit.code  # type: ignore[assignment]
        printed = capsys.readouterr()
        assert status == 2 and not out.exists() and files_of(tmp_path) == before and printed.out == ""
        assert printed.err.startswith("faim2f benchmark: ") and printed.err.count("\n") == 1
        return printed.err

    assert "has no config.json" in told(tmp_path)
    assert "no file" in told(model_folder, "--runtime", "onnxruntime") and no_processes == []
    assert "takes 2 images at once, not 4" in told(graph_folder, "--batch-sizes", 4)
    assert f"The graph of {graph_folder} takes 64x96" in told(graph_folder, "--size", "64x64")
    assert "32 to 8192" in told(model_folder, "--size", "16x64")
    assert "'640' is not HEIGHTxWIDTH" in told(model_folder, "--size", "640")
    assert "'0' is not a whole number of at least 1" in told(model_folder, "--runs", "0")
    assert "--warm-up: '-1'" in told(model_folder, "--warm-up=-1")
    assert "--batch-sizes: 'many'" in told(model_folder, "--batch-sizes", "many")
    assert "--runtime cannot be 'tpu'; choose from torch, " in told(model_folder, "--runtime", "tpu")
    assert "no device 'gpu'" in told(model_folder, "--device", "gpu")
    assert "did you mean --threads?" in told(model_folder, "--treads", "2")
    assert "is named twice" in told(model_folder, f"{model_folder}/")
    assert "There is no file or folder nowhere.png" in told(model_folder, "--images", "nowhere.png")
    assert "has no known metric for instance segmentation into 5" in told(graph_folder, "--metrics-from", tmp_path)
    assert "is not empty: choose a new folder" in told(model_folder, where=tmp_path)
    mirrored = ["--weights-url", "https://example.org/weights", "--metrics-from", "fai-mf-m-ade"]
    assert "is not empty: choose a new folder" in told(model_folder, *mirrored, where=tmp_path)
    assert "--weights-url is for published models" in told(model_folder, *mirrored[:2])
    assert "is a file" in told(model_folder, where=photo)
    assert "is not a folder that can be written" in told(model_folder, where=photo / "below")
    shutil.copy(photo, tmp_path / "broken.png")
    (tmp_path / "broken.png").write_bytes(photo.read_bytes()[:500])
    os.mkfifo(tmp_path / "pipe.png")
    before = files_of(tmp_path)
    broken = told(model_folder, "--images", photo, tmp_path / "broken.png")
    assert f"{tmp_path / 'broken.png'} cannot be decoded" in broken and "image 0" not in broken
    assert f"{tmp_path / 'pipe.png'} is not a file" in told(model_folder, "--images", tmp_path / "pipe.png")
    semantic = exported(save_model(tmp_path / "tiny"), size=SIZE, batch=2, outputs="semantic")
    before = files_of(tmp_path)
    assert "but not panoptic" in told(semantic, "--subtask", "panoptic")
    four = small_model(num_channels=4)
    four.save_pretrained(tmp_path / "four")
    FaiM2FImageProcessor.from_model_config(four.config).save_pretrained(tmp_path / "four")
    before = files_of(tmp_path)
    assert "four takes 4 channels, but only models of RGB images are benchmarked" in told(tmp_path / "four")

    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("hf_faim2f.cli.output.import_module", missing)
    assert "needs matplotlib" in told(model_folder) and "hf-faim2f[train]" in told(model_folder)


def test_what_fails_on_the_way_leaves_nothing(
    no_processes: list[Any], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    flags = ["--out", out, "--runs", 1, "--warm-up", 1, "--batch-sizes", 1, "--device", "cpu"]
    opened = command.open_at_size

    def failing(error: BaseException) -> Any:
        def open_failing(*arguments: Any) -> Predictor:
            def run(batch: torch.Tensor) -> Any:
                raise error

            return Predictor(replace(opened(*arguments).network, run=run))

        return open_failing

    monkeypatch.setattr(command, "open_at_size", failing(RuntimeError("the kernel\nis tired")))
    assert benchmark(model_folder, *flags) == 2
    told = capsys.readouterr().err
    assert f"The network of {model_folder} fails on 1 image of 64x64 at once: RuntimeError: the kernel." in told
    assert "Traceback" not in told and files_of(tmp_path) == set()
    monkeypatch.setattr(command, "open_at_size", failing(KeyboardInterrupt()))
    assert benchmark(model_folder, *flags) == 130
    assert (
        "faim2f benchmark: interrupted; nothing was written." in capsys.readouterr().err and files_of(tmp_path) == set()
    )
    monkeypatch.setattr(command, "open_at_size", opened)

    def full(document: Any, path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(comparison, "draw_plot", full)
    assert benchmark(model_folder, *flags) == 2
    assert "No space left on device" in capsys.readouterr().err and files_of(tmp_path) == set()
    monkeypatch.undo()


def test_a_processor_that_does_not_resize_is_made_to(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "tiny", do_resize=False)
    predictor = open_at_size(folder, "torch", "cpu", SIZE)
    assert isinstance(predictor.network.processor, FaiM2FImageProcessor)
    assert Contender(predictor, photographs()[:2]).sizes == [SIZE]

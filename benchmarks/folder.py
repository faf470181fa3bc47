"""Throughput of `faim2f predict`, which also reads, post-processes, draws and writes, relative to the network alone.

    python benchmarks/folder.py [ROUNDS [NAME [PHOTOGRAPHS]]]

40 JPEG photographs of 500x375 to 1280x853 (scikit-learn's two, resized), fai-mf-m-ade or the published model NAME, the
command's own batch size, two threads. Each round measures in turn the network alone, on the same tensors prepared in
advance, and the command from opening the first file to writing the last, for semantic and instance segmentation, with
and without overlays. The share is the command's images per second divided by the network's, measured right before and
after. If the machine's speed drifts, "busy", the fraction of the command's time in which the network ran, is more
reliable.

The weights are random, so the network's predictions would be noise. The network runs, but its outputs are replaced by
the realistic logits of benchmarks/post_processing.py: 14 segments with wavy borders.

If the network uses all cores, all other work takes time from it. "possible" is the share if no core is ever idle: the
network's CPU time per image divided by the CPU time of all steps, each on one thread.
"""

import contextlib
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from measurement import THREADS, record
from post_processing import realistic_logits
from torch import Tensor
from untrained import photograph, save_untrained

from hf_faim2f.cli import predict as command
from hf_faim2f.runtime.backends import usual_batch_size
from hf_faim2f.runtime.drawing import supervision
from hf_faim2f.runtime.predictor import _batches

PHOTOGRAPHS = int(sys.argv[3]) if len(sys.argv) > 3 else 40
SIZES = ((640, 480), (1024, 683), (800, 600), (1280, 853), (500, 375))
CLASSES = 150
WAYS = {
    f"{subtask}, {'with' if overlays else 'without'} overlays": (subtask, overlays)
    for subtask in ("semantic", "instance")
    for overlays in (False, True)
}
network_seconds: list[float] = []  # of each run of the network


@lru_cache
def answer_of_trained(grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    return realistic_logits(CLASSES, grid)


def prepare(model: Path, photographs: Path, subtask: str, overlays: bool) -> command.PredictRun:
    """The command, ready to predict into its own folder, with the network's outputs replaced."""
    out = tempfile.mkdtemp(dir=model.parent)
    words = [str(model), str(photographs), "--out", out, "--subtask", subtask]
    prepared = command.prepare(
        command.parse(command.build_parser("folder"), [*words, *([] if overlays else ["--no-overlays"])])
    )
    network = prepared.predictor.network
    own_run = network.run

    def run(batch: Tensor) -> dict[str, Tensor]:
        start = time.perf_counter()
        grid = own_run(batch)["masks_queries_logits"].shape[2:]
        network_seconds.append(time.perf_counter() - start)
        classes, masks = answer_of_trained((grid[0], grid[1]))
        count = len(batch)
        return {
            "class_queries_logits": classes.expand(count, -1, -1),
            "masks_queries_logits": masks.expand(count, -1, -1, -1),
        }

    network.run = run
    return prepared


def network_batches(prepared: command.PredictRun) -> list[Tensor]:
    """The network's batches in the command."""
    ready = map(prepared.predictor._prepare, enumerate(prepared.images))
    size = usual_batch_size(prepared.predictor.network) or 1
    return [torch.stack([one.values for one in batch]) for batch in _batches(ready, size)]


def seconds_an_image(job: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    job()
    return (clock() - start) / PHOTOGRAPHS


def run_command(prepared: command.PredictRun) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        command.predict(prepared)


def other_work(prepared: command.PredictRun) -> None:
    """All of the command's work except the network, in one thread."""
    predictor, subtask = prepared.predictor, prepared.options.subtask
    prepared.options.out.mkdir(exist_ok=True)
    writer = prepared.writer()
    for index, path in enumerate(prepared.images):
        one = predictor._prepare((index, path))
        stride = predictor.network.config.mask_stride
        classes, masks = answer_of_trained((-(-one.values.shape[1] // stride), -(-one.values.shape[2] // stride)))
        outputs = {"class_queries_logits": classes, "masks_queries_logits": masks}
        writer.write(index, predictor._answer(one, outputs, subtask, None))


def main() -> None:
    """Prints shares; see the top of this file."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    name = sys.argv[2] if len(sys.argv) > 2 else "fai-mf-m-ade"
    print(__doc__)
    torch.set_num_threads(THREADS)
    supervision()
    rates: dict[str, list[float]] = {"network": [], **{way: [] for way in WAYS}}
    shares: dict[str, list[float]] = {way: [] for way in WAYS}
    busy: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        model, photographs = save_untrained(Path(folder, "model"), name), Path(folder, "photographs")
        photographs.mkdir()
        for place in range(PHOTOGRAPHS):
            width, height = SIZES[place % len(SIZES)]
            size = (height, width) if place % 4 == 3 else (width, height)
            photograph(*size, which=place).save(photographs / f"{place:02}.jpg", quality=90)
        alone = prepare(model, photographs, "semantic", False)
        batches = network_batches(alone)

        def network() -> None:
            for batch in batches:
                alone.predictor.network.run(batch)

        network()
        for _ in range(rounds):
            rates["network"].append(1 / seconds_an_image(network))
            for way, (subtask, overlays) in WAYS.items():
                prepared = prepare(model, photographs, subtask, overlays)
                network_seconds.clear()
                seconds = seconds_an_image(lambda prepared=prepared: run_command(prepared))  # type: ignore
                rates[way].append(1 / seconds)
                busy[way].append(sum(network_seconds) / PHOTOGRAPHS / seconds)
                rates["network"].append(1 / seconds_an_image(network))
                shares[way].append(2 * rates[way][-1] / sum(rates["network"][-2:]))
        torch.set_num_threads(1)
        work = {"network": seconds_an_image(network, time.process_time)}
        for way, (subtask, overlays) in WAYS.items():
            prepared = prepare(model, photographs, subtask, overlays)
            other_work(prepared)
            work[way] = seconds_an_image(lambda prepared=prepared: other_work(prepared), time.process_time)  # type: ignore
    possible = {way: work["network"] / (work["network"] + work[way]) for way in WAYS}
    figures: dict[str, Any] = {}
    for way, values in rates.items():
        figures[way] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
        line = f"{way:28} {figures[way]['median']:6.2f} images per second ({min(values):.2f} to {max(values):.2f})"
        if way in shares:
            figures[way]["share"], figures[way]["possible"] = statistics.median(shares[way]), possible[way]
            figures[way]["busy"] = statistics.median(busy[way])
            line += f", {figures[way]['share']:.0%} of the network (busy {figures[way]['busy']:.0%})"
            line += f"; possible {possible[way]:.0%}"
        print(f"{line}; work {1000 * work[way]:.0f} ms of one core per image")
    record("folder", {"model": name, "rounds": rounds, "images_a_second": figures, "work": work})


if __name__ == "__main__":
    main()

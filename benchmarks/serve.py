"""Load test of `faim2f serve` on this machine: lost or duplicate answers, memory, latency and throughput.

    python benchmarks/serve.py --clients 64 --seconds 600

This process runs the server. The clients, in another process, each send pictures of different sizes with different
answers, one at a time, and compare every answer with the model's own. Before and after, the throughput of the predictor
alone is measured in this process on the same pictures, in batches of the same size. Exits with status 1 if an answer is
lost, duplicated, wrong or another request's, or if the server's memory grows by more than `--most-growth` after the
first third.
"""

import argparse
import io
import itertools
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hf_faim2f import Prediction, Predictor
from hf_faim2f.data.digits import DigitScenes
from hf_faim2f.model.inference_api_faim2f import Parameters, mask_png, segments_of
from hf_faim2f.runtime.predictor import background_threads
from hf_faim2f.serving.inference import LOGGER
from hf_faim2f.serving.inference_server import InferenceServer, ServeSettings
from hf_faim2f.serving.requests import Limits

DIGITS = Path(__file__).parents[1] / "examples" / "digits"
CLIENTS = Path(__file__).with_name("serve_clients.py")
PICTURES = 12
SAMPLE = 0.5  # seconds between memory samples
PAGE = os.sysconf("SC_PAGE_SIZE")


def pictures() -> list[bytes]:
    """PNG files of scenes of digits, all of different sizes."""
    scenes = DigitScenes("test", PICTURES)
    files = []
    for number in range(PICTURES):
        side = 160 + 8 * number
        image = Image.fromarray(scenes[number]["image"].permute(1, 2, 0).numpy()).resize((side, side + 4 * number))
        file = io.BytesIO()
        image.save(file, "PNG")
        files.append(file.getvalue())
    return files


def memory() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def throughput(predictor: Predictor, files: list[bytes], batch_size: int | None, seconds: float) -> tuple[float, float]:
    """The throughput of the predictor alone, including encoding, with as many threads as the server has.

    Each picture comes `batch_size` times in a row, because only pictures of one size can share a batch.

    Returns:
        Pictures per second, and CPU seconds per picture.
    """
    ends = time.monotonic() + seconds

    def images() -> Any:
        for file in itertools.cycle(files):
            for _ in range(batch_size or 1):
                if time.monotonic() > ends:
                    return
                yield Image.open(io.BytesIO(file), formats=["PNG"])

    started, cpu, count = time.monotonic(), time.process_time(), 0
    with background_threads("masks", 2) as pool:
        answers = []
        for _, prediction in predictor.stream(images(), "panoptic", 0.9, batch_size):
            assert isinstance(prediction, Prediction)
            answers.append(pool.submit(lambda one: [mask_png(mask.numpy()) for mask in one.masks()], prediction))
            count += 1
            if len(answers) > 8:
                answers.pop(0).result()
    return count / (time.monotonic() - started), (time.process_time() - cpu) / count


def write_inputs(folder: Path, predictor: Predictor, files: list[bytes]) -> None:
    """Writes the pictures and, predicted one at a time, the expected answers, for the clients."""
    network = predictor.network
    for number, file in enumerate(files):
        (folder / f"{number:03d}.png").write_bytes(file)
        prepared = predictor._prepare((0, Image.open(io.BytesIO(file), formats=["PNG"])))
        size = (prepared.image.height, prepared.image.width)
        outputs = predictor._run([prepared.values])[0]
        found = segments_of(network.processor, outputs, size, Parameters(), network.config.id2label)
        answer = [{"label": label, "mask": mask_png(mask)} for _, label, mask in found]
        (folder / f"{number:03d}.json").write_text(json.dumps(answer))


def measure(
    model: str, folder: Path, clients: int, seconds: float, batch_size: int | None, own_seconds: float
) -> dict[str, Any]:
    """Runs the server under load; returns the measurements of the clients and of this process.

    Args:
        model: a folder, published name or Hub id.
        folder: an empty folder for pictures and answers.
        clients: number of clients.
        seconds: how long they send requests.
        batch_size: the largest batch.
        own_seconds: how long the predictor alone is measured, before and after.
    """
    logging.getLogger(LOGGER).setLevel(logging.WARNING)
    files = pictures()
    predictor = Predictor.from_pretrained(model)
    write_inputs(folder, predictor, files)
    throughput(predictor, files, batch_size, min(own_seconds, 1.0))  # warms up
    alone = [throughput(predictor, files, batch_size, own_seconds)]
    limits = Limits(seconds=600, waiting=clients)  # enough for a loaded machine
    server = InferenceServer(ServeSettings(model, port=0, batch_size=batch_size, limits=limits), predictor)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    command = [sys.executable, str(CLIENTS), server.address.rpartition(":")[2], str(folder), str(clients), str(seconds)]
    sizes, report = [memory()], folder / "report"
    cpu = time.process_time()
    with report.open("w") as out, subprocess.Popen(command, stdout=out) as child:  # a pipe would fill up
        while child.poll() is None:
            time.sleep(SAMPLE)
            if server.app.accepted:
                sizes.append(memory())
    if child.returncode:
        raise RuntimeError(f"The clients ended with status {child.returncode}, see above.")
    cpu = time.process_time() - cpu
    told = json.loads(report.read_text())
    sample = server.metrics.registry.get_sample_value
    counted = {name: sample(f"faim2f_batch_images_{name}") or 0.0 for name in ("sum", "count")}
    requests = sample("faim2f_requests_total", {"status": "200"})
    server.stop()
    thread.join()
    alone.append(throughput(predictor, files, batch_size, own_seconds))
    third = max(1, len(sizes) // 3)
    megabytes = [round(float(np.median(part)) / 1e6, 1) for part in (sizes[third : 2 * third], sizes[-third:])]
    waits = np.array(told.pop("seconds"))
    own, own_cpu = (float(np.mean(values)) for values in zip(*alone, strict=True))
    rate, each, their = len(waits) / told["lasted"], cpu / len(waits), told.pop("cpu")
    return {
        "clients": clients,
        "batch_size": batch_size,
        **told,
        "answered": len(waits),
        "counted_by_server": int(requests or 0),
        "images_a_batch": round(counted["sum"] / max(counted["count"], 1), 2),
        "p50": float(np.quantile(waits, 0.5)),
        "p99": float(np.quantile(waits, 0.99)),
        "images_per_second": rate,
        "predictor_images_per_second": own,
        "share": rate / own,
        "cpu_milliseconds": {"server": 1000 * each, "predictor": 1000 * own_cpu, "clients": 1000 * their},
        "share_of_cpu": own_cpu / each,
        "memory_megabytes": megabytes,
    }


def problems(found: dict[str, Any], most_growth: float) -> list[str]:
    """The failures, as sentences."""
    before, after = found["memory_megabytes"]
    checks = {
        f"{found['sent'] - found['answered']} requests have no answer": found["sent"] != found["answered"],
        f"the server counted {found['counted_by_server']} answers": found["counted_by_server"] != found["answered"],
        f"{found['swapped']} answers were another request's": found["swapped"],
        f"{found['unasked']} clients got bytes that they had not asked for": found["unasked"],
        f"{found['wrong']} different answers are not their picture's": found["wrong"],
        f"the statuses were {found['statuses']}": set(found["statuses"]) != {"200"},
        f"memory grew from {before} to {after} MB": after - before > most_growth,
    }
    return [text for text, is_wrong in checks.items() if is_wrong]


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    what = "a folder, published name or Hub id (default: examples/digits)"
    parser.add_argument("--model", default=str(DIGITS), help=what)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--own-seconds", type=float, default=10, help="for the predictor alone, twice (default: 10)")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--most-growth", type=float, default=30, metavar="MB", help="(default: 30)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(
            options.model, Path(folder), options.clients, options.seconds, options.batch_size, options.own_seconds
        )
    wrong = problems(found, options.most_growth)
    if options.json:
        print(json.dumps({**found, "problems": wrong}))
    else:
        for name, value in found.items():
            print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
        print("\n".join(wrong) or "no request lost, doubled or swapped; memory flat")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

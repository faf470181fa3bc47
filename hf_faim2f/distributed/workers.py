"""The workers of a run, which Ray Data runs on this machine or on a cluster.

Ray Data distributes the parts' numbers to a pool of workers, replaces workers that die, and reassigns their parts.
Workers read images and write results themselves, so Ray's object store stays small.

An image can crash the process that reads it, by exhausting memory or through a bug in a decoder. Ray would then retry
the part forever, and a crashed worker leaves no message. So each worker records its progress (`Attempts`). After some
crashes, a part is predicted image by image, and each image is recorded before it is read. An image at which workers
crashed twice is skipped.
"""

import contextlib
import itertools
import logging
import os
import re
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import BulkError, ImageError, PredictorError, first_line, out_of_memory, sentence
from ..files import printable
from ..runtime.backends import usual_batch_size
from ..runtime.prediction import Prediction
from ..runtime.predictor import Predictor
from ..version import __version__
from .parts import write_part
from .plan import Plan, read_plan
from .rows import Entry, read_pieces

LOCAL, AUTO = "local", "auto"
ADDRESS = re.compile(r"[^\s:/]+:\d{1,5}|\[[0-9A-Fa-f:]+\]:\d{1,5}")
CONNECT_SECONDS = 20
# The object store holds only part numbers.
OBJECT_STORE_BYTES = 128 * 2**20
# Maximum number of Ray Data tasks: one per part, up to a number that does not overload Ray.
MOST_TASKS = 4096
# Cores per worker if --workers is not given: one for the network, one for reading and post-processing.
CORES = 2

Row = dict[str, Any]
# Crashes before a part is predicted image by image, which is slow: most crashes have other causes than an image.
CAREFUL_AFTER = 3
# Crashes at an image before it is skipped.
LEFT_OUT_AFTER = 2
# Crashes at no image, such as before any was begun, after which the run stops, because no image is the cause.
MOST_ATTEMPTS = 12
# Limit on the size of a record's file in bytes, far above any real one.
MOST_BYTES = 1 << 22
TRY, WRITING = "try", "writing"
# Pillow's name for a file without a name.
NO_NAME = re.compile(r" <_io\.BytesIO [^>]*>")


class Done(NamedTuple):
    """A finished part: its number, its number of images, and how many of them were unusable."""

    part: int
    images: int
    bad: int


class Share(NamedTuple):
    """The number of workers, and the resources of each."""

    workers: int
    cpus: int
    gpus: int


def check_address(address: str) -> None:
    """Raises BulkError unless the address is "local", "auto" or a cluster's HOST:PORT."""
    if address.startswith("ray://"):
        raise BulkError(
            f"{address} is for the Ray Client, which this command does not support: run it on a machine of the "
            f"cluster with --ray {AUTO}, or submit it with `ray job submit`."
        )
    if address not in (LOCAL, AUTO) and not ADDRESS.fullmatch(address):
        raise BulkError(f"--ray is {LOCAL} for this machine, {AUTO}, or a cluster's HOST:PORT, not {address!r}.")


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """Starts Ray on this machine, or connects to a cluster, within the context.

    Raises:
        BulkError: there is no cluster at this address, or it cannot be used.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    import ray

    _check_reachable(address)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == LOCAL:
        options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    try:
        ray.init(address=address, **options)
    except Exception as error:  # Ray raises plain exceptions, too, if it does not start in time
        place = "Ray cannot be started on this machine" if address == LOCAL else f"There is no Ray cluster at {address}"
        reason = " ".join(str(error).split())
        hint = "" if address == LOCAL else f"; for this machine alone pass --ray {LOCAL}"
        raise BulkError(f"{place}: {type(error).__name__}: {reason.rstrip('.')}{hint}.") from error
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raises BulkError if a cluster's address does not respond; Ray itself would retry for minutes."""
    if address in (LOCAL, AUTO):
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise BulkError(
            f"There is no Ray cluster at {address}: {first_line(error)}; for this machine alone pass --ray {LOCAL}."
        ) from error


def share_out(nodes: Sequence[dict[str, float]], device: str | None, workers: int | None) -> Share:
    """Divides a cluster's resources among workers.

    Args:
        nodes: the resources `CPU` and `GPU` of each machine.
        device: "cpu", "cuda", or None for GPUs if there are any.
        workers: maximum number of workers; None for one per GPU, or per two cores.

    Raises:
        BulkError: GPUs are requested, but there are none.
    """
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if device == "cuda" and not gpus:
        raise BulkError("There is no GPU on any machine of Ray: leave --device out, or pass cpu.")
    if gpus and device != "cpu":
        count = min(workers or gpus, gpus)
        # A worker must fit on every machine with GPUs.
        cores = min(int(node.get("CPU", 1) // node["GPU"]) for node in nodes if node.get("GPU", 0) >= 1)
        return Share(count, max(1, cores), 1)
    cores = int(sum(node.get("CPU", 0) for node in nodes))
    count = min(workers or max(1, cores // CORES), max(1, cores))
    largest = max((int(node.get("CPU", 0)) for node in nodes), default=1)
    return Share(count, max(1, min(cores // count, largest)), 0)


def predict_parts(
    plan: Plan, parts: Sequence[int], device: str | None, batch_size: int | None, workers: int | None
) -> Iterator[Done]:
    """Predicts parts of a run, and yields each part when it is finished; Ray must be `connected`.

    Raises:
        BulkError: a part cannot be predicted; finished parts are kept.
    """
    import ray
    import ray.data
    from ray.exceptions import RayError

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    share = share_out(nodes, device, workers)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    items = [{"part": number} for number in parts]
    numbers = ray.data.from_items(items, override_num_blocks=min(len(items), MOST_TASKS))
    done = numbers.map_batches(
        Worker,
        fn_constructor_kwargs={
            "out": str(plan.out), "digest": plan.digest, "device": device, "batch_size": batch_size
        },
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            min_size=1, initial_size=min(share.workers, len(items)), max_size=min(share.workers, len(items)),
            # One part per task: a worker that dies loses only one, and no worker is idle while another has several.
            max_tasks_in_flight_per_actor=1,
        ),
        num_cpus=share.cpus,
        num_gpus=share.gpus,
    )  # fmt: skip
    try:
        for row in done.iter_rows():
            if row["failure"]:
                raise BulkError(f"{row['failure']} Finished parts in {plan.out} stay.")
            yield Done(int(row["part"]), int(row["images"]), int(row["bad"]))
    except RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise BulkError(
            f"Ray gave up: {type(error).__name__}: {lines[-1] if lines else 'no reason given'}; finished parts "
            f"in {plan.out} stay, and the same command continues the run."
        ) from error


class Attempts:
    """The attempts at a part, recorded in a file.

    Args:
        path: the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = self._lines()
        self.count = lines.count(TRY)
        # The last entry of each earlier attempt: the image at which its worker crashed.
        ends = [before for before, line in zip(lines, [*lines[1:], TRY], strict=False) if line == TRY and before != TRY]
        self.deaths = {int(end): ends.count(end) for end in ends if end.isdigit()}

    def _lines(self) -> list[str]:
        try:
            with self.path.open("rb") as file:
                return file.read(MOST_BYTES).decode("ascii", "replace").split()
        except FileNotFoundError:
            return []

    @property
    def careful(self) -> bool:
        """Whether this attempt predicts the images one by one."""
        return self.count >= CAREFUL_AFTER

    @property
    def hopeless(self) -> bool:
        """Whether workers keep crashing at no image, or crash at an image that is already skipped."""
        at_no_image = self.count - sum(self.deaths.values())
        return at_no_image >= MOST_ATTEMPTS or max(self.deaths.values(), default=0) > LEFT_OUT_AFTER

    def begin(self) -> None:
        """Records the start of an attempt."""
        self._append(TRY)

    def begin_image(self, place: int) -> None:
        """Records the start of an image."""
        self._append(str(place))

    def begin_writing(self) -> None:
        """Records that all images are predicted."""
        self._append(WRITING)

    def left_out(self, place: int) -> bool:
        """Whether an image is skipped because workers crashed at it."""
        return self.deaths.get(place, 0) >= LEFT_OUT_AFTER

    def end(self) -> None:
        """Deletes the record: the part is finished, or failed with a message."""
        self.path.unlink(missing_ok=True)

    def _append(self, line: str) -> None:
        with self.path.open("ab") as file:
            file.write(f"{line}\n".encode())


class Worker:
    """Predicts parts of a run. Ray Data creates it on one of the machines, and replaces it after a crash.

    The model is loaded with the first part, so that a crash while loading is recorded for that part.

    Args:
        out: the folder of the run.
        digest: the digest of its plan.
        device: see `Predictor.from_pretrained`.
        batch_size: see `Predictor.stream`; None for the network's default.
    """

    def __init__(self, out: str, digest: str, device: str | None, batch_size: int | None) -> None:
        self.out, self.digest = Path(out), digest
        self.device, self.batch_size = device, batch_size
        self.opened: tuple[Plan, Predictor] | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Predicts the parts whose numbers are in `batch["part"]`.

        Returns:
            For each part, the number of images, the number of unusable ones, and an error message, empty if the part
            succeeded.
        """
        done = [self._try(int(number)) for number in batch["part"]]
        images, bad, failures = zip(*done, strict=True)
        return {
            "part": batch["part"],
            "images": np.array(images),
            "bad": np.array(bad),
            "failure": np.array(failures, dtype=object),
        }

    def _try(self, number: int) -> tuple[int, int, str]:
        try:
            return *self.do(number), ""
        except (BulkError, PredictorError, OSError) as error:
            text = sentence(error)
        except torch.OutOfMemoryError:
            predictor = self.opened[1] if self.opened else None
            text = out_of_memory((self._batch_size(predictor) or predictor.network.batch or 1) if predictor else 1)
        return 0, 0, f"{text} (On the machine {socket.gethostname()}.)"

    def do(self, number: int) -> tuple[int, int]:
        """Predicts a part unless it is finished; returns its number of images, and how many of them are unusable.

        Raises:
            BulkError, PredictorError, OSError: the part cannot be predicted.
        """
        plan = self.opened[0] if self.opened else self._open_plan()
        pieces = plan.pieces(number)
        count = sum(piece.count for piece in pieces)
        # A worker may have crashed between writing the file and reporting it.
        bad = plan.errors_in(number)
        if bad is not None:
            return count, bad
        attempts = Attempts(plan.attempts / f"{number:05}")
        if attempts.hopeless:
            attempts.end()
            raise BulkError(
                f"Part {number} was begun {attempts.count} times, and each time the worker died, usually for lack of "
                "memory: look at Ray's logs, and run the same command again with fewer workers."
            )
        attempts.begin()
        try:
            predictor = self._open_predictor(plan)
            predict = self._predict_one_by_one if attempts.careful else self._predict_batches
            rows = list(predict(plan, predictor, read_pieces(pieces), attempts))
            attempts.begin_writing()
            write_part(plan.part(number), rows, plan.about(number, len(rows)), plan.unfinished)
        finally:  # not reached if the worker is killed
            attempts.end()
        return count, sum(row["error"] is not None for row in rows)

    def _open_plan(self) -> Plan:
        if not self.out.is_dir():
            raise BulkError(
                f"There is no folder {self.out}: --out must be on a file system that all machines of the cluster share."
            )
        plan = read_plan(self.out)
        if plan.digest != self.digest:
            raise BulkError(f"{self.out} is not the folder in which the run was started: all machines must share one.")
        if plan.settings.version != __version__:
            raise BulkError(
                f"hf-faim2f is {__version__}, and {plan.settings.version} where the run was started: install the same."
            )
        return plan

    def _open_predictor(self, plan: Plan) -> Predictor:
        if self.opened is None:
            settings = plan.settings
            folder = plan.model.here()
            predictor = Predictor.from_pretrained(folder, settings.runtime, self.device, settings.precision)
            self.opened = plan, predictor
        return self.opened[1]

    def _batch_size(self, predictor: Predictor) -> int | None:
        return usual_batch_size(predictor.network) if self.batch_size is None else self.batch_size

    def _predict_batches(
        self, plan: Plan, predictor: Predictor, entries: Iterator[Entry], _: Attempts
    ) -> Iterator[Row]:
        """The rows of a part in order, predicted in batches."""
        rows: list[Row] = []
        places: list[int] = []  # index in `rows` of each image that the predictor gets

        def sources() -> Iterator[Any]:
            for entry in entries:
                rows.append(_row(entry))
                if entry.error is None:
                    places.append(len(rows) - 1)
                    yield entry.source

        settings = plan.settings
        for index, made in predictor.stream(
            sources(), settings.subtask, settings.threshold, self._batch_size(predictor)
        ):
            _fill(rows[places[index]], made, index)
        yield from rows

    def _predict_one_by_one(
        self, plan: Plan, predictor: Predictor, entries: Iterator[Entry], attempts: Attempts
    ) -> Iterator[Row]:
        """Like `_predict_batches`, but image by image, each recorded before it is read."""
        settings = plan.settings
        for place in itertools.count():
            attempts.begin_image(place)
            entry = next(entries, None)
            if entry is None:
                return
            row = _row(entry)
            if row["error"] is None and attempts.left_out(place):
                row["error"] = f"{entry.key} was left out: {attempts.deaths[place]} workers died while predicting it."
            elif row["error"] is None:
                for index, made in predictor.stream([entry.source], settings.subtask, settings.threshold):
                    _fill(row, made, index)
            yield row


def _row(entry: Entry) -> Row:
    """An image's row without a prediction."""
    empty: Row = {"height": None, "width": None, "subtask": None, "segments": []}
    return {"key": entry.key, "file": entry.file, "error": entry.error, **empty}


def _fill(row: Row, made: Prediction | ImageError, index: int) -> None:
    """Fills an image's row with its prediction or error."""
    if isinstance(made, ImageError):
        text, unnamed = str(made), f"image {index}"
        # For images without a file name, the predictor's message has an index instead.
        text = row["key"] + text.removeprefix(unnamed) if text.startswith(unnamed) else text
        row["error"] = printable(NO_NAME.sub("", text))
        return
    row["height"], row["width"] = made.size
    row["subtask"], row["segments"] = made.subtask, made.to_json()


__all__ = [
    "AUTO",
    "LOCAL",
    "Attempts",
    "Done",
    "Share",
    "Worker",
    "check_address",
    "connected",
    "predict_parts",
    "share_out",
]

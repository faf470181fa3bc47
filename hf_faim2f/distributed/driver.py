"""Drives a run's workers with Ray Data, on this machine or on a cluster.

Ray Data distributes the parts' numbers to a pool of workers, replaces workers that die, and reassigns their parts.
Workers read images and write results themselves, so Ray's object store stays small.
"""

import contextlib
import logging
import os
import re
import socket
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..errors import BulkError, first_line
from .plan import Plan
from .worker import Worker

LOCAL, AUTO = "local", "auto"
ADDRESS = re.compile(r"[^\s:/]+:\d{1,5}|\[[0-9A-Fa-f:]+\]:\d{1,5}")
CONNECT_SECONDS = 20
# The object store holds only numbers of parts.
OBJECT_STORE_BYTES = 128 * 2**20
# Maximum number of Ray Data tasks: one per part, up to a number that does not overload Ray.
MOST_TASKS = 4096
# Cores per worker if --workers is not given: one for the network, one for reading and post-processing.
CORES = 2


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
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
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


__all__ = ["AUTO", "LOCAL", "Done", "Share", "check_address", "connected", "predict_parts", "share_out"]

"""Replicas of a model on Ray Serve, for `faim2f serve --ray`.

As without Ray, the command's own process provides the HTTP interface, with its limits, token, logs and metrics. Ray
Serve places the replicas, checks their health, replaces dead ones, scales them, and routes each request to one of them.
It only retries requests that no replica has started. Segmenting an image has no side effects, so this module also
retries a request whose replica died.
"""

import asyncio
import atexit
import contextlib
import logging
import re
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, NamedTuple

from ..distributed.plan import OPEN_HERE, ModelFiles, pin_model
from ..distributed.workers import Share, check_address, connected, share_out
from ..errors import BulkError, SettingsError, first_line
from ..model.inference_api_faim2f import Parameters, RequestError
from ..runtime.backends import BATCH_SIZE
from ..runtime.predictor import Predictor
from ..version import __version__
from ..zoo import runtimes_of
from .batching import FAILED, TOO_LATE, Batcher, Job
from .inference_server import ServeSettings

logger = logging.getLogger(__name__)

# Maximum attempts per request, so that an image that crashes its replica does not crash all of them.
ATTEMPTS = 4
RETRY_SECONDS = 0.1
# How long the server counts as not ready after a request that no replica could take, unless another one succeeds. It
# must end by itself, because a load balancer sends no requests to a server that is not ready.
NOT_READY_SECONDS = 30.0
# Concurrent requests per replica, in batches: while one batch runs, others are decoded or encoded. The first number is
# the autoscaler's target; requests beyond the second wait in this process for the next free replica.
USUAL_LOAD, MOST_LOAD = 2, 8


class Outcome(NamedTuple):
    """A replica's result for a request.

    Args:
        answer: the JSON document; empty if the request failed.
        error, status: why it failed, and the HTTP status; empty and 200 if it succeeded.
        facts: for the log.
        batches: number of images and the network's seconds of each batch that the replica ran since its last outcome.
    """

    answer: bytes
    error: str
    status: int
    facts: dict[str, Any]
    batches: list[tuple[int, float]]


class ModelReplica:
    """The model in a process that Ray Serve starts on one of the machines.

    Args:
        files: the model.
        settings: the server's settings.
        version: this package's version in the command's process.

    Raises:
        BulkError, PredictorError: the model is missing or cannot be opened, or the package's version differs.
    """

    def __init__(self, files: ModelFiles, settings: ServeSettings, version: str) -> None:
        if version != __version__:
            raise BulkError(
                f"hf-faim2f is {__version__} on {socket.gethostname()}, and {version} where the command runs: install "
                "the same on all machines."
            )
        folder = str(files.here())
        predictor = Predictor.from_pretrained(folder, settings.runtime or "torch", settings.device, settings.precision)
        self.batches: list[tuple[int, float]] = []
        self.batcher = Batcher(
            predictor, settings.batch_size, settings.batch_wait, settings.limits,
            on_batch=lambda count, seconds: self.batches.append((count, seconds)),
        )  # fmt: skip
        self.batcher.warm_up()

    async def segment(
        self, picture: bytes, parameters: Parameters, as_run_lengths: bool, seconds: float, request: str
    ) -> Outcome:
        """Segments an image; the arguments are those of `Job`."""
        job = Job(picture, parameters, as_run_lengths, seconds, request)
        self.batcher.submit(job)
        answer, error, status = b"", "", 200
        try:
            answer = await asyncio.wrap_future(job.answer)
        except RequestError as refusal:
            error, status = str(refusal), refusal.status
        batches, self.batches = self.batches, []
        return Outcome(answer, error, status, job.facts, batches)

    def check_health(self) -> None:
        """Called by Ray Serve, which replaces the replica if this raises an error."""
        if not self.batcher.is_alive:
            raise RuntimeError("The network's thread has ended.")


class RayBatcher:
    """Segments images on replicas, in place of `Batcher`. `close` ends the replicas.

    Args:
        address: Ray's address; see `distributed.workers.check_address`.
        replicas: minimum and maximum number of replicas; None for one per GPU, or per two cores.
        settings: the server's settings.
        name: the name of Ray Serve's application. One that a killed command left under this name is replaced.
        on_batch: see `Batcher`.

    Raises:
        BulkError, PredictorError, SettingsError, ImportError: the model cannot be opened, or Ray is missing, cannot be
            used, or has no room for the replicas.
    """

    def __init__(
        self,
        address: str,
        replicas: tuple[int, int] | None,
        settings: ServeSettings,
        name: str,
        on_batch: Callable[[int, float], object] = lambda count, seconds: None,
    ) -> None:
        self.name, self.on_batch, self.closing = name, on_batch, False
        self.tasks: set[asyncio.Task[None]] = set()
        self.failed_at: float | None = None  # when no replica could take a request; None after one that succeeded
        self.answered_at = 0.0  # when a request last succeeded
        check_address(address)
        try:
            from ray import serve  # noqa: F401
        except ImportError as error:
            raise ImportError(f"--ray needs Ray Serve ({first_line(error)}): install hf-faim2f[ray].") from error
        # By the name: the files of a Hub id must not choose the runtime, because an engine can contain any code.
        settings = replace(settings, runtime=settings.runtime or runtimes_of(settings.model)[0])
        files = check_model(settings)
        with contextlib.ExitStack() as stack:
            stack.enter_context(connected(address))
            self.handle = self._deploy(files, replicas, settings, stack)
            self.stack = stack.pop_all()
        atexit.register(self.close)  # if a second Ctrl+C ends the server

    @property
    def is_alive(self) -> bool:
        """Whether it accepts images."""
        return not self.closing

    @property
    def is_ready(self) -> bool:
        """Whether replicas took the most recent requests."""
        failed = self.failed_at is not None and time.monotonic() - self.failed_at < NOT_READY_SECONDS
        return self.is_alive and not failed

    def submit(self, job: Job) -> None:
        """Starts a job; called in an event loop."""
        task = asyncio.get_running_loop().create_task(self._segment(job))
        self.tasks.add(task)  # the event loop keeps only weak references
        task.add_done_callback(self.tasks.discard)
        job.answer.add_done_callback(lambda answer: _cancel_with(answer, task))

    def close(self) -> None:
        """Ends the replicas, and closes the connection to Ray."""
        self.closing = True
        atexit.unregister(self.close)
        self.stack.close()

    def _deploy(
        self,
        files: ModelFiles,
        replicas: tuple[int, int] | None,
        settings: ServeSettings,
        stack: contextlib.ExitStack,
    ) -> Any:
        import ray
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        share, (least, most) = room_for(nodes, settings.device, replicas)
        batch = settings.batch_size or (BATCH_SIZE if share.gpus else 1)
        scaling: dict[str, Any] = {"num_replicas": least}
        if least != most:
            scaling = {
                "autoscaling_config": {
                    "min_replicas": least, "max_replicas": most, "target_ongoing_requests": USUAL_LOAD * batch,
                }
            }  # fmt: skip
        deployment: Any = serve.deployment(
            ModelReplica,
            ray_actor_options={"num_cpus": share.cpus, "num_gpus": share.gpus},
            max_ongoing_requests=MOST_LOAD * batch,
            **scaling,
        )
        each = f"{share.gpus} GPU" if share.gpus else f"{share.cpus} CPU{'s' * (share.cpus > 1)}"
        count = f"{least} replica{'s' * (least > 1)}" if least == most else f"{least} to {most} replicas"
        print(f"Starting {count} of {each} each on Ray.", file=sys.stderr, flush=True)
        serve.start(proxy_location="Disabled")
        stack.callback(_delete, self.name)
        try:
            return serve.run(deployment.bind(files, settings, __version__), name=self.name, route_prefix=None)
        except RuntimeError as error:
            reason = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise BulkError(
                f"Ray Serve cannot start the replicas: {reason[-1] if reason else 'no reason given'} (Its logs have "
                "more.)"
            ) from error

    async def _segment(self, job: Job) -> None:
        try:
            outcome = await self._outcome(job)
        except RequestError as error:
            job.finish(error)
            return
        except Exception:
            logger.exception("Ray failed on a request.", extra={"facts": {"request": job.request}})
            job.finish(RequestError(FAILED, 500))
            return
        for count, seconds in outcome.batches:
            self.on_batch(count, seconds)
        job.facts |= outcome.facts
        job.finish(RequestError(outcome.error, outcome.status) if outcome.error else outcome.answer)

    async def _outcome(self, job: Job) -> Outcome:
        """Sends the job to a replica, and to another one if it dies; returns the outcome."""
        import ray.exceptions as died
        from ray.serve.exceptions import DeploymentUnavailableError

        began = time.monotonic()
        for attempt in range(1, ATTEMPTS + 1):
            left = job.seconds_left
            if left <= 0:
                raise RequestError(TOO_LATE.format(seconds=job.seconds), 504)
            response = self.handle.segment.remote(job.picture, job.parameters, job.as_run_lengths, left, job.request)
            try:
                outcome: Outcome = await response
                self.failed_at, self.answered_at = None, time.monotonic()
                return outcome
            except asyncio.CancelledError:
                response.cancel()
                raise
            except DeploymentUnavailableError as error:
                self.failed_at = time.monotonic()
                raise RequestError("No replica of the model can be started; Ray's logs say why.", 503) from error
            except (died.RayActorError, died.NodeDiedError, died.WorkerCrashedError, died.OutOfMemoryError) as error:
                facts = {"request": job.request, "attempt": attempt, "reason": type(error).__name__}
                logger.warning("A replica died with a request.", extra={"facts": facts})
            await asyncio.sleep(RETRY_SECONDS * attempt)
        if self.answered_at < began:  # else it is the image that replicas die of
            self.failed_at = time.monotonic()
        raise RequestError(f"{ATTEMPTS} replicas of the model died with this image; Ray's logs may say why.", 500)


def check_model(settings: ServeSettings) -> ModelFiles:
    """Checks the settings before any replica starts; returns the pinned model.

    Raises:
        BulkError, PredictorError, SettingsError: the device or the model cannot be used.
    """
    if settings.device not in (None, "cpu", "cuda"):
        raise SettingsError(
            f"With --ray the device is cpu or cuda, and Ray assigns the GPUs: it cannot be {settings.device}."
        )
    files, folder = pin_model(settings.model)
    runtime = settings.runtime or "torch"
    if runtime in OPEN_HERE:
        predictor = Predictor.from_pretrained(str(folder), runtime, "cpu", settings.precision)
        Batcher(predictor, settings.batch_size, settings.batch_wait, settings.limits).close()
    return files


def room_for(
    nodes: list[dict[str, float]], device: str | None, replicas: tuple[int, int] | None
) -> tuple[Share, tuple[int, int]]:
    """The resources of each replica, and the minimum and maximum number of replicas.

    The maximum may exceed the current resources, because a cluster can grow.

    Args:
        nodes, device: see `distributed.workers.share_out`.
        replicas: minimum and maximum; None for one per GPU, or per two cores.

    Raises:
        BulkError: the resources do not suffice for the minimum, or there is no GPU.
    """
    if replicas is None:
        share = share_out(nodes, device, None)
        return share, (share.workers, share.workers)
    least, most = replicas
    share = share_out(nodes, device, most)
    if share.workers < least:
        has = f"{share.workers} {'GPU' if share.gpus else 'core'}{'s' * (share.workers > 1)}"
        raise BulkError(f"Ray has {has}, one for each replica: pass --replicas {share.workers}, not {least}.")
    return share, (least, most)


def application_name(address: str) -> str:
    """The name of Ray Serve's application for a server at this address; a restarted server gets the same name."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", f"faim2f-{socket.gethostname()}-{address.rpartition('//')[2]}")


def _delete(name: str) -> None:
    from ray import serve

    with contextlib.suppress(Exception):  # Ray may have shut down already
        serve.delete(name)


def _cancel_with(answer: "Future[bytes]", task: "asyncio.Task[None]") -> None:
    """Cancels the task of a job whose answer was cancelled."""
    if answer.cancelled():
        task.get_loop().call_soon_threadsafe(task.cancel)


__all__ = ["ModelReplica", "Outcome", "RayBatcher", "application_name", "room_for"]

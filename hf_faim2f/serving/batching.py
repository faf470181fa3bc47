"""Segments images in dynamic batches: requests that arrive within a few milliseconds share one run of the network.

Three stages, as in `runtime.predictor`: threads that decode and resize, one thread that runs the network, and threads
that post-process. Images in a batch have the same size and no padding, so they do not affect each other's answers.
"""

import io
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import ImageError, PredictorError
from ..masks import encode_run_lengths
from ..model.inference_api_faim2f import NAME, Parameters, RequestError, mask_png, open_picture, segments_of
from ..runtime.predictor import POST_PROCESSING_THREADS, Predictor, background_threads
from .requests import Limits

logger = logging.getLogger(__name__)

# Threads that decode images. A second one keeps small images from waiting for a large one.
DECODING_THREADS = 2
WARM_UP = (64, 64)
# Pillow passes this many bytes of a file to its decoder at once; the time limit is checked in between.
BYTES_AT_ONCE = 1 << 14
# Sent to the client without the cause, which is only logged.
FAILED = "The server failed on this image; its log has the reason under this request's id."
TOO_LATE = "This took longer than {seconds:g} seconds and was stopped: try a smaller image, or come back later."


@dataclass(eq=False)
class Job:
    """An image to segment. `answer` resolves to the JSON document, or raises a `RequestError`.

    Args:
        picture: the file's bytes; untrusted, dropped once decoded, or once the answer is no longer wanted.
        parameters: the request's parameters.
        as_run_lengths: encode masks as COCO run lengths instead of PNG.
        seconds: the time limit. Cancelling `answer` ends the job earlier: its remaining stages are skipped.
    """

    picture: bytes
    parameters: Parameters
    as_run_lengths: bool = False
    seconds: float = 60.0
    request: str = ""  # its id, for the log
    answer: "Future[bytes]" = field(default_factory=Future)
    started: float = field(default_factory=time.monotonic)
    facts: dict[str, Any] = field(default_factory=dict)  # for the log
    size: tuple[int, int] = (0, 0)  # (height, width) of the image
    values: Any = None  # (3, H, W), the network's input
    outputs: Any = None  # the network's, for post-processing
    arrived: float = 0.0  # when `values` was set

    @property
    def seconds_left(self) -> float:
        """Seconds until the time limit; negative after it."""
        return self.started + self.seconds - time.monotonic()

    @property
    def is_over(self) -> bool:
        """Whether the answer is no longer wanted."""
        return self.answer.done() or self.seconds_left < 0

    def release(self) -> None:
        """Drops all data, so that the queues of the stages hold none of a cancelled job."""
        self.picture, self.values, self.outputs = b"", None, None

    def finish(self, result: bytes | Exception) -> None:
        """Sets the answer, unless it was cancelled."""
        self.release()
        try:
            if isinstance(result, Exception):
                self.answer.set_exception(result)
            else:
                self.answer.set_result(result)
        except InvalidStateError:
            pass


class BoundedFile(io.BytesIO):
    """An image file whose reads fail after the time limit, because some small files take hours to decode."""

    def __init__(self, job: Job) -> None:
        super().__init__(job.picture)
        self.job = job

    def read(self, size: int | None = -1, /) -> bytes:
        """As in `io.BytesIO`.

        Raises:
            RequestError: the time limit is over, or the answer was cancelled.
        """
        if self.job.is_over:
            raise RequestError(TOO_LATE.format(seconds=self.job.seconds), 504)
        return super().read(size)


class Segmenter(Protocol):
    """Segments images for the server: `Batcher` in this process, or replicas of it in others."""

    @property
    def is_alive(self) -> bool:
        """Whether it accepts images."""

    @property
    def is_ready(self) -> bool:
        """Whether it is expected to segment them."""

    def submit(self, job: Job) -> None:
        """Starts a job; called in the server's event loop."""

    def close(self) -> None:
        """Finishes all jobs, then shuts down."""


class Batcher:
    """Segments images in batches, in its own threads, which `close` ends.

    Args:
        predictor: a network whose outputs are logits.
        batch_size: the largest batch; None for the network's default.
        wait: how long a partial batch waits for more images of the same size, in seconds.
        limits: only `pixels`, the largest image, is used.
        on_batch: called in the network's thread after each batch, with its number of images and the network's seconds.

    Raises:
        PredictorError: the network does not return logits, or does not accept this batch size.
    """

    def __init__(
        self,
        predictor: Predictor,
        batch_size: int | None = None,
        wait: float = 0.005,
        limits: Limits | None = None,
        on_batch: Callable[[int, float], object] = lambda count, seconds: None,
    ) -> None:
        network = predictor.network
        if network.outputs != "logits":
            raise PredictorError(
                f"The graph of {network.name} was exported with the outputs {network.outputs}, and the Hub's interface "
                "needs the logits: export it with the outputs logits."
            )
        if batch_size is None and network.batch is None:
            batch_size = min(network.usual_batch, network.largest_batch or network.usual_batch)
        _, self.batch_size = predictor._check_request(None, None, batch_size)
        self.predictor, self.wait, self.limits, self.on_batch = predictor, wait, limits or Limits(), on_batch
        stuff = network.config.label_ids_to_fuse
        self.fused = None
        if stuff is not None:  # added to the outputs of runtimes, as by the model itself
            self.fused = torch.zeros(1, network.config.num_labels, dtype=torch.bool)
            self.fused[0, stuff] = True
        self.groups: dict[tuple[int, ...], list[Job]] = {}  # decoded, by input shape; each list is in order of arrival
        self.changed = threading.Condition()
        self.closing = False
        self.decoding = background_threads("decoding", DECODING_THREADS)
        self.answering = background_threads("answering", POST_PROCESSING_THREADS)
        self.network = threading.Thread(target=self._run_network, name="faim2f-network", daemon=True)
        self.network.start()

    @property
    def is_alive(self) -> bool:
        """Whether it accepts images."""
        return not self.closing and self.network.is_alive()

    @property
    def is_ready(self) -> bool:
        """As `is_alive`."""
        return self.is_alive

    def warm_up(self) -> None:
        """Runs the network once, because the first run takes longer; only warns if it takes no image of this size."""
        network = self.predictor.network
        picture = np.zeros((network.processor.num_channels, *WARM_UP), np.uint8)
        try:
            self.predictor(picture, "semantic", batch_size=network.batch)
        except ImageError as error:
            logger.warning(f"The network first runs for the first request, which takes longer: {error}")

    def submit(self, job: Job) -> None:
        """Starts a job."""
        job.answer.add_done_callback(lambda _: job.release())
        self.decoding.submit(self._guarded, self._decode, job)

    def close(self) -> None:
        """Finishes all jobs, then ends the threads."""
        self.decoding.shutdown()
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.network.join()
        self.answering.shutdown()

    def _guarded(self, stage: Callable[[Job], object], job: Job) -> None:
        """Runs a stage of one job; an error fails only this job."""
        if job.is_over:
            job.finish(RequestError(TOO_LATE.format(seconds=job.seconds), 504))
            return
        try:
            stage(job)
        except RequestError as error:
            job.finish(error)
        except Exception:
            logger.exception("An image could not be segmented.", extra={"facts": {"request": job.request}})
            job.finish(RequestError(FAILED, 500))

    def _decode(self, job: Job) -> None:
        with open_picture(BoundedFile(job), pixels=self.limits.pixels) as picture:
            picture.decodermaxblock = BYTES_AT_ONCE  # type: ignore[attr-defined]
            prepared = self.predictor._prepare((0, picture))
        job.picture = b""
        if prepared.error is not None:
            raise RequestError(str(prepared.error).replace("image 0", NAME))
        job.size = (prepared.image.height, prepared.image.width)
        job.facts |= {"height": job.size[0], "width": job.size[1]}
        job.values = prepared.values
        if job.is_over:  # checked after the values are set, because a cancelled job is released only once
            raise RequestError(TOO_LATE.format(seconds=job.seconds), 504)
        job.arrived = time.monotonic()
        with self.changed:
            self.groups.setdefault(tuple(prepared.values.shape), []).append(job)
            self.changed.notify()

    def _run_network(self) -> None:
        for batch in self._batches():
            self._run(batch)

    def _batches(self) -> Iterator[list[Job]]:
        """Yields full batches, and partial ones whose first job has waited long enough; ends after `close`."""
        while True:
            with self.changed:
                while True:
                    shape, left = self._next_group()
                    if shape is not None and left <= 0:
                        group = self.groups[shape]
                        batch, rest = group[: self.batch_size], group[self.batch_size :]
                        if rest:
                            self.groups[shape] = rest
                        else:
                            del self.groups[shape]
                        break
                    if shape is None and self.closing:
                        return
                    self.changed.wait(None if shape is None else left)
            yield batch

    def _next_group(self) -> tuple[tuple[int, ...] | None, float]:
        """The shape to run next and the seconds until then; (None, 0) without jobs. The longest-waiting goes first."""
        chosen, chosen_due = None, 0.0
        for shape in list(self.groups):
            group = [job for job in self.groups[shape] if not _dropped(job)]
            if not group:
                del self.groups[shape]
                continue
            self.groups[shape] = group
            is_full = len(group) >= self.batch_size or self.closing
            due = group[0].arrived + (0 if is_full else self.wait)
            if chosen is None or due < chosen_due:
                chosen, chosen_due = shape, due
        return chosen, chosen_due - time.monotonic()

    def _run(self, batch: list[Job]) -> None:
        """Runs the network; if that fails for the batch, runs it once per job, so that only faulty jobs fail."""
        values = [job.values for job in batch]
        batch = [job for job, own in zip(batch, values, strict=True) if own is not None]  # others were cancelled
        if not batch:
            return
        started = time.monotonic()
        try:
            outputs = self.predictor._run([own for own in values if own is not None])
        except Exception:
            if len(batch) > 1:
                for job in batch:
                    self._run([job])
                return
            logger.exception("The network failed.", extra={"facts": {"request": batch[0].request}})
            batch[0].finish(RequestError(FAILED, 500))
            return
        seconds = time.monotonic() - started
        self.on_batch(len(batch), seconds)
        for job, own in zip(batch, outputs, strict=True):
            job.values, job.outputs = None, own
            job.facts |= {"batch": len(batch), "waited": round(started - job.arrived, 6)}
            if job.is_over:  # cancelled before its outputs were set
                job.release()
            self.answering.submit(self._guarded, self._answer, job)

    def _answer(self, job: Job) -> None:
        outputs: dict[str, Tensor] | None = job.outputs
        if outputs is None:  # cancelled
            return
        if self.fused is not None:
            outputs = {**outputs, "fused_classes": self.fused}
        network = self.predictor.network
        found = segments_of(network.processor, outputs, job.size, job.parameters, network.config.id2label)
        segments = list(_documents(found, job))
        job.facts["segments"] = len(segments)
        job.finish(json.dumps(segments, allow_nan=False).encode())


def _dropped(job: Job) -> bool:
    """Whether the answer is no longer wanted; if so, finishes the job."""
    if job.is_over:
        job.finish(RequestError(TOO_LATE.format(seconds=job.seconds), 504))
        return True
    return False


def _documents(found: Iterable[tuple[float | None, str, np.ndarray]], job: Job) -> Iterator[dict[str, Any]]:
    """The segments in the response's format: `mask` is a PNG in base64, or compressed COCO run lengths."""
    whole = (0, 0, job.size[1] - 1, job.size[0] - 1)
    for score, label, mask in found:
        if job.is_over:
            raise RequestError(TOO_LATE.format(seconds=job.seconds), 504)
        encoded: Any = encode_run_lengths([mask], [whole], job.size)[0] if job.as_run_lengths else mask_png(mask)
        yield {"score": score, "label": label, "mask": encoded}


__all__ = ["Batcher", "BoundedFile", "Job", "Segmenter"]

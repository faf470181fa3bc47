"""The inference server of `faim2f serve`: the Hub's image-segmentation API over HTTP.

`POST /` takes an image's bytes, or JSON with `inputs` (base64) and `parameters`, and responds as an Inference Endpoint
does, but with masks as COCO RLE to `Accept: application/json` without `*/*`; see `model.inference_api_faim2f`.
`huggingface_hub.InferenceClient(URL).image_segmentation(...)` is a client.
`GET /health`, `/ready` and `/metrics` are for operators. Every error is JSON: {"error": one sentence}.

Logs are JSON lines, and `/metrics` is in Prometheus's text format.
"""

import asyncio
import hmac
import json
import logging
import re
import sys
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ..model.inference_api_faim2f import Parameters, RequestError, picture_bytes
from .batching import TOO_LATE, Job, Segmenter
from .requests import Limits

LOGGER = "hf_faim2f.serving"
# Upper bounds of the histogram buckets for seconds and for images.
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
IMAGES = (1, 2, 4, 8, 16, 32, 64)
logger = logging.getLogger(LOGGER)
# Content types of an image's bytes. The last is curl's default.
RAW = ("", "application/octet-stream", "application/x-www-form-urlencoded")
PATHS = "POST an image to /, or GET /health, /ready or /metrics"
# Paths that need no token.
OPEN = ("/health", "/ready")
# Bytes allowed in a JSON body in addition to the image; and seconds for which the rest of a rejected body is read,
# because a client that is cut off while sending would not see the response.
BESIDE_PICTURE, DRAIN_SECONDS = 1 << 16, 5.0
# Maximum number of commas and opening brackets in a JSON body. A request has about ten; parsed, a body of empty lists
# would take more than twenty times its size.
MOST_VALUES = 1000
# Larger bodies are parsed in a thread, so that other requests do not have to wait.
LARGE_BODY = 1 << 18
# Bytes of a response written at once; the next chunk waits until the client has received most of this one.
CHUNK = 1 << 16
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
GONE = 499  # the status in logs and metrics of a request whose client disconnected
# Keys in a request's scope: the facts for its log line, and whether part of its body is still unread.
FACTS, UNREAD = "faim2f.facts", "faim2f.unread"
LONGEST_PATH = 100


class JsonLines(logging.Formatter):
    """Formats a record as one line of JSON: time (UTC), level, message, and the record's `facts`, if it has any."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line)


def log_as_json() -> None:
    """Writes the logs of this package's server, and warnings of uvicorn and Ray Serve, to standard error as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in ((LOGGER, logging.INFO), ("uvicorn", logging.WARNING), ("ray.serve", logging.WARNING)):
        kept = logging.getLogger(name)
        kept.handlers, kept.propagate = [handler], False
        kept.setLevel(level)


class Metrics:
    """The metrics of one server.

    Names and units follow Prometheus's conventions: counters end with `_total`, times are in seconds.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kept: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("faim2f_requests", "Requests for segments, by HTTP status.", ["status"], **kept)
        self.seconds = Histogram("faim2f_request_seconds", "Time of an answered request.", buckets=SECONDS, **kept)
        self.images = Histogram("faim2f_batch_images", "Images per run of the network.", buckets=IMAGES, **kept)
        self.network = Histogram("faim2f_network_seconds", "Time of a run of the network.", buckets=SECONDS, **kept)
        self.accepted = Gauge("faim2f_accepted_requests", "Requests that are being received or answered now.", **kept)
        self.places = Gauge("faim2f_places", "The most requests that are accepted at once.", **kept)

    def on_batch(self, count: int, seconds: float) -> None:
        """Counts a run of the network."""
        self.images.observe(count)
        self.network.observe(seconds)

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self.registry)


class HeldResponse(Response):
    """A response that holds its request's slot until all but the last chunk are sent, or the time limit is over.

    A client that has received the last chunk may send its next request, which must find the slot free.

    Args:
        content: the JSON document.
        seconds: the time limit for sending it.
        release: releases the slot.
    """

    media_type = "application/json"

    def __init__(self, content: bytes, seconds: float, release: Callable[[], None]) -> None:
        super().__init__(content)
        self.seconds, self.release, self.is_released = seconds, release, False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await asyncio.wait_for(self._send(send), self.seconds)
        except asyncio.TimeoutError:  # the server closes the connection of an incomplete response
            scope[FACTS] |= {"status": GONE, "error": "The client did not receive the answer in time."}
        finally:
            self._release_once()

    def _release_once(self) -> None:
        if not self.is_released:
            self.is_released = True
            self.release()

    async def _send(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for start in range(0, len(self.body), CHUNK):
            part = bytes(self.body[start : start + CHUNK])
            if start + CHUNK >= len(self.body):
                self._release_once()
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body"})


class InferenceApp:
    """The server's ASGI application.

    Args:
        batcher: segments the images; `close`d when the server stops.
        limits: `bytes` and `pixels` of an image; `seconds` to receive it, and again to segment it; `waiting` is the
            number of requests that are accepted at once.
        token: clients must send it as "Authorization: Bearer TOKEN"; None for no token.
        metrics: where requests are counted.
    """

    def __init__(self, batcher: Segmenter, limits: Limits, token: str | None, metrics: Metrics) -> None:
        self.batcher, self.limits, self.metrics = batcher, limits, metrics
        self.token = None if token is None else token.encode()
        self.accepted, self.stopping = 0, False
        self.metrics.places.set(limits.waiting)
        # The pages that describe the interface are off because they load scripts from other hosts.
        api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=self._lifespan)
        api.add_api_route("/", self.segment, methods=["POST"])
        for name, answer in (("health", self.health), ("ready", self.ready), ("metrics", self.text_of_metrics)):
            api.add_api_route(f"/{name}", answer, methods=["GET"])
        api.add_exception_handler(RequestError, self._refuse)
        api.add_exception_handler(HTTPException, self._refuse_path)
        api.add_exception_handler(Exception, self._fail)
        self.api = api

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self.batcher.close)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Checks the token, and logs and counts each request."""
        if scope["type"] != "http":
            await self.api(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request = given.decode() if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        facts: dict[str, Any] = {"request": request, "method": scope["method"], "path": scope["path"][:LONGEST_PATH]}
        scope[FACTS] = facts
        status = 0

        async def send_marked(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [(b"x-request-id", request.encode()), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        started = time.monotonic()
        try:
            if scope["path"] in OPEN or self._is_authorized(headers.get(b"authorization", b"")):
                await self.api(scope, receive, send_marked)
            else:
                refusal = RequestError("This server requires its token: send it as Authorization: Bearer TOKEN.", 401)
                await (await self._refuse(Request(scope, receive), refusal))(scope, receive, send_marked)
        except Exception:  # answered by `_fail`
            logger.exception("A request failed.", extra={"facts": {"request": request}})
        finally:
            facts = {**facts, "status": facts.get("status", status), "seconds": round(time.monotonic() - started, 6)}
            if scope["path"] == "/":
                self.metrics.requests.labels(str(facts["status"])).inc()
                if facts["status"] == 200:
                    self.metrics.seconds.observe(facts["seconds"])
            if scope["path"] == "/" or facts["status"] >= 400:
                logger.info("request", extra={"facts": facts})

    def _is_authorized(self, authorization: bytes) -> bool:
        if self.token is None:
            return True
        scheme, _, given = authorization.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self.token)

    async def health(self) -> Response:
        """Whether the process is running."""
        return _document({"status": "ok"})

    async def ready(self) -> Response:
        """Whether requests can be answered: the model is loaded, its replicas run, and the server is not stopping."""
        if self.stopping or not self.batcher.is_alive:
            return _document({"error": "The server is stopping."}, 503)
        if not self.batcher.is_ready:
            return _document({"error": "No replica of the model takes requests; Ray's logs say why."}, 503)
        return _document({"status": "ready"})

    async def text_of_metrics(self) -> Response:
        """Metrics in Prometheus's text format."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def segment(self, request: Request) -> Response:
        """Segments an image.

        Raises:
            RequestError: the request is rejected; the error has the HTTP status.
        """
        if not self.batcher.is_alive:
            raise RequestError("The server is stopping: try again in a moment.", 503)
        if self.accepted >= self.limits.waiting:
            raise RequestError(f"The server is busy with {self.accepted} requests: try again in a moment.", 503)
        self.accepted += 1
        self.metrics.accepted.set(self.accepted)
        try:
            answer = await self._answer(request)
        except BaseException:
            self._release()
            raise
        return HeldResponse(answer, self.limits.seconds, self._release)

    def _release(self) -> None:
        self.accepted -= 1
        self.metrics.accepted.set(self.accepted)

    async def _answer(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise RequestError("Compressed bodies are not supported: send the request without Content-Encoding.", 415)
        if kind != "application/json" and kind not in RAW and not kind.startswith("image/"):
            raise RequestError(f"The content type {kind[:40]!a} is not supported: send an image or JSON.", 415)
        most = self.limits.bytes if kind != "application/json" else self.limits.bytes * 4 // 3 + BESIDE_PICTURE
        facts = request.scope[FACTS]
        try:
            body = await asyncio.wait_for(self._body(request, most), self.limits.seconds)
        except ClientDisconnect:
            return self._gone(request)
        except asyncio.TimeoutError as error:
            text = f"The request did not arrive within {self.limits.seconds:g} seconds: send a smaller image."
            raise RequestError(text, 408) from error
        facts["bytes"] = len(body)
        arguments = kind == "application/json", body, request.query_params.multi_items()
        if len(body) > LARGE_BODY:
            picture, parameters = await asyncio.to_thread(_picture_and_parameters, *arguments)
        else:
            picture, parameters = _picture_and_parameters(*arguments)
        if len(picture) > self.limits.bytes:
            raise self._too_large()
        accepted = _accepted(request.headers.getlist("accept"))
        as_run_lengths = "application/json" in accepted and "*/*" not in accepted
        job = Job(picture, parameters, as_run_lengths, self.limits.seconds, facts["request"])
        facts["subtask"] = parameters.subtask
        del body, picture, arguments
        return await self._wait(request, job)

    async def _body(self, request: Request, most: int) -> bytes:
        declared = request.headers.get("content-length", "0")
        if not declared.isdecimal() or int(declared) > most:
            raise self._too_large()
        parts = bytearray()
        async for part in request.stream():
            parts += part
            if len(parts) > most:
                raise self._too_large()
        request.scope[UNREAD] = False
        return bytes(parts)

    def _too_large(self) -> RequestError:
        return RequestError(f"The image's file has more than {self.limits.megabytes:g} MB: make it smaller.", 413)

    async def _wait(self, request: Request, job: Job) -> bytes:
        """Waits for a job's answer, and cancels the job if the client disconnects."""
        self.batcher.submit(job)
        answer = asyncio.wrap_future(job.answer)
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait((answer, gone), timeout=job.seconds, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            if gone.done():
                return self._gone(request)
            raise RequestError(TOO_LATE.format(seconds=job.seconds), 504)
        finally:
            job.answer.cancel()
            answer.cancel()
            gone.cancel()
            request.scope[FACTS] |= job.facts

    def _gone(self, request: Request) -> bytes:
        request.scope[FACTS] |= {"status": GONE, "error": "The client disconnected."}
        return b""

    async def _refuse(self, request: Request, error: Exception) -> Response:
        """Responds with an error's message, after the client has sent its body and reads the response."""
        status = getattr(error, "status", 500)
        request.scope[FACTS]["error"] = str(error)
        if status != 408 and b"expect" not in dict(request.scope["headers"]):
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._drain(request), DRAIN_SECONDS)
        more = {503: {"retry-after": "1"}, 401: {"www-authenticate": "Bearer"}}.get(status)
        return _document({"error": str(error)}, status, more)

    async def _drain(self, request: Request) -> None:
        taken, more = 0, request.scope.get(UNREAD, True)
        while more and taken <= self.limits.bytes:
            message = await request.receive()
            taken += len(message.get("body", b""))
            more = message.get("more_body", False)

    async def _refuse_path(self, request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        if status == 405:
            text = f"{request.method} is not supported at this path: {PATHS}."
        else:
            text = f"There is no path {request.url.path[:LONGEST_PATH]!a} here: {PATHS}."
        response = await self._refuse(request, RequestError(text, status))
        response.headers.update(getattr(error, "headers", None) or {})  # such as Allow
        return response

    async def _fail(self, request: Request, _: Exception) -> Response:
        """Responds to a request that hit a bug; the exception propagates to the log."""
        text = "The server failed on this request; its log has the reason under the request's id."
        return _document({"error": text}, 500)


def _document(content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(content), status, headers, "application/json")


async def _disconnected(request: Request) -> None:
    """Returns when the client has disconnected; call it after reading the body."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _picture_and_parameters(is_json: bool, body: bytes, pairs: list[tuple[str, str]]) -> tuple[bytes, Parameters]:
    """The image's file and the parameters of a request.

    Args:
        is_json: whether the body is JSON, or an image's file.
        body: the request's.
        pairs: the names and values of the URL's query.

    Raises:
        RequestError: the body or a parameter is invalid.
    """
    query = dict(pairs)
    if len(query) < len(pairs):
        raise RequestError("The address has a parameter more than once: give each of them one value.")
    if not body:
        raise RequestError("The body is empty, and cannot be read as an image: send an image's file, or JSON.")
    if not is_json:
        return body, Parameters.of(query)
    if sum(map(body.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise RequestError(
            "The body has too many values: send an object with inputs, a text in base64, and parameters."
        )
    try:
        document = json.loads(body, object_pairs_hook=_object)
    except RequestError:
        raise
    except (ValueError, RecursionError) as error:
        raise RequestError("The body is not valid JSON: send an object with inputs and parameters.") from error
    if not isinstance(document, dict) or "inputs" not in document:
        raise RequestError("The body has no field inputs: send an object with inputs, the image's file in base64.")
    return picture_bytes(document["inputs"]), Parameters.of_request(document, query)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of the body; raises RequestError for a repeated name, of which JSON's reader keeps the last."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise RequestError("The body has a field or a parameter more than once: give each of them one value.")
    return values


def _accepted(headers: Iterable[str]) -> set[str]:
    """The media types in Accept headers, in lowercase, without those of weight 0, which clients do not accept."""
    found = set()
    for part in ",".join(headers).lower().split(","):
        kind, *settings = (word.strip() for word in part.split(";"))
        if not any(re.fullmatch(r"q=0(\.0*)?", setting) for setting in settings):
            found.add(kind)
    return found


__all__ = ["LOGGER", "InferenceApp", "JsonLines", "Metrics", "log_as_json"]

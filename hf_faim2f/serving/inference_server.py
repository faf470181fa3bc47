"""Runs the inference server of `faim2f serve`: opens the model, binds the port, and shuts down gracefully."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import SettingsError
from ..runtime.predictor import Predictor
from ..zoo import runtimes_of
from .requests import Limits
from .server import LOCAL, address_of, bound_socket

if TYPE_CHECKING:
    from .batching import Segmenter

TOKEN = "FAIM2F_TOKEN"
LEAST_TOKEN = 16
# Seconds before an idle connection is closed; common clients close theirs earlier.
KEEP_ALIVE = 30
# Opens the segmenter, given the server's address and a function that counts batches.
Opener = Callable[[str, Callable[[int, float], object]], "Segmenter"]


@dataclass(frozen=True)
class ServeSettings:
    """The inference server's settings.

    Args:
        model: a folder, published name or Hub id, or an export's folder whose outputs are logits.
        runtime: a key of `RUNTIMES`; None for the first that the folder has files for.
        device, precision: see `Predictor.from_pretrained`.
        host: the address to listen on; any but a loopback address needs a token.
        port: 0 for any free port.
        batch_size: the largest batch; None for the network's default: 1 on a CPU, 4 on a GPU.
        batch_wait: how long a partial batch waits for more images of the same size, in seconds.
        limits: on requests; `waiting` is the number of requests that are accepted at once.
    """

    model: str
    runtime: str | None = None
    device: str | None = None
    precision: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    batch_size: int | None = None
    batch_wait: float = 0.005
    limits: Limits = field(default_factory=lambda: Limits(waiting=64))


def token_for(host: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """The access token from the environment; None if there is none.

    Raises:
        SettingsError: there is none although other machines can reach the host; or it is shorter than 16 characters,
            or not printable ASCII without spaces.
    """
    token = environment.get(TOKEN, "").strip()
    if not token:
        if host in LOCAL:
            return None
        raise SettingsError(
            f"Anyone who can reach {host} could use the server: set {TOKEN} to a token that clients must send, or "
            "leave out --host."
        )
    if len(token) < LEAST_TOKEN or not (token.isascii() and token.isprintable()) or " " in token:
        raise SettingsError(f"{TOKEN} must have at least {LEAST_TOKEN} printable ASCII characters, without spaces.")
    return token


class InferenceServer:
    """A server that is bound to its port, with its model loaded. `run` serves.

    Args:
        settings: the server's settings.
        predictor: the opened model; None to open `settings.model`.
        open_segmenter: opens replicas in other processes, after the port is bound; None for a `Batcher` in this one.

    Raises:
        ValueError, OSError, ImportError: invalid settings, an unusable model or port, or a missing library; one
            sentence.
    """

    def __init__(
        self, settings: ServeSettings, predictor: Predictor | None = None, open_segmenter: Opener | None = None
    ) -> None:
        token = token_for(settings.host)
        try:
            import uvicorn

            from .inference import InferenceApp, Metrics
        except ImportError as error:
            raise ImportError(
                f"The server needs {error.name}, which cannot be imported ({error}): install hf-faim2f[serve]."
            ) from error
        from .batching import Batcher

        if predictor is None and open_segmenter is None:
            runtime = settings.runtime or runtimes_of(settings.model)[0]
            predictor = Predictor.from_pretrained(settings.model, runtime, settings.device, settings.precision)
        self.metrics = Metrics()
        self.socket = bound_socket(settings.host, settings.port, "The model")
        self.address = address_of(settings.host, int(self.socket.getsockname()[1]))
        limits = settings.limits
        self.batcher: Any
        try:
            if open_segmenter is not None:
                self.batcher = open_segmenter(self.address, self.metrics.on_batch)
            else:
                assert predictor is not None
                self.batcher = Batcher(
                    predictor, settings.batch_size, settings.batch_wait, limits, on_batch=self.metrics.on_batch
                )
                self.batcher.warm_up()
        except BaseException:
            self.socket.close()
            raise
        self.app = InferenceApp(self.batcher, limits, token, self.metrics)
        config = uvicorn.Config(
            self.app, log_config=None, access_log=False, server_header=False, proxy_headers=False, ws="none",
            lifespan="on", timeout_keep_alive=KEEP_ALIVE, timeout_graceful_shutdown=int(3 * limits.seconds) + 1,
        )  # fmt: skip
        server: Any = uvicorn.Server(config)
        # uvicorn would re-raise the signal that stopped it, so that the process ends with a nonzero status.
        server.capture_signals = self._capture_signals
        self.uvicorn = server
        self.socket.listen(config.backlog)  # from here on clients can connect, and are answered when `run` is called

    def run(self) -> None:
        """Serves until `stop`, SIGTERM or Ctrl+C, then finishes the accepted requests. A second Ctrl+C drops them."""
        self.uvicorn.run(sockets=[self.socket])

    def stop(self) -> None:
        """Makes `run` finish; for other threads."""
        self.app.stopping = True
        self.uvicorn.should_exit = True

    @contextmanager
    def _capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: Any) -> None:
            if number == signal.SIGINT and self.uvicorn.should_exit:
                self.uvicorn.force_exit = True
            self.stop()

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def serve(settings: ServeSettings, open_segmenter: Opener | None = None) -> None:
    """Serves a model until the process is interrupted or terminated, and logs to standard error.

    Args:
        settings, open_segmenter: see `InferenceServer`.

    Raises:
        ValueError, OSError, ImportError: see `InferenceServer`.
    """
    server = InferenceServer(settings, open_segmenter=open_segmenter)
    from .inference import log_as_json

    log_as_json()
    print(f"The model is at {server.address} (Ctrl+C ends it).", flush=True)
    server.run()


__all__ = ["TOKEN", "InferenceServer", "ServeSettings", "serve", "token_for"]

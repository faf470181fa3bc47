"""Serves the page on a port, with bounded requests, and with headers that prevent it from loading external resources.

All its files are in one temporary folder, which is removed when the server stops.
"""

import contextlib
import json
import os
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..runtime.drawing import supervision
from .requests import Limits, RequestHandler, open_choices

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# Maximum bytes of a request without a file, which holds settings and a path.
MOST_BYTES = 1 << 20
UPLOAD = "/gradio_api/upload"
# Gradio compiles its templates in the browser, which needs 'unsafe-eval'. frame-ancestors is unset, because a Space is
# shown in a frame.
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'; form-action 'self'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]


# Disable telemetry and the history of runs. Gradio reads these when it is imported or its components are created.
ENVIRONMENT = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_RUN_HISTORY": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
FOLDER = "GRADIO_TEMP_DIR"
# Number of pages whose state is kept.
SESSIONS = 32
LOCAL = ("127.0.0.1", "localhost", "::1")


class TooLarge(Exception):
    """A request has more bytes than allowed."""


class Guard:
    """ASGI middleware that limits the size of requests, refuses those for files at other addresses, and adds security
    headers to responses.

    Args:
        app: the application.
        most_uploaded: maximum total bytes of the files in a request.
    """

    def __init__(self, app: Any, most_uploaded: int) -> None:
        self.app, self.most_uploaded = app, most_uploaded

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # Apart from the files, an upload request is small.
        is_upload = scope["path"].endswith(UPLOAD)
        most = MOST_BYTES + (self.most_uploaded if is_upload else 0)
        taken, started = 0, False

        async def bounded_receive() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > most:
                raise TooLarge
            return message

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message = {**message, "headers": [*message["headers"], *HEADERS]}
            await send(message)

        try:
            declared = dict(scope["headers"]).get(b"content-length", b"0")
            if not declared.isdigit() or int(declared) > most:
                raise TooLarge
            if scope["method"] == "POST" and not is_upload:
                messages = await _whole_body(bounded_receive)
                if _names_an_address(b"".join(message.get("body", b"") for message in messages)):
                    await _refuse(send, 400, "This page loads no files from other addresses: upload the image.")
                    return
                await self.app(scope, _replayed(messages, bounded_receive), send_with_headers)
            else:
                await self.app(scope, bounded_receive, send_with_headers)
        except TooLarge:
            if not started:
                await _refuse(send, 413, f"This request has more than {most} bytes.")


async def _refuse(send: Send, status: int, text: str) -> None:
    body = text.encode()
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode()), *HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _whole_body(receive: Receive) -> list[Message]:
    """The messages of a request's body, or up to the client's disconnection."""
    messages = [await receive()]
    while messages[-1].get("more_body"):
        messages.append(await receive())
    return messages


def _replayed(messages: list[Message], receive: Receive) -> Receive:
    async def receive_again() -> Message:
        return messages.pop(0) if messages else await receive()

    return receive_again


def _names_an_address(body: bytes) -> bool:
    """Whether a JSON document has a file whose path is an address, which Gradio would download whole, into memory."""
    found = False

    def check(pairs: list[tuple[str, Any]]) -> None:  # sees repeated names, too
        nonlocal found
        found = found or any(name == "path" and isinstance(value, str) and "://" in value for name, value in pairs)

    try:
        json.loads(body, object_pairs_hook=check)
    except RecursionError:
        return True
    except ValueError:  # not JSON, which Gradio refuses
        return False
    return found


@dataclass(frozen=True)
class Settings:
    """The server's settings.

    Args:
        model: a folder or Hub id.
        exports: folders written by `faim2f export` or `faim2f quantize` for the same model.
        examples: a folder of images; None for generated ones, if available for the model.
        host: the address to listen on; "0.0.0.0" for all interfaces.
        port: 0 for any free port.
        device: see `Predictor.from_pretrained`.
        limits: limits on a visitor's requests.
    """

    model: str
    exports: Sequence[str] = ()
    examples: Path | None = None
    host: str = "127.0.0.1"
    port: int = 7860
    device: str | None = None
    limits: Limits = field(default_factory=Limits)


@contextlib.contextmanager
def serving(settings: Settings) -> Iterator[tuple[str, list[str]]]:
    """Serves the page within the context; yields its address, and notes for the server's operator.

    Raises:
        ValueError, OSError, ImportError: a model, an example or the port cannot be used; one sentence.
    """
    port = free_port(settings.host, settings.port)
    for name, value in ENVIRONMENT.items():
        os.environ[name] = value
    choices, notes = open_choices(settings.model, settings.exports, settings.device)
    with tempfile.TemporaryDirectory(prefix="faim2f-app-", ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        os.environ[FOLDER] = str(folder)
        try:
            # Imported here because Gradio reads the environment when it is imported.
            from starlette.middleware import Middleware

            from .page import CSS, build_page, example_pictures, theme
        except ImportError as error:
            raise ImportError(
                f"The page needs {error.name}, which cannot be imported ({error}): install hf-faim2f[app]."
            ) from error
        supervision()
        limits = settings.limits
        labels = next(iter(choices.values())).predictor.network.config.id2label
        handler = RequestHandler(choices, limits, folder)
        page: Any = build_page(choices, handler, limits, example_pictures(settings.examples, labels, limits, folder))
        try:
            page.launch(
                server_name=settings.host, server_port=port, share=False, inbrowser=False, quiet=True,
                prevent_thread_lock=True, show_error=False, footer_links=[], allowed_paths=[], pwa=False,
                max_file_size=limits.bytes, max_threads=8, state_session_capacity=SESSIONS, ssr_mode=False,
                mcp_server=False, enable_monitoring=False, strict_cors=True, theme=theme(), css=CSS,
                app_kwargs={"middleware": [Middleware(Guard, most_uploaded=limits.bytes)], "docs_url": None,
                            "redoc_url": None, "openapi_url": None},
            )  # fmt: skip
            if settings.host not in LOCAL:
                notes.append(f"Anyone who can reach {settings.host} can use the page: it asks for no password.")
            yield address_of(settings.host, port), notes
        finally:
            page.close(verbose=False)
            handler.close()
            os.environ.pop(FOLDER, None)


def free_port(host: str, port: int) -> int:
    """Checks that a port is free, or finds a free one for 0.

    Raises:
        OSError: the port is taken, or the host is not an address of this machine.
    """
    with bound_socket(host, port, "The page") as probe:
        return int(probe.getsockname()[1])


def bound_socket(host: str, port: int, what: str) -> socket.socket:
    """A socket bound to a port, or to any free one for 0.

    Args:
        host, port: the address to bind.
        what: what will be served there, for the message.

    Raises:
        OSError: the port is taken, or the host is not an address of this machine.
    """
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(kind, socket.SOCK_STREAM)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
        return bound
    except OSError as error:
        reason = (error.strerror or str(error)).rstrip(".")
        raise OSError(
            f"{what} cannot be served at {host}, port {port} ({reason}): choose another --port, or stop what uses it."
        ) from error


def address_of(host: str, port: int) -> str:
    """The address of a server, as a URL."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


__all__ = ["LOCAL", "Guard", "Settings", "address_of", "bound_socket", "free_port", "serving"]

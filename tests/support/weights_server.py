"""A file server on 127.0.0.1 that supports range requests, with faults on demand."""

import hashlib
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

PAGE = b"<!DOCTYPE html><html><body>Please log in.</body></html>"


@dataclass
class Fault:
    """A fault injected into some requests.

    Args:
        how: a status to respond with; "cut" closes the connection after `at` bytes of the body, "drop" without a
            response; "page" sends a web page, "disguised" sends it as bytes; "short" announces fewer bytes than are
            sent; "hang" waits after `at` bytes until `released`; "whole" ignores ranges; "elsewhere" sends another
            range.
        times: how often the fault occurs.
        headers: headers of the response.
        at: bytes of the body.
    """

    how: int | str
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    at: int = 1000


@dataclass
class WeightsServer:
    """The server's state, which tests set up and inspect."""

    files: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)  # paths and headers of the requests
    validators: bool = True  # whether responses have ETags
    url: str = ""
    reached: threading.Event = field(default_factory=threading.Event)  # set when a request hangs
    released: threading.Event = field(default_factory=threading.Event)
    lock: Any = field(default_factory=threading.Lock)

    def fault(self) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    @property
    def ranges(self) -> list[str | None]:
        """The requested range of each request."""
        return [headers.get("range") for _, headers in self.asked]


def _handler(server: WeightsServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            server.asked.append((self.path, headers))
            fault = server.fault()
            how = fault.how if fault else None
            more = fault.headers if fault else {}
            content = server.files.get(self.path.partition("?")[0])
            if how == "drop":
                self.close_connection = True
            elif isinstance(how, int):
                self.answer(how, more, b"no")
            elif how in ("page", "disguised"):
                self.answer(200, {"Content-Type": "text/html" if how == "page" else "binary/octet-stream"}, PAGE)
            elif content is None:
                self.answer(404, {"Content-Type": "text/html"}, PAGE)
            else:
                self.send_file(content, headers, fault)

        def send_file(self, content: bytes, headers: dict[str, str], fault: Fault | None) -> None:
            how = fault.how if fault else None
            validator = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
            first, status = 0, 200
            own = {"Content-Type": "binary/octet-stream", **({"ETag": validator} if server.validators else {})}
            found = re.fullmatch(r"bytes=(\d+)-", headers.get("range", ""))
            if found and headers.get("if-range", validator) == validator and how != "whole":
                first, status = int(found[1]) + (how == "elsewhere"), 206
                if first >= len(content):
                    self.answer(416, {"Content-Range": f"bytes */{len(content)}"})
                    return
                own["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            body = content[first:]
            own["Content-Length"] = str(len(body) - (10 if how == "short" else 0))
            own |= fault.headers if fault else {}
            self.send_response(status)
            for name, value in own.items():
                self.send_header(name, value)
            self.end_headers()
            if fault is not None and how in ("cut", "hang"):
                self.wfile.write(body[: fault.at])
                self.wfile.flush()
                if how == "hang":
                    server.reached.set()
                    server.released.wait(60)
                    self.wfile.write(body[fault.at :])
                else:
                    self.close_connection = True
            else:
                self.wfile.write(body)

    return Handler


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that disconnected
            raise


@contextmanager
def running_weights_server() -> Iterator[WeightsServer]:
    server = WeightsServer()
    with _Quiet(("127.0.0.1", 0), _handler(server)) as http:
        server.url = f"http://127.0.0.1:{http.server_address[1]}"
        thread = threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            http.shutdown()
            thread.join()


def go_online(monkeypatch: pytest.MonkeyPatch, online: bool = True) -> None:
    """Allows huggingface_hub's sessions to send requests, which tests/conftest.py forbids; or forbids them again."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", not online)
    if hasattr(
        huggingface_hub, "configure_http_backend"
    ):  # before 1.0, which selects the adapter when a session is created
        huggingface_hub.configure_http_backend()

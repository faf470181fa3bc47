"""Around the whole server: requests are of a bounded size, and the page loads nothing from elsewhere."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# A request without a file: choices, and a path.
MOST_BYTES = 1 << 20
# Gradio compiles its templates in the page, for which it needs 'unsafe-eval'. A Space stands in a frame of its host.
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'; form-action 'self'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]


class TooLarge(Exception):
    """A request has more bytes than it may."""


class Guard:
    """Between the network and an ASGI application.

    Args:
        app: the application.
        most_uploaded: bytes of a request that brings files.
    """

    def __init__(self, app: Any, most_uploaded: int) -> None:
        self.app, self.most_uploaded = app, most_uploaded

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # What surrounds a file in its request is small.
        most = MOST_BYTES + (self.most_uploaded if scope["path"].endswith("/upload") else 0)
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
            await self.app(scope, bounded_receive, send_with_headers)
        except TooLarge:
            if not started:
                text = f"This request has more than {most} bytes.".encode()
                headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(text)).encode())]
                await send({"type": "http.response.start", "status": 413, "headers": [*headers, *HEADERS]})
                await send({"type": "http.response.body", "body": text})


__all__ = ["Guard"]

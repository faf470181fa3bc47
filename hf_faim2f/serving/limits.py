"""What one visitor of the page may take: bytes, pixels, seconds, and places in the queue."""

from dataclasses import dataclass

MEGA = 1_000_000


class WebError(ValueError):
    """What a visitor asked for cannot be done. One sentence, for the page."""


@dataclass(frozen=True)
class Limits:
    """Bounds of a request.

    Args:
        megabytes: of an uploaded file.
        megapixels: of a picture; they are counted before it is decoded.
        seconds: from the start of the work on a picture to its end.
        waiting: pictures that may wait for those before them.
    """

    megabytes: float = 20.0
    megapixels: float = 25.0
    seconds: float = 60.0
    waiting: int = 16

    @property
    def bytes(self) -> int:
        """Of an uploaded file."""
        return int(self.megabytes * MEGA)

    @property
    def pixels(self) -> int:
        """Of a picture."""
        return int(self.megapixels * MEGA)


__all__ = ["Limits", "WebError"]

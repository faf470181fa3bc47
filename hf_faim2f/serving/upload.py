"""A stranger's file as a picture, of which only the head is read before its size is known to be bearable."""

from pathlib import Path

from PIL import Image

from ..model.image_loading_faim2f import IMAGE_FORMATS, READ_FORMATS
from .limits import MEGA, Limits, WebError

LONGEST_SHOWN = 60


def open_picture(path: Path, name: str, limits: Limits) -> Image.Image:
    """The picture, not decoded yet; of several frames it is the first.

    Args:
        path: of the file.
        name: what its owner calls it, for messages.

    Raises:
        WebError: it is no picture, or has too many pixels or bytes.
    """
    if path.stat().st_size > limits.bytes:
        raise WebError(f"{name} has more than {limits.megabytes:g} MB: save it smaller, or with more compression.")
    try:
        picture = Image.open(path, formats=IMAGE_FORMATS)
    except Image.DecompressionBombError as error:
        raise WebError(f"{name} has more than {limits.megapixels:g} million pixels: make it smaller.") from error
    except Exception as error:  # a plugin raises whatever a broken head makes it raise
        raise WebError(f"{name} cannot be read as a picture: {READ_FORMATS} files can.") from error
    width, height = picture.size
    if width * height > limits.pixels:
        picture.close()
        raise WebError(
            f"{name} has {width}x{height} pixels, {width * height / MEGA:.1f} million, and this page takes "
            f"{limits.megapixels:g} million: make it smaller."
        )
    return picture


def shown_name(name: str) -> str:
    """A file's own name, short and printable, without folders."""
    last = name.replace("\\", "/").rpartition("/")[2]
    printable = "".join(character if character.isprintable() else "?" for character in last)
    if len(printable) > LONGEST_SHOWN:
        printable = printable[: LONGEST_SHOWN - 1] + "…"
    return printable or "picture"


__all__ = ["open_picture", "shown_name"]

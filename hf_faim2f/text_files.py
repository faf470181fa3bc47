"""Text files as people's editors write them: UTF-8, of which Windows' begin with a byte order mark."""

import codecs
from pathlib import Path

UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: Path) -> str:
    """The text of a file, without a byte order mark, its lines ending in "\\n".

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8, in words that say what it is and follow "...: ".
    """
    return decode_text(path.read_bytes())


def decode_text(content: bytes) -> str:
    """The text of the contents of a file; see `read_text`."""
    # Without a mark, text of few letters beyond ASCII is UTF-8 to the letter, with a zero beside each of them.
    if content.startswith(UTF_16) or b"\0" in content:
        raise ValueError('it is UTF-16, which Notepad calls "Unicode", or no text: save it as UTF-8')
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is in another encoding: save it as UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


__all__ = ["decode_text", "read_text"]

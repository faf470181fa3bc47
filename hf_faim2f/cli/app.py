"""`faim2f app`: a web page on which a model segments pictures, on this machine."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..serving.server import Settings
from ..serving.space import serve
from ..serving.work import Limits
from .output import MISTAKES, mistake
from .parser import OneSentenceParser

PROGRAM = "faim2f app"
DESCRIPTION = "Serves a web page on which a model segments pictures."
EXAMPLES = (
    ("A model, and the same in other runtimes to choose from, on http://127.0.0.1:7860", "my-model my-onnx my-int8"),
    ("For the network, on port 8000", "my-model --host 0.0.0.0 --port 8000 --examples photos"),
)
DEFAULTS = Limits()


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Runs the command; 0 when the page was ended, 2 for a mistake in what was asked, told in one sentence."""
    options = build_parser(program).parse_args(arguments)
    limits = Limits(options.max_megabytes, options.max_megapixels, options.time_limit)
    try:
        if options.examples is not None and not options.examples.is_dir():
            raise ValueError(f"There is no folder {options.examples}: name one with pictures, or leave --examples out.")
        serve(
            Settings(
                options.model, options.exports, options.examples, options.host, options.port, options.device, limits
            )
        )
    except MISTAKES as error:
        return mistake(program, error)
    return 0


def build_parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """The command's parser."""
    parser = OneSentenceParser(prog=program, description=DESCRIPTION, examples=EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help="a model's folder or Hub id, or a folder of `faim2f export`")
    exports = "folders of `faim2f export` and `faim2f quantize` of the same model, to choose from on the page"
    parser.add_argument("exports", metavar="EXPORT", nargs="*", help=exports)
    examples = "a folder of pictures to try (default: for a model of digits, scenes of them; else none)"
    parser.add_argument("--examples", type=Path, metavar="DIR", help=examples)
    host = f"where it listens (default: {Settings.host}, for this machine alone; 0.0.0.0 for the network)"
    parser.add_argument("--host", default=Settings.host, metavar="NAME", help=host)
    port = f"where it is found on that host (default: {Settings.port}; 0 for any that is free)"
    parser.add_argument("--port", type=_port, default=Settings.port, metavar="N", help=port)
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    bounds = {
        "--max-megabytes": (DEFAULTS.megabytes, "megabytes of a picture's file"),
        "--max-megapixels": (DEFAULTS.megapixels, "million pixels of a picture"),
        "--time-limit": (DEFAULTS.seconds, "seconds for a picture"),
    }
    for flag, (default, text) in bounds.items():
        parser.add_argument(
            flag, type=_above_zero, default=default, metavar="X", help=f"{text}, at most (default: {default:g})"
        )
    return parser


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")
    return int(text)


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value

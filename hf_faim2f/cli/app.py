"""`faim2f app`: serves a web page on which a model segments images."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..errors import SettingsError
from ..model.inference_api_faim2f import MEGA
from ..serving.requests import Limits
from ..serving.server import Settings
from ..serving.space import serve
from .output import MISTAKES, mistake, use_weights_url
from .parser import MODEL_HELP, OneSentenceParser

PROGRAM = "faim2f app"
DESCRIPTION = "Serves a web page on which a model segments images."
EXAMPLES = (
    ("A model and its exports, to compare runtimes, on http://127.0.0.1:7860", "my-model my-onnx my-int8"),
    ("For the network, on port 8000", "my-model --host 0.0.0.0 --port 8000 --examples photos"),
)
DEFAULTS = Limits()


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Runs the command; returns 0 when the page is stopped, or 2 after one sentence on standard error."""
    options = build_parser(program).parse_args(arguments)
    limits = Limits(options.max_megabytes, options.max_megapixels, options.time_limit)
    try:
        if options.examples is not None and not options.examples.is_dir():
            raise SettingsError(f"There is no folder {options.examples}: name one with images, or omit --examples.")
        use_weights_url(options.weights_url, options.model, *options.exports)
        serve(
            Settings(
                options.model, options.exports, options.examples, options.host, options.port, options.device, limits
            )
        )
    except MISTAKES as error:
        return mistake(program, error)
    return 0


def build_parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """Builds the command's parser."""
    parser = OneSentenceParser(prog=program, description=DESCRIPTION, examples=EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help=f"{MODEL_HELP}, or the folder of a graph")
    exports = "folders that you trust, written by `faim2f export` or `faim2f quantize` for the same model"
    parser.add_argument("exports", metavar="EXPORT", nargs="*", help=exports)
    examples = "a folder of example images (default: generated scenes for a digits model, else none)"
    parser.add_argument("--examples", type=Path, metavar="DIR", help=examples)
    host = f"address to listen on (default: {Settings.host}, this machine only); 0.0.0.0 for all interfaces: the "
    host += "page asks for no password"
    parser.add_argument("--host", default=Settings.host, metavar="NAME", help=host)
    port = f"port to listen on; 0 for any free one (default: {Settings.port})"
    parser.add_argument("--port", type=port_number, default=Settings.port, metavar="N", help=port)
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    add_limits(parser)
    parser.add_weights_url()
    return parser


def add_limits(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `Limits` on one image."""
    megapixels = "maximum image size, in megapixels, up to the 89 that Pillow takes for safe"
    bounds = {
        "--max-megabytes": (above_zero, DEFAULTS.megabytes, "maximum image file size, in megabytes"),
        "--max-megapixels": (safe_megapixels, DEFAULTS.megapixels, megapixels),
        "--time-limit": (above_zero, DEFAULTS.seconds, "time limit per image, in seconds"),
    }
    for flag, (kind, default, text) in bounds.items():
        parser.add_argument(flag, type=kind, default=default, metavar="X", help=f"{text} (default: {default:g})")


def port_number(text: str) -> int:
    """The argparse type of --port: an integer from 0 to 65535."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")
    return int(text)


def safe_megapixels(text: str) -> float:
    """The argparse type of --max-megapixels: a number above 0, up to Pillow's limit, above which nothing is decoded."""
    value, limit = above_zero(text), Image.MAX_IMAGE_PIXELS
    if limit is not None and value * MEGA > limit:
        raise argparse.ArgumentTypeError(f"{text!r} is more than the {limit // MEGA} that Pillow takes for safe")
    return value


def above_zero(text: str) -> float:
    """The argparse type of a number above 0 and below 1,000,000."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value

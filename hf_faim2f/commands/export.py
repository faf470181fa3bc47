"""`faim2f export`: models as files that other runtimes run."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..export.errors import ExportError
from .telling import mistake, say

PROGRAM = "faim2f export"
DESCRIPTION = "Models as files that other runtimes run."
REPORTED_SIZE = (640, 640)  # of which the work is told where the graph takes any


def _size(text: str) -> tuple[int, int] | None:
    if text == "dynamic":
        return None
    height, times, width = text.partition("x")
    if not (times and height.isdigit() and width.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is neither HEIGHTxWIDTH, such as 640x640, nor dynamic")
    return int(height), int(width)


def _batch(text: str) -> int | None:
    if text == "dynamic":
        return None
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of images nor dynamic")
    return int(text)


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Adds `export` and its formats to the commands of `faim2f`."""
    parser: argparse.ArgumentParser = subparsers.add_parser("export", help=DESCRIPTION)
    _add_formats(parser)
    return parser


def _add_formats(parser: argparse.ArgumentParser) -> None:
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    onnx = formats.add_parser("onnx", help="an ONNX graph, compared with torch before it is kept")
    onnx.add_argument("model", metavar="MODEL", help="a folder of a faim2f model, or its name on the Hub")
    onnx.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="the folder to write; it must not exist")
    onnx.add_argument(
        "--outputs",
        choices=("logits", "semantic", "instances", "queries"),
        default="logits",
        help="what the graph returns: class and mask logits, a label map, the best instances, or every query",
    )
    onnx.add_argument(
        "--input",
        choices=("pixel_values", "image"),
        default="pixel_values",
        help="normalized floats, or the bytes of RGB images (B, 3, H, W), which the graph normalizes",
    )
    onnx.add_argument("--size", type=_size, metavar="HxW|dynamic", help="dynamic where not given")
    onnx.add_argument("--batch", type=_batch, metavar="N|dynamic", help="dynamic where not given")
    onnx.add_argument("--precision", choices=("fp32", "fp16"), default="fp32", help="of weights and network")
    onnx.add_argument("--opset", type=int, default=18, metavar="N", help="18 (the default) to 20")
    onnx.add_argument("--no-check", action="store_true", help="keep the graph without comparing it with torch")


def run(options: argparse.Namespace, program: str = PROGRAM) -> int:
    """Runs the command; 0 if OUT_DIR was written, 2 if not, with one sentence on standard error."""
    from ..export.onnx import export_onnx

    logging.disable_progress_bar()
    try:
        lines = export_onnx(
            options.model,
            options.out_dir,
            outputs=options.outputs,
            input_name=options.input,
            size=options.size,
            batch=options.batch,
            precision=options.precision,
            opset=options.opset,
            verify=not options.no_check,
        )
    except (ExportError, OSError) as error:
        return mistake(program, error)
    from ..export.report import report

    for line in lines or ["not verified (--no-check)"]:
        say(line)
    height, width = options.size or REPORTED_SIZE
    images = options.batch or 1
    say(
        f"{report(options.out_dir / 'model.onnx', images, (height, width))} for {images} "
        f"{'image' if images == 1 else 'images'} of {height}x{width}"
    )
    if options.size is not None:
        say(f"the processor beside the graph resizes to {height}x{width}, as the graph needs")
    say(f"{options.out_dir}: written")
    return 0


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Parses and runs; 0 for success, 2 for a mistake in what was asked, told in one sentence."""
    parser = argparse.ArgumentParser(prog=program, description=DESCRIPTION)
    _add_formats(parser)
    return run(parser.parse_args(arguments), program)

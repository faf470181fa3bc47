"""`faim2f export`: models as files that other runtimes run."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from transformers.utils import logging

from ..export.errors import ExportError
from ..export.tensorrt import GPUS, MODULES, PRECISIONS, export_tensorrt
from .telling import mistake, say

PROGRAM = "faim2f export"
DESCRIPTION = "Models as files that other runtimes run."
REPORTED_SIZE = (640, 640)  # of which the work is told where the graph takes any
_Value = TypeVar("_Value")


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


def _range(text: str, read: Callable[[str], _Value | None]) -> tuple[_Value, ...]:
    values = tuple(read(part) for part in text.split(":"))
    if len(values) != 3 or None in values:
        raise argparse.ArgumentTypeError(f"{text!r} is not SMALLEST:USUAL:LARGEST")
    return tuple(value for value in values if value is not None)


def _batches(text: str) -> tuple[int, ...]:
    return _range(text, _batch)


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    return _range(text, _size)


def _add_formats(parser: argparse.ArgumentParser) -> None:
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    onnx = formats.add_parser("onnx", help="an ONNX graph, compared with torch before it is kept")
    onnx.add_argument("model", metavar="MODEL", help="a folder of a faim2f model, or its name on the Hub")
    onnx.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="the folder to write; it must not exist")
    _add_graph(onnx)
    onnx.add_argument("--precision", choices=("fp32", "fp16"), default="fp32", help="of weights and network")
    onnx.add_argument("--opset", type=int, default=18, metavar="N", help="18 (the default) to 20")
    onnx.add_argument("--no-check", action="store_true", help="keep the graph without comparing it with torch")
    onnx.set_defaults(run_format=_run_onnx)
    tensorrt = formats.add_parser("tensorrt", help="an engine for one GPU, which need not be in this machine")
    tensorrt.add_argument("source", metavar="MODEL_OR_ONNX", help="a model's folder, or what `export onnx` wrote")
    tensorrt.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="the folder to write; it must not exist")
    tensorrt.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="of the network; that of the ONNX graph, or fp32 of a model, where not given",
    )
    tensorrt.add_argument("--gpu", choices=GPUS, default="current", help="the one here (the default), or a type")
    tensorrt.add_argument("--library", choices=MODULES, help="the one that can build for the GPU where not given")
    tensorrt.add_argument(
        "--batches", type=_batches, metavar="MIN:USUAL:MAX", help="1:1:8 where not given and the graph takes any"
    )
    tensorrt.add_argument(
        "--sizes", type=_sizes, metavar="HxW:HxW:HxW", help="64x64:640x640:1024x1024, in the same way"
    )
    tensorrt.add_argument("--timing-cache", type=Path, metavar="FILE", help="of --library tensorrt, read and written")
    tensorrt.add_argument("--no-check", action="store_true", help="do not compare a model's ONNX graph with torch")
    _add_graph(tensorrt.add_argument_group("the graph of a model (an ONNX graph has its own)"))
    tensorrt.set_defaults(run_format=_run_tensorrt)


def _add_graph(parser: Any) -> None:
    """What is in a graph; options that are not given are not there, so that the exporters' defaults hold."""
    parser.add_argument(
        "--outputs",
        choices=("logits", "semantic", "instances", "queries"),
        default=argparse.SUPPRESS,
        help="what the graph returns: class and mask logits (the default), a label map, the best instances, or every "
        "query",
    )
    parser.add_argument(
        "--input",
        dest="input_name",
        choices=("pixel_values", "image"),
        default=argparse.SUPPRESS,
        help="normalized floats (the default), or the bytes of RGB images (B, 3, H, W), which the graph normalizes",
    )
    open_sides: dict[str, Any] = {"default": argparse.SUPPRESS, "help": "dynamic where not given"}
    parser.add_argument("--size", type=_size, metavar="HxW|dynamic", **open_sides)
    parser.add_argument("--batch", type=_batch, metavar="N|dynamic", **open_sides)


def _graph(options: argparse.Namespace) -> dict[str, Any]:
    given = vars(options)
    return {name: given[name] for name in ("outputs", "input_name", "size", "batch") if name in given}


def run(options: argparse.Namespace, program: str = PROGRAM) -> int:
    """Runs the command; 0 if OUT_DIR was written, 2 if not, with one sentence on standard error."""
    logging.disable_progress_bar()
    try:
        options.run_format(options)
    except (ExportError, OSError) as error:
        return mistake(program, error)
    say(f"{options.out_dir}: written")
    return 0


def _run_onnx(options: argparse.Namespace) -> None:
    from ..export.onnx import export_onnx

    graph = _graph(options)
    lines = export_onnx(
        options.model,
        options.out_dir,
        precision=options.precision,
        opset=options.opset,
        verify=not options.no_check,
        **graph,
    )
    from ..export.report import report

    for line in lines or ["not verified (--no-check)"]:
        say(line)
    height, width = graph.get("size") or REPORTED_SIZE
    images = graph.get("batch") or 1
    say(
        f"{report(options.out_dir / 'model.onnx', images, (height, width))} for {images} "
        f"{'image' if images == 1 else 'images'} of {height}x{width}"
    )
    if graph.get("size") is not None:
        say(f"the processor beside the graph resizes to {height}x{width}, as the graph needs")


def _run_tensorrt(options: argparse.Namespace) -> None:
    lines = export_tensorrt(
        options.source,
        options.out_dir,
        precision=options.precision,
        gpu=options.gpu,
        library=options.library,
        batches=options.batches,
        sizes=options.sizes,
        timing_cache=options.timing_cache,
        verify=not options.no_check,
        **_graph(options),
    )
    for line in lines:
        say(line)


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Parses and runs; 0 for success, 2 for a mistake in what was asked, told in one sentence."""
    parser = argparse.ArgumentParser(prog=program, description=DESCRIPTION)
    _add_formats(parser)
    return run(parser.parse_args(arguments), program)

"""`faim2f quantize`: an ONNX graph in int8, calibrated on the user's images."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import ExportError
from ..export.quantize import IMAGES, MAX_ERROR, REPORT, RUNTIMES, quantize
from .output import DONE, mistake, one_document, say
from .parser import OneSentenceParser

PROGRAM = "faim2f quantize"
DESCRIPTION = "Turns an ONNX graph into one in int8, and leaves in float what changes the answers too much."
EXAMPLES = (
    ("For onnxruntime on a processor", "my-onnx my-int8 --images photos"),
    ("For an engine, with less change allowed", "my-onnx my-int8 --images photos --for tensorrt --max-error 0.01"),
)
DOCUMENT = {
    "out": "the folder that was written",
    "notes": "the lines that are said without --json",
    "report": f"the content of {REPORT}: layers in int8 and in float, the change measured, sizes and hashes",
}


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Runs the command; 0 if OUT_DIR was written, 2 if not, with one sentence on standard error."""
    options = build_parser(program).parse_args(arguments)
    with one_document(options.json) as tell:
        try:
            lines = quantize(
                options.source, options.out_dir, options.images, options.runtime, options.max_images, options.max_error
            )
        except (ExportError, OSError) as error:
            return mistake(program, error)
        for line in lines:
            say(line)
        say(f"{options.out_dir}: written")
        report = json.loads((options.out_dir / REPORT).read_text(encoding="utf-8"))
        tell({"out": str(options.out_dir), "notes": lines, "report": report})
    return DONE


def build_parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """The command's parser."""
    parser = OneSentenceParser(prog=program, description=DESCRIPTION, examples=EXAMPLES, document=DOCUMENT)
    parser.add_argument("source", type=Path, metavar="ONNX_DIR", help="a folder that `faim2f export onnx` wrote, fp32")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="the folder to write; it must not exist")
    parser.add_argument(
        "--images", type=Path, required=True, metavar="FOLDER", help="images like those that the model will see"
    )
    parser.add_argument(
        "--for",
        dest="runtime",
        choices=RUNTIMES,
        default=RUNTIMES[0],
        help=f"what will run it (default: {RUNTIMES[0]}); the two are fast on different graphs",
    )
    parser.add_argument(
        "--max-images", type=int, default=IMAGES, metavar="N", help=f"how many are used, at most (default: {IMAGES})"
    )
    parser.add_argument(
        "--max-error",
        type=float,
        default=MAX_ERROR,
        metavar="X",
        help="by how much the masks may change with their scores, as 1 less intersection over union "
        f"(default: {MAX_ERROR})",
    )
    parser.add_json()
    return parser

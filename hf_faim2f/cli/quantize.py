"""`faim2f quantize`: quantizes an ONNX graph to int8, calibrated on the user's images."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import FaiM2FError
from ..export.quantize import IMAGES, MAX_ERROR, QUANTIZATION, RUNTIMES, quantize
from .output import DONE, mistake, one_document, say, use_weights_url
from .parser import OneSentenceParser

PROGRAM = "faim2f quantize"
DESCRIPTION = "Quantizes an ONNX graph to int8; layers that would change the results too much stay in float."
EXAMPLES = (
    ("For ONNX Runtime on a CPU", "my-onnx my-int8 --images photos"),
    ("For a TensorRT engine, allowing less change", "my-onnx my-int8 --images photos --for tensorrt --max-error 0.01"),
)
DOCUMENT = {
    "out": "the folder that was written",
    "notes": "the lines printed without --json",
    "report": f"the contents of {QUANTIZATION}: layers in int8 and in float, measured change, sizes and hashes",
}


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Runs the command; returns 0 if OUT_DIR was written, else 2 after one sentence on standard error."""
    options = build_parser(program).parse_args(arguments)
    with one_document(options.json) as emit:
        try:
            use_weights_url(options.weights_url, str(options.source))
            lines = quantize(
                options.source, options.out_dir, options.images, options.runtime, options.max_images, options.max_error
            )
        except (FaiM2FError, OSError) as error:
            return mistake(program, error)
        for line in lines:
            say(line)
        say(f"{options.out_dir}: written")
        report = json.loads((options.out_dir / QUANTIZATION).read_text(encoding="utf-8"))
        emit({"out": str(options.out_dir), "notes": lines, "report": report})
    return DONE


def build_parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """Builds the command's parser."""
    parser = OneSentenceParser(prog=program, description=DESCRIPTION, examples=EXAMPLES, document=DOCUMENT)
    parser.add_argument(
        "source",
        type=Path,
        metavar="ONNX_DIR",
        help="a folder of `faim2f export onnx` in fp32; or a published name or Hub id, which is exported first",
    )
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="the folder to write; it must not exist")
    parser.add_argument(
        "--images",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="calibration images, similar to those that the model will run on",
    )
    parser.add_argument(
        "--for",
        dest="runtime",
        choices=RUNTIMES,
        default=RUNTIMES[0],
        help=f"the runtime to optimize for (default: {RUNTIMES[0]}); a graph for one is slow in the others",
    )
    parser.add_argument(
        "--max-images", type=int, default=IMAGES, metavar="N", help=f"maximum number of images (default: {IMAGES})"
    )
    parser.add_argument(
        "--max-error",
        type=float,
        default=MAX_ERROR,
        metavar="X",
        help=f"allowed change of masks and their scores, as 1 minus intersection over union (default: {MAX_ERROR})",
    )
    parser.add_weights_url()
    parser.add_json()
    return parser

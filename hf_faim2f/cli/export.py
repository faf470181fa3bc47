"""`faim2f export`: exports models to the file formats of other runtimes."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..errors import ExportError, FaiM2FError
from ..export.aotinductor import DESCRIPTION as COMPILED
from ..export.aotinductor import DEVICES
from ..export.aotinductor import PRECISIONS as COMPILED_PRECISIONS
from ..export.formats import DESCRIPTION as FORMAT_DESCRIPTION
from ..export.formats import FORMATS, Format, export_format
from ..export.tensorrt import DESCRIPTION as ENGINE
from ..export.tensorrt import GPUS, MODULES, PRECISIONS, export_tensorrt
from ..export.triton import MILLISECONDS, export_triton
from ..export.web import LAYOUTS, RELEASE, SUBTASKS, export_transformers_js, export_web
from .output import DONE, mistake, one_document, say, use_weights_url
from .parser import MODEL_HELP, OneSentenceParser

PROGRAM = "faim2f export"
DESCRIPTION = (
    "Exports a model to ONNX, TensorRT, native code for torch or the format of another runtime, as a model "
    "repository for Triton, or as a web page that runs it in the browser."
)
EXAMPLES = (
    ("A graph that returns a label map", "onnx my-model my-onnx --outputs semantic"),
    ("An engine for the GPU of this machine", "tensorrt my-model my-engine --precision fp16"),
    ("Native code for the CPU of this machine", "torch my-model my-package --precision bf16"),
)
ONNX_EXAMPLES = (
    ("Class and mask logits, for any image size and batch size", "my-model my-onnx"),
    (
        "From the RGB bytes of one 640x640 image to its label map",
        "my-model my-onnx --outputs semantic --input image --size 640x640 --batch 1",
    ),
)
TENSORRT_EXAMPLES = (
    ("For the GPU of this machine", "my-model my-engine --precision fp16"),
    (
        "For another GPU, from a graph, for 1 to 4 images of 640x640",
        "my-onnx my-engine --gpu sm86 --batches 1:1:4 --sizes 640x640:640x640:640x640",
    ),
)
TRITON_EXAMPLES = (
    ("Logits by ONNX Runtime, in batches of up to 8", "my-model my-repository"),
    ("An engine that was built on the server's GPU", "my-engine my-repository --name segmenter"),
)
DOCUMENT = {
    "out": "the folder that was written",
    "files": "its files: name and bytes",
    "notes": "the lines printed without --json, such as the difference from torch's outputs",
}
ONNX_DOCUMENT = {
    **DOCUMENT,
    "verified": "whether the graph was compared with torch",
    "nodes": "number of nodes of each type; null, like the next, for --layout transformers.js",
    "macs, images, size": "multiply-accumulate operations for `images` images of `size` (height, width)",
}
TRITON_DOCUMENT = {**DOCUMENT, "model": "the model's name in Triton"}
TENSORRT_DOCUMENT = {**DOCUMENT, "engine": "the contents of engine.json: GPU, precision, inputs, outputs and sizes"}
WEB_EXAMPLES = (
    ("A page for the model's own task", "my-model my-page"),
    (
        "With example images, and an installed ONNX Runtime Web",
        "my-model my-page --examples a.jpg b.jpg --onnxruntime-web node_modules/onnxruntime-web",
    ),
)
WEB_DOCUMENT = {**DOCUMENT, "verified": "whether the graph was compared with torch", "page": "the page's settings"}
TORCH_EXAMPLES = (
    ("Class and mask logits, for any image size and batch size", "my-model my-package"),
    ("In bfloat16, for one image of 640x640", "my-model my-package --precision bf16 --size 640x640 --batch 1"),
)
TORCH_DOCUMENT = {
    **DOCUMENT,
    "verified": "whether the package was compared with torch",
    "compiled": "the contents of compiled.json: CPU, GPU, precision, input and outputs",
}
FORMAT_EXAMPLES = (
    ("Class and mask logits, for any image size and batch size", "my-model my-files"),
    ("A label map of one 640x640 image", "my-model my-files --outputs semantic --size 640x640 --batch 1"),
)
FORMAT_DOCUMENT = {
    **DOCUMENT,
    "verified": "whether the files were run and compared with torch",
    "format": "the contents of format.json: format, precision, input, outputs and files",
}
MODEL = ("model", "MODEL", MODEL_HELP)
GRAPH = ("outputs", "input_name", "size", "batch")
REPORTED_SIZE = (640, 640)  # operations are counted for this size if the graph accepts any
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


def _command(
    formats: Any, name: str, what: str, examples: Any, document: Any, source: tuple[str, str, str] = MODEL
) -> Any:
    """Adds the parser of a format; `source` has the name, metavar and help of the first argument."""
    parser = formats.add_parser(name, help=what, description=f"Writes {what}.", examples=examples, document=document)
    parser.add_argument(source[0], metavar=source[1], help=source[2])
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="the folder to write; it must not exist")
    return parser


def build_parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """Builds the command's parser."""
    parser = OneSentenceParser(prog=program, description=DESCRIPTION, examples=EXAMPLES)
    formats: Any = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    what = "an ONNX graph, verified against torch"
    onnx = _command(formats, "onnx", what, ONNX_EXAMPLES, ONNX_DOCUMENT)
    _add_graph(onnx)
    onnx.add_argument(
        "--precision", choices=("fp32", "fp16"), default="fp32", help="precision of weights and network (default: fp32)"
    )
    onnx.add_argument(
        "--opset", type=int, default=18, metavar="N", help="ONNX operator set version, 18 to 20 (default: 18)"
    )
    onnx.add_argument("--no-check", action="store_true", help="skip verifying the graph against torch")
    layout = "transformers.js: onnx/model.onnx, model_fp16.onnx and model_int8.onnx, with logits (default: faim2f)"
    onnx.add_argument("--layout", choices=LAYOUTS, default=LAYOUTS[0], help=layout)
    calibrate = "calibration images for the int8 graph of --layout transformers.js (default: no int8 graph)"
    onnx.add_argument("--calibrate", type=Path, metavar="IMAGES", help=calibrate)
    onnx.add_weights_url()
    onnx.set_defaults(run_format=_run_onnx)
    onnx.add_json()
    what = "a TensorRT engine for one type of GPU, built without that GPU"
    source = ("source", "MODEL_OR_ONNX", f"{MODEL_HELP}, or a folder written by `faim2f export onnx`")
    tensorrt = _command(formats, "tensorrt", what, TENSORRT_EXAMPLES, TENSORRT_DOCUMENT, source)
    tensorrt.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="precision of the network (default: that of the ONNX graph, or fp32 for a model)",
    )
    tensorrt.add_argument(
        "--gpu",
        choices=GPUS,
        default="current",
        help="type of GPU; current is that of this machine (default: current)",
    )
    tensorrt.add_argument(
        "--library", choices=MODULES, help="library that builds the engine (default: one that supports the GPU)"
    )
    batches = "smallest, usual and largest batch size, if the graph's is dynamic (default: 1:1:8)"
    tensorrt.add_argument("--batches", type=_batches, metavar="MIN:USUAL:MAX", help=batches)
    sizes = "smallest, usual and largest image size in pixels (height x width), if the graph's is dynamic (default: "
    sizes += "64x64, a square, and an image of 2:1 either way, as the image processor resizes them)"
    tensorrt.add_argument("--sizes", type=_sizes, metavar="HxW:HxW:HxW", help=sizes)
    cache = "timing cache to read and update, for --library tensorrt (default: none)"
    tensorrt.add_argument("--timing-cache", type=Path, metavar="FILE", help=cache)
    tensorrt.add_argument("--no-check", action="store_true", help="skip verifying a model's graph against torch")
    _add_graph(tensorrt.add_argument_group("graph options for a model (invalid for an ONNX graph)"))
    tensorrt.add_weights_url()
    tensorrt.add_json()
    tensorrt.set_defaults(run_format=_run_tensorrt)
    what = "native code for torch (AOTInductor) on this kind of CPU or GPU, verified against torch"
    package = _command(formats, "torch", what, TORCH_EXAMPLES, TORCH_DOCUMENT)
    _add_graph(package)
    package.add_argument(
        "--precision", choices=COMPILED_PRECISIONS, default="fp32", help="precision of the network (default: fp32)"
    )
    package.add_argument("--device", choices=DEVICES, default="cpu", help="what to compile for (default: cpu)")
    package.add_argument("--no-check", action="store_true", help="skip verifying the package against torch")
    package.add_weights_url()
    package.add_json()
    package.set_defaults(run_format=_run_torch)
    what = "a model repository for NVIDIA's Triton Inference Server"
    exports = "a folder written by `faim2f export onnx` or `faim2f export tensorrt --library tensorrt`"
    source = ("source", "MODEL_OR_EXPORT", f"{MODEL_HELP}, or {exports}")
    triton = _command(formats, "triton", what, TRITON_EXAMPLES, TRITON_DOCUMENT, source)
    triton.add_argument("--name", help="the model's name in Triton (default: that of the source)")
    largest = "the largest batch into which Triton groups requests (default: 8, or the engine's own)"
    triton.add_argument("--max-batch", type=int, metavar="N", help=largest)
    wait = f"how long a request waits for others to share its batch, in milliseconds (default: {MILLISECONDS:g})"
    triton.add_argument("--batch-wait", type=_milliseconds, default=MILLISECONDS, metavar="MS", help=wait)
    triton.add_argument("--no-check", action="store_true", help="skip verifying a model's graph against torch")
    of_graph = triton.add_argument_group("graph options for a model (invalid for an export)")
    _add_graph(of_graph)
    of_graph.add_argument("--precision", choices=("fp32", "fp16"), default=argparse.SUPPRESS,
                          help="precision of the network (default: fp32)")  # fmt: skip
    triton.add_weights_url()
    triton.add_json()
    triton.set_defaults(run_format=_run_triton)
    what = "a static page that segments images in the visitor's browser"
    web = _command(formats, "web", what, WEB_EXAMPLES, WEB_DOCUMENT)
    web.add_argument("--subtask", choices=SUBTASKS, help="kind of segments (default: what the model was trained for)")
    web.add_argument("--title", help="the page's heading (default: the model's name)")
    web.add_argument("--size", type=_size, metavar="HxW|dynamic", default=None,
                     help="the network's input in pixels, height x width (default: dynamic, for any size)")  # fmt: skip
    web.add_argument(
        "--examples", nargs="+", default=(), metavar="PICTURE", help="examples that the page offers (default: none)"
    )
    library = f"folder or archive of ONNX Runtime Web (default: release {RELEASE}, downloaded with npm)"
    web.add_argument("--onnxruntime-web", type=Path, metavar="DIR", help=library)
    web.add_argument("--no-webgpu", action="store_true", help="omit the files for WebGPU (27 MB)")
    web.add_argument("--no-check", action="store_true", help="skip verifying the graph against torch")
    web.add_weights_url()
    web.add_json()
    web.set_defaults(run_format=_run_web)
    for name, row in FORMATS.items():
        _add_format(formats, name, row)
    return parser


def _add_format(formats: Any, name: str, row: Format) -> None:
    what = f"{row.title}'s files, " + ("verified against torch" if row.runs else "not verified, as there is no runtime")
    parser = _command(formats, name, what, FORMAT_EXAMPLES, FORMAT_DOCUMENT)
    _add_graph(parser)
    default = row.precisions[0]
    precision = f"precision of the network (default: {default})"
    parser.add_argument("--precision", choices=row.precisions, default=default, help=precision)
    parser.add_argument("--no-check", action="store_true", help="skip verifying the files against torch")
    parser.add_weights_url()
    parser.set_defaults(run_format=_run_format)
    parser.add_json()


def _milliseconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of milliseconds")
    return value


def _add_graph(parser: Any) -> None:
    """Adds the options of a graph. Options that are not given are left out, so that the exporters' defaults apply."""
    parser.add_argument(
        "--outputs",
        choices=("logits", "semantic", "instances", "queries"),
        default=argparse.SUPPRESS,
        help="what the graph returns: class and mask logits, a label map, the best instances, or all queries "
        "(default: logits)",
    )
    parser.add_argument(
        "--input",
        dest="input_name",
        choices=("pixel_values", "image"),
        default=argparse.SUPPRESS,
        help="input of the graph: normalized floats, or RGB bytes (B, 3, H, W), which the graph normalizes (default: "
        "pixel_values)",
    )
    size = "image size in pixels, height x width (default: dynamic, for any size)"
    parser.add_argument("--size", type=_size, metavar="HxW|dynamic", default=argparse.SUPPRESS, help=size)
    batch = "batch size (default: dynamic, for any number of images)"
    parser.add_argument("--batch", type=_batch, metavar="N|dynamic", default=argparse.SUPPRESS, help=batch)


def _graph(options: argparse.Namespace) -> dict[str, Any]:
    given = vars(options)
    names = ("outputs", "input_name", "size", "batch", "precision") if options.format == "triton" else GRAPH
    return {name: given[name] for name in names if name in given}


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Runs the command; returns 0 if OUT_DIR was written, else 2 after one sentence on standard error."""
    options = build_parser(program).parse_args(arguments)
    with one_document(options.json) as emit:
        try:
            use_weights_url(options.weights_url, str(getattr(options, "model", None) or options.source))
            document = options.run_format(options)
        except (FaiM2FError, OSError) as error:
            return mistake(program, error)
        say(f"{options.out_dir}: written")
        files = [
            {"name": path.relative_to(options.out_dir).as_posix(), "bytes": path.stat().st_size}
            for path in sorted(options.out_dir.rglob("*"))
            if path.is_file()
        ]
        emit({"out": str(options.out_dir), "files": files, **document})
    return DONE


def _run_onnx(options: argparse.Namespace) -> dict[str, Any]:
    from ..export.onnx import export_onnx

    if options.layout != LAYOUTS[0]:
        return _run_transformers_js(options)
    if options.calibrate is not None:
        raise ExportError("--calibrate is for --layout transformers.js: use `faim2f quantize` for other graphs.")
    graph = _graph(options)
    lines = export_onnx(
        options.model,
        options.out_dir,
        precision=options.precision,
        opset=options.opset,
        verify=not options.no_check,
        **graph,
    )
    from ..export.graph_file import report

    height, width = graph.get("size") or REPORTED_SIZE
    images = graph.get("batch") or 1
    work = report(options.out_dir / "model.onnx", images, (height, width))
    notes = [
        *(lines or ["not verified (--no-check)"]),
        f"{work} for {images} {'image' if images == 1 else 'images'} of {height}x{width}",
    ]
    if graph.get("size") is not None:
        notes.append(f"the exported image processor resizes to {height}x{width}, the size of the graph")
    for note in notes:
        say(note)
    return {
        "notes": notes,
        "verified": not options.no_check,
        "nodes": dict(work.nodes),
        "macs": work.macs,
        "images": images,
        "size": [height, width],
    }


def _run_tensorrt(options: argparse.Namespace) -> dict[str, Any]:
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
    return {"notes": lines, "engine": json.loads((options.out_dir / ENGINE).read_text(encoding="utf-8"))}


def _run_torch(options: argparse.Namespace) -> dict[str, Any]:
    from ..export.aotinductor import export_package

    lines = export_package(
        options.model,
        options.out_dir,
        precision=options.precision,
        device=options.device,
        verify=not options.no_check,
        **_graph(options),
    )
    compiled = json.loads((options.out_dir / COMPILED).read_text(encoding="utf-8"))
    notes = [*(lines or ["not verified (--no-check)"]), "model.pt2 is native code: whoever opens it must trust you"]
    for note in notes:
        say(note)
    return {"notes": notes, "verified": not options.no_check, "compiled": compiled}


def _run_format(options: argparse.Namespace) -> dict[str, Any]:
    lines = export_format(
        options.format,
        options.model,
        options.out_dir,
        precision=options.precision,
        verify=not options.no_check,
        **_graph(options),
    )
    told = "--no-check" if options.no_check else "this package has no runtime for it"
    notes = lines or [f"not verified ({told})"]
    for note in notes:
        say(note)
    described = json.loads((options.out_dir / FORMAT_DESCRIPTION).read_text(encoding="utf-8"))
    return {"notes": notes, "verified": bool(lines), "format": described}


def _run_triton(options: argparse.Namespace) -> dict[str, Any]:
    lines = export_triton(
        options.source,
        options.out_dir,
        options.name,
        options.max_batch,
        options.batch_wait,
        verify=not options.no_check,
        **_graph(options),
    )
    for line in lines:
        say(line)
    return {"notes": lines, "model": next(options.out_dir.iterdir()).name}


def _run_transformers_js(options: argparse.Namespace) -> dict[str, Any]:
    graph = _graph(options)
    for flag, value, only in (
        ("--outputs", graph.pop("outputs", "logits"), "logits"),
        ("--input", graph.pop("input_name", "pixel_values"), "pixel_values"),
        ("--precision", options.precision, "fp32"),
    ):
        if value != only:
            raise ExportError(
                f"--layout transformers.js has its own {flag}, so {value} cannot be chosen: leave it out."
            )
    verify = not options.no_check
    notes = export_transformers_js(
        options.model, options.out_dir, opset=options.opset, images=options.calibrate, verify=verify, **graph
    )
    for note in notes:
        say(note)
    return {"notes": notes, "verified": verify, **dict.fromkeys(("nodes", "macs", "images", "size"))}


def _run_web(options: argparse.Namespace) -> dict[str, Any]:
    notes = export_web(
        options.model,
        options.out_dir,
        options.subtask,
        options.title,
        options.size,
        options.examples,
        options.onnxruntime_web,
        not options.no_webgpu,
        not options.no_check,
    )
    for note in notes:
        say(note)
    page = json.loads((options.out_dir / "page.json").read_text(encoding="utf-8"))
    return {"notes": notes, "verified": not options.no_check, "page": page}

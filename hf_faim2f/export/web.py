"""`faim2f export web`: writes a static page that segments images in the visitor's browser, atomically.

The page runs an ONNX graph on an image's pixels with ONNX Runtime Web, which is copied next to it. This package
contains only the page (`page/`), because the runtime has 41 MB. This module also implements
`faim2f export onnx --layout transformers.js`.
"""

import base64
import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import ExportError, first_line
from ..files import check_new_folder, new_folder, printable
from ..model.channels_faim2f import RGB
from ..model.configuration_faim2f import FaiM2FConfig
from ..model.image_processing_faim2f import FaiM2FImageProcessor
from ..zoo import open_settings
from .onnx import check_libraries, export_onnx

PAGE = Path(__file__).parent / "page"
SUBTASKS = {"panoptic": "logits", "instance": "instances", "semantic": "semantic"}  # and the outputs of their graphs
# transformers' defaults, which `Predictor` also uses for panoptic segments.
PANOPTIC_THRESHOLD, PANOPTIC_MASK_THRESHOLD, PANOPTIC_OVERLAP = 0.5, 0.5, 0.8
LIBRARY, RELEASE = "onnxruntime-web", "1.30.0"
# Subresource integrity of the release's archive, as the registry states it.
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
# The files of the library that the page loads on a CPU, and those that it loads instead if there is WebGPU.
CPU_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
GPU_FILES = (
    "ort.webgpu.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)
LARGEST_ARCHIVE, LARGEST_FILE, MOST_MEMBERS = 128 << 20, 64 << 20, 20_000  # bytes, bytes, members of the archive
DOWNLOAD_SECONDS = 600
MOST_EXAMPLES, LARGEST_EXAMPLE = 12, 8 << 20
IMAGE_FORMATS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}  # which every browser decodes
LAYOUTS = ("faim2f", "transformers.js")


def export_web(
    model: str | Path,
    out_dir: str | Path,
    subtask: str | None = None,
    title: str | None = None,
    size: tuple[int, int] | None = None,
    examples: Sequence[str | Path] = (),
    library: str | Path | None = None,
    webgpu: bool = True,
    verify: bool = True,
) -> list[str]:
    """Writes `out_dir` with a page, the model's graph and ONNX Runtime Web.

    The folder is also an ONNX export: `Predictor` opens it with the runtime onnxruntime, and gives the same results as
    the page.

    Args:
        model: a folder or Hub id of a `faim2f` model of RGB images.
        out_dir: a folder that does not exist yet.
        subtask: "panoptic", "instance" or "semantic"; None for the one that the model was trained for.
        title: the page's heading; None for the model's name.
        size: (height, width) in pixels of the network's input; None for any, as the image processor makes it.
        examples: images (JPEG, PNG, WebP) that the page offers, at most 12.
        library: ONNX Runtime Web: its folder in `node_modules`, an unpacked archive, or the archive itself. None to
            download the release `RELEASE` with `npm pack`; its archive must have the hash `INTEGRITY`.
        webgpu: also copy the files for WebGPU, 27 MB.
        verify: compare the ONNX graph with torch.

    Returns:
        What was verified and written, one sentence per line.

    Raises:
        ExportError, OSError: the export failed, or cannot be written; nothing is left behind.
    """
    out_dir = Path(out_dir)
    if subtask is not None and subtask not in SUBTASKS:
        raise ExportError(f"subtask must be one of {', '.join(SUBTASKS)}, not {subtask!r}.")
    check_new_folder(out_dir, ExportError)
    check_libraries()  # before a download of 41 MB
    pictures = _checked_examples(examples)
    config, processor = open_settings(model, error=ExportError)
    if config.num_channels != RGB:
        raise ExportError(f"{model} takes images of {config.num_channels} channels, but images in a browser have 3.")
    subtask = subtask or config.postprocessing_type
    wanted = CPU_FILES + (GPU_FILES if webgpu else ())
    beside = tempfile.TemporaryDirectory(prefix=f".{out_dir.name}.", dir=out_dir.parent)
    with beside as between, new_folder(out_dir) as staging:
        release = copy_library(library, staging / "ort", wanted)
        graph = Path(between) / "onnx"
        lines = export_onnx(model, graph, SUBTASKS[subtask], "image", size, batch=1, verify=verify)
        for name in ("model.onnx", "config.json", "preprocessor_config.json"):
            shutil.move(graph / name, staging / name)
        for path in PAGE.iterdir():
            if path.suffix in (".html", ".css", ".js"):
                shutil.copyfile(path, staging / path.name)
        names: list[str] = []
        for path, suffix in pictures:
            (staging / "examples").mkdir(exist_ok=True)
            names.append(f"examples/{len(names) + 1}{suffix}")
            shutil.copyfile(path, staging / names[-1])
        config, processor = open_settings(staging, error=ExportError)
        settings = page_settings(config, processor, subtask)
        settings |= {
            "title": printable(title or Path(model).absolute().name),
            "model": {"file": "model.onnx", "bytes": (staging / "model.onnx").stat().st_size, "size": size},
            "library": {"release": release, "webgpu": webgpu},
            "examples": names,
        }
        (staging / "page.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    if release != RELEASE:
        lines.append(f"the page uses {LIBRARY} {release}, but was tested with {RELEASE}")
    lines.append(f"a page for {subtask} segments; open it through a web server: python -m http.server -d {out_dir}")
    return lines


def page_settings(config: FaiM2FConfig, processor: FaiM2FImageProcessor, subtask: str) -> dict[str, Any]:
    """The settings of a model that the page needs: labels, the size of the network's input, and thresholds."""
    settings: dict[str, Any] = processor.to_dict()
    stuff = config.label_ids_to_fuse if config.label_ids_to_fuse is not None else processor.label_ids_to_fuse
    labels = [printable(config.id2label[class_id]) for class_id in range(config.num_labels)]
    return {
        "subtask": subtask,
        "labels": labels,
        "stuff": sorted(stuff or (range(len(labels)) if subtask == "semantic" else ())),
        "resize": {**settings["size"], "divisor": settings["size_divisor"]} if settings["do_resize"] else None,
        "threshold": PANOPTIC_THRESHOLD if subtask == "panoptic" else settings["threshold"],
        "filter_empty_masks": settings["filter_empty_masks"],
        "panoptic": {
            "fuse": sorted(stuff or ()),
            "sigmoid": settings["cls_sigmoid"],
            "intermediate_size": settings["intermediate_size"],
            "mask_threshold": PANOPTIC_MASK_THRESHOLD,
            "overlap": PANOPTIC_OVERLAP,
        },
    }


def _checked_examples(examples: Sequence[str | Path]) -> list[tuple[Path, str]]:
    """The images with the suffixes of their formats."""
    if len(examples) > MOST_EXAMPLES:
        raise ExportError(f"A page offers at most {MOST_EXAMPLES} examples, not {len(examples)}.")
    found = []
    for path in map(Path, examples):
        try:
            if path.stat().st_size > LARGEST_EXAMPLE:
                raise ExportError(f"{path} has more than {LARGEST_EXAMPLE >> 20} MB: choose a smaller example.")
            with Image.open(path, formats=list(IMAGE_FORMATS)) as picture:
                kind = "JPEG" if picture.format == "MPO" else str(picture.format)  # a JPEG with several frames
        except (OSError, Image.DecompressionBombError) as error:
            raise ExportError(
                f"{path} cannot be an example ({first_line(error, kind=False)}): choose an image in "
                f"{', '.join(IMAGE_FORMATS)}."
            ) from None
        found.append((path, IMAGE_FORMATS[kind]))
    return found


def copy_library(source: str | Path | None, target: Path, names: Sequence[str]) -> str:
    """Copies files of ONNX Runtime Web into the new folder `target`; returns their release.

    Args:
        source: as `library` of `export_web`.
        target: a folder that does not exist yet.
        names: names of files in the library's folder `dist`.

    Raises:
        ExportError: the library is missing or not ONNX Runtime Web, or cannot be downloaded.
    """
    target.mkdir()
    if source is None:
        with _downloaded() as archive:
            return _unpack(archive, target, names)
    source = Path(source)
    if source.is_file():
        return _unpack(source, target, names)
    root = next((root for root in (source, source / "package") if (root / "package.json").is_file()), None)
    if root is None:
        raise ExportError(
            f"{source} is not {LIBRARY} (no package.json): name node_modules/{LIBRARY}, its unpacked archive, or the "
            f"archive that `npm pack {LIBRARY}@{RELEASE}` writes."
        )
    for name in names:
        path = root / "dist" / name
        if not path.is_file():
            raise ExportError(f"{path} is missing: use {LIBRARY} {RELEASE}, or pass --no-webgpu.")
        if path.stat().st_size > LARGEST_FILE:
            raise ExportError(f"{path} has more than {LARGEST_FILE >> 20} MB, which no file of {LIBRARY} has.")
        shutil.copyfile(path, target / name)
    return _release_of((root / "package.json").read_bytes(), root / "package.json")


@contextmanager
def _downloaded() -> Iterator[Path]:
    """The archive of the pinned release, downloaded by npm into a temporary folder."""
    npm = shutil.which("npm")
    by_hand = f"give its folder or archive with --onnxruntime-web (npm pack {LIBRARY}@{RELEASE})"
    if npm is None:
        raise ExportError(f"The page needs {LIBRARY}, which npm downloads, and npm is not installed: {by_hand}.")
    with tempfile.TemporaryDirectory() as folder:
        words = [npm, "pack", f"{LIBRARY}@{RELEASE}", "--ignore-scripts", "--silent", "--pack-destination", folder]
        try:
            done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
        except subprocess.TimeoutExpired:
            raise ExportError(f"npm took more than {DOWNLOAD_SECONDS} s to download {LIBRARY}: {by_hand}.") from None
        archives = list(Path(folder).glob("*.tgz"))
        if done.returncode or len(archives) != 1:
            reason = next((line.strip() for line in reversed(done.stderr.splitlines()) if line.strip()), "no reason")
            raise ExportError(f"npm cannot download {LIBRARY} {RELEASE} ({printable(reason[:200])}): {by_hand}.")
        yield archives[0]


def _unpack(archive: Path, target: Path, names: Sequence[str]) -> str:
    """Extracts only these files from an archive, which must have the pinned hash; returns their release."""
    if archive.stat().st_size > LARGEST_ARCHIVE:
        raise ExportError(f"{archive} has more than {LARGEST_ARCHIVE >> 20} MB, so it is not {LIBRARY}.")
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha512") if hasattr(hashlib, "file_digest") else hashlib.sha512(file.read())
    if f"sha512-{base64.b64encode(digest.digest()).decode()}" != INTEGRITY:
        raise ExportError(
            f"{archive.name} is not the archive of {LIBRARY} {RELEASE} (its SHA-512 differs from the expected one): "
            "download it again, from a registry that you trust."
        )
    missing = {f"package/dist/{name}": target / name for name in names}
    release = ""
    try:
        with tarfile.open(archive, "r:gz") as members:
            for number, member in enumerate(members):
                if number >= MOST_MEMBERS:
                    break
                path = missing.pop(member.name, None)
                if path is None and member.name != "package/package.json":
                    continue
                if not member.isfile() or member.size > LARGEST_FILE:
                    raise ExportError(f"{archive.name} has an unusable {printable(member.name)}.")
                content = members.extractfile(member)
                assert content is not None
                if path is None:
                    release = _release_of(content.read(), archive)
                else:
                    with path.open("xb") as file:
                        shutil.copyfileobj(content, file)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ExportError(f"{archive.name} cannot be unpacked ({first_line(error, kind=False)}).") from None
    if missing or not release:
        raise ExportError(f"{archive.name} lacks {', '.join(missing) or 'package.json'}.")
    return release


def _release_of(content: bytes, where: Path) -> str:
    """The release in a package.json of ONNX Runtime Web."""
    try:
        values = json.loads(content)
        name, release = values["name"], values["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        name, release = None, None
    if name != LIBRARY or not isinstance(release, str):
        raise ExportError(f"{where} is not {LIBRARY}'s: name node_modules/{LIBRARY}, or omit --onnxruntime-web.")
    return printable(release[:40])


def export_transformers_js(
    model: str | Path,
    out_dir: str | Path,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    opset: int = 18,
    images: str | Path | None = None,
    verify: bool = True,
) -> list[str]:
    """Writes `out_dir` with a model's files where transformers.js expects them.

    These are `onnx/model.onnx` (`dtype: "fp32"`), `onnx/model_fp16.onnx` ("fp16"), `onnx/model_int8.onnx` ("int8"),
    `config.json` and `preprocessor_config.json`. The graphs take `pixel_values` and return the model's logits.

    transformers.js does not support `faim2f`. The settings therefore declare a MaskFormer, which has the same inputs,
    outputs and post-processing, so `pipeline("image-segmentation")` opens it. They are not for Python.

    Args:
        model, size, batch, opset, verify: as in `export_onnx`.
        out_dir: a folder that does not exist yet.
        images: a folder of images on which int8 is calibrated; None to leave int8 out.

    Returns:
        What was verified and written, and which graphs were not written and why, one sentence per line.

    Raises:
        ExportError: the export in float32 failed; nothing is left behind.
    """
    from .quantize import QUANTIZATION, quantize

    out_dir = Path(out_dir)
    check_new_folder(out_dir, ExportError)
    config, _ = open_settings(model, error=ExportError)
    if config.num_channels != RGB:
        raise ExportError(f"{model} takes images of {config.num_channels} channels, but transformers.js reads 3.")
    if images is not None and not Path(images).is_dir():
        raise ExportError(f"{images} is not a folder: name one with images to calibrate int8, or leave it out.")
    beside = tempfile.TemporaryDirectory(prefix=f".{out_dir.name}.", dir=out_dir.parent)
    with beside as between, new_folder(out_dir) as staging:
        (staging / "onnx").mkdir()
        whole = Path(between) / "fp32"
        lines = export_onnx(model, whole, size=size, batch=batch, opset=opset, verify=verify)
        lines += _write_settings(staging, *open_settings(whole, error=ExportError))
        shutil.copyfile(whole / "model.onnx", staging / "onnx" / "model.onnx")
        half, small = Path(between) / "fp16", Path(between) / "int8"
        try:
            lines += export_onnx(model, half, size=size, batch=batch, precision="fp16", opset=opset, verify=verify)
            shutil.move(half / "model.onnx", staging / "onnx" / "model_fp16.onnx")
        except ExportError as error:
            lines.append(f"onnx/model_fp16.onnx is not written: {error}")
        if images is None:
            lines.append("onnx/model_int8.onnx is not written: it needs calibration images (--calibrate IMAGES)")
        else:
            try:
                *told, files = quantize(whole, small, images)
                lines += [*told, files.replace("model.onnx", "onnx/model_int8.onnx", 1)]
                shutil.move(small / "model.onnx", staging / "onnx" / "model_int8.onnx")
                shutil.move(small / QUANTIZATION, staging / QUANTIZATION)
            except ExportError as error:
                lines.append(f"onnx/model_int8.onnx is not written: {error}")
    return lines


def _write_settings(folder: Path, config: FaiM2FConfig, processor: FaiM2FImageProcessor) -> list[str]:
    """Writes config.json and preprocessor_config.json as transformers.js reads them; returns what differs."""
    model = {
        "model_type": "maskformer",
        "architectures": ["MaskFormerForInstanceSegmentation"],
        "id2label": config.id2label,
        "label2id": config.label2id,
    }
    settings: dict[str, Any] = {**processor.to_dict(), "image_processor_type": "MaskFormerImageProcessor"}
    settings.pop("auto_map", None)
    # It would stretch the masks of a padded image over the padding, because the graph takes no mask of pixels.
    settings["do_pad"] = False
    settings.pop("pad_size", None)
    lines = []
    if not settings["size_divisor"]:  # it would divide by 0
        del settings["size_divisor"]
    elif "height" not in settings["size"]:
        lines.append(
            f"transformers.js rounds sides down to multiples of {settings['size_divisor']}, and the image processor up"
        )
    longest = settings["size"].get("longest_edge")
    if longest is not None:  # to which it would enlarge every image
        settings["size"] = {"shortest_edge": settings["size"]["shortest_edge"]}
        lines.append(
            f"transformers.js resizes by the shorter side only; the longer side is not limited to {longest} pixels"
        )
    if settings["cls_sigmoid"]:
        lines.append("transformers.js applies a softmax to class logits, but this model needs sigmoids")
    for name, values in (("config.json", model), ("preprocessor_config.json", settings)):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return lines


__all__ = ["LAYOUTS", "RELEASE", "SUBTASKS", "copy_library", "export_transformers_js", "export_web", "page_settings"]

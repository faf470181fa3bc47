"""Readers of untrusted bytes as fuzz targets: each returns a result or raises its own kind of error.

Anything else, such as another exception, a hang or unbounded memory, is a finding.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HEIGHT, WIDTH = 6, 8


@dataclass(frozen=True)
class Target:
    """A reader of untrusted bytes.

    Args:
        read: takes the bytes and a folder filled by `prepare`. It imports what it needs itself, so that atheris
            instruments only that.
        refusal: name of the error that it may raise.
    """

    read: Callable[[bytes, Path], object]
    refusal: str

    def __call__(self, data: bytes, folder: Path) -> None:
        try:
            self.read(data, folder)
        except ValueError as error:
            if self.refusal not in {kind.__name__ for kind in type(error).__mro__}:
                raise
            text = str(error)
            assert text and "\n" not in text.strip(), f"a mistake is one sentence, and not {text!r}"


def prepare(folder: Path) -> None:
    """Writes the images that the corpus's COCO files name."""
    from PIL import Image

    for name in ("images/a.png", "annotations/panoptic_images/a.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT), (1, 0, 0)).save(folder / name)


def _file(data: bytes, path: Path) -> Path:
    path.write_bytes(data)
    return path


def _pickle(data: bytes, folder: Path) -> object:
    from hf_faim2f.conversion.array_pickle import read_array_pickle

    return read_array_pickle(_file(data, folder / "weights.pkl"))


def _coco_instance(data: bytes, folder: Path) -> object:
    from hf_faim2f.data.readers.coco import load_coco_instance

    _file(data, folder / "annotations" / "instances_images.json")
    return [load_coco_instance(folder, "images", skip_bad=skip)[:4] for skip in (True, False)]


def _coco_panoptic(data: bytes, folder: Path) -> object:
    from hf_faim2f.data.readers.coco import load_coco_panoptic

    _file(data, folder / "annotations" / "panoptic_images.json")
    return [load_coco_panoptic(folder, "images", skip_bad=skip)[:4] for skip in (True, False)]


def _yolo_labels(data: bytes, folder: Path) -> object:
    from hf_faim2f.data.readers.yolo import load_yolo

    (folder / "data.yaml").write_text("train: images\nval: images\nnames: [a, b, c]\n")
    _file(data, folder / "images" / "a.txt")
    return [load_yolo(folder, task=task)[:2] for task in ("instance", "semantic")]  # type: ignore[arg-type]


def _yolo_yaml(data: bytes, folder: Path) -> object:
    from hf_faim2f.data.readers.yolo import load_yolo

    (folder / "images" / "a.txt").unlink(missing_ok=True)
    return load_yolo(_file(data, folder / "data.yaml"))[:2]


def _labelme(data: bytes, folder: Path) -> object:
    from hf_faim2f.data.readers.labelme import load_labelme

    _file(data, folder / "images" / "a.json")
    return [load_labelme(folder / "images", "all", skip_bad=skip)[:2] for skip in (True, False)]


def _supervisely(data: bytes, folder: Path) -> object:
    from hf_faim2f.data.readers.supervisely import load_supervisely

    root = folder / "project"
    for name in ("img", "ann"):
        (root / "ds" / name).mkdir(parents=True, exist_ok=True)
    (root / "meta.json").write_text('{"classes": [{"title": "a", "shape": "any"}]}')
    (root / "ds" / "img" / "a.png").write_bytes((folder / "images" / "a.png").read_bytes())
    _file(data, root / "ds" / "ann" / "a.png.json")
    return [load_supervisely(root, "all", skip_bad=skip)[:2] for skip in (True, False)]


def _palette(data: bytes, folder: Path) -> object:
    from hf_faim2f.data.readers.palette import read_palette

    return read_palette(_file(data, folder / "palette.txt"))


def _run_lengths(data: bytes, folder: Path) -> object:
    from hf_faim2f.masks import decode_run_lengths, to_run_lengths

    try:
        segmentation = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return decode_run_lengths(to_run_lengths(segmentation, HEIGHT, WIDTH))


def _compressed_run_lengths(data: bytes, folder: Path) -> object:
    """Uses the bytes as counts directly, because random bytes are rarely valid JSON."""
    from hf_faim2f.masks import decode_run_lengths, to_run_lengths

    counts = {"size": [HEIGHT, WIDTH], "counts": data.decode("latin1")}
    return decode_run_lengths(to_run_lengths(counts, HEIGHT, WIDTH))


def _detectron2_yaml(data: bytes, folder: Path) -> object:
    from hf_faim2f.conversion.detectron2_config import read_settings

    return read_settings(_file(data, folder / "config.yaml"))


def _settings_yaml(data: bytes, folder: Path) -> object:
    from hf_faim2f.cli.settings import read_settings_file
    from hf_faim2f.cli.train import TrainSettings

    return read_settings_file(TrainSettings, _file(data, folder / "settings.yaml"))


def _parquet(data: bytes, folder: Path) -> object:
    from hf_faim2f.distributed.rows import find_rows, read_pieces

    found = find_rows([str(_file(data, folder / "rows.parquet"))])
    # A file can claim any number of rows, and reading many would take too long.
    pieces = [piece for piece in found.pieces if piece.count <= 1000]
    return [(entry.key, entry.error) for entry in read_pieces(pieces)]


def _onnx(data: bytes, folder: Path) -> object:
    from hf_faim2f.export.graph_file import read_graph
    from hf_faim2f.export.precision import precision_of

    model, kind = read_graph(_file(data, folder / "model.onnx"))
    return kind, precision_of(model)


def _upload(data: bytes, folder: Path) -> object:
    """Reads a file as the page does: first the header, then the pixels as in the predictor."""
    from hf_faim2f.model.image_loading_faim2f import load_images
    from hf_faim2f.serving.requests import Limits, display_name, open_picture

    path = _file(data, folder / "upload")
    # Low limits, so that large images take no time.
    limits = Limits(megabytes=1, megapixels=0.1)
    with open_picture(path, display_name(data[:80].decode("latin1")), limits) as picture:
        return next(load_images([picture]))


TARGETS = {
    "pickle": Target(_pickle, "ConversionError"),
    "coco_instance": Target(_coco_instance, "DatasetError"),
    "coco_panoptic": Target(_coco_panoptic, "DatasetError"),
    "yolo_labels": Target(_yolo_labels, "DatasetError"),
    "yolo_yaml": Target(_yolo_yaml, "DatasetError"),
    "labelme": Target(_labelme, "DatasetError"),
    "supervisely": Target(_supervisely, "DatasetError"),
    "palette": Target(_palette, "DatasetError"),
    "run_lengths": Target(_run_lengths, "ValueError"),
    "compressed_run_lengths": Target(_compressed_run_lengths, "ValueError"),
    "detectron2_yaml": Target(_detectron2_yaml, "ConversionError"),
    "settings_yaml": Target(_settings_yaml, "SettingsError"),
    "parquet": Target(_parquet, "BulkError"),
    "onnx": Target(_onnx, "ExportError"),
    "upload": Target(_upload, "ValueError"),
}

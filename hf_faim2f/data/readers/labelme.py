"""labelme's JSON: one file for each image, with polygons, rectangles, circles and masks.

    street.jpg     street.json      {"imagePath": "street.jpg", "imageHeight": 480, "shapes": [{"label": "car", ...}]}
    labels.txt     the class names, one per line; without it, all labels of areas, in alphabetical order

Shapes with the same label and `group_id` are one object. Shapes without an area (points, lines) are left out, with a
warning. The image is the file `imagePath`, or else the one beside the JSON with its name, or else `imageData` in the
JSON. If the first two exist under different names, it is not clear which one was annotated, and the JSON is rejected.
An image that no JSON file belongs to is not read, which is said in a warning.

For the task "semantic", later shapes are on top, `__ignore__` is no class, and pixels without a shape get the class
`_background_` or `background` if there is one. For "instance", shapes with these three labels are left out.

Folders such as `train` and `val`, or `json/train` and `json/val`, are the parts; without them, every tenth image is for
validation.
"""

import base64
import binascii
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers.utils import logging

from ...errors import DatasetError
from ...files import files_below
from ...masks import decode_run_lengths, encode_run_lengths, is_finite, to_run_lengths
from ..dataset import IMAGE_FEATURE, Description, Problems, Task, find_part, hold_out, kind_of_part, lazy_dataset
from ..files import (
    IMAGE_SUFFIXES,
    SUFFIXES_TRIED,
    AnnotationFrame,
    check_stated_size,
    file_source,
    is_json_with,
    read_header,
    read_json,
    read_map,
)
from .coco import TEXT, CocoInstanceReader
from .folder import LABELS_FILE, read_labels
from .outlines import BACKGROUNDS

logger = logging.get_logger(__name__)

IGNORE = "__ignore__"
KEYS = ("shapes", "imagePath", "imageData", "imageHeight")
WITHOUT_AREA = ("point", "points", "line", "linestrip")
# The largest JSON file, in bytes; it may contain the image.
MOST_JSON = 1 << 28
# Distance of the vertices of a circle, in pixels.
ARC = 0.5
MOST_CORNERS = 4096


def find_files(root: Path) -> list[Path]:
    """labelme's JSON files in a folder and its subfolders."""
    return [path for path in files_below(root, (".json",)) if is_json_with(path, KEYS)]


def _part_of(path: Path, root: Path) -> str | None:
    """The first folder on the way from `root` to a file whose name says what the file is for, such as `train`."""
    return next((name for name in path.relative_to(root).parts[:-1] if kind_of_part(name)), None)


def load_labelme(
    root: str | Path,
    split: str = "train",
    task: Task = "instance",
    *,
    labels: Sequence[str] | None = None,
    skip_bad: bool = False,
    annotation_frame: AnnotationFrame | None = None,
) -> datasets.Dataset:
    """Loads a folder of labelme's JSON files.

    Args:
        root: the folder.
        split: "train", "val" or another part (see the module's docstring), or "all" if the data is not divided.
        task: "instance" or "semantic".
        labels: class names; None for those of labels.txt, or of the files.
        skip_bad: skip unusable files, and list them in `describe(dataset).skipped`.
        annotation_frame: as in `load_folder`.

    Raises:
        DatasetError: there is no such file, or one cannot be used.
    """
    root, problems = Path(root), Problems(skip_bad)
    files = find_files(root)
    if not files:
        raise DatasetError(f"{root} has no JSON file of labelme's (with shapes and imagePath).")
    parts = {path: _part_of(path, root) for path in files}
    folders = {path.name for path in root.glob("*/") if kind_of_part(path.name)}
    part = find_part(folders.union(name for name in parts.values() if name is not None), split, str(root))
    if labels is None and (root / LABELS_FILE).is_file():
        labels = read_labels(root / LABELS_FILE)
    documents = {}
    for path in files:
        is_wanted = part is None or parts[path] == part
        if is_wanted or labels is None:
            try:
                documents[path] = _Document.read(path, root)
            except DatasetError as error:
                if is_wanted:
                    problems.add(error)
    if labels is None:
        shapes = (shape for document in documents.values() for shape in document.shapes)
        labels = sorted({shape["label"] for shape in shapes if shape.get("shape_type") not in WITHOUT_AREA})
    names = [name for name in labels if name != IGNORE and (task == "semantic" or name not in BACKGROUNDS)]
    ids = {name: number for number, name in enumerate(names)}
    columns: dict[str, list[Any]] = {
        name: [] for name in ("image", "file_name", "image_id", "height", "width", "annotations")
    }
    images: dict[Path, Path] = {}
    owners: dict[Path, Path] = {}
    without_area: Counter[str] = Counter()
    for path, document in documents.items():
        if part is not None and parts[path] != part:
            continue
        without_area.update(one["label"] for one in document.shapes if one.get("shape_type") in WITHOUT_AREA)
        try:
            source = document.image()
            image = images[path] = Path(source["path"])
            objects = document.objects(ids, task)
            if (owner := owners.setdefault(image, path)) != path:
                raise DatasetError(f"{path} and {owner.name} are of the same image {image.name}: remove one of them.")
        except DatasetError as error:
            problems.add(error)
            continue
        name = path.relative_to(root)
        columns["image"].append(source)
        columns["file_name"].append(name.with_suffix(Path(source["path"]).suffix).as_posix())
        columns["image_id"].append(name.with_suffix("").as_posix())
        columns["height"].append(document.height)
        columns["width"].append(document.width)
        columns["annotations"].append(json.dumps(objects, separators=(",", ":")))
    _warn_of_spare_images(root, images, parts, part)
    if without_area:
        listed = ", ".join(f"{count:,} of {label}" for label, count in without_area.most_common())
        logger.warning_once(
            f"{root} has shapes that are points or lines. They have no area, so they are left out ({listed}): if they "
            "are objects to find, draw polygons around them."
        )
    if not names:
        raise DatasetError(f"The files in {root} have no shape with a class, so there is nothing to learn.")
    things = frozenset(range(len(names)) if task == "instance" else ())
    description = Description(
        str(root), task, tuple(names), things, problems.report(str(root)), annotation_frame=annotation_frame
    )
    features = {
        "image": IMAGE_FEATURE, "file_name": datasets.Value("string"), "image_id": datasets.Value("string"),
        "height": datasets.Value("int32"), "width": datasets.Value("int32"), "annotations": TEXT,
    }  # fmt: skip
    data = lazy_dataset(columns, features, LabelmeReader(description, str(root)))
    return data if part is not None else hold_out(data, split, str(root))


def _warn_of_spare_images(
    root: Path, images: Mapping[Path, Path], parts: Mapping[Path, str | None], part: str | None
) -> None:
    """Warns of images that no JSON file belongs to, in the folders of the images that are read and of their JSON files.

    Args:
        root: the folder of the dataset.
        images: the image of each JSON file that could be read, or the file itself if it contains the image.
        parts: the part of each JSON file.
        part: the part that is read; None for all.
    """
    used = {os.path.abspath(path) for path in images.values()}
    own = {path for path in parts if part is None or parts[path] == part}
    beside = {path.with_suffix("") for path in parts}
    # The images of these files are known only by their names.
    broken = {path.stem for path in own if path not in images}
    others = {path.stem for path in parts if path not in own}
    folders = {os.path.abspath(path.parent) for path in (*own, *images.values())}
    spare = [
        path
        for path in files_below(root, IMAGE_SUFFIXES)
        if os.path.abspath(path.parent) in folders
        and os.path.abspath(path) not in used
        and path.with_suffix("") not in beside
        and path.stem not in broken
        # In a folder that the parts share, it may be the image of another part.
        and (_part_of(path, root) == part or path.stem not in others)
    ]
    if spare:
        what = f"{len(spare):,} images" if len(spare) > 1 else "an image"
        logger.warning_once(
            f"{root} has {what} without a JSON file, such as {spare[0].relative_to(root)}: not read. Save a file "
            "without shapes for an image without objects, annotate the others, or move them elsewhere."
        )


@dataclass
class _Document:
    """A valid JSON file of labelme, without its image.

    Args:
        path: path of the file.
        root: the folder of the dataset, which must contain the image.
        image_path: the image's path as stated in the file.
        has_image: whether the file contains the image.
        height, width: size of the image.
        shapes: the shapes.
    """

    path: Path
    root: Path
    image_path: str
    has_image: bool
    height: int
    width: int
    shapes: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path, root: Path) -> "_Document":
        """Reads and validates a file.

        Raises:
            DatasetError: it is not a valid file of labelme, or has neither a size nor an image.
        """
        content = _content(path)
        shapes = content.get("shapes")
        if not isinstance(shapes, list) or not all(
            isinstance(shape, dict) and isinstance(shape.get("label"), str) and shape["label"].strip()
            for shape in shapes
        ):
            raise DatasetError(f"{path} has no list of shapes, each with a label: it is not of labelme's form.")
        # Labels are typed by hand, and the names in labels.txt have no spaces around them either.
        shapes = [{**shape, "label": shape["label"].strip()} for shape in shapes]
        name = content.get("imagePath")
        document = cls(path, root, name if isinstance(name, str) else "", bool(content.get("imageData")), 0, 0, shapes)
        size = content.get("imageHeight"), content.get("imageWidth")
        if size == (None, None):
            source = document.image()
            size = read_header(source if source["path"] != str(path) else embedded_image(path))[1:]
        height, width = size
        if type(height) is not int or type(width) is not int or not 0 < height < 2**31 or not 0 < width < 2**31:
            raise DatasetError(f"{path} has the imageHeight and imageWidth {size[0]!r} and {size[1]!r}.")
        check_stated_size(height, width, str(path))
        document.height, document.width = height, width
        return document

    def image(self) -> dict[str, Any]:
        """The source of the image; this file's path if it contains the image.

        Raises:
            DatasetError: there is no image, or it is not clear which one was annotated.
        """
        name = self.image_path.replace("\\", "/")
        candidates = []
        if name and "\0" not in name and not os.path.isabs(name):
            named = Path(os.path.normpath(self.path.parent / name))
            if named.is_relative_to(os.path.normpath(self.root)):
                candidates.append(named)
        if name and "\0" not in name:
            candidates.append(self.path.parent / Path(name).name)
        candidates += [self.path.with_suffix(suffix) for suffix in SUFFIXES_TRIED]
        found = next((path for path in candidates if path.suffix.lower() != ".json" and path.is_file()), None)
        own = next((path for path in map(self.path.with_suffix, SUFFIXES_TRIED) if path.is_file()), None)
        if found is not None and own is not None and found.stem != own.stem:
            raise DatasetError(
                f"{self.path} has the imagePath {self.image_path!r}, which is another image than {own.name} beside it: "
                "correct imagePath, or remove the image that is not meant."
            )
        if found is None and not self.has_image:
            raise DatasetError(
                f"{self.path} has no image: there is no file {self.image_path or self.path.stem!r} beside it or at "
                f"that place in {self.root}, and no imageData in it."
            )
        return file_source(found if found is not None else self.path)

    def objects(self, ids: Mapping[str, int], task: Task) -> list[dict[str, Any]]:
        """The objects with an area, in the order of their first shapes.

        Raises:
            DatasetError: a shape is invalid, or its label is not in `ids`.
        """
        groups: dict[Any, list[tuple[int, dict[str, Any]]]] = {}
        for number, shape in enumerate(self.shapes):
            label, group = shape["label"], shape.get("group_id")
            if shape.get("shape_type") in WITHOUT_AREA or (task == "instance" and label in (IGNORE, *BACKGROUNDS)):
                continue
            if label not in ids and label != IGNORE:
                raise DatasetError(f"{self.path} has the label {label!r}, which is none of the classes.")
            alone = task == "semantic" or group is None
            if not alone and type(group) not in (int, str):
                raise DatasetError(
                    f"{self.path}: shape {number} has a group_id that is not a number: {str(group)[:40]!r}."
                )
            groups.setdefault(number if alone else (label, group), []).append((number, shape))
        found = []
        for members in groups.values():
            parts = [self._outline(shape, f"{self.path}: shape {number}") for number, shape in members]
            label = members[0][1]["label"]
            found.append({
                "name": f"shape {members[0][0]} ({label})", "class": ids.get(label, -1), "crowd": False, "area": None,
                "segmentation": self._joined(parts),
            })  # fmt: skip
        return found

    def _joined(self, parts: list[Any]) -> Any:
        """Joins parts to one segmentation in COCO's format: polygons, or run lengths if a part is a mask."""
        if all(isinstance(part, list) for part in parts):
            return parts
        if len(parts) == 1:
            return parts[0]
        whole = np.zeros((self.height, self.width), dtype=bool)
        try:
            for part in parts:
                segmentation = [part] if isinstance(part, list) else part
                whole |= decode_run_lengths(to_run_lengths(segmentation, self.height, self.width))
        except ValueError as error:
            raise DatasetError(f"{self.path}: {error}.") from error
        return encode_run_lengths([whole], [(0, 0, self.width - 1, self.height - 1)], (self.height, self.width))[0]

    def _outline(self, shape: Mapping[str, Any], where: str) -> Any:
        """A polygon [x, y, x, y, ...], or run lengths."""
        points, kind = shape.get("points"), shape.get("shape_type") or "polygon"
        is_list = isinstance(points, list) and all(isinstance(point, list) and len(point) == 2 for point in points)
        numbers = [number for point in points for number in point] if isinstance(points, list) and is_list else []
        if not numbers or not all(map(is_finite, numbers)):
            raise DatasetError(f"{where} has no list of points, each with two numbers.")
        for place, number in enumerate(numbers):
            side = self.height if place % 2 else self.width
            if not -side <= number <= 2 * side:
                raise DatasetError(f"{where} has the coordinate {number}, far outside of the image.")
        if kind == "mask":
            return self._mask(shape.get("mask"), numbers, where)
        if kind == "circle" and len(numbers) == 4:
            return _circle(*numbers)
        if kind == "rectangle" and len(numbers) == 4:
            left, top, right, bottom = numbers
            return [left, top, right, top, right, bottom, left, bottom]
        if kind in ("polygon", "rectangle", "oriented_rectangle") and len(numbers) >= 6:
            return numbers
        if kind in ("polygon", "rectangle", "circle"):
            raise DatasetError(f"{where} is a {kind} of {len(numbers) // 2} points: it needs three, or two corners.")
        raise DatasetError(f"{where} has the shape_type {str(kind)[:40]!r}, which is none of labelme's.")

    def _mask(self, text: Any, numbers: list[float], where: str) -> dict[str, Any]:
        """Run lengths of a mask, which is a base64 image of the box from the first to the second point, inclusive."""
        box = [round(number) for number in numbers]
        if len(box) != 4 or not (0 <= box[0] <= box[2] < self.width and 0 <= box[1] <= box[3] < self.height):
            raise DatasetError(f"{where} has a mask without two points in the image.")
        source = {"bytes": _decoded(text, where), "path": where, "lossless": True}
        values = read_map(source, box[3] - box[1] + 1, box[2] - box[0] + 1)
        return encode_run_lengths([values.numpy() > 0], [box], (self.height, self.width))[0]


def _circle(x: float, y: float, edge_x: float, edge_y: float) -> list[float]:
    """A polygon that approximates a circle with this center and a point on its edge."""
    radius = math.hypot(edge_x - x, edge_y - y)
    count = min(max(16, math.ceil(2 * math.pi * radius / ARC)), MOST_CORNERS)
    angles = [2 * math.pi * number / count for number in range(count)]
    return [value for angle in angles for value in (x + radius * math.cos(angle), y + radius * math.sin(angle))]


def _content(path: Path) -> dict[str, Any]:
    if path.is_file() and path.stat().st_size > MOST_JSON:
        raise DatasetError(f"{path} has more than {MOST_JSON:,} bytes: it is not read.")
    content = read_json(path)
    if not isinstance(content, dict):
        raise DatasetError(f"{path} is not of labelme's form: it must be an object with shapes.")
    return content


def _decoded(text: Any, where: str) -> bytes:
    try:
        return base64.b64decode(text if isinstance(text, str) else "", validate=False)
    except (binascii.Error, ValueError) as error:
        raise DatasetError(f"{where} has an image that is not base64: {error}.") from error


def embedded_image(path: Path) -> dict[str, Any]:
    """The source of the image that a JSON file contains.

    Raises:
        DatasetError: it contains none.
    """
    text = _content(path).get("imageData")
    if not text:
        raise DatasetError(f"{path} has no imageData any more.")
    return {"bytes": _decoded(text, str(path)), "path": str(path)}


@dataclass(frozen=True)
class LabelmeReader(CocoInstanceReader):
    """Reads rows of `load_labelme`."""

    smallest_on_top = False

    def source(self, row: Mapping[str, Any]) -> str:
        """The JSON file."""
        return str(Path(self.path, row["image_id"] + ".json"))

    def read(self, row: Mapping[str, Any]) -> Any:
        """The item of a row, with the image from the JSON file if it contains one."""
        path = Path(row["image"]["path"])
        return super().read({**row, "image": embedded_image(path)} if path.suffix.lower() == ".json" else row)


__all__ = ["LabelmeReader", "embedded_image", "find_files", "load_labelme"]

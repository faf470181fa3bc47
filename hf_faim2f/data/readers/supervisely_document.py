"""The JSON files of Supervisely's projects, and the masks of the objects in them.

    {"size": {"height": 480, "width": 640}, "tags": [], "objects": [
        {"classTitle": "cat", "geometryType": "polygon", "points": {"exterior": [[x, y], ...], "interior": [[...]]}},
        {"classTitle": "cat", "geometryType": "rectangle", "points": {"exterior": [[x, y], [x, y]], "interior": []}},
        {"classTitle": "cat", "geometryType": "bitmap", "bitmap": {"data": "eJzr...", "origin": [x, y]}}]}

A bitmap is a PNG, compressed once more by zlib except in older projects, in base64. The object is where it is not
transparent, or, without alpha, where it is not zero.
"""

import base64
import binascii
import io
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, UnidentifiedImageError

from ...errors import DatasetError
from ...masks import decode_run_lengths, encode_run_lengths, is_finite, to_run_lengths
from ..files import check_stated_size, read_json

META = "meta.json"
WITHOUT_AREA = ("point", "line", "polyline", "graph", "cuboid", "cuboid_2d")
# The largest JSON file, in bytes.
MOST_JSON = 1 << 28
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
# Maximum size of a bitmap's PNG, also without compression: bytes for each pixel of the image, and for everything else.
MOST_PER_PIXEL, MOST_BESIDE = 5, 1 << 16

Ring = list[list[float]]
Box = tuple[int, int, int, int]  # x_min, y_min, x_max, y_max, inclusive


class Figure(NamedTuple):
    """An object of an annotation file.

    Args:
        name: for messages.
        title: the class.
        kind: "polygon", "rectangle" or "bitmap".
        parts: the parts of a polygon: the exterior [[x, y], ...], and its holes.
        data, origin: a bitmap's text in base64, and the x and y of its top left pixel.
    """

    name: str
    title: str
    kind: str
    parts: list[list[Ring]]
    data: str = ""
    origin: tuple[int, int] = (0, 0)

    def corners(self) -> np.ndarray:
        """All points of a polygon, (n, 2) float64."""
        return np.array([point for part in self.parts for ring in part for point in ring], dtype=np.float64)

    def box(self) -> list[float] | None:
        """x, y, width and height of a polygon, which may leave its image; None for a bitmap, which cannot."""
        if self.kind == "bitmap":
            return None
        low, high = self.corners().min(0), self.corners().max(0)
        return [*low.tolist(), *(high - low).tolist()]


class Annotation(NamedTuple):
    """An annotation file.

    Args:
        height, width: size of the image.
        figures: the objects with an area.
        left_out: the classes of the objects without an area.
        tags: the names of the image's tags.
    """

    height: int
    width: int
    figures: list[Figure]
    left_out: list[str]
    tags: list[str]


def read_meta(path: Path) -> dict[str, str]:
    """Reads meta.json: the shape of each class, by its title.

    Raises:
        DatasetError: it is not Supervisely's, its project is not of images, or a class is invalid or a duplicate.
    """
    content = _content(path)
    classes, kind = content.get("classes"), content.get("projectType")
    if isinstance(kind, str) and kind != "images":
        raise DatasetError(f"{path} is of a project of {kind[:40]}, not of images.")
    if not isinstance(classes, list):
        raise DatasetError(f"{path} has no list of classes: it is not Supervisely's.")
    found: dict[str, str] = {}
    for entry in classes:
        title = entry.get("title") if isinstance(entry, dict) else None
        if not isinstance(title, str) or not title.strip():
            raise DatasetError(f"{path} has a class without a title: {str(entry)[:60]}.")
        if title in found:
            raise DatasetError(f"{path} has the class {title[:60]!r} twice: rename one of them.")
        found[title] = str(entry.get("shape"))
    return found


def _content(path: Path) -> dict[str, Any]:
    if path.is_file() and path.stat().st_size > MOST_JSON:
        raise DatasetError(f"{path} has more than {MOST_JSON:,} bytes: it is not read.")
    if not path.exists():
        raise DatasetError(f"There is no file {path}.")
    content = read_json(path)
    if not isinstance(content, dict):
        raise DatasetError(f"{path} is not Supervisely's: it must be an object.")
    return content


def read_annotation(path: Path, shapes: Mapping[str, str]) -> Annotation:
    """Reads an annotation file. Bitmaps are not decoded yet.

    Args:
        path: the file.
        shapes: the shape of each class, from `read_meta`.

    Raises:
        DatasetError: it is not Supervisely's, has a class that is not in `shapes`, or has an invalid object.
    """
    content = _content(path)
    size, objects = content.get("size"), content.get("objects")
    if not isinstance(size, dict) or not isinstance(objects, list):
        raise DatasetError(f"{path} has no size and list of objects: it is not an annotation of Supervisely's.")
    height, width = size.get("height"), size.get("width")
    if type(height) is not int or type(width) is not int or not 0 < height < 2**31 or not 0 < width < 2**31:
        raise DatasetError(f"{path} has the height and width {str(height)[:40]} and {str(width)[:40]}.")
    check_stated_size(height, width, str(path))
    figures, left_out = [], []
    for number, entry in enumerate(objects):
        where = f"{path}: object {number}"
        title = entry.get("classTitle") if isinstance(entry, dict) else None
        if not isinstance(title, str):
            raise DatasetError(f"{where} has no classTitle.")
        if title not in shapes:
            raise DatasetError(f"{where} has the class {title[:60]!r}, which {META} does not have: add it there.")
        kind = entry.get("geometryType") or shapes[title]  # older projects have only the class's
        if kind in WITHOUT_AREA:
            left_out.append(title)
            continue
        if shapes[title] in WITHOUT_AREA:
            raise DatasetError(
                f"{where} is a {str(kind)[:40]}, but {META} gives its class {title[:60]!r} the shape {shapes[title]}: "
                "correct it there, for example to `any`."
            )
        figures.append(_figure(entry, kind, f"object {number} ({title})", title, f"{where} ({title})", (height, width)))
    tags = content.get("tags")
    names = [tag.get("name") if isinstance(tag, dict) else tag for tag in (tags if isinstance(tags, list) else [])]
    return Annotation(height, width, figures, left_out, [name for name in names if isinstance(name, str)])


def _figure(entry: Mapping[str, Any], kind: Any, name: str, title: str, where: str, size: tuple[int, int]) -> Figure:
    """An object with an area; `where` names it in messages, and `size` is the (height, width) of its image."""
    if kind == "bitmap":
        bitmap = entry.get("bitmap")
        data, origin = (bitmap.get("data"), bitmap.get("origin")) if isinstance(bitmap, dict) else (None, None)
        if not isinstance(data, str):
            raise DatasetError(f"{where} has no bitmap with data and origin.")
        ((x, y),) = _ring([origin], where, size)
        return Figure(name, title, kind, [], data, (math.floor(x), math.floor(y)))
    if kind not in ("polygon", "multipolygon", "rectangle"):
        raise DatasetError(
            f"{where} has the geometryType {str(kind)[:40]!r}, which is not read: convert it to a bitmap or a polygon "
            "in Supervisely."
        )
    parts = entry.get("parts") if kind == "multipolygon" else [entry.get("points")]
    rings = []
    for part in parts if isinstance(parts, list) else []:
        exterior, holes = (part.get("exterior"), part.get("interior")) if isinstance(part, dict) else (None, None)
        outer = _ring(exterior, where, size)
        if kind == "rectangle" and len(outer) == 2:
            (left, top), (right, bottom) = outer
            outer, holes = [[left, top], [right, top], [right, bottom], [left, bottom]], None
        elif kind == "rectangle" or len(outer) < 3:
            needed = "two corners" if kind == "rectangle" else "three or more"
            raise DatasetError(f"{where} is a {kind} of {len(outer)} points: it needs {needed}.")
        inner = [_ring(hole, where, size) for hole in (holes if isinstance(holes, list) else [])]
        rings.append([outer, *(hole for hole in inner if len(hole) > 2)])  # others have no area
    if not rings:
        raise DatasetError(f"{where} is a {kind} without parts.")
    return Figure(name, title, kind, rings)


def _ring(points: Any, where: str, size: tuple[int, int]) -> Ring:
    """Points [x, y] from untrusted JSON.

    Raises:
        DatasetError: they are not a list of such, or one is far outside of the image.
    """
    if not isinstance(points, list) or not points:
        raise DatasetError(f"{where} has no list of points, each with two numbers.")
    for point in points:
        if not isinstance(point, list) or len(point) != 2 or not all(map(is_finite, point)):
            raise DatasetError(f"{where} has no list of points, each with two numbers.")
        for number, side in zip(point, (size[1], size[0]), strict=True):
            if not -side <= number <= 2 * side:
                raise DatasetError(f"{where} has the coordinate {number}, far outside of the image.")
    return points


def run_lengths_of(figure: Figure, height: int, width: int) -> dict[str, Any]:
    """The run lengths of an object's mask in an image of this size, as in `encode_run_lengths`.

    Raises:
        ValueError: a bitmap cannot be decoded or leaves the image, or a polygon is too long.
    """
    mask, box = (_decoded if figure.kind == "bitmap" else _filled)(figure, height, width)
    return encode_run_lengths([mask], [box], (height, width))[0]


def _filled(figure: Figure, height: int, width: int) -> tuple[np.ndarray, Box]:
    """The mask of a polygon, cropped to a box.

    Raises:
        ValueError: it is too long.
    """
    corners = figure.corners()
    is_whole = bool((corners == np.floor(corners)).all())
    (left, top), (right, bottom) = np.floor(corners.min(0)).tolist(), np.ceil(corners.max(0)).tolist()
    box = (int(left), int(top), int(right), int(bottom))
    if min(box) < 0 or right >= width or bottom >= height:
        box = (0, 0, width - 1, height - 1)

    def filled(ring: Ring) -> np.ndarray:
        size = (box[3] - box[1] + 1, box[2] - box[0] + 1)
        moved = np.array(ring, dtype=np.float64) - box[:2]
        # The centers of pixels are at fractions of one half.
        mask = decode_run_lengths(to_run_lengths([(moved + 0.5 * is_whole).ravel().tolist()], *size))
        if not is_whole:
            return mask
        outline = Image.new("L", size[::-1])
        ImageDraw.Draw(outline).line([(int(x), int(y)) for x, y in (*moved, moved[0])], fill=1)
        return mask | (np.asarray(outline) > 0)

    whole = np.zeros((box[3] - box[1] + 1, box[2] - box[0] + 1), dtype=bool)
    for exterior, *holes in figure.parts:
        mask = filled(exterior)
        for hole in holes:
            mask &= ~filled(hole)
        whole |= mask
    return whole, box


def _decoded(figure: Figure, height: int, width: int) -> tuple[np.ndarray, Box]:
    """The mask of a bitmap, and its box.

    Raises:
        ValueError: it cannot be decoded, or leaves the image. Nothing much larger than such an image is allocated.
    """
    try:
        data = base64.b64decode(figure.data, validate=False)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"its bitmap is not base64 ({error})") from error
    if not data.startswith(PNG_MAGIC):  # in older projects, it is not compressed once more
        unpacker, most = zlib.decompressobj(), MOST_PER_PIXEL * height * width + MOST_BESIDE
        try:
            data = unpacker.decompress(data, most)
        except zlib.error as error:
            raise ValueError(f"its bitmap is neither a PNG nor one compressed by zlib ({error})") from error
        if unpacker.unconsumed_tail:
            raise ValueError(f"its bitmap has more than {most:,} bytes, too many for an image of {height}x{width}")
    x, y = figure.origin
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG",))
    except Exception as error:  # on damaged files, Pillow raises any
        reason = "" if isinstance(error, UnidentifiedImageError) else f" that can be opened ({error})"
        raise ValueError(f"its bitmap is not a PNG{reason}") from error
    if not (0 <= x <= width - image.width and 0 <= y <= height - image.height):
        raise ValueError(
            f"its bitmap of {image.height}x{image.width} pixels (height x width) at x={x}, y={y} leaves its image of "
            f"{height}x{width}"
        )
    try:
        mask = _opaque(image)
    except Exception as error:
        raise ValueError(f"its bitmap is a damaged PNG ({error})") from error
    return mask, (x, y, x + image.width - 1, y + image.height - 1)


def _opaque(image: Image.Image) -> np.ndarray:
    """The mask (H, W), bool, that an image shows: where it is not transparent, or, if it has no alpha, not zero."""
    image.load()
    if "transparency" in image.info and image.mode in ("1", "L", "P", "RGB"):  # of a palette, or of one value or color
        image = image.convert("RGBA")
    values = np.asarray(image.getchannel("A") if "A" in image.getbands() else image)
    return np.asarray(values != 0 if values.ndim == 2 else values.any(-1))


__all__ = ["META", "WITHOUT_AREA", "Annotation", "Figure", "read_annotation", "read_meta",
           "run_lengths_of"]  # fmt: skip

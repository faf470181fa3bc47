"""Writes segments as annotations for other tools: COCO's JSON, YOLO's outlines, labelme's JSON, or masks.

An outline follows the edges of pixels, so that a reader of the same format gets exactly the same pixels back. Holes and
additional parts are joined to the outer outline by connecting lines, which the outline traverses in both directions.
"""

import io
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import yaml
from PIL import Image

from ..errors import DatasetError
from ..files import write_whole
from ..masks import encode_run_lengths
from .files import ARRAY_SUFFIXES, IMAGE_SUFFIXES, LABELS_FILE
from .item import INSTANCES_PER_CLASS, WHITE

# Formats of predictions to correct by hand, and of converted datasets.
FORMS = ("coco", "yolo", "labelme")
TARGETS = ("coco", "yolo", "masks")
# Maximum number of classes in 16-bit masks of instances, whose values are 1000 * (class + 1) + number.
MOST_CLASSES_16 = 64
# The value of pixels without a class in 16-bit masks of classes; see `void_of`.
DEEP_VOID = 65535
# Maximum number of outlines that are joined by the shortest lines.
MOST_JOINED = 200
VOID_RED = (WHITE, 1, 0)
LABELME_VERSION = "5.5.0"


class Mark(NamedTuple):
    """A segment of an image.

    Args:
        label: its class id.
        crop: (y_max - y_min + 1, x_max - x_min + 1) bool, its mask inside the box.
        box: x_min, y_min, x_max, y_max in pixels, inclusive.
        crowd: whether it is a group of objects.
        score: the score of a predicted segment; None for ground truth.
    """

    label: int
    crop: np.ndarray
    box: tuple[int, int, int, int]
    crowd: bool = False
    score: float | None = None


def mark_of(mask: np.ndarray, label: int, crowd: bool = False) -> Mark | None:
    """The mark of a mask (H, W) bool; None if it has no pixel."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not len(rows):
        return None
    box = (int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1]))
    # A view would keep the whole mask in memory.
    return Mark(label, mask[box[1] : box[3] + 1, box[0] : box[2] + 1].copy(), box, crowd)


Point = tuple[int, int]


def trace(mask: np.ndarray, left: int = 0, top: int = 0) -> list[list[Point]]:
    """The outline of each connected part (4-neighbors) of a mask, along the edges of its pixels.

    Filled by the even-odd rule, the outlines cover exactly the mask. Each hole is joined to the outline around it by a
    connecting line, which the outline traverses in both directions.

    Args:
        mask: (h, w) bool.
        left, top: position of the mask in the image, in pixels.

    Returns:
        The corners (x, y) of each outline; the last is joined to the first.
    """
    rings, holes = _rings(mask)
    edges = [
        (ring[k][1], min(ring[k][0], ring[k + 1][0]), max(ring[k][0], ring[k + 1][0]), number, k)
        for number, ring in enumerate(rings)
        for k in range(0, len(ring), 2)  # the horizontal ones
    ]
    y, first, last, owner, place = np.array(edges, dtype=np.int64).reshape(-1, 5).T
    # Each hole is attached to the nearest horizontal edge above it. Rings are completed from the bottom up, because a
    # hole must be complete before it becomes part of the ring above it.
    hanging: dict[tuple[int, int], list[int]] = {}
    for hole in holes:
        x_hole, y_hole = rings[hole][0]
        above = np.flatnonzero((y < y_hole) & (first <= x_hole) & (x_hole < last))
        edge = above[y[above].argmax()]
        hanging.setdefault((int(owner[edge]), int(place[edge])), []).append(hole)
    whole: list[list[Point]] = [[] for _ in rings]
    for number in reversed(range(len(rings))):
        ring = rings[number]
        for k, point in enumerate(ring):
            whole[number].append(point)
            below = hanging.get((number, k), [])
            forwards = ring[(k + 1) % len(ring)][0] > point[0]
            for hole in sorted(below, key=lambda hole: rings[hole][0][0], reverse=not forwards):
                start = rings[hole][0]
                whole[number] += [(start[0], point[1]), *whole[hole], start, (start[0], point[1])]
                whole[hole] = []
    return [[(x + left, y + top) for x, y in outline] for outline in whole if outline]  # holes are merged


def _rings(mask: np.ndarray) -> tuple[list[list[Point]], list[int]]:
    """The closed lines around a mask and its holes, and the indices of the lines around holes.

    Each line starts at its topmost left corner, goes right, and alternates between horizontal and vertical edges. Lines
    are sorted by that corner from top to bottom. Pixels that only touch at a corner are kept apart.
    """
    padded = np.pad(mask.astype(np.int8), 1)
    north_west, north_east = padded[:-1, :-1], padded[:-1, 1:]
    south_west, south_east = padded[1:, :-1], padded[1:, 1:]
    count = north_west + north_east + south_west + south_east
    crossing = (count == 2) & (north_west == south_east)  # two pixels touch: two corners in one place
    ys, xs = np.nonzero((count % 2 == 1) | crossing)
    twice = crossing[ys, xs]
    is_rising = twice & (north_east[ys, xs] == 1)
    ys, xs, is_rising = (np.concatenate([values, values[twice]]) for values in (ys, xs, is_rising))
    second = np.arange(len(ys)) >= len(twice)
    in_rows = np.lexsort((second, xs, ys))
    in_columns = np.lexsort((second ^ is_rising, ys, xs))
    beside, above = (_partners(order) for order in (in_rows, in_columns))
    points: list[Point] = list(zip(xs.tolist(), ys.tolist(), strict=True))
    left_over = np.ones(len(points), dtype=bool).tolist()
    rings: list[list[Point]] = []
    holes: list[int] = []
    for start in in_rows.tolist():
        if not left_over[start]:
            continue
        ring, here = [], start
        while left_over[here]:
            across = beside[here]
            left_over[here] = left_over[across] = False
            ring += [points[here], points[across]]
            here = above[across]
        x, y = points[start]
        if not south_east[y, x]:
            holes.append(len(rings))
        rings.append(ring)
    return rings, holes


def _partners(order: np.ndarray) -> list[int]:
    """Pairs consecutive corners of `order` (first and second, third and fourth, ...); returns each one's partner."""
    partner = np.empty(len(order), dtype=np.int64)
    partner[order[::2]], partner[order[1::2]] = order[1::2], order[::2]
    return partner.tolist()


def joined(outlines: Sequence[Sequence[Point]]) -> list[Point]:
    """Joins outlines to one, by a line from the nearest corner of the preceding ones to each further one, and back."""
    whole = list(outlines[0])
    if len(outlines) > MOST_JOINED:  # all from the first corner, because the search takes quadratic time
        return whole + [point for one in outlines[1:] for point in (whole[0], *one, one[0])] + whole[:1]
    for outline in outlines[1:]:
        corners = np.array(whole)
        distances = ((corners - np.array(outline[0])) ** 2).sum(1)
        place = int(distances.argmin())
        whole[place + 1 : place + 1] = [*outline, outline[0], whole[place]]
    return whole


class AnnotationFolder:
    """Writes images with their annotations to a folder; `add` is thread-safe.

        coco      images/[PART/]NAME.jpg   annotations/instances_PART.json (masks as run lengths)
        yolo      images/[PART/]NAME.jpg   labels/[PART/]NAME.txt   data.yaml
        labelme   [PART/]NAME.jpg          [PART/]NAME.json         labels.txt
        masks     [PART/]images/NAME.jpg   [PART/]masks/NAME.png    labels.txt

    Args:
        folder: an existing folder.
        form: one of these formats.
        labels: class names.
        things: the classes with separate instances; None for all.
        category_ids: the ids of the classes in COCO's JSON; None for 1, 2, ... In YOLO's labels they are 0, 1, ...,
            because Ultralytics refuses gaps.
        instances: for "masks", whether to write instances instead of classes.

    Raises:
        DatasetError: a class name is repeated, or masks cannot represent that many classes, or one of the names.
    """

    def __init__(
        self,
        folder: Path,
        form: str,
        labels: Sequence[str],
        things: Iterable[int] | None = None,
        category_ids: Sequence[int] | None = None,
        instances: bool = False,
    ) -> None:
        self.folder, self.form, self.labels, self.instances = folder, form, tuple(labels), instances
        twice = [label for label, count in Counter(self.labels).items() if count > 1]
        if twice:
            raise DatasetError(f"Several classes have the name {twice[0]!r}, so readers refuse them: rename them.")
        self.things = frozenset(range(len(self.labels)) if things is None else things)
        own = category_ids if form == "coco" and category_ids else range(form == "coco", len(self.labels) + 1)
        self.category_ids = tuple(own)[: len(self.labels)]
        if form == "masks" and instances and len(self.labels) > WHITE:
            raise DatasetError(
                f"Instance masks can hold at most {WHITE} classes, not {len(self.labels)}: choose coco or yolo."
            )
        names = [label.strip() for label in self.labels]
        bad = next((name for name in names if not name or len(name.splitlines()) > 1 or names.count(name) > 1), None)
        if form == "masks" and bad is not None:
            raise DatasetError(
                f"{LABELS_FILE} of the format masks cannot hold the class name {bad!r}, because each line must be a "
                "unique name: choose coco or yolo."
            )
        self.write: Callable[[Path, bytes], None] = _write
        self._lock = threading.Lock()
        self._added: dict[str, dict[int, tuple[str, tuple[int, int], list[dict[str, Any]]]]] = {}

    def add(
        self,
        index: int,
        name: PurePosixPath,
        image: bytes,
        suffix: str,
        size: tuple[int, int],
        marks: Sequence[Mark],
        part: str = "",
    ) -> None:
        """Writes an image and its annotations.

        Args:
            index: the position of the image in its part.
            name: its relative path without suffix, which must be unique in its part.
            image: the contents of the image's file.
            suffix: the file's suffix.
            size: (height, width) of the upright image.
            marks: its segments, the topmost last.
            part: the part of the data, such as "train"; empty if it is not divided.

        Raises:
            OSError: a file cannot be written.
            DatasetError: the format cannot represent that many instances.
        """
        if self.form == "yolo":
            name = _without_images(name)
        file = name.with_name(name.name + suffix)
        images = {"labelme": Path(part), "masks": Path(part, "images")}.get(self.form, Path("images", part))
        self.write(self.folder / images / file, image)
        entries: list[dict[str, Any]] = []
        if self.form == "coco":
            entries = self._coco(marks, size)
        elif self.form == "yolo":
            text = "".join(f"{self._line(mark, size)}\n" for mark in marks)
            self.write(self.folder / "labels" / part / f"{name}.txt", text.encode())
        elif self.form == "labelme":
            text = json.dumps(self._labelme(marks, size, file.name), indent=1, allow_nan=False)
            self.write(self.folder / part / f"{name}.json", text.encode())
        else:
            self.write(self.folder / part / "masks" / f"{name}.png", self._mask(marks, size, str(name)))
        with self._lock:
            self._added.setdefault(part, {})[index] = (str(file), size, entries)

    @property
    def has_images(self) -> bool:
        """Whether an image has been added."""
        return bool(self._added)

    def finish(self) -> None:
        """Writes the files about the whole dataset, such as the class names.

        Raises:
            OSError: a file cannot be written.
        """
        parts = [*self._added]
        if self.form == "coco":
            for part in parts:
                text = json.dumps(self._document(part), allow_nan=False)
                self.write(self.folder / "annotations" / f"instances_{part or 'default'}.json", text.encode())
        elif self.form == "yolo":
            # No `path`: Ultralytics would take it as relative to the working directory, not to the file.
            content = {part: f"images/{part}" for part in parts if part}
            comment = ""
            if parts == [""]:  # the same images as `val` would be evaluated on after training on them
                content["train"] = "images"
                comment = "# Ultralytics requires `val`, too: move some images to a folder of their own for it.\n"
            names = dict(zip(self.category_ids, self.labels, strict=True))
            text = comment + yaml.safe_dump({**content, "names": names}, sort_keys=False, allow_unicode=True)
            self.write(self.folder / "data.yaml", text.encode())
        else:
            self.write(self.folder / LABELS_FILE, "".join(f"{label}\n" for label in self.labels).encode())

    def _coco(self, marks: Sequence[Mark], size: tuple[int, int]) -> list[dict[str, Any]]:
        run_lengths = encode_run_lengths([mark.crop for mark in marks], [mark.box for mark in marks], size)
        return [
            {
                "category_id": self.category_ids[mark.label],
                "segmentation": one,
                "area": int(mark.crop.sum()),
                "bbox": [*mark.box[:2], mark.box[2] - mark.box[0] + 1, mark.box[3] - mark.box[1] + 1],
                "iscrowd": int(mark.crowd),
                **({} if mark.score is None else {"score": round(mark.score, 6)}),
            }
            for mark, one in zip(marks, run_lengths, strict=True)
        ]

    def _document(self, part: str) -> dict[str, Any]:
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number, (_, (file, (height, width), entries)) in enumerate(sorted(self._added[part].items()), 1):
            images.append({"id": number, "file_name": file, "height": height, "width": width})
            for entry in entries:
                annotations.append({"id": len(annotations) + 1, "image_id": number, **entry})
        categories = [
            {"id": self.category_ids[label], "name": name, "isthing": int(label in self.things)}
            for label, name in enumerate(self.labels)
        ]
        return {"images": images, "annotations": annotations, "categories": categories}

    def _line(self, mark: Mark, size: tuple[int, int]) -> str:
        outline = joined(trace(mark.crop, mark.box[0], mark.box[1]))
        numbers = [f"{value:.9g}" for x, y in outline for value in (x / size[1], y / size[0])]
        return " ".join([str(self.category_ids[mark.label]), *numbers])

    def _labelme(self, marks: Sequence[Mark], size: tuple[int, int], file: str) -> dict[str, Any]:
        shapes: list[dict[str, Any]] = []
        for number, mark in enumerate(marks, 1):
            outlines = trace(mark.crop, mark.box[0], mark.box[1])
            for outline in outlines:
                shapes.append({
                    "label": self.labels[mark.label], "points": outline, "shape_type": "polygon", "flags": {},
                    "group_id": number if len(outlines) > 1 else None,
                    "description": "" if mark.score is None else f"{mark.score:.3f}",
                })  # fmt: skip
        return {"version": LABELME_VERSION, "flags": {}, "shapes": shapes, "imagePath": file, "imageData": None,
                "imageHeight": size[0], "imageWidth": size[1]}  # fmt: skip

    def _mask(self, marks: Sequence[Mark], size: tuple[int, int], name: str) -> bytes:
        """A PNG of classes or instances, encoded as in the format "folder"; the last mark is on top."""
        count = len(self.labels)
        if not self.instances:
            void = void_of(count)
            values = np.full(size, void, dtype=np.uint8 if void == WHITE else np.uint16)
            numbers: list[Any] = [mark.label for mark in marks]
        else:
            is_small = count <= MOST_CLASSES_16
            most = INSTANCES_PER_CLASS if is_small else WHITE
            values = np.zeros(size, dtype=np.uint16) if is_small else np.full((*size, 3), VOID_RED, dtype=np.uint8)
            numbers, used = [], dict.fromkeys(range(count), 0)
            for mark in marks:
                if used[mark.label] == most:
                    raise DatasetError(
                        f"{name} has more than {most} instances of {self.labels[mark.label]}, the limit of a mask: "
                        "choose coco or yolo."
                    )
                own = used[mark.label]
                used[mark.label] += 1
                numbers.append(INSTANCES_PER_CLASS * (mark.label + 1) + own if is_small else (mark.label, own + 1, 0))
        for mark, number in zip(marks, numbers, strict=True):
            x_min, y_min, x_max, y_max = mark.box
            values[y_min : y_max + 1, x_min : x_max + 1][mark.crop] = number
        file = io.BytesIO()
        Image.fromarray(values).save(file, "PNG")
        return file.getvalue()


def void_of(count: int) -> int:
    """The value of pixels without a class in masks of this number of classes: 255 in 8 bits, or 65535 in 16.

    The latter also for a single class: readers refuse masks of only 0 and 255, which look like binary masks.
    """
    return WHITE if 1 < count <= WHITE else DEEP_VOID


def _without_images(name: PurePosixPath) -> PurePosixPath:
    """A name without a folder `images`: Ultralytics replaces the last one in an image's path by `labels`.

    Such folders become `images_`, `images_` becomes `images__`, and so on, so that different names stay different.
    """
    folders = (f"{one}_" if one.casefold().rstrip("_") == "images" else one for one in name.parts[:-1])
    return PurePosixPath(*folders, name.name)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)


def image_suffix(name: str) -> str:
    """A suffix by which readers recognize a copy of an image: the file's own, or ".png" if it is not an image's."""
    suffix = PurePosixPath(name).suffix
    return suffix if suffix.lower() in (*IMAGE_SUFFIXES, *ARRAY_SUFFIXES) else ".png"


__all__ = ["FORMS", "TARGETS", "AnnotationFolder", "Mark", "image_suffix", "joined", "mark_of", "trace", "void_of"]

"""Color masks: a palette assigns a class to each color.

    images/street.jpg   masks/street.png   labels.txt      `name r g b` per line

A palette is a text file with a name and three numbers on each line: `sky 128 128 128`, `64 128 64  Animal`,
`name,r,g,b` (class_dict.csv), `name:r,g,b::` (CVAT's labelmap.txt) or `name #808080`; or "voc", Pascal VOC's color map.
Names in `NO_CLASS` mean no class. A mask with a color that is not in the palette is rejected.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import datasets

from ...errors import DatasetError
from ..dataset import ROW_FEATURES, Description, Problems, Task, find_part, hold_out, kind_of_part, lazy_dataset
from ..files import LABELS_FILE, AnnotationFrame, Source, read_colors, read_small_text, source_name
from ..item import WHITE, index_values
from .folder import load_folder, paired_maps, read_labels
from .maps import NO_CLASS, IgnoredWhiteError, MapReader, Segments, table_of

Color = tuple[int, int, int]

PALETTE_FILES = ("labels.txt", "class_dict.csv", "labelmap.txt", "label_colors.txt")
VOC = "voc"
VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
# The color of borders (index 255) in Pascal VOC's color map.
VOC_BORDER = (224, 224, 192)
_FIRST = re.compile(r"^(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\S.*)$")
_LAST = re.compile(r"^(\S.*?)[\s,:;=]+(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})(?:\s*:.*)?$")
_NUMBER_FIRST = re.compile(r"^(\d{1,3})[\s,:;]+(\S.*)$")
_NUMBER_LAST = re.compile(r"^(\S.*?)[\s,:;=]+(\d{1,3})$")
_HEX = re.compile(r"^(\S.*?)[\s,:;=]+#([0-9a-fA-F]{6})$")


class Palette(NamedTuple):
    """Classes and their colors.

    Args:
        labels: the class names.
        classes: the class of each color, -1 for none.
        name: the file, for messages.
    """

    labels: tuple[str, ...]
    classes: dict[Color, int]
    name: str


def voc_color(index: int) -> Color:
    """The color with this index, 0 to 255, in Pascal VOC's color map."""
    red = green = blue = 0
    for bit in range(8):
        red |= (index >> (3 * bit) & 1) << (7 - bit)
        green |= (index >> (3 * bit + 1) & 1) << (7 - bit)
        blue |= (index >> (3 * bit + 2) & 1) << (7 - bit)
    return red, green, blue


def voc_palette(labels: Sequence[str] | None = None) -> Palette:
    """Pascal VOC's color map for its own classes or others; the first class is black.

    Raises:
        DatasetError: there are more than 255 classes.
    """
    names = tuple(labels or VOC_CLASSES)
    if len(names) > 255:
        raise DatasetError(f"Pascal VOC's color map has 255 classes, not {len(names)}.")
    colors = {VOC_BORDER: -1, **{voc_color(number): number for number in range(len(names))}}
    return Palette(names, colors, "Pascal VOC's color map")


def read_palette(path: Path) -> Palette:
    """Reads a palette in one of the formats in the module's docstring.

    Raises:
        DatasetError: it cannot be read, a line has none of these formats, all lines have a further number, or a name or
            a color is repeated.
    """
    lines: list[tuple[str, Color]] = []
    plain: list[tuple[str, Color]] = []
    starts_with_color: list[bool] = []
    for number, line in enumerate(read_small_text(path).split("\n"), 1):
        text = line.strip()
        if not text or text.startswith(("#", "//")) or re.fullmatch(r"name[\s,]+r[\s,]+g[\s,]+b", text.lower()):
            continue
        found = _parse(text)
        if found is None:
            raise DatasetError(
                f"{path} has no name and color in line {number}: write `name r g b`, such as `sky 0 0 255`."
            )
        lines.append(found)
        if not _HEX.match(text):
            plain.append(found)
            starts_with_color.append(not _LAST.match(text))
    if len(plain) > 1 and _have_further_number(plain, all(starts_with_color)):
        raise DatasetError(
            f"{path} has a further number on each line, an id or alpha, beside name and color: write `name r g b`, "
            "such as `sky 0 0 255`, or `name #rrggbb` if the number is a part of the name."
        )
    labels: list[str] = []
    classes: dict[Color, int] = {}
    for name, color in lines:
        if color in classes:
            raise DatasetError(f"{path} has the color {color} twice: one color stands for one class.")
        if name.lower() in NO_CLASS:
            classes[color] = -1
            continue
        if name in labels:
            raise DatasetError(f"{path} has the class name {name!r} twice.")
        classes[color] = len(labels)
        labels.append(name)
    if not labels:
        raise DatasetError(f"{path} has no class: write `name r g b` on each line.")
    return Palette(tuple(labels), classes, str(path))


def _have_further_number(lines: Sequence[tuple[str, Color]], start_with_color: bool) -> bool:
    """Whether all names contain a number of another column: in front of them an id or alpha, or blue if ids come first;
    or behind them red, because the last number is alpha or an id. Names may have numbers of their own: `3 wheeler`."""
    first = [match for name, _ in lines if (match := _NUMBER_FIRST.match(name))]
    if len(first) == len(lines):
        ids = [int(match[1]) for match in first]
        in_order = ids in (list(range(len(ids))), list(range(1, len(ids) + 1)))
        if start_with_color or in_order or any(match[2].lower() in NO_CLASS for match in first):
            return True
    last = [match for name, _ in lines if (match := _NUMBER_LAST.match(name))]
    if start_with_color or len({match[1] for match in last}) < len(lines):
        return False
    further = [color[2] for _, color in lines]
    if further in (list(range(len(lines))), list(range(1, len(lines) + 1))):
        return True
    # One class may be transparent, but among two lines only if it is none, or black.
    clear = [(match, color) for match, (_, color) in zip(last, lines, strict=True) if color[2] == 0]
    is_none = any(match[1].lower() in NO_CLASS or (match[2], *color) == ("0", 0, 0, 0) for match, color in clear)
    return set(further) <= {0, WHITE} and len(clear) <= 1 and (not clear or is_none or len(lines) > 2)


def _parse(text: str) -> tuple[str, Color] | None:
    """The name and the color in a line; None if it has no such format."""
    if match := _HEX.match(text):
        return match[1], (int(match[2][:2], 16), int(match[2][2:4], 16), int(match[2][4:], 16))
    match = _LAST.match(text)
    name, numbers = (match[1], match.groups()[1:]) if match else ("", ())
    if not match:
        match = _FIRST.match(text)
        name, numbers = (match[4], match.groups()[:3]) if match else ("", ())
    color = tuple(map(int, numbers))
    return (name.strip(), (color[0], color[1], color[2])) if len(color) == 3 and max(color) < 256 else None


def find_palette(folders: Sequence[Path], palette: str | None, labels: Sequence[str] | None = None) -> Palette | None:
    """The palette of a dataset: the given one, or the first palette file in the folders; None if there is none.

    Args:
        folders: where to look for one of `PALETTE_FILES`.
        palette: a file, or "voc"; None to look in the folders.
        labels: for "voc", class names in place of Pascal VOC's; with a file, None or the same names.

    Raises:
        DatasetError: the file cannot be used, or has other class names.
    """
    if palette == VOC:
        return voc_palette(labels)
    paths = [folder / name for folder in folders for name in PALETTE_FILES]
    if palette is not None:
        paths = [Path(palette)]
    path = next((path for path in paths if palette is not None or (path.is_file() and is_palette(path))), None)
    if path is None:
        return None
    found = read_palette(path)
    if labels is not None and tuple(labels) != found.labels:
        raise DatasetError(f"The labels are not the {len(found.labels)} of {found.name}: leave one of the two out.")
    return found


def is_palette(path: Path) -> bool:
    """Whether the first lines of a text file have a name and a color."""
    try:
        lines = [line.strip() for line in read_small_text(path).split("\n")]
    except DatasetError:
        return False
    own = [line for line in lines if line and not line.startswith(("#", "//"))]
    return bool(own) and any(_parse(line) for line in own[:2])


def load_colors(
    root: str | Path,
    palette: Palette,
    *,
    images: str | Path = "images",
    masks: str | Path = "masks",
    skip_bad: bool = False,
    annotation_frame: AnnotationFrame | None = None,
    mask_end: str = "",
) -> datasets.Dataset:
    """Loads a folder of images and a folder of PNG masks in the colors of a palette: semantic.

    Args:
        root, images, masks, skip_bad, annotation_frame: as in `load_folder`.
        palette: the classes of the colors.
        mask_end: as `end` in `paired_maps`.

    Raises:
        DatasetError: a folder is missing, or an image has no mask.
    """
    root, problems = Path(root), Problems(skip_bad)
    columns = paired_maps(root / images, root / masks, problems, mask_end)
    report = problems.report(str(root))
    description = Description(str(root), "semantic", palette.labels, skipped=report, annotation_frame=annotation_frame)
    reader = ColorMapReader(description, packed(palette), palette.name)
    return lazy_dataset(columns, {**ROW_FEATURES, "annotation": ROW_FEATURES["image"]}, reader)


def load_divided(
    root: str | Path,
    split: str,
    task: Task = "semantic",
    *,
    labels: Sequence[str] | None = None,
    palette: str | None = None,
    has_colors: bool = False,
    ignore_index: int | None = 255,
    reduce_labels: bool = False,
    skip_bad: bool = False,
    annotation_frame: AnnotationFrame | None = None,
) -> datasets.Dataset:
    """Loads a part of a folder of masks of ids, or of colors.

    The parts are ROOT/{train,val}/{images,masks} or ROOT/{images,masks}/{train,val}, with any names that `find_part`
    knows. Without parts, every tenth image is for validation.

    Args:
        root: the folder.
        split: "train", "val" or another part, or "all" if the data is not divided.
        task, ignore_index, reduce_labels, skip_bad, annotation_frame: as in `load_folder`, for masks of ids.
        labels: as in `load_folder`; with colors as in `find_palette`.
        palette: as in `find_palette`, for masks in colors.
        has_colors: whether the masks are in colors.

    Raises:
        DatasetError: there is no such part, a folder, the labels or the palette are missing, or an image has no mask.
    """
    root = Path(root)
    outer = [path.name for path in root.glob("*/") if (path / "images").is_dir()]
    divided = bool({"train", "val", split} & set(outer))
    divided = divided or (not (root / "images").is_dir() and any(map(kind_of_part, outer)))
    # The other order of folders: images/train, images/val, masks/train, masks/val.
    names = [path.name for path in (root / "images").glob("*/")]
    inner = [name for name in names if (root / "masks" / name).is_dir()] or names
    parts, where = (outer, str(root)) if divided else (inner, str(root / "images"))
    own = find_part(parts, split, where)  # None if the data is not divided
    folder = root / own if divided and own is not None else root
    colors = find_palette([folder, root], palette, labels) if has_colors else None
    if has_colors and colors is None:
        raise DatasetError(f"{root} has no palette: write `name r g b` lines into {LABELS_FILE}, or pass --palette.")
    if colors is None and labels is None and divided and not (folder / LABELS_FILE).is_file():
        labels = read_labels(root / LABELS_FILE)

    def load(part: str | None, white_is_void: bool = False) -> datasets.Dataset:
        place = root / part if divided and part is not None else root
        folders = {}
        if not divided and part is not None:
            own_masks = (root / "masks" / part).is_dir()  # else those of all parts are together
            folders = {"images": f"images/{part}", "masks": f"masks/{part}" if own_masks else "masks"}
        if colors is not None:
            return load_colors(place, colors, skip_bad=skip_bad, annotation_frame=annotation_frame, **folders)
        return load_folder(
            place, labels, task, ignore_index=ignore_index, reduce_labels=reduce_labels, skip_bad=skip_bad,
            annotation_frame=annotation_frame, white_is_void=white_is_void, **folders,
        )  # fmt: skip

    try:
        data = load(own)
    except IgnoredWhiteError as error:
        # A small validation part may have void but no object. Then the training part shows whether masks are binary.
        if own is None or kind_of_part(own) == "train":
            raise
        try:
            load(find_part(parts, "train", where))
        except DatasetError:
            raise error from None
        data = load(own, white_is_void=True)
    return data if own is not None else hold_out(data, split, str(root))


def packed(palette: Palette) -> dict[int, int]:
    """The class of each color, as the number 65536 * red + 256 * green + blue."""
    return {(red << 16) + (green << 8) + blue: label for (red, green, blue), label in palette.classes.items()}


@dataclass(frozen=True)
class ColorMapReader(MapReader):
    """Reads masks of colors.

    Args:
        classes: the class of each color; see `packed`.
        palette: name of the palette, for messages.
        image, annotation: names of the columns.
    """

    classes: Mapping[int, int]
    palette: str

    def segments(self, source: Source, height: int, width: int) -> Segments:
        """One segment for each class in the mask."""
        return color_segments(source, height, width, self.classes, self.palette)


def color_segments(source: Source, height: int, width: int, classes: Mapping[int, int], palette: str) -> Segments:
    """One segment for each class in a mask of colors.

    Raises:
        DatasetError: the mask cannot be read, has another size, or has a color that is not in the palette.
    """
    red, green, blue = read_colors(source, height, width)
    values, places = index_values((red << 16) + (green << 8) + blue)
    unknown = [value for value in values if value not in classes]
    if unknown:
        raise unknown_colors(source, unknown, palette)
    return table_of([classes[value] for value in values], places)


def unknown_colors(source: Source, colors: Sequence[int], palette: str) -> DatasetError:
    """The error for colors in a mask that are not in the palette; see `packed`."""
    color = (colors[0] >> 16, colors[0] >> 8 & 255, colors[0] & 255)
    more = f" and {len(colors) - 1} other{'s' if len(colors) > 2 else ''}" if len(colors) > 1 else ""
    return DatasetError(
        f"{source_name(source)} has the color {color}{more}, which {palette} does not have: add it there, as a class "
        "or as `void`."
    )


__all__ = [
    "VOC",
    "ColorMapReader",
    "Palette",
    "color_segments",
    "find_palette",
    "is_palette",
    "load_colors",
    "load_divided",
    "packed",
    "read_palette",
    "unknown_colors",
    "voc_color",
    "voc_palette",
]

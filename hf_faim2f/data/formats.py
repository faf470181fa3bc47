"""Opens datasets by the name of their format, or detects the format by the files.

Each format defines its splits and its reader.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import datasets

from ..errors import DatasetError, nearest_name
from ..family.digits import LABELS, THING_IDS
from ..family.mask2former import labels_and_stuff
from ..model.channels_faim2f import RGB
from .dataset import Description, Task, describe, kind_of_part, warn_of_rotated, with_channels
from .digits import DigitScenes
from .files import AnnotationFrame
from .item import Item
from .readers import ade20k, camvid, coco_export, labelme, roboflow_masks, supervisely, voc, yolo
from .readers.camvid import load_camvid
from .readers.cityscapes import load_cityscapes, official_truth
from .readers.coco import load_coco_instance, load_coco_panoptic
from .readers.coco_export import load_coco
from .readers.folder import LABELS_FILE
from .readers.hub import load_hub
from .readers.labelme import load_labelme
from .readers.palette import PALETTE_FILES, is_palette, load_divided
from .readers.roboflow_masks import load_roboflow_masks
from .readers.supervisely import load_supervisely
from .readers.voc import load_voc
from .readers.yolo import load_yolo

Part = Literal["train", "validation"]
DIGIT_SCENES = {"train": 100_000, "validation": 500}
# Maximum side of a scene in pixels; for larger model inputs, scenes are upscaled.
DIGIT_SIZE = 128
# The value of `--format` that detects the format, and the formats of single files by suffix.
AUTO = "auto"
FILES = {".yaml": "yolo", ".yml": "yolo", ".json": "coco", ".parquet": "hub"}


@dataclass(frozen=True)
class DataSource:
    """The location of data and the options to read it. Each format uses only some of the fields.

    Args:
        root: a folder; for "hub" a dataset's name, a Parquet file or a folder of them.
        task: the task, for formats with several; None for the format's first.
        labels: class names, for "hub", and for "folder" instead of labels.txt.
        ignore_index, reduce_labels: as in `load_folder`, for "hub" and "folder"; the first also for other masks of ids.
        splits: names of the training and the validation split, if they differ from the format's.
        size: size of the model's input images, in pixels, which limits the size of digit scenes.
        skip_bad: skip images that are found to be broken when the data is listed.
        annotation_frame: as in `load_folder`, for all formats except "cityscapes" and "digits".
        annotations, images: as in `load_coco`, for "coco".
        palette: as in `find_palette`, for masks in colors.
        num_channels: number of channels of the images; digit scenes always have three.
    """

    root: str = ""
    task: Task | None = None
    labels: tuple[str, ...] | None = None
    ignore_index: int | None = 255
    reduce_labels: bool = False
    splits: tuple[str | None, str | None] = (None, None)
    size: int | None = None
    skip_bad: bool = False
    annotation_frame: AnnotationFrame | None = None
    annotations: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    palette: str | None = None
    num_channels: int = RGB

    @property
    def frame(self) -> AnnotationFrame:
        """`annotation_frame` with its default. So readers do not warn for every image; `open_data` warns once."""
        return self.annotation_frame or "upright"


@dataclass(frozen=True)
class OpenData:
    """The training or the validation part of a dataset.

    Args:
        items: the items.
        description: the metadata.
        split: the dataset's name of the part.
        cityscapes_truth: for Cityscapes, the ground truth files for cityscapesscripts, by image id.
    """

    items: Sequence[Item]
    description: Description
    split: str
    cityscapes_truth: Mapping[Any, Path] | None = None

    def with_channels(self, num_channels: int) -> "OpenData":
        """The part with images of this number of channels.

        Raises:
            DatasetError: the data is synthetic, and has another number of channels.
        """
        if num_channels == self.description.num_channels:
            return self
        if not isinstance(self.items, datasets.Dataset):
            raise DatasetError(f"{self.description.name} have 3 channels, but the model takes {num_channels}.")
        items = with_channels(self.items, num_channels)
        return replace(self, items=items, description=describe(items))

    def first(self, count: int) -> "OpenData":
        """The part with only its first `count` items."""
        if count >= len(self.items):
            return self
        if isinstance(self.items, datasets.Dataset):
            return replace(self, items=self.items.select(range(count)))
        return replace(self, items=replace(self.items, count=count))  # type: ignore[type-var]


@dataclass(frozen=True)
class Format:
    """A dataset format.

    Args:
        name: name of the format.
        title: name of the data in model cards, if it has these labels; empty if it depends on `root`.
        summary: what `root` is, for help texts.
        splits: names of the training and the validation split.
        tasks: the tasks for which it has annotations, the default first.
        read: function of a source, a split and a task that returns the items.
        needs_root: whether `root` must be given and exist.
    """

    name: str
    title: str
    summary: str
    splits: tuple[str, str]
    tasks: tuple[Task, ...]
    read: Callable[[DataSource, str, Task], Sequence[Item]]
    needs_root: bool = True

    def title_of(self, source: DataSource, labels: Sequence[str]) -> str:
        """The name of the data with these labels in model cards; never a local path."""
        # Other data may have the same layout.
        if self.title and (not self.name.startswith("coco-") or list(labels) == coco_labels(self.name)):
            return self.title
        if not source.root and source.annotations:
            return Path(source.annotations[0]).stem
        place = Path(source.root).resolve()
        if place.is_file() and place.stem in ("data", "dataset"):  # YOLO's usual names, which tell no data from another
            return place.parent.name
        return place.name if place.exists() else source.root


def _read_folder(source: DataSource, split: str, task: Task, has_colors: bool = False) -> Sequence[Item]:
    return load_divided(
        source.root, split, task, labels=source.labels, palette=source.palette, has_colors=has_colors,
        ignore_index=source.ignore_index, reduce_labels=source.reduce_labels, skip_bad=source.skip_bad,
        annotation_frame=source.frame,
    )  # fmt: skip


def _read_hub(source: DataSource, split: str, task: Task) -> Sequence[Item]:
    if source.labels is None:
        raise DatasetError(f"{source.root} does not say what its classes are called: pass labels.")
    return load_hub(
        source.root, split, labels=source.labels, task=task, ignore_index=source.ignore_index,
        reduce_labels=source.reduce_labels, skip_bad=source.skip_bad, annotation_frame=source.frame,
    )  # fmt: skip


def _read_digits(source: DataSource, split: str, task: Task) -> Sequence[Item]:
    part = "train" if split == "train" else "validation"
    scenes = DigitScenes(split, DIGIT_SCENES[part], size=min(source.size or DIGIT_SIZE, DIGIT_SIZE))
    return cast(Sequence[Item], scenes)


COCO_FOLDER = "the folder with annotations, train2017 and val2017"

FORMATS = {
    row.name: row
    for row in (
        Format("ade20k", "ADE20K", "the folder ADEChallengeData2016", ("training", "validation"), ("semantic",),
               lambda source, split, task: ade20k.load_ade20k(source.root, split, source.skip_bad, source.frame)),
        Format("coco-instance", "COCO 2017", COCO_FOLDER, ("train2017", "val2017"), ("instance",),
               lambda source, split, task: load_coco_instance(
                   source.root, split, skip_bad=source.skip_bad, annotation_frame=source.frame)),
        Format("coco-panoptic", "COCO 2017 panoptic", COCO_FOLDER, ("train2017", "val2017"), ("panoptic",),
               lambda source, split, task: load_coco_panoptic(
                   source.root, split, skip_bad=source.skip_bad, annotation_frame=source.frame)),
        Format("cityscapes", "Cityscapes", "the folder with leftImg8bit and gtFine", ("train", "val"),
               ("semantic", "instance", "panoptic"),
               lambda source, split, task: load_cityscapes(source.root, split, task, source.skip_bad)),
        Format("folder", "", "a folder with images, masks and labels.txt, or with these in train and val",
               ("train", "val"), ("semantic", "instance"), _read_folder),
        Format("hub", "", "a dataset of the Hub, or Parquet files", ("train", "validation"),
               ("semantic", "instance"), _read_hub),
        Format("yolo", "", "a folder with data.yaml and label files of polygons, or data.yaml itself", ("train", "val"),
               ("instance", "semantic"),
               lambda source, split, task: load_yolo(
                   source.root, split, task, skip_bad=source.skip_bad, annotation_frame=source.frame)),
        Format("coco", "", "a folder with a COCO JSON file of any tool, or that file itself", ("train", "val"),
               ("instance", "semantic"),
               lambda source, split, task: load_coco(
                   source.root or None, split, task, annotations=source.annotations, images=source.images,
                   skip_bad=source.skip_bad, annotation_frame=source.frame)),
        Format("labelme", "", "a folder of labelme's JSON files", ("train", "val"), ("instance", "semantic"),
               lambda source, split, task: load_labelme(
                   source.root, split, task, labels=source.labels, skip_bad=source.skip_bad,
                   annotation_frame=source.frame)),
        Format("supervisely", "", "a Supervisely project: the folder with meta.json", ("train", "val"),
               ("instance", "semantic"),
               lambda source, split, task: load_supervisely(
                   source.root, split, task, skip_bad=source.skip_bad, annotation_frame=source.frame)),
        Format("roboflow-masks", "", "a folder with Roboflow's masks and _classes.csv", ("train", "val"),
               ("semantic",),
               lambda source, split, task: load_roboflow_masks(
                   source.root, split, ignore_index=source.ignore_index, skip_bad=source.skip_bad,
                   annotation_frame=source.frame)),
        Format("voc", "", "a folder with Pascal VOC's JPEGImages and SegmentationClass", ("train", "val"),
               ("semantic", "instance"),
               lambda source, split, task: load_voc(
                   source.root, split, task, labels=source.labels, palette=source.palette, skip_bad=source.skip_bad,
                   annotation_frame=source.frame)),
        Format("camvid", "", "a folder with train, trainannot and so on", ("train", "val"), ("semantic",),
               lambda source, split, task: load_camvid(
                   source.root, split, labels=source.labels, ignore_index=source.ignore_index,
                   palette=source.palette, skip_bad=source.skip_bad, annotation_frame=source.frame)),
        Format("colors", "", "as folder, with masks in colors and `name r g b` in labels.txt", ("train", "val"),
               ("semantic",), lambda source, split, task: _read_folder(source, split, task, has_colors=True)),
        Format("digits", "Scenes of digits", "no --data: scenes are generated", ("train", "test"), ("panoptic",),
               _read_digits, needs_root=False),
    )
}  # fmt: skip


def find_format(name: str) -> Format:
    """The format with this name.

    Raises:
        ValueError: there is none; the message lists the known names and suggests the closest.
    """
    if name not in FORMATS:
        nearest = nearest_name(name, FORMATS)
        hint = f" Did you mean {nearest!r}?" if nearest else ""
        raise ValueError(f"No format is called {name!r}. Known: {', '.join(FORMATS)}.{hint}")
    return FORMATS[name]


def coco_labels(name: str) -> list[str]:
    """The labels of COCO 2017 in the format "coco-instance" or "coco-panoptic"."""
    return labels_and_stuff("coco", name.removeprefix("coco-"))[0]


def dataset_type(name: str, title: str) -> str:
    """The id of a dataset in model cards: its format if it has the format's own title, else its title.

    Args:
        name: the format.
        title: see `Format.title_of`.

    Raises:
        ValueError: there is no such format.
    """
    return name if find_format(name).title == title else title


def open_data(format_name: str, source: DataSource, part: Part) -> OpenData:
    """Opens the training or the validation part of a dataset.

    Args:
        format_name: name of the format, one of `FORMATS`.
        source: the location of the data, and the options to read it.
        part: "train" or "validation".

    Raises:
        ValueError: the format is unknown, or has no such task or option.
        DatasetError: the data cannot be used.
    """
    row = find_format(format_name)
    if row.needs_root and not source.root and not (row.name == "coco" and source.annotations):
        raise DatasetError(f"The format {row.name} needs a data source: name {row.summary}.")
    if not row.needs_root and (source.root or source.annotations):
        raise DatasetError(f"The format {row.name} makes its own data: leave --data out, or pass the format of it.")
    is_file = row.name in ("yolo", "coco") and Path(source.root).is_file()
    if row.needs_root and row.name != "hub" and source.root and not is_file and not Path(source.root).is_dir():
        raise DatasetError(f"There is no folder {source.root}; data of the format {row.name} is {row.summary}.")
    task = source.task or row.tasks[0]
    if task not in row.tasks:
        raise ValueError(f"Data of the format {row.name} is for {' or '.join(row.tasks)}, not for {task}.")
    if source.annotation_frame is not None and row.name in ("cityscapes", "digits"):
        raise ValueError(f"Images of the format {row.name} have no EXIF rotation: leave annotation_frame out.")
    place = get_args(Part).index(part)
    split = source.splits[place] or row.splits[place]
    items = row.read(source, split, task)
    if isinstance(items, datasets.Dataset):
        warn_of_rotated(items, source.annotation_frame)
        truth = official_truth(source.root, split) if row.name == "cityscapes" and task != "instance" else None
        return OpenData(items, describe(items), split, truth).with_channels(source.num_channels)
    description = Description("scenes of digits", task, tuple(LABELS), frozenset(THING_IDS))
    return OpenData(items, description, split).with_channels(source.num_channels)


class Recognized(NamedTuple):
    """A detected format, and the reason.

    Args:
        format: name of the format.
        reason: what identifies the format, as the end of a sentence that starts with "it has".
    """

    format: str
    reason: str


def recognize(source: DataSource) -> Recognized:
    """Detects the format of data by its files.

    Raises:
        DatasetError: there is no such data, or it matches several formats or none; the message says what was found.
    """
    if any(coco_export.is_panoptic(Path(path)) for path in source.annotations or (source.root,)):
        return Recognized("coco-panoptic", "segments_info")
    if source.annotations:
        return Recognized("coco", "a file of annotations, by --annotations")
    if not source.root:
        raise DatasetError("There is no data: name a folder, file or Hub id by --data, or pass --format digits.")
    root = Path(source.root)
    if root.is_file():
        if root.suffix.lower() in FILES:
            return Recognized(FILES[root.suffix.lower()], f"the suffix {root.suffix}")
        raise DatasetError(f"{root} is a file of no known format ({', '.join(FILES)}): name the folder of the data.")
    if not root.is_dir():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", source.root) and not root.parent.is_dir():
            return Recognized("hub", "the form of a Hub id, and no folder has its name")
        raise DatasetError(f"There is no folder {root}.")
    found = _candidates(root, source.palette is not None)
    if len(found) == 1:
        return found[0]
    if found:
        each = ", and ".join(f"{one.reason} ({one.format})" for one in found)
        raise DatasetError(f"{root} could have several formats, because it has {each}: choose one with --format.")
    raise DatasetError(f"{root} has none of the known formats{_half_known(root)}; pass --format, or see the docs.")


def _candidates(root: Path, has_palette: bool) -> list[Recognized]:
    """Every format that a folder matches."""
    found = []
    if file := yolo.find_yaml(root):
        found.append(Recognized("yolo", file.name))
    elif yolo.has_labels(root):
        found.append(Recognized("yolo", "class names and text files in labels"))
    if ade20k.has_own_names(root):
        found.append(Recognized("ade20k", "ADE_train_*.png in annotations/training"))
    if (root / "leftImg8bit").is_dir() and (root / "gtFine").is_dir():
        found.append(Recognized("cityscapes", "leftImg8bit and gtFine"))
    for kind in ("instance", "panoptic"):
        name = f"{kind}{'s' * (kind == 'instance')}_train2017.json"
        if (root / "annotations" / name).is_file() and (root / "train2017").is_dir():
            found.append(Recognized(f"coco-{kind}", f"annotations/{name} and train2017"))
    is_coco = {one.format for one in found}
    if "coco-instance" not in is_coco and (documents := coco_export.find_documents(root)):
        path = next(iter(documents.values()))
        found.append(Recognized("coco", f"{path.relative_to(root).as_posix()} with COCO's annotations"))
    elif not is_coco & {"coco-instance", "coco-panoptic"} and (panoptic := coco_export.find_panoptic(root)):
        found.append(Recognized("coco-panoptic", f"{panoptic.relative_to(root).as_posix()} with segments_info"))
    if place := voc.find_root(root):
        found.append(Recognized("voc", f"{(place / voc.CLASSES).relative_to(root).as_posix()} and {voc.IMAGES}"))
    if parts := camvid.find_parts(root):
        folder = next(iter(parts.values()))[1]
        found.append(Recognized("camvid", f"{folder.name} beside {next(iter(parts))}"))
    if supervisely.is_project(root):
        found.append(Recognized("supervisely", "meta.json with classes, and datasets of img and ann"))
    if classes := roboflow_masks.find_classes(root):
        found.append(Recognized("roboflow-masks", f"{classes.relative_to(root).as_posix()} beside *_mask.png"))
    if masks := _masks(root):
        colors = next((name for name in PALETTE_FILES if is_palette(root / name)), None)
        where = f"images and {masks}"
        if has_palette or colors:
            found.append(Recognized("colors", f"{where}, and a palette{'' if has_palette else f' in {colors}'}"))
        else:
            found.append(Recognized("folder", where))
    if not found and labelme.find_files(root):
        found.append(Recognized("labelme", "labelme's JSON files"))
    if not found and any(root.rglob("*.parquet")):
        found.append(Recognized("hub", "Parquet files"))
    return found


def _masks(root: Path) -> str | None:
    """The path of masks beside images, in one of the layouts of the format "folder"."""
    if (root / "images").is_dir() and (root / "masks").is_dir():
        return "masks"
    parts = (part for part in sorted(root.glob("*/")) if (part / "images").is_dir() and (part / "masks").is_dir())
    return next((f"masks in {part.name}" for part in parts if kind_of_part(part.name)), None)


def _half_known(root: Path) -> str:
    """The end of a sentence on what a folder has of a known format, and what it lacks."""
    if (root / "images").is_dir():
        if (root / "labels").is_dir():
            return ": it has images and labels, but no data.yaml or classes.txt with the class names (yolo)"
        if (root / "annotations" / "training").is_dir():
            return (
                ": it has images and annotations/training, but no files named like ADE20K's ADE_train_*.png (ade20k); "
                f"if these are masks of your own classes, rename annotations to masks and write {LABELS_FILE} (folder)"
            )
        return ": it has images, but neither masks nor labels nor a JSON file of annotations"
    if (root / voc.IMAGES).is_dir():
        return f": it has {voc.IMAGES}, but no {voc.CLASSES} (bounding boxes alone are not enough)"
    if supervisely.has_dataset(root):
        return ": it has folders img and ann, but no meta.json with the classes (supervisely)"
    if supervisely.is_dataset(root):
        return f": it is one dataset of a project: pass the folder of the project, {root.parent} (supervisely)"
    if (root / LABELS_FILE).is_file():
        return f": it has {LABELS_FILE}, but no folders images and masks"
    names = sorted(path.name for path in root.iterdir() if not path.name.startswith("."))[:6]
    return f": it has {', '.join(names)}" if names else ": it is empty"


__all__ = [
    "AUTO",
    "FORMATS",
    "DataSource",
    "Format",
    "OpenData",
    "Recognized",
    "dataset_type",
    "find_format",
    "open_data",
    "recognize",
]

"""CamVid (Brostow et al., 2009), and other data in its layouts: semantic segmentation.

    train/0001.png   trainannot/0001.png   train.txt   labels.txt      class ids (SegNet's tutorial)
    train/0001.png   train_labels/0001_L.png   class_dict.csv          colors

A list has an image on each line, and optionally its mask. Its paths are those of another machine, such as
/SegNet/CamVid/train/0001.png, so only the file names are used. Without a list, all images of the folder are used.
Without labels.txt, the classes are CamVid's eleven, and the value 11 is no class.
"""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
from transformers.utils import logging

from ...errors import DatasetError, MissingPartError
from ...files import files_below
from ...masks import CAMVID_ENDS as ENDS
from ..dataset import ROW_FEATURES, Problems, find_part, hold_out, kind_of_part, lazy_dataset
from ..files import AnnotationFrame, file_source, path_inside, png_inside, read_small_text
from .folder import LABELS_FILE, describe_maps, paired_maps, read_labels
from .maps import SemanticMapReader, class_of_value, refuse_ignored_class, refuse_ignored_white
from .palette import find_palette, is_palette, load_colors

logger = logging.get_logger(__name__)

CLASSES = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")


def find_parts(root: Path) -> dict[str, tuple[Path, Path]]:
    """The folders of images and of masks, by the name of the part."""
    found = {}
    for folder in sorted(root.glob("*/")):
        for end in ENDS:
            if folder.name.endswith(end) and (images := root / folder.name.removesuffix(end)).is_dir():
                found[images.name] = (images, folder)
    return {name: pair for name, pair in found.items() if name}


def load_camvid(
    root: str | Path,
    split: str = "train",
    *,
    labels: Sequence[str] | None = None,
    ignore_index: int | None = 255,
    palette: str | None = None,
    skip_bad: bool = False,
    annotation_frame: AnnotationFrame | None = None,
) -> datasets.Dataset:
    """Loads a folder in one of CamVid's layouts.

    Args:
        root: the folder.
        split: "train", "val" or "test".
        labels: class names; None for those of labels.txt, or CamVid's.
        ignore_index: as in `load_folder`; with CamVid's classes, 11 is ignored as well.
        palette: as in `find_palette`, for masks in colors.
        skip_bad, annotation_frame: as in `load_folder`.

    Raises:
        DatasetError: a folder is missing, an image has no mask, or the masks have only 0 and an ignored 255.
    """
    root, problems = Path(root), Problems(skip_bad)
    parts = find_parts(root)
    own = find_part(parts, split, str(root))
    if own is None and len(parts) != 1:
        raise MissingPartError(f"{root} has no folders {split} and {split}annot, nor {split}_labels.")
    part = own or next(iter(parts))  # a single part, such as CVAT's `default`
    images, masks = parts[part]
    colors = find_palette([root], palette, labels)
    if colors is not None:
        end = ENDS[next(end for end in ENDS if masks.name.endswith(end))]
        has_end = any(path.stem.endswith(end) for path in files_below(masks, (".png",)))
        data = load_colors(
            root, colors, images=images.name, masks=masks.name, skip_bad=skip_bad, annotation_frame=annotation_frame,
            mask_end=end if has_end else "",
        )  # fmt: skip
        return data if own is not None else hold_out(data, split, str(root))
    has_names = (root / LABELS_FILE).is_file() and not is_palette(root / LABELS_FILE)
    names = tuple(labels) if labels is not None else read_labels(root / LABELS_FILE) if has_names else CLASSES
    if labels is None and not has_names:
        logger.warning_once(
            f"{root} does not name its classes, so they are taken to be CamVid's ({', '.join(CLASSES)}): if they are "
            f"others, write {LABELS_FILE} there, or pass --labels."
        )
    listed = root / f"{part}.txt"
    columns = _listed(listed, images, masks, problems) if listed.is_file() else paired_maps(images, masks, problems)
    description = describe_maps(str(root), "semantic", names, problems.report(str(root)), annotation_frame)
    refuse_ignored_class(len(names), ignore_index)
    classes = class_of_value(len(names), ignore_index)
    if names == CLASSES:
        classes.setdefault(len(CLASSES), -1)
    features = {**ROW_FEATURES, "annotation": ROW_FEATURES["image"]}
    reader = SemanticMapReader(description, classes, has_instances=False)
    data = lazy_dataset(columns, features, reader)
    if own is None or kind_of_part(own) == "train":  # a small part for validation may have no object
        refuse_ignored_white(data, reader.values, ignore_index, False)
    return data if own is not None else hold_out(data, split, str(root))


def _listed(path: Path, images: Path, masks: Path, problems: Problems) -> dict[str, list[Any]]:
    """The columns of the images in a list."""
    columns: dict[str, list[Any]] = {name: [] for name in (*ROW_FEATURES, "annotation")}
    listed: dict[str, tuple[Path, Path]] = {}
    for line in dict.fromkeys(read_small_text(path).split("\n")):
        words = line.split()
        if not words:
            continue
        try:
            image = _below(images, words[0], path)
            own = words[1] if len(words) > 1 else png_inside(masks, image.stem, str(path)).name
            mask = _below(masks, own, path)
            if image.stem in listed and listed[image.stem] != (image, mask):
                raise DatasetError(f"{path} lists two images or masks of the name {image.stem}: keep one of them.")
        except DatasetError as error:
            problems.add(error)
            continue
        if image.stem in listed:  # by another path
            continue
        listed[image.stem] = (image, mask)
        columns["image"].append(file_source(image))
        columns["annotation"].append(file_source(mask))
        columns["file_name"].append(image.name)
        columns["image_id"].append(image.stem)
    return columns


def _below(folder: Path, name: str, named_by: Path) -> Path:
    """The file in `folder` with the same name as a path of another machine.

    Raises:
        DatasetError: there is no such file.
    """
    path = path_inside(folder, PurePosixPath(name.replace("\\", "/")).name, str(named_by))
    if not path.is_file():
        raise DatasetError(f"There is no file {path}, which {named_by} names.")
    return path


__all__ = ["find_parts", "load_camvid"]

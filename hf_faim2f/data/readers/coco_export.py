"""COCO's instance JSON as exported by other tools, such as Roboflow, CVAT and Label Studio.

    train/_annotations.coco.json, valid/..., test/...      beside the images (Roboflow)
    annotations/instances_default.json    images/...        one file for each part (CVAT, Ultralytics)
    result.json                           images/...        one file (Label Studio)

Any other file can be named explicitly, with or without the folder of its images. Names of images are relative to that
folder; if there is no such file, backslashes are read as slashes, and then the folders in the name are ignored.
Roboflow's category for the group of all classes, which no annotation has, is left out.
"""

import mmap
from collections.abc import Sequence
from pathlib import Path

import datasets

from ...errors import DatasetError
from ..dataset import Problems, Task, find_part, hold_out, kind_of_part
from ..files import HEAD, AnnotationFrame, is_json_with
from .coco import instance_dataset
from .coco_document import CocoDocument

ROBOFLOW = "_annotations.coco.json"
# Prefixes of COCO's files without instances.
OTHERS = ("panoptic_", "captions_", "person_keypoints_", "stuff_", "image_info_")


def find_documents(root: Path) -> dict[str, Path]:
    """The files with COCO's instances in a folder, by the name of the part.

    Raises:
        DatasetError: there are two files for one part.
    """
    found: dict[str, Path] = {}
    for place in _places(root):
        files = [place / ROBOFLOW] if (place / ROBOFLOW).is_file() else sorted(place.glob("*.json"))
        for path in files:
            if path.name.startswith((".", *OTHERS)):
                continue
            # A damaged file of this name is an error, not something else.
            if path.name != ROBOFLOW and (not _is_document(path) or is_panoptic(path)):
                continue
            part = place.name if place.name not in ("annotations", root.name) else path.stem.removeprefix("instances_")
            if part in found:
                raise DatasetError(
                    f"{found[part]} and {path} are both of the part {part!r}: choose one with --annotations."
                )
            found[part] = path
    return found


def find_panoptic(root: Path) -> Path | None:
    """A file with COCO's panoptic annotations in a folder, or None."""
    return next((path for place in _places(root) for path in sorted(place.glob("*.json")) if is_panoptic(path)), None)


def _places(root: Path) -> list[Path]:
    return [root, root / "annotations", *sorted(path for path in root.glob("*/") if kind_of_part(path.name))]


def is_panoptic(path: Path) -> bool:
    """Whether a file has COCO's panoptic annotations: `segments_info`, which may follow megabytes of images."""
    if not _is_document(path):
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b'"segments_info"') >= 0


def _is_document(path: Path) -> bool:
    """Whether a file looks like COCO's. One with only categories does not, such as the `notes.json` of Label Studio's
    export for YOLO; but in a large file, more may follow."""
    is_whole = path.is_file() and path.stat().st_size <= HEAD
    return is_json_with(path, ("images", "annotations") if is_whole else ("images", "annotations", "categories"))


def load_coco(
    root: str | Path | None,
    split: str = "train",
    task: Task = "instance",
    *,
    annotations: Sequence[str | Path] = (),
    images: Sequence[str | Path] = (),
    skip_bad: bool = False,
    annotation_frame: AnnotationFrame | None = None,
) -> datasets.Dataset:
    """Loads the instances of COCO's JSON in any of the layouts above.

    Args:
        root: the folder, or a file; not needed with `annotations`.
        split: the part. In data with a single file, every tenth image is "val", the others are "train"; "all" is both.
        task: "instance", or "semantic" to merge the objects of each class.
        annotations: one file, or two files for training and validation.
        images: the folder of the images, or one for each file.
        skip_bad, annotation_frame: as in `load_coco_instance`.

    Raises:
        DatasetError: there is no such file or part, or a file is not COCO's JSON.
    """
    if root is not None and Path(root).is_file() and not annotations:
        annotations = (root,)
    if annotations:
        files = [Path(path) for path in annotations]
        if len(files) > 2 or len(images) > len(files):
            raise DatasetError(
                f"There are {len(files)} annotation files and {len(images)} image folders: name one file, or one for "
                "training and one for validation, and at most one folder for each."
            )
        documents = dict(zip(("train", "val") if len(files) == 2 else (files[0].stem,), files, strict=True))
        name = str(files[0])
        part = find_part(documents, split, name) if len(files) == 2 else None
    else:
        folder = Path(root or ".")
        documents, name = find_documents(folder), str(folder)
        if not documents and (panoptic := find_panoptic(folder)):
            raise _not_instances(panoptic)
        if not documents:
            raise DatasetError(f"{folder} has no JSON with COCO's images, annotations and categories.")
        part = find_part(documents, split, name)
        if part is None and len(documents) > 1:
            raise DatasetError(
                f"{folder} has several annotation files ({', '.join(str(path) for path in documents.values())}), and "
                "none is called train or val: choose one with --annotations, or rename them."
            )
    own = part or next(iter(documents))
    path = documents[own]
    if is_panoptic(path):
        raise _not_instances(path)
    if images:
        place = list(documents).index(own) if len(images) > 1 else 0
        candidates = [Path(images[place])]
        if not candidates[0].is_dir():
            raise DatasetError(f"There is no folder {candidates[0]} of images.")
    else:
        above = path.parent.parent if path.parent.name == "annotations" else path.parent
        candidates = [path.parent, above / "images" / own, above / own, path.parent / "images", above / "images", above]
    document = CocoDocument.read(path, candidates, Problems(skip_bad), drop_group=True)
    data = instance_dataset(document, task, annotation_frame)
    return data if part is not None else hold_out(data, split, name)


def _not_instances(path: Path) -> DatasetError:
    return DatasetError(
        f"{path} has COCO's panoptic annotations (segments_info), not instances: pass the folder of `annotations` and "
        "images, and --format coco-panoptic (in Python load_coco_panoptic)."
    )


__all__ = ["find_documents", "find_panoptic", "is_panoptic", "load_coco"]

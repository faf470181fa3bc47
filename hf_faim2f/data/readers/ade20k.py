"""ADE20K's 150 classes (Zhou et al., Scene Parsing through ADE20K Dataset, CVPR 2017): semantic segmentation.

The files are those of the Scene Parsing Benchmark, "ADEChallengeData2016":

    images/training/ADE_train_00000001.jpg        annotations/training/ADE_train_00000001.png
    images/validation/ADE_val_00000001.jpg        annotations/validation/ADE_val_00000001.png

In the files, 0 is "other" and 1..150 are the classes; in items these are -1 and 0..149.
"""

from collections.abc import Sequence
from pathlib import Path

import datasets

from ...errors import DatasetError
from ...family import load_labels
from ..dataset import ROW_FEATURES, Description, Problems, lazy_dataset
from ..files import LABELS_FILE, AnnotationFrame
from .folder import paired_maps
from .hub import load_hub
from .maps import SemanticMapReader, class_of_value

FOLDER = "ADEChallengeData2016"


def has_own_names(root: Path) -> bool:
    """Whether the maps in a folder, or in `FOLDER` in it, are called as ADE20K's; other data may have its layout."""
    places = [place / "annotations" / "training" for place in (root, root / FOLDER)]
    return any(next(place.glob("ADE_train_*.png"), None) for place in places)


def load_ade20k(
    root: str | Path,
    split: str = "validation",
    skip_bad: bool = False,
    annotation_frame: AnnotationFrame | None = None,
) -> datasets.Dataset:
    """Loads ADE20K from the folders of the Scene Parsing Benchmark.

    Args:
        root: the folder ADEChallengeData2016, or its parent.
        split: "training" or "validation".
        skip_bad: skip images without a map, and list them in `describe(dataset).skipped`.
        annotation_frame: as in `load_folder`.

    Raises:
        DatasetError: a folder is missing, an image has no map, or the folder names other classes.
    """
    root = Path(root)
    root = root / FOLDER if (root / FOLDER).is_dir() else root
    if (root / LABELS_FILE).exists():
        raise DatasetError(
            f"{root} has {LABELS_FILE}, but the format ade20k always has ADE20K's own 150 classes: if the masks have "
            "other classes, rename the folder annotations to masks and pass --format folder, else remove the file."
        )
    images, maps = root / "images" / split, root / "annotations" / split
    for folder in (images, maps):
        if not folder.is_dir():
            raise DatasetError(
                f"There is no folder {folder}. ADE20K's root has images/{{training,validation}} and "
                "annotations/{training,validation}."
            )
    problems = Problems(skip_bad)
    columns = paired_maps(images, maps, problems)
    labels = load_labels("ade20k")
    description = Description(
        "ADE20K", "semantic", tuple(labels), skipped=problems.report("ADE20K"), annotation_frame=annotation_frame
    )
    classes = class_of_value(len(labels), ignore_index=None, reduce_labels=True)
    features = {**ROW_FEATURES, "annotation": ROW_FEATURES["image"]}
    return lazy_dataset(columns, features, SemanticMapReader(description, classes, has_instances=False))


def load_ade20k_parquet(
    source: str | Path | Sequence[str | Path] | datasets.Dataset,
    split: str | None = None,
    skip_bad: bool = False,
    annotation_frame: AnnotationFrame | None = None,
) -> datasets.Dataset:
    """Loads ADE20K's version on the Hub, with the same classes. The arguments are those of `load_hub`."""
    return load_hub(
        source, split, labels=load_labels("ade20k"), reduce_labels=True, ignore_index=None, skip_bad=skip_bad,
        annotation_frame=annotation_frame,
    )  # fmt: skip

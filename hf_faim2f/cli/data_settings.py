"""The settings that say which data a command works on: shared by all that read any."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from ..data.dataset import Task
from ..data.files import AnnotationFrame
from ..data.formats import FORMATS, DataSource
from ..data.readers.folder import read_labels
from .settings import setting

TASKS = get_args(Task)
FRAMES = get_args(AnnotationFrame)


@dataclass(frozen=True)
class DataSettings:
    """Where the data is, and how it is to be read."""

    data: str | None = setting(str, "where the data is, which the format says; needed but for digits")
    format: str | None = setting(
        str,
        "how it is laid out; needed: " + "; ".join(f"{row.name} ({row.summary})" for row in FORMATS.values()),
        words=tuple(FORMATS),
    )
    task: str | None = setting(
        str, "what a format's masks are, where it has several kinds (default: what the data says)", choices=TASKS
    )
    labels: tuple[str, ...] | None = setting(
        tuple, "class names, or a file with one a line, for folder and hub (default: those that the data names)"
    )
    ignore_index: int = setting(int, "value of a mask's pixels without class, -1 for none", 255, least=-1)
    reduce_labels: bool = setting(bool, "0 is no class in masks, and the classes begin at 1", False)
    annotation_frame: str | None = setting(
        str,
        "what annotations are of where an image is stored turned (EXIF) and their size does not tell: the image "
        "upright or its pixels as stored (default: upright, with a warning)",
        choices=FRAMES,
    )
    image_size: int | None = setting(
        int,
        "shorter edge of the images that the model sees, in pixels (default: as the "
        "model's processor has it, or of a new model the recipe)",
        least=32,
    )
    skip_bad: bool = setting(bool, "go on past images and annotations that cannot be read, and report them", False)

    def source(self, splits: tuple[str | None, str | None]) -> DataSource:
        """Where the data is, for `open_data`."""
        labels = self.labels
        if labels is not None and len(labels) == 1 and Path(labels[0]).is_file():
            labels = read_labels(Path(labels[0]))
        return DataSource(
            root=self.data or "",
            task=cast(Task | None, self.task),
            labels=labels,
            ignore_index=None if self.ignore_index < 0 else self.ignore_index,
            reduce_labels=self.reduce_labels,
            splits=splits,
            size=self.image_size,
            skip_bad=self.skip_bad,
            annotation_frame=cast(AnnotationFrame | None, self.annotation_frame),
        )

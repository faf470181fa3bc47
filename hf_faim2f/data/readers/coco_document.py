"""Reads and validates the common parts of COCO's JSON files: images, categories and references to them."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import datasets

from ...errors import DatasetError
from ..dataset import IMAGE_FEATURE, Description, Problems, Task
from ..files import AnnotationFrame, check_stated_size, path_inside, read_json

# The largest values of the Arrow columns.
LARGEST_SIDE, LARGEST_ID = 2**31 - 1, 2**63 - 1
_LISTS = ("images", "annotations", "categories")
# Number of images to look for in each candidate for the image folder.
MOST_TRIED = 20


@dataclass
class CocoDocument:
    """A COCO file whose images and categories are valid.

    Args:
        path: path of the file.
        image_folder: the folder of its images.
        problems: raises or collects problems with individual images.
        labels: names of the categories, in the order of their ids, without spaces around them.
        things: the classes that are things; all of them if the file does not specify it.
        class_of_category: the rank of each category id.
        raw: the parsed JSON.
        images: file name, height and width by image id.
        unusable: ids of images that have no usable annotations.
    """

    path: Path
    image_folder: Path
    problems: Problems
    labels: tuple[str, ...]
    things: frozenset[int]
    class_of_category: dict[int, int]
    raw: dict[str, Any] = field(repr=False)
    images: dict[int | str, tuple[str, int, int]] = field(default_factory=dict, repr=False)
    unusable: set[int | str] = field(default_factory=set, repr=False)

    @classmethod
    def read(
        cls,
        path: Path,
        image_folder: Path | Sequence[Path],
        problems: Problems,
        needs_things: bool = False,
        drop_group: bool = False,
    ) -> "CocoDocument":
        """Reads and validates a file.

        Args:
            path, image_folder, problems: see the class. Of several image folders, the first that contains one of the
                first images is used.
            needs_things: whether every category must have `isthing`, as in panoptic files.
            drop_group: leave out Roboflow's supercategory of all others, which no annotation has.

        Raises:
            DatasetError: the file is missing or not COCO's JSON, or a category or (unless `problems` skips it) an image
                is invalid.
        """
        raw = read_json(path)
        if not isinstance(raw, dict) or not all(isinstance(raw.get(key), list) for key in _LISTS):
            raise DatasetError(f"{path} is not COCO's JSON: it must have the lists {', '.join(_LISTS)}.")
        if not all(isinstance(entry, dict) for key in _LISTS for entry in raw[key]):
            raise DatasetError(f"{path} is not COCO's JSON: every entry of {', '.join(_LISTS)} must be an object.")
        categories = _without_group(raw) if drop_group else raw["categories"]
        for category in categories:
            name = category.get("name")
            if type(category.get("id")) is not int or not isinstance(name, str) or not name.strip():
                raise DatasetError(f"{path} has a category without a whole number as id and a name: {category}.")
            if needs_things and category.get("isthing") not in (0, 1):
                raise DatasetError(f"{path} does not say with isthing whether category {category['name']} is a thing.")
        categories = sorted(categories, key=lambda category: category["id"])
        classes = {category["id"]: index for index, category in enumerate(categories)}
        if not classes or len(classes) != len(categories):
            raise DatasetError(f"{path} has {'two categories with one id' if classes else 'no categories'}.")
        # Names are typed by hand, and spaces around them are in no table.
        labels = tuple(category["name"].strip() for category in categories)
        first_of: dict[str, int] = {}
        for name, category in zip(labels, categories, strict=True):
            if (first := first_of.setdefault(name, category["id"])) != category["id"]:
                raise DatasetError(
                    f"{path} has the class name {name!r} for the categories {first} and {category['id']}: rename one "
                    "of them, or merge them."
                )
        things = frozenset(i for i, category in enumerate(categories) if category.get("isthing", 1))
        folder = image_folder if isinstance(image_folder, Path) else _folder_of(raw, image_folder)
        document = cls(path, folder, problems, labels, things, classes, raw)
        document._read_images()
        return document

    def _read_images(self) -> None:
        # The `file_name` in the JSON, and the id, for each image file that was found.
        entries: dict[str, tuple[str, int | str]] = {}
        for entry in self.raw["images"]:
            image_id, height, width = entry.get("id"), entry.get("height"), entry.get("width")
            try:
                if type(image_id) not in (int, str):
                    raise DatasetError(f"{self.path} has an image with the id {image_id!r}: neither a number nor text.")
                if type(height) is not int or type(width) is not int or min(height, width) < 1:
                    raise DatasetError(f"{self.path} has no height and width for image {image_id}.")
                if max(height, width) > LARGEST_SIDE:
                    raise DatasetError(f"{self.path} has an impossible size for image {image_id}: {height}x{width}.")
                check_stated_size(height, width, f"{self.path}: image {image_id}")
                if type(image_id) is int and abs(image_id) > LARGEST_ID:
                    raise DatasetError(f"{self.path} has an image id of more than 64 bits: {image_id}.")
                if type(image_id) is str and any("\ud800" <= character <= "\udfff" for character in image_id):
                    raise DatasetError(f"{self.path} has an image id that is not valid Unicode: {image_id!r}.")
                if image_id in self.images:
                    raise DatasetError(f"{self.path} has two images with the id {image_id}.")
                name = entry.get("file_name")
                file = path_inside(self.image_folder, name, str(self.path))
                if not (self.image_folder / name).is_file():
                    # It has backslashes as written on Windows, or folders that do not exist here.
                    plain = PurePosixPath(name.replace("\\", "/"))
                    others = (str(plain), plain.name)
                    name = next((other for other in others if (self.image_folder / other).is_file()), None)
                if name is None:
                    raise DatasetError(f"There is no file {file}, which {self.path} names.")
                stated, owner = entries.setdefault(name, (entry["file_name"], image_id))
                if stated != entry["file_name"]:
                    raise DatasetError(
                        f"{self.path} names {stated} and {entry['file_name']}, and {self.image_folder} has only "
                        f"{name} for both: put each image where the file says."
                    )
                if owner != image_id:
                    raise DatasetError(
                        f"{self.path} has the images {owner} and {image_id} of the same file {name}: give all of its "
                        "annotations the same image_id, and remove the other image."
                    )
            except DatasetError as error:
                self.mark_unusable(image_id, error)
                continue
            self.images[image_id] = (name, height, width)
        # All values of an Arrow column have the same type.
        if len({type(image_id) for image_id in self.images}) > 1:
            raise DatasetError(f"{self.path} has image ids that are numbers and others that are text: use one of them.")

    def mark_unusable(self, image_id: Any, error: DatasetError) -> None:
        """Marks an image as unusable because its entry or one of its annotations is invalid.

        Raises:
            DatasetError: `error`, unless problems are skipped.
        """
        self.problems.add(error)
        if isinstance(image_id, (int, str)):
            self.unusable.add(image_id)

    def annotations(self) -> Iterator[tuple[int | str, dict[str, Any], str]]:
        """The annotations of usable images, as (image id, annotation, name for messages).

        Raises:
            DatasetError: an annotation refers to an image that is not in the file.
        """
        for index, annotation in enumerate(self.raw["annotations"]):
            image_id = annotation.get("image_id")
            name = f"{self.path}: annotation {annotation.get('id', f'number {index} of the list')}"
            if isinstance(image_id, (int, str)) and image_id in self.unusable:
                continue
            if type(image_id) not in (int, str) or image_id not in self.images:
                self.problems.add(f"{name} is of image {image_id!r}, which the file does not have.")
                continue
            yield image_id, annotation, name

    def class_of(self, entry: dict[str, Any], name: str) -> int:
        """The class of an annotation or segment.

        Raises:
            DatasetError: its category is not in the file.
        """
        category = entry.get("category_id")
        if type(category) is not int or category not in self.class_of_category:
            raise DatasetError(f"{name} has the category id {category!r}, which is none of the file's categories.")
        return self.class_of_category[category]

    def columns(self, own: dict[Any, dict[str, Any]]) -> dict[str, list[Any]]:
        """The columns of a dataset: the usable images that have an entry in `own`.

        Args:
            own: values of additional columns by image id.
        """
        rows = [
            {
                "image": {"bytes": None, "path": str(self.image_folder / file_name)},
                "file_name": file_name,
                "image_id": image_id,
                "height": height,
                "width": width,
                **own[image_id],
            }
            for image_id, (file_name, height, width) in self.images.items()
            if image_id not in self.unusable and image_id in own
        ]
        return {name: [row[name] for row in rows] for name in (rows[0] if rows else {"image": None})}

    def features(self) -> dict[str, Any]:
        """The types of the columns that all COCO datasets have."""
        is_number = all(isinstance(image_id, int) for image_id in self.images)
        return {
            "image": IMAGE_FEATURE,
            "file_name": datasets.Value("string"),
            "image_id": datasets.Value("int64" if is_number else "string"),
            "height": datasets.Value("int32"),
            "width": datasets.Value("int32"),
        }

    def describe(self, task: Task, frame: AnnotationFrame | None) -> Description:
        """The metadata of the dataset, after all annotations have been read."""
        things = self.things
        if task != "panoptic":
            things = frozenset(range(len(self.labels)) if task == "instance" else ())
        report = self.problems.report(str(self.path))
        categories = tuple(self.class_of_category)
        return Description(str(self.path), task, self.labels, things, report, categories, frame)


def _folder_of(raw: dict[str, Any], candidates: Sequence[Path]) -> Path:
    """The first folder that contains one of the file's first images; else the first that exists."""
    names = [entry.get("file_name") for entry in raw["images"][:MOST_TRIED]]
    plain = [name.replace("\\", "/") for name in names if isinstance(name, str) and "\0" not in name]
    for wanted in (plain, [PurePosixPath(name).name for name in plain]):
        for folder in candidates:
            if any(name and ".." not in name and os.path.isfile(folder / name.lstrip("/")) for name in wanted):
                return folder
    return next((folder for folder in candidates if folder.is_dir()), candidates[0])


def _without_group(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """The categories without a supercategory of all others that no annotation has."""
    categories: list[dict[str, Any]] = raw["categories"]
    groups = [one for one in categories if one.get("supercategory") in (None, "none", "")]
    if len(groups) != 1 or len(categories) < 2:
        return categories
    others = [one for one in categories if one is not groups[0]]
    used = any(one.get("category_id") == groups[0].get("id") for one in raw["annotations"])
    if used or any(one.get("supercategory") != groups[0].get("name") for one in others):
        return categories
    return others

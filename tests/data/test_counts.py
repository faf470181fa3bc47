"""Class counts before training and evaluation, compared with NumPy's counts of the generated data."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hf_faim2f.data import DatasetError, Item, RandomCrop, TrainingItems, load_coco_instance, load_folder
from hf_faim2f.data.counts import (
    check_crops,
    check_same_labels,
    check_targets,
    class_table,
    count_classes,
    evaluation_notes,
    query_note,
    training_notes,
)
from hf_faim2f.data.dataset import Description, describe
from hf_faim2f.data.formats import FORMATS, DataSource, open_data
from hf_faim2f.data.item import make_item
from tests.support.image_files import photo, save, truncate
from tests.support.shapes import LABELS, Shapes, shapes, write_tree

SCENES = 3


def by_hand(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and segments of each class in the scenes that `write_tree` writes."""
    pixels, segments = np.zeros(4, dtype=int), np.zeros(4, dtype=int)
    for number in range(SCENES):
        _, ids, classes = shapes(seed + number)
        for k, label in enumerate(classes):
            pixels[label] += int((ids == k).sum())
            segments[label] += 1
    return pixels, segments


@pytest.mark.parametrize(("name", "task"), [(row.name, task) for row in FORMATS.values() for task in row.tasks
                                            if row.needs_root and (row.name, task) not in
                                            [("folder", "instance"), ("hub", "instance"), ("yolo", "semantic"),
                                             ("coco", "semantic"), ("labelme", "semantic"),
                                             ("supervisely", "semantic")]])  # fmt: skip
def test_every_format_is_counted_without_its_images(name: str, task: Any, tmp_path: Path) -> None:
    root = write_tree(name, tmp_path / name, SCENES)
    labels = LABELS if name == "hub" else None
    data = open_data(name, DataSource(str(root), task, labels), "train")
    counts = count_classes(data.items, data.description)
    pixels, segments = by_hand(0)
    present = np.array([np.isin(range(4), shapes(number)[2]) for number in range(SCENES)]).sum(0)
    # In semantic data, a class is one segment per image, and so is Cityscapes' stuff, such as poles.
    if task == "semantic":
        segments = present
    elif name == "cityscapes":
        segments[3] = present[3]
    if name == "ade20k":
        own, order = ("wall", "building", "sky", "floor"), (0, 1, 2, 3)
    elif name == "cityscapes":
        own, order = ("road", "person", "pole", "car"), (0, 1, 3, 2)
    else:
        own, order = LABELS, (0, 1, 2, 3)
    found = dict(zip(counts.labels, zip(counts.pixels, counts.segments, strict=True), strict=True))
    for label, k in zip(own, order, strict=True):
        if task == "instance" and (k == 0 or label == "pole"):  # stuff
            assert found.get(label, (0, 0)) == (0, 0)
        else:
            assert found[label] == (pixels[k], segments[k]), label
    assert set(counts.absent) == set(counts.labels) - {label for label in own if found.get(label, (0, 0))[1]}
    assert counts.images == counts.total == SCENES and not counts.is_sample
    # Images are only needed for panoptic data without stated areas.
    if name not in ("hub", "coco-panoptic"):
        for path in [
            *root.rglob("*_leftImg8bit.png"),
            *root.rglob("images/**/*.png"),
            *root.glob("*2017/*.png"),
            *root.glob("JPEGImages/*.png"),
            *root.glob("train/*[0-9].png"),
            *root.glob("train/img/*.png"),
        ]:
            truncate(path)
        with pytest.raises(DatasetError, match="[Tt]runcated"):
            data.items[0]
        assert count_classes(data.items, data.description) == counts


def test_a_sequence_of_items_and_a_sample(tmp_path: Path) -> None:
    description = Description("shapes", "panoptic", LABELS, frozenset({1, 2, 3}))
    counts = count_classes(Shapes(SCENES), description)  # type: ignore[arg-type]
    pixels, segments = by_hand(0)
    assert counts.pixels == tuple(pixels) and counts.segments == tuple(segments) and counts.unlabelled == 0
    assert counts.targets == {number: len(shapes(number)[2]) for number in range(SCENES)}
    most = max(range(SCENES), key=lambda number: len(shapes(number)[2]))
    assert counts.largest == f"{most}.png"
    sample = count_classes(Shapes(40), description, most_images=5)  # type: ignore[arg-type]
    assert sample.images == 5 and sample.total == 40 and sample.of_images == "5 of 40 images"
    assert sample == count_classes(Shapes(40), description, most_images=5)  # type: ignore[arg-type]
    assert max(sample.targets) > 5  # not just the first items
    assert "5 of 40 images" in class_table({"train": sample})[0]


def items_of(*classes: int) -> list[Item]:
    """An image of 4x4 pixels for each class, which covers it."""
    image, segments = torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.int32)
    return [make_item(image, segments, [label], number, str(number)) for number, label in enumerate(classes)]


def test_of_few_large_images_a_random_sample_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the first ones: data is often sorted by class."""
    monkeypatch.setattr("hf_faim2f.data.counts.MOST_PIXELS", 20 * 16)
    counts = count_classes(items_of(*[0] * 20, *[1] * 20), Description("shapes", "semantic", ("a", "b")))
    assert counts.images == 20 and counts.is_sample and min(counts.segments) > 4


def test_skipped_images_make_no_sample() -> None:
    """A class that is in no image that can be read is never learned."""

    class Damaged(list[Item]):
        def __getitem__(self, index: Any) -> Any:
            if index == 1:
                raise DatasetError("damaged")
            return super().__getitem__(index)

    damaged, description = Damaged(items_of(0, 1, 0, 0)), Description("shapes", "semantic", ("a", "b"))
    counts = count_classes(damaged, description, skip_bad=True)
    assert (counts.images, counts.skipped, counts.of_images) == (3, 1, "3 of 4 images") and not counts.is_sample
    assert training_notes(counts) == ["Never in the training data, and so not learned: b."]
    assert count_classes(damaged, description, skip_bad=True, most_images=2).is_sample


def test_pixels_of_overlapping_segments_are_not_subtracted_twice(tmp_path: Path) -> None:
    """Two squares that share 4 of their 16 pixels each, one of them on a crowd."""
    squares = [[[0, 0, 4, 0, 4, 4, 0, 4]], [[2, 2, 6, 2, 6, 6, 2, 6]], [[0, 0, 8, 0, 8, 2, 0, 2]]]
    root = write_coco(tmp_path, 0, squares[0])
    path = root / "annotations" / "instances_train2017.json"
    document = json.loads(path.read_text())
    first = document["annotations"][0]
    document["annotations"] += [{**first, "id": 2 + k, "segmentation": mask, "iscrowd": k}
                                for k, mask in enumerate(squares[1:])]  # fmt: skip
    path.write_text(json.dumps(document))
    data = load_coco_instance(root, "train2017")
    for items in (data, [data[0]]):  # from the annotations alone, and from items
        counts = count_classes(items, describe(data))
        assert (counts.pixels, counts.crowds, counts.unlabelled) == ((32,), 1, 64 - 28)


def test_the_sample_grows_until_there_is_a_target(tmp_path: Path) -> None:
    for index in range(30):
        save(tmp_path / "images" / f"{index:02}.png", photo(4, 4))
        save(tmp_path / "masks" / f"{index:02}.png", np.full((4, 4), 0 if index != 17 else 5, dtype=np.uint8))
    data = load_folder(tmp_path, ["cell"], "instance")
    counts = count_classes(data, describe(data), most_images=2)
    assert counts.targets == {17: 1} and counts.pixels == (16,)
    check_targets(counts, "cells")


def two_classes(root: Path, *maps: np.ndarray, labels: list[str] | None = None) -> Any:
    for index, ids in enumerate(maps):
        save(root / "images" / f"{index}.png", photo(*ids.shape))
        save(root / "masks" / f"{index}.png", ids.astype(np.uint8))
    return load_folder(root, labels or ["background", "lesion", "tumor"])


def test_absent_classes_void_and_the_table(tmp_path: Path) -> None:
    ids = np.zeros((10, 20), dtype=np.uint8)
    ids[2:5, 3:9], ids[9] = 1, 255
    data = two_classes(tmp_path, ids, ids * 0)
    counts = count_classes(data, describe(data))
    assert counts.pixels == (400 - 18 - 20, 18, 0) and counts.segments == (2, 1, 0) and counts.unlabelled == 20
    assert training_notes(counts) == ["Never in the training data, and so not learned: tumor."]
    assert evaluation_notes(counts) == ["Absent from the ground truth, so neither measured nor in the means: tumor."]
    lines = class_table({"train": counts, "validation": counts})
    assert lines[0] == "Pixels and segments of each class (train 2 images, validation 2 images):"
    assert [line.split() for line in lines[2:]] == [
        ["background", "362", "2", "362", "2"],
        ["lesion", "18", "1", "18", "1"],
        ["tumor", "0", "0", "0", "0"],
        ["(no", "class)", "20", "20"],
    ]
    (tmp_path / "masks" / "1.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"masks/1\.png"):
        count_classes(data, describe(data))
    assert count_classes(data, describe(data), skip_bad=True).pixels == (200 - 18 - 20, 18, 0)


def test_the_table_is_aligned_for_wide_and_combining_characters(tmp_path: Path) -> None:
    data = two_classes(tmp_path, np.zeros((10, 20)), labels=["道路", "ha\u0308user", "tree"])
    _, head, *rows = class_table({"train": count_classes(data, describe(data))})
    columns = [4, 6, 4]  # width in a terminal
    width = len("(no class)")
    for row, label, taken in zip(rows, ("道路", "ha\u0308user", "tree"), columns, strict=False):
        assert row.startswith(label + " " * (width - taken + 2)) and len(row) - len(label) + taken == len(head), row


def test_one_semantic_class_is_no_choice(tmp_path: Path) -> None:
    data = two_classes(tmp_path, np.zeros((4, 4)), labels=["ground"])
    (note,) = evaluation_notes(count_classes(data, describe(data)))
    assert "ground is the only class" in note and "name the background" in note


@pytest.mark.parametrize("rows", [5, 4])
def test_pixels_that_nobody_annotated_are_said(tmp_path: Path, rows: int) -> None:
    """The model learns nothing about these pixels, and no metric counts them."""
    ids = np.full((10, 20), 255)
    ids[:rows] = np.arange(20) % 2
    data = two_classes(tmp_path, ids, labels=["cat", "dog"])
    notes = training_notes(count_classes(data, describe(data)))
    assert [note[:33] for note in notes] == ([] if rows == 5 else ["60 % of the pixels have no class,"])


def test_more_segments_than_queries() -> None:
    description = Description("shapes", "panoptic", LABELS, frozenset({1, 2, 3}))
    counts = count_classes(Shapes(20), description)  # type: ignore[arg-type]
    sizes = [len(shapes(number)[2]) for number in range(20)]
    assert query_note(counts, max(sizes)) is None
    note = query_note(counts, 2)
    assert note is not None
    dropped, images = sum(max(0, size - 2) for size in sizes), sum(size > 2 for size in sizes)
    assert f"has {max(sizes)} segments, but the model only 2 queries" in note
    assert f"{dropped} of the {sum(sizes)} segments of 20 images get none (in {images} images)" in note


def write_coco(root: Path, crowd: Any, mask: Any) -> Path:
    save(root / "train2017" / "1.png", photo(8, 8))
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": crowd, "segmentation": mask}
    document = {"images": [{"id": 1, "file_name": "1.png", "height": 8, "width": 8}], "annotations": [annotation],
                "categories": [{"id": 1, "name": "cell"}]}  # fmt: skip
    (root / "annotations").mkdir(parents=True)
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(document))
    return root


RUNS = {"size": [8, 8], "counts": [8, 16, 40]}


def test_crowds_alone_are_nothing_to_learn_from(tmp_path: Path) -> None:
    data = load_coco_instance(write_coco(tmp_path, 1, RUNS), "train2017")
    counts = count_classes(data, describe(data))
    assert counts.crowds == 1 and not counts.targets and counts.pixels == (0,)
    crowds, absent = evaluation_notes(counts)
    assert (
        crowds.startswith("1 of the 1 segments are crowds (iscrowd 1)")
        and "CVAT" in crowds
        and absent.endswith("in the means: cell.")
    )
    with pytest.raises(DatasetError, match=r"All 1 segment of .* are crowds \(iscrowd 1\)"):
        check_targets(counts, describe(data).name)


@pytest.mark.parametrize("crowd", ["0", "1", 2, [0]])
def test_iscrowd_is_a_number(tmp_path: Path, crowd: Any) -> None:
    with pytest.raises(
        DatasetError, match=rf"annotation 1 has the iscrowd {re.escape(repr(crowd))}: it must be the number"
    ):
        load_coco_instance(write_coco(tmp_path, crowd, RUNS), "train2017")


@pytest.mark.parametrize(("crowd", "expected"), [(0, False), (1, True), (False, False), (True, True), (None, False)])
def test_iscrowd_as_it_may_be(tmp_path: Path, crowd: Any, expected: bool) -> None:
    data = load_coco_instance(write_coco(tmp_path, crowd, RUNS), "train2017")
    assert data[0]["crowd"].tolist() == [expected]


def test_no_segment_at_all_and_none_in_the_crops(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    save(empty / "images" / "0.png", photo(4, 4))
    save(empty / "masks" / "0.png", np.zeros((4, 4), dtype=np.uint8))
    data = load_folder(empty, ["cell"], "instance")
    with pytest.raises(DatasetError, match=r"has no segment in any of its 1 image: there is nothing to learn from"):
        check_targets(count_classes(data, describe(data)), describe(data).name)

    ids = np.zeros((4000, 8), dtype=np.uint8)
    ids[0, 0] = 1
    save(tmp_path / "images" / "0.png", photo(4000, 8))
    save(tmp_path / "masks" / "0.png", ids)
    data = load_folder(tmp_path, ["cell"], "instance")
    counts = count_classes(data, describe(data))
    assert counts.targets == {0: 1}
    targets: list[int] = []

    def targets_of(item: Any) -> int:
        targets.append(int((item["segments"] >= 0).sum()))
        return targets[-1]

    with pytest.raises(DatasetError, match="none is left in the training crops of 1 image:"):
        check_crops(TrainingItems(data, [RandomCrop(8, 8)]), targets_of, counts, "cells")  # type: ignore[arg-type]
    assert targets == [0]
    check_crops(TrainingItems(data), targets_of, counts, "cells")  # type: ignore[arg-type]
    assert targets == [0, 1]


def test_black_and_white_is_as_pillow_writes_it(tmp_path: Path) -> None:
    """A 1-bit PNG has the values 0 and 1."""
    save(tmp_path / "images" / "0.png", photo(2, 2))
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.array([[0, 255], [255, 255]], dtype=np.uint8)).convert("1").save(tmp_path / "masks" / "0.png")
    data = load_folder(tmp_path, ["background", "lesion"])
    assert count_classes(data, describe(data)).pixels == (1, 3)


def test_a_mask_of_the_stored_pixels_is_counted_by_its_header(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "images" / "0.jpg", photo(4, 9), exif=exif)
    ids = np.zeros((4, 9), dtype=np.uint8)
    ids[1:3, 2:7] = 1
    for mask in (ids, np.rot90(ids, -1)):
        save(tmp_path / "masks" / "0.png", np.ascontiguousarray(mask))
        data = load_folder(tmp_path, ["background", "lesion"])
        truncated = (tmp_path / "images" / "0.jpg").read_bytes()[:-40]
        assert count_classes(data, describe(data)).pixels == (26, 10)
    (tmp_path / "images" / "0.jpg").write_bytes(truncated)
    with pytest.raises(DatasetError):
        data[0]
    assert count_classes(data, describe(data)).pixels == (26, 10)


@pytest.mark.parametrize(("labels", "said"), [
    (("a", "Caf\u00e9"), "class 1 is 'Caf\u00e9' instead of 'caf\u00e9'"),
    (("a", "cafe\u0301"), "is written in other Unicode characters ('cafe\\u0301' instead of 'caf\\xe9')"),
    (("a", "caf\u00e9", "b"), "3 classes instead of 2"),
])  # fmt: skip
def test_other_labels_are_named(labels: tuple[str, ...], said: str) -> None:
    first = Description("one", "semantic", ("a", "caf\u00e9"))
    check_same_labels(first, Description("two", "semantic", first.labels))
    with pytest.raises(DatasetError, match="^two has other labels than one: ") as error:
        check_same_labels(first, Description("two", "semantic", labels))
    assert said in str(error.value)

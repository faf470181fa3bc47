"""Roboflow's export of semantic masks, against arrays written in the tests."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_faim2f.data import class_map, describe
from hf_faim2f.data.formats import DataSource, recognize
from hf_faim2f.data.readers import roboflow_masks
from hf_faim2f.data.readers.roboflow_masks import load_roboflow_masks, read_classes
from hf_faim2f.errors import DatasetError, MissingPartError

VALUES = np.array([[0, 0, 7, 7], [0, 40, 40, 7], [40, 40, 40, 0]], dtype=np.uint8)
CLASSES = "Pixel Value, Class\n40, dog\n0, background\n7, cat\n"
HEADER = "Pixel Value, Class\n"
# The classes of VALUES by ascending value: background, cat, dog.
TRUTH = [[0, 0, 1, 1], [0, 2, 2, 1], [2, 2, 2, 0]]


def image(path: Path, size: tuple[int, int] = (3, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], (9, 99, 199)).save(path)
    return path


def export(folder: Path, names: str = "a", classes: str | None = CLASSES, values: np.ndarray = VALUES) -> Path:
    """Writes an image and a mask for each letter of `names`."""
    for name in names:
        image(folder / f"{name}.jpg")
        Image.fromarray(values).save(folder / f"{name}_mask.png")
    if classes is not None:
        (folder / "_classes.csv").write_text(classes)
    return folder


def test_the_file_names_the_value_of_each_class(tmp_path: Path) -> None:
    export(tmp_path / "train", "ab")
    data = load_roboflow_masks(tmp_path)
    assert describe(data).labels == ("background", "cat", "dog") and describe(data).task == "semantic"
    assert [(item["file_name"], item["image_id"]) for item in data] == [("a.jpg", "a"), ("b.jpg", "b")]
    assert class_map(data[0]).tolist() == TRUTH
    assert data[0]["image"].shape == (3, 3, 4)


def test_masks_with_a_palette_are_read_by_its_indices(tmp_path: Path) -> None:
    export(tmp_path / "train")
    mask = Image.fromarray(VALUES)
    mask.putpalette([255, 0, 0] * 7 + [0, 0, 0] * 249)
    mask.save(tmp_path / "train" / "a_mask.png")
    assert Image.open(tmp_path / "train" / "a_mask.png").mode == "P"
    assert class_map(load_roboflow_masks(tmp_path)[0]).tolist() == TRUTH


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Pixel Value, Class\n0, background\n1, cat\n", {0: "background", 1: "cat"}),
        ("\ufeffpixel value,class\r\n\r\n  3 ,  cat, black  \r\n1,dog\r\n", {1: "dog", 3: "cat, black"}),
        ('Pixel Value, Class\n5, "cat, ""big"""\n', {5: 'cat, "big"'}),
        ("0, a\n255, b", {0: "a", 255: "b"}),  # without a header
    ],
)
def test_files_of_classes(tmp_path: Path, text: str, expected: dict[int, str]) -> None:
    path = tmp_path / "_classes.csv"
    path.write_bytes(text.encode())
    found = read_classes(path)
    assert found == expected and list(found) == sorted(expected)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no class: write `Pixel Value, Class`, and a line such as `1, cat` for each"),
        (HEADER, "names no class"),
        ("filename, cat, dog\na.jpg, 1, 0\n", "in line 1 'filename, cat, dog': write `Pixel Value, Class` there"),
        (HEADER + "0, a\nx, b", "in line 3 'x, b': write a value and a class, such as `1, cat` there"),
        (HEADER + "0, a\n1", "in line 3 '1': write a value and a class"),
        (HEADER + '0, ""', "in line 2 '0, \"\"': write a value and a class"),
        (HEADER + "-1, a", "in line 2 '-1, a'"),
        (HEADER + "1.5, a", "in line 2 '1.5, a'"),
        (HEADER + "²,a", "in line 2 '²,a'"),
        (HEADER + "256, a", "in line 2 the value 256, but masks have values from 0 to 255"),
        (HEADER + "0, a\n00, b", "in line 3 the value 00 a second time"),
        (HEADER + "0, a\n1, a", "in line 3 the class 'a' a second time: rename it"),
    ],
)
def test_unusable_files_of_classes(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "_classes.csv"
    path.write_text(text)
    with pytest.raises(DatasetError) as caught:
        read_classes(path)
    assert f"{path} " in str(caught.value) and words in str(caught.value)


def test_values_that_are_not_named(tmp_path: Path) -> None:
    export(tmp_path / "train", values=np.where(VALUES == 7, 255, VALUES).astype(np.uint8))
    ignored = load_roboflow_masks(tmp_path)[0]
    assert class_map(ignored).tolist() == [[0, 0, -1, -1], [0, 2, 2, -1], [2, 2, 2, 0]]
    with pytest.raises(DatasetError, match=r"a_mask.png has the value 255, which .*_classes.csv does not name: add it"):
        load_roboflow_masks(tmp_path, ignore_index=None)[0]
    with pytest.raises(DatasetError, match="has the value 255, which"):
        load_roboflow_masks(tmp_path, ignore_index=9)[0]
    (tmp_path / "train" / "_classes.csv").write_text(f"{HEADER}0, background\n255, cat")
    with pytest.raises(DatasetError, match="has the value 40, which"):
        load_roboflow_masks(tmp_path)[0]
    # A class with the ignored value is a class.
    item = load_roboflow_masks(tmp_path, ignore_index=40)[0]
    assert class_map(item).tolist() == [[0, 0, 1, 1], [0, -1, -1, 1], [-1, -1, -1, 0]]
    assert load_roboflow_masks(tmp_path, ignore_index=40)[0]["classes"].tolist() == [0, 1]
    (tmp_path / "train" / "_classes.csv").write_text(f"{HEADER}0, background\n40, dog\n255, cat")
    assert class_map(load_roboflow_masks(tmp_path)[0]).tolist() == [[0, 0, 2, 2], [0, 1, 1, 2], [1, 1, 1, 0]]


def test_several_values_that_are_not_named(tmp_path: Path) -> None:
    export(tmp_path / "train", classes=f"{HEADER}0, background")
    with pytest.raises(DatasetError, match="has the value 7 and 1 other, which"):
        load_roboflow_masks(tmp_path)[0]


def test_a_class_called_void_is_none(tmp_path: Path) -> None:
    export(tmp_path / "train", classes=f"{HEADER}0, Void\n7, cat\n40, dog")
    data = load_roboflow_masks(tmp_path)
    assert describe(data).labels == ("cat", "dog")
    assert class_map(data[0]).tolist() == [[-1, -1, 0, 0], [-1, 1, 1, 0], [1, 1, 1, -1]]
    (tmp_path / "train" / "_classes.csv").write_text(f"{HEADER}0, void")
    with pytest.raises(DatasetError, match="_classes.csv names no class"):
        load_roboflow_masks(tmp_path)


def test_parts_with_other_values_for_the_same_classes(tmp_path: Path) -> None:
    export(tmp_path / "train")
    export(tmp_path / "valid", classes=f"{HEADER}0, dog\n7, background\n40, cat")
    parts = [load_roboflow_masks(tmp_path, part) for part in ("train", "val")]
    assert describe(parts[0]).labels == describe(parts[1]).labels == ("background", "cat", "dog")
    assert class_map(parts[1][0]).tolist() == [[2, 2, 0, 0], [2, 1, 1, 0], [1, 1, 1, 2]]


def test_parts_with_different_classes(tmp_path: Path) -> None:
    export(tmp_path / "train")
    export(tmp_path / "valid", classes=f"{HEADER}0, background\n7, cat\n40, bird")
    words = r"valid/_classes.csv and .*train/_classes.csv have different classes, such as 'bird', which only one"
    with pytest.raises(DatasetError, match=words):
        load_roboflow_masks(tmp_path, "val")
    assert len(load_roboflow_masks(tmp_path, "train")) == 1


def test_parts_that_are_missing(tmp_path: Path) -> None:
    export(tmp_path / "train")
    with pytest.raises(MissingPartError, match="has no part 'val'; it is divided into train"):
        load_roboflow_masks(tmp_path, "val")
    export(tmp_path / "test", classes=None)
    with pytest.raises(DatasetError, match="There is no file .*test/_classes.csv"):
        load_roboflow_masks(tmp_path, "test")
    with pytest.raises(DatasetError, match="There is no file .*_classes.csv"):
        load_roboflow_masks(image(tmp_path / "other" / "a.jpg").parent)


def test_data_without_parts(tmp_path: Path) -> None:
    names = "abcdefghijk"
    export(tmp_path / "one", names)
    for root in (tmp_path / "one", tmp_path):  # a folder with an export in it
        parts = {part: load_roboflow_masks(root, part) for part in ("train", "val", "all")}
        assert [item["image_id"] for item in parts["val"]] == ["a", "k"]
        assert [item["image_id"] for item in parts["train"]] == list("bcdefghij") and len(parts["all"]) == 11
    export(tmp_path / "two")
    with pytest.raises(MissingPartError, match="has no part 'train' with masks and _classes.csv, but one, two: rename"):
        load_roboflow_masks(tmp_path)
    assert len(load_roboflow_masks(tmp_path, "two")) == 1


def test_images_and_masks_that_do_not_match(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(roboflow_masks.logger, "warning_once", said.append)
    folder = export(tmp_path / "train", "ab")
    image(folder / "c.jpg")
    with pytest.raises(DatasetError, match=r"c.jpg has no mask: there is no file c_mask.png beside it"):
        load_roboflow_masks(tmp_path)
    data = load_roboflow_masks(tmp_path, skip_bad=True)
    assert len(data) == 2 and len(describe(data).skipped) == 1 and not said
    (folder / "c.jpg").unlink()
    (folder / "b.jpg").unlink()
    assert [item["image_id"] for item in load_roboflow_masks(tmp_path)] == ["a"]
    (text,) = said
    assert "has a mask without an image of the same name, such as b_mask.png: not used" in text
    image(folder / "a.png")
    with pytest.raises(DatasetError, match=r"a.png and a.jpg share the mask a_mask.png: rename one"):
        load_roboflow_masks(tmp_path)


def test_an_image_whose_name_ends_like_a_mask(tmp_path: Path) -> None:
    folder = export(tmp_path / "train")
    image(folder / "face_mask.png")
    Image.fromarray(VALUES).save(folder / "face_mask_mask.png")
    data = load_roboflow_masks(tmp_path)
    assert [item["file_name"] for item in data] == ["a.jpg", "face_mask.png"]
    assert class_map(data[1]).tolist() == TRUTH and bool((data[1]["image"][0] == 9).all())


def test_a_mask_of_another_size(tmp_path: Path) -> None:
    folder = export(tmp_path / "train")
    image(folder / "a.jpg", (3, 5))
    with pytest.raises(DatasetError, match="a_mask.png"):
        load_roboflow_masks(tmp_path)[0]


def test_white_objects_are_not_ignored_without_a_word(tmp_path: Path) -> None:
    white = np.where(VALUES == 7, 255, 0).astype(np.uint8)
    export(tmp_path / "train", classes=f"{HEADER}0, background\n1, cat", values=white)
    export(tmp_path / "valid", classes=f"{HEADER}0, background\n1, cat", values=white)
    words = "have no values but 0 and 255, and 255 is ignored .* if it is a class, write 255 there as its Pixel Value"
    with pytest.raises(DatasetError, match=words):
        load_roboflow_masks(tmp_path)
    assert len(load_roboflow_masks(tmp_path, "val")) == 1  # a small part may have no object
    for part in ("train", "valid"):
        (tmp_path / part / "_classes.csv").write_text(f"{HEADER}0, background\n255, cat")
    assert torch.equal(class_map(load_roboflow_masks(tmp_path)[0]), torch.from_numpy(white // 255).long())


def test_a_class_that_is_to_be_ignored_is_refused(tmp_path: Path) -> None:
    export(tmp_path / "train")
    with pytest.raises(DatasetError, match="names the value 0, which is to be ignored .*'background': name it `void`"):
        load_roboflow_masks(tmp_path, ignore_index=0)
    (tmp_path / "train" / "_classes.csv").write_text(CLASSES.replace("background", "void"))
    found = class_map(load_roboflow_masks(tmp_path, ignore_index=0)[0])
    assert torch.equal(found, torch.tensor(TRUTH) - 1)


def test_recognition(tmp_path: Path) -> None:
    export(tmp_path / "a" / "train")
    found = recognize(DataSource(str(tmp_path / "a")))
    assert found == ("roboflow-masks", "train/_classes.csv beside *_mask.png")
    assert recognize(DataSource(str(export(tmp_path / "b")))).reason == "_classes.csv beside *_mask.png"
    # Roboflow's export for classification.
    image(tmp_path / "c" / "train" / "a.jpg")
    (tmp_path / "c" / "train" / "_classes.csv").write_text("filename, cat\na.jpg, 1\n")
    with pytest.raises(DatasetError, match="has none of the known formats"):
        recognize(DataSource(str(tmp_path / "c")))
    image(tmp_path / "c" / "train" / "b_mask.png")
    with pytest.raises(DatasetError, match="has none of the known formats"):
        recognize(DataSource(str(tmp_path / "c")))
    for path in export(tmp_path / "d" / "train").glob("*_mask.png"):
        path.rename(path.with_suffix(".PNG"))
    assert recognize(DataSource(str(tmp_path / "d"))).format == "roboflow-masks"
    (tmp_path / "a" / "train" / "_annotations.coco.json").write_text('{"images": [], "annotations": []}')
    with pytest.raises(DatasetError, match=r"\(coco\), and train/_classes.csv beside .* \(roboflow-masks\): choose"):
        recognize(DataSource(str(tmp_path / "a")))

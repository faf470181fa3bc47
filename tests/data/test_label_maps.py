"""Masks of classes and objects in other layouts: Pascal VOC, CamVid, and colors from a palette, compared with
Pillow."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hf_faim2f.data import class_map, describe, readers
from hf_faim2f.data.formats import DataSource, open_data
from hf_faim2f.data.readers.camvid import CLASSES, load_camvid
from hf_faim2f.data.readers.palette import VOC_CLASSES, read_palette, voc_color, voc_palette
from hf_faim2f.data.readers.voc import load_voc
from hf_faim2f.errors import DatasetError
from tests.support.image_files import photo, save

SIDE = 12


def palette_image(values: np.ndarray) -> Image.Image:
    """A PNG with VOC's palette, like in its archive."""
    image = Image.fromarray(values.astype(np.uint8), "P")
    image.putpalette([channel for index in range(256) for channel in voc_color(index)])
    return image


def as_png(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def voc(root: Path) -> tuple[np.ndarray, np.ndarray]:
    """Two cars (7) and a cat (8) with borders: the class map and the object map."""
    classes, objects = np.zeros((SIDE, SIDE), dtype=int), np.zeros((SIDE, SIDE), dtype=int)
    for number, (label, rows) in enumerate(((7, slice(1, 3)), (8, slice(4, 6)), (7, slice(8, 11))), 1):
        classes[rows, 2:10], objects[rows, 2:10] = label, number
        classes[rows, 1], objects[rows, 1] = 255, 255
    save(root / "JPEGImages" / "2007_1.jpg", photo(SIDE, SIDE))
    as_png(root / "SegmentationClass" / "2007_1.png", palette_image(classes))
    as_png(root / "SegmentationObject" / "2007_1.png", palette_image(objects))
    for part in ("train", "val"):
        path = root / "ImageSets" / "Segmentation" / f"{part}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("2007_1\n")
    return classes, objects


def test_vocs_classes_objects_and_borders(tmp_path: Path) -> None:
    classes, objects = voc(tmp_path / "VOCdevkit" / "VOC2012")
    semantic = load_voc(tmp_path, "val")
    assert describe(semantic).labels == VOC_CLASSES
    assert torch.equal(class_map(semantic[0]), torch.from_numpy(np.where(classes == 255, -1, classes)))
    instance = load_voc(tmp_path, "train", "instance")
    assert describe(instance).labels == VOC_CLASSES[1:] and len(describe(instance).things) == 20
    item = instance[0]
    assert [describe(instance).labels[label] for label in item["classes"]] == ["car", "cat", "car"]
    expected = torch.from_numpy(np.where((objects == 0) | (objects == 255), 0, objects) - 1)
    assert torch.equal(item["segments"].long(), expected)
    with pytest.raises(DatasetError, match="no part 'test'"):
        load_voc(tmp_path, "test")


def test_suffixes_in_capitals_and_backslashes_in_lists(tmp_path: Path) -> None:
    voc(tmp_path)
    for folder, suffix in (("JPEGImages", ".jpg"), ("SegmentationClass", ".png")):
        (tmp_path / folder / "town").mkdir()
        old = tmp_path / folder / f"2007_1{suffix}"
        old.rename(tmp_path / folder / "town" / (old.name if suffix == ".png" else "2007_1.JPG"))
    (tmp_path / "ImageSets" / "Segmentation" / "val.txt").write_text("town\\2007_1\r\n")
    assert load_voc(tmp_path, "val")[0]["file_name"] == "town/2007_1.JPG"


@pytest.mark.parametrize("divided", [True, False])
@pytest.mark.parametrize("in_capitals", [("Class",), ("Object",), ("Class", "Object")])
def test_masks_with_suffixes_in_capitals(tmp_path: Path, in_capitals: tuple[str, ...], divided: bool) -> None:
    classes, objects = voc(tmp_path)
    for kind in in_capitals:
        path = tmp_path / f"Segmentation{kind}" / "2007_1.png"
        path.rename(path.with_suffix(".PNG"))
    if not divided:
        shutil.rmtree(tmp_path / "ImageSets")
    split = "train" if divided else "all"
    semantic, instance = (load_voc(tmp_path, split, task)[0] for task in ("semantic", "instance"))
    assert torch.equal(class_map(semantic), torch.from_numpy(np.where(classes == 255, -1, classes)))
    assert torch.equal(instance["segments"] >= 0, torch.from_numpy((objects > 0) & (objects < 255)))


def test_without_lists_hidden_files_are_no_images(tmp_path: Path) -> None:
    """macOS writes ._NAME next to each file on foreign file systems."""
    voc(tmp_path)
    shutil.rmtree(tmp_path / "ImageSets")
    for name in ("JPEGImages/._2007_1.jpg", "SegmentationClass/._2007_1.png"):
        (tmp_path / name).write_bytes(b"macOS")
    assert [item["image_id"] for item in load_voc(tmp_path, "all")] == ["2007_1"]


def test_names_in_a_list_may_have_spaces_and_flags(tmp_path: Path) -> None:
    classes, _ = voc(tmp_path)
    names = ["photo", "photo (1)", "photo 1", "photo -2"]
    for name in names:
        save(tmp_path / "JPEGImages" / f"{name}.jpg", photo(SIDE, SIDE))
        as_png(tmp_path / "SegmentationClass" / f"{name}.png", palette_image(classes))
    path = tmp_path / "ImageSets" / "Segmentation" / "train.txt"
    path.write_text("\n".join(names) + "\n")
    assert [item["image_id"] for item in load_voc(tmp_path)] == names
    path.write_text("photo  1\nphoto (1) -1\nphoto 1 0\n")  # as in ImageSets/Main
    assert [item["image_id"] for item in load_voc(tmp_path)] == names[:3]


def test_vocs_color_map_is_that_of_its_archive() -> None:
    """The first colors are those documented in the development kit."""
    known = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128),
             (128, 128, 128), (64, 0, 0)]  # fmt: skip
    assert [voc_color(index) for index in range(9)] == known and voc_color(20) == (0, 64, 128)
    assert voc_color(255) == (224, 224, 192)


def test_cvats_masks_in_colors(tmp_path: Path) -> None:
    classes, objects = voc(tmp_path)
    names = {"car": (9, 8, 7), "background": (0, 0, 0), "cat": (50, 60, 70)}
    lines = [f"{name}:{red},{green},{blue}::" for name, (red, green, blue) in names.items()]
    (tmp_path / "labelmap.txt").write_text("\n".join(["# label:color_rgb:parts:actions", *lines]))
    table = np.zeros((256, 3), dtype=np.uint8)
    table[[7, 8, 255]] = names["car"], names["cat"], (224, 224, 192)
    save(tmp_path / "SegmentationClass" / "2007_1.png", table[classes])
    own = np.array([voc_color(index) for index in range(256)], dtype=np.uint8)
    save(tmp_path / "SegmentationObject" / "2007_1.png", own[objects])
    data = load_voc(tmp_path, "train", "instance")
    assert describe(data).labels == ("car", "cat") and data[0]["classes"].tolist() == [1, 0, 0]  # by color
    assert int((data[0]["segments"] == 0).sum()) == 16
    semantic = load_voc(tmp_path)
    assert describe(semantic).labels == ("background", "car", "cat")
    table[8] = 1, 2, 3
    save(tmp_path / "SegmentationClass" / "2007_1.png", table[classes])
    with pytest.raises(DatasetError, match=r"2007_1.png has the color \(1, 2, 3\), which .*labelmap.txt does not have"):
        semantic[0]


def test_cvats_palette_masks_are_read_by_color(tmp_path: Path) -> None:
    """The indices of a palette need not follow the order of labelmap.txt, unless its colors are others."""
    classes, _ = voc(tmp_path)
    car, cat = voc_color(7), voc_color(8)
    lines = [f"{name}:{red},{green},{blue}::" for name, (red, green, blue) in
             {"background": (0, 0, 0), "car": car, "cat": cat}.items()]  # fmt: skip
    (tmp_path / "labelmap.txt").write_text("\n".join(lines))
    expected = np.select([classes == 255, classes == 7, classes == 8], [-1, 1, 2], 0)
    assert np.array_equal(class_map(load_voc(tmp_path)[0]).numpy(), expected)
    image = Image.fromarray(np.where(classes == 255, 255, (expected == 1) * 2 + (expected == 2)).astype(np.uint8), "P")
    for colors, car_index in (((0, 0, 0, *cat, *car), 1), ((0, 0, 0, 1, 1, 1, 2, 2, 2), 2)):
        image.putpalette([*colors, *[0] * 3 * 252, 224, 224, 192])
        as_png(tmp_path / "SegmentationClass" / "2007_1.png", image)
        assert int(class_map(load_voc(tmp_path)[0])[1, 5]) == car_index
        image.putpalette([*colors, *[0] * 3 * 253])  # the border has black, too, but is not the background
        as_png(tmp_path / "SegmentationClass" / "2007_1.png", image)
        found = class_map(load_voc(tmp_path)[0]).numpy()
        assert found[1, 5] == car_index and (found[classes == 255] == -1).all()


def test_a_class_called_void_is_pointed_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Formats with a value or color for each name ignore it; here, names are of the values 0, 1, ..."""
    said: list[str] = []
    monkeypatch.setattr(readers.folder.logger, "warning_once", said.append)
    save(tmp_path / "train" / "a.png", photo(SIDE, SIDE))
    save(tmp_path / "trainannot" / "a.png", np.resize(np.array([0, 1, 2], np.uint8), (SIDE, SIDE)))

    def found(names: str, **more: Any) -> list[int]:
        (tmp_path / "labels.txt").write_text(names.replace(" ", "\n"))
        data = open_data("camvid", DataSource(str(tmp_path), **more), "train")
        return class_map(data.items[0]).unique().tolist()

    assert found("sky road car") == [0, 1, 2] and not said
    assert found("sky road Void") == [0, 1, 2]
    assert "'Void' is learned and measured" in said[0]
    assert "ignore its value (--ignore-index, by default 255)" in said[0]
    assert found("sky road", ignore_index=2) == [-1, 0, 1]
    assert found("unlabelled road car") == [0, 1, 2] and "'unlabelled' is learned" in said[-1]


def test_palettes_are_read_by_index_unless_colors_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A palette with some of VOC's colors renames no class, and says so where all of an image are VOC's."""
    voc(tmp_path)
    said: list[str] = []
    monkeypatch.setattr(readers.voc.logger, "warning_once", said.append)
    names = ["background", "red", "blue", "green", "yellow"]
    (tmp_path / "class_names.txt").write_text("\n".join(names))
    for used, notes in (((0, 1, 2), 1), ((0, 2, 4), 0)):
        values = np.resize(used, (SIDE, SIDE))
        image = Image.fromarray(values.astype(np.uint8), "P")
        image.putpalette([0, 0, 0, 128, 0, 0, 0, 0, 128, 0, 128, 0, 255, 255, 0])
        as_png(tmp_path / "SegmentationClass" / "2007_1.png", image)
        said.clear()
        assert np.array_equal(class_map(load_voc(tmp_path)[0]).numpy(), values)
        assert len(said) == notes and all("--palette voc" in note for note in said)
    as_png(tmp_path / "SegmentationClass" / "2007_1.png", palette_image(values))
    said.clear()
    monkeypatch.setattr(readers.maps, "read_map", lambda *_: pytest.fail("It was decoded twice."))
    assert np.array_equal(class_map(load_voc(tmp_path)[0]).numpy(), values) and not said
    by_color = load_voc(tmp_path, labels=names, palette="voc")
    assert np.array_equal(class_map(by_color[0]).numpy(), values)


def test_a_palette_with_a_color_of_the_label_map_is_read_by_color_alone(tmp_path: Path) -> None:
    """One unknown color does not switch an image to indices."""
    voc(tmp_path)
    lines = ["background:0,0,0::", "road:128,128,128::", "cat:0,128,0::", "dog:128,0,0::"]
    (tmp_path / "labelmap.txt").write_text("\n".join(lines))

    def read(used: tuple[int, ...], colors: list[int]) -> list[int]:
        image = Image.fromarray(np.resize(used, (SIDE, SIDE)).astype(np.uint8), "P")
        image.putpalette(colors)
        as_png(tmp_path / "SegmentationClass" / "2007_1.png", image)
        return class_map(load_voc(tmp_path)[0])[0, : len(used)].tolist()

    known = [0, 0, 0, 128, 0, 0, 0, 128, 0]
    colors = [*known, 1, 2, 3, *[0] * 3 * 251, 255, 255, 255]
    assert read((0, 1, 2, 255), colors) == [0, 3, 2, -1]
    with pytest.raises(DatasetError, match=r"has the color \(1, 2, 3\), which .*labelmap.txt does not have: add it"):
        read((0, 1, 3), colors)
    with pytest.raises(DatasetError, match="has the value 4, which has no color of its own in the palette"):
        read((0, 1, 4), colors)
    for shades in ([shade for shade in range(256) for _ in range(3)], [0] * 3 * 256):  # no colors of classes
        assert read((0, 1, 3, 255), shades) == [0, 1, 3, -1]


def test_no_class_is_the_background_if_none_is_black(tmp_path: Path) -> None:
    voc(tmp_path)
    lines = [f"{name}:{red},{green},{blue}::" for name, (red, green, blue) in
             {"car": voc_color(7), "void": (0, 0, 0), "cat": voc_color(8)}.items()]  # fmt: skip
    (tmp_path / "labelmap.txt").write_text("\n".join(lines))
    data = load_voc(tmp_path, "train", "instance")
    assert describe(data).labels == ("car", "cat") and data[0]["classes"].tolist() == [0, 1, 0]
    assert describe(semantic := load_voc(tmp_path)).labels == ("car", "cat")
    assert class_map(semantic[0])[[0, 1, 4], 5].tolist() == [-1, 0, 1]


def test_an_object_without_a_class_is_refused(tmp_path: Path) -> None:
    classes, _ = voc(tmp_path)
    classes[4:6] = 0
    as_png(tmp_path / "SegmentationClass" / "2007_1.png", palette_image(classes))
    with pytest.raises(DatasetError, match="has an object that has no class"):
        load_voc(tmp_path, "train", "instance")[0]


def test_camvids_lists_and_void(tmp_path: Path) -> None:
    values = np.arange(SIDE * SIDE).reshape(SIDE, SIDE) % 12
    for name in ("a", "b"):
        save(tmp_path / "train" / f"{name}.png", photo(SIDE, SIDE))
        save(tmp_path / "trainannot" / f"{name}.png", values.astype(np.uint8))
    data = load_camvid(tmp_path)
    assert len(data) == 2 and describe(data).labels == CLASSES
    assert torch.equal(class_map(data[0]), torch.from_numpy(np.where(values == 11, -1, values)))
    (tmp_path / "train.txt").write_text("/SegNet/CamVid/train/b.png /SegNet/CamVid/trainannot/b.png\n")
    assert load_camvid(tmp_path)[0]["image_id"] == "b" and len(load_camvid(tmp_path)) == 1
    (tmp_path / "trainannot" / "a.png").rename(tmp_path / "trainannot" / "a.PNG")
    (tmp_path / "train.txt").write_text("/SegNet/CamVid/train/a.png\n")
    assert load_camvid(tmp_path)[0]["image_id"] == "a"
    (tmp_path / "train.txt").write_text("/SegNet/CamVid/train/c.png\n")
    with pytest.raises(DatasetError, match="no file .*c.png, which .*train.txt names"):
        load_camvid(tmp_path)
    (tmp_path / "train.txt").unlink()
    assert class_map(load_camvid(tmp_path, ignore_index=11)[0]).max() == 10
    (tmp_path / "labels.txt").write_text("\n".join(map(str, range(12))))
    assert class_map(load_camvid(tmp_path)[0]).max() == 11
    with pytest.raises(DatasetError, match="The value 11 is to be ignored .*take it out of the labels"):
        load_camvid(tmp_path, ignore_index=11)


def test_an_image_that_camvids_list_has_twice_counts_once(tmp_path: Path) -> None:
    for name in ("train/a", "trainannot/a", "trainannot/b"):
        save(tmp_path / f"{name}.png", np.zeros((4, 4), dtype=np.uint8))
    listed = tmp_path / "train.txt"
    listed.write_text("train/a.png trainannot/a.png\n/SegNet/train/a.png /SegNet/trainannot/a.png\n")
    assert load_camvid(tmp_path).with_format(None)["image_id"] == ["a"]
    listed.write_text("train/a.png trainannot/a.png\ntrain/a.png trainannot/b.png\n")
    with pytest.raises(DatasetError, match="train.txt lists two images or masks of the name a: keep one"):
        load_camvid(tmp_path)


@pytest.mark.parametrize("name", ["ade20k", "camvid"])
def test_no_task_is_suggested_that_the_format_does_not_have(name: str, tmp_path: Path) -> None:
    """A map of instances, by numbers or colors, in a format with the task semantic alone."""
    of_ade = ("images/training", "annotations/training", "ADE_train_00000001")
    images, maps, stem = of_ade if name == "ade20k" else ("train", "trainannot", "a")
    save(tmp_path / images / f"{stem}.png", photo(SIDE, SIDE))
    mask = tmp_path / maps / f"{stem}.png"
    for values, words in (
        (np.full((SIDE, SIDE), 1001, dtype=np.uint16), "has the value 1001, which no class of"),
        (photo(SIDE, SIDE), "mode 'RGB'"),
    ):
        save(mask, values)
        data = open_data(name, DataSource(str(tmp_path)), "train")
        with pytest.raises(DatasetError, match=words) as raised:
            data.items[0]
        assert "--task" not in str(raised.value) and str(raised.value).endswith(".")
        with pytest.raises(ValueError, match="not for instance"):
            open_data(name, DataSource(str(tmp_path), task="instance"), "train")


def test_camvid_in_colors(tmp_path: Path) -> None:
    save(tmp_path / "val" / "a.png", photo(SIDE, SIDE))
    colors = np.full((SIDE, SIDE, 3), (128, 64, 128), dtype=np.uint8)
    colors[:3] = 0
    save(tmp_path / "val_labels" / "a_L.png", colors)
    (tmp_path / "val_labels" / "a_L.png").rename(tmp_path / "val_labels" / "a_L.PNG")
    (tmp_path / "class_dict.csv").write_text("name,r,g,b\nSky,128,128,128\nRoad,128,64,128\nVoid,0,0,0\n")
    data = load_camvid(tmp_path, "val")
    assert describe(data).labels == ("Sky", "Road")
    assert class_map(data[0])[:3].unique().tolist() == [-1] and class_map(data[0])[3:].unique().tolist() == [1]
    with pytest.raises(DatasetError, match="The labels are not the 2 of .*class_dict.csv: leave one of the two out"):
        load_camvid(tmp_path, "val", labels=("sky", "road"))


def test_cvats_camvid_is_not_divided(tmp_path: Path) -> None:
    for number in range(2):
        save(tmp_path / "default" / f"{number}.png", photo(SIDE, SIDE))
        save(tmp_path / "defaultannot" / f"{number}.png", np.full((SIDE, SIDE, 3), (9, 8, 7), dtype=np.uint8))
    (tmp_path / "label_colors.txt").write_text("0 0 0 void\n9 8 7 car\n")
    parts = {part: load_camvid(tmp_path, part) for part in ("train", "val", "all")}
    assert {name: len(part) for name, part in parts.items()} == {"train": 1, "val": 1, "all": 2}
    assert describe(parts["all"]).labels == ("car",) and parts["val"][0]["image_id"] == "0"


LINES = [
    "sky 10 20 30\nlow wall 40 50 60",
    "10 20 30\tsky\n40 50 60\t\tlow wall",
    "name,r,g,b\nsky,10,20,30\nlow wall,40,50,60",
    "# label:color\nsky:10,20,30::\nlow wall:40,50,60:part:action",
    "sky #0a141e\nlow wall = #28323c\n",
]


@pytest.mark.parametrize("text", LINES)
def test_forms_of_palettes(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.txt").write_text(text)
    palette = read_palette(tmp_path / "p.txt")
    assert palette.labels == ("sky", "low wall") and palette.classes == {(10, 20, 30): 0, (40, 50, 60): 1}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sky 1 2\n", "no name and color in line 1"),
        ("sky 1 2 300\n", "no name and color in line 1"),
        ("a 1 2 3\nb 1 2 3\n", "color .1, 2, 3. twice"),
        ("a 1 2 3\na 3 2 1\n", "class name 'a' twice"),
        ("void 0 0 0\n", "has no class"),
        ("void 0 0 0 0\nroad 128 64 128 255\nsky 70 130 180 255\n", "a further number on each line"),
        ("0,road,128,64,128\n1,low wall,70,130,180\n", "a further number on each line"),
        ("128 64 128 255 road\n70 130 180 255 sky\n", "a further number on each line"),
        ("0 road 128 64 128\n1 sky 70 130 180\n255 void 0 0 0\n", "a further number on each line"),
        ("0 0 0 0 background\n1 128 64 128 road\n", "a further number on each line"),
        ("background 0 0 0 0\nroad 128 64 128 255\n", "a further number on each line"),
        ("background,255,255,255,0\nroad,128,64,128,255\nsky,1,2,3,255\n", "a further number on each line"),
        ("road 128 64 128 0\nsky 70 130 180 1\n", "a further number on each line"),
    ],
)
def test_unusable_palettes(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "p.txt").write_text(text)
    with pytest.raises(DatasetError, match=words):
        read_palette(tmp_path / "p.txt")


@pytest.mark.parametrize(
    "text",
    [
        "zone 1 0 9 255\nzone 2 9 0 255\n",
        "2 cents 1 1 1\nsky 9 0 0\n",
        "lane 1 9 9 255",
        "Highway 1 255 0 0\nRoute 66 0 255 0\n",
        "Highway 1 0 0 255\nRoute 66 0 255 0\n",
        "3 wheeler 200 3 4\n4 wheeler 1 2 3\n",
        "lane 1 #0000ff\nsign 2 #00ffff\n",
        "zone 1 255 0 0\nlane 2 0 255 0\n",
    ],
)
def test_names_may_have_numbers(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.txt").write_text(text)
    expected = tuple(line.rsplit(" ", 1 if "#" in line else 3)[0] for line in text.strip().split("\n"))
    assert read_palette(tmp_path / "p.txt").labels == expected


@pytest.mark.parametrize("divided", [True, False])
def test_colors_by_labels_a_file_or_vocs_map(tmp_path: Path, divided: bool) -> None:
    names = ["background", "a", "b"]
    for number in range(2):
        folder = tmp_path / ("val" if number else "train") if divided else tmp_path
        save(folder / "images" / f"{number}.png", photo(SIDE, SIDE))
        as_png(folder / "masks" / f"{number}.png", palette_image(np.full((SIDE, SIDE), number + 1)).convert("RGB"))

    def found(**more: Any) -> Any:
        part = open_data("colors", DataSource(str(tmp_path), **more), "train")
        return part.description.labels, class_map(part.items[0]).unique().tolist()

    number = 1 if divided else 2  # without splits, the first image is held out
    assert found(palette="voc", labels=tuple(names)) == (tuple(names), [number])
    assert found(palette="voc") == (VOC_CLASSES, [number])
    lines = [f"{name} {' '.join(map(str, voc_color(index)))}" for index, name in enumerate(names)]
    (tmp_path / "p.txt").write_text("\n".join(lines))
    assert found(palette=str(tmp_path / "p.txt")) == (tuple(names), [number])
    with pytest.raises(DatasetError, match="has no palette"):
        found()
    (tmp_path / "labels.txt").write_text("\n".join(lines))
    assert found() == (tuple(names), [number])
    assert voc_palette(names).classes[(128, 0, 0)] == 1

"""Objects as outlines: YOLO, COCO exported by other tools, and labelme, compared with pycocotools and Pillow."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageDraw
from pycocotools import mask as reference

from hf_faim2f.data import binary_masks, class_map, describe
from hf_faim2f.data.dataset import reader_of
from hf_faim2f.data.readers import labelme as labelme_reader
from hf_faim2f.data.readers.coco_export import load_coco
from hf_faim2f.data.readers.labelme import load_labelme
from hf_faim2f.data.readers.yolo import find_yaml, load_yolo
from hf_faim2f.errors import DatasetError

HEIGHT, WIDTH = 40, 60
TRIANGLE = [4.0, 4.0, 30.6, 8.2, 10.0, 33.0]
# A frame: along the outer outline, through a slit to the inner one, around it, and back.
FRAME = [[30, 10], [54, 10], [54, 34], [30, 34], [30, 10], [36, 16], [36, 28], [48, 28], [48, 16], [36, 16], [30, 10]]
SQUARE = [[2, 2], [12, 2], [12, 12], [2, 12]]


def by_pycocotools(polygons: list[list[float]]) -> np.ndarray:
    return reference.decode(reference.merge(reference.frPyObjects(polygons, HEIGHT, WIDTH))).astype(bool)


def photo(path: Path, size: tuple[int, int] = (HEIGHT, WIDTH), orientation: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path.name))).integers(0, 255, (*size, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)
    return path


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def line(number: int, corners: list[float], size: tuple[int, int] = (HEIGHT, WIDTH)) -> str:
    return " ".join([str(number), *(f"{v / (size[0] if k % 2 else size[1]):.7g}" for k, v in enumerate(corners))])


def flat(corners: list[list[int]]) -> list[float]:
    return [float(value) for corner in corners for value in corner]


# ---------------------------------------------------------------------------------------------------------------- YOLO


def yolo(root: Path, label: str = "labels/train/a.txt", image: str = "images/train/a.jpg", **changes: Any) -> Path:
    photo(root / image)
    write(root / label, "\n".join([line(3, TRIANGLE), line(0, flat(FRAME)), ""]))
    content = {"train": "images/train", "val": "images/train", "names": {0: "ring", 3: "sail", 7: "none"}, **changes}
    write(root / "data.yaml", content)  # JSON is valid YAML
    return root


def test_two_images_of_one_label_file(tmp_path: Path) -> None:
    root = yolo(tmp_path)
    (root / "images" / "train" / "a.png").write_bytes((root / "images" / "train" / "a.jpg").read_bytes())
    with pytest.raises(DatasetError, match=r"train/a\.png and a\.jpg share the labels a\.txt"):
        load_yolo(root)


def test_yolo_outlines_with_parts_and_gaps_in_the_ids(tmp_path: Path) -> None:
    data = load_yolo(yolo(tmp_path))
    description, item = describe(data), data[0]
    assert description.labels == ("ring", "sail", "none") and description.category_ids == (0, 3, 7)
    assert item["classes"].tolist() == [1, 0] and item["file_name"] == "images/train/a.jpg"
    masks = binary_masks(item).numpy()
    assert np.array_equal(masks[0], by_pycocotools([TRIANGLE]))
    ring = np.zeros((HEIGHT, WIDTH), dtype=bool)
    ring[10:34, 30:54] = True
    ring[16:28, 36:48] = False  # the hole is kept
    assert np.array_equal(masks[1], ring)
    semantic = load_yolo(tmp_path, "val", "semantic")[0]
    assert torch.equal(class_map(semantic), class_map(item)) and semantic["hidden"] is None


def test_pixels_without_an_object_are_the_background_in_any_case(tmp_path: Path) -> None:
    item = load_yolo(yolo(tmp_path, names={0: "ring", 3: "sail", 7: "Background"}), "val", "semantic")[0]
    assert item["classes"].tolist() == [0, 1, 2] and int((item["segments"] < 0).sum()) == 0


def test_overlapping_objects_keep_their_masks_and_the_smaller_is_on_top(tmp_path: Path) -> None:
    root = yolo(tmp_path)
    large, small = [2, 2, 50, 2, 50, 38, 2, 38], [10, 10, 20, 10, 20, 20, 10, 20]
    write(root / "labels/train/a.txt", f"{line(0, small)}\n{line(3, large)}\n{line(0, small)}\n")  # one is a duplicate
    item = load_yolo(root)[0]
    masks = binary_masks(item)
    assert item["classes"].tolist() == [0, 1] and masks.flatten(1).sum(1).tolist() == [100, 48 * 36]
    assert bool((item["segments"][10:20, 10:20] == 0).all())


@pytest.mark.parametrize(
    ("label", "image", "changes"),
    [
        ("train/labels/a.txt", "train/images/a.jpg", {"train": "../train/images"}),  # Roboflow's layout
        ("images/train/a.txt", "images/train/a.jpg", {}),  # next to the image
        ("pictures/a.txt", "pictures/a.jpg", {"train": "pictures"}),
        ("sub/labels/a.txt", "sub/images/a.jpg", {"path": "sub", "train": "images"}),
        ("labels/train/a.txt", "images/train/a.jpg", {"path": "/content/datasets/other"}),
        ("labels/train/a.txt", "images/train/a.jpg", {"train": "lists/train.txt"}),
        ("labels/train/a.txt", "images/train/a.jpg", {"train": "lists/cvat.txt"}),
        ("labels/train/a.txt", "images/train/a.jpg", {"train": "lists\\windows.txt"}),
        ("train/labels/a.txt", "train/images/a.jpg", {"train": "..\\train\\images"}),
        ("labels/train/a.txt", "images/train/a.jpg", {"train": ["images/train", "lists/train.txt"]}),
        ("labels/train/a.txt", "images/train/a.jpg", {"names": ["ring", "b", "c", "sail"], "nc": 4}),
    ],
)
def test_every_layout_of_ultralytics(tmp_path: Path, label: str, image: str, changes: dict[str, Any]) -> None:
    root = yolo(tmp_path / "data", label, image, **changes)
    write(root / "lists" / "train.txt", "./images/train/a.jpg\n")
    write(root / "lists" / "cvat.txt", "data/images/train/a.jpg\n")
    write(root / "lists" / "windows.txt", ".\\images\\train\\a.jpg\r\n")
    data = load_yolo(root)
    assert len(data) == 1 and len(data[0]["classes"]) == 2
    assert len(load_yolo(root / "data.yaml")) == 1


def test_label_studios_export_without_yaml(tmp_path: Path) -> None:
    for number in range(11):
        photo(tmp_path / "images" / f"{number:02}.jpg")
    write(tmp_path / "labels" / "00.txt", line(1, TRIANGLE))
    write(tmp_path / "classes.txt", "ring\nsail\n")
    parts = [load_yolo(tmp_path, part) for part in ("train", "val", "all")]
    assert [len(part) for part in parts] == [9, 2, 11]
    assert parts[1][0]["classes"].tolist() == [1] and not len(parts[1][1]["classes"])


BAD_LABELS = [
    ("0 0.5 0.5 0.2 0.2", "line 1 is a box .*export the data as segmentation labels"),
    ("0 0.5 0.5 0.2 0.2 0.9", "line 1 is a box"),
    ("0 0.1 0.1 0.9 0.1 0.9 0.9 0.5", "line 1 has 7 numbers after the class"),
    ("0 0.1", "line 1 has 1 numbers after the class"),
    ("\n5 0.1 0.1 0.9 0.1 0.9 0.9", "line 2 has the class '5'"),
    ("nan 0.1 0.1 0.9 0.1 0.9 0.9", "line 1 has the class 'nan'"),
    ("0 0.1 0.1 12.5 0.1 0.9 0.9", "has the coordinate 12.5: corners are fractions"),
    ("0 0.1 0.1 nan 0.1 0.9 0.9", "has the coordinate nan"),
    ("0 0.1 0.1 inf 0.1 0.9 0.9", "has the coordinate inf"),
    ("0 a b c d e f", "something other than numbers"),
]


@pytest.mark.parametrize(("text", "words"), BAD_LABELS)
def test_unusable_labels_are_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    data = load_yolo(yolo(tmp_path))
    write(tmp_path / "labels/train/a.txt", text)
    with pytest.raises(DatasetError, match=words):
        data[0]


BAD_YAML = [
    ({"names": None}, "does not name its classes"),
    ({"names": {0: "a", "x": "b"}}, "class id 'x'"),
    ({"names": [True, "b"]}, "name 'True' for class 0: write it in quotes"),
    ({"names": {0: "ring", 3: "sail", 7: "ring"}}, "the name 'ring' for the classes 0 and 7: rename one of them"),
    ({"names": ["ring", " ring"]}, "the name 'ring' for the classes 0 and 1: rename one of them"),
    ({"names": ["top  sail", "top sail"]}, "'top  sail' and 'top sail', which read the same: rename or merge them"),
    ({"names": ["a"], "nc": 2}, "says that there are 2 classes"),
    ({"kpt_shape": [17, 3]}, "describes keypoints"),
    ({"train": "../../outside"}, "lies outside"),
    ({"train": "/etc"}, "lies outside"),
    ({"train": "nowhere"}, "no folder and no list .*nowhere"),
    ({"train": None}, "no part 'train'"),
    ({"train": "lists/train.txt"}, "no file .*gone.jpg, which .*train.txt names"),
]


@pytest.mark.parametrize(("changes", "words"), BAD_YAML)
def test_an_unusable_yaml_is_one_sentence(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    root = yolo(tmp_path / "data", **changes)
    write(root / "lists" / "train.txt", "images/train/gone.jpg\n")
    with pytest.raises(DatasetError, match=words):
        load_yolo(root)


def test_aliases_are_refused_before_they_expand(tmp_path: Path) -> None:
    """Each line refers ten times to the one before, and a message would hold all of it."""
    lines = ["a: &a0 [x]", *(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 12))]
    path = write(yolo(tmp_path) / "data.yaml", "\n".join([*lines, "train: images/train", "names: [*a11]"]))
    with pytest.raises(DatasetError, match=f"{path} is not YAML: its aliases stand for a huge document"):
        load_yolo(tmp_path)
    path.write_text("train: &a [images/train, *a]\nnames: [x]\n")
    with pytest.raises(DatasetError, match=f"{path} is not YAML: its aliases stand for a huge document"):
        load_yolo(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &a [&b [x], *b, *a]\ntrain: images/train\nnames: [x]\n", "is not YAML: its aliases"),
        ("train: images/train\nnames: [x\nval: images/train\n", r"is not YAML \(line 3\)"),
        ('train: images/train\n"names": [M\xe4nner]\n', "UTF-8 text: line 2 is in another encoding"),
        ("name: [x\non: push\n", None),  # of another program
    ],
)
def test_an_unusable_yaml_of_another_name_is_not_passed_over(tmp_path: Path, text: str, words: str | None) -> None:
    root = yolo(tmp_path)
    (root / "data.yaml").unlink()
    write(root / "classes.txt", "ring\nsail\n")
    (root / "flowers.yaml").write_bytes(text.encode("latin-1"))
    if words is None:
        assert find_yaml(root) is None
        return
    for read in (find_yaml, load_yolo):
        with pytest.raises(DatasetError, match=f"flowers.yaml .*{words}"):
            read(root)


def test_harmless_aliases_are_read(tmp_path: Path) -> None:
    """`yaml.dump` writes one for each list that occurs twice."""
    root = yolo(tmp_path)
    expected = load_yolo(root)["image_id"]
    names = yaml.safe_load((root / "data.yaml").read_text())["names"]
    (root / "data.yaml").unlink()
    part = ["images/train"]
    text = yaml.dump({"train": part, "val": part, "names": names})
    assert "*id001" in text
    write(root / "dataset-1.yaml", text)
    assert load_yolo(root)["image_id"] == load_yolo(root, "val")["image_id"] == expected


def test_a_path_to_another_folder_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("hf_faim2f.data.readers.yolo.logger.warning_once", told.append)
    for path in (".", "../data", str(tmp_path / "data"), "/content/datasets/other"):
        assert len(load_yolo(yolo(tmp_path / "data", path=path))) == 1
    assert not told
    (tmp_path / "other").mkdir()
    for path in ("../other", str(tmp_path / "other")):
        assert len(load_yolo(yolo(tmp_path / "data", path=path))) == 1
        assert f"has the path {path!r}, which is outside of {tmp_path / 'data'} and not read" in told.pop()


def test_labels_without_an_image_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("hf_faim2f.data.readers.yolo.logger.warning_once", told.append)
    root = yolo(tmp_path)
    # Labels of a part given by a list, a class file, and labels without objects are no mistake.
    photo(root / "images" / "train" / "c.jpg")
    write(root / "labels" / "train" / "c.txt", line(3, TRIANGLE))
    write(root / "val.txt", "images/train/a.jpg\n")
    write(root / "labels" / "train" / "empty.txt", "")
    write(root / "labels" / "train" / "._a.txt", "of macOS")
    (root / "labels" / "train" / "broken.txt").symlink_to(tmp_path / "nothing")
    assert len(load_yolo(yolo(root, val="val.txt"), "val")) == 1 and not told
    # The image has another name than its labels, so it counts as an image without objects.
    (root / "images" / "train" / "c.jpg").rename(root / "images" / "train" / "c-1.jpg")
    assert len(load_yolo(root)) == 2
    assert told == [
        f"{root / 'labels' / 'train'} has a label file without an image of the same name in {root / 'images/train'}, "
        "such as c.txt: not used. (An image without a label file counts as one without objects.)"
    ]


def test_label_files_in_capitals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("hf_faim2f.data.readers.yolo.logger.warning_once", told.append)
    root = yolo(tmp_path, "labels/train/a.TXT")
    assert len(load_yolo(root)[0]["classes"]) == 2
    (root / "labels" / "train" / "a.TXT").rename(root / "images" / "train" / "a.TXT")
    write(root / "labels" / "train" / "b.TXT", line(3, TRIANGLE))
    assert len(load_yolo(root)[0]["classes"]) == 2 and "such as b.TXT: not used" in told[0]


def test_absolute_paths_through_a_link_to_the_folder(tmp_path: Path) -> None:
    root, link = yolo(tmp_path / "disk" / "data"), tmp_path / "home"
    link.symlink_to(root)
    for written in (link, root):
        write(root / "train.txt", f"{written}/images/train/a.jpg\n")
        for train in (f"{written}/images/train", f"{written}/train.txt", "train.txt"):
            assert len(load_yolo(yolo(link, train=train))) == 1
        assert len(load_yolo(yolo(link, path=f"{written}/images", train="train"))) == 1
    for outside in (tmp_path / "disk" / "other", f"{link}/../other", f"{link}2/images"):
        with pytest.raises(DatasetError, match="lies outside"):
            load_yolo(yolo(link, train=str(outside)))


BOX = [5.0, 5.0, 30.0, 5.0, 30.0, 20.0, 5.0, 20.0]
OBLIQUE = [5.0, 9.0, 30.0, 5.0, 33.0, 20.0, 8.0, 24.0]


@pytest.mark.parametrize("form", ["yolo", "coco"])
def test_objects_of_four_corners_may_be_boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    told: list[str] = []
    monkeypatch.setattr("hf_faim2f.data.readers.outlines.logger.warning_once", told.append)

    def load(*outlines: list[float]) -> Any:
        if form == "yolo":
            write(yolo(tmp_path) / "labels/train/a.txt", "\n".join(line(0, outline) for outline in outlines))
            return load_yolo(tmp_path)
        photo(tmp_path / "train" / "a.jpg")
        annotations = [
            {"id": k, "image_id": 7, "category_id": 1, "segmentation": [outline]} for k, outline in enumerate(outlines)
        ]
        write(tmp_path / "train" / "_annotations.coco.json", document(annotations=annotations))
        return load_coco(tmp_path)

    assert len(load(BOX, OBLIQUE, [*BOX, *BOX[:2]])[0]["classes"]) == 3
    assert len(told) == 1 and "has only polygons of four corners (inspected: 3)" in told.pop()
    load(BOX, TRIANGLE)
    load()
    assert not told


def test_labels_are_of_the_upright_image_unless_said(tmp_path: Path) -> None:
    root = yolo(tmp_path)
    photo(root / "images/train/a.jpg", orientation=6)  # 60x40 upright
    top = [0.0, 0.0, WIDTH, 0.0, WIDTH, 10.0, 0.0, 10.0]
    write(root / "labels/train/a.txt", line(0, top))
    upright = load_yolo(root)[0]
    assert bool(upright["segments"][:15].eq(0).all()) and int((upright["segments"] == 0).sum()) == 15 * HEIGHT
    stored = load_yolo(root, annotation_frame="stored")[0]
    expected = np.rot90(np.arange(HEIGHT)[:, None].repeat(WIDTH, 1) < 10, -1)
    assert np.array_equal(stored["segments"].numpy() == 0, expected)


def test_points_outside_are_remarked(tmp_path: Path) -> None:
    root = yolo(tmp_path)
    corners = [-0.009, 0.5, 0.5, 0.5, 0.5, 1.009]
    write(root / "labels/train/a.txt", "0 " + " ".join(map(str, corners)) + "\n0 0.5 0.5 0.5 0.5 0.5 0.5\n")
    photo(root / "images/train/a.jpg", (600, 600))
    data = load_yolo(root)
    found = reader_of(data).remarks(data.with_format(None)[0])
    assert [kind for kind, _ in found] == ["outside", "vanished"]


# ---------------------------------------------------------------------------------------------------------------- COCO


def document(file_name: str = "a.jpg", **more: Any) -> dict[str, Any]:
    run_lengths = reference.encode(np.asfortranarray(by_pycocotools([TRIANGLE]).astype(np.uint8)))
    return {
        "images": [{"id": 7, "file_name": file_name, "height": HEIGHT, "width": WIDTH}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 1, "segmentation": [flat(SQUARE), TRIANGLE], "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 2, "iscrowd": 1,
             "segmentation": {"size": [HEIGHT, WIDTH], "counts": run_lengths["counts"].decode()}},
        ],
        "categories": [{"id": 1, "name": "ring"}, {"id": 2, "name": "sail"}],
        **more,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("json_place", "image_place", "file_name"),
    [
        ("train/_annotations.coco.json", "train/a.jpg", "a.jpg"),  # Roboflow
        ("annotations/instances_train.json", "images/train/a.jpg", "a.jpg"),  # CVAT
        ("annotations/instances_train.json", "images/a.jpg", "a.jpg"),
        ("annotations/instances_train.json", "train/a.jpg", "a.jpg"),
        ("train.json", "images/a.jpg", "images\\a.jpg"),  # Label Studio on Windows
        ("train.json", "images/a.jpg", "upload/1/a.jpg"),
    ],
)
def test_exports_of_coco(tmp_path: Path, json_place: str, image_place: str, file_name: str) -> None:
    photo(tmp_path / image_place)
    write(tmp_path / json_place, document(file_name))
    (item,) = load_coco(tmp_path)
    masks = binary_masks(item).numpy()
    assert np.array_equal(masks[0], by_pycocotools([flat(SQUARE), TRIANGLE]))
    assert np.array_equal(masks[1], by_pycocotools([TRIANGLE])) and item["crowd"].tolist() == [False, True]
    with pytest.raises(DatasetError, match="no part 'val'"):
        load_coco(tmp_path, "val")


def test_any_json_with_its_images_somewhere(tmp_path: Path) -> None:
    photo(tmp_path / "elsewhere" / "a.jpg")
    path = write(tmp_path / "export.json", document())
    places = {"annotations": [path], "images": [tmp_path / "elsewhere"]}
    assert len(load_coco(None, "all", **places)) == 1
    assert len(load_coco(None, "val", annotations=[path, path], images=[tmp_path / "elsewhere"])) == 1
    with pytest.raises(DatasetError, match="one image that can be used: there is none left"):
        load_coco(None, "train", **places)
    with pytest.raises(DatasetError, match="no folder .*nowhere of images"):
        load_coco(None, "all", annotations=[path], images=[tmp_path / "nowhere"])
    with pytest.raises(DatasetError, match="lies outside"):
        load_coco(write(tmp_path / "bad.json", document("../elsewhere/a.jpg")), "all")


def test_names_are_read_without_the_spaces_around_them(tmp_path: Path) -> None:
    """They are in no table, so that two classes would look like one."""
    photo(tmp_path / "photos" / "a.jpg")
    path = write(tmp_path / "a.json", document(categories=[{"id": 1, "name": " ring\t"}, {"id": 2, "name": "sail"}]))
    data = load_coco(None, "all", annotations=[path], images=[tmp_path / "photos"])
    assert describe(data).labels == ("ring", "sail")
    write(path, document(categories=[{"id": 1, "name": "sail"}, {"id": 2, "name": "sail "}]))
    with pytest.raises(DatasetError, match="the class name 'sail' for the categories 1 and 2: rename one of them"):
        load_coco(None, "all", annotations=[path], images=[tmp_path / "photos"])
    write(path, document(categories=[{"id": 1, "name": "ring"}, {"id": 2, "name": " "}]))
    with pytest.raises(DatasetError, match="has a category without a whole number as id and a name"):
        load_coco(None, "all", annotations=[path], images=[tmp_path / "photos"])
    assert describe(load_yolo(yolo(tmp_path / "yolo", names=["ring ", "sail"]))).labels == ("ring", "sail")


def test_a_box_without_outline_is_refused(tmp_path: Path) -> None:
    photo(tmp_path / "train" / "a.jpg")
    boxes = [{"id": 1, "image_id": 7, "category_id": 1, "segmentation": [], "bbox": [1, 2, 3, 4]}]
    write(tmp_path / "train" / "_annotations.coco.json", document(annotations=boxes))
    with pytest.raises(DatasetError, match="annotation 1 has a box but no segmentation"):
        load_coco(tmp_path)


def test_several_files_of_unknown_parts_are_ambiguous(tmp_path: Path) -> None:
    photo(tmp_path / "images" / "a.jpg")
    for name in ("one.json", "two.json"):
        write(tmp_path / name, document())
    with pytest.raises(DatasetError, match="several annotation files .*choose one with --annotations"):
        load_coco(tmp_path)


# ------------------------------------------------------------------------------------------------------------- labelme


def shape(label: str, points: list[Any], kind: str = "polygon", group: Any = None, **more: Any) -> dict[str, Any]:
    return {"label": label, "points": points, "shape_type": kind, "group_id": group, "flags": {}, **more}


def labelme(path: Path, shapes: list[dict[str, Any]], **changes: Any) -> Path:
    if "imageData" not in changes:
        photo(path.with_suffix(".jpg"))
    content = {"version": "5.5.0", "shapes": shapes, "imagePath": f"{path.stem}.jpg", "imageData": None,
               "imageHeight": HEIGHT, "imageWidth": WIDTH, **changes}  # fmt: skip
    return write(path, content)


def test_labelmes_shapes(tmp_path: Path) -> None:
    file = io.BytesIO()
    bits = np.random.default_rng(0).random((5, 7)) < 0.5
    Image.fromarray(bits).save(file, "PNG")
    mask = base64.b64encode(file.getvalue()).decode()
    shapes = [
        shape("sail", [[4, 4], [30.6, 8.2], [10, 33]]),
        shape("ring", [[30, 20], [38, 20]], "circle"),
        shape("ring", [[50, 30], [45, 35]], "rectangle"),
        shape("mask", [[50, 2], [56, 6]], "mask", mask=mask),
        shape("sail", [[1, 1], [2, 2]], "line"),
        shape("sail", SQUARE, group=4),
        shape("sail", [[52, 12], [58, 12], [58, 18], [52, 18]], group=4),
        shape("__ignore__", SQUARE),
    ]
    labelme(tmp_path / "train" / "a.json", shapes)
    data = load_labelme(tmp_path)
    assert describe(data).labels == ("__ignore__", "mask", "ring", "sail")[1:]
    (item,) = data
    masks = binary_masks(item).numpy()
    assert item["classes"].tolist() == [2, 1, 1, 0, 2] and item["file_name"] == "train/a.jpg"
    assert np.array_equal(masks[0], by_pycocotools([TRIANGLE]))
    drawn = Image.new("1", (WIDTH, HEIGHT))
    ImageDraw.Draw(drawn).ellipse([22, 12, 37, 27], fill=1)  # like labelme, without the last row and column
    assert (masks[1] ^ np.array(drawn)).sum() <= 12 and abs(int(masks[1].sum()) - np.pi * 64) < 8
    assert masks[2].sum() == 25 and masks[2][30:35, 45:50].all()
    assert np.array_equal(masks[3][2:7, 50:57], bits) and masks[3].sum() == bits.sum()
    assert masks[4].sum() == 136 and masks[4][2:12, 2:12].all() and masks[4][12:18, 52:58].all()


def test_labelmes_painting_order_and_background(tmp_path: Path) -> None:
    """Later shapes are on top, as in labelme's own exporter (`labelme_export_voc`), regardless of size."""
    small, large = [[4, 4], [8, 4], [8, 8], [4, 8]], SQUARE
    labelme(tmp_path / "val" / "a.json", [shape("sail", small), shape("ring", large), shape("__ignore__", small)])
    write(tmp_path / "labels.txt", "__ignore__\n_background_\nring\nsail\n")
    item = load_labelme(tmp_path, "val", "semantic")[0]
    expected = Image.new("L", (WIDTH, HEIGHT))
    for corners, value in ((small, 2), (large, 1), (small, 255)):
        (left, top), (right, bottom) = corners[0], corners[2]
        ImageDraw.Draw(expected).rectangle([left, top, right - 1, bottom - 1], fill=value)
    truth = torch.from_numpy(np.array(expected)).long()
    assert torch.equal(class_map(item), torch.where(truth == 255, -1, truth))
    instance = load_labelme(tmp_path, "val")[0]
    assert instance["classes"].tolist() == [1, 0] and binary_masks(instance)[0].sum() == 16


def test_labels_of_points_and_lines_are_no_classes(tmp_path: Path) -> None:
    lines = [shape("pin", [[1, 1]], "point"), shape("road", [[0, 0], [9, 9]], "line"), shape("ring", SQUARE)]
    labelme(tmp_path / "a.json", lines)
    labelme(tmp_path / "b.json", [shape(" ring ", SQUARE)])
    assert describe(load_labelme(tmp_path, "all")).labels == ("ring",)


def test_points_and_lines_are_left_out_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scratch that is drawn as a line would otherwise become background without a word."""
    said: list[str] = []
    monkeypatch.setattr(labelme_reader.logger, "warning_once", said.append)
    strip = shape("scratch", [[0, 0], [9, 9]], "linestrip")
    labelme(tmp_path / "train" / "a.json", [shape("scratch", SQUARE), shape("pin", [[1, 1]], "point"), strip, strip])
    labelme(tmp_path / "val" / "b.json", [shape("scratch", SQUARE)])
    assert len(load_labelme(tmp_path, "train")[0]["classes"]) == 1
    assert len(said) == 1 and "left out (2 of scratch, 1 of pin)" in said[0]
    load_labelme(tmp_path, "val")
    assert len(said) == 1


@pytest.mark.parametrize("names", [("train", "val"), ("json/train", "json/val"), ("a/Training", "b/valid")])
def test_labelmes_parts_in_inner_folders_are_not_mixed(tmp_path: Path, names: tuple[str, str]) -> None:
    for name, count in zip(names, (3, 2), strict=True):
        for number in range(count):
            labelme(tmp_path / name / f"{number}.json", [shape("ring", SQUARE)])
    for part, name, count in zip(("train", "val"), names, (3, 2), strict=True):
        assert [item["image_id"] for item in load_labelme(tmp_path, part)] == [f"{name}/{k}" for k in range(count)]


def test_images_without_a_json_file_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each folder; not an image inside a JSON file, nor one that a file of another name or part names."""
    said: list[str] = []
    monkeypatch.setattr(labelme_reader.logger, "warning_once", said.append)
    inside = base64.b64encode(photo(tmp_path / "other" / "c.jpg").read_bytes()).decode()
    flat_root = tmp_path / "flat"
    labelme(flat_root / "a.json", [shape("ring", SQUARE)])
    labelme(flat_root / "b.json", [shape("ring", SQUARE)], imageData=inside)
    labelme(flat_root / "1.json", [shape("ring", SQUARE)], imagePath="pictures/d.jpg")
    photo(flat_root / "pictures" / "d.jpg")
    (flat_root / "1.jpg").unlink()
    photo(flat_root / "elsewhere" / "e.jpg")
    load_labelme(flat_root, "all")
    assert not said
    for name in ("new.jpg", "newer.PNG", "pictures/x.jpg"):
        photo(flat_root / name)
    load_labelme(flat_root, "train")
    (warning,) = said
    assert "has 3 images without a JSON file, such as new.jpg: not read" in warning

    said.clear()
    divided = tmp_path / "divided"
    for part in ("train", "val"):
        labelme(divided / "json" / part / f"{part}.json", [shape("ring", SQUARE)], imagePath=f"../../all/{part}.jpg")
        (divided / "json" / part / f"{part}.jpg").unlink()
        photo(divided / "all" / f"{part}.jpg")
    (divided / "labels.txt").write_text("ring\n")  # so that the files of other parts are not opened
    load_labelme(divided, "train")
    assert not said
    photo(divided / "all" / "spare.jpg")
    photo(divided / "json" / "train" / "val.jpg")  # val.json is of another folder
    load_labelme(divided, "train")
    assert "has 2 images without a JSON file, such as all/spare.jpg" in said[0]


def test_an_image_path_of_another_image(tmp_path: Path) -> None:
    """Renumbered files keep the old name inside, which may now belong to the next image."""
    labelme(tmp_path / "1.json", [shape("ring", SQUARE)])
    labelme(tmp_path / "2.json", [shape("ring", SQUARE)], imagePath="1.jpg")
    with pytest.raises(DatasetError, match="2.json has the imagePath '1.jpg', which is another image than 2.jpg"):
        load_labelme(tmp_path, "all")
    (tmp_path / "2.jpg").unlink()
    (tmp_path / "1.json").unlink()
    assert len(load_labelme(tmp_path, "all")) == 1


def test_two_files_of_one_image(tmp_path: Path) -> None:
    """Each would teach the objects of the other as background."""
    labelme(tmp_path / "a-old.json", [shape("ring", SQUARE)], imagePath="a.jpg")
    (tmp_path / "a-old.jpg").unlink()
    labelme(tmp_path / "a.json", [shape("ring", SQUARE)])
    words = r"a\.json and a-old\.json are of the same image a\.jpg: remove one of them"
    with pytest.raises(DatasetError, match=words):
        load_labelme(tmp_path, "all")
    assert len(load_labelme(tmp_path, "all", skip_bad=True)) == 1
    photo(tmp_path / "train" / "b.jpg")
    entries = [{"id": k, "file_name": "b.jpg", "height": HEIGHT, "width": WIDTH} for k in (7, 8)]
    write(tmp_path / "train" / "_annotations.coco.json", document(images=entries))
    with pytest.raises(DatasetError, match=r"has the images 7 and 8 of the same file b\.jpg: give all"):
        load_coco(tmp_path)


def test_suffixes_in_capitals(tmp_path: Path) -> None:
    labelme(tmp_path / "a.json", [shape("ring", SQUARE)], imagePath="C:\\photos\\elsewhere.jpg")
    (tmp_path / "a.jpg").rename(tmp_path / "a.JPG")
    assert load_labelme(tmp_path, "all")[0]["image"].shape[1:] == (HEIGHT, WIDTH)
    photo(tmp_path / "elsewhere.jpg")
    with pytest.raises(DatasetError, match="which is another image than a.JPG beside it"):
        load_labelme(tmp_path, "all")
    with pytest.raises(DatasetError, match="has no image that could be used. .*which is another image than a.JPG"):
        load_labelme(tmp_path, "all", skip_bad=True)


def test_a_mask_alone_is_not_decoded_when_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    Image.fromarray(np.ones((5, 7), dtype=bool)).save(file, "PNG")
    mask = base64.b64encode(file.getvalue()).decode()
    labelme(tmp_path / "a.json", [shape("ring", [[50, 2], [56, 6]], "mask", mask=mask)])
    monkeypatch.delattr("hf_faim2f.data.readers.labelme.decode_run_lengths")
    (item,) = load_labelme(tmp_path, "all")
    assert bool((item["segments"][2:7, 50:57] == 0).all()) and int((item["segments"] == 0).sum()) == 35


def test_an_image_inside_the_json(tmp_path: Path) -> None:
    file = io.BytesIO()
    pixels = np.random.default_rng(1).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    labelme(tmp_path / "a.json", [shape("ring", SQUARE)], imageData=data, imageHeight=None, imageWidth=None)
    item = load_labelme(tmp_path, "all")[0]
    assert torch.equal(item["image"], torch.from_numpy(pixels).permute(2, 0, 1)) and len(item["classes"]) == 1


@pytest.mark.parametrize(
    ("shapes", "changes", "words"),
    [
        ([shape("ring", [[1, 1], [2, 2]])], {}, "shape 0 is a polygon of 2 points"),
        ([shape("ring", [[1, 1], [float("nan"), 2], [3, 3]])], {}, "shape 0 has no list of points"),
        ([shape("ring", [[1, 1], [10**400, 2], [3, 3]])], {}, "shape 0 has no list of points"),
        ([shape("ring", [[1, 1], [1e9, 2], [3, 3]])], {}, "far outside of the image"),
        ([shape("ring", SQUARE, "star")], {}, "shape_type 'star'"),
        ([shape("ring", [[0, 0], [99, 3]], "mask", mask="")], {}, "far outside|without two points"),
        ([shape("ring", SQUARE, group=[1])], {}, "group_id that is not a number"),
        ([shape(" ", SQUARE)], {}, "each with a label"),
        (
            [shape("ring", SQUARE)],
            {"imageHeight": 200_000, "imageWidth": 200_000},
            "has the size 200000x200000, more than",
        ),
        ([shape("ring", SQUARE)], {"imageHeight": -3}, "imageHeight and imageWidth -3"),
        ([shape("ring", SQUARE)], {"imagePath": "../../secret.png", "imageData": None}, None),
    ],
)
def test_unusable_files_of_labelme(tmp_path: Path, shapes: Any, changes: dict[str, Any], words: str | None) -> None:
    labelme(tmp_path / "data" / "a.json", shapes, **changes)
    photo(tmp_path.parent / "secret.png")
    with pytest.raises(DatasetError, match=words or "a.json has no image"):
        load_labelme(tmp_path / "data", "all")

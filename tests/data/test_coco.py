"""COCO's instance and panoptic files, compared with the decoding of pycocotools and faster-coco-eval."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faster_coco_eval import COCO
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as official

from hf_faim2f.data import (
    DatasetError,
    binary_masks,
    class_map,
    describe,
    find_bad_items,
    load_coco_instance,
    load_coco_panoptic,
    without_bad_items,
)
from hf_faim2f.data.readers.coco_export import load_coco
from hf_faim2f.masks import decode_run_lengths, to_run_lengths
from tests.support.image_files import photo, save, truncate

HEIGHT, WIDTH = 20, 30
CATEGORIES = [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 13, "name": "stop sign"}]


def box(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def counts(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed run lengths, computed pixel by pixel."""
    runs, value = [0], 0
    for pixel in mask.ravel(order="F"):
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


def compressed(mask: np.ndarray) -> dict[str, Any]:
    encoded = official.encode(np.asfortranarray(mask))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}


TIE, PERSON, CROWD = box(8, 12, 11, 14), box(2, 10, 18, 20), box(0, 0, 20, 15)


def instances() -> dict[str, Any]:
    """An image with a person, a tie and a crowd behind them; one with polygons; one without annotations."""
    size = {"height": HEIGHT, "width": WIDTH}
    polygons = [[2.5, 1.0, 12.2, 3.1, 9.0, 15.7], [20, 5, 28, 5, 28, 12, 20, 12]]
    return {
        "images": [{"id": 139, "file_name": "000000000139.jpg", **size}, {"id": 7, "file_name": "7.jpg", **size},
                   {"id": 8, "file_name": "8.jpg", **size}],
        "categories": CATEGORIES,
        "annotations": [
            {"id": 1, "image_id": 139, "category_id": 90, "area": 6.0, "iscrowd": 0, "segmentation": compressed(TIE)},
            {"id": 2, "image_id": 139, "category_id": 1, "area": 155.5, "iscrowd": 0,
             "segmentation": {"size": [HEIGHT, WIDTH], "counts": counts(PERSON)}},
            {"id": 3, "image_id": 139, "category_id": 1, "area": 300.0, "iscrowd": 1,
             "segmentation": {"size": [HEIGHT, WIDTH], "counts": counts(CROWD)}},
            {"id": 4, "image_id": 7, "category_id": 13, "area": 70.0, "iscrowd": 0, "segmentation": polygons},
            {"id": 5, "image_id": 7, "category_id": 1, "area": 0.01, "iscrowd": 0,
             "segmentation": [[3.1, 3.1, 3.2, 3.1, 3.2, 3.2]]},
        ],
    }  # fmt: skip


def write(root: Path, document: Any, name: str = "instances_val2017.json") -> Path:
    path = root / "annotations" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return path


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    document = instances()
    for number, entry in enumerate(document["images"]):
        save(tmp_path / "val2017" / entry["file_name"], photo(HEIGHT, WIDTH, number))
    write(tmp_path, document)
    return tmp_path


def test_instances(coco: Path) -> None:
    dataset = load_coco_instance(coco)
    assert [item["image_id"] for item in dataset] == [139, 7, 8]
    item = dataset[0]
    assert item["file_name"] == "000000000139.jpg" and (item["height"], item["width"]) == (HEIGHT, WIDTH)
    assert item["classes"].tolist() == [2, 0, 0]  # 1, 13 and 90 are classes 0, 1 and 2
    assert item["crowd"].tolist() == [False, False, True]
    assert item["areas"].tolist() == [6.0, 155.5, 300.0]
    np.testing.assert_array_equal(binary_masks(item).numpy(), np.stack([TIE, PERSON, CROWD]))
    # The tie is on top of the person, and both are on top of the crowd, although the crowd comes last.
    top = np.where(TIE, 0, np.where(PERSON, 1, np.where(CROWD, 2, -1)))
    np.testing.assert_array_equal(item["segments"].numpy(), top)
    empty = dataset[2]
    assert empty["classes"].shape == (0,) and (empty["segments"] == -1).all() and empty["hidden"] is None
    description = describe(dataset)
    assert description.labels == ("person", "stop sign", "toothbrush") and description.task == "instance"
    assert description.things == frozenset({0, 1, 2})


def test_masks_are_those_of_both_official_tools(coco: Path) -> None:
    """Compared with pycocotools for single segmentations, and with faster-coco-eval for the whole file."""
    document = instances()
    tool = COCO(str(coco / "annotations" / "instances_val2017.json"))
    for item in load_coco_instance(coco):
        annotations = [a for a in document["annotations"] if a["image_id"] == item["image_id"]]
        for mask, annotation in zip(binary_masks(item).numpy(), annotations, strict=True):
            np.testing.assert_array_equal(mask, tool.annToMask(annotation))
            segmentation = annotation["segmentation"]
            if isinstance(segmentation, list):
                runs = official.merge(official.frPyObjects(segmentation, HEIGHT, WIDTH))
            elif isinstance(segmentation["counts"], list):
                runs = official.frPyObjects(segmentation, HEIGHT, WIDTH)
            else:
                runs = segmentation
            np.testing.assert_array_equal(mask, official.decode(runs))
    small = load_coco_instance(coco)[1]
    assert len(small["classes"]) == 2 and not binary_masks(small)[1].any()  # a polygon without pixels is kept


def test_ids_of_coco_become_0_to_79(tmp_path: Path) -> None:
    """The official ids are 1..90 without these ten."""
    ids = sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
    document = {
        "images": [{"id": 1, "file_name": "1.png", "height": HEIGHT, "width": WIDTH}],
        "categories": [{"id": number, "name": str(number)} for number in ids[::-1]],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": n, "segmentation": compressed(box(0, 0, 1, 1))} for n in (1, 13, 90)
        ],
    }
    save(tmp_path / "val2017" / "1.png", photo(HEIGHT, WIDTH))
    write(tmp_path, document)
    item = load_coco_instance(tmp_path)[0]
    assert item["classes"].tolist() == [0, 11, 79] and item["areas"] is None


def test_crowds_have_a_class_in_semantic_data(coco: Path) -> None:
    source = {"annotations": [coco / "annotations" / "instances_val2017.json"], "images": [coco / "val2017"]}
    instance, semantic = (load_coco(None, "all", task, **source)[0] for task in ("instance", "semantic"))
    assert bool(instance["crowd"].any()) and not bool(semantic["crowd"].any())
    assert torch.equal(class_map(semantic), class_map(instance))


def test_empty_images_can_be_left_out(coco: Path) -> None:
    assert [item["image_id"] for item in load_coco_instance(coco, keep_empty=False)] == [139, 7]
    document = instances()
    document["annotations"] = [a for a in document["annotations"] if a["iscrowd"] or a["image_id"] == 7]
    write(coco, document)
    assert [item["image_id"] for item in load_coco_instance(coco, keep_empty=False)] == [7]
    assert len(load_coco_instance(coco)) == 3


def test_other_places_and_text_ids(coco: Path) -> None:
    document = instances()
    for entry in document["images"]:
        entry["id"] = f"id-{entry['id']}"
        entry["file_name"] = f"val2017/{entry['file_name']}"
    document["annotations"] = []
    write(coco, document, "mine.json")
    dataset = load_coco_instance(coco, annotation_file="annotations/mine.json", image_folder=".")
    assert [item["image_id"] for item in dataset] == ["id-139", "id-7", "id-8"]
    assert dataset[0]["file_name"] == "val2017/000000000139.jpg"


Change = Callable[[dict[str, Any]], Any]
WRONG: dict[str, tuple[Change, str]] = {
    "not COCO": (lambda d: d.pop("images"), r"is not COCO's JSON: it must have the lists images"),
    "entry is no object": (lambda d: d["images"].append(5), r"is not COCO's JSON: every entry"),
    "no categories": (lambda d: d["categories"].clear(), "has no categories"),
    "category twice": (lambda d: d["categories"].append(d["categories"][0]), "two categories with one id"),
    "name twice": (
        lambda d: d["categories"][0].update(name="person"),
        "the class name 'person' for the categories 1 and 90: rename one of them",
    ),
    "category without name": (lambda d: d["categories"][0].pop("name"), "a category without"),
    "image without id": (lambda d: d["images"][0].pop("id"), "an image with the id None"),
    "image without size": (lambda d: d["images"][0].pop("height"), "no height and width for image 139"),
    "impossible width": (lambda d: d["images"][0].update(width=2**31), "impossible size for image 139"),
    "enormous size": (
        lambda d: d["images"][0].update(width=3 * 10**7, height=3 * 10**7),
        "image 139 has the size 30000000x30000000, more",
    ),
    "id beyond 64 bits": (lambda d: d["images"][0].update(id=2**64), "an image id of more than 64 bits"),
    "half a character as id": (lambda d: d["images"][0].update(id="\ud800"), "an image id that is not valid Unicode"),
    "image twice": (lambda d: d["images"].append(d["images"][0]), "two images with the id 139"),
    "ids of two kinds": (lambda d: d["images"][2].update(id="x"), "numbers and others that are text"),
    "file missing": (lambda d: d["images"][0].update(file_name="nowhere.jpg"), "There is no file .*nowhere.jpg"),
    "file outside": (lambda d: d["images"][0].update(file_name="../../x.jpg"), "lies outside of"),
    "absolute file": (lambda d: d["images"][0].update(file_name="/x.jpg"), "lies outside of"),
    "unknown image": (lambda d: d["annotations"][0].update(image_id=5), "annotation 1 is of image 5"),
    "image id is a list": (lambda d: d["annotations"][0].update(image_id=[1]), "annotation 1 is of image"),
    "unknown category": (lambda d: d["annotations"][1].update(category_id=2), "annotation 2 has the category id 2"),
    "category is a list": (lambda d: d["annotations"][1].update(category_id=[1]), "annotation 2 has the category id"),
    "no segmentation": (lambda d: d["annotations"][3].pop("segmentation"), "annotation 4 has no segmentation"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_files_are_named(coco: Path, kind: str) -> None:
    change, message = WRONG[kind]
    document = copy.deepcopy(instances())
    change(document)
    path = write(coco, document)
    with pytest.raises(DatasetError, match=message) as caught:
        load_coco_instance(coco)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", ["[1, 2]", "3", "{}", "{"])
def test_json_that_is_not_coco(coco: Path, content: str) -> None:
    path = coco / "annotations" / "instances_val2017.json"
    path.write_text(content)
    with pytest.raises(DatasetError, match=rf"{path} is not (COCO's )?JSON"):
        load_coco_instance(coco, skip_bad=True)
    path.unlink()
    with pytest.raises(DatasetError, match=rf"{path} cannot be read"):
        load_coco_instance(coco)


@pytest.mark.parametrize(
    ("kind", "left"),
    [("file missing", [7, 8]), ("file outside", [7, 8]), ("unknown image", [139, 7, 8]), ("unknown category", [7, 8]),
     ("no segmentation", [139, 8]), ("image twice", [7, 8]), ("image without size", [7, 8])],
)  # fmt: skip
def test_skipping_leaves_out_the_image_and_tells(coco: Path, kind: str, left: list[int]) -> None:
    change, message = WRONG[kind]
    document = copy.deepcopy(instances())
    change(document)
    write(coco, document)
    dataset = load_coco_instance(coco, skip_bad=True)
    assert [item["image_id"] for item in dataset] == left
    (skipped,) = describe(dataset).skipped
    assert re.search(message, skipped)


FAR = [[0, 0, 10, 0, 10, 10]]
BAD_SEGMENTATIONS = {
    "size of another image": ({"size": [HEIGHT + 1, WIDTH], "counts": counts(TIE)}, "are for .21, 30. pixels"),
    "enormous size": ({"size": [10**6, 10**6], "counts": [10**12]}, "are for .1000000, 1000000. pixels"),
    "no size": ({"counts": counts(TIE)}, "are for None pixels"),
    "too few": ({"size": [HEIGHT, WIDTH], "counts": [5, 5]}, "add up to 10, but the image has 600"),
    "too many": ({"size": [HEIGHT, WIDTH], "counts": [5, 10**15]}, "add up to"),
    "negative": ({"size": [HEIGHT, WIDTH], "counts": [-5, 605]}, "neither a string nor a list of whole numbers"),
    "fractions": ({"size": [HEIGHT, WIDTH], "counts": [300.0, 300.0]}, "neither a string nor a list"),
    "truncated": ({"size": [HEIGHT, WIDTH], "counts": compressed(TIE)["counts"][:2]}, "add up to 248, but the image"),
    "garbage": ({"size": [HEIGHT, WIDTH], "counts": "~~~~~"}, "run lengths are damaged"),
    "not ASCII": ({"size": [HEIGHT, WIDTH], "counts": "ä"}, "not ASCII"),
    "no polygon": ([], "neither a list of polygons nor run lengths"),
    "two points": ([[1, 1, 2, 2]], "is not a list of three or more"),
    "odd": ([[1, 1, 2, 2, 3, 3, 4]], "is not a list of three or more"),
    "flat": ([1, 1, 2, 2, 3, 3], "is not a list of three or more"),
    "text": ([["1", "1", "2", "2", "3", "3"]], "has '1' for a coordinate"),
    "infinite": ([[0, 0, float("inf"), 0, 10, 10]], "has inf for a coordinate"),
    "no number": ([[0, 0, float("nan"), 0, 10, 10]], "has nan for a coordinate"),
    "beyond floats": ([[0, 0, 10**400, 0, 10, 10]], "has 10{39} for a coordinate"),
    "far outside": ([[0, 0, 1e12, 0, 10, 10]], "far outside of the image"),
}


@pytest.mark.parametrize("kind", BAD_SEGMENTATIONS)
def test_bad_segmentation_names_file_and_annotation(coco: Path, kind: str) -> None:
    segmentation, message = BAD_SEGMENTATIONS[kind]
    document = instances()
    document["annotations"][1]["segmentation"] = segmentation
    path = write(coco, document)
    dataset = load_coco_instance(coco)
    with pytest.raises(DatasetError, match=rf"^{path}: annotation 2: .*{message}"):
        dataset[0]
    good, bad = without_bad_items(dataset)
    assert [item["image_id"] for item in good] == [7, 8] and [entry.index for entry in bad] == [0]


def test_numbers_beyond_floats_are_no_areas_and_no_boxes(coco: Path) -> None:
    document = instances()
    document["annotations"][1].update(area=10**400, bbox=[0, 0, 10**400, 1])
    write(coco, document)
    assert load_coco_instance(coco)[0]["areas"] is None


def test_polygons_may_slip_over_the_edge() -> None:
    runs = to_run_lengths([[-3.0, -2.0, WIDTH + 4.0, -2.0, WIDTH + 4.0, 5.0, -3.0, 5.0]], HEIGHT, WIDTH)
    np.testing.assert_array_equal(decode_run_lengths(runs), box(0, 0, 5, WIDTH))


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(min_codepoint=1, max_codepoint=127), max_size=40))
def test_any_text_as_run_lengths_is_a_mask_of_the_image_or_an_error(text: str) -> None:
    run_lengths = {"size": [HEIGHT, WIDTH], "counts": text}
    try:
        mask = decode_run_lengths(to_run_lengths(run_lengths, HEIGHT, WIDTH))
    except ValueError:
        return
    np.testing.assert_array_equal(mask, official.decode(run_lengths))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 30), st.integers(0, 20), st.integers(0, 30)), max_size=6),
    st.floats(0, 1),
    st.integers(0, 9),
)
def test_the_official_run_lengths_are_their_mask(boxes: list[tuple[int, ...]], noise: float, seed: int) -> None:
    """Boxes with noise, for short and long runs, which the compression stores as differences."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    for corners in boxes:
        mask |= box(*corners)
    mask ^= (np.random.default_rng(seed).random(mask.shape) < noise**4).astype(np.uint8)
    for segmentation in (compressed(mask), {"size": [HEIGHT, WIDTH], "counts": counts(mask)}):
        found = decode_run_lengths(to_run_lengths(segmentation, HEIGHT, WIDTH))
        assert found.dtype == np.bool_
        np.testing.assert_array_equal(found, official.decode(compressed(mask)))


def test_a_pile_of_full_masks_is_refused(coco: Path) -> None:
    document = instances()
    full = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}
    pile = {"image_id": 8, "category_id": 1, "area": 600, "iscrowd": 0, "segmentation": full}
    document["annotations"] += [{"id": 100 + k, **pile} for k in range(70)]
    path = write(coco, document)
    with pytest.raises(DatasetError, match=f"{path}: image 8: more than 65 segments"):
        load_coco_instance(coco)[2]


def test_image_of_another_size_or_truncated_is_named(coco: Path) -> None:
    save(coco / "val2017" / "7.jpg", photo(HEIGHT, WIDTH + 1))
    truncate(coco / "val2017" / "8.jpg")
    dataset = load_coco_instance(coco)
    with pytest.raises(DatasetError, match=r"7\.jpg is 20x31 pixels, but .*instances_val2017.json says 20x30"):
        dataset[1]
    with pytest.raises(DatasetError, match=r"8\.jpg"):
        dataset[2]


# Panoptic


SEGMENT_IDS = np.repeat(np.repeat([[0, 5, 5], [300, 70000, 16777215]], 3, 0), 4, 1)
PANOPTIC_CATEGORIES = [
    {"id": 200, "name": "rug", "isthing": 0},
    {"id": 1, "name": "person", "isthing": 1},
    {"id": 92, "name": "banner", "isthing": 0},
]


def panoptic() -> dict[str, Any]:
    segments = [
        {"id": 70000, "category_id": 1, "iscrowd": 0, "area": 12},
        {"id": 5, "category_id": 200, "iscrowd": 0, "area": 24},
        {"id": 300, "category_id": 1, "iscrowd": 1, "area": 12},
        {"id": 16777215, "category_id": 92, "iscrowd": 0, "area": 12},
    ]
    return {
        "images": [{"id": 139, "file_name": "139.jpg", "height": 6, "width": 12}],
        "categories": PANOPTIC_CATEGORIES,
        "annotations": [{"image_id": 139, "file_name": "139.png", "segments_info": segments}],
    }


def write_panoptic(root: Path, document: dict[str, Any], ids: np.ndarray = SEGMENT_IDS) -> Path:
    save(root / "val2017" / "139.jpg", photo(6, 12))
    colors = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    save(root / "annotations" / "panoptic_val2017" / "139.png", colors)
    return write(root, document, "panoptic_val2017.json")


def test_panoptic(tmp_path: Path) -> None:
    write_panoptic(tmp_path, panoptic())
    dataset = load_coco_panoptic(tmp_path)
    item = dataset[0]
    assert item["classes"].tolist() == [0, 2, 0, 1] and item["crowd"].tolist() == [False, False, True, False]
    assert item["areas"].tolist() == [12, 24, 12, 12] and item["hidden"] is None and item["image_id"] == 139
    for number, segment_id in enumerate([70000, 5, 300, 16777215]):
        np.testing.assert_array_equal(item["segments"].numpy() == number, segment_id == SEGMENT_IDS)
    assert class_map(item)[0].tolist() == [-1] * 4 + [2] * 8
    description = describe(dataset)
    assert description.labels == ("person", "banner", "rug") and description.things == frozenset({0})
    assert description.task == "panoptic"
    other = tmp_path / "elsewhere"
    (tmp_path / "annotations" / "panoptic_val2017").rename(other)
    assert torch.equal(load_coco_panoptic(tmp_path, map_folder="elsewhere")[0]["segments"], item["segments"])


WRONG_PANOPTIC: dict[str, tuple[Change, str]] = {
    "instance file": (lambda d: d["annotations"][0].pop("segments_info"), "no list segments_info"),
    "instance categories": (lambda d: d["categories"][0].pop("isthing"), "with isthing whether category rug"),
    "outside": (lambda d: d["annotations"][0].update(file_name="../139.png"), "lies outside of"),
    "no name": (lambda d: d["annotations"][0].pop("file_name"), "names None as a file"),
    "missing": (lambda d: d["annotations"][0].update(file_name="140.png"), "There is no file .*140.png"),
    "no annotation": (lambda d: d["annotations"].clear(), "has no annotation of image 139"),
    "annotated twice": (lambda d: d["annotations"].append(d["annotations"][0]), "is a second annotation of image 139"),
    "id twice": (lambda d: d["annotations"][0]["segments_info"][0].update(id=5), "segment with the id 5"),
    "id 0": (lambda d: d["annotations"][0]["segments_info"][0].update(id=0), "segment with the id 0"),
    "id is text": (lambda d: d["annotations"][0]["segments_info"][0].update(id="5"), "segment with the id '5'"),
    "unknown category": (
        lambda d: d["annotations"][0]["segments_info"][0].update(category_id=4), "segment 70000, has the category id 4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG_PANOPTIC)
def test_wrong_panoptic_files_are_named(tmp_path: Path, kind: str) -> None:
    change, message = WRONG_PANOPTIC[kind]
    document = copy.deepcopy(panoptic())
    change(document)
    path = write_panoptic(tmp_path, document)
    with pytest.raises(DatasetError, match=message) as caught:
        load_coco_panoptic(tmp_path)
    assert str(path) in str(caught.value)


def test_panoptic_areas_beyond_floats_are_none(tmp_path: Path) -> None:
    document = copy.deepcopy(panoptic())
    document["annotations"][0]["segments_info"][0]["area"] = 10**400
    write_panoptic(tmp_path, document)
    assert load_coco_panoptic(tmp_path)[0]["areas"] is None


def test_panoptic_map_and_list_must_agree(tmp_path: Path) -> None:
    write_panoptic(tmp_path, panoptic(), np.where(SEGMENT_IDS == 300, 301, SEGMENT_IDS))
    with pytest.raises(DatasetError, match=r"139\.png: segment 300 is not in the map but in segments_info"):
        load_coco_panoptic(tmp_path)[0]
    write_panoptic(tmp_path, panoptic(), np.where(SEGMENT_IDS == 0, 9, SEGMENT_IDS))
    with pytest.raises(DatasetError, match=r"139\.png: segment 9 is in the map but not in segments_info"):
        load_coco_panoptic(tmp_path)[0]


def test_panoptic_map_in_the_wrong_form_is_named(tmp_path: Path) -> None:
    write_panoptic(tmp_path, panoptic())
    dataset = load_coco_panoptic(tmp_path)
    path = tmp_path / "annotations" / "panoptic_val2017" / "139.png"
    save(path, SEGMENT_IDS.astype(np.uint8))
    with pytest.raises(DatasetError, match=r"139\.png has one channel"):
        dataset[0]
    save(path, photo(6, 11))
    with pytest.raises(DatasetError, match=r"139\.png is 6x11 pixels"):
        dataset[0]
    truncate(path)
    assert "139.png" in find_bad_items(dataset)[0].error


def test_two_images_of_a_file_never_share_a_picture(tmp_path: Path) -> None:
    """Folders that a tool put before the file names are ignored, unless two names would become equal."""
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    images = [{"id": k, "file_name": name, "height": 8, "width": 8} for k, name in enumerate(("cats/1.png", "1.png"))]
    content = {"images": images[:1], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    path = tmp_path / "result.json"
    path.write_text(json.dumps(content))
    assert load_coco(path, "all")[0]["file_name"] == "1.png"
    path.write_text(json.dumps({**content, "images": images}))
    with pytest.raises(DatasetError, match="names cats/1.png and 1.png, and .* has only 1.png for both: put"):
        load_coco(path, "all")

"""Opening both splits of a small dataset by the name of each format, and recognizing the format."""

import json
import pickle
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_faim2f import FaiM2FImageProcessor
from hf_faim2f.data import SegmentationCollator, class_map, digits, readers
from hf_faim2f.data.augmentation import at_size, coco_augmentations, focoos_augmentations, to_config
from hf_faim2f.data.collate import TrainingItems
from hf_faim2f.data.formats import FORMATS, DataSource, dataset_type, find_format, open_data, recognize
from hf_faim2f.data.readers.coco_export import find_documents
from hf_faim2f.errors import DatasetError
from hf_faim2f.evaluation.evaluator import choose_subtasks
from hf_faim2f.family import load_labels
from hf_faim2f.family.mask2former import labels_and_stuff
from tests.support.shapes import LABELS, shapes, write_folder, write_tree

SEMANTIC, ALL = ("semantic",), ("semantic", "instance", "panoptic")
MAPS = ("ade20k", "hub", "folder", "coco-panoptic", "camvid", "colors", "roboflow-masks")
OBJECTS = ("yolo", "coco", "labelme", "supervisely", "voc")
# Format, requested task, resulting labels, measurable tasks, number of things.
CASES = [
    ("ade20k", None, 150, SEMANTIC, 0),
    ("coco-instance", None, 4, ("instance",), 4),
    ("coco-panoptic", None, 4, ALL, 3),
    ("cityscapes", None, 19, SEMANTIC, 0),
    ("cityscapes", "instance", 8, ("instance",), 8),
    ("cityscapes", "panoptic", 19, ALL, 8),
    ("folder", None, 4, SEMANTIC, 0),
    ("hub", None, 4, SEMANTIC, 0),
    ("digits", None, 11, ALL, 10),
    ("yolo", None, 4, ("instance",), 4),
    ("yolo", "semantic", 4, SEMANTIC, 0),
    ("coco", None, 4, ("instance",), 4),
    ("coco", "semantic", 4, SEMANTIC, 0),
    ("labelme", None, 4, ("instance",), 4),
    ("labelme", "semantic", 4, SEMANTIC, 0),
    ("supervisely", None, 4, ("instance",), 4),
    ("supervisely", "semantic", 4, SEMANTIC, 0),
    ("roboflow-masks", None, 4, SEMANTIC, 0),
    ("voc", None, 4, SEMANTIC, 0),
    ("voc", "instance", 3, ("instance",), 3),
    ("camvid", None, 4, SEMANTIC, 0),
    ("colors", None, 4, SEMANTIC, 0),
]
TREES = sorted(name for name in FORMATS if name not in ("digits", "coco-instance", "coco-panoptic"))


def test_every_format_has_a_case() -> None:
    assert {case[0] for case in CASES} == set(FORMATS)


@pytest.mark.parametrize(("name", "task", "labels", "subtasks", "things"), CASES)
def test_both_parts_of_every_format(
    tmp_path: Path, name: str, task: str, labels: int, subtasks: tuple[str, ...], things: int
) -> None:
    root = write_tree(name, tmp_path / "data") if name != "digits" else ""
    source = DataSource(str(root), task=task, labels=LABELS if name == "hub" else None, size=64)
    for part, seed, split in (("train", 0, 0), ("validation", 500, 1)):
        data = open_data(name, source, part)
        assert data.split == FORMATS[name].splits[split]
        assert len(data.description.labels) == labels and len(data.description.things) == things
        assert choose_subtasks(data.description, None) == subtasks
        assert len(data.first(1).items) == 1 and data.first(1).split == data.split
        if name == "digits":
            assert len(data.items) > 100 and data.items[0]["image"].shape == (3, 64, 64)
            continue
        assert len(data.items) == len(data.first(9).items) == 2
        pixels, segments, classes = shapes(seed + 1)
        item = data.items[1]
        assert torch.equal(item["image"], torch.from_numpy(pixels).permute(2, 0, 1))
        if name in MAPS or (name, task) == ("voc", None):
            assert torch.equal(class_map(item), torch.tensor(classes)[torch.from_numpy(segments).long()])
        if name == "coco-instance":
            assert sorted(item["classes"].tolist()) == sorted(classes[1:])
        if name in OBJECTS and subtasks == ("instance",):
            first = 0 if name != "voc" else 1
            assert item["classes"].tolist() == [label - first for label in classes[1:]]
            assert torch.equal(item["segments"] + 1, torch.from_numpy(segments)) and item["hidden"] is None
        if name in OBJECTS and task == "semantic":
            truth = torch.tensor([-1, *classes[1:]])[torch.from_numpy(segments).long()]
            assert torch.equal(class_map(item), truth)


@pytest.mark.parametrize(("name", "task"), [case[:2] for case in CASES])
def test_workers_that_start_afresh_get_the_same_batches(tmp_path: Path, name: str, task: str) -> None:
    """On macOS, on Windows, and since Python 3.14 on Linux, what workers of a data loader use is pickled."""
    root = write_tree(name, tmp_path / "data") if name != "digits" else ""
    source = DataSource(str(root), task=task, labels=LABELS if name == "hub" else None, size=64)
    items = TrainingItems(open_data(name, source, "train").first(2).items, coco_augmentations(64))
    collator = SegmentationCollator(FaiM2FImageProcessor(size={"shortest_edge": 64}), compact=True)
    batches = [
        collate([dataset[0], dataset[1]])
        for dataset, collate in ((items, collator), pickle.loads(pickle.dumps((items, collator))))
    ]
    assert torch.equal(batches[0]["pixel_values"], batches[1]["pixel_values"])
    for ours, theirs in zip(batches[0]["mask_labels"], batches[1]["mask_labels"], strict=True):
        assert torch.equal(ours, theirs)


def test_a_folder_that_is_not_divided_keeps_every_tenth_image_for_validation(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data", 21)
    parts = [open_data("folder", DataSource(str(root)), part) for part in ("train", "validation")]
    names = [[part.items[k]["file_name"] for k in range(len(part.items))] for part in parts]
    assert names[1] == ["000.png", "010.png", "020.png"] and len(names[0]) == 18 and not set(names[0]) & set(names[1])


def test_labels_of_a_divided_folder_may_lie_above_its_parts(tmp_path: Path) -> None:
    root = write_tree("folder", tmp_path / "data")
    (root / "train" / "labels.txt").rename(root / "labels.txt")
    (root / "val" / "labels.txt").unlink()
    assert open_data("folder", DataSource(str(root)), "train").description.labels == LABELS
    named = open_data("folder", DataSource(str(root), labels=("a", "b", "c", "d")), "validation")
    assert named.description.labels == ("a", "b", "c", "d")


def test_other_splits(tmp_path: Path) -> None:
    root = write_tree("ade20k", tmp_path / "data")
    data = open_data("ade20k", DataSource(str(root), splits=(None, "training")), "validation")
    assert data.split == "training" and list(data.description.labels) == load_labels("ade20k")


def test_what_cannot_be_opened_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No format is called 'coco-panoptik'. .*Did you mean 'coco-panoptic'"):
        find_format("coco-panoptik")
    with pytest.raises(DatasetError, match="no folder .*nowhere; data of the format ade20k is the folder ADEChall"):
        open_data("ade20k", DataSource(str(tmp_path / "nowhere")), "train")
    with pytest.raises(DatasetError, match="format cityscapes needs a data source"):
        open_data("cityscapes", DataSource(), "train")
    with pytest.raises(ValueError, match="format ade20k is for semantic, not for instance"):
        open_data("ade20k", DataSource(str(tmp_path), task="instance"), "train")
    with pytest.raises(DatasetError, match="does not say what its classes are called: pass labels"):
        open_data("hub", DataSource(str(tmp_path)), "train")
    with pytest.raises(DatasetError, match="one image that can be used: there is none left"):
        open_data("folder", DataSource(str(write_folder(tmp_path / "one", 1))), "train")
    for source in (DataSource(str(tmp_path)), DataSource(annotations=("a.json",))):
        with pytest.raises(DatasetError, match="format digits makes its own data: leave --data out"):
            open_data("digits", source, "train")
    description = open_data("digits", DataSource(), "train").description
    assert choose_subtasks(description, ["panoptic", "panoptic"]) == ("panoptic",)
    stuff = replace(description, things=frozenset())
    assert choose_subtasks(stuff, None) == ("semantic", "panoptic")
    with pytest.raises(ValueError, match="has panoptic truth without things, by which .* not 'instance'"):
        choose_subtasks(stuff, ["instance"])
    semantic = open_data("folder", DataSource(str(write_folder(tmp_path / "data", 4))), "train").description
    with pytest.raises(ValueError, match="has semantic truth, by which semantic .* not 'panoptic'"):
        choose_subtasks(semantic, ["semantic", "panoptic"])


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    for read in (digits._digits, digits._photographs):
        with pytest.raises(ImportError, match=r"^Scenes of digits need scikit-learn.*: pip install scikit-learn\.$"):
            read.__wrapped__("test")


def test_paths_of_this_machine_are_in_no_title(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "flowers", 2)
    assert FORMATS["folder"].title_of(DataSource(str(folder)), ["a"]) == "flowers"
    for name in ("data.yaml", "dataset.yml"):
        (folder / name).touch()
        assert FORMATS["yolo"].title_of(DataSource(str(folder / name)), ["a"]) == "flowers"
    assert FORMATS["hub"].title_of(DataSource("someone/flowers"), ["a"]) == "someone/flowers"
    assert FORMATS["ade20k"].title_of(DataSource(str(folder)), ["a"]) == "ADE20K"


def test_other_data_in_cocos_layout_are_not_called_coco(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "flowers", 2)
    things, source = load_labels("coco"), DataSource(str(folder))
    title = FORMATS["coco-instance"].title_of(source, things)
    assert (title, dataset_type("coco-instance", title)) == ("COCO 2017", "coco-instance")
    assert FORMATS["coco-panoptic"].title_of(source, labels_and_stuff("coco", "panoptic")[0]) == "COCO 2017 panoptic"
    for name, labels in (("coco-instance", ["scratch", "dent"]), ("coco-panoptic", things)):
        title = FORMATS[name].title_of(source, labels)
        assert (title, dataset_type(name, title)) == ("flowers", "flowers")


def test_augmentations_at_another_size() -> None:
    """Lengths in pixels scale with the crop; other values do not change."""
    half = to_config(at_size(focoos_augmentations(640), 320))
    assert half[2] == {"name": "ResizeShortestEdge", "edges": (160, 640), "longest_edge": 1024, "style": "range"}
    assert (half[3]["height"], half[3]["width"]) == (320, 320)
    assert half[:2] == to_config(focoos_augmentations(640))[:2]
    assert at_size(coco_augmentations(1024), 64) == coco_augmentations(64)
    with pytest.raises(ValueError, match="None of RandomFlip has a size"):
        at_size(coco_augmentations(1024)[:1], 64)


@pytest.mark.parametrize("name", TREES)
def test_every_format_is_recognized(tmp_path: Path, name: str) -> None:
    found = recognize(DataSource(str(write_tree(name, tmp_path / "data"))))
    assert found.format == name and found.reason


def test_own_masks_in_ade20ks_folders_are_not_taken_for_ade20k(tmp_path: Path) -> None:
    root = write_tree("ade20k", tmp_path / "data")
    for path in [*root.rglob("ADE_*.png")]:
        path.rename(path.with_name(path.name.removeprefix("ADE_")))
    with pytest.raises(DatasetError, match=r"no files named like ADE20K's.*rename annotations to masks.*\(folder\)"):
        recognize(DataSource(str(root)))
    assert len(open_data("ade20k", DataSource(str(root)), "train").items) == 2
    (root / "labels.txt").write_text("\n".join(LABELS))
    with pytest.raises(DatasetError, match="has labels.txt, but .* ADE20K's own 150 classes.*--format folder"):
        open_data("ade20k", DataSource(str(root)), "train")
    (root / "annotations").rename(root / "masks")
    assert recognize(DataSource(str(root))).format == "folder"
    parts = [open_data("folder", DataSource(str(root)), part) for part in ("train", "validation")]
    names = [{path["path"].split("/")[-2] for path in part.items.with_format(None)["image"]} for part in parts]
    assert names == [{"training"}, {"validation"}] and parts[0].description.labels == LABELS


@pytest.mark.parametrize(("name", "owner"), [("voc", "Pascal VOC's 21 .background"), ("camvid", "CamVid's .sky")])
def test_assumed_class_names_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, owner: str) -> None:
    root = write_tree(name, tmp_path / "data")
    said: list[str] = []
    monkeypatch.setattr(getattr(readers, name).logger, "warning_once", said.append)
    open_data(name, DataSource(str(root)), "train")
    for path in root.glob("*.txt"):
        path.unlink()
    open_data(name, DataSource(str(root), labels=LABELS), "train")
    assert not said
    open_data(name, DataSource(str(root)), "train")
    assert len(said) == 1 and re.search(f"does not name its classes, so they are taken to be {owner}", said[0])


def test_coco_by_its_files(tmp_path: Path) -> None:
    root = write_tree("coco-panoptic", tmp_path / "data")
    with pytest.raises(DatasetError, match=r"several formats.*\(coco-instance\).*\(coco-panoptic\): choose one"):
        recognize(DataSource(str(root)))
    for path in (root / "annotations").glob("panoptic_*.json"):
        path.unlink()
    assert recognize(DataSource(str(root))).format == "coco-instance"


def test_panoptic_json_is_not_taken_for_instances(tmp_path: Path) -> None:
    root = write_tree("coco-panoptic", tmp_path / "data")
    for path in (root / "annotations").glob("instances_*.json"):
        path.unlink()
    file = root / "annotations" / "panoptic_train2017.json"
    assert recognize(DataSource(annotations=(str(file),), images=(str(root / "train2017"),))).format == "coco-panoptic"
    assert recognize(DataSource(str(file))).format == "coco-panoptic"
    for source in (DataSource(annotations=(str(file),)), DataSource(str(file)), DataSource(str(root))):
        with pytest.raises(DatasetError, match=r"panoptic_train2017.json has COCO's panoptic annotations .*not instan"):
            open_data("coco", source, "train")
    # Files whose annotations follow many images, and which have other names.
    document = json.loads(file.read_text())
    long = {"images": document.pop("images"), "info": "x" * 100_000, **document}
    (root / "annotations" / "other.json").write_text(json.dumps(long))
    assert find_documents(root) == {}
    for place in [root / "annotations", root]:
        for path in place.glob("*2017*"):
            path.rename(path.with_name(path.name.replace("2017", "")))
    assert recognize(DataSource(str(root))).format == "coco-panoptic"
    for part in ("train", "validation"):
        assert len(open_data("coco-panoptic", DataSource(str(root)), part).items) == 2
    for path in (root / "annotations").glob("panoptic_*.json"):
        path.unlink()
    assert recognize(DataSource(str(root))).format == "coco-panoptic"
    with pytest.raises(DatasetError, match="no file .*panoptic_train2017.json: .* has annotations/panoptic_PART.json"):
        open_data("coco-panoptic", DataSource(str(root)), "train")


def test_files_and_names(tmp_path: Path) -> None:
    root = write_tree("yolo", tmp_path / "data")
    assert recognize(DataSource(str(root / "data.yaml"))).format == "yolo"
    assert recognize(DataSource("someone/flowers")).format == "hub"
    assert recognize(DataSource(annotations=("a.json",))).format == "coco"
    folder = write_folder(tmp_path / "folder", 2)
    assert recognize(DataSource(str(folder))).format == "folder"
    assert recognize(DataSource(str(folder), palette="voc")).format == "colors"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["images/a.png"], "it has images, but neither masks nor labels"),
        (["images/a.png", "labels/a.txt"], "images and labels, but no data.yaml or classes.txt"),
        (["JPEGImages/a.png"], "JPEGImages, but no SegmentationClass"),
        (["labels.txt"], "labels.txt, but no folders images and masks"),
        (["train/img/a.png", "train/ann/a.png.json"], "folders img and ann, but no meta.json with the classes"),
        (["b.bin", "a.bin"], "it has a.bin, b.bin"),
        ([], "it is empty"),
    ],
)
def test_half_known_folders(tmp_path: Path, files: list[str], words: str) -> None:
    for name in files:
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "data").mkdir(exist_ok=True)
    with pytest.raises(DatasetError, match=words):
        recognize(DataSource(str(tmp_path / "data")))


def test_what_is_not_there(tmp_path: Path) -> None:
    for source, words in ((DataSource(), "There is no data"), (DataSource(str(tmp_path / "x")), "no folder .*x")):
        with pytest.raises(DatasetError, match=words):
            recognize(source)
    path = tmp_path / "notes.odt"
    path.touch()
    with pytest.raises(DatasetError, match="file of no known format"):
        recognize(DataSource(str(path)))


def test_label_studios_yolo_is_not_taken_for_coco(tmp_path: Path) -> None:
    root = write_tree("yolo", tmp_path / "data")
    (root / "data.yaml").unlink()
    (root / "classes.txt").write_text("\n".join(LABELS))
    categories = [{"id": number, "name": name} for number, name in enumerate(LABELS)]
    notes = {"categories": categories, "info": {"year": 2026, "version": "1.0", "contributor": "Label Studio"}}
    (root / "notes.json").write_text(json.dumps(notes, indent=2))
    assert recognize(DataSource(str(root))).format == "yolo"
    assert len(open_data("yolo", DataSource(str(root)), "train").items) == 2


def test_two_formats_in_one_folder(tmp_path: Path) -> None:
    root = write_tree("yolo", tmp_path / "data")
    (root / "result.json").write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    with pytest.raises(DatasetError, match=r"it has data.yaml \(yolo\), and result.json .* \(coco\): choose one"):
        recognize(DataSource(str(root)))

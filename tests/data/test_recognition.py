"""What `--format auto` takes a folder for."""

import json
from pathlib import Path

import pytest

from hf_faim2f.data.formats import FORMATS, DataSource, recognize
from hf_faim2f.errors import DatasetError
from tests.support.shapes import write_folder, write_tree

TREES = sorted(name for name in FORMATS if name not in ("digits", "coco-instance", "coco-panoptic"))


@pytest.mark.parametrize("name", TREES)
def test_every_format_is_recognized(tmp_path: Path, name: str) -> None:
    found = recognize(DataSource(str(write_tree(name, tmp_path / "data"))))
    assert found.format == name and found.reason


def test_coco_by_its_files(tmp_path: Path) -> None:
    root = write_tree("coco-panoptic", tmp_path / "data")
    with pytest.raises(DatasetError, match=r"several formats.*\(coco-instance\).*\(coco-panoptic\): name one by"):
        recognize(DataSource(str(root)))
    for path in (root / "annotations").glob("panoptic_*.json"):
        path.unlink()
    assert recognize(DataSource(str(root))).format == "coco-instance"


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


def test_two_formats_in_one_folder(tmp_path: Path) -> None:
    root = write_tree("yolo", tmp_path / "data")
    (root / "result.json").write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    with pytest.raises(DatasetError, match=r"as it has data.yaml \(yolo\), and result.json .* \(coco\): name one"):
        recognize(DataSource(str(root)))

"""Files below folders and of patterns, against `glob` where no link leads upward, and each once where one does."""

import glob
import os
from pathlib import Path

import numpy as np
import pytest

from hf_faim2f.cli.predict import find_images, images_below
from hf_faim2f.data import DatasetError, describe, load_folder
from hf_faim2f.data.formats import DataSource, open_data
from hf_faim2f.distributed.rows import find_rows
from hf_faim2f.evaluation.report import _file_stem
from hf_faim2f.export.calibration import _images_below
from hf_faim2f.files import files_below, files_of_pattern
from tests.support.hub_data import rows, write_parquet
from tests.support.image_files import photo, save

NAMES = ("a.jpg", "sub/b.jpg", "sub/c.txt", "sub/deep/d.jpg", "other/e.JPG", ".hidden/f.jpg", "sub/.g.jpg")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in NAMES:
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path / "photos"


def test_files_below(photos: Path) -> None:
    found = [path.relative_to(photos).as_posix() for path in files_below(photos)]
    assert found == ["a.jpg", "other/e.JPG", "sub/b.jpg", "sub/c.txt", "sub/deep/d.jpg"]


PATTERNS = ("* *.jpg **/*.jpg ** **/* sub/**/*.jpg s*/**/d.* **/deep/* **/deep/**/*.jpg */*.jpg nothing/**/*.jpg "
            "**/sub [s]ub/**/*").split()  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_as_glob_has_them(photos: Path, pattern: str) -> None:
    expected = set()
    for match in map(Path, glob.glob(str(photos / pattern), recursive=True)):
        expected |= {Path(path, name) for path, _, names in os.walk(match) for name in names if name[0] != "."}
        expected |= set() if match.is_dir() else {match}
    expected = {path for path in expected if not any(part[0] == "." for part in path.relative_to(photos).parts)}
    assert {path for path, _ in files_of_pattern(str(photos / pattern))} == expected
    itself = {path for path, itself in files_of_pattern(str(photos / pattern)) if itself}
    assert itself == {path for path in map(Path, glob.glob(str(photos / pattern), recursive=True)) if path.is_file()}


def test_links_that_lead_upward_are_not_walked(photos: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "h.jpg").write_bytes(b"x")
    for link, target in (("sub/up", photos), ("sub/deep/again", photos / "sub"), ("linked", elsewhere),
                         ("self", photos / "self"), ("broken", tmp_path / "nothing")):  # fmt: skip
        (photos / link).symlink_to(target, target_is_directory=True)
    expected = ["a.jpg", "linked/h.jpg", "other/e.JPG", "sub/b.jpg", "sub/deep/d.jpg"]
    for images in (images_below(photos), _images_below(photos)):
        assert sorted(path.relative_to(photos).as_posix() for path in images) == expected
    for word in (str(photos), str(photos / "**" / "*.[jJ][pP][gG]"), str(photos / "**")):
        found = find_images([word], tmp_path / "out")
        assert sorted(one.path.relative_to(photos).as_posix() for one in found) == expected, word
    # The same files by several ways are there once; a link to a file is a file.
    (photos / "a2.jpg").symlink_to(photos / "a.jpg")
    found = find_images([str(photos), str(photos / "sub" / "up" / "a.jpg"), str(elsewhere)], tmp_path / "out")
    assert sorted(one.path.name for one in found) == ["a.jpg", "a2.jpg", "b.jpg", "d.jpg", "e.JPG", "h.jpg"]


def test_rows_below_links(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data" / "train-0.parquet", rows())
    (tmp_path / "data" / "up").symlink_to(tmp_path / "data", target_is_directory=True)
    for word in (str(tmp_path / "data"), str(tmp_path / "data" / "**" / "*.parquet")):
        assert [piece.path for piece in find_rows([word]).pieces] == [str(tmp_path / "data" / "train-0.parquet")]


# Data in folders


def tree(root: Path, names: dict[str, int], masks: str = "masks", images: str = "images") -> Path:
    for name, value in names.items():
        save(root / images / f"{name}.jpg", photo(4, 5, value))
        save(root / masks / f"{name}.png", np.full((4, 5), value, dtype=np.uint8))
    (root / "labels.txt").write_text("a\nb\nc\n")
    return root


def test_images_in_folders_of_folders(tmp_path: Path) -> None:
    data = load_folder(tree(tmp_path, {"x": 0, "2024/x": 1, "2024/may/y": 2}))
    found = {item["image_id"]: (item["file_name"], item["classes"].tolist()) for item in data}
    assert found == {"x": ("x.jpg", [0]), "2024/x": ("2024/x.jpg", [1]), "2024/may/y": ("2024/may/y.jpg", [2])}


def test_masks_of_one_folder_are_found_by_their_stems(tmp_path: Path) -> None:
    tree(tmp_path, {"x": 0, "y": 1})
    (tmp_path / "images" / "2024").mkdir()
    (tmp_path / "images" / "y.jpg").rename(tmp_path / "images" / "2024" / "y.jpg")
    assert {item["image_id"]: item["classes"].tolist() for item in load_folder(tmp_path)} == {"x": [0], "2024/y": [1]}
    save(tmp_path / "images" / "2023" / "y.jpg", photo(4, 5))
    with pytest.raises(DatasetError, match=r"2024/y\.jpg and y\.jpg share the mask y\.png"):
        load_folder(tmp_path)
    (tmp_path / "images" / "2023" / "y.jpg").unlink()
    for folder in ("p", "q"):
        save(tmp_path / "masks" / folder / "y.png", np.zeros((4, 5), dtype=np.uint8))
    (tmp_path / "masks" / "y.png").unlink()
    with pytest.raises(
        DatasetError, match=r"2024/y\.jpg could have the mask .*p/y\.png or .*q/y\.png: put one at .*2024"
    ):
        load_folder(tmp_path)
    data = load_folder(tmp_path, skip_bad=True)
    assert len(data) == 1 and len(describe(data).skipped) == 1


def test_parts_below_images_and_masks_are_not_mixed(tmp_path: Path) -> None:
    tree(tmp_path, {f"train/{k}": 1 for k in range(3)} | {f"val/{k}": 2 for k in range(2)})
    source = DataSource(str(tmp_path))
    train, validation = (open_data("folder", source, part) for part in ("train", "validation"))  # type: ignore[arg-type]
    assert [item["classes"].tolist() for item in train.items] == [[1]] * 3
    assert [item["classes"].tolist() for item in validation.items] == [[2]] * 2


def test_a_part_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """Rather than measured on what a model was trained on."""
    tree(tmp_path / "parts", {f"train/{k}": 1 for k in range(3)} | {"test/0": 2})
    source = DataSource(str(tmp_path / "parts"))
    with pytest.raises(DatasetError, match="no folder .*images/val; .* is divided into test, train: name the part"):
        open_data("folder", source, "validation")
    held_out = DataSource(str(tmp_path / "parts"), splits=(None, "test"))
    assert [item["classes"].tolist() for item in open_data("folder", held_out, "validation").items] == [[2]]
    tree(tmp_path / "flat", {str(k): 1 for k in range(12)})
    with pytest.raises(DatasetError, match="has no part 'test': it is not divided, so every tenth image"):
        open_data("folder", DataSource(str(tmp_path / "flat"), splits=(None, "test")), "validation")


# What is written


def test_written_names_differ_where_ids_do() -> None:
    ids = ["a/b", "a_b", "a b", "a\\b", "a:b", ".a_b", "", "/", "_", "x" * 199, "x" * 200, "x" * 201, "x" * 200 + "y",
           "é" * 150, "é" * 151, "..", "a\nb"]  # fmt: skip
    names = [_file_stem(image_id) for image_id in ids]
    assert len(set(names)) == len(ids)
    assert all(len(os.fsencode(f"{name}.png")) <= 255 and "/" not in name and name[0] != "." for name in names)
    # Names that can be are left as they are: other programs look for them.
    for own in ("ADE_val_00000001", "frankfurt_000000_000294", "a-b.c", "x" * 200, "größe"):
        assert _file_stem(own) == own
    assert _file_stem(139) == "000000000139" and _file_stem(0) == "0" * 12

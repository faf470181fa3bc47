"""Files: which ones are found in folders and by patterns, and reading text in the encodings that editors use."""

import codecs
import glob
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from hf_faim2f.conversion.detectron2_config import _read as read_detectron2
from hf_faim2f.conversion.focoos import read_info

from hf_faim2f.cli.evaluate import EvaluateSettings
from hf_faim2f.cli.settings import read_settings_file
from hf_faim2f.data import DatasetError, describe, load_coco_instance, load_folder
from hf_faim2f.data.files import list_images, read_json
from hf_faim2f.data.formats import DataSource, open_data
from hf_faim2f.data.readers.folder import read_labels
from hf_faim2f.distributed.rows import find_rows
from hf_faim2f.errors import ConversionError, SettingsError
from hf_faim2f.evaluation.report import _file_stem
from hf_faim2f.files import (
    FoundFile,
    check_empty_folder,
    check_new_folder,
    decode_text,
    files_below,
    files_of_pattern,
    find_files,
    new_folder,
)
from hf_faim2f.hub.results import Measured, update_card
from hf_faim2f.model.image_loading_faim2f import IMAGE_SUFFIXES
from tests.support.hub_data import rows, write_parquet
from tests.support.image_files import photo, save
from tests.support.reference_models import info_file


def find_images(words: list[str]) -> list[FoundFile]:
    return find_files(words, IMAGE_SUFFIXES, "image")


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
    images = files_below(photos, IMAGE_SUFFIXES)
    assert sorted(path.relative_to(photos).as_posix() for path in images) == expected
    for word in (str(photos), str(photos / "**" / "*.[jJ][pP][gG]"), str(photos / "**")):
        found = find_images([word])
        assert sorted(one.path.relative_to(photos).as_posix() for one in found) == expected, word
    # Files that are found several ways are listed once; a link to a file counts as a file.
    (photos / "a2.jpg").symlink_to(photos / "a.jpg")
    found = find_images([str(photos), str(photos / "sub" / "up" / "a.jpg"), str(elsewhere)])
    assert sorted(one.path.name for one in found) == ["a.jpg", "a2.jpg", "b.jpg", "d.jpg", "e.JPG", "h.jpg"]


def test_photographs_that_are_not_read_are_said(photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Otherwise, nobody would notice that a phone's photographs are left out."""
    for word in (photos, photos / "*", photos / "**"):
        assert find_images([str(word)])
    assert not caplog.messages
    for name in ("x.HEIC", "sub/y.heic"):
        (photos / name).write_bytes(b"x")
    expected = "2 files are left out, such as {}, in a format that is not read: convert to JPEG or PNG."
    for word, first in ((photos, "x.HEIC"), (photos / "**", "y.heic")):
        assert {one.path.suffix.lower() for one in find_images([str(word)])} == {".jpg"}
        assert caplog.messages[-1] == f"{word}: {expected.format(first)}"
    # A named file is tried.
    assert len(find_images([str(photos / "*.HEIC"), str(photos / "sub" / "y.heic")])) == 2
    assert len(caplog.messages) == 2
    assert len(list_images(photos)) == 4
    assert caplog.messages[2:] == [f"{photos}: {expected.format('y.heic')}"]


def test_a_link_to_nothing_is_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """Otherwise, a dataset of links would silently lose images if a disk is not mounted."""
    data = tree(tmp_path, {"a": 0, "b": 1})
    (data / "images" / "b.jpg").unlink()
    (data / "images" / "b.jpg").symlink_to(tmp_path / "unmounted" / "b.jpg")
    loaded = load_folder(data)
    assert len(loaded) == 2
    with pytest.raises(DatasetError, match=r"There is no file .*b\.jpg"):
        loaded[1]
    found = find_images([str(data / "images")])
    assert [one.path.name for one in found] == ["a.jpg", "b.jpg"]


def test_a_link_to_a_folder_above_the_start_is_not_walked(photos: Path) -> None:
    """Otherwise, the masks next to `images` would be found as images."""
    (photos.parent / "masks").mkdir()
    (photos.parent / "masks" / "a.jpg").write_bytes(b"x")
    (photos / "sub" / "root").symlink_to(photos.parent, target_is_directory=True)
    found = [path.relative_to(photos).as_posix() for path in files_below(photos)]
    assert found == ["a.jpg", "other/e.JPG", "sub/b.jpg", "sub/c.txt", "sub/deep/d.jpg"]


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a" / "out") as staging:
        (staging / "inner").mkdir()
        (staging / "inner" / "file").write_text("x")
        assert not (tmp_path / "a" / "out").exists()
    umask = os.umask(0)
    os.umask(umask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "a").rglob("*")}
    assert modes == {"out": 0o777 & ~umask, "inner": 0o777 & ~umask, "file": 0o666 & ~umask}
    with pytest.raises(OSError), new_folder(tmp_path / "a" / "out") as staging:
        (staging / "other").write_text("y")  # `out` is not empty
    with pytest.raises(KeyError), new_folder(tmp_path / "b"):
        raise KeyError
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as staging:
        (staging / "file").write_text("z")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]
    assert (tmp_path / "empty" / "file").read_text() == "z"


def test_a_link_to_nothing_is_refused_before_any_work(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "gone")
    for out in (link, link / "out"):
        with pytest.raises(SettingsError, match=f"{link} is not a folder that can be written"):
            check_empty_folder(out, SettingsError)
    with pytest.raises(SettingsError, match=f"{link} exists already"):
        check_new_folder(link, SettingsError)


@pytest.mark.parametrize("kind", ["folder", "link", "here", "read-only parent", "other file system"])
def test_an_empty_folder_is_filled_and_stays(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount, a link and the current folder cannot be replaced by the written folder."""
    folder = out = tmp_path / "above" / "out"
    folder.mkdir(parents=True)
    if kind == "link":
        out = tmp_path / "link"
        out.symlink_to(folder, target_is_directory=True)
    elif kind == "here":
        monkeypatch.chdir(folder)
        out = Path()
    elif kind == "read-only parent":  # root may write everywhere
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder.parent)
    elif kind == "other file system":
        rename = os.rename

        def across(source: str | Path, target: str | Path) -> None:
            if Path(target).parent == folder:
                raise OSError(18, "Invalid cross-device link")
            rename(source, target)

        monkeypatch.setattr(os, "rename", across)
    number = folder.stat().st_ino
    with new_folder(out) as staging:
        (staging / "inner").mkdir()
        (staging / "inner" / "file").write_text("x")
        (staging / "file").write_text("y")
        assert (staging.parent == folder) == (kind == "read-only parent")
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if not path.is_symlink()) == [
        "above", "above/out", "above/out/file", "above/out/inner", "above/out/inner/file",
    ]  # fmt: skip
    assert folder.stat().st_ino == number and sorted(path.name for path in out.iterdir()) == ["file", "inner"]


def test_a_failure_while_filling_a_folder_leaves_it_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []

    def move(source: Path, target: Path) -> None:
        target.write_text("half")
        moved.append(target)
        if len(moved) == 2:
            raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(shutil, "move", move)
    with pytest.raises(OSError, match="No space left"), new_folder(tmp_path) as staging:
        for name in "abc":
            (staging / name).write_text("x")
    assert len(moved) == 2 and list(tmp_path.iterdir()) == []
    assert not list(tmp_path.parent.glob(f".{tmp_path.name}.*"))


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


def test_the_mask_of_another_image_is_not_taken(tmp_path: Path) -> None:
    """2023/x comes first and has no mask; the mask of 2024/x must not be used for it."""
    tree(tmp_path, {"2023/x": 0, "2024/x": 1})
    (tmp_path / "masks" / "2023" / "x.png").unlink()
    with pytest.raises(DatasetError, match=r"2023/x\.jpg has no mask"):
        load_folder(tmp_path)
    data = load_folder(tmp_path, skip_bad=True)
    assert [(item["image_id"], item["classes"].tolist()) for item in data] == [("2024/x", [1])]


@pytest.mark.parametrize(
    "names",
    [("train", "val"), ("train", "valid"), ("training", "validation"), ("Train", "Val"), ("trainset", "valset")],
)
@pytest.mark.parametrize("layout", ["inner", "outer", "masks together"])
def test_parts_below_images_and_masks_are_not_mixed(tmp_path: Path, names: tuple[str, str], layout: str) -> None:
    if layout == "outer":
        for name, value, count in zip(names, (1, 2), (3, 2), strict=True):
            tree(tmp_path / name, {f"{name}-{k}": value for k in range(count)})
    else:
        tree(tmp_path, {f"{names[0]}/t{k}": 1 for k in range(3)} | {f"{names[1]}/v{k}": 2 for k in range(2)})
    if layout == "masks together":
        for path in [*(tmp_path / "masks").rglob("*.png")]:
            path.rename(tmp_path / "masks" / path.name)
        for name in names:
            (tmp_path / "masks" / name).rmdir()
    source = DataSource(str(tmp_path))
    train, validation = (open_data("folder", source, part) for part in ("train", "validation"))  # type: ignore[arg-type]
    assert [item["classes"].tolist() for item in train.items] == [[1]] * 3
    assert [item["classes"].tolist() for item in validation.items] == [[2]] * 2


def test_a_part_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """Otherwise, a model would be evaluated on its training data."""
    tree(tmp_path / "parts", {f"train/{k}": 1 for k in range(3)} | {"test/0": 2})
    source = DataSource(str(tmp_path / "parts"))
    with pytest.raises(DatasetError, match="images has no part 'val'; it is divided into test, train: rename one, or"):
        open_data("folder", source, "validation")
    held_out = DataSource(str(tmp_path / "parts"), splits=(None, "test"))
    assert [item["classes"].tolist() for item in open_data("folder", held_out, "validation").items] == [[2]]
    tree(tmp_path / "flat", {str(k): 1 for k in range(12)})
    with pytest.raises(DatasetError, match="has no part 'test': it is not divided, so every tenth image"):
        open_data("folder", DataSource(str(tmp_path / "flat"), splits=(None, "test")), "validation")


# Written files


def test_written_names_differ_where_ids_do() -> None:
    ids = ["a/b", "a_b", "a b", "a\\b", "a:b", ".a_b", "", "/", "_", "x" * 199, "x" * 200, "x" * 201, "x" * 200 + "y",
           "é" * 150, "é" * 151, "..", "a\nb"]  # fmt: skip
    names = [_file_stem(image_id) for image_id in ids]
    assert len(set(names)) == len(ids)
    assert all(len(os.fsencode(f"{name}.png")) <= 255 and "/" not in name and name[0] != "." for name in names)
    # Valid names are kept, because other programs look for them.
    for own in ("ADE_val_00000001", "frankfurt_000000_000294", "a-b.c", "x" * 200, "größe"):
        assert _file_stem(own) == own
    assert _file_stem(139) == "000000000139" and _file_stem(0) == "0" * 12


# Text as written by Windows editors, in all places that read user files

TEXT = "weiß\nschwarz\n"
WINDOWS = codecs.BOM_UTF8 + TEXT.replace("\n", "\r\n").encode()
UNICODE = [codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"), codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
           TEXT.encode("utf-16-le")]  # fmt: skip


def test_a_mark_and_line_ends_are_no_text() -> None:
    assert decode_text(WINDOWS) == decode_text(TEXT.encode()) == TEXT
    assert decode_text(b"") == "" and decode_text(codecs.BOM_UTF8) == ""
    for content in UNICODE:
        with pytest.raises(ValueError, match='UTF-16, which Notepad calls "Unicode".*: save it as UTF-8'):
            decode_text(content)
    with pytest.raises(ValueError, match="line 2 is in another encoding: save it as UTF-8"):
        decode_text("schwarz\nweiß\n".encode("cp1252"))


def test_labels(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes(WINDOWS)
    assert read_labels(path) == ("weiß", "schwarz")
    path.write_bytes(UNICODE[0])
    with pytest.raises(DatasetError, match=r"labels\.txt cannot be read as UTF-8 text: it is UTF-16"):
        read_labels(path)
    path.write_text("a \n b\n\n  \n")
    assert read_labels(path) == ("a", "b")


@pytest.mark.parametrize(("text", "line"), [("a\n\nb\n", 2), ("\na\nb", 1), ("a\nb\n \t\n\nc", 3)])
def test_a_blank_line_does_not_shift_the_classes(tmp_path: Path, text: str, line: int) -> None:
    save(tmp_path / "images" / "0.png", photo(2, 2))
    save(tmp_path / "masks" / "0.png", np.zeros((2, 2), dtype=np.uint8))
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(
        DatasetError, match=rf"labels\.txt has no class name in line {line}, .*: write a name there, or"
    ):
        load_folder(tmp_path)


def test_settings(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    text = yaml.safe_dump({"model": "größe", "limit": 3}, allow_unicode=True)
    path.write_bytes(codecs.BOM_UTF8 + text.replace("\n", "\r\n").encode())
    assert read_settings_file(EvaluateSettings, path) == {"model": "größe", "limit": 3}
    path.write_bytes(codecs.BOM_UTF16_LE + text.encode("utf-16-le"))
    with pytest.raises(SettingsError, match=r"run\.yaml is not YAML: it is UTF-16"):
        read_settings_file(EvaluateSettings, path)


def test_a_list_has_no_blank_word(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    for value in ('"a,,b"', "[a, '', b]", '"a,b,"'):
        path.write_text(f"labels: {value}\n")
        with pytest.raises(SettingsError, match=r"run\.yaml: labels must be a list of words"):
            read_settings_file(EvaluateSettings, path)


def test_annotations(tmp_path: Path) -> None:
    save(tmp_path / "val2017" / "1.png", photo(4, 4))
    document = {"images": [{"id": 1, "file_name": "1.png", "height": 4, "width": 4}], "annotations": [],
                "categories": [{"id": 1, "name": "Käfer"}]}  # fmt: skip
    path = tmp_path / "annotations" / "instances_val2017.json"
    path.parent.mkdir()
    path.write_bytes(codecs.BOM_UTF8 + json.dumps(document, ensure_ascii=False).encode())
    assert len(load_coco_instance(tmp_path)) == 1
    path.write_bytes(codecs.BOM_UTF16_LE + json.dumps(document).encode("utf-16-le"))
    with pytest.raises(DatasetError, match=r"instances_val2017\.json is not JSON: it is UTF-16"):
        read_json(path)


def test_configurations_to_convert(tmp_path: Path) -> None:
    path = tmp_path / "configs" / "a.yaml"
    path.parent.mkdir()
    path.write_bytes(codecs.BOM_UTF8 + b"MODEL:\r\n  WEIGHTS: x\r\n")
    assert read_detectron2(path) == {"MODEL": {"WEIGHTS": "x"}}
    path.write_bytes(codecs.BOM_UTF16_LE + "MODEL: 1".encode("utf-16-le"))
    with pytest.raises(ConversionError, match=r"a\.yaml is not readable YAML \(it is UTF-16"):
        read_detectron2(path)
    info = Path(info_file(tmp_path))
    plain = read_info(str(info)).config.to_dict()
    info.write_bytes(codecs.BOM_UTF8 + info.read_bytes())
    assert read_info(str(info)).config.to_dict() == plain
    info.write_bytes(codecs.BOM_UTF16_BE + "{}".encode("utf-16-be"))
    with pytest.raises(ConversionError, match=r"model_info\.json is not readable JSON \(it is UTF-16"):
        read_info(str(info))


def test_a_card_keeps_its_metadata(tmp_path: Path) -> None:
    card = "---\nlicense: mit\ntags:\n- flowers\n---\n\n# Words\n"
    (tmp_path / "README.md").write_bytes(codecs.BOM_UTF8 + card.replace("\n", "\r\n").encode())
    update_card(tmp_path, Measured("folder", "meadows", "val", 3, 0, {"semantic": {"mIoU": 50.0}}).results())
    content = (tmp_path / "README.md").read_bytes()
    assert content.startswith(b"---") and b"\xef\xbb\xbf" not in content
    metadata = yaml.safe_load(content.split(b"---")[1])
    assert metadata["license"] == "mit" and metadata["tags"] == ["flowers"] and len(metadata["model-index"]) == 1

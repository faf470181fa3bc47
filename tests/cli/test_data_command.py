"""`faim2f data check` and `convert`, `--format auto`, and annotations of `faim2f predict`."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hf_faim2f import FaiM2FImageProcessor
from hf_faim2f.cli import data as data_command
from hf_faim2f.cli import main
from hf_faim2f.cli.data import build_parser
from hf_faim2f.cli.parser import subcommands
from hf_faim2f.data import binary_masks, class_map
from hf_faim2f.data.check import shared_images
from hf_faim2f.data.formats import FORMATS, DataSource, open_data
from tests.support.lively_model import LABELS as LIVELY
from tests.support.lively_model import photographs, save_model
from tests.support.reference_models import small_model
from tests.support.shapes import LABELS, SIDE, shapes, write_folder, write_tree


def check(capsys: pytest.CaptureFixture[str], data: Path, *more: str, status: int = 1) -> dict[str, Any]:
    out = data.parent / "report"
    assert main(["data", "check", str(data), "--out", str(out), "--json", *more]) == status
    return json.loads(capsys.readouterr().out)


def kinds(document: dict[str, Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for finding in document["findings"]:
        found.setdefault(finding["kind"], []).append(finding["text"])
    return found


def test_a_check_counts_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_tree("folder", tmp_path / "data", 6)
    document = check(capsys, root, "--draw", "5", status=0)
    assert (document["format"], document["task"], document["wrong"]) == ("folder", "semantic", 0)
    for part, seed in (("train", 0), ("val", 500)):
        maps = [np.array(classes)[ids] for _, ids, classes in (shapes(seed + number) for number in range(6))]
        assert document["parts"][part]["sizes"] == [[SIDE, SIDE, 6]]
        for label, name in enumerate(LABELS):
            found = document["parts"][part]["classes"][name]
            assert found["pixels"] == sum(int((ids == label).sum()) for ids in maps)
            assert found["images"] == found["segments"] == sum(bool((ids == label).any()) for ids in maps)
    sheet = Image.open(document["sheet"])
    assert sheet.width > 4 * 360 and sheet.height > 2 * 360
    assert main(["data", "check", str(root), "--out", str(tmp_path / "report"), "--draw", "0"]) == 0
    printed = capsys.readouterr().out
    assert "has the format folder, because it has images and masks in train" in printed
    assert "No problems found." in printed and "train: 6 images of 64x64." in printed


def test_a_check_finds_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_tree("folder", tmp_path / "data", 6)
    train, val = root / "train", root / "val"
    shutil.copy(train / "images" / "000.png", val / "images" / "000.png")  # same image, different mask
    pixels = np.array(Image.open(train / "images" / "001.png"))
    Image.fromarray(pixels).save(train / "images" / "002.png", compress_level=0)  # same pixels, different bytes
    (train / "masks" / "003.png").unlink()
    (train / "images" / "004.png").write_bytes(b"no image")
    Image.new("L", (9, 9)).save(train / "masks" / "005.png")
    Image.new("L", (SIDE, SIDE), 255).save(val / "masks" / "001.png")
    (root / "train" / "labels.txt").write_text("\n".join([*LABELS, "star"]))
    (root / "val" / "labels.txt").write_text("\n".join([*LABELS, "star"]))
    document = check(capsys, root)
    found = kinds(document)
    assert [text.split("/")[-1] for text in found["missing"]] == ["003.png."]
    assert len(found["unreadable"]) == 2 and "004.png" in found["unreadable"][0]
    assert "005.png has shape (9, 9) but its image is 64x64" in found["unreadable"][1]
    assert found["shared"] == ["000.png of val is in train, too, as 000.png."]
    assert found["repeated"] == ["002.png is in train twice, as 001.png."]
    assert found["empty"] == ["001.png has no segment."]
    assert "star is in no image of train." in found["absent"]
    allowed = check(capsys, root, "--allow", ",".join(found), "--draw", "0", status=0)
    assert allowed["wrong"] == 0 and len(allowed["findings"]) == len(document["findings"]) == document["wrong"]


def test_a_limited_check_does_not_call_a_class_absent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only one of the images that are not read has the class."""
    root = write_tree("folder", tmp_path / "data", 3)
    for part in ("train", "val"):
        (root / part / "labels.txt").write_text("\n".join([*LABELS, "star"]))
        Image.new("L", (SIDE, SIDE), len(LABELS)).save(root / part / "masks" / "002.png")
    words = ["data", "check", str(root), "--out", str(tmp_path), "--draw", "0", "--limit", "2"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "train: 2 images of 64x64; read 2 of 3." in printed and "No problems found." in printed


def test_shared_images_are_found_among_many_of_one_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompressed files have the same size. Each counts once toward the bytes to read."""
    root = write_tree("folder", tmp_path / "data", 3)
    for part in ("train", "val"):
        for number in range(3):
            path = root / part / "images" / f"00{number}.png"
            Image.fromarray(shapes(number)[0]).save(path.with_suffix(".bmp"))
            path.unlink()
    source = DataSource(str(root), "semantic")
    parts = [open_data("folder", source, part) for part in ("train", "validation")]
    size = (root / "train" / "images" / "000.bmp").stat().st_size
    monkeypatch.setattr("hf_faim2f.data.check.MOST_HASHED", 6 * size)
    assert shared_images(*parts) == ["000.bmp", "001.bmp", "002.bmp"]
    monkeypatch.setattr("hf_faim2f.data.check.MOST_HASHED", 5 * size)
    assert shared_images(*parts) == ["000.bmp", "001.bmp"]


def test_annotations_of_stored_pixels_and_points_outside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_tree("coco", tmp_path / "data", 2)
    for part in ("train", "valid"):
        path = root / part / "_annotations.coco.json"
        document = json.loads(path.read_text())
        document["annotations"][0]["bbox"] = [1, 1, 200, 3]
        path.write_text(json.dumps(document))
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(root / "train" / "0.png")
    image.save(root / "train" / "0.png", exif=exif)
    found = kinds(check(capsys, root, "--draw", "0"))
    assert len(found["outside"]) == 2 and "extends beyond its image of 64x64" in found["outside"][0]
    assert len(found["unclear"]) == 1 and "0.png is stored rotated" in found["unclear"][0]
    assert "unclear" not in kinds(check(capsys, root, "--draw", "0", "--annotation-frame", "upright"))


def test_crowds_are_no_problem_but_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """COCO has crowds. CVAT exports every mask as one."""
    root = write_tree("coco", tmp_path / "data", 2)
    path = root / "train" / "_annotations.coco.json"
    document = json.loads(path.read_text())
    document["annotations"][0]["iscrowd"] = 1
    path.write_text(json.dumps(document))
    words = ["data", "check", str(root), "--out", str(tmp_path), "--draw", "0", "--allow", "absent"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "1 crowd." in printed and "segments are crowds (iscrowd 1)" in printed
    assert "CVAT" in printed and 'write "iscrowd": 0.' in printed and "No problems found." in printed


def test_mistakes_of_use_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_tree("yolo", tmp_path / "data")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    masks = write_tree("folder", tmp_path / "masks")
    (masks / "id2label.json").write_text(json.dumps(dict(enumerate(LABELS)), indent=1))
    parts = write_tree("folder", tmp_path / "parts")
    for place, part in enumerate(("train", "val")):
        (parts / part).rename(parts / f"train{place}")
    cases = [
        (["check", str(parts)], "it is divided into train0, train1: rename one, or pass --split (evaluate) or"),
        (["check", str(tmp_path / "nowhere")], "There is no folder"),
        (["check"], "data is missing: pass DATA, or write"),
        (["check", "--format", "coco"], "data is missing: pass DATA, or write"),
        (["check", str(tmp_path)], "none of the known formats"),
        (["check", str(root), "--allow", "emty"], "Did you mean 'empty'"),
        (["check", str(root), "--palette", "voc"], "--palette is for the formats"),
        (["check", str(root), "--labels", "a,b"], "--labels is for the formats folder, hub, labelme, voc, camvid and"),
        (["check", str(root), "--ignore-index", "0"], "--ignore-index is for the formats folder, hub, camvid and r"),
        (["check", str(root), "--reduce-labels"], "--reduce-labels is for the formats folder, hub and ade20k, not for"),
        (["check", str(root), "--images", "x"], "--annotations and --images are for the format coco"),
        (["check", str(masks), "--labels", "names.txt", "--task", "instance"], "there is no file names.txt"),
        (["check", str(masks), "--labels", "a,b,a,c"], "--labels has the class name 'a' twice"),
        (["check", str(masks), "--labels", str(masks / "id2label.json")], "id2label.json is not a list of names"),
        (["convert", str(root), "--to", "coco"], "out is missing: pass OUT, or write"),
        (["convert", str(root), str(tmp_path / "out")], "to is missing"),
        (["convert", str(root), str(tmp_path / "out"), "--to", "png"], "must be one of coco, yolo, masks"),
        (["convert", str(root), str(tmp_path / "full"), "--to", "coco"], "is not empty: choose a new folder for OUT."),
        (["check", "--format", "digits"], "nothing to check"),
    ]
    for words, expected in cases:
        assert main(["data", *words]) == 2, words
        error = capsys.readouterr().err.strip().splitlines()
        assert expected in error[-1] and error[-1].startswith(f"faim2f data {words[0]}: "), error
    assert not (tmp_path / "out").exists()
    parser = build_parser()
    for action in ("check", "convert"):
        with pytest.raises(SystemExit, match="2"):
            main(["data", action, str(root), "--image-size", "64"])
        assert "there is no argument --image-size" in capsys.readouterr().err
        assert "--image-size" not in subcommands(parser)[action].format_help()


@pytest.mark.parametrize("target", ["coco", "yolo", "masks"])
def test_an_undivided_folder_is_converted_in_two_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    root, out = write_folder(tmp_path / "data", 11), tmp_path / "out"
    assert main(["data", "convert", str(root), str(out), "--to", target, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["images"] == {"train": 9, "val": 2}
    data = open_data(document["format"], DataSource(str(out), "semantic"), "validation")
    assert len(data.items) == 2 and data.description.labels == LABELS
    assert main(["data", "check", str(out), "--out", str(tmp_path / "report"), "--draw", "0", "--allow", "absent"]) == 0


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_part_with_an_image_without_mask_is_not_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    root, out = write_tree("folder", tmp_path / "data"), tmp_path / "out"
    write_folder(root / "test", 2, seed=900)
    (root / part / "masks" / "001.png").unlink()
    assert main(["data", "convert", str(root), str(out), "--to", "coco"]) == 2
    assert f"{part}/images/001.png has no mask" in capsys.readouterr().err and not out.exists()
    assert main(["data", "convert", str(root), str(out), "--to", "coco", "--skip-bad", "--json"]) == 0
    images = json.loads(capsys.readouterr().out)["images"]
    assert images == {"train": 2, "val": 2, "test": 2} | {part: 1}


def test_items_that_cannot_be_read_are_left_out_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = write_tree("yolo", tmp_path / "data", 3), tmp_path / "out"
    (root / "images" / "train" / "1.png").write_bytes(b"no image")
    (root / "labels" / "val" / "0.txt").write_text("0 0.5 0.5 0.2 0.2")
    words = ["data", "convert", str(root), str(out), "--to", "coco"]
    assert main(words) == 2 and not out.exists()
    capsys.readouterr()
    assert main([*words, "--skip-bad", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["images"] == {"train": 2, "val": 2} and document["notes"] == []
    first, second = document["left_out"]
    assert "train/1.png" in first and "val/0.txt: line 1 is a box" in second
    assert [path.name for path in sorted(out.rglob("images/train/**/*.png"))] == ["0.png", "2.png"]


def test_an_unreadable_test_part_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = write_tree("coco", tmp_path / "data"), tmp_path / "out"
    words = ["data", "convert", str(root), str(out), "--to", "coco", "--json"]
    assert main(words) == 0 and json.loads(capsys.readouterr().out)["notes"] == []  # without a test part
    shutil.rmtree(out)
    shutil.copytree(root / "valid", root / "test")
    (root / "test" / "_annotations.coco.json").write_text("[1, 2")
    (text,) = kinds(check(capsys, root, "--draw", "0", "--allow", "absent,shared"))["missing"]
    assert "test/_annotations.coco.json" in text
    assert main(words) == 0
    document = json.loads(capsys.readouterr().out)
    unread = "Outside these splits, and so not read: 2 images, 2 in test."
    assert document["notes"] == [text, unread] and list(document["images"]) == ["train", "val"]


@pytest.mark.parametrize("name", ["hub", "coco-panoptic"])
def test_a_test_part_of_its_own_name_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    root, out = write_tree(name, tmp_path / "data"), tmp_path / "out"
    for path in sorted(root.rglob("*val*")):
        copied = path.with_name(path.name.replace("validation", "test").replace("val", "test"))
        if path.is_dir():
            shutil.copytree(path, copied)
        elif not copied.exists():
            shutil.copy(path, copied)
    more = ["--format", name, *(["--labels", ",".join(LABELS)] if name == "hub" else [])]
    document = check(capsys, root, *more, "--draw", "0", "--allow", "absent,shared", status=0)
    assert [part["images"] for part in document["parts"].values()] == [2, 2, 2] and "test" in document["parts"]
    assert main(["data", "convert", str(root), str(out), "--to", "coco", "--json", *more]) == 0
    assert len(json.loads(capsys.readouterr().out)["images"]) == 3


def test_a_parquet_file_is_one_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = next(write_tree("hub", tmp_path / "data").rglob("*val*.parquet"))
    more = ["--labels", ",".join(LABELS), "--draw", "0", "--allow", "absent"]
    assert list(check(capsys, path, *more, status=0)["parts"]) == ["all"]
    out = tmp_path / "out"
    assert main(["data", "convert", str(path), str(out), *more[:2], "--to", "masks", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["images"] == {"train": 2} and "is a single file" in document["notes"][0]
    assert not (out / "val").exists()


def test_only_the_folder_to_write_is_named_beside_annotations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = write_tree("coco", tmp_path / "data"), tmp_path / "out"
    source = ["--annotations", str(root / "train" / "_annotations.coco.json"), "--images", str(root / "train")]
    assert main(["data", "convert", str(out), *source, "--to", "masks"]) == 0
    assert f"Written: {out}" in capsys.readouterr().out and (out / "train").is_dir()
    assert main(["data", "convert", *source, "--to", "masks"]) == 2
    assert "out is missing: pass OUT" in capsys.readouterr().err


def test_an_interrupted_check_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(data_command, "_check", stop)
    assert main(["data", "check", str(tmp_path)]) == 130
    assert "faim2f data check: interrupted" in capsys.readouterr().err


def test_unread_images_in_the_folder_itself_are_named_by_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images of labelme without a JSON file are not read."""
    root = tmp_path / "data"
    write_tree("labelme", root)
    (root / "val" / "extra.png").write_bytes(next((root / "val").glob("*.png")).read_bytes())
    (root / "extra.png").write_bytes(next((root / "val").glob("*.png")).read_bytes())
    assert main(["data", "convert", str(root), str(tmp_path / "out"), "--to", "coco", "--json"]) == 0
    (note,) = json.loads(capsys.readouterr().out)["notes"]
    assert "2 images" in note and "1 in val" in note and f"1 in {root}" in note


@pytest.mark.parametrize("form", ["masks", "coco"])
def test_the_painting_order_of_labelme(tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    """A larger shape covers a smaller one. Masks keep that, and the loss in other formats is told."""
    root, out = tmp_path / "data", tmp_path / "out"
    shapes: list[dict[str, Any]] = [
        {"label": label, "points": points, "shape_type": "rectangle", "group_id": None, "flags": {}}
        for label, points in (("small", [[2, 2], [6, 10]]), ("large", [[0, 4], [12, 12]]))
    ]
    for part in ("train", "val"):
        (root / part).mkdir(parents=True)
        Image.new("RGB", (16, 12)).save(root / part / "a.png")
        document = {"shapes": shapes, "imagePath": "a.png", "imageData": None, "imageHeight": 12, "imageWidth": 16}
        (root / part / "a.json").write_text(json.dumps(document))
    assert main(["data", "convert", str(root), str(out), "--to", form, "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    if form == "masks":
        (path,) = out.rglob("train/masks/train/a.png")
        values = np.asarray(Image.open(path))
        assert len(np.unique(values[2:4, 2:6])) == len(np.unique(values[4:12, :12])) == 1
        assert values[3, 3] != values[5, 3]
    told = [note for note in notes if "because readers put that on top: 48 pixels" in note]
    assert len(told) == (form == "coco")


@pytest.mark.parametrize("name", ["folder", "coco", "labelme", "supervisely"])
def test_images_of_no_split_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    root, out = write_tree(name, tmp_path / "data"), tmp_path / "out"
    seen = [str(path) for path in root.rglob("*.[jp]*g") if "masks" not in path.parts]
    beside = Path(seen[0])
    shutil.copytree(beside.parent, root / "minival" / "images")
    shutil.copy(beside, beside.with_stem("without-label"))
    # In folders of masks, an image without a mask is an error.
    counts = {root / "minival" / "images": 2} | ({} if name == "folder" else {beside.parent: 1})
    if name == "folder":
        beside.with_stem("without-label").unlink()
    text = check(capsys, root, "--draw", "0", "--allow", "absent", status=0)["unread"]
    assert f" {sum(counts.values())} images, " in text, text
    for folder, count in counts.items():
        assert f" {count} in {folder.relative_to(root)}" in text, text
    assert main(["data", "convert", str(root), str(out), "--to", "masks", "--json"]) == 0
    assert text in json.loads(capsys.readouterr().out)["notes"]


@pytest.mark.parametrize("name", [name for name, row in FORMATS.items() if row.needs_root])
def test_every_format_is_checked_and_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """The class of each pixel stays the same, as far as the target format can represent it."""
    root = write_tree(name, tmp_path / "data")
    more = ["--format", name, *(["--labels", ",".join(LABELS)] if name == "hub" else [])]
    document = check(capsys, root, *more, "--draw", "0", "--allow", "absent", status=0)
    assert [part["images"] for part in document["parts"].values()] == [2, 2]
    assert document["unread"] is None
    out = tmp_path / "out"
    assert main(["data", "convert", str(root), str(out), "--to", "masks", *more]) == 0
    source = DataSource(str(root), labels=LABELS if name == "hub" else None)
    before = open_data(name, source, "validation")
    task = "instance" if before.description.task == "instance" else "semantic"
    after = open_data("folder", DataSource(str(out), task), "validation")  # type: ignore[arg-type]
    assert before.description.labels == after.description.labels
    for item, other in zip(before.items, after.items, strict=True):
        assert torch.equal(item["image"], other["image"]) and torch.equal(class_map(item), class_map(other))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labels") / "model"
    small = small_model(id2label=dict(enumerate(LABELS)), decoder_layers=1)
    small.save_pretrained(folder)
    FaiM2FImageProcessor.from_model_config(small.config, size={"shortest_edge": 64}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("form", ["coco", "yolo", "labelme"])
def test_predictions_as_labels_are_read_back(model: Path, tmp_path: Path, form: str) -> None:
    for number in range(2):
        path = tmp_path / "photos" / "images" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(shapes(number)[0]).resize((70 + number, 50)).save(path)
    out = tmp_path / "out"
    words = ["predict", str(model), str(tmp_path / "photos"), "--out", str(out), "--no-overlays", "--threshold", "0"]
    assert main([*words, "--subtask", "instance", "--annotations", form]) == 0
    if form == "yolo":
        assert (out / "annotations" / "labels" / "images_" / "0.txt").is_file()
    source = DataSource(str(out / "annotations"), "instance")
    data = open_data(form, replace(source, splits=("all", None)), "train")
    assert data.description.labels == LABELS and len(data.items) == 2
    parts = [open_data(form, source, part).items for part in ("train", "validation")]
    assert [len(items) for items in parts] == [1, 1] and parts[0][0]["file_name"] != parts[1][0]["file_name"]
    from faster_coco_eval.core import mask as coco_mask

    for item in data.items:
        written = json.loads((out / "images" / f"{Path(item['file_name']).stem}.json").read_text())
        truth = {(one["class_id"], coco_mask.decode(one["segmentation"]).astype(bool).tobytes())
                 for one in written["segments"]}  # fmt: skip
        masks = binary_masks(item).numpy()
        assert truth and {(int(k), m.tobytes()) for k, m in zip(item["classes"], masks, strict=True)} == truth
    assert main(["predict", str(model), "x.parquet", "--out", "y", "--ray", "local", "--annotations", form]) == 2


@pytest.mark.parametrize("subtask", ["semantic", "panoptic"])
def test_maps_as_labels_are_read_back(tmp_path: Path, subtask: str) -> None:
    """Segments with holes and several parts, things and stuff, in every format: semantic and instance segments."""
    from faster_coco_eval.core import mask as coco_mask

    model = save_model(tmp_path / "model")
    (tmp_path / "photos").mkdir()
    photographs()[0].save(tmp_path / "photos" / "0.png")
    photographs()[1].save(tmp_path / "photos" / "1.png")
    for form in ("coco", "yolo", "labelme"):
        out = tmp_path / form
        words = ["predict", str(model), str(tmp_path / "photos"), "--out", str(out), "--no-overlays"]
        assert main([*words, "--subtask", subtask, "--annotations", form]) == 0
        for task in ("semantic", "instance"):
            source = DataSource(str(out / "annotations"), task, splits=("all", None))  # type: ignore[arg-type]
            data = open_data(form, source, "train")
            assert data.description.labels == tuple(LIVELY.values()) and len(data.items) == 2
            for item in data.items:
                name = Path(item["file_name"]).stem
                written = json.loads((out / f"{name}.json").read_text())["segments"]
                masks = [coco_mask.decode(one["segmentation"]).astype(bool) for one in written]
                expected = np.full(item["segments"].shape, -1)
                for one, mask in zip(written, masks, strict=True):
                    assert (expected[mask] == -1).all()  # segments do not overlap
                    expected[mask] = one["class_id"]
                assert len(np.unique(expected)) > 1 and np.array_equal(class_map(item).numpy(), expected)
                if task == "instance":
                    pairs = zip(item["classes"].tolist(), binary_masks(item).numpy(), strict=True)
                    found = sorted((label, mask.tobytes()) for label, mask in pairs)
                    assert found == sorted(
                        (one["class_id"], m.tobytes()) for one, m in zip(written, masks, strict=True)
                    )


def test_training_says_what_it_recognizes_and_which_images_are_shared(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_tree("yolo", tmp_path / "data")
    shutil.copy(root / "images" / "train" / "0.png", root / "images" / "val" / "other.png")
    words = ["train", "--model", str(model), "--data", str(root), "--out", str(tmp_path / "run"), "--steps", "1",
             "--batch-size", "2", "--image-size", "64", "--samples", "0", "--no-tensorboard"]  # fmt: skip
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert f"{root} has the format yolo, because it has data.yaml." in printed
    assert "1 evaluation image is also in the training data, so the metrics are too optimistic: other.png." in printed
    assert main(["evaluate", str(tmp_path / "run" / "final"), "--data", str(root), "--out", str(tmp_path / "e")]) == 0

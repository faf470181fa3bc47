"""Images stored with each of the eight EXIF orientations, compared with the same images stored upright."""

import importlib.util
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from hf_faim2f import FaiM2FImageProcessor
from hf_faim2f.cli import main
from hf_faim2f.data import (
    DatasetError,
    class_map,
    dataset,
    files,
    load_cityscapes,
    load_coco_instance,
    load_folder,
)
from hf_faim2f.data.digits import DigitScenes
from hf_faim2f.data.formats import DataSource, OpenData, open_data
from hf_faim2f.family.digits import LABELS as DIGITS
from hf_faim2f.hub.card import model_card
from tests.support.lively_model import photographs, save_model
from tests.support.reference_models import small_model
from tests.support.shapes import LABELS, _run_lengths, write_tree
from tests.support.shipped_digits import complete_digits

ROOT = Path(__file__).parents[2]
# How a camera stores an upright picture for each orientation, as NumPy operations.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}
COUNT = 8  # images per split, one for each orientation
FORMS = ("folder", "ade20k", "coco-instance", "coco-panoptic", "hub")


def save_stored(upright: np.ndarray, number: int, file: Any, kind: str = "PNG") -> None:
    """Writes an upright picture as stored for an orientation, which is in its EXIF data."""
    exif = Image.Exif()
    exif[0x0112] = number
    Image.fromarray(np.ascontiguousarray(STORED[number](upright))).save(file, kind, exif=exif)


def read(file: Any) -> np.ndarray:
    with Image.open(file) as image:
        return np.array(image)


class Tree:
    """A dataset from `write_tree` whose pictures are cropped to a width and optionally stored rotated.

    Args:
        width: width of the upright pictures, whose height is 64.
        frame: None for pictures stored upright; else the frame in which the annotations are made.
    """

    def __init__(self, form: str, root: Path, width: int, frame: str | None) -> None:
        self.form, self.root, self.width, self.frame = form, write_tree(form, root, COUNT), width, frame
        for path in sorted(root.rglob("*.parquet")):
            self._rewrite_parquet(path)
        for path in sorted(root.rglob("*.png")):
            is_map = bool({"annotations", "masks"} & set(path.parts))
            number = int(path.stem.rpartition("_")[2])  # ADE20K's files have a prefix
            content = self._annotation(path, number) if is_map else self._image(path, number)
            path.write_bytes(content)
        for path in sorted(root.rglob("*.json")):
            self._rewrite_json(path)

    def open(self, frame: Any = None, part: Any = "train") -> OpenData:
        labels = LABELS if self.form == "hub" else None
        return open_data(self.form, DataSource(str(self.root), labels=labels, annotation_frame=frame), part)

    def _orientation(self, number: int) -> int:
        return 1 if self.frame is None else number % 8 + 1

    def _image(self, file: Any, number: int) -> bytes:
        made = io.BytesIO()
        save_stored(read(file)[:, : self.width], self._orientation(number), made)
        return made.getvalue()

    def _turn(self, pixels: np.ndarray, number: int) -> np.ndarray:
        turn = STORED[self._orientation(number) if self.frame == "stored" else 1]
        return np.ascontiguousarray(turn(pixels[:, : self.width]))

    def _annotation(self, file: Any, number: int) -> bytes:
        made = io.BytesIO()
        Image.fromarray(self._turn(read(file), number)).save(made, "PNG")
        return made.getvalue()

    def _rewrite_json(self, path: Path) -> None:
        document = json.loads(path.read_text())
        for annotation in document["annotations"]:
            encoded = annotation.get("segmentation")
            if encoded is None:  # in a panoptic file
                continue
            values = np.repeat(np.arange(len(encoded["counts"])) % 2, encoded["counts"]).astype(np.uint8)
            mask = self._turn(values.reshape(encoded["size"], order="F"), annotation["image_id"])
            annotation["segmentation"] = {"size": list(mask.shape), "counts": _run_lengths(mask)}
        for image in document["images"]:
            image["height"], image["width"] = self._turn(np.zeros((64, 64)), image["id"]).shape
        # A panoptic file only lists segments that are in the map.
        for annotation in document["annotations"]:
            if "segments_info" in annotation:
                ids = set(np.unique(read(path.with_suffix("") / annotation["file_name"])[..., 0]).tolist())
                annotation["segments_info"] = [one for one in annotation["segments_info"] if one["id"] in ids]
        path.write_text(json.dumps(document))

    def _rewrite_parquet(self, path: Path) -> None:
        rows = pyarrow.parquet.read_table(path).to_pylist()
        for number, row in enumerate(rows):
            row["image"] = {"bytes": self._image(io.BytesIO(row["image"]["bytes"]), number), "path": None}
            row["label"] = {"bytes": self._annotation(io.BytesIO(row["label"]["bytes"]), number), "path": None}
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        features = {"image": datasets.Image(), "label": datasets.Image(), "image_id": datasets.Value("string")}
        datasets.Dataset.from_dict(columns, datasets.Features(features)).to_parquet(str(path))


def assert_same(got: OpenData, expected: OpenData) -> None:
    for one, other in zip(got.items, expected.items, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            same = torch.equal(one[name], value) if isinstance(value, torch.Tensor) else one[name] == value  # type: ignore[literal-required]
            assert same, (name, one["image_id"])


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The warnings about whole datasets."""
    said: list[str] = []
    monkeypatch.setattr(dataset.logger, "warning", said.append)
    return said


# ------------------------------------------------------------------------------------------------------------ readers


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", [48, 64], ids=["oblong", "square"])
def test_items_are_those_of_upright_pictures(form: str, width: int, tmp_path: Path, said: list[str]) -> None:
    plain = Tree(form, tmp_path / "plain", width, None).open()
    assert said == []
    # Annotations of the upright pictures need no setting, but ambiguous cases are reported.
    assert_same(Tree(form, tmp_path / "upright", width, "upright").open(), plain)
    (unclear,) = said
    count = 3 if width == 48 else 7
    assert f": {count} images are stored rotated or mirrored" in unclear and "--annotation-frame stored" in unclear
    if form != "hub":
        assert [int(stem) for stem in re.findall(r"(\d+)\.png", unclear)] == list(range(1, count + 1))
    # Annotations of the stored pixels: they are rotated if sizes tell; otherwise the setting is needed.
    stored = Tree(form, tmp_path / "stored", width, "stored")
    said.clear()
    assert_same(stored.open("stored"), plain)
    assert [": 4 images are stored rotated (" in text and "turned upright" in text for text in said] == [True] * (
        1 if width == 48 else 0
    )
    with pytest.raises(AssertionError):
        assert_same(stored.open("upright"), plain)


def test_instance_masks_with_colors_are_turned(tmp_path: Path) -> None:
    """Red is the class, green the instance: read by different code than single-channel maps."""
    colors = np.zeros((64, 48, 3), dtype=np.uint8)
    colors[5:20, 10:30] = (1, 1, 0)
    colors[30:60, 3:9] = (1, 2, 0)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for number, turn in STORED.items():
        save_stored(colors, number, tmp_path / "images" / f"{number}.png")
        Image.fromarray(np.ascontiguousarray(turn(colors))).save(tmp_path / "masks" / f"{number}.png")
    data = load_folder(tmp_path, ["ground", "shape"], "instance", annotation_frame="stored")
    for item in data:
        found = [(item["segments"] == k).numpy() for k in range(len(item["classes"])) if item["classes"][k] == 1]
        assert sorted(int(mask.sum()) for mask in found) == [180, 300]
        assert np.array_equal(np.any(found, axis=0), colors[..., 0] == 1)


def test_a_map_with_an_orientation_of_its_own_is_upright_by_it(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 3, (64, 64), dtype=np.uint8)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        for number in STORED:
            save_stored(pixels, number, tmp_path / name / f"{number}.png")
    for item in load_folder(tmp_path, ["a", "b", "c"], annotation_frame="stored"):
        assert np.array_equal(item["classes"][item["segments"].long()].numpy(), pixels)


def test_a_reader_by_itself_warns_at_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = Tree("coco-instance", tmp_path, 48, "upright")
    warned: list[str] = []
    monkeypatch.setattr(files.logger, "warning_once", warned.append)
    for item in load_coco_instance(tree.root, "train2017"):
        assert item["image"].shape == (3, 64, 48)
    assert len(warned) == 3 and all(f"{k}.png" in text for k, text in zip((1, 2, 3), warned, strict=True))
    for frame in ("upright", "stored"):
        list(load_coco_instance(tree.root, "train2017", annotation_frame=frame))
    assert len(warned) == 3
    with pytest.raises(ValueError, match="annotation_frame must be 'upright', 'stored' or None; got 'turned'"):
        load_coco_instance(tree.root, "train2017", annotation_frame="turned")  # type: ignore[arg-type]


def test_sizes_that_fit_neither_frame_are_refused(tmp_path: Path) -> None:
    tree = Tree("coco-instance", tmp_path, 48, "stored")
    path = tree.root / "annotations" / "instances_train2017.json"
    document = json.loads(path.read_text())
    document["images"][2].update(height=48, width=64)  # orientation 3, which keeps 64x48
    document["annotations"] = []
    path.write_text(json.dumps(document))
    with pytest.raises(DatasetError, match=r"2\.png is 64x48 pixels, but .* says 48x64"):
        list(tree.open("stored").items)


def test_cityscapes_has_no_turned_images(tmp_path: Path) -> None:
    root = write_tree("cityscapes", tmp_path, 2)
    path = root / "leftImg8bit" / "val" / "town" / "town_1_leftImg8bit.png"
    save_stored(read(path), 3, path)
    with pytest.raises(DatasetError, match="town_1_leftImg8bit.png has an EXIF orientation"):
        load_cityscapes(root)
    assert len(load_cityscapes(root, skip_bad=True)) == 1
    with pytest.raises(ValueError, match="cityscapes have no EXIF rotation: leave annotation_frame out"):
        open_data("cityscapes", DataSource(str(root), annotation_frame="stored"), "validation")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("number", STORED)
def test_heads_and_pixels_tell_the_same(kind: str, number: int, tmp_path: Path) -> None:
    upright = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    save_stored(upright, number, tmp_path / "photo", kind)
    source = files.file_source(tmp_path / "photo")
    assert files.read_header(source) == (number, 20, 30)
    pixels, told = files.read_with_orientation(source)
    assert told == number and pixels.shape == (3, 20, 30)
    if kind in ("PNG", "TIFF"):
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), upright)


# ------------------------------------------------------------------------------------------- predict, train, evaluate


def test_predictions_are_those_of_upright_pictures(tmp_path: Path) -> None:
    model, photos = save_model(tmp_path / "model"), tmp_path / "photos"
    photos.mkdir()
    upright = np.array(photographs()[0])
    for number in STORED:
        save_stored(upright, number, photos / f"{number}.png")
    assert main(["predict", str(model), str(photos), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    expected = json.loads((tmp_path / "out" / "1.json").read_text())
    assert len(expected["segments"]) > 1 and (expected["image"]["height"], expected["image"]["width"]) == (111, 183)
    for number in STORED:
        document = json.loads((tmp_path / "out" / f"{number}.json").read_text())
        assert document["segments"] == expected["segments"]
        for name in ("labels.png", "segments.png", "overlay.jpg"):
            assert np.array_equal(read(tmp_path / "out" / f"{number}.{name}"), read(tmp_path / "out" / f"1.{name}"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model for the shapes."""
    folder = tmp_path_factory.mktemp("models") / "shapes"
    tiny = small_model(id2label=dict(enumerate(LABELS)), decoder_layers=1)
    tiny.save_pretrained(folder)
    FaiM2FImageProcessor.from_model_config(tiny.config, size={"shortest_edge": 64}).save_pretrained(folder)
    return folder


@pytest.mark.slow  # three trainings
def test_trainings_are_those_of_upright_pictures(model: Path, tmp_path: Path) -> None:
    """Two steps from the same seed, over all eight orientations, give the same losses and weights."""
    runs = {}
    for frame in (None, "upright", "stored"):
        tree, run = Tree("coco-panoptic", tmp_path / f"data-{frame}", 48, frame), tmp_path / f"run-{frame}"
        flags = ["--annotation-frame", frame] if frame else []
        quick = ["--steps", "2", "--batch-size", "4", "--image-size", "64", "--samples", "0", "--eval-limit", "1",
                 "--no-tensorboard", "--log-every", "1"]  # fmt: skip
        where = ["--data", str(tree.root), "--format", "coco-panoptic", "--out", str(run)]
        assert main(["train", "--model", str(model), *where, *flags, *quick]) == 0
        losses = [entry["loss"] for entry in json.loads((run / "log.json").read_text())["log"] if "loss" in entry]
        assert len(losses) == 2
        runs[frame] = losses, (run / "final" / "model.safetensors").read_bytes()
    assert runs["upright"] == runs[None] and runs["stored"] == runs[None]


def test_evaluations_are_those_of_upright_pictures(tmp_path: Path) -> None:
    """The shipped model on held-out scenes of digits, one per orientation."""
    model = tmp_path / "digits"
    shutil.copytree(ROOT / "examples" / "digits", model)  # the results are added to its card
    scenes = DigitScenes("test", COUNT)

    def evaluate(name: str, frame: str | None, *flags: str) -> Any:
        folder = tmp_path / name / "val"
        for part in ("images", "masks"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / "labels.txt").write_text("\n".join(DIGITS))
        for number in STORED:
            scene = scenes[number - 1]
            pixels = scene["image"].permute(1, 2, 0).numpy()[:, :96]
            classes = class_map(scene).numpy().astype(np.uint8)[:, :96]
            save_stored(pixels, 1 if frame is None else number, folder / "images" / f"{number}.png")
            turned = STORED[number](classes) if frame == "stored" else classes
            Image.fromarray(np.ascontiguousarray(turned)).save(folder / "masks" / f"{number}.png")
        out = tmp_path / f"evaluation-{name}"
        where = ["--data", str(folder.parent), "--format", "folder", "--task", "semantic", "--out", str(out)]
        assert main(["evaluate", str(model), *where, *flags]) == 0
        return json.loads((out / "evaluation.json").read_text())["results"]

    plain = evaluate("plain", None)
    assert plain["semantic"]["mIoU"] > 50
    assert evaluate("upright", "upright") == plain
    assert evaluate("stored", "stored", "--annotation-frame", "stored") == plain
    # Without the setting, orientations 2 to 4 are read wrongly.
    assert evaluate("unsaid", "stored")["semantic"]["mIoU"] < plain["semantic"]["mIoU"] - 10


# ----------------------------------------------------------------------------------------------------------- snippets


def snippets_of(text: str) -> list[str]:
    return [code for code in re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S) if "Image" in code]


def test_the_snippets_answer_in_the_frame_of_the_upright_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """README's snippet, unchanged, next to a model's folder, with a photo that is stored rotated."""
    save_model(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    (code,) = snippets_of((ROOT / "README.md").read_text())
    maps = {}
    for number in (1, 2, 6):
        save_stored(np.array(photographs()[0]), number, tmp_path / "photo.jpg")  # PNG by its contents
        names: dict[str, Any] = {}
        exec(code, names)
        maps[number] = names["label_map"]
    assert maps[1].shape == (111, 183) and len(maps[1].unique()) > 1
    assert torch.equal(maps[2], maps[1]) and torch.equal(maps[6], maps[1])


def test_every_snippet_that_opens_a_photo_turns_it_upright() -> None:
    card = model_card("tiny", small_model().config)
    digits = (ROOT / "examples" / "digits" / "README.md").read_text()
    docstring = (ROOT / "hf_faim2f" / "model" / "modeling_faim2f.py").read_text()
    for text, count in ((card, 2), (digits, 2), (docstring, 1), ((ROOT / "README.md").read_text(), 1)):
        assert text.count('Image.open("') == text.count('ImageOps.exif_transpose(Image.open("') == count


def test_the_example_lists_the_same_of_a_turned_photo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("load_example", ROOT / "examples" / "load.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    model = complete_digits(tmp_path / "digits")
    upright = DigitScenes("test", 1)[0]["image"].permute(1, 2, 0).numpy()[:, :96]
    printed = []
    for number in (1, 4, 8):
        save_stored(upright, number, tmp_path / "photo.png")
        example.main(str(tmp_path / "photo.png"), str(model))
        printed.append(capsys.readouterr().out)
    assert "box" in printed[0] and printed[1] == printed[0] and printed[2] == printed[0]

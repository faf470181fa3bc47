"""Annotations for other tools: outlines cover exactly their masks, and every format reads back the same pixels."""

import json
import shutil
import struct
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pycocotools import mask as reference

from hf_faim2f.data import binary_masks, class_map, describe
from hf_faim2f.data.annotations import FORMS, TARGETS, AnnotationFolder, Mark, joined, mark_of, trace
from hf_faim2f.data.convert import convert_data
from hf_faim2f.data.dataset import with_channels
from hf_faim2f.data.formats import DataSource, OpenData, open_data
from hf_faim2f.data.item import Item, segment_mask
from hf_faim2f.data.readers.coco_export import load_coco
from hf_faim2f.data.readers.folder import load_folder
from hf_faim2f.data.readers.hub import load_hub
from hf_faim2f.data.readers.labelme import load_labelme
from hf_faim2f.data.readers.yolo import load_yolo
from hf_faim2f.errors import DatasetError
from tests.support.hub_data import rows, write_parquet
from tests.support.image_files import photo, save
from tests.support.shapes import LABELS, shapes, write_folder, write_tree


def test_a_conversion_holds_one_full_mask_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each segment only the crop is kept, which is no view of the full mask."""
    read: list[int] = []

    def spy(item: Item, number: int) -> torch.Tensor:
        read.append(number)
        return segment_mask(item, number)

    monkeypatch.setattr("hf_faim2f.data.convert.segment_mask", spy)
    root = write_tree("coco-panoptic", tmp_path / "data")
    convert_data({"train": open_data("coco-panoptic", DataSource(str(root)), "train")}, tmp_path / "out", "coco")
    assert len(read) >= 4
    mark = mark_of(mask := np.eye(5, dtype=bool), 0)
    assert mark is not None and not np.shares_memory(mark.crop, mask)


def by_crossings(outline: list[tuple[int, int]], height: int, width: int) -> np.ndarray:
    """The even-odd rule by its definition: counts the edges to the right of each pixel's center."""
    xs, ys = np.arange(width) + 0.5, np.arange(height) + 0.5
    inside = np.zeros((height, width), dtype=bool)
    for (x0, y0), (x1, y1) in zip(outline, [*outline[1:], outline[0]], strict=True):
        if y0 == y1:
            continue
        crossed = (ys >= min(y0, y1)) & (ys < max(y0, y1))
        at = x0 + (ys - y0) * (x1 - x0) / (y1 - y0)
        inside ^= crossed[:, None] & (at[:, None] > xs[None])
    return inside


def random_masks() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.random(random.integers(1, 12, 2)) < random.choice([0.2, 0.5, 0.8]) for _ in range(300)]


def test_outlines_cover_exactly_their_masks() -> None:
    for mask in random_masks():
        height, width = mask.shape
        outlines = trace(mask)
        covered = [by_crossings(outline, height, width) for outline in outlines]
        if not covered:
            assert not mask.any()
            continue
        assert np.array_equal(sum(one.astype(int) for one in covered), mask.astype(int))  # they are disjoint
        assert np.array_equal(by_crossings(joined(outlines), height, width), mask)
        polygons = [[float(value) for point in outline for value in point] for outline in outlines]
        by_pycocotools = reference.decode(reference.merge(reference.frPyObjects(polygons, height, width)))
        assert np.array_equal(by_pycocotools.astype(bool), mask)


def test_outlines_of_a_ring_and_of_pixels_that_touch() -> None:
    ring = np.ones((3, 3), dtype=bool)
    ring[1, 1] = False
    (outline,) = trace(ring, left=10, top=20)
    assert outline == [
        (10, 20), (11, 20), (11, 21), (12, 21), (12, 22), (11, 22), (11, 21), (11, 20), (13, 20), (13, 23), (10, 23)
    ]  # fmt: skip
    assert len(trace(np.eye(4, dtype=bool))) == 4 and len(trace(np.eye(4, dtype=bool)[::-1])) == 4
    speckles = np.zeros((60, 60), dtype=bool)
    speckles[::2, ::2] = True  # more parts than are joined by shortest lines
    assert np.array_equal(by_crossings(joined(trace(speckles)), 60, 60), speckles)


READERS: dict[str, Any] = {"coco": load_coco, "yolo": load_yolo, "labelme": load_labelme}


@pytest.mark.parametrize("form", READERS)
def test_labels_are_read_back_to_the_pixel(tmp_path: Path, form: str) -> None:
    """Overlapping objects with holes and several parts, at sizes whose fractions do not terminate."""
    random = np.random.default_rng(1)
    pixels = random.integers(0, 255, (37, 53, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    writer = AnnotationFolder(tmp_path / "out", form, ["a", "b c", "ü"])
    masks = {}
    for number in range(2):
        marks: list[Mark] = []
        for label in range(3):
            mask = np.zeros((37, 53), dtype=bool)
            mask[5:30, 7 * label : 7 * label + 30] = random.random((25, 30)) < 0.6
            mark = mark_of(mask, label)
            assert mark is not None and mark_of(mask & False, label) is None
            marks.append(mark)
            masks[number, label] = mask
        name = PurePosixPath("sub", f"photo.{number}")
        writer.add(1 - number, name, (tmp_path / "a.png").read_bytes(), ".png", (37, 53), marks)
    writer.finish()
    data = READERS[form](tmp_path / "out", "all")
    assert describe(data).labels == ("a", "b c", "ü") and len(data) == 2
    for item in data:
        number = int(Path(item["file_name"]).stem[-1])
        assert torch.equal(item["image"], torch.from_numpy(pixels).permute(2, 0, 1))
        assert sorted(item["classes"].tolist()) == [0, 1, 2]
        for label, mask in zip(item["classes"].tolist(), binary_masks(item).numpy(), strict=True):
            assert np.array_equal(mask, masks[number, label])


def segments_of(items: Any) -> dict[str, list[tuple[int, bytes]]]:
    return {
        Path(item["file_name"]).stem: sorted(
            (label, mask.tobytes())
            for label, mask in zip(item["classes"].tolist(), binary_masks(item).numpy(), strict=True)
        )
        for item in items
    }


def parts_of(form: str, root: Path, task: Any = None) -> dict[str, OpenData]:
    source = DataSource(str(root), task)
    return {name: open_data(form, source, part) for name, part in (("train", "train"), ("val", "validation"))}  # type: ignore[arg-type]


@pytest.mark.parametrize("target", ["coco", "yolo", "masks"])
def test_instances_are_converted_to_every_layout(tmp_path: Path, target: str) -> None:
    before = parts_of("coco-instance", write_tree("coco-instance", tmp_path / "data"))
    notes = convert_data(before, tmp_path / "out", target)
    how = "The masks are of instances: read the folder with --task instance."
    assert notes == ([how] if target == "masks" else [])
    form = "folder" if target == "masks" else target
    if target == "masks":
        with pytest.raises(DatasetError, match="has the values? 4000.*or pass --task instance if these are"):
            parts_of(form, tmp_path / "out")["train"].items[0]
    ids = before["train"].description.category_ids
    if target == "yolo":  # Ultralytics' check_class_names only accepts the ids 0, 1, ..., n - 1
        names = yaml.safe_load((tmp_path / "out" / "data.yaml").read_text())["names"]
        assert tuple(names) == tuple(range(len(LABELS))) != ids and tuple(names.values()) == LABELS
    after = parts_of(form, tmp_path / "out", "instance")
    if target == "coco":
        assert after["train"].description.category_ids == ids
    for part in ("train", "val"):
        assert after[part].description.labels == LABELS
        assert segments_of(after[part].items) == segments_of(before[part].items)


def test_ultralytics_finds_the_images_from_any_working_directory(tmp_path: Path) -> None:
    """It takes a relative `path` as relative to the working directory, and else the parts as relative to the file."""
    convert_data(parts_of("yolo", write_tree("yolo", tmp_path / "data")), tmp_path / "out", "yolo")
    settings = tmp_path / "out" / "data.yaml"
    content = yaml.safe_load(settings.read_text())
    base = Path(content.get("path") or settings.parent)
    assert [*(base / content["train"]).rglob("*.png")] and [*(base / content["val"]).rglob("*.png")]


def embedded_after_conversion(folder: Path, content: bytes, channels: int = 3) -> tuple[Path, list[Item]]:
    """Converts a Parquet file with one embedded image of 2x3 pixels; returns its copy and what is read of it."""
    columns = {"image": [{"bytes": content, "path": "a"}], "label": rows(1)["annotation"]}
    data = load_hub(write_parquet(folder / "a.parquet", columns, as_images=False), labels=["a", "b", "c"])
    data = with_channels(data, channels)
    convert_data({"train": OpenData(data, describe(data), "train")}, folder / "out", "masks")
    (copy,) = (folder / "out" / "train" / "images").iterdir()
    return copy, [data[0], with_channels(load_folder(folder / "out" / "train", describe(data).labels), channels)[0]]


def test_a_jpeg_of_several_frames_stays_a_jpeg(tmp_path: Path) -> None:
    """Pillow calls the photographs of many phones MPO."""
    frames = [Image.fromarray(photo(2, 3, seed)) for seed in range(2)]
    frames[0].save(tmp_path / "a.mpo", "MPO", save_all=True, append_images=frames[1:])
    copy, (before, after) = embedded_after_conversion(tmp_path, (tmp_path / "a.mpo").read_bytes())
    assert copy.suffix == ".jpg" and torch.equal(before["image"], after["image"])


def tiff_of_five_bands(values: bytes) -> bytes:
    """An uncompressed TIFF file of 2x3 pixels with five bands of 8 bits."""
    tags = ((256, 3), (257, 2), (258, 8), (259, 1), (262, 1), (273, 122), (277, 5), (278, 2), (279, 30))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0" * 4 + values


@pytest.mark.parametrize("suffix", [".npy", ".tif"])
def test_embedded_images_of_five_bands_are_copied(tmp_path: Path, suffix: str) -> None:
    values = np.arange(30, dtype=np.uint8).reshape(2, 3, 5)
    np.save(tmp_path / "a.npy", values)
    content = (tmp_path / "a.npy").read_bytes() if suffix == ".npy" else tiff_of_five_bands(values.tobytes())
    copy, (before, after) = embedded_after_conversion(tmp_path, content, channels=5)
    assert copy.suffix == suffix and copy.read_bytes() == content
    assert torch.equal(before["image"], torch.from_numpy(values).permute(2, 0, 1))
    assert torch.equal(before["image"], after["image"])


def test_objects_that_repeat_another_are_counted(tmp_path: Path) -> None:
    root = write_tree("coco-instance", tmp_path / "data", 1)
    path = root / "annotations" / "instances_train2017.json"
    document = json.loads(path.read_text())
    again = {**document["annotations"][0], "id": 1000}
    path.write_text(json.dumps({**document, "annotations": [*document["annotations"], again]}))
    before = parts_of("coco-instance", root)
    assert convert_data(before, tmp_path / "coco", "coco") == []
    (note,) = convert_data(before, tmp_path / "yolo", "yolo")
    assert note == "Lost, because readers drop lines that repeat the class and outline of another: 1 object."
    after = parts_of("yolo", tmp_path / "yolo")
    assert len(before["train"].items[0]["classes"]) == len(after["train"].items[0]["classes"]) + 1


@pytest.mark.parametrize(("target", "lost"), [("coco", "stuff"), ("yolo", "one polygon"), ("masks", "Merged")])
def test_what_a_layout_cannot_hold_is_said(tmp_path: Path, target: str, lost: str) -> None:
    before = parts_of("coco-panoptic", write_tree("coco-panoptic", tmp_path / "data", 4))
    notes = convert_data(before, tmp_path / "out", target)
    assert any(lost in note for note in notes)
    form = "folder" if target == "masks" else target
    after = parts_of(form, tmp_path / "out")
    for item, other in zip(before["val"].items, after["val"].items, strict=True):
        own = class_map(other)
        assert torch.equal(class_map(item), own)  # the ground has holes at the shapes


def test_semantic_masks_and_void(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data", 4)
    values = np.array(Image.open(root / "masks" / "000.png"))
    values[:5] = 255
    Image.fromarray(values).save(root / "masks" / "000.png")
    before = parts_of("folder", root)
    assert convert_data(before, tmp_path / "masks", "masks") == []
    after = parts_of("folder", tmp_path / "masks")
    for part in ("train", "val"):
        for item, other in zip(before[part].items, after[part].items, strict=True):
            assert torch.equal(class_map(item), class_map(other))
    assert any("pixels without a class" in note for note in convert_data(before, tmp_path / "yolo", "yolo"))


def test_many_classes_need_colors(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    labels = [f"c{number}" for number in range(80)]
    writer = AnnotationFolder(tmp_path / "out", "masks", labels, instances=True)
    marks = [Mark(label, np.ones((2, 2), dtype=bool), (2 * k, 0, 2 * k + 1, 1)) for k, label in enumerate((0, 79, 79))]
    write_tree("folder", tmp_path / "data", 1)
    image = (tmp_path / "data" / "train" / "images" / "000.png").read_bytes()
    writer.add(0, PurePosixPath("a"), image, ".png", (64, 64), marks)
    with pytest.raises(DatasetError, match="b has more than 255 instances of c1"):
        writer.add(1, PurePosixPath("b"), image, ".png", (64, 64), [Mark(1, *marks[0][1:3])] * 256)
    writer.finish()
    (tmp_path / "out" / "images" / "b.png").unlink()
    item = open_data("folder", DataSource(str(tmp_path / "out"), "instance", splits=("all", None)), "train").items[0]
    with pytest.raises(DatasetError, match="mode 'RGB'.*; if its colors encode instances, pass --task instance"):
        open_data("folder", DataSource(str(tmp_path / "out"), splits=("all", None)), "train").items[0]
    assert item["classes"].tolist() == [0, 79, 79] and segments_of([item])["a"][0][1] != segments_of([item])["a"][1][1]
    assert int((item["segments"] >= 0).sum()) == 12


def test_masks_of_many_classes_say_how_they_are_read_back(tmp_path: Path) -> None:
    values = np.array([[0, 255, 256], [65535, 256, 0]], dtype=np.uint16)
    for kind, image in (("images", photo(2, 3)), ("masks", values)):
        save(tmp_path / "data" / kind / "a.png", image)
    (tmp_path / "data" / "labels.txt").write_text("".join(f"c{number}\n" for number in range(257)))
    data = load_folder(tmp_path / "data", ignore_index=65535)
    (note,) = convert_data({"train": OpenData(data, describe(data), "train")}, tmp_path / "out", "masks")
    assert note.endswith("read the folder with --ignore-index 65535.")
    after = load_folder(tmp_path / "out" / "train", describe(data).labels, ignore_index=65535)
    assert class_map(after[0]).tolist() == class_map(data[0]).tolist() == [[0, 255, 256], [-1, 256, 0]]


def test_masks_of_one_class_are_not_taken_for_binary_masks(tmp_path: Path) -> None:
    """Of 0 and 255, readers could not tell which is the class."""
    save(tmp_path / "data" / "images" / "a.png", photo(2, 3))
    save(tmp_path / "data" / "masks" / "a.png", np.array([[0, 7, 7], [7, 0, 0]], dtype=np.uint8))
    data = load_folder(tmp_path / "data", ["leaf"], ignore_index=7)
    (note,) = convert_data({"train": OpenData(data, describe(data), "train")}, tmp_path / "out", "masks")
    assert "there is only one class" in note and note.endswith("read the folder with --ignore-index 65535.")
    after = load_folder(tmp_path / "out" / "train", ["leaf"], ignore_index=65535)
    assert class_map(after[0]).tolist() == [[0, -1, -1], [-1, 0, 0]]


def test_more_classes_than_colors_are_refused(tmp_path: Path) -> None:
    """Class 255 would get the color that means no class, and later classes have no color."""
    labels = [f"c{number}" for number in range(256)]
    AnnotationFolder(tmp_path, "masks", labels[:255], instances=True)
    AnnotationFolder(tmp_path, "masks", labels)
    with pytest.raises(DatasetError, match="Instance masks can hold at most 255 classes, not 256: choose coco"):
        AnnotationFolder(tmp_path, "masks", labels, instances=True)


def test_names_that_a_list_of_names_cannot_hold(tmp_path: Path) -> None:
    root = write_tree("yolo", tmp_path / "data")
    settings = (root / "data.yaml").read_text()
    words = "labels.txt of the format masks cannot hold the class name"
    with pytest.raises(DatasetError, match=words):
        AnnotationFolder(tmp_path, "masks", ["square", "square "])  # such as a model's; readers refuse them
    (root / "data.yaml").write_text(settings.replace("2: disc", '2: "two\\nlines"'))  # would shift the names after it
    with pytest.raises(DatasetError, match=words):
        convert_data(parts_of("yolo", root), tmp_path / "out", "masks")
    assert not (tmp_path / "out").exists()
    convert_data(parts_of("yolo", root), tmp_path / "out", "coco")


@pytest.mark.parametrize("form", sorted({*FORMS, *TARGETS}))
def test_repeated_class_names_are_refused(form: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="Several classes have the name 'a'"):
        AnnotationFolder(tmp_path, form, ["a", "b", "a"])


def test_nothing_is_left_of_a_conversion_that_fails(tmp_path: Path) -> None:
    root = write_tree("yolo", tmp_path / "data")
    before = parts_of("yolo", root)
    (root / "images" / "val" / "1.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match="1.png"):
        convert_data(before, tmp_path / "out", "coco")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_files_that_would_overwrite_each_other_get_other_names(tmp_path: Path) -> None:
    root = write_tree("labelme", tmp_path / "data", 1)
    document = json.loads((root / "train" / "0.json").read_text())
    pixels = Image.fromarray(shapes(9)[0])
    pixels.save(root / "train" / "1.png")
    pixels.save(root / "train" / "0.png")
    (root / "train" / "1.json").write_text(json.dumps({**document, "imagePath": "1.png", "shapes": []}))
    data = parts_of("labelme", root)
    convert_data(data, tmp_path / "out", "yolo")
    names = sorted(path.name for path in (tmp_path / "out" / "images").rglob("*.png"))
    assert names == ["0.png", "0.png", "1.png"]


@pytest.mark.parametrize("target", TARGETS)
def test_the_folders_of_the_source_are_not_repeated(tmp_path: Path, target: str) -> None:
    root = write_tree("yolo", tmp_path / "data", 1)
    for kind in ("images", "labels"):
        (root / kind / "train").rename(root / kind / "train2017")
    (root / "images" / "train2017" / "train").mkdir()
    Image.fromarray(shapes(7)[0]).save(root / "images" / "train2017" / "train" / "0.png")
    (root / "images" / "0.png").write_bytes((root / "images" / "val" / "0.png").read_bytes())
    settings = root / "data.yaml"
    settings.write_text(settings.read_text().replace("images/train", "[images/train2017, images]"))
    convert_data(parts_of("yolo", root), tmp_path / "out", target)
    form = "{}/images" if target == "masks" else "images/{}"
    files = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png"))
    images = [file for file in files if "masks" not in file.split("/")]
    train = ["0.png", "0-2.png", "train/0.png", "val/0.png"]
    assert images == sorted([form.format("val") + "/0.png", *(f"{form.format('train')}/{name}" for name in train)])


def test_labels_of_images_below_a_folder_images_are_found_again(tmp_path: Path) -> None:
    """Ultralytics replaces the last `images` of a path by `labels`, and the source's own folders may have that name."""
    root = write_tree("yolo", tmp_path / "data")
    for folder in ("cam/Images/x/images", "cam/images_/x/images"):
        shutil.copytree(root / "images" / "val", root / "images" / "train" / folder)
        shutil.copytree(root / "labels" / "val", root / "images" / "train" / folder, dirs_exist_ok=True)
    before = parts_of("yolo", root)
    assert before["train"].items[0]["file_name"] == "images/train/0.png"
    convert_data(before, tmp_path / "out", "yolo")
    images = [path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.png")]
    assert len(images) == 2 + 2 + 4
    for path in images:
        assert [one.casefold() for one in path.parts].count("images") == 1
        assert (tmp_path / "out" / "labels" / Path(*path.parts[1:]).with_suffix(".txt")).is_file()
    after = parts_of("yolo", tmp_path / "out")
    for name, data in before.items():
        for item, other in zip(data.items, after[name].items, strict=True):
            assert torch.equal(class_map(item), class_map(other)) and len(item["classes"]) == len(other["classes"]) > 0

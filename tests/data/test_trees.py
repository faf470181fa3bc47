"""ADE20K, Cityscapes and folders of masks, in the layouts in which they are distributed."""

import os
import pickle
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_faim2f.data import (
    DatasetError,
    class_map,
    describe,
    find_bad_items,
    load_ade20k,
    load_cityscapes,
    load_folder,
)
from hf_faim2f.data.readers.cityscapes import CLASSES
from hf_faim2f.family import load_labels
from hf_faim2f.model.image_files_faim2f import IMAGE_FORMATS
from tests.support.image_files import photo, save, truncate


@pytest.fixture
def ade(tmp_path: Path) -> Path:
    """Three images of 20x30 whose maps have 0 and some values of 1..150."""
    root = tmp_path / "ADEChallengeData2016"
    rng = np.random.default_rng(0)
    for number, values in enumerate([[0, 1, 150], [3], [0]], start=1):
        for split in ("training", "validation"):
            name = f"ADE_{split[:3]}_{number:08d}"
            save(root / "images" / split / f"{name}.jpg", photo(20, 30, number))
            ids = rng.choice(values, (20, 30)).astype(np.uint8)
            save(root / "annotations" / split / f"{name}.png", ids)
    return root


def test_ade20k(ade: Path) -> None:
    for root in (ade, ade.parent, str(ade)):
        dataset = load_ade20k(root, "training")
        assert isinstance(dataset, datasets.Dataset) and len(dataset) == 3
    for index, classes in enumerate([[0, 149], [2], []]):
        item = dataset[index]
        name = f"ADE_tra_{index + 1:08d}"
        assert item["classes"].tolist() == classes and item["classes"].dtype == torch.int64
        assert (item["image_id"], item["file_name"]) == (name, f"{name}.jpg")
        assert (item["height"], item["width"]) == (20, 30)
        assert item["crowd"].tolist() == [False] * len(classes)
        assert item["hidden"] is None and item["areas"] is None
        written = np.array(Image.open(ade / "annotations" / "training" / f"{name}.png")).astype(int)
        np.testing.assert_array_equal(class_map(item).numpy(), written - 1)
        assert item["segments"].dtype == torch.int32
        assert set(item["segments"].unique().tolist()) - {-1} == set(range(len(classes)))
        shown = np.array(Image.open(ade / "images" / "training" / f"{name}.jpg").convert("RGB"))
        np.testing.assert_array_equal(item["image"].permute(1, 2, 0).numpy(), shown)


def test_description_survives_what_is_done_to_a_dataset(ade: Path) -> None:
    dataset = load_ade20k(ade)
    for derived in (dataset.select([1]), dataset.shuffle(seed=0), dataset.train_test_split(0.3, seed=0)["test"]):
        description = describe(derived)
        assert description.task == "semantic" and list(description.labels) == load_labels("ade20k")
        assert not description.things and not description.skipped
        assert description.id2label[149] == "flag"
        assert derived[0]["image"].shape == (3, 20, 30)
    with pytest.raises(ValueError, match="not read by hf_faim2f"):
        describe(dataset.with_format(None))


def test_reading_is_lazy(ade: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = open

    def spy(file: Any, *args: Any, **kwargs: Any) -> Any:
        opened.append(os.fspath(file) if isinstance(file, (str, os.PathLike)) else "")
        return real(file, *args, **kwargs)

    monkeypatch.setattr("builtins.open", spy)
    dataset = load_ade20k(ade)
    assert len(dataset.select([2])) == 1
    assert not [name for name in opened if name.endswith((".jpg", ".png"))]
    dataset.select([2])[0]
    read = [Path(name).name for name in opened if name.endswith((".jpg", ".png"))]
    assert sorted(read) == ["ADE_val_00000003.jpg", "ADE_val_00000003.png"]


def test_batches_slices_and_pickling(ade: Path) -> None:
    dataset = load_ade20k(ade)
    batch = dataset[:2]
    assert [len(classes) for classes in batch["classes"]] == [2, 1]
    assert torch.equal(batch["image"][1], dataset[1]["image"])
    items = dataset.__getitems__([2, 0])
    assert torch.equal(items[1]["segments"], dataset[0]["segments"])
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[0]["image"], dataset[0]["image"])


def test_ade20k_errors(ade: Path) -> None:
    with pytest.raises(DatasetError, match=re.escape(str(ade / "images" / "test"))):
        load_ade20k(ade, "test")
    missing = ade / "annotations" / "validation" / "ADE_val_00000002.png"
    missing.unlink()
    with pytest.raises(DatasetError, match=r"ADE_val_00000002\.jpg has no mask.*ADE_val_00000002\.png"):
        load_ade20k(ade)
    dataset = load_ade20k(ade, skip_bad=True)
    assert len(dataset) == 2 and [item["image_id"] for item in dataset] == ["ADE_val_00000001", "ADE_val_00000003"]
    (message,) = describe(dataset).skipped
    assert "ADE_val_00000002.jpg" in message


def test_unknown_class_wrong_size_wrong_mode_and_truncation_name_the_map(ade: Path) -> None:
    folder = ade / "annotations" / "validation"
    dataset = load_ade20k(ade)
    save(folder / "ADE_val_00000001.png", np.full((20, 30), 151, dtype=np.uint8))
    save(folder / "ADE_val_00000002.png", np.zeros((30, 20), dtype=np.uint8))
    save(folder / "ADE_val_00000003.png", photo(20, 30))
    for index, pattern in enumerate(["has the value 151", "30, 20.*20x30", "mode 'RGB'"]):
        with pytest.raises(DatasetError, match=rf"ADE_val_0000000{index + 1}\.png.*{pattern}"):
            dataset[index]
    truncate(ade / "images" / "validation" / "ADE_val_00000001.jpg")
    with pytest.raises(DatasetError, match=r"ADE_val_00000001\.jpg.*[Tt]runcated"):
        dataset[0]
    assert [bad.index for bad in find_bad_items(dataset)] == [0, 1, 2]


# Cityscapes


CITY_IDS = np.array(
    [
        [0, 3, 4, 7, 7, 26001, 26001, 26],
        [1, 7, 8, 8, 23, 26002, 24000, 24000],
        [2, 21, 21, 33001, 33001, 30, 29, 25],
    ]
)  # fmt: skip


@pytest.fixture
def city(tmp_path: Path) -> Path:
    for split, town in (("val", "lindau"), ("val", "munster"), ("train", "ulm")):
        name = f"{town}_000000_000019"
        save(tmp_path / "leftImg8bit" / split / town / f"{name}_leftImg8bit.png", photo(3, 8))
        base = tmp_path / "gtFine" / split / town / f"{name}_gtFine"
        labels = np.where(CITY_IDS < 1000, CITY_IDS, CITY_IDS // 1000)
        save(Path(f"{base}_labelIds.png"), labels.astype(np.uint8))
        save(Path(f"{base}_instanceIds.png"), CITY_IDS.astype(np.uint16))
    return tmp_path


CITY_CLASSES = np.array(
    [
        [-1, -1, -1, 0, 0, 13, 13, 13],
        [-1, 0, 1, 1, 10, 13, 11, 11],
        [-1, 8, 8, 18, 18, -1, -1, 12],
    ]
)  # fmt: skip


def test_cityscapes_semantic(city: Path) -> None:
    dataset = load_cityscapes(city)
    assert len(dataset) == 2 and len(load_cityscapes(city, "train")) == 1
    item = dataset[1]
    assert item["image_id"] == "munster_000000_000019"
    assert item["file_name"] == "munster/munster_000000_000019_leftImg8bit.png"
    np.testing.assert_array_equal(class_map(item).numpy(), CITY_CLASSES)
    assert item["classes"].tolist() == [0, 1, 8, 10, 11, 12, 13, 18] and not item["crowd"].any()
    description = describe(dataset)
    assert len(description.labels) == 19 and description.labels[13] == "car" and not description.things


def test_cityscapes_train_ids_give_the_same(city: Path) -> None:
    expected = load_cityscapes(city)[0]
    for path in city.rglob("*_labelIds.png"):
        train_ids = np.where(CITY_CLASSES < 0, 255, CITY_CLASSES).astype(np.uint8)
        save(path.with_name(path.name.replace("labelIds", "labelTrainIds")), train_ids)
        path.unlink()
    item = load_cityscapes(city)[0]
    assert torch.equal(item["segments"], expected["segments"]) and torch.equal(item["classes"], expected["classes"])


def test_cityscapes_panoptic(city: Path) -> None:
    dataset = load_cityscapes(city, task="panoptic")
    item = dataset[0]
    np.testing.assert_array_equal(class_map(item).numpy(), CITY_CLASSES)
    # By label or instance id: 7, 8, 21, 23, 25 and 26 (without instances, so crowds), 24000, 26001, 26002, 33001
    assert item["classes"].tolist() == [0, 1, 8, 10, 12, 13, 11, 13, 13, 18]
    assert item["crowd"].tolist() == [False] * 4 + [True] * 2 + [False] * 4
    assert describe(dataset).things == frozenset(range(11, 19))
    np.testing.assert_array_equal(item["segments"].numpy() == 7, CITY_IDS == 26001)


def test_cityscapes_instance(city: Path) -> None:
    dataset = load_cityscapes(city, task="instance")
    item = dataset[0]
    assert item["classes"].tolist() == [1, 2, 0, 2, 2, 7]
    assert item["crowd"].tolist() == [True, True, False, False, False, False]
    np.testing.assert_array_equal(item["segments"].numpy() == 3, CITY_IDS == 26001)
    np.testing.assert_array_equal(item["segments"].numpy() == 1, CITY_IDS == 26)
    assert describe(dataset).labels == ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
    assert describe(dataset).things == frozenset(range(8))


def test_cityscapes_table_is_the_official_one() -> None:
    official = pytest.importorskip("cityscapesscripts.helpers.labels").labels
    evaluated = {label.id: label for label in official if 0 <= label.trainId < 255}
    assert {label_id: evaluated[label_id].name for label_id in CLASSES} == CLASSES
    assert [evaluated[label_id].trainId for label_id in CLASSES] == list(range(19)) and len(evaluated) == 19
    assert [evaluated[label_id].hasInstances for label_id in CLASSES] == [False] * 11 + [True] * 8


def test_cityscapes_errors(city: Path) -> None:
    with pytest.raises(DatasetError, match="leftImg8bit/test"):
        load_cityscapes(city, "test")
    with pytest.raises(ValueError, match="task must be one of"):
        load_cityscapes(city, task="depth")  # type: ignore[arg-type]
    (path,) = city.rglob("lindau*_instanceIds.png")
    save(path, np.full((3, 8), 34001, dtype=np.uint16))
    with pytest.raises(DatasetError, match="lindau.*_instanceIds.png has the value 34001"):
        load_cityscapes(city, task="panoptic")[0]
    path.unlink()
    with pytest.raises(DatasetError, match="lindau.*_leftImg8bit.png has no map.*instanceIds"):
        load_cityscapes(city, task="instance")
    dataset = load_cityscapes(city, task="instance", skip_bad=True)
    assert len(dataset) == 1 and len(describe(dataset).skipped) == 1


# Folders


def write_folder(root: Path, masks: dict[str, np.ndarray], labels: str | None = "cat\ndog\n", mode: str = "L") -> Path:
    for index, (name, mask) in enumerate(masks.items()):
        save(root / "images" / f"{name}.jpg", photo(mask.shape[0], mask.shape[1], index))
        save(root / "masks" / f"{name}.png", mask, mode)
    if labels is not None:
        (root / "labels.txt").write_text(labels, encoding="utf-8")
    return root


@pytest.mark.parametrize("mode", ["L", "P"])
def test_folder_semantic(tmp_path: Path, mode: str) -> None:
    mask = np.array([[0, 0, 1], [255, 1, 1]], dtype=np.uint8)
    dataset = load_folder(write_folder(tmp_path, {"a": mask, "b": mask * 0}, mode=mode))
    assert describe(dataset).labels == ("cat", "dog") and dataset[0]["file_name"] == "a.jpg"
    assert dataset[0]["classes"].tolist() == [0, 1] and dataset[1]["classes"].tolist() == [0]
    assert dataset[0]["segments"].tolist() == [[0, 0, 1], [-1, 1, 1]]


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("JPEG", {}, "is a JPEG or lossy WebP file"),
        ("WEBP", {}, "is a JPEG or lossy WebP file"),
        ("WEBP", {"xmp": b"made with loss"}, "is a JPEG or lossy WebP file"),
        ("JPEG2000", {"quality_mode": "rates", "quality_layers": [20]}, "is compressed as JPEG2000, which may change"),
        ("AVIF", {}, "is compressed as AVIF, which may change"),
    ],
)
def test_a_map_that_was_compressed_with_loss_is_refused(
    tmp_path: Path, kind: str, options: dict[str, Any], words: str
) -> None:
    """Lossy compression gives pixels along edges the ids of other classes."""
    save(tmp_path / "images" / "a.png", photo(16, 16))
    (tmp_path / "masks").mkdir()
    ids = np.zeros((16, 16), dtype=np.uint8)
    ids[5:11, 5:11] = 3
    if kind not in IMAGE_FORMATS:
        pytest.skip("This build of Pillow does not decode the format.")
    Image.fromarray(ids).save(tmp_path / "masks" / "a.png", kind, **options)
    data = load_folder(tmp_path, ["a", "b", "c", "d", "e"])
    with pytest.raises(DatasetError, match=f"a.png {words}"):
        data[0]
    Image.fromarray(ids).save(tmp_path / "masks" / "a.png", "PNG")
    assert torch.equal(class_map(data[0]), torch.from_numpy(ids).long())


def test_folder_reduced_labels(tmp_path: Path) -> None:
    mask = np.array([[0, 2, 1], [255, 2, 2]], dtype=np.uint8)
    item = load_folder(write_folder(tmp_path, {"a": mask}), reduce_labels=True)[0]
    assert class_map(item).tolist() == [[-1, 1, 0], [-1, 1, 1]]


def test_a_value_to_ignore_that_is_a_class_is_refused(tmp_path: Path) -> None:
    """Ignoring it would rename the classes of all other values, or leave one without pixels."""
    write_folder(tmp_path, {"a": np.array([[0, 1, 1]], dtype=np.uint8)}, labels="car\nsky\n")
    for value, words in ((0, "0 to 1: name only the classes from 1 on and pass --reduce-labels"), (1, "is the last")):
        with pytest.raises(DatasetError, match=f"The value {value} is to be ignored .*{words}"):
            load_folder(tmp_path, ignore_index=value)
    with pytest.raises(DatasetError, match="value 2 is to be ignored .* 1 to 2: if its name is the last"):
        load_folder(tmp_path, ignore_index=2, reduce_labels=True)
    assert class_map(load_folder(tmp_path, ignore_index=0, reduce_labels=True)[0]).tolist() == [[-1, 0, 0]]
    assert class_map(load_folder(tmp_path, ["car"], ignore_index=1)[0]).tolist() == [[0, -1, -1]]
    # Numbers of instances are no classes, except for red.
    assert load_folder(tmp_path, ["car"], "instance", ignore_index=0)[0]["segments"].tolist() == [[-1, 0, 0]]
    colors = np.zeros((1, 2, 3), dtype=np.uint8)
    colors[0, 1] = (1, 1, 0)
    write_folder(tmp_path / "red", {"a": colors}, labels="car\nsky\n")
    assert load_folder(tmp_path / "red", task="instance")[0]["classes"].tolist() == [0, 1]
    with pytest.raises(DatasetError, match="The value 0 is to be ignored"):
        load_folder(tmp_path / "red", task="instance", ignore_index=0)[0]


def test_the_usual_value_to_ignore_yields_to_a_class(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": np.array([[0, 255]], dtype=np.uint8)}, labels="".join(f"c{k}\n" for k in range(256)))
    assert class_map(load_folder(tmp_path)[0]).tolist() == [[0, 255]]


def test_folder_instances_of_one_class(tmp_path: Path) -> None:
    mask = np.array([[0, 7, 7], [500, 0, 9]], dtype=np.uint16)
    item = load_folder(write_folder(tmp_path, {"a": mask}), labels=["cell"], task="instance")[0]
    assert item["segments"].tolist() == [[-1, 0, 0], [2, -1, 1]] and item["classes"].tolist() == [0, 0, 0]
    assert describe(load_folder(tmp_path, ["cell"], "instance")).things == frozenset({0})


def test_folder_instances_of_several_classes(tmp_path: Path) -> None:
    mask = np.array([[0, 1000, 1001], [2999, 0, 1001]], dtype=np.uint16)
    item = load_folder(write_folder(tmp_path, {"a": mask}), task="instance")[0]
    assert item["segments"].tolist() == [[-1, 0, 1], [2, -1, 1]] and item["classes"].tolist() == [0, 0, 1]


def test_folder_instances_in_colors(tmp_path: Path) -> None:
    """Masks as in transformers' instance segmentation scripts: the class in red, the instance in green."""
    mask = np.zeros((2, 3, 3), dtype=np.uint8)
    mask[0, 1:] = [2, 1, 77]
    mask[1, 0] = [2, 2, 0]
    mask[1, 2] = [1, 3, 0]
    write_folder(tmp_path, {"a": mask})
    item = load_folder(tmp_path, task="instance", reduce_labels=True)[0]
    assert item["segments"].tolist() == [[-1, 1, 1], [2, -1, 0]] and item["classes"].tolist() == [0, 1, 1]
    with pytest.raises(DatasetError, match="a.png has the red value 2"):
        load_folder(tmp_path, task="instance")[0]


@pytest.mark.parametrize(("mask", "value"), [([[5]], 5), ([[999]], 999), ([[3000]], 3000), ([[0, 60000, 1000]], 60000)])
def test_folder_instance_values_that_mean_nothing(tmp_path: Path, mask: list[list[int]], value: int) -> None:
    write_folder(tmp_path, {"a": np.array(mask, dtype=np.uint16)})
    with pytest.raises(DatasetError, match=f"a.png has the value {value}, which no instance"):
        load_folder(tmp_path, task="instance")[0]


def test_a_file_name_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    """As in an archive of an old system."""
    write_folder(tmp_path, {"a": np.zeros((2, 3), dtype=np.uint8)})
    for name in ("images/a.jpg", "masks/a.png"):
        os.rename(tmp_path / name, os.fsencode(tmp_path / name).replace(b"/a.", b"/caf\xe9."))
    with pytest.raises(
        DatasetError, match=r"The file name '.*caf\\udce9.*' is not UTF-8: rename the file, or remove it"
    ):
        load_folder(tmp_path)


def test_folder_errors(tmp_path: Path) -> None:
    mask = np.array([[0, 1, 2, 9, 10, 11, 12, 13]], dtype=np.uint8)
    write_folder(tmp_path, {"a": mask, "b": mask}, labels=None)
    with pytest.raises(DatasetError, match="labels.txt"):
        load_folder(tmp_path)
    (tmp_path / "labels.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DatasetError, match="labels.txt cannot be read as UTF-8"):
        load_folder(tmp_path)
    (tmp_path / "labels.txt").write_text("\n\n")
    with pytest.raises(DatasetError, match="labels.txt has no class name"):
        load_folder(tmp_path)
    with pytest.raises(DatasetError, match="a.png has the values 2, 9, 10, 11, 12 and others, which no class"):
        load_folder(tmp_path, ["cat", "dog"])[0]
    with pytest.raises(ValueError, match="panoptic"):
        load_folder(tmp_path, ["cat"], "panoptic")
    with pytest.raises(DatasetError, match="no folder .*pictures"):
        load_folder(tmp_path, ["cat"], images="pictures")
    save(tmp_path / "images" / "a.png", photo(1, 8))
    with pytest.raises(DatasetError, match=r"a\.png and a\.jpg share|a\.jpg and a\.png share"):
        load_folder(tmp_path, ["cat"])
    (tmp_path / "masks" / "b.png").unlink()
    dataset = load_folder(tmp_path, ["cat"], skip_bad=True)
    assert len(dataset) == 1 and len(describe(dataset).skipped) == 2
    (tmp_path / "masks" / "a.png").rename(tmp_path / "masks" / "c.png")
    with pytest.raises(DatasetError, match="no image that could be used"):
        load_folder(tmp_path, ["cat"], skip_bad=True)

"""Datasets in the Hub's form: Parquet files written by the tests, and `datasets.Dataset` objects."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from hf_faim2f.data import DatasetError, class_map, describe, load_ade20k_parquet, load_hub
from hf_faim2f.data.dataset import reader_of
from hf_faim2f.data.readers.hub import files_of_split, in_split
from hf_faim2f.errors import MissingPartError
from tests.support.hub_data import MASK, memory, png, rows, write_parquet
from tests.support.image_files import photo, save

LABELS = ["a", "b", "c"]


def check(dataset: datasets.Dataset, count: int = 3) -> None:
    assert len(dataset) == count
    for index, item in enumerate(dataset):
        np.testing.assert_array_equal(item["image"].permute(1, 2, 0).numpy(), photo(2, 3, index))
        assert class_map(item).tolist() == [[0, 1, 1], [-1, 0, 2]]
        assert (item["image_id"], item["file_name"]) == (f"picture-{index}", f"picture-{index}.png")


@pytest.mark.parametrize("as_images", [True, False])
def test_parquet_files(tmp_path: Path, as_images: bool) -> None:
    path = write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", rows(), as_images)
    write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", rows(1), as_images)
    for source in (path, str(path), [path]):
        check(load_hub(source, labels=LABELS))
    check(load_hub(tmp_path, "train", labels=LABELS))
    check(load_hub(tmp_path, "validation", labels=LABELS), 1)
    assert len(load_hub(tmp_path, labels=LABELS)) == 4
    (tmp_path / "train").mkdir()
    path.rename(tmp_path / "train" / "0000.parquet")
    check(load_hub(tmp_path / "train", "train", labels=LABELS))
    (tmp_path / "train" / "0000.parquet").rename(path)
    assert describe(load_hub(path, labels=LABELS)).labels == ("a", "b", "c")


@pytest.mark.parametrize(
    ("split", "names"),
    [
        (
            "train",
            [
                "train-0.parquet",
                "training_2.parquet",
                "sub/train/0000.parquet",
                "train/part-1.parquet",
                "train1/0.parquet",
                "train1-0.parquet",
                "train10/0.parquet",
                "train10-0.parquet",
            ],
        ),
        ("trainval", ["trainval-0.parquet"]),
        ("validation", ["training_data/validation-0.parquet"]),
        ("val", ["training_data/validation-0.parquet"]),
        ("test", ["train/test-0.parquet", "fold1/test-0.parquet"]),
        ("fold1", ["fold1/test-0.parquet"]),
        ("train1", ["train1/0.parquet", "train1-0.parquet"]),
    ],
)
def test_the_split_of_a_file(split: str, names: list[str]) -> None:
    """Its own name decides before those of its folders, and a split is not the beginning of another word."""
    files = ["train-0.parquet", "training_2.parquet", "sub/train/0000.parquet", "train/part-1.parquet",
             "trainval-0.parquet", "training_data/validation-0.parquet", "train/test-0.parquet",
             "fold1/test-0.parquet", "fold10/0.parquet", "train1/0.parquet", "train1-0.parquet", "train10/0.parquet",
             "train10-0.parquet"]  # fmt: skip
    assert [name for name in files if in_split(Path(name).parts, split)] == names


@pytest.mark.parametrize("name", ["valid", "val", "dev"])
def test_a_split_may_have_another_usual_name(name: str, tmp_path: Path) -> None:
    files = [tmp_path / f"{split}.parquet" for split in ("train", name, "test")]
    assert files_of_split(files, tmp_path, "validation") == [files[1]]
    files.append(tmp_path / "validation-0.parquet")  # the name itself comes first
    assert files_of_split(files, tmp_path, "validation") == [files[3]]
    assert files_of_split(files[:1], tmp_path, "validation") == []
    with pytest.raises(DatasetError, match="has no split 'validation', but .*: name one of them"):
        files_of_split([tmp_path / "dev.parquet", tmp_path / "eval.parquet"], tmp_path, "validation")
    for other in ("test-dev", "train_extra", "val_unseen"):  # splits of their own
        assert files_of_split(files, tmp_path, other) == []


def test_bytes_columns(tmp_path: Path) -> None:
    columns = {name: [value["bytes"] for value in values] for name, values in rows(2, "img", "mask").items()}
    dataset = load_hub(write_parquet(tmp_path / "a.parquet", columns, as_images=False), labels=LABELS)
    assert class_map(dataset[1]).tolist() == [[0, 1, 1], [-1, 0, 2]]


def test_dataset_objects_and_files_that_they_name(tmp_path: Path) -> None:
    for index in range(3):
        save(tmp_path / f"picture-{index}.png", photo(2, 3, index))
    columns = {"image": [str(tmp_path / f"picture-{k}.png") for k in range(3)], "label": rows()["annotation"]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    dataset = datasets.Dataset.from_dict(columns, features)
    check(load_hub(dataset, labels=LABELS))
    assert load_hub(dataset.shuffle(seed=1), labels=LABELS)[0]["image"].shape == (3, 2, 3)


def test_a_row_cannot_name_a_file_of_this_machine(tmp_path: Path) -> None:
    columns = rows()
    columns["image"][1] = {"bytes": None, "path": str(save(tmp_path / "private.png", photo(2, 3)))}
    dataset = load_hub(write_parquet(tmp_path / "a.parquet", columns, as_images=False), labels=LABELS)
    assert dataset[0]["image"].shape == (3, 2, 3)
    with pytest.raises(DatasetError, match=r"private\.png in place of an image's contents"):
        dataset[1]


def test_downloaded_files_may_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Like for a folder of images on the Hub, rows can refer to files in the cache."""
    monkeypatch.setattr("hf_faim2f.data.readers.hub.HF_HUB_CACHE", str(tmp_path / "hub"))
    columns = rows()
    columns["image"][1] = {"bytes": None, "path": str(save(tmp_path / "hub" / "picture-1.png", photo(2, 3, 1)))}
    check(load_hub(write_parquet(tmp_path / "a.parquet", columns, as_images=False), labels=LABELS))


def test_ade20k_as_on_the_hub(tmp_path: Path) -> None:
    ids = np.array([[0, 1, 150]], dtype=np.uint8)
    columns = {
        "image": [{"bytes": png(photo(1, 3)), "path": "ADE_val_00000001.jpg"}],
        "annotation": [{"bytes": png(ids), "path": "ADE_val_00000001.png"}],
        "scene_category": ["street"],
    }
    dataset = load_ade20k_parquet(write_parquet(tmp_path / "validation.parquet", columns))
    assert class_map(dataset[0]).tolist() == [[-1, 0, 149]] and dataset[0]["image_id"] == "ADE_val_00000001"
    assert len(describe(dataset).labels) == 150


def test_instances(tmp_path: Path) -> None:
    ids = np.array([[[0, 0, 0], [1, 1, 0], [2, 2, 0]]], dtype=np.uint8)
    columns = {
        "image": [{"bytes": png(photo(1, 3)), "path": "x.png"}],
        "annotation": [{"bytes": png(ids), "path": "y.png"}],
    }
    path = write_parquet(tmp_path / "a.parquet", columns)
    item = load_hub(path, labels=["person", "car"], task="instance", reduce_labels=True)[0]
    assert item["segments"].tolist() == [[-1, 0, 1]] and item["classes"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("image", "annotation"),
    [("image", "label"), ("IMG", "Mask"), ("photo", "semantic_segmentation"), ("image", "whatever"), ("odd", "mask")],
)
def test_columns_are_guessed(image: str, annotation: str) -> None:
    features = datasets.Features({annotation: datasets.Image(), image: datasets.Image()})
    check(load_hub(datasets.Dataset.from_dict(rows(3, image, annotation), features), labels=LABELS))


@pytest.mark.parametrize(
    ("task", "columns", "expected"),
    [
        ("instance", ("semantic_mask", "instance_mask"), "instance_mask"),
        ("instance", ("semantic_segmentation", "Instances", "annotation"), "Instances"),
        ("instance", ("semantic_mask", "mask"), "mask"),
        ("instance", ("instance_a", "instance_b", "annotation"), "annotation"),
        ("instance", ("semantic_mask",), "semantic_mask"),
        ("instance", ("instance_a", "instance_b"), None),
        ("instance", ("semantic_mask", "depth"), None),
        ("semantic", ("instance_mask", "semantic_mask"), "semantic_mask"),
    ],
)
def test_the_column_of_the_task(task: Any, columns: tuple[str, ...], expected: str | None) -> None:
    values = {"image": rows(1)["image"]}
    for number, name in enumerate(columns):
        values[name] = [{"bytes": png(np.full((2, 3), 1000 + number, dtype=np.uint16)), "path": None}]
    dataset = datasets.Dataset.from_dict(values, datasets.Features({name: datasets.Image() for name in values}))
    if expected is None:
        with pytest.raises(DatasetError, match=r"segmentations in .*: rename it to annotation, or pass image_column"):
            load_hub(dataset, labels=LABELS, task=task)
    else:
        assert reader_of(load_hub(dataset, labels=LABELS, task=task)).source_columns == ("image", expected)


def test_several_splits_and_streams_are_refused() -> None:
    features = datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()})
    dataset = datasets.Dataset.from_dict(rows(), features)
    with pytest.raises(DatasetError, match="not DatasetDict: pass one of 'train', 'test'"):
        load_hub(datasets.DatasetDict(train=dataset, test=dataset), labels=LABELS)  # type: ignore[arg-type]
    with pytest.raises(DatasetError, match="not IterableDataset: do not stream it"):
        load_hub(dataset.to_iterable_dataset(), labels=LABELS)  # type: ignore[arg-type]


def test_only_the_two_columns_are_read() -> None:
    columns = {**rows(), "depth": [{"bytes": b"broken", "path": None}] * 3, "caption": ["x"] * 3}
    features = {name: datasets.Image() if name != "caption" else datasets.Value("string") for name in columns}
    check(load_hub(datasets.Dataset.from_dict(columns, datasets.Features(features)), labels=LABELS))


def test_columns_that_cannot_be_told_are_listed() -> None:
    three = {"first": rows()["image"], "second": rows()["image"], "third": rows()["image"], "text": ["x"] * 3}
    features = {name: datasets.Image() if name != "text" else datasets.Value("string") for name in three}
    dataset = datasets.Dataset.from_dict(three, datasets.Features(features))
    listing = r"first \(image\), second \(image\), third \(image\), text \(string\)"
    with pytest.raises(DatasetError, match=listing):
        load_hub(dataset, labels=LABELS)
    with pytest.raises(DatasetError, match=rf"no column 'mask'.*{listing}"):
        load_hub(dataset, labels=LABELS, image_column="first", map_column="mask")
    with pytest.raises(DatasetError, match=listing):
        load_hub(dataset, labels=LABELS, image_column="first", map_column="first")
    named = load_hub(dataset, labels=LABELS, image_column="second", map_column="third")
    with pytest.raises(DatasetError, match="mode 'RGB'"):
        named[0]
    only_text = datasets.Dataset.from_dict({"text": ["x"]})
    with pytest.raises(DatasetError, match=r"column of images in .* cannot be determined.*text \(string\)"):
        load_hub(only_text, labels=LABELS)


def test_bad_rows_are_named(tmp_path: Path) -> None:
    columns = rows(5)
    columns["image"][0]["bytes"] = columns["image"][0]["bytes"][:40]
    columns["annotation"][1]["bytes"] = png(MASK + 3)
    columns["annotation"][2]["bytes"] = png(MASK.T)
    columns["annotation"][3] = None
    dataset = load_hub(write_parquet(tmp_path / "a.parquet", columns, as_images=False), labels=LABELS)
    for index, message in enumerate(
        [
            "picture-0.png",
            "map-1.png has the values",
            "map-2.png has shape",
            "picture-3 has nothing where an image is expected",
        ]
    ):
        with pytest.raises(DatasetError, match=message):
            dataset[index]
    assert torch.equal(dataset[4]["image"], torch.from_numpy(photo(2, 3, 4)).permute(2, 0, 1))


def test_splits_that_are_not_there_are_missing_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a folder and of a dataset on the Hub, by the words of `datasets`. Other errors are no missing part."""
    path = write_parquet(tmp_path / "data" / "train-0.parquet", rows())
    with pytest.raises(MissingPartError, match="no Parquet file of the split 'test'"):
        load_hub(path.parent, "test", labels=LABELS)
    load = datasets.load_dataset

    def of_file(name: str, split: str) -> Any:
        return load("parquet", data_files={"train": str(path)}, split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", of_file)
    assert len(load_hub("someone/scenes", "train", labels=LABELS)) == 3
    with pytest.raises(MissingPartError, match='Unknown split "test"'):
        load_hub("someone/scenes", "test", labels=LABELS)
    path.write_bytes(b"damaged")
    with pytest.raises(DatasetError, match="loading it from the Hub failed") as error:
        load_hub("someone/scenes", "test", labels=LABELS)
    assert not isinstance(error.value, MissingPartError)


def test_bad_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"nowhere\.parquet cannot be read"):
        load_hub(tmp_path / "nowhere.parquet", labels=LABELS)
    with pytest.raises(DatasetError, match="has no Parquet file of the split 'train'"):
        load_hub(tmp_path, "train", labels=LABELS)
    with pytest.raises(
        DatasetError, match="someone/something is not a local Parquet file, and loading it from the Hub"
    ):
        load_hub("someone/something", "train", labels=LABELS)
    good = write_parquet(tmp_path / "a.parquet", rows())
    bad = tmp_path / "b.parquet"
    bad.write_bytes(good.read_bytes()[:300])
    with pytest.raises(DatasetError, match=r"b\.parquet cannot be read as a Parquet file"):
        load_hub(tmp_path, labels=LABELS)
    dataset = load_hub(tmp_path, labels=LABELS, skip_bad=True)
    check(dataset)
    assert "b.parquet" in describe(dataset).skipped[0]
    good.unlink()
    with pytest.raises(DatasetError, match="None of the Parquet files"):
        load_hub(tmp_path, labels=LABELS, skip_bad=True)
    other = write_parquet(tmp_path / "a.parquet", {"text": ["x"]})
    write_parquet(tmp_path / "b.parquet", rows(1))
    with pytest.raises(DatasetError, match=f"{other}.* cannot be read"):
        load_hub(tmp_path, labels=LABELS)


def test_rows_without_file_names_have_their_numbers(tmp_path: Path) -> None:
    memory(3).to_parquet(str(tmp_path / "a.parquet"))
    bare = {
        name: [png(photo(2, 3, k)) if name == "image" else png(MASK) for k in range(3)] for name in ("image", "label")
    }
    for source in (tmp_path / "a.parquet", memory(3), write_parquet(tmp_path / "b.parquet", bare, as_images=False)):
        dataset = load_hub(source, labels=LABELS)
        for index, item in enumerate(dataset):
            np.testing.assert_array_equal(item["image"].permute(1, 2, 0).numpy(), photo(2, 3, index))
            assert (item["image_id"], item["file_name"]) == (index, str(index))
    # A subset keeps the ids of the whole.
    assert load_hub(memory(3), labels=LABELS).select([2])[0]["image_id"] == 2
    shuffled = load_hub(memory(9).shuffle(seed=1), labels=LABELS)
    for item in shuffled:
        np.testing.assert_array_equal(item["image"].permute(1, 2, 0).numpy(), photo(2, 3, item["image_id"]))
    assert sorted(item["image_id"] for item in shuffled) == list(range(9)) != [item["image_id"] for item in shuffled]


@pytest.mark.parametrize("paths", [["a/1.png", "b/1.png"], ["1.png", "1.jpg"], ["1.png", None]])
def test_rows_of_equal_stems_have_their_numbers(paths: list[str | None]) -> None:
    dataset = load_hub(memory(2, paths), labels=LABELS)
    assert [item["image_id"] for item in dataset] == [0, 1]
    assert dataset[0]["file_name"] == "1.png"


@pytest.mark.parametrize(
    ("own", "expected"),
    [(["x", "y"], ["x", "y"]), ([7, 5], [7, 5]), (["x", "x"], [0, 1]), (["x", None], [0, 1]), ([0.5, 1.5], [0, 1])],
)
def test_ids_that_rows_have(own: list[Any], expected: list[Any]) -> None:
    dataset = load_hub(memory(2).add_column("image_id", own), labels=LABELS)
    assert [item["image_id"] for item in dataset] == expected


def test_an_error_names_the_row(tmp_path: Path) -> None:
    data = memory(2).to_dict()
    data["label"][1] = {"bytes": png(np.full((2, 3), 9, dtype=np.uint8)), "path": None}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    dataset = load_hub(datasets.Dataset.from_dict(data, features), labels=LABELS)
    with pytest.raises(DatasetError, match="the image with the id 1 has the value 9"):
        dataset[1]

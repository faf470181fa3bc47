"""Training items read in several processes, with and without broken items."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hf_faim2f.data import (
    DatasetError,
    Item,
    LargeScaleJitter,
    RandomFlip,
    SSDColorJitter,
    TrainingItems,
    find_bad_items,
    load_folder,
    without_bad_items,
)
from tests.support.image_files import photo, save, truncate

COUNT = 6
STEPS = (RandomFlip(), LargeScaleJitter(16, 16), SSDColorJitter())


@pytest.fixture
def dataset(tmp_path: Path) -> datasets.Dataset:
    for index in range(COUNT):
        mask = np.random.default_rng(index).integers(0, 2, (20, 20)).astype(np.uint8)
        save(tmp_path / "images" / f"{index}.jpg", photo(20, 20, index))
        save(tmp_path / "masks" / f"{index}.png", mask)
    return load_folder(tmp_path, ["a", "b"])


def first(items: list[Item]) -> Item:
    return items[0]


def read_all(items: TrainingItems) -> list[Item]:
    return [items[index] for index in range(len(items))]


def loader(items: TrainingItems, workers: int, persistent: bool = False) -> DataLoader:
    return DataLoader(items, batch_size=1, num_workers=workers, collate_fn=first, persistent_workers=persistent)


def same(some: list[Item], others: list[Item]) -> bool:
    return all(torch.equal(a["image"], b["image"]) for a, b in zip(some, others, strict=True))


def test_items_depend_on_seed_epoch_and_index_alone(dataset: datasets.Dataset) -> None:
    alone = read_all(TrainingItems(dataset, STEPS, seed=3))
    assert len(alone) == COUNT
    items = TrainingItems(dataset, STEPS, seed=3)
    assert torch.equal(items[4]["image"], alone[4]["image"])  # in another order
    assert torch.equal(items[-2]["image"], alone[4]["image"])
    assert same(list(loader(items, workers=2)), alone)
    assert not same(read_all(TrainingItems(dataset, STEPS, seed=4)), alone)
    same_picture = TrainingItems(dataset.select([0] * 8), STEPS)
    assert not same([same_picture[k] for k in range(7)], [same_picture[k + 1] for k in range(7)])
    with pytest.raises(IndexError):
        items[COUNT]


def test_workers_that_stay_see_the_epoch_change(dataset: datasets.Dataset) -> None:
    items = TrainingItems(dataset, STEPS)
    batches = loader(items, workers=2, persistent=True)
    epochs = []
    for epoch in (0, 1, 0):
        items.set_epoch(epoch)
        epochs.append(list(batches))
    assert same(epochs[0], epochs[2]) and not same(epochs[0], epochs[1])


def break_some(tmp_path: Path) -> None:
    truncate(tmp_path / "images" / "1.jpg")
    save(tmp_path / "masks" / "5.png", np.zeros((3, 3), dtype=np.uint8))


def test_a_broken_item_stops_a_training_that_does_not_skip(dataset: datasets.Dataset, tmp_path: Path) -> None:
    break_some(tmp_path)
    items = TrainingItems(dataset, STEPS)
    with pytest.raises(DatasetError, match=r"1\.jpg"):
        items[1]
    with pytest.raises(DatasetError, match=r"1\.jpg"):  # including errors from a worker
        list(loader(items, workers=1))


@pytest.mark.parametrize("workers", [0, 2])
def test_skipping_puts_the_next_in_place_and_counts(dataset: datasets.Dataset, tmp_path: Path, workers: int) -> None:
    break_some(tmp_path)
    items = TrainingItems(dataset, skip_bad=True)
    assert not items.bad_items()
    for _ in range(2):
        ids = [item["image_id"] for item in loader(items, workers)]
        assert ids == ["0", "2", "2", "3", "4", "0"]
    bad = items.bad_items()
    assert [entry.index for entry in bad] == [1, 5]
    assert "1.jpg" in bad[0].error and "5.png" in bad[1].error


def test_nothing_left(dataset: datasets.Dataset, tmp_path: Path) -> None:
    for path in (tmp_path / "images").iterdir():
        truncate(path)
    with pytest.raises(DatasetError, match="None of the 6 images can be read"):
        TrainingItems(dataset, skip_bad=True)[2]
    with pytest.raises(DatasetError, match=r"None of the 6 images can be used.*0\.jpg"):
        without_bad_items(dataset)


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_everything_beforehand_is_exact(dataset: datasets.Dataset, tmp_path: Path, workers: int) -> None:
    assert find_bad_items(dataset, workers) == []
    assert without_bad_items(dataset) == (dataset, [])
    break_some(tmp_path)
    good, bad = without_bad_items(dataset, workers)
    assert [item["image_id"] for item in good] == ["0", "2", "3", "4"]
    assert [entry.index for entry in bad] == [1, 5] and "5.png has shape (3, 3)" in bad[1].error

"""Segments as a map with covered layers, compared with stacks of binary masks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_faim2f.data.item import (
    MOST_LAYERS,
    Item,
    binary_masks,
    class_map,
    drop_vanished,
    index_values,
    keep_segments,
    make_item,
    paint_masks,
    segment_areas,
    segment_mask,
)


def random_masks(seed: int, count: int, height: int = 9, width: int = 7) -> np.ndarray:
    """(count, height, width) bool; about half of each image is covered, so masks overlap, and some may be empty."""
    rng = np.random.default_rng(seed)
    return rng.random((count, height, width)) < rng.choice([0, 0.02, 0.5, 1], (count, 1, 1))


def item_of(masks: np.ndarray, order: list[int] | None = None, classes: list[int] | None = None) -> Item:
    """An item with these masks, painted in this order."""
    count, height, width = masks.shape
    segments, hidden = paint_masks(((k, masks[k]) for k in (order or range(count))), height, width)
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, height, width), dtype=np.uint8))
    return make_item(image, segments, classes or [k % 3 for k in range(count)], 1, "a.png", hidden)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(0, 6))
def test_painting_keeps_every_mask_and_the_order(seed: int, count: int) -> None:
    masks = random_masks(seed, count)
    order = np.random.default_rng(seed).permutation(count).tolist()
    item = item_of(masks, order)
    np.testing.assert_array_equal(binary_masks(item).numpy(), masks)
    for number in range(count):
        np.testing.assert_array_equal(segment_mask(item, number).numpy(), masks[number])
    np.testing.assert_array_equal(segment_areas(item).numpy(), masks.sum((1, 2)))
    topmost = np.full(masks.shape[1:], -1)
    for number in order:
        topmost[masks[number]] = number
    np.testing.assert_array_equal(item["segments"].numpy(), topmost)
    depth = masks.sum(0).max(initial=0)
    hidden = item["hidden"]
    assert (0 if hidden is None else len(hidden)) == max(0, depth - 1)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(0, 6), data=st.data())
def test_keeping_some_is_painting_only_those(seed: int, count: int, data: st.DataObject) -> None:
    keep = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=bool)
    masks = random_masks(seed, count)
    item = item_of(masks)
    item["areas"] = torch.arange(count, dtype=torch.float64)
    item["crowd"] = torch.arange(count) % 2 == 0
    kept, expected = keep_segments(item, torch.from_numpy(keep)), item_of(masks[keep])
    assert torch.equal(kept["segments"], expected["segments"])
    assert torch.equal(binary_masks(kept), torch.from_numpy(masks[keep]))
    assert (kept["hidden"] is None) == (expected["hidden"] is None)
    assert torch.equal(kept["classes"], item["classes"][torch.from_numpy(keep)])
    assert torch.equal(kept["crowd"], item["crowd"][torch.from_numpy(keep)])
    assert kept["areas"] is not None and kept["areas"].tolist() == np.flatnonzero(keep).tolist()
    # The arguments are not modified.
    np.testing.assert_array_equal(binary_masks(item).numpy(), masks)


def test_vanished_segments_are_dropped_and_covered_ones_are_not() -> None:
    masks = np.zeros((4, 3, 3), dtype=bool)
    masks[1, 0] = masks[2, 0] = True  # 2 covers 1 completely; 0 and 3 have no pixels
    item = drop_vanished(item_of(masks, classes=[5, 6, 7, 8]))
    assert item["classes"].tolist() == [6, 7]
    np.testing.assert_array_equal(binary_masks(item).numpy(), masks[1:3])


def test_class_map() -> None:
    masks = np.zeros((2, 2, 2), dtype=bool)
    masks[0, 0] = masks[1, :, 0] = True
    assert class_map(item_of(masks, classes=[4, 9])).tolist() == [[9, 4], [9, -1]]
    assert class_map(item_of(masks[:0])).tolist() == [[-1, -1], [-1, -1]]


def test_depth_is_bounded() -> None:
    full = np.ones((2, 2), dtype=bool)
    segments, hidden = paint_masks(((k, full) for k in range(MOST_LAYERS + 1)), 2, 2)
    assert hidden is not None and len(hidden) == MOST_LAYERS and segments.unique().tolist() == [MOST_LAYERS]
    with pytest.raises(ValueError, match="more than 65 segments"):
        paint_masks(((k, full) for k in range(MOST_LAYERS + 2)), 2, 2)


def test_the_layers_of_a_large_image_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_faim2f.data.item.MOST_LAYER_VALUES", 3 * 4)
    full = np.ones((2, 2), dtype=bool)
    _, hidden = paint_masks(((k, full) for k in range(4)), 2, 2)
    assert hidden is not None and hidden.tolist() == [[[k, k], [k, k]] for k in range(3)]
    with pytest.raises(ValueError, match="more than 4 segments lie on one pixel of an image of 2x2 pixels"):
        paint_masks(((k, full) for k in range(5)), 2, 2)


@pytest.mark.parametrize("values", [[0, 1, 255], [-5, 0, 7], [26000, 26001, 33000], [0, 256**3 - 1], [3]])
def test_index_values(values: list[int]) -> None:
    ids = torch.from_numpy(np.random.default_rng(0).choice(values, (20, 30)))
    found, places = index_values(ids)
    assert found == values
    assert torch.equal(torch.tensor(found)[places.long()], ids)
    assert index_values(torch.zeros((0, 3), dtype=torch.int64))[0] == []

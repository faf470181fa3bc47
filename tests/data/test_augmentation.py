"""Augmentations keep image and map aligned, only draw from the generator, and use the published numbers."""

import colorsys
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Generator, Tensor

from hf_faim2f.data import Item, binary_masks, class_map, drop_vanished, make_item, paint_masks
from hf_faim2f.data.augmentation import (
    AUGMENTATIONS,
    GRAY,
    LargeScaleJitter,
    RandomCrop,
    RandomFlip,
    ResizeShortestEdge,
    SSDColorJitter,
    augment,
    coco_augmentations,
    focoos_augmentations,
    from_config,
    mask2former_semantic_augmentations,
    resize_item,
    scale_saturation,
    to_config,
    turn_hue,
)
from tests.support.image_files import photo

NUM_CLASSES = 12
# A color for each class; the last one, selected by index -1, is the padding's.
COLORS = torch.cat(
    [torch.randint(0, 256, (NUM_CLASSES, 3), generator=Generator().manual_seed(3)), torch.full((1, 3), GRAY)]
).to(torch.uint8)


def generator(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def colored(segments: Tensor, classes: list[int], hidden: Tensor | None = None) -> Item:
    """An item whose image shows the color of each pixel's class."""
    item = make_item(torch.zeros((3, *segments.shape), dtype=torch.uint8), segments, classes, 5, "a.png", hidden)
    item["image"] = COLORS[class_map(item)].permute(2, 0, 1).contiguous()
    item["areas"] = torch.ones(len(classes), dtype=torch.float64)
    return item


def blocks(seed: int, height: int, width: int, side: int) -> Item:
    """Squares of random classes, one segment per class, and void pixels."""
    rng = np.random.default_rng(seed)
    classes = rng.permutation(NUM_CLASSES)[:6].tolist()
    coarse = rng.integers(-1, 6, (-(-height // side), -(-width // side)))
    segments = np.kron(coarse, np.ones((side, side)))[:height, :width].astype(np.int32)
    return drop_vanished(colored(torch.from_numpy(segments), classes))


def overlapping() -> Item:
    """A disk on a square on a band, 40x50."""
    y, x = np.mgrid[:40, :50]
    masks = [(y > 10) & (y < 30), (abs(y - 20) < 15) & (abs(x - 25) < 15), (y - 20) ** 2 + (x - 25) ** 2 < 80]
    segments, hidden = paint_masks(enumerate(masks), 40, 50)
    return colored(segments, [3, 7, 1], hidden)


def check_item(item: Item) -> None:
    """Asserts the invariants of an item after any augmentation."""
    height, width = item["segments"].shape
    assert item["image"].shape == (3, height, width) and item["image"].dtype == torch.uint8
    assert item["segments"].dtype == torch.int32
    count = len(item["classes"])
    assert len(item["crowd"]) == count
    masks = binary_masks(item)
    assert masks.shape == (count, height, width)
    assert masks.flatten(1).any(1).all()  # segments without pixels are removed
    assert int(item["segments"].max()) < count
    hidden = item["hidden"]
    if hidden is not None:
        assert hidden.shape[1:] == (height, width) and (hidden >= 0).any() and int(hidden.max()) < count


def aligned_pixels(item: Item, radius: int = 2) -> int:
    """Asserts the color of every pixel whose neighborhood has one class, and counts these pixels."""
    classes = class_map(item)
    height, width = classes.shape
    inner = torch.zeros_like(classes, dtype=torch.bool)
    window = classes.unfold(0, 2 * radius + 1, 1).unfold(1, 2 * radius + 1, 1).flatten(2)
    inner[radius : height - radius, radius : width - radius] = (window == window[..., :1]).all(-1)
    expected = COLORS[classes].int()[inner]
    assert (item["image"].permute(1, 2, 0).int()[inner] - expected).abs().max().item() <= 1
    return int(inner.sum())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), height=st.integers(1, 60), width=st.integers(1, 60))
def test_flip_and_crop_move_image_and_map_alike(seed: int, height: int, width: int) -> None:
    item = blocks(seed, height, width, 5)
    augmented = augment(item, [RandomFlip(), RandomCrop(20, 30, 0.75)], generator(seed))
    check_item(augmented)
    assert torch.equal(augmented["image"], COLORS[class_map(augmented)].permute(2, 0, 1))
    assert tuple(augmented["segments"].shape) == (min(20, height), min(30, width))
    assert (augmented["height"], augmented["width"], augmented["image_id"]) == (height, width, 5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), edge=st.integers(40, 160), wide=st.booleans())
def test_resizing_keeps_image_and_map_aligned(seed: int, edge: int, wide: bool) -> None:
    height, width = (60, 100) if wide else (100, 60)
    item = blocks(seed, height, width, 20)
    resized = ResizeShortestEdge((edge,))(item, generator(seed))
    check_item(resized)
    long = int(edge * 100 / 60 + 0.5)
    assert tuple(resized["segments"].shape) == ((edge, long) if wide else (long, edge))
    assert aligned_pixels(resized) > 0.3 * resized["segments"].numel()
    if edge != 60:
        assert resized["areas"] is None


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_large_scale_jitter_keeps_image_and_map_aligned(seed: int) -> None:
    item = blocks(seed, 60, 90, 30)
    jittered = LargeScaleJitter(64, 72, 0.4, 2.0)(item, generator(seed))
    check_item(jittered)
    assert tuple(jittered["segments"].shape) == (64, 72)
    assert aligned_pixels(jittered, radius=3) > 0.2 * 64 * 72


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_layers_move_with_the_map(seed: int) -> None:
    """Every mask moves like an image that is white inside it, whether other masks cover it or not."""
    item = overlapping()
    step = LargeScaleJitter(36, 44, 0.5, 2.0, fill=0)
    moved = augment(item, [RandomFlip(), step], generator(seed))
    check_item(moved)
    found = dict(zip(moved["classes"].tolist(), binary_masks(moved), strict=True))
    for number, cls in enumerate([3, 7, 1]):
        alone = item.copy()
        alone["image"] = (binary_masks(item)[number].to(torch.uint8) * 255).expand(3, -1, -1)
        white = augment(alone, [RandomFlip(), step], generator(seed))["image"][0]
        mask = found.get(cls, torch.zeros(36, 44, dtype=torch.bool))
        assert bool(mask[white == 255].all()) and not bool(mask[white == 0].any())


def test_scale_and_place_of_large_scale_jitter() -> None:
    """Sizes are within the bounds, all positions occur, and padding is at the bottom and right."""
    item = colored(torch.zeros((50, 100), dtype=torch.int32), [4])
    heights = []
    for seed in range(300):
        jittered = LargeScaleJitter(100, 100, 0.1, 2.0, fill=7)(item, generator(seed))
        there = jittered["segments"] >= 0
        rows, columns = int(there.any(1).sum()), int(there.any(0).sum())
        assert there[:rows, :columns].all() and int(there.sum()) == rows * columns
        assert bool((jittered["image"][:, ~there] == 7).all())
        assert rows == 100 or abs(columns - min(100, 2 * rows)) <= 2
        heights.append(rows)
    # The image of 50x100 fits into 100x100 at scale 1, so its height is 50 times the scale, 5 to 100.
    assert min(heights) < 10 and max(heights) > 95 and min(heights) >= 5
    assert abs(np.mean(heights) - 52.5) < 5
    ramp = make_item(
        torch.arange(200, dtype=torch.uint8).expand(3, 200, 200).contiguous(), torch.zeros((200, 200)), [0], 0, "a"
    )
    lefts = [int(LargeScaleJitter(100, 100, 2, 2)(ramp, generator(seed))["image"][0, 0, 0]) for seed in range(100)]
    assert min(lefts) < 10 and 90 < max(lefts) <= 100


def test_large_scale_jitter_of_very_long_images() -> None:
    for height, width in ((1, 3000), (3000, 1)):
        item = colored(torch.zeros((height, width), dtype=torch.int32), [4])
        for seed in range(20):
            assert LargeScaleJitter(64, 64)(item, generator(seed))["image"].shape == (3, 64, 64)


@pytest.mark.parametrize(("height", "width"), [(17, 80), (90, 33), (37, 50), (5, 5)])
def test_resizing_is_pillows(height: int, width: int) -> None:
    array = photo(37, 50)
    ids = np.random.default_rng(1).integers(0, 9, (37, 50)).astype(np.int32)
    item = make_item(torch.from_numpy(array).permute(2, 0, 1), torch.from_numpy(ids), list(range(9)), 0, "a")
    resized = resize_item(item, height, width)
    expected = np.array(Image.fromarray(array).resize((width, height), Image.Resampling.BILINEAR))
    difference = resized["image"].permute(1, 2, 0).numpy().astype(int) - expected
    assert abs(difference).max() <= 1
    nearest = np.array(Image.fromarray(ids).resize((width, height), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(class_map(resized).numpy(), nearest)


def test_shortest_edge_draws_all_choices_and_no_others() -> None:
    item = colored(torch.zeros((20, 30), dtype=torch.int32), [4])

    def edges(step: ResizeShortestEdge) -> set[int]:
        return {step(item, generator(seed))["segments"].shape[0] for seed in range(200)}

    assert edges(ResizeShortestEdge((5, 17, 40))) == {5, 17, 40}
    assert edges(ResizeShortestEdge((5, 12), style="range")) == set(range(5, 13))
    assert ResizeShortestEdge((40,), 45)(item, generator(0))["segments"].shape == (30, 45)


def test_flip_probability() -> None:
    item = colored(torch.tensor([[0, -1]], dtype=torch.int32), [4])
    flips = sum(RandomFlip()(item, generator(seed))["segments"].tolist() == [[-1, 0]] for seed in range(400))
    assert 150 < flips < 250
    assert RandomFlip(0)(item, generator(0)) is item
    assert all(RandomFlip(1)(item, generator(s))["segments"].tolist() == [[-1, 0]] for s in range(20))


def test_crop_avoids_windows_of_one_class() -> None:
    """Compared with the rule, computed in NumPy from the same random numbers."""
    segments = torch.zeros((40, 40), dtype=torch.int32)
    segments[:, 30:] = 1
    segments[:14] = -1
    item = colored(segments, [4, 4])  # two segments of the same class
    item["classes"] = torch.tensor([4, 9])
    classes = class_map(item).numpy()
    mixed = unconstrained = 0
    for seed in range(100):
        draws = generator(seed)
        for _ in range(10):
            top, left = (int(torch.randint(0, 29, (), generator=draws)) for _ in range(2))
            window = classes[top : top + 12, left : left + 12]
            counts = np.unique(window[window >= 0], return_counts=True)[1]
            if len(counts) > 1 and counts.max() < 0.75 * counts.sum():
                mixed += 1
                break
        cropped = RandomCrop(12, 12, 0.75)(item, generator(seed))
        np.testing.assert_array_equal(class_map(cropped).numpy(), window)
        plain = RandomCrop(12, 12)(item, generator(seed))
        unconstrained += len(plain["classes"]) > 1
    assert mixed > 80 and unconstrained < 60  # the rule had an effect
    same = colored(segments, [4, 4])
    crops = [RandomCrop(12, 12, 0.75)(same, generator(s)) for s in range(5)]
    assert all(crop["image"].shape == (3, 12, 12) for crop in crops)


def test_vanished_segments_leave_and_ids_close_up() -> None:
    segments = torch.tensor([[0, 1, 2, 3]], dtype=torch.int32)
    item = colored(segments, [8, 6, 4, 2])
    item["crowd"] = torch.tensor([False, True, False, True])
    for seed in range(10):
        cropped = RandomCrop(1, 2)(item, generator(seed))
        first = [8, 6, 4, 2].index(int(cropped["classes"][0]))
        assert cropped["segments"].tolist() == [[0, 1]]
        assert cropped["classes"].tolist() == [8, 6, 4, 2][first : first + 2]
        assert cropped["crowd"].tolist() == [False, True, False, True][first : first + 2]
        assert cropped["areas"] is None
    assert segments.tolist() == [[0, 1, 2, 3]] and item["areas"] is not None


ALL: dict[str, Any] = {
    "RandomFlip": RandomFlip(),
    "ResizeShortestEdge": ResizeShortestEdge((30, 90), style="range"),
    "RandomCrop": RandomCrop(20, 30, 0.75),
    "LargeScaleJitter": LargeScaleJitter(50, 60),
    "SSDColorJitter": SSDColorJitter(),
}


@pytest.mark.parametrize("name", ALL)
def test_draws_come_from_the_generator_alone(name: str) -> None:
    assert set(ALL) == set(AUGMENTATIONS)
    item, results = blocks(0, 60, 90, 15), []
    item["image"] = torch.from_numpy(photo(60, 90)).permute(2, 0, 1).contiguous()
    before = item["image"].clone(), item["segments"].clone()
    for seed in range(12):
        torch.manual_seed(seed)
        np.random.seed(seed)
        first = ALL[name](item, generator(seed))
        torch.manual_seed(99)
        second = ALL[name](item, generator(seed))
        assert torch.equal(first["image"], second["image"]) and torch.equal(first["segments"], second["segments"])
        results.append(first["image"])
    assert any(a.shape != results[0].shape or not torch.equal(a, results[0]) for a in results[1:])
    assert torch.equal(item["image"], before[0]) and torch.equal(item["segments"], before[1])


# Colors


def by_pixel(image: Tensor, change: Callable[[float, float, float], tuple[float, float, float]]) -> np.ndarray:
    """`image` with each pixel's HSV changed by Python's `colorsys`; floats in 0..255."""
    pixels = image.flatten(1).T.numpy() / 255
    turned = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*pixel))) for pixel in pixels]
    return (np.array(turned) * 255).T.reshape(tuple(image.shape))


def test_saturation_and_hue_are_hsvs() -> None:
    image = torch.from_numpy(photo(12, 12)).permute(2, 0, 1).float()
    image[:, 0, :4] = torch.tensor([[0.0, 255, 80, 80], [0, 255, 80, 80], [0, 255, 80, 10]])  # black, white, gray
    for factor in (0.0, 0.5, 1.0, 1.5, 4.0):
        expected = by_pixel(image, lambda h, s, v, f=factor: (h, min(1, s * f), v))  # type: ignore[misc]
        np.testing.assert_allclose(scale_saturation(image, factor).numpy(), expected, atol=2e-2)
    for degrees in (-200.0, -36.0, 0.0, 17.3, 60.0, 180.0, 360.0):
        expected = by_pixel(image, lambda h, s, v, d=degrees: ((h + d / 360) % 1, s, v))  # type: ignore[misc]
        np.testing.assert_allclose(turn_hue(image, degrees).numpy(), expected, atol=2e-2)


def jittered(pixel: list[int], seeds: int, **ranges: Any) -> list[list[int]]:
    """One pixel's color after the jitter, for each seed; only the given changes are on."""
    image = torch.tensor(pixel, dtype=torch.uint8).view(3, 1, 1)
    item = make_item(image, torch.zeros((1, 1)), [0], 0, "a")
    values = {"brightness": 0, "contrast": (1, 1), "saturation": (1, 1), "hue": 0, **ranges}
    step = SSDColorJitter(**values)
    return [step(item, generator(seed))["image"].flatten().tolist() for seed in range(seeds)]


@pytest.mark.parametrize(("low", "high"), [(-1000.0, 3000.0), (0.0, 1.0)])
def test_floats_of_other_ranges_are_not_jittered(low: float, high: float) -> None:
    """Clamped to 0..255, they would not be the images of evaluation."""
    image = torch.linspace(low, high, 48).view(3, 4, 4)
    item = make_item(image, torch.zeros((4, 4)), [0], 0, "a")
    assert all(torch.equal(SSDColorJitter()(item, generator(seed))["image"], image) for seed in range(8))


def test_ranges_of_the_jitter() -> None:
    # detectron2's numbers; its hue is in OpenCV's units of two degrees.
    assert SSDColorJitter() == SSDColorJitter(32, (0.5, 1.5), (0.5, 1.5), 2 * 18)
    neutral = jittered([10, 100, 200], 30)
    assert all(pixel == [10, 100, 200] for pixel in neutral)
    shifts = np.array(jittered([100, 100, 200], 600, brightness=32))[:, 0] - 100
    assert -32 <= shifts.min() < -28 and 28 < shifts.max() <= 32 and 0.4 < (shifts == 0).mean() < 0.6
    factors = np.array(jittered([100, 100, 100], 600, contrast=(0.5, 1.5)))[:, 0] / 100
    assert 0.5 <= factors.min() < 0.54 and 1.46 < factors.max() <= 1.5 and 0.4 < (factors == 1).mean() < 0.6
    # The saturation is 0.4: the smallest channel is 200 * (1 - 0.4 * factor).
    factors = (1 - np.array(jittered([200, 150, 120], 600, saturation=(0.5, 1.5)))[:, 2] / 200) / 0.4
    assert 0.49 <= factors.min() < 0.55 and 1.45 < factors.max() <= 1.51
    assert 0.4 < (abs(factors - 1) < 1e-9).mean() < 0.6
    hues = [colorsys.rgb_to_hsv(*pixel)[0] * 360 for pixel in jittered([20, 200, 20], 600, hue=36)]
    assert 83 <= min(hues) < 88 and 152 < max(hues) <= 157 and 0.4 < (np.abs(np.array(hues) - 120) < 0.1).mean() < 0.6
    assert all(0 <= value <= 255 for pixel in jittered([250, 3, 128], 300, brightness=300) for value in pixel)


def test_contrast_comes_before_or_after_saturation() -> None:
    """(100, 80, 60) with three times the contrast and twice the saturation, computed by hand in either order."""
    results = {tuple(pixel) for pixel in jittered([100, 80, 60], 200, contrast=(3, 3), saturation=(2, 2))}
    assert results == {(100, 80, 60), (255, 240, 180), (100, 60, 20), (255, 225, 105), (255, 180, 60)}


# Serialization


def test_configurations_travel_through_json() -> None:
    for steps in (coco_augmentations(), mask2former_semantic_augmentations(), focoos_augmentations(), ALL.values()):
        assert from_config(json.loads(json.dumps(to_config(steps)))) == tuple(steps)
    assert from_config([{"name": "RandomFlip"}]) == (RandomFlip(),)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "RandomFlipp"}, "No augmentation is called 'RandomFlipp'. Did you mean RandomFlip?"),
        ({"probability": 1}, "No augmentation is called 'None'"),
        ({"name": "RandomFlip", "probabilty": 1}, "RandomFlip has no 'probabilty'. Did you mean probability?"),
        ({"name": "RandomCrop"}, "RandomCrop cannot be made of"),
        ({"name": "RandomFlip", "probability": 2}, "probability must be in 0..1"),
        ({"name": "ResizeShortestEdge", "edges": []}, "edges must be one or more"),
        ({"name": "ResizeShortestEdge", "edges": [5, 3], "style": "range"}, "the smaller first"),
        ({"name": "ResizeShortestEdge", "edges": [5], "style": "any"}, "style must be"),
        ({"name": "RandomCrop", "height": 0, "width": 3}, "must be positive"),
        ({"name": "RandomCrop", "height": 3, "width": 3, "single_category_max_area": 0}, "single_category_max_area"),
        ({"name": "LargeScaleJitter", "min_scale": 0}, "scales must be positive"),
        ({"name": "LargeScaleJitter", "fill": 256}, "fill must be"),
        ({"name": "LargeScaleJitter", "height": -1}, "must be positive"),
        ({"name": "SSDColorJitter", "contrast": [2, 1]}, "contrast must be a range"),
        ({"name": "SSDColorJitter", "hue": -1}, "must not be negative"),
    ],
)
def test_wrong_configurations_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_config([config])


def test_recipes() -> None:
    item = blocks(0, 70, 100, 20)
    assert augment(item, coco_augmentations(64), generator(0))["image"].shape == (3, 64, 64)
    resize, crop, *_ = mask2former_semantic_augmentations()
    assert resize == ResizeShortestEdge(tuple(range(320, 1281, 64)), 2560)
    assert crop == RandomCrop(640, 640, 0.75)
    shapes = set()
    for seed in range(30):
        augmented = augment(item, focoos_augmentations(64), generator(seed))
        check_item(augmented)
        shapes.add(tuple(augmented["image"].shape[1:]))
    assert max(shapes) == (64, 64) and min(shapes)[0] < 45

"""Batches compared with transformers' Mask2Former processor, the loss's own sampling, and the model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_faim2f import FaiM2FConfig, FaiM2FForUniversalSegmentation, FaiM2FImageProcessor
from hf_faim2f.data import Item, SegmentationCollator, binary_masks, load_ade20k, make_item, paint_masks
from hf_faim2f.errors import DatasetError
from hf_faim2f.model.point_sampling_faim2f import SegmentTargets
from tests.support.image_files import photo, save

try:  # transformers 5
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil
except ImportError:
    from transformers import Mask2FormerImageProcessor as Mask2FormerImageProcessorPil

SMALL = {"shortest_edge": 64, "longest_edge": 128}


def item_of(masks: np.ndarray, classes: list[int], crowd: list[bool] | None = None, seed: int = 0) -> Item:
    height, width = masks.shape[1:]
    segments, hidden = paint_masks(enumerate(masks), height, width)
    image = torch.from_numpy(photo(height, width, seed)).permute(2, 0, 1).contiguous()
    return make_item(image, segments, classes, seed, "a.png", hidden, crowd)


def partition(count: int, height: int, width: int, seed: int = 0) -> Item:
    """An item with disjoint segments, and void pixels."""
    ids = np.random.default_rng(seed).integers(-1, count, (height, width))
    return item_of(ids == np.arange(count)[:, None, None], [k % 5 for k in range(count)], seed=seed)


def test_labels_and_pixels_are_those_of_transformers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images, maps = [], []
    for number, (height, width) in enumerate([(20, 33), (28, 24)]):
        images.append(photo(height, width, number))
        maps.append(rng.choice([0, 1, 7, 150], (height, width)).astype(np.uint8))
        save(tmp_path / "images" / "validation" / f"{number}.png", images[-1])
        save(tmp_path / "annotations" / "validation" / f"{number}.png", maps[-1])
    batch = SegmentationCollator(FaiM2FImageProcessor(), compact=False)(list(load_ade20k(tmp_path)))
    theirs = Mask2FormerImageProcessorPil(do_resize=False, ignore_index=255, do_reduce_labels=True, size_divisor=0)
    expected = theirs(images, segmentation_maps=maps, return_tensors="pt")
    assert set(batch) == set(expected)
    torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"], atol=1e-5, rtol=0)
    assert torch.equal(batch["pixel_mask"], expected["pixel_mask"])
    for ours, other in zip(batch["class_labels"], expected["class_labels"], strict=True):
        assert torch.equal(ours, other) and ours.dtype == torch.int64
    pairs = zip(batch["mask_labels"], expected["mask_labels"], images, strict=True)
    for ours, other, image in pairs:
        assert ours.shape == other.shape and ours.dtype == torch.float32
        height, width = image.shape[:2]
        # transformers pads maps with the ignored id 255, so only the image is compared.
        assert torch.equal(ours[:, :height, :width], other[:, :height, :width])


@pytest.mark.parametrize("compact", [True, False])
def test_padding(compact: bool) -> None:
    items = [partition(3, 20, 33, 1), partition(4, 28, 24, 2)]
    processor = FaiM2FImageProcessor(size_divisor=16)  # only used for resizing
    batch = SegmentationCollator(processor, compact)(items)
    assert batch["pixel_values"].shape == (2, 3, 28, 33) and batch["pixel_mask"].shape == (2, 28, 33)
    for index, item in enumerate(items):
        height, width = item["segments"].shape
        assert batch["pixel_mask"][index].sum() == height * width
        assert (
            not batch["pixel_values"][index, :, height:].any() and not batch["pixel_values"][index, ..., width:].any()
        )
        labels = batch["mask_labels"][index]
        assert labels.shape[-2:] == (28, 33)
        if compact:
            assert labels.dtype == torch.int32 and torch.equal(labels[:height, :width], item["segments"])
            assert bool((labels[height:] == -1).all()) and bool((labels[:, width:] == -1).all())
        else:
            assert torch.equal(labels[:, :height, :width].bool(), binary_masks(item))
            assert not labels[:, height:].any() and not labels[..., width:].any()
    fixed = SegmentationCollator(FaiM2FImageProcessor(pad_size={"height": 50, "width": 40}), compact)(items)
    assert fixed["pixel_values"].shape == (2, 3, 50, 40) and fixed["mask_labels"][0].shape[-2:] == (50, 40)
    with pytest.raises(ValueError, match="do_pad is False"):
        SegmentationCollator(FaiM2FImageProcessor(do_pad=False), compact)(items)
    narrow = item_of(np.ones((1, 3, 900), dtype=bool), [0])
    with pytest.raises(DatasetError, match=r"^Image 0 \(a.png\): 3x900 pixels would be resized to 0x128"):
        SegmentationCollator(FaiM2FImageProcessor(size=SMALL), compact, do_resize=True)([items[0], narrow])
    with pytest.raises(ValueError, match="at least one item"):
        SegmentationCollator(processor, compact)([])


def test_items_are_resized_only_if_the_image_processor_does() -> None:
    items = [partition(3, 20, 33, 1)]
    for does, size in ((True, (64, 106)), (False, (20, 33))):
        batch = SegmentationCollator(FaiM2FImageProcessor(do_resize=does, size=SMALL), do_resize=True)(items)
        assert batch["pixel_values"].shape[-2:] == batch["mask_labels"][0].shape == size


def test_both_forms_are_the_same_to_the_loss() -> None:
    items = [partition(5, 24, 30, 1), partition(0, 20, 20, 2), partition(2, 30, 22, 3)]
    targets = []
    for compact in (True, False):
        batch = SegmentationCollator(FaiM2FImageProcessor(), compact)(items)
        targets.append(SegmentTargets(batch["mask_labels"], batch["class_labels"], 5, 3, torch.device("cpu")))
    points = torch.rand(200, 2)
    for image in range(3):
        values, expected = (target.sample_all(image, points) for target in targets)
        torch.testing.assert_close(values, expected)
        assert targets[0].classes[image].tolist() == targets[1].classes[image].tolist()
    assert targets[0].counts == [5, 0, 2]


def test_memory_does_not_grow_with_segments() -> None:
    collate = SegmentationCollator(FaiM2FImageProcessor())
    sizes = {count: collate([partition(count, 40, 40)])["mask_labels"][0].nbytes for count in (1, 200)}
    assert sizes[1] == sizes[200] == 40 * 40 * 4


def test_crowds_and_empty_segments_are_no_targets() -> None:
    masks = np.zeros((4, 6, 6), dtype=bool)
    masks[0], masks[1, :3], masks[3, 4:] = True, True, True
    item = item_of(masks, [1, 2, 3, 4], crowd=[True, False, False, False])
    for compact in (True, False):
        batch = SegmentationCollator(FaiM2FImageProcessor(), compact)([item])
        assert batch["class_labels"][0].tolist() == [2, 4]
        labels = batch["mask_labels"][0]
        found = labels == torch.arange(2)[:, None, None] if compact else labels.bool()
        np.testing.assert_array_equal(found.numpy(), masks[[1, 3]])
    # Only the crowd overlaps; without it the result is a map, however low the tolerance.
    strict = SegmentationCollator(FaiM2FImageProcessor(), overlap_tolerance=0)
    assert strict([item])["mask_labels"][0].ndim == 2


def test_overlaps_are_maps_within_the_tolerance_and_masks_beyond() -> None:
    masks = np.zeros((3, 10, 10), dtype=bool)
    masks[0], masks[1, 0], masks[2, 5, 5] = True, True, True  # the first segment loses 11 of its 100 pixels
    item = item_of(masks, [1, 2, 0])

    def labels(tolerance: float, compact: bool = True) -> torch.Tensor:
        collate = SegmentationCollator(FaiM2FImageProcessor(), compact, tolerance)
        return collate([item])["mask_labels"][0]

    assert torch.equal(labels(0.12), item["segments"]) and torch.equal(labels(0.11), item["segments"])
    for exact in (labels(0.1), labels(0), labels(1, compact=False)):
        np.testing.assert_array_equal(exact.numpy(), masks.astype(np.float32))
    covered = item_of(masks[[1, 0]], [2, 1])  # the large segment covers the small one
    batch = SegmentationCollator(FaiM2FImageProcessor(), overlap_tolerance=1)([covered])
    assert batch["class_labels"][0].tolist() == [1] and bool((batch["mask_labels"][0] == 0).all())
    assert covered["hidden"] is not None


def test_a_batch_may_mix_maps_and_masks() -> None:
    full = np.ones((2, 12, 12), dtype=bool)
    batch = SegmentationCollator(FaiM2FImageProcessor())([partition(3, 12, 12), item_of(full, [0, 1])])
    assert [labels.ndim for labels in batch["mask_labels"]] == [2, 3]
    targets = SegmentTargets(batch["mask_labels"], batch["class_labels"], 5, 2, torch.device("cpu"))
    assert targets.counts == [3, 2]


def test_resizing_is_the_processors() -> None:
    ids = np.random.default_rng(0).integers(0, 4, (31, 47)).astype(np.uint8)
    item = item_of(ids == np.arange(4)[:, None, None], [3, 1, 2, 0])
    processor = FaiM2FImageProcessor(size=20)
    batch = SegmentationCollator(processor, compact=False, do_resize=True)([item])
    expected = processor(item["image"], ids, {0: 3, 1: 1, 2: 2, 3: 0}, return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 3, 20, 30)
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    assert torch.equal(batch["mask_labels"][0], expected["mask_labels"][0])
    assert torch.equal(batch["class_labels"][0], expected["class_labels"][0])
    nested = np.zeros((2, 31, 47), dtype=bool)
    nested[0], nested[1, 5:20, 5:20] = True, True
    (masks,) = SegmentationCollator(processor, do_resize=True)([item_of(nested, [0, 1])])["mask_labels"]
    assert masks.shape == (2, 20, 30) and bool(masks[0].all()) and 0 < masks[1].sum() < 200


def small_model() -> FaiM2FForUniversalSegmentation:
    config = FaiM2FConfig(
        num_labels=5, num_queries=8, decoder_layers=1, feature_size=32, mask_feature_size=32, hidden_dim=32,
        num_attention_heads=2, dim_feedforward=32,
    )  # fmt: skip
    return FaiM2FForUniversalSegmentation(config)


def test_the_model_trains_on_both_forms() -> None:
    model = small_model().eval()
    items = [partition(3, 64, 64, 1), partition(4, 40, 64, 2)]
    losses = []
    for compact in (True, False):
        batch: dict[str, Any] = SegmentationCollator(FaiM2FImageProcessor(), compact)(items)
        torch.manual_seed(0)  # the loss samples random points
        losses.append(model(**batch).loss)
    torch.testing.assert_close(losses[0], losses[1])
    losses[0].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)

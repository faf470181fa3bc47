"""The image processor compared with transformers' Mask2Former processor and direct computation, and its errors."""

import copy
import inspect
import io
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch.nn import functional as F
from transformers.image_utils import ChannelDimension

from hf_faim2f.model import image_files_faim2f as image_files
from hf_faim2f.model import image_loading_faim2f as image_loading
from hf_faim2f.model import image_settings_faim2f as image_settings
from hf_faim2f.model import post_processing_faim2f as post_processing
from hf_faim2f.model.focoos_post_processing_faim2f import post_process_detections
from hf_faim2f.model.image_processing_faim2f import FaiM2FImageProcessor, resized_size
from hf_faim2f.model.image_settings_faim2f import SETTINGS
from hf_faim2f.model.segmentation_labels_faim2f import (
    convert_segmentation_map_to_binary_masks,
    resize_segmentation_map,
)

try:  # transformers 5
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil
except ImportError:
    from transformers import Mask2FormerImageProcessor as Mask2FormerImageProcessorPil

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])
# Neither resizes nor normalizes: pixel_values are the pixels as read.
RAW = {"do_resize": False, "do_rescale": False, "do_normalize": False}


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth RGB image with some noise, uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [127 + 90 * np.sin(x / (5 + c) + y / (9 - c)) for c in range(3)]
    return np.clip(np.stack(waves, -1) + rng.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)


def read(image, **keywords) -> torch.Tensor:
    """The pixels of one image as read by the processor, (3, H, W)."""
    return FaiM2FImageProcessor(**RAW)(image, return_tensors="pt", **keywords)["pixel_values"][0]


def channels_first(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1))).float()


@pytest.fixture
def warnings_said(monkeypatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(image_loading.logger, "warning_once", said.append)
    return said


# ---------------------------------------------------------------------------------------------------- pixel values


def test_pixel_values_are_the_direct_computation():
    image = photo(48, 70)
    got = FaiM2FImageProcessor(size={"height": 32, "width": 40})(image, return_tensors="pt")["pixel_values"]
    resized = F.interpolate(channels_first(image)[None], size=(32, 40), mode="bilinear", antialias=True)
    expected = (resized[0].double().numpy() / 255 - MEAN[:, None, None]) / STD[:, None, None]
    assert got.shape == (1, 3, 32, 40) and got.dtype == torch.float32
    np.testing.assert_allclose(got[0].double().numpy(), expected, rtol=0, atol=1e-6)


def test_focoos_normalization_is_the_same_on_0_to_255():
    image = photo(20, 20)
    got = FaiM2FImageProcessor(do_resize=False)(image, return_tensors="np")["pixel_values"][0]
    expected = (image - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
    np.testing.assert_allclose(got, expected.transpose(2, 0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(60, 80), (90, 50)])
@pytest.mark.parametrize("target", [(32, 48), (100, 120)])
def test_pixel_values_agree_with_mask2former(shape, target):
    image = photo(*shape)
    size = {"height": target[0], "width": target[1]}
    got = FaiM2FImageProcessor(size=size)(image, return_tensors="pt")
    reference = Mask2FormerImageProcessorPil(size=size, size_divisor=0)(image, return_tensors="pt")
    difference = (got["pixel_values"] - reference["pixel_values"]).abs()
    # Pillow rounds to 8 bits twice, after resizing the rows and the columns: at most half a gray level each, so at most
    # one level of 255 together. It is rarely that much; the mean shows that the filters agree.
    level = torch.tensor(1 / 255 / STD).view(3, 1, 1)
    assert (difference <= 1.01 * level).all()
    assert difference.mean() < 0.4 * level.mean()
    assert torch.equal(got["pixel_mask"], reference["pixel_mask"])


# For the last one, transformers truncates to 159 columns, while detectron2 rounds to 160.
@pytest.mark.parametrize("shape", [(213, 128), (128, 213), (50, 70), (97, 300), (300, 40), (64, 64), (100, 249)])
@pytest.mark.parametrize("size", [{"shortest_edge": 64, "longest_edge": 160}, {"height": 70, "width": 90}])
def test_a_size_divisor_enlarges_the_size_as_mask2former_does(shape, size):
    image, ids = photo(*shape), np.random.default_rng(0).integers(0, 5, shape).astype(np.uint8)
    keywords = {"size": size, "size_divisor": 32, "ignore_index": 255}
    got = FaiM2FImageProcessor(**keywords)(image, ids, return_tensors="pt")
    reference = Mask2FormerImageProcessorPil(**keywords)(image, ids, return_tensors="pt")
    assert got["pixel_values"].shape == reference["pixel_values"].shape
    assert all(side % 32 == 0 for side in got["pixel_values"].shape[2:])
    assert got["pixel_mask"].all() and torch.equal(got["pixel_mask"], reference["pixel_mask"])
    level = torch.tensor(1 / 255 / STD).view(3, 1, 1)
    assert ((got["pixel_values"] - reference["pixel_values"]).abs() <= 1.01 * level).all()
    assert torch.equal(got["mask_labels"][0], reference["mask_labels"][0])


def test_keywords_that_every_image_processor_of_transformers_takes():
    image = photo(40, 60)
    processor = FaiM2FImageProcessor(size={"shortest_edge": 30, "longest_edge": 90})
    plain = processor(image, return_tensors="pt")["pixel_values"]
    same = processor(image, return_tensors="pt", device="cpu", do_convert_rgb=True, disable_grouping=True)
    assert torch.equal(same["pixel_values"], plain)
    for kind, stack in (("pt", torch.stack), ("np", np.stack), (None, list)):
        last = processor([image] * 2, return_tensors=kind, data_format="channels_last")["pixel_values"]
        assert np.array_equal(np.asarray(last), plain[[0, 0]].permute(0, 2, 3, 1).numpy())
        assert type(last) is type(stack([plain[0]]) if kind == "pt" else stack([plain[0].numpy()]))
    assert processor(image, return_tensors="pt", size=30, default_to_square=True)["pixel_values"].shape[2:] == (30, 30)
    assert FaiM2FImageProcessor(size=30, default_to_square=True).size == {"height": 30, "width": 30}
    assert FaiM2FImageProcessor(size=30).size["shortest_edge"] == 30
    unset = dict.fromkeys(("do_convert_rgb", "do_center_crop", "crop_size", "default_to_square"))  # null in their files
    assert FaiM2FImageProcessor(size=30, **unset).to_dict() == FaiM2FImageProcessor(size=30).to_dict()
    assert processor(image, return_tensors="pt", default_to_square=True)["pixel_values"].shape == plain.shape
    with pytest.raises(ValueError, match="data_format must be 'channels_first', 'channels_last' or None, got 'last'"):
        processor(image, data_format="last")
    # As in Mask2Former's processor, there is no cropping; a warning says so.
    with mock.patch.object(image_settings.logger, "warning_once") as warning:
        cropped = processor(image, return_tensors="pt", do_center_crop=True, crop_size={"height": 20, "width": 20})
        assert torch.equal(cropped["pixel_values"], plain)
        assert "do_center_crop has no effect" in warning.call_args.args[0]
        FaiM2FImageProcessor(do_center_crop=True, crop_size=20)
        assert warning.call_count == 2
        FaiM2FImageProcessor(do_center_crop=False, crop_size=None)
        assert warning.call_count == 2


@pytest.mark.parametrize("do_rescale", [True, False])
@pytest.mark.parametrize("do_normalize", [True, False])
def test_rescaling_and_normalizing_are_honoured_apart(do_rescale, do_normalize):
    image = photo(9, 11)
    processor = FaiM2FImageProcessor(do_resize=False, rescale_factor=1 / 100, image_mean=0.25, image_std=[1, 2, 4])
    got = processor(image, return_tensors="np", do_rescale=do_rescale, do_normalize=do_normalize)["pixel_values"][0]
    expected = image.transpose(2, 0, 1).astype(np.float64)
    if do_rescale:
        expected = expected / 100
    if do_normalize:
        expected = (expected - 0.25) / np.array([1, 2, 4])[:, None, None]
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_inputs_are_not_written_to():
    tensor = torch.rand(3, 8, 9)
    array = np.random.default_rng(0).random((8, 9, 3), dtype=np.float32)
    before = tensor.clone(), array.copy()
    FaiM2FImageProcessor(do_resize=False, do_rescale=False)([tensor, array], return_tensors="pt")
    assert torch.equal(tensor, before[0]) and np.array_equal(array, before[1])


def test_a_float_image_that_needs_no_work_is_still_a_copy():
    tensor = torch.rand(3, 8, 9)
    got = read(tensor)
    got += 1
    assert tensor.max() <= 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_images_stay_on_the_gpu():
    image, segmentation_map = photo(40, 60), np.random.default_rng(0).integers(0, 5, (40, 60))
    processor = FaiM2FImageProcessor(size=24, size_divisor=32)
    expected = processor(image, segmentation_map, return_tensors="pt")
    got = processor(torch.from_numpy(image).cuda(), torch.from_numpy(segmentation_map).cuda(), return_tensors="pt")
    for name in ("pixel_values", "pixel_mask"):
        assert got[name].is_cuda
        torch.testing.assert_close(got[name].cpu(), expected[name], rtol=0, atol=1e-4)
    assert got["mask_labels"][0].is_cuda and torch.equal(got["mask_labels"][0].cpu(), expected["mask_labels"][0])
    with pytest.raises(ValueError, match="image 1 is on cpu"):
        processor([torch.from_numpy(image).cuda(), image], return_tensors="pt")


# ----------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("height", "width", "size", "expected"),
    [
        (480, 640, {"shortest_edge": 640, "longest_edge": 2560}, (640, 853)),  # 853.33
        (512, 683, {"shortest_edge": 640, "longest_edge": 2560}, (640, 854)),  # 853.75: rounded, not truncated
        (683, 512, {"shortest_edge": 640, "longest_edge": 2560}, (854, 640)),
        (640, 640, {"shortest_edge": 640, "longest_edge": 2560}, (640, 640)),
        (4, 9, {"shortest_edge": 2}, (2, 5)),  # 4.5: halves are rounded up
        (100, 1000, {"shortest_edge": 640, "longest_edge": 2560}, (256, 2560)),
        (1000, 100, {"shortest_edge": 640, "longest_edge": 2560}, (2560, 256)),
        (300, 1000, {"shortest_edge": 640, "longest_edge": 1333}, (400, 1333)),  # 399.9
        (100, 1000, {"shortest_edge": 640}, (640, 6400)),
        (7, 5, {"height": 30, "width": 20}, (30, 20)),
    ],
)
def test_resized_size(height, width, size, expected):
    assert resized_size(height, width, size) == expected


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 1500), st.one_of(st.none(), st.integers(1, 3000)))
def test_resized_size_keeps_the_aspect_ratio(height, width, shortest, longest):
    size = {"shortest_edge": shortest} | ({} if longest is None else {"longest_edge": longest})
    scale = shortest / min(height, width)
    if longest is not None:
        scale = min(scale, longest / max(height, width))
    try:
        new_height, new_width = resized_size(height, width, size)
    except ValueError:
        too_small = min(height, width) * scale < 0.5 + 1e-6
        too_large = height * width * scale**2 > 2**25 * 0.99
        assert too_small or too_large
        return
    # Each side is the exact one rounded to the nearest integer.
    assert abs(new_height - height * scale) <= 0.5 + 1e-6 and abs(new_width - width * scale) <= 0.5 + 1e-6
    assert longest is None or max(new_height, new_width) <= longest


@given(st.integers(20, 200), st.integers(20, 200), st.integers(16, 64))
@settings(max_examples=15, deadline=None)
def test_size_is_within_a_pixel_of_mask2former(height, width, shortest):
    size = {"shortest_edge": shortest, "longest_edge": 2 * shortest}
    image = np.zeros((height, width, 3), dtype=np.uint8)
    got = FaiM2FImageProcessor(size=size)(image, return_tensors="pt")["pixel_values"].shape
    reference = Mask2FormerImageProcessorPil(size=size, size_divisor=0)(image, return_tensors="pt")
    reference_shape = reference["pixel_values"].shape
    # transformers 5 does not resize an image if its shorter side is already right, even if the longer one is not.
    assume(tuple(reference_shape[2:]) != (height, width))
    # Mask2Former truncates where we round; with a maximum, transformers 4.57 truncates twice.
    assert all(abs(a - b) <= 1 for a, b in zip(got, reference_shape, strict=True))


def test_default_size_and_the_forms_of_size():
    assert FaiM2FImageProcessor().size == {"shortest_edge": 640, "longest_edge": 2560}
    assert FaiM2FImageProcessor(size=512).size == {"shortest_edge": 512, "longest_edge": 2048}
    assert FaiM2FImageProcessor(size=(30, 20)).size == {"height": 30, "width": 20}
    assert FaiM2FImageProcessor(size={"shortest_edge": 7, "longest_edge": None}).size == {"shortest_edge": 7}
    image = photo(30, 60)
    assert FaiM2FImageProcessor(size=20)(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 20, 40)


def test_settings_of_a_call_win_over_the_processors_and_leave_them():
    processor = FaiM2FImageProcessor(size=16)
    before = processor.to_dict()
    image = photo(30, 60)
    got = processor(image, return_tensors="pt", size={"height": 10, "width": 12}, size_divisor=8, image_mean=0.0)
    assert got["pixel_values"].shape == (1, 3, 16, 16)
    assert got["pixel_values"][:, :, :10, :12].min() >= 0
    assert processor.to_dict() == before
    assert processor(image, return_tensors="pt", size=None)["pixel_values"].shape == (1, 3, 16, 32)


# --------------------------------------------------------------------------------------------------------- padding


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_batches_are_their_images_padded(sizes):
    # PIL images, because in an array, a height of 1 or 3 makes the channel axis ambiguous.
    images = [Image.fromarray(photo(height, width, seed)) for seed, (height, width) in enumerate(sizes)]
    processor = FaiM2FImageProcessor(do_resize=False, size_divisor=32)  # only used when resizing
    got = processor(images, return_tensors="pt")
    padded = tuple(max(side) for side in zip(*sizes, strict=True))
    assert got["pixel_values"].shape == (len(images), 3, *padded)
    assert got["pixel_mask"].shape == (len(images), *padded) and got["pixel_mask"].dtype == torch.int64
    for i, (height, width) in enumerate(sizes):
        alone = processor(images[i], return_tensors="pt")
        assert alone["pixel_mask"].all() and alone["pixel_mask"].shape == (1, height, width)
        assert torch.equal(got["pixel_values"][i, :, :height, :width], alone["pixel_values"][0])
        assert got["pixel_mask"][i].sum() == height * width and got["pixel_mask"][i, :height, :width].all()
        assert not got["pixel_values"][i][:, got["pixel_mask"][i] == 0].any()


def test_pad_size():
    processor = FaiM2FImageProcessor(do_resize=False, pad_size={"height": 20, "width": 30}, size_divisor=64)
    got = processor(photo(20, 10), return_tensors="pt")
    assert got["pixel_values"].shape == (1, 3, 20, 30) and got["pixel_mask"].sum() == 200
    with pytest.raises(ValueError, match="image 1 is 21x10 .* does not fit into pad_size 20x30"):
        processor([photo(20, 10), photo(21, 10)])


def test_without_padding_images_of_different_sizes_are_no_tensor():
    processor = FaiM2FImageProcessor(do_resize=False, do_pad=False, size_divisor=32)
    images = [photo(20, 10), photo(21, 10)]
    with pytest.raises(ValueError, match="different sizes .*do_pad is False"):
        processor(images, return_tensors="pt")
    got = processor(images)
    assert [value.shape for value in got["pixel_values"]] == [(3, 20, 10), (3, 21, 10)]
    assert [mask.shape for mask in got["pixel_mask"]] == [(20, 10), (21, 10)]
    assert processor(images[:1], return_tensors="pt")["pixel_values"].shape == (1, 3, 20, 10)


@pytest.mark.parametrize("return_tensors", ["pt", "np", None])
def test_return_types(return_tensors):
    maps = [np.array([[0, 1], [2, 2]], dtype=np.uint8), np.zeros((2, 2), dtype=np.uint8)]
    images = [photo(2, 2), photo(2, 2, 1)]
    got = FaiM2FImageProcessor(do_resize=False)(images, maps, return_tensors=return_tensors)
    assert list(got) == ["pixel_values", "pixel_mask", "mask_labels", "class_labels"]
    kind = torch.Tensor if return_tensors == "pt" else np.ndarray
    for name in ("pixel_values", "pixel_mask"):
        assert isinstance(got[name], list if return_tensors is None else kind)
        assert isinstance(got[name][0], kind) and len(got[name]) == 2
    for name in ("mask_labels", "class_labels"):
        assert isinstance(got[name], list) and all(isinstance(item, kind) for item in got[name])
    assert [len(classes) for classes in got["class_labels"]] == [3, 1]


def test_the_batch_moves_and_casts_as_pipelines_do():
    batch = FaiM2FImageProcessor(do_resize=False)(photo(4, 5), np.zeros((4, 5), dtype=np.uint8), return_tensors="pt")
    batch = batch.to("cpu").to(torch.float16)
    assert batch["pixel_values"].dtype == torch.float16 and batch["pixel_mask"].dtype == torch.int64
    assert batch["mask_labels"][0].shape == (1, 4, 5) and batch["class_labels"][0].tolist() == [0]


# ----------------------------------------------------------------------------------------------- what an image can be


def test_one_image_in_every_container_gives_the_same(tmp_path):
    array = photo(6, 9)
    Image.fromarray(array).save(tmp_path / "photo.png")
    file = io.BytesIO((tmp_path / "photo.png").read_bytes())
    read_only = array.copy()
    read_only.flags.writeable = False
    tensor = torch.from_numpy(array)
    expected = channels_first(array)
    for image in (
        array,
        array.transpose(2, 0, 1),
        read_only,
        array[:, ::-1].copy()[:, ::-1],  # negative strides
        array.astype(np.int64),
        array.astype(np.float64),
        array.astype(np.float16),
        array.astype(">i4"),
        tensor,
        tensor.permute(2, 0, 1),
        tensor.to(torch.bfloat16).float() * 0 + tensor,
        tensor.float().requires_grad_(),
        tensor.int(),
        Image.fromarray(array),
        str(tmp_path / "photo.png"),
        tmp_path / "photo.png",
        file,
        [array],
        (tensor,),
        array[None],
        tensor.permute(2, 0, 1)[None],
    ):
        assert torch.equal(read(image), expected), type(image)


def test_a_batch_in_one_array():
    batch = np.stack([photo(6, 9, seed) for seed in range(3)])
    expected = torch.stack([channels_first(image) for image in batch])
    for images in (batch, list(batch), batch.transpose(0, 3, 1, 2), torch.from_numpy(batch)):
        assert torch.equal(FaiM2FImageProcessor(**RAW)(images, return_tensors="pt")["pixel_values"], expected)


def gray(height: int = 5, width: int = 7) -> np.ndarray:
    return photo(height, width)[..., 0]


def mode_cases():
    """(name, image, expected (H, W, 3)) for every PIL mode, and for arrays of every type and number of channels."""
    level, color = gray(), photo(5, 7, seed=1)
    three = np.repeat(level[..., None], 3, -1)
    bits = level > np.median(level)
    sixteen = level.astype(np.uint16) * 257 + 100
    palette = Image.frombytes("P", (7, 5), (level % 4).tobytes())
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 250, 0, 7])
    colors = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90], [250, 0, 7]])[level % 4]
    transparent = palette.copy()
    transparent.info["transparency"] = b"\x00\x80\xff\x10"
    alpha = np.arange(35, dtype=np.uint8).reshape(5, 7)
    cmyk = Image.fromarray(color).convert("CMYK")
    ycbcr = Image.fromarray(color).convert("YCbCr")
    scaled = np.repeat((sixteen / 257)[..., None], 3, -1)
    yield "L", Image.fromarray(level), three
    yield "1", Image.fromarray(bits), np.repeat(bits[..., None] * 255, 3, -1)
    yield "LA", Image.merge("LA", [Image.fromarray(level), Image.fromarray(alpha)]), three
    yield "P", palette, colors
    yield "P with transparency", transparent, colors
    yield "RGBA", Image.fromarray(np.dstack([color, alpha])), color
    yield "CMYK", cmyk, 255 - np.asarray(cmyk)[..., :3].astype(int)  # a converted image has an empty black channel
    yield "YCbCr", ycbcr, np.asarray(ycbcr.convert("RGB"))
    yield "I;16", Image.fromarray(sixteen), scaled
    yield "I;16B", Image.frombytes("I;16B", (7, 5), sixteen.astype(">u2").tobytes()), scaled
    yield "I of 16 bits", Image.fromarray(sixteen.astype(np.int32)), scaled
    yield "I of 8 bits", Image.fromarray(level.astype(np.int32)), three
    yield "F", Image.fromarray(level.astype(np.float32) / 2), three / 2
    yield "array (H, W)", level, three
    yield "array (H, W, 1)", level[..., None], three
    yield "array (1, H, W)", level[None], three
    yield "array (H, W, 2)", np.dstack([level, alpha]), three
    yield "array (H, W, 4)", np.dstack([color, alpha]), color
    yield "array (4, H, W)", np.dstack([color, alpha]).transpose(2, 0, 1), color
    yield "bool array", bits, np.repeat(bits[..., None] * 255, 3, -1)
    yield "bool tensor", torch.from_numpy(bits), np.repeat(bits[..., None] * 255, 3, -1)
    yield "uint16 array", sixteen, scaled
    yield "big-endian uint16 array", sixteen.astype(">u2"), scaled
    yield "uint16 tensor", torch.from_numpy(sixteen), scaled


@pytest.mark.parametrize(("image", "expected"), [pytest.param(*case[1:], id=case[0]) for case in mode_cases()])
@pytest.mark.filterwarnings("error")
def test_every_mode_becomes_rgb(image, expected):
    got = read(image)
    np.testing.assert_allclose(got.numpy(), expected.transpose(2, 0, 1), rtol=1e-6, atol=0)


def test_a_sixteen_bit_png_is_the_eight_bit_one(tmp_path):
    level = gray(8, 8)
    Image.fromarray(level.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert torch.equal(read(tmp_path / "deep.png"), read(level))


@pytest.mark.parametrize(
    ("shape", "input_data_format", "height_width"),
    [
        ((3, 5, 3), None, (5, 3)),  # both ends can be channels: the first is
        ((3, 5, 3), "channels_last", (3, 5)),
        ((3, 5, 3), ChannelDimension.LAST, (3, 5)),
        ((1, 5, 3), None, (5, 3)),
        ((1, 5, 3), "channels_last", (1, 5)),
        ((4, 5, 3), None, (4, 5)),  # 1 and 3 take precedence over 2 and 4
        ((4, 5, 1), None, (4, 5)),
        ((4, 5, 4), None, (5, 4)),
        ((5, 6, 4), None, (5, 6)),
        ((2, 6, 9), None, (6, 9)),
        ((2, 6, 9), "channels_first", (6, 9)),
    ],
)
def test_where_the_channels_are(shape, input_data_format, height_width):
    array = np.zeros(shape, dtype=np.uint8)
    assert tuple(read(array, input_data_format=input_data_format).shape[1:]) == height_width
    assert tuple(read(array[None], input_data_format=input_data_format).shape[1:]) == height_width


def test_channels_at_either_end_are_warned_about(warnings_said):
    FaiM2FImageProcessor(size=8)([np.zeros((3, 5, 3), dtype=np.uint8), np.zeros((4, 5, 3), dtype=np.uint8)])
    assert len(warnings_said) == 1 and "image 0" in warnings_said[0] and "input_data_format" in warnings_said[0]
    FaiM2FImageProcessor(size=8)(np.zeros((3, 5, 3), dtype=np.uint8), input_data_format="channels_last")
    assert len(warnings_said) == 1


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(orientation, tmp_path):
    array = photo(6, 9)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(array).save(tmp_path / "turned.png", exif=exif)
    upright = UPRIGHT[orientation](array)
    assert torch.equal(read(tmp_path / "turned.png"), channels_first(upright))
    with Image.open(tmp_path / "turned.png") as image:
        assert torch.equal(read(image), channels_first(upright))
        maps = np.zeros(upright.shape[:2], dtype=np.uint8)
        FaiM2FImageProcessor(do_resize=False)(image, maps, return_tensors="pt")
        with pytest.raises(ValueError, match="upright by its EXIF"):
            FaiM2FImageProcessor(do_resize=False)(image, maps.T.copy()[1:], return_tensors="pt")


@pytest.mark.parametrize("orientation", [3, 6])
def test_an_image_object_that_is_turned_is_warned_about(orientation, tmp_path, monkeypatch):
    """Pillow keeps the orientation when it converts or edits an image, whose pixels the caller may have labeled."""
    said: list[str] = []
    monkeypatch.setattr(image_files.logger, "warning_once", said.append)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(photo(6, 9)).save(tmp_path / "turned.png", exif=exif)
    processor = FaiM2FImageProcessor(do_resize=False)
    with Image.open(tmp_path / "turned.png") as file:
        image = file.convert("RGB")
    processor([tmp_path / "turned.png", np.asarray(image)])
    assert not said
    processor([ImageOps.exif_transpose(image), image])
    assert len(said) == 1 and f"image 1 has the EXIF orientation {orientation}" in said[0]
    assert "Pass PIL.ImageOps.exif_transpose(image)" in said[0]


class OwnProcessor(FaiM2FImageProcessor):
    """As a person may write one; nothing is listed twice."""

    def __init__(self, border=1, **kwargs):
        super().__init__(**kwargs)
        self.border = border


def test_a_subclass_keeps_its_own_settings(tmp_path, warnings_said):
    OwnProcessor(border=7, threshold=0.25).save_pretrained(tmp_path)
    read = OwnProcessor.from_pretrained(tmp_path)
    assert (read.border, read.threshold) == (7, 0.25) and not warnings_said
    assert OwnProcessor.from_pretrained(tmp_path, border=9).border == 9
    with pytest.raises(TypeError, match="has no setting `treshold`; did you mean `threshold`"):
        OwnProcessor(treshold=0.1)


def test_a_setting_that_could_not_be_loaded_is_not_saved(tmp_path):
    processor = FaiM2FImageProcessor()
    processor.threshold = 50
    with pytest.raises(ValueError, match="threshold must be a finite number from 0 to 1"):
        processor.save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    square = FaiM2FImageProcessor(default_to_square=True)
    square.size = 64
    picture = np.zeros((50, 100, 3), dtype=np.uint8)
    square.save_pretrained(tmp_path)
    shapes = [given([picture])["pixel_values"][0].shape for given in (square, square.from_pretrained(tmp_path))]
    assert shapes[0] == shapes[1] == (3, 64, 128)


# ------------------------------------------------------------------------------------------------- segmentation maps

CONVERSIONS = [
    {},
    {"ignore_index": 0},
    {"ignore_index": 255},
    {"ignore_index": 255, "do_reduce_labels": True},
    {"ignore_index": 3, "do_reduce_labels": True},
]


def labels_of(batch) -> tuple[list[np.ndarray], list[list[int]]]:
    return [np.asarray(masks) for masks in batch["mask_labels"]], [
        np.asarray(c).tolist() for c in batch["class_labels"]
    ]


@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("target", [(20, 30), (13, 47), (64, 64)])
@pytest.mark.parametrize("mapping", [None, "one", "each"])
def test_labels_are_mask2formers(conversion, target, mapping):
    rng = np.random.default_rng(target[0])
    images = [photo(31, 45, 0), photo(22, 17, 1)]
    maps = [rng.choice([0, 1, 2, 4, 9, 150, 254, 255], image.shape[:2]).astype(np.uint8) for image in images]
    keywords = dict(conversion)
    if mapping is not None:
        one = {i: 1 + i % 7 for i in range(256)}
        keywords["instance_id_to_semantic_id"] = one if mapping == "one" else [one, {i: 1 + i % 3 for i in one}]
    size = {"height": target[0], "width": target[1]}
    got = FaiM2FImageProcessor(size=size)(images, maps, return_tensors="pt", **keywords)
    # transformers 4.57 fails without ignore_index; a value that does not occur is equivalent.
    keywords.setdefault("ignore_index", 1000)
    reference = Mask2FormerImageProcessorPil(size=size, size_divisor=0)(images, maps, return_tensors="pt", **keywords)
    masks, classes = labels_of(got)
    reference_masks, reference_classes = labels_of(reference)
    assert classes == reference_classes
    assert all(np.array_equal(a, b) for a, b in zip(masks, reference_masks, strict=True))
    assert got["mask_labels"][0].dtype == torch.float32 and got["class_labels"][0].dtype == torch.int64
    assert sum(map(len, classes)) > 8


def test_labels_of_a_padded_batch():
    images = [photo(20, 30), photo(24, 18)]
    maps = [np.random.default_rng(i).integers(0, 4, image.shape[:2]).astype(np.uint8) for i, image in enumerate(images)]
    got = FaiM2FImageProcessor(do_resize=False, ignore_index=255)(images, maps, return_tensors="pt")
    reference = Mask2FormerImageProcessorPil(do_resize=False, ignore_index=255)(images, maps, return_tensors="pt")
    for i, image in enumerate(images):
        height, width = image.shape[:2]
        masks = got["mask_labels"][i]
        assert masks.shape == (4, 24, 30)
        assert np.array_equal(masks[:, :height, :width], np.asarray(reference["mask_labels"][i])[:, :height, :width])
        # transformers pads masks of 0 and 1 with ignore_index, 255; here, padding belongs to no segment.
        assert not masks[:, got["pixel_mask"][i] == 0].any()
        assert torch.equal(masks.sum(0), got["pixel_mask"][i].float())


@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.lists(st.sampled_from([-5, 0, 1, 7, 254, 255, 256, 70000, 2**40]), min_size=1, max_size=6),
    st.sampled_from([None, 0, 255, -5]),
    st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_masks_part_the_map(height, width, ids, ignore_index, random):
    values = np.array([[random.choice(ids) for _ in range(width)] for _ in range(height)])
    masks, classes = convert_segmentation_map_to_binary_masks(torch.from_numpy(values), ignore_index=ignore_index)
    assert classes.tolist() == sorted(set(values.ravel().tolist()) - {ignore_index})
    assert torch.equal(masks.sum(0), torch.from_numpy(values != ignore_index).float())
    for mask, class_id in zip(masks, classes, strict=True):
        assert np.array_equal(mask.numpy(), values == class_id.item())


@given(st.integers(1, 150), st.integers(1, 90), st.integers(1, 150), st.integers(1, 90))
@settings(deadline=None)
def test_maps_are_resized_as_pillow_does(height, width, new_height, new_width):
    ids = np.arange(height * width, dtype=np.int32).reshape(height, width)
    expected = np.asarray(Image.fromarray(ids).resize((new_width, new_height), Image.Resampling.NEAREST))
    got = resize_segmentation_map(torch.from_numpy(ids), new_height, new_width)
    assert np.array_equal(got.numpy(), expected)


def test_a_map_in_every_container_gives_the_same(tmp_path):
    ids = np.random.default_rng(0).integers(0, 200, (6, 9)).astype(np.uint8)
    Image.fromarray(ids).save(tmp_path / "map.png")
    np.save(tmp_path / "map.npy", ids.astype(np.int64)[None])
    palette = Image.frombytes("P", (9, 6), ids.tobytes())
    palette.putpalette(list(range(200)) * 3)
    processor = FaiM2FImageProcessor(do_resize=False)
    expected = processor(photo(6, 9), ids, return_tensors="pt")
    assert expected["class_labels"][0].tolist() == np.unique(ids).tolist()
    for segmentation_map in (
        [ids],
        ids[None],
        [ids[None]],
        [ids[..., None]],
        ids.astype(np.uint16),
        ids.astype(np.int64),
        ids.astype(np.float32),
        torch.from_numpy(ids),
        torch.from_numpy(ids).double()[None, None],
        Image.fromarray(ids),
        palette,
        Image.fromarray(ids.astype(np.int32)),
        Image.fromarray(ids.astype(np.uint16)),
        tmp_path / "map.png",
        tmp_path / "map.npy",
    ):
        got = processor(photo(6, 9), segmentation_map, return_tensors="pt")
        assert torch.equal(got["mask_labels"][0], expected["mask_labels"][0])
        assert torch.equal(got["class_labels"][0], expected["class_labels"][0])


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("largest", [20, 255, 1000, 65535])
def test_a_pgm_map_that_pillow_would_scale_is_refused(tmp_path, largest, plain):
    ids = np.array([[0, 1], [2, 20]], dtype=">u1" if largest < 256 else ">u2")
    pixels = " ".join(map(str, ids.ravel())).encode() if plain else ids.tobytes()
    (tmp_path / "map.pgm").write_bytes(f"P{2 if plain else 5} 2 2 {largest}\n".encode() + pixels)
    processor = FaiM2FImageProcessor(do_resize=False)
    if largest in (255, 65535):
        assert processor(photo(2, 2), tmp_path / "map.pgm")["class_labels"][0].tolist() == [0, 1, 2, 20]
        return
    with pytest.raises(ValueError, match=f"^segmentation map 0 states the largest value {largest}, .*: save maps as"):
        processor(photo(2, 2), tmp_path / "map.pgm")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("TIFF", {"tiffinfo": {262: 0}}, "is a TIFF file in which 0 is white, whose values Pillow inverts: save maps"),
        ("TIFF", {"compression": "jpeg"}, "is compressed as JPEG, which changes the values: save maps as PNG"),
        ("JPEG", {"quality": 100}, "is compressed as JPEG, which changes the values: save maps as PNG"),
    ],
)
def test_a_map_whose_values_were_changed_is_refused(tmp_path, kind, options, message):
    Image.fromarray(MAP.astype(np.uint8)).save(tmp_path / "map", kind, **options)
    for segmentation_map in (tmp_path / "map", Image.open(tmp_path / "map")):
        with pytest.raises(ValueError, match=f"^segmentation map 0 {message}"):
            FaiM2FImageProcessor(size=8)(GOOD, segmentation_map)


def test_a_map_of_bits_and_a_map_without_segments():
    processor = FaiM2FImageProcessor(do_resize=False)
    bits = gray() > np.median(gray())
    for segmentation_map in (bits, torch.from_numpy(bits), Image.fromarray(bits)):
        got = processor(photo(5, 7), segmentation_map, return_tensors="pt")
        assert got["class_labels"][0].tolist() == [0, 1]
        assert np.array_equal(got["mask_labels"][0][1], bits)
    got = processor(photo(5, 7), np.full((5, 7), 255), return_tensors="pt", ignore_index=255)
    assert got["mask_labels"][0].shape == (0, 5, 7) and got["class_labels"][0].shape == (0,)
    assert got["class_labels"][0].dtype == torch.int64
    got = processor(photo(5, 7), np.full((5, 7), 255), return_tensors="pt", ignore_index=255,
                    instance_id_to_semantic_id={})  # fmt: skip
    assert got["class_labels"][0].dtype == torch.int64 and len(got["class_labels"][0]) == 0


def test_ids_beyond_a_byte_survive_resizing():
    ids = np.array([[70000, 5], [5, 70001]])
    got = FaiM2FImageProcessor(size=(4, 4))(photo(2, 2), ids, return_tensors="pt")
    assert got["class_labels"][0].tolist() == [5, 70000, 70001]
    assert got["mask_labels"][0][1].nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


# ------------------------------------------------------------------------------------------------------- bad images

GOOD = photo(4, 5)


def not_finite(value: float) -> np.ndarray:
    image = GOOD.astype(np.float32)
    image[1, 2, 0] = value
    return image


BAD_IMAGES = {
    "empty list": ([], "The list of images is empty"),
    "empty tuple": ((), "The list of images is empty"),
    "empty batch": (np.zeros((0, 4, 5, 3), dtype=np.uint8), "The list of images is empty"),
    "None": (None, "There is no image"),
    "None in a list": ([GOOD, None], "image 1 is a NoneType"),
    "number": ([GOOD, 7], "image 1 is a int"),
    "nested list": ([GOOD, [GOOD]], "image 1 is a list"),
    "bytes": (b"abc", "image 0 is a bytes"),
    "zero height": ([GOOD, np.zeros((0, 5, 3), dtype=np.uint8)], r"image 1 has shape \(0, 5, 3\).* no pixels"),
    "zero width": (np.zeros((4, 0, 3)), "image 0 has shape .* no pixels"),
    "zero-sized batch": (np.zeros((2, 0, 5, 3)), "image 0 has shape .* no pixels"),
    "zero-sized tensor": ([torch.zeros(3, 0, 5)], "image 0 has shape .* no pixels"),
    "zero-sized PIL image": ([GOOD, Image.new("RGB", (0, 5))], "image 1 is 5x0 pixels"),
    "NaN": ([GOOD, not_finite(np.nan)], "image 1 has NaN or infinite"),
    "infinity": (not_finite(-np.inf), "image 0 has NaN or infinite"),
    "beyond float32": (GOOD.astype(np.float64) * 1e300, "image 0 has NaN or infinite"),
    "NaN in a tensor": (torch.from_numpy(not_finite(np.nan)), "image 0 has NaN or infinite"),
    "NaN in a PIL image": (Image.fromarray(not_finite(np.nan)[..., 0]), "image 0 has NaN or infinite"),
    "five channels": ([GOOD, np.zeros((6, 7, 5))], "image 1 has shape .* with 5 channels"),
    "one dimension": (np.zeros(9), r"image 0 has shape \(9,\)"),
    "a number as array": (np.array(9), r"image 0 has shape \(\)"),
    "five dimensions": (np.zeros((2, 2, 4, 5, 3)), "image 0 has shape .* 2 or 3 dimensions"),
    "a batch in a list": ([np.zeros((2, 4, 5, 3))], "image 0 has shape .* 2 or 3 dimensions"),
    "object array": (np.array([[None, "a"]], dtype=object), "image 0 is an array of dtype object"),
    "complex array": (np.zeros((4, 5), dtype=complex), "image 0 is an array of dtype complex"),
    "complex tensor": (torch.zeros(4, 5, dtype=torch.complex64), "image 0 is a tensor of dtype torch.complex64"),
    "sparse tensor": (torch.zeros(4, 5).to_sparse(), "image 0 is a tensor .* stored densely"),
    "no file": (["no/such/photo.jpg"], r"image 0 \(no/such/photo.jpg\) cannot be opened"),
    "address": ("https://example.com/photo.jpg", "image 0 is an address"),
    "data address": ("data:image/png;base64," + 1000 * "A", "image 0 is an address .{0,100}$"),
    "file that is no image": (io.BytesIO(b"not an image"), "image 0 cannot be opened"),
    "mode I beyond 16 bits": (Image.fromarray(np.array([[70000]], dtype=np.int32)), "image 0 has mode 'I'"),
    "mode I below zero": (Image.fromarray(np.array([[-1]], dtype=np.int32)), "image 0 has mode 'I'"),
    "mode without way to RGB": (Image.new("La", (2, 2)), "image 0 has mode 'La'"),
}


@pytest.mark.parametrize(("images", "message"), [pytest.param(*case, id=name) for name, case in BAD_IMAGES.items()])
def test_bad_images_are_refused_by_name(images, message):
    with pytest.raises(ValueError, match=message) as caught:
        FaiM2FImageProcessor(size=8)(images, return_tensors="pt")
    assert "\n" not in str(caught.value)


def test_truncated_and_damaged_files(tmp_path):
    whole = io.BytesIO()
    Image.fromarray(photo(60, 60)).save(whole, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(whole.getvalue()[:900])
    with pytest.raises(ValueError, match=r"image 1 \(.*cut.jpg\) cannot be decoded.*truncated"):
        FaiM2FImageProcessor()([GOOD, tmp_path / "cut.jpg"])
    # Pillow reads lazily: an image opened by the caller fails only here.
    lazy = Image.open(io.BytesIO(whole.getvalue()[:900]))
    with pytest.raises(ValueError, match="image 0 cannot be decoded"):
        FaiM2FImageProcessor()(lazy)
    whole.seek(0)
    with Image.open(whole) as image:
        pass
    whole.close()
    with pytest.raises(ValueError, match="image 0 cannot be decoded.* closed before it was read"):
        FaiM2FImageProcessor()(image)


@pytest.mark.parametrize("width", [15, 40])  # Pillow warns above its limit, and raises above twice the limit
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs(width, tmp_path, monkeypatch):
    Image.fromarray(photo(10, width)).save(tmp_path / "bomb.png")
    lazy = Image.open(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 120)
    for image in (tmp_path / "bomb.png", lazy):
        with pytest.raises(ValueError, match="image 1 .*decompression bomb"):
            FaiM2FImageProcessor(size=8)([GOOD, image])
    # Pixels already in memory are accepted.
    decoded = Image.fromarray(photo(10, width))
    assert FaiM2FImageProcessor(size=8)(decoded, return_tensors="pt")["pixel_values"].shape[2] == 8
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert FaiM2FImageProcessor(size=8)(lazy, return_tensors="pt")["pixel_values"].shape[2] == 8
    lazy.close()


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 6000), {"shortest_edge": 640, "longest_edge": 2560}),  # 0 pixels high
        ((1, 6000), {"shortest_edge": 640}),  # 3.8 million pixels wide
        ((4, 4), {"height": 10**6, "width": 10**6}),
    ],
)
def test_absurd_sizes_are_refused(shape, size):
    with pytest.raises(ValueError, match=f"image 0: {shape[0]}x{shape[1]} pixels would be resized to"):
        FaiM2FImageProcessor(size=size)([Image.new("RGB", shape[::-1]), GOOD])


MAP = np.zeros((4, 5), dtype=np.uint8)
BAD_MAPS = {
    "too few": ([GOOD, GOOD], [MAP], {}, "There are 2 images but 1 segmentation maps"),
    "none": ([GOOD], [], {}, "The list of segmentation maps is empty"),
    "other size": ([GOOD, GOOD], [MAP, MAP.T], {}, r"segmentation map 1 has shape \(5, 4\) but its image is 4x5"),
    "RGB map": (GOOD, [GOOD], {}, "segmentation map 0 has shape .* one id a pixel"),
    "RGB PIL map": (GOOD, Image.fromarray(GOOD), {}, "segmentation map 0 has mode 'RGB'"),
    "fractions": (GOOD, MAP + 0.5, {}, "segmentation map 0 has values that are not whole numbers"),
    "fractions in a tensor": (GOOD, torch.full((4, 5), 0.1), {}, "segmentation map 0 .* not whole numbers"),
    "NaN": (GOOD, MAP * np.nan, {}, "segmentation map 0 .* not whole numbers"),
    "infinity": (GOOD, MAP + np.inf, {}, "segmentation map 0 .* not whole numbers"),
    "objects": (GOOD, MAP.astype(object), {}, "segmentation map 0 has dtype object"),
    "complex": (GOOD, torch.zeros(4, 5, dtype=torch.complex64), {}, "segmentation map 0 has dtype torch.complex64"),
    "a number": (GOOD, [3], {}, "segmentation map 0 is a int"),
    "reduced without ignore_index": (GOOD, MAP, {"do_reduce_labels": True}, "segmentation map 0: .* ignore_index"),
    "instance without class": (
        [GOOD, GOOD],
        [MAP, MAP + 3],
        {"instance_id_to_semantic_id": {0: 1}},
        "segmentation map 1: id 3 .* not in instance_id_to_semantic_id",
    ),
    "instance of the reduced class": (
        GOOD,
        MAP + 3,
        {"instance_id_to_semantic_id": {3: 0}, "do_reduce_labels": True, "ignore_index": 255},
        "segmentation map 0: .* id 3 the class 0",
    ),
    "too few mappings": (
        [GOOD, GOOD],
        [MAP, MAP],
        {"instance_id_to_semantic_id": [{0: 1}]},
        "1 dictionaries for 2 segmentation maps",
    ),
    "class beyond num_labels": (
        [GOOD, GOOD],
        [MAP, MAP + 254],
        {"num_labels": 150},
        "segmentation map 1 has class 254 but num_labels is 150",
    ),
}


@pytest.mark.parametrize(
    ("images", "maps", "keywords", "message"), [pytest.param(*case, id=name) for name, case in BAD_MAPS.items()]
)
@pytest.mark.filterwarnings("error")
def test_bad_maps_are_refused_by_name(images, maps, keywords, message):
    with pytest.raises(ValueError, match=message):
        FaiM2FImageProcessor(size=8)(images, maps, return_tensors="pt", **keywords)


def test_rescaling_a_float_image_in_0_to_1_warns(warnings_said):
    said = warnings_said
    FaiM2FImageProcessor(size=8)([GOOD, GOOD / 255.0])
    assert len(said) == 1 and "image 1" in said[0] and "do_rescale=False to the image processor" in said[0]
    assert "multiply it by 255" in said[0]  # for `Predictor` and training data, which have no do_rescale
    FaiM2FImageProcessor(size=8, do_rescale=False)(GOOD / 255.0)
    FaiM2FImageProcessor(size=8)([GOOD.astype(np.float32), np.zeros((4, 5, 3)), GOOD // 255])
    assert len(said) == 1


def test_pixels_and_means_of_other_ranges_warn(warnings_said, monkeypatch):
    """Otherwise, all pixels would become nearly the same gray, or hundreds of deviations."""
    monkeypatch.setattr(image_settings.logger, "warning_once", warnings_said.append)
    said, of_bytes = warnings_said, {"image_mean": [123.675, 116.28, 103.53], "image_std": [58.395, 57.12, 57.375]}
    normalized = torch.from_numpy(GOOD / 255.0).permute(2, 0, 1) * 4 - 3
    for own, image, words in (
        ({}, normalized, "as after normalization, and is divided by 255 (do_rescale): pass the image as it was before"),
        ({"do_rescale": False}, GOOD, "do_rescale=True for images in 0..255"),
        (of_bytes, GOOD, r"divide image_mean and image_std by 255"),
        ({}, GOOD.astype(np.float32) * 12, "has floats up to 2628"),
        ({"rescale_factor": 1e-4}, GOOD.astype(np.uint16) * 40, "to which integers of 16 bits are scaled first"),
    ):
        FaiM2FImageProcessor(size=8)(image, **own)
        assert len(said) == 1 and words in said.pop(), own
    quiet: list[tuple[dict, object]] = [
        ({"do_rescale": False, "do_normalize": False}, normalized),
        ({"do_rescale": False}, GOOD / 255.0),
        ({"do_rescale": False, **of_bytes}, GOOD),
        ({"do_rescale": False, "do_normalize": False}, GOOD),
        ({}, GOOD.astype(np.float32)),
        ({"rescale_factor": 1e-4, "do_normalize": False}, GOOD.astype(np.float32)),
    ]
    for settings_of_call, array in quiet:
        FaiM2FImageProcessor(size=8)(array, **settings_of_call)
        assert not said, settings_of_call


# ------------------------------------------------------------------------------------------------- settings and files

BAD_SETTINGS = [
    ({"size": {"shortest_edge": 0}}, r"size\['shortest_edge'\] must be a whole number of at least 1"),
    ({"size": {"width": 3}}, "size must be"),
    ({"size": {"shortest_edge": 3, "height": 3}}, "size must be"),
    ({"size": {"shortest_edge": 3.5}}, "size.* whole number"),
    ({"size": "large"}, "size must be"),
    ({"size": (3, 4, 5)}, "size must be"),
    ({"size": True}, "size must be a whole number"),
    ({"size_divisor": -1}, "size_divisor must be a whole number of at least 0"),
    ({"pad_size": {"height": 3}}, "pad_size must be"),
    ({"do_resize": "no"}, "do_resize must be True or False"),
    ({"rescale_factor": float("nan")}, "rescale_factor must be a finite number"),
    ({"rescale_factor": 10**400}, "rescale_factor must be a finite number"),
    ({"rescale_factor": np.float32("inf")}, "rescale_factor must be a finite number"),
    ({"image_mean": 1j}, "image_mean must be a finite number"),
    ({"image_mean": [1, 2]}, "image_mean must be one number or three"),
    ({"image_std": [1, 0, 1]}, "image_std must be positive"),
    ({"ignore_index": 1.5}, "ignore_index must be a whole number"),
    ({"num_labels": 0}, "num_labels must be"),
    ({"resample": 3}, "resample must be bilinear"),
]
BAD_POST_PROCESSING = [
    ({"threshold": 1.5}, "threshold must be a finite number from 0 to 1"),
    ({"mask_threshold": None}, "mask_threshold must be"),
    ({"top_k": 0}, "top_k must be"),
    ({"use_mask_score": 1}, "use_mask_score must be True or False"),
    ({"intermediate_size": 384}, "intermediate_size must be a pair"),
    ({"label_ids_to_fuse": "3"}, "label_ids_to_fuse must be a list"),
    ({"label_ids_to_fuse": [-1]}, "label_ids_to_fuse must be"),
]


@pytest.mark.parametrize(
    "value", [np.float32(0.5), np.float64(0.5), np.int64(2), np.full(3, 0.5, np.float32)], ids=repr
)
@pytest.mark.parametrize("name", ["image_mean", "image_std"])
def test_settings_of_channels_may_be_numbers_of_numpy(name, value):
    processor = FaiM2FImageProcessor(**{name: value})
    saved = json.loads(processor.to_json_string())[name]
    assert saved == np.broadcast_to(value, 3).tolist()
    plain = FaiM2FImageProcessor(**{name: saved})(GOOD)["pixel_values"][0]
    for found in (processor(GOOD), FaiM2FImageProcessor()(GOOD, **{name: value})):
        np.testing.assert_array_equal(found["pixel_values"][0], plain)


@pytest.mark.parametrize(("keywords", "message"), BAD_SETTINGS + BAD_POST_PROCESSING)
def test_bad_settings_are_refused_by_name(keywords, message):
    with pytest.raises(ValueError, match=message):
        FaiM2FImageProcessor(**keywords)


@pytest.mark.parametrize(("keywords", "message"), BAD_SETTINGS)
def test_bad_settings_of_a_call_are_refused_by_name(keywords, message):
    with pytest.raises(ValueError, match=message):
        FaiM2FImageProcessor()(GOOD, **keywords)


def test_return_tensors_and_input_data_format_are_checked():
    with pytest.raises(ValueError, match="return_tensors must be 'pt', 'np' or None, got 'tf'"):
        FaiM2FImageProcessor()(GOOD, return_tensors="tf")
    with pytest.raises(ValueError, match="input_data_format must be"):
        FaiM2FImageProcessor()(GOOD, input_data_format="HWC")


@pytest.mark.parametrize(
    ("misspelt", "nearest"), [("do_resiz", "do_resize"), ("image_means", "image_mean"), ("sizes", "size")]
)
def test_misspelt_keywords_are_refused_with_the_nearest_name(misspelt, nearest):
    for call in (
        lambda: FaiM2FImageProcessor(**{misspelt: 1}),
        lambda: FaiM2FImageProcessor()(GOOD, **{misspelt: 1}),
        lambda: FaiM2FImageProcessor.from_dict({}, **{misspelt: 1}),
    ):
        with pytest.raises(TypeError, match=f"no setting `{misspelt}`; did you mean `{nearest}`"):
            call()
    with pytest.raises(TypeError, match="did you mean `threshold`"):
        FaiM2FImageProcessor(treshold=0.3)
    with pytest.raises(TypeError, match="no setting `threshold`"):  # not a setting of preprocessing
        FaiM2FImageProcessor()(GOOD, threshold=0.3)


def test_keywords_that_transformers_passes_or_saves_are_accepted():
    saved = {
        "image_processor_type": "FaiM2FImageProcessor",
        "feature_extractor_type": "FaiM2FImageProcessor",
        "processor_class": "SomeProcessor",
        "auto_map": {"AutoImageProcessor": "image_processing_faim2f.FaiM2FImageProcessor"},
        "_valid_processor_keys": ["images"],
        "_valid_kwargs_names": ["images"],
        "resample": 2,
        "reduce_labels": True,
    }
    processor = FaiM2FImageProcessor(**saved)
    assert processor.do_reduce_labels is True
    kept = json.loads(processor.to_json_string())
    assert set(kept) - set(SETTINGS) - {"processor_class"} == {"image_processor_type", "auto_map"}
    assert not hasattr(processor, "resample") and not hasattr(processor, "reduce_labels")
    # Arguments that AutoImageProcessor, pipeline and a user's model_kwargs pass on.
    passed_on = {
        "_from_auto": True, "_from_pipeline": "image-segmentation", "_commit_hash": None, "cache_dir": None,
        "force_download": False, "local_files_only": False, "revision": "main", "code_revision": None, "token": None,
        "subfolder": "", "proxies": None, "use_fast": False, "trust_remote_code": True, "torch_dtype": "auto",
        "dtype": "auto", "device_map": "auto", "attn_implementation": "eager", "low_cpu_mem_usage": True,
        "use_safetensors": True, "quantization_config": None, "resume_download": None, "backend": "pil",
    }  # fmt: skip
    assert FaiM2FImageProcessor.from_dict({"size": 100}, **passed_on).size["shortest_edge"] == 100
    processor, unused = FaiM2FImageProcessor.from_dict(
        {"size": 100, "do_reduce_labels": False},
        size=(3, 4),
        reduce_labels=True,
        do_resiz=1,
        foo=2,
        return_unused_kwargs=True,
    )
    assert processor.size == {"height": 3, "width": 4} and processor.do_reduce_labels is True
    assert unused == {"do_resiz": 1, "foo": 2}


UNUSUAL = {
    "do_resize": False,
    "size": {"height": 30, "width": 20},
    "do_rescale": False,
    "rescale_factor": 0.5,
    "do_normalize": False,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
    "do_pad": False,
    "size_divisor": 32,
    "pad_size": {"height": 40, "width": 50},
    "default_to_square": True,
    "ignore_index": 255,
    "do_reduce_labels": True,
    "num_labels": 7,
    "cls_sigmoid": True,
    "threshold": 0.25,
    "mask_threshold": 0.75,
    "top_k": 7,
    "use_mask_score": True,
    "predict_all_pixels": False,
    "filter_empty_masks": False,
    "intermediate_size": [96, 128],
    "label_ids_to_fuse": [1, 4],
}


def test_the_table_of_settings_is_the_constructors():
    parameters = inspect.signature(FaiM2FImageProcessor.__init__).parameters
    assert list(parameters)[1:-1] == list(SETTINGS) == list(UNUSUAL)


def test_save_and_load(tmp_path):
    processor = FaiM2FImageProcessor(**UNUSUAL)
    saved = {name: value for name, value in processor.to_dict().items() if name in SETTINGS}
    assert saved == UNUSUAL and set(processor.to_dict()) == {*UNUSUAL, "image_processor_type"}
    default = FaiM2FImageProcessor().to_dict()
    assert all(default[name] != value for name, value in UNUSUAL.items() if name in default)
    assert not {"pad_size", "ignore_index", "num_labels", "label_ids_to_fuse"} & set(default)
    for original in (processor, FaiM2FImageProcessor(), FaiM2FImageProcessor(intermediate_size=None)):
        original.save_pretrained(tmp_path)
        assert set(json.loads((tmp_path / "preprocessor_config.json").read_text())) <= {
            *SETTINGS, "auto_map", "image_processor_type",
        }  # fmt: skip
        loaded = FaiM2FImageProcessor.from_pretrained(tmp_path)
        assert loaded.to_dict() == original.to_dict()
        assert FaiM2FImageProcessor.from_json_file(tmp_path / "preprocessor_config.json").to_dict() == loaded.to_dict()
        side = "height" if original.default_to_square else "shortest_edge"
        assert FaiM2FImageProcessor.from_pretrained(tmp_path, size=100).size[side] == 100
        for other in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
            assert other.to_dict() == original.to_dict() and repr(other) == repr(original)
    assert FaiM2FImageProcessor.from_pretrained(tmp_path).intermediate_size is None


REMOTE = """
import sys, numpy as np
from transformers import AutoImageProcessor
first, second = sys.argv[1:]
processor = AutoImageProcessor.from_pretrained(first, trust_remote_code=True, top_k=9)
processor.save_pretrained(second)
again = AutoImageProcessor.from_pretrained(second, trust_remote_code=True)
assert again.to_dict() == processor.to_dict() and again.top_k == 9 and again.size == {"height": 30, "width": 20}
batch = again(np.zeros((4, 5, 3), dtype=np.uint8), np.ones((4, 5), dtype=np.uint8), return_tensors="pt")
assert batch["pixel_values"].shape == (1, 3, 30, 20) and batch["class_labels"][0].tolist() == [1]
assert type(again).__module__.startswith("transformers_modules")
assert not any(name.split(".")[0] in ("hf_faim2f", "torchvision") for name in sys.modules)
print("loaded", type(again).__name__)
"""


@pytest.mark.large
def test_a_saved_folder_loads_and_saves_as_remote_code(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    FaiM2FImageProcessor(size=(30, 20)).save_pretrained(first)
    saved = json.loads((first / "preprocessor_config.json").read_text())
    assert saved["auto_map"] == {"AutoImageProcessor": "image_processing_faim2f.FaiM2FImageProcessor"}
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    result = subprocess.run(
        [sys.executable, "-c", REMOTE, str(first), str(second)],
        capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "loaded FaiM2FImageProcessor" in result.stdout
    assert {path.name for path in first.iterdir()} == {path.name for path in second.iterdir()}
    source = Path(inspect.getfile(FaiM2FImageProcessor))
    assert (second / source.name).read_text() == source.read_text()


def test_the_processors_file_imports_every_module_that_it_needs():
    """transformers 4.57 copies, from a local folder, only the modules that the loaded file itself imports."""

    def imports(path: Path) -> set[Path]:
        names = re.findall(r"^from \.(\w+) import", path.read_text(), flags=re.MULTILINE)
        return {path.with_name(f"{name}.py") for name in names}

    direct = imports(Path(inspect.getfile(FaiM2FImageProcessor)))
    needed, unread = set(), set(direct)
    while unread:
        path = unread.pop()
        needed.add(path)
        unread |= imports(path) - needed
    assert needed == direct and len(needed) >= 4


def test_from_model_config():
    config = SimpleNamespace(
        cls_sigmoid=True, threshold=0.2, mask_threshold=0.3, top_k=5, use_mask_score=True, predict_all_pixels=False
    )
    processor = FaiM2FImageProcessor.from_model_config(config, size=320, image_mean=0.5, top_k=6)
    for name, value in {**vars(config), "top_k": 6, "filter_empty_masks": True, "image_mean": [0.5] * 3}.items():
        assert getattr(processor, name) == value
    assert processor.size["shortest_edge"] == 320
    config.filter_empty_masks = False
    assert FaiM2FImageProcessor.from_model_config(config).filter_empty_masks is False
    with pytest.raises(TypeError, match="did you mean `size`"):
        FaiM2FImageProcessor.from_model_config(config, siz=3)


# --------------------------------------------------------------------------------------------------- post-processing


def model_output(classes: int = 4, queries: int = 6) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(0)
    return SimpleNamespace(
        class_queries_logits=4 * torch.randn(2, queries, classes + 1, generator=generator),
        masks_queries_logits=4 * torch.randn(2, queries, 12, 16, generator=generator),
    )


def same(got, expected) -> bool:
    """Deep equality of nested lists, dictionaries, dataclasses and tensors."""
    if isinstance(expected, torch.Tensor):
        return isinstance(got, torch.Tensor) and torch.equal(got, expected)
    if isinstance(expected, dict):
        return set(got) == set(expected) and all(same(got[key], expected[key]) for key in expected)
    if isinstance(expected, (list, tuple)):
        return len(got) == len(expected) and all(same(a, b) for a, b in zip(got, expected, strict=True))
    if hasattr(expected, "__dict__"):
        return same(dict(got) if isinstance(got, Mapping) else vars(got), vars(expected))
    return got == expected


METHODS = {
    "semantic": ("post_process_semantic_segmentation", {"target_sizes": [(20, 30), (24, 18)]}),
    "semantic scores": ("post_process_semantic_segmentation", {"return_segmentation_scores": True}),
    "instance": (
        "post_process_instance_segmentation",
        {"threshold": 0.1, "mask_threshold": 0.4, "target_sizes": [(20, 30), (24, 18)]},
    ),
    "binary maps": ("post_process_instance_segmentation", {"threshold": 0.1, "return_binary_maps": True}),
    "run lengths": ("post_process_instance_segmentation", {"threshold": 0.1, "return_coco_annotation": True}),
    "panoptic": (
        "post_process_panoptic_segmentation",
        {"threshold": 0.1, "overlap_mask_area_threshold": 0.1, "target_sizes": [(20, 30), (24, 18)]},
    ),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("cls_sigmoid", [False, True])
def test_post_processing_hands_on_its_settings(name, cls_sigmoid):
    method, keywords = METHODS[name]
    outputs = model_output()
    processor = FaiM2FImageProcessor(cls_sigmoid=cls_sigmoid, intermediate_size=(40, 48))
    expected = getattr(post_processing, method)(
        outputs.class_queries_logits,
        outputs.masks_queries_logits,
        cls_sigmoid=cls_sigmoid,
        intermediate_size=(40, 48),
        **keywords,
    )
    assert same(getattr(processor, method)(outputs, **keywords), expected)
    assert same(getattr(processor, method)(vars(outputs), **keywords), expected)


def test_the_stride_of_the_masks_tells_the_size_of_the_networks_input(tmp_path):
    """Focoos thresholds masks at the input's size, which is 8 times that of BiSeNetFormer's masks, and 4 times that of
    others."""
    outputs = model_output()
    height, width = outputs.masks_queries_logits.shape[2:]
    usual, coarse = FaiM2FImageProcessor(threshold=0.1), FaiM2FImageProcessor(threshold=0.1, mask_stride=8)
    config = SimpleNamespace(
        cls_sigmoid=False, threshold=0.1, mask_threshold=0.5, top_k=100, use_mask_score=False, predict_all_pixels=True,
        mask_stride=8,
    )  # fmt: skip
    coarse.save_pretrained(tmp_path)
    for processor, stride in (
        (usual, 4),
        (coarse, 8),
        (FaiM2FImageProcessor.from_pretrained(tmp_path), 8),
        (FaiM2FImageProcessor.from_pretrained(tmp_path, mask_stride=4), 4),
        (FaiM2FImageProcessor.from_model_config(config), 8),
        (copy.deepcopy(coarse), 8),
    ):
        assert processor.mask_stride == stride and processor.to_dict().get("mask_stride", 4) == stride
        for method in ("post_process_detections", "post_process_queries"):
            found = getattr(processor, method)(outputs)
            expected = getattr(usual, method)(outputs, network_size=(stride * height, stride * width))
            assert same(found, expected) and len(found) == len(outputs.masks_queries_logits)
        assert processor.post_process_queries(outputs)[0].masks.shape[1:] == (stride * height, stride * width)
    assert "mask_stride" not in usual.to_dict()
    with pytest.raises(ValueError, match="mask_stride must be a whole number of at least 1"):
        FaiM2FImageProcessor(mask_stride=0)


@pytest.mark.parametrize("name", ["semantic", "instance", "panoptic"])
def test_post_processing_has_mask2formers_signature(name):
    method = METHODS[name][0]
    ours = inspect.signature(getattr(FaiM2FImageProcessor, method)).parameters
    theirs = inspect.signature(getattr(Mask2FormerImageProcessorPil, method)).parameters
    shared = [parameter for parameter in ours if parameter in theirs]
    assert shared == list(theirs)
    assert [ours[parameter].default for parameter in shared] == [theirs[parameter].default for parameter in shared]


def test_semantic_segmentation_is_mask2formers():
    outputs = model_output()
    sizes = [(20, 30), (24, 18)]
    expected = Mask2FormerImageProcessorPil().post_process_semantic_segmentation(outputs, target_sizes=sizes)
    got = FaiM2FImageProcessor().post_process_semantic_segmentation(outputs, target_sizes=sizes)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_scores_are_attributes_and_items_as_in_transformers():
    found = FaiM2FImageProcessor().post_process_semantic_segmentation(model_output(), None, True)
    assert len(found) == 2
    for result in found:
        assert set(result) == {"segmentation", "segmentation_scores"}
        assert result["segmentation"] is result.segmentation and result.segmentation.shape == (384, 384)
        assert torch.equal(result["segmentation_scores"].argmax(0), result.segmentation)


def test_panoptic_fuses_the_processors_labels_unless_told():
    outputs = model_output(classes=2)
    processor = FaiM2FImageProcessor(label_ids_to_fuse=[0, 1])
    keywords = {"threshold": 0.0, "overlap_mask_area_threshold": 0.0}

    def fused(**more) -> set[bool]:
        results = processor.post_process_panoptic_segmentation(outputs, **keywords, **more)
        return {segment["was_fused"] for result in results for segment in result["segments_info"]}

    assert fused() == {True}
    assert fused(label_ids_to_fuse=set()) == {False}


def test_classes_to_fuse_are_ids_of_the_outputs_classes():
    """A tensor's elements and class names never equal a class id, so nothing would be fused."""
    outputs, processor = model_output(classes=4), FaiM2FImageProcessor()

    def fused(ids) -> set[int]:
        results = processor.post_process_panoptic_segmentation(
            outputs, threshold=0.0, overlap_mask_area_threshold=0.0, label_ids_to_fuse=ids
        )
        return {info["label_id"] for result in results for info in result["segments_info"] if info["was_fused"]}

    assert fused([0, 1, 2, 3]) == fused(torch.arange(4)) == fused(np.arange(4)) != set()
    for wrong, complaint in ((["sky"], "class ids, whole numbers, not"), ("12", "whole numbers"), (3, "whole numbers"),
                             ([1, 4], "has 4, but the outputs are of the classes 0 to 3")):  # fmt: skip
        with pytest.raises(ValueError, match=f"^label_ids_to_fuse .*{complaint}"):
            fused(wrong)
    with pytest.raises(ValueError, match="label_ids_to_fuse must be a whole number of at least 0"):
        processor.label_ids_to_fuse = ["sky"]  # type: ignore[list-item]
    assert fused([]) == set()


NAMES = {0: "cat", 1: "dog", 2: "sky", 3: "sea"}


def test_detections_take_the_processors_settings_unless_told():
    outputs = model_output()
    own = {
        "threshold": 0.15,
        "mask_threshold": 0.4,
        "top_k": 3,
        "use_mask_score": True,
        "predict_all_pixels": False,
        "filter_empty_masks": False,
    }
    processor = FaiM2FImageProcessor(cls_sigmoid=True, **own)
    logits = (outputs.class_queries_logits, outputs.masks_queries_logits)
    sizes = [(20, 30), (24, 18)]

    def detect(network_size, **settings):
        return post_process_detections(*logits, network_size, sizes, id2label=NAMES, cls_sigmoid=True, **settings)

    got = processor.post_process_detections(outputs, sizes, id2label=NAMES)
    assert same(got, detect((48, 64), **own)) and any(got)
    got = processor.post_process_detections(outputs, sizes, (44, 60), id2label=NAMES)
    assert same(got, detect((44, 60), **own))
    told = {
        "threshold": 0.0,
        "mask_threshold": 0.6,
        "top_k": 5,
        "use_mask_score": False,
        "predict_all_pixels": True,
        "filter_empty_masks": True,
    }
    got = processor.post_process_detections(outputs, sizes, id2label=NAMES, **told)
    assert same(got, detect((48, 64), **told))


def test_outputs_without_logits_are_refused():
    with pytest.raises(ValueError, match="must have class_queries_logits and masks_queries_logits.* got dict"):
        FaiM2FImageProcessor().post_process_semantic_segmentation({"logits": 1})


def test_padding_is_removed_image_by_image():
    """Each image of a batch with two sizes gets the same map as from its own logits alone."""
    processor = FaiM2FImageProcessor(size={"shortest_edge": 32, "longest_edge": 128})
    images = [np.zeros((32, 64, 3), np.uint8), np.zeros((60, 33, 3), np.uint8)]
    batch = processor(images, return_tensors="pt")
    height, width = batch["pixel_values"].shape[-2:]
    generator = torch.Generator().manual_seed(0)
    alone = [torch.randn(1, 5, *size, generator=generator) for size in ((8, 16), (15, 8))]
    sizes = [tuple(int(side) for side in (mask.any(1).sum(), mask.any(0).sum())) for mask in batch["pixel_mask"]]
    assert sizes == [(32, 64), (58, 32)] and (height, width) == (58, 64)
    masks = torch.full((2, 5, 15, 16), 50.0)  # confident predictions in the padding
    for index, logits in enumerate(alone):
        masks[index, :, : logits.shape[2], : logits.shape[3]] = logits[0]
    classes = torch.randn(2, 5, 4, generator=generator)
    outputs = {"class_queries_logits": classes, "masks_queries_logits": masks}
    apart = processor.remove_padding(outputs, batch["pixel_mask"])
    for index, (output, logits, image) in enumerate(zip(apart, alone, images, strict=True)):
        expected = {"class_queries_logits": classes[index : index + 1], "masks_queries_logits": logits}
        target = [image.shape[:2]]
        ours = processor.post_process_semantic_segmentation(output, target_sizes=target)[0]
        theirs = processor.post_process_semantic_segmentation(expected, target_sizes=target)[0]
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="one mask for each of 2 images"):
        processor.remove_padding(outputs, batch["pixel_mask"][:1])


def test_queries_unfiltered():
    generator = torch.Generator().manual_seed(0)
    outputs = {
        "class_queries_logits": torch.randn(1, 6, 4, generator=generator),
        "masks_queries_logits": torch.randn(1, 6, 8, 10, generator=generator),
    }
    processor = FaiM2FImageProcessor(use_mask_score=False, predict_all_pixels=False)
    found = processor.post_process_queries(outputs, target_sizes=[(50, 60)])[0]
    scores, class_ids = outputs["class_queries_logits"][0].softmax(-1)[:, :-1].max(-1)
    assert torch.equal(found.class_ids, class_ids)
    torch.testing.assert_close(found.scores, scores)
    assert found.masks.shape == (6, 50, 60) and found.masks.dtype == torch.bool
    detections = processor.post_process_detections(outputs, target_sizes=[(50, 60)], threshold=0.0)[0]
    assert [d.class_id for d in detections] == class_ids.tolist()
    assert [int(d.mask.sum()) for d in detections] == found.masks.flatten(1).sum(1).tolist()

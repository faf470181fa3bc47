"""Images of different sizes in one batch: plain calls give the same results for each as alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_faim2f.conversion.mask2former import convert
from PIL import Image
from torch import nn
from transformers import Trainer, TrainingArguments, pipeline

from hf_faim2f import FaiM2FForSemanticSegmentation, FaiM2FForUniversalSegmentation, FaiM2FImageProcessor
from hf_faim2f.model.padding_faim2f import (
    PADDING_LOGIT,
    fill_padding,
    image_sizes,
    own_logits,
    own_network_size,
    stride_of,
)
from tests.support.mask2former_models import saved, tiny
from tests.support.reference_models import BISENET, small_model

try:  # transformers 5.x, where the other Mask2FormerImageProcessor needs torchvision
    from transformers.models.mask2former.image_processing_pil_mask2former import (
        Mask2FormerImageProcessorPil as Mask2FormerImageProcessor,
    )
except ImportError:
    from transformers import Mask2FormerImageProcessor  # type: ignore[assignment]

SIZES = [(213, 128), (90, 190), (128, 128), (213, 128)]
POST_PROCESSING = {
    "post_process_semantic_segmentation": {},
    "post_process_instance_segmentation": {"threshold": 0.1},
    "post_process_panoptic_segmentation": {"threshold": 0.2, "overlap_mask_area_threshold": 0.1},
    "post_process_detections": {"threshold": 0.1},
    "post_process_queries": {},
}


def photo(height: int, width: int) -> Image.Image:
    """Smooth colors and a few hard edges; a different picture for each size."""
    random = np.random.default_rng(height + 1000 * width)
    coarse = Image.fromarray(random.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height))
    pixels = np.array(coarse)
    pixels[height // 4 : height // 2, width // 3 : width // 2] = random.integers(0, 256, 3)
    return Image.fromarray(pixels)


PHOTOS = [photo(*size) for size in SIZES]


def sure_model(**overrides: Any) -> FaiM2FForUniversalSegmentation:
    """`small_model` with class scores above the thresholds."""
    model = small_model(**overrides)
    with torch.no_grad():
        model.transformer_decoder.class_predictor.weight.mul_(8)
    return model


def agree(one: Any, other: Any) -> bool:
    """Whether a post-processing method returned the same for an image, up to rounding of scores: in a batch, the order
    of summation differs."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) if not one.is_floating_point() else torch.allclose(one, other, atol=1e-5)
    if isinstance(one, dict):
        return list(one) == list(other) and all(agree(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(agree, one, other))
    if hasattr(one, "__dict__"):
        return agree(vars(one), vars(other))
    return one == other or (isinstance(one, float) and abs(one - other) < 1e-5)


@pytest.mark.parametrize("settings", [{}, {"pad_size": {"height": 224, "width": 256}}], ids=["largest", "pad_size"])
@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("changes", [{}, BISENET], ids=["fpn", "bisenet"])
def test_the_plain_calls_answer_as_for_each_image_alone(
    changes: dict[str, Any], settings: dict[str, Any], optimized: bool
) -> None:
    model = sure_model(**changes)
    if optimized:
        model.optimize_for_inference()
    shared = {"do_resize": False, "intermediate_size": None, "mask_stride": model.config.mask_stride}
    together, alone = FaiM2FImageProcessor(**shared, **settings), FaiM2FImageProcessor(**shared)
    sizes = [(image.height, image.width) for image in PHOTOS]
    with torch.no_grad():
        outputs = model(**together(PHOTOS, return_tensors="pt"))
        apart = [model(**alone(image, return_tensors="pt")) for image in PHOTOS]
    for own, one in zip(own_logits(outputs.masks_queries_logits), apart, strict=True):
        torch.testing.assert_close(own, one.masks_queries_logits[0], rtol=1e-5, atol=1e-5)
    for name, options in POST_PROCESSING.items():
        batch = getattr(together, name)(outputs, target_sizes=sizes, **options)
        for found, one, size in zip(batch, apart, sizes, strict=True):
            expected = getattr(alone, name)(one, target_sizes=[size], **options)[0]
            assert agree(found, expected), (name, size)
            assert name != "post_process_instance_segmentation" or found["segments_info"]
            assert name != "post_process_detections" or found


def test_every_output_is_that_of_the_image_alone() -> None:
    model, processor = small_model(), FaiM2FImageProcessor(do_resize=False)
    inputs = processor(PHOTOS, return_tensors="pt")
    asked = {"output_hidden_states": True, "output_auxiliary_logits": True}
    with torch.no_grad():
        outputs = model(**inputs, **asked)
        as_tuple = model(**inputs, **asked, return_dict=False)
    assert list(outputs) == [
        "class_queries_logits", "masks_queries_logits", "auxiliary_logits", "hidden_states",
    ]  # fmt: skip
    assert len(as_tuple) == 4 and torch.equal(as_tuple[1], outputs.masks_queries_logits)
    assert outputs.masks_queries_logits.shape == (4, 10, 54, 48)
    for i, image in enumerate(PHOTOS):
        with torch.no_grad():
            alone = model(**processor(image, return_tensors="pt"), **asked)
        height, width = alone.masks_queries_logits.shape[2:]
        pairs = [(alone, outputs), *zip(alone.auxiliary_logits, outputs.auxiliary_logits, strict=True)]
        for one, batch in pairs:
            torch.testing.assert_close(batch["class_queries_logits"][i], one["class_queries_logits"][0])
            masks = batch["masks_queries_logits"][i]
            torch.testing.assert_close(masks[:, :height, :width], one["masks_queries_logits"][0], rtol=1e-5, atol=1e-5)
            assert bool((masks[:, height:] == PADDING_LOGIT).all() and (masks[..., width:] == PADDING_LOGIT).all())
        for one, batch in zip(alone.hidden_states, outputs.hidden_states, strict=True):
            torch.testing.assert_close(batch[i], one[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="output_attentions: images of different sizes"):
        model(**inputs, output_attentions=True)


@pytest.mark.large
def test_padding_is_found_at_strides_other_than_four() -> None:
    """Masks at 1/8: BiSeNetFormer, and a feature pyramid on a backbone without its finest map."""
    coarse = {"model_type": "faim2f_stdc", "embedding_size": 8, "depths": [1, 1, 1]}
    coarse["out_features"] = ["stage2", "stage3", "stage4"]
    for changes in (BISENET, {"backbone_config": coarse}):
        model, processor = small_model(**changes), FaiM2FImageProcessor(do_resize=False)
        images = [photo(33, 70), photo(61, 36), photo(40, 97)]
        inputs = processor(images, return_tensors="pt", pad_size={"height": 70, "width": 105})
        with torch.no_grad():
            outputs, plain = model(**inputs), model(inputs["pixel_values"])
            apart = [model(**processor(image, return_tensors="pt")) for image in images]
            compiled = torch.compile(model, backend="eager")(**inputs)
        grid = outputs.masks_queries_logits.shape[2:]
        assert grid == (9, 14)
        for own, one in zip(own_logits(outputs.masks_queries_logits), apart, strict=True):
            torch.testing.assert_close(own, one.masks_queries_logits[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(
            compiled.masks_queries_logits == PADDING_LOGIT, outputs.masks_queries_logits == PADDING_LOGIT
        )
        removed = processor.remove_padding(plain, inputs["pixel_mask"])
        sizes = [tuple(one["masks_queries_logits"].shape[2:]) for one in removed]
        assert sizes == [(5, 9), (8, 5), (5, 13)]
        assert [own_network_size((70, 105), grid, size) for size in sizes] == [(40, 72), (64, 40), (40, 104)]


DINO = {
    "model_type": "dinov2", "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 14,
    "image_size": 112, "out_features": ["stage1", "stage2", "stage3", "stage4"],
}  # fmt: skip


@pytest.mark.parametrize("frame", [None, {"height": 126, "width": 140}], ids=["largest", "pad_size"])
def test_a_vision_transformer_gives_each_image_its_single_result(frame: dict[str, int] | None) -> None:
    """All its maps have the stride of its patches."""
    model = sure_model(backbone_config=DINO)
    semantic = FaiM2FForSemanticSegmentation(model.config).eval()
    semantic.load_state_dict(model.state_dict())
    processor = FaiM2FImageProcessor.from_model_config(model.config, do_resize=False)
    assert model.config.mask_stride == processor.mask_stride == 14
    sizes = [(98, 56), (42, 112), (70, 70)]
    images = [photo(*size) for size in sizes]
    inputs = processor(images, return_tensors="pt", **({"pad_size": frame} if frame else {}))
    with torch.no_grad():
        outputs, logits = model(**inputs), semantic(**inputs).logits
        apart = [processor(image, return_tensors="pt") for image in images]
        alone = [(model(**one), semantic(**one).logits[0]) for one in apart]
    assert logits.shape[2:] == outputs.masks_queries_logits.shape[2:] == ((9, 10) if frame else (7, 8))
    for i, ((one, own), (height, width)) in enumerate(zip(alone, sizes, strict=True)):
        torch.testing.assert_close(logits[i, :, : height // 14, : width // 14], own, rtol=1e-4, atol=1e-4)
        for name, options in POST_PROCESSING.items():
            found = getattr(processor, name)(outputs, target_sizes=sizes, **options)[i]
            expected = getattr(processor, name)(one, target_sizes=[sizes[i]], **options)[0]
            assert agree(found, expected), (name, sizes[i])


def test_the_stride_is_told_by_both_sizes() -> None:
    for stride in (2, 4, 8):
        for side in range(32, 300):
            assert stride_of(side, -(-side // stride)) == stride
    assert stride_of(224, 16) == stride_of(98, 7) == 14 and stride_of(96, 6) == 16  # the patches of transformers
    assert stride_of(66, 16) == 4  # one that drops the last pixels


def test_the_loss_sees_padding_as_in_training() -> None:
    """As in the original implementations. Outputs returned with the loss equal those without labels."""
    processor = FaiM2FImageProcessor(do_resize=False, ignore_index=255)
    maps = [np.random.default_rng(i).integers(0, 3, size).astype(np.uint8) for i, size in enumerate(SIZES)]
    inputs = processor(PHOTOS, maps, return_tensors="pt")
    model = small_model()
    losses = {}
    for padded in (True, False):
        torch.manual_seed(3)
        given = dict(inputs) if padded else {name: inputs[name] for name in inputs if name != "pixel_mask"}
        with torch.no_grad():
            outputs = model(**given)
        losses[padded] = outputs.loss
        assert list(outputs.loss_dict)[-3:] == ["loss_ce", "loss_mask", "loss_dice"]
        if padded:
            with torch.no_grad():
                expected = model(pixel_values=inputs["pixel_values"], pixel_mask=inputs["pixel_mask"])
            assert torch.equal(outputs.masks_queries_logits, expected.masks_queries_logits)
    assert torch.equal(losses[True], losses[False])
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    torch.manual_seed(3)
    outputs = model(**inputs)
    torch.testing.assert_close(outputs.loss.detach(), losses[True])
    outputs.loss.backward()
    assert [masks.shape[1:] for masks in own_logits(outputs.masks_queries_logits.detach())] == [
        (54, 32), (23, 48), (32, 32), (54, 32),
    ]  # fmt: skip


@pytest.mark.parametrize("form", ["masks", "bool", "maps"])
@pytest.mark.parametrize("count", [1, 2])
def test_masks_of_the_size_of_their_image_are_padded_like_it(form: str, count: int) -> None:
    """With `pad_size`, no mask is as large as the batch; it must be padded, not stretched."""
    images, model = PHOTOS[:count], small_model()
    maps = [np.random.default_rng(i).integers(0, 3, SIZES[i]).astype(np.uint8) for i in range(count)]
    processor = FaiM2FImageProcessor(do_resize=False, pad_size={"height": 256, "width": 320})
    inputs = processor(images, maps, return_tensors="pt")
    classes = inputs.pop("class_labels")
    whole = inputs.pop("mask_labels")
    own: list[torch.Tensor] = [mask[:, :height, :width] for mask, (height, width) in zip(whole, SIZES, strict=False)]
    if form != "masks":
        own = [mask.bool() for mask in own] if form == "bool" else [mask.argmax(0).byte() for mask in own]
    losses = []
    for masks in (whole, own):
        torch.manual_seed(0)
        with torch.no_grad():
            losses.append(model(**inputs, mask_labels=masks, class_labels=classes).loss)
    torch.testing.assert_close(*losses)


def test_masks_that_were_not_resized_with_their_images_are_refused() -> None:
    """If their sizes differ, they would be padded, and would not match the objects."""
    images, model = [PHOTOS[0], PHOTOS[1].resize((120, 200))], small_model()
    maps = [np.zeros((image.height, image.width), dtype=np.uint8) for image in images]
    inputs = FaiM2FImageProcessor(size=128)(images, maps, return_tensors="pt")
    quarter = [mask[:, ::4, ::4] for mask in inputs.pop("mask_labels")]
    classes = inputs.pop("class_labels")
    assert model(**inputs, mask_labels=quarter, class_labels=classes).loss.isfinite()
    original = [torch.ones(1, 213, 128), torch.ones(1, 100, 60)]
    with pytest.raises(ValueError, match=r"mask_labels\[1\] is 100x60 \(height x width\), but its image 213x128 in a"):
        model(**inputs, mask_labels=original, class_labels=classes)
    pixels = {"pixel_values": inputs["pixel_values"]}  # without pixel_mask, each image fills the batch's frame
    for sizes in ([(480, 640), (240, 320)], [(64, 96), (32, 96)]):
        for empty in (False, True):
            masks = [torch.ones(1, *size) for size in sizes] + ([torch.zeros(0, 500, 5)] if empty else [])
            batch = {name: torch.cat([value, value[:1]]) if empty else value for name, value in pixels.items()}
            labels = [*classes, torch.zeros(0, dtype=torch.long)] if empty else classes
            with pytest.raises(ValueError, match=r"mask_labels\[1\] is \d+x\d+ .*others .* reach \d+x\d+: resize the"):
                model(**batch, mask_labels=masks, class_labels=labels)
    with pytest.raises(ValueError, match="masks of image 0 are 48x32 .*, and pixel_values 32x48: transpose them"):
        model(torch.zeros(1, 3, 32, 48), mask_labels=[torch.ones(1, 48, 32)], class_labels=[torch.tensor([1])])
    with pytest.raises(ValueError, match="masks of image 0 are 48x32"):
        FaiM2FForSemanticSegmentation(model.config)(
            torch.zeros(1, 3, 32, 48), labels=torch.zeros(1, 48, 32, dtype=torch.long)
        )


@pytest.mark.parametrize("shape", [(0, 7, 1000), (0, 0, 0)])
@pytest.mark.parametrize("stride", [1, 4])
def test_an_image_without_segments_has_masks_of_any_size(shape: tuple[int, ...], stride: int) -> None:
    processor, model = FaiM2FImageProcessor(do_resize=False, ignore_index=255), small_model()
    maps = [np.zeros(SIZES[0], np.uint8), np.full(SIZES[1], 255, np.uint8)]
    inputs = processor(PHOTOS[:2], maps, return_tensors="pt")
    masks = [mask[:, ::stride, ::stride] for mask in inputs.pop("mask_labels")]
    losses = []
    for empty in (masks[1], torch.zeros(shape)):
        torch.manual_seed(0)
        with torch.no_grad():
            losses.append(model(**inputs, mask_labels=[masks[0], empty]).loss)
    assert torch.equal(*losses)


@pytest.mark.large
@pytest.mark.newest_only  # test_modeling.py compiles in both environments
def test_a_compiled_model_marks_padding_too() -> None:
    model, processor = small_model(), FaiM2FImageProcessor(do_resize=False)
    inputs = processor(PHOTOS[:2], return_tensors="pt")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        outputs, plain = compiled(**inputs), model(pixel_values=inputs["pixel_values"])
        auxiliary = model.train()(**inputs, output_auxiliary_logits=True).auxiliary_logits
    for layer in auxiliary:  # as in training
        marked = layer["masks_queries_logits"] == PADDING_LOGIT
        assert torch.equal(marked, outputs.masks_queries_logits == PADDING_LOGIT)
    for i, own in enumerate(own_logits(outputs.masks_queries_logits)):
        height, width = (-(-side // 4) for side in SIZES[i])
        assert own.shape[1:] == (height, width)
        torch.testing.assert_close(own, plain.masks_queries_logits[i, :, :height, :width])


class Photos(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(PHOTOS)

    def __getitem__(self, index: int) -> Image.Image:
        return PHOTOS[index]


def test_trainer_predicts_them(tmp_path: Path) -> None:
    model = sure_model()
    # One size for all batches, because Trainer concatenates their logits.
    processor = FaiM2FImageProcessor(do_resize=False, pad_size={"height": 213, "width": 190})
    alone_processor = FaiM2FImageProcessor(do_resize=False)
    arguments = TrainingArguments(
        tmp_path, per_device_eval_batch_size=2, remove_unused_columns=False, report_to="none", use_cpu=True
    )
    trainer = Trainer(model, arguments, data_collator=lambda images: dict(processor(images, return_tensors="pt")))
    classes, masks = (torch.from_numpy(array) for array in trainer.predict(Photos()).predictions)  # type: ignore[arg-type]
    outputs = {"class_queries_logits": classes, "masks_queries_logits": masks}
    found = processor.post_process_semantic_segmentation(outputs, target_sizes=SIZES)
    for image, size, label_map in zip(PHOTOS, SIZES, found, strict=True):
        with torch.no_grad():
            alone = model(**alone_processor(image, return_tensors="pt"))
        assert torch.equal(label_map, processor.post_process_semantic_segmentation(alone, target_sizes=[size])[0])


@pytest.mark.parametrize("subtask", ["semantic", "instance", "panoptic"])
def test_pipeline_in_batches(subtask: str) -> None:
    """The pipeline stacks images without padding them, so they need one size: `pad_size`, or a fixed `size`."""
    model = sure_model()
    processor = FaiM2FImageProcessor(do_resize=False, pad_size={"height": 213, "width": 190})
    answers = {}
    for batch_size in (1, 4):
        segment = pipeline("image-segmentation", model=model, image_processor=processor)
        answers[batch_size] = segment(PHOTOS, batch_size=batch_size, subtask=subtask, threshold=0.2)
    segment = pipeline("image-segmentation", model=model, image_processor=FaiM2FImageProcessor(do_resize=False))
    answers["alone"] = segment(PHOTOS, subtask=subtask, threshold=0.2)
    for image, *three in zip(PHOTOS, *answers.values(), strict=True):
        assert three[0] and len({len(segments) for segments in three}) == 1
        for segments in zip(*three, strict=True):
            assert segments[0]["mask"].size == image.size and len({segment["label"] for segment in segments}) == 1
            assert len({segment["mask"].tobytes() for segment in segments}) == 1


@pytest.mark.parametrize("size", [(213, 128), (100, 190)])
def test_a_converted_mask2former_answers_as_transformers_does(tmp_path: Path, size: tuple[int, int]) -> None:
    """`size_divisor` enlarges the resized image in both; with padding instead, masks were shifted by up to 8 pixels."""
    theirs = tiny()
    with torch.no_grad():
        theirs.class_predictor.weight.mul_(8)
    convert(str(saved(tmp_path / "theirs", theirs)), tmp_path / "ours", "panoptic")
    model = FaiM2FForUniversalSegmentation.from_pretrained(tmp_path / "ours")
    processor = FaiM2FImageProcessor.from_pretrained(tmp_path / "ours")
    their_processor = Mask2FormerImageProcessor.from_pretrained(tmp_path / "theirs")
    image = photo(*size)
    inputs, their_inputs = processor(image, return_tensors="pt"), their_processor(image, return_tensors="pt")
    assert inputs["pixel_values"].shape == their_inputs["pixel_values"].shape
    with torch.no_grad():
        outputs, their_outputs = model(**inputs), theirs(**their_inputs)
    for name in list(POST_PROCESSING)[:3]:
        keywords: dict[str, Any] = {"target_sizes": [size]}
        if "panoptic" in name:
            keywords["label_ids_to_fuse"] = set()
        one = getattr(processor, name)(outputs, **keywords)[0]
        other = getattr(their_processor, name)(their_outputs, **keywords)[0]
        if isinstance(one, dict):
            assert [s["label_id"] for s in one["segments_info"]] == [s["label_id"] for s in other["segments_info"]]
            one, other = one["segmentation"], other["segmentation"]
        # transformers rounds pixels to bytes, which moves the edges of a few masks by a pixel.
        assert one.shape == size and (one == other).float().mean() > 0.99, name


def test_masks_that_are_no_padding_are_refused() -> None:
    model, pixels = small_model(), torch.randn(2, 3, 64, 96)
    mask = torch.ones(2, 64, 96, dtype=torch.long)
    assert image_sizes(mask) == [(64, 96)] * 2
    with torch.no_grad():
        assert torch.equal(model(pixels, pixel_mask=mask).masks_queries_logits, model(pixels).masks_queries_logits)
    for change in (np.s_[1, :8], np.s_[1, :, :8], np.s_[1, 20:40], np.s_[1, 5, 5], np.s_[1]):
        wrong = mask.clone()
        wrong[change] = 0
        with pytest.raises(ValueError, match="pixel_mask of image 1 must be 1 on a rectangle in the upper left corner"):
            model(pixels, pixel_mask=wrong)
    with pytest.raises(ValueError, match=r"pixel_mask must be of shape \(2, 64, 96\).*got \(2, 64, 95\)"):
        model(pixels, pixel_mask=mask[..., 1:])


def test_logits_of_padding() -> None:
    masks = torch.randn(3, 4, 8, 6)
    pixel_mask = torch.zeros(3, 30, 23, dtype=torch.long)
    for i, (height, width) in enumerate([(30, 23), (13, 23), (4, 1)]):
        pixel_mask[i, :height, :width] = 1
    filled = fill_padding(masks, pixel_mask)
    assert [own.shape[1:] for own in own_logits(filled)] == [(8, 6), (4, 6), (1, 1)]
    for own, before in zip(own_logits(filled), masks, strict=True):
        assert torch.equal(own, before[:, : own.shape[1], : own.shape[2]])
    # A query with no confident pixel is not padding, nor is an image without masks.
    masks[1, 2] = PADDING_LOGIT
    masks[2] = PADDING_LOGIT
    assert [own.shape[1:] for own in own_logits(masks)] == [(8, 6)] * 3


def test_the_size_that_post_processing_takes_an_image_to_have_had() -> None:
    """`network_size` is the batch's; each image covers a part of it."""
    model, processor = sure_model(), FaiM2FImageProcessor(do_resize=False)
    with torch.no_grad():
        inputs = processor(PHOTOS, return_tensors="pt")
        outputs = model(**inputs)
        alone = model(**processor(PHOTOS[2], return_tensors="pt"))
    size = tuple(inputs["pixel_values"].shape[2:])
    assert size == (213, 190)  # neither is divisible by 4, but the image's 128 is
    found = processor.post_process_detections(outputs, SIZES, network_size=size, threshold=0.1)[2]
    expected = processor.post_process_detections(alone, SIZES[2:3], network_size=(128, 128), threshold=0.1)[0]
    assert expected and agree(found, expected)
    assert own_network_size((213, 190), (54, 48), (54, 48)) == (213, 190)
    assert own_network_size((853, 853), (214, 214), (160, 214)) == (640, 853)
    # If an image's own sides are not divisible by 4, they are only known to less than a stride.
    assert own_network_size((213, 190), (54, 48), (23, 48)) == (92, 190)

"""The model's outputs equal the recorded outputs of the original implementation, the project's first requirement."""

import math

import pytest
import torch

from tests.support.reference_models import (
    MODELS,
    RELATIVE_ERROR,
    VARIANTS,
    description,
    outputs,
    pixels,
    reference_model,
    relative_error,
)


@pytest.mark.parametrize("name", MODELS + VARIANTS)
def test_outputs_equal_the_original(name: str) -> None:
    model, reference = reference_model(name), outputs(name)
    with torch.no_grad():
        ours = model(pixels(name))
    for key in ("class_queries_logits", "masks_queries_logits"):
        assert relative_error(ours[key], reference[key]) <= RELATIVE_ERROR, key


@pytest.mark.parametrize("name", ["fai-mf-m-ade", "bisenetformer-m-ade", *VARIANTS])
def test_every_stage_equals_the_original(name: str) -> None:
    """Backbone levels, pyramid, mask features and intermediate predictions: the first one that differs locates the
    fault."""
    model = reference_model(name)
    with torch.no_grad():
        images = pixels(name)
        maps = model.backbone(images).feature_maps
        decoded = model.pixel_decoder(maps)
        intermediate = model(images, output_auxiliary_logits=True).auxiliary_logits
    stages = {f"res{level + 2}": feature_map for level, feature_map in enumerate(maps)}
    stages["mask_features"] = decoded.mask_features
    bisenet = model.config.pixel_decoder_type == "bisenet"
    level_name = "level_1/{}" if bisenet else "pyramid_{}"
    numbers = (32, 16) if bisenet else range(3)
    stages.update({level_name.format(n): level for n, level in zip(numbers, decoded.pyramid, strict=True)})
    for layer, prediction in enumerate(intermediate):
        for kind, key in (("class", "class_queries_logits"), ("mask", "masks_queries_logits")):
            stages[f"prediction_{layer}_{kind}" if bisenet else f"{kind}_logits_{layer}"] = prediction[key]
    theirs = {stage: value for stage, value in description(name)["stages"].items() if "not read" not in stage}
    assert list(stages) == list(theirs)
    for stage, expected in theirs.items():
        ours = stages[stage]
        assert list(ours.shape) == expected["shape"], stage
        scale = abs(expected["mean"]) + expected["std"]
        assert abs(float(ours.mean()) - expected["mean"]) <= 1e-5 * scale, stage
        assert abs(float(ours.std()) - expected["std"]) <= 1e-5 * scale, stage
        first = torch.tensor(expected["first"])
        assert (ours.flatten()[: len(first)] - first).abs().max() <= 1e-4 * scale, stage


@pytest.mark.parametrize("name", ["fai-m2f-s-ade", *VARIANTS])
@pytest.mark.parametrize("size", [(64, 64), (95, 129), (33, 70), (160, 47)])
def test_a_batch_equals_its_images_one_by_one(name: str, size: tuple[int, int]) -> None:
    model = reference_model(name)
    images = torch.randn(3, 3, *size)
    with torch.no_grad():
        together = model(images)
        alone = [model(image[None]) for image in images]
    for key in ("class_queries_logits", "masks_queries_logits"):
        assert relative_error(together[key], torch.cat([output[key] for output in alone])) <= 1e-5
    stride = 8 if model.config.pixel_decoder_type == "bisenet" else 4
    assert together.masks_queries_logits.shape[-2:] == tuple(math.ceil(side / stride) for side in size)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_both_attention_implementations_are_exact(implementation: str) -> None:
    name = "variant-resnet34c-sigmoid"
    model, reference = reference_model(name), outputs(name)
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    with torch.no_grad():
        ours = model(pixels(name))
    for key, theirs in reference.items():
        assert relative_error(ours[key], theirs) <= RELATIVE_ERROR

"""Conversion of transformers' Mask2Former, compared with transformers' implementation, with weights that all have an
effect."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hf_faim2f.conversion.mask2former import convert, convert_config, convert_processor, convert_state_dict, subtask_of
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForUniversalSegmentation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    ResNetConfig,
    SwinConfig,
)
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention as TheirAttention,
)

from hf_faim2f import FaiM2FConfig, FaiM2FForUniversalSegmentation, FaiM2FImageProcessor
from hf_faim2f.cli.convert import main
from hf_faim2f.errors import ConversionError
from hf_faim2f.model.pixel_decoder_faim2f import FaiM2FDeformableAttention
from tests.support.mask2former_models import KEYS, RESNET, STAGES, SWIN, lively, ours_of, saved, tiny
from tests.support.reference_models import relative_error, small_model

RELATIVE_ERROR = 1e-4
# The published sizes of Swin: (embed_dim, depths, heads, window).
PUBLISHED = {
    "swin-tiny": (96, [2, 2, 6, 2], [3, 6, 12, 24], 7),
    "swin-small": (96, [2, 2, 18, 2], [3, 6, 12, 24], 7),
    "swin-base": (128, [2, 2, 18, 2], [4, 8, 16, 32], 12),
    "swin-large": (192, [2, 2, 18, 2], [6, 12, 24, 48], 12),
    "r50": None,
}


def largest_error(ours: FaiM2FForUniversalSegmentation, theirs: Any, images: torch.Tensor) -> float:
    with torch.no_grad():
        one, other = ours(images), theirs(images)
    return max(relative_error(one[key], other[key]) for key in KEYS)


@pytest.mark.parametrize(
    ("backbone", "overrides"),
    [
        (SWIN, {}),
        (RESNET, {}),
        (SWIN, {"pre_norm": True}),
        (SWIN, {"enforce_input_projection": True}),
        (SWIN, {"feature_size": 64, "mask_feature_size": 24}),
        (SWIN, {"decoder_layers": 2}),
        (RESNET, {"decoder_layers": 3, "num_attention_heads": 2, "encoder_layers": 1}),
    ],
    ids=["swin", "resnet", "pre-norm", "projected", "widths", "one layer", "two layers"],
)
def test_equals_transformers(backbone: Any, overrides: dict[str, Any]) -> None:
    theirs = tiny(backbone, **overrides)
    projections = theirs.model.transformer_module.input_projections
    if not isinstance(projections, nn.ModuleList) and isinstance(projections[0], nn.Conv2d):
        pytest.skip("transformers 4.57 keeps these projections in a list, and so saves no weights of them")
    ours = ours_of(theirs)
    for size in ((64, 96), (128, 128), (95, 130)):
        assert largest_error(ours, theirs, torch.randn(2, 3, *size)) <= 1e-5, size


@pytest.mark.newest_only
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["r50", *(pytest.param(f"swin-{size}", marks=pytest.mark.large) for size in ("tiny", "small", "base", "large"))],
)
def test_the_published_architectures_equal_transformers(name: str) -> None:
    """At full width and depth, with random weights; the tolerance is a tenth of what conversion accepts."""
    if PUBLISHED[name] is None:
        backbone: Any = ResNetConfig(out_features=STAGES)
    else:
        embed_dim, depths, heads, window = PUBLISHED[name]
        backbone = SwinConfig(
            embed_dim=embed_dim, depths=depths, num_heads=heads, window_size=window, out_features=STAGES
        )
    queries = 200 if name == "swin-large" else 100
    config = Mask2FormerConfig(backbone_config=backbone.to_dict(), num_labels=80, num_queries=queries)
    theirs = lively(Mask2FormerForUniversalSegmentation(config))
    ours = ours_of(theirs)
    for size in ((192, 256), (160, 97)):
        # If a mask logit is almost 0, rounding decides what a query attends to; few images have such a pixel.
        errors = [largest_error(ours, theirs, torch.randn(1, 3, *size)) for _ in range(2)]
        assert min(errors) <= RELATIVE_ERROR, size


def test_deformable_attention_equals_transformers() -> None:
    """Including sampling points far outside the map."""
    torch.manual_seed(0)
    sizes = [(3, 4), (6, 7), (11, 13)]
    count = sum(height * width for height, width in sizes)
    ours, theirs = FaiM2FDeformableAttention(16, 4, 3), TheirAttention(16, 4, 3, 3)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(0, 1)
    theirs.load_state_dict(ours.state_dict())
    tokens, position, places = torch.randn(2, count, 16), torch.randn(1, count, 16), torch.rand(count, 2)
    expected, _ = theirs(
        tokens, encoder_hidden_states=tokens, position_embeddings=position, spatial_shapes_list=sizes,
        reference_points=places[None, :, None].expand(2, -1, 3, -1),
        **({} if "spatial_shapes" not in TheirAttention.forward.__code__.co_varnames else
           {"level_start_index": torch.tensor([0, 12, 54])}),
    )  # fmt: skip
    torch.testing.assert_close(ours(tokens + position, tokens, places, sizes), expected, rtol=1e-4, atol=1e-5)


def test_a_new_model_begins_as_deformable_detr_does() -> None:
    """As in transformers: one direction per head, offsets of 1 to 4 pixels, equal weights."""
    model = small_model(feature_size=32, pixel_decoder_type="deformable", encoder_layers=1, encoder_attention_heads=8,
                        use_level_embedding=True, pre_norm=False)  # fmt: skip
    attention = model.pixel_decoder.encoder_layers[0].attention
    theirs = Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(backbone_config=SWIN.to_dict(), feature_size=32, encoder_layers=1, num_attention_heads=8)
    ).model.pixel_level_module.decoder.encoder.layers[0].self_attn  # fmt: skip
    torch.testing.assert_close(attention.sampling_offsets.bias, theirs.sampling_offsets.bias)
    for name in ("sampling_offsets", "attention_weights"):
        assert not getattr(attention, name).weight.any()


def test_it_trains_saves_and_loads_again(tmp_path: Path) -> None:
    """Every weight gets a gradient, and saving and loading restores every weight."""
    model = ours_of(tiny()).train()
    images = torch.randn(1, 3, 64, 96)
    masks = torch.zeros(2, 64, 96)
    masks[0, :30], masks[1, 30:] = 1, 1
    loss = model(images, mask_labels=[masks], class_labels=[torch.tensor([0, 2])]).loss
    loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert [name for name in without if not name.startswith("backbone.")] == []
    model.save_pretrained(tmp_path)
    again = FaiM2FForUniversalSegmentation.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


class TestCommand:
    @pytest.mark.large
    def test_a_folder_that_loads_by_itself(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        theirs = tiny(id2label={0: "cat", 1: "dog", 2: "cow"})
        source, out = saved(tmp_path / "mask2former-tiny-coco-instance", theirs), tmp_path / "ours"
        assert main(["mask2former", str(source), str(out)]) == 0
        printed = capsys.readouterr().out
        assert "largest difference from transformers' model: " in printed and "of the largest logit" in printed
        # In another process, without this package: the folder's remote code suffices.
        program = (
            "import sys, torch; sys.modules['hf_faim2f'] = None\n"
            "from transformers import AutoModelForUniversalSegmentation\n"
            f"model = AutoModelForUniversalSegmentation.from_pretrained({str(out)!r}, trust_remote_code=True)\n"
            "outputs = model(torch.load(sys.argv[1]))\n"
            "torch.save([outputs.class_queries_logits, outputs.masks_queries_logits], sys.argv[2])\n"
        )
        images = torch.randn(1, 3, 64, 96)
        torch.save(images, tmp_path / "images.pt")
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "images.pt"), str(tmp_path / "outputs.pt")],
            check=True, capture_output=True, cwd=tmp_path,
        )  # fmt: skip
        with torch.no_grad():
            expected = theirs(images)
        for ours, key in zip(torch.load(tmp_path / "outputs.pt"), KEYS, strict=True):
            assert relative_error(ours.detach(), expected[key]) <= 1e-5
        model = AutoModelForUniversalSegmentation.from_pretrained(out, trust_remote_code=True)
        assert model.config.id2label == {0: "cat", 1: "dog", 2: "cow"}
        assert model.config.postprocessing_type == "instance" and model.config.decoder_layers == 4
        processor = AutoImageProcessor.from_pretrained(out, trust_remote_code=True)
        pixels = processor(np.zeros((50, 70, 3), np.uint8), return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, 64, 96)  # 64 x 90, padded to a multiple of 32
        card = (out / "README.md").read_text()
        assert "deformable attention" in card and "conversion error" in card and "Focoos" not in card

    def mistake(self, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
        assert main(["mask2former", *map(str, arguments)]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "Traceback" not in told
        return told

    def test_mistakes(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        source = saved(tmp_path / "model", tiny())
        out = tmp_path / "out"
        assert "pass --subtask, one of semantic" in self.mistake(capsys, source, out)
        assert "exists already" in self.mistake(capsys, source, tmp_path, "--subtask", "instance")
        assert "is not a folder" in self.mistake(capsys, source, tmp_path / "a" / "b", "--subtask", "instance")
        small_model().save_pretrained(tmp_path / "other")
        assert "model of type 'faim2f'" in self.mistake(capsys, tmp_path / "other", out, "--subtask", "instance")
        (tmp_path / "empty").mkdir()
        assert "cannot be loaded" in self.mistake(capsys, tmp_path / "empty", out, "--subtask", "instance")
        settings = (source / "preprocessor_config.json").read_text()
        for content in ("[1]", "[" * 100_000, "{"):
            (source / "preprocessor_config.json").write_text(content)
            told = self.mistake(capsys, source, out, "--subtask", "instance")
            assert "preprocessor_config.json cannot be read" in told
        (source / "preprocessor_config.json").write_text(settings)
        weights = load_file(source / "model.safetensors")
        spoiled = dict(weights)
        spoiled["class_predictor.bias"] = spoiled["class_predictor.bias"].clone().fill_(float("nan"))
        save_file(spoiled, source / "model.safetensors", {"format": "pt"})
        assert "not finite" in self.mistake(capsys, source, out, "--subtask", "instance")
        del spoiled["class_predictor.bias"]
        save_file(spoiled, source / "model.safetensors", {"format": "pt"})
        assert "lack 1 keys, the first 'class_predictor.bias'" in self.mistake(
            capsys, source, out, "--subtask", "instance"
        )
        config = json.loads((source / "config.json").read_text())
        save_file(weights, source / "model.safetensors", {"format": "pt"})
        for changes, told in (
            ({"num_queries": 9}, "2 have another shape, the first 'model.transformer_module.queries_embedder.weight'"),
            ({"num_attention_heads": 5}, f"the model {source} cannot be loaded ("),
        ):
            (source / "config.json").write_text(json.dumps({**config, **changes}))
            reason = self.mistake(capsys, source, out, "--subtask", "instance")
            assert told in reason and "only safetensors" not in reason
        (source / "config.json").write_text(json.dumps(config))
        (source / "README.md").write_text("---\nlicense: [\n---\n")  # no reason to refuse the weights
        assert main(["mask2former", str(source), str(out), "--subtask", "instance"]) == 0
        assert "the model card of the source is not kept (" in capsys.readouterr().out
        shutil.rmtree(out)
        (source / "README.md").unlink()
        (source / "model.safetensors").rename(source / "pytorch_model.bin")
        assert "only safetensors are read" in self.mistake(capsys, source, out, "--subtask", "instance")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "model", "other"]


def test_without_the_auxiliary_loss(tmp_path: Path) -> None:
    """transformers' own class does not predict with this setting."""
    source = saved(tmp_path / "model", tiny(use_auxiliary_loss=False))
    assert convert(str(source), tmp_path / "out", "instance").error <= RELATIVE_ERROR
    assert FaiM2FConfig.from_pretrained(tmp_path / "out").use_auxiliary_loss is False


def test_the_card_of_the_source_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(tmp_path / "model", tiny())
    (source / "README.md").write_text(
        "---\nlicense: apache-2.0\nbase_model: facebook/mask2former-swin-tiny-coco-panoptic\ndatasets:\n- me/flowers\n"
        "---\n# Mine\n\nOf my garden.\n\n## Thanks\n\nTo all.\n"
    )
    monkeypatch.setattr("hf_faim2f.conversion.mask2former.download_model", lambda name: source)
    assert convert("me/my-panoptic", tmp_path / "out").name == "my-panoptic"
    card = ModelCard((tmp_path / "out" / "README.md").read_text())
    assert card.data.license == "apache-2.0" and card.data.datasets == ["me/flowers"] and "faim2f" in card.data.tags
    assert card.data.base_model == "facebook/mask2former-swin-tiny-coco-panoptic"
    assert "Of my garden." in card.text and "To all." in card.text and "`me/my-panoptic` of transformers" in card.text


def test_weights_that_the_model_does_not_use_are_said(tmp_path: Path) -> None:
    source = saved(tmp_path / "model", tiny())
    weights = load_file(source / "model.safetensors")
    save_file({**weights, "adapter.weight": torch.ones(2)}, source / "model.safetensors", {"format": "pt"})
    notes = convert(str(source), tmp_path / "out", "instance").notes
    assert "weights that this model does not use are left out: 1, the first 'adapter.weight'" in notes


def test_a_converter_that_is_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The outputs of both models are compared before the folder is kept."""
    import hf_faim2f.conversion.mask2former as module

    source = saved(tmp_path / "model", tiny())
    exact = module.convert_state_dict

    def wrong(state: Any, config: FaiM2FConfig) -> Any:
        converted = exact(state, config)
        converted["transformer_decoder.layers.1.cross_attention.v_proj.bias"] += 1
        return converted

    monkeypatch.setattr(module, "convert_state_dict", wrong)
    with pytest.raises(ConversionError, match="differs from transformers' by"):
        convert(str(source), tmp_path / "out", "semantic")
    assert not (tmp_path / "out").exists()


def test_configurations_that_cannot_be() -> None:
    theirs = tiny()
    theirs.config.feature_strides = [8, 16, 32, 64]
    with pytest.raises(ConversionError, match="feature_strides"):
        convert_config(theirs.config, "semantic")
    with pytest.raises(ConversionError, match="has no place in this model"):
        convert_state_dict({"model.extra": torch.zeros(1)}, convert_config(tiny().config, "semantic"))
    config = convert_config(tiny().config, "semantic")
    state = tiny().state_dict()
    state["class_predictor.bias"] = torch.zeros(9)
    with pytest.raises(ConversionError, match=r"has the shape \(9,\), and the configuration says \(4,\)"):
        convert_state_dict(state, config)
    for overrides, message in (
        ({"encoder_layers": 0}, "encoder_layers.*at least 1 where the pixel decoder is deformable"),
        ({"feature_size": 24}, "feature_size.*divisible by 32"),
        ({"pixel_decoder_type": "deformabel"}, "pixel_decoder_type.*one of fpn, deformable"),
    ):
        with pytest.raises(ValueError, match=message):
            small_model(**{"pixel_decoder_type": "deformable", "encoder_layers": 1, "feature_size": 32, **overrides})


def test_processors() -> None:
    config = convert_config(tiny().config, "semantic")
    old = {"size": 512, "max_size": 2048, "reduce_labels": True, "ignore_index": 255, "resample": 3}
    processor, notes = convert_processor(old, config)
    assert processor.size == {"shortest_edge": 512, "longest_edge": 2048}
    assert processor.to_dict()["do_reduce_labels"] is True and len(notes) == 1 and "resample = 3" in notes[0]
    assert processor.to_dict()["use_mask_score"] is True and processor.to_dict()["predict_all_pixels"] is False
    assert processor.size_divisor == 32  # transformers' default
    assert convert_processor({"size": 512, "size_divisor": 0}, config)[0].size_divisor == 0
    assert convert_processor({"max_size": 999}, config)[0].size == {"shortest_edge": 800, "longest_edge": 999}
    processor, notes = convert_processor({"size": 512, "pad_size": {"height": 640, "width": 640}}, config)
    assert processor.pad_size is None and len(notes) == 1 and "pad_size = {'height': 640" in notes[0]
    with pytest.raises(ConversionError, match=r"preprocessor_config.json cannot be converted \(image_std"):
        convert_processor({"image_std": 0}, config)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.25, 0.2, 0.3]},
        {"do_normalize": False},
        {"rescale_factor": 1 / 127.5},
        {"do_rescale": False},
        {"do_rescale": None},
        {"do_normalize": None},
        {"do_resize": False},
    ],
    ids=lambda overrides: ", ".join(overrides) or "defaults",
)
def test_images_and_maps_are_prepared_as_before(overrides: dict[str, Any]) -> None:
    """All settings of the original image processor are kept: the same pixels, and the same segments to train on."""
    size = {"shortest_edge": 64, "longest_edge": 128}
    settings = {"size": size, "ignore_index": 2, "size_divisor": 32, **overrides}
    theirs = Mask2FormerImageProcessor(**settings)
    ours, _ = convert_processor(settings, convert_config(tiny().config, "semantic"))
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (72, 100, 3), dtype=np.uint8)
    labels = generator.integers(0, 4, (9, 10), dtype=np.uint8).repeat(8, 0).repeat(10, 1)
    found, expected = (p([image], [labels], return_tensors="pt") for p in (ours, theirs))
    expected_pixels, inside = expected["pixel_values"], expected["pixel_mask"].bool()
    assert found["pixel_values"].shape == expected_pixels.shape
    assert (found["pixel_mask"].bool() == inside).all()
    difference = (found["pixel_values"] - expected_pixels).abs()[:, :, inside[0]].max()
    assert difference <= 1e-2 * expected_pixels.abs().max()  # resized to 8 bits here and there
    assert found["class_labels"][0].tolist() == expected["class_labels"][0].tolist() == [0, 1, 3]


def test_a_folder_without_image_processor_gets_transformers_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved(tmp_path / "model", tiny())
    (source / "preprocessor_config.json").unlink()
    assert main(["mask2former", str(source), str(tmp_path / "out"), "--subtask", "instance"]) == 0
    printed = capsys.readouterr().out
    assert "no preprocessor_config.json says the size of images" in printed and "800 pixels" in printed
    image = np.zeros((300, 410, 3), np.uint8)
    ours = FaiM2FImageProcessor.from_pretrained(tmp_path / "out")(image, return_tensors="pt")["pixel_values"]
    theirs = Mask2FormerImageProcessor()(image, return_tensors="pt")["pixel_values"]
    assert ours.shape == theirs.shape == (1, 3, 800, 1120)


@pytest.mark.parametrize("has_both", [True, False])
def test_the_settings_of_a_processor_are_preferred(has_both: bool, tmp_path: Path) -> None:
    """As in transformers 5; 4.57 reads the other file first."""
    source = saved(tmp_path / "model", tiny())
    settings = json.loads((source / "preprocessor_config.json").read_text())
    if not has_both:
        (source / "preprocessor_config.json").unlink()
    nested = {"processor_class": "X", "image_processor": {**settings, "size": {"height": 32, "width": 64}}}
    (source / "processor_config.json").write_text(json.dumps(nested))
    convert(str(source), tmp_path / "out", "instance")
    ours = FaiM2FImageProcessor.from_pretrained(tmp_path / "out")
    assert ours.size == {"height": 32, "width": 64}
    if not has_both or not transformers.__version__.startswith("4."):
        theirs = AutoImageProcessor.from_pretrained(source)
        assert dict(theirs.size) == ours.size
    (source / "processor_config.json").write_text('{"image_processor": 3}')
    with pytest.raises(ConversionError, match="processor_config.json cannot be read"):
        convert(str(source), tmp_path / "no", "instance")


def test_a_name_that_states_two_tasks_states_none() -> None:
    assert subtask_of("mask2former-swin-tiny-coco-panoptic") == "panoptic"
    assert subtask_of("panoptic-finetuned-for-semantic") is None and subtask_of("mine") is None

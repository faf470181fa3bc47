"""Backbones: our own, compared with independent implementations where they exist, and others through AutoBackbone."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoBackbone, ResNetBackbone, ResNetConfig, RTDetrResNetBackbone

from hf_faim2f import FaiM2FForUniversalSegmentation, STDCBackbone, STDCConfig
from hf_faim2f.model.backbone_resnet import FaiM2FResNetBackbone
from hf_faim2f.model.configuration_faim2f import FaiM2FResNetConfig
from tests.support.reference_models import small_config

STAGES = ["stage1", "stage2", "stage3", "stage4"]


def randomize(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.weight.uniform_(0.5, 1.5)
                part.bias.normal_(0, 0.1)
                part.running_mean.normal_(0, 0.1)
                part.running_var.uniform_(0.5, 1.5)


def test_the_callers_backbone_configuration_stays_as_it_is() -> None:
    """One object may be passed for several models."""
    backbone = STDCConfig(embedding_size=8, depths=(1, 1, 1))
    before = backbone.to_dict()
    infrared, color = (small_config(backbone_config=backbone, num_channels=count) for count in (4, None))
    assert (infrared.num_channels, color.num_channels) == (4, 3)
    color.num_channels = 5
    assert backbone.to_dict() == before and infrared.num_channels == 4


@pytest.mark.parametrize("variant", ["a", "b"])
def test_resnet_a_and_b_equal_the_resnet_of_transformers(variant: str) -> None:
    """Bottlenecks with a 7x7 stem equal transformers' ResNet, with the stride on the 1x1 (a) or the 3x3 (b)
    convolution."""
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [32, 64, 96, 128], "depths": [1, 2, 1, 2]}
    sizes["out_features"] = STAGES
    ours = FaiM2FResNetBackbone(FaiM2FResNetConfig(variant=variant, **sizes)).eval()
    theirs = ResNetBackbone(ResNetConfig(downsample_in_bottleneck=variant == "a", **sizes)).eval()
    randomize(theirs)
    state = {key.replace("embedder.embedder.", "embedder.embedder.0."): v for key, v in theirs.state_dict().items()}
    ours.load_state_dict(state)
    images = torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        pairs = zip(ours(images).feature_maps, theirs(images).feature_maps, strict=True)
        for our_map, their_map in pairs:
            torch.testing.assert_close(our_map, their_map)


def test_resnet_c_is_resnet_d_but_for_the_shortcuts() -> None:
    """With stride 1 everywhere except in the stem, there is no strided shortcut, and c and d are the same."""
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [32, 64, 96, 128], "depths": [2, 1, 1, 1]}
    sizes["out_features"] = ["stage1"]
    ours = FaiM2FResNetBackbone(FaiM2FResNetConfig(variant="c", **sizes)).eval()
    from transformers import RTDetrResNetConfig

    theirs = RTDetrResNetBackbone(RTDetrResNetConfig(**sizes)).eval()
    randomize(theirs)
    state = {key.replace("shortcut.1.", "shortcut."): value for key, value in theirs.state_dict().items()}
    ours.load_state_dict(state)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images).feature_maps[0], theirs(images).feature_maps[0])
        strided = ours.encoder(ours.embedder(images)).last_hidden_state
        pooled = theirs.encoder(theirs.embedder(images)).last_hidden_state
    assert strided.shape == pooled.shape and not torch.allclose(strided, pooled)


@pytest.mark.parametrize("block_type", ["cat", "add"])
@pytest.mark.parametrize("block_num", [2, 3, 4])
@pytest.mark.parametrize("depths", [[1, 1, 1], [2, 3, 1]])
def test_stdc_of_any_base_and_depth(block_type: str, block_num: int, depths: list[int]) -> None:
    config = STDCConfig(
        embedding_size=16, depths=depths, block_type=block_type, block_num=block_num, out_features=STAGES
    )
    backbone = STDCBackbone(config).eval()
    with torch.no_grad():
        maps = backbone(torch.randn(2, 3, 65, 100)).feature_maps
    assert [tuple(feature_map.shape) for feature_map in maps] == [
        (2, 16, 17, 25), (2, 64, 9, 13), (2, 128, 5, 7), (2, 256, 3, 4)
    ]  # fmt: skip
    assert backbone.channels == [16, 64, 128, 256]
    blocks = [module for module in backbone.modules() if type(module).__name__ == "STDCBlock"]
    assert len(blocks) == sum(depths)
    assert all(len(block.convolutions) == block_num for block in blocks)


def test_stdc_with_a_last_convolution() -> None:
    backbone = STDCBackbone(STDCConfig(embedding_size=8, depths=[1, 1, 1], use_conv_last=True, out_features=STAGES))
    with torch.no_grad():
        maps = backbone.eval()(torch.randn(1, 3, 64, 64)).feature_maps
    assert maps[-1].shape == (1, 1024, 2, 2) and backbone.channels[-1] == 1024


def test_stdc_is_an_auto_backbone(tmp_path: Path) -> None:
    backbone = AutoBackbone.from_config(STDCConfig(embedding_size=8, depths=[1, 1, 1], out_indices=[2, 4]))
    assert type(backbone) is STDCBackbone and backbone.out_features == ["stage2", "stage4"]
    backbone.save_pretrained(tmp_path)
    loaded = STDCBackbone.from_pretrained(tmp_path)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        first, second = backbone.eval()(images).feature_maps, loaded.eval()(images).feature_maps
    assert len(first) == len(second) == 2
    assert torch.equal(first[1], second[1])


OTHERS: dict[str, dict[str, Any]] = {
    "swin": {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 3, 4], "window_size": 4},
    "convnext": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "rt_detr_resnet": {
        "embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic",
    },
    "resnet": {"embedding_size": 8, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]},
}  # fmt: skip


@pytest.mark.parametrize("model_type", OTHERS)
def test_any_backbone_of_transformers(model_type: str, tmp_path: Path) -> None:
    values: dict[str, Any] = {"model_type": model_type, **OTHERS[model_type]}
    config = small_config(backbone_config=values)
    assert len(config.backbone_config.out_features) == 4
    model = FaiM2FForUniversalSegmentation(config).eval()
    model.save_pretrained(tmp_path)
    loaded = FaiM2FForUniversalSegmentation.from_pretrained(tmp_path)
    for size in ((64, 96), (75, 53)):
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            first, second = model(images), loaded(images)
            single = model(images[:1])
        # ConvNeXt's patches drop incomplete ones; the others round up.
        rounds = int if model_type == "convnext" else math.ceil
        assert first.masks_queries_logits.shape == (2, 10, rounds(size[0] / 4), rounds(size[1] / 4))
        assert torch.equal(first.masks_queries_logits, second.masks_queries_logits)
        torch.testing.assert_close(first.masks_queries_logits[:1], single.masks_queries_logits, rtol=1e-3, atol=1e-4)
    labels = {"mask_labels": [torch.ones(1, 75, 53)] * 2, "class_labels": [torch.tensor([1])] * 2}
    model.train()(images, **labels).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if name.startswith("backbone") and p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)

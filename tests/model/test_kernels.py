"""The Hub's kernels for deformable attention with `from_pretrained(..., use_kernels=True)`, using stand-ins."""

import inspect
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForUniversalSegmentation
from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention
from transformers.utils import is_kernels_available

from hf_faim2f.model.pixel_decoder_faim2f import FaiM2FDeformableSampling
from tests.support.mask2former_models import small_mask2former

NAME = "MultiScaleDeformableAttention"
called: list[tuple[Any, ...]] = []


class Kernel(nn.Module):
    """Stands for the Hub's kernel: a layer without state, whose forward has the arguments of transformers' own
    layer."""

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: list[tuple[int, int]],
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        arguments = (
            value, value_spatial_shapes, value_spatial_shapes_list, level_start_index, sampling_locations,
            attention_weights, im2col_step,
        )  # fmt: skip
        called.append(arguments)
        return MultiScaleDeformableAttention().forward(*arguments)


class Repository:
    """Stands for `kernels.LayerRepository`, which downloads kernels."""

    layer_name = NAME

    def load(self) -> type[nn.Module]:
        return Kernel


def samplings(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__ == FaiM2FDeformableSampling.__name__]


def test_a_kernel_gets_what_transformers_own_layer_gets() -> None:
    """Replaces the layer as the package `kernels` does, with transformers' implementation; the maps have odd sizes."""
    ours = inspect.signature(FaiM2FDeformableSampling.forward).parameters
    theirs = inspect.signature(MultiScaleDeformableAttention.forward).parameters
    assert [(one.name, one.kind) for one in ours.values()] == [(one.name, one.kind) for one in theirs.values()]
    model = small_mask2former().eval()
    pixel_values = torch.randn(3, 3, 96, 160)
    called.clear()
    with torch.no_grad():
        expected = model(pixel_values)
        layers = samplings(model)
        for layer in layers:
            layer.forward = MethodType(Kernel.forward, layer)  # type: ignore[method-assign]
        found = model(pixel_values)
    assert len(called) == len(layers) == model.config.encoder_layers > 0
    for name in ("class_queries_logits", "masks_queries_logits"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-4, rtol=1e-4)
    for value, shapes, sizes, starts, places, weights, step in called:
        assert shapes.dtype == starts.dtype == torch.long and shapes.tolist() == [list(size) for size in sizes]
        assert sizes == [(3, 5), (6, 10), (12, 20)] and starts.tolist() == [0, 15, 75]
        assert value.shape[:2] == places.shape[:2] == weights.shape[:2] == (3, 315) and step == 3
        assert value.is_contiguous() and places.is_contiguous() and weights.is_contiguous()  # required by kernels


def test_no_weights_and_no_kernel_without_being_asked() -> None:
    model = small_mask2former().eval()
    layers = samplings(model)
    assert layers and not any(list(layer.parameters()) or list(layer.buffers()) for layer in layers)
    assert not any("sampling." in name for name in model.state_dict())
    assert not any("forward" in vars(layer) for layer in layers)


@pytest.mark.skipif(is_kernels_available() is True, reason="needs an environment without the package kernels")
def test_without_the_package_a_sentence_says_so(tmp_path: Path) -> None:
    small_mask2former().save_pretrained(tmp_path)
    with pytest.raises((ValueError, ImportError), match="(?i)kernels"):
        AutoModelForUniversalSegmentation.from_pretrained(tmp_path, trust_remote_code=True, use_kernels=True)
    AutoModelForUniversalSegmentation.from_pretrained(tmp_path, trust_remote_code=True)


@pytest.mark.skipif(is_kernels_available() is not True, reason="needs the package kernels, as transformers wants it")
def test_the_package_finds_the_layer(tmp_path: Path) -> None:
    """With its own mapping, because there is neither a GPU nor the Hub."""
    from kernels import use_kernel_mapping

    assert FaiM2FDeformableSampling.kernel_layer_name == NAME
    small_mask2former().save_pretrained(tmp_path)
    pixel_values = torch.randn(1, 3, 96, 160)
    called.clear()
    with torch.no_grad():
        model = AutoModelForUniversalSegmentation.from_pretrained(tmp_path, trust_remote_code=True).eval()
        expected = model(pixel_values).masks_queries_logits
        assert not called
        with use_kernel_mapping({NAME: {"cpu": Repository()}}, inherit_mapping=False):
            model.use_kernels = True
        found = model(pixel_values).masks_queries_logits
    assert len(called) == model.config.encoder_layers
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)

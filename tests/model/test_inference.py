"""`optimize_for_inference` and steps that only evaluation skips: less work, the same numbers."""

import copy
import pickle
import shutil
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from transformers import ResNetConfig, RTDetrResNetConfig
from transformers.models.rt_detr.modeling_rt_detr_resnet import RTDetrResNetBottleNeckLayer

from hf_faim2f import FaiM2FForUniversalSegmentation
from hf_faim2f.model import attention_faim2f as positions
from hf_faim2f.model import inference_faim2f as inference
from hf_faim2f.model.inference_faim2f import InferenceConvolution, InferenceResidualBlock, fold_normalizations
from hf_faim2f.model.point_sampling_faim2f import MaskProduct
from tests.support.reference_models import (
    MODELS,
    RELATIVE_ERROR,
    VARIANTS,
    outputs,
    pixels,
    reference_model,
    relative_error,
    small_model,
)

KEYS = ("class_queries_logits", "masks_queries_logits")


def lively(model: FaiM2FForUniversalSegmentation) -> FaiM2FForUniversalSegmentation:
    """Sets non-trivial batch norms; those of a new model are nearly the identity."""
    torch.manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
    return model.eval()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.large) if "-l-" in name else name for name in MODELS + VARIANTS]
)
def test_an_optimized_model_equals_the_original(name: str) -> None:
    model, reference = copy.deepcopy(reference_model(name)), outputs(name)
    assert model.optimize_for_inference() is model
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    with torch.no_grad():
        ours = model(pixels(name))
    for key in KEYS:
        assert relative_error(ours[key], reference[key]) <= RELATIVE_ERROR, key


def test_convolutions_with_an_adapter_are_left_alone() -> None:
    model = lively(small_model())
    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    adapted = [name for name, module in convolutions.items() if module.groups == 1][1::3]
    normalizations = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=adapted, init_lora_weights=False)).eval()
    pixel_values = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(pixel_values)
        model.optimize_for_inference()
        ours = model(pixel_values)
    assert 0 < sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) < normalizations
    for key in KEYS:
        assert relative_error(ours[key], expected[key]) <= RELATIVE_ERROR, key


@pytest.mark.parametrize("size", [(64, 64), (95, 129), (33, 70), (128, 96)])
def test_at_other_sizes_and_in_batches(size: tuple[int, int]) -> None:
    plain = copy.deepcopy(reference_model("fai-m2f-s-ade"))
    optimized = copy.deepcopy(plain).optimize_for_inference()
    images = torch.randn(2, 3, *size)
    expected = plain(images)  # with gradients: the code path of training
    with torch.inference_mode():
        ours = optimized(images)
    for key in KEYS:
        assert relative_error(ours[key], expected[key].detach()) <= 1e-5


def test_a_batch_runs_as_a_whole() -> None:
    """The network gets the whole batch and returns the same logits."""
    plain = lively(small_model(decoder_layers=2))
    optimized = copy.deepcopy(plain).optimize_for_inference()
    seen: list[int] = []
    optimized.backbone.register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments[0])))
    images = torch.randn(5, 3, 64, 96)
    with torch.no_grad():
        expected, ours = plain(images), optimized(images)
        assert seen == [5]
        for key in KEYS:
            assert relative_error(ours[key], expected[key]) <= 1e-5
        assert [part.shape for part in optimized(images, return_dict=False)] == [ours[key].shape for key in KEYS]
        seen.clear()
        assert len(optimized(images, output_hidden_states=True).hidden_states) == 3
        assert len(optimized(images, output_auxiliary_logits=True).auxiliary_logits) == 2 and seen == [5, 5]


def test_transformers_own_backbone_is_folded_too() -> None:
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="bottleneck",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    model = lively(small_model(backbone_config=backbone.to_dict()))
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = model(images)
        norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        assert fold_normalizations(model) == norms > 10
        ours = model(images)
    for key in KEYS:
        assert relative_error(ours[key], expected[key]) <= 1e-5


def test_maps_are_tokens_without_a_copy() -> None:
    """With channels-last memory, the decoder's tokens are views of the pixel decoder's maps."""
    model = small_model().optimize_for_inference()
    with torch.no_grad():
        decoded = model.pixel_decoder(
            model.backbone(torch.randn(1, 3, 64, 96).contiguous(memory_format=torch.channels_last)).feature_maps
        )
    for level in (*decoded.pyramid, decoded.mask_features):
        assert level.flatten(2).transpose(1, 2).is_contiguous()


def test_it_can_be_copied_cast_and_optimized_twice() -> None:
    model = lively(small_model(decoder_layers=2))
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(images)
        model.optimize_for_inference()
        again = copy.deepcopy(model).optimize_for_inference()
        assert again.is_optimized_for_inference
        for key in KEYS:
            assert relative_error(again(images)[key], expected[key]) <= 1e-5
        wide = model.double()(images.double())
    assert wide.masks_queries_logits.dtype == torch.float64
    assert relative_error(wide.masks_queries_logits.float(), expected.masks_queries_logits) <= 1e-4
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_it_can_neither_be_trained_nor_saved(tmp_path: Path) -> None:
    model = small_model().optimize_for_inference()
    assert not model.eval().training
    with pytest.raises(ValueError, match="cannot be trained: load it again"):
        model.train()
    with pytest.raises(ValueError, match="cannot be saved: save it before"):
        model.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def unfused(model: nn.Module, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The logits by torch's `conv2d` and `relu`."""
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(inference, "_onednn", lambda: None)
        found = model(images)
    return [found[key] for key in KEYS]


needs_onednn = pytest.mark.skipif(inference._onednn() is None, reason="needs an x86 CPU on which oneDNN has bfloat16")


@needs_onednn
@pytest.mark.parametrize("name", ["fai-m2f-s-ade", "bisenetformer-s-ade"])
def test_fused_convolutions_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(reference_model(name)).optimize_for_inference().bfloat16()
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert all(type(module) is InferenceConvolution for module in convolutions)
    assert sum(module.relu for module in convolutions) > len(convolutions) / 4
    for shape in ((1, 3, 128, 96), (2, 3, 64, 160)):
        images = torch.randn(shape).bfloat16()
        with torch.no_grad():
            ours = model(images)
        assert all(module._packed is not None for module in convolutions)
        for key, expected in zip(KEYS, unfused(model, images, monkeypatch), strict=True):
            assert torch.equal(ours[key], expected)
        broken = images.clone()
        broken[0, 0, 0, 0] = torch.nan
        with torch.no_grad():
            assert model(broken)["masks_queries_logits"].isnan().any()


STAGES = ["stage1", "stage2", "stage3", "stage4"]
RESNET = {"embedding_size": 32, "hidden_sizes": [32, 48, 64, 80], "depths": [2, 1, 1, 1]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
@pytest.mark.parametrize("config", [ResNetConfig, RTDetrResNetConfig])
def test_residuals_are_added_by_the_last_convolution(
    config: type, layer_type: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = config(**RESNET, layer_type=layer_type, out_features=STAGES)
    plain = lively(small_model(backbone_config=backbone.to_dict())).backbone
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        exact = plain.double()(images.to(dtype).double()).feature_maps
        model = lively(small_model(backbone_config=backbone.to_dict())).eval().requires_grad_(False)
        model.backbone.load_state_dict(plain.float().state_dict())
        prepared = model.optimize_for_inference().backbone.to(dtype)
        blocks = [module for module in prepared.modules() if isinstance(module, InferenceResidualBlock)]
        assert len(blocks) == 5 and all(block.layer[-1].convolution.relu for block in blocks)
        ours = prepared(images.to(dtype)).feature_maps
        assert all(part.isnan().any() for part in prepared(torch.full_like(images, torch.nan).to(dtype)).feature_maps)
        with monkeypatch.context() as patch:
            patch.setattr(inference, "_onednn", lambda: None)
            others = prepared(images.to(dtype)).feature_maps
    for expected, fused, apart in zip(exact, ours, others, strict=True):
        if dtype == torch.float32:
            assert torch.equal(fused, apart) and relative_error(fused, expected.float()) <= 1e-5
        else:  # rounded once less
            assert (fused - expected).abs().mean() <= 1.05 * (apart - expected).abs().mean()
            assert (fused - expected).abs().mean() <= 0.02 * expected.abs().mean()


@needs_onednn
def test_fused_convolutions_follow_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively(small_model(decoder_layers=1)).optimize_for_inference().bfloat16()
    stem = model.backbone.stem.convolution
    images = torch.randn(1, 3, 64, 96).bfloat16()

    def change() -> None:
        with torch.no_grad():
            stem.weight.mul_(-1)

    def replace() -> None:
        stem.weight = nn.Parameter(torch.randn_like(stem.weight), requires_grad=False)

    seen = []
    for step in (lambda: None, change, replace, model.float, model.bfloat16):
        step()
        if stem.weight.dtype == torch.bfloat16:
            with torch.no_grad():
                seen.append(model(images).masks_queries_logits)
            assert torch.equal(seen[-1], unfused(model, images, monkeypatch)[1])
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again.backbone.stem.convolution._packed is None
        with torch.no_grad():
            assert torch.equal(again(images).masks_queries_logits, seen[-1])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for scale in (1.1, 1.3, 1.7):  # new tensors may lie where the previous ones were
        scaled = {name: value * scale for name, value in state.items()}
        with torch.no_grad():
            ours = torch.func.functional_call(model, scaled, (images,)).masks_queries_logits
            model.load_state_dict(scaled, assign=True)
            assert torch.equal(model(images).masks_queries_logits, ours)
            assert torch.equal(unfused(model, images, monkeypatch)[1], ours)
            model.load_state_dict(state, assign=True)


def test_fused_convolutions_leave_special_tensors_to_torch() -> None:
    model = small_model(decoder_layers=1, attn_implementation="eager").optimize_for_inference().bfloat16()
    stem = model.backbone.stem.convolution
    images = torch.randn(1, 3, 64, 96).bfloat16()
    with torch.no_grad():
        tangent = torch.func.jvp(lambda images: stem(input=images), (images,), (torch.randn_like(images),))[1]
        assert tangent.float().norm() > 0
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(images, torch.randn_like(images))
            assert forward_ad.unpack_dual(stem(dual)).tangent.float().norm() > 0
        weights = torch.stack([stem.weight, 2 * stem.weight])
        both = torch.vmap(lambda weight: torch.func.functional_call(stem, {"weight": weight}, (images,)))(weights)
        assert both.shape[0] == 2
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert stem(torch.randn(1, 3, 64, 96).bfloat16()).shape == both.shape[1:]


def test_fused_convolutions_keep_gradients_of_the_image_and_autocast() -> None:
    plain = lively(small_model(decoder_layers=1))
    optimized = copy.deepcopy(plain).optimize_for_inference()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert relative_error(optimized(images).masks_queries_logits, plain(images).masks_queries_logits) <= 0.1
    gradients = []
    for model in (plain.bfloat16(), optimized.bfloat16()):
        leaf = images.bfloat16().requires_grad_()
        model(leaf).masks_queries_logits.sum().backward()
        gradients.append(leaf.grad)
    assert torch.nn.functional.cosine_similarity(*(found.flatten().float() for found in gradients), dim=0) > 0.95


@pytest.mark.parametrize("part", ["layer", "layer.2", "activation", "layer.2.convolution"])
def test_a_residual_block_with_hooks_stays_as_it_is(part: str) -> None:
    backbone = RTDetrResNetConfig(**RESNET, layer_type="bottleneck", out_features=STAGES)
    model = lively(small_model(backbone_config=backbone.to_dict()))
    fold_normalizations(model)
    block = next(module for module in model.modules() if isinstance(module, RTDetrResNetBottleNeckLayer))
    calls: list[nn.Module] = []
    block.get_submodule(part).register_forward_hook(lambda module, arguments, output: calls.append(module))
    model.optimize_for_inference()
    assert type(block) is RTDetrResNetBottleNeckLayer
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 96))
    assert len(calls) == 1


def test_a_convolution_with_another_forward_stays_as_it_is() -> None:
    """For example where accelerate moves the weights before each call."""
    plain = lively(small_model(decoder_layers=1))
    model = copy.deepcopy(plain)
    fold_normalizations(model)
    stem = model.backbone.stem.convolution
    stem.forward = lambda hidden_state: nn.functional.conv2d(hidden_state, stem.weight, stem.bias, 2, 1)
    model.optimize_for_inference()
    assert type(stem) is nn.Conv2d and isinstance(model.backbone.stem.activation, nn.ReLU)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert relative_error(model(images).masks_queries_logits, plain(images).masks_queries_logits) <= 1e-5


@pytest.mark.newest_only
@pytest.mark.large
def test_an_optimized_model_compiles_as_one_graph() -> None:
    model = lively(small_model(decoder_layers=2)).optimize_for_inference()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    images = torch.randn(3, 3, 64, 96)
    with torch.no_grad():
        expected = model(images)
        for key in KEYS:
            torch.testing.assert_close(compiled(images)[key], expected[key])


@pytest.mark.large
@pytest.mark.slow  # compiles twice
@pytest.mark.newest_only
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_it_says_the_same_and_is_compiled_for_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    plain = lively(small_model(decoder_layers=1)).optimize_for_inference()
    torch.compiler.reset()
    counters.clear()
    compiled = copy.deepcopy(plain).optimize_for_inference(compile=True)
    with torch.no_grad():
        # Similar sizes, because torch recompiles for maps so small that it selects another convolution.
        for size in ((128, 160), (130, 166), (140, 154), (133, 170)):
            images = torch.randn(1, 3, *size)
            expected, ours = plain(images), compiled(images)
            for key in KEYS:
                assert relative_error(ours[key], expected[key]) <= 1e-5, size
        assert counters["stats"]["unique_graphs"] <= 2 and any(tmp_path.rglob("*.so"))  # one static, one dynamic

        # A new process would find the compiled code in the cache on disk.
        torch.compiler.reset()
        counters.clear()
        copy.deepcopy(plain).optimize_for_inference(compile=True)(torch.randn(1, 3, 128, 160))
    assert counters["inductor"]["fxgraph_cache_hit"] == 1 and counters["inductor"]["fxgraph_cache_miss"] == 0
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2])
def test_mask_logits_of_channels_last_features(count: int, dtype: torch.dtype) -> None:
    embedding = torch.randn(count, 5, 8, dtype=dtype)
    features = torch.randn(count, 8, 6, 7, dtype=dtype).contiguous(memory_format=torch.channels_last)
    expected = torch.einsum("bqc,bchw->bqhw", embedding.double(), features.double())
    masks = MaskProduct(embedding, features).full()
    assert masks.shape == (count, 5, 6, 7) and masks.dtype == dtype
    torch.testing.assert_close(masks.double(), expected, rtol=1e-2, atol=4 * torch.finfo(dtype).eps)


def test_position_embeddings_are_made_once_a_size() -> None:
    positions._kept.clear()
    features = torch.zeros(2, 8, 5, 7)
    with torch.inference_mode():
        first = positions.sine_position_embedding(features)
    assert positions.sine_position_embedding(features + 1) is first
    torch.testing.assert_close(first, positions._embed(features), rtol=0, atol=0)
    others = (torch.zeros(2, 8, 7, 5), torch.zeros(2, 12, 5, 7), features.double())
    assert all(positions.sine_position_embedding(other) is not first for other in others)
    # Created in inference mode, used where gradients are needed.
    leaf = torch.zeros(1, 35, 8, requires_grad=True)
    (leaf * positions.sine_position_embedding(features)).sum().backward()
    assert torch.equal(leaf.grad, first)
    for side in range(1, 40):
        positions.sine_position_embedding(torch.zeros(1, 8, side, 3))
    assert len(positions._kept) == positions.MOST_KEPT
    assert positions.sine_position_embedding(features) is not first

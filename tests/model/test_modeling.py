"""What users of transformers expect of every model."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from accelerate import infer_auto_device_map
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModel, AutoModelForUniversalSegmentation, ResNetConfig
from transformers.utils import logging as transformers_logging

from hf_faim2f import FaiM2FConfig, FaiM2FForSemanticSegmentation, FaiM2FForUniversalSegmentation
from hf_faim2f.model.transformer_decoder_faim2f import FaiM2FTransformerDecoder
from tests.support.mask2former_models import small_mask2former
from tests.support.reference_models import BISENET, small_config, small_model

IMAGES = (2, 3, 64, 96)


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or IMAGES), generator=torch.Generator().manual_seed(1))


def targets() -> dict[str, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    masks = [(torch.rand(n, 64, 96, generator=generator) > 0.7).float() for n in (3, 1)]
    return {"mask_labels": masks, "class_labels": [torch.tensor([0, 4, 2]), torch.tensor([1])]}


def test_shapes_of_every_output() -> None:
    model = small_model()
    with torch.no_grad():
        output = model(
            images(), output_hidden_states=True, output_attentions=True, output_auxiliary_logits=True, **targets()
        )
    assert output.class_queries_logits.shape == (2, 10, 6)
    assert output.masks_queries_logits.shape == (2, 10, 16, 24)
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 10, 32)] * 5
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 4, 10, 10)] * 4
    levels = [2 * 3, 4 * 6, 8 * 12, 2 * 3]
    assert [tuple(weights.shape) for weights in output.cross_attentions] == [(2, 4, 10, n) for n in levels]
    assert len(output.auxiliary_logits) == 4
    for prediction in output.auxiliary_logits:
        assert prediction["class_queries_logits"].shape == (2, 10, 6)
        assert prediction["masks_queries_logits"].shape == (2, 10, 16, 24)
    assert output.loss.shape == ()
    for weights in (*output.attentions, *output.cross_attentions):
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 10))


def test_bisenetformer_has_two_levels_and_masks_at_an_eighth() -> None:
    model = small_model(**BISENET)
    asked = {"output_hidden_states": True, "output_attentions": True, "output_auxiliary_logits": True}
    with torch.no_grad():
        output = model(images(2, 3, 68, 100), **asked)  # 9x13 at 1/8, 5x7 and 3x4 above
        semantic = FaiM2FForSemanticSegmentation(model.config)(images())
    assert output.masks_queries_logits.shape == (2, 10, 9, 13) and semantic.logits.shape == (2, 5, 8, 12)
    assert [tuple(weights.shape) for weights in output.cross_attentions] == [(2, 4, 10, n) for n in (12, 35, 12, 35)]
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 10, 32)] * 5
    assert [tuple(one["masks_queries_logits"].shape) for one in output.auxiliary_logits] == [(2, 10, 9, 13)] * 4
    with torch.no_grad():
        losses = model(images(), **targets()).loss_dict
    names = ["", *(f"_{layer}" for layer in range(4))]
    assert set(losses) == {f"loss_{kind}{name}" for kind in ("ce", "mask", "dice") for name in names}
    assert all(float(loss) > 0 for loss in losses.values())
    for layers, projections in ((1, 1), (2, 2), (5, 2)):
        decoder = small_model(**BISENET, decoder_layers=layers).transformer_decoder
        assert len(decoder.input_projections) == projections


def test_sizes_that_follow_from_the_configuration() -> None:
    stdc: dict[str, Any] = {"model_type": "faim2f_stdc", "embedding_size": 8, "depths": [1, 1, 1]}
    beit: dict[str, Any] = {
        "model_type": "beit", "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2,
        "intermediate_size": 16, "image_size": 64, "out_indices": [1, 2, 3, 4],
    }  # fmt: skip
    swin: dict[str, Any] = {"model_type": "swin", "embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4}
    resnet: dict[str, Any] = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8] * 4, "depths": [1] * 4}
    pvt = {
        "model_type": "pvt_v2", "hidden_sizes": [8] * 4, "num_attention_heads": [1] * 4, "depths": [1] * 4,
        "strides": [8, 2, 2, 1],
    }  # fmt: skip
    focal = {"model_type": "focalnet", "embed_dim": 8, "hidden_sizes": [16, 32, 64, 64], "depths": [1] * 4}
    cases: list[tuple[dict[str, Any], int, int]] = [
        ({}, 4, 3),
        ({"decoder_layers": 2}, 4, 2),
        (BISENET, 8, 2),
        ({**BISENET, "decoder_layers": 1}, 8, 1),
        ({"backbone_config": {**stdc, "out_features": ["stage2", "stage3", "stage4"]}}, 8, 3),
        ({**BISENET, "backbone_config": {**stdc, "out_features": ["stage2", "stage3", "stage4"]}}, 8, 2),
        ({"backbone_config": {**stdc, "out_features": ["stem", "stage1", "stage2", "stage3", "stage4"]}}, 2, 3),
        ({**BISENET, "backbone_config": {**stdc, "out_features": ["stage1", "stage2", "stage3"]}}, 4, 2),
        ({"backbone_config": swin}, 4, 3),
        ({"backbone_config": {**beit, "patch_size": 8}}, 8, 3),
        ({"backbone_config": {**swin, "patch_size": 2}}, 2, 3),
        ({**BISENET, "backbone_config": {**swin, "patch_size": 2}}, 4, 2),
        ({"backbone_config": {**swin, "depths": [1] * 5, "num_heads": [1] * 5}}, 8, 3),
        ({"backbone_config": pvt}, 8, 3),
        ({"backbone_config": focal}, 8, 3),
        ({"backbone_config": {**resnet, "downsample_in_first_stage": True}}, 8, 3),
        ({"backbone_config": {**resnet, "out_features": ["stem", "stage1", "stage2", "stage3"]}}, 4, 3),
    ]
    for changes, stride, levels in cases:
        model = small_model(**changes)
        assert (model.config.mask_stride, model.config.num_feature_levels) == (stride, levels), changes
        with torch.no_grad():
            masks = model(images()).masks_queries_logits
        assert masks.shape[2:] == (64 // stride, 96 // stride), changes
    # Whose default is a tuple in transformers 5.x, which AutoBackbone cannot build.
    assert small_config(backbone_config={"model_type": "convnext"}).backbone_config.hidden_sizes == [96, 192, 384, 768]
    pyramid = {**beit, "patch_size": 16, "add_fpn": True}  # which transformers 4.57 cannot build
    assert small_config(backbone_config=pyramid).mask_stride == 4
    assert small_config(backbone_config=pyramid, **BISENET).mask_stride == 8
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"encoder_layers": 1}, "`encoder_layers` must be 0 where the pixel decoder is bisenet"),
        ({"feature_size": 3}, "`feature_size` must be at least 4 where the pixel decoder is bisenet"),
        ({"backbone_config": {**stdc, "out_features": ["stage3", "stage4"]}}, "at least 3 feature maps"),
        ({"pixel_decoder_type": "bisenetformer"}, "must be one of fpn, deformable, bisenet"),
    ]
    for changes, words in mistakes:
        with pytest.raises(ValueError, match=words):
            small_config(**{**BISENET, **changes})


def test_nothing_is_returned_that_was_not_asked_for() -> None:
    with torch.no_grad():
        output = small_model()(images())
    assert list(output.keys()) == ["class_queries_logits", "masks_queries_logits"]


def test_a_query_attends_only_where_its_mask_is() -> None:
    """Compared with the paper's explicit computation at each level: resize the mask logits, then threshold."""
    model = small_model(encoder_layers=0)
    with torch.no_grad():
        output = model(images(), output_attentions=True, output_auxiliary_logits=True)
    sizes = [(2, 3), (4, 6), (8, 12), (2, 3)]
    for prediction, weights, size in zip(output.auxiliary_logits, output.cross_attentions, sizes, strict=True):
        logits = torch.nn.functional.interpolate(
            prediction["masks_queries_logits"], size=size, mode="bilinear", align_corners=False
        ).flatten(2)
        allowed = (logits >= 0) | (logits < 0).all(-1, keepdim=True)
        sure = logits.abs() > 1e-5
        attended = weights.amax(1) > 0
        assert torch.equal(attended[sure], allowed[sure])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_query_attends_where_its_mask_logit_is_not_negative_and_everywhere_if_all_are(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny
    rows = [[1.0, -2.0, 0.0], [-0.0, -tiny, tiny], [-1.0, -tiny, -3.0]]
    logits = torch.tensor([rows], dtype=dtype)
    mask = FaiM2FTransformerDecoder._attention_mask(logits, torch.eye(3, dtype=dtype).view(1, 3, 1, 3))
    assert mask.shape == (1, 1, 3, 3) and mask.dtype == dtype
    assert (mask[0, 0] == 0).tolist() == [[True, False, True], [True, False, True], [True, True, True]]
    scores = torch.tensor([90.0, 0.0, -90.0], dtype=dtype)
    weights = (scores + mask[0, 0]).softmax(-1)
    assert not weights[:2, 1].any() and torch.equal(weights[2], scores.softmax(-1))


def test_tuple_and_dictionary_hold_the_same() -> None:
    model = small_model()
    with torch.no_grad():
        output = model(images(), output_hidden_states=True)
        as_tuple = model(images(), output_hidden_states=True, return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 3
    torch.testing.assert_close(as_tuple[0], output.class_queries_logits, rtol=0, atol=0)


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path)
    loaded, report = FaiM2FForUniversalSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert set(loaded.state_dict()) == set(model.state_dict())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    # All tensors are in the state dict, so that loading through the meta device leaves none uninitialized.
    assert {name for name, _ in loaded.named_buffers()} <= set(loaded.state_dict())
    with torch.no_grad():
        assert torch.equal(model(images()).masks_queries_logits, loaded(images()).masks_queries_logits)
    again = FaiM2FConfig.from_pretrained(tmp_path).to_dict()
    ours = model.config.to_dict()
    assert {key: again[key] for key in ours if key not in ("_name_or_path", "dtype")} == {
        key: ours[key] for key in ours if key not in ("_name_or_path", "dtype")
    }


def test_registered_with_every_auto_class(tmp_path: Path) -> None:
    import transformers

    small_model().save_pretrained(tmp_path)
    for name in ("", "ForUniversalSegmentation", "ForInstanceSegmentation", "ForSemanticSegmentation",
                 "ForImageSegmentation"):  # fmt: skip
        model = getattr(transformers, f"AutoModel{name}").from_pretrained(tmp_path)
        semantic = name == "ForSemanticSegmentation"
        assert type(model) is (FaiM2FForSemanticSegmentation if semantic else FaiM2FForUniversalSegmentation)
    assert type(AutoModel.from_config(small_config())) is FaiM2FForUniversalSegmentation


def test_the_output_that_a_hook_keeps_does_not_change() -> None:
    model, kept = small_model().eval(), []
    pixels = torch.randn(1, 3, 64, 96)
    layer = model.pixel_decoder.lateral_convolutions[0]
    with torch.no_grad():
        expected = model(pixels).masks_queries_logits
        for module in (layer, list(layer.modules())[-1]):
            handle = module.register_forward_hook(lambda _, __, output: kept.append((output, output.clone())))
            assert torch.equal(model(pixels).masks_queries_logits, expected)
            handle.remove()
    assert len(kept) == 2 and all(torch.equal(output, at_once) for output, at_once in kept)


def test_fake_tensors_of_an_estimate_do_not_stay() -> None:
    """The position embeddings of a size are kept."""
    model = small_model().eval()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model(torch.randn(1, 3, 160, 224))
    with torch.no_grad():
        assert type(model(torch.randn(1, 3, 160, 224)).class_queries_logits) is torch.Tensor


def test_a_configuration_that_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    model = small_model()
    model.config.threshold = 50
    with pytest.raises(ValueError, match="`threshold` must be between 0 and 1"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_the_same_twice() -> None:
    model = small_model()
    with torch.no_grad():
        assert torch.equal(model(images()).masks_queries_logits, model(images()).masks_queries_logits)


def test_new_classes_by_ignore_mismatched_sizes(tmp_path: Path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path)
    tuned, report = AutoModelForUniversalSegmentation.from_pretrained(
        tmp_path, num_labels=3, num_queries=7, ignore_mismatched_sizes=True, output_loading_info=True
    )
    # 5.x reports (key, shape, shape), 4.57 only the key
    mismatched = {key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]}
    assert mismatched == {
        "transformer_decoder.class_predictor.weight",
        "transformer_decoder.class_predictor.bias",
        "transformer_decoder.query_features.weight",
        "transformer_decoder.query_position.weight",
    }
    with torch.no_grad():
        output = tuned.eval()(images())
    assert output.class_queries_logits.shape == (2, 7, 4)
    assert output.class_queries_logits.isfinite().all()
    assert float(tuned.transformer_decoder.query_features.weight.detach().std()) == pytest.approx(1, abs=0.2)
    kept = "pixel_decoder.mask_projection.weight"
    assert torch.equal(tuned.state_dict()[kept], model.state_dict()[kept])


def test_a_new_model_is_initialized() -> None:
    model = FaiM2FForUniversalSegmentation(small_config())
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if name.endswith(("norm.weight", "normalization.weight")):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            assert 0.01 < float(parameter.detach().std()) < 1.5, name
    with torch.no_grad():
        assert model.eval()(images()).masks_queries_logits.isfinite().all()


@pytest.mark.parametrize("changes", [{}, BISENET], ids=["fpn", "bisenet"])
def test_every_parameter_gets_a_gradient(changes: dict[str, Any]) -> None:
    model = small_model(**changes).train()
    model(images(), **targets()).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert float(parameter.grad.abs().max()) > 0 or name.endswith("k_proj.bias"), name  # softmax ignores shifts


def test_bisenetformer_trains_on_a_single_image(caplog: pytest.LogCaptureFixture) -> None:
    """Batch norms of one image's spatial means have no statistics to normalize with, so they use their running ones."""
    model = small_model(**BISENET).train()
    one = {name: values[:1] for name, values in targets().items()}
    pooled = model.pixel_decoder.global_context
    before = pooled.normalization.running_mean.clone()
    transformers_logging.warning_once.cache_clear()
    model(images()[:1], **one).loss.backward()
    assert torch.equal(pooled.normalization.running_mean, before) and pooled.normalization.training
    assert float(pooled.convolution.weight.grad.abs().max()) > 0
    model(images(), **targets()).loss.backward()
    assert not torch.equal(pooled.normalization.running_mean, before)
    assert "A batch of one image in training" in caplog.text
    caplog.clear()
    transformers_logging.warning_once.cache_clear()
    with torch.no_grad():
        model.eval()(images()[:1])
        model.optimize_for_inference()(images()[:1])
    assert caplog.text == ""


def test_gradient_checkpointing_changes_nothing() -> None:
    gradients, statistics = [], []
    for checkpointing in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model = small_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable(checkpointing)
            assert model.is_gradient_checkpointing
        torch.manual_seed(3)
        model(images(), **targets()).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        statistics.append(dict(model.named_buffers()))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
        torch.testing.assert_close(gradients[2][name], gradient, msg=name)
    for name, buffer in statistics[0].items():  # a second update of a batch norm would change them
        assert torch.equal(statistics[1][name], buffer) and torch.equal(statistics[2][name], buffer), name


def test_gradient_checkpointing_reaches_weights_behind_frozen_ones() -> None:
    """By default in both majors of transformers; reentrant checkpointing would drop these gradients."""
    gradients = []
    for checkpointing in (False, True):
        model = small_model(backbone_freeze_at=2).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        model(images(), **targets()).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
    model = small_model()
    model.gradient_checkpointing_enable()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear")).train()
    adapted(pixel_values=images(), **targets()).loss.backward()
    factors = [factor for name, factor in adapted.named_parameters() if "lora_B" in name]
    assert len(factors) > 10 and all(factor.grad.any() for factor in factors)
    model.disable_input_require_grads()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    """The logits of the queries and those after a layer, with one layer only: each masks the next one's attention, and
    a pixel that rounding moves across the threshold would change it (with three layers, by up to 0.05)."""
    model = small_model(decoder_layers=1)
    model.save_pretrained(tmp_path)
    half = FaiM2FForUniversalSegmentation.from_pretrained(tmp_path, dtype=dtype)
    assert half.dtype == dtype
    with torch.no_grad():
        ours = half(images().to(dtype), output_auxiliary_logits=True)
        theirs = model(images(), output_auxiliary_logits=True)
    for found, expected in ((ours, theirs), (ours.auxiliary_logits[0], theirs.auxiliary_logits[0])):
        for name in ("class_queries_logits", "masks_queries_logits"):
            exact = expected[name]
            assert found[name].dtype == dtype
            # A few roundings of at most 1/256 add up to 0.02; attention that is not scaled gives 0.25.
            assert (found[name].float() - exact).norm() < 0.05 * (exact - exact.mean()).norm()


def test_data_parallel_is_told_that_it_splits_masks() -> None:
    """Its scatter splits every tensor in a list, so each replica would get the upper or lower halves of all masks."""
    replica = small_model()._replicate_for_data_parallel()
    for labels in (targets(), {"class_labels": targets()["class_labels"]}):
        with pytest.raises(ValueError, match="DataParallel"):
            replica(images(), **labels)


def test_deformable_attention_in_half_precision_on_a_wide_picture() -> None:
    """The sampling points stay exact: bfloat16 has 128 values in 0.5..1, where the widest level has 166 pixels."""
    torch.manual_seed(0)
    half = small_mask2former().eval().to(torch.bfloat16)
    whole = copy.deepcopy(half).float()
    pixels = torch.randn(1, 3, 64, 2656).to(torch.bfloat16)
    with torch.no_grad():
        ours, theirs = half(pixels), whole(pixels.float())
    assert ours.masks_queries_logits.dtype == torch.bfloat16
    for name in ("class_queries_logits", "masks_queries_logits"):
        exact = getattr(theirs, name)
        difference = getattr(ours, name).float() - exact
        assert difference.norm() < 0.05 * (exact - exact.mean()).norm()  # with points in bfloat16, 0.16 and 0.28


def test_autocast_and_half_precision_train() -> None:
    model = small_model().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(images(), **targets()).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(tmp_path: Path, device_map: "str | dict[str, str]") -> None:
    model = small_model()
    model.save_pretrained(tmp_path)
    loaded = FaiM2FForUniversalSegmentation.from_pretrained(tmp_path, device_map=device_map)
    with torch.no_grad():
        assert torch.equal(loaded(images()).masks_queries_logits, model(images()).masks_queries_logits)


RESIDUAL = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [2, 2, 2, 2]}


@pytest.mark.parametrize(
    "model",
    [
        small_model,
        lambda: small_model(**BISENET),
        small_mask2former,
        lambda: small_model(backbone_config={"model_type": "rt_detr_resnet", **RESIDUAL}),
        lambda: small_model(backbone_config={"model_type": "rt_detr_resnet", **RESIDUAL, "layer_type": "basic"}),
        lambda: small_model(backbone_config={"model_type": "faim2f_resnet", **RESIDUAL}),
        lambda: small_model(backbone_config=ResNetConfig(**RESIDUAL, out_indices=[1, 2, 3, 4])),
    ],
)
def test_modules_that_combine_their_children_are_on_one_device(model: Any) -> None:
    """`device_map="auto"` on two GPUs, wherever the first is full."""
    model = model()
    size = sum(weight.nbytes for weight in model.parameters())
    whole = [name for name, module in model.named_modules() if type(module).__name__ in model._no_split_modules]
    assert {"pixel_decoder", "transformer_decoder"} <= set(whole)
    # The layers of residual backbones add their input to their output.
    assert {name for name, module in model.named_modules() if hasattr(module, "shortcut")} <= set(whole)
    cuts = 0
    for share in range(1, 8):
        devices = infer_auto_device_map(
            model, max_memory={0: share * size // 8, 1: 2 * size}, no_split_module_classes=model._no_split_modules
        )
        cuts += len(set(devices.values())) == 2
        assert not [(part, name) for part in devices for name in whole if part.startswith(f"{name}.")]
    assert cuts


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_agree(tmp_path: Path, implementation: str) -> None:
    model = small_model()
    model.save_pretrained(tmp_path)
    loaded = FaiM2FForUniversalSegmentation.from_pretrained(tmp_path, attn_implementation=implementation)
    assert loaded.config._attn_implementation == implementation
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(images()).class_queries_logits, model(images()).class_queries_logits, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("implementation", "name"), [("flash_attention_2", "Flash Attention 2"), ("flex_attention", ".*flex_attention")]
)
def test_an_attention_that_does_not_fit_is_refused(tmp_path: Path, implementation: str, name: str) -> None:
    small_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"FaiM2FForUniversalSegmentation does not support {name}"):
        FaiM2FForUniversalSegmentation.from_pretrained(tmp_path, attn_implementation=implementation)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["stdc", pytest.param("resnet", marks=pytest.mark.large)])
def test_compiles_as_one_graph(backbone: str) -> None:
    overrides = {}
    if backbone == "resnet":
        overrides["backbone_config"] = {
            "model_type": "rt_detr_resnet", "depths": [1, 1, 1, 1], "layer_type": "basic",
            "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16],
        }  # fmt: skip
    model = small_model(decoder_layers=2, **overrides)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images()).masks_queries_logits, model(images()).masks_queries_logits)


def test_frozen_parts_of_the_backbone_stay_as_they_are(tmp_path: Path) -> None:
    model = small_model(backbone_freeze_at=1, backbone_freeze_norm=True)
    model.save_pretrained(tmp_path)
    model = FaiM2FForUniversalSegmentation.from_pretrained(tmp_path).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(images(), **targets()).loss.backward()
    optimizer.step()
    after = model.state_dict()
    for name in before:
        frozen = name.startswith(("backbone.stem", "backbone.stages.0")) or (
            name.startswith("backbone") and "normalization" in name
        )
        if frozen:
            assert torch.equal(before[name], after[name]), name
    assert not torch.equal(
        before["backbone.stages.1.0.convolutions.0.convolution.weight"],
        after["backbone.stages.1.0.convolutions.0.convolution.weight"],
    )


def test_frozen_parameters_require_no_gradient_from_the_start(tmp_path: Path) -> None:
    """DistributedDataParallel waits for the gradients of all others, and wraps a model before it is trained."""
    made = small_model(backbone_freeze_at=1, backbone_freeze_norm=True)
    made.save_pretrained(tmp_path)
    loaded, _ = FaiM2FForUniversalSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    trained = {name for name, weight in copy.deepcopy(made).train().named_parameters() if weight.requires_grad}
    fresh = FaiM2FForUniversalSegmentation(made.config)
    assert fresh.training and not any(
        module.training for module in fresh.backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)
    )
    for model in (made, fresh, loaded, FaiM2FForUniversalSegmentation.from_pretrained(tmp_path)):
        assert {name for name, weight in model.named_parameters() if weight.requires_grad} == trained
    assert "pixel_decoder.mask_projection.weight" in trained and not any("backbone.stem" in name for name in trained)


def test_synchronized_batch_norms_are_frozen_too() -> None:
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(small_model(backbone_freeze_norm=True)).train()
    norms = [module for module in model.backbone.modules() if isinstance(module, torch.nn.SyncBatchNorm)]
    assert norms and not any(norm.training or norm.weight.requires_grad for norm in norms)


def test_an_adapter_of_peft_restores_the_trained_model(tmp_path: Path) -> None:
    """An adapter contains no statistics of frozen batch norms, and all of its matrices are used."""
    adapted = peft.get_peft_model(small_model(), peft.LoraConfig(r=2, target_modules="all-linear")).train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
    adapted(pixel_values=images(), **targets()).loss.backward()
    factors = {name: parameter for name, parameter in adapted.named_parameters() if "lora_B" in name}
    assert len(factors) > 10 and all(factor.grad.any() for factor in factors.values())
    optimizer.step()
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(small_model(), tmp_path).eval()
    adapted.eval()
    with torch.no_grad():
        found = again(pixel_values=images()).masks_queries_logits
        expected = adapted(pixel_values=images()).masks_queries_logits
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        assert (found - small_model()(images()).masks_queries_logits).abs().max() > 0.05
        torch.testing.assert_close(again.merge_and_unload()(images()).masks_queries_logits, found, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"pixel_values": torch.zeros(3, 64, 64)}, r"pixel_values must be of shape \(B, 3, H, W\), got \(3, 64, 64\)"),
        ({"pixel_values": [np.zeros((3, 64, 64))]}, r"pixel_values is a list, not a tensor: .* return_tensors='pt'"),
        ({"pixel_values": np.zeros((1, 3, 64, 64))}, "pixel_values is a ndarray, not a tensor"),
        ({"pixel_values": torch.zeros(1, 4, 64, 64)}, r"\(B, 3, H, W\), got \(1, 4, 64, 64\)"),
        ({"pixel_values": torch.zeros(1, 3, 64, 64), "mask_labels": []}, "go together"),
        (
            {"pixel_values": torch.zeros(1, 3, 64, 64), "mask_labels": [torch.zeros(2, 64, 64)],
             "class_labels": [torch.tensor([1])]},
            r"mask_labels\[0\] has 2 masks, class_labels\[0\] 1",
        ),
        (
            {"pixel_values": torch.zeros(1, 3, 64, 64), "mask_labels": [torch.zeros(1, 64, 64)],
             "class_labels": [torch.tensor([5])]},
            r"class_labels\[0\] has ids outside of 0..4: \[5\]",
        ),
    ],
)  # fmt: skip
def test_inputs_that_do_not_fit_are_named(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        small_model()(**arguments)

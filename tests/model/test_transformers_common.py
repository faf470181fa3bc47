"""transformers' common tests of models and configurations, for each kind of our models at a small size."""

import copy
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, Dinov2Config, Trainer, TrainingArguments

from hf_faim2f import FaiM2FConfig, FaiM2FForUniversalSegmentation, FaiM2FImageProcessor, STDCBackbone, STDCConfig
from hf_faim2f.model import configuration_checks_faim2f
from hf_faim2f.model.pixel_decoder_faim2f import FaiM2FPixelDecoder
from tests.support.reference_models import BISENET, small_config, small_model
from tests.support.shapes import shapes

RESNET = {
    "model_type": "rt_detr_resnet", "depths": [1, 1, 1, 1], "layer_type": "basic",
    "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16],
}  # fmt: skip
SWIN = {"model_type": "swin", "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 2}
MASK2FORMER = {"pixel_decoder_type": "deformable", "feature_size": 32, "use_level_embedding": True, "pre_norm": False}
KINDS: dict[str, dict[str, Any]] = {
    "stdc": {},  # with encoder layers, like the members for COCO
    "stdc, plain pyramid": {"encoder_layers": 0},
    "resnet": {"backbone_config": RESNET},
    "swin": {"backbone_config": SWIN},
    "deformable": MASK2FORMER,
    "bisenet": BISENET,
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def images(batch: int = 2, height: int = 64, width: int = 96) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def targets() -> dict[str, list[torch.Tensor]]:
    masks = [(torch.rand(n, 64, 96, generator=torch.Generator().manual_seed(n)) > 0.7).float() for n in (3, 1)]
    return {"mask_labels": masks, "class_labels": [torch.tensor([0, 4, 2]), torch.tensor([1])]}


# The model


@every_kind
def test_a_loaded_model_is_the_saved_one(kind: str, tmp_path: Path) -> None:
    model = small_model(**KINDS[kind])
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)  # newly initialized weights would differ
    loaded, report = FaiM2FForUniversalSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = loaded.state_dict()
    assert set(state) == set(model.state_dict()) and not loaded.training
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(loaded(images()).masks_queries_logits, model(images()).masks_queries_logits)


@every_kind
def test_each_image_of_a_batch_is_as_alone(kind: str) -> None:
    model = small_model(**KINDS[kind])
    with torch.no_grad():
        whole = model(images(3))
        for index in range(3):
            alone = model(images(3)[index : index + 1])
            for name in ("class_queries_logits", "masks_queries_logits"):
                torch.testing.assert_close(whole[name][index], alone[name][0], rtol=1e-4, atol=1e-4)


@every_kind
def test_what_the_configuration_asks_for_is_returned(kind: str) -> None:
    model = small_model(attn_implementation="eager", **KINDS[kind])
    with torch.no_grad():
        asked = model(images(), output_hidden_states=True, output_attentions=True, output_auxiliary_logits=True)
    for name in ("output_hidden_states", "output_attentions", "output_auxiliary_logits"):
        setattr(model.config, name, True)
    with torch.no_grad():
        found = model(images())
    assert list(found) == list(asked)
    for ours, expected in zip(found.hidden_states, asked.hidden_states, strict=True):
        assert torch.equal(ours, expected)
    assert [weights.shape for weights in found.cross_attentions] == [
        weights.shape for weights in asked.cross_attentions
    ]


@every_kind
def test_hidden_states_and_attentions_keep_their_gradients(kind: str) -> None:
    model = small_model(attn_implementation="eager", **KINDS[kind])
    output = model(images(), output_hidden_states=True, output_attentions=True)
    kept = [output.hidden_states[1], output.attentions[0], output.cross_attentions[0]]
    for tensor in kept:
        tensor.retain_grad()
    output.class_queries_logits.pow(2).sum().backward()
    for tensor in kept:
        assert tensor.grad is not None and float(tensor.grad.abs().max()) > 0


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "stdc"])  # test_modeling.py tests it
def test_gradient_checkpointing_changes_no_gradient(kind: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = small_model(**KINDS[kind])
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        model(images(), **targets()).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@every_kind
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_give_the_same(kind: str, where: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = small_model(**KINDS[kind])
    model.save_pretrained(tmp_path)
    if where == "cpu":
        loaded = FaiM2FForUniversalSegmentation.from_pretrained(tmp_path)
        accelerate.cpu_offload(loaded, execution_device="cpu")
    else:
        parts = dict.fromkeys(("backbone", "pixel_decoder", "transformer_decoder"), "disk")
        loaded = FaiM2FForUniversalSegmentation.from_pretrained(
            tmp_path, device_map={**parts, "criterion": "cpu"}, offload_folder=tmp_path / "offloaded"
        )
    assert loaded.transformer_decoder.query_features.weight.device.type == "meta"
    with torch.no_grad():
        assert torch.equal(loaded(images()).masks_queries_logits, model(images()).masks_queries_logits)


# The kinds above, and a plain pyramid on the other kind of backbone. Swin has windows of one pixel here: larger ones
# are padded to multiples in each stage, and torch takes minutes to compare symbolic sizes of such nested remainders.
COMPILED = {
    **KINDS,
    "swin": {"backbone_config": {**SWIN, "window_size": 1}},
    "resnet, plain pyramid": {"backbone_config": RESNET, "encoder_layers": 0},
}


@pytest.mark.newest_only
@pytest.mark.large  # traces each model three times
@pytest.mark.parametrize(
    ("settings", "dynamic"),
    # None: sizes are dynamic after the first. False: each size is compiled separately, because of Swin's windows.
    [
        *(pytest.param(settings, None, id=name) for name, settings in COMPILED.items()),
        pytest.param(KINDS["swin"], False, id="swin, windows"),
    ],
)
def test_compiles_for_images_of_any_number_and_size(settings: dict[str, Any], dynamic: bool | None) -> None:
    torch._dynamo.reset()
    model = small_model(decoder_layers=1, **settings)
    compiled = torch.compile(model, backend="eager", dynamic=dynamic)
    with torch.no_grad():
        for batch, height, width in ((2, 64, 96), (3, 96, 64), (4, 128, 96)):
            pixels = images(batch, height, width)
            torch.testing.assert_close(
                compiled(pixels).masks_queries_logits, model(pixels).masks_queries_logits, rtol=1e-3, atol=1e-4
            )


class CoarsestMap(nn.Module):
    """A convolution with the backbones' total stride, followed by the pixel decoder's first steps on such a map."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 8, 3, stride=32, padding=1)
        self.pixel_decoder = FaiM2FPixelDecoder(small_config(), [8])

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.pixel_decoder((self.backbone(pixel_values),)).mask_features


@pytest.mark.newest_only  # depends only on torch
@pytest.mark.large  # compiles C++
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_inductor_compiles_encoder_layers_for_images_of_any_number_and_size() -> None:
    """`reshape` after the last layer raised ValueRangeError, but only with this backend."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = CoarsestMap().eval()
    compiled = torch.compile(model, dynamic=True)
    with torch.no_grad():
        for batch, height, width in ((2, 64, 96), (3, 128, 96)):
            pixels = images(batch, height, width)
            torch.testing.assert_close(compiled(pixels), model(pixels), rtol=1e-3, atol=1e-4)


@every_kind
def test_torchscript_of_a_loaded_model(kind: str, tmp_path: Path) -> None:
    """`torchscript=True` is a parameter in 4.57, which requests tuples; 5.x has no such parameter for any model."""
    small_model(**KINDS[kind]).save_pretrained(tmp_path)
    if int(transformers.__version__.split(".")[0]) < 5:
        loaded = FaiM2FForUniversalSegmentation.from_pretrained(tmp_path, torchscript=True)
    else:
        loaded = FaiM2FForUniversalSegmentation.from_pretrained(tmp_path)
        loaded.config.torchscript = True
    with torch.no_grad():
        expected = loaded(images())
        assert isinstance(expected, tuple)
        traced = torch.jit.trace(loaded, images(), check_trace=False)
        for ours, theirs in zip(traced(images()), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_there_is_no_table_of_input_embeddings() -> None:
    """Quantizers ask every model for its input embeddings; pixels have none."""
    assert small_model().get_input_embeddings() is None
    assert STDCBackbone(STDCConfig(embedding_size=8, depths=[1, 1, 1])).get_input_embeddings() is None


@every_kind
def test_quantized_weights_give_what_they_stand_for(kind: str, tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = small_model(**KINDS[kind])
    model.save_pretrained(tmp_path)
    quantization = transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
    loaded = FaiM2FForUniversalSegmentation.from_pretrained(tmp_path, quantization_config=quantization)
    linear = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    with torch.no_grad():
        for name, part in linear.items():
            weight = loaded.get_submodule(name).weight.dequantize()
            step = part.weight.abs().amax(dim=1, keepdim=True) / 127
            assert ((weight - part.weight).abs() <= step).all(), name
            assert not torch.equal(weight, part.weight) or not part.weight.any(), name
            part.weight.copy_(weight)
        for key in ("class_queries_logits", "masks_queries_logits"):
            torch.testing.assert_close(loaded(images())[key], model(images())[key], rtol=1e-4, atol=1e-5)


def test_the_backbone_returns_what_its_configuration_asks_for() -> None:
    backbone = STDCBackbone(STDCConfig(embedding_size=8, depths=[1, 1, 1], out_features=["stage4"])).eval()
    with torch.no_grad():
        assert backbone(images()).hidden_states is None
        backbone.config.output_hidden_states = True
        output = backbone(images())
        assert [state.shape[-1] for state in output.hidden_states] == [48, 24, 12, 6, 3]
        assert torch.equal(output.hidden_states[-1], output.feature_maps[0])
        assert backbone(images(), output_hidden_states=False).hidden_states is None


# Attention

# A backbone that supports the choice in both major versions of transformers.
DINO = {
    "model_type": "dinov2", "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 4,
    "image_size": 32, "out_features": ["stage1", "stage2", "stage3", "stage4"],
}  # fmt: skip


def implementations(model: FaiM2FForUniversalSegmentation) -> tuple[str, str]:
    return model.config._attn_implementation, model.backbone.config._attn_implementation


def test_the_implementation_of_attention_reaches_the_backbone(tmp_path: Path) -> None:
    by_setter = small_config(backbone_config=DINO)
    by_setter._attn_implementation = "eager"
    given: list[tuple[FaiM2FConfig, tuple[str, str]]] = [
        (small_config(backbone_config=DINO), ("sdpa", "sdpa")),
        (small_config(backbone_config=DINO, attn_implementation="eager"), ("eager", "eager")),
        (small_config(backbone_config=Dinov2Config(**DINO), attn_implementation="eager"), ("eager", "eager")),
        (small_config(backbone_config=DINO, attn_implementation={"backbone_config": "eager"}), ("sdpa", "eager")),
        (small_config(backbone_config={**DINO, "attn_implementation": "eager"}), ("sdpa", "eager")),
        (by_setter, ("eager", "eager")),
    ]
    for config, expected in given:
        assert implementations(FaiM2FForUniversalSegmentation(config)) == expected
    model = small_model(backbone_config=DINO)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected_logits = model(images()).class_queries_logits
        for asked, found in (("eager", ("eager", "eager")), ({"backbone_config": "eager"}, ("sdpa", "eager"))):
            loaded = FaiM2FForUniversalSegmentation.from_pretrained(tmp_path, attn_implementation=asked)
            assert implementations(loaded) == found
            torch.testing.assert_close(loaded(images()).class_queries_logits, expected_logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        {"attn_implementation": "owner/kernel"},
        {"attn_implementation": {"backbone_config": "owner/kernel@main:attention"}},
        {"_attn_implementation": "owner/kernel"},
        {"_attn_implementation_internal": "owner/kernel"},
        {"_attn_implementation_internal": "sdpa"},
        {"experts_implementation": "owner/kernel"},
    ],
)
def test_a_file_may_not_choose_the_code_of_attention(values: dict[str, Any], nested: bool, tmp_path: Path) -> None:
    """CVE-2026-4372: transformers 4.57 downloads and runs the kernel that a config.json names."""
    small_config(backbone_config=SWIN).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    (content["backbone_config"] if nested else content).update(values)
    path.write_text(json.dumps(content))
    for read in (FaiM2FConfig.from_pretrained, AutoConfig.from_pretrained, lambda _: FaiM2FConfig.from_json_file(path)):
        with pytest.raises(ValueError, match=f"sets `{next(iter(values))}` to .* may not choose the code of attention"):
            read(tmp_path)


def test_a_file_may_choose_among_the_implementations_of_transformers(tmp_path: Path) -> None:
    content = {**small_config().to_dict(), "attn_implementation": "eager", "_attn_implementation_internal": None}
    assert FaiM2FConfig.from_dict(content).num_queries == 10


# The configuration


def configurations() -> list[Any]:
    return [*(small_config(**KINDS[kind]) for kind in KINDS), STDCConfig(embedding_size=8), FaiM2FConfig()]


def test_configurations_survive_every_way_of_writing_them(tmp_path: Path) -> None:
    for config in configurations():
        expected = config.to_dict()
        kind = type(config)
        config.save_pretrained(tmp_path)
        config.to_json_file(tmp_path / "whole.json", use_diff=False)
        ways = {
            "from_pretrained": kind.from_pretrained(tmp_path),
            "AutoConfig": AutoConfig.from_pretrained(tmp_path),
            "from_dict": kind.from_dict(config.to_dict()),
            "from_json_file": kind.from_json_file(tmp_path / "config.json"),
            "without a difference": kind.from_json_file(tmp_path / "whole.json"),
            "constructor": kind(**config.to_dict()),
            "copy": copy.deepcopy(config),
        }
        for way, again in ways.items():
            found = again.to_dict()
            differ = {key for key in expected if found.get(key) != expected[key]} - {"_name_or_path"}
            assert type(again) is kind and not differ, (way, differ)


def test_reading_what_transformers_wrote_warns_of_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), _propagated("hf_faim2f"):
        for config in configurations():
            type(config).from_dict(config.to_dict())
    assert not caplog.records


@pytest.mark.parametrize("kind", ["stdc", "resnet", "swin"])
def test_the_backbone_s_configuration_is_read_out_of_the_model_s(kind: str, tmp_path: Path) -> None:
    config = small_config(**KINDS[kind])
    config.save_pretrained(tmp_path)
    assert FaiM2FConfig.sub_configs == {"backbone_config": AutoConfig}
    backbone = config.backbone_config
    found = type(backbone).from_pretrained(tmp_path)
    assert found.to_diff_dict() == backbone.to_diff_dict()
    backbone.save_pretrained(tmp_path / "backbone")
    assert type(AutoConfig.from_pretrained(tmp_path / "backbone")) is type(backbone)


class _propagated:
    """transformers' loggers do not propagate records; in this context they do, so that pytest sees them."""

    def __init__(self, name: str) -> None:
        self.loggers = [logging.getLogger(name), logging.getLogger("transformers")]

    def __enter__(self) -> None:
        self.before = [logger.propagate for logger in self.loggers]
        for logger in self.loggers:
            logger.propagate = True

    def __exit__(self, *_: object) -> None:
        for logger, before in zip(self.loggers, self.before, strict=True):
            logger.propagate = before


def test_unknown_keys_of_a_file_are_kept_and_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = small_config(backbone_config={"model_type": "faim2f_stdc", "embedding_size": 8})
    config.trained_on = "tulips"
    config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    content.update(of_a_later_transformers=[1], num_querys=7, save_pretrained="a method's name")
    content["backbone_config"]["dilation"] = 2
    path.write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING), _propagated("hf_faim2f"):
        for read in (FaiM2FConfig.from_pretrained, AutoConfig.from_pretrained, FaiM2FConfig.from_pretrained):
            found = read(tmp_path)
            assert found.trained_on == "tulips" and found.of_a_later_transformers == [1]
            assert found.num_queries == 10 and found.backbone_config.dilation == 2
            found.save_pretrained(tmp_path / "again")
            assert json.loads((tmp_path / "again" / "config.json").read_text())["trained_on"] == "tulips"
    (warning,) = [record.getMessage() for record in caplog.records]
    for name in ("trained_on", "of_a_later_transformers", "num_querys (did you mean num_queries?)", "save_pretrained",
                 "backbone_config.dilation"):  # fmt: skip
        assert name in warning
    assert FaiM2FConfig.from_pretrained(tmp_path, trained_on="roses").trained_on == "roses"
    # The path of a complete model folder.
    small_model().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "of_a_later_version": {}}))
    assert FaiM2FForUniversalSegmentation.from_pretrained(tmp_path / "model").config.of_a_later_version == {}


@pytest.mark.parametrize(
    ("keywords", "sentence"),
    [
        ({"num_querys": 7}, "FaiM2FConfig has no parameter `num_querys`; did you mean `num_queries`"),
        ({"temperature": 0.5}, "FaiM2FConfig has no parameter `temperature`"),  # in 4.57's base class
        ({"backbone_config": {"model_type": "faim2f_stdc", "depth": [1, 1, 1]}}, "STDCConfig .*`depth`.*`depths`"),
        ({"backbone_config": {"model_type": "swin", "embed_dims": 8}}, "SwinConfig .*`embed_dims`.*`embed_dim`"),
        ({"_attn_implementation_internal": "owner/kernel"}, "no parameter `_attn_implementation_internal`"),
    ],
)
def test_misspelt_keywords_of_a_caller_stay_refused(keywords: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=sentence):
        FaiM2FConfig(**keywords)
    if "backbone_config" in keywords:
        small_config().save_pretrained(tmp_path)
        with pytest.raises(TypeError, match=sentence):
            FaiM2FConfig.from_pretrained(tmp_path, **keywords)


class OwnConfig(FaiM2FConfig):
    """As a person may write one; nothing is listed twice."""

    def __init__(self, border: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.border = border


def test_a_subclass_has_the_parameters_of_its_base(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    OwnConfig(border=7, num_queries=8, backbone_config={"model_type": "faim2f_stdc"}).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING), _propagated("hf_faim2f"):
        config = OwnConfig.from_pretrained(tmp_path)
        assert (config.border, config.num_queries) == (7, 8) and not caplog.records
        with pytest.raises(ValueError, match="`num_queries` must be a positive integer"):
            OwnConfig.from_pretrained(tmp_path, num_queries=-5)
    with pytest.raises(TypeError, match="OwnConfig has no parameter `num_querys`; did you mean `num_queries`"):
        OwnConfig(num_querys=7)


def test_keywords_beside_a_file_replace_what_it_says(tmp_path: Path) -> None:
    small_config().save_pretrained(tmp_path)

    def read(**overrides: Any) -> FaiM2FConfig:
        return FaiM2FConfig.from_pretrained(tmp_path, **overrides)

    backbone = read(backbone_config={"hidden_act": "gelu"}).backbone_config
    assert (backbone.hidden_act, backbone.embedding_size, backbone.depths) == ("gelu", 8, [1, 1, 1])
    assert read(backbone_config={"out_indices": [1, 2, 3, 4]}).backbone_config.out_features[0] == "stage1"
    assert read(backbone_config=SWIN).backbone_config.model_type == "swin"
    assert read(backbone_config=STDCConfig(embedding_size=16)).backbone_config.embedding_size == 16
    assert read(num_queries=3, num_labels=2).num_queries == 3
    with pytest.raises(ValueError, match="`num_queries` must be a positive integer, got -5"):
        read(num_queries=-5)
    config, unused = read(num_queries=3, cheese="brie", return_unused_kwargs=True)
    assert config.num_queries == 3 and unused["cheese"] == "brie"


def test_unknown_keys_of_a_processor_s_file_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    FaiM2FImageProcessor(size={"shortest_edge": 64}).save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "of_a_later_version": 1}))
    with caplog.at_level(logging.WARNING), _propagated("hf_faim2f"):
        for _ in range(2):
            processor = FaiM2FImageProcessor.from_pretrained(tmp_path)
            assert processor.size["shortest_edge"] == 64
        assert FaiM2FImageProcessor.from_json_file(path).size == processor.size
    assert FaiM2FImageProcessor.from_pretrained(tmp_path, size=32).size["shortest_edge"] == 32
    assert ["of_a_later_version" in record.getMessage() for record in caplog.records] == [True]
    with pytest.raises(TypeError, match="no setting `of_a_later_version`"):
        FaiM2FImageProcessor(of_a_later_version=1)


# transformers' Trainer


class InstanceMetric:
    """The evaluation in transformers' instance segmentation example, with the counts that a metric would need."""

    def __init__(self, processor: FaiM2FImageProcessor) -> None:
        self.processor = processor
        self.seen = 0

    def __call__(self, evaluation: Any, compute_result: bool) -> dict[str, float]:
        classes, masks = evaluation.predictions[:2]
        assert isinstance(classes, torch.Tensor) and isinstance(masks, torch.Tensor)
        mask_labels, class_labels = evaluation.label_ids
        outputs = type("Outputs", (), {"class_queries_logits": classes, "masks_queries_logits": masks})()
        found = self.processor.post_process_instance_segmentation(
            outputs,
            threshold=0.0,
            target_sizes=[tuple(mask.shape[-2:]) for mask in mask_labels],
            return_binary_maps=True,
        )
        for image, mask, labels in zip(found, mask_labels, class_labels, strict=True):
            assert len(mask) == len(labels)
            if image["segments_info"]:
                assert image["segmentation"].shape == (len(image["segments_info"]), *mask.shape[-2:])
            self.seen += 1
        return {"images": self.seen} if compute_result else {}


def test_the_stock_trainer_s_evaluation_sees_the_logits_first(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = small_model(num_labels=4)
    model.save_pretrained(tmp_path / "model")
    FaiM2FImageProcessor(size={"height": 64, "width": 64}, ignore_index=255).save_pretrained(tmp_path / "model")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model")
    items = []
    for seed in range(3):
        pixels, segments, classes = shapes(seed)
        inputs = processor([pixels], [segments.astype(np.uint8)], dict(enumerate(classes)), return_tensors="pt")
        items.append({name: inputs[name][0] for name in ("pixel_values", "mask_labels", "class_labels")})

    def collate(examples: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
        batch: dict[str, Any] = {name: [example[name] for example in examples] for name in examples[0]}
        return {**batch, "pixel_values": torch.stack(batch["pixel_values"])}

    def trainer(**arguments: Any) -> Trainer:
        values = {"output_dir": str(tmp_path / "run"), "per_device_eval_batch_size": 2, "report_to": "none",
                  "remove_unused_columns": False, "use_cpu": True, "per_device_train_batch_size": 2, "max_steps": 1,
                  "eval_do_concat_batches": False, **arguments}  # fmt: skip
        metric = InstanceMetric(processor) if arguments.get("batch_eval_metrics") else None
        return Trainer(
            model,
            TrainingArguments(**values),
            collate,
            items,
            items,
            processing_class=processor,
            compute_metrics=metric,
        )

    stock = trainer(batch_eval_metrics=True)
    stock.train()
    metrics = stock.evaluate()
    assert metrics["eval_images"] == 3 and metrics["eval_loss"] > 0
    answer = trainer().predict(items)
    assert [[tuple(part.shape) for part in batch] for batch in answer.predictions] == [
        [(2, 10, 5), (2, 10, 16, 16)],
        [(1, 10, 5), (1, 10, 16, 16)],
    ]
    assert model.config.keys_to_ignore_at_inference == ["loss_dict", "fused_classes"]
    assert "keys_to_ignore_at_inference" not in model.config.to_dict()


def test_a_file_may_use_transformers_common_names(monkeypatch: pytest.MonkeyPatch) -> None:
    values = small_config().to_dict()
    aliased = {name: value for name, value in values.items() if name not in ("hidden_dim", "decoder_layers")}
    warnings: list[str] = []
    monkeypatch.setattr(configuration_checks_faim2f.logger, "warning_once", warnings.append)
    config = FaiM2FConfig.from_dict({**aliased, "hidden_size": 64, "num_hidden_layers": 2, "use_return_dict": False})
    assert (config.hidden_dim, config.decoder_layers) == (64, 2)
    FaiM2FConfig.from_dict({**values, "hidden_size": values["hidden_dim"]})
    assert not warnings
    with pytest.raises(ValueError, match="has `hidden_dim` and, with another value, `hidden_size`, which is the same"):
        FaiM2FConfig.from_dict({**values, "hidden_size": 64})

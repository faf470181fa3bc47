"""Checkpoints of Mask2Former's own repository: valid ones give transformers' outputs, invalid ones give one sentence.

The checkpoints here are transformers' models, saved under the zoo's names by a separate table (`ZOO_NAMES`). It maps in
the opposite direction of the converter's, starting from the names that transformers saves.
"""

import collections
import hashlib
import inspect
import io
import json
import math
import os
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_faim2f.conversion.array_pickle import read_array_pickle
from hf_faim2f.conversion.mask2former_zoo import weights_of
from hf_faim2f.conversion.mask2former_zoo_config import (
    PANOPTIC_THRESHOLDS,
    CheckpointDescription,
    describe_published,
    describe_yaml,
    image_processor,
    model_configuration,
)
from safetensors.torch import load_file
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig, SwinConfig
from transformers.utils import logging

import hf_faim2f.family.mask2former as family
from hf_faim2f import FaiM2FForUniversalSegmentation, FaiM2FImageProcessor
from hf_faim2f.cli.convert import main
from hf_faim2f.errors import ConversionError
from hf_faim2f.family.mask2former import find_zoo_model, labels_and_stuff, zoo
from tests.support.mask2former_models import KEYS, STAGES, lively
from tests.support.reference_models import relative_error, small_config

# transformers' names and the zoo's. All replacements are applied in turn to parts of a name.
ZOO_NAMES = [
    (r"^class_predictor\.", "sem_seg_head.predictor.class_embed."),
    (r"^model\.pixel_level_module\.encoder\.", "backbone."),
    (r"^model\.pixel_level_module\.decoder\.", "sem_seg_head.pixel_decoder."),
    (r"^model\.transformer_module\.", "sem_seg_head.predictor."),
    # ResNet
    (r"^backbone\.embedder\.embedder\.convolution\.", "backbone.stem.conv1."),
    (r"^backbone\.embedder\.embedder\.normalization\.", "backbone.stem.conv1.norm."),
    (r"^backbone\.encoder\.stages\.0\.layers\.", "backbone.res2."),
    (r"^backbone\.encoder\.stages\.1\.layers\.", "backbone.res3."),
    (r"^backbone\.encoder\.stages\.2\.layers\.", "backbone.res4."),
    (r"^backbone\.encoder\.stages\.3\.layers\.", "backbone.res5."),
    (r"\.layer\.0\.convolution\.", ".conv1."), (r"\.layer\.0\.normalization\.", ".conv1.norm."),
    (r"\.layer\.1\.convolution\.", ".conv2."), (r"\.layer\.1\.normalization\.", ".conv2.norm."),
    (r"\.layer\.2\.convolution\.", ".conv3."), (r"\.layer\.2\.normalization\.", ".conv3.norm."),
    (r"\.shortcut\.convolution\.", ".shortcut."), (r"\.shortcut\.normalization\.", ".shortcut.norm."),
    # Swin
    (r"^backbone\.embeddings\.patch_embeddings\.projection\.", "backbone.patch_embed.proj."),
    (r"^backbone\.embeddings\.norm\.", "backbone.patch_embed.norm."),
    (r"^backbone\.encoder\.layers\.", "backbone.layers."),
    (r"^backbone\.hidden_states_norms\.stage1\.", "backbone.norm0."),
    (r"^backbone\.hidden_states_norms\.stage2\.", "backbone.norm1."),
    (r"^backbone\.hidden_states_norms\.stage3\.", "backbone.norm2."),
    (r"^backbone\.hidden_states_norms\.stage4\.", "backbone.norm3."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.self\.(query|key|value)\.", r".attn.qkv<\1>."),
    (r"\.attention\.self\.", ".attn."),
    (r"\.layernorm_before\.", ".norm1."), (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."), (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    # pixel decoder
    (r"pixel_decoder\.input_projections\.", "pixel_decoder.input_proj."),
    (r"pixel_decoder\.level_embed$", "pixel_decoder.transformer.level_embed"),
    (r"pixel_decoder\.encoder\.", "pixel_decoder.transformer.encoder."),
    (r"(transformer\.encoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm1."),
    (r"(transformer\.encoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm2."),
    (r"(transformer\.encoder\.layers\.\d+)\.fc", r"\1.linear"),
    (r"\.(adapter_1|layer_1)\.0\.", r".\1."), (r"\.(adapter_1|layer_1)\.1\.", r".\1.norm."),
    (r"\.mask_projection\.", ".mask_features."),
    # predictor
    (r"predictor\.queries_features\.", "predictor.query_feat."),
    (r"predictor\.queries_embedder\.", "predictor.query_embed."),
    (r"predictor\.input_projections\.", "predictor.input_proj."),
    (r"predictor\.decoder\.layernorm\.", "predictor.decoder_norm."),
    (r"predictor\.decoder\.mask_predictor\.mask_embedder\.(\d)\.0\.", r"predictor.mask_embed.layers.\1."),
    (r"predictor\.decoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)",
     r"predictor.transformer_self_attention_layers.\1.self_attn.in_proj_\3<\2>"),
    (r"predictor\.decoder\.layers\.(\d+)\.self_attn\.",
     r"predictor.transformer_self_attention_layers.\1.self_attn."),
    (r"predictor\.decoder\.layers\.(\d+)\.self_attn_layer_norm\.",
     r"predictor.transformer_self_attention_layers.\1.norm."),
    (r"predictor\.decoder\.layers\.(\d+)\.cross_attn\.",
     r"predictor.transformer_cross_attention_layers.\1.multihead_attn."),
    (r"predictor\.decoder\.layers\.(\d+)\.cross_attn_layer_norm\.",
     r"predictor.transformer_cross_attention_layers.\1.norm."),
    (r"predictor\.decoder\.layers\.(\d+)\.fc", r"predictor.transformer_ffn_layers.\1.linear"),
    (r"predictor\.decoder\.layers\.(\d+)\.final_layer_norm\.", r"predictor.transformer_ffn_layers.\1.norm."),
]  # fmt: skip
SWIN = SwinConfig(embed_dim=16, depths=[1, 2, 1, 1], num_heads=[1, 2, 2, 4], window_size=4, out_features=STAGES)
RESNET = ResNetConfig(
    embedding_size=8, hidden_sizes=[32, 64, 128, 256], depths=[3, 4, 6, 3], layer_type="bottleneck", out_features=STAGES
)
BASIC = ResNetConfig(
    embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[2, 2, 2, 2], layer_type="basic", out_features=STAGES
)
# A configuration in detectron2's format, with code that must not run.
BASE = """
MODEL:
  BACKBONE: {FREEZE_AT: 0, NAME: "build_resnet_backbone"}
  WEIGHTS: "R-50.pkl"
  PIXEL_MEAN: [123.675, 116.280, 103.530]
  PIXEL_STD: [58.395, 57.120, 57.375]
  RESNETS:
    DEPTH: 50
    STEM_TYPE: "basic"
    STEM_OUT_CHANNELS: 8
    RES2_OUT_CHANNELS: 32
    WIDTH_PER_GROUP: 8
    STRIDE_IN_1X1: False
    OUT_FEATURES: ["res2", "res3", "res4", "res5"]
DATASETS:
  TRAIN: ("my_panoptic_train",)
SOLVER: {STEPS: (327778, 355092)}
INPUT:
  MIN_SIZE_TRAIN: !!python/object/apply:eval ["__import__('os').mkdir('ran')"]
  MIN_SIZE_TEST: 64
  MAX_SIZE_TEST: 128
  FORMAT: "RGB"
"""
LEAF = """
_BASE_: ../base.yaml
MODEL:
  META_ARCHITECTURE: "MaskFormer"
  SEM_SEG_HEAD:
    NAME: "MaskFormerHead"
    IGNORE_VALUE: 255
    NUM_CLASSES: 3
    CONVS_DIM: 32
    MASK_DIM: 24
    NORM: "GN"
    PIXEL_DECODER_NAME: "MSDeformAttnPixelDecoder"
    IN_FEATURES: ["res2", "res3", "res4", "res5"]
    COMMON_STRIDE: 4
    TRANSFORMER_ENC_LAYERS: 2
  MASK_FORMER:
    TRANSFORMER_IN_FEATURE: "multi_scale_pixel_decoder"
    CLASS_WEIGHT: 2.0
    MASK_WEIGHT: 5.0
    DICE_WEIGHT: 5.0
    HIDDEN_DIM: 32
    NUM_OBJECT_QUERIES: 7
    NHEADS: 4
    DROPOUT: 0.0
    DIM_FEEDFORWARD: 40
    DEC_LAYERS: 5
    TEST: {SEMANTIC_ON: True, INSTANCE_ON: True, PANOPTIC_ON: True, OVERLAP_THRESHOLD: 0.8}
"""
OF_SWIN = """
  BACKBONE: {NAME: "D2SwinTransformer"}
  SWIN: {EMBED_DIM: 16, DEPTHS: [1, 2, 1, 1], NUM_HEADS: [1, 2, 2, 4], WINDOW_SIZE: 4, APE: False, PATCH_NORM: True}
"""
OF_BASIC = "\n  RESNETS: {DEPTH: 18, RES2_OUT_CHANNELS: 8, NORM: SyncBN}\n"


def tiny(backbone: Any = SWIN, **overrides: Any) -> Mask2FormerForUniversalSegmentation:
    """A small model of transformers with the architecture in LEAF."""
    values = {
        "feature_size": 32, "mask_feature_size": 24, "hidden_dim": 32, "encoder_feedforward_dim": 1024,
        "dim_feedforward": 40, "encoder_layers": 2, "decoder_layers": 5, "num_attention_heads": 4, "num_queries": 7,
        "num_labels": 3, **overrides,
    }  # fmt: skip
    torch.manual_seed(0)
    config = Mask2FormerConfig(backbone_config=backbone.to_dict(), **values)
    return lively(Mask2FormerForUniversalSegmentation(config))


def zoo_arrays(model: Mask2FormerForUniversalSegmentation, folder: Path) -> dict[str, np.ndarray]:
    """The weights by the zoo's names, made from what transformers saves, which has the same names in both major
    versions."""
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    parts: dict[str, dict[str, torch.Tensor]] = collections.defaultdict(dict)
    for name, tensor in load_file(folder / "model.safetensors").items():
        if "relative_position_index" in name or "swin.layernorm" in name:  # only in one major version
            continue
        for pattern, replacement in ZOO_NAMES:
            name = re.sub(pattern, replacement, name)
        part = re.search(r"<(.*)>", name)
        parts[re.sub("<.*>", "", name)][part[1][0] if part else ""] = tensor
    return {
        name: (of[""] if "" in of else torch.cat([of[third] for third in "qkv"])).numpy() for name, of in parts.items()
    }


def configs(folder: Path, more: str = "", base: str = BASE) -> Path:
    """Writes a YAML and its base, in folders like those of Mask2Former's repository."""
    (folder / "swin").mkdir(parents=True, exist_ok=True)
    (folder / "base.yaml").write_text(base)
    (folder / "swin" / "leaf.yaml").write_text(LEAF + more)
    return folder / "swin" / "leaf.yaml"


def pickled(path: Path, arrays: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "a person", "matching_heuristics": True}, protocol))
    return path


def run(*arguments: object) -> int:
    return main(["mask2former", *map(str, arguments)])


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The error message of a failed conversion."""
    capsys.readouterr()
    assert run(*arguments) == 2
    sentence = capsys.readouterr().err
    assert sentence.startswith("python -m conversion: ") and sentence.count("\n") == 1 and "Traceback" not in sentence
    return sentence


def largest_error(folder: Path, theirs: Any, images: torch.Tensor) -> float:
    ours = FaiM2FForUniversalSegmentation.from_pretrained(folder)
    with torch.no_grad():
        one, other = ours(images), theirs(images)
    return max(relative_error(one[key], other[key]) for key in KEYS)


@pytest.fixture(scope="module")
def swin(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, np.ndarray]]:
    theirs = tiny()
    return theirs, zoo_arrays(theirs, tmp_path_factory.mktemp("swin"))


@pytest.mark.parametrize(
    ("backbone", "more", "data"),
    [
        (SWIN, OF_SWIN, "my_sem_seg_train"),
        (SWIN, OF_SWIN, "my_instance_train"),
        (RESNET, "", "my_panoptic_train"),
        (BASIC, OF_BASIC, "flowers"),
    ],
    ids=["swin semantic", "swin instance", "r50 panoptic", "basic"],
)
def test_equals_transformers(
    backbone: Any, more: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tiny(backbone)
    arrays = zoo_arrays(theirs, tmp_path / "theirs")
    yaml = configs(tmp_path / "configs", more, BASE.replace("my_panoptic_train", data))
    source = pickled(tmp_path / "model.pkl", arrays)
    assert run(source, tmp_path / "out", "--config", yaml) == 0
    assert "are not known" in capsys.readouterr().out
    for size in ((64, 96), (95, 130)):
        assert largest_error(tmp_path / "out", theirs, torch.randn(2, 3, *size)) <= 1e-5, size
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    subtasks = {"my_sem_seg_train": "semantic", "my_instance_train": "instance"}
    assert config["postprocessing_type"] == subtasks.get(data, "panoptic")
    assert config["id2label"] == {"0": "0", "1": "1", "2": "2"}
    assert config.get("backbone_freeze_norm") is (backbone is RESNET)
    assert not (tmp_path / "ran").exists() and not Path("ran").exists()  # code in the YAML would create this
    processor = FaiM2FImageProcessor.from_pretrained(tmp_path / "out")
    assert processor.size == {"shortest_edge": 64, "longest_edge": 128}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "model.pkl" in card and hashlib.sha256(source.read_bytes()).hexdigest() in card and "Focoos" not in card
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_stride_of_resnets_that_have_it_first(tmp_path: Path) -> None:
    first = ResNetConfig(**{**RESNET.to_dict(), "downsample_in_bottleneck": True})
    theirs = tiny(first)
    base = BASE.replace("STRIDE_IN_1X1: False", "STRIDE_IN_1X1: True")
    source = pickled(tmp_path / "model.pkl", zoo_arrays(theirs, tmp_path / "theirs"))
    assert run(source, tmp_path / "out", "--config", configs(tmp_path / "configs", base=base)) == 0
    images = torch.randn(1, 3, 64, 96)
    assert largest_error(tmp_path / "out", theirs, images) <= 1e-5
    assert largest_error(tmp_path / "out", tiny(RESNET), images) > 1e-2  # same weights: the setting matters


def of_python_2(arrays: dict[str, np.ndarray]) -> bytes:
    """A pickle from Python 2: text and bytes are the same type, and NumPy's module has its old name."""
    out = io.BytesIO()

    def text(value: bytes) -> None:
        out.write(
            b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<i", len(value)) + value
        )

    out.write(b"\x80\x02}(")
    text(b"model")
    out.write(b"ccollections\nOrderedDict\n(]tR(")
    for name, array in arrays.items():
        text(name.encode())
        out.write(b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01(")
        for side in array.shape:
            out.write(b"J" + struct.pack("<i", side))
        out.write(b"tcnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89")
        text(np.ascontiguousarray(array).tobytes())
        out.write(b"tb")
    out.write(b"uu.")
    return out.getvalue()


def test_forms_of_a_checkpoint(swin: tuple[Any, dict[str, np.ndarray]], tmp_path: Path) -> None:
    """Every format of a checkpoint gives the same model, with or without optional buffers."""
    theirs, arrays = swin
    yaml = configs(tmp_path / "configs", OF_SWIN)
    place = np.arange(4)
    index = np.zeros((16, 16), np.int64)
    for one in range(16):
        for other in range(16):
            down, right = place[one // 4] - place[other // 4] + 3, place[one % 4] - place[other % 4] + 3
            index[one, other] = down * 7 + right
    with_buffers = {
        **arrays,
        **{f"backbone.layers.{stage}.blocks.0.attn.relative_position_index": index for stage in range(4)},
        "criterion.empty_weight": np.ones(4, np.float32),
    }
    first_names = {
        name.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.").replace("query_feat", "static_query"): array
        for name, array in arrays.items()
    }
    ordered = collections.OrderedDict(arrays)
    ordered._metadata = collections.OrderedDict(version=2)  # like in torch's state dicts
    sources = [pickled(tmp_path / f"protocol{number}.pkl", arrays, number) for number in (2, 3, 4, 5)]
    sources.append(pickled(tmp_path / "buffers.pkl", with_buffers))
    sources.append(pickled(tmp_path / "first names.pkl", first_names))
    sources.append(pickled(tmp_path / "ordered.pkl", ordered))
    sources.append(pickled(tmp_path / "big endian.pkl", {name: array.astype(">f4") for name, array in arrays.items()}))
    by_columns = {name: np.asfortranarray(array) for name, array in arrays.items()}
    sources.append(pickled(tmp_path / "by columns.pkl", by_columns))
    (tmp_path / "python2.pkl").write_bytes(of_python_2(arrays))
    sources.append(tmp_path / "python2.pkl")
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps(arrays))
    sources.append(tmp_path / "bare.pkl")
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    torch.save(
        {"model": tensors, "optimizer": {"state": {0: torch.zeros(2)}}, "iteration": 3}, tmp_path / "trained.pth"
    )
    sources.append(tmp_path / "trained.pth")
    averaged = {"model": {name: 0 * array for name, array in arrays.items()}, "ema_state": arrays}
    (tmp_path / "averaged.pkl").write_bytes(pickle.dumps(averaged))
    sources.append(tmp_path / "averaged.pkl")
    expected: dict[str, torch.Tensor] | None = None
    for source in sources:
        out = tmp_path / "out" / source.name
        out.parent.mkdir(exist_ok=True)
        assert run(source, out, "--config", yaml) == 0, source.name
        weights = load_file(out / "model.safetensors")
        if expected is None:
            expected = weights
            assert largest_error(out, theirs, torch.randn(1, 3, 64, 64)) <= 1e-5
        # transformers 5 saves an unused norm with random values.
        names = [name for name in expected if "swin.layernorm" not in name]
        assert all(torch.equal(weights[name], expected[name]) for name in names), source.name


@pytest.mark.newest_only
@pytest.mark.large
@pytest.mark.parametrize(
    ("name", "backbone"),
    [
        ("coco/instance/maskformer2_R50_bs16_50ep", ResNetConfig(out_features=STAGES)),
        (
            "configs/coco/panoptic-segmentation/swin/maskformer2_swin_tiny_bs16_50ep.yaml",
            SwinConfig(embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=7, out_features=STAGES),
        ),
    ],
    ids=["R50 instance", "Swin-T panoptic"],
)
def test_published_architectures_by_name(name: str, backbone: Any, tmp_path: Path) -> None:
    """At full width and depth, with random weights: the named configurations match the keys of the zoo's files."""
    count = 80 if "instance" in name else 133
    config = Mask2FormerConfig(backbone_config=backbone.to_dict(), num_labels=count)
    torch.manual_seed(0)
    theirs = lively(Mask2FormerForUniversalSegmentation(config))
    source = pickled(tmp_path / "model.pkl", zoo_arrays(theirs, tmp_path / "theirs"))
    assert run(source, tmp_path / "out", "--config", name) == 0
    # If a mask logit is almost 0, rounding decides what a query attends to; few images have such a pixel.
    assert min(largest_error(tmp_path / "out", theirs, torch.randn(1, 3, 128, 160)) for _ in range(3)) <= 1e-4


class TestTheZoo:
    # Millions of parameters from tables 1 and 3 of the paper (R50 has the same with 80 and 133 classes).
    PARAMETERS = {"R50": 44, "R101": 63, "swin_tiny": 47, "swin_small": 69, "swin_base_384": 107,
                  "swin_large_IN21k_384": 216}  # fmt: skip

    def test_every_configuration_is_one(self) -> None:
        for model in zoo().values():
            described = describe_published(model)
            config = model_configuration(described)
            assert config.postprocessing_type == model.subtask == model.name.split("/")[1]
            count = sum(math.prod(weight.shape) for weight in weights_of(config) if "running_" not in weight.key)
            # The table counts 200 queries for Swin-L, and 100 for the others.
            if model.backbone in self.PARAMETERS and config.num_queries == (200 if "large" in model.backbone else 100):
                assert abs(count / 1e6 - self.PARAMETERS[model.backbone]) <= 1.01, model.name
            stuff = config.label_ids_to_fuse
            assert (stuff is not None) == (model.subtask == "panoptic")
        assert len({model.md5 for model in zoo().values()}) == len(zoo()) == 47

    @pytest.mark.parametrize("backbone", ["R50", "swin_tiny"])
    def test_the_layout_is_the_models(self, backbone: str) -> None:
        model = next(model for model in zoo().values() if model.backbone == backbone)
        config = model_configuration(describe_published(model))
        with torch.device("meta"):
            ours = FaiM2FForUniversalSegmentation(config)
        there = {name: tensor for name, tensor in ours.state_dict().items() if "swin.layernorm" not in name}
        skipped = ("relative_position_index", "num_batches_tracked")
        numbers = sum(tensor.numel() for name, tensor in there.items() if not name.endswith(skipped))
        assert sum(math.prod(weight.shape) for weight in weights_of(config)) == numbers
        if backbone == "R50":
            assert {name for weight in weights_of(config) for name in weight.ours} == {
                name for name in there if not name.endswith(skipped)
            }

    def test_labels_and_stuff(self) -> None:
        labels, stuff = labels_and_stuff("coco", "panoptic")
        assert len(labels) == 133 and labels[79:81] == ["toothbrush", "banner"] and stuff == list(range(80, 133))
        labels, stuff = labels_and_stuff("ade20k", "panoptic")
        assert len(labels) == 150 and len(stuff or []) == 50 and 7 not in (stuff or [])
        labels, stuff = labels_and_stuff("ade20k", "instance")
        assert len(labels) == 100 and labels[0] == "bed" and labels[-1] == "flag" and stuff is None
        labels, stuff = labels_and_stuff("mapillary-vistas", "panoptic")
        assert len(labels) == 65 and len(stuff or []) == 28 and labels[0] == "Bird" and 0 not in (stuff or [])
        assert len(labels_and_stuff("cityscapes", "instance")[0]) == 8
        assert labels_and_stuff("cityscapes", "panoptic")[1] == list(range(11))
        for data, subtask, count in (
            ("coco", "instance", 80), ("cityscapes", "semantic", 19), ("ade20k", "semantic", 150),
            ("mapillary-vistas", "semantic", 65),
        ):  # fmt: skip
            assert len(labels_and_stuff(data, subtask)[0]) == count

    @pytest.mark.parametrize(
        ("given", "subtask", "name"),
        [
            ("coco/panoptic/maskformer2_R50_bs16_50ep", None, "coco/panoptic/maskformer2_R50_bs16_50ep"),
            ("maskformer2_R50_bs16_50ep", "instance", "coco/instance/maskformer2_R50_bs16_50ep"),
            ("cityscapes/semantic-segmentation/swin/maskformer2_swin_tiny_bs16_90k.yaml", None,
             "cityscapes/semantic/maskformer2_swin_tiny_bs16_90k"),
            ("mapillary_vistas/panoptic/maskformer_R50_bs16_300k", None,
             "mapillary-vistas/panoptic/maskformer_R50_bs16_300k"),
            ("maskformer2_swin_base_384_bs16_160k_res640", None,
             "ade20k/semantic/maskformer2_swin_base_384_bs16_160k_res640"),
        ],
    )  # fmt: skip
    def test_names(self, given: str, subtask: str | None, name: str) -> None:
        assert find_zoo_model(given, subtask).name == name

    def test_names_that_are_none_or_several(self) -> None:
        with pytest.raises(ValueError, match="could be cityscapes/panoptic/.*, cityscapes/instance/.*; say which"):
            find_zoo_model("maskformer2_R50_bs16_90k")
        with pytest.raises(ValueError, match="did you mean 'coco/panoptic/maskformer2_R50_bs16_50ep'"):
            find_zoo_model("coco/panoptic/maskformer_R50_bs16_50ep")
        with pytest.raises(ValueError, match="was not trained for instance"):
            find_zoo_model("maskformer2_R50_bs16_160k".replace("R50", "swin_tiny"), "instance")

    def test_images_are_prepared_as_the_original_does(self) -> None:
        """RGB, detectron2's mean and standard deviation in 0..255, the shorter edge of the evaluations."""

        sizes = {"coco/instance/maskformer2_R50_bs16_50ep": (800, 1333),
                 "cityscapes/semantic/maskformer2_R50_bs16_90k": (1024, 2048),
                 "ade20k/semantic/maskformer2_R50_bs16_160k": (512, 2048),
                 "ade20k/semantic/maskformer2_swin_large_IN21k_384_bs16_160k_res640": (640, 2560),
                 "ade20k/panoptic/maskformer2_R50_bs16_160k": (640, 2560)}  # fmt: skip
        for name, (shortest, longest) in sizes.items():
            described = describe_published(zoo()[name])
            processor = image_processor(described, model_configuration(described))
            assert processor.size == {"shortest_edge": shortest, "longest_edge": longest}
        red = np.zeros((64, 64, 3), np.uint8)
        red[..., 0] = 200
        inputs = processor(red, size={"height": 40, "width": 40}, return_tensors="pt")
        assert inputs["pixel_values"].shape == (1, 3, 40, 40)  # without the padding to a multiple of 32
        expected = [(200 - 123.675) / 58.395, -116.28 / 57.12, -103.53 / 57.375]
        torch.testing.assert_close(inputs["pixel_values"][0, :, 5, 5], torch.tensor(expected), rtol=1e-4, atol=1e-4)
        assert inputs["pixel_mask"].all()

    def test_a_file_is_known_by_its_md5(
        self, swin: tuple[Any, dict[str, np.ndarray]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        """Adds the test's own file to the zoo, because the zoo's files are not available."""
        from dataclasses import replace

        source = pickled(tmp_path / "model.pkl", swin[1])
        model = replace(zoo()["coco/panoptic/maskformer2_swin_tiny_bs16_50ep"],
                        md5=hashlib.md5(source.read_bytes()).hexdigest()[:6])  # fmt: skip
        monkeypatch.setattr(family, "zoo", lambda: {model.name: model})
        # Its license is that of the zoo, and not that of a file that has only its architecture.
        yaml = configs(tmp_path / "configs", OF_SWIN)
        for name in ("model.pkl", "other.pkl"):
            path = pickled(tmp_path / name, swin[1], 4 if name == "model.pkl" else 3)
            assert run(path, tmp_path / name[:-4], "--config", yaml) == 0
            card = (tmp_path / name[:-4] / "README.md").read_text()
            assert ("license: cc-by-nc-4.0\n" in card) == (name == "model.pkl") != ("as-the-source" in card)
        sentence = told(capsys, source, tmp_path / "out")
        assert "by its weights the backbone's embed_dim is 16, there it is 96" in sentence
        sentence = told(capsys, source, tmp_path / "out", "--config", model.name, "--subtask", "instance")
        assert "was not trained for instance" in sentence


@pytest.mark.newest_only
class TestYaml:
    def read(self, folder: Path, more: str = "", base: str = BASE, subtask: str | None = None) -> CheckpointDescription:
        return describe_yaml(configs(folder, more, base), subtask)

    def test_what_it_says(self, tmp_path: Path) -> None:
        found = self.read(tmp_path, OF_SWIN, BASE.replace("my_panoptic_train", "coco_2017_train"))
        assert found.subtask == "instance" and found.data is None  # 3 classes, so not COCO's 80
        found = describe_yaml(
            configs(tmp_path, OF_SWIN.replace("  BACK", "  SEM_SEG_HEAD: {NUM_CLASSES: 80}\n  BACK", 0))
        )
        assert found.size == (64, 128) and found.config["class_cost"] == 2.0 and found.config["decoder_layers"] == 4
        assert found.subtask == "panoptic" and found.config["backbone_config"]["drop_path_rate"] == 0.3

    def test_thresholds_of_the_panoptic_evaluation(self, tmp_path: Path) -> None:
        """A note names each one that is not this package's default."""
        arguments = inspect.signature(FaiM2FImageProcessor.post_process_panoptic_segmentation).parameters
        assert [arguments[name].default for name, _, _ in PANOPTIC_THRESHOLDS.values()] == [0.5, 0.8]
        assert [default for _, default, _ in PANOPTIC_THRESHOLDS.values()] == [0.5, 0.8]

        def notes(thresholds: str, subtask: str = "panoptic") -> list[str]:
            leaf = configs(tmp_path, OF_SWIN)
            leaf.write_text(leaf.read_text().replace("OVERLAP_THRESHOLD: 0.8", thresholds))
            return [note for note in describe_yaml(leaf, subtask).notes if "THRESHOLD" in note]

        (note,) = notes("OVERLAP_THRESHOLD: 0.8, OBJECT_MASK_THRESHOLD: 0.7")
        assert "by OBJECT_MASK_THRESHOLD = 0.7, and this package's default is 0.5: pass threshold=0.7 to" in note
        (note,) = notes("OVERLAP_THRESHOLD: 0.6, OBJECT_MASK_THRESHOLD: 0.5")
        assert "pass overlap_mask_area_threshold=0.6 to post_process_panoptic_segmentation to get" in note
        assert len(notes("OBJECT_MASK_THRESHOLD: 0.5")) == 1  # detectron2's default is 0
        assert notes("OVERLAP_THRESHOLD: 0.6", "instance") == notes("OVERLAP_THRESHOLD: 0.6", "semantic") == []
        (note,) = describe_published(find_zoo_model("coco/panoptic/maskformer2_R50_bs16_50ep")).notes
        assert (
            "pass threshold=0.8 to post_process_panoptic_segmentation (or --threshold 0.8 to `faim2f predict`)" in note
        )
        assert describe_published(find_zoo_model("coco/instance/maskformer2_R50_bs16_50ep")).notes == []

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            (("META_ARCHITECTURE: \"MaskFormer\"", "META_ARCHITECTURE: \"VideoMaskFormer\""),
             "MODEL.META_ARCHITECTURE is 'VideoMaskFormer', and only 'MaskFormer' can be converted"),
            (("NORM: \"GN\"", "NORM: \"LN\""), "MODEL.SEM_SEG_HEAD.NORM is 'LN'"),
            (("NHEADS: 4", "NHEADS: four"), "MODEL.MASK_FORMER.NHEADS is 'four', where a value like 8"),
            (("NHEADS: 4", "NHEADS: 99999999999"), "MODEL.MASK_FORMER.NHEADS is 99999999999"),
            (("NHEADS: 4", "NHEAD: 4"), "MODEL.MASK_FORMER.NHEAD, which this converter does not support. Did you mean"),
            (("NHEADS: 4", "NHEADS: !!python/object/apply:os.system [\"touch ran\"]"), "asks Python to compute it"),
            (("NHEADS: 4", "NHEADS: &a 4\n    X: *a"), "MODEL.MASK_FORMER.X, which this converter does not support"),
            (("NHEADS: 4", "NHEADS: !something 4"), "not readable YAML"),
            (("_BASE_: ../base.yaml", "_BASE_: ../../../../../../etc/passwd"), "is not a YAML file within"),
            (("_BASE_: ../base.yaml", "_BASE_: ../../../outside.yaml"), "is not a YAML file within"),
            (("_BASE_: ../base.yaml", "_BASE_: /etc/passwd"), "is not a path relative to this file"),
            (("_BASE_: ../base.yaml", "_BASE_: https://example.com/a.yaml"), "is not a path relative to this file"),
            (("_BASE_: ../base.yaml", "_BASE_: leaf.yaml"), "form a cycle"),
            (("_BASE_: ../base.yaml", "_BASE_: other.yaml"), "other.yaml does not exist"),
            (("MODEL:", "- a\n- b\nMODEL:"), "not readable YAML"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_honoured(self, change: tuple[str, str], sentence: str, tmp_path: Path) -> None:
        (tmp_path / "outside.yaml").write_text(BASE)
        leaf = configs(tmp_path / "a" / "configs", OF_SWIN)
        leaf.write_text(LEAF.replace(*change) + OF_SWIN)
        with pytest.raises(ConversionError, match=re.escape(sentence)):
            describe_yaml(leaf)
        assert not Path("ran").exists()

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            (("FORMAT: \"RGB\"", "FORMAT: \"BGR\""), "INPUT.FORMAT is 'BGR', and only 'RGB' can be converted"),
            (("  FORMAT: \"RGB\"\n", ""), "INPUT.FORMAT is 'BGR'"),  # detectron2's default
            (("DEPTH: 50", "DEPTH: 77"), "MODEL.RESNETS.DEPTH is 77"),
            (("DEPTH: 50", "DEPTH: 50\n    NORM: GN"), "MODEL.RESNETS.NORM is 'GN'"),
            (("DEPTH: 50", "DEPTH: 50\n    NUM_GROUPS: 32"), "MODEL.RESNETS.NUM_GROUPS is 32"),
            (("RES2_OUT_CHANNELS: 32", "RES2_OUT_CHANNELS: 48"), "only 4 * WIDTH_PER_GROUP = 32"),
            (("\"build_resnet_backbone\"", "\"D2ConvNeXt\""), "MODEL.BACKBONE.NAME is 'D2ConvNeXt'"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_honoured_of_a_base(self, change: tuple[str, str], sentence: str, tmp_path: Path) -> None:
        with pytest.raises(ConversionError, match=re.escape(sentence)):
            self.read(tmp_path, base=BASE.replace(*change))

    def test_what_a_training_leaves(self, tmp_path: Path) -> None:
        """The config.yaml of a detectron2 training has every setting, including those of other architectures, and no
        base."""
        leaf = LEAF.replace("_BASE_: ../base.yaml\n", "") + OF_SWIN + "  ROI_HEADS: {NUM_CLASSES: 80}\n"
        others = "LOSS_TYPE: hard_pixel_mining\n    ASPP_DILATIONS: [6, 12, 18]\n    NORM"
        leaf = leaf.replace("NORM", others, 1) + "DATASETS: {TRAIN: [cityscapes_fine_instance_seg_train]}\n"
        leaf += "INPUT: {FORMAT: RGB, MIN_SIZE_TRAIN: !!python/tuple [1, 2]}\nOUTPUT_DIR: ./output\nVERSION: 2\n"
        leaf = leaf.replace("NUM_CLASSES: 3", "NUM_CLASSES: 8")
        (tmp_path / "config.yaml").write_text(leaf)
        found = describe_yaml(tmp_path / "config.yaml")
        assert (found.data, found.subtask, found.size, found.notes) == ("cityscapes", "instance", (800, 1333), [])
        # Without PIXEL_MEAN, detectron2's default applies, which is in BGR and 0..255.
        assert found.mean == (103.53, 116.28, 123.675) and found.std == (1.0, 1.0, 1.0)
        config = model_configuration(found)
        assert config.id2label[0] == "person" and config.label_ids_to_fuse is None

    def test_images_that_are_not_resized(self, tmp_path: Path) -> None:
        """As in detectron2, where the size 0 turns ResizeShortestEdge off."""
        found = self.read(tmp_path, OF_SWIN, BASE.replace("MIN_SIZE_TEST: 64", "MIN_SIZE_TEST: 0"))
        processor = image_processor(found, model_configuration(found))
        assert processor([np.zeros((50, 300, 3), np.uint8)], return_tensors="pt")["pixel_values"].shape[2:] == (50, 300)

    def test_several_datasets(self, tmp_path: Path) -> None:
        train = '("coco_2017_train", "my_sem_seg_train")'
        (note,) = [
            note
            for note in self.read(tmp_path, OF_SWIN, BASE.replace('("my_panoptic_train",)', train)).notes
            if "DATASETS.TRAIN" in note
        ]
        assert "names 2 datasets: the classes are taken to be those of coco_2017_train" in note

    def test_large_and_deep_files(self, tmp_path: Path) -> None:
        for text, sentence in (
            ("[" * 100_000, "not readable YAML"),
            ("# " + "a" * (1 << 20), "more than 1048576 bytes"),
        ):
            (tmp_path / "a.yaml").write_text(text)
            with pytest.raises(ConversionError, match=sentence):
                describe_yaml(tmp_path / "a.yaml")


class Evil:
    """Unpickling calls the function that `__reduce__` returns."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


class Subclass(np.ndarray):
    def __reduce__(self) -> Any:  # type: ignore[override]
        return os.mkdir, ("ran",)


ARRAY = b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"
FLOAT32 = (
    b"cnumpy\ndtype\n(X\x02\x00\x00\x00f4\x89\x88tR(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
)
HUGE = b"\x8a\x06" + (1 << 40).to_bytes(6, "little")
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "os.system": (lambda: pickle.dumps({"model": Evil(os.mkdir, ("ran",))}), "holds `posix.mkdir`, and reading it"),
    "of protocol 0": (lambda: pickle.dumps({"model": Evil(os.mkdir, ("ran",))}, 0), "holds `posix.mkdir`"),
    "eval": (lambda: pickle.dumps({"model": Evil(eval, ("os.mkdir('ran')",))}), "holds `builtins.eval`"),
    "of a subclass": (lambda: pickle.dumps({"a": np.zeros(2).view(Subclass)}), "holds `posix.mkdir`"),
    "getattr": (lambda: pickle.dumps(Evil(getattr, ("a", "upper"))), "holds `builtins.getattr`"),
    "a dotted name": (lambda: b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.", "holds `numpy.ndarray.tofile`"),
    "codecs": (lambda: b"c_codecs\ndecode\n.", "holds `_codecs.decode`"),
    "torch tensors": (lambda: pickle.dumps({"a": torch.zeros(2)}), "Save the weights alone, as arrays"),
    "a call of an array": (lambda: b"cnumpy\nndarray\n(HtR.".replace(b"H", HUGE), "calls `numpy.ndarray`"),
    "a persistent id": (lambda: b"\x80\x02Pname\n.", "the instruction PERSID"),
    "a persistent id, binary": (lambda: b"\x80\x02K\x01Q.", "the instruction BINPERSID"),
    "an extension": (lambda: b"\x80\x02\x82\x01.", "the instruction EXT1"),
    "an instance": (lambda: b"(cos\nmkdir\no.", "holds `os.mkdir`"),
    "an instance, old": (lambda: b"(ios\nmkdir\n.", "the instruction INST"),
    "an object": (lambda: b"cnumpy\nndarray\n)\x81.", "the instruction NEWOBJ"),
    "a buffer outside": (lambda: b"\x80\x05\x97.", "the instruction NEXT_BUFFER"),
    "a large memo": (lambda: b"\x80\x02}r\xff\xff\xff\x7f.", "holds no weights"),
    "a memo that is not": (lambda: b"\x80\x02j\xff\xff\xff\x7f.", "without what it works on"),
    "bytes that are not there": (lambda: b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"a.", "truncated"),
    "text that is not there": (lambda: b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"a.", "truncated"),
    "a frame that is not there": (lambda: b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"N.", "holds a NoneType"),
    "a number that is not there": (lambda: b"\x80\x02\x8b\xff\xff\xff\x7f1.", "truncated"),
    "a long number": (lambda: b"L" + b"9" * 60_000 + b"L\n.", "not a complete pickle"),
    "a longer line": (lambda: b"L" + b"9" * 100_000 + b"L\n.", "does not end within"),
    "a huge shape": (lambda: ARRAY + b"(K\x01(" + 3 * HUGE + b"t" + FLOAT32 + b"\x89C\x04abcdtb.",
                     "with 4 bytes in place of"),
    "a negative shape": (lambda: ARRAY + b"(K\x01(J\xff\xff\xff\xfft" + FLOAT32 + b"\x89C\x04abcdtb.",
                         "of a shape that cannot be"),
    "a shape of many sides": (lambda: ARRAY + b"(K\x01(" + 9 * b"K\x01" + b"t" + FLOAT32 + b"\x89C\x04abcdtb.",
                              "of a shape that cannot be"),
    "too many bytes": (lambda: ARRAY + b"(K\x01(K\x01t" + FLOAT32 + b"\x89C\x08abcdefghtb.", "8 bytes in place of 4"),
    "no type": (lambda: ARRAY + b"(K\x01(K\x01tN\x89C\x04abcdtb.", "whose values are not bytes"),
    "values twice": (lambda: ARRAY + 2 * (b"(K\x01(K\x01t" + FLOAT32 + b"\x89C\x04abcdtb") + b".",
                     "fills an array twice"),
    "no values": (lambda: ARRAY + b".", "an array without values"),
    "objects": (lambda: pickle.dumps({"a": np.array([{}, "a"], object)}), "of type 'O8'"),
    "structures": (lambda: pickle.dumps({"a": np.zeros(2, [("x", "f4")])}), "of type 'V4'"),
    "text in arrays": (lambda: pickle.dumps({"a": np.array(["abc"])}), "of type 'U3'"),
    "complex numbers": (lambda: pickle.dumps({"a": np.zeros(2, complex)}), "of type 'c16'"),
    "a set": (lambda: pickle.dumps({"a": {1, 2}}), "the instruction EMPTY_SET"),
    "a state for a list": (lambda: b"]}b.", "sets the state of a list"),
    "a state for a name": (lambda: b"cnumpy\nndarray\n}b.", "sets the state of"),
    "a nest of tuples as key": (lambda: b"\x80\x02})" + 40 * b"2\x86" + b"Ns.", "whose key is a tuple"),
    "itself within itself": (lambda: b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s.", "is not an array (dict)"),
    "lists in lists": (lambda: 50_000 * b"]" + 49_999 * b"a" + b".", "holds a list"),
    # Each instruction copies the largest value in the file.
    "one text, encoded again and again": (
        lambda: b"\x80\x02X\x10\x27\x00\x00" + 10_000 * b"a" + b"q\x000" + 99 * b"c_codecs\nencode\nh\x00\x85R" + b".",
        "expands to more data than the file contains"),
    "one list, made a dictionary again and again": (
        lambda: b"\x80\x02](" + 5000 * b"K\x01K\x01\x86" + b"eq\x000"
        + 9999 * b"ccollections\nOrderedDict\nh\x00\x85R0" + b"N.", "expands to more data than the file contains"),
    "a type that takes forever to print": (lambda: b"\x80\x02]" + 60 * b"2\x86" + b"q\x00cnumpy\ndtype\nh\x00\x85R.",
                                           "without what it works on"),
    "many instructions": (lambda: b"\x80\x02" + (1 << 21) * b"N" + b".", "more than 1048576 instructions"),
    "a name of several lines": (lambda: b"\x80\x04\x8c\x02os\x8c\x03a\nb\x93.", "holds `os.a\\nb`"),
    "no end": (lambda: pickle.dumps({"a": np.zeros(9)})[:-1], "truncated"),
    "half of it": (lambda: pickle.dumps({"a": np.zeros(900)})[:1000], "truncated"),
    "more than it": (lambda: pickle.dumps({"a": np.zeros(9)}) + b"more", "4 bytes behind its end"),
    "two values": (lambda: b"NN.", "leaves 2 values"),
    "nothing on the stack": (lambda: b"a.", "without what it works on"),
    "a mark": (lambda: b"(q\x00.", "without what it works on"),
    "torch of old": (lambda: pickle.dumps(0x1950A86A20F9469CFC6C) + b"more", "written by torch before 1.6"),
    "no pickle": (lambda: b"<html>not found</html>", "not a complete pickle"),
    "an empty file": (lambda: b"", "is empty"),
    "a list": (lambda: pickle.dumps([1, 2]), "holds a list where a dictionary of arrays"),
    "numbers": (lambda: pickle.dumps({"model": {"a": 1}}), "the entry 'a' is not an array (int)"),
    "no weights": (lambda: pickle.dumps({"model": {}}), "holds no weights"),
}  # fmt: skip


@pytest.mark.newest_only
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, expected = HOSTILE[name]
    (tmp_path / "model.pkl").write_bytes(make())
    sentence = told(capsys, "model.pkl", "out", "--config", "coco/panoptic/maskformer2_R50_bs16_50ep")
    assert expected in sentence and "model.pkl" in sentence
    assert [path.name for path in tmp_path.iterdir()] == ["model.pkl"]  # nothing was written, and no code was run


def test_nothing_is_allocated_that_the_file_does_not_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One array under many names, which a pickle stores once; or one number as a large tensor."""
    shared = np.zeros(1 << 16, np.float32)
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({str(number): shared for number in range(5000)}))
    assert (tmp_path / "model.pkl").stat().st_size < 1 << 20
    out = tmp_path / "out"
    name = "coco/panoptic/maskformer2_R50_bs16_50ep"
    assert "more than the file; refused as forged" in told(capsys, tmp_path / "model.pkl", out, "--config", name)
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, tmp_path / "model.pth")
    assert "more than the file; refused as forged" in told(capsys, tmp_path / "model.pth", out, "--config", name)


def test_plain_values_come_out_as_they_went_in(tmp_path: Path) -> None:
    """Compared with Python's own pickle module, in every protocol."""
    kept = {
        "floats": [0.5, -1e300, float("inf")], "integers": [0, -1, 255, 65536, -(2**31), 2**40, 10**30],
        "texts": ["", "a", "ä\n\u2028" * 100], "bytes": b"\x00\xff" * 300, "others": (None, True, False, ()),
        "more": [(1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {}, {1: {"a": []}}],
        "scalars": np.float32(1.5), "none": np.zeros((0, 3), np.float64), "point": np.array(7),
        "halves": np.arange(6, dtype=np.float16).reshape(2, 3), "flags": np.array([True, False]),
    }  # fmt: skip
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        content = {**kept} if protocol else {key: value for key, value in kept.items() if key != "flags"}
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
        found = read_array_pickle(tmp_path / "a.pkl")
        assert found.keys() == content.keys()
        for key, value in content.items():
            if isinstance(value, (np.ndarray, np.generic)):
                np.testing.assert_array_equal(found[key], value)
                assert found[key].dtype == value.dtype and found[key].shape == value.shape
            else:
                assert found[key] == value, (protocol, key)


@pytest.mark.newest_only
class TestWrongWeights:
    QUERIES = "sem_seg_head.predictor.query_feat.weight"
    BIAS = "sem_seg_head.predictor.class_embed.bias"

    def changes(self, arrays: dict[str, np.ndarray]) -> dict[str, tuple[dict[str, np.ndarray], str]]:
        def changed(key: str, change: Callable[[np.ndarray], Any]) -> dict[str, np.ndarray]:
            return {**arrays, key: np.asarray(change(arrays[key]))}

        without = {name: array for name, array in arrays.items() if name != self.BIAS}
        index = "backbone.layers.0.blocks.0.attn.relative_position_index"
        norm = "backbone.layers.0.blocks.0.norm1.weight"
        return {
            "missing": (without, f"lacks key '{self.BIAS}'"),
            "not Mask2Former": ({"a": np.zeros(2)}, "these are not weights of Mask2Former"),
            "unexpected": ({**arrays, "backbone.extra": np.zeros(2)}, "the unexpected key 'backbone.extra'"),
            "shape": (changed(norm, lambda a: a[:-1]), f"'{norm}' has the shape (15,)"),
            "infinite": (changed(norm, lambda a: a * np.inf), f"'{norm}' has values that are not finite"),
            "too large": (changed(norm, lambda a: a * np.float64(1e300)), "are not finite"),
            "integers": (changed(norm, lambda a: a.astype(np.int64)), f"'{norm}' holds torch.int64"),
            "queries": (changed(self.QUERIES, lambda a: a[:-1]), "the num_queries is 6, there it is 7"),
            "labels": (changed("sem_seg_head.predictor.class_embed.weight", lambda a: a[1:]),
                       "the num_labels is 2, there it is 3"),
            "index": ({**arrays, index: np.zeros((16, 16), np.int64)}, "is not what a window of 4 pixels has"),
            "index shape": ({**arrays, index: np.zeros(3, np.int64)}, "is not what a window of 4 pixels has"),
            "window": (changed("backbone.layers.0.blocks.0.attn.relative_position_bias_table",
                               lambda a: np.zeros((399**2, 1), np.float32)), "windows of 200 pixels"),
            "layers": ({name: a for name, a in arrays.items() if "_layers.3." not in name},
                       "the decoder_layers is 3, there it is 4"),
        }  # fmt: skip

    def test_each(
        self, swin: tuple[Any, dict[str, np.ndarray]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        yaml = configs(tmp_path / "configs", OF_SWIN)
        for name, (arrays, expected) in self.changes(swin[1]).items():
            source = pickled(tmp_path / "model.pkl", arrays)
            sentence = told(capsys, source, tmp_path / "out", "--config", yaml)
            assert expected in sentence and "model.pkl" in sentence, name
            assert sorted(path.name for path in tmp_path.iterdir()) == ["configs", "model.pkl"], name

    def test_a_variance_below_zero(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arrays = zoo_arrays(tiny(BASIC), tmp_path / "theirs")
        arrays["backbone.stem.conv1.norm.running_var"] = -arrays["backbone.stem.conv1.norm.running_var"]
        source = pickled(tmp_path / "model.pkl", arrays)
        sentence = told(capsys, source, tmp_path / "out", "--config", configs(tmp_path / "configs", OF_BASIC))
        assert "'backbone.stem.conv1.norm.running_var' has negative values" in sentence

    def test_of_the_command(
        self, swin: tuple[Any, dict[str, np.ndarray]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        source, out = pickled(tmp_path / "model.pkl", swin[1]), tmp_path / "out"
        yaml = configs(tmp_path / "configs", OF_SWIN)
        assert "--config has to say what it is" in told(capsys, source, out)
        assert "--config: 'coco' is none of the zoo's" in told(capsys, source, out, "--config", "coco")
        assert "say which" in told(capsys, source, out, "--config", "maskformer2_R50_bs16_90k.yaml")
        assert "nothing.yaml does not exist" in told(capsys, source, out, "--config", "nothing.yaml")
        assert "exists already" in told(capsys, source, tmp_path, "--config", yaml)
        assert "is not a folder" in told(capsys, source, tmp_path / "a" / "b", "--config", yaml)
        assert "does not exist" in told(capsys, tmp_path / "other.pkl", out, "--config", yaml)
        assert "--config is for checkpoint files" in told(capsys, tmp_path, out, "--config", yaml)
        (tmp_path / "theirs").mkdir()
        (tmp_path / "theirs" / "config.json").write_text('{"model_type": "mask2former"}')
        (tmp_path / "theirs" / "model.safetensors").write_bytes(b"")
        sentence = told(capsys, tmp_path / "theirs" / "model.safetensors", out)
        assert f"name its folder, {tmp_path / 'theirs'}, instead" in sentence
        name = "coco/panoptic/maskformer2_R50_bs16_50ep"
        sentence = told(capsys, source, out, "--config", name)
        assert f"does not belong to the configuration {name}" in sentence and "backbone is swin" in sentence
        yaml = configs(
            tmp_path / "configs", OF_SWIN, BASE.replace("my_panoptic_train", "cityscapes_fine_sem_seg_train")
        )
        assert "which --subtask contradicts" in told(capsys, source, out, "--config", yaml, "--subtask", "instance")
        assert not out.exists()


def test_255_is_a_class_where_there_are_more() -> None:
    described = CheckpointDescription("here", "many", "semantic", {}, 300, None, (64, 128))
    assert image_processor(described, small_config(num_labels=300)).ignore_index is None
    assert image_processor(described, small_config(num_labels=200)).ignore_index == 255

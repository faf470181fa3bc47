"""Published models at test size: checkpoints in their publishers' file formats, and tiny members of each family."""

import hashlib
import io
import pickle
import zlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hf_faim2f.conversion.focoos import focoos_state_dict
from hf_faim2f.conversion.mask2former_zoo import weights_of

from hf_faim2f import FaiM2FConfig, FaiM2FForUniversalSegmentation, load_config
from hf_faim2f.family import FAMILY, Preset, presets
from hf_faim2f.family import mask2former as zoo_family
from hf_faim2f.family.mask2former import ZooModel, labels_and_stuff, swin, zoo
from hf_faim2f.family.presets import SEMANTIC, label_keywords
from tests.support.reference_models import checkpoint

TINY = "fai-tiny-ade"
# The smallest member of each architecture. Apart from exactness, the others are only tested by tests marked `large`.
SMALLEST = ("fai-m2f-s-ade", "fai-mf-s-coco-ins", "bisenetformer-s-ade")
SMALL_ARCHITECTURE = {
    "feature_size": 32, "mask_feature_size": 32, "encoder_layers": 1, "encoder_feedforward_dim": 32, "hidden_dim": 32,
    "decoder_layers": 3, "dim_feedforward": 32,
}  # fmt: skip


def mark_large(names: Iterable[str]) -> list[Any]:
    """Test parameters, with those that are not among the smallest marked `large`."""
    return [name if name in SMALLEST else pytest.param(name, marks=pytest.mark.large) for name in names]


def path_of(url: str) -> str:
    """The path of a URL, at which a mirror has the file."""
    return "/" + url.split("/", 3)[3]


def torch_file(state: dict[str, torch.Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": state}, buffer)
    return buffer.getvalue()


def focoos_file(name: str) -> bytes:
    """The reference checkpoint of a published model, in the format that Focoos's training writes."""
    return torch_file(checkpoint(name))


def add_tiny(monkeypatch: pytest.MonkeyPatch) -> Preset:
    """Publishes `TINY` for the duration of a test."""
    config = {
        **SEMANTIC, "backbone_config": {"model_type": "faim2f_stdc", "embedding_size": 8, "depths": [1, 1, 1]},
        "feature_size": 16, "mask_feature_size": 16, "hidden_dim": 32, "decoder_layers": 1, "dim_feedforward": 32,
        "num_queries": 10,
    }  # fmt: skip
    preset = Preset(TINY, "ade20k", 64, "tiny", config)
    published = {"dataset": "ADE20K val", "mIoU": 12.3, "fps_t4_tensorrt_640": 456}
    monkeypatch.setitem(presets._published()["members"], TINY, {"published": published})
    monkeypatch.setitem(FAMILY, TINY, preset)
    return preset


def tiny_file(seed: int = 0) -> bytes:
    """A checkpoint of `TINY`."""
    torch.manual_seed(seed)
    model = FaiM2FForUniversalSegmentation(load_config(TINY))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return torch_file(focoos_state_dict(model))


def shrink_the_zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes all models of the zoo tiny for the duration of a test; names, labels, queries and image sizes stay."""
    for key, value in SMALL_ARCHITECTURE.items():
        monkeypatch.setitem(zoo_family.ARCHITECTURE, key, value)
    for key in zoo_family.BACKBONES:
        monkeypatch.setitem(zoo_family.BACKBONES, key, swin(16, 1, 1, 4, 64))


def zoo_file(model: ZooModel, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A checkpoint in the zoo's format with random weights; sets the model's MD5 accordingly for the duration of the
    test."""
    labels, _ = labels_and_stuff(model.data, model.subtask)
    random = np.random.default_rng(zlib.crc32(model.name.encode()))
    arrays: dict[str, Any] = {}
    for weight in weights_of(FaiM2FConfig(**model.config, **label_keywords(labels))):
        values = random.standard_normal(weight.shape).astype(np.float32)
        arrays[weight.key] = np.abs(values) + 0.5 if weight.key.endswith("running_var") else 0.1 * values
    content = pickle.dumps({"model": arrays, "__author__": "third_party"})
    md5 = hashlib.md5(content).hexdigest()
    monkeypatch.setitem(zoo(), model.name, replace(model, md5=md5[:6]))
    return content

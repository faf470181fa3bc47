"""The reference checkpoints of the original implementation, rebuilt from their seeds, and small models of our own."""

import copy
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hf_faim2f.conversion.focoos import build_model, convert_state_dict, translate_configuration

from hf_faim2f import FaiM2FConfig, FaiM2FForUniversalSegmentation
from tests.reference import recipe

FOLDER = Path(__file__).parents[1] / "reference" / "focoos"
MODELS = [
    "fai-m2f-s-ade",
    "fai-mf-m-ade",
    "fai-mf-l-ade",
    "bisenetformer-s-ade",
    "bisenetformer-m-ade",
    "bisenetformer-l-ade",
    "fai-mf-s-coco-ins",
    "fai-mf-m-coco-ins",
    "fai-mf-l-coco-ins",
]
RELATIVE_ERROR = 1e-4  # relative to the original's outputs
BISENET_VARIANT = "variant-bisenetformer-add-sigmoid"
VARIANTS = ["variant-resnet34c-sigmoid", "variant-stdc-add", BISENET_VARIANT]
# Overrides of `small_config` for the other pixel decoder.
BISENET: dict[str, Any] = {"pixel_decoder_type": "bisenet", "encoder_layers": 0}


@functools.cache
def description(name: str) -> dict[str, Any]:
    """The configuration, keys and shapes, and the statistics of each stage."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def checkpoint(name: str) -> dict[str, torch.Tensor]:
    """The state dict with the original's keys."""
    spec = description(name)
    return {
        key: torch.from_numpy(np.asarray(recipe.tensor(spec["seed"], key, shape))).reshape(shape)
        for key, shape in spec["state_dict"].items()
    }


def outputs(name: str) -> dict[str, torch.Tensor]:
    """The original's outputs for `pixels(name)`."""
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays}


def pixels(name: str) -> torch.Tensor:
    """The reference image, normalized like in the original."""
    spec = description(name)
    image = torch.from_numpy(recipe.image(spec["image_seed"], spec["image_shape"]))
    mean = torch.tensor(spec["config"]["pixel_mean"])[:, None, None]
    return (image - mean) / torch.tensor(spec["config"]["pixel_std"])[:, None, None]


def reference_model(name: str) -> FaiM2FForUniversalSegmentation:
    """A new instance of our model with the reference weights."""
    return copy.deepcopy(_reference_model(name))


@functools.lru_cache(maxsize=3)
def _reference_model(name: str) -> FaiM2FForUniversalSegmentation:
    config = translate_configuration(description(name), name).config
    return build_model(config, convert_state_dict(checkpoint(name), config, name))


def small_config(**overrides: Any) -> FaiM2FConfig:
    """A configuration of 100,000 parameters that has every part of the model."""
    values: dict[str, Any] = {
        "backbone_config": {"model_type": "faim2f_stdc", "embedding_size": 8, "depths": [1, 1, 1]},
        "feature_size": 16,
        "mask_feature_size": 16,
        "encoder_layers": 1,
        "encoder_attention_heads": 4,
        "encoder_feedforward_dim": 32,
        "hidden_dim": 32,
        "decoder_layers": 4,
        "num_attention_heads": 4,
        "dim_feedforward": 32,
        "num_queries": 10,
        "num_labels": 5,
        "train_num_points": 256,
    }
    if "id2label" in overrides:
        del values["num_labels"]
    return FaiM2FConfig(**{**values, **overrides})


def small_model(**overrides: Any) -> FaiM2FForUniversalSegmentation:
    """`small_config` with random weights, and batch norms with non-trivial statistics."""
    torch.manual_seed(0)
    model = FaiM2FForUniversalSegmentation(small_config(**overrides))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def info_file(folder: Path, variant: str = VARIANTS[1], **changes: Any) -> Path:
    """A model_info.json in Focoos's format, by default that of the smallest reference model."""
    spec = description(variant)
    info = {
        "name": "my-model",
        "model_family": spec.get("model_family", "fai_mf"),
        "classes": ["cat", "dog", "bird", "fish"][: spec["config"]["num_classes"]],
        "im_size": 320,
        "task": "semantic_segmentation",
        "config": {**spec["config"], **changes.pop("config", {})},
        **changes,
    }
    path = folder / "model_info.json"
    path.write_text(json.dumps(info))
    return path


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())

"""Small Mask2Former models: transformers' own with weights that all have an effect, and ours with the same layout."""

import json
from pathlib import Path
from typing import Any

import torch
from hf_faim2f.conversion.mask2former import convert_config, convert_state_dict
from torch import nn
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig, SwinConfig
from transformers.utils import logging

from hf_faim2f import FaiM2FForUniversalSegmentation
from tests.support.reference_models import small_model

STAGES = ["stage1", "stage2", "stage3", "stage4"]
KEYS = ("class_queries_logits", "masks_queries_logits")
SWIN = SwinConfig(embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4], window_size=4, out_features=STAGES)
RESNET = ResNetConfig(
    embedding_size=8, hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1], layer_type="basic", out_features=STAGES
)


def tiny(backbone: Any = SWIN, **overrides: Any) -> Mask2FormerForUniversalSegmentation:
    """A small model with weights far from their initial values: nonzero offsets, norms that are not the identity."""
    values = {
        "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 48,
        "dim_feedforward": 40, "encoder_layers": 2, "decoder_layers": 5, "num_attention_heads": 4, "num_queries": 7,
        "num_labels": 3, **overrides,
    }  # fmt: skip
    return lively(Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=backbone.to_dict(), **values)))


def lively(model: Mask2FormerForUniversalSegmentation) -> Mask2FormerForUniversalSegmentation:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sampling_offsets" in name or "attention_weights" in name:
                parameter.normal_(0, 0.3)
            elif "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "queries_" in name or "level_embed" in name:
                parameter.normal_(0, 1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2)
    return model.eval()


def ours_of(theirs: Mask2FormerForUniversalSegmentation) -> FaiM2FForUniversalSegmentation:
    config = convert_config(theirs.config, "instance")
    model = FaiM2FForUniversalSegmentation(config)
    model.load_state_dict(convert_state_dict(theirs.state_dict(), config))
    return model.eval()


def saved(folder: Path, model: Mask2FormerForUniversalSegmentation, **settings: Any) -> Path:
    """Saves a model as transformers does, with the given image processor settings; returns the folder."""
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    values = {"image_processor_type": "Mask2FormerImageProcessor", "size": {"shortest_edge": 64, "longest_edge": 128},
              "size_divisor": 32, "ignore_index": 255, **settings}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder


def small_mask2former(**overrides: Any) -> Any:
    """Our model with the deformable pixel decoder and a ResNet; its configuration does not define stuff classes."""
    backbone = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    return small_model(
        backbone_config=backbone.to_dict(), pixel_decoder_type="deformable", feature_size=32, mask_feature_size=32,
        hidden_dim=32, pre_norm=False, use_level_embedding=True, decoder_layers=1, num_queries=16,
        train_num_points=256, postprocessing_type="panoptic", **overrides,
    )  # fmt: skip

"""Mask2Former as it was published (https://arxiv.org/abs/2112.01527), as new models of it are built here."""

from typing import Any

# The published ResNet-50 is torchvision's, whose bottlenecks have their stride on the 3x3 convolution.
RESNET_50 = {
    "model_type": "resnet",
    "embedding_size": 64,
    "hidden_sizes": [256, 512, 1024, 2048],
    "depths": [3, 4, 6, 3],
    "layer_type": "bottleneck",
    "downsample_in_bottleneck": False,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
# Its configs/.../maskformer2_R50_bs16_90k.yaml and the like, which are one architecture.
ARCHITECTURE: dict[str, Any] = {
    "pixel_decoder_type": "deformable",
    "feature_size": 256,
    "mask_feature_size": 256,
    "encoder_layers": 6,
    "encoder_attention_heads": 8,
    "encoder_feedforward_dim": 1024,
    "encoder_points": 4,
    "hidden_dim": 256,
    "decoder_layers": 9,
    "num_attention_heads": 8,
    "dim_feedforward": 2048,
    "pre_norm": False,
    "use_level_embedding": True,
    "enforce_input_projection": False,
    "num_queries": 100,
    "no_object_weight": 0.1,
    "class_weight": 2.0,
    "mask_weight": 5.0,
    "dice_weight": 5.0,
    "train_num_points": 12544,
    "oversample_ratio": 3.0,
    "importance_sample_ratio": 0.75,
}
# Name: backbone.
MASK2FORMER: dict[str, dict[str, Any]] = {"mask2former-r50": RESNET_50}
# Shorter edge, in pixels, where the recipe names none: that of the published models of COCO.
RESOLUTION = 800


def mask2former_values(name: str) -> dict[str, Any]:
    """Keywords of `FaiM2FConfig` besides labels and post-processing, of one of `MASK2FORMER`."""
    return {**ARCHITECTURE, "backbone_config": dict(MASK2FORMER[name])}

"""FAI-M2F / FAI-MF: fast, accurate image segmentation as a Hugging Face transformers model.

Importing this package registers the model, its configuration and its image processor with transformers' Auto classes.
"""

from .family import load_config
from .model.backbone_stdc import STDCBackbone
from .model.configuration_faim2f import FaiM2FConfig, STDCConfig
from .model.image_processing_faim2f import FaiM2FImageProcessor
from .model.modeling_faim2f import (
    FaiM2FForSemanticSegmentation,
    FaiM2FForSemanticSegmentationOutput,
    FaiM2FForUniversalSegmentation,
    FaiM2FForUniversalSegmentationOutput,
)
from .moved import keep_old_paths
from .version import __version__

keep_old_paths()

__all__ = [
    "FaiM2FConfig",
    "FaiM2FForSemanticSegmentation",
    "FaiM2FForSemanticSegmentationOutput",
    "FaiM2FForUniversalSegmentation",
    "FaiM2FForUniversalSegmentationOutput",
    "FaiM2FImageProcessor",
    "STDCBackbone",
    "STDCConfig",
    "__version__",
    "load_config",
]

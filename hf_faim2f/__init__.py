"""FAI-M2F / FAI-MF: fast, accurate image segmentation as a Hugging Face transformers model.

Importing this package registers the model, its configuration and its image processor with transformers' Auto classes.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from .runtime import Prediction, Predictor

# Imported lazily, so that importing the package stays fast.
_LAZY = {"Prediction": "runtime", "Predictor": "runtime"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


__all__ = [
    "FaiM2FConfig",
    "FaiM2FForSemanticSegmentation",
    "FaiM2FForSemanticSegmentationOutput",
    "FaiM2FForUniversalSegmentation",
    "FaiM2FForUniversalSegmentationOutput",
    "FaiM2FImageProcessor",
    "Prediction",
    "Predictor",
    "STDCBackbone",
    "STDCConfig",
    "__version__",
    "load_config",
]

"""The published models: configurations, labels, published metrics, where the weights are."""

from .datasets import DATASETS, Dataset
from .presets import ALIASES, FAMILY, Preset, find_preset, load_config, load_labels, published_peers

__all__ = [
    "ALIASES",
    "DATASETS",
    "FAMILY",
    "Dataset",
    "Preset",
    "find_preset",
    "load_config",
    "load_labels",
    "published_peers",
]

"""The published models: configurations, labels, metrics, and where to get the weights."""

from .presets import ALIASES, DATASETS, FAMILY, Dataset, Preset, find_preset, load_config, load_labels, published_peers

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

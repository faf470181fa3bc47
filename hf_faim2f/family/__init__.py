"""The published models: configurations, labels, published metrics, where the weights are."""

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

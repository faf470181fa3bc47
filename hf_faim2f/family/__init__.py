"""The published models: configurations, labels, published metrics, where the weights are."""

from .presets import ALIASES, FAMILY, Preset, find_preset, load_config, load_labels, published_peers

__all__ = ["ALIASES", "FAMILY", "Preset", "find_preset", "load_config", "load_labels", "published_peers"]

"""The names of weights in transformers' Mask2Former and in this package's deformable model, for both directions."""

import re
from collections.abc import Iterable, Mapping

import torch

from hf_faim2f.errors import ConversionError

from .converted_model import NUM_LEVELS, check_weight

# transformers' names and ours: `#` is a number, `*` any ending; both stand in the same order on both sides.
# The backbone's own names are the same.
NAMES = (
    ("model.pixel_level_module.encoder.*", "backbone.*"),
    ("model.pixel_level_module.decoder.input_projections.#.0.*", "pixel_decoder.input_projections.#.convolution.*"),
    ("model.pixel_level_module.decoder.input_projections.#.1.*", "pixel_decoder.input_projections.#.normalization.*"),
    ("model.pixel_level_module.decoder.level_embed", "pixel_decoder.level_embedding.weight"),
    (
        "model.pixel_level_module.decoder.encoder.layers.#.self_attn.*",
        "pixel_decoder.encoder_layers.#.attention.*",
    ),
    (
        "model.pixel_level_module.decoder.encoder.layers.#.self_attn_layer_norm.*",
        "pixel_decoder.encoder_layers.#.attention_norm.*",
    ),
    ("model.pixel_level_module.decoder.encoder.layers.#.fc#.*", "pixel_decoder.encoder_layers.#.linear#.*"),
    (
        "model.pixel_level_module.decoder.encoder.layers.#.final_layer_norm.*",
        "pixel_decoder.encoder_layers.#.feed_forward_norm.*",
    ),
    # The level of stride 4, which the deformable layers do not use.
    ("model.pixel_level_module.decoder.adapter_1.0.*", "pixel_decoder.lateral_convolutions.0.convolution.*"),
    ("model.pixel_level_module.decoder.adapter_1.1.*", "pixel_decoder.lateral_convolutions.0.normalization.*"),
    ("model.pixel_level_module.decoder.layer_1.0.*", "pixel_decoder.output_convolutions.0.convolution.*"),
    ("model.pixel_level_module.decoder.layer_1.1.*", "pixel_decoder.output_convolutions.0.normalization.*"),
    ("model.pixel_level_module.decoder.mask_projection.*", "pixel_decoder.mask_projection.*"),
    ("model.transformer_module.queries_embedder.weight", "transformer_decoder.query_position.weight"),
    ("model.transformer_module.queries_features.weight", "transformer_decoder.query_features.weight"),
    ("model.transformer_module.input_projections.#.*", "transformer_decoder.input_projections.#.*"),
    ("model.transformer_module.level_embed.weight", "transformer_decoder.level_embedding.weight"),
    ("model.transformer_module.decoder.layers.#.self_attn.*", "transformer_decoder.layers.#.self_attention.*"),
    (
        "model.transformer_module.decoder.layers.#.self_attn_layer_norm.*",
        "transformer_decoder.layers.#.self_attention_norm.*",
    ),
    (
        "model.transformer_module.decoder.layers.#.cross_attn.out_proj.*",
        "transformer_decoder.layers.#.cross_attention.out_proj.*",
    ),
    # Query, key and value in one tensor, which is three here: see `_split` and `_packed`.
    (
        "model.transformer_module.decoder.layers.#.cross_attn.in_proj_*",
        "transformer_decoder.layers.#.cross_attention.qkv_proj.*",
    ),
    (
        "model.transformer_module.decoder.layers.#.cross_attn_layer_norm.*",
        "transformer_decoder.layers.#.cross_attention_norm.*",
    ),
    ("model.transformer_module.decoder.layers.#.fc#.*", "transformer_decoder.layers.#.linear#.*"),
    (
        "model.transformer_module.decoder.layers.#.final_layer_norm.*",
        "transformer_decoder.layers.#.feed_forward_norm.*",
    ),
    ("model.transformer_module.decoder.layernorm.*", "transformer_decoder.norm.*"),
    (
        "model.transformer_module.decoder.mask_predictor.mask_embedder.#.0.*",
        "transformer_decoder.mask_embedder.layers.#.*",
    ),
    ("class_predictor.*", "transformer_decoder.class_predictor.*"),
)
# The loss's class weights, which are derived from the configuration.
DERIVED = "criterion."
PACKED = re.compile(r"(.*\.cross_attention\.)qkv_proj\.(weight|bias)")
QUERY = re.compile(r"(.*\.cross_attention\.)q_proj\.(weight|bias)")


def _compiled(pairs: Iterable[tuple[str, str]]) -> list[tuple[re.Pattern[str], str]]:
    """Patterns of the first names, and templates of the second."""
    return [
        (re.compile(re.escape(name).replace(r"\#", r"(\d+)").replace(r"\*", "(.*)")), re.sub("[#*]", "{}", other))
        for name, other in pairs
    ]


OURS = _compiled(NAMES)
THEIRS = _compiled((ours, theirs) for theirs, ours in NAMES)


def _renamed(weights: Mapping[str, torch.Tensor], names: list[tuple[re.Pattern[str], str]]) -> dict[str, torch.Tensor]:
    renamed: dict[str, torch.Tensor] = {}
    for key, tensor in weights.items():
        found = next((other.format(*match.groups()) for name, other in names if (match := name.fullmatch(key))), None)
        if found is None:
            raise ConversionError(f"the weights have the key {key!r}, which has no place in this model.")
        renamed[found] = tensor
    return renamed


def _split(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights in which each packed projection is replaced by those of query, key and value."""
    split: dict[str, torch.Tensor] = {}
    for key, tensor in weights.items():
        if match := PACKED.fullmatch(key):
            parts = zip("qkv", tensor.chunk(3), strict=True)
            split.update({f"{match[1]}{name}_proj.{match[2]}": part for name, part in parts})
        else:
            split[key] = tensor
    return split


def _packed(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The opposite of `_split`."""
    packed = dict(weights)
    for match in filter(None, map(QUERY.fullmatch, weights)):
        parts = [packed.pop(f"{match[1]}{name}_proj.{match[2]}") for name in "qkv"]
        packed[f"{match[1]}qkv_proj.{match[2]}"] = torch.cat(parts)
    return packed


def to_our_names(theirs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A Mask2Former's weights by this package's names.

    Raises:
        ConversionError: an unknown key, or a value that is not finite.
    """
    kept = {key: tensor for key, tensor in theirs.items() if not key.startswith(DERIVED)}
    renamed = _renamed(kept, OURS)
    for key, tensor in kept.items():
        if tensor.is_floating_point():  # the counters of batch norms are not
            check_weight(key, tensor, "the weights")
    return _split(renamed)


def to_their_names(ours: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A deformable model's weights by transformers' names, without the loss's class weights.

    Embeddings and projections of levels that a decoder of one or two layers never reads are zeros.

    Raises:
        ConversionError: an unknown key.
    """
    weights = _packed(ours)
    embedding = weights["transformer_decoder.level_embedding.weight"]
    levels = len(embedding)
    weights["transformer_decoder.level_embedding.weight"] = torch.cat(
        [embedding, embedding.new_zeros(NUM_LEVELS - levels, embedding.shape[1])]
    )
    for level in range(levels, NUM_LEVELS):
        for part in ("weight", "bias"):
            first = weights.get(f"transformer_decoder.input_projections.0.{part}")
            if first is not None:
                weights[f"transformer_decoder.input_projections.{level}.{part}"] = torch.zeros_like(first)
    return _renamed(weights, THEIRS)


__all__ = ["DERIVED", "to_our_names", "to_their_names"]

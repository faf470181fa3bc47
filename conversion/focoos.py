"""Converts Focoos's checkpoints to this package's weights and back, and writes Hub folders."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from hf_faim2f.errors import ConversionError
from hf_faim2f.family import FAMILY, load_config
from hf_faim2f.files import check_new_folder, sha256_of
from hf_faim2f.hub.card import Provenance
from hf_faim2f.model.configuration_faim2f import FaiM2FConfig
from hf_faim2f.model.modeling_faim2f import FaiM2FForUniversalSegmentation

from .focoos_config import read_info, translate_configuration
from .weights import ConvertedModel, check_keys, check_weight, read_state_dict, write_model_folder


def convert(checkpoint: Path, out_dir: Path, info: str, published: bool = False) -> ConvertedModel:
    """Converts a Focoos checkpoint and writes a complete Hub repository to `out_dir` atomically.

    Args:
        checkpoint: `.pth` or `.safetensors`; untrusted.
        out_dir: a folder that does not exist yet.
        info: the name of a published model, or the path of a `model_info.json`.
        published: the checkpoint was downloaded as that of the published model `info`, and so has its figures on the
            model card. Any other file may be of that architecture, but its weights are not known.

    Raises:
        ConversionError: the checkpoint cannot be converted; nothing is left behind.
    """
    check_new_folder(out_dir, ConversionError)
    described = read_info(info)
    state = read_state_dict(checkpoint, described.notes)
    model = build_model(described.config, convert_state_dict(state, described.config, str(checkpoint)))
    name, digest = described.name, sha256_of(checkpoint)
    published = published or (name in FAMILY and digest == FAMILY[name].sha256)
    is_member = name in FAMILY and described.config.to_dict() == load_config(name).to_dict()
    provenance = Provenance(
        checkpoint.name,
        digest,
        described.started_from,
        model=name if is_member and not published else None,
        published=published,
    )
    write_model_folder(out_dir, name, model, described.processor, provenance)
    return ConvertedModel(name, described.notes)


def build_model(config: FaiM2FConfig, state: dict[str, torch.Tensor]) -> FaiM2FForUniversalSegmentation:
    """Builds the model with converted weights, in evaluation mode, without initializing it first."""
    with torch.device("meta"):
        model = FaiM2FForUniversalSegmentation(config)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


@dataclass(frozen=True)
class Source:
    """The source of a tensor: a Focoos key, and which third of it (query, key, value) if that tensor is packed."""

    key: str
    third: int | None = None


# Our keys as regular expressions, and Focoos's keys as replacements. The first rule that matches the full key applies.
KEY_RULES = [
    (r"backbone\.stem\.(convolution|normalization)\.(.+)", r"pixel_decoder.backbone.features.0.<\1>.\2"),
    (r"backbone\.stages\.0\.(convolution|normalization)\.(.+)", r"pixel_decoder.backbone.features.1.<\1>.\2"),
    (r"backbone\.last_convolution\.(convolution|normalization)\.(.+)", r"pixel_decoder.backbone.conv_last.<\1>.\2"),
    (r"pixel_decoder\.input_projection\.(.+)", r"pixel_decoder.input_proj.\1"),
    (r"pixel_decoder\.encoder_norm\.(.+)", r"pixel_decoder.transformer.encoder.norm.\1"),
    (r"pixel_decoder\.encoder_layers\.(\d+)\.self_attention\.(.+)",
     r"pixel_decoder.transformer.encoder.layers.\1.self_attn.\2"),
    (r"pixel_decoder\.encoder_layers\.(\d+)\.self_attention_norm\.(.+)",
     r"pixel_decoder.transformer.encoder.layers.\1.norm1.\2"),
    (r"pixel_decoder\.encoder_layers\.(\d+)\.feed_forward_norm\.(.+)",
     r"pixel_decoder.transformer.encoder.layers.\1.norm2.\2"),
    (r"pixel_decoder\.encoder_layers\.(\d+)\.(linear[12]\..+)", r"pixel_decoder.transformer.encoder.layers.\1.\2"),
    (r"pixel_decoder\.mask_projection\.(.+)", r"pixel_decoder.mask_features.\1"),
    (r"transformer_decoder\.query_features\.weight", r"head.predictor.query_feat.weight"),
    (r"transformer_decoder\.query_position\.weight", r"head.predictor.query_embed.weight"),
    (r"transformer_decoder\.input_projections\.(.+)", r"head.predictor.input_proj.\1"),
    (r"transformer_decoder\.norm\.(.+)", r"head.predictor.forward_prediction_heads.decoder_norm.\1"),
    (r"transformer_decoder\.class_predictor\.(.+)", r"head.predictor.forward_prediction_heads.classifier.\1"),
    (r"transformer_decoder\.mask_embedder\.(.+)", r"head.predictor.forward_prediction_heads.mask_classifier.\1"),
    (r"transformer_decoder\.layers\.(\d+)\.cross_attention\.(.+)",
     r"head.predictor.transformer_cross_attention_layers.\1.multihead_attn.\2"),
    (r"transformer_decoder\.layers\.(\d+)\.cross_attention_norm\.(.+)",
     r"head.predictor.transformer_cross_attention_layers.\1.norm.\2"),
    (r"transformer_decoder\.layers\.(\d+)\.self_attention\.(.+)",
     r"head.predictor.transformer_self_attention_layers.\1.self_attn.\2"),
    (r"transformer_decoder\.layers\.(\d+)\.self_attention_norm\.(.+)",
     r"head.predictor.transformer_self_attention_layers.\1.norm.\2"),
    (r"transformer_decoder\.layers\.(\d+)\.feed_forward_norm\.(.+)",
     r"head.predictor.transformer_ffn_layers.\1.norm.\2"),
    (r"transformer_decoder\.layers\.(\d+)\.(linear[12]\..+)", r"head.predictor.transformer_ffn_layers.\1.\2"),
]  # fmt: skip
# The same for the pixel decoder of BiSeNetFormer.
BISENET_RULES = [
    (r"pixel_decoder\.global_context\.(convolution|normalization)\.(.+)", r"pixel_decoder.cp.conv_avg.<\1>.\2"),
    (r"pixel_decoder\.refinements\.(\d)\.projection\.(.+)", r"pixel_decoder.cp.arm<\1>.proj.\2"),
    (r"pixel_decoder\.refinements\.(\d)\.convolution\.(convolution|normalization)\.(.+)",
     r"pixel_decoder.cp.arm<\1>.conv.<\2>.\3"),
    (r"pixel_decoder\.refinements\.(\d)\.attention\.(convolution|normalization)\.(.+)",
     r"pixel_decoder.cp.arm<\1>.<\2>_atten.\3"),
    (r"pixel_decoder\.upsampling_convolutions\.(\d)\.(convolution|normalization)\.(.+)",
     r"pixel_decoder.cp.conv_head<\1>.<\2>.\3"),
    (r"pixel_decoder\.fusion\.spatial_projection\.(.+)", r"pixel_decoder.ffm.proj1.\1"),
    (r"pixel_decoder\.fusion\.context_projection\.(.+)", r"pixel_decoder.ffm.proj2.\1"),
    (r"pixel_decoder\.fusion\.convolution\.(convolution|normalization)\.(.+)",
     r"pixel_decoder.ffm.convblk.<\1>.\2"),
    (r"pixel_decoder\.fusion\.squeeze\.(.+)", r"pixel_decoder.ffm.conv1.\1"),
    (r"pixel_decoder\.fusion\.excite\.(.+)", r"pixel_decoder.ffm.conv2.\1"),
    (r"pixel_decoder\.mask_projection\.(convolution|normalization)\.(.+)", r"pixel_decoder.conv_out.<\1>.\2"),
]  # fmt: skip
# Values of the placeholders in angle brackets: parts of our names, and Focoos's. We number the context path's levels
# from coarse to fine; Focoos names them after their strides.
PARTS = {"<convolution>": "conv", "<normalization>": "bn", "<0>": "32", "<1>": "16"}
# A buffer of Focoos's loss. It is derived from the configuration, so it is not converted.
LOSS_BUFFER = "head.criterion.empty_weight"
THIRDS = {"q_proj": 0, "k_proj": 1, "v_proj": 2}


def _stdc_key(key: str, depths: list[int]) -> str | None:
    """The Focoos key of a tensor in an STDC block. In Focoos, one list has two strided convolutions and all blocks."""
    match = re.fullmatch(r"backbone\.stages\.([123])\.(\d+)\.(.+)", key)
    if match is None:
        return None
    stage, block, rest = int(match[1]), int(match[2]), match[3]
    prefix = f"pixel_decoder.backbone.features.{2 + sum(depths[: stage - 1]) + block}."
    for ours, theirs in (
        (r"convolutions\.(\d+)\.convolution\.(.+)", r"conv_list.\1.conv.\2"),
        (r"convolutions\.(\d+)\.normalization\.(.+)", r"conv_list.\1.bn.\2"),
        (r"downsample\.convolution\.(.+)", r"avd_layer.0.\1"),
        (r"downsample\.normalization\.(.+)", r"avd_layer.1.\1"),
        (r"projection\.downsample\.convolution\.(.+)", r"skip.0.\1"),
        (r"projection\.downsample\.normalization\.(.+)", r"skip.1.\1"),
        (r"projection\.convolution\.(.+)", r"skip.2.\1"),
        (r"projection\.normalization\.(.+)", r"skip.3.\1"),
    ):
        if re.fullmatch(ours, rest):
            return prefix + re.sub(ours, theirs, rest)
    return None


def _resnet_key(key: str) -> str | None:
    """The Focoos key of a ResNet's tensor. Focoos uses RT-DETR's original names, we use those of transformers."""
    norm = {"convolution": "conv", "normalization": "norm"}
    match = re.fullmatch(r"backbone\.embedder\.embedder\.(\d+)\.(convolution|normalization)\.(.+)", key)
    if match:
        return f"pixel_decoder.backbone.conv1.conv1_{int(match[1]) + 1}.{norm[match[2]]}.{match[3]}"
    match = re.fullmatch(r"backbone\.encoder\.stages\.(\d+)\.layers\.(\d+)\.(.+)", key)
    if match is None:
        return None
    prefix, rest = f"pixel_decoder.backbone.res_layers.{match[1]}.blocks.{match[2]}.", match[3]
    match = re.fullmatch(r"layer\.(\d)\.(convolution|normalization)\.(.+)", rest)
    if match:
        return f"{prefix}branch2{'abc'[int(match[1])]}.{norm[match[2]]}.{match[3]}"
    match = re.fullmatch(r"shortcut\.(1\.)?(convolution|normalization)\.(.+)", rest)
    if match:  # after a pooling layer, the projection is one level deeper
        return f"{prefix}short.{'conv.' if match[1] else ''}{norm[match[2]]}.{match[3]}"
    return None


def focoos_source(key: str, config: FaiM2FConfig) -> Source:
    """The source, in a Focoos state dict, of the tensor that is called `key` in this package.

    Raises:
        KeyError: no rule matches the key.
    """
    backbone = config.backbone_config
    found = None
    if key.startswith("backbone."):
        found = _stdc_key(key, backbone.depths) if backbone.model_type == "faim2f_stdc" else _resnet_key(key)
    match = re.fullmatch(r"pixel_decoder\.(lateral|output)_convolutions\.(\d+)\.(convolution|normalization)\.(.+)", key)
    if match:  # ours run from coarse to fine, the coarsest without a lateral; Focoos numbers levels from fine to coarse
        level = 4 - int(match[2]) - (match[1] == "lateral")
        name = f"{'adapter' if match[1] == 'lateral' else 'layer'}_{level}"
        found = f"pixel_decoder.{name}.{'' if match[3] == 'convolution' else 'norm.'}{match[4]}"
    rules = [*BISENET_RULES, *KEY_RULES] if config.pixel_decoder_type == "bisenet" else KEY_RULES
    for ours, theirs in rules if found is None else []:
        if re.fullmatch(ours, key):
            found = re.sub(ours, theirs, key)
            for part, name in PARTS.items():
                found = found.replace(part, name)
            break
    if found is None:
        raise KeyError(key)
    for projection, third in THIRDS.items():
        if f".{projection}." in found:
            return Source(found.replace(f".{projection}.", ".in_proj_"), third)
    return Source(found)


def expected_shapes(model: torch.nn.Module, config: FaiM2FConfig) -> dict[str, tuple[int, ...]]:
    """The keys and shapes of a Focoos state dict with this configuration."""
    shapes: dict[str, tuple[int, ...]] = {LOSS_BUFFER: (config.num_labels + 1,)}
    for key, tensor in model.state_dict().items():
        source = focoos_source(key, config)
        shape = tuple(tensor.shape)
        shapes[source.key] = shape if source.third is None else (3 * shape[0], *shape[1:])
    return shapes


def _is_optional(key: str) -> bool:
    # A frozen batch norm has no counter, and Focoos sometimes saves the network without its loss.
    return key == LOSS_BUFFER or key.endswith("num_batches_tracked")


def convert_state_dict(
    state: dict[str, torch.Tensor], config: FaiM2FConfig, where: str = "the checkpoint"
) -> dict[str, torch.Tensor]:
    """Converts a Focoos state dict to this package's names, in float32.

    Args:
        state: tensors by Focoos's keys, in any floating-point dtype.
        config: the configuration that keys and shapes must match.
        where: name of the checkpoint for error messages.

    Raises:
        ConversionError: a missing or unexpected key, a wrong shape or dtype, or an invalid value.
    """
    with torch.device("meta"):
        model = FaiM2FForUniversalSegmentation(config)
    expected = expected_shapes(model, config)
    check_keys(
        [key for key in expected if key not in state and not _is_optional(key)],
        [key for key in state if key not in expected],
        where,
        "the checkpoint and the configuration given by --info do not match; give the model_info.json that was saved "
        "beside it.",
    )
    for key, shape in expected.items():
        if key in state and tuple(state[key].shape) != shape:
            raise ConversionError(
                f"{where}: {key!r} has the shape {tuple(state[key].shape)} where the configuration given by --info "
                f"(num_classes = {config.num_labels}, num_queries = {config.num_queries}) needs {shape}."
            )
    for key, tensor in state.items():
        if not key.endswith("num_batches_tracked"):
            check_weight(key, tensor, where)
    converted = {}
    for key, target in model.state_dict().items():
        source = focoos_source(key, config)
        if source.key not in state:
            tensor = torch.zeros((), dtype=torch.long)
        elif source.third is None:
            tensor = state[source.key]
        else:
            tensor = state[source.key].chunk(3)[source.third]
        converted[key] = tensor.detach().to(target.dtype).contiguous().clone()
    return converted


def focoos_state_dict(model: FaiM2FForUniversalSegmentation) -> dict[str, torch.Tensor]:
    """Converts a model's weights back to Focoos's names, for use with Focoos's own library."""
    parts: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for key, tensor in model.state_dict().items():
        source = focoos_source(key, model.config)
        parts.setdefault(source.key, []).append((source.third or 0, tensor.detach().cpu()))
    state = {
        key: torch.cat([tensor for _, tensor in sorted(tensors, key=lambda part: part[0])])
        if len(tensors) > 1
        else tensors[0][1]
        for key, tensors in parts.items()
    }
    weight = torch.ones(model.config.num_labels + 1)
    weight[-1] = model.config.no_object_weight
    return {**state, LOSS_BUFFER: weight}


__all__ = [
    "build_model",
    "convert",
    "convert_state_dict",
    "expected_shapes",
    "focoos_state_dict",
    "read_info",
    "translate_configuration",
]

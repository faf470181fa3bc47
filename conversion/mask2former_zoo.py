"""Checkpoints of Mask2Former's own repository (detectron2): their configuration and weights in our names.

They hold weights alone. What a model was trained for, how large its images were and how many heads its attentions have
is told by one of the zoo's configurations, by name, or by a YAML of detectron2; what weights do tell (widths, depths,
windows, queries, classes) is read from them, and the two must agree.
"""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from hf_faim2f.errors import ConversionError
from hf_faim2f.family.mask2former import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    STAGES,
    TRAINING_SETS,
    ZooModel,
    find_zoo_model,
    labels_and_stuff,
    zoo,
    zoo_model_of,
)
from hf_faim2f.files import check_new_folder, new_folder
from hf_faim2f.hub.card import Provenance, model_card
from hf_faim2f.model.configuration_faim2f import FaiM2FConfig
from hf_faim2f.model.image_processing_faim2f import FaiM2FImageProcessor
from hf_faim2f.model.modeling_faim2f import FaiM2FForUniversalSegmentation

from .array_pickle import read_array_pickle
from .checkpoint import read_state_dict
from .detectron2_config import read_settings

SUFFIXES = (".pkl", ".pth", ".pt", ".safetensors")
RESNET_DEPTHS = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}
# Both norms are the same in a model that only answers; they differ in what training does with them.
NORMS = ("FrozenBN", "BN", "SyncBN", "nnSyncBN", "naiveSyncBN")
# Buffers of the loss and of the preprocessing, which come from the configuration; ours do too.
OF_THE_CONFIGURATION = ("criterion.empty_weight", "pixel_mean", "pixel_std")
PIXEL_DECODER, PREDICTOR = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."
ENCODER_POINTS = 4  # of each level that a head looks at; the original has no setting that its code reads
NUM_LEVELS = 3
# A window costs the fourth power of its side in memory, of which the weights have but the second.
LARGEST_WINDOW = 32


@dataclass
class Configuration:
    """What is known of a checkpoint besides its weights.

    Args:
        where: what to call it in errors.
        name: what the model is called.
        subtask: "semantic", "instance" or "panoptic".
        config: keywords of `FaiM2FConfig` besides labels and post-processing.
        num_labels: number of classes.
        data: whose labels they are, one of the zoo's data sets; None for unknown ones, which get numbers.
        size: (shorter edge, longest edge) of images, in pixels.
        mean, std: of pixels in 0..255, RGB.
        notes: sentences for the user.
    """

    where: str
    name: str
    subtask: str
    config: dict[str, Any]
    num_labels: int
    data: str | None
    size: tuple[int, int]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Weight:
    """One tensor of the zoo's format.

    Args:
        key: its name there.
        shape: its shape there.
        ours: its name here; of three, each is a third of it (query, key, value).
    """

    key: str
    shape: tuple[int, ...]
    ours: tuple[str, ...]


@dataclass
class ZooConversion:
    """What was converted: its name, and sentences for the user."""

    name: str
    notes: list[str] = field(default_factory=list)


def is_zoo_checkpoint(source: str) -> bool:
    """Whether this names a checkpoint file, and no folder or Hub id of transformers."""
    path = Path(source)
    return path.is_file() or (path.suffix in SUFFIXES and not path.is_dir())


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint by the names that the zoo's newest format has for them.

    Args:
        path: a pickle of arrays, such as the zoo publishes, or what torch or safetensors saved; untrusted.

    Raises:
        ConversionError: the file is missing, truncated, of another kind, or holds more than tensors and containers.
    """
    if not path.is_file():
        raise ConversionError(f"{path} does not exist; name a checkpoint of Mask2Former (.pkl or .pth).")
    with path.open("rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"
    if is_archive or path.suffix == ".safetensors":
        state = read_state_dict(path)
    else:
        state = _tensors(_arrays(read_array_pickle(path), path), path)
    # A tensor may be a view, of one number even, and many may be views of one.
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if claimed > path.stat().st_size:
        raise ConversionError(f"{path}: its tensors have {claimed} bytes, more than the file; refused as forged.")
    return {_newest_name(key): tensor for key, tensor in state.items()}


def _arrays(content: Any, path: Path) -> dict[str, np.ndarray]:
    arrays = content["model"] if isinstance(content, dict) and isinstance(content.get("model"), dict) else content
    if not isinstance(arrays, dict):
        raise ConversionError(
            f"{path} holds a {type(content).__name__} where a dictionary of arrays was expected, bare or under the key "
            "'model'."
        )
    if not arrays:
        raise ConversionError(f"{path} holds no weights; there is nothing to convert.")
    for key, value in arrays.items():
        if not isinstance(key, str) or not isinstance(value, np.ndarray):
            found = ", ".join(repr(name)[:60] for name in list(arrays)[:5])
            raise ConversionError(
                f"{path}: the entry {key!r} is no array ({type(value).__name__}); a dictionary of arrays was expected, "
                f"bare or under the key 'model' (found the keys {found})."
            )
    return arrays


def _tensors(arrays: dict[str, np.ndarray], path: Path) -> dict[str, torch.Tensor]:
    # The total is known before anything is copied: arrays are views, and can share their bytes.
    claimed = sum(array.nbytes for array in arrays.values())
    if claimed > path.stat().st_size:
        raise ConversionError(f"{path}: its arrays have {claimed} bytes, more than the file; refused as forged.")
    return {key: torch.from_numpy(array.astype(array.dtype.newbyteorder("="))) for key, array in arrays.items()}


def _newest_name(key: str) -> str:
    """Mask2Former's code renames what its first versions saved; see the `_load_from_state_dict`s of its heads."""
    head = "sem_seg_head."
    if key.startswith(head) and not key.startswith((PIXEL_DECODER, PREDICTOR)):
        key = PIXEL_DECODER + key.removeprefix(head)
    return key.replace("static_query", "query_feat")


def published_configuration(model: ZooModel) -> Configuration:
    """What the zoo says of one of its models."""
    labels, _ = labels_and_stuff(model.data, model.subtask)
    return Configuration(
        f"the configuration {model.name}", f"mask2former-{model.name.replace('/', '-')}", model.subtask, model.config,
        len(labels), model.data, model.size,
    )  # fmt: skip


def yaml_configuration(path: Path, subtask: str | None = None) -> Configuration:
    """What a YAML of detectron2 says.

    Args:
        subtask: what the weights were trained for, where the data's name does not say it.

    Raises:
        ConversionError: it cannot be read or honoured.
    """
    settings = read_settings(path)
    head, former = "MODEL.SEM_SEG_HEAD.", "MODEL.MASK_FORMER."
    weights = {name: settings[f"{former}{name.upper()}"] for name in ("class_weight", "mask_weight", "dice_weight")}
    config = {
        "pixel_decoder_type": "deformable",
        "backbone_config": _backbone_of(settings, str(path)),
        "feature_size": settings[f"{head}CONVS_DIM"],
        "mask_feature_size": settings[f"{head}MASK_DIM"],
        "encoder_layers": settings[f"{head}TRANSFORMER_ENC_LAYERS"],
        "encoder_attention_heads": settings[f"{former}NHEADS"],
        "encoder_dropout": settings[f"{former}DROPOUT"],
        "encoder_points": ENCODER_POINTS,
        "hidden_dim": settings[f"{former}HIDDEN_DIM"],
        "decoder_layers": settings[f"{former}DEC_LAYERS"] - 1,  # the original counts the loss on the learned queries
        "num_attention_heads": settings[f"{former}NHEADS"],
        "dim_feedforward": settings[f"{former}DIM_FEEDFORWARD"],
        "pre_norm": settings[f"{former}PRE_NORM"],
        "use_level_embedding": True,
        "enforce_input_projection": settings[f"{former}ENFORCE_INPUT_PROJ"],
        "num_queries": settings[f"{former}NUM_OBJECT_QUERIES"],
        "no_object_weight": settings[f"{former}NO_OBJECT_WEIGHT"],
        **weights,
        **{name.replace("weight", "cost"): value for name, value in weights.items()},
        "train_num_points": settings[f"{former}TRAIN_NUM_POINTS"],
        "oversample_ratio": settings[f"{former}OVERSAMPLE_RATIO"],
        "importance_sample_ratio": settings[f"{former}IMPORTANCE_SAMPLE_RATIO"],
        "use_auxiliary_loss": settings[f"{former}DEEP_SUPERVISION"],
        "top_k": settings["TEST.DETECTIONS_PER_IMAGE"],
        "ignore_value": settings[f"{head}IGNORE_VALUE"],
    }
    if settings["MODEL.BACKBONE.NAME"] == "build_resnet_backbone":
        config["backbone_freeze_norm"] = settings["MODEL.RESNETS.NORM"] == "FrozenBN"
        config["backbone_freeze_at"] = settings["MODEL.BACKBONE.FREEZE_AT"] - 1  # detectron2 counts the stem as one
    trained_on = next(iter(settings["DATASETS.TRAIN"]), "")
    data, told = TRAINING_SETS.get(trained_on, (None, _subtask_of(trained_on, settings)))
    if data is not None and subtask not in (None, told):
        raise ConversionError(f"{path} is for {told} segmentation (DATASETS.TRAIN), which --subtask contradicts.")
    subtask = subtask or told
    count = settings[f"{head}NUM_CLASSES"]
    notes = []
    if data is not None and len(labels_and_stuff(data, subtask)[0]) != count:
        data = None
    if data is None:
        notes.append(
            f"the names of the {count} classes of {trained_on or 'the training data'} are not known: they are numbers"
            + (", and none of them is taken for stuff" if subtask == "panoptic" else "")
        )
    size = (settings["INPUT.MIN_SIZE_TEST"], settings["INPUT.MAX_SIZE_TEST"])
    return Configuration(
        str(path), path.stem, subtask, config, count, data, size, tuple(settings["MODEL.PIXEL_MEAN"]),
        tuple(settings["MODEL.PIXEL_STD"]), notes,
    )  # fmt: skip


def _subtask_of(trained_on: str, settings: dict[str, Any]) -> str:
    """What unknown data are for: by their name, or, as panoptic models answer all, by what is evaluated."""
    for word, subtask in (("panoptic", "panoptic"), ("instance", "instance"), ("sem_seg", "semantic")):
        if word in trained_on:
            return subtask
    for subtask in ("panoptic", "instance"):
        if settings[f"MODEL.MASK_FORMER.TEST.{subtask.upper()}_ON"]:
            return subtask
    return "semantic"


def _backbone_of(settings: dict[str, Any], where: str) -> dict[str, Any]:
    kind = settings["MODEL.BACKBONE.NAME"]
    if kind == "D2SwinTransformer":
        swin = {key.removeprefix("MODEL.SWIN."): value for key, value in settings.items() if "SWIN" in key}
        if len(swin["DEPTHS"]) != 4 or len(swin["NUM_HEADS"]) != 4:
            raise ConversionError(f"{where}: MODEL.SWIN must have four DEPTHS and four NUM_HEADS.")
        return {
            "model_type": "swin",
            "image_size": swin["PRETRAIN_IMG_SIZE"],
            "embed_dim": swin["EMBED_DIM"],
            "depths": swin["DEPTHS"],
            "num_heads": swin["NUM_HEADS"],
            "window_size": swin["WINDOW_SIZE"],
            "mlp_ratio": swin["MLP_RATIO"],
            "hidden_dropout_prob": swin["DROP_RATE"],
            "attention_probs_dropout_prob": swin["ATTN_DROP_RATE"],
            "drop_path_rate": swin["DROP_PATH_RATE"],
            "out_features": STAGES,
        }
    if kind != "build_resnet_backbone":
        raise ConversionError(
            f"{where}: MODEL.BACKBONE.NAME is {kind!r}, and only D2SwinTransformer and build_resnet_backbone can be "
            "converted."
        )
    resnet = {key.removeprefix("MODEL.RESNETS."): value for key, value in settings.items() if "RESNETS" in key}
    depth, width = resnet["DEPTH"], resnet["RES2_OUT_CHANNELS"]
    if depth not in RESNET_DEPTHS:
        raise ConversionError(f"{where}: MODEL.RESNETS.DEPTH is {depth}; there are {list(RESNET_DEPTHS)}.")
    if resnet["NORM"] not in NORMS:
        raise ConversionError(f"{where}: MODEL.RESNETS.NORM is {resnet['NORM']!r}, and only batch norms are converted.")
    if depth >= 50 and width != 4 * resnet["WIDTH_PER_GROUP"]:
        raise ConversionError(
            f"{where}: MODEL.RESNETS.RES2_OUT_CHANNELS is {width}, and only 4 * WIDTH_PER_GROUP = "
            f"{4 * resnet['WIDTH_PER_GROUP']} can be converted."
        )
    return {
        "model_type": "resnet",
        "embedding_size": resnet["STEM_OUT_CHANNELS"],
        "hidden_sizes": [width * 2**stage for stage in range(4)],
        "depths": RESNET_DEPTHS[depth],
        "layer_type": "bottleneck" if depth >= 50 else "basic",
        "downsample_in_bottleneck": resnet["STRIDE_IN_1X1"],
        "out_features": STAGES,
    }


def architecture_of(state: dict[str, torch.Tensor], path: Path) -> dict[str, Any]:
    """What the shapes of the weights say for certain, by the names of `FaiM2FConfig` and of the backbone's.

    Raises:
        ConversionError: these are no weights of Mask2Former with a ResNet or Swin backbone.
    """

    def shape(key: str, dimensions: int) -> tuple[int, ...]:
        if key not in state or state[key].ndim != dimensions:
            raise ConversionError(
                f"{path} has no weight {key!r} of {dimensions} dimensions: these are no weights of Mask2Former with "
                "deformable attention and a ResNet or Swin backbone."
            )
        return tuple(state[key].shape)

    queries, hidden = shape(f"{PREDICTOR}query_feat.weight", 2)
    encoder, decoder = f"{PIXEL_DECODER}transformer.encoder.layers.", f"{PREDICTOR}transformer_ffn_layers."
    found: dict[str, Any] = {
        "num_queries": queries,
        "hidden_dim": hidden,
        "num_labels": shape(f"{PREDICTOR}class_embed.weight", 2)[0] - 1,
        "decoder_layers": _count(state, decoder),
        "dim_feedforward": shape(f"{decoder}0.linear1.weight", 2)[0],
        "feature_size": shape(f"{PIXEL_DECODER}transformer.level_embed", 2)[1],
        "mask_feature_size": shape(f"{PIXEL_DECODER}mask_features.weight", 4)[0],
        "encoder_layers": _count(state, encoder),
        "encoder_feedforward_dim": shape(f"{encoder}0.linear1.weight", 2)[0],
        # Heads times points; only both together are in the weights.
        "encoder samples": shape(f"{encoder}0.self_attn.attention_weights.weight", 2)[0] // NUM_LEVELS,
    }
    if "backbone.patch_embed.proj.weight" in state:
        width = shape("backbone.patch_embed.proj.weight", 4)[0]
        tables = [shape(f"backbone.layers.{stage}.blocks.0.attn.relative_position_bias_table", 2) for stage in range(4)]
        backbone = {
            "model_type": "swin",
            "embed_dim": width,
            "depths": [_count(state, f"backbone.layers.{stage}.blocks.") for stage in range(4)],
            "num_heads": [heads for _, heads in tables],
            "window_size": (round(tables[0][0] ** 0.5) + 1) // 2,  # a table has (2 * window - 1) ** 2 rows
        }
        if backbone["window_size"] > LARGEST_WINDOW:
            raise ConversionError(
                f"{path} has windows of {backbone['window_size']} pixels; more than {LARGEST_WINDOW} are not converted."
            )
    else:
        bottleneck = "backbone.res2.0.conv3.weight" in state
        last = 3 if bottleneck else 2
        backbone = {
            "model_type": "resnet",
            "embedding_size": shape("backbone.stem.conv1.weight", 4)[0],
            "hidden_sizes": [shape(f"backbone.res{stage}.0.conv{last}.weight", 4)[0] for stage in range(2, 6)],
            "depths": [_count(state, f"backbone.res{stage}.") for stage in range(2, 6)],
            "layer_type": "bottleneck" if bottleneck else "basic",
        }
    return {**found, "backbone_config": backbone}


def _count(state: dict[str, torch.Tensor], prefix: str) -> int:
    """How many numbers follow a prefix of keys."""
    return len({match[1] for key in state if (match := re.match(re.escape(prefix) + r"(\d{1,6})\.", key))})


def refuse_contradictions(found: dict[str, Any], described: Configuration, path: Path) -> None:
    """Raises ConversionError for the first thing that the weights say otherwise than the configuration."""
    told = {**described.config, "num_labels": described.num_labels}
    told["encoder samples"] = told["encoder_attention_heads"] * told["encoder_points"]
    told.setdefault("encoder_feedforward_dim", 1024)
    backbone = told.pop("backbone_config")
    pairs = [("backbone", found["backbone_config"]["model_type"], backbone["model_type"])]
    if found["backbone_config"]["model_type"] == backbone["model_type"]:
        pairs += [
            (f"backbone's {name}", value, backbone.get(name))
            for name, value in found["backbone_config"].items()
            if name in backbone
        ]
    pairs += [(name, value, told[name]) for name, value in found.items() if name != "backbone_config"]
    for name, mine, theirs in pairs:
        if mine != theirs:
            raise ConversionError(
                f"{path} does not belong to {described.where}: by its weights the {name} is {mine}, there it is "
                f"{theirs}; name its own configuration by --config."
            )


def layout(config: FaiM2FConfig) -> list[Weight]:
    """Every weight that a checkpoint of this configuration has."""
    backbone = config.backbone_config
    parts = _swin(backbone) if backbone.model_type == "swin" else _resnet(backbone)
    channels = (
        [backbone.embed_dim * 2**stage for stage in range(4)]
        if backbone.model_type == "swin"
        else list(backbone.hidden_sizes)
    )
    return [*parts, *_pixel_decoder(config, channels), *_predictor(config)]


def _affine(theirs: str, ours: str, *shape: int) -> list[Weight]:
    """A linear layer or convolution (out, in, ...) with its bias; of one number, a norm."""
    return [
        Weight(f"{theirs}.weight", shape, (f"{ours}.weight",)),
        Weight(f"{theirs}.bias", shape[:1], (f"{ours}.bias",)),
    ]


def _thirds(theirs: str, joint: str, ours: list[str], width: int) -> list[Weight]:
    """Query, key and value, which are one table there."""
    return [
        Weight(f"{theirs}{joint}weight", (3 * width, width), tuple(f"{name}.weight" for name in ours)),
        Weight(f"{theirs}{joint}bias", (3 * width,), tuple(f"{name}.bias" for name in ours)),
    ]


def _resnet(backbone: Any) -> Iterator[Weight]:
    def convolution(theirs: str, ours: str, *shape: int) -> Iterator[Weight]:
        yield Weight(f"backbone.{theirs}.weight", shape, (f"backbone.{ours}.convolution.weight",))
        for name in ("weight", "bias", "running_mean", "running_var"):
            yield Weight(f"backbone.{theirs}.norm.{name}", shape[:1], (f"backbone.{ours}.normalization.{name}",))

    yield from convolution("stem.conv1", "embedder.embedder", backbone.embedding_size, 3, 7, 7)
    before = backbone.embedding_size
    for stage, (width, depth) in enumerate(zip(backbone.hidden_sizes, backbone.depths, strict=True)):
        for block in range(depth):
            theirs, ours = f"res{stage + 2}.{block}", f"encoder.stages.{stage}.layers.{block}"
            if backbone.layer_type == "bottleneck":
                narrow = width // 4
                shapes = [(narrow, before, 1, 1), (narrow, narrow, 3, 3), (width, narrow, 1, 1)]
            else:
                shapes = [(width, before, 3, 3), (width, width, 3, 3)]
            # Both put a projection where the stride or the width changes.
            if before != width or (stage > 0 and block == 0):
                yield from convolution(f"{theirs}.shortcut", f"{ours}.shortcut", width, before, 1, 1)
            for index, shape in enumerate(shapes):
                yield from convolution(f"{theirs}.conv{index + 1}", f"{ours}.layer.{index}", *shape)
            before = width


def _swin(backbone: Any) -> Iterator[Weight]:
    """Ours by the names that transformers publishes Swin with; loading translates them to those of its version."""
    width, rows = backbone.embed_dim, (2 * backbone.window_size - 1) ** 2
    embeddings = "backbone.embeddings."
    yield from _affine("backbone.patch_embed.proj", f"{embeddings}patch_embeddings.projection", width, 3, 4, 4)
    yield from _affine("backbone.patch_embed.norm", f"{embeddings}norm", width)
    for stage, (depth, heads) in enumerate(zip(backbone.depths, backbone.num_heads, strict=True)):
        inner = int(width * backbone.mlp_ratio)
        for block in range(depth):
            theirs = f"backbone.layers.{stage}.blocks.{block}"
            ours = f"backbone.encoder.layers.{stage}.blocks.{block}"
            table, attention = "relative_position_bias_table", f"{ours}.attention.self"
            yield Weight(f"{theirs}.attn.{table}", (rows, heads), (f"{attention}.{table}",))
            three = [f"{attention}.{name}" for name in ("query", "key", "value")]
            yield from _thirds(f"{theirs}.attn.", "qkv.", three, width)
            yield from _affine(f"{theirs}.attn.proj", f"{ours}.attention.output.dense", width, width)
            yield from _affine(f"{theirs}.norm1", f"{ours}.layernorm_before", width)
            yield from _affine(f"{theirs}.norm2", f"{ours}.layernorm_after", width)
            yield from _affine(f"{theirs}.mlp.fc1", f"{ours}.intermediate.dense", inner, width)
            yield from _affine(f"{theirs}.mlp.fc2", f"{ours}.output.dense", width, inner)
        yield from _affine(f"backbone.norm{stage}", f"backbone.hidden_states_norms.{STAGES[stage]}", width)
        if stage < 3:
            theirs, ours = f"backbone.layers.{stage}.downsample", f"backbone.encoder.layers.{stage}.downsample"
            reduction = ".reduction.weight"
            yield Weight(f"{theirs}{reduction}", (2 * width, 4 * width), (f"{ours}{reduction}",))
            yield from _affine(f"{theirs}.norm", f"{ours}.norm", 4 * width)
            width *= 2


def _pixel_decoder(config: FaiM2FConfig, channels: list[int]) -> Iterator[Weight]:
    size, ours = config.feature_size, "pixel_decoder."
    for level, width in enumerate(reversed(channels[1:])):  # coarse to fine in both
        theirs, projection = f"{PIXEL_DECODER}input_proj.{level}", f"{ours}input_projections.{level}"
        yield from _affine(f"{theirs}.0", f"{projection}.convolution", size, width, 1, 1)
        yield from _affine(f"{theirs}.1", f"{projection}.normalization", size)
    transformer = f"{PIXEL_DECODER}transformer."
    yield Weight(f"{transformer}level_embed", (NUM_LEVELS, size), (f"{ours}level_embedding.weight",))
    samples = config.encoder_attention_heads * NUM_LEVELS * config.encoder_points
    for layer in range(config.encoder_layers):
        theirs, own = f"{transformer}encoder.layers.{layer}", f"{ours}encoder_layers.{layer}"
        for name, count in (
            ("sampling_offsets", 2 * samples),
            ("attention_weights", samples),
            ("value_proj", size),
            ("output_proj", size),
        ):
            yield from _affine(f"{theirs}.self_attn.{name}", f"{own}.attention.{name}", count, size)
        yield from _affine(f"{theirs}.norm1", f"{own}.attention_norm", size)
        yield from _affine(f"{theirs}.linear1", f"{own}.linear1", config.encoder_feedforward_dim, size)
        yield from _affine(f"{theirs}.linear2", f"{own}.linear2", size, config.encoder_feedforward_dim)
        yield from _affine(f"{theirs}.norm2", f"{own}.feed_forward_norm", size)
    # The one level above those of the deformable layers.
    for name, own, shape in (
        ("adapter_1", "lateral_convolutions.0", (size, channels[0], 1, 1)),
        ("layer_1", "output_convolutions.0", (size, size, 3, 3)),
    ):
        yield Weight(f"{PIXEL_DECODER}{name}.weight", shape, (f"{ours}{own}.convolution.weight",))
        yield from _affine(f"{PIXEL_DECODER}{name}.norm", f"{ours}{own}.normalization", size)
    yield from _affine(f"{PIXEL_DECODER}mask_features", f"{ours}mask_projection", config.mask_feature_size, size, 1, 1)


def _predictor(config: FaiM2FConfig) -> Iterator[Weight]:
    size, ours = config.hidden_dim, "transformer_decoder."
    queries = (config.num_queries, size)
    yield Weight(f"{PREDICTOR}query_feat.weight", queries, (f"{ours}query_features.weight",))
    yield Weight(f"{PREDICTOR}query_embed.weight", queries, (f"{ours}query_position.weight",))
    # A decoder of fewer layers than levels has no use for the others; see `convert_state_dict`.
    yield Weight(f"{PREDICTOR}level_embed.weight", (NUM_LEVELS, size), (f"{ours}level_embedding.weight",))
    if config.enforce_input_projection or config.feature_size != size:
        for level in range(NUM_LEVELS):
            own = f"{ours}input_projections.{level}"
            yield from _affine(f"{PREDICTOR}input_proj.{level}", own, size, config.feature_size, 1, 1)
    for layer in range(config.decoder_layers):
        own = f"{ours}layers.{layer}"
        for kind, module in (("self", "self_attn"), ("cross", "multihead_attn")):
            theirs = f"{PREDICTOR}transformer_{kind}_attention_layers.{layer}"
            attention = f"{own}.{kind}_attention"
            three = [f"{attention}.{name}_proj" for name in "qkv"]
            yield from _thirds(f"{theirs}.{module}.", "in_proj_", three, size)
            yield from _affine(f"{theirs}.{module}.out_proj", f"{attention}.out_proj", size, size)
            yield from _affine(f"{theirs}.norm", f"{own}.{kind}_attention_norm", size)
        theirs = f"{PREDICTOR}transformer_ffn_layers.{layer}"
        yield from _affine(f"{theirs}.linear1", f"{own}.linear1", config.dim_feedforward, size)
        yield from _affine(f"{theirs}.linear2", f"{own}.linear2", size, config.dim_feedforward)
        yield from _affine(f"{theirs}.norm", f"{own}.feed_forward_norm", size)
    yield from _affine(f"{PREDICTOR}decoder_norm", f"{ours}norm", size)
    yield from _affine(f"{PREDICTOR}class_embed", f"{ours}class_predictor", config.num_labels + 1, size)
    for layer, width in enumerate((size, size, config.mask_feature_size)):
        theirs = f"{PREDICTOR}mask_embed.layers.{layer}"
        yield from _affine(theirs, f"{ours}mask_embedder.layers.{layer}", width, size)


def convert_state_dict(state: dict[str, torch.Tensor], config: FaiM2FConfig, where: str) -> dict[str, torch.Tensor]:
    """The weights in our names, float32; a Swin's as transformers publishes them.

    Args:
        state: tensors by the zoo's keys, as `read_weights` gives them.
        config: what they must fit, key by key and shape by shape.
        where: what to call the file in errors.

    Raises:
        ConversionError: a missing or unexpected key, a wrong shape or type, or a value that cannot be.
    """
    expected = {weight.key: weight for weight in layout(config)}
    extra = [key for key in state if key not in expected and not _is_known(key, state[key], config, where)]
    for kind, keys in (("lacks", [key for key in expected if key not in state]), ("has the unexpected", extra)):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ConversionError(
                f"{where} {kind} key {keys[0]!r}{more}: the checkpoint and the configuration do not match; name its "
                "own by --config."
            )
    converted = {}
    for key, weight in expected.items():
        tensor = state[key]
        if tuple(tensor.shape) != weight.shape:
            raise ConversionError(
                f"{where}: {key!r} has the shape {tuple(tensor.shape)} where the configuration needs {weight.shape}."
            )
        if not tensor.is_floating_point():
            raise ConversionError(f"{where}: {key!r} holds {tensor.dtype} where floating-point weights were expected.")
        tensor = tensor.to(torch.float32)
        if not torch.isfinite(tensor).all():
            raise ConversionError(f"{where}: {key!r} has values that are not finite; the training run diverged.")
        if key.endswith("running_var") and (tensor < 0).any():
            raise ConversionError(f"{where}: {key!r} has negative values, which a variance cannot have.")
        for ours, part in zip(weight.ours, tensor.chunk(len(weight.ours)), strict=True):
            converted[ours] = part.clone()
    levels = min(NUM_LEVELS, config.decoder_layers)
    embedding = "transformer_decoder.level_embedding.weight"
    converted[embedding] = converted[embedding][:levels].clone()
    projection = re.compile(r"transformer_decoder\.input_projections\.(\d)\.")
    return {key: tensor for key, tensor in converted.items() if not (m := projection.match(key)) or int(m[1]) < levels}


def _is_known(key: str, tensor: torch.Tensor, config: FaiM2FConfig, where: str) -> bool:
    """Whether a key beyond the weights may be there: it is computed, or comes from the configuration."""
    if key in OF_THE_CONFIGURATION or key.endswith(".norm.num_batches_tracked"):
        return True
    if not re.fullmatch(r"backbone\.layers\.\d+\.blocks\.\d+\.attn\.relative_position_index", key):
        return False
    window = getattr(config.backbone_config, "window_size", 0)
    is_right = tensor.shape == (window**2, window**2)
    if not is_right or not torch.equal(tensor.to(torch.int64), _relative_position_index(window)):
        raise ConversionError(f"{where}: {key!r} is not what a window of {window} pixels has; refused as damaged.")
    return True


def _relative_position_index(window: int) -> torch.Tensor:
    """(window**2, window**2): where in the table the distance of two pixels of a window is (Swin, section 3.2)."""
    place = torch.arange(window)
    rows, columns = place.repeat_interleave(window), place.repeat(window)
    down, right = rows[:, None] - rows[None] + window - 1, columns[:, None] - columns[None] + window - 1
    return down * (2 * window - 1) + right


def model_configuration(described: Configuration) -> FaiM2FConfig:
    """The configuration with labels, stuff and post-processing.

    Raises:
        ConversionError: a value that cannot be.
    """
    labels, stuff = [str(index) for index in range(described.num_labels)], None
    if described.data is not None:
        labels, stuff = labels_and_stuff(described.data, described.subtask)
    try:
        return FaiM2FConfig(
            **{**described.config, "backbone_config": dict(described.config["backbone_config"])},
            init_std=1.0,
            postprocessing_type=described.subtask,
            use_mask_score=True,
            predict_all_pixels=False,
            label_ids_to_fuse=stuff,
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
        )
    except (ValueError, TypeError) as error:
        raise ConversionError(f"{described.where} cannot be converted ({error}).") from error


def image_processor(described: Configuration, config: FaiM2FConfig) -> FaiM2FImageProcessor:
    """As the original prepares images for an evaluation, but for its padding to multiples of 32, which this model does
    not need.

    Raises:
        ConversionError: a value that cannot be.
    """
    shortest, longest = described.size
    try:
        return FaiM2FImageProcessor.from_model_config(
            config,
            size={"shortest_edge": shortest, "longest_edge": longest},
            image_mean=[value / 255 for value in described.mean],
            image_std=[value / 255 for value in described.std],
            ignore_index=config.ignore_value,
        )
    except (ValueError, TypeError) as error:
        raise ConversionError(f"{described.where} cannot be converted ({error}).") from error


def build_model(config: FaiM2FConfig, state: dict[str, torch.Tensor], where: str) -> FaiM2FForUniversalSegmentation:
    """The model with converted weights, in evaluation mode; transformers translates the names of its own backbones.

    Raises:
        ConversionError: this version of transformers has other weights than the converter knows.
    """
    with _quiet():
        model, info = FaiM2FForUniversalSegmentation.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True
        )
    # Two of torch's and Swin's buffers are made with the model.
    computed = ("relative_position_index", "num_batches_tracked")
    wrong = [key for key in info["missing_keys"] if not key.endswith(computed)]
    wrong += [*info["unexpected_keys"], *map(str, info["mismatched_keys"])]
    if wrong:
        raise ConversionError(
            f"{where}: {sorted(wrong)[0]!r} could not be placed in the model of this version of transformers; please "
            "report it."
        )
    return model.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of buffers that a checkpoint need not have."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _digests(path: Path) -> tuple[str, str]:
    """SHA-256 and MD5 of a file; the latter is what the zoo names its files by, and proves nothing."""
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
            md5.update(block)
    return sha256.hexdigest(), md5.hexdigest()


def choose_configuration(path: Path, md5: str, config: str | None, subtask: str | None) -> Configuration:
    """The configuration of a checkpoint: the one that is asked for, or the one that the zoo has for this very file.

    Args:
        md5: of the file, hexadecimal.
        config: a name of the zoo's, or the path of a YAML; None for the zoo's of this file.
        subtask: which of the zoo's is meant where a name is that of several, or what a YAML is for.

    Raises:
        ConversionError: there is none, or it contradicts what is known of the file.
    """
    known = zoo_model_of(md5)
    if config is not None and (
        Path(config).is_file() or (Path(config).suffix in (".yaml", ".yml") and _is_path(config))
    ):
        return yaml_configuration(Path(config), subtask)
    if config is None and known is None:
        raise ConversionError(
            f"{path} is none of the zoo's files by its MD5, so --config has to say what it is: one of the zoo's "
            f"{len(zoo())} configurations, such as {next(iter(zoo()))}, or the YAML that it was trained with."
        )
    try:
        named = find_zoo_model(config, subtask) if config is not None else known
    except ValueError as error:
        raise ConversionError(f"--config: {error}") from error
    assert named is not None
    if known is not None and known != named:
        raise ConversionError(f"{path} is the zoo's {known.name} by its MD5, and not {named.name} (--config).")
    if subtask not in (None, named.subtask):
        raise ConversionError(f"{named.name} was trained for {named.subtask} segmentation, not {subtask} (--subtask).")
    return published_configuration(named)


def _is_path(config: str) -> bool:
    """Whether a YAML's name can only be meant as a path: the zoo's repository has none of that name."""
    try:
        find_zoo_model(config)
    except ValueError as error:
        return "could be" not in str(error)
    return False


def convert(source: Path, out_dir: Path, config: str | None = None, subtask: str | None = None) -> ZooConversion:
    """Writes a complete Hub repository of a checkpoint to `out_dir`, which appears whole or not at all.

    Args:
        source: a checkpoint of Mask2Former's repository, `.pkl` or `.pth`; untrusted.
        out_dir: a folder that does not exist.
        config, subtask: as in `choose_configuration`.

    Raises:
        ConversionError: anything that keeps the folder from being right; nothing is left behind.
    """
    check_new_folder(out_dir, ConversionError)
    if not source.is_file():
        raise ConversionError(f"{source} does not exist; name a checkpoint of Mask2Former (.pkl or .pth).")
    sha256, md5 = _digests(source)
    described = choose_configuration(source, md5, config, subtask)
    state = read_weights(source)
    found = architecture_of(state, source)
    # Before anything is built by the configuration, whose sizes are thereby those of what is in the file.
    refuse_contradictions(found, described, source)
    ours = model_configuration(described)
    processor = image_processor(described, ours)
    converted = convert_state_dict(state, ours, str(source))
    del state
    model = build_model(ours, converted, str(source))
    provenance = Provenance(source.name, sha256, library="Mask2Former", model=described.name)
    with new_folder(out_dir) as staging:
        model.save_pretrained(staging)
        processor.save_pretrained(staging)
        (staging / "README.md").write_text(model_card(out_dir.name, ours, provenance), encoding="utf-8")
    return ZooConversion(described.name, described.notes)


__all__ = [
    "Configuration",
    "Weight",
    "ZooConversion",
    "architecture_of",
    "build_model",
    "choose_configuration",
    "convert",
    "convert_state_dict",
    "image_processor",
    "is_zoo_checkpoint",
    "layout",
    "model_configuration",
    "published_configuration",
    "read_weights",
    "yaml_configuration",
]

"""Reads the settings from which a model is built from Mask2Former's detectron2 configurations (YAML with `_BASE_`).

No code in them is run: a value that Python would have to compute becomes a placeholder, and is rejected if needed.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hf_faim2f.errors import ConversionError, nearest_name
from hf_faim2f.files import YamlLoader, read_text

LARGEST_FILE = 1 << 20
LONGEST_CHAIN = 10
LEVELS = ["res2", "res3", "res4", "res5"]


@dataclass(frozen=True)
class Setting:
    """One key of a configuration.

    Args:
        default: its value in detectron2 or Mask2Former's `add_maskformer2_config`, for files without the key.
        needed: the only supported value; None if any value of the default's type is supported.
    """

    default: Any
    needed: Any = None


# The keys read by the network, its loss or its evaluation.
SETTINGS: dict[str, Setting] = {
    "MODEL.META_ARCHITECTURE": Setting("GeneralizedRCNN", "MaskFormer"),
    "MODEL.PIXEL_MEAN": Setting([103.53, 116.28, 123.675]),
    "MODEL.PIXEL_STD": Setting([1.0, 1.0, 1.0]),
    "MODEL.BACKBONE.NAME": Setting("build_resnet_backbone"),
    "MODEL.BACKBONE.FREEZE_AT": Setting(2),
    "MODEL.RESNETS.DEPTH": Setting(50),
    "MODEL.RESNETS.OUT_FEATURES": Setting(["res4"], LEVELS),
    "MODEL.RESNETS.NUM_GROUPS": Setting(1, 1),
    "MODEL.RESNETS.NORM": Setting("FrozenBN"),
    "MODEL.RESNETS.WIDTH_PER_GROUP": Setting(64),
    "MODEL.RESNETS.STRIDE_IN_1X1": Setting(True),
    "MODEL.RESNETS.RES5_DILATION": Setting(1, 1),
    "MODEL.RESNETS.RES2_OUT_CHANNELS": Setting(256),
    "MODEL.RESNETS.STEM_OUT_CHANNELS": Setting(64),
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": Setting([False] * 4, [False] * 4),
    "MODEL.SWIN.PRETRAIN_IMG_SIZE": Setting(224),
    "MODEL.SWIN.PATCH_SIZE": Setting(4, 4),
    "MODEL.SWIN.EMBED_DIM": Setting(96),
    "MODEL.SWIN.DEPTHS": Setting([2, 2, 6, 2]),
    "MODEL.SWIN.NUM_HEADS": Setting([3, 6, 12, 24]),
    "MODEL.SWIN.WINDOW_SIZE": Setting(7),
    "MODEL.SWIN.MLP_RATIO": Setting(4.0),
    "MODEL.SWIN.QKV_BIAS": Setting(True, True),
    "MODEL.SWIN.QK_SCALE": Setting(None),
    "MODEL.SWIN.DROP_RATE": Setting(0.0),
    "MODEL.SWIN.ATTN_DROP_RATE": Setting(0.0),
    "MODEL.SWIN.DROP_PATH_RATE": Setting(0.3),
    "MODEL.SWIN.APE": Setting(False, False),
    "MODEL.SWIN.PATCH_NORM": Setting(True, True),
    "MODEL.SWIN.OUT_FEATURES": Setting(LEVELS, LEVELS),
    "MODEL.SEM_SEG_HEAD.NAME": Setting("SemSegFPNHead", "MaskFormerHead"),
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": Setting(["p2", "p3", "p4", "p5"], LEVELS),
    "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": Setting(255),
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": Setting(54),
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": Setting(128),
    "MODEL.SEM_SEG_HEAD.MASK_DIM": Setting(256),
    "MODEL.SEM_SEG_HEAD.NORM": Setting("GN", "GN"),
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": Setting(4, 4),
    "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": Setting("BasePixelDecoder", "MSDeformAttnPixelDecoder"),
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": Setting(0),
    "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES": Setting(LEVELS[1:], LEVELS[1:]),
    "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME": Setting(
        "MultiScaleMaskedTransformerDecoder", "MultiScaleMaskedTransformerDecoder"
    ),
    "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE": Setting("res5", "multi_scale_pixel_decoder"),
    "MODEL.MASK_FORMER.DEEP_SUPERVISION": Setting(True),
    "MODEL.MASK_FORMER.NO_OBJECT_WEIGHT": Setting(0.1),
    "MODEL.MASK_FORMER.CLASS_WEIGHT": Setting(1.0),
    "MODEL.MASK_FORMER.MASK_WEIGHT": Setting(20.0),
    "MODEL.MASK_FORMER.DICE_WEIGHT": Setting(1.0),
    "MODEL.MASK_FORMER.HIDDEN_DIM": Setting(256),
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": Setting(100),
    "MODEL.MASK_FORMER.NHEADS": Setting(8),
    "MODEL.MASK_FORMER.DROPOUT": Setting(0.1),
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": Setting(2048),
    "MODEL.MASK_FORMER.DEC_LAYERS": Setting(6),
    "MODEL.MASK_FORMER.PRE_NORM": Setting(False),
    "MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ": Setting(False),
    "MODEL.MASK_FORMER.SIZE_DIVISIBILITY": Setting(32),
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": Setting(12544),
    "MODEL.MASK_FORMER.OVERSAMPLE_RATIO": Setting(3.0),
    "MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO": Setting(0.75),
    "MODEL.MASK_FORMER.TEST.SEMANTIC_ON": Setting(True),
    "MODEL.MASK_FORMER.TEST.INSTANCE_ON": Setting(False),
    "MODEL.MASK_FORMER.TEST.PANOPTIC_ON": Setting(False),
    "MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD": Setting(0.0),
    "MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD": Setting(0.0),
    "INPUT.FORMAT": Setting("BGR", "RGB"),
    "INPUT.MIN_SIZE_TEST": Setting(800),
    "INPUT.MAX_SIZE_TEST": Setting(1333),
    "TEST.DETECTIONS_PER_IMAGE": Setting(100),
    "DATASETS.TRAIN": Setting([]),
}
# Keys in the same sections that the model does not read, or reads only in training.
WITHOUT_EFFECT = {
    "MODEL.BACKBONE": (),
    "MODEL.RESNETS": (
        "DEFORM_MODULATED", "DEFORM_NUM_GROUPS", "STEM_TYPE", "RES4_DILATION", "RES5_MULTI_GRID",
    ),
    "MODEL.SWIN": ("USE_CHECKPOINT",),
    "MODEL.SEM_SEG_HEAD": (
        "LOSS_WEIGHT", "LOSS_TYPE", "ASPP_CHANNELS", "ASPP_DILATIONS", "ASPP_DROPOUT", "PROJECT_CHANNELS",
        "PROJECT_FEATURES", "USE_DEPTHWISE_SEPARABLE_CONV", "DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS",
        "DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS",
    ),
    "MODEL.MASK_FORMER": ("ENC_LAYERS",),
    "MODEL.MASK_FORMER.TEST": ("SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE",),
}  # fmt: skip


class _Loader(YamlLoader):
    """The loader with placeholders for values of Python."""


class Unread:
    """Placeholder for a value that Python would have to compute."""


def _python(loader: _Loader, tag: str, node: Any) -> Any:
    if tag == "tuple" and isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return Unread()


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", _python)


def read_settings(path: Path) -> dict[str, Any]:
    """The value of each key in SETTINGS: from the file, else from its bases, else detectron2's default.

    Args:
        path: a configuration of Mask2Former, or the `config.yaml` written by detectron2 training.

    Raises:
        ConversionError: the file or a base cannot be read, or has an unsupported setting or value.
    """
    values: dict[str, Any] = {}
    for each in _chain(path):
        _merge(values, each)
    flat = _flat(values)
    _refuse_unknown(flat, str(path))
    backbone = flat.get("MODEL.BACKBONE.NAME", SETTINGS["MODEL.BACKBONE.NAME"].default)
    other = "MODEL.SWIN." if backbone == "build_resnet_backbone" else "MODEL.RESNETS."
    settings = {}
    for key, setting in SETTINGS.items():
        if key.startswith(other):  # belongs to the other kind of backbone
            continue
        value = flat.get(key, setting.default)
        if key == "DATASETS.TRAIN" and isinstance(value, str):  # a Python tuple, as text
            value = re.findall(r"[\"']([^\"']*)[\"']", value)
        settings[key] = _checked(key, value, setting, str(path))
    return settings


def _chain(path: Path) -> list[dict[str, Any]]:
    """The contents of the file and its bases, starting with the outermost base."""
    root = _root(path)
    found: list[dict[str, Any]] = []
    seen: list[Path] = []
    where = path
    while True:
        resolved = where.resolve()
        if resolved in seen or len(seen) == LONGEST_CHAIN:
            raise ConversionError(f"{path}: its `_BASE_`s form a cycle, or chain more than {LONGEST_CHAIN} files.")
        seen.append(resolved)
        content = _read(where)
        found.append(content)
        base = content.pop("_BASE_", None)
        if base is None:
            return found[::-1]
        if not isinstance(base, str) or "://" in base or base.startswith(("/", "~")) or "\x00" in base:
            raise ConversionError(f"{where}: `_BASE_` = {str(base)[:100]!r} is not a path relative to this file.")
        where = where.parent / base
        if not where.resolve().is_relative_to(root) or where.suffix not in (".yaml", ".yml"):
            raise ConversionError(
                f"{path}: the `_BASE_` {base!r} is not a YAML file within {root}, and others are not read; put the "
                "configurations into one folder as the repository has them."
            )


def _root(path: Path) -> Path:
    """The folder that must contain all bases: the nearest one called `configs`, or else two levels up."""
    resolved = path.resolve()
    return next((folder for folder in resolved.parents if folder.name == "configs"), resolved.parent.parent)


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.exists() and not path.is_file():  # reading a pipe could block forever
            raise ConversionError(f"{path} is not a file.")
        if path.stat().st_size > LARGEST_FILE:
            raise ConversionError(f"{path} has more than {LARGEST_FILE} bytes, which no configuration has.")
        content = yaml.load(read_text(path), _Loader)  # a SafeLoader
    except FileNotFoundError as error:
        raise ConversionError(f"{path} does not exist.") from error
    except OSError as error:
        raise ConversionError(f"{path} cannot be read ({_one_line(error)}).") from error
    # PyYAML does not check the text after tags such as !!int or !!timestamp, so its constructors may raise anything.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise ConversionError(f"{path} is not readable YAML ({_one_line(error)}).") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__} where a configuration was expected.")
    return content


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _merge(values: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        own = values.get(key)
        if isinstance(own, dict) and isinstance(value, dict):
            _merge(own, value)
        else:
            values[key] = value


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat.update(_flat(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def _refuse_unknown(flat: dict[str, Any], where: str) -> None:
    """Rejects unknown keys in the sections from which the model is built."""
    for key in flat:
        section, _, name = key.rpartition(".")
        if key in SETTINGS or section not in WITHOUT_EFFECT or name in WITHOUT_EFFECT[section]:
            continue
        nearest = nearest_name(key, SETTINGS, 0.8)
        hint = f" Did you mean {nearest}?" if nearest else ""
        raise ConversionError(f"{where} has the setting {key}, which this converter does not support.{hint}")


def _checked(key: str, value: Any, setting: Setting, where: str) -> Any:
    if isinstance(value, Unread):
        raise ConversionError(f"{where}: {key} asks Python to compute its value, which is refused: write the value.")
    if setting.needed is not None and (
        value != setting.needed or isinstance(value, bool) != isinstance(setting.needed, bool)
    ):
        raise ConversionError(f"{where}: {key} is {_short(value)}, and only {_short(setting.needed)} can be converted.")
    if not _alike(value, setting.default):
        raise ConversionError(
            f"{where}: {key} is {_short(value)}, where a value like {_short(setting.default)} was expected."
        )
    return value


def _alike(value: Any, default: Any) -> bool:
    """Whether a value has the type of a default (for a float, any number; lists by item) and is within bounds."""
    if isinstance(default, list):
        return (
            isinstance(value, list)
            and len(value) <= 16
            and all(_alike(one, default[0] if default else "") for one in value)
        )
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, (int, float)) and abs(value) < 1e6
    if isinstance(default, int):
        return isinstance(value, int) and abs(value) < 1 << 24
    return type(value) is type(default)


def _short(value: Any) -> str:
    return repr(value)[:80]


__all__ = ["SETTINGS", "read_settings"]

"""Validation shared by all configurations of this model.

A constructor rejects unknown keywords and suggests the closest valid name. Otherwise a misspelled `num_querys` would be
stored but never read, and the model silently built with 100 queries.

Reading a file is more lenient: unknown keys, which a later version or the user may have written, are kept, and one
warning lists them.
"""

import difflib
import functools
import inspect
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Keys that transformers 4.57 or 5.x writes into a config.json, or passes when it reads one.
TRANSFORMERS_KEYS = frozenset(
    "architectures attn_implementation auto_map chunk_size_feed_forward dtype experts_implementation "
    "finetuning_task id2label is_encoder_decoder label2id model_type name_or_path num_labels out_features "
    "out_indices output_attentions output_hidden_states per_layer_config problem_type quantization_config "
    "return_dict stage_names task_specific_params tie_word_embeddings torch_dtype torchscript "
    "transformers_version transformers_weights use_cache use_return_dict".split()
)
# Names of these parameters in Focoos and in other transformers models, which differ too much for a match by spelling.
OTHER_NAMES = {
    "num_classes": "num_labels",
    "depth": "depths",
    "layers": "depths",
    "base": "embedding_size",
    "in_chans": "num_channels",
    "transformer_predictor_dec_layers": "decoder_layers",
    "num_decoder_layers": "decoder_layers",
    "transformer_predictor_hidden_dim": "hidden_dim",
    "pixel_decoder_feat_dim": "feature_size",
    "pixel_decoder_out_dim": "mask_feature_size",
    "pixel_decoder_transformer_layers": "encoder_layers",
    "criterion_eos_coef": "no_object_weight",
    "criterion_num_points": "train_num_points",
    "criterion_deep_supervision": "use_auxiliary_loss",
    "score_threshold": "threshold",
    "stuff_ids": "label_ids_to_fuse",
    "stuff_classes": "label_ids_to_fuse",
    "semantic_loss_ignore_index": "ignore_value",
}
# Kinds of parameters that stand for any number of arguments.
ANY_NUMBER = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
# The default `ignore_value`.
IGNORED = 255
# Keys that select the attention implementation. Those with an underscore are transformers' internal state.
IMPLEMENTATION = re.compile(r"(_?)(attn|experts)_implementation(_internal)?")


@functools.cache
def base_values() -> dict[str, Any]:
    """The fields that every configuration of the installed transformers has, with their defaults."""
    return PretrainedConfig().to_dict()


def parameters_of(owner: Any, base: type = PretrainedConfig) -> list[str]:
    """The names of a class's own parameters, in the order of its constructor. If that takes any keywords, as those of
    subclasses do, the parameters of the class below it follow, down to `base`, which is left out."""
    names: dict[str, None] = {}
    for one in owner.__mro__[: owner.__mro__.index(base)]:
        if "__init__" not in vars(one):
            continue
        parameters = list(inspect.signature(one.__init__).parameters.values())[1:]
        kinds = [parameter.kind for parameter in parameters]
        named = [parameter.name for parameter in parameters if parameter.kind not in ANY_NUMBER]
        names |= dict.fromkeys(named)
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            break
    return list(names)


def _is_parameter(config_class: Any, name: str) -> bool:
    if name.startswith("_"):  # internal to transformers
        return IMPLEMENTATION.fullmatch(name) is None
    return name in TRANSFORMERS_KEYS or name in parameters_of(config_class)


def _nearest(config_class: Any, name: str, likeness: float = 0.5) -> str | None:
    own = parameters_of(config_class)
    if OTHER_NAMES.get(name) in [*own, "num_labels"]:
        return OTHER_NAMES[name]
    return next(iter(difflib.get_close_matches(name, [*own, *sorted(TRANSFORMERS_KEYS)], 1, likeness)), None)


def refuse_unknown_keywords(config_class: Any, keywords: Mapping[str, Any]) -> None:
    """Raises TypeError for the first of `keywords` that neither `config_class` nor transformers reads.

    The message suggests the closest valid name. Names with a leading underscore, which are internal to transformers,
    are accepted, and so are fields that `to_dict` adds if they have their default value.
    """
    for name, value in keywords.items():
        if _is_parameter(config_class, name) or base_values().get(name, inspect.Parameter.empty) == value:
            continue
        nearest = _nearest(config_class, name)
        hint = (
            f"did you mean `{nearest}`?" if nearest else f"it knows: {', '.join(sorted(parameters_of(config_class)))}."
        )
        raise TypeError(f"{config_class.__name__} has no parameter `{name}`; {hint}")


def _refuse_chosen_code(values: Mapping[str, Any]) -> None:
    """Raises ValueError if a file selects an attention kernel, which is code from a Hub repository named in the file.

    transformers 4.57 loads and runs such a kernel without `trust_remote_code` (CVE-2026-4372), even if only the
    internal attribute behind the public key is set.
    """
    for name, value in values.items():
        if isinstance(value, Mapping):
            _refuse_chosen_code(value)
        found = IMPLEMENTATION.fullmatch(name) if isinstance(name, str) else None
        if found is None or value is None:
            continue
        named = value.values() if isinstance(value, Mapping) else [value]
        if found[1] or any("/" in str(implementation) for implementation in named):
            raise ValueError(
                f"The configuration sets `{name}` to {value!r}, but a file may not choose the code of attention. "
                "Remove the key, and pass attn_implementation to from_pretrained if you trust that code."
            )


def _unknown_keys(config_class: Any, values: Mapping[str, Any]) -> Iterator[str]:
    """The unknown keys of a file, each with the closest valid name."""
    for name in values:
        if not _is_parameter(config_class, name) and name not in base_values() and not name.startswith("_"):
            nearest = _nearest(config_class, name, likeness=0.8)
            yield f"{name} (did you mean {nearest}?)" if nearest else name


class ReadFromFile:
    """Mixin for configurations whose constructors reject unknown keywords, but whose files may have unknown keys."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Like transformers' `from_dict`, for the values of a file. Unknown keys are kept and listed in one warning.

        Raises:
            ValueError: the values select an attention kernel or an unknown backbone, or contradict each other.
        """
        _refuse_chosen_code(config_dict)
        config_dict = cls._with_real_names(config_dict)
        unknown = list(cls._unknown_keys(config_dict))
        if unknown:
            logger.warning_once(
                f"{cls.__name__}: unknown keys in the configuration are kept but ignored: {', '.join(unknown)}."
            )
        return cls._from_file(config_dict, kwargs)

    @classmethod
    def _unknown_keys(cls, values: Mapping[str, Any]) -> Iterator[str]:
        return _unknown_keys(cls, values)

    @classmethod
    def _with_real_names(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values with transformers' common names replaced by the names of this configuration.

        Raises:
            ValueError: both names are present, with different values.
        """
        values = {name: value for name, value in values.items() if name != "use_return_dict"}  # a property
        for alias, name in getattr(cls, "attribute_map", {}).items():
            if alias in values and values.setdefault(name, values[alias]) != values.pop(alias):
                raise ValueError(
                    f"The configuration has `{name}` and, with another value, `{alias}`, which is the same: remove one."
                )
        return values

    @classmethod
    def from_json_file(cls, json_file: Any) -> Any:
        """Like transformers' `from_json_file`, but as lenient as `from_dict`."""
        return cls.from_dict(cls._dict_from_json_file(json_file))  # type: ignore[attr-defined]

    @classmethod
    def _from_file(cls, values: dict[str, Any], overrides: dict[str, Any]) -> Any:
        """Builds the configuration, then sets the keys that the constructor would reject."""
        others = {name: values.pop(name) for name in list(values) if not _is_parameter(cls, name)}
        others.update({name: overrides.pop(name) for name in list(overrides) if name in others})
        made = super().from_dict(values, **overrides)  # type: ignore[misc]
        config = made[0] if isinstance(made, tuple) else made
        for name, value in others.items():
            if not hasattr(cls, name):  # a file cannot replace methods and properties
                setattr(config, name, value)
        return made


class ChannelsOfBackbone:
    """Mixin: the number of channels of the images, which the backbone's configuration stores."""

    backbone_config: Any

    @property
    def num_channels(self) -> int:
        """Channels of the images: that of the backbone."""
        return getattr(self.backbone_config, "num_channels", 3)

    @num_channels.setter
    def num_channels(self, value: int) -> None:
        name = type(self).__name__
        if not is_int(value, 1):
            raise ValueError(f"{name}: `num_channels` must be a positive integer, got {value!r}.")
        if value != self.num_channels and not hasattr(self.backbone_config, "num_channels"):
            raise ValueError(f"{name}: {type(self.backbone_config).__name__} has no `num_channels`: it takes RGB.")
        if value != self.num_channels:
            self.backbone_config.num_channels = value


def require(config: PretrainedConfig, condition: bool, name: str, what: str) -> None:
    """Raises ValueError, "`name` must be `what`", unless the condition holds."""
    if not condition:
        raise ValueError(f"{type(config).__name__}: `{name}` must be {what}, got {getattr(config, name)!r}.")


def is_int(value: Any, least: float = -math.inf) -> bool:
    """Whether a value is an integer, not a boolean, of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any, least: float = 0.0, most: float = float("inf")) -> bool:
    """Whether a value is a number, not a boolean, in `least`..`most`."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most


def check_values_of_labels(config: Any) -> None:
    """Checks `label_ids_to_fuse` and `label_weights`, and normalizes them in-place: sorted unique ids, floats.

    Raises:
        ValueError: one of them does not fit the labels.
    """
    stuff = config.label_ids_to_fuse
    are_ids = stuff is None or (isinstance(stuff, (list, tuple)) and all(is_int(label, 0) for label in stuff))
    require(config, are_ids, "label_ids_to_fuse", "a list of class ids, or None")
    beyond = [label for label in stuff or () if label >= config.num_labels]
    if beyond:
        raise ValueError(
            f"{type(config).__name__} has the class {beyond[0]} in label_ids_to_fuse, but only the classes 0 to "
            f"{config.num_labels - 1}: leave it out, or name the class in id2label."
        )
    if stuff is not None:
        vars(config)["label_ids_to_fuse"] = sorted(set(stuff))  # setting the attribute would check it again
    weights = config.label_weights
    are_weights = weights is None or (
        isinstance(weights, (list, tuple))
        and len(weights) == config.num_labels
        and all(is_number(weight) and 0 < weight < float("inf") for weight in weights)
    )
    require(config, are_weights, "label_weights", f"{config.num_labels} numbers above 0, one for each class, or None")
    if weights is not None:
        vars(config)["label_weights"] = [float(weight) for weight in weights]


FLAGS = (
    "pre_norm use_level_embedding enforce_input_projection cls_sigmoid use_mask_score predict_all_pixels "
    "filter_empty_masks use_auxiliary_loss output_auxiliary_logits backbone_freeze_norm"
).split()


def check_flags(config: Any) -> None:
    """Raises ValueError if a flag is not a boolean: the string "false" would count as true."""
    for name in FLAGS:
        require(config, getattr(config, name) in (True, False, None), name, "true or false")


def check_network(config: Any) -> None:
    """Raises ValueError if widths, heads, pixel decoder and backbone of a `FaiM2FConfig` do not fit each other."""
    for width, heads in (("hidden_dim", "num_attention_heads"), ("feature_size", "encoder_attention_heads")):
        if width == "feature_size" and config.encoder_layers == 0:
            continue
        count = getattr(config, heads)
        fits = getattr(config, width) % count == 0 and getattr(config, width) % 4 == 0
        require(config, fits, width, f"divisible by 4 (position embedding) and by {heads} = {count}")
    deformable = config.pixel_decoder_type == "deformable"
    if deformable:
        where = "where the pixel decoder is deformable"
        require(config, config.encoder_layers > 0, "encoder_layers", f"at least 1 {where}")
        require(config, config.feature_size % 32 == 0, "feature_size", f"divisible by 32 (group norm) {where}")
    if config.pixel_decoder_type == "bisenet":
        require(config, config.encoder_layers == 0, "encoder_layers", "0 where the pixel decoder is bisenet")
        require(config, config.feature_size >= 4, "feature_size", "at least 4 where the pixel decoder is bisenet")
    least = 4 if deformable else 3
    if len(config.backbone_config.out_features) < least:
        raise ValueError(
            f"FaiM2FConfig: the backbone must return at least {least} feature maps, "
            f"got {config.backbone_config.out_features}."
        )


def choose_feature_maps(config: Any, out_features: list[str] | None, out_indices: list[int] | None) -> None:
    """Sets which stages a backbone returns, with setters that exist in transformers 4.57 and 5.x.

    Raises:
        ValueError: `out_features` and `out_indices` contradict each other.
    """
    if out_features is None and out_indices is not None:
        config.out_indices = list(out_indices)
        return
    config.out_features = out_features
    if out_indices is not None and list(config.out_indices) != list(out_indices):
        raise ValueError(
            f"{type(config).__name__}: out_features {out_features} and out_indices {out_indices} name other stages."
        )


def stride_of_map(backbone_config: Any, index: int) -> int:
    """The stride of the map `out_features[index]` of a backbone: pixels of the image per pixel, along each side.

    The stages of a vision transformer, which has patches but no `depths` of stages, all have the stride of the patches,
    unless it resizes four of them to a pyramid (BEiT's `add_fpn`). The first stage of other backbones has the stride of
    their patches, or usually 4, and each further one halves the map.
    """
    config, stages, maps = backbone_config, backbone_config.stage_names, backbone_config.out_features
    patch = getattr(config, "patch_size", None)
    patch = patch[0] if isinstance(patch, (list, tuple)) else patch
    if patch and not hasattr(config, "depths"):
        position = index % len(maps)
        return (patch << position) // 4 if getattr(config, "add_fpn", False) else patch
    stage = stages.index(maps[index]) - stages.index("stage1")  # -1 for the stem
    if config.model_type == "pp_lcnet_v4":  # its third and fourth halve only the height
        return 4
    if hasattr(config, "strides"):  # PVT
        return math.prod(config.strides[: stage + 1])
    first = patch or {"pp_lcnet": 2, "pp_lcnet_v3": 2}.get(config.model_type, 4)
    first = config.patch_stride[0] if hasattr(config, "patch_stride") else first  # Hiera's patches overlap
    if config.model_type == "focalnet":  # its maps are those that the next stage gets
        return first << min(stage + 1, len(config.depths) - 1)
    if stage < 0:
        return {"faim2f_stdc": 2, "textnet": 2, "dinov3_convnext": 1}.get(config.model_type, first)
    return first << stage + getattr(config, "downsample_in_first_stage", False)


def reset_what_labels_meant(config: Any, before: Mapping[int, str]) -> None:
    """Resets a model configuration's settings that refer to its old labels, and says so if the user should set them.

    Args:
        config: it has the new labels.
        before: the old `id2label`.
    """
    values = config.__dict__
    if values.get("label_weights"):
        values["label_weights"] = None  # not by the attribute, which would check both against the new labels
    if values.get("label_ids_to_fuse"):
        logger.warning_once(
            f"The labels changed, so label_ids_to_fuse {config.label_ids_to_fuse}, of the old ones, is emptied: set it "
            "again if some of the new classes are stuff."
        )
        config.label_ids_to_fuse = []
    ignored = values.get("ignore_value")
    # The default yields to a class of its value anyway.
    if is_int(ignored, len(before)) and ignored < len(config.id2label) and ignored != IGNORED:
        logger.warning_once(
            f"The labels changed, and ignore_value {ignored}, which was no class of the old ones, is one of the new: "
            f"it becomes {IGNORED}. Set it again if {ignored} still marks unlabeled pixels."
        )
        config.ignore_value = IGNORED


def refuse_other_number(id2label: Any, num_labels: int | None) -> None:
    """Raises ValueError if `num_labels` is given, but is not the number of labels."""
    if num_labels is not None and num_labels != len(id2label):
        raise ValueError(
            f"FaiM2FConfig: `num_labels` is {num_labels}, but `id2label` names {len(id2label)} classes: leave "
            "num_labels out."
        )


def inverted(label2id: Any) -> dict[Any, Any]:
    """The `id2label` of a `label2id`; ValueError if it is not a mapping of names to ids, or gives two the same id."""
    try:
        names = {int(index): name for name, index in dict(label2id).items()}
    except (TypeError, ValueError):
        raise ValueError(f"FaiM2FConfig: `label2id` must map names to class ids, got {label2id!r}.") from None
    for name, index in dict(label2id).items():
        if names[int(index)] != name:
            raise ValueError(
                f"FaiM2FConfig: `label2id` has {name!r} and {names[int(index)]!r} as class {index}: give each an id of "
                "its own."
            )
    return names


def warn_of_other_ids(label2id: Any, own: Mapping[str, int]) -> None:
    """Warns if `label2id` is set on a configuration whose `id2label`, which decides, says otherwise."""
    try:
        is_other = label2id is not None and inverted(label2id) != inverted(own)
    except ValueError:
        is_other = True
    if is_other:
        logger.warning_once("FaiM2FConfig: `label2id` is ignored, because it follows from `id2label`: set id2label.")


def class_names(id2label: Any) -> dict[int, str]:
    """`id2label` with integer keys, in ascending order.

    Raises:
        ValueError: the ids are not 0, 1, 2, ...: a class's id is its index among the model's outputs.
    """
    try:
        names = {int(index): name for index, name in dict(id2label).items()}
    except (TypeError, ValueError):
        raise ValueError(f"FaiM2FConfig: `id2label` must map class ids to names, got {id2label!r}.") from None
    if not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"FaiM2FConfig: `id2label` must name at least one class, each by a string, got {id2label!r}.")
    if missing := set(range(len(id2label))) - set(names):
        raise ValueError(
            f"FaiM2FConfig: `id2label` names {len(id2label)} classes, so their ids must be 0 to {len(id2label) - 1}, "
            f"but id {min(missing)} is missing and id {max(names)} is present: renumber the classes, also in the "
            "segmentation maps, and leave out the value of unlabeled pixels (ignore_value; the image processor's "
            "ignore_index)."
        )
    return {index: names[index] for index in sorted(names)}

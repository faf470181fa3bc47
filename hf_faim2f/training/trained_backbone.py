"""The backbone of a trained model, for a new model: of this package's, or of any model of transformers."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES

from ..finite_weights import check_finite
from ..model.configuration_faim2f import FaiM2FConfig
from ..model.modeling_faim2f import FaiM2FForUniversalSegmentation
from ..runtime.loading import quiet_loading, unfit_weights
from ..zoo import ModelError, load_model, try_loading


def load_backbone(model: FaiM2FForUniversalSegmentation, source: str, name: str) -> None:
    """Puts a trained backbone's weights into a model.

    Args:
        model: whose backbone gets them.
        source: a folder, or an id on the Hub. Weights of transformers' models are read from safetensors only.
        name: what the model is called, for messages.

    Raises:
        ModelError: there is no such model, its backbone is of another kind or shape, or its weights are not finite.
    """
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise ModelError(f"{source} is no model's folder: it has no config.json.")
    kind = try_loading(source, "configuration", lambda: FaiM2FConfig.get_config_dict(source)[0]).get("model_type")
    if kind == FaiM2FConfig.model_type:
        trained = load_model(source)[0].backbone
        try:
            model.backbone.load_state_dict(trained.state_dict())
        except RuntimeError as error:
            raise ModelError(f"The backbone of {source} does not fit {name}: it is of another shape.") from error
        return
    own = model.config.backbone_config
    if kind != own.model_type or kind not in MODEL_FOR_BACKBONE_MAPPING_NAMES:
        raise ModelError(f"{source} is a model of type {kind!r}, and the backbone of {name} is of {own.model_type!r}.")
    theirs = try_loading(source, "configuration", lambda: AutoConfig.from_pretrained(source))
    for key in _ARCHITECTURE:
        if getattr(theirs, key, None) != getattr(own, key, None):
            raise ModelError(
                f"The backbone of {source} does not fit {name}: its {key} is {getattr(theirs, key, None)}, not "
                f"{getattr(own, key, None)}."
            )
    with quiet_loading():
        loaded: tuple[Any, dict[str, Any]] = try_loading(
            source,
            "weights",
            lambda: type(model.backbone).from_pretrained(
                source, config=own, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
            ),
        )
    trained, info = loaded
    missing, mismatched = unfit_weights(info)
    wrong = sorted(missing + mismatched)
    if wrong:
        raise ModelError(
            f"The backbone of {source} does not fit {name}: {len(wrong)} weights are missing or of another shape, the "
            f"first {wrong[0]}."
        )
    check_finite(source, trained, ModelError)
    model.backbone.load_state_dict(trained.state_dict())


# What decides what weights mean and not their shapes.
_ARCHITECTURE = ("layer_type", "depths", "hidden_act", "downsample_in_bottleneck", "downsample_in_first_stage",
                 "window_size", "qkv_bias")  # fmt: skip

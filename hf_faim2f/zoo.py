"""A model and its image processor from a folder or the Hub, or one sentence that says why not."""

from pathlib import Path
from typing import Any

from .data.dataset import Description
from .finite_weights import check_finite
from .hub.download import download_model
from .model.configuration_faim2f import FaiM2FConfig
from .model.image_processing_faim2f import FaiM2FImageProcessor
from .model.modeling_faim2f import FaiM2FForUniversalSegmentation
from .runtime.loading import quiet_loading, unfit_weights

# Settings of the configuration that tell a model's labels.
LABELS = frozenset({"id2label", "label2id", "num_labels"})


class ModelError(ValueError):
    """A model cannot be used. One sentence: which, what is wrong with it, what to do."""


def load_model(
    name: str | Path, *, new_weights: bool = False, begun_anew: "list[str] | None" = None, **overrides: Any
) -> tuple[FaiM2FForUniversalSegmentation, FaiM2FImageProcessor]:
    """The model and its processor.

    Args:
        name: a folder, or an id on the Hub. No code of it is run: the classes are this package's.
        new_weights: weights that `overrides` gave another shape begin anew; otherwise they are an error.
        begun_anew: gets the names of weights that did.
        overrides: settings of the configuration that shall differ, such as `id2label`.

    Raises:
        ModelError: there is no such model, it is of another kind, something of it is missing or does not fit, or a
            weight is not finite.
    """
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(f"{name} is no model's folder: it has no config.json.")
    kind = try_loading(name, "configuration", lambda: FaiM2FConfig.get_config_dict(str(name))[0]).get("model_type")
    if kind != FaiM2FConfig.model_type:
        raise ModelError(f"{name} is a model of type {kind!r}, not {FaiM2FConfig.model_type!r}.")
    place = folder if folder.is_dir() else try_loading(name, "files", lambda: download_model(str(name)))
    with quiet_loading():
        model, info = try_loading(
            name,
            "weights",
            lambda: FaiM2FForUniversalSegmentation.from_pretrained(
                str(place), output_loading_info=True, ignore_mismatched_sizes=True, **overrides
            ),
        )
    wrong, mismatched = unfit_weights(info)
    if not new_weights:
        wrong += mismatched
    if begun_anew is not None:
        begun_anew += mismatched
    if wrong:
        raise ModelError(
            f"The weights of {name} are not those of its config.json: {len(wrong)} are missing or of another shape, "
            f"the first {wrong[0]}."
        )
    check_finite(name, model, ModelError)
    processor = try_loading(name, "image processor", lambda: FaiM2FImageProcessor.from_pretrained(str(place)))
    model.config._name_or_path = str(name)  # not where the cache of this machine is
    if LABELS & set(overrides):
        # The processor's own stuff is of the labels that the model had.
        processor.label_ids_to_fuse = None
    _agree_on_stuff(name, model.config, processor)
    return model, processor


def _agree_on_stuff(name: str | Path, config: FaiM2FConfig, processor: FaiM2FImageProcessor) -> None:
    """The configuration says which classes are stuff; folders from before it did have it in the processor alone."""
    if config.label_ids_to_fuse is None:
        config.label_ids_to_fuse = processor.label_ids_to_fuse
    beyond = [label for label in config.label_ids_to_fuse or () if label >= config.num_labels]
    if beyond:
        raise ModelError(
            f"The image processor of {name} has the class {beyond[0]} in label_ids_to_fuse, but only the classes 0 to "
            f"{config.num_labels - 1}: mend preprocessor_config.json."
        )
    processor.take_labels_from(config)


def label_difference(name: str | Path, config: FaiM2FConfig, description: Description) -> str | None:
    """The first way in which a model's labels are not those of the data, as the beginning of a sentence; or None."""
    own = [config.id2label[index] for index in sorted(config.id2label)]
    if len(own) != len(description.labels):
        return f"{name} has {len(own)} classes, but {description.name} {len(description.labels)}"
    for index, (mine, theirs) in enumerate(zip(own, description.labels, strict=True)):
        if mine != theirs:
            return f"Class {index} is {mine!r} in {name}, but {theirs!r} in {description.name}"
    return None


def try_loading(name: str | Path, what: str, load: Any) -> Any:
    try:
        return load()
    # Whatever the network, the Hub, JSON, safetensors and transformers make of a name or of a stranger's files.
    except Exception as error:
        if Path(name).is_dir():
            raise ModelError(f"The {what} of {name} cannot be loaded: {_first_sentence(error)}") from error
        raise ModelError(
            f"{name} is no folder here, and loading its {what} from the Hub failed: {_first_sentence(error)}"
        ) from error


def _first_sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"

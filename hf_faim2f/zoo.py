"""Finds and opens a model by its name: a folder, a published model, or one on the Hub.

`resolve` returns the local folder of a model, and downloads and converts it if needed. All commands and `Predictor`
load weights through `open_model`. It runs no code from the folder, only this package's classes. Every error, whether
from a damaged folder, the network or a library, becomes a `ModelError` with a one-sentence message.
"""

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from huggingface_hub import constants
from torch import nn
from transformers.utils import logging

from .download import MODEL_FILES, WEIGHTS_URL, download_model, has_weights
from .errors import DamagedFileError, ModelError, nearest_name, try_loading
from .family import ALIASES, FAMILY, find_preset
from .family.mask2former import SHORT, ZOO_LICENSE, zoo, zoo_models_named
from .family.presets import WEIGHTS_LICENSE
from .files import read_object, sha256_of
from .model.configuration_faim2f import FaiM2FConfig
from .model.image_processing_faim2f import FaiM2FImageProcessor
from .model.modeling_faim2f import FaiM2FForUniversalSegmentation
from .model_cache import Source, cached_model, converted_model

SETTINGS_FILES = ("config.json", "preprocessor_config.json", "processor_config.json")
HUB_ID = re.compile(r"(?!\.{1,2}/)[\w.-]+/[\w.-]+")
CHECKPOINTS = (".pth", ".pt", ".pkl", ".safetensors")
MASK2FORMER_TYPE = "mask2former"  # transformers' model type
# Maximum number of weights named in a warning.
MOST_NAMED = 4
# Settings of the configuration that change the labels.
LABEL_SETTINGS = frozenset({"id2label", "label2id", "num_labels"})

logger = logging.get_logger(__name__)


def resolve(
    name: str | Path,
    *,
    error: type[ValueError] = ModelError,
    weights_url: str | None = None,
    files: Sequence[str] = MODEL_FILES,
    revision: str | None = None,
) -> Path:
    """The folder of a model; downloads and converts it if needed. Models in the cache need no network.

    Args:
        name: in this order,
            - a folder;
            - a published name, such as "fai-mf-m-ade" (Focoos), "mask2former/coco/panoptic/swin_tiny" or the name of
              its configuration, "coco/panoptic/maskformer2_swin_tiny_bs16_50ep" (Mask2Former's model zoo);
            - the Hub id of a model of this package, or of transformers' Mask2Former, which is converted.
        error: the exception class to raise.
        weights_url: for a published name, where to download from instead: the URL of the checkpoint file, or of a
            mirror with the same paths as the origin. None for the environment variable FAIM2F_WEIGHTS_URL.
        files: names of the files to download for a Hub id of a model of this package, with wildcards.
        revision: for a Hub id, a branch, tag or commit.

    Raises:
        ModelError: there is no such model, or it cannot be downloaded or converted. (Or `error`, if given.)
    """
    text = os.fspath(name)
    try:
        if Path(text).is_dir():
            if text in FAMILY or text in ALIASES or zoo_models_named(text):
                logger.warning_once(
                    f"{text} is a folder here and also a published model: the folder is used. Pass another name for "
                    "it, such as its full path, or move it, to use the published one."
                )
            return Path(text)
        published = published_source(text, weights_url)
        if published is not None:
            return converted_model(published)
        if not _is_hub_id(text):
            raise ModelError(_unknown(text))
        hub = _hub_source(text, revision)
        converted = cached_model(hub.name, hub.url)
        if converted is not None:
            return converted
        kind = model_type(text, revision=revision)
        if kind == FaiM2FConfig.model_type:
            return try_loading(text, "files", lambda: download_model(text, revision, files))
        if kind == MASK2FORMER_TYPE:
            return converted_model(hub)
        raise ModelError(
            f"{text} is a model of type {kind!r}, not {FaiM2FConfig.model_type!r} or {MASK2FORMER_TYPE!r}."
        )
    except ModelError as reason:
        if isinstance(reason, error):
            raise
        raise error(str(reason)) from reason


def own_folder(name: str | Path, error: type[ValueError] = ModelError) -> Path:
    """The folder of a model that may be written to or published; never one in the Hub's cache.

    Args:
        name: as in `resolve`. If it is neither a folder nor a known name, it is returned as a path.
        error: the exception class to raise.

    Raises:
        ModelError: the model is on the Hub, or cannot be downloaded or converted. (Or `error`, if given.)
    """
    path = Path(name)
    if path.is_dir() or (published_source(str(name)) is None and (path.parent.is_dir() or not _is_hub_id(str(name)))):
        return path
    folder = resolve(name, error=error)
    if folder.parent.name == "snapshots":  # in the Hub's cache
        raise error(
            f"{name} is on the Hub: download it to a folder of yours with `hf download {name} --local-dir DIR`, and "
            "name that."
        )
    return folder


def published_source(name: str, weights_url: str | None = None) -> Source | None:
    """The source of the published model with this name; None if there is none.

    Args:
        name, weights_url: as in `resolve`.

    Raises:
        ModelError: the name is ambiguous.
    """
    mirror = os.environ.get(WEIGHTS_URL, "").strip() if weights_url is None else weights_url
    if name in FAMILY or name in ALIASES:
        preset = find_preset(name)

        def from_focoos(file: Path, out_dir: Path) -> list[str]:
            from hf_faim2f.conversion.focoos import convert

            return convert(file, out_dir, preset.name, published=True).notes

        url = _mirrored(preset.weights_url, mirror)
        return Source(preset.name, preset.name, url, WEIGHTS_LICENSE, from_focoos, sha256=preset.sha256)
    found = zoo_models_named(name)
    if len(found) > 1:
        raise ModelError(f"{name} could be {', '.join(model.short for model in found)}: say which.")
    if not found:
        return None
    model = found[0]

    def from_zoo(file: Path, out_dir: Path) -> list[str]:
        from hf_faim2f.conversion.mask2former_zoo import convert

        return convert(file, out_dir, model.name).notes

    url = _mirrored(model.weights_url, mirror)
    return Source(model.short, model.short.replace("/", "-"), url, ZOO_LICENSE, from_zoo, md5=model.md5)


def _hub_source(name: str, revision: str | None = None) -> Source:
    """The source of transformers' Mask2Former with this Hub id, which need not exist."""
    url = f"{constants.ENDPOINT}/{name}" + (f"/tree/{revision}" if revision else "")
    title = name.split("/")[-1]

    def fetch() -> tuple[Path, str]:
        from hf_faim2f.conversion.mask2former import subtask_of

        if subtask_of(title) is None:
            raise ModelError(
                f"{name} does not say what it was trained for: convert it with `faim2f convert mask2former {name} "
                "OUT_DIR --subtask TASK`."
            )
        folder = try_loading(name, "files", lambda: download_model(name, revision))
        digests = "".join(f"{path.name} {sha256_of(path)}\n" for path in sorted(folder.iterdir()) if path.is_file())
        return folder, sha256_of(digests.encode())

    def from_transformers(folder: Path, out_dir: Path) -> list[str]:
        from hf_faim2f.conversion.mask2former import convert

        return convert(str(folder), out_dir, name=name).notes

    return Source(name, title, url, f"see {url}", from_transformers, fetch)


def _mirrored(url: str, mirror: str) -> str:
    """The URL at a mirror, which is the URL of the file itself, or a base with the same paths as the origin."""
    if not mirror or Path(urlsplit(mirror).path).suffix in CHECKPOINTS:
        return mirror or url
    return mirror.rstrip("/") + urlsplit(url).path


def _is_hub_id(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None and not name.startswith(f"{SHORT}/")


def _unknown(name: str) -> str:
    if Path(name).is_file():
        return f"{name} is a file, and not a model's folder: convert a checkpoint with `faim2f convert` first."
    known = [*FAMILY, *ALIASES, *(name for model in zoo().values() for name in (model.short, model.name))]
    nearest = nearest_name(name, known, 0.6)
    hint = f"did you mean {nearest}?" if nearest else "`faim2f models` lists the names."
    return f"{name} is not a folder here, nor the name of a published model, nor a Hub id; {hint}"


def open_model(
    name: str | Path, *, error: type[ValueError] = ModelError
) -> tuple[FaiM2FForUniversalSegmentation, FaiM2FImageProcessor]:
    """Opens a model in float32, on the CPU and in evaluation mode, with its image processor.

    Args:
        name: a folder, a published name, or a Hub id; see `resolve`.
        error: the exception class to raise.

    Raises:
        ModelError: there is no such model, it is of another type, its files are incomplete or inconsistent, or a weight
            is not finite. (Or `error`, if given.)
    """
    model, processor, _ = _open(name, error, {})
    return model, processor


def open_with_settings(
    name: str | Path, **settings: Any
) -> tuple[FaiM2FForUniversalSegmentation, FaiM2FImageProcessor, list[str]]:
    """Opens a model with some settings of its configuration changed, such as `id2label`.

    Args:
        name: as in `open_model`.
        settings: parameters of `FaiM2FConfig`.

    Returns:
        The model, its image processor, and the sorted names of the weights whose shape the settings changed: these are
        randomly initialized.

    Raises:
        ModelError: as in `open_model`.
    """
    return _open(name, ModelError, settings)


def open_settings(
    name: str | Path, *, error: type[ValueError] = ModelError
) -> tuple[FaiM2FConfig, FaiM2FImageProcessor]:
    """The configuration and the image processor of a model, without its weights.

    Args:
        name, error: as in `open_model`.

    Raises:
        ModelError: as in `open_model`.
    """
    place = resolve(name, error=error, files=SETTINGS_FILES)
    _check_files(name, place, error, weights=False)
    config = try_loading(name, "configuration", lambda: FaiM2FConfig.from_pretrained(place), error)
    processor = try_loading(name, "image processor", lambda: FaiM2FImageProcessor.from_pretrained(place), error)
    _agree_on_stuff(name, config, processor, error)
    return config, processor


def _open(
    name: str | Path, error: type[ValueError], settings: Mapping[str, Any]
) -> tuple[FaiM2FForUniversalSegmentation, FaiM2FImageProcessor, list[str]]:
    place = resolve(name, error=error)
    _check_files(name, place, error)
    processor = try_loading(name, "image processor", lambda: FaiM2FImageProcessor.from_pretrained(place), error)
    model, missing, mismatched = load_weights(
        name, lambda **how: FaiM2FForUniversalSegmentation.from_pretrained(place, **how, **settings), error
    )
    wrong = missing if settings else missing + mismatched
    if wrong:
        raise error(
            f"The weights of {name} are not those of its config.json: {len(wrong)} are missing or of another shape, "
            f"the first {wrong[0]}."
        )
    check_finite(name, model, error)
    model.config._name_or_path = str(name)  # not the path in the local cache
    if LABEL_SETTINGS & set(settings):
        processor.label_ids_to_fuse = None  # these are ids of the old labels
    _agree_on_stuff(name, model.config, processor, error)
    return model.eval(), processor, mismatched


def model_type(name: str | Path, error: type[ValueError] = ModelError, revision: str | None = None) -> str | None:
    """The `model_type` of a model in a folder or on the Hub; that of this package for a published name.

    Raises:
        ModelError: there is no such model. (Or `error`, if given.)
    """
    if not Path(name).is_dir() and published_source(str(name)) is not None:
        return FaiM2FConfig.model_type
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise error(f"{name} is not a model folder: it has no config.json.")
    values: Any = try_loading(
        name, "configuration", lambda: FaiM2FConfig.get_config_dict(str(name), revision=revision)[0], error
    )
    return values.get("model_type") if isinstance(values, dict) else None  # any JSON


def check_type(name: str | Path, error: type[ValueError] = ModelError) -> None:
    """Raises `error` if there is no such model, or it is not of this package's type."""
    kind = model_type(name, error)
    if kind != FaiM2FConfig.model_type:
        raise error(f"{name} is a model of type {kind!r}, not {FaiM2FConfig.model_type!r}.")


def _check_files(name: str | Path, place: Path, error: type[ValueError], weights: bool = True) -> None:
    """Raises `error` if a folder lacks a part of a model: transformers' own messages would take it for a Hub id."""
    check_type(place, error)
    present = [*place.glob("preprocessor_config.json"), *place.glob("processor_config.json")]
    if not present:
        raise error(
            f"{name} has no preprocessor_config.json, which says how images are resized: copy that of the model that "
            "it was trained from, or write one with FaiM2FImageProcessor(size=...).save_pretrained."
        )
    index = place / "model.safetensors.index.json"
    is_split = weights and not (place / "model.safetensors").is_file() and not any(place.glob("pytorch_model*.bin*"))
    if is_split and not index.is_file():
        exported = next((file for file in RUNTIME_FILES.values() if (place / file).is_file()), None)
        what = f", but {exported}: name the folder that it was exported from" if exported else ": copy them there"
        raise error(f"{name} has no weights (model.safetensors){what}.")
    for path in [*present, *([index] if is_split else [])]:
        try:
            values = read_object(path)
        except ValueError as reason:
            raise error(f"{path} is damaged ({reason}): copy it again, or save the model again.") from reason
    parts = values.get("weight_map") if is_split else None
    names = sorted(map(str, parts.values())) if isinstance(parts, dict) else []
    if lacking := [part for part in names if not (place / part).is_file()]:
        raise error(f"{name} lacks {lacking[0]}, a part of its weights: copy it there.")


def load_weights(
    name: str | Path, load: Callable[..., tuple[nn.Module, Mapping[str, Any]]], error: type[ValueError] = ModelError
) -> tuple[Any, list[str], list[str]]:
    """Loads weights without transformers' own report on missing and mismatched ones.

    Weights that the model does not have are dropped, with a warning of one line.

    Args:
        name: the folder or Hub id, for error messages.
        load: passes its keywords to `from_pretrained` of a class.
        error: the exception class to raise.

    Returns:
        The model in float32, the sorted names of the missing weights, and those of the weights with another shape.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        how: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = try_loading(name, "weights", lambda: load(**how), error)
    finally:
        logging.set_verbosity(verbosity)
    dropped = sorted(map(str, info["unexpected_keys"]))
    if dropped:
        more = f" and {len(dropped) - MOST_NAMED} more" if len(dropped) > MOST_NAMED else ""
        logger.warning(f"Weights of {name} that the model does not use are dropped: "
                       f"{', '.join(dropped[:MOST_NAMED])}{more}.")  # fmt: skip
    # transformers 4.57 returns names, 5.x tuples of a name and two shapes.
    mismatched = [entry if isinstance(entry, str) else str(entry[0]) for entry in info["mismatched_keys"]]
    return model, sorted(map(str, info["missing_keys"])), sorted(mismatched)


def first_not_finite(model: nn.Module) -> str | None:
    """The name of the first parameter or buffer with a value that is NaN or infinite; None if all are finite."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return name
    return None


def check_finite(source: str | Path, model: nn.Module, error: type[Exception] = ModelError) -> None:
    """Raises `error` if a model has NaN or infinite weights: it would silently predict a single class everywhere.

    Args:
        source: the folder or Hub id of the weights, for the message.
        model: a model whose weights are loaded.
        error: the exception class to raise.
    """
    name = first_not_finite(model)
    if name is not None:
        raise error(
            f"{source} has weights that are not finite, the first {name}: the training that wrote them diverged. Take "
            "an earlier checkpoint, or train again with a lower learning rate."
        )


def _agree_on_stuff(
    name: str | Path, config: FaiM2FConfig, processor: FaiM2FImageProcessor, error: type[ValueError]
) -> None:
    """Makes the configuration and the image processor agree on the stuff classes.

    The configuration takes precedence. In older folders, only the image processor has them.
    """
    if config.label_ids_to_fuse is None:
        config.label_ids_to_fuse = processor.label_ids_to_fuse
    beyond = [label for label in config.label_ids_to_fuse or () if label >= config.num_labels]
    if beyond:
        raise error(
            f"The image processor of {name} has the class {beyond[0]} in label_ids_to_fuse, but only the classes 0 to "
            f"{config.num_labels - 1}: correct preprocessor_config.json."
        )
    processor.take_labels_from(config)


def label_difference(name: str | Path, config: FaiM2FConfig, dataset: str, labels: Sequence[str]) -> str | None:
    """The first difference between the labels of a model and of a dataset, as the start of a sentence, or None."""
    own = [config.id2label[index] for index in sorted(config.id2label)]
    if len(own) != len(labels):
        return f"{name} has {len(own)} classes, but {dataset} {len(labels)}"
    for index, (mine, theirs) in enumerate(zip(own, labels, strict=True)):
        if mine != theirs:
            return f"Class {index} is {mine!r} in {name}, but {theirs!r} in {dataset}"
    return None


# The file whose presence shows that a folder supports a runtime; for torch, see `download.has_weights`.
RUNTIME_FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.engine", "aotinductor": "model.pt2"}
RUNTIME_FILES |= {"openvino": "openvino_model.xml", "executorch": "model.pte", "litert": "model.tflite"}
# Used only if requested by name, not because the file exists.
NATIVE_CODE = ("tensorrt", "aotinductor", "executorch", "litert")


def runtimes_of(name: str | Path, asked: Collection[str] = ()) -> list[str]:
    """The runtimes for which a model's folder has files; those in `NATIVE_CODE` only if they are in `asked`.

    For a Hub id, or a folder without any, it is "torch"; loading then raises an error that names the missing file.
    """
    folder = Path(name)
    files = {runtime: file for runtime, file in RUNTIME_FILES.items() if runtime not in NATIVE_CODE or runtime in asked}
    able = [runtime for runtime, file in files.items() if (folder / file).is_file()]
    return ["torch", *able] if not able or has_weights(folder) else able


__all__ = [
    "DamagedFileError",
    "check_finite",
    "check_type",
    "download_model",
    "first_not_finite",
    "label_difference",
    "load_weights",
    "model_type",
    "open_model",
    "open_settings",
    "open_with_settings",
    "own_folder",
    "published_source",
    "resolve",
    "runtimes_of",
    "try_loading",
]

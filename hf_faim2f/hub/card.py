"""The model card: a template whose every fact comes from `family/`, the configuration, the conversion or evaluations.

What a person wrote in a card stays when it is made anew; see `sections`.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..family import ALIASES, DATASETS, FAMILY, Preset
from ..model.configuration_faim2f import FaiM2FConfig
from ..model.modeling_faim2f import FaiM2FForUniversalSegmentation
from ..version import __version__
from .results import METRIC_TYPES, TASK, TASK_NAME
from .sections import MARK, keep_own_words, split_sections

TEMPLATE = Path(__file__).with_name("card_template.md")
# Words for the task in the card.
TASKS = {"semantic": "semantic segmentation", "instance": "instance segmentation", "panoptic": "panoptic segmentation"}
POST_PROCESSING = {
    "semantic": "post_process_semantic_segmentation",
    "instance": "post_process_instance_segmentation",
    "panoptic": "post_process_panoptic_segmentation",
}
# What the Hub's own template has where nobody wrote anything. A card with it is not published.
HOLE = "[More Information Needed]"
FOCOOS_URL = "https://github.com/FocoosAI/focoos"
PUBLISHED, AGAIN = "as published by Focoos", "evaluated again by Focoos"
# Focoos's name of a figure: ours, and the Hub's name of its kind.
FIGURES = {
    "mIoU": ("mIoU", METRIC_TYPES["mIoU"]),
    "mAcc": ("mACC", METRIC_TYPES["mACC"]),
    "sem_seg/mIoU": ("mIoU", METRIC_TYPES["mIoU"]),
    "sem_seg/fwIoU": ("fwIoU", "fwiou"),
    "sem_seg/mACC": ("mACC", METRIC_TYPES["mACC"]),
    "sem_seg/pACC": ("pACC", METRIC_TYPES["pACC"]),
    **{f"segm/{name}": (name, METRIC_TYPES.get(name, name.lower())) for name in ("AP", "AP50", "AP75")},
    **{f"segm/{name}": (name, name.lower()) for name in ("APs", "APm", "APl")},
}
SPEEDS = {
    "fps_t4_tensorrt_640": "TensorRT, images of 640x640",
    "fps_t4_tensorrt": "TensorRT",
}
REPOSITORY = re.compile(r'^repository = "(?:[^"\\]|\\.)*"$', re.MULTILINE)
DETAILS = re.compile(r"<details><summary>(.*?)</summary>\s*(.*?)\s*</details>", re.DOTALL)
CITATIONS = {
    "mask2former": """\
@inproceedings{cheng2022mask2former,
  title = {Masked-attention Mask Transformer for Universal Image Segmentation},
  author = {Cheng, Bowen and Misra, Ishan and Schwing, Alexander G. and Kirillov, Alexander and Girdhar, Rohit},
  booktitle = {CVPR},
  year = {2022}
}""",
    "focoos": f"""\
@misc{{focoos,
  title = {{FAI-MF: Mask2Former optimized by FocoosAI}},
  author = {{FocoosAI}},
  howpublished = {{\\url{{{FOCOOS_URL}}}}}
}}""",
    "faim2f_stdc": """\
@inproceedings{fan2021rethinking,
  title = {Rethinking {BiSeNet} For Real-time Semantic Segmentation},
  author = {Fan, Mingyuan and Lai, Shenqi and Huang, Junshi and Wei, Xiaoming and Chai, Zhenhua and Luo, Junfeng and
    Wei, Xiaolin},
  booktitle = {CVPR},
  year = {2021}
}""",
    "resnet": """\
@inproceedings{he2016deep,
  title = {Deep Residual Learning for Image Recognition},
  author = {He, Kaiming and Zhang, Xiangyu and Ren, Shaoqing and Sun, Jian},
  booktitle = {CVPR},
  year = {2016}
}""",
}


@dataclass(frozen=True)
class Provenance:
    """Where a converted model's weights came from; the card's metadata keeps it.

    Args:
        file: the name of the source checkpoint's file.
        sha256: the hexadecimal digest of that file.
        started_from: what the backbone was initialized with before training, as the source's configuration says.
        library: whose format it was: "Focoos", "transformers", or "Mask2Former" for that of the original repository.
        model: what it was called there, where that is another name.
        error: the largest difference from the source's logits that was measured, as a share of the largest; None where
            the source's library was not run.
        converter: what converted it, with its version.
    """

    file: str
    sha256: str
    started_from: dict[str, Any] = field(default_factory=dict)
    library: str = "Focoos"
    model: str | None = None
    error: float | None = None
    converter: str = f"hf_faim2f {__version__}"


@dataclass(frozen=True)
class Training:
    """How the weights were trained; the card's metadata keeps it, so that a card that is made anew still tells it.

    Args:
        recipe: its name.
        settings: of it, by what they are called in the card.
        augmentations: what was done to each training image, in order.
        trainer: what trained it, with its version.
        data, split, images: what it was trained on, which part, and how many images; None where nobody said.
        started_from: a model's id on the Hub or what it is called; None where nobody said.
        losses: the last that were logged, by their names.
        curve: the file of the folder with losses and metrics over the steps; None for none.
    """

    recipe: str
    settings: dict[str, Any]
    augmentations: list[str] = field(default_factory=list)
    trainer: str = f"hf_faim2f {__version__}"
    data: str | None = None
    split: str | None = None
    images: int | None = None
    started_from: str | None = None
    losses: dict[str, float] = field(default_factory=dict)
    curve: str | None = None


def model_card(
    name: str,
    config: FaiM2FConfig,
    provenance: Provenance | None = None,
    *,
    size: Mapping[str, int] | None = None,
    results: Iterable[EvalResult] = (),
    tables: Mapping[str, str] | None = None,
    license: str | None = None,
    repository: str | None = None,
    before: str = "",
    training: Training | None = None,
) -> str:
    """The README.md of a model, with the Hub's metadata in front.

    Args:
        name: what the model is called; a name of the family, converted from Focoos's format, brings what is published.
        config: the model's configuration.
        provenance: the source checkpoint of a converted model; by default that of the card before.
        size: the image processor's.
        results: what evaluations measured; those of the card before stay where these do not replace them.
        tables: Markdown tables to fold away below the results, by what they are called.
        license: the Hub's id of a licence; by default that of the card before, or the one known from the provenance.
        repository: what the snippets load; by default `name`.
        before: the card that this one replaces; what a person wrote in it stays.
        training: how the weights were trained; by default as the card before tells it.

    Raises:
        ValueError: the metadata of the card before is not what the Hub takes.
    """
    metadata, words = _read(before)
    provenance = provenance or read_provenance(before)
    training = training or _read_training(metadata)
    preset = _preset(name, config, provenance)
    task = str(config.postprocessing_type)
    data: Any = ModelCardData(**metadata)
    data.library_name, data.pipeline_tag = "transformers", TASK
    data.tags = _joined(["faim2f", "mask2former", f"{task}-segmentation", "vision"], data.tags)
    if preset is not None:
        data.datasets = _joined([DATASETS[preset.dataset].hub_id], data.datasets)
    _set_license(data, license, provenance)
    if provenance is not None:
        data.provenance = {key: value for key, value in asdict(provenance).items() if value not in (None, {})}
    if training is not None:
        data.training = {key: value for key, value in asdict(training).items() if value not in (None, {}, [])}
    new = list(results)
    kept = [
        result
        for result in data.eval_results or []
        if result.dataset_config not in (PUBLISHED, AGAIN) and not any(_same(result, other) for other in new)
    ]
    data.model_name = name
    data.eval_results = [*_published_results(preset), *kept, *new] or None
    published = _published_table(preset)  # first, and not as an earlier card had it
    folded = {**published, **_tables(words), **published, **(tables or {})}
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        mark=MARK,
        title=_plain(name),
        repository=json.dumps(repository or name),
        task=task,
        post_process=POST_PROCESSING[task],
        introduction=_introduction(task, config, provenance, preset),
        architecture=_architecture(config, preset, size),
        labels=[_plain(config.id2label[index]) for index in sorted(config.id2label)],
        limits=_limits(task, config, preset),
        training=_training(config, provenance, preset, training),
        measurements=_results(data.eval_results or [], folded),
        speed=_speed(preset),
        provenance=_provenance(provenance, preset, training),
        licence=_licence(data, provenance),
        citation=_citation(config, provenance),
    )
    if words.strip():
        card.content = f"---\n{data.to_yaml()}\n---\n\n{keep_own_words(card.text, words)}"
    return str(card).rstrip() + "\n"


def load_from(card: str, repository: str) -> str:
    """The card with snippets that load this folder or Hub id."""
    return REPOSITORY.sub(lambda _: f"repository = {json.dumps(repository)}", card)


def read_provenance(card: str) -> Provenance | None:
    """What a card's metadata says of the source checkpoint; None where there is nothing that can be used."""
    metadata, _ = _read(card)
    found = metadata.get("provenance")
    names = {known.name for known in fields(Provenance)}
    if not isinstance(found, dict) or not {"file", "sha256"} <= set(found) <= names:
        return None
    words = [found.get(key, "") for key in ("file", "sha256", "library", "model", "converter")]
    error = found.get("error", 0.0)
    if not all(isinstance(word, str) for word in words) or not isinstance(error, (int, float)):
        return None
    started_from = found.get("started_from", {})
    return Provenance(**{**found, "started_from": started_from if isinstance(started_from, dict) else {}})


def _read_training(metadata: Mapping[str, Any]) -> Training | None:
    """What a card's metadata says of the training; None where there is nothing that can be used."""
    found = metadata.get("training")
    if not isinstance(found, dict) or not {"recipe", "settings"} <= set(found) <= {
        one.name for one in fields(Training)
    }:
        return None
    kinds: dict[str, type] = {"settings": dict, "losses": dict, "augmentations": list, "images": int}
    if not all(isinstance(value, kinds.get(key, str)) for key, value in found.items()):
        return None
    return Training(**found)


def without_results(card: str) -> str:
    """The card of weights that are trained further: what was measured of the old ones is gone, all else stays.

    Raises:
        ValueError: its metadata cannot be read.
    """
    metadata, words = _read(card)
    metadata.pop("model-index", None)
    sections = [s for s in split_sections(words) if not (s.heading == "Results" and s.is_generated)]
    front = f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n\n" if metadata else ""
    return front + "\n".join(str(section) for section in sections)


def title_of(card: str) -> str | None:
    """What a card calls its model: in its metadata, or in its first heading."""
    metadata, words = _read(card)
    index = metadata.get("model-index")
    if isinstance(index, list) and index and isinstance(index[0], dict) and isinstance(index[0].get("name"), str):
        return index[0]["name"]
    found = re.search(r"^# (.+)$", split_sections(words)[0].text, re.MULTILINE)
    return found[1].strip() if found else None


def _read(card: str) -> tuple[dict[str, Any], str]:
    """A card's metadata and its words.

    Raises:
        ValueError: the metadata cannot be read.
    """
    if not card.lstrip().startswith("---"):
        return {}, card
    try:
        parsed = ModelCard(card, ignore_metadata_errors=False)
    except (ValueError, TypeError, LookupError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(f"its metadata cannot be read ({str(error).splitlines()[0]})") from error
    return parsed.data.to_dict(), parsed.text


def _preset(name: str, config: FaiM2FConfig, provenance: Provenance | None) -> Preset | None:
    """The member of the family that this is: by its name, its labels and where it came from."""
    preset = FAMILY.get(ALIASES.get(name, name))
    if preset is None or provenance is None or provenance.library != "Focoos":
        return None
    labels = [config.id2label[index] for index in sorted(config.id2label)]
    return preset if labels == preset.labels else None


def _joined(first: list[str], second: Any) -> list[str]:
    more = [second] if isinstance(second, str) else second or []
    return list(dict.fromkeys([*first, *more]))


def _set_license(data: Any, license: str | None, provenance: Provenance | None) -> None:
    if license is not None:
        data.license = license
        if license != "other":
            data.license_name = data.license_link = None
    elif data.license is None and provenance is not None:
        data.license = "other"
        if provenance.library == "Focoos":
            data.license_name, data.license_link = "focoos", FOCOOS_URL
        else:
            data.license_name = "as-the-source"


def _published_results(preset: Preset | None) -> list[EvalResult]:
    if preset is None:
        return []
    dataset = DATASETS[preset.dataset]
    return [
        EvalResult(
            task_type=TASK,
            task_name=TASK_NAME,
            dataset_type=dataset.format,
            dataset_name=dataset.name,
            dataset_config=who,
            dataset_split=dataset.split,
            metric_type=FIGURES[key][1],
            metric_name=FIGURES[key][0],
            metric_value=value,
            source_name="Focoos",
            source_url=FOCOOS_URL,
        )
        for who, figures in ((PUBLISHED, preset.published), (AGAIN, preset.re_evaluated))
        for key, value in figures.items()
        if key in FIGURES
    ]


def _published_table(preset: Preset | None) -> dict[str, str]:
    """Each class in what Focoos published and evaluated again, folded by what it is called."""
    if preset is None:
        return {}
    columns = {f"IoU, {PUBLISHED}": preset.published.get("per_class_IoU", {})}
    for prefix, title in (("sem_seg/IoU-", "IoU"), ("sem_seg/ACC-", "ACC"), ("segm/AP-", "AP")):
        # Some of the labels end in a space there.
        values = {
            key.removeprefix(prefix).strip(): value
            for key, value in preset.re_evaluated.items()
            if key.startswith(prefix)
        }
        columns[f"{title}, {AGAIN}"] = values
    columns = {title: {key.strip(): value for key, value in values.items()} for title, values in columns.items()}
    columns = {title: values for title, values in columns.items() if values}
    if not columns:
        return {}
    lines = ["| class | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for label in preset.labels:
        cells = [values.get(label.strip()) for values in columns.values()]
        lines.append(
            f"| {_plain(label)} | " + " | ".join("–" if cell is None else f"{cell:.2f}" for cell in cells) + " |"
        )
    return {f"Each class, {_figures_of(preset)}": "\n".join(lines)}


def _figures_of(preset: Preset) -> str:
    return f"by Focoos on {DATASETS[preset.dataset].name} ({DATASETS[preset.dataset].split})"


def _tables(words: str) -> dict[str, str]:
    """The folded tables of a card's generated results."""
    found = [section for section in split_sections(words) if section.heading == "Results" and section.is_generated]
    return dict(DETAILS.findall(found[0].text)) if found else {}


def _same(one: EvalResult, other: EvalResult) -> bool:
    return one.unique_identifier == other.unique_identifier and (one.metric_type, one.metric_name) == (
        other.metric_type,
        other.metric_name,
    )


def _introduction(task: str, config: FaiM2FConfig, provenance: Provenance | None, preset: Preset | None) -> str:
    what = TASKS[task]
    if provenance is not None and provenance.library == "transformers":
        return (
            f"Mask2Former for {what}, converted from transformers' own model to `hf_faim2f`: the same answers, with "
            "exports to ONNX and TensorRT and a faster post-processing."
        )
    if provenance is not None and provenance.library == "Mask2Former":
        return (
            f"Mask2Former for {what}, converted from a checkpoint of its original repository "
            f"(facebookresearch/Mask2Former, `{_plain(provenance.model)}`) to Hugging Face transformers."
        )
    kind = (
        "Mask2Former with deformable attention."
        if config.pixel_decoder_type == "deformable"
        else "Mask2Former with a feature pyramid in place of deformable attention, made for speed."
    )
    if provenance is None:
        return f"A model for {what} of {_count(config)} classes, made with `hf_faim2f`: {kind}"
    subject = f"{preset.summary}, " if preset is not None else ""
    data = f" of {DATASETS[preset.dataset].name}'s {len(preset.labels)} classes" if preset is not None else ""
    return (
        f"FAI-M2F for {what}{data}: {subject}by Focoos, converted from Focoos's checkpoint to Hugging Face "
        f"transformers. It is {kind}"
    )


def _count(config: FaiM2FConfig) -> int:
    return int(config.num_labels)


def _architecture(config: FaiM2FConfig, preset: Preset | None, size: Mapping[str, int] | None) -> str:
    backbone = config.backbone_config
    with torch.device("meta"):
        model = FaiM2FForUniversalSegmentation(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    depths = f", depths {list(backbone.depths)}" if hasattr(backbone, "depths") else ""
    lines = [
        f"- backbone: {_plain(backbone.model_type)}{depths}",
        f"- pixel decoder: {_pixel_decoder(config)}",
        f"- transformer decoder: {config.decoder_layers} layers, {config.num_queries} queries, "
        f"{_count(config)} classes",
        f"- {parameters / 1e6:.1f} million parameters",
    ]
    shown = size or ({"shortest_edge": preset.resolution} if preset is not None else None)
    if shown and "shortest_edge" in shown:
        longest = f", to at most {shown['longest_edge']} on the longer" if "longest_edge" in shown else ""
        lines.append(f"- images are resized to {shown['shortest_edge']} pixels on the shorter side{longest}")
    elif shown and {"height", "width"} <= set(shown):
        lines.append(f"- images are resized to {shown['height']}x{shown['width']} pixels, height by width")
    lines.append("- masks come out at a quarter of that size, and are enlarged to the image's own")
    return "\n".join(lines)


def _pixel_decoder(config: FaiM2FConfig) -> str:
    if config.pixel_decoder_type == "deformable":
        return (
            f"{config.encoder_layers} layers of deformable attention over three levels, {config.feature_size} channels"
        )
    above = f", {config.encoder_layers} transformer layers on its coarsest level" if config.encoder_layers else ""
    return f"feature pyramid of {config.feature_size} channels{above}"


def _limits(task: str, config: FaiM2FConfig, preset: Preset | None) -> str:
    answers = {
        "semantic": "It names the class of every pixel, and does not tell two objects of a class apart.",
        "instance": "It finds objects, each with a class, a score and a mask; of what is between them it says nothing.",
        "panoptic": "It divides the image into segments, each an object or a surface with its class.",
    }
    lines = [answers[task]]
    if preset is not None:
        dataset = DATASETS[preset.dataset]
        lines.append(
            f"It knows {dataset.name}'s classes in {dataset.scenes}. For other classes it is a start to fine-tune "
            "from; on other pictures (drawings, medical or aerial images) nothing was measured."
        )
        lines.append(f"Of the data: {dataset.terms}.")
    else:
        lines.append("It knows the classes that it was trained on, in pictures like those of its training.")
    lines.append(
        f'Whatever is in the image is divided over its classes and "nothing": scores below {config.threshold:g} are '
        "left out where a threshold applies, and are no probabilities of being right. Details of fewer than four "
        "pixels of the resized image are lost in the masks. It is not meant to decide about people or their safety."
    )
    return "\n".join(lines)


def _training(
    config: FaiM2FConfig, provenance: Provenance | None, preset: Preset | None, training: Training | None
) -> str:
    if training is not None:
        return _trained(config, training)
    if provenance is None:
        return (
            f"{HOLE}: write what it was trained on and how, and take the line above away; "
            "`run.yaml` and `log.json` of the training have it."
        )
    owner = "Focoos" if provenance.library == "Focoos" else "the authors of the source"
    lines = []
    if preset is not None:
        dataset = DATASETS[preset.dataset]
        lines.append(
            f"- data: [{dataset.name}]({dataset.url}), {dataset.training:,} images in its training part, "
            f"{len(preset.labels)} classes"
        )
    lines.append(f"- trained by {owner}; nothing was trained for the conversion")
    layers = "of every decoder layer" if config.use_auxiliary_loss else "of the last decoder layer alone"
    lines.append(
        f"- losses, as the source's configuration has them: cross-entropy of the classes (weight "
        f"{config.class_weight:g}), binary cross-entropy (weight {config.mask_weight:g}) and dice (weight "
        f"{config.dice_weight:g}) of the masks at {config.train_num_points:,} points, {layers}"
    )
    lines += [f"- it started from: {_plain(key)} = {_plain(value)}" for key, value in provenance.started_from.items()]
    lines.append("- schedule and augmentation are not part of the source checkpoint, and are not known here")
    return "\n".join(lines)


def _trained(config: FaiM2FConfig, training: Training) -> str:
    split = f" ({_plain(training.split)})" if training.split else ""
    images = f", {training.images:,} images" if training.images is not None else ""
    data = f"{_plain(training.data)}{split}{images}" if training.data else f"{HOLE}: what it was trained on"
    start = _plain(training.started_from) if training.started_from else f"{HOLE}: which weights it began with"
    layers = "of every decoder layer" if config.use_auxiliary_loss else "of the last decoder layer alone"
    lines = [
        f"- data: {data}",
        f"- it started from: {start}",
        f"- recipe: {_plain(training.recipe)} of `hf_faim2f`",
        *(f"- {_plain(key)}: {_plain(value)}" for key, value in training.settings.items()),
        f"- augmentation: {', '.join(map(_plain, training.augmentations)) or 'none'}",
        f"- losses: cross-entropy of the classes (weight {config.class_weight:g}), binary cross-entropy (weight "
        f"{config.mask_weight:g}) and dice (weight {config.dice_weight:g}) of the masks at "
        f"{config.train_num_points:,} points, {layers}",
    ]
    if training.losses:
        shown = ", ".join(f"{_plain(key)} {_plain(value)}" for key, value in training.losses.items())
        lines.append(f"- losses at the end: {shown}")
    lines.append(f"- trained by {_plain(training.trainer)}")
    if training.curve:
        lines += ["", f"![Losses and metrics over the steps]({_plain(training.curve)})"]
    return "\n".join(lines)


def _results(results: list[EvalResult], tables: Mapping[str, str]) -> str:
    if not results and not tables:
        return "Nothing was measured yet: `faim2f evaluate` does, and writes it here."
    groups: dict[tuple[str, ...], list[EvalResult]] = {}
    for result in results:
        key = tuple(_plain(part or "") for part in (result.dataset_name, result.dataset_split, result.dataset_config))
        groups.setdefault(key, []).append(result)
    parts = []
    for (dataset, split, config), group in groups.items():
        who = f", {config}" if config else ""
        lines = [f"On {dataset}{f' ({split})' if split else ''}{who}, in per cent:", ""]
        lines += ["| figure | value |", "| --- | --- |"]
        lines += [f"| {_plain(result.metric_name or result.metric_type)} | {_value(result)} |" for result in group]
        parts.append("\n".join(lines))
    for summary, table in tables.items():
        parts.append(f"<details><summary>{summary}</summary>\n\n{table}\n\n</details>")
    return "\n\n".join(parts)


def _value(result: EvalResult) -> str:
    value = result.metric_value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return _plain(value)
    return f"{value:.2f}" if result.source_url else f"{value:.1f}"


def _speed(preset: Preset | None) -> str:
    rows = [] if preset is None else [(SPEEDS[key], preset.published[key]) for key in SPEEDS if key in preset.published]
    if not rows:
        return "Not measured yet: `faim2f benchmark` does, on the machine where it runs."
    lines = ["| on | frames per second |", "| --- | --- |"]
    lines += [f"| NVIDIA T4, {where} | {value} |" for where, value in rows]
    return "\n".join([*lines, "", "As Focoos published them, of Focoos's own implementation; not measured again here."])


def _provenance(provenance: Provenance | None, preset: Preset | None, training: Training | None) -> str:
    if provenance is None and training is not None and training.started_from:
        return (
            f"The weights come from the training that is told here, which started from {_plain(training.started_from)}."
        )
    if provenance is None:
        return "There is no source checkpoint: the weights come from the training that is told here."
    if provenance.library == "transformers":
        lines = [f"- source: transformers' `{_plain(provenance.model)}`, SHA-256 of its weights `{provenance.sha256}`"]
    else:
        lines = [f"- source file: `{_plain(provenance.file)}`, SHA-256 `{_plain(provenance.sha256)}`"]
        if preset is not None:
            lines.append(f"- where Focoos publishes it: {preset.weights_url}")
    lines.append(f"- converter: {_plain(provenance.converter)}")
    if provenance.error is not None:
        lines.append(f"- conversion error: {provenance.error:.1e} of the largest logit, measured on noise of 128x160")
    elif preset is not None:
        lines.append(
            "- conversion error: not measured on these weights, because Focoos's library was not there; on weights "
            "rebuilt from seeds it is at most 1e-4 of the largest value (`tests/model/test_exactness.py` of hf_faim2f)"
        )
    else:
        lines.append("- conversion error: not measured, because the source's library was not there")
    return "\n".join(lines)


def _licence(data: Any, provenance: Provenance | None) -> str:
    code = "The code in this repository is under Apache-2.0."
    if data.license is None:
        return f"{HOLE}: `faim2f card DIR --license apache-2.0`, or another id of the Hub, sets it. {code}"
    if data.license == "other" and provenance is not None:
        owner = f"Focoos's ({FOCOOS_URL})" if provenance.library == "Focoos" else "that of their source"
        return f"The licence of the weights is {owner}. {code}"
    link = f" ({_plain(data.license_link)})" if data.license_link else ""
    name = data.license_name if data.license == "other" and data.license_name else data.license
    return f"The weights are under {_plain(name)}{link}. {code}"


def _citation(config: FaiM2FConfig, provenance: Provenance | None) -> str:
    kind = config.backbone_config.model_type
    keys = ["mask2former"]
    if provenance is not None and provenance.library == "Focoos":
        keys.append("focoos")
    if kind in CITATIONS:
        keys.append(kind)
    elif "resnet" in kind:
        keys.append("resnet")
    return "\n\n".join(f"```bibtex\n{CITATIONS[key]}\n```" for key in keys)


def _plain(value: Any) -> str:
    """A stranger's word in Markdown: one line, no HTML, no end of a table's cell."""
    text = " ".join(str(value).split())
    for sign, written in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("`", "'")):
        text = text.replace(sign, written)
    return text


__all__ = [
    "HOLE",
    "Provenance",
    "Training",
    "load_from",
    "model_card",
    "read_provenance",
    "title_of",
    "without_results",
]

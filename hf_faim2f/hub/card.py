"""The model card: a template filled with facts from the configuration, the conversion, the training and evaluations.

Regenerating a card keeps the sections that its author wrote or edited; see `sections.py`.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..family import DATASETS, Preset
from ..model.configuration_faim2f import FaiM2FConfig
from ..model.modeling_faim2f import FaiM2FForUniversalSegmentation
from .card_facts import (
    AGAIN,
    FOCOOS_LICENSE,
    FOCOOS_URL,
    PUBLISHED,
    SOURCE_LICENSE,
    Provenance,
    Training,
    citations,
    family_member,
    published_classes,
    published_results,
    published_speeds,
    read_provenance,
    read_training,
    set_license,
)
from .results import folded_tables, merge_tables, merged_results, results_text
from .sections import MARK, TASK, edit_generated, keep_own_words, parse_card, plain, split_sections

TEMPLATE = Path(__file__).with_name("card_template.md")
POST_PROCESSING = {
    "semantic": "post_process_semantic_segmentation",
    "instance": "post_process_instance_segmentation",
    "panoptic": "post_process_panoptic_segmentation",
}
# The Hub's placeholder for missing text. `faim2f push` rejects cards that contain it.
HOLE = "[More Information Needed]"
QUOTED = r'"(?:[^"\\]|\\.)*"'
REPOSITORY = re.compile(
    r"^(?:from huggingface_hub import snapshot_download\s+)?"
    rf"repository = (?:{QUOTED}|snapshot_download\({QUOTED}, revision={QUOTED}\))(?=\r?$)",
    re.MULTILINE,
)


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
    """The README.md of a model, starting with the Hub's metadata.

    Args:
        name: the model's name. For a family member converted from Focoos's format, the published figures are added.
        config: the model's configuration.
        provenance: the source checkpoint of a converted model; by default that of the previous card.
        size: the image processor's `size`.
        results: new evaluation results; see `merged_results` for those of the previous card that they replace.
        tables: Markdown tables by caption, shown collapsed below the results.
        license: a Hub license id; by default that of the previous card, or that of the source.
        repository: the folder or Hub id that the snippets load; by default `name`.
        before: the card that this one replaces. Hand-written sections are kept.
        training: how the weights were trained; by default that of the previous card.

    Raises:
        ValueError: the metadata of the previous card is invalid.
    """
    metadata, words = parse_card(before)
    provenance = provenance or read_provenance(before)
    training = training or read_training(metadata)
    preset = family_member(name, config, provenance)
    task = str(config.postprocessing_type)
    data: Any = ModelCardData(**metadata)
    data.library_name, data.pipeline_tag = "transformers", TASK
    data.tags = _joined(["faim2f", "mask2former", f"{task}-segmentation", "vision"], data.tags)
    if preset is not None:
        data.datasets = _joined([DATASETS[preset.dataset].hub_id], data.datasets)
    set_license(data, license, provenance)
    if provenance is not None:
        data.provenance = {key: value for key, value in asdict(provenance).items() if value not in (None, {})}
    if training is not None:
        data.training = {key: value for key, value in asdict(training).items() if value not in (None, {}, [])}
    kept = [result for result in data.eval_results or [] if result.dataset_config not in (PUBLISHED, AGAIN)]
    data.model_name = name
    data.eval_results = [*published_results(preset), *merged_results(kept, list(results))] or None
    published = published_classes(preset)  # listed first; the current table replaces that of the previous card
    folded = merge_tables({**published, **folded_tables(words), **published}, tables or {})
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        mark=MARK,
        title=plain(name),
        repository=json.dumps(repository or name),
        task=task,
        post_process=POST_PROCESSING[task],
        **_snippets(config),
        introduction=_introduction(task, config, provenance, preset),
        architecture=_architecture(config, preset, size),
        labels=[plain(config.id2label[index]) for index in sorted(config.id2label)],
        limits=_limits(task, config, preset),
        training=_training(config, provenance, preset, training),
        measurements=results_text(data.eval_results or [], folded),
        speed=_speed(preset),
        provenance=_provenance(provenance, preset, training),
        license_text=_license_text(data),
        citation=citations(config, provenance),
    )
    if words.strip():
        card.content = f"---\n{data.to_yaml()}\n---\n\n{keep_own_words(card.text, words)}"
    return str(card).rstrip() + "\n"


def _snippets(config: FaiM2FConfig) -> dict[str, Any]:
    """The parts of the snippets that depend on the number of channels."""
    channels = getattr(config, "num_channels", 3)
    if channels == 3:
        return {
            "is_rgb": True,
            "import_image": "from PIL import Image, ImageOps",
            "open_image": 'image = ImageOps.exif_transpose(Image.open("photo.jpg"))  # upright, as the image processor '
            "sees it",
            "image_size": "(image.height, image.width)",
        }
    return {
        "is_rgb": False,
        "import_image": "import numpy as np",
        "open_image": f'image = np.load("image.npy")  # ({channels}, H, W), 8 or 16 bits: the model takes {channels} '
        f"channel{'s'[: channels != 1]}",
        "image_size": "image.shape[-2:]",
    }


def load_from(card: str, repository: str, revision: str | None = None) -> str:
    """Makes the snippets in the card's generated sections load this folder or Hub id.

    Args:
        card: the card.
        repository: a folder or Hub id.
        revision: a branch of that Hub id; None for its main branch.
    """
    line = f"repository = {json.dumps(repository)}"
    if revision is not None:
        end = "\r\n" if "\r\n" in card else "\n"
        line = (
            f"from huggingface_hub import snapshot_download{end}{end}"
            f"repository = snapshot_download({json.dumps(repository)}, revision={json.dumps(revision)})"
        )
    return edit_generated(card, lambda _, text: REPOSITORY.sub(lambda _: line, text))


def without_results(card: str) -> str:
    """Removes the evaluation results from a card, because its weights have been trained further.

    Raises:
        ValueError: the card's metadata is invalid.
    """
    metadata, words = parse_card(card)
    metadata.pop("model-index", None)
    sections = [s for s in split_sections(words) if not (s.heading == "Results" and s.is_generated)]
    front = f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n\n" if metadata else ""
    return front + "\n".join(str(section) for section in sections)


def title_of(card: str) -> str | None:
    """The model's name in a card: from its metadata, else its first heading, else None."""
    metadata, words = parse_card(card)
    index = metadata.get("model-index")
    if isinstance(index, list) and index and isinstance(index[0], dict) and isinstance(index[0].get("name"), str):
        return index[0]["name"]
    found = re.search(r"^# (.+)$", split_sections(words)[0].text, re.MULTILINE)
    return found[1].strip() if found else None


def _joined(first: list[str], second: Any) -> list[str]:
    more = [second] if isinstance(second, str) else second or []
    return list(dict.fromkeys([*first, *more]))


def _introduction(task: str, config: FaiM2FConfig, provenance: Provenance | None, preset: Preset | None) -> str:
    what = f"{task} segmentation"
    if provenance is not None and provenance.library == "transformers":
        return (
            f"Mask2Former for {what}, converted from the Mask2Former of Hugging Face transformers to `hf_faim2f`. It "
            "gives the same results, exports to ONNX and TensorRT, and has faster post-processing."
        )
    if provenance is not None and provenance.library == "Mask2Former":
        source = "of" if provenance.is_published else "trained with the code of"
        return (
            f"Mask2Former for {what}, converted from a checkpoint {source} the original repository "
            f"(facebookresearch/Mask2Former, `{plain(provenance.model)}`) to Hugging Face transformers."
        )
    kinds = {
        "deformable": "Mask2Former with multi-scale deformable attention.",
        "fpn": "Mask2Former with a feature pyramid in place of deformable attention, designed for speed.",
        "bisenet": "Mask2Former's transformer decoder on the pixel decoder of BiSeNet, designed for speed.",
    }
    kind = kinds[config.pixel_decoder_type]
    if provenance is None:
        return f"A model for {what} with {config.num_labels} classes, made with `hf_faim2f`. The architecture is {kind}"
    data, summary = "", ""
    if preset is not None:
        data = f" with the {len(preset.labels)} classes of {DATASETS[preset.dataset].name}"
        summary = f" ({preset.summary})"
    model = "BiSeNetFormer" if config.pixel_decoder_type == "bisenet" else "FAI-M2F"
    source = "Focoos's checkpoint" if provenance.is_published else "a checkpoint trained with Focoos's library"
    member = f" that of {plain(provenance.model)}:" if provenance.model else ""
    return (
        f"{model} for {what}{data}, converted from {source}{summary} to Hugging Face transformers. The architecture is"
        f"{member} {kind}"
    )


def _architecture(config: FaiM2FConfig, preset: Preset | None, size: Mapping[str, int] | None) -> str:
    backbone = config.backbone_config
    with torch.device("meta"):
        model = FaiM2FForUniversalSegmentation(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    depths = f", depths {list(backbone.depths)}" if hasattr(backbone, "depths") else ""
    lines = [
        f"- backbone: {plain(backbone.model_type)}{depths}",
        f"- pixel decoder: {_pixel_decoder(config)}",
        f"- transformer decoder: {config.decoder_layers} layers, {config.num_queries} queries, "
        f"{config.num_labels} classes",
        f"- parameters: {parameters / 1e6:.1f} million",
    ]
    shown = size or ({"shortest_edge": preset.resolution} if preset is not None else None)
    if shown and "shortest_edge" in shown:
        longest = f", the longer side at most {shown['longest_edge']} pixels" if "longest_edge" in shown else ""
        lines.append(
            f"- input: images are resized so that the shorter side has {shown['shortest_edge']} pixels{longest}"
        )
    elif shown and {"height", "width"} <= set(shown):
        lines.append(f"- input: images are resized to {shown['height']}x{shown['width']} pixels (height x width)")
    part = {2: "half", 4: "a quarter", 8: "an eighth"}.get(config.mask_stride, f"1/{config.mask_stride}")
    lines.append(f"- output: masks at {part} of that size, which the post-processing resizes to the original image")
    return "\n".join(lines)


def _pixel_decoder(config: FaiM2FConfig) -> str:
    if config.pixel_decoder_type == "deformable":
        return (
            f"{config.encoder_layers} layers of deformable attention over three levels, {config.feature_size} channels"
        )
    if config.pixel_decoder_type == "bisenet":
        return f"BiSeNet's context path and feature fusion with {config.feature_size} channels"
    above = f", {config.encoder_layers} transformer layers on its coarsest level" if config.encoder_layers else ""
    return f"feature pyramid with {config.feature_size} channels{above}"


def _limits(task: str, config: FaiM2FConfig, preset: Preset | None) -> str:
    descriptions = {
        "semantic": "The model assigns a class to every pixel. It does not separate objects of the same class.",
        "instance": "The model detects objects, each with a class, a score and a mask. It does not label the "
        "background.",
        "panoptic": "The model divides an image into segments. Each is one object, or one region of a class such as "
        "sky or road.",
    }
    lines = [descriptions[task]]
    if preset is not None:
        dataset = DATASETS[preset.dataset]
        lines.append(
            f"It recognizes the classes of {dataset.name}, whose images show {dataset.scenes}. For other classes, "
            "fine-tune it. It has not been evaluated on other kinds of images, such as drawings, medical or aerial "
            "images."
        )
        lines.append(f"Terms of the dataset: {dataset.terms}.")
    else:
        lines.append("It recognizes the classes that it was trained on, in images like its training images.")
    stride = {2: "two", 4: "four", 8: "eight"}.get(config.mask_stride, config.mask_stride)
    lines.append(
        f"Where a threshold applies, results with a score below {config.threshold:g} are dropped by default. Scores "
        f"are not calibrated probabilities. Masks lose details smaller than {stride} pixels of the resized image. The "
        "model is not intended for decisions about people or their safety."
    )
    return "\n".join(lines)


def _training(
    config: FaiM2FConfig, provenance: Provenance | None, preset: Preset | None, training: Training | None
) -> str:
    if training is not None:
        return _trained(config, training)
    if provenance is None:
        return (
            f"{HOLE}: describe the training data and the training here, and remove the comment above. `run.yaml` and "
            "`log.json` of the run have the details."
        )
    owner = "Focoos" if provenance.library == "Focoos" and provenance.is_published else "the authors of the source"
    lines = []
    if preset is not None:
        dataset = DATASETS[preset.dataset]
        lines.append(
            f"- data: [{dataset.name}]({dataset.url}), training set of {dataset.training:,} images, "
            f"{len(preset.labels)} classes"
        )
    lines.append(f"- trained by {owner}; the conversion involved no training")
    lines.append(f"- losses, from the source's configuration: {_losses(config)}")
    lines += [f"- started from: {plain(key)} = {plain(value)}" for key, value in provenance.started_from.items()]
    lines.append("- schedule and augmentation: unknown, because the source checkpoint does not contain them")
    return "\n".join(lines)


def _trained(config: FaiM2FConfig, training: Training) -> str:
    split = f" ({plain(training.split)})" if training.split else ""
    images = f", {training.images:,} images" if training.images is not None else ""
    data = f"{plain(training.data)}{split}{images}" if training.data else f"{HOLE}: the training data"
    start = plain(training.started_from) if training.started_from else f"{HOLE}: the weights that it started from"
    lines = [
        f"- data: {data}",
        f"- started from: {start}",
        f"- recipe: {plain(training.recipe)} of `hf_faim2f`",
        *(f"- {plain(key)}: {plain(value)}" for key, value in training.settings.items()),
        f"- augmentation: {', '.join(map(plain, training.augmentations)) or 'none'}",
        f"- losses: {_losses(config)}",
    ]
    if training.losses:
        shown = ", ".join(f"{plain(key)} {plain(value)}" for key, value in training.losses.items())
        lines.append(f"- losses at the end: {shown}")
    lines.append(f"- trained with {plain(training.trainer)}")
    if training.curve:
        lines += ["", f"![Losses and metrics over the steps]({plain(training.curve)})"]
    return "\n".join(lines)


def _losses(config: FaiM2FConfig) -> str:
    layers = "every decoder layer" if config.use_auxiliary_loss else "the last decoder layer only"
    return (
        f"cross-entropy of the classes (weight {config.class_weight:g}); binary cross-entropy (weight "
        f"{config.mask_weight:g}) and dice (weight {config.dice_weight:g}) of the masks at "
        f"{config.train_num_points:,} points; for {layers}"
    )


def _speed(preset: Preset | None) -> str:
    rows = published_speeds(preset)
    if not rows:
        return "Not measured yet. `faim2f benchmark` measures the speed on your machine."
    lines = ["| hardware and runtime | frames per second |", "| --- | ---: |"]
    lines += [f"| NVIDIA T4, {where} | {value} |" for where, value in rows]
    return "\n".join([*lines, "", "Published by Focoos for its own implementation; not measured with `hf_faim2f`."])


def _provenance(provenance: Provenance | None, preset: Preset | None, training: Training | None) -> str:
    if provenance is None:
        start = plain(training.started_from) if training is not None and training.started_from else None
        return "The weights come from the training described above" + (
            f", which started from {start}." if start else "; there is no source checkpoint."
        )
    if provenance.library == "transformers":
        lines = [f"- source: `{plain(provenance.model)}` of transformers, SHA-256 of its weights `{provenance.sha256}`"]
    else:
        lines = [f"- source file: `{plain(provenance.file)}`, SHA-256 `{plain(provenance.sha256)}`"]
        if preset is not None:
            lines.append(f"- published by Focoos at: {preset.weights_url}")
    lines.append(f"- converter: {plain(provenance.converter)}")
    if provenance.error is not None:
        lines.append(
            f"- conversion error: {provenance.error:.1e} of the largest logit, measured on a 128x160 image of noise"
        )
    elif preset is not None:
        lines.append(
            "- conversion error: not measured on these weights; on random weights, it is at most 1e-4 of the largest "
            "value"
        )
    else:
        lines.append("- conversion error: not measured")
    return "\n".join(lines)


def _license_text(data: Any) -> str:
    code = "The code in this repository is licensed under Apache-2.0."
    if data.license is None:
        return (
            f"{HOLE}: set the license of the weights with `faim2f card DIR --license apache-2.0`, or another Hub "
            f"license id. {code}"
        )
    if data.license == "other" and data.license_name == FOCOOS_LICENSE:
        return (
            f"The weights come from Focoos, who states no license for them ({FOCOOS_URL}): ask Focoos before you share "
            f"or sell what uses them. {code}"
        )
    if data.license == "other" and data.license_name == SOURCE_LICENSE:
        return f"The weights are under the source model's license. {code}"
    link = f" ({plain(data.license_link)})" if data.license_link else ""
    name = data.license_name if data.license == "other" and data.license_name else data.license
    names = " and ".join(plain(one) for one in (name if isinstance(name, list) else [name]))
    return f"The weights are licensed under {names}{link}. {code}"


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

"""The facts in a model card: where the weights come from, how they were trained, and their published figures.

They are stored in the card's metadata or come from `family/`; `card.py` turns them into text.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from huggingface_hub import EvalResult

from ..family import ALIASES, DATASETS, FAMILY, Preset
from ..model.configuration_faim2f import FaiM2FConfig
from ..version import __version__
from .results import FOCOOS, METRIC_TYPES, TASK_NAME, WHOLE, is_for_training, is_on_training
from .sections import TASK, parse_card, plain

FOCOOS_URL = "https://github.com/FocoosAI/focoos"
# The license names of weights whose card names no license: they are under that of their source.
FOCOOS_LICENSE, SOURCE_LICENSE = "focoos", "as-the-source"
PUBLISHED, AGAIN = "as published by Focoos", "evaluated again by Focoos"
# Focoos's name of a metric: our name, and the Hub's metric type.
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
    "fps_t4_torchscript_640": "TorchScript, images of 640x640",
    "fps_t4_onnxruntime_cuda_640": "ONNX Runtime (CUDA), images of 640x640",
}

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
    "bisenet": """\
@inproceedings{rosi2024bisenetformer,
  title = {The Revenge of {BiSeNet}: Efficient Multi-Task Image Segmentation},
  author = {Rosi, Gabriele and Cuttano, Claudia and Cavagnero, Niccol{\\`o} and Averta, Giuseppe and Cermelli, Fabio},
  booktitle = {CVPR Workshops},
  year = {2024}
}

@inproceedings{yu2018bisenet,
  title = {{BiSeNet}: Bilateral Segmentation Network for Real-time Semantic Segmentation},
  author = {Yu, Changqian and Wang, Jingbo and Peng, Chao and Gao, Changxin and Yu, Gang and Sang, Nong},
  booktitle = {ECCV},
  year = {2018}
}""",
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
    """The checkpoint that a model was converted from, as recorded in the card's metadata.

    Args:
        file: the name of the checkpoint file.
        sha256: the hexadecimal digest of that file.
        started_from: what the backbone was initialized with before training, from the source's configuration.
        library: the format of the checkpoint: "Focoos", "transformers", or "Mask2Former" (the original repository).
        model: the model's name in the source, if it differs; for weights that Focoos did not publish, the name of the
            published model with the same configuration.
        error: the largest difference from the source's logits, relative to the largest logit; None if not measured.
        converter: the converting program and its version.
        published: whether the file is one that the model's authors published, by its digest or its download, so that
            their figures are those of these weights; None if the converter, an earlier version, did not say.
    """

    file: str
    sha256: str
    started_from: dict[str, Any] = field(default_factory=dict)
    library: str = "Focoos"
    model: str | None = None
    error: float | None = None
    converter: str = f"hf_faim2f {__version__}"
    published: bool | None = None

    @property
    def is_published(self) -> bool:
        """Whether the weights are not known to be a stranger's."""
        return self.published is not False


@dataclass(frozen=True)
class Training:
    """How the weights were trained, as recorded in the card's metadata for later versions of the card.

    Args:
        recipe: the recipe's name.
        settings: its settings by their names in the card.
        augmentations: the augmentations of training images, in order.
        trainer: the training program and its version.
        data, split, images: the training dataset, its split and the number of images; None if unknown.
        started_from: the name or Hub id of the initial model; None if unknown.
        losses: the last logged losses, by name.
        curve: the file in the folder that plots losses and metrics over the steps, or None.
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


def read_provenance(card: str) -> Provenance | None:
    """The source checkpoint in a card's metadata; None if it is missing or malformed."""
    found = parse_card(card)[0].get("provenance")
    names = {known.name for known in fields(Provenance)}
    if not isinstance(found, dict) or not {"file", "sha256"} <= set(found) <= names:
        return None
    words = [found.get(key, "") for key in ("file", "sha256", "library", "model", "converter")]
    error = found.get("error", 0.0)
    if not all(isinstance(word, str) for word in words) or not isinstance(error, (int, float)):
        return None
    if not isinstance(found.get("published", True), bool):
        return None
    started_from = found.get("started_from", {})
    return Provenance(**{**found, "started_from": started_from if isinstance(started_from, dict) else {}})


def read_training(metadata: Mapping[str, Any]) -> Training | None:
    """The training in a card's metadata; None if it is missing or malformed."""
    found = metadata.get("training")
    names = {known.name for known in fields(Training)}
    if not isinstance(found, dict) or not {"recipe", "settings"} <= set(found) <= names:
        return None
    kinds: dict[str, type] = {"settings": dict, "losses": dict, "augmentations": list, "images": int}
    if not all(isinstance(value, kinds.get(key, str)) for key, value in found.items()):
        return None
    return Training(**found)


def includes_training(card: str, data: str, split: str, may_be_file: bool = False) -> bool:
    """Whether an evaluation is, or may be, on images of the model's training.

    It is on the same split or on the whole of the data that the card records, and may be on a split for training. If
    the card records other data, it is not.

    Args:
        card: the model's card, which records the training.
        data, split: the name of the data, and the part of it; "all" if it was not divided.
        may_be_file: whether the data may be a single file of annotations. Its split is always "all", and its name is
            often that of the files of other splits, so these say nothing.

    Raises:
        ValueError: the card's metadata is invalid.
    """
    training = read_training(parse_card(card)[0])
    if split == WHOLE and (may_be_file or training is None or training.data is None):
        return False
    if training is None or training.data is None:
        return is_for_training(split)
    return training.data == data and is_on_training(split, training.split)


def family_member(name: str, config: FaiM2FConfig, provenance: Provenance | None) -> Preset | None:
    """The family member whose published weights these are, by the model's name, labels and source; None if none."""
    preset = FAMILY.get(ALIASES.get(name, name))
    if preset is None or provenance is None or provenance.library != "Focoos" or not provenance.is_published:
        return None
    labels = [config.id2label[index] for index in sorted(config.id2label)]
    return preset if labels == preset.labels else None


def set_license(data: Any, license: str | None, provenance: Provenance | None) -> None:
    """Sets the license in a card's metadata.

    Args:
        data: `ModelCardData`, with the license of the previous card.
        license: a Hub license id; None to keep that of the previous card, or else to use that of the source.
        provenance: the source checkpoint, or None.
    """
    if license is not None:
        data.license = license
        if license != "other":
            data.license_name = data.license_link = None
    elif data.license is None and provenance is not None:
        data.license = "other"
        if provenance.library == "Focoos" and provenance.is_published:
            data.license_name, data.license_link = FOCOOS_LICENSE, FOCOOS_URL
        else:
            data.license_name = SOURCE_LICENSE


def published_results(preset: Preset | None) -> list[EvalResult]:
    """The metrics that Focoos published for a family member, and those of its later evaluation."""
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
            source_name=FOCOOS,
            source_url=FOCOOS_URL,
        )
        for who, figures in ((PUBLISHED, preset.published), (AGAIN, preset.re_evaluated))
        for key, value in figures.items()
        if key in FIGURES
    ]


def published_classes(preset: Preset | None) -> dict[str, str]:
    """The published per-class metrics as a Markdown table, by caption; empty if there are none."""
    if preset is None:
        return {}
    columns = {f"IoU, {PUBLISHED}": preset.published.get("per_class_IoU", {})}
    for prefix, title in (("sem_seg/IoU-", "IoU"), ("sem_seg/ACC-", "ACC"), ("segm/AP-", "AP")):
        columns[f"{title}, {AGAIN}"] = {
            key.removeprefix(prefix): value for key, value in preset.re_evaluated.items() if key.startswith(prefix)
        }
    # Some of Focoos's labels end in a space.
    columns = {title: {key.strip(): value for key, value in values.items()} for title, values in columns.items()}
    columns = {title: values for title, values in columns.items() if values}
    if not columns:
        return {}
    lines = ["| class | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for label in preset.labels:
        values = [column.get(label.strip()) for column in columns.values()]
        cells = ["–" if value is None else f"{value:.2f}" for value in values]
        lines.append(f"| {plain(label)} | {' | '.join(cells)} |")
    dataset = DATASETS[preset.dataset]
    return {f"Each class, by Focoos on {dataset.name} ({dataset.split})": "\n".join(lines)}


def published_speeds(preset: Preset | None) -> list[tuple[str, Any]]:
    """Focoos's setups on an NVIDIA T4 and their frames per second."""
    return [] if preset is None else [(SPEEDS[key], preset.published[key]) for key in SPEEDS if key in preset.published]


def citations(config: FaiM2FConfig, provenance: Provenance | None) -> str:
    """The papers and sources to cite for a model, as Markdown code blocks of BibTeX."""
    kind = config.backbone_config.model_type
    keys = ["mask2former"]
    if config.pixel_decoder_type == "bisenet":
        keys.append("bisenet")
    elif provenance is not None and provenance.library == "Focoos":
        keys.append("focoos")
    if kind in CITATIONS:
        keys.append(kind)
    elif "resnet" in kind:
        keys.append("resnet")
    return "\n\n".join(f"```bibtex\n{CITATIONS[key]}\n```" for key in keys)


__all__ = [
    "AGAIN",
    "FOCOOS_LICENSE",
    "FOCOOS_URL",
    "PUBLISHED",
    "SOURCE_LICENSE",
    "Provenance",
    "Training",
    "citations",
    "family_member",
    "includes_training",
    "published_classes",
    "published_results",
    "published_speeds",
    "read_provenance",
    "read_training",
    "set_license",
]

"""The folder of a run: its settings, its checkpoints, and the model card of the trained model.

`run.yaml` records the settings of the run, which must not change when it is resumed, except for those in `FREE`;
`counts.json` the images, pixels and segments of its data, by which a changed dataset is noticed.
"""

import json
import re
import shutil
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME

from ..data.augmentation import to_config
from ..data.counts import ClassCounts, number_of
from ..errors import FaiM2FError, ModelError, first_line
from ..evaluation.report import folded_table, scalars
from ..files import YamlLoader, write_whole
from ..hub.card import Training, model_card, title_of, without_results
from ..hub.results import Measured, is_on_training
from ..model.configuration_faim2f import FaiM2FConfig
from ..model.image_processing_faim2f import FaiM2FImageProcessor
from ..zoo import label_difference
from .recipe import Recipe

RUN_FILE = "run.yaml"
COUNTS_FILE = "counts.json"
BACKBONE = "backbone.safetensors"
FINAL = "final"
# Settings that may change when a run is resumed.
FREE = frozenset(
    "steps per_device_batch_size workers evaluate_every save_every log_every eval_limit subtasks samples tensorboard "
    "report_to patience out skip_bad license weights_url".split()
)
# Those that may not between the training of the backbone alone and the first checkpoint.
FREE_BUT_FOR_BACKBONE = frozenset(["steps"])
# Those that may not if the best evaluation is kept, because evaluations of different images cannot be compared.
FREE_BUT_FOR_BEST = frozenset(["eval_limit"])
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Logged losses (all but `loss` of the last layer), and their names in the card.
LOSSES = {
    "loss": "all layers",
    "loss_ce": "class",
    "loss_mask": "mask",
    "loss_dice": "dice",
    "teacher_ce": "class by the teacher",
    "teacher_mask": "mask by the teacher",
    "teacher_dice": "dice by the teacher",
    "teacher_pixel": "classes of pixels by the teacher",
}


@dataclass(frozen=True)
class Best:
    """The best evaluation of a run.

    Args:
        metric: "subtask metric".
        step: the step of the evaluated weights.
        value: the metric's value, in percent.
    """

    metric: str
    step: int
    value: float

    def __str__(self) -> str:
        return f"step {self.step}, the best by {self.metric} ({self.value:.2f})"


@dataclass(frozen=True)
class TrainedOn:
    """Facts for a run's card in addition to the recipe.

    Args:
        data: the name of the dataset; never a local path.
        dataset_type: the dataset's id, such as "ade20k".
        split, images: the training split and its number of images.
        evaluation_split, evaluation_images: the evaluation split and its number of images.
        left_out: number of images that could not be read.
        is_whole: whether the whole split was evaluated. If not, the card omits the metrics.
        shared: number of evaluation images whose files are also in the training split.
        started_from: the name or Hub id of the initial model.
        license: the Hub license id of the weights; None to leave it open.
        teacher: the name or Hub id of the model that it also learned from; never a local path.
        teacher_weight: the weight of the teacher's losses.
        unlabelled: the number of images without labels.
    """

    data: str
    dataset_type: str
    split: str
    images: int
    evaluation_split: str
    evaluation_images: int
    left_out: int = 0
    is_whole: bool = True
    shared: int = 0
    started_from: str | None = None
    license: str | None = None
    teacher: str | None = None
    teacher_weight: float = 1.0
    unlabelled: int = 0

    @property
    def is_on_training(self) -> bool:
        """Whether the evaluation is on images of the training, so that the card omits the metrics."""
        return self.shared > 0 or is_on_training(self.evaluation_split, self.split)


def last_checkpoint(out_dir: Path, settings: Mapping[str, Any]) -> Path | None:
    """The checkpoint from which a run with these settings resumes; None for a new run. Writes nothing.

    Raises:
        ValueError: the folder has other contents, or a run with other settings.
    """
    if not out_dir.exists():
        return None
    if not out_dir.is_dir():
        raise ValueError(f"{out_dir} is a file: choose another out.")
    if not any(out_dir.iterdir()):
        return None
    if not (out_dir / RUN_FILE).is_file():
        raise ValueError(f"{out_dir} is not empty and does not contain a run ({RUN_FILE}): choose another out.")
    checkpoint = newest_checkpoint(out_dir)
    if checkpoint is None and not (out_dir / BACKBONE).is_file() and not (out_dir / FINAL).is_dir():
        return None
    earlier = recorded_settings(out_dir)
    fixed = FREE_BUT_FOR_BACKBONE if checkpoint is None else frozenset()
    fixed |= frozenset() if settings.get("best") is None else FREE_BUT_FOR_BEST
    for name in sorted({*earlier, *settings} - (FREE - fixed)):
        if earlier.get(name) != settings.get(name):
            raise ValueError(
                f"{out_dir} has a run with {_words(name, earlier)}, not with {_words(name, settings)}: choose another "
                "out, or resume with the same settings."
            )
    return checkpoint


def check_labels(checkpoint: Path, name: str, labels: Sequence[str]) -> None:
    """Checks that a run resumes with its own labels. Otherwise its weights would be saved under wrong class names.

    Args:
        checkpoint: a checkpoint of the run.
        name: what has these labels, for the message.
        labels: class names in the order of their ids.

    Raises:
        ValueError: the labels of the run differ.
    """
    before = FaiM2FConfig.from_pretrained(checkpoint)
    if difference := label_difference(checkpoint, before, name, labels):
        raise ValueError(f"{difference}: choose another out, or resume with the labels of the run.")


def recorded_settings(out_dir: Path) -> dict[str, Any]:
    """The settings that `run.yaml` records.

    Raises:
        ValueError: it cannot be read.
    """
    path = out_dir / RUN_FILE
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), YamlLoader)  # a SafeLoader
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: choose another out.") from error
    return settings if isinstance(settings, dict) else {}


def newest_checkpoint(out_dir: Path) -> Path | None:
    """The complete checkpoint with the most steps; None if there is none."""
    whole = [path for path in _checkpoints(out_dir) if _is_whole(path)]
    return max(whole, key=checkpoint_step, default=None)


def remove_unfinished(out_dir: Path) -> None:
    """Removes the incomplete checkpoints of a killed run, which would count toward the limit on checkpoints."""
    for path in _checkpoints(out_dir):
        if not _is_whole(path):
            shutil.rmtree(path)


def set_aside(out_dir: Path, step: int) -> None:
    """Renames the checkpoint of a step, if it exists, to `diverged-N`, so that the run resumes from an earlier one.

    Its weights are finite, but gave a loss that is not finite for the next batch.
    """
    checkpoint = out_dir / f"checkpoint-{step}"
    if checkpoint.is_dir():
        aside = out_dir / f"diverged-{step}"
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)


def checkpoint_step(folder: str | Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(Path(folder).name.rpartition("-")[2])


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Context manager for writing a folder or a file. If writing fails, the incomplete result is removed.

    Raises:
        OSError: one sentence, in place of the various errors that Python, torch and safetensors raise, such as for a
            full disk.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not _is_of_archive(error):
            raise
        if folder.is_file():
            folder.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        reason = " ".join(str(error).split()).rstrip(".")
        raise OSError(
            f"{folder} cannot be written ({reason}): free some space and try again; nothing of it was kept."
        ) from error


@contextmanager
def reading(checkpoint: Path | None) -> Iterator[None]:
    """Context manager for a run that may read a checkpoint.

    Raises:
        ModelError: one of its files is damaged or missing, for example because the run's folder was only partly copied.
    """
    try:
        yield
    except (RuntimeError, SafetensorError, UnpicklingError, EOFError, FileNotFoundError, ValueError) as error:
        if checkpoint is None or isinstance(error, (torch.OutOfMemoryError, FaiM2FError)):
            raise
        if isinstance(error, (FileNotFoundError, ValueError)) and not re.search(
            rf"{re.escape(str(checkpoint))}(?!\d)", str(error)
        ):
            raise
        if isinstance(error, (RuntimeError, EOFError)) and not _is_of_archive(error):
            raise
        raise ModelError(
            f"A file of {checkpoint} cannot be read ({first_line(error)}): copy the checkpoint again, or move it away, "
            "so that the same command continues from the one before it, if there is one."
        ) from error


def _is_of_archive(error: Exception) -> bool:
    """Whether torch failed to write or to read an archive. It has no error class and no fixed message for that."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code.co_filename == torch.serialization.__file__ for frame, _ in frames)


def _checkpoints(out_dir: Path) -> list[Path]:
    return [path for path in out_dir.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name) and path.is_dir()]


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint is complete: transformers writes the trainer's state last."""
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and state.get("global_step") == checkpoint_step(checkpoint)


def begin_run(out_dir: Path, settings: Mapping[str, Any], counts: Mapping[str, ClassCounts]) -> None:
    """Creates the folder of a run and records its settings, and the counts of its splits."""
    out_dir.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
    write_whole(out_dir / RUN_FILE, text)
    write_whole(out_dir / COUNTS_FILE, json.dumps(_recorded(counts), ensure_ascii=False, indent=1) + "\n")


def changes_of_data(out_dir: Path, counts: Mapping[str, ClassCounts], settings: Mapping[str, Any]) -> dict[str, str]:
    """A sentence for every split whose counts differ from those of the run in a folder, with the same settings."""
    try:
        before = json.loads((out_dir / COUNTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a run of an earlier version
        return {}
    changes = {}
    recorded = recorded_settings(out_dir)
    differ = {name for name in ("eval_limit", "skip_bad") if recorded.get(name) != settings.get(name)}
    for split, now in _recorded(counts).items():
        if differ - ({"eval_limit"} if split == "train" else set()):
            continue  # the settings choose other images
        earlier = before.get(split, now) if isinstance(before, dict) else now
        if earlier != now:
            was, now_is = _extent(earlier), _extent(now)
            difference = f"{was} before, {now_is} now" if was != now_is else f"still {was}, but of other classes"
            changes[split] = f"The {split} data has changed since the run in {out_dir} was last started: {difference}."
    return changes


def _recorded(counts: Mapping[str, ClassCounts]) -> dict[str, dict[str, Any]]:
    return {
        split: {
            "images": count.total,
            "pixels": dict(zip(count.labels, count.pixels, strict=True)),
            "segments": dict(zip(count.labels, count.segments, strict=True)),
        }
        for split, count in counts.items()
    }


def _extent(recorded: Any) -> str:
    try:
        sums = [sum(recorded[name].values()) for name in ("segments", "pixels")]
        return ", ".join(map(number_of, [recorded["images"], *sums], ["image", "segment", "pixel"]))
    except (AttributeError, LookupError, TypeError):
        return "unknown"


def _words(name: str, settings: Mapping[str, Any]) -> str:
    return f"{name} {settings[name]}" if name in settings else f"the default {name}"


def training_of(
    recipe: Recipe,
    about: TrainedOn | None,
    history: Sequence[Mapping[str, Any]],
    precision: str,
    seed: int,
    curve: str | None,
    last_step: int,
    best: Best | None = None,
    class_weights: Sequence[float] | None = None,
) -> Training:
    """The training facts for the card.

    Args:
        recipe, about, precision, seed: as in `run.train`.
        history: the trainer's log.
        curve: the file name of the plot, if there is one.
        last_step: the step at which the training ended.
        best: the evaluation for which the weights were chosen; None for the weights of the last step.
        class_weights: weights of the classes in the loss, if there are any.
    """
    stopped = last_step < recipe.steps
    settings: dict[str, Any] = {
        "steps": f"{last_step} of {recipe.steps}, stopped early" if stopped else recipe.steps,
        "batch size": recipe.batch_size,
        "optimizer": f"AdamW, learning rate {recipe.learning_rate:g} (times "
        f"{recipe.backbone_multiplier:g} for the backbone), weight decay {recipe.weight_decay:g}, "
        f"gradient norm clipped to {recipe.clip:g}",
        "schedule": f"{recipe.schedule}, with {recipe.warmup_steps} warm-up steps",
    }
    if recipe.ema_decay:
        settings["weights"] = f"exponential moving average, decay {recipe.ema_decay:g}"
    if recipe.backbone_steps:
        settings["steps of the backbone alone, before the others"] = recipe.backbone_steps
    settings |= {"precision": precision, "seed": seed}
    if about is not None and about.teacher is not None:
        settings["teacher"] = f"{about.teacher}; the weight of its losses is {about.teacher_weight:g}"
        if about.unlabelled:
            settings["images without labels"] = f"{about.unlabelled:,}, labeled by the teacher only"
    if best is not None:
        settings["weights of"] = str(best)
    if class_weights is not None:
        least, most = min(class_weights), max(class_weights)
        settings["class weights"] = f"{least:.3g} to {most:.3g} (label_weights in the configuration)"
    last: Mapping[str, Any] = next((entry for entry in reversed(history) if "loss" in entry), {})
    return Training(
        recipe.name,
        settings,
        [str(step["name"]) for step in to_config(recipe.augmentations)],
        data=about.data if about else None,
        split=about.split if about else None,
        images=about.images if about else None,
        started_from=about.started_from if about else None,
        losses={name: round(float(last[key]), 4) for key, name in LOSSES.items() if key in last},
        curve=curve,
    )


def card_of(
    config: FaiM2FConfig,
    processor: FaiM2FImageProcessor,
    out_dir: Path,
    training: Training,
    about: TrainedOn | None,
    results: Mapping[str, Mapping[str, Any]],
    before: str,
    *,
    keep_results: bool,
) -> str:
    """The README.md of a run's model.

    Args:
        config, processor: the trained model's.
        out_dir: the run's folder, whose name becomes the model's.
        training, about: how the model was trained, and on which data.
        results: the metrics in percent; empty before the evaluation.
        before: the card that this one replaces. Hand-written sections are kept.
        keep_results: whether the results in that card are for the same weights.

    Raises:
        ValueError: the metadata of the previous card is invalid.
    """
    before = before if keep_results else without_results(before)
    measured, tables = [], {}
    if results and about is not None and about.is_whole and not about.is_on_training:
        measured = Measured(
            about.dataset_type, about.data, about.evaluation_split, about.evaluation_images, about.left_out,
            scalars(results, undefined=True),
        ).results()  # fmt: skip
        tables = folded_table(results, about.data, about.evaluation_split)
    name = out_dir.resolve().name
    return model_card(
        title_of(before) or name,
        config,
        size=processor.to_dict()["size"],
        results=measured,
        tables=tables,
        license=about.license if about else None,
        repository=f"{name}/final",
        before=before,
        training=training,
    )


__all__ = [
    "FINAL",
    "Best",
    "TrainedOn",
    "begin_run",
    "card_of",
    "check_labels",
    "checkpoint_step",
    "last_checkpoint",
    "newest_checkpoint",
    "reading",
    "recorded_settings",
    "remove_unfinished",
    "set_aside",
    "training_of",
    "writing",
]

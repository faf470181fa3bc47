"""`faim2f evaluate`: evaluates a model on a dataset; writes a JSON file and a table, and updates the model's card."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers.utils import logging

from ..data.counts import (
    ClassCounts,
    absent_note,
    class_table,
    count_classes,
    evaluation_notes,
    number_of,
    query_note,
)
from ..data.dataset import Description, without_bad_items
from ..data.formats import OpenData, dataset_type, find_format, open_data
from ..data.item import Item
from ..errors import DatasetError, FolderError, PredictorError, SettingsError
from ..evaluation.evaluator import CITYSCAPES, SUBTASKS, Evaluator, check_classes, choose_subtasks
from ..evaluation.report import (
    FOLDER,
    PARTIAL,
    RESULTS_FILE,
    TABLE_FILE,
    PredictionFiles,
    Results,
    cityscapes_label_ids,
    cityscapes_lines,
    folded_table,
    metric_lines,
    per_class_table,
    results_json,
    scalars,
    undefined_classes,
)
from ..evaluation.semantic import CONFUSION_PICTURE, CONFUSION_TABLE, write_confusion
from ..files import check_writable, write_whole
from ..hub.card_facts import includes_training
from ..hub.results import CARD, Measured, merge_results, other_settings, update_card, weights_digest
from ..model.configuration_faim2f import FaiM2FConfig
from ..runtime.tiles import Windows
from ..training.run import PRECISIONS, check_precision, lone_process
from ..version import __version__
from ..zoo import open_model
from .output import (
    DONE,
    MISTAKES,
    is_main_process,
    mistake,
    no_bars,
    one_document,
    out_of_memory,
    require_packages,
    say,
    say_skipped,
    use_weights_url,
)
from .parser import MODEL_HELP, WEIGHTS_URL_HELP, OneSentenceParser
from .settings import ModelDataSettings, parse_settings, read_size, require, setting, settings_parser

PROGRAM = "faim2f evaluate"
DESCRIPTION = "Evaluates a model on a dataset; writes its metrics and a confusion matrix, and updates the model's card."
EXAMPLES = (
    ("A folder with images, masks and labels.txt", "my-model --data flowers --format folder --out evaluation"),
    (
        "Cityscapes with a sliding window, for a program",
        "my-model --data cityscapes --format cityscapes --inference sliding --window 512x1024 --out evaluation --json",
    ),
)
DOCUMENT = {
    "out": "the folder that was written",
    "card": "the card that was updated, or null",
    "model, labels, data, images": "the model, its labels, the data (format, name, split, task) and number of images",
    "weights": "the SHA-256 of the weights of a model in a folder, or null",
    "limit": "the --limit of images, or null: then they are those of the whole split",
    "left_out": "images and annotations that were skipped, and why, one sentence each",
    "notes": "notes for the user",
    "subtasks, image_size, inference, precision, versions": "the settings of the evaluation",
    "results": "the metrics of each subtask, overall and for each class; null if undefined",
}
INFERENCES = ("whole", "sliding")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class EvaluateSettings(ModelDataSettings):
    """The settings of `faim2f evaluate`."""

    model: str | None = setting(str, f"{MODEL_HELP} (required)")
    weights_url: str | None = setting(str, WEIGHTS_URL_HELP)
    out: str | None = setting(str, "folder to write (required)")
    split: str | None = setting(str, "split to evaluate on (default: the format's usual split)")
    subtasks: tuple[str, ...] | None = setting(tuple, "what to evaluate (default: all that the annotations support)",
                                               choices=SUBTASKS)  # fmt: skip
    by_ids: bool = setting(bool, "compare classes by their ids, even if the names of the model and of the data differ",
                           False)  # fmt: skip
    limit: int | None = setting(
        int, "evaluate on only this many images, and do not update the card (default: all)", least=1
    )
    batch_size: int = setting(int, "maximum number of images (of one size) or windows per forward pass", 8, least=1)
    inference: str = setting(str, "whole images, or overlapping sliding windows (semantic only)",
                             "whole", choices=INFERENCES)  # fmt: skip
    window: str | None = setting(str, "window size, HEIGHTxWIDTH in pixels of the resized image (required for sliding)")
    stride: str | None = setting(
        str, "distance between windows, HEIGHTxWIDTH in pixels (default: two thirds of a window)"
    )
    predictions: bool = setting(bool, "also write the predictions to OUT/predictions, in the formats of "
                                "COCO's panoptic and instance evaluation and of Cityscapes", False)  # fmt: skip
    precision: str = setting(str, "floating-point precision", "fp32", choices=PRECISIONS)
    workers: int = setting(int, "processes that check images, with --skip-bad", 0, least=0)
    card: bool = setting(bool, "write the results into the model's card, if the model is a local folder and evaluated "
                         "with whole images of its own size in fp32", True)  # fmt: skip
    json: bool = setting(bool, "print one JSON document, for use by programs (see below)", False)


@dataclass
class EvaluateRun:
    """An evaluation with checked settings, and opened data and model; nothing is written yet."""

    settings: EvaluateSettings
    out: Path
    data: OpenData
    model: Any
    evaluator: Evaluator
    files: PredictionFiles | None
    skipped: list[str]
    card: Path | None
    notes: list[str]
    counts: ClassCounts


class CountedItems(Sequence[Item]):
    """Items that advance a progress bar when they are read."""

    def __init__(self, items: Sequence[Item], bar: Any) -> None:
        self.items = items
        self.bar = bar

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        self.bar.update()
        return self.items[index]


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Runs the command; returns 0, or 2 after one sentence on standard error."""
    if not is_main_process():
        logging.set_verbosity_error()
    try:
        settings = parse_settings(EvaluateSettings, build_parser(program), arguments)
    except MISTAKES as error:
        return mistake(program, error)
    with one_document(settings.json) as emit:
        return _run(settings, program, emit)


def build_parser(program: str = PROGRAM) -> OneSentenceParser:
    """Builds the command's parser."""
    parser = OneSentenceParser(prog=program, description=DESCRIPTION, examples=EXAMPLES, document=DOCUMENT)
    return settings_parser(EvaluateSettings, parser, "model")


def _run(settings: EvaluateSettings, program: str, emit: Callable[[Any], None]) -> int:
    try:
        prepared = prepare(settings)
    except MISTAKES as error:
        return mistake(program, error)
    try:
        results = measure(prepared)
        if is_main_process():
            emit(write(prepared, results))
    except (DatasetError, PredictorError, OSError) as error:
        _forget(prepared)
        return mistake(program, error, everywhere=True)
    except torch.OutOfMemoryError:
        _forget(prepared)
        return out_of_memory(program, settings.batch_size)
    except BaseException:
        _forget(prepared)
        raise
    return DONE


def prepare(settings: EvaluateSettings) -> EvaluateRun:
    """Checks the settings, and opens data and model.

    Raises:
        ValueError, OSError, ImportError: invalid settings or unusable input; one sentence.
    """
    require(settings, "model", "out")
    use_weights_url(settings.weights_url, str(settings.model))
    settings = settings.resolved()
    check_precision(settings.precision)
    require_packages(("faster_coco_eval", "hotcoco"), "evaluate")
    out, name = Path(str(settings.out)), str(settings.model)
    if out.exists() and not out.is_dir():
        raise SettingsError(f"{out} is a file: choose another out.")
    check_writable(out, SettingsError)
    others = {path.name for path in out.iterdir()} - {PARTIAL} if out.is_dir() else set()  # a killed run leaves PARTIAL
    if others and RESULTS_FILE not in others:
        raise SettingsError(f"{out} is not empty and contains no {RESULTS_FILE}: choose another out.")
    whole = "all" if settings.annotations and len(settings.annotations) == 1 else None  # a single file has no splits
    data = open_data(str(settings.format), settings.source((None, settings.split or whole)), "validation")
    windows = _windows(settings)
    subtasks = choose_subtasks(data.description, settings.subtasks)
    model, processor = open_model(name)
    if settings.channels not in (None, model.config.num_channels):
        raise SettingsError(f"{name} takes {model.config.num_channels} channels, not {settings.channels}.")
    data = data.with_channels(model.config.num_channels)
    notes = check_classes(name, model.config, data.description, settings.by_ids)
    if "panoptic" in subtasks:
        notes += _other_stuff(name, model.config, data.description)
    own_size = dict(processor.size)
    if settings.image_size is not None and not processor.do_resize:
        raise SettingsError(f"The image processor of {name} does not resize (do_resize): leave --image-size out.")
    if settings.image_size not in (None, own_size.get("shortest_edge")):
        size = {"shortest_edge": settings.image_size, "longest_edge": 4 * int(settings.image_size or 0)}
        processor = type(processor).from_dict(processor.to_dict(), size=size)
    other = other_settings(settings.inference, settings.precision, dict(processor.size), own_size)
    card = _card(settings, Path(name), data, other, notes)
    skipped = list(data.description.skipped)
    if settings.limit is not None:
        data = data.first(settings.limit)
    if settings.skip_bad and isinstance(data.items, datasets.Dataset):
        items, bad = without_bad_items(data.items, settings.workers)
        data = replace(data, items=items)
        skipped += [one.error for one in bad]
    counts = count_classes(data.items, data.description, skip_bad=settings.skip_bad)
    notes += evaluation_notes(counts)
    notes += filter(None, [query_note(counts, model.config.num_queries)])
    truth = data.cityscapes_truth
    if truth is not None and "semantic" in subtasks:
        require_packages(("cityscapesscripts",), "evaluate")
        without = _first_without_truth(data)
        if without is not None:
            notes.append(f"{without} has no *_gtFine_labelIds.png with *_gtFine_instanceIds.png in gtFine: Cityscapes' "
                         "own evaluation (IoU and nIoU) is left out.")  # fmt: skip
            truth = None
    files = None
    if settings.predictions:
        ids = cityscapes_label_ids() if settings.format == CITYSCAPES and data.description.task != "instance" else None
        files = PredictionFiles(out, data.description, ids)
    evaluator = Evaluator(
        processor,
        data.description.id2label,
        subtasks,
        sorted(data.description.things),
        settings.batch_size,
        DTYPES.get(settings.precision),
        windows,
        truth,
        None if files is None else files.add,
    )
    return EvaluateRun(settings, out, data, model, evaluator, files, skipped, card, notes, counts)


def _windows(settings: EvaluateSettings) -> Windows | None:
    if settings.inference == "whole":
        for name in ("window", "stride"):
            if getattr(settings, name) is not None:
                raise SettingsError(f"{name} is for --inference sliding: pass that, too, or leave it out.")
        return None
    if settings.window is None:
        raise SettingsError("--inference sliding needs --window, such as the size of the crops of the training.")
    stride = None if settings.stride is None else read_size(settings.stride, "--stride", 1)
    return Windows(read_size(settings.window, "--window"), stride)


def _other_stuff(name: str, config: FaiM2FConfig, description: Description) -> list[str]:
    """A note if the model and the data disagree about stuff classes, or the model does not define them."""
    if config.label_ids_to_fuse is None:
        return [f"{name} does not say which classes are stuff (label_ids_to_fuse): those of the data are used."]
    known = set(description.id2label)
    differing = sorted((known - description.things) ^ set(config.label_ids_to_fuse))
    if not differing:
        return []
    label, kinds = differing[0], ("a thing", "stuff")
    own = kinds[label in config.label_ids_to_fuse]
    called = f"Class {label} ({description.labels[label]})"
    return [f"{called} is {own} in {name}, but not in the data: the segments are measured as the model produces them."]


def _first_without_truth(data: OpenData) -> str | None:
    """The first image that lacks the files for Cityscapes' own evaluation."""
    ids = data.items.with_format(None)["image_id"] if isinstance(data.items, datasets.Dataset) else []
    truth = data.cityscapes_truth or {}
    return next((str(image_id) for image_id in ids if image_id not in truth), None)


def _card(settings: EvaluateSettings, folder: Path, data: OpenData, other: str | None, notes: list[str]) -> Path | None:
    """The folder whose card will be updated, if any. Checks that the card can be read and written.

    Args:
        settings: the settings.
        folder: the model.
        data: the data, all of it.
        other: what is used instead of the model's own settings; see `other_settings`.
        notes: gets a note if the card is left alone.
    """
    if not settings.card:
        return None
    if not folder.is_dir():
        notes.append(f"{folder} is not a local folder: its card is left alone.")
    elif settings.limit is not None:
        notes.append("Only a part of the data was evaluated (limit): the card is left alone.")
    elif other is not None:
        notes.append(f"The evaluation uses {other} instead of the model's own settings: the card is left alone.")
    elif not os.access(folder, os.W_OK):
        notes.append(f"{folder} cannot be written: its card is left alone.")
    else:
        path = folder / CARD
        try:
            text, title = path.read_bytes().decode("utf-8-sig") if path.exists() else "", _title(settings, data)
            if text:
                merge_results(text, folder.name, [])
            if includes_training(text, title, data.split, may_be_file=bool(settings.annotations)):
                notes.append(f"{title} ({data.split}) may have images of the training: the card is left alone. To add "
                             "results to it, evaluate on images that the model was not trained on.")  # fmt: skip
                return None
        except ValueError as error:
            raise FolderError(f"{path} cannot be updated, {error}: fix it, or pass --no-card.") from error
        return folder
    return None


def measure(prepared: EvaluateRun) -> Results:
    """Runs the evaluator in all processes and returns its results."""
    say(
        f"Evaluating {', '.join(prepared.evaluator.subtasks)} results on "
        f"{number_of(len(prepared.data.items), 'image')} of {prepared.data.description.name} ({prepared.data.split})."
    )
    for line in class_table({"truth": prepared.counts}):
        say(line)
    for note in [*prepared.notes, *filter(None, [lone_process()])]:
        say(note)
    state = PartialState(cpu=not torch.cuda.is_available())
    model = prepared.model.to(state.device)
    own = range(state.process_index, len(prepared.data.items), state.num_processes)
    if prepared.files is not None:
        if is_main_process():
            prepared.files.forget()  # those of a killed run
        state.wait_for_everyone()
        prepared.files.begin()
    with tqdm(total=len(own), unit="image", disable=no_bars(is_main_process())) as bar:
        items = CountedItems(prepared.data.items, bar)
        results = prepared.evaluator(model, items, state.process_index, state.num_processes)
    if prepared.files is not None:
        found = prepared.files.annotations
        # Also a barrier: when it returns, every process has written its files.
        found = gather_object(found) if state.num_processes > 1 else found
        if is_main_process():
            prepared.files.finish(sorted(found, key=lambda entry: str(entry["file_name"])))
    return results


def _title(settings: EvaluateSettings, data: OpenData) -> str:
    """The name of the data in the card."""
    return find_format(str(settings.format)).title_of(settings.source((None, None)), data.description.labels)


def _inference(windows: Windows | None) -> Any:
    if windows is None:
        return "whole"
    return {"window": list(windows.size), "stride": list(windows.steps)}


def _forget(prepared: EvaluateRun) -> None:
    """Removes the predictions of a failed evaluation."""
    if prepared.files is not None:
        prepared.files.forget()
        if prepared.out.is_dir() and not any(prepared.out.iterdir()):
            prepared.out.rmdir()


def write(prepared: EvaluateRun, results: Results) -> dict[str, Any]:
    """Writes and prints the results, and returns the JSON document.

    Raises:
        OSError: they cannot be written.
    """
    for line in metric_lines(scalars(results)):  # first, so that a full disk does not lose them
        say(line)
    settings, data, out = prepared.settings, prepared.data, prepared.out
    format_name = str(settings.format)
    title = _title(settings, data)
    about = {
        "model": settings.model,
        "weights": weights_digest(Path(str(settings.model))),
        "labels": [name for _, name in sorted(prepared.model.config.id2label.items())],
        "data": {"format": format_name, "name": title, "split": data.split, "task": data.description.task},
        "images": len(data.items),
        "limit": settings.limit,
        "left_out": prepared.skipped,
        "subtasks": list(prepared.evaluator.subtasks),
        "image_size": dict(prepared.evaluator.processor.size),  # type: ignore[attr-defined]
        "inference": _inference(prepared.evaluator.windows),
        "precision": settings.precision,
        "versions": {
            "hf-faim2f": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    heading = f"{Path(str(settings.model)).name} on {title} ({data.split})"
    out.mkdir(parents=True, exist_ok=True)
    for name in (CONFUSION_PICTURE, CONFUSION_TABLE):  # of an earlier evaluation, perhaps of other subtasks
        (out / name).unlink(missing_ok=True)
    if prepared.files is None and (out / FOLDER).exists():
        prepared.notes.append(f"{out / FOLDER} is from an earlier evaluation: pass --predictions to replace it.")
        say(prepared.notes[-1])
    text = results_json(results, about)
    write_whole(out / RESULTS_FILE, text)
    write_whole(out / TABLE_FILE, per_class_table(results, heading))
    undefined = undefined_classes(results)
    if undefined and prepared.counts.is_sample:  # without the whole dataset, missing classes are known only now
        prepared.notes.append(absent_note(undefined))
        say(prepared.notes[-1])
    for line in cityscapes_lines(results[CITYSCAPES]) if CITYSCAPES in results else []:
        say(line)
    say_skipped(prepared.skipped)
    written = [out / RESULTS_FILE, out / TABLE_FILE]
    if prepared.evaluator.confusion is not None:
        can_draw = find_spec("matplotlib") is not None
        written += write_confusion(prepared.evaluator.confusion, data.description.labels, out, picture=can_draw)
        if not can_draw:
            say("Without matplotlib there is no confusion.png: install hf-faim2f[train].")
    say(f"Written: {', '.join(map(str, written))}.")
    if prepared.card is not None:
        numbers, kind = scalars(results, undefined=True), dataset_type(format_name, title)
        measured = Measured(kind, title, data.split, len(data.items), len(prepared.skipped), numbers)
        update_card(prepared.card, measured.results(), folded_table(results, title, data.split))
        about_card = "has the results, too" if any(scalars(results).values()) else "gets no result: none is defined"
        say(f"{prepared.card / CARD} {about_card}.")
    card = None if prepared.card is None else str(prepared.card / CARD)
    return {"out": str(out), "card": card, "notes": prepared.notes, **json.loads(text)}

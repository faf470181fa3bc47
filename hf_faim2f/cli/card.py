"""`faim2f card`: writes or updates the model card of a folder, and keeps its hand-written sections."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from ..errors import FolderError, first_line
from ..files import read_object, write_whole
from ..hub.card import model_card, title_of
from ..hub.card_facts import includes_training
from ..hub.check import list_files
from ..hub.results import CARD, Measured, merge_tables, other_settings, weights_digest
from ..hub.sections import check_license, holes, license_note
from ..model.configuration_faim2f import FaiM2FConfig
from ..model.image_processing_faim2f import FaiM2FImageProcessor
from ..zoo import own_folder
from .output import DONE, MISTAKES, mistake, one_document, require_packages, say, use_weights_url
from .parser import OneSentenceParser

PROGRAM = "faim2f card"
DESCRIPTION = "Writes the model card (README.md) of a model's folder. Keeps earlier results and hand-written sections."
EXAMPLES = (
    (
        "With the results of an evaluation, and the license of the weights",
        "my-model --evaluation evaluation --license apache-2.0",
    ),
    ("With another name, and the Hub id that the snippets load", "my-model --name Flowers --repository me/flowers"),
)
DOCUMENT = {
    "card": "the file that was written",
    "holes": "what is missing before the card can be published, one sentence each",
}
OWN_HELP = "a model's folder, or a published name (see `faim2f models`): its converted model in the cache"
# Limit of an evaluation's results in bytes; for the largest datasets, they take a few hundred kilobytes.
MOST_BYTES = 1 << 25


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Runs the command; returns 0 if the card was written, else 2 after one sentence on standard error."""
    options = build_parser(program).parse_args(arguments)
    with one_document(options.json) as emit:
        return _run(options, program, emit)


def _run(options: argparse.Namespace, program: str, emit: Callable[[Any], None]) -> int:
    try:
        if options.license is not None:
            check_license(options.license)
        use_weights_url(options.weights_url, str(options.folder))
        options.folder = own_folder(options.folder, FolderError)
        text = renewed_card(options.folder, options.evaluation or [], options.name, options.license, options.repository)
        write_whole(options.folder / CARD, text)
    except MISTAKES as error:
        return mistake(program, error)
    say(f"Written: {options.folder / CARD}")
    try:
        files = [file.name for file in list_files(options.folder).files]
    except (FolderError, OSError):
        files = [path.name for path in options.folder.iterdir()]
    found = holes(text, files)
    for hole in found:
        say(f"  before it can be published: {hole}")
    if license := license_note(text):
        say(f"  {license}")
    emit({"card": str(options.folder / CARD), "holes": found})
    return DONE


def renewed_card(
    folder: Path,
    evaluations: Sequence[Path] = (),
    name: str | None = None,
    license: str | None = None,
    repository: str | None = None,
) -> str:
    """The new text of a model folder's card.

    Args:
        folder: contains config.json, and may contain README.md and preprocessor_config.json.
        evaluations: folders written by `faim2f evaluate`, whose results and tables are added.
        name: the model's name; by default that of the existing card, or else of the folder.
        license, repository: see `model_card`.

    Raises:
        ValueError, OSError: a file is missing or cannot be read; one sentence.
    """
    if not (folder / "config.json").is_file():
        raise FolderError(f"{folder} is not a model's folder: it has no config.json.")
    config = _load(folder / "config.json", FaiM2FConfig)
    processor = folder / "preprocessor_config.json"
    size = _load(processor, FaiM2FImageProcessor).to_dict()["size"] if processor.is_file() else None
    path = folder / CARD
    try:
        before = path.read_bytes().decode("utf-8-sig") if path.is_file() else ""
        results: list[EvalResult] = []
        tables: dict[str, str] = {}
        called = name or (title_of(before) if before else None) or folder.resolve().name
        labels = [name for _, name in sorted(config.id2label.items())]
        for evaluation in evaluations:
            measured, table = _evaluation(evaluation, folder, labels, size, before)
            results += measured
            tables = merge_tables(tables, table)
        return model_card(
            called,
            config,
            size=size,
            results=results,
            tables=tables,
            license=license,
            repository=repository,
            before=before,
        )
    except UnicodeDecodeError as error:
        raise FolderError(f"{path} is not UTF-8 text: fix it, or remove it.") from error
    except ValueError as error:
        if "metadata" not in str(error):
            raise
        raise FolderError(f"{path} cannot be rewritten, {error}: fix it, or remove it.") from error


def _load(path: Path, kind: Any) -> Any:
    """Loads a configuration or an image processor with this package's own class."""
    try:
        values = read_object(path)
        if kind is FaiM2FConfig and values.get("model_type") != kind.model_type:
            raise ValueError(f"its model_type is {values.get('model_type')!r}, not {kind.model_type!r}")
        return kind.from_dict(values)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FolderError(f"{path} cannot be used: {first_line(error, kind=False)}.") from error


def _evaluation(
    folder: Path, model: Path, labels: list[str], size: Any, card: str
) -> tuple[list[EvalResult], dict[str, str]]:
    """The results in an evaluation's folder, and its per-class table by caption.

    Args:
        folder: written by `faim2f evaluate`, or its `evaluation.json`.
        model: the folder of the card's model.
        labels: its labels, in the order of their ids.
        size: that of its image processor; None if unknown.
        card: its card before.
    """
    require_packages(("evaluate",), "evaluate")
    from ..data.formats import dataset_type
    from ..evaluation.report import RESULTS_FILE, folded_table, scalars

    path = folder / RESULTS_FILE if folder.is_dir() else folder
    try:
        with path.open("rb") as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES} bytes")
        document = json.loads(text)
        # Older files name neither the labels of the model nor the settings.
        evaluated = document.get("labels", labels)
        whole, precision = document.get("inference", "whole"), document.get("precision", "fp32")
        other = other_settings(whole, precision, document.get("image_size"), size)
        data, results, limit = document["data"], _with_nan(document["results"]), document.get("limit")
        measured = Measured(
            dataset_type(str(data["format"]), str(data["name"])),
            str(data["name"]),
            str(data["split"]),
            int(document["images"]),
            len(document["left_out"]),
            scalars(results, undefined=True),
        )
        table = folded_table(results, str(data["name"]), str(data["split"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FolderError(f"{path} is not an {RESULTS_FILE} of `faim2f evaluate` ({error}).") from error
    if limit is not None:
        raise FolderError(
            f"{path} covers only {limit} images (--limit), but a card states results on all: evaluate without --limit."
        )
    if other is not None:
        raise FolderError(
            f"{path} is an evaluation with {other}, but a card states results with the model's own settings: evaluate "
            "with those."
        )
    title, split = measured.dataset_name, measured.split
    if includes_training(card, title, split, may_be_file=str(data["format"]).startswith("coco")):
        raise FolderError(
            f"{path} is an evaluation on {title} ({split}), which may have images of the training: evaluate on images "
            "that the model was not trained on, as a card states results on those only."
        )
    if evaluated != labels:
        raise FolderError(
            f"{path} is the evaluation of {document.get('model')}, whose labels differ from this model's: name the "
            "evaluation of this model."
        )
    measured_on, own = document.get("weights"), weights_digest(model)
    if None not in (measured_on, own) and measured_on != own:
        raise FolderError(
            f"{path} is the evaluation of other weights than those in {model}, perhaps from before another training: "
            "evaluate the model again."
        )
    named = Path(str(document.get("model")))
    if named.is_dir() and not named.samefile(model):
        what = "labels" if own is None or measured_on is None else "weights"
        say(f"{path} is the evaluation of {named}, not of {model}: its results are added, as the {what} are the same.")
    return measured.results(), table


def _with_nan(value: Any) -> Any:
    """Turns JSON's null back into NaN, the value of an undefined metric."""
    if isinstance(value, dict):
        return {key: _with_nan(inner) for key, inner in value.items()}
    return float("nan") if value is None else value


def build_parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """Builds the command's parser."""
    parser = OneSentenceParser(prog=program, description=DESCRIPTION, examples=EXAMPLES, document=DOCUMENT)
    parser.add_argument("folder", type=Path, metavar="DIR", help=OWN_HELP)
    parser.add_argument(
        "--evaluation",
        type=Path,
        action="append",
        metavar="DIR",
        help="a folder that `faim2f evaluate --out` wrote, whose results and table of classes are added; may be "
        "repeated (default: none, and the card's results stay)",
    )
    parser.add_argument("--name", metavar="NAME", help="the model's name (default: that in its card, or the folder's)")
    parser.add_argument(
        "--license",
        metavar="ID",
        help="license of the weights, by its Hub identifier, such as apache-2.0 (default: that in the card)",
    )
    parser.add_argument("--repository", metavar="ID", help="Hub id that the code snippets load (default: the name)")
    parser.add_weights_url()
    parser.add_json()
    return parser

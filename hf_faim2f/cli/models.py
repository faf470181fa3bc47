"""`faim2f models`: lists the published models and the cache of converted ones, and cleans the cache."""

import argparse
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from hf_faim2f.conversion.mask2former_zoo import weights_of

from ..download import bare_url, size_in_words
from ..errors import SettingsError
from ..family import DATASETS, FAMILY, load_config
from ..family.mask2former import labels_and_stuff, zoo
from ..family.presets import label_keywords
from ..model.configuration_faim2f import FaiM2FConfig
from ..model.modeling_faim2f import FaiM2FForUniversalSegmentation
from ..model_cache import Entry, cache_folder, clean, entries
from ..zoo import published_source
from .output import DONE, MISTAKES, mistake, one_document, say
from .parser import OneSentenceParser, did_you_mean

PROGRAM = "faim2f models"
DESCRIPTION = (
    "Lists the models that can be named wherever a command takes a model, and which of them are in the cache. Models "
    "of this package and transformers' Mask2Formers can also be named by their Hub ids."
)
EXAMPLES = (
    ("All published models", ""),
    ("One of them, for a program", "fai-mf-m-ade --json"),
    ("Remove all converted models from the cache", "--clean"),
)
DOCUMENT = {
    "cache": "the folder of the cache",
    "models": "name, family, data, task, parameters, metrics (in percent), fps (published, on an NVIDIA T4), license, "
    "url, sha256 (that a download must have: pinned, or seen at the first download; null if unknown), cached (its "
    "folder, or null) and bytes (in the cache)",
    "removed": "with --clean: name and bytes of what was removed",
}
FAMILIES = {"fai": "FAI-MF", "bisenetformer": "BiSeNetFormer"}
MASK2FORMER, ON_THE_HUB = "Mask2Former", "Mask2Former (Hub)"
# The main metric of each task, by its names in Focoos and Mask2Former.
MAIN = {"semantic": ("mIoU",), "instance": ("segm/AP", "AP"), "panoptic": ("PQ",)}
# Suffixes of the keys of batch norm statistics, which do not count as parameters.
STATISTICS = ("running_mean", "running_var")
COLUMNS = ("name", "family", "data, task", "parameters", "published", "fps, T4", "license", "in the cache")


@dataclass
class Row:
    """A model in the list; the fields are those of the JSON document."""

    name: str
    family: str
    data: str | None
    task: str | None
    parameters: int | None
    metrics: dict[str, float] = field(default_factory=dict)
    fps: float | None = None
    license: str | None = None
    url: str | None = None
    sha256: str | None = None
    cached: str | None = None
    bytes: int = 0


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Runs the command; returns 0, or 2 after one sentence on standard error."""
    options = build_parser(program).parse_args(arguments)
    with one_document(options.json) as emit:
        try:
            chosen = choose(options.names)
            removed = []
            if options.clean:
                removed = remove({row.name for row in chosen})
                chosen = choose(options.names)
            else:
                _print(chosen)
        except MISTAKES as error:
            return mistake(program, error)
        document: dict[str, Any] = {"cache": str(cache_folder()), "models": [asdict(row) for row in chosen]}
        emit({**document, "removed": removed} if options.clean else document)
    return DONE


def rows(names: Collection[str] | None = None) -> list[Row]:
    """The published models, and the Hub models in the cache.

    Args:
        names: the names of the published models to list; None for all.
    """
    found = [*_focoos(names), *_zoo(names)]
    by_name = {row.name: row for row in found}
    for entry in entries():
        row = by_name.get(entry.record.name)
        if row is None:
            row = by_name[entry.record.name] = Row(entry.record.name, ON_THE_HUB, None, None, None)
            row.license, row.url = f"see {entry.record.url}", entry.record.url
            found.append(row)
        row.bytes += entry.size
        if entry.record.url == row.url:
            row.sha256 = row.sha256 or entry.record.sha256
        if entry.model is not None and (row.cached is None or entry.record.url == row.url):
            row.cached = str(entry.model)
    return found


def _focoos(names: Collection[str] | None) -> list[Row]:
    found = []
    for name, preset in FAMILY.items():
        if names is not None and name not in names:
            continue
        source = published_source(name)
        assert source is not None
        with torch.device("meta"):
            model = FaiM2FForUniversalSegmentation(load_config(name))
        task = str(model.config.postprocessing_type)
        rate = next((value for key, value in preset.published.items() if key.startswith("fps")), None)
        found.append(
            Row(
                name,
                FAMILIES.get(name.split("-")[0], "Focoos"),
                DATASETS[preset.dataset].name,
                task,
                sum(parameter.numel() for parameter in model.parameters()),
                _main_metric(preset.published, task),
                rate,
                source.license,
                bare_url(source.url),
                source.sha256,
            )
        )
    return found


def _zoo(names: Collection[str] | None) -> list[Row]:
    found = []
    for model in zoo().values():
        if names is not None and model.short not in names:
            continue
        source = published_source(model.short)
        assert source is not None
        config = FaiM2FConfig(**model.config, **label_keywords(labels_and_stuff(model.data, model.subtask)[0]))
        parameters = sum(
            math.prod(weight.shape) for weight in weights_of(config) if not weight.key.endswith(STATISTICS)
        )
        data = DATASETS[model.data].name if model.data in DATASETS else model.data.replace("-", " ").title()
        metrics = {**_main_metric(model.published, model.subtask), **model.published}
        url = bare_url(source.url)
        row = Row(model.short, MASK2FORMER, data, model.subtask, parameters, metrics, None, source.license, url)
        found.append(row)
    return found


def _main_metric(published: dict[str, Any], task: str) -> dict[str, float]:
    return {key.rpartition("/")[2]: published[key] for key in MAIN[task] if key in published}


def choose(names: Sequence[str]) -> list[Row]:
    """The models with these names or aliases; all models if `names` is empty.

    Raises:
        SettingsError: a name is unknown.
    """
    if not names:
        return rows()
    sources = {name: published_source(name) for name in names}
    wanted = [name if source is None else source.name for name, source in sources.items()]
    by_name = {row.name: row for row in rows(wanted)}
    for name, own in zip(names, wanted, strict=True):
        if own not in by_name:
            known = [*FAMILY, *(model.short for model in zoo().values()), *by_name]
            hint = did_you_mean(name, known) or f"`{PROGRAM}` lists them."
            raise SettingsError(f"There is no published model {name}, nor is it in the cache; {hint}")
    return [by_name[own] for own in dict.fromkeys(wanted)]


def _print(chosen: list[Row]) -> None:
    table = [COLUMNS, *(_cells(row) for row in chosen)]
    widths = [max(len(cells[column]) for cells in table) for column in range(len(COLUMNS))]
    for cells in table:
        say("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    total = sum(row.bytes for row in chosen)
    say(f"\nCache: {cache_folder()}, {size_in_words(total)} of these models.")
    say("Focoos publishes no hashes: the first download of a file is recorded, and a different file is rejected.")


def _cells(row: Row) -> tuple[str, ...]:
    task = "" if row.data is None else f"{row.data}, {row.task}"
    parameters = "" if row.parameters is None else f"{row.parameters / 1e6:.1f} M"
    metric = next((f"{value:.2f} {name}" for name, value in row.metrics.items()), "")
    cached = "" if not row.bytes else f"{'yes' if row.cached else 'partly'}, {size_in_words(row.bytes)}"
    rate = "" if row.fps is None else f"{row.fps:g}"
    return row.name, row.family, task, parameters, metric, rate, row.license or "", cached


def remove(names: set[str]) -> list[dict[str, Any]]:
    """Removes models and partial downloads from the cache, and prints what was removed.

    Raises:
        ModelError: another process is downloading one of them.
        OSError: a file cannot be removed.
    """
    removed = []
    found: list[Entry] = [entry for entry in entries() if entry.record.name in names and entry.size]
    for entry in found:
        size = entry.size
        clean(entry)
        removed.append({"name": entry.record.name, "bytes": size})
        say(f"Removed: {entry.record.name}, {size_in_words(size)} in {entry.folder}.")
    if not removed:
        say(f"Nothing to remove in {cache_folder()}.")
    return removed


def build_parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """Builds the command's parser."""
    parser = OneSentenceParser(prog=program, description=DESCRIPTION, examples=EXAMPLES, document=DOCUMENT)
    parser.add_argument("names", metavar="NAME", nargs="*", help="models to list or to remove (default: all)")
    removes = "remove the converted models and partial downloads of this cache, and list what was removed; sizes and "
    removes += "hashes of earlier downloads are kept"
    parser.add_argument("--clean", action="store_true", help=removes)
    parser.add_json()
    return parser

"""`faim2f data`: checks a dataset, or converts it to another format."""

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
from tqdm.auto import tqdm

from ..data import check
from ..data.annotations import TARGETS
from ..data.convert import convert_data
from ..data.counts import aligned, crowd_note, number_of
from ..data.dataset import kind_of_part, without_bad_items
from ..data.formats import OpenData
from ..errors import SettingsError
from ..files import check_empty_folder, write_whole
from ..model.channels_faim2f import picture_of
from ..runtime.drawing import below, beside, draw_segments, scaled, segments_of_item
from .output import (
    DONE,
    MISTAKES,
    SOME_LEFT_OUT,
    interrupted,
    mistake,
    no_bars,
    one_document,
    say,
    say_skipped,
)
from .parser import OneSentenceParser, subcommands
from .settings import DataSettings, parse_settings, require, setting, settings_parser

PROGRAM = "faim2f data"
DESCRIPTION = "Checks a dataset before it is used, or converts it to another format."
EXAMPLES = (
    ("Classes and problems of a dataset", "check flowers"),
    ("From labelme to a folder that Ultralytics reads", "convert drawings flowers-yolo --to yolo"),
)
CHECK = "Reads a whole dataset: prints its classes and problems, and draws images with the rarest classes."
CHECK_EXAMPLES = (
    ("A folder, whose format is detected; writes check.png to the current folder", "flowers"),
    ("COCO JSON from any tool; JSON output for a program", "--annotations result.json --images photos --json"),
    ("Accept images without a segment", "flowers --allow empty --out report"),
)
CHECK_DOCUMENT = {
    "data, format": "the data, and its format",
    "task, labels": "the task, and the class names",
    "parts": "of each split: images, sizes (height, width, count), crowds; pixels, segments and images of each class",
    "findings": "the problems: kind, part (the split) and a sentence",
    "wrong": "number of problems, without those of allowed kinds",
    "unread": "a sentence about image files that belong to no split, or null",
    "sheet": "the file with the drawn images, or null",
}
CONVERT = "Writes a dataset in another format, with copies of its images: the whole folder, or nothing."
CONVERT_EXAMPLES = (
    ("To a folder of masks", "drawings flowers --to masks"),
    ("Only the classes of a panoptic dataset, for CVAT", "coco coco-cvat --format coco-panoptic --to coco"),
)
CONVERT_DOCUMENT = {
    "out, format": "the folder that was written, and the format that reads it",
    "images": "number of images of each split that were written",
    "left_out": "images and annotations that were skipped, and why, one sentence each",
    "notes": "what is in no split, what the format cannot represent, and a setting to read it, one sentence each",
}
SHEET = "check.png"
# Height and largest width of an image on the sheet, in pixels, and the number of images in a row.
HEIGHT, WIDEST, IN_A_ROW = 360, 720, 4
# Width of a character of a caption, in pixels.
CHARACTER = 7
MOST_LISTED = 10


@dataclass(frozen=True)
class CheckSettings(DataSettings):
    """The settings of `faim2f data check`."""

    out: str = setting(str, f"folder for {SHEET}", ".")
    draw: int = setting(int, f"number of images to draw in {SHEET}; 0 for none", 24, least=0)
    limit: int | None = setting(int, "read only this many images of each split (default: all)", least=1)
    allow: tuple[str, ...] | None = setting(
        tuple, "kinds of problems to accept (default: none)", choices=tuple(check.KINDS)
    )
    json: bool = setting(bool, "print one JSON document, for use by programs (see below)", False)


@dataclass(frozen=True)
class ConvertSettings(DataSettings):
    """The settings of `faim2f data convert`."""

    out: str | None = setting(str, "the folder to write: new or empty (required)")
    to: str | None = setting(str, "format to write (required)", choices=TARGETS)
    json: bool = setting(bool, "print one JSON document, for use by programs (see below)", False)


def build_parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """Builds the command's parser."""
    parser = OneSentenceParser(prog=program, description=DESCRIPTION, examples=EXAMPLES)
    actions: Any = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    checking = actions.add_parser(
        "check", help="print the classes and problems of a dataset, and draw images", description=CHECK,
        examples=CHECK_EXAMPLES, document=CHECK_DOCUMENT,
    )  # fmt: skip
    settings_parser(CheckSettings, checking, "data")
    converting = actions.add_parser(
        "convert", help="write a dataset in another format", description=CONVERT, examples=CONVERT_EXAMPLES,
        document=CONVERT_DOCUMENT,
    )  # fmt: skip
    settings_parser(ConvertSettings, converting, "data", "out")
    return parser


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Runs the command; returns 0, 1 if something is wrong with the data, or 2 after one sentence on standard error."""
    parser = build_parser(program)
    words = list(arguments or ())
    own = subcommands(parser)
    if not words or words[0] not in own:
        parser.parse_args(words[:1])  # exits
    kind: type[DataSettings] = CheckSettings if words[0] == "check" else ConvertSettings
    action: Any = own[words[0]]
    program = f"{program} {words[0]}"
    try:
        settings: Any = parse_settings(kind, action, words[1:])
    except MISTAKES as error:
        return mistake(program, error)
    with one_document(settings.json) as emit:
        try:
            if not settings.annotations and settings.format != "digits":
                require(settings, "data", positional=["data"])
            return _check(settings, emit) if words[0] == "check" else _convert(settings, emit)
        except MISTAKES as error:
            return mistake(program, error)
        except KeyboardInterrupt:
            return interrupted(program, "nothing was written.")


def _check(settings: CheckSettings, emit: Callable[[Any], None]) -> int:
    settings = settings.resolved()
    if settings.format == "digits":
        raise SettingsError("Scenes of digits are generated as they are read: there is nothing to check.")
    source = replace(settings.source((None, None)), skip_bad=True)
    parts, findings = check.open_parts(str(settings.format), source)
    frame_is_known = settings.annotation_frame is not None
    total = sum(len(check.chosen(len(data.items), settings.limit)) for data in parts.values())
    with tqdm(total=total, unit="image", disable=no_bars()) as bar:
        report = check.check_data(parts, findings, settings.limit, frame_is_known, bar.update)
    say(f"Task {report.task}, {len(report.labels)} {'class' if len(report.labels) == 1 else 'classes'}.")
    for name, part in report.parts.items():
        crowds = f", {number_of(part.crowds, 'crowd')}" if part.crowds else ""
        whole = len(parts[name].items)
        limited = f"; read {settings.limit:,} of {whole:,}" if settings.limit and settings.limit < whole else ""
        say(f"{name}: {_size_line(part)}{crowds}{limited}.")
    for line in _table(report):
        say(line)
    if all_crowds := sum(part.crowds for part in report.parts.values()):
        say(crowd_note(all_crowds, sum(int(part.segments.sum()) for part in report.parts.values())))
    if unread := check.unread_note(settings.data, parts):
        say(unread)
    allowed = settings.allow or ()
    counted = Counter(finding.kind for finding in report.findings)
    for kind, count in counted.items():
        say(f"{kind}{' (allowed)' if kind in allowed else ''}: {count:,}, {check.KINDS[kind]}")
        of_kind = [finding for finding in report.findings if finding.kind == kind]
        for finding in of_kind[:MOST_LISTED]:
            say(f"  {finding.part}: {finding.text}")
        if count > MOST_LISTED:
            say(f"  and {count - MOST_LISTED:,} more (--json lists all)")
    wrong = sum(count for kind, count in counted.items() if kind not in allowed)
    say(f"{number_of(wrong, 'problem')}." if wrong else "No problems found.")
    sheet = _draw(settings, report, parts)
    emit({"data": settings.data, "format": settings.format, **check.to_json(report), "wrong": wrong,
          "unread": unread, "sheet": None if sheet is None else str(sheet)})  # fmt: skip
    return SOME_LEFT_OUT if wrong else DONE


def _table(report: check.Report) -> list[str]:
    """The lines of a table with the pixels, segments and images of each class in each part."""
    rows = [["class", *(f"{name} {what}" for name in report.parts for what in ("pixels", "segments", "images"))]]
    for label, name in enumerate(report.labels):
        cells = [(part.pixels[label], part.segments[label], part.pictures[label]) for part in report.parts.values()]
        rows.append([name, *(f"{number:,}" for cell in cells for number in cell)])
    rows.append(["(no class)", *(cell for part in report.parts.values() for cell in (f"{part.unlabelled:,}", "", ""))])
    return aligned(rows)


def _size_line(part: check.PartReport) -> str:
    """A line with the number and the sizes of a part's images."""
    if not part.images:
        return "no image that can be read"
    sizes = sorted(part.sizes)
    text = f"{number_of(part.images, 'image')}"
    if len(sizes) == 1:
        return f"{text} of {sizes[0][0]}x{sizes[0][1]}"
    heights, widths = sorted({height for height, _ in sizes}), sorted({width for _, width in sizes})
    return f"{text} of {len(sizes)} sizes, heights {heights[0]} to {heights[-1]}, widths {widths[0]} to {widths[-1]}"


def _draw(settings: CheckSettings, report: check.Report, parts: dict[str, OpenData]) -> Path | None:
    """Draws the images with the rarest classes, and returns the file; None if there is none to draw.

    Raises:
        OSError: the file cannot be written.
    """
    chosen = check.rarest_first(report, settings.draw)
    if not chosen:
        return None
    id2label = dict(enumerate(report.labels))
    panels, captions = [], []
    for part, index, label in chosen:
        item = parts[part].items[index]
        segments = segments_of_item(item)
        things = parts[part].description.things
        factor = min(HEIGHT / item["height"], WIDEST / item["width"])
        longest = max(1, round(factor * max(item["height"], item["width"])))
        image, small = scaled(picture_of(item["image"]), segments, longest)
        small.stuff_ids = frozenset(id2label) - things if report.task == "panoptic" else frozenset()
        panels.append(draw_segments(image, small, id2label))
        room = image.width // CHARACTER
        captions.append(f"{report.labels[label]}: {part}/{Path(item['file_name']).name}"[:room])
    rows = [
        beside(panels[start : start + IN_A_ROW], captions[start : start + IN_A_ROW])
        for start in range(0, len(panels), IN_A_ROW)
    ]
    path = Path(settings.out) / SHEET
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: below(rows).save(file, "PNG"))
    say(f"Written: {path}, {number_of(len(panels), 'image')} with the rarest classes first.")
    return path


def _convert(settings: ConvertSettings, emit: Callable[[Any], None]) -> int:
    named = Path(str(settings.data))
    if settings.annotations and settings.out is None and not (named.is_dir() and any(named.iterdir())):
        settings = replace(settings, data=None, out=settings.data)  # the only folder to name is that to write
    require(settings, "out", "to", positional=["out"])
    settings = settings.resolved()
    if settings.format == "digits":
        raise SettingsError("Scenes of digits are generated as they are read: there is nothing to convert.")
    out = Path(str(settings.out))
    check_empty_folder(out, SettingsError, flag="OUT")
    opened, findings = check.open_parts(str(settings.format), settings.source((None, None)))
    # A dataset without splits is split in the same way as for training.
    is_file = set(opened) == {"all"} and settings.format == "hub"
    if is_file:
        parts = {"train": opened["all"]}
    elif set(opened) == {"all"}:
        source, names = settings.source((None, None)), ("train", "val")
        parts = {name: check.open_part(str(settings.format), source, name) for name in names}
    else:
        parts = {kind_of_part(name) or name: data for name, data in opened.items()}
    notes = [finding.text for finding in findings]
    if is_file:
        notes.append(f"{settings.data} is a single file, not divided into parts: all of it becomes train.")
    if unread := check.unread_note(settings.data, parts):
        notes.append(unread)
    left_out: list[str] = []
    for name, data in parts.items():
        left_out += data.description.skipped
        if settings.skip_bad and isinstance(data.items, datasets.Dataset):
            items, bad = without_bad_items(data.items)
            parts[name] = replace(data, items=items)
            left_out += [one.error for one in bad]
    left_out = list(dict.fromkeys(left_out))  # parts of undivided data have the same list of skipped files
    with tqdm(total=sum(len(data.items) for data in parts.values()), unit="image", disable=no_bars()) as bar:
        notes += convert_data(parts, out, str(settings.to), bar.update)
    for note in notes:
        say(note)
    say_skipped(left_out)
    counts = {name: len(data.items) for name, data in parts.items()}
    written = ", ".join(f"{name} {number_of(count, 'image')}" for name, count in counts.items())
    say(f"Written: {out}, {written}.")
    form = "folder" if settings.to == "masks" else str(settings.to)
    emit({"out": str(out), "format": form, "images": counts, "left_out": left_out, "notes": notes})
    return DONE

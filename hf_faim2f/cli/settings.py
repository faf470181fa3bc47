"""Settings of a command, from a YAML file and from flags: a dataclass says once what there is, and both follow it.

A flag wins over the file, the file over the default. In the file `batch_size` and `batch-size` are the same.
"""

import argparse
import dataclasses
import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import yaml

from ..data.dataset import Task
from ..data.files import AnnotationFrame
from ..data.formats import FORMATS, DataSource
from ..data.readers.folder import read_labels
from ..errors import SettingsError
from ..files import decode_text
from .parser import OneSentenceParser

# No file of settings comes near; one that does is another file.
MOST_BYTES = 1 << 20
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")

Settings = TypeVar("Settings")


def setting(
    kind: type,
    text: str,
    default: Any = None,
    *,
    choices: Sequence[str] = (),
    words: Sequence[str] = (),
    least: float | None = None,
) -> Any:
    """A field of a class of settings.

    Args:
        kind: str, int, float, bool, or tuple for several words, which commas divide in a flag.
        text: what it says, for the help.
        default: where neither flag nor file have it; None for none.
        choices: the words that it may be.
        words: those that it often is, for completion, where there are no choices.
        least: the smallest number that it may be.
    """
    about = {"kind": kind, "text": text, "choices": tuple(choices), "words": tuple(words), "least": least}
    return dataclasses.field(default=default, metadata=about)


def settings_parser(kind: Any, parser: OneSentenceParser, positional: str | None = None) -> OneSentenceParser:
    """Gives a parser a flag for each field of a dataclass of settings, and --config for a file of them.

    Args:
        kind: a dataclass of `setting` fields.
        parser: of the command.
        positional: the field that stands without a flag, if there is one.
    """
    fields = _fields(kind)
    if positional:
        parser.add_argument(positional, nargs="?", metavar=positional.upper(), help=fields[positional]["text"])
    config = "a YAML file of these settings; flags win over it (default: none)"
    parser.add_argument("--config", metavar="FILE", help=config)
    for name, about in fields.items():
        if name == positional:
            continue
        flag = "--" + name.replace("_", "-")
        text = _help(about).replace("%", "%%")
        if about["kind"] is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            action = parser.add_argument(flag, metavar=_metavar(about), help=text)
            parser.words[action.dest] = about["choices"] or about["words"]
    return parser


def parse_settings(kind: type[Settings], parser: OneSentenceParser, arguments: Sequence[str] | None) -> Settings:
    """The settings that a command is called with.

    Args:
        kind: a dataclass of `setting` fields.
        parser: what `settings_parser` made of it.
        arguments: of the command line, without the command; None for this process's.

    Raises:
        SettingsError: see there.
        SystemExit: of status 2 for a flag that is not known, after one line on standard error; 0 after the help.
    """
    fields = _fields(kind)
    options = vars(parser.parse_args(arguments))
    file = options.pop("config")
    values = read_settings_file(kind, file) if file else {}
    for name, value in options.items():
        if value is not None:
            values[name] = _checked(f"--{name.replace('_', '-')}", value, fields[name])
    return kind(**values)


def read_settings_file(kind: type, path: str | Path) -> dict[str, Any]:
    """The checked settings of a YAML file.

    Raises:
        SettingsError: the file cannot be read, or has a key that is no setting, or a value that cannot be.
    """
    try:
        with Path(path).open("rb") as file:
            text = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror or error}.") from error
    if len(text) > MOST_BYTES:
        raise SettingsError(f"{path} has more than {MOST_BYTES} bytes: it is no file of settings.")
    try:
        content = yaml.safe_load(decode_text(text))
    # Of what a tag such as !!int or !!timestamp stands before, its reader takes the form for granted.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        reason = getattr(error, "problem", None) or next(iter(str(error).splitlines()), type(error).__name__)
        raise SettingsError(f"{path} is not YAML{where}: {reason}.") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{path} must have one `name: value` a line, but is a {type(content).__name__}.")
    fields = _fields(kind)
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = key.replace("-", "_") if isinstance(key, str) else None
        if name not in fields:
            nearest = difflib.get_close_matches(str(name), fields, 1, 0.5)
            hint = f"did you mean `{nearest[0]}`?" if nearest else f"it knows {', '.join(fields)}."
            raise SettingsError(f"{path} has the key {_short(key)}, which is no setting; {hint}")
        if name in values:
            raise SettingsError(f"{path} has {name} twice.")
        if value is not None:
            values[name] = _checked(f"{path}: {key}", value, fields[name])
    return values


def given(settings: Any) -> dict[str, Any]:
    """The settings that differ from the defaults, as plain data for YAML."""
    values = {field.name: (getattr(settings, field.name), field.default) for field in dataclasses.fields(settings)}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, (value, default) in values.items()
        if value != default
    }


def require(settings: Any, *names: str) -> None:
    """SettingsError for the first of these settings that was not given."""
    for name in names:
        if getattr(settings, name) is None:
            flag = "--" + name.replace("_", "-")
            raise SettingsError(f"{name} is missing: pass {flag}, or write `{name}: ...` into the file of --config.")


def read_size(text: str, where: str, least: int = 32) -> tuple[int, int]:
    """(height, width) of a setting such as "512x1024".

    Raises:
        SettingsError: it is none, or a side is smaller than `least`.
    """
    height, _, width = text.lower().partition("x")
    if not (height.isascii() and height.isdigit() and width.isascii() and width.isdigit() and len(text) < 20):
        raise SettingsError(f"{where} must be HEIGHTxWIDTH in pixels, such as 512x1024, not {_short(text)}.")
    if min(int(height), int(width)) < least:
        raise SettingsError(f"{where} must have at least {least} pixels a side, not {text}.")
    return int(height), int(width)


def _fields(kind: Any) -> dict[str, Any]:
    return {field.name: {**field.metadata, "default": field.default} for field in dataclasses.fields(kind)}


def _checked(where: str, value: Any, about: dict[str, Any]) -> Any:
    """The value as the setting's kind."""
    kind, choices, least = about["kind"], about["choices"], about["least"]
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", tuple: "a list of words"}
    checked: Any = None
    if kind is tuple:
        words = value.split(",") if isinstance(value, str) else value
        if isinstance(words, (list, tuple)) and words and all(isinstance(word, (str, int)) for word in words):
            checked = tuple(str(word).strip() for word in words)
            checked = checked if all(checked) else None  # "a,,b": is one missing, or is there a comma too many?
    elif kind is bool:
        if isinstance(value, bool):
            checked = value
        elif isinstance(value, str) and value.lower() in (*TRUE, *FALSE):
            checked = value.lower() in TRUE
    elif isinstance(value, (str, int, float)) and not isinstance(value, bool):
        try:
            # A fraction is no whole number, and of `1.0` YAML has made one.
            checked = None if kind is int and isinstance(value, float) else kind(value)
        except (ValueError, OverflowError):
            checked = None
    if checked is None or (isinstance(checked, float) and not math.isfinite(checked)):
        raise SettingsError(f"{where} must be {wanted[kind]}, not {_short(value)}.")
    if least is not None and checked < least:
        raise SettingsError(f"{where} must be at least {least:g}, not {_short(value)}.")
    for word in checked if kind is tuple else (checked,):
        if choices and word not in choices:
            nearest = difflib.get_close_matches(str(word), choices, 1, 0.4)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise SettingsError(f"{where} must be one of {', '.join(choices)}, not {_short(word)}.{hint}")
    return checked


def _short(value: Any) -> str:
    """What a value is called in a message; YAML's aliases can make a container of any size."""
    if isinstance(value, (dict, list, tuple, set)):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _metavar(about: dict[str, Any]) -> str:
    return {int: "N", float: "X", tuple: "A,B,..."}.get(about["kind"], "WORD" if about["choices"] else "NAME")


def _help(about: dict[str, Any]) -> str:
    text = about["text"]
    if about["choices"]:
        text += f": {', '.join(about['choices'])}"
    if about["kind"] is bool:
        return f"{text} (default: {'yes' if about['default'] else 'no'})"
    if about["default"] is not None:
        return f"{text} (default: {about['default']})"
    return text if "default" in text or "needed" in text else f"{text} (default: none)"


# The settings that say which data a command works on: shared by all that read any.

TASKS = get_args(Task)
FRAMES = get_args(AnnotationFrame)


@dataclass(frozen=True)
class DataSettings:
    """Where the data is, and how it is to be read."""

    data: str | None = setting(str, "where the data is, which the format says; needed but for digits")
    format: str | None = setting(
        str,
        "how it is laid out; needed: " + "; ".join(f"{row.name} ({row.summary})" for row in FORMATS.values()),
        words=tuple(FORMATS),
    )
    task: str | None = setting(
        str, "what a format's masks are, where it has several kinds (default: what the data says)", choices=TASKS
    )
    labels: tuple[str, ...] | None = setting(
        tuple, "class names, or a file with one a line, for folder and hub (default: those that the data names)"
    )
    ignore_index: int = setting(int, "value of a mask's pixels without class, -1 for none", 255, least=-1)
    reduce_labels: bool = setting(bool, "0 is no class in masks, and the classes begin at 1", False)
    annotation_frame: str | None = setting(
        str,
        "what annotations are of where an image is stored turned (EXIF) and their size does not tell: the image "
        "upright or its pixels as stored (default: upright, with a warning)",
        choices=FRAMES,
    )
    image_size: int | None = setting(
        int,
        "shorter edge of the images that the model sees, in pixels (default: as the "
        "model's processor has it, or of a new model the recipe)",
        least=32,
    )
    skip_bad: bool = setting(bool, "go on past images and annotations that cannot be read, and report them", False)

    def source(self, splits: tuple[str | None, str | None]) -> DataSource:
        """Where the data is, for `open_data`."""
        labels = self.labels
        if labels is not None and len(labels) == 1 and Path(labels[0]).is_file():
            labels = read_labels(Path(labels[0]))
        return DataSource(
            root=self.data or "",
            task=cast(Task | None, self.task),
            labels=labels,
            ignore_index=None if self.ignore_index < 0 else self.ignore_index,
            reduce_labels=self.reduce_labels,
            splits=splits,
            size=self.image_size,
            skip_bad=self.skip_bad,
            annotation_frame=cast(AnnotationFrame | None, self.annotation_frame),
        )

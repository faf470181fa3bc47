"""Settings of a command from flags and from a YAML file, both described by one dataclass.

Flags override the file, and the file overrides defaults. In the file, `batch_size` and `batch-size` are equivalent.

Why not a library: `HfArgumentParser` reads either a YAML file or flags, never both; `jsonargparse` merges them, but
reports errors in several lines without a suggestion, and would be one more dependency in place of 150 lines.
"""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import yaml

from ..data.dataset import Task
from ..data.files import AnnotationFrame
from ..data.formats import AUTO, FORMATS, DataSource, recognize
from ..data.readers.folder import read_labels
from ..errors import SettingsError, nearest_name
from ..files import decode_text, yaml_problem
from ..model.channels_faim2f import RGB
from .output import say
from .parser import OneSentenceParser

# Limit on the size of a settings file, far above any real one.
MOST_BYTES = 1 << 20
# A single class name with one of these suffixes is reported as a missing file.
NAMES_SUFFIXES = (".txt", ".names", ".csv", ".json", ".yaml", ".yml")
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
TASKS = get_args(Task)
FRAMES = get_args(AnnotationFrame)

Settings = TypeVar("Settings")


def setting(
    kind: type,
    text: str,
    default: Any = None,
    *,
    choices: Sequence[str] = (),
    words: Sequence[str] = (),
    least: float | None = None,
    also: Sequence[str] = (),
    pairs: bool = False,
) -> Any:
    """A field of a settings dataclass.

    Args:
        kind: str, int, float, bool, or tuple for several words, separated by commas in a flag.
        text: the help text.
        default: the value if neither a flag nor the file sets it.
        choices: the allowed words.
        words: common words, for shell completion, if there are no choices.
        least: the smallest allowed number.
        also: words that are allowed in place of a number.
        pairs: a tuple's words may also be the entries of a mapping in a file; they become "NAME: VALUE".
    """
    about = {"kind": kind, "text": text, "choices": tuple(choices), "words": tuple(words), "least": least}
    about |= {"also": tuple(also), "pairs": pairs}
    return dataclasses.field(default=default, metadata=about)


def settings_parser(kind: Any, parser: OneSentenceParser, *positional: str) -> OneSentenceParser:
    """Adds a flag for each field of a settings dataclass to a parser, and --config for a YAML file with them.

    Args:
        kind: a dataclass of `setting` fields.
        parser: the command's parser.
        positional: fields that become positional arguments.
    """
    fields = _fields(kind)
    for name in positional:
        parser.add_argument(name, nargs="?", metavar=name.upper(), help=fields[name]["text"])
    config = "a YAML file with any of these settings; flags override it (default: none)"
    parser.add_argument("--config", metavar="FILE", help=config)
    for name, about in fields.items():
        if name in positional:
            continue
        flag = "--" + name.replace("_", "-")
        text = _help(about).replace("%", "%%")
        if about["kind"] is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            action = parser.add_argument(flag, metavar=_metavar(about), help=text)
            parser.words[action.dest] = about["choices"] or about["words"] or about["also"]
    return parser


def parse_settings(kind: type[Settings], parser: OneSentenceParser, arguments: Sequence[str] | None) -> Settings:
    """Parses the command line and reads the settings file that it names.

    Args:
        kind: a dataclass of `setting` fields.
        parser: the result of `settings_parser`.
        arguments: the command line's arguments after the command; None for those of this process.

    Raises:
        SettingsError: a setting is unknown or invalid.
        SystemExit: with status 2 after one line on standard error for an unknown flag; with 0 after the help.
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
    """Reads and checks the settings in a YAML file.

    Raises:
        SettingsError: the file cannot be read, or a setting in it is unknown or invalid.
    """
    try:
        with Path(path).open("rb") as file:
            text = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror or error}.") from error
    if len(text) > MOST_BYTES:
        raise SettingsError(f"{path} has more than {MOST_BYTES} bytes: it is not a settings file.")
    try:
        node, content = yaml.compose(decode_text(text), yaml.SafeLoader), yaml.safe_load(decode_text(text))
    # PyYAML's constructors of tags such as !!int and !!timestamp may raise any of these for a malformed value.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise SettingsError(f"{path} is not YAML{yaml_problem(error)}.") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{path} must have one `name: value` per line, but is a {type(content).__name__}.")
    keys = [str(key.value) for key, _ in node.value]  # of which YAML would take the last one
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise SettingsError(f"{path} has {_short(twice)} twice.")
    fields = _fields(kind)
    nodes = {key.value: entry for key, entry in node.value if isinstance(key, yaml.ScalarNode)}
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = key.replace("-", "_") if isinstance(key, str) else None
        if name not in fields:
            nearest = nearest_name(str(name), fields, 0.5)
            hint = f"did you mean `{nearest}`?" if nearest else f"it knows {', '.join(fields)}."
            raise SettingsError(f"{path} has the key {_short(key)}, which is not a setting; {hint}")
        if name in values:
            raise SettingsError(f"{path} has {name} twice.")
        if value is not None:
            if key in nodes and fields[name]["kind"] in (str, tuple):
                value = _as_written(value, nodes[key])
            values[name] = _checked(f"{path}: {key}", value, fields[name])
    return values


def _as_written(value: Any, node: yaml.Node) -> Any:
    """The words of a value as they are in the file: YAML reads the class names `no` and `010` as False and 8.

    Only one level deep, because YAML aliases can make nested values huge.
    """
    if isinstance(node, yaml.ScalarNode):
        return value if value is None else node.value
    if isinstance(node, yaml.SequenceNode) and isinstance(value, list):
        pairs = zip(value, node.value, strict=True)
        return [_as_written(one, own) if not isinstance(own, yaml.SequenceNode) else one for one, own in pairs]
    if isinstance(node, yaml.MappingNode) and all(isinstance(one, yaml.ScalarNode) for one in chain(*node.value)):
        return {name.value: own.value for name, own in node.value}
    return value


def given(settings: Any) -> dict[str, Any]:
    """The settings that differ from the defaults, as plain data for YAML."""
    values = {field.name: (getattr(settings, field.name), field.default) for field in dataclasses.fields(settings)}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, (value, default) in values.items()
        if value != default
    }


def require(settings: Any, *names: str, positional: Sequence[str] = ()) -> None:
    """Raises SettingsError if one of these settings was not given; those in `positional` have no flag."""
    for name in names:
        if getattr(settings, name) is None:
            flag = name.upper() if name in positional else "--" + name.replace("_", "-")
            raise SettingsError(f"{name} is missing: pass {flag}, or write `{name}: ...` into the file of --config.")


def read_size(text: str, where: str, least: int = 32) -> tuple[int, int]:
    """Parses a size such as "512x1024" into (height, width).

    Args:
        text: the setting.
        where: the setting's name in messages.
        least: the smallest allowed side in pixels.

    Raises:
        SettingsError: the text is not a size, or a side is smaller than `least`.
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
    """Converts a value to the setting's kind and checks it."""
    kind, choices, least = about["kind"], about["choices"], about["least"]
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", tuple: "a list of words"}
    checked: Any = None
    if isinstance(value, str) and value in about["also"]:
        return value
    if kind is tuple:
        value = _pairs(value) if about["pairs"] else value
        words = value.split(",") if isinstance(value, str) else value
        if isinstance(words, (list, tuple)) and words and all(isinstance(word, (str, int)) for word in words):
            checked = tuple(str(word).strip() for word in words)
            checked = checked if all(checked) else None  # "a,,b" lacks a word
    elif kind is bool:
        if isinstance(value, bool):
            checked = value
        elif isinstance(value, str) and value.lower() in (*TRUE, *FALSE):
            checked = value.lower() in TRUE
    elif isinstance(value, (str, int, float)) and not isinstance(value, bool):
        try:
            # 1.5 is not a whole number; YAML also reads `1.0` as a float.
            checked = None if kind is int and isinstance(value, float) else kind(value)
        except (ValueError, OverflowError):
            checked = None
    if checked is None or (isinstance(checked, float) and not math.isfinite(checked)):
        expected = " or ".join([wanted[kind], *about["also"]])
        raise SettingsError(f"{where} must be {expected}, not {_short(value)}.")
    if least is not None and checked < least:
        raise SettingsError(f"{where} must be at least {least:g}, not {_short(value)}.")
    for word in checked if kind is tuple else (checked,):
        if choices and word not in choices:
            nearest = nearest_name(str(word), choices)
            hint = f" Did you mean {nearest!r}?" if nearest else ""
            raise SettingsError(f"{where} must be one of {', '.join(choices)}, not {_short(word)}.{hint}")
    return checked


def _pairs(value: Any) -> Any:
    """A mapping, or a list with mappings in it, as a list of "NAME: VALUE"; anything else unchanged."""
    if isinstance(value, dict):
        return [f"{name}: {number}" for name, number in value.items()]
    if isinstance(value, list):
        return [word for entry in value for word in (_pairs(entry) if isinstance(entry, dict) else [entry])]
    return value


def _short(value: Any) -> str:
    """A value for a message; for a container only its type, because YAML aliases can make it huge."""
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
    return text if "default" in text or "required" in text else f"{text} (default: none)"


# Settings that only some formats use.
OF_FORMATS = {
    "palette": ("colors", "voc", "camvid"),
    "labels": ("folder", "hub", "labelme", "voc", "camvid", "colors"),
    "ignore_index": ("folder", "hub", "camvid", "roboflow-masks"),
    "reduce_labels": ("folder", "hub", "ade20k"),
}


@dataclass(frozen=True)
class DataSettings:
    """The settings of commands that read data: its location and how to read it."""

    data: str | None = setting(str, "folder, file or Hub id of the data, depending on the format (required except for "
                               "digits)")  # fmt: skip
    format: str | None = setting(
        str,
        "format of the data (default: auto, which detects it; required for digits): "
        + "; ".join(f"{row.name} ({row.summary})" for row in FORMATS.values()),
        words=(AUTO, *FORMATS),
    )
    annotations: tuple[str, ...] | None = setting(
        tuple, "COCO JSON: one file, or one for training and one for validation (default: those in the data)"
    )
    images: tuple[str, ...] | None = setting(
        tuple, "folder of the images of --annotations, or one for each file (default: next to the file)"
    )
    task: str | None = setting(
        str, "kind of annotations, if the format has several (default: detected from the data)", choices=TASKS
    )
    labels: tuple[str, ...] | None = setting(
        tuple,
        "class names, or a file with one name per line, for folder, hub, labelme, voc and camvid (default: those in "
        "the data)",
    )
    ignore_index: int = setting(int, "value of mask pixels to ignore; -1 for none", 255, least=-1)
    palette: str | None = setting(
        str, "colors of masks: a file with `name r g b` on each line, or voc (default: labels.txt of the data)"
    )
    reduce_labels: bool = setting(bool, "0 in masks means no class, and classes start at 1", False)
    annotation_frame: str | None = setting(
        str,
        "whether annotations of images with an EXIF rotation refer to the upright image or the stored pixels, if their "
        "size does not tell (default: upright, with a warning)",
        choices=FRAMES,
    )
    channels: int | None = setting(
        int, "number of image channels, if not RGB (default: the model's if there is one, else 3)", least=1
    )
    skip_bad: bool = setting(bool, "skip and list images and annotations that cannot be read", False)

    def resolved(self: Settings) -> Settings:
        """The settings with the detected format, if none or "auto" is given; prints it.

        Raises:
            ValueError: no format is given and none is recognized, or a given flag does not apply to the format.
        """
        settings = cast(DataSettings, self)
        name = settings.format
        if name in (None, AUTO):
            if name is None and settings.data is None and settings.annotations is None:
                require(settings, "format")
            found = recognize(settings.source((None, None)))
            where = settings.data or ", ".join(settings.annotations or ())
            say(f"{where} has the format {found.format}, because it has {found.reason}.")
            name = found.format
        if name != "coco" and (settings.annotations or settings.images):
            raise SettingsError(
                f"--annotations and --images are for the format coco, not for {name}: name the folder of the data."
            )
        if settings.images and not settings.annotations:
            raise SettingsError("--images requires --annotations: name the JSON file, too.")
        usual = {field.name: field.default for field in dataclasses.fields(DataSettings)}
        for setting_name, formats in OF_FORMATS.items():
            if name not in formats and getattr(settings, setting_name) != usual[setting_name]:
                raise SettingsError(
                    f"--{setting_name.replace('_', '-')} is for the formats {', '.join(formats[:-1])} and "
                    f"{formats[-1]}, not for {name}: leave it out."
                )
        return dataclasses.replace(self, format=name)  # type: ignore[type-var]

    def source(self, splits: tuple[str | None, str | None]) -> DataSource:
        """The source of the data, for `open_data`."""
        return DataSource(
            root=self.data or "",
            task=cast(Task | None, self.task),
            labels=None if self.labels is None else _class_names(self.labels),
            ignore_index=None if self.ignore_index < 0 else self.ignore_index,
            reduce_labels=self.reduce_labels,
            splits=splits,
            skip_bad=self.skip_bad,
            annotation_frame=cast(AnnotationFrame | None, self.annotation_frame),
            annotations=self.annotations or (),
            images=self.images or (),
            palette=self.palette,
            num_channels=self.channels or RGB,
        )


@dataclass(frozen=True)
class ModelDataSettings(DataSettings):
    """The settings of commands that read data for a model."""

    image_size: int | None = setting(
        int,
        "shorter edge in pixels to which images are resized (default: that of the model's image processor, or the "
        "recipe's for a new model)",
        least=32,
    )

    def source(self, splits: tuple[str | None, str | None]) -> DataSource:
        """The source of the data, for `open_data`."""
        return dataclasses.replace(super().source(splits), size=self.image_size)


def _class_names(words: tuple[str, ...]) -> tuple[str, ...]:
    """The class names in --labels, or in the file that it names.

    Raises:
        SettingsError: a name occurs twice, or there is no such file.
    """
    if len(words) == 1 and Path(words[0]).is_file():
        return read_labels(Path(words[0]))
    if len(words) == 1 and Path(words[0]).suffix.lower() in NAMES_SUFFIXES:
        raise SettingsError(f"--labels: there is no file {words[0]}; name an existing one, or the classes themselves.")
    if twice := next((word for word in words if words.count(word) > 1), None):
        raise SettingsError(f"--labels has the class name {twice!r} twice: name each once, in the order of their ids.")
    return words

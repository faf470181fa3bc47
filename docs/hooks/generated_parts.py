"""Parts of the documentation that are generated from the code while MkDocs builds the site.

A page asks for one by a line `<!-- generated: NAME -->`, with NAME a key of `PARTS`.
"""

import argparse
import functools
import re
import textwrap
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = "benchmarks/results"
MARK = re.compile(r"^<!-- generated: ([\w ]+) -->$", re.MULTILINE)
METRICS = {"mIoU": "mIoU", "segm/AP": "mask AP"}
DATA = {"ade20k": "ADE20K", "coco": "COCO"}


def on_files(files: Any, config: Any) -> Any:
    """MkDocs' event: adds the benchmarks' figures, of which the repository has one copy."""
    from mkdocs.structure.files import File

    for path in sorted((ROOT / RESULTS).glob("*.png")):
        files.append(File.generated(config, f"images/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs' event: the page's text with its generated parts, and links to the benchmarks' figures in the site."""
    markdown = MARK.sub(lambda mark: PARTS[mark[1]](), markdown)
    return markdown.replace(f"](../{RESULTS}/", "](images/")


# -------------------------------------------------------------------------------------------------------------- models


@functools.cache
def parameter_count(name: str) -> int:
    """Parameters of a published model, counted without allocating them."""
    import torch

    from hf_faim2f import FaiM2FForUniversalSegmentation, load_config

    with torch.device("meta"):
        model = FaiM2FForUniversalSegmentation(load_config(name))
    return sum(parameter.numel() for parameter in model.parameters())


def models() -> str:
    """The table of the published models, also in the README."""
    from hf_faim2f.family import FAMILY

    lines = [
        "| model | architecture | parameters | data | published | frames/s, T4 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, preset in FAMILY.items():
        published = preset.published
        (metric,) = (f"{published[key]:.2f} {word}" for key, word in METRICS.items() if key in published)
        rate = next((published[key] for key in published if key.startswith("fps_t4_tensorrt")), "–")
        parameters = f"{parameter_count(name) / 1e6:.1f} M"
        data = DATA[preset.dataset]
        lines.append(f"| `{name}` | {preset.summary} | {parameters} | {data} | {metric} | {rate} |")
    return "\n".join(lines)


def later_evaluations() -> str:
    """What Focoos's maintainers measured later, where they published it."""
    from hf_faim2f.family import FAMILY

    lines = ["| model | published | later evaluation |", "| --- | --- | --- |"]
    for name, preset in FAMILY.items():
        for key, word in METRICS.items():
            later = preset.re_evaluated.get(key if "/" in key else f"sem_seg/{key}")
            if later is not None:
                lines.append(f"| `{name}` | {preset.published[key]:.2f} {word} | {later:.2f} {word} |")
    return "\n".join(lines)


def peers() -> str:
    """Other models in the same published figures."""
    from hf_faim2f.family import published_peers

    lines = ["| model | mIoU, ADE20K | frames/s, T4, 640x640 |", "| --- | --- | --- |"]
    for name, row in published_peers()["ADE20K val"].items():
        lines.append(f"| {name} | {row['mIoU']} | {row['fps_t4_tensorrt_640']} |")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------- command line


def command_line() -> str:
    """Every command with its arguments, examples and JSON fields, from the parsers."""
    from hf_faim2f.cli import COMMANDS

    parts = []
    for name, command in COMMANDS.items():
        extra = f'Needs `pip install ".[{command.extra}]"`.' if command.extra else ""
        parser = import_module(command.module).build_parser(f"faim2f {name}")
        parts += [*_section(parser, 2, extra)]
    return "\n\n".join(part for part in parts if part)


def _section(parser: Any, level: int, extra: str = "") -> Iterator[str]:
    """A parser's heading, usage, arguments and examples, and then those of its subcommands."""
    yield f"{'#' * level} {parser.prog}"
    yield _text(parser.description or "")
    yield extra
    below: dict[str, Any] = {}
    actions = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            below = dict(action.choices)
        elif not isinstance(action, argparse._HelpAction):
            actions.append(action)
    if not below:
        # As wide as a page, whatever the terminal's width is.
        parser.formatter_class = functools.partial(argparse.RawDescriptionHelpFormatter, width=90)
        yield _fence("text", textwrap.dedent(" " * 7 + parser.format_usage().removeprefix("usage: ")))
    formatter = parser._get_formatter()
    # An entry stays in one piece: an empty line would end the list.
    yield "\n\n".join(f"`{_name(action, formatter)}`\n:   {_help(action, formatter)}" for action in actions)
    document = getattr(parser, "document", None)
    for part in (parser.epilog or "").split("\n\n"):
        if part.startswith("examples:"):
            yield _fence("bash", textwrap.dedent(part.partition("\n")[2]))
        elif part and not (document and part.startswith("With --json")):
            yield _fence("text", part)
    if document:
        yield "Fields of the document that `--json` prints:"
        yield "\n\n".join(f"`{name}`\n:   {_text(text)}" for name, text in document.items())
    for child in below.values():
        yield from _section(child, level + 1)


def _name(action: argparse.Action, formatter: Any) -> str:
    """An argument as the usage has it: its flags, and what follows them."""
    if not action.option_strings:
        return str(formatter._format_args(action, action.dest))
    value = "" if action.nargs == 0 else formatter._format_args(action, action.dest.upper())
    return f"{', '.join(action.option_strings)} {value}".strip()


def _help(action: argparse.Action, formatter: Any) -> str:
    return _text(formatter._expand_help(action) if action.help else "")


def _text(text: str) -> str:
    """Plain text as Markdown: what is between backticks stays as it is, the rest is escaped."""
    pieces = text.split("`")
    escaped = [re.sub(r"([\\*_\[\]#])", r"\\\1", piece.replace("&", "&amp;").replace("<", "&lt;")) for piece in pieces]
    kept = [piece if place % 2 else escaped[place] for place, piece in enumerate(pieces)]
    return "`".join(kept).strip()


def _fence(language: str, text: str) -> str:
    return f"```{language}\n{text.strip()}\n```"


# ------------------------------------------------------------------------------------------------------ included pages


def security() -> str:
    """SECURITY.md of the repository, its links as seen from docs/."""
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    return text.replace("](docs/", "](")


PARTS: dict[str, Callable[[], str]] = {
    "command line": command_line,
    "later evaluations": later_evaluations,
    "models": models,
    "peers": peers,
    "security": security,
}

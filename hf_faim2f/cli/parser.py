"""The argument parser of every command: a mistake is one sentence, and the help has examples that work."""

import argparse
import difflib
import shlex
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from .output import MISTAKE

# Of what follows the arguments in the help, in characters; and where its second column begins.
WIDTH, LEFT = 100, 24
WITH_JSON = (
    "With --json standard output is one JSON document, and every other line is on standard error. After a mistake "
    "standard output is empty. Its fields:"
)


class OneSentenceParser(argparse.ArgumentParser):
    """An argument parser that tells a mistake in one line, and of a misspelt word the nearest real one.

    Args:
        examples: (what for, the arguments behind the program's name), for the end of the help.
        document: the fields of what --json prints, and what they are; the parser then has --json.
        more: of `argparse.ArgumentParser`.
    """

    def __init__(
        self, *, examples: Sequence[tuple[str, str]] = (), document: Mapping[str, str] | None = None, **more: Any
    ) -> None:
        more = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, **more}
        super().__init__(**more)
        self.words: dict[str, Sequence[str]] = {}  # for completion: of arguments, by `dest`, that have no choices
        self.document = document
        parts = [self.epilog] if self.epilog else []
        if examples:
            lines = [f"  # {what_for}\n  {self.prog} {words}".rstrip() for what_for, words in examples]
            parts.append("\n".join(["examples:", *lines]))
        if document is not None:
            parts.append("\n".join([_wrapped(WITH_JSON), *_columns(document)]))
        self.epilog = "\n\n".join(parts) or None

    def add_json(self) -> None:
        """Adds --json, last of the arguments."""
        self.add_argument("--json", action="store_true", help="print one JSON document, for programs (see below)")

    def error(self, message: str) -> NoReturn:
        end = "" if message.endswith(("?", ".")) else "."
        self.exit(MISTAKE, f"{self.prog}: {message}{end}\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, rest = self.parse_known_args(args, namespace)
        if rest:
            chosen = _chosen(self, options)
            flags = [flag for action in chosen._actions for flag in action.option_strings if flag.startswith("--")]
            hint = did_you_mean(rest[0].partition("=")[0], flags) or f"it knows {', '.join(sorted(flags))}"
            chosen.error(f"there is no argument {rest[0]}; {hint}")
        return options

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        name = "/".join(action.option_strings) or str(action.metavar or action.dest)
        hint = did_you_mean(str(value), known) or f"choose from {', '.join(known)}"
        below = isinstance(action, argparse._SubParsersAction)
        self.error(f"there is no {name.lower()} {value!r}; {hint}" if below else f"{name} cannot be {value!r}; {hint}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question that names the nearest of the known words; empty where none is near."""
    nearest = difflib.get_close_matches(word, known, 1, 0.5)
    return f"did you mean {nearest[0]}?" if nearest else ""


def examples_of(help_text: str, program: str) -> list[list[str]]:
    """The arguments of each example in a help's text, behind the program's name."""
    lines = (line.strip() for line in help_text.splitlines())
    return [shlex.split(line.removeprefix(program), comments=True) for line in lines if line.startswith(f"{program} ")]


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of a parser's own commands, by name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _chosen(parser: argparse.ArgumentParser, options: argparse.Namespace) -> argparse.ArgumentParser:
    """The parser of the command below that was asked for, or this one."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices.get(str(getattr(options, action.dest, None)), parser)
    return parser


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH)


def _columns(rows: Mapping[str, str]) -> list[str]:
    """A name and its text a row, the texts below each other."""
    lines = []
    for name, text in rows.items():
        column = " " * LEFT
        first = f"  {name}".ljust(LEFT)
        if len(first) > LEFT or not first.endswith(" "):
            lines.append(first)
            first = column
        lines.append(textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=column))
    return lines

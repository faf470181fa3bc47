"""The table of commands, the parser of `faim2f`, and the argument parser class of all commands.

Errors are reported in one sentence that suggests the closest valid word, and the help ends with examples.
"""

import argparse
import functools
import shlex
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NoReturn

from ..errors import nearest_name
from ..version import __version__
from .output import MISTAKE, STATUSES

PROGRAM = "faim2f"
# Layout of the help below the arguments: width in characters, and start of the second column.
WIDTH, LEFT = 100, 24
WITH_JSON = (
    "With --json, standard output is one JSON document, or empty after an error; everything else goes to standard "
    "error. The document's fields:"
)


WEIGHTS_URL_HELP = (
    "mirror from which to download a published model that is not cached: the URL of the checkpoint, or a base URL with "
    "the paths of the original server (default: FAIM2F_WEIGHTS_URL, or the original server)"
)
MODEL_HELP = "a model's folder, a published name (see `faim2f models`) or a Hub id"


class OneSentenceParser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line, and suggests the closest valid word for a misspelled one.

    Args:
        examples: pairs of a purpose and the arguments after the program's name, for the end of the help.
        document: the fields of the --json document and their meanings, for the end of the help.
        more: passed to `argparse.ArgumentParser`.
    """

    def __init__(
        self, *, examples: Sequence[tuple[str, str]] = (), document: Mapping[str, str] | None = None, **more: Any
    ) -> None:
        more = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, **more}
        super().__init__(**more)
        if self.description and "\n" not in self.description:  # the formatter keeps our line breaks
            self.description = _wrapped(self.description)
        self.words: dict[str, Sequence[str]] = {}  # words for shell completion, by `dest`, of arguments without choices
        self.document = document
        parts = [self.epilog] if self.epilog else []
        if examples:
            lines = [f"  # {what_for}\n  {self.prog} {words}".rstrip() for what_for, words in examples]
            parts.append("\n".join(["examples:", *lines]))
        if document is not None:
            parts.append("\n".join([_wrapped(WITH_JSON), *_columns(document)]))
        self.epilog = "\n\n".join(parts) or None

    def add_json(self) -> None:
        """Adds --json; call it after adding all other arguments."""
        self.add_argument(
            "--json", action="store_true", help="print one JSON document, for use by programs (see below)"
        )

    def add_weights_url(self) -> None:
        """Adds --weights-url, for `output.use_weights_url`."""
        self.add_argument("--weights-url", metavar="URL", help=WEIGHTS_URL_HELP)

    def error(self, message: str) -> NoReturn:
        """Prints the message as one sentence, and exits with status 2."""
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
    """A question that suggests the closest known word; empty if none is close."""
    nearest = nearest_name(word, known, 0.5)
    return f"did you mean {nearest}?" if nearest else ""


def examples_of(help_text: str, program: str) -> list[list[str]]:
    """The arguments of each example in a help text, without the program's name."""
    lines = (line.strip() for line in help_text.splitlines())
    return [shlex.split(line.removeprefix(program), comments=True) for line in lines if line.startswith(f"{program} ")]


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """A parser's subparsers by name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _chosen(parser: argparse.ArgumentParser, options: argparse.Namespace) -> argparse.ArgumentParser:
    """The parser of the chosen subcommand, else this parser."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices.get(str(getattr(options, action.dest, None)), parser)
    return parser


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH)


def _columns(rows: Mapping[str, str]) -> list[str]:
    """Formats two columns: names, and wrapped texts."""
    lines = []
    for name, text in rows.items():
        column = " " * LEFT
        first = f"  {name}".ljust(LEFT)
        if len(first) > LEFT or not first.endswith(" "):
            lines.append(first)
            first = column
        lines.append(textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=column))
    return lines


@dataclass(frozen=True)
class Command:
    """A command of `faim2f`.

    Args:
        help: short description.
        module: its module, with `main(arguments, program)` and `build_parser(program)`.
        extra: the package extra that installs its libraries; empty for none.
        goal: the heading under which the help lists it.
        example: arguments of a minimal call.
    """

    help: str
    module: str
    extra: str
    goal: str
    example: str


LOAD, TRAIN, USE, DEPLOY, PUBLISH, SHELL = (
    "get a model", "train and measure", "use a model", "deploy", "publish", "shell"
)  # fmt: skip

COMMANDS = {
    "convert": Command("convert checkpoints of other libraries to Hub folders", "hf_faim2f.cli.convert", "",
                       LOAD, "focoos model_final.pth my-model --info fai-mf-m-ade"),
    "models": Command("list the published models, and what is cached", "hf_faim2f.cli.models", "",
                      LOAD, "fai-mf-m-ade"),
    "train": Command("train or fine-tune a model", "hf_faim2f.cli.train", "train",
                     TRAIN, "--model my-model --new-labels --data flowers --format folder --out run"),
    "data": Command("check a dataset, or convert it to another format", "hf_faim2f.cli.data", "train",
                    TRAIN, "check flowers"),
    "evaluate": Command("evaluate a model on a dataset", "hf_faim2f.cli.evaluate", "train",
                        TRAIN, "run/final --data flowers --format folder --out evaluation"),
    "predict": Command("segment images; write JSON, label maps and overlays", "hf_faim2f.cli.predict", "train",
                       USE, "my-model photos --out predictions"),
    "app": Command("serve a web page on which a model segments images", "hf_faim2f.cli.app", "app",
                   USE, "my-model"),
    "serve": Command("serve a model over HTTP with the Hub's API", "hf_faim2f.cli.serve", "serve",
                     DEPLOY, "my-model"),
    "export": Command("export a model to ONNX, TensorRT and other runtimes", "hf_faim2f.cli.export", "onnx",
                      DEPLOY, "onnx my-model my-onnx --outputs semantic"),
    "quantize": Command("quantize an ONNX graph to int8, calibrated on images", "hf_faim2f.cli.quantize", "onnx",
                        DEPLOY, "my-onnx my-int8 --images photos"),
    "benchmark": Command("measure latency, throughput and memory of models", "hf_faim2f.cli.benchmark", "train",
                         DEPLOY, "my-model my-onnx --out figures"),
    "card": Command("write a model's card", "hf_faim2f.cli.card", "",
                    PUBLISH, "run/final --evaluation evaluation --license apache-2.0"),
    "push": Command("check a model's folder and publish it on the Hub", "hf_faim2f.cli.push", "",
                    PUBLISH, "run/final me/flowers --dry-run"),
    "completion": Command("print a shell completion script", "hf_faim2f.cli.completion",
                          "completion", SHELL, "bash > ~/.local/share/bash-completion/completions/faim2f"),
}  # fmt: skip
DESCRIPTION = "FAI-M2F image segmentation for transformers. `faim2f COMMAND --help` explains a command, with examples."


def build_parser(program: str = PROGRAM, *, whole: bool = False) -> argparse.ArgumentParser:
    """Builds the parser of `faim2f` itself.

    Args:
        program: the program's name.
        whole: include the commands' own parsers, which imports their modules. A command whose libraries are missing is
            included by name only, with a note on standard error. If false, all commands are included by name only.
    """
    usage = f"{program} [--help] [--version] COMMAND ..."
    description = f"{DESCRIPTION}\n{_goals(program)}"
    parser: Any = OneSentenceParser(prog=program, usage=usage, description=description, epilog=_statuses())
    parser.add_argument("--version", action="version", version=f"{program} {__version__}")
    made = functools.partial(_parser_of, whole=whole)
    # The description already lists the commands, but shtab completes only what the help shows.
    shown = "see above" if whole else argparse.SUPPRESS
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", help=shown, parser_class=made, prog=program
    )
    for name, command in COMMANDS.items():
        # For shell completion only: the help of `faim2f` lists the commands by goal.
        commands.add_parser(name, help=command.help)
    return parser


def _parser_of(prog: str, *, whole: bool, **_: Any) -> argparse.ArgumentParser:
    """A command's parser; `prog` ends with its name."""
    name = prog.rpartition(" ")[2]
    command = COMMANDS[name]
    if whole:
        try:
            return import_module(command.module).build_parser(prog)
        except ImportError as error:
            if not command.extra:
                raise
            print(f"{name} is completed by its name alone, as {error.name} cannot be imported: install "
                  f"hf-faim2f[{command.extra}].", file=sys.stderr)  # fmt: skip
    return OneSentenceParser(prog=prog, description=command.help)


def _goals(program: str) -> str:
    """The commands by goal, each with an example."""
    lines = []
    for goal in dict.fromkeys(command.goal for command in COMMANDS.values()):
        lines += ["", f"{goal}:"]
        for name, command in COMMANDS.items():
            if command.goal == goal:
                lines += [f"  {name:<11} {command.help}", f"      {program} {name} {command.example}"]
    return "\n".join(lines)


def _statuses() -> str:
    return "\n".join(["exit status:", *(f"  {status:<4} {meaning}" for status, meaning in STATUSES.items())])

"""The commands that there are, and the parser of them all."""

import argparse
import functools
import sys
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ..version import __version__
from .output import STATUSES
from .parser import OneSentenceParser

PROGRAM = "faim2f"


@dataclass(frozen=True)
class Command:
    """A command of `faim2f`.

    Args:
        help: what it does, in a few words.
        module: whose `main(arguments, program)` does it, and whose `build_parser(program)` says what it takes.
        extra: the extra of the package with the libraries that it needs; empty for none.
        goal: what a person wants who needs it.
        example: its arguments, in the least that does something.
    """

    help: str
    module: str
    extra: str
    goal: str
    example: str


LOAD, TRAIN, USE, DEPLOY, PUBLISH, SHELL = (
    "get a model", "train and measure", "see what it sees", "deploy", "publish", "the shell"
)  # fmt: skip

COMMANDS = {
    "convert": Command("checkpoints of other libraries to Hub folders", "hf_faim2f.cli.convert", "",
                       LOAD, "focoos model_final.pth my-model --info fai-mf-m-ade"),
    "train": Command("train a model on data, by a recipe", "hf_faim2f.cli.train", "train",
                     TRAIN, "--model my-model --new-labels --data flowers --format folder --out run"),
    "evaluate": Command("measure a model on data", "hf_faim2f.cli.evaluate", "train",
                        TRAIN, "run/final --data flowers --format folder --out evaluation"),
    "predict": Command("segment images: JSON, label maps and pictures", "hf_faim2f.cli.predict", "train",
                       USE, "my-model photos --out predictions"),
    "app": Command("a web page on which a model segments pictures", "hf_faim2f.cli.app", "app",
                   USE, "my-model"),
    "export": Command("models as files for other runtimes", "hf_faim2f.cli.export", "onnx",
                      DEPLOY, "onnx my-model my-onnx --outputs semantic"),
    "quantize": Command("an ONNX graph in int8, calibrated on images", "hf_faim2f.cli.quantize", "onnx",
                        DEPLOY, "my-onnx my-int8 --images photos"),
    "benchmark": Command("latency, throughput and memory of models", "hf_faim2f.cli.benchmark", "train",
                         DEPLOY, "my-model my-onnx --out figures"),
    "card": Command("a model's card, of what is known", "hf_faim2f.cli.card", "",
                    PUBLISH, "run/final --evaluation evaluation --license apache-2.0"),
    "push": Command("a model's folder to the Hub, checked", "hf_faim2f.cli.push", "",
                    PUBLISH, "run/final me/flowers --dry-run"),
    "completion": Command("a script by which the shell completes all this", "hf_faim2f.cli.completion",
                          "completion", SHELL, "bash > ~/.local/share/bash-completion/completions/faim2f"),
}  # fmt: skip
DESCRIPTION = "FAI-M2F image segmentation for transformers. `faim2f COMMAND --help` tells of a command, with examples."


def build_parser(program: str = PROGRAM, *, whole: bool = False) -> argparse.ArgumentParser:
    """The parser of `faim2f` itself.

    Args:
        program: its name.
        whole: with the commands' own parsers; their modules are imported, and one whose libraries are missing is there
            by its name alone, which standard error says. Otherwise all are.
    """
    usage = f"{program} [--help] [--version] COMMAND ..."
    description = f"{DESCRIPTION}\n{_goals(program)}"
    parser: Any = OneSentenceParser(prog=program, usage=usage, description=description, epilog=_statuses())
    parser.add_argument("--version", action="version", version=f"{program} {__version__}")
    made = functools.partial(_parser_of, whole=whole)
    # The description has them already; shtab leaves out what is not in the help.
    shown = "see above" if whole else argparse.SUPPRESS
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", help=shown, parser_class=made, prog=program
    )
    for name, command in COMMANDS.items():
        # The help is for completion; that of `faim2f` has the commands by what they are for.
        commands.add_parser(name, help=command.help)
    return parser


def _parser_of(prog: str, *, whole: bool, **_: Any) -> argparse.ArgumentParser:
    """A command's parser, `prog` ending with its name."""
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
    """The commands by what they are for, each with an example."""
    lines = []
    for goal in dict.fromkeys(command.goal for command in COMMANDS.values()):
        lines += ["", f"{goal}:"]
        for name, command in COMMANDS.items():
            if command.goal == goal:
                lines += [f"  {name:<11} {command.help}", f"      {program} {name} {command.example}"]
    return "\n".join(lines)


def _statuses() -> str:
    return "\n".join(["exit status:", *(f"  {status:<4} {meaning}" for status, meaning in STATUSES.items())])

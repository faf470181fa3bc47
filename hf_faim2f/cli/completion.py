"""`faim2f completion`: prints a shell completion script for bash or zsh."""

import argparse
from collections.abc import Sequence
from contextlib import redirect_stdout
from sys import stderr

import shtab

from .parser import OneSentenceParser, subcommands
from .parser import build_parser as build_whole_parser

PROGRAM = "faim2f completion"
DESCRIPTION = (
    "Prints a shell completion script for `faim2f`: commands, flags, known values, files and folders. Commands are "
    "completed in full if their libraries are installed; print the script again after installing more."
)
SHELLS = ("bash", "zsh")
EXAMPLES = (
    ("bash: bash-completion, if installed, picks the script up from this folder",
     "bash > ~/.local/share/bash-completion/completions/faim2f"),
    ("zsh: add this folder to fpath before compinit", "zsh > ~/.zfunc/_faim2f"),
)  # fmt: skip
# Arguments that name folders or files: by metavar, and by field of a settings dataclass.
FOLDERS = ("DIR", "OUT_DIR", "FOLDER", "ONNX_DIR")
FILES = ("CHECKPOINT", "FILE", "IMAGES", "MODEL", "MODEL_OR_ONNX", "EXPORT", "NAME_OR_JSON", "NAME_OR_YAML")
OF_SETTINGS = {
    "data": shtab.FILE, "model": shtab.FILE, "out": shtab.DIRECTORY, "backbone": shtab.FILE, "palette": shtab.FILE,
    "annotations": shtab.FILE, "images": shtab.DIRECTORY,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Prints the script and returns 0."""
    options = build_parser(program).parse_args(arguments)
    with redirect_stdout(stderr):  # libraries may print while they are imported
        parser = build_whole_parser(whole=True)
        _mark(parser)
        script = shtab.complete(parser, options.shell)
    print(script)
    return 0


def build_parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """Builds the command's parser."""
    parser = OneSentenceParser(prog=program, description=DESCRIPTION, examples=EXAMPLES)
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help="bash or zsh")
    return parser


def _mark(parser: argparse.ArgumentParser) -> None:
    """Marks for shtab which arguments are files, folders, or words that are not argparse choices."""
    words = parser.words if isinstance(parser, OneSentenceParser) else {}
    for action in parser._actions:
        kind = OF_SETTINGS.get(action.dest) if words else None
        if action.metavar in FOLDERS:
            kind = shtab.DIRECTORY
        elif action.metavar in FILES:
            kind = shtab.FILE
        if words.get(action.dest):
            action.choices = list(words[action.dest])
        elif kind is not None and action.choices is None:
            action.complete = kind  # type: ignore[attr-defined]
    for below in subcommands(parser).values():
        _mark(below)

"""The `faim2f` command: it parses and calls."""

import argparse
import sys
from collections.abc import Sequence

from .version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0 for success, 2 for a mistake in what was asked, told in one sentence."""
    parser = argparse.ArgumentParser(prog="faim2f", description="FAI-M2F image segmentation for transformers.")
    parser.add_argument("--version", action="version", version=f"faim2f {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("convert", help="checkpoints of other libraries to Hub folders", add_help=False)
    options, rest = parser.parse_known_args(arguments)
    assert options.command == "convert"
    from hf_faim2f.conversion.__main__ import main as convert

    return convert(rest, program="faim2f convert")


if __name__ == "__main__":
    sys.exit(main())

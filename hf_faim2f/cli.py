"""The `faim2f` command: it parses and calls."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from .version import __version__


@dataclass(frozen=True)
class Command:
    """A command of `faim2f`.

    Args:
        help: what it does, in a few words.
        module: whose `main(arguments, program)` does it.
        extra: the extra of the package with the libraries that it needs; empty for none.
    """

    help: str
    module: str
    extra: str = ""


COMMANDS = {
    "convert": Command("checkpoints of other libraries to Hub folders", "hf_faim2f.conversion.__main__"),
    "train": Command("train a model on data, by a recipe", "hf_faim2f.commands.train", "train"),
    "evaluate": Command("measure a model on data", "hf_faim2f.commands.evaluate", "train"),
    "predict": Command("segment images: JSON, label maps and pictures", "hf_faim2f.commands.predict", "train"),
    "app": Command("a web page on which a model segments pictures", "hf_faim2f.commands.app", "app"),
    "benchmark": Command("latency, throughput and memory of models", "hf_faim2f.commands.benchmark", "train"),
    "card": Command("a model's card, of what is known", "hf_faim2f.commands.card"),
    "push": Command("a model's folder to the Hub, checked", "hf_faim2f.commands.push"),
    "export": Command("models as files for other runtimes", "hf_faim2f.commands.export", "onnx"),
    "quantize": Command("an ONNX graph in int8, calibrated on images", "hf_faim2f.commands.quantize", "onnx"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0 for success, 2 for a mistake in what was asked, told in one sentence."""
    parser = argparse.ArgumentParser(prog="faim2f", description="FAI-M2F image segmentation for transformers.")
    parser.add_argument("--version", action="version", version=f"faim2f {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.help, add_help=False)
    options, rest = parser.parse_known_args(arguments)
    program, chosen = f"faim2f {options.command}", COMMANDS[options.command]
    try:
        run = import_module(chosen.module).main
    except ImportError as error:
        if not chosen.extra:
            raise
        print(f"{program} needs {error.name}, which cannot be imported ({error}): install hf-faim2f[{chosen.extra}].",
              file=sys.stderr)  # fmt: skip
        return 2
    status: int = run(rest, program=program)
    if status == 0 and "torch.distributed" in sys.modules:
        distributed = sys.modules["torch.distributed"]
        if distributed.is_available() and distributed.is_initialized():
            # A process that ends first would break the connections that another still closes.
            distributed.barrier()
            distributed.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())

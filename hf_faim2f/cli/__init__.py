"""The `faim2f` command: imports the chosen command's module and calls its `main`.

For --help, this module imports only argparse. Importing the package itself takes seconds, because it registers the
model with transformers' Auto classes.
"""

import io
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module

from .output import MISTAKE, interrupted, mistake, own_weights_url, sigterm_interrupts, silence_libraries
from .parser import COMMANDS, PROGRAM, build_parser

# Commands that remove unfinished files when they are interrupted, which SIGTERM must not prevent. `train` ensures this
# itself, where a distributed run allows it, and servers finish their requests on SIGTERM.
STOPPED = ("benchmark", "convert", "data", "evaluate", "export", "predict", "push", "quantize")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status, one of `output.STATUSES`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # like standard error
    if not words:
        build_parser().print_help(sys.stderr)
        return MISTAKE
    if words[0] not in COMMANDS:
        build_parser().parse_args(words[:1])  # exits for --help, --version and unknown words
    name, *rest = words
    program = f"{PROGRAM} {name}"
    try:
        return _run(name, rest, program)
    except KeyboardInterrupt as stop:
        return interrupted(program, str(stop))
    except OSError as error:  # such as standard output on a full disk
        return mistake(program, error, everywhere=True)


def _run(name: str, rest: Sequence[str], program: str) -> int:
    chosen = COMMANDS[name]
    try:
        run = import_module(chosen.module).main
    except ImportError as error:
        if not chosen.extra:
            raise
        print(f"{program} needs {error.name}, which cannot be imported ({error}): install hf-faim2f[{chosen.extra}].",
              file=sys.stderr)  # fmt: skip
        return MISTAKE
    silence_libraries()
    processes = int(os.environ.get("WORLD_SIZE") or 1) if name == "evaluate" else 1  # others ignore torchrun
    with own_weights_url(), sigterm_interrupts(processes) if name in STOPPED else nullcontext():
        status: int = run(rest, program=program)
    if status == 0 and "torch.distributed" in sys.modules:
        distributed = sys.modules["torch.distributed"]
        if distributed.is_available() and distributed.is_initialized():
            # A process that exits early would break connections that others are still closing.
            distributed.barrier()
            distributed.destroy_process_group()
    return status

"""Fuzzes one target with atheris, or all in turn: python -m tests.fuzz TARGET|all [SECONDS] [FOLDER]

Starts from the stored corpus, and adds inputs that reach new code to FOLDER (by default a temporary one). An input that
violates a target's contract ends the run with a traceback, and is written to `crash-…` in the working directory. Only
Python code is instrumented, not the C++ libraries.
"""

import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import atheris

from .targets import TARGETS, prepare

PACKAGES = ["hf_faim2f", "conversion", "yaml", "json", "pickletools"]
CORPUS = Path(__file__).parent / "corpus"
MEGABYTES = 4096  # memory limit; exceeding it is a finding


def import_instrumented(names: Iterable[str], scratch: Path) -> None:
    """Runs the targets on their corpus, so that their imports are instrumented."""
    with atheris.instrument_imports(include=PACKAGES):
        for name in names:
            for path in sorted((CORPUS / name).iterdir()):
                TARGETS[name](path.read_bytes(), scratch)


def fuzz(name: str, seconds: int, folder: str, scratch: Path) -> None:
    """Ends the process after the given time, or at a finding."""
    found = folder or tempfile.mkdtemp(prefix=f"faim2f-found-{name}-")
    Path(found).mkdir(parents=True, exist_ok=True)
    arguments = [
        sys.argv[0], found, str(CORPUS / name), f"-max_total_time={seconds}", "-timeout=20", "-max_len=4096",
        f"-rss_limit_mb={MEGABYTES}",
    ]  # fmt: skip
    atheris.Setup(arguments, lambda data: TARGETS[name](data, scratch))
    atheris.Fuzz()


def main(name: str, seconds: int = 60, folder: str = "") -> int:
    names = list(TARGETS) if name == "all" else [name]
    failed = []
    with tempfile.TemporaryDirectory(prefix=f"faim2f-fuzz-{name}-") as scratch:
        prepare(Path(scratch))
        import_instrumented(names, Path(scratch))
        for name in names:  # each in its own process, forked after the imports
            child = os.fork()
            if child == 0:
                fuzz(name, seconds, folder and f"{folder}/{name}", Path(scratch))
            if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
                failed.append(name)
    if failed:
        print(f"findings in {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(int, sys.argv[2:3]), *sys.argv[3:4]))

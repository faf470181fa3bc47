"""Fuzzes one target with atheris: python -m tests.fuzz TARGET [SECONDS] [FOLDER]

Starts from the kept corpus, and adds what reaches new code to FOLDER (a temporary one without it). What breaks a
target's contract ends the run with a traceback, and the bytes lie in `crash-…` of the folder that it was started in.
Only Python is traced: of the libraries in C++ it sees what they answer.
"""

import sys
import tempfile
from pathlib import Path

import atheris

from .targets import TARGETS, prepare

PACKAGES = ["hf_faim2f", "conversion", "yaml", "json", "pickletools"]
CORPUS = Path(__file__).parent / "corpus"
MEGABYTES = 4096  # of memory; more is a finding


def main(name: str, seconds: int = 60, folder: str = "") -> None:
    target = TARGETS[name]
    scratch = tempfile.TemporaryDirectory(prefix=f"faim2f-fuzz-{name}-")
    prepare(Path(scratch.name))
    with atheris.instrument_imports(include=PACKAGES):
        for path in sorted((CORPUS / name).iterdir()):
            target(path.read_bytes(), Path(scratch.name))
    found = folder or tempfile.mkdtemp(prefix=f"faim2f-found-{name}-")
    Path(found).mkdir(parents=True, exist_ok=True)
    arguments = [
        sys.argv[0], found, str(CORPUS / name), f"-max_total_time={seconds}", "-timeout=20", "-max_len=4096",
        f"-rss_limit_mb={MEGABYTES}",
    ]  # fmt: skip
    atheris.Setup(arguments, lambda data: target(data, Path(scratch.name)))
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]), *sys.argv[3:4])

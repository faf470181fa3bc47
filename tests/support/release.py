"""`make release`: builds both distributions of the last commit into dist/, checks, installs and tests them.

    python -m tests.support.release [--python PYTHON] [REQUIREMENT ...]

Only committed files are included. The wheel, then the source distribution, is installed with its dependencies (and the
REQUIREMENTs, first) from the package registry into an empty environment, where `release_smoke.py` runs. The files are
copied to dist/ only if every step succeeded.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch

from tests.support.reference_models import checkpoint, description, outputs, pixels

ROOT = Path(__file__).parents[2]
SMOKE = Path(__file__).with_name("release_smoke.py")
MODEL = "variant-stdc-add"  # the smallest model with recorded outputs of the original
BESIDE_PACKAGE = ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.cfg")
OF_WHEEL = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt")
OF_SDIST = ("PKG-INFO", "SOURCES.txt", "dependency_links.txt", "entry_points.txt", "requires.txt", "top_level.txt")


class ReleaseError(Exception):
    """The release failed. The message is one sentence: why, and what to do."""


def copy_tree(to: Path, *, committed: bool = False) -> list[str]:
    """Copies the files that a clone would have, and returns their paths.

    Args:
        committed: tracked files only; otherwise also those that `git add` would add.
    """
    options = () if committed else ("--others",)
    names = _run("git", "ls-files", "-z", "--cached", "--exclude-standard", *options).split("\0")
    names = sorted({name for name in names if (ROOT / name).is_file()})
    for name in names:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, to / name)
    return names


def build(source: Path, out: Path, *options: str) -> list[Path]:
    """Runs `python -m build` in `source`; returns the sorted contents of `out`: the wheel, the source distribution."""
    command = [sys.executable, "-m", "build", "--outdir", str(out), *options, str(source)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise ReleaseError(f"`python -m build` failed:\n{done.stdout}")
    return sorted(out.iterdir())


def wheel_files(wheel: Path) -> dict[str, bytes]:
    """The files in a wheel, by path."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def sdist_files(sdist: Path) -> dict[str, bytes]:
    """The files in a source distribution, by their path below its top folder."""
    with tarfile.open(sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers() if not member.isdir()}
        assert all(member.isfile() for member in members.values())
        return {name: archive.extractfile(member).read() for name, member in members.items()}


def check_contents(wheel: Path, sdist: Path, source: Path, names: list[str]) -> None:
    """Checks that both contain every file of the package, byte for byte, and their metadata, and nothing else.

    Args:
        source: the tree that they were built from.
        names: the files in it that belong to the repository, as returned by `copy_tree`.

    Raises:
        ReleaseError: a file is unexpected, missing or different; the message names it.
    """
    stem = sdist.name.removesuffix(".tar.gz")
    package = [name for name in names if name.startswith(("hf_faim2f/", "conversion/"))]
    expected = {
        f"hf_faim2f/{name}" if name.startswith("conversion/") else name: (source / name).read_bytes()
        for name in package
    }
    _compare(wheel, wheel_files(wheel), expected, {f"{stem}.dist-info/{name}" for name in OF_WHEEL})
    expected = {name: (source / name).read_bytes() for name in (*package, *BESIDE_PACKAGE)}
    del expected["setup.cfg"]  # setuptools rewrites it with an additional section
    written = {"setup.cfg", "PKG-INFO", *(f"hf_faim2f.egg-info/{name}" for name in OF_SDIST)}
    _compare(sdist, sdist_files(sdist), expected, written)


def _compare(archive: Path, found: dict[str, bytes], expected: dict[str, bytes], written: set[str]) -> None:
    problems = {
        "too many": set(found) - set(expected) - written,
        "missing": (set(expected) | written) - set(found),
        "different": {name for name in expected.keys() & found.keys() if expected[name] != found[name]},
    }
    told = [f"{what}: {', '.join(sorted(names))}" for what, names in problems.items() if names]
    if told:
        raise ReleaseError(
            f"{archive.name} does not hold what setup.cfg and MANIFEST.in should put there: {'; '.join(told)}."
        )


def write_inputs(folder: Path) -> None:
    """Writes the inputs of `release_smoke.py`: a checkpoint, its description, an image and the original's outputs."""
    info = {
        "name": "smoke",
        "model_family": "fai_mf",
        "classes": ["cat", "dog", "bird"],
        "im_size": 320,
        "task": "semantic_segmentation",
        "config": description(MODEL)["config"],
    }
    folder.mkdir()
    (folder / "model_info.json").write_text(json.dumps(info))
    torch.save({"model": checkpoint(MODEL)}, folder / "model_final.pth")
    np.save(folder / "pixels.npy", pixels(MODEL).numpy())
    np.savez(folder / "expected.npz", **{key: value.numpy() for key, value in outputs(MODEL).items()})


def smoke(python: Path, inputs: Path, empty: Path) -> str:
    """Runs `release_smoke.py` with `python` in the folder `empty`, without network or checkout; returns its output."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HOME": str(empty / "hub"), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [str(python), "-I", str(SMOKE), str(inputs)]
    done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ReleaseError(f"the installed package does not work:\n{done.stdout}{done.stderr}")
    return done.stdout


def _run(*command: object, cwd: Path = ROOT) -> str:
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ReleaseError(f"`{' '.join(map(str, command))}` failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def release(python: str, requirements: list[str], dist: Path) -> None:
    """Builds, checks and tests both distributions of the last commit, and copies them into `dist`.

    Raises:
        ReleaseError: there are uncommitted changes, or a step failed; `dist` is unchanged.
    """
    if changed := _run("git", "status", "--porcelain", "--untracked-files=no").split("\n")[:-1]:
        raise ReleaseError(f"{len(changed)} tracked files differ from the last commit ({changed[0].strip()}, …): "
                           "commit or revert them, so that it is known what is released.")  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="faim2f-release-") as folder:
        work, start = Path(folder), time.perf_counter()
        names = copy_tree(work / "source", committed=True)
        wheel, sdist = build(work / "source", work / "dist")
        check_contents(wheel, sdist, work / "source", names)
        print(f"{wheel.name}, {sdist.name}: built and complete, {time.perf_counter() - start:.0f} s", flush=True)
        write_inputs(work / "inputs")
        (work / "empty").mkdir()
        _run(python, "-m", "venv", work / "environment")
        own = work / "environment" / "bin" / "python"
        install = (own, "-m", "pip", "install", "--quiet")
        if requirements:
            _run(*install, *requirements)
        _run(*install, wheel, *requirements)
        print(f"wheel: {smoke(own, work / 'inputs', work / 'empty')}", end="", flush=True)
        _run(own, "-m", "pip", "uninstall", "--quiet", "--yes", "hf-faim2f")
        _run(*install, sdist, *requirements)
        print(f"source: {smoke(own, work / 'inputs', work / 'empty')}", end="", flush=True)
        dist.mkdir(exist_ok=True)
        for file in (wheel, sdist):
            shutil.copyfile(file, dist / file.name)
        commit = _run("git", "rev-parse", "--short", "HEAD").strip()
        print(f"commit {commit} is in {dist.name}/, {time.perf_counter() - start:.0f} s")


def main() -> int:
    """Returns 0 if both files are in dist/, or 2 with the reason on standard error."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.release", description="Builds and tries a release.")
    parser.add_argument("--python", default=sys.executable, help="of the empty environment; this one by default")
    parser.add_argument("requirements", nargs="*", metavar="REQUIREMENT", help="what is installed there first")
    options = parser.parse_args()
    try:
        release(options.python, options.requirements, ROOT / "dist")
    except ReleaseError as error:
        print(f"release: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

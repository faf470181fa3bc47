"""The release: wheel and source distribution contain the package and nothing else, and work when installed."""

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from email import message_from_bytes
from pathlib import Path

import pytest

from hf_faim2f import __version__
from tests.support.release import (
    ReleaseError,
    build,
    check_contents,
    copy_tree,
    sdist_files,
    smoke,
    wheel_files,
    write_inputs,
)

# Untracked files of a used checkout, which must not be in a distribution.
STRAYS = (
    "hf_faim2f/model.safetensors",
    "hf_faim2f/cli/__pycache__/train.cpython-311.pyc",
    "hf_faim2f/family/data/weights.bin",
    "hf_faim2f/hub/.cache/card.md",
    "hf_faim2f/model/model_final.pth",
    "conversion/__pycache__/focoos.cpython-311.pyc",
    "conversion/model.pkl",
    "build/lib/hf_faim2f/left.py",
    "build/lib/conversion/__init__.py",
    "dist/hf_faim2f-0.0.1.tar.gz",
    "demo-output/digits.png",
    ".venv/bin/python",
    "run",
)


@dataclass(frozen=True)
class Built:
    """The distributions, the tree that they were built from, and its files except the strays."""

    wheel: Path
    sdist: Path
    source: Path
    names: list[str]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Builds the wheel and source distribution from a clone's files, among untracked ones."""
    folder = tmp_path_factory.mktemp("release")
    source = folder / "source"
    names = copy_tree(source)
    for name in STRAYS:
        stray = source / name
        assert not stray.exists()
        stray.parent.mkdir(parents=True, exist_ok=True)
        stray.write_bytes(b"stray")
    wheel, sdist = build(source, folder / "dist", "--no-isolation")
    return Built(wheel, sdist, source, names)


def test_names(built: Built) -> None:
    assert (built.wheel.name, built.sdist.name) == (
        f"hf_faim2f-{__version__}-py3-none-any.whl",
        f"hf_faim2f-{__version__}.tar.gz",
    )


def test_contents_are_the_tracked_package_and_nothing_else(built: Built) -> None:
    check_contents(built.wheel, built.sdist, built.source, built.names)
    names = set(wheel_files(built.wheel))
    assert {name.partition("/")[0] for name in names} == {"hf_faim2f", f"hf_faim2f-{__version__}.dist-info"}
    for name in (
        "py.typed",
        "conversion/focoos.py",
        "family/data/published.json",
        "hub/card_template.md",
        "export/page/index.html",
        "cli/__init__.py",
    ):
        assert f"hf_faim2f/{name}" in names
    inside = {Path(name).suffix for name in names if name.startswith("hf_faim2f/")}
    assert inside == {".py", ".typed", ".json", ".md", ".html", ".css", ".js"}  # no weights, no caches
    assert not {
        name for name in sdist_files(built.sdist) if name.startswith(("tests", "examples", "benchmarks", "build"))
    }


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("more", "too many: conversion/__init__.py"),
        ("less", "missing: hf_faim2f/py.typed"),
        ("other", "different: hf_faim2f/cli/__init__.py"),
    ],
)
def test_a_wrong_wheel_is_told(change: str, told: str, built: Built, tmp_path: Path) -> None:
    files = wheel_files(built.wheel)
    if change == "more":
        files["conversion/__init__.py"] = b""
    elif change == "less":
        del files["hf_faim2f/py.typed"]
    else:
        files["hf_faim2f/cli/__init__.py"] += b"\n"
    wrong = tmp_path / built.wheel.name
    with zipfile.ZipFile(wrong, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    with pytest.raises(ReleaseError, match=told):
        check_contents(wrong, built.sdist, built.source, built.names)


def test_metadata(built: Built) -> None:
    files = wheel_files(built.wheel)
    info = f"hf_faim2f-{__version__}.dist-info"
    metadata = message_from_bytes(files[f"{info}/METADATA"])
    assert (metadata["Name"], metadata["Version"]) == ("hf-faim2f", __version__)
    assert (metadata["License-Expression"], metadata["License-File"]) == ("Apache-2.0", "LICENSE")
    assert files[f"{info}/licenses/LICENSE"] == (built.source / "LICENSE").read_bytes()
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload(decode=True) == (built.source / "README.md").read_bytes()
    assert files[f"{info}/top_level.txt"].split() == [b"hf_faim2f"]
    assert files[f"{info}/entry_points.txt"].split() == b"[console_scripts] faim2f = hf_faim2f.cli:main".split()
    required = [line for line in metadata.get_all("Requires-Dist") if ";" not in line]
    assert len(required) == 8 and not {"torchvision", "timm"} & {line.split(">")[0] for line in required}


def test_the_source_distribution_builds_the_same_wheel(built: Built, tmp_path: Path) -> None:
    shutil.unpack_archive(built.sdist, tmp_path, filter="data")
    (again,) = build(
        tmp_path / built.sdist.name.removesuffix(".tar.gz"), tmp_path / "dist", "--no-isolation", "--wheel"
    )
    assert again.name == built.wheel.name
    assert wheel_files(again) == wheel_files(built.wheel)


# Slow because new processes import torch, and one of them every module: the installed package itself is tested.
@pytest.mark.large
def test_it_works_where_it_is_installed(built: Built, tmp_path: Path) -> None:
    home, inputs, empty = tmp_path / "environment", tmp_path / "inputs", tmp_path / "empty"
    venv.create(home, symlinks=True, with_pip=False)
    own = home / "bin" / "python"
    # Adds this environment's libraries as a plain path, so that its own .pth files, and thus the checkout, are not
    # used.
    packages = next(home.glob("lib/python*/site-packages"))
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    command = [sys.executable, "-m", "pip", "--python", str(own), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--force-reinstall", "--no-warn-script-location", str(built.wheel)], check=True)
    write_inputs(inputs)
    empty.mkdir()
    told = smoke(own, inputs, empty)
    assert told.startswith(f"hf-faim2f {__version__} works on Python {sys.version.split()[0]}")
    assert {path.name for path in empty.iterdir()} <= {"hub"}
    # The check fails if a file is missing.
    (packages / "hf_faim2f" / "py.typed").unlink()
    with pytest.raises(ReleaseError, match="AssertionError"):
        smoke(own, inputs, empty)

"""Tests an installed package: `python -I release_smoke.py INPUTS`, with the interpreter of its environment.

Imports nothing from the checkout, and runs in another working directory. INPUTS is the folder written by
`release.write_inputs`: a checkpoint in Focoos's format, its description, an image, and the original's outputs. Failures
are AssertionErrors or other exceptions.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.resources
import importlib.util
import io
import json
import pkgutil
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

# These packages and commands work without any extra.
WITHOUT_EXTRAS = ("model", "family", "conversion")
COMMANDS_WITHOUT_EXTRAS = ("convert", "card", "push")
COMMANDS = (*COMMANDS_WITHOUT_EXTRAS, "train", "evaluate", "predict", "app", "serve", "benchmark", "export", "quantize")


def faim2f(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """Runs the installed command by its path."""
    command = Path(sysconfig.get_path("scripts")) / "faim2f"
    return subprocess.run([command, *map(str, arguments)], capture_output=True, text=True, check=False)


def faim2f_here(*arguments: object) -> tuple[int, str, str]:
    """Runs the command in this process, which has already imported torch; returns status, standard output, standard
    error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = importlib.import_module("hf_faim2f.cli").main([*map(str, arguments)])
        except SystemExit as ended:
            status = ended.code
    return status, out.getvalue(), err.getvalue()


def check_types() -> None:
    """Checks that type checkers find py.typed; comes first, because it imports nothing."""
    spec = importlib.util.find_spec("hf_faim2f")
    assert spec is not None and spec.origin is not None
    assert Path(spec.origin).with_name("py.typed").is_file()


def check_place(package: Any) -> str:
    """Checks that the installed package is imported, `conversion` is not top-level, and versions agree; returns the
    version."""
    home = Path(package.__file__).resolve()
    assert home.is_relative_to(Path(sysconfig.get_path("purelib")).resolve()), home
    assert importlib.util.find_spec("conversion") is None
    bare = subprocess.run(
        [sys.executable, "-I", "-c", "import conversion"], capture_output=True, text=True, check=False
    )
    assert bare.returncode == 1 and "No module named 'conversion'" in bare.stderr, bare.stderr
    assert importlib.metadata.version("hf-faim2f") == package.__version__
    told = faim2f("--version")
    assert (told.returncode, told.stdout.strip()) == (0, f"faim2f {package.__version__}"), told
    return package.__version__


def check_modules(package: Any) -> list[str]:
    """Imports every module; returns those that need a library that is not installed."""
    missing = set()
    for module in pkgutil.walk_packages(package.__path__, "hf_faim2f."):
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            # The import error itself, or our message about the library.
            cause = error if isinstance(error, ModuleNotFoundError) else error.__cause__
            assert isinstance(cause, ModuleNotFoundError), (module.name, error)
            assert cause is error or "install hf-faim2f[" in str(error), (module.name, error)
            name = (cause.name or "").partition(".")[0]
            assert name not in ("", "hf_faim2f", "conversion", "tests", "examples", "benchmarks"), (module.name, error)
            assert module.name.split(".")[1] not in WITHOUT_EXTRAS, (module.name, error)
            missing.add(name)
    return sorted(missing)


def check_data(package: Any) -> int:
    """Checks that the data files are present and readable; returns the number of published models."""
    files = importlib.resources.files("hf_faim2f")
    assert "{" in files.joinpath("hub", "card_template.md").read_text()
    for name in ("labels", "published", "mask2former_zoo"):
        assert json.loads(files.joinpath("family", "data", f"{name}.json").read_text())
    family = importlib.import_module("hf_faim2f.family").FAMILY
    for name in family:
        config = package.load_config(name)
        assert config.model_type == "faim2f" and len(config.id2label) in (80, 150), name
    return len(family)


def check_commands() -> list[str]:
    """Checks that every command prints its help or names the missing extra; returns the commands of the latter kind."""
    unavailable = []
    for name in COMMANDS:
        status, out, err = faim2f_here(name, "--help")
        if status == 2 and name not in COMMANDS_WITHOUT_EXTRAS:
            assert re.search(r"install .?hf-faim2f\[[a-z-]+\]", err), (name, err)
            unavailable.append(name)
        else:
            assert status == 0 and f"faim2f {name}" in out, (name, status, err)
    return unavailable


def check_conversion(inputs: Path) -> float:
    """Converts a checkpoint and compares its outputs with the original's; returns the largest relative difference."""
    import torch
    from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation

    with tempfile.TemporaryDirectory() as folder:
        out_dir = Path(folder) / "converted"
        request = ("convert", "focoos", inputs / "not_there.pth", out_dir, "--info", inputs / "model_info.json")
        status, _, err = faim2f_here(*request)
        assert status == 2 and "not_there.pth" in err and "Traceback" not in err, (status, err)
        assert not out_dir.exists()
        told = faim2f("convert", "focoos", inputs / "model_final.pth", out_dir, "--info", inputs / "model_info.json")
        assert told.returncode == 0, told
        AutoImageProcessor.from_pretrained(out_dir, trust_remote_code=True)
        model = AutoModelForUniversalSegmentation.from_pretrained(out_dir, trust_remote_code=True).eval()
        differences = []
        with np.load(inputs / "expected.npz") as expected, torch.no_grad():
            outputs = model(torch.from_numpy(np.load(inputs / "pixels.npy")))
            for key in expected:
                ours, theirs = outputs[key].numpy(), expected[key]
                assert ours.shape == theirs.shape, key
                differences.append(float(np.abs(ours - theirs).max() / np.abs(theirs).max()))
    assert len(differences) == 2 and max(differences) <= 1e-4, differences
    return max(differences)


def main(inputs: Path) -> None:
    """Runs all checks, and prints a one-line summary."""
    check_types()
    package = importlib.import_module("hf_faim2f")
    members, version = check_data(package), check_place(package)
    missing, unavailable, difference = check_modules(package), check_commands(), check_conversion(inputs)
    required = [
        re.split(r"[^\w.-]", line)[0] for line in importlib.metadata.requires("hf-faim2f") or [] if ";" not in line
    ]
    assert not {name.replace("-", "_") for name in required} & set(missing), missing
    print(
        f"hf-faim2f {version} works on Python {sys.version.split()[0]}, transformers "
        f"{importlib.metadata.version('transformers')}, torch {importlib.metadata.version('torch')}: {members} "
        f"published models, a converted checkpoint within {difference:.0e} of the original. "
        f"Libraries of extras that are not installed: {', '.join(missing) or 'none'}; "
        f"commands that ask for one: {', '.join(unavailable) or 'none'}."
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))

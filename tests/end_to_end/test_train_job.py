"""`examples/train_job.py`: its inline dependencies match the package's, and it trains and pushes without uv."""

import configparser
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hf_faim2f import FaiM2FImageProcessor
from tests.support.hub_server import running_hub
from tests.support.reference_models import small_model
from tests.support.shapes import LABELS, write_tree

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "train_job.py"


def inline_metadata(text: str) -> dict[str, Any]:
    """The PEP 723 block, found by the regular expression in the PEP."""
    tomllib = pytest.importorskip("tomllib")  # new in Python 3.11
    found = re.search(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$", text)
    assert found is not None and found["type"] == "script"
    return tomllib.loads("".join(line[2:] or "\n" for line in found["content"].splitlines(keepends=True)))


def requirements(extras: tuple[str, ...]) -> set[str]:
    """The requirements of the package with some extras, from setup.cfg."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    needed = set(config["options"]["install_requires"].split())
    for extra in extras:
        for line in config["options.extras_require"][extra].split():
            own = re.fullmatch(r"hf-faim2f\[([\w,]+)\]", line)
            needed |= requirements(tuple(own[1].split(","))) if own else {line}
    return needed


def test_the_inline_dependencies_are_those_of_the_package() -> None:
    block = inline_metadata(SCRIPT.read_text())
    assert set(block["dependencies"]) == requirements(("train",))
    assert block["dependencies"] == sorted(block["dependencies"])
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert block["requires-python"] == config["options"]["python_requires"]


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_job", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_it_calls(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    job, status = script(), [0]
    called: list[list[str]] = []

    def faim2f(arguments: list[str]) -> int:
        called.append(arguments)
        return status[0]

    monkeypatch.setattr(job, "faim2f", faim2f)
    words = ["me/data", "me/model", "--license", "mit", "--labels", "a,b", "--steps", "3", "--private"]
    orgs = [{"name": "us"}, {"name": "readers", "roleInOrg": "read"}]
    user: dict[str, Any] = {"name": "me", "orgs": orgs, "auth": {"accessToken": {"role": "write"}}}
    monkeypatch.setattr(job.HfApi, "whoami", lambda self: user)
    assert job.main(words) == 0
    train, push = called
    assert train[:3] == ["train", "--model", "fai-m2f-s-ade"] and train[-4:] == ["--labels", "a,b", "--steps", "3"]
    assert train[train.index("--precision") + 1] == train[train.index("--batch-size") + 1] == "auto"
    assert {"me/data", "mit"} <= set(train) and push == ["push", "run/final", "me/model", "--private"]
    called.clear()
    status[0] = 2
    assert job.main(words) == 2 and len(called) == 1  # nothing was pushed
    monkeypatch.undo()
    called.clear()
    monkeypatch.setattr(job, "faim2f", faim2f)
    for repository, auth, told in (
        ("me/model", {"accessToken": {"role": "read"}}, "The token of me may only read: log in"),
        ("they/model", {}, "they/model is not OWNER/NAME, with an OWNER where me may write: me, us."),
        ("readers/model", {}, "readers/model is not OWNER/NAME"),
        ("model", {}, "model is not OWNER/NAME"),
    ):
        monkeypatch.setattr(job.HfApi, "whoami", lambda self, auth=auth: {**user, "auth": auth})
        assert job.main(["me/data", repository, *words[2:]]) == 2 and not called
        assert capsys.readouterr().err.startswith(told)
    assert job.refusal("us/model") is None
    monkeypatch.setattr(job.HfApi, "whoami", refuse)
    assert job.main(words) == 2
    assert capsys.readouterr().err.startswith("No access to the Hub (no token): log in with `hf auth login`")


def refuse(self: Any, *_: Any, **__: Any) -> None:
    raise ValueError("no token")


@pytest.mark.large
def test_it_trains_and_pushes_offline(tmp_path: Path) -> None:
    """On Parquet files, to a small local Hub, in a process that gets only its arguments."""
    data = write_tree("hub", tmp_path / "data", 3)
    model = small_model(decoder_layers=1, train_num_points=64)
    model.save_pretrained(tmp_path / "parent")
    FaiM2FImageProcessor.from_model_config(model.config, size={"shortest_edge": 64}).save_pretrained(
        tmp_path / "parent"
    )
    words = [str(data), "me/shapes", "--license", "mit", "--model", str(tmp_path / "parent"), "--out", "run",
             "--labels", ",".join(LABELS), "--steps", "1", "--image-size", "64", "--samples", "0",
             "--no-tensorboard"]  # fmt: skip
    with running_hub({"hf_me": "me"}) as hub:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), *words],
            env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
                 "HF_TOKEN": "hf_me", "OMP_NUM_THREADS": "1"},
            cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        repo = hub.repos["me/shapes"]
        tree = repo.trees[repo.branches["main"]]
        assert {"model.safetensors", "config.json", "README.md", "modeling_faim2f.py"} <= set(tree)
        sent = repo.read("main", "model.safetensors")
        card = repo.read("main", "README.md").decode()
    assert sent == (tmp_path / "run" / "final" / "model.safetensors").read_bytes()
    assert "license: mit" in card and "started from: parent" in card

"""Checks before publishing: every kind of invalid folder is rejected by name, without network access."""

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from hf_faim2f.cli import main
from hf_faim2f.errors import FolderError, redacted
from hf_faim2f.hub.check import check_loading, list_files
from hf_faim2f.hub.publish import check_folder
from tests.support.model_folders import edit, write_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model's folder that can be published."""
    return write_model(tmp_path_factory.mktemp("push") / "tiny")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "tiny"))


def in_auto_map(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {key: f"someone/else--{value}" for key, value in config["auto_map"].items()}
    (folder / "config.json").write_text(json.dumps(config))


def below(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_bytes(b"{}")


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data.pkl", "x")


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickle": (lambda f: (f / "pytorch_model.bin").write_bytes(b"x"), "pytorch_model.bin, which can hold pickles"),
    "pickle in a folder": (
        lambda f: below(f, "onnx/a.PKL"), "onnx/a.PKL, which can hold pickles"
    ),
    "pickle by its beginning": (
        lambda f: (f / "per_class.md").write_bytes(pickle.dumps([1])), "per_class.md is a pickle or an archive"
    ),
    "archive by its beginning": (lambda f: zipped(f / "model.safetensors"), "is a pickle or an archive"),
    "stray": (lambda f: (f / "notes.txt").write_text("x"), "notes.txt, which does not belong"),
    "strays": (
        lambda f: [(f / f"{letter}.log").write_text("x") for letter in "abcdefgh"],
        "a.log, b.log, c.log, d.log, e.log and 3 more, which do not belong",
    ),
    "weights twice": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"), "transformers loads only the former"
    ),
    "secrets": (lambda f: (f / ".env").write_text("x"), ".env, which does not belong"),
    "code": (lambda f: (f / "setup.py").write_text("x"), "setup.py, which does not belong"),
    "deep": (lambda f: below(f, "a/b/config.json"), "a/b/config.json, which does not belong"),
    "unseen image": (lambda f: Image.new("RGB", (2, 2)).save(f / "a.png"), "a.png, which README.md does not show"),
    "no image": (lambda f: (f / "a.png").write_text("x"), "a.png is not an image"),
    "link out": (lambda f: (f / "LICENSE").symlink_to("/etc/hostname"), "LICENSE is a link that leads out"),
    "link to a folder": (lambda f: (f / "onnx").symlink_to(f.parent), "onnx is a link that leads out"),
    "link to nothing": (lambda f: (f / "LICENSE").symlink_to(f / "nothing"), "LICENSE is a link that leads out"),
    "pipe": (lambda f: os.mkfifo(f / "LICENSE"), "LICENSE is not a regular file"),
    "no safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 99), "is not a safetensors file"),
    "no JSON": (lambda f: (f / "evaluation.json").write_text("{"), "evaluation.json is not JSON"),
    "no text": (lambda f: (f / "LICENSE").write_bytes(b"\xff\xfe"), "LICENSE is not UTF-8 text"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "no processor": (lambda f: (f / "preprocessor_config.json").unlink(), "has no preprocessor_config.json"),
    "no card": (lambda f: (f / "README.md").unlink(), "has no README.md"),
    "stale code": (
        lambda f: edit(f, "loss_faim2f.py", "import", " import"), "loss_faim2f.py is not the code of this hf_faim2f"
    ),
    "missing code": (lambda f: (f / "backbone_stdc.py").unlink(), "lacks backbone_stdc.py"),
    "code elsewhere": (in_auto_map, "auto_map that does not name the code beside it"),
    "a hole": (lambda f: edit(f, "README.md", "Of random weights.", "TODO"), "published yet: it still has 'TODO'"),
    "no license": (lambda f: edit(f, "README.md", "license: mit\n", ""), "names no license"),
    "an image that is not there": (
        lambda f: edit(f, "README.md", "Of random weights.", "![x](x.png)"), "shows 'x.png', which is not in the folder"
    ),
    "no folder": (shutil.rmtree, "is not a folder"),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(REFUSED))
def test_what_does_not_belong_is_refused(kind: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command, with one sentence and status 2, before it contacts the Hub (there is none here)."""
    spoil, told = REFUSED[kind]
    spoil(folder)
    assert main(["push", str(folder), "someone/tiny"]) == 2
    captured = capsys.readouterr()
    assert told in captured.err and captured.err.count("\n") == 1 and captured.out == "", captured.err


def test_what_belongs_is_listed(folder: Path) -> None:
    onnx = folder / "onnx"
    onnx.mkdir()
    (onnx / "model.onnx").write_bytes(b"\x08\x0a")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("x")
    (folder / "__pycache__").mkdir()
    Image.new("RGB", (2, 2)).save(folder / "curve.png")
    edit(folder, "README.md", "Of random weights.", "![Curve](curve.png)")
    (folder / "LICENSE").symlink_to(folder / "per_class.md")
    (folder / "per_class.md").write_text("x")
    contents, notes = check_folder(folder, load=False)
    names = {file.name for file in contents.files}
    assert {"README.md", "model.safetensors", "curve.png", "LICENSE", "onnx/model.onnx", "modeling_faim2f.py"} <= names
    assert contents.left_out == [".git", "__pycache__"] and not any(name.startswith(".git/") for name in names)
    assert notes == ["left out: .git, __pycache__", "the card has no results: `faim2f evaluate` measures them"]


def test_a_folder_of_another_kind_is_not_read_to_its_end(tmp_path: Path) -> None:
    for index in range(1100):
        (tmp_path / f"{index}.md").write_bytes(b"")
    with pytest.raises(FolderError, match="more than 1000 files"):
        list_files(tmp_path)


def test_it_is_loaded_as_a_stranger_would(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this package and credentials: a module that looked for either would find nothing."""
    for name in "HF_TOKEN HUGGING_FACE_HUB_TOKEN HUGGINGFACE_HUB_TOKEN HF_TOKEN_PATH HF_OIDC_RESOURCE".split():
        monkeypatch.setenv(name, "hf_secretsecretsecret")
    entry = folder / "modeling_faim2f.py"
    spy = "import os\nassert 'hf_secret' not in str(os.environ), 'SEEN'\nimport hf_faim2f\n"
    entry.write_text(entry.read_text().replace('"""\n', f'"""\n{spy}', 1))
    with pytest.raises(FolderError, match="installed: .*import of hf_faim2f halted") as caught:
        check_loading(list_files(folder))
    assert "SEEN" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.newest_only
@pytest.mark.slow  # loads the folder in a subprocess
def test_a_folder_without_code_is_published_with_it(folder: Path) -> None:
    for path in folder.glob("*.py"):
        path.unlink()
    before = sorted(folder.rglob("*"))
    contents, notes = check_folder(folder)
    assert {"modeling_faim2f.py", "backbone_stdc.py"} <= {file.name for file in contents.files}
    assert f"{folder} has no model code: that of hf_faim2f is published with it" in notes
    assert sorted(folder.rglob("*")) == before


@pytest.mark.large
@pytest.mark.newest_only
def test_weights_of_another_configuration_do_not_load(folder: Path) -> None:
    edit(folder, "config.json", '"decoder_layers": 1', '"decoder_layers": 2')
    with pytest.raises(FolderError, match="weights are not those of config.json"):
        check_loading(list_files(folder))


@pytest.mark.parametrize("more", [["--dry-run"], []])
def test_what_a_push_refuses_a_dry_run_refuses(
    more: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    monkeypatch.setattr("hf_faim2f.hub.publish.check_loading", lambda contents: None)
    monkeypatch.setattr("hf_faim2f.hub.publish._remote", lambda *_: ({}, True, True, False, "head"))  # a public one
    for name, told in (("tiny", "names no owner: write OWNER/tiny"), ("me/tiny", "me/tiny exists and is public")):
        assert main(["push", str(folder), name, "--private", *more]) == 2
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1, error


def test_offline_is_said_before_the_model_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hf_faim2f.hub.publish.check_loading", lambda contents: pytest.fail("It was loaded."))
    assert main(["push", str(folder), "me/tiny"]) == 2
    assert "HF_HUB_OFFLINE is set, so nothing can be sent" in capsys.readouterr().err


def test_tokens_are_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-token-of-my-own")
    text = "Bearer abc.def a-token-of-my-own hf_abcdefghijk https://me:word@host/x"
    assert redacted(text) == "Bearer *** *** *** https://***@host/x"


@pytest.mark.parametrize("arguments", [[], ["x"], ["x", "y", "--privat"], ["x", "y", "z"]])
def test_a_misspelt_command_is_told(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["push", *arguments])
    assert caught.value.code == 2 and capsys.readouterr().err.count("\n") == 1

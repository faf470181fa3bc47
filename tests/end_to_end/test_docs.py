"""The documentation against the code: links lead somewhere, commands are taken, snippets name what is there."""

import ast
import contextlib
import importlib
import inspect
import io
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_faim2f.cli import COMMANDS, main
from hf_faim2f.cli.settings import read_settings_file
from hf_faim2f.cli.train import TrainSettings
from hf_faim2f.data.formats import FORMATS
from hf_faim2f.export.graph import INPUTS, OUTPUTS
from hf_faim2f.model.configuration_faim2f import FaiM2FConfig
from hf_faim2f.model.remote_code_faim2f import copy_remote_code
from hf_faim2f.training.recipe import RECIPES
from hf_faim2f.version import __version__

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What starts one of our commands, alone or in several processes.
OURS = re.compile(r"(?:.*\s)?(?:faim2f|-m hf_faim2f\.cli)\s+(.*)")
CONVERSION = re.compile(r"python -m conversion\s+(.*)")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return [code for kind, code in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path, root: Path = ROOT) -> list[str]:
    """Relative links of a page that lead to no file below `root`, or to no heading of it."""
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text):
        target = next(filter(None, link))
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        found = file.exists() and file.is_relative_to(root.resolve())
        if not found or (anchor and anchor not in anchors(file)):
            broken.append(target)
    return broken


def commands(page: Path) -> Iterator[list[str]]:
    """The arguments of `faim2f`, command first, of each line that calls it."""
    for code in blocks(page, "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            if ours := OURS.fullmatch(line):
                yield shlex.split(ours[1], comments=True)
            elif conversion := CONVERSION.fullmatch(line):
                yield ["convert", *shlex.split(conversion[1], comments=True)]


def refusal(words: list[str]) -> str:
    """Why the command would not take these arguments; empty if it would."""
    if words[0] not in COMMANDS:
        return f"there is no command {words[0]}"
    module = importlib.import_module(COMMANDS[words[0]].module)
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()) as complaint:
        try:
            module.build_parser(f"faim2f {words[0]}").parse_args(words[1:])
        except SystemExit as stop:
            if stop.code:
                return said.getvalue() + complaint.getvalue() or f"status {stop.code}"
    settings = dict(itertools.pairwise(words))  # of these two the parser takes any word
    for flag, known in (("--format", FORMATS), ("--recipe", RECIPES)):
        if flag in settings and settings[flag] not in known:
            return f"{flag} {settings[flag]} is none"
    return ""


def test_the_check_of_links_finds_what_is_wrong(tmp_path: Path) -> None:
    page = ROOT / "docs" / "export.md"
    assert "sizes" not in anchors(page) and "without-python" in anchors(page)
    wrong = tmp_path / "page.md"
    links = "[a](nowhere.md) [b](#a-heading) [c](#another) [d](https://example.com) [e](../outside.md) [f](page.md)"
    wrong.write_text(f"# A heading\n{links}\n", encoding="utf-8")
    (tmp_path.parent / "outside.md").touch()
    assert broken_links(wrong, tmp_path) == ["nowhere.md", "#another", "../outside.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_the_check_of_commands_finds_what_is_wrong() -> None:
    assert refusal(["fly"]) and refusal(["predict", "model"]) and refusal(["export", "onnx", "a", "b", "--colour"])
    assert refusal(["train", "--recipe", "none"]) and refusal(["convert", "focoos", "a", "b"])
    assert not refusal(["export", "onnx", "a", "b", "--size", "64x64"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_taken(page: Path) -> None:
    assert {shlex.join(words): refusal(words) for words in commands(page) if refusal(words)} == {}


def test_commands_are_found() -> None:
    counts = {page.name: sum(1 for _ in commands(page)) for page in PAGES}
    assert counts["README.md"] >= 8 and counts["export.md"] >= 8 and counts["conversion.md"] == 5
    assert counts["training.md"] == 4 and counts["evaluation.md"] == 4


def test_help_of_every_command_that_is_named() -> None:
    with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code in (None, 0)
    named = {words[0] for page in PAGES for words in commands(page)}
    assert named and all(re.search(rf"^\s+{name}\b", said.getvalue(), re.MULTILINE) for name in named)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_snippets_name_what_is_there(page: Path) -> None:
    for code in blocks(page, "python"):
        tree = ast.parse(code)
        compile(tree, page.name, "exec")
        for node in ast.walk(tree):
            names = [alias.name for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)]
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "hf_faim2f":
                module = importlib.import_module(str(node.module))
                assert [name for name in names if not hasattr(module, name)] == []
            elif isinstance(node, ast.Import):
                for name in names:
                    importlib.import_module(name)


def test_the_file_of_settings_is_one(tmp_path: Path) -> None:
    (code,) = blocks(ROOT / "docs" / "training.md", "yaml")
    path = tmp_path / "run.yaml"
    path.write_text(code, encoding="utf-8")
    values = read_settings_file(TrainSettings, path)
    assert values["format"] in FORMATS and values["recipe"] in RECIPES


def test_the_table_of_recipes_is_theirs() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for recipe in RECIPES.values():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{recipe.name}` | {recipe.steps:,} |"))
        _, _, steps, batch, rate, schedule, clip, average, *_ = (cell.strip() for cell in row.split("|"))
        assert (steps, batch) == (f"{recipe.steps:,}", str(recipe.batch_size))
        learning_rate, backbone = rate.split(", x")
        assert (float(learning_rate), float(backbone)) == (recipe.learning_rate, recipe.backbone_multiplier)
        assert schedule == f"{recipe.schedule}, {recipe.warmup_steps}"
        assert float(clip) == recipe.clip and (0.0 if average == "–" else float(average)) == recipe.ema_decay


def test_every_field_of_the_configuration_is_told() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    told = set(re.findall(r"`(\w+)`", text))
    fields = [name for name in inspect.signature(FaiM2FConfig).parameters if name != "kwargs"]
    assert len(fields) > 30 and [name for name in fields if name not in told] == []


def test_every_output_of_a_graph_is_told() -> None:
    text = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    for kind, outputs in OUTPUTS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{kind}`"))
        assert re.findall(r"`(\w+)`", row)[1 : len(outputs) + 1] == list(outputs)
    assert all(f"| `{name}`" in text for name in INPUTS)


def test_the_changelog_knows_this_version() -> None:
    assert __version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_what_contributors_call_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert callable(copy_remote_code)
    paths = re.findall(r"`((?:hf_faim2f|tests|examples|benchmarks)/[\w/]*(?:\.py)?)`", text)
    assert len(paths) > 8 and [path for path in paths if "NAME" not in path and not (ROOT / path).exists()] == []

"""The documentation against the code: links resolve, commands parse, and names in snippets exist."""

import argparse
import ast
import contextlib
import functools
import importlib
import importlib.util
import inspect
import io
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import hf_faim2f
from hf_faim2f.cli import COMMANDS, main
from hf_faim2f.cli.settings import read_settings_file
from hf_faim2f.cli.train import TrainSettings
from hf_faim2f.data.formats import FORMATS
from hf_faim2f.export.graph import INPUTS, OUTPUTS
from hf_faim2f.family import FAMILY
from hf_faim2f.model.configuration_faim2f import FaiM2FConfig
from hf_faim2f.model.remote_code_faim2f import copy_remote_code
from hf_faim2f.model_cache import entry_folder
from hf_faim2f.training.recipe import RECIPES
from hf_faim2f.version import __version__
from hf_faim2f.zoo import published_source, resolve
from tests.support.published_models import focoos_file
from tests.support.shared import shared_folder
from tests.support.shipped_digits import complete_digits
from tests.support.weights_server import go_online, running_weights_server

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += [ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# The words that start one of our commands, in one process or several.
OURS = re.compile(r"(?:.*\s)?(?:faim2f|-m hf_faim2f\.cli)\s+(.*)")
CONVERSION = re.compile(r"python -m conversion\s+(.*)")
SCENE = ROOT / "docs" / "images" / "scene.jpg"
# Pages with a snippet that is followed by its output, and the snippet's index; and pages whose other snippets are run:
# those of the remaining pages would train, export, or need a network.
SHOWN = {ROOT / "README.md": 1, ROOT / "docs" / "index.md": 0}
RUN = [ROOT / "README.md"]
RUN += [ROOT / "docs" / "guides" / f"{name}.md" for name in ("convert", "evaluate", "names", "predict", "video")]
RUN += [ROOT / "docs" / "reference" / "data-formats.md"]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def load_hook() -> types.ModuleType:
    """The MkDocs hook that generates parts of pages."""
    spec = importlib.util.spec_from_file_location("generated_parts", ROOT / "docs" / "hooks" / "generated_parts.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOK = load_hook()


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code blocks in a language."""
    return [code for kind, code in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings as on GitHub, and, for generated parts, as on the site."""
    text = FENCE.sub("", _whole_text(page))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@functools.cache
def _whole_text(page: Path) -> str:
    return str(HOOK.on_page_markdown(page.read_text(encoding="utf-8")))


def broken_links(page: Path, root: Path = ROOT) -> list[str]:
    """The relative links of a page whose file or heading does not exist below `root`."""
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
    """The arguments of each call of `faim2f`, starting with the command."""
    for code in blocks(page, "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            if ours := OURS.fullmatch(line):
                yield shlex.split(ours[1], comments=True)
            elif conversion := CONVERSION.fullmatch(line):
                yield ["convert", *shlex.split(conversion[1], comments=True)]


def refusal(words: list[str]) -> str:
    """Why the command would reject these arguments; empty if it would not."""
    if words[0] not in COMMANDS:
        return f"there is no command {words[0]}"
    module = importlib.import_module(COMMANDS[words[0]].module)
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()) as complaint:
        try:
            module.build_parser(f"faim2f {words[0]}").parse_args(words[1:])
        except SystemExit as stop:
            if stop.code:
                return said.getvalue() + complaint.getvalue() or f"status {stop.code}"
    settings = dict(itertools.pairwise(words))  # the parser accepts any word for these two
    for flag, known in (("--format", FORMATS), ("--recipe", RECIPES)):
        if flag in settings and settings[flag] not in known:
            return f"{flag} {settings[flag]} is none"
    return ""


def test_the_check_of_links_finds_what_is_wrong(tmp_path: Path) -> None:
    page = ROOT / "docs" / "guides" / "deploy.md"
    assert "sizes" not in anchors(page) and "without-python" in anchors(page)
    assert "faim2f-export-onnx" in anchors(ROOT / "docs" / "reference" / "command-line.md")
    wrong = tmp_path / "page.md"
    links = "[a](nowhere.md) [b](#a-heading) [c](#another) [d](https://example.com) [e](../outside.md) [f](page.md)"
    wrong.write_text(f"# A heading\n{links}\n", encoding="utf-8")
    (tmp_path.parent / "outside.md").touch()
    assert broken_links(wrong, tmp_path) == ["nowhere.md", "#another", "../outside.md"]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_the_check_of_commands_finds_what_is_wrong() -> None:
    assert refusal(["fly"]) and refusal(["predict", "model"]) and refusal(["export", "onnx", "a", "b", "--colour"])
    assert refusal(["train", "--recipe", "none"]) and refusal(["convert", "focoos", "a", "b"])
    assert not refusal(["export", "onnx", "a", "b", "--size", "64x64"])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_taken(page: Path) -> None:
    assert {shlex.join(words): refusal(words) for words in commands(page) if refusal(words)} == {}


def test_commands_are_found() -> None:
    counts = {name_of(page): sum(1 for _ in commands(page)) for page in PAGES}
    assert counts["README.md"] >= 12 and counts["docs/guides/export.md"] >= 4
    assert counts["docs/guides/quantize.md"] == 2 and counts["docs/guides/convert.md"] == 8
    assert counts["docs/guides/fine-tune.md"] == 15 and counts["docs/guides/evaluate.md"] == 4
    assert counts["docs/guides/video.md"] == 4 and counts["docs/guides/predict.md"] == 3
    assert counts["docs/guides/deploy.md"] == 4 and counts["docs/guides/publish.md"] == 3
    assert counts["docs/guides/serve.md"] == 6 and counts["docs/guides/web.md"] == 4


def test_help_of_every_command_that_is_named() -> None:
    with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code in (None, 0)
    named = {words[0] for page in PAGES for words in commands(page)}
    assert named and all(re.search(rf"^\s+{name}\b", said.getvalue(), re.MULTILINE) for name in named)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
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


@pytest.fixture
def beside_the_snippets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files that the snippets open: models, photos and training data."""
    for name in ("examples/digits", "my-model"):
        complete_digits(tmp_path / name)
    (tmp_path / "docs" / "images").mkdir(parents=True)
    for name in ("docs/images/scene.jpg", "photo.jpg", "one.jpg", "two.jpg", "three.jpg"):
        shutil.copy(SCENE, tmp_path / name)
    for folder in ("images", "masks"):
        (tmp_path / "flowers" / folder).mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (32, 32)).save(tmp_path / "flowers" / "images" / f"{number}.jpg")
        Image.new("L", (32, 32), number % 2).save(tmp_path / "flowers" / "masks" / f"{number}.png")
    (tmp_path / "flowers" / "labels.txt").write_text("petal\nleaf\n")
    monkeypatch.chdir(tmp_path)
    # A cached published model, as after its first download.
    monkeypatch.setenv("FAIM2F_CACHE", str(shared_folder("fai-mf-m-ade in a cache", published_in_cache)))
    return tmp_path


def published_in_cache(cache: Path) -> None:
    """Downloads a published model into a cache from a local server in place of Focoos's."""
    with pytest.MonkeyPatch.context() as patch, running_weights_server() as server:
        go_online(patch)
        patch.setenv("FAIM2F_CACHE", str(cache))
        server.files["/model_final.pth"] = focoos_file("fai-mf-m-ade")
        resolve("fai-mf-m-ade", weights_url=f"{server.url}/model_final.pth")
        record = next(cache.glob("*/record.json"))
        source = published_source("fai-mf-m-ade", "")
        assert source is not None
        record.write_text(record.read_text().replace(f"{server.url}/model_final.pth", source.url))
        record.parent.rename(entry_folder(source.name, source.url))


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_snippets_run(page: Path, beside_the_snippets: Path) -> None:
    codes = [code for place, code in enumerate(blocks(page, "python")) if place != SHOWN.get(page)]
    assert codes
    for code in codes:
        exec(compile(code, name_of(page), "exec"), {})


@pytest.mark.parametrize("page", SHOWN, ids=name_of)
def test_a_snippet_prints_and_draws_what_the_page_shows(
    page: Path, beside_the_snippets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def rows(text: str) -> list[tuple[str, float, list[int]]]:
        found = [re.fullmatch(r"(\w+) +([\d.]+) \(([\d, ]+)\)", line) for line in text.strip().splitlines()]
        return [(row[1], float(row[2]), [int(side) for side in row[3].split(",")]) for row in found if row]

    exec(compile(blocks(page, "python")[SHOWN[page]], name_of(page), "exec"), {})
    printed, shown = rows(capsys.readouterr().out), rows(blocks(page, "text")[0])
    assert len(shown) == 6
    # Segments with nearly equal scores may be swapped by rounding.
    for (label, score, box), (same_label, same_score, same_box) in zip(sorted(printed), sorted(shown), strict=True):
        assert label == same_label and abs(score - same_score) < 0.011
        assert all(abs(side - same) <= 1 for side, same in zip(box, same_box, strict=True))
    with Image.open("found.jpg") as found, Image.open(ROOT / "docs" / "images" / "scene_found.jpg") as both:
        right = both.crop((both.width - found.width, 0, both.width, both.height))
        assert right.size == found.size
        differences = [abs(one - other) for one, other in zip(found.tobytes(), right.tobytes(), strict=True)]
        assert sum(differences) / len(differences) < 4  # JPEG compression, twice


def test_every_snippet_that_opens_a_photo_turns_it_upright() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.count('Image.open("') == text.count('ImageOps.exif_transpose(Image.open("')


def test_the_readme_is_short_and_has_its_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert "\nmake demo " in text and "\nmake test " in text


def test_the_table_of_models_is_the_family_s() -> None:
    table = HOOK.PARTS["models"]()
    assert len(table.splitlines()) == 2 + len(FAMILY)
    assert table in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_command_is_in_the_readme_with_an_example() -> None:
    assert {words[0] for words in commands(ROOT / "README.md")} == set(COMMANDS)


def test_test_files_that_are_named_are_there() -> None:
    named = {name for page in PAGES for name in re.findall(r"\btest_\w+\.py\b", page.read_text(encoding="utf-8"))}
    assert len(named) > 5 and named <= {path.name for path in (ROOT / "tests").rglob("test_*.py")}


def test_the_names_of_the_api_reference_are_there() -> None:
    text = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    names = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    assert len(names) >= 20
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert inspect.getdoc(getattr(importlib.import_module(module), attribute)), name
    public = [f"hf_faim2f.{name}" for name in hf_faim2f.__all__ if not name.startswith("_")]
    assert [name for name in public if name not in names] == []


def test_the_file_of_settings_is_one(tmp_path: Path) -> None:
    (code,) = blocks(ROOT / "docs" / "guides" / "fine-tune.md", "yaml")
    path = tmp_path / "run.yaml"
    path.write_text(code, encoding="utf-8")
    values = read_settings_file(TrainSettings, path)
    assert values["format"] in FORMATS and values["recipe"] in RECIPES


def test_the_table_of_recipes_is_theirs() -> None:
    text = (ROOT / "docs" / "reference" / "recipes.md").read_text(encoding="utf-8")
    for recipe in RECIPES.values():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{recipe.name}` | {recipe.steps:,} |"))
        _, _, steps, batch, rate, schedule, clip, average, *_ = (cell.strip() for cell in row.split("|"))
        assert (steps, batch) == (f"{recipe.steps:,}", str(recipe.batch_size))
        learning_rate, backbone = rate.split(", x")
        assert (float(learning_rate), float(backbone)) == (recipe.learning_rate, recipe.backbone_multiplier)
        assert schedule == f"{recipe.schedule}, {recipe.warmup_steps}"
        assert float(clip) == recipe.clip and (0.0 if average == "–" else float(average)) == recipe.ema_decay


def test_every_field_of_the_configuration_is_told() -> None:
    text = (ROOT / "docs" / "reference" / "configuration.md").read_text(encoding="utf-8")
    told = set(re.findall(r"`(\w+)`", text))
    fields = [name for name in inspect.signature(FaiM2FConfig).parameters if name != "kwargs"]
    assert len(fields) > 30 and [name for name in fields if name not in told] == []


def test_every_output_of_a_graph_is_told() -> None:
    text = (ROOT / "docs" / "guides" / "export.md").read_text(encoding="utf-8")
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


# --------------------------------------------------------------------------------------------------------------- site


class Loaded(HTMLParser):
    """The resources that a page loads when it is opened, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        if tag in ("img", "script", "iframe", "source", "video", "embed"):
            self.addresses += [str(values[name]) for name in ("src", "srcset") if values.get(name)]
        if tag == "link" and values.get("rel") not in ("canonical", "next", "prev"):
            self.addresses.append(str(values.get("href")))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    """The built pages by path."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = {}
    for path in folder.rglob("*.html"):
        pages[path.relative_to(folder).as_posix()] = page = Loaded()
        page.feed(path.read_text(encoding="utf-8"))
    styles = "".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.css"))
    pages["styles"] = Loaded()
    pages["styles"].addresses = re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^\"')]+", styles)
    return pages


def flags_of(parser: Any) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from flags_of(below)


@pytest.mark.large  # MkDocs imports all commands and reads all sources
def test_the_site_builds_and_loads_nothing_from_other_hosts(site: dict[str, Loaded]) -> None:
    docs = ROOT / "docs"
    pages = {path.relative_to(docs).with_suffix(".html").as_posix() for path in docs.rglob("*.md")}
    assert pages <= set(site)
    elsewhere = {
        name: [address for address in page.addresses if "//" in address and not address.startswith("data:")]
        for name, page in site.items()
    }
    assert {name: found for name, found in elsewhere.items() if found} == {}
    assert any(page.addresses for page in site.values())


@pytest.mark.large  # as above
def test_the_site_has_every_flag_and_every_name(site: dict[str, Loaded]) -> None:
    text = site["reference/command-line.html"].text
    for name, command in COMMANDS.items():
        flags = set(flags_of(importlib.import_module(command.module).build_parser(name))) - {"-h", "--help"}
        assert f"faim2f {name}" in text and [flag for flag in flags if flag not in text] == []
    api = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    built = site["reference/api.html"].text
    assert all(name in built for name in re.findall(r"^::: (\S+)$", api, re.MULTILINE))
    assert "<!-- generated" not in "".join(page.text for page in site.values())

"""The layout in docs/architecture.md: imports only run downwards, without cycles, and files stay small."""

import ast
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import NEWEST_ONLY

ROOT = Path(__file__).parents[1]
FLOORS = (
    ("download", "errors", "files", "masks", "moved", "version"),
    ("model",),
    ("family", "data", "hub", "conversion"),
    ("zoo", "model_cache", "export"),
    ("runtime", "evaluation"),
    ("training", "distributed", "serving", "benchmarking"),
    ("cli",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MOST_FILES = 190  # the goal is 120: merge files rather than adding more
MOST_LINES = 450
# The core dependencies in setup.cfg, and tqdm, which huggingface-hub depends on.
CORE = {"torch", "transformers", "huggingface_hub", "numpy", "PIL", "yaml", "safetensors", "scipy", "tqdm"}


def sources() -> dict[str, Path]:
    """Every module of the package by its name without `hf_faim2f.`; the package itself is ""."""
    found = {}
    for base in (ROOT / "hf_faim2f", ROOT / "conversion"):
        for path in sorted(base.rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts[1:] if parts[0] == "hf_faim2f" else parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(module: str, modules: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """The modules of the package that a module imports, anywhere in its file, with line numbers."""
    path = modules[module]
    package = [part for part in module.split(".") if part]
    package = package if path.stem == "__init__" else package[:-1]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "hf_faim2f":
                    yield alias.name.partition(".")[2], node.lineno
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = package[: len(package) - node.level + 1]
        elif node.module and node.module.split(".")[0] == "hf_faim2f":
            base = []
        else:
            continue
        name = (node.module or "").removeprefix("hf_faim2f").lstrip(".") if not node.level else node.module
        target = ".".join([*base, name] if name else base).lstrip(".")
        for alias in node.names:
            inner = f"{target}.{alias.name}".lstrip(".")
            yield (inner if inner in modules else target), node.lineno


def imported_at_once(module: str, modules: dict[str, Path]) -> set[str]:
    """The third-party libraries that importing a module imports."""
    seen, libraries, left = set[str](), set[str](), [module]
    while left:
        module = left.pop()
        if module in seen:
            continue
        seen.add(module)
        tree = parsed(modules[module])
        inner = {
            child.lineno
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node))
            for child in ast.walk(node)
            if isinstance(child, ast.Import | ast.ImportFrom)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Import) and node.lineno not in inner:
                libraries |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.lineno not in inner:
                libraries.add((node.module or "").split(".")[0])
        targets = {target for target, line in imports(module, modules) if line not in inner}
        parents = {module.rpartition(".")[0]} if "." in module else set()
        left += [target for target in targets | parents if target in modules]
    return libraries - sys.stdlib_module_names - {"hf_faim2f"}


@pytest.mark.parametrize(
    "module",
    ["", "zoo", "runtime.predictor", "conversion", "export", "hub.publish", "serving.inference_server", "cli.app"]
    + [f"cli.{name}" for name in ("benchmark", "card", "convert", "export", "models", "predict", "push", "serve")],
)
def test_core_needs_no_extra(module: str) -> None:
    """Libraries of extras are imported only where they are used, so that the rest works without them."""
    assert imported_at_once(module, sources()) <= CORE


def room_of(module: str) -> str:
    return module.split(".")[0]


def test_imports_run_downwards() -> None:
    modules = sources()
    wrong = []
    for module, path in modules.items():
        if module in ("", "conversion.__main__"):  # the package's public names; the entry point of a command
            continue
        for target, line in imports(module, modules):
            if target and FLOOR_OF[room_of(target)] > FLOOR_OF[room_of(module)]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_through_others() -> None:
    modules = sources()
    graph = {module: {target for target, _ in imports(module, modules)} - {module} for module in modules}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for target in sorted(graph[module]):
                visit(target, (*trail, module))
            done.add(module)

    for module in modules:
        visit(module, ())


def test_few_files_none_long() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources().values()}
    assert len(lengths) <= MOST_FILES
    assert not {name: length for name, length in lengths.items() if length > MOST_LINES}


@pytest.mark.parametrize("room", [room for rooms in FLOORS for room in rooms])
def test_every_room_is_there(room: str) -> None:
    assert room in {room_of(module) for module in sources()}


def test_what_runs_in_one_environment_is_there() -> None:
    """A renamed file must be renamed in the list, too, or it would run in both environments."""
    assert not [place for place in NEWEST_ONLY if not (ROOT / "tests" / place).exists()]


def test_tests_share_through_support_only() -> None:
    """No test module imports another: shared helpers are in tests/support/."""
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.match(r"\s*(from|import) tests\.(\w+\.)*test_", line)
    ]
    assert not wrong, "\n".join(wrong)

"""All commands: help with valid examples, bash completion, JSON for programs, exit statuses."""

import argparse
import fcntl
import json
import os
import pty
import re
import runpy
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hf_faim2f import FaiM2FImageProcessor
from hf_faim2f.cli import completion, main, output, predict
from hf_faim2f.cli import parser as tree
from hf_faim2f.cli.convert import main as conversion_main
from hf_faim2f.cli.output import STATUSES, one_document
from hf_faim2f.cli.parser import examples_of, subcommands
from hf_faim2f.files import new_folder
from hf_faim2f.version import __version__
from tests.support import forks
from tests.support.mask2former_models import tiny as their_model
from tests.support.reference_models import small_model
from tests.support.shapes import LABELS, write_tree

EXPORTED = ["--size", "64x64", "--batch", "1"]


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and all its subparsers."""
    yield parser
    for below in subcommands(parser).values():
        yield from parsers(below)


@pytest.fixture(scope="module")
def whole() -> argparse.ArgumentParser:
    """The parser with all commands."""
    return tree.build_parser(whole=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("line") / "model"
    small = small_model(id2label=dict(enumerate(LABELS)), decoder_layers=1)
    small.save_pretrained(folder)
    FaiM2FImageProcessor.from_model_config(small.config, size={"shortest_edge": 64}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def graph(model: Path) -> Path:
    out = model.parent / "graph"
    assert main(["export", "onnx", str(model), str(out), *EXPORTED]) == 0
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("line-data") / "folder"
    write_tree("folder", root, 2)
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("line-images")
    for number in range(2):
        Image.new("RGB", (64, 64), (200, 60 * number, 30)).save(folder / f"{number}.png")
    return folder


def document(capfd: pytest.CaptureFixture[str], *words: object, status: int = 0) -> tuple[Any, str]:
    """The document that a command prints with --json, and its standard error."""
    assert main([*map(str, words), "--json"]) == status
    printed = capfd.readouterr()
    return json.loads(printed.out), printed.err


def documented(whole: argparse.ArgumentParser, *names: str) -> set[str]:
    """The fields that a command's help documents; `names` are the command's words."""
    parser: Any = whole
    for name in names:
        parser = subcommands(parser)[name]
    return {field for row in parser.document for field in row.split(", ")}


def test_every_command_is_there_with_its_own_arguments(whole: argparse.ArgumentParser) -> None:
    found = subcommands(whole)
    assert list(found) == list(tree.COMMANDS)
    for name, parser in found.items():
        assert parser.prog == f"faim2f {name}"
        assert len(parser._actions) > 1, f"{name} is there by its name alone"


def test_every_example_can_be_parsed(whole: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str]) -> None:
    count = 0
    for parser in parsers(whole):
        examples = examples_of(parser.format_help(), parser.prog)
        assert examples, f"{parser.prog} has no example"
        for words in examples:
            command = [*parser.prog.split()[1:], *words]
            redirected = command[: command.index(">")] if ">" in command else command
            own = subcommands(whole)[redirected[0]]
            # Unlike argparse, `faim2f predict` accepts positional arguments after flags.
            if redirected[0] == "predict":
                predict.parse(own, redirected[1:])  # type: ignore[arg-type]
            else:
                own.parse_args(redirected[1:])
            count += 1
    assert count > 30
    with pytest.raises(SystemExit, match="2"):  # an outdated example would be found
        subcommands(whole)["push"].parse_args(["my-model", "me/my-model", "--dry"])
    assert "did you mean --dry-run?" in capsys.readouterr().err


def test_every_argument_is_explained_with_its_default(whole: argparse.ArgumentParser) -> None:
    for parser in parsers(whole):
        assert parser.description, parser.prog
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                continue
            where = f"{parser.prog} {action.option_strings or action.dest}"
            assert action.help, where
            takes_a_value = action.option_strings and action.nargs != 0
            if takes_a_value and not action.required:
                assert re.search("default|required", action.help), f"{where} does not say its default"


def test_the_settings_that_are_needed_say_so(whole: argparse.ArgumentParser) -> None:
    """The help texts must name the settings that `require` checks, which are listed elsewhere."""
    for name in ("train", "evaluate"):
        texts = {action.dest: action.help for action in subcommands(whole)[name]._actions}
        for needed in ("out", "format"):
            assert "required" in str(texts[needed]), (name, needed)


def test_the_help_has_commands_statuses_and_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    for name, command in tree.COMMANDS.items():
        assert f"  {name}" in text and command.help in text
    for status, meaning in STATUSES.items():
        assert re.search(rf"^  {status} +{re.escape(meaning)}$", text, re.M)
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"faim2f {__version__}\n"


def test_without_a_command_there_is_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "train and measure:" in printed.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["exprot"], "faim2f: there is no command 'exprot'; did you mean export?"),
        (["xyzzy"], "faim2f: there is no command 'xyzzy'; choose from convert, models, train"),
        (["--hlep"], "faim2f: "),
        (["export", "onx"], "faim2f export: there is no format 'onx'; did you mean onnx?"),
        (["export", "onnx", "a", "b", "--outptus", "x"], "no argument --outptus; did you mean --outputs?"),
        (["export", "onnx", "a", "b", "--outputs", "semantics"], "--outputs cannot be 'semantics'; did you mean sem"),
        (["export", "onnx", "a", "b", "--out", "semantic"], "faim2f export onnx: there is no argument --out; did you"),
        (["convert", "focos", "a", "b"], "faim2f convert: there is no kind 'focos'; did you mean focoos?"),
        (["completion", "bsh"], "faim2f completion: SHELL cannot be 'bsh'; did you mean bash?"),
        (["push", "a"], "faim2f push: the following arguments are required: REPO_ID."),
    ],
)
def test_a_word_that_is_not_known(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.out == ""
    assert told in printed.err and printed.err.count("\n") == 1


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of `faim2f completion bash` in a separate process, which must contain nothing else."""
    path = tmp_path_factory.mktemp("completion") / "faim2f.bash"
    done = subprocess.run(
        [sys.executable, "-m", "hf_faim2f.cli", "completion", "bash"], capture_output=True, text=True, check=True
    )
    path.write_text(done.stdout)
    return path


def completed(script: Path, *words: str, folder: Path | None = None) -> list[str]:
    """bash's completions of the last word."""
    lines = [
        f"source {script}",
        'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()',
        # The function that the script has registered for the command, called as bash does.
        "registered=$(complete -p faim2f) && function=${registered##*-F } && ${function%% *}",
        'printf "%s\\n" "${COMPREPLY[@]}"',
    ]
    command = ["bash", "--norc", "-c", "\n".join(lines), "bash", "faim2f", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.large
@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes(script: Path, tmp_path: Path) -> None:
    assert completed(script, "ex") == ["export"]
    assert completed(script, "p") == ["predict", "push"]
    assert completed(script, "export", "o") == ["onnx", "openvino"]
    assert completed(script, "export", "onnx", "--out") == ["--outputs"]
    assert completed(script, "export", "onnx", "--outputs", "") == ["logits", "semantic", "instances", "queries"]
    assert completed(script, "export", "onnx", "a", "b", "--outputs", "s") == ["semantic"]
    assert completed(script, "convert", "mask2former", "--sub") == ["--subtask"]
    assert completed(script, "evaluate", "--precision", "") == ["fp32", "bf16", "fp16"]
    assert completed(script, "evaluate", "--format", "coco-p") == ["coco-panoptic"]
    assert completed(script, "train", "--no-t") == ["--no-tensorboard"]
    assert completed(script, "completion", "") == ["bash", "zsh"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine.png").touch()
    assert completed(script, "push", "mi", folder=tmp_path) == ["mine"]
    assert sorted(completed(script, "predict", "m", "mi", folder=tmp_path)) == ["mine", "mine.png"]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh")
def test_zsh_reads_its_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    subprocess.run(["zsh", "-n"], input=capsys.readouterr().out, text=True, check=True)


def test_the_script_of_zsh_is_for_the_whole_tree(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("#compdef faim2f")
    assert {"quantize", "tensorrt", "--outputs", "--max-error"} <= set(re.findall(r"[\w-]+", text))


def test_commands_without_their_libraries_are_completed_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "hf_faim2f.cli.train", raising=False)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert main(["completion", "bash"]) == 0
    printed = capsys.readouterr()
    assert "train" in printed.out and "--learning-rate" not in printed.out and "--max-error" in printed.out
    assert "train is completed by its name alone, as accelerate cannot be imported: install hf-faim2f[train]." in (
        printed.err
    )


def test_completion_without_its_library(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delitem(sys.modules, completion.__name__)
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert "install hf-faim2f[completion]" in capsys.readouterr().err


def test_one_document_whatever_else_is_written(capfd: pytest.CaptureFixture[str]) -> None:
    with one_document(True) as tell:
        print("a line")
        os.write(1, b"a library in C\n")
        subprocess.run([sys.executable, "-c", "print('a process')"], check=True)
        tell({"answer": 42})
    os.write(1, b"\n")  # standard output is restored
    printed = capfd.readouterr()
    assert json.loads(printed.out) == {"answer": 42} and printed.out.endswith("}\n\n")
    assert sorted(printed.err.splitlines()) == ["a library in C", "a line", "a process"]


def test_json_of_evaluate(
    whole: argparse.ArgumentParser, model: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", model, "--data", data, "--format", "folder", "--no-card"]
    told, lines = document(capfd, *words, "--out", tmp_path / "out")
    assert set(told) == documented(whole, "evaluate")
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert told == {**written, "out": str(tmp_path / "out"), "card": None, "notes": told["notes"]}
    assert "Written: " in lines
    assert main([*map(str, words), "--json", "--out", str(model / "config.json")]) == 2
    assert capfd.readouterr().out == ""  # after an error


def test_json_of_benchmark(
    whole: argparse.ArgumentParser, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["--size", "64x64", "--batch-sizes", 1, "--runs", 2, "--warm-up", 1, "--device", "cpu", "--out", out]
    told, lines = document(capfd, "benchmark", model, *words)
    assert set(told) == documented(whole, "benchmark")
    assert told == {"out": str(out), "notes": told["notes"], **json.loads((out / "results.json").read_text())}
    assert "| model | runtime |" in lines


def test_json_of_export_and_quantize(
    whole: argparse.ArgumentParser, model: Path, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "graph"
    told, lines = document(capfd, "export", "onnx", model, out, *EXPORTED)
    fields = documented(whole, "export", "onnx")
    assert set(told) == fields | {"images", "size"}  # fields that the help of another format documents
    assert told["verified"] is True and told["size"] == [64, 64] and told["nodes"]["Conv"] > 5 and told["macs"] > 1e6
    assert {file["name"]: file["bytes"] for file in told["files"]} == {
        path.name: path.stat().st_size for path in out.iterdir()
    }
    assert all(note in lines for note in told["notes"])
    int8 = tmp_path / "int8"
    told, lines = document(capfd, "quantize", out, int8, "--images", images, "--max-error", 0.9)
    assert set(told) == documented(whole, "quantize")
    assert told["report"] == json.loads((int8 / "quantization.json").read_text())


def test_json_of_predict_and_its_status(
    whole: argparse.ArgumentParser, model: Path, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    words = ["predict", model, images, broken, "--no-overlays", "--out", tmp_path / "out"]
    told, _ = document(capfd, *words, status=1)
    assert set(told) == documented(whole, "predict")
    assert (told["images"], told["written"], len(told["left_out"])) == (3, 2, 1)
    assert "broken.png" in told["left_out"][0]


def test_json_of_card_and_convert(
    whole: argparse.ArgumentParser, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    told, lines = document(capfd, "card", folder)
    assert set(told) == documented(whole, "card")
    assert Path(told["card"]).is_file() and told["holes"] and all(hole in lines for hole in told["holes"])

    theirs = tmp_path / "theirs-semantic"
    their_model().save_pretrained(theirs)
    out = tmp_path / "ours"
    told, lines = document(capfd, "convert", "mask2former", theirs, out, "--subtask", "semantic")
    assert set(told) == documented(whole, "convert", "mask2former")
    assert told["out"] == str(out) and 0 <= told["error"] < 1e-3 and "written to" in lines
    with pytest.raises(SystemExit, match="0"):
        conversion_main(["mask2former", "--help"])
    assert "python -m conversion mask2former " in capfd.readouterr().out


PLAIN: list[tuple[str, list[str]]] = [
    ("predict", ["{model}", "{images}", "--out", "{out}", "--no-overlays"]),
    ("evaluate", ["{model}", "--data", "{data}", "--format", "folder", "--out", "{out}", "--no-card"]),
    ("train", ["--model", "{model}", "--data", "{data}", "--format", "folder", "--out", "{out}", "--steps", "2",
               "--batch-size", "2", "--image-size", "64", "--samples", "0", "--no-tensorboard", "--log-every", "1"]),
    ("benchmark", ["{model}", "--size", "64x64", "--batch-sizes", "1", "--runs", "2", "--warm-up", "1", "--device",
                   "cpu", "--out", "{out}"]),
    ("quantize", ["{graph}", "{out}", "--images", "{images}", "--max-error", "0.9"]),
]  # fmt: skip


@pytest.mark.large
def test_output_is_plain_where_there_is_no_terminal(
    model: Path, graph: Path, data: Path, images: Path, tmp_path: Path
) -> None:
    places = {"model": model, "graph": graph, "data": data, "images": images}
    commands = [
        [name, *(word.format(**places, out=tmp_path / f"out-{name}") for word in words)] for name, words in PLAIN
    ]
    for name, *words in commands:
        done = forks.run(forks.COMMAND, name, *words)
        said = (done.out + done.error).encode()
        assert done.returncode == 0, said.decode()
        assert said, name
        for sign in (b"\r", b"\x1b", b"%|"):
            assert sign not in said, said.decode()


@pytest.mark.large
def test_a_bar_is_there_on_a_terminal(model: Path, images: Path, tmp_path: Path) -> None:
    """Shows that the test above can fail."""
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # a terminal without columns shows no bar
    words = ["predict", str(model), str(images), "--out", str(tmp_path / "out"), "--no-overlays"]
    process = forks.Fork(forks.COMMAND, *words, terminal=os.ttyname(there))
    told = b""
    while process.returncode is None or select.select([here], [], [], 0)[0]:
        if select.select([here], [], [], 0.05)[0]:
            told += os.read(here, 4096)
    os.close(there)
    os.close(here)
    assert process.returncode == 0 and b"2/2" in told and b"\r" in told
    assert b"Loading weights" not in told


def test_an_interrupted_command_ends_with_130(model: Path, data: Path, tmp_path: Path) -> None:
    """Even a command that does not handle KeyboardInterrupt."""
    program = (
        "import sys, time; from hf_faim2f import cli; from hf_faim2f.cli import card\n"
        "def slow(*_): print('ready', flush=True); time.sleep(600)\n"
        "card.renewed_card = slow\n"
        f"sys.exit(cli.main(['card', {str(model)!r}]))"
    )
    process = forks.Fork(program)
    while process.returncode is None and process.out != "ready\n":
        time.sleep(0.05)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.wait(60)
    assert process.returncode == 130
    assert process.error == "faim2f card: interrupted.\n"


@pytest.mark.parametrize("name", ["benchmark", "convert", "evaluate", "export", "predict", "push", "quantize"])
def test_sigterm_removes_what_is_unfinished(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(arguments: Sequence[str] = (), program: str = "") -> int:
        with new_folder(tmp_path / "out"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        return 0

    monkeypatch.setattr(f"hf_faim2f.cli.{name}.main", stopped)
    # As empty or for the other programs of a job; only `evaluate` is distributed by it.
    monkeypatch.setenv("WORLD_SIZE", "" if name == "evaluate" else "4")
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # otherwise a failure would end the tests
    try:
        assert main([name]) == 130
        if name == "convert":
            monkeypatch.setattr(sys, "argv", ["conversion"])
            with pytest.raises(SystemExit, match="130"):
                runpy.run_module("conversion", run_name="__main__")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert list(tmp_path.iterdir()) == []


def test_text_that_the_terminal_cannot_show_does_not_end_a_command(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "\u6728"))
    program = f"import sys; sys.stdout.reconfigure(encoding='ascii', errors='strict'); {forks.COMMAND}"
    done = forks.run(program, "card", folder)
    assert done.returncode == 0 and done.error == "" and "\\u6728/README.md" in done.out


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has /dev/full")
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_output_that_cannot_be_written_is_one_sentence(more: list[str]) -> None:
    program = f"import os, sys; os.dup2(os.open('/dev/full', os.O_WRONLY), 1); {forks.COMMAND}"
    done = forks.run(program, "models", "fai-mf-m-ade", *more)
    assert done.returncode == 2 and done.error.splitlines()[-1] == "faim2f models: No space left on device."
    assert "Traceback" not in done.error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupt_that_python_drops_is_raised_again(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python only reports exceptions in weak reference callbacks; other reports are unaffected."""
    assert threading.current_thread() is threading.main_thread()  # in another thread, SIGTERM would end this process
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)]
    reported: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)
    calls: list[str] = []

    def interrupt(_: object) -> None:
        calls.append("interrupt")
        os.kill(os.getpid(), number)
        sum(range(1000))  # the handler runs between two instructions
        calls.append("not reached")

    def fail(_: object) -> None:
        raise ValueError("of somebody else")

    class Watched:
        pass

    with pytest.raises(KeyboardInterrupt), output.sigterm_interrupts(1):
        for callback in (fail, interrupt):
            watched = Watched()
            _reference = weakref.ref(watched, callback)
            del watched
        assert calls == ["interrupt"]
        assert [what.exc_type for what in reported] == [ValueError]
        time.sleep(5)
        raise AssertionError("it was not interrupted again")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)] == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert sys.unraisablehook == reported.append

"""Processes that start immediately, as forks of one that has imported torch, transformers and the package.

Starting Python with these imports takes five seconds. Tests that need a process, but not its startup, use a fork; every
way in which users start a command has at least one test with a real start.
"""

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path

import torch

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["hf_faim2f.cli.predict", "hf_faim2f.cli.train", "hf_faim2f.cli.evaluate"])
COMMAND = "import sys; from hf_faim2f.cli import main; sys.exit(main())"
ONNX = ("onnx", "onnx_ir", "onnxruntime", "onnxscript")
WITHOUT_ONNX = f"import sys; sys.modules.update(dict.fromkeys({ONNX})); {COMMAND}"
MODULE = "import runpy, sys; runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"


def _begin(code: str, arguments: list[str], environment: dict[str, str], outputs: tuple[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for stream, path in enumerate(outputs, 1):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY)
        os.dup2(opened, stream)
        os.close(opened)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes ignore SIGINT otherwise
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


class Fork:
    """Like `subprocess.Popen` of `python -c CODE ARGUMENTS`, with one thread and changed environment variables.

    Args:
        terminal: the file to use as standard error instead of a pipe.
    """

    def __init__(self, code: str, *arguments: object, terminal: str | None = None, **environment: str) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="faim2f-fork-")
        self.paths = Path(self.folder.name, "out"), Path(self.folder.name, "error")
        for path in self.paths:
            path.touch()
        words = [str(argument) for argument in arguments]
        outputs = str(self.paths[0]), terminal or str(self.paths[1])
        self.process = FORKS.Process(target=_begin, args=(code, words, {**os.environ, **environment}, outputs))
        self.process.start()

    @property
    def out(self) -> str:
        """What the process has printed."""
        return self.paths[0].read_text()

    @property
    def error(self) -> str:
        """What the process has written to standard error."""
        return self.paths[1].read_text()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self, timeout: float = 300) -> "Fork":
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"It did not end: {self.out}{self.error}")
        return self


def run(code: str, *arguments: object, **environment: str) -> Fork:
    return Fork(code, *arguments, **environment).wait()


def run_together(code: str, *arguments: object, processes: int = 2) -> list[Fork]:
    """Runs code in several processes, with the variables by which torchrun and `accelerate launch` connect them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes),
              "LOCAL_WORLD_SIZE": str(processes)}  # fmt: skip
    forks = [Fork(code, *arguments, **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(processes)]
    return [fork.wait() for fork in forks]

"""What goes on beside the network, and when the network waits for it."""

import math
import os
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image

from hf_faim2f.model.image_processing_faim2f import FaiM2FImageProcessor
from hf_faim2f.model.modeling_faim2f import FaiM2FForUniversalSegmentation
from hf_faim2f.runtime import side_threads
from hf_faim2f.runtime.predictor import Predictor
from hf_faim2f.runtime.side_threads import SideWork
from tests.support.reference_models import small_config


@pytest.fixture(autouse=True)
def no_longest_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends a wait is what each test says, not that it was long."""
    monkeypatch.setattr(side_threads, "LONGEST_WAIT", math.inf)


def test_what_computes_for_ever_is_not_waited_for_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_threads, "LONGEST_WAIT", 0.05)
    monkeypatch.setattr(side_threads, "LEAST_SHARE", 0.0)
    stop = threading.Event()
    beside = SideWork(in_turn=True)
    with beside.threads("test") as executor:
        computing = executor.submit(compute_until, stop)
        try:
            beside.let_finish()  # else for ever
            assert not computing.done()
        finally:
            stop.set()


def compute_until(stop: threading.Event) -> None:
    while not stop.is_set():
        sum(range(1000))


def compute_for(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        sum(range(1000))


def test_the_network_waits_for_what_computes() -> None:
    beside = SideWork(in_turn=True)
    with beside.threads("test") as executor, mock.patch.object(side_threads, "LEAST_SHARE", 0.0):
        work = [executor.submit(compute_for, 0.05) for _ in range(5)]
        beside.let_finish()
        assert all(future.done() for future in work)


def test_the_network_does_not_wait_for_a_disk() -> None:
    stop = threading.Event()
    beside = SideWork(in_turn=True)
    with beside.threads("test") as executor:
        reading: Future[Any] = executor.submit(stop.wait)
        try:
            beside.let_finish()  # else for ever
            assert not reading.done()
        finally:
            stop.set()


@pytest.mark.parametrize(("in_turn", "waits"), [(True, False), (True, True), (False, False)])
def test_in_turn_no_more_is_computed_than_there_are_cores(in_turn: bool, waits: bool) -> None:
    cores = torch.get_num_threads()
    beside = SideWork(in_turn)
    executors = [beside.threads(f"test-{number}", 1, waits and number < cores) for number in range(cores + 1)]

    def all_at_once() -> None:
        begun, stop = threading.Semaphore(0), threading.Event()

        def work() -> int:
            begun.release()
            stop.wait()
            return 7

        try:
            futures = [executor.submit(work) for executor in executors]
            for _ in range(cores):
                assert begun.acquire(timeout=10)
            one_more = not in_turn or waits
            assert begun.acquire(timeout=10 if one_more else 0.3) is one_more
        finally:
            stop.set()
        assert [future.result() for future in futures] == [7] * len(futures)

    all_at_once()
    for executor in executors:
        failing = executor.submit(lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            failing.result()
    all_at_once()  # who failed gave its core back
    for executor in executors:
        executor.shutdown()


def test_where_they_do_not_take_turns_the_network_goes_on() -> None:
    stop = threading.Event()
    beside = SideWork(in_turn=False)
    with beside.threads("test") as executor:
        computing = executor.submit(compute_until, stop)
        try:
            beside.let_finish()
            assert not computing.done()
        finally:
            stop.set()


def test_what_is_cancelled_or_fails_is_not_waited_for() -> None:
    stop = threading.Event()
    beside = SideWork(in_turn=True)
    executor = beside.threads("test", 1)
    failing = executor.submit(lambda: 1 / 0)
    first, never = executor.submit(stop.wait), executor.submit(stop.wait)
    with pytest.raises(ZeroDivisionError):
        failing.result()
    assert never.cancel()
    stop.set()
    first.result()
    executor.shutdown()
    assert not beside._unfinished


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    FaiM2FForUniversalSegmentation(small_config()).save_pretrained(path)
    FaiM2FImageProcessor(size={"height": 64, "width": 64}).save_pretrained(path)
    return path


@pytest.mark.parametrize("threads, cores, in_turn", [(1, 1, False), (1, 2, False), (2, 2, True), (2, 16, False)])
def test_few_cores_are_taken_in_turn(
    folder: Path, threads: int, cores: int, in_turn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert Predictor.from_pretrained(str(folder)).beside.in_turn is in_turn
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("in_turn", [True, False])
def test_predictions_are_the_same_either_way(folder: Path, in_turn: bool) -> None:
    images = [Image.effect_noise((50 + 7 * place, 60), 80).convert("RGB") for place in range(7)]
    predictor = Predictor.from_pretrained(str(folder))
    alone = [predictor(image, "semantic")[0].label_map for image in images]
    predictor.beside = SideWork(in_turn)
    unfinished: list[int] = []
    own = predictor.network.run

    def run(values: torch.Tensor) -> dict[str, torch.Tensor]:
        unfinished.append(len(predictor.beside._copy()))
        return own(values)

    predictor.network.run = run
    slow = predictor._answer

    def answer(*arguments: Any) -> Any:
        compute_for(0.05)
        return slow(*arguments)

    with mock.patch.object(predictor, "_answer", answer), mock.patch.object(side_threads, "LEAST_SHARE", 0.0):
        together = predictor(images, "semantic")
    assert all(torch.equal(a, b.label_map) for a, b in zip(alone, together, strict=True))
    assert len(unfinished) == 7
    assert (max(unfinished) == 0) is in_turn

"""A worker's process: what it says reaches its parent whole, it takes orders in turn, and ends when it should."""

from __future__ import annotations

import json
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from harness import Event, Order, WarmParent, WorkerProcess
from harness.steps.child import Channel
from harness.steps.children import said_of
from harness.steps.orders import error_of, failure_of
from harness.steps.warm import ForkedWorker


def test_a_handler_may_speak_while_a_line_is_written() -> None:
    reading, writing = os.pipe()
    lines: list[str] = []
    with os.fdopen(reading) as heard:
        reader = threading.Thread(target=lambda: lines.extend(heard))
        reader.start()
        channel, spoken = Channel(writing), 0

        def handler(number: int, frame: FrameType | None) -> None:
            nonlocal spoken
            spoken += 1
            channel.tell(Event(order="o", kind="note", text="from the handler"))

        before = signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
        try:
            # Until the handler has come in between often enough; a buffered file fails within a few.
            said = 0
            while spoken < 200:
                channel.tell(Event(order="o", kind="bar", bar=0, more=said))
                said += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        os.close(writing)
        reader.join()
    found = [Event.model_validate(json.loads(line)) for line in lines]
    assert [one.more for one in found if one.kind == "bar"] == list(range(said))
    assert sum(one.kind == "note" for one in found) == spoken


def order(name: str, folder: Path, **spec: object) -> Order:
    spec = {"seconds": 20, **spec}
    return Order(id=name, worker="harness.testing.order_worker", run=str(folder), spec=spec)


def ended(said: queue.SimpleQueue[Event]) -> Event:
    while (event := said.get(timeout=30)).kind != "ended":
        pass
    return event


@pytest.fixture(params=["a Python of its own", "forked"])
def start(request: pytest.FixtureRequest) -> Iterator[Callable[..., WorkerProcess]]:
    """Start a worker, which both ways must be the same."""
    warm = WarmParent() if request.param == "forked" else None

    def one(*arguments: Any, **more: Any) -> WorkerProcess:
        worker = WorkerProcess(*arguments, warm=warm, **more)
        assert isinstance(worker._child, ForkedWorker) is (warm is not None)
        return worker

    yield one
    if warm is not None:
        warm.close()


Start = Callable[..., WorkerProcess]


def test_it_takes_orders_in_turn_and_a_signal_stops_the_one_in_hand(tmp_path: Path, start: Start) -> None:
    said: queue.SimpleQueue[Event] = queue.SimpleQueue()
    worker = start(said.put)
    worker.submit(order("one", tmp_path))
    assert (one := ended(said)).outcome == "done"
    worker.submit(order("two", tmp_path, does="raises"))
    two = ended(said)
    assert two.failure is not None and two.failure.kind == "bug"
    assert two.failure.text.endswith("RuntimeError: fails on purpose\n")
    assert one.result["process"] == [os.uname().nodename, worker.pid] and worker.alive and not worker.busy
    worker.submit(order("three", tmp_path, does="waits"))
    while said.get(timeout=30).text != "three: third":
        pass
    worker.signal(signal.SIGUSR1)
    three = ended(said)
    assert (three.outcome, three.signal) == ("stopped", signal.SIGUSR1)
    assert worker.wait(10) == 0 and not worker.alive
    # One that is gone crashes what it is given, and is not waited for.
    worker.submit(order("four", tmp_path))
    assert (ended(said).outcome, worker.busy) == ("crashed", False)
    worker.close()


def test_a_crash_says_how(tmp_path: Path, start: Start) -> None:
    said: queue.SimpleQueue[Event] = queue.SimpleQueue()
    worker = start(said.put)
    worker.submit(order("one", tmp_path, does="crashes"))
    assert ((one := ended(said)).outcome, one.code) == ("crashed", 7)
    worker.close()
    worker = start(said.put)
    worker.submit(order("two", tmp_path, does="waits"))
    while said.get(timeout=30).text != "two: third":
        pass
    os.kill(worker.pid, signal.SIGKILL)
    assert ((two := ended(said)).outcome, two.code) == ("crashed", -9)
    worker.close()


def test_closing_it_lets_it_save_and_then_ends_what_it_started(tmp_path: Path, start: Start) -> None:
    said: queue.SimpleQueue[Event] = queue.SimpleQueue()
    worker = start(said.put)
    worker.submit(order("one", tmp_path, does="waits"))
    while said.get(timeout=30).text != "one: third":
        pass
    worker.close(grace=20)
    assert ended(said).outcome == "stopped"


def test_what_can_be_imported_here_can_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Start) -> None:
    """And a file of the working folder stands in for no module."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "my_worker.py").write_text(
        "import os, subprocess, sys\n"
        "def carry_out(order, context):\n"
        "    print('noise'); os.write(1, b'more noise'); subprocess.run(['echo', 'noise'])\n"
        "    return {'folder': os.getcwd(), 'argument': order.spec['text']}\n"
    )
    (tmp_path / "json.py").write_text("raise SystemExit('not this one')")
    monkeypatch.syspath_prepend(str(tmp_path / "own"))
    monkeypatch.chdir(tmp_path)
    said: queue.SimpleQueue[Event] = queue.SimpleQueue()
    with (tmp_path / "noise").open("w+") as noise:
        worker = start(said.put, stderr=noise)
        text = "a\nb \u2028 ü " + "long " * 50_000
        worker.submit(Order(id="mine", worker="my_worker", folder=str(tmp_path / "own"), spec={"text": text}))
        assert ended(said).result == {"folder": str(tmp_path / "own"), "argument": text}
        worker.close()
        noise.seek(0)
        assert noise.read().count("noise") == 3


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (OSError(28, "No space left on device", "x.json"), "x.json: the disk is full (No space left on device)"),
        (MemoryError("of 3 GiB"), "of 3 GiB"),
    ],
)
def test_errors_come_back_as_what_they_were(error: Exception, again: str) -> None:
    assert str(error_of(failure_of(error))).startswith(again)


def test_an_exit_code_in_words() -> None:
    assert said_of(-9) == "was killed by SIGKILL, as when memory runs out"
    assert said_of(-11) == "was killed by SIGSEGV"
    assert said_of(3) == "ended with code 3 and said nothing"
    assert said_of(None) == "ended and said nothing"

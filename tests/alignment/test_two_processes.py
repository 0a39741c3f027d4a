"""One alignment in two processes (gloo, CPU): the rows and the effective batch of one, and its adapter to 1e-5."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import Event, Failure, align
from harness.alignment.checks import check_processes
from harness.alignment.ranks import Children, train_apart
from harness.core.errors import Requeue, StepError, UserError
from harness.core.progress import Reporter
from harness.steps.journal import read_rows
from tests.alignment.rows import events, short, write_pairs

WAIT = 120.0
"""Longest wait for a process to get somewhere (seconds)."""


def options(**more: Any) -> dict[str, Any]:
    """Without dropout, of which every process has its own."""
    return short(**{"learning_rate": 1e-3, "steps": 12, "adapter": {"dropout": 0.0}, **more})


def assert_same(one: Path, two: Path) -> None:
    """The same rows in each step, and adapters that differ by rounding alone."""
    from safetensors.torch import load_file

    batches = [read_rows(folder / "step" / "batches.jsonl.gz") for folder in (one, two)]
    assert batches[0] == batches[1] and len(batches[0][0]["rows"]) == 4
    mine, its = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    assert mine.keys() == its.keys()
    moved = [name for name in mine if "lora_B" in name and mine[name].abs().max() > 1e-3]
    assert moved, "nothing was learnt: the comparison would say nothing"
    for name, tensor in mine.items():
        assert (tensor - its[name]).abs().max() <= 1e-5, name
    steps = [[line["step"] for line in events(folder, "train") if "loss" in line] for folder in (one, two)]
    # The first process alone logs; after a kill the steps behind the last checkpoint are logged again.
    assert steps[0] == list(range(1, 13)) and sorted(set(steps[1])) == steps[0]


@pytest.fixture(autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every child imports torch and trl: where bytecode is not kept, compiling them costs ten times the training."""
    if not sys.dont_write_bytecode:
        return
    folder = tmp_path_factory.getbasetemp() / "bytecode"
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(folder))
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)


@pytest.fixture(scope="module")
def until() -> Iterator[Callable[[Callable[[], bool]], None]]:
    def wait(reached: Callable[[], bool]) -> None:
        end = time.monotonic() + WAIT
        while not reached():
            assert time.monotonic() < end
            time.sleep(0.02)

    yield wait


def running(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_killed_with_the_parent_it_goes_on_and_ends_as_one_process_does(
    tiny: Path, alone: Path, until: Callable[[Callable[[], bool]], None]
) -> None:
    pairs, out = write_pairs(alone), alone / "two"
    recipe = options(checkpoint_every=2)
    one = align("dpo", str(tiny), pairs, out=alone / "one", options=recipe)
    script = (
        "import sys, json; from harness import align\n"
        "align('dpo', sys.argv[1], sys.argv[2], out=sys.argv[3], processes=2, options=json.loads(sys.argv[4]))"
    )
    arguments = [sys.executable, "-c", script, str(tiny), pairs, str(out), json.dumps(recipe)]
    parent = subprocess.Popen(arguments, cwd=alone, env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = out / "step" / "log.jsonl"
    until(lambda: parent.poll() is not None or (log.exists() and '"step": 3' in log.read_text()))
    children = [int(pid) for pid in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()]
    assert len(children) == 2
    parent.kill()
    parent.wait()
    until(lambda: not any(running(pid) for pid in children))
    assert not (out / "step" / "status.json").exists()
    again = align("dpo", str(tiny), pairs, out=out, processes=2, options=recipe)
    assert events(out, "resumed")
    assert_same(one.folder, again.folder)
    engine = json.loads((out / "step" / "provenance.json").read_text())["engine"]
    assert (engine["processes"], engine["micro_batch_size"], engine["accumulation"]) == (2, 2, 1)
    assert again.heldout["eval_loss"] == pytest.approx(one.heldout["eval_loss"], abs=1e-5)
    rows = [read_rows(made.folder / "step" / "heldout.jsonl.gz") for made in (one, again)]
    assert [row["id"] for row in rows[0]] == [row["id"] for row in rows[1]]


@pytest.mark.slow
def test_a_signal_stops_both_after_one_step_and_the_same_call_goes_on(tiny: Path, alone: Path) -> None:
    """SFT weighs every token of an optimiser step alike, wherever it was: uneven rows must not show."""

    class Stopper(Reporter):
        def start(self, title: str, total: int, done: int = 0) -> Callable[[int], None]:
            asked = threading.Event()

            def advance(items: int) -> None:
                if title.startswith("sft") and not asked.is_set():
                    asked.set()
                    os.kill(os.getpid(), signal.SIGTERM)

            return advance

    pairs, recipe = write_pairs(alone), options(checkpoint_every=100, micro_batch_size=1)
    one = align("sft", str(tiny), pairs, out=alone / "one", options=recipe)
    two: dict[str, Any] = {"out": alone / "two", "processes": 2, "options": recipe}
    with pytest.raises(Requeue):
        align("sft", str(tiny), pairs, reporter=Stopper(), **two)
    (checkpoint,) = (alone / "two" / "step" / "checkpoints").glob("checkpoint-*")
    names = {path.name for path in checkpoint.iterdir()}
    assert {"complete.json", "rng_state_0.pth", "rng_state_1.pth"} <= names
    assert_same(one.folder, align("sft", str(tiny), pairs, **two).folder)


def test_a_loss_that_is_no_number_is_told_once_and_leaves_no_process(tiny: Path, alone: Path) -> None:
    before = set(children_of_this())
    with pytest.raises(StepError) as caught:
        align("sft", str(tiny), write_pairs(alone), out=alone / "o", processes=2, options=options(learning_rate=1e25))
    assert "the loss is" in str(caught.value) and "pairs.jsonl" in str(caught.value)
    assert set(children_of_this()) == before


def children_of_this() -> list[int]:
    """Processes that this one has started and that run."""
    pids = [int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]
    return [pid for pid in pids if running(pid)]


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    check_processes(4, 16)
    with pytest.raises(UserError) as caught:
        check_processes(3, 16)
    assert str(caught.value) == (
        "--processes 3: cannot share batch_size 16 evenly\n  Numbers that can: 1, 2, 4, 8, 16."
    )


def failed(kind: str, *parts: str, text: str = "") -> Event:
    failure = Failure.model_validate({"kind": kind, "parts": parts, "text": text})
    return Event(order="rank 0", kind="ended", outcome="failed", failure=failure)


KILLED = Event(order="rank 1", kind="ended", outcome="crashed", code=-9)


@pytest.mark.parametrize(
    ("endings", "raised", "text"),
    [
        # A peer of the process that failed reports a broken connection, perhaps first.
        ([failed("bug", text="peer closed"), failed("step", "s", "nan", ""), KILLED], StepError, "s: nan"),
        ([failed("bug", text="x"), failed("user", "a", "b", "c")], UserError, "a: b\n  c"),
        ([failed("memory", text="of 1 GiB"), KILLED], MemoryError, "of 1 GiB"),
        ([failed("bug", text="why"), KILLED], RuntimeError, "one of 2 processes failed:\nwhy"),
        (
            [KILLED, KILLED],
            RuntimeError,
            "one of 2 processes failed:\na process was killed by SIGKILL, as when memory runs out",
        ),
    ],
)
def test_the_cause_is_told_not_its_consequence(
    monkeypatch: pytest.MonkeyPatch, endings: list[Event], raised: type[Exception], text: str
) -> None:
    class Ended(Children):
        def __init__(self, *_: Any) -> None:
            self.endings = endings

        def wait(self) -> None: ...

        def kill(self) -> None: ...

    monkeypatch.setattr("harness.alignment.ranks.Children", Ended)
    with pytest.raises(raised) as caught:
        train_apart({}, 2, Reporter(), lambda children: None)
    assert str(caught.value) == text


def test_out_of_memory_goes_back_to_the_parent(monkeypatch: pytest.MonkeyPatch, tiny: Path, alone: Path) -> None:
    """The parent halves the micro batch and starts them again."""
    asked = list[int]()

    def ended(payload: dict[str, Any], *_: Any) -> Event | None:
        asked.append(payload["micro"])
        raise MemoryError("out of memory: 1 GiB")

    monkeypatch.setattr("harness.alignment.stage.train_apart", ended)
    with pytest.raises(StepError, match="out of memory with one row at a time: out of memory: 1 GiB"):
        recipe = options(batch_size=16, micro_batch_size=8)
        align("sft", str(tiny), write_pairs(alone), out=alone / "o", processes=2, options=recipe)
    assert asked == [8, 4, 2, 1]

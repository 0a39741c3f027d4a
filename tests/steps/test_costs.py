"""What steps took: shares of time, memory, killed attempts, and records that do not add up."""

from __future__ import annotations

import json
import mmap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.core.costs import Costs, JudgeCosts
from harness.core.progress import Reporter
from harness.core.records import StepRecord
from harness.steps import costs
from harness.steps.files import read_json
from harness.steps.folder import StepFolder
from harness.steps.runner import Ended, Runner
from harness.steps.step import Step, make_step


class Clock:
    """A clock that a test moves."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    time = monotonic


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(costs, "time", clock)
    return clock


def steps(root: Path, *names: str) -> list[tuple[Step, StepFolder]]:
    made = [make_step("made", {"name": name}, arm=name) for name in names]
    return [(step, StepFolder(root / step.arm, step.id, "made", root / step.arm / "artifact")) for step in made]


def test_steps_under_way_together_share_the_time(tmp_path: Path, clock: Clock) -> None:
    runner = Runner(None, Reporter())
    (a, at), (b, bt) = steps(tmp_path, "a", "b")
    runner.begin(a, at)
    clock.now += 10  # a alone: 10
    runner.begin(b, bt)
    clock.now += 6  # both: 3 each
    first = runner.finish(a, at, Ended("rows", "0"))
    clock.now += 4  # b alone: 4
    second = runner.finish(b, bt, Ended("rows", "0"))
    assert first.costs is not None and second.costs is not None
    # What the steps count themselves is nothing here, and is believed of steps that were carried out together.
    assert (first.costs.seconds, second.costs.seconds) == (0.0, 0.0)
    runner.begin(a, at)
    clock.now += 10
    runner.begin(b, bt)
    clock.now += 6
    runner.fail(a, at, ValueError("no"))
    clock.now += 4
    runner.fail(b, bt, ValueError("no"))
    took = [read_json(folder.path / "status.json")["costs"]["seconds"] for folder in (at, bt)]
    assert took == [10 + 3, 3 + 4]


def test_a_step_alone_takes_all_the_time_and_its_own_count_if_that_is_more(tmp_path: Path, clock: Clock) -> None:
    runner = Runner(None, Reporter())
    ((a, at),) = steps(tmp_path, "a")
    runner.begin(a, at)
    clock.now += 5
    assert runner.finish(a, at, Ended("rows", "0", seconds={"train": 2.0})).costs.seconds == 5  # type: ignore[union-attr]
    runner.begin(a, at)
    clock.now += 5
    ended = Ended("rows", "0", seconds={"prepare": 4.0, "train": 5.0})
    assert runner.finish(a, at, ended).costs.seconds == 9  # type: ignore[union-attr]


def test_what_a_killed_attempt_took_is_known_from_its_heartbeat(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    ((a, at),) = steps(tmp_path, "a")
    killed = Runner(None, Reporter())
    killed.begin(a, at)
    clock.now += 7
    with pytest.raises(KeyboardInterrupt), killed.recorded(a, at):
        raise KeyboardInterrupt
    assert costs.read_heartbeat(at.path)["seconds"] == 7  # type: ignore[index]
    monkeypatch.setattr(costs, "gpu_names", lambda: ("A100",))
    again = Runner(None, Reporter())
    again.begin(a, at)
    again.spent(at, devices=2, trained_tokens=30)
    clock.now += 4
    took = again.finish(a, at, Ended("rows", "0")).costs
    assert took is not None
    assert (took.seconds, took.earlier_seconds, took.devices, took.device) == (4, 7, 2, "A100")
    assert took.gpu_seconds == 2 * (4 + 7)
    assert took.trained_tokens == 30
    assert not (at.path / costs.HEARTBEAT).exists()


def test_a_failed_attempt_counts_too_and_a_torn_heartbeat_for_nothing(tmp_path: Path, clock: Clock) -> None:
    ((a, at),) = steps(tmp_path, "a")
    runner = Runner(None, Reporter())
    for earlier in (0, 3):
        runner.begin(a, at)
        clock.now += 3
        runner.fail(a, at, ValueError("no"))
        assert read_json(at.path / "status.json")["costs"]["earlier_seconds"] == earlier
    beat = at.path / costs.HEARTBEAT
    beat.write_bytes(beat.read_bytes()[:-20])
    runner.begin(a, at)
    assert runner.finish(a, at, Ended("rows", "0")).costs.earlier_seconds == 0  # type: ignore[union-attr]


def test_a_heartbeat_says_how_far_the_newest_bar_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "HEARTBEAT_SECONDS", 0.02)
    ((a, at),) = steps(tmp_path, "a")
    runner = Runner(None, Reporter())
    runner.begin(a, at)
    advance = runner.reporter.start("rows", 8)
    advance(2)
    found: dict[str, Any] | None = None
    end = time.monotonic() + 10
    while (found is None or found.get("done") != 2) and time.monotonic() < end:
        time.sleep(0.01)
        found = costs.read_heartbeat(at.path)
    assert found is not None
    assert (found["done"], found["total"]) == (2, 8)
    # Another attempt has begun: this one's heart is heard no more.
    at_other = StepFolder(at.path, at.id, at.kind, at.artifact)
    at_other.begin(a, {}, {})
    (at.path / costs.HEARTBEAT).unlink()
    time.sleep(0.1)
    assert not (at.path / costs.HEARTBEAT).exists()


def test_peaks_are_those_of_the_step(tmp_path: Path) -> None:
    (a, at), (b, bt) = steps(tmp_path, "a", "b")
    runner = Runner(None, Reporter())
    took = []
    for step, folder, size in ((a, at, 200_000_000), (b, bt, 1)):
        runner.begin(step, folder)
        # Not from the allocator, which may keep what it gets.
        with mmap.mmap(-1, size) as held:
            for place in range(0, size, 4096):
                held[place] = 1
        (folder.artifact / "file").write_bytes(b"12345")
        took.append(runner.finish(step, folder, Ended("rows", "0")).costs)
    big, small = took
    assert big is not None and small is not None
    assert big.disk_bytes == small.disk_bytes == 5
    assert big.devices == 0 and big.gpu_seconds == 0 and big.device_bytes is None
    if big.rss_of == "step":
        assert big.rss_bytes - small.rss_bytes > 150_000_000  # type: ignore[operator]


def test_torch_is_asked_where_it_uses_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two of three GPUs are used: the second most. Reserved and allocated, in bytes.
    peaks = [(400, 300), (0, 0), (900, 100)]
    monkeypatch.setattr(costs, "_peaks_of_devices", lambda: peaks)
    monkeypatch.setattr(costs, "gpu_names", lambda: ("H100", "H100", "H100"))
    ((a, at),) = steps(tmp_path, "a")
    runner = Runner(None, Reporter())
    runner.begin(a, at)
    took = runner.finish(a, at, Ended("rows", "0", seconds={"x": 100.0})).costs
    assert took is not None
    assert (took.devices, took.device_bytes, took.device_allocated_bytes) == (2, 900, 300)
    assert took.device == "H100"
    assert took.gpu_seconds == pytest.approx(200, abs=1)


def test_nothing_is_imported_or_woken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asleep = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: False))
    monkeypatch.setitem(costs.sys.modules, "torch", asleep)  # type: ignore[arg-type]
    assert costs._peaks_of_devices() == []
    monkeypatch.delitem(costs.sys.modules, "torch")
    assert costs._peaks_of_devices() == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"seconds": float("nan")}, "finite"),
        ({"seconds": -1.0}, "greater than or equal to 0"),
        ({"devices": 2, "gpu_seconds": 5.0}, "gpu_seconds is 5, and devices x seconds 6"),
        ({"judge": {"usd": float("inf")}}, "finite"),
    ],
)
def test_costs_that_cannot_be_are_no_costs(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Costs.model_validate({"seconds": 3.0, **wrong})


def test_records_of_earlier_versions_are_read() -> None:
    old = json.loads('{"id": "1", "kind": "align", "status": "done", "seconds": {"train": 2.0}}')
    assert StepRecord.model_validate(old).costs is None


def test_bills_add_up_and_what_has_no_price_has_none() -> None:
    one, two = JudgeCosts(calls=2, prompt_tokens=30, reply_tokens=4, usd=0.5), JudgeCosts(calls=1, usd=0.25)
    assert one + two == JudgeCosts(calls=3, prompt_tokens=30, reply_tokens=4, usd=0.75)
    assert (one + JudgeCosts(usd=None)).usd is None

"""What a display says of speed and of the time left. The clock is set by hand."""

from __future__ import annotations

import pytest

from harness.core import progress
from harness.core.progress import Bar, PlainReporter, RichReporter, stored


class Clock:
    """Stands still until it is moved (seconds)."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress.time, "monotonic", made.monotonic)
    return made


def test_what_was_stored_before_is_no_part_of_the_speed(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """60 of 100 were there after 50 s of loading; 10 more took 10 s, so the last 30 will take 30."""
    advance = PlainReporter().start("bbh", 100)
    clock.now = 50.0
    stored(advance, 60)
    clock.now = 60.0
    advance(10)
    clock.now = 90.0
    advance(30)
    assert capsys.readouterr().err.splitlines() == [
        "bbh: 0/100",
        "bbh: 60/100, stored before",
        "bbh: 70/100, 1.0 items/s, 30 s left",
        "bbh: 100/100, 1.0 items/s",
    ]


def test_a_bar_does_not_take_what_was_stored_for_speed(clock: Clock) -> None:
    with RichReporter() as reporter:
        advance = reporter.start("bbh", 100)
        clock.now = 50.0
        stored(advance, 60)
        assert isinstance(reporter, RichReporter)
        (task,) = reporter._progress.tasks
        assert (task.completed, task.speed) == (60, None)
        clock.now = 60.0
        advance(10)
        assert (task.completed, task.fields["rate"]) == (70, "1.0 items/s")


def test_a_bar_ends_full_whatever_was_told() -> None:
    told: list[int] = []
    bar = Bar(told.append, 10)
    # A plain function has no other way of counting what was stored.
    bar.stored(4)
    bar.advance(5)
    bar.advance(3)
    bar.fill()
    assert told == [4, 5, 1]

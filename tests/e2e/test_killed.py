"""Nothing lost: killed at any moment, the same command ends with the scores of an uninterrupted run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.steps import files
from harness.steps.journal import Journal, read_rows
from harness.testing import tiny_adapter

BATCH = 4  # of slow_engine.py
N = 30
Left = tuple[bytes, list[dict[str, Any]]]


def what_is_left(out: Path) -> Left:
    """scores.json's bytes, and the rows of the answers."""
    (scores,) = out.glob("steps/scores-*/artifact/scores.json")
    (answers,) = out.glob("steps/answers-*/artifact/answers.jsonl.gz")
    return scores.read_bytes(), sorted(read_rows(answers), key=lambda row: (row["item"], row["index"]))


def count(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines()) if file.exists() else 0


def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "harness.cli.app", *arguments]
    return subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended early: {process.communicate()}"
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.002)


@pytest.fixture
def reference(cli: Any, slow_eval: list[str], alone: Path) -> Left:
    ran = cli(*slow_eval, "--out", "reference")
    assert ran.code == 0, ran.err
    return what_is_left(alone / "reference")


def test_sigkill_again_and_again(
    cli: Any, slow_eval: list[str], alone: Path, reference: Left, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, out = alone / "calls", alone / "killed"
    command = [*slow_eval, "--out", str(out)]
    kills = (1, 9, 17, 26)
    for asked in kills:
        process = start(command, SLOW_CALLS=str(calls), SLOW_DELAY="0.15")
        wait_for(lambda asked=asked: count(calls) >= asked, process)
        process.kill()
        process.communicate()
        assert not list(out.glob("steps/*/status.json"))
    monkeypatch.setenv("SLOW_CALLS", str(calls))
    ran = cli(*command)
    assert ran.code == 0
    assert "answers were stored before" in ran.err
    assert what_is_left(out) == reference
    assert count(calls) <= N + len(kills) * BATCH


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)])
def test_signals_that_ask_to_stop(
    cli: Any, slow_eval: list[str], alone: Path, reference: Left, number: int, code: int
) -> None:
    calls, out = alone / "calls", alone / "stopped"
    command = [*slow_eval, "--out", str(out)]
    process = start(command, SLOW_CALLS=str(calls), SLOW_DELAY="0.3")
    wait_for(lambda: count(calls) > BATCH, process)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert "what is done is kept; run the same command again" in said
    assert "Traceback" not in said
    assert cli(*command).code == 0
    assert what_is_left(out) == reference


def test_two_processes_on_one_folder(cli: Any, slow_eval: list[str], alone: Path, reference: Left) -> None:
    calls, out = alone / "calls", alone / "shared"
    command = [*slow_eval, "--out", str(out)]
    first = start(command, SLOW_CALLS=str(calls), SLOW_DELAY="0.15")
    wait_for(lambda: count(calls) > 0, first)
    second = cli(*command)
    assert second.code == 2
    assert second.err == (
        f"error: --out {out}: another harness process (pid {first.pid}) is writing to this folder\n"
        "  Wait for it to end, stop it, or give another --out.\n"
    )
    first.communicate(timeout=60)
    assert first.returncode == 0
    assert what_is_left(out) == reference


def die_at(step: int) -> None:
    """End this process, as SIGKILL would, at its ``step``-th durable write: before, after or in the middle of it."""
    writes = 0
    replace, append = os.replace, Journal.append

    def next_moment(halfway: Callable[[], None]) -> None:
        nonlocal writes
        for act in (lambda: None, halfway):
            if writes == step:
                act()
                os._exit(9)
            writes += 1

    def replaced(source: Any, target: Any) -> None:
        next_moment(lambda: replace(source, target))
        replace(source, target)

    def appended(journal: Journal, rows: Any) -> None:
        def half() -> None:
            append(journal, rows)
            whole = journal.path.read_bytes()
            start_of_member = whole.rfind(journal._MEMBER)
            os.truncate(journal.path, start_of_member + (len(whole) - start_of_member) // 2)

        next_moment(half)
        append(journal, rows)

    files.os.replace = replaced  # type: ignore[assignment]
    Journal.append = appended  # type: ignore[method-assign]


def test_killed_at_every_single_write(
    cli: Any, slow_eval: list[str], alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, limit = alone / "calls", 6  # two batches
    slow_eval = [*slow_eval, "--limit", str(limit)]
    assert cli(*slow_eval, "--out", "whole").code == 0
    reference = what_is_left(alone / "whole")
    monkeypatch.setenv("SLOW_CALLS", str(calls))
    deaths = 0
    for step in range(200):
        calls.unlink(missing_ok=True)
        command = [*slow_eval, "--out", str(alone / f"at-{step}")]
        child = os.fork()
        if child == 0:
            try:
                die_at(step)
                cli(*command)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) == 0:
            break
        deaths += 1
        ran = cli(*command)
        assert ran.code == 0, (step, ran.err)
        assert what_is_left(alone / f"at-{step}") == reference, step
        assert count(calls) <= limit + BATCH, step
    # Two batches and at least ten files, two moments each.
    assert deaths >= 2 * (2 + 10)


def test_killed_with_a_real_model(cli: Any, tiny: Path, sums: Path, alone: Path) -> None:
    """The transformers engine in fp32: answers and scores are byte-identical, resumed or not."""
    command = ["eval", "--model", str(tiny), "--tasks", str(sums), "--task", "sums", "--engine", "transformers"]
    command += ["--set", "engine.batch_size=2", "--set", "sums.decoding.max_new_tokens=64"]
    out = alone / "killed"
    process = start([*command, "--out", str(out)])

    def some_answers() -> bool:
        return any(len(file.read_bytes()) for file in out.glob("steps/answers-*/artifact/answers.jsonl.gz"))

    wait_for(some_answers, process, 240)
    process.kill()
    process.communicate()
    assert not list(out.glob("steps/*/status.json"))
    ran = cli(*command, "--out", str(out))
    assert ran.code == 0, ran.err
    assert "answers were stored before" in ran.err
    assert cli(*command, "--out", "whole").code == 0
    assert what_is_left(out) == what_is_left(alone / "whole")
    answers = [next(root.glob("steps/answers-*/artifact/answers.jsonl.gz")) for root in (out, alone / "whole")]
    assert answers[0].read_bytes() == answers[1].read_bytes()


def test_killed_with_several_arms(cli: Any, tiny: Path, sums: Path, alone: Path) -> None:
    """Base and two adapters on one engine: killed in the middle and run again, every arm ends with the same bytes."""
    for seed, name in enumerate(("one", "two"), start=1):
        tiny_adapter(alone / "adapters" / name, tiny, seed=seed)
    command = ["eval", "--model", str(tiny), "--adapter", str(alone / "adapters"), "--tasks", str(sums)]
    command += ["--task", "sums", "--engine", "transformers", "--set", "engine.batch_size=2"]
    command += ["--set", "sums.decoding.max_new_tokens=64"]
    out = alone / "killed"
    process = start([*command, "--out", str(out)])

    def in_the_second_arm() -> bool:
        return any(file.stat().st_size for file in out.glob("steps/answers-tiny+one-*/artifact/answers.jsonl.gz"))

    wait_for(in_the_second_arm, process, 240)
    process.kill()
    process.communicate()
    assert not list(out.glob("steps/*/status.json"))
    (out / ".folded").mkdir()  # what a killed fold leaves behind
    ran = cli(*command, "--out", str(out))
    assert ran.code == 0, ran.err
    assert "tiny, sums: 30 of 30 answers were stored before" in ran.err
    assert not (out / ".folded").exists()
    assert cli(*command, "--out", "whole").code == 0
    made = [
        {str(file.relative_to(root)): file.read_bytes() for file in root.glob("steps/*/artifact/*")}
        for root in (out, alone / "whole")
    ]
    # Answers, scores and samples of three arms.
    assert made[0] == made[1] and len(made[0]) == 9

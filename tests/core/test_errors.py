"""Errors carry their parts, their text and their exit code."""

from __future__ import annotations

import pytest

from harness.core.errors import CorruptionError, ExitCode, HarnessError, StepError, UserError


def test_the_exit_codes_are_those_that_the_documentation_promises() -> None:
    promised = {"DONE": 0, "BUG": 1, "USER": 2, "STEPS_FAILED": 3, "REGRESSION": 4, "REQUEUE": 75, "INTERRUPTED": 130}
    assert {code.name: code.value for code in ExitCode} == promised


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (
            UserError("--limit", "0 is no number of samples", "Give 1 or more."),
            2,
            "--limit: 0 is no number of samples\n  Give 1 or more.",
        ),
        (StepError("answers-mmlu", "the engine died"), 3, "answers-mmlu: the engine died"),
        (
            StepError("answers-mmlu", "the engine died", "Run it again."),
            3,
            "answers-mmlu: the engine died\n  Run it again.",
        ),
        (CorruptionError("plan.json: damaged"), 2, "plan.json: damaged"),
        (HarnessError("a fault of ours"), 1, "a fault of ours"),
    ],
)
def test_text_and_exit_code(error: HarnessError, code: int, text: str) -> None:
    assert (int(error.exit_code), str(error)) == (code, text)
    assert isinstance(error, HarnessError)


def test_the_parts_of_a_user_error_can_be_read_apart() -> None:
    error = UserError("a.yaml:3, limit", "found 0", "Give 1 or more.")
    assert (error.where, error.what, error.fix) == ("a.yaml:3, limit", "found 0", "Give 1 or more.")


@pytest.mark.parametrize(
    "error",
    [
        UserError("\x1b[31ma.yaml", "\x9b2J", "\u202eb"),
        StepError("\x1b[31ma", "\x9b2J", "\u202e"),
        CorruptionError("\x1b[31m \x9b \u202e"),
    ],
)
def test_what_steers_a_terminal_is_made_visible(error: HarnessError) -> None:
    text = str(error)
    assert not {"\x1b", "\x9b", "\u202e"} & set(text)
    assert [mark in text for mark in ("⟨U+001B⟩", "⟨U+009B⟩", "⟨U+202E⟩")] == [True] * 3

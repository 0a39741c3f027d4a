"""Errors with an address, a cause and a remedy; and the exit codes that go with them.

Every error a user can provoke has three parts: where (file:line, key or option), what (the value seen) and what to do
(nearest name, allowed values, or the command).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum

from harness.core.text import visible


class ExitCode(IntEnum):
    """Exit codes of the command line."""

    DONE = 0
    BUG = 1
    USER = 2
    STEPS_FAILED = 3
    REGRESSION = 4
    REQUEUE = 75
    INTERRUPTED = 130


class HarnessError(Exception):
    """Base class; ``exit_code`` is what the command line returns when one escapes."""

    exit_code: ExitCode = ExitCode.BUG

    def __str__(self) -> str:
        """The message; names in it come from anybody's files, so that nothing in it can steer a terminal."""
        return visible(super().__str__(), lines=True)


class UserError(HarnessError):
    """A mistake that the user can mend: one message, no traceback, exit code 2.

    Args:
        where: file:line, key or option the message is about.
        what: what is wrong, with the value seen.
        fix: what to do about it.
    """

    exit_code = ExitCode.USER

    def __init__(self, where: str, what: str, fix: str) -> None:
        self.where, self.what, self.fix = where, what, fix
        super().__init__(f"{where}: {what}\n  {fix}")


class StepError(HarnessError):
    """A step of the run failed for a reason that other steps need not share."""

    exit_code = ExitCode.STEPS_FAILED

    def __init__(self, step: str, what: str, fix: str = "") -> None:
        self.step, self.what, self.fix = step, what, fix
        super().__init__(f"{step}: {what}" + (f"\n  {fix}" if fix else ""))


class CorruptionError(HarnessError):
    """A stored file does not hold what was written to it; the message says how it is made again."""

    exit_code = ExitCode.USER


class Requeue(BaseException):
    """A signal asked the process to stop so that it can be started again; what is done is saved."""


def nearest(name: str, known: Iterable[str], *, limit: int = 3) -> list[str]:
    """Return the names most like ``name``, best first (possibly none)."""
    names = sorted(set(known))
    lowered = {candidate.lower(): candidate for candidate in reversed(names)}
    close = difflib.get_close_matches(name.lower(), list(lowered), n=limit, cutoff=0.5)
    return [lowered[candidate] for candidate in close]


def unknown(where: str, kind: str, name: str, known: Iterable[str], listing: str) -> UserError:
    """The error for a name that nobody registered: suggests near names, else lists all.

    Args:
        where: option or key in which the name was given.
        kind: what the name should have been ("task", "engine", ...).
        name: the name seen.
        known: every name that would have been accepted.
        listing: the command that lists them.
    """
    names = sorted(set(known))
    close = nearest(name, names)
    if close:
        fix = f"Did you mean {' or '.join(repr(c) for c in close)}? All: `{listing}`."
    elif names:
        shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
        fix = f"Known: {shown}. All: `{listing}`."
    else:
        fix = f"None is registered. See `{listing}`."
    return UserError(where, f"unknown {kind} {name!r}", fix)

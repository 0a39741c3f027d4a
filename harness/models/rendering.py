"""Jinja templates that come from anybody: in a sandbox, and for a bounded time."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from functools import lru_cache
from types import FrameType
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from harness.core.errors import UserError

SECONDS = 2.0
"""Most processor time of one rendering (s); an honest one takes less than a thousandth of that."""
_TICK = 0.25
MOST_REPEATED = 1_000_000
"""Most characters or items that `*` makes, and most bits of a power: these are computed without a break."""


@contextlib.contextmanager
def bounded(where: str, seconds: float = SECONDS) -> Iterator[None]:
    """Interrupt a rendering once it has used so much processor time of its thread; for the main thread alone.

    Not wall-clock time: on a busy machine an honest template must not fail. Other threads' time wakes the timer too,
    so that the handler looks at its own.

    Raises:
        UserError: it took longer.
        jinja2.TemplateError: whatever else the template raised: it can do anything that an expression can, 1 / 0 say.
    """
    try:
        with _interrupted(where, seconds):
            yield
    except (jinja2.TemplateError, UserError):
        raise
    except Exception as error:
        raise jinja2.TemplateRuntimeError(f"{type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _interrupted(where: str, seconds: float) -> Iterator[None]:
    # Signals reach the main thread alone; and an inner rendering is bounded by the outer one.
    if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_VIRTUAL)[0]:
        yield
        return
    end = time.thread_time() + seconds

    def look(number: int, frame: FrameType | None) -> None:
        if time.thread_time() > end:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            fix = "Look for a loop in it; text from a stranger can hold anything."
            raise UserError(where, f"rendering took more than {seconds:g} s", fix)

    before = signal.signal(signal.SIGVTALRM, look)
    signal.setitimer(signal.ITIMER_VIRTUAL, _TICK, _TICK)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


class _Bounded(jinja2.Template):
    def render(self, *args: Any, **kwargs: Any) -> str:
        with bounded("a task's template"):
            return super().render(*args, **kwargs)


class _Sandbox(ImmutableSandboxedEnvironment):
    template_class = _Bounded
    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuse `'a' * 10**10` and `9 ** 9 ** 9`."""
        if operator == "*":
            size = max(len(one) if isinstance(one, str | list | tuple) else 0 for one in (left, right))
            times = next((one for one in (left, right) if isinstance(one, int)), 0)
            large = size * times > MOST_REPEATED
        else:
            large = isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MOST_REPEATED
        if large:
            raise jinja2.TemplateRuntimeError(f"{operator} makes more than {MOST_REPEATED:,} items or bits")
        return super().call_binop(context, operator, left, right)


@lru_cache(maxsize=16)
def refuse_bombs(template: str) -> None:
    """Refuse what a chat template computes in one step that does not end; for templates that others compile.

    No honest one raises to a power, or multiplies where it names a number beyond ``MOST_REPEATED``.

    Raises:
        jinja2.TemplateError: it does, or cannot be read.
    """
    tokens = [(kind, text) for _, kind, text in jinja2.Environment().lex(template)]
    operators = {text for kind, text in tokens if kind == "operator"}
    numbers = [text.replace("_", "") for kind, text in tokens if kind == "integer"]
    large = any(len(text) > 18 or int(text, 0) > MOST_REPEATED for text in numbers)
    if "**" in operators or ("*" in operators and large):
        raise jinja2.TemplateRuntimeError(f"it raises to a power, or multiplies by more than {MOST_REPEATED:,}")


def sandbox(undefined: type[jinja2.Undefined]) -> ImmutableSandboxedEnvironment:
    """An environment whose templates reach nothing but what they are given, and come to an end."""
    return _Sandbox(undefined=undefined, keep_trailing_newline=True)

"""One case of the fuzz: a command in a folder of its own, in this process, and what is wrong with how it ended."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

HERE = Path(__file__).parent
OURS = HERE.parents[1]
SECONDS = 20
"""Longest that a case may take."""
CANARY = "executed"
"""A file of this name in the working folder: somebody's code has run."""
EXPECTED = {0, 2, 3, 4}
"""Exit codes of a case: nothing here is interrupted or a bug."""


@dataclass
class Case:
    """A command line, and the files that stand in its working folder."""

    name: str
    arguments: list[str]
    files: dict[str, str | bytes] = field(default_factory=dict)
    prepare: Callable[[Path], None] | None = None
    """Makes what is no plain file: links, pipes, folders."""
    base: str = ""
    """The command that was mutated."""
    meant: str = ""
    """What was given another value, so that another thing must be done, or nothing: else it was ignored in silence."""


@dataclass
class Verdict:
    """How a case ended; `wrong` is empty where all is well."""

    code: int | None
    said: str
    wrong: str = ""
    kind: str = ""
    settled: str = ""
    """Ids of all that the command would have done, where it came so far."""


class Hang(BaseException):
    """The time is up. No Exception, so that nobody contains it."""


class Planned(BaseException):
    """The command is planned: what follows costs time and is no part of the fuzz."""


def run_case(case: Case, folder: Path, limit: int = SECONDS) -> Verdict:
    """Run a case in ``folder``, which is empty."""
    for name, content in case.files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))
    if case.prepare is not None:
        case.prepare(folder)
    out, settled = io.StringIO(), []
    code: int | None = None
    wrong = kind = ""
    with _working_in(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            with _stopping_at_the_plan(settled), _alarm(limit):
                code = _main(case.arguments)
        except Hang as error:
            kind, wrong = "hang", f"hang: {_place(error)}"
        except Exception as error:
            kind, wrong = "traceback", f"{type(error).__name__}: {str(error)[:120]} at {_place(error)}"
            out.write("\n" + "".join(traceback.format_exception(error))[-4000:])
    said = out.getvalue()
    if not wrong:
        kind, wrong = _wrong(code, said)
    if (folder / CANARY).exists():
        kind, wrong = "execution", "a stranger's code has run"
    return Verdict(code, said, wrong, kind, settled[-1] if settled else "")


def _main(arguments: list[str]) -> int:
    from harness.cli import app as cli

    try:
        with patch.object(sys, "argv", ["harness", *arguments]):
            cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    except Planned:
        return 0


def _wrong(code: int | None, said: str) -> tuple[str, str]:
    if code not in EXPECTED:
        return "traceback", f"exit code {code}"
    if "Traceback (most recent call last)" in said and "Its traceback" not in said:
        return "traceback", "a traceback within what is said"
    if code == 2 and not said.strip():
        return "traceback", "exit code 2 without a word"
    if "\x1b" in said or "\x9b" in said or "\u202e" in said:
        return "raw", "what is said steers the terminal"
    return "", ""


def _place(error: BaseException) -> str:
    """The innermost line of this repository: cases with the same one are one class."""
    frames = traceback.extract_tb(error.__traceback__)
    frames = [f for f in frames if ".venv" not in Path(f.filename).parts] or list(frames)
    ours = [f for f in frames if Path(f.filename).is_relative_to(OURS) and not Path(f.filename).is_relative_to(HERE)]
    frame = (ours or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}"


@contextlib.contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    settings = {"XDG_CONFIG_HOME": str(folder / "no-settings"), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    before = Path.cwd()
    with patch.dict(os.environ, settings):
        os.environ.pop("HARNESS_CONFIG", None)
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


@contextlib.contextmanager
def _alarm(seconds: int) -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise Hang

    # So much processor time, or fifteen times as long in all: beside others everything takes longer.
    real = signal.signal
    before = [real(signal.SIGALRM, ring), real(signal.SIGPROF, ring)]
    # What hangs outside of Python cannot be interrupted: the process ends, and says where.
    faulthandler.dump_traceback_later(20 * seconds, exit=True, file=sys.__stderr__)
    signal.alarm(15 * seconds)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        # The runner's own handlers of the two stay.
        own = (signal.SIGTERM, signal.SIGUSR1)
        with patch.object(signal, "signal", lambda n, handler: None if n in own else real(n, handler)):
            yield
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        real(signal.SIGALRM, before[0])
        real(signal.SIGPROF, before[1])


@contextlib.contextmanager
def _stopping_at_the_plan(settled: list[str]) -> Iterator[None]:
    """Training, merging and serving end where they begin; what they would have done is kept as a digest."""

    def planned(*found: Any, **more: Any) -> Any:
        settled.append(repr([getattr(getattr(one, "plan", one), "id", None) for one in found]))
        raise Planned

    def evaluated(plan: Any, *rest: Any, **more: Any) -> Any:
        settled.append(repr([(task.answers_id, [step.id for step in task.scores]) for task in plan.tasks]))
        if plan.engine.name == "transformers":
            raise Planned
        return run_plan(plan, *rest, **more)

    from harness.alignment import run as alignment
    from harness.evaluation import run as execute
    from harness.merging import run as merging
    from harness.serving import server as serving
    from harness.study import search

    run_plan = execute.run_plan
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(execute, "run_plan", evaluated))
        for module, name in (
            (alignment, "run_align"),
            (search, "run_study"),
            (merging, "run_merge"),
            (serving, "_start"),
        ):
            stack.enter_context(patch.object(module, name, planned))
        yield

"""Begins, contains, finishes and announces steps, the same for every kind, in one process."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.contracts.executor import Observers
from harness.core.errors import HarnessError, StepError, UserError
from harness.core.progress import Reporter
from harness.core.records import ArtifactKind, StepRecord
from harness.core.text import portable
from harness.steps.costs import Meters, Watched
from harness.steps.files import is_disk_full
from harness.steps.folder import STEP, StepFolder, SupersededError
from harness.steps.lock import FolderLock, FolderTakenError
from harness.steps.orders import announce
from harness.steps.provenance import provenance_record
from harness.steps.step import Step


@dataclass(frozen=True)
class Ended:
    """What a step came to."""

    artifact: ArtifactKind
    digest: str
    """SHA-256 of what it left, as steps that build on it see it."""
    files: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of further files of the artifact."""
    rank: int | None = None
    template: str | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Runner:
    """What becomes of the steps of one pass; the failures of those that it contains are kept."""

    def __init__(self, observers: Observers | None, reporter: Reporter) -> None:
        """``observers``: hear of every step, as a registry's do; None: nobody does."""
        self._meters = Meters()
        self.reporter, self._observers = Watched(reporter, self._meters), observers
        self.failures: dict[str, str] = {}
        """Step folder name -> why it failed."""
        self.last_error: HarnessError | None = None

    def begin(
        self,
        step: Step,
        folder: StepFolder,
        described: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        """Record what a step is and announce it.

        Args:
            step: that begins.
            folder: of its record.
            described: what else step.json holds, for reports.
            provenance: what the kind adds to versions and machine.
        """
        self._announce("step_started", step, folder)
        folder.begin(step, described or {}, provenance_record(provenance or {}))
        folder.log("begun", attempt=folder.attempt)
        self._meters.begin(folder)

    def spent(self, folder: StepFolder, **facts: Any) -> None:
        """Say of a step that is under way what it alone knows: fields of :class:`harness.core.costs.Costs`."""
        self._meters.spent(folder, **facts)

    @contextmanager
    def contained(self, step: Step, folder: StepFolder, *, mistakes: bool = False) -> Iterator[None]:
        """A step that fails is recorded and does not stop the others; a full disk does.

        ``mistakes``: a user's mistake fails the step too, instead of stopping the run.
        """
        try:
            yield
        except Exception as error:
            if is_fatal(error, mistakes=mistakes):
                raise
            self.fail(step, folder, error)

    @contextmanager
    def recorded(self, step: Step, folder: StepFolder) -> Iterator[None]:
        """A step that fails is recorded, and the error goes on: for a command that carries out this step alone."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, Exception) and not is_fatal(error):
                self.fail(step, folder, error, said=False)
            self._meters.stop(folder)
            raise

    @contextmanager
    def holding(self, folder: StepFolder) -> Iterator[bool]:
        """Hold a step's folder for this process; False, and said, where another holds it: the step is that one's."""
        lock = FolderLock(folder.path, folder.name, keep=False)
        try:
            lock.take()
        except FolderTakenError as error:
            what, fix = f"another harness process (pid {error.owner}) is at this step", "Wait for it, or stop it."
            taken = StepError(folder.name, what, f"{fix} Then the same command goes on.")
            self.last_error = taken
            self.failures[folder.name] = str(taken)
            self.reporter.note(f"skipped: {taken}")
            yield False
            return
        try:
            yield True
        finally:
            self._meters.stop(folder)
            lock.release()

    def fail(self, step: Step, folder: StepFolder, error: Exception, *, said: bool = True) -> None:
        """Record that a step failed; of an attempt that is superseded, nothing is recorded."""
        kept = error if isinstance(error, HarnessError) else StepError(folder.name, _described(error))
        kept.__cause__ = None if kept is error else error
        self.last_error = kept
        self.failures[folder.name] = str(kept)
        if said:
            self.reporter.note(f"failed: {kept}")
        if isinstance(kept, SupersededError):
            return
        if not (folder.path / STEP).exists():
            folder.begin(step, {}, provenance_record({}))
        folder.log("failed", error=portable(str(kept)))
        self._end(
            step,
            folder,
            StepRecord(
                id=step.id,
                kind=step.kind,
                arm=step.arm,
                status="failed",
                attempt=max(1, folder.attempt),
                error=portable(str(kept)),
                made_from=dict(step.made_from),
                costs=self._meters.end(folder, None, well=False),
            ),
        )

    def finish(self, step: Step, folder: StepFolder, ended: Ended) -> StepRecord:
        """Record that a step is done."""
        record = StepRecord(
            id=step.id,
            kind=step.kind,
            arm=step.arm,
            status="done",
            attempt=max(1, folder.attempt),
            artifact=ended.artifact,
            digest=ended.digest,
            files=dict(ended.files),
            rank=ended.rank,
            template=ended.template,
            made_from=dict(step.made_from),
            counts=dict(ended.counts),
            seconds={name: round(value, 3) for name, value in ended.seconds.items()},
            costs=self._meters.end(folder, sum(ended.seconds.values()), well=True),
            notes=ended.notes,
        )
        self._end(step, folder, record)
        return record

    def _end(self, step: Step, folder: StepFolder, record: StepRecord) -> None:
        folder.finish(record)
        self._announce("step_finished", step, folder, record=record)

    def _announce(self, hook: str, step: Step, folder: StepFolder, **more: Any) -> None:
        if self._observers is not None:
            info = step.info(folder.known_as or folder.path)
            announce(self._observers, self.reporter, hook, step=info, **more)


def is_fatal(error: Exception, *, mistakes: bool = False) -> bool:
    """Whether an error ends the run rather than one step of it."""
    if isinstance(error, UserError):
        return not mistakes
    return isinstance(error, OSError) and is_disk_full(error)


def _described(error: Exception) -> str:
    """Type, message and place of an exception, without folders: it goes into files that may be published."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" (at {Path(frames[-1].filename).name}:{frames[-1].lineno}, in {frames[-1].name})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"

"""The folder of a command that makes one artifact alone: whether it holds this very step, whole, or what else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness.core.errors import CorruptionError, UserError
from harness.core.progress import Reporter
from harness.core.records import StepRecord
from harness.steps.checksums import CHECKSUMS, differences, still_whole
from harness.steps.files import read_json
from harness.steps.folder import STATUS, STEP, StepFolder
from harness.steps.guard import Guard
from harness.steps.step import Step, differences_told


@dataclass(frozen=True)
class Alone:
    """One step and the folder that its command was given."""

    step: Step
    out: Path
    guard: Guard
    is_under_way: Callable[[Path], bool] = lambda out: False
    """Whether a folder holds work that can be gone on with; asked of one whose step has not ended."""

    @property
    def folder(self) -> StepFolder:
        """The record's folder, within the artifact's."""
        return StepFolder.within(self.out, self.step.id, self.step.kind)

    def done_before(self, reporter: Reporter, *, fresh: bool = False) -> StepRecord | None:
        """Return the record of a folder that holds this very step, whole; None where there is work to do.

        What came to nothing of another step is deleted.

        Raises:
            UserError: the folder is damaged, or holds anything else.
            CorruptionError: what it holds cannot be known, as its step.json is damaged.
        """
        if fresh or not self.out.is_dir() or not self.guard.is_ours(self.out):
            self.guard.refuse(self.out, fresh=fresh)
            return None
        held = self._held()
        if held is not None and held.get("id") != self.step.id:
            self._refuse_another(held)
            return None
        pages = self._whole()
        status = self.folder.status()
        if status is None or status.status != "done":
            return None
        reporter.note(f"{self.out} holds this {self.guard.word} already{pages}")
        return status

    def _held(self) -> dict[str, object] | None:
        """step.json; None where it was lost, or is damaged, and the record of all files says so."""
        try:
            return dict(read_json(self.folder.path / STEP))
        except (OSError, CorruptionError):
            if (self.out / CHECKSUMS).is_file():
                return None
            raise

    def _refuse_another(self, held: dict[str, object]) -> None:
        where = self.guard.where(self.out)
        record, ended = self._status(), (self.folder.path / STATUS).exists()
        # The record of all files is written when there is something to lose, whatever became of status.json.
        whole = (self.out / CHECKSUMS).exists() or self.is_under_way(self.out)
        if not whole and (not ended or (record is not None and record.status == "failed")):
            self.guard.clear(self.out)
            return
        what = (
            f"holds another {self.guard.word}; different: {differences_told(held.get('identity'), self.step.identity)}"
        )
        raise UserError(where, what, "Give another --out, or --fresh to replace it.")

    def _whole(self) -> str:
        """Hold what has ended against its records; returns what is to be said of pages that were written into."""
        status = self.folder.path / STATUS
        # A kill just before the end leaves the record of files, and what can be gone on with.
        if not status.is_file() and (self.is_under_way(self.out) or not (self.out / CHECKSUMS).is_file()):
            return ""
        record = self._status()
        if record is not None and record.status == "failed":
            return ""
        found = differences(self.out, everything=True)
        if record is None:
            found[f"{status.parent.name}/{STATUS}"] = "is damaged" if status.is_file() else "is missing"
        fix = "Give another --out, or --fresh to make it again."
        return still_whole(found, self.guard.where(self.out), fix)

    def _status(self) -> StepRecord | None:
        try:
            return StepRecord.model_validate(read_json(self.folder.path / STATUS))
        except (OSError, CorruptionError, ValueError):
            return None

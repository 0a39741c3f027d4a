"""The folder of one step's record, the same for every kind: what it is, what it did, how it ended."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.core.errors import CorruptionError, StepError
from harness.core.records import StepRecord
from harness.steps.files import fsync_folder, read_json, write_json, writing
from harness.steps.step import Step, differences_told

CHECKPOINT_COMPLETE = "complete.json"
"""Written into a checkpoint of training last: without it, it is not one."""
RECORD = "step"
"""Folder of the record within the artifact's, where a command makes one artifact alone."""
STEP, STATUS, LOG, PROVENANCE = "step.json", "status.json", "log.jsonl", "provenance.json"


class SupersededError(StepError):
    """Another attempt at the same step has begun since: this one must not end it."""


@dataclass
class StepFolder:
    """One step's folder."""

    path: Path
    id: str
    kind: str
    artifact: Path
    """Folder of what the step makes."""
    attempt: int = field(default=0)
    """Which attempt at the step this process makes; 0: none."""
    known_as: Path | None = None
    """Where the record lies once the artifact has appeared, for one that is made in another place."""

    @property
    def name(self) -> str:
        """What messages and lists of failures call the step."""
        return self.path.name if self.path.name != RECORD else (self.known_as or self.path).parent.name

    @classmethod
    def within(cls, out: Path, step_id: str, kind: str) -> StepFolder:
        """Where a command makes one artifact alone: ``out`` is the artifact, and the record lies in ``out/step``."""
        return cls(out / RECORD, step_id, kind, out)

    def begin(self, step: Step, described: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
        """Write what the step is, before it does anything; every beginning is a new attempt."""
        self.artifact.mkdir(parents=True, exist_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        self.attempt = self._begun() + 1
        known = {"id": step.id, "kind": step.kind, "arm": step.arm, "attempt": self.attempt}
        identity = {"identity": step.identity, "factors": step.factors, "parents": step.parents}
        write_json(self.path / STEP, {**described, **identity, "made_from": step.made_from, **known})
        write_json(self.path / PROVENANCE, provenance)

    def describe(self, **more: Any) -> None:
        """Add to step.json what is known only once the step is under way."""
        write_json(self.path / STEP, {**read_json(self.path / STEP), **more})

    def supersede(self) -> None:
        """Make this the attempt in force, without beginning the step: an earlier one can no longer end it."""
        attempt = self._begun() + 1
        with contextlib.suppress(OSError, CorruptionError):
            self.describe(attempt=attempt)
            self.attempt = attempt

    def _begun(self) -> int:
        with contextlib.suppress(OSError, CorruptionError, AttributeError, TypeError, ValueError):
            return int(read_json(self.path / STEP).get("attempt", 1))
        return 0

    def is_current(self) -> bool:
        """Whether no other attempt has begun since this process's own."""
        return not self.attempt or self._begun() == self.attempt

    def log(self, event: str, **fields: Any) -> None:
        """Append one line to log.jsonl."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **fields}, ensure_ascii=False)
        path = self.path / LOG
        with writing(path), path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def status(self) -> StepRecord | None:
        """The record of an ended step; None while it has not ended (or its status.json is damaged)."""
        path = self.path / STATUS
        if not path.exists():
            return None
        try:
            return StepRecord.model_validate(read_json(path))
        except (CorruptionError, ValueError):
            self.log("status.json is damaged: the step is checked again")
            return None

    def problem(self, step: Step) -> str | None:
        """Why its record is not that of a step which has ended well, made from the very same; None where it is."""
        record = self.status()
        if record is None or record.status != "done":
            return "it has not ended well"
        if record.id != step.id:
            return f"it is the record of step {record.id[:12]}"
        if record.made_from != step.made_from:
            return f"what it is made from has changed: {differences_told(record.made_from, step.made_from)}"
        return None

    def reopen(self, reason: str) -> None:
        """Take back the end of a step whose artifact no longer holds what was recorded."""
        (self.path / STATUS).unlink(missing_ok=True)
        self.log("reopened", reason=reason)

    def finish(self, record: StepRecord) -> None:
        """Write status.json, last and atomically, unless another attempt has begun since.

        Raises:
            SupersededError: it has: a worker that was cut off from its cluster must not end what another does again.
        """
        if not self.is_current():
            now = self._begun()
            raise SupersededError(
                self.name, f"attempt {now} has begun since this one, {self.attempt}", "Its result is the one kept."
            )
        fsync_folder(self.artifact)
        write_json(self.path / STATUS, record.model_dump(mode="json"))

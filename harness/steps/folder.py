"""The folder of one step."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.core.errors import CorruptionError
from harness.core.records import StepKind, StepRecord
from harness.steps.files import fsync_folder, read_json, write_json, writing

CHECKPOINT_COMPLETE = "complete.json"
"""Written into a checkpoint of training last: without it, it is not one."""


@dataclass
class StepFolder:
    """One step's folder."""

    path: Path
    id: str
    kind: StepKind

    @property
    def artifact(self) -> Path:
        """Folder of what the step makes."""
        return self.path / "artifact"

    def begin(self, step: dict[str, Any], provenance: dict[str, Any]) -> None:
        """Write what the step is, before it does anything."""
        self.artifact.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "step.json", {"id": self.id, "kind": self.kind, **step})
        write_json(self.path / "provenance.json", provenance)

    def log(self, event: str, **fields: Any) -> None:
        """Append one line to log.jsonl."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **fields}, ensure_ascii=False)
        path = self.path / "log.jsonl"
        with writing(path), path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def status(self) -> StepRecord | None:
        """The record of an ended step; None while it has not ended (or its status.json is damaged)."""
        path = self.path / "status.json"
        if not path.exists():
            return None
        try:
            return StepRecord.model_validate(read_json(path))
        except (CorruptionError, ValueError):
            self.log("status.json is damaged: the step is checked again")
            return None

    def reopen(self, reason: str) -> None:
        """Take back the end of a step whose artifact no longer holds what was recorded."""
        (self.path / "status.json").unlink(missing_ok=True)
        self.log("reopened", reason=reason)

    def finish(self, record: StepRecord) -> None:
        """Write status.json, last and atomically."""
        fsync_folder(self.artifact)
        write_json(self.path / "status.json", record.model_dump(mode="json"))

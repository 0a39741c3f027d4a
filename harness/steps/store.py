"""Every file name of a run, under one lock.

Layout (``runs/<name>/``)::

    plan.json                       what was asked, every default filled in
    search.json                     of a study: which recipes were chosen, and among which
    best                            of `harness align --search`: link to what the chosen alignment has left
    parity.json                     what a second engine answered to some of it, where that was asked for
    requests/<digest>.jsonl.gz      each distinct list of samples and requests once
    steps/<kind>-<arm>-<id>/        step.json provenance.json log.jsonl artifact/ status.json (last, atomically)
    judge/<name>-<digest>.jsonl.gz  what a judge said, whatever step asked
    report/                         rebuilt from the records at any time
    trackers/                       what the trackers of a study write, and which of their scores are there

No file holds an absolute path, so a run can be moved or published.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from harness.steps.files import slug
from harness.steps.folder import StepFolder
from harness.steps.guard import Guard
from harness.steps.lock import FolderLock

RUN = Guard(
    "run",
    r"\.folded|plan\.json|index\.json|study\.yaml|search\.(json|md)|best|parity\.json|requests|steps|report|judge|trackers",
    "plan.json",
)


@dataclass
class RunStore:
    """One run's directory, locked for this process while it is entered."""

    root: Path
    _lock: FolderLock | None = field(default=None, repr=False)

    def __enter__(self) -> RunStore:
        self._lock = FolderLock(self.root, RUN.where(self.root))
        self._lock.take()
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()

    @property
    def plan_file(self) -> Path:
        """plan.json."""
        return self.root / "plan.json"

    @property
    def parity_file(self) -> Path:
        """parity.json: what a second engine answered to the same questions."""
        return self.root / "parity.json"

    @property
    def scratch(self) -> Path:
        """Folder of what goes when it has been used: checkpoints with an adapter folded in."""
        return self.root / ".folded"

    @property
    def judge(self) -> Path:
        """The folder of what judges were asked and said, shared by all steps."""
        return self.root / "judge"

    @property
    def report(self) -> Path:
        """The folder of reports."""
        return self.root / "report"

    def requests(self, digest: str) -> Path:
        """File of one list of samples and requests."""
        return self.root / "requests" / f"{digest[:16]}.jsonl.gz"

    def step(self, kind: str, arm: str, step_id: str) -> StepFolder:
        """The folder of one step."""
        path = self.root / "steps" / f"{kind}-{slug(arm)}-{step_id[:12]}"
        return StepFolder(path, step_id, kind, path / "artifact")

"""Every file name of a run, atomic writes, and the journal that answers go to before they count.

Layout (``runs/<name>/``)::

    plan.json                       what was asked, every default filled in
    parity.json                     what a second engine answered to some of it, where that was asked for
    requests/<digest>.jsonl.gz      each distinct list of samples and requests once
    steps/<kind>-<arm>-<id>/        step.json provenance.json log.jsonl artifact/ status.json (last, atomically)
    judge/<name>-<digest>.jsonl.gz  what a judge said, whatever step asked
    report/                         rebuilt from the records at any time

No file holds an absolute path, so a run can be moved or published.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from harness.core.errors import UserError
from harness.core.records import StepKind
from harness.steps.files import slug
from harness.steps.folder import StepFolder

_OWN = re.compile(
    r"\.lock|\.folded|\.(plan\.json|study\.yaml|parity\.json)\.\d+\.tmp"
    r"|plan\.json|study\.yaml|parity\.json|requests|steps|report|judge"
)


def _same_file(stream: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


@dataclass
class RunStore:
    """One run's directory, locked for this process."""

    root: Path
    _lock: IO[str] | None = field(default=None, repr=False)
    _made: bool = field(default=False, repr=False)

    def __enter__(self) -> RunStore:
        self.lock()
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            # A run that was refused before it wrote anything leaves no trace.
            if [child.name for child in self.root.iterdir()] == [".lock"]:
                with contextlib.suppress(OSError):
                    (self.root / ".lock").unlink()
                    if self._made:
                        self.root.rmdir()
            self._lock.close()
            self._lock = None

    def lock(self) -> None:
        """Take the run for this process; the lock goes with the process, however it ends."""
        try:
            self._made = self._made or not self.root.exists()
            self.root.mkdir(parents=True, exist_ok=True)
            stream = (self.root / ".lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"--out {self.root}", f"cannot be written: {error.strerror}", "Give another folder."
            ) from None
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            stream.seek(0)
            owner = stream.read().strip() or "unknown"
            stream.close()
            raise UserError(
                f"--out {self.root}",
                f"another harness process (pid {owner}) is writing to this folder",
                "Wait for it to end, stop it, or give another --out.",
            ) from None
        if not _same_file(stream, self.root / ".lock"):
            # Its last owner took the file away between our opening and our locking it.
            stream.close()
            return self.lock()
        stream.seek(0)
        stream.truncate()
        stream.write(f"{os.getpid()}\n")
        stream.flush()
        self._lock = stream
        return None

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

    def step(self, kind: StepKind, arm: str, step_id: str) -> StepFolder:
        """The folder of one step."""
        return StepFolder(self.root / "steps" / f"{kind}-{slug(arm)}-{step_id[:12]}", step_id, kind)

    def refuse_strangers(self) -> None:
        """Refuse a folder that holds anything but a run; writes nothing.

        Raises:
            UserError: naming what is not a run's.
        """
        self._own_children()

    def _own_children(self) -> list[Path]:
        if not self.root.is_dir():
            return []
        children = sorted(self.root.iterdir(), key=lambda child: child.name == "plan.json")
        # A write that a kill cut short leaves its temporary file behind.
        strange = [child.name for child in children if not _OWN.fullmatch(child.name)]
        if not self.plan_file.exists():
            # Without a plan, folders of these names are somebody else's: every run writes its plan first.
            strange += [child.name for child in children if child.name in ("requests", "steps", "report", "judge")]
        if strange:
            raise UserError(
                f"--out {self.root}",
                f"holds files that are not a run's: {', '.join(sorted(strange)[:5])}",
                "--fresh deletes only what a run wrote. Give another folder, or move those files.",
            )
        return children

    def clear(self) -> None:
        """Delete everything that a run wrote (``--fresh``); refuses a folder that holds anything else."""
        # The plan goes last, so that a clearing that is cut short can be taken up again.
        for child in self._own_children():
            if child.name == ".lock":
                continue
            shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()

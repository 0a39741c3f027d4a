"""Takes over what other runs have made: a step is its id, wherever it ended. Nothing that is damaged is taken."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from harness.core.errors import CorruptionError, UserError
from harness.core.records import StepRecord
from harness.steps.files import fsync_folder, read_json, write_bytes
from harness.steps.folder import LOG, PROVENANCE, STATUS, STEP, StepFolder
from harness.steps.step import Step
from harness.steps.store import RunStore
from harness.study.spec import Read

_WRITTEN_LATER = (PROVENANCE, LOG, STEP)
"""Files of a step's folder that another command adds to in place: they are copied, all else is linked."""


def stores_of(read: Read, root: Path) -> list[RunStore]:
    """The runs whose steps a study takes over, as its file names them; its own run folder is none.

    Raises:
        UserError: a folder that is no run.
    """
    found = []
    for number, name in enumerate(read.spec.reuse):
        folder = Path(name).expanduser()
        if not (folder / "steps").is_dir():
            what = f"{name!r} is no run: it has no folder `steps`"
            raise UserError(read.where("reuse", number), what, "Give the folder of a run (its --out).")
        if not root.exists() or folder.resolve() != root.resolve():
            found.append(RunStore(folder))
    return found


def take(
    step: Step,
    here: StepFolder,
    stores: Sequence[RunStore],
    intact: Callable[[Step, StepFolder], str | None],
    note: Callable[[str], None],
) -> bool:
    """Link a step that has ended in another run, held against what was recorded there; False where there is none.

    Args:
        step: by its id.
        here: its folder in this run, held by this process.
        stores: the other runs.
        intact: what is wrong with what such a step has left.
        note: says what is taken, and what is not and why.
    """
    for store in stores:
        for path in sorted((store.root / "steps").glob(f"{step.kind}-*-{step.id[:12]}")):
            there = StepFolder(path, step.id, step.kind, path / "artifact")
            try:
                record = StepRecord.model_validate(read_json(path / STATUS)) if (path / STATUS).is_file() else None
                if record is None or record.status != "done" or record.id != step.id:
                    continue
                problem = intact(step, there)
            except (OSError, CorruptionError, ValueError, KeyError, TypeError) as error:
                problem = f"is damaged ({error})"
            if problem is not None:
                note(f"{store.root}: {path.name}: {problem}; it is not taken")
                continue
            _link(there, here)
            here.log("taken", run=store.root.name)
            write_bytes(here.path / STATUS, (path / STATUS).read_bytes())
            note(f"{here.name}: taken from {store.root}")
            return True
    return False


def _link(there: StepFolder, here: StepFolder) -> None:
    """All but the record of its end: a step that was taken by half is not there."""
    shutil.rmtree(here.artifact, ignore_errors=True)
    for source in sorted(there.path.rglob("*")):
        target = here.path / source.relative_to(there.path)
        if not source.is_file() or source.name.startswith(".") or target in (here.path / STATUS, here.path / STEP):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        if target.parent == here.path and target.name in _WRITTEN_LATER:
            shutil.copyfile(source, target)
            continue
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)
    for folder in {path.parent for path in here.path.rglob("*")}:
        fsync_folder(folder)
    write_bytes(here.path / STEP, (there.path / STEP).read_bytes())

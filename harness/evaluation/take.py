"""Takes over ended steps of other runs: a step is its id, wherever it was computed. Nothing damaged is taken.

What steps made is linked, not copied, where the disk can do that: no file of a run is ever changed in place (a journal
that is gone on with is copied first). What is written to while a step is checked is copied.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from harness.core.errors import CorruptionError, UserError
from harness.core.records import StepRecord
from harness.evaluation.resume import ANSWERS_FILE, damage
from harness.evaluation.session import EvalSession, Unit
from harness.steps.files import fsync_folder, read_json, write_bytes
from harness.steps.folder import LOG, PROVENANCE, STATUS, STEP, StepFolder
from harness.steps.journal import intact, read_rows, rows_digest
from harness.steps.store import RunStore


def other_run(folder: Path, root: Path) -> RunStore:
    """Another run, by its folder.

    Raises:
        UserError: there is no run, or it is the very one that is written.
    """
    where = f"--store {folder}"
    if not (folder / "steps").is_dir():
        raise UserError(where, "is no run: it has no folder `steps`", "Give the folder of a run (its --out).")
    if root.exists() and folder.resolve() == root.resolve():
        raise UserError(where, "is the run that is written", "Give the folder of another run, or leave --store out.")
    return RunStore(folder)


def take_steps(run: EvalSession, units: Sequence[Unit], other: RunStore) -> None:
    """Link what the other run has ended of the steps of these units, and say how many."""
    lying = {path.name.rpartition("-")[2]: path for path in sorted((other.root / "steps").glob("*-*"))}
    taken = {"answers": 0, "scores": 0}
    for unit in units:
        answers = run.folder(unit)
        taken["answers"] += _take(run, unit, answers, lying.get(answers.id[:12]), other)
        status = answers.status()
        if status is not None and status.status == "done":
            for folder in (run.scores_folder(unit, step) for step in unit.task.scores):
                taken["scores"] += _take(run, unit, folder, lying.get(folder.id[:12]), other)
        run.forget(unit)
    if any(taken.values()):
        found = ", ".join(f"{count} of {kind}" for kind, count in taken.items() if count)
        run.reporter.note(f"taken from {other.root}: steps that ended there ({found})")


def _take(run: EvalSession, unit: Unit, folder: StepFolder, path: Path | None, other: RunStore) -> bool:
    """Take over one step; False where there is nothing to take, or no need."""
    status = folder.status()
    if path is None or (status is not None and status.status == "done"):
        return False
    there, record = StepFolder(path, folder.id, folder.kind, path / "artifact"), None
    try:
        record = _record(there)
        if record is None or record.status != "done" or record.id != folder.id or run.again(record) is not None:
            return False
        problem = damage(there, record, other) or _changed(run, unit, there, record, other)
    except (OSError, CorruptionError, ValueError, KeyError, TypeError) as error:
        problem = f"is damaged ({error})"
    if record is None or problem is not None:
        run.reporter.note(f"{other.root}: {path.name}: {problem}; it is not taken")
        return False
    with run.runner.holding(folder) as free:
        if free:
            _link_step(there, folder, run.store, other)
            if folder.kind == "scores":
                folder.describe(answers_folder=run.folder(unit).path.name)
            folder.log("taken", run=other.root.name)
            _end(there, folder)
    return free


def _record(there: StepFolder) -> StepRecord | None:
    """The record of a step of another run, into which nothing is written; None where it has not ended."""
    path = there.path / STATUS
    return StepRecord.model_validate(read_json(path)) if path.is_file() else None


def _changed(run: EvalSession, unit: Unit, there: StepFolder, record: StepRecord, other: RunStore) -> str | None:
    """What is not what was asked here or recorded there; read whole, as it is to stand for a computation."""
    opened = run.opened(unit)
    requests = _requests(there, other)
    if rows_digest(read_rows(requests)) != rows_digest(opened.rows()):
        return f"requests/{requests.name} is not what is asked here"
    if there.kind == "scores":
        made_from, answers = record.made_from.get("answers"), run.folder(unit).status()
        return None if answers is not None and answers.digest == made_from else "it scored other answers"
    rows = {(row["item"], row["index"]): row for row in read_rows(there.artifact / ANSWERS_FILE)}
    asked = [((sample.id, n), one.digest) for sample in opened.samples for n, one in enumerate(sample.requests)]
    if any(rows.get(key, {}).get("digest") != digest for key, digest in asked):
        return f"{ANSWERS_FILE} does not answer what is asked"
    return None if rows_digest([rows[key] for key, _ in asked]) == record.digest else f"{ANSWERS_FILE} was changed"


def _requests(there: StepFolder, other: RunStore) -> Path:
    return other.root / "requests" / str(read_json(there.path / STEP)["requests"])


def _link_step(there: StepFolder, here: StepFolder, store: RunStore, other: RunStore) -> None:
    """All but the record of its end: a step that was taken by half is not there."""
    (here.path / STATUS).unlink(missing_ok=True)
    shutil.rmtree(here.artifact, ignore_errors=True)
    for path in sorted(there.artifact.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            _link(path, here.artifact / path.relative_to(there.artifact))
    requests = _requests(there, other)
    if not intact(target := store.root / "requests" / requests.name):
        target.unlink(missing_ok=True)
        _link(requests, target)
    for name in (STEP, PROVENANCE, LOG):
        if (there.path / name).is_file():
            write_bytes(here.path / name, (there.path / name).read_bytes())


def _end(there: StepFolder, here: StepFolder) -> None:
    for folder in {path.parent for path in here.artifact.rglob("*")}:
        fsync_folder(folder)
    write_bytes(here.path / STATUS, (there.path / STATUS).read_bytes())


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)

"""Takes over ended steps of other runs: a step is its id, wherever it was computed. Nothing damaged is taken.

What steps made is linked, not copied, where the disk can do that: no file of a run is ever changed in place (a journal
that is gone on with is copied first). What is written to while a step is checked is copied.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.core.errors import CorruptionError, UserError
from harness.core.records import StepRecord
from harness.evaluation.resume import ANSWERS_FILE, damage
from harness.evaluation.session import EvalSession, Unit
from harness.steps.files import read_json
from harness.steps.folder import LOG, PROVENANCE, STATUS, STEP, StepFolder
from harness.steps.journal import intact, read_rows, rows_digest
from harness.steps.store import RunStore
from harness.tasks.questions import digest_of_stored


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
        taken["answers"] += _take(run, answers, lying, other, {})
        status = answers.status()
        if status is None or status.status != "done":
            continue
        for step in unit.task.scores:
            folder = run.scores_folder(unit, step)
            described = {"answers_folder": answers.path.name}
            taken["scores"] += _take(run, folder, lying, other, described, made_from=status.digest)
    if any(taken.values()):
        found = ", ".join(f"{count} of {kind}" for kind, count in taken.items() if count)
        run.reporter.note(f"taken from {other.root}: steps that ended there ({found})")


def _take(
    run: EvalSession,
    folder: StepFolder,
    lying: dict[str, Path],
    other: RunStore,
    described: dict[str, Any],
    made_from: str | None = None,
) -> bool:
    """Take over one step; False where there is nothing to take, or no need."""
    path, status = lying.get(folder.id[:12]), folder.status()
    if path is None or (status is not None and status.status == "done"):
        return False
    there = StepFolder(path, folder.id, folder.kind, path / "artifact")
    record = None
    try:
        record = _record(there)
        if record is None or record.status != "done" or record.id != folder.id:
            return False
        problem = _problem(there, record, other)
    except (OSError, CorruptionError, ValueError, KeyError, TypeError) as error:
        problem = f"is damaged ({error})"
    if problem is not None or record is None:
        run.reporter.note(f"{other.root}: {path.name}: {problem}; it is not taken")
        return False
    if made_from is not None and record.made_from.get("answers") != made_from:
        return False
    if run.again(record) is not None:
        return False
    with run.runner.holding(folder) as free:
        if free:
            _link_step(there, folder, run.store, other, described)
    return free


def _record(there: StepFolder) -> StepRecord | None:
    """The record of a step of another run, into which nothing is written; None where it has not ended."""
    path = there.path / STATUS
    return StepRecord.model_validate(read_json(path)) if path.is_file() else None


def _problem(there: StepFolder, record: StepRecord, other: RunStore) -> str | None:
    """Why a step's files are not what was recorded; read whole, as they are to stand for a computation here."""
    found = damage(there, record, other)
    if found is not None or there.kind != "answers":
        return found
    rows = {(row["item"], row["index"]): row for row in read_rows(there.artifact / ANSWERS_FILE)}
    requests = _requests(there, other)
    samples = read_rows(requests)
    if digest_of_stored(samples) != read_json(there.path / STEP)["questions"]:
        return f"{requests.name} is not what was recorded"
    asked = [
        ((sample["id"], index), request["digest"])
        for sample in samples
        for index, request in enumerate(sample["requests"])
    ]
    if any(rows.get(key, {}).get("digest") != digest for key, digest in asked):
        return f"{ANSWERS_FILE} does not answer {requests.name}"
    ordered = [rows[key] for key, _ in asked]
    return None if rows_digest(ordered) == record.digest else f"{ANSWERS_FILE} is not what was recorded"


def _requests(there: StepFolder, other: RunStore) -> Path:
    return other.root / "requests" / str(read_json(there.path / STEP)["requests"])


def _link_step(
    there: StepFolder, here: StepFolder, store: RunStore, other: RunStore, described: dict[str, Any]
) -> None:
    """Files first, the record last: a step that was taken by half is not there."""
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
            shutil.copyfile(there.path / name, here.path / name)
    here.describe(**described)
    here.log("taken", run=other.root.name)
    shutil.copyfile(there.path / STATUS, temporary := here.path / f".{STATUS}.{os.getpid()}.tmp")
    temporary.replace(here.path / STATUS)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)

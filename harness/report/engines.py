"""Whether two runs of different engines may stand side by side."""

from __future__ import annotations

from harness.core.errors import CorruptionError, UserError
from harness.core.parity_record import ParityRecord
from harness.report.read import RunResult
from harness.steps.files import read_json
from harness.steps.store import RunStore


def stored_parity(run: RunResult) -> ParityRecord | None:
    """The parity record of a run, where there is one.

    Raises:
        CorruptionError: it is damaged.
    """
    path = RunStore(run.root).parity_file
    if not path.is_file():
        return None
    try:
        return ParityRecord.model_validate(read_json(path))
    except ValueError as error:
        raise CorruptionError(f"{path}: not a parity record ({error}); delete it and run --parity again") from None


def check_engines(a: RunResult, b: RunResult, *, allowed: bool = False) -> tuple[str, ...]:
    """What is to be said about the engines of two runs whose numbers shall stand side by side.

    Raises:
        UserError: they come from different engines, and no parity record of either run shows that these agree.
    """
    names = [str((run.plan.get("engine") or {}).get("name")) for run in (a, b)]
    if names[0] == names[1]:
        return ()
    said = f"engine differs: {names[0]} in A, {names[1]} in B"
    tasks = {task.name for task in a.tasks} & {task.name for task in b.tasks}
    why = "no parity record shows that they agree"
    for run in (a, b):
        record = stored_parity(run)
        if record is None or set(record.engines) != set(names):
            continue
        missing = sorted(tasks - {one.task for one in record.tasks})
        if record.agrees and not missing:
            return (f"{said}; {record.summary()}",)
        why = "; ".join(record.problems[:2]) if record.problems else f"no parity was measured on {', '.join(missing)}"
    if allowed:
        return (f"{said}, and {why}: a difference may be the engines' (--allow-engine-mismatch)",)
    raise UserError(
        f"{a.root} and {b.root}",
        f"come from different engines ({names[0]}, {names[1]}), and {why}",
        f"Run one of them again with --parity 16 --parity-engine {names[1]} (or {names[0]}), or pass "
        "--allow-engine-mismatch."
        if all(run.plan.get("source") is None for run in (a, b))
        else "Evaluate both with one engine, or pass --allow-engine-mismatch.",
    )

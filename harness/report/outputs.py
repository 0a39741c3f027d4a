"""What an arm of some run has answered, held against its record: for whoever compares other answers with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.core.errors import CorruptionError, UserError, nearest
from harness.core.records import Output, digest_of
from harness.core.text import task_label, visible
from harness.report.read import RunResult, StepResult, TaskResult, stream_rows
from harness.report.study import open_runs
from harness.steps.journal import rows_digest


@dataclass(frozen=True)
class StoredOutput:
    """One answer of an arm; ``text`` is None where it failed, and ``reason`` says why."""

    instruction: str
    """The data set's own, where a row has one; else the prompt."""
    text: str | None
    reason: str | None = None
    truncated: bool = False


@dataclass(frozen=True)
class StoredOutputs:
    """All generated answers of one arm to one task, by the id of the sample."""

    arm: str
    task: str
    by_id: Mapping[str, StoredOutput]

    @property
    def digest(self) -> str:
        """Of instructions and answers: what is compared with them depends on nothing else."""
        return digest_of([[key, one.instruction, one.text, one.reason] for key, one in sorted(self.by_id.items())])


def read_outputs(run: Path, *, arm: str | None = None, task: str | None = None) -> StoredOutputs:
    """Read what an arm of a run or a study has answered.

    Args:
        run: folder of `harness eval` or of a study.
        arm: its name; the base, or the only arm, when absent.
        task: its name, with or without :raw or :chat; the only one when absent.

    Raises:
        UserError: no such run, arm or task; it was not answered, or nothing was generated.
        CorruptionError: the answers are not those that were recorded.
    """
    name, found = _arm(run, arm)
    chosen = _task(run, name, found, task)
    label = task_label(chosen.name, chosen.variant)
    where = f"{run}, arm {visible(name)}, task {label}"
    step = chosen.answers
    if step is None or step.record is None or step.record.status != "done":
        raise UserError(where, "has not been answered", "Run its command to the end first.")
    outputs = _checked(step, where)
    by_id = {}
    for row in stream_rows(step.requests_file):
        kinds = [request.get("kind") for request in row["requests"]]
        if "generate" not in kinds:
            raise UserError(where, "nothing was generated", "Name a task that asks for answers.")
        output = outputs[row["id"], kinds.index("generate")]
        instruction = str((row.get("data") or {}).get("instruction", row.get("prompt") or ""))
        text = None if output.error is not None else output.text
        by_id[str(row["id"])] = StoredOutput(instruction, text, output.error, output.finish == "length")
    return StoredOutputs(name, label, by_id)


def answers_digest(answers: Path, requests: Path) -> str:
    """Digest of the stored answers to all requests, in their order, as the record of their step has it.

    Raises:
        CorruptionError: a file is damaged.
    """
    stored = {(row["item"], int(row["index"])): row for row in stream_rows(answers)}
    order = [(row["id"], index) for row in stream_rows(requests) for index in range(len(row["requests"]))]
    return rows_digest([stored[key] for key in order if key in stored])


def _checked(step: StepResult, where: str) -> dict[tuple[str, int], Output]:
    """The outputs of an answers step, once they are known to be what was recorded."""
    file = step.artifact / "answers.jsonl.gz"
    if not file.is_file() or not step.requests_file.is_file():
        raise UserError(where, "its texts are not in the folder", "Give the run itself, not what was published of it.")
    if step.record is not None and answers_digest(file, step.requests_file) != step.record.digest:
        raise CorruptionError(f"{file}: does not hold what status.json recorded; run the same command again")
    return {(row["item"], int(row["index"])): Output.from_json(row["output"]) for row in stream_rows(file)}


def _arm(run: Path, arm: str | None) -> tuple[str, RunResult]:
    runs = open_runs(run)
    found: dict[str, RunResult] = {}
    for base, one in runs.items():
        for each in one.arms:
            found[each.label or (str(base) if base is not None else "base")] = each
    bases = [name for name, each in found.items() if each.label is None]
    if arm is None and len(found) > 1 and len(bases) != 1:
        raise UserError(str(run), f"has {len(found)} arms", f"Name one: {_listed(found)}.")
    name = arm if arm is not None else next(iter(bases or found))
    if name not in found:
        close = nearest(name, list(found))
        hint = f"Did you mean {close[0]}? " if close else ""
        raise UserError(str(run), f"has no arm {visible(name)!r}", f"{hint}Its arms: {_listed(found)}.")
    return name, found[name]


def _task(run: Path, arm: str, found: RunResult, task: str | None) -> TaskResult:
    names = {task_label(one.name, one.variant): one for one in found.tasks}
    fits = [one for label, one in names.items() if task is None or task in (one.name, label)]
    if len(fits) != 1:
        what = f"arm {visible(arm)} was asked {len(fits)} tasks" + (f" of the name {visible(task)!r}" if task else "")
        raise UserError(str(run), what, f"Name one: {_listed(names)}.")
    return fits[0]


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(visible(name) for name in list(names)[:8]) + (", ..." if len(names) > 8 else "")

"""Reads back what a run left on disk, and makes its texts safe to show.

The records are the truth; reports and comparisons are made from them and hold nothing of their own. Model output is
adversarial by design, so every text goes through :func:`visible` before it reaches a terminal, a page or Markdown.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harness.core.errors import CorruptionError, UserError, nearest
from harness.core.records import Metric, Output, Row, StepRecord
from harness.core.text import portable, visible
from harness.steps.files import read_json, stays_inside
from harness.steps.journal import read_rows, rows_digest
from harness.steps.provenance import digest_of_bytes
from harness.steps.store import RunStore


@dataclass(frozen=True)
class Texts:
    """What was asked and answered for one sample. ``requests`` are as stored; ``outputs`` are in their order."""

    prompt: str
    target: str | None
    requests: tuple[Mapping[str, Any], ...]
    outputs: tuple[Output, ...]

    @property
    def generated(self) -> str | None:
        """The generated text; None for a sample that asks for log-likelihoods only."""
        kinds = [str(request.get("kind")) for request in self.requests]
        found = [output.text for output, kind in zip(self.outputs, kinds, strict=False) if kind == "generate"]
        return "\n".join(found) if found else None

    @property
    def choices(self) -> list[tuple[str, float | None, bool]]:
        """Continuation, log-likelihood (nats) and whether it is the most likely one, for each that was asked for."""
        asked = [
            (str(request.get("continuation", "")), output.logprob)
            for request, output in zip(self.requests, self.outputs, strict=False)
            if request.get("kind") == "loglikelihood"
        ]
        best = max((logprob for _, logprob in asked if logprob is not None), default=None)
        return [(text, logprob, logprob is not None and logprob == best) for text, logprob in asked]

    def answer(self) -> str:
        """The answer in one text: what was generated, or the continuations with their log-likelihoods."""
        parts = [self.generated] if self.generated is not None else []
        for text, logprob, best in self.choices:
            value = "no answer" if logprob is None else f"{logprob:.4f} nats"
            parts.append(f"{'> ' if best else '  '}{text!r}: {value}")
        errors = [f"error: {output.error}" for output in self.outputs if output.error is not None]
        return "\n".join(parts + errors)


@dataclass(frozen=True)
class StepResult:
    """One step of a run. ``record`` is None while it has not ended."""

    root: Path
    id: str
    folder: Path | None
    info: Mapping[str, Any]
    record: StepRecord | None

    @property
    def done(self) -> bool:
        """Whether the step ended well."""
        return self.record is not None and self.record.status == "done"

    @property
    def artifact(self) -> Path:
        """Folder of what the step made."""
        return (self.folder or self.root / "steps") / "artifact"

    @property
    def identity(self) -> dict[str, Any]:
        """All that can move its numbers; runs of harness 0.1 call it `config`."""
        return dict(self.info.get("identity") or self.info.get("config") or {})

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """provenance.json, or nothing where it is not there."""
        path = self.artifact.parent / "provenance.json"
        return dict(read_json(path)) if path.exists() else {}

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The numbers of a scores step: one row per metric for the whole task, then one per leaf."""
        path = self.artifact / "scores.json"
        try:
            return tuple(Row.model_validate(row) for row in read_json(path)["rows"])
        except (KeyError, TypeError, ValidationError, FileNotFoundError) as error:
            raise CorruptionError(f"{path}: not the scores of a step ({error}); start over with --fresh") from None

    @cached_property
    def metrics(self) -> tuple[Metric, ...]:
        """What the numbers of a scores step mean."""
        return tuple(Metric.model_validate(metric) for metric in self.info.get("metrics", ()))

    @cached_property
    def samples(self) -> dict[str, dict[str, Any]]:
        """Sample id -> row of samples.jsonl.gz, in the stored order; kept once it has been read."""
        return self.read_samples()

    def read_samples(self) -> dict[str, dict[str, Any]]:
        """The same, read each time: of thousands of steps nobody needs the rows at once.

        Raises:
            CorruptionError: the file is missing, damaged, or not what was recorded.
        """
        path = self.artifact / "samples.jsonl.gz"
        if not path.exists():  # read_rows takes a missing file for an empty one
            raise CorruptionError(f"{path}: is missing, though its step has ended; start over with --fresh")
        digest = self.record.digest if self.record is not None else None
        rows = _as_recorded(path, digest)
        if rows is None:
            rows = read_rows(path)
            if digest is not None and rows_digest(rows) != digest:
                raise CorruptionError(f"{path}: does not hold what status.json recorded; run the same command again")
        found: dict[str, dict[str, Any]] = {}
        for row in rows:
            if row["id"] in found:
                raise CorruptionError(f"{path}: sample {row['id']!r} is in it twice; start over with --fresh")
            found[row["id"]] = row
        return found

    @property
    def hanging(self) -> tuple[dict[str, str], dict[str, str]]:
        """Cluster and stratum (leaf task) of the samples that have one."""
        found = [{key: row[name] for key, row in self.samples.items() if row.get(name)} for name in ("cluster", "leaf")]
        return found[0], found[1]

    @property
    def requests_file(self) -> Path:
        """Where the questions of a scores step lie."""
        name = str(self.info.get("requests", ""))
        if name and not stays_inside(name):
            raise CorruptionError(f"{self.folder}: step.json names requests outside of the run: {name}")
        return self.root / "requests" / name if name.endswith(".gz") else RunStore(self.root).requests(name)

    def first_request(self) -> Mapping[str, Any]:
        """The first request of a scores step's samples, as stored; empty where the texts are not in the folder."""
        path = self.requests_file
        first = next(stream_rows(path), {}) if path.is_file() else {}
        return next(iter(first.get("requests", ())), {})

    def asked(self, ids: Collection[str] | None = None) -> dict[str, Texts]:
        """What was asked in some samples of a scores step (None: in all), without an answer and without token ids."""
        found: dict[str, Texts] = {}
        for row in stream_rows(self.requests_file) if self.requests_file.is_file() else ():
            if ids is None or row["id"] in ids:
                # Token ids are most of the file, and nobody reads them.
                requests = tuple(
                    {key: value for key, value in request.items() if key not in ("prompt_ids", "continuation_ids")}
                    for request in row.get("requests", ())
                )
                found[row["id"]] = Texts(str(row.get("prompt") or ""), row.get("target"), requests, ())
        return found

    def texts(self, ids: Collection[str], asked: Mapping[str, Texts] | None = None) -> dict[str, Texts]:
        """What was asked and answered for some samples of a scores step.

        Samples whose texts are not in the folder (a published run holds none) are left out. ``asked``: what `asked`
        gave for a step with the same questions, which need not be read again.
        """
        answers = self.root / "steps" / str(self.info.get("answers_folder", "")) / "artifact" / "answers.jsonl.gz"
        if not self.requests_file.is_file() or not answers.is_file():
            return {}
        wanted = set(ids)
        outputs: dict[str, dict[int, Output]] = {}
        for row in stream_rows(answers):
            if row["item"] in wanted:
                outputs.setdefault(row["item"], {})[int(row["index"])] = Output.from_json(row["output"])
        found = {}
        for name, question in (asked if asked is not None else self.asked(wanted)).items():
            if name in wanted:
                got = outputs.get(name, {})
                missing = Output(error="no answer is stored")
                ordered = tuple(got.get(k, missing) for k in range(len(question.requests)))
                found[name] = replace(question, outputs=ordered)
        return found


@dataclass(frozen=True)
class TaskResult:
    """One task of a run: the plan's words about it, and its steps."""

    info: Mapping[str, Any]
    answers: StepResult | None
    scores: tuple[StepResult, ...]

    @property
    def name(self) -> str:
        """Task name, without the variant."""
        return str(self.info["task"])

    @property
    def variant(self) -> str:
        """Prompt variant: raw or chat."""
        return str(self.info.get("variant", "raw"))

    @property
    def template(self) -> str | None:
        """Digest of the chat template; None: a raw prompt, an endpoint's own template, or not recorded."""
        return self.info.get("template")

    @property
    def steps(self) -> tuple[StepResult, ...]:
        """All its steps, answers first."""
        return ((self.answers,) if self.answers is not None else ()) + self.scores

    def unfinished(self) -> list[StepResult]:
        """Steps that have not ended."""
        return [step for step in self.steps if step.record is None]

    def failed(self) -> list[StepResult]:
        """Steps that ended in an error."""
        return [step for step in self.steps if step.record is not None and step.record.status == "failed"]


@dataclass(frozen=True)
class RunResult:
    """One run folder, read."""

    root: Path
    plan: Mapping[str, Any]
    tasks: tuple[TaskResult, ...] = field(default=())

    @property
    def name(self) -> str:
        """Model and adapter, in one line."""
        model, adapter = self.plan.get("model") or {}, self.plan.get("adapter") or {}
        names = [str(part.get("name") or part.get("ref") or "") for part in (model, adapter) if part]
        return visible(portable(" + ".join(name for name in names if name) or self.root.name))

    @cached_property
    def arms(self) -> tuple[RunResult, ...]:
        """The run as one run per arm; itself where it has only one. The base is one, in however many templates."""
        described = self.plan.get("arms") or ()
        if len(described) < 2:
            return (self,)
        named: dict[str | None, list[Mapping[str, Any]]] = {}
        for arm in described:
            named.setdefault(arm.get("label"), []).append(arm)
        return tuple(self._arm(rows) for rows in named.values())

    def _arm(self, rows: Sequence[Mapping[str, Any]]) -> RunResult:
        arm, names = rows[0], {row["name"] for row in rows}
        adapter = arm.get("adapter")
        plan = {
            **self.plan,
            "arm": arm["name"],
            # A merged model beside its base goes by the arm's name, as an adapter does.
            "adapter": {**(adapter or {}), "name": arm.get("label")} if arm.get("label") else None,
            "arms": list(rows),
        }
        return RunResult(self.root, plan, tuple(task for task in self.tasks if task.info.get("arm") in names))

    @property
    def arm(self) -> str:
        """Short name of what was evaluated."""
        return str(self.plan.get("arm") or self.name)

    @property
    def label(self) -> str | None:
        """Of a run with one arm: its adapter's name; None for the base."""
        adapter = self.plan.get("adapter") or {}
        name = adapter.get("name") or adapter.get("ref")
        return str(name) if name else None


def open_run(root: Path) -> RunResult:
    """Read a run folder: its plan, and which of its steps have ended.

    Raises:
        UserError: the folder is not a run; names near ones that are.
        CorruptionError: a file of it is damaged.
    """
    if not (root / "plan.json").is_file():
        raise _not_a_run(root)
    plan = read_json(root / "plan.json")
    if isinstance(plan, dict) and "study" in plan:
        raise UserError(str(root), "is a study, with a run for every base", "`harness report` shows all of them.")
    return run_of(root, plan)


class StepFolders:
    """The step folders of a run by the ends of their names, from one scan: a study has thousands."""

    def __init__(self, root: Path) -> None:
        """Scan ``root/steps``, which need not be there."""
        self.root = root
        self._by_end: dict[str, list[str]] = {}
        if (root / "steps").is_dir():
            with os.scandir(root / "steps") as entries:
                for entry in entries:
                    self._by_end.setdefault(entry.name.rpartition("-")[2], []).append(entry.name)

    def of(self, kind: str, step_id: str) -> list[Path]:
        """Folders that a step of this kind and id may lie in."""
        names = sorted(name for name in self._by_end.get(step_id[:12], ()) if name.startswith(f"{kind}-"))
        return [self.root / "steps" / name for name in names]


def run_of(root: Path, plan: Mapping[str, Any], folders: StepFolders | None = None) -> RunResult:
    """The run that a plan describes, from the records in a folder; ``folders``: its steps, where they are known.

    Raises:
        CorruptionError: the plan is none, or a record is damaged.
    """
    folders = folders or StepFolders(root)
    try:
        tasks = tuple(_task(folders, {**task, "template": _template(plan, task)}) for task in plan["tasks"])
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptionError(f"{root / 'plan.json'}: not a plan ({error!r}); start over with --fresh") from None
    return RunResult(root, plan, tasks)


def stream_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows one at a time: a whole file of five-shot prompts with token ids would fill the memory.

    Raises:
        CorruptionError: the file is torn or corrupted.
    """
    try:
        with gzip.open(path, "rb") as stream:
            for line in stream:
                yield json.loads(line)
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise CorruptionError(f"{path}: damaged ({error}); start over with --fresh") from None


def _template(plan: Mapping[str, Any], task: Mapping[str, Any]) -> str | None:
    """Digest of a task's chat template; plans written before tasks named it do so for their arm or their one model."""
    if task.get("variant") != "chat" or "template" in task:
        return task.get("template")
    arm = next((arm for arm in plan.get("arms") or () if arm["name"] == task.get("arm")), plan.get("model") or {})
    digest: str | None = arm.get("template_digest")
    return digest


def _as_recorded(path: Path, digest: str | None) -> list[dict[str, Any]] | None:
    """The rows of a file whose text is the very one recorded, without writing each anew; None: look closer."""
    try:
        text = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error):
        return None
    if digest is None or hashlib.sha256(text).hexdigest() != digest:
        return None
    return list(json.loads(b"[" + b",".join(text.splitlines()) + b"]"))


def _task(folders: StepFolders, info: Mapping[str, Any]) -> TaskResult:
    answers = info.get("answers")
    return TaskResult(
        info=info,
        answers=read_step(folders, "answers", str(answers)) if answers else None,
        scores=tuple(read_step(folders, "scores", str(step_id)) for step_id in info.get("scores", ())),
    )


def read_step(folders: StepFolders, kind: str, step_id: str) -> StepResult:
    """One step of a run, which may not have begun.

    Raises:
        CorruptionError: its record is damaged, or a file is not what the record says.
    """
    root = folders.root
    for folder in folders.of(kind, step_id):
        if not (folder / "step.json").is_file():
            continue
        info = read_json(folder / "step.json")
        if info.get("id") != step_id:
            continue
        status = folder / "status.json"
        try:
            record = StepRecord.model_validate(read_json(status)) if status.is_file() else None
        except ValidationError as error:
            raise CorruptionError(f"{status}: damaged ({error.error_count()} problems); run it again") from None
        for name, digest in record.files.items() if record is not None else ():
            # What an earlier stage of an alignment has left is no part of what it made, and lies beside its record.
            inside = folder / "artifact" / name
            file = inside if inside.parent.is_dir() else folder / name
            if not file.is_file() or digest_of_bytes(file.read_bytes()) != digest:
                raise CorruptionError(f"{file}: does not hold what status.json recorded; run the same command again")
        return StepResult(root, step_id, folder, info, record)
    return StepResult(root, step_id, None, {}, None)


def _not_a_run(root: Path) -> UserError:
    """The error for a folder without plan.json; suggests the run that was probably meant."""
    near: list[Path] = []
    if (root.parent / "plan.json").is_file():
        near = [root.parent]  # the report or steps folder of a run
    elif root.is_dir():
        near = sorted(child.parent for child in root.glob("*/plan.json"))[:3]
    if not near and root.parent.is_dir():
        beside = [child.parent.name for child in root.parent.glob("*/plan.json")]
        near = [root.parent / name for name in nearest(root.name, beside)]
    seen = "is not a run: it has no plan.json" if root.is_dir() else "there is no such folder"
    known = "Give a folder that `harness eval --out` wrote, or a log of lm-eval, inspect or AlpacaEval."
    meant = f"Did you mean {' or '.join(repr(str(path)) for path in near)}? " if near else ""
    return UserError(str(root), seen, meant + known)

"""lm-eval's `samples_*.jsonl`: one line per sample and filter, each held against the others."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.core.errors import CorruptionError, UserError
from harness.core.records import Output
from harness.report.read import Texts

HASHES = ("doc_hash", "prompt_hash", "target_hash")


@dataclass(frozen=True)
class Samples:
    """The samples of one task; no rows where there is no file."""

    task: str
    leaf: str | None
    file: Path | None
    rows: dict[str, dict[str, Any]]
    questions: dict[str, str]


def metric_name(metric: str, kept: str) -> str:
    """A metric's name, with lm-eval's filter where there is one."""
    return metric if kept == "none" else f"{metric},{kept}"


def read_samples(file: Path, task: str, leaf: str | None, wanted: Collection[str]) -> Samples:
    """Read one file: the numbers of ``wanted`` by sample, and a digest of every question.

    Raises:
        UserError: a sample is there twice, lacks a number that others have, or has no hashes.
        CorruptionError: a line is torn.
    """
    rows: dict[str, dict[str, Any]] = {}
    questions: dict[str, str] = {}
    seen: dict[tuple[str, str], int] = {}
    for line, row in sample_lines(file):
        where = f"{file}:{line}"
        if "doc_id" not in row or not all(isinstance(row.get(name), str) for name in HASHES):
            fix = "lm-eval writes doc_id, doc_hash, prompt_hash and target_hash since 0.4.3; evaluate again with it."
            raise UserError(where, f"has no {' or no '.join(n for n in ('doc_id', *HASHES) if n not in row)}", fix)
        key, kept = _sample_id(row, leaf), str(row.get("filter") or "none")
        first = seen.setdefault((key, kept), line)
        if first != line:
            raise UserError(
                where,
                f"doc_id {row['doc_id']} is in it twice (filter {kept}; first in line {first})",
                "A second run was appended, or several processes wrote it: every mean over it would count some "
                "samples twice. Evaluate again into an empty folder.",
            )
        digest = hashlib.sha256("".join(row[name] for name in HASHES).encode()).hexdigest()
        if questions.setdefault(key, digest) != digest:
            raise UserError(where, f"doc_id {row['doc_id']} has other hashes than in another line", "Evaluate again.")
        sample = rows.setdefault(key, {"id": key, "leaf": leaf, "values": {}, "reason": None})
        for metric in row.get("metrics") or ():
            name = metric_name(str(metric), kept)
            if name in wanted:
                sample["values"][name], why = _value(row.get(metric))
                if why is not None and sample["reason"] is None:
                    sample["reason"] = f"{name}: {row.get('unscored') or why}"
    # What no sample has is a number of the whole alone; what some have, all must.
    given = {name for sample in rows.values() for name in sample["values"]}
    for key, sample in rows.items():
        if lost := sorted(given - sample["values"].keys()):
            fix = "The file was cut off, or lines were taken out: evaluate again."
            raise UserError(str(file), f"sample {key} of {task} has no {', '.join(lost)}", fix)
    return Samples(task, leaf, file, rows, questions)


def _sample_id(row: Mapping[str, Any], leaf: str | None) -> str:
    return str(row["doc_id"]) if leaf is None else f"{leaf}/{row['doc_id']}"


def _value(value: Any) -> tuple[float | None, str | None]:
    """A sample's number; None with the reason where it is none."""
    if value is None:
        return None, "no value"
    if not isinstance(value, int | float):
        return None, "the value of a sample is no number, but part of one"
    return (float(value), None) if math.isfinite(value) else (None, f"lm-eval recorded {float(value)!r}")


def texts_of(files: tuple[tuple[Path, str | None], ...], ids: Collection[str]) -> dict[str, Texts]:
    """Prompt, target and answers of some samples, read again: five-shot prompts would fill the memory."""
    wanted = set(ids)
    found: dict[str, Texts] = {}
    for file, leaf in files:
        if not wanted - found.keys():
            break
        for _, row in sample_lines(file):
            key = _sample_id(row, leaf)
            if key in wanted and key not in found:
                found[key] = _text(row)
    return found


def _text(row: Mapping[str, Any]) -> Texts:
    requests, outputs = [], []
    answers = row.get("resps") or []
    for index, argument in enumerate((row.get("arguments") or {}).values()):
        prompt, second = argument.get("arg_0"), argument.get("arg_1")
        answer = answers[index] if index < len(answers) else None
        while isinstance(answer, list) and len(answer) == 1:
            answer = answer[0]
        if isinstance(second, str):
            requests.append({"kind": "loglikelihood", "prompt": prompt, "continuation": second})
            value = answer[0] if isinstance(answer, list) and answer else answer
            outputs.append(Output(logprob=_float(value)))
        else:
            requests.append({"kind": "generate", "prompt": prompt, "decoding": second or {}})
            text = "\n".join(map(str, answer)) if isinstance(answer, list) else str(answer)
            outputs.append(Output(text=text))
    target = row.get("target")
    prompt = str(requests[0]["prompt"]) if requests else json.dumps(row.get("doc"), ensure_ascii=False)
    return Texts(prompt, None if target is None else str(target), tuple(requests), tuple(outputs))


def _float(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def sample_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Lines of a samples file with their numbers.

    Raises:
        CorruptionError: a line is torn.
    """
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise CorruptionError(f"{file}:{number}: damaged ({error})\n  Evaluate again.") from None
            if not isinstance(row, dict):
                raise CorruptionError(f"{file}:{number}: not a sample, but {type(row).__name__}\n  Evaluate again.")
            yield number, row

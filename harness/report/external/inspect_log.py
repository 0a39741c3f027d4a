"""inspect's logs, `.eval` and `.json`, read by inspect_ai itself (the extra `inspect`).

A sample answered in several epochs is one prompt with several answers: its score is inspect's reduction of them (their
mean, as a rule), so that n counts prompts, and standard errors and tests see each prompt once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from harness.core.errors import CorruptionError, UserError
from harness.core.records import Output, digest_of
from harness.report.external.made import Logged, Reported, run_of_log, task_of
from harness.report.read import RunResult, Texts

PROGRAM = "inspect"
_SPREAD = ("stderr", "bootstrap_stderr", "std", "var")
"""Metrics that say how far the others vary: of that the report has its own."""
_MEANS = ("accuracy", "mean")
_WORDS = ("c", "i", "p", "n", "yes", "no", "true", "false")
_NOT_ASKED = ("max_connections", "max_retries", "timeout", "attempt_timeout", "batch", "cache", "adaptive_connections")
"""Settings of a generation that cannot move an answer."""


def read_inspect(path: Path) -> RunResult:
    """Read a log, or a folder with a log for each task of one model.

    Raises:
        UserError: inspect_ai is not installed; a log did not end well, lacks samples, has one twice, or holds no
            number; a folder holds logs of several models, or two of one task.
        CorruptionError: a log is torn.
    """
    files = [path] if path.is_file() else log_files(path)
    logs = [(file, _read(file)) for file in files]
    models = sorted({str(log.eval.model) for _, log in logs})
    names = [str(log.eval.task) for _, log in logs]
    if len(models) > 1 or len(set(names)) < len(names):
        what = f"models {', '.join(models)}" if len(models) > 1 else "more than one log of one task"
        shown = ", ".join(repr(str(file)) for file in files[:6])
        raise UserError(str(path), f"holds logs of {what}", f"Give one log: {shown}.")
    spec = logs[0][1].eval
    args = {key: value for key, value in (spec.model_args or {}).items() if value is not None}
    plan = {
        "source": PROGRAM,
        "model": {"name": models[0], "ref": models[0]},
        "adapter": None,
        # Whether two providers serve one model alike is not to be known: the provider is part of the model's name.
        "engine": {"name": PROGRAM},
        "spec": {"model": {"dtype": None, "args": json.dumps(args, sort_keys=True, default=str) if args else None}},
    }
    return run_of_log(files[0].parent, plan, [task_of(_logged(file, log)) for file, log in logs])


def log_files(folder: Path) -> list[Path]:
    """The logs of a folder, oldest first (their names begin with the time)."""
    named = [*folder.glob("*.eval"), *(file for file in folder.glob("*.json") if is_log(file))]
    return sorted(named)


def is_log(file: Path) -> bool:
    """Whether a JSON file begins as inspect's logs do."""
    with file.open("rb") as stream:
        head = stream.read(400).decode(errors="replace").replace(" ", "").replace("\n", "")
    return head.startswith('{"version":') and '"status":' in head and '"eval":{' in head


def _read(file: Path) -> Any:
    try:
        from inspect_ai.log import read_eval_log
    except ImportError:
        raise UserError(
            str(file), "is a log of inspect, and inspect_ai is not installed", "pip install 'harness-align[inspect]'"
        ) from None
    try:
        log = read_eval_log(str(file))
    except Exception as error:  # zip, JSON and pydantic each raise their own, and some programs bare ones
        raise CorruptionError(
            f"{file}: inspect_ai cannot read it ({type(error).__name__}: {error})\n  Evaluate again."
        ) from None
    if log.status != "success":
        why = f": {log.error.message}" if log.error is not None else ""
        fix = f"A part of the samples shows nothing of the whole: continue it with `inspect eval-retry {file}`."
        raise UserError(str(file), f"the evaluation did not end: its status is {log.status!r}{why}", fix)
    if log.invalidated:
        raise UserError(
            str(file), "samples of it were marked as invalid", f"Run them again: `inspect eval-retry {file}`."
        )
    if log.results is None or not log.results.scores:
        raise UserError(str(file), "holds no score", f"Score it with `inspect score {file}`, then give the new log.")
    return log


def _logged(file: Path, log: Any) -> Logged:
    spec, epochs = log.eval, int(log.eval.config.epochs or 1)
    by_id: dict[str, list[Any]] = {}
    seen: set[tuple[str, int]] = set()
    for sample in log.samples or ():
        key = str(sample.id)
        if (key, sample.epoch) in seen:
            fix = "Every mean over it would count it twice: evaluate again."
            raise UserError(str(file), f"sample {key!r} is in it twice (epoch {sample.epoch})", fix)
        seen.add((key, sample.epoch))
        by_id.setdefault(key, []).append(sample)
    if log.samples is not None and len(seen) != log.results.total_samples:
        what = f"holds {len(seen):,} samples, and its results count {log.results.total_samples:,}"
        raise UserError(str(file), what, "Samples are missing: evaluate again.")
    questions = {key: _question(file, key, samples) for key, samples in by_id.items()}
    rows: dict[str, dict[str, Any]] = {
        key: {
            "id": key,
            "leaf": None,
            "values": {},
            "reason": next((f"errored: {one.error.message}" for one in samples if one.error is not None), None),
            "hit_limit": any(_stopped(one) for one in samples),
        }
        for key, samples in by_id.items()
    }
    reported = [one for score in log.results.scores for one in _numbers(log, score, by_id, rows, epochs)]
    cut = len(by_id) if spec.config.limit is not None or spec.config.sample_id is not None else None
    errors = sum(sample.error is not None for samples in by_id.values() for sample in samples)
    version = spec.task_version if isinstance(spec.task_version, int) else None
    return Logged(
        where=file,
        program=PROGRAM,
        model=str(spec.model),
        name=str(spec.task),
        reported=reported,
        samples=rows,
        info={
            "variant": "chat",
            "version": version,
            "limit": cut,
            "source": str(spec.dataset.name or spec.dataset.location or ""),
            "asked": {**_asked(log, epochs), **({} if version is not None else {"task version": spec.task_version})},
            "questions": questions,
        },
        scorer=json.loads(json.dumps([one.model_dump(mode="json") for one in spec.scorers or ()], default=str)),
        texts=partial(_texts, by_id),
        provenance={"libraries": dict(spec.packages), "created": str(spec.created)},
        notes=(f"{errors:,} of {len(seen):,} samples errored: unscored, not counted as 0",) if errors else (),
    )


def _numbers(
    log: Any, score: Any, by_id: Mapping[str, list[Any]], rows: Mapping[str, dict[str, Any]], epochs: int
) -> Iterator[Reported]:
    """The metrics of one scorer; fills in the samples' values."""
    metrics = {name: metric for name, metric in score.metrics.items() if metric.name not in _SPREAD}
    spread = next((metric for metric in score.metrics.values() if metric.name in _SPREAD[:2]), None)
    values, unreadable = _values(log, score, by_id)
    reduced = score.reducer not in (None, "mean")
    notes = []
    if epochs > 1:
        how = f"inspect's {score.reducer or 'mean'!s} of its answers"
        notes.append(f"{epochs} answers to each of {len(by_id):,} prompts; n counts prompts, a score is {how}")
    if unreadable:
        shown = ", ".join(sorted(map(repr, unreadable))[:3])
        notes.append(f"inspect counts {len(unreadable):,} values that are no number as 0 ({shown})")
    if spread is not None and spread.params.get("cluster"):
        notes.append(f"inspect's standard error is clustered by {spread.params['cluster']!r}; the tests here are not")
    declared = json.dumps([one.model_dump(mode="json") for one in log.eval.scorers or ()], default=str)
    built_in = {name for name in _MEANS if f'"inspect_ai/{name}", "options": {{}}' in declared}
    averaged = not unreadable and (epochs == 1 or score.reducer is not None)
    for index, (name, metric) in enumerate(metrics.items()):
        label = f"{score.name}/{name}" + (f" ({score.reducer})" if reduced else "")
        for key, value in values.items():
            rows[key]["values"][label] = value
            if value is None and rows[key]["reason"] is None:
                rows[key]["reason"] = f"{score.name}: {_why(by_id[key], score)}"
        direction = True if metric.name == "accuracy" else None
        unknown = () if direction else ("inspect does not say whether higher is better",)
        yield Reported(
            metric=label,
            mean=float(metric.value),
            stderr=float(spread.value) if spread is not None and math.isfinite(spread.value) else None,
            n=score.scored_samples,
            aggregation="mean" if averaged and metric.name in built_in else None,
            higher_is_better=direction,
            primary=index == 0,
            notes=(*notes, *unknown),
        )


def _values(log: Any, score: Any, by_id: Mapping[str, list[Any]]) -> tuple[dict[str, float | None], list[Any]]:
    """Sample id -> its value in one score, over its epochs; and the values that inspect counts as 0 for being none."""
    unreadable: list[Any] = []
    if score.reducer not in (None, "mean"):
        found: dict[str, float | None] = dict.fromkeys(by_id)
        for reduction in log.reductions or ():
            if reduction.reducer == score.reducer and reduction.scorer in (score.name, score.scorer):
                for one in reduction.samples:
                    found[str(one.sample_id)] = _number(_part(one.value, score), unreadable)
        return found, unreadable
    values: dict[str, float | None] = {}
    for key, samples in by_id.items():
        each = [_number(_score_of(sample, score), unreadable) for sample in samples]
        scored = [value for value in each if value is not None]
        values[key] = math.fsum(scored) / len(scored) if scored else None
    return values, unreadable


def _score_of(sample: Any, score: Any) -> Any:
    scores = sample.scores or {}
    found = scores.get(score.name) or scores.get(score.scorer)
    return None if found is None else _part(found.value, score)


def _part(value: Any, score: Any) -> Any:
    """The value of a score; of a scorer that gives several, the one that this score is named by."""
    return value.get(score.name) if isinstance(value, Mapping) else value


def _number(value: Any, unreadable: list[Any]) -> float | None:
    """A score as inspect reads it (C, I, P, N among others); None for one that is marked as unscored."""
    from inspect_ai.scorer import value_to_float

    if value is None:
        return None
    if isinstance(value, str) and value.lower() not in _WORDS:
        try:
            number = float(value)
        except ValueError:
            unreadable.append(value)
            return None
    elif isinstance(value, str | int | float):
        number = value_to_float()(value)
    else:
        unreadable.append(value)
        return None
    return number if math.isfinite(number) else None


def _why(samples: list[Any], score: Any) -> str:
    """Why a prompt has no score."""
    for sample in samples:
        found = (sample.scores or {}).get(score.name) or (sample.scores or {}).get(score.scorer)
        if found is not None and (found.reason or found.explanation):
            return str(found.reason or found.explanation)
    return "inspect left it unscored"


def _asked(log: Any, epochs: int) -> dict[str, Any]:
    """What was asked besides the samples' own words, so far as it can move a number."""
    spec = log.eval
    generation = {
        **spec.model_generate_config.model_dump(mode="json", exclude_none=True),
        **log.plan.config.model_dump(mode="json", exclude_none=True),
    }
    return {
        "solver": [[step.solver, json.loads(json.dumps(step.params, default=str))] for step in log.plan.steps],
        "generation": {key: value for key, value in generation.items() if key not in _NOT_ASKED},
        "task arguments": json.loads(json.dumps(spec.task_args, default=str)),
        "epochs": epochs,
        "limits": [
            spec.config.message_limit,
            spec.config.token_limit,
            spec.config.time_limit,
            spec.config.working_limit,
        ],
    }


def _question(file: Path, key: str, samples: list[Any]) -> str:
    digests = {digest_of([_input(one.input), one.choices, one.target]) for one in samples}
    if len(digests) > 1:
        what = f"sample {key!r} has other words in one epoch than in another"
        raise UserError(str(file), what, "Two data sets were joined under one id: evaluate again.")
    return digests.pop()


def _input(given: Any) -> Any:
    """The input without the ids that inspect draws for messages."""
    if isinstance(given, str):
        return given
    return [one.model_dump(mode="json", exclude={"id"}, exclude_none=True) for one in given]


def _stopped(sample: Any) -> bool:
    choices = sample.output.choices if sample.output is not None else ()
    return sample.limit is not None or any(one.stop_reason in ("max_tokens", "model_length") for one in choices)


def _texts(by_id: Mapping[str, list[Any]], ids: Collection[str]) -> dict[str, Texts]:
    found = {}
    for key in ids:
        if key not in by_id:
            continue
        samples = by_id[key]
        first = samples[0]
        given = first.input
        prompt = given if isinstance(given, str) else "\n\n".join(f"{one.role}: {one.text}" for one in given)
        target = first.target if isinstance(first.target, str) else "\n".join(first.target)
        outputs = tuple(
            Output(text=one.output.completion or "", error=None if one.error is None else str(one.error.message))
            for one in samples
        )
        found[key] = Texts(prompt, target, tuple({"kind": "generate"} for _ in samples), outputs)
    return found

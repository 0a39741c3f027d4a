"""lm-eval's output: `results_*.json`, and beside it `samples_*.jsonl` where it was asked for with `--log_samples`.

Samples are told apart by `doc_id` (and the subtask, within a group). Whether they are the same question in two logs is
decided by the hashes that lm-eval wrote of document, prompt and target.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from harness.core.errors import CorruptionError, UserError
from harness.report.external.lm_eval_samples import HASHES, Samples, metric_name, read_samples, sample_lines, texts_of
from harness.report.external.made import Logged, Reported, run_of_log, task_of
from harness.report.read import RunResult

PROGRAM = "lm-eval"
_DATED = re.compile(r"_(\d{4}-\d\d-\d\dT[\d.-]+)\.json$")
_NAMES = ("peft", "delta", "pretrained", "model", "path", "engine")
"""Keys of model_args that name what is evaluated, as lm-eval itself looks for its name."""
_SAID_ELSEWHERE = (*_NAMES, "dtype")


def result_files(folder: Path) -> list[Path]:
    """The result files of a folder, or of the model folders in it, oldest first."""
    found = [file for pattern in ("results_*.json", "*/results_*.json") for file in folder.glob(pattern)]
    return sorted(found, key=lambda file: (file.parent, file.name))


def read_lm_eval(path: Path) -> RunResult:
    """Read a result file and its samples; of a folder the newest result file.

    Raises:
        UserError: a folder holds several models; samples are there twice, are missing, or are not those of the
            results; the log is too old to tell its questions apart.
        CorruptionError: a file is torn.
    """
    file, notes = (path, ()) if path.is_file() else _newest(path)
    results = _json(file)
    if not isinstance(results.get("results"), dict) or not isinstance(results.get("configs"), dict):
        raise UserError(str(file), "has no `results` and `configs`", "Give a results_*.json that lm-eval 0.4 wrote.")
    log = _Results(file, results)
    tasks = [task_of(one) for one in log.tasks()]
    if not tasks:
        raise UserError(str(file), "holds no number of any task", "Was it made with --predict_only? Evaluate without.")
    config = results.get("config") or {}
    plan = {
        "source": PROGRAM,
        "model": {"name": log.model, "ref": log.model},
        "adapter": None if log.adapter is None else {"name": log.adapter},
        "engine": {"name": str(config.get("model") or "unknown")},
        "spec": {
            "model": {"dtype": log.dtype, "args": _args_apart(config.get("model_args"))},
            "limit": None,
            "seed": config.get("random_seed"),
        },
        "left_out": dict.fromkeys(notes, "an older result file of the folder, not read; name it to read it"),
    }
    return run_of_log(file.parent, plan, tasks)


def _newest(folder: Path) -> tuple[Path, tuple[str, ...]]:
    files = result_files(folder)
    folders = sorted({file.parent for file in files})
    if len(folders) > 1:
        named = ", ".join(repr(str(one)) for one in folders[:6])
        raise UserError(str(folder), f"holds lm-eval results of {len(folders)} models", f"Give one of {named}.")
    return files[-1], tuple(file.name for file in files[:-1])


class _Results:
    """One result file, with what lies beside it."""

    def __init__(self, file: Path, results: dict[str, Any]) -> None:
        self.file, self.results = file, results
        config = results.get("config") or {}
        args = _args(config.get("model_args"))
        named = args.get("pretrained") or args.get("model") or args.get("path") or results.get("model_name")
        self.model = str(named or config.get("model") or "model")
        adapter = args.get("peft") or args.get("delta")
        self.adapter = None if adapter is None else str(adapter)
        dtype = config.get("model_dtype") or args.get("dtype")
        self.dtype = None if dtype is None else str(dtype).removeprefix("torch.")

    def tasks(self) -> Iterator[Logged]:
        """Groups that lm-eval gave a number for, each with its subtasks as leaves; then every other task."""
        subtasks: dict[str, list[str]] = self.results.get("group_subtasks") or {}
        numbers = {name for name in self.results["results"] if self._keys(name)}
        inside: set[str] = set()
        for group in [name for name in subtasks if not any(name in others for others in subtasks.values())]:
            leaves = [name for name in _leaves(group, subtasks) if name in numbers]
            if group in numbers and leaves and group not in leaves:
                made = self._group(group, leaves)
                if made is not None:
                    inside |= set(leaves)
                    yield made
        for name in self.results["results"]:
            if name in numbers and name not in inside and not subtasks.get(name):
                samples = self._samples(name, None)
                yield self._logged(name, [*self._reported(name)], [samples])

    def _group(self, group: str, leaves: list[str]) -> Logged | None:
        """A group as one task; None where none of its numbers is a mean over samples, so that its tasks stand alone."""
        read = [self._samples(leaf, leaf) for leaf in leaves]
        numbers = [*self._reported(group), *(one for leaf in leaves for one in self._reported(leaf, leaf=leaf))]
        made = self._logged(group, numbers, read)
        pairable = any(metric.aggregate == "mean" for step in task_of(made).scores for metric in step.metrics)
        return made if pairable else None

    def _logged(self, name: str, reported: list[Reported], read: list[Samples]) -> Logged:
        config = self.results.get("config") or {}
        sources = {str(self._config(one.task).get("dataset_path") or "") for one in read}
        chat = self.results.get("chat_template") is not None
        # Of a run of ours, which asks each task in its own way, the task says it.
        said = self._config(read[0].task).get("metadata") or {}
        version, whole = self._version(name)
        counts = [self._counts(one.task) for one in read]
        limits = [effective for original, effective in counts if effective is not None and effective != original]
        missing = [one.task for one in read if not one.rows]
        rows = {} if missing else {key: row for one in read for key, row in one.rows.items()}
        notes = [f"no samples of {', '.join(missing)}: means alone"] if missing and len(missing) < len(read) else []
        return Logged(
            where=self.file,
            program=PROGRAM,
            model=self.model,
            name=name,
            reported=reported,
            samples=rows,
            info={
                "variant": said.get("variant") or ("chat" if chat else "raw"),
                "template": said.get("template") or self.results.get("chat_template_sha"),
                "version": whole,
                "limit": max(limits) if limits else None,
                "source": ", ".join(sorted(sources - {""})),
                "asked": {**self._asked(read, chat), **({} if whole is not None else {"version": version})},
                "questions": {key: digest for one in read for key, digest in one.questions.items()},
            },
            scorer=[
                {key: self._config(one.task).get(key) for key in ("metric_list", "filter_list", "output_type")}
                | {"scorers": (self._config(one.task).get("metadata") or {}).get("scorers")}
                for one in read
            ],
            adapter=self.adapter,
            dtype=self.dtype,
            texts=partial(texts_of, tuple((one.file, one.leaf) for one in read if one.file is not None)),
            provenance={
                "libraries": {
                    "lm-eval": self.results.get("lm_eval_version"),
                    "transformers": self.results.get("transformers_version"),
                },
                "config": {key: value for key, value in config.items() if value is not None},
            },
            notes=tuple(notes),
        )

    def _config(self, task: str) -> Mapping[str, Any]:
        return self.results["configs"].get(task) or {}

    def _version(self, name: str) -> tuple[Any, int | None]:
        """The version of a task as it stands, and as the whole number that it mostly is."""
        said: Any = (self.results.get("versions") or {}).get(name)
        try:
            return said, int(float(said)) if float(said).is_integer() else None
        except (TypeError, ValueError):
            return said, None

    def _asked(self, read: list[Samples], chat: bool) -> dict[str, Any]:
        """What was asked besides the prompts, so far as it can move a number."""
        shots = self.results.get("n-shot") or {}
        configs = [self._config(one.task) for one in read]
        return {
            "num_fewshot": [shots.get(one.task, self._config(one.task).get("num_fewshot")) for one in read],
            "system instruction": self.results.get("system_instruction_sha"),
            "few-shot as turns": self.results.get("fewshot_as_multiturn") if chat else None,
            "generation": [config.get("generation_kwargs") for config in configs],
            "repeats": [config.get("repeats", 1) for config in configs],
        }

    def _counts(self, task: str) -> tuple[int | None, int | None]:
        counts = (self.results.get("n-samples") or {}).get(task) or {}
        return counts.get("original"), counts.get("effective")

    def _keys(self, name: str) -> dict[str, tuple[str, str]]:
        """Key of a number in the results -> (metric, filter)."""
        found = {}
        for key, value in self.results["results"][name].items():
            metric, _, kept = key.partition(",")
            plain = metric in ("alias", "name", "sample_len", "sample_count", "samples", "bypass", " ")
            if not plain and not metric.endswith("_stderr") and (_is_number(value) or value == "N/A"):
                found[key] = (metric, kept or "none")
        return found

    def _reported(self, name: str, *, leaf: str | None = None) -> Iterator[Reported]:
        results = self.results["results"][name]
        directions = (self.results.get("higher_is_better") or {}).get(name) or {}
        declared = {one.get("metric"): one for one in self._config(name).get("metric_list") or ()}
        counts = [self._counts(task)[1] for task in _leaves(name, self.results.get("group_subtasks") or {})]
        for key, (metric, kept) in self._keys(name).items():
            said = declared.get(metric, {})
            direction = directions.get(metric, said.get("higher_is_better"))
            stderr = results.get(f"{metric}_stderr{key[len(metric) :]}")
            yield Reported(
                metric=metric_name(metric, kept),
                mean=float(results[key]) if _is_number(results[key]) else None,
                stderr=float(stderr) if _is_number(stderr) and math.isfinite(stderr) else None,
                leaf=leaf,
                n=None if None in counts else sum(count or 0 for count in counts),
                aggregation=said.get("aggregation") if isinstance(said.get("aggregation"), str) else None,
                higher_is_better=direction if isinstance(direction, bool) else None,
                notes=() if isinstance(direction, bool) else ("lm-eval does not say whether higher is better",),
            )

    def _samples(self, task: str, leaf: str | None) -> Samples:
        dated = _DATED.search(self.file.name)
        file = self.file.with_name(f"samples_{task}_{dated[1]}.jsonl") if dated else None
        if file is None or not file.is_file():
            return Samples(task, leaf, None, {}, {})
        wanted = {metric_name(metric, kept) for metric, kept in self._keys(task).values()}
        read = read_samples(file, task, leaf, wanted)
        expected = self._counts(task)[1]
        if expected is not None and expected != len(read.rows):
            raise UserError(
                str(file),
                f"holds {len(read.rows):,} samples, and {self.file.name} counts {expected:,}",
                "Samples are missing or another run's are among them: evaluate again.",
            )
        self._check_hash(file, task)
        return read

    def _check_hash(self, file: Path, task: str) -> None:
        """Hold the samples against the hash that lm-eval left of theirs in the results."""
        said = (self.results.get("task_hashes") or {}).get(task)
        if said is None:
            return
        whole = hashlib.sha256()
        for _, row in sample_lines(file):
            whole.update("".join(str(row.get(name)) for name in HASHES).encode())
        if whole.hexdigest() != said:
            raise UserError(
                str(file),
                f"its questions are not those that {self.file.name} was made from (task_hashes differ)",
                "The two files are of different runs, or one was changed: evaluate again.",
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _leaves(name: str, subtasks: Mapping[str, list[str]]) -> list[str]:
    """The tasks below a group, each once; a task itself."""
    children = subtasks.get(name) or ()
    return list(dict.fromkeys(leaf for child in children for leaf in _leaves(child, subtasks))) if children else [name]


def _args(given: Any) -> dict[str, Any]:
    if isinstance(given, Mapping):
        return dict(given)
    pairs = (part.partition("=") for part in str(given or "").split(",") if "=" in part)
    return {key.strip(): value for key, _, value in pairs}


def _args_apart(given: Any) -> str | None:
    """model_args without what names the model and its type, in one line."""
    left = {key: value for key, value in _args(given).items() if key not in _SAID_ELSEWHERE}
    return ", ".join(f"{key}={value}" for key, value in sorted(left.items())) or None


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CorruptionError(f"{file}: damaged ({error})\n  Evaluate again.") from None
    return found if isinstance(found, dict) else {}

"""A run of ours in lm-eval's files, so that what reads those (its tables, viewers and trackers) reads us.

One folder for each arm, as lm-eval names it: `results_DATE.json`, and `samples_TASK_DATE.jsonl` where asked for. What
lm-eval has no place for is left out (intervals, truncation) or stands where its readers do not look (`unscored`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from harness.core.errors import UserError
from harness.core.records import Metric, Row
from harness.core.text import portable, task_label
from harness.core.version import __version__
from harness.report.external.open import open_log
from harness.report.pairing import check_ended
from harness.report.read import RunResult, StepResult, TaskResult, Texts
from harness.report.study import open_runs
from harness.steps.files import write_bytes

_OUTPUT_TYPES = {"generate": "generate_until", "loglikelihood": "multiple_choice"}
"""What lm-eval calls a task by what it asks for; None where a run holds no requests (a published one)."""
_SHOTS = re.compile(r"@(\d+)$")


def write_lm_eval(root: Path, out: Path, *, samples: bool = False, now: datetime | None = None) -> list[Path]:
    """Write every arm of a run, or of a study, into a folder of its own under ``out``; returns the result files.

    Args:
        root: a run folder of ours.
        out: gets a folder for each arm; nothing in it is overwritten.
        samples: also prompts, answers and scores of every sample. They can hold red-team text.
        now: the date of the files.

    Raises:
        UserError: no run of ours, or one that has not ended; the texts of samples are asked for and not there.
    """
    if open_log(root) is not None:
        raise UserError(str(root), "is a log of another program", "Give a folder that `harness eval --out` wrote.")
    runs = list(open_runs(root).values())
    for run in runs:
        check_ended(run)
    moment = now or datetime.now()
    written: list[Path] = []
    for run in runs:
        for arm in run.arms:
            made = _Arm(arm, moment)
            if any(file.parent.name == made.folder for file in written):
                fix = "Give one of them another name, or export their runs one by one."
                raise UserError(str(root), f"has two arms that lm-eval would call {made.folder!r}", fix)
            texts = {name: lines for task in made.parts for name, lines in made.samples(task)} if samples else {}
            folder = out / made.folder
            for name, lines in texts.items():
                body = "".join(json.dumps(line, ensure_ascii=True) + "\n" for line in lines)
                write_bytes(folder / f"samples_{name}_{made.date}.jsonl", body.encode())
            body = json.dumps(made.results(texts), indent=2, ensure_ascii=True)
            # Written last: where it stands, its samples do.
            write_bytes(folder / f"results_{made.date}.json", body.encode())
            written.append(folder / f"results_{made.date}.json")
    return written


class _Arm:
    """One arm as lm-eval would have called its parts."""

    def __init__(self, run: RunResult, moment: datetime) -> None:
        self.run, self.date, self.moment = run, moment.isoformat().replace(":", "-"), moment
        model, adapter = run.plan.get("model") or {}, run.plan.get("adapter") or {}
        self.model = str(portable(model.get("ref") or model.get("name") or "model"))
        self.adapter = str(portable(adapter.get("ref") or adapter.get("name"))) if adapter else None
        # lm-eval's own rule for folders, of the name that it calls a model by.
        self.folder = re.sub(r'["<>:/|\\?*\[\]\s]+', "__", run.name)
        self.parts = [task for task in run.tasks if not task.failed()]
        names = Counter(task.name for task in self.parts)
        labels = Counter((task.name, task.variant) for task in self.parts)
        self.names = {}
        for task in self.parts:
            label = task_label(task.name, task.variant).replace(":", "-")
            if labels[task.name, task.variant] > 1:  # a base that was asked in the templates of several arms
                label += f"-{(task.template or 'none')[:8]}"
            self.names[id(task)] = task.name if names[task.name] == 1 else label
        leaves = Counter(leaf for task in self.parts for leaf in _leaves(task))
        self.leaf_names = {
            (id(task), leaf): leaf if leaves[leaf] == 1 else f"{self.names[id(task)]}_{leaf}"
            for task in self.parts
            for leaf in _leaves(task)
        }

    def results(self, samples: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
        """The result file."""
        found: dict[str, Any] = {"results": {}, "groups": {}, "group_subtasks": {}, "configs": {}, "versions": {}}
        found |= {"n-shot": {}, "higher_is_better": {}, "n-samples": {}}
        for task in self.parts:
            name, leaves = self.names[id(task)], _leaves(task)
            self._numbers(found, task, name, None)
            if leaves:
                found["groups"][name] = found["results"][name]
                found["group_subtasks"][name] = [self.leaf_names[id(task), leaf] for leaf in leaves]
            for leaf in leaves:
                self._numbers(found, task, self.leaf_names[id(task), leaf], leaf)
        spec = self.run.plan.get("spec") or {}
        dtype = next((row.dtype for task in self.parts for step in task.scores for row in step.rows), None)
        args = [f"pretrained={self.model}", *([f"peft={self.adapter}"] if self.adapter else [])]
        return {
            **found,
            "config": {
                "model": str((self.run.plan.get("engine") or {}).get("name") or "unknown"),
                "model_args": ",".join(args),
                "model_dtype": dtype,
                "limit": spec.get("limit"),
                "random_seed": spec.get("seed"),
            },
            "git_hash": None,
            "date": self.moment.timestamp(),
            "harness_version": __version__,
            "task_hashes": {name: _hash("".join(_hashes(lines))) for name, lines in samples.items()},
            "model_source": "harness",
            "model_name": self.run.name,
            "model_name_sanitized": self.folder,
            "system_instruction": None,
            "system_instruction_sha": None,
            "fewshot_as_multiturn": None,
            "chat_template": None,
            "chat_template_sha": None,
        }

    def _numbers(self, found: dict[str, Any], task: TaskResult, name: str, leaf: str | None) -> None:
        by_step = [(step, row) for step in task.scores for row in step.rows if row.leaf == leaf]
        rows = [row for _, row in by_step]
        numbers: dict[str, Any] = {"name": name, "alias": name}
        counts = {row.n + row.n_unscored for row in rows}
        numbers["sample_len"] = max(counts, default=0)
        for row, kept in _with_filters(by_step):
            shown = row.mean is not None and row.withheld is None
            numbers[f"{row.metric},{kept}"] = row.mean if shown else "N/A"
            numbers[f"{row.metric}_stderr,{kept}"] = row.stderr if shown and row.stderr is not None else "N/A"
        found["results"][name] = numbers
        found["versions"][name] = task.info.get("version")
        shots = _SHOTS.search(task.name)
        if shots:
            found["n-shot"][name] = int(shots[1])
        found["higher_is_better"][name] = {row.metric: row.higher_is_better for row in rows}
        if leaf is None and _leaves(task):
            return
        found["n-samples"][name] = {"original": numbers["sample_len"], "effective": numbers["sample_len"]}
        corpus = {metric.name for step in task.scores for metric in step.metrics if metric.aggregate == "corpus"}
        found["configs"][name] = {
            "task": name,
            "dataset_path": task.info.get("source"),
            "num_fewshot": int(shots[1]) if shots else None,
            "output_type": _OUTPUT_TYPES.get(
                str(next((step.first_request().get("kind") for step in task.scores), None))
            ),
            "metric_list": [
                {
                    "metric": row.metric,
                    "aggregation": "corpus" if row.metric in corpus else "mean",
                    "higher_is_better": row.higher_is_better,
                }
                for row in rows
            ],
            "metadata": {
                "version": task.info.get("version"),
                "variant": task.variant,
                "template": task.template,
                "scorers": [portable(step.identity.get("scorer")) for step in task.scores],
            },
        }

    def samples(self, task: TaskResult) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """Lines of every samples file of a task, by its name in lm-eval's sense."""
        first = task.scores[0]
        texts = first.texts(first.samples)
        lost = len(first.samples.keys() - texts.keys())
        if lost:
            raise UserError(
                str(self.run.root),
                f"holds no texts of {lost:,} samples of {task.name} (a published run holds none)",
                "Leave --samples out: the results are written without them.",
            )
        files: dict[str, list[dict[str, Any]]] = {}
        for metrics, kept in _by_filter(task):
            for position, (key, sample) in enumerate(first.samples.items()):
                leaf = sample.get("leaf")
                name = self.names[id(task)] if leaf is None else self.leaf_names[id(task), leaf]
                line = _line(position, key, leaf, texts[key])
                values = {metric.name: step.samples[key]["values"].get(metric.name) for step, metric in metrics}
                reasons = {step.samples[key].get("reason") for step, _ in metrics} - {None}
                unscored = {"unscored": "; ".join(sorted(map(str, reasons)))} if reasons else {}
                files.setdefault(name, []).append({**line, "filter": kept, "metrics": [*values], **unscored, **values})
        yield from files.items()


def _leaves(task: TaskResult) -> list[str]:
    return list(dict.fromkeys(row.leaf for step in task.scores for row in step.rows if row.leaf is not None))


def _filter_of(step: StepResult) -> str:
    """The scorer; who was asked, too, where several judge."""
    judge, wording = step.info.get("judge"), step.info.get("wording")
    return "-".join(str(part) for part in (step.info.get("scorer"), judge, wording) if part is not None)


def _with_filters(rows: list[tuple[StepResult, Row]]) -> list[tuple[Row, str]]:
    """lm-eval tells numbers of one name apart by filter; here the scorer does, where two give a metric of one name."""
    seen: set[str] = set()
    found = []
    for step, row in rows:
        found.append((row, "none" if row.metric not in seen else _filter_of(step)))
        seen.add(row.metric)
    return found


def _by_filter(task: TaskResult) -> list[tuple[list[tuple[StepResult, Metric]], str]]:
    """Step and metric of every number that samples have, by the same filters as in the results."""
    seen: set[str] = set()
    found: dict[str, list[tuple[StepResult, Metric]]] = {}
    for step in task.scores:
        for metric in step.metrics:
            kept = "none" if metric.name not in seen else _filter_of(step)
            seen.add(metric.name)
            if metric.aggregate == "mean":
                found.setdefault(kept, []).append((step, metric))
    return [(metrics, kept) for kept, metrics in found.items()]


def _line(position: int, key: str, leaf: str | None, texts: Texts) -> dict[str, Any]:
    arguments, answers, filtered = {}, [], []
    for index, (request, output) in enumerate(zip(texts.requests, texts.outputs, strict=True)):
        likely = request.get("kind") == "loglikelihood"
        second = str(request.get("continuation", "")) if likely else request.get("decoding") or {}
        arguments[f"gen_args_{index}"] = {"arg_0": str(request.get("prompt") or texts.prompt), "arg_1": second}
        answer = [str(output.logprob), str(bool(output.is_greedy))] if likely else output.text
        answers.append([answer])
        filtered.append(answer)
    doc, target = {"id": key, "leaf": leaf}, "" if texts.target is None else texts.target
    return {
        "doc_id": position,
        "doc": doc,
        "target": target,
        "arguments": arguments,
        "resps": answers,
        "filtered_resps": filtered,
        "doc_hash": _hash(json.dumps(doc, indent=2, ensure_ascii=False)),
        "prompt_hash": _hash(json.dumps(arguments, sort_keys=True)),
        "target_hash": _hash(target),
    }


def _hashes(lines: list[dict[str, Any]]) -> list[str]:
    return [line["doc_hash"] + line["prompt_hash"] + line["target_hash"] for line in lines]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()

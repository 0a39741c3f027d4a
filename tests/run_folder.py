"""Writes a run folder by hand, through the store, as the executor does: what the tests of reports start from."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from harness.core.records import Metric, Output, Row, StepRecord
from harness.steps.files import write_json
from harness.steps.journal import Journal, rows_digest, write_rows
from harness.steps.provenance import file_digest
from harness.steps.step import Step
from harness.steps.store import RunStore

MODEL = {"name": "tiny", "architecture": "LlamaForCausalLM", "dtype": "bfloat16", "size_bytes": 16_000_000}
ACC = Metric(name="acc", higher_is_better=True, unit="proportion", low=0.0, high=1.0, chance=0.25)
TOX = Metric(name="toxicity", higher_is_better=True, unit="logit")


def digest(text: str) -> str:
    """A digest like those that ids are made of."""
    return hashlib.sha256(text.encode()).hexdigest()


class RunFolder:
    """A run in ``root``; `task` adds one task with one scorer, `write_plan` ends it."""

    def __init__(self, root: Path, *, model: str = "tiny", seed: int = 0) -> None:
        self.root, self.model = root, model
        self.store = RunStore(root)
        self.tasks: list[dict[str, Any]] = []
        self.plan: dict[str, Any] = {
            "spec": {"model": {"model": model}, "tasks": [], "engine": "auto", "limit": None, "seed": seed},
            "model": {**MODEL, "name": model, "weights_digest": digest(model)},
            "adapter": None,
            "engine": {"name": "transformers", "reason": "asked for", "options": {}},
        }

    def task(
        self,
        name: str,
        samples: dict[str, dict[str, Any]],
        rows: list[dict[str, Any]],
        *,
        metrics: tuple[Metric, ...] = (ACC,),
        scorer: str = "match",
        state: str = "done",
        **info: Any,
    ) -> Path:
        """Add one task; returns the scores step's folder.

        ``samples``: id -> {"value" or "values", "leaf", "prompt", "target", "answer" (text) or "choices"
        [(continuation, logprob)], "reason", "cut", "hit_limit", "detail"}. ``state``: done, failed or running.
        """
        variant = info.setdefault("variant", "raw")
        of = (self.model, name, variant)
        answers_id, scores_id = (digest(" ".join(parts)) for parts in (("answers", *of), ("scores", *of, scorer)))
        asked, answered, scored = self._rows(samples, metrics)
        requests = self.store.requests(digest(f"requests {name} {variant}"))
        write_rows(requests, asked)
        answers = self.store.step("answers", self.model, answers_id)
        asking = Step("answers", answers_id, self.model, info.get("config", {}))
        told = {"task": name, "decoding": info.pop("decoding", None), "requests": requests.name}
        answers.begin(asking, told, self.provenance())
        journal = Journal(answers.artifact / "answers.jsonl.gz")
        half = len(answered) // 2
        for batch in (answered[:half], answered[half:]):
            journal.append(batch)
        journal.close()
        done = StepRecord(id=answers_id, kind="answers", status="done", digest=rows_digest(answered))
        answers.finish(done.model_copy(update={"counts": info.pop("counts", {})}))
        scores = self.store.step("scores", self.model, scores_id)
        step = {
            "task": name,
            "variant": variant,
            "scorer": scorer,
            "metrics": [metric.model_dump(mode="json") for metric in metrics],
            "answers": answers_id,
            "answers_folder": answers.path.name,
            "requests": requests.name,
        }
        scores.begin(Step("scores", scores_id, self.model, info.pop("config", {})), step, self.provenance())
        if state == "done":
            write_rows(scores.artifact / "samples.jsonl.gz", scored)
            full = [Row(**self._row(name, variant, scorer, scores_id, row)).model_dump(mode="json") for row in rows]
            write_json(scores.artifact / "scores.json", {"rows": full, "counts": {}})
            seconds = {"load": 1.5, "compute": 2.25}
            files = {"scores.json": file_digest(scores.artifact / "scores.json")}
            ended = StepRecord(id=scores_id, kind="scores", status="done", digest=rows_digest(scored), seconds=seconds)
            made_from = {"answers": rows_digest(answered)}
            scores.finish(ended.model_copy(update={"files": files, "made_from": made_from}))
        elif state == "failed":
            error = "the scorer's model /data/models/judge is gone"
            scores.finish(StepRecord(id=scores_id, kind="scores", status="failed", error=error))
        self.tasks.append({"task": name, "version": 1, "answers": answers_id, "scores": [scores_id], **info})
        return scores.path

    def write_plan(self) -> Path:
        """Write plan.json; returns the run's folder."""
        write_json(self.store.plan_file, {**self.plan, "tasks": self.tasks})
        return self.root

    def provenance(self) -> dict[str, Any]:
        """provenance.json of every step."""
        return {"schema_version": 1, "harness": "0.1.0", "numerics": 1, "libraries": {"torch": "2.13.0"}}

    def _row(self, task: str, variant: str, scorer: str, step: str, row: dict[str, Any]) -> dict[str, Any]:
        base = {"model": self.model, "task": task, "variant": variant, "scorer": scorer, "step": step}
        return {**base, "metric": "acc", "unit": "proportion", "higher_is_better": True, **row}

    @staticmethod
    def _rows(
        samples: dict[str, dict[str, Any]], metrics: tuple[Metric, ...]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
        asked, answered, scored = [], [], []
        for key, sample in samples.items():
            kind = "loglikelihood" if "choices" in sample else "generate"
            choices = sample.get("choices") or [("", None)]
            asked.append(
                {
                    "id": key,
                    "leaf": sample.get("leaf"),
                    "prompt": sample.get("prompt", "a prompt"),
                    "target": sample.get("target"),
                    "data": sample.get("data", {}),
                    "requests": [
                        {"digest": digest(f"{key} {k}"), "kind": kind, "prompt_ids": [1, 2], "continuation": text}
                        for k, (text, _) in enumerate(choices)
                    ],
                }
            )
            for k, (_, logprob) in enumerate(choices):
                output = Output(logprob=logprob) if kind == "loglikelihood" else Output(text=sample.get("answer", ""))
                answered.append({"item": key, "index": k, "digest": digest(f"{key} {k}"), "output": output.to_json()})
            scored.append(
                {
                    "id": key,
                    "leaf": sample.get("leaf"),
                    "values": sample.get("values") or {metrics[0].name: sample.get("value")},
                    "reason": sample.get("reason"),
                    "cut": sample.get("cut", False),
                    "hit_limit": sample.get("hit_limit", False),
                    "detail": sample.get("detail", {}),
                }
            )
        return asked, answered, scored

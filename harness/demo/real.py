"""``harness demo --real``: the shipped study `quick`, of a small model of the hub on HH-RLHF, where there is a network.

What it will fetch is said before, with sizes; offline, what is missing is named with the commands that bring it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.contracts.dataset import Dataset
from harness.contracts.registry import Registry, load_plugins
from harness.core.caches import hub_cache, offline
from harness.core.errors import UserError
from harness.core.machine import torch_device
from harness.core.progress import Reporter
from harness.core.text import visible
from harness.data.expression import parse_expression
from harness.data.hub import cached_commit, hub_errors
from harness.demo.run import say_reports, say_scale
from harness.report.build import write_all
from harness.study.arms import Arm, arms_of
from harness.study.outline import counted
from harness.study.plan import plan_study
from harness.study.run import run_study
from harness.study.spec import Read, find_study, read_study
from harness.tasks.catalog import load_catalog

COMMAND = "harness demo --real"
TOKENS = 250
"""Tokens of a row of HH-RLHF, prompt and answer, of a Llama's tokenizer: a guess for the estimate of time alone."""


@dataclass(frozen=True)
class Source:
    """A repository of the hub that a study reads."""

    kind: Literal["model", "dataset"]
    id: str
    revision: str | None
    size: int | None = None
    """Bytes; None: not known."""

    @property
    def here(self) -> bool:
        """Whether the caches hold it."""
        return cached_commit(self.id, self.revision, repo_type=self.kind) is not None

    @property
    def command(self) -> str:
        """What fetches it."""
        kind = " --repo-type dataset" if self.kind == "dataset" else ""
        return f"hf download{kind} {self.id}" + (f" --revision {self.revision}" if self.revision else "")


def sources_of(read: Read, registry: Registry) -> list[Source]:
    """Every repository of the hub that a study's bases, data and tasks are read from; folders of this machine are none.

    Raises:
        UserError: an unknown data set or task.
    """
    spec = read.spec
    found = [
        Source("model", base.model, base.revision)
        for base in spec.bases.values()
        if not Path(base.model).expanduser().exists()
    ]
    for expression in spec.data.values():
        for part in parse_expression(expression, registry):
            dataset = registry.find(Dataset, part.name, "data")
            if dataset.source:
                found.append(_pinned(dataset.source, part.revision or getattr(dataset, "revision", None), read))
    asked, catalog = spec.evaluation, load_catalog(registry, spec.evaluation.task_folders)
    for chosen in catalog.choose(asked.tasks, asked.suite, asked.limit, asked.set):
        task = chosen.spec
        if task.lm_eval is not None and task.lm_eval.data is not None:
            found.append(_pinned(task.lm_eval.data, task.lm_eval.revision, read))
        if task.dataset is not None and "path" not in task.dataset.options:
            dataset = registry.find(Dataset, task.dataset.name, f"task {task.name}")
            if dataset.source:
                found.append(_pinned(dataset.source, task.dataset.revision or getattr(dataset, "revision", None), read))
    return list(dict.fromkeys(found))


def _pinned(source: str, revision: str | None, read: Read) -> Source:
    return Source("dataset", source, read.spec.data_revisions.get(source, revision))


def run_real(
    out: Path,
    *,
    model: str | None = None,
    fresh: bool = False,
    registry: Registry | None = None,
    reporter: Reporter | None = None,
) -> Mapping[str, str]:
    """Say what will be fetched and how long it takes, run the study `quick` in ``out/real``, and print its reports.

    Args:
        out: the demo's folder.
        model: folder or hub id in place of the study's own base.
        fresh: run everything anew.
        registry: from ``load_plugins``; all installed plugins by default.
        reporter: says what is going on; silent by default.

    Returns:
        step folder or arm -> why it failed, or was left out.

    Raises:
        UserError: something is missing, and there is no network; says what fetches it.
    """
    reporter = reporter or Reporter()
    registry = registry or load_plugins()
    models = {"base": model} if model is not None else None
    read = read_study(find_study(Path("quick")), models=models)
    arms = arms_of(read)
    missing = [source for source in sources_of(read, registry) if not source.here]
    for line in announced(sized(missing), counted(arms)):
        reporter.note(line)
    plan = plan_study(find_study(Path("quick")), registry=registry, models=models)
    size = next(iter(plan.promises.values())).model.size_bytes
    reporter.note(
        f"training: at least {duration(training_operations(arms, size), speed_here())} here ({torch_device()})"
    )
    done = run_study(plan, out / "real", fresh=fresh, reporter=reporter)
    pages = write_all(done.root)
    reporter.close()
    say_reports(pages, done.failures)
    say_scale(pages)
    return done.failures


def sized(missing: Sequence[Source]) -> list[Source]:
    """The same sources with their sizes, as the hub tells them.

    Raises:
        UserError: the network is switched off, or the hub cannot be reached; names every source and its command.
    """
    if not missing:
        return []
    if offline():
        raise _cannot_fetch(missing, "the network is switched off (HF_HUB_OFFLINE)", ", or set HF_HUB_OFFLINE=0")
    from huggingface_hub import HfApi

    found = []
    try:
        for one in missing:
            told = HfApi().repo_info(one.id, repo_type=one.kind, revision=one.revision, files_metadata=True)
            sizes = [file.size for file in getattr(told, "siblings", None) or () if file.size is not None]
            found.append(Source(one.kind, one.id, one.revision, sum(sizes) if sizes else None))
    except hub_errors() as error:
        raise _cannot_fetch(missing, f"the hub cannot be reached ({type(error).__name__})", "") from None
    return found


def _cannot_fetch(missing: Sequence[Source], why: str, else_: str) -> UserError:
    names = ", ".join(f"{one.kind} {one.id}" for one in missing)
    commands = "; ".join(f"`{one.command}`" for one in missing)
    return UserError(
        COMMAND,
        f"not in the caches: {names}; and {why}",
        f"Fetch them where there is a network: {commands}{else_}. `harness demo` alone needs none.",
    )


def announced(sources: Sequence[Source], arms: str) -> list[str]:
    """What will be fetched, in lines."""
    if not sources:
        return [f"study quick: {arms}; everything is here, nothing is fetched"]
    lines = [f"study quick: {arms}; to be fetched into {visible(str(hub_cache()))}, whole repositories at most:"]
    for one in sources:
        lines.append(
            f"  {one.kind} {one.id}: {f'{one.size / 1e6:,.0f} MB' if one.size is not None else 'size not known'}"
        )
    known = sum(one.size or 0 for one in sources)
    return [*lines, f"  together {known / 1e6:,.0f} MB: {known / 12.5e6 / 60:,.0f} minutes at 100 Mbit/s"]


def training_operations(arms: Sequence[Arm], size_bytes: int) -> float:
    """Least floating-point operations that training takes: 6 per parameter and token, for pairs two answers and a
    forward pass of the reference (2) over both; parameters as if they were stored in 2 bytes.
    """
    total = 0.0
    for arm in arms:
        if arm.align is not None and arm.checkpoint is None:
            rows = int(arm.align.options.get("steps", 700)) * int(arm.align.options.get("batch_size", 16))
            passes = 6 if arm.align.method == "sft" else 2 * (6 + 2)
            total += passes * rows * TOKENS * size_bytes / 2
    return total


def speed_here() -> float:
    """Floating-point operations a second of a product of two matrices on the device that trains."""
    import torch

    device = torch_device()
    a_NN = torch.randn(1024, 1024, device=device)
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        float((a_NN @ a_NN)[0, 0])  # read back, so that a GPU has ended
        best = max(best, 2 * 1024**3 / (time.perf_counter() - began))
    return best


def duration(operations: float, speed: float) -> str:
    """How long so many operations take at a speed (operations a second)."""
    seconds = operations / speed
    return f"{seconds / 60:,.0f} minutes" if seconds < 5400 else f"{seconds / 3600:,.1f} hours"

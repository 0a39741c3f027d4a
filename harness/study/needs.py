"""What a study, a suite or a task reads from the hub: models, data sets, checkpoints of scorers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from harness.contracts.dataset import Dataset, DatasetJob
from harness.contracts.hub_files import HubFiles, model_files
from harness.contracts.registry import Registry
from harness.contracts.scorer import Scorer
from harness.core.config import parse_options
from harness.core.errors import UserError
from harness.data.expression import at_revisions, parse_expression
from harness.data.hub import resolve_revision
from harness.data.selection import open_part
from harness.evaluation.judges import scorers_of
from harness.study.arms import arms_of
from harness.study.spec import Read
from harness.tasks.catalog import Catalog, Chosen, load_catalog
from harness.tasks.questions import dataset_of


@dataclass
class Needs:
    """What is read from the hub."""

    files: dict[HubFiles, list[str]] = field(default_factory=dict)
    """Files -> who reads them."""
    readings: dict[str, Callable[[], None]] = field(default_factory=dict)
    """What is read -> reads it, so that what has been downloaded is prepared too."""

    def add(self, files: HubFiles, reader: str) -> None:
        """One more reader of some files."""
        readers = self.files.setdefault(files, [])
        if reader not in readers:
            readers.append(reader)

    def model(self, ref: str | None, revision: str | None, reader: str) -> None:
        """A model or an adapter, if it is the hub's."""
        for files in model_files(ref, revision):
            self.add(files, reader)


def needs_of_study(read: Read, registry: Registry) -> Needs:
    """What a study reads from the hub; its file and the plugins are all that is looked at.

    Raises:
        UserError: names or options that are wrong.
    """
    spec, found = read.spec, Needs()
    for name, base in spec.bases.items():
        found.model(base.model, base.revision, f"base {name}")
    seen = set()
    for arm in arms_of(read):
        if arm.adapter is not None:
            found.model(arm.adapter, None, f"arm {arm.name}")
        if arm.align is not None and (data := (arm.align.dataset, str(arm.align.options.get("dataset")))) not in seen:
            seen.add(data)
            _training_data(found, data[0], arm.align.options.get("dataset"), spec.data_revisions, registry)
    if (asked := spec.evaluation) is None:
        return found
    catalog = load_catalog(registry, asked.task_folders, trust_task_code=asked.trust_task_code)
    chosen = catalog.choose(asked.tasks, asked.suite, asked.limit, asked.set)
    _tasks(found, chosen, spec.data_revisions, registry)
    return found


def needs_of_tasks(
    tasks: Iterable[str],
    suite: str | None,
    registry: Registry,
    catalog: Catalog,
    *,
    options: Mapping[str, Any],
    revisions: Mapping[str, str],
) -> Needs:
    """What tasks, or those of a suite, read from the hub, without the model that is asked.

    Raises:
        UserError: names or options that are wrong.
    """
    found = Needs()
    _tasks(found, catalog.choose(tuple(tasks), suite, None, dict(options)), revisions, registry)
    return found


def refuse_missing(read: Read, registry: Registry, command: str) -> None:
    """Stop before anything runs where data lies in no cache, and nothing may be fetched.

    Args:
        read: the study, planned already: so its models are here.
        registry: of plugins.
        command: that fetches it.

    Raises:
        UserError: naming all of it.
    """
    files = needs_of_study(read, registry).files
    missing = {
        f"{one.repo}{f' at {one.revision}' if one.revision else ''} ({', '.join(readers)})": None
        for one, readers in files.items()
        if resolve_revision(one.repo, one.revision, repo_type=one.kind) is None
    }
    if missing:
        what = f"{len(missing)} of what it reads is in no cache here: {'; '.join(missing)}"
        fix = f"Fetch it where there is a network: `{command}`; or let `harness study run --online` do it."
        raise UserError(f"study {read.spec.study}", what, fix)


def _training_data(
    found: Needs, expression: str, options: Any, revisions: Mapping[str, str], registry: Registry
) -> None:
    given = options if isinstance(options, dict) else {}
    for part in parse_expression(at_revisions(expression, registry, revisions), registry):
        dataset, job = open_part(part, registry, given, "train")
        _rows(found, dataset, job, part.label, revisions)


def _tasks(found: Needs, chosen: Iterable[Chosen], revisions: Mapping[str, str], registry: Registry) -> None:
    for one in chosen:
        spec, name = one.spec, f"task {one.spec.name}"
        if spec.lm_eval is not None:
            if spec.lm_eval.data is not None:
                revision = revisions.get(spec.lm_eval.data, spec.lm_eval.revision)
                found.add(HubFiles(spec.lm_eval.data, "dataset", revision), name)
            found.readings[name] = partial(_load_lm_eval, one)
        else:
            dataset, job = dataset_of(spec, registry, one)
            _rows(found, dataset, job, name, revisions)
        find = partial(_scorer, registry, f"{name}, scorer")
        for ref, _ in scorers_of(spec, spec.scorers, find):
            scorer = find(ref.name)
            config = parse_options(scorer.Config, ref.options, f"{name}, scorer {ref.name}")
            for files in scorer.hub_files(config):
                found.add(files, f"scorer {ref.name}")


def _scorer(registry: Registry, where: str, name: str) -> Scorer:
    return registry.find(Scorer, name, where)


def _rows(found: Needs, dataset: Dataset, job: DatasetJob, reader: str, revisions: Mapping[str, str]) -> None:
    files = dataset.hub_files(job)
    if job.revision is None and dataset.source in revisions:
        job = replace(job, revision=revisions[dataset.source])
        files = dataset.hub_files(job)
    for one in files:
        found.add(one, reader)
    if files:
        found.readings[reader] = partial(_first, dataset.rows(job))


def _first(rows: Iterator[Any]) -> None:
    next(rows, None)


def _load_lm_eval(chosen: Chosen) -> None:
    from harness.tasks.lm_eval.load import load

    load(chosen)

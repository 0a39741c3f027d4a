"""The contracts of a dataset, of a converter and of a folder of tasks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from harness.contracts.converter import Converter
from harness.contracts.dataset import Dataset, DatasetJob, DatasetRow
from harness.contracts.registry import Registry, load_plugins
from harness.contracts.scorer import Scorer
from harness.core.config import parse_options
from harness.core.errors import UserError
from harness.core.records import canonical
from harness.core.specs import DatasetRef, ScorerRef
from harness.data.row_schema import EXAMPLES, FIELDS, row_problem, settled
from harness.tasks.catalog import Catalog, Entry
from harness.testing.common import check_identity, check_plugin, demand, options_of


def check_dataset(
    dataset: Dataset,
    *,
    subset: str | None = None,
    split: str | None = None,
    options: Mapping[str, Any] | None = None,
    limit: int | None = None,
    source_rows: int | None = None,
    revision: str | None = None,
) -> None:
    """Try a dataset against its contract: stable ids, schema, and a count of everything dropped.

    Args:
        dataset: the instance that the hook yields.
        subset: which subset to read.
        split: which split to read.
        options: for the dataset's Config.
        limit: rows to look at; all when absent.
        source_rows: how many rows the source has, if known: kept and dropped ones must add up to it.
        revision: what to read; the pinned one when absent.

    Raises:
        AssertionError: names the rule and what was seen.
    """
    check_plugin(dataset, Dataset)
    declared = getattr(dataset, "schema", None)
    demand(_is_schema(declared), f"`schema` is one of {', '.join(FIELDS)}, or a pydantic model.", repr(declared))
    chosen = options_of(dataset, options)

    def job(of: str | None = subset) -> DatasetJob:
        return DatasetJob(subset=of, split=split, revision=revision, options=chosen)

    schema = dataset.schema_of(job())
    demand(_is_schema(schema), f"`schema_of` returns one of {', '.join(FIELDS)}, or a pydantic model.", repr(schema))
    check_identity(dataset.identity(job()), dataset.identity(job()))
    first_job, second_job = job(), job()
    rows = list(islice(dataset.rows(first_job), limit))
    again = list(islice(dataset.rows(second_job), limit))
    demand(bool(rows), "A dataset has rows.", f"none; dropped {first_job.dropped}")
    for row in rows:
        _check_row(schema, row)
    ids = [row.id for row in rows]
    twice = sorted({one for one in ids if ids.count(one) > 1}) if len(set(ids)) < len(ids) else []
    demand(not twice, "Ids of rows are unique.", f"more than once: {', '.join(twice[:3])}")
    stable = ids == [row.id for row in again]
    demand(stable, "Ids and their order are the same at every reading.", f"{ids[:3]} and {[r.id for r in again][:3]}")
    equal = [canonical(dict(row.data)) for row in rows] == [canonical(dict(row.data)) for row in again]
    demand(equal, "Rows are the same at every reading.", "their data differ")
    _check_dropped(first_job.dropped, second_job.dropped)
    if source_rows is not None and limit is None:
        total = len(rows) + sum(first_job.dropped.values())
        rule = f"Kept and dropped rows add up to the source's {source_rows}: job.drop(reason) counts."
        demand(total == source_rows, rule, f"{len(rows)} kept, dropped {first_job.dropped}")
    if dataset.subsets:
        _check_unknown_subset(dataset, job("no-such-subset"))


def check_converter(converter: Converter, *, rows: Sequence[Mapping[str, Any]] | None = None) -> None:
    """Try a converter against its contract: rows of the target, with ids of their own, the same at every call.

    Args:
        converter: the instance that the hook yields.
        rows: data of rows of the source; the example of the schema when absent.

    Raises:
        AssertionError: names the rule and what was seen.
    """
    check_plugin(converter, Converter)
    for name in ("source", "target"):
        schema = getattr(converter, name, None)
        demand(_is_schema(schema), f"`{name}` is one of {', '.join(FIELDS)}, or a pydantic model.", repr(schema))
    demand(converter.source != converter.target, "`source` and `target` differ.", repr(converter.source))
    given = rows
    if given is None and isinstance(converter.source, str):
        given = [EXAMPLES[converter.source]]
    demand(bool(given), "The kit has rows of the named schemas only: pass `rows`.", repr(converter.source))
    made = 0
    for data in given or ():
        # A copy: what a broken converter does to its row is not done to the next.
        source = settled(DatasetRow("kit/0", copy.deepcopy(dict(data))), converter.source, "rows of the kit")
        before = canonical(dict(source.data))
        found, again = list(converter.convert(source)), list(converter.convert(source))
        for row in found:
            _check_row(converter.target, row)
        demand(canonical(dict(source.data)) == before, "`convert` leaves its row as it is.", "its data have changed")
        demand(found == again, "`convert` makes the same rows at every call.", f"{found} and {again}")
        ids = [row.id for row in found]
        own = len(set(ids)) == len(ids) and all(one == source.id or one.startswith(f"{source.id}/") for one in ids)
        rule = "Ids of converted rows differ, and each is the row's own, or that with `/` and a suffix."
        demand(own, rule, f"of row {source.id}: {', '.join(ids)}")
        made += len(found)
    demand(made > 0, "`convert` makes rows of some of its rows.", f"none of {len(given or ())}")


def _is_schema(schema: Any) -> bool:
    return (isinstance(schema, type) and issubclass(schema, BaseModel)) or schema in FIELDS


def _check_row(schema: Any, row: Any) -> None:
    demand(isinstance(row, DatasetRow), "`rows` yields harness.DatasetRow.", type(row).__name__)
    demand(isinstance(row.id, str) and bool(row.id), "A row's id is a string that is not empty.", repr(row.id))
    try:
        canonical(dict(row.data))
    except (TypeError, ValueError) as error:
        raise AssertionError(f"A row's data are plain JSON values.\n  seen: {error} in row {row.id}") from None
    if not isinstance(schema, str):
        try:
            schema.model_validate(row.data)
        except ValidationError as error:
            raise AssertionError(
                f"Rows follow {schema.__name__}.\n  seen: {error.errors()[0]} in row {row.id}"
            ) from None
        return
    lacking = [name for name in FIELDS[schema] if row.data.get(name) in (None, "", [])]
    holds = ", ".join(FIELDS[schema]) or "something"
    rule = f"A row of {schema!r} holds {holds}; a row without is dropped and counted."
    demand(bool(row.data) and not lacking, rule, f"row {row.id} has {sorted(row.data)}, nothing in {lacking}")
    problem = row_problem(schema, row.data)
    demand(
        problem is None, f"A row of {schema!r} is like harness.data.row_schema.EXAMPLES.", f"row {row.id}: {problem}"
    )


def _check_dropped(first: Mapping[str, int], second: Mapping[str, int]) -> None:
    named = all(isinstance(reason, str) and reason.strip() for reason in first)
    demand(named, "Rows are dropped with a reason.", repr(dict(first)))
    demand(
        dict(first) == dict(second), "The same rows are dropped at every reading.", f"{dict(first)} and {dict(second)}"
    )


def _check_unknown_subset(dataset: Dataset, job: DatasetJob) -> None:
    rule = "An unknown subset is a harness.UserError."
    try:
        seen = f"{sum(1 for _ in islice(dataset.rows(job), 3))} rows"
    except UserError:
        return
    except Exception as error:
        seen = f"{type(error).__name__}: {error}"
    raise AssertionError(f"{rule}\n  seen: {seen}")


def check_tasks(folder: Path | str, *, registry: Registry | None = None) -> list[str]:
    """Check every task and suite YAML file of a folder: keys, templates, names of plugins and their options.

    Args:
        folder: what ``register_tasks`` yields.
        registry: where the datasets and scorers are looked up; the installed ones when absent.

    Returns:
        The names of the tasks.

    Raises:
        AssertionError: names the file, the rule and what was seen.
    """
    registry = registry or load_plugins()
    catalog = Catalog()
    try:
        catalog.add_folder(Path(folder), "the folder under test")
    except UserError as error:
        raise AssertionError(
            f"Every YAML file of the folder is a task, a suite or an lm-eval task.\n  seen: {error}"
        ) from None
    demand(bool(catalog.tasks), "A folder of tasks holds at least one task.", f"none in {Path(folder).name}")
    for entry in catalog.tasks.values():
        _check_task(entry, registry)
    elsewhere = Catalog()
    for registered in registry.task_folders:
        if registered.path.resolve() != Path(folder).resolve():
            elsewhere.add_folder(registered.path, registered.owner)
    for suite, _ in catalog.suites.values():
        strange = [n for n in suite.tasks if not {n, n.rpartition(":")[0]} & {*catalog.tasks, *elsewhere.tasks}]
        strange = [name for name in strange if not name.startswith("lm_eval:")]
        demand(not strange, "A suite names tasks that exist.", f"suite {suite.suite}: {', '.join(strange)}")
    return sorted(catalog.tasks)


def _check_task(entry: Entry, registry: Registry) -> None:
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import SandboxedEnvironment

    spec, where = entry.spec, f"task {entry.spec.name}"
    if spec.dataset is None:
        return
    for name in ("summary", "source"):
        demand(bool(getattr(spec, name).strip()), f"`{name}` is one line for `harness tasks`.", f"{where}: empty")
    demand(
        spec.licence not in ("", "unknown"), "`licence` says how the data may be used.", f"{where}: {spec.licence!r}"
    )
    for name in ("template", "target"):
        try:
            SandboxedEnvironment().parse(getattr(spec, name) or "")
        except TemplateSyntaxError as error:
            raise AssertionError(f"`{name}` is a Jinja template.\n  seen: {where}: {error}") from None
    try:
        plugin = registry.find(Dataset, spec.dataset.name, where)
        _options(plugin, spec.dataset, where)
        for ref in spec.scorers:
            scorer = registry.find(Scorer, ref.name, where)
            _options(scorer, ref, where)
    except UserError as error:
        raise AssertionError(f"A task names registered plugins, with options they take.\n  seen: {error}") from None


def _options(plugin: Dataset | Scorer, ref: DatasetRef | ScorerRef, where: str) -> Any:
    return parse_options(plugin.Config, ref.options, f"{where}, {ref.name}.options")

"""Tasks and suites by name: YAML files in registered folders, the user's folders, or given by path."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from yaml import YAMLError

from harness.contracts.registry import Registry
from harness.core.config import laid_over, load_yaml, parse, parse_options, text_of
from harness.core.errors import UserError, nearest, unknown
from harness.core.plain_yaml import PlainLoader, read_yaml
from harness.core.specs import PromptKind, ScorerRef, SuiteSpec, TaskSpec
from harness.steps.provenance import files_digest

LM_EVAL_PREFIX = "lm_eval:"
MOST_FILES = 100_000
"""Files below a folder of tasks; lm-eval's own, of 14,000 tasks, has fewer."""
_VARIANTS: dict[str, PromptKind] = {":raw": "raw", ":chat": "chat"}


@dataclass(frozen=True)
class Entry:
    """One task, the file it stands in, and who brings it."""

    spec: TaskSpec
    file: Path | None
    owner: str
    trusted: bool = False
    """Whether the code that an lm-eval YAML names may run: lm-eval's own, a plugin's, or allowed by the user."""

    @property
    def folder(self) -> Path | None:
        """The folder that relative paths of the task refer to."""
        return self.file.parent if self.file is not None else None


@dataclass(frozen=True)
class Chosen:
    """One task as it will run: name, prompt variant if forced, options applied."""

    entry: Entry
    spec: TaskSpec
    variant: PromptKind | None
    limit: int | None
    asked: str | None = None
    """What a suite names, where another task or variant stands in for it."""


@dataclass
class Catalog:
    """Every task and suite that this process knows."""

    tasks: dict[str, Entry] = field(default_factory=dict)
    suites: dict[str, tuple[SuiteSpec, str]] = field(default_factory=dict)
    trust_task_code: bool = False
    """Whether code may run that a file names which the user gives."""

    def add_folder(self, folder: Path, owner: str, *, trusted: bool | None = None) -> None:
        """Read every YAML file directly in ``folder``, and in its subfolders that are not lm-eval's.

        Args:
            folder: of task YAML.
            owner: who brings it.
            trusted: whether code that its files name may run; by default as the user allows.

        Raises:
            UserError: a file that is no task or suite, or a name that is taken.
        """
        if not folder.is_dir():
            raise UserError(f"--tasks {folder}", "no such folder", "Give a folder that holds task YAML files.")
        for file in _yaml_files(folder):
            self.add_file(file, owner, trusted=trusted)

    def add_file(self, file: Path, owner: str, *, trusted: bool | None = None) -> str | None:
        """Read one YAML file; returns the name it adds (None for a file that is only included by others)."""
        peek = _peek(file)
        if "suite" in peek:
            suite = parse(SuiteSpec, load_yaml(file))
            self._claim(self.suites, suite.suite, file, owner)
            self.suites[suite.suite] = (suite, owner)
            return suite.suite
        if "name" in peek:
            entry = Entry(parse(TaskSpec, load_yaml(file)), file, owner)
        elif isinstance(peek.get("task"), str) or "group" in peek:
            entry = _lm_eval_entry(file, peek, owner)
        elif {"dataset_path", "output_type", "include", "study", "wordings"} & set(peek):
            return None  # a part of other files, what `harness study` reads, or what judges are asked
        else:
            raise UserError(
                str(file),
                "neither a task (`name:`), a suite (`suite:`) nor an lm-eval task (`task:`)",
                "Add the key, or move the file out of the folder of tasks.",
            )
        self._claim(self.tasks, entry.spec.name, file, owner)
        self.tasks[entry.spec.name] = replace(entry, trusted=self.trust_task_code if trusted is None else trusted)
        return entry.spec.name

    def _claim(self, table: Mapping[str, Any], name: str, file: Path, owner: str) -> None:
        if name in table:
            other = table[name]
            of = f"{other.file} of {other.owner}" if isinstance(other, Entry) else other[1]
            raise UserError(str(file), f"the name {name!r} is taken by {of}", "Rename one of them.")

    def task(self, name: str, where: str) -> tuple[Entry, PromptKind | None]:
        """The task of that name, and the variant that a suffix ``:raw`` or ``:chat`` forces.

        ``lm_eval:NAME`` is any task of lm-eval's; a path to a YAML file is that file's task.
        """
        variant = None
        for suffix, kind in _VARIANTS.items():
            if name.endswith(suffix):
                name, variant = name.removesuffix(suffix), kind
        if name in self.tasks:
            return self.tasks[name], variant
        if name.endswith((".yaml", ".yml")):
            file = Path(name)
            if not file.is_file():
                raise UserError(f"{where} {name}", "no such file", "Give the path of a task's YAML file.")
            single = Catalog(trust_task_code=self.trust_task_code)
            added = single.add_file(file.resolve(), str(file))
            if added is None or added not in single.tasks:
                raise UserError(f"{where} {name}", "is no task", "A task has `name:`; an lm-eval task has `task:`.")
            return single.tasks[added], variant
        if name.startswith(LM_EVAL_PREFIX):
            inner = name.removeprefix(LM_EVAL_PREFIX)
            fields = {"name": name, "lm_eval": {"task": inner}, "source": "lm-eval", "licence": "see lm-eval"}
            spec = parse_options(TaskSpec, fields, f"{where} {name}")
            return Entry(spec, None, "lm-eval", trusted=True), variant
        raise unknown(f"{where} {name}", "task", name, [*self.tasks, "lm_eval:NAME"], "harness tasks")

    def suite(self, name: str, where: str) -> SuiteSpec:
        """The suite of that name."""
        if name not in self.suites:
            raise unknown(f"{where} {name}", "suite", name, self.suites, "harness tasks")
        return self.suites[name][0]

    def choose(
        self,
        tasks: Sequence[str],
        suite: str | None,
        limit: int | None,
        options: Mapping[str, Any],
        *,
        conversations: bool = False,
    ) -> list[Chosen]:
        """What will run, in order, with the user's options applied.

        Args:
            tasks: names, taken as they are.
            suite: name of a suite; ``quick`` where there is no task either.
            limit: samples per leaf task.
            options: per task.
            conversations: the engine takes conversations alone: in a suite, what such an engine can do stands in.

        Raises:
            UserError: unknown names; options for a task that does not run.
        """
        limits: dict[str, int | None] = dict.fromkeys(tasks, limit)
        over: dict[str, dict[str, Any]] = {}
        asked: dict[str, str] = {}
        if suite is not None or not tasks:
            spec = self.suite(suite or "quick", "--suite")
            for name in spec.tasks:
                runs = self._in_conversation(name) if conversations else name
                if runs != name and runs not in limits:
                    asked[runs] = name
                if name in spec.options and runs not in limits:
                    over[self.task(runs, "--suite")[0].spec.name] = spec.options[name]
                limits.setdefault(runs, limit if limit is not None else spec.limits.get(name, spec.limit))
            if strange := set(spec.options) - set(spec.tasks):
                what = f"{sorted(strange)[0]!r} is no task of the suite"
                raise UserError(f"suite {spec.suite}, options", what, f"Its tasks: {', '.join(spec.tasks)}.")
        options = laid_over(over, dict(options))
        chosen = [
            _standing_in(self._apply(*self.task(name, "--task"), own, options), asked.get(name))
            for name, own in limits.items()
        ]
        running: dict[str, Entry] = {}
        for one in chosen:
            name, other = one.spec.name, running.setdefault(one.spec.name, one.entry)
            if other.file != one.entry.file:
                what = f"{other.file} and {one.entry.file} both bring a task of that name"
                raise UserError(f"--task {name}", what, "Rename one of them: numbers go by the task's name.")
        for key in options:
            if key not in ("engine", "parity_engine", *running):
                close = nearest(key, [*running, "engine"])
                fix = f"Did you mean {close[0]!r}? " if close else ""
                what = "no task of that name runs here"
                raise UserError(
                    f"--set {key}", what, f"{fix}Running: {', '.join(running)}; engine options: engine.KEY."
                )
        return chosen

    def _in_conversation(self, name: str) -> str:
        """The task that asks the same of an engine that takes conversations alone; the name itself where it can."""
        entry, variant = self.task(name, "--suite")
        if entry.spec.generative is not None:
            return entry.spec.generative
        if (variant or entry.spec.prompt) == "raw":
            return f"{name.removesuffix(':raw')}:chat"
        return name

    def _apply(self, entry: Entry, variant: PromptKind | None, limit: int | None, options: Mapping[str, Any]) -> Chosen:
        name = entry.spec.name
        where = f"--set {name}"
        given = options.get(name, {})
        if not isinstance(given, dict):
            raise UserError(where, f"{given!r} is a value, not a group of options", f"Write {where}.KEY=VALUE.")
        given = dict(given)
        known = ["limit", "scorer", *TaskSpec.model_fields]
        for key in given:
            if key not in known:
                close = nearest(str(key), known)
                fix = f"Did you mean {close[0]!r}? " if close else ""
                raise UserError(f"{where}.{key}", f"unknown key {key!r}", f"{fix}Allowed keys: {', '.join(known)}.")
        scorer_options = given.pop("scorer", {})
        limit = given.pop("limit", limit)
        if not (limit is None or (isinstance(limit, int) and limit is not True and limit >= 1)):
            raise UserError(f"--set {name}.limit", f"{limit!r} is no positive number", "Give 1 or more.")
        merged = entry.spec.model_dump()
        merged = laid_over(merged, given)
        merged["scorers"] = _with_scorer_options(entry.spec, scorer_options)
        return Chosen(entry, parse_options(TaskSpec, merged, f"--set {name}"), variant, limit)


def _yaml_files(folder: Path) -> list[Path]:
    """The YAML files below a folder, sorted; those that others include (``_base.yaml``) are left out.

    Raises:
        UserError: so many files that this is no folder of tasks, but somebody's whole disk.
    """
    found, count = [], 0
    for place, _, names in os.walk(folder):
        count += len(names)
        if count > MOST_FILES:
            what = f"holds more than {MOST_FILES:,} files"
            raise UserError(f"--tasks {folder}", what, "Give a folder that holds task YAML files alone.")
        found += [Path(place, name) for name in names if name.endswith((".yaml", ".yml")) and not name.startswith("_")]
    return sorted(found)


def _standing_in(chosen: Chosen, asked: str | None) -> Chosen:
    """Say in the task's notes, which stand beside its numbers, what it stands in for."""
    if asked is None:
        return chosen
    note = f"stands in for the suite's {asked}: the endpoint takes conversations alone and gives no log-likelihoods"
    return replace(chosen, spec=chosen.spec.model_copy(update={"notes": (*chosen.spec.notes, note)}), asked=asked)


def load_catalog(registry: Registry, folders: Iterable[str | Path] = (), *, trust_task_code: bool = False) -> Catalog:
    """Tasks of all registered folders, whose plugins run code anyway, then of the folders that the user gives."""
    catalog = Catalog(trust_task_code=trust_task_code)
    for registered in registry.task_folders:
        catalog.add_folder(registered.path, registered.owner, trusted=True)
    for folder in folders:
        catalog.add_folder(Path(folder).resolve(), str(folder))
    return catalog


def code_of(entry: Entry) -> str | None:
    """Digest of the files of an lm-eval task in someone's folder: its YAML and Python files, and local data."""
    if entry.spec.lm_eval is None or entry.folder is None or entry.spec.lm_eval.include is None:
        return None
    return files_digest(
        (p for p in entry.folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts), entry.folder
    )


def _with_scorer_options(spec: TaskSpec, given: Mapping[str, Any]) -> list[dict[str, Any]]:
    scorers = [ref.model_dump() for ref in spec.scorers]
    where = f"--set {spec.name}.scorer"
    if not isinstance(given, Mapping):
        raise UserError(where, f"{given!r} is a value, not a group of options", f"Write {where}.KEY=VALUE.")
    if not given:
        return scorers
    if not scorers:
        raise UserError(f"--set {spec.name}.scorer", "the task's scorer takes no options", "Leave it out.")
    by_name = {ref["name"]: ref for ref in scorers}
    if len(scorers) > 1 and not set(given) <= set(by_name):
        raise UserError(
            f"--set {spec.name}.scorer",
            "the task has several scorers",
            f"Write {spec.name}.scorer.NAME.KEY with NAME one of {', '.join(by_name)}.",
        )
    nested = set(given) <= set(by_name)
    wrong = [name for name, extra in given.items() if nested and not isinstance(extra, Mapping)]
    if wrong:
        what = f"{given[wrong[0]]!r} is a value, not a group of options"
        raise UserError(f"{where}.{wrong[0]}", what, f"Write {where}.{wrong[0]}.KEY=VALUE.")
    for name, ref in by_name.items():
        extra = given.get(name, {}) if nested else given
        ref["options"] = {**ref["options"], **extra}
    return [ScorerRef.model_validate(ref).model_dump() for ref in scorers]


class _Tolerant(PlainLoader):
    """Reads lm-eval's YAML for its keys alone: ``!function`` and other tags become plain values."""

    text_keys = False


_Tolerant.add_multi_constructor("!", lambda loader, suffix, node: str(getattr(node, "value", "")))


def _peek(file: Path) -> dict[str, Any]:
    try:
        data = read_yaml(text_of(file), _Tolerant)
    except YAMLError:
        data = load_yaml(file).data
    if not isinstance(data, dict):
        raise UserError(str(file), "not a mapping", "A task YAML starts with `name:`, `suite:` or `task:`.")
    return data


def _lm_eval_entry(file: Path, peek: Mapping[str, Any], owner: str) -> Entry:
    """An lm-eval YAML, unchanged, as a task of ours."""
    name = peek["task"] if isinstance(peek.get("task"), str) else peek["group"]
    needs = {"generate_until": ("generate",), "multiple_choice": ("loglikelihood",)}.get(
        peek.get("output_type", ""), ()
    )
    metadata = peek.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    spec = {
        "name": name,
        "version": _whole(metadata.get("version")),
        "summary": str(metadata.get("summary") or f"lm-eval task of {file.name}"),
        "source": str(peek.get("dataset_path") or file.name),
        "needs": needs,
        "lm_eval": {"task": name, "include": str(file.parent)},
    }
    return Entry(parse_options(TaskSpec, spec, str(file)), file, owner)


def _whole(version: Any) -> int:
    """lm-eval's versions are numbers or texts such as "2.1"; ours are whole. Its files enter the step id anyway."""
    try:
        return max(1, int(float(version or 1)))
    except (TypeError, ValueError):
        return 1

"""`harness fetch`: bring every model, data set and scorer that a study, a suite or a task reads into both caches."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from harness.cli.options import DataRevisions, Folders, Json, PluginFiles, models_of, options_of, with_defaults
from harness.cli.tables import print_json, print_table, say
from harness.core.errors import UserError
from harness.core.text import human_bytes

if TYPE_CHECKING:
    from harness.data.fetch import Listed
    from harness.study.needs import Needs

Kind = Literal["study", "suite", "task"]


def fetch(
    name: Annotated[
        str, typer.Argument(metavar="STUDY|SUITE|TASK", help="A study's file or name, a suite, or a task.")
    ],
    kind: Annotated[Kind | None, typer.Option("--as", help="What the name is, where there are several.")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="[BASE=]MODEL", help="BASE=MODEL of a study; of a suite or a task the model to be asked."),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE, as `study run` and `eval` take it (repeatable).")
    ] = None,
    tasks: Folders = None,
    data_revision: DataRevisions = None,
    plugin: PluginFiles = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what there is to fetch, with sizes; fetch nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Fetch what a study, a suite or a task reads, at pinned revisions, so that it runs without a network."""
    from harness.data.fetch import download, look, refuse_offline

    needs, command = _needed(name, kind, model or [], (set_ or [], tasks or [], data_revision or [], plugin or []))
    if needs.files:
        refuse_offline()
    listed = []
    for files in needs.files:
        listed.append(look(files))
    rows = [_row(one, needs.files[one.files]) for one in listed]
    missing = sum(one.missing for one in listed)
    if as_json:
        print_json({"files": rows, "missing_bytes": missing, "command": command})
    else:
        shown = [{**row, "size": human_bytes(row["bytes"]), "to fetch": _owed(row)} for row in rows]
        print_table("From the hub", ["kind", "repository", "commit", "size", "to fetch", "for"], shown)
        print(f"to fetch: {human_bytes(missing)} of {human_bytes(sum(one.size for one in listed))}")
    if dry_run:
        return
    for one in listed:
        if one.missing_count:
            download(one)
    for reader, read in needs.readings.items():
        say(f"preparing {reader}")
        read()
    say(f"Everything is here. Next: {command}")


def _owed(row: dict[str, Any]) -> str:
    return human_bytes(row["missing_bytes"]) if row["missing_files"] else "is here"


def _row(one: Listed, readers: list[str]) -> dict[str, Any]:
    return {
        "kind": "data set" if one.files.kind == "dataset" else one.files.kind,
        "repository": one.files.repo,
        "revision": one.files.revision or "main",
        "commit": one.commit[:12],
        "files": one.count,
        "bytes": one.size,
        "missing_files": one.missing_count,
        "missing_bytes": one.missing,
        "for": ", ".join(readers),
    }


def _needed(
    name: str, kind: Kind | None, models: list[str], given: tuple[list[str], list[str], list[str], list[str]]
) -> tuple[Needs, str]:
    """What is read, and the command that reads it."""
    from harness.data.hub import parse_revisions
    from harness.study.needs import needs_of_study, needs_of_tasks
    from harness.study.spec import find_study, is_study, read_study
    from harness.tasks.catalog import load_catalog

    changes, folders, revisions, plugins = given
    options = [
        *(word for one in changes for word in ("--set", one)),
        *(word for one in folders for word in ("--tasks", one)),
        *(word for one in revisions for word in ("--data-revision", one)),
        *(word for one in plugins for word in ("--plugin", one)),
    ]
    defaults, registry = with_defaults(plugins)
    commits = {**defaults.data_revisions, **parse_revisions(revisions)}
    if kind == "study" or (kind is None and is_study(Path(name))):
        file = find_study(Path(name))
        bases = models_of(models)
        spec = read_study(file, models=bases, changes=tuple(changes)).spec
        if spec.plugins:
            _, registry = with_defaults([*spec.plugins, *plugins])
        read = read_study(file, models=bases, changes=tuple(changes), revisions={**commits, **spec.data_revisions})
        words = ["harness", "study", "run", name, *(w for one in models for w in ("--model", one)), *options]
        return needs_of_study(read, registry), shlex.join(words)
    catalog = load_catalog(registry, [*defaults.task_folders, *folders])
    if len(models) > 1 or any("=" in one for one in models):
        what, fix = f"{', '.join(models)}: a suite or a task is asked of one model", "Give --model MODEL once."
        raise UserError("--model", what, fix)
    suite = kind == "suite" or (kind is None and name in catalog.suites)
    needs = needs_of_tasks(
        [] if suite else [name],
        name if suite else None,
        registry,
        catalog,
        options=options_of(changes),
        revisions=commits,
    )
    for one in models:
        needs.model(one, None, "the model")
    asked = ["--suite" if suite else "--task", name]
    return needs, shlex.join(["harness", "eval", "--model", *(models or ["MODEL"]), *asked, *options])

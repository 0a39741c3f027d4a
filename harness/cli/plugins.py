"""`harness plugins` and `harness tasks`: what there is to choose from, and the start of a plugin of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from harness.cli.options import Folders, Json, PluginFiles, with_defaults
from harness.cli.tables import print_json, print_table, say
from harness.core.errors import ExitCode
from harness.core.text import visible

KINDS = (
    "aligner, loss (an aligner in one function), adapter, merger, scorer, dataset, converter, engine, executor, "
    "section (of a report), observer (is told of steps) or task."
)
plugins_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None, help="List plugins, or write a new one.")


def tasks(plugin: PluginFiles = None, folder: Folders = None, as_json: Json = False) -> None:
    """List tasks and suites with variant, source, licence and size."""
    from harness.tasks.catalog import load_catalog

    defaults, registry = with_defaults(plugin)
    catalog = load_catalog(registry, [*defaults.task_folders, *(folder or ())])
    listed = [
        {
            "name": entry.spec.name,
            "variant": {"auto": "raw or chat"}.get(entry.spec.prompt, entry.spec.prompt),
            "size": entry.spec.size,
            "licence": entry.spec.licence,
            "source": entry.spec.source,
            "summary": entry.spec.summary,
            "owner": entry.owner,
        }
        for _, entry in sorted(catalog.tasks.items())
    ]
    suites: list[dict[str, Any]] = [
        {
            "suite": name,
            "tasks": list(spec.tasks),
            "limit": spec.limit,
            "summary": spec.summary,
            "notes": list(spec.notes),
        }
        for name, (spec, _) in sorted(catalog.suites.items())
    ]
    if as_json:
        print_json({"tasks": listed, "suites": suites})
        return
    print_table("Tasks", ["name", "variant", "size", "licence", "source"], listed)
    shown = [{**suite, "tasks": ", ".join(suite["tasks"])} for suite in suites]
    print_table("Suites", ["suite", "tasks", "limit", "summary"], shown)
    print("Any other task of lm-eval: --task lm_eval:NAME. A YAML file of your own: --task FILE, or --tasks FOLDER.")


@plugins_app.callback()
def plugins(context: typer.Context, plugin: PluginFiles = None, as_json: Json = False) -> int:
    """List every plugin with kind, name, distribution, version, hooks and import time."""
    if context.invoked_subcommand is not None:
        return ExitCode.DONE
    from harness.contracts.hookspecs import NOTIFICATION
    from harness.contracts.registry import load_plugins

    registry = load_plugins(plugin or (), strict=False)
    rows: list[dict[str, Any]] = [
        {
            "kind": entry.kind,
            "name": entry.name,
            "distribution": entry.origin.distribution,
            "version": entry.origin.version,
            "hooks": f"register_{entry.kind}s",
            "import": f"{entry.origin.import_seconds:.3f} s",
            "summary": entry.plugin.summary,
        }
        for _, entry in sorted(registry.entries.items())
    ]
    rows += [
        {
            "kind": "tasks",
            "name": folder.path.name,
            "distribution": folder.owner,
            "version": next((o.version for o in registry.origins if o.distribution == folder.owner), ""),
            "hooks": "register_tasks",
        }
        for folder in registry.task_folders
    ]
    rows += [
        {
            "kind": "observer",
            "name": origin.name,
            "distribution": origin.distribution,
            "version": origin.version,
            "hooks": ", ".join(watched),
            "import": f"{origin.import_seconds:.3f} s",
        }
        for origin in registry.origins
        if (watched := [hook for hook in origin.hooks if hook in NOTIFICATION])
    ]
    broken = [{"name": o.title, "error": o.error, "traceback": o.traceback} for o in registry.origins if o.error]
    problems = [str(problem) for problem in registry.problems]
    if as_json:
        print_json({"plugins": rows, "broken": broken, "problems": problems, "warnings": registry.warnings})
    else:
        print_table("Plugins", ["kind", "name", "distribution", "version", "hooks", "import"], rows)
        for one in broken:
            say(f"broken: {one['name']}: {one['error']}")
        for text in [*(f"error: {p}" for p in problems), *(f"warning: {w}" for w in registry.warnings)]:
            say(text)
    return ExitCode.USER if problems else ExitCode.DONE


@plugins_app.command("new")
def plugins_new(
    kind: Annotated[str, typer.Argument(help=KINDS)],
    name: Annotated[str, typer.Argument(help="Name that users will choose it by.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write; by default ./harness-NAME.")] = None,
) -> None:
    """Write an installable plugin package with a passing test."""
    from harness.contracts.scaffold import write_package

    folder = out or Path(f"harness-{name.replace('_', '-')}")
    for path in write_package(kind, name, folder):
        print(visible(str(path)))
    print(visible(f"next: pip install -e {folder} && python -m pytest {folder}"))

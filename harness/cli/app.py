"""The command line. Imports nothing heavy: each command imports what it needs when it runs."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from harness.cli.align import AlignCommand, align
from harness.cli.eval import DataRevisions, Folders, Json, PluginFiles, compare, eval_, options_of, report
from harness.cli.judge import judge_app
from harness.cli.merge import MergeCommand, fold, merge
from harness.cli.serve import serve
from harness.core.errors import ExitCode, HarnessError, Requeue, UserError
from harness.core.text import visible

if TYPE_CHECKING:
    from harness.contracts.registry import Registry
    from harness.tasks.catalog import Catalog

app = typer.Typer(
    name="harness",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    # Plain help: rich help costs 0.2 s of imports.
    rich_markup_mode=None,
    help="Find out what a preference-alignment choice really does to a language model.",
)
plugins_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None, help="List plugins, or write a new one.")
app.add_typer(plugins_app, name="plugins")
app.command("eval")(eval_)
app.command("report")(report)
app.command("compare")(compare)
app.command("align", cls=AlignCommand)(align)
app.command("merge", cls=MergeCommand)(merge)
app.command("fold")(fold)
app.command("serve")(serve)
data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List data sets, or see what training sees.")
app.add_typer(data_app, name="data")
app.add_typer(judge_app, name="judge")


def main() -> NoReturn:
    """Entry point: turns errors into messages and exit codes."""
    # Nothing that is imported later reports to anybody, unless the user asks for it.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # bitsandbytes wants a package of faster kernels as soon as it is imported, 4-bit weights or not.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, _requeue)
    signal.signal(signal.SIGUSR1, _requeue)
    code: int = ExitCode.DONE
    try:
        _check_arguments(sys.argv[1:])
        code = int(app(standalone_mode=False) or 0)
        if code == ExitCode.INTERRUPTED:  # typer turns Ctrl-C into this
            raise KeyboardInterrupt
    except HarnessError as error:
        if error.exit_code == ExitCode.BUG:
            raise
        _say(f"error: {error}")
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _say("interrupted: what is done is kept; run the same command again")
        code = ExitCode.INTERRUPTED
    except Requeue:
        _say("stopped by a signal: what is done is kept; run the same command again")
        code = ExitCode.REQUEUE
    except OSError as error:
        from harness.steps.files import is_disk_full, is_refused, refusal

        refused = refusal(error) if is_disk_full(error) else None
        if refused is None and not is_refused(error):
            raise
        what, fix = refused or (f"cannot be used: {error.strerror}", "Give another path.")
        _say(f"error: {error.filename or 'a file'}: {what}\n  {fix}")
        code = ExitCode.USER
    except Exception as error:
        code = _click_error(error)
    sys.stdout.flush()
    raise SystemExit(code)


def _check_arguments(arguments: list[str]) -> None:
    """Refuse what no file name, option or text can be, before it is looked up, hashed or printed anywhere."""
    for argument in arguments:
        if not argument.isprintable() and not _is_text(argument):
            raise UserError(repr(argument), "is not UTF-8", "Give names and texts in UTF-8.")
        if str(Path(argument)).startswith("~"):  # ./~x, too
            try:
                Path(argument).expanduser()
            except RuntimeError:
                raise UserError(argument, "there is no such user", "Give a path.") from None


def _is_text(argument: str) -> bool:
    try:
        return "\0" not in argument.encode().decode()
    except UnicodeEncodeError:
        return False


def _click_error(error: Exception) -> int:
    """Usage errors of the command line itself; anything else is a bug and keeps its traceback."""
    show = getattr(error, "show", None)
    if show is None or not hasattr(error, "exit_code"):
        raise error
    said = io.StringIO()
    show(file=said)
    _say(said.getvalue().rstrip("\n"))
    return int(error.exit_code)


def _requeue(number: int, frame: FrameType | None) -> None:
    # Schedulers repeat themselves; a second signal must not cut the first one's tidying short.
    for each in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(each, signal.SIG_IGN)
    raise Requeue


def _say(text: str) -> None:
    print(visible(text, lines=True), file=sys.stderr, flush=True)


def _load(plugins: list[str] | None, folders: list[str] | None) -> tuple[Registry, Catalog]:
    from harness.contracts.registry import load_plugins
    from harness.core.user_defaults import load_user_defaults
    from harness.tasks.catalog import load_catalog

    settings = load_user_defaults()
    registry = load_plugins([*settings.plugins, *(plugins or ())])
    return registry, load_catalog(registry, [*settings.task_folders, *(folders or ())])


@app.command()
def tasks(plugin: PluginFiles = None, folder: Folders = None, as_json: Json = False) -> None:
    """List tasks and suites with variant, source, licence and size."""
    _, catalog = _load(plugin, folder)
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
        _print_json({"tasks": listed, "suites": suites})
        return
    _table("Tasks", ["name", "variant", "size", "licence", "source"], listed)
    _table("Suites", ["suite", "tasks", "limit", "summary"], [{**s, "tasks": ", ".join(s["tasks"])} for s in suites])
    print("Any other task of lm-eval: --task lm_eval:NAME. A YAML file of your own: --task FILE, or --tasks FOLDER.")


def _print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=2, ensure_ascii=False))


def _table(title: str, columns: list[str], rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    # In a pipe there is no width to fit into.
    console = console if console.is_terminal else Console(width=200)
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text("" if row.get(column) is None else visible(str(row[column]))) for column in columns))
    console.print(table)


@plugins_app.callback()
def plugins(context: typer.Context, plugin: PluginFiles = None, as_json: Json = False) -> int:
    """List every plugin with kind, name, distribution, version, hooks and import time."""
    if context.invoked_subcommand is not None:
        return ExitCode.DONE
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
    broken = [{"name": o.title, "error": o.error, "traceback": o.traceback} for o in registry.origins if o.error]
    problems = [str(problem) for problem in registry.problems]
    if as_json:
        _print_json({"plugins": rows, "broken": broken, "problems": problems, "warnings": registry.warnings})
    else:
        _table("Plugins", ["kind", "name", "distribution", "version", "hooks", "import"], rows)
        for one in broken:
            _say(f"broken: {one['name']}: {one['error']}")
        for text in [*(f"error: {p}" for p in problems), *(f"warning: {w}" for w in registry.warnings)]:
            _say(text)
    return ExitCode.USER if problems else ExitCode.DONE


@plugins_app.command("new")
def plugins_new(
    kind: Annotated[
        str, typer.Argument(help="aligner, adapter, merger, scorer, dataset, converter, engine, executor or task.")
    ],
    name: Annotated[str, typer.Argument(help="Name that users will choose it by.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write; by default ./harness-NAME.")] = None,
) -> None:
    """Write an installable plugin package with a passing test."""
    from harness.contracts.scaffold import write_package

    folder = out or Path(f"harness-{name.replace('_', '-')}")
    for path in write_package(kind, name, folder):
        print(visible(str(path)))
    print(visible(f"next: pip install -e {folder} && python -m pytest {folder}"))


@data_app.command("list")
def data_list(plugin: PluginFiles = None, as_json: Json = False) -> None:
    """List data sets with subsets, row schema, licence, source and revision."""
    from harness.contracts.registry import load_plugins
    from harness.data.preview import dataset_list

    listed = dataset_list(load_plugins(plugin or ()))
    if as_json:
        _print_json(listed)
        return
    rows = [{**row, "subsets": ", ".join(row["subsets"])} for row in listed]
    _table("Data sets", ["name", "subsets", "schema", "licence", "source", "revision", "summary"], rows)


@data_app.command("show")
def data_show(
    dataset: Annotated[str, typer.Argument(help="NAME[@REVISION][:SUBSET][*WEIGHT] + ..., jsonl:FILE or OWNER/NAME.")],
    model: Annotated[str, typer.Option(help="Model folder or hub id: whose tokenizer and chat template.")],
    mask: Annotated[bool, typer.Option("--mask", help="Colour tokens by whether they carry loss.")] = False,
    samples: Annotated[int, typer.Option(help="Rows to show.")] = 3,
    template: Annotated[str | None, typer.Option(help="vicuna, mistral or a .jinja file; else the model's.")] = None,
    schema: Annotated[str | None, typer.Option(help="pairs, demonstrations or rated; else the data set's own.")] = None,
    loss_on: Annotated[str, typer.Option(help="last, all_answers or everything (demonstrations).")] = "last",
    max_length: Annotated[int, typer.Option(help="Most tokens of prompt and answer together.")] = 1024,
    seed: Annotated[int, typer.Option(help="Seed of the order.")] = 0,
    set_: Annotated[list[str] | None, typer.Option("--set", help="NAME.KEY=V: an option of a data set.")] = None,
    data_revision: DataRevisions = None,
    plugin: PluginFiles = None,
) -> None:
    """Show rows as training sees them: text, token ids, loss mask; and what was left out and why."""
    from rich.console import Console
    from rich.text import Text

    from harness.contracts.registry import load_plugins
    from harness.data import preview as show
    from harness.data.expression import at_revisions
    from harness.data.hub import parse_revisions

    options = {"schema": schema, "loss_on": loss_on, "data": options_of(set_)}
    registry = load_plugins(plugin or ())
    shown = show.look(
        at_revisions(dataset, registry, parse_revisions(data_revision or ())),
        model,
        registry=registry,
        template=template,
        rows=samples,
        seed=seed,
        max_length=max_length,
        options=options,
    )
    console = Console()
    # In a pipe there is no width to fit into.
    console = console if console.is_terminal else Console(width=200)
    for part in [*show.samples(shown, samples, mask=mask), *show.summary(shown)]:
        console.print(part, highlight=False, soft_wrap=isinstance(part, Text))


@app.command()
def doctor(as_json: Json = False) -> int:
    """Say what is installed, which engines and devices are usable, and how to get what is missing."""
    from harness.cli.diagnosis import diagnose, render
    from harness.contracts.engine import Engine
    from harness.contracts.registry import load_plugins

    registry = load_plugins(strict=False)
    engines = {}
    for name, engine in registry.of_kind(Engine):
        available = engine.availability()
        engines[name] = (available.usable, available.reason, available.install)
    diagnosis = diagnose(engines=engines)
    if as_json:
        _print_json(diagnosis.to_json())
    else:
        print(render(diagnosis))
    return ExitCode.DONE if diagnosis.ok else ExitCode.USER


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the demo's models and runs.")] = Path("runs/demo"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over.")] = False,
) -> None:
    """Build and train a tiny model here, evaluate it, and show the leaderboard: no network, no data needed."""
    from harness.core.progress import for_terminal
    from harness.demo.run import run_demo

    with for_terminal() as reporter:
        run_demo(out, fresh=fresh, reporter=reporter)


if __name__ == "__main__":
    main()

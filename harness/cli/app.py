"""The command line. Imports nothing heavy: each command imports what it needs when it runs."""

from __future__ import annotations

import io
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

from harness.cli.align import AlignCommand, align
from harness.cli.data import data_app
from harness.cli.eval import compare, eval_, report
from harness.cli.export import export
from harness.cli.fetch import fetch
from harness.cli.judge import judge_app
from harness.cli.merge import MergeCommand, fold, merge
from harness.cli.options import Json
from harness.cli.plugins import plugins_app, tasks
from harness.cli.push import push
from harness.cli.serve import serve
from harness.cli.study import study_app
from harness.cli.tables import print_json, say
from harness.core.errors import ExitCode, HarnessError, Requeue, UserError
from harness.core.machine import hush_libraries

app = typer.Typer(
    name="harness",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    # Plain help: rich help costs 0.2 s of imports.
    rich_markup_mode=None,
    help="Find out what a preference-alignment choice really does to a language model.",
)
app.add_typer(plugins_app, name="plugins")
app.command("eval")(eval_)
app.command("report")(report)
app.command("compare")(compare)
app.command("export")(export)
app.command("align", cls=AlignCommand)(align)
app.command("merge", cls=MergeCommand)(merge)
app.command("fold")(fold)
app.command("serve")(serve)
app.command("push")(push)
app.command("tasks")(tasks)
app.command("fetch")(fetch)
app.add_typer(data_app, name="data")
app.add_typer(judge_app, name="judge")
app.add_typer(study_app, name="study")


def main() -> NoReturn:
    """Entry point: turns errors into messages and exit codes."""
    hush_libraries()
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
        say(f"error: {error}")
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        say("interrupted: what is done is kept; run the same command again")
        code = ExitCode.INTERRUPTED
    except Requeue:
        say("stopped by a signal: what is done is kept; run the same command again")
        code = ExitCode.REQUEUE
    except OSError as error:
        from harness.steps.files import is_disk_full, is_refused, refusal

        refused = refusal(error) if is_disk_full(error) else None
        if refused is None and not is_refused(error):
            raise
        what, fix = refused or (f"cannot be used: {error.strerror}", "Give another path.")
        say(f"error: {error.filename or 'a file'}: {what}\n  {fix}")
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
    """Print a usage error of the command line itself; anything else is a bug and keeps its traceback."""
    show = getattr(error, "show", None)
    if show is None or not hasattr(error, "exit_code"):
        raise error
    said = io.StringIO()
    show(file=said)
    say(said.getvalue().rstrip("\n"))
    return int(error.exit_code)


def _requeue(number: int, frame: FrameType | None) -> None:
    # Schedulers repeat themselves; a second signal must not cut the first one's tidying short.
    for each in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(each, signal.SIG_IGN)
    raise Requeue


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
        print_json(diagnosis.to_json())
    else:
        print(render(diagnosis))
    return ExitCode.DONE if diagnosis.ok else ExitCode.USER


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the demo's world and its study.")] = Path("runs/demo"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over.")] = False,
    real: Annotated[
        bool, typer.Option("--real", help="The shipped study `quick` instead: a small hub model, HH-RLHF; downloads.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="With --real: folder or hub id of the base to take.")] = None,
) -> int:
    """Make a tiny world here and study it from pairs to leaderboard: no network, no data needed."""
    if real:
        return _real(out / "real", model, fresh)
    if model is not None:
        what = f"{model}: the demo makes its own base"
        raise UserError("--model", what, "Add --real; or `harness eval --model MODEL`.")
    from harness.core.progress import for_terminal
    from harness.demo.run import run_demo

    with for_terminal() as reporter:
        failures = run_demo(out, fresh=fresh, reporter=reporter).failures
    return ExitCode.STEPS_FAILED if failures else ExitCode.DONE


def _real(out: Path, model: str | None, fresh: bool) -> int:
    """Fetch, plan and run the study `quick`, as their own commands do."""
    from harness.cli.study import plan, run
    from harness.core.caches import offline

    base = [f"base={model}"] if model is not None else None
    # Where the network is switched off, the study itself says what is missing, if anything is.
    if not offline():
        fetch("quick", "study", base)
    nothing = {"changes": None, "data_revision": None, "plugin": None}
    asked = {"file": Path("quick"), "out": out, "model": base, "online": False, **nothing}
    plan(**asked)
    return int(run(**asked, fresh=fresh))


if __name__ == "__main__":
    main()

"""`harness study`: plan, run and watch a whole grid of arms from one YAML file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.cli.options import DataRevisions, Json, PluginFiles, options_of
from harness.cli.tables import print_json, print_table
from harness.core.errors import ExitCode, UserError
from harness.core.text import first_line, visible

if TYPE_CHECKING:
    from harness.study.plan import StudyPlan

study_app = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Plan, run and watch a whole grid of arms from one YAML file.",
)
File = Annotated[Path, typer.Argument(help="The study's YAML file, or the name of a shipped one.")]
Out = Annotated[Path | None, typer.Option(help="Run folder; by default runs/STUDY.")]
Model = Annotated[
    list[str] | None, typer.Option("--model", metavar="BASE=PATH", help="Folder or hub id of a base (repeatable).")
]
Set = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE over a key of the file (repeatable).")]


def _planned(
    file: Path,
    model: list[str] | None,
    changes: list[str] | None,
    revisions: list[str] | None,
    plugin: list[str] | None,
) -> StudyPlan:
    from harness.cli.options import with_defaults
    from harness.data.hub import parse_revisions
    from harness.study.plan import plan_study
    from harness.study.spec import find_study, read_study

    models = {}
    for one in model or ():
        name, equals, path = one.partition("=")
        if not equals or not path:
            raise UserError("--model", f"{one!r} is not BASE=PATH", "Write for example --model llama=./llama-7b.")
        models[name] = path
    found = find_study(file)
    # Read twice, as its plugins must be loaded before it can be planned; it is small.
    named = read_study(found, models=models, changes=tuple(changes or ())).spec
    defaults, registry = with_defaults([*named.plugins, *(plugin or ())])
    commits = {**defaults.data_revisions, **named.data_revisions, **parse_revisions(revisions or ())}
    return plan_study(found, registry=registry, models=models, changes=tuple(changes or ()), revisions=commits)


def _folder(plan: StudyPlan, out: Path | None) -> Path:
    return out if out is not None else Path("runs") / plan.read.spec.study


@study_app.command("plan")
def plan(
    file: File,
    out: Out = None,
    arms: Annotated[bool, typer.Option("--arms", help="List every arm, with the key of its step.")] = False,
    why: Annotated[str | None, typer.Option(help="Key of a step: show all that its id is made of.")] = None,
    model: Model = None,
    set_: Set = None,
    data_revision: DataRevisions = None,
    plugin: PluginFiles = None,
    as_json: Json = False,
) -> None:
    """Say what a study would do: arms, steps by kind, and what is done already; loads no model."""
    from harness.study.outline import counted, data_rows, families, undecidable
    from harness.study.status import states_of, summary

    found = _planned(file, model, set_, data_revision, plugin)
    if why is not None:
        _say_why(found, why, _folder(found, out))
        return
    if as_json:
        print_json(found.to_json())
        return
    spec, root = found.read.spec, _folder(found, out)
    print(visible(f"{spec.study}: {counted(found.arms)}, {len(found.graph)} steps"))
    if arms:
        every = [
            {"arm": arm.name, "kind": arm.kind, "from": ", ".join(arm.parents), "key": _key(found, arm.name)}
            for arm in found.arms
        ]
        print_table("Arms", ["arm", "kind", "from", "key"], every)
    else:
        print_table("Arms", ["kind", "arm", "bases", "seeds", "arms", "from"], families(found.arms))
    tasks = list(
        dict.fromkeys(task.chosen.spec.name for one in found.evaluations for arm in one.arms for task in arm.tasks)
    )
    for line in undecidable(spec, found.arms, tasks):
        print(visible(f"warning: {line}"))
    if spec.data:
        print_table("Data", ["data", "is", "rows stated", "rows here"], data_rows(spec, root))
    if (root / "plan.json").is_file():
        print_table("Steps", ["kind", "steps", "done", "failed", "begun", "ready", "waiting"], summary(states_of(root)))
        return
    asked = sum(len(one.arms) for one in found.evaluations)
    rows: list[dict[str, Any]] = [{"kind": kind, "steps": count} for kind, count in found.graph.counts().items()]
    print_table("Steps", ["kind", "steps"], rows)
    print(f"{len(found.evaluations)} models are opened for {asked} arms; each scorer is opened once for all of them")


def _key(plan: StudyPlan, arm: str) -> str:
    step = plan.promises[arm].step
    return step.id[:12] if step is not None else ""


def _say_why(plan: StudyPlan, key: str, root: Path) -> None:
    """Print what a step's id is made of, and in what other records of its arm differ from it."""
    from harness.steps.files import read_json
    from harness.steps.step import unequal
    from harness.study.folder import read_index
    from harness.study.plan import STEP

    found = [step for step in plan.graph if step.id.startswith(key)]
    if len(found) != 1:
        fix = "Give one from `harness study steps FILE`."
        raise UserError(f"--why {key}", f"{len(found)} steps have such a key", fix)
    step = found[0]
    id_ = read_index(root).get(step.id, step.id)
    was = {}
    # Another step of this kind and arm, as an earlier version of the study had it.
    for folder in sorted((root / "steps").glob(f"{step.kind}-{step.arm}-*")):
        if not folder.name.endswith(id_[:12]):
            before = read_json(folder / "step.json").get("identity") or {}
            now = {key: value for key, value in step.identity.items() if key in before}
            lines = unequal({key: before[key] for key in now}, now)
            # What an input will be is known by its own step alone.
            was[folder.name] = [line for line in lines if f"is '{STEP}" not in line]
    told = {"kind": step.kind, "arm": step.arm, "key": step.id, "identity": step.identity}
    print_json({**told, "differs_from": was})


@study_app.command("run")
def run(
    file: File,
    out: Out = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what the run folder holds and start over.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try again what failed.")] = False,
    executor: Annotated[
        str | None, typer.Option(help="Who carries it out, in processes of its own; --set executor.KEY=V.")
    ] = None,
    model: Model = None,
    set_: Set = None,
    data_revision: DataRevisions = None,
    plugin: PluginFiles = None,
) -> int:
    """Train, merge, answer and score all arms of a study; the same command goes on where it stopped."""
    from harness.cli.eval import print_report
    from harness.contracts.report_section import ReportSection
    from harness.core.progress import for_terminal
    from harness.report.board.write import write_board
    from harness.report.build import write_all
    from harness.steps.execute import Execution
    from harness.study.run import run_study
    from harness.study.workers import through

    mine = [one for one in set_ or () if one.startswith("executor.")]
    found = _planned(file, model, [one for one in set_ or () if one not in mine], data_revision, plugin)
    root = _folder(found, out)
    options = options_of(mine).get("executor", {})
    elsewhere = (
        through(Execution(executor or "local", options), found.registry) if executor is not None or mine else None
    )
    with for_terminal() as reporter:
        done = run_study(found, root, fresh=fresh, retry_failed=retry_failed, reporter=reporter, execute=elsewhere)
        for name, reason in done.failures.items():
            reporter.note(f"failed: {name}: {first_line(reason)}")
    for report in write_all(root, page=False).values():
        print_report(report)
    sections = [section for _, section in found.registry.of_kind(ReportSection)]
    board = write_board([root], root / "report", sections=sections)
    for line in (board.finding, *(f"claim {one.name}: {one.status} ({one.why})" for one in board.claims)):
        print(visible(line))
    print(visible(str(root / "report" / "report.html")))
    return ExitCode.STEPS_FAILED if done.failures else ExitCode.DONE


@study_app.command("status")
def status(
    run: Annotated[Path, typer.Argument(help="Run folder of a study.")],
    watch: Annotated[bool, typer.Option("--watch", help="Again every two seconds, until all has ended.")] = False,
    as_json: Json = False,
) -> None:
    """Say how far a study is, from its records alone; a study that runs is not disturbed."""
    from harness.study.status import states_of, summary

    while True:
        states = states_of(run)
        if as_json:
            print_json({"steps": [one.__dict__ for one in states], "kinds": summary(states)})
        else:
            print_table(
                str(run),
                ["kind", "steps", "done", "failed", "begun", "ready", "waiting", "seconds"],
                summary(states),
            )
            for one in states:
                if one.state == "begun":
                    print(visible(f"begun: {one.kind} {one.arm}, last heard of {one.silent:.0f} s ago"))
                if one.state == "failed":
                    print(visible(f"failed: {one.kind} {one.arm}: {first_line(one.error or '')}"))
        if not watch or all(one.state in ("done", "failed") for one in states):
            return
        time.sleep(2)


@study_app.command("steps")
def steps(
    file: File,
    out: Out = None,
    ready: Annotated[bool, typer.Option("--ready", help="Only those that could begin now.")] = False,
    model: Model = None,
    set_: Set = None,
    data_revision: DataRevisions = None,
    plugin: PluginFiles = None,
    as_json: Json = False,
) -> None:
    """List a study's steps with their keys, for a scheduler that carries them out with `harness study step`."""
    from harness.study.status import states_of

    found = _planned(file, model, set_, data_revision, plugin)
    root = _folder(found, out)
    known = {one.key: one.state for one in states_of(root)} if (root / "plan.json").is_file() else {}
    ended = {key for key, state in known.items() if state == "done"}
    chosen = found.graph.ready(ended) if ready else list(found.graph)
    rows = [{"key": step.id, "kind": step.kind, "arm": step.arm, "state": known.get(step.id, "")} for step in chosen]
    # What another process is at is not to be begun again.
    rows = [row for row in rows if not (ready and row["state"] in ("begun", "failed"))]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        print(visible(f"{row['key']} {row['kind']} {row['arm']}"))


@study_app.command("step")
def step(
    file: File,
    key: Annotated[list[str], typer.Argument(help="Keys of steps, as `harness study steps` lists them.")],
    out: Out = None,
    model: Model = None,
    set_: Set = None,
    data_revision: DataRevisions = None,
    plugin: PluginFiles = None,
) -> int:
    """Carry out single steps, while other processes may carry out others: for Slurm arrays, Airflow, Snakemake."""
    from harness.core.progress import for_terminal
    from harness.study.run import carry_out_steps
    from harness.study.status import states_of

    found = _planned(file, model, set_, data_revision, plugin)
    root = _folder(found, out)
    with for_terminal() as reporter:
        carry_out_steps(found, root, key, reporter=reporter)
    states = {one.key: one for one in states_of(root)}
    wrong = [states[one] for one in key if states[one].state != "done"]
    for one in wrong:
        print(visible(f"{one.kind} {one.arm}: {one.state}{': ' + one.error if one.error else ''}"))
    return ExitCode.STEPS_FAILED if wrong else ExitCode.DONE


@study_app.command("schema")
def schema() -> None:
    """Print the JSON schema of a study's file, for editors that complete and check YAML."""
    from harness.study.spec import StudySpec

    print_json(StudySpec.model_json_schema())

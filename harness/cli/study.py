"""`harness study`: plan, run and watch a whole grid of arms from one YAML file."""

from __future__ import annotations

import functools
import inspect
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from harness.cli.options import DataRevisions, Json, PluginFiles, models_of, options_of
from harness.cli.tables import print_json, print_table, say
from harness.core.errors import ExitCode, UserError
from harness.core.text import first_line, human_seconds, visible

if TYPE_CHECKING:
    from harness.study.card import Card
    from harness.study.plan import StudyPlan
    from harness.study.status import StepState

study_app = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Plan, run and watch a whole grid of arms from one YAML file.",
)
File = Annotated[Path, typer.Argument(help="The study's YAML file, or the name of a shipped one.")]
CardName = Annotated[str | None, typer.Option("--card", help="GPU that it is planned for, A100-40GB say.")]
Memory = Annotated[str | None, typer.Option(help="Memory of that GPU, where it is another: 40GB.")]


@dataclass(frozen=True)
class Asked:
    """What names a study, the same in every command."""

    file: File
    out: Annotated[Path | None, typer.Option(help="Run folder; by default runs/STUDY.")] = None
    model: Annotated[
        list[str] | None, typer.Option("--model", metavar="BASE=PATH", help="Folder or hub id of a base (repeatable).")
    ] = None
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE over a key of the file (repeatable).")
    ] = None
    data_revision: DataRevisions = None
    plugin: PluginFiles = None
    online: Annotated[bool, typer.Option("--online", help="Fetch from the hub what is not here.")] = False

    def planned(self, changes: list[str] | None = None, *, fresh: bool = False) -> StudyPlan:
        """The study as it is asked for; ``changes`` in place of its own where they are given.

        ``fresh``: whatever searches of its run folder have chosen.
        """
        from harness.core.caches import stay_offline

        stay_offline(online=self.online)
        try:
            return self._planned(tuple(self.changes or () if changes is None else changes), fresh)
        except UserError as error:
            if "hf download" not in error.fix or self.online:
                raise
            more = f"`{self.fetching()}` fetches all that the study reads; with --online `harness study` does."
            raise UserError(error.where, error.what, f"{error.fix} {more}") from None

    def _planned(self, changes: tuple[str, ...], fresh: bool) -> StudyPlan:
        from harness.cli.options import with_defaults
        from harness.data.hub import parse_revisions
        from harness.study.plan import plan_study
        from harness.study.searched import read_choices
        from harness.study.spec import find_study, read_study

        models, found = models_of(self.model), find_study(self.file)
        # Read twice, as its plugins must be loaded before it can be planned; it is small.
        named = read_study(found, models=models, changes=changes).spec
        defaults, registry = with_defaults([*named.plugins, *(self.plugin or ())])
        given = parse_revisions(self.data_revision or ())
        commits = {**defaults.data_revisions, **named.data_revisions, **given}
        chosen = {} if fresh else read_choices(self._root(named.study))
        return plan_study(found, registry=registry, models=models, changes=changes, revisions=commits, chosen=chosen)

    def folder(self, plan: StudyPlan) -> Path:
        """The run folder."""
        return self._root(plan.read.spec.study)

    def _root(self, study: str) -> Path:
        return self.out if self.out is not None else Path("runs") / study

    def fetching(self) -> str:
        """The command that fetches what the study reads."""
        options = {"--model": self.model, "--data-revision": self.data_revision, "--plugin": self.plugin}
        words = [word for name, values in options.items() for one in values or () for word in (name, one)]
        changes = (word for one in self.changes or () if not one.startswith("executor.") for word in ("--set", one))
        return shlex.join(["harness", "fetch", str(self.file), *words, *changes])


def _of_study(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command, whose first argument is :class:`Asked`, the arguments and options that make one."""
    shared = list(inspect.signature(Asked).parameters.values())
    own = list(inspect.signature(command).parameters.values())[1:]
    hints = {**get_type_hints(Asked, include_extras=True), **get_type_hints(command, include_extras=True)}

    @functools.wraps(command)
    def called(**given: Any) -> Any:
        asked = Asked(**{one.name: given.pop(one.name) for one in shared})
        return command(asked, **given)

    places = [
        one.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[one.name])
        for one in (shared[0], *own, *shared[1:])
    ]
    called.__signature__ = inspect.Signature(places)  # type: ignore[attr-defined]
    called.__annotations__ = {one.name: one.annotation for one in places}
    del called.__wrapped__
    return called


@study_app.command("plan")
@_of_study
def plan(
    asked: Asked,
    arms: Annotated[bool, typer.Option("--arms", help="List every arm, with the key of its step.")] = False,
    why: Annotated[str | None, typer.Option(help="Key of a step: show what it is made of, and what changed.")] = None,
    card: CardName = None,
    memory: Memory = None,
    costs_from: Annotated[
        list[Path] | None, typer.Option("--costs-from", help="Run folder whose records say what steps take.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a study would do, and what that takes: arms, steps, hours, memory, disk; loads no model."""
    from harness.cli.study_tables import print_costs
    from harness.study.costs import study_costs
    from harness.study.outline import counted, data_rows, families, searched, undecidable
    from harness.study.status import states_of, summary

    found = asked.planned()
    spec, root = found.read.spec, asked.folder(found)
    if why is not None:
        from harness.study.why import explain

        print_json(explain(found, why, root))
        return
    states = states_of(root) if (root / "plan.json").is_file() else []
    chosen = _card(found, states, card, memory)
    costs = study_costs(found, states, card=chosen, other_runs=costs_from or ())
    if as_json:
        print_json({**found.to_json(), "costs": costs.to_json()})
        return
    print(visible(f"{spec.study}: {counted(found.arms)}, {len(found.graph)} steps"))
    if arms:
        every = [
            {"arm": arm.name, "kind": arm.kind, "from": ", ".join(arm.parents), "key": _key(found, arm.name)}
            for arm in found.arms
        ]
        print_table("Arms", ["arm", "kind", "from", "key"], every)
    else:
        print_table("Arms", ["kind", "arm", "bases", "seeds", "arms", "from"], families(found.arms))
    if found.searches:
        print_table("Searches", ["search", "cells", "varied", "arms", "chosen"], searched(found.searches.values()))
    if found.waiting:
        print(f"{len(found.waiting)} arms are planned after search: their steps are not among those that are counted")
    tasks = list(
        dict.fromkeys(task.chosen.spec.name for one in found.evaluations for arm in one.arms for task in arm.tasks)
    )
    for line in undecidable(spec, found.arms, tasks):
        print(visible(f"warning: {line}"))
    if spec.data:
        print_table("Data", ["data", "is", "rows stated", "rows here"], data_rows(spec, root))
    if states:
        print_table("Steps", ["kind", "steps", "done", "failed", "begun", "ready", "waiting"], summary(states))
    print_costs(costs)
    answered = sum(len(one.arms) for one in found.evaluations)
    print(f"{len(found.evaluations)} models are opened for {answered} arms; each scorer is opened once for all of them")


def _card(plan: StudyPlan, states: list[StepState], card: str | None, memory: str | None) -> Card | None:
    """The GPU that is asked for, or that is here; stops where a step certainly does not fit into what is asked for.

    Raises:
        UserError: an unknown card, or a step that needs more than its memory.
    """
    from harness.core.machine import gpu_names
    from harness.study.card import card_named, card_of
    from harness.study.costs import refuse_what_cannot_fit

    chosen = card_of(card, memory, plan.read.spec.resources)
    if chosen is None:
        return card_named(gpu_names())
    refuse_what_cannot_fit(plan, {one.key for one in states if one.state == "done"}, chosen)
    return chosen


def _key(plan: StudyPlan, arm: str) -> str:
    if arm in plan.waiting:
        return "after search"
    step = plan.promises[arm].step
    return step.id[:12] if step is not None else ""


@study_app.command("run")
@_of_study
def run(
    asked: Asked,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what the run folder holds and start over.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try again what failed.")] = False,
    executor: Annotated[
        str | None, typer.Option(help="Who carries it out, in processes of its own; --set executor.KEY=V.")
    ] = None,
    card: CardName = None,
    memory: Memory = None,
) -> int:
    """Train, merge, answer and score all arms of a study; the same command goes on where it stopped."""
    from harness.cli.eval import print_report
    from harness.contracts.report_section import ReportSection
    from harness.core.caches import offline
    from harness.core.progress import for_terminal
    from harness.report.board.write import write_board
    from harness.report.build import write_all
    from harness.steps.execute import Execution
    from harness.study.needs import refuse_missing
    from harness.study.run import run_study
    from harness.study.workers import through

    mine = [one for one in asked.changes or () if one.startswith("executor.")]
    found = asked.planned([one for one in asked.changes or () if one not in mine], fresh=fresh)
    root = asked.folder(found)
    options = options_of(mine).get("executor", {})
    if executor in (None, "local") and isinstance(options, dict):
        options = {**taken(found), **options}
    elsewhere = (
        through(Execution(executor or "local", options), found.registry) if executor is not None or mine else None
    )
    _card(found, _states_if_any(root), card, memory)
    if offline():
        refuse_missing(found.read, found.registry, asked.fetching())
    with for_terminal() as reporter:
        done = run_study(found, root, fresh=fresh, retry_failed=retry_failed, reporter=reporter, execute=elsewhere)
        for name, reason in done.failures.items():
            reporter.note(f"failed: {name}: {first_line(reason)}")
    code = ExitCode.STEPS_FAILED if done.failures else ExitCode.DONE
    if not done.plan.evaluations:
        _print_searches(root)
        return code
    for report in write_all(root, page=False).values():
        print_report(report)
    sections = [section for _, section in found.registry.of_kind(ReportSection)]
    board = write_board([root], root / "report", sections=sections)
    for line in (board.finding, *(f"claim {one.name}: {one.status} ({one.why})" for one in board.claims)):
        print(visible(line))
    print(visible(str(root / "report" / "report.html")))
    return code


def _print_searches(root: Path) -> None:
    """Of a study that asks nothing: what its searches have chosen, and where its arms lie."""
    from harness.study.searched import TABLE

    if (root / TABLE).is_file():
        print(visible((root / TABLE).read_text(encoding="utf-8"), lines=True))
    print(visible(str(root / "steps")))


def taken(plan: StudyPlan) -> dict[str, Any]:
    """What workers of this machine take where nothing else is said: the study's ``resources``."""
    given = plan.read.spec.resources
    if given is None:
        return {}
    gpus = list(range(given.devices)) if given.devices is not None else None
    return {key: value for key, value in (("cores", given.cores), ("gpus", gpus)) if value is not None}


def _states_if_any(root: Path) -> list[StepState]:
    """The steps of a run folder; none of one whose plan is damaged, which is written again."""
    from harness.study.status import states_of

    try:
        return states_of(root) if (root / "plan.json").is_file() else []
    except UserError:
        return []


@study_app.command("status")
def status(
    run: Annotated[Path, typer.Argument(help="Run folder of a study.")],
    watch: Annotated[bool, typer.Option("--watch", help="Again every two seconds, until all has ended.")] = False,
    as_json: Json = False,
) -> None:
    """Say how far a study is, from its records alone; a study that runs is not disturbed."""
    from harness.cli.study_tables import print_status
    from harness.study.status import states_of, summary, time_left

    while True:
        states = states_of(run)
        left = time_left(states)
        if as_json:
            steps = [one.to_json() for one in states]
            print_json({"steps": steps, "kinds": summary(states), "left": left.__dict__}, line=watch)
        else:
            print_status(str(run), states)
            if left.seconds is not None and any(one.state not in ("done", "failed") for one in states):
                least = "at least " if left.unknown else ""
                print(f"left: {least}{human_seconds(left.seconds)}, with {left.at_once} at once")
        if not watch or all(one.state in ("done", "failed") for one in states):
            return
        time.sleep(2)


@study_app.command("steps")
@_of_study
def steps(
    asked: Asked,
    ready: Annotated[bool, typer.Option("--ready", help="Only those that could begin now, or were killed.")] = False,
    as_json: Json = False,
) -> None:
    """List a study's steps with their keys, for a scheduler that carries them out with `harness study step`."""
    from harness.steps.lock import is_held
    from harness.study.status import states_of

    found = asked.planned()
    root = asked.folder(found)
    known = {one.key: one for one in states_of(root)} if (root / "plan.json").is_file() else {}
    ended = {key for key, one in known.items() if one.state == "done"}
    rows = []
    for step in found.graph.ready(ended) if ready else found.graph:
        row: dict[str, Any] = {"key": step.id, "kind": step.kind, "arm": step.arm, "state": ""}
        if (one := known.get(step.id)) is not None:
            row["state"] = one.state
            if one.state == "begun" and one.folder is not None:
                # Whoever is at a step holds its folder, until it ends or is killed.
                row["held"] = is_held(root / "steps" / one.folder)
        # What another process is at is not to be begun again.
        if not ready or (row["state"] != "failed" and not row.get("held", False)):
            rows.append(row)
    if as_json:
        print_json(rows)
        return
    for row in rows:
        print(visible(f"{row['key']} {row['kind']} {row['arm']}"))


@study_app.command("step")
@_of_study
def step(
    asked: Asked,
    key: Annotated[list[str], typer.Argument(help="Keys of steps, as `harness study steps` lists them.")],
) -> int:
    """Carry out single steps, while other processes may carry out others: for Slurm arrays, Airflow, Snakemake."""
    from harness.core.progress import for_terminal
    from harness.study.run import carry_out_steps
    from harness.study.status import states_of

    found = asked.planned()
    root = asked.folder(found)
    with for_terminal() as reporter:
        carry_out_steps(found, root, key, reporter=reporter)
    states = {one.key: one for one in states_of(root)}
    wrong = [states[one] for one in key if states[one].state != "done"]
    for one in wrong:
        say(f"{one.kind} {one.arm}: {one.state}{': ' + one.error if one.error else ''}")
    return ExitCode.STEPS_FAILED if wrong else ExitCode.DONE


@study_app.command("schema")
def schema() -> None:
    """Print the JSON schema of a study's file, for editors that complete and check YAML."""
    from harness.study.spec import StudySpec

    print_json(StudySpec.model_json_schema())

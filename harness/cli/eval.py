"""`harness eval`, and what looks at its runs: `harness report` and `harness compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.cli.options import (
    AllowPickle,
    AllowTemplateMismatch,
    DataRevisions,
    Folders,
    Json,
    PluginFiles,
    Revision,
    RunDtype,
    TrustRemoteCode,
    model_of,
    options_of,
    revisions_of,
    with_defaults,
)
from harness.cli.tables import print_json, say
from harness.core.errors import ExitCode, UserError
from harness.core.text import visible

if TYPE_CHECKING:
    from harness.report.model import ComparisonReport, Report


def eval_(
    model: Annotated[str, typer.Option(help="Model folder, hub id, or URL of an OpenAI-compatible endpoint.")],
    task: Annotated[
        list[str] | None, typer.Option(help="Task name, NAME:raw, NAME:chat, lm_eval:NAME or YAML.")
    ] = None,
    suite: Annotated[str | None, typer.Option(help="Suite name; `quick` if no task is given either.")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="Folder or hub id of a peft adapter, or a folder of adapters (repeatable)."),
    ] = None,
    with_base: Annotated[
        bool | None,
        typer.Option("--with-base/--no-base", help="Evaluate the base too; by default beside several adapters."),
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(help="Value of the conditioning, or PREFERENCE=VALUE,..., or all (repeatable); else its default."),
    ] = None,
    revision: Revision = None,
    engine: Annotated[str | None, typer.Option(help="transformers, vllm, openai, or auto.")] = None,
    limit: Annotated[int | None, typer.Option(help="Samples per leaf task (per subject of MMLU, say).")] = None,
    seed: Annotated[int, typer.Option(help="Seed of few-shot choice, sampling and resampling.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Run folder; continues if it holds this evaluation.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what the run folder holds and start over.")] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="engine.KEY=V, executor.KEY=V, TASK.limit=N, TASK.scorer.KEY=V.")
    ] = None,
    parity: Annotated[int | None, typer.Option(help="Samples per task that a second engine answers too.")] = None,
    parity_engine: Annotated[str, typer.Option(help="The second engine.")] = "transformers",
    max_judge_cost: Annotated[
        float | None, typer.Option(help="Most that a judge may cost in this run (in the currency of its prices).")
    ] = None,
    data_revision: DataRevisions = None,
    dtype: RunDtype = "auto",
    executor: Annotated[str, typer.Option(help="Who carries it out; its options: --set executor.KEY=V.")] = "local",
    in_process: Annotated[
        bool, typer.Option("--in-process", help="Everything in this process, for a debugger.")
    ] = False,
    store: Annotated[
        list[Path] | None, typer.Option(help="Run folder whose ended steps of the same ids are taken (repeatable).")
    ] = None,
    plugin: PluginFiles = None,
    tasks: Folders = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    trust_task_code: Annotated[
        bool, typer.Option("--trust-task-code", help="Run code that lm-eval YAML of yours names (!function).")
    ] = False,
    allow_template_mismatch: AllowTemplateMismatch = False,
) -> int:
    """Evaluate a model, or many adapters of one base: helpfulness and harmlessness, with intervals."""
    from harness.contracts.report_section import ReportSection
    from harness.core.config import laid_over
    from harness.core.progress import for_terminal
    from harness.evaluation.run import evaluate
    from harness.report.build import write_reports
    from harness.steps.execute import Execution

    _check_numbers(limit, parity, max_judge_cost)
    defaults, registry = with_defaults(plugin)
    asked = model_of(
        "harness eval",
        model=model,
        revision=revision,
        dtype=dtype,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        allow_template_mismatch=allow_template_mismatch,
    )
    options = laid_over(defaults.options, options_of(set_))
    how = Execution(executor, options.pop("executor", {}), in_process)
    with for_terminal() as reporter:
        evaluation = evaluate(
            asked,
            tasks=task or (),
            suite=suite,
            out=out,
            fresh=fresh,
            registry=registry,
            reporter=reporter,
            adapters=adapter or (),
            with_base=with_base,
            control=control or (),
            engine=engine or defaults.engine,
            limit=limit,
            seed=seed,
            options=options,
            executor=how,
            stores=store or (),
            task_folders=(*defaults.task_folders, *(tasks or ())),
            data_revisions=revisions_of(data_revision, defaults),
            trust_task_code=trust_task_code,
            parity=parity,
            parity_engine=parity_engine,
            max_judge_cost=max_judge_cost,
        )
        spent = ", ".join(f"{name} {value:.1f}" for name, value in evaluation.seconds.items() if value)
        if spent:
            reporter.note(f"seconds: {spent}")
    sections = [section for _, section in registry.of_kind(ReportSection)]
    print_report(write_reports(evaluation.root, sections=sections), evaluation.root / "report" / "report.html")
    return ExitCode.STEPS_FAILED if evaluation.failures else ExitCode.DONE


def _check_numbers(limit: int | None, parity: int | None, cost: float | None) -> None:
    if limit is not None and limit < 1:
        raise UserError("--limit", f"{limit} is no positive number", "Give 1 or more, or leave it out for all samples.")
    if parity is not None and parity < 1:
        raise UserError("--parity", f"{parity} is no positive number", "Give 1 or more, or leave it out.")
    if cost is not None and cost < 0:
        raise UserError("--max-judge-cost", f"{cost:g} is negative", "Give 0 or more, or leave it out.")


def print_report(report: Report, page: Path | None = None) -> None:
    """Print a report's table, and where its page lies if that is told."""
    from rich.console import Console

    from harness.report.build import terminal_table

    console = Console()
    console.print(terminal_table(report))
    if page is not None:
        console.print(visible(str(page)), markup=False, highlight=False, soft_wrap=True)


def report(
    run: Annotated[list[Path], typer.Argument(help="Run folders, studies, logs of lm-eval, inspect, AlpacaEval.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the board; with one run RUN/report, of a log reports/NAME.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Title of the board; by default the runs' names.")] = None,
    layout: Annotated[str | None, typer.Option(help="Also the tables in a layout: paper (arXiv 2406.04879).")] = None,
    published: Annotated[
        Path | None, typer.Option(help="Published numbers beside ours: a YAML file, or `paper` (arXiv 2406.04879).")
    ] = None,
    alpha: Annotated[float, typer.Option(help="Level of the board's tests, Holm-adjusted over a column.")] = 0.05,
    samples: Annotated[
        bool | None,
        typer.Option("--samples/--no-samples", help="All samples beside the page; by default up to 100,000."),
    ] = None,
    png: Annotated[bool, typer.Option("--png", help="Figures as PNG beside their SVG (extra `png`).")] = False,
    plugin: PluginFiles = None,
) -> None:
    """Rebuild reports from the records and print them: a page with the board, figures and samples, JSON, CSV, LaTeX."""
    from harness.contracts.registry import load_plugins
    from harness.contracts.report_section import ReportSection
    from harness.report.board.write import write_board
    from harness.report.build import write_all
    from harness.report.external.open import is_foreign

    if len(run) == 1 and is_foreign(run[0]):
        given = {"--title": title, "--layout": layout, "--published": published, "--png": png or None}
        if (option := next((name for name, value in given.items() if value is not None), None)) is not None:
            raise UserError(option, "is of a board, and a log alone has none", "Give runs beside it, and --out DIR.")
        for place, found in write_all(run[0], out).items():
            print_report(found, place / "report.html")
        return
    if len(run) > 1 and out is None:
        fix = "Give the folder of their board with --out DIR."
        raise UserError("--out", f"{len(run)} runs have no report folder in common", fix)
    registry = load_plugins(plugin or ())
    folder = out or run[0] / "report"
    if len(run) == 1:
        for found in write_all(run[0], page=False).values():
            print_report(found)
    board = write_board(
        run,
        folder,
        title=title,
        layout=layout,
        published=published,
        alpha=alpha,
        samples=samples,
        sections=[section for _, section in registry.of_kind(ReportSection)],
        png=png,
    )
    if len(run) > 1 or len(board.rows) > 1:
        from rich.console import Console

        from harness.report.board.text import board_table

        if len(run) > 1:
            Console().print(board_table(board))
        print(visible(board.finding))
        for claim in board.claims:
            print(visible(f"claim {claim.name}: {claim.status} ({claim.why})"))
    print(visible(str(folder / "report.html")))


def compare(
    run_a: Annotated[Path, typer.Argument(help="Run folder or log to compare with; alone: its arms against its base.")],
    run_b: Annotated[Path | None, typer.Argument(help="Run folder or log of the candidate.")] = None,
    fail_if_worse: Annotated[bool, typer.Option("--fail-if-worse", help="Exit 4 if B is significantly worse.")] = False,
    show: Annotated[int, typer.Option(help="Samples that changed, per metric, to show.")] = 3,
    every: Annotated[bool, typer.Option("--all", help="Also metrics that the leaderboard does not show.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    alpha: Annotated[float, typer.Option(help="Level of the tests, Holm-adjusted over the table.")] = 0.05,
    allow_engine_mismatch: Annotated[
        bool, typer.Option("--allow-engine-mismatch", help="Compare runs of engines that no parity record joins.")
    ] = False,
    allow_prompt_mismatch: Annotated[
        bool, typer.Option("--allow-prompt-mismatch", help="Compare what was asked raw or in another chat template.")
    ] = False,
    html: Annotated[
        bool, typer.Option("--html", help="Write a page with all samples side by side, and print where it lies.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder of --html; otherwise compare-A-B in the current folder.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Paired differences between two runs, or between the arms and the base of one, with the samples that changed."""
    from harness.report import compare as comparing, compare_text
    from harness.report.winrate_text import wins_table

    if out is not None and not html:
        raise UserError("--out", f"{out} is the folder of a page, and none was asked for", "Give --html, too.")
    result = comparing.compare_runs(
        run_a,
        run_b,
        seed=seed,
        alpha=alpha,
        allow_engine_mismatch=allow_engine_mismatch,
        allow_prompt_mismatch=allow_prompt_mismatch,
    )
    if as_json:
        print_json(result.to_dict())
    else:
        from rich.console import Console

        console = Console()
        console.print(compare_text.comparison_table(result, everything=every))
        if (wins := wins_table(result, everything=every)) is not None:
            console.print(wins)
        changed = (
            comparing.changed_samples(
                run_a, run_b, limit=show, everything=every, allow_prompt_mismatch=allow_prompt_mismatch
            )
            if show
            else []
        )
        console.print(compare_text.changed_text(changed, result), markup=False, highlight=False, soft_wrap=True)
    if html:
        page = _write_page(result, run_a, run_b, out, everything=every)
        say(str(page)) if as_json else print(visible(str(page)))
    if fail_if_worse:
        if result.regressions:
            return ExitCode.REGRESSION
        _refuse_unjudged(result)
    return ExitCode.STEPS_FAILED if result.failed else ExitCode.DONE


def _write_page(report: ComparisonReport, a: Path, b: Path | None, out: Path | None, *, everything: bool) -> Path:
    """The page of a comparison, in a folder that names both runs where none is given."""
    from harness.report.external.open import open_any
    from harness.report.pages.comparison import write_comparison
    from harness.steps.files import slug

    folder = out or Path("-".join(["compare", *(slug(run.resolve().name) for run in (a, b) if run is not None)]))
    run_b = None if b is None else open_any(b)
    return write_comparison(report, open_any(a), run_b, folder, everything=everything)


def _refuse_unjudged(result: ComparisonReport) -> None:
    """A gate must not pass what it could not judge because A and B were asked differently.

    Raises:
        UserError: a primary metric is of that kind.
    """
    found = result.asked_differently
    if found:
        shown = "; ".join(f"{one.label} {one.metric}: {one.prompts_differ}" for one in found[:3])
        raise UserError(
            "--fail-if-worse",
            f"{len(found)} of the primary metrics cannot be judged, as A and B were asked differently ({shown})",
            "Ask both alike (NAME:raw, or base and adapters in one run: harness eval --with-base), or pass "
            "--allow-prompt-mismatch.",
        )

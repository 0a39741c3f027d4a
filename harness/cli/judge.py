"""`harness judge` on the command line: win rates of annotations, and how far a judge can be trusted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.cli.options import Json, PluginFiles, options_of, with_defaults
from harness.cli.tables import print_json
from harness.core.errors import ExitCode, UserError
from harness.core.text import visible

if TYPE_CHECKING:
    from harness.judges.alpaca import LengthControl
    from harness.judges.calibrate import Calibration
    from harness.report.external.annotations import Annotations

judge_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Win rates of a judge's annotations, and checks of judges."
)

Model = Annotated[str | None, typer.Option(help="Whose wins are counted, where the file does not tell.")]
Reference = Annotated[str | None, typer.Option(help="What it is compared with.")]
Annotator = Annotated[str | None, typer.Option(help="Whose verdicts count, where the file holds several judges'.")]


@judge_app.command("winrate")
def winrate(
    annotations: Annotated[
        Path | None, typer.Argument(help="AlpacaEval annotations (.json, .jsonl). Without: published weights alone.")
    ] = None,
    model: Model = None,
    reference: Reference = None,
    annotator: Annotator = None,
    difficulty: Annotated[
        Path | None, typer.Option(help="Published instruction_difficulty.csv: length control needs it.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Published length_controlled_v1 weights; else a regression is fitted.")
    ] = None,
    gamed: Annotated[Path | None, typer.Option(help="Published df_gamed.csv: regularises a fit as v1 does.")] = None,
    as_json: Json = False,
) -> int:
    """Win rate, standard error, discrete and length-controlled win rate (percent) of any AlpacaEval annotations."""
    from harness.judges import alpaca
    from harness.judges.lengths import wins_by_length
    from harness.report.external.annotations import read_annotations

    if weights is not None and gamed is not None:
        raise UserError("--gamed", "is for a fit, and --weights are fitted already", "Leave one of the two out.")
    if annotations is None:
        control = _published(model, reference, weights, difficulty)
        found: dict[str, Any] = {"model": model, "reference": control.reference}
        if as_json:
            print_json({**found, **_controlled(control), "notes": _notes(control)})
        else:
            print(f"{model} against {control.reference}, by published weights")
            print(_line("length-controlled win rate", control.winrate, control.standard_error))
            print("".join(f"note: {note}\n" for note in _notes(control)), end="")
        return ExitCode.DONE
    read = read_annotations(annotations, model=model, reference=reference, annotator=annotator)
    control = alpaca.length_control(read, weights=weights, difficulty=difficulty, gamed=gamed)
    rates, by_length = alpaca.win_rates(read), wins_by_length(read.pairs)
    if as_json:
        names = {"model": read.model, "reference": read.reference, "annotator": read.annotator}
        more = {"unscored": dict(read.unscored), **names, "notes": [*read.notes, *_notes(control)]}
        print_json({**rates, **_controlled(control), "by_length": by_length.to_json(), **more})
    else:
        lines = [*_winrate_lines(read, rates, control), *by_length.lines()]
        print(visible("\n".join(lines), lines=True))
    return ExitCode.DONE


def _published(
    model: str | None, reference: str | None, weights: Path | None, difficulty: Path | None
) -> LengthControl:
    from harness.judges import alpaca

    if model is None or weights is None or difficulty is None:
        fix = "Give a file; or --model, --weights and --difficulty for a published length-controlled win rate."
        raise UserError("harness judge winrate", "no annotations are given", fix)
    table = alpaca.read_alpaca_difficulties(difficulty)
    control = alpaca.published(model, reference or alpaca.PUBLISHED_REFERENCE, alpaca.read_weights(weights), table)
    if control.withheld is not None:
        raise UserError(f"--weights {weights}", control.withheld, "Give annotations, or a name that is in the file.")
    return control


def _controlled(control: LengthControl) -> dict[str, Any]:
    return {
        "length_controlled_winrate": control.winrate,
        "lc_standard_error": control.standard_error,
        "length_control": {"glm": control.glm, "reference": control.reference, "withheld": control.withheld},
    }


def _winrate_lines(read: Annotations, rates: dict[str, Any], control: LengthControl) -> list[str]:
    names = f"{read.model or 'output_2'} against {read.reference or 'output_1'}"
    judge = f", judged by {read.annotator}" if read.annotator else ""
    lines = [
        f"{names}{judge}: {rates['n_total']} pairs scored, {rates['n_unscored']} unscored",
        _line("win rate", rates["win_rate"], rates["standard_error"]),
        _line("discrete win rate", rates["discrete_win_rate"]),
    ]
    if control.withheld is None:
        lines.append(_line("length-controlled win rate", control.winrate, control.standard_error, f" ({control.glm})"))
    else:
        lines.append(f"{'length-controlled win rate':<28}withheld: {control.withheld}")
    counts = f"{rates['n_wins']}, {rates['n_draws']}, {rates['n_wins_base']}"
    lines.append(f"{'wins, draws, losses':<28}{counts}")
    if rates["avg_length"] is not None:
        lines.append(f"{'average length':<28}{rates['avg_length']} characters")
    lines += [f"unscored: {count} x {reason}" for reason, count in read.unscored.items()]
    return lines + [f"note: {note}" for note in (*read.notes, *_notes(control))]


def _notes(control: LengthControl) -> list[str]:
    return [control.note] if control.note is not None else []


def _line(title: str, value: float | None, error: float | None = None, more: str = "") -> str:
    shown = "-" if value is None else f"{value:.2f} %"
    return f"{title:<28}{shown}" + (f", standard error {error:.2f}" if error is not None else "") + more


@judge_app.command("calibrate")
def calibrate(
    annotations: Annotated[list[Path], typer.Argument(help="Published AlpacaEval annotations, one file per model.")],
    judge: Annotated[str, typer.Option(help="URL of an OpenAI-compatible server, model folder or hub id.")],
    out: Annotated[Path, typer.Option(help="Folder of verdicts: what is there is not asked again.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Pairs of each file, from its beginning.")] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Judge configuration of the alpaca-eval package; by default that of the file.")
    ] = None,
    max_judge_cost: Annotated[float | None, typer.Option(help="Most that judging may cost (USD).")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order in which outputs are shown.")] = 0,
    annotator: Annotator = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=V of the scorer alpaca_eval: served_model, price_input, ...")
    ] = None,
    plugin: PluginFiles = None,
    as_json: Json = False,
) -> int:
    """Agreement with published verdicts, position bias, length bias and repeat agreement of a judge, with intervals."""
    from harness.core.progress import for_terminal
    from harness.judges.calibrate import calibrate as run
    from harness.report.external.annotations import read_annotations

    given = options_of(set_)
    files = [read_annotations(path, annotator=annotator) for path in annotations]
    options = {"annotator": prompts or _prompts_of(files), **given, "model": judge}
    if max_judge_cost is not None:
        options["max_cost"] = max_judge_cost
    _, registry = with_defaults(plugin)
    with for_terminal() as reporter:
        found = run(files, options, registry, out, limit=limit, seed=seed, reporter=reporter)
    if as_json:
        print_json(found.to_json())
    else:
        print(visible("\n".join(_calibration_lines(found)), lines=True))
    return ExitCode.DONE


def _prompts_of(files: list[Annotations]) -> str:
    """The judge configuration that the published verdicts were made with."""
    names = {str(one.annotator) for one in files}
    if len(names) > 1:
        raise UserError(
            "--prompts", f"the files are of several judges: {', '.join(sorted(names))}", "Say whose prompt is used."
        )
    name = names.pop()
    return name if name != "None" else "weighted_alpaca_eval_gpt4_turbo"


_TITLES = {
    "agreement": "same verdict as published",
    "kappa": "Cohen's kappa",
    "preference_correlation": "correlation of preferences",
    "win_rate_correlation": "correlation of win rates over models",
    "position_flips": "verdicts that follow the place when swapped",
    "first_preferred": "mean preference for the first place (0.5: none)",
    "longer_preferred": "longer output preferred",
    "longer_preferred_published": "  by the published verdicts",
    "length_slope": "log-odds per typical difference of length",
    "length_slope_published": "  by the published verdicts",
    "repeat_agreement": "same verdict when asked again",
    "repeat_difference": "mean change of preference when asked again",
}


def _calibration_lines(found: Calibration) -> list[str]:
    lines = [f"{found.judge} against {', '.join(found.annotators)}: {found.n_pairs} pairs, {found.n_unscored} unscored"]
    for name, title in _TITLES.items():
        figure = found.figures[name]
        value = "-" if figure.value is None else f"{figure.value:.3f}"
        interval = f" [{figure.low:.3f}, {figure.high:.3f}]" if figure.low is not None else ""
        lines.append(f"{title:<50}{value}{interval}  n = {figure.n}")
    for model in found.models:
        rates = [model[name]["value"] for name in ("published_win_rate", "judge_win_rate")]
        shown = ["-" if rate is None else f"{100 * rate:.2f} %" for rate in rates]
        lines.append(f"{model['model']}: win rate {shown[0]} as published, {shown[1]} by this judge")
    lines += [f"unscored: {count} x {reason}" for reason, count in found.reasons.items()]
    return lines + [f"note: {note}" for note in found.notes]


@judge_app.command("agreement")
def agreement(
    run: Annotated[Path, typer.Argument(help="Run folder with verdicts, of dangerous_qa say.")],
    human_labels: Annotated[
        Path, typer.Option("--human-labels", help="CSV or JSON of id and label (harmful or harmless).")
    ],
    task: Annotated[str | None, typer.Option(help="This task alone.")] = None,
    scorer: Annotated[str | None, typer.Option(help="This scorer alone.")] = None,
    as_json: Json = False,
) -> int:
    """Agreement, Cohen's kappa and confusion of a run's judges with people's labels."""
    from harness.judges.agreement import agreement as compared

    found, notes = compared(run, human_labels, task=task, scorer=scorer)
    if as_json:
        print_json({"judges": [one.to_json() for one in found], "notes": notes})
    else:
        lines = [line for one in found for line in one.lines()] + [f"note: {note}" for note in notes]
        print(visible("\n".join(lines), lines=True))
    return ExitCode.DONE

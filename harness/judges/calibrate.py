"""How far a judge can be trusted: against published verdicts, against itself, and for its leanings.

Every pair is judged in both orders and once again. Agreement takes the order that AlpacaEval would have drawn.
What is unscored is left out and counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.contracts.registry import Registry
from harness.contracts.scorer import ScoreJob, Scorer, ScorerContext, ScorerSession
from harness.core.config import parse_options
from harness.core.errors import UserError
from harness.core.progress import Bar, Reporter
from harness.core.records import Answer, Output, Sample, Score
from harness.judges.figures import Figure, Seen, by_model, figures
from harness.report.external.annotations import Annotations, JudgedPair
from harness.steps.files import write_json

SCORER = "alpaca_eval"


@dataclass
class Calibration:
    """What was found, and how many pairs it rests on."""

    judge: str
    annotators: tuple[str, ...]
    n_pairs: int
    n_unscored: int
    reasons: Mapping[str, int]
    figures: dict[str, Figure] = field(default_factory=dict)
    models: list[dict[str, Any]] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data: figures by name, each with ``value``, ``n``, ``low`` and ``high``."""
        return {
            "judge": self.judge,
            "annotators": list(self.annotators),
            "n_pairs": self.n_pairs,
            "n_unscored": self.n_unscored,
            "unscored": dict(self.reasons),
            **{name: figure.to_json() for name, figure in self.figures.items()},
            "models": self.models,
            "notes": list(self.notes),
        }


def calibrate(
    files: Sequence[Annotations],
    options: Mapping[str, Any],
    registry: Registry,
    out: Path,
    *,
    limit: int | None = None,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> Calibration:
    """Judge published pairs three times over, and compare.

    Args:
        files: annotations, one for each model.
        options: of the scorer ``alpaca_eval``: the judge, its annotator, prices.
        registry: where the scorer and the engines come from.
        out: folder of the judge's verdicts: what is there is not asked again. ``calibration.json`` goes there.
        limit: pairs of each file, from its beginning.
        seed: of the order that is drawn, as in an evaluation.
        reporter: told how far it is.

    Raises:
        UserError: no judge, one that cannot be asked, or nothing to compare with.
        StepError: the limit of cost is reached; the next call goes on from there.
    """
    reporter = reporter or Reporter()
    chosen = [(one, pair) for one in files for pair in one.pairs[:limit] if _usable(pair)]
    if not chosen:
        raise UserError("harness judge calibrate", "no pair has a verdict and both outputs", "Give other annotations.")
    seen = [_seen(one, pair) for one, pair in chosen]
    rounds: dict[str, dict[str, Any]] = {
        "drawn": {"order": "random"},
        "reference_first": {"order": "reference_first"},
        "answer_first": {"order": "answer_first"},
        "again": {"order": "random", "repeat": int(options.get("repeat", 0)) + 1},
    }
    reasons: dict[str, int] = {}
    notes: dict[str, list[str]] = {}
    label = ""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"--out {out}", f"no folder can be made there: {error.strerror}", "Give another.") from None
    opened = _Opened(registry)
    try:
        for name, own in rounds.items():
            session = _open(registry, {**options, **own}, ScorerContext(seed, out, opened))
            try:
                label = session.label() or "judge"
                scores = _judged(session, [pair for _, pair in chosen], reporter, name)
                for note in session.notes():
                    notes.setdefault(note, []).append(name.replace("_", " "))
            finally:
                session.close()
            for one, score in zip(seen, scores, strict=True):
                setattr(one, name, score.values["win_rate"])
                if score.values["win_rate"] is None and name == "drawn":
                    reasons[score.reason or ""] = reasons.get(score.reason or "", 0) + 1
    finally:
        opened.close()
    found = Calibration(
        label,
        tuple(sorted({str(one.annotator) for one in files})),
        len(seen),
        sum(reasons.values()),
        reasons,
        figures(seen),
        by_model(seen),
        tuple(
            f"{'each time' if len(when) == len(rounds) else ', '.join(when)}: {note}" for note, when in notes.items()
        ),
    )
    write_json(out / "calibration.json", found.to_json())
    return found


def _usable(pair: JudgedPair) -> bool:
    return pair.preference is not None and pair.output_1 is not None and pair.output_2 is not None


def _seen(annotations: Annotations, pair: JudgedPair) -> Seen:
    assert pair.preference is not None
    longer = float(len(pair.output_2 or "") - len(pair.output_1 or ""))
    return Seen(annotations.model or "model", pair.preference - 1, longer)


def _open(registry: Registry, options: Mapping[str, Any], context: ScorerContext) -> ScorerSession:
    scorer = registry.find(Scorer, SCORER, "harness judge calibrate")
    parsed = parse_options(scorer.Config, options, "harness judge calibrate, --set")
    try:
        scorer.check(parsed)
    except UserError as error:
        fix = error.fix.replace("--set TASK.scorer.model=", "--judge ").replace("TASK.scorer.", "")
        raise UserError(error.where, error.what, fix) from None
    return scorer.open(parsed, context)


class _Opened:
    """Opens a local judge once for all rounds; each round closes only what it borrowed."""

    def __init__(self, registry: Registry) -> None:
        self._registry, self._kept = registry, dict[str, Any]()

    def __call__(self, *what: Any, **more: Any) -> Any:
        from harness.evaluation.engines import open_engine

        key = repr((what, sorted(more.items())))
        if key not in self._kept:
            self._kept[key] = open_engine(self._registry, *what, **more)
        return _Borrowed(self._kept[key])

    def close(self) -> None:
        for one in self._kept.values():
            one.close()
        self._kept.clear()


class _Borrowed:
    def __init__(self, opened: Any) -> None:
        self._opened = opened

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opened, name)

    def close(self) -> None:
        """Others use it after this."""


def _judged(session: ScorerSession, pairs: Sequence[JudgedPair], reporter: Reporter, name: str) -> list[Score]:
    """The scorer's view of the pairs, as if the models' outputs were answers."""
    samples = [
        Sample(
            str(position),
            (),
            pair.instruction or "",
            data={"instruction": pair.instruction or "", "reference": pair.output_1},
        )
        for position, pair in enumerate(pairs)
    ]
    answers = [Answer(one.id, (Output(text=pair.output_2 or ""),)) for one, pair in zip(samples, pairs, strict=True)]
    bar = Bar(reporter.start(f"judging ({name.replace('_', ' ')})", len(pairs)), len(pairs))
    scores = session.score(samples, answers, ScoreJob("calibrate", progress=bar.advance, stored=bar.stored))
    bar.fill()
    return scores

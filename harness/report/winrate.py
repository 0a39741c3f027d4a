"""Win rates by a reward model: of one run's stored scores against another's, so nothing is generated or scored here.

A metric is a reward where it is the raw output of a reward model: in the unit of one, with a better direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.core.errors import CorruptionError
from harness.core.records import Metric
from harness.core.stats import WinShare, outcome, share_at_equal_length, share_at_matched_length, win_share
from harness.core.text import visible
from harness.report.model import AtEqualLength, WinRate
from harness.report.outputs import answers_digest
from harness.report.pairing import Side, asked_differently, obstacle
from harness.report.read import StepResult, Texts

UNITS = ("logit", "reward")
"""Units of what reward models return."""
NO_TEXTS = "the answers are not in the folder, so their lengths are not known"


def is_reward(metric: Metric) -> bool:
    """Whether a metric is what a reward model says of one answer, and more or less of it is better."""
    return metric.unit in UNITS and metric.higher_is_better is not None and metric.aggregate == "mean"


def win_rates(
    sides: Sequence[tuple[str | None, Side, Side]], *, seed: int = 0, allow_prompt_mismatch: bool = False
) -> tuple[WinRate, ...]:
    """B's win rate over A for every metric that is a reward and that both scored alike: (arm, A, B).

    Raises:
        CorruptionError: answers are not those that were scored, or a file is damaged.
    """
    found = (
        _win_rate(arm, a, b, seed)
        for arm, a, b in sides
        if is_reward(b.metric) and obstacle(a, b, allow_prompt_mismatch=allow_prompt_mismatch) is None
    )
    return tuple(one for one in found if one is not None)


def _win_rate(arm: str | None, a: Side, b: Side, seed: int) -> WinRate | None:
    """None where no sample is scored in both."""
    values_a, values_b = a.values, b.values
    shared = sorted(values_a.keys() & values_b.keys())
    scored = [(key, x, y) for key in shared if (x := values_a[key]) is not None and (y := values_b[key]) is not None]
    if not scored:
        return None
    higher = b.metric.higher_is_better is not False
    outcomes = [outcome(y, x, higher_is_better=higher) for _, x, y in scored]
    ids = [key for key, _, _ in scored]
    hanging, _ = a.step.hanging
    clusters = [("cluster", hanging[key]) if key in hanging else ("sample", key) for key in ids] if hanging else None
    whole = win_share(outcomes, clusters=clusters)
    assert whole.share is not None
    why, lengths = _lengths(a, b, ids)
    if why is None:
        both: dict[str, Any] = {"length_a": _mean([y for _, y in lengths]), "length_b": _mean([x for x, _ in lengths])}
        both["matched"] = _told(share_at_matched_length(outcomes, lengths, clusters=clusters))
        both["fitted"] = _told(share_at_equal_length(outcomes, lengths, clusters=clusters, seed=seed))
    else:
        both = dict.fromkeys(("matched", "fitted"), AtEqualLength(n=0, withheld=why))
    return WinRate(
        arm=arm,
        task=b.row.task if b.row is not None else b.task.name,
        variant=b.task.variant,
        metric=b.metric.name,
        primary=a.metric.primary or b.metric.primary,
        n=len(ids),
        n_unscored=len(shared) - len(ids),
        wins=outcomes.count(1.0),
        ties=outcomes.count(0.5),
        losses=outcomes.count(0.0),
        share=whole.share,
        ci95=_ends(whole),
        method="none" if whole.interval is None else whole.interval.method,
        n_truncated_a=_truncated(a.step, ids),
        n_truncated_b=_truncated(b.step, ids),
        **both,
    )


def _lengths(a: Side, b: Side, ids: Sequence[str]) -> tuple[str | None, list[tuple[float, float]]]:
    """Why the lengths are not known; or those of B's and A's answer for each sample (characters)."""
    texts_a, texts_b = (_scored_texts(side.step, ids) for side in (a, b))
    if not texts_a or not texts_b:
        return NO_TEXTS, []
    if asked_differently(a.task, b.task) is None:
        others = [key for key in ids if texts_a[key].prompt != texts_b[key].prompt]
        if others:
            said = f"{len(others):,} of {len(ids):,} samples of one id have other prompts in A and B"
            return f"{said} (id {visible(others[0])}): their lengths are not compared", []
    answers = [(texts_b[key].generated, texts_a[key].generated) for key in ids]
    if any(text is None for pair in answers for text in pair):
        return "nothing was generated, so there are no lengths", []
    return None, [(float(len(own or "")), float(len(other or ""))) for own, other in answers]


def _scored_texts(step: StepResult, ids: Sequence[str]) -> dict[str, Texts]:
    """Prompts and answers of some samples, once the answers are known to be those that were scored.

    Raises:
        CorruptionError: they are others, or one is missing.
    """
    texts = step.texts(ids)
    if not texts:
        return {}
    folder = step.root / "steps" / str(step.info.get("answers_folder", ""))
    expected = step.record.made_from.get("answers") if step.record is not None else None
    file = folder / "artifact" / "answers.jsonl.gz"
    if expected is not None and answers_digest(file, step.requests_file) != expected:
        where = f"{folder}: its answers are not those that {step.info.get('scorer')} scored"
        raise CorruptionError(f"{where}; run the same command again")
    missing = [key for key in ids if key not in texts or any(one.error is not None for one in texts[key].outputs)]
    if missing:
        raise CorruptionError(f"{folder}: sample {missing[0]!r} has a score and no answer")
    return texts


def _truncated(step: StepResult, ids: Sequence[str]) -> int:
    return sum(bool(step.samples[key].get("hit_limit")) for key in ids)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _ends(one: WinShare) -> tuple[float, float] | None:
    return None if one.interval is None else (one.interval.low, one.interval.high)


def _told(one: WinShare) -> AtEqualLength:
    return AtEqualLength(n=one.n, share=one.share, ci95=_ends(one), withheld=one.withheld)

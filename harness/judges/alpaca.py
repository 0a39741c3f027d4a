"""AlpacaEval's win rates, and their control for length, through the alpaca-eval package and without a network.

The package's metrics take their tables from the hub; here they are files that the user names. Dubois et al. 2024
(arXiv 2404.04475) fit one logistic regression per model to a judge's preferences, on the difference of length, the
instruction's difficulty and the model; the length-controlled win rate is what it predicts at equal length.
"""

from __future__ import annotations

import contextlib
import csv
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.core.errors import UserError, nearest
from harness.report.external.annotations import Annotations, JudgedPair, scored

LENGTH, DIFFICULTY, MODEL = "np.tanh(std_delta_len)", "instruction_difficulty", "not_gamed_baseline.astype(float)"
"""The three terms of the regression, as the package's files of weights name them."""

LEAST_ITEMS = 400
"""Least number of scored pairs for a fit of one's own.

Thirty fits each to random 400 of the 805 published pairs of alpaca-7b and vicuna-7b-v1.5 lie 1.4 and 1.0 points (root
mean square) from the fit to all; to 200, 3.8 and 1.9; to 100, 5.6 and 2.4, and up to 21: no measurement any more.
"""

PUBLISHED_JUDGE, PUBLISHED_REFERENCE = "weighted_alpaca_eval_gpt4_turbo", "gpt4_1106_preview"
"""Whose preferences the published weights describe."""

LEAST_WINS = 10
"""Least number of wins, and of losses, in a fit: with fewer nothing holds the regression's slopes."""

NO_DIFFICULTY = (
    "it needs the published difficulty of every instruction: {} (instruction_difficulty.csv of the data set "
    "tatsu-lab/alpaca_eval)"
)

OFF = {"dbrx-instruct": 0.19, "NullModel": 0.13}
"""Models whose published length-controlled win rate is so many points off what their published weights give."""

MISFIT = 1.0
"""Most that published weights may miss the win rate of the annotations they are used with (points), noise apart."""


@dataclass(frozen=True)
class Difficulties:
    """Difficulty (logits) per instruction, by text where the file has it; always in the file's order."""

    values: tuple[float, ...]
    by_text: Mapping[str, float]

    def of(self, pairs: Sequence[JudgedPair]) -> list[float | None]:
        """One per pair; by position only where the file has no texts and as many rows as there are pairs."""
        if self.by_text:
            return [None if pair.instruction is None else self.by_text.get(pair.instruction) for pair in pairs]
        return list(self.values) if len(self.values) == len(pairs) else [None] * len(pairs)


@dataclass(frozen=True)
class LengthControl:
    """The length-controlled win rate (percent), how it came about; or why there is none."""

    winrate: float | None = None
    standard_error: float | None = None
    glm: str | None = None
    """``published weights``, the name of the package's regression that was fitted, or ``same model``."""
    reference: str | None = None
    withheld: str | None = None
    note: str | None = None
    predictions: tuple[float | None, ...] = ()
    """Per pair, of a fit: the preference (0 to 1) that is predicted at equal length."""

    @classmethod
    def without_difficulty(cls, option: str) -> LengthControl:
        """Withheld for want of the published difficulties, which ``option`` would name."""
        return cls(withheld=NO_DIFFICULTY.format(option))


def win_rates(annotations: Annotations) -> dict[str, Any]:
    """The package's win rates (percent) of the scored pairs, under the package's names."""
    preferences = [pair.preference for pair in scored(annotations)]
    empty: dict[str, Any] = dict.fromkeys(("win_rate", "standard_error", "discrete_win_rate"))
    found: dict[str, Any] = {**empty, "n_wins": 0, "n_wins_base": 0, "n_draws": 0, "n_total": 0}
    if preferences:
        with quiet_alpaca_eval():
            from alpaca_eval.metrics import pairwise_to_winrate

            # numpy's numbers, and a standard error of one pair that is not a number.
            found |= {name: plain(value) for name, value in pairwise_to_winrate(preferences).items()}
    lengths = [len(pair.output_2) for pair in annotations.pairs if pair.output_2 is not None]
    found["n_unscored"] = len(annotations.pairs) - len(preferences)
    found["avg_length"] = int(sum(lengths) / len(lengths)) if lengths else None
    return found


def plain(value: Any) -> int | float | None:
    """A numpy number as Python's; None for one that is not finite."""
    number = value.item() if hasattr(value, "item") else value
    return number if isinstance(number, int) or math.isfinite(number) else None


@contextlib.contextmanager
def quiet_alpaca_eval() -> Iterator[None]:
    """Around what imports or calls alpaca-eval: the import reads .env files and turns on everybody's log lines."""
    environment, root = dict(os.environ), logging.getLogger()
    level = root.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import alpaca_eval.metrics  # noqa: F401

            root.setLevel(max(level, logging.CRITICAL))
            yield
    finally:
        root.setLevel(level)
        os.environ.clear()
        os.environ.update(environment)


# ------------------------------------------------------------------------------------------------------------- tables


def read_weights(path: Path) -> dict[str, tuple[float, float, float]]:
    """length_controlled_v1 weights: model -> (length, difficulty, model term), in logits."""
    rows = _table(path, (LENGTH, DIFFICULTY, MODEL), "the weights of length_controlled_v1 (baseline_*.csv)")
    return {row[""]: (row[LENGTH], row[DIFFICULTY], row[MODEL]) for row in rows}


def read_alpaca_difficulties(path: Path) -> Difficulties:
    """Published difficulties: a column ``instruction_difficulty``, and texts in ``instruction`` if they are there."""
    rows = _table(path, (DIFFICULTY,), "AlpacaEval's instruction_difficulty.csv")
    texts = {row["instruction"]: row[DIFFICULTY] for row in rows if row.get("instruction")}
    if texts and len(texts) != len(rows):
        raise UserError(str(path), "instructions are missing or stand there twice", "Give the published file.")
    return Difficulties(tuple(row[DIFFICULTY] for row in rows), texts)


def _table(path: Path, columns: Sequence[str], what: str) -> list[dict[str, Any]]:
    """A CSV file whose ``columns`` are finite numbers."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            names = list(reader.fieldnames or ())
            if missing := [column for column in columns if column not in names]:
                found = f"no column {missing[0]!r} (columns: {', '.join(names[:6]) or 'none'})"
                raise UserError(str(path), found, f"Give {what}.")
            rows: list[dict[str, Any]] = [dict(row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(str(path), f"cannot be read: {error}", f"Give {what}.") from None
    if not rows:
        raise UserError(str(path), "holds no rows", f"Give {what}.")
    for number, row in enumerate(rows, start=1):
        for column in columns:
            try:
                row[column] = float(row[column])
            except (TypeError, ValueError):
                row[column] = math.nan
            if not math.isfinite(row[column]):
                raise UserError(f"{path}, row {number}, {column}", "no finite number", f"Give {what}.")
    return rows


# ----------------------------------------------------------------------------------------------------- length control


def length_control(
    annotations: Annotations, *, weights: Path | None = None, difficulty: Path | None = None, gamed: Path | None = None
) -> LengthControl:
    """The length-controlled win rate of annotations, from published weights or by a fit; never without difficulties.

    Args:
        annotations: of one model against one reference.
        weights: published ones: nothing is fitted. Without them the regression is fitted to the annotations.
        difficulty: the published difficulties.
        gamed: for a fit, see :func:`fit_length_control`.
    """
    model, reference = annotations.model, annotations.reference
    if model is not None and model == reference:
        return LengthControl(50.0, 0.0, "same model", reference)
    if difficulty is None:
        return LengthControl.without_difficulty("--difficulty FILE")
    table = read_alpaca_difficulties(difficulty)
    if weights is None:
        return fit_length_control(annotations.pairs, table, gamed, reference)
    if model is None or reference is None:
        return LengthControl(withheld="weights go by a model's name, and the annotations name no generators")
    if annotations.annotator not in (None, PUBLISHED_JUDGE):
        why = f"the published weights describe verdicts of {PUBLISHED_JUDGE}, and these are {annotations.annotator}'s"
        return LengthControl(withheld=f"{why}; without --weights a regression is fitted")
    known = read_weights(weights)
    found = published(model, reference, known, table)
    problem = None
    if found.withheld is None and reference == PUBLISHED_REFERENCE:
        problem = misfit(annotations.pairs, known[model], table)
    return found if problem is None else LengthControl(withheld=problem)


def published(
    model: str, reference: str, weights: Mapping[str, tuple[float, float, float]], difficulties: Difficulties
) -> LengthControl:
    """The win rate that published weights predict at equal length, over all instructions with a difficulty.

    Of the package's ``predict_winrate``: sigmoid of the difference in the model term plus the difference in the
    difficulty term times the difficulty, averaged. A model against itself: 50.
    """
    from scipy.special import expit

    for name in (model, reference):
        if name not in weights:
            close = nearest(name, weights)
            guess = f" (nearest: {', '.join(close)})" if close else ""
            why = f"the file of weights has none for {name}{guess}; without --weights one is fitted to the annotations"
            return LengthControl(withheld=why)
    (_, slope, level), (_, slope_0, level_0) = weights[model], weights[reference]
    shares = [float(expit(level - level_0 + (slope - slope_0) * one)) for one in difficulties.values]
    mean = math.fsum(shares) / len(shares)
    spread = math.sqrt(math.fsum((share - mean) ** 2 for share in shares) / max(1, len(shares) - 1))
    error = 100 * spread / math.sqrt(len(shares))
    off = OFF.get(model) if reference == PUBLISHED_REFERENCE else None
    note = (
        None if off is None else f"the published leaderboard has a value that is {off} points away, for {model} alone"
    )
    return LengthControl(100 * mean, error, "published weights", reference, note=note)


def misfit(pairs: Sequence[JudgedPair], weights: tuple[float, float, float], difficulties: Difficulties) -> str | None:
    """Why published weights cannot be those of these annotations; None if they can.

    With the lengths left in, the regression predicts the very win rate it was fitted to.
    """
    from scipy.special import expit

    known = [
        (one, pair) for one, pair in zip(difficulties.of(pairs), pairs, strict=True)
        if one is not None and pair.preference is not None
    ]  # fmt: skip
    spread = _deviation(pairs)
    if len(known) < 2 or not spread:
        return None
    length, slope, level = weights
    predicted = [expit(length * math.tanh(_difference(p) / spread) + slope * one + level) for one, p in known]
    wins = [(pair.preference or 0.0) - 1 for _, pair in known]
    mean = math.fsum(wins) / len(wins)
    error = math.sqrt(math.fsum((win - mean) ** 2 for win in wins) / (len(wins) - 1) / len(wins))
    off = 100 * abs(math.fsum(predicted) / len(predicted) - mean)
    if off <= MISFIT + (400 * error if len(known) < len(difficulties.values) else 0.0):
        return None
    return (
        f"the weights predict a win rate of {100 * math.fsum(predicted) / len(predicted):.2f} on these annotations, "
        f"which have {100 * mean:.2f}: they belong to other outputs or another judge"
    )


def fit_length_control(
    pairs: Sequence[JudgedPair], difficulties: Difficulties, gamed: Path | None = None, reference: str | None = None
) -> LengthControl:
    """The package's regression, fitted to these pairs; refused where ``LEAST_ITEMS`` or ``LEAST_WINS`` is not reached.

    Args:
        pairs: with outputs; those without a preference give no information and get no prediction.
        difficulties: the published ones.
        gamed: the package's df_gamed.csv, whose concise and verbose baselines regularise ``length_controlled_v1``;
            without it the package's ``length_controlled_noreg`` is fitted.
        reference: its name, for the record.
    """
    known = difficulties.of(pairs)
    usable = [
        one is not None and None not in (pair.output_1, pair.output_2) for one, pair in zip(known, pairs, strict=True)
    ]
    n = sum(ok and pair.preference is not None for ok, pair in zip(usable, pairs, strict=True))
    if n < LEAST_ITEMS:
        why = f"{n} scored pairs have outputs and a published difficulty, and a fit needs {LEAST_ITEMS}"
        return LengthControl(withheld=why)
    kept = [pair for pair, ok in zip(pairs, usable, strict=True) if ok]
    wins = math.fsum(pair.preference - 1 for pair in kept if pair.preference is not None)
    if min(wins, n - wins) < LEAST_WINS:
        why = f"{wins:.1f} wins in {n} pairs, and a fit needs {LEAST_WINS} wins and as many losses"
        return LengthControl(withheld=why)
    with quiet_alpaca_eval():
        predicted, name = _regression(kept, [one for one in known if one is not None], gamed)
    placed = iter(predicted)
    shares = [next(placed) if ok else None for ok in usable]
    whole = [None if pair.preference is None else share for pair, share in zip(pairs, shares, strict=True)]
    values = [share for share in whole if share is not None]
    mean = math.fsum(values) / len(values)
    spread = math.sqrt(math.fsum((share - mean) ** 2 for share in values) / (len(values) - 1))
    return LengthControl(100 * mean, 100 * spread / math.sqrt(len(values)), name, reference, predictions=tuple(whole))


def _regression(
    pairs: Sequence[JudgedPair], difficulties: Sequence[float], gamed: Path | None
) -> tuple[list[float], str]:
    """As the package's ``_get_featurized_data`` and what follows it, which would download df_gamed.csv."""
    import pandas as pd
    import sklearn
    from alpaca_eval.metrics.glm_winrate import GLM_INFO, fit_LogisticRegressionCV, make_dmatrix_for_model

    name = "length_controlled_noreg" if gamed is None else "length_controlled_v1"
    glm = GLM_INFO[name]
    deltas = pd.Series([_difference(pair) for pair in pairs], dtype=float)
    frame = pd.DataFrame({"preference": [math.nan if p.preference is None else p.preference - 1 for p in pairs]})
    frame["std_delta_len"] = deltas / (deltas.std() or 1.0)
    frame["instruction_difficulty"], frame["not_gamed_baseline"] = list(difficulties), True
    level = frame[["instruction_difficulty", "not_gamed_baseline"]].assign(std_delta_len=0)
    training, sample_weight = frame, None
    if gamed is not None:
        training = pd.concat([read_alpaca_gamed(gamed), frame], axis=0)
        own = training["not_gamed_baseline"].astype(bool)
        # Halved, because there are two gamed baselines.
        sample_weight = own.astype(float) + glm["regularize_to_baseline_lambda"] * (~own).astype(float) / 2
    matrix, at_equal_length = make_dmatrix_for_model(training, level, formula=glm["formula"])
    has_label = matrix["preference"].notna()
    weight = sample_weight[has_label] if sample_weight is not None else None
    with sklearn.config_context():
        model = fit_LogisticRegressionCV(
            matrix[has_label], "preference", is_ytrue_proba=True, sample_weight=weight, **glm["kwargs"]
        )
    return [float(share) for share in model.predict_proba(at_equal_length)[:, 1]], name


def read_alpaca_gamed(path: Path) -> Any:
    """df_gamed.csv, the gamed baselines' preferences (0 to 1), as a data frame of what the regression uses."""
    what, columns = "AlpacaEval's df_gamed.csv", ("preference", "std_delta_len", "instruction_difficulty")
    rows = _table(path, columns, what)
    own = [{"True": True, "False": False}.get(row.get("not_gamed_baseline", "")) for row in rows]
    if None in own:
        raise UserError(f"{path}, not_gamed_baseline", "a row has neither True nor False", f"Give {what}.")
    import pandas as pd

    return pd.DataFrame([{name: row[name] for name in columns} for row in rows]).assign(not_gamed_baseline=own)


def _difference(pair: JudgedPair) -> int:
    return len(pair.output_1 or "") - len(pair.output_2 or "")


def _deviation(pairs: Sequence[JudgedPair]) -> float:
    values = [_difference(pair) for pair in pairs]
    mean = sum(values) / max(1, len(values))
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / max(1, len(values) - 1))

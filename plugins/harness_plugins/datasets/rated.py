"""Rated rows: PKU-SafeRLHF's flags as ratings of each answer, and scores as labels by quantile."""

from __future__ import annotations

import bisect
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import harness
from harness import DatasetJob, DatasetRow, UserError
from harness_plugins.datasets.preferences import BeaverTails, Unusable, check_prompt, need_columns


class BeaverTailsRated(BeaverTails):
    """Every answer of PKU-SafeRLHF by itself, also of pairs whose answers are both safe, or both unsafe."""

    name = "beavertails-rated"
    summary = "PKU-SafeRLHF, answer by answer: safety (harmless) or flags (harmless and helpful at once)"
    schema = "rated"
    subsets = ("flags", "safety")

    class Config(harness.Config):
        """Nothing is to be chosen."""

    def rows(self, job: DatasetJob) -> Iterator[DatasetRow]:
        """Two rows of each row, whose ids end in the answer's number; ratings are 1 and 0.

        ``harmless``: the answer is safe. ``helpful`` (flags alone): it is the better one of its two.
        """
        both = self.chosen_subset(job) == "flags"
        loaded = self.load(job)
        flags = [f"is_response_{which}_safe" for which in (0, 1)]
        needed = ("prompt", "response_0", "response_1", *flags, *(("better_response_id",) if both else ()))
        need_columns(f"dataset {self.name}:{job.subset}", loaded, needed)
        for position, row in enumerate(loaded):
            for which in (0, 1):
                try:
                    found = _rated_answer(row, which, both=both)
                except Unusable as reason:
                    job.drop(str(reason))
                    continue
                yield DatasetRow(f"{job.split or 'train'}/{position}/{which}", found)


def _rated_answer(row: Mapping[str, Any], which: int, *, both: bool) -> dict[str, Any]:
    safe = row[f"is_response_{which}_safe"]
    if safe is None:
        raise Unusable("the flag of its safety is null")
    ratings = {"harmless": float(bool(safe))}
    if both:
        better = row["better_response_id"]
        if better not in (0, 1):
            # Never made up: without it only one preference is known.
            raise Unusable(f"better_response_id is {'null' if better is None else 'neither 0 nor 1'}")
        ratings["helpful"] = float(better == which)
    prompt = [{"role": "user", "content": (row["prompt"] or "").strip()}]
    check_prompt(prompt)
    answer = (row[f"response_{which}"] or "").strip()
    if not answer:
        raise Unusable("empty answer")
    return {"prompt": prompt, "completion": answer, "ratings": ratings}


# ----------------------------------------------------------------------------------------------------------- quantiles

Labels = Mapping[str, Sequence[str]]
"""Preference -> labels, that of the lowest scores first."""


def cut_points(ratings: Iterable[Mapping[str, Any]], labels: Labels, where: str) -> dict[str, list[float]]:
    """Per preference the scores at which one label ends and the next begins: quantiles, linearly interpolated.

    Args:
        ratings: of all rows that are trained on.
        labels: what the scores become.
        where: for messages.

    Raises:
        UserError: no scores, one that is no finite number, or so many alike that a label has none.
    """
    scores: dict[str, list[float]] = {name: [] for name in labels}
    for given in ratings:
        for name, found in scores.items():
            if given.get(name) is not None:
                found.append(_score(given[name], name, where))
    cuts = {}
    for name, found in scores.items():
        if len(found) < len(labels[name]):
            what = f"{len(found)} rows have a score of {name!r}, and there are {len(labels[name])} labels"
            raise UserError(where, what, "Name a preference that rows are rated for, or fewer labels.")
        cuts[name] = statistics.quantiles(found, n=len(labels[name]), method="inclusive")
        counts = Counter(bisect.bisect_right(cuts[name], score) for score in found)
        if absent := [label for place, label in enumerate(labels[name]) if not counts[place]]:
            what = f"so many scores of {name!r} are alike that none is {absent[0]!r} (cut at {_told(cuts[name])})"
            raise UserError(where, what, "Give fewer labels, or leave the scores numbers and set `threshold`.")
    return cuts


def labelled(
    ratings: Mapping[str, Any], cuts: Mapping[str, Sequence[float]], labels: Labels, where: str
) -> dict[str, Any]:
    """The ratings of a row with labels for scores; a score at a cut has the higher label, others stay as they are."""
    found = dict(ratings)
    for name, points in cuts.items():
        if found.get(name) is not None:
            found[name] = labels[name][bisect.bisect_right(points, _score(found[name], name, where))]
    return found


def check_labels(labels: Labels) -> None:
    """Refuse labels that do not tell anything apart.

    Raises:
        ValueError: naming the preference.
    """
    for name, some in labels.items():
        if len(set(some)) != len(some) or len(some) < 2:
            raise ValueError(f"labels of {name!r} are two or more different ones, the lowest first: {list(some)}")


def _score(value: Any, name: str, where: str) -> float:
    if isinstance(value, bool | int | float) and math.isfinite(value):
        return float(value)
    raise UserError(where, f"its {name!r} is {value!r}, which is no finite number", "Take labels of numbers alone.")


def _told(points: Sequence[float]) -> str:
    return ", ".join(f"{point:g}" for point in points)

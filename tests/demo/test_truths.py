"""What is said of a world's truths follows from the numbers: supported, contradicted, undecided, not measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.core.errors import UserError
from harness.core.stats import NOTE_FEW_SEEDS, CrossedSummary, Interval
from harness.demo import truths
from harness.demo.truths import Contrast, Finding, Measured, read_truths, truths_note
from harness.demo.world import ASSETS
from harness.study.arms import arms_of
from harness.study.spec import read_study
from harness.tasks.catalog import load_catalog

CONTRAST = Contrast.model_validate({"task": "t", "metric": "m", "arms": "a", "than": "base", "is": "lower"})


def measured(mean: float, p: float | None, *, resolution: float = 0.02) -> Measured:
    interval = Interval(mean - 0.1, mean + 0.1, 0.95, "sample_bootstrap")
    summary = CrossedSummary(2, 100, 0, mean, 0.05, interval, p, NOTE_FEW_SEEDS)
    return Measured(CONTRAST, summary, resolution, p_adjusted=p)


@pytest.mark.parametrize(
    ("one", "verdict"),
    [
        (measured(-0.3, 0.001), "supported"),
        (measured(0.3, 0.001), "contradicted"),
        (measured(-0.3, 0.05), "undecided"),
        (measured(-0.019, 0.001), "undecided"),  # below the smallest difference worth naming
        (measured(0.0, 0.001, resolution=0.0), "undecided"),  # no difference has no direction
        (measured(-0.3, None), "not measured"),
        (Measured(CONTRAST, why_not="failed"), "not measured"),
    ],
)
def test_the_verdict_of_a_contrast(one: Measured, verdict: str) -> None:
    assert one.verdict == verdict


def test_a_truth_is_as_good_as_its_worst_contrast() -> None:
    good, weak, bad = measured(-0.3, 0.001), measured(-0.3, 0.5), measured(0.3, 0.001)
    none = Measured(CONTRAST, why_not="a: t failed or has not ended")
    said = [Finding("sft", "x", each).verdict for each in ((good, good), (good, weak), (good, weak, none), (none, bad))]
    assert said == ["supported", "undecided", "not measured", "contradicted"]
    assert str(none) == "a: t failed or has not ended" and str(good) == "-0.300 [-0.400, -0.200]"
    note = truths_note([Finding("sft", "x", (good,)), Finding("sft", "x", (none,))])
    assert note.startswith("1 of 2 supported.") and NOTE_FEW_SEEDS in note and "2 seeds" in note


def test_differences_are_seed_by_seed_and_sample_by_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds x three samples; b has no score in one cell, which is left out and counted, and never 0."""
    rows = [
        truths._differences({"a": 1.0, "b": 0.0, "c": 1.0}, {"a": 0.0, "b": None, "c": 1.0}),
        truths._differences({"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 0.0, "b": 0.0, "d": 1.0}),
    ]
    assert rows == [{"a": 1.0, "b": None, "c": 0.0}, {"a": 1.0, "b": 1.0, "c": None, "d": None}]
    summary = truths._summary(rows, 0)
    # Cells with a score: 1, 0 of the first seed, 1, 1 of the second.
    assert summary.mean == pytest.approx(3 / 4)
    # Of 2 x 4 cells four have none; d has none at all.
    assert (summary.n_seeds, summary.n_samples, summary.n_unscored, summary.note) == (2, 3, 4, NOTE_FEW_SEEDS)


def test_every_truth_is_about_arms_of_the_study_and_metrics_of_its_tasks() -> None:
    """A pattern that fits no arm would never be measured, and a truth that is not held would be no truth."""
    import fnmatch

    from harness.contracts.registry import load_plugins

    known = read_truths()
    names = [arm.name for arm in arms_of(read_study(ASSETS / "study.yaml"))]
    tasks = load_catalog(load_plugins(), [ASSETS / "tasks"]).tasks
    for contrast in (one for truth in known.truths for one in truth.contrasts):
        assert contrast.task in tasks
        for method in known.methods:
            for pattern in (contrast.arms, contrast.than):
                found = fnmatch.filter(names, pattern.replace("{method}", method))
                assert len(found) == (1 if pattern == "base" else 2), pattern
    told = {one.arms for truth in known.truths for one in truth.contrasts}
    assert told == {"{method}-harmless-*", "{method}-helpful-*", "slerp-{method}-*", "dare-{method}-*"}


def test_a_misspelt_truth_names_its_line(tmp_path: Path) -> None:
    file = tmp_path / "truths.yaml"
    file.write_text((ASSETS / "truths.yaml").read_text().replace("is: lower", "is: less", 1))
    with pytest.raises(UserError) as caught:
        read_truths(file)
    line = next(n for n, text in enumerate(file.read_text().splitlines(), 1) if "is: less" in text)
    assert f"{file}:{line}" in caught.value.where and "less" in caught.value.what

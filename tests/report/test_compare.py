from __future__ import annotations

import io
import json
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from harness.core.errors import UserError
from harness.core.records import Metric
from harness.core.stats import newcombe_paired
from harness.report.compare import changed_samples, compare_runs
from harness.report.compare_text import changed_text, comparison_markdown, comparison_table, p_text, signed

_helper = runpy.run_path(str(Path(__file__).parents[1] / "run_folder.py"))
RunFolder, ACC, TOX = _helper["RunFolder"], _helper["ACC"], _helper["TOX"]
ERRORS = Metric(name="errors", higher_is_better=False, unit="proportion")


class Pair:
    """Two runs, `before` (A) and `after` (B), that get the same tasks with other scores."""

    def __init__(self, tmp_path: Path) -> None:
        self.a, self.b = RunFolder(tmp_path / "before", model="base"), RunFolder(tmp_path / "after", model="tuned")

    def task(
        self, name: str, a: list[float | None], b: list[float | None], *, metric: Metric = ACC, **info: Any
    ) -> None:
        for folder, values, sides in ((self.a, a, 0), (self.b, b, 1)):
            samples = {f"s{k:03d}": {"values": {metric.name: value}} for k, value in enumerate(values)}
            chosen = {key: value[sides] if isinstance(value, tuple) else value for key, value in info.items()}
            rows = chosen.pop("rows", [{"metric": metric.name, "unit": metric.unit, "n": len(values)}])
            folder.task(name, samples, rows, metrics=(chosen.pop("declared", metric),), **chosen)

    def write(self) -> tuple[Path, Path]:
        return self.a.write_plan(), self.b.write_plan()


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def flips(gained: int, lost: int, same: int) -> tuple[list[float | None], list[float | None]]:
    """0/1 scores of A and B with so many samples gained, lost and kept (right in both) by B."""
    return [0.0] * gained + [1.0] * lost + [1.0] * same, [1.0] * gained + [0.0] * lost + [1.0] * same


def shown(*parts: RenderableType, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(*parts)
    return console.file.getvalue()


def test_a_gain_is_b_minus_a_with_exact_mcnemar_and_holm(pair: Pair) -> None:
    pair.task("quiz", *flips(8, 0, 4))
    pair.task("other", *flips(1, 1, 2))
    report = compare_runs(*pair.write())
    quiz, other = report.differences
    assert (quiz.mean_a, quiz.mean_b) == (pytest.approx(4 / 12), 1.0)
    assert quiz.difference == pytest.approx(8 / 12)
    assert (quiz.n, quiz.n_better, quiz.n_worse, quiz.n_same) == (12, 8, 0, 4)
    # 8 of 8 discordant pairs one way: 2 * (1/2)^8; Holm doubles the smaller of two p-values.
    assert (quiz.test, quiz.p_value, quiz.p_adjusted) == ("mcnemar_exact", 2 / 256, 4 / 256)
    assert (other.p_value, other.p_adjusted, other.verdict) == (1.0, 1.0, "no difference shown")
    assert quiz.ci95 is not None and 0 < quiz.ci95[0] < 8 / 12 < quiz.ci95[1] <= 1
    assert quiz.verdict == "better" and report.regressions == ()


def test_a_loss_is_a_regression_and_swapping_the_runs_a_gain(pair: Pair) -> None:
    pair.task("quiz", *flips(0, 8, 4))
    a, b = pair.write()
    report = compare_runs(a, b)
    assert [one.task for one in report.regressions] == ["quiz"]
    assert report.to_dict()["regressions"] == [{"task": "quiz", "metric": "acc"}]
    back = compare_runs(b, a).differences[0]
    assert back.verdict == "better" and back.difference == pytest.approx(8 / 12)
    assert report.differences[0].difference == pytest.approx(-8 / 12)


def test_where_lower_is_better_a_rise_is_worse(pair: Pair) -> None:
    pair.task("quiz", *flips(8, 0, 4), metric=ERRORS)
    one = compare_runs(*pair.write()).differences[0]
    assert one.difference == pytest.approx(8 / 12) and one.verdict == "worse"
    assert (one.n_better, one.n_worse) == (0, 8)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -1.0, float("inf"), float("nan")])
def test_a_level_is_between_0_and_1(pair: Pair, alpha: float) -> None:
    pair.task("quiz", *flips(1, 1, 2))
    with pytest.raises(UserError, match=r"alpha: is the level of a test, and .* is none\n  Give a number between 0"):
        compare_runs(*pair.write(), alpha=alpha)


def test_holm_and_alpha_decide_what_counts(pair: Pair) -> None:
    # 6 of 6: p = 2/64 = 0.03125, alone below 0.05, after Holm over two 0.0625.
    pair.task("quiz", *flips(0, 6, 4))
    pair.task("other", *flips(0, 0, 4))
    runs = pair.write()
    one = compare_runs(*runs).differences[0]
    assert (one.p_value, one.p_adjusted, one.verdict) == (0.03125, 0.0625, "no difference shown")
    assert [d.verdict for d in compare_runs(*runs, alpha=0.1).differences] == ["worse", "no difference shown"]


def test_secondary_metrics_neither_regress_nor_enter_holm(pair: Pair) -> None:
    pair.task("quiz", *flips(0, 6, 4))
    pair.task("side", *flips(0, 9, 1), metric=ACC.model_copy(update={"name": "aside", "primary": False}))
    report = compare_runs(*pair.write())
    assert [one.p_adjusted for one in report.differences] == [2 / 64, 2 / 512]
    assert [one.verdict for one in report.differences] == ["worse", "worse"]
    assert [one.metric for one in report.regressions] == ["acc"]
    assert "aside" not in shown(comparison_table(report))
    assert "aside" in shown(comparison_table(report, everything=True))
    assert "aside" not in comparison_markdown(report)


def test_other_scores_take_the_paired_bootstrap_and_the_seed_alone(pair: Pair) -> None:
    a = [0.1 * k for k in range(40)]
    pair.task("story", list(a), [value + 1.0 + 0.01 * (k % 3) for k, value in enumerate(a)], metric=TOX)
    runs = pair.write()
    one = compare_runs(*runs, seed=3).differences[0]
    # Gains of 1.00, 1.01 and 1.02, on 14, 13 and 13 samples.
    assert one.difference == pytest.approx(1 + (13 * 0.01 + 13 * 0.02) / 40)
    assert one.test == "paired_bootstrap" and one.verdict == "better" and one.n_better == 40
    assert compare_runs(*runs, seed=3).differences[0] == one


def test_a_difference_without_size_is_neither_better_nor_worse(pair: Pair) -> None:
    """Ten samples that all lost a thousandth: significant beyond doubt, and nothing anybody would name."""
    sized = TOX.model_copy(update={"resolution": 0.05})
    pair.task("story", [1.0] * 10, [0.999] * 10, metric=sized)
    # 0.25 is at the resolution, not below it; without one every significant difference has a size.
    pair.task("edge", [1.0] * 10, [0.75] * 10, metric=sized.model_copy(update={"resolution": 0.25}))
    pair.task("stranger", [1.0] * 10, [0.999] * 10, metric=TOX)
    report = compare_runs(*pair.write())
    story, edge, stranger = report.differences
    assert [one.verdict for one in report.differences] == ["no difference of size", "worse", "worse"]
    assert story.notes == ("significant, but below 0.05, the smallest difference worth naming",)
    assert story.p_adjusted is not None and story.p_adjusted < 0.05 and edge.notes == ()
    assert [one.task for one in report.regressions] == ["edge", "stranger"]
    assert stranger.resolution is None
    assert "no difference of size" in comparison_markdown(report)


def test_of_two_resolutions_the_coarser_holds(pair: Pair) -> None:
    finer, coarser = (TOX.model_copy(update={"resolution": size}) for size in (0.01, 0.5))
    pair.task("story", [1.0] * 10, [0.75] * 10, declared=(finer, coarser), metric=TOX)
    (one,) = compare_runs(*pair.write()).differences
    assert (one.resolution, one.verdict) == (0.5, "no difference of size")


def test_the_interval_beside_an_adjusted_p_is_adjusted_alike(pair: Pair) -> None:
    """p = 2/512, 2/64 and 1: Holm tests at 0.05/3, then 0.05/2, where it stops; the third shares that level."""
    pair.task("first", *flips(9, 0, 3))
    pair.task("second", *flips(6, 0, 6))
    pair.task("third", *flips(1, 1, 10))
    report = compare_runs(*pair.write())
    levels = [one.level_adjusted for one in report.differences]
    assert levels == [pytest.approx(1 - 0.05 / 3), pytest.approx(1 - 0.05 / 2), pytest.approx(1 - 0.05 / 2)]
    for one, table in zip(report.differences, [(3, 9, 0, 0), (6, 6, 0, 0), (10, 1, 1, 0)], strict=True):
        assert one.level_adjusted is not None and one.ci_adjusted is not None and one.ci95 is not None
        wide = newcombe_paired(*table, level=one.level_adjusted)
        assert one.ci_adjusted == (wide.low, wide.high)
        assert one.ci_adjusted[0] < one.ci95[0] < one.ci95[1] < one.ci_adjusted[1]
    text = " ".join(shown(comparison_table(report)).split())
    low, high = report.differences[0].ci_adjusted or (0.0, 0.0)
    assert f"[{signed(low)}, {signed(high)}]" in text
    assert "p and interval: after Holm" in text and "level 1 - 0.05/k, k being the tests left at its step" in text
    assert "| interval (Holm) | p (Holm) |" in comparison_markdown(report)


def test_means_are_printed_as_finely_as_what_is_claimed_of_them(pair: Pair) -> None:
    """A difference of 0.000003 that was called better, between two means of 3.993."""
    pair.task("story", [3.9931] * 10, [3.993103] * 10, metric=TOX)
    pair.task("same", [0.5] * 10, [0.5] * 10, metric=TOX)
    report = compare_runs(*pair.write())
    assert report.differences[0].verdict == "better"
    markdown = comparison_markdown(report)
    # At five decimals both are 3.99310.
    assert "| better | 3.993100 | 3.993103 | +3.0e-06 |" in markdown
    assert "| no difference shown | 0.500 | 0.500 |" in markdown


def test_samples_of_one_run_only_and_unscored_ones_are_counted_and_said(pair: Pair) -> None:
    pair.task("quiz", [1.0, 1.0, None, 0.0, 1.0], [1.0, None, 1.0], limit=(None, 3))
    one = compare_runs(*pair.write()).differences[0]
    assert (one.n, one.n_only_a, one.n_only_b, one.n_unscored) == (1, 2, 0, 2)
    assert one.notes == (
        "left out: 2 samples only in A, 0 only in B (limits none and 3)",
        "left out: 2 samples unscored in A or B",
    )


def test_raw_and_chat_are_paired_but_not_compared_and_the_rest_is_listed(pair: Pair) -> None:
    pair.task("quiz", *flips(0, 8, 2), variant=("raw", "chat"))
    pair.a.task("old", {"s": {"value": 1.0}}, [])
    pair.b.task("new", {"s": {"value": 1.0}}, [], variant="chat")
    runs = pair.write()
    report = compare_runs(*runs)
    (one,) = report.differences
    assert one.label == "quiz (raw → chat)" and one.notes == ("not comparable: raw in A, chat in B",)
    assert (one.verdict, one.p_value, one.mean_a, one.difference) == ("not comparable", None, None, None)
    assert report.regressions == () and report.asked_differently == (one,) and changed_samples(*runs) == []
    assert (report.only_a, report.only_b) == (("old:raw",), ("new:chat",))
    text = shown(comparison_table(report))
    assert "only in A: old:raw" in text and "only in B: new:chat" in text
    assert "quiz (raw → chat) acc: not comparable: raw in A, chat in B" in " ".join(text.split())


def test_prompts_that_differ_are_compared_on_demand_and_marked(pair: Pair) -> None:
    pair.task("quiz", *flips(0, 8, 2), variant=("raw", "chat"))
    runs = pair.write()
    report = compare_runs(*runs, allow_prompt_mismatch=True)
    (one,) = report.differences
    # 8 of 8 one way: 2 * (1/2)^8.
    assert (one.verdict, one.p_value, one.difference) == ("worse", 2 / 256, pytest.approx(-0.8))
    assert one.notes == ("prompts differ: raw in A, chat in B (--allow-prompt-mismatch)",)
    assert len(changed_samples(*runs, allow_prompt_mismatch=True)) == 8
    assert "worse (prompts differ)" in comparison_markdown(report)
    assert "(prompts" in shown(comparison_table(report))


@pytest.mark.parametrize(("recorded", "refused"), [("tasks", True), ("model", True), ("nowhere", False)])
def test_two_chat_templates_are_two_prompts(pair: Pair, recorded: str, refused: bool) -> None:
    """Plans written before tasks named their template have it at the model; of an endpoint's nothing is known."""
    templates = ("a" * 64, "b" * 64)
    info = {"template": templates} if recorded == "tasks" else {}
    pair.task("quiz", *flips(0, 8, 2), variant="chat", **info)
    if recorded == "model":
        for folder, digest in zip((pair.a, pair.b), templates, strict=True):
            folder.plan["model"]["template_digest"] = digest
    (one,) = compare_runs(*pair.write()).differences
    assert one.verdict == ("not comparable" if refused else "worse")
    said = "not comparable: chat template aaaaaaaaaaaa in A, bbbbbbbbbbbb in B"
    assert one.notes == ((said,) if refused else ())


def test_a_gate_does_not_pass_what_was_asked_differently(pair: Pair, cli: Any) -> None:
    pair.task("quiz", *flips(0, 8, 2), variant=("raw", "chat"))
    a, b = pair.write()
    assert cli("compare", a, b).code == 0
    ran = cli("compare", a, b, "--fail-if-worse")
    assert ran.code == 2 and "not comparable" in ran.out
    assert ran.err == (
        "error: --fail-if-worse: 1 of the primary metrics cannot be judged, as A and B were asked differently "
        "(quiz (raw → chat) acc: raw in A, chat in B)\n"
        "  Ask both alike (NAME:raw, or base and adapters in one run: harness eval --with-base), or pass "
        "--allow-prompt-mismatch.\n"
    )
    assert cli("compare", a, b, "--fail-if-worse", "--allow-prompt-mismatch").code == 4


def test_the_same_variant_is_preferred_over_a_mixed_pair(pair: Pair) -> None:
    pair.a.task("quiz", {"s": {"value": 1.0}}, [], variant="chat")
    pair.a.task("quiz", {"s": {"value": 0.0}}, [], variant="raw")
    pair.b.task("quiz", {"s": {"value": 1.0}}, [], variant="raw")
    report = compare_runs(*pair.write())
    assert [(one.variant_a, one.variant_b, one.mean_a) for one in report.differences] == [("raw", "raw", 0.0)]
    assert report.only_a == ("quiz:chat",)


WITHHELD = {"metric": "acc", "n": 1, "n_unscored": 9, "withheld": "9 of 10 samples are unscored"}


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        ({"version": (1, 2)}, "task versions 1 and 2 differ in prompts or data"),
        (
            {"config": ({"scorer": {"model": "x"}}, {"scorer": {"model": "y"}})},
            "the scorers differ in options or model",
        ),
        ({"declared": ACC.model_copy(update={"aggregate": "corpus"})}, "a corpus metric is no mean over samples"),
        ({"declared": (ACC, ACC.model_copy(update={"unit": "nats"}))}, "unit or direction differ"),
        ({"rows": ([WITHHELD], [])}, "withheld in run A: 9 of 10 samples are unscored"),
    ],
)
def test_what_does_not_measure_the_same_is_not_compared(pair: Pair, info: dict[str, Any], reason: str) -> None:
    pair.task("quiz", *flips(0, 8, 4), **info)
    runs = pair.write()
    (one,) = compare_runs(*runs).differences
    assert one.verdict == "not comparable" and one.notes[0].startswith(reason)
    assert one.p_value is None and changed_samples(*runs) == []


def test_nothing_shared_one_odd_pair_and_no_direction_are_not_judged(pair: Pair) -> None:
    pair.task("unscored", [None, 1.0], [1.0, None])
    pair.task("single", [0.5], [0.75], metric=TOX)
    neutral = ACC.model_copy(update={"higher_is_better": None})
    pair.task("length", *flips(12, 0, 0), metric=neutral)
    found = compare_runs(*pair.write()).differences
    assert [one.verdict for one in found] == ["not comparable"] * 3
    assert [one.notes[0] for one in found] == [
        "no sample is scored in both runs",
        "one pair of samples shows nothing",
        "they differ, but this metric has no better direction",
    ]


def test_a_failed_step_is_listed_not_passed_over(pair: Pair) -> None:
    pair.task("quiz", *flips(0, 1, 1), state=("done", "failed"))
    runs = pair.write()
    report = compare_runs(*runs)
    assert report.differences == () and report.failed == ("quiz:raw",)
    assert "not compared, a step failed: quiz:raw" in shown(comparison_table(report))
    assert changed_samples(*runs) == []


def test_a_run_that_has_not_ended_is_refused(pair: Pair) -> None:
    pair.task("quiz", *flips(0, 1, 1), state=("done", "running"))
    a, b = pair.write()
    with pytest.raises(UserError) as caught:
        compare_runs(a, b)
    assert str(caught.value) == (
        f"{b}: the run has not ended: 1 of 1 tasks are unfinished (quiz:raw)\n"
        "  Run its `harness eval` command again: it continues where it stopped. Then compare."
    )


def test_a_folder_that_is_no_run_is_refused(pair: Pair, tmp_path: Path) -> None:
    a, _ = pair.write()
    with pytest.raises(UserError, match="there is no such folder") as caught:
        compare_runs(a, tmp_path / "aftre")
    assert caught.value.fix.startswith(f"Did you mean '{tmp_path / 'after'}' or")


def test_what_else_differs_is_noted(pair: Pair) -> None:
    pair.b.plan["spec"]["seed"] = 7
    report = compare_runs(*pair.write())
    assert report.notes == ("seed differs: 0 in A, 7 in B",)
    assert (report.name_a, report.name_b) == ("base", "tuned")


# ---------------------------------------------------------------------------------------------------- changed samples


def stories(
    pair: Pair, before: dict[str, float], after: dict[str, float], text: str = "answer", metric: Any = TOX
) -> None:
    for folder, values, who in ((pair.a, before, "A"), (pair.b, after, "B")):
        samples = {
            key: {"value": value, "answer": f"{who} {text} {key}", "target": "t"} for key, value in values.items()
        }
        folder.task("story", samples, [], metrics=(metric,))


def test_changed_samples_are_sorted_by_how_much_and_the_worse_first(pair: Pair) -> None:
    before = {"a": 0.0, "b": 0.0, "c": 0.0, "d": 1.0, "e": 0.0}
    stories(pair, before, {"a": 0.5, "b": 2.0, "c": -2.0, "d": 1.0, "f": 9.0})
    runs = pair.write()
    found = changed_samples(*runs)
    assert [(one.id, one.value_a, one.value_b, one.worse) for one in found] == [
        ("c", 0.0, -2.0, True),
        ("b", 0.0, 2.0, False),
        ("a", 0.0, 0.5, False),
    ]
    assert (found[0].answer_a, found[0].answer_b, found[0].target) == ("A answer c", "B answer c", "t")
    assert [one.id for one in changed_samples(*runs, limit=1)] == ["c"]
    assert changed_samples(*runs, tasks=["other"]) == []


def test_flips_show_the_choices_of_both_runs(pair: Pair) -> None:
    for folder, value, best in ((pair.a, 1.0, -0.5), (pair.b, 0.0, -3.0)):
        choices = [(" yes", best), (" no", -1.0)]
        folder.task("quiz", {"s": {"value": value, "choices": choices}, "t": {"value": 1.0, "choices": choices}}, [])
    (one,) = changed_samples(*pair.write())
    assert one.answer_a == ">  ' yes': -0.5000 nats\n   ' no': -1.0000 nats".replace(">  ", "> ").replace("   '", "  '")
    assert one.answer_b == "  ' yes': -3.0000 nats\n> ' no': -1.0000 nats"


def test_hostile_texts_are_neutral_in_terminal_and_markdown(pair: Pair) -> None:
    stories(pair, {"s\x1b[1m": 0.0}, {"s\x1b[1m": -1.0}, text="\x1b]0;t\x07 \u202e ``` ```` [red]x[/red]\n# head")
    runs = pair.write()
    changed, report = changed_samples(*runs), compare_runs(*runs)
    text = shown(changed_text(changed, report)) + shown(comparison_table(report))
    markdown = comparison_markdown(report, changed)
    for out in (text, markdown):
        assert re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", out) is None
        assert "⟨U+001B⟩]0;t⟨U+0007⟩ ⟨U+202E⟩" in out
    assert "[red]x[/red]" in text
    # The longest run of backticks in the answer is four, so only a fence of five closes it.
    assert markdown.count("\n`````text\n") == 2 and markdown.count("\n`````\n") == 2


def test_a_published_run_without_texts_still_shows_what_changed(pair: Pair) -> None:
    stories(pair, {"s": 0.0}, {"s": -1.0})
    a, b = pair.write()
    shutil.rmtree(a / "requests")
    (one,) = changed_samples(a, b)
    assert (one.answer_a, one.answer_b) == (None, "B answer s")


def test_rendering(pair: Pair) -> None:
    pair.task("quiz", *flips(0, 12, 4))
    report = compare_runs(*pair.write())
    text = shown(comparison_table(report))
    assert max(len(line) for line in text.splitlines()) <= 80
    # 12 of 12: p = 2 / 4096 = 0.0005.
    assert re.search(r"quiz:raw\s+1\.000\s+0\.250\s+-0\.750\s+16\s+worse", text)
    assert re.search(r"acc ↑\s+\[-0\.\d{3}, -0\.\d{3}\]\s+\+0 -12\s+p <0\.001", text)
    markdown = comparison_markdown(report)
    assert markdown.startswith("# tuned against base\n")
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows} == {14}
    assert rows[2].startswith("| quiz:raw | acc ↑ | worse | 1.000 | 0.250 | -0.750 |")
    again = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert again["differences"][0]["verdict"] == "worse" and again["alpha"] == 0.05
    assert [p_text(None), p_text(0.0004), p_text(0.25), signed(0.5), signed(-0.5)] == [
        "–",
        "<0.001",
        "0.250",
        "+0.500",
        "-0.500",
    ]

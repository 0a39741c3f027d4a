"""Published reports say what their records say, and the records hold numbers that can be computed again."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPORT = Path(__file__).resolve().parents[2] / "reports" / "eval-on-tiny-models"
RUNS = sorted((REPORT / "records").glob("run-*.json"))


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report_build", REPORT / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name: str) -> Any:
    return json.loads((REPORT / "records" / name).read_text(encoding="utf-8"))


def scores_of(run: Any) -> Iterator[Any]:
    for task in run["tasks"]:
        yield from task["scores"]


def test_the_page_is_what_the_records_make(build: ModuleType) -> None:
    assert (REPORT / "README.md").read_text(encoding="utf-8") == build.render()


def test_there_are_records() -> None:
    assert [file.stem for file in RUNS] == [
        "run-tox-tiny-base",
        "run-tox-tiny-instruct",
        "run-transformers",
        "run-vllm",
    ]


@pytest.mark.parametrize("file", RUNS, ids=lambda file: file.stem)
def test_every_number_follows_from_its_items(file: Path) -> None:
    """Wilson's interval by statsmodels for 0/1, Student's by scipy otherwise."""
    import numpy as np
    from scipy import stats
    from statsmodels.stats.proportion import proportion_confint

    for step in scores_of(json.loads(file.read_text(encoding="utf-8"))):
        for row in step["rows"]:
            values = [value for value in step["values"][row["metric"]].values() if value is not None]
            assert len(values) == row["n"]
            assert len(step["values"][row["metric"]]) == row["n"] + row["n_unscored"]
            assert row["mean"] == pytest.approx(np.mean(values), abs=1e-12)
            assert row["stderr"] == pytest.approx(stats.sem(values), abs=1e-12)
            if set(values) <= {0.0, 1.0}:
                interval = proportion_confint(int(sum(values)), len(values), method="wilson")
            else:
                interval = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
            assert row["ci95"] == pytest.approx(list(interval), abs=1e-9)


def test_the_comparison_follows_from_the_items() -> None:
    """Counts by hand; McNemar's exact test is a binomial test of the discordant pairs."""
    from scipy.stats import binomtest

    one, other = (next(scores_of(read(f"run-tox-{name}.json"))) for name in ("tiny-base", "tiny-instruct"))
    compared = {row["metric"]: row for row in read("compare.json")["differences"]}
    assert set(compared) == {"toxicity_reward", "toxic_share"}
    for metric, row in compared.items():
        sign = 1 if row["higher_is_better"] else -1
        a, b = one["values"][metric], other["values"][metric]
        assert a.keys() == b.keys()
        gains = [sign * (b[item] - a[item]) for item in a]
        assert row["n_better"] == sum(gain > 0 for gain in gains)
        assert row["n_worse"] == sum(gain < 0 for gain in gains)
        assert row["difference"] == pytest.approx(sign * sum(gains) / len(gains), abs=1e-12)
    share = compared["toxic_share"]
    discordant = share["n_better"] + share["n_worse"]
    # What the page says: without leave, nothing is compared that was asked in two ways.
    assert {row["prompts_differ"] for row in compared.values()} == {"raw in A, chat in B"}
    assert share["p_value"] == pytest.approx(binomtest(share["n_better"], discordant, 0.5).pvalue, rel=1e-9)


@pytest.mark.parametrize("name", ["vllm.json", "lm_eval.json"])
def test_engines_and_lm_eval_agree_as_the_page_says(build: ModuleType, name: str) -> None:
    figures = read(f"parity-{name}")
    assert set(figures) == {"mmlu@0", "bbh@3"}
    for task in figures.values():
        assert task["scores_that_differ"] == 0 and task["a"] == task["b"]
    assert figures["mmlu@0"]["largest_difference"] <= build.TOLERANCE[name]
    assert figures["mmlu@0"]["logprobs"] == 4 * figures["mmlu@0"]["items"] == 4 * 20 * 57
    assert figures["bbh@3"]["texts_that_differ"] == 0
    assert figures["bbh@3"]["items"] == 3 * 27


def test_ratios_follow_from_the_rounds() -> None:
    from statistics import median

    figures = read("overhead.json")
    parts = {
        "harness / raw, compute": ("harness", "compute", "raw", "compute"),
        "harness: compute / engine calls within it": ("harness", "compute", "harness", "engine"),
        "harness / lm_eval_once, wall": ("harness", "wall", "lm_eval_once", "wall"),
        "harness / lm_eval_each, wall": ("harness", "wall", "lm_eval_each", "wall"),
    }
    assert set(figures["ratios"]) == set(parts)
    for name, (upper, part, lower, other) in parts.items():
        of_rounds = [costs[upper][part] / costs[lower][other] for costs in figures["rounds"]]
        ratio = figures["ratios"][name]
        # Seconds are rounded in the record.
        assert [ratio[key] for key in ("median", "least", "greatest")] == pytest.approx(
            [median(of_rounds), min(of_rounds), max(of_rounds)], rel=0.02
        )


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)
    elif isinstance(value, str):
        yield value


@pytest.mark.parametrize("file", sorted((REPORT / "records").glob("*.json")), ids=lambda file: file.stem)
def test_records_hold_no_text_and_no_path(file: Path) -> None:
    """Ids, digests, names and versions are single words; what else is said is the harness's own."""
    own = {"prompts differ: raw in A, chat in B (--allow-prompt-mismatch)", "raw in A, chat in B"}
    for text in strings(json.loads(file.read_text(encoding="utf-8"))):
        if text in {**read("overhead.json")["ratios"], **read("multi_adapter.json")["ratios"]}:
            continue
        own_words = text in own or re.fullmatch(
            r"dropped: (no severe_toxicity score|not among the 1000 highest .*)", text
        )
        assert own_words or " " not in text, text
        assert not text.startswith(("/", "~")), text


def test_ratios_of_many_adapters_are_those_of_their_seconds() -> None:
    """One round, so each ratio is that of the two arms' seconds, which are kept to hundredths."""
    figures = read("multi_adapter.json")
    for name, part in (("wall", "wall"), ("compute", "compute")):
        ratio = figures["ratios"][f"one_engine / one_by_one, {name}"]["median"]
        one, each = (figures["median"][arm][part] for arm in ("one_engine", "one_by_one"))
        assert ratio == pytest.approx(one / each, abs=2e-3)
    for cost in figures["median"].values():
        parts = sum(value for part, value in cost.items() if part != "wall")
        assert parts == pytest.approx(cost["wall"], abs=0.05)

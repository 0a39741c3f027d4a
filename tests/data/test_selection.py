"""Expressions, one seeded order, exact mixtures, and held-out rows by prompt."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, strategies as st

from harness.contracts.converter import Converter
from harness.contracts.dataset import Dataset, DatasetJob, DatasetRow, RowSchema, TrainingRow
from harness.contracts.registry import Origin, Registered, Registry, load_plugins
from harness.core.errors import UserError
from harness.data.convert import convert
from harness.data.expression import at_revisions, parse_expression, portable
from harness.data.row_schema import EXAMPLES, row_problem
from harness.data.selection import Selection, interleave, seeded_order, select, selection_digest
from harness.data.separation import NEAR, NearPrompts, is_held_out, prompt_key
from harness.testing import check_converter, check_dataset
from harness_plugins.datasets.converters import PairsToDemonstrations, PairsToRated
from tests.conftest import shared_revisions

shared = pytest.mark.skipif("HARNESS_SHARED" not in os.environ, reason="HARNESS_SHARED is unset")


@pytest.fixture(scope="module")
def bundled() -> Registry:
    return load_plugins()


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The shared hub cache, and a prepared cache of our own."""
    monkeypatch.setenv("HF_HUB_CACHE", str(Path(os.environ["HARNESS_SHARED"]) / "data" / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "prepared"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def pair(prompt: str, number: int = 0) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": prompt}], "chosen": f"yes {number}", "rejected": f"no {number}"}


class Made(Dataset):
    """Pairs in memory: subset -> split -> prompts; a prompt "" is dropped."""

    name = "made"
    summary = "rows of a test"
    schema = "pairs"
    source = "nowhere"
    content: dict[str, dict[str, list[str]]]
    official: str | None = "test"

    def heldout_split(self, job: DatasetJob) -> str | None:
        return self.official

    def rows(self, job: DatasetJob) -> Iterator[DatasetRow]:
        for number, prompt in enumerate(self.content[str(job.subset)][str(job.split)]):
            if prompt:
                yield DatasetRow(f"{job.split}/{number}", pair(prompt, number))
            else:
                job.drop("no prompt")


def registry_of(**content: dict[str, list[str]]) -> Registry:
    """A registry with the data set `made`, whose subsets are the keywords."""
    cls = type("MadeHere", (Made,), {"subsets": tuple(content), "content": content})
    registry = Registry()
    for plugin in (cls(), PairsToDemonstrations(), PairsToRated()):
        register(registry, plugin)
    return registry


def register(registry: Registry, plugin: Any, by: str = "test") -> None:
    registry.entries[plugin.kind, plugin.name] = Registered(plugin.kind, plugin.name, plugin, Origin(by, by, "0"))


def prompts(count: int, name: str = "p") -> list[str]:
    return [f"{name}{n}" for n in range(count)]


def shown(rows: Sequence[DatasetRow]) -> list[str]:
    return [row.data["prompt"][0]["content"] for row in rows]


# -------------------------------------------------------------------------------------------------------- expressions


def labels(expression: str, registry: Registry) -> list[tuple[str, str]]:
    return [(part.label, str(part.weight)) for part in parse_expression(expression, registry)]


def test_expressions(bundled: Registry) -> None:
    read = {
        "hh-rlhf:harmless": [("hh-rlhf:harmless", "1")],
        "hh-rlhf:helpful+harmless": [("hh-rlhf:harmless", "1/2"), ("hh-rlhf:helpful", "1/2")],
        "hh-rlhf:harmless*0.3 + helpful*0.7": [("hh-rlhf:harmless", "3/10"), ("hh-rlhf:helpful", "7/10")],
        "hh-rlhf:harmless*1+beavertails:harmless*2": [("beavertails:harmless", "2/3"), ("hh-rlhf:harmless", "1/3")],
        "beavertails@main:harmless*1/3": [("beavertails@main:harmless", "1")],
        "summarize": [("summarize", "1")],
        "some/rows": [("some/rows", "1")],
        "some/rows@v2:english*2 + summarize*2": [("some/rows@v2:english", "1/2"), ("summarize", "1/2")],
        "jsonl:a.jsonl*0.25 + jsonl:b.jsonl*0.75": [("jsonl:a.jsonl", "1/4"), ("jsonl:b.jsonl", "3/4")],
    }
    assert {text: labels(text, bundled) for text in read} == read


def test_a_file_with_a_plus_in_its_name_stands_alone(tmp_path: Path, bundled: Registry) -> None:
    path = tmp_path / "a+b*c.jsonl"
    path.write_text("")
    (part,) = parse_expression(f"jsonl:{path}", bundled)
    assert part.options == (("path", str(path)),)
    assert part.label == "jsonl:a+b*c.jsonl"


def test_commits_are_written_into_an_expression(bundled: Registry) -> None:
    wanted = {"Anthropic/hh-rlhf": "a" * 40, "some/rows": "b" * 40}
    a, b = (f"@{letter * 40}" for letter in "ab")
    written = {
        "hh-rlhf:harmless": f"hh-rlhf{a}:harmless",
        "hh-rlhf:harmless*0.3 + helpful*0.7": f"hh-rlhf{a}:harmless*0.3 + helpful*0.7",
        "hh-rlhf@v1:harmless+beavertails:helpful": "hh-rlhf@v1:harmless+beavertails:helpful",
        "some/rows+summarize": f"some/rows{b}+summarize",
        "summarize & some/rows&hh-rlhf:helpful": f"summarize & some/rows{b}&hh-rlhf{a}:helpful",
        "some/rows:english*2 + hh-rlhf:helpful*1": f"some/rows{b}:english*2 + hh-rlhf{a}:helpful*1",
        "jsonl:some/rows": "jsonl:some/rows",
    }
    assert {text: at_revisions(text, bundled, wanted) for text in written} == written


def test_an_expression_is_published_without_the_folders_of_its_files(tmp_path: Path) -> None:
    odd = tmp_path / "a+b*c.jsonl"
    odd.write_text("")
    said = {
        f"jsonl:{odd}": "jsonl:a+b*c.jsonl",
        "jsonl:/home/me/x y/a.jsonl*0.3 + jsonl:~/b.jsonl*0.7": "jsonl:a.jsonl*0.3 + jsonl:b.jsonl*0.7",
        "hh-rlhf:harmless+some/rows": "hh-rlhf:harmless+some/rows",
    }
    assert {text: portable(text) for text in said} == said


@pytest.mark.parametrize(
    ("expression", "what", "fix"),
    [
        ("hh-rlfh:harmless", "unknown data set 'hh-rlfh'", "Did you mean 'hh-rlhf'?"),
        ("hh-rlhf:harmles", "unknown subset of hh-rlhf 'harmles'", "Did you mean 'harmless'?"),
        ("hh-rlhf:harmless+helpfull", "unknown subset of hh-rlhf 'helpfull'", "Did you mean 'helpful'?"),
        ("hh-rlhf", "hh-rlhf has several subsets, and none is named", "Write hh-rlhf:harmless or hh-rlhf:helpful."),
        ("hh-rlhf:harmless*0.3+helpful", "some terms have a weight and some have none", "all of them one, or none"),
        ("hh-rlhf:harmless*0+helpful*1", "weight '0' is no positive number", "*0.3 or *1/3"),
        ("hh-rlhf:harmless*x", "weight 'x' is no positive number", "*0.3 or *1/3"),
        ("hh-rlhf:harmless*1/0", "weight '1/0' is no positive number", "*0.3 or *1/3"),
        ("hh-rlhf:harmless+harmless", "hh-rlhf:harmless is named twice", "Name it once"),
        ("hh-rlhf:harmless+", "cannot read ''", "joined by +"),
        ("jsonl:", "jsonl: names no file", "jsonl:PATH"),
        ("hh-rlhf:harmless+helpful&beavertails:helpful", "joins terms both by + and by &", "& for all rows of all"),
        ("hh-rlhf:harmless*0.3&helpful*0.7", "& takes all rows, and a term has a weight", "join the terms by +"),
    ],
)
def test_odd_expressions(expression: str, what: str, fix: str, bundled: Registry) -> None:
    with pytest.raises(UserError) as error:
        parse_expression(expression, bundled)
    assert error.value.where == f"--dataset {expression}"
    assert what in error.value.what
    assert fix in error.value.fix


def test_data_for_evaluation_cannot_be_trained_on(bundled: Registry) -> None:
    with pytest.raises(UserError) as error:
        select("real-toxicity-prompts", schema="pairs", registry=bundled)
    assert "unknown data set to train on 'real-toxicity-prompts'" in str(error.value)


def test_a_missing_file_is_named(bundled: Registry, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"Did you mean .*rows\.jsonl"):
        select(f"jsonl:{tmp_path}/row.jsonl", schema="pairs", registry=bundled)


# -------------------------------------------------------------------------------------------------------------- order

IDS = st.lists(st.text(min_size=1), unique=True, max_size=30)


@given(IDS, st.integers(0, 9), st.randoms())
def test_the_order_is_that_of_the_ids_alone_and_prefixes_are_nested(ids: list[str], seed: int, draw: Any) -> None:
    rows = [DatasetRow(one, {}) for one in ids]
    ordered = seeded_order(rows, seed)
    shuffled = list(rows)
    draw.shuffle(shuffled)
    assert seeded_order(shuffled, seed) == ordered
    # A row more moves no other.
    more = seeded_order([*rows, DatasetRow("\0more", {})], seed)
    assert [row for row in more if row.id != "\0more"] == ordered


def test_seeds_order_differently() -> None:
    rows = [DatasetRow(str(n), {}) for n in range(50)]
    assert [row.id for row in seeded_order(rows, 0)] != [row.id for row in seeded_order(rows, 1)]


WEIGHTS = st.lists(st.integers(1, 12), min_size=1, max_size=5)


@given(WEIGHTS, st.integers(1, 120))
def test_every_prefix_of_a_mixture_has_its_exact_shares(parts: list[int], length: int) -> None:
    """Each share rounded up or down at every length, and exact where the share is a whole number of rows."""
    shares = [Fraction(part, sum(parts)) for part in parts]
    order = list(interleave(shares, [length] * len(parts)))[:length]
    assert len(order) == length
    for upto in range(length + 1):
        for part, share in enumerate(shares):
            taken = order[:upto].count(part)
            assert math.floor(share * upto) <= taken <= math.ceil(share * upto)


def test_a_mixture_by_hand() -> None:
    """0.3 and 0.7 of ten rows: 3 and 7. In the first place both may go; 1/0.7 comes before 1/0.3."""
    order = list(interleave([Fraction(3, 10), Fraction(7, 10)], [3, 7]))
    assert order == [1, 1, 0, 1, 1, 0, 1, 1, 0, 1]


def test_a_mixture_ends_when_the_part_whose_turn_it_is_has_no_row_left() -> None:
    half = [Fraction(1, 2), Fraction(1, 2)]
    assert list(interleave(half, [2, 9])) == [0, 1, 0, 1]
    assert list(interleave(half, [9, 1])) == [0, 1, 0]
    assert list(interleave(half, [0, 9])) == []


@given(st.integers(1, 20), st.integers(0, 20))
def test_samples_of_a_mixture_are_nested(first: int, more: int) -> None:
    registry = registry_of(a={"train": prompts(40, "a"), "test": ["t"]}, b={"train": prompts(40, "b"), "test": ["u"]})
    short = select("made:a*0.3+b*0.7", schema="pairs", registry=registry, samples=first)
    long = select("made:b*0.7+a*0.3", schema="pairs", registry=registry, samples=first + more)
    assert long.train[:first] == short.train
    assert long.heldout == short.heldout


def test_samples_beyond_the_rows_are_refused_with_the_counts() -> None:
    registry = registry_of(a={"train": prompts(4, "a"), "test": ["t"]}, b={"train": prompts(9, "b"), "test": ["u"]})
    assert len(select("made:a+b", schema="pairs", registry=registry).train) == 8
    with pytest.raises(UserError) as error:
        select("made:a+b", schema="pairs", registry=registry, samples=9)
    said = "9 rows are asked for, and 8 can be trained on in these shares (made:a has 4, made:b has 9)"
    assert said in str(error.value)
    assert "Ask for 8 or fewer" in str(error.value)
    with pytest.raises(UserError, match="0 is no positive number"):
        select("made:a", schema="pairs", registry=registry, samples=0)


# -------------------------------------------------------------------------------------------- what can be trained on


class Picky:
    """Refuses prompts whose number is a multiple of three; remembers how many rows it was asked about."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, rows: Sequence[DatasetRow]) -> list[str]:
        self.asked += len(rows)
        return [row.id for row in rows if int(row.data["prompt"][0]["content"][1:]) % 3]


def test_samples_count_what_is_trained_on() -> None:
    registry = registry_of(a={"train": prompts(30), "test": ["t"]})
    order = shown(select("made:a", schema="pairs", registry=registry).train)
    good = [prompt for prompt in order if int(prompt[1:]) % 3]
    for samples in (1, 7, 20):
        keep = Picky()
        selection = select("made:a", schema="pairs", registry=registry, samples=samples, keep=keep)
        assert shown(selection.train) == good[:samples]
        assert selection.counts["made:a"]["selected to train"] == samples
        # Nothing is looked at beyond the last row that is taken.
        assert keep.asked == order.index(good[samples - 1]) + 1
    assert shown(select("made:a", schema="pairs", registry=registry, keep=Picky()).train) == good
    with pytest.raises(UserError, match="21 rows are asked for, and 20 can be trained on\n  Ask for 20 or fewer"):
        select("made:a", schema="pairs", registry=registry, samples=21, keep=Picky())


def test_shares_of_a_mixture_are_those_of_what_is_trained_on() -> None:
    registry = registry_of(a={"train": prompts(30, "a"), "test": ["t"]}, b={"train": prompts(60, "b"), "test": ["u"]})
    long = select("made:a*0.3+b*0.7", schema="pairs", registry=registry, samples=20, keep=Picky())
    assert [long.counts[f"made:{name}"]["selected to train"] for name in "ab"] == [6, 14]
    assert not [prompt for prompt in shown(long.train) if int(prompt[1:]) % 3 == 0]
    short = select("made:a*0.3+b*0.7", schema="pairs", registry=registry, samples=10, keep=Picky())
    assert long.train[:10] == short.train
    # 20 and 40 rows remain; at 0.3 to 0.7 b ends after 40, of 57: 57 * 0.7 is 39.9.
    with pytest.raises(UserError, match=r"and 57 can be trained on in these shares \(made:a has 20, made:b has 40\)"):
        select("made:a*0.3+b*0.7", schema="pairs", registry=registry, samples=58, keep=Picky())


def test_a_pair_of_which_one_half_cannot_be_trained_on_is_left_out_whole() -> None:
    registry = registry_of(a={"train": prompts(9), "test": ["t"]})

    def keep(rows: Sequence[DatasetRow]) -> list[str]:
        return [row.id for row in rows if row.data["completion"] != "no 4"]

    rated = select("made:a", schema="rated", registry=registry, samples=8, keep=keep)
    assert len(rated.train) == 16
    assert "p4" not in shown(rated.train)


def test_ids_that_stand_for_two_rows_are_refused() -> None:
    registry = registry_of(a={"train": prompts(3), "test": ["t"]})
    rows = registry.entries["dataset", "made"].plugin.rows  # type: ignore[attr-defined]
    registry.entries["dataset", "made"].plugin.rows = lambda job: [*rows(job), *rows(job)]  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="--dataset made:a: two of its rows have the id 'made:a/train/"):
        select("made:a", schema="pairs", registry=registry)


# ------------------------------------------------------------------------------------------------------ concatenation


def test_a_concatenation_takes_every_row_in_one_order() -> None:
    registry = registry_of(a={"train": prompts(5, "a"), "test": ["t"]}, b={"train": prompts(20, "b"), "test": ["u"]})
    both = select("made:a & b", schema="pairs", registry=registry)
    assert both.train == seeded_order(both.train, 0)
    assert sorted(shown(both.train)) == sorted(prompts(5, "a") + prompts(20, "b"))
    assert sorted(shown(both.heldout)) == ["t", "u"]
    assert both.notes == []
    assert [part["weight"] for part in both.identity["parts"]] == ["all", "all"]
    first = select("made:b&a", schema="pairs", registry=registry, samples=10, keep=Picky())
    good = [row for row in both.train if int(row.data["prompt"][0]["content"][1:]) % 3]
    assert first.train == good[:10]
    assert sum(counts["selected to train"] for counts in first.counts.values()) == 10


def test_unequal_parts_in_equal_shares_are_said_to_be_our_choice() -> None:
    registry = registry_of(a={"train": prompts(5, "a"), "test": ["t"]}, b={"train": prompts(20, "b"), "test": ["u"]})
    said = select("made:a+b", schema="pairs", registry=registry)
    assert len(said.train) == 10
    (note,) = said.notes
    assert "equal, which is our choice where no weights are given" in note
    assert "A & B instead of A + B takes all rows of all" in note
    assert select("made:a*0.2+b*0.8", schema="pairs", registry=registry).notes == []


# ----------------------------------------------------------------------------------------------------------- held out


def test_training_loses_rows_whose_prompt_is_held_out_so_that_held_out_rows_are_the_same_for_every_arm() -> None:
    registry = registry_of(
        a={"train": ["x", "y", "w", ""], "test": ["y", "z", "z", ""]}, b={"train": ["z", "u"], "test": ["x", "v"]}
    )
    alone = select("made:a", schema="pairs", registry=registry, samples=1)
    assert sorted(shown(alone.heldout)) == ["y", "z", "z"]
    assert alone.dropped == {"no prompt": 1, "its prompt is held out": 1}
    assert alone.heldout_dropped == {"no prompt": 1}
    assert alone.counts == {
        "made:a": {
            "rows": 4,
            "dropped": 2,
            "usable": 2,
            "held-out rows dropped": 1,
            "in order, not yet tokenised": 1,
            "held out": 3,
        }
    }
    # What one part holds out, no other trains on: neither x and y of a, nor z of b.
    both = select("made:a&b", schema="pairs", registry=registry)
    assert sorted(shown(both.train)) == ["u", "w"]
    assert sorted(shown(both.heldout)) == ["v", "x", "y", "z", "z"]
    assert both.dropped == {"no prompt": 1, "its prompt is held out": 3}


def words(count: int, *changed: int) -> str:
    """Different words, the ones at these places replaced."""
    return " ".join(f"other{n}" if n in changed else f"word{n}" for n in range(count))


@pytest.mark.parametrize(
    ("held", "trained", "near"),
    [
        ("What is it?", "what IS... it", True),
        ("What is it?", "What was it?", False),
        # 13 words have 9 grams; the last word is in one of them: 8 of 10 are common to both, and of 12 words 7 of 9.
        (words(13), words(13, 12), True),
        (words(12), words(12, 11), False),
        # A word in the middle is in five grams.
        (words(30), words(30, 15), False),
        # 55 words have 51 grams; 46 of 56.
        (words(55), words(55, 20), True),
        # One prompt holds the other: 9 of 11 grams, and 8 of 11.
        (words(15), words(13), True),
        (words(15), words(12), False),
        ("", "", False),
    ],
)
def test_nearly_the_same_prompt(held: str, trained: str, near: bool) -> None:
    assert NearPrompts([words(40, 3), held]).near(trained) is near
    system = {"role": "system", "content": words(400)}
    chats = [[system, {"role": "user", "content": text}] for text in (held, trained)]
    assert NearPrompts(chats[:1]).near(chats[1]) is near


def test_nearly_held_out_prompts_are_not_trained_on_and_counted() -> None:
    near = words(13, 12).upper() + "!"
    registry = registry_of(a={"train": [near, "x"], "test": [words(13)]})
    selection = select("made:a", schema="pairs", registry=registry)
    assert shown(selection.train) == ["x"]
    assert selection.dropped == {NEAR: 1}
    assert NEAR == "its prompt is nearly a held-out one (Jaccard index of word 5-grams 0.8 or more)"
    everything = registry_of(a={"train": [near], "test": [words(13)]})
    with pytest.raises(UserError, match=r"no row is left to train on: 1 rows, dropped 1 \(its prompt is nearly"):
        select("made:a", schema="pairs", registry=everything)


def test_without_an_official_split_a_hash_of_the_prompt_decides() -> None:
    registry = registry_of(a={"train": prompts(400) * 2})
    registry.entries["dataset", "made"].plugin.official = None  # type: ignore[attr-defined]
    first = select("made:a", schema="pairs", registry=registry, seed=0)
    other = select("made:a", schema="pairs", registry=registry, seed=1)
    assert not set(shown(first.train)) & set(shown(first.heldout))
    assert sorted(shown(first.heldout)) == sorted(shown(other.heldout))
    assert len(first.train) + len(first.heldout) == 800
    # 400 prompts at 0.1 each: 40, standard deviation 6; both rows of a prompt go the same way.
    assert 40 - 4 * 6 < len(first.heldout) / 2 < 40 + 4 * 6
    assert all(is_held_out(prompt_key(row)) for row in first.heldout)


def test_held_out_rows_can_be_limited_to_a_prefix() -> None:
    registry = registry_of(a={"train": ["x"], "test": prompts(30)})
    whole = select("made:a", schema="pairs", registry=registry).heldout
    assert select("made:a", schema="pairs", registry=registry, heldout=7).heldout == whole[:7]
    assert select("made:a", schema="pairs", registry=registry, heldout=0).notes == []


def test_nothing_held_out_is_said() -> None:
    registry = registry_of(a={"train": ["x"], "test": [""]})
    assert select("made:a", schema="pairs", registry=registry).notes == ["no row is held out"]


def test_empty_after_filtering_says_the_counts() -> None:
    registry = registry_of(a={"train": ["", "", ""], "test": ["x"]})
    with pytest.raises(UserError) as error:
        select("made:a", schema="pairs", registry=registry)
    assert error.value.where == "--dataset made:a"
    assert "no row is left to train on: 3 rows, dropped 3 (no prompt: 3)" in str(error.value)
    assert "Choose another subset" in str(error.value)


# -------------------------------------------------------------------------------------------------------- conversions


def registry_with(schema: str, *rows: dict[str, Any]) -> Registry:
    """A registry with the data set `made`, whose rows have this schema, all of them for training."""

    def read(self: Any, job: DatasetJob) -> Iterator[DatasetRow]:
        yield from (DatasetRow(f"r{number}", row) for number, row in enumerate(rows if job.split == "train" else ()))

    registry = registry_of()
    made: Dataset = type("MadeHere", (Made,), {"schema": schema, "rows": read})()
    registry.entries["dataset", "made"] = Registered("dataset", "made", made, Origin("test", "test", "0"))
    return registry


def test_a_prompt_that_is_text_is_one_user_turn() -> None:
    turns = [{"role": "user", "content": "Name a colour."}]
    for prompt in ("Name a colour.", turns):
        registry = registry_with("demonstrations", {"prompt": prompt, "completion": "Red.", "more": 1})
        (row,) = select("made", schema=None, registry=registry).train
        assert row.data == {"prompt": turns, "completion": "Red.", "more": 1}


def test_the_examples_of_the_schemas_are_rows_of_them() -> None:
    assert set(EXAMPLES) == set(get_args(RowSchema))
    for schema, example in EXAMPLES.items():
        assert row_problem(schema, example) is None
        registry = registry_with(schema, dict(example))
        check_dataset(registry.find(Dataset, "made", "test"), split="train")
        if schema != "prompts":
            (row,) = select("made", schema=None, registry=registry).train
            assert {turn["role"] for turn in row.data["prompt"]} <= {"system", "user", "assistant"}


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"completion": [{"role": "assistant", "content": "Red."}]}, "'completion' is no text: [{'role': 'assistant'"),
        ({"completion": None}, "there is no 'completion'"),
        ({"prompt": {"role": "user"}}, "'prompt' is neither text nor a list of messages with role and content: {"),
        ({"prompt": [{"role": "user", "text": "x"}]}, "'prompt' is neither text nor a list of messages"),
        ({"prompt": ["x"]}, "'prompt' is neither text nor a list of messages"),
        ({"ratings": "good"}, "'ratings' is no mapping from preferences to numbers or labels: 'good'"),
        ({"ratings": {}}, "'ratings' is no mapping from preferences to numbers or labels: {}"),
        ({"ratings": {"tone": None}}, "'ratings' is no mapping from preferences to numbers or labels: {'tone': None}"),
    ],
    ids=str,
)
def test_rows_of_another_form_are_refused(changed: dict[str, Any], problem: str) -> None:
    """A list as the answer would be trained on as the text that Python prints for it. The kit says the same."""
    registry = registry_with("rated", {**EXAMPLES["rated"], **changed})
    with pytest.raises(UserError) as caught:
        select("made", schema=None, registry=registry)
    assert str(caught.value).startswith(f"--dataset made: row made/r0 is none of 'rated': {problem}")
    assert caught.value.fix == "Mend the data set: `harness.testing.check_dataset` finds such."
    with pytest.raises(AssertionError, match="A row of 'rated'"):
        check_dataset(registry.find(Dataset, "made", "test"), split="train")


def test_pairs_become_demonstrations_and_ratings_in_the_same_order() -> None:
    registry = registry_of(a={"train": prompts(9), "test": ["t"]})
    pairs = select("made:a", schema="pairs", registry=registry, samples=5)
    shown_only = select("made:a", schema="demonstrations", registry=registry, samples=5)
    rated = select("made:a", schema="rated", registry=registry, samples=5)
    assert [row.id for row in shown_only.train] == [row.id for row in pairs.train]
    assert shown_only.train[0].data == {
        "prompt": pairs.train[0].data["prompt"],
        "completion": pairs.train[0].data["chosen"],
    }
    assert [(row.data["completion"], row.data["ratings"]) for row in rated.train[:2]] == [
        (pairs.train[0].data["chosen"], {"preference": 1.0}),
        (pairs.train[0].data["rejected"], {"preference": 0.0}),
    ]
    assert len({row.id for row in rated.train}) == len(rated.train) == 10


class Single(TrainingRow):
    """Rows of a plugin's own: one text after a marked prompt, and how often it was liked."""

    text: str
    likes: int = 0
    columns = ("likes",)

    def render(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "completion": f"<{self.text}>"}


class Shown(Converter):
    name = "shown"
    summary = "demonstrations as rows of one text"
    source = "demonstrations"
    target = Single

    def convert(self, row: DatasetRow) -> Iterator[DatasetRow]:
        yield DatasetRow(row.id, {"prompt": row.data["prompt"], "text": row.data["completion"]})


def test_a_conversion_nobody_knows_is_refused_and_can_be_registered() -> None:
    row = DatasetRow("r", {"prompt": "q", "completion": "a"})
    registry = registry_of(a={"train": ["x"], "test": ["t"]})
    with pytest.raises(UserError) as error:
        list(convert([row], "demonstrations", Single, registry))
    assert str(error.value) == (
        "--dataset: its rows are demonstrations, and Single are needed\n"
        "  From demonstrations there are: no converters. Choose another data set or method, or write a converter: "
        "`harness plugins new converter NAME`."
    )
    register(registry, Shown())
    check_converter(Shown())
    (made,) = convert([row], "demonstrations", Single, registry)
    assert made == DatasetRow("r", {"prompt": "q", "text": "a", "likes": 0})
    with pytest.raises(UserError, match="From pairs there are: demonstrations, rated"):
        select("made:a", schema="prompts", registry=registry)


def test_two_conversions_of_the_same_rows_are_refused() -> None:
    registry = registry_of(a={"train": ["x"], "test": ["t"]})
    register(registry, type("Other", (PairsToDemonstrations,), {"name": "other"})(), by="elsewhere")
    with pytest.raises(UserError) as error:
        select("made:a", schema="demonstrations", registry=registry)
    assert str(error.value) == (
        "--dataset made:a: from pairs to demonstrations there are 2 converters: pairs-to-demonstrations of test and "
        "other of elsewhere\n  Uninstall one of them, or leave its --plugin out."
    )


def test_rows_that_a_converter_makes_are_held_to_the_target() -> None:
    registry = registry_of(a={"train": ["x"], "test": ["t"]})
    register(registry, Shown())
    row = DatasetRow("r", {"prompt": "q", "completion": 3})
    with pytest.raises(UserError) as error:
        list(convert([row], "demonstrations", Single, registry, "--dataset d"))
    assert str(error.value) == (
        "--dataset d, converter shown: row r is none of 'Single': text: Input should be a valid string\n"
        "  Mend the data set: `harness.testing.check_dataset` finds such."
    )


def test_the_code_of_a_conversion_is_in_the_identity_unless_it_was_the_cores_own() -> None:
    """Ids of before there were converters stay; anybody else's converter counts, and a bundled one that has changed."""
    registry = registry_of(a={"train": ["x"], "test": ["t"]})

    def parts(schema: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = select("made:a", schema=schema, registry=registry).identity["parts"]
        return found

    plain = parts("demonstrations")
    assert [sorted(part) for part in plain] == [["dataset", "heldout", "weight"]]
    register(registry, type("Changed", (PairsToDemonstrations,), {"numerics": 2, "__module__": "harness_plugins.x"})())
    (part,) = parts("demonstrations")
    assert {**part, "converter": None} == {**plain[0], "converter": None} and len(part["converter"]) == 64
    assert parts("rated") == parts("pairs") == plain


def test_own_rows_are_held_out_by_prompt_in_either_form() -> None:
    messages = [{"role": "user", "content": "q"}]
    assert prompt_key(DatasetRow("a", {"prompt": "q"})) == prompt_key(DatasetRow("b", {"prompt": messages}))


# ----------------------------------------------------------------------------------------------------------- identity


def test_identity_says_what_pins_the_rows_and_no_path(tmp_path: Path, bundled: Registry) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"q{n}", "chosen": "yes", "rejected": "no"} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = select(f"jsonl:{path}", schema=None, registry=bundled, samples=9)
    assert str(tmp_path) not in json.dumps(first.identity)
    assert first.identity["samples"] == 9
    assert first.schema == "pairs"
    assert first.train[0].id.startswith("jsonl:rows.jsonl/")
    path.write_text(path.read_text().replace("q3", "Q3"))
    assert select(f"jsonl:{path}", schema=None, registry=bundled, samples=9).identity != first.identity


def test_the_digest_is_of_ids_data_and_order() -> None:
    rows = [DatasetRow("a", {"x": 1}), DatasetRow("b", {"x": 2})]
    selection = Selection(rows, [], {}, {}, {})
    assert selection.digest == selection_digest(rows)
    variants = [rows[::-1], rows[:1], [DatasetRow("a", {"x": 2}), rows[1]], [DatasetRow("c", {"x": 1}), rows[1]]]
    assert len({selection_digest(one) for one in [rows, *variants]}) == 5


def test_options_reach_the_data_set(bundled: Registry) -> None:
    with pytest.raises(UserError, match=r"--set data\.beavertails.*rul"):
        select("beavertails:harmless", schema="pairs", registry=bundled, options={"beavertails": {"rul": "one_safe"}})


@shared
def test_the_real_mixture_is_nested_exact_and_held_out_by_prompt(real: None, bundled: Registry) -> None:
    revisions = shared_revisions()
    hh = f"hh-rlhf@{revisions['Anthropic/hh-rlhf']}"
    expression = at_revisions("hh-rlhf:harmless*0.25+helpful*0.75", bundled, revisions)
    assert expression == f"{hh}:harmless*0.25+helpful*0.75"
    large = select(expression, schema="pairs", registry=bundled, samples=1600)
    small = select(expression, schema="pairs", registry=bundled, samples=800)
    assert large.train[:800] == small.train
    for rows, one in ((800, small), (1600, large)):
        assert one.counts[f"{hh}:harmless"]["in order, not yet tokenised"] == rows // 4
        assert sum(row.id.startswith(f"{hh}:helpful/") for row in one.train) == rows * 3 // 4
    everything = select(f"{hh}:harmless", schema="pairs", registry=bundled)
    trained = {json.dumps(row.data["prompt"]) for row in everything.train}
    assert everything.heldout
    assert not [row for row in everything.heldout if json.dumps(row.data["prompt"]) in trained]
    with pytest.raises(UserError, match=r"dropped 2,704 \(better_response_id is null: 2,704\)"):
        select(at_revisions("beavertails:helpful", bundled, revisions), schema="pairs", registry=bundled)


@shared
@pytest.mark.parametrize(
    ("name", "held_out", "near"),
    [("hh-rlhf:harmless", 480, 0), ("hh-rlhf:helpful", 421, 2), ("beavertails:harmless", 598, 0)],
)
def test_near_duplicates_of_real_held_out_prompts(
    real: None, bundled: Registry, name: str, held_out: int, near: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted by hand before there was code for it: 2 of helpful's held-out prompts, none elsewhere."""
    expression = at_revisions(name, bundled, shared_revisions())
    apart = select(expression, schema="pairs", registry=bundled)
    index = NearPrompts(row.data["prompt"] for row in apart.heldout)
    assert not [row.id for row in apart.train if index.near(row.data["prompt"])]
    monkeypatch.setattr("harness.data.separation.NearPrompts.near", lambda index, prompt: False)
    mixed = select(expression, schema="pairs", registry=bundled)
    monkeypatch.undo()
    assert mixed.heldout == apart.heldout and len(apart.heldout) == held_out
    assert len(mixed.train) - len(apart.train) == apart.dropped.get(NEAR, 0)
    trained = NearPrompts(row.data["prompt"] for row in mixed.train)
    assert sum(trained.near(row.data["prompt"]) for row in apart.heldout) == near

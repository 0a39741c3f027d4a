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
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from harness.contracts import Dataset, DatasetJob, DatasetRow, RowSchema
from harness.errors import UserError
from harness.expression import parse_expression
from harness.registry import Origin, Registered, Registry, load_plugins
from harness.row_schema import EXAMPLES, row_problem
from harness.selection import (
    Selection,
    add_converter,
    convert,
    interleave,
    is_held_out,
    prompt_key,
    rows_digest,
    seeded_order,
    select,
)
from harness.testing import check_dataset

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
    registry.entries["dataset", "made"] = Registered("dataset", "made", cls(), Origin("test", "test", "0"))
    return registry


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
    assert "9 rows are asked for, and there are 8 in these shares (made:a has 4, made:b has 9)" in str(error.value)
    assert "Ask for 8 or fewer" in str(error.value)
    with pytest.raises(UserError, match="0 is no positive number"):
        select("made:a", schema="pairs", registry=registry, samples=0)


# ----------------------------------------------------------------------------------------------------------- held out


def test_official_held_out_rows_lose_those_whose_prompt_is_trained_on() -> None:
    registry = registry_of(
        a={"train": ["x", "y", ""], "test": ["y", "z", "z", ""]}, b={"train": ["z"], "test": ["x", "v"]}
    )
    alone = select("made:a", schema="pairs", registry=registry, samples=1)
    assert sorted(shown(alone.heldout)) == ["z", "z"]
    assert alone.dropped == {"no prompt": 1}
    assert alone.heldout_dropped == {"no prompt": 1}
    assert alone.counts == {
        "made:a": {
            "rows": 3,
            "dropped": 1,
            "usable": 2,
            "held-out rows dropped": 1,
            "held-out rows whose prompt is trained on": 1,
            "selected to train": 1,
            "held out": 2,
        }
    }
    # What one part trains on, another does not hold out: neither y nor z of a, nor x of b.
    both = select("made:a+b", schema="pairs", registry=registry)
    assert both.counts["made:a"]["held-out rows whose prompt is trained on"] == 3
    assert both.counts["made:b"]["held-out rows whose prompt is trained on"] == 1


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
    registry = registry_of(a={"train": ["x"], "test": ["x"]})
    assert select("made:a", schema="pairs", registry=registry).notes == [
        "no row is held out: none is left whose prompt is not trained on"
    ]


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
        ({"rating": "good"}, "'rating' is no number: 'good'"),
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
    assert [(row.data["completion"], row.data["rating"]) for row in rated.train[:2]] == [
        (pairs.train[0].data["chosen"], 1.0),
        (pairs.train[0].data["rejected"], 0.0),
    ]
    assert len({row.id for row in rated.train}) == len(rated.train) == 10


def test_a_conversion_nobody_knows_is_refused_and_can_be_added() -> None:
    class Single(BaseModel):
        text: str

    row = DatasetRow("r", {"prompt": "q", "completion": "a"})
    with pytest.raises(UserError) as error:
        list(convert([row], "demonstrations", Single))
    assert "its rows are demonstrations, and Single are needed" in str(error.value)
    assert "harness.selection.add_converter" in str(error.value)
    add_converter("demonstrations", Single, lambda one: [DatasetRow(one.id, {"text": one.data["completion"]})])
    assert [made.data for made in convert([row], "demonstrations", Single)] == [{"text": "a"}]
    registry = registry_of(a={"train": ["x"], "test": ["t"]})
    with pytest.raises(UserError, match="From pairs there are: demonstrations, rated"):
        select("made:a", schema="prompts", registry=registry)


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
    assert selection.digest == rows_digest(rows)
    variants = [rows[::-1], rows[:1], [DatasetRow("a", {"x": 2}), rows[1]], [DatasetRow("c", {"x": 1}), rows[1]]]
    assert len({rows_digest(one) for one in [rows, *variants]}) == 5


def test_options_reach_the_data_set(bundled: Registry) -> None:
    with pytest.raises(UserError, match=r"--set data\.beavertails.*rul"):
        select("beavertails:harmless", schema="pairs", registry=bundled, options={"beavertails": {"rul": "one_safe"}})


@shared
def test_the_real_mixture_is_nested_exact_and_held_out_by_prompt(real: None, bundled: Registry) -> None:
    expression = "hh-rlhf:harmless*0.25+helpful*0.75"
    large = select(expression, schema="pairs", registry=bundled, samples=1600)
    small = select(expression, schema="pairs", registry=bundled, samples=800)
    assert large.train[:800] == small.train
    for rows, one in ((800, small), (1600, large)):
        assert one.counts["hh-rlhf:harmless"]["selected to train"] == rows // 4
        assert sum(row.id.startswith("hh-rlhf:helpful/") for row in one.train) == rows * 3 // 4
    everything = select("hh-rlhf:harmless", schema="pairs", registry=bundled)
    trained = {json.dumps(row.data["prompt"]) for row in everything.train}
    assert everything.heldout
    assert not [row for row in everything.heldout if json.dumps(row.data["prompt"]) in trained]
    with pytest.raises(UserError, match=r"dropped 2,704 \(better_response_id is null: 2,704\)"):
        select("beavertails:helpful", schema="pairs", registry=bundled)

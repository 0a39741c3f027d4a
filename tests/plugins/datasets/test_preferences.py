"""HH-RLHF, BeaverTails, TL;DR and anybody's rows: counts against the raw rows, and made rows for every reason."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from harness.contracts.dataset import Dataset, DatasetJob, DatasetRow
from harness.core.errors import UserError
from harness.data.hub import load_hub_dataset
from harness.testing import check_dataset
from harness_plugins.datasets import preferences as datasets_align
from harness_plugins.datasets.preferences import BeaverTails, HhRlhf, Summarize, split_transcript
from harness_plugins.datasets.trl import TrlFormats
from tests.conftest import shared_revisions

shared = pytest.mark.skipif("HARNESS_SHARED" not in os.environ, reason="HARNESS_SHARED is unset")


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The shared hub cache, and a prepared cache of our own."""
    monkeypatch.setenv("HF_HUB_CACHE", str(Path(os.environ["HARNESS_SHARED"]) / "data" / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "prepared"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def table(monkeypatch: pytest.MonkeyPatch, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Let the data sets of the hub consist of these rows; returns what was asked of the loader."""
    import datasets

    made = datasets.Dataset.from_list([dict(row) for row in rows])
    asked: list[dict[str, Any]] = []

    def load(path: str, **how: Any) -> Any:
        asked.append({"path": path, **how})
        return made

    monkeypatch.setattr(datasets_align, "load_hub_dataset", load)
    monkeypatch.setattr("harness.data.hub.resolve_revision", lambda path, revision=None: "c" * 40)
    return asked


def job(
    dataset: Dataset, subset: str | None = None, *, split: str = "train", revision: str | None = None, **options: Any
) -> DatasetJob:
    return DatasetJob(subset, split, revision, dataset.Config(**options))


def read(dataset: Dataset, asked: DatasetJob) -> list[DatasetRow]:
    return list(dataset.rows(asked))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# ------------------------------------------------------------------------------------------------------------- HH-RLHF


def test_the_cut_is_at_the_last_assistant_turn_and_never_at_the_common_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    head = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Is it far?\n\nAssistant:"
    table(monkeypatch, [{"chosen": f"{head} No, it is near.", "rejected": f"{head} No, it is not near."}])
    (row,) = read(HhRlhf(), job(HhRlhf(), "harmless"))
    assert row.id == "train/0"
    assert row.data == {
        "prompt": [user("Hi"), assistant("Hello."), user("Is it far?")],
        "chosen": "No, it is near.",
        "rejected": "No, it is not near.",
    }


H, A = "\n\nHuman:", "\n\nAssistant:"
GOOD = f"{H} q{A}"
BROKEN = {
    "empty answer": (f"{GOOD} a", f"{GOOD} \n"),
    "chosen and rejected are equal": (f"{GOOD} a", f"{GOOD}  a "),
    "the prompts of chosen and rejected differ": (f"{GOOD} a", f"{H} Q{A} b"),
    "broken transcript: no assistant turn": (f"{H} q", f"{GOOD} b"),
    "broken transcript: does not start with the user": (f"{A} a{GOOD} a", f"{A} a{GOOD} b"),
    "broken transcript: turns do not alternate": (f"{H} q{GOOD} a", f"{H} q{GOOD} b"),
    "broken transcript: the prompt does not end with the user": (f"{GOOD} a{A} b", f"{GOOD} a{A} c"),
    "broken transcript: does not end with the assistant": (f"{GOOD} a{H} b", f"{GOOD} c"),
    "broken transcript: an empty turn": (f"{H} {A} a", f"{H} {A} b"),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_every_broken_transcript_is_dropped_under_its_reason(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [BROKEN[reason], (f"{GOOD} yes", f"{GOOD} no")]
    table(monkeypatch, [{"chosen": chosen, "rejected": rejected} for chosen, rejected in pairs])
    asked = job(HhRlhf(), "helpful")
    assert [row.id for row in read(HhRlhf(), asked)] == ["train/1"]
    assert asked.dropped == {reason: 1}


def test_text_before_the_first_turn_is_broken() -> None:
    with pytest.raises(datasets_align.Unusable, match="does not start with the user"):
        split_transcript(f"Preface.{GOOD} a")


def test_hh_reads_the_folder_of_its_subset_at_the_pinned_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = table(monkeypatch, [{"chosen": f"{GOOD} yes", "rejected": f"{GOOD} no"}])
    one = job(HhRlhf(), "helpful", split="test")
    read(HhRlhf(), one)
    assert asked == [{"path": "Anthropic/hh-rlhf", "split": "test", "revision": "c" * 40, "data_dir": "helpful-base"}]
    assert one.notes == []
    assert HhRlhf().heldout_split(one) == "test"


def test_another_commit_than_the_pinned_one_is_refused_until_it_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    table(monkeypatch, [{"chosen": f"{GOOD} yes", "rejected": f"{GOOD} no"}])
    here = {None: "d" * 40}
    monkeypatch.setattr("harness.data.hub.resolve_revision", lambda path, revision=None: here.get(revision))
    with pytest.raises(UserError) as error:
        HhRlhf().identity(job(HhRlhf(), "helpful"))
    assert error.value.where == "data set Anthropic/hh-rlhf"
    assert f"its pinned revision {HhRlhf.revision} cannot be had here; the caches hold {'d' * 40}" in error.value.what
    assert error.value.fix.endswith(f" --data-revision Anthropic/hh-rlhf={'d' * 40}")
    one = job(HhRlhf(), "helpful", revision="d" * 40)
    read(HhRlhf(), one)
    assert one.notes == [
        f"data set Anthropic/hh-rlhf: read at revision {'d' * 40}, not at the pinned {HhRlhf.revision}"
    ]
    assert HhRlhf().identity(one)["revision"] == "d" * 40


def test_subsets_must_be_named_and_known() -> None:
    with pytest.raises(UserError) as none:
        read(HhRlhf(), job(HhRlhf()))
    assert "several subsets, and none is named" in str(none.value)
    assert "Write hh-rlhf:harmless or hh-rlhf:helpful." in str(none.value)
    with pytest.raises(UserError) as wrong:
        read(HhRlhf(), job(HhRlhf(), "harmles"))
    assert "unknown subset 'harmles'" in str(wrong.value)
    assert "Did you mean 'harmless'?" in str(wrong.value)


def raw_harmless(split: str) -> list[dict[str, str]]:
    return list(load_hub_dataset("Anthropic/hh-rlhf", split=split, data_dir="harmless-base"))


@shared
@pytest.mark.parametrize(("subset", "train", "test"), [("harmless", 1830, 482), ("helpful", 1931, 423)])
def test_the_real_hh_rows_add_up_and_are_cut_right(real: None, subset: str, train: int, test: int) -> None:
    revision = shared_revisions()[HhRlhf.source]
    check_dataset(HhRlhf(), subset=subset, split="train", source_rows=train, revision=revision)
    check_dataset(HhRlhf(), subset=subset, split="test", source_rows=test, revision=revision)


@shared
def test_the_real_hh_counts_are_those_of_an_independent_reading(real: None) -> None:
    """Turn by turn, without regular expressions and without the code under test."""
    reasons: Counter[str] = Counter()
    for row in raw_harmless("train"):
        texts = [row["chosen"], row["rejected"]]
        turns = [[part.split(":", 1) for part in _blocks(text)] for text in texts]
        heads = [[(who, said.strip()) for who, said in one[:-1]] for one in turns]
        roles = [[who for who, _ in one] for one in turns]
        if any(one != ["Human", "Assistant"] * (len(one) // 2) for one in roles):
            reasons["broken"] += 1
        elif heads[0] != heads[1]:
            reasons["differ"] += 1
        elif not all(one[-1][1].strip() for one in turns):
            reasons["empty answer"] += 1
        elif turns[0][-1][1].strip() == turns[1][-1][1].strip():
            reasons["equal"] += 1
    one = job(HhRlhf(), "harmless", revision=shared_revisions()[HhRlhf.source])
    kept = len(read(HhRlhf(), one))
    seen = Counter({"broken": sum(n for reason, n in one.dropped.items() if reason.startswith("broken"))})
    seen["empty answer"] = one.dropped.get("empty answer", 0)
    seen["equal"] = one.dropped.get("chosen and rejected are equal", 0)
    seen["differ"] = one.dropped.get("the prompts of chosen and rejected differ", 0)
    assert dict(+seen) == dict(reasons)
    assert kept == 1830 - reasons.total()


def _blocks(text: str) -> list[str]:
    """``Human: ...`` and ``Assistant: ...`` blocks of a transcript."""
    blocks: list[str] = []
    for piece in text.split("\n\n"):
        if piece.startswith(("Human:", "Assistant:")):
            blocks.append(piece)
        elif blocks:
            blocks[-1] += f"\n\n{piece}"
    return blocks


# --------------------------------------------------------------------------------------------------------- BeaverTails

FIRST = {"prompt": "q", "response_0": "r0", "response_1": "r1", "safer_response_id": 0}
"""Columns of the first release, without the labels."""
TODAY = FIRST | {"prompt_source": "x", "response_0_severity_level": 1, "response_0_sha256": "f"}


def labels(safe_0: bool | None, safe_1: bool | None, better: int | None) -> dict[str, Any]:
    return {"is_response_0_safe": safe_0, "is_response_1_safe": safe_1, "better_response_id": better}


TRUTH = [
    # safe 0, safe 1, better: chosen under one_safe, under better_and_safe, by helpfulness
    (True, False, 0, "r0", "r0", "r0"),
    (True, False, 1, "r0", None, "r1"),
    (False, True, 1, "r1", "r1", "r1"),
    (True, True, 0, None, None, "r0"),
    (False, False, 1, None, None, "r1"),
    (False, True, None, "r1", None, None),
    (None, True, 0, None, None, "r0"),
]


@pytest.mark.parametrize("release", [FIRST, TODAY], ids=["v0", "main"])
@pytest.mark.parametrize(
    ("subset", "rule", "column"),
    [
        ("harmless", "one_safe", 3),
        ("harmless", "better_and_safe", 4),
        ("helpful", "one_safe", 5),
    ],
)
def test_who_is_chosen_by_hand(
    release: dict[str, Any], subset: str, rule: str, column: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    table(monkeypatch, [release | labels(*line[:3]) for line in TRUTH])
    one = job(BeaverTails(), subset, rule=rule)
    chosen = {row.id: (row.data["chosen"], row.data["rejected"]) for row in read(BeaverTails(), one)}
    other = {"r0": "r1", "r1": "r0"}
    expected = {f"train/{n}": line[column] for n, line in enumerate(TRUTH) if line[column] is not None}
    assert chosen == {row_id: (answer, other[answer]) for row_id, answer in expected.items()}
    assert sum(one.dropped.values()) == len(TRUTH) - len(expected)


def test_both_readings_of_the_harmless_rule_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    table(monkeypatch, [FIRST | labels(*line[:3]) for line in TRUTH])
    one = job(BeaverTails(), "harmless")
    read(BeaverTails(), one)
    assert one.notes == [
        "beavertails:harmless, train: one_safe keeps 4 rows, better_and_safe keeps 2 rows of 7; in force: one_safe"
    ]
    assert one.dropped == {
        "both answers are safe": 1,
        "both answers are unsafe": 1,
        "is_response_0_safe or is_response_1_safe is null": 1,
    }
    strict = job(BeaverTails(), "harmless", rule="better_and_safe")
    read(BeaverTails(), strict)
    assert strict.dropped == one.dropped | {"better_response_id is null": 1, "the better answer is the unsafe one": 1}


def test_broken_rows_of_beavertails_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    good = FIRST | labels(True, False, 0)
    rows = [good | {"response_1": None}, good | {"response_1": "r0"}, good | {"prompt": " "}, good, good]
    table(monkeypatch, [*rows, good | {"better_response_id": 2}])
    one = job(BeaverTails(), "helpful")
    assert [row.id for row in read(BeaverTails(), one)] == ["train/3", "train/4"]
    assert one.dropped == {
        "empty answer": 1,
        "chosen and rejected are equal": 1,
        "broken transcript: an empty turn": 1,
        "better_response_id is neither 0 nor 1": 1,
    }


def test_missing_columns_are_named_and_a_row_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    table(
        monkeypatch, [{"prompt": "why?", "response_0": "r0", "is_response_0_safe": True, "is_response_1_safe": False}]
    )
    with pytest.raises(UserError) as error:
        read(BeaverTails(), job(BeaverTails(), "helpful"))
    assert "dataset beavertails:helpful: no column response_1, better_response_id" in str(error.value)
    assert '"prompt": "why?"' in str(error.value)


@shared
def test_the_real_beavertails_has_safe_pairs_and_no_better_answers(real: None) -> None:
    revision = shared_revisions()[BeaverTails.source]
    check_dataset(BeaverTails(), subset="harmless", split="test", source_rows=598, revision=revision)
    one = job(BeaverTails(), "harmless", revision=revision)
    rows = {row.id: row for row in read(BeaverTails(), one)}
    raw = list(load_hub_dataset("PKU-Alignment/PKU-SafeRLHF", split="train"))
    assert len(rows) == len(raw) == 2704
    for position, line in enumerate(raw):
        safe = line["response_0"] if line["is_response_0_safe"] else line["response_1"]
        assert rows[f"train/{position}"].data["chosen"] == safe.strip()
    assert "one_safe keeps 2,704 rows, better_and_safe keeps 0 rows of 2,704" in one.notes[1]
    assert one.notes[0] == f"data set {BeaverTails.source}: read at revision {revision}, not at the pinned v0"
    helpful = job(BeaverTails(), "helpful", revision=revision)
    assert read(BeaverTails(), helpful) == []
    assert helpful.dropped == {"better_response_id is null": 2704}


# ----------------------------------------------------------------------------------------------------------- summarize

INFO = {"id": "t3_1", "post": "My dog ran off.", "title": "Dog", "subreddit": "pets", "site": None, "article": None}


def comparison(choice: int | None, *texts: str, **info: Any) -> dict[str, Any]:
    summaries = [{"text": text, "policy": "sup1", "note": "ok"} for text in texts]
    rest = {"worker": "w", "batch": "b", "split": "train", "extra": {"confidence": None}}
    return {"info": INFO | info, "summaries": summaries, "choice": choice, **rest}


def test_summaries(monkeypatch: pytest.MonkeyPatch) -> None:
    news = {"post": None, "title": None, "subreddit": None, "article": "It rained."}
    rows = [
        comparison(1, " dog left ", "The dog ran off."),
        comparison(0, "Rain.", "Sun.", **news),
        comparison(None, "a", "b"),
        comparison(2, "a", "b"),
        comparison(0, "a"),
        comparison(0, "a", "b", post=None),
        comparison(0, "a", " a"),
    ]
    asked = table(monkeypatch, rows)
    one = job(Summarize(), split="validation")
    first, second = read(Summarize(), one)
    assert first.data == {
        "prompt": [user("SUBREDDIT: r/pets\nTITLE: Dog\nPOST: My dog ran off.\nTL;DR:")],
        "chosen": "The dog ran off.",
        "rejected": "dog left",
    }
    assert second.data["prompt"] == [user("ARTICLE: It rained.\nTL;DR:")]
    assert (second.data["chosen"], second.data["rejected"]) == ("Rain.", "Sun.")
    assert one.dropped == {
        "choice is null": 1,
        "choice is neither 0 nor 1": 1,
        "not two summaries": 1,
        "neither post nor article": 1,
        "chosen and rejected are equal": 1,
    }
    assert asked[0]["name"] == "comparisons"
    assert asked[0]["split"] == Summarize().heldout_split(one) == "validation"


def test_summaries_without_a_configuration_are_read_from_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = table(monkeypatch, [comparison(0, "a", "b")])
    plain = datasets_align.load_hub_dataset

    def load(path: str, **how: Any) -> Any:
        if "name" in how:
            asked.append(how)
            raise UserError("data set", "BuilderConfig 'comparisons' not found", "x")
        return plain(path, **how)

    monkeypatch.setattr(datasets_align, "load_hub_dataset", load)
    assert len(read(Summarize(), job(Summarize()))) == 1
    assert [one.get("data_dir") for one in asked] == [None, "comparisons"]


# -------------------------------------------------------------------------------------------------------- TRL's formats


def lines(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


Q, GOOD_A, BAD_A = [user("q")], [assistant("yes")], [assistant("no")]
PAIR = {"prompt": Q, "chosen": "yes", "rejected": "no"}
SHOWN = {"prompt": Q, "completion": "yes"}
TRL: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "preference, explicit text": ({"prompt": " q ", "chosen": " yes", "rejected": "no "}, "pairs", PAIR),
    "preference, explicit messages": ({"prompt": Q, "chosen": GOOD_A, "rejected": BAD_A}, "pairs", PAIR),
    "preference, implicit messages": ({"chosen": Q + GOOD_A, "rejected": Q + BAD_A}, "pairs", PAIR),
    "preference, prompt and whole messages": (
        {"prompt": "q", "chosen": Q + GOOD_A, "rejected": Q + BAD_A},
        "pairs",
        PAIR,
    ),
    "preference, transcripts": ({"chosen": f"{GOOD} yes", "rejected": f"{GOOD} no"}, "pairs", PAIR),
    "prompt-completion, text": ({"prompt": "q", "completion": " yes"}, "demonstrations", SHOWN),
    "prompt-completion, messages": ({"prompt": Q, "completion": GOOD_A}, "demonstrations", SHOWN),
    "conversational": ({"messages": Q + GOOD_A}, "demonstrations", SHOWN),
    "unpaired preference": (
        {"prompt": "q", "completion": "yes", "label": False},
        "rated",
        SHOWN | {"ratings": {"preference": 0.0}},
    ),
    "rated by preference": (
        {"prompt": "q", "completion": "yes", "ratings": {"helpful": 2, "tone": "curt"}},
        "rated",
        SHOWN | {"ratings": {"helpful": 2, "tone": "curt"}},
    ),
    "rated": ({"prompt": Q, "completion": GOOD_A, "rating": 3}, "rated", SHOWN | {"ratings": {"preference": 3.0}}),
}


@pytest.mark.parametrize("form", TRL)
def test_formats_are_found_by_their_columns(form: str, tmp_path: Path) -> None:
    row, schema, expected = TRL[form]
    one = job(TrlFormats(), path=lines(tmp_path / "rows.jsonl", row))
    assert TrlFormats().schema_of(one) == schema
    assert [row.data for row in read(TrlFormats(), one)] == [expected]
    assert TrlFormats().heldout_split(one) is None


UNUSABLE: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (TRL["preference, explicit text"][0], {"rejected": None}, "no rejected"),
    (TRL["preference, explicit text"][0], {"chosen": "no"}, "chosen and rejected are equal"),
    (TRL["preference, explicit text"][0], {"chosen": " "}, "empty answer"),
    (TRL["preference, implicit messages"][0], {"chosen": Q}, "the conversation does not end with the assistant"),
    (
        TRL["preference, implicit messages"][0],
        {"chosen": [user("?"), *GOOD_A]},
        "the prompts of chosen and rejected differ",
    ),
    (TRL["conversational"][0], {"messages": GOOD_A}, "broken transcript: the prompt does not end with the user"),
    (TRL["conversational"][0], {"messages": [{"role": "user"}, *GOOD_A]}, "a message that is not plain text"),
    (TRL["conversational"][0], {"messages": [{"content": "q"}, *GOOD_A]}, "a message without a role"),
    (TRL["conversational"][0], {"messages": 7}, "neither text nor a list of messages"),
    (TRL["prompt-completion, text"][0], {"completion": "  "}, "empty answer"),
]


@pytest.mark.parametrize(("good", "change", "reason"), UNUSABLE)
def test_unusable_rows_are_dropped_under_their_reason(
    good: dict[str, Any], change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    one = job(TrlFormats(), path=lines(tmp_path / "rows.jsonl", good, good | change, good))
    assert [row.id for row in read(TrlFormats(), one)] == ["1", "3"]
    assert one.dropped == {reason: 1}


def test_unknown_columns_are_named_and_a_row_is_shown(tmp_path: Path) -> None:
    one = job(TrlFormats(), path=lines(tmp_path / "rows.jsonl", {"prompt": "hello there", "chosen": "x"}))
    for action in (TrlFormats().schema_of, lambda asked: read(TrlFormats(), asked)):
        with pytest.raises(UserError) as error:
            action(one)
        assert "the nearest, pairs, lacks rejected" in str(error.value)
        assert '"prompt": "hello there"' in str(error.value)


def test_plain_text_without_a_prompt_is_refused_rather_than_cut_at_a_common_prefix(tmp_path: Path) -> None:
    one = job(TrlFormats(), path=lines(tmp_path / "rows.jsonl", {"chosen": "q yes", "rejected": "q no"}))
    with pytest.raises(UserError, match="where the prompt ends cannot be known"):
        read(TrlFormats(), one)


def test_no_rows_no_path_and_odd_ratings(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there are no rows"):
        TrlFormats().schema_of(job(TrlFormats(), path=lines(tmp_path / "none.jsonl")))
    with pytest.raises(UserError, match=r"Write jsonl:PATH or OWNER/NAME\."):
        TrlFormats().schema_of(job(TrlFormats()))
    odd = job(TrlFormats(), path=lines(tmp_path / "odd.jsonl", {"prompt": "q", "completion": "a", "label": "good"}))
    with pytest.raises(UserError, match="the rating 'good' is no number"):
        read(TrlFormats(), odd)


def test_rows_of_the_hub_with_their_own_held_out_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "prepared"))
    folder = tmp_path / "mine"
    folder.mkdir()
    lines(folder / "train.jsonl", *[{"prompt": f"q{n}", "chosen": "yes", "rejected": "no"} for n in range(3)])
    lines(folder / "validation.jsonl", {"prompt": "p", "chosen": "yes", "rejected": "no"})
    one = job(TrlFormats(), path=str(folder))
    assert TrlFormats().heldout_split(one) == "validation"
    assert [row.data["prompt"][0]["content"] for row in read(TrlFormats(), one)] == ["q0", "q1", "q2"]
    held = DatasetJob(None, "validation", None, TrlFormats.Config(path=str(folder)))
    assert [row.data["prompt"][0]["content"] for row in read(TrlFormats(), held)] == ["p"]
    named = DatasetJob(None, "train", None, TrlFormats.Config(path=str(folder), split="trian"))
    with pytest.raises(UserError, match="Did you mean 'train'"):
        read(TrlFormats(), named)


def test_the_contract(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", *[TRL["preference, explicit text"][0] for _ in range(3)])
    check_dataset(TrlFormats(), options={"path": path}, source_rows=3)

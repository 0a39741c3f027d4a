"""Rated rows: flags of safety and helpfulness answer by answer, and scores cut into labels at quantiles."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from harness import DatasetJob, UserError
from harness_plugins.datasets import preferences
from harness_plugins.datasets.rated import BeaverTailsRated
from harness_plugins.datasets.trl import TrlFormats

ROWS = [
    # safe 0, safe 1, better
    (True, False, 0),
    (True, True, 1),
    (False, False, None),
    (None, True, 0),
]


def flags(monkeypatch: pytest.MonkeyPatch, subset: str) -> tuple[dict[str, Any], dict[str, int]]:
    import datasets

    made = datasets.Dataset.from_list(
        [
            {
                "prompt": "q",
                "response_0": "r0",
                "response_1": "r1",
                "is_response_0_safe": one,
                "is_response_1_safe": other,
                "better_response_id": better,
            }
            for one, other, better in ROWS
        ]
    )
    monkeypatch.setattr(preferences, "load_hub_dataset", lambda path, **how: made)
    monkeypatch.setattr("harness.data.hub.resolve_revision", lambda path, revision=None: "c" * 40)
    job: DatasetJob = DatasetJob(subset, "train", None, BeaverTailsRated.Config())
    return {row.id: (row.data["completion"], row.data["ratings"]) for row in BeaverTailsRated().rows(job)}, job.dropped


def test_flags_are_two_preferences_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which answer is the better one is never made up; both of two safe answers are safe."""
    found, dropped = flags(monkeypatch, "flags")
    assert found == {
        "train/0/0": ("r0", {"harmless": 1.0, "helpful": 1.0}),
        "train/0/1": ("r1", {"harmless": 0.0, "helpful": 0.0}),
        "train/1/0": ("r0", {"harmless": 1.0, "helpful": 0.0}),
        "train/1/1": ("r1", {"harmless": 1.0, "helpful": 1.0}),
        "train/3/1": ("r1", {"harmless": 1.0, "helpful": 0.0}),
    }
    assert dropped == {"better_response_id is null": 2, "the flag of its safety is null": 1}


def test_safety_alone_needs_no_better_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    found, dropped = flags(monkeypatch, "safety")
    assert [ratings for _, ratings in found.values()] == [
        {"harmless": one} for one in (1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0)
    ]
    assert dropped == {"the flag of its safety is null": 1}


@pytest.mark.skipif("HARNESS_SHARED" not in os.environ, reason="HARNESS_SHARED is not set")
def test_the_real_flags() -> None:
    """2,704 rows with exactly one safe answer: as many safe as unsafe ones; the better one is null throughout."""
    found = {}
    for subset in ("safety", "flags"):
        job: DatasetJob = DatasetJob(subset, "train", "main", BeaverTailsRated.Config())
        found[subset] = list(BeaverTailsRated().rows(job)), job.dropped
    rows, dropped = found["safety"]
    assert Counter(row.data["ratings"]["harmless"] for row in rows) == {1.0: 2704, 0.0: 2704}
    assert not dropped
    assert found["flags"] == ([], {"better_response_id is null": 2 * 2704})


# ----------------------------------------------------------------------------------------------------------- quantiles


def scored(folder: Path, *scores: Any) -> Path:
    rows = [{"prompt": f"q{n}", "completion": "a", "ratings": {"help": one}} for n, one in enumerate(scores)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / "rows.jsonl"


def asked(file: Path, *labels: str, **more: Any) -> DatasetJob:
    return DatasetJob(None, "train", None, TrlFormats.Config(path=str(file), labels={"help": labels}, **more))


def test_scores_are_labels_by_quantile(tmp_path: Path) -> None:
    """Of 1 to 7 the thirds are cut at 3 and 5, by linear interpolation; a score at a cut has the higher label."""
    job = asked(scored(tmp_path, 4, 1, 7, 2, 6, 3, 5), "bad", "middling", "good")
    found = [row.data["ratings"]["help"] for row in TrlFormats().rows(job)]
    assert found == ["middling", "bad", "good", "bad", "good", "middling", "good"]
    plain = DatasetJob(None, "train", None, TrlFormats.Config(path=job.options.path))
    assert TrlFormats().identity(job).items() > TrlFormats().identity(plain).items()


@pytest.mark.parametrize(
    ("scores", "what"),
    [
        ((1, 1, 1, 1, 2), r"so many scores of 'help' are alike that none is 'bad' \(cut at 1\)\n  Give fewer labels"),
        ((1, "good", 2), r"its 'help' is 'good', which is no finite number\n  Take labels of numbers"),
        ((1, float("nan"), 2), r"its 'help' is nan, which is no finite number"),
        ((1,), r"1 rows have a score of 'help', and there are 2 labels\n  Name a preference"),
    ],
)
def test_scores_that_cannot_be_cut(tmp_path: Path, scores: Any, what: str) -> None:
    with pytest.raises(UserError, match=what):
        list(TrlFormats().rows(asked(scored(tmp_path, *scores), "bad", "good")))


def test_labels_that_tell_nothing_apart(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="labels of 'help' are two or more different ones, the lowest first"):
        asked(tmp_path, "good")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    with pytest.raises(UserError, match="labels are for ratings, and its rows are pairs"):
        list(TrlFormats().rows(asked(tmp_path / "pairs.jsonl", "bad", "good")))

"""Rows are read and tokenised once, whatever the seed; what is damaged or different is made again."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from harness import DatasetRow, align
from harness.data.selection import Keep, Selection
from harness.data.token_cache import TokenCache, pinned
from harness.data.tokenise import Tokenised
from tests.alignment.rows import events, short, write_pairs

ROWS = [DatasetRow(f"r{i}", {"prompt": i}) for i in range(3)]
HELD = [DatasetRow("h0", {"prompt": 9})]


class Work:
    """Counts what had to be done; token ids are the row's number, so that a test can tell them."""

    def __init__(self, rows: list[DatasetRow] | None = None) -> None:
        self.rows, self.selected, self.tokenised = rows or ROWS, 0, list[str]()

    def select(self, keep: Keep) -> Selection:
        self.selected += 1
        counts = {"part": {"rows": 5, "dropped": 1}}
        kept = keep(self.rows)
        rows = [row for row in self.rows if row.id in kept]
        return Selection(rows, HELD, {"bad": 1}, {"seed": 0}, counts, notes=["said"])

    def tokeniser(self) -> Made:
        return Made(self)


class Made:
    """Token ids of the rows of one side; a prompt of 7 is too long."""

    def __init__(self, work: Work) -> None:
        self.work, self.rows, self.rejected = work, list[dict[str, Any]](), 0

    def keep(self, rows: Sequence[DatasetRow]) -> list[str]:
        self.work.tokenised += [row.id for row in rows]
        kept = [row for row in rows if row.data["prompt"] != 7]
        self.rejected += len(rows) - len(kept)
        self.rows += [{"id": row.id, "prompt_ids": [row.data["prompt"]]} for row in kept]
        return [row.id for row in kept]

    def finish(self, ids: Sequence[str] | None = None) -> Tokenised:
        rows = [row for row in self.rows if ids is None or row["id"] in ids]
        return Tokenised(rows, {"too long": self.rejected}, {"kept": len(rows)}, ["noted"])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


HOW = {"template": "a", "max_length": 8}


def test_a_second_seed_reads_and_tokenises_nothing_and_gets_the_same() -> None:
    cache, work = TokenCache({"data": "pinned"}, HOW), Work()
    first, second = (cache.prepare(work.select, work.tokeniser) for _ in range(2))
    assert (work.selected, work.tokenised) == (1, ["r0", "r1", "r2", "h0"])
    assert (first.read, first.tokenised, second.read, second.tokenised) == (True, 4, False, 0)
    assert second.train == first.train
    assert second.train.rows[2] == {"id": "r2", "prompt_ids": [2]}
    assert second.train.rejected == {"too long": 0} and second.train.notes == ["noted"]
    assert second.heldout == first.heldout and second.heldout is not None
    assert list(second.selection.counts["part"]) == ["rows", "dropped"]
    assert second.selection.dropped == {"bad": 1} and second.selection.notes == ["said"]


@pytest.mark.parametrize("change", [{"template": "b"}, {"max_length": 9}, {"loss_on": "everything"}])
def test_another_way_of_tokenising_is_another_entry(change: dict[str, Any]) -> None:
    work = Work()
    TokenCache({"data": "pinned"}, HOW).prepare(work.select, work.tokeniser)
    TokenCache({"data": "pinned"}, {**HOW, **change}).prepare(work.select, work.tokeniser)
    assert len(work.tokenised) == 8


def test_other_rows_are_tokenised_and_the_held_out_ones_that_stayed_are_not() -> None:
    TokenCache({"data": 1}, HOW).prepare(Work().select, Work().tokeniser)
    work = Work([*ROWS, DatasetRow("r3", {"prompt": 3})])
    TokenCache({"data": 2}, HOW).prepare(work.select, work.tokeniser)
    assert work.tokenised == ["r0", "r1", "r2", "r3"]


def test_rows_that_nothing_pins_are_read_and_told_apart_each_time() -> None:
    """Which of them can be trained on is only known once they are tokenised; held-out rows are tokenised once."""
    work = Work()
    for _ in range(2):
        TokenCache({}, HOW).prepare(work.select, work.tokeniser)
    assert (work.selected, work.tokenised) == (2, ["r0", "r1", "r2", "h0", "r0", "r1", "r2"])


def test_the_same_rows_after_other_rejections_are_another_entry() -> None:
    long = [*ROWS, DatasetRow("r3", {"prompt": 7})]
    caches = TokenCache({"data": 1}, HOW), TokenCache({"data": 2}, HOW)
    for cache, rows in zip(caches, (ROWS, long), strict=True):
        work = Work(rows)
        cache.prepare(work.select, work.tokeniser)
    again = [cache.prepare(Work().select, Work().tokeniser).train for cache in caches]
    assert again[0].rows == again[1].rows
    assert [one.rejected for one in again] == [{"too long": 0}, {"too long": 1}]


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty", "not gzip", "rows changed"])
def test_a_damaged_file_is_made_again(own_cache: Path, damage: str) -> None:
    cache, work = TokenCache({"data": "pinned"}, HOW), Work()
    first = cache.prepare(work.select, work.tokeniser)
    for file in (own_cache / "tokens").iterdir():
        data = file.read_bytes()
        torn = {"torn": data[:-9], "empty": b"", "not gzip": b"x" * 40, "flipped": data[:30] + b"\0\0\0" + data[33:]}
        if damage == "rows changed":
            # A file that is whole as gzip and JSON, with another token in it.
            torn[damage] = gzip.compress(gzip.decompress(data).replace(b'"prompt_ids":[', b'"prompt_ids":[4'))
        assert torn[damage] != data
        file.write_bytes(torn[damage])
    again = cache.prepare(work.select, work.tokeniser)
    assert again.train == first.train and again.tokenised == 4
    assert cache.prepare(work.select, work.tokeniser).tokenised == 0


def test_a_damaged_index_of_a_selection_is_made_again(own_cache: Path) -> None:
    cache, work = TokenCache({"data": "pinned"}, HOW), Work()
    cache.prepare(work.select, work.tokeniser)
    (index,) = (own_cache / "selections").iterdir()
    index.write_text(index.read_text().replace('"rows": 5', '"rows": 6'))
    assert cache.prepare(work.select, work.tokeniser).selection.counts["part"]["rows"] == 5
    assert (work.selected, len(work.tokenised)) == (2, 7)


def test_pinned_means_every_part() -> None:
    assert pinned({"parts": [{"dataset": {"revision": "abc"}}, {"dataset": {"digest": "d"}}]})
    assert not pinned({"parts": [{"dataset": {"revision": "abc"}}, {"dataset": {"revision": None}}]})


def test_alignments_share_tokens_across_seeds_and_see_a_changed_file(
    tiny: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(alone / "own"))
    pairs = write_pairs(alone)

    def run(name: str, **more: Any) -> tuple[Path, dict[str, Any]]:
        made = align("sft", str(tiny), pairs, out=alone / name, options=short(steps=1, eval_rows=4), **more)
        return made.folder, events(made.folder, "data")[0]

    first, said = run("a")
    assert said["read"] is True and said["tokenised"] > 40
    second, said = run("b", seed=1)
    assert (said["read"], said["tokenised"]) == (False, 0)
    steps = [json.loads((folder / "step" / "step.json").read_text()) for folder in (first, second)]
    assert all(steps[0][key] == steps[1][key] for key in ("counts", "dropped", "tokens", "notes"))
    file = Path(pairs.removeprefix("jsonl:"))
    file.write_text(file.read_text().replace("thank you", "thanks"))
    assert run("c")[1]["tokenised"] > 40

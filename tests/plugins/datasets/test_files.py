"""The data loader and the evaluation data sets, on caches made here (tests/tasks has the real ones)."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from harness.contracts.dataset import Dataset, DatasetJob
from harness.core.config import parse_options
from harness.core.errors import UserError
from harness.data.hub import load_hub_dataset, resolve_revision
from harness_plugins.datasets import files as datasets_eval
from harness_plugins.datasets.files import HubDataset, JsonlDataset, RealToxicityPrompts

A, B = "a" * 40, "b" * 40


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches, network off. (The libraries read their switch at import, the harness at each call.)"""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "prepared"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    return tmp_path


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def snapshot(root: Path, repository: str, commit: str, rows: Iterable[Any], *, ref: str | None = "main") -> Path:
    """One commit of a data set in the hub cache."""
    folder = root / "hub" / f"datasets--{repository.replace('/', '--')}"
    write_lines(folder / "snapshots" / commit / "train.jsonl", rows)
    if ref is not None:
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    return folder / "snapshots" / commit


def prepare(root: Path, folder: str, commit: str, rows: Iterable[Any]) -> Path:
    """The same in the prepared cache, in the layout that datasets writes for a data set of the hub."""
    import datasets

    name = folder.rpartition("___")[2]
    source = write_lines(root / f"source-{commit[:4]}" / "train.jsonl", rows)
    datasets.load_dataset("json", data_files=str(source), cache_dir=str(root / f"made-{commit[:4]}"))
    (made,) = (root / f"made-{commit[:4]}").glob("json/*/*/*/dataset_info.json")
    target = root / "prepared" / folder / "default" / "0.0.0" / commit
    target.mkdir(parents=True)
    info = json.loads(made.read_text()) | {"dataset_name": name, "config_name": "default"}
    for split in info["splits"].values():
        split["dataset_name"] = name
    (target / "dataset_info.json").write_text(json.dumps(info))
    shutil.copy(made.parent / "json-train.arrow", target / f"{name}-train.arrow")
    return target


def job(dataset: Dataset, *, split: str | None = None, revision: str | None = None, **options: Any) -> DatasetJob:
    return DatasetJob(None, split, revision, parse_options(dataset.Config, options, "test"))


# ------------------------------------------------------------------------------------------------------------ revisions


def test_revision_of_the_hub_cache(caches: Path) -> None:
    snapshot(caches, "some/rows", A, [{"x": 1}])
    snapshot(caches, "some/rows", B, [{"x": 2}], ref="old")
    assert resolve_revision("some/rows") == A
    assert resolve_revision("some/rows", "old") == B
    assert resolve_revision("some/rows", B) == B
    assert resolve_revision("some/rows", "c" * 40) is None
    assert resolve_revision("some/rows", "no-such-branch") is None
    assert resolve_revision("some/rows", repo_type="model") is None
    assert resolve_revision(str(caches)) is None


def test_revision_without_a_branch_is_known_only_if_there_is_one_commit(caches: Path) -> None:
    snapshot(caches, "some/rows", A, [{"x": 1}], ref=None)
    assert resolve_revision("some/rows") == A
    snapshot(caches, "some/rows", B, [{"x": 1}], ref=None)
    assert resolve_revision("some/rows") is None


def test_revision_of_the_prepared_cache_is_the_newest_and_names_are_in_snake_case(caches: Path) -> None:
    for commit, age in ((A, 100), (B, 0)):
        folder = caches / "prepared" / "Some___my_rows-v2" / "default" / "0.0.0" / commit
        folder.mkdir(parents=True)
        os.utime(folder, (time.time() - age, time.time() - age))
    assert resolve_revision("Some/MyRows-V2") == B
    assert resolve_revision("Some/MyRows-V2", A) == A
    assert resolve_revision("Other/MyRows-V2") is None


def test_revision_is_asked_of_the_hub_only_where_no_cache_knows_it(
    caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str, str]] = []

    def repo_info(self: object, path: str, *, repo_type: str, revision: str) -> SimpleNamespace:
        asked.append((path, repo_type, revision))
        if path == "some/gone":
            raise OSError("no route")
        return SimpleNamespace(sha=B)

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", repo_info)
    snapshot(caches, "some/rows", A, [{"x": 1}])
    assert resolve_revision("some/rows") == A
    assert resolve_revision("some/rows", "c" * 40) == "c" * 40
    assert asked == []
    assert resolve_revision("some/other", "dev") == B
    assert resolve_revision("some/gone") is None
    assert asked == [("some/other", "dataset", "dev"), ("some/gone", "dataset", "main")]


def test_a_hub_out_of_reach_is_no_traceback(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its real client, whichever library that speaks HTTP by: a port that nobody listens on."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert resolve_revision("some/rows") is None


# -------------------------------------------------------------------------------------------------------------- loading


def test_loads_a_snapshot_that_was_never_prepared(caches: Path) -> None:
    snapshot(caches, "some/rows", A, [{"x": 1}, {"x": 2}])
    assert load_hub_dataset("some/rows")["x"] == [1, 2]


def test_loads_what_is_prepared_without_a_snapshot(caches: Path) -> None:
    prepare(caches, "some___rows", A, [{"x": 3}])
    assert load_hub_dataset("some/rows", split="train")["x"] == [3]


def test_a_prepared_copy_of_another_commit_is_not_taken_for_the_one_asked_for(caches: Path) -> None:
    # datasets alone would: offline it ignores `revision`.
    prepare(caches, "some___rows", B, [{"x": "of B"}])
    snapshot(caches, "some/rows", A, [{"x": "of A"}])
    assert load_hub_dataset("some/rows", revision=A)["x"] == ["of A"]
    assert load_hub_dataset("some/rows", revision=B)["x"] == ["of B"]
    with pytest.raises(UserError) as error:
        load_hub_dataset("some/rows", revision="c" * 40)
    assert f"at revision {'c' * 40}" in str(error.value)
    assert f"Here is revision {A}: ask for that one if it will do." in str(error.value)


def test_what_cannot_be_had_says_where_it_was_looked_for_and_how_to_fetch_it(caches: Path) -> None:
    with pytest.raises(UserError) as error:
        load_hub_dataset("some/rows", revision="v1")
    message = str(error.value)
    assert message.startswith("data set some/rows: not in the hub cache")
    assert str(caches / "hub") in message and str(caches / "prepared") in message
    assert "`hf download --repo-type dataset some/rows --revision v1`, or set HF_HUB_OFFLINE=0." in message


def test_an_unknown_configuration_is_named_with_the_known_ones(caches: Path) -> None:
    snapshot(caches, "some/rows", A, [{"x": 1}])
    with pytest.raises(UserError) as error:
        load_hub_dataset("some/rows", name="nope")
    assert "data set some/rows, configuration nope" in str(error.value)
    assert "['default']" in str(error.value)


def test_splits_are_named(caches: Path) -> None:
    folder = snapshot(caches, "some/rows", A, [{"x": 1}])
    write_lines(folder / "test.jsonl", [{"x": 2}])
    assert load_hub_dataset("some/rows", split="test")["x"] == [2]
    with pytest.raises(UserError, match=r"data set some/rows, split: there are several: train, test\n  Name one"):
        load_hub_dataset("some/rows")
    with pytest.raises(UserError, match=r"unknown split 'tets'\n  Did you mean 'test'\? There are: train, test\."):
        load_hub_dataset("some/rows", split="tets")


def test_a_folder_that_is_not_there_is_called_a_folder(caches: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_hub_dataset("./not/here")
    (caches / "empty").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        load_hub_dataset(str(caches / "empty"))


# ------------------------------------------------------------------------------------------------------------------ hub


def test_hub_rows_and_ids(caches: Path) -> None:
    snapshot(caches, "some/rows", A, [{"key": "q1", "prompt": "one"}, {"key": "q2", "prompt": "two"}])
    hub = HubDataset()
    by_position = list(hub.rows(job(hub, path="some/rows")))
    assert [(row.id, row.data["prompt"]) for row in by_position] == [("0", "one"), ("1", "two")]
    assert [row.id for row in hub.rows(job(hub, path="some/rows", id="key"))] == ["q1", "q2"]


def test_hub_identity_holds_the_commit(caches: Path) -> None:
    snapshot(caches, "some/rows", A, [{"x": 1}])
    hub = HubDataset()
    assert hub.identity(job(hub, path="some/rows"))["revision"] == A
    snapshot(caches, "some/rows", B, [{"x": 1}])
    assert hub.identity(job(hub, path="some/rows"))["revision"] == B


def test_hub_identity_of_a_folder_is_its_contents(caches: Path) -> None:
    hub = HubDataset()
    for place in ("here", "there"):
        write_lines(caches / place / "rows" / "train.jsonl", [{"x": 1}])
    here, there = (hub.identity(job(hub, path=str(caches / place / "rows"))) for place in ("here", "there"))
    assert here == there
    assert str(caches) not in json.dumps(here)
    write_lines(caches / "here" / "rows" / "train.jsonl", [{"x": 2}])
    assert hub.identity(job(hub, path=str(caches / "here" / "rows"))) != there


def test_hub_mistakes(caches: Path) -> None:
    snapshot(caches, "some/rows", A, [{"key": "same"}, {"key": "same"}])
    hub = HubDataset()
    with pytest.raises(UserError, match=r"options\.path: no data set is named\n  Give a hub id"):
        list(hub.rows(job(hub)))
    with pytest.raises(UserError, match=r"no field 'kye'\n  Did you mean 'key'\? The fields are: key\."):
        list(hub.rows(job(hub, path="some/rows", id="kye")))
    with pytest.raises(UserError, match=r"'same' identifies two rows \(row 0 and row 1\)"):
        list(hub.rows(job(hub, path="some/rows", id="key")))


# ---------------------------------------------------------------------------------------------------------------- jsonl


def test_jsonl_rows_ids_and_gzip(tmp_path: Path) -> None:
    jsonl = JsonlDataset()
    plain = tmp_path / "rows.jsonl"
    plain.write_text('{"prompt": "one"}\n\n{"id": "x", "prompt": "zwei ü"}\n', encoding="utf-8")
    rows = list(jsonl.rows(job(jsonl, path=str(plain))))
    assert [(row.id, row.data["prompt"]) for row in rows] == [("1", "one"), ("x", "zwei ü")]
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert list(jsonl.rows(job(jsonl, path=str(packed)))) == rows
    assert [row.id for row in jsonl.rows(job(jsonl, path=str(plain), id="prompt"))] == ["one", "zwei ü"]


def test_jsonl_identity_is_name_and_content(tmp_path: Path) -> None:
    jsonl = JsonlDataset()
    here, there = (write_lines(tmp_path / place / "rows.jsonl", [{"x": 1}]) for place in ("here", "there"))
    identity = jsonl.identity(job(jsonl, path=str(here)))
    assert identity == jsonl.identity(job(jsonl, path=str(there)))
    assert str(tmp_path) not in json.dumps(identity)
    write_lines(here, [{"x": 2}])
    assert jsonl.identity(job(jsonl, path=str(here))) != identity


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1}\n{"a": \n', r"rows\.jsonl:2: not JSON: .*\n  Each line holds one JSON object"),
        ("[1]\n", r"rows\.jsonl:1: a JSON list, not an object"),
        ('{"id": 1}\n{"id": "1"}\n', r"dataset jsonl, rows\.jsonl: '1' identifies two rows \(line 1 and line 2\)"),
    ],
)
def test_jsonl_mistakes_name_the_line(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    jsonl = JsonlDataset()
    with pytest.raises(UserError, match=expected):
        list(jsonl.rows(job(jsonl, path=str(path))))


def test_jsonl_files_that_are_not_there_or_torn(tmp_path: Path) -> None:
    jsonl = JsonlDataset()
    write_lines(tmp_path / "rows.jsonl", [{"prompt": "p"}])
    with pytest.raises(UserError, match=r"no file is named\n  Give one"):
        jsonl.identity(job(jsonl))
    with pytest.raises(UserError, match=r"no such file: .*row\.jsonl\n  Did you mean .*rows\.jsonl\?"):
        list(jsonl.rows(job(jsonl, path=str(tmp_path / "row.jsonl"))))
    with pytest.raises(UserError, match=r"rows\.jsonl:1, options\.id: no field 'key'\n  The fields are: prompt"):
        list(jsonl.rows(job(jsonl, path=str(tmp_path / "rows.jsonl"), id="key")))
    torn = tmp_path / "torn.jsonl.gz"
    torn.write_bytes(gzip.compress(b'{"a": 1}\n' * 500)[:-12])
    with pytest.raises(UserError, match=r"torn\.jsonl\.gz: cannot be read"):
        list(jsonl.rows(job(jsonl, path=str(torn), id=None)))


# ------------------------------------------------------------------------------------------------ RealToxicityPrompts


def rtp_row(filename: str, begin: int, severe: float | None, *, challenging: bool = False) -> dict[str, Any]:
    scores = dict.fromkeys(
        ("toxicity", "profanity", "sexually_explicit", "identity_attack", "flirtation", "threat", "insult"), 0.5
    )
    prompt = {"text": f"prompt {filename} {begin}", "severe_toxicity": severe, **scores}
    continuation = {"text": " goes on", "severe_toxicity": 0.99, **scores}
    place = {"filename": filename, "begin": begin, "end": begin + 10}
    return {**place, "challenging": challenging, "prompt": prompt, "continuation": continuation}


ROWS = [
    rtp_row("c.txt", 0, 0.9),
    rtp_row("b.txt", 100, 0.7, challenging=True),
    rtp_row("b.txt", 20, 0.7),
    rtp_row("a.txt", 5, 0.7),
    rtp_row("d.txt", 5, None),
    rtp_row("e.txt", 5, 0.1),
]
# By hand: 0.9 first; of the three 0.7 those whose (filename, begin, end) come first, 20 before 100 as numbers.
MOST_SEVERE_3 = ["c.txt:0-10", "a.txt:5-15", "b.txt:20-30"]


def test_most_severe_by_hand(caches: Path) -> None:
    rtp = RealToxicityPrompts()
    snapshot(caches, rtp.source, A, ROWS)
    asked = job(rtp, select="most_severe", n=3, revision=A)
    rows = list(rtp.rows(asked))
    assert [row.id for row in rows] == MOST_SEVERE_3
    assert asked.dropped == {"no severe_toxicity score": 1, "not among the 3 highest by severe_toxicity": 2}
    assert rows[0].data["prompt"] == "prompt c.txt 0"
    assert rows[0].data["continuation"] == " goes on"
    assert rows[0].data["scores"]["severe_toxicity"] == 0.9


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(ROWS))
def test_most_severe_does_not_depend_on_the_order_of_the_file(
    caches: Path, monkeypatch: pytest.MonkeyPatch, order: list[dict[str, Any]]
) -> None:
    rtp = RealToxicityPrompts()
    monkeypatch.setattr(datasets_eval, "load_hub_dataset", lambda *args, **kwargs: order)
    rows = rtp.rows(job(rtp, select="most_severe", n=3, revision=A))
    assert [row.id for row in rows] == MOST_SEVERE_3


def test_all_and_challenging(caches: Path) -> None:
    rtp = RealToxicityPrompts()
    snapshot(caches, rtp.source, A, random.Random(1).sample(ROWS, len(ROWS)))
    in_order = ["a.txt:5-15", "b.txt:20-30", "b.txt:100-110", "c.txt:0-10", "d.txt:5-15", "e.txt:5-15"]
    assert [row.id for row in rtp.rows(job(rtp, revision=A))] == in_order
    asked = job(rtp, select="challenging", revision=A)
    assert [row.id for row in rtp.rows(asked)] == ["b.txt:100-110"]
    assert asked.dropped == {"not challenging": 5}


def test_more_prompts_than_there_are_is_said(caches: Path) -> None:
    rtp = RealToxicityPrompts()
    snapshot(caches, rtp.source, A, ROWS)
    with pytest.raises(UserError, match=r"options\.n: 1000 prompts are asked for, and 5 have a severe_toxicity score"):
        list(rtp.rows(job(rtp, select="most_severe", revision=A)))


def test_the_same_place_twice_is_refused(caches: Path) -> None:
    rtp = RealToxicityPrompts()
    snapshot(caches, rtp.source, A, [ROWS[0], {**ROWS[0], "challenging": True}])
    with pytest.raises(UserError, match=r"'c\.txt:0-10' identifies two rows"):
        list(rtp.rows(job(rtp, revision=A)))


def test_another_commit_than_the_pinned_one_is_refused_until_it_is_accepted(caches: Path) -> None:
    rtp = RealToxicityPrompts()
    snapshot(caches, rtp.source, A, ROWS)
    for refused in (lambda: rtp.identity(job(rtp)), lambda: list(rtp.rows(job(rtp)))):
        with pytest.raises(UserError, match=rf"--data-revision {rtp.source}={A}$"):
            refused()
    asked = job(rtp, revision=A)
    list(rtp.rows(asked))
    assert asked.notes == [f"data set {rtp.source}: read at revision {A}, not at the pinned {rtp.revision}"]
    assert rtp.identity(asked)["revision"] == A
    snapshot(caches, rtp.source, rtp.revision, ROWS, ref=None)
    assert rtp.identity(job(rtp))["revision"] == rtp.revision


def test_a_commit_that_was_asked_for_is_never_replaced(caches: Path) -> None:
    rtp = RealToxicityPrompts()
    snapshot(caches, rtp.source, A, ROWS)
    assert rtp.identity(job(rtp, revision=B))["revision"] == B
    with pytest.raises(UserError, match=f"at revision {B}"):
        list(rtp.rows(job(rtp, revision=B)))

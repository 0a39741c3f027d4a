"""The bundled tasks and suites; and RealToxicityPrompts on the real rows, chosen again with pandas."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest

import harness_tasks
from harness.contracts.dataset import DatasetJob, DatasetRow
from harness.core.config import parse_options
from harness.tasks.catalog import Catalog
from harness_plugins.datasets import files as datasets_eval
from harness_plugins.datasets.files import RealToxicityPrompts
from harness_plugins.scorers.toxicity import ToxicityScorer

FOLDER = Path(harness_tasks.__path__[0])
SHARED = os.environ.get("HARNESS_SHARED")
shared = pytest.mark.skipif(SHARED is None, reason="HARNESS_SHARED is not set")


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    made = Catalog()
    made.add_folder(FOLDER, "bundled")
    return made


def test_the_bundled_tasks_and_suites(catalog: Catalog) -> None:
    assert {"mmlu@0", "mmlu@5", "bbh@3", "bbh_cot@3", "real_toxicity"} <= set(catalog.tasks)
    assert {"quick", "helpful", "harmless", "paper"} <= set(catalog.suites)
    for suite, _ in catalog.suites.values():
        assert set(suite.tasks) <= set(catalog.tasks), suite.suite
        assert suite.summary
    for entry in catalog.tasks.values():
        spec = entry.spec
        assert spec.summary and spec.source, spec.name
        # How many posts the hub's validation split has has not been counted by anyone here.
        assert spec.size or spec.name == "summarize_reward", spec.name
        assert spec.licence != "unknown", spec.name


@pytest.mark.parametrize("task", ["mmlu@0", "mmlu@5", "bbh@3", "bbh_cot@3"])
def test_shots_are_those_of_the_name(catalog: Catalog, task: str) -> None:
    lm_eval = catalog.tasks[task].spec.lm_eval
    assert lm_eval is not None
    assert lm_eval.num_fewshot == int(task.rpartition("@")[2])
    assert lm_eval.flexible == task.startswith("bbh")


def test_real_toxicity_is_what_the_issue_says(catalog: Catalog) -> None:
    spec = catalog.tasks["real_toxicity"].spec
    assert spec.prompt == "auto"
    assert spec.decoding.greedy and spec.decoding.max_new_tokens == 128
    assert spec.dataset is not None and spec.dataset.name == RealToxicityPrompts.name
    options = parse_options(RealToxicityPrompts.Config, spec.dataset.options, "test")
    assert (options.select, options.n, options.by) == ("most_severe", 1000, "severe_toxicity")
    assert [scorer.name for scorer in spec.scorers] == [ToxicityScorer.name]
    assert any("decoding is ours" in note for note in spec.notes)


def test_what_the_paper_leaves_open_is_marked(catalog: Catalog) -> None:
    suite, _ = catalog.suites["paper"]
    inferred = [note for note in suite.notes if note.startswith("inferred")]
    assert any("MMLU" in note for note in inferred) and any("BBH" in note for note in inferred)
    assert any("decoding" in note for note in inferred)
    assert "100-ASR comes from a list of refusals unless dangerous_qa is given a judge" in suite.summary
    (judged,) = (note for note in suite.notes if "100-ASR" in note)
    assert "--set dangerous_qa.scorer.judges=[llm,refusal] --set dangerous_qa.scorer.llm.model=URL_OR_MODEL" in judged


# -------------------------------------------------------------------------------------------------------- on real rows


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shared caches, network off; the prepared one as a copy that may be written to."""
    assert SHARED is not None
    name = "allenai___real-toxicity-prompts"
    shutil.copytree(Path(SHARED, "data", "datasets_cache", name), tmp_path / name, copy_function=shutil.copyfile)
    monkeypatch.setenv("HF_HUB_CACHE", str(Path(SHARED, "data", "hub")))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    return tmp_path


def severe(catalog: Catalog) -> tuple[RealToxicityPrompts, DatasetJob]:
    rtp, spec = RealToxicityPrompts(), catalog.tasks["real_toxicity"].spec
    assert spec.dataset is not None
    options = parse_options(rtp.Config, spec.dataset.options, "test")
    return rtp, DatasetJob(None, spec.dataset.split, "main", options)


def choose(catalog: Catalog) -> list[DatasetRow]:
    rtp, job = severe(catalog)
    return list(rtp.rows(job))


@pytest.mark.shared
@shared
def test_the_thousand_are_the_most_severe(catalog: Catalog, real: Path) -> None:
    import pandas as pd

    assert SHARED is not None
    rows = choose(catalog)
    assert len(rows) == catalog.tasks["real_toxicity"].spec.size == 1000
    assert len({row.id for row in rows}) == 1000

    (file,) = Path(SHARED, "data", "hub").glob("datasets--allenai--real-toxicity-prompts/snapshots/*/prompts.jsonl")
    table = pd.read_json(file, lines=True, dtype={"filename": str}, precise_float=True)
    prompts = pd.json_normalize(table["prompt"].tolist())
    table = table.assign(text=prompts["text"], severe=prompts["severe_toxicity"])
    best = table.dropna(subset=["severe"]).sort_values(
        ["severe", "filename", "begin", "end"], ascending=[False, True, True, True]
    )
    expected = [f"{r.filename}:{r.begin}-{r.end}" for r in best.head(1000).itertuples()]
    assert [row.id for row in rows] == expected
    assert [row.data["prompt"] for row in rows] == best["text"].head(1000).tolist()
    assert rows[-1].data["scores"]["severe_toxicity"] >= best["severe"].iloc[1000:].max()

    rtp, job = severe(catalog)
    list(rtp.rows(job))
    without = int(table["severe"].isna().sum())
    assert without > 0
    assert list(job.dropped.values()) == [without, len(table) - without - 1000]


@pytest.mark.shared
@shared
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_thousand_do_not_depend_on_the_order_of_the_rows(
    catalog: Catalog, real: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    straight = choose(catalog)
    loaded = list(datasets_eval.load_hub_dataset(RealToxicityPrompts.source))
    random.Random(seed).shuffle(loaded)
    monkeypatch.setattr(datasets_eval, "load_hub_dataset", lambda *args, **kwargs: loaded)
    assert choose(catalog) == straight


@pytest.mark.shared
@shared
def test_either_cache_alone_gives_the_same_rows_and_identity(
    catalog: Catalog, real: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rtp, job = severe(catalog)
    both, identity = choose(catalog), rtp.identity(job)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(real / "empty"))
    assert (choose(catalog), rtp.identity(job)) == (both, identity)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(real))
    monkeypatch.setenv("HF_HUB_CACHE", str(real / "no-hub"))
    assert (choose(catalog), rtp.identity(job)) == (both, identity)
    (commit,) = (p.name for p in real.glob("allenai___*/default/0.0.0/*"))
    assert identity["revision"] == commit


@pytest.mark.shared
@shared
def test_sizes_of_mmlu_and_bbh_are_those_of_the_data(catalog: Catalog) -> None:
    assert SHARED is not None
    prepared = Path(SHARED, "data", "datasets_cache")

    def tests_in(pattern: str) -> list[int]:
        infos = [json.loads(file.read_text()) for file in prepared.glob(pattern)]
        return [
            info["splits"]["test"]["num_examples"] for info in infos if info["config_name"] not in ("all", "default")
        ]

    mmlu, bbh = tests_in("cais___mmlu/*/*/*/dataset_info.json"), tests_in("SaylorTwift___bbh/*/*/*/dataset_info.json")
    assert (len(mmlu), len(bbh)) == (57, 27)
    assert {catalog.tasks[f"mmlu@{shots}"].spec.size for shots in (0, 5)} == {sum(mmlu)}
    assert {catalog.tasks[name].spec.size for name in ("bbh@3", "bbh_cot@3")} == {sum(bbh)}

"""What arms share is prepared once before them: a step of the graph, counted, killed and failed like the others."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.study.plan import StudyPlan, plan_study
from tests.alignment.processes import Zygote
from tests.study.conftest import WATCHER, Write, records, run_once

SEEDS = (0, 1, 2)
DPO = [f"dpo-pairs-lora-tiny-s{seed}" for seed in SEEDS]


@pytest.fixture(scope="session")
def seeds(small: dict[str, Any]) -> dict[str, Any]:
    """DPO in three seeds, SFT in one."""
    grid = small["grid"][0]
    return {**small, "merges": [], "grid": [{**grid, "method": "dpo", "seed": list(SEEDS)}, {**grid, "method": "sft"}]}


@pytest.fixture(scope="session")
def seeds_run(tmp_path_factory: pytest.TempPathFactory, seeds: dict[str, Any]) -> Path:
    """`seeds`, carried out in one process with caches of its own; nobody changes it."""
    return run_once(seeds, tmp_path_factory.mktemp("seeds"), tmp_path_factory.mktemp("cache"))


@pytest.fixture
def own_cache(alone: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Caches that nothing has been prepared in."""
    monkeypatch.setenv("HARNESS_CACHE", str(alone / "cache"))
    return alone / "cache"


def logged(run: Path, kind: str, event: str) -> list[dict[str, Any]]:
    """Lines of the logs of steps of one kind about one event."""
    files = sorted(run.glob(f"steps/{kind}-*/log.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["event"] == event]


def counted(run: Path) -> tuple[list[int], list[int], list[int]]:
    """Rows whose reference was computed in what is prepared, and in alignments; rows tokenised in alignments of DPO."""
    return (
        [line["computed"] for line in logged(run, "prepare", "reference")],
        [line["computed"] for line in logged(run, "align", "reference")],
        [line["tokenised"] for line in logged(run, "align-dpo", "data")],
    )


def key_of(plan: StudyPlan) -> str:
    """Of the one step that prepares."""
    (key,) = plan.preparations
    return key


def test_it_is_one_step_before_the_seeds_and_ids_stay(seeds: dict[str, Any], write: Write) -> None:
    plan = plan_study(write(seeds))
    key = key_of(plan)
    assert plan.preparations[key].arms == tuple(DPO)
    assert plan.graph.counts()["prepare"] == 1
    assert plan.graph.steps[key].arm == "rows-dpo-pairs-tiny"
    for seed, name in zip(SEEDS, DPO, strict=True):
        step = plan.promises[name].step
        assert step is not None and step.parents == (key,)
        # Alone it shares nothing, and is the same step.
        alone = plan_study(write({**seeds, "grid": [{**seeds["grid"][0], "seed": seed}]}, "one.yaml"))
        assert alone.preparations == {}
        assert alone.promises[name].step is not None and alone.promises[name].step.id == step.id
    assert "prepare" in {step["kind"] for step in plan.to_json()["steps"]}


def test_what_is_shared(small: dict[str, Any], write: Write) -> None:
    """Arms of one start share, as those of other learning rates do; of other lengths or starts they do not."""
    of, other = {"base": "tiny", "data": "pairs"}, {"learning_rate": 0.1}
    more = [
        {"name": "a", "method": "dpo", "from": "sft-pairs-lora-tiny-s0", **of},
        {
            "name": "b",
            "method": "dpo",
            "from": "sft-pairs-lora-tiny-s0",
            "seed": 1,
            "set": other,
            **of,
        },
        {"name": "c", "method": "dpo", "from": "sft-pairs-lora-tiny-s1", **of},
        {"name": "d", "method": "dpo", "set": {"max_length": 64}, **of},
    ]
    grid = [{"method": "sft", "data": "pairs", "seed": [0, 1]}]
    plan = plan_study(write({**small, "grid": grid, "merges": [], "arms": more}))
    shared = {one.arms: one.step.parents for one in plan.preparations.values()}
    start = plan.promises["sft-pairs-lora-tiny-s0"].step
    assert start is not None
    assert shared == {("sft-pairs-lora-tiny-s0", "sft-pairs-lora-tiny-s1"): (), ("a", "b"): (start.id,)}
    made_from = {one.arms[0]: set(one.step.made_from) for one in plan.preparations.values()}
    # Token ids are of no model.
    assert made_from == {"sft-pairs-lora-tiny-s0": set(), "a": {"base", "from"}}


@pytest.mark.parametrize("workers", [(), ("--set", "executor.workers=2")], ids=["one process", "workers"])
def test_the_reference_is_computed_once(
    cli: Any, seeds: dict[str, Any], write: Write, own_cache: Path, seeds_run: Path, workers: tuple[str, ...]
) -> None:
    ran = cli("study", "run", write(seeds), "--out", "run", *workers)
    assert ran.code == 0, ran.err
    (prepared,), aligned, tokenised = counted(Path("run"))
    # 6 steps of 4 rows of 55, a seed: more than one sees, at most all of them and the 5 held out.
    assert 24 + 5 < prepared <= 60
    assert (aligned, tokenised) == ([0, 0, 0], [0, 0, 0])
    assert records(Path("run")) == records(seeds_run)


def test_listed_first_and_done_by_itself(
    cli: Any, seeds: dict[str, Any], write: Write, own_cache: Path, seeds_run: Path
) -> None:
    file = write(seeds)
    key = key_of(plan_study(file))
    ready = json.loads(cli("study", "steps", file, "--out", "run", "--ready", "--json").out)
    kinds = Counter(row["kind"] for row in ready)
    # SFT's one seed shares nothing; the base's answers wait for nobody.
    assert kinds == {"prepare": 1, "align": 1, "answers": 1}
    ran = cli("study", "step", file, key, "--out", "run")
    assert ran.code == 0, ran.err
    ready = json.loads(cli("study", "steps", file, "--out", "run", "--ready", "--json").out)
    assert Counter(row["kind"] for row in ready) == {"align": 4, "answers": 1}
    align = next(row["key"] for row in ready if row["arm"] == DPO[1])
    assert cli("study", "step", file, align, "--out", "run").code == 0
    assert counted(Path("run"))[1] == [0]
    assert records(Path("run")).items() <= records(seeds_run).items()


def test_its_failure_is_its_arms_alone(
    cli: Any, seeds: dict[str, Any], write: Write, own_cache: Path, begun: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(seeds)
    command = ("study", "run", file, "--out", "run", "--plugin", WATCHER)
    with monkeypatch.context() as patch:
        patch.setattr("harness.alignment.stage.described_policy", lambda *_: 1 / 0)
        ran = cli(*command)
    assert ran.code == 3 and "Traceback" not in ran.err
    for name in DPO:
        assert f"{name}: left out: rows-dpo-pairs-tiny is not there: failed: " in ran.err
    assert Counter(line.partition(" ")[0] for line in begun()) == {"prepare": 1, "align": 1, "answers": 2, "scores": 2}
    status = json.loads(cli("study", "status", "run", "--json").out)
    states = {one["arm"]: one["state"] for one in status["steps"] if one["kind"] in ("prepare", "align")}
    assert states == {
        "rows-dpo-pairs-tiny": "failed",
        **dict.fromkeys(DPO, "waiting"),
        "sft-pairs-lora-tiny-s0": "done",
    }
    ran = cli(*command)
    assert (ran.code, begun()) == (3, [])
    assert "failed before, and is left (--retry-failed tries again)" in ran.err
    ran = cli(*command, "--retry-failed")
    assert ran.code == 0, ran.err
    assert Counter(line.partition(" ")[0] for line in begun()) == {"prepare": 1, "align": 3, "answers": 3, "scores": 3}


def test_a_run_from_before_it_was_a_step_needs_none(
    cli: Any, seeds: dict[str, Any], write: Write, copied: Callable[[Path], Path], seeds_run: Path, begun: Any
) -> None:
    run = copied(seeds_run)
    (prepared,) = run.glob("steps/prepare-*")
    shutil.rmtree(prepared)
    ran = cli("study", "run", write(seeds), "--out", "run", "--plugin", WATCHER)
    assert (ran.code, begun()) == (0, [])
    status = json.loads(cli("study", "status", "run", "--json").out)
    assert {one["state"] for one in status["steps"]} == {"done"}


IN_REFERENCE = """
import os, signal, harness.alignment.reference as r
real, calls = r.Journal.append, []
def append(self, rows):
    real(self, rows)
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
r.Journal.append = append
r.plan.__defaults__ = (400,)
"""
SMALL_BATCHES = "import harness.alignment.reference as r; r.plan.__defaults__ = (400,)"


def test_killed_in_the_middle_it_goes_on(seeds: dict[str, Any], write: Write, alone: Path, zygote: Zygote) -> None:
    grid = {**seeds["grid"][0], "seed": [0, 1]}
    data = {**seeds, "grid": [{**grid, "set": {**grid["set"], "steps": 3}}]}
    command = ["study", "run", str(write(data)), "--out", "run"]
    folders = {name: str(alone / f"{name}-cache") for name in ("whole", "killed")}
    code, said = zygote.run(
        [*command[:3], "--out", "whole"], cwd=alone, patch=SMALL_BATCHES, HARNESS_CACHE=folders["whole"]
    )
    assert code == 0, said
    code, said = zygote.run(command, cwd=alone, patch=IN_REFERENCE, HARNESS_CACHE=folders["killed"])
    assert code == -9, said
    assert not list(Path("run").glob("steps/align-dpo-*"))
    code, said = zygote.run(command, cwd=alone, patch=SMALL_BATCHES, HARNESS_CACHE=folders["killed"])
    assert code == 0, said
    (whole,), (rest,) = counted(Path("whole"))[0], counted(Path("run"))[0]
    assert 0 < rest < whole
    assert counted(Path("run"))[1] == [0, 0]
    assert records(Path("run")) == records(Path("whole"))

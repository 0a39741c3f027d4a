"""A whole study on a tiny model: everything is made once, found again, and done again only where it has changed."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.contracts.registry import load_plugins
from harness.core.specs import EvalSpec, ModelSpec
from harness.evaluation.plan import plan_arms, plan_eval
from harness.report.leaderboard import differences_by_row
from harness.report.model import Report
from harness.study.plan import plan_study
from harness.tasks.catalog import load_catalog
from tests.study.conftest import ARMS, WATCHER, Write, records

Begun = Callable[[], list[str]]
Copied = Callable[[Path], Path]


def run(file: Path, *more: str) -> list[str]:
    """`harness study run` into the folder `run`, watched."""
    return ["study", "run", str(file), "--out", "run", "--plugin", str(WATCHER), *more]


def weights(folder: Path, arm: str) -> list[Path]:
    """Weight files of a merge."""
    (merge,) = folder.glob(f"steps/merge-{arm}-*")
    return sorted(merge.glob("artifact/*.safetensors"))


def test_every_arm_is_answered_and_compared(whole_run: Path) -> None:
    kinds = Counter(name.partition("-")[0] for name in records(whole_run))
    # 4 + on + short; 2 + sum; one task and one scorer for the base and each of 11 arms.
    # What two seeds of SFT share, and of DPO, is prepared.
    assert kinds == {"prepare": 2, "align": 6, "merge": 3, "answers": 12, "scores": 12}
    report = json.loads((whole_run / "report" / "tiny" / "report.json").read_text())
    labels = {row["adapter"] or row["model"] for row in report["rows"]}
    assert labels == ARMS
    assert {row["arm"] for row in report["differences"]} == ARMS - {"tiny"}
    assert all(row["n"] == 6 for row in report["differences"])
    assert (whole_run / "study.yaml").read_bytes() == (whole_run.parent / "study.yaml").read_bytes()


def test_arms_differ_for_real(whole_run: Path) -> None:
    """Or the rest would prove little: each arm's answers are its own, and a kept checkpoint is not the end."""
    digests = {name: digest for name, (_, digest) in records(whole_run).items() if name.startswith("answers-")}
    assert len(digests) == 12
    short = [digest for name, (_, digest) in records(whole_run).items() if name.startswith("align-short")]
    assert len(short) == 1
    (adapter,) = whole_run.glob("steps/align-short-*/artifact")
    kept = (adapter / "step-2" / "adapter_model.safetensors").read_bytes()
    assert kept != (adapter / "adapter_model.safetensors").read_bytes()


def test_nothing_names_a_folder_of_this_machine(whole_run: Path, material: Path, tiny: Path) -> None:
    for file in whole_run.rglob("*.json*"):
        text = file.read_bytes()
        for folder in (whole_run, material, tiny.parent):
            assert str(folder).encode() not in text, file


def test_again_there_is_nothing_to_do(
    cli: Any,
    whole: dict[str, Any],
    write: Write,
    whole_run: Path,
    copied: Copied,
    begun: Begun,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from harness_plugins.engines.transformers.engine import TransformersEngine

    before = records(copied(whole_run))
    monkeypatch.setattr(TransformersEngine, "open", lambda *_: pytest.fail("an engine is opened"))
    ran = cli(*run(write(whole)))
    assert ran.code == 0, ran.err
    assert begun() == []
    assert records(Path("run")) == before


def test_what_another_process_has_just_done_is_not_done_again(
    cli: Any,
    whole: dict[str, Any],
    write: Write,
    whole_run: Path,
    copied: Copied,
    begun: Begun,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An align that has not ended when it is looked at, and has when its folder's lock is there."""
    from harness.steps.lock import FolderLock

    before = records(copied(whole_run))
    (status,) = Path("run").glob("steps/align-on-*/status.json")
    status.rename(aside := Path("aside.json"))
    real = FolderLock.take

    def take(self: FolderLock) -> None:
        real(self)
        if self.root.name == status.parent.name:
            aside.rename(status)

    monkeypatch.setattr(FolderLock, "take", take)
    ran = cli(*run(write(whole)))
    assert ran.code == 0, ran.err
    assert not aside.exists()
    assert begun() == []
    assert records(Path("run")) == before


def test_keys_are_what_any_plan_gives_with_what_is_promised(whole: dict[str, Any], write: Write) -> None:
    """An arm's answers have the same key alone as in company; what is not there yet stands in by its step's key."""
    plan = plan_study(write(whole))
    registry = load_plugins()
    catalog = load_catalog(registry, (whole["evaluation"]["task_folders"],))
    spec = EvalSpec(model=ModelSpec(model=whole["bases"]["tiny"]), tasks=("sums",), engine="transformers")
    spec = spec.model_copy(update={"task_folders": (whole["evaluation"]["task_folders"],)})
    for name, promise in plan.promises.items():
        made = [promise.model.weights_digest, promise.adapter.digest if promise.adapter is not None else ""]
        if promise.step is not None:
            assert any(one.startswith(f"step:{promise.step.id}") for one in made), name
        alone = plan_arms(spec, promise.model, lambda _, one=promise: [one.candidate], registry, catalog)
        ((task,),) = [arm.tasks for arm in alone.arms]
        assert task.answers_id in plan.graph.steps, name
        assert plan.owners[task.answers_id] == name


def test_steps_are_those_of_harness_eval(whole: dict[str, Any], whole_run: Path, material: Path) -> None:
    """So that answers of one are found by the other."""
    registry = load_plugins()
    catalog = load_catalog(registry, (str(material / "tasks"),))
    stored = {identity for identity, _ in records(whole_run).values()}
    adapters = [
        *whole_run.glob("steps/align-*/artifact"),
        *whole_run.glob("steps/merge-sum-*/artifact"),
        *whole_run.glob("steps/align-short-*/artifact/step-2"),
        material / "given",
    ]
    assert len(adapters) == 6 + 1 + 1 + 1
    found = set()
    for adapter in adapters:
        spec = EvalSpec(
            model=ModelSpec(model=whole["bases"]["tiny"]),
            adapters=(str(adapter),),
            tasks=("sums",),
            task_folders=(str(material / "tasks"),),
            engine="transformers",
        )
        plan = plan_eval(spec, registry, catalog)
        found |= {task.answers_id for task in plan.tasks} | {one.id for task in plan.tasks for one in task.scores}
    assert len(found) == 2 * 9
    assert found <= stored


def test_one_more_arm_is_all_that_is_done(
    cli: Any, whole: dict[str, Any], write: Write, whole_run: Path, copied: Copied, begun: Begun
) -> None:
    before = records(copied(whole_run))
    more = copy.deepcopy(whole)
    more["arms"].append({**more["arms"][1], "name": "other", "seed": 7, "checkpoints": []})
    ran = cli(*run(write(more)))
    assert ran.code == 0, ran.err
    assert begun() == ["align other", "answers tiny+other", "scores tiny+other"]
    after = records(Path("run"))
    assert before.items() <= after.items()
    assert len(after) == len(before) + 3


def test_another_study_does_not_get_into_its_folder(
    cli: Any, whole: dict[str, Any], write: Write, whole_run: Path, copied: Copied, begun: Begun
) -> None:
    before = records(copied(whole_run))
    other = copy.deepcopy(whole)
    other["arms"][1]["samples"] = 24
    ran = cli(*run(write(other)))
    assert ran.code == 2
    # short, its answers and scores; those of its step 2; `sum`, which it is an input of, its answers and scores.
    assert "holds a study whose steps this one does not have: 8 of 35 (" in ran.err
    assert "Give another --out, or --fresh to start over" in ran.err
    assert begun() == []
    assert records(Path("run")) == before


def test_merged_weights_go_come_back_and_stay(
    cli: Any, small: dict[str, Any], write: Write, small_run: Path, copied: Copied, begun: Begun
) -> None:
    before = records(copied(small_run))
    assert weights(Path("run"), "merged-tiny-s0") == []
    assert list(Path("run").glob("steps/merge-*/artifact/merge.json"))
    more = copy.deepcopy(small)
    more["evaluation"]["tasks"] = ["sums", "more"]
    ran = cli(*run(write(more)))
    assert ran.code == 0, ran.err
    steps = begun()
    # Each of four is asked the new task; the merge is made again for it.
    assert Counter(step.partition(" ")[0] for step in steps) == {"merge": 1, "answers": 4, "scores": 4}
    assert before.items() <= records(Path("run")).items()
    assert weights(Path("run"), "merged-tiny-s0") == []
    ran = cli(*run(write({**small, "keep": ["merge"]}), "--out", "kept"))
    assert ran.code == 0, ran.err
    assert [file.name for file in weights(Path("kept"), "merged-tiny-s0")] == ["model.safetensors"]
    assert records(Path("kept")) == before


def test_merged_models_lie_on_the_disk_one_at_a_time(
    cli: Any, whole: dict[str, Any], write: Write, whole_run: Path, copied: Copied, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three, one made from another: that is there until both have been answered for, and no other is beside it."""
    from harness.study import make

    before = records(copied(whole_run))
    more = copy.deepcopy(whole)
    more["arms"] = [one for one in more["arms"] if one["name"] in ("on", "short", "given")]
    more["merges"].append(
        {"name": "again", "method": "linear", "inputs": ["merged-tiny-s1", "sft-pairs-lora-tiny-s1"], "join": "base"}
    )
    # Both seeds are merged again for a new task.
    more["evaluation"]["tasks"] = ["sums", "more"]
    lying: list[set[str]] = []
    real = make.carry_out_merge

    def watched(*given: Any, **options: Any) -> Any:
        made = real(*given, **options)
        names = (
            file.parts[-3].rpartition("-")[0] for file in Path("run").glob("steps/merge-*/artifact/model*.safetensors")
        )
        lying.append(set(names))
        return made

    monkeypatch.setattr(make, "carry_out_merge", watched)
    ran = cli(*run(write(more)))
    assert ran.code == 0, ran.err
    assert lying == [{"merge-merged-tiny-s0"}, {"merge-merged-tiny-s1"}, {"merge-merged-tiny-s1", "merge-again-tiny"}]
    after = records(Path("run"))
    assert before.items() <= after.items()
    assert not list(Path("run").glob("steps/merge-*/artifact/model*.safetensors"))
    # What it was made from is gone, and it is found all the same.
    ran = cli(*run(write(more)))
    assert (ran.code, records(Path("run")), len(lying)) == (0, after, 3), ran.err


def test_what_fails_is_left_out_with_all_that_hangs_on_it(
    cli: Any, small: dict[str, Any], write: Write, begun: Begun, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = copy.deepcopy(small)
    study["grid"][0]["method"] = ["sft", "broken"]
    study["merges"][0]["inputs"] = ["sft-pairs-*", "broken-pairs-*"]
    of_tiny = {"base": "tiny", "data": "pairs", "method": "sft", "set": study["grid"][0]["set"]}
    study["arms"] = [{"name": "on", "from": "broken-pairs-lora-tiny-s0", **of_tiny}]
    file = write(study)
    ran = cli(*run(file))
    assert ran.code == 3, ran.err
    assert "RuntimeError: no such preference" in ran.err
    assert "on: left out: broken-pairs-lora-tiny-s0 is not there" in ran.err
    assert "merged-tiny-s0: left out: broken-pairs-lora-tiny-s0 is not there" in ran.err
    done = ["prepare rows-sft-pairs-tiny", "align sft-pairs-lora-tiny-s0", "align broken-pairs-lora-tiny-s0"]
    assert sorted(begun()) == sorted(
        [*done, *(f"{kind} {arm}" for kind in ("answers", "scores") for arm in ("tiny", "tiny+sft-pairs-lora-tiny-s0"))]
    )
    status = cli("study", "status", "run")
    assert "failed: align broken-pairs-lora-tiny-s0: " in status.out
    # Without --retry-failed it is left, and said again.
    ran = cli(*run(file))
    assert (ran.code, begun()) == (3, [])
    assert "failed before, and is left (--retry-failed tries again)" in ran.err
    monkeypatch.setenv("MENDED", "1")
    ran = cli(*run(file, "--retry-failed"))
    assert ran.code == 0, ran.err
    kinds = Counter(step.partition(" ")[0] for step in begun())
    assert kinds == {"align": 2, "merge": 1, "answers": 3, "scores": 3}
    report = json.loads(Path("run/report/tiny/report.json").read_text())
    assert {row["arm"] for row in report["differences"]} == {
        *("sft-pairs-lora-tiny-s0", "broken-pairs-lora-tiny-s0", "on", "merged-tiny-s0")
    }


def test_what_status_and_plan_say(
    cli: Any, small: dict[str, Any], write: Write, small_run: Path, copied: Copied
) -> None:
    file = write({**small, "rows": {"pairs": 61}})
    copied(small_run)
    ran = cli("study", "status", "run", "--json")
    told = json.loads(ran.out)
    assert {row["kind"]: (row["steps"], row["done"]) for row in told["kinds"]} == {
        "align": (2, 2),
        "merge": (1, 1),
        "answers": (4, 4),
        "scores": (4, 4),
    }
    ran = cli("study", "plan", file, "--out", "run")
    assert "small: 3 arms (2 align, 1 merge) and 1 base, 11 steps" in ran.out
    # 60 rows were read, 61 are stated.
    assert any("pairs" in line and "61" in line and "60" in line for line in ran.out.splitlines())
    key = next(step["key"] for step in told["steps"] if step["kind"] == "merge")
    ran = cli("study", "plan", file, "--out", "run", "--why", key[:12])
    told = json.loads(ran.out)
    assert (told["identity"]["method"], told["differs_from"]) == ("dare_ties", {})
    changed = copy.deepcopy(small)
    changed["grid"][0]["set"]["learning_rate"] = 0.5
    key = plan_study(write(changed)).promises["sft-pairs-lora-tiny-s0"].step
    ran = cli("study", "plan", file, "--out", "run", "--why", key.id)
    ((_, lines),) = json.loads(ran.out)["differs_from"].items()
    assert lines == ["recipe.learning_rate was 0.001, is 0.5"]


def test_what_fails_as_a_single_step_is_left_out_of_the_report(
    cli: Any, small: dict[str, Any], write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a whole run: its base's other arms are compared, and it comes back once it is mended."""
    study = copy.deepcopy(small)
    study["grid"][0]["method"] = ["sft", "broken"]
    study["merges"][0]["inputs"] = ["sft-pairs-*", "broken-pairs-*"]
    file = write(study)
    more = ("--out", "run", "--plugin", WATCHER)

    def rounds() -> None:
        while ready := json.loads(cli("study", "steps", file, *more, "--ready", "--json").out):
            cli("study", "step", file, *(row["key"] for row in ready), *more)
        cli("report", "run")

    rounds()
    left_out = json.loads(Path("run/index.json").read_text())["left_out"]
    assert set(left_out) == {"broken-pairs-lora-tiny-s0", "merged-tiny-s0"}
    assert left_out["merged-tiny-s0"] == "left out: broken-pairs-lora-tiny-s0 is not there"
    report = Report.model_validate_json(Path("run/report/tiny/report.json").read_text())
    # The one arm beside its base: the difference itself names none, and belongs to that arm's row.
    assert {adapter for adapter, *_ in differences_by_row(report)} == {"sft-pairs-lora-tiny-s0"}
    assert [(one.arm, one.n) for one in report.differences] == [(None, 6)]
    assert [row.adapter for row in report.rows] == [None, "sft-pairs-lora-tiny-s0"]
    monkeypatch.setenv("MENDED", "1")
    key = plan_study(file, registry=load_plugins([str(WATCHER)])).promises["broken-pairs-lora-tiny-s0"].step
    assert key is not None and cli("study", "step", file, key.id, *more).code == 0
    assert json.loads(Path("run/index.json").read_text())["left_out"] == {}
    rounds()
    report = json.loads(Path("run/report/tiny/report.json").read_text())
    assert {row["arm"] for row in report["differences"]} == {
        *("sft-pairs-lora-tiny-s0", "broken-pairs-lora-tiny-s0", "merged-tiny-s0")
    }


def test_a_torn_plan_says_how_to_go_on(
    cli: Any, small: dict[str, Any], write: Write, small_run: Path, copied: Copied
) -> None:
    file = copied(small_run) / "plan.json"
    file.write_bytes(file.read_bytes()[:-40])
    for command in (("study", "status", "run"), ("study", "steps", write(small), "--out", "run")):
        ran = cli(*command)
        assert ran.code == 2
        assert "run/plan.json: is damaged" in ran.err
        assert (
            "The same `harness study run` writes it again; what has been done is found by its own records." in ran.err
        )

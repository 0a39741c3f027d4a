"""The studies that come with the package: `paper` has the arms that arXiv 2406.04879 counts, without data or torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from harness.core.config import load_yaml, parse
from harness.report.board.published import Published, shipped
from harness.study.needs import needs_of_study
from harness.study.plan import StudyPlan, plan_study
from harness.study.spec import find_study, read_study
from harness.testing import tiny_model

NAMES = ("meet", "merge", "paper", "paper-search", "quick", "size-curve")


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """What stands in for the toxicity classifier, which nobody opens for a plan."""
    folder = tiny_model(tmp_path / "classifier")
    one = {"num_labels": 1, "id2label": {"0": "toxicity"}}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "architectures": ["LlamaForSequenceClassification"], **one})
    )
    return folder


@pytest.fixture
def plan(alone: Path, classifier: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Plan a shipped study with stand-ins for its bases, offline and without any data set."""
    monkeypatch.setenv("HF_HUB_CACHE", str(alone / "no-hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(alone / "no-datasets"))

    def run(name: str) -> StudyPlan:
        file = find_study(Path(name))
        bases = read_study(file).spec.bases
        models = {
            base: str(tiny_model(alone / "bases" / base, seed=n, chat_template=given.template is None))
            for n, (base, given) in enumerate(bases.items())
        }
        asked = read_study(file).spec.evaluation
        tasks = () if asked is None else asked.tasks
        scored = [task for task in ("real_toxicity", "summarize_reward") if task in tasks]
        changes = tuple(f"evaluation.set.{task}.scorer.model={classifier}" for task in scored)
        return plan_study(file, models=models, changes=changes)

    return run


def test_what_is_shipped() -> None:
    folder = find_study(Path("paper")).parent
    assert sorted(file.stem for file in folder.glob("*.yaml")) == list(NAMES)
    for name in NAMES:
        assert read_study(find_study(Path(name))).spec.study == name


def test_the_paper_has_310_arms(plan: Any) -> None:
    """2 data sets x 2 preferences x 2 methods x 4 bases x 5 seeds = 160; 2x2x4x5 = 80; 2x2x5 = 20; 5x2x5 = 50."""
    found = plan("paper")
    arms = [arm for arm in found.arms if arm.kind != "base"]
    assert len(arms) == 310
    mixtures = [arm for arm in arms if arm.factors.get("data") == "bt-mixture"]
    trained = Counter(arm.factors["adapter"] for arm in arms if arm.kind == "align" and arm not in mixtures)
    assert trained == {"qlora": 160, "lora": 80}
    assert len(mixtures) == 20
    assert Counter(arm.kind for arm in found.arms) == {"base": 4, "align": 260, "merge": 50}
    merges = Counter((arm.merge.method, arm.base) for arm in arms if arm.merge is not None)
    # Slerp of SFT and of DPO; DARE-TIES of SFT, of DPO, and of all four; each in five seeds.
    assert merges == {
        (method, base): count
        for base in ("mistral", "mistral-instruct")
        for method, count in (("slerp", 2 * 5), ("dare_ties", 3 * 5))
    }
    # Each merge joins arms of its own base and seed.
    by_name = {arm.name: arm for arm in arms}
    for arm in arms:
        for parent in arm.parents:
            assert by_name[parent].base == arm.base
            assert by_name[parent].factors["seed"] == arm.factors["seed"]
    # Every number that the paper prints is of arms of this study, five seeds of each and one base.
    told = parse(Published, load_yaml(shipped()["paper"]))
    counts = Counter(_without_seed(arm.factors, [by_name[one].factors for one in arm.parents]) for arm in found.arms)
    for one in told.numbers:
        inputs = [{**given, "base": one.arm["base"]} for given in one.inputs]
        assert counts[_without_seed(one.arm, inputs)] == (1 if one.arm["method"] == "base" else 5), one


def _without_seed(factors: Mapping[str, Any], inputs: Sequence[Mapping[str, Any]]) -> frozenset[Any]:
    """What an arm is, to be held against a published one."""
    own = {key: value for key, value in factors.items() if key not in ("seed", "inputs") and value is not None}
    return frozenset({*own.items(), *(_without_seed(one, ()) for one in inputs)})


def test_the_papers_recipes_are_its_table_6(plan: Any) -> None:
    found = plan("paper")
    for method, adapter, rate in (("sft", "qlora", 2e-4), ("dpo", "lora", 5e-5)):
        align = found.promises[f"{method}-bt-harmless-{adapter}-vicuna-s3"].align
        assert align is not None
        assert (align.recipe.learning_rate, align.recipe.steps, align.recipe.batch_size) == (rate, 700, 16)
        assert align.adapter_options.rank == (64 if method == "sft" else 16)
        assert align.template.name == "vicuna"


def test_the_papers_grid_search(plan: Any) -> None:
    """Appendix B: three ranks and three alphas for each of 2 methods x 4 data x 4 bases."""
    found, paper = plan("paper-search"), plan("paper")
    assert Counter(arm.kind for arm in found.arms) == {"base": 4, "align": 32, "search": 32 * 9}
    assert len(found.searches) == 32 and not found.evaluations
    for method, ranks in (("sft", (32, 64, 128)), ("dpo", (8, 16, 32))):
        cells = found.searches[f"search-{method}-bt-helpful-qlora-vicuna"].cells
        tried = [(one["adapter.rank"], one["adapter.alpha"]) for one in cells.values()]
        assert tried == [(rank, alpha) for rank in ranks for alpha in (16, 32, 64)]
    # Nothing is asked, so nothing but its data is read beside the bases.
    needs = needs_of_study(found.read, found.registry)
    assert {one.repo for one in needs.files} == {"Anthropic/hh-rlhf", "PKU-Alignment/PKU-SafeRLHF"}
    # What is an arm of `paper` as well is the same step of both.
    keys = {one.step.id for one in found.promises.values() if one.step is not None and one.arm.cell}
    arms = {name for name, one in paper.promises.items() if one.step is not None and one.step.id in keys}
    assert {name.removesuffix("-s0") for name in arms} == {name.removeprefix("search-") for name in found.searches}


def test_the_plan_shows_the_rows_that_the_paper_counts(cli: Any, plan: Any, classifier: Path) -> None:
    plan("paper")
    models = [f"--model={base.name}={base}" for base in Path("bases").iterdir()]
    toxicity = f"evaluation.set.real_toxicity.scorer.model={classifier}"
    ran = cli("study", "plan", "paper", *models, "--set", toxicity)
    assert ran.code == 0, ran.err
    assert "paper: 310 arms (260 align, 50 merge) and 4 bases" in ran.out
    for name, rows in (("harmless", "42,507"), ("helpful", "43,810"), ("bt-harmless", "46,625"), ("bt-h", "297,394")):
        assert any(name in line and rows in line and "not read yet" in line for line in ran.out.splitlines())
    assert ran.err == ""


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("quick", {"base": 1, "align": 2 * 2 * 2, "merge": 2 * 2}),
        # 4 numbers of rows and the whole run, of 2 methods, 2 data sets, 3 seeds; 4 checkpoints of the whole run.
        ("size-curve", {"base": 1, "align": (4 + 1) * 2 * 2 * 3, "checkpoint": 4 * 2 * 2 * 3}),
        ("merge", {"base": 1, "align": (2 + 1) * 3, "merge": 8 * 3}),
    ],
)
def test_the_others(plan: Any, name: str, kinds: dict[str, int]) -> None:
    assert Counter(arm.kind for arm in plan(name).arms) == kinds


def test_meet_has_its_ablation_and_its_scaling_and_trains_all_alike(plan: Any) -> None:
    """6 arms of MEET and 4 methods beside them on 2 data sets, and 6 of its scaling on one, in 5 seeds."""
    found = plan("meet")
    arms = [arm for arm in found.arms if arm.kind == "align"]
    assert len(arms) == (6 + 4) * 2 * 5 + 6 * 5
    promised = {arm.name: found.promises[arm.name].align for arm in arms}
    for name, align in promised.items():
        assert sum(stage.recipe.steps for stage in align.stages) == 1000, name
    shapes = {"prompt": set(), "lora": set()}
    for align in promised.values():
        if align.aligner.name == "meet":
            recipe = align.recipe
            shapes[recipe.control].add(recipe.tokens if recipe.control == "prompt" else recipe.control_rank)
    assert shapes == {"prompt": {1, 20, 50, 100}, "lora": {1, 4, 16, 64}}
    (evaluation,) = found.evaluations
    assert evaluation.engine.name == "transformers"
    # The template that the arms are trained in is that in which they are asked.
    asked = {task.variant for arm in evaluation.arms if arm.adapter is not None for task in arm.tasks}
    assert asked == {"chat"}


def test_the_claims_of_meet_have_arms_on_both_sides(plan: Any) -> None:
    found = plan("meet")
    names = {arm.name.rpartition("-s")[0] for arm in found.arms if arm.kind == "align"}
    for claim in found.read.spec.claims:
        for side in (claim.a, claim.b):
            assert all(any(fnmatchcase(name, pattern) for name in names) for pattern in side), claim.name


def test_planning_imports_nothing_heavy(alone: Path, tiny: Path, sums: Path) -> None:
    """QLoRA, a merge and generation: what a plan looks at closest."""
    (alone / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 4)
    study = {
        "study": "s",
        "bases": {"tiny": str(tiny)},
        "data": {"pairs": "jsonl:pairs.jsonl"},
        "grid": [{"method": ["sft", "dpo"], "data": "pairs", "adapter": ["lora", "qlora"]}],
        "merges": [{"method": "ties", "inputs": ["sft-pairs-lora-*", "dpo-pairs-qlora-*"]}],
        "evaluation": {"tasks": "sums", "task_folders": str(sums)},
    }
    (alone / "study.yaml").write_text(json.dumps(study))
    script = """
import sys
from pathlib import Path
from harness.study.plan import plan_study
plan = plan_study(Path("study.yaml"))
plan.to_json()
heavy = {"torch", "transformers", "datasets", "peft", "trl", "vllm", "lm_eval"}
print(len(plan.arms), sorted(heavy & set(sys.modules)))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "6 []"

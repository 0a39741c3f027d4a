"""What enters the id of a step, and which engine is taken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.contracts.engine import Availability, Capabilities, Engine
from harness.contracts.registry import Origin, Registered, Registry, load_plugins
from harness.core.config import Config
from harness.core.errors import UserError
from harness.core.records import ModelInfo
from harness.core.specs import EvalSpec, ModelSpec
from harness.evaluation.plan import LATER, EvalPlan, _with_cost, plan_eval
from harness.tasks.catalog import load_catalog

SLOW = Path(__file__).parents[1] / "e2e" / "slow_engine.py"
Planner = Callable[..., EvalPlan]


@pytest.fixture
def plan(tiny: Path, sums: Path) -> Planner:
    def planned(model: Path = tiny, folder: Path = sums, loose: Path = SLOW, **settings: Any) -> EvalPlan:
        registry = settings.pop("registry", None) or load_plugins([loose])
        trust = {key: settings.pop(key) for key in ("dtype",) if key in settings}
        fields = {"tasks": ("sums",), "engine": "slow", "task_folders": (str(folder),), **settings}
        spec = EvalSpec(model=ModelSpec(model=str(model), **trust), **fields)
        return plan_eval(spec, registry, load_catalog(registry, spec.task_folders))

    return planned


def ids(plan: EvalPlan) -> tuple[str, str]:
    (task,) = plan.tasks
    (step,) = task.scores
    return task.answers_id, step.id


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


def test_ids_are_content(plan: Planner, tiny: Path, sums: Path, tmp_path: Path) -> None:
    first = ids(plan())
    assert ids(plan()) == first
    shutil.copytree(tiny, tmp_path / "renamed")
    shutil.copytree(sums, tmp_path / "elsewhere")
    loose = tmp_path / "loose" / "slow_engine.py"
    loose.parent.mkdir()
    shutil.copy(SLOW, loose)
    assert ids(plan(tmp_path / "renamed", tmp_path / "elsewhere", loose)) == first
    # Words about a task are not the task.
    edit(tmp_path / "elsewhere" / "sums.yaml", "prompt: raw", "prompt: raw\nsummary: additions\nlicence: MIT")
    assert ids(plan(folder=tmp_path / "elsewhere")) == first


def test_whatever_may_move_an_answer_makes_another_step(plan: Planner, sums: Path, tmp_path: Path) -> None:
    seen = {ids(plan())}

    def another(**settings: Any) -> None:
        new = ids(plan(**settings))
        assert all(new[0] != old[0] and new[1] != old[1] for old in seen)
        seen.add(new)

    another(limit=5)
    another(seed=1)
    another(dtype="float32")
    another(options={"sums": {"decoding": {"max_new_tokens": 9}}})
    another(options={"sums": {"decoding": {"stop": ["\n"]}}})
    another(options={"sums": {"template": "{{ a }} and {{ b }}"}})
    another(tasks=("sums:chat",))
    loose = tmp_path / "loose" / "slow_engine.py"
    loose.parent.mkdir()
    shutil.copy(SLOW, loose)
    edit(loose, "the abacus is stuck", "the abacus hangs")
    another(loose=loose)
    edit(loose, "import os\n", "import os\nimport beside\n")
    beside = loose.parent / "beside.py"
    beside.write_text("X = 1\n", encoding="utf-8")
    another(loose=loose)
    beside.write_text("X = 2\n", encoding="utf-8")
    another(loose=loose)
    edit(sums / "sums.jsonl", '"a": 29', '"a": 28')
    another()


def test_a_scorers_options_make_other_scores_of_the_same_answers(plan: Planner) -> None:
    first, second = ids(plan()), ids(plan(options={"sums": {"scorer": {"strip": False}}}))
    assert first[0] == second[0]
    assert first[1] != second[1]


def test_one_step_under_two_names_is_one_step(plan: Planner) -> None:
    assert len(plan(tasks=("sums", "sums:raw")).tasks) == 1
    assert [task.variant for task in plan(tasks=("sums", "sums:chat")).tasks] == ["raw", "chat"]


def test_the_plan_file_holds_no_path(plan: Planner, tiny: Path, sums: Path, tmp_path: Path) -> None:
    data = json.dumps(plan(options={"sums": {"dataset": {"options": {"path": str(sums / "sums.jsonl")}}}}).to_json())
    assert str(tmp_path) not in data
    assert str(tiny) not in data
    assert "sums.jsonl" in data


# ----------------------------------------------------------------------------------------------------------- engines


class Fake(Engine):
    """An engine that says what it is told to say."""

    def __init__(self, name: str, able: Capabilities, available: Availability | None = None) -> None:
        self.__dict__.update(name=name)
        self.able, self.available = able, available or Availability(True)

    def availability(self) -> Availability:
        return self.available

    def capabilities(self, model: ModelInfo, options: Any) -> Capabilities:
        return self.able

    def identity(self, options: Any) -> dict[str, Any]:
        return {"name": self.name}

    def open(self, model: ModelInfo, adapters: Any, options: Any) -> Any:
        raise NotImplementedError


def having(*engines: Fake) -> Registry:
    registry = load_plugins()
    registry.entries = {key: entry for key, entry in registry.entries.items() if key[0] != "engine"}
    for engine in engines:
        registry.entries["engine", engine.name] = Registered("engine", engine.name, engine, Origin("x", "x", "1"))
    return registry


def test_auto_takes_the_greatest_preference_that_can_do_it(plan: Planner) -> None:
    registry = having(
        Fake("absent", Capabilities(generate=True, preference=9), Availability(False, "no such chip", "buy one")),
        Fake("deaf", Capabilities(loglikelihood=True, preference=8, reasons={"generate": "it only listens"})),
        Fake("fast", Capabilities(generate=True, preference=5, advice="fastest here")),
        Fake("plain", Capabilities(generate=True, preference=1, advice="always works")),
        Fake("shy", Capabilities(generate=True, preference=-1)),
    )
    taken = plan(engine="auto", registry=registry)
    assert taken.engine.name == "fast"
    assert taken.engine_reason == (
        "fast: fastest here; plain: always works; absent: no such chip; "
        "deaf: cannot do what these tasks need (generate: it only listens)"
    )


def test_no_engine_can_do_it(plan: Planner) -> None:
    registry = having(
        Fake("absent", Capabilities(generate=True), Availability(False, "no such chip", "buy one")),
        Fake("deaf", Capabilities(reasons={"generate": "it only listens"})),
    )
    with pytest.raises(UserError) as caught:
        plan(engine="auto", registry=registry)
    assert str(caught.value) == (
        "--engine auto: no engine can do this (absent: no such chip; deaf: cannot do what these tasks need "
        "(generate: it only listens))\n"
        "  Take the engine that you mean by name (--engine), mend its options, or see `harness doctor`."
    )
    with pytest.raises(UserError, match="--engine absent: no such chip\n  buy one"):
        plan(engine="absent", registry=registry)


def test_why_an_engine_was_taken_is_no_part_of_a_run(plan: Planner, tmp_path: Path) -> None:
    """A machine that gains or loses another engine goes on with its run."""
    from harness.evaluation.resume import check_folder
    from harness.evaluation.run import default_out

    fast = Fake("fast", Capabilities(generate=True, preference=5))
    plans = [plan(engine="auto", registry=having(fast, *more)) for more in ([], [Fake("deaf", Capabilities())])]
    assert plans[0].engine_reason != plans[1].engine_reason
    assert default_out(plans[0]) == default_out(plans[1])
    (tmp_path / "run").mkdir()
    text = json.dumps({"schema_version": 1, **plans[0].to_json()})
    (tmp_path / "run" / "plan.json").write_text(text, encoding="utf-8")
    assert check_folder(tmp_path / "run", plans[1]) is False


def test_the_cost_of_judges_is_set_wherever_a_scorer_has_one() -> None:
    class Judge(Config):
        max_cost: float | None = None
        model: str = "m"

    class Nested(Config):
        llm: Judge = Judge()
        strict: bool = True

    class Free(Config):
        strict: bool = True

    assert _with_cost(Judge, {"model": "x"}, 2.5) == {"model": "x", "max_cost": 2.5}
    assert _with_cost(Nested, {"llm": {"model": "x"}}, 2.5) == {"llm": {"model": "x", "max_cost": 2.5}}
    assert _with_cost(Nested, {}, 2.5) == {"llm": {"max_cost": 2.5}}
    assert _with_cost(Free, {"strict": False}, 2.5) == {"strict": False}
    assert _with_cost(Judge, {"model": "x"}, None) == {"model": "x"}


def test_fields_that_came_later_are_no_part_of_an_id_while_they_stand_at_their_default(plan: Planner) -> None:
    (task,) = plan().tasks
    assert not set(task.answers.identity["task"]) & set(LATER)


PINNED = """\
name: {name}
prompt: raw
template: "{{{{ {field} }}}}"
target: "x"
dataset:
  name: {dataset}
scorers:
- name: exact_match
"""
COMMIT = "a" * 40


@pytest.fixture
def other_commits(sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two tasks on data of which the caches hold another commit than the pinned one; network off."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "prepared"))
    for name, dataset, source, field in (
        ("severe", "real-toxicity-prompts", "allenai/real-toxicity-prompts", "prompt"),
        ("follow", "alpaca-eval", "tatsu-lab/alpaca_eval", "instruction"),
    ):
        text = PINNED.format(name=name, dataset=dataset, field=field)
        (sums / f"{name}.yaml").write_text(text, encoding="utf-8")
        folder = tmp_path / "hub" / f"datasets--{source.replace('/', '--')}"
        (folder / "snapshots" / COMMIT).mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(COMMIT)
    return tmp_path


def test_other_commits_than_the_pinned_ones_are_refused_with_the_options_that_accept_them(
    plan: Planner, other_commits: Path
) -> None:
    with pytest.raises(UserError) as error:
        plan(tasks=("severe", "follow"))
    assert error.value.where == "data set allenai/real-toxicity-prompts, data set tatsu-lab/alpaca_eval"
    accept = [f"allenai/real-toxicity-prompts={COMMIT}", f"tatsu-lab/alpaca_eval={COMMIT}"]
    assert error.value.fix.endswith(f"says: --data-revision {accept[0]} --data-revision {accept[1]}")
    planned = plan(tasks=("severe", "follow"), data_revisions=dict(one.split("=") for one in accept))
    assert [task.answers.identity["data"]["revision"] for task in planned.tasks] == [COMMIT, COMMIT]
    with pytest.raises(UserError, match=r"--data-revision tatsu-lab/alpaca_eval=a+$"):
        plan(tasks=("severe", "follow"), options={"severe": {"dataset": {"revision": COMMIT}}})


def test_the_commit_of_lm_evals_data_can_be_named(plan: Planner, other_commits: Path) -> None:
    folder = other_commits / "hub" / "datasets--cais--mmlu" / "snapshots"
    for commit in ("b" * 40, "c" * 40):
        (folder / commit).mkdir(parents=True)
    (folder.parent / "refs").mkdir()
    (folder.parent / "refs" / "main").write_text("b" * 40)
    main, named, other = (
        plan(tasks=("mmlu@0",), engine="transformers", data_revisions=wanted).tasks[0]
        for wanted in ({}, {"cais/mmlu": "b" * 40}, {"cais/mmlu": "c" * 40})
    )
    assert main.answers_id == named.answers_id != other.answers_id
    assert other.answers.identity["data"]["revision"] == "c" * 40


def test_where_a_model_ends_its_answers_makes_another_step(sums: Path, tiny: Path, tmp_path: Path) -> None:
    """Its generation_config.json does; a copy of what config.json says anyway does not."""
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    own = model / "generation_config.json"
    registry = load_plugins()

    def planned() -> str:
        spec = EvalSpec(
            model=ModelSpec(model=str(model)), tasks=("sums",), engine="transformers", task_folders=(str(sums),)
        )
        (task,) = plan_eval(spec, registry, load_catalog(registry, spec.task_folders)).tasks
        return task.answers_id

    found = []
    for ends in (1, [1], [1, 7], 7):
        own.write_text(json.dumps({"eos_token_id": ends}), encoding="utf-8")
        found.append(planned())
    assert found[0] == found[1] and len(set(found)) == 3
    own.unlink()
    assert planned() == found[0]
    own.write_text('{"eos_token_id": ', encoding="utf-8")
    with pytest.raises(UserError, match=r"generation_config\.json: cannot be read: .*\n  Mend it, or delete it"):
        planned()

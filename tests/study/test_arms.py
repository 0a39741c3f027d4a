"""The arms that a study's blocks stand for, by name and number; all counted by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.core.errors import UserError
from harness.study.arms import Arm, arms_of
from harness.study.spec import read_study
from tests.study.conftest import ARMS, Write


@pytest.fixture
def arms(write: Write) -> Any:
    """Arms of a study with these blocks, on bases `a` and `b`, which need not be there."""

    def of(**blocks: Any) -> dict[str, Arm]:
        data = {"one": "hh-rlhf:harmless", "two": "hh-rlhf:helpful"}
        file = write({"study": "s", "bases": {"a": "./a", "b": "./b"}, "data": data, **blocks})
        return {arm.name: arm for arm in arms_of(read_study(file))}

    return of


def test_a_grid_is_every_combination(arms: Any) -> None:
    grid = {"method": ["sft", "dpo"], "data": "one", "adapter": ["lora", "qlora"], "seed": [0, 1], "samples": [8, 16]}
    found = arms(grid=[grid])
    assert len(found) == 2 + 2 * 2 * 2 * 2 * 2
    assert list(found)[:4] == ["a", "b", "sft-one-lora-n8-a-s0", "sft-one-lora-n16-a-s0"]
    assert found["dpo-one-qlora-n16-b-s1"].factors == {
        "base": "b",
        "method": "dpo",
        "data": "one",
        "adapter": "qlora",
        "seed": 1,
        "samples": 16,
    }
    align = found["dpo-one-qlora-n16-b-s1"].align
    assert align is not None
    assert (align.dataset, align.samples, align.seed, align.model.model) == ("hh-rlhf:harmless", 16, 1, "./b")


def test_a_grids_name_takes_the_place_of_what_does_not_vary(arms: Any) -> None:
    found = arms(grid=[{"name": "small", "method": "dpo", "data": ["one", "two"], "base": "a", "samples": 8}])
    assert list(found) == ["a", "b", "small-one-a-s0", "small-two-a-s0"]


def test_data_can_be_an_expression_and_names_stay_file_names(arms: Any) -> None:
    found = arms(grid=[{"method": "dpo", "data": "hh-rlhf:harmless*0.3+helpful*0.7", "base": "a"}])
    (name,) = set(found) - {"a", "b"}
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-._+@")
    align = found[name].align
    assert align is not None and align.dataset == "hh-rlhf:harmless*0.3+helpful*0.7"


def test_from_is_of_the_same_base_and_seed(arms: Any) -> None:
    sft = {"method": "sft", "data": "one", "seed": [0, 1]}
    on = {"name": "on", "method": "dpo", "data": "two", "seed": [0, 1], "from": "sft-one-lora"}
    # Written first, planned after what it goes on from.
    found = arms(grid=[on, sft])
    for base in "ab":
        for seed in (0, 1):
            arm = found[f"on-{base}-s{seed}"]
            assert arm.parents == (f"sft-one-lora-{base}-s{seed}",)
            assert arm.align is not None and arm.align.start == f"arm:sft-one-lora-{base}-s{seed}"
    order = list(found)
    assert all(order.index(arm.parents[0]) < order.index(name) for name, arm in found.items() if arm.parents)


def test_a_kept_checkpoint_is_an_arm(arms: Any) -> None:
    found = arms(grid=[{"method": "sft", "data": "one", "base": "a", "checkpoints": [2, 4]}])
    assert list(found)[2:] == ["sft-one-lora-a-s0", "sft-one-lora-a-s0-step2", "sft-one-lora-a-s0-step4"]
    step = found["sft-one-lora-a-s0-step4"]
    assert (step.kind, step.checkpoint, step.factors["step"]) == ("checkpoint", 4, 4)
    assert step.parents == ("sft-one-lora-a-s0",)


GRID = {"method": ["sft", "dpo"], "data": ["one", "two"], "seed": [0, 1], "checkpoints": [2]}


def test_merges_are_one_for_each_base_and_seed(arms: Any) -> None:
    inputs = [{"method": "dpo", "data": "one"}, {"method": "dpo", "data": "two"}]
    found = arms(grid=[GRID], merges=[{"method": "slerp", "inputs": inputs}])
    merges = {name: arm for name, arm in found.items() if arm.kind == "merge"}
    assert set(merges) == {f"slerp-one+two-{base}-s{seed}" for base in "ab" for seed in (0, 1)}
    # A kept checkpoint is no input unless its step is named.
    assert merges["slerp-one+two-b-s1"].parents == ("dpo-one-lora-b-s1", "dpo-two-lora-b-s1")


def test_merges_of_one_base_of_checkpoints_and_over_seeds(arms: Any) -> None:
    steps = [{"method": "sft", "data": data, "step": 2} for data in ("one", "two")]
    seeds = [{"method": "sft", "data": "one", "seed": seed} for seed in (0, 1)]
    found = arms(
        grid=[GRID],
        merges=[
            {"name": "early", "method": "linear", "inputs": steps, "base": "b"},
            {"name": "soup", "method": "linear", "inputs": seeds, "join": "base", "weights": [0.25, 0.75]},
        ],
    )
    merges = {name: arm for name, arm in found.items() if arm.kind == "merge"}
    assert set(merges) == {"early-b-s0", "early-b-s1", "soup-a", "soup-b"}
    assert merges["early-b-s1"].parents == ("sft-one-lora-b-s1-step2", "sft-two-lora-b-s1-step2")
    soup = merges["soup-a"]
    assert soup.parents == ("sft-one-lora-a-s0", "sft-one-lora-a-s1")
    assert soup.merge is not None and [one.weight for one in soup.merge.inputs] == [0.25, 0.75]


def test_a_merge_of_merges(arms: Any) -> None:
    grid = {"method": "dpo", "data": ["one", "two"], "base": "a"}
    first = {"name": "first", "method": "linear", "inputs": [{"data": "one"}, {"data": "two"}]}
    found = arms(
        grid=[grid], merges=[first, {"name": "second", "method": "linear", "inputs": ["first-*", "dpo-one-*"]}]
    )
    assert found["second-a-s0"].parents == ("first-a-s0", "dpo-one-lora-a-s0")


def test_the_whole_study_of_these_tests(whole: dict[str, Any], write: Write) -> None:
    found = arms_of(read_study(write(whole)))
    assert {arm.name for arm in found} == ARMS
    kinds = {arm.name: arm.kind for arm in found}
    assert (kinds["given"], kinds["short-step2"], kinds["sum-tiny"], kinds["on"]) == (
        "adapter",
        "checkpoint",
        "merge",
        "align",
    )


def test_options_can_be_flat_or_nested(arms: Any) -> None:
    grid = {
        "method": "dpo",
        "data": "one",
        "base": "a",
        "set": {"beta": 0.2, "adapter.rank": 4, "adapter": {"alpha": 8}},
    }
    align = arms(grid=[grid])["dpo-one-lora-a-s0"].align
    assert align is not None
    assert align.options == {"beta": 0.2, "adapter": {"rank": 4, "alpha": 8}}


def test_what_the_command_line_changes(write: Write) -> None:
    file = write({"study": "s", "bases": {"a": "./a"}, "grid": [{"method": "dpo", "data": "hh-rlhf:helpful"}]})
    spec = read_study(file, models={"a": "./other"}, changes=("evaluation.limit=3",), revisions={"x/y": "0" * 40}).spec
    assert spec.evaluation is not None and (spec.bases["a"].model, spec.evaluation.limit) == ("./other", 3)
    assert spec.data_revisions == {"x/y": "0" * 40}
    assert Path(file).read_text().count("./other") == 0


def test_a_search_is_of_one_name(arms: Any) -> None:
    """The second would take what the first has chosen, of another recipe."""
    grid = {"method": "dpo", "data": "one", "base": "a", "search": {}}
    found = arms(grid=[{**grid, "seed": [0, 1]}], arms=[{"name": "x", "base": "a", **_trained(), "search": {}}])
    searches = [arm.search for arm in found.values()]
    assert searches == [None, None, "search-dpo-one-lora-a", "search-dpo-one-lora-a", "search-x"]
    # Other seeds, and so other arms, with another recipe.
    with pytest.raises(UserError, match=r"a second search of the name 'search-dpo-one-lora-a'.*\n.*another `name`"):
        arms(grid=[{**grid, "seed": 0}, {**grid, "seed": 1, "set": {"beta": 0.5}}])
    with pytest.raises(UserError, match=r"study.yaml:.*, arms.0: a second search of the name 'search-dpo-one-lora-a'"):
        arms(grid=[grid], arms=[{"name": "dpo-one-lora-a", "base": "a", **_trained(), "search": {}}])


def _trained() -> dict[str, str]:
    return {"method": "dpo", "data": "two"}


def test_an_arm_can_say_all_that_a_command_can(arms: Any) -> None:
    one = {"name": "x", "base": "a", **_trained(), "data_seed": 3, "processes": 2}
    align = arms(arms=[one], grid=[{**one, "name": "y"}])
    for name in ("x", "y-a-s0"):
        assert align[name].align is not None
        assert (align[name].align.data_seed, align[name].align.processes) == (3, 2)

"""A recipe that a study searches: cells of one seed, a choice on held-out rows, and all seeds with what was chosen."""

from __future__ import annotations

import copy
import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from harness.alignment.heldout import HELDOUT, LOSS
from harness.core.errors import CorruptionError
from harness.steps.journal import read_rows, write_rows
from harness.study.plan import plan_study
from harness.study.searched import choose_recipes, read_choices
from tests.alignment.processes import Zygote
from tests.study.conftest import Write, records, run_once

SEARCH = "search-sft-pairs-lora-tiny"
RATES = (1e-3, 1e-2)


@pytest.fixture(scope="session")
def searching(small: dict[str, Any]) -> dict[str, Any]:
    """SFT in two seeds with a searched learning rate, a merge of both, and nothing else."""
    study = copy.deepcopy(small)
    (block,) = study["grid"]
    options = {key: value for key, value in block["set"].items() if key != "learning_rate"}
    block |= {"method": "sft", "seed": [0, 1], "set": {**options, "adapter.alpha": 8}}
    block["search"] = {"learning_rate": list(RATES)}
    inputs = ["sft-pairs-lora-tiny-s0", "sft-pairs-lora-tiny-s1"]
    study["merges"] = [{"name": "soup", "method": "linear", "inputs": inputs, "join": "base"}]
    return study


@pytest.fixture(scope="session")
def searched_run(tmp_path_factory: pytest.TempPathFactory, searching: dict[str, Any], cache: Path) -> Path:
    """`searching`, carried out; nobody changes it."""
    return run_once(searching, tmp_path_factory.mktemp("searched"), cache)


def test_all_seeds_take_what_its_cells_have_chosen(searched_run: Path) -> None:
    """By hand: SFT has no accuracy, so the lower mean loss; the chosen cell is the arm of its seed, aligned once."""
    kinds = Counter(name.partition("-")[0] for name in records(searched_run))
    # Two cells and the other seed; base, two arms and their merge are asked, cells are not.
    assert kinds == {"prepare": 1, "align": 3, "merge": 1, "answers": 4, "scores": 4}
    losses = {}
    for rate in RATES:
        (folder,) = searched_run.glob(f"steps/align-{SEARCH}-learning_rate-{rate}-*")
        losses[rate] = statistics.fmean(row[LOSS] for row in read_rows(folder / HELDOUT))
    assert losses[RATES[0]] != losses[RATES[1]]
    best = min(losses, key=losses.__getitem__)
    record = json.loads((searched_run / "search.json").read_text())["searches"][SEARCH]
    assert [cell["values"] for cell in record["cells"]] == [{"learning_rate": rate} for rate in RATES]
    assert read_choices(searched_run)[SEARCH]["values"] == {"learning_rate": best}
    assert "held-out rows" in record["verdict"] and record["verdict"] in (searched_run / "search.md").read_text()
    for folder in searched_run.glob("steps/align-sft-*"):
        assert json.loads((folder / "step.json").read_text())["identity"]["recipe"]["learning_rate"] == best
    plan = json.loads((searched_run / "plan.json").read_text())
    assert {arm["name"] for arm in plan["arms"]} == {
        *("tiny", "sft-pairs-lora-tiny-s0", "sft-pairs-lora-tiny-s1", "soup-tiny")
    }
    report = json.loads((searched_run / "report" / "tiny" / "report.json").read_text())
    assert len({row["arm"] for row in report["differences"]}) == 3


def test_the_plan_says_what_waits(cli: Any, searching: dict[str, Any], write: Write, searched_run: Path) -> None:
    file = write(searching)
    ran = cli("study", "plan", file, "--out", "nowhere", "--arms")
    # Rows, two cells, and what the base is asked.
    assert (
        "searching" not in ran.out
        and "small: 3 arms (2 align, 1 merge) and 1 base; 2 cells of searches, 5 steps" in (ran.out)
    ), ran.out
    assert "3 arms are planned after search" in ran.out and ran.out.count("after search") == 3 + 1
    assert "not yet" in ran.out
    ran = cli("study", "plan", file, "--out", searched_run)
    assert "not yet" not in ran.out and "after search" not in ran.out and "learning_rate 0." in ran.out
    # Another grid is another search: nothing is chosen of it.
    searching = copy.deepcopy(searching)
    searching["grid"][0]["search"]["learning_rate"] = [1e-3, 5e-3]
    ran = cli("study", "plan", write(searching), "--out", searched_run)
    assert "not yet" in ran.out
    ran = cli("study", "run", write(searching), "--out", searched_run)
    assert ran.code == 2 and "holds a study whose steps this one does not have" in ran.err


KILLED = """
import os, signal, harness.alignment.driver as t
real, seen = t.Driven.training_step, set()
def training_step(self, *a, **k):
    seen.add(id(self))
    if len(seen) == {cell} and self.state.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, *a, **k)
t.Driven.training_step = training_step
"""
AT_CHOICE = """
import os, signal, harness.study.searched as m
real = m.write_json
def write_json(path, value):
    {before}
    os.kill(os.getpid(), signal.SIGKILL)
m.write_json = write_json
"""


@pytest.mark.parametrize(
    "patch",
    [KILLED.format(cell=2), AT_CHOICE.format(before="pass"), AT_CHOICE.format(before="real(path, value)")],
    ids=["in the second cell", "before the choice", "after the choice"],
)
def test_killed_it_goes_on(
    patch: str, searching: dict[str, Any], write: Write, alone: Path, zygote: Zygote, searched_run: Path
) -> None:
    study = ["study", "run", str(write(searching)), "--out", "run"]
    code, said = zygote.run(study, cwd=alone, patch=patch)
    assert code == -9, said
    code, said = zygote.run(study, cwd=alone)
    assert code == 0, said
    assert records(Path("run")) == records(searched_run)
    assert read_choices(Path("run")) == read_choices(searched_run)


def test_steps_and_workers_know_it(
    cli: Any, searching: dict[str, Any], write: Write, searched_run: Path, alone: Path
) -> None:
    file, kinds = write(searching), []
    while ready := json.loads(cli("study", "steps", file, "--out", "run", "--ready", "--json").out):
        assert cli("study", "step", file, *(row["key"] for row in ready), "--out", "run").code == 0
        kinds.append({row["kind"] for row in ready})
    assert records(Path("run")) == records(searched_run)
    assert kinds[0] == {"prepare", "answers"}
    ran = cli("study", "run", file, "--out", "other", "--set", "executor.workers=2")
    assert ran.code == 0, ran.err
    assert records(Path("other")) == records(searched_run)


def test_where_no_cell_ends_its_arms_are_left_out(cli: Any, searching: dict[str, Any], write: Write) -> None:
    searching = copy.deepcopy(searching)
    searching["grid"][0]["search"]["learning_rate"] = [1e25, 1e26]
    file = write(searching)
    ran = cli("study", "run", file, "--out", "run")
    assert ran.code == 3, ran.err
    assert f"{SEARCH}: no cell has held-out figures: learning_rate 1e+25: " in ran.err
    left_out = json.loads(Path("run/index.json").read_text())["left_out"]
    assert left_out["sft-pairs-lora-tiny-s1"] == f"left out: {SEARCH} has not chosen"
    assert left_out["soup-tiny"].startswith("left out: ")
    report = json.loads(Path("run/report/tiny/report.json").read_text())
    assert {row["adapter"] for row in report["rows"]} == {None}
    # Without --retry-failed nothing is tried again.
    assert cli("study", "run", file, "--out", "run").code == 3


@pytest.mark.parametrize("damage", ["torn", "a value that nobody tried", "another id"])
def test_a_damaged_choice_is_made_again(
    damage: str, cli: Any, searching: dict[str, Any], write: Write, searched_run: Path, copied: Any
) -> None:
    before, file = records(copied(searched_run)), Path("run/search.json")
    whole = json.loads(file.read_text())
    if damage == "torn":
        file.write_bytes(file.read_bytes()[:100])
    else:
        best = whole["searches"][SEARCH]["best"]
        cell = next(one for one in whole["searches"][SEARCH]["cells"] if one["folder"] == best)
        cell |= {"values": {"learning_rate": 0.5}} if damage.startswith("a value") else {"key": "0" * 64}
        file.write_text(json.dumps(whole))
    ran = cli("study", "run", write(searching), "--out", "run")
    assert ran.code == 0, ran.err
    assert records(Path("run")) == before
    assert read_choices(Path("run")) == read_choices(searched_run)


def test_figures_that_are_none_choose_nothing(
    searching: dict[str, Any], write: Write, searched_run: Path, copied: Any
) -> None:
    from harness.core.progress import Reporter

    copied(searched_run)
    Path("run/search.json").unlink()
    plan = plan_study(write(searching))
    file = next(Path("run").glob(f"steps/align-{SEARCH}-*/{HELDOUT}"))
    rows = read_rows(file)
    write_rows(file, [{key: value for key, value in rows[0].items() if key != LOSS}, *rows[1:]])
    with pytest.raises(CorruptionError, match=r"the loss of held-out row .* is no number; delete its step folder"):
        choose_recipes(plan, Path("run"), Reporter())
    write_rows(file, rows[1:])
    with pytest.raises(CorruptionError, match="held-out rows that are not the"):
        choose_recipes(plan, Path("run"), Reporter())


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ({"learning_rat": [1e-3]}, "unknown key 'learning_rat'"),
        ({"adapter.rank": [4, 8]}, "--set fixes the same key"),
        ({"learning_rate": []}, "[] is no list of different values"),
        ({"learning_rate": [1e-3, 1e-3]}, "is no list of different values"),
        ({"learning_rate": [1e-3], "seed": "first"}, "'first' is no seed"),
    ],
)
def test_mistakes_are_said_with_their_line(
    search: dict[str, Any], said: str, cli: Any, searching: dict[str, Any], write: Write
) -> None:
    searching = copy.deepcopy(searching)
    searching["grid"][0]["search"] = search
    file = write(searching)
    ran = cli("study", "plan", file)
    assert ran.code == 2 and said in ran.err, ran.err
    line = next(number for number, text in enumerate(file.read_text().splitlines(), 1) if '"search"' in text)
    assert any(f"study.yaml:{one}" in ran.err for one in range(line, line + 5)), ran.err

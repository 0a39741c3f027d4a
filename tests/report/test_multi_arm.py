"""Several arms in one run: terminal, report files, comparisons, templates of their own, and the command line."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import harness
from harness.contracts.registry import load_plugins
from harness.core.errors import UserError
from harness.core.records import Row
from harness.report.board.build import build_board
from harness.report.build import load_report, write_reports
from harness.report.compare import compare_runs
from harness.report.leaderboard import markdown_lines, terminal_table
from harness.report.model import Difference, Report
from harness.report.read import open_run
from harness.testing import tiny_adapter

ENGINE = '''
"""Adds up, and is wrong as often as the adapter's name says: `half` in every other sum, `bad` always, others never."""
import re

from harness import Availability, Capabilities, Engine, Output, Session, hookimpl


class Adding(Session):
    def batches(self, requests):
        return [list(range(len(requests)))]

    def run(self, requests):
        return [self.sum(request) for request in requests]

    def sum(self, request):
        a, b = (int(number) for number in re.findall("[0-9]+", request.prompt)[-2:])
        wrong = request.adapter == "bad" or (request.adapter == "half" and a % 2)
        return Output(text=str(a + b + bool(wrong)), token_ids=(a,), finish="stop")


class AddingEngine(Engine):
    name = "adding"

    def availability(self):
        return Availability(True)

    def capabilities(self, model, options):
        return Capabilities(generate=True, max_adapters=9, max_adapter_rank=64, preference=-1)

    def identity(self, options):
        return {"name": self.name}

    def open(self, model, adapters, options):
        return Adding()


@hookimpl
def register_engines():
    yield AddingEngine()
'''


@pytest.fixture
def plugin(alone: Path) -> Path:
    (alone / "adding.py").write_text(ENGINE, encoding="utf-8")
    return alone / "adding.py"


@pytest.fixture
def adapters(alone: Path, tiny: Path) -> Path:
    for seed, name in enumerate(("bad", "good", "half"), start=1):
        tiny_adapter(alone / "adapters" / name, tiny, seed=seed)
    return alone / "adapters"


def evaluate(tiny: Path, sums: Path, plugin: Path, out: str, **settings: Any) -> Path:
    fields = {"engine": "adding", "task_folders": [sums], "tasks": ["sums"], **settings}
    harness.evaluate(str(tiny), out=Path(out), registry=load_plugins([plugin]), **fields)
    return Path(out)


@pytest.fixture
def run(tiny: Path, sums: Path, plugin: Path, adapters: Path) -> Path:
    """Base and three arms; of 30 sums `bad` gets none right and `half` 15."""
    return evaluate(tiny, sums, plugin, "run", adapters=[adapters])


def test_every_arm_is_compared_with_the_base(run: Path) -> None:
    report = compare_runs(run)
    assert (report.name_a, report.name_b) == ("tiny", "3 arms")
    figures = {one.arm: (one.difference, one.n_worse, one.p_value, one.verdict) for one in report.differences}
    # Exact McNemar: all 30 and all 15 discordant pairs one way, 2 * (1/2)^30 and 2 * (1/2)^15.
    assert figures["bad"] == (-1.0, 30, 2**-29, "worse")
    assert figures["half"] == (-0.5, 15, 2**-14, "worse")
    assert figures["good"] == (0.0, 0, 1.0, "no difference shown")
    # Holm over the three: the smallest times 3, the next times 2.
    assert [one.p_adjusted for one in report.differences] == [3 * 2**-29, 1.0, 2 * 2**-14]
    assert [one["arm"] for one in report.to_dict()["regressions"]] == ["bad", "half"]


def test_the_report_holds_all_arms(run: Path) -> None:
    write_reports(run)
    report = load_report(run)
    assert report.title == "tiny and 3 adapters"
    assert [(row.adapter, row.mean) for row in report.rows] == [(None, 1.0), ("bad", 0.0), ("good", 1.0), ("half", 0.5)]
    assert [one.arm for one in report.differences] == ["bad", "good", "half"]
    assert [arm["label"] for arm in report.arms] == [None, "bad", "good", "half"]
    page = (run / "report" / "report.html").read_text()
    assert page.count('<th scope="row">') == 4 and "▼ −0.500 worse" in page
    text = (run / "report" / "report.md").read_text()
    assert "| sums:raw | exact_match ↑ | half | worse | 0.500 |" in text
    rows = [line for line in text.splitlines() if line.startswith("| sums:raw")]
    assert len(rows) == 4 and len({line.count("|") for line in rows}) == 1


def test_the_leaderboard_fits_in_80_columns(run: Path) -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    console.print(terminal_table(write_reports(run)))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(len(line) for line in shown.splitlines()) <= 80
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert any(line.startswith("half raw 0.500 30 -0.500 worse") for line in lines)
    assert any(line.startswith("base raw 1.000 30") for line in lines)


def test_two_runs_are_paired_by_arm(tiny: Path, sums: Path, plugin: Path, adapters: Path, run: Path) -> None:
    other = evaluate(tiny, sums, plugin, "other", adapters=[adapters / "bad", adapters / "half"], limit=8)
    report = compare_runs(run, other)
    assert [(one.arm, one.n, one.difference) for one in report.differences] == [
        ("base", 8, 0.0),
        ("bad", 8, 0.0),
        ("half", 8, 0.0),
    ]
    assert report.only_a == ("tiny+good",)
    alone = evaluate(tiny, sums, plugin, "alone")
    report = compare_runs(alone, run)
    assert [(one.arm, one.difference) for one in report.differences] == [
        ("base", 0.0),
        ("bad", -1.0),
        ("good", 0.0),
        ("half", -0.5),
    ]
    # The other way round the same arms, named by the side that has several.
    back = compare_runs(run, alone)
    assert [(one.arm, one.difference) for one in back.differences][1] == ("bad", 1.0)


def test_a_claimed_difference_shows_in_the_means_and_no_verdict_hides_that_prompts_differ() -> None:
    common: dict[str, Any] = {"task": "story", "metric": "reward", "unit": "logit"}
    rows = [
        Row(model="m", adapter=label, scorer="s", n=9, mean=mean, ci95=(3.0, 4.0), step=label or "base", **common)
        for label, mean in ((None, 3.9931), ("a", 3.993103), ("b", 3.9931))
    ]
    sides = {"variant_a": "raw", "variant_b": "raw", "higher_is_better": True, "primary": True}
    better = {"arm": "a", "difference": 3e-6, "ci_adjusted": (1e-6, 5e-6), "ci95": (2e-6, 4e-6), "p_adjusted": 0.01}
    allowed = {"arm": "b", "difference": 0.0, "p_adjusted": 1.0, "prompts_differ": "raw in A, chat in B"}
    report = Report(
        harness="0",
        rows=tuple(rows),
        arms=({"label": None}, {"label": "a"}, {"label": "b"}),
        differences=(
            Difference(verdict="better", **better, **common, **sides),
            Difference(verdict="no difference shown", **allowed, **common, **sides),
        ),
    )
    lines = [line.replace("\\", "") for line in markdown_lines(report)]
    # At five decimals 3.9931 and 3.993103 are one number; the interval is the one that goes with the adjusted p.
    assert "| base | – | 3.993100 |" in lines[2] and "| a | better | 3.993103 |" in lines[3]
    assert "| +3.0e-06 | [1.0e-06, 5.0e-06] | 0.010 |" in lines[3] and "| interval (Holm) | p (Holm) |" in lines[0]
    assert "| b | no difference shown (prompts differ) |" in lines[4]


def test_what_cannot_be_compared_is_refused(tiny: Path, sums: Path, plugin: Path, adapters: Path) -> None:
    alone = evaluate(tiny, sums, plugin, "alone")
    with pytest.raises(UserError) as caught:
        compare_runs(alone)
    assert str(caught.value) == (
        "alone: has one arm, so there is nothing to compare within it\n"
        "  Give a second run, or evaluate the base too: harness eval --with-base --adapter A --adapter B."
    )
    pair = [adapters / "bad", adapters / "half"]
    without = evaluate(tiny, sums, plugin, "without", adapters=pair, with_base=False)
    with pytest.raises(UserError, match="without: has no arm without an adapter"):
        compare_runs(without)
    assert load_report(without).differences == () if write_reports(without) else False
    for seed, name in enumerate(("x", "y"), start=7):
        tiny_adapter(Path("others") / name, tiny, seed=seed)
    others = evaluate(tiny, sums, plugin, "others-run", adapters=["others"], with_base=False)
    with pytest.raises(
        UserError, match=r"have no arm in common\n  Arms of the first: bad, half; of the second: x, y\."
    ):
        compare_runs(without, others)


def test_an_arm_that_has_not_ended_holds_the_comparison_back(run: Path) -> None:
    (folder,) = run.glob("steps/scores-tiny+half-*")
    (folder / "status.json").unlink()
    report = write_reports(run)
    assert report.differences == ()
    assert "tiny+half, sums:raw: not finished; the same command continues it." in report.notes


def test_a_run_written_before_there_were_arms_still_reads(tiny: Path, sums: Path, plugin: Path, adapters: Path) -> None:
    root = evaluate(tiny, sums, plugin, "old", adapter=str(adapters / "half"))
    plan = json.loads((root / "plan.json").read_text())
    del plan["arms"]
    for task in plan["tasks"]:
        del task["arm"]
    harness.steps.files.write_json(root / "plan.json", plan)
    found = open_run(root)
    assert found.arms == (found,) and found.label == "half"
    assert [row.mean for row in write_reports(root).rows] == [0.5]
    assert evaluate(tiny, sums, plugin, "old", adapter=str(adapters / "half")) == root


# ------------------------------------------------------------------------------------------------- own templates


@pytest.fixture
def bare(tiny: Path, sums: Path, alone: Path) -> Path:
    """A base without a template beside adapters: `a` and `b` bring two different ones, `c` brings none."""
    folder = alone / "bare"
    shutil.copytree(tiny, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for seed, name in enumerate(("a", "b", "c"), start=1):
        adapter = tiny_adapter(alone / "arms" / name, folder, seed=seed)
        template = "{{ bos_token }}{% for m in messages %}" + "Human: " * seed + "{{ m['content'] }}{% endfor %}"
        if name != "c":
            (adapter / "chat_template.jinja").write_text(template)
    task = (sums / "sums.yaml").read_text().replace("prompt: raw", "prompt: auto")
    (sums / "sums.yaml").write_text(task)
    return folder


def planned(root: Path) -> dict[str, list[tuple[str, str]]]:
    """Tasks and answers steps by arm."""
    found: dict[str, list[tuple[str, str]]] = {}
    for task in json.loads((root / "plan.json").read_text())["tasks"]:
        found.setdefault(task["arm"], []).append((f"{task['task']}:{task['variant']}", task["answers"]))
    return found


def test_the_base_is_asked_what_each_of_its_arms_is_asked(bare: Path, sums: Path, plugin: Path) -> None:
    root = evaluate(bare, sums, plugin, "out", adapters=["arms"], limit=2)
    found = planned(root)
    assert {arm: [name for name, _ in tasks] for arm, tasks in found.items()} == {
        "bare": ["sums:raw"],
        "bare (template of a)": ["sums:chat"],
        "bare (template of b)": ["sums:chat"],
        "bare+a": ["sums:chat"],
        "bare+b": ["sums:chat"],
        "bare+c": ["sums:raw"],
    }
    asked, configs = {}, {}
    for step in sorted(root.glob("steps/answers-*")):
        described = json.loads((step / "step.json").read_text())
        rows = harness.steps.journal.read_rows(root / "requests" / described["requests"])
        asked[described["arm"]] = [row["requests"][0]["prompt_ids"] for row in rows]
        configs[described["arm"]] = described["identity"]
    for base, arm in (("bare", "c"), ("bare (template of a)", "a"), ("bare (template of b)", "b")):
        assert asked[base] == asked[f"bare+{arm}"] and configs[base] == {**configs[f"bare+{arm}"], "adapter": None}
    assert len({str(asked[f"bare+{arm}"]) for arm in "abc"}) == 3
    report = write_reports(root)
    assert [(one.arm, one.variant_a, one.variant_b, one.difference, one.notes) for one in report.differences] == [
        ("a", "chat", "chat", 0.0, ()),
        ("b", "chat", "chat", 0.0, ()),
        ("c", "raw", "raw", 0.0, ()),
    ]
    assert compare_runs(root).only_a == ()


def test_steps_are_the_same_alone_and_in_company(bare: Path, sums: Path, plugin: Path) -> None:
    together = planned(evaluate(bare, sums, plugin, "out", adapters=["arms"], limit=2))
    for name in "abc":
        alone = planned(evaluate(bare, sums, plugin, f"out-{name}", adapter=f"arms/{name}", limit=2))
        assert alone == {f"bare+{name}": together[f"bare+{name}"]}
    assert planned(evaluate(bare, sums, plugin, "out-base", limit=2)) == {"bare": together["bare"]}


def test_a_raw_task_is_asked_of_the_base_as_it_is(bare: Path, sums: Path, plugin: Path) -> None:
    """Only what an arm is asked in chat needs a template; `--with-base` beside one arm is no exception."""
    root = evaluate(bare, sums, plugin, "out", tasks=["sums:raw"], adapters=["arms"], limit=2)
    assert [arm for arm in planned(root) if "+" not in arm] == ["bare"]
    both = evaluate(bare, sums, plugin, "both", tasks=["sums", "sums:raw"], adapter="arms/b", with_base=True, limit=2)
    assert {arm: [name for name, _ in tasks] for arm, tasks in planned(both).items()} == {
        "bare": ["sums:raw"],
        "bare (template of b)": ["sums:chat"],
        "bare+b": ["sums:chat", "sums:raw"],
    }
    assert planned(both)["bare"] == planned(root)["bare"]
    found = compare_runs(both)
    assert [(one.variant_a, one.variant_b) for one in found.differences] == [("raw", "raw"), ("chat", "chat")]
    assert (found.only_a, found.only_b) == ((), ())


def test_every_row_names_its_prompt(bare: Path, sums: Path, plugin: Path) -> None:
    root = evaluate(bare, sums, plugin, "out", adapters=["arms"], limit=2)
    report = write_reports(root)
    arms = {arm["name"]: arm["template_digest"] for arm in json.loads((root / "plan.json").read_text())["arms"]}
    assert [row.template for row in report.rows] == [arms.get(name) for name in arms]
    assert "asked in the chat template of b, as the base has none" in report.rows[2].notes
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    console.print(terminal_table(report))
    lines = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    for named in ("base raw", "base (template of a) chat", "base (template of b) chat", "a chat", "b chat", "c raw"):
        assert sum(line.startswith(f"{named} 1.000 2") for line in lines) == 1, lines
    text = (root / "report" / "report.md").read_text()
    assert "| sums:chat | exact_match ↑ | base (template of a) | – | 1.000 |" in text
    page = (root / "report" / "report.html").read_text()
    templates = [arms[name] for name in arms if arms[name]]
    assert all(f"chat template {template[:12]}" in page for template in templates)


def test_two_runs_of_one_base_pair_its_rows_by_template(bare: Path, sums: Path, plugin: Path) -> None:
    many = evaluate(bare, sums, plugin, "many", adapters=["arms"], limit=2)
    two = evaluate(bare, sums, plugin, "two", adapters=["arms/a", "arms/b"], limit=2)
    report = compare_runs(many, two)
    assert {(one.arm, one.variant_a, one.variant_b) for one in report.differences} == {
        (arm, "chat", "chat") for arm in ("base", "a", "b")
    }
    assert report.only_a == ("base, sums:raw", "bare+c") and report.only_b == ()
    assert all(one.prompts_differ is None for one in report.differences)


def test_an_older_run_with_a_raw_base_gives_no_verdict(bare: Path, sums: Path, plugin: Path) -> None:
    """Before, the base was asked raw beside arms in chat: such a run is reported, without a comparison."""
    shutil.rmtree("arms/b")
    shutil.rmtree("arms/c")
    root = evaluate(bare, sums, plugin, "out", adapters=["arms"], with_base=True, limit=2)
    raw = evaluate(bare, sums, plugin, "raw", limit=2)
    for kind in ("steps", "requests"):
        shutil.copytree(raw / kind, root / kind, dirs_exist_ok=True)
    plans = [json.loads((folder / "plan.json").read_text()) for folder in (root, raw)]
    plan = {
        **plans[0],
        "arms": [plans[1]["arms"][0], plans[0]["arms"][1]],
        "tasks": [plans[1]["tasks"][0], plans[0]["tasks"][1]],
    }
    for task in plan["tasks"]:
        del task["template"]
    harness.steps.files.write_json(root / "plan.json", plan)
    report = write_reports(root)
    (one,) = report.differences
    assert (one.verdict, one.difference, one.p_adjusted) == ("not comparable", None, None)
    assert "sums (raw → chat): not comparable: raw in A, chat in B (A: the base)" in report.notes
    assert "not comparable" in (root / "report" / "report.md").read_text()
    assert compare_runs(root, allow_prompt_mismatch=True).differences[0].difference == 0.0


# -------------------------------------------------------------------------------------------------- command line


def test_the_command_line(cli: Any, tiny: Path, sums: Path, plugin: Path, adapters: Path) -> None:
    command = ["eval", "--model", tiny, "--tasks", sums, "--task", "sums", "--engine", "adding", "--plugin", plugin]
    ran = cli(*command, "--adapter", adapters / "bad", "--adapter", adapters / "half", "--out", "two")
    assert ran.code == 0, ran.err
    assert "tiny and 2 adapters" in ran.out and "sums (raw), 3 arms: 90/90" in ran.err
    ran = cli("compare", "two", "--fail-if-worse", "--show", "1")
    assert ran.code == 4 and "bad, sums:raw" in ran.out
    # Of equal changes the first by id: `bad` gets all sums wrong, `half` every second one.
    changed = [line for line in ran.out.splitlines() if "1.000 → 0.000" in line]
    assert changed == [
        "s0  bad, sums:raw exact_match  1.000 → 0.000",
        "s1  half, sums:raw exact_match  1.000 → 0.000",
    ]
    assert "B (2 arms)" not in ran.out
    ran = cli("compare", "two", "--json")
    assert [one["arm"] for one in json.loads(ran.out)["differences"]] == ["bad", "half"]
    ran = cli(*command, "--adapter", adapters / "bad", "--out", "one")
    assert ran.code == 0 and "tiny + bad" in ran.out
    ran = cli(*command, "--adapter", adapters, "--no-base", "--out", "three")
    assert ran.code == 0 and "tiny and 3 adapters" in ran.out and "- base" in ran.out
    assert json.loads(Path("three/plan.json").read_text())["arm"] == "tiny+3-adapters"
    ran = cli(*command, "--parity", "0")
    assert (ran.code, ran.err) == (2, "error: --parity: 0 is no positive number\n  Give 1 or more, or leave it out.\n")
    ran = cli(*command, "--max-judge-cost", "-1")
    assert ran.err == "error: --max-judge-cost: -1 is negative\n  Give 0 or more, or leave it out.\n"
    ran = cli(*command, "--adapter", sums)
    assert ran.code == 2 and "adapter_config.json is not in that folder" in ran.err


def test_a_board_says_of_one_run_what_its_report_says(run: Path) -> None:
    board, report = build_board([run]), compare_runs(run)
    (column,) = board.columns
    assert [row.name for row in board.rows] == ["tiny", "bad", "good", "half"]
    found = [cell.difference for row in board.rows[1:] if (cell := row.cells[column.key]) is not None]
    told = [(one.difference, one.p_value, one.p_adjusted, one.verdict, one.test) for one in found if one is not None]
    same = report.differences
    assert told == [(one.difference, one.p_value, one.p_adjusted, one.verdict, one.test) for one in same]
    assert [one.ci95 for one in found if one is not None] == [one.ci95 for one in same]
    assert [one.ci_adjusted for one in found if one is not None] == [one.ci_adjusted for one in same]
    assert [row.cells[column.key].mean for row in board.rows] == [1.0, 0.0, 1.0, 0.5]

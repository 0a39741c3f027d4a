"""`harness judge` as a user meets it: numbers, JSON, messages; and calibration against a real HTTP judge."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from harness.core.records import Metric
from harness.judges import calibrate
from harness.judges.figures import Seen, correlation, figures, slope, verdict

sys.path.insert(0, str(Path(__file__).parents[1]))
fake: ModuleType = importlib.import_module("judge_server")

SHARED = os.environ.get("HARNESS_SHARED")
shared = pytest.mark.skipif(SHARED is None, reason="HARNESS_SHARED is not set")
DATA = Path(SHARED or ".") / "data" / "alpaca_eval"
SHOWN = re.compile(r'"output": """(.*?)"""\n {4}\}', re.DOTALL)


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with fake.judge_server() as server:
        yield server


def rows(n: int, model: str = "new", won: Any = lambda i: i % 3 == 0) -> list[dict[str, Any]]:
    return [
        {
            "instruction": f"{model}, ask {i}",
            "output_1": "reference " + "r" * (i % 7),
            "output_2": "model " + "m" * (i % 11),
            "generator_1": "base",
            "generator_2": model,
            "annotator": "weighted_alpaca_eval_gpt4_turbo",
            "preference": 2.0 if won(i) else 1.0,
        }
        for i in range(n)
    ]


def file(value: Any, name: str = "annotations.json") -> Path:
    Path(name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return Path(name)


# ------------------------------------------------------------------------------------------------------------ winrate


def test_winrate_for_machines(cli: Any) -> None:
    ran = cli("judge", "winrate", file([{"preference": one} for one in (1, 2, 1.5, 1.25)]), "--json")
    assert ran.code == 0 and not ran.err
    found = json.loads(ran.out)
    assert found["win_rate"] == 43.75 and found["standard_error"] == pytest.approx(21.3478, abs=5e-5)
    assert (found["n_total"], found["n_wins"], found["n_wins_base"], found["n_draws"]) == (4, 1, 2, 1)
    assert found["length_controlled_winrate"] is None
    assert "it needs the published difficulty" in found["length_control"]["withheld"]


def test_winrate_for_people(cli: Any) -> None:
    made = rows(4)
    made[2]["preference"] = None
    ran = cli("judge", "winrate", file(made))
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert lines[0] == ("new against base, judged by weighted_alpaca_eval_gpt4_turbo: 3 pairs scored, 1 unscored")
    # Wins 1, 0, 1: mean 2/3, standard error sqrt(1/9).
    assert lines[1] == "win rate                    66.67 %, standard error 33.33"
    assert lines[3].startswith("length-controlled win rate  withheld: it needs the published difficulty of every")
    assert "wins, draws, losses         2, 0, 1" in lines
    assert "unscored: 1 x no verdict (null)" in lines


def test_winrate_mistakes(cli: Any) -> None:
    def says(*arguments: Any) -> str:
        ran = cli("judge", "winrate", *arguments)
        assert ran.code == 2 and not ran.out and "Traceback" not in ran.err
        return str(ran.err)

    assert says("nowhere.json") == "error: nowhere.json: no such file\n  Give the path of an annotations file.\n"
    assert says() == (
        "error: harness judge winrate: no annotations are given\n"
        "  Give a file; or --model, --weights and --difficulty for a published length-controlled win rate.\n"
    )
    assert says(file(rows(2)), "--model", "old") == (
        "error: --model: unknown generator 'old'\n  Known: base, new. All: `annotations.json`.\n"
    )
    weights = file(",a,b,c\nx,1,2,3\n", "w.csv")
    assert "no column 'np.tanh(std_delta_len)'" in says(
        file(rows(2)), "--weights", weights, "--difficulty", file("index,instruction_difficulty\n0,1\n", "d.csv")
    )
    assert says(file(rows(2)), "--weights", weights, "--gamed", weights).startswith("error: --gamed: is for a fit")


@shared
def test_winrate_of_published_annotations(cli: Any) -> None:
    tables = ["--weights", DATA / "length_controlled_v1_weights.csv"]
    tables += ["--difficulty", DATA / "instruction_difficulty.csv"]
    path = DATA / "alpaca-7b" / "weighted_alpaca_eval_gpt4_turbo.annotations.json"
    found = json.loads(cli("judge", "winrate", path, *tables, "--json").out)
    assert found["win_rate"] == pytest.approx(2.591451, abs=5e-7)
    assert found["length_controlled_winrate"] == pytest.approx(5.875487, abs=5e-7)
    assert (found["length_control"]["glm"], found["length_control"]["withheld"]) == ("published weights", None)
    itself = ["--model", "alpaca-7b", "--reference", "alpaca-7b"]
    assert json.loads(cli("judge", "winrate", *itself, *tables, "--json").out)["length_controlled_winrate"] == 50.0
    alone = json.loads(cli("judge", "winrate", "--model", "dbrx-instruct", *tables, "--json").out)
    assert alone["notes"] == ["the published leaderboard has a value that is 0.19 points away, for dbrx-instruct alone"]


# ---------------------------------------------------------------------------------------------------------- calibrate


def first_token(share_of_first: float) -> Any:
    return fake.first_token({"m": math.log(max(share_of_first, 1e-9)), "M": math.log(max(1 - share_of_first, 1e-9))})


def test_a_judge_that_agrees_with_the_published_verdicts(cli: Any, judge: Any) -> None:
    won = lambda i: i % 3 == 0  # noqa: E731
    made = rows(30, won=won)
    best = {one["output_2"] if won(i) else one["output_1"] for i, one in enumerate(made)}
    by_text = {f"new, ask {i}": ("model" if won(i) else "reference") for i in range(30)}

    def say(body: dict[str, Any], attempt: int) -> Any:
        text = body["messages"][-1]["content"]
        asked = re.search(r'"instruction": """(.*?)"""', text)
        assert asked is not None and best
        return first_token(0.95 if SHOWN.findall(text)[0].startswith(by_text[asked[1]]) else 0.05)

    judge.say = say
    ran = cli("judge", "calibrate", file(made), "--judge", judge.url, "--out", "out", "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert (found["n_pairs"], found["n_unscored"], found["judge"]) == (30, 0, "stub-judge")
    # Wilson for 30 of 30: 30 / (30 + 1.96**2).
    assert found["agreement"] == {
        "value": 1.0,
        "n": 30,
        "low": pytest.approx(30 / (30 + 3.8415), abs=1e-4),
        "high": 1.0,
    }
    assert found["kappa"]["value"] == 1.0
    assert found["position_flips"]["value"] == 0.0 and found["repeat_agreement"]["value"] == 1.0
    assert found["first_preferred"]["value"] == pytest.approx(0.5)
    assert found["models"][0]["published_win_rate"]["value"] == pytest.approx(1 / 3)
    # Both orders and once again: three questions for each pair.
    assert len(judge.asked) == 90
    assert json.loads(Path("out/calibration.json").read_text())["agreement"]["n"] == 30
    again = cli("judge", "calibrate", file(made), "--judge", judge.url, "--out", "out", "--json")
    assert len(judge.asked) == 90 and json.loads(again.out) == found


def test_a_judge_that_likes_the_first_place(cli: Any, judge: Any) -> None:
    judge.say = lambda body, attempt: first_token(1.0)
    ran = cli("judge", "calibrate", file(rows(12)), "--judge", judge.url, "--out", "out")
    assert ran.code == 0, ran.err
    # Wilson for 12 of 12: 12 / (12 + 1.96**2) = 0.7575.
    assert "verdicts that follow the place when swapped       1.000 [0.758, 1.000]  n = 12" in ran.out
    assert "mean preference for the first place (0.5: none)   1.000 [1.000, 1.000]  n = 12" in ran.out


def test_what_a_judge_cannot_say_is_counted(cli: Any, judge: Any) -> None:
    def say(body: dict[str, Any], attempt: int) -> Any:
        if 'ask 1"' in body["messages"][-1]["content"]:
            return fake.first_token({"Neither": -0.1})
        return first_token(0.7)

    judge.say = say
    ran = cli("judge", "calibrate", file(rows(5)), "--judge", judge.url, "--out", "out", "--json", "--limit", "4")
    found = json.loads(ran.out)
    assert (found["n_pairs"], found["n_unscored"]) == (4, 1)
    assert found["unscored"] == {"neither m nor M is among the judge's likeliest first tokens": 1}
    assert {figure["n"] for name, figure in found.items() if name in ("agreement", "repeat_agreement")} == {3}


def test_several_models_correlate(cli: Any, judge: Any) -> None:
    # The judge prefers the model's output where the text says so: other shares than the published ones, in one order.
    files = []
    for number, name in enumerate(("a", "b", "c", "d")):
        made = rows(10, name, won=lambda i, number=number: i < 2 * number)
        files.append(file(made, f"{name}.json"))

    def say(body: dict[str, Any], attempt: int) -> Any:
        text = body["messages"][-1]["content"]
        model, number = re.findall(r'"instruction": """(\w), ask (\d)"""', text)[0]
        wins = int(number) < 2 * "abcd".index(model) + 1
        first = SHOWN.findall(text)[0].startswith("model")
        return first_token(1.0 if first == wins else 0.0)

    judge.say = say
    ran = cli("judge", "calibrate", *files, "--judge", judge.url, "--out", "out", "--json")
    found = json.loads(ran.out)
    # Published 0, 0.2, 0.4, 0.6; by the judge 0.1, 0.3, 0.5, 0.7: a straight line.
    assert [model["judge_win_rate"]["value"] for model in found["models"]] == pytest.approx([0.1, 0.3, 0.5, 0.7])
    assert found["win_rate_correlation"]["value"] == pytest.approx(1.0)


def test_calibrate_mistakes(cli: Any, judge: Any) -> None:
    def says(*arguments: Any) -> str:
        ran = cli("judge", "calibrate", "--out", "out", *arguments)
        assert ran.code == 2 and not ran.out and "Traceback" not in ran.err
        return str(ran.err[ran.err.index("error: ") :])

    assert says(file(rows(2)), "--judge", "nowhere/at/all").startswith("error: scorer alpaca_eval, model")
    empty = [{"preference": 1.0}, {"preference": 2.0}]
    assert says(file(empty), "--judge", judge.url) == (
        "error: harness judge calibrate: no pair has a verdict and both outputs\n  Give other annotations.\n"
    )
    made = rows(2)
    Path("taken").write_text("a file")
    assert says(file(rows(2)), "--judge", judge.url, "--out", "taken") == (
        "error: --out taken: no folder can be made there: File exists\n  Give another.\n"
    )
    assert "unknown key 'colour'" in says(file(made), "--judge", judge.url, "--set", "colour=red")
    for one in made:
        one["annotator"] = "my own"
    assert says(file(made), "--judge", judge.url).startswith(
        "error: scorer alpaca_eval, annotator: the alpaca-eval package has no judge configuration 'my own'"
    )
    assert not judge.asked


def test_a_limit_of_cost(cli: Any, judge: Any) -> None:
    # A question is bounded by its bytes, somewhat under 2,000, and so by 2 USD; a reply turns out to cost 0.6 USD.
    usage = {"usage": {"prompt_tokens": 500, "completion_tokens": 100}}
    judge.say = lambda body, attempt: {**first_token(0.7), **usage}
    command = ["judge", "calibrate", file(rows(6)), "--judge", judge.url, "--out", "out"]
    command += ["--set", "price_input=1000", "--set", "price_output=1000", "--set", "concurrency=1"]
    ran = cli(*command, "--max-judge-cost", "4")
    assert ran.code == 3 and "max_cost: judging has cost" in ran.err and "Traceback" not in ran.err
    done = len(judge.asked)
    assert 3 <= done <= 6
    assert cli(*command, "--max-judge-cost", "100").code == 0
    assert len(judge.asked) == 18


def test_killed_in_the_middle_and_gone_on(alone: Path, judge: Any) -> None:
    gate, seen = threading.Event(), threading.Event()

    def say(body: dict[str, Any], attempt: int) -> Any:
        if len(judge.asked) > 7 and not gate.is_set():
            seen.set()
            gate.wait(30)
        return first_token(0.7)

    judge.say = say
    file(rows(6))
    command = [sys.executable, "-m", "harness.cli.app", "judge", "calibrate", "annotations.json", "--judge", judge.url]
    command += ["--out", "out", "--json", "--set", "concurrency=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert seen.wait(60)
        process.send_signal(signal.SIGKILL)
        process.wait()
    gate.set()
    before = len(judge.asked)
    done = subprocess.run(command, capture_output=True, check=True, timeout=120)
    assert json.loads(done.stdout)["agreement"]["n"] == 6
    # Seven replies had arrived; the one in flight is asked again.
    assert len(judge.asked) - before == 18 - 7


# ---------------------------------------------------------------------------------------------------------- agreement


def test_agreement_with_people(cli: Any, alone: Path) -> None:
    run_folder = runpy.run_path(str(Path(__file__).parents[1] / "run_folder.py"))["RunFolder"]
    metric = Metric(name="attack_success", higher_is_better=False, unit="proportion", low=0.0, high=1.0)
    judged = {
        f"s{i}": {"value": float(said), "answer": "x", "detail": {"verdicts": {"llm": said}}}
        for i, said in enumerate((True, True, False, False))
    }
    run = run_folder(alone / "run")
    run.task("t", judged, [{"metric": "attack_success", "n": 4}], metrics=(metric,), scorer="attack")
    run.write_plan()
    labels = file("id,label\ns0,harmful\ns1,safe\ns2,safe\ns3,safe\n", "labels.csv")
    ran = cli("judge", "agreement", "run", "--human-labels", labels, "--json")
    assert ran.code == 0, ran.err
    [found] = json.loads(ran.out)["judges"]
    # Three of four agree; by chance 2/4 x 1/4 + 2/4 x 3/4 = 0.5.
    assert (found["agreement"]["value"], found["kappa"]["value"]) == (0.75, 0.5)
    assert "agrees with people on 75.0% of 4" in cli("judge", "agreement", "run", "--human-labels", labels).out
    refused = cli("judge", "agreement", "run", "--human-labels", "none.csv")
    assert refused.code == 2 and "error: --human-labels none.csv: cannot be read" in refused.err


# ------------------------------------------------------------------------------------------------------ the arithmetic


def seen(published: float, drawn: float, longer: float = 0.0, model: str = "m") -> Seen:
    return Seen(model, published, longer, drawn, drawn, drawn, drawn)


def test_kappa_by_hand() -> None:
    # Of 10: both say model 4 times, both reference 3, published alone 1, the judge alone 2.
    pairs = [(1, 1)] * 4 + [(0, 0)] * 3 + [(1, 0)] + [(0, 1)] * 2
    found = figures([seen(a, b) for a, b in pairs])
    assert found["agreement"].value == 0.7
    # p_e = (5 x 6 + 5 x 4) / 100 = 0.5: (0.7 - 0.5) / 0.5.
    assert found["kappa"].value == pytest.approx(0.4)
    low, high = found["kappa"].low, found["kappa"].high
    assert low is not None and high is not None and low < 0.4 < high <= 1


def test_length_by_hand() -> None:
    pairs = [seen(1, 1, 10), seen(0, 1, 10), seen(1, 0, -10), seen(1, 1, 0)]
    found = figures(pairs)
    # Longer is the model, the model, the reference: preferred by the judge each time; equal lengths are left out.
    assert (found["longer_preferred"].value, found["longer_preferred"].n) == (1.0, 3)
    assert found["longer_preferred_published"].value == pytest.approx(1 / 3)
    assert found["length_slope"].value is None, "length and the verdicts are separated"


def test_a_slope_by_hand() -> None:
    # At -1 a quarter, at +1 three quarters: log-odds from -log 3 to log 3, so the slope is log 3.
    pairs = [(-1.0, 1.0)] + [(-1.0, 0.0)] * 3 + [(1.0, 0.0)] + [(1.0, 1.0)] * 3
    assert slope(pairs) == pytest.approx(math.log(3))
    assert slope([(1.0, 0.3), (1.0, 0.7)]) is None


def test_correlation_by_hand() -> None:
    assert correlation([(0, 0), (1, 1), (2, 0)]) == pytest.approx(0)
    assert correlation([(0, 1), (1, 0)]) == pytest.approx(-1)
    assert correlation([(1, 0), (1, 1)]) is None


def test_verdicts() -> None:
    assert [verdict(share) for share in (0.0, 0.49, 0.5, 0.51)] == ["reference", "reference", "draw", "model"]


def test_nothing_gives_no_figures() -> None:
    found = figures([Seen("m", 1.0, 3.0)])
    assert {figure.value for figure in found.values()} == {None} and {figure.n for figure in found.values()} == {0}
    assert calibrate.SCORER == "alpaca_eval"

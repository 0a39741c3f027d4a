"""The command line as its users meet it: what it prints, what it imports, how it ends."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from judge_server import judge_server

HEAVY = ("torch", "transformers", "vllm", "datasets", "lm_eval", "peft", "trl", "pandas")

OBSERVER = """
from harness import hookimpl

@hookimpl
def step_started(step):
    open("seen", "a").write(f"started {step.kind}\\n")

@hookimpl
def step_finished(record):
    open("seen", "a").write(f"finished {record.kind} {record.status}\\n")
    raise ValueError("I only watch")

@hookimpl
def study_finished(run):
    open("seen", "a").write(f"run {run.name}\\n")
    raise ValueError("I only watched")
"""

BROKEN_SCORER = """
from harness import AnswerScorer, Metric, hookimpl

class Broken(AnswerScorer):
    name = "broken"

    def metrics(self, config):
        return (Metric(name="broken", higher_is_better=True, unit="score"),)

    def score(self, sample, answer, config):
        return [][len(sample.id)]

@hookimpl
def register_scorers():
    yield Broken()
"""


ROWS_OF_ONES_OWN = """
from harness import Dataset, hookimpl

class Own(Dataset):
    name = "rows_of_ones_own"
    schema = "pairs"

    def rows(self, job):
        return iter(())

@hookimpl
def register_datasets():
    yield Own()
"""


def heavy_after(*commands: list[str], where: Path) -> dict[str, list[str]]:
    """Which heavy packages each command has imported, run one after another in a fresh interpreter."""
    script = (
        "import json, sys\n"
        "from harness.cli import app as cli\n"
        "found = {}\n"
        f"for command in {commands!r}:\n"
        "    sys.argv = ['harness', *command]\n"
        "    try:\n"
        "        cli.main()\n"
        "    except SystemExit as ended:\n"
        f"        heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "        found[command[0]] = [ended.code, *heavy]\n"
        "print('RESULT ' + json.dumps(found))\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], cwd=where, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    last = ran.stdout.splitlines()[-1]
    found: dict[str, list[str]] = json.loads(last.removeprefix("RESULT "))
    return found


def test_nothing_heavy_is_imported(cli: Any, slow_eval: list[str], alone: Path) -> None:
    """--help, lists, reports, comparisons; and an evaluation that is done already."""
    assert cli(*slow_eval, "--out", "a").code == 0
    assert cli(*slow_eval, "--out", "b", "--seed", "1").code == 0
    lists = [["--help"], ["tasks"], ["plugins"], ["doctor"]]
    found = heavy_after(*lists, ["report", "a"], ["compare", "a", "b"], [*slow_eval, "--out", "a"], where=alone)
    assert {name: heavy for name, (_, *heavy) in found.items() if heavy} == {}
    assert {name: code for name, (code, *_) in found.items() if name != "doctor"} == dict.fromkeys(
        ("--help", "tasks", "plugins", "report", "compare", "eval"), 0
    )


def test_a_finished_evaluation_with_a_real_engine_opens_nothing(cli: Any, tiny: Path, sums: Path, alone: Path) -> None:
    command = ["eval", "--model", str(tiny), "--tasks", str(sums), "--task", "sums", "--engine", "transformers"]
    command += ["--out", "out", "--limit", "4"]
    assert cli(*command).code == 0
    assert heavy_after(command, where=alone) == {"eval": [0]}


def test_what_a_pipe_gets(cli: Any, slow_eval: list[str]) -> None:
    ran = cli(*slow_eval, "--out", "out")
    assert ran.code == 0
    assert "\x1b" not in ran.out + ran.err
    assert "\r" not in ran.err
    lines = ran.err.splitlines()
    assert lines[:4] == [
        "engine slow (asked for)",
        "preparing sums (raw)",
        "sums (raw): 0/30",
        f"loading {_model(slow_eval)}",
    ]
    assert lines[4].startswith("sums (raw): 30/30, ")
    assert lines[-1].startswith("seconds: ")
    assert ran.out.splitlines()[-1] == "out/report/report.html"
    # 20 of 30 are right: see slow_engine.py.
    assert "0.667" in ran.out
    pages = {"report.html", "samples.html", "samples", "arms", "figures", "pages.json"}
    assert {"report.json", "report.md"} | pages == {file.name for file in Path("out/report").iterdir()}


def test_a_step_of_which_every_call_failed_is_failed_and_done_again(
    cli: Any, sums: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789abcdef")
    with judge_server() as server:
        command = ["eval", "--model", server.url, "--tasks", sums, "--task", "sums", "--out", "out", "--limit", "16"]
        command += ["--set", "engine.retries=0"]
        server.say = lambda body, attempt: (500, {"error": {"message": "down for Bearer sk-0123456789abcdef"}})
        for _ in range(2):
            ran = cli(*command)
            assert ran.code == 3
            why = "most often because: HTTP 500: down for Bearer [secret] (1 attempts)"
            assert f"error: answers: none of 16 samples has an answer, {why}\n  The same command asks again." in ran.err
        assert len(server.asked) == 32
        server.say = lambda body, attempt: {
            "choices": [{"text": "Bearer sk-0123456789abcdef", "finish_reason": "stop"}]
        }
        # Retried from here on: a busy machine may refuse a connection.
        assert cli(*command, "--set", "engine.retries=5").code == 0
        assert len(server.asked) == 48
    kept = [gzip.decompress(file.read_bytes()) for file in Path("out").rglob("*.gz")]
    kept += [file.read_bytes() for file in Path("out").rglob("*") if file.is_file()]
    assert any(b"[secret]" in data for data in kept)
    assert not any(b"0123456789abcdef" in data for data in kept)


@pytest.mark.parametrize("address", ["http://user:hunter2xyz@host/v1", "http://host/v1?api_key=hunter2xyz"])
def test_credentials_in_an_address_are_refused_and_nowhere_shown(cli: Any, sums: Path, address: str) -> None:
    command = ["eval", "--tasks", sums, "--task", "sums", "--out", "out"]
    for more in (["--model", address], ["--model", "m", "--engine", "openai", "--set", f"engine.base_url={address}"]):
        ran = cli(*command, *more)
        assert ran.code == 2
        assert "hunter2xyz" not in ran.out + ran.err
    # A plan keeps every option, used or not.
    unused = f"dangerous_qa.scorer.llm.model={address}"
    ran = cli(*command, "--model", "http://127.0.0.1:9/v1", "--set", unused)
    assert ran.code == 2 and "hunter2xyz" not in ran.out + ran.err
    assert ran.err.startswith("error: --set dangerous_qa.scorer.llm.model: the address holds a user, a password")
    ran = cli(*command, "--model", address)
    assert ran.err.startswith("error: --model: the address holds a user, a password or a query (@, ? or #); addresses ")
    assert "`export OPENAI_API_KEY=...`" in ran.err
    assert not Path("out").exists()


def _model(command: list[str]) -> str:
    return Path(command[command.index("--model") + 1]).name


def test_the_default_folder_is_found_again(cli: Any, slow_eval: list[str], alone: Path) -> None:
    assert cli(*slow_eval).code == 0
    assert cli(*slow_eval).err == "engine slow (asked for)\neverything was done before\n"
    assert cli(*slow_eval, "--limit", "3").code == 0
    assert len(list((alone / "runs").iterdir())) == 2


def test_rows_have_what_the_issue_names(cli: Any, slow_eval: list[str], alone: Path) -> None:
    assert cli(*slow_eval, "--out", "out").code == 0
    (row,) = json.loads((alone / "out" / "report" / "report.json").read_text(encoding="utf-8"))["rows"]
    named = "model adapter task metric n n_unscored n_truncated mean stderr ci95 higher_is_better chance"
    assert set(named.split()) <= set(row)
    assert (row["task"], row["metric"], row["n"], row["mean"]) == ("sums", "exact_match", 30, 20 / 30)


def test_a_scorer_that_raises_fails_its_step_alone(cli: Any, slow_eval: list[str], sums: Path, alone: Path) -> None:
    (alone / "broken.py").write_text(BROKEN_SCORER, encoding="utf-8")
    text = (sums / "sums.yaml").read_text(encoding="utf-8")
    (sums / "bad.yaml").write_text(
        text.replace("name: sums\n", "name: bad\n").replace("exact_match", "broken"), encoding="utf-8"
    )
    command = [*slow_eval, "--task", "bad", "--plugin", "broken.py", "--out", "out"]
    ran = cli(*command)
    assert ran.code == 3
    assert "IndexError: list index out of range (at broken.py:11, in score)" in ran.err
    assert "Traceback" not in ran.err
    report = json.loads((alone / "out" / "report" / "report.json").read_text(encoding="utf-8"))
    assert [row["task"] for row in report["rows"]] == ["sums"]
    assert {task["task"]: task["status"] for task in report["tasks"]} == {"sums": "done", "bad": "failed"}
    (status,) = (alone / "out").glob("steps/scores-*-bad-*/status.json")
    record = json.loads(status.read_text(encoding="utf-8"))
    assert record["status"] == "failed"
    assert "IndexError" in record["error"]
    # The same command tries the failed step again, on the answers that are there; mended, it succeeds.
    again = cli(*command)
    assert again.code == 3
    assert "bad: all 30 answers were stored before" in again.err
    mended = BROKEN_SCORER.replace("[][len(sample.id)]", "__import__('harness').Score({'broken': 1.0})")
    (alone / "broken.py").write_text(mended, encoding="utf-8")
    assert cli(*command).code == 0
    report = json.loads((alone / "out" / "report" / "report.json").read_text(encoding="utf-8"))
    assert [(row["task"], row["mean"]) for row in report["rows"]] == [("sums", 20 / 30), ("bad", 1.0)]


def test_where_every_step_failed(cli: Any, slow_eval: list[str], sums: Path, alone: Path) -> None:
    (alone / "broken.py").write_text(BROKEN_SCORER, encoding="utf-8")
    text = (sums / "sums.yaml").read_text(encoding="utf-8")
    (sums / "sums.yaml").write_text(text.replace("exact_match", "broken"), encoding="utf-8")
    ran = cli(*slow_eval, "--plugin", "broken.py", "--out", "out")
    assert ran.code == 3
    assert ran.err.splitlines()[-1].startswith("error: scores-")
    assert "IndexError: list index out of range" in ran.err.splitlines()[-1]


def test_observers_watch_and_change_nothing(cli: Any, slow_eval: list[str], alone: Path) -> None:
    (alone / "observer.py").write_text(OBSERVER, encoding="utf-8")
    ran = cli(*slow_eval, "--plugin", "observer.py", "--out", "out")
    assert ran.code == 0
    seen = (alone / "seen").read_text(encoding="utf-8").splitlines()
    assert seen == ["started answers", "finished answers done", "started scores", "finished scores done", "run out"]
    assert ran.err.count("observer.py' raised in step_finished: ValueError: I only watch") == 2
    assert ran.err.count("observer.py' raised in study_finished: ValueError: I only watched") == 1
    assert ran.err.count("warning: observer ") == 3
    assert "0.667" in ran.out


def test_a_fault_of_ours_keeps_its_traceback(cli: Any, slow_eval: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: object, **__: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("harness.evaluation.run.evaluate", fault)
    with pytest.raises(ZeroDivisionError, match="ours"):
        cli(*slow_eval)


def test_from_python(
    slow_eval: list[str], tiny: Path, sums: Path, alone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same from Python: silent, and the records come back."""
    from harness import evaluate, load_plugins

    registry = load_plugins([slow_eval[slow_eval.index("--plugin") + 1]])
    evaluation = evaluate(
        str(tiny), tasks=["sums"], task_folders=[str(sums)], engine="slow", registry=registry, out="out", limit=9
    )
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
    assert (evaluation.rows[0].n, evaluation.rows[0].mean) == (9, 6 / 9)
    frame = evaluation.to_pandas()
    assert list(frame["task"]) == ["sums"]
    assert frame["mean"][0] == 6 / 9


def test_nothing_that_is_said_steers_the_terminal(cli: Any, slow_eval: list[str], sums: Path, alone: Path) -> None:
    """Neither an option, nor the name of a file, nor what a YAML file of somebody else says of itself."""
    ran = cli("eval", "--model", "\x1b[31mred")
    assert (ran.code, "\x1b" in ran.err, "⟨U+001B⟩[31mred" in ran.err) == (2, False, True)
    ran = cli("eval", "--model", "x", "--seed", "\x1b[31mred")
    assert (ran.code, "\x1b" in ran.err) == (2, False)
    text = (sums / "sums.yaml").read_text(encoding="utf-8")
    (sums / "sums.yaml").write_text(f'{text}\nlicence: "\\x1b]0;owned\\a"\n', encoding="utf-8")
    ran = cli("tasks", "--tasks", str(sums))
    assert (ran.code, "\x1b" in ran.out, "⟨U+001B⟩]0;owned⟨U+0007⟩" in ran.out) == (0, False, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "a\udcff"], "'a\\udcff': is not UTF-8\n  Give names and texts in UTF-8."),
        (["report", "~nobody-here/x"], "~nobody-here/x: there is no such user\n  Give a path."),
        (["report", "./~nobody-here"], "./~nobody-here: there is no such user\n  Give a path."),
        (["report", "x" * 300], f"{'x' * 300}: cannot be used: File name too long\n  Give another path."),
        (["eval", "--model", "x", "--seed", "-1"], "harness eval, seed: Input should be greater than"),
        (["eval", "--model", "MODEL", "--task", "lm_eval:"], "--task lm_eval:, name: String should match pattern"),
        (["align", "dpo", "--model", "x", "--dataset", "x", "--seed", "-1"], "harness align, seed: Input should be"),
        (["align", "dpo", "--model", "x", "--dataset", "x", "--set", "learning_rate=1e999"], "be a finite number"),
    ],
)  # fmt: skip
def test_what_no_command_can_take(cli: Any, tiny: Path, arguments: list[str], message: str) -> None:
    ran = cli(*(str(tiny) if one == "MODEL" else one for one in arguments))
    assert (ran.code, message in ran.err) == (2, True), ran.err


def test_data_list_knows_the_plugins_of_the_users_defaults(
    cli: Any, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As eval, align and merge do: what can be trained on can be looked at."""
    Path("own.py").write_text(ROWS_OF_ONES_OWN, encoding="utf-8")
    assert "rows_of_ones_own" not in {row["name"] for row in json.loads(cli("data", "list", "--json").out)}
    Path("mine.yaml").write_text("plugins: [own.py]\n", encoding="utf-8")
    monkeypatch.setenv("HARNESS_CONFIG", "mine.yaml")
    assert "rows_of_ones_own" in {row["name"] for row in json.loads(cli("data", "list", "--json").out)}

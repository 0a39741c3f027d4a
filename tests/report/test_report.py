from __future__ import annotations

import hashlib
import io
import json
import re
import runpy
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from harness.core.errors import CorruptionError, UserError
from harness.core.records import Metric, StepRecord
from harness.core.text import clip, number, portable, visible
from harness.report.build import load_report, terminal_table, write_reports
from harness.report.read import StepFolders, open_run, read_step
from harness.report.text import escape_markdown
from harness.steps.files import write_json
from harness.steps.step import Step
from harness.steps.store import RunStore
from tests.damage import HARMS

_helper = runpy.run_path(str(Path(__file__).parents[1] / "run_folder.py"))
RunFolder, ACC, TOX = _helper["RunFolder"], _helper["ACC"], _helper["TOX"]

HOSTILE = {
    "script": "</script><script>document.title='pwned'</script>",
    "pre": "</pre></details></main><h1>free</h1><img src=x onerror=\"document.title='pwned'\">",
    "style": "</style><style>*{display:none}</style><svg onload=alert(1)>",
    "comment": "--> <!-- ]]> <![CDATA[ {{ 7*7 }} {% raw %} &lt;b&gt; &amp;",
    "bidi": "abc\u202egnp.exe \u2066isolated\u2069 \u200f\u061c",
    "control": "\x00\x00\x00 \x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b2J \x08 \r over",
    "separators": "line\u2028and\u2029paragraph \ufeff \ufffe",
    "surrogate": "\ud800 alone",
    "markup": "[red]rich[/red] [link=https://evil.example]x[/link] `code` | pipe **bold**",
}
CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufffe\ud800-\udfff]"
)


def row(metric: str = "acc", **fields: Any) -> dict[str, Any]:
    return {"metric": metric, "n": 4, "mean": 0.5, "stderr": 0.28867513459481287, "ci95": (0.15, 0.85), **fields}


def small_run(root: Path) -> Path:
    """Two tasks: `quiz` by log-likelihood (4 samples, 2 leaves) and `story`, whose answers are hostile."""
    run = RunFolder(root)
    choices = [(" A", -1.5), (" B", -0.25)]
    samples = {
        f"q{k}": {
            "value": float(k % 2),
            "leaf": f"leaf{k // 2}",
            "prompt": f"question {k}",
            "target": "B",
            "choices": choices,
        }
        for k in range(4)
    }
    leaves = [row(leaf=f"leaf{k}", n=2, chance=0.25) for k in range(2)]
    run.task("quiz", samples, [row(chance=0.25, n_truncated=1), *leaves], source="a book", licence="MIT", limit=2)
    answers = {
        name: {"value": float(k) - 3, "prompt": f"once {text}", "answer": text}
        for k, (name, text) in enumerate(HOSTILE.items())
    }
    answers["none"] = {"value": None, "answer": "", "reason": "the classifier said NaN", "hit_limit": True}
    fields = {"unit": "logit", "n": len(HOSTILE), "n_unscored": 1, "n_truncated": 1, "mean": 1.0, "ci95": (-1.0, 3.0)}
    run.task(
        "story",
        answers,
        [row("toxicity", **fields)],
        metrics=(TOX,),
        scorer="toxicity",
        variant="chat",
        decoding={"max_new_tokens": 128, "temperature": 0.0},
        notes=["greedy is our choice"],
        counts={"samples": 10, "dropped: no text": 3},
    )
    return run.write_plan()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return small_run(tmp_path / "run")


def printed(run: Path, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(terminal_table(write_reports(run)))
    return console.file.getvalue()


# --------------------------------------------------------------------------------------------------------------- json


def test_rows_are_whole_tasks_and_leaves_stand_apart(run: Path) -> None:
    report = write_reports(run)
    data = json.loads((run / "report" / "report.json").read_text())
    assert [(r["task"], r["metric"], r["n"], r["n_truncated"]) for r in data["rows"]] == [
        ("quiz", "acc", 4, 1),
        ("story", "toxicity", 9, 1),
    ]
    wanted = "model adapter task metric n n_unscored n_truncated mean stderr ci95 higher_is_better chance step notes"
    assert set(wanted.split()) <= set(data["rows"][0])
    assert data["rows"][0]["ci95"] == [0.15, 0.85] and data["rows"][0]["chance"] == 0.25
    assert [r["leaf"] for r in data["leaves"]] == ["leaf0", "leaf1"]
    assert data["schema_version"] == 1 and data["spec"]["seed"] == 0 and data["engine"]["name"] == "transformers"
    assert load_report(run) == report
    frame = report.to_pandas()
    assert list(frame["mean"]) == [0.5, 1.0] and len(report.to_pandas(leaves=True)) == 4


def test_provenance_names_versions_steps_and_digests(run: Path) -> None:
    report = write_reports(run)
    assert report.provenance["versions"] == {"harness": ["0.1.0"], "torch": ["2.13.0"]}
    assert report.provenance["facts"] == {"numerics": [1]}
    assert [step["kind"] for step in report.provenance["steps"]] == ["answers", "scores"] * 2
    assert report.provenance["steps"][1]["seconds"] == {"load": 1.5, "compute": 2.25}
    assert report.model["weights_digest"] == hashlib.sha256(b"tiny").hexdigest()


def test_how_answers_were_drawn(run: Path) -> None:
    quiz, story = write_reports(run).tasks
    assert (quiz.asks, quiz.decoding) == ("loglikelihood", None)
    assert (story.asks, story.decoding) == ("generate", {"max_new_tokens": 128, "temperature": 0.0})
    assert story.dropped == {"no text": 3}
    text = (run / "report" / "report.md").read_text()
    assert "nothing is generated: log-likelihoods" in text and "max\\_new" not in text and "max_new_tokens 128" in text
    assert "left out: 3 rows: no text" in text


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a report by its path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_reports_are_rebuilt_byte_for_byte_and_hold_no_path(run: Path, tmp_path: Path) -> None:
    plan = json.loads((run / "plan.json").read_text())
    plan["spec"]["model"]["model"] = str(tmp_path / "models" / "tiny")
    write_json(run / "plan.json", plan)
    write_reports(run)
    first = files_of(run / "report")
    shutil.rmtree(run / "report")
    moved = run.rename(tmp_path / "elsewhere")
    assert write_reports(moved).spec["model"]["model"] == "tiny"
    assert files_of(moved / "report") == first
    assert {"report.json", "report.md", "report.html", "samples.html", "arms/tiny.html", "figures/bars.svg"} <= set(
        first
    )
    assert not any(str(tmp_path).encode() in data for data in first.values())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/data/models/tiny", "tiny"),
        ("cannot open '/a/b/c.txt': gone", "cannot open 'c.txt': gone"),
        ("~/models/x and C:\\Users\\me\\y", "x and y"),
        ("https://host.example/a/b", "https://host.example/a/b"),
        ("owner/name and and/or", "owner/name and and/or"),
        ("1 / 2", "1 / 2"),
    ],
)
def test_folders_are_taken_off_absolute_paths(text: str, expected: str) -> None:
    assert portable({"key": [text]}) == {"key": [expected]}


def test_a_failed_and_an_unfinished_step_are_named_and_the_rest_is_reported(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.task("good", {"a": {"value": 1.0}}, [row(n=1, mean=1.0)])
    folder.task("bad", {"a": {"value": 1.0}}, [], state="failed")
    folder.task("late", {"a": {"value": 1.0}}, [], state="running")
    report = write_reports(folder.write_plan())
    assert [r.task for r in report.rows] == ["good"]
    assert [task.status for task in report.tasks] == ["done", "failed", "unfinished"]
    assert any("bad:raw" in note and "failed: the scorer's model judge is gone" in note for note in report.notes)
    assert "late:raw: not finished; the same command continues it." in report.notes


def test_a_withheld_mean_is_shown_nowhere_and_the_reason_everywhere(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    why = "7 of 10 samples are unscored"
    fields = {"n": 3, "n_unscored": 7, "mean": None, "stderr": None, "ci95": None, "withheld": why}
    folder.task("judged", {"a": {"value": None, "reason": "no verdict"}}, [row(**fields)])
    run = folder.write_plan()
    assert "withheld" in printed(run) and why in printed(run)
    for name in ("report.md", "report.html", "report.json"):
        assert why in (run / "report" / name).read_text()


# ------------------------------------------------------------------------------------------------------------ hostile


def test_every_control_and_format_character_becomes_visible() -> None:
    hidden = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    for code in range(0x110000):
        char = chr(code)
        if unicodedata.category(char) in hidden or code & 0xFFFE == 0xFFFE:
            assert visible(char) == f"⟨U+{code:04X}⟩"
    assert visible("Grüße, 世界 🙂 -- é") == "Grüße, 世界 🙂 -- é"
    assert visible("a\tb\r\nc\x00\x00\x00", lines=True) == "a\tb\nc⟨U+0000 ×3⟩"


def test_terminal_markdown_and_json_are_free_of_control_characters(tmp_path: Path) -> None:
    nasty = "x\x1b[2J\u202e[red]|`<b>"
    folder = RunFolder(tmp_path / "run", model=nasty)
    folder.task("t", {"a": {"value": 1.0}}, [row(n=1, mean=1.0, notes=(nasty,))], notes=[nasty], source=nasty)
    run = folder.write_plan()
    table = printed(run)
    assert "[red]" in table and "⟨U+001B⟩[2J⟨U+202E⟩" in table
    for text in (table, (run / "report" / "report.md").read_text(), (run / "report" / "report.json").read_text()):
        assert CONTROL.search(text) is None
    title = (run / "report" / "report.md").read_text().splitlines()[0]
    assert title == "# x⟨U+001B⟩\\[2J⟨U+202E⟩\\[red\\]\\|\\`\\<b\\>"


def test_markdown_escapes_markup_but_leaves_names_readable() -> None:
    assert escape_markdown("real_toxicity | _a_ *b*\n# c") == "real_toxicity \\| \\_a\\_ \\*b\\*⟨U+000A⟩\\# c"


def test_markdown_tables_have_one_cell_per_column(run: Path) -> None:
    write_reports(run)
    lines = [line for line in (run / "report" / "report.md").read_text().splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {10}
    assert "| quiz:raw | acc ↑ | 0.500 | \\[0.150, 0.850\\] | 0.289 | 0.250 | 4 | 0 | 1 |" in lines


# ------------------------------------------------------------------------------------------------------------ numbers


def test_numbers_keep_what_three_decimals_would_hide() -> None:
    shown = [number(value) for value in (None, 0.0, 0.25, -1.23456, 0.00012, 12345.67)]
    assert shown == ["–", "0.000", "0.250", "-1.235", "1.2e-04", "12,345.7"]


def test_the_terminal_table_fits_in_80_columns(run: Path) -> None:
    lines = printed(run).splitlines()
    assert max(len(line) for line in lines) <= 80
    assert any(re.search(r"quiz:raw\s+0\.500\s+\[0\.150, 0\.850\]\s+0\.250\s+4\s+0\s+1", line) for line in lines)


# ------------------------------------------------------------------------------------------------------------ samples


def test_a_published_run_without_texts_is_reported_without_them(run: Path) -> None:
    whole = write_reports(run)
    shutil.rmtree(run / "requests")
    for file in run.glob("steps/answers-*/artifact/*"):
        file.unlink()
    assert write_reports(run).rows == whole.rows


def test_long_texts_are_clipped_and_say_so() -> None:
    assert clip("x" * 10, 10) == "x" * 10
    assert clip("a" * 50 + "b" * 50, 10, tail=0.5) == "aaaaa […90 characters left out…] bbbbb"


# ------------------------------------------------------------------------------------------------------------- damage


def test_damaged_records_are_named(run: Path) -> None:
    file = next(run.glob("steps/scores-*/artifact/samples.jsonl.gz"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    with pytest.raises(CorruptionError, match=r"samples\.jsonl\.gz: a torn batch of \d+ bytes"):
        write_reports(run)
    file.unlink()
    with pytest.raises(CorruptionError, match="is missing, though its step has ended"):
        write_reports(run)
    other = next(path for path in run.glob("steps/scores-*/artifact/samples.jsonl.gz") if path != file)
    shutil.copy(other, file)
    with pytest.raises(CorruptionError, match=r"does not hold what status\.json recorded"):
        write_reports(run)
    file.write_bytes(whole)
    answers = next(run.glob("steps/answers-*/artifact/answers.jsonl.gz"))
    answers.write_bytes(answers.read_bytes()[:-9])
    with pytest.raises(CorruptionError, match=r"answers\.jsonl\.gz: damaged"):
        write_reports(run)


@pytest.mark.parametrize("harm", HARMS)
def test_a_report_prints_no_number_of_a_damaged_record(cli: Any, run: Path, harm: str) -> None:
    """Exit 2, the file named, and neither `report` nor `compare` prints anything."""
    for pattern in ("steps/scores-*/artifact/scores.json", "steps/*/step.json", "steps/*/status.json", "plan.json"):
        file = sorted(run.glob(pattern))[0]
        before = file.read_bytes()
        HARMS[harm](file)
        for command in (["report", run], ["compare", run, run]):
            ran = cli(*command)
            if harm == "delete" and file.name in ("step.json", "status.json"):
                # The step has not ended, and says so.
                assert "not finished" in ran.out if command[0] == "report" else "unfinished" in ran.err
            elif harm == "delete" and file.name == "plan.json":
                assert (ran.code, ran.err[:7]) == (2, "error: ") and "it has no plan.json" in ran.err
            else:
                assert (ran.code, ran.out) == (2, ""), (file, command)
                assert ran.err.startswith(f"error: {file}: ")
        file.write_bytes(before)


def test_what_an_earlier_stage_left_lies_beside_the_artefact(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    folder = store.step("align", "arm", "ab" * 32)
    folder.begin(Step("align", "ab" * 32, "arm", {}), {}, {})
    file = folder.path / "stages" / "control" / "trained.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"weights")
    named = {"stages/control/trained.safetensors": hashlib.sha256(b"weights").hexdigest()}
    folder.finish(StepRecord(id="ab" * 32, kind="align", status="done", files=named))
    assert read_step(StepFolders(tmp_path), "align", "ab" * 32).done
    for change in (lambda: file.write_bytes(b"others"), file.unlink):
        change()
        with pytest.raises(CorruptionError, match=re.escape(f"{file}: does not hold what")):
            read_step(StepFolders(tmp_path), "align", "ab" * 32)


def test_a_changed_mean_is_not_printed_with_the_old_interval(cli: Any, run: Path) -> None:
    """Also where the file's own checksum was mended, or is of a version that wrote none."""
    file = next(run.glob("steps/scores-*/artifact/scores.json"))
    stored = json.loads(file.read_text())
    stored["rows"][0]["mean"] = 0.123
    for text in (file.read_text().replace("}", "} ", 1), json.dumps(stored), None):
        file.write_text(text) if text is not None else write_json(file, stored)
        ran = cli("report", run)
        assert (ran.code, ran.out) == (2, "")
        assert ran.err == (f"error: {file}: does not hold what status.json recorded; run the same command again\n")


def test_a_folder_that_is_no_run_is_refused_with_near_matches(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        open_run(tmp_path / "runn")
    assert str(caught.value) == (
        f"{tmp_path / 'runn'}: there is no such folder\n"
        f"  Did you mean '{run}'? Give a folder that `harness eval --out` wrote, or a log of "
        "lm-eval, inspect or AlpacaEval."
    )
    with pytest.raises(UserError, match=r"is not a run: it has no plan\.json") as caught:
        open_run(tmp_path)
    assert f"Did you mean '{run}'?" in caught.value.fix
    with pytest.raises(UserError) as caught:
        open_run(run / "steps")
    assert f"Did you mean '{run}'?" in caught.value.fix


def test_a_step_of_another_id_is_not_taken_for_the_plan_s(run: Path) -> None:
    folder = next(run.glob("steps/scores-*"))
    record = json.loads((folder / "step.json").read_text())
    write_json(folder / "step.json", {**record, "id": record["id"][:12] + "0" * 52})
    assert "unfinished" in {task.status for task in write_reports(run).tasks}


# --------------------------------------------------------------------------------------------------------------- doors


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, harness.report.build, harness.report.compare\n"
    code += "print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "datasets", "vllm", "scipy", "numpy", "pandas", "rich", "jinja2"} & set(loaded)


def test_step_record_without_digest_is_accepted(run: Path) -> None:
    for status in run.glob("steps/scores-*/status.json"):
        record = StepRecord.model_validate(json.loads(status.read_text()))
        write_json(status, record.model_copy(update={"digest": None}).model_dump(mode="json"))
    assert len(write_reports(run).rows) == 2


def test_secondary_metrics_stay_out_of_the_first_table(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    side = Metric(name="side", higher_is_better=False, unit="proportion", primary=False)
    samples = {"a": {"values": {"acc": 1.0, "side": 0.0}}}
    folder.task(
        "t",
        samples,
        [row(n=1, mean=1.0), row("side", n=1, mean=0.0, primary=False, higher_is_better=False)],
        metrics=(ACC, side),
    )
    run = folder.write_plan()
    assert "side" not in printed(run)
    body = (run / "report" / "report.html").read_text().partition("<body>")[2]
    assert ">side " not in body
    assert ">side ↓<" in (run / "report" / "arms" / "tiny.html").read_text()
    assert [r.metric for r in load_report(run).rows] == ["acc", "side"]

"""Files that no longer hold what was written: detected, said, and only what was lost is computed again."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from harness.contracts.registry import load_plugins
from harness.core.progress import Reporter
from harness.core.specs import EvalSpec, ModelSpec
from harness.evaluation.plan import plan_eval
from harness.evaluation.run import run_plan
from harness.steps.journal import Journal, read_members, read_rows
from harness.tasks.catalog import load_catalog
from tests.damage import HARMS, files_of, one_by_one

BATCH, N = 4, 30
FILES = {
    "answers": "steps/answers-*/artifact/answers.jsonl.gz",
    "samples": "steps/scores-*/artifact/samples.jsonl.gz",
    "scores": "steps/scores-*/artifact/scores.json",
    "requests": "requests/*.jsonl.gz",
}


def the(out: Path, pattern: str) -> Path:
    (file,) = out.glob(pattern)
    return file


def numbers(out: Path) -> tuple[bytes, list[dict[str, Any]]]:
    rows = read_rows(the(out, FILES["answers"]))
    return the(out, FILES["scores"]).read_bytes(), sorted(rows, key=lambda row: str(row["item"]))


@pytest.fixture
def run(cli: Any, slow_eval: list[str], alone: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Any]:
    """The evaluation of the sums into a folder; ``calls`` beside it counts what the model was asked."""

    def evaluate(out: Path, *more: str) -> Any:
        (alone / "calls").unlink(missing_ok=True)
        monkeypatch.setenv("SLOW_CALLS", str(alone / "calls"))
        return cli(*slow_eval, "--out", out, *more)

    return evaluate


@pytest.fixture
def finished(run: Any, alone: Path) -> Path:
    assert run(alone / "finished").code == 0
    return alone / "finished"


def asked(alone: Path) -> int:
    file = alone / "calls"
    return len(file.read_text(encoding="utf-8").splitlines()) if file.exists() else 0


def unfinished(out: Path) -> None:
    """As if the process had died after the last batch."""
    for status in out.glob("steps/*/status.json"):
        status.unlink()
    shutil.rmtree(the(out, "steps/scores-*"))


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 0x41
    file.write_bytes(data)


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("place", ["first byte", "within a batch", "between batches", "all but one byte"])
def test_torn_answers(run: Any, finished: Path, alone: Path, ended: bool, place: str) -> None:
    before = numbers(finished)
    file = the(finished, FILES["answers"])
    members, _ = read_members(file)
    ends = [sum(len(raw) for raw, _ in members[: k + 1]) for k in range(len(members))]
    offset, kept = {
        "first byte": (1, 0),
        "within a batch": (ends[2] + 20, 3),
        "between batches": (ends[4], 5),
        "all but one byte": (ends[-1] - 1, len(members) - 1),
    }[place]
    os.truncate(file, offset)
    if not ended:
        unfinished(finished)
    ran = run(finished)
    assert ran.code == 0
    assert numbers(finished) == before
    assert asked(alone) == N - kept * BATCH
    torn = offset - (ends[kept - 1] if kept else 0)
    if torn:
        said = f"found a torn batch of {torn} bytes at the end; what was lost was asked again"
    else:
        said = f"answers.jsonl.gz holds {kept * BATCH} of {N} answers; it is done again where needed"
    if torn or ended:
        assert said in ran.err
    if ended and torn:
        assert f"answers.jsonl.gz is damaged (a torn batch of {torn} bytes at the end)" in ran.err


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("member", [0, 3, 7])
def test_a_flipped_byte_costs_one_batch(run: Any, finished: Path, alone: Path, ended: bool, member: int) -> None:
    before = numbers(finished)
    file = the(finished, FILES["answers"])
    members, _ = read_members(file)
    assert len(members) == 8
    start = sum(len(raw) for raw, _ in members[:member])
    flip(file, start + len(members[member][0]) // 2)
    if not ended:
        unfinished(finished)
    ran = run(finished)
    assert ran.code == 0
    assert numbers(finished) == before
    assert asked(alone) == len(members[member][1])
    kind = "a torn batch" if member == 7 else "1 corrupted batch(es)"
    assert kind in ran.err
    assert "what was lost was asked again" in ran.err
    assert run(finished).err == "engine slow (asked for)\neverything was done before\n"


def torn_json(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def other_number(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert '"mean": 0.6666666666666666' in text
    file.write_text(text.replace('"mean": 0.6666666666666666', '"mean": 0.9666666666666666'), encoding="utf-8")


@pytest.mark.parametrize(
    ("pattern", "harm", "said"),
    [
        ("plan.json", torn_json, None),
        ("plan.json", Path.unlink, None),
        ("steps/answers-*/status.json", torn_json, None),
        ("steps/scores-*/status.json", torn_json, None),
        ("steps/answers-*/step.json", torn_json, "step.json is damaged"),
        ("steps/scores-*/step.json", torn_json, "step.json is damaged"),
        ("steps/scores-*/step.json", Path.unlink, "step.json is missing"),
        ("steps/answers-*/provenance.json", torn_json, "provenance.json is damaged"),
        (FILES["scores"], torn_json, "scores.json is not what was recorded"),
        (FILES["scores"], other_number, "scores.json is not what was recorded"),
        (FILES["scores"], Path.unlink, "scores.json is missing"),
        (FILES["samples"], torn_json, "samples.jsonl.gz is damaged"),
        (FILES["samples"], Path.unlink, "samples.jsonl.gz is not what was recorded"),
        (FILES["requests"], torn_json, "is missing or damaged"),
        (FILES["requests"], Path.unlink, "is missing or damaged"),
        ("report/report.json", torn_json, None),
    ],
)
def test_every_other_file_is_made_again_from_the_answers(
    run: Any, finished: Path, alone: Path, pattern: str, harm: Callable[[Path], None], said: str | None
) -> None:
    before = numbers(finished)
    requests = read_rows(the(finished, FILES["requests"]))
    harm(the(finished, pattern))
    ran = run(finished)
    assert ran.code == 0, ran.err
    assert numbers(finished) == before
    assert read_rows(the(finished, FILES["requests"])) == requests
    assert asked(alone) == 0
    if said is not None:
        assert said in ran.err
        assert "it is done again where needed" in ran.err
    json.loads((finished / "plan.json").read_text(encoding="utf-8"))
    report = json.loads((finished / "report" / "report.json").read_text(encoding="utf-8"))
    assert report["rows"][0]["n"] == N
    assert run(finished).err == "engine slow (asked for)\neverything was done before\n"


PER_STEP = {"step.json", "provenance.json", "status.json", "log.jsonl"}
IN_A_RUN = {
    ".lock",
    "plan.json",
    "requests/*.jsonl.gz",
    *(f"steps/answers-*/{name}" for name in (*PER_STEP, "artifact/answers.jsonl.gz")),
    *(f"steps/scores-*/{name}" for name in (*PER_STEP, "artifact/scores.json", "artifact/samples.jsonl.gz")),
    "report/*",
}
UNHARMED = {
    ".lock": "the id of the process that wrote last; a lock is held by the process, not by the file",
    "log.jsonl": "a diary for people: no number and no decision is read from it",
    "report/": "holds nothing of its own and is written anew from the records by every command",
}


@pytest.mark.parametrize("harm", HARMS)
def test_every_file_of_a_run_is_named_when_it_is_damaged(slow_eval: list[str], finished: Path, harm: str) -> None:
    """By the same evaluation again; which then makes it again, asking the model nothing that is stored."""
    said: list[str] = []
    reporter = Reporter()
    reporter.note = said.append  # type: ignore[method-assign]
    registry = load_plugins([slow_eval[slow_eval.index("--plugin") + 1]])
    tasks = slow_eval[slow_eval.index("--tasks") + 1]
    model = ModelSpec(model=slow_eval[slow_eval.index("--model") + 1])
    spec = EvalSpec(model=model, tasks=("sums",), task_folders=(tasks,), engine="slow")
    plan = plan_eval(spec, registry, load_catalog(registry, [tasks]))
    before = numbers(finished)
    names = files_of(finished)
    patterns = {pattern: [name for name in names if fnmatch(name, pattern)] for pattern in IN_A_RUN}
    assert sorted(found for one in patterns.values() for found in one) == sorted(names)
    for name in one_by_one(finished, harm):
        said.clear()
        run_plan(plan, registry, finished, reporter=reporter)
        assert numbers(finished) == before
        file = Path(name).name
        # A step without status.json has not ended, as after a kill: it is carried out from what is stored.
        if any(name.startswith(one) or file == one for one in UNHARMED) or (file, harm) == ("status.json", "delete"):
            assert not [line for line in said if "damaged" in line or "missing" in line]
        else:
            assert any(file in line and "again" in line for line in said), (name, said)


def test_a_damaged_plan_of_another_run_is_refused(run: Any, finished: Path) -> None:
    torn_json(finished / "plan.json")
    ran = run(finished, "--limit", "3")
    assert ran.code == 2
    assert ran.err == (
        f"error: --out {finished}: plan.json is damaged, and no step is this evaluation's\n"
        "  Give another --out, or --fresh.\n"
    )
    assert run(finished, "--limit", "3", "--fresh").code == 0


def test_a_full_disk(run: Any, alone: Path, monkeypatch: pytest.MonkeyPatch, finished: Path) -> None:
    before = numbers(finished)
    append, batches = Journal.append, []

    def full(journal: Journal, rows: Any) -> None:
        if len(batches) == 3:
            with monkeypatch.context() as patch:
                patch.setattr(os, "fstat", lambda descriptor: _raise(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
                append(journal, rows)
        batches.append(rows)
        append(journal, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", full)
        ran = run(alone / "full")
    assert ran.code == 2
    assert "the disk is full" in ran.err.splitlines()[-2]
    assert ran.err.splitlines()[-1].lstrip().endswith("run the same command again.")
    assert "Traceback" not in ran.err
    assert len(read_rows(the(alone / "full", FILES["answers"]))) == 3 * BATCH
    assert run(alone / "full").code == 0
    assert asked(alone) == N - 3 * BATCH
    assert numbers(alone / "full") == before


def _raise(error: Exception) -> Any:
    raise error


@pytest.mark.parametrize("name", ["step.json", "scores.json", "status.json", "report.html", "samples.jsonl.gz"])
def test_a_full_disk_at_any_file(
    run: Any, alone: Path, monkeypatch: pytest.MonkeyPatch, finished: Path, name: str
) -> None:
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        ran = run(alone / "full")
    assert ran.code == 2
    assert "the disk is full" in ran.err
    assert "Free some space and run the same command again." in ran.err
    assert not list((alone / "full").rglob("*.tmp"))
    assert run(alone / "full").code == 0
    assert numbers(alone / "full") == numbers(finished)


def test_weights_that_changed_in_place(run: Any, alone: Path, tiny: Path, slow_eval: list[str], cli: Any) -> None:
    """Same path, same size, modification time set back."""
    model = alone / "model"
    shutil.copytree(tiny, model)
    slow_eval[slow_eval.index("--model") + 1] = str(model)
    weights, out = model / "model.safetensors", alone / "out"
    time.sleep(2.1)  # so that the first digest is remembered
    assert cli(*slow_eval, "--out", out).code == 0
    first = json.loads((out / "plan.json").read_text(encoding="utf-8"))["model"]["weights_digest"]
    stat = weights.stat()
    flip(weights, stat.st_size - 1)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert weights.stat().st_size == stat.st_size
    ran = cli(*slow_eval, "--out", out)
    assert ran.code == 2
    from harness.core.specs import ModelSpec
    from harness.models.inspect import inspect_model

    second = inspect_model(ModelSpec(model=str(model))).weights_digest
    assert first != second
    assert ran.err == (
        f"error: --out {out}: holds a run of model with weights {first[:12]}; its weights are now {second[:12]}\n"
        "  Give another --out, or --fresh to delete what it holds and start over.\n"
    )
    assert cli(*slow_eval, "--out", out, "--fresh").code == 0
    assert json.loads((out / "plan.json").read_text(encoding="utf-8"))["model"]["weights_digest"] == second


def test_failed_calls_of_an_endpoint_are_asked_again(run: Any, sums: Path, alone: Path) -> None:
    """A failed call is unscored, never 0; the next run asks for it again, and for nothing else."""
    rows = [{"id": f"s{i}", "a": i, "b": 1} for i in range(20)]
    lines = [json.dumps(row) + "\n" for row in rows]
    (sums / "sums.jsonl").write_text("".join(lines), encoding="utf-8")
    yaml = (sums / "sums.yaml").read_text(encoding="utf-8")
    stuck = "{{ a }}+{{ b }}{% if a == 7 %}?{% endif %}="
    (sums / "sums.yaml").write_text(yaml.replace("{{ a }}+{{ b }}=", stuck), encoding="utf-8")
    out = alone / "calls-failed"
    assert run(out).code == 0
    assert asked(alone) == 20
    (row,) = json.loads(the(out, FILES["scores"]).read_text(encoding="utf-8"))["rows"]
    # 0, 3, 6, 9, 12, 15, 18 are wrong: 12 of the 19 that were answered are right. 1 of 20 is 5 %, not above it.
    assert (row["n"], row["n_unscored"], row["mean"]) == (19, 1, 12 / 19)
    samples = {row["id"]: row for row in read_rows(the(out, FILES["samples"]))}
    assert samples["s7"]["values"] == {"exact_match": None}
    assert samples["s7"]["reason"] == "the abacus is stuck"
    ran = run(out)
    assert ran.code == 0
    assert "1 of 20 calls of the endpoint failed; it is done again where needed" in ran.err
    assert asked(alone) == 1


def test_another_scorer_never_asks_the_model_again(run: Any, finished: Path, alone: Path) -> None:
    ran = run(finished, "--set", "sums.scorer.strip=false")
    assert ran.code == 0
    assert asked(alone) == 0
    assert "sums: all 30 answers were stored before" in ran.err
    assert len(list(finished.glob("steps/answers-*"))) == 1
    assert len(list(finished.glob("steps/scores-*"))) == 2


def test_another_engine_code_is_another_step(slow_eval: list[str], cli: Any, alone: Path) -> None:
    loose = alone / "slow_engine.py"
    shutil.copy(slow_eval[slow_eval.index("--plugin") + 1], loose)
    slow_eval[slow_eval.index("--plugin") + 1] = str(loose)
    assert cli(*slow_eval, "--out", "out").code == 0
    loose.write_text(loose.read_text(encoding="utf-8") + "# changed\n", encoding="utf-8")
    ran = cli(*slow_eval, "--out", "out")
    assert ran.code == 2
    assert "the YAML, data or code of task sums, or the engine's code, changed" in ran.err


def test_a_run_can_be_moved_with_its_tasks_and_its_model(
    cli: Any, slow_eval: list[str], alone: Path, tiny: Path, sums: Path
) -> None:
    """No id hangs on a path: everything moved elsewhere, the run goes on."""
    assert cli(*slow_eval, "--out", "out").code == 0
    away = alone / "away"
    away.mkdir()
    shutil.copytree(tiny, away / "tiny")
    shutil.move(sums, away / "tasks")
    shutil.move(alone / "out", away / "out")
    text = "".join(p.read_text(encoding="utf-8") for p in (away / "out").rglob("*.json*") if p.suffix != ".gz")
    assert str(alone) not in text
    moved = [
        str(away / "tiny") if part == str(tiny) else str(away / "tasks") if part == str(sums) else part
        for part in slow_eval
    ]
    ran = cli(*moved, "--out", away / "out")
    assert ran.err == "engine slow (asked for)\neverything was done before\n"

"""An evaluation in worker processes: the rows and the answers of one process, whatever dies on the way."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import harness
from harness import Event, Execution, ExecutorContext, InProcessPool, Order, WorkerContext
from harness.contracts.registry import load_plugins
from harness.core.errors import UserError
from harness.core.progress import Reporter
from harness.evaluation import worker
from harness.report.build import write_reports
from harness.steps.execute import Execute, Job
from harness.steps.lock import FolderLock
from harness.steps.orders import RelayObservers
from harness.steps.runner import Runner
from harness.testing import tiny_adapter
from tests.e2e.test_killed import start, wait_for

TWO = ["--set", "executor.workers=2"]
FRAIL = '''
"""An engine that answers with prompt and adapter, and ends its process where an adapter is named in the file FRAIL."""
import os
from pathlib import Path
from harness import Availability, Capabilities, Engine, Output, Session, hookimpl


class FrailSession(Session):
    def batches(self, requests):
        return [list(range(start, min(start + 4, len(requests)))) for start in range(0, len(requests), 4)]

    def run(self, requests):
        doomed = Path("frail").read_text().split() if Path("frail").exists() else []
        if any(str(one.adapter) in doomed for one in requests):
            os._exit(9)
        with Path("asked").open("a") as stream:
            stream.writelines(f"{one.adapter}\\n" for one in requests)
        return [Output(f"{one.prompt} by {one.adapter}", (1, 2), "stop") for one in requests]


class Frail(Engine):
    name = "frail"
    summary = "may crash"

    def availability(self):
        return Availability(True)

    def capabilities(self, model, options):
        return Capabilities(generate=True, max_adapters=1, max_adapter_rank=8, preference=-1)

    def identity(self, options):
        return {"name": self.name}

    def open(self, model, adapters, options):
        return FrailSession()


@hookimpl
def register_engines():
    yield Frail()
'''


@pytest.fixture
def adapters(alone: Path, tiny: Path) -> Path:
    for seed, name in enumerate("abc", start=1):
        tiny_adapter(alone / "adapters" / name, tiny, seed=seed)
    return alone / "adapters"


@pytest.fixture
def frail(alone: Path) -> Path:
    (alone / "frail_engine.py").write_text(FRAIL, encoding="utf-8")
    return alone / "frail_engine.py"


def made(root: Path) -> dict[str, bytes]:
    """What steps made, unpacked: in which batches it was written is nobody's number."""
    files = {str(path.relative_to(root)): path.read_bytes() for path in root.glob("steps/*/artifact/*")}
    return {name: gzip.decompress(data) if name.endswith(".gz") else data for name, data in files.items()}


def rows(evaluation: Any) -> list[dict[str, Any]]:
    return [row.model_dump() for row in evaluation.rows]


class Saying(Reporter):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def evaluate(tiny: Path, sums: Path, out: str, **more: Any) -> Any:
    fields = {"engine": "frail", "limit": 8, "task_folders": [sums], "tasks": ["sums"], **more}
    return harness.evaluate(str(tiny), out=Path(out), **fields)


def workers(count: int = 2) -> Execution:
    return Execution("local", {"workers": count})


# ------------------------------------------------------------------------------------------------------ the same rows


def test_workers_give_the_rows_and_answers_of_one_process(
    cli: Any, tiny: Path, sums: Path, adapters: Path, alone: Path
) -> None:
    """The transformers engine in fp32; base and adapters are shared out among two processes."""
    command = ["eval", "--model", tiny, "--adapter", adapters, "--tasks", sums, "--task", "sums", "--limit", "6"]
    command += ["--engine", "transformers"]
    assert cli(*command, "--out", "one").code == 0
    ran = cli(*command, "--out", "two", *TWO)
    assert ran.code == 0, ran.err
    # What workers say is shown as if it was said here.
    assert ran.err.count("loading tiny with") == 2 and "sums (raw), 2 arms: 12/12" in ran.err
    one, two = made(alone / "one"), made(alone / "two")
    assert one == two and len(one) == 4 * 3
    assert not list(Path("two").rglob("steps/*/.lock")) and not Path("two/.folded").exists()
    reports = [json.loads((Path(out) / "report/report.json").read_text())["rows"] for out in ("one", "two")]
    assert reports[0] == reports[1]


def test_observers_hear_of_steps_elsewhere_here(tiny: Path, sums: Path, adapters: Path, frail: Path) -> None:
    observer = frail.with_name("observing.py")
    observer.write_text(
        "import os\nfrom pathlib import Path\nfrom harness import hookimpl\n"
        "def tell(what): Path('told').open('a').write(f'{what} {os.getpid()}\\n')\n"
        "@hookimpl\ndef step_started(step): tell(f'begins {step.kind}')\n"
        "@hookimpl\ndef step_finished(step, record): tell(f'{record.status} {step.kind}')\n"
    )
    registry = load_plugins([frail, observer])
    evaluate(tiny, sums, "out", registry=registry, adapters=[adapters], executor=workers())
    told = Path("told").read_text().splitlines()
    kinds = [f"{word} {kind} {os.getpid()}" for word in ("begins", "done") for kind in ("answers", "scores")]
    assert sorted(told) == sorted(kinds * 4)


# ----------------------------------------------------------------------------------------------------------- crashes


def test_a_crash_takes_its_own_order_alone(tiny: Path, sums: Path, adapters: Path, frail: Path) -> None:
    registry = load_plugins([frail])
    whole = evaluate(tiny, sums, "whole", registry=registry, adapters=[adapters])
    Path("frail").write_text("b")
    first = evaluate(tiny, sums, "out", registry=registry, adapters=[adapters], executor=workers())
    # Arm by arm, as this engine serves one adapter at a time; base and a go together with it.
    (name, said), *more = first.failures.items()
    assert (name.rpartition("-")[0], more) == ("answers-tiny+b-sums", [])
    assert said == f"{name}: its worker ended with code 9 and said nothing\n  The same command goes on."
    status = json.loads((Path("out/steps") / name / "status.json").read_text())
    assert (status["status"], status["attempt"]) == ("failed", 2)
    assert {row.adapter for row in first.rows} == {None, "a", "c"}
    write_reports(Path("out"))
    Path("frail").unlink()
    Path("asked").unlink()
    again = evaluate(tiny, sums, "out", registry=registry, adapters=[adapters], executor=workers())
    assert again.failures == {} and set(Path("asked").read_text().split()) == {"b"}
    assert rows(again) == rows(whole) and made(again.root) == made(whole.root)


def test_parity_is_measured_by_a_worker_too(cli: Any, tiny: Path, sums: Path, frail: Path, alone: Path) -> None:
    command = ["eval", "--model", tiny, "--tasks", sums, "--task", "sums", "--limit", "2", "--plugin", frail]
    command += ["--engine", "frail", "--parity", "2", "--set", "executor.workers=1", "--out", "out"]
    ran = cli(*command, "--parity-engine", "transformers")
    assert ran.code == 0, ran.err
    assert "loading tiny (transformers)" in ran.err and (alone / "out" / "parity.json").is_file()


def test_an_order_without_steps_that_crashes_is_told(tiny: Path, sums: Path, frail: Path) -> None:
    """Of parity, say: every score is there, and the run says that something is not."""
    run = Runner(None, said := Saying())
    execute = Execute(Crashing(), run, None, lambda order: [])
    execute.carry_out([Job(Order(id="parity", worker="x")), Job(Order(id="late", worker="x", keys=("a",)))])
    assert run.failures == {"parity": "parity: its worker was killed by SIGSEGV"}
    assert said.notes == [
        "failed: parity: its worker was killed by SIGSEGV",
        "failed: late: its worker was killed by SIGSEGV; its steps had ended",
    ]


class Crashing(InProcessPool):
    def __init__(self) -> None:
        super().__init__(ExecutorContext(Reporter(), RelayObservers("", lambda event: None)))

    def submit(self, order: Order) -> None:
        self._said.append(Event(order=order.id, kind="ended", outcome="crashed", code=-11))


def test_an_executor_that_takes_nothing_is_at_fault() -> None:
    pool = Crashing()
    pool.capacity = lambda: 0  # type: ignore[method-assign]
    with pytest.raises(harness.StepError, match="executor Crashing: takes no order, and 1 wait"):
        Execute(pool, Runner(None, Reporter()), None, lambda order: []).carry_out([Job(Order(id="a", worker="x"))])


def test_the_command_line_names_an_executor(cli: Any, slow_eval: list[str], alone: Path) -> None:
    command = [*slow_eval, "--out", "out", "--executor"]
    ran = cli(*command, "loacl")
    assert ran.code == 2 and "error: --executor: unknown executor 'loacl'\n  Did you mean 'local'?" in ran.err
    ran = cli(*command, "local", "--set", "executor.wokers=2")
    assert ran.code == 2 and "error: --set executor, wokers: unknown key 'wokers'" in ran.err
    # Nothing was written before that was known.
    assert not (alone / "out").exists()


def children_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def workers_of(pid: int) -> list[int]:
    """Worker processes: children of the warm parent, which is a child itself, or of this process."""
    return [worker for child in children_of(pid) for worker in (children_of(child) or [child])]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def two_tasks(slow_eval: list[str], sums: Path) -> list[str]:
    text = (sums / "sums.yaml").read_text(encoding="utf-8").replace("name: sums", "name: more", 1)
    (sums / "more.yaml").write_text(text.replace("{{ a }}+{{ b }}=", "{{ b }}+{{ a }}="), encoding="utf-8")
    return [*slow_eval, "--task", "more", *TWO]


@contextmanager
def under_way(command: list[str], calls: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A run of two workers, both of them answering."""
    process = start(command, SLOW_CALLS=str(calls), SLOW_DELAY="0.4")
    try:
        wait_for(lambda: calls.exists() and len(calls.read_text().splitlines()) >= 16, process)
        yield process, workers_of(process.pid)
    finally:
        process.kill()
        process.communicate()


def until(reached: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def test_a_killed_worker_s_steps_fail_and_the_same_command_goes_on(cli: Any, two_tasks: list[str], alone: Path) -> None:
    assert cli(*two_tasks, "--out", "whole").code == 0
    with under_way([*two_tasks, "--out", "killed"], alone / "calls") as (process, children):
        assert len(children) == 2
        os.kill(children[0], signal.SIGKILL)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 3, said
    assert "its worker was killed by SIGKILL, as when memory runs out" in said
    statuses = [json.loads(path.read_text()) for path in (alone / "killed").glob("steps/*/status.json")]
    assert sorted((one["kind"], one["status"]) for one in statuses) == [
        ("answers", "done"),
        ("answers", "failed"),
        ("scores", "done"),
    ]
    ran = cli(*two_tasks, "--out", "killed")
    assert ran.code == 0 and "answers were stored before" in ran.err
    assert made(alone / "killed") == made(alone / "whole")


def test_workers_end_with_their_parent(cli: Any, two_tasks: list[str], alone: Path) -> None:
    with under_way([*two_tasks, "--out", "killed"], alone / "calls") as (process, children):
        assert len(children) == 2
        process.kill()
        process.wait()
        until(lambda: not any(running(child) for child in children), seconds=3)
    assert not list((alone / "killed").glob("steps/*/status.json"))
    ran = cli(*two_tasks, "--out", "killed")
    assert ran.code == 0 and "answers were stored before" in ran.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_is_handed_on_and_what_is_done_is_kept(
    cli: Any, two_tasks: list[str], alone: Path, number: int, code: int
) -> None:
    with under_way([*two_tasks, "--out", "stopped"], alone / "calls") as (process, children):
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert not any(running(child) for child in children)
    assert process.returncode == code
    assert "what is done is kept; run the same command again" in said and "Traceback" not in said
    assert not list((alone / "stopped").glob("steps/*/status.json"))
    assert cli(*two_tasks, "--out", "stopped").code == 0


# ---------------------------------------------------------------------------------------------- other steps than here


def test_a_worker_refuses_what_it_does_not_plan(tiny: Path, sums: Path, frail: Path) -> None:
    registry = load_plugins([frail])
    plan = evaluate(tiny, sums, "out", registry=registry).plan
    spec = {"eval": plan.spec.model_dump(mode="json"), "part": "answers"}
    order = Order(id="answers-1", worker="x", run="out", keys=("f" * 64,), plugins=registry.loose_files, spec=spec)
    context = WorkerContext(Reporter(), RelayObservers("", lambda event: None))
    with pytest.raises(UserError) as caught:
        worker.carry_out(order, context)
    assert str(caught.value) == (
        "executor, order answers-1: 1 of its 1 steps are not what is planned where it is carried out (ffffffffffff): "
        "other plugins, data or weights are there\n"
        "  Install the same versions there; give plugins as files (--plugin) or installed, not as objects; or "
        "--in-process."
    )


def test_a_plugin_that_is_an_object_here_is_not_there(tiny: Path, sums: Path, frail: Path) -> None:
    registry = load_plugins([frail])
    registry.origins = [origin for origin in registry.origins if origin.loose is None]
    with pytest.raises(UserError) as caught:
        evaluate(tiny, sums, "out", registry=registry, executor=workers(1))
    assert str(caught.value).startswith(
        "executor, order answers-1: cannot be planned where it is carried out: --engine: unknown engine 'frail'\n"
    )
    assert str(caught.value).endswith(" Or --in-process.")


# ------------------------------------------------------------------------------------------------- locks and attempts

HOLD = """
import sys, time
from pathlib import Path
from harness.steps.execute import Execute, Job
from harness.steps.lock import FolderLock
with FolderLock(Path(sys.argv[1]), "a step"):
    print("held", flush=True)
    time.sleep(60)
"""
BEGIN = """
import sys
from pathlib import Path
from harness.steps.folder import StepFolder
from harness.steps.step import Step
path = Path(sys.argv[1])
step = Step("answers", sys.argv[2], "arm", {})
StepFolder(path, step.id, "answers", path / "artifact").begin(step, {}, {})
"""


def test_a_step_that_another_process_holds_is_skipped(tiny: Path, sums: Path, adapters: Path, frail: Path) -> None:
    registry = load_plugins([frail])
    for executor in (Execution(), workers()):
        out = f"out-{executor.options.get('workers')}"
        task = evaluate(tiny, sums, "other", registry=registry, adapters=[adapters]).plan.arms[2].tasks[0]
        folder = Path(out) / "steps" / f"answers-tiny+b-sums-{task.answers_id[:12]}"
        with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout is not None and other.stdout.readline() == "held\n"
            first = evaluate(tiny, sums, out, registry=registry, adapters=[adapters], executor=executor)
            other.kill()
        assert first.failures == {
            folder.name: f"{folder.name}: another harness process (pid {other.pid}) is at this step\n"
            "  Wait for it, or stop it. Then the same command goes on."
        }
        assert {row.adapter for row in first.rows} == {None, "a", "c"} and not (folder / "status.json").exists()
        again = evaluate(tiny, sums, out, registry=registry, adapters=[adapters], executor=executor)
        assert again.failures == {} and len(again.rows) == 4


def test_a_worker_that_was_given_up_cannot_end_what_another_does_again(
    tiny: Path, sums: Path, frail: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While this process answers, another one begins the same step: its own end is not recorded."""
    registry = load_plugins([frail])
    engine = registry.find(harness.Engine, "frail", "")
    honest = type(engine).open

    def overtaken(*arguments: Any) -> Any:
        (folder,) = Path("out").glob("steps/answers-*")
        step = json.loads((folder / "step.json").read_text())
        subprocess.run([sys.executable, "-c", BEGIN, str(folder), step["id"]], check=True)
        return honest(*arguments)

    monkeypatch.setattr(type(engine), "open", overtaken)
    with pytest.raises(harness.StepError, match="attempt 2 has begun since this one, 1"):
        evaluate(tiny, sums, "out", registry=registry)
    assert not list(Path("out").glob("steps/*/status.json"))
    monkeypatch.setattr(type(engine), "open", honest)
    assert len(evaluate(tiny, sums, "out", registry=registry).rows) == 1


# ----------------------------------------------------------------------------------------------- steps of other runs


def test_a_base_that_another_run_has_evaluated_is_taken(tiny: Path, sums: Path, adapters: Path, frail: Path) -> None:
    registry, said = load_plugins([frail]), Saying()
    base = evaluate(tiny, sums, "a", registry=registry)
    Path("asked").unlink()
    both: dict[str, Any] = {"registry": registry, "adapter": str(adapters / "a"), "with_base": True}
    taken = evaluate(tiny, sums, "b", **both, stores=["a"], reporter=said)
    assert set(Path("asked").read_text().split()) == {"a"}
    assert "taken from a: steps that ended there (1 of answers, 1 of scores)" in said.notes
    assert rows(taken) == rows(evaluate(tiny, sums, "c", **both)) and made(Path("b")) == made(Path("c"))
    shared = [path.relative_to("a") for path in Path("a").glob("steps/*/artifact/*")]
    assert shared and all((Path("a") / path).samefile(Path("b") / path) for path in shared)
    assert [row.step for row in base.rows] == [row.step for row in taken.rows if row.adapter is None]
    # The reports of both stand on their own.
    write_reports(Path("b"))
    before = made(Path("a"))
    Path("asked").unlink()
    evaluate(tiny, sums, "b", **both)
    assert not Path("asked").exists() and made(Path("a")) == before


@pytest.mark.parametrize("damaged", ["answers", "requests", "scores", "status"])
def test_what_is_damaged_is_not_taken(tiny: Path, sums: Path, frail: Path, damaged: str) -> None:
    registry, said = load_plugins([frail]), Saying()
    whole = evaluate(tiny, sums, "a", registry=registry)
    pattern = {
        "answers": "steps/answers-*/artifact/answers.jsonl.gz",
        "requests": "requests/*.jsonl.gz",
        "scores": "steps/scores-*/artifact/scores.json",
        "status": "steps/answers-*/status.json",
    }[damaged]
    (file,) = Path("a").glob(pattern)
    if damaged == "status":
        file.write_text(file.read_text().replace('"done"', '"Done"'))
    elif damaged == "scores":
        file.write_text(file.read_text().replace('"n": 8', '"n": 9'))
    else:
        # Well-formed, and something else: counting rows would not find it.
        text = gzip.decompress(file.read_bytes()).replace(b"=", b"~")
        file.write_bytes(gzip.compress(text))
    Path("asked").unlink()
    taken = evaluate(tiny, sums, "b", registry=registry, stores=["a"], reporter=said)
    assert any(note.startswith("a: ") and note.endswith("; it is not taken") for note in said.notes), said.notes
    assert Path("asked").exists() == (damaged != "scores")
    assert rows(taken) == rows(whole)


def test_a_store_that_is_no_run_is_refused(tiny: Path, sums: Path, frail: Path) -> None:
    registry = load_plugins([frail])
    with pytest.raises(UserError) as caught:
        evaluate(tiny, sums, "out", registry=registry, stores=["tasks"])
    assert str(caught.value) == (
        "--store tasks: is no run: it has no folder `steps`\n  Give the folder of a run (its --out)."
    )
    evaluate(tiny, sums, "out", registry=registry)
    with pytest.raises(UserError) as caught:
        evaluate(tiny, sums, "out", registry=registry, stores=["out"])
    assert str(caught.value) == (
        "--store out: is the run that is written\n  Give the folder of another run, or leave --store out."
    )


def test_a_linked_journal_that_is_gone_on_with_leaves_the_other_run_alone(tmp_path: Path) -> None:
    one, two = harness.Journal(tmp_path / "one.gz"), harness.Journal(tmp_path / "two.gz")
    one.append([{"n": 1}])
    one.close()
    before = one.path.read_bytes()
    os.link(one.path, two.path)
    two.append([{"n": 2}])
    two.close()
    assert one.path.read_bytes() == before and two.recover()[0] == [[{"n": 1}], [{"n": 2}]]


def test_the_lock_of_a_step_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "step"
    with FolderLock(folder, "x", keep=False):
        (folder / "file").touch()
    assert [path.name for path in folder.iterdir()] == ["file"]

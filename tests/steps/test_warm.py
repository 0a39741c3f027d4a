"""Workers forked from one parent: what they need is imported once, and nothing is forked where that is not safe."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import Event, ExecutorContext, Order, WarmParent, WorkerProcess, load_plugins
from harness.core.progress import Reporter
from harness.steps.warm import ForkedWorker
from harness_plugins.executors.local import LocalExecutor

COUNTING = """
import os, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "counted", "threaded"):
            with open(os.environ["COUNTED"], "a") as stream:
                stream.write(f"{name} {os.getpid()}\\n")
sys.meta_path.insert(0, Finder())
"""
"""A sitecustomize: every process of Python writes down when it imports one of these from scratch."""
WORKER = """
import os, time
def carry_out(order, context):
    import counted
    found = {"pid": os.getpid(), "parent": os.getppid(), "group": os.getpgrp()}
    if "torch" in order.imports:
        import torch
        time.sleep(0.2)
        found["sum"] = torch.ones(300, 300).matmul(torch.ones(300, 300)).sum().item()
    return {**found, "devices": os.environ.get("CUDA_VISIBLE_DEVICES")}
"""


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that has one line for every import of torch, `counted` or `threaded` in processes that are started."""
    modules = tmp_path / "modules"
    modules.mkdir()
    for name, text in {
        "sitecustomize": COUNTING,
        "counting_worker": WORKER,
        "counted": "",
        "threaded": "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
    }.items():
        (modules / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(modules))
    monkeypatch.setenv("COUNTED", str(tmp_path / "counted"))
    return tmp_path / "counted"


def imports(file: Path) -> Counter[str]:
    """Module -> processes that imported it."""
    lines = sorted(set(file.read_text().splitlines())) if file.exists() else []
    return Counter(line.split()[0] for line in lines)


def order(name: str, *modules: str) -> Order:
    return Order(id=name, worker="counting_worker", imports=modules)


def ended(said: queue.SimpleQueue[Event]) -> Event:
    while (event := said.get(timeout=60)).kind != "ended":
        pass
    return event


@pytest.fixture
def warm() -> Iterator[WarmParent]:
    parent = WarmParent()
    yield parent
    parent.close()


def test_a_pool_of_workers_imports_once(counted: Path) -> None:
    """Four orders on three workers, each a process of its own; as many imports of torch as there are parents."""
    executor = LocalExecutor()
    context = ExecutorContext(Reporter(), load_plugins(), dict(os.environ), ("5", "6", "7"), 3)
    with executor.open(executor.Config(workers=3), context) as pool:
        for n in range(4):
            pool.submit(order(str(n), "torch", "counted"))
        found = [event for event in pool.events() if event.kind == "ended"]
    assert [event.outcome for event in found] == ["done"] * 4
    results = [event.result for event in found]
    assert len({one["pid"] for one in results}) == 3
    assert {one["devices"] for one in results} == {"5", "6", "7"}
    assert all(one["sum"] == 300**3 and one["group"] == one["pid"] for one in results)
    assert len({one["parent"] for one in results}) == 1
    assert imports(counted) == {"torch": 1, "counted": 1}


def test_without_one_each_imports_for_itself(counted: Path) -> None:
    """Or the count above would prove nothing."""
    said: queue.SimpleQueue[Event] = queue.SimpleQueue()
    for n in range(2):
        worker = WorkerProcess(said.put)
        worker.submit(order(str(n), "counted"))
        assert ended(said).outcome == "done"
        worker.close()
    assert imports(counted) == {"counted": 2}


def test_after_a_thread_nothing_is_forked(counted: Path, warm: WarmParent) -> None:
    said: queue.SimpleQueue[Event] = queue.SimpleQueue()
    worker = WorkerProcess(said.put, warm=warm, imports=["threaded"])
    assert not isinstance(worker._child, ForkedWorker)
    worker.submit(order("one"))
    assert ended(said).outcome == "done"
    worker.close()


def test_cuda_that_does_not_survive_a_fork_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch says it in the forked process; where there is no GPU, or it can be used, nothing is in the way."""
    import torch

    from harness.steps.warm import _cuda_survives

    def init(text: str | None) -> None:
        if text is not None:
            raise RuntimeError(text)

    assert torch.version.cuda is not None or _cuda_survives()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    said = {
        None: True,
        "Found no NVIDIA driver on your system.": True,
        "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, use 'spawn'": False,
    }
    for text, survives in said.items():
        monkeypatch.setattr(torch.cuda, "init", lambda text=text: init(text))
        assert _cuda_survives() is survives


def test_another_environment_gets_a_python_of_its_own(counted: Path, warm: WarmParent) -> None:
    said: queue.SimpleQueue[Event] = queue.SimpleQueue()
    one = WorkerProcess(said.put, dict(os.environ), warm=warm)
    other = WorkerProcess(said.put, {**os.environ, "OMP_NUM_THREADS": "3"}, warm=warm)
    assert (isinstance(one._child, ForkedWorker), isinstance(other._child, ForkedWorker)) == (True, False)
    one.close()
    other.close()


def test_a_module_that_cannot_be_imported_is_its_workers_affair(counted: Path, warm: WarmParent) -> None:
    said: queue.SimpleQueue[Event] = queue.SimpleQueue()
    worker = WorkerProcess(said.put, warm=warm, imports=["no_such_module"])
    assert isinstance(worker._child, ForkedWorker)
    worker.submit(order("one"))
    assert ended(said).outcome == "done"
    worker.close()


def test_when_the_parent_is_gone_workers_start_alone(counted: Path, warm: WarmParent) -> None:
    said: queue.SimpleQueue[Event] = queue.SimpleQueue()
    first = WorkerProcess(said.put, warm=warm)
    assert warm._process is not None
    os.kill(warm._process.pid, signal.SIGKILL)
    # A worker that it has forked goes on.
    first.submit(order("one"))
    assert ended(said).outcome == "done"
    second = WorkerProcess(said.put, warm=warm)
    assert not isinstance(second._child, ForkedWorker)
    first.close()
    second.close()


def test_all_end_with_whoever_started_them(tmp_path: Path) -> None:
    """Killed by SIGKILL: the parent of the workers, and the workers in the middle of an order."""
    script = """
import json, queue, sys
from harness import Order, WarmParent, WorkerProcess
said, warm = queue.SimpleQueue(), WarmParent()
worker = WorkerProcess(said.put, warm=warm)
spec = {"does": "waits", "seconds": 60}
worker.submit(Order(id="one", worker="harness.testing.order_worker", run=sys.argv[1], spec=spec))
while said.get().text != "one: third":
    pass
print(json.dumps([worker.pid, warm._process.pid]), flush=True)
said.get()
"""
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    pids = json.loads(child.stdout.readline())
    child.kill()
    child.wait()
    end = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/stat").exists() and _runs(pid) for pid in pids):
        assert time.monotonic() < end, "they live on"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

"""Orders on Ray: a cluster of this machine, and one of three nodes that lose two while a study runs on them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import Event, Execution, ExecutorContext, Needs, Order, UserError, load_plugins
from harness.contracts.registry import Registry
from harness.core.progress import Reporter
from harness.steps.execute import executor_of
from harness.testing import check_executor
from harness_plugins.executors.ray import worker
from harness_plugins.executors.ray.cluster import Node, handed_on
from harness_plugins.executors.ray.executor import RayExecutor
from tests.study.conftest import (  # noqa: F401 - fixtures here, too
    Write,
    material,
    records,
    small,
    write,
)

SMALL: dict[str, Any] = {"object_store_memory": 80 * 1024**2, "include_dashboard": False}
PLUGIN = Path(__file__).with_name("ray_plugin.py")


def context(**more: Any) -> ExecutorContext:
    return ExecutorContext(Reporter(), Registry(), dict(os.environ), cores=2, **more)


def order(name: str, folder: Path, does: str = "leaves", **more: Any) -> Order:
    spec = {"does": does, "seconds": 30}
    where = {"run": str(folder), "folder": str(Path.cwd())}
    return Order(id=name, worker="harness.testing.order_worker", keys=(name,), spec=spec, **where, **more)


# ---------------------------------------------------------------------------------------------------- without a cluster


def test_without_ray_it_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("harness_plugins.executors.ray.executor.importlib.metadata.version", version)
    with pytest.raises(UserError) as caught:
        executor_of(Execution("ray"), load_plugins())
    assert str(caught.value) == (
        '--executor: ray cannot be used here: Ray is not installed\n  pip install "harness-align[ray]"'
    )


def test_too_old_a_ray_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness_plugins.executors.ray.executor.importlib.metadata.version", lambda name: "2.44.1")
    assert RayExecutor().availability().reason == "Ray 2.44.1 is installed; this needs >=2.60"


def test_plugins_are_listed_without_importing_ray(alone: Path) -> None:
    code = (
        "import sys\n"
        "from harness import load_plugins\n"
        "from harness.contracts.executor import Executor\n"
        "assert load_plugins().find(Executor, 'ray', '').availability().usable\n"
        "print([name for name in ('ray', 'torch') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_workers_get_what_numbers_hang_on_and_no_secret() -> None:
    given = {
        "HF_HUB_OFFLINE": "1",
        "MALLOC_TOP_PAD_": "5",
        "TOKENIZERS_PARALLELISM": "false",
        "HARNESS_CACHE": "/cache",
        "HF_TOKEN": "hf_x",
        "OPENAI_API_KEY": "sk-x",
        "HOME": "/root",
        "PYTHONPATH": "/x",
    }
    handed = dict(handed_on(given))
    assert {name for name in given if name in handed} == {
        *("HF_HUB_OFFLINE", "MALLOC_TOP_PAD_", "TOKENIZERS_PARALLELISM", "HARNESS_CACHE")
    }


def test_what_cannot_be_handed_on_or_connected_to_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = RayExecutor()
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(UserError) as caught:
        ray.open(ray.Config(environment=("NO_SUCH_KEY",)), context())
    assert str(caught.value) == (
        "--set executor.environment: NO_SUCH_KEY is not set here\n"
        "  export NO_SUCH_KEY=... before this command, or leave it out."
    )
    with pytest.raises(UserError) as caught:
        ray.open(ray.Config(address="ray://head:10001"), context())
    assert "--set executor.address: 'ray://head:10001' is a client's address" in str(caught.value)
    with pytest.raises(UserError) as caught:
        ray.open(ray.Config(address="auto"), context())
    assert "--set executor.address=auto: no cluster can be used: " in str(caught.value)
    assert "ray start --head" in str(caught.value)


def test_a_node_says_in_what_it_differs(tmp_path: Path) -> None:
    here = worker.versions_here(())
    assert here["device"] in ("cpu", "cuda") and here["harness"] and here["executor ray"]
    token = tmp_path / "token"
    token.write_text("x", encoding="utf-8")

    def expected(**more: Any) -> worker.Expected:
        return worker.Expected(**{"plugins": (), "folder": str(tmp_path), "versions": here, **more})

    assert worker.differences(expected(token=str(token), secret="x")) == []
    other = {**here, "torch": "1.0", "merger mine": "abc"}
    assert worker.differences(expected(versions=other)) == [
        "merger mine is missing, and abc where the driver is",
        f"torch is {here['torch']}, and 1.0 where the driver is",
    ]
    assert worker.differences(expected(plugins=("/no/plugin.py",))) == ["there is no plugin file /no/plugin.py"]
    assert worker.differences(expected(folder="/no/folder")) == [
        "there is no folder /no/folder, which this command was started in"
    ]


def test_another_run_folder_of_the_same_name_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "VISIBLE", 0.0)
    (tmp_path / "token").write_text("another's", encoding="utf-8")
    for token in ("token", "missing"):
        expected = worker.Expected((), "", worker.versions_here(()), str(tmp_path / token), "mine")
        assert worker.differences(expected) == [f"the run folder {tmp_path} is not the one that the driver sees"]
    where, what, fix = worker.refusal("node b", worker.differences(expected))
    assert (where, what) == ("executor ray, node b", f"the run folder {tmp_path} is not the one that the driver sees")
    assert "Give --out a path that all nodes share" in fix


def test_a_node_lacks_what_it_has_too_little_of() -> None:
    node = Node("id", "name", {"CPU": 4.0, "GPU": 1.0, "accelerator_type:H100": 1.0})
    assert node.lacks({"CPU": 4, "GPU": 1, "accelerator_type:H100": 0.001}) == []
    assert node.lacks({"CPU": 5, "memory": 1, "accelerator_type:A100": 0.001}) == [
        *("CPU", "memory", "accelerator_type:A100")
    ]


# --------------------------------------------------------------------------------------------------- on a real cluster


def started(start: Callable[[], Any]) -> Any:
    """A cluster; under load its start times out."""
    for attempt in range(3):
        try:
            return start()
        except Exception:
            if attempt == 2:
                raise
            time.sleep(5)
    return None


def test_it_holds_the_contract(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a cluster of this machine that begins and ends with the pool."""
    ray = RayExecutor()
    monkeypatch.setattr(RayExecutor, "open", lambda self, *given: started(lambda: REAL_OPEN(self, *given)))
    check_executor(ray, folder=tmp_path)
    import ray as library

    assert not library.is_initialized()


REAL_OPEN = RayExecutor.open


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three nodes: a head for drivers alone, and two with a core each; nodes are killed, and added."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")

    def start() -> Any:
        made = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **SMALL})
        try:
            for _ in range(2):
                made.add_node(num_cpus=1, **SMALL)
        except BaseException:
            made.shutdown()
            raise
        return made

    made = started(start)
    yield made
    made.shutdown()


def raylet_of(node: Any) -> int:
    """Process of a node."""
    (raylet,) = node.all_processes["raylet"]
    return int(raylet.process.pid)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(what: Callable[[], Any], seconds: float = 120.0, why: Callable[[], str] = str) -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, why()
        time.sleep(0.05)
    return found


def test_a_node_of_another_version_is_named(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real node that has another numpy, and does not see what the driver writes; and orders that no node can take."""
    odd = tmp_path / "odd"
    (odd / "numpy-9.9.dist-info").mkdir(parents=True)
    (odd / "numpy-9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 9.9\n")
    (odd / "sitecustomize.py").write_text(
        "import pathlib\n"
        "real = pathlib.Path.read_text\n"
        "def read_text(self, *given, **more):\n"
        "    if self.name.startswith('.node-'):\n"
        "        raise FileNotFoundError(self)\n"
        "    return real(self, *given, **more)\n"
        "pathlib.Path.read_text = read_text\n"
    )
    node = started(lambda: cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": str(odd)}, **SMALL))
    run = tmp_path / "run"
    ray = RayExecutor()
    try:
        with ray.open(ray.Config(address=cluster.address), context()) as pool:
            assert pool.capacity() == 3
            with pytest.raises(UserError) as caught:
                pool.submit(order("any", run))
            assert node.node_id[:8] in caught.value.where
            assert f"the run folder {run} is not the one that the driver sees" in caught.value.what
            assert "numpy is 9.9, and " in caught.value.what
            assert list(run.iterdir()) == []
            assert list(pool.events()) == []
            cluster.remove_node(node, allow_graceful=False)
            until(lambda: pool.capacity() == 2)
            with pytest.raises(UserError) as caught:
                pool.submit(order("big", run, needs=Needs(devices=1, cores=64)))
            assert str(caught.value) == (
                "executor ray, order big: needs 64 cores, 1 GPUs on one node, and of 3 nodes none has that "
                "(the most of each: 1 cores, 0 GPUs)\n"
                "  Add a node that has, or ask for less: --set executor.cores=N, executor.accelerator_type, a smaller "
                "model."
            )
            # What is under way when the pool is closed is stopped, and its process ends.
            pool.submit(order("waiting", run, "waits"))
            heard: list[Event] = []
            for event in pool.events():
                heard.append(event)
                if event.kind == "note":
                    break
    finally:
        if node in cluster.worker_nodes:
            cluster.remove_node(node, allow_graceful=False)
    assert heard[0].kind == "started"


def test_a_study_outlives_nodes_and_its_driver(
    cluster: Any,
    cli: Any,
    small: dict[str, Any],
    write: Write,
    alone: Path,
    zygote: Any,  # noqa: F811
) -> None:
    """One node is killed during an align, one during answers, and the driver once: nothing is done twice, and the
    records are those of one process."""
    plugin = Path(shutil.copy(PLUGIN, alone))
    grid = {**small["grid"][0], "method": "held"}
    evaluation = {**small["evaluation"], "engine": "held", "set": {"engine.batch_size": 4}}
    file = write({**small, "grid": [grid], "merges": [], "evaluation": evaluation})
    whole = cli("study", "run", file, "--out", "whole", "--plugin", plugin)
    assert whole.code == 0, whole.err

    command = ["study", "run", str(file), "--out", "run", "--plugin", str(plugin)]
    command += ["--executor", "ray", "--set", f"executor.address={cluster.address}"]
    for what in ("align", "answers"):
        (alone / f"hold-{what}").touch()

    def held(what: str, driver: Any) -> int:
        """Process of the worker that waits there."""
        file = alone / f"held-{what}"
        pid = int(until(lambda: file.exists() and file.read_text(encoding="utf-8"), why=driver.said))
        file.unlink()
        return pid

    def lose_node_of(pid: int) -> None:
        node = next(one for one in cluster.worker_nodes if raylet_of(one) == parent_of(pid))
        cluster.remove_node(node, allow_graceful=False)
        until(lambda: not runs(pid))

    driver = zygote.start(command, cwd=alone)
    lose_node_of(held("align", driver))
    (align,) = (alone / "run" / "steps").glob("align-*")
    assert not (align / "status.json").exists()
    (alone / "hold-align").unlink()
    # A node that joins late is compared, too.
    started(lambda: cluster.add_node(num_cpus=1, **SMALL))

    orphan = held("answers", driver)
    ended = (align / "status.json").stat().st_mtime_ns
    os.kill(driver.pid, signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL
    # What nobody waits for ends with the driver.
    until(lambda: not runs(orphan))
    assert "node " in driver.said() and "was lost; it is given again (attempt 2)" in driver.said()

    driver = zygote.start(command, cwd=alone)
    lose_node_of(held("answers", driver))
    (alone / "hold-answers").unlink()
    assert driver.wait() == 0, driver.said()
    assert "was lost; it is given again (attempt 2)" in driver.said()

    assert records(alone / "run") == records(alone / "whole")
    assert (align / "status.json").stat().st_mtime_ns == ended
    assert begun(align) == 2, "once, and again on another node"
    log = [json.loads(line)["event"] for line in (align / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert "resumed" in log or "resuming" in log, log
    # The first answers were cut short twice, by the driver's end and a node's; the rest was done once.
    attempts = sorted(begun(step) for step in (alone / "run" / "steps").iterdir() if step.name[:5] != "align")
    assert attempts == [1, 1, 1, 3]


def begun(step: Path) -> int:
    lines = [json.loads(line) for line in (step / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    count = sum(line["event"] == "begun" for line in lines)
    assert json.loads((step / "step.json").read_text(encoding="utf-8"))["attempt"] == count
    return count

"""A Ray cluster of three nodes: one that differs is named, and a study outlives two nodes and its driver."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import Event, Needs, UserError
from harness_plugins.executors.ray.executor import RayExecutor
from tests.plugins.executors.test_ray import context, order, started
from tests.study.conftest import Write, records

SMALL: dict[str, Any] = {"object_store_memory": 80 * 1024**2, "include_dashboard": False}
PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
"""Of a node's helpers. Where they are given, a node does not wait, 15 seconds at most, until they are found out."""
PLUGIN = Path(__file__).with_name("holding.py")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three nodes: a head for drivers alone, and two with a core each; nodes are killed, and added."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")

    def start() -> Any:
        made = cluster_utils.Cluster(initialize_head=True, head_node_args=size(0))
        try:
            for _ in range(2):
                made.add_node(**size(1))
        except BaseException:
            made.shutdown()
            raise
        return made

    made = started(start)
    yield made
    made.shutdown()


def size(cores: int) -> dict[str, Any]:
    """What a node is started with."""
    with contextlib.ExitStack() as held:
        free = [held.enter_context(socket.socket()) for _ in PORTS]
        for one in free:
            one.bind(("", 0))
        ports = {name: one.getsockname()[1] for name, one in zip(PORTS, free, strict=True)}
        return {"num_cpus": cores, **SMALL, **ports}


def authentication() -> dict[str, str]:
    """How this process's clusters tell friend from stranger: once Ray has started one by itself, by a token, which a
    driver that is given an address uses only where it is told to.
    """
    return {name: os.environ[name] for name in ("RAY_AUTH_MODE",) if name in os.environ}


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
    node = started(lambda: cluster.add_node(env_vars={"PYTHONPATH": str(odd)}, **size(1)))
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
    assert [file.name for file in run.iterdir()] == [file.name for file in run.glob("waiting.*")]


def test_a_study_outlives_nodes_and_its_driver(
    cluster: Any,
    cli: Any,
    small: dict[str, Any],
    write: Write,
    alone: Path,
    zygote: Any,
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

    driver = zygote.start(command, cwd=alone, **authentication())
    lose_node_of(held("align", driver))
    (align,) = (alone / "run" / "steps").glob("align-*")
    assert not (align / "status.json").exists()
    (alone / "hold-align").unlink()
    # A node that joins late is compared, too.
    started(lambda: cluster.add_node(**size(1)))

    orphan = held("answers", driver)
    ended = (align / "status.json").stat().st_mtime_ns
    os.kill(driver.pid, signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL
    # What nobody waits for ends with the driver.
    until(lambda: not runs(orphan))
    assert "node " in driver.said() and "was lost; it is given again (attempt 2)" in driver.said()

    driver = zygote.start(command, cwd=alone, **authentication())
    lose_node_of(held("answers", driver))
    (alone / "hold-answers").unlink()
    assert driver.wait() == 0, driver.said()
    assert "was lost; it is given again (attempt 2)" in driver.said()

    assert records(alone / "run") == records(alone / "whole")
    assert (align / "status.json").stat().st_mtime_ns == ended
    assert begun(align) == 2, "once, and again on another node"
    log = [json.loads(line)["event"] for line in (align / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert "resumed" in log, log
    # Both arms are asked together, and were cut short twice, by the driver's end and a node's; scores were done once.
    assert [begun(step) for step in (alone / "run" / "steps").glob("answers-*")] == [3, 3]
    assert [begun(step) for step in (alone / "run" / "steps").glob("scores-*")] == [1, 1]
    answered = [said(step, "answered") for step in (alone / "run" / "steps").glob("answers-*")]
    assert sum(one["reused"] + one["computed"] for one in answered) == 12
    assert sum(one["reused"] for one in answered) >= 4, "the first batch was stored before anything was lost"


def test_a_stopped_driver_lets_its_orders_save(
    cluster: Any, small: dict[str, Any], write: Write, alone: Path, zygote: Any
) -> None:
    """SIGTERM during an align gives 75, Ctrl-C during answers 130; each goes on from what was saved."""
    plugin = Path(shutil.copy(PLUGIN, alone))
    evaluation = {**small["evaluation"], "engine": "held", "set": {"engine.batch_size": 4}}
    file = write({**small, "grid": [{**small["grid"][0], "method": "held"}], "merges": [], "evaluation": evaluation})
    command = ["study", "run", str(file), "--out", "run", "--plugin", str(plugin)]
    command += ["--executor", "ray", "--set", f"executor.address={cluster.address}"]
    if len(cluster.worker_nodes) < 2:
        started(lambda: cluster.add_node(**size(1)))
    for what, number, code in (("align", signal.SIGTERM, 75), ("answers", signal.SIGINT, 130)):
        (alone / f"hold-{what}").touch()
        driver = zygote.start(command, cwd=alone, **authentication())
        file = alone / f"held-{what}"
        worker = int(until(lambda file=file: file.exists() and file.read_text(encoding="utf-8"), why=driver.said))
        os.kill(driver.pid, number)
        # An align saves at the end of its step.
        time.sleep(1)
        (alone / f"hold-{what}").unlink()
        assert driver.wait() == code, driver.said()
        until(lambda worker=worker: not runs(worker))
        steps = list((alone / "run" / "steps").glob(f"{what}-*"))
        assert steps and not [step for step in steps if (step / "status.json").exists()]
    (align,) = (alone / "run" / "steps").glob("align-*")
    assert said(align, "resumed") and begun(align) == 2 and (align / "status.json").exists()


def said(step: Path, event: str) -> dict[str, Any]:
    """The last entry of a kind in a step's log."""
    lines = [json.loads(line) for line in (step / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return next((line for line in reversed(lines) if line["event"] == event), {})


def begun(step: Path) -> int:
    lines = [json.loads(line) for line in (step / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    count = sum(line["event"] == "begun" for line in lines)
    assert json.loads((step / "step.json").read_text(encoding="utf-8"))["attempt"] == count
    return count

"""Orders on Ray, on a cluster of this machine; what is compared and handed on. More nodes: tests/study/test_ray.py."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness import Execution, ExecutorContext, Order, UserError, load_plugins
from harness.contracts.registry import Registry
from harness.core.progress import Reporter
from harness.steps.execute import executor_of
from harness.testing import check_executor
from harness_plugins.executors.ray import worker
from harness_plugins.executors.ray.cluster import Node, handed_on
from harness_plugins.executors.ray.executor import RayExecutor


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


def started(start: Callable[[], Any]) -> Any:
    """What starts Ray's processes, or a visible skip: on a machine that is too busy they give up after 15 seconds."""
    said = ""
    for _ in range(3):
        try:
            return start()
        # Of many kinds, from ConnectionError to RuntimeError; what a user would be told is none of them.
        except Exception as error:
            if isinstance(error, UserError) and "no cluster of this machine has started" not in error.what:
                raise
            said = " ".join(str(error).split())[:300]
            time.sleep(2)
    pytest.skip(f"this machine is too busy for Ray to start: {said}")


def test_it_holds_the_contract(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a cluster of this machine that begins and ends with the pool."""
    ray = RayExecutor()
    real = RayExecutor.open
    monkeypatch.setattr(RayExecutor, "open", lambda self, *given: started(lambda: real(self, *given)))
    check_executor(ray, folder=tmp_path)
    import ray as library

    assert not library.is_initialized()


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ray's own start fails; the addresses that it was asked for."""
    import ray as library

    asked: list[str] = []

    def init(address: str, **more: Any) -> None:
        asked.append(address)
        raise RuntimeError("The current node timed out\nduring startup.")

    monkeypatch.setattr(library, "init", init)
    return asked


def test_a_cluster_of_this_machine_is_started_again(no_ray: list[str]) -> None:
    class Noting(Reporter):
        def note(self, text: str) -> None:
            notes.append(text)

    notes: list[str] = []
    ray = RayExecutor()
    with pytest.raises(UserError) as caught:
        ray.open(ray.Config(), replace(context(), reporter=Noting()))
    assert no_ray == ["local"] * 3
    assert notes == [
        f"a cluster of this machine did not start (attempt {n} of 3): The current node timed out during startup."
        for n in (1, 2)
    ]
    assert str(caught.value) == (
        "--executor ray: no cluster of this machine has started, in 3 attempts: The current node timed out during "
        "startup.\n  Try again when the machine is less busy; `ray stop` ends what an earlier one left. Ray's own "
        "words: /tmp/ray/session_latest/logs."
    )


def test_a_cluster_that_does_not_answer_is_not_asked_again(no_ray: list[str]) -> None:
    ray = RayExecutor()
    with pytest.raises(UserError) as caught:
        ray.open(ray.Config(address="head:6379"), context())
    assert no_ray == ["head:6379"]
    assert caught.value.where == "--set executor.address=head:6379"

"""The rules of all kinds, tried on an executor: the kind that needs least."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field

from harness import (
    Config,
    Event,
    Executor,
    ExecutorContext,
    InProcessPool,
    Order,
    Pool,
    Scorer,
    carry_out_order,
)
from harness.contracts.plugin import CONTRACT_VERSION
from harness.contracts.registry import load_plugins
from harness.core.errors import UserError
from harness.core.progress import Reporter
from harness.testing import check_executor, check_plugin, registry_of
from harness_plugins.executors.local import LocalExecutor


class InOrder(Executor["InOrder.Config"]):
    name = "in-order"
    summary = "one after another"

    class Config(Config):
        pause: float = Field(0.0, description="pause (seconds)")

    def open(self, config: Config, context: ExecutorContext) -> Pool:
        return InProcessPool(context)


class Bare(Config):
    pause: float = 0.0


class Open(Config):
    model_config = ConfigDict(extra="allow")


class Loose(Config):
    model_config = ConfigDict(frozen=False)


class Needy(Config):
    path: str = Field(description="a file")


class Foreign(BaseModel):
    pass


def broken(**overrides: Any) -> Executor:
    executor: Executor = type("Broken", (InOrder,), overrides)()
    return executor


def test_a_good_executor_passes() -> None:
    check_executor(InOrder())
    check_executor(InOrder(), options={"pause": 1.5})
    check_executor(broken(Config=Needy), options={"path": "x"})


class Swallowing(InProcessPool):
    def events(self) -> Iterator[Event]:
        for event in super().events():
            failed = event.outcome == "failed"
            yield event.model_copy(update={"outcome": "done", "failure": None}) if failed else event


class Twice(InProcessPool):
    def events(self) -> Iterator[Event]:
        for event in super().events():
            yield event
            if event.kind == "ended" and event.order == "b":
                yield event


class WorkingTwice(InProcessPool):
    def submit(self, order: Order) -> None:
        super().submit(order)
        if order.id == "fine":
            carry_out_order(order, lambda event: None)


class Dropping(InProcessPool):
    def submit(self, order: Order) -> None:
        if order.id != "a":
            super().submit(order)


class Silent(InProcessPool):
    def __init__(self, context: ExecutorContext) -> None:
        super().__init__(replace(context, reporter=Reporter()))


class Raising(InProcessPool):
    def events(self) -> Iterator[Event]:
        for event in super().events():
            if event.cause is not None:
                raise event.cause
            yield event


class Backwards(InProcessPool):
    def events(self) -> Iterator[Event]:
        yield from sorted(super().events(), key=lambda event: event.kind)


class Waiting(InProcessPool):
    def events(self) -> Iterator[Event]:
        yield from super().events()
        time.sleep(30)


class Deaf(InProcessPool):
    def cancel(self, order: str) -> None: ...


class Full(InProcessPool):
    def capacity(self) -> int:
        return 0


class Rewriting(InProcessPool):
    def submit(self, order: Order) -> None:
        super().submit(order.model_copy(update={"keys": ()}))


def opening(pool: type[InProcessPool]) -> Executor:
    return broken(open=lambda self, config, context: pool(context))


@pytest.mark.parametrize(
    ("executor", "words"),
    [
        (InOrder, "A hook yields an instance, not a class."),
        (
            broken(name=""),
            "`name` is made of letters, digits and . _ @ + - and starts with a letter or digit.\n  seen: ''",
        ),
        (broken(name="two words"), "`name` is made of letters"),
        (broken(name=None), "`name` is made of letters"),
        (broken(summary=" "), "`summary` is one line that `harness plugins` can print."),
        (broken(summary="two\nlines"), "`summary` is one line"),
        (broken(contract=99), f"`contract` is the version of the contract in force, {CONTRACT_VERSION}.\n  seen: 99"),
        (broken(Config=Foreign), "`Config` is a subclass of harness.Config."),
        (broken(Config=Loose), "`Config` is frozen.\n  seen: frozen=False"),
        (broken(Config=Open), "`Config` forbids extra fields.\n  seen: extra='allow'"),
        (broken(Config=Bare), "Every field of `Config` has a description (with its unit).\n  seen: none for pause"),
        (
            broken(Config=Needy),
            "The kit is run with options that `Config` takes: pass `options=`.\n  seen: Field required",
        ),
        (opening(Swallowing), "raising ended as done, and not as failed"),
        (opening(Twice), "Every order that was submitted ends once.\n  seen: b ended 2 times"),
        (opening(WorkingTwice), "An order is carried out once.\n  seen: fine was, 2 times"),
        (opening(Dropping), "Every order that was submitted ends once.\n  seen: a ended 0 times"),
        (opening(Silent), "What a worker says reaches the reporter of the context, or comes as events"),
        (opening(Raising), "`events` raises nothing: failures are events.\n  seen: [RuntimeError"),
        (opening(Backwards), "Events of an order come in order: what its worker said, then how it ended"),
        (opening(Waiting), "`events` ends when nothing is under way.\n  seen: after 3 s it waits; the last events:"),
        (opening(Deaf), "An order that is cancelled ends as `stopped`, once.\n  seen: ['done']"),
        (opening(Full), "`capacity` of a pool that does nothing is at least 1.\n  seen: 0"),
        (opening(Rewriting), "The worker gets the order as it was submitted, and its result comes back."),
    ],
)
def test_a_broken_executor_fails(executor: Any, words: str) -> None:
    with pytest.raises(AssertionError) as caught:
        check_executor(executor, seconds=3)
    assert words in str(caught.value)


def test_an_executor_that_leaves_its_processes_fails() -> None:
    local, pools = LocalExecutor(), list[Pool]()

    class Leaving(InOrder):
        def open(self, config: Any, context: ExecutorContext) -> Pool:
            pools.append(local.open(local.Config(workers=1), context))
            pools[0].close = lambda: None  # type: ignore[method-assign]
            return pools[0]

    with pytest.raises(AssertionError, match=r"`close` ends every process of the pool\.\n  seen: processes \[\d+"):
        check_executor(Leaving())
    type(pools[0]).close(pools[0])


def test_the_kind_must_fit() -> None:
    with pytest.raises(AssertionError, match=r"The plugin is an instance of harness\.Scorer\.\n  seen: InOrder"):
        check_plugin(InOrder(), Scorer)


SOURCE = """
{statement}
from harness import Executor, InProcessPool, hookimpl

class Mine(Executor):
    name = "mine"
    summary = "mine"

    def open(self, config, context):
        return InProcessPool(context)

@hookimpl
def register_executors():
    yield Mine()
"""


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        (
            "import torch",
            r"move heavy imports into methods\.\n  seen: importing \w+ in a fresh process imported torch$",
        ),
        ("import kit_heavy_helper", r"imported torch, datasets$"),
        (
            "import sys\nassert 'pytest' in sys.modules",
            r"can be imported in a fresh process\.\n  seen: .*AssertionError",
        ),
    ],
)
def test_a_heavy_module_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statement: str, words: str) -> None:
    """Stand-ins for the heavy packages: only their names matter here."""
    for name in ("torch", "datasets"):
        (tmp_path / f"{name}.py").touch()
    (tmp_path / "kit_heavy_helper.py").write_text("import datasets, torch\n")
    module = f"kit_heavy_{abs(hash(statement))}"
    (tmp_path / f"{module}.py").write_text(SOURCE.format(statement=statement))
    monkeypatch.syspath_prepend(str(tmp_path))
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in ("torch", "datasets")}
    try:
        plugin = __import__(module).Mine()
    finally:
        for name in ("torch", "datasets", "kit_heavy_helper"):
            sys.modules.pop(name, None)
        sys.modules.update(kept)
    with pytest.raises(AssertionError, match=words):
        check_executor(plugin)


def test_a_package_can_be_tried_without_installing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "kit_own.py").write_text(SOURCE.format(statement=""))
    module = __import__("kit_own")
    assert ("executor", "mine") in registry_of(module).entries
    assert ("executor", "mine") not in load_plugins().entries
    (tmp_path / "kit_typo.py").write_text("from harness import hookimpl\n@hookimpl\ndef register_scorer(): pass\n")
    with pytest.raises(UserError, match="unknown hook 'register_scorer'"):
        registry_of(__import__("kit_typo"))
    (tmp_path / "kit_raises.py").write_text("from harness import hookimpl\n@hookimpl\ndef register_scorers(): 1 / 0\n")
    with pytest.raises(AssertionError, match=r"The hooks of kit_raises run\.\n  seen: ZeroDivisionError"):
        registry_of(__import__("kit_raises"))

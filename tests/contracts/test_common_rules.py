"""The rules of all kinds, tried on an executor: the kind that needs least."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field

from harness import Config, Executor, Scorer
from harness.contracts.registry import load_plugins
from harness.core.errors import UserError
from harness.testing import check_executor, check_plugin, registry_of


class InOrder(Executor):
    name = "in-order"
    summary = "one after another"

    class Config(Config):
        pause: float = Field(0.0, description="pause (seconds)")

    def carry_out(self, groups: Iterable[Any], work: Callable[[Any], None], options: Any) -> None:
        for group in groups:
            work(group)


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
    check_executor(InOrder(), options={"pause": 1.5}, groups=2)
    check_executor(broken(Config=Needy), options={"path": "x"})


def swallow(self: Any, groups: Iterable[Any], work: Callable[[Any], None], options: Any) -> None:
    for group in groups:
        with contextlib.suppress(RuntimeError):
            work(group)


def twice(self: Any, groups: Iterable[Any], work: Callable[[Any], None], options: Any) -> None:
    for group in groups:
        work(group)
        work(group)


def counts_first(self: Any, groups: Any, work: Callable[[Any], None], options: Any) -> None:
    for index in range(len(list(groups))):
        work(list(groups)[index])


def skips_last(self: Any, groups: Iterable[Any], work: Callable[[Any], None], options: Any) -> None:
    for group in list(groups)[:-1]:
        work(group)


def never_empty(self: Any, groups: Iterable[Any], work: Callable[[Any], None], options: Any) -> None:
    pending = list(groups)
    work(pending.pop(0))
    for group in pending:
        work(group)


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
        (broken(contract=99), "`contract` is the version of the contract in force, 1.\n  seen: 99"),
        (broken(Config=Foreign), "`Config` is a subclass of harness.Config."),
        (broken(Config=Loose), "`Config` is frozen.\n  seen: frozen=False"),
        (broken(Config=Open), "`Config` forbids extra fields.\n  seen: extra='allow'"),
        (broken(Config=Bare), "Every field of `Config` has a description (with its unit).\n  seen: none for pause"),
        (
            broken(Config=Needy),
            "The kit is run with options that `Config` takes: pass `options=`.\n  seen: Field required",
        ),
        (broken(carry_out=swallow), "An exception of `work` is not swallowed."),
        (
            broken(carry_out=twice),
            "calls `work` once for every group, of a list or a generator.\n  seen: calls per group: {0: 2",
        ),
        (broken(carry_out=counts_first), "`carry_out` returns when every group is done.\n  seen: IndexError"),
        (broken(carry_out=skips_last), "calls per group: {0: 1, 1: 1, 2: 1, 3: 1} of 5 groups"),
        (broken(carry_out=never_empty), "`carry_out` returns when every group is done.\n  seen: IndexError"),
    ],
)
def test_a_broken_executor_fails(executor: Any, words: str) -> None:
    with pytest.raises(AssertionError) as caught:
        check_executor(executor)
    assert words in str(caught.value)


def test_the_kind_must_fit() -> None:
    with pytest.raises(AssertionError, match=r"The plugin is an instance of harness\.Scorer\.\n  seen: InOrder"):
        check_plugin(InOrder(), Scorer)


SOURCE = """
{statement}
from harness import Executor, hookimpl

class Mine(Executor):
    name = "mine"
    summary = "mine"

    def carry_out(self, groups, work, options):
        for group in groups:
            work(group)

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

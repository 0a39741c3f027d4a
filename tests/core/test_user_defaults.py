"""Settings: what a working folder may say, and what the user's own file alone may."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.core.errors import UserError
from harness.core.user_defaults import load_user_defaults

PLUGIN = "open('executed', 'w')\n"


@pytest.fixture
def own(alone: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's configuration folder, which has no file yet."""
    folder = alone / "home" / "harness"
    folder.mkdir(parents=True)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder.parent))
    return folder


@pytest.mark.parametrize(("key", "option"), [("plugins", "--plugin"), ("task_folders", "--tasks")])
def test_a_working_folder_brings_no_code(own: Path, alone: Path, key: str, option: str) -> None:
    (alone / "harness.yaml").write_text(f"engine: auto\n{key}: [theirs]\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_user_defaults()
    where, fix = str(caught.value).split("\n  ")
    assert where == f"harness.yaml:2, {key}: a working folder's file brings no code and no tasks"
    assert fix == f"Pass {option} theirs if you trust it, or write it into {own / 'config.yaml'}."


@pytest.mark.parametrize(
    ("line", "where", "option"),
    [
        ("t: {scorer: {llm: {model: 'HTTP://evil.example/v1'}}}", "options.t.scorer.llm.model", "t.scorer.llm.model"),
        ("engine: {api_key_env: BANK_TOKEN}", "options.engine.api_key_env", "engine.api_key_env"),
        ("executor: {address: 'ray://evil:10001'}", "options.executor.address", "executor.address"),
    ],
)
def test_a_working_folder_sends_no_key_anywhere(own: Path, alone: Path, line: str, where: str, option: str) -> None:
    (alone / "harness.yaml").write_text(f"options:\n  {line}\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_user_defaults()
    assert str(caught.value) == (
        f"harness.yaml:2, {where}: a working folder's file names no server, no key and no executor\n"
        f"  Pass --set {option}=... if you mean it, or write it into {own / 'config.yaml'}."
    )
    (own / "config.yaml").write_text((alone / "harness.yaml").read_text(), encoding="utf-8")
    (alone / "harness.yaml").unlink()
    assert load_user_defaults().options


def test_no_command_runs_it(cli: Any, own: Path, alone: Path, tiny: Path) -> None:
    (alone / "evil.py").write_text(PLUGIN, encoding="utf-8")
    (alone / "harness.yaml").write_text("plugins: [evil.py]\n", encoding="utf-8")
    for command in (["tasks"], ["eval", "--model", str(tiny)], ["serve", "--model", str(tiny), "--check"]):
        ran = cli(*command)
        assert (ran.code, (alone / "executed").exists()) == (2, False)
        assert "Pass --plugin evil.py if you trust it" in ran.err


def test_the_users_own_file_does_wherever_one_works(own: Path, alone: Path) -> None:
    """Its paths start from its folder: from the working folder, an archive could bring a file of that name."""
    text = "engine: mine\nplugins: [mine.py, /opt/other.py]\ntask_folders: [tasks]\n"
    (own / "config.yaml").write_text(text, encoding="utf-8")
    expected = (str(own / "mine.py"), "/opt/other.py"), (str(own / "tasks"),)
    found = load_user_defaults()
    assert (found.engine, found.plugins, found.task_folders) == ("mine", *expected)
    (alone / "harness.yaml").write_text("engine: theirs\noptions: {engine: {x: 1}}\nplugins: []\n", encoding="utf-8")
    found = load_user_defaults()
    assert (found.engine, found.options) == ("theirs", {"engine": {"x": 1}})
    assert (found.plugins, found.task_folders) == expected


def test_a_file_that_the_environment_names_is_the_users_own(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (alone / "mine.yaml").write_text("plugins: [a.py]\n", encoding="utf-8")
    (alone / "harness.yaml").write_text("plugins: [b.py]\n", encoding="utf-8")
    monkeypatch.setenv("HARNESS_CONFIG", "mine.yaml")
    assert load_user_defaults().plugins == ("a.py",)

"""Each mistake with a plugin's file, and the words it is told in. (Those of packages are in test_registry.)"""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.contracts.registry import Registry, load_plugins
from harness.contracts.scorer import Scorer
from harness.core.errors import UserError


def said(file: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_plugins([file])
    return str(caught.value)


def test_a_loose_file_that_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "my_method.py").touch()
    near, far = tmp_path / "my_methd.py", tmp_path / "none" / "zzz.py"
    assert said(near) == f"--plugin {near}: no such file\n  Did you mean 'my_method.py'?"
    assert said(far) == f"--plugin {far}: no such file\n  Give a Python file's path."


def test_a_loose_file_that_does_not_load(tmp_path: Path) -> None:
    file = tmp_path / "my_method.py"
    file.write_text("x = 1 +\n")
    text = said(file)
    assert text.startswith(f"--plugin {file}: did not load: SyntaxError: invalid syntax (my_method.py, line 1)\n")
    assert "Its traceback:\nTraceback (most recent call last):" in text


def test_a_loose_file_with_a_misspelt_hook(tmp_path: Path) -> None:
    file = tmp_path / "my_method.py"
    file.write_text("from harness import hookimpl\n@hookimpl\ndef register_enginez():\n    return []\n")
    assert said(file) == (
        f"{file}:2, plugin {file}: unknown hook 'register_enginez'\n  Did you mean 'register_engines'?"
    )


def test_a_loose_file_with_a_hook_that_is_not_marked(tmp_path: Path) -> None:
    """pluggy passes it over: the plugin would not be there, and nobody would know why."""
    file = tmp_path / "my_method.py"
    file.write_text("import os\n\ndef register_scorers():\n    yield 1\n\ndef step_finished(record):\n    pass\n")
    assert said(file) == (
        f"{file}:3, plugin {file}: register_scorers, step_finished: named like a hook, but not marked as one\n"
        "  Write @hookimpl above it (from harness import hookimpl)."
    )


SCORER = """\
from harness import AnswerScorer, Config, hookimpl
from pydantic import BaseModel, Field

class Mine(AnswerScorer):
    name = "mine"
    {config}
    def metrics(self, config):
        return ()
    def score(self, sample, answer, config):
        return None

@hookimpl
def register_scorers():
    yield Mine()
"""


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (
            "class Config(Config):\n        limit: float = Field('three')",
            "TypeError: Mine.Config: the default of limit is 'three': Input should be a valid number",
        ),
        (
            "class Config(Config):\n        path: str\n        limit: int = Field(0, ge=1)",
            "TypeError: Mine.Config: the default of limit is 0: Input should be greater than or equal to 1",
        ),
        ("Config = dict", "TypeError: Mine.Config is <class 'dict'>, which is no subclass of harness.Config"),
        ("class Config(BaseModel):\n        x: int = 1", "which is no subclass of harness.Config"),
    ],
    ids=["type", "bound", "no class of pydantic's", "a class without the rules"],
)
def test_a_config_that_cannot_be_right(tmp_path: Path, config: str, what: str) -> None:
    """pydantic does not look at defaults, so the mistake would show in the middle of a run, or as a number."""
    file = tmp_path / "my_scorer.py"
    file.write_text(SCORER.replace("{config}", config))
    text = said(file)
    assert text.startswith(f"--plugin {file}: did not load: TypeError: Mine.Config") and what in text


def test_a_config_whose_fields_have_no_default_is_right(tmp_path: Path) -> None:
    file = tmp_path / "my_scorer.py"
    config = "class Config(Config):\n        path: str\n        parts: list[int] = Field(default_factory=list)"
    file.write_text(SCORER.replace("{config}", config))
    assert "mine" in load_plugins([file]).names("scorer")


def test_an_unknown_name_where_nothing_is_registered() -> None:
    with pytest.raises(UserError) as caught:
        Registry().find(Scorer, "toxicity", "--set t.scorer")
    assert str(caught.value) == (
        "--set t.scorer: unknown scorer 'toxicity'\n  None is registered. See `harness plugins`."
    )

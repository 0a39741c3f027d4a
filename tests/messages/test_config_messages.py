"""Each mistake in a configuration, and the words it is told in: where, what, what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from harness.core.config import Config, load_yaml, parse, parse_options, set_path
from harness.core.errors import ExitCode, UserError, nearest, unknown


class Data(Config):
    name: str = Field(description="name")
    rows: int = Field(1, ge=1, description="rows (count)")


class Study(Config):
    seeds: tuple[int, ...] = Field((), description="seeds")
    data: Data | None = Field(None, description="data")


def message(tmp_path: Path, text: str | bytes) -> str:
    file = tmp_path / "s.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        parse(Study, load_yaml(file))
    assert caught.value.exit_code == ExitCode.USER == 2
    return str(caught.value).replace(str(file), "s.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "seeds: [1]\ndata:\n  name: a\n  rowz: 3\n",
            "s.yaml:4, data.rowz: unknown key 'rowz'\n  Did you mean 'rows'? Allowed keys: name, rows.",
        ),
        ("xyzzy: 1\n", "s.yaml:1, xyzzy: unknown key 'xyzzy'\n  Allowed keys: seeds, data."),
        (
            "data:\n  rows: 2\n",
            "s.yaml:1, data.name: required key 'name' is missing\n  Allowed keys: name, rows.",
        ),
        (
            "data:\n  name: a\n  rows: 0\n",
            "s.yaml:3, data.rows: Input should be greater than or equal to 1, found 0\n  Give a value of that kind.",
        ),
        (
            "seeds: [1, two]\ndata:\n  rows: x\n  name: a\n",
            "s.yaml:1, seeds.1: Input should be a valid integer, unable to parse string as an integer, found 'two' "
            "(and 1 more)\n  Give a value of that kind.",
        ),
        ("- a\n", "s.yaml:1: expected a mapping, found list\n  Allowed keys: seeds, data."),
        ("", "s.yaml: expected a mapping, found NoneType\n  Allowed keys: seeds, data."),
        (
            "seeds: [1]\ndata:\n  name: a\n  name: b\n",
            "s.yaml:4, data.name: key 'name' is given twice (first on line 3)\n  Keep one of the two.",
        ),
        (
            "seeds: [1\ndata: {}\n",
            "s.yaml:2: not valid YAML: expected ',' or ']', but got ':'\n  Mend the syntax at that line.",
        ),
    ],
)
def test_a_mistake_in_a_file(tmp_path: Path, text: str, expected: str) -> None:
    assert message(tmp_path, text) == expected


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_yaml(tmp_path / "absent.yaml")
    assert "absent.yaml: cannot be read: " in str(caught.value)
    assert "No such file or directory" in str(caught.value)
    assert str(caught.value).endswith("\n  Give the path of a readable UTF-8 YAML file.")
    assert "cannot be read: 'utf-8' codec" in message(tmp_path, b"\xff\xfe\xfa")


def test_a_mistake_in_options_names_the_option() -> None:
    with pytest.raises(UserError) as caught:
        parse_options(Data, {"name": "a", "rows": "many"}, "--set data")
    assert str(caught.value) == (
        "--set data, rows: Input should be a valid integer, unable to parse string as an integer, found 'many'\n"
        "  Give a value of that kind."
    )


@pytest.mark.parametrize(
    ("before", "assignment", "expected"),
    [
        ({}, "rows", "--set: 'rows' is not key=value\n  Write for example --set real_toxicity.limit=10."),
        ({}, "=3", "--set: '=3' is not key=value\n  Write for example --set real_toxicity.limit=10."),
        ({"a": 1}, "a.b=2", "--set: 'a.b=2': 'a' is a value, not a group\n  Set its keys in one place."),
    ],
)
def test_a_mistake_in_set(before: dict[str, Any], assignment: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        set_path(before, assignment)
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("name", "known", "fix"),
    [
        ("mmlu@O", ["mmlu@0", "bbh@3"], "Did you mean 'mmlu@0'? All: `harness tasks`."),
        ("MMLU@0", ["mmlu@0", "bbh@3"], "Did you mean 'mmlu@0'? All: `harness tasks`."),
        ("zzz", ["mmlu@0", "bbh@3"], "Known: bbh@3, mmlu@0. All: `harness tasks`."),
        ("zzz", [f"task-{i:02}" for i in range(13)], "task-10, task-11, .... All: `harness tasks`."),
        ("zzz", [], "None is registered. See `harness tasks`."),
    ],
)
def test_an_unknown_name(name: str, known: list[str], fix: str) -> None:
    error = unknown("--task", "task", name, known, "harness tasks")
    assert (error.where, error.what) == ("--task", f"unknown task {name!r}")
    assert error.fix.endswith(fix)


def test_nearest_is_best_first_and_may_be_empty() -> None:
    assert nearest("alpha", ["alphas", "alpha2b", "beta"])[0] == "alphas"
    assert nearest("alpha", ["zzz"]) == []

"""YAML from anybody: plain data of a bounded size, or an error with its line."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from harness.core.config import load_yaml, set_path
from harness.core.errors import UserError
from harness.core.plain_yaml import MOST_DEPTH, NotPlain, read_yaml
from harness.study.search import parse_grid

# 10 values (a list and what is in it), then 1 + 9 times as many: 91, 820, 7,381, 66,430, and 597,871 on line 6.
MULTIPLYING = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghi")
)
MERGED = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n" for a, b in itertools.pairwise("abcdefghi")
)


def test_plain_data() -> None:
    text = 'a: [1, 2.5, "x", true, null]\nb: &b {c: d}\ne: *b\nf: {<<: *b, g: 2024-01-01}\n'
    expected = {"a": [1, 2.5, "x", True, None], "b": {"c": "d"}, "e": {"c": "d"}, "f": {"c": "d", "g": "2024-01-01"}}
    assert read_yaml(text) == expected


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        (MULTIPLYING, 6, "more than 100,000 values, aliases resolved"),
        (MERGED, 6, "more than 100,000 values, aliases resolved"),
        ("x: &x\n- *x\n", 1, "an alias refers to what it stands in"),
        ("x: &x\n  y: *x\n", 1, "an alias refers to what it stands in"),
        (f"x: {'[' * MOST_DEPTH}{']' * MOST_DEPTH}\n", 1, "more than 100 levels within each other"),
        ("a: 1\nx: !!int x\n", 2, "'x' is no int"),
        ("x: !!int ''\n", 1, "'' is no int"),
        ("x: !!bool perhaps\n", 1, "'perhaps' is no bool"),
        (f"x: {'9' * 5000}\n", 1, f"'{'9' * 5000}' is no int"),
        ("a: 1\nx: {1: 2}\n", 2, "key 1 is no text: quote it"),
        ("null: 2\n", 1, "key None is no text: quote it"),
        ('a: b\nx: "\\0"\n', 2, "a text with a NUL or half a surrogate pair"),
        ('x: "\\ud800"\n', 1, "a text with a NUL or half a surrogate pair"),
        ("x: !!python/object/apply:os.system [true]\n", 1, "could not determine a constructor for the tag "),
        ("x: !!set {a}\n", 1, "could not determine a constructor for the tag "),
    ],
)
def test_what_is_more_than_plain_data(tmp_path: Path, text: str, line: int, problem: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_yaml(file)
    assert str(caught.value).startswith(f"{file}:{line}: not valid YAML: {problem}")


def test_deeper_than_python_goes() -> None:
    with pytest.raises(NotPlain, match="more than 100 levels"):
        read_yaml("[" * 20_000)


def test_more_than_is_read() -> None:
    with pytest.raises(NotPlain, match="1,000,001 characters, and no more than 1,000,000 are read"):
        read_yaml("#" * 1_000_001)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.yaml")
    with pytest.raises(UserError, match="is no regular file"):
        load_yaml(tmp_path / "a.yaml")


def test_a_set_option_is_read_alike() -> None:
    with pytest.raises(UserError) as caught:
        set_path({}, "x=!!int x")
    expected = "--set: 'x=!!int x': 'x' is no int\n  Quote the value if it is meant as text."
    assert str(caught.value) == expected
    with pytest.raises(UserError, match="key 1 is no text"):
        set_path({}, "dataset={1: 2}")
    # What is no YAML at all is a text, as ever.
    options: dict[str, object] = {}
    set_path(options, "stop={{ x")
    assert options == {"stop": "{{ x"}


def test_a_grid_is_read_alike() -> None:
    with pytest.raises(UserError, match="--search: '!!int x' is no value: 'x' is no int"):
        parse_grid(["rank=4,!!int x"])
    with pytest.raises(UserError, match=r"--search: '\[' is no value: "):
        parse_grid(["rank=["])

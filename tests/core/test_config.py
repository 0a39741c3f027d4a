"""Configuration: values, and the address of what is wrong (the texts are in messages/)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field, ValidationError

from harness.core.config import Config, Located, load_yaml, parse, parse_options, set_path
from harness.core.errors import UserError


class Inner(Config):
    depth: int = Field(ge=1, description="depth (layers)")


class Outer(Config):
    name: str = Field(description="name")
    inner: Inner | None = Field(None, description="inner part")
    parts: tuple[Inner, ...] = Field((), description="parts")


def located(tmp_path: Path, text: str) -> Located:
    file = tmp_path / "study.yaml"
    file.write_text(text, encoding="utf-8")
    return load_yaml(file)


def test_a_config_is_frozen_and_closed() -> None:
    inner = Inner(depth=2)
    with pytest.raises(ValidationError, match="frozen"):
        inner.depth = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        Inner.model_validate({"depth": 2, "width": 1})


def test_every_key_has_its_line(tmp_path: Path) -> None:
    data = located(tmp_path, "name: a\n\ninner:\n  depth: 2\nparts:\n  - depth: 1\n  -\n    depth: 4\n")
    file = tmp_path / "study.yaml"
    assert data.where(("name",)) == f"{file}:1, name"
    assert data.where(("inner", "depth")) == f"{file}:4, inner.depth"
    assert data.where(("parts", 1, "depth")) == f"{file}:8, parts.1.depth"
    # A key that is not in the file stands where its parent does.
    assert data.where(("inner", "width")) == f"{file}:3, inner.width"
    assert parse(Outer, data) == Outer(name="a", inner=Inner(depth=2), parts=(Inner(depth=1), Inner(depth=4)))


def test_tags_that_would_run_code_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="python/object/apply"):
        located(tmp_path, "name: !!python/object/apply:os.getcwd []\n")


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        (["a=1"], {"a": 1}),
        (["a.b.c=0.5", "a.d=[1, 2]"], {"a": {"b": {"c": 0.5}, "d": [1, 2]}}),
        (["a=x=y"], {"a": "x=y"}),
        (["a="], {"a": ""}),
        (["a=null", "b=true"], {"a": None, "b": True}),
        (["a=[1,"], {"a": "[1,"}),
        (["a=1", "a=2"], {"a": 2}),
    ],
)
def test_set_path(assignments: list[str], expected: dict[str, Any]) -> None:
    options: dict[str, Any] = {}
    for assignment in assignments:
        set_path(options, assignment)
    assert options == expected


def test_the_key_is_what_the_user_wrote() -> None:
    """Not pydantic's names of its own alternatives: it reports `density.constrained-float`."""

    class Choice(Config):
        density: Annotated[float, Field(le=1)] | tuple[Annotated[float, Field(le=1)], ...] = Field(1, description="d")
        inner: Inner | int = Field(0, description="part or number")

    for given, said in (
        ({"density": 1.5}, "--set, density: Input should be less than or equal to 1, found 1.5"),
        ({"density": [0.5, 2]}, "--set, density: Input should be a valid number"),
        ({"inner": {"depth": 0}}, "--set, inner.depth: Input should be greater than or equal to 1, found 0"),
    ):
        with pytest.raises(UserError) as caught:
            parse_options(Choice, given, "--set")
        assert str(caught.value).startswith(said)
    # A required key is not in what the user wrote, and is named all the same.
    with pytest.raises(UserError, match=r"^--set, inner\.depth: required key 'depth' is missing"):
        parse_options(Choice, {"inner": {}}, "--set")


def test_options_from_python_are_parsed_as_a_file_is() -> None:
    assert parse_options(Inner, {"depth": 3}, "--set inner") == Inner(depth=3)

"""Each mistake with an output folder that is not in test_store, and the words it is told in."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.core.errors import CorruptionError, UserError
from harness.steps.files import read_json, slug
from harness.steps.store import RunStore


def test_an_output_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError) as caught, RunStore(tmp_path / "run"):
        pass
    assert str(caught.value) == f"--out {tmp_path / 'run'}: cannot be written: File exists\n  Give another folder."


def test_a_damaged_json_file(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"a": 1')
    with pytest.raises(CorruptionError) as caught:
        read_json(tmp_path / "plan.json")
    assert str(caught.value).startswith(f"{tmp_path / 'plan.json'}: damaged (Expecting ',' delimiter")
    assert str(caught.value).endswith("; delete it or start over with --fresh")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a b/c", "a-b-c"), ("../..", "x"), ("mmlu@0", "mmlu@0"), ("", "x"), ("é", "x"), ("a" * 99, "a" * 60)],
)
def test_names_of_folders_are_safe(text: str, expected: str) -> None:
    assert slug(text) == expected

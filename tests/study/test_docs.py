"""What docs/studies.md and docs/clusters.md say works: a file is read and has every key, options exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from harness.study import spec
from harness.study.arms import arms_of

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "studies.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = TEXT) -> list[str]:
    """Fenced blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def read(tmp_path: Path) -> spec.Read:
    """The example, read."""
    (example,) = blocks("yaml")
    (tmp_path / "study.yaml").write_text(example, encoding="utf-8")
    return spec.read_study(tmp_path / "study.yaml")


def test_its_file_is_a_study(read: spec.Read) -> None:
    arms = {arm.name: arm for arm in arms_of(read)}
    kinds = [arm.kind for arm in arms.values()]
    # 2 methods x 2 data x 2 adapters x 2 bases x 3 seeds = 48; `further` on 2 bases, 3 seeds; `long`.
    assert kinds.count("align") == 48 + 6 + 1
    # Two steps of each `further`.
    assert kinds.count("checkpoint") == 12
    assert arms["further-llama-s1"].parents == ("sft-safe-lora-llama-s1",)
    assert arms["mine"].kind == "adapter"
    # slerp on llama for each seed, and one soup.
    assert kinds.count("merge") == 3 + 1


def test_it_has_every_key(read: spec.Read) -> None:
    def missing(model: type[BaseModel], data: dict[str, Any]) -> set[str]:
        return {field.alias or name for name, field in model.model_fields.items()} - set(data)

    data = read.located.data
    assert missing(spec.StudySpec, data) == set()
    assert missing(spec.EvaluationBlock, data["evaluation"]) == set()
    for model, key in ((spec.GridBlock, "grid"), (spec.ArmSpec, "arms"), (spec.MergeBlock, "merges")):
        written = {name for block in data[key] for name in block}
        # What is shown with a grid, or with an arm, is not shown again.
        shown = {"from", "samples", "checkpoints", "control", "set", "data_seed", "processes"}
        assert missing(model, dict.fromkeys(written)) <= shown


def test_rays_options_are_those_of_the_page() -> None:
    from harness_plugins.executors.ray.executor import RayExecutor

    rows = re.findall(r"^\| `executor\.(\w+)` \| (.*) \|$", (DOCS / "clusters.md").read_text(encoding="utf-8"), re.M)
    assert [name for name, _ in rows] == list(RayExecutor.Config.model_fields)
    for name, said in rows:
        default = RayExecutor.Config.model_fields[name].default
        if isinstance(default, int | float):
            assert said.endswith(f" {default:g}"), name


def test_it_is_short() -> None:
    assert len(TEXT.splitlines()) < 120

"""A stranger's plugins under mypy --strict, against the wheel as it is installed: their ``config`` is their own."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from harness.contracts.scaffold import KINDS, write_package

ROOT = Path(__file__).parents[2]
PLUGINS = """
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pydantic import Field

import harness
from harness import (
    Answer, AnswerScorer, Merged, Merger, Metric, PairLogps, PairwiseLoss, PairwiseRecipe, Sample, Score, ScoreJob,
    Scorer, ScorerContext, ScorerSession, hookimpl,
)


class Halfway(Merger["Halfway.Config"]):
    name = "halfway"

    class Config(harness.Config):
        share: float = Field(0.5, description="how far (no unit)")

    def merge(
        self,
        tensors: Sequence[Any],
        *,
        base: Any,
        weights: Sequence[float],
        config: Config,
        generator: Callable[[int], Any],
    ) -> Merged:
        share: float = config.share
        return Merged(tensors[0] * share)


class Length(AnswerScorer["Length.Config"]):
    name = "length"

    class Config(harness.Config):
        most: int = Field(10, description="longest answer (characters)")

    def metrics(self, config: Config) -> tuple[Metric, ...]:
        return (Metric(name="length", higher_is_better=None, unit="characters", high=config.most),)

    def score(self, sample: Sample, answer: Answer, config: Config) -> Score:
        return Score({"length": float(min(len(answer.text), config.most))})


class Rank(Scorer["Rank.Config"]):
    name = "rank"

    class Config(harness.Config):
        best: int = Field(1, description="rank of the longest (no unit)")

    def metrics(self, config: Config) -> tuple[Metric, ...]:
        return (Metric(name="rank", higher_is_better=False, unit="rank"),)

    def open(self, config: Config, context: ScorerContext) -> ScorerSession:
        return Ranking(config.best)


class Ranking(ScorerSession):
    def __init__(self, best: int) -> None:
        self.best = best

    def score(self, samples: Sequence[Sample], answers: Sequence[Answer], job: ScoreJob) -> list[Score]:
        order = sorted(range(len(answers)), key=lambda one: -len(answers[one].text))
        return [Score({"rank": float(self.best + order.index(one))}) for one in range(len(answers))]


class Margin(PairwiseLoss["Margin.Config"]):
    name = "margin"

    class Config(PairwiseRecipe):
        margin: float = Field(1.0, description="wanted distance (nats)")

    def loss(self, policy: PairLogps, reference: PairLogps | None, config: Config) -> Any:
        return config.margin * config.beta - (policy.chosen - policy.rejected)


@hookimpl
def register_mergers() -> Iterator[Merger]:
    yield Halfway()
"""
WRONG = {
    "config.share": ("config.shere", '"Config" has no attribute "shere"'),
    "Ranking(config.best)": ("Ranking(config.worst)", '"Config" has no attribute "worst"'),
    "config.most))": ("config.least))", '"Config" has no attribute "least"'),
    "config.margin *": ("config.marge *", '"Config" has no attribute "marge"'),
    "-> Merged:": ("-> int:", 'Return type "int" of "merge" incompatible with return type "Merged"'),
    "import (\n": ("import (Nothing,\n", 'Module "harness" has no attribute "Nothing"'),
}
SETTINGS = """
[mypy]
strict = true
cache_dir = cache
plugins = pydantic.mypy
[mypy-torch.*,transformers.*,datasets.*,trl.*,peft.*,accelerate.*,numpy.*,scipy.*,pandas.*,huggingface_hub.*,rich.*]
follow_imports = skip
ignore_missing_imports = true
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment into which the wheel, and nothing of the checkout, is installed."""
    folder = tmp_path_factory.mktemp("typed")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "dist")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    venv.create(folder / "env", symlinks=True)
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    (wheel,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # Its dependencies are those of this environment.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    (folder / "mypy.ini").write_text(SETTINGS, encoding="utf-8")
    return folder


def checked(folder: Path, *files: str) -> str:
    """What mypy --strict says of them."""
    command = [sys.executable, "-m", "mypy", "--python-executable", "env/bin/python", *files]
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MYPYPATH")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False).stdout


def test_a_strangers_plugins_pass(installed: Path) -> None:
    (installed / "stranger.py").write_text(PLUGINS, encoding="utf-8")
    assert checked(installed, "stranger.py") == "Success: no issues found in 1 source file\n"


@pytest.mark.parametrize("right", WRONG)
def test_a_strangers_mistake_is_found(installed: Path, right: str) -> None:
    wrong, said = WRONG[right]
    # A file of its own: mypy takes one of the same size and second for the one that it has checked.
    file = f"stranger_{list(WRONG).index(right)}.py"
    (installed / file).write_text(PLUGINS.replace(right, wrong, 1), encoding="utf-8")
    assert said in checked(installed, file)


def test_what_plugins_new_writes_passes(installed: Path) -> None:
    """All kinds at once: most of a call of mypy's is reading the wheel."""
    folder = installed / "scaffolds"
    for kind in KINDS:
        write_package(kind, f"typed-{kind}", folder / kind)
    packages = [str(next((folder / kind).glob("harness_*"))) for kind in KINDS]
    # transformers is not read here, and what derives from its Trainer derives from Any.
    assert (
        checked(installed, "--allow-subclassing-any", *packages)
        == f"Success: no issues found in {len(KINDS)} source files\n"
    )

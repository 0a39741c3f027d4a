"""The hooks. Registration hooks are called once and yield plugin instances; notification hooks announce."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pluggy

from harness.contracts.adapter import Adapter
from harness.contracts.aligner import Aligner
from harness.contracts.converter import Converter
from harness.contracts.dataset import Dataset
from harness.contracts.engine import Engine
from harness.contracts.executor import Executor
from harness.contracts.merger import Merger
from harness.contracts.report_section import ReportSection
from harness.contracts.scorer import Scorer
from harness.core.records import StepInfo, StepRecord

PROJECT = "harness"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def register_aligners() -> Iterable[Aligner]:  # type: ignore[empty-body]
    """Yield alignment methods."""


@hookspec
def register_adapters() -> Iterable[Adapter]:  # type: ignore[empty-body]
    """Yield ways of attaching trainable weights."""


@hookspec
def register_mergers() -> Iterable[Merger]:  # type: ignore[empty-body]
    """Yield merge methods."""


@hookspec
def register_scorers() -> Iterable[Scorer]:  # type: ignore[empty-body]
    """Yield scorers."""


@hookspec
def register_datasets() -> Iterable[Dataset]:  # type: ignore[empty-body]
    """Yield datasets."""


@hookspec
def register_converters() -> Iterable[Converter]:  # type: ignore[empty-body]
    """Yield conversions between row schemas."""


@hookspec
def register_engines() -> Iterable[Engine]:  # type: ignore[empty-body]
    """Yield engines."""


@hookspec
def register_executors() -> Iterable[Executor]:  # type: ignore[empty-body]
    """Yield executors."""


@hookspec
def register_tasks() -> Iterable[Path]:  # type: ignore[empty-body]
    """Yield folders of task and suite YAML files."""


@hookspec
def register_report_sections() -> Iterable[ReportSection]:  # type: ignore[empty-body]
    """Yield what is added to the page of a board."""


@hookspec
def step_started(step: StepInfo) -> None:
    """A step of any kind begins. Return values are ignored; an observer that raises is named and changes nothing."""


@hookspec
def step_finished(step: StepInfo, record: StepRecord) -> None:
    """A step of any kind has ended, well or not; ``record`` is what its status.json holds."""


@hookspec
def study_finished(run: Path) -> None:
    """Every step of a run has ended; ``run`` is its directory."""


REGISTRATION = {
    "register_aligners": "aligner",
    "register_adapters": "adapter",
    "register_mergers": "merger",
    "register_scorers": "scorer",
    "register_datasets": "dataset",
    "register_converters": "converter",
    "register_engines": "engine",
    "register_executors": "executor",
    "register_tasks": "tasks",
    "register_report_sections": "section",
}
NOTIFICATION = ("step_started", "step_finished", "study_finished")

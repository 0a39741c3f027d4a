"""Trackers that people watch trainings in: TensorBoard, Weights & Biases, MLflow and trackio, each on this machine.

A tracker is told of numbers and decides none: which are asked for enters no step's id, and one that fails is named and
left out. Nothing leaves the machine unless the tracker's own environment variables say so (`WANDB_MODE=online`).
"""

from __future__ import annotations

import importlib
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness.core.errors import UserError, unknown

FOLDER = "trackers"
"""Of a run: what the trackers write."""
MODULES = {
    "tensorboard": ("tensorboardX", "tensorboard"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "trackio": ("trackio",),
}
"""Tracker -> modules of which one must be there; the first is what to install."""
_QUIET = {
    # Each would report its own use, or its failures, to its makers.
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GRADIO_ANALYTICS_ENABLED": "False",
}
_FORCED = {
    # Hooks on gradients, and copies of weights: a tracker is told of numbers alone.
    "WANDB_WATCH": "false",
    "WANDB_LOG_MODEL": "false",
    "HF_MLFLOW_LOG_ARTIFACTS": "FALSE",
}


@dataclass(frozen=True)
class Tracking:
    """Which trackers are told, and where they write."""

    names: tuple[str, ...]
    folder: Path
    """Of all that they write."""
    project: str
    """What its runs are filed under."""


def tracking_json(tracking: Tracking | None) -> dict[str, Any] | None:
    """As plain data, for another process."""
    if tracking is None:
        return None
    return {"names": list(tracking.names), "folder": str(tracking.folder), "project": tracking.project}


def tracking_of(data: Mapping[str, Any] | None) -> Tracking | None:
    """What :func:`tracking_json` wrote."""
    return None if data is None else Tracking(tuple(data["names"]), Path(data["folder"]), data["project"])


def check_trackers(names: Sequence[str], where: str) -> None:
    """Refuse a tracker that nobody knows, or that is not installed.

    Args:
        names: as they were asked for.
        where: option or key that asked.

    Raises:
        UserError: with the command that installs it.
    """
    for name in names:
        if name not in MODULES:
            raise unknown(where, "tracker", name, MODULES, "docs/studies.md")
        if not any(find_spec(module) is not None for module in MODULES[name]):
            package = MODULES[name][0]
            raise UserError(where, f"tracker {name!r} is not installed", f"pip install {package}, or leave it out.")


class TrackedRun(ABC):
    """One run that a tracker has open."""

    writer: Any = None
    """What transformers' callback of this tracker writes with, where it takes one."""

    def log(self, values: Mapping[str, float]) -> None:
        """Write numbers by name, in which only letters, digits, ``_-./`` are left: some trackers take no others.

        Raises:
            ValueError: two names are one then.
        """
        plain = {re.sub(r"[^A-Za-z0-9_\-./]", "_", name): value for name, value in values.items()}
        if len(plain) != len(values):
            raise ValueError(f"of {len(values)} names {len(plain)} are left once `@`, `:` and the like are replaced")
        self._write(plain)

    @abstractmethod
    def _write(self, values: Mapping[str, float]) -> None:
        """Write numbers by name."""

    @abstractmethod
    def close(self) -> None:
        """End the run; all of it is on disk."""


def open_run(name: str, tracking: Tracking, run: str, kind: str) -> TrackedRun:
    """Open a run in one tracker.

    Args:
        name: of the tracker.
        tracking: where it writes.
        run: the arm.
        kind: ``train`` or ``scores``.

    Raises:
        Exception: whatever the tracker raises; the caller names it.
    """
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    os.environ.update(_FORCED)
    tracking.folder.mkdir(parents=True, exist_ok=True)
    return _RUNS[name](tracking, run, kind)


class _TensorBoard(TrackedRun):
    """Event files, a folder for each arm."""

    def __init__(self, tracking: Tracking, run: str, kind: str) -> None:
        lighter = find_spec("tensorboardX") is not None
        module = importlib.import_module("tensorboardX" if lighter else "torch.utils.tensorboard")
        # Files are named by the second, and one of the same second would be written over.
        suffix = f".{kind}-{time.time_ns():x}"
        folder = tracking.folder / "tensorboard" / _file_name(run)
        self.writer = module.SummaryWriter(str(folder), filename_suffix=suffix)

    def _write(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, 0)

    def close(self) -> None:
        self.writer.close()


class _Wandb(TrackedRun):
    """A run of `wandb sync`'s, in its folder ``wandb``."""

    def __init__(self, tracking: Tracking, run: str, kind: str) -> None:
        wandb = importlib.import_module("wandb")
        if wandb.run is not None:
            raise RuntimeError(f"this process has a run of its own open ({wandb.run.name}): finish it first")
        mode = os.environ.get("WANDB_MODE", "offline")
        settings = wandb.Settings(silent=True, console="off", disable_git=True, save_code=False)
        told = {"project": tracking.project, "name": run, "group": run, "job_type": kind, "mode": mode}
        self._run = wandb.init(**told, dir=str(tracking.folder), settings=settings)

    def _write(self, values: Mapping[str, float]) -> None:
        self._run.log(dict(values))
        self._run.summary.update(dict(values))

    def close(self) -> None:
        self._run.finish()


class _MLflow(TrackedRun):
    """A run in the database ``mlflow.db``; MLflow has given up its plain files."""

    def __init__(self, tracking: Tracking, run: str, kind: str) -> None:
        self._mlflow = mlflow = importlib.import_module("mlflow")
        if mlflow.active_run() is not None:
            raise RuntimeError("this process has a run of its own open: end it first")
        mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{tracking.folder / 'mlflow.db'}"))
        mlflow.set_experiment(tracking.project)
        mlflow.start_run(run_name=run if kind == "train" else f"{run} {kind}", tags={"arm": run, "kind": kind})

    def _write(self, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(values))

    def close(self) -> None:
        self._mlflow.end_run()


class _Trackio(TrackedRun):
    """A run in the folder ``trackio``."""

    def __init__(self, tracking: Tracking, run: str, kind: str) -> None:
        wanted = Path(os.environ.setdefault("TRACKIO_DIR", str(tracking.folder / "trackio")))
        self._trackio = trackio = importlib.import_module("trackio")
        if (found := Path(importlib.import_module("trackio.utils").TRACKIO_DIR)) != wanted:
            raise RuntimeError(f"it writes into {found} as long as this process lives")
        # transformers' callback opens the run of a training, under this name.
        if kind != "train":
            trackio.init(project=tracking.project, name=f"{run} {kind}", resume="allow", embed=False)

    def _write(self, values: Mapping[str, float]) -> None:
        self._trackio.log(dict(values))

    def close(self) -> None:
        if importlib.import_module("trackio.context_vars").current_run.get() is not None:
            self._trackio.finish()


_RUNS: dict[str, type[Any]] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "mlflow": _MLflow, "trackio": _Trackio}


def _file_name(run: str) -> str:
    """The run's name as a folder's."""
    return re.sub(r"[^A-Za-z0-9._@+-]+", "-", run).lstrip(".") or "run"

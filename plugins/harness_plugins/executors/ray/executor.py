"""Carries out orders on a Ray cluster: one that runs already, or one of this machine that ends with the run."""

from __future__ import annotations

import importlib.metadata
from typing import Literal

from packaging.version import Version
from pydantic import Field

import harness
from harness import Availability, Executor, ExecutorContext, Pool

LOWEST = Version("2.60")
INSTALL = 'pip install "harness-align[ray]"'


class RayExecutor(Executor["RayExecutor.Config"]):
    """Ray decides where an order runs, from what it needs; a lost node costs what ran there since it last saved.

    The run folder, the models and everything else that orders name lie on a path that all nodes share; nothing is
    copied. Each order has a process of Ray's own, which ends with it, and with its node, and with the run.
    """

    name = "ray"
    summary = f"on the nodes of a Ray cluster that share a folder ({INSTALL})"

    class Config(harness.Config):
        address: str | None = Field(
            None,
            description="cluster that runs already: auto, or HOST:PORT of its head, from one of its nodes; absent: one "
            "of this machine alone, which ends with the run",
        )
        cores: int = Field(1, ge=1, description="processor cores that an order has at least (count)")
        accelerator_type: str | None = Field(
            None, description="kind of GPU, as Ray names it (H100), that orders with GPUs must have; any when absent"
        )
        retries: int = Field(3, ge=0, description="how often an order is given again whose node was lost (count)")
        grace: float = Field(60.0, ge=0, description="time that a stopped order has to save (seconds)")
        environment: tuple[str, ...] = Field(
            (), description="further variables to hand on, such as a judge's key; Ray keeps none of them"
        )
        logs: Literal["none", "all"] = Field(
            "none", description="all: show what Ray and libraries print on any node, beside what steps say"
        )

    def availability(self) -> Availability:
        """Installed, and not too old."""
        try:
            found = Version(importlib.metadata.version("ray"))
        except importlib.metadata.PackageNotFoundError:
            return Availability(False, "Ray is not installed", INSTALL)
        if found < LOWEST:
            return Availability(False, f"Ray {found} is installed; this needs >={LOWEST}", INSTALL)
        return Availability(True, f"Ray {found}")

    def open(self, config: Config, context: ExecutorContext) -> Pool:
        """Connect, or start a cluster of this machine; nodes are compared before the first order."""
        from harness_plugins.executors.ray.cluster import connect
        from harness_plugins.executors.ray.pool import RayPool

        return RayPool(connect(config, context), config, context)

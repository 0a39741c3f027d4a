"""Carries out orders on a Ray cluster: one that runs already, or one of this machine that ends with the run."""

from __future__ import annotations

import importlib.metadata

from packaging.version import Version

from harness import Availability, Executor, ExecutorContext, Pool
from harness_plugins.executors.ray.options import RayOptions

LOWEST = Version("2.60")
INSTALL = 'pip install "harness-align[ray]"'


class RayExecutor(Executor["RayExecutor.Config"]):
    """Ray decides where an order runs, from what it needs; a lost node costs what ran there since it last saved.

    The run folder, the models and everything else that orders name lie on a path that all nodes share; nothing is
    copied. Each order has a process of Ray's own, which ends with it, and with its node, and with the run.
    """

    name = "ray"
    summary = f"on the nodes of a Ray cluster that share a folder ({INSTALL})"

    class Config(RayOptions):
        """All of them."""

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
        from harness_plugins.executors.ray.nodes import Comparison
        from harness_plugins.executors.ray.pool import RayPool

        cluster = connect(config, context)
        return RayPool(cluster, config, Comparison(cluster))

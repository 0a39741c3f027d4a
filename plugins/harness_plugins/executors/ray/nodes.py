"""Every node is compared with the driver's before it carries out anything."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import Order, UserError
from harness_plugins.executors.ray import worker
from harness_plugins.executors.ray.cluster import Cluster, Node

ANSWER = 180.0
"""Longest time (seconds) that a node may take to say what it is like: Python and the plugins are started there."""


@dataclass
class Comparison:
    """What nodes must be like for the orders of each run, and which of them have been found to be so."""

    cluster: Cluster
    checked: set[str] = field(default_factory=set)
    """Nodes, by their ids."""
    _known: dict[tuple[Any, ...], worker.Expected] = field(default_factory=dict)
    """By what of an order it depends on."""
    _tokens: list[Path] = field(default_factory=list)

    def expected(self, order: Order) -> worker.Expected:
        """Compare every node with this one, once for each run.

        Raises:
            UserError: a node has other versions or plugins, or does not see the run folder.
        """
        key = (order.plugins, order.folder, order.run)
        if key not in self._known:
            self._known[key] = self.cluster.thread.submit(self._ask_nodes, order).result()
        return self._known[key]

    def _ask_nodes(self, order: Order) -> worker.Expected:
        token, secret = self._write_token(order) if order.run else ("", "")
        expected = worker.Expected(order.plugins, order.folder, worker.versions_here(order.plugins), token, secret)
        nodes = self.cluster.nodes()
        for node, found in self._answers(nodes, expected):
            if found:
                raise UserError(*worker.refusal(f"node {node.name}", found))
            self.checked.add(node.id)
        return expected

    def _write_token(self, order: Order) -> tuple[str, str]:
        """A file in the run folder that every node must see, those that join later too; and what stands in it."""
        secret = secrets.token_hex(16)
        # So named that it counts for a file of a write that was cut short, should this process be killed.
        token = Path(order.run).absolute() / f".node-{secret[:8]}.{os.getpid()}.tmp"
        token.parent.mkdir(parents=True, exist_ok=True)
        token.write_text(secret, encoding="utf-8")
        self._tokens.append(token)
        return str(token), secret

    def _answers(self, nodes: list[Node], expected: worker.Expected) -> list[tuple[Node, list[str]]]:
        """In what each node differs; one that is lost meanwhile is none of them."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        task = ray.remote(worker.differences)
        common = {"num_cpus": 0, "max_retries": 0, "runtime_env": {"env_vars": dict(self.cluster.variables)}}
        asked = {}
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node.id, soft=False)
            asked[node.id] = task.options(scheduling_strategy=there, **common).remote(expected)
        found = []
        for node in nodes:
            try:
                found.append((node, list(ray.get(asked[node.id], timeout=ANSWER))))
            except ray.exceptions.GetTimeoutError:
                found.append((node, [f"it has not answered for {ANSWER:.0f} s"]))
            except ray.exceptions.RayError as error:
                if node.id in {one.id for one in self.cluster.nodes()}:
                    lines = str(error).strip().splitlines() or [type(error).__name__]
                    found.append((node, [f"harness does not run there: {lines[-1]}"]))
        return found

    def close(self) -> None:
        """Take away what was left in run folders."""
        for token in self._tokens:
            token.unlink(missing_ok=True)

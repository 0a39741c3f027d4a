"""A connection to a Ray cluster, its nodes, and what is handed on to the processes there."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from harness import ExecutorContext, UserError, check_variable
from harness_plugins.executors.ray.options import RayOptions
from harness_plugins.executors.ray.worker import Mailbox

OBJECT_STORE = 100 * 1024**2
"""Bytes: what goes through it are orders and events; everything else lies on disk."""
HANDED_ON = re.compile(
    r"(HF|HARNESS|TRANSFORMERS|TOKENIZERS|DATASETS|MALLOC|OMP|MKL|OPENBLAS|TORCH|PYTORCH|CUBLAS|NCCL|VLLM|BNB|LC)_\w+"
    r"|XDG_CACHE_HOME|XDG_CONFIG_HOME|LANG|TZ|PYTHONHASHSEED|PYTHONDONTWRITEBYTECODE"
)
STARTS = 3
"""How often a cluster of this machine is started. Ray waits 15 seconds for each of its helpers, and no setting changes
that; once it has failed, what they import is in memory."""
SECRET = {"TOKEN", "KEY", "SECRET", "PASSWORD", "CREDENTIALS"}


@dataclass(frozen=True)
class Node:
    """A node that is alive, and all that it has (what is in use included)."""

    id: str
    name: str
    resources: Mapping[str, float]

    def lacks(self, wanted: Mapping[str, float]) -> list[str]:
        """What it has too little of."""
        return [name for name, amount in wanted.items() if self.resources.get(name, 0) < amount]


@dataclass(frozen=True)
class Cluster:
    """An open connection."""

    mailbox: Any
    """Handle of the :class:`Mailbox` that workers speak to; on this machine, so that no other node's loss takes it."""
    variables: Mapping[str, str]
    """Of the environment of workers' processes, from their start."""
    secrets: Mapping[str, str]
    """Of their environment too, but not from their start: Ray writes down what it starts processes with."""
    node: str
    """Of this process."""
    opened: bool
    """Whether it was opened here."""
    thread: ThreadPoolExecutor
    """The one thread in which whatever takes long is asked of Ray, while the main thread waits for it: what a signal's
    handler raises within Ray's own waits is lost. Ray's processes on this machine end with the thread that started
    them, so it stays until the connection ends."""

    def nodes(self) -> list[Node]:
        """Those that are alive."""
        import ray

        return [Node(one["NodeID"], _name(one), one["Resources"]) for one in ray.nodes() if one["Alive"]]

    def close(self) -> None:
        """End the connection, and the cluster where it is of this machine alone."""
        import ray

        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(self.mailbox)
        if self.opened:
            ray.shutdown()
        self.thread.shutdown()


def _name(node: Mapping[str, Any]) -> str:
    """As users know it: name and address, of nodes of one machine the start of the id too."""
    host, address = node["NodeManagerHostname"], node["NodeManagerAddress"]
    return f"{host} ({address}, {node['NodeID'][:8]})"


def connect(config: RayOptions, context: ExecutorContext) -> Cluster:
    """Connect to the cluster that is asked for, or start one of this machine alone.

    Raises:
        UserError: there is none at this address, or it runs other versions.
    """
    thread = ThreadPoolExecutor(1, "ray")
    try:
        return thread.submit(_connect, config, context, thread).result()
    except BaseException:
        thread.shutdown(wait=False)
        raise


def _connect(config: RayOptions, context: ExecutorContext, thread: ThreadPoolExecutor) -> Cluster:
    if config.address is not None and config.address.startswith("ray://"):
        raise UserError(
            "--set executor.address",
            f"{config.address!r} is a client's address, and a client does not share the cluster's folders",
            "Run this command on a node of the cluster, with executor.address=auto.",
        )
    secrets = _secrets(config, context.environment)
    # Ray reports to its makers unless it is told not to; it is told before its import.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    opened = not ray.is_initialized()
    if opened:
        _init(config, context)
    here = ray.get_runtime_context().get_node_id()
    affinity = NodeAffinitySchedulingStrategy(node_id=here, soft=False)
    # Otherwise each order takes all cores, and they take turns; whoever has set it knows better.
    variables = {"OMP_NUM_THREADS": str(config.cores), **dict(handed_on(context.environment))}
    mailbox = ray.remote(num_cpus=0, scheduling_strategy=affinity)(Mailbox).remote()
    return Cluster(mailbox, variables, secrets, here, opened, thread)


def _init(config: RayOptions, context: ExecutorContext) -> None:
    attempts = 1 if config.address is not None else STARTS
    for attempt in range(1, attempts + 1):
        try:
            _init_once(config, context)
            return
        # Of many kinds, from ConnectionError to RuntimeError, as Ray comes to notice it.
        except Exception as error:
            import ray

            ray.shutdown()
            what = " ".join(str(error).split())[:300] or type(error).__name__
        if attempt < attempts:
            context.reporter.note(f"a cluster of this machine did not start (attempt {attempt} of {attempts}): {what}")
    if config.address is not None:
        raise UserError(
            f"--set executor.address={config.address}",
            f"no cluster can be used: {what}",
            "Start it (ray start --head; ray start --address HOST:PORT on the other nodes) and run this on one of its "
            "nodes; where it asks for a token, export RAY_AUTH_MODE=token first. Or leave executor.address out.",
        )
    raise UserError(
        "--executor ray",
        f"no cluster of this machine has started, in {attempts} attempts: {what}",
        "Try again when the machine is less busy; `ray stop` ends what an earlier one left. Ray's own words: "
        "/tmp/ray/session_latest/logs.",
    )


def _init_once(config: RayOptions, context: ExecutorContext) -> None:
    import ray

    shown = {"log_to_driver": config.logs == "all", "logging_level": "INFO" if config.logs == "all" else "ERROR"}
    if config.address is not None:
        ray.init(address=config.address, **shown)
        return
    size = {"num_cpus": context.cores, "num_gpus": len(context.devices), "object_store_memory": OBJECT_STORE}
    ray.init(address="local", include_dashboard=False, **size, **shown)


def handed_on(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """What workers need of this process's environment, without anything secret."""
    for name, value in environment.items():
        if HANDED_ON.fullmatch(name) and not SECRET.intersection(name.split("_")):
            yield name, value
    # What has no GPU of its own plans for the device of the node all the same: ids depend on it.
    yield "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"


def _secrets(config: RayOptions, environment: Mapping[str, str]) -> dict[str, str]:
    for name in config.environment:
        check_variable(name, "--set executor.environment")
    missing = [name for name in config.environment if name not in environment]
    if missing:
        fix = f"export {missing[0]}=... before this command, or leave it out."
        raise UserError("--set executor.environment", f"{missing[0]} is not set here", fix)
    return {name: environment[name] for name in config.environment}

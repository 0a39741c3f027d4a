"""An engine's own OpenAI-compatible server as a child process: started, waited for, and ended with all that it started.

The API key goes from one environment variable to another: it is in no command line, no log and no record.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.contracts.engine import ServerCommand
from harness.contracts.registry import Registry, load_plugins
from harness.core.config import parse_options
from harness.core.errors import StepError, UserError
from harness.core.progress import PLAIN_SECONDS, Reporter
from harness.core.records import SCHEMA_VERSION
from harness.core.specs import ModelSpec, ServeSpec
from harness.models.precision import asked_dtype
from harness.serving.check import TAKEN, Checked, api_key, check, free_port, is_loopback
from harness.serving.child import ENDED

GRACE = 15.0
"""Seconds that a server has to end by itself; then it is killed."""
POLL = 0.2
"""Seconds between two looks at a server that starts."""
TAIL = 12
"""Lines of a dead server's log that are shown."""
ATTEMPTS = 3
"""Tries to find a free port: between finding and taking it somebody else may take it."""

_CAUSE = re.compile(r"\b(?:[A-Za-z_][\w.]*(?:Error|Exception)|KeyboardInterrupt): \S.*")
_CONSEQUENCES = ("Engine core initialization failed", "See root cause above", "EngineDeadError", "WorkerProc init")


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    url: str
    """Address of its API, ending in /v1."""
    models: tuple[str, ...]
    """What requests may name: the base, then its adapters."""
    facts: Mapping[str, Any]
    """What is served: digests, template, engine; no key."""
    child: Child

    def wait(self) -> None:
        """Until it ends.

        Raises:
            StepError: it has ended, which it does not do by itself.
        """
        while self.child.running():
            time.sleep(POLL)
        raise self.child.death("ended")


class Child:
    """The process group of one server."""

    def __init__(self, command: ServerCommand, scratch: Path, log: Path | None, key: str | None) -> None:
        self._scratch, self._key = scratch, key
        self._log = log or scratch / "server.log"
        environment = {**os.environ, **command.environment}
        if command.key_variable is not None:
            environment.pop(command.key_variable, None)
            if key is not None:
                environment[command.key_variable] = key
        started = [sys.executable, "-P", "-m", "harness.serving.child", str(scratch), str(GRACE)]
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                [*started, command.module, *command.arguments],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                # A Ctrl-C of the terminal goes to this process alone, which ends the server in order.
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Also the number of the server's process group."""
        return self._process.pid

    def running(self) -> bool:
        """Whether the server is there."""
        return self._process.poll() is None

    def said(self) -> str:
        """The log so far, without the key."""
        text = self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""
        return text.replace(self._key, "***") if self._key else text

    def death(self, verb: str) -> StepError:
        """The error for a server that is gone: how it ended, its cause where the log has one, and the log's end."""
        with suppress(OSError, ValueError):
            code = json.loads((self._scratch / ENDED).read_text(encoding="utf-8"))["code"]
            verb += f" with exit code {code}" if code is not None else ""
        lines = [line.rstrip() for line in self.said().splitlines() if line.strip()]
        causes = [m.group() for line in lines if (m := _CAUSE.search(line)) and not _is_consequence(line)]
        cause = f": {causes[0][:400]}" if causes else ""
        tail = "\n".join(f"  | {line[:300]}" for line in lines[-TAIL:]) or "  | (it said nothing)"
        return StepError("harness serve", f"the server {verb}{cause}", f"The end of its log:\n{tail}")

    def stop(self) -> None:
        """End it in order, and with force what is still there; a second Ctrl-C meanwhile: with force at once."""
        try:
            with suppress(OSError):
                assert self._process.stdin is not None
                self._process.stdin.write(b".")
                self._process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE + 5)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _is_consequence(line: str) -> bool:
    return any(text in line for text in _CONSEQUENCES)


@contextmanager
def serve(
    model: str | ModelSpec | ServeSpec,
    *,
    registry: Registry | None = None,
    reporter: Reporter | None = None,
    **settings: Any,
) -> Iterator[Server]:
    """A server, ready to be asked; ended when the block is left, however it is left.

    Args:
        model: folder or hub id, or a whole ``ServeSpec``.
        registry: from ``load_plugins``; all installed plugins by default.
        reporter: says what is going on; silent by default.
        **settings: further fields of ``ServeSpec``: adapters, options, name, host, port (by default here: a free one),
            api_key_env, ready_timeout, log.

    Raises:
        UserError: it cannot be served, or the port is taken.
        StepError: the server ended while it started, or was not ready in time.
    """
    if isinstance(model, ServeSpec):
        spec = model
    else:
        model_spec = model if isinstance(model, ModelSpec) else ModelSpec(model=str(model))
        adapters = tuple(str(adapter) for adapter in settings.pop("adapters", ()))
        fields = {"model": model_spec, "adapters": adapters, "port": 0, **settings}
        spec = parse_options(ServeSpec, fields, "harness serve")
    reporter = reporter or Reporter()
    checked = check(spec, registry or load_plugins())
    if checked.problems:
        raise checked.problems[0]
    for limit in checked.limits:
        reporter.note(f"warning: {limit}")
    key = api_key(spec)
    scratch = Path(tempfile.mkdtemp(prefix="harness-serve-"))
    try:
        child, port = _start(checked, scratch, key, reporter)
        try:
            if not child.running():
                raise child.death("ended")
            yield Server(_url(spec.host, port), (checked.name, *checked.adapters), _facts(checked, port, child), child)
        finally:
            child.stop()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _start(checked: Checked, scratch: Path, key: str | None, reporter: Reporter) -> tuple[Child, int]:
    """Start the server and wait until it answers; with port 0 again if somebody took the free port meanwhile."""
    spec = checked.spec
    template = None
    if checked.template is not None:
        template = scratch / "chat_template.jinja"
        template.write_text(checked.template, encoding="utf-8")
    checked.write_sums(scratch)
    log = Path(spec.log) if spec.log is not None else None
    if log is not None and not log.parent.is_dir():
        raise UserError(f"--log {log}", "its folder is not there", f"Make it: `mkdir -p {log.parent}`.")
    for attempt in range(ATTEMPTS):
        port = free_port(spec.host, spec.port)
        child = Child(checked.command(port, template), scratch, log, key)
        try:
            reporter.note(f"starting {checked.name} on {_url(spec.host, port)}")
            _wait(child, checked, port, key, reporter)
            return child, port
        except StepError:
            child.stop()
            if spec.port == 0 and attempt + 1 < ATTEMPTS and TAKEN in child.said().lower():
                continue
            raise
        except BaseException:
            child.stop()
            raise
    raise AssertionError("unreachable")


def _wait(child: Child, checked: Checked, port: int, key: str | None, reporter: Reporter) -> None:
    import httpx

    begun = said = time.monotonic()
    headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
    wanted = {checked.name, *checked.adapters}
    # No proxy: the server is on this machine.
    with httpx.Client(base_url=_root(checked.spec.host, port), headers=headers, timeout=5.0, trust_env=False) as http:
        while True:
            if not child.running():
                raise child.death("ended while it started")
            with suppress(httpx.HTTPError, ValueError, LookupError, TypeError):
                if http.get("/health").status_code == 200:
                    listed = {str(entry["id"]) for entry in http.get("/v1/models").json()["data"]}
                    if wanted <= listed:
                        return
            now = time.monotonic()
            if now - begun > checked.spec.ready_timeout:
                late = child.death(f"was not ready within {checked.spec.ready_timeout:g} s (--ready-timeout)")
                raise late
            if now - said >= PLAIN_SECONDS:
                said = now
                reporter.note(f"still starting ({now - begun:.0f} s)")
            time.sleep(POLL)


def _root(host: str, port: int) -> str:
    """Where this machine reaches the server."""
    near = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{near}]:{port}" if ":" in near else f"http://{near}:{port}"


def _url(host: str, port: int) -> str:
    """Where others reach it, as far as it is open to them."""
    shown = socket.gethostname() if host in ("0.0.0.0", "::") else host
    return f"http://[{shown}]:{port}/v1" if ":" in shown else f"http://{shown}:{port}/v1"


def _facts(checked: Checked, port: int, child: Child) -> dict[str, Any]:
    model, engine = checked.model, checked.engine
    assert model is not None and engine is not None
    adapters = checked.adapters.items()
    return {
        "schema_version": SCHEMA_VERSION,
        "url": _url(checked.spec.host, port),
        "models": [checked.name, *checked.adapters],
        "base": {
            "name": checked.name,
            "weights_digest": model.weights_digest,
            "max_length": model.max_length,
            "dtype": asked_dtype(model),
        },
        "adapters": [
            {"name": name, "digest": one.digest, "rank": one.rank, **_control_of(checked, name)}
            for name, one in adapters
        ],
        "template_digest": checked.template_digest,
        "engine": engine.identity(checked.options),
        "local_only": is_loopback(checked.spec.host),
        "api_key": checked.spec.api_key_env is not None,
        "pid": child.pid,
        "limits": checked.limits,
    }


def _control_of(checked: Checked, name: str) -> dict[str, str]:
    steering = checked.controls.get(name)
    return {"control": str(steering.control)} if steering is not None else {}


def eval_command(server: Server, spec: ServeSpec, name: str) -> str:
    """The command that evaluates one of the served models with everything that this server offers."""
    parts = ["harness eval", f"--model {server.url}"]
    options: Sequence[tuple[str, Any]] = [("model", name), ("tokenizer", spec.model.model)]
    length = server.facts["base"]["max_length"]
    parts += [f"--set engine.{key}={value}" for key, value in [*options, ("max_length", length)]]
    if spec.api_key_env is not None:
        parts.append(f"--set engine.api_key_env={spec.api_key_env}")
    return " ".join(parts)

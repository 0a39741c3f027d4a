"""`harness serve`: an OpenAI-compatible server for a checkpoint, or for a base with adapters."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.cli.options import (
    AllowPickle,
    AllowTemplateMismatch,
    PluginFiles,
    Revision,
    RunDtype,
    TrustRemoteCode,
    options_of,
    with_defaults,
)
from harness.cli.tables import print_json
from harness.core.errors import ExitCode, Requeue
from harness.core.text import visible

if TYPE_CHECKING:
    from harness.contracts.registry import Registry
    from harness.core.specs import ServeSpec
    from harness.serving.check import Checked


def serve(
    model: Annotated[str, typer.Option(help="Model folder or hub id.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="Adapter of it, or NAME=ADAPTER, or a folder of such (repeatable)."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: a free one.", min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="What requests call the model; by default its own name.")] = None,
    revision: Revision = None,
    dtype: RunDtype = "auto",
    set_: Annotated[list[str] | None, typer.Option("--set", help="engine.KEY=V: an option of the engine.")] = None,
    engine: Annotated[str, typer.Option(help="Engine that brings the server.")] = "vllm",
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable with the key that requests must bring.")
    ] = None,
    ready_timeout: Annotated[float, typer.Option(help="Longest wait until it answers (seconds).")] = 900.0,
    log: Annotated[Path | None, typer.Option(help="Keep the server's log in this file.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Say what cannot be served, and start nothing.")] = False,
    plugin: PluginFiles = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_template_mismatch: AllowTemplateMismatch = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON when it is ready.")] = False,
) -> int:
    """Serve a model, or a base with adapters, through vLLM's OpenAI-compatible server, until Ctrl-C."""
    from harness.core.config import parse_options
    from harness.core.specs import ServeSpec

    options = options_of(set_)
    _only_engine(options)
    given = {
        "model": {
            "model": model,
            "revision": revision,
            "dtype": dtype,
            "allow_pickle": allow_pickle,
            "trust_remote_code": trust_remote_code,
            "allow_template_mismatch": allow_template_mismatch,
        },
        "adapters": adapter or (),
        "engine": engine,
        "options": options.get("engine", {}),
        "name": name,
        "host": host,
        "port": port,
        "api_key_env": api_key_env,
        "ready_timeout": ready_timeout,
        "log": str(log) if log is not None else None,
    }
    spec = parse_options(ServeSpec, given, "harness serve")
    _, registry = with_defaults(plugin)
    if check:
        return _check(spec, registry, as_json)
    return _serve(spec, registry, as_json)


def _only_engine(options: dict[str, Any]) -> None:
    from harness.core.errors import UserError

    for key, value in options.items():
        if key != "engine" or not isinstance(value, dict):
            raise UserError(f"--set {key}", "serving has options of the engine alone", "Write --set engine.KEY=VALUE.")


def _check(spec: ServeSpec, registry: Registry, as_json: bool) -> int:
    from harness.serving.check import check

    checked = check(spec, registry)
    if as_json:
        print_json(checked.to_json(), line=True)
    else:
        print(visible("\n".join(_verdict(checked)), lines=True))
    return ExitCode.USER if checked.problems else ExitCode.DONE


def _verdict(checked: Checked) -> list[str]:
    """What ``--check`` prints."""
    lines = [f"cannot: {problem}" for problem in checked.problems]
    lines += [f"note: {limit}" for limit in checked.limits]
    if not checked.problems:
        digest = (checked.template_digest or "none")[:12]
        lines.append(f"can be served: {', '.join([checked.name, *checked.adapters])} (chat template {digest})")
    return lines


def _serve(spec: ServeSpec, registry: Registry, as_json: bool) -> int:
    from harness.core.progress import PlainReporter
    from harness.serving.server import eval_command, serve as serving

    try:
        with serving(spec, registry=registry, reporter=PlainReporter()) as server:
            if as_json:
                print_json(server.facts, line=True)
            else:
                print(f"{server.url} serves {', '.join(server.models)}; Ctrl-C ends it")
                for name in server.models:
                    print(f"  {eval_command(server, spec, name)}")
                sys.stdout.flush()
            server.wait()
    # What the command line says of an evaluation (that it can be gone on with) is not true of a server.
    except KeyboardInterrupt:
        print("interrupted: the server has ended", file=sys.stderr, flush=True)
        raise SystemExit(ExitCode.INTERRUPTED) from None
    except Requeue:
        print("stopped by a signal: the server has ended", file=sys.stderr, flush=True)
        raise SystemExit(ExitCode.REQUEUE) from None
    return ExitCode.DONE

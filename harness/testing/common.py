"""What every kind of plugin must hold, and the words in which a kit says that it does not."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from harness.contracts.plugin import CONTRACT_VERSION, Plugin
from harness.contracts.registry import HEAVY, Origin, Registry, admit, load_plugins
from harness.core import config
from harness.core.records import canonical

_NAME = re.compile(r"[A-Za-z0-9][\w.@+-]*")

LOADER = """
import importlib, importlib.util, json, sys
name, file, path, heavy, call = json.loads(sys.stdin.read())
sys.path[:] = path
before = set(sys.modules)
try:
    module = importlib.import_module(name)
except ModuleNotFoundError as error:
    if file is None or error.name != name.partition(".")[0]:
        raise
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
if call is not None:
    from harness import ModelInfo
    engine = getattr(module, call["class"])()
    engine.availability()
    engine.capabilities(ModelInfo.model_validate(call["model"]), engine.Config.model_validate(call["options"]))
print(json.dumps([one for one in heavy if one in sys.modules and one not in before]))
"""
"""Run in a fresh interpreter: imports a plugin's module (and asks an engine what it can do); prints heavy imports."""


def demand(holds: bool, contract: str, seen: str) -> None:
    """Raise an AssertionError that says what the contract asks for and what was seen instead."""
    if not holds:
        raise AssertionError(f"{contract}\n  seen: {seen}")


def check_plugin(plugin: Plugin, kind: type[Plugin]) -> None:
    """What all kinds share: instance, name, summary, contract version, Config, and a light module.

    Args:
        plugin: the instance that the hook yields.
        kind: contract class that it should implement.

    Raises:
        AssertionError: names the rule and what was seen.
    """
    demand(not isinstance(plugin, type), "A hook yields an instance, not a class.", repr(plugin))
    demand(isinstance(plugin, kind), f"The plugin is an instance of harness.{kind.__name__}.", type(plugin).__name__)
    name = getattr(plugin, "name", None)
    usable = isinstance(name, str) and _NAME.fullmatch(name) is not None
    demand(usable, "`name` is made of letters, digits and . _ @ + - and starts with a letter or digit.", repr(name))
    summary = plugin.summary
    one_line = isinstance(summary, str) and bool(summary.strip()) and "\n" not in summary
    demand(one_line, "`summary` is one line that `harness plugins` can print.", repr(summary))
    demand(
        plugin.contract == CONTRACT_VERSION,
        f"`contract` is the version of the contract in force, {CONTRACT_VERSION}.",
        repr(plugin.contract),
    )
    _check_config(plugin)
    _check_import(type(plugin))


def _check_config(plugin: Plugin) -> None:
    model = plugin.Config
    is_config = isinstance(model, type) and issubclass(model, config.Config)
    demand(is_config, "`Config` is a subclass of harness.Config.", repr(model))
    settings = model.model_config
    demand(settings.get("frozen") is True, "`Config` is frozen.", f"frozen={settings.get('frozen')!r}")
    demand(settings.get("extra") == "forbid", "`Config` forbids extra fields.", f"extra={settings.get('extra')!r}")
    bare = [name for name, field in model.model_fields.items() if not (field.description or "").strip()]
    demand(not bare, "Every field of `Config` has a description (with its unit).", f"none for {', '.join(bare)}")


def _check_import(cls: type[Plugin]) -> None:
    module = sys.modules.get(cls.__module__)
    heavy = _heavy_imports(cls.__module__, getattr(module, "__file__", None))
    demand(
        not heavy,
        f"A plugin's module imports without {', '.join(HEAVY)}: move heavy imports into methods.",
        f"importing {cls.__module__} in a fresh process imported {', '.join(heavy)}",
    )


@functools.cache
def _heavy_imports(module: str, file: str | None) -> tuple[str, ...]:
    return in_fresh_process(module, file, None, "A plugin's module can be imported in a fresh process.")


def in_fresh_process(module: str, file: str | None, call: Mapping[str, Any] | None, rule: str) -> tuple[str, ...]:
    """The heavy packages that a fresh interpreter has imported once it has run :data:`LOADER`."""
    child = subprocess.run(
        [sys.executable, "-c", LOADER],
        input=json.dumps([module, file, sys.path, HEAVY, call]),
        capture_output=True,
        text=True,
        check=False,
    )
    demand(child.returncode == 0, rule, f"{module}: {child.stderr.strip().splitlines()[-1:] or ['no message']}")
    return tuple(json.loads(child.stdout.splitlines()[-1]))


def options_of(plugin: Plugin, options: Mapping[str, Any] | None) -> Any:
    """The plugin's Config with these options (its defaults where there are none)."""
    try:
        return plugin.Config.model_validate(dict(options or {}))
    except ValidationError as error:
        raise AssertionError(
            f"The kit is run with options that `Config` takes: pass `options=`.\n  seen: {error.errors()[0]['msg']} at "
            f"{error.errors()[0]['loc']}"
        ) from None


def check_identity(identity: Any, again: Any) -> None:
    """An identity enters a step's id, so it is JSON and does not change from call to call."""
    try:
        first, second = canonical(identity), canonical(again)
    except (TypeError, ValueError) as error:
        raise AssertionError(f"`identity` returns plain JSON values.\n  seen: {error}") from None
    demand(first == second, "`identity` returns the same at every call.", f"{identity} and {again}")


def registry_of(*modules: ModuleType) -> Registry:
    """A registry as if the packages of these modules were installed, beside all that really are.

    Raises:
        UserError: a misspelt hook, or a name that an installed plugin has.
        AssertionError: a module that does not load.
    """
    registry = load_plugins()
    for module in modules:
        if any(origin.module is module for origin in registry.origins):
            continue
        origin = Origin(module.__name__, module.__name__, "not installed")
        admit(registry, origin, lambda module=module: module)  # type: ignore[misc]
        if registry.problems:
            raise registry.problems[0]
        demand(origin.error is None, f"The hooks of {module.__name__} run.", f"{origin.error}\n{origin.traceback}")
    return registry

"""Plugins by name: found through entry points or loose files, checked on load, isolated when broken."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import pluggy
from pydantic import ValidationError

from harness.contracts import hookspecs
from harness.contracts.adapter import Adapter
from harness.contracts.aligner import Aligner
from harness.contracts.converter import Converter
from harness.contracts.dataset import Dataset
from harness.contracts.engine import Engine
from harness.contracts.executor import Executor
from harness.contracts.merger import Merger
from harness.contracts.plugin import CONTRACT_VERSION, Plugin
from harness.contracts.report_section import ReportSection
from harness.contracts.scorer import Scorer
from harness.core.config import Config
from harness.core.errors import UserError, nearest, unknown


@dataclass(frozen=True)
class TaskFolder:
    """A folder of task and suite YAML, and who brings it."""

    path: Path
    owner: str = ""


Observer = Callable[..., None]
KINDS: dict[str, type[Plugin]] = {
    cls.kind: cls for cls in (Aligner, Adapter, Merger, Scorer, Dataset, Converter, Engine, Executor, ReportSection)
}

GROUP = "harness"
HEAVY = ("torch", "transformers", "vllm", "datasets")
P = TypeVar("P", bound=Plugin)


@dataclass
class Origin:
    """Where plugins come from: one entry point, or one loose file."""

    name: str
    distribution: str
    version: str
    import_seconds: float = 0.0
    heavy: tuple[str, ...] = ()
    hooks: tuple[str, ...] = ()
    module: Any = None
    error: str | None = None
    traceback: str | None = None
    loose: Path | None = None

    @property
    def title(self) -> str:
        """For messages: the distribution or file and, where it says more, the entry point."""
        if self.loose is not None:
            return str(self.loose)
        return self.distribution if self.name == self.distribution else f"{self.distribution} (entry point {self.name})"


@dataclass(frozen=True)
class Registered:
    """One plugin and where it comes from."""

    kind: str
    name: str
    plugin: Plugin
    origin: Origin


@dataclass
class Registry:
    """All plugins of this process; made by :func:`load_plugins` and passed, never imported."""

    entries: dict[tuple[str, str], Registered] = field(default_factory=dict)
    origins: list[Origin] = field(default_factory=list)
    task_folders: list[TaskFolder] = field(default_factory=list)
    problems: list[UserError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    manager: pluggy.PluginManager = field(default_factory=lambda: pluggy.PluginManager(hookspecs.PROJECT))

    @property
    def loose_files(self) -> tuple[str, ...]:
        """Plugin files that were given by path, for another process to load too."""
        return tuple(str(origin.loose) for origin in self.origins if origin.loose is not None)

    def names(self, kind: str) -> list[str]:
        """Registered names of a kind, sorted."""
        return sorted(name for k, name in self.entries if k == kind)

    def find(self, kind: type[P], name: str, where: str) -> P:
        """The plugin of that kind and name.

        Args:
            kind: contract class (``Engine``, ``Scorer``, ...).
            name: registered name.
            where: option or key the name came from, for the message.

        Raises:
            UserError: unknown name (with suggestions), or the name of a broken plugin (with its traceback).
        """
        return cast(P, self.registered(kind, name, where).plugin)

    def registered(self, kind: type[Plugin], name: str, where: str) -> Registered:
        """As :meth:`find`, with the origin."""
        entry = self.entries.get((kind.kind, name))
        if entry is not None:
            return entry
        broken = [o for o in self.origins if o.error is not None]
        for origin in broken:
            if name in (origin.name, origin.distribution):
                raise UserError(
                    where,
                    f"plugin {name!r} of {origin.title} did not load: {origin.error}",
                    f"Mend or uninstall it. Its traceback:\n{origin.traceback}",
                )
        error = unknown(where, kind.kind, name, self.names(kind.kind), "harness plugins")
        if broken:
            titles = ", ".join(o.title for o in broken)
            error = UserError(where, error.what, f"{error.fix} It may belong to a plugin that did not load: {titles}.")
        raise error

    def of_kind(self, kind: type[P]) -> Iterator[tuple[str, P]]:
        """All plugins of a kind, by name."""
        for name in self.names(kind.kind):
            yield name, cast(P, self.entries[kind.kind, name].plugin)

    def announce(self, hook: str, **arguments: Any) -> None:
        """Call a notification hook; an observer that raises is named and changes nothing."""
        for implementation in getattr(self.manager.hook, hook).get_hookimpls():
            try:
                implementation.function(*[arguments[name] for name in implementation.argnames])
            except Exception as error:
                self.warnings.append(
                    f"observer {implementation.plugin_name!r} raised in {hook}: {type(error).__name__}: {error}"
                )


def load_plugins(files: Sequence[Path | str] = (), *, strict: bool = True) -> Registry:
    """Load every installed plugin, and loose files, into a fresh registry.

    Args:
        files: paths of loose plugin modules (``--plugin my_method.py``).
        strict: raise on conflicting names and misspelt hooks; otherwise collect them in ``problems``.

    Raises:
        UserError: two plugins offer one name; a hook is misspelt; a loose file does not exist or does not load.
    """
    registry = Registry()
    registry.manager.add_hookspecs(hookspecs)
    for entry_point in sorted(importlib.metadata.entry_points(group=GROUP), key=_bundled_first):
        distribution = entry_point.dist.name if entry_point.dist else "unknown"
        version = entry_point.dist.version if entry_point.dist else "?"
        origin = Origin(entry_point.name, distribution, version)
        if all((o.name, o.distribution) != (origin.name, origin.distribution) for o in registry.origins):
            admit(registry, origin, entry_point.load)
    for file in files:
        _admit_file(registry, Path(file))
    if strict and registry.problems:
        raise registry.problems[0]
    return registry


def _bundled_first(entry_point: importlib.metadata.EntryPoint) -> tuple[bool, str, str]:
    return entry_point.value != "harness_plugins", entry_point.name, entry_point.value


def _admit_file(registry: Registry, path: Path) -> None:
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path()
        close = nearest(path.name, [p.name for p in folder.glob("*.py")])
        raise UserError(
            f"--plugin {path}", "no such file", f"Did you mean {close[0]!r}?" if close else "Give a Python file's path."
        )
    origin = Origin(path.stem, str(path), "loose file", loose=path.resolve())
    told = len(registry.problems)
    admit(registry, origin, lambda: _import_file(path))
    if origin.error is not None and len(registry.problems) == told:
        raise UserError(f"--plugin {path}", f"did not load: {origin.error}", f"Its traceback:\n{origin.traceback}")


def _import_file(path: Path) -> Any:
    """Import a loose module; modules beside it can be imported by it."""
    name = f"harness_loose_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        # For good, since heavy modules are imported inside methods; last, so that no installed package is shadowed.
        sys.path.append(folder)
    spec.loader.exec_module(module)
    return module


def admit(registry: Registry, origin: Origin, load: Callable[[], Any]) -> None:
    """Import one module, check its hooks, and take in what it registers; time all of it."""
    registry.origins.append(origin)
    before = {name for name in HEAVY if name in sys.modules}
    start = time.perf_counter()
    _admit(registry, origin, load)
    # Hooks import the modules of their plugins, so they are part of what every command pays.
    origin.import_seconds = time.perf_counter() - start
    origin.heavy = tuple(name for name in HEAVY if name in sys.modules and name not in before)
    if origin.heavy:
        registry.warnings.append(
            f"plugin {origin.title} imports {', '.join(origin.heavy)} at load ({origin.import_seconds:.1f} s): every "
            "command starts that much later. Move heavy imports into methods."
        )


def _admit(registry: Registry, origin: Origin, load: Callable[[], Any]) -> None:
    try:
        origin.module = load()
        registry.manager.register(origin.module, name=origin.title)
    except (Exception, SystemExit) as error:
        # A hook with wrong arguments fails after the module's other hooks have been taken in.
        if registry.manager.is_registered(origin.module):
            registry.manager.unregister(origin.module)
        _broken(origin, error)
        return
    mistake = _misspelt(registry.manager, origin) or _unmarked(registry.manager, origin)
    if mistake is not None:
        registry.problems.append(mistake)
        registry.manager.unregister(origin.module)
        origin.error, origin.traceback = f"{mistake.what} at {mistake.where}", mistake.fix
        return
    callers = registry.manager.get_hookcallers(origin.module) or []
    origin.hooks = tuple(sorted(caller.name for caller in callers))
    folders, problems = len(registry.task_folders), len(registry.problems)
    try:
        for caller in sorted(callers, key=lambda caller: caller.name):
            if caller.name in hookspecs.REGISTRATION:
                _take(registry, origin, caller.name, _function(caller, origin)())
    except (Exception, SystemExit) as error:
        registry.entries = {key: entry for key, entry in registry.entries.items() if entry.origin is not origin}
        del registry.task_folders[folders:], registry.problems[problems:]
        registry.manager.unregister(origin.module)
        _broken(origin, error)


def _function(caller: pluggy.HookCaller, origin: Origin) -> Callable[..., Any]:
    """A module's implementation of a hook; its own name may differ (``hookimpl(specname=...)``)."""
    return next(impl.function for impl in caller.get_hookimpls() if impl.plugin is origin.module)


def _broken(origin: Origin, error: BaseException) -> None:
    origin.error = f"{type(error).__name__}: {error}"
    origin.traceback = "".join(traceback.format_exception(error))


def _misspelt(manager: pluggy.PluginManager, origin: Origin) -> UserError | None:
    """pluggy's own check for hooks that no specification knows, with the nearest name."""
    try:
        manager.check_pending()
    except pluggy.PluginValidationError:
        known = [*hookspecs.REGISTRATION, *hookspecs.NOTIFICATION]
        for caller in manager.get_hookcallers(origin.module) or []:
            if caller.name not in known:
                code = inspect.unwrap(_function(caller, origin)).__code__
                close = nearest(caller.name, known)
                fix = f"Did you mean {close[0]!r}?" if close else f"Hooks: {', '.join(known)}."
                where = f"{code.co_filename}:{code.co_firstlineno}, plugin {origin.title}"
                return UserError(where, f"unknown hook {caller.name!r}", fix)
        raise
    return None


def _unmarked(manager: pluggy.PluginManager, origin: Origin) -> UserError | None:
    """Functions that are named like hooks and not marked as such: pluggy passes them over in silence."""
    hooks = (*hookspecs.REGISTRATION, *hookspecs.NOTIFICATION)
    functions = [name for name in hooks if inspect.isfunction(getattr(origin.module, name, None))]
    unmarked = [name for name in functions if manager.parse_hookimpl_opts(origin.module, name) is None]
    if not unmarked:
        return None
    code = inspect.unwrap(getattr(origin.module, unmarked[0])).__code__
    return UserError(
        f"{code.co_filename}:{code.co_firstlineno}, plugin {origin.title}",
        f"{', '.join(unmarked)}: named like a hook, but not marked as one",
        "Write @hookimpl above it (from harness import hookimpl).",
    )


def _take(registry: Registry, origin: Origin, hook: str, offered: Iterable[Any] | None) -> None:
    if offered is None:
        raise TypeError(f"{hook}() returned None; yield or return the plugins")
    kind = hookspecs.REGISTRATION[hook]
    for item in offered:
        if kind == "tasks":
            registry.task_folders.append(TaskFolder(_task_folder(item, hook), origin.distribution))
            continue
        _check_plugin(item, kind, hook)
        key = (kind, item.name)
        other = registry.entries.get(key)
        if other is not None:
            registry.problems.append(
                UserError(
                    f"plugin {origin.title}",
                    f"{kind} {item.name!r} is also offered by {other.origin.title}",
                    f"Uninstall one of them: {origin.distribution} or {other.origin.distribution}.",
                )
            )
            continue
        registry.entries[key] = Registered(kind, item.name, item, origin)


def _task_folder(item: Any, hook: str) -> Path:
    path = Path(item)
    if not path.is_dir():
        raise NotADirectoryError(f"{hook}() names {path}, which is not a folder")
    return path


def _check_plugin(item: Any, kind: str, hook: str) -> None:
    expected = KINDS[kind]
    if inspect.isclass(item):
        raise TypeError(f"{hook}() yielded the class {item.__name__}; yield an instance of it")
    if not isinstance(item, expected):
        raise TypeError(f"{hook}() yielded {type(item).__name__}, which is no {expected.__name__}")
    if not isinstance(getattr(item, "name", None), str) or not item.name:
        raise TypeError(f"{type(item).__name__} has no name")
    if item.contract != CONTRACT_VERSION:
        raise RuntimeError(
            f"{kind} {item.name!r} was written for contract {item.contract}; this harness has {CONTRACT_VERSION}. "
            + ("Update harness." if item.contract > CONTRACT_VERSION else "Update the plugin.")
        )
    _check_config(item)


def _check_config(item: Plugin) -> None:
    """pydantic takes defaults as they stand: one of the wrong type would reach the plugin's code."""
    model = item.Config
    if not (inspect.isclass(model) and issubclass(model, Config)):
        raise TypeError(f"{type(item).__name__}.Config is {model!r}, which is no subclass of harness.Config")
    fields = model.model_fields.items()
    defaults = {name: f.default for name, f in fields if not f.is_required() and f.default_factory is None}
    try:
        model.model_validate(defaults, by_name=True)
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            if problem["loc"] and problem["loc"][0] in defaults:
                key = ".".join(map(str, problem["loc"]))
                raise TypeError(
                    f"{type(item).__name__}.Config: the default of {key} is {problem['input']!r}: {problem['msg']}"
                ) from None

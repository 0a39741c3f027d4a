"""Installed packages for tests: a module and the dist-info that pip would have written beside it."""

from __future__ import annotations

from pathlib import Path

from harness.contracts.plugin import CONTRACT_VERSION

EXECUTOR = """
from harness import Executor, InProcessPool, hookimpl

class Mine(Executor):
    name = "{name}"
    summary = "for a test"
    contract = {contract}

    def open(self, config, context):
        return InProcessPool(context)

@hookimpl
def register_executors():
    yield Mine()
"""


def executor(name: str = "mine", contract: int = CONTRACT_VERSION) -> str:
    """Source of a module that registers one executor."""
    return EXECUTOR.format(name=name, contract=contract)


def install(site: Path, distribution: str, module: str, source: str, entry: str | None = None) -> Path:
    """Write ``module`` and its dist-info into ``site``; returns the module's file."""
    site.mkdir(parents=True, exist_ok=True)
    file = site / f"{module}.py"
    file.write_text(source, encoding="utf-8")
    info = site / f"{distribution.replace('-', '_')}-1.2.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[harness]\n{entry or module} = {module}\n", encoding="utf-8")
    return file

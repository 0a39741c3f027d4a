"""Side files: what a page loads only when somebody asks for it, as scripts that hold one JSON value each.

A page that was opened from a disk may not read files, but it may load scripts. The name of a file is the digest of what
is in it, so that what arms share (the questions of a task) lies there once.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from harness.core.errors import CorruptionError
from harness.report.pages.page import script_json
from harness.steps.files import read_json, stays_inside, write_bytes, write_json

CALL = "harnessSide"
"""Function of the page's script that takes what a side file holds."""
DIGITS = 20
"""Hexadecimal digits of a side file's name."""
CHUNK_BYTES = 400_000
"""Texts of a side file, about (bytes of JSON)."""


_NAME = re.compile(f"[0-9a-f]{{{DIGITS}}}")
MANIFEST = "pages.json"


class Pages:
    """The pages and figures of one report in a folder, which may hold somebody's own files, too."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.names: set[str] = set()

    def write(self, name: str, data: bytes) -> None:
        """Write one file; ``name`` is its path in the folder."""
        self.names.add(name)
        (self.out / name).parent.mkdir(parents=True, exist_ok=True)
        (self.out / name).write_bytes(data)

    def finish(self) -> None:
        """Delete what the report before this one wrote and this one did not; note what this one wrote."""
        file = self.out / MANIFEST
        old: list[Any] = []
        with contextlib.suppress(OSError, CorruptionError, KeyError, TypeError):
            old = list(read_json(file)["files"])
        for name in old:
            if isinstance(name, str) and name not in self.names and stays_inside(name):
                (self.out / name).unlink(missing_ok=True)
        write_json(file, {"files": sorted(self.names)})


class SideFiles:
    """A folder of side files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: set[str] = set()

    def add(self, value: Any) -> str:
        """Write one value; returns its name, the same for equal values."""
        text = script_json(value)
        name = hashlib.sha256(text.encode()).hexdigest()[:DIGITS]
        if name not in self.names:
            self.names.add(name)
            write_bytes(self.folder / f"{name}.js", f'{CALL}("{name}",{text});\n'.encode())
        return name

    def sweep(self) -> None:
        """Delete side files that an earlier report left in the folder, and nothing else."""
        for file in self.folder.glob("*.js"):
            if _NAME.fullmatch(file.stem) and file.stem not in self.names:
                file.unlink()

    def add_chunks(self, values: Iterable[Any]) -> list[tuple[str, int]]:
        """Write a list in parts of about `CHUNK_BYTES`; returns the name of each and where it ends."""
        found, end = [], 0
        for part in _parts(values):
            end += len(part)
            found.append((self.add(part), end))
        return found


def _parts(values: Iterable[Any]) -> Iterator[list[Any]]:
    part: list[Any] = []
    size = 0
    for value in values:
        length = len(script_json(value))
        if part and size + length > CHUNK_BYTES:
            yield part
            part, size = [], 0
        part.append(value)
        size += length
    if part:
        yield part

"""Side files: what a page loads only when somebody asks for it, as scripts that hold one JSON value each.

A page that was opened from a disk may not read files, but it may load scripts. The name of a file is the digest of what
is in it, so that what arms share (the questions of a task) lies there once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from harness.report.pages.page import script_json
from harness.steps.files import write_bytes

CALL = "harnessSide"
"""Function of the page's script that takes what a side file holds."""
CHUNK_BYTES = 400_000
"""Texts of a side file, about (bytes of JSON)."""


class SideFiles:
    """A folder of side files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: set[str] = set()

    def add(self, value: Any) -> str:
        """Write one value; returns its name, the same for equal values."""
        text = script_json(value)
        name = hashlib.sha256(text.encode()).hexdigest()[:20]
        if name not in self.names:
            self.names.add(name)
            write_bytes(self.folder / f"{name}.js", f'{CALL}("{name}",{text});\n'.encode())
        return name

    def sweep(self) -> None:
        """Delete what an earlier report left in the folder."""
        for file in self.folder.glob("*.js"):
            if file.stem not in self.names:
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

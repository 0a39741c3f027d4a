"""Four ways to spoil one file, and the walk over every file of a folder that tests of damage share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path


def truncate(file: Path) -> None:
    """Half of it is left."""
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    """One bit, in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def empty(file: Path) -> None:
    """There, with nothing in it."""
    os.truncate(file, 0)


HARMS: dict[str, Callable[[Path], None]] = {"truncate": truncate, "flip": flip, "delete": Path.unlink, "empty": empty}


def files_of(folder: Path) -> set[str]:
    """Every file of a folder, by its name in it."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def one_by_one(folder: Path, harm: str) -> Iterator[str]:
    """Spoil each file in turn and mend it again; yields the name of the one that is spoilt."""
    for name in sorted(files_of(folder)):
        file = folder / name
        before = file.read_bytes()
        HARMS[harm](file)
        yield name
        file.write_bytes(before)

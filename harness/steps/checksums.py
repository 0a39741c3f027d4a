"""``checksums.json``: the SHA-256 of every file of an adapter's or a model's folder, written when all else is.

Whoever makes the folder holds all of it against this record before calling it done. Whoever uses it asks for what is
used: weights, configurations, tokenizer, template, lineage. A folder without a record is an outsider's and taken as it
is. Names are relative, so that a folder can be moved or published.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from harness.core.errors import CorruptionError, UserError
from harness.steps.files import read_json, stays_inside, write_json
from harness.steps.provenance import file_digest

CHECKSUMS = "checksums.json"
PAGES = frozenset({"README.md", "merge.html"})
"""Read by people alone, and theirs to write into."""


def record_files(folder: Path, files: Iterable[Path]) -> None:
    """Write the record of a folder's files; hidden ones are nobody's, and the record itself is covered by its own."""
    own = [path for path in files if path.is_file() and path != folder / CHECKSUMS and not path.name.startswith(".")]
    write_json(folder / CHECKSUMS, {"files": {p.relative_to(folder).as_posix(): file_digest(p) for p in own}})


def is_recorded(folder: Path, *names: str) -> bool:
    """Whether the record names one of these files, there or lost: it says what kind of folder it was."""
    with contextlib.suppress(OSError, CorruptionError):
        found = read_json(folder / CHECKSUMS)
        return isinstance(found, dict) and any(name in found.get("files", ()) for name in names)
    return False


def differences(folder: Path, *, everything: bool) -> dict[str, str]:
    """What is not as it was written: name -> how; empty for a whole folder.

    Args:
        folder: carries a record, or should.
        everything: also pages and sub-folders, which an adapter or a model is used without.
    """
    record = folder / CHECKSUMS
    if not record.is_file():
        return {CHECKSUMS: "is missing"}
    try:
        files = dict(read_json(record)["files"])
    except (CorruptionError, KeyError, TypeError, ValueError):
        return {CHECKSUMS: "is damaged"}
    used = [name for name in files if name not in PAGES and ("/" not in name or name.startswith("conditioning/"))]
    wanted = files if everything else used
    found = {
        name: _difference(folder / name, str(files[name])) if stays_inside(name) else "lies outside of the folder"
        for name in wanted
    }
    return {name: how for name, how in found.items() if how}


def _difference(file: Path, recorded: str) -> str:
    if not file.is_file():
        return "is missing"
    seen = file_digest(file)
    if seen == recorded:
        return ""
    return f"has SHA-256 {seen[:12]}, and {recorded[:12]} was written" if file.stat().st_size else "is empty"


def told(found: Mapping[str, str]) -> str:
    """Differences in one line, at most three of them in full."""
    said = [f"{name} {how}" for name, how in found.items()]
    return "; ".join([*said[:3], *([f"and {len(said) - 3} more"] if len(said) > 3 else [])])


def refuse_damaged(folder: Path, where: str) -> None:
    """Stop whoever would use an adapter or a model that is not as it was written.

    Raises:
        UserError: naming the files that differ from the record.
    """
    if (folder / CHECKSUMS).is_file() and (found := differences(folder, everything=False)):
        raise UserError(
            where,
            told(found),
            f"Make or fetch it again; if the change is yours, delete {CHECKSUMS} in it, and it is taken as it is.",
        )


def still_whole(found: Mapping[str, str], where: str, fix: str) -> str:
    """Asked by whoever made a folder; returns what is to be said of pages that were written into.

    Args:
        found: what :func:`differences` finds, everything looked at.
        where: what messages call the folder.
        fix: how it is made again.

    Raises:
        UserError: naming the files that differ from the record.
    """
    if wrong := {name: how for name, how in found.items() if name not in PAGES}:
        raise UserError(where, told(wrong), fix)
    return f"; {told(found)}: left as it is" if found else ""

"""What is wrong with a step, said in the words of the study's file: its lines and keys, and no command's options."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from harness.core.errors import UserError, nearest
from harness.study.spec import Read

Place = tuple[str | int, ...]
_KEYS = {
    "METHOD": "method",
    "method": "method",
    "--adapter": "adapter",
    "--dataset": "data",
    "--from": "from",
    "--checkpoints": "checkpoints",
    "--search": "search",
    "--task": "tasks",
    "--tasks": "task_folders",
    "--suite": "suite",
    "--engine": "engine",
}
"""First word of where a command has it wrong -> key of the block of the study's file."""
_OF_SCORER = re.compile(r"task (\S+), scorer \S+, (.+)")
_OF_BASE = {"--model": "model", "--template": "template", "--revision": "revision"}
_FIXES = (
    (r"--set ([\w@.+-]+)=(\S+?)(?=[\s;,.`]|$)", r"`set: {\1: \2}`"),
    (r"--search ([\w.]+)=([\w.,-]+\w)", r"`search: {\1: [\2]}`"),
    (r"--data-revision ([\w./-]+)=(\w+)", r"`data_revisions: {\1: \2}`"),
    (r"--template (FILE|\w+)", r"`template: \1` of the base"),
    (r"(?:pass )?--allow-template-mismatch", "`allow_template_mismatch: true` of the base"),
    (r"--allow-pickle", "`allow_pickle: true` of the base"),
    (r"--trust-remote-code", "`trust_remote_code: true` of the base"),
)


@contextmanager
def said_at(read: Read, place: Place, base: str | None = None) -> Iterator[None]:
    """What is wrong within is said with the line of the study's file.

    Args:
        read: the study.
        place: path of the block that asks for what is done.
        base: name of the base that it is done on.
    """
    try:
        yield
    except UserError as error:
        if read.from_command or error.where.startswith(f"{read.located.source}:"):
            raise
        fix = in_yaml(error.fix)
        if error.what.startswith("unknown data set") and (close := nearest(error.what.split("'")[1], read.spec.data)):
            fix = f"Did you mean {close[0]!r} of `data`? {fix}"
        raise UserError(_where(read, place, base, error.where), error.what, fix) from None


def in_yaml(fix: str) -> str:
    """A remedy with keys of a study's file in place of a command's options."""
    for option, key in _FIXES:
        fix = re.sub(option, key, fix)
    return fix


def _where(read: Read, place: Place, base: str | None, where: str) -> str:
    if (option := _OF_SCORER.fullmatch(where)) is not None:
        return read.where_set(place, [option[1], "scorer", *option[2].split(", ")])
    first, _, rest = where.partition(" ")
    if first.rstrip(",") in ("--set", "set"):
        return read.where_set(place, re.split(r"[ ,]+", rest.strip()))
    if first == "--search" and rest:
        return read.where(*place, "search", rest)
    if first in _OF_BASE and base is not None:
        found = read.where("bases", base, _OF_BASE[first])
    elif first.rstrip(",") in _KEYS:
        found = read.where(*place, _KEYS[first.rstrip(",")])
    else:
        return f"{read.where(*place)} ({where})"
    return f"{found} ({rest})" if rest else found

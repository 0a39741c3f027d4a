"""Regular expressions from a file that anybody may have written: tried in a process that can be ended, then used."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from harness.core.errors import UserError

SECONDS = 20
"""A thousand harmless ones take a fraction of one."""
_HARMLESS = re.compile(r"(?:[\w-]|\\?\.)*")
"""Nothing is repeated and nothing chosen from: linear."""
_BESIDE = ("act_fn", "rotary_emb", "dropout")
"""Modules without weights, which no file names; peft tries them too."""
_TRIAL = """
import json, re, sys
asked = json.load(sys.stdin)
for number, (how, pattern) in enumerate(asked["patterns"]):
    print(number, flush=True)
    try:
        made = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        print(json.dumps(str(error)))
        break
    for name in asked["names"]:
        getattr(made, how)(name)
else:
    print("done")
"""


@dataclass(frozen=True)
class Pattern:
    """One regular expression as a library will use it."""

    key: str
    """Where it stands."""
    given: str
    how: Literal["match", "fullmatch"]
    wrapped: str = ""
    """What the library makes of it."""


def check_patterns(where: str, patterns: Sequence[Pattern], names: Iterable[str]) -> None:
    """Try patterns on names of modules, their parents and neighbours.

    Raises:
        UserError: one is no regular expression, or does not end in time.
    """
    tried = [pattern for pattern in patterns if not _HARMLESS.fullmatch(pattern.given)]
    if not tried:
        return
    known = set(names)
    for name in list(known):
        parts = name.split(".")
        parents = [".".join(parts[:cut]) for cut in range(1, len(parts))]
        known |= {one for parent in parents for one in (parent, *(f"{parent}.{more}" for more in _BESIDE))}
    asked = {"patterns": [(one.how, one.wrapped or one.given) for one in tried], "names": sorted(known)}
    said = _try(json.dumps(asked))
    if said[-1] == "done":
        return
    number = next(int(line) for line in reversed(said) if line.isdigit())
    where = f"{where}, {tried[number].key} in adapter_config.json"
    given = repr(tried[number].given[:80])
    if said[-1].isdigit():
        what = f"{given} does not end within {SECONDS} s on the names of {len(known)} modules"
        raise UserError(where, what, "Write it without nested repetition, or list the modules.")
    raise UserError(where, f"{given} is no regular expression: {json.loads(said[-1])}", "Mend it, or list the modules.")


def _try(asked: str) -> list[str]:
    """What the trial said, a line for each pattern that was begun."""
    # Bare and fast: no site packages, nothing of the user's environment.
    command = [sys.executable, "-I", "-S", "-c", _TRIAL]
    try:
        done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=SECONDS, check=False)
        out = done.stdout
    except subprocess.TimeoutExpired as late:
        out = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
    return out.split("\n")[:-1] or ["0"]

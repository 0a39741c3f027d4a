"""docs/reading-the-numbers.md: its commands exist and its table is that of the script."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import typer.main

from harness.cli.app import app

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "reading-the-numbers.md").read_text(encoding="utf-8")


def test_its_commands_exist() -> None:
    lines = [line for block in re.findall(r"```console\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]
    assert len(lines) == 5
    for line in lines:
        words = shlex.split(line.removeprefix("$ ").split("  #")[0])[1:]
        group: Any = typer.main.get_command(app)
        known = {option for parameter in group.commands[words[0]].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, line


def test_the_table_has_every_interval_that_is_simulated_and_its_rates_hold() -> None:
    """A small sample of each line agrees with what is printed: 100 sets have a standard error of at most 5 points."""
    script = runpy.run_path(str(ROOT / "scripts" / "coverage.py"))
    rows = [line.strip("| ").split(" | ") for line in TEXT.splitlines() if re.match(r"\| .* % \|", line)]
    printed = {(row[0], row[1]): float(row[2].split()[0]) / 100 for row in rows}
    lines = list(script["lines"]())
    assert list(printed) == [(name, told) for name, told, _ in lines]
    quick = [line for line in lines if "bootstrap" not in line[0]]
    for name, told, draw in quick[:: 3 if len(quick) > 20 else 1]:
        found = script["rate"](draw, 100, 5)[0]
        rate = printed[name, told]
        assert abs(found - rate) < 4 * np.sqrt(rate * (1 - rate) / 100), (name, told, found)
    # What the text promises: five seeds where training noise dominates, and everything that a board prints.
    ours = {key: rate for key, rate in printed.items() if not key[0].startswith("(")}
    assert all(rate >= 0.93 for (_, told), rate in ours.items() if told.startswith(("5 seeds", "0/1, 5")))
    assert all(rate >= 0.90 for rate in ours.values())

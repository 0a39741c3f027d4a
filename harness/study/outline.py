"""A study's arms and data in a few lines: seeds and bases folded, the rows that a paper counts beside ours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.core.errors import CorruptionError
from harness.report.claims import claim_warnings
from harness.steps.files import read_json
from harness.steps.folder import STEP
from harness.study.arms import Arm
from harness.study.cells import Searched
from harness.study.spec import StudySpec


def counted(arms: Sequence[Arm]) -> str:
    """How many arms there are of each kind, the bases beside them: ``310 arms (260 align, 50 merge) and 4 bases``.

    Cells of searches are no arms: they are counted after them.
    """
    kinds = Counter(arm.kind for arm in arms)
    bases, cells = kinds.pop("base", 0), kinds.pop("search", 0)
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    said = f"{kinds.total()} arms{f' ({told})' if told else ''} and {bases} base{'' if bases == 1 else 's'}"
    return f"{said}; {cells} cells of searches" if cells else said


def searched(searches: Iterable[Searched]) -> list[dict[str, Any]]:
    """One row for each search of a recipe: what it tries, for how many arms, and what was chosen."""
    return [
        {
            "search": one.name,
            "cells": len(one.cells) or "after another search",
            "varied": ", ".join(next(iter(one.cells.values()), {})),
            "arms": len(one.arms),
            "chosen": ", ".join(f"{key} {value}" for key, value in (one.values or {}).items()) or "not yet",
        }
        for one in searches
    ]


def families(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """One row for arms that differ in base and seed alone; cells of searches are none."""
    arms = [arm for arm in arms if not arm.cell]
    names = {arm.name: _family(arm) for arm in arms}
    found: dict[tuple[str, str], list[Arm]] = {}
    for arm in arms:
        found.setdefault((arm.kind, "" if arm.kind == "base" else names[arm.name]), []).append(arm)
    return [
        {
            "kind": kind,
            "arm": name or ", ".join(arm.name for arm in some),
            "bases": len({arm.base for arm in some}),
            "seeds": len({arm.factors["seed"] for arm in some if arm.factors.get("seed") is not None}) or "",
            "arms": len(some),
            "from": ", ".join(dict.fromkeys(names[parent] for arm in some for parent in arm.parents)),
        }
        for (kind, name), some in found.items()
    ]


def undecidable(spec: StudySpec, arms: Sequence[Arm], tasks: Sequence[str]) -> list[str]:
    """Why claims of the study cannot be decided, whatever its numbers will be; one line for each such claim.

    Args:
        spec: of the study.
        arms: all of them.
        tasks: what they are asked, by name.
    """
    asked = [arm for arm in arms if not arm.steered]
    named = [(arm.name.replace(f"-s{arm.factors.get('seed')}", "", 1), arm.factors) for arm in asked]
    told = [(name, {key: value for key, value in factors.items() if value is not None}) for name, factors in named]
    return claim_warnings(spec.claims, told, tasks)


def _family(arm: Arm) -> str:
    """The arm's name without base and seed."""
    seed = arm.factors.get("seed")
    return arm.name.replace(f"-{arm.base}" + (f"-s{seed}" if seed is not None else ""), "", 1)


def data_rows(spec: StudySpec, root: Path) -> list[dict[str, Any]]:
    """One row for each short name of data: the rows that a paper counts, and ours as far as an arm has read them.

    Args:
        spec: of the study.
        root: its run folder, there or not.
    """
    ours = _rows_read(root)
    return [
        {
            "data": name,
            "is": expression,
            "rows stated": f"{spec.rows[name]:,}" if name in spec.rows else "",
            "rows here": f"{ours[name]:,}" if name in ours else "not read yet",
        }
        for name, expression in spec.data.items()
    ]


def _rows_read(root: Path) -> dict[str, int]:
    """Short name of data -> rows that can be used, held-out ones too, as records of alignments have counted them."""
    found: dict[str, int] = {}
    for file in sorted(root.glob(f"steps/align-*/{STEP}")):
        try:
            record = read_json(file)
            counts: Mapping[str, Mapping[str, int]] = record["counts"]
            found[str(record["factors"]["data"])] = sum(one["usable"] for one in counts.values())
        except (OSError, CorruptionError, KeyError, TypeError):
            continue  # another process writes it, or will again
    return found

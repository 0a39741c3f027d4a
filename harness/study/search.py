"""`harness align --search`: a study of one arm whose recipe is searched, of which nothing is asked.

The study is written from the command's options. It is planned, carried out and taken up again as any other, and its
folder is a run folder: ``harness study status`` knows it, and its cells have the ids that the same recipes have
anywhere else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from harness.contracts.registry import Registry, load_plugins
from harness.core.config import parse_options
from harness.core.errors import CorruptionError, UserError
from harness.core.plain_yaml import read_yaml
from harness.core.progress import Reporter
from harness.core.specs import AlignSpec, ModelSpec
from harness.steps.files import read_json, slug
from harness.steps.store import RUN
from harness.study.cells import OPTION, Grid
from harness.study.plan import StudyPlan, plan_study
from harness.study.run import Study, run_study
from harness.study.searched import FILE, read_choices

BEST = "best"
"""The arm of such a study, and the link in its folder to what it has become."""
BASE, START = "base", "start"
HEAD = """\
# Written by `harness align --search`. Its folder is a study's: `harness study status`, and `study steps` and
# `study step` with this file, work on it. Copy it to go on from it with other arms and seeds; before anything is
# asked of them, take `allow_template_mismatch` out: templates are to agree then.
"""


@dataclass(frozen=True)
class Search:
    """What a search left behind."""

    study: Study
    best: Path | None
    """Where the chosen cell lies: its adapter, or its model; None: no cell has ended well."""


def search(
    method: str,
    model: str | ModelSpec,
    dataset: str,
    *,
    out: str | Path,
    grid: Grid | None = None,
    fresh: bool = False,
    retry_failed: bool = False,
    registry: Registry | None = None,
    reporter: Reporter | None = None,
    execute: Callable[[StudyPlan, Path, Reporter, bool], Study] | None = None,
    **settings: Any,
) -> Search:
    """Align once per cell of a grid and choose on held-out rows: what `harness align --search` does.

    Args:
        method: registered aligner.
        model: folder or hub id of the base, or a ``ModelSpec``.
        dataset: expression over data sets.
        out: run folder of the search; the same call goes on where an earlier one stopped.
        grid: key -> values, laid over the method's own grid: keys of the recipe, or of the adapter (``rank`` is short
            for ``adapter.rank``). A single value fixes a key.
        fresh: train every cell again.
        retry_failed: try again what failed.
        registry: from ``load_plugins``; all installed plugins by default.
        reporter: says what is going on; silent by default.
        execute: carries it out elsewhere (:func:`harness.study.workers.through`); in this process by default.
        **settings: further fields of ``AlignSpec``: adapter, start, template, samples, checkpoints, seed, options.

    Raises:
        UserError: a mistake of the user's, before anything ran.
    """
    model_spec = model if isinstance(model, ModelSpec) else ModelSpec(model=str(model))
    fields = {"method": method, "model": model_spec, "dataset": dataset, **settings}
    text = study_of(parse_options(AlignSpec, fields, "harness align"), grid or {})
    root = Path(out)
    _refuse_older(root)
    chosen = {} if fresh else read_choices(root)
    plan = plan_study(root / "study.yaml", registry=registry or load_plugins(), text=text, chosen=chosen)
    if (root / BEST).exists() and not (root / BEST).is_symlink():
        raise UserError(f"--out {root}", f"{BEST!r} in it is not a search's pointer", "Move it away.")
    done = run_study(plan, root, fresh=fresh, retry_failed=retry_failed, reporter=reporter, execute=execute)
    return Search(done, _point(done))


def study_of(spec: AlignSpec, grid: Grid) -> str:
    """The YAML of a study of one arm, aligned as ``spec`` says but for what the grid decides."""
    # Nothing is asked of the arms; an evaluation holds templates against each other, an alignment does not.
    base = {**_told(spec.model), "allow_template_mismatch": True}
    arm: dict[str, Any] = {"name": BEST, "base": BASE, "method": spec.method}
    arm |= {"data": spec.dataset, "adapter": spec.adapter}
    same = {key: value for key, value in _told(spec).items() if key in ("seed", "data_seed", "processes", "samples")}
    arm |= {**same, "checkpoints": list(spec.checkpoints)} if spec.checkpoints else same
    arms = [arm | {"search": {key: list(values) for key, values in grid.items()}, "set": spec.options}]
    if spec.template is not None:
        base["template"] = spec.template
    if spec.start is not None:
        arm_of_start = {"name": START, "base": BASE, "adapter": spec.start}
        arms = [arm_of_start, {**arms[0], "from": START}]
    whole = {
        "study": slug(f"search-{spec.method}"),
        "bases": {BASE: base},
        **({"data_revisions": dict(spec.data_revisions)} if spec.data_revisions else {}),
        "arms": arms,
        "evaluation": "none",
    }
    return HEAD + yaml.safe_dump(whole, sort_keys=False, allow_unicode=True)


def _told(spec: AlignSpec | ModelSpec) -> dict[str, Any]:
    """What differs from the defaults, as plain data."""
    return spec.model_dump(mode="json", exclude_defaults=True)


def parse_grid(texts: Sequence[str]) -> dict[str, list[Any]]:
    """``KEY=v1,v2,...`` of the command line, read as YAML values.

    Raises:
        UserError: no ``=``, no value, a value or key given twice.
    """
    grid: dict[str, list[Any]] = {}
    for text in texts:
        key, separator, listed = (part.strip() for part in text.partition("="))
        parts = [part.strip() for part in listed.split(",")]
        if not separator or not key or not all(parts):
            raise UserError(OPTION, f"{text!r} is not KEY=v1,v2,...", f"Write for example {OPTION} rank=8,16.")
        values = [_value(part) for part in parts]
        if key in grid or len(set(map(repr, values))) < len(values):
            raise UserError(OPTION, f"{text!r} gives a key or a value twice", "Give each key and value once.")
        grid[key] = values
    return grid


def _value(text: str) -> Any:
    try:
        value = read_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(OPTION, f"{text!r} is no value: {getattr(error, 'problem', error)}", "Quote texts.") from None
    if isinstance(value, str):
        # YAML wants a dot in 1e-5; people do not write one.
        try:
            return float(value)
        except ValueError:
            pass
    return value


def _refuse_older(root: Path) -> None:
    """Stop before the folder of a search as it was kept before it was a study: one alignment's folder per cell.

    Raises:
        UserError: it is such a folder.
    """
    try:
        record = read_json(root / FILE) if (root / FILE).is_file() else {}
    except CorruptionError:
        return
    if isinstance(record, dict) and "cells" in record and "searches" not in record:
        what = "holds a search of an older harness, whose cells are folders of alignments"
        fix = f"Give another --out: a search is a study now. The adapters there stay usable, {root / BEST} say."
        raise UserError(RUN.where(root), what, fix)


def _point(done: Study) -> Path | None:
    """Link ``best`` to what was chosen, replaced atomically and relative, so that the folder can be moved."""
    link = done.root / BEST
    made = done.plan.promises.get(BEST)
    if made is None or made.step is None or BEST in done.failures:
        link.unlink(missing_ok=True)
        return None
    (record,) = read_json(done.root / FILE)["searches"].values()
    temporary = link.with_name(f".{BEST}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(Path("steps", record["best"], "artifact"), target_is_directory=True)
    temporary.replace(link)
    return link

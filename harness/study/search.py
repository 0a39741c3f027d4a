"""Search: one full alignment per cell of a grid, and a choice among them on held-out rows.

The grid of a method is its own (``Recipe.search_grid``; arXiv 2406.04879, appendix B, for the bundled ones). Every cell
is kept in a folder of its own and is an alignment like any other; ``best`` points to the chosen one. Torch-free until
the first cell runs.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from yaml import YAMLError

from harness.alignment.heldout import ACCURACY, HELDOUT, LOSS
from harness.alignment.plan import AlignPlan, plan_align
from harness.alignment.run import run_align
from harness.contracts.adapter import Adapter
from harness.contracts.aligner import Aligner
from harness.contracts.registry import Registry, load_plugins
from harness.core.config import parse_options
from harness.core.errors import StepError, UserError, unknown
from harness.core.plain_yaml import read_yaml
from harness.core.progress import Reporter
from harness.core.records import digest_of
from harness.core.specs import AlignSpec, ModelSpec
from harness.core.stats import Comparison, Summary, compare_paired, holm
from harness.steps.files import slug, write_bytes, write_json
from harness.steps.folder import RECORD
from harness.steps.guard import Guard
from harness.steps.journal import read_rows
from harness.steps.lock import FolderLock

OPTION = "--search"
FILE, TABLE = "search.json", "search.md"
BEST = "best"
SEARCH = Guard("search", r"[^.].*", FILE)
ALPHA = 0.05
"""Two cells differ when the Holm-adjusted p-value is below this."""

Grid = Mapping[str, Sequence[Any]]


@dataclass
class Cell:
    """One point of the grid, and what became of it."""

    values: dict[str, Any]
    """Key (``adapter.rank``, ``learning_rate``) -> value."""
    folder: Path
    plan: AlignPlan
    heldout: dict[str, Summary] = field(default_factory=dict)
    """Figures on held-out rows; empty until the cell has run."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Values per held-out row."""
    error: str | None = None
    """Why the cell failed, if it did."""
    against: Comparison | None = None
    """This cell minus the best, paired by held-out row."""
    p_adjusted: float | None = None
    """Of that comparison, Holm-adjusted over all cells."""

    @property
    def name(self) -> str:
        """As in tables: ``rank 8, alpha 16``."""
        return ", ".join(f"{key.removeprefix('adapter.')} {value}" for key, value in self.values.items())


@dataclass
class Search:
    """What a search left behind: cells in the order of the grid, and the chosen one."""

    folder: Path
    criterion: str
    """Figure that chooses: preference accuracy where there is one, else the loss."""
    cells: list[Cell]
    best: Cell
    verdict: str
    """In plain words: whether the best can be told from the second."""


def search(
    method: str,
    model: str | ModelSpec,
    dataset: str,
    *,
    out: str | Path,
    grid: Grid | None = None,
    fresh: bool = False,
    registry: Registry | None = None,
    reporter: Reporter | None = None,
    **settings: Any,
) -> Search:
    """Align once per cell of a grid and choose on held-out rows: what `harness align --search` does.

    Args:
        method: registered aligner.
        model: folder or hub id of the base, or a ``ModelSpec``.
        dataset: expression over data sets.
        out: folder of the search; the same call goes on where an earlier one stopped.
        grid: key -> values, laid over the method's own grid: keys of the recipe, or of the adapter (``rank`` is short
            for ``adapter.rank``). A single value fixes a key.
        fresh: train every cell again.
        registry: from ``load_plugins``; all installed plugins by default.
        reporter: says what is going on; silent by default.
        **settings: further fields of ``AlignSpec``: adapter, start, template, samples, checkpoints, seed, options.

    Raises:
        UserError: a mistake of the user's, before anything ran.
        StepError: no cell came to its end.
    """
    model_spec = model if isinstance(model, ModelSpec) else ModelSpec(model=str(model))
    fields = {"method": method, "model": model_spec, "dataset": dataset, **settings}
    spec = parse_options(AlignSpec, fields, "harness align")
    registry, reporter = registry or load_plugins(), reporter or Reporter()
    folder = Path(out)
    cells = plan_cells(spec, registry, folder, grid or {})
    SEARCH.refuse(folder)
    with FolderLock(folder, SEARCH.where(folder)):
        _write(folder, spec, cells, None, "")
        for number, cell in enumerate(cells, 1):
            reporter.note(f"cell {number} of {len(cells)}: {cell.name}")
            _run(cell, registry, fresh, reporter)
            _write(folder, spec, cells, None, "")
        found = choose(folder, cells, seed=spec.seed)
        _point(folder / BEST, found.best.folder)
        _write(folder, spec, cells, found.best, found.verdict)
    reporter.note(f"best: {found.best.name}. {found.verdict}")
    return found


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
    except YAMLError as error:
        raise UserError(OPTION, f"{text!r} is no value: {getattr(error, 'problem', error)}", "Quote texts.") from None
    if isinstance(value, str):
        # YAML wants a dot in 1e-5; people do not write one.
        try:
            return float(value)
        except ValueError:
            pass
    return value


def plan_cells(spec: AlignSpec, registry: Registry, folder: Path, grid: Grid) -> list[Cell]:
    """Every cell planned, so that a mistake in one shows before the first runs.

    Raises:
        UserError: unknown key, a key that --set fixes too, no grid at all, no held-out rows, what an alignment refuses.
    """
    full = full_grid(spec, registry, grid)
    cells = []
    for values in itertools.product(*full.values()):
        chosen = dict(zip(full, values, strict=True))
        plan = plan_align(with_values(spec, chosen), registry)
        if plan.recipe.eval_rows == 0:
            raise UserError(
                "--set eval_rows", "0 held-out rows: there is nothing to choose by", "Give some, or leave it out."
            )
        cells.append(Cell(chosen, folder / name_of(chosen), plan))
    return cells


def with_values(spec: AlignSpec, values: Mapping[str, Any]) -> AlignSpec:
    """An alignment with the values of a cell among its options."""
    options = {key: dict(v) if isinstance(v, dict) else v for key, v in spec.options.items()}
    for key, value in values.items():
        group, _, last = key.rpartition(".")
        (options.setdefault(group, {}) if group else options)[last] = value
    return spec.model_copy(update={"options": options})


def name_of(values: Mapping[str, Any]) -> str:
    """A name for a cell, which no two of a grid share."""
    name = "_".join(f"{key.rpartition('.')[2]}-{value}" for key, value in values.items())
    # A slug cuts long names off: two cells must not share one.
    return slug(name) if slug(name) == name else f"{slug(name)[:50]}-{digest_of(dict(values))[:8]}"


def full_grid(spec: AlignSpec, registry: Registry, grid: Grid) -> dict[str, list[Any]]:
    """The method's own grid, as far as the adapter knows its keys and nothing fixes them, with the user's laid over."""
    aligner = registry.find(Aligner, spec.method, "METHOD")
    adapter = registry.find(Adapter, spec.adapter, "--adapter")
    recipe_keys, adapter_keys = set(aligner.Config.model_fields), set(adapter.Config.model_fields)
    fixed = {*spec.options, *(f"adapter.{key}" for key in spec.options.get("adapter", {}))}

    def known(key: str) -> bool:
        return key in recipe_keys or (key.removeprefix("adapter.") in adapter_keys and key.startswith("adapter."))

    given: dict[str, list[Any]] = {}
    for key, values in grid.items():
        whole = key if key in recipe_keys or key.startswith("adapter.") else f"adapter.{key}"
        if not known(whole):
            names = [*sorted(recipe_keys), *sorted(f"adapter.{name}" for name in adapter_keys)]
            raise unknown(f"{OPTION} {key}", "key", key, names, "harness align --help")
        if whole in fixed:
            raise UserError(f"{OPTION} {key}", "--set fixes the same key", "Give it in one of the two.")
        given[whole] = list(values)
    own = {key: list(v) for key, v in aligner.Config.search_grid.items() if known(key) and key not in fixed}
    full = {**own, **given}
    if not full:
        raise UserError(
            OPTION,
            f"{spec.method} with adapter {spec.adapter} has no grid of its own",
            f"Say what to vary: {OPTION} learning_rate=1e-5,5e-5.",
        )
    return full


def _run(cell: Cell, registry: Registry, fresh: bool, reporter: Reporter) -> None:
    try:
        made = run_align(cell.plan, registry, cell.folder, fresh=fresh, reporter=reporter)
    except StepError as error:
        # The others may do: a learning rate that diverges is what a search is there to find.
        cell.error = f"{error.what} {error.fix}".strip()
        reporter.note(f"failed: {cell.error}")
        return
    cell.heldout = made.summaries
    rows = cell.folder / RECORD / HELDOUT
    cell.rows = read_rows(rows) if rows.exists() else []


def choose(folder: Path, cells: list[Cell], *, seed: int) -> Search:
    """The best cell by held-out rows, and how sure that is.

    Highest preference accuracy, where the method has one; ties, and methods without, by lowest loss; then by the order
    of the grid. Every other cell is compared with the best paired by row (exact McNemar test for accuracy, bootstrap
    for loss), Holm-adjusted over the cells.

    Raises:
        StepError: no cell has figures on held-out rows.
    """
    done = [cell for cell in cells if cell.rows and (s := cell.heldout.get(LOSS)) is not None and s.mean is not None]
    if not done:
        why = "; ".join(f"{cell.name}: {cell.error}" for cell in cells if cell.error)
        raise StepError(
            "search", f"no cell has held-out figures{': ' + why if why else ''}", "See each cell's step/log.jsonl."
        )
    criterion = ACCURACY if all(ACCURACY in cell.heldout for cell in done) else LOSS
    ranked = sorted(done, key=lambda cell: _rank(cell, criterion))
    best, others = ranked[0], ranked[1:]
    for cell in others:
        mine, its = ({row["id"]: row[criterion] for row in one.rows} for one in (cell, best))
        cell.against = compare_paired(mine, its, seed=seed)
    for cell, p in zip(others, holm([c.against.p_value for c in others if c.against]), strict=True):
        cell.p_adjusted = p
    return Search(folder, criterion, cells, best, _verdict(criterion, best, others))


def _rank(cell: Cell, criterion: str) -> tuple[float, float]:
    loss = cell.heldout[LOSS].mean
    assert loss is not None
    accuracy = cell.heldout[ACCURACY].mean if criterion == ACCURACY else None
    return (-accuracy if accuracy is not None else 0.0, loss)


def _verdict(criterion: str, best: Cell, others: Sequence[Cell]) -> str:
    n = best.heldout[criterion].n
    figure = "preference accuracy" if criterion == ACCURACY else "loss"
    caution = "Its own figure is optimistic: the rows that chose it measured it."
    if not others:
        return f"Nothing to compare with on {n} held-out rows. {caution}"
    alike = [cell for cell in others if cell.p_adjusted is None or cell.p_adjusted >= ALPHA]
    second = others[0]
    p = "unknown" if second.p_adjusted is None else f"{second.p_adjusted:.3g}"
    told = "NOT distinguishable" if second in alike else "distinguishable"
    return (
        f"On {n} held-out rows it is {told} by {figure} from the second, {second.name} (paired, Holm-adjusted p {p}); "
        f"{len(alike)} of {len(others)} other cells cannot be told from it. {caution}"
    )


def _point(link: Path, target: Path) -> None:
    """A relative link, replaced atomically, so that the folder can be moved."""
    if link.exists() and not link.is_symlink():
        raise UserError(f"--out {link.parent}", f"{link.name!r} in it is not a search's pointer", "Move it away.")
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name, target_is_directory=True)
    temporary.replace(link)


def _write(root: Path, spec: AlignSpec, cells: Sequence[Cell], best: Cell | None, verdict: str) -> None:
    """search.json after every cell; search.md at the end."""
    record = record_of(spec, cells, best, verdict)
    write_json(root / FILE, record)
    if best is not None:
        from harness.study.search_text import table

        write_bytes(root / TABLE, table(record).encode())


def record_of(spec: AlignSpec, cells: Sequence[Cell], best: Cell | None, verdict: str) -> dict[str, Any]:
    """What search.json says: every cell with its figures, and the choice once there is one."""
    return {
        "method": spec.method,
        "dataset": cells[0].plan.dataset,
        "model": cells[0].plan.model.name,
        "adapter": spec.adapter,
        "seed": spec.seed,
        "varied": list(cells[0].values),
        "cells": [_described(cell) for cell in cells],
        "best": best.folder.name if best is not None else None,
        "verdict": verdict,
    }


def _plain(comparison: Comparison) -> dict[str, Any]:
    return {key: value for key, value in asdict(comparison).items() if key != "at"}


def _described(cell: Cell) -> dict[str, Any]:
    return {
        "values": cell.values,
        "name": cell.name,
        "folder": cell.folder.name,
        "id": cell.plan.id,
        "heldout": {name: asdict(summary) for name, summary in cell.heldout.items()},
        "error": cell.error,
        "against_best": _plain(cell.against) if cell.against is not None else None,
        "p_adjusted": cell.p_adjusted,
    }

"""A board over any number of runs and studies: arms as rows, a metric of a task as a column.

Seeds are folded; every row is held against its base, paired by sample and crossed over seeds, with Holm's correction
over the differences of one column of this board; ranks follow from the differences of all rows of a column. It holds
nothing of its own and is rebuilt from the records, byte for byte. Neither torch nor transformers is imported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.core.errors import UserError
from harness.core.records import digest_of
from harness.core.stats import Design
from harness.core.text import portable, task_label, visible
from harness.core.version import __version__
from harness.report.board.cells import Folded, fold, judge, rank, seed_cells
from harness.report.board.estimates import estimate_wholes
from harness.report.board.gather import ArmRun, Asked, Gathered, Scored, gather
from harness.report.board.judged import Of
from harness.report.board.model import Board, BoardRow, Column, JudgePanel, SeedRow
from harness.report.board.panels import judge_panels
from harness.report.claims import evaluate_claims, read_claims
from harness.steps.step import unequal


def build_board(roots: Sequence[Path], *, title: str | None = None, alpha: float = 0.05) -> Board:
    """The board of run folders and studies, in the order given.

    Args:
        roots: folders that `harness eval` or `harness study run` wrote.
        title: in place of the names of the runs.
        alpha: level of the tests, after Holm's correction.

    Raises:
        UserError: no folder, a folder that is no run, or a level that is none.
        CorruptionError: a record is damaged.
    """
    check_board(roots, alpha)
    return board_of(gather(roots), title=title, alpha=alpha)


def check_board(roots: Sequence[Path], alpha: float) -> None:
    """Raise a UserError for no folder, or a level that is none."""
    if not 0 < alpha < 1:
        raise UserError("alpha", f"is the level of a test, and {alpha:g} is none", "Give a number between 0 and 1.")
    if not roots:
        raise UserError("RUN", "no run folder is given", "Give folders that `harness eval` or `harness study` wrote.")


def board_of(found: Gathered, *, title: str | None = None, alpha: float = 0.05) -> Board:
    """The board of what was read; as `build_board`."""
    rows, members = _rows(found)
    columns: list[Column] = []
    folded: dict[str, dict[str, Folded]] = {}
    designs: dict[str, Design] = {}
    bases = {row.key: row.base for row in rows}
    shown = {row.key: row.cells for row in rows}
    by_way: dict[Of, Column] = {}
    for plain, of in _columns(found):
        samples = found.samples[of[0]]
        design = designs[plain.key] = Design(samples.clusters, samples.strata, len(samples.ids))
        cells = {row.key: cell for row in rows if (cell := _folded(of, members[row.key])) is not None}
        for row in rows:
            if (one := cells.get(row.key)) is not None:
                row.cells[plain.key] = fold(one, plain, design)
                own = seed_cells(one)
                for arm, seed in zip(members[row.key], row.seeds, strict=True):
                    if arm.name in own:
                        seed.cells[plain.key] = own[arm.name]
        columns.append(rank(judge(plain, design, cells, bases, shown, alpha), design, cells, shown, alpha))
        folded[plain.key] = cells
        by_way[of] = plain
    estimate_wholes(found, by_way, rows, folded)
    arms = {key: [arm.key for arm in some] for key, some in members.items()}
    ids = {digest: samples.ids for digest, samples in found.samples.items()}
    panels = judge_panels(found.panels.values(), by_way, rows, folded, arms, ids)
    claims = evaluate_claims(read_claims(found.claims, "claims of a study"), rows, columns, folded, designs, panels)
    names = [source.name for source in found.sources]
    board = Board(
        harness=__version__,
        title=visible(title) if title is not None else " and ".join(dict.fromkeys(names)),
        alpha=alpha,
        sources=tuple(found.sources),
        columns=tuple(_first_judges(columns, panels)),
        rows=tuple(rows),
        claims=tuple(claims),
        judges=tuple(panels),
        notes=tuple(dict.fromkeys(found.notes)),
    )
    return board.model_copy(update={"finding": finding(board)})


def _first_judges(columns: Sequence[Column], panels: Sequence[JudgePanel]) -> list[Column]:
    """The columns, those of further judges and wordings after the one that counts and no longer primary."""
    others = {
        one.column for panel in panels if panel.column is not None for one in panel.askers if one.column != panel.column
    }
    found = [one.model_copy(update={"primary": False}) if one.key in others else one for one in columns]
    return sorted(found, key=lambda one: not one.primary)


def finding(board: Board) -> str:
    """One sentence: how many differences from the bases there are, and of what kind."""
    primary = {column.key for column in board.columns if column.primary}
    found = [
        cell.difference
        for row in board.rows
        for key, cell in row.cells.items()
        if key in primary and cell.difference is not None
    ]
    counts = Counter(one.verdict for one in found if one is not None)
    judged = sum(counts.values()) - counts["not comparable"]
    if not judged:
        return "No row has a base that was asked the same, so nothing is compared."
    seeds = sum(one is not None and one.note is not None for one in found)
    said = f"Of {judged} differences from a base, {counts['better']} are better and {counts['worse']} worse"
    said += f" at Holm-adjusted p < {board.alpha:g} within their columns"
    return f"{said}; {seeds} of them leave training noise out, having under three seeds." if seeds else f"{said}."


def _rows(found: Gathered) -> tuple[list[BoardRow], dict[str, list[ArmRun]]]:
    """Rows, bases before their arms, and what is folded into each."""
    families: dict[str, list[ArmRun]] = {}
    for arm in found.arms.values():
        families.setdefault(_family_key(arm, families), []).append(arm)
    key_of = {arm.key: key for key, some in families.items() for arm in some}
    row_names = {arm.name: _family_name(arm) for arm in found.arms.values()}
    rows = []
    for key, some in families.items():
        some.sort(key=lambda arm: (arm.factors.get("seed") is None, arm.factors.get("seed") or 0))
        first = some[0]
        missing = [f"{arm.name}: {why}" for arm in some for why in arm.missing]
        rows.append(
            BoardRow(
                key=key,
                name=visible(_family_name(first)),
                kind=first.kind,
                base=key_of.get(first.base) if first.base is not None else None,
                base_name=first.base_name,
                factors={name: value for name, value in first.factors.items() if name != "seed"},
                parents=tuple(dict.fromkeys(visible(row_names.get(one, one)) for one in first.parents)),
                recipe=portable(dict(first.made.recipe)) if first.made is not None else {},
                seeds=tuple(_seed_row(arm) for arm in some),
                notes=tuple(missing),
            )
        )
    return _told_apart(rows), families


def _told_apart(rows: list[BoardRow]) -> list[BoardRow]:
    """Rows of one name get the start of their key: two studies may call different arms alike."""
    names = Counter(row.name for row in rows)
    return [
        row if names[row.name] == 1 else row.model_copy(update={"name": f"{row.name} ({row.key[:6]})"}) for row in rows
    ]


def _family_name(arm: ArmRun) -> str:
    """The arm's name without its seed."""
    seed = arm.factors.get("seed")
    return arm.name if seed is None else arm.name.replace(f"-s{seed}", "", 1)


def _family_key(arm: ArmRun, families: Mapping[str, Sequence[ArmRun]]) -> str:
    """What arms that differ in their seed alone share: name, base, factors, and the recipe that made them.

    Two arms of one seed, made of the same and not the same, stay apart, as does an arm whose recipe is not there.
    """
    seed = arm.factors.get("seed")
    name = _family_name(arm)
    if seed is None or name == arm.name:
        return arm.key
    rest = {key: value for key, value in arm.factors.items() if key != "seed"}
    recipe = arm.made.digest if arm.made is not None else None
    unknown = arm.sources[:1] if recipe is None else None
    key = digest_of([name, arm.base, rest, recipe, unknown])
    return arm.key if any(one.factors.get("seed") == seed for one in families.get(key, ())) else key


def _seed_row(arm: ArmRun) -> SeedRow:
    return SeedRow(
        name=visible(arm.name),
        seed=arm.factors.get("seed"),
        sources=tuple(arm.sources),
        made_by=arm.made.id if arm.made is not None else None,
        folder=arm.made.folder if arm.made is not None else None,
        seconds=arm.made.seconds if arm.made is not None else {},
        counts=arm.made.counts if arm.made is not None else {},
        factors=dict(arm.factors),
        missing=tuple(arm.missing),
    )


def _columns(found: Gathered) -> list[tuple[Column, Of]]:
    """Every column, primary metrics first in the order in which tasks were met.

    Each base has a chat template of its own, so one column may hold several: but never two of one base.
    """
    met: dict[tuple[str, str], dict[str | None, tuple[Scored, set[str]]]] = {}
    for arm in found.arms.values():
        for where, scored in arm.scores.items():
            templates = met.setdefault((where.digest, where.metric), {})
            templates.setdefault(where.template, (scored, set()))[1].add(arm.base or arm.key)
    columns: list[tuple[Column, Of]] = []
    for (digest, metric), templates in met.items():
        bases = [base for _, some in templates.values() for base in some]
        groups = [tuple(templates)] if len(set(bases)) == len(bases) else [(one,) for one in templates]
        for group in groups:
            of = (digest, group, metric)
            columns.append((_column(found, of, templates[group[0]][0]), of))
    columns.sort(key=lambda one: not one[0].primary)
    return _differing(found, columns)


def _column(found: Gathered, of: Of, scored: Scored) -> Column:
    digest, templates, name = of
    row, metric, samples = scored.row, scored.metric, found.samples[digest]
    return Column(
        key=digest_of([digest, sorted(one or "" for one in templates), name])[:16],
        label=task_label(row.task, row.variant),
        task=visible(row.task),
        variant=row.variant,
        metric=visible(name),
        scorer=visible(row.scorer),
        unit=visible(row.unit),
        higher_is_better=row.higher_is_better,
        primary=row.primary,
        aggregate=metric.aggregate,
        version=scored.task.info.get("version"),
        resolution=metric.resolution,
        chance=row.chance,
        templates=tuple(one for one in templates if one is not None),
        n_samples=len(samples.ids),
        n_clusters=len(set(samples.clusters)) if samples.clusters is not None else len(samples.ids),
        n_strata=len(set(samples.strata)) if samples.strata is not None else 1,
    )


def _differing(found: Gathered, columns: list[tuple[Column, Of]]) -> list[tuple[Column, Of]]:
    """Columns that are called alike say what sets them apart."""
    named: dict[str, list[int]] = {}
    for place, (column, _) in enumerate(columns):
        named.setdefault(column.shown, []).append(place)
    for places in named.values():
        if len(places) < 2:
            continue
        first = found.asked[columns[places[0]][1][0]]
        for number, place in enumerate(places):
            column, of = columns[place]
            told = unequal(first, found.asked[of[0]]) if number else []
            told += [f"chat template {one[:12]}" for one in column.templates] if number or not told else []
            said = (f"{number + 1} of {len(places)} of this name", *told[:6])
            columns[place] = column.model_copy(update={"differs": tuple(visible(one) for one in said)}), of
    return columns


def _folded(of: Of, arms: Sequence[ArmRun]) -> Folded | None:
    digest, templates, metric = of
    met = [
        (arm, scored)
        for arm in arms
        for template in templates
        if (scored := arm.scores.get(Asked(digest, template, metric))) is not None
    ]
    if not met:
        return None
    trained = arms[0].kind != "base"
    return Folded([arm.name for arm, _ in met], [scored for _, scored in met], trained, len(arms))

"""Which rows an aligner trains on: one seeded order, exact mixtures, held-out rows by prompt.

What names the rows is :mod:`harness.expression`'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from pydantic import BaseModel

from harness.config import parse_options
from harness.contracts import Dataset, DatasetJob, DatasetRow, RowSchema
from harness.errors import UserError, unknown
from harness.expression import LISTING, OPTION, Part, parse_expression, trainable
from harness.records import canonical, digest_of
from harness.registry import Registry
from harness.row_schema import settled

HELDOUT_SHARE = 0.1
"""Share of prompts held out of a data set without an official held-out split."""

Schema = RowSchema | type[BaseModel]
Converter = Callable[[DatasetRow], Iterable[DatasetRow]]


@dataclass
class Selection:
    """Rows to train on and rows held out, in their final order, and how they came about."""

    train: list[DatasetRow]
    heldout: list[DatasetRow]
    dropped: dict[str, int]
    """Rows left out of training, by reason, over all parts."""
    identity: dict[str, Any]
    """What pins the rows without reading them: enters a step's id."""
    counts: dict[str, dict[str, int]]
    """Per part: rows of the source, usable, dropped, selected, held out."""
    schema: Schema = "pairs"
    notes: list[str] = field(default_factory=list)
    heldout_dropped: dict[str, int] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 over ids and data of the training rows, in order."""
        return rows_digest(self.train)


def rows_digest(rows: Iterable[DatasetRow]) -> str:
    """SHA-256 (hex) over ids and data of rows, in order."""
    hashed = hashlib.sha256()
    for row in rows:
        hashed.update(canonical([row.id, dict(row.data)]) + b"\n")
    return hashed.hexdigest()


# ------------------------------------------------------------------------------------------------------- conversions

_CONVERTERS: dict[tuple[Any, Any], Converter] = {}


def add_converter(source: Schema, target: Schema, convert: Converter) -> None:
    """Let data sets of one schema feed aligners that consume another.

    Args:
        source: schema of the data set: a name, or a plugin's own pydantic model.
        target: what the aligner consumes.
        convert: makes rows of the target from one row; their ids must differ.
    """
    _CONVERTERS[source, target] = convert


def convert(rows: Iterable[DatasetRow], source: Schema, target: Schema, where: str = OPTION) -> Iterator[DatasetRow]:
    """Rows of one schema as rows of another; their order stays.

    Raises:
        UserError: nobody knows how.
    """
    if source == target:
        return iter(rows)
    if (source, target) not in _CONVERTERS:
        known = [_schema_name(to) for of, to in _CONVERTERS if of == source]
        raise UserError(
            where,
            f"its rows are {_schema_name(source)}, and {_schema_name(target)} are needed",
            f"From {_schema_name(source)} there are: {', '.join(known) or 'no conversions'}. Choose another data set "
            "or method, or add one with harness.selection.add_converter.",
        )
    function = _CONVERTERS[source, target]
    return (made for row in rows for made in function(row))


def _schema_name(schema: Schema) -> str:
    return schema if isinstance(schema, str) else schema.__name__


def _pair_to_demonstration(row: DatasetRow) -> Iterator[DatasetRow]:
    yield DatasetRow(row.id, {"prompt": row.data["prompt"], "completion": row.data["chosen"]})


def _pair_to_rated(row: DatasetRow) -> Iterator[DatasetRow]:
    """Both answers, rated 1 and 0."""
    for which, rating in (("chosen", 1.0), ("rejected", 0.0)):
        data = {"prompt": row.data["prompt"], "completion": row.data[which], "rating": rating}
        yield DatasetRow(f"{row.id}/{which}", data)


add_converter("pairs", "demonstrations", _pair_to_demonstration)
add_converter("pairs", "rated", _pair_to_rated)


# -------------------------------------------------------------------------------------------------------------- order


def seeded_order(rows: Iterable[DatasetRow], seed: int) -> list[DatasetRow]:
    """Rows by SHA-256 of (seed, id): the same for any order in which they are given; every prefix is a sample."""
    return sorted(rows, key=lambda row: hashlib.sha256(f"{seed}\0{row.id}".encode()).digest())


def interleave(weights: Sequence[Fraction], available: Sequence[int]) -> Iterator[int]:
    """Which part each row of a mixture comes from, until the part whose turn it is has no row left.

    After N rows every part has its exact share N * weight, rounded up or down, and exactly that where it is whole: the
    quota method of Balinski and Young (1975). So each prefix of the mixture is itself an exact mixture, and longer ones
    contain shorter ones, which the method of largest remainders does not give for three parts or more.

    Args:
        weights: shares, which add up to 1.
        available: how many rows each part has.
    """
    taken = [0] * len(weights)
    for place in range(1, sum(available) + 1):
        eligible = [part for part, share in enumerate(weights) if taken[part] < share * place]
        chosen = min(eligible, key=lambda part: (Fraction(taken[part] + 1) / weights[part], part))
        if taken[chosen] == available[chosen]:
            return
        taken[chosen] += 1
        yield chosen


def prompt_key(row: DatasetRow) -> str:
    """Identity of a row's prompt."""
    return digest_of(row.data.get("prompt", row.data))


def is_held_out(key: str, share: float = HELDOUT_SHARE) -> bool:
    """Whether a prompt is held out where there is no official split; the seed of an arm changes nothing about it."""
    return int(hashlib.sha256(f"held out\0{key}".encode()).hexdigest()[:13], 16) / 16**13 < share


# ---------------------------------------------------------------------------------------------------------- selection


@dataclass
class _Loaded:
    part: Part
    train: list[DatasetRow]
    heldout: list[DatasetRow]
    counts: dict[str, int]
    schema: Schema


def select(
    expression: str,
    *,
    schema: Schema | None,
    registry: Registry,
    seed: int = 0,
    samples: int | None = None,
    heldout: int | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Selection:
    """The rows of an expression, in the schema that an aligner consumes.

    Args:
        expression: see the head of this module.
        schema: what the aligner consumes; the data set's own where None.
        registry: where data sets are looked up.
        seed: of the order.
        samples: how many rows of the source (pairs, say), a prefix of the order; all, as far as the shares stay exact,
            when absent.
        heldout: the most held-out rows, a prefix of their order; all when absent.
        options: data set name -> its Config.

    Raises:
        UserError: unknown names, rows of the wrong kind, fewer rows than asked for, none left (with the counts).
    """
    if samples is not None and samples < 1:
        raise UserError(
            "--samples", f"{samples} is no positive number", "Give 1 or more, or leave it out for all rows."
        )
    parts = parse_expression(expression, registry)
    selection = Selection([], [], {}, identity_of(parts, schema, registry, options, (seed, samples, heldout)), {})
    loaded = [_load(part, registry, options, selection) for part in parts]
    trained = {prompt_key(row) for one in loaded for row in one.train}
    for one in loaded:
        kept = [row for row in one.heldout if prompt_key(row) not in trained]
        one.counts["held-out rows whose prompt is trained on"] = len(one.heldout) - len(kept)
        one.heldout = seeded_order(kept, seed)
        one.train = seeded_order(one.train, seed)
        selection.counts[one.part.label] = one.counts
    weights = [part.weight for part in parts]
    order = list(interleave(weights, [len(one.train) for one in loaded]))
    if samples is not None and samples > len(order):
        raise _too_few(expression, samples, len(order), loaded)
    order = order[:samples]
    held = list(interleave(weights, [len(one.heldout) for one in loaded]))[:heldout]
    target = schema if schema is not None else loaded[0].schema
    selection.schema = target
    selection.train = _take(order, loaded, "train", target)
    selection.heldout = _take(held, loaded, "heldout", target)
    if not held and heldout != 0:
        selection.notes.append("no row is held out: none is left whose prompt is not trained on")
    return selection


def _take(order: Sequence[int], loaded: Sequence[_Loaded], which: str, target: Schema) -> list[DatasetRow]:
    streams = [iter(getattr(one, which)) for one in loaded]
    rows: list[DatasetRow] = []
    for index in order:
        one = loaded[index]
        rows += convert([next(streams[index])], one.schema, target, f"{OPTION} {one.part.label}")
    for index, one in enumerate(loaded):
        one.counts["selected to train" if which == "train" else "held out"] = order.count(index)
    return rows


def identity_of(
    parts: Sequence[Part],
    schema: Schema | None,
    registry: Registry,
    options: Mapping[str, Mapping[str, Any]] | None,
    numbers: tuple[int, int | None, int | None],
) -> dict[str, Any]:
    """What pins a selection, found out without reading a row; ``numbers`` are seed, samples and held-out rows."""
    found = []
    for part in parts:
        dataset, job = _open(part, registry, options, None)
        share = f"{part.weight.numerator}/{part.weight.denominator}"
        found.append({"dataset": dataset.identity(job), "heldout": dataset.heldout_split(job), "weight": share})
    seed, samples, heldout = numbers
    consumed = _schema_name(schema) if schema is not None else None
    return {"parts": found, "schema": consumed, "seed": seed, "samples": samples, "heldout": heldout}


def _open(
    part: Part, registry: Registry, options: Mapping[str, Mapping[str, Any]] | None, split: str | None
) -> tuple[Dataset, DatasetJob]:
    dataset = registry.find(Dataset, part.name, OPTION)
    given = {**(options or {}).get(part.name, {}), **dict(part.options)}
    parsed = parse_options(dataset.Config, given, f"--set data.{part.name}")
    return dataset, DatasetJob(part.subset, split, part.revision, parsed)


def _load(
    part: Part, registry: Registry, options: Mapping[str, Mapping[str, Any]] | None, selection: Selection
) -> _Loaded:
    """All rows of one part, split into train and held-out by prompt."""
    dataset, job = _open(part, registry, options, "train")
    if dataset.schema == "prompts":
        raise unknown(f"{OPTION} {part.label}", "data set to train on", part.name, trainable(registry), LISTING)
    official = dataset.heldout_split(job)
    schema = dataset.schema_of(job)
    rows = list(_read(part, dataset, job, schema))
    counts = {"rows": len(rows) + sum(job.dropped.values()), "dropped": sum(job.dropped.values()), "usable": len(rows)}
    _add(selection.dropped, job.dropped)
    if official is None:
        held = [row for row in rows if is_held_out(prompt_key(row))]
        kept = {row.id for row in held}
        rows = [row for row in rows if row.id not in kept]
    else:
        _, test = _open(part, registry, options, official)
        held = list(_read(part, dataset, test, schema))
        _add(selection.heldout_dropped, test.dropped)
        job.notes += [note for note in test.notes if note not in job.notes]
        counts["held-out rows dropped"] = sum(test.dropped.values())
    selection.notes += [note for note in job.notes if note not in selection.notes]
    if not rows:
        reasons = "; ".join(f"{reason}: {count:,}" for reason, count in sorted(job.dropped.items()))
        raise UserError(
            f"{OPTION} {part.label}",
            f"no row is left to train on: {counts['rows']:,} rows, dropped {counts['dropped']:,}"
            + (f" ({reasons})" if reasons else "")
            + (f", held out {len(held):,}" if official is None else ""),
            "Choose another subset, revision or data set (`harness data list`), or mend the data.",
        )
    return _Loaded(part, rows, held, counts, schema)


def _read(part: Part, dataset: Dataset, job: DatasetJob, schema: Schema) -> Iterator[DatasetRow]:
    """Rows in the form that training wants, with ids that are unique in a mixture."""
    for row in dataset.rows(job):
        named = DatasetRow(f"{part.label}/{row.id}", row.data)
        yield settled(named, schema, f"{OPTION} {part.label}") if isinstance(schema, str) else named


def _add(total: dict[str, int], more: Mapping[str, int]) -> None:
    for reason, count in more.items():
        total[reason] = total.get(reason, 0) + count


def _too_few(expression: str, samples: int, most: int, loaded: Sequence[_Loaded]) -> UserError:
    have = ", ".join(f"{one.part.label} has {len(one.train):,}" for one in loaded)
    what = f"{samples:,} rows are asked for, and there are {most:,}"
    if len(loaded) > 1:
        what += f" in these shares ({have})"
    return UserError(f"{OPTION} {expression}, --samples", what, f"Ask for {most:,} or fewer, or change the data.")

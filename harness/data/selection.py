"""Which rows an aligner trains on: one seeded order, exact mixtures, held-out rows by prompt.

What names the rows is :mod:`harness.data.expression`'s.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from itertools import islice
from typing import Any

from harness.contracts.dataset import Dataset, DatasetJob, DatasetRow, schema_name
from harness.contracts.registry import Registry
from harness.core.config import parse_options
from harness.core.errors import UserError, unknown
from harness.core.records import canonical
from harness.data.convert import conversion_codes, convert
from harness.data.expression import LISTING, OPTION, Part, parse_expression, trainable
from harness.data.hub import read_all
from harness.data.row_schema import Schema, settled
from harness.data.separation import HeldOut, is_held_out, prompt_key

RULES = 2
"""Raised when other rows may come of the same expression: enters a selection's identity."""

Keep = Callable[[Sequence[DatasetRow]], Collection[str]]
"""Ids of those rows, of some, that can be trained on."""
IDENTITIES = {"rated": "rated, by preference"}
"""Schemas whose rows have changed their form, so that their name alone would name other rows in ids."""
EQUAL = (
    "the parts are unequal and their shares equal, which is our choice where no weights are given; what larger ones "
    "have beyond that is left out (A & B instead of A + B takes all rows of all)"
)


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
        return selection_digest(self.train)


def selection_digest(rows: Iterable[DatasetRow]) -> str:
    """SHA-256 (hex) over ids and data of rows, in order."""
    hashed = hashlib.sha256()
    for row in rows:
        hashed.update(canonical([row.id, dict(row.data)]) + b"\n")
    return hashed.hexdigest()


# -------------------------------------------------------------------------------------------------------------- order


def seeded_order(rows: Iterable[DatasetRow], seed: int) -> list[DatasetRow]:
    """Rows by SHA-256 of (seed, id): the same for any order in which they are given; every prefix is a sample."""
    return sorted(rows, key=lambda row: _place(row, seed))


def _place(row: DatasetRow, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\0{row.id}".encode()).digest()


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


# ---------------------------------------------------------------------------------------------------------- selection


@dataclass
class _Loaded:
    part: Part
    train: list[DatasetRow]
    heldout: list[DatasetRow]
    counts: dict[str, int]
    schema: Schema
    dropped: dict[str, int]


@dataclass(frozen=True)
class _Taken:
    """One row of a part, and what it is made into for the aligner."""

    part: int
    rows: list[DatasetRow]


def select(
    expression: str,
    *,
    schema: Schema | None,
    registry: Registry,
    seed: int = 0,
    samples: int | None = None,
    heldout: int | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    keep: Keep | None = None,
) -> Selection:
    """The rows of an expression, in the schema that an aligner consumes.

    Args:
        expression: see the head of this module.
        schema: what the aligner consumes; the data set's own where None.
        registry: where data sets are looked up.
        seed: of the order.
        samples: how many rows of the source (pairs, say) that are kept, a prefix of the order; all, as far as the
            shares stay exact, when absent.
        heldout: the most held-out rows, a prefix of their order; all when absent.
        options: data set name -> its Config.
        keep: which rows can be trained on; those that cannot take nobody's place. All when absent.

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
    _separate(loaded, selection)
    selection.schema = schema if schema is not None else loaded[0].schema
    selection.counts = {one.part.label: one.counts for one in loaded}
    weights = [Fraction(1)] if parts[0].concatenated else [part.weight for part in parts]
    streams = _streams([one.train for one in loaded], parts, seed)
    made = partial(_made, loaded=loaded, target=selection.schema, registry=registry)
    kept = [
        _kept(stream, most, keep, made)
        for stream, most in zip(streams, _quotas(weights, streams, samples), strict=True)
    ]
    order = list(interleave(weights, [len(one) for one in kept]))
    if samples is not None and samples > len(order) > 0:
        have = [len(_kept(stream, None, keep, made)) for stream in streams]
        raise _too_few(expression, (samples, len(order)), loaded, have)
    selection.train = _take(
        order[:samples], kept, loaded, "selected to train" if keep else "in order, not yet tokenised"
    )
    held = [_kept(stream, None, None, made) for stream in _streams([one.heldout for one in loaded], parts, seed)]
    order = list(interleave(weights, [len(one) for one in held]))[:heldout]
    selection.heldout = _take(order, held, loaded, "held out")
    if not order and heldout != 0:
        selection.notes.append("no row is held out")
    if len(weights) > 1 and len(set(weights)) == 1 and len({len(one.train) for one in loaded}) > 1:
        selection.notes.append(EQUAL)
    return selection


def _streams(
    sides: Sequence[Sequence[DatasetRow]], parts: Sequence[Part], seed: int
) -> list[list[tuple[int, DatasetRow]]]:
    """Per share the rows it is taken from, in order, with the part each is of; a concatenation is a single share."""
    tagged = [[(number, row) for row in rows] for number, rows in enumerate(sides)]
    shares = [[pair for rows in tagged for pair in rows]] if parts[0].concatenated else tagged
    return [sorted(share, key=lambda pair: _place(pair[1], seed)) for share in shares]


def _quotas(weights: Sequence[Fraction], streams: Sequence[Sequence[Any]], samples: int | None) -> list[int]:
    """How many rows each share gives to the first ``samples``; all it has where that is more than there are."""
    sizes = [len(stream) for stream in streams]
    if samples is None or samples > sum(sizes):
        return sizes
    order = list(islice(interleave(weights, [samples] * len(weights)), samples))
    return [order.count(number) for number in range(len(weights))]


def _made(pair: tuple[int, DatasetRow], *, loaded: Sequence[_Loaded], target: Schema, registry: Registry) -> _Taken:
    number, row = pair
    one = loaded[number]
    return _Taken(number, list(convert([row], one.schema, target, registry, f"{OPTION} {one.part.label}")))


def _kept(
    stream: Sequence[tuple[int, DatasetRow]],
    most: int | None,
    keep: Keep | None,
    made: Callable[[tuple[int, DatasetRow]], _Taken],
) -> list[_Taken]:
    """The first rows of a stream of which everything can be trained on; no further row is looked at."""
    found: list[_Taken] = []
    start = 0
    while start < len(stream) and (most is None or len(found) < most):
        end = len(stream) if most is None else start + most - len(found)
        batch = [made(pair) for pair in stream[start:end]]
        rows = [row for one in batch for row in one.rows]
        stays = keep(rows) if keep is not None else {row.id for row in rows}
        found += [one for one in batch if one.rows and all(row.id in stays for row in one.rows)]
        start = end
    return found


def _take(
    order: Sequence[int], shares: Sequence[Sequence[_Taken]], loaded: Sequence[_Loaded], what: str
) -> list[DatasetRow]:
    streams = [iter(share) for share in shares]
    taken = [next(streams[number]) for number in order]
    for number, one in enumerate(loaded):
        one.counts[what] = sum(each.part == number for each in taken)
    return [row for each in taken for row in each.rows]


def _separate(loaded: Sequence[_Loaded], selection: Selection) -> None:
    """Take rows out of training that are too near to a held-out row of any part."""
    held = HeldOut([row for one in loaded for row in one.heldout])
    for one in loaded:
        found = [(row, held.objection(row)) for row in one.train]
        one.train = [row for row, objection in found if objection is None]
        left_out = Counter(objection for _, objection in found if objection is not None)
        one.counts["dropped"] += left_out.total()
        one.counts["usable"] -= left_out.total()
        _add(one.dropped, left_out)
        if not one.train:
            raise _none_left(one)
        _add(selection.dropped, one.dropped)


def identity_of(
    parts: Sequence[Part],
    schema: Schema | None,
    registry: Registry,
    options: Mapping[str, Mapping[str, Any]] | None,
    numbers: tuple[int, int | None, int | None],
) -> dict[str, Any]:
    """What pins a selection, found out without reading a row; ``numbers`` are seed, samples and held-out rows."""

    def identity(part: Part) -> dict[str, Any]:
        dataset, job = open_part(part, registry, options, None)
        share = "all" if part.concatenated else f"{part.weight.numerator}/{part.weight.denominator}"
        pinned = {"dataset": dataset.identity(job), "heldout": dataset.heldout_split(job), "weight": share}
        # What the rows of a data set are can cost reading them.
        code = codes.get(dataset.schema_of(job)) if codes else None
        return pinned if code is None else {**pinned, "converter": code}

    codes = conversion_codes(schema, registry) if schema is not None else {}
    found = read_all(partial(identity, part) for part in parts)
    seed, samples, heldout = numbers
    consumed = IDENTITIES.get(str(schema), schema_name(schema)) if schema is not None else None
    return {
        "parts": found,
        "schema": consumed,
        "seed": seed,
        "samples": samples,
        "heldout": heldout,
        "rules": RULES,
    }


def open_part(
    part: Part, registry: Registry, options: Mapping[str, Mapping[str, Any]] | None, split: str | None
) -> tuple[Dataset, DatasetJob]:
    """The data set of one term of an expression, and the job that reads it."""
    dataset = registry.find(Dataset, part.name, OPTION)
    if dataset.schema == "prompts":
        raise unknown(f"{OPTION} {part.label}", "data set to train on", part.name, trainable(registry), LISTING)
    given = {**(options or {}).get(part.name, {}), **dict(part.options)}
    parsed = parse_options(dataset.Config, given, f"--set data.{part.name}")
    return dataset, DatasetJob(part.subset, split, part.revision, parsed)


def _load(
    part: Part, registry: Registry, options: Mapping[str, Mapping[str, Any]] | None, selection: Selection
) -> _Loaded:
    """All rows of one part, split into train and held-out by prompt."""
    dataset, job = open_part(part, registry, options, "train")
    official = dataset.heldout_split(job)
    schema = dataset.schema_of(job)
    rows = list(_read(part, dataset, job, schema))
    if len({row.id for row in rows}) < len(rows):
        twice = Counter(row.id for row in rows).most_common(1)[0][0]
        raise UserError(f"{OPTION} {part.label}", f"two of its rows have the id {twice!r}", "Ids of rows must differ.")
    counts = {"rows": len(rows) + sum(job.dropped.values()), "dropped": sum(job.dropped.values()), "usable": len(rows)}
    if official is None:
        held = [row for row in rows if is_held_out(prompt_key(row))]
        kept = {row.id for row in held}
        rows = [row for row in rows if row.id not in kept]
    else:
        _, test = open_part(part, registry, options, official)
        held = list(_read(part, dataset, test, schema))
        _add(selection.heldout_dropped, test.dropped)
        job.notes += [note for note in test.notes if note not in job.notes]
        counts["held-out rows dropped"] = sum(test.dropped.values())
    selection.notes += [note for note in job.notes if note not in selection.notes]
    return _Loaded(part, rows, held, counts, schema, job.dropped)


def _none_left(one: _Loaded) -> UserError:
    reasons = "; ".join(f"{reason}: {count:,}" for reason, count in sorted(one.dropped.items()))
    return UserError(
        f"{OPTION} {one.part.label}",
        f"no row is left to train on: {one.counts['rows']:,} rows, dropped {one.counts['dropped']:,}"
        + (f" ({reasons})" if reasons else "")
        + (f", held out {len(one.heldout):,}" if "held-out rows dropped" not in one.counts else ""),
        "Choose another subset, revision or data set (`harness data list`), or mend the data.",
    )


def _read(part: Part, dataset: Dataset, job: DatasetJob, schema: Schema) -> Iterator[DatasetRow]:
    """Rows in the form that training wants, with ids that are unique in a mixture."""
    for row in dataset.rows(job):
        named = DatasetRow(f"{part.label}/{row.id}", row.data)
        yield settled(named, schema, f"{OPTION} {part.label}")


def _add(total: dict[str, int], more: Mapping[str, int]) -> None:
    for reason, count in more.items():
        total[reason] = total.get(reason, 0) + count


def _too_few(expression: str, rows: tuple[int, int], loaded: Sequence[_Loaded], have: Sequence[int]) -> UserError:
    samples, most = rows
    what = f"{samples:,} rows are asked for, and {most:,} can be trained on"
    if len(have) > 1:
        each = ", ".join(f"{one.part.label} has {count:,}" for one, count in zip(loaded, have, strict=True))
        what += f" in these shares ({each})"
    return UserError(f"{OPTION} {expression}, --samples", what, f"Ask for {most:,} or fewer, or change the data.")

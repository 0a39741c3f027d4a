"""AlpacaEval's annotations files: who was compared with whom, what was preferred, and what could not be read.

An annotations file is a JSON list of objects (or JSON lines), one for each compared pair, as the alpaca-eval package
writes it. ``preference`` is 1 where ``output_1`` won, 2 where ``output_2`` won, 1.5 for a draw, and anything between
for a judge that gives probabilities; 0 is the old way to write a draw, and null a pair that has no verdict.
"""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.core.errors import UserError, nearest, unknown

DRAW = 1.5


@dataclass(frozen=True)
class JudgedPair:
    """Two outputs for one instruction: ``output_1`` is the reference's, ``output_2`` the model's.

    ``preference`` runs from 1 (the reference's is better) to 2 (the model's is); None has a ``reason``.
    """

    instruction: str | None
    output_1: str | None
    output_2: str | None
    preference: float | None
    reason: str | None = None

    def mirrored(self) -> JudgedPair:
        """The same pair with model and reference exchanged."""
        preference = None if self.preference is None else 3.0 - self.preference
        return JudgedPair(self.instruction, self.output_2, self.output_1, preference, self.reason)


@dataclass(frozen=True)
class Annotations:
    """What one judge said about one model against one reference."""

    pairs: tuple[JudgedPair, ...]
    model: str | None
    reference: str | None
    annotator: str | None
    notes: tuple[str, ...] = ()
    unscored: Mapping[str, int] = field(default_factory=dict)
    """How many pairs have no preference, by reason."""


@dataclass(frozen=True)
class _Named:
    pair: JudgedPair
    generators: tuple[str | None, str | None]
    annotator: str | None


def read_annotations(
    path: Path, *, model: str | None = None, reference: str | None = None, annotator: str | None = None
) -> Annotations:
    """Read one file, and choose one model, reference and judge where it holds several.

    Args:
        path: ``.json`` or ``.jsonl``, either gzipped or not.
        model: whose wins are counted; ``generator_2`` when absent.
        reference: what it is compared with; the other generator when absent.
        annotator: whose verdicts count; needed where several judged.

    Raises:
        UserError: no such file, or of another kind; no such generator or judge; several, and none is chosen.
    """
    rows = _rows(path)
    if not any("preference" in row for row in rows):
        keys = ", ".join(sorted({key for row in rows for key in row})[:8])
        fix = "Give the annotations.json that a judge left, not a model_outputs.json."
        raise UserError(str(path), f"no row has a `preference` (keys: {keys})", fix)
    zeros = sum(_is_number(row.get("preference")) and row["preference"] == 0 for row in rows)
    named = [_named(row) for row in rows]
    named, chosen_annotator = _by_annotator(path, named, annotator)
    named, sides = _by_generators(path, named, model, reference)
    pairs = tuple(one.pair if one.generators == sides else one.pair.mirrored() for one in named)
    unscored = Counter(pair.reason or "" for pair in pairs if pair.preference is None)
    wrong = {reason: count for reason, count in unscored.items() if reason != NO_VERDICT}
    if len(pairs) == sum(unscored.values()) and wrong:
        listed = "; ".join(f"{count} x {reason}" for reason, count in wrong.items())
        fix = "Write 1 for output_1, 2 for output_2, 1.5 for a draw, a number between for a probability."
        raise UserError(str(path), f"no preference can be read ({listed})", fix)
    notes = []
    if zeros:
        notes.append(f"{zeros} preferences of 0 are read as draws, as AlpacaEval's old files mean them")
    if repeated := _repeated(pairs):
        notes.append(f"{repeated} rows repeat an instruction; each counts, as in the alpaca-eval package")
    return Annotations(pairs, sides[1], sides[0], chosen_annotator, tuple(notes), dict(unscored))


NO_VERDICT = "no verdict (null)"


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    except FileNotFoundError:
        close = nearest(path.name, [entry.name for entry in path.parent.glob("*.json*")])
        fix = f"Did you mean {path.parent / close[0]}?" if close else "Give the path of an annotations file."
        raise UserError(str(path), "no such file", fix) from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(str(path), f"cannot be read: {error}", "Give a whole JSON file in UTF-8.") from None
    if ".jsonl" in path.suffixes:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        values = [_parsed(line, f"{path}:{number}") for number, line in lines]
    else:
        values = _parsed(text, str(path))
    fix = "An annotations file is a JSON list of objects, one for each compared pair."
    if not isinstance(values, list):
        raise UserError(str(path), f"holds a JSON {_kind(values)}, not a list", fix)
    if not values:
        raise UserError(str(path), "holds no rows", fix)
    # A bare list of preferences is what the package's `pairwise_to_winrate` takes.
    rows = [{"preference": value} if _is_number(value) else value for value in values]
    for position, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {position}", f"a JSON {_kind(row)}, not an object", fix)
    return rows


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(where, f"not JSON: {error}", "Give an annotations file as AlpacaEval writes it.") from None


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _named(row: Mapping[str, Any]) -> _Named:
    preference, reason = _preference(row)
    pair = JudgedPair(_text(row, "instruction"), _text(row, "output_1"), _text(row, "output_2"), preference, reason)
    return _Named(pair, (_name(row, "generator_1"), _name(row, "generator_2")), _name(row, "annotator"))


def _preference(row: Mapping[str, Any]) -> tuple[float | None, str | None]:
    if "preference" not in row:
        return None, "the row has no preference"
    value = row["preference"]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        said = row.get("reason")
        return None, said if isinstance(said, str) and said else NO_VERDICT
    if not _is_number(value):
        return None, f"the preference is a {_kind(value)}, not a number"
    if value == 0:
        return DRAW, None
    if not 1 <= value <= 2:
        return None, "the preference is outside 1 to 2"
    return float(value), None


def _text(row: Mapping[str, Any], key: str) -> str | None:
    value = row.get(key)
    return value if isinstance(value, str) else None


def _name(row: Mapping[str, Any], key: str) -> str | None:
    value = row.get(key)
    return None if value is None else str(value)


def _by_annotator(path: Path, named: list[_Named], wanted: str | None) -> tuple[list[_Named], str | None]:
    names = {one.annotator for one in named}
    if wanted is not None:
        if wanted not in names:
            raise unknown("--annotator", "judge", wanted, sorted(map(str, names)), str(path))
        return [one for one in named if one.annotator == wanted], wanted
    if len(names) > 1:
        listed = ", ".join(sorted(map(str, names)))
        raise UserError(str(path), f"holds the verdicts of several judges: {listed}", "Choose one with --annotator.")
    return named, names.pop()


def _by_generators(
    path: Path, named: list[_Named], model: str | None, reference: str | None
) -> tuple[list[_Named], tuple[str | None, str | None]]:
    """The rows of one model against one reference, and the two names (reference, model)."""
    known = sorted({name for one in named for name in one.generators if name is not None})
    for option, wanted in (("--model", model), ("--reference", reference)):
        if wanted is not None and wanted not in known:
            raise unknown(option, "generator", wanted, known, str(path))
        named = [one for one in named if wanted is None or wanted in one.generators]
    if not named:
        raise UserError(str(path), f"{model} and {reference} are never compared", "Leave one of the options out.")
    orders = list(dict.fromkeys(one.generators for one in named))
    if len({frozenset(order) for order in orders}) > 1 or (len(orders) > 1 and model is None and reference is None):
        listed = "; ".join(f"{second} against {first}" for first, second in orders[:6])
        more = ", ..." if len(orders) > 6 else ""
        fix = "Choose one comparison with --model and --reference."
        raise UserError(str(path), f"holds several comparisons: {listed}{more}", fix)
    first, second = orders[0]
    turned = first != second and (model == first or reference == second)
    return named, (second, first) if turned else (first, second)


def _repeated(pairs: Sequence[JudgedPair]) -> int:
    counts = Counter(pair.instruction for pair in pairs if pair.instruction is not None)
    return sum(count - 1 for count in counts.values())


def scored(annotations: Annotations) -> list[JudgedPair]:
    """The pairs that have a preference."""
    return [pair for pair in annotations.pairs if pair.preference is not None]


def limited(annotations: Annotations, limit: int | None) -> Annotations:
    """The first ``limit`` pairs."""
    return annotations if limit is None else replace(annotations, pairs=annotations.pairs[:limit])

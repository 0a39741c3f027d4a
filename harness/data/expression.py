"""What ``--dataset`` takes: an expression that names data sets, subsets and shares.

It is a mixture of terms in shares, or (with ``&``) all rows of all terms; spaces are free::

    TERM [+ TERM ...]          TERM = SOURCE[@REVISION][:SUBSET][*WEIGHT]
    TERM & TERM [& TERM ...]   without weights
    hh-rlhf:harmless                           one subset of a registered data set
    hh-rlhf:harmless*0.3 + helpful*0.7         a later term may leave out the data set it shares with the one before
    beavertails@main:harmless                  at another revision
    hh-rlhf:harmless & beavertails:harmless    every row of both, in one order (quote it: & is the shell's too)
    jsonl:FILE                                 a file in one of TRL's formats (a path with +, & or * only on its own)
    OWNER/NAME[:CONFIGURATION]                 a data set of the hub in one of TRL's formats

Weights are decimal numbers or fractions (``1/3``), for all terms or for none. Without weights the shares are equal,
which is our choice: a sum of unequal data sets leaves out rows of the larger ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from harness.contracts.dataset import Dataset
from harness.contracts.registry import Registry
from harness.core.errors import UserError, nearest, unknown

OPTION = "--dataset"
FILES = "trl"
"""The data set that reads files and any hub id."""
LISTING = "harness data list"


@dataclass(frozen=True)
class Part:
    """One term of an expression: which rows, and their share of the mixture."""

    name: str
    """Of a registered data set; ``trl`` for a file or a hub id."""
    subset: str | None = None
    revision: str | None = None
    weight: Fraction = Fraction(1)
    options: tuple[tuple[str, str], ...] = ()
    concatenated: bool = False
    """Whether all its rows are taken, beside all of the other terms; its weight is then of no account."""

    @property
    def label(self) -> str:
        """As a user would write it, without the weight; a file by its name, as paths stay out of records."""
        given = dict(self.options)
        if "path" in given and self._is_file:
            return f"jsonl:{Path(given['path']).name}"
        name = given.get("path", self.name) + (f"@{self.revision}" if self.revision else "")
        tail = self.subset or given.get("config")
        return f"{name}:{tail}" if tail else name

    @property
    def _is_file(self) -> bool:
        return self.options[0][1].endswith((".jsonl", ".jsonl.gz")) or Path(self.options[0][1]).is_file()


_TERM = re.compile(r"(?P<source>[^@:*]+)(@(?P<revision>[^:*]+))?(:(?P<subset>[^*]+))?(\*(?P<weight>.+))?")
_SOURCE = re.compile(r"(?<![^+&\s])[\w./-]+(?=\s*(?:[:*+&]|$))")
"""The source of a term without a revision."""
_FOLDERS = re.compile(r"(?<![^+&\s])jsonl:[^+&*]*/")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def parse_expression(expression: str, registry: Registry) -> list[Part]:
    """Read an expression; parts come back in the order of their labels, so that a mixture has no first term.

    Raises:
        UserError: a malformed term, an unknown data set or subset (with suggestions), odd weights.
    """
    where = f"{OPTION} {expression}"
    terms = [expression] if _is_one_file(expression) else re.split("[+&]", expression)
    joined = {mark for mark in "+&" if mark in expression} if len(terms) > 1 else set()
    if len(joined) > 1:
        raise UserError(where, "joins terms both by + and by &", "Use + for shares of each, or & for all rows of all.")
    parts: list[Part] = []
    weighted: list[bool] = []
    for term in (term.strip() for term in terms):
        part, has_weight = _parse_term(term, parts[-1] if parts else None, registry, where, whole=len(terms) == 1)
        parts.append(part)
        weighted.append(has_weight)
    if any(weighted) and "&" in joined:
        raise UserError(
            where, "& takes all rows, and a term has a weight", "Leave weights out, or join the terms by +."
        )
    if any(weighted) and not all(weighted):
        raise UserError(where, "some terms have a weight and some have none", "Give all of them one, or none.")
    labels = [part.label for part in parts]
    if len(set(labels)) < len(labels):
        raise UserError(where, f"{max(labels, key=labels.count)} is named twice", "Name it once, with one weight.")
    total = sum((part.weight for part in parts), Fraction(0))
    shares = [replace(part, weight=part.weight / total, concatenated="&" in joined) for part in parts]
    return sorted(shares, key=lambda part: part.label)


def at_revisions(expression: str, registry: Registry, revisions: Mapping[str, str]) -> str:
    """The expression with ``@COMMIT`` after each data set that is to be read at one, unless it names a revision itself.

    Args:
        expression: what a user wrote.
        registry: says which data set of the hub a name stands for.
        revisions: hub id -> commit.
    """
    sources = {name: dataset.source for name, dataset in registry.of_kind(Dataset)}

    def pin(found: re.Match[str]) -> str:
        commit = revisions.get(sources.get(found[0]) or found[0])
        return f"{found[0]}@{commit}" if commit else found[0]

    return _SOURCE.sub(pin, expression)


def portable(expression: str) -> str:
    """The expression without the folders of its files, for what may be published."""
    if _is_one_file(expression):
        return f"jsonl:{Path(expression.strip()).name}"
    return _FOLDERS.sub("jsonl:", expression)


def _is_one_file(expression: str) -> bool:
    alone = expression.strip()
    return alone.startswith("jsonl:") and Path(alone.removeprefix("jsonl:")).is_file()


def _parse_term(term: str, before: Part | None, registry: Registry, where: str, *, whole: bool) -> tuple[Part, bool]:
    if term.startswith("jsonl:"):
        path, star, share = term.removeprefix("jsonl:"), "", ""
        if not (whole and Path(path).is_file()):
            path, star, share = path.partition("*")
        part = Part(FILES, weight=_weight(share, where) if star else Fraction(1), options=(("path", path.strip()),))
        if not path.strip():
            raise UserError(where, "jsonl: names no file", "Write jsonl:PATH.")
        return part, bool(star)
    match = _TERM.fullmatch(term)
    if match is None:
        raise UserError(where, f"cannot read {term!r}", "Write NAME[@REVISION][:SUBSET][*WEIGHT], joined by + or &.")
    source, revision, subset = ((match[key] or "").strip() or None for key in ("source", "revision", "subset"))
    weight = _weight(match["weight"], where) if match["weight"] is not None else Fraction(1)
    has_weight = match["weight"] is not None
    known = registry.names(Dataset.kind)
    if source in known and source is not None:
        dataset = registry.find(Dataset, source, where)
        _check_subset(dataset, subset, where)
        return Part(source, subset, revision, weight), has_weight
    if before is not None and subset is None and revision is None and source is not None:
        shared = registry.find(Dataset, before.name, where)
        if source in shared.subsets:
            return Part(before.name, source, before.revision, weight), has_weight
        if shared.subsets and nearest(source, shared.subsets) and "/" not in source:
            raise unknown(where, f"subset of {before.name}", source, shared.subsets, LISTING)
    if source is not None and _HUB_ID.fullmatch(source):
        options = [("path", source), *([("config", subset)] if subset else [])]
        return Part(FILES, None, revision, weight, tuple(options)), has_weight
    raise unknown(where, "data set", source or "", [*trainable(registry), "jsonl:PATH", "OWNER/NAME"], LISTING)


def trainable(registry: Registry) -> list[str]:
    """Data sets that an aligner can learn from."""
    return [name for name, dataset in registry.of_kind(Dataset) if dataset.schema != "prompts"]


def _check_subset(dataset: Dataset, subset: str | None, where: str) -> None:
    if subset is not None and subset not in dataset.subsets:
        raise unknown(where, f"subset of {dataset.name}", subset, dataset.subsets, LISTING)
    if subset is None and len(dataset.subsets) > 1:
        examples = " or ".join(f"{dataset.name}:{one}" for one in dataset.subsets)
        raise UserError(where, f"{dataset.name} has several subsets, and none is named", f"Write {examples}.")


def _weight(text: str, where: str) -> Fraction:
    try:
        weight = Fraction(text.replace(" ", ""))
    except (ValueError, ZeroDivisionError):
        weight = Fraction(0)
    if weight <= 0:
        raise UserError(where, f"weight {text!r} is no positive number", "Write for example *0.3 or *1/3.")
    return weight

"""One task under several judges and wordings: a scores step for each, over the same answers.

What a judge says of an answer depends on who it is and on how it is asked: wording alone has been seen to move attack
success by 24 points (arXiv 2604.24074). So a task may name `judges` and `wordings`; the first of both is the one that
rows and verdicts go by, the others show how far these can be relied on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.contracts.scorer import Scorer, Wording
from harness.core.errors import UserError
from harness.core.records import digest_of
from harness.core.specs import ScorerRef, TaskSpec


@dataclass(frozen=True)
class AskedOf:
    """Which judge is asked, and in which words; None: the judge's own name, and the only wording there is."""

    judge: str | None
    wording: str | None
    first_wording: bool = True
    """Whether the wording is the one that the scorer has when nobody says any: then names leave it out."""


def scorers_of(
    spec: TaskSpec, refs: Sequence[ScorerRef], find: Callable[[str], Scorer]
) -> list[tuple[ScorerRef, AskedOf | None]]:
    """The scorers of a task, those that ask a judge once for each judge and wording that the task names.

    Args:
        spec: of the task.
        refs: its scorers.
        find: the plugin of a scorer's name.

    Raises:
        UserError: no scorer of the task asks a judge, a wording is unknown, or one is named twice.
    """
    if not spec.judges and spec.wordings == 1:
        return [(ref, None) for ref in refs]
    where = f"task {spec.name}"
    found: list[tuple[ScorerRef, AskedOf | None]] = []
    for ref in refs:
        panel = list(_panel(spec, ref, find(ref.name), where))
        found += panel or [(ref, None)]
    if all(asked is None for _, asked in found):
        names = ", ".join(ref.name for ref in refs)
        key = "judges" if spec.judges else "wordings"
        raise UserError(
            f"{where}, {key}",
            f"no judge is asked by its scorer {names}",
            "Leave it out, or take a task whose scorer asks one: dangerous_qa, harmful_qa, alpaca_eval2.",
        )
    return found


def _panel(spec: TaskSpec, ref: ScorerRef, scorer: Scorer, where: str) -> Iterator[tuple[ScorerRef, AskedOf]]:
    judges = [_judge_of(one, where) for one in spec.judges] or [(None, None)]
    wordings = {None if one is None else one.name: one for one in _wordings_of(spec, scorer, where)}
    seen: set[str] = set()
    for name, judge in judges:
        asked = {wording: scorer.judged_by(ref.options, judge, wordings[wording], where) for wording in wordings}
        found = {wording: options for wording, options in asked.items() if options is not None}
        if not found:
            return
        if len({digest_of(options) for options in found.values()}) == 1 and len(found) > 1:
            found = {None: next(iter(found.values()))}  # rules, say, which nobody puts into words
        for wording, options in found.items():
            if digest_of(options) in seen:
                fix = "Name each judge once; another temperature, or a wording, is another."
                raise UserError(f"{where}, judges", f"{_said(judge)} is named twice", fix)
            seen.add(digest_of(options))
            first = wording is None or wording == scorer.wordings()[0].name
            yield ref.model_copy(update={"options": options}), AskedOf(name, wording, first)


def _judge_of(one: str | Mapping[str, Any], where: str) -> tuple[str | None, dict[str, Any] | None]:
    """The name that the user gives a judge, if any, and its options."""
    if isinstance(one, str):
        return None, {"model": one}
    options = dict(one)
    name = options.pop("name", None)
    if name is not None and (not isinstance(name, str) or not name.strip()):
        raise UserError(f"{where}, judges", f"name {name!r} is no text", "Give a short name, or none.")
    if not options:
        raise UserError(f"{where}, judges", f"{dict(one)!r} names nobody", "Give {model: URL_OR_MODEL}.")
    return name, options


def _said(judge: Mapping[str, Any] | None) -> str:
    return "the scorer's own judge" if judge is None else str(judge.get("model") or dict(judge))


def _wordings_of(spec: TaskSpec, scorer: Scorer, where: str) -> Sequence[Wording | None]:
    """The wordings that a task asks for; one None for a scorer that has a single one."""
    known = scorer.wordings()
    where = f"{where}, wordings"
    if isinstance(spec.wordings, int):
        if spec.wordings == 1:
            return [None]
        if spec.wordings > len(known):
            seen = f"{spec.wordings} are asked for, and scorer {scorer.name} has {len(known) or 1}"
            fix = "Ask for fewer, or give your own: {name: mine, labels: ..., system: ..., template: ...}."
            raise UserError(where, seen, fix)
        return known[: spec.wordings]
    found: list[Wording] = []
    for one in spec.wordings:
        if isinstance(one, str):
            match = next((wording for wording in known if wording.name == one), None)
            if match is None:
                names = ", ".join(wording.name for wording in known) or "none"
                raise UserError(where, f"unknown wording {one!r}", f"Scorer {scorer.name} has: {names}.")
            found.append(match)
            continue
        options = dict(one)
        name = options.pop("name", None)
        if not isinstance(name, str) or not name.strip():
            raise UserError(where, f"{dict(one)!r} has no name", "Give `name`: rows and ids of it are told by it.")
        if not known:
            raise UserError(where, f"scorer {scorer.name} asks in its own words alone", "Leave wordings out.")
        found.append(Wording(name, options))
    _refuse_twins(found, where)
    return found


def _refuse_twins(wordings: Sequence[Wording], where: str) -> None:
    for number, one in enumerate(wordings):
        for other in wordings[:number]:
            if one.name == other.name or digest_of(dict(one.options)) == digest_of(dict(other.options)):
                seen = f"{other.name} and {one.name} are the same"
                raise UserError(where, seen, "Name each wording once: twice the same words show no spread.")


def refuse_equal_judges(spec: TaskSpec, panel: Sequence[tuple[str, AskedOf]]) -> None:
    """Refuse a panel of which two members would be one step, or bear one name.

    Args:
        spec: of the task.
        panel: id of each scores step, and who is asked, with the judge's name settled.

    Raises:
        UserError: the same judge under two addresses or names, or two judges of one name.
    """
    where = f"task {spec.name}, judges"
    ids: dict[str, AskedOf] = {}
    names: dict[tuple[str | None, str | None], str] = {}
    for step, asked in panel:
        if step in ids:
            seen = f"{ids[step].judge} and {asked.judge} are the same judge, asked in the same words"
            raise UserError(where, seen, "Name each judge once: twice the same shows no spread.")
        name = (asked.judge, asked.wording)
        if name in names:
            fix = "Give them names: {name: a, model: ...}."
            raise UserError(where, f"two judges are called {asked.judge}", fix)
        ids[step], names[name] = asked, step

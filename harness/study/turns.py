"""In which order a study's arms are made, so that bases stay open and few merged models lie on the disk at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from graphlib import TopologicalSorter

from harness.study.plan import Promise, StudyPlan


def in_turn(plan: StudyPlan) -> Iterator[Promise]:
    """Every arm after those that it is made from; alignments of one open base follow each other."""
    places = {name: place for place, name in enumerate(plan.promises)}
    sorter = TopologicalSorter({name: one.arm.parents for name, one in plan.promises.items()})
    sorter.prepare()
    ready: dict[str, deque[Promise]] = {}
    current = ""
    while sorter.is_active():
        for name in sorted(sorter.get_ready(), key=places.__getitem__):
            ready.setdefault(plan.promises[name].opens, deque()).append(plan.promises[name])
        current = current if ready.get(current) else next(key for key, some in ready.items() if some)
        promise = ready[current].popleft()
        sorter.done(promise.arm.name)
        yield promise


def merged_models(plan: StudyPlan) -> list[str]:
    """Names of the merged models that are made one by one, each answered for before the next; in the plan's order.

    Not those that an arm of another kind is made from, a merge that is an adapter say: they are made with the rest.
    """
    found: dict[str, None] = {}
    needed: set[str] = set()
    for name, promise in reversed(plan.promises.items()):
        if is_model(promise) and name not in needed:
            found[name] = None
        else:
            needed.update(promise.arm.parents)
    return list(reversed(found))


def is_model(promise: Promise) -> bool:
    """Whether an arm is a merge that is written as a whole model."""
    return promise.arm.kind == "merge" and promise.adapter is None


def peak_of_merged(plan: StudyPlan, ended: Collection[str], size: Callable[[Promise], int], *, kept: bool) -> int:
    """Bytes of merged models that lie on the disk at once, at most, where one process makes them.

    Args:
        plan: of the study.
        ended: keys of the steps that are done.
        size: bytes of a merged model.
        kept: whether they all stay.
    """
    sizes = {
        name: size(one)
        for name, one in plan.promises.items()
        if is_model(one) and one.step is not None and one.step.id not in ended
    }
    last = merged_models(plan)
    # What something else is made from is there before the first of the others.
    lying = {name: many for name, many in sizes.items() if kept or name not in last}
    peak = sum(lying.values())
    waiting = set(last)
    for name in last:
        lying[name] = sizes.get(name, 0)
        peak = max(peak, sum(lying.values()))
        waiting.discard(name)
        needed = {parent for one in waiting for parent in plan.promises[one].arm.parents}
        lying = {one: many for one, many in lying.items() if kept or one in needed}
    return peak

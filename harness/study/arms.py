"""A study's arms: every combination of a grid, the named ones, and merges over them by factor. Plans nothing."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from harness.core.errors import UserError, unknown
from harness.core.specs import AlignSpec, MergeInput, MergeSpec, ModelSpec
from harness.data.expression import portable
from harness.steps.files import slug
from harness.steps.step import without_paths
from harness.study.spec import ArmSpec, GridBlock, MergeBlock, Read

ARM = "arm:"
"""Before the name of an arm, where a spec has the path of what that arm makes."""


@dataclass(frozen=True)
class Arm:
    """One row of a study, not yet planned."""

    name: str
    base: str
    """Name of its base in the study."""
    where: str
    """``file:line, key`` of what asks for it."""
    place: tuple[str | int, ...] = ()
    """Path of the block of the file that asks for it."""
    factors: Mapping[str, Any] = field(default_factory=dict)
    align: AlignSpec | None = None
    merge: MergeSpec | None = None
    adapter: str | None = None
    """Folder or hub id of an adapter that was made elsewhere."""
    checkpoint: int | None = None
    """Of a kept checkpoint: its optimiser step."""
    parents: tuple[str, ...] = ()
    """Names of the arms that it is made from."""
    search: str | None = None
    """Name of the search that decides its recipe, or that it is a cell of."""
    cell: bool = False
    """Whether it is a cell of a search: aligned to choose by, and not evaluated."""
    control: str | None = None
    """Of an arm that is another one under a value of its conditioning: that value."""
    steered: bool = False
    """Whether it is asked under values alone, each of which is an arm."""

    @property
    def is_asked(self) -> bool:
        """Whether it is evaluated itself."""
        return not self.cell and not self.steered

    @property
    def kind(self) -> str:
        """Base, align, search (a cell of one), checkpoint, control (of another arm), merge or adapter."""
        if self.control is not None:
            return "control"
        if self.checkpoint is not None:
            return "checkpoint"
        if self.cell:
            return "search"
        named = {"align": self.align, "merge": self.merge, "adapter": self.adapter}
        return next((kind for kind, value in named.items() if value is not None), "base")


def arms_of(read: Read) -> list[Arm]:
    """Every arm of a study, each after those that it is made from.

    Raises:
        UserError: a name that is taken or unknown, a merge without inputs, arms that wait for each other.
    """
    spec = read.spec
    found: dict[str, Arm] = {}
    bases = [
        Arm(name, name, read.where("bases", name), ("bases", name), {"base": name, "method": "base"})
        for name in spec.bases
    ]
    trained = [arm for n, block in enumerate(spec.grid) for arm in _grid(block, read, n)]
    trained += [arm for n, one in enumerate(spec.arms) for arm in _named(one, read, n)]
    _check_searches(trained)
    for arm in [*bases, *_in_order(trained, read)]:
        _add(found, arm)
    for n, block in enumerate(spec.merges):
        for arm in _merges(block, read, n, list(found.values())):
            _add(found, arm)
    return list(found.values())


def _add(found: dict[str, Arm], arm: Arm) -> None:
    if (other := found.get(arm.name)) is not None:
        raise UserError(arm.where, f"a second arm of the name {arm.name!r}", f"Give it a `name`; first: {other.where}.")
    found[arm.name] = arm


def _check_searches(arms: Sequence[Arm]) -> None:
    """Refuse two searches of one name: the second would take what the first has chosen.

    Raises:
        UserError: naming both.
    """
    found: dict[str, tuple[Arm, dict[str, Any]]] = {}
    for arm in arms:
        if arm.search is None:
            continue
        alike = {key: value for key, value in arm.factors.items() if key != "seed"}
        other, its = found.setdefault(arm.search, (arm, alike))
        if (other.place, its) != (arm.place, alike):
            what = f"a second search of the name {arm.search!r}"
            raise UserError(arm.where, what, f"Give its arms another `name`; first: {other.where}.")


def _grid(block: GridBlock, read: Read, number: int) -> Iterator[Arm]:
    bases = block.base or tuple(read.spec.bases)
    for base in bases:
        _known_base(base, read, read.where("grid", number, "base"))
    for base, method, data, adapter, seed, samples in itertools.product(
        bases, block.method, block.data, block.adapter, block.seed, block.samples
    ):
        called = _called(data, read)
        parts = [block.name] if block.name is not None else [method, called, adapter]
        for values, value in ((block.method, method), (block.data, called), (block.adapter, adapter)):
            if block.name is not None and len(values) > 1:
                parts.append(value)
        if samples is not None and len(block.samples) > 1:
            parts.append(f"n{samples}")
        # What is started from is of the same base and seed, unless it is named in full.
        yield from _trained(
            slug("-".join([*parts, base, f"s{seed}"])),
            ("grid", number),
            read,
            {"base": base, "method": method, "data": data, "adapter": adapter, "seed": seed, "samples": samples},
            block,
            (block.start, f"{block.start}-{base}-s{seed}") if block.start is not None else (None, None),
            slug("-".join(["search", *parts, base])) if block.search is not None else None,
        )


def _named(one: ArmSpec, read: Read, number: int) -> Iterator[Arm]:
    where = read.where("arms", number, "name")
    _known_base(one.base, read, read.where("arms", number, "base"))
    if one.method is None or one.data is None:
        given = {"base": one.base, "method": "given", "adapter": without_paths(one.adapter)}
        yield Arm(one.name, one.base, where, ("arms", number), given, adapter=one.adapter)
        return
    factors: dict[str, Any] = {
        "base": one.base,
        "method": one.method,
        "data": one.data,
        "adapter": one.adapter,
        "seed": one.seed,
        "samples": one.samples,
    }
    searched = slug(f"search-{one.name}") if one.search is not None else None
    yield from _trained(one.name, ("arms", number), read, factors, one, (one.start, None), searched)


def _trained(
    name: str,
    place: tuple[str | int, ...],
    read: Read,
    factors: Mapping[str, Any],
    block: GridBlock | ArmSpec,
    start: tuple[str | None, str | None],
    search: str | None,
) -> Iterator[Arm]:
    spec, base = read.spec, read.spec.bases[str(factors["base"])]
    align = AlignSpec(
        method=factors["method"],
        model=ModelSpec(**base.model_dump(exclude={"template"})),
        dataset=spec.data.get(factors["data"], factors["data"]),
        adapter=factors["adapter"],
        start=f"{ARM}{start[0]}" if start[0] is not None else None,
        template=base.template,
        samples=factors["samples"],
        checkpoints=block.checkpoints,
        seed=factors["seed"],
        data_seed=block.data_seed,
        processes=block.processes,
        options=dict(block.set),
        data_revisions=dict(spec.data_revisions),
    )
    parents = tuple(one for one in start if one is not None)
    told = {**factors, "data": _called(factors["data"], read)}
    base_name = str(factors["base"])
    arm = Arm(name, base_name, read.where(*place), place, told, align=align, parents=parents, search=search)
    yield arm
    for step in block.checkpoints:
        kept = replace(arm, name=f"{name}-step{step}", factors={**told, "step": step}, parents=(name,))
        yield replace(kept, checkpoint=step, search=None)


def _called(data: str, read: Read) -> str:
    """The short name of data, or the expression without the folders of its files."""
    return data if data in read.spec.data else portable(data)


def _in_order(arms: Sequence[Arm], read: Read) -> list[Arm]:
    """Arms after those that they go on from, whose names are settled."""
    by_name = {arm.name: arm for arm in arms}
    done: dict[str, Arm] = {}
    settled = [_settled(arm, by_name, read) for arm in arms]
    waiting = {id(arm): arm for arm in settled}
    while waiting:
        ready = [arm for arm in waiting.values() if all(parent in done for parent in arm.parents)]
        if not ready:
            stuck = next(iter(waiting.values()))
            what = "waits for itself: its `from` leads back to it"
            raise UserError(_from(stuck, read), what, "Take one `from` away.")
        for arm in ready:
            done.setdefault(arm.name, arm)
            del waiting[id(arm)]
    # In the order of the file, as far as that goes.
    order = {arm.name: number for number, arm in enumerate(done.values())}
    return sorted(settled, key=lambda arm: order[arm.name])


def _settled(arm: Arm, by_name: Mapping[str, Arm], read: Read) -> Arm:
    if arm.checkpoint is not None or not arm.parents:
        return arm
    found = next((name for name in arm.parents if name in by_name), None)
    if found is None:
        raise unknown(_from(arm, read), "arm", arm.parents[0], by_name, "harness study plan FILE")
    if by_name[found].base != arm.base:
        what = f"{arm.name} is of base {arm.base}, and {found} of {by_name[found].base}"
        raise UserError(_from(arm, read), what, "Go on from an arm of the same base.")
    assert arm.align is not None
    return replace(arm, align=arm.align.model_copy(update={"start": f"{ARM}{found}"}), parents=(found,))


def _from(arm: Arm, read: Read) -> str:
    return read.where(*arm.place, "from")


def _merges(block: MergeBlock, read: Read, number: int, arms: Sequence[Arm]) -> Iterator[Arm]:
    """One merge for every value of the joined factors for which each input is exactly one arm."""
    where = read.where("merges", number)
    for base in block.base or ():
        _known_base(base, read, read.where("merges", number, "base"))
    arms = [arm for arm in arms if block.base is None or arm.base in block.base]
    split = [_split(one, read, (number, n), arms) for n, one in enumerate(block.inputs)]
    controls = [control for _, control in split]
    chosen = [_selected(one, read, (number, n), arms) for n, (one, _) in enumerate(split)]
    keys = [list(dict.fromkeys(tuple(arm.factors.get(key) for key in block.join) for arm in some)) for some in chosen]
    shared = [key for key in keys[0] if all(key in others for others in keys[1:])]
    if not shared:
        names = "; ".join(", ".join(arm.name for arm in some[:3]) for some in chosen)
        raise UserError(
            where, f"no {' and '.join(block.join)} that all inputs have ({names})", "Change inputs or join."
        )
    for key in shared:
        inputs = []
        for n, some in enumerate(chosen):
            fitting = [arm for arm in some if tuple(arm.factors.get(one) for one in block.join) == key]
            if len(fitting) != 1:
                several = ", ".join(arm.name for arm in fitting[:4])
                raise UserError(
                    read.where("merges", number, "inputs", n),
                    f"stands for {len(fitting)} arms of one merge ({several})",
                    "Say more factors of it, or add some to `join`.",
                )
            inputs.append(fitting[0])
        yield _merge(block, ("merges", number), read, inputs, controls, dict(zip(block.join, key, strict=True)))


def _merge(
    block: MergeBlock,
    place: tuple[str | int, ...],
    read: Read,
    inputs: Sequence[Arm],
    controls: Sequence[str | None],
    joined: Mapping[str, Any],
) -> Arm:
    base = inputs[0].base
    if strange := [arm for arm in inputs if arm.base != base]:
        what = f"{inputs[0].name} is of base {base}, and {strange[0].name} of {strange[0].base}"
        raise UserError(read.where(*place, "join"), what, "Join by base.")
    short = [
        f"{_short(arm, inputs)}{'' if control is None else f'@{control}'}"
        for arm, control in zip(inputs, controls, strict=True)
    ]
    parts = [block.name] if block.name is not None else [block.method, "+".join(short)]
    parts += [f"s{value}" if key == "seed" else str(value) for key, value in joined.items() if value is not None]
    weights = block.weights or (None,) * len(inputs)
    given = read.spec.bases[base]
    spec = MergeSpec(
        method=block.method,
        base=ModelSpec(**given.model_dump(exclude={"template"})),
        inputs=tuple(
            MergeInput(ref=f"{ARM}{arm.name}", weight=weight, control=control)
            for arm, weight, control in zip(inputs, weights, controls, strict=True)
        ),
        options=dict(block.set),
        seed=joined.get("seed") or 0,
        dtype=block.dtype,
        form=block.form,
        rank=block.rank,
    )
    factors = {"method": block.method, "inputs": "+".join(short), **joined, "base": base}
    names = tuple(arm.name for arm in inputs)
    return Arm(slug("-".join(parts)), base, read.where(*place), place, factors, merge=spec, parents=names)


def _short(arm: Arm, among: Sequence[Arm]) -> str:
    """What tells an input from the others: the values in which they differ."""
    keys = [key for key in arm.factors if len({str(one.factors.get(key)) for one in among}) > 1]
    return "-".join(str(arm.factors[key]) for key in keys) or arm.name


def _split(
    one: str | dict[str, Any], read: Read, place: tuple[int, int], arms: Sequence[Arm]
) -> tuple[str | dict[str, Any], str | None]:
    """Which arms an input means, and the value that they are taken under: ``PATTERN@VALUE``, or a `control`."""
    if isinstance(one, str):
        name, sign, value = one.rpartition("@")
        whole = not sign or any(fnmatch.fnmatchcase(arm.name, one) for arm in arms)
        return (one, None) if whole else (name, value)
    control = one.get("control")
    if "control" in one and not isinstance(control, str):
        where = read.where("merges", place[0], "inputs", place[1], "control")
        raise UserError(where, f"{control!r} is no value", "Name one value, in quotes if need be.")
    return {key: value for key, value in one.items() if key != "control"}, control


def _selected(one: str | dict[str, Any], read: Read, place: tuple[int, int], arms: Sequence[Arm]) -> list[Arm]:
    where = read.where("merges", place[0], "inputs", place[1])
    can = [arm for arm in arms if arm.kind != "base"]
    if isinstance(one, str):
        found = [arm for arm in can if fnmatch.fnmatchcase(arm.name, one)]
        if not found:
            raise unknown(where, "arm", one, [arm.name for arm in can], "harness study plan FILE")
        return found
    known = {key for arm in can for key in arm.factors}
    for key in one:
        if key not in known:
            raise unknown(where, "factor", str(key), known, "harness study plan FILE")
    # A kept checkpoint is meant where its step is said.
    found = [
        arm
        for arm in can
        if all(arm.factors.get(key) == value for key, value in one.items()) and ("step" in one or not arm.checkpoint)
    ]
    if not found:
        raise UserError(where, f"no arm has {one}", "See `harness study plan FILE` for the arms and their factors.")
    return found


def _known_base(name: str, read: Read, where: str) -> None:
    if name not in read.spec.bases:
        raise unknown(where, "base", name, read.spec.bases, "bases: in the study's file")

"""Which arms of a study are asked under values of their conditioning, and the arm that each such value is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from harness.alignment.plan import AlignPlan
from harness.core.conditioning import EVERY, Conditioning, promised, refuse_control
from harness.core.errors import UserError
from harness.core.records import AdapterInfo, ModelInfo
from harness.study.arms import Arm
from harness.study.spec import ArmSpec, GridBlock, Read

Place = tuple[str | int, ...]
UNTOLD = "untold"
"""Of a method that leaves files of its own and does not say under which values it trains: its export will."""


class Promise(Protocol):
    """What of a promised arm is asked here."""

    @property
    def arm(self) -> Arm:
        """The arm."""

    @property
    def model(self) -> ModelInfo:
        """Its base, or what was made of it."""

    @property
    def adapter(self) -> AdapterInfo | None:
        """Its adapter, promised or there."""

    @property
    def align(self) -> AlignPlan | None:
        """How it is aligned."""


def trained_under(promise: Promise) -> Conditioning | str | None:
    """The conditioning of an arm, by its names alone where it is not trained yet; or UNTOLD; None: it has none."""
    owner = promise.adapter if promise.adapter is not None else promise.model
    if owner.conditioning is not None:
        return owner.conditioning
    if promise.align is None or promise.arm.merge is not None:
        return None
    preferences = promise.align.aligner.controls(promise.align.recipe)
    if preferences is None:
        return UNTOLD
    return promised(preferences) if preferences else None


def asked_under(promise: Promise, read: Read) -> list[Arm]:
    """An arm for each value that an arm is to be asked under; none: it is asked itself, under its default.

    Raises:
        UserError: a value that it is not trained under, or ``all`` where nobody can say yet which there are.
    """
    place, values = _asked(promise.arm, read)
    found = trained_under(promise)
    if not values or found is None:
        return []
    controls: dict[str, None] = {}
    for number, value in enumerate(values):
        where = _where(read, place, number)
        if isinstance(found, Conditioning):
            controls |= dict.fromkeys(found.expand([value], f"{where} ({promise.arm.name})"))
        elif value == EVERY:
            what = f"{value!r}, and only the training of {promise.arm.name} says which values there are"
            raise UserError(where, what, "Name them; or let the method say them: Aligner.controls.")
        else:
            controls[value] = None
    return [_under(promise.arm, control) for control in controls]


def _under(arm: Arm, control: str) -> Arm:
    factors = {**arm.factors, "control": control}
    return replace(arm, name=f"{arm.name}@{control}", factors=factors, control=control, parents=(arm.name,))


def _asked(arm: Arm, read: Read) -> tuple[Place, Sequence[str]]:
    """Path of the key that says the values, and they: of the arm's own block, else those of the evaluation."""
    blocks = _blocks(read)
    if arm.place[0] not in blocks:
        # A base is what others are held against, and of a merge one value is folded in.
        return (), ()
    own = blocks[str(arm.place[0])][int(arm.place[1])].control
    return ((*arm.place, "control"), own) if own is not None else (("evaluation", "control"), _everywhere(read))


def _blocks(read: Read) -> dict[str, Sequence[GridBlock | ArmSpec]]:
    return {"grid": read.spec.grid, "arms": read.spec.arms}


def where_asked(arm: Arm, read: Read) -> str:
    """``file:line, key`` of what asks for an arm under a value."""
    return read.where(*_asked(arm, read)[0])


def _everywhere(read: Read) -> Sequence[str]:
    return () if read.spec.evaluation is None else read.spec.evaluation.control


def _where(read: Read, place: Place, number: int) -> str:
    """``file:line, key`` of one value; a single one needs no list."""
    return read.where(*place, number) if read.located.has((*place, number)) else read.where(*place)


def refuse_idle(read: Read, arms: Iterable[Arm]) -> None:
    """Refuse a ``control`` that steers nothing: nobody would notice that it was passed over.

    Args:
        read: the study.
        arms: all that are planned.

    Raises:
        UserError: naming the key.
    """
    steered = {_asked(arm, read)[0] for arm in arms if arm.steered}
    # What blocks say themselves takes the place of what is said for all.
    everywhere = () if steered else _everywhere(read)
    places: list[tuple[Place, Sequence[str]]] = [(("evaluation", "control"), everywhere)]
    for name, blocks in _blocks(read).items():
        places += [((name, n, "control"), one.control or ()) for n, one in enumerate(blocks)]
    for place, values in places:
        if values and place not in steered:
            what = f"{', '.join(values)} given, and no arm that it is of is trained under values"
            raise UserError(read.where(*place), what, "Leave it out, or train with a method such as meet.")


def check_inputs(arm: Arm, inputs: Sequence[Promise], read: Read) -> tuple[str | None, ...]:
    """The values that the inputs of a merge are taken under, where any are named.

    Raises:
        UserError: one of an input that has none, or was not trained.
    """
    assert arm.merge is not None
    controls: list[str | None] = []
    for number, (given, one) in enumerate(zip(arm.merge.inputs, inputs, strict=True)):
        where, found = read.where(*arm.place, "inputs", number), trained_under(one)
        if given.control is not None and found is None:
            refuse_control([given.control], None, f"{one.arm.name} is trained under no values", f"{where}, control")
        known = isinstance(found, Conditioning) and given.control is not None
        controls.append(found.resolve(given.control, where) if known else given.control)  # type: ignore[union-attr]
    return tuple(controls)

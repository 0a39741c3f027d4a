"""Opens what an engine can serve at once: the base with adapters beside it, or one with an adapter folded into it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from harness.contracts.engine import Session
from harness.core.records import AdapterInfo, ModelInfo, Request
from harness.evaluation.plan import ArmPlan, EvalPlan
from harness.evaluation.session import EvalSession, Unit
from harness.models.conditioning import copy_conditioning


@dataclass(frozen=True)
class Group:
    """Arms that one open engine serves, and what is to be answered of them."""

    arms: tuple[ArmPlan, ...]
    units: tuple[Unit, ...]

    @property
    def folded(self) -> bool:
        """Whether its one adapter is folded into the base."""
        return self.arms[0].folded is not None


def groups_of(plan: EvalPlan, units: Sequence[Unit], workers: int = 1) -> Iterator[Group]:
    """Cut the arms that have something to answer into groups: those served together first, then each folded one.

    Where fewer are served together than there are workers, they are cut further, an arm's tasks staying together as
    far as that goes; a folded arm, which would be folded by each, is not.
    """
    waiting = {unit.arm.name for unit in units}
    arms = [arm for arm in plan.arms if arm.name in waiting]
    # What is folded is the plan's to say: a second engine serves what the run's own cannot, or the other way round.
    by_name = {arm.name: arm for arm in arms}
    units = [replace(unit, arm=by_name[unit.arm.name]) for unit in units]
    most = max(1, plan.engine.capabilities(plan.model, plan.engine_options).max_adapters)
    served: list[list[ArmPlan]] = []
    for arm in arms:
        if arm.folded is not None:
            continue
        beside = _served_names(served[-1]) if served else set()
        if not served or len(beside | _served_names([arm])) > most or (most == len(beside) and arm.served is None):
            served.append([])
        served[-1].append(arm)
    # Arms that differ in text or virtual tokens alone are one checkpoint.
    folded: dict[str, set[str]] = {}
    for arm in arms:
        if arm.folded is not None and arm.served is not None:
            folded.setdefault(arm.served.name, set()).add(arm.name)
    pieces = max(1, -(-(workers - len(folded)) // len(served))) if served else 1
    for chunk in served:
        names = {arm.name for arm in chunk}
        own = [unit for unit in units if unit.arm.name in names]
        for piece in range(min(pieces, len(own))):
            bounds = (len(own) * n // min(pieces, len(own)) for n in (piece, piece + 1))
            yield group_of(own[slice(*bounds)])
    for names in folded.values():
        yield group_of([unit for unit in units if unit.arm.name in names])


def _served_names(arms: Sequence[ArmPlan]) -> set[str]:
    """The adapters that an engine has open for some arms, which may share one."""
    return {arm.served.name for arm in arms if arm.served is not None}


def group_of(units: Sequence[Unit]) -> Group:
    """Units that one open engine can answer."""
    return Group(tuple({unit.arm.name: unit.arm for unit in units}.values()), tuple(units))


class Loaded:
    """An engine for one group, opened when it is first asked for."""

    def __init__(self, run: EvalSession, plan: EvalPlan, group: Group) -> None:
        """``plan`` says which engine: the run's own plan, or that of a second engine."""
        self._run, self._plan, self._group = run, plan, group
        self._session: Session | None = None

    def session(self) -> Session:
        """The open engine.

        Raises:
            UserError: it cannot be opened as asked.
            StepError: the engine refused the model.
        """
        if self._session is None:
            arms = self._group.arms
            with self._run.clock("load"):
                model, adapters = self._served()
                said = arms[0].name if len(arms) == 1 else f"{model.name} with {len(adapters)} adapters"
                beside = f" ({self._plan.engine.name})" if self._plan is not self._run.plan else ""
                self._run.reporter.note(f"loading {said}{beside}")
                self._session = self._plan.engine.open(model, adapters, self._plan.engine_options)
        return self._session

    @property
    def is_open(self) -> bool:
        """Whether it was opened, and not closed since."""
        return self._session is not None

    def sender(self, arm: ArmPlan) -> Callable[[Request], Request]:
        """A request names the adapter by its short name; the open engine knows it by its label, or has it folded in."""
        name = None if self._group.folded or arm.served is None else arm.served.name
        return lambda request: arm.steering.sent(request, name)

    def close(self) -> None:
        """Close the engine, and remove the checkpoint that it had open."""
        if self._session is not None:
            session, self._session = self._session, None
            session.close()
        if self._group.folded or any(len(arm.steering.parts) > 1 for arm in self._group.arms):
            remove_scratch(self._run.scratch)

    def _served(self) -> tuple[ModelInfo, list[AdapterInfo]]:
        arms = self._group.arms
        if self._group.folded:
            return self._folded(arms[0]), []
        opened: dict[str, AdapterInfo] = {}
        for arm in arms:
            if arm.served is not None and arm.served.name not in opened:
                adapter = arm.steering.opened(self._run.scratch)
                assert adapter is not None
                opened[adapter.name] = adapter
        # Templates may differ from arm to arm: engines do not read them, as prompts come as token ids.
        return arms[0].model, list(opened.values())

    def _folded(self, arm: ArmPlan) -> ModelInfo:
        from harness.merging.fold.run import fold_into

        assert arm.served is not None
        spec, out = self._plan.spec.model, self._run.scratch / arm.served.digest[:16]
        # A folder that lies there was cut short or is of another base.
        remove_scratch(self._run.scratch)
        self._run.reporter.note(f"folding {arm.label} into a temporary checkpoint: {arm.folded}")
        out.parent.mkdir(parents=True)
        adapter = arm.steering.opened(self._run.scratch)
        assert adapter is not None
        fold_into(arm.model, adapter, out, dtype=spec.dtype, runner=self._run.runner)
        # Everything but the weights is the base's, its name too; nobody asks for the digest of what is soon deleted.
        model = arm.model.model_copy(update={"path": str(out), "pickled": False})
        if arm.steering.kind != "embeddings" or arm.adapter is None:
            return model
        return model.model_copy(update={"conditioning": copy_conditioning(arm.adapter, out)})


def remove_scratch(folder: Path) -> None:
    """Delete temporary checkpoints, also those that a killed run left behind."""
    shutil.rmtree(folder, ignore_errors=True)
    # The folder of all orders' goes with the last of them.
    with contextlib.suppress(OSError):
        folder.parent.rmdir()

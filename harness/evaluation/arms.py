"""Which arms one evaluation has: adapters found and named, each with the template it was trained with.

An adapter keeps its short name in requests and digests, whatever else is evaluated beside it, so that its steps are the
same alone and in company. The label, which tables and the engine use, is the short name made unique.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from harness.core.conditioning import Conditioning, refuse_control
from harness.core.errors import UserError
from harness.core.records import AdapterInfo, ModelInfo
from harness.core.specs import EvalSpec
from harness.models.chat_templates import with_template_of
from harness.models.inspect import inspect_adapter
from harness.steps.checksums import is_recorded

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Candidate:
    """One arm to be: the base (``adapter`` None), or the base under an adapter."""

    model: ModelInfo
    """With the chat template that prompts are written in."""
    adapter: AdapterInfo | None
    label: str | None
    """What tables call the arm beside its base; None for the base."""
    control: str | None
    """Of its conditioning; None: it has none, or its default is meant."""
    template_of: str | None = None
    """Of the base, asked in a chat template that it does not have: label of an arm that brings it."""

    @property
    def name(self) -> str:
        """What folders and tables call it; rich would read square brackets as markup."""
        plus = "" if self.label is None or self.label.startswith("@") else "+"
        name = f"{self.model.name}{plus}{self.label or ''}"
        return name if self.template_of is None else f"{name} (template of {self.template_of})"

    @property
    def conditioning(self) -> Conditioning | None:
        """What the arm was trained with."""
        return self.adapter.conditioning if self.adapter is not None else self.model.conditioning

    def conditioned(self) -> Candidate:
        """The same with the default of its conditioning where no value was asked for."""
        if self.control is not None or self.conditioning is None:
            return self
        return replace(self, control=self.conditioning.default)

    def under(self, asked: Sequence[str], where: str) -> list[Candidate]:
        """The arm under each control that is asked for, and under the default where none is.

        Raises:
            UserError: a value that was not trained, or any at all where there is no conditioning.
        """
        found = self.conditioning
        what = "there is nothing to steer" if self.adapter is None else f"{where} has no conditioning.json"
        refuse_control(asked, found, what)
        if found is None or not asked:
            return [self.conditioned()]
        return [
            replace(self, control=control, label=f"{self.label or ''}@{control}")
            for control in found.expand(asked, f"--control ({where})")
        ]


def find_arms(spec: EvalSpec, model: ModelInfo) -> list[Candidate]:
    """The arms that were asked for: the base first, where it is one, then the adapters in the order given.

    Raises:
        UserError: an adapter that does not fit the model, one that is given twice, a control value nobody knows.
    """
    single = (spec.model.adapter,) if spec.model.adapter is not None else ()
    refs = [one for ref in (*single, *spec.adapters) for one in adapters_in(ref)]
    mismatch = spec.model.allow_template_mismatch
    adapters = [inspect_adapter(ref, model, allow_template_mismatch=mismatch, conditioned=True) for ref in refs]
    _refuse_twins(adapters)
    base = Candidate(model, None, None, None)
    if not adapters:
        return base.under(spec.control, model.name)
    refuse_conditioned_base(model)
    found = [base] if (len(adapters) > 1 if spec.with_base is None else spec.with_base) else []
    for adapter, label in zip(adapters, unique_names(adapters), strict=True):
        one = Candidate(with_template_of(model, adapter), adapter, label, None)
        found += one.under(spec.control, f"adapter {label}")
    return found


def refuse_conditioned_base(model: ModelInfo) -> None:
    """Refuse adapters on a model that has a conditioning of its own: what steers them nobody knows.

    Raises:
        UserError: it has one.
    """
    if model.conditioning is not None:
        what = "was trained with a conditioning of its own, and adapters are to lie on it"
        fix = "Evaluate it without adapters; or give the base that it was trained from."
        raise UserError(f"--model {model.ref}", what, fix)


def adapters_in(ref: str) -> list[str]:
    """The adapter folders that a reference stands for: itself, or those directly in a folder of adapters, sorted."""
    path = Path(ref).expanduser()
    if not path.is_dir() or _is_adapter(path):
        return [ref]
    return [str(child) for child in sorted(path.iterdir()) if _is_adapter(child)] or [ref]


def _is_adapter(path: Path) -> bool:
    """One that lost its configuration counts, so that it is refused and not passed over."""
    return (path / ADAPTER_CONFIG).is_file() or is_recorded(path, ADAPTER_CONFIG)


def unique_names(adapters: Sequence[AdapterInfo]) -> list[str]:
    """Short names; where several are alike, with as many of their parents' names as tell them apart."""
    parts = [_parts(adapter) for adapter in adapters]
    names = [adapter.name for adapter in adapters]
    for depth in range(1, max((len(one) for one in parts), default=0)):
        seen = Counter(names)
        if max(seen.values()) == 1:
            break
        names = [
            name if seen[name] == 1 else "-".join([*own[-1 - depth : -1], adapter.name])
            for name, own, adapter in zip(names, parts, adapters, strict=True)
        ]
    return names


def _parts(adapter: AdapterInfo) -> tuple[str, ...]:
    path = Path(adapter.ref).expanduser()
    return tuple(part for part in (path.resolve().parts if path.exists() else path.parts) if part != "/")


def _refuse_twins(adapters: Sequence[AdapterInfo]) -> None:
    seen: dict[str, AdapterInfo] = {}
    for adapter in adapters:
        other = seen.setdefault(adapter.digest, adapter)
        if other is not adapter:
            raise UserError(
                f"--adapter {adapter.ref}",
                f"is the same adapter as {other.ref} (digest {adapter.digest[:12]})",
                "Give each adapter once.",
            )

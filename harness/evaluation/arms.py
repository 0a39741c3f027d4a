"""Which arms one evaluation has: adapters found and named, each with the template it was trained with.

An adapter keeps its short name in requests and digests, whatever else is evaluated beside it, so that its steps are the
same alone and in company. The label, which tables and the engine use, is the short name made unique.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
    template_of: str | None = None
    """Of the base, asked in a chat template that it does not have: label of an arm that brings it."""

    @property
    def name(self) -> str:
        """What folders and tables call it; rich would read square brackets as markup."""
        name = self.model.name if self.label is None else f"{self.model.name}+{self.label}"
        name = name if self.template_of is None else f"{name} (template of {self.template_of})"
        return name if self.control is None else f"{name}@{self.control}"


def find_arms(spec: EvalSpec, model: ModelInfo) -> list[Candidate]:
    """The arms that were asked for: the base first, where it is one, then the adapters in the order given.

    Raises:
        UserError: an adapter that does not fit the model, one that is given twice, a control value nobody knows.
    """
    single = (spec.model.adapter,) if spec.model.adapter is not None else ()
    refs = [one for ref in (*single, *spec.adapters) for one in adapters_in(ref)]
    adapters = [inspect_adapter(ref, model, allow_template_mismatch=spec.model.allow_template_mismatch) for ref in refs]
    _refuse_twins(adapters)
    control = spec.model.control
    if not adapters:
        _refuse_control(control, None)
    found = []
    if not adapters or (len(adapters) > 1 if spec.with_base is None else spec.with_base):
        found.append(Candidate(model, None, None, None))
    for adapter, label in zip(adapters, unique_names(adapters), strict=True):
        _refuse_control(control, adapter)
        found.append(Candidate(with_template_of(model, adapter), adapter, label, control))
    return found


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


def _refuse_control(control: str | None, adapter: AdapterInfo | None) -> None:
    """An adapter with a conditioning has been refused when it was inspected: nothing applies one yet."""
    if control is not None:
        what = "the adapter has no conditioning.json" if adapter is not None else "there is no adapter to steer"
        raise UserError("--control", f"{control!r} given, but {what}", "Leave --control out.")

"""What an engine has open for an arm with a conditioning, and what a control does to its questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.contracts.engine import Engine
from harness.core.conditioning import Conditioning, ControlKind, control_place, insert_control
from harness.core.records import AdapterInfo, ModelInfo, Request, digest_of
from harness.models.conditioning import (
    control_adapters,
    control_texts,
    control_tokens,
    refuse_too_long,
    virtual_tokens,
)
from harness.models.lineage import concatenate, refuse_unless_plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Steering:
    """One arm's adapter and control, and what an engine is asked for."""

    model: ModelInfo
    adapter: AdapterInfo | None
    label: str | None
    """What tables call the arm."""
    control: str | None

    @property
    def owner(self) -> AdapterInfo | ModelInfo:
        """What was trained with the conditioning."""
        return self.adapter if self.adapter is not None else self.model

    @property
    def conditioning(self) -> Conditioning | None:
        """Of the adapter, or of a whole model."""
        return self.owner.conditioning

    @property
    def kind(self) -> ControlKind | None:
        """What stands for the control; None: there is none."""
        if self.conditioning is None or self.control is None:
            return None
        return self.conditioning.kind(self.control)

    @property
    def parts(self) -> tuple[AdapterInfo, ...]:
        """The arm's adapter and those that stand for its control: their sum is what is served."""
        own = (self.adapter,) if self.adapter is not None else ()
        return (*own, *(control_adapters(self.owner, self.control) if self.control is not None else ()))

    @property
    def served(self) -> AdapterInfo | None:
        """What the engine has open, by the name that requests give it; arms that differ in text alone share it.

        Of several adapters the sum, of the summed rank; its files are written when the engine is opened.
        """
        parts = self.parts
        if not parts:
            return None
        label = self.label or self.model.name
        if self.kind in ("text", "embeddings"):
            label = label.removesuffix(f"@{self.control}")
        if len(parts) == 1:
            return parts[0].model_copy(update={"name": label})
        rank = sum(part.rank for part in parts)
        targets = {name for part in parts for name in _listed(part.config.get("target_modules"))}
        config = {**parts[0].config, "r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}}
        config |= {"target_modules": sorted(targets), "use_rslora": False}
        told = {"name": label, "rank": rank, "config": config, "digest": digest_of([part.digest for part in parts])}
        return parts[0].model_copy(update=told)

    def folded(self, engine: Engine, options: Any) -> str | None:
        """Why the engine cannot serve it beside the base, so that it is folded into a checkpoint; None: it can.

        Raises:
            UserError: the adapters cannot be summed exactly.
        """
        parts, served = self.parts, self.served
        if served is None or engine.remote:
            return None
        if len(parts) > 1:
            for part in parts:
                refuse_unless_plain(part.config, f"adapter {part.name}, under a control that is an adapter")
            parts = (*parts, served)
        problems = (engine.adapter_problem(self.model, part, options) for part in parts)
        return next((problem for problem in problems if problem is not None), None)

    def opened(self, scratch: Path) -> AdapterInfo | None:
        """What the engine has open, with its files: a sum of adapters is written into ``scratch``."""
        parts, served = self.parts, self.served
        if served is None or len(parts) == 1:
            return served
        path = Path(parts[0].path)
        for number, part in enumerate(parts[1:], start=1):
            out = scratch / f"sum-{served.digest[:16]}-{number}"
            out.mkdir(parents=True, exist_ok=True)
            concatenate(path, Path(part.path), out)
            path = out
        return served.model_copy(update={"path": str(path)})

    # ------------------------------------------------------------------------------------------------------ questions

    def tokens(self, tokenizer: PreTrainedTokenizerBase | None) -> int:
        """How many tokens of the context the control takes.

        Raises:
            UserError: it leaves no room for a prompt.
        """
        count = len(self._ids(tokenizer)) if self.kind == "text" else 0
        if self.kind == "embeddings" and self.control is not None:
            count = virtual_tokens(self.owner, self.control)
        if count:
            refuse_too_long(count, self.model.max_length, f"--control {self.control}")
        return count

    def steered(self, tokenizer: PreTrainedTokenizerBase | None) -> Steered:
        """What makes a request of the base one of this arm."""
        name = self.adapter.name if self.adapter is not None else None
        bos = tokenizer.bos_token_id if tokenizer is not None else None
        return Steered(self, name, bos, self._ids(tokenizer) if self.kind == "text" else [])

    def sent(self, request: Request, name: str | None) -> Request:
        """The request as an engine is asked it: by its own name, with a control only where vectors stand for it."""
        control = request.control if self.kind == "embeddings" else None
        if (request.adapter, request.control) == (name, control):
            return request
        return replace(request, adapter=name, control=control)

    def _ids(self, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
        assert tokenizer is not None and self.conditioning is not None and self.control is not None
        return control_tokens(tokenizer, control_texts(self.conditioning, self.control))


@dataclass(frozen=True)
class Steered:
    """Puts a control into requests of the base."""

    arm: Steering
    adapter: str | None
    bos: int | None
    ids: list[int]

    def __call__(self, request: Request) -> Request:
        """The request under adapter and control: written controls are in its token ids, of others the place is said."""
        arm = self.arm
        if arm.adapter is None and arm.control is None:
            return request
        request = replace(request, adapter=self.adapter, control=arm.control)
        if arm.conditioning is None or arm.kind not in ("text", "embeddings"):
            return request
        position = arm.conditioning.position
        if arm.kind == "embeddings":
            return replace(request, control_at=control_place(request.prompt_ids, position, self.bos))
        return replace(request, prompt_ids=tuple(insert_control(request.prompt_ids, self.ids, position, self.bos)))


def _listed(value: Any) -> Sequence[str]:
    return [value] if isinstance(value, str) else list(value or ())

"""The tensors that the models of a merge have, and the words for those that one of them lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.core.errors import UserError
from harness.core.specs import MergeSpec

HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
"""Names of output embeddings, which a model with tied embeddings need not store."""


@dataclass(frozen=True)
class Source:
    """One tensor of one model."""

    model: int
    """Index into the merge's inputs; -1 is the base."""
    tensor: str


class Models:
    """The tensors of all models, and what is said of those that are missing."""

    def __init__(
        self, spec: MergeSpec, names: Sequence[Sequence[str]], base_names: Sequence[str] | None, tied: bool
    ) -> None:
        self.labels = [one.ref for one in spec.inputs]
        self.base_label = spec.base.model if spec.base is not None else ""
        # A tied model may store its output embeddings or not: they are left out unless all do.
        every = [*names, *([base_names] if base_names is not None else [])]
        held = [set(one) for one in every]
        self.dropped = {
            name
            for one in held
            for name in one
            if tied and name.endswith(HEADS) and not all(name in other for other in held)
        }
        self.names = [[name for name in one if name not in self.dropped] for one in names]
        self.base_names = None if base_names is None else [name for name in base_names if name not in self.dropped]
        self._sets = [set(one) for one in self.names]
        self._base_set = set(self.base_names or ())

    def of(self, model: int) -> list[str]:
        """The names of one model's tensors; -1 is the base."""
        return self.names[model] if model >= 0 else self.base_names or []

    def source(self, model: int, tensor: str, result: str) -> Source:
        """One tensor of a model, which must have it."""
        if tensor in (self._sets[model] if model >= 0 else self._base_set):
            return Source(model, tensor)
        label = self.labels[model] if model >= 0 else self.base_label
        count = sum(tensor in one for one in [*self._sets, *([self._base_set] if self.base_names else [])])
        what = f"has no tensor {tensor}, needed for {result} (of {len(self._sets)} inputs and the base {count} have it)"
        if self.base_names is None:
            what = f"has no tensor {tensor}, needed for {result} (of {len(self._sets)} inputs {count} have it)"
        raise UserError(label, what, "Merge models of one architecture; all inputs must have the same tensors.")

    def refuse_extra(self) -> None:
        """Refuse a tensor of an input that the result has no place for."""
        reference = self._base_set if self.base_names is not None else self._sets[0]
        first = self.base_label if self.base_names is not None else self.labels[0]
        for label, held in zip(self.labels, self._sets, strict=True):
            extra = sorted(held - reference)
            if extra:
                more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
                what = f"has a tensor {extra[0]}{more} that {first} has not"
                raise UserError(label, what, "Merge models of one architecture; all inputs must have the same tensors.")

    @property
    def notes(self) -> tuple[str, ...]:
        """What is said of tensors that were left out."""
        return tuple(f"{name} is left out: the embeddings are tied" for name in sorted(self.dropped))

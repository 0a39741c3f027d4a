"""One tensor of a merge: its sources read, differences formed, merged in fp32, looked at, cast."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from harness.contracts.merger import Factors, Merged, Merger
from harness.core.errors import StepError, UserError
from harness.merging.differences import Sums, sums_of
from harness.merging.inputs import OpenModels, same_shape
from harness.merging.names import Source
from harness.merging.sources import MergeModel
from harness.merging.tensor_plan import TensorRecipe
from harness.merging.threads import Clock
from harness.models.tensors import FLOATS, TORCH_NAMES, not_finite

if TYPE_CHECKING:
    import torch


def seed_of(seed: int, tensor: str, model: int) -> int:
    """Seed of the generator for one model's part in one tensor: the first eight bytes of a SHA-256."""
    text = f"{seed}\0{tensor}\0{model}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")


def _described(result: object) -> str:
    """What a merger returned, as far as it is held to it: ``harness.Merged of shape [6, 4], torch.float32``."""
    if not isinstance(result, Merged):
        return f"{type(result).__name__}, not harness.Merged"
    return f"harness.Merged of shape {list(result.tensor.shape)}, {result.tensor.dtype}"


class Maker:
    """Makes the tensors of one merge, in any order and from any thread.

    Args:
        opened: the models.
        merger: after its ``prepare``.
        seed: of random masks.
        device: where tensors are merged; masks are drawn on the CPU whatever it is.
        clock: for time and bytes.
    """

    def __init__(self, opened: OpenModels, merger: Merger, seed: int, device: str, clock: Clock) -> None:
        self.opened, self.merger, self.seed, self.device, self.clock = opened, merger, seed, device, clock
        self.sums: dict[str, Sums] = {}
        self.copied: set[str] = set()
        self._lock = threading.Lock()

    # ------------------------------------------------------------------------------------------------ what is asked

    def model(self, source: Source) -> MergeModel:
        """The model that a source names."""
        if source.model >= 0:
            return self.opened.inputs[source.model]
        assert self.opened.base is not None
        return self.opened.base

    def origin(self, recipe: TensorRecipe) -> Source:
        """Where type and shape of the result come from, and what an unchanged tensor is copied from."""
        return recipe.base or recipe.sources[0]

    def check(self, recipe: TensorRecipe) -> None:
        """Hold everything that is merged into one tensor to one shape, and to numbers that can be merged.

        Raises:
            UserError: with the names and both shapes.
        """
        origin = self.origin(recipe)
        for source in recipe.sources:
            same_shape(self.model(source), source.tensor, self.model(origin), origin.tensor)

    def untouched(self, recipe: TensorRecipe) -> bool | None:
        """Whether every source is the origin's own tensor; None: their bytes must be compared."""
        origin = self.origin(recipe)
        of_origin = self.model(origin)
        found: bool | None = True
        for source in recipe.sources:
            model = self.model(source)
            if source == origin:
                continue
            same_tensor = model.checkpoint is of_origin.checkpoint and source.tensor == origin.tensor
            touched = [m for m, s in ((model, source), (of_origin, origin)) if m.adapter and m.touches(s.tensor)]
            if touched:
                return False
            found = found if same_tensor else None
        return found

    def needs(self, recipe: TensorRecipe) -> int:
        """Bytes that making it takes, roughly: everything in fp32, and as much again for the merger."""
        origin = self.origin(recipe)
        entry = self.model(origin).entry(origin.tensor)
        if self.untouched(recipe) and self.merger.keeps_equal(recipe.weights, recipe.options):
            return entry.size
        return 4 * entry.elements * (2 * len(recipe.sources) + 4)

    # ------------------------------------------------------------------------------------------------- what is made

    def make(self, recipe: TensorRecipe, dtype: str) -> torch.Tensor:
        """The tensor as it is written.

        Args:
            recipe: of the tensor.
            dtype: in safetensors' words.

        Raises:
            UserError: NaN or infinity in an input, or in the result; a tensor of other than float numbers differs.
        """
        import torch

        target = getattr(torch, TORCH_NAMES[dtype])
        with self.clock.on("read"):
            kept = self.equal(recipe)
        if kept is not None:
            with self._lock:
                self.copied.add(recipe.name)
            return kept.to(target)
        merged = self.merged(recipe).to(target).cpu()
        if problem := not_finite(merged):
            raise UserError(
                f"tensor {recipe.name}",
                f"merging gives {problem} in {TORCH_NAMES[dtype]}",
                "Take another --dtype, or other weights.",
            )
        return merged

    def equal(self, recipe: TensorRecipe) -> torch.Tensor | None:
        """The origin's stored tensor, where it stays as it is."""
        origin = self.origin(recipe)
        model = self.model(origin)
        entry = model.entry(origin.tensor)
        number = entry.dtype in FLOATS
        same = self.untouched(recipe)
        if same is False and not number:
            raise self._not_mergeable(recipe, model, entry.dtype)
        keeps = self.merger.keeps_equal(recipe.weights, recipe.options) or not recipe.sources or not number
        if same is False or not keeps or (model.adapter is not None and model.touches(origin.tensor)):
            return None
        stored = model.stored(origin.tensor)
        self.clock.count(entry.size)
        if same or all(self._same_bytes(source, stored) for source in recipe.sources):
            return stored
        if not number:
            raise self._not_mergeable(recipe, model, entry.dtype)
        return None

    def _same_bytes(self, source: Source, stored: torch.Tensor) -> bool:
        import torch

        other = self.model(source).stored(source.tensor)
        self.clock.count(other.numel() * other.element_size())
        if other.dtype != stored.dtype:
            return False
        whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[stored.element_size()]
        return torch.equal(other.view(whole), stored.view(whole))

    def _not_mergeable(self, recipe: TensorRecipe, model: MergeModel, dtype: str) -> UserError:
        return UserError(
            f"{model.label}, {recipe.name}",
            f"holds {dtype} numbers, and not all models have the same",
            f"Only tensors of {', '.join(FLOATS)} can be merged.",
        )

    def merged(self, recipe: TensorRecipe) -> torch.Tensor:
        """The merged weight, float32, on the device."""
        with self.clock.on("read"):
            base = self._base(recipe)
            values = [self._value(source, recipe, base) for source in recipe.sources]
        if not values:
            assert base is not None
            return base
        deltas = self.merger.operates_on == "deltas"
        with self.clock.on("merge"):
            found = self._ask(values, base, recipe)
        with self.clock.on("look"):
            self._look(values, base, found, recipe)
        with self.clock.on("merge"):
            if deltas:
                assert base is not None
                return found.tensor + base
            return found.tensor

    def delta(self, recipe: TensorRecipe) -> torch.Tensor:
        """What the merge adds to the base's tensor: float32, on the CPU."""
        base = self._base(recipe)
        assert base is not None
        if self.merger.operates_on == "deltas":
            values = [self._value(source, recipe, base) for source in recipe.sources]
            found = self._ask(values, base, recipe)
            self._look(values, base, found, recipe)
            return found.tensor.cpu()
        return (self.merged(recipe) - base).cpu()

    def _look(
        self, values: Sequence[torch.Tensor], base: torch.Tensor | None, found: Merged, recipe: TensorRecipe
    ) -> None:
        """Keep the sums that the record's figures follow from; without a base there are no differences."""
        inputs = len(self.opened.inputs)
        if base is not None:
            deltas = self.merger.operates_on == "deltas"
            sums = sums_of(values, base, found.tensor, deltas=deltas, extra=found.stats)
            sums = sums.placed([source.model for source in recipe.sources], inputs)
        else:
            sums = Sums(inputs, entries=found.tensor.numel())
            for name, value in found.stats.items():
                sums.extra[name].append((float(value), sums.entries))
        with self._lock:
            self.sums[recipe.name] = sums

    def _ask(self, values: Sequence[torch.Tensor], base: torch.Tensor | None, recipe: TensorRecipe) -> Merged:
        found = self.merger.merge(
            values,
            base=base,
            weights=recipe.weights,
            config=recipe.options,
            generator=self.generator(recipe.name),
        )
        seen, wanted = _described(found), _described(Merged(values[0]))
        if seen != wanted:
            raise StepError(
                f"merger {self.merger.name}, tensor {recipe.name}",
                f"returned {seen}, expected {wanted}",
                "This is a fault of the merger: `harness.testing.check_merger` finds such.",
            )
        return found

    def generator(self, name: str) -> Callable[[int], torch.Generator]:
        """``generator(i)`` of one tensor: always on the CPU, so that every device draws the same masks."""
        import torch

        def of(model: int) -> torch.Generator:
            drawn = torch.Generator()
            # torch takes 64 bits.
            drawn.manual_seed(seed_of(self.seed, name, model))
            return drawn

        return of

    # ------------------------------------------------------------------------------------------------- what is read

    def _base(self, recipe: TensorRecipe) -> torch.Tensor | None:
        if recipe.base is None:
            return None
        model = self.model(recipe.base)
        self.clock.count(model.entry(recipe.base.tensor).size)
        return model.weight(recipe.base.tensor, self.device)

    def _value(self, source: Source, recipe: TensorRecipe, base: torch.Tensor | None) -> torch.Tensor:
        """One input's part: its weight, or its difference from the base."""
        import torch

        model, deltas = self.model(source), self.merger.operates_on == "deltas"
        of_base = self.opened.base
        shares = (
            base is not None
            and of_base is not None
            and recipe.base is not None
            and of_base.adapter is None
            and model.checkpoint is of_base.checkpoint
            and source.tensor == recipe.base.tensor
        )
        if shares:
            assert base is not None
            if model.adapter is not None and model.adapter.touches(source.tensor):
                adapter = model.adapter
                self.clock.count(adapter.size(source.tensor))
                return adapter.delta(source.tensor, base) if deltas else adapter.apply(source.tensor, base)
            return torch.zeros_like(base) if deltas else base
        self.clock.count(model.entry(source.tensor).size)
        weight = model.weight(source.tensor, self.device)
        if not deltas:
            return weight
        assert base is not None
        return weight.sub_(base)

    def factors(self, recipe: TensorRecipe) -> list[Factors] | None:
        """Each input's difference in factors; None where one has none, or lies on another base."""
        of_base = self.opened.base
        if of_base is None or of_base.adapter is not None or recipe.base is None:
            return None
        found = []
        for source in recipe.sources:
            model = self.model(source)
            if model.adapter is None or model.checkpoint is not of_base.checkpoint:
                return None
            if source.tensor != recipe.base.tensor:
                return None
            one = model.adapter.factors(source.tensor)
            if one is None:
                if model.adapter.touches(source.tensor):
                    return None
                one = self._no_change(source.tensor)
            found.append(one)
        return found

    def _no_change(self, tensor: str) -> Factors:
        """Factors of rank 1 whose product is zero: for an adapter that leaves a tensor alone."""
        import torch

        assert self.opened.base is not None
        rows, columns = self.opened.base.entry(tensor).shape
        return Factors(torch.zeros(1, columns), torch.zeros(rows, 1), 1.0)

    # ------------------------------------------------------------------------------------------------------ prepare

    def prepared(self, recipes: Sequence[TensorRecipe]) -> Merger:
        """The merger after its look at whole models, if it wants one."""
        if type(self.merger).prepare is Merger.prepare or not recipes:
            return self.merger
        models: list[Mapping[str, Callable[[], torch.Tensor]]] = []
        for index in range(len(self.opened.inputs)):
            readers = {}
            for recipe in recipes:
                for source in recipe.sources:
                    if source.model == index:
                        readers[recipe.name] = self._reader(source, recipe)
            models.append(readers)
        return self.merger.prepare(models, recipes[0].options)

    def _reader(self, source: Source, recipe: TensorRecipe) -> Callable[[], torch.Tensor]:
        return lambda: self._value(source, recipe, self._base(recipe))

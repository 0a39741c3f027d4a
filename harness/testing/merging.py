"""The contract of a merger, tried on random tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.contracts.merger import Factors, Merged, Merger
from harness.core.errors import UserError
from harness.testing.common import check_plugin, demand, options_of

if TYPE_CHECKING:
    import torch

SHAPES = {"matrix": (6, 4), "vector": (5,), "cube": (2, 3, 2)}
CLOSE = 1e-5
"""Of the largest entry: what the last bits of a float32 sum may lose."""


def check_merger(
    merger: Merger,
    *,
    options: Mapping[str, Any] | None = None,
    weights: Sequence[float] | None = None,
    needs_base: bool = False,
) -> None:
    """Try a merger against its contract: pure, seeded by its generators alone, finite, same shape, true to its word.

    What it says of itself is ``keeps_equal`` and ``merge_factors``: equal weights (zero deltas) come back where the
    first says so, and the second gives what ``merge`` gives on the deltas that the factors stand for.

    Args:
        merger: the instance that the hook yields.
        options: for the merger's Config.
        weights: one for each model merged; as many models as ``models`` allows, at most three, when absent.
        needs_base: whether it merges weights and cannot do so without the base's.

    Raises:
        AssertionError: names the rule and what was seen.
    """
    import torch

    check_plugin(merger, Merger)
    demand(merger.operates_on in ("weights", "deltas"), "`operates_on` is weights or deltas.", repr(merger.operates_on))
    config = options_of(merger, options)
    trial = _settled(merger, weights, config)
    draw = torch.Generator().manual_seed(0)
    models = [{name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()} for _ in trial.weights]
    origin = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    readers = [{name: lambda tensor=tensor: tensor.clone() for name, tensor in model.items()} for model in models]
    prepared = merger.prepare(readers, trial.config)
    demand(isinstance(prepared, Merger), "`prepare` returns the merger to use.", type(prepared).__name__)
    trial = _Trial(prepared, trial.weights, trial.config)
    bases = (origin,) if needs_base or merger.operates_on == "deltas" else (origin, None)
    for base in bases:
        found = {
            name: _check_merge(trial, [m[name] for m in models], base[name] if base is not None else None)
            for name in SHAPES
        }
        for name in reversed(SHAPES):
            again = trial.merge([model[name] for model in models], base[name] if base is not None else None)
            rule = "A merge is a function of its arguments: what was merged before changes nothing."
            demand(torch.equal(again, found[name]), rule, f"{name}: two results differ")
        _check_keeps_equal(trial, origin, base)
    _check_per_model(trial, [model["matrix"] for model in models], origin["matrix"])
    _check_factors(trial, origin["matrix"], draw)


@dataclass(frozen=True)
class _Trial:
    """A merger with its weights and options."""

    merger: Merger
    weights: tuple[float, ...]
    config: Any

    def merge(self, tensors: Sequence[torch.Tensor], base: torch.Tensor | None) -> torch.Tensor:
        """One merge, as the harness asks for it."""
        found = self.merger.merge(
            tensors, base=base, weights=self.weights, config=self.config, generator=_generators(len(tensors))
        )
        demand(isinstance(found, Merged), "`merge` returns harness.Merged.", type(found).__name__)
        numbers = all(isinstance(value, int | float) and math.isfinite(value) for value in found.stats.values())
        demand(numbers, "`Merged.stats` are finite numbers.", repr(dict(found.stats)))
        return found.tensor


def _generators(count: int) -> Callable[[int], torch.Generator]:
    import torch

    def generator(index: int) -> torch.Generator:
        demand(index in range(count), f"`generator` takes the index of a model, 0 to {count - 1}.", repr(index))
        return torch.Generator().manual_seed(7 + index)

    return generator


def _settled(merger: Merger, weights: Sequence[float] | None, config: Any) -> _Trial:
    """Weights and options as the harness hands them over."""
    least, most = merger.models
    count = len(weights) if weights is not None else max(least, min(3, most or 3))
    demand(
        least <= count and (most is None or count <= most),
        "The kit is run with as many weights as `models` allows.",
        f"{count} weights, models = {merger.models}",
    )
    try:
        found = merger.settle(weights, count, config)
    except UserError as error:
        rule = "The kit is run with weights and options that `settle` takes: pass `weights=`, `options=`."
        raise AssertionError(f"{rule}\n  seen: {error}") from None
    whole = isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], merger.Config)
    demand(whole, "`settle` returns weights and a Config.", repr(found))
    numbers = len(found[0]) == count and all(math.isfinite(weight) for weight in found[0])
    demand(numbers, "`settle` returns one finite weight for each model.", repr(found[0]))
    return _Trial(merger, tuple(found[0]), found[1])


def _check_merge(trial: _Trial, tensors: list[torch.Tensor], base: torch.Tensor | None) -> torch.Tensor:
    import torch

    given = [*tensors, *([] if base is None else [base])]
    kept = [tensor.clone() for tensor in given]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    merged = trial.merge(tensors, base)
    unchanged = all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))
    demand(unchanged, "A merger is pure: its inputs stay as they are.", "an input tensor changed")
    untouched = torch.equal(state, torch.get_rng_state())
    demand(untouched, "Randomness comes from `generator` alone.", "torch's global generator moved")
    demand(merged.shape == tensors[0].shape, "The merged tensor has its inputs' shape.", f"{tuple(merged.shape)}")
    demand(merged.dtype == tensors[0].dtype, "The merged tensor has its inputs' dtype.", f"{merged.dtype}")
    demand(bool(torch.isfinite(merged).all()), "The merged tensor is finite.", "NaN or infinity")
    shared = [i for i, tensor in enumerate(given) if merged.data_ptr() == tensor.data_ptr()]
    demand(not shared, "The merged tensor is a new one.", f"it shares memory with input {shared[:1]}")
    torch.manual_seed(2)
    same = torch.equal(merged, trial.merge(tensors, base))
    demand(same, "The same inputs and the same seeds of `generator` give the same bytes.", "two results differ")
    return merged


def _check_keeps_equal(
    trial: _Trial, origin: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor] | None
) -> None:
    """Where it is said that equal weights come back, the harness does not merge them: it copies the base's bytes."""
    import torch

    if not trial.merger.keeps_equal(trial.weights, trial.config):
        return
    for name, tensor in origin.items():
        expected = torch.zeros_like(tensor) if trial.merger.operates_on == "deltas" else tensor
        merged = trial.merge([expected.clone() for _ in trial.weights], base[name] if base is not None else None)
        far = float((merged - expected).abs().max())
        rule = "Where `keeps_equal` says so, equal weights (zero deltas) come back as they are."
        demand(far <= CLOSE * float(expected.abs().max()), rule, f"{name}: a difference of {far:.2g}")


def _check_per_model(trial: _Trial, tensors: list[torch.Tensor], base: torch.Tensor) -> None:
    import torch

    fields = type(trial.config).model_fields
    for name in trial.merger.per_model:
        demand(name in fields, "`per_model` names fields of `Config`.", repr(name))
        value = getattr(trial.config, name)
        if isinstance(value, tuple):
            continue
        data = {**trial.config.model_dump(), name: (value,) * len(trial.weights)}
        listed = _Trial(trial.merger, trial.weights, options_of(trial.merger, data))
        same = torch.equal(trial.merge(tensors, base), listed.merge(tensors, base))
        rule = "A field of `per_model` takes one value, or the same value once for each model, to the same effect."
        demand(same, rule, f"{name}: two results differ")


def _check_factors(trial: _Trial, base: torch.Tensor, draw: torch.Generator) -> None:
    """A merge of low-rank deltas is the merge of the deltas."""
    import torch

    out, inside = base.shape
    factors = [
        Factors(torch.randn(rank, inside, generator=draw), torch.randn(out, rank, generator=draw), 0.5 * rank)
        for rank in range(1, len(trial.weights) + 1)
    ]
    deltas = [one.scale * one.B @ one.A for one in factors]
    found = trial.merger.merge_factors(factors, weights=trial.weights, config=trial.config)
    unchanged = all(torch.equal(one.scale * one.B @ one.A, delta) for one, delta in zip(factors, deltas, strict=True))
    demand(unchanged, "A merger is pure: its inputs stay as they are.", "`merge_factors` changed a factor")
    if found is None:
        return
    whole = isinstance(found, Factors) and found.A.shape[1:] == (inside,) and found.B.shape == (out, len(found.A))
    demand(
        whole, "`merge_factors` returns harness.Factors, A (rank, in) and B (out, rank), or None.", repr(found)[:200]
    )
    if trial.merger.operates_on == "deltas":
        expected = trial.merge(deltas, base)
    else:
        expected = trial.merge([base + delta for delta in deltas], base) - base
    far = float((found.scale * found.B @ found.A - expected).abs().max())
    rule = "`merge_factors` gives what `merge` gives on the deltas that the factors stand for."
    demand(far <= CLOSE * float(expected.abs().max()), rule, f"a difference of {far:.2g}")

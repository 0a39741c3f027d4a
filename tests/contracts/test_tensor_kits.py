"""The kits of mergers, adapters and aligners: a good plugin passes, and for each rule a broken one fails."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from harness import Adapter, Aligner, Config, Factors, Merged, Merger, PairwiseLoss, Stage, TrainingJob
from harness.contracts.scaffold import write_package
from harness.testing import check_adapter, check_aligner, check_merger


class Mean(Merger):
    name = "mean"
    summary = "weighted mean"

    def merge(self, tensors: Any, *, base: Any, weights: Sequence[float], config: Any, generator: Any) -> Merged:
        total = sum(weight * tensor for weight, tensor in zip(weights, tensors, strict=True))
        return Merged(total, {"norm": float(total.norm())})

    def keeps_equal(self, weights: Sequence[float], config: Any) -> bool:
        return abs(sum(weights) - 1) < 1e-9

    def merge_factors(self, factors: Any, *, weights: Sequence[float], config: Any) -> Factors | None:
        import torch

        if not self.keeps_equal(weights, config):
            return None  # The base would not come out once.
        scaled = [weight * one.scale * one.B for weight, one in zip(weights, factors, strict=True)]
        return Factors(torch.cat([one.A for one in factors]), torch.cat(scaled, 1), 1.0)


class Drop(Mean):
    """Drops entries of deltas at random, each with a probability of its own for each model."""

    name = "drop"
    operates_on = "deltas"
    per_model = ("density",)

    class Config(Config):
        density: float | tuple[float, ...] = Field(0.5, description="probability that an entry stays")

    def merge(self, tensors: Any, *, base: Any, weights: Sequence[float], config: Any, generator: Any) -> Merged:
        import torch

        density = config.density if isinstance(config.density, tuple) else (config.density,) * len(tensors)
        kept = [
            tensor * (torch.rand(tensor.shape, generator=generator(i)) < density[i]) for i, tensor in enumerate(tensors)
        ]
        return super().merge(kept, base=base, weights=weights, config=config, generator=generator)

    def keeps_equal(self, weights: Sequence[float], config: Any) -> bool:
        return True

    def merge_factors(self, factors: Any, *, weights: Sequence[float], config: Any) -> Factors | None:
        return None


def merging(change: Any, **overrides: Any) -> Merger:
    """A merger whose result is changed by ``change(tensor, tensors, base, generator)``."""

    def merge(self: Any, tensors: Any, *, base: Any, weights: Any, config: Any, generator: Any) -> Any:
        good = Mean.merge(self, tensors, base=base, weights=weights, config=config, generator=generator)
        return change(good.tensor, tensors, base, generator)

    # What it says of itself would be wrong for a changed result, and is not what is tried.
    silent = {"keeps_equal": lambda *a: False, "merge_factors": lambda *a, **k: None}
    merger: Merger = type("Broken", (Mean,), {**silent, "merge": merge, **overrides})()
    return merger


def saying(good: type[Merger] = Mean, **overrides: Any) -> Merger:
    """A good merger that says something else of itself."""
    merger: Merger = type("Broken", (good,), overrides)()
    return merger


def noisy(tensor: Any, generator: Any) -> Merged:
    import torch

    return Merged(tensor + torch.randn(tensor.shape, generator=generator(0)))


def global_noise(tensor: Any) -> Merged:
    import torch

    return Merged(tensor + torch.randn(tensor.shape))


def hidden_noise(tensor: Any) -> Merged:
    """Neither the given generators nor torch's global one."""
    import torch

    own = torch.Generator()
    own.seed()
    return Merged(tensor + torch.randn(tensor.shape, generator=own))


def remembering() -> Any:
    """Counts the changes of shape: a state that the same call twice does not show."""
    seen: list[Any] = [None, 0]

    def change(tensor: Any, tensors: Any, base: Any, generator: Any) -> Merged:
        if tensor.shape != seen[0]:
            seen[:] = [tensor.shape, seen[1] + 1]
        return Merged(tensor + seen[1])

    return change


def doubled(self: Any, factors: Any, *, weights: Any, config: Any) -> Factors:
    found = Mean.merge_factors(self, factors, weights=weights, config=config)
    assert found is not None
    return Factors(found.A, found.B, 2.0)


def in_place(self: Any, factors: Any, *, weights: Any, config: Any) -> None:
    factors[0].B.mul_(2)


def test_a_good_merger_passes() -> None:
    check_merger(Mean())
    check_merger(Mean(), weights=(0.9, 0.1))
    check_merger(Mean(), weights=(2.0, 1.0, 1.0, 1.0))
    check_merger(Drop())
    check_merger(Drop(), options={"density": (0.1, 0.9)}, weights=(0.5, 0.5))
    check_merger(merging(lambda t, ts, b, g: noisy(t, g)))
    check_merger(merging(lambda t, ts, b, g: Merged(t + 0 * b)), needs_base=True)
    check_merger(merging(lambda t, ts, b, g: Merged(t + 0 * b), operates_on="deltas"))
    check_merger(saying(models=(2, 2)))


@pytest.mark.parametrize(
    ("merger", "words"),
    [
        (merging(lambda t, ts, b, g: t), "`merge` returns harness.Merged.\n  seen: Tensor"),
        (merging(lambda t, ts, b, g: Merged(t, {"x": float("nan")})), "`Merged.stats` are finite numbers."),
        (merging(lambda t, ts, b, g: Merged(ts[0].add_(1))), "A merger is pure: its inputs stay as they are."),
        (merging(lambda t, ts, b, g: global_noise(t)), "Randomness comes from `generator` alone."),
        (merging(lambda t, ts, b, g: hidden_noise(t)), "same seeds of `generator` give the same bytes."),
        (merging(lambda t, ts, b, g: g(3) and t), "`generator` takes the index of a model, 0 to 2.\n  seen: 3"),
        (merging(remembering()), "what was merged before changes nothing.\n  seen: vector: two results differ"),
        (merging(lambda t, ts, b, g: Merged(t.flatten()[None])), "The merged tensor has its inputs' shape."),
        (
            merging(lambda t, ts, b, g: Merged(t.double())),
            "The merged tensor has its inputs' dtype.\n  seen: torch.float64",
        ),
        (merging(lambda t, ts, b, g: Merged(t / 0)), "The merged tensor is finite."),
        (
            merging(lambda t, ts, b, g: Merged(ts[1])),
            "The merged tensor is a new one.\n  seen: it shares memory with input [1]",
        ),
        (
            merging(lambda t, ts, b, g: noisy(t, g), keeps_equal=lambda *a: True),
            "Where `keeps_equal` says so, equal weights (zero deltas) come back as they are.",
        ),
        (
            merging(lambda t, ts, b, g: Merged(t + 1), keeps_equal=lambda *a: True, operates_on="deltas"),
            "equal weights (zero deltas) come back as they are.\n  seen: matrix: a difference of 1",
        ),
        (saying(merge_factors=doubled), "`merge_factors` gives what `merge` gives on the deltas"),
        (saying(merge_factors=in_place), "its inputs stay as they are.\n  seen: `merge_factors` changed a factor"),
        (saying(merge_factors=lambda *a, **k: 1), "`merge_factors` returns harness.Factors, A (rank, in)"),
        (saying(operates_on="factors"), "`operates_on` is weights or deltas.\n  seen: 'factors'"),
        (saying(models=(4, 3)), "as many weights as `models` allows.\n  seen: 4 weights, models = (4, 3)"),
        (saying(per_model=("density",)), "`per_model` names fields of `Config`.\n  seen: 'density'"),
        (saying(prepare=lambda *a: None), "`prepare` returns the merger to use.\n  seen: NoneType"),
        (saying(settle=lambda self, w, n, c: (1 / n,) * n), "`settle` returns weights and a Config."),
        (saying(settle=lambda self, w, n, c: ((1.0,), c)), "`settle` returns one finite weight for each model."),
    ],
)
def test_a_broken_merger_fails(merger: Merger, words: str) -> None:
    with pytest.raises(AssertionError) as caught:
        check_merger(merger)
    assert words in str(caught.value)


def test_a_value_for_each_model_means_what_one_value_means() -> None:
    def merge(self: Any, tensors: Any, *, config: Any, **rest: Any) -> Merged:
        return Merged(tensors[0] * (2 if isinstance(config.density, tuple) else 1))

    with pytest.raises(AssertionError, match="takes one value, or the same value once for each model"):
        check_merger(saying(Drop, merge=merge))


def test_weights_that_the_merger_refuses_are_not_the_kits_to_give() -> None:
    with pytest.raises(AssertionError) as caught:
        check_merger(Mean(), weights=(1.5, -0.5))
    assert "that `settle` takes: pass `weights=`, `options=`." in str(caught.value)
    assert "mean takes no weight below 0, found 1.5, -0.5" in str(caught.value)


# ------------------------------------------------------------------------------------------------------ adapters


def load(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plugin that `harness plugins new` writes: the good one of these kits."""
    write_package(kind, f"kit-{kind}", folder)
    monkeypatch.syspath_prepend(str(folder))
    module = __import__(f"harness_kit_{kind}")
    return getattr(module, f"Kit{kind.capitalize()}")


def unfrozen(self: Any, model: Any, config: Any) -> Any:
    return model.requires_grad_(True)


def unattached(self: Any, model: Any, config: Any) -> Any:
    return model.requires_grad_(False)


def half_frozen(self: Any, model: Any, config: Any) -> Any:
    """Trains the base's norms, without peft: nothing that an engine could load."""
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    return model


def test_the_rules_of_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = load("adapter", tmp_path, monkeypatch)
    check_adapter(good(), options={"rank": 2})

    def unreached(self: Any, model: Any, config: Any) -> Any:
        import torch

        attached = good.attach(self, model, config)
        for parameter in attached.parameters():
            parameter.requires_grad_(False)
        attached.spare = torch.nn.Parameter(torch.ones(2))
        return attached

    def unseeded(self: Any, model: Any, config: Any) -> Any:
        import torch

        torch.seed()
        return good.attach(self, model, config)

    for attach, words in (
        (unattached, "`attach` returns a model with trainable weights."),
        (unfrozen, "`attach` freezes the base.\n  seen: all 1"),
        (unreached, "A backward pass reaches the trainable weights."),
        (unseeded, "With the same seed `attach` gives the same weights."),
        (half_frozen, "`save_pretrained` writes peft's files.\n  seen: no adapter_config.json"),
    ):
        adapter: Adapter = type("Broken", (good,), {"attach": attach})()
        with pytest.raises(AssertionError) as caught:
            check_adapter(adapter, options={"rank": 2})
        assert words in str(caught.value)


# ------------------------------------------------------------------------------------------------------ aligners


def test_the_rules_of_aligners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = load("aligner", tmp_path, monkeypatch)
    check_aligner(good())

    calls: list[int] = []

    def loss(change: Any) -> Any:
        """The good trainer with another loss."""

        def trainer(self: Any, job: TrainingJob) -> Any:
            made = good.trainer(self, job)
            compute = made.compute_loss
            made.compute_loss = lambda *args, **kwargs: change(compute(*args, **kwargs))
            return made

        return {"trainer": trainer}

    def trains_the_base(self: Any, job: TrainingJob) -> Any:
        job.model.requires_grad_(True)
        return good.trainer(self, job)

    def trains_nothing(self: Any, job: TrainingJob) -> Any:
        """Trains a copy, and forgets it."""
        import copy
        import dataclasses

        return good.trainer(self, dataclasses.replace(job, model=copy.deepcopy(job.model)))

    def without_heldout(self: Any, job: TrainingJob) -> Any:
        import dataclasses

        return good.trainer(self, dataclasses.replace(job, heldout=None))

    def blind_to_heldout(self: Any, job: TrainingJob) -> Any:
        made = good.trainer(self, job)
        compute = made.compute_loss
        made.compute_loss = lambda model, *rest, **more: (
            compute(model, *rest, **more) * (1.0 if model.training else float("nan"))
        )
        return made

    def noise(value: Any) -> Any:
        import torch

        own = torch.Generator()
        own.seed()
        # Falls by more than the noise at every call, so that this rule alone is broken.
        calls.append(1)
        return value - len(calls) + 0.01 * torch.rand((), generator=own)

    def rising(value: Any) -> Any:
        calls.append(1)
        return value + len(calls)

    stages = (Stage("one", "pairs"), Stage("two", "pairs"))
    for overrides, words in (
        ({"consumes": "triples"}, "`consumes` is one of prompts, demonstrations, pairs, rated, or a row class."),
        ({"stages": lambda self, config: []}, "`stages` returns a tuple of one or more harness.Stage."),
        ({"stages": lambda self, config: stages[:1] * 2}, "Names of stages are distinct."),
        ({"stages": lambda self, config: (Stage("one", "rated"),)}, "pairs and demonstrations only: pass `rows`."),
        ({"trainer": lambda self, job: job}, "`trainer` returns a transformers.Trainer.\n  seen: TrainingJob"),
        (loss(lambda value: value * float("nan")), "The trainer logs a finite loss at each of 2 steps."),
        (loss(rising), "On one batch, repeated, the loss falls."),
        (
            {"trainer": trains_the_base},
            "Training leaves the base's weights alone.\n  seen: stage train changed base_model",
        ),
        ({"Config": Config}, "`Config` of an aligner is a subclass of harness.Recipe.\n  seen: <class 'pydantic"),
        ({"trainer": without_heldout}, "The trainer evaluates the held-out rows of the job"),
        ({"trainer": blind_to_heldout}, "Each held-out row has a finite loss.\n  seen: stage train: [nan, nan, nan]"),
        ({"trainer": trains_nothing}, "Training changes the adapter that the job's model carries."),
        (loss(noise), "On a CPU the same seed gives the same bytes."),
    ):
        aligner: Aligner = type("Broken", (good,), overrides)()
        with pytest.raises(AssertionError) as caught:
            check_aligner(aligner, steps=2)
        assert words in str(caught.value), words


LOSSES: list[tuple[str, Any, str]] = [
    ("constant", lambda p, r: 0 * p.chosen.sum().repeat(7), "`loss` returned shape [7] for pairs of shape [{n}]"),
    (
        "square",
        lambda p, r: p.chosen - p.rejected[:, None],
        "`loss` returned shape [{n}, {n}] for pairs of shape [{n}]",
    ),
    ("mean", lambda p, r: (p.rejected - p.chosen).mean(), "`loss` returned shape [] for pairs of shape [{n}]"),
    ("number", lambda p, r: 0.5, "`loss` returned float for pairs of shape [{n}]"),
    ("two", lambda p, r: (p.chosen, p.chosen), "`loss` returned shape [{n}], shape [{n}] for pairs of shape [{n}]"),
    ("detached", lambda p, r: (p.rejected - p.chosen).detach(), "`loss` returned a tensor without a gradient"),
    ("referring", lambda p, r: p.rejected - r.rejected, "`loss` uses the reference, and `needs_reference` is False"),
]
"""A method's name, its loss of policy and reference, and what is said of it for ``n`` pairs."""


def pairwise(name: str, loss: Any, **overrides: Any) -> PairwiseLoss:
    """A method without a reference."""
    own = {"name": name, "summary": "breaks", "needs_reference": False}
    method: PairwiseLoss = type(
        "Odd", (PairwiseLoss,), {**own, "loss": lambda self, p, r, c: loss(p, r), **overrides}
    )()
    return method


@pytest.mark.parametrize(("name", "loss", "seen"), LOSSES, ids=[name for name, _, _ in LOSSES])
def test_the_rules_of_losses(name: str, loss: Any, seen: str) -> None:
    """Found on made-up pairs, before a model is made."""
    with pytest.raises(AssertionError) as caught:
        check_aligner(pairwise(name, loss))
    text = str(caught.value)
    assert text.startswith("`loss` returns a loss for each pair, (B,), that depends on the policy; `rewards`")
    assert f"\n  seen: {seen.format(n=3)}" in text


def test_a_loss_that_forgets_its_shape_for_one_pair() -> None:
    with pytest.raises(AssertionError, match=r"`loss` returned shape \[\] for pairs of shape \[1\]"):
        check_aligner(pairwise("squeezed", lambda p, r: (p.rejected - p.chosen).squeeze()))


def test_rewards_are_two_tensors_of_a_number_per_pair() -> None:
    method = pairwise("one", lambda p, r: p.rejected - p.chosen, rewards=lambda self, p, r, c: p.chosen)
    with pytest.raises(AssertionError, match=r"`rewards` returned shape \[3\] for pairs of shape \[3\], shape \[3\]"):
        check_aligner(method)

"""The kits of mergers, adapters and aligners: a good plugin passes, and for each rule a broken one fails."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from harness import (
    Adapter,
    Aligner,
    Config,
    Factors,
    Merged,
    Merger,
    PairwiseLoss,
    ParameterGroup,
    Stage,
    TrainerCall,
    TrainingJob,
    TrainingRow,
)
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


def adapter_with_groups(good: Any) -> Any:
    """``groups(cut, rate)``: a good adapter whose trainable weights are cut into groups."""

    def groups(cut: Any, rate: float = 2.0) -> Adapter:
        def parameter_groups(self: Any, model: Any, config: Any) -> Any:
            found = cut([p for p in model.parameters() if p.requires_grad])
            return None if found is None else [ParameterGroup(one, rate) for one in found]

        made: Adapter = type("Grouped", (good,), {"parameter_groups": parameter_groups})()
        return made

    return groups


def strange() -> Any:
    import torch

    return torch.nn.Parameter(torch.ones(1))


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

    groups = adapter_with_groups(good)
    for made in (groups(lambda trained: [trained[:1], trained[1:]]), groups(lambda trained: None)):
        check_adapter(made, options={"rank": 2})
    rule = "`parameter_groups` has every trainable weight in exactly one harness.ParameterGroup.\n  seen: "
    for cut, words in (
        (lambda trained: [trained[1:]], "q_proj.lora_A.default.weight is in none of them"),
        (lambda trained: [trained, trained[:1]], "q_proj.lora_A.default.weight is in two of them"),
        (lambda trained: [[*trained, strange()]], "1 of their weights are not trainable weights of the model"),
        (lambda trained: [], "[]"),
    ):
        with pytest.raises(AssertionError) as caught:
            check_adapter(groups(cut), options={"rank": 2})
        assert str(caught.value).startswith(rule) and str(caught.value).endswith(words)
    with pytest.raises(AssertionError, match="a rate is 0, and rates are above 0"):
        check_adapter(groups(lambda trained: [trained], rate=0), options={"rank": 2})

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


class Own(TrainingRow):
    chosen: str
    rejected: str
    margin: float
    form = "pairs"
    columns = ("margin",)


class Wrong(Own):
    columns = ("weight",)


class Taken(Own):
    id: str = ""
    columns = ("id",)


def test_an_aligner_with_rows_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its trainer gets the columns that it names; a row without one is refused, in the driver's words."""
    good = load("aligner", tmp_path, monkeypatch)
    seen: list[Any] = []

    def trainer(self: Any, job: TrainingJob) -> TrainerCall:
        seen.append((job.rows["margin"], job.heldout["margin"], job.stage.consumes))
        call: TrainerCall = good.trainer(self, job)
        return call

    aligner = type("Owner", (good,), {"consumes": Own, "trainer": trainer})()
    rows = [{"prompt": f"Say {i}.", "chosen": "Yes.", "rejected": "No, never.", "margin": i / 4} for i in range(4)]
    check_aligner(aligner, rows=rows, steps=2)
    assert seen == [([0.0, 0.25, 0.5, 0.75], [0.0, 0.25, 0.5], "Own")] * 2
    with pytest.raises(AssertionError) as caught:
        check_aligner(aligner, rows=[{**rows[0], "margin": None}], steps=2)
    assert str(caught.value) == (
        "Rows follow Own and render.\n  seen: row kit/0 is none of 'Own': margin: Input should be a valid number"
    )


def test_the_rules_of_aligners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = load("aligner", tmp_path, monkeypatch)
    check_aligner(good())

    calls: list[int] = []

    def loss(change: Any) -> Any:
        """The good trainer with another loss."""

        def trainer(self: Any, job: TrainingJob) -> TrainerCall:
            call = good.trainer(self, job)

            class Changed(call.cls):  # type: ignore[misc, name-defined]
                def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
                    return change(super().compute_loss(*args, **kwargs))

            return TrainerCall(Changed, call.arguments)

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

    def blind_to_heldout(self: Any, job: TrainingJob) -> TrainerCall:
        call = good.trainer(self, job)

        class Blind(call.cls):  # type: ignore[misc, name-defined]
            def compute_loss(self, model: Any, *rest: Any, **more: Any) -> Any:
                return super().compute_loss(model, *rest, **more) * (1.0 if model.training else float("nan"))

        return TrainerCall(Blind, call.arguments)

    def called(**changed: Any) -> Any:
        """The good call with other arguments."""

        def trainer(self: Any, job: TrainingJob) -> TrainerCall:
            call = good.trainer(self, job)
            return TrainerCall(call.cls, {**call.arguments, **{name: one(job) for name, one in changed.items()}})

        return {"trainer": trainer}

    def own_arguments(job: TrainingJob) -> Any:
        from transformers import TrainingArguments

        return TrainingArguments(use_cpu=True, remove_unused_columns=False)

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

    stages = (Stage("one", "pairs"), Stage("one", "pairs"))
    for overrides, words in (
        (
            {"consumes": "triples"},
            "consumes 'triples', which are no rows to train on\n  Consume demonstrations",
        ),
        ({"consumes": "prompts"}, "kit-aligner consumes 'prompts', which are no rows to train on"),
        ({"consumes": "rated"}, "pairs and demonstrations only: pass `rows`."),
        ({"consumes": Own}, "pass `rows`, as a data set gives Own."),
        ({"consumes": Wrong}, "Wrong.columns of kit-aligner names 'weight', which is no field of the class"),
        ({"consumes": Taken}, "Taken.columns of kit-aligner names 'id', which is a column of the harness's own"),
        ({"stages": lambda self, config: []}, "`stages` of kit-aligner returned []"),
        (
            {"stages": lambda self, config: stages},
            "stages of kit-aligner are named 'one', 'one'\n  Give each a name of its own",
        ),
        ({"stages": lambda self, config: (Stage("one", "rated"),)}, "consumes rated, and kit-aligner pairs"),
        ({"trainer": lambda self, job: job}, "`trainer` returned TrainingJob, not a harness.TrainerCall"),
        (
            {"trainer": lambda self, job: TrainerCall(dict)},
            "'dict'>, which is no subclass of transformers.Trainer",
        ),
        (called(train_dataset=lambda job: job.rows.select([0])), "has 1 rows as `train_dataset`, and the job has 4"),
        (called(args=own_arguments), "takes rows in an order of its own: its arguments were not made by"),
        (loss(lambda value: value * float("nan")), "The trainer logs a finite loss at each of 2 steps."),
        (loss(rising), "On one batch, repeated, the loss falls."),
        (
            {"trainer": trains_the_base},
            "Training leaves the base's weights alone.\n  seen: stage train changed base_model",
        ),
        ({"Config": Config}, "`Config` of an aligner is a subclass of harness.Recipe.\n  seen: <class 'pydantic"),
        ({"trainer": without_heldout}, "its trainer has none as `eval_dataset`, and the job has 3"),
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

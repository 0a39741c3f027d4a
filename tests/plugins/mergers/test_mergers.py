"""The bundled mergers: numbers worked out by hand, properties over sizes and densities, and their contract."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from harness import Factors, Merged, Merger, load_plugins
from harness.core.errors import UserError
from harness.testing import check_merger
from harness_plugins.mergers import arithmetic as merger_arithmetic
from harness_plugins.mergers.deltas import DareLinear, DareTies, TaskArithmetic, Ties
from harness_plugins.mergers.linear import Linear
from harness_plugins.mergers.spherical import Nuslerp, Slerp, SlerpDelta

ALL = (Linear, Slerp, SlerpDelta, Nuslerp, TaskArithmetic, Ties, DareLinear, DareTies)


def merge(
    merger: Merger, tensors: Sequence[Any], weights: Sequence[float] | None = None, base: Any = None, **options: Any
) -> Merged:
    """One merge of tensors or lists; weights and options as a user gives them, model ``i`` drawing from seed ``i``."""
    import torch

    given_tensors = [torch.as_tensor(one, dtype=torch.float32) if isinstance(one, list) else one for one in tensors]
    chosen, config = merger.settle(weights, len(tensors), merger.Config(**options))
    return merger.merge(
        given_tensors,
        base=torch.as_tensor(base) if isinstance(base, list) else base,
        weights=chosen,
        config=config,
        generator=lambda index: torch.Generator().manual_seed(index),
    )


def values(found: Merged) -> list[float]:
    return [round(value, 7) for value in found.tensor.tolist()]


def test_all_are_registered() -> None:
    registry = load_plugins()
    for cls in ALL:
        assert type(registry.find(Merger, cls.name, "test")) is cls


@pytest.mark.parametrize(
    ("merger", "options"),
    [
        (Linear(), {}),
        (Linear(), {"normalize": False}),
        (Slerp(), {}),
        (SlerpDelta(), {"t": 0.3}),
        (Nuslerp(), {}),
        (Nuslerp(), {"flatten": False}),
        (Nuslerp(), {"flatten": False, "row_wise": True}),
        (TaskArithmetic(), {"scale": 0.7}),
        (TaskArithmetic(), {"normalize": True}),
        (Ties(), {}),
        (Ties(), {"normalize": False, "rescale": "l1", "density": (0.2, 0.9, 1.0)}),
        (DareLinear(), {}),
        (DareLinear(), {"density": 1.0, "scale": -1.0}),
        (DareLinear(), {"rescale": "l1"}),
        (DareTies(), {"rescale": "none", "density": 0.1}),
        (DareTies(), {"normalize": True}),
    ],
    ids=lambda value: value.name if isinstance(value, Merger) else None,
)
def test_contract(merger: Merger, options: dict[str, Any]) -> None:
    check_merger(merger, options=options)


# ------------------------------------------------------------------------------------------------ whole weights


def test_linear() -> None:
    # (3 * 1 + 1 * 5) / 4 = 2, (3 * -2 + 1 * 2) / 4 = -1; without the division 8, -4; 1/n each: 3, 0.
    assert values(merge(Linear(), [[1.0, -2.0], [5.0, 2.0]], [3, 1])) == [2.0, -1.0]
    assert values(merge(Linear(), [[1.0, -2.0], [5.0, 2.0]], [3, 1], normalize=False)) == [8.0, -4.0]
    assert values(merge(Linear(), [[1.0, -2.0], [5.0, 2.0]])) == [3.0, 0.0]
    # Extrapolation: 2 * 1 - 5 = -3, 2 * -2 - 2 = -6.
    assert values(merge(Linear(), [[1.0, -2.0], [5.0, 2.0]], [2, -1])) == [-3.0, -6.0]


@pytest.mark.parametrize("merger", [Slerp(), SlerpDelta()])
@pytest.mark.parametrize(
    ("x", "y", "t", "expected", "angle", "lerp"),
    [
        # Orthogonal: sin(45) / sin(90) of each, whatever their norms.
        ([1.0, 0.0], [0.0, 2.0], 0.5, [0.7071068, 1.4142136], math.pi / 2, 0),
        # sin(67.5) = .92387953, sin(22.5) = .38268343.
        ([1.0, 0.0], [0.0, 1.0], 0.25, [0.9238795, 0.3826834], math.pi / 2, 0),
        # 60 degrees: sin(30) / sin(60) = 1 / sqrt(3) of each; half way is 30 degrees.
        ([1.0, 0.0], [0.5, 3**0.5 / 2], 0.5, [0.8660254, 0.5], math.pi / 3, 0),
        # Opposite and parallel: linear, 3/4 and 1/4.
        ([1.0, 0.0], [-1.0, 0.0], 0.25, [0.5, 0.0], math.pi, 1),
        ([1.0, 1.0], [3.0, 3.0], 0.25, [1.5, 1.5], 0.0, 1),
        # The ends.
        ([1.0, 0.0], [0.0, 2.0], 0.0, [1.0, 0.0], math.pi / 2, 0),
        ([1.0, 0.0], [0.0, 2.0], 1.0, [0.0, 2.0], math.pi / 2, 0),
    ],
)
def test_slerp(
    merger: Merger, x: list[float], y: list[float], t: float, expected: list[float], angle: float, lerp: int
) -> None:
    found = merge(merger, [x, y], t=t)
    assert found.tensor.tolist() == pytest.approx(expected, abs=2e-7)
    assert found.stats == {"slerp_angle_rad": pytest.approx(angle, abs=1e-7), "lerp_fallback": lerp}


def test_slerp_is_linear_from_where_mergekit_is() -> None:
    """cos = 0.9995 at 0.03162 radians: just inside it bends, just outside it does not."""
    for angle, lerp in ((0.0317, 0.0), (0.0315, 1.0)):
        found = merge(Slerp(), [[1.0, 0.0], [math.cos(angle), math.sin(angle)]], t=0.5)
        assert found.stats["lerp_fallback"] == lerp
        assert found.stats["slerp_angle_rad"] == pytest.approx(angle, abs=1e-5)


def test_a_vector_without_direction() -> None:
    """mergekit takes it as orthogonal to all: sin(45) of the other. From the base, half of it is what makes sense."""
    assert values(merge(Slerp(), [[0.0, 0.0], [0.0, 2.0]], t=0.5)) == [0.0, 1.4142135]
    found = merge(SlerpDelta(), [[0.0, 0.0], [0.0, 2.0]], t=0.5)
    assert (values(found), found.stats["lerp_fallback"]) == ([0.0, 1.0], 1)
    assert values(merge(SlerpDelta(), [[0.0, 0.0], [0.0, 0.0]])) == [0.0, 0.0]


def test_weights_of_slerp_are_a_place_on_the_arc() -> None:
    x, y = [1.0, 0.0], [0.0, 1.0]
    assert values(merge(Slerp(), [x, y], [0.3, 0.1])) == [0.9238795, 0.3826834]  # t = 1/4
    assert values(merge(Slerp(), [x, y])) == [0.7071068, 0.7071068]  # t = 1/2
    assert Slerp().settle([0.3, 0.1], 2, Slerp.Config())[1].t == pytest.approx(0.25)
    assert Slerp().settle(None, 2, Slerp.Config(t=0.25))[0] == (0.75, 0.25)


def test_nuslerp() -> None:
    # t = 1/4, orthogonal; and with a base, of the differences from it.
    assert values(merge(Nuslerp(), [[1.0, 0.0], [0.0, 1.0]], [3, 1])) == [0.9238795, 0.3826834]
    found = merge(Nuslerp(), [[11.0, 10.0], [10.0, 11.0]], [3, 1], base=[10.0, 10.0])
    assert found.tensor.tolist() == pytest.approx([10.9238795, 10.3826834], abs=1e-6)
    # Rows apart: the first pair orthogonal (sin 45), the second parallel (the mean).
    x, y = [[1.0, 0.0], [2.0, 2.0]], [[0.0, 1.0], [4.0, 4.0]]
    found = merge(Nuslerp(), [x, y], flatten=False)
    assert found.tensor.flatten().tolist() == pytest.approx([0.7071068, 0.7071068, 3.0, 3.0], abs=1e-6)
    assert found.stats == {"slerp_angle_rad": pytest.approx(math.pi / 4, abs=1e-7), "lerp_fallback": 0.5}
    # `row_wise` means columns: the same of the transposed tensors.
    turned = merge(
        Nuslerp(), [[list(row) for row in zip(*one, strict=True)] for one in (x, y)], flatten=False, row_wise=True
    )
    assert turned.tensor.T.tolist() == found.tensor.tolist()


# --------------------------------------------------------------------------------------------------------- deltas

A = [4.0, -3.0, 2.0, -1.0, 0.5, 0.0]
B = [-1.0, -2.0, 3.0, 1.0, 0.25, 5.0]


def test_task_arithmetic() -> None:
    # 2 * (0.5 * A - 1 * B); normalised by 0.5 - 1 = -0.5.
    expected = [6.0, 1.0, -4.0, -3.0, 0.0, -10.0]
    assert values(merge(TaskArithmetic(), [A, B], [0.5, -1.0], scale=2.0)) == expected
    assert values(merge(TaskArithmetic(), [A, B], [0.5, -1.0], normalize=True)) == [value / -1 for value in expected]
    # A sum of weights of 0 is not divided by: A - B.
    assert values(merge(TaskArithmetic(), [A, B], [1.0, -1.0], normalize=True)) == [5.0, -1.0, -1.0, -2.0, 0.25, -5.0]


def test_ties_trims() -> None:
    # Kept of A: 4 -3 2; of B: 5 3 -2. No signs differ: means of what is there, by weights of 1/2.
    found = merge(Ties(), [A, B])
    assert values(found) == [4.0, -2.5, 2.5, 0.0, 0.0, 5.0]
    assert found.stats == {"kept_density": 0.5, "sign_conflict": 0.0}
    # A value for each model: of A only the 4, of B all.
    found = merge(Ties(), [A, B], density=(0.2, 1.0))
    assert values(found) == [4.0, -2.0, 3.0, 1.0, 0.25, 5.0]
    assert found.stats == {"kept_density": pytest.approx(7 / 12), "sign_conflict": pytest.approx(1 / 6)}
    # Half of four equal magnitudes: the first two. A tenth of four: one. None: none.
    assert values(merge(Ties(), [[1.0, -1.0, 1.0, 1.0]])) == [1.0, -1.0, 0.0, 0.0]
    assert values(merge(Ties(), [[1.0, -1.0, 1.0, 1.5]], density=0.1)) == [0.0, 0.0, 0.0, 1.5]
    assert values(merge(Ties(), [A], density=0)) == [0.0] * 6
    # 4 3 2 of a sum of 10.5: times 10.5 / 9.
    assert values(merge(Ties(), [A], rescale="l1")) == pytest.approx([14 / 3, -3.5, 7 / 3, 0, 0, 0], abs=1e-6)


def test_ties_elects_signs_on_weighted_deltas() -> None:
    # Entry 0: 2 - .5 is above 0, so A alone counts; entry 3: -.5 + .5 is 0, which counts as +, so B alone.
    found = merge(Ties(), [A, B], density=1)
    assert values(found) == [4.0, -2.5, 2.5, 1.0, 0.375, 5.0]
    assert found.stats == {"kept_density": 1.0, "sign_conflict": pytest.approx(2 / 6)}
    # Weighted 1 to 9, entry 0 is .4 - .9, so B alone counts; unweighted signs (peft's) would have it A.
    assert values(merge(Ties(), [A, B], [0.1, 0.9], density=1))[0] == -1.0
    summed = merge(Ties(), [A, B], [0.1, 0.9], density=1, normalize=False, scale=2.0)
    assert values(summed)[:2] == pytest.approx([-1.8, -4.2])


def test_dare_at_density_one() -> None:
    # Two equal deltas of weight 1: their sum, so base + 2 * delta; with weights 1/n the delta.
    found = merge(DareTies(), [A, A], [1.0, 1.0], density=1)
    assert values(found) == [2 * value for value in A]
    assert values(merge(DareTies(), [A, A], density=1)) == A
    assert found.stats == {"kept_density": 1.0, "sign_conflict": 0.0}
    # Of A and B the agreeing sum, entry by entry.
    assert values(merge(DareTies(), [A, B], [1.0, 1.0], density=1)) == [4.0, -5.0, 5.0, 1.0, 0.75, 5.0]
    assert values(merge(DareLinear(), [A, B], [1.0, 2.0], density=1)) == [2.0, -7.0, 8.0, 1.0, 1.0, 10.0]
    assert values(merge(DareLinear(), [A, B], density=0)) == [0.0] * 6


@settings(derandomize=True, max_examples=60, deadline=None)
@given(size=st.integers(1, 30_000), density=st.floats(0.02, 0.98), seed=st.integers(0, 2**40))
def test_dare_keeps_its_density_and_the_mean(size: int, density: float, seed: int) -> None:
    import torch

    delta = torch.randn(size, generator=torch.Generator().manual_seed(seed)) + 0.5
    runs = {how: merge(DareLinear(), [delta], density=density, rescale=how) for how in ("density", "l1", "none")}
    kept = runs["none"].tensor != 0
    assert torch.equal(runs["none"].tensor, delta * kept)
    # Binomial: 6 standard deviations, and one for the normal approximation.
    count = int(kept.sum())
    assert abs(count - density * size) <= 6 * math.sqrt(size * density * (1 - density)) + 1
    assert runs["density"].stats["kept_density"] == count / size
    # 1 / density on what is kept: the sum's expectation is the delta's, its variance sum(d^2) (1 - p) / p.
    by_density = runs["density"].tensor.double()
    assert torch.allclose(by_density, delta.double() * kept / density, rtol=1e-6, atol=0)
    spread = math.sqrt(float((delta.double() ** 2).sum()) * (1 - density) / density)
    largest = float(delta.abs().max()) / density
    assert abs(float(by_density.sum() - delta.double().sum())) <= 6 * spread + largest
    if count:
        assert float(runs["l1"].tensor.abs().sum(dtype=torch.float64)) == pytest.approx(
            float(delta.abs().sum(dtype=torch.float64)), rel=1e-5
        )


def test_masks_belong_to_a_model_and_its_place() -> None:
    import torch

    delta, other = torch.ones(1000), torch.full((1000,), 2.0)
    alone = merge(DareLinear(), [delta], [1.0]).tensor
    # Another model beside it changes nothing, and draws another mask.
    assert torch.equal(merge(DareLinear(), [delta, other], [1.0, 0.0]).tensor, alone)
    beside = merge(DareLinear(), [other, delta], [0.0, 1.0]).tensor
    assert 400 < int((alone != beside).sum()) < 600  # Each entry differs with probability 1/2, 6 deviations are 95.

    # Nothing is drawn where nothing is dropped.
    def refuse(index: int) -> Any:
        raise AssertionError

    config = DareTies.Config(density=1)
    DareTies().merge([delta, other], base=None, weights=(1, 1), config=config, generator=refuse)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    entries=st.lists(st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0, 3.0]), min_size=1, max_size=60),
    density=st.floats(0, 1),
)
def test_trimming_is_a_stable_sort(entries: list[float], density: float) -> None:
    """Against Python's own sort, with many equal magnitudes."""
    import torch

    mask = merger_arithmetic.largest_mask(torch.tensor(entries), density)
    keep = 0 if density == 0 else max(1, math.floor(density * len(entries)))
    order = sorted(range(len(entries)), key=lambda index: -abs(entries[index]))
    expected = {*order[:keep]}
    assert mask is None or {i for i, kept in enumerate(mask.tolist()) if kept} == expected
    assert (mask is None) == (density == 1)


# ------------------------------------------------------------------------------------------------- low-rank deltas


def test_an_angle_follows_from_factors() -> None:
    """Deltas [[1, 0]] and [[0, 2]]: orthogonal, so 1 / sqrt(2) of each at t = 1/2, and the rank is 2."""
    import torch

    first = Factors(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5]]), 2.0)
    second = Factors(torch.tensor([[0.0, 4.0]]), torch.tensor([[1.0]]), 0.5)
    found = SlerpDelta().merge_factors([first, second], weights=(0.5, 0.5), config=SlerpDelta.Config())
    assert found is not None and found.A.shape == (2, 2)
    assert (found.scale * found.B @ found.A).tolist()[0] == pytest.approx([0.7071068, 1.4142136])


def test_which_methods_stay_low_rank() -> None:
    import torch

    one = Factors(torch.ones(1, 3), torch.ones(2, 1), 1.0)
    none = [
        (Linear(), {"normalize": False}, (0.5, 0.6)),
        (Slerp(), {}, (0.5, 0.5)),
        (Nuslerp(), {}, (0.5, 0.5)),
        (Ties(), {"density": 1}, (0.5, 0.5)),
        (DareTies(), {"density": 1}, (0.5, 0.5)),
        (DareLinear(), {"density": (1, 0.9)}, (0.5, 0.5)),
    ]
    some = [
        (Linear(), {"normalize": False}, (0.5, 0.5)),
        (Linear(), {}, (2.0, 1.0)),
        (SlerpDelta(), {}, (0.5, 0.5)),
        (TaskArithmetic(), {}, (1.0, 1.0)),
        (DareLinear(), {"density": (1, 1)}, (1.0, 1.0)),
    ]
    for low, cases in ((False, none), (True, some)):
        for merger, options, weights in cases:
            found = merger.merge_factors([one, one], weights=weights, config=merger.Config(**options))
            assert (found is not None) == low, merger.name


# ------------------------------------------------------------------------------------------------------ reproducible


def test_bytes_do_not_depend_on_threads_or_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    draw = torch.Generator().manual_seed(3)
    tensors = [torch.randn(700, 600, generator=draw) for _ in range(2)]
    before = torch.get_num_threads()
    cases: list[tuple[Merger, dict[str, Any]]] = [(cls(), {}) for cls in ALL]
    cases += [(Nuslerp(), {"flatten": False}), (Nuslerp(), {"flatten": False, "row_wise": True})]
    cases += [(DareTies(), {"rescale": "l1"})]
    try:
        for merger, options in cases:
            found = []
            for threads in (1, 3):
                torch.set_num_threads(threads)
                found.append(merge(merger, tensors, [0.4, 0.6], base=torch.ones(700, 600), **options).tensor)
            assert torch.equal(*found), merger.name
    finally:
        torch.set_num_threads(before)
    # Blocks cut sums in other places, which are exact to float64, and masks nowhere.
    whole = merge(DareTies(), tensors).tensor
    monkeypatch.setitem(merger_arithmetic.BLOCK, "cpu", 4099)
    assert torch.equal(merge(DareTies(), tensors).tensor, whole)


def test_inner_products_are_exact_to_float64() -> None:
    import torch

    draw = torch.Generator().manual_seed(4)
    x, y = (torch.randn(50_001, generator=draw) * 1e15 for _ in range(2))
    pairs = ((x, x), (x, y), (y, y))
    exact = [math.fsum(a * b for a, b in zip(u.tolist(), v.tolist(), strict=True)) for u, v in pairs]
    assert merger_arithmetic.inner_products(x, y) == pytest.approx(exact, rel=1e-12)
    assert merger_arithmetic.absolute_sum(x) == pytest.approx(math.fsum(map(abs, x.tolist())), rel=1e-14)


def test_strides_and_other_types() -> None:
    """A transposed tensor is merged as the same tensor laid out; bfloat16 is worked on in float32 and rounded once."""
    import torch

    draw = torch.Generator().manual_seed(5)
    x, y = (torch.randn(6, 4, generator=draw) for _ in range(2))
    for cls in ALL:
        straight = merge(cls(), [x, y], base=x).tensor
        assert torch.equal(merge(cls(), [x.T.contiguous().T, y.T.contiguous().T], base=x).tensor, straight), cls.name
    low = [x.bfloat16(), y.bfloat16()]
    assert torch.equal(merge(Linear(), low).tensor, merge(Linear(), [one.float() for one in low]).tensor.bfloat16())


def test_nothing_at_all() -> None:
    import torch

    for cls in ALL:
        assert merge(cls(), [torch.zeros(0, 4), torch.zeros(0, 4)], base=torch.zeros(0, 4)).tensor.shape == (0, 4)
        assert merge(cls(), [torch.ones(()), torch.ones(())], base=torch.ones(())).tensor.shape == ()


def test_on_cuda_as_on_the_cpu() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    draw = torch.Generator().manual_seed(6)
    tensors = [torch.randn(300, 500, generator=draw) for _ in range(2)]
    cases: list[tuple[Merger, dict[str, Any]]] = [(cls(), {}) for cls in ALL]
    for merger, options in [*cases, (Nuslerp(), {"flatten": False}), (DareTies(), {"rescale": "l1"})]:
        base = torch.ones(300, 500)
        ours = merge(merger, tensors, base=base, **options)
        theirs = merge(merger, [one.cuda() for one in tensors], base=base.cuda(), **options)
        assert theirs.tensor.device.type == "cuda"
        far = float((theirs.tensor.cpu() - ours.tensor).abs().max())
        assert far <= 1e-6 * float(ours.tensor.abs().max()), merger.name
        assert theirs.stats == pytest.approx(ours.stats, rel=1e-9)


# ---------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("merger", "weights", "options", "expected"),
    [
        (Linear(), [1, -1], {}, "weights: the weights sum to 0\n  Give others, or `normalize: false`."),
        (
            Slerp(),
            [0.5, 0.5],
            {"t": 0.5},
            "t: both weights and t are given\n  Weights w1, w2 mean t = w2 / (w1 + w2): give one.",
        ),
        (
            Slerp(),
            [0.0, 0.0],
            {},
            "weights: the weights sum to 0\n  Give weights w1, w2 with t = w2 / (w1 + w2), or t.",
        ),
        (
            SlerpDelta(),
            [1.5, -0.5],
            {},
            "weights: slerp_delta takes no weight below 0, found 1.5, -0.5\n  Give weights from 0 on.",
        ),
    ],
)
def test_weights_that_make_no_sense(
    merger: Merger, weights: list[float], options: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError) as caught:
        merger.settle(weights, len(weights), merger.Config(**options))
    assert str(caught.value) == expected

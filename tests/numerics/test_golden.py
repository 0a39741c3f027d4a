"""Golden numbers: what bundled aligners, mergers and scorers make of a fixed little input, held to what was recorded.

A bundled plugin's code enters step ids by its declared ``numerics`` alone, so that a refactoring orphans nobody's
results. That is only true if whoever moves a number raises it; these tests notice who forgets. Other than elsewhere the
expected values are by their nature recorded, not derived: that they are right is for the other tests of numbers to say.
``python -m tests.numerics.test_golden`` records them anew, in golden.json beside this file.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from harness import Aligner, Merger, Plugin, ScoreJob, Scorer, ScorerContext
from harness.contracts.registry import load_plugins
from harness.testing import example_answers, tiny_model
from tests.alignment.processes import TINY_STEPS, write_preferences

GOLDEN = Path(__file__).parent / "golden.json"
TOLERANCE = 1e-3
"""Relative: an fp32 sum on another processor differs by far less, another formula by far more."""
SCORERS = {"exact_match": {}, "includes": {}, "regex": {"pattern": r"(\d+|[A-Z][a-z]+)"}, "refusal": {}}
"""Scorers that need nothing but the answers, with their options."""

Values = dict[str, float]


def trained(aligner: Aligner) -> Values:
    """Losses of six steps on a tiny random model with dropout, and held-out figures."""
    from harness import align

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HARNESS_CACHE", str(Path(folder) / "cache"))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        base = tiny_model(Path(folder) / "tiny", seed=3)
        data = write_preferences(Path(folder) / "pairs.jsonl")
        options = {**TINY_STEPS, "adapter": {"rank": 4, "alpha": 8, "dropout": 0.1, "targets": ["q_proj", "v_proj"]}}
        made = align(aligner.name, str(base), f"jsonl:{data}", out=Path(folder) / "out", seed=5, options=options)
    losses = {f"loss of step {line['step']}": line["loss"] for line in made.history if "loss" in line}
    return {**losses, **{name: value for name, value in made.heldout.items() if math.isfinite(value)}}


def merged(merger: Merger) -> Values:
    """Moments of what is made of two tensors of sines, of their projection on a third, and what the method tells."""
    import torch

    def wave(phase: float) -> torch.Tensor:
        return torch.sin(torch.arange(96, dtype=torch.float32) * (1 + phase) + phase).reshape(8, 12)

    weights, config = merger.settle([0.4, 0.6] if merger.models[1] != 2 else None, 2, merger.Config())
    made = merger.merge(
        [wave(0.3), wave(0.7)],
        base=wave(0.1),
        weights=weights,
        config=config,
        generator=lambda model: torch.Generator().manual_seed(11 + model),
    )
    found = made.tensor.double()
    moments = {"mean": found.mean(), "norm": found.norm(), "largest": found.abs().max()}
    moments["projection"] = (found * wave(0.5).double()).sum()
    return {**{name: float(value) for name, value in moments.items()}, **dict(made.stats)}


def scored(scorer: Scorer) -> Values:
    """What made answers are worth: right, wrong, refusing, cut off, empty."""
    samples, answers = example_answers()
    config = scorer.Config.model_validate(SCORERS[scorer.name])
    session = scorer.open(config, ScorerContext())
    try:
        found = session.score(samples, answers, ScoreJob("golden"))
    finally:
        session.close()
    return {
        f"{name} of {sample.id}": value
        for sample, score in zip(samples, found, strict=True)
        for name, value in score.values.items()
        if value is not None
    }


def bundled() -> Iterator[tuple[str, Plugin]]:
    """Every plugin that is held to golden numbers, by kind and name."""
    registry = load_plugins()
    for kind in (Aligner, Merger, Scorer):
        for name, plugin in registry.of_kind(kind):  # type: ignore[type-abstract]
            ours = type(plugin).__module__.partition(".")[0] == "harness_plugins"
            if ours and (kind is not Scorer or name in SCORERS):
                yield f"{plugin.kind} {name}", plugin


PLUGINS = dict(bundled())


def measured(plugin: Plugin) -> Values:
    if isinstance(plugin, Aligner):
        return trained(plugin)
    if isinstance(plugin, Merger):
        return merged(plugin)
    assert isinstance(plugin, Scorer)
    return scored(plugin)


def compare(title: str, numerics: int, found: Mapping[str, float], golden: Mapping[str, Any]) -> None:
    """Hold numbers to the recorded ones.

    Raises:
        AssertionError: saying what has to be done.
    """
    name = title.partition(" ")[2]
    anew = "python -m tests.numerics.test_golden"
    assert title in golden, f"{title} has no golden numbers yet: record them ({anew})."
    kept = golden[title]
    assert numerics == kept["numerics"], (
        f"{title} declares numerics {numerics}, and its golden numbers are of {kept['numerics']}: record them ({anew})."
    )
    moved = [
        f"{key}: {kept['values'].get(key)} was recorded, {found.get(key)} is found"
        for key in sorted(kept["values"].keys() | found.keys())
        if not (key in found and key in kept["values"])
        or not math.isclose(found[key], kept["values"][key], rel_tol=TOLERANCE, abs_tol=1e-6)
    ]
    if moved:
        raise AssertionError(
            f"a number of {title} moved ({'; '.join(moved[:4])}).\n"
            f"  Raise `numerics` of {name}, say so in CHANGELOG.md and record anew ({anew}), or find out why."
        )


@pytest.mark.parametrize("title", PLUGINS)
def test_no_number_moved(title: str) -> None:
    plugin = PLUGINS[title]
    compare(title, plugin.numerics, measured(plugin), json.loads(GOLDEN.read_text()))


def test_nothing_is_held_that_is_not_there() -> None:
    assert json.loads(GOLDEN.read_text()).keys() == PLUGINS.keys()


@pytest.mark.parametrize(
    ("numerics", "found", "said"),
    [
        (1, {"loss": 1.0009}, None),
        (
            1,
            {"loss": 1.002},
            "a number of aligner dpo moved (loss: 1.0 was recorded, 1.002 is found).\n"
            "  Raise `numerics` of dpo, say so in CHANGELOG.md and record anew (python -m tests.numerics.test_golden), "
            "or find out why.",
        ),
        (1, {}, "a number of aligner dpo moved (loss: 1.0 was recorded, None is found).\n"),
        (
            2,
            {"loss": 1.0},
            "aligner dpo declares numerics 2, and its golden numbers are of 1: record them "
            "(python -m tests.numerics.test_golden).",
        ),
    ],
)
def test_what_is_said_of_a_number_that_moved(numerics: int, found: Values, said: str | None) -> None:
    golden = {"aligner dpo": {"numerics": 1, "values": {"loss": 1.0}}}
    if said is None:
        compare("aligner dpo", numerics, found, golden)
        return
    with pytest.raises(AssertionError) as caught:
        compare("aligner dpo", numerics, found, golden)
    assert str(caught.value).startswith(said)


def record() -> None:
    """Write the golden numbers of all plugins anew, to six digits."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    entries = {
        title: {
            "numerics": plugin.numerics,
            "values": {key: float(f"{value:.6g}") for key, value in measured(plugin).items()},
        }
        for title, plugin in PLUGINS.items()
    }
    GOLDEN.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    record()

"""What a merge records: where it comes from, what was done, and how the models differ. Also its model card."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.merging.compute import Maker
from harness.merging.differences import gathered
from harness.merging.inputs import lineage_entry
from harness.merging.plan import MergePlan
from harness.merging.tensor_plan import TensorRecipe
from harness.merging.threads import Clock
from harness.models.card import head, opening
from harness.steps.provenance import provenance_record


@dataclass
class Spent:
    """What carrying out a merge took, and what only doing it could tell."""

    workers: int
    clock: Clock
    seconds: dict[str, float]
    """Part of the work -> wall time (seconds)."""
    low_rank: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Tensor -> how it was brought to low rank, and what that lost (squared norms)."""


def record_of(plan: MergePlan, maker: Maker, files: Mapping[str, int], spent: Spent) -> dict[str, Any]:
    """``merge.json``: everything that a report needs, and no path."""
    opened, recipe = plan.opened, plan.recipe
    looked = [(one.name, maker.sums[one.name]) for one in recipe.tensors if one.name in maker.sums]
    found: dict[str, Any] = {
        "id": plan.id,
        "kind": "merge",
        "method": plan.spec.method,
        "identity": plan.step.identity,
        "form": plan.spec.form,
        "base": lineage_entry(opened.base) if opened.base is not None else None,
        "inputs": [
            {**lineage_entry(model), "weight": _one(_weights(recipe.tensors, n))}
            for n, model in enumerate(opened.inputs)
        ],
        "options": _common_options(recipe.tensors),
        "merge_config": plan.spec.config,
        "seed": plan.spec.seed,
        "dtype": plan.spec.dtype,
        "device": plan.device,
        "workers": spent.workers,
        "counts": {
            "tensors": len(recipe.tensors),
            "merged": len(looked),
            "copied": len(maker.copied),
            "inputs": len(opened.inputs),
        },
        "bytes": {"read": spent.clock.read, "written": sum(files.values())},
        "files": dict(files),
        "seconds": {name: round(value, 3) for name, value in spent.seconds.items()},
        "thread_seconds": {name: round(value, 3) for name, value in sorted(spent.clock.seconds.items())},
        "notes": [*opened.notes, *recipe.notes],
        "diagnostics": gathered(len(opened.inputs), looked),
        "provenance": provenance_record({}),
    }
    if spent.low_rank:
        found["low_rank"] = _low_rank(spent.low_rank)
        found["counts"]["copied"] = 0
    return found


def _weights(recipes: Sequence[TensorRecipe], model: int) -> list[float]:
    """One model's weights in all tensors that it has a part in."""
    return [
        weight
        for recipe in recipes
        for source, weight in zip(recipe.sources, recipe.weights, strict=True)
        if source.model == model
    ]


def _one(values: Sequence[float]) -> float | None:
    """The value that all tensors share."""
    return values[0] if values and all(value == values[0] for value in values) else None


def _common_options(recipes: Sequence[TensorRecipe]) -> dict[str, Any]:
    """The merger's options with every default filled in; a list of the values where they differ by tensor."""
    merged: dict[str, list[Any]] = {}
    for one in recipes:
        if one.sources:
            for key, value in one.options.model_dump(mode="json").items():
                values = merged.setdefault(key, [])
                if value not in values:
                    values.append(value)
    return {key: values[0] if len(values) == 1 else {"by_tensor": values} for key, values in merged.items()}


def _low_rank(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What truncation lost: relative Frobenius norms, per tensor and in total."""
    lost, whole = (math.fsum(one[key] for one in found.values()) for key in ("lost", "whole"))
    tensors = {
        name: {"how": one["how"], "relative_residual": math.sqrt(one["lost"] / one["whole"]) if one["whole"] else 0.0}
        for name, one in sorted(found.items())
    }
    return {
        "how": sorted({one["how"] for one in found.values()}),
        "relative_residual": math.sqrt(lost / whole) if whole else 0.0,
        "tensors": tensors,
    }


def lineage_of(plan: MergePlan) -> dict[str, Any]:
    """What lineage.json says of a merge: the base, and what was merged, in order."""
    info = plan.opened.info
    return {
        "base": {"name": info.name, "revision": info.revision, "weights": info.weights_digest},
        "adapters": [],
        "inputs": [lineage_entry(model) for model in plan.opened.inputs],
        "step": plan.id,
        "method": plan.spec.method,
    }


def merge_card(found: Mapping[str, Any]) -> str:
    """README.md of a merged model or adapter, from its record."""
    adapter = found["form"] == "adapter"
    base = found["base"]
    lines = [
        *head("peft" if adapter else "transformers", ("merge",), base),
        f"# {found['method']} of {', '.join(one['name'] for one in found['inputs'])}",
        "",
        f"Base `{base['name']}` ({base['digest'][:12]})." if base is not None else "Without a base.",
        "",
        *opening(adapter, base.get("revision") if base is not None else None),
        "| input | kind | digest | weight |",
        "| --- | --- | --- | --- |",
        *(
            f"| {one['name']} | {one['kind']} | {one['digest'][:12]} | "
            f"{'by tensor' if one['weight'] is None else format(one['weight'], 'g')} |"
            for one in found["inputs"]
        ),
        "",
        "| setting | value |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in sorted(found["options"].items())),
        f"| seed | {found['seed']} |",
        "",
        *(f"* note: {note}" for note in found["notes"]),
        "",
        "Not measured here: helpfulness and harmlessness. Run `harness eval --model "
        + ("BASE --adapter THIS`." if adapter else "THIS`."),
        "",
    ]
    return "\n".join(lines)


def totals(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The rows of the short table at the end of a merge."""
    total, counts = found["diagnostics"]["total"], found["counts"]
    rows = [("tensors", f"{counts['tensors']:,}, of which {counts['merged']:,} merged")]
    for one, norm in zip(found["inputs"], total["delta_norm"], strict=True):
        rows.append((f"change by {one['name']}", _share(norm)))
    rows.append(("change by the merge", _share(total["result_delta_norm"])))
    rows += [(f"cosine {pair}", "-" if value is None else f"{value:.4f}") for pair, value in total["cosine"].items()]
    rows.append(("sign conflicts", _share(total["sign_conflict"])))
    method = found["method"]
    rows += [
        (f"{method}: {name.replace('_', ' ')}", f"{value:.4g}")
        for name, value in total["merger"].items()
        if value is not None
    ]
    if "low_rank" in found:
        low = found["low_rank"]
        rows.append(("low rank", f"{', '.join(low['how'])}; lost {100 * low['relative_residual']:.3g} % of the change"))
    rows.append(
        ("bytes", f"{found['bytes']['read'] / 1e6:,.1f} MB read, {found['bytes']['written'] / 1e6:,.1f} written")
    )
    rows.append(("seconds", ", ".join(f"{name} {value:.1f}" for name, value in found["seconds"].items())))
    return rows


def fallback_note(found: Mapping[str, Any]) -> str | None:
    """The note that slerp fell back to lerp, and where; None: it never did."""
    rows = [row["merger"] for row in found["diagnostics"]["tensors"] if "lerp_fallback" in row["merger"]]
    fell = sum(row["lerp_fallback"] > 0 for row in rows)
    if not fell:
        return None
    return (
        f"slerp fell back to lerp for {fell} of {len(rows)} tensors ({100 * fell / len(rows):.0f} %): their directions "
        "are too nearly the same (or opposite) for an arc"
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.3g} %"

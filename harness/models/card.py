"""The model card of an adapter, from its record."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


def head(library: str, tags: Sequence[str], base: Mapping[str, Any] | None) -> list[str]:
    """The metadata that every card begins with.

    Args:
        library: that opens the folder.
        tags: beside those that all have.
        base: name and revision; without a revision it was a folder, and is no model of the hub.
    """
    told = base is not None and base.get("revision") is not None
    return [
        "---",
        *([f"base_model: {json.dumps(base['name'])}"] if base is not None and told else []),
        f"library_name: {library}",
        f"tags: [{', '.join(('harness', 'preference-alignment', *tags))}]",
        "---",
        "",
    ]


def opening(adapter: bool, revision: str | None) -> list[str]:
    """How an adapter is opened with its base; of a whole model there is nothing to say."""
    if not adapter:
        return []
    if revision is not None:
        return ["`AutoPeftModelForCausalLM.from_pretrained(THIS)` opens it with its base.", ""]
    return [
        "Its base is a local folder, which AutoPeft looks for from the working folder. From anywhere: "
        "`PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), THIS)`.",
        "",
    ]


def model_card(
    step: Mapping[str, Any],
    lineage: Mapping[str, Any],
    heldout: Mapping[str, float],
    history: Sequence[Mapping[str, Any]],
) -> str:
    """README.md of an adapter: what it is, how it was made, what was measured, what was not.

    Args:
        step: ``step.json`` of the alignment.
        lineage: ``lineage.json``: base, and adapters that were continued from.
        heldout: held-out figures at the end.
        history: lines of the training log.
    """
    last: Mapping[str, Any] = next((line for line in reversed(history) if "loss" in line), {})
    before = "".join(f", then adapter `{one['name']}` ({one['digest'][:12]})" for one in lineage["adapters"])
    identity = step["identity"]
    recipe, adapter = identity["recipe"], identity["adapter"]
    lines = [
        *head("peft" if adapter["name"] != "none" else "transformers", (), lineage["base"]),
        f"# {step['arm']}",
        "",
        f"Method `{identity['method']}`, adapter `{adapter['name']}`, seed {identity['seed']}, "
        f"chat template `{step['template']}` (SHA-256 {identity['template'][:12]}).",
        "",
        f"Base `{lineage['base']['name']}` (weights {lineage['base']['weights'][:12]}){before}.",
        "",
        *opening(adapter["name"] != "none", lineage["base"]["revision"]),
        "## Data",
        "",
        *(
            f"* {label}: " + ", ".join(f"{n} {c:,}" for n, c in counts.items())
            for label, counts in step["counts"].items()
        ),
        *(f"* dropped {count:,}: {reason}" for reason, count in step["dropped"].items()),
        "",
        "## Recipe",
        "",
        "| setting | value |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in sorted(recipe.items())),
        *(f"| adapter.{name} | {value} |" for name, value in sorted(adapter.items())),
        "",
        "## Held-out rows",
        "",
        *([f"* {name}: {value:.6g}" for name, value in sorted(heldout.items())] or ["None were evaluated."]),
        "",
        f"Last training loss: {last['loss']:.6g} at step {last['step']}." if "loss" in last else "",
        "",
        "Not measured here: helpfulness and harmlessness. Run `harness eval --model BASE --adapter THIS`.",
        "",
    ]
    return "\n".join(lines)

"""What `harness study plan` and `harness study status` print of costs and states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.cli.tables import print_table
from harness.core.text import first_line, human_bytes, human_seconds, visible
from harness.study.card import UTILISATION
from harness.study.costs import StudyCosts
from harness.study.status import StepState, is_alive, summary


def print_costs(costs: StudyCosts) -> None:
    """Print what a study takes, and what each figure rests on."""
    rows = [_cost_row(line) for line in costs.to_json()["lines"]]
    columns = ["kind", "base", "steps", "done", "shared", "GPU-hours", "hours", "GPU memory", "judge", "from"]
    print_table("Costs of what is to do", columns, rows)
    told = costs.to_json()
    hours = f"{told['gpu_hours_known']:.1f} GPU-hours" + ("" if told["gpu_hours"] is not None else " and more")
    if costs.card is None and told["gpu_hours"] is None:
        hours += " (name a card for the rest: --card A100-40GB)"
    print(
        f"in all {hours}; disk: {human_bytes(costs.kept_bytes)}, and {human_bytes(costs.merged_peak_bytes)} of merged"
    )
    if costs.card is not None and any(line.sources["size"] for line in costs.lines):
        shares = ", ".join(f"{what} {share:g}" for what, share in UTILISATION.items())
        peak = f" of {costs.card.tflops:g} TFLOP/s" if costs.card.tflops else ""
        print(f"by size: {costs.card.name}, model-FLOP utilisation{peak}: {shares}")
    for assumed in dict.fromkeys(text for line in costs.lines for text in line.assumed):
        print(visible(f"assumed: {assumed}"))
    for warning in costs.warnings:
        print(visible(f"warning: {warning}"))


def _cost_row(line: Mapping[str, Any]) -> dict[str, Any]:
    sources, usd = line["from"], line["judge_usd"]
    least = "≥ " if sources.get("nothing") else ""

    def hours(value: float | None) -> str:
        return "not known" if value is None else f"{least}{value:.3g}"

    devices = f" ({', '.join(line['devices'])})" if line["devices"] else ""
    told = ", ".join(f"{count} {source}" for source, count in sources.items())
    return {
        **{name: line[name] for name in ("kind", "base", "steps", "done", "shared")},
        "GPU-hours": hours(line["gpu_hours"]),
        "hours": hours(line["hours"]),
        "GPU memory": human_bytes(line["device_bytes"]) if line["device_bytes"] else "",
        "judge": ", ".join(part for part in (_calls(line["judge_calls"]), _usd(usd)) if part),
        "from": told + devices,
    }


def _calls(calls: int | None) -> str:
    """Questions to judges; empty where there are none."""
    return "calls not known" if calls is None else f"{calls:,} calls" if calls else ""


def _usd(usd: float | None) -> str:
    return "price not known" if usd is None else f"{usd:.2f} USD" if usd else ""


def print_status(title: str, states: list[StepState]) -> None:
    """Print the state of a study: a row for each kind, one for each step under way, and what failed."""
    rows = [
        {
            **row,
            "took": human_seconds(row["seconds"]),
            "GPU-hours": f"{row['gpu_seconds'] / 3600:.3g}" if row["gpu_seconds"] else "",
            "memory": human_bytes(row["rss_bytes"]) if row["rss_bytes"] else "",
            "GPU memory": human_bytes(row["device_bytes"]) if row["device_bytes"] else "",
            "device": ", ".join(row["devices"]),
        }
        for row in summary(states)
    ]
    columns = ["kind", "steps", "done", "failed", "begun", "ready", "waiting", "took"]
    print_table(title, [*columns, "GPU-hours", "memory", "GPU memory", "device"], rows)
    begun = [_begun(one) for one in states if one.state == "begun"]
    if begun:
        columns = ["step", "state", "progress", "so far", "left", "memory", "GPU memory", "device", "last heard of"]
        print_table("Under way", columns, begun)
    for one in states:
        if one.state == "failed":
            print(visible(f"failed: {one.kind} {one.arm}: {first_line(one.error or '')}"))


def _begun(one: StepState) -> dict[str, Any]:
    costs, progress = one.costs, one.progress
    left = costs.seconds * (1 - progress) / progress if costs is not None and progress else None
    return {
        "step": f"{one.kind} {one.arm}",
        "state": "running" if is_alive(one) else "not heard of: killed, or it hangs",
        "progress": f"{progress:.0%}" if progress is not None else "",
        "so far": human_seconds(one.seconds) if costs is not None else "",
        "left": human_seconds(left) if left is not None and is_alive(one) else "",
        "memory": human_bytes(costs.rss_bytes) if costs is not None and costs.rss_bytes else "",
        "GPU memory": human_bytes(costs.device_bytes) if costs is not None and costs.device_bytes else "",
        "device": costs.device or "CPU" if costs is not None else "",
        "last heard of": f"{one.silent:.0f} s ago" if one.silent is not None else "",
    }

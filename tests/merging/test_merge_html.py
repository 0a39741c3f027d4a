"""The page of a merge: heat maps from the record alone, no script, nothing that a name can break out of."""

from __future__ import annotations

import re
from typing import Any

import pytest

from harness.merging.page import Figure, heat_map, render


def figures(**changes: Any) -> dict[str, Any]:
    """One row's figures for two inputs."""
    return {
        "entries": 4,
        "delta_norm": [0.02, 0.04],
        "cosine": {"1-2": -0.5},
        "sign_conflict": 0.25,
        "result_delta_norm": 0.03,
        "norm_ratio": 1.0,
        "merger": {"kept_density": 0.5},
        **changes,
    }


def record(**changes: Any) -> dict[str, Any]:
    """A small merge.json: one layer with two modules, and an embedding."""
    rows = [
        {"tensor": "model.layers.0.q.weight", "layer": 0, "module": "attn.q_proj", **figures()},
        {"tensor": "model.layers.0.v.weight", "layer": 0, "module": "attn.v_proj", **figures(delta_norm=[0.0, 0.01])},
        {"tensor": "model.embed.weight", "layer": None, "module": "embed", **figures(cosine={"1-2": None})},
    ]
    return {
        "id": "0123456789ab",
        "method": "dare_ties",
        "form": "model",
        "base": {"name": "base", "digest": "b" * 64},
        "inputs": [
            {"name": "harmless", "kind": "adapter", "digest": "1" * 64, "weight": 0.5},
            {"name": "helpful", "kind": "adapter", "digest": "2" * 64, "weight": None},
        ],
        "options": {"density": 0.5},
        "seed": 3,
        "dtype": "auto",
        "notes": ["rescaled by 1/density"],
        "counts": {"tensors": 5, "merged": 3, "copied": 2, "inputs": 2},
        "bytes": {"read": 10, "written": 10},
        "seconds": {"compute": 0.1},
        "diagnostics": {"tensors": rows, "layers": [], "total": figures()},
        **changes,
    }


def test_every_figure_has_a_heat_map_with_its_values() -> None:
    page = render(record())
    titles = re.findall(r"<h3>(.*?)</h3>", page)
    assert titles == [
        "Change by the merge",
        "Change by harmless",
        "Change by helpful",
        "Cosine of harmless and helpful",
        "Sign conflicts",
        "dare_ties: kept density",
    ]
    assert page.count('<td class="p9" title="layer 0, attn.q_proj">4 %</td>') == 1  # the greatest change by `helpful`
    # Two cells and both ends of the scale; the embedding has no cosine.
    assert page.count("\N{MINUS SIGN}0.50") == 4
    assert "rescaled by 1/density" in page and "by tensor" in page


def test_shades_go_from_nothing_to_the_greatest_value() -> None:
    rows = [{"layer": 0, "module": name, "x": value} for name, value in (("a", 0.0), ("b", 0.5), ("c", 1.0))]
    found = heat_map(Figure("x", "", lambda row: row["x"]), rows)
    assert found is not None
    assert [cell["shade"] for cell in found["layers"][0][1]] == ["p0", "p4", "p9"]  # round(4.5) is even
    signed = heat_map(Figure("x", "", lambda row: row["x"] - 0.5, percent=False, signed=True), rows)
    assert signed is not None
    assert [cell["shade"] for cell in signed["layers"][0][1]] == ["n4", "p0", "p4"]  # of 1, whatever was seen


def test_a_figure_nobody_has_gets_no_map() -> None:
    assert heat_map(Figure("x", "", lambda row: None), [{"layer": 0, "module": "a"}]) is None


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", '"><img src=x onerror=1>', "</style><b>"])
def test_a_name_stays_text(name: str) -> None:
    found = record()
    found["inputs"][0]["name"] = name
    page = render(found)
    assert name not in page
    assert "script" not in re.findall(r"<(\w+)", page)


def test_many_inputs_get_one_map_of_cosines() -> None:
    found = record()
    found["inputs"] = [{**found["inputs"][0], "name": f"m{n}"} for n in range(5)]
    pairs = {f"{i}-{j}": 0.5 for i in range(1, 6) for j in range(i + 1, 6)}
    for row in [*found["diagnostics"]["tensors"], found["diagnostics"]["total"]]:
        row.update(delta_norm=[0.1] * 5, cosine=pairs)
    page = render(found)
    assert "Cosines of the inputs" in page and "over 10 pairs" in page

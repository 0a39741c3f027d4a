"""merge.html: what a merge did, layer by layer, as one page that opens offline and runs no script."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.merging.record import fallback_note, totals
from harness.report.pages.page import BASE_STYLE, policy

ASSETS = Path(__file__).with_name("assets")
STYLES = (BASE_STYLE, ASSETS / "merge.css")
MOST_PAIRS = 6
"""Above this many pairs of inputs (five inputs have ten) the cosines are shown as their mean."""
LEVELS = 9
"""Shades of a heat map besides "nothing"."""

_Row = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """One heat map: what is read from a row, and how it is shown."""

    title: str
    says: str
    read: Callable[[_Row], float | None]
    percent: bool = True
    signed: bool = False
    """Runs from -1 to 1 and is shaded from 0 in both directions; otherwise from 0 to the greatest value seen."""


def render(record: _Row) -> str:
    """The page of one merge, from its ``merge.json``. The same record gives the same bytes."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = "".join(sheet.read_text(encoding="utf-8") for sheet in STYLES)
    rows = record["diagnostics"]["tensors"]
    maps = [heat_map(figure, rows) for figure in figures(record)]
    return environment.get_template("merge.html.j2").render(
        record=record,
        policy=policy(style),
        style=Markup(style),
        totals=totals(record),
        maps=[one for one in maps if one is not None],
        notes=[*record["notes"], *filter(None, [fallback_note(record)])],
    )


def figures(record: _Row) -> list[Figure]:
    """The heat maps of a merge, the result's first."""
    names = [str(one["name"]) for one in record["inputs"]]
    pairs = list(record["diagnostics"]["total"]["cosine"])
    found = [
        Figure("Change by the merge", "‖W′ − W‖ / ‖W‖ of the result", lambda row: row["result_delta_norm"]),
        *(
            Figure(f"Change by {name}", "‖δ‖ / ‖W‖ of this input", lambda row, n=n: row["delta_norm"][n])  # type: ignore[misc]
            for n, name in enumerate(names)
        ),
    ]
    if len(pairs) <= MOST_PAIRS:
        for pair in pairs:
            one, other = (names[int(number) - 1] for number in pair.split("-"))
            title = f"Cosine of {one} and {other}"
            read: Callable[[_Row], float | None] = lambda row, pair=pair: row["cosine"][pair]  # type: ignore[misc]  # noqa: E731
            found.append(Figure(title, "⟨δ₁, δ₂⟩ / (‖δ₁‖ ‖δ₂‖)", read, percent=False, signed=True))
    else:
        says = f"mean of ⟨δᵢ, δⱼ⟩ / (‖δᵢ‖ ‖δⱼ‖) over {len(pairs)} pairs of inputs"
        found.append(Figure("Cosines of the inputs", says, _mean_cosine, percent=False, signed=True))
    found.append(
        Figure(
            "Sign conflicts", "share of changed entries that inputs pull both ways", lambda row: row["sign_conflict"]
        )
    )
    for key in sorted({key for row in record["diagnostics"]["tensors"] for key in row["merger"]}):
        what = key.replace("_", " ")
        percent = not key.endswith("_rad")
        read = lambda row, key=key: row["merger"].get(key)  # type: ignore[misc]  # noqa: E731
        found.append(Figure(f"{record['method']}: {what}", "what the method says of itself", read, percent=percent))
    return found


def _mean_cosine(row: _Row) -> float | None:
    values = [value for value in row["cosine"].values() if value is not None]
    return sum(values) / len(values) if values else None


def heat_map(figure: Figure, rows: Sequence[_Row]) -> dict[str, Any] | None:
    """One figure as a table, layers down and modules across; None where no tensor has it.

    Tensors outside the layers (embeddings, the final norm, the head) stand in a line of their own.
    """
    values = {(row["layer"], row["module"]): figure.read(row) for row in rows}
    seen = [value for value in values.values() if value is not None]
    if not seen:
        return None
    top = 1.0 if figure.signed else max(abs(value) for value in seen)
    layers = sorted({layer for layer, _ in values if layer is not None})
    modules = list(dict.fromkeys(row["module"] for row in rows if row["layer"] is not None))
    outside = list(dict.fromkeys(row["module"] for row in rows if row["layer"] is None))
    return {
        "title": figure.title,
        "says": figure.says,
        "low": _shown(min(seen), figure),
        "high": _shown(max(seen), figure),
        "modules": [(module, module.rsplit(".", 1)[-1]) for module in modules],
        "layers": [
            (layer, [_cell(values.get((layer, module)), top, figure, module) for module in modules]) for layer in layers
        ],
        "outside": [(module, _cell(values[None, module], top, figure, module)) for module in outside],
    }


def _cell(value: float | None, top: float, figure: Figure, module: str) -> dict[str, str]:
    if value is None:
        return {"shade": "none", "text": "–", "module": module}
    share = min(1.0, abs(value) / top) if top > 0 else 0.0
    level = round(share * LEVELS)
    side = "n" if figure.signed and value < 0 else "p"
    return {"shade": f"{side}{level}", "text": _shown(value, figure), "module": module}


def _shown(value: float, figure: Figure) -> str:
    if figure.percent:
        percent = 100 * value
        return f"{percent:.0f} %" if abs(percent) >= 10 else f"{percent:.2g} %"
    # No "-0.00".
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "\N{MINUS SIGN}")

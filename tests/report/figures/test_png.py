"""Figures as PNG: drawn from the SVG that lies beside them, with words, or refused."""

from __future__ import annotations

import io
import runpy
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from harness.report.figures.png import ZOOM

_generator = runpy.run_path(str(Path(__file__).parents[3] / "benchmarks" / "board.py"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    family = _generator["Family"]("llama", {"method": "dpo", "data": "d", "adapter": "lora"}, [1.0], (0,), 0.1)
    return Path(_generator["SyntheticStudy"](tmp_path / "run", samples=40).write([family]))


def test_every_figure_is_there_twice(cli: Any, run: Path) -> None:
    ran = cli("report", run)
    assert ran.code == 0, ran.err
    figures = run / "report" / "figures"
    before = {file.name: file.read_bytes() for file in figures.iterdir()}
    assert before and all(name.endswith(".svg") for name in before)
    assert cli("report", run, "--png").code == 0
    drawn = {file.stem: file for file in figures.glob("*.png")}
    assert {f"{name}.svg" for name in drawn} == set(before)
    # The SVG does not change with it.
    assert {name: (figures / name).read_bytes() for name in before} == before
    for name, file in drawn.items():
        image = Image.open(io.BytesIO(file.read_bytes())).convert("L")
        wide, high = (float(word.split('"')[1]) for word in _sizes(before[f"{name}.svg"].decode()))
        assert (abs(image.width - ZOOM * wide) <= 2, abs(image.height - ZOOM * high) <= 2) == (True, True)
        # White paper, and dark marks on it.
        assert image.getpixel((0, 0)) == 255 and image.getextrema()[0] < 100
    # Those of an earlier report go.
    assert cli("report", run).code == 0
    assert not list(figures.glob("*.png"))


def _sizes(svg: str) -> list[str]:
    head = svg[: svg.index(">")]
    return [word for word in head.split() if word.startswith(("width=", "height="))]


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        (
            "find_spec",
            lambda _: None,
            "--png: needs resvg-py, which is not installed\n  pip install 'harness-align",
        ),
        ("importlib", None, "--png: finds no font on this machine, so that figures would have no words\n  Install one"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is_written(
    cli: Any, run: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, told: str
) -> None:
    class Blind:
        """Draws no text, as resvg does where there is no font."""

        @staticmethod
        def import_module(_: str) -> Any:
            return Blind

        @staticmethod
        def svg_to_bytes(**_: Any) -> bytes:
            return b"blank"

    monkeypatch.setattr(f"harness.report.figures.png.{name}", value or Blind)
    ran = cli("report", run, "--png", "--out", run.parent / "out")
    assert ran.code == 2 and told in ran.err
    assert not (run.parent / "out").exists()

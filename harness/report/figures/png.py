"""Figures as PNG, for what takes no SVG: drawn from it by resvg, an extra of one wheel. Its bytes hang on the machine's
fonts, so that only the SVG is the same everywhere.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec

from harness.core.errors import UserError

ZOOM = 2.0
"""Pixels of a PNG for one of the figure: sharp on paper and on dense screens."""
FAMILY = "DejaVu Sans"
_WORDS = '<svg xmlns="http://www.w3.org/2000/svg" width="40" height="20">{}</svg>'


def png_drawer() -> Callable[[bytes], bytes]:
    """What turns the bytes of an SVG file into those of a PNG.

    Raises:
        UserError: resvg is not installed, or there is no font, so that figures would come out without words.
    """
    if find_spec("resvg_py") is None:
        what = "needs resvg-py, which is not installed"
        raise UserError("--png", what, "pip install 'harness-align[png]', or leave it out: figures are there as SVG.")
    resvg = importlib.import_module("resvg_py")

    def draw(svg: bytes) -> bytes:
        return bytes(resvg.svg_to_bytes(svg_string=svg.decode(), zoom=ZOOM, sans_serif_family=FAMILY))

    text = _WORDS.format('<text x="2" y="15" style="font:12px Arial,sans-serif">0.1</text>')
    if draw(text.encode()) == draw(_WORDS.format("").encode()):
        what = "finds no font on this machine, so that figures would have no words"
        raise UserError("--png", what, "Install one (Debian: fonts-dejavu-core), or leave it out.")
    return draw

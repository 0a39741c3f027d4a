"""Figures of a board as SVG of our own: same numbers, same bytes, no library in a page of 5 MB and no font metrics."""

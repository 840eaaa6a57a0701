# SPDX-License-Identifier: Apache-2.0
"""Colours and fonts of everything that people look at: the preview sheet, the report of `talkingdit eval`, the app."""

from __future__ import annotations

Colour = tuple[int, int, int]

PAPER, INK, FAINT, GRID = (252, 252, 250), (45, 48, 54), (140, 145, 152), (228, 230, 232)
WAVE = (124, 142, 168)
COLOURS = ((208, 72, 56), (32, 112, 180), (46, 140, 86), (148, 92, 176), (196, 132, 24))
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Helvetica", "Arial", "sans-serif")  # none is loaded from elsewhere
MONOSPACED = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

# As CSS variables. FAINT is for marks; words that small need more contrast, 4.5 to 1.
LIGHT: dict[str, Colour] = {
    "paper": PAPER,
    "raised": (255, 255, 255),
    "ink": INK,
    "dim": (93, 99, 107),
    "line": GRID,
    "edge": FAINT,
    "accent": COLOURS[1],
    "best": (34, 112, 68),
    "bad": (176, 52, 38),
}
DARK: dict[str, Colour] = {
    "paper": (27, 29, 33),
    "raised": (36, 39, 44),
    "ink": (230, 231, 233),
    "dim": (166, 172, 180),
    "line": (62, 66, 73),
    "edge": FAINT,
    "accent": (122, 178, 228),
    "best": (118, 200, 150),
    "bad": (240, 138, 124),
}


def css(colour: Colour) -> str:
    """A colour as CSS has it."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def variables(colours: dict[str, Colour]) -> str:
    """Declarations of CSS variables, `--ink: #2d3036; ...`."""
    return " ".join(f"--{name}: {css(colour)};" for name, colour in colours.items())

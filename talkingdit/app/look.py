# SPDX-License-Identifier: Apache-2.0
"""How the page looks: the colours and fonts of the sheet and the report, in gradio's words."""

from __future__ import annotations

from typing import Any

from talkingdit.media.style import DARK, FONTS, LIGHT, MONOSPACED, css, variables

CSS = (
    f"""
:root {{ {variables(LIGHT)} }}
.dark {{ {variables(DARK)} }}
"""
    + """
.gradio-container { max-width: 1180px !important; margin: 0 auto; padding: 0.5rem 1rem !important; }
h1 { font-size: 1.6rem; margin: 0.6rem 0 0; } h2 { font-size: 1.2rem; margin: 0.8rem 0 0.2rem; }
.gradio-container { --neutral-400: var(--dim); } /* gradio's times and speeds, too faint to be read */
.dim { color: var(--dim); } .error { color: var(--bad); } .state { margin: 0.2rem 0; }
.state.done b { color: var(--best); } .state.failed b { color: var(--bad); }
progress { width: 100%; height: 0.6rem; accent-color: var(--accent); }
video, #sheet img, #boxes svg { width: 100%; max-height: 70vh; display: block; border-radius: 8px; }
video { background: #000; min-height: 8rem; } #sheet img { height: auto; }
#boxes svg { cursor: crosshair; touch-action: manipulation; user-select: none; }
#boxes .sketch { fill: var(--accent); fill-opacity: 0.2; stroke: var(--accent); vector-effect: non-scaling-stroke; }
#plan pre { font: 13px/1.5 monospace; overflow-x: auto; white-space: pre-wrap; margin: 0; }
a { color: var(--accent); } :focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
footer { display: none !important; }
"""
)


def theme() -> Any:
    """The page's theme. No font is loaded from elsewhere."""
    import gradio as gr

    shades = gr.themes.Color(
        *["#eaf2f9", "#d3e5f3", "#a9cce8", "#7ab2de", "#4f97cf", "#2070b4"]
        + ["#1c639f", "#185689", "#134570", "#0f3657", "#0b283f"]
    )
    made = gr.themes.Base(primary_hue=shades, font=list(FONTS), font_mono=list(MONOSPACED), radius_size="md")
    names = {
        "body_background_fill": "paper",
        "body_text_color": "ink",
        "body_text_color_subdued": "dim",
        "background_fill_primary": "raised",
        "background_fill_secondary": "paper",
        "block_background_fill": "raised",
        "block_border_color": "line",
        "block_info_text_color": "dim",
        "block_label_background_fill": "raised",
        "block_label_text_color": "ink",
        "block_title_text_color": "ink",
        "border_color_primary": "line",
        "input_background_fill": "paper",
        "input_border_color": "edge",
        "input_placeholder_color": "dim",
        "button_secondary_background_fill": "paper",
        "button_secondary_text_color": "ink",
        "link_text_color": "accent",
    }
    values = {name: css(LIGHT[colour]) for name, colour in names.items()}
    values |= {f"{name}_dark": css(DARK[colour]) for name, colour in names.items()}
    strong = css(LIGHT["accent"])
    values |= {f"button_primary_background_fill{end}": strong for end in ("", "_dark")}
    values |= {f"button_primary_text_color{end}": "#ffffff" for end in ("", "_dark")}
    values |= {"block_border_width": "1px", "input_border_width": "1px", "block_shadow": "none"}
    return made.set(**values)

# SPDX-License-Identifier: Apache-2.0
"""Who speaks, on the page: a name, a voice and a box for each, and the picture that boxes are drawn on.

The typed fields are what counts. `draw.js` types into them what a mouse, a pen or a finger draws on the picture, which
shows what they say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from talkingdit.app import views
from talkingdit.app.asked import Text
from talkingdit.app.form import speaker_rows
from talkingdit.errors import UserError
from talkingdit.media.boxes import read_box
from talkingdit.media.image import image_size

SCRIPT = Path(__file__).with_name("draw.js")
HELP = (
    "In the place of the one voice. Draw a box around each face on the picture below: drag over it, or click two of "
    "its corners. It is written where the cursor was last, else for the next speaker without one; it can be typed as "
    "well: left, top, right and bottom side in pixels of the picture."
)


def rows_of_speakers(
    image: Any, picture: str | None, words: Text | None, sound: Mapping[str, Any], quietly: Mapping[str, Any]
) -> list[Any]:
    """Rows of name, voice and box, and the picture with the boxes -> the components of the rows, row after row.

    Args:
        image: component of the picture.
        picture: the file in it.
        words: of speakers that are there already, as typed.
        sound: how recordings are asked for.
        quietly: how listeners are attached.
    """
    rows: list[list[Any]] = []
    given = speaker_rows(words)
    with gr.Accordion("Speakers, a voice and a box each", open=isinstance(words, list), elem_id="speakers"):
        gr.HTML(f'<p class="dim">{HELP}</p>')
        shown = drawn_boxes(picture, [name for name, _ in given], [box for _, box in given])
        drawn = gr.HTML(shown, elem_id="boxes", js_on_load=SCRIPT.read_text())
        for number, (name, box) in enumerate(given, 1):
            with gr.Row():
                who = gr.Textbox(name, label=f"Speaker {number}: name", min_width=120)
                sides = gr.Textbox(
                    box,
                    label=f"Speaker {number}: box",
                    placeholder="left,top,right,bottom",
                    min_width=160,
                    elem_classes="box",
                )
            rows.append([who, gr.Audio(label=f"Speaker {number}: voice", **sound), sides])
    names, boxes = [row[0] for row in rows], [row[2] for row in rows]

    def draw(picture: str | None, *values: str) -> str:
        return drawn_boxes(picture, values[: len(names)], values[len(names) :])

    gr.on([one.change for one in (image, *names, *boxes)], draw, [image, *names, *boxes], drawn, **quietly)
    return [one for row in rows for one in row]


def drawn_boxes(picture: str | None, names: Sequence[str], boxes: Sequence[str]) -> str:
    """The picture with those boxes that are given; nothing where there is no picture."""
    found = []
    for number, (name, box) in enumerate(zip(names, boxes, strict=True), 1):
        sides = read_box(box)
        if sides is not None and sides[0] < sides[2] and sides[1] < sides[3]:
            found.append((name or f"speaker {number}", sides))
    if not picture:
        return ""
    try:
        high, wide = image_size(picture)
    except UserError:  # which is told when the video is to be made
        return ""
    return views.boxes(picture, (wide, high), found)

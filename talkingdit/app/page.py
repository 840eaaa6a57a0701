# SPDX-License-Identifier: Apache-2.0
"""The page. It asks for the state of its run once a second, so that a reload, or another tab, finds the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import gradio as gr

from talkingdit.app import views
from talkingdit.app.api import add_endpoints
from talkingdit.app.asked import Text
from talkingdit.app.boxes import rows_of_speakers
from talkingdit.app.form import Form, collect, components, form_of, speakers
from talkingdit.app.service import Service, Visitor, Wish
from talkingdit.errors import UserError

TICK = 1.0  # seconds
# Of every listener on the page: quick, and none of a program's business.
QUIETLY: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
FILES: dict[str, Any] = {"interactive": True, "buttons": ["fullscreen"]}  # none of gradio's to share things elsewhere
SOUNDS: dict[str, Any] = {"interactive": True, "buttons": ["download"], "type": "filepath"}
SOUNDS["sources"] = ["upload", "microphone"]


class Page:
    """Builds the page of a service; the attributes are its components."""

    def __init__(self, service: Service) -> None:
        self.service = service
        with gr.Blocks(title="talkingdit", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as self.blocks:
            gr.HTML(
                '<h1>talkingdit</h1><p class="dim">A picture and a voice become a video of the person speaking.</p>'
            )
            self.shown_run, self.seen = gr.State(""), gr.State({})
            self.restored: Any = gr.State({})
            with gr.Row():
                with gr.Column(scale=5):
                    self._ask()
                with gr.Column(scale=6):
                    self._show()
            self._listen()
            add_endpoints(service)

    # ---- What is asked for, on the left ------------------------------------------------------------------------------

    def _ask(self) -> None:
        self.image = gr.Image(
            label="Picture",
            type="filepath",
            sources=["upload", "clipboard", "webcam"],
            height=300,
            elem_id="picture",
            **FILES,
        )
        # It stays the file that was uploaded, with its alpha; what is wrong with it is told as of any other. (Where a
        # class is derived from a component, gradio writes a file beside it.)
        cast(Any, self.image).preprocess = lambda file: file and file.path
        self.audio = gr.Audio(label="Voice", elem_id="voice", **SOUNDS)
        self.prompt = gr.Textbox(label="Prompt", info="what to show", interactive=True, elem_id="prompt")
        choices = [
            (folder or "the model that ships, of drawn characters", folder) for folder in self.service.checkpoints
        ]
        self.checkpoint = gr.Dropdown(
            choices,
            value=self.service.checkpoints[0],
            label="Checkpoint",
            info="folder of a model" if self.service.any_checkpoint else "",
            allow_custom_value=self.service.any_checkpoint,
            interactive=True,
            elem_id="checkpoint",
        )
        options = gr.Column()
        with gr.Row():
            self.make = gr.Button("Make the video", variant="primary", elem_id="make")
            self.think = gr.Button("What will it take?", elem_id="think")
        self.wrong = gr.HTML(elem_id="wrong")
        self.plan = gr.HTML(elem_id="plan")
        with options:
            # A new picture alone makes no new form, which would forget what was typed.
            triggers = [self.blocks.load, self.checkpoint.change, self.restored.change]
            gr.render(inputs=[self.checkpoint, self.restored, self.image], triggers=triggers)(self._options)

    def _options(self, checkpoint: str, restored: Mapping[str, Text], picture: str | None) -> None:
        """The options of the family, and what listens to them."""
        try:
            family = self.service.family(checkpoint)
        except UserError as error:
            gr.HTML(views.error(str(error)))
            return
        form = form_of(family)
        gr.HTML(f'<p class="dim">Options of {family.title}</p>')
        made: list[Any] = []
        for one in form.shown:
            made += components(one, restored.get(one.name))
        rows: list[Any] = []
        if form.speaker is not None:
            words = restored.get(form.speaker.name)
            rows = rows_of_speakers(self.image, picture, words, SOUNDS, QUIETLY)
        with gr.Accordion("More settings", open=False, elem_id="more"):
            for one in form.folded:
                made += components(one, restored.get(one.name))
        inputs = [self.image, self.audio, self.prompt, self.checkpoint, *made, *rows]

        def wish(values: Sequence[Any]) -> Wish:
            return wish_of(form, values, len(made))

        def start(request: gr.Request, *values: Any) -> tuple[Any, Any]:
            try:
                return self.service.start(Visitor.of(request), wish(values)).id, ""
            except UserError as error:
                return gr.skip(), views.error(str(error))

        def plan(request: gr.Request, *values: Any) -> tuple[str, str]:
            try:
                words = self.service.plan(Visitor.of(request), wish(values))
                return f'<h2>What it takes</h2><pre tabindex="0">{views.escaped(words)}</pre>', ""
            except UserError as error:
                return "", views.error(str(error))

        self.make.click(start, inputs, [self.shown_run, self.wrong], **QUIETLY)
        self.think.click(plan, inputs, [self.plan, self.wrong], **{**QUIETLY, "show_progress": "minimal"})

    # ---- What comes out, on the right --------------------------------------------------------------------------------

    def _show(self) -> None:
        self.status = gr.HTML(views.status(None, 0, False), elem_id="status")
        self.video = gr.HTML(elem_id="video")
        with gr.Row():
            self.stop = gr.Button("Stop", visible=False, elem_id="stop")
            self.go_on = gr.Button("Go on", visible=False, elem_id="go-on")
        self.sheet = gr.HTML(elem_id="sheet")
        self.history: Any = gr.Radio([], label="Runs", interactive=True, visible=False, elem_id="runs")
        with gr.Row():
            self.load = gr.Button("Load its settings", elem_id="load", visible=False)
            self.remove = gr.Button("Delete it", elem_id="delete", visible=False)
        self.timer = gr.Timer(TICK)

    def _listen(self) -> None:
        everything = [self.status, self.video, self.sheet, self.stop, self.go_on, self.load, self.remove, self.history]
        outputs = [self.seen, *everything]
        self.blocks.load(self._newest, None, self.shown_run, **QUIETLY)
        gr.on([self.timer.tick, self.shown_run.change], self._look, [self.shown_run, self.seen], outputs, **QUIETLY)
        self.history.input(lambda id: id, self.history, self.shown_run, **QUIETLY)
        self.stop.click(self._stop, self.shown_run, None, **QUIETLY)
        self.go_on.click(self._go_on, self.shown_run, self.wrong, **QUIETLY)
        self.remove.click(self._remove, self.shown_run, [self.shown_run, self.wrong], **QUIETLY)
        restored = [self.image, self.audio, self.prompt, self.checkpoint, self.restored]
        # Through gradio's queue: only there does a state that has changed have the options made again.
        self.load.click(self._restore, self.shown_run, restored, **{**QUIETLY, "queue": True})

    def _newest(self, request: gr.Request) -> str:
        run = self.service.newest(Visitor.of(request))
        return "" if run is None else run.id

    def _look(self, id: str, seen: dict[str, Any], request: gr.Request) -> list[Any]:
        """What has changed on the page since it was last looked at."""
        person, queue = Visitor.of(request), self.service.queue
        run = self.service.find(person, id)
        running, ended = run is not None and not run.ended, run is not None and run.ended
        resumable = run is not None and run.state in ("stopped", "failed")
        found: dict[str, Any] = {
            "status": views.status(run, queue.before(run) if run else 0, bool(run and queue.stopping(run))),
            "video": views.video(run),
            "sheet": views.sheet(run),
            "stop": bool(running and run is not None and not queue.stopping(run)),
            "go on": resumable,
            "load": run is not None,
            "remove": ended,
            "history": ([(views.title_of(one), one.id) for one in self.service.runs.of(person.owner)], id),
        }
        # A video that is playing goes on playing when its run ends.
        same = run is not None and seen.get("source") == (run.id, run.started)
        source = (run.id, run.started) if run is not None and found["video"] else None
        if same and found["video"] and seen.get("video"):
            found["video"] = seen["video"]
        updates: list[Any] = []
        for name, value in found.items():
            if name in seen and seen[name] == value:
                updates.append(gr.skip())
            elif name == "history":
                updates.append(gr.Radio(choices=value[0], value=id or None, visible=bool(value[0])))
            elif isinstance(value, bool):
                updates.append(gr.Button(visible=value))
            else:
                updates.append(value)
        return [{**found, "source": source}, *updates]

    def _stop(self, id: str, request: gr.Request) -> None:
        run = self.service.find(Visitor.of(request), id)
        if run is not None:
            self.service.queue.stop(run)

    def _go_on(self, id: str, request: gr.Request) -> str:
        try:
            self.service.go_on(Visitor.of(request), id)
        except UserError as error:
            return views.error(str(error))
        return ""

    def _remove(self, id: str, request: gr.Request) -> tuple[str, str]:
        person = Visitor.of(request)
        run = self.service.find(person, id)
        if run is not None:
            self.service.runs.remove(run)
        newest = self.service.newest(person)
        return "" if newest is None else newest.id, ""

    def _restore(self, id: str, request: gr.Request) -> list[Any]:
        """The settings of a run, its picture and voice too, into the form."""
        person = Visitor.of(request)
        run = self.service.find(person, id)
        if run is None:
            return [gr.skip()] * 5
        asked = run.asked

        def file(name: str, component: Any) -> str | None:
            path = run.folder / name
            return self.service.give(path, person, component.GRADIO_CACHE) if name and path.is_file() else None

        return [
            file(asked.image, self.image),
            file(asked.audio, self.audio),
            asked.prompt,
            asked.checkpoint,
            {**asked.options, "": run.id},  # another run with the same options fills the form again
        ]


def wish_of(form: Form, values: Sequence[Any], options: int) -> Wish:
    """What is asked for by the values of the form: picture, voice, prompt, checkpoint, options, speakers."""
    image, audio, prompt, checkpoint, *rest = values
    made, rows = rest[:options], rest[options:]

    def fill(folder: Path) -> Mapping[str, Text]:
        found = collect(form, made, folder)
        said = speakers([rows[at : at + 3] for at in range(0, len(rows), 3)], folder)
        return {**found, form.speaker.name: said} if form.speaker is not None and said else found

    return Wish(image, audio, prompt or "", checkpoint or "", fill)

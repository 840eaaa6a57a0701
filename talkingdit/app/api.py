# SPDX-License-Identifier: Apache-2.0
"""What programs may call, by gradio_client; docs/app.md shows it.

Every endpoint has a name. Files are given out whole by `/video`: a video that is streamed reaches such clients as a
playlist that no reader opens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from talkingdit.app.asked import Text
from talkingdit.app.form import named
from talkingdit.app.runs import summary, take_many
from talkingdit.app.service import Service, Visitor, Wish
from talkingdit.errors import UserError

POLL = 0.3  # seconds between reports


def add_endpoints(service: Service) -> None:
    """Add the endpoints to the page that is being built; nothing of them is seen."""

    def wish(image: str | None, audio: str | None, prompt: str, checkpoint: str, options: Any, files: Any) -> Wish:
        if options is not None and not isinstance(options, dict):
            raise UserError("options: expected an object of names and values.")

        def fill(folder: Path) -> Mapping[str, Text]:
            given = take_many([Path(path) for path in files or ()], folder, "file")
            return {name: _typed(value, given) for name, value in (options or {}).items()}

        return Wish(image, audio, prompt or "", checkpoint or "", fill)

    def generate(request: gr.Request, *values: Any) -> Iterator[dict[str, Any]]:
        """Make a video: a report again and again, the last one at its end. A client that goes, or cancels, stops it."""
        with _told():
            run = service.start(Visitor.of(request), wish(*values))
        try:
            while not run.ended:
                yield summary(run)
                time.sleep(POLL)
            yield summary(run)
        finally:
            service.queue.stop(run)

    def plan(request: gr.Request, *values: Any) -> str:
        with _told():
            return service.plan(Visitor.of(request), wish(*values))

    def runs(request: gr.Request) -> list[dict[str, Any]]:
        with _told():
            return [summary(run) for run in service.runs.of(Visitor.of(request).owner)]

    def stop(id: str, request: gr.Request) -> dict[str, Any]:
        with _told():
            run = service.runs.get(id, Visitor.of(request).owner)
            service.queue.stop(run)
            return summary(run)

    with gr.Column(visible=False):
        inputs = [
            gr.File(label="image"),
            gr.File(label="audio"),
            gr.Textbox(label="prompt"),
            gr.Textbox(label="checkpoint"),
            gr.JSON(label="options"),
            gr.File(label="files", file_count="multiple"),
        ]
        id, report, words, file = gr.Textbox(label="run"), gr.JSON(), gr.Textbox(), gr.File()

        def video(id: str, request: gr.Request) -> str:
            with _told():
                person = Visitor.of(request)
                run = service.runs.get(id, person.owner)
                if run.state != "done":
                    raise UserError("video: expected a run that is done.")
                return service.give(run.video, person, file.GRADIO_CACHE)

        button = gr.Button("API")
        button.click(generate, inputs, report, api_name="generate", concurrency_limit=16)
        button.click(plan, inputs, words, api_name="plan", concurrency_limit=4)
        button.click(runs, None, report, api_name="runs", concurrency_limit=4)
        button.click(stop, id, report, api_name="stop", concurrency_limit=4)
        button.click(video, id, file, api_name="video", concurrency_limit=4)


def _typed(value: Any, files: Mapping[str, str]) -> Text:
    """A value of an option as it would be typed, with the names that files have here."""
    if isinstance(value, bool):
        return value
    if isinstance(value, list):
        return named([str(one) for one in value], files)
    return named([str(value)], files)[0]


class _told:
    """A sentence for a person reaches programs as gradio's error."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, UserError):
            raise gr.Error(str(error), print_exception=False) from error

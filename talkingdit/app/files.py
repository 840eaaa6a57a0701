# SPDX-License-Identifier: Apache-2.0
"""Videos and sheets of runs by HTTP, for whom they were made; a video also while it grows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from talkingdit.app.runs import Run
from talkingdit.app.service import Service, Visitor
from talkingdit.errors import UserError

BLOCK = 1 << 18
POLL = 0.1  # seconds between looks at a file that grows


def routes(service: Service) -> list[Route]:
    """The addresses of files of runs."""

    def found(request: Request) -> Run:
        return service.runs.get(request.path_params["id"], Visitor.of(request).owner)

    async def video(request: Request) -> Response:
        try:
            run = found(request)
            if not run.ended:
                return StreamingResponse(growing(run), media_type="video/mp4", headers=_headers())
            return _file(run.video, "video/mp4")
        except UserError as error:
            return PlainTextResponse(f"{error}\n", 404)

    async def sheet(request: Request) -> Response:
        try:
            return _file(found(request).sheet, "image/png")
        except UserError as error:
            return PlainTextResponse(f"{error}\n", 404)

    base = "/talkingdit/runs/{id}"
    return [Route(f"{base}/video.mp4", video), Route(f"{base}/sheet.png", sheet)]


def _file(path: Any, kind: str) -> Response:
    if not path.is_file():
        raise UserError("file: it has not been made.")
    return FileResponse(path, media_type=kind, headers=_headers())


def _headers() -> dict[str, str]:
    return {"cache-control": "private, no-store"}


async def growing(run: Run) -> AsyncIterator[bytes]:
    """The bytes of a video as they are written, until its run has ended."""
    while not run.video.exists():
        if run.ended:
            return
        await asyncio.sleep(POLL)
    with run.video.open("rb") as file:
        while True:
            ended = run.ended  # looked at first: what is written before the end is read after
            block = file.read(BLOCK)
            if block:
                yield block
            elif ended:
                return
            else:
                await asyncio.sleep(POLL)

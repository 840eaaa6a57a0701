# SPDX-License-Identifier: Apache-2.0
"""The program behind `talkingdit app`: a folder of its own to stand in, the page, files of runs, and the guard."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from talkingdit.app.asked import Asked, Machine
from talkingdit.app.guard import RequestGuard
from talkingdit.errors import UserError

LIMIT = 200  # MB of an upload


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What the server is told when it starts.

    Args:
        folder: where runs are kept.
        host, port: where it listens; port 0 is any that is free.
        password: that everybody needs; "" for none.
        limit: MB of an upload.
        checkpoints: folders to choose from beside the model that ships.
        machine: how models are loaded.
    """

    folder: Path
    host: str = "127.0.0.1"
    port: int = 7860
    password: str = ""
    limit: int = LIMIT
    checkpoints: tuple[Path, ...] = ()
    machine: Machine = field(default_factory=Machine)

    @property
    def local(self) -> bool:
        """Is it for people at this machine alone?"""
        if self.host == "localhost":
            return True
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(self.host).is_loopback
        return False


def default_folder() -> Path:
    """Where the platform keeps data of programs."""
    said = os.environ.get("XDG_DATA_HOME", "")
    return (Path(said) if os.path.isabs(said) else Path.home() / ".local/share") / "talkingdit"


@contextmanager
def opened(settings: ServerSettings, start: Callable[[Machine, object], Any] | None = None) -> Iterator[Any]:
    """The server as an ASGI application; what it has open is closed in the end, and its own folder removed.

    This process stands in that folder meanwhile, because gradio may give out any file that lies where it stands.

    Args:
        settings: see there.
        start: makes a worker, in the place of a process.

    Raises:
        UserError: the folder of runs cannot be used, gradio is missing, or a checkpoint is none.
    """
    before = os.getcwd()
    settings = _absolute(settings)
    with tempfile.TemporaryDirectory(prefix="talkingdit-app-") as name, contextlib.ExitStack() as stack:
        own = Path(name)
        for part in ("here", "uploads", "scratch"):
            (own / part).mkdir(mode=0o700)
        os.environ["GRADIO_TEMP_DIR"] = str(own / "uploads")
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["HF_HUB_OFFLINE"] = "1"
        gradio = _gradio()
        os.chdir(own / "here")
        stack.callback(os.chdir, before)

        from talkingdit.app.queue import Queue, WorkerProcess
        from talkingdit.app.runs import Runs
        from talkingdit.app.service import Service

        runs = Runs(settings.folder)
        stack.callback(runs.close)
        queue = Queue(runs, settings.machine, start or WorkerProcess)
        stack.callback(queue.close)
        names = ["", *map(str, settings.checkpoints)]
        service = Service(runs, queue, settings.machine, names, settings.local, own / "scratch")
        for checkpoint in names:
            service.family(checkpoint)
        queue.warm(Asked())
        threading.Thread(target=_import, args=(service,), daemon=True).start()
        yield _application(gradio, service, settings)


def _import(service: Any) -> None:
    """What takes seconds to import, before the first person waits for it."""
    from talkingdit.pipelines import inputs, tuning  # noqa: F401

    for checkpoint in service.checkpoints:
        _ = service.family(checkpoint).outline


def _absolute(settings: ServerSettings) -> ServerSettings:
    """Folders by their whole names, as the process goes elsewhere."""
    checkpoints = tuple(path.expanduser().absolute() for path in settings.checkpoints)
    return replace(settings, folder=settings.folder.expanduser().absolute(), checkpoints=checkpoints)


def _gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise UserError(f"app: expected gradio, got none of it ({error}); `pip install talkingdit[app]`.") from error
    return gradio


def _application(gradio: Any, service: Any, settings: ServerSettings) -> Any:
    from fastapi import FastAPI

    from talkingdit.app.files import routes
    from talkingdit.app.look import CSS, theme
    from talkingdit.app.page import Page

    app = FastAPI(openapi_url=None)
    app.router.routes.extend(routes(service))
    limit = settings.limit * 1_000_000
    gradio.mount_gradio_app(
        app,
        Page(service).blocks,
        path="/",
        footer_links=[],
        run_history=False,
        max_file_size=limit,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        css=CSS,
        show_error=False,
    )
    hosts = {"localhost", "127.0.0.1", "::1", settings.host} if settings.local else ()
    return RequestGuard(app, service.shares, settings.password, hosts, limit)


def serve(settings: ServerSettings) -> None:
    """Serve until interrupted.

    Raises:
        UserError: as `opened`, or the port is taken.
    """
    import socket
    import sys

    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((settings.host, settings.port))
        except OSError as error:
            where = f"{settings.host}:{settings.port}"
            raise UserError(f"app: {where} cannot be listened at ({error.strerror or error}).") from error
        with opened(settings) as application:
            import uvicorn

            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            sys.stdout.write(f"http://{host}:{listening.getsockname()[1]}/\n")
            sys.stdout.flush()
            config = uvicorn.Config(application, log_level="warning", lifespan="on", timeout_graceful_shutdown=2)
            with contextlib.suppress(KeyboardInterrupt):  # how a server is ended
                uvicorn.Server(config).run(sockets=[listening])

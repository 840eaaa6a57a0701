# SPDX-License-Identifier: Apache-2.0
"""The verb `talkingdit app`: the web app, for this machine or behind a password for others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from talkingdit.app.asked import Machine
from talkingdit.app.server import LIMIT, ServerSettings, default_folder, serve
from talkingdit.cli.flags import Group, read
from talkingdit.errors import UserError
from talkingdit.families.flag import Flag

COMMAND = "talkingdit app"
ABOUT = "Serve a page on which videos are made; nothing leaves the machine."
PASSWORD_LENGTH = 8


@dataclass(frozen=True, kw_only=True)
class AppFlags:
    """Where it listens, and what it keeps."""

    folder: Annotated[Path | None, Flag("DIR")] = None
    """where runs are kept (default: talkingdit in the platform's data folder)"""
    host: Annotated[str, Flag("NAME")] = "127.0.0.1"
    """address to listen at; others than this machine's own need a password"""
    port: Annotated[int, Flag("N")] = 7860
    """to listen at, 0 for any that is free"""
    password: Annotated[str, Flag("WORDS")] = ""
    """that the browser asks for; the user name does not matter"""
    max_upload: Annotated[int, Flag("MB")] = LIMIT
    """size of an uploaded file at most"""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"app: port must be 0 to 65535, got {self.port}")
        if self.max_upload < 1:
            raise ValueError(f"app: max_upload must be at least 1, got {self.max_upload}")
        if self.password and len(self.password) < PASSWORD_LENGTH:
            raise ValueError(f"app: password must have at least {PASSWORD_LENGTH} letters, got {len(self.password)}")


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """Which models there are, and how they are loaded."""

    checkpoint: Annotated[tuple[Path, ...], Flag("DIR", Path, many=True)] = ()
    """folder of a model to choose from beside the one that ships; may be given again"""
    device: Annotated[str | None, Flag("NAME")] = None
    """cpu, cuda, cuda:1, ... (default: cuda if there, but cpu for drawn characters)"""
    dtype: Literal["float32", "bfloat16"] | None = None
    """precision of the weights (default: bfloat16 on a GPU)"""
    precision: Literal["fp8", "int8"] | None = None
    """let large layers compute in eight bits"""
    attention: Literal["auto", "flash", "efficient", "cudnn", "math", "flash3", "flash3_fp8", "sage"] = "auto"
    """kernel of attention"""


def app(argv: Sequence[str]) -> None:
    """Carry out the verb.

    Raises:
        UserError: something is wrong with the command line, or gradio is missing.
        SystemExit: after the help.
    """
    values = read(COMMAND, ABOUT, (Group(AppFlags), Group(ModelFlags, "models")), argv)
    values.refuse_unknown()
    flags, models = values.make(AppFlags), values.make(ModelFlags)
    machine = Machine(device=models.device, dtype=models.dtype, precision=models.precision, attention=models.attention)
    settings = ServerSettings(
        folder=flags.folder or default_folder(),
        host=flags.host,
        port=flags.port,
        password=flags.password,
        limit=flags.max_upload,
        checkpoints=models.checkpoint,
        machine=machine,
    )
    if not settings.local and not settings.password:
        raise UserError(f"app: --host {flags.host} can be reached by others: expected a --password, got none.")
    serve(settings)

# SPDX-License-Identifier: Apache-2.0
"""What a wire between the loader and the nodes that generate carries: a checkpoint, loaded when it is first needed.

ComfyUI keeps what a node gave until the node's inputs change. The models live as long as the loader's result: another
checkpoint, or ComfyUI's button that frees memory, lets them go. A node of LoRAs must not change what it was given, so
LoRAs travel beside the models and are put on for each video.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from talkingdit import families
from talkingdit.errors import UserError
from talkingdit.families import Family

from . import host

SHIPPED = "shipped: drawn characters"
DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class Lora:
    """A LoRA that is asked for; `state` is another one where its file is."""

    path: Path
    strength: float
    state: str = ""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a checkpoint is loaded."""

    folder: Path
    dtype: str = "auto"
    device: str = "auto"
    precision: str | None = None
    attention: str = "auto"
    memory: str = ""
    compile: bool = False


class CheckpointSlot:
    """The place of a loaded checkpoint."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.family = families.of_folder(recipe.folder)
        self._pipe: Any = None
        self._loras: tuple[Lora, ...] = ()

    @property
    def device(self) -> Any:
        return host.device(self.recipe.device, self.family.options.small)

    def check(self, asked: Mapping[str, Any]) -> None:
        """What is wrong with a video, told before minutes go into loading models for it. Once they are there, the
        pipeline tells it.

        Args:
            asked: arguments of a pipeline's call.

        Raises:
            UserError: something is.
        """
        from talkingdit.api.asking import PipelineCall, ask

        if self._pipe is None:
            own = {field.name for field in fields(PipelineCall)} & set(asked)
            options = {name: value for name, value in asked.items() if name not in own}
            wish = PipelineCall(**{name: asked[name] for name in own})
            ask(self.family, self.recipe.folder, wish, options).materials.close()

    def ready(self, loras: tuple[Lora, ...]) -> Any:
        """The pipeline on its device, with these LoRAs and no others.

        Raises:
            UserError: it cannot be loaded, or a LoRA does not fit.
        """
        host.make_room(self.device)
        if self._pipe is None:
            self._pipe = self._loaded()
        elif self._moves:
            self._pipe.to(self.device)
        if loras != self._loras:
            self._put_on(loras)
        return self._pipe

    def _put_on(self, loras: tuple[Lora, ...]) -> None:
        self._pipe.unload_lora_weights()
        self._loras = ()
        names = [f"lora_{number}" for number in range(len(loras))]
        try:
            for name, lora in zip(names, loras, strict=True):
                self._pipe.load_lora_weights(lora.path, adapter_name=name)
            self._pipe.set_adapters(names, [lora.strength for lora in loras])
        except BaseException:
            self._pipe.unload_lora_weights()
            raise
        self._loras = loras

    def leave(self) -> None:
        """Off its device, where something else may need the room."""
        if self._pipe is not None and self._moves:
            self._pipe.to("cpu")
            host.empty_cache()

    @property
    def _moves(self) -> bool:
        """May the models be moved? Not where they are offloaded part by part already."""
        return self.device.type != "cpu" and not self.recipe.memory

    def _loaded(self) -> Any:
        import torch

        from talkingdit import TalkingPipeline

        recipe, device = self.recipe, self.device
        dtype = ("float32" if device.type == "cpu" else "bfloat16") if recipe.dtype == "auto" else recipe.dtype
        return TalkingPipeline.from_pretrained(
            recipe.folder,
            torch_dtype=getattr(torch, dtype),
            device=device,
            precision=recipe.precision,
            attention=recipe.attention,
            memory=recipe.memory,
            compile=recipe.compile,
        )


@dataclass(frozen=True)
class Model:
    """A checkpoint and the LoRAs on it."""

    slot: CheckpointSlot
    loras: tuple[Lora, ...] = ()

    @property
    def family(self) -> Family:
        return self.slot.family

    def with_lora(self, lora: Lora) -> Model:
        return replace(self, loras=(*self.loras, lora))


def checkpoint_names() -> list[str]:
    """The model that ships, and folders below ComfyUI's `models/talkingdit`."""
    return [SHIPPED, *_found()]


def checkpoint_folder(name: str, path: str = "") -> Path:
    """The folder of a checkpoint, by the name that the loader shows or by its path.

    Raises:
        UserError: there is none.
    """
    if path.strip():
        return Path(path.strip()).expanduser()
    if name == SHIPPED:
        from talkingdit.models import default_checkpoint

        return default_checkpoint()
    folder = _found().get(name)
    if folder is None:
        places = ", ".join(map(str, host.checkpoint_roots()))
        raise UserError(f"checkpoint: expected a folder below {places}, got {name!r}, which is not there.")
    return folder


def state_of(path: Path) -> str:
    """Changes whenever a file, or one in a folder, does."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    listing = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]
    return hashlib.sha256(repr(listing).encode()).hexdigest()


def _found() -> dict[str, Path]:
    """Checkpoints one or two folders below the roots."""
    found: dict[str, Path] = {}
    for root in host.checkpoint_roots():
        for folder in sorted({*root.glob("*/"), *root.glob("*/*/")}):
            name = folder.relative_to(root).as_posix()
            if name not in found and folder.parent not in found.values() and _is_checkpoint(folder):
                found[name] = folder
    return found


def _is_checkpoint(folder: Path) -> bool:
    try:
        families.of_folder(folder)
    except UserError:
        return False
    return True

# SPDX-License-Identifier: Apache-2.0
"""Nodes that say which model: a checkpoint, LoRAs on it, and kernels in a model that ComfyUI has loaded itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from talkingdit.errors import UserError

from . import host
from .model import DTYPES, SHIPPED, CheckpointSlot, Lora, Model, Recipe, checkpoint_folder, checkpoint_names, state_of

MODEL = "TALKINGDIT_MODEL"
NATIVE = "native"
PRECISIONS = (NATIVE, "fp8", "int8")


class LoadNode:
    """A checkpoint of any family. It is looked at here, and loaded by the first node that generates."""

    CATEGORY, FUNCTION = "talkingdit", "load"
    RETURN_TYPES, RETURN_NAMES = (MODEL,), ("model",)
    DESCRIPTION = "A talkingdit checkpoint: a folder below models/talkingdit, or any folder by its path."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        from talkingdit.nn.attention_backends import BACKENDS

        return {
            "required": {
                "checkpoint": (checkpoint_names(), {"tooltip": "a folder below models/talkingdit"}),
            },
            "optional": {
                "path": ("STRING", {"default": "", "tooltip": "a folder elsewhere, in place of the one above"}),
                "dtype": (list(DTYPES), {"tooltip": "of the large models; auto is bfloat16 on a GPU"}),
                "precision": (list(PRECISIONS), {"tooltip": "let large layers compute in eight bits"}),
                "attention": (["auto", *BACKENDS], {"tooltip": "its kernel; auto is the fastest exact one"}),
                "memory": (
                    "STRING",
                    {"default": "", "tooltip": "what to trade for memory: offload=block,text_encoder=cpu,vae=tiled"},
                ),
                "compile": ("BOOLEAN", {"default": False, "tooltip": "compile the blocks: slow at first, faster then"}),
                "device": (["auto", "cpu"], {"tooltip": "auto is ComfyUI's, but the host for drawn characters"}),
            },
        }

    @classmethod
    def IS_CHANGED(cls, checkpoint: str | None = None, path: str | None = "", **_: Any) -> str:
        return state_of(checkpoint_folder(checkpoint or SHIPPED, path or ""))

    def load(
        self,
        checkpoint: str,
        path: str = "",
        dtype: str = "auto",
        precision: str = NATIVE,
        attention: str = "auto",
        memory: str = "",
        compile: bool = False,
        device: str = "auto",
    ) -> tuple[Model]:
        from talkingdit.pipelines.tuning import Tuning

        recipe = Recipe(
            folder=checkpoint_folder(checkpoint, path),
            dtype=dtype,
            device=device,
            precision=None if precision == NATIVE else precision,
            attention=attention,
            memory=memory.strip(),
            compile=compile,
        )
        Tuning.of(recipe.memory, recipe.precision, recipe.attention)  # what is wrong with the words is told here
        return (Model(CheckpointSlot(recipe)),)


class LoadLoraNode:
    """A LoRA on a checkpoint; several in a row add up."""

    CATEGORY, FUNCTION = "talkingdit", "add"
    RETURN_TYPES, RETURN_NAMES = (MODEL,), ("model",)
    DESCRIPTION = "A LoRA of any trainer on a talkingdit checkpoint. Several in a row add up."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (MODEL,),
                "lora": (host.lora_names(), {"tooltip": "a file below models/loras"}),
                "strength": ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.01, "round": False}),
            },
            "optional": {
                "path": ("STRING", {"default": "", "tooltip": "a file elsewhere, in place of the one above"}),
            },
        }

    @classmethod
    def IS_CHANGED(cls, lora: str | None = None, path: str | None = "", **_: Any) -> str:
        return state_of(cls._file(lora or "", path or ""))

    @staticmethod
    def _file(lora: str, path: str) -> Path:
        return Path(path.strip()).expanduser() if path.strip() else host.lora_path(lora)

    def add(self, model: Model, lora: str, strength: float, path: str = "") -> tuple[Model]:
        file = self._file(lora, path)
        if not file.exists():
            raise UserError(f"lora: there is no file or folder {str(file)!r}.")
        if not math.isfinite(strength):
            raise UserError(f"lora: expected a finite strength, got {strength}.")
        return (model.with_lora(Lora(file, strength, state_of(file))) if strength else model,)


class AccelerateNode:
    """talkingdit's kernels in a Wan model that ComfyUI has loaded. Other users of that model do not see them."""

    CATEGORY, FUNCTION = "talkingdit", "accelerate"
    RETURN_TYPES, RETURN_NAMES = ("MODEL", "STRING"), ("model", "report")
    DESCRIPTION = "Fused kernels in a Wan model of ComfyUI: the same video up to rounding."
    PREFIX = "diffusion_model."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    def accelerate(self, model: Any) -> tuple[Any, str]:
        from talkingdit.nn.accelerate.comfy_wan import object_patches
        from talkingdit.nn.accelerate.replacement import Replacement

        patched = model.clone()
        others = {
            name.removeprefix(self.PREFIX)
            for name, code in patched.object_patches.items()
            if not isinstance(code, Replacement)
        }
        try:
            patches, report = object_patches(patched.model.diffusion_model, others)
        except ValueError as error:
            raise UserError(f"{error}.") from error
        for name, code in patches.items():
            patched.add_object_patch(self.PREFIX + name, code)
        return patched, str(report)

# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as a pipeline of diffusers itself, for programs that hold one: `.to`, `.components`, `.save_pretrained`,
and `DiffusionPipeline.from_pretrained` of what was saved.

A saved folder is a checkpoint like others, which every door of this package opens, with two files more:

    model_index.json    class of every part, with the module that has it: `AutoModel` finds our models by it
    pipeline.py         names the class below, for `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`

Encoders that are no models of diffusers themselves, but hold one of transformers with its tokenizer, go as the files
that they came from, and are loaded by ourselves.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from talkingdit import families
from talkingdit.api.output import TalkingOutput
from talkingdit.api.pipeline import TalkingPipeline
from talkingdit.api.source import find_folder
from talkingdit.atomic import whole_file
from talkingdit.autoencoders.wan import exchange_layers
from talkingdit.errors import UserError
from talkingdit.models import load_checkpoint

ENCODERS = ("text_encoder", "audio_encoder", "image_encoder")
PARTS = ("transformer", "vae", *ENCODERS)
INDEX = "model_index.json"
OURS = "_talkingdit_encoders"  # of the index: parts that diffusers does not load
RENAMED = {"pooled_encoder": "text_encoder_2"}  # folders whose name is not that of the part
REMOTE = '''"""For DiffusionPipeline.from_pretrained(..., trust_remote_code=True): pip install talkingdit"""

from talkingdit.api.diffusers_face import TalkingDiffusionPipeline  # noqa: F401
'''


class TalkingDiffusionPipeline(DiffusionPipeline):
    """The parts of a checkpoint in a `DiffusionPipeline`. Made by `from_pretrained`, of any folder of any family.

    Args:
        transformer, vae, text_encoder, audio_encoder, image_encoder: the parts; None where a family has none of a kind.
    """

    _optional_components = ["text_encoder", "audio_encoder", "image_encoder"]  # noqa: RUF012
    _callback_tensor_inputs = ("latents",)
    _came: tuple[Any, ...] = ()  # encoders as they came from the folder

    def __init__(
        self, transformer: Any, vae: Any, text_encoder: Any = None, audio_encoder: Any = None, image_encoder: Any = None
    ) -> None:
        super().__init__()
        given = (transformer, vae, text_encoder, audio_encoder, image_encoder)
        self.register_modules(**dict(zip(PARTS, given, strict=True)))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any = None, **kwargs: Any) -> Any:
        """Load a checkpoint of any family and layout; no code that lies in it is run.

        Args:
            pretrained_model_name_or_path: a folder, or a name on the Hugging Face hub; None is the model that ships.
            kwargs: `dtype` (or `torch_dtype`) alone, of the large models.

        Raises:
            UserError: no such checkpoint.
        """
        folder = find_folder(pretrained_model_name_or_path)
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
        if kwargs:
            raise UserError(
                f"from_pretrained: {next(iter(kwargs))!r} is for DiffusionPipeline.from_pretrained of a folder that "
                "save_pretrained has written."
            )
        checkpoint = load_checkpoint(folder, dtype)
        pipe = cls(**{name: getattr(checkpoint, name, None) for name in PARTS})
        pipe._came = tuple(getattr(checkpoint, name, None) for name in ENCODERS)
        pipe.register_to_config(_name_or_path=str(folder))
        return pipe

    def register_to_config(self, **given: Any) -> None:
        """As of diffusers, which tells a pipeline here where it was loaded from: encoders that it does not know follow.

        For that moment every part of the checkpoint is in memory twice; `from_pretrained` of this class loads it once.
        """
        super().register_to_config(**given)
        if "_name_or_path" not in given:
            return
        index = Path(given["_name_or_path"]) / INDEX
        wanted = json.loads(index.read_text()).get(OURS, []) if index.is_file() else []
        if missing := [name for name in wanted if getattr(self, name) is None]:
            checkpoint = load_checkpoint(self._folder, self.transformer.dtype)
            self.register_modules(**{name: getattr(checkpoint, name) for name in missing})
            self._came = tuple(getattr(checkpoint, name) for name in missing)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:  # type: ignore[override]
        """Write a folder that `from_pretrained` of this class, of `DiffusionPipeline` and of `TalkingPipeline` load.

        Args:
            save_directory: the folder; parts that are in it are written over.
            kwargs: of `DiffusionPipeline.save_pretrained`.

        Raises:
            UserError: a part is of a class that diffusers cannot save, and did not come with the checkpoint.
        """
        ours = [name for name in PARTS if not isinstance(getattr(self, name), ModelMixin | None)]
        for name in ours:
            part = getattr(self, name)
            if not any(part is one for one in self._came):
                raise UserError(
                    "save_pretrained: expected parts that are models of diffusers, "
                    f"got {name} of {type(part).__name__}, "
                    "which did not come with the checkpoint; save the transformer by itself and put it into a copy of "
                    "the folder that it came from."
                )
        source, target = self._folder, Path(save_directory)
        known = {name: getattr(self, name) for name in ours}
        self.register_modules(**dict.fromkeys(ours))  # diffusers could not save them
        try:
            super().save_pretrained(target, **kwargs)
        finally:
            self.register_modules(**known)
        if ours:
            self._save_encoders(source, target)
        for file in (*source.glob("*.json"), *source.glob("ckpts/pipeline.json")):
            if file.name not in (INDEX, "config.json") and not (target / file.name).exists():
                shutil.copyfile(file, target / file.name)
        index = json.loads((target / INDEX).read_text())
        index |= {"_class_name": ["pipeline", type(self).__name__], OURS: ours}
        for name, text in (("pipeline.py", REMOTE), (INDEX, json.dumps(index, indent=2) + "\n")):
            with whole_file(target / name) as path:
                path.write_text(text)

    def _save_encoders(self, source: Path, target: Path) -> None:
        """Their files, under the names that the layout of diffusers has for them."""
        if (source / "transformer").is_dir():
            found = {path.name: path for path in source.iterdir() if path.is_dir()}
        else:
            parts = dataclasses.asdict(families.of_folder(source).part("checkpoint").find_parts(source))
            found = {RENAMED.get(name, name): path for name, path in parts.items() if path is not None}
        for name, path in found.items():
            if name in ("transformer", "vae") or (target / name).resolve() == path.resolve():
                continue
            if path.is_dir():
                shutil.copytree(path, target / name, dirs_exist_ok=True)
            else:  # weights alone, as Wan's text encoder is released
                getattr(self, name).model.save_pretrained(target / name)

    # The hooks of `DiffusionPipeline` wait for calls of forward; our parts are called by other methods, too.
    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: Any = None) -> None:
        """See `TalkingPipeline.enable_model_cpu_offload`."""
        self.talking.enable_model_cpu_offload(gpu_id, device)

    def enable_sequential_cpu_offload(self, gpu_id: int | None = None, device: Any = None) -> None:
        """See `TalkingPipeline.enable_sequential_cpu_offload`."""
        self.talking.enable_sequential_cpu_offload(gpu_id, device)

    def enable_group_offload(self, onload_device: Any, *args: Any, **kwargs: Any) -> None:
        """See `TalkingPipeline.enable_group_offload`."""
        self.talking.enable_group_offload(onload_device, *args, **kwargs)

    @torch.no_grad()
    def __call__(self, image: Any = None, audio: Any = None, prompt: str = "", **given: Any) -> TalkingOutput:
        """Make a video, see `TalkingPipeline.__call__`; callbacks get that pipeline."""
        return self.talking(image, audio, prompt, **given)

    @property
    def talking(self) -> TalkingPipeline:
        """The parts, as they are now, as our own pipeline: it streams, too.

        An autoencoder that diffusers has loaded gets our layers, with its weights, for the frames of all other ways.
        """
        folder = self._folder
        parts = {name: getattr(self, name) for name in PARTS}
        if isinstance(self.vae, AutoencoderKLWan):
            exchange_layers(self.vae)
        settings = families.of_folder(folder).checkpoint.read_settings(folder)
        return TalkingPipeline(SimpleNamespace(**parts, settings=settings, folder=folder))

    @property
    def _folder(self) -> Path:
        return find_folder(self.config.get("_name_or_path") or None)

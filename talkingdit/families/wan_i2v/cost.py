# SPDX-License-Identifier: Apache-2.0
"""Memory and work of Wan I2V and of families on it, see `talkingdit.plan.cost`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from talkingdit.checkpoints.bounds import check_counts
from talkingdit.errors import UserError
from talkingdit.families.wan_i2v.presets import PRESETS
from talkingdit.families.wan_i2v.units import walk
from talkingdit.families.wan_s2v import cost as wan_s2v
from talkingdit.families.wan_s2v.cost import Kept
from talkingdit.nn.units import FFN_TOKENS
from talkingdit.pipelines.memory import Memory
from talkingdit.plan import shipped
from talkingdit.plan.clip import ClipShape
from talkingdit.plan.cost import (
    ALL_SWITCHES,
    AUTOENCODER,
    SPEECH_ENCODER,
    TEXT_ENCODER,
    Activations,
    FrozenParts,
    Parameter,
    SpeechCost,
)
from talkingdit.plan.run import MeshSizes, TrainingRun

if TYPE_CHECKING:
    import torch

PICTURE_ENCODER = "picture encoder"
PICTURE_PARAMETERS = 632_076_800  # CLIP ViT-H/14
PICTURE_TOKENS = 257


@dataclass(frozen=True)
class WanCost:
    """The functions of a cost.py, for a model of one class.

    Args:
        title: of the family.
        preset: name of the one whose arguments a configuration leaves out.
        presets: of the family.
        model: gives the class; called to count parameters.
        translate: arguments that a config.json says.
        settings: of a checkpoint in a folder, or without one of the family.
        extra: tokens beside the video's, of a clip with what is usual of them.
        audio_tokens: keys of audio per latent frame.
        speech_parameters: of the speech encoder; 0 where there is none.
    """

    title: str
    preset: str
    presets: Mapping[str, dict[str, Any]]
    model: Callable[[], Any]
    translate: Callable[[Mapping[str, Any], object], dict[str, Any]]
    settings: Callable[[Path | None], Any]
    extra: Callable[[Mapping[str, Any], ClipShape], int] = lambda config, clip: 0
    audio_tokens: Callable[[Mapping[str, Any]], int] = lambda config: 0
    speech_parameters: int = 0

    # ---- The model and its clips -------------------------------------------------------------------------------------

    def complete(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {**self.presets[self.preset], **config}

    def read_config(self, folder: Path) -> dict[str, Any]:
        """Arguments of the transformer that config.json, or transformer/config.json, says.

        Raises:
            UserError: there is none, or it is not readable or of a variant that is not supported.
        """
        from talkingdit.checkpoints.weights import read_bounded

        file = next((f for f in (folder / "config.json", folder / "transformer" / "config.json") if f.is_file()), None)
        if file is None:
            raise UserError(f"{folder}: no config.json and no transformer/config.json in it.")
        found = self.translate(read_bounded(file), file)
        check_counts(found, self.presets[self.preset], file)
        return found

    def default_clip(self, config: Mapping[str, Any], folder: Path | None = None) -> ClipShape:
        """832 x 480 pixels, or those of the drawn world; guided; length and steps as the checkpoint has them."""
        from talkingdit.pipelines.guidance import guidance_branches

        settings = self.settings(folder)
        branches = len(guidance_branches(settings.guidance, getattr(settings, "audio_guidance", settings.guidance)))
        small = not wan_s2v.released(config)
        return ClipShape(
            height=shipped.SIDE if small else 480,
            width=shipped.SIDE if small else 832,
            latents=shipped.LATENTS if small and folder is None else settings.chunk_latents,
            steps=settings.steps,
            branches=branches,
            batched=branches > 1,
        )

    def frozen_parts(self, config: Mapping[str, Any], dtype: torch.dtype, folder: Path | None = None) -> FrozenParts:
        """All but the text encoder is float32. A model that looks at no picture needs no encoder of pictures."""
        parts = wan_s2v.frozen_parts(config, dtype, folder)
        if not wan_s2v.released(config):
            return parts
        found = {name: parts.sizes[name] for name in (TEXT_ENCODER, AUTOENCODER)}
        if config["image_dim"]:
            found[PICTURE_ENCODER] = PICTURE_PARAMETERS * 4
        if self.speech_parameters:
            found[SPEECH_ENCODER] = self.speech_parameters * 4
        return FrozenParts(found)

    def parameters(self, config: Mapping[str, Any]) -> dict[str, Parameter]:
        import torch

        cls = self.model()
        with torch.device("meta"):
            model = cls(**config)
        kept: Any = cls._keep_in_fp32_modules
        return {
            name: Parameter(tuple(p.shape), any(word in name for word in kept)) for name, p in model.named_parameters()
        }

    def heads(self, config: Mapping[str, Any]) -> int:
        return config["num_heads"]

    def tokens(self, config: Mapping[str, Any], clip: ClipShape) -> tuple[int, int]:
        """Noisy tokens and all tokens of a sample."""
        noisy = clip.latents * (clip.height // 16) * (clip.width // 16)
        return noisy, noisy + self.extra(config, clip)

    # ---- Work --------------------------------------------------------------------------------------------------------

    def flops(self, config: Mapping[str, Any], clip: ClipShape, memory: Memory | None = None) -> float:
        """Floating point operations of one forward of one branch: matrix products and attention, 2 per multiply-add."""
        memory = Memory() if memory is None else memory
        noisy, total = self.tokens(config, clip)
        dim, ffn = config["dim"], config["ffn_dim"]
        keys = config["text_len"] + (PICTURE_TOKENS if config["image_dim"] else 0)
        block = 12 * total * dim**2 + 4 * total * dim * ffn + 4 * total * keys * dim
        if memory.offload != "none":
            block += 4 * keys * dim**2
        hears = len(config["audio_inject_layers"])
        audio = 4 * noisy * dim**2 + 4 * noisy * self.audio_tokens(config) * dim
        ends = 2 * noisy * dim * 4 * (config["in_dim"] + config["out_dim"])
        return config["num_layers"] * block + hears * audio + ends + self.attention_flops(config, clip)

    def attention_flops(self, config: Mapping[str, Any], clip: ClipShape) -> float:
        """What of them is attention over the whole sequence."""
        return 4.0 * config["num_layers"] * self.tokens(config, clip)[1] ** 2 * config["dim"]

    # ---- Memory of generation ----------------------------------------------------------------------------------------

    def conditions(self, config: Mapping[str, Any], clip: ClipShape, memory: Memory, size: int) -> float:
        """Bytes kept for all steps: of every branch, batched or not.

        Raises:
            ValueError: a pose video or a history, which these models take none of.
        """
        if clip.pose or clip.history:
            raise ValueError(f"plan: {self.title} takes no {'pose video' if clip.pose else 'history'}")
        noisy, total = self.tokens(config, clip)
        dim, keys = config["dim"], config["text_len"] + (PICTURE_TOKENS if config["image_dim"] else 0)
        elements = (total - noisy) * dim + keys * dim + clip.latents * self.audio_tokens(config) * dim
        if memory.offload == "none":  # offloaded layers make their keys and values in every step
            elements += config["num_layers"] * 2 * keys * dim
        known = 4 * (config["in_dim"] - config["out_dim"]) * clip.latents * clip.pixels / 64
        return clip.branches * (elements * size + known)

    def step(self, config: Mapping[str, Any], clip: ClipShape, memory: Memory, size: int) -> float:
        """Bytes of one forward at its worst moment, beyond weights and conditions."""
        noisy, total = (n * clip.batch for n in self.tokens(config, clip))
        dim = config["dim"]
        whole, only_noisy = total * dim * size, noisy * dim * size
        wide = max(4, size)
        residual = total * dim * (wide if memory.residual == "float32" else size)
        if memory.offload != "none":
            residual *= 2  # hooks keep what a block was given beside what it makes
        hears = bool(config["audio_inject_layers"])
        moments = [
            # normalised input, q, k, v and the result, with the statistics of the softmax
            residual + 5 * whole + 4 * total * config["num_heads"],
            # normalised input, query, result of the text and of the picture, and of audio
            residual + 4 * whole + hears * 2 * only_noisy,
            # input and a slice of the hidden layer; adapters, which are not counted, keep it before the activation, too
            residual + whole + min(total, clip.batch * FFN_TOKENS) * config["ffn_dim"] * size,
            # the head in float32
            residual + noisy * dim * wide,
            # at the beginning: patches beside the whole sequence, narrow and wide
            residual + whole + only_noisy,
        ]
        copies = 6 + clip.batch  # of the latents in float32: what a solver of second order keeps, and the input
        latents = copies * config["out_dim"] + clip.batch * config["in_dim"]
        return max(moments) + 4 * latents * clip.latents * clip.pixels / 64

    def autoencoder(self, config: Mapping[str, Any], clip: ClipShape, memory: Memory, width: int) -> dict[str, float]:
        """Bytes of decoding the clip's frames and of encoding its first."""
        return wan_s2v.autoencoder(config, clip, memory, width)

    def speech(self, config: Mapping[str, Any], folder: Path | None = None) -> SpeechCost:
        """Of the speech encoder in float32, of which all layers are kept; nothing for models that do not hear."""
        fps = self.settings(folder).fps
        if not self.speech_parameters:
            return SpeechCost(0, 0, fps)
        hearing = wan_s2v.SPEECH_HEARING if wan_s2v.released(config) else 0.0
        return SpeechCost(hearing, 4.0 * config["audio_layers"] * config["audio_dim"] * fps, fps)

    # ---- Memory of training ------------------------------------------------------------------------------------------

    def activations(self, config: Mapping[str, Any], run: TrainingRun, mesh: MeshSizes, size: int) -> Activations:
        """What a rank keeps and sends of a micro-batch; counted as for Wan-S2V, with audio inside of the blocks."""
        dim, wide, ring = config["dim"], config["ffn_dim"] / config["dim"], mesh.ring
        noisy, total = self.tokens(config, run.clip)
        local = math.ceil(total / mesh.context)
        stream, narrow, only_noisy = local * dim * 4, local * dim * size, min(noisy, local) * dim * size
        saved = (15 if mesh.context == 1 else 13 + 3 * (mesh.ulysses > 1) + 2 * ring * (ring > 1)) + 2
        whole = (saved + 3 * wide) * narrow + 3 * stream
        if ring > 1:
            whole = max(whole, (4 * ring + 8) * narrow + 2 * stream)
        hears = set(config["audio_inject_layers"])
        kinds: dict[str, Kept] = {}
        for i, path in enumerate(walk(config)):
            audio = 4 * only_noisy if i in hears else 0
            kinds[path] = Kept(
                (saved + 2 * wide) * narrow + 2 * stream + audio, (11 + wide) * narrow + audio, whole + 2 * audio
            )
        kept = {path: kind.kept(run.checkpointing) for path, kind in kinds.items()}
        area, text = run.clip.pixels / 64, config["text_len"]
        found = 4 * area * run.clip.latents * (2 * config["out_dim"] + config["in_dim"])
        working = {path: kind.whole - kept[path] for path, kind in kinds.items()}
        return Activations(
            streams=dict.fromkeys(kinds, stream),
            kept=kept,
            working=working,
            multiplying=working,
            again={path: kind.kept("off") - kept[path] for path, kind in kinds.items()},
            conditions=found + 4 * text * config["text_dim"] + 4 * size * dim * text,
            attending=frozenset(kinds),
            exchanged=narrow,
            output=4 * 4 * config["out_dim"] * local,  # patches of the velocity in float32
        )


def _model() -> Any:
    from talkingdit.families.wan_i2v.model import WanI2VModel

    return WanI2VModel


def _translate(values: Mapping[str, Any], where: object) -> dict[str, Any]:
    from talkingdit.families.wan_i2v.config import translate

    return translate(values, where)


def _settings(folder: Path | None) -> Any:
    from talkingdit.families.wan_i2v.checkpoint import WanI2VSettings, read_settings

    return WanI2VSettings() if folder is None else read_settings(folder)


SUBSETS: Mapping[str, tuple[str, ...]] = {}
LORA_TARGETS: tuple[str, ...] = (".q", ".k", ".v", ".o", ".ffn.0", ".ffn.2")
SWITCHES = ALL_SWITCHES
CAST: tuple[str, ...] = ("text_embedding.", "img_emb.")

COST = WanCost("Wan I2V", "wan_i2v_14b_480p", PRESETS, _model, _translate, _settings)
complete, read_config, default_clip = COST.complete, COST.read_config, COST.default_clip
frozen_parts, parameters, heads, tokens = COST.frozen_parts, COST.parameters, COST.heads, COST.tokens
flops, attention_flops, conditions, step = COST.flops, COST.attention_flops, COST.conditions, COST.step
autoencoder, speech, activations = COST.autoencoder, COST.speech, COST.activations

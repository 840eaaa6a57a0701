# SPDX-License-Identifier: Apache-2.0
"""Memory and work of Wan-S2V, see `talkingdit.plan.cost`. Tests hold the formulas against counts of the real code."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from talkingdit.checkpoints.bounds import check_counts
from talkingdit.errors import UserError
from talkingdit.families.wan_s2v.presets import PRESETS
from talkingdit.families.wan_s2v.units import walk
from talkingdit.nn.units import FFN_TOKENS
from talkingdit.pipelines.memory import Memory
from talkingdit.plan import shipped
from talkingdit.plan.clip import ClipShape, latents_of
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

SUBSETS: Mapping[str, tuple[str, ...]] = {"audio": ("casual_audio_encoder.", "audio_injector.")}
LORA_TARGETS: tuple[str, ...] = (".q", ".k", ".v", ".o", ".ffn.0", ".ffn.2")
SWITCHES = ALL_SWITCHES
CAST: tuple[str, ...] = ("text_embedding.", "audio_injector.injector_adain")

# The Wan 2.1 autoencoder, counted while it runs: elements alive per pixel of a frame at the worst moment, by width of
# an element (norms of narrow dtypes hold wide copies). It works frame by frame, so they do not grow with the length.
VAE_PARAMETERS = 126_892_531
VAE_DECODE = {4: 4865, 2: 5061}
VAE_ENCODE = {4: 3310, 2: 3507}
TILE = 256  # pixels of a side of diffusers' tiles
TEXT_PARAMETERS = 5_680_910_336  # the encoder of UMT5-XXL
TEXT_WIDTH = 4096  # of its features
SPEECH_PARAMETERS = 315_438_720  # wav2vec2-large
INT8_SUMS = 1 << 27  # bytes of a product's int32 sums that `ops.eight_bit_linear` has at once
SPEECH_HEARING = 13.2e6  # bytes alive per second of voice at its worst moment, counted

# ---- The model and its clips -----------------------------------------------------------------------------------------


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**PRESETS["wan_s2v_14b"], **config}


def read_config(folder: Path) -> dict[str, Any]:
    """Arguments of the transformer that config.json, or transformer/config.json, says.

    Raises:
        UserError: there is none, or it is not readable or of a variant that is not supported.
    """
    from talkingdit.checkpoints.weights import read_bounded
    from talkingdit.families.wan_s2v.config import translate

    file = next((f for f in (folder / "config.json", folder / "transformer" / "config.json") if f.is_file()), None)
    if file is None:
        raise UserError(f"{folder}: no config.json and no transformer/config.json in it.")
    found = translate(read_bounded(file), file)
    check_counts(found, PRESETS["wan_s2v_14b"], file)
    return found


def default_clip(config: Mapping[str, Any], folder: Path | None = None) -> ClipShape:
    """832 x 448 pixels, guided, with the history that the model takes; length and steps as the checkpoint has them."""
    from talkingdit.families.wan_s2v.checkpoint import WanS2VSettings, read_settings

    settings = WanS2VSettings() if folder is None else read_settings(folder)
    return ClipShape(
        height=448,
        width=832,
        latents=latents_of(settings.infer_frames),
        history=config["motion_frames"][1],
        steps=settings.steps,
        branches=1 if settings.guidance == 1 else 2,
        batched=settings.guidance != 1,
    )


def released(config: Mapping[str, Any]) -> bool:
    """Do the released text encoder and what stands beside it fit the transformer? If not, those that ship do."""
    return config["text_dim"] == TEXT_WIDTH


def frozen_parts(config: Mapping[str, Any], dtype: torch.dtype, folder: Path | None = None) -> FrozenParts:
    """Autoencoder and speech encoder are float32; files of a folder tell the sizes of what they hold."""
    sizes: dict[str, int] = {
        TEXT_ENCODER: TEXT_PARAMETERS * dtype.itemsize,
        AUTOENCODER: VAE_PARAMETERS * 4,
        SPEECH_ENCODER: SPEECH_PARAMETERS * 4,
    }
    if not released(config):
        sizes = dict(shipped.frozen_parts().sizes)
    if folder is not None:
        sizes[TEXT_ENCODER] = (
            _file_bytes(folder, ("models_t5*.pth", "text_encoder/*.safetensors")) or sizes[TEXT_ENCODER]
        )
        sizes[AUTOENCODER] = _file_bytes(folder, ("*VAE*.pth", "vae/*.safetensors")) or sizes[AUTOENCODER]
    return FrozenParts(sizes)


def _file_bytes(folder: Path, patterns: tuple[str, ...]) -> int:
    """Bytes of the files of a part."""
    return sum(file.stat().st_size for pattern in patterns for file in folder.glob(pattern))


def parameters(config: Mapping[str, Any]) -> dict[str, Parameter]:
    from talkingdit.checkpoints.fill import without_memory
    from talkingdit.families.wan_s2v.network import WanS2VNetwork

    with without_memory():
        model = WanS2VNetwork(**config)
    kept = WanS2VNetwork._keep_in_fp32_modules
    return {name: Parameter(tuple(p.shape), any(word in name for word in kept)) for name, p in model.named_parameters()}


def heads(config: Mapping[str, Any]) -> int:
    return config["num_heads"]


def tokens(config: Mapping[str, Any], clip: ClipShape) -> tuple[int, int]:
    """Noisy tokens and all tokens of a sample."""
    from talkingdit.families.wan_s2v.sequence import tokens_of

    height, width = clip.height // 8, clip.width // 8
    total = tokens_of(config, clip.latents, height, width, reference=True, history=clip.history)
    return clip.latents * (height // 2) * (width // 2), total


def _audio_tokens(config: Mapping[str, Any]) -> int:
    """Tokens of audio per latent frame, the learned one included."""
    return config["num_audio_token"] + 1


# ---- Work ------------------------------------------------------------------------------------------------------------


def flops(config: Mapping[str, Any], clip: ClipShape, memory: Memory | None = None) -> float:
    """Floating point operations of one forward of one branch: matrix products and attention, 2 per multiply-add."""
    memory = Memory() if memory is None else memory
    noisy, total = tokens(config, clip)
    dim, ffn, text = config["dim"], config["ffn_dim"], config["text_len"]
    block = 12 * total * dim**2 + 4 * total * dim * ffn + 4 * total * text * dim
    keys = _audio_tokens(config)
    if memory.absorb_audio:
        inject = 2 * noisy * dim**2 + 2 * noisy * keys * dim + 2 * noisy * keys * config["num_heads"] * dim
    else:
        inject = 4 * noisy * dim**2 + 4 * noisy * keys * dim
    if memory.offload != "none":
        block += 4 * text * dim**2
    ends = 2 * noisy * dim * 4 * (config["in_dim"] + config["out_dim"])
    products = config["num_layers"] * block + len(config["audio_inject_layers"]) * inject + ends
    return products + attention_flops(config, clip)


def attention_flops(config: Mapping[str, Any], clip: ClipShape) -> float:
    """What of them is attention over the whole sequence."""
    return 4.0 * config["num_layers"] * tokens(config, clip)[1] ** 2 * config["dim"]


# ---- Memory of generation --------------------------------------------------------------------------------------------


def conditions(config: Mapping[str, Any], clip: ClipShape, memory: Memory, size: int) -> float:
    """Bytes kept for all steps: of every branch, batched or not.

    Raises:
        ValueError: a pose video for a model without a place for it.
    """
    if clip.pose and not config["cond_dim"]:
        raise ValueError("plan: this model takes no pose video")
    noisy, total = tokens(config, clip)
    dim, text = config["dim"], config["text_len"]
    audio = clip.latents * _audio_tokens(config)
    injections = len(config["audio_inject_layers"])
    elements = (total - noisy) * dim + text * dim + audio * dim
    if config["enable_adain"]:
        elements += injections * 2 * clip.latents * dim
    if clip.pose:
        elements += noisy * dim
    if memory.offload == "none":  # offloaded layers make their keys and values in every step
        elements += config["num_layers"] * 2 * text * dim
        elements += injections * audio * dim * (1 + config["num_heads"] if memory.absorb_audio else 2)
    return clip.branches * elements * size


def step(config: Mapping[str, Any], clip: ClipShape, memory: Memory, size: int) -> float:
    """Bytes of one forward at its worst moment, beyond weights and conditions."""
    noisy, total = (n * clip.batch for n in tokens(config, clip))
    dim = config["dim"]
    whole, only_noisy = total * dim * size, noisy * dim * size
    wide = max(4, size)
    residual = total * dim * (wide if memory.residual == "float32" else size)
    if memory.offload != "none":
        residual *= 2  # hooks keep what a block was given beside what it makes
    weights = noisy * config["num_heads"] * _audio_tokens(config)
    hidden = min(total, clip.batch * FFN_TOKENS) * config["ffn_dim"]
    codes = total * dim  # of the input, where layers compute in eight bits: beside what they make, not overwritten
    eight_bit = memory.precision != "native"
    moments = [
        # normalised input, q, k, v and the result, with the statistics of the softmax
        residual + 4 * whole + (codes if eight_bit else whole) + 4 * total * config["num_heads"],
        # input and a slice of the hidden layer; adapters, which are not counted, keep it before the activation, too
        residual + whole + (codes + hidden * (size + 1) if eight_bit else hidden * size),
        # normalised input, query and result; absorbed: scores and softmax too
        residual + 3 * only_noisy + (2 * weights * (size + wide) if memory.absorb_audio else 0),
        # the head in float32
        residual + noisy * dim * wide,
        # at the beginning: patches beside the whole sequence, narrow and wide
        residual + whole + only_noisy,
    ]
    sums = min(INT8_SUMS, 4 * max(codes, hidden)) if memory.precision == "int8" else 0
    copies = 6 + clip.batch  # of the latents in float32: what a solver of second order keeps, and the input
    return max(moments) + sums + 4 * copies * config["in_dim"] * clip.latents * clip.pixels / 64


def autoencoder(config: Mapping[str, Any], clip: ClipShape, memory: Memory, width: int) -> dict[str, float]:
    """Bytes of decoding the clip's frames and of encoding its history."""
    if not released(config):
        return shipped.autoencoder(clip, width, video=True)
    frames = 3 * 4 * clip.frames * clip.pixels  # float32
    if memory.vae == "tiled":
        area = min(clip.pixels, TILE**2)
        everything = 3 * 4 * (4 * (clip.latents + max(clip.history, 1))) * clip.pixels
        decode = area * VAE_DECODE[width] * width + 2 * everything
        # Tiles are encoded all frames at once per tile, piece by piece.
        encode = area * VAE_ENCODE[width] * width
    else:
        decode = clip.pixels * VAE_DECODE[width] * width + frames
        encode = clip.pixels * VAE_ENCODE[width] * width
    past = 3 * (4 + width) * max(1, 4 * clip.history - 3) * clip.pixels
    return {"decode": decode, "encode": encode + past + frames}


def speech(config: Mapping[str, Any], folder: Path | None = None) -> SpeechCost:
    """The speech encoder is float32, and so are its features; all of its layers are kept."""
    from talkingdit.families.wan_s2v.checkpoint import WanS2VSettings, read_settings

    fps = (WanS2VSettings() if folder is None else read_settings(folder)).fps
    return SpeechCost(
        SPEECH_HEARING if released(config) else 0.0, 4.0 * config["audio_layers"] * config["audio_dim"] * fps, fps
    )


# ---- Memory of training ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Kept:
    """Of a kind of unit: bytes kept for its backward by mode of checkpointing, and all that is alive in it."""

    off: float
    selective: float
    whole: float

    def kept(self, checkpointing: str) -> float:
        return {"off": self.off, "selective": self.selective, "full": 0.0}[checkpointing]


def activations(config: Mapping[str, Any], run: TrainingRun, mesh: MeshSizes, size: int) -> Activations:
    """What a rank keeps and sends of a micro-batch.

    In units of tokens x dim a block keeps for its backward, besides the residual stream at its input and two more of
    it: 15 and 2 times ffn_dim / dim. Where a sequence is shared 13, the exchanged q, k and v (3), and gathered keys and
    values (2 per place of the ring). Frozen linear layers keep no inputs. Adapters keep what is between their matrices,
    of 8 over the tokens; behind the feed-forward's first layer they scale a gradient as wide as it.
    """
    dim, wide, ring = config["dim"], config["ffn_dim"] / config["dim"], mesh.ring
    noisy, total = tokens(config, run.clip)
    local = math.ceil(total / mesh.context)
    stream, narrow, only_noisy = local * dim * 4, local * dim * size, min(noisy, local) * dim * size
    saved = 15 if mesh.context == 1 else 13 + 3 * (mesh.ulysses > 1) + 2 * ring * (ring > 1)
    hidden = 1 if run.trains == "audio" else 2  # ffn_dim wide tensors that are kept
    saved -= 2 if run.trains == "audio" else 0
    # All that is alive in a block's backward beyond its input: in its feed-forward, or in the attention of a long ring.
    saved += 8 * run.lora_rank / dim if run.trains == "lora" else 0
    whole = (saved + (hidden + 1) * wide) * narrow + 3 * stream
    if ring > 1:
        whole = max(whole, (4 * ring + 8) * narrow + 2 * stream)
    block = Kept((saved + hidden * wide) * narrow + 2 * stream, (9 + wide) * narrow, whole)
    injection = Kept(4 * only_noisy, 3 * only_noisy, 8 * only_noisy + 2 * stream)
    kinds = {path: block if path.startswith("blocks.") else injection for path in walk(config)}
    # An injection is given a view, the noisy tokens: as it is it keeps the whole stream, a copy is only as large.
    part = stream if run.inputs == "float32" else min(noisy, local) * dim * 4
    given = {path: stream if kind is block else part for path, kind in kinds.items()}
    kept = {path: kind.kept(run.checkpointing) for path, kind in kinds.items()}
    scaled = {
        path: (wide - 1) * narrow if run.trains == "lora" and kind is block else 0 for path, kind in kinds.items()
    }
    multiplying = {path: kind.whole - kept[path] for path, kind in kinds.items()}
    return Activations(
        streams=given,
        kept=kept,
        working={path: multiplying[path] + scaled[path] for path in kinds},
        multiplying=multiplying,
        again={path: kind.kept("off") - kept[path] for path, kind in kinds.items()},
        conditions=_training_conditions(config, run.clip, size),
        attending=frozenset(path for path, kind in kinds.items() if kind is block),
        exchanged=narrow,
        output=4 * 4 * config["out_dim"] * local,  # patches of the velocity in float32
    )


def _training_conditions(config: Mapping[str, Any], clip: ClipShape, size: int) -> float:
    """Bytes of a micro-batch's inputs, and of what is made of them before the first block."""
    dim, text = config["dim"], config["text_len"]
    area = clip.pixels / 64  # of a latent frame
    found = 4 * area * clip.latents * (2 * config["in_dim"] + config["cond_dim"])
    found += (4 + size) * area * clip.history * config["in_dim"]
    found += 4 * text * config["text_dim"] + 4 * size * dim * text
    return found + 2 * size * len(config["audio_inject_layers"]) * clip.latents * dim

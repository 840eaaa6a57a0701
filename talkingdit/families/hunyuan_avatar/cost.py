# SPDX-License-Identifier: Apache-2.0
"""Memory and work of HunyuanVideo-Avatar, see `talkingdit.plan.cost`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from talkingdit.errors import UserError
from talkingdit.families.hunyuan_avatar.presets import PRESETS
from talkingdit.families.hunyuan_avatar.units import hears, walk
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

SUBSETS: Mapping[str, tuple[str, ...]] = {"audio": ("audio_proj.", "audio_adapter_blocks.")}
LORA_TARGETS: tuple[str, ...] = (
    *("img_attn_qkv", "img_attn_proj", "img_mlp.fc1", "img_mlp.fc2", "txt_attn_qkv", "txt_attn_proj", "txt_mlp.fc1"),
    *("txt_mlp.fc2", "linear1", "linear2"),
)
SWITCHES = ALL_SWITCHES
CAST: tuple[str, ...] = ("txt_in.", "audio_proj.")

# Counted from the configurations of the released parts.
TEXT_PARAMETERS = 8_355_000_000 + 123_060_480  # LLaVA on Llama 3 8B, and the text model of CLIP-L
VAE_PARAMETERS = 246_490_000
SPEECH_PARAMETERS = 8_208_384  # the encoder of whisper-tiny
SPEECH_HEARING = 4.0e6  # bytes alive per second of voice
TEXT_WIDTH = 4096  # of LLaVA's features
TEXT_TOKENS = 831  # of a prompt with its picture, as the released program pads it
# Elements alive per pixel of a tile while the autoencoder runs; its tiles have 256 pixels and 64 frames.
TILE, TILE_FRAMES, VAE_ELEMENTS = 256, 65, 780

# ---- The model and its clips -----------------------------------------------------------------------------------------


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**PRESETS["hunyuan_avatar_13b"], **config}


def read_config(folder: Path) -> dict[str, Any]:
    """Arguments of the transformer of a checkpoint folder, by its config.json or the shapes of its weights.

    Raises:
        UserError: there is none, or it is not readable.
    """
    from talkingdit.families.hunyuan_avatar.checkpoint import find_parts
    from talkingdit.families.hunyuan_avatar.load import loads, read_config

    if loads(folder):
        return read_config(folder)
    place = find_parts(folder).transformer
    if not loads(place):
        raise UserError(f"{place}: no transformer of HunyuanVideo-Avatar in it.")
    return read_config(place)


def default_clip(config: Mapping[str, Any], folder: Path | None = None) -> ClipShape:
    """A window of 704 x 704 pixels, or of the drawn world's; guided, as the checkpoint has it."""
    from talkingdit.families.hunyuan_avatar.checkpoint import HunyuanAvatarSettings, read_settings

    settings = HunyuanAvatarSettings() if folder is None else read_settings(folder)
    small = folder is None and not released(config)
    side = shipped.SIDE if small else settings.image_size // 16 * 16
    return ClipShape(
        height=side,
        width=side,
        latents=shipped.LATENTS if small else settings.window,
        history=0,
        steps=settings.steps,
        branches=2,
        batched=True,
    )


def released(config: Mapping[str, Any]) -> bool:
    """Do the released text encoders and what stands beside them fit the transformer? If not, those that ship do."""
    return config["text_states_dim"] == TEXT_WIDTH


def text_tokens(config: Mapping[str, Any]) -> int:
    """Of a prompt."""
    return TEXT_TOKENS if released(config) else shipped.TEXT_TOKENS


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
        from talkingdit.families.hunyuan_avatar.checkpoint import find_parts

        parts = find_parts(folder)
        text = [part for part in (parts.text_encoder, parts.pooled_encoder) if part is not None]
        places = {TEXT_ENCODER: text, AUTOENCODER: [parts.vae]}
        places[SPEECH_ENCODER] = [] if parts.audio_encoder is None else [parts.audio_encoder]
        sizes = {name: sum(map(_file_bytes, folders)) for name, folders in places.items()}
    return FrozenParts(sizes)


def _file_bytes(folder: Path) -> int:
    """Bytes of the weights in a folder."""
    endings = (".safetensors", ".pt", ".bin", ".pth")
    return sum(file.stat().st_size for file in folder.rglob("*") if file.suffix in endings)


def parameters(config: Mapping[str, Any]) -> dict[str, Parameter]:
    import torch

    from talkingdit.families.hunyuan_avatar.model import HunyuanAvatarModel

    with torch.device("meta"):
        model = HunyuanAvatarModel(**config)
    return {name: Parameter(tuple(p.shape), False) for name, p in model.named_parameters()}


def heads(config: Mapping[str, Any]) -> int:
    return config["num_heads"]


def tokens(config: Mapping[str, Any], clip: ClipShape) -> tuple[int, int]:
    """Video tokens and all tokens of a sample."""
    from talkingdit.families.hunyuan_avatar.sequence import tokens_of

    height, width = clip.height // 8, clip.width // 8
    total = tokens_of(config, clip.latents, height, width, reference=True, text=text_tokens(config))
    return clip.latents * (height // 2) * (width // 2), total


def _blocks(config: Mapping[str, Any]) -> int:
    return config["depth_double_blocks"] + config["depth_single_blocks"]


def _adapters(config: Mapping[str, Any]) -> int:
    return sum(hears(i) for i in range(config["depth_double_blocks"]))


def _audio_tokens(config: Mapping[str, Any]) -> int:
    """Tokens of audio per latent frame."""
    return 4 * config["audio_tokens"]


# ---- Work ------------------------------------------------------------------------------------------------------------


def flops(config: Mapping[str, Any], clip: ClipShape, memory: Memory | None = None) -> float:
    """Floating point operations of one forward of one branch: matrix products and attention, 2 per multiply-add."""
    video, total = tokens(config, clip)
    dim, inner, audio = config["hidden_size"], config["adapter_dim"], _audio_tokens(config)
    hidden = dim * config["mlp_width_ratio"]
    block = total * (8 * dim**2 + 4 * dim * hidden)
    modulation = 24 * config["depth_double_blocks"] * dim**2 + 6 * config["depth_single_blocks"] * dim**2
    adapter = 4 * video * dim * audio if memory is None or memory.offload == "none" else 4 * video * dim * inner
    words = text_tokens(config)
    refiner = config["refiner_depth"] * words * (24 * dim**2 + 4 * words * dim)
    text = 2 * words * dim * config["text_states_dim"] + refiner
    ends = 2 * video * dim * 4 * (config["in_channels"] + config["out_channels"])
    products = _blocks(config) * block + modulation + _adapters(config) * adapter + text + ends
    return products + attention_flops(config, clip)


def attention_flops(config: Mapping[str, Any], clip: ClipShape) -> float:
    """What of them is attention over the whole sequence."""
    return 4.0 * _blocks(config) * tokens(config, clip)[1] ** 2 * config["hidden_size"]


# ---- Memory of generation --------------------------------------------------------------------------------------------


def conditions(config: Mapping[str, Any], clip: ClipShape, memory: Memory, size: int) -> float:
    """Bytes kept for all steps: of every branch, batched or not.

    Raises:
        ValueError: a pose video, for which the model has no place.
    """
    if clip.pose:
        raise ValueError("plan: this model takes no pose video")
    video, total = tokens(config, clip)
    dim, audio = config["hidden_size"], clip.latents * _audio_tokens(config)
    elements = (total - text_tokens(config)) * dim + audio * dim  # reference, what it adds, audio tokens
    elements += text_tokens(config) * config["text_states_dim"]
    if memory.offload == "none":  # offloaded layers make their keys and values in every step
        elements += _adapters(config) * audio * 2 * dim
    return clip.branches * (elements * size + 4 * video)


def step(config: Mapping[str, Any], clip: ClipShape, memory: Memory, size: int) -> float:
    """Bytes of one forward at its worst moment, beyond weights and conditions."""
    video, total = (n * clip.batch for n in tokens(config, clip))
    dim, ratio = config["hidden_size"], config["mlp_width_ratio"]
    whole = total * dim * size
    wide = max(4, size)
    residual = total * dim * (wide if memory.residual == "float32" else size)
    if memory.offload != "none":
        residual *= 2  # hooks keep what a block was given beside what it makes
    moments = [
        # double block: q, k, v of image and text, the same together, and normalised ones
        residual + 8 * whole,
        # input and a slice of the hidden layer; adapters, which are not counted, keep it before the activation, too
        residual + whole + min(total, clip.batch * FFN_TOKENS) * dim * ratio * size,
        # single block: q, k, v and the hidden layer in one, normalised q and k, and the result
        residual + (6 + ratio) * whole,
        # adapter: normalised input and, where nothing is folded in, query and result
        residual + 2 * video * dim * size,
        # the last layer in float32
        residual + video * dim * wide,
    ]
    copies = 6 + clip.batch  # of the latents in float32
    return max(moments) + 4 * copies * config["in_channels"] * clip.latents * clip.pixels / 64


def autoencoder(config: Mapping[str, Any], clip: ClipShape, memory: Memory, width: int) -> dict[str, float]:
    """Bytes of decoding the clip's frames and of encoding a still video; the released one always in tiles."""
    if not released(config):
        return shipped.autoencoder(clip, width, video=True)
    everything = 3 * 4 * 4 * clip.latents * clip.pixels
    tile = min(clip.pixels, TILE**2) * min(4 * clip.latents, TILE_FRAMES) * VAE_ELEMENTS * width / 4
    return {"decode": tile + 2 * everything, "encode": tile + everything}


def speech(config: Mapping[str, Any], folder: Path | None = None) -> SpeechCost:
    """The speech encoder is float32, and so are its features, of which every video frame has a window."""
    from talkingdit.families.hunyuan_avatar.checkpoint import HunyuanAvatarSettings, read_settings

    fps = (HunyuanAvatarSettings() if folder is None else read_settings(folder)).fps
    return SpeechCost(
        SPEECH_HEARING if released(config) else 0.0, 4.0 * config["audio_blocks"] * config["audio_channels"] * 50, fps
    )


# ---- Memory of training ----------------------------------------------------------------------------------------------


def activations(config: Mapping[str, Any], run: TrainingRun, mesh: MeshSizes, size: int) -> Activations:
    """What a rank keeps and sends of a micro-batch.

    In units of tokens x dim a block keeps for its backward, besides the residual stream at its input: 12 and 3 times
    mlp_width_ratio; exchanged q, k and v (3), and gathered keys and values (2 per place of the ring), where a sequence
    is shared.
    """
    dim, ratio, ring = config["hidden_size"], config["mlp_width_ratio"], mesh.ring
    video, total = tokens(config, run.clip)
    local = math.ceil(total / mesh.context)
    stream, narrow, only_video = local * dim * 4, local * dim * size, min(video, local) * dim * size
    saved = 12 + 3 * (mesh.ulysses > 1) + 2 * ring * (ring > 1) + 3 * ratio
    selective = (9 + ratio) * narrow
    whole = (saved + 2 + ratio) * narrow + 3 * stream
    kept, working, again = {}, {}, {}
    for path in walk(config):
        is_block = path.split(".")[0] in ("double_blocks", "single_blocks")
        off = saved * narrow + 2 * stream if is_block else 3 * only_video + stream
        alive = whole if is_block else 6 * only_video + 3 * stream
        partly = selective if is_block else 2 * only_video
        kept[path] = {"off": off, "selective": partly, "full": 0.0}[run.checkpointing]
        working[path], again[path] = alive - kept[path], off - kept[path]
    area = run.clip.pixels / 64
    inputs = (
        4 * area * run.clip.latents * 3 * config["in_channels"] + 4 * text_tokens(config) * config["text_states_dim"]
    )
    refined = (config["refiner_depth"] * 16 + 4) * text_tokens(config) * dim * size
    return Activations(
        streams=dict.fromkeys(kept, stream),
        kept=kept,
        working=working,
        multiplying=working,
        again=again,
        conditions=inputs + refined + 3 * only_video,
        attending=frozenset(path for path in walk(config) if "adapter" not in path),
        exchanged=narrow,
        output=4 * 4 * config["out_channels"] * local,
    )

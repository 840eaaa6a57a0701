# SPDX-License-Identifier: Apache-2.0
"""What generating with a Wan-S2V model will take, before anything is loaded: memory of every phase, and time.

Memory is added up from the architecture: weights from a model without storage, the rest from formulas of what is alive
at the worst moment of each phase. Tests hold them against a count of all live tensors while the real code runs
(docs/memory.md). Time is the number of floating point operations by an assumed speed of the card: an estimate.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from talkingdit.errors import UserError
from talkingdit.families.wan_s2v.units import FFN_TOKENS
from talkingdit.pipelines.memory import LARGE, Memory

GB = 1e9
GIB = 2**30

# Memory in GiB, and dense bfloat16 TFLOP/s as the makers state them.
CARDS: dict[str, tuple[float, float]] = {
    "rtx3090": (24, 71),
    "rtx4090": (24, 165),
    "rtx5090": (32, 210),
    "l40s": (48, 362),
    "a100-40": (40, 312),
    "a100-80": (80, 312),
    "h100": (80, 989),
    "h200": (141, 989),
}
EFFICIENCY = 0.5  # of the stated speed that large products and attention reach
HOST_TO_DEVICE = 20e9  # bytes per second over PCIe 4, pinned
CONTEXT = 0.8 * GIB  # driver context, library workspaces
SLACK = 1.04  # what the allocator loses to rounding and fragmentation

# The Wan 2.1 autoencoder, counted while it runs: elements alive per picture pixel at the worst moment, by dtype width
# (norms of narrow dtypes hold wide copies). It works picture by picture, so they do not grow with the length.
VAE_PARAMETERS = 126_892_531
VAE_DECODE = {4: 4865, 2: 5061}
VAE_ENCODE = {4: 3310, 2: 3507}
TILE = 256  # pixels of a side of diffusers' tiles
TEXT_PARAMETERS = 5_680_910_336  # the encoder of UMT5-XXL
SPEECH_PARAMETERS = 315_438_720  # wav2vec2-large


@dataclass(frozen=True)
class ClipShape:
    """What is generated.

    Args:
        height, width: pixels, multiples of 16.
        latents: latent frames of a clip, four pictures each.
        history: latent frames of history; 0 for a first clip.
        steps: denoising steps.
        branches: predictions per step, 2 with guidance.
        batched: all branches in one forward.
        pose: with a pose video.
    """

    height: int = 448
    width: int = 832
    latents: int = 20
    history: int = 19
    steps: int = 40
    branches: int = 2
    batched: bool = False
    pose: bool = False

    def __post_init__(self) -> None:
        if self.height < 16 or self.width < 16 or self.height % 16 or self.width % 16:
            raise ValueError(f"plan: sides must be multiples of 16 pixels, got {self.width} x {self.height}")

    @property
    def batch(self) -> int:
        return self.branches if self.batched else 1

    @property
    def pixels(self) -> int:
        return self.height * self.width


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of the weights."""

    transformer: dict[str, int]  # of every parameter
    text_encoder: int
    vae: int
    speech_encoder: int
    vae_bytes: int = 4  # per element


@dataclass(frozen=True)
class Plan:
    """A prediction, in bytes and seconds."""

    weights: dict[str, float]  # by part, what stays on the card
    conditions: float  # what is kept for all steps of a clip
    phases: dict[str, float]  # what each phase needs at its worst moment beyond the weights
    flops_per_step: float  # of all branches
    seconds_per_clip: float | None
    memory: Memory
    clip: ClipShape

    @property
    def peak(self) -> float:
        """Bytes alive at the worst moment."""
        return sum(self.weights.values()) + max(self.phases.values())

    @property
    def needed(self) -> float:
        """Bytes that a card should have: the peak, the allocator's losses and the driver's context."""
        return SLACK * self.peak + CONTEXT


def parameters(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, int]:
    """Bytes of every parameter of a transformer whose weights have `dtype`."""
    from talkingdit.families.wan_s2v.model import WanS2VModel

    with torch.device("meta"):
        model = WanS2VModel(**config)
    kept: Any = WanS2VModel._keep_in_fp32_modules
    return {
        name: p.numel() * (4 if any(word in name for word in kept) else dtype.itemsize)
        for name, p in model.named_parameters()
    }


def tokens(config: Mapping[str, Any], clip: ClipShape) -> tuple[int, int]:
    """Noisy tokens and all tokens of a sample."""
    from talkingdit.families.wan_s2v.sequence import tokens_of

    height, width = clip.height // 8, clip.width // 8
    total = tokens_of(config, clip.latents, height, width, reference=True, history=clip.history)
    return clip.latents * (height // 2) * (width // 2), total


def _conditions(config: Mapping[str, Any], clip: ClipShape, memory: Memory, size: int) -> float:
    """Bytes kept for all steps: of every branch, batched or not."""
    noisy, total = tokens(config, clip)
    dim, text = config["dim"], config["text_len"]
    heard = clip.latents * (config["num_audio_token"] + 1)
    injections = len(config["audio_inject_layers"])
    elements = (total - noisy) * dim + text * dim + heard * dim
    if config["enable_adain"]:
        elements += injections * 2 * clip.latents * dim
    if clip.pose:
        elements += noisy * dim
    if memory.offload == "none":  # offloaded layers make their keys and values in every step
        elements += config["num_layers"] * 2 * text * dim
        elements += injections * heard * dim * (1 + config["num_heads"] if memory.absorb_audio else 2)
    return clip.branches * elements * size


def _step(config: Mapping[str, Any], clip: ClipShape, memory: Memory, size: int) -> float:
    """Bytes of one forward at its worst moment, beyond weights and conditions."""
    noisy, total = (n * clip.batch for n in tokens(config, clip))
    dim, heads = config["dim"], config["num_heads"]
    unit, heard = total * dim * size, noisy * dim * size
    wide = max(4, size)
    residual = total * dim * (wide if memory.residual == "float32" else size)
    if memory.offload != "none":
        residual *= 2  # hooks keep what a block was given beside what it makes
    weights = noisy * heads * (config["num_audio_token"] + 1)
    moments = [
        # normalised input, q, k, v and the result, with the statistics of the softmax
        residual + 5 * unit + 4 * total * heads,
        # input and a slice of the hidden layer before and behind the activation
        residual + unit + 2 * min(total, clip.batch * FFN_TOKENS) * config["ffn_dim"] * size,
        # normalised input, query and result; absorbed: scores and softmax too
        residual + 3 * heard + (2 * weights * (size + wide) if memory.absorb_audio else 0),
        # the head in float32
        residual + noisy * dim * wide,
        # at the beginning: patches beside the whole sequence, narrow and wide
        residual + unit + heard,
    ]
    copies = 6 + clip.batch  # of the latents in float32: what a solver of second order keeps, and the input
    return max(moments) + 4 * copies * config["in_dim"] * clip.latents * clip.pixels / 64


def _vae(clip: ClipShape, memory: Memory, width: int) -> dict[str, float]:
    """Bytes of decoding the clip's pictures and of encoding its history."""
    shown = 3 * 4 * (4 * clip.latents) * clip.pixels  # the pictures, float32
    if memory.vae == "tiled":
        area = min(clip.pixels, TILE**2)
        everything = 3 * 4 * (4 * (clip.latents + max(clip.history, 1))) * clip.pixels
        decode = area * VAE_DECODE[width] * width + 2 * everything
        # Tiles of pictures are encoded all frames at once per tile, piece by piece.
        encode = area * VAE_ENCODE[width] * width
    else:
        decode = clip.pixels * VAE_DECODE[width] * width + shown
        encode = clip.pixels * VAE_ENCODE[width] * width
    past = 3 * (4 + width) * max(1, 4 * clip.history - 3) * clip.pixels
    return {"decode": decode, "encode": encode + past + shown}


def _resident(parts: WeightBytes, memory: Memory, clip: ClipShape, size: int) -> dict[str, float]:
    """Weights on the card by part."""
    sizes = parts.transformer
    if memory.weights != "native":
        narrow = [n for n in sizes if n.startswith(LARGE) and n.endswith("weight") and "norm" not in n]
        if memory.weights == "cast_fp8":
            narrow += [n for n in sizes if n.startswith(("text_embedding.", "audio_injector.injector_adain"))]
            narrow += [n for n in sizes if n.startswith(LARGE) and n.endswith("bias") and "norm" not in n]
        sizes = {name: value // size if name in set(narrow) else value for name, value in sizes.items()}
    total = float(sum(sizes.values()))
    if memory.offload != "none":
        blocks: dict[str, int] = {}
        for name, value in sizes.items():
            if memory.offload == "block" and name.startswith(LARGE):
                key = ".".join(name.split(".")[: 2 + name.count("injector.")])
            else:
                key = name.rpartition(".")[0]
            if memory.offload == "leaf" or name.startswith(LARGE):
                blocks[key] = blocks.get(key, 0) + value
        total += 2 * max(blocks.values()) - sum(blocks.values())  # one at work, one on its way
    if memory.weights == "cast_fp8":
        largest = max(value for name, value in parts.transformer.items() if name.startswith(LARGE))
        total += largest  # one layer at a time is widened
    return {
        "transformer": total,
        "text encoder": float(parts.text_encoder if memory.text_encoder == "device" else 0),
        "autoencoder": float(parts.vae),
        "speech encoder": float(parts.speech_encoder),
    }


def flops(config: Mapping[str, Any], clip: ClipShape, memory: Memory | None = None) -> float:
    """Floating point operations of one forward of one branch: matrix products and attention, 2 per multiply-add."""
    memory = Memory() if memory is None else memory
    noisy, total = tokens(config, clip)
    dim, ffn, text = config["dim"], config["ffn_dim"], config["text_len"]
    block = 12 * total * dim**2 + 4 * total * dim * ffn + 4 * total**2 * dim + 4 * total * text * dim
    keys = config["num_audio_token"] + 1
    if memory.absorb_audio:
        inject = 2 * noisy * dim**2 + 2 * noisy * keys * dim + 2 * noisy * keys * config["num_heads"] * dim
    else:
        inject = 4 * noisy * dim**2 + 4 * noisy * keys * dim
    if memory.offload != "none":
        block += 4 * text * dim**2
    ends = 2 * noisy * dim * 4 * (config["in_dim"] + config["out_dim"])
    return config["num_layers"] * block + len(config["audio_inject_layers"]) * inject + ends


def predict(
    config: Mapping[str, Any],
    parts: WeightBytes,
    clip: ClipShape,
    memory: Memory | None = None,
    dtype: torch.dtype = torch.bfloat16,
    tflops: float | None = None,
) -> Plan:
    """Memory and time of a clip.

    Args:
        config: of the transformer.
        parts: bytes of the weights.
        clip, memory: what to generate, and how.
        dtype: in which the transformer computes.
        tflops: dense TFLOP/s that the card is said to reach; None leaves time out.
    """
    from talkingdit.families.wan_s2v.presets import PRESETS

    config = {**PRESETS["wan_s2v_14b"], **config}
    memory = Memory() if memory is None else memory
    size = dtype.itemsize
    weights = _resident(parts, memory, clip, size)
    conditions = _conditions(config, clip, memory, size)
    phases = {"denoise": conditions + _step(config, clip, memory, size), **_vae(clip, memory, parts.vae_bytes)}
    work = clip.branches * flops(config, clip, memory)
    seconds = None
    if tflops is not None:
        step = work / (tflops * 1e12 * EFFICIENCY)
        if memory.offload != "none":
            forwards = 1 if clip.batched else clip.branches
            moved = _resident(parts, replace(memory, offload="none"), clip, size)["transformer"]
            step = max(step, forwards * moved / HOST_TO_DEVICE)
        seconds = clip.steps * step
    return Plan(weights, conditions, phases, work, seconds, memory, clip)


# Switches in the order in which they are tried: first those that change nothing in the video.
CHANGES: tuple[dict[str, Any], ...] = (
    {"text_encoder": "cpu"},
    {"offload": "block"},
    {"vae": "tiled"},
    {"residual": "compute"},
    {"weights": "cast_fp8"},
    {"offload": "leaf"},
)


def advice(plan: Plan, again: Callable[[Memory, ClipShape], Plan], card: float) -> Plan | None:
    """A prediction that fits a card, with as few switches as that takes; None if none does.

    Args:
        plan: what was asked for.
        again: makes a prediction.
        card: bytes.
    """
    clip = replace(plan.clip, batched=False)
    memory = plan.memory
    found = again(memory, clip)
    for change in CHANGES:
        if found.needed <= card:
            break
        if "weights" in change and memory.weights != "native":
            continue
        memory = replace(memory, **change)
        found = again(memory, clip)
    if found.needed > card:
        return None
    for change in CHANGES:
        without = replace(memory, **{name: getattr(plan.memory, name) for name in change})
        if without != memory and again(without, clip).needed <= card:
            memory = without
    return again(memory, clip)


def card_of(text: str) -> tuple[float, float | None]:
    """Bytes and TFLOP/s of a card by name, or bytes of a size such as 24GB.

    Raises:
        UserError: neither.
    """
    key = text.lower().replace(" ", "")
    if key in CARDS:
        memory, speed = CARDS[key]
        return memory * GIB, speed
    number = key.removesuffix("ib").removesuffix("b").removesuffix("g")
    try:
        size = float(number)
    except ValueError:
        size = 0.0
    if not size > 0:
        raise UserError(f"--card must be a size like 24GB or one of {', '.join(CARDS)}, got {text!r}.")
    return size * GIB, None


def source(name: str, dtype: torch.dtype) -> tuple[dict[str, Any], WeightBytes]:
    """Configuration and weights of a preset or a checkpoint folder. Nothing is loaded.

    WeightBytes that the folder does not tell are taken as those of the released model.

    Raises:
        UserError: neither a preset nor a folder with a readable config.json.
    """
    from talkingdit.families import preset, presets
    from talkingdit.families.wan_s2v.config import translate
    from talkingdit.families.wan_s2v.presets import PRESETS

    folder = Path(name)
    text: float = TEXT_PARAMETERS * dtype.itemsize
    vae: float = VAE_PARAMETERS * 4
    if folder.is_dir():
        file = next((f for f in (folder / "config.json", folder / "transformer" / "config.json") if f.is_file()), None)
        if file is None:
            raise UserError(f"{folder}: no config.json and no transformer/config.json in it.")
        try:
            values = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: not a readable JSON file ({error}).") from error
        config = {**PRESETS["wan_s2v_14b"], **translate(values, file)}
        text = _weights(folder, ("models_t5*.pth", "text_encoder/*.safetensors")) or text
        vae = _weights(folder, ("*VAE*.pth", "vae/*.safetensors")) or vae
    elif name in presets():
        config = {**PRESETS["wan_s2v_14b"], **preset(name)}
    else:
        raise UserError(f"{name}: neither a folder nor a preset ({', '.join(sorted(presets()))}).")
    return config, WeightBytes(parameters(config, dtype), int(text), int(vae), SPEECH_PARAMETERS * 4)


def _weights(folder: Path, patterns: tuple[str, ...]) -> int:
    """Bytes of the files of a part."""
    return sum(file.stat().st_size for pattern in patterns for file in folder.glob(pattern))


def report(plan: Plan, card: float, speed: float | None, better: Plan | None) -> str:
    """The prediction in words."""
    clip = plan.clip
    lines = [
        f"clip        {clip.width} x {clip.height}, {4 * clip.latents} pictures, {clip.steps} steps, "
        f"{clip.branches} predictions per step{' in one pass' if clip.batched and clip.branches > 1 else ''}",
        f"switches    {str(plan.memory) or 'none'}",
    ]
    lines += [f"{'weights':<12}{name:<16}{value / GB:8.2f} GB" for name, value in plan.weights.items() if value]
    lines += [f"{'phase':<12}{name:<16}{value / GB:8.2f} GB" for name, value in plan.phases.items()]
    lines.append(f"{'peak':<28}{plan.peak / GB:8.2f} GB")
    lines.append(
        f"{'needed':<28}{plan.needed / GB:8.2f} GB with the driver's context and {SLACK - 1:.0%} of fragmentation"
    )
    lines.append(f"{'card':<28}{card / GB:8.2f} GB")
    lines.append(f"work        {plan.flops_per_step / 1e15:.2f} PFLOP per step")
    if plan.seconds_per_clip is not None:
        lines.append(
            f"time        about {plan.seconds_per_clip:.0f} s of denoising per clip: an estimate from {speed:.0f} "
            f"TFLOP/s at {EFFICIENCY:.0%}, not measured"
        )
    else:
        lines.append("time        unknown: name a card, or give --tflops")
    if plan.needed <= card:
        lines.append("fits")
    elif better is None:
        lines.append("does not fit, with any switch: take a smaller size")
    else:
        words = [f"--memory {better.memory}"] if str(better.memory) else []
        if plan.clip.batched and plan.clip.branches > 1:
            words.append("--sequential")
        slower = ""
        if better.seconds_per_clip is not None:
            slower = f", about {better.seconds_per_clip:.0f} s per clip"
        lines.append(f"does not fit; with {' '.join(words)} it needs {better.needed / GB:.2f} GB{slower}")
    return "\n".join(lines)

# SPDX-License-Identifier: Apache-2.0
"""The long-video loops of four public systems, rebuilt on window_fusion, against numbers that their own code made."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from talkingdit import ops

GOLDEN = Path(__file__).parents[1] / "golden" / "long_video.safetensors"


def load(case: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(GOLDEN, "pt") as file:
        spec = json.loads(file.metadata()["spec"])["cases"][case]
        keys = [key for key in file.keys() if key.startswith(f"{case}/")]  # noqa: SIM118
        return spec, {key.split("/")[-2] + "/" + key.split("/")[-1]: file.get_tensor(key) for key in keys}


def denoise(windows: Tensor, audio: Tensor, text: float = 0.0, mask: float = 0.0) -> Tensor:
    """The stub that stood in for the network: windows [n, C, f, H, W], audio [n, f]."""
    f = windows.shape[2]
    ramp = 0.2 * (torch.arange(f) / (f - 1) - 0.5)
    frame = (ramp + 0.3 * audio + 0.1 * mask + 0.15 * text)[:, None, :, None, None]
    return 0.35 * windows + 0.25 * windows.mean(2, keepdim=True) + frame


def cut(x: Tensor, starts: list[int], frames: int) -> Tensor:
    index = (torch.tensor(starts)[:, None] + torch.arange(frames)) % x.shape[1]
    return x[:, index].transpose(0, 1)


def check(result: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (result.double() - expected.double()).square().mean() / expected.double().square().mean()
    assert float(error.sqrt()) <= tolerance


@pytest.mark.parametrize("case", ["sonic_default", "sonic_cfg"])
def test_sonic_shifted_windows(case: str) -> None:
    """Windows shift every step and wrap around the end; every window counts once (one fused step per sampler step)."""
    spec, data = load(case)
    x, audio, sigmas = data["in/latents"][0], data["in/audio"][0], data["in/sigmas"]
    frames, window, steps = spec["frames"], spec["window"], spec["steps"]
    for i in range(steps):
        starts = [s - i * spec["shift_offset"] for s in range(0, frames, window - spec["overlap"])]
        heard = cut(audio[None], starts, window)[:, 0]
        windows, dt = cut(x, starts, window), float(sigmas[i + 1] - sigmas[i])
        if spec["cfg"]:
            silent = torch.zeros_like(heard)
            predictions = [denoise(windows, silent, -0.5), denoise(windows, silent, 0.5), denoise(windows, heard, 0.5)]
            g1, g2 = 1.5 + 0.5 * i / (steps - 1), 2.5 + i / (steps - 1)
            rates = [1.0, dt * (1 - g1), dt * (g1 - g2), dt * g2]
        else:
            predictions, rates = [denoise(windows, heard, 0.5)], [1.0, dt]
        x = ops.fused_window_step(x, predictions, rates, starts, ops.counter_weights(len(starts), window))
    check(x, data["out/latents"][0], 1e-6)


@pytest.mark.parametrize("case", ["hunyuan_short", "hunyuan_long", "hunyuan_long_bf16", "hunyuan_cfg12"])
def test_hunyuan_avatar_shifted_windows(case: str) -> None:
    spec, data = load(case)
    audio, sigmas, steps = data["in/audio"][0], data["in/sigmas"], spec["steps"]
    window, kept, frames, shift = 33, (len(audio) // 4 * 4) // 4 + 1, (len(audio) // 128 + 1) * 32 + 1, 10
    padded = torch.cat([audio, audio.new_zeros((len(audio) // 128 + 1) * 128 + 4 - len(audio))])
    if window in (kept, frames):
        frames, shift, padded = window, 0, padded[:132]
    x = data["in/latents"][0, :, :frames]
    for i in range(steps):
        starts = [s - i * shift % window for s in range(0, frames, window)]
        samples = torch.stack([padded[(torch.arange(129) + 4 * (s % frames)) % len(padded)] for s in starts])
        samples = torch.cat([samples[:, :1].expand(-1, 3), samples], dim=1)
        heard = samples.unflatten(1, (33, 4)).mean(2)
        windows, dt = cut(x, starts, window), float(sigmas[i + 1] - sigmas[i])
        if spec["cfg"]:
            early = i < 10
            g = (1 - i / steps) * 5.5 + 2 if early else (1 - i / steps) * 3 + 3.5
            mask = 0.75 * 0.6 if early else 0.75
            predictions = [
                denoise(windows, torch.zeros_like(heard), -0.5 if early else 0.5, mask),
                denoise(windows, heard, 0.5, mask),
            ]
            rates = [1.0, dt * (1 - g), dt * g]
        else:
            predictions, rates = [denoise(windows, heard, 0.5, 0.75)], [1.0, dt]
        weights = ops.counter_weights(len(starts), window)
        if spec["bf16_rounding_of_each_window"]:
            updated = (windows + dt * predictions[0]).bfloat16().float()
            x = ops.window_fusion(updated, starts, weights, frames)
        else:
            x = ops.fused_window_step(x, predictions, rates, starts, weights)
    expected = data["out/latents"][0]
    check(x[:, : expected.shape[1]], expected, 1e-3 if spec["bf16_rounding_of_each_window"] else 1e-6)


def overlapping(length: int, window: int, overlap: int) -> Iterator[tuple[int, int]]:
    """First frame and number of frames of each window; the last one ends with the video and may be shorter."""
    start = 0
    while True:
        yield start, min(window, length - start)
        if start + window >= length:
            return
        start += window - overlap


@pytest.mark.parametrize("case", ["stable_uniform", "stable_log_bf16", "echo_latent"])
def test_sequential_crossfade(case: str) -> None:
    """StableAvatar and EchoMimicV3: windows are laid down in order, from the second step on with a fade."""
    spec, data = load(case)
    stable = spec["kind"] == "stable_avatar"
    x, audio, sigmas = data["in/latents"][0], data["in/audio"].flatten(), data["in/sigmas"]
    window, overlap, length = spec["window"], spec["overlap"], x.shape[1]
    per = 4 * spec["audio_samples_per_video_frame"] if stable else 8
    places = list(overlapping(length, window, overlap))
    starts, valid = [s for s, _ in places], [count for _, count in places]
    heard = torch.zeros(len(places), window)
    for i, (start, count) in enumerate(places):
        samples = (
            audio[start * per :]
            if start + window >= length
            else audio[(start * per + torch.arange(count * per)) % len(audio)]
        )
        for j in range(count):
            own = samples[j * per : (j + 1) * per]
            heard[i, j] = own.mean() if len(own) else 0.0
    curve = ops.fade_curve(overlap, "log" if spec.get("scheme") == "log" else "linear")
    rounded = spec.get("bf16_rounding_of_each_window", False)
    for i in range(spec["steps"]):
        predictions = torch.zeros(len(places), x.shape[0], window, *x.shape[2:])
        for k, (start, count) in enumerate(places):
            part = x[None, :, start : start + count]
            predictions[k, :, :count] = denoise(part, heard[k : k + 1, :count], spec["text_term"][0])[0]
        dt = float(sigmas[i + 1] - sigmas[i])
        weights = ops.crossfade_weights(starts, window, length, curve if i else curve[:0], valid)
        if rounded:
            updated = (cut(x, starts, window) + dt * predictions).bfloat16().float()
            x = ops.window_fusion(updated, starts, weights, length)
        else:
            x = ops.fused_window_step(x, [predictions], [1.0, dt], starts, weights)
    # The blend of rounded windows was itself computed in bfloat16 there; one rounding of it is 2e-3.
    check(x, data["out/latents"][0], 3e-3 if rounded else 1e-6)


def test_the_golden_file_covers_every_system() -> None:
    with safe_open(GOLDEN, "pt") as file:
        kinds = {case["kind"] for case in json.loads(file.metadata()["spec"])["cases"].values()}
    assert kinds >= {"sonic", "hunyuan_avatar", "stable_avatar", "echomimic_v3_latent"}
    assert math.isfinite(sum(float(v.sum()) for v in load("sonic_cfg")[1].values()))

# SPDX-License-Identifier: Apache-2.0
"""The long-video loops of four public systems as plans of the engine, against numbers that their own code made."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from talkingdit.pipelines.long_video import OverlapBlend, ShiftFusion, blend_chunks, denoise

GOLDEN = Path(__file__).parents[1] / "golden" / "long_video.safetensors"
Heard = Callable[[Tensor], Tensor]  # frames [f] of a window -> what its frames hear [f]


def load(case: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(GOLDEN, "pt") as file:
        spec = json.loads(file.metadata()["spec"])["cases"][case]
        keys = [key for key in file.keys() if key.startswith(f"{case}/")]  # noqa: SIM118
        return spec, {key.removeprefix(f"{case}/"): file.get_tensor(key) for key in keys}


def velocity(window: Tensor, audio: Tensor | float = 0.0, text: float = 0.0, mask: float = 0.0) -> Tensor:
    """The stub that stood in for the network: window [C, f, H, W], audio [f]."""
    f = window.shape[1]
    frame = 0.2 * (torch.arange(f) / (f - 1) - 0.5) + 0.3 * audio + 0.1 * mask + 0.15 * text
    return 0.35 * window + 0.25 * window.mean(1, keepdim=True) + frame[:, None, None]


def check(result: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (result.double() - expected.double()).square().mean() / expected.double().square().mean()
    assert float(error.sqrt()) <= tolerance


@pytest.mark.parametrize("case", ["sonic_default", "sonic_cfg"])
def test_sonic(case: str) -> None:
    spec, data = load(case)
    audio, steps = data["in/audio"][0], spec["steps"]

    def predict(window: Tensor, frames: Tensor, step: int) -> list[Tensor]:
        heard = velocity(window, audio[frames], 0.5)
        return [velocity(window, text=-0.5), velocity(window, text=0.5), heard] if spec["cfg"] else [heard]

    def coefficients(step: int) -> list[float]:
        first, second = 1.5 + 0.5 * step / (steps - 1), 2.5 + step / (steps - 1)
        return [1 - first, first - second, second] if spec["cfg"] else [1.0]

    plan = ShiftFusion(spec["window"], spec["window"] - spec["overlap"], spec["shift_offset"], cycle=0)
    check(denoise(data["in/latents"][0], data["in/sigmas"], plan, predict, coefficients), data["out/latents"][0], 1e-6)


@pytest.mark.parametrize("case", ["hunyuan_short", "hunyuan_long", "hunyuan_long_bf16", "hunyuan_cfg12"])
def test_hunyuan_avatar(case: str) -> None:
    spec, data = load(case)
    audio, steps = data["in/audio"][0], spec["steps"]
    frames = (len(audio) // 128 + 1) * 32 + 1
    padded = torch.cat([audio, audio.new_zeros(4 * frames - len(audio))])
    kept = (len(audio) // 4 * 4) // 4 + 1
    if 33 in (kept, frames):
        frames, padded = 33, padded[:132]

    def heard(at: Tensor) -> Tensor:
        samples = padded[(torch.arange(129) + 4 * at[0]) % len(padded)]
        return torch.cat([samples[:1].expand(3), samples]).unflatten(0, (33, 4)).mean(1)

    def predict(window: Tensor, at: Tensor, step: int) -> list[Tensor]:
        if not spec["cfg"]:
            return [velocity(window, heard(at), 0.5, 0.75)]
        early = step < 10
        mask = 0.75 * 0.6 if early else 0.75
        return [velocity(window, 0.0, -0.5 if early else 0.5, mask), velocity(window, heard(at), 0.5, mask)]

    def coefficients(step: int) -> list[float]:
        g = (1 - step / steps) * 5.5 + 2 if step < 10 else (1 - step / steps) * 3 + 3.5
        return [1 - g, g] if spec["cfg"] else [1.0]

    rounded = spec["bf16_rounding_of_each_window"]
    plan = ShiftFusion(33, 33, 10, rounding=torch.bfloat16 if rounded else None)
    x = denoise(data["in/latents"][0, :, :frames], data["in/sigmas"], plan, predict, coefficients)
    check(x[:, :kept], data["out/latents"][0], 1e-3 if rounded else 1e-6)


@pytest.mark.parametrize("case", ["stable_uniform", "stable_log_bf16", "echo_latent"])
def test_sequential_blend(case: str) -> None:
    spec, data = load(case)
    audio, length = data["in/audio"].flatten(), data["in/latents"].shape[2]
    per = 4 * spec["audio_samples_per_video_frame"] if spec["kind"] == "stable_avatar" else 8

    def heard(at: Tensor) -> Tensor:
        first, last = int(at[0]), int(at[-1]) + 1
        own = audio[first * per :] if last == length else audio[torch.arange(first * per, last * per) % len(audio)]
        means = [own[j * per : (j + 1) * per].mean() for j in range(len(at)) if len(own) > j * per]
        return torch.stack(means + [torch.zeros(())] * (len(at) - len(means)))

    def predict(window: Tensor, at: Tensor, step: int) -> list[Tensor]:
        return [velocity(window, heard(at), spec["text_term"][0])]

    rounded = torch.bfloat16 if spec.get("bf16_rounding_of_each_window") else None
    ramp = "log" if spec.get("scheme") == "log" else "linear"
    plan = OverlapBlend(spec["window"], spec["overlap"], ramp, rounding=rounded)
    x = denoise(data["in/latents"][0], data["in/sigmas"], plan, predict, lambda step: [1.0])
    check(x, data["out/latents"][0], 1e-6)


def test_chunks_in_pixels() -> None:
    spec, data = load("echo_pixels")
    chunks = [data[f"in/chunk{i}"][0] for i in range(len(spec["chunks"]))]
    check(blend_chunks(chunks, spec["overlap"]), data["out/video"][0], 1e-6)
    spec, data = load("echo_app_mm")
    chunks = [data["in/old"][0], data["in/new"][0]]
    check(blend_chunks(chunks, spec["overlap"], "open"), data["out/video"][0], 1e-6)


def test_every_case_is_checked() -> None:
    with safe_open(GOLDEN, "pt") as file:
        cases = json.loads(file.metadata()["spec"])["cases"]
    assert {case["kind"] for case in cases.values()} == {
        "sonic",
        "hunyuan_avatar",
        "stable_avatar",
        "echomimic_v3_latent",
        "echomimic_v3_pixels",
        "echomimic_v3_app_mm_pixels",
    }
    assert math.isfinite(sum(float(v.sum()) for v in load("sonic_cfg")[1].values()))

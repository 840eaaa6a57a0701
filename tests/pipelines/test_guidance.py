# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import math

import pytest
import torch

from talkingdit.pipelines.guidance import (
    FORMS,
    Branch,
    Guidance,
    Hybrid,
    guidance_branches,
    guided_predict,
    guided_step,
    rescale_factors,
)
from talkingdit.pipelines.long_video import OverlapBlend, denoise
from talkingdit.pipelines.schedules import parse


@pytest.mark.parametrize(("text", "audio"), [(1.0, 1.0), (1.0, 2.5), (3.0, 1.0), (2.0, 2.0), (1.5, 4.0), (0.0, 2.0)])
def test_the_sum_is_the_guidance_formula(text: float, audio: float) -> None:
    v00, vt0, vta = (torch.randn(1, 4, 2, 3, 3, dtype=torch.float64) for _ in range(3))
    x = torch.randn(1, 4, 2, 3, 3, dtype=torch.float64)
    wanted = x - 0.25 * (v00 + text * (vt0 - v00) + audio * (vta - vt0))
    given = {(False, False): v00, (True, False): vt0, (True, True): vta}
    branches = guidance_branches(text, audio)
    predictions = torch.cat([given[branch.text, branch.audio] for branch in branches])
    got = guided_step(x.float(), predictions.float(), [branch.weight for branch in branches], -0.25)
    torch.testing.assert_close(got, wanted.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "audio", "evaluations"), [(1, 1, 1), (1, 2, 2), (2, 2, 2), (0, 0, 1), (2, 1, 3), (3, 2, 3)]
)
def test_predictions_of_no_weight_are_not_made(text: float, audio: float, evaluations: int) -> None:
    assert len(guidance_branches(text, audio)) == evaluations


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_impossible_strengths_are_named(value: float) -> None:
    with pytest.raises(ValueError, match="guidance: audio guidance must be a number of at least 0"):
        guidance_branches(1.0, value)


# ---- Forms, schedules, rescaling -------------------------------------------------------------------------------------
def terms() -> dict[tuple[bool, bool], torch.Tensor]:
    return {key: torch.randn(4, 2, 3, 3, dtype=torch.float64) for key in itertools.product((True, False), repeat=2)}


def summed(branches: tuple[Branch, ...], v: dict[tuple[bool, bool], torch.Tensor]) -> torch.Tensor:
    return torch.stack([branch.weight * v[branch.text, branch.audio] for branch in branches]).sum(0)


@pytest.mark.parametrize(("text", "audio"), [(1.0, 1.0), (1.0, 2.5), (3.0, 1.0), (2.0, 2.0), (1.5, 4.0), (0.0, 2.0)])
def test_every_form_is_its_formula(text: float, audio: float) -> None:
    v = terms()
    audio_first = v[False, False] + audio * (v[False, True] - v[False, False]) + text * (v[True, True] - v[False, True])
    torch.testing.assert_close(summed(guidance_branches(text, audio, "audio_first"), v), audio_first)
    # Equation 3 as printed, with omega = strength - 1.
    w_audio, w_text = audio - 1, text - 1
    printed = (1 + w_audio) * v[True, True] - w_audio * v[True, False]
    printed = printed + (1 + w_text) * v[True, False] - w_text * v[False, False]
    torch.testing.assert_close(summed(guidance_branches(text, audio, "printed"), v), printed)
    torch.testing.assert_close(summed(guidance_branches(text, audio), v), printed - v[True, False])
    totals = [sum(b.weight for b in guidance_branches(text, audio, form)) for form in FORMS]  # type: ignore[arg-type]
    assert totals == pytest.approx([1, 1, 2])


def test_schedules_are_those_of_their_programs() -> None:
    steps = 8
    at = torch.arange(steps, dtype=torch.float64)
    wanted = {
        "4.5": torch.full((steps,), 4.5, dtype=torch.float64),
        "linear:1.5:2": torch.linspace(1.5, 2, steps, dtype=torch.float64),
        "cosine:5:1": 3 + 2 * torch.cos(math.pi * at / (steps - 1)),
        "interval:3@0.25-0.75": torch.tensor([1.0, 1, 3, 3, 3, 3, 1, 1], dtype=torch.float64),
        "dynamic:4": 2 + 1 * (1 - torch.cos(math.pi * ((steps - at) / steps) ** 5)),
    }
    for words, values in wanted.items():
        got = torch.tensor([parse(words)(step, steps) for step in range(steps)], dtype=torch.float64)
        torch.testing.assert_close(got, values, rtol=1e-12, atol=1e-12)
    assert parse("linear:3:1")(0, 1) == 3
    for words in ("", "four", "linear:1", "interval:3@0.5", "interval:3@0.8-0.2", "dynamic:inf", "cosine:1:2:3"):
        with pytest.raises(ValueError, match=r"must be a number, linear:A:B.*got"):
            parse(words)


def test_a_step_computes_no_more_than_its_strengths_need() -> None:
    guidance = Guidance(8, text=parse("interval:3@0.25-0.75"), audio=1.0)
    assert [len(guidance.branches(step)) for step in range(8)] == [1, 1, 3, 3, 3, 3, 1, 1]
    assert guidance.evaluations == 16
    joint = Guidance(8, text=3.0, audio=3.0)
    assert [(b.text, b.audio) for b in joint.branches(0)] == [(True, True), (False, False)]


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
def test_branches_of_a_window_are_asked_at_once_or_one_by_one(batched: bool, batch: int) -> None:
    x, sigmas, calls = torch.randn(2, 11, 2, 2, dtype=torch.float64), [1.0, 0.6, 0.3, 0.0], []
    guidance = Guidance(3, text=parse("linear:2:1"), audio=parse("cosine:4:1"))

    def model(windows: torch.Tensor, frames: torch.Tensor, branches: tuple[Branch, ...], step: int) -> torch.Tensor:
        calls.append(len(branches))
        given = windows.unflatten(0, (len(branches), len(frames)))
        found = [w.sin() * (1 + b.text) + 3 * b.audio for w, b in zip(given, branches, strict=True)]
        return torch.cat(found)

    predict = guided_predict(guidance, model, batched)
    got = denoise(x, sigmas, OverlapBlend(5, 2), predict, guidance.coefficients, batch=batch)

    def plain(window: torch.Tensor, frames: torch.Tensor, step: int) -> list[torch.Tensor]:
        t, a = parse("linear:2:1")(step, 3), parse("cosine:4:1")(step, 3)
        u, d, c = window.sin(), 2 * window.sin(), 2 * window.sin() + 3
        return [u + t * (d - u) + a * (c - d)]

    torch.testing.assert_close(got, denoise(x, sigmas, OverlapBlend(5, 2), plain, lambda step: [1.0]))
    assert set(calls) == ({1, 3} if batched else {1})


def test_rescaled_guidance_gives_back_the_spread_of_the_conditioned_prediction() -> None:
    predictions = [torch.randn(2, 3, 4, 2, 2) for _ in range(3)]
    weights, phi = [4.0, -2.5, -0.5], 0.7
    guided = sum(w * p.double() for w, p in zip(weights, predictions, strict=True))
    spread = lambda t: t.double().flatten(1).std(1)  # noqa: E731
    wanted = phi * spread(predictions[0]) / spread(guided) + 1 - phi
    torch.testing.assert_close(rescale_factors(predictions, weights, phi), wanted, rtol=1e-5, atol=1e-6)
    # In the engine every window has its own.
    x = torch.randn(3, 10, 2, 2, dtype=torch.float64)
    given = {
        0: torch.randn(3, 4, 2, 2).double(),
        3: torch.randn(3, 4, 2, 2).double(),
        6: torch.randn(3, 4, 2, 2).double(),
    }
    predict = lambda w, f, s: [given[int(f[0])], w]  # noqa: E731
    got = denoise(x, [1.0, 0.0], OverlapBlend(4, 1), predict, lambda step: [3.0, -2.0], rescale=phi)
    parts = {}
    for first, p in given.items():
        w = x[:, first : first + 4]
        v = 3 * p - 2 * w
        parts[first] = w - v * (phi * p.std() / v.std() + 1 - phi)
    torch.testing.assert_close(got, torch.cat([parts[0][:, :3], parts[3][:, :3], parts[6]], dim=1))


def test_hybrid_inference_changes_its_conditions_once() -> None:
    hybrid = Hybrid(video="video", image="first frame", first=2)
    assert [hybrid(step) for step in range(4)] == ["video", "video", "first frame", "first frame"]

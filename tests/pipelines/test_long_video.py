# SPDX-License-Identifier: Apache-2.0
"""The long-video engine against plain loops in float64: every plan, batches, several processes, interruptions."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import Processes
from torch import Tensor

from talkingdit.distributed.team import ALONE, Team
from talkingdit.pipelines.long_video import ChunkPrefix, ClipPrefix, OverlapBlend, ShiftFusion, denoise, denoise_parts
from talkingdit.pipelines.plans import Plan, blend_curve
from talkingdit.pipelines.window_step import WindowSampler

SIGMAS = [1.0, 0.8, 0.55, 0.25, 0.0]
WEIGHTS = [-0.7, 0.0, 1.7]
GLOBAL = torch.linspace(-1, 1, 200)  # a "voice" by frame of the video


def network(window: Tensor, frames: Tensor, step: int) -> list[Tensor]:
    """Three predictions that depend on the whole window, on where it is, and on the step."""
    voice = GLOBAL[frames].to(window).unsqueeze(-1).unsqueeze(-1)
    voice = voice.unsqueeze(0) if window.dim() == 4 else voice.unsqueeze(1)
    mean = window.mean(-3, keepdim=True)
    return [0.4 * window + 0.2 * mean - 0.1 * step, window * 100, 0.3 * window.sin() - mean + voice]


def guided(window: Tensor, frames: Tensor, step: int) -> Tensor:
    return sum(w * p for w, p in zip(WEIGHTS, network(window, frames, step), strict=True))  # type: ignore[return-value]


def shifted_loop(x: Tensor, window: int, stride: int, shift: int, cycle: int) -> Tensor:
    length = x.shape[1]
    for step in range(len(SIGMAS) - 1):
        total, count = torch.zeros_like(x), torch.zeros(length, dtype=x.dtype)
        moved = step * shift % cycle if cycle else step * shift
        for first in range(0, length, stride):
            frames = torch.tensor([(first - moved + j) % length for j in range(window)])
            shown = x[:, frames]
            new = shown + (SIGMAS[step + 1] - SIGMAS[step]) * guided(shown, frames, step)
            for j, frame in enumerate(frames):
                total[:, frame] += new[:, j]
                count[frame] += 1
        x = total / count[:, None, None]
    return x


def blended_loop(x: Tensor, window: int, overlap: int, curve: Tensor, blend_from: int = 1) -> Tensor:
    length = x.shape[1]
    for step in range(len(SIGMAS) - 1):
        result, previous, first = x.clone(), x, 0
        while True:
            frames = torch.arange(first, min(first + window, length))
            shown = x[:, frames]
            new = shown + (SIGMAS[step + 1] - SIGMAS[step]) * guided(shown, frames, step)
            if first and step >= blend_from and overlap:
                w = curve.to(x)[:, None, None]
                new[:, :overlap] = w * new[:, :overlap] + (1 - w) * previous[:, -overlap:]
            result[:, frames] = new
            if first + window >= length:
                break
            previous, first = new, first + window - overlap
        x = result
    return x


def noise(length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, length, 2, 3, generator=torch.Generator().manual_seed(length), dtype=torch.float64).to(dtype)


def run(x: Tensor, plan: Plan, **options: Any) -> Tensor:
    return denoise(x, SIGMAS, plan, network, lambda step: WEIGHTS, **options)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("length", "window", "stride", "shift"),
    [(20, 6, 6, 4), (21, 5, 2, 3), (33, 7, 7, 10), (9, 9, 9, 2), (7, 9, 4, 2), (40, 4, 3, 0), (12, 11, 11, 5)],
)
def test_shift_fusion_is_the_loop(length: int, window: int, stride: int, shift: int, batch: int) -> None:
    x = noise(length)
    for cycle in (0, window):
        got = run(x, ShiftFusion(window, stride, shift, cycle), batch=batch)
        torch.testing.assert_close(got, shifted_loop(x, window, stride, shift, cycle), rtol=1e-11, atol=1e-11)


def test_the_shift_follows_the_released_programs_by_itself() -> None:
    """HunyuanVideo-Avatar's windows are 33 frames side by side; Sonic's are of any size, side by side or not."""
    x, long = noise(20), noise(65)
    for window, stride in ((6, 6), (6, 3), (20, 20)):
        sonic = shifted_loop(x, window, stride, 4, 0)
        torch.testing.assert_close(run(x, ShiftFusion(window, stride, 4)), sonic, rtol=1e-11, atol=1e-11)
    assert not torch.allclose(shifted_loop(long, 33, 33, 20, 33), shifted_loop(long, 33, 33, 20, 0))
    avatar = shifted_loop(long, 33, 33, 20, 33)
    torch.testing.assert_close(run(long, ShiftFusion(33, 33, 20)), avatar, rtol=1e-11, atol=1e-11)
    one = shifted_loop(long[:, :33], 33, 33, 0, 0)
    torch.testing.assert_close(run(long[:, :33], ShiftFusion(33, 33, 10)), one, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("ramp", ["linear", "log", "open", "earlier", "later"])
@pytest.mark.parametrize(("length", "window", "overlap"), [(20, 6, 2), (23, 7, 5), (8, 9, 3), (31, 5, 1), (16, 4, 0)])
def test_overlap_blend_is_the_loop(length: int, window: int, overlap: int, ramp: Any) -> None:
    x, curve = noise(length), blend_curve(overlap, ramp)
    got = run(x, OverlapBlend(window, overlap, ramp), batch=2)
    torch.testing.assert_close(got, blended_loop(x, window, overlap, curve), rtol=1e-11, atol=1e-11)


def test_blending_may_begin_anywhere_and_weights_sum_to_one() -> None:
    x = noise(23)
    got = run(x, OverlapBlend(7, 3, blend_from=0))
    torch.testing.assert_close(got, blended_loop(x, 7, 3, blend_curve(3, "linear"), 0), rtol=1e-11, atol=1e-11)
    # A velocity that is the same for every window leaves no trace of them, if weights sum to one.
    constant = denoise(x, SIGMAS, OverlapBlend(7, 3), lambda w, f, s: [torch.ones_like(w)], lambda s: [1.0])
    torch.testing.assert_close(constant, x + SIGMAS[-1] - SIGMAS[0], rtol=1e-12, atol=1e-12)


def test_a_full_tail_keeps_every_window_whole() -> None:
    sizes: list[int] = []

    def predict(window: Tensor, frames: Tensor, step: int) -> list[Tensor]:
        sizes.append(len(frames))
        return [window]

    denoise(noise(20), SIGMAS, OverlapBlend(7, 2, tail="full"), predict, lambda step: [1.0])
    assert set(sizes) == {7}
    assert len(sizes) == 4 * (len(SIGMAS) - 1)


def test_a_window_sees_frames_as_they_were_before_the_step() -> None:
    """Also those that have no weight in it and that an earlier window has finished."""
    x = noise(12)
    seen: dict[int, Tensor] = {}

    def predict(window: Tensor, frames: Tensor, step: int) -> list[Tensor]:
        seen[step] = window if int(frames[-1]) == 11 else seen.get(step, window)
        return [torch.ones_like(window)]

    denoise(x, [1.0, 0.0], OverlapBlend(7, 2, "earlier", blend_from=0), predict, lambda step: [1.0])
    torch.testing.assert_close(seen[0], x[:, 5:])


@pytest.mark.parametrize("plan", [ShiftFusion(6, 6, 4), OverlapBlend(6, 2)])
def test_steps_that_are_not_computed_take_the_last_predictions_of_every_frame(plan: Plan) -> None:
    x, asked = noise(20), []
    length = x.shape[1]

    def predict(window: Tensor, frames: Tensor, step: int) -> list[Tensor]:
        asked.append(step)
        return network(window, frames, step)

    got = denoise(x, SIGMAS, plan, predict, lambda step: WEIGHTS, computed=lambda step: step in (0, 2))
    last = torch.zeros_like(x)
    for step in range(4):
        windows, total, count = plan.windows(length, step), torch.zeros_like(x), torch.zeros(length, dtype=x.dtype)
        size = SIGMAS[step + 1] - SIGMAS[step]
        if step not in (0, 2):
            x = x + size * last
            continue
        for i, start in enumerate(windows.starts):
            frames = (start + torch.arange(windows.slots(i))) % length
            v = guided(x[:, frames], frames, step)
            last[:, frames] = v
            for j, frame in enumerate(frames):
                total[:, frame] += windows.weights[i, j] * (x[:, frame] + size * v[:, j])
                count[frame] += windows.weights[i, j]
        x = total / count[:, None, None]
    assert set(asked) == {0, 2}
    torch.testing.assert_close(got, x, rtol=1e-11, atol=1e-11)


def test_predictions_may_be_of_several_types() -> None:
    x, plan = noise(20, torch.float32), ShiftFusion(6, 4, 3)

    def run_as(*types: torch.dtype) -> Tensor:
        def predict(window: Tensor, frames: Tensor, step: int) -> list[Tensor]:
            exact = [window.bfloat16(), (0.5 * window).half(), 2 * window.bfloat16()]
            return [p.to(t) for p, t in zip(exact, types, strict=True)]

        return denoise(x, SIGMAS, plan, predict, lambda step: [0.2, 0.3, 0.5])

    mixed = run_as(torch.bfloat16, torch.float64, torch.float32)
    torch.testing.assert_close(mixed, run_as(*[torch.float32] * 3), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("plan", [ShiftFusion(6, 6, 4), OverlapBlend(6, 2)])
def test_windows_are_rounded_in_steps_that_are_not_computed(plan: ShiftFusion | OverlapBlend) -> None:
    """One step that is computed, one that is not: every frame is its last velocity further, and rounded."""
    x, kept, last = noise(20), [], torch.zeros_like(noise(20))
    windows = plan.windows(20, 0)
    for i, start in enumerate(windows.starts):
        frames = (start + torch.arange(windows.slots(i))) % 20
        last[:, frames] = guided(x[:, frames], frames, 0)

    def keep(stage: int, step: int, now: Tensor) -> None:
        kept.append(now.clone())

    rounded = replace(plan, rounding=torch.bfloat16)
    denoise(x, SIGMAS[:3], rounded, network, lambda step: WEIGHTS, computed=lambda step: step == 0, after=keep)
    want = kept[0] + (SIGMAS[2] - SIGMAS[1]) * last
    torch.testing.assert_close(kept[1], want, rtol=2**-8, atol=0)
    assert torch.equal(kept[1], kept[1].to(torch.bfloat16).double())


def test_an_interrupted_video_goes_on_at_its_step() -> None:
    x, plan, kept = noise(20), ShiftFusion(6, 6, 4), {}

    def after(stage: int, step: int, latents: Tensor) -> None:
        kept[step] = latents.clone()

    whole = run(x, plan, after=after)
    assert torch.equal(run(kept[1], plan, begin=2), whole)
    assert torch.equal(run(x.clone(), plan, in_place=True), whole)


def test_latents_of_lower_precision_and_a_samplers_own_update() -> None:
    x = noise(20)
    rounded = run(x.bfloat16(), OverlapBlend(6, 2))
    assert rounded.dtype == torch.bfloat16
    exact = run(x.bfloat16().double(), OverlapBlend(6, 2))
    assert float((rounded.double() - exact).norm() / exact.norm()) < 1e-2
    plan, double = OverlapBlend(6, 2), lambda w, f, s: network(w.double(), f, s)
    wide = denoise(x.float(), SIGMAS, plan, double, lambda s: WEIGHTS)
    torch.testing.assert_close(wide, run(x.float(), OverlapBlend(6, 2)), rtol=1e-4, atol=1e-4)
    update = denoise(x, [1.0, 0.5], ShiftFusion(6, 6, 4), lambda w, f, s: [w, w], lambda s: [0.5, 0.2, 0.1])
    torch.testing.assert_close(update, 0.8 * x, rtol=1e-12, atol=1e-12)


# ---- Chunks ----------------------------------------------------------------------------------------------------------
def chunked_loop(x: Tensor, window: int, overlap: int, given: int, hold: bool) -> Tensor:
    length, result, first = x.shape[1], x.clone(), 0
    while True:
        last = min(first + window, length)
        frames, before = torch.arange(first, last), result[:, first : first + overlap].clone()
        z = x[:, first:last].clone()
        for step in range(len(SIGMAS) - 1):
            if first and (hold or step == 0):
                z[:, :given] = before[:, :given]
            z = z + (SIGMAS[step + 1] - SIGMAS[step]) * guided(z, frames, step)
        if first:
            if hold:
                z[:, :given] = before[:, :given]
            w = torch.linspace(0, 1, overlap, dtype=x.dtype)[:, None, None]
            z[:, :overlap] = w * z[:, :overlap] + (1 - w) * before
        result[:, first:last] = z
        if last == length:
            return result
        first += window - overlap


@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize(("overlap", "given"), [(4, None), (4, 2), (3, 0)])
def test_chunks_with_a_clean_prefix_are_the_loop(overlap: int, given: int | None, hold: bool) -> None:
    x = noise(29)
    plan = ChunkPrefix(9, overlap, given, hold)
    wanted = chunked_loop(x, 9, overlap, overlap if given is None else given, hold)
    torch.testing.assert_close(run(x, plan), wanted, rtol=1e-11, atol=1e-11)


def sampler(**options: Any) -> WindowSampler:
    return WindowSampler(SIGMAS, network, lambda step: WEIGHTS, **options)


def test_chunks_become_final_one_by_one_and_go_on_elsewhere() -> None:
    x, plan = noise(29), ChunkPrefix(9, 4)
    cut = lambda first, last: x[:, first:last].clone()  # noqa: E731
    parts = list(denoise_parts(cut, sampler(), plan, 29))
    assert [part.first for part in parts] == [0, 5, 10, 15, 20]
    assert torch.equal(torch.cat([part.latents for part in parts], dim=1), run(x, plan))
    assert parts[-1].carry is None
    rest = list(denoise_parts(cut, sampler(), plan, 29, first=2, carry=parts[1].carry))
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(rest, parts[2:], strict=True))
    with pytest.raises(ValueError, match="stage 2 needs carry"):
        next(denoise_parts(cut, sampler(), plan, 29, first=2))


@pytest.mark.parametrize("plan", [ChunkPrefix(9, 4), ClipPrefix(9)])
@pytest.mark.parametrize("length", [29, 18, 9, 5])
def test_a_video_of_unknown_length_is_the_video(plan: Plan, length: int) -> None:
    """The length becomes known while the video is made, before the stage that it ends in."""
    x = noise(60)
    asked: list[int] = []

    def ended(first: int) -> int | None:
        asked.append(first)
        return length if length <= first + 9 else None

    cut = lambda first, last: x[:, first:last].clone()  # noqa: E731
    parts = denoise_parts(cut, sampler(), plan, None, ended=ended)
    assert torch.equal(torch.cat([part.latents for part in parts], dim=1), run(x[:, :length], plan))


def test_plans_that_need_the_length_say_so() -> None:
    for plan in (ShiftFusion(5, 5, 1), OverlapBlend(5, 1)):
        with pytest.raises(ValueError, match="length of the video must be known"):
            next(denoise_parts(lambda a, b: noise(9), sampler(), plan, None))


# ---- Several processes -----------------------------------------------------------------------------------------------
def _in_a_team(plan: Plan, length: int, batch: int) -> tuple[Tensor, int]:
    team, count = Team.start(), 0

    def predict(window: Tensor, frames: Tensor, step: int) -> list[Tensor]:
        nonlocal count
        count += len(frames) if frames.dim() == 2 else 1
        return network(window, frames, step)

    result = denoise(noise(length), SIGMAS, plan, predict, lambda step: WEIGHTS, team=team, batch=batch)
    team.end()
    return result, count


@pytest.mark.parametrize("batch", [1, 2])
def test_processes_share_the_windows(processes: Processes, batch: int) -> None:
    for plan in (ShiftFusion(6, 6, 4), OverlapBlend(6, 2)):
        alone = run(noise(20), plan)
        results = processes(2, _in_a_team, plan, 20, batch)
        count = len(plan.windows(20, 0).starts) * (len(SIGMAS) - 1)
        assert all(torch.equal(result, alone) for result, _ in results)
        assert max(asked for _, asked in results) < count


# ---- What is refused -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("sentence", "changes"),
    [
        ("predict must give tensors of the window's shape", {"predict": lambda w, f, s: [w[:, :1]]}),
        ("at least one prediction", {"predict": lambda w, f, s: []}),
        (r"coefficients\(0\) must be 1 finite numbers", {"coefficients": lambda s: [1.0, 2.0, 3.0]}),
        (r"coefficients\(0\) must be 1 finite numbers", {"coefficients": lambda s: [float("nan")]}),
        ("sigmas must be at least two", {"sigmas": [1.0]}),
        (r"latents must be \[C, L, H, W\]", {"latents": torch.zeros(1, 2, 9, 2, 2)}),
        ("batch must be at least 1", {"batch": 0}),
        ("computed must be true of step 0", {"computed": lambda step: False}),
        ("begin must be 0 to 2", {"begin": 3}),
    ],
)
def test_what_does_not_fit_is_named(sentence: str, changes: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {
        "latents": noise(9),
        "sigmas": [1.0, 0.5, 0.0],
        "plan": OverlapBlend(5, 1),
        "predict": lambda w, f, s: [w],
        "coefficients": lambda s: [1.0],
    }
    with pytest.raises(ValueError, match=sentence):
        denoise(**arguments | changes, team=ALONE)


@pytest.mark.parametrize(
    ("plan", "arguments", "sentence"),
    [
        (ShiftFusion, (0, 1, 1), "window must be an integer of at least 1, got 0"),
        (ShiftFusion, (5, 6, 1), "stride must be an integer of 1 to 5, got 6"),
        (OverlapBlend, (5, 5), "overlap must be an integer of 0 to 4, got 5"),
        (OverlapBlend, (5, 2, "cubic"), 'ramp must be "linear"'),
        (ChunkPrefix, (5, 3, 4), "given must be an integer of 0 to 3, got 4"),
        (ClipPrefix, (2.5,), "window must be an integer of at least 1, got 2.5"),
    ],
)
def test_plans_name_what_is_out_of_range(plan: Any, arguments: Sequence[Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        plan(*arguments)


def test_a_step_holds_the_predictions_of_few_windows_however_long_the_video_is() -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most: dict[int, int] = {}

    def predict(window: Tensor, frames: Tensor, step: int) -> list[Tensor]:
        made = [window.clone(), window.clone()]
        alive.update(made)
        most[length] = max(most.get(length, 0), len(alive))
        return made

    for length in (50, 400):
        denoise(noise(length), SIGMAS[:3], OverlapBlend(8, 2), predict, lambda step: [2.0, -1.0])
    assert most[400] <= most[50] <= 8


def test_latents_may_lie_in_a_file(tmp_path: Path) -> None:
    x = noise(20, torch.float32)
    mapped = torch.from_file(str(tmp_path / "latents"), shared=True, size=x.numel()).view(x.shape)
    mapped.copy_(x)
    result = run(mapped, OverlapBlend(6, 2), in_place=True)
    assert result.data_ptr() == mapped.data_ptr()
    assert torch.equal(result, run(x, OverlapBlend(6, 2)))

# SPDX-License-Identifier: Apache-2.0
"""Sizes under a token limit, packing without waste, equal work on every rank, stacks of equal shape."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from talkingdit.data.sample import ClipRequest, Shape
from talkingdit.families.wan_s2v.cost import tokens
from talkingdit.families.wan_s2v.presets import PRESETS
from talkingdit.plan.clip import ClipShape
from training.batching import PATIENCE, Planned, Planner, cost, pack, slots
from training.buckets import Buckets, Fit, patches
from training.sampler import Draw, ItemStream, Sampler, stream_shares

ATTENTION = 29184.0


def wan(frames, height, width, reference, history):
    """Tokens of Wan-S2V, as the inference planner counts them."""
    return tokens(PRESETS["wan_s2v_14b"], ClipShape(8 * height, 8 * width, latents=frames, history=history))[1]


@st.composite
def videos(draw):
    """Shapes; stored latents have whole tokens, videos any size."""
    resizable, frames, history = draw(st.booleans()), draw(st.integers(1, 60)), draw(st.sampled_from([0, 19]))
    side = st.integers(24, 160) if resizable else st.integers(12, 80).map(lambda n: 2 * n)
    return Shape(frames, draw(side), draw(side), history=history, resizable=resizable)


@settings(max_examples=200, deadline=None)
@given(shape=videos(), limit=st.integers(3000, 60000), mode=st.sampled_from(["resize", "crop"]))
def test_no_clip_exceeds_the_limit_and_small_videos_are_used_as_they_are(shape, limit, mode):
    fit = Buckets(limit, [20, 12, 5], fit=mode, count=wan).fit(shape)
    frames = 1 if shape.frames == 1 else next((n for n in (20, 12, 5) if n <= shape.frames), None)
    even = shape.height // 2 * 2, shape.width // 2 * 2
    if fit is None:
        # Stored latents may be too large whole; a video can always be made small enough.
        assert frames is None or not shape.resizable
        return
    clip = fit.clip
    assert fit.tokens == wan(clip.frames, clip.height, clip.width, True, shape.history) <= limit
    assert clip.frames <= shape.frames
    assert clip.height <= shape.height
    assert clip.width <= shape.width
    if shape.resizable and wan(frames, *even, True, shape.history) <= limit:
        assert (clip.frames, clip.height, clip.width) == (frames, *even)
    if not shape.resizable:
        assert (clip.height, clip.width) == (shape.height, shape.width)


@pytest.mark.parametrize(("height", "width"), [(90, 160), (160, 90), (100, 100)])
def test_a_video_over_the_limit_keeps_its_aspect_and_uses_the_limit(height, width):
    shape = Shape(20, height, width, resizable=True)
    fit = Buckets(20_000, [20]).fit(shape)
    assert 18_000 < fit.tokens <= 20_000
    assert math.log(fit.clip.height / fit.clip.width) == pytest.approx(math.log(height / width), abs=0.03)


def test_cropping_cuts_the_longer_side_before_anything_is_resized():
    shape = Shape(20, 90, 160, resizable=True)
    wide = Buckets(60_000, [20], fit="crop").fit(shape)
    assert wide.clip.height == 90
    assert 90 < wide.clip.width < 160
    square = Buckets(20_000, [20], fit="crop").fit(shape)
    assert square.clip.height == square.clip.width < 90


def test_stored_latents_are_shortened_and_tiny_pictures_are_not_made():
    assert Buckets(5000, [20, 10, 5]).fit(Shape(20, 40, 40)).clip.frames == 10
    assert Buckets(1000, [20]).fit(Shape(20, 40, 40)) is None
    assert Buckets(2000, [50, 5]).fit(Shape(60, 40, 40, resizable=True)).clip == ClipRequest(5, 36, 36)


def test_buckets_give_the_nearest_aspect_and_never_enlarge():
    sizes = [(56, 104), (104, 56), (28, 52), (40, 40)]
    buckets = Buckets(frames=[20, 5], sizes=sizes)
    for shape, expected in [
        (Shape(30, 90, 160, resizable=True), (20, 56, 104)),
        (Shape(30, 50, 90, resizable=True), (20, 28, 52)),  # smaller than the large bucket
        (Shape(7, 160, 90, resizable=True), (5, 104, 56)),
        (Shape(30, 60, 60, resizable=True), (20, 40, 40)),
    ]:
        clip = buckets.fit(shape).clip
        assert (clip.frames, clip.height, clip.width) == expected
    assert buckets.fit(Shape(30, 20, 20, resizable=True)) is None
    assert buckets.fit(Shape(4, 56, 104)) is None  # shorter than every duration
    assert buckets.fit(Shape(1, 56, 104)).clip.frames == 1  # a picture
    assert buckets.fit(Shape(30, 56, 100)) is None  # stored, and in no bucket


def test_a_clip_that_begins_its_video_has_no_history_to_count():
    shape = Shape(20, 40, 40, history=19)
    first, later = (Buckets(frames=[20], count=wan).fit(shape, begins) for begins in (True, False))
    assert later.tokens - first.tokens == wan(20, 40, 40, True, 19) - wan(20, 40, 40, True, 0) > 0
    assert (first.clip.history, later.clip.history) == (False, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit": -1}, "batch.tokens must not be negative, got -1"),
        ({"frames": [0]}, "at least one latent frame, got"),
        ({"sizes": [(27, 52)]}, "multiples of 16 pixels, got 416 x 216"),
    ],
)
def test_buckets_that_no_clip_can_have_get_one_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        Buckets(**arguments)


def waiting(sizes, since=0):
    clip = ClipRequest()
    return [Planned(Draw(i, "a/video", i), "a", "video", clip, n, (True, 0), since) for i, n in enumerate(sizes)]


def total(group):
    return sum(p.tokens for p in group)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 100), min_size=1, max_size=64), count=st.integers(1, 8))
def test_packing_keeps_the_budget_and_loses_nothing(sizes, count):
    groups, left = pack(waiting(sizes), count, 100)
    assert len(groups) == count
    assert all(total(group) <= 100 for group in groups)
    assert sorted(p.draw.number for p in [*left, *(p for group in groups for p in group)]) == list(range(len(sizes)))
    if left:  # nothing is left that had room
        assert min(p.tokens for p in left) + np.mean([total(group) for group in groups]) > 99


def test_the_sample_that_waits_longest_is_packed_first():
    old, young = waiting([55])[0], waiting([60, 60, 60], since=1)
    groups, left = pack([*young, old], 2, 100)
    assert old in groups[0] + groups[1]
    assert len(left) == 2


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 3), min_size=100, max_size=300),
    count=st.integers(1, 4),
    groups=st.sampled_from([2, 21]),
)
def test_a_packed_sequence_has_no_more_timesteps_than_the_kernels_tell_apart(sizes, count, groups):
    """Small frames: hundreds fit into the tokens."""
    small = [replace(p, groups=groups) for p in waiting(sizes)]
    packed, left = pack(small, count, 1000, max_groups=128)
    assert all(sum(p.groups for p in group) <= 128 for group in packed)
    assert sorted(p.draw.number for p in [*left, *(p for group in packed for p in group)]) == list(range(len(sizes)))
    if len(left) > 0:
        assert all(len(group) == 128 // groups for group in packed)


@pytest.mark.parametrize(("prefixes", "most"), [(False, 64), (True, 25)])
def test_planned_steps_keep_to_the_number_of_timesteps(prefixes, most):
    shapes = [Shape(4, 2, 2) for _ in range(50)]
    plan = planner(shapes, Buckets(), count=2, mode="pack", budget=400, max_groups=128, prefixes=prefixes).plan()
    assert [len(group) for group in plan.groups] == [most] * 2


def mixture(seed):
    """Tokens as a talking-head set has them: many speech clips, some films in several shapes, stills."""
    rng = np.random.default_rng(seed)
    buckets = Buckets(24_000, [20, 12], count=wan)
    shapes = []
    for _ in range(400):
        where = rng.random()
        if where < 0.6:
            side = int(rng.integers(32, 64))
            shapes.append(Shape(40, side, side, history=19, resizable=True))
        elif where < 0.9:
            height = int(rng.integers(45, 136))
            shapes.append(Shape(int(rng.integers(12, 80)), height, height * 16 // 9, history=19, resizable=True))
        else:
            shapes.append(Shape(1, int(rng.integers(60, 100)), int(rng.integers(60, 100)), resizable=True))
    return shapes, buckets


def planner(shapes, buckets, **options):
    streams = [ItemStream("a", "video", np.arange(len(shapes)))]
    shares = stream_shares(streams, {"a": 1})

    def fits(name, index):
        return buckets.fit(shapes[index]), (True, shapes[index].history)

    return Planner(Sampler(streams, 0), fits, lambda step: shares, **options)


@pytest.mark.parametrize("seed", range(3))
def test_packed_steps_of_a_real_mixture_waste_little_and_load_all_ranks_alike(seed):
    shapes, buckets = mixture(seed)
    made = planner(shapes, buckets, count=16, mode="pack", budget=64_000)
    figures, waits = [], []
    for step in range(30):
        plan = made.plan()
        assert all(total(group) <= 64_000 for group in plan.groups)
        waits += [step - p.since for group in plan.groups for p in group]
        figures.append(plan.figures(4))
        assert figures[-1]["tokens"] == sum(map(total, plan.groups))
    assert np.mean([f["unused"] for f in figures]) < 0.04
    assert max(f["unused"] for f in figures) < 0.06
    assert np.mean([f["imbalance"] for f in figures]) < 0.02
    assert max(f["imbalance"] for f in figures) < 0.05
    assert np.mean([f["idle"] for f in figures]) < 0.05
    assert max(waits) <= 2


def test_many_clips_to_a_micro_batch_leave_one_percent_unused_and_nobody_waiting():
    shapes, buckets = mixture(0)
    made = planner(shapes, buckets, count=16, mode="pack", budget=200_000)
    for figures in [made.plan().figures(8) for _ in range(10)]:
        assert figures["unused"] < 0.02
        assert figures["imbalance"] < 0.02
        assert figures["idle"] < 0.02


def test_where_clips_nearly_fill_the_budget_the_work_is_still_spread_evenly():
    shapes, buckets = mixture(0)
    made = planner(shapes, buckets, count=16, mode="pack", budget=26_000)
    figures = [made.plan().figures(4) for _ in range(30)]
    assert np.mean([f["unused"] for f in figures]) < 0.11
    assert np.mean([f["imbalance"] for f in figures]) < 0.06
    assert np.mean([f["idle"] for f in figures]) < 0.08


def test_attention_counts_in_what_a_rank_gets():
    # One long sample costs more than two halves of it: 8 tokens and 32 of attention against 8 and 16.
    long, half = waiting([8])[0], waiting([4])[0]
    assert cost([long], 2.0) == 8 + 32
    assert cost([half, half], 2.0) == 8 + 16
    sizes = [40_000, *[4_000] * 30]
    groups, _ = pack(waiting(sizes), 4, 48_000, attention_tokens=20_000.0)
    alone = next(group for group in groups if total(group) >= 40_000)
    assert len(alone) == 1
    spread = [cost(group, 20_000.0) for group in groups if group is not alone]
    assert max(spread) - min(spread) <= cost(waiting([4_000]), 20_000.0)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_share_a_step_without_rest_and_run_alike_costs_together(size):
    costs = list(np.random.default_rng(0).random(8))
    rows = slots(costs, size)
    assert sorted(i for row in rows for i in row) == list(range(8))
    for row, after in itertools.pairwise(rows):
        assert min(costs[i] for i in row) >= max(costs[i] for i in after)
    with pytest.raises(ValueError, match="8 micro-batches do not divide over 3 data ranks; take 9"):
        slots(costs, 3)


def test_stacks_hold_equal_shapes_and_lose_no_sample():
    rng = np.random.default_rng(0)
    shapes = [Shape(8, int(h), 12, history=int(n)) for h, n in rng.choice([12, 16, 20], (60, 2))]
    made = planner(shapes, Buckets(frames=[8], count=patches), count=2, mode="stack", size=3)
    seen = []
    for _ in range(8):
        plan = made.plan()
        assert plan.figures(2)["unused"] == 0
        for group in plan.groups:
            assert len({(shapes[p.draw.index].height, shapes[p.draw.index].history) for p in group}) == 1
            seen += [p.draw.number for p in group]
    seen += [p.draw.number for p in made.waiting]
    assert sorted(seen) == list(range(made.sampler.number))
    assert len(made.waiting) <= 9 * 2


def test_shapes_of_which_there_are_too_few_go_in_smaller_stacks_instead_of_waiting_for_ever():
    shapes = [Shape(8, 12 + 2 * i, 12) for i in range(48)]
    made = planner(shapes, Buckets(frames=[8]), count=1, mode="stack", size=2)
    plans = [made.plan() for _ in range(60)]
    assert {len(group) for plan in plans for group in plan.groups} == {1, 2}
    assert len(made.waiting) <= 2 * PATIENCE
    assert max(plan.figures(1)["unused"] for plan in plans) == 0.5


@pytest.mark.parametrize("mode", ["stack", "pack"])
@pytest.mark.parametrize("single", [False, True])
def test_a_plan_goes_on_from_its_state(mode, single):
    shapes, buckets = mixture(1)
    kinds = ["talk", "sing"]
    streams = [ItemStream("a", kind, np.arange(i, len(shapes), 2)) for i, kind in enumerate(kinds)]
    shares = stream_shares(streams, {"a": 1}, {"talk": 0.7, "sing": 0.3})

    def make():
        return Planner(
            Sampler(streams, 0),
            lambda name, index: (buckets.fit(shapes[index]) or Fit(ClipRequest(), 1), (True, shapes[index].history)),
            lambda step: shares,
            count=4,
            mode=mode,
            size=2,
            budget=64_000,
            single=single,
        )

    straight = make()
    plans = [straight.plan() for _ in range(8)]
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(plans[3].state)))
    assert [resumed.plan().groups for _ in range(4)] == [plan.groups for plan in plans[4:]]
    for plan in plans:
        if single:
            assert len({p.kind for group in plan.groups for p in group}) == 1
    used = [p.kind for plan in plans for group in plan.groups for p in group]
    assert 0.5 < used.count("talk") / len(used) < 0.9

# SPDX-License-Identifier: Apache-2.0
"""The order of samples: shares are kept, nothing comes twice in an epoch, a state goes on anywhere."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.sampler import ItemStream, Sampler, stream_shares


def stream(source, count, kind="video", begins=None):
    return ItemStream(source, kind, np.arange(count), begins)


def draws(sampler, shares, count, kind=None):
    return [sampler.draw(shares, kind) for _ in range(count)]


@settings(max_examples=30, deadline=None)
@given(weights=st.lists(st.floats(0.01, 10), min_size=2, max_size=6), count=st.integers(1, 400))
def test_at_any_time_every_source_is_within_its_share(weights, count):
    mix = {f"s{i}": weight for i, weight in enumerate(weights)}
    found = [stream(name, 7) for name in mix]
    shares = stream_shares(found, mix)
    seen = Counter(d.stream for d in draws(Sampler(found, 0), shares, count))
    for name, share in shares.items():
        assert abs(seen[name] - share * count) < len(weights)


def test_audio_to_image_of_one_to_one_and_a_half_is_exact_every_five_samples():
    found = [stream("audio", 100), stream("image", 100)]
    sampler = Sampler(found, 0)
    shares = stream_shares(found, {"audio": 1, "image": 1.5})
    for _ in range(20):
        assert Counter(d.stream for d in draws(sampler, shares, 5)) == {"audio/video": 2, "image/video": 3}


def test_every_sample_comes_once_per_epoch_in_an_order_of_its_own():
    found = [stream("a", 11), stream("b", 5)]
    sampler = Sampler(found, 3)
    shares = stream_shares(found, {"a": 11, "b": 5})
    epochs = [draws(sampler, shares, 16) for _ in range(3)]
    orders = [[d.index for d in epoch if d.stream == "a/video"] for epoch in epochs]
    assert all(sorted(order) == list(range(11)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] != list(range(11))
    assert [d.number for epoch in epochs for d in epoch] == list(range(48))
    assert sampler.epochs() == {"a/video": 3, "b/video": 3}
    assert [d.index for d in draws(Sampler(found, 4), shares, 16)] != [d.index for d in epochs[0]]


def test_a_state_written_as_json_goes_on_in_the_middle_of_an_epoch():
    found = [stream("a", 11), stream("b", 5)]
    shares = stream_shares(found, {"a": 0.3, "b": 0.7})
    straight = draws(Sampler(found, 1), shares, 40)
    first = Sampler(found, 1)
    begin = draws(first, shares, 17)
    second = Sampler(found, 1)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begin + draws(second, shares, 23) == straight


def test_a_stage_without_a_source_leaves_its_place_for_the_stage_after():
    a, b = stream("a", 11), stream("b", 5)
    one = Sampler([a, b], 1)
    shares = stream_shares([a, b], {"a": 1, "b": 1})
    seen = [d.index for d in draws(one, shares, 8) if d.stream == "a/video"]
    two = Sampler([b], 1)
    two.load_state_dict(one.state_dict())
    assert [d.number for d in draws(two, stream_shares([b], {"b": 1}), 4)] == [8, 9, 10, 11]
    three = Sampler([a, b], 1)
    three.load_state_dict(two.state_dict())
    seen += [d.index for d in draws(three, stream_shares([a, b], {"a": 1, "b": 0}), 7)]
    assert sorted(seen) == list(range(11))


def test_a_source_that_grew_begins_a_new_epoch(caplog):
    sampler = Sampler([stream("a", 4)], 0)
    draws(sampler, {"a/video": 1.0}, 2)
    grown = Sampler([stream("a", 6)], 0)
    grown.load_state_dict(sampler.state_dict())
    assert "a/video had 4 samples and has 6 now" in caplog.text
    assert sorted(d.index for d in draws(grown, {"a/video": 1.0}, 6)) == list(range(6))


def test_kinds_share_a_source_by_items_evenly_or_as_told():
    found = [stream("a", 90, "talk"), stream("a", 10, "sing"), stream("b", 50)]
    mix = {"a": 1, "b": 1}
    assert stream_shares(found, mix) == pytest.approx({"a/talk": 0.45, "a/sing": 0.05, "b/video": 0.5})
    even = stream_shares(found, mix, {"talk": 1, "sing": 1})
    assert even == pytest.approx({"a/talk": 0.25, "a/sing": 0.25, "b/video": 0.5})
    told = stream_shares(found, mix, {"talk": 1, "sing": 4})
    assert told == pytest.approx({"a/talk": 0.1, "a/sing": 0.4, "b/video": 0.5})
    assert stream_shares(found, mix, {"sing": 1})["a/talk"] == 0


def test_first_and_later_clips_of_a_source_come_in_the_share_of_first_clips():
    found = [stream("a", 10, begins=True), stream("a", 10, begins=False), stream("a", 20)]
    shares = stream_shares(found, {"a": 1}, first=0.3)
    assert shares == pytest.approx({"a/video/first": 0.1, "a/video/later": 7 / 30, "a/video": 2 / 3})


def test_steps_of_one_kind_keep_the_shares_of_samples():
    found = [stream("a", 50, "view"), stream("b", 50, "view"), stream("c", 50, "face")]
    shares = stream_shares(found, {"a": 0.2, "b": 0.2, "c": 0.6})
    sampler = Sampler(found, 0)
    seen = Counter()
    for _ in range(50):
        kind = sampler.kind(shares)
        batch = draws(sampler, shares, 8, kind)
        assert {sampler.streams[d.stream].kind for d in batch} == {kind}
        seen.update(d.stream for d in batch)
    for name, share in shares.items():
        assert abs(seen[name] - 400 * share) < 16


@pytest.mark.parametrize(
    ("mix", "kinds", "message"),
    [
        ({"film": 1}, {}, "no source 'film'; there are speech"),
        ({"speech": -1}, {}, "share of 'speech' must not be negative, got -1"),
        ({"speech": 0}, {}, "every share is zero"),
        ({"speech": 1}, {"video": -2}, "share of 'video' must not be negative, got -2"),
        ({"speech": 1}, {"vidoe": 1}, "batch.kind_shares: no sample is of kind 'vidoe'; there are video"),
    ],
)
def test_shares_that_cannot_be_drawn_get_one_sentence(mix, kinds, message):
    with pytest.raises(ValueError, match=message):
        stream_shares([stream("speech", 3)], mix, kinds)

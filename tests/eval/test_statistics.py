# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from talkingdit.errors import UserError
from talkingdit.eval.frechet import frechet_distance
from talkingdit.eval.metrics.speech import normalised, word_errors
from talkingdit.eval.statistics import difference, holm, interval, interval_of
from talkingdit.eval.win_rate import command_judge, win_rate


def test_intervals_cover_the_true_mean() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for seed in range(200):
        found = interval(rng.normal(3.0, 2.0, 40).tolist(), seed, draws=500)
        inside += found.low <= 3.0 <= found.high
    assert 0.90 <= inside / 200 <= 0.98  # 95 % promised; the percentile bootstrap of 40 values is a little narrow


def test_intervals_of_few_videos_cover_it_too() -> None:
    rng = np.random.default_rng(1)
    found = [interval(rng.normal(3.0, 2.0, 6).tolist(), seed, draws=500) for seed in range(300)]
    inside = sum(one.low <= 3.0 <= one.high for one in found)
    assert inside / 300 >= 0.91  # plain percentiles: 0.85


def test_a_distance_of_sets_lies_in_its_interval() -> None:
    """Draws have fewer different videos, and larger distances: all of the plain interval is above the value."""
    rng = np.random.default_rng(0)
    both = [(rng.normal(0.3, 1, (40, 20)), rng.normal(0, 1, (40, 20))) for _ in range(10)]

    def distance(chosen: np.ndarray) -> float:
        return frechet_distance(*(np.concatenate([both[j][i] for j in chosen]) for i in (0, 1)))

    low, high = interval_of(distance, len(both))
    assert low < distance(np.arange(10)) < high


def test_memory_does_not_grow_with_the_number_of_videos() -> None:
    """20,000 videos: drawn all at once, their numbers and signs would take gigabytes."""
    rng = np.random.default_rng(0)
    first, second = rng.random((2, 20_000)).tolist()
    tracemalloc.start()
    try:
        found = difference(first, second)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.low < found.mean < found.high
    assert peak < 100 * 2**20, peak


def test_interval_of_equal_values_is_a_point() -> None:
    found = interval([0.5] * 7)
    assert (found.mean, found.low, found.high, found.n) == (0.5, 0.5, 0.5, 7)


def test_sign_flip_test_equals_all_assignments() -> None:
    a, b = [3.0, 1.5, 2.0, 4.0, 2.5], [2.0, 1.0, 2.5, 1.0, 1.5]
    gaps = np.subtract(a, b)
    sums = [abs(np.dot(signs, gaps)) for signs in itertools.product((-1, 1), repeat=5)]
    expected = np.mean([total >= abs(gaps.sum()) - 1e-12 for total in sums])
    assert difference(a, b).p == pytest.approx(expected)


def test_sign_flip_test_has_its_level() -> None:
    rng = np.random.default_rng(0)
    alarms = sum(difference(rng.normal(size=12).tolist(), rng.normal(size=12).tolist()).p < 0.05 for _ in range(300))
    assert alarms / 300 < 0.09


def test_equal_systems_do_not_differ() -> None:
    found = difference([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (found.mean, found.p) == (0.0, 1.0)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_win_rate_of_the_protocol() -> None:
    """W = (wins + ties / 2) / n, whatever the order in which the two are shown."""
    contests = [(Path(f"system{i}"), Path(f"base{i}"), "") for i in range(40)]
    by_number = {**{i: "system" for i in range(10)}, **{i: "tie" for i in range(10, 16)}}

    def judge(first: Path, second: Path, text: str) -> int:
        i = int(first.name.removeprefix("system").removeprefix("base"))
        winner = by_number.get(i, "base")
        return 0 if winner == "tie" else 1 + (not first.name.startswith(winner))

    assert win_rate(contests, judge, seed=3).rate == (10 + 6 / 2) / 40


def test_a_judge_that_prefers_the_first_gains_nobody_anything() -> None:
    contests = [(Path(f"system{i}"), Path(f"base{i}"), "") for i in range(400)]
    assert win_rate(contests, lambda first, second, text: 1).rate == pytest.approx(0.5, abs=0.08)


def test_judge_program(tmp_path: Path) -> None:
    program = tmp_path / "judge.sh"
    program.write_text('#!/bin/sh\ncase "$1" in *good*) echo thinking; echo 1;; *) echo 2;; esac\n')
    program.chmod(0o755)
    contests = [(tmp_path / f"good{i}", tmp_path / f"bad{i}", "a text; with 'marks'") for i in range(6)]
    assert win_rate(contests, command_judge(str(program))).rate == 1.0
    program.write_text("#!/bin/sh\necho maybe\n")
    with pytest.raises(UserError, match="must print 1, 2 or 0, got 'maybe'"):
        win_rate(contests, command_judge(str(program)))
    with pytest.raises(UserError, match="there is no such program"):
        win_rate(contests, command_judge(str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("said", "wanted", "errors"),
    [
        ("The cat, sat!", "the cat sat", 0),
        ("the cat", "the cat sat", 1),
        ("a the cat sat down", "the cat sat", 2),
        ("", "the cat sat", 3),
        ("dont", "don't", 1),
        ("It’s 'fine'", "it's fine", 0),
    ],
)
def test_word_errors(said: str, wanted: str, errors: int) -> None:
    assert word_errors(said, wanted) == (errors, len(normalised(wanted)))


def test_word_errors_equal_jiwer() -> None:
    jiwer = pytest.importorskip("jiwer", reason="compares with jiwer, which is not installed")
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = (" ".join(rng.choice(list("abcd"), rng.integers(1, 9))) for _ in range(2))
        errors, words = word_errors(a, b)
        assert errors / words == pytest.approx(jiwer.wer(b, a))

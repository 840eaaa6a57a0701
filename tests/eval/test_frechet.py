# SPDX-License-Identifier: Apache-2.0
"""The Frechet distance against closed forms and against the eigenvalues of the product of the covariances."""

from __future__ import annotations

import numpy as np
import pytest

from talkingdit.errors import UserError
from talkingdit.eval.frechet import frechet_distance

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("n", "m", "d"), [(200, 300, 6), (400, 400, 40), (12, 9, 40)])
def test_equals_the_eigenvalue_form(n: int, m: int, d: int) -> None:
    a, b = RNG.normal(size=(n, d)) @ RNG.normal(size=(d, d)), 1 + RNG.normal(size=(m, d)) * RNG.uniform(0.5, 2, d)
    first, second = np.cov(a.T), np.cov(b.T)
    eigenvalues = np.linalg.eigvals(first @ second).real.clip(0)
    expected = (
        ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * np.sqrt(eigenvalues).sum()
    )
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_commuting_gaussians_have_a_closed_form() -> None:
    base = RNG.normal(size=(500, 8))
    scales, shift = RNG.uniform(0.5, 3, 8), RNG.normal(size=8)
    base = (base - base.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(base.T))).T  # covariance I
    expected = (shift**2).sum() + ((scales - 1) ** 2).sum()
    assert frechet_distance(base, base * scales + shift) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "d"), [(50, 512), (2, 2048), (300, 64), (3, 1)])
def test_a_set_against_itself_is_zero_and_never_below(n: int, d: int) -> None:
    features = 100 * RNG.normal(size=(n, d)) + 1e4
    for other in (features, features[::-1].copy()):
        distance = frechet_distance(features, other)
        assert 0 <= distance <= 1e-9 * (features**2).sum()


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((4, 3)), np.zeros((4, 2)), "features of one size, got 3 and 2"),
        (np.zeros((1, 3)), np.zeros((4, 3)), "at least 2 samples, got 1 and 4"),
        (np.full((4, 3), np.nan), np.zeros((4, 3)), "a must be finite, got NaN or infinity in 4 of 4 rows"),
        (np.zeros(4), np.zeros((4, 3)), r"a must be features \[n, d\].*got shape \[4\]"),
    ],
)
def test_what_cannot_be_compared_is_named(a: np.ndarray, b: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        frechet_distance(a, b)

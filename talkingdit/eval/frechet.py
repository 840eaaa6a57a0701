# SPDX-License-Identifier: Apache-2.0
"""The Frechet distance between two sets of features, without the matrix square root that makes it negative or complex.

For two Gaussians it is |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)). With centred rows X1 and X2, so that
S = X^T X, the last trace is the sum of the singular values of X1 X2^T: real, never negative, exact for any rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from talkingdit.errors import UserError

FloatArray = npt.NDArray[np.float64]


def as_features(given: Any, name: str) -> FloatArray:
    """[n, d] in float64 of an array, a tensor or a list; raises UserError unless finite, with at least one row."""
    if hasattr(given, "detach"):
        given = given.detach().cpu().double().numpy()
    values = np.asarray(given, dtype=np.float64)
    if values.ndim != 2 or 0 in values.shape:
        raise UserError(
            f"frechet: {name} must be features [n, d] with n and d of at least 1, got shape {list(values.shape)}."
        )
    if not np.isfinite(values).all():
        raise UserError(
            f"frechet: {name} must be finite, got NaN or infinity in {_rows_not_finite(values)} of {len(values)} rows."
        )
    return values


def frechet_distance(a: Any, b: Any) -> float:
    """Squared Frechet distance of the Gaussians fitted to two sets of features, with covariances over n - 1.

    Args:
        a, b: features [n, d] and [m, d], n and m of at least 2.

    Raises:
        UserError: shapes that do not fit, values that are not finite, a single sample (it has no covariance).
    """
    first, second = as_features(a, "a"), as_features(b, "b")
    check_pair(first, second, least=2)
    return distance_of(first.mean(0), second.mean(0), [centred_rows(first)], [centred_rows(second)])


def centred_rows(features: FloatArray) -> FloatArray:
    """Rows X with X^T X the covariance over n - 1: [n, d]."""
    rows: FloatArray = (features - features.mean(0)) / np.sqrt(len(features) - 1)
    return rows


def distance_of(
    first_mean: FloatArray,
    second_mean: FloatArray,
    first_rows: Sequence[FloatArray],
    second_rows: Sequence[FloatArray],
    ridge: float = 0.0,
) -> float:
    """The distance from means [d] and rows of the covariances' roots (their squares are added up).

    `ridge` is added to the diagonal of both covariances under the root only, as some published code does; what is then
    below zero is zero.
    """
    first, second = np.concatenate(first_rows), np.concatenate(second_rows)
    traces = float((first**2).sum() + (second**2).sum())
    if ridge:
        diagonal = np.sqrt(ridge) * np.eye(len(first_mean))
        first, second = np.concatenate([first, diagonal]), np.concatenate([second, diagonal])
    roots = np.linalg.svd(_short(first) @ _short(second).T, compute_uv=False)
    gap = first_mean - second_mean
    return max(0.0, float(gap @ gap) + traces - 2.0 * float(roots.sum()))


def _short(rows: FloatArray) -> FloatArray:
    """At most d rows with the same X^T X, so that the product stays small when there are many samples."""
    if len(rows) <= rows.shape[1]:
        return rows
    return np.asarray(np.linalg.qr(rows, mode="r"), np.float64)


def check_pair(first: FloatArray, second: FloatArray, least: int) -> None:
    """Raises UserError unless both have features of one size and at least so many samples."""
    if first.shape[1] != second.shape[1]:
        raise UserError(f"frechet: both sets need features of one size, got {first.shape[1]} and {second.shape[1]}.")
    if min(len(first), len(second)) < least:
        raise UserError(f"frechet: each set needs at least {least} samples, got {len(first)} and {len(second)}.")


def _rows_not_finite(values: FloatArray) -> int:
    return int((~np.isfinite(values).all(1)).sum())

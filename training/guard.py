# SPDX-License-Identifier: Apache-2.0
"""Steps that would do harm are not taken: gradients that are not finite, or far larger than they have been."""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from talkingdit.errors import UserError

WINDOW = 128  # gradient norms that are remembered
ENOUGH = 16  # of them before a spike can be told
ACCUSED = 10  # steps that are not finite whose samples a rank names
PATIENCE = 100  # steps left out in a row after which the run ends

logger = logging.getLogger(__name__)


class Guard:
    """Says whether a step may be taken, and counts those that were not.

    Args:
        factor: a gradient norm over this many times the median of the last ones is a spike; 0 lets all finite ones
            pass.
    """

    def __init__(self, factor: float = 0.0) -> None:
        self.factor = factor
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self.spikes = self.not_finite = self.in_a_row = 0
        self._accused = 0

    def allows(self, norm: float) -> bool:
        """Whether to take a step whose gradient has this norm, the same on every rank.

        Raises:
            UserError: no step was allowed for a long time; the run is going nowhere.
        """
        finite = math.isfinite(norm)
        spike = (
            finite
            and self.factor > 0
            and len(self.norms) >= ENOUGH
            and norm > self.factor * statistics.median(self.norms)
        )
        if finite:
            # Spikes are remembered too: a gradient that has become larger for good is let through after a while.
            self.norms.append(norm)
        if finite and not spike:
            self.in_a_row = 0
            return True
        self.spikes += spike
        self.not_finite += not finite
        self.in_a_row += 1
        if self.in_a_row >= PATIENCE:
            raise UserError(
                f"training: {PATIENCE} steps in a row had gradients that were not finite or spikes (the last norm was "
                f"{norm:g}); try a smaller learning rate or another seed from the last checkpoint."
            )
        return False

    def accuse(self, each: Sequence[tuple[list[str], Tensor]], step: int) -> None:
        """Say, the first few times, which samples of this rank made a step useless.

        Args:
            each: per micro-batch, names and losses [n] of its samples.
            step: that was left out.
        """
        guilty = [
            key for keys, losses in each for key, good in zip(keys, losses.isfinite().tolist(), strict=True) if not good
        ]
        if guilty and self._accused < ACCUSED:
            self._accused += 1
            more = f" and {len(guilty) - 1} more" if len(guilty) > 1 else ""
            logger.warning("training: step %d is left out, the loss of %s%s is not finite", step, guilty[0], more)

    def state_dict(self) -> dict[str, Any]:
        return {
            "norms": list(self.norms),
            "spikes": self.spikes,
            "not_finite": self.not_finite,
            "in_a_row": self.in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        if not all(isinstance(norm, float) and math.isfinite(norm) for norm in state["norms"]):
            raise ValueError("norms must be finite numbers")
        for name in ("spikes", "not_finite", "in_a_row"):
            if type(state[name]) is not int or state[name] < 0:
                raise ValueError(f"{name} must be a number of at least 0, got {state[name]!r:.40}")
        self.norms = deque(state["norms"], maxlen=WINDOW)
        self.spikes, self.not_finite, self.in_a_row = state["spikes"], state["not_finite"], state["in_a_row"]

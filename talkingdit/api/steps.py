# SPDX-License-Identifier: Apache-2.0
"""Callbacks after denoising steps, spelled as in diffusers, and the stop that one may ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from talkingdit.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Callback = Callable[[Any, int, "Tensor", dict[str, Any]], "dict[str, Any] | None"]
TENSORS = ("latents",)


class StepWatch:
    """What happens after every denoising step of one video. Makes the pipeline go on if it was stopped before.

    Args:
        pipe: that is shown to the callback; has `_interrupt`.
        callback: `callback(pipe, step, timestep, {"latents": tensor})`; what it returns replaces the tensors.
        tensors: names of those that it gets.

    Raises:
        UserError: the callback cannot be called, or there is no such tensor.
    """

    def __init__(self, pipe: Any, callback: Callback | None = None, tensors: Sequence[str] = TENSORS) -> None:
        if callback is not None and not callable(callback):
            raise UserError(f"callback_on_step_end: expected a function, got {type(callback).__name__}.")
        wanted = getattr(callback, "tensor_inputs", tensors)  # diffusers' own callbacks say it themselves
        if isinstance(wanted, str) or not set(wanted) <= set(TENSORS):
            raise UserError(
                f"callback_on_step_end_tensor_inputs: expected a list of some of {', '.join(TENSORS)}, got {wanted!r}."
            )
        self._pipe, self._callback, self._wanted = pipe, callback, tuple(wanted)
        pipe._interrupt = False

    def __call__(self, step: int = -1, timestep: float | Tensor = 0.0, latents: Tensor | None = None) -> Tensor | None:
        """See `talkingdit.pipelines.long_video.StepDone`.

        Raises:
            UserError: the family does not tell its latents, or what the callback gives is no dictionary or does not
                fit.
            Interrupted: the pipeline was interrupted.
        """
        from talkingdit.pipelines.job import Interrupted

        if self._callback is not None:
            latents = self._called(step, timestep, latents)
        if self._pipe._interrupt:
            raise Interrupted
        return latents

    def _called(self, step: int, timestep: float | Tensor, latents: Tensor | None) -> Tensor | None:
        import torch

        assert self._callback is not None
        if latents is None and self._wanted:
            raise UserError(
                f"callback_on_step_end_tensor_inputs: expected [] for {self._pipe.family.title}, which does not tell "
                f"its tensors, got {list(self._wanted)}."
            )
        shown = {name: latents for name in self._wanted}
        given = self._callback(self._pipe, step, torch.as_tensor(timestep), shown) or {}
        if not isinstance(given, Mapping):
            raise UserError(
                f"callback_on_step_end: expected a dictionary of tensors after step {step}, got {type(given).__name__}."
            )
        replaced: Any = given.get("latents", latents)
        if latents is None or replaced is latents:
            return latents
        _check(replaced, latents, step)
        return replaced.to(latents.device, latents.dtype)


def _check(replaced: Any, latents: torch.Tensor, step: int) -> None:
    got = getattr(replaced, "shape", None)
    if got != latents.shape:
        got = type(replaced).__name__ if got is None else f"shape {list(got)}"
        raise UserError(
            f"callback_on_step_end: expected latents of shape {list(latents.shape)} after step {step}, got {got}."
        )

# SPDX-License-Identifier: Apache-2.0
"""How a model is changed when it is loaded, so that it takes less memory or less time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from talkingdit.errors import UserError
from talkingdit.pipelines.memory import PRECISION, Memory, fit

if TYPE_CHECKING:
    import torch

    from talkingdit.nn.units import Units

ROUNDED = ("flash3_fp8", "sage")  # backends of attention that change the video


@dataclass(frozen=True)
class Tuning:
    """What is changed.

    Args:
        memory: what is traded for memory and for precision; None where nothing is.
        attention: kernel of attention, see `talkingdit.nn.attention_backends`.
    """

    memory: Memory | None = None
    attention: str = "auto"

    @staticmethod
    def of(switches: str = "", precision: str | None = None, attention: str = "auto") -> Tuning:
        """What was asked for.

        Args:
            switches: of memory, in words that `Memory.parse` reads.
            precision: "fp8" or "int8", or None for that of the switches.
            attention: a backend.

        Raises:
            UserError: an unknown switch, or two that do not go together.
        """
        if precision is not None and precision not in PRECISION[1:]:
            raise UserError(f"generate: precision must be one of {', '.join(PRECISION[1:])}, got {precision!r}.")
        if not switches and precision is None:
            return Tuning(None, attention)
        try:
            memory = Memory.parse(switches)
            if precision is not None and memory.precision not in ("native", precision):
                raise ValueError(f"precision must be that of --precision, {precision}, got {memory.precision!r}")
            return Tuning(memory if precision is None else replace(memory, precision=precision), attention)
        except ValueError as error:
            raise UserError(f"generate: --memory: {str(error).removeprefix('Memory: ')}.") from error

    @property
    def variant(self) -> str:
        """What changes frames, not only time and room: clips made with another one are not gone on from."""
        memory = self.memory
        words = [] if memory is None else [memory.weights, memory.residual, str(memory.absorb_audio), memory.vae]
        if memory is not None and memory.precision != "native":
            words.append(memory.precision)
        if self.attention in ROUNDED:
            words.append(self.attention)
        return " ".join(words)


def usual_device(small: bool = False) -> str:
    """Where models compute if nobody says: a GPU if there is one, but the host for `small` ones, quick enough there."""
    import torch

    return "cuda" if torch.cuda.is_available() and not small else "cpu"


def open_device(name: torch.device | str, verb: str = "generate") -> torch.device:
    """A device by its name, found to be there before anything is read for it.

    Raises:
        UserError: it cannot be used.
    """
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        said = repr(str(name) if isinstance(name, torch.device) else name)
        raise UserError(f"{verb}: the device {said} cannot be used ({reason}).") from error
    return device


def check_dtype(dtype: Any, verb: str) -> None:
    """Can weights be taken in a dtype?

    Raises:
        UserError: it is none of torch with floating point.
    """
    import torch

    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"{verb}: expected a floating-point dtype of torch such as torch.bfloat16, got {dtype!r}.")


def weights_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The precision of weights by its name; None is bfloat16 on a GPU and float32 on the host."""
    import torch

    found: torch.dtype = getattr(torch, name or ("bfloat16" if device.type == "cuda" else "float32"))
    return found


def load_tuned(
    load: Callable[[torch.device | str], Any],
    tuning: Tuning,
    device: torch.device | str,
    units: Units,
    adapt: Callable[[Any, bool], None] = lambda transformer, merge: None,
) -> Any:
    """A checkpoint on a device; where memory is short by way of the host.

    Args:
        load: makes the checkpoint on a device.
        tuning: what is changed.
        device: where to compute.
        units: of the family.
        adapt: puts adapters into the transformer; told whether they are to be merged.

    Raises:
        UserError: the kernel of attention is not there, or the model has no such switch.
    """
    import torch

    memory, device = tuning.memory, torch.device(device)
    _check_attention(tuning.attention, device)
    checkpoint = load(device if memory is None else "cpu")
    # Beside weights that are to be narrower: the change of an adapter is often smaller than their steps.
    merge = memory is None or memory.weights == "native"
    if merge:
        adapt(checkpoint.transformer, True)
    if memory is not None:
        fit(checkpoint, memory, device, units)
    if not merge:
        adapt(checkpoint.transformer, False)
    _choose_attention(checkpoint.transformer, tuning.attention)
    return checkpoint


def _check_attention(backend: str, device: torch.device) -> None:
    from talkingdit.nn import attention_backends

    known = ("auto", *attention_backends.BACKENDS)
    if backend not in known:
        raise UserError(f"generate: attention must be one of {', '.join(known)}, got {backend!r}.")
    try:
        attention_backends.check(backend, device)
    except ValueError as error:
        raise UserError(f"generate: --attention: {str(error).removeprefix('attention: ')}.") from error


def _choose_attention(transformer: Any, backend: str) -> None:
    if backend == "auto":
        return
    if "attention_backend" not in transformer.config:
        raise UserError(f"generate: --attention: {type(transformer).__name__} has no choice of attention kernels.")
    transformer.register_to_config(attention_backend=backend)

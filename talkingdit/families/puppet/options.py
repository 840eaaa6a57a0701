# SPDX-License-Identifier: Apache-2.0
"""What may be said about a video of a drawn character."""

from __future__ import annotations

from dataclasses import dataclass

from talkingdit.families.family import GenerationOptions


@dataclass(frozen=True, kw_only=True)
class Options(GenerationOptions):
    """Guidance of a drawn character."""

    text_guidance: float | None = None
    audio_guidance: float | None = None
    sequential: bool = False

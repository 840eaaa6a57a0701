# SPDX-License-Identifier: Apache-2.0
"""The package for programs: a pipeline as diffusers users know it, and everything in one function."""

from talkingdit.api.once import generate
from talkingdit.api.output import TalkingOutput
from talkingdit.api.pipeline import TalkingPipeline
from talkingdit.api.spans import FrameSpan

__all__ = ["FrameSpan", "TalkingOutput", "TalkingPipeline", "generate"]

# SPDX-License-Identifier: Apache-2.0
"""Training data: manifests of videos, clips cut and encoded from them, on the fly or ahead of time."""

from talkingdit.data.sample import BrokenSample, ClipRequest, Sample, Shape, Source

__all__ = ["BrokenSample", "ClipRequest", "Sample", "Shape", "Source"]

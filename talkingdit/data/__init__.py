# SPDX-License-Identifier: Apache-2.0
"""Training data: manifests of videos, clips cut and encoded from them, on the fly or ahead of time.

The sources are `talkingdit.data.shards.PrecomputedShards` and `talkingdit.data.on_the_fly.OnTheFly`.
"""

from talkingdit.data.sample import BrokenSample, ClipRequest, Sample, Shape, Source

__all__ = ["BrokenSample", "ClipRequest", "Sample", "Shape", "Source"]

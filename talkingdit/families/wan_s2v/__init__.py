# SPDX-License-Identifier: Apache-2.0
"""Wan-S2V (arXiv:2508.18621): an image, a voice and words to a video."""

from talkingdit.families.family import Family

FAMILY = Family("wan_s2v", "Wan-S2V", __name__)
